"""The simulator layer against LIBERO itself: run with `python -m pytest tests/test_sim.py` (real LIBERO, about a minute)."""

import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import common
import expert
import preflight
import sim
from workers import parallel

KIT = Path(sim.__file__).parent
CASES = {("libero_object", 0): [41, 3], ("libero_goal", 7): [12]}  # without and with fixtures: init states
N_RANDOM = 8  # random steps after settling
mj = sim.libraries().mujoco


def actions(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 7))


def physics(model, data) -> np.ndarray:
    """mujoco's complete state and what it derives from it: (D,)."""
    state = np.empty(mj.mj_stateSize(model, mj.mjtState.mjSTATE_INTEGRATION))
    mj.mj_getState(model, data, state, mj.mjtState.mjSTATE_INTEGRATION)
    derived = [data.xpos, data.xquat, data.site_xpos, data.qacc, data.sensordata[:0], [data.ncon], model.site_rgba]
    return np.concatenate([state] + [np.ravel(a) for a in derived])


def controller(c) -> dict:
    return {name: np.copy(value) for name, value in vars(c).items() if isinstance(value, np.ndarray)}


def same(a: dict, b: dict) -> list[str]:
    """Names whose values differ in any bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not np.array_equal(a[name], b[name])]


def reference(suite: str, task: int) -> list[dict]:
    """What the unmodified OffScreenRenderEnv shows: after set_init_state, after settling, after N_RANDOM random actions."""
    from libero.libero.envs import OffScreenRenderEnv

    env = OffScreenRenderEnv(
        bddl_file_name=sim.suite_of(suite).get_task_bddl_file_path(task), camera_heights=128, camera_widths=128
    )
    moments = []

    def look(obs, done):
        images = {"agentview": obs["agentview_image"][::-1, ::-1], "wrist": obs["robot0_eye_in_hand_image"][::-1, ::-1]}
        state = {key: obs[f"robot0_{key}"].copy() for key in ("eef_pos", "eef_quat", "gripper_qpos")}
        full = physics(env.sim.model._model, env.sim.data._data)
        control = controller(env.env.robots[0].controller)
        moments.append(images | state | control | {"physics": full, "done": done, "body_pos": env.sim.model.body_pos.copy()})

    for init in CASES[suite, task]:
        env.seed(0)
        env.reset()
        obs, done = env.set_init_state(sim.init_state_array(suite, task)[init]), False
        look(obs, done)
        for _ in range(10):
            obs, _, done, _ = env.step(np.array(common.SETTLE_ACTION))
        look(obs, done)
        for action in actions(init, N_RANDOM):
            obs, _, done, _ = env.step(action)
        look(obs, done)
    env.close()
    return moments


def moment(env: sim.TaskEnv, done) -> dict:
    p = env.proprio()
    images = {camera: env.frame(camera) for camera in sim.CAMERAS}
    state = {key: p[key] for key in ("eef_pos", "eef_quat", "gripper_qpos")}
    full = {"physics": physics(env.model, env.data), "done": done, "body_pos": env.model.body_pos.copy()}
    return images | state | controller(env.controller) | full


@pytest.fixture(scope="module")
def env():
    with contextlib.closing(sim.TaskEnv("libero_object", 0, 128, "default")) as env:
        yield env


@pytest.fixture(scope="module")
def goal():
    with contextlib.closing(sim.TaskEnv("libero_goal", 7, 128, "default")) as env:
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


def later(env: sim.TaskEnv, success: bool) -> list[np.ndarray]:
    """All that a later step depends on: physics, controller, gripper, glow of the burner, sensors, goal predicate."""
    state = [physics(env.model, env.data), env.robot.gripper.current_action, env.data.sensordata, np.array(success)]
    return [np.copy(value) for value in state + [value for _, value in sorted(controller(env.controller).items())]]


@pytest.mark.parametrize(("suite", "task", "init"), [("libero_object", 0, 9), ("libero_goal", 7, 3), ("libero_10", 3, 5)])
def test_long_contact_rich_episodes_are_robosuites_own_loop_bit_for_bit(suite, task, init, request):
    """Whole episodes: a grasp by the scripted expert, or the hand driven into the scene; then random actions beyond [-1, 1]."""
    fixture = {"libero_object": "env", "libero_goal": "goal"}.get(suite)
    env = request.getfixturevalue(fixture) if fixture else sim.TaskEnv(suite, task)
    rng, steps = np.random.default_rng(init), []
    assert "step" not in vars(env.env) and "forward" not in vars(env.env.sim)  # nobody has replaced robosuite's loop

    def robosuite(action):
        steps.append((action, later(env, env.env.step(action)[2])))

    env.reset(init)
    if suite == "libero_object":
        hand = expert.Expert(env, rng, 0.0)
        for primitive, parameters in expert.TASKS[suite, task]:
            for action in primitive(hand, **parameters):
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
    with pytest.raises(ValueError, match="does not fit"):
        env.restore(sim.Snapshot(("libero_goal", 7), *[None] * 6))


def test_the_burner_glows_with_the_state_and_moved_fixtures_are_noticed(goal):
    goal.reset(0)
    off, site = goal.model.site_rgba[:, 3].copy(), goal.frame("agentview")
    knob = next(j for j in range(goal.model.njnt) if "stove" in goal.model.joint(j).name)
    goal.data.qpos[goal.model.jnt_qposadr[knob]] = 1.0
    assert goal.step(np.zeros(7)) and goal.success
    goal.step(np.zeros(7))
    assert not np.array_equal(off, goal.model.site_rgba[:, 3]) and not np.array_equal(site, goal.frame("agentview"))
    goal.reset(0)
    assert np.array_equal(off, goal.model.site_rgba[:, 3]) and not goal.success
    assert np.array_equal(site, goal.frame("agentview"))
    goal.model.body_pos[-1, 0] += 1e-6
    with pytest.raises(RuntimeError, match="fixtures"):
        goal.reset(0)
    goal.model.body_pos[-1, 0] = goal._fixtures[-1, 0]


def test_looking_changes_nothing_and_gives_the_observation_of_common(env):
    env.reset(1)
    before = physics(env.model, env.data)
    obs, groups = env.observe(), env.model.geom_group.copy()
    assert np.array_equal(before, physics(env.model, env.data)) and np.array_equal(groups, env.model.geom_group)
    batch = common.collate([obs, obs])
    assert batch["agentview"].shape == batch["wrist"].shape == (2, 128, 128, 3) and batch["state"].shape == (2, 8)
    assert obs["instruction"] == "pick up the alphabet soup and place it in the basket"
    p = env.proprio()
    assert np.array_equal(obs["state"], np.r_[p["eef_pos"], p["axis_angle"], p["gripper_qpos"]].astype(np.float32))
    assert p["joint_pos"].shape == (7,)


def test_axis_angle_is_robosuites_also_across_pi(env):
    from robosuite.utils.transform_utils import quat2axisangle

    env.reset(1)
    quats = [env.proprio()["eef_quat"], *([x, 0.0, 0.0, w] for x in (-1.0, 1.0) for w in (-1e-3, 0.0, 1e-3, 1.0))]
    for quat in quats:
        quat = np.array(quat) / np.linalg.norm(quat)
        kept = quat.copy()
        assert np.abs(common.axis_angle(quat) - quat2axisangle(quat.copy())).max() < 1e-12 and np.array_equal(kept, quat)
    jump = common.axis_angle(np.array([1.0, 0, 0, 1e-3])) - common.axis_angle(np.array([1.0, 0, 0, -1e-3]))
    assert np.abs(jump).max() < 0.01  # a shorter-arc conversion jumps by 2 pi here


def test_leaving_out_invisible_geoms_changes_no_pixel(env, monkeypatch):
    env.reset(6)
    frames = {camera: env.frame(camera) for camera in sim.CAMERAS}
    hidden = [env._out_of_view(env.model.camera(name).id).sum() for name in sim.CAMERAS.values()]
    assert all(n > 3 for n in hidden)
    monkeypatch.setattr(sim.TaskEnv, "_out_of_view", lambda self, camera: np.zeros(self.model.ngeom, bool))
    assert same(frames, {camera: env.frame(camera) for camera in sim.CAMERAS}) == []


def test_a_mirror_shows_what_the_camera_does_not_see():
    """The cabinet's boxes reflect: leaving out what is out of view changed up to 262 of the wrist's 4096 pixels."""
    with contextlib.closing(sim.TaskEnv("libero_spatial", 0, 64, "default")) as env:
        env.reset(0)
        for action in 0.5 * actions(0, 8):
            env.step(action)
        seen, hidden = env.frame("wrist"), env._out_of_view(env.model.camera("robot0_eye_in_hand").id)
        env._out_of_view = lambda camera: np.zeros(env.model.ngeom, bool)
        assert hidden.sum() > 3 and np.array_equal(seen, env.frame("wrist"))
        env._out_of_view, env._mirrors = (
            lambda camera: hidden,
            np.zeros(env.model.ngeom, bool),
        )  # as if there were none
        assert not np.array_equal(seen, env.frame("wrist"))


def test_a_layer_of_what_rests_changes_no_pixel(env, monkeypatch):
    env._renderer.close()
    env._renderer, env.render_mode, drawn = None, "fast", []
    draw = sim.TaskEnv._draw
    monkeypatch.setattr(
        sim.TaskEnv, "_draw", lambda self, c, shown, **kw: drawn.append(shown.sum()) or draw(self, c, shown, **kw)
    )
    everything = np.ones(env.model.ngeom, bool)
    for init in (8, 9):  # a new episode moves everything
        env.reset(init)
        for step, action in enumerate(actions(init, 7)):
            env.step(action)
            if step == 3:  # a resting object is displaced and tumbles
                env.data.qpos[env.model.joint("basket_1_joint0").qposadr[0] + 2] += 0.02
            drawn.clear()
            frame, n = env.frame("agentview"), len(drawn)
            whole = draw(env, env.model.camera("agentview").id, everything)[0][:, ::-1]
            assert np.array_equal(frame, whole)
        assert env._resting.sum() > 4 and not env._resting[env._of_robot].any()
    for _ in range(3):
        drawn.clear()
        env.frame("agentview")
    assert n <= 2 and len(drawn) == 1  # nothing moved: the layer is kept
    env._layer = env._layer[0], draw(env, env.model.camera("agentview").id, everything)[1]  # plant ties
    drawn.clear()
    assert np.array_equal(env.frame("agentview"), whole) and len(drawn) == 2
    env._renderer.close()
    env._renderer, env.render_mode = None, "default"


def test_the_fast_mode_shows_the_same_scene(goal):
    goal.reset(0)
    default = goal.frame("wrist").astype(int)
    goal._renderer.close()
    goal._renderer, goal.render_mode = None, "fast"
    difference = np.abs(goal.frame("wrist").astype(int) - default).mean()
    goal._renderer.close()
    goal._renderer, goal.render_mode = None, "default"
    assert 0 < difference < 8


def test_unstable_physics_is_a_crash_and_the_next_reset_is_clean(env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # mujoco writes MUJOCO_LOG.TXT
    env.reset(1)
    first = physics(env.model, env.data)
    env.data.qvel[:] = 1e12
    with pytest.raises(sim.CRASHES):
        env.step(np.zeros(7))
    env.reset(1)
    assert np.array_equal(first, physics(env.model, env.data))


def test_user_errors_and_bad_actions(env):
    for wrong in (lambda: env.reset(50), lambda: env.reset(-1), lambda: sim.TaskEnv("libero_object", 10)):
        with pytest.raises(common.UserError):
            wrong()
    for wrong in (("libero_objects", 0), ("libero_object", 0, 64, "quick"), ("libero_object", 0, 8)):
        with pytest.raises(common.UserError):
            sim.TaskEnv(*wrong)
    for action in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite"):
            env.step(action)


def test_suites():
    assert [sim.task_count(s) for s in common.MAX_STEPS] == [10, 10, 10, 10, 90]
    assert sim.instruction("libero_goal", 7) == "turn on the stove" and sim.init_state_array("libero_goal", 7).shape[0] == 50
    with pytest.raises(ValueError, match="read-only"):
        sim.init_state_array("libero_goal", 7)[0, 0] = 1


# ------------------------------------------------------------------------------------------------------------ preflight
def test_environment_checks_pass_here_and_notice_planted_faults(env, monkeypatch):
    for check in (preflight.check_frame, preflight.check_orientation, preflight.check_gripper):
        assert check(env)[0], check(env)
    honest, step = sim.TaskEnv.frame, sim.TaskEnv.step
    monkeypatch.setattr(sim.TaskEnv, "frame", lambda self, c: (honest(self, c) * 0.77).astype(np.uint8))
    assert not preflight.check_frame(env)[0]
    for turn in (np.s_[:, ::-1], np.s_[::-1], np.s_[::-1, ::-1]):  # the first is a mere vertical flip of LIBERO's raw image
        monkeypatch.setattr(sim.TaskEnv, "frame", lambda self, c, turn=turn: honest(self, c)[turn])
        assert not preflight.check_orientation(env)[0]
    monkeypatch.setattr(sim.TaskEnv, "step", lambda self, a: step(self, a * [1, 1, 1, 1, 1, 1, -1]))
    assert not preflight.check_gripper(env)[0]


def test_installation_checks_pass_here_and_notice_planted_faults(monkeypatch, tmp_path):
    for check in (preflight.check_mujoco, preflight.check_assets, preflight.check_init_states, preflight.check_first_import):
        assert check()[0], check()
    monkeypatch.setattr(mj, "__version__", "3.3.3")
    assert not preflight.check_mujoco()[0]
    honest = preflight.disk.sha256  # one texture that was edited
    monkeypatch.setattr(preflight.disk, "sha256", lambda path: honest(path) if path.name != "ceramic.png" else "")
    assert not preflight.check_assets()[0]
    monkeypatch.setattr(sim.libraries(), "assets", tmp_path)
    assert not preflight.check_assets()[0]
    array = sim.init_state_array
    monkeypatch.setattr(sim, "init_state_array", lambda s, t: array(s, t) + (t == 9) * 1e-9)
    assert not preflight.check_init_states()[0]


def test_preflight_reports_what_cannot_run(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no display")

    monkeypatch.setattr(preflight, "TaskEnv", broken)
    monkeypatch.setattr(preflight, "check_first_import", lambda: (True, "skipped"))
    monkeypatch.setattr(sys, "argv", ["preflight.py"])
    with pytest.raises(common.UserError, match="2 checks"):
        preflight.main()
    assert "FAIL environment libero_goal: RuntimeError: no display" in capsys.readouterr().out


def test_no_gl_is_one_line_with_the_remedy(env, monkeypatch):
    def broken(*args):
        raise ImportError("an OpenGL platform library has not been loaded")

    env._renderer.close()
    env._renderer = None
    monkeypatch.setattr(mj, "Renderer", broken)
    with pytest.raises(common.UserError, match=r"OpenGL platform.*apt-get install libegl1") as error:
        env.frame("agentview")
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------- worker processes
SCRIPT = """
import os, sys, time
import common, torch
from workers import parallel
def work(job):
    assert torch.get_num_threads() == 1
    for i in range(3):
        yield job * 10 + i
    if job == 90: raise ValueError("planted")
    if job == 91: os.kill(os.getpid(), 9)
    if job == 92: raise common.UserError("mine")
    if job == 93: print(os.getpid(), flush=True); time.sleep(600)
