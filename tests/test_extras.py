"""extras/: solvers, caches, cells and students, each against a second derivation.

pytest tests/test_extras.py
"""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import VISION
from torchdiffeq import odeint

import backbones
import common
from backbones import collate
from extras import cells, distill
from report import episodes
from runtime import disk, stage
from runtime.config import load_config
from runtime.errors import UserError
from sim.env import Diverged

SIZE = {"width": 32, "depth": 3, "mlp_dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
MODEL = {"vlm": SIZE, "expert": SIZE, "vision": VISION | {"image_size": 32, "patch_size": 16}}
MODEL |= {"horizon": 10, "flow_dim": 7, "state_token": True, "gate_bias": 1.0}
INSTRUCTION = "pick up the milk and place it in the basket"
UNIT = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}


def make_policy(**changes):
    torch.manual_seed(0)
    policy = backbones.build("pi05", MODEL | changes, [INSTRUCTION, "put both in the basket"])
    for key, p in policy.named_parameters():
        if "dense.weight" in key:  # zero at first: would hide the times
            torch.nn.init.normal_(p, std=0.2)
    sizes = {"action": 7, "state": 8}
    policy.norm_stats = {kind: {k: [v] * n for k, v in UNIT.items()} for kind, n in sizes.items()}
    return policy.eval()


def rule(**changes) -> cells.Config:
    return cells.Config(**({"execute": 2, "denoise_steps": 2, "image_size": 32} | changes))


def scene(seed: int = 0, state: float = 0.0) -> dict:
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for c in ("agentview", "wrist")}
    return images | {"state": np.full(8, state, np.float32), "instruction": INSTRUCTION}


# ---------------------------------------------------------------------------------------------------- solvers
@torch.no_grad()
@pytest.mark.parametrize(
    ("solver", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")]
)
def test_solvers_are_torchdiffeqs(solver, theirs):
    policy = make_policy()
    prefix, noise = (
        policy.encode(collate([scene()])),
        policy.noise(1, torch.Generator().manual_seed(0)),
    )
    grid = torch.linspace(1, 0, 4)
    want = odeint(lambda t, x: policy.velocity(prefix, x, t[None].float()), noise, grid, method=theirs)[-1]
    torch.testing.assert_close(cells.solve(policy, prefix, noise, 3, solver), want, atol=1e-4, rtol=1e-4)
    if solver == "euler":
        torch.testing.assert_close(policy.sample_actions(prefix, noise, 3), want, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------- caches
def test_similarity_is_the_cosine_of_the_less_similar_camera():
    a = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[1] = 255 - b[1]
    assert cells.similarity(a, a) == pytest.approx(1) and cells.similarity(a, b) == pytest.approx(-1)
    b[1] = a[1]
    b[0, :4] = a[0, 4:]
    x, y = (np.asarray(t[0], float).ravel() / 127.5 - 1 for t in (a, b))
    assert cells.similarity(a, b) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-5)


def test_patches_are_those_of_the_prefixs_tokens():
    """A change inside one patch changes the embedding of its token alone: nothing attends in between."""
    policy = make_policy()
    tower = policy.vision_tower.embeddings.patch_embedding
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = pixels.clone()
    changed[1, :, 16:, :16] += 1  # second camera, second row, first column: token 4 + 2
    tokens = [tower(x).flatten(2).transpose(1, 2).flatten(0, 1) for x in (pixels, changed)]
    moved = [(a != b).any(1) for a, b in (tokens, [cells.patches(x, 16) for x in (pixels, changed)])]
    assert moved[0].tolist() == moved[1].tolist() == [i == 6 for i in range(8)]


@torch.no_grad()
def test_refreshing_all_tokens_is_the_prefix_and_none_the_old_one():
    policy = make_policy()
    (x, valid), (y, _) = (policy.embed_prefix(*policy.inputs(collate([scene(seed)]))) for seed in (0, 1))
    every = torch.arange(x.shape[1])
    first, attention = cells.refresh(policy, x, valid, None, every, 8)
    want = policy.prefill(x, valid)[0]
    torch.testing.assert_close(first.keys, want.keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.values, want.values, atol=1e-5, rtol=1e-5)
    assert attention.shape == (8,) and 0 < attention.sum() < 1
    over, _ = cells.refresh(policy, y, valid, first, every, 8)
    torch.testing.assert_close(over.keys, policy.prefill(y, valid)[0].keys, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        first.keys, cells.refresh(policy, x, valid, None, every, 8)[0].keys
    )  # the old one is not written to
    some, _ = cells.refresh(policy, y, valid, first, torch.arange(3, x.shape[1]), 8)
    assert torch.equal(some.keys[:, :, :, :3], first.keys[:, :, :, :3])
    assert (
        (some.keys[:, 1:, :, 3:] != first.keys[:, 1:, :, 3:]).any(-1).all()
    )  # text is the same before it has attended


class Script:
    """A policy in an Actor's hands whose chunks are numbered: action i of inference j is [j, i, 0...]."""

    backbone, horizon = "pi05", 10

    def __init__(self):
        self.inferences = self.encoded = 0

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, obs):
        self.encoded += 1
        return obs

    def noise(self, n, generator):
        return torch.zeros(n)

    def sample_actions(self, prefix, noise, steps):
        chunk = torch.zeros(1, 10, 7)
        chunk[0, :, 0], chunk[0, :, 1] = self.inferences, torch.arange(10)
        self.inferences += 1
        return chunk

    def unnormalise(self, chunk):
        return chunk


