"""What the tests of both backbones feed a policy with."""

import numpy as np
import torch

INSTRUCTIONS = [
    "pick up the black bowl and place it on the plate",
    "open the drawer",
    "turn on the stove and put the moka pot on top of it",
]


def stats(n: int, generator: np.random.Generator) -> dict:
    mean, std = generator.normal(size=n), generator.uniform(0.5, 2, size=n)
    return {k: v.tolist() for k, v in {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2 * std}.items()}


def observations(n: int = 3, size: int = 32) -> dict:
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, n, size, size, 3), dtype=torch.uint8, generator=g)
    instructions = [INSTRUCTIONS[i % 3] for i in range(n)]
    return {"agentview": images[0], "wrist": images[1], "state": torch.randn(n, 8, generator=g), "instruction": instructions}


def part(obs: dict, rows: list[int]) -> dict:
    return {k: [v[i] for i in rows] if isinstance(v, list) else v[rows] for k, v in obs.items()}


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
