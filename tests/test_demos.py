"""Demonstrations and the scripted expert: layout, noise, replay, resuming, tasks. About 50 s."""

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.spatial.transform import Rotation

import backbones
import common
from runtime import stage
from runtime.config import HERE, load_config
from runtime.errors import UserError
from sim import grasps
from sim.demos import read_demos
from sim.env import TaskEnv, instruction, suite_of
from sim.expert import BOTTLE, BOWL, TASKS, Expert, target_places

demos = importlib.import_module("00_demos")
TASK = 1  # cream cheese: the shortest
LIBERO_KEYS = {"actions", "states", "robot_states", "rewards", "dones", "obs"}
LIBERO_OBS = {"agentview_rgb", "eye_in_hand_rgb", "ee_pos", "ee_ori", "ee_states"}
LIBERO_OBS |= {"gripper_states", "joint_states"}


@pytest.fixture(scope="module")
def env():
    env = TaskEnv("libero_object", TASK, image_size=32)
    yield env
    env.close()


@pytest.fixture(scope="module")
def record(env, tmp_path_factory):
    """record(**config) -> the file that the stage writes, with one environment for all runs."""

    def recorded(root: Path | None = None, **config) -> Path:
        root = root or tmp_path_factory.mktemp("run")
        shared = f"root: {root}\ntasks: [{TASK}]\nimage_size: 32\nworkers: 1\n"
        (root / "mini.yaml").write_text(shared + "demos: {frame_every: 25}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(demos, "TaskEnv", lambda *_: env)
            patch.setattr(env, "close", lambda: None)
            arguments = [f"demos.{key}={value}" for key, value in ({"n_init": 2} | config).items()]
            stage.execute(demos.main, load_config(demos.Config, [str(root / "mini.yaml"), *arguments]))
        return root / "mini" / "data" / "libero_object" / f"task_{TASK:02d}.hdf5"

    return recorded


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
            shapes = {
                "actions": 7,
                "actions_executed": 7,
                "robot_states": 9,
                "obs/ee_pos": 3,
                "obs/ee_ori": 3,
            }
            shapes |= {"obs/ee_states": 6, "obs/gripper_states": 2, "obs/joint_states": 7}
            for key, width in shapes.items():
                assert demo[key].shape == (steps, width) and demo[key].dtype == np.float64, key
            assert demo["rewards"].dtype == demo["dones"].dtype == np.uint8
            assert demo["dones"][-1] == 1 and demo["dones"][()].sum() == 1
            images = demo["obs/image_steps"][()]
            assert list(images) == list(range(0, steps, 25))
            for camera in ("agentview", "eye_in_hand"):
                assert demo[f"obs/{camera}_rgb"].shape == (len(images), 32, 32, 3)
            assert np.array_equal(demo["states"][0], demo.attrs["init_state"])
            assert steps == demo.attrs["success_step"] + 1 + demos.Config.tail


def test_reader_sees_what_a_policy_will_see(file, env):
    """The file is upside down, the reader turns it back: equal to observe() at the same moment."""
    demo = next(read_demos(file, TASK))
    env.reset(demo.init_state)
    seen = env.observe()
    for key in ("agentview", "wrist", "state"):
        assert np.array_equal(getattr(demo, key)[0], seen[key]), key
    with h5py.File(file) as f:
        assert np.array_equal(f["data/demo_0/obs/agentview_rgb"][0], seen["agentview"][::-1, ::-1])
    assert demo.instruction == seen["instruction"]


def test_the_expert_heads_for_where_the_target_is(file, env):
    for demo in read_demos(file, TASK):
        assert np.allclose(demo.places, target_places(env, demo.init_state))
        chunk, hand = torch.from_numpy(demo.actions[None, :8]), demo.state[:1, :3]
        both = (demo.places[None], demo.places[None, ::-1])
        assert [backbones.heads_for_first(chunk, hand, places).item() for places in both] == [True, False]


def test_labels_are_clean_and_replay_succeeds(file, env):
    with h5py.File(file) as f:
        demo = f["data/demo_0"]
        clean, executed, states = (demo[key][()] for key in ("actions", "actions_executed", "states"))
        init_state, success_step = demo.attrs["init_state_id"], demo.attrs["success_step"]
    noise = executed - clean
    assert np.abs(clean).max() <= 1 and np.abs(executed).max() <= 1
    assert 0.01 < noise[:, :3].std() < 0.05 and 0.005 < noise[:, 3:6].std() < 0.02
    assert not noise[:, 6].any()
    steps_norm = np.linalg.norm(np.diff(clean[:, :3], axis=0), axis=1)
    assert steps_norm.max() <= Expert.ACCELERATION + 1e-9
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
    """Stop after the first demonstration, go on, and get the same bytes: recording is deterministic too."""
    original, calls = demos.write_demo, []

    def stop_at_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demos, "write_demo", stop_at_second)
        record(tmp_path)
    assert not list(tmp_path.rglob("*.hdf5"))  # a task's file appears when it is whole
    resumed = record(tmp_path)
    assert len(calls) == 2 and resumed.read_bytes() == file.read_bytes()
    assert (resumed.parents[1] / "demos.json").read_bytes() == (file.parents[1] / "demos.json").read_bytes()
    assert not (resumed.parents[1] / "tries").exists()


