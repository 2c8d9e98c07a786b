"""Episodes per hour of 04_eval.py against the standard loop, with the same policy on the same episodes.

    python tests/bench/evaluation.py [tasks=0,5] [inits=40,41] [pixels=256] [processes=2] [mesa=1]   4 minutes

standard  one process with LIBERO's OffScreenRenderEnv, as in published evaluation scripts: both cameras
          rendered at every step, env.reset() before every episode, `mesa` threads of Mesa's renderer (left
          alone, it takes all cores)
default   04_eval.py: `processes` processes that render when the policy looks, without threads, LIBERO's own
          pixels
fast      the same without antialiasing, shadows and reflections, and with simplified meshes: other frames

The policy is checkpoints/tiny_libero_object. It executes 8 of 10 actions between two looks and resizes frames
to its 64 pixels. Time is wall time from an episode's reset to its end, so run this on an idle machine. The
start of a process and the compilation of a task count on neither side. The second table gives the CPU seconds
per episode and what they were spent on, policy included. In `default`, the frames that the policy saw (by
their hash), the success and the steps of every episode must equal those of the standard loop.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from simulator import Clock, unmodified

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
from runtime.config import HERE
from sim.env import LIBERO_CAMERAS, TaskEnv, axis_angle, init_state_array, instruction, libraries

evaluation = importlib.import_module("04_eval")
SUITE = "libero_object"
KINDS = ("standard", "default", "fast")


class Standard:
    """What 04_eval.play needs of a TaskEnv, done by LIBERO's environment and the standard protocol."""

    def __init__(self, task: int, pixels: int, init: int):
        self.suite, self.task_id = SUITE, task
        self.env = unmodified(SUITE, task, init, pixels)
        self.states = init_state_array(SUITE, task)
        self.instruction = instruction(SUITE, task)
        self.max_steps = common.MAX_STEPS[SUITE]

    def reset(self, init: int) -> None:
        self.env.seed(common.ENV_SEED)
        self.env.reset()
        self.env.set_init_state(self.states[init])
        self.steps = 0
        for _ in range(common.SETTLE_STEPS):
            self.step(np.array(common.SETTLE_ACTION))
        self.steps = 0

    def step(self, action: np.ndarray) -> bool:
        self.obs, _, done, _ = self.env.step(action)
        self.steps += 1
        self.success = bool(done)
        return self.success

    def observe(self) -> dict:
        o = self.obs
        hand = [o["robot0_eef_pos"], axis_angle(o["robot0_eef_quat"]), o["robot0_gripper_qpos"]]
        obs = {"state": np.concatenate(hand).astype(np.float32), "instruction": self.instruction}
        for name, camera in LIBERO_CAMERAS.items():
            obs[name] = np.ascontiguousarray(o[f"{camera}_image"][::-1, ::-1])
        return obs

    def close(self) -> None:
        self.env.close()


def measure(kind: str, task: int, inits: list[int], pixels: int) -> None:
    """Play all episodes of a task in this process; print a JSON line."""
    cfg = evaluation.Config(checkpoint=str(HERE / "checkpoints" / "tiny_libero_object"), image_size=pixels)
    cfg = dataclasses.replace(cfg, render="fast" if kind == "fast" else "default")
    policy = evaluation.load_policy(cfg)
    libraries()
    evaluation.target_places = lambda *_: np.full((2, 3), np.nan)  # no part of the standard protocol
    standard = kind == "standard"
    env = Standard(task, pixels, inits[0]) if standard else TaskEnv(SUITE, task, pixels, cfg.render)
    env.reset(inits[0])
    env.observe()  # the first one makes the renderer
    clock = Clock()
    clock.attach(env, "reset", "reset")
    clock.attach(env, "step", "control steps")
    if standard:
        clock.attach(type(env.env.sim), "render", "rendering")
    else:
        clock.attach(env, "observe", "rendering")
    clock.attach(policy, "encode", "policy")
    clock.attach(policy, "sample_actions", "policy")
    rows = []
    for init in inits:
        frames, used = [], time.process_time()
        began = time.time()
        row = evaluation.play(env, policy, cfg, init, frames)
        row |= {"wall_s": time.time() - began, "cpu_s": time.process_time() - used, "looks": len(frames)}
        rows.append(row | {"shown": hashlib.sha256(np.stack(frames).tobytes()).hexdigest()})
    parts = {label: seconds / len(inits) for label, seconds in clock.spent.items()}
    parts["rest"] = sum(row["cpu_s"] for row in rows) / len(inits) - sum(parts.values())
    env.close()
    print(json.dumps({"rows": rows, "parts": parts}))


