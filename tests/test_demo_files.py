"""Demonstrations from elsewhere: layouts, pairing, sentences, meaning, memory; and pyproject.toml."""

import importlib
import itertools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import common
from runtime import stage
from runtime.config import HERE
from runtime.errors import UserError
from sim.demos import IN_MEMORY, Films, acting, frames, read_demos, sentence
from sim.env import TaskEnv, instruction, suite_of

demos, sft = importlib.import_module("00_demos"), importlib.import_module("01_sft")
SUITE, TASK = "libero_spatial", 4
STEPS = 12
OFFICIAL = {"problem_info": json.dumps({"language_instruction": "Pick the akita black bowl in the drawer"})}
OFFICIAL |= {"macros_image_convention": "opengl"}


def file_name(suite: str = SUITE, task: int = TASK) -> str:
    return f"{suite}/{suite_of(suite).get_task(task).name}_demo.hdf5"


def write_file(path: Path, attributes: dict, size: int = 16, change=None, demos: int = 2) -> Path:
    """A file whose action t is t / 100, before which t things are done. LIBERO's own say in row t: t + 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update(attributes)
        for i in range(demos):
            demo = data.create_group(f"demo_{2 * i}")
            done = np.arange(STEPS) + ("problem_info" in attributes)
            actions = np.zeros((STEPS, 7))
            actions[:, 0], actions[:, 6] = np.arange(STEPS) / 100, np.where(np.arange(STEPS) > 5, 1, -1)
            arrays = {"actions": actions, "obs/ee_pos": np.repeat(done[:, None], 3, 1) / 100.0}
            arrays |= {"obs/ee_ori": np.zeros((STEPS, 3)), "obs/gripper_states": np.zeros((STEPS, 2))}
            images = np.zeros((STEPS, size, size, 3), np.uint8)
            images[:, 0, 0, 0] = done  # a corner, which the reader turns to the other end
            arrays |= {"obs/agentview_rgb": images, "obs/eye_in_hand_rgb": images + 1}
            for key, value in ((change or dict)(arrays) or arrays).items():
                demo[key] = value
    return path


def adopt(folder: Path, root: Path, **more) -> demos.Config:
    keys = {"name": "x", "root": str(root), "suites": [SUITE], "tasks": [TASK], "image_size": 16}
    cfg = demos.Config(source=str(folder), **keys | more)
    stage.execute(demos.main, cfg)
    return cfg


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """The pictures here show no scene; test_demos.py looks at the check itself."""
    monkeypatch.setattr(demos, "check_upright", lambda cfg: None)


# ---------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("attributes", [OFFICIAL, {}], ids=["LIBERO's", "OpenVLA's"])
def test_an_observation_stands_before_the_action_that_was_taken_from_it(attributes, tmp_path):
    write_file(tmp_path / "files" / file_name(), attributes)
    adopt(tmp_path / "files", tmp_path)
    train, val, instructions = sft.load_data(
        sft.Config(name="x", root=str(tmp_path), suites=[SUITE], holdout=1), 4
    )
    done, first = train["state"][:, 0] * 100, train["chunk"][:, 0, 0] * 100
    assert torch.allclose(done, first) and torch.equal(train["agentview"][:, -1, -1, 0], first.round().byte())
    assert torch.equal(train["wrist"][:, -1, -1, 0], first.round().byte() + 1)
    # the action 0 moves nothing: a no-op of OpenVLA's file; in LIBERO's own no observation stands before it
    assert first.round().tolist() == list(range(1, STEPS)) and len(val["chunk"]) == STEPS - 1
    assert instructions == [instruction(SUITE, TASK)]


def test_where_the_arms_joints_are_known_they_tell_when_an_observation_was_made(tmp_path):
    """A copy of LIBERO's attributes does not make a file LIBERO's own."""
    g = np.random.default_rng(0).normal(size=(STEPS + 1, 20)).cumsum(0)
    for late, attributes in itertools.product((0, 1), (OFFICIAL, {})):

        def change(arrays, late=late):
            return arrays | {"states": g[:-1], "obs/joint_states": g[late : late + STEPS, 1:8] + 1e-3}

        demo = next(read_demos(write_file(tmp_path / file_name(), attributes, change=change), TASK))
        done = (demo.state[:, 0] - demo.actions[:, 0]) * 100 - ("problem_info" in attributes)
        assert np.allclose(done, -late, atol=1e-4)


def test_the_same_pairs_by_replay_as_by_recording(tmp_path):
    """On the real simulator: LIBERO's layout by replay, and OpenVLA's, give what the kit itself records."""
    env = TaskEnv("libero_object", 1, image_size=32)
    cfg = demos.Config(suites=["libero_object"], tasks=[1], frame_every=1)
    _, own = demos.try_until_success(env, 0, cfg, lambda env, _: demos.observation(env, env.steps < 30))
    own = {key: np.asarray(value)[:30] for key, value in own.items() if key != "success_step"}
    own["actions"], replayed = own.pop("actions_executed"), []
    env.reset(0)
    for action in own["actions"]:
        env.step(action)
        replayed.append(demos.observation(env, True))
    env.close()
    obs = {key: np.stack([row[key] for row in replayed])[5:] for key in replayed[0] if key.startswith("obs/")}
    official = obs | {key: own[key][5:] for key in ("actions", "states")}
    name = file_name("libero_object", 1)
    for folder, arrays, attributes, first in (("a", official, OFFICIAL, 6), ("b", own, {}, 0)):
        arrays = {
            key: value for key, value in arrays.items() if key not in ("obs/image_steps", "success_step")
        }
        path = write_file(tmp_path / folder / name, attributes, change=lambda _, new=arrays: new, demos=1)
        (demo,) = read_demos(path, 1)
        assert np.array_equal(demo.actions, own["actions"][first:].astype(np.float32)) and demo.no_ops == 0
        kept = [own[f"obs/{key}"][first:] for key in ("ee_pos", "ee_ori", "gripper_states")]
        assert np.allclose(demo.state, np.concatenate(kept, 1), atol=1e-6)
        assert np.array_equal(demo.agentview[:], own["obs/agentview_rgb"][first:, ::-1, ::-1])
        assert np.array_equal(demo.wrist[:], own["obs/eye_in_hand_rgb"][first:, ::-1, ::-1])


def test_no_ops_are_left_out_counted_and_said(tmp_path, capsys):
    def pause(arrays):
        arrays["actions"][[3, 4, 6, 8], 0] = 0  # at 6 the gripper closes: that is no pause

    write_file(tmp_path / "files" / file_name(), OFFICIAL, change=pause)
    cfg = adopt(tmp_path / "files", tmp_path)
    assert "no_ops" in capsys.readouterr().out
    (row,) = json.loads((cfg.data_dir / "demos.json").read_text())
    assert (row["kept"], row["steps"], row["no_ops"]) == (2, 16, 6)
    demo = next(read_demos(cfg.data_dir / SUITE / f"task_{TASK:02d}.hdf5", TASK))
    steps = [1, 2, 5, 6, 7, 9, 10, 11]
    assert np.allclose(demo.state[:, 0] * 100, steps) and np.array_equal(
        demo.agentview[:][:, -1, -1, 0], steps
    )


def test_what_a_no_op_is():
    """Written out from OpenVLA's definition, with the last action that was kept."""
    g = np.random.default_rng(0)
    actions = np.where(g.random((200, 1)) < 0.5, 0, g.normal(size=(200, 7)))
    actions[:, 6] = np.where(g.random(200) < 0.5, -1, 1)
    kept = []
    for action in actions:
        small = np.sqrt((action[:6] ** 2).sum()) < 1e-4
        if small and (not kept or kept[-1][6] == action[6]):
            continue
        kept.append(action)
    assert 0 < len(kept) < 200 and np.array_equal(actions[acting(actions)], kept)


