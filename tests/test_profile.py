"""05: clocks, anatomy, solvers and caches, each against a second derivation. pytest tests/test_profile.py"""

import functools
import importlib
import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchdiffeq import odeint

import backbones
import caches
import common
import disk
import episodes
import runs

profile, cells = importlib.import_module("05_profile"), importlib.import_module("05_cells")

SIZE = {"width": 32, "depth": 3, "mlp_dim": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "pi05": {"vlm": SIZE, "expert": SIZE, "vision": VISION | {"image_size": 32, "patch_size": 16}, "horizon": 10, "flow_dim": 7}
    | {"state_token": True, "gate_bias": 1.0},
    "openvla": {"bos": 2, "eos": 1, "space": 4, "vocab_padding": 0, "append_bins": True, "n_bins": 32, "horizon": 2}
    | {"llm": {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2}, "siglip": VISION, "towers": ["siglip"], "image_size": 32}
    | {"patch_size": 16, "image_pipeline": "none", "state_token": True, "cameras": ["agentview", "wrist"]},
}
INSTRUCTION = "pick up the milk and place it in the basket"
UNIT = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}


def make_policy(name: str = "pi05", **changes):
    torch.manual_seed(0)
    policy = backbones.build(name, MODELS[name] | changes, [INSTRUCTION, profile.memory.INSTRUCTION])
    for key, p in policy.named_parameters():
        if "dense.weight" in key:  # zero at first: would hide the times
            torch.nn.init.normal_(p, std=0.2)
    policy.norm_stats = {kind: {k: [v] * n for k, v in UNIT.items()} for kind, n in (("action", 7), ("state", 8))}
    return policy.eval()


def rule(**changes) -> cells.Config:
    return cells.Config(**({"execute": 2, "denoise_steps": 2, "image_size": 32} | changes))


def timed(**changes) -> profile.Config:
    return profile.Config(**({"denoise_steps": 2, "image_size": 32} | changes))


def scene(seed: int = 0, state: float = 0.0) -> dict:
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for c in ("agentview", "wrist")}
    return images | {"state": np.full(8, state, np.float32), "instruction": INSTRUCTION}


# ---------------------------------------------------------------------------------------------------------------- clocks
class Ticks:
    """A clock that moves only when told to."""

    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_time_belongs_to_the_innermost_call():
    ticks = Ticks()
    clock = profile.Clock("cpu", ticks)

    def spend(seconds, then=lambda: None):
        ticks.time += seconds
        then()
        ticks.time += seconds

    inner = clock.wrap(lambda: spend(5), "inner")
    outer = clock.wrap(lambda: spend(1, inner), "outer")
    clock.mark()
    spend(0.25, outer)
    outer()
    assert clock.read() == {"rest": 500, "outer": 4000, "inner": 20000}
    with pytest.raises(ZeroDivisionError):
        clock.wrap(lambda: 1 / 0, "broken")()
    assert clock.open == ["rest"]


@pytest.mark.parametrize("name", MODELS)
def test_timers_leave_the_policy_as_it_was_and_see_every_part(name):
    policy = make_policy(name)
    obs, noise = profile.observations(1, 32), policy.noise(1, torch.Generator().manual_seed(0))
    before, wanted = dict(vars(policy)), profile.look(policy, obs, noise, 2)
    calls = Ticks()
    clock = profile.Clock("cpu", calls)
    clock.now = lambda: setattr(calls, "time", calls.time + 1) or calls.time  # a second for each mark
    with profile.timers(policy, clock):
        clock.mark()
        assert torch.equal(profile.look(policy, obs, noise, 2), wanted)
        spent = clock.read()
    assert set(spent) == {*profile.PARTS[name].values(), "rest"} and set(spent) <= set(profile.ORDER)
    assert sum(spent.values()) == 1000 * (calls.time - 1)  # nothing lost, nothing twice
    assert vars(policy).keys() == before.keys()


def test_a_slow_part_shows_where_it_is():
    """Planted: a step of the expert takes 10, the image tower 60, everything else nothing. The paper's shares, halved steps."""
    policy, ticks = make_policy(), Ticks()
    for name, cost in (("flow", 10), ("image_features", 60)):
        function = getattr(policy, name)

        def slow(*arguments, function=function, cost=cost):
            ticks.time += cost / 1e3
            return function(*arguments)

        setattr(policy, name, slow)
    prepare, profile.prepare = profile.prepare, lambda policy, point: policy
    try:
        found = profile.measure(policy, timed(repeats=2), profile.Point(steps=6, chunk=10), ticks)
    finally:
        profile.prepare = prepare
    assert found["parts_ms"]["denoising"] == pytest.approx(60) and found["parts_ms"]["vision tower"] == pytest.approx(60)
    assert found["p50_ms"] == pytest.approx(120) and found["parts_over_whole"] == pytest.approx(1)
    assert found["prefix_share"] == pytest.approx(0.5) and found["ceiling"] == pytest.approx(2)