def carried_out(cfg, scenes) -> tuple[list[tuple[int, int]], cells.Actor]:
    actor = cells.Actor(Script(), cfg, ("s", 0, 0))
    done = [actor(obs) for obs in scenes]
    assert all(len(actions) == cfg.execute for actions in done)
    return [(int(a[0]), int(a[1])) for actions in done for a in actions], actor


def test_chunk_reuse_executes_each_action_once_and_in_order():
    done, actor = carried_out(rule(reuse="chunk", execute=2, cap=100), [scene()] * 7)
    assert (
        done == [(j, i) for j in range(2) for i in range(10)][:14]
    )  # five looks share an inference, then the chunk is spent
    assert actor.policy.inferences == 2 and actor.hits == 5 and actor.looks == 7
    done, actor = carried_out(rule(reuse="chunk", execute=2, cap=2), [scene()] * 7)
    assert [d for d in done if d[1] == 0] == [(0, 0), (1, 0), (2, 0)] and max(
        i for _, i in done
    ) == 5  # capped after 2 reuses
    done, _ = carried_out(rule(reuse="chunk", execute=3, cap=100), [scene()] * 4)
    assert done == [(0, i) for i in range(9)] + [
        (1, i) for i in range(3)
    ]  # the tenth action has no two behind it


def test_a_changed_image_is_a_miss_and_becomes_what_is_compared_with():
    scenes = [scene(0), scene(0), scene(1), scene(1), scene(0)]
    for reuse, counted in (("chunk", "inferences"), ("prefix", "encoded")):
        _, actor = carried_out(rule(reuse=reuse, cap=100), scenes)
        assert getattr(actor.policy, counted) == 3 and actor.hits == 2
    _, actor = carried_out(rule(reuse="none"), scenes)
    assert actor.policy.inferences == actor.policy.encoded == 5 and actor.hits == 0
    _, actor = carried_out(rule(reuse="prefix", cap=1), [scene()] * 5)
    assert actor.policy.encoded == 3 and actor.policy.inferences == 5


