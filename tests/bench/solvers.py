"""How far fewer denoise steps and other solvers of the flow end from its own solution.

    python tests/bench/solvers.py        20 s

checkpoints/tiny_libero_object on the observations of the two demonstrations in checkpoints/try/data, one
noise each: root mean square distance of the chunks from those of 400 midpoint steps, in normalised units (an
action's range is about 2). An evaluation is one pass of the action expert; midpoint and Heun take two a step.
Then how fast the velocity changes along the path. Heun's last step asks for it at t = 0, where training
(times from 0.001, most of them large) has hardly been.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import backbones
import common
from extras import cells
from runtime.config import HERE
from sim.demos import frames, read_demos

STEPS, FINE = (1, 2, 3, 5, 10, 20), 400
SOLVERS = ("euler", "midpoint", "heun")
TIMES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0)


def observations() -> dict:
    demos = list(read_demos(HERE / "checkpoints/try/data/libero_object/task_00.hdf5", 0))
    obs = {c: frames([getattr(d, c) for d in demos]) for c in ("agentview", "wrist")}
    obs["state"] = torch.from_numpy(np.concatenate([d.state[d.image_steps] for d in demos]))
    return obs | {"instruction": [d.instruction for d in demos for _ in d.image_steps]}


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    policy = backbones.load_policy(HERE / "checkpoints" / "tiny_libero_object").eval()
    prefix = policy.encode(observations())
    noise = policy.noise(len(prefix), common.stream(0, "noise"))
    exact = cells.solve(policy, prefix, noise, FINE, "midpoint")
    check = rms(cells.solve(policy, prefix, noise, FINE // 2, "midpoint") - exact)
    print(f"n = {len(prefix)} observations; half as many steps move the reference by {check:.4f}\n")
    print("| steps | " + " | ".join(SOLVERS) + " |\n" + "|---" * 4 + "|")
    for steps in STEPS:
        row = [f"{rms(cells.solve(policy, prefix, noise, steps, solver) - exact):.3f}" for solver in SOLVERS]
        print(f"| {steps} | {' | '.join(row)} |")

    print("\n| t | velocity, rms | change from t to t - 0.01 |\n|---|---|---|")
    x, h = noise.clone(), 1e-2
    for i in range(round(1 / h) + 1):
        t = 1 - i * h
        v, ahead = (policy.velocity(prefix, x, torch.tensor([max(0.0, s)])) for s in (t, t - h))
        if any(abs(t - s) < h / 2 for s in TIMES):
            change = f"{rms(ahead - v):.4f}" if t > h / 2 else ""  # there is nothing behind t = 0
            print(f"| {abs(t):.2f} | {rms(v):.3f} | {change} |")
        x = x - h * v


if __name__ == "__main__":
    main()
