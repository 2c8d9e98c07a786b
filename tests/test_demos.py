"""Demonstrations: layout, orientation, noise, replay, determinism, resumption. `pytest tests/test_demos.py`, about 40 s."""

import importlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import common
import sim

demos = importlib.import_module("00_demos")
TASK = 1  # cream cheese: the shortest
LIBERO_KEYS = {"actions", "states", "robot_states", "rewards", "dones", "obs"}
LIBERO_OBS = {"agentview_rgb", "eye_in_hand_rgb", "ee_pos", "ee_ori", "ee_states", "gripper_states", "joint_states"}


@pytest.fixture(scope="module")
def env():
    env = sim.TaskEnv("libero_object", TASK, image_size=32)
    yield env
    env.close()


@pytest.fixture(scope="module")
def record(env, tmp_path_factory):
    """record(**config) -> the file that the stage writes, with one environment for all runs."""

    def run(root: Path | None = None, **config) -> Path:
        root = root or tmp_path_factory.mktemp("run")
        shared = f"root: {root}\ntasks: [{TASK}]\nimage_size: 32\nworkers: 1\n"
        (root / "mini.yaml").write_text(shared + "demos: {frame_every: 25}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sim, "TaskEnv", lambda *_: env)
            patch.setattr(env, "close", lambda: None)
            arguments = [f"demos.{key}={value}" for key, value in ({"n_init": 2} | config).items()]
            demos.main(common.load_config(demos.Config, "demos", [str(root / "mini.yaml"), *arguments]))
        return root / "mini" / "data" / "libero_object" / f"task_{TASK:02d}.hdf5"

    return run


@pytest.fixture(scope="module")
def file(record):
    return record()


def test_layout_is_liberos(file, env):
    with h5py.File(file) as f:
        data = f["data"]
        assert set(data) == {"demo_0", "demo_1"} and data.attrs["num_demos"] == 2
        assert data.attrs["total"] == sum(data[d].attrs["num_samples"] for d in data)
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == env.instruction
        assert json.loads(data.attrs["env_args"])["bddl_file"] == data.attrs["bddl_file_name"]
        assert {"tag", "macros_image_convention", "env_name"} <= set(data.attrs)
        for demo in data.values():
            steps = demo.attrs["num_samples"]
            assert set(demo) == LIBERO_KEYS | {"actions_executed"}
            assert set(demo["obs"]) == LIBERO_OBS | {"image_steps"}
            shapes = {"actions": 7, "actions_executed": 7, "robot_states": 9, "obs/ee_pos": 3, "obs/ee_ori": 3}
            shapes |= {"obs/ee_states": 6, "obs/gripper_states": 2, "obs/joint_states": 7}
            for key, width in shapes.items():
                assert demo[key].shape == (steps, width) and demo[key].dtype == np.float64, key
            assert demo["rewards"].dtype == demo["dones"].dtype == np.uint8
            assert demo["dones"][-1] == 1 and demo["dones"][()].sum() == 1
            images = demo["obs/image_steps"][()]
            assert list(images) == list(range(0, steps, 25))
            assert demo["obs/agentview_rgb"].shape == demo["obs/eye_in_hand_rgb"].shape == (len(images), 32, 32, 3)
            assert np.array_equal(demo["states"][0], demo.attrs["init_state"])
            assert steps == demo.attrs["success_step"] + 1 + demos.Config.tail


def test_reader_sees_what_a_policy_will_see(file, env):
    """The file is upside down, the reader turns it back: equal to observe() at the same moment."""
    demo = next(common.read_demos(file, TASK))
    env.reset(demo.init_state)
    seen = env.observe()
    assert np.array_equal(demo.agentview[0], seen["agentview"]) and np.array_equal(demo.wrist[0], seen["wrist"])
    assert np.array_equal(demo.state[0], seen["state"])
    with h5py.File(file) as f:
        assert np.array_equal(f["data/demo_0/obs/agentview_rgb"][0], seen["agentview"][::-1, ::-1])
    assert demo.instruction == seen["instruction"]


def test_labels_are_clean_and_replay_succeeds(file, env):
    with h5py.File(file) as f:
        demo = f["data/demo_0"]
        clean, executed, states = (demo[key][()] for key in ("actions", "actions_executed", "states"))
        noise, init_state, success_step = (executed - clean), demo.attrs["init_state_id"], demo.attrs["success_step"]
    assert np.abs(clean).max() <= 1 and np.abs(executed).max() <= 1
    assert not noise[:, 6].any() and 0.01 < noise[:, :3].std() < 0.05 and 0.005 < noise[:, 3:6].std() < 0.02
    steps_norm = np.linalg.norm(np.diff(clean[:, :3], axis=0), axis=1)
    assert steps_norm.max() <= demos.Expert.ACCELERATION + 1e-9
    env.reset(init_state)
    for step, action in enumerate(executed):
        assert np.array_equal(env.env.sim.get_state().flatten(), states[step])  # bit for bit
        succeeded = env.step(action)
        assert succeeded if step == success_step else step > success_step or not succeeded


def test_other_seed_gives_another_demonstration(file, record):
    with h5py.File(file) as a, h5py.File(record(n_init=1, demo_seed=1)) as b:
        a, b = a["data/demo_0/actions"][()], b["data/demo_0/actions"][()]
    assert a.shape != b.shape or not np.array_equal(a, b)


def test_killed_and_resumed_equals_undisturbed(file, record, tmp_path):
    """Stop after the first demonstration, go on, and get the same bytes; which shows determinism as well."""
    original, calls = demos.record_demo, []

    def stop_at_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            arguments[-1].with_suffix(".tmp").write_bytes(b"cut short")
            raise KeyboardInterrupt
        original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demos, "record_demo", stop_at_second)
        record(tmp_path)
    resumed = record(tmp_path)
    assert len(calls) == 2 and resumed.read_bytes() == file.read_bytes()
    assert (resumed.parents[1] / "demos.json").read_bytes() == (file.parents[1] / "demos.json").read_bytes()
    assert not (resumed.parents[1] / "parts").exists()