def test_a_slow_drift_is_noticed():
    """Each image is like the one before it, but ever further from the one that the kept values come from."""
    a, b = (scene(seed)["wrist"] for seed in (0, 1))
    drift = [scene() | {"wrist": (a + i / 11 * (b.astype(float) - a)).astype(np.uint8)} for i in range(12)]
    cameras = [torch.from_numpy(np.stack([obs["agentview"], obs["wrist"]])) for obs in drift]
    steps = [cells.similarity(*two) for two in itertools.pairwise(cameras)]
    _, actor = carried_out(rule(reuse="prefix", cap=100, threshold=min(steps) - 1e-4), drift)
    assert 1 < actor.policy.encoded < 12
    _, actor = carried_out(rule(reuse="prefix", cap=100, threshold=min(steps) - 1e-4), [drift[0]] * 12)
    assert actor.policy.encoded == 1


def test_no_reuse_is_what_evaluation_does():
    policy, cfg = make_policy(), rule(execute=4)
    actor = cells.Actor(policy, cfg, ("s", 3, 35), looks=2)
    want = backbones.propose(policy, scene(), cfg, [common.stream(cfg.seed, "eval", "s", 3, 35, 2)])[0]
    np.testing.assert_array_equal(actor(scene()), np.asarray(policy.unnormalise(want))[:4])


@pytest.mark.parametrize("reuse", cells.SEES_ON_A_HIT)
@pytest.mark.parametrize("state_token", [True, False])
def test_what_a_hit_cannot_see(state_token, reuse):
    """An actor looks at one observation, then at another one in which the state or a quarter of one image is
    new; whole images always count as similar enough. Actions that agree to the last bit have not seen it."""
    policy, first = make_policy(state_token=state_token), scene()
    threshold = 0.5 if reuse == "patches" else -1.0
    always = rule(reuse=reuse, threshold=threshold, cap=100, relevant=0.0, execute=1)
    moved = first["agentview"].copy()
    moved[:16, :16] = 255 - moved[:16, :16]
    changes = {"state": np.full(8, 0.5, np.float32), "agentview": moved}

    def acted(changed: dict) -> np.ndarray:
        actor = cells.Actor(policy, always, ("s", 0, 0))
        actor(first)
        return actor(first | changed)

    seen = [key for key in changes if not np.array_equal(acted({key: changes[key]}), acted({}))]
    sees = [{"images": "agentview"}.get(what, what) for what in cells.SEES_ON_A_HIT[reuse]]
    assert seen == [key for key in sees if key != "state" or state_token]


def test_patches_that_stand_still_are_kept_until_the_cap_and_the_wanted_never():
    policy = make_policy()
    actor = cells.Actor(policy, rule(reuse="patches", cap=2, relevant=0.25), ("s", 0, 0))
    moved = scene()
    moved["wrist"][:16, 16:] = 255 - moved["wrist"][:16, 16:]  # token 4 + 1
    for k, obs in enumerate((scene(), scene(), moved, moved)):
        actor(obs)
        if k == 1:
            assert (
                (actor.age == 0).sum() == 2
                and (actor.age == 1).sum() == 6
                and actor.hits == pytest.approx(6 / 8)
            )
        if k == 2:
            assert actor.age[5] == 0
    assert actor.age.max() <= 2 and (actor.age == 0).sum() >= 2
    never = cells.Actor(policy, rule(reuse="patches", threshold=0.98, relevant=1.0), ("s", 0, 0))
    plain = cells.Actor(policy, rule(), ("s", 0, 0))
    for obs in (scene(), moved):
        np.testing.assert_allclose(never(obs), plain(obs), atol=1e-4)
    assert never.hits == 0


