"""The simulator against LIBERO itself. `python -m pytest tests/test_sim.py`, real LIBERO, about 2 minutes."""

import contextlib
import copy
import functools
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import common
from extras import preflight
from runtime.config import HERE
from runtime.errors import UserError
from sim import meshes
from sim.env import (
    CRASHES,
    LIBERO_CAMERAS,
    Snapshot,
    TaskEnv,
    axis_angle,
    init_state_array,
    instruction,
    libraries,
    suite_of,
    tasks,
)
from sim.expert import TASKS, Expert, target_places

CASES = {("libero_object", 0): [41, 3], ("libero_goal", 7): [12]}  # init states, without and with fixtures
N_RANDOM = 8  # random steps after settling
mj = libraries().mujoco


def actions(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 7))


def physics(model, data) -> np.ndarray:
    """mujoco's complete state and what it derives from it: (D,)."""
    state = np.empty(mj.mj_stateSize(model, mj.mjtState.mjSTATE_INTEGRATION))
    mj.mj_getState(model, data, state, mj.mjtState.mjSTATE_INTEGRATION)
    derived = [data.xpos, data.xquat, data.site_xpos, data.qacc, [data.ncon], model.site_rgba]
    return np.concatenate([state] + [np.ravel(a) for a in derived])


def controller(c) -> dict:
    return {name: np.copy(value) for name, value in vars(c).items() if isinstance(value, np.ndarray)}


def same(a: dict, b: dict) -> list[str]:
    """Names whose values differ in any bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not np.array_equal(a[name], b[name])]


def reference(suite: str, task: int) -> list[dict]:
    """What LIBERO's OffScreenRenderEnv shows after set_init_state, settling, and N_RANDOM random actions."""
    from libero.libero.envs import OffScreenRenderEnv

    bddl = suite_of(suite).get_task_bddl_file_path(task)
    env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=128, camera_widths=128)
    moments = []

    def look(obs, done):
        images = {name: obs[f"{camera}_image"][::-1, ::-1] for name, camera in LIBERO_CAMERAS.items()}
        state = {key: obs[f"robot0_{key}"].copy() for key in ("eef_pos", "eef_quat", "gripper_qpos")}
        full = {"physics": physics(env.sim.model._model, env.sim.data._data), "done": done}
        full |= {"body_pos": env.sim.model.body_pos.copy()}
        moments.append(images | state | controller(env.env.robots[0].controller) | full)

    for init in CASES[suite, task]:
        env.seed(0)
        env.reset()
        look(env.set_init_state(init_state_array(suite, task)[init]), False)
        for _ in range(10):
            obs, _, done, _ = env.step(np.array(common.SETTLE_ACTION))
        look(obs, done)
        for action in actions(init, N_RANDOM):
            obs, _, done, _ = env.step(action)
        look(obs, done)
    env.close()
    return moments


def moment(env: TaskEnv, done) -> dict:
    p = env.proprio()
    images = {camera: env.frame(camera) for camera in common.CAMERAS}
    state = {key: p[key] for key in ("eef_pos", "eef_quat", "gripper_qpos")}
    full = {"physics": physics(env.model, env.data), "done": done, "body_pos": env.model.body_pos.copy()}
    return images | state | controller(env.controller) | full


@pytest.fixture(scope="module")
def env():
    with contextlib.closing(TaskEnv("libero_object", 0, 128, "default")) as env:
        yield env


@pytest.fixture(scope="module")
def goal():
    with contextlib.closing(TaskEnv("libero_goal", 7, 128, "default")) as env:
        yield env


@pytest.mark.parametrize(("suite", "task"), CASES)
def test_quick_reset_step_pixels_and_proprio_are_the_standard_protocol_bit_for_bit(suite, task, request):
    expected = iter(reference(suite, task))
    env = request.getfixturevalue({"libero_object": "env", "libero_goal": "goal"}[suite])
    env.reset(7)  # an earlier episode leaves its traces
    for action in actions(1, 12):
        env.step(action)
    for init in CASES[suite, task]:
        env.reset(init, settle=False)
        assert same(next(expected), moment(env, False)) == []
        env.reset(init)
        assert env.steps == 0
        assert same(next(expected), moment(env, env.success)) == []
        for action in actions(init, N_RANDOM):
            done = env.step(action)
        assert same(next(expected), moment(env, done)) == []
        assert env.steps == N_RANDOM


