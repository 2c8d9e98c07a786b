"""Randomness: one seed in, named generators out. What is drawn never depends on what was drawn elsewhere
before.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch


def entropy(seed: int, names: tuple) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *names]).encode()).digest()[:8], "little")


def stream(seed: int, *names: int | str) -> torch.Generator:
    """A torch generator of its own for each (seed, names)."""
    return torch.Generator().manual_seed(entropy(seed, names) >> 1)


def np_stream(seed: int, *names: int | str) -> np.random.Generator:
    """The same in numpy."""
    return np.random.default_rng(entropy(seed, names))
