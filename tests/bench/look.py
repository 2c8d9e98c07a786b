"""What a look of a play-out costs: now, at an earlier commit, and in LIBERO's standard loop.

    python tests/bench/look.py [before=ce23880] [rounds=6] [looks=6]                           about 2 minutes

A look is 8 control steps of libero_object task 0, two frames of 64 pixels (`fast`), and one inference of
checkpoints/tiny_libero_object. Prints CPU milliseconds (all threads): medians over the rounds, in which the
loops take turns, each in its own process; and ratios round by round. A busy machine moves ratios less. The
earlier commit comes from `git archive`. The standard loop renders at every control step, LIBERO's own pixels.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[2]
PARTS = ("physics", "rendering", "policy", "rest")
CHECKPOINT = "checkpoints/tiny_libero_object"


def serve(kind: str, root: str) -> None:
    """For each line on stdin, an episode of so many looks; prints the mean milliseconds of each part."""
    sys.path.insert(0, root)
    common, evaluation = importlib.import_module("common"), importlib.import_module("04_eval")
    cfg = evaluation.Config(checkpoint=f"{root}/{CHECKPOINT}")
    policy = evaluation.load_policy(cfg)
    if kind == "standard":
        env = importlib.import_module("evaluation").Standard(0, 64, 41)
    else:
        name = "sim" if Path(root, "sim.py").exists() else "sim.env"
        env = importlib.import_module(name).TaskEnv("libero_object", 0)
    propose = getattr(common, "propose", None) or importlib.import_module("backbones").propose
    print("ready", flush=True)
    for looks in map(int, sys.stdin):
        env.reset(41)
        env.observe()  # the first one makes the renderer
        spent = dict.fromkeys(PARTS, 0.0)

        def timed(part: str, call, *args, spent=spent, **options):
            """call(...), its time under `part`."""
            began = time.process_time()
            result = call(*args, **options)
            spent[part] += time.process_time() - began
            return result

        if kind == "standard":  # a reset makes a new simulation
            env.env.env.sim.render = functools.partial(timed, "rendering", env.env.env.sim.render)
        began = time.process_time()
        for look in range(looks):
            obs = timed("rendering", env.observe)
            noise = [common.stream(0, "bench", look)]
            chunk = timed("policy", propose, policy, obs, cfg, noise)[0]
            for action in np.asarray(policy.unnormalise(chunk))[: cfg.execute].clip(-1, 1):
                timed("physics", env.step, action)
        if kind == "standard":  # its steps render
            spent["physics"] -= spent["rendering"]
        spent["rest"] = time.process_time() - began - sum(spent.values())
        print(json.dumps({part: 1e3 * seconds / looks for part, seconds in spent.items()}), flush=True)


def start(kind: str, root: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, __file__, "serve", kind, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0" if kind == "now" else "1"},
    )
    assert process.stdout.readline() == "ready\n", kind
    return process


def main(before: str = "ce23880", rounds: str = "6", looks: str = "6") -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", before], cwd=HERE, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        roots = {"standard": str(HERE), before: folder, "now": str(HERE)}
        loops = {kind: start(kind, root) for kind, root in roots.items()}
        ms = {kind: [] for kind in loops}
        for _ in range(int(rounds)):
            for kind, process in loops.items():
                print(looks, file=process.stdin, flush=True)
                ms[kind].append(json.loads(process.stdout.readline()))
        for process in loops.values():
            process.communicate()
    print(
        "| CPU ms per look | "
        + " | ".join(loops)
        + f" | standard / now | now / {before} |\n"
        + 6 * "|---"
        + "|"
    )
    for row in (*PARTS, "total"):
        each = {
            kind: np.array([sum(r.values()) if row == "total" else r[row] for r in rs])
            for kind, rs in ms.items()
        }
        cells = [f"{np.median(values):.1f}" for values in each.values()]
        ratios = (each["standard"] / each["now"], each["now"] / each[before])
        cells += [f"{np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})" for r in ratios]
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    else:
        main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