@pytest.mark.parametrize("name", MODELS)
def test_every_point_of_the_sweeps_runs_and_changes_what_it_says(name):
    policy, cfg = make_policy(name), timed(repeats=1, compile=False, backbone=name)
    for label, point in profile.points(cfg, policy):
        now = profile.prepare(policy, point)
        prefix = now.encode(profile.observations(point.batch, 32))
        assert len(prefix) == point.batch and prefix.keys.dtype == getattr(torch, point.dtype), label
        text = now.inputs(profile.observations(1, 32))[2 if name == "pi05" else 1].shape[1]
        assert prefix.keys.shape[3] == 4 * point.views + 1 + text, label
        chunk = profile.look(now, profile.observations(point.batch, 32), now.noise(point.batch, torch.Generator()), point.steps)
        assert chunk.shape == (point.batch, point.chunk, 7)
    labels = [label for label, _ in profile.points(cfg, policy)]
    assert labels[0] == "as it is" and {"views 1", "batch 4", "dtype bfloat16"} <= set(labels)
    assert ("steps 20" in labels) == (name == "pi05")


def test_amdahl():
    assert profile.amdahl(0.0) == 1 and profile.amdahl(0.75) == 4 and profile.amdahl(0.214) == pytest.approx(1.272, abs=1e-3)


@functools.cache
def roofline(name: str) -> dict:
    return profile.roofline(profile.Config(backbone=name))


@pytest.mark.parametrize(("name", "weights"), [("pi05", 3.3e9), ("openvla", 7.5e9)])
def test_roofline_against_counts_by_hand(name, weights):
    found = roofline(name)["work"]
    if (
        name == "pi05"
    ):  # of an expert's layer: q, k, v, o and the MLP; 10 tokens, 10 steps; and the modulations, of 10 times at once
        layer = 1024 * 2048 * 2 + 2 * 1024 * 256 + 3 * 1024 * 4096
        modulation = 37 * 1024 * 3072
        linear = 10 * (2 * 10 * (18 * layer + 2 * 32 * 1024)) + 2 * 10 * (modulation + 2 * 1024 * 1024)
        tokens = 2 * 256  # of the images; attention to them, to some 20 of text and to 10 actions comes on top
        attention = 10 * 18 * 4 * 10 * 8 * 256 * (tokens + 30)
        assert linear < found["actions"]["flops"] < linear + 1.2 * attention
        read = 10 * 2 * 18 * layer + 4 * (modulation + 2 * 1024 * 1024 + 20 * 32 * 1024)
        kept = 10 * 18 * 2 * 256 * 2 * (tokens + 30)
        assert read < found["actions"]["bytes"] < read + 1.2 * kept
        language = 17 * (2048 * 2048 * 2 + 2 * 2048 * 256 + 3 * 2048 * 16384) + 2 * 2048 * 256  # of the last layer, k and v
        assert found["prefix"]["bytes"] == 2 * language
    else:
        assert found["actions"]["bytes"] > 7 * 2 * 6.4e9  # a token reads the whole language model
    total = sum(found[part]["bytes"] for part in ("images", "prefix"))
    assert total < 2 * weights


def test_a_gpu_is_bound_by_the_slower_of_both():
    rows = roofline("pi05")
    flops, bandwidth = profile.GPUS["H20"]
    work = rows["work"]["prefix"]
    assert rows["gpus"]["H20"]["ms"]["prefix"] == pytest.approx(1e3 * max(work["flops"] / flops, work["bytes"] / bandwidth))
    assert 0.2 < rows["gpus"]["H100"]["prefix_share"] < 1


