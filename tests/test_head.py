"""Stage 06: loss, features, retrieval and protocols, each against a second derivation.

pytest tests/test_head.py
"""

import dataclasses
import gc
import importlib
import itertools
import json
import math
import shutil

import h5py
import numpy as np
import pytest
import torch
from samples import INSTRUCTIONS, observations, stats

import backbones
import common
from runtime import disk
from runtime.config import load_config
from runtime.errors import UserError
from runtime.stage import execute
from sim.demos import demonstrations

head = importlib.import_module("06_pretrain_head")

VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SIZE = {"width": 32, "depth": 1, "mlp_dim": 48, "num_heads": 2}
GEMMA = SIZE | {"num_kv_heads": 1, "head_dim": 16}
MODELS = {
    "pi05": {
        "vlm": GEMMA,
        "expert": GEMMA,
        "vision": VISION | {"image_size": 32, "patch_size": 16},
        "horizon": 4,
        "flow_dim": 7,
    },
    "openvla": {
        "llm": SIZE,
        "dino": VISION | {"hidden_size": 24, "intermediate_size": 48},
        "siglip": VISION,
        "image_size": 32,
    }
    | {"patch_size": 16, "image_pipeline": "none", "n_bins": 16, "bos": 2, "eos": 1, "space": 4},
}


def policy_of(backbone: str):
    torch.manual_seed(0)
    policy = backbones.build(backbone, MODELS[backbone], INSTRUCTIONS)
    g = np.random.default_rng(0)
    policy.norm_stats = {"action": stats(7, g), "state": stats(8, g)}
    return policy.eval()


def units(n: int, dim: int, name: str = "x") -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(n, dim, generator=common.stream(0, name), dtype=torch.float64), dim=1
    )


# --------------------------------------------------------------------------------------------------- the loss
def by_hand(a, b, temperature: float, allowed) -> float:
    """InfoNCE by loops: cross-entropy of each row's positive among what it may choose from, both ways."""
    total, n = 0.0, len(a)
    for x, y, may in ((a, b, allowed), (b, a, [[allowed[j][i] for j in range(n)] for i in range(n)])):
        for i in range(n):
            score = [math.exp(float(x[i] @ y[j]) / temperature) for j in range(n)]
            total -= math.log(score[i] / sum(s for j, s in enumerate(score) if j == i or may[i][j]))
    return total / (2 * n)


def test_info_nce_is_the_mean_cross_entropy_of_both_directions():
    a, b = units(7, 5, "a"), units(7, 5, "b")
    everywhere = torch.ones(7, 7, dtype=torch.bool)
    found = head.info_nce(a, b, 0.3, everywhere).item()
    assert found == pytest.approx(by_hand(a, b, 0.3, everywhere.tolist()), rel=1e-12)
    assert head.info_nce(b, a, 0.3, everywhere).item() == pytest.approx(found, rel=1e-12)
    same = units(1, 5).expand(7, 5)
    assert head.info_nce(same, same, 0.07, everywhere).item() == pytest.approx(math.log(7))  # chance


def test_its_gradient_is_that_of_finite_differences():
    negatives = torch.rand(4, 4, generator=common.stream(0, "mask")) < 0.6
    a, b = (units(4, 3, name).requires_grad_() for name in "ab")
    assert torch.autograd.gradcheck(lambda a, b: head.info_nce(a, b, 0.5, negatives), (a, b))


def test_a_masked_pair_leaves_the_denominators_and_a_positive_never_does():
    a, b = units(6, 4, "a"), units(6, 4, "b")
    b[3] = a[2]  # a false negative: as near to a[2] as can be
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed[2, 3] = allowed[3, 2] = False
    allowed.fill_diagonal_(False)
    masked = head.info_nce(a, b, 0.2, allowed)
    assert masked.item() == pytest.approx(by_hand(a, b, 0.2, allowed.tolist()), rel=1e-12)
    assert masked < head.info_nce(a, b, 0.2, torch.ones(6, 6, dtype=torch.bool)) - 0.1
    nothing = head.info_nce(a, b, 0.2, torch.zeros(6, 6, dtype=torch.bool))
    assert nothing.item() == pytest.approx(0, abs=1e-12)  # nothing but the positive is left to choose