def later(env: TaskEnv, success: bool) -> list[np.ndarray]:
    """All that a later step depends on: physics, controller, gripper, burner, sensors, goal predicate."""
    state = [physics(env.model, env.data), env.robot.gripper.current_action, env.data.sensordata, success]
    state += [value for _, value in sorted(controller(env.controller).items())]
    return [np.copy(value) for value in state]


EPISODES = [("libero_object", 0, 9), ("libero_goal", 7, 3), ("libero_10", 3, 5)]


@pytest.mark.parametrize(("suite", "task", "init"), EPISODES)
def test_long_contact_rich_episodes_are_robosuites_own_loop_bit_for_bit(suite, task, init, request):
    """Whole episodes: the scripted expert or a push into the scene, then random actions beyond [-1, 1]."""
    fixture = {"libero_object": "env", "libero_goal": "goal"}.get(suite)
    env = request.getfixturevalue(fixture) if fixture else TaskEnv(suite, task)
    rng = np.random.default_rng(init)
    steps = []
    # nobody has replaced robosuite's loop
    assert "step" not in vars(env.env) and "forward" not in vars(env.env.sim)

    def robosuite(action):
        steps.append((action, later(env, env.env.step(action)[2])))

    env.reset(init)
    if suite == "libero_object":
        hand = Expert(env, rng, 0.0)
        for primitive in TASKS[suite, task]:
            for action in primitive(hand):
                robosuite(action)
        assert env.success  # the object was grasped, carried and released
    push = np.zeros(7)
    for step in range(60):
        push = 0.8 * push + 0.6 * rng.standard_normal(7)
        robosuite(push - 0.7 * (step < 30) * np.eye(7)[2])  # down, then anywhere
    env.reset(init)
    for step, (action, theirs) in enumerate(steps):
        ours = later(env, env.step(action))
        assert all(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True)), step
    if not fixture:
        env.close()


def test_restore_continues_bit_for_bit_whatever_happened_in_between(env):
    env.reset(2)
    for action in actions(2, 10):
        env.step(action)
    saved, at_save = env.save(), moment(env, env.success)
    done = [env.step(action) for action in actions(3, 25)]
    first, steps = moment(env, done), env.steps
    env.reset(5)
    for action in actions(4, 5):
        env.step(action)
    env.restore(pickle.loads(pickle.dumps(saved)))
    assert same(at_save, moment(env, env.success)) == []
    again = [env.step(action) for action in actions(3, 25)]
    assert same(first, moment(env, again)) == [] and env.steps == steps
    env.restore(saved)  # the snapshot itself was not written to
    assert same(at_save, moment(env, env.success)) == []


def test_a_snapshot_right_after_reset_and_one_of_an_edited_state(env):
    env.reset(4, settle=False)
    saved = env.save()
    env.step(actions(0, 1)[0])
    first = physics(env.model, env.data)
    env.restore(saved)
    env.step(actions(0, 1)[0])
    assert np.array_equal(first, physics(env.model, env.data))
    env.data.qpos[0] += 0.01
    saved = env.save()
    env.reset(4)
    env.restore(saved)
    assert np.array_equal(saved.physics, env.save().physics)
    with pytest.raises(AssertionError, match="another task"):
        env.restore(Snapshot(("libero_goal", 7), *[None] * 6))


def test_the_burner_glows_with_the_state(goal):
    goal.reset(0)
    off, site = goal.model.site_rgba[:, 3].copy(), goal.frame("agentview")
    knob = next(j for j in range(goal.model.njnt) if "stove" in goal.model.joint(j).name)
    goal.data.qpos[goal.model.jnt_qposadr[knob]] = 1.0
    assert goal.step(np.zeros(7)) and goal.success
    goal.step(np.zeros(7))
    assert not np.array_equal(off, goal.model.site_rgba[:, 3])
    assert not np.array_equal(site, goal.frame("agentview"))
    goal.reset(0)
    assert np.array_equal(off, goal.model.site_rgba[:, 3]) and not goal.success
    assert np.array_equal(site, goal.frame("agentview"))


