"""Mistakes that this field is known for, where no other test would see them.

pytest tests/test_known_mistakes.py. `python tests/planted.py` makes each mistake of planted.yaml in turn, and
the test that the table names must then fail. The first test here checks that the table still fits the code.
"""

import dataclasses
import gc
import hashlib
import importlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import planted
import pytest
import torch
from samples import FLOW_MODEL, INSTRUCTIONS, close, write_demonstrations

import backbones
import common
from runtime import config, disk, stage
from runtime.errors import UserError
from sim import env
from sim.demos import read_demos

sft, prefs, evaluation, validate = (
    importlib.import_module(name) for name in ("01_sft", "02_collect_prefs", "04_eval", "07_validate")
)


# -------------------------------------------------------------------------------------------------- the table
def test_each_planted_mistake_still_fits_the_code():
    rows = planted.table()
    assert len(rows) >= 30
    assert [problem for row in rows for problem in planted.problems(row)] == []


# ------------------------------------------------------------------------------------------------- randomness
def test_a_stream_is_the_same_in_every_process():
    """Python's own hash of a string differs from process to process."""
    seed = int.from_bytes(hashlib.sha256(b'[42, "eval", "s", 3]').digest()[:8], "little") >> 1
    assert common.stream(42, "eval", "s", 3).initial_seed() == seed
    assert common.np_stream(7, "x").integers(1 << 60) == np.random.default_rng(
        int.from_bytes(hashlib.sha256(b'[7, "x"]').digest()[:8], "little")
    ).integers(1 << 60)


# ----------------------------------------------------------------------------------------------------- acting
@pytest.fixture(scope="module")
def policy():
    """Its units are not the environment's: -1 and 1 are actions of -0.5 and 0.3."""
    torch.manual_seed(0)
    made = backbones.build("pi05", FLOW_MODEL, INSTRUCTIONS)
    stats = {"mean": 0.1, "std": 0.2, "q01": -0.5, "q99": 0.3}
    made.norm_stats = {
        kind: {k: [v] * n for k, v in stats.items()} for kind, n in (("action", 7), ("state", 8))
    }
    return made.eval()


class World:
    """An environment that shows where it is, records what is done, and succeeds at step `wins`."""

    def __init__(self, wins: int = 10**9, max_steps: int = 8, suite: str = "libero_object", task: int = 3):
        self.suite, self.task_id, self.wins, self.max_steps = suite, task, wins, max_steps
        self.steps, self.done, self.restored = 0, [], []

    def reset(self, init):
        self.steps = 0

    def save(self):
        return self.steps

    def restore(self, state):
        self.steps = state
        self.restored.append(state)

    def observe(self):
        images = {c: np.full((32, 32, 3), 10 * self.steps + 5, np.uint8) for c in common.CAMERAS}
        return images | {"state": np.full(8, self.steps / 10, np.float32), "instruction": INSTRUCTIONS[0]}

    def step(self, action):
        self.done.append((self.steps, np.array(action)))
        self.steps += 1
        return self.success

    def close(self):
        pass

    success = property(lambda self: self.steps >= self.wins)


@pytest.fixture(autouse=True)
def one_layout(monkeypatch):
    """A World has no objects, so no first look can be judged."""
    monkeypatch.setattr(evaluation, "target_places", lambda *_: np.full((2, 3), np.nan))


def actions_of(acting, init: int = 40, task: int = 3, **changes) -> np.ndarray:
    """What an evaluation executes in one episode of eight steps, (8, 7)."""
    cfg = dataclasses.replace(evaluation.Config(execute=3, denoise_steps=2), **changes)
    world = World(task=task)
    row = evaluation.play(world, acting, cfg, init, None)
    assert (row["task"], row["init_state"], row["seed"]) == (task, init, cfg.noise_seed or cfg.seed)
    assert (row["success"], row["steps"], row["crash"]) == (False, 8, "")
    return np.stack([action for _, action in world.done])


def test_an_episode_is_decided_by_its_place_and_the_noise_seed(policy):
    world, want = World(), []
    for look in range(3):
        world.steps = 3 * look
        noise = policy.noise(1, common.stream(42, "eval", "libero_object", 3, 40, look))
        chunk = policy.sample_actions(policy.encode(backbones.collate([world.observe()])), noise, 2)
        want.append(policy.unnormalise(chunk)[0, :3].clip(-1, 1))
    first = actions_of(policy)
    close(torch.from_numpy(first).float(), torch.cat(want)[:8].float())
    again = ({}, {"policy": "dpo"}, {"noise_seed": 42, "seed": 43})  # two policies meet the same noise
    assert all(np.array_equal(actions_of(policy, **changes), first) for changes in again)
    for changes in ({"init": 41}, {"task": 2}, {"seed": 43}, {"noise_seed": 7}, {"blank_images": True}):
        assert not np.allclose(actions_of(policy, **changes), first, atol=1e-4)