# --------------------------------------------------------------------------------------------- head and tower
def test_the_head_has_the_papers_size_and_gives_unit_vectors():
    made = head.Head(1152)
    assert sum(p.numel() for p in made.parameters()) == 1152 * 512 + 512 + 512 * 128 + 128 == 656_000
    assert torch.allclose(made(torch.randn(3, 1152)).norm(dim=1), torch.ones(3))


def test_folding_the_standardisation_in_changes_no_output():
    torch.manual_seed(0)
    made, x = head.Head(8), 5 + 3 * torch.randn(10, 8)
    want = made((x - x.mean(0)) / x.std(0))
    torch.testing.assert_close(made.fold_in(x.mean(0), x.std(0))(x), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", MODELS)
@torch.no_grad()
def test_pooled_features_are_what_the_policy_reads(backbone):
    policy, images = policy_of(backbone), observations()["agentview"]
    got, pixels = head.pooled(policy, images), policy.pixels(images)
    assert got.shape == (3, 16) and got.std(0).min() > 1e-4
    if backbone == "pi05":  # its projector is linear, so the mean may be taken before or after
        want, got = policy.image_features(pixels).mean(1), policy.multi_modal_projector["linear"](got)
    else:  # DINO's features stand first
        want = policy.patch_features(pixels)[..., 24:].mean(1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_random_tower_keeps_every_number_and_no_place():
    policy = policy_of("pi05")
    before = {name: p.clone() for name, p in policy.named_parameters()}
    head.shuffle_weights(head.tower_of(policy), 0)
    for name, p in policy.named_parameters():
        assert torch.equal(p.flatten().sort().values, before[name].flatten().sort().values)
        assert "vision_tower" in name or torch.equal(p, before[name])
    assert not torch.equal(
        head.tower_of(policy).embeddings.position_embedding.weight,
        before["vision_tower.embeddings.position_embedding.weight"],
    )


# -------------------------------------------------------------------------------------------------- retrieval
def test_the_nearest_are_those_that_sorting_finds_and_what_is_not_allowed_comes_last():
    x, y = units(530, 6, "q"), units(41, 6, "g")
    allowed = common.np_stream(0, "allowed").random((530, 41)) < 0.8
    products = (x @ y.T).masked_fill(~torch.from_numpy(allowed), -2)
    assert np.array_equal(head.nearest(x, y, allowed, 4), products.argsort(1, descending=True)[:, :4].numpy())
    assert head.nearest(x, y[:3], allowed[:, :3], 10).shape == (530, 3)


def test_chance_against_all_that_can_be_drawn():
    """Guessing k different candidates: recall over every subset, one by one."""
    right = np.array([True, False, True, False, False, False])
    for n, k in itertools.product((1, 2, 3, 6), (1, 2, 3)):
        drawn = [right[list(subset)].any() for subset in itertools.combinations(range(n), min(k, n))]
        counts = right[:n].sum(keepdims=True), np.array([n])
        assert head.chance(*counts, k)[0] == pytest.approx(np.mean(drawn))
    nothing = np.zeros(2, int)  # neither candidates, nor right ones among one
    assert head.chance(nothing, np.array([0, 1]), 3).tolist() == [0, 0]


def frames_of(task, episode, step, held=None) -> "head.Frames":
    n = len(task)
    g, every = common.np_stream(0, "frames"), np.arange(n)
    return head.Frames(
        suite=np.array(["s"] * n),
        task=np.array(task),
        episode=np.array(episode),
        step=np.array(step),
        held=np.array([False] * n if held is None else held),
        state=g.random((n, 8), dtype=np.float32),
        pixels=g.random((n, 192), dtype=np.float32),
        agentview=g.random((n, 6), dtype=np.float32),
        wrist=g.random((n, 6), dtype=np.float32),
        anchors=every,
        partners=np.minimum(every + 1, n - 1),
    )


def test_chance_is_what_a_random_embedding_gets():
    task, episode = np.repeat([0, 1, 2], 40), np.repeat(np.arange(12), 10)
    frames, every = frames_of(task, episode, np.tile(np.arange(10) * 4, 12)), np.arange(120)
    vectors = {str(seed): units(120, 8, f"random {seed}").float() for seed in range(60)}
    recalls = head.score(frames, vectors, every, every, episode, near=10)
    for kind in ("task", "episode", "moment"):
        means = [recalls[name, kind][:, 1].mean() for name in vectors]  # @5
        guess, error = recalls["chance", kind][:, 1].mean(), np.std(means) / np.sqrt(60)
        assert abs(np.mean(means) - guess) <= 4 * error + 1e-12
        low, high = {"task": (0.7, 1), "episode": (0, 0), "moment": (0.1, 0.7)}[
            kind
        ]  # the own episode is excluded
        assert low <= guess <= high


def test_recall_on_a_set_whose_answer_is_known():
    """Two tasks of two episodes of three frames, on a circle.

    Beside each frame lies one of its episode (0.1 rad on), a bit further its twin in the other episode of the
    task, opposite to it the other task.
    """
    task, episode = np.repeat([0, 0, 1, 1], 3), np.repeat([0, 1, 2, 3], 3)
    step, every = np.tile([0, 4, 40], 4), np.arange(12)
    angle = np.pi * task + 0.1 * np.tile([0, 1, 5], 4) + 0.12 * np.repeat([0, 1, 0, 1], 3)
    angle[5] = np.pi + 0.48  # the last frame of episode 1 looks like the other task's
    x = torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], 1)).float()
    frames = frames_of(task, episode, step)
    gap = abs(np.angle(np.exp(1j * (angle[:, None] - angle))))  # the answer, from the angles
    first = {}
    for ids in (every, episode):
        recalls = head.score(frames, {"x": x}, every, every, ids, near=10)
        nearest = np.where(ids[:, None] == ids, 9, gap).argmin(1)
        first[len(set(ids))] = recalls["x", "task"]
        assert np.array_equal(recalls["x", "task"][:, 0], task[nearest] == task)
        moment = (task[nearest] == task) & (abs(step[nearest] - step) <= 10)
        assert np.array_equal(recalls["x", "moment"][:, 0], moment)
        assert recalls["x", "episode"].any() == (ids is every)
    assert not first[12][5, 0] and first[12][:, 0].sum() < 12
    assert first[4][:, 0].mean() < 1 == first[4][:, 2].mean()  # all are found among ten