def test_looking_changes_nothing_and_gives_what_a_policy_sees(env):
    env.reset(1)
    before = physics(env.model, env.data)
    groups = env.model.geom_group.copy()
    obs = env.observe()
    assert np.array_equal(before, physics(env.model, env.data))
    assert np.array_equal(groups, env.model.geom_group)
    assert obs["agentview"].shape == obs["wrist"].shape == (128, 128, 3) and obs["state"].shape == (8,)
    assert obs["instruction"] == "pick up the alphabet soup and place it in the basket"
    p = env.proprio()
    state = np.r_[p["eef_pos"], p["axis_angle"], p["gripper_qpos"]].astype(np.float32)
    assert np.array_equal(obs["state"], state)
    assert p["joint_pos"].shape == (7,)


def test_axis_angle_is_robosuites_also_across_pi(env):
    from robosuite.utils.transform_utils import quat2axisangle

    env.reset(1)
    edges = [[x, 0.0, 0.0, w] for x in (-1.0, 1.0) for w in (-1e-3, 0.0, 1e-3, 1.0)]
    for quat in [env.proprio()["eef_quat"], *edges]:
        quat = np.array(quat) / np.linalg.norm(quat)
        kept = quat.copy()
        assert np.abs(axis_angle(quat) - quat2axisangle(quat.copy())).max() < 1e-12
        assert np.array_equal(kept, quat)
    jump = axis_angle(np.array([1.0, 0, 0, 1e-3])) - axis_angle(np.array([1.0, 0, 0, -1e-3]))
    assert np.abs(jump).max() < 0.01  # a shorter-arc conversion jumps by 2 pi here


def test_leaving_out_invisible_geoms_changes_no_pixel(env, monkeypatch):
    env.reset(6)
    frames = {camera: env.frame(camera) for camera in common.CAMERAS}
    hidden = [env._out_of_view(env.model.camera(name).id).sum() for name in LIBERO_CAMERAS.values()]
    assert all(n > 3 for n in hidden)
    monkeypatch.setattr(TaskEnv, "_out_of_view", lambda self, camera: np.zeros(self.model.ngeom, bool))
    assert same(frames, {camera: env.frame(camera) for camera in common.CAMERAS}) == []


def test_a_mirror_shows_what_the_camera_does_not_see():
    """The cabinet reflects: without what is out of view, up to 262 of the wrist's 4096 pixels change."""
    with contextlib.closing(TaskEnv("libero_spatial", 0, 64, "default")) as env:
        env.reset(0)
        for action in 0.5 * actions(0, 8):
            env.step(action)
        seen, hidden = env.frame("wrist"), env._out_of_view(env.model.camera("robot0_eye_in_hand").id)
        env._out_of_view = lambda camera: np.zeros(env.model.ngeom, bool)
        assert hidden.sum() > 3 and np.array_equal(seen, env.frame("wrist"))
        env._out_of_view = lambda camera: hidden
        env._mirrors = np.zeros(env.model.ngeom, bool)  # as if there were none
        assert not np.array_equal(seen, env.frame("wrist"))


def test_fast_frames_show_the_same_scene_and_change_nothing_else(goal):
    """With a fast environment beside: equal physics, similar frames, and default frames as before."""
    goal.reset(0)
    before = {camera: goal.frame(camera) for camera in common.CAMERAS}
    frames = []
    for _ in range(2):
        with contextlib.closing(TaskEnv("libero_goal", 7, 128)) as fast:
            fast.reset(0)
            frames.append({camera: fast.frame(camera) for camera in common.CAMERAS})
            saved = fast.save()
            goal.reset(0)
            for action in actions(5, 12):
                assert fast.step(action) == goal.step(action)
                assert np.array_equal(physics(fast.model, fast.data), physics(goal.model, goal.data))
                fast.frame("wrist")
            assert same(frames[0], {camera: fast.frame(camera) for camera in common.CAMERAS}) != []
            fast.restore(saved)
            assert same(frames[0], {camera: fast.frame(camera) for camera in common.CAMERAS}) == []
    assert same(*frames) == []
    goal.reset(0)
    assert same(before, {camera: goal.frame(camera) for camera in common.CAMERAS}) == []
    for camera, frame in frames[0].items():
        assert 0 < np.abs(frame.astype(int) - before[camera]).mean() < 8