def test_top_grasp_takes_the_narrow_side_and_avoids_neighbours():
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 3, indexing="ij"), -1).reshape(-1, 3)
    box = grid * [0.02, 0.05, 0.03] + [0.1, 0.2, 0.03]  # 4 cm wide along x, 10 cm along y
    position, rotation = grasps.top_grasp(box, np.empty((0, 3)), depth=0.02)
    assert np.allclose(position, [0.1, 0.2, 0.04], atol=0.003)
    assert abs(rotation[0, 0]) > 0.99 and np.allclose(rotation[:, 2], [0, 0, -1])  # fingers open along x
    wall = grid * [0.02, 0.005, 0.1] + [0.1, 0.2, 0.1]  # a tall neighbour over the middle
    moved, _ = grasps.top_grasp(box, wall, depth=0.02)
    assert abs(moved[1] - 0.2) > 0.02


def ring(handle: float = 0.0) -> np.ndarray:
    """Points of a cup around the z axis: radius 4 cm, height 5 cm, with a handle along +x."""
    angle, height = (x.ravel() for x in np.meshgrid(np.linspace(-np.pi, np.pi, 60), np.linspace(0, 0.05, 6)))
    cup = 0.04 * np.stack([np.cos(angle), np.sin(angle), height / 0.04], axis=1)
    bar = np.meshgrid(np.linspace(0.04, 0.04 + handle, 5), [-0.004, 0.004], np.linspace(0, 0.05, 6))
    return np.concatenate([cup, np.stack(bar, -1).reshape(-1, 3)]) if handle else cup


def test_rim_grasp_straddles_the_wall_and_keeps_off_handle_and_neighbours():
    nothing, middle, base = np.empty((0, 3)), np.zeros(3), np.array([-0.5, 0, 0])
    position, rotation = grasps.rim_grasp(ring(), nothing, middle, base, 0.02, grasps.RIM)
    assert np.allclose([np.linalg.norm(position[:2]), position[2]], [0.04, 0.03], atol=0.002)
    assert abs(rotation[:2, 0] @ position[:2]) > 0.99 * 0.04 - 0.002  # radial
    assert np.allclose(rotation[:, 2], [0, 0, -1])
    assert abs(position[1]) > 0.03  # least turn: the fingers open along y
    every = [grasps.rim_grasp(ring(), nothing, middle, base, 0.02, [angle])[0] for angle in (0, 180)]
    assert np.allclose(every, [[0.04, 0, 0.03], [-0.04, 0, 0.03]], atol=0.002)
    away, _ = grasps.rim_grasp(ring(handle=0.03), nothing, middle, base, 0.02, [0, 180])
    assert away[0] < 0  # the handle is on the other side
    wall = np.meshgrid(np.linspace(-0.2, 0.2, 40), [0.06], np.linspace(0, 0.2, 20))
    wall = np.stack(wall, -1).reshape(-1, 3)
    beside, turned = grasps.rim_grasp(ring(), wall, middle, base, 0.02, grasps.RIM)
    hits = grasps.collisions(wall, position, rotation[:, 0])
    assert grasps.collisions(wall, beside, turned[:, 0]) < hits