def test_sentences_of_all_tasks_come_from_their_names():
    for suite in common.SUITES:
        for task in range(suite_of(suite).get_num_tasks()):
            assert sentence(suite_of(suite).get_task(task).name) == instruction(suite, task)


def test_tasks_of_libero_90_with_the_same_sentence_have_files_of_their_own(tmp_path):
    names = [instruction("libero_90", task) for task in range(90)]
    same = [task for task in range(90) if names.count(names[task]) > 1]
    assert len(same) == 28
    for task in same:
        write_file(tmp_path / "libero_90_no_noops" / Path(file_name("libero_90", task)).name, {}, demos=1)
    cfg = adopt(tmp_path, tmp_path / "runs", suites=["libero_90"], tasks=same)
    links = [(cfg.data_dir / "libero_90" / f"task_{task:02d}.hdf5").resolve().name for task in same]
    assert links == [Path(file_name("libero_90", task)).name for task in same]


# ---------------------------------------------------------------------------------------------------- meaning
def shift_gripper(arrays):
    arrays["actions"][:, 6] = arrays["actions"][:, 6] > 0


def turn_gripper(arrays):
    gap = 0.08 - 0.006 * np.clip(np.arange(STEPS) - 6, 0, 5)
    arrays["obs/gripper_states"][:] = np.stack([gap / 2, -gap / 2], 1)
    arrays["actions"][:, 6] *= -1