# --------------------------------------------------------------------------------------------------------------- solvers
@torch.no_grad()
@pytest.mark.parametrize(("solver", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2")])
def test_solvers_are_torchdiffeqs(solver, theirs):
    policy = make_policy()
    prefix, noise = policy.encode(common.collate([scene()])), policy.noise(1, torch.Generator().manual_seed(0))
    grid = torch.linspace(1, 0, 4)
    want = odeint(lambda t, x: policy.velocity(prefix, x, t[None].float()), noise, grid, method=theirs)[-1]
    torch.testing.assert_close(caches.solve(policy, prefix, noise, 3, solver), want, atol=1e-4, rtol=1e-4)
    if solver == "euler":
        torch.testing.assert_close(policy.sample_actions(prefix, noise, 3), want, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- caches
def test_similarity_is_the_cosine_of_the_less_similar_camera():
    a = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[1] = 255 - b[1]
    assert caches.similarity(a, a) == pytest.approx(1) and caches.similarity(a, b) == pytest.approx(-1)
    b[1] = a[1]
    b[0, :4] = a[0, 4:]
    x, y = (np.asarray(t[0], float).ravel() / 127.5 - 1 for t in (a, b))
    assert caches.similarity(a, b) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-5)


def test_patches_are_those_of_the_prefixs_tokens():
    """A change inside one patch changes the embedding of its token alone (linear patches, no attention in between)."""
    policy = make_policy()
    tower = policy.vision_tower.embeddings.patch_embedding
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = pixels.clone()
    changed[1, :, 16:, :16] += 1  # second camera, second row, first column: token 4 + 2
    tokens = [tower(x).flatten(2).transpose(1, 2).flatten(0, 1) for x in (pixels, changed)]
    moved = [(a != b).any(1) for a, b in (tokens, [caches.patches(x, 16) for x in (pixels, changed)])]
    assert moved[0].tolist() == moved[1].tolist() == [i == 6 for i in range(8)]


@torch.no_grad()
def test_refreshing_all_tokens_is_the_prefix_and_none_the_old_one():
    policy = make_policy()
    (x, valid), (y, _) = (policy.embed_prefix(*policy.inputs(common.collate([scene(seed)]))) for seed in (0, 1))
    every = torch.arange(x.shape[1])
    first, attention = caches.refresh(policy, x, valid, None, every, 8)
    want = policy.prefill(x, valid)[0]
    torch.testing.assert_close(first.keys, want.keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.values, want.values, atol=1e-5, rtol=1e-5)
    assert attention.shape == (8,) and 0 < attention.sum() < 1
    over, _ = caches.refresh(policy, y, valid, first, every, 8)
    torch.testing.assert_close(over.keys, policy.prefill(y, valid)[0].keys, atol=1e-5, rtol=1e-5)
    assert torch.equal(first.keys, caches.refresh(policy, x, valid, None, every, 8)[0].keys)  # the old one is not written to
    some, _ = caches.refresh(policy, y, valid, first, torch.arange(3, x.shape[1]), 8)
    assert torch.equal(some.keys[:, :, :, :3], first.keys[:, :, :, :3])
    assert (some.keys[:, 1:, :, 3:] != first.keys[:, 1:, :, 3:]).any(-1).all()  # text is the same before it has attended


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


def carried_out(cfg, scenes) -> tuple[list[tuple[int, int]], caches.Actor]:
    actor = caches.Actor(Script(), cfg, ("s", 0, 0))
    done = [actor(obs, k) for k, obs in enumerate(scenes)]
    assert all(len(actions) == cfg.execute for actions in done)
    return [(int(a[0]), int(a[1])) for actions in done for a in actions], actor


def test_chunk_reuse_executes_each_action_once_and_in_order():
    done, actor = carried_out(rule(reuse="chunk", execute=2, cap=100), [scene()] * 7)
    assert done == [(j, i) for j in range(2) for i in range(10)][:14]  # five looks share an inference, then the chunk is spent
    assert actor.policy.inferences == 2 and actor.hits == 5 and actor.looks == 7
    done, actor = carried_out(rule(reuse="chunk", execute=2, cap=2), [scene()] * 7)
    assert [d for d in done if d[1] == 0] == [(0, 0), (1, 0), (2, 0)] and max(i for _, i in done) == 5  # capped after 2 reuses
    done, _ = carried_out(rule(reuse="chunk", execute=3, cap=100), [scene()] * 4)
    assert done == [(0, i) for i in range(9)] + [(1, i) for i in range(3)]  # the tenth action has no two behind it


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
    """Each image is like the one before it; what counts is how far it is from the one that the kept values come from."""
    a, b = (scene(seed)["wrist"] for seed in (0, 1))
    drift = [scene() | {"wrist": (a + i / 11 * (b.astype(float) - a)).astype(np.uint8)} for i in range(12)]
    cameras = [torch.from_numpy(np.stack([obs["agentview"], obs["wrist"]])) for obs in drift]
    steps = [caches.similarity(*two) for two in itertools.pairwise(cameras)]
    _, actor = carried_out(rule(reuse="prefix", cap=100, threshold=min(steps) - 1e-4), drift)
    assert 1 < actor.policy.encoded < 12
    _, actor = carried_out(rule(reuse="prefix", cap=100, threshold=min(steps) - 1e-4), [drift[0]] * 12)
    assert actor.policy.encoded == 1


def test_no_reuse_is_what_evaluation_does():
    policy, cfg = make_policy(), rule(execute=4)
    actor = caches.Actor(policy, cfg, ("s", 3, 35))
    want = common.propose(policy, scene(), cfg, [common.stream(cfg.seed, "eval", "s", 3, 35, 2)])[0]
    np.testing.assert_array_equal(actor(scene(), 2), np.asarray(policy.unnormalise(want))[:4])


@pytest.mark.parametrize("state_token", [True, False])
def test_what_a_hit_cannot_see(state_token):
    policy = make_policy(state_token=state_token)
    state = ["state"] if state_token else []
    assert caches.sees_on_a_hit(policy, rule(reuse="none")) == [*state, "images"]
    assert caches.sees_on_a_hit(policy, rule(reuse="chunk")) == []
    assert caches.sees_on_a_hit(policy, rule(reuse="prefix")) == []  # the state is in the prefix: nothing new
    assert caches.sees_on_a_hit(policy, rule(reuse="patches")) == [*state, "images"]


def test_patches_that_stand_still_are_kept_until_the_cap_and_the_wanted_never():
    policy = make_policy()
    actor = caches.Actor(policy, rule(reuse="patches", cap=2, relevant=0.25), ("s", 0, 0))
    moved = scene()
    moved["wrist"][:16, 16:] = 255 - moved["wrist"][:16, 16:]  # token 4 + 1
    for k, obs in enumerate((scene(), scene(), moved, moved)):
        actor(obs, k)
        if k == 1:
            assert (actor.age == 0).sum() == 2 and (actor.age == 1).sum() == 6 and actor.hits == pytest.approx(6 / 8)
        if k == 2:
            assert actor.age[5] == 0
    assert actor.age.max() <= 2 and (actor.age == 0).sum() >= 2
    never = caches.Actor(policy, rule(reuse="patches", threshold=0.98, relevant=1.0), ("s", 0, 0))
    plain = caches.Actor(policy, rule(), ("s", 0, 0))
    for k, obs in enumerate((scene(), moved)):
        np.testing.assert_allclose(never(obs, k), plain(obs, k), atol=1e-4)
    assert never.hits == 0


def test_patches_are_kept_when_the_prompt_grows_or_shrinks():
    policy = make_policy(prompt="lerobot")
    states = [np.full(8, value, np.float32) for value in (0, -0.95, 0.5)]
    lengths = {policy.embed(common.collate([scene() | {"state": state}])).tokens.shape[1] for state in states}
    assert len(lengths) > 1, "the state is text, of other lengths"
    kept = caches.Actor(policy, rule(reuse="patches", threshold=0.5, relevant=0.0), ("s", 0, 0))
    for k, state in enumerate(states):
        kept(scene() | {"state": state}, k)
        whole = policy.encode(common.collate([scene() | {"state": state}]))
        assert kept.prefix.keys.shape == whole.keys.shape and kept.prefix.keys.isfinite().all()
        torch.testing.assert_close(kept.prefix.keys[:, 0], whole.keys[:, 0])  # before tokens have seen one another
    assert kept.hits == pytest.approx(2)


def test_refusals():
    with pytest.raises(common.UserError, match="patches"):
        caches.Actor(make_policy("openvla"), rule(reuse="patches"), ("s", 0, 0))
    with pytest.raises(common.UserError, match="needs a flow"):
        caches.Actor(make_policy("openvla"), rule(solver="heun"), ("s", 0, 0))
    with pytest.raises(common.UserError, match="chunks have 10"):
        caches.Actor(make_policy(), rule(execute=11), ("s", 0, 0))
    with pytest.raises(common.UserError, match=r"cells\.reuse"):
        rule(reuse="chunks")


# --------------------------------------------------------------------------------------------------------------- episodes
class World:
    """An environment that succeeds after so many steps of right actions, or crashes."""

    max_steps = 20

    def __init__(self, needs: int, crash_at: int = 10**9):
        self.needs, self.crash_at, self.steps, self.right = needs, crash_at, 0, 0

    def reset(self, init):
        self.steps = self.right = 0

    def observe(self):
        return {"step": self.steps}

    def step(self, action):
        if self.steps == self.crash_at:
            raise episodes.sim.Diverged("planted")
        self.steps += 1
        self.right += round(100 * action[0]) == self.steps
        return self.success

    success = property(lambda self: self.right >= self.needs)


def test_an_episode_ends_with_success_time_or_a_crash():
    seen = []

    def right(obs, k):
        seen.append((obs["step"], k))
        return np.array([[(obs["step"] + 1 + i) / 100] + 6 * [0] for i in range(3)])

    won = episodes.play(World(7), 0, right)
    assert (won["success"], won["steps"], won["crash"]) == (True, 7, "") and seen == [(0, 0), (3, 1), (6, 2)]
    lost = episodes.play(World(30), 0, right)
    assert (lost["success"], lost["steps"], lost["crash"]) == (False, 20, "")
    crashed = episodes.play(World(30, crash_at=5), 0, right)
    assert (crashed["success"], crashed["steps"], crashed["crash"]) == (False, 5, "Diverged")


def finished_cell(cfg, wins: list[bool], hits: float) -> None:
    weights = [cfg.seed_dir / "published" / "model.safetensors"] if cfg.checkpoint else []  # as a student's, in the run
    for path in weights:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
    name = cells.cell_name(cfg)
    shared, folder = "suites seed image_size render execute noise_scale start checkpoint", cfg.seed_dir / f"cell-{name}-val"
    stage = runs.open_stage("05_cells.py", cfg, folder, shared, weights, [])
    rows = [
        {
            "suite": "libero_object",
            "task": i // 5,
            "init_state": 35 + i % 5,
            "seed": 42,
            "success": win,
            "steps": 100,
            "crash": "",
        }
        | {"looks": 50, "hits": hits, "wall_s": {"episode": 1.0, "check": 0.1, "encode": 0.2, "act": 0.3}}
        for i, win in enumerate(wins)
    ]
    episodes.finish(stage, rows, cell=name, sees_on_a_hit=[] if cfg.reuse == "chunk" else ["images"])


@pytest.mark.parametrize("checkpoint", ["", "published"])
def test_table_of_cells_pairs_with_the_same_look_interval(checkpoint, tmp_path):
    cfg = rule(root=str(tmp_path), name="x", execute=2, denoise_steps=10, checkpoint=checkpoint)
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
    text = cells.cells_markdown(list(rows.values()))
    assert "nothing new" in text and {line.count("|") for line in text.splitlines()} == {11}


def test_a_cell_is_paired_with_its_own_weights_in_its_own_circumstances(tmp_path):
    own = rule(root=str(tmp_path), name="x", execute=2, denoise_steps=10)
    given = replace(own, checkpoint="published")
    finished_cell(own, [False] * 10, 0)
    for cfg, wins in ((given, 8), (replace(given, denoise_steps=1), 9), (replace(given, denoise_steps=2, noise_scale=0), 9)):
        finished_cell(cfg, [True] * wins + [False] * (10 - wins), 0)
    rows = {row["name"]: row for row in cells.cells_table(given)}
    assert rows["published-none-k2-euler1"]["paired_with"] == "published-none-k2-euler10"
    assert rows["published-none-k2-euler1"]["gained"] == 1
    for unpaired in ("none-k2-euler10", "published-none-k2-euler10", "published-none-k2-euler2"):
        assert "paired_with" not in rows[unpaired], unpaired


def test_a_cell_of_weights_that_have_changed_since_is_left_out(tmp_path):
    cfg = rule(root=str(tmp_path), name="x", execute=2, denoise_steps=10, checkpoint="published")
    finished_cell(cfg, [True] * 10, 0)
    assert len(cells.cells_table(cfg)) == 1
    (cfg.seed_dir / "published" / "model.safetensors").write_bytes(b"others")
    assert cells.cells_table(cfg) == []


def test_a_disk_that_is_full_at_the_end_loses_no_wall_times(tmp_path, monkeypatch):
    cfg, write = rule(root=str(tmp_path), name="x", execute=2, denoise_steps=10), disk.write_json

    def full(path, data):
        if path.name == "summary.json":
            raise common.UserError("full")
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(common.UserError, match="full"):
        patch.setattr(disk, "write_json", full)
        finished_cell(cfg, [True] * 10, 0)
    folder = cfg.seed_dir / f"cell-{cells.cell_name(cfg)}-val"
    rows = disk.read_jsonl(folder / "episodes.jsonl")
    assert "wall_s" not in rows[0]
    stage = runs.open_stage(
        "05_cells.py", cfg, folder, "suites seed image_size render execute noise_scale start checkpoint", [], []
    )
    episodes.finish(stage, rows, cell=cells.cell_name(cfg), sees_on_a_hit=["images"])
    assert cells.cells_table(cfg)[0]["ms_per_step"] == pytest.approx(6)


@pytest.mark.parametrize("checkpoint", ["", "published"])
def test_a_student_is_paired_with_its_teacher(checkpoint, tmp_path):
    cfg = rule(root=str(tmp_path), name="x", execute=8, denoise_steps=10, checkpoint=checkpoint)
    finished_cell(cfg, [True] * 10, 0)
    (student := tmp_path / "student").mkdir()
    disk.write_json(student / "done.json", {"stage": "05_distill", "config": {"checkpoint": checkpoint}})
    folder = cfg.seed_dir / "cell-student-none-k8-euler1-val"
    shutil.copytree(cfg.seed_dir / f"cell-{cells.cell_name(cfg)}-val", folder)
    facts = disk.read_json(folder / "done.json") | {"cell": "student-none-k8-euler1"}
    disk.write_json(folder / "done.json", facts | {"config": facts["config"] | {"checkpoint": str(student)}})
    rows = {row["name"]: row for row in cells.cells_table(cfg)}
    assert rows["student-none-k8-euler1"]["paired_with"] == cells.cell_name(cfg)


# ----------------------------------------------------------------------------------------------------------------- stage
def test_the_stage_writes_tables_a_plot_and_one_line_of_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile, "roofline", lambda cfg: roofline(cfg.backbone))
    cfg = profile.Config(
        root=str(tmp_path), name="x", weights="random", model=MODELS["pi05"], image_size=32, repeats=1, compile=False
    )
    cfg = replace(cfg, sweeps=False, denoise_steps=2)
    profile.main(cfg)
    folder = cfg.seed_dir / "profile"
    found = disk.read_json(folder / "latency.json")
    point = found["points"][0]
    assert point["steps"] == 2 and set(point["parts_ms"]) <= set(profile.ORDER) and point["parts_ms"]["denoising"] > 0
    assert (folder / "anatomy.png").stat().st_size > 5000 and "published size" in (folder / "table.md").read_text()
    said = {row["metric"]: row["value"] for row in disk.read_json(folder / "table.json")}  # what configs/paper.yaml looks up
    assert said["p50"] == point["p50_ms"] and 0 < said["denoise_share"] < 1 - said["prefix_share"]
    last = capsys.readouterr().out.strip().splitlines()
    assert any(line.startswith("{") and '"ceiling"' in line for line in last)
    (folder / "table.json").unlink()  # as after a kill at the last moment
    profile.main(cfg)
    assert "already done" in capsys.readouterr().out
    assert {row["metric"]: row["value"] for row in disk.read_json(folder / "table.json")} == said


# ---------------------------------------------------------------------------------------------------------------- student
distill = importlib.import_module("05_distill")


def test_one_step_is_what_sampling_in_one_step_gives_and_trains_the_expert_alone():
    policy = make_policy()
    prefix, noise = policy.encode(common.collate([scene(0), scene(1)])).detach(), policy.noise(2, common.stream(0, "n"))
    torch.testing.assert_close(distill.one_step(policy, prefix, noise), policy.sample_actions(prefix, noise, 1))
    assert distill.distance(policy, policy, prefix, noise, 1).item() == pytest.approx(0, abs=1e-10)
    assert distill.distance(policy, policy, prefix, noise, 4).item() > 1e-6
    policy.requires_grad_(False).expert.requires_grad_(True)
    distill.distance(policy, make_policy(), prefix, noise, 4).backward()
    assert all((p.grad is not None) == name.startswith("expert.") for name, p in policy.named_parameters())


def test_a_student_learns_its_teachers_map():
    teacher, student = make_policy(), make_policy()
    prefix = teacher.encode(common.collate([scene(i) for i in range(4)])).detach()
    student.requires_grad_(False).expert.requires_grad_(True)
    held_out = teacher.noise(4, common.stream(0, "held out"))
    before = distill.distance(student, teacher, prefix, held_out, 10).item()
    optimizer = torch.optim.AdamW(student.expert.parameters(), 3e-3)
    for step in range(60):
        distill.distance(student, teacher, prefix, teacher.noise(4, common.stream(0, step)), 10).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distill.distance(student, teacher, prefix, held_out, 10).item() < 0.5 * before