def test_simplified_meshes_keep_their_shape_and_what_physics_reads(env):
    model, grid = copy.copy(env.model), 0.008
    meshes.simplify(model, grid)
    assert model.mesh_facenum.sum() < 0.2 * env.model.mesh_facenum.sum()
    once = model.mesh_face.copy()
    meshes.simplify(model, grid)
    assert np.array_equal(once, model.mesh_face)  # a second renderer shows the same
    faces = ("mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum")
    for name in (name for name in dir(model) if isinstance(getattr(model, name), np.ndarray)):
        assert name in faces or getattr(model, name).tobytes() == getattr(env.model, name).tobytes(), name
    for mesh in range(model.nmesh):
        first, start = model.mesh_faceadr[mesh], model.mesh_vertadr[mesh]
        vertices = model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
        corners = model.mesh_face[first : first + model.mesh_facenum[mesh]].ravel()
        assert np.isin(corners, np.arange(len(vertices))).all()
        if np.ptp(vertices, axis=0).min() > 2 * grid:  # screws vanish
            for side in (np.min, np.max):
                assert np.abs(side(vertices[corners], axis=0) - side(vertices, axis=0)).max() < grid
        moved = vertices[meshes.nearest_to_centres(vertices.tobytes(), grid)] - vertices
        assert np.abs(moved).max() < grid


def test_a_triangle_whose_corners_merge_or_that_turns_over_goes():
    """On a grid of 1, vertex 0 moves to 1: triangle 0 vanishes, 1 turns over, 2 stays."""
    vertices = np.array([[0, 0.9, 0], [0.5, 0.5, 0], [3.5, 0.7, 0], [1.5, 0.7, 0], [5.5, 0, 0]], np.float32)
    faces = np.array([[0, 1, 4], [0, 3, 2], [0, 2, 4]])
    zeros = np.zeros(1, int)
    model = types.SimpleNamespace(nmesh=1, mesh_faceadr=zeros, mesh_vertadr=zeros, mesh_vert=vertices)
    vars(model).update(mesh_facenum=np.array([3]), mesh_vertnum=np.array([5]), mesh_face=faces.copy())
    vars(model).update(mesh_facenormal=faces.copy(), mesh_facetexcoord=faces.copy())
    assert meshes.nearest_to_centres(vertices.tobytes(), 1.0).tolist() == [1, 1, 2, 3, 4]
    meshes.simplify(model, 1.0)
    assert model.mesh_facenum.tolist() == [1] and model.mesh_face[0].tolist() == [1, 2, 4]
    assert model.mesh_facenormal[0].tolist() == model.mesh_facetexcoord[0].tolist() == [0, 2, 4]