def test_patches_are_kept_when_the_prompt_grows_or_shrinks():
    policy = make_policy(prompt="lerobot")
    states = [np.full(8, value, np.float32) for value in (0, -0.95, 0.5)]
    lengths = {policy.embed(collate([scene() | {"state": state}])).tokens.shape[1] for state in states}
    assert len(lengths) > 1, "the state is text, of other lengths"
    kept = cells.Actor(policy, rule(reuse="patches", threshold=0.5, relevant=0.0), ("s", 0, 0))
    for state in states:
        kept(scene() | {"state": state})
        whole = policy.encode(collate([scene() | {"state": state}]))
        assert kept.prefix.keys.shape == whole.keys.shape and kept.prefix.keys.isfinite().all()
        torch.testing.assert_close(
            kept.prefix.keys[:, 0], whole.keys[:, 0]
        )  # before tokens have seen one another
    assert kept.hits == pytest.approx(2)


def test_refusals():
    for bad in ("cells.reuse=patches", "cells.solver=heun"):
        with pytest.raises(UserError, match="needs pi05's layers or its flow"):
            load_config(cells.Config, ["configs/micro.yaml", "backbone=openvla", bad]).inputs()
    with pytest.raises(UserError, match="black ones are all alike"):
        rule(blank_images=True).inputs()
    with pytest.raises(UserError, match="the policy's have 10"):
        cells.Actor(make_policy(), rule(execute=11), ("s", 0, 0))(scene())
    with pytest.raises(UserError, match="unknown reuse='chunks'"):
        load_config(cells.Config, ["configs/micro.yaml", "cells.reuse=chunks"])


# --------------------------------------------------------------------------------------------------- episodes
class World:
    """An environment that succeeds after so many steps of right actions, or crashes."""

    suite, task_id, max_steps = "s", 3, 20

    def __init__(self, needs: int, crash_at: int = 10**9):
        self.needs, self.crash_at, self.steps, self.right = needs, crash_at, 0, 0

    def reset(self, init):
        self.steps = self.right = 0

    def observe(self):
        return {"step": self.steps}

    def step(self, action):
        if self.steps == self.crash_at:
            raise Diverged("planted")
        self.steps += 1
        self.right += round(100 * action[0]) == self.steps
        return self.success

    success = property(lambda self: self.right >= self.needs)


class Right:
    """An actor whose actions are right, three at each look."""

    hits, seconds = 1.23456, {"check": 0.5}

    def __init__(self):
        self.seen = []

    looks = property(lambda self: len(self.seen))

    def __call__(self, obs):
        self.seen.append(obs["step"])
        return np.array([[(obs["step"] + 1 + i) / 100] + 6 * [0] for i in range(3)])


def test_an_episode_ends_with_success_time_or_a_crash():
    actor = Right()
    won = cells.play(World(7), actor, 35)
    assert (won["success"], won["steps"], won["crash"]) == (True, 7, "") and actor.seen == [0, 3, 6]
    assert (won["suite"], won["task"], won["init_state"], won["looks"], won["hits"]) == ("s", 3, 35, 3, 1.235)
    assert won["wall_s"].keys() == {"episode", "check"}
    lost = cells.play(World(30), Right(), 35)
    assert (lost["success"], lost["steps"], lost["crash"]) == (False, 20, "")
    crashed = cells.play(World(30, crash_at=5), Right(), 35)
    assert (crashed["success"], crashed["steps"], crashed["crash"]) == (False, 5, "Diverged")


def write_weights(cfg) -> None:
    """The SFT policy, or the checkpoint, that cells of `cfg` play."""
    if cfg.checkpoint:
        disk.write_atomic(Path(cfg.checkpoint) / "model.safetensors", b"weights")
    else:
        done = {"stage": "01_sft", "fingerprint": "weights", "inputs": {}}
        disk.write_json(cfg.seed_dir / "sft" / "done.json", done)