def outcome(jobs, workers):
    try:
        return sorted(parallel(work, jobs, workers))
    except Exception as error:
        return type(error).__name__, str(error)
if __name__ == "__main__":
    if sys.argv[1:] == ["hang"]:
        outcome([93, 93], 2)
    assert outcome([1, 2, 3], 2) == outcome([1, 2, 3], 1) == [(j - 1, j * 10 + i) for j in (1, 2, 3) for i in range(3)]
    for workers in (1, 2):
        kind, text = outcome([1, 90, 3], workers)
        assert (kind, "planted" in text) == ((("ValueError"), True) if workers == 1 else ("RuntimeError", True)), text
        assert workers == 1 or "job 1 of 3 (90)" in text, text
        assert outcome([1, 92], workers) == ("UserError", "mine")
    kind, text = outcome([91, 1, 2], 2)
    assert kind == "UserError" and "job 0 of 3 (91)" in text and "-9" in text, text
    print("done")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "09_script.py"
    path.write_text(SCRIPT)
    return path, os.environ | {"PYTHONPATH": str(KIT)}


def test_parallel_streams_fails_and_survives_kills_in_a_script(script):
    path, env = script
    result = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True, timeout=200)
    assert result.stdout == "done\n", result.stderr


def test_parallel_finds_functions_of_a_file_loaded_by_path(script, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("script_by_path", script[0])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script_by_path", module)
    spec.loader.exec_module(module)
    assert sorted(parallel(module.work, [1, 2], 2)) == [(j - 1, j * 10 + i) for j in (1, 2) for i in range(3)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_survives_its_parent(script, how):
    path, env = script
    command, pipe, null = [sys.executable, path, "hang"], subprocess.PIPE, subprocess.DEVNULL
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores SIGINT
    parent = subprocess.Popen(command, env=env, stdout=pipe, stderr=null, text=True, preexec_fn=heed)
    children = [int(parent.stdout.readline()) for _ in range(2)]
    parent.send_signal(how)
    parent.wait(60)
    deadline = time.time() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.time() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_a_script_that_forgets_to_close_ends_quietly():
    code = "import sim; env = sim.TaskEnv('libero_object', 1); env.reset(0); env.observe(); env.step([0] * 7)"
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", code]
    result = subprocess.run(command, cwd=KIT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