def test_unstable_physics_is_a_crash_and_the_next_reset_is_clean(env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # mujoco writes MUJOCO_LOG.TXT
    env.reset(1)
    first = physics(env.model, env.data)
    env.data.qvel[:] = 1e12
    boxes = env.model.nbvh
    with pytest.raises(CRASHES):
        env.step(np.zeros(7))
    assert env.model.nbvh == boxes > 0  # a step tells mujoco that there are none
    env.reset(1)
    assert np.array_equal(first, physics(env.model, env.data))


def test_bad_numbers_are_noticed(env):
    for action in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(AssertionError, match="7 finite"):
            env.step(action)
    for init_state in (50, -1):
        with pytest.raises(AssertionError):
            env.reset(init_state)
    with pytest.raises(UserError, match="tasks 0 to 9, not 10"):
        tasks(common.RunConfig(tasks=[3, 10]))


def test_suites():
    assert [suite_of(suite).get_num_tasks() for suite in common.MAX_STEPS] == [10, 10, 10, 10, 90, *[10] * 14]
    assert tasks(common.RunConfig(suites=["libero_goal"], tasks=[7])) == [("libero_goal", 7)]
    assert len(tasks(common.RunConfig(suites=["libero_object", "libero_90"]))) == 100
    assert instruction("libero_goal", 7) == "turn on the stove"
    assert init_state_array("libero_goal", 7).shape[0] == 50
    with pytest.raises(ValueError, match="read-only"):
        init_state_array("libero_goal", 7)[0, 0] = 1


@pytest.mark.parametrize("layout", common.LAYOUTS)
def test_a_layout_differs_from_its_suite_in_places_only(layout):
    suite = common.LAYOUTS[layout]
    assert common.MAX_STEPS[layout] == common.MAX_STEPS[suite]
    for task in range(10):
        assert instruction(layout, task) == instruction(suite, task)
        ours, theirs = init_state_array(layout, task), init_state_array(suite, task)
        assert ours.shape == theirs.shape and len(ours) == 50 and not np.array_equal(ours, theirs)
        files = [Path(suite_of(name).get_task_bddl_file_path(task)).read_text() for name in (layout, suite)]
        parts = {"(:language": "\n", "(:objects": "\n  )", "(:obj_of_interest": "\n  )", "(:goal": "\n  )"}
        for part, end in parts.items():
            here, there = (text.partition(part)[2].partition(end)[0].split() for text in files)
            assert here == there != [], (part, task)


def test_the_robots_start_does_not_tell_the_two_layouts_of_look_apart(env):
    assert [env.model.joint(i).name[:7] for i in range(10)] == [*["robot0_"] * 7, *["gripper"] * 2, "alphabe"]
    for task in range(10):
        original, swapped, look = (
            init_state_array(f"libero_object{layout}", task) for layout in ("", "_swap", "_look")
        )
        robot = np.isin(np.arange(look.shape[1]), [*range(10), *range(59, 68)])  # time, positions, velocities
        assert env.model.nq == 58
        assert np.array_equal(look[:, robot], original[:, robot])
        assert np.array_equal(look[:, ~robot], swapped[:, ~robot])
        assert original[:, 1:8].std(0).min() > 0.01 and np.ptp(swapped[:, robot], axis=0).max() == 0
        assert not np.array_equal(look, swapped)


def test_the_target_changes_places_with_one_other_object(env, goal):
    names = list(env.env.objects_dict)
    with contextlib.closing(TaskEnv("libero_object_swap", 0)) as swapped:
        for init in (0, 40):
            here, there = [], []
            for world, places in ((env, here), (swapped, there)):
                world.reset(init, settle=False)
                places += [Expert(world, None, 0).spot(name)[:2] for name in names]
            moved = [i for i in range(len(names)) if np.linalg.norm(here[i] - there[i]) > 0.05]
            assert len(moved) == 2 and np.allclose(here[moved[0]], there[moved[1]], atol=0.03)
            assert names.index("alphabet_soup_1") in moved
            target = names.index("alphabet_soup_1")
            for world, both in ((env, (here, there)), (swapped, (there, here))):
                places = target_places(world, init)[:, :2]
                assert np.allclose(places, [at[target] for at in both], atol=1e-6)
    assert np.isnan(target_places(goal, 0)).all()  # it begins with a stove


# -------------------------------------------------------------------------------------------------- preflight
def test_the_frames_are_right_here_and_dark_or_turned_ones_are_noticed(env, monkeypatch):
    monkeypatch.setattr(preflight, "TaskEnv", lambda *_: contextlib.nullcontext(env))
    monkeypatch.setattr(preflight.contextlib, "closing", lambda env: env)
    assert preflight.check_frame("libero_object", "default")[0]
    honest = TaskEnv.frame
    monkeypatch.setattr(TaskEnv, "frame", lambda self, c: (honest(self, c) * 0.77).astype(np.uint8))
    assert not preflight.check_frame("libero_object", "default")[0]
    # the first is a vertical flip of LIBERO's raw image
    for turn in (np.s_[:, ::-1], np.s_[::-1], np.s_[::-1, ::-1]):
        monkeypatch.setattr(TaskEnv, "frame", lambda self, c, turn=turn: honest(self, c)[turn])
        assert not preflight.check_frame("libero_object", "default")[0]


def test_too_little_memory_for_the_simulators_is_noticed(monkeypatch):
    for free, ok in ((4.9e9, True), (4.7e9, False)):
        memory = types.SimpleNamespace(available=free)
        monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda memory=memory: memory)
        assert preflight.check_memory(2)[0] == ok