def test_the_blind_control_sees_black_images(policy, monkeypatch):
    blind = actions_of(policy, blank_images=True)
    observe = World.observe
    monkeypatch.setattr(World, "observe", lambda self: common.blank_images(observe(self)))
    assert np.array_equal(actions_of(policy), blind)


def test_nothing_but_val_and_test_is_evaluated(tmp_path):
    (tmp_path / "x.yaml").touch()
    for group in ("demos", "prefs"):
        with pytest.raises(UserError, match="unknown group"):
            config.load_config(evaluation.Config, [str(tmp_path / "x.yaml"), f"group={group}"])


def test_execution_is_clipped_and_ends_with_success_or_time():
    world = World(wins=3)
    assert env.carry_out(world, np.full((5, 7), 2.0)) == 3
    assert np.abs([action for _, action in world.done]).max() == 1
    assert env.carry_out(World(max_steps=2), np.zeros((5, 7))) == 2


def test_a_crash_is_no_failure_of_the_policy(policy, monkeypatch):
    cfg = evaluation.Config(execute=3, denoise_steps=2)
    row = evaluation.play(World(wins=5), policy, cfg, 40, [])
    assert (row["success"], row["steps"], row["crash"]) == (True, 5, "")

    def diverges(self, action):
        raise env.Diverged("the physics became unstable")

    monkeypatch.setattr(World, "step", diverges)
    row = evaluation.play(World(), policy, cfg, 40, [])
    assert (row["success"], row["crash"]) == (False, "Diverged")


def test_no_episode_is_played_twice(policy, monkeypatch, tmp_path):
    """An evaluation is killed in its third episode. The same command plays the rest, and counts each once."""
    cfg = evaluation.Config(
        name="x", root=str(tmp_path), tasks=[3], n_init=4, execute=3, denoise_steps=2, workers=1
    )
    monkeypatch.setattr(evaluation.Config, "inputs", lambda self: [])
    monkeypatch.setattr(evaluation, "load_policy", lambda cfg: policy)
    monkeypatch.setattr(evaluation, "TaskEnv", lambda suite, task, *_: World(suite=suite, task=task))
    real, began = evaluation.play, []

    def play(env, policy, cfg, init, frames):
        began.append(init)
        if len(began) == 3:
            raise KeyboardInterrupt
        return real(env, policy, cfg, init, frames)

    monkeypatch.setattr(evaluation, "play", play)
    with pytest.raises(KeyboardInterrupt):
        stage.execute(evaluation.main, cfg)
    gc.collect()  # the folder's lock
    stage.execute(evaluation.main, cfg)
    assert began == [40, 41, 42, 42, 43]
    rows = disk.read_jsonl(cfg.folder / "episodes.jsonl")
    assert [row["init_state"] for row in rows] == [40, 41, 42, 43]
    assert disk.read_json(cfg.folder / "summary.json")["n"] == 4


# ------------------------------------------------------------------------------------------------------ pairs
def test_a_decision_holds_what_was_executed_in_the_policys_units(policy):
    cfg = prefs.Config(execute=3, denoise_steps=2)
    quiet, noisy = World(), World()
    plain, loud = (
        prefs.play(w, policy, cfg, ("libero_object", 3, 20, 0), sigma=s)
        for w, s in ((quiet, 0.0), (noisy, 0.3))
    )
    assert (
        [d.n for d in plain] == [3, 3, 2]
        and [d.number for d in plain] == [0, 1, 2]
        and [d.state for d in plain] == [0, 3, 6]
    )
    for world, made in ((quiet, plain), (noisy, loud)):
        for d in made:
            executed = np.stack([a for step, a in world.done if d.state <= step < d.state + d.n]).astype(
                np.float32
            )
            np.testing.assert_allclose(d.executed[: d.n], policy.normalise(executed), atol=1e-5)
    first, again = plain[0], prefs.play(World(), policy, cfg, ("libero_object", 3, 20, 0))[0]
    assert np.array_equal(first.proposed, again.proposed) and np.array_equal(first.proposed, loud[0].proposed)
    added = np.concatenate([policy.unnormalise(d.executed) - policy.unnormalise(d.proposed) for d in loud])
    assert 0.2 < added.std() < 0.4
    np.testing.assert_allclose(
        policy.unnormalise(first.executed), policy.unnormalise(first.proposed).clip(-1, 1), atol=1e-5
    )