def test_progress_of_an_embedding_that_walks_to_the_goal(monkeypatch):
    there = np.linspace(
        0, 1.5, 6
    )  # angles of an episode's frames; the first two episodes show the goal, the others are held out
    back = there[::-1]
    angles = {"walks": [there] * 4, "turned round": [back] * 4, "walks away": [there, there, back, back]}
    points = {name: np.concatenate(x) for name, x in angles.items()}
    vectors = {name: torch.from_numpy(np.stack([np.cos(x), np.sin(x)], 1)) for name, x in points.items()}
    frames = frames_of(
        [0] * 24,
        np.repeat(np.arange(4), 6),
        np.tile(np.arange(6), 4),
        np.repeat([0, 0, 1, 1], 6).astype(bool),
    )
    monkeypatch.setattr(head, "representations", lambda *_: vectors)
    rows = {(r["features"], r["metric"]): r["value"] for r in head.progress_rows(frames, {}, head.Config())}
    for name, rising, correlation in (("walks", 1, 1), ("turned round", 1, 1), ("walks away", 0, -1)):
        assert rows[name, "rising"] == rising and rows[name, "rank correlation"] == pytest.approx(correlation)


# ----------------------------------------------------------------------------------------- anchors and splits
@pytest.mark.parametrize("every, partner", [(1, 5), (4, 4), (10, 10), (2, 4)])
def test_the_partner_is_the_image_nearest_to_five_steps_on(every, partner):
    steps = np.arange(0, 101, every)
    kept, a, b = head.choose(steps, 5)
    assert (steps[kept][b] - steps[kept][a] == partner).all()
    assert len(a) == min(30, len(steps) - partner // every) and sorted({*a, *b}) == list(range(len(kept)))
    a, b = kept[a], kept[b]
    assert a[0] == 0 and b[-1] == len(steps) - 1 and np.ptp(np.diff(a)) <= 1  # from end to end, evenly


@pytest.mark.parametrize("n", [1, 4])
def test_an_episode_too_short_for_a_partner_gives_no_anchor_but_its_last_image(n):
    kept, a, b = head.choose(np.arange(n), 5)
    assert kept.tolist() == [n - 1] and len(a) == len(b) == 0


def several_tasks() -> "head.Frames":
    """Four tasks of three episodes of eight frames; each task's last episode is held out."""
    episode = np.repeat(np.arange(12), 8)
    return frames_of(episode // 3, episode, np.tile(np.arange(8) * 4, 12), episode % 3 == 2)


CFG = {"batch_size": 8, "epochs": 1, "log_every": 1}


@pytest.mark.parametrize("variant", head.VARIANTS)
@pytest.mark.parametrize("split", ["episodes", "tasks-2"])
def test_what_is_left_out_leaves_no_trace_in_the_head(split, variant):
    """The strongest form: other features on every frame that is left out give the same head, bit for bit."""
    frames, cfg = several_tasks(), head.Config(**CFG)
    frames.partners = np.minimum(frames.anchors + 1, frames.anchors // 8 * 8 + 7)  # within the episode
    on = head.splits(frames)[split]
    left_out = (frames.held if split == "episodes" else frames.task == 2)[:, None]
    changed = {
        c: np.where(left_out, 100 + x, x)
        for c, x in (("agentview", frames.agentview), ("wrist", frames.wrist))
    }
    other = head.Frames(**vars(frames) | changed)
    heads = [head.train(f, on, split, variant, cfg)[0].state_dict() for f in (frames, other)]
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    other.held, other.task = (
        np.zeros(96, bool),
        np.zeros(96, int),
    )  # and it would show, were they not left out
    leaky = head.train(other, np.arange(96), split, variant, cfg)[0].state_dict()
    assert not torch.equal(leaky["fc1.weight"], heads[0]["fc1.weight"])


def test_queries_of_each_protocol_were_not_trained_on():
    frames = several_tasks()
    parts = head.protocols(frames)
    assert list(parts) == ["all frames", "other episodes", "held-out episodes", "held-out tasks"]
    for protocol, key in (("held-out episodes", frames.episode), ("held-out tasks", frames.task)):
        for split, on, queries, *_ in parts[protocol]:
            assert not set(key[queries]) & set(key[on]) and head.splits(frames)[split] is not None
    ((_, _, queries, gallery, _),) = parts["held-out episodes"]
    assert frames.held[queries].all() and not frames.held[gallery].any()
    queries = np.concatenate([part[2] for part in parts["held-out tasks"]])
    assert sorted(queries) == list(range(96))  # every frame is a query once


# -------------------------------------------------------------------------------------------- the whole stage
def write_demos(folder) -> None:
    """Three tasks of four demonstrations of 30 to 33 steps, an image at every 4th; a task has its colour."""
    (folder / "libero_object").mkdir(parents=True)
    for task in range(3):
        g = common.np_stream(0, "demos", task)
        with h5py.File(folder / "libero_object" / f"task_{task:02d}.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": INSTRUCTIONS[task]})
            for i in range(4):
                demo, n = data.create_group(f"demo_{i}"), 30 + i
                demo.attrs["init_state_id"] = i
                demo["actions"], steps = g.uniform(-1, 1, (n, 7)), np.arange(0, n, 4)
                sizes = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}
                obs = {key: g.normal(size=(n, size)) for key, size in sizes.items()} | {"image_steps": steps}
                for key in ("agentview_rgb", "eye_in_hand_rgb"):
                    image = g.integers(0, 120, (len(steps), 32, 32, 3)) + np.eye(3)[task].astype(int) * 100
                    obs[key] = (image + steps[:, None, None, None]).astype(np.uint8)
                for key, value in obs.items():
                    demo[f"obs/{key}"] = value
    disk.write_json(
        folder / "done.json", {"fingerprint": "made by the test", "inputs": {}, "stage": "00_demos"}
    )


@pytest.fixture
def configured(tmp_path):
    """A config whose demonstrations are there, and a function that runs the stage on it."""
    policy_of("pi05").save(tmp_path / "policy")
    cfg = head.Config(root=str(tmp_path), name="run", checkpoint=str(tmp_path / "policy"), holdout=1, **CFG)
    write_demos(cfg.data_dir)
    return cfg


def test_demonstrations_are_held_out_by_their_last_init_states(configured):
    """One order for all stages. Refused: a start from a state kept for others, and a folder without any."""
    found = list(demonstrations(configured, 2))
    assert [(d.task, d.init_state, held) for _, held, d in found] == [
        (t, i, i >= 2) for t in range(3) for i in range(4)
    ]
    assert not any(held for _, held, _ in demonstrations(configured, 4))  # something must be left to train on
    few = dataclasses.replace(configured, tasks=[0, 2])
    assert {demo.task for *_, demo in demonstrations(few, 1)} == {0, 2}
    with pytest.raises(UserError, match=r"task_05\.hdf5 is not there; run 00_demos\.py"):
        list(demonstrations(dataclasses.replace(few, tasks=[0, 5]), 1))
    with pytest.raises(UserError, match=r"libero_goal/task_00\.hdf5 is not there"):
        list(demonstrations(dataclasses.replace(few, suites=["libero_object", "libero_goal"], tasks=[]), 2))
    with h5py.File(configured.data_dir / "libero_object" / "task_01.hdf5", "a") as file:
        file["data/demo_2"].attrs["init_state_id"] = 40
    with pytest.raises(UserError, match="demo_2 starts from init state 40"):
        list(demonstrations(configured, 2))


def run(cfg) -> None:
    execute(head.main, cfg, after=head.show_table)


def files_of(folder) -> dict:
    return disk.read_json(folder / "done.json")["outputs"]


def test_killed_twice_and_run_again_gives_the_same_files(configured, monkeypatch):
    cfg, folder = configured, configured.seed_dir / "head"
    run(cfg)
    want, table = files_of(folder), disk.read_json(folder / "table.json")
    assert {
        "metrics.jsonl",
        "heads/tasks-2-corrected.safetensors",
    } <= want.keys()
    keys = {"metric", "value", "unit", "n", "ci95", "command", "commit", "suite", "backbone", "train_seeds"}
    assert all(keys <= row.keys() for row in table)
    names = {row["features"] for row in table if row["protocol"] == "held-out tasks"}
    assert {
        "encoder",
        "head before training",
        "pixels 8 x 8",
        "proprioception",
        "chance",
        "head, paper",
    } <= names

    def dies_at(name: str, call: int):
        calls, real = itertools.count(), getattr(head, name)

        def dying(*arguments):
            if next(calls) == call:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(head, name, dying)
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
        monkeypatch.setattr(head, name, real)
        gc.collect()  # the traceback held the folder's lock

    shutil.rmtree(folder)
    dies_at("pooled", 5)
    assert not (folder / "metrics.jsonl").exists()
    dies_at("train", 4)
    assert len(list((folder / "heads").iterdir())) == 4
    run(cfg)
    assert files_of(folder) == want


def test_an_episode_that_01_trained_on_is_not_called_held_out(configured):
    own = dataclasses.replace(configured, checkpoint="", holdout=2)
    own.seed_dir.joinpath("sft").mkdir(parents=True)
    for held_out in (2, 1):
        disk.write_json(own.seed_dir / "sft" / "done.json", {"config": {"holdout": held_out}})
        if held_out == 2:
            own.inputs()
    with pytest.raises(UserError, match=r"01 held out 1 init states; set head.holdout=1"):
        own.inputs()


def test_two_layouts_of_a_task_are_one_task(configured):
    shutil.copytree(configured.data_dir / "libero_object", configured.data_dir / "libero_object_swap")
    frames = head.load_frames(dataclasses.replace(configured, suites=["libero_object", "libero_object_swap"]))
    assert {*frames.task} == {0, 1, 2} and frames.episode.max() == 23


def test_episodes_are_held_out_as_in_the_fine_tuning(configured):
    sft = importlib.import_module("01_sft")
    frames = head.load_frames(configured)
    train, val, _ = sft.load_data(sft.Config(root=configured.root, name=configured.name, holdout=1), 4)
    held = np.sort(frames.state[frames.held].sum(1))
    assert held == pytest.approx(np.sort(val["state"].numpy().sum(1)))
    assert len(frames.step) == len(held) + len(train["state"])
    assert (frames.episode[frames.anchors] == frames.episode[frames.partners]).all()
    assert (frames.step[frames.partners] - frames.step[frames.anchors] == 4).all()
    assert (np.diff(frames.episode)[frames.anchors] == 0).all() and len(frames.anchors) == len(
        frames.step
    ) - 12


@pytest.mark.parametrize("bad", ["encoder=rndom", "batch_size=1", "gap=0", "near=-1"])
def test_values_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError, match=bad.split("=")[0]):
        load_config(head.Config, ["configs/micro.yaml", bad])


def test_a_batch_larger_than_the_anchors_and_black_images_are_refused(configured):
    with pytest.raises(UserError, match=r"batch_size=500 is more than the 58 anchors of the smallest"):
        run(dataclasses.replace(configured, batch_size=500))
    with pytest.raises(UserError, match="nothing to retrieve"):
        run(dataclasses.replace(configured, blank_images=True))