def start(kind: str, tasks: list[int], inits: str, pixels: str, mesa: str) -> list[subprocess.Popen]:
    """A process for each task."""
    environment = os.environ | {
        "LP_NUM_THREADS": mesa if kind == "standard" else "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, "measure", kind]
    return [
        subprocess.Popen(
            [*command, str(task), inits, pixels], stdout=subprocess.PIPE, text=True, env=environment
        )
        for task in tasks
    ]


def play_all(kind: str, tasks: list[int], at_once: int, *options: str) -> tuple[list[dict], float]:
    """The JSON of each task, and the wall seconds of all episodes with `at_once` processes."""
    measured, wall = [], 0.0
    for i in range(0, len(tasks), at_once):
        running = start(kind, tasks[i : i + at_once], *options)
        for process in running:
            out, _ = process.communicate()
            assert process.returncode == 0, kind
            measured.append(json.loads(out))
            wall += sum(row["wall_s"] for row in measured[-1]["rows"]) / len(running)
    return measured, wall


def main(
    tasks: str = "0,5", inits: str = "40,41", pixels: str = "256", processes: str = "2", mesa: str = "1"
) -> None:
    numbers = [int(task) for task in tasks.split(",")]
    measured, wall = {}, {}
    for kind in KINDS:
        at_once = 1 if kind == "standard" else int(processes)
        measured[kind], wall[kind] = play_all(kind, numbers, at_once, inits, pixels, mesa)
    rows = {kind: [row for part in measured[kind] for row in part["rows"]] for kind in KINDS}
    for a, b in zip(rows["standard"], rows["default"], strict=True):
        for key in ("task", "init_state", "success", "steps", "looks", "shown"):
            assert a[key] == b[key], (key, a, b)
    n = len(rows["standard"])
    print(f"{SUITE}, {pixels} px, {n} episodes, {os.cpu_count()} cores")
    print("frames, success and steps of `default` equal those of the standard loop\n")
    print("| loop | processes | Mesa threads | solved | outcome as standard ", end="")
    print("| episodes per hour | ratio | CPU s per episode |\n" + 8 * "|---" + "|")
    for kind in KINDS:
        cpu = sum(row["cpu_s"] for row in rows[kind]) / n
        solved = sum(row["success"] for row in rows[kind])
        shape = f"1 | {mesa}" if kind == "standard" else f"{processes} | 0"
        same = sum(a["success"] == b["success"] for a, b in zip(rows["standard"], rows[kind], strict=True))
        speed = f"{3600 * n / wall[kind]:.0f} | {wall['standard'] / wall[kind]:.1f}"
        print(f"| {kind} | {shape} | {solved} | {same} of {n} | {speed} | {cpu:.1f} |")
    labels = list(
        dict.fromkeys(label for kind in KINDS for part in measured[kind] for label in part["parts"])
    )
    print("\n| CPU s per episode | " + " | ".join(labels) + " |\n" + (1 + len(labels)) * "|---" + "|")
    for kind in KINDS:
        parts = [part["parts"] for part in measured[kind]]
        means = [sum(part.get(label, 0.0) for part in parts) / len(parts) for label in labels]
        print(f"| {kind} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        kind, task, inits, pixels = sys.argv[2:]
        measure(kind, int(task), [int(i) for i in inits.split(",")], int(pixels))
    else:
        main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