def test_installation_checks_pass_here_and_notice_planted_faults(monkeypatch, tmp_path):
    assert preflight.check_versions()[0] and preflight.check_files()[0]
    monkeypatch.setattr(preflight, "version", lambda name: "3.3.3")
    assert "mujoco==3.3.2" in preflight.check_versions()[1] and not preflight.check_versions()[0]
    honest = preflight.disk.sha256

    def edited(name, path):
        return "" if path.name == name else honest(path)

    for name in ("ceramic.png", "turn_on_the_stove.bddl", "turn_on_the_stove.pruned_init.npz"):
        monkeypatch.setattr(preflight.disk, "sha256", functools.partial(edited, name))
        assert not preflight.check_files()[0]
    monkeypatch.setattr(preflight.disk, "sha256", honest)
    monkeypatch.setattr(libraries(), "assets", tmp_path)
    assert not preflight.check_files()[0]


def test_liberos_first_import_asks_prints_and_writes_nothing(tmp_path):
    """As on a machine on which nobody has imported LIBERO before, and with nobody to answer its question."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from sim.env import libraries; libraries()"
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "MPLCONFIGDIR"} | {"HOME": str(tmp_path)},
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert child.returncode == 0 and not child.stdout + child.stderr, (child.stdout, child.stderr)
    assert not list(tmp_path.rglob("*"))


def test_preflight_reports_what_cannot_run(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no display")

    monkeypatch.setattr(preflight, "TaskEnv", broken)
    monkeypatch.setattr(sys, "argv", ["preflight.py"])
    with pytest.raises(UserError, match="2 checks"):
        preflight.main()
    assert "FAIL a fast frame of libero_goal: RuntimeError: no display" in capsys.readouterr().out


def test_no_gl_is_one_line_with_the_remedy(env, monkeypatch):
    def broken(*args):
        raise ImportError("an OpenGL platform library has not been loaded")

    monkeypatch.setattr(env, "_renderer", None)
    monkeypatch.setattr(mj, "Renderer", broken)
    with pytest.raises(UserError, match=r"OpenGL platform.*apt-get install libegl1") as error:
        env.frame("agentview")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- worker processes
SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from runtime.errors import UserError
from runtime.workers import run
FOLDER = Path(__file__).parent / "out"
FOLDER.mkdir(exist_ok=True)
def work(job):
    assert torch.get_num_threads() == 1
    if job == 90: raise ValueError("planted")
    if job == 91: os.kill(os.getpid(), 9)
    if job == 92: raise UserError("one line")
    if job == 93: os.write(1, f"\\n{os.getpid()}\\n".encode()); time.sleep(600)  # one write: prints may mix
    (FOLDER / f"{job}").write_text(str(job * 10))
def results():
    return {path.name: path.read_text() for path in FOLDER.iterdir()}
def outcome(jobs, workers):
    for path in FOLDER.iterdir(): path.unlink()
    try:
        run(work, jobs, workers, "work", lambda: len(results()), len(jobs))
        return results()
    except Exception as error:
        return type(error).__name__, str(error)
if __name__ == "__main__":
    if sys.argv[1:] == ["hang"]:
        outcome([93, 93], 2)
    assert outcome([1, 2, 3], 2) == outcome([1, 2, 3], 1) == {"1": "10", "2": "20", "3": "30"}
    for workers in (1, 2):
        assert outcome([1, 90, 3], workers) == ("ValueError", "planted")
        assert outcome([1, 92], workers) == ("UserError", "one line")
    kind, text = outcome([91, 1, 2], 2)
    assert kind == "UserError" and "a worker process died" in text, text
    print("done")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "09_script.py"
    path.write_text(SCRIPT)
    return path, os.environ | {"PYTHONPATH": str(HERE)}


def test_jobs_run_fail_and_survive_kills_in_a_script(script):
    path, env = script
    result = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True, timeout=900)
    assert result.stdout.endswith("done\n"), result.stderr  # a slow machine prints its progress before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_survives_its_parent(script, how):
    path, env = script
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background test ignores SIGINT
    parent = subprocess.Popen(
        [sys.executable, path, "hang"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=heed,
    )
    numbers = filter(
        str.isdecimal, map(str.strip, parent.stdout)
    )  # a slow machine prints its progress between
    children = [int(number) for number in itertools.islice(numbers, 2)]
    assert len(children) == 2
    parent.send_signal(how)
    parent.wait(60)
    deadline = time.time() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.time() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_a_script_that_forgets_to_close_ends_quietly():
    code = "from sim.env import TaskEnv; env = TaskEnv('libero_object', 1); env.reset(0); env.observe()"
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", f"{code}; env.step([0] * 7)"]
    result = subprocess.run(command, cwd=HERE, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