def test_play_outs_of_one_source_share_their_later_noise(policy):
    cfg = prefs.Config(execute=3, denoise_steps=2)
    base = prefs.play(World(), policy, cfg, ("libero_object", 3, 20, 0))
    world = World()
    world.steps = 3
    other = prefs.play(world, policy, cfg, ("libero_object", 3, 20, 0), 1, torch.zeros(4, 7))
    assert [d.number for d in other] == [1, 2] and not other[0].proposed.any()
    assert np.array_equal(other[1].proposed, base[2].proposed)  # the world shows the same there


def test_each_branch_starts_from_the_state_and_the_observation_of_its_decision(policy):
    cfg, world = prefs.Config(execute=3, denoise_steps=2, branches=3, tries=2), World(max_steps=12)
    pairs, playouts, _ = prefs.branch_pairs(world, policy, cfg, 20, 0)
    assert (
        pairs == []
        and len(playouts) == 7
        and world.restored == [s for s in sorted(set(world.restored)) for _ in range(2)]
    )
    assert set(world.restored) < {0, 3, 6, 9} and len(set(world.restored)) == 3
    assert not any(facts["success"] for _, facts in playouts)
    assert [facts["decision"] for _, facts in playouts[1:]] == [s // 3 for s in world.restored]
    world = World()
    world.restore = lambda state: (
        setattr(world, "steps", state) or setattr(world, "wins", 8)
    )  # from now on all succeed
    for tensors, facts in prefs.branch_pairs(world, policy, cfg, 20, 0)[0]:
        assert (tensors["state"] == np.float32(3 * facts["decision"] / 10)).all()
        assert not np.array_equal(tensors["chosen_proposed"], tensors["rejected_proposed"])


@pytest.mark.parametrize("won", [(0, 0, 0), (1, 1, 1), (0, 1, 0, 1)])
def test_a_pair_takes_a_success_and_a_failure(won, monkeypatch):
    world = SimpleNamespace(suite="s", task_id=0, success=False, reset=lambda init: None)
    obs = {"agentview": 0, "wrist": 0, "state": 0, "instruction": "i"}

    def play(env, policy, cfg, source, sigma):
        env.success = bool(won[source[-1]])
        return [prefs.Decision(0, None, obs, np.full((4, 7), sigma), np.full((4, 7), sigma), 3)]

    monkeypatch.setattr(prefs, "play", play)
    cfg = prefs.Config(pairs="episode", candidates=len(won), noise_low=0.0, noise_high=0.3)
    pairs, playouts, _ = prefs.episode_pairs(world, None, cfg, 20, 0)
    assert [facts["success"] for _, facts in playouts] == [bool(each) for each in won]
    assert len(pairs) == (len(won) == 4)
    for tensors, facts in pairs:  # the least noisy success against the noisiest failure
        assert (facts["chosen_sigma"], facts["rejected_sigma"], facts["wins"]) == pytest.approx((0.1, 0.2, 2))
        assert tensors["chosen"][0, 0] == pytest.approx(0.1) and tensors["rejected"][0, 0] == pytest.approx(
            0.2
        )


@pytest.fixture
def collected(policy, tmp_path, monkeypatch):
    """Branch pairs as 02 collects them in a World, where a decision's second try wins.

    And all that the policy sampled meanwhile: noise and chunk, one by one.
    """
    seen = []

    class Lucky(World):
        def restore(self, state):
            super().restore(state)
            self.wins = 8 if len(self.restored) % 2 == 0 else 10**9

        def reset(self, init):
            super().reset(init)
            self.wins = 10**9

    sample = policy.sample_actions

    def recorded(prefix, noise, steps):
        chunks = sample(prefix, noise, steps)
        seen.extend(zip(noise, chunks, strict=True))
        return chunks

    cfg = prefs.Config(
        **{"name": "x", "root": str(tmp_path), "seed": 7, "execute": 3, "denoise_steps": 2, "n_init": 2},
        **{"branch_scale": 1.5, "noise_scale": 0.75},
    )
    (cfg.folder / "parts").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(prefs, "TaskEnv", lambda suite, task, *_: Lucky(suite=suite, task=task))
        patch.setattr(prefs.backbones, "load_sft", lambda cfg: policy)
        patch.setattr(policy, "sample_actions", recorded)
        for task in (1, 3):
            prefs.collect(prefs.Job(cfg, cfg.folder, "libero_object", task, quota=9, budget=99))
    prefs.assemble(cfg.folder)
    disk.write_json(cfg.folder / "done.json", {"config": dataclasses.asdict(cfg)})
    return cfg.folder, seen


def acting_log_p(folder, policy, **changes):
    """log p (n, 2) of all pairs under the map that acts, as 07 measures it."""
    cfg = validate.Config(pairs_from=str(folder), denoise_steps=2, **changes)
    pairs = validate.load_pairs(cfg)
    return validate.acting(cfg, policy, policy.encode(pairs), pairs), pairs


def test_the_noise_behind_a_pair_is_what_02_drew(policy, collected):
    folder, seen = collected
    found, pairs = acting_log_p(folder, policy)
    source = pairs["source"]
    assert len(source) == 18 and {row["tried"] for row in source} == {2}
    assert {row["unit"] // 2 for row in source} == {0, 1}, "no init state was attempted twice"
    noise = validate.noise_behind(validate.Config(pairs_from=str(folder)), policy, source)
    for i, proposed in enumerate(pairs["proposed"]):
        for side in range(2):
            drawn, _ = min(seen, key=lambda each: (each[1] - proposed[side]).abs().max())
            assert torch.equal(noise[i, side], drawn)

    row, side = 4, 1  # the density by its definition: that of the noise, over the map's determinant
    prefix = policy.encode(
        {key: pairs[key][row : row + 1] for key in (*common.CAMERAS, "state", "instruction")}
    )

    def two_steps(z):
        for t in (1.0, 0.5):
            z = z - policy.velocity(prefix, z, torch.tensor([t])) / 2
        return z

    z = noise[row, side][None]
    close(two_steps(z)[0], pairs["proposed"][row, side])
    jacobian = torch.autograd.functional.jacobian(two_steps, z)
    log_p = -0.5 * (z.square().sum() + z.numel() * math.log(2 * math.pi))
    log_p = log_p - torch.linalg.slogdet(jacobian.reshape(z.numel(), -1)).logabsdet
    assert found[row, side].item() == pytest.approx(log_p.item(), abs=1e-3) and found.isfinite().all()


def test_a_chunk_that_its_noise_does_not_make_has_no_acting_density(policy, collected):
    folder, _ = collected
    rows, facts = disk.read_jsonl(folder / "pairs.jsonl"), disk.read_json(folder / "done.json")
    assert acting_log_p(folder, policy, pairs="episode")[0].isnan().all(), "their chunks carry action noise"
    disk.write_rows(folder / "pairs.jsonl", [rows[0] | {"tried": 1}, *rows[1:]])
    found, _ = acting_log_p(folder, policy)
    assert found.isnan().nonzero().tolist() == [[0, 0]], (
        "only the first pair's chosen chunk is of other noise"
    )
    disk.write_rows(folder / "pairs.jsonl", [{k: v for k, v in row.items() if k != "tried"} for row in rows])
    assert acting_log_p(folder, policy)[0].isnan().all()
    disk.write_rows(folder / "pairs.jsonl", rows)
    for key, wrong in (("seed", 8), ("n_init", 15)):
        facts["config"] |= {key: wrong}
        disk.write_json(folder / "done.json", facts)
        assert acting_log_p(folder, policy)[0].isnan().any(), key
        facts["config"] |= {"seed": 7, "n_init": 2}


# ------------------------------------------------------------------------------------------------ fine-tuning
def config_of(tmp_path, **changes):
    values = {
        "steps": 1,
        "batch_size": 4,
        "draws": 2,
        "warmup": 0,
        "holdout": 1,
        "log_every": 1,
        "checkpoint_every": 1,
    }
    cfg = sft.Config(name="x", root=str(tmp_path), model=FLOW_MODEL, tasks=[0], **values | changes)
    write_demonstrations(cfg.data_dir / "libero_object" / "task_00.hdf5", [0, 0, 1, 2])
    disk.write_json(
        cfg.data_dir / "done.json", {"stage": "00_demos", "inputs": {}, "fingerprint": "of the test"}
    )
    return cfg


def test_what_is_held_out_and_what_belongs_together(tmp_path):
    cfg = config_of(tmp_path)
    train, val, _ = sft.load_data(cfg, 4)
    assert len(train["chunk"]) == 3 * 4 and len(val["chunk"]) == 4 and len(train["all_actions"]) == 3 * 13
    held = list(read_demos(cfg.data_dir / "libero_object" / "task_00.hdf5", 0))[3]
    assert held.init_state == 2 and np.array_equal(val["agentview"], held.agentview[:])
    for part in (train, val):  # an image's state and first action are those of its own step
        step = torch.tensor([0, 4, 8, 12]).repeat(len(part["chunk"]) // 4) / 100
        close(part["state"][:, 0], step)
        close(part["chunk"][:, 0, 0], step)
    write_demonstrations(cfg.data_dir / "libero_object" / "task_00.hdf5", [0, 40, 1])
    with pytest.raises(UserError, match="init state 40, which is kept for another purpose"):
        sft.load_data(cfg, 4)


def test_the_first_loss_written_out(tmp_path):
    """In the policy's units, on augmented images, with the draws of openpi's training."""
    cfg = config_of(tmp_path)
    stage.execute(sft.main, cfg)
    (row,) = disk.read_jsonl(cfg.seed_dir / "sft" / "metrics.jsonl")
    made, train, _ = sft.make_policy(cfg)
    index, g = common.shuffled(42, "sft", 0, 4, 12), common.stream(42, "sft", 0)
    obs = {key: train[key][index] for key in (*common.CAMERAS, "state")} | {
        "instruction": INSTRUCTIONS[:1] * 4
    }
    for camera in common.CAMERAS:
        obs[camera] = common.random_shift(obs[camera], common.SHIFT, g)
    q01, q99 = (np.quantile(train["all_actions"], q, axis=0) for q in (0.01, 0.99))
    chunk = (2 * (train["chunk"][index].numpy() - q01) / (q99 - q01 + 1e-6) - 1).astype(np.float32)
    draws = common.make_draws(4, 4, 7, 2, g, "beta")
    with torch.no_grad():
        want = made.sft_loss(made.encode(obs), torch.from_numpy(chunk), draws)
    assert row["loss"] == pytest.approx(want.item(), rel=1e-4)


def test_what_is_saved_is_the_average_of_the_weights(tmp_path):
    """After one step the decay is 1/10, so the saved weights have gone nine tenths of the way."""
    ends = {}
    for ema in (0.0, 0.998):
        cfg = config_of(tmp_path / str(ema), ema=ema)
        stage.execute(sft.main, cfg)
        ends[ema] = disk.load_tensors(cfg.seed_dir / "sft" / "model.safetensors")
    begun = sft.make_policy(cfg)[0].state_dict()
    moved = 0
    for key, tensor in ends[0.998].items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                tensor, begun[key] + 0.9 * (ends[0.0][key] - begun[key]), atol=1e-6, rtol=0
            )
            moved += not torch.equal(ends[0.0][key], begun[key])
    assert moved > 20


def test_the_validation_loss_is_that_of_the_saved_weights(tmp_path):
    """An adapter's small change is rounded when it is merged into bfloat16."""
    begun = config_of(tmp_path / "begun")
    stage.execute(sft.main, begun)
    given = {"train": "lora", "dtype": "bfloat16", "init_from": str(begun.folder), "ema": 0.0}
    cfg = config_of(tmp_path / "adapted", **given)
    stage.execute(sft.main, cfg)
    (row,) = disk.read_jsonl(cfg.folder / "metrics.jsonl")
    saved, (_, val, _) = backbones.load_policy(cfg.folder), sft.load_data(cfg, 4)
    assert row["val_loss"] == sft.validation_loss(saved.cast("bfloat16"), val, cfg)


def test_fine_tuning_goes_on_where_it_was(tmp_path, monkeypatch):
    whole, cut = (config_of(tmp_path / name, steps=4) for name in ("whole", "cut"))
    stage.execute(sft.main, whole)
    real, calls = common.random_shift, itertools.count()

    def dies(images, pixels, generator):
        if next(calls) == 4:  # in the third step
            raise KeyboardInterrupt
        return real(images, pixels, generator)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "random_shift", dies)
        stage.execute(sft.main, cut)
    gc.collect()  # the folder's lock
    stage.execute(sft.main, cut)
    outputs = [disk.read_json(cfg.seed_dir / "sft" / "done.json")["outputs"] for cfg in (whole, cut)]
    assert outputs[0] == outputs[1]
