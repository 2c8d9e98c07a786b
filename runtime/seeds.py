"""What decides a training step: one seed in, named generators out; the rows that it sees; its learning rate.

What is drawn never depends on what was drawn elsewhere before. All identities count this file.
"""

import hashlib
import json
import math

import numpy as np
import torch

from runtime import ranks


def entropy(seed: int, names: tuple) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *names]).encode()).digest()[:8], "little")


def stream(seed: int, *names: int | str) -> torch.Generator:
    """A torch generator of its own for each (seed, names)."""
    return torch.Generator().manual_seed(entropy(seed, names) >> 1)


def np_stream(seed: int, *names: int | str) -> np.random.Generator:
    """The same in numpy."""
    return np.random.default_rng(entropy(seed, names))


def shuffled(seed: int, name: str, step: int, batch_size: int, n: int) -> torch.Tensor:
    """Indices (batch_size,) of a training step: one permutation of n per epoch, a function of (seed, step)
    alone.
    """
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    order = {
        e: torch.randperm(n, generator=stream(seed, f"{name} epoch", e)) for e in set((places // n).tolist())
    }
    return torch.stack([order[p // n][p % n] for p in places.tolist()])


def select(x, index: torch.Tensor):
    """Rows of a batch: a tensor, a list, a dict of them, None, or what has a `select` of its own (draws,
    prefixes).
    """
    if isinstance(x, dict):
        return {key: select(value, index) for key, value in x.items()}
    if isinstance(x, list):
        return [x[i] for i in index.tolist()]
    if x is None or isinstance(x, torch.Tensor):
        return x if x is None else x[index]
    return x.select(index)


def own_rows(batch_size: int, *parts) -> tuple:
    """This process's rows of the parts of a batch: all of them, unless torchrun splits it."""
    return tuple(select(part, ranks.share(torch.arange(batch_size))) for part in parts)


def learning_rate(step: int, cfg) -> float:
    """Linear warm-up to the config's lr over `warmup` steps, then a cosine to 1 % of it at `steps`."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    done = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