def test_top_grasp_takes_the_narrow_side_and_avoids_neighbours():
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 3, indexing="ij"), -1).reshape(-1, 3)
    box = grid * [0.02, 0.05, 0.03] + [0.1, 0.2, 0.03]  # 4 cm wide along x, 10 cm along y
    position, rotation = demos.top_grasp(box, np.empty((0, 3)), depth=0.02)
    assert np.allclose(position, [0.1, 0.2, 0.04], atol=0.003)
    assert abs(rotation[0, 0]) > 0.99 and np.allclose(rotation[:, 2], [0, 0, -1])  # fingers open along x
    wall = grid * [0.02, 0.005, 0.1] + [0.1, 0.2, 0.1]  # a tall neighbour over the middle
    moved, _ = demos.top_grasp(box, wall, depth=0.02)
    assert abs(moved[1] - 0.2) > 0.02


def test_turn_between_and_limit():
    turn = demos.turn_between(demos.TOP_DOWN, Rotation.from_rotvec([0, 0, 0.3]).as_matrix() @ demos.TOP_DOWN)
    assert np.allclose(turn, [0, 0, 0.3])
    assert np.allclose(demos.limit(np.array([3.0, 4.0]), 1.0), [0.6, 0.8])
    assert np.allclose(demos.limit(np.zeros(2), 1.0), 0)


def test_unknown_task_and_wrong_source_are_user_errors(record, tmp_path):
    with pytest.raises(common.UserError, match="files"):
        record(source=tmp_path)
    with pytest.raises(common.UserError, match="add a row"):
        demos.main(demos.Config(name="goal", root=str(tmp_path), suites=["libero_goal"], tasks=[0]))


def test_official_files_are_adopted(file, record, tmp_path):
    """An official file is one without our additions; the same reader takes it from where the stage links it."""
    folder = tmp_path / "official" / "libero_object"
    folder.mkdir(parents=True)
    copy = folder / (sim.instruction("libero_object", TASK).replace(" ", "_") + "_demo.hdf5")
    copy.write_bytes(file.read_bytes())
    linked = record(source=tmp_path / "official")
    assert linked.is_symlink() and len(list(common.read_demos(linked, TASK))) == 2
