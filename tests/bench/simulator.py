"""What a control step and an observation cost, in LIBERO's own environment and in `TaskEnv`.

    python tests/bench/simulator.py [suite=libero_object] [task=0] [pixels=64] [rounds=8]      about 1 minute

Prints the CPU milliseconds (all threads; LP_NUM_THREADS renderer threads) of a control step with two images,
which LIBERO renders at every step, and what they were spent on. Both environments execute the same actions in
turns of STEPS steps. The table gives medians over the rounds, and ratios round by round. After each round the
states are compared bit by bit, and the images of the `default` mode byte by byte.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
from sim.env import TaskEnv, init_state_array, libraries, suite_of

MODES = ("fast", "default")
STEPS = 10  # per round
PHYSICS = ("mj_forward", "mj_forwardSkip", "mj_fwdConstraint", "mj_step", "mj_step2")


class Clock:
    """CPU seconds by label. A call's time does not include the labelled calls inside it."""

    def __init__(self):
        self.spent = {}
        self.open = []

    def attach(self, owner, name: str, label: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            began = time.process_time()
            self.open.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                total = time.process_time() - began
                self.spent[label] = self.spent.get(label, 0.0) + total - self.open.pop()
                if self.open:
                    self.open[-1] += total

        setattr(owner, name, timed)

    def read(self) -> dict:
        spent, self.spent = self.spent, {}
        return {label: 1e3 * seconds / STEPS for label, seconds in spent.items()}  # milliseconds a step


def unmodified(suite: str, task: int, init: int, pixels: int):
    """LIBERO's environment, started by the standard protocol."""
    from libero.libero.envs import OffScreenRenderEnv

    bddl = suite_of(suite).get_task_bddl_file_path(task)
    env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=pixels, camera_widths=pixels)
    env.seed(common.ENV_SEED)
    env.reset()
    env.set_init_state(init_state_array(suite, task)[init])
    for _ in range(common.SETTLE_STEPS):
        env.step(np.array(common.SETTLE_ACTION))
    return env


def measure(suite: str, task: int, pixels: int, rounds: int, init: int = 41) -> dict[str, list[dict]]:
    """Milliseconds by label in each round, for the unmodified environment and for each render mode."""
    mujoco = libraries().mujoco
    theirs = unmodified(suite, task, init, pixels)
    ours = {mode: TaskEnv(suite, task, pixels, mode) for mode in MODES}
    problem = theirs.env
    clock = Clock()
    for name in PHYSICS:
        clock.attach(mujoco, name, "physics")
    clock.attach(problem.robots[0], "control", "controller")
    clock.attach(problem, "_update_observables", "observables")
    clock.attach(problem, "_get_observations", "observables")
    clock.attach(problem.sim, "render", "rendering")
    clock.attach(theirs, "step", "rest")
    for env in ours.values():
        env.reset(init)
        env.observe()  # the first one makes the renderer
        clock.attach(env._osc, "begin", "controller")
        clock.attach(env._osc, "advance", "physics")  # and 24 of 25 torques
        clock.attach(env, "proprio", "observables")
        clock.attach(env, "observe", "rendering")
        clock.attach(env, "step", "rest")
    clock.read()
    times = {"unmodified": [], **{mode: [] for mode in ours}}
    rng = np.random.default_rng(0)
    push = np.zeros(7)
    for _ in range(rounds):
        actions = []
        for _ in range(STEPS):
            push = 0.8 * push + 0.5 * rng.standard_normal(7)
            actions.append(push.copy())
        seen = [theirs.step(action)[0] for action in actions]
        times["unmodified"].append(clock.read())
        for mode, env in ours.items():
            views = []
            for action in actions:
                env.step(action)
                views.append(env.observe())
            times[mode].append(clock.read())
            for name in ("qpos", "qvel", "qacc_warmstart"):
                assert np.array_equal(getattr(theirs.sim.data, name), getattr(env.data, name)), (mode, name)
            for obs, view in zip(seen, views, strict=True):
                assert mode == "fast" or np.array_equal(obs["agentview_image"][::-1, ::-1], view["agentview"])
    for env in (theirs, *ours.values()):
        env.close()
    return times


def main(suite: str = "libero_object", task: int = 0, pixels: int = 64, rounds: int = 8) -> None:
    times = measure(suite, int(task), int(pixels), int(rounds))
    threads = os.environ["LP_NUM_THREADS"]
    print(f"{suite} task {task}, {pixels} px, LP_NUM_THREADS {threads}, {rounds} rounds of {STEPS} steps")
    head = "".join(f"{name:>14}" for name in times)
    print(f"{'CPU ms per step':24}{head}   unmodified / default, fast: median (lowest to highest round)")
    parts = ("physics", "controller", "observables", "rest", "rendering")
    rows = {part: (part,) for part in parts} | {
        "step without images": parts[:4],
        "step and observation": parts,
    }
    for row, labels in rows.items():
        ms = {}
        for name, each in times.items():
            ms[name] = np.array([sum(parts_ms.get(label, 0.0) for label in labels) for parts_ms in each])
        ratios = [ms["unmodified"] / np.maximum(ms[mode], 1e-9) for mode in MODES[::-1]]
        text = ", ".join(f"{np.median(r):.1f} ({r.min():.1f} to {r.max():.1f})" for r in ratios)
        cells = "".join(f"{np.median(values):14.2f}" for values in ms.values())
        print(f"{row:24}{cells}   {text if np.median(ms['fast']) > 0.005 else '-'}")


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