def faults(suite: str, task: int, steps: list) -> list[str]:
    """What is wrong with a row: names that the BDDL file lacks, and parts of its goal that no step serves."""
    bddl = Path(suite_of(suite).get_task_bddl_file_path(task)).read_text()
    sections = re.split(r"\(:(?:fixtures|objects|obj_of_interest|init|goal)", bddl)
    regions, fixtures, objects, _, init, goal = sections
    declared = set(re.findall(r"\w+_\d+", fixtures + objects))
    sites = {f"{target}_{name}" for name, target in re.findall(r"\((\w+)\s*\(:target (\w+)\)", regions)}
    joints = [step.keywords["joint"] for step in steps if "joint" in step.keywords]
    moves = [step.keywords for step in steps if "joint" not in step.keywords]
    names = {value for parameters in moves for value in parameters.values() if isinstance(value, str)}
    owners = tuple(f"{name}_" for name in declared)
    wrong = sorted(names - declared - sites) + [joint for joint in joints if not joint.startswith(owners)]
    for predicate in re.findall(r"\((\w+ [^()]+)\)", goal):
        _, what, *where = predicate.split()
        if where:
            keys = ("on", "to", "site", "container")
            ends = [move[key] for move in moves for key in keys if move["target"] == what and key in move]
            done = any(where[0].startswith(end) for end in ends)
        else:
            part = what.removesuffix("region")
            done = f"({predicate})" in init or any(joint.startswith(part) for joint in joints)
        if not done:
            wrong.append(predicate)
    return wrong


@pytest.mark.parametrize(
    "suite", [*common.SUITES[:2], "libero_object_swap", "libero_object_look", *common.SUITES[2:4]]
)
def test_every_task_has_a_row_that_fits_it(suite):
    assert [task for s, task in TASKS if s == suite] == list(range(10))
    for task in range(10):
        assert not faults(suite, task, TASKS[suite, task]), (suite, task)
        others = [faults(suite, task, TASKS[suite, other]) for other in range(10) if other != task]
        assert suite == "libero_spatial" or all(others), (suite, task)  # nobody else's row fits


def test_drawer_opens_by_its_handle_and_nothing_else_moves():
    """libero_goal task 0 with clean actions: a primitive on a joint, on the real simulator."""
    env = TaskEnv("libero_goal", 0)
    env.reset(5)
    hand = Expert(env, np.random.default_rng(0), 0.0)
    bar, out = hand.handle("wooden_cabinet_1_middle_level")
    front = hand.points("wooden_cabinet_1")
    assert np.allclose(out, [0, 1, 0])  # towards the table
    assert abs(bar[1] - front[:, 1].max()) < 0.02  # what sticks out most
    before = {name: hand.spot(name) for name in (BOWL, BOTTLE, "plate_1", "cream_cheese_1")}
    coordinates = []
    (primitive,) = TASKS["libero_goal", 0]
    for action in primitive(hand):
        env.step(action)
        joints = [f"wooden_cabinet_1_{level}_level" for level in ("top", "middle", "bottom")]
        coordinates.append([env.data.joint(joint).qpos[0] for joint in joints])
    top, middle, bottom = np.array(coordinates).T
    assert env.success and middle[0] > -0.001 and middle[-1] < -0.14
    assert np.abs([top, bottom]).max() < 0.005
    assert np.diff(middle).max() < 0.003  # pulled, not pushed about
    assert max(np.linalg.norm(hand.spot(name) - at) for name, at in before.items()) < 0.003
    env.close()


def test_libero_object_stays_what_it_was(file):
    """Bit for bit on one machine; elsewhere linear algebra may round differently."""
    stored = load_file(Path(__file__).parent / "fixtures" / "expert_libero_object_1.safetensors")["actions"]
    with h5py.File(file) as f:
        assert np.allclose(f["data/demo_0/actions"][()], stored, rtol=0, atol=1e-6)


def test_turn_between_and_limit():
    turn = grasps.turn_between(
        grasps.TOP_DOWN, Rotation.from_rotvec([0, 0, 0.3]).as_matrix() @ grasps.TOP_DOWN
    )
    assert np.allclose(turn, [0, 0, 0.3])
    assert np.allclose(grasps.limit(np.array([3.0, 4.0]), 1.0), [0.6, 0.8])
    assert np.allclose(grasps.limit(np.zeros(2), 1.0), 0)