def finished_cell(cfg, wins: list[bool], hits: float, task: int = 0) -> None:
    """A cell as `cells.main` leaves it, from this task on, with episodes of 100 steps and 50 looks."""
    (Path(cfg.checkpoint) if cfg.checkpoint else cfg.seed_dir / "sft").mkdir(parents=True, exist_ok=True)
    write_weights(cfg)

    def main(cfg, run: stage.Run) -> dict:
        for i, win in enumerate(wins):
            row = {"suite": "libero_object", "task": task + i // 5, "init_state": 35 + i % 5, "seed": 42}
            row |= {"success": win, "steps": 100, "crash": "", "looks": 50, "hits": hits}
            row["wall_s"] = {"episode": 1.0, "check": 0.1, "encode": 0.2, "act": 0.3}
            disk.append_jsonl(run.dir / "played.jsonl", row)
        return episodes.finish(run, cell=cfg.cell)

    stage.execute(main, cfg)


@pytest.fixture
def cell(tmp_path):
    """The Config of a cell without reuse, of the run's own policy."""
    return rule(root=str(tmp_path), name="x", execute=2, denoise_steps=10)


@pytest.mark.parametrize("checkpoint", ["", "published"])
def test_table_of_cells_pairs_with_the_same_look_interval(checkpoint, cell, tmp_path):
    cfg = replace(cell, checkpoint=str(tmp_path / checkpoint) if checkpoint else "")
    finished_cell(cfg, [True] * 8 + [False] * 2, 0)
    finished_cell(replace(cfg, execute=5), [True] * 10, 0)
    finished_cell(replace(cfg, reuse="chunk"), [True] * 5 + [False] * 4 + [True], 25)
    rows = {row["name"].removeprefix("published-"): row for row in cells.cells_table(cfg)}
    assert set(rows) == {"none-k2-euler10", "none-k5-euler10", "chunk0.98x4-k2-euler10"}
    row = rows["chunk0.98x4-k2-euler10"]
    assert (row["successes"], row["gained"], row["lost"], row["hit_rate"]) == (6, 1, 3, 0.5)
    assert row["ms_per_step"] == pytest.approx(6) and row["ms_per_step_parts"]["check"] == pytest.approx(1)
    assert row["paired_with"].endswith("none-k2-euler10")
    assert "gained" not in rows["none-k2-euler10"] and "gained" not in rows["none-k5-euler10"]
    text = cells.listing([*rows.values()], cells.CELLS)
    assert "nothing new" in text and {line.count("|") for line in text.splitlines()} == {11}


def test_cells_that_played_nothing_in_common_are_not_compared(cell):
    finished_cell(cell, [True] * 5, 0)
    finished_cell(replace(cell, reuse="chunk"), [False] * 5, 25, task=1)
    rows = cells.cells_table(cell)
    assert len(rows) == 2 and not any("gained" in row for row in rows)


def test_a_cell_is_paired_with_its_own_weights_in_its_own_circumstances(cell, tmp_path):
    given = replace(cell, checkpoint=str(tmp_path / "published"))
    finished_cell(cell, [False] * 10, 0)
    for cfg, wins in (
        (given, 8),
        (replace(given, denoise_steps=1), 9),
        (replace(given, denoise_steps=2, noise_scale=0), 9),
    ):
        finished_cell(cfg, [True] * wins + [False] * (10 - wins), 0)
    rows = {row["name"]: row for row in cells.cells_table(given)}
    assert rows["published-none-k2-euler1"]["paired_with"] == "published-none-k2-euler10"
    assert rows["published-none-k2-euler1"]["gained"] == 1
    namesake = replace(given, checkpoint=str(tmp_path / "other" / "published"), reuse="chunk")
    finished_cell(namesake, [False] * 10, 0)
    rows |= {row["name"]: row for row in cells.cells_table(given)}
    for unpaired in (
        *("none-k2-euler10", "published-none-k2-euler10", "published-none-k2-euler2"),
        "published-chunk0.98x4-k2-euler10",
    ):
        assert "paired_with" not in rows[unpaired], unpaired


def test_a_cell_of_weights_that_have_changed_since_is_left_out(cell, tmp_path):
    cfg = replace(cell, checkpoint=str(tmp_path / "published"))
    finished_cell(cfg, [True] * 10, 0)
    assert len(cells.cells_table(cfg)) == 1
    (tmp_path / "published" / "model.safetensors").write_bytes(b"others")
    assert cells.cells_table(cfg) == []


@pytest.mark.parametrize("made_by", ["distill", "05_distill"])  # the second one, before it moved to extras/
@pytest.mark.parametrize("checkpoint", ["", "published"])
def test_a_student_is_paired_with_its_teacher(checkpoint, made_by, cell, tmp_path, monkeypatch):
    cfg = replace(cell, execute=8, checkpoint=str(tmp_path / checkpoint) if checkpoint else "")
    finished_cell(cfg, [True] * 10, 0)
    (student := tmp_path / "student").mkdir()
    own = disk.read_json(cfg.folder / "done.json")
    done = {"stage": made_by, "config": {"checkpoint": cfg.checkpoint, "start": "final"}}
    disk.write_json(student / "done.json", done | {"inputs": own["inputs"]})
    folder = cfg.seed_dir / "cell-student-none-k8-euler1-val"
    shutil.copytree(cfg.folder, folder)
    facts = disk.read_json(folder / "done.json") | {"cell": "student-none-k8-euler1"}
    facts["config"] |= {"checkpoint": str(student)}
    disk.write_json(folder / "done.json", facts)
    rows = {row["name"]: row for row in cells.cells_table(cfg)}
    assert rows["student-none-k8-euler1"]["paired_with"] == cfg.cell
    monkeypatch.setattr(
        cells, "HERE", tmp_path
    )  # a folder of the kit is named from there, wherever one stands
    assert cells.teacher({"config": {"checkpoint": "student"}})["stage"] == made_by
    others = {"start": done | {"config": done["config"] | {"start": "750"}, "inputs": own["inputs"]}}
    others["weights"] = done | {"inputs": dict.fromkeys(own["inputs"], "made before")}
    for of_another in others.values():
        disk.write_json(student / "done.json", of_another)
        rows = {row["name"]: row for row in cells.cells_table(cfg)}
        assert "paired_with" not in rows["student-none-k8-euler1"]


# --------------------------------------------------------------------------------------------------- students
def test_one_step_is_what_sampling_in_one_step_gives_and_trains_the_expert_alone():
    policy = make_policy()
    noise = policy.noise(2, common.stream(0, "n"))
    with torch.no_grad():
        prefix = policy.encode(collate([scene(0), scene(1)]))
    assert distill.distance(policy, policy, prefix, noise, 1).item() == pytest.approx(0, abs=1e-10)
    assert distill.distance(policy, policy, prefix, noise, 4).item() > 1e-6
    policy.requires_grad_(False).expert.requires_grad_(True)
    distill.distance(policy, make_policy(), prefix, noise, 4).backward()
    assert all((p.grad is not None) == name.startswith("expert.") for name, p in policy.named_parameters())


def test_a_student_learns_its_teachers_map():
    teacher, student = make_policy(), make_policy()
    with torch.no_grad():
        prefix = teacher.encode(collate([scene(i) for i in range(4)]))
    student.requires_grad_(False).expert.requires_grad_(True)
    held_out = teacher.noise(4, common.stream(0, "held out"))
    before = distill.distance(student, teacher, prefix, held_out, 10).item()
    optimizer = torch.optim.AdamW(student.expert.parameters(), 3e-3)
    for step in range(60):
        distill.distance(student, teacher, prefix, teacher.noise(4, common.stream(0, step)), 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distill.distance(student, teacher, prefix, held_out, 10).item() < 0.5 * before


def test_students_are_for_flow_policies_that_see():
    for bad, why in (("backbone=openvla", "no denoise steps"), ("blank_images=true", "learns from")):
        with pytest.raises(UserError, match=why):
            load_config(distill.Config, ["configs/micro.yaml", bad]).inputs()