def enlarge(arrays):
    arrays["actions"][5, 1] = 1.5


def stand_still(arrays):
    arrays["actions"][:, :6], arrays["actions"][:, 6] = 0, -1


@pytest.mark.parametrize(
    ("attributes", "change", "line"),
    [
        ({}, shift_gripper, "no gripper command below 0"),
        ({}, turn_gripper, "fingers that open at 1"),
        (OFFICIAL, turn_gripper, "fingers that open at 1"),
        ({}, enlarge, r"beyond \[-1, 1\]"),
        (OFFICIAL, stand_still, "no step in which the robot moves"),
        (OFFICIAL | {"macros_image_convention": "opencv"}, None, "'opencv' images"),
    ],
)
def test_values_that_mean_something_else_are_refused_at_the_door(attributes, change, line, tmp_path):
    write_file(tmp_path / "files" / file_name(), attributes, change=change)
    with pytest.raises(UserError, match=line):
        adopt(tmp_path / "files", tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("x/data/*"))


def test_the_gripper_as_it_is_passes(tmp_path):
    def change(arrays):
        turn_gripper(arrays)
        arrays["actions"][:, 6] *= -1

    assert len(list(read_demos(write_file(tmp_path / file_name(), {}, change=change), TASK))) == 2


def test_a_wrong_size_task_or_file_leaves_nothing_behind(tmp_path):
    path = write_file(tmp_path / "files" / file_name(), OFFICIAL)
    with pytest.raises(UserError, match="set image_size=16 for this stage"):
        adopt(tmp_path / "files", tmp_path / "runs", image_size=256)
    assert not list((tmp_path / "runs").glob("x/data/*"))
    path.rename(path.with_name(f"task_{TASK:02d}.hdf5"))  # now the sentence inside is all there is
    with pytest.raises(UserError, match="is of another task, 'Pick the akita"):
        adopt(tmp_path / "files", tmp_path / "runs")
    path.with_name(f"task_{TASK:02d}.hdf5").unlink()
    with pytest.raises(UserError, match=f"holds 0 files {path.name}"):
        adopt(tmp_path / "files", tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("x/data/*"))
    both = [tmp_path / "files" / f"{SUITE}{end}" / path.name for end in ("", "_no_noops")]
    for each in both:
        write_file(each, OFFICIAL)
    with pytest.raises(UserError, match=f"holds 2 files .*{both[1]}: name its folder"):
        adopt(tmp_path / "files", tmp_path / "runs")
    adopt(both[1].parent, tmp_path / "other")
    for each in both:
        each.unlink()
    write_file(path, OFFICIAL)
    adopt(tmp_path / "files", tmp_path / "runs")  # no overwrite needed


