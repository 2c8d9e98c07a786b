"""Episodes per hour: 04_eval.py's loop against the standard one, the same policy on the same episodes.

    python tests/bench/evaluation.py [tasks=0,5] [inits=40,41] [pixels=256] [processes=2] [mesa=1]        about 4 minutes

standard  one process, LIBERO's OffScreenRenderEnv, both cameras rendered at every step, env.reset() before every episode, as
          published evaluation scripts have it, with `mesa` threads of Mesa's renderer (left alone it takes all cores)
default   04_eval.py: `processes` processes, rendered when the policy looks, one Mesa thread each, LIBERO's own pixels
fast      the same without antialiasing, shadows and reflections: other frames, which the policy was trained on

The policy is checkpoints/tiny_libero_object, 8 of 10 actions carried out between two looks, frames resized to its 64 pixels. Time
is wall time from an episode's reset to its end, so run it on an idle machine; a process's start and a task's compilation are left
out on both sides. Then the CPU seconds per episode by what they went to, policy included. In `default` the frames shown to the
policy, by their hash, and success and steps of every episode must be the standard loop's.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from simulator import Clock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import episodes
import sim

evaluation = importlib.import_module("04_eval")
SUITE, KINDS = "libero_object", ("standard", "default", "fast")


class Standard:
    """The part of sim.TaskEnv that episodes.play needs, by LIBERO's environment and the standard protocol."""

    def __init__(self, task: int, pixels: int):
        sim.libraries()
        from libero.libero.envs import OffScreenRenderEnv

        bddl = sim.suite_of(SUITE).get_task_bddl_file_path(task)
        self.env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=pixels, camera_widths=pixels)
        self.states, self.instruction = sim.init_state_array(SUITE, task), sim.instruction(SUITE, task)
        self.max_steps, self.steps = common.MAX_STEPS[SUITE], 0

    def reset(self, init: int) -> None:
        self.env.seed(common.ENV_SEED)
        self.env.reset()
        self.env.set_init_state(self.states[init])
        for _ in range(common.SETTLE_STEPS):
            self.step(np.array(common.SETTLE_ACTION))
        self.steps = 0

    def step(self, action: np.ndarray) -> bool:
        self.obs, _, done, _ = self.env.step(action)
        self.steps, self.success = self.steps + 1, bool(done)
        return self.success

    def observe(self) -> dict:
        o = self.obs
        state = [o["robot0_eef_pos"], common.axis_angle(o["robot0_eef_quat"]), o["robot0_gripper_qpos"]]
        images = {"agentview": o["agentview_image"], "wrist": o["robot0_eye_in_hand_image"]}
        images = {camera: np.ascontiguousarray(image[::-1, ::-1]) for camera, image in images.items()}
        return images | {"state": np.concatenate(state).astype(np.float32), "instruction": self.instruction}

    def close(self) -> None:
        self.env.close()


def measure(kind: str, task: int, inits: list[int], pixels: int) -> None:
    """All episodes of a task in this process; prints a JSON line."""
    cfg = evaluation.Config(checkpoint=str(common.HERE / "checkpoints" / "tiny_libero_object"), image_size=pixels)
    cfg, clock, rows = dataclasses.replace(cfg, render=kind if kind != "standard" else "default"), Clock(), []
    policy = evaluation.load_policy(cfg)
    env = Standard(task, pixels) if kind == "standard" else sim.TaskEnv(SUITE, task, pixels, cfg.render)
    env.reset(inits[0])
    env.observe()  # the first one makes the renderer
    clock.attach(env, "reset", "reset")
    clock.attach(env, "step", "control steps")
    clock.attach(*((type(env.env.sim), "render") if kind == "standard" else (env, "observe")), "rendering")
    clock.attach(policy, "encode", "policy")
    clock.attach(policy, "sample_actions", "policy")
    for init in inits:
        frames, began, used = [], time.time(), time.process_time()
        row = episodes.play(env, init, partial(evaluation.look, policy, cfg, (SUITE, task, init), frames))
        row |= {"task": task, "init_state": init, "wall_s": time.time() - began, "cpu_s": time.process_time() - used}
        rows.append(row | {"shown": hashlib.sha256(np.stack(frames).tobytes()).hexdigest(), "looks": len(frames)})
    parts = {label: seconds / len(inits) for label, seconds in clock.spent.items()}
    parts["rest"] = sum(row["cpu_s"] for row in rows) / len(inits) - sum(parts.values())
    env.close()
    print(json.dumps({"rows": rows, "parts": parts}))


def start(kind: str, tasks: list[int], inits: str, pixels: str, mesa: str) -> list[subprocess.Popen]:
    """A process for each task."""
    environment = os.environ | {"LP_NUM_THREADS": mesa if kind == "standard" else "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "measure", kind]
    return [
        subprocess.Popen([*command, str(task), inits, pixels], stdout=subprocess.PIPE, text=True, env=environment)
        for task in tasks
    ]


def main(tasks: str = "0,5", inits: str = "40,41", pixels: str = "256", processes: str = "2", mesa: str = "1") -> None:
    numbers, found, wall = [int(task) for task in tasks.split(",")], {}, dict.fromkeys(KINDS, 0.0)
    for kind in KINDS:
        at_once, found[kind] = 1 if kind == "standard" else int(processes), []
        for i in range(0, len(numbers), at_once):
            running = start(kind, numbers[i : i + at_once], inits, pixels, mesa)
            for process in running:
                out, _ = process.communicate()
                assert process.returncode == 0, kind
                found[kind].append(json.loads(out))
                wall[kind] += sum(row["wall_s"] for row in found[kind][-1]["rows"]) / len(running)
    rows = {kind: [row for part in found[kind] for row in part["rows"]] for kind in KINDS}
    for a, b in zip(rows["standard"], rows["default"], strict=True):
        for key in ("task", "init_state", "success", "steps", "looks", "shown"):
            assert a[key] == b[key], (key, a, b)
    n = len(rows["standard"])
    per_hour = {kind: 3600 * n / seconds for kind, seconds in wall.items()}
    print(f"{SUITE}, {pixels} px, {n} episodes, {os.cpu_count()} cores")
    print("frames, success and steps of `default` are those of the standard loop\n")
    head = "loop | processes | Mesa threads | solved | outcome as standard | episodes per hour | ratio | CPU s per episode"
    print(f"| {head} |\n" + 8 * "|---" + "|")
    for kind in KINDS:
        cpu, solved = sum(row["cpu_s"] for row in rows[kind]) / n, sum(row["success"] for row in rows[kind])
        shape = f"1 | {mesa}" if kind == "standard" else f"{processes} | 1"
        same = sum(a["success"] == b["success"] for a, b in zip(rows["standard"], rows[kind], strict=True))
        speed = f"{per_hour[kind]:.0f} | {per_hour[kind] / per_hour['standard']:.1f}"
        print(f"| {kind} | {shape} | {solved} | {same} of {n} | {speed} | {cpu:.1f} |")
    labels = list(dict.fromkeys(label for kind in KINDS for part in found[kind] for label in part["parts"]))
    print("\n| CPU s per episode | " + " | ".join(labels) + " |\n" + (1 + len(labels)) * "|---" + "|")
    for kind in KINDS:
        means = [sum(part["parts"].get(label, 0.0) for part in found[kind]) / len(found[kind]) for label in labels]
        print(f"| {kind} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        kind, task, inits, pixels = sys.argv[2:]
        measure(kind, int(task), [int(i) for i in inits.split(",")], int(pixels))
    else:
        main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