def test_unknown_task_and_wrong_source_are_user_errors(record, tmp_path):
    with pytest.raises(UserError, match="files"):
        record(source=tmp_path)
    with pytest.raises(UserError, match="add a row"):
        cfg = demos.Config(name="other", root=str(tmp_path), suites=["libero_90"], tasks=[0])
        stage.execute(demos.main, cfg)


def test_official_files_are_adopted(file, record, tmp_path):
    """The stage links official files, which lack our additions, and the same reader takes them."""
    folder = tmp_path / "official" / "libero_object"
    folder.mkdir(parents=True)
    copy = folder / (instruction("libero_object", TASK).replace(" ", "_") + "_demo.hdf5")
    copy.write_bytes(file.read_bytes())
    linked = record(source=tmp_path / "official")
    assert linked.is_symlink() and len(list(read_demos(linked, TASK))) == 2
    for word, turn in (
        ("turned by 180", np.s_[:, ::-1, ::-1]),
        ("upside down", np.s_[:, ::-1]),
        ("mirrored", np.s_[:, :, ::-1]),
    ):
        copy.write_bytes(file.read_bytes())
        with h5py.File(copy, "r+") as f:
            for demo in f["data"].values():
                demo["obs/agentview_rgb"][:] = demo["obs/agentview_rgb"][()][turn]
        with pytest.raises(UserError, match=f"{word}.*turn obs/agentview_rgb"):
            record(source=tmp_path / "official")


def test_official_files_are_looked_at_beside_the_kits_own(monkeypatch):
    """Of two tasks the first has LIBERO's own file, turned; the last one's is a run's of this kit."""
    cfg, frame = demos.Config(), np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
    files = [Path("first_demo.hdf5"), Path("task_01.hdf5")]
    read = {files[0]: frame[:, ::-1, ::-1], files[1]: frame}
    env = types.SimpleNamespace(reset=lambda i: None, frame=lambda camera: frame[0], close=lambda: None)
    monkeypatch.setattr(demos, "tasks", lambda cfg: [("libero_object", 0), ("libero_object", 1)])
    monkeypatch.setattr(demos, "source_file", lambda cfg, suite, task: files[task])
    monkeypatch.setattr(demos, "TaskEnv", lambda *_: env)
    monkeypatch.setattr(
        demos, "read_demos", lambda path, task: iter([types.SimpleNamespace(agentview=read[path])])
    )
    with pytest.raises(UserError, match=r"first_demo\.hdf5 has images that are turned by 180"):
        demos.check_upright(cfg)
    read[files[0]] = frame
    demos.check_upright(cfg)


WRITES = """
import importlib, pathlib, resource, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from runtime import stage
path = pathlib.Path(sys.argv[2])
frames = [np.random.default_rng(i).integers(0, 255, (128, 128, 3), np.uint8) for i in range(12)]
def hdf5():
    demos = importlib.import_module("00_demos")
    rows = {"actions": np.zeros((12, 7)), "states": np.zeros((12, 9)), "obs/agentview_rgb": np.stack(frames)}
    demos.TaskEnv = lambda *_: open("/dev/null")  # something to close
    demos.try_until_success = lambda *_: (["success"], rows | {"success_step": 3})
    demos.file_attributes, demos.target_places = lambda *_: {}, lambda *_: np.zeros((2, 3))
    demos.task_file, demos.tries_file = lambda *_: path, lambda *_: path.parent.with_suffix(".json")
    demos.record_task((demos.Config(n_init=1), "libero_object", 0))
def gif():
    importlib.import_module("04_eval").save_gif(path, frames)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
stage.command_line({".hdf5": hdf5, ".gif": gif}[path.suffix])
"""


@pytest.mark.parametrize("name", ["task_00.hdf5", "episode.gif"])
def test_a_disk_that_takes_no_more_is_one_line_whatever_the_library_does(name, tmp_path):
    """HDF5 crashes while it writes; Pillow writes once more when its object is deleted."""
    path = tmp_path / "folder" / name
    path.parent.mkdir()
    command = [sys.executable, "-c", WRITES, str(HERE), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"{path} cannot be written" in done.stderr and not any(path.parent.iterdir())