def test_one_file_does_not_serve_two_layouts(tmp_path):
    """Layouts share their tasks' names and sentences, so a suite's own folder can't say which it holds."""
    path = write_file(tmp_path / "files" / Path(file_name("libero_object")).name, OFFICIAL)
    with pytest.raises(UserError, match=f"libero_object_swap holds 0 files {path.name}"):
        adopt(tmp_path / "files", tmp_path / "runs", suites=["libero_object", "libero_object_swap"])
    adopt(tmp_path / "files", tmp_path / "runs", suites=["libero_object"])


# ----------------------------------------------------------------------------------------------------- memory
def test_frames_on_disk_are_those_in_memory(tmp_path, monkeypatch):
    films = [demo.wrist for demo in read_demos(write_file(tmp_path / file_name(), {}), TASK)]
    images, index = frames(films), torch.tensor([21, 0, 10, 11, 0])
    monkeypatch.setattr("sim.demos.IN_MEMORY", 0)
    assert isinstance(frames(films), Films) and torch.equal(frames(films).select(index), images[index])
    films[0].path.unlink()
    with pytest.raises(UserError, match=r"cannot be read .*it is not there"):
        frames(films).select(index)


BIG = """
import importlib, resource, sys
sys.path[:0] = [sys.argv[1]]
import torch, common
sft, demos = importlib.import_module("01_sft"), importlib.import_module("00_demos")
keys = dict(name="x", root=sys.argv[2], suites=["libero_spatial"], tasks=[4])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
demos.adopted(demos.Config(source=sys.argv[2], image_size=256, **keys))
train, _, _ = sft.load_data(sft.Config(holdout=0, **keys), 10)
obs, _ = sft.batch_of(train, torch.arange(0, len(train["step"]), 100))
print(len(train["step"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_images_of_gigabytes_take_no_memory(tmp_path):
    def big(arrays):
        n = 6000
        actions = np.tile(arrays["actions"][1:2], (n, 1))
        return {"actions": actions} | {
            key: np.zeros((n, a.shape[1])) for key, a in arrays.items() if a.ndim == 2 and key != "actions"
        }

    path = write_file(tmp_path / file_name(), {}, change=big, demos=1)
    with h5py.File(path, "a") as file:  # space that is never written takes none on the disk
        for key in ("agentview_rgb", "eye_in_hand_rgb"):
            file["data/demo_0/obs"].create_dataset(key, (6000, 256, 256, 3), np.uint8)
    link = tmp_path / "x" / "data" / SUITE / f"task_{TASK:02d}.hdf5"
    link.parent.mkdir(parents=True)
    link.symlink_to(path)
    command = [sys.executable, "-c", BIG, str(HERE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, kb = map(int, done.stdout.split())
    assert steps * 256**2 * 3 > 2 * IN_MEMORY and kb < 500_000  # of 2.4 GB


# -------------------------------------------------------------------------------------------------- pyproject
def test_pyproject_and_requirements_agree():
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = (HERE / "requirements.txt").read_text().split()
    assert sorted(required) == sorted(project["dependencies"] + extras["dev"])
    assert not set(extras["lerobot-data"]) & set(required)
    assert all("==" in package for package in [*required, *extras["lerobot-data"]])


@pytest.mark.parametrize("attributes", [{}, OFFICIAL], ids=["OpenVLA's", "LIBERO's"])
def test_links_to_files_with_other_names_are_followed(attributes, tmp_path):
    """As a hub's cache has them: a name that says the task, and a blob named by its hash."""
    blob = write_file(tmp_path / "blobs" / "0123abcd", attributes | {"macros_image_convention": b"opengl"})
    link = tmp_path / "files" / file_name()
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    cfg = adopt(tmp_path / "files", tmp_path / "runs")
    again = adopt(cfg.data_dir, tmp_path / "runs", name="again")  # the files of another run
    for made in (cfg, again):
        (demo, _) = read_demos(made.data_dir / SUITE / f"task_{TASK:02d}.hdf5", TASK)
        assert demo.instruction == instruction(SUITE, TASK)
