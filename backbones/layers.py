"""What both backbones are made of beside transformers' modules: rotary keys, a convolutional stem, the prefix.

Shapes: B observations, S tokens, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_stem(width: int, patch_size: int) -> nn.Sequential:
    """log2(patch_size) convolutions of stride 2, channels doubling up to the width: the token grid of a patch embedding."""
    steps = int(math.log2(patch_size))
    channels = [3] + [max(width >> (steps - 1 - i) & ~7, 16) for i in range(steps)]
    layers = []
    for i in range(steps):
        conv = nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.GroupNorm(8, channels[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def full(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Tables (B, S, 1, head_dim) of the rotary embedding, base 10000, for `rotate`: cos twice, and sin with its two signs."""
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = positions[..., None, None].float() * inv_freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (B, S, heads, head_dim)
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def project_kv(attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotated keys and values (B, kv heads, S, head_dim) of the normed tokens x (B, S, width)."""
    k, v = (proj(x).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.k_proj, attn.v_proj))
    return rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)


@dataclass
class Prefix:
    """What the vision-language part hands to the actions: its keys and values. Plain tensors, observations first."""

    keys: Tensor  # (B, L, kv heads, S, head_dim), rotated
    values: Tensor  # (B, L, kv heads, S, head_dim)
    valid: Tensor  # (B, S) bool; False where the prompt is padded

    def select(self, index: Tensor) -> Prefix:
        return Prefix(self.keys[index], self.values[index], self.valid[index])

    def detach(self) -> Prefix:
        return Prefix(self.keys.detach(), self.values.detach(), self.valid)

    def __len__(self) -> int:
        return len(self.valid)

    def widen(self, length: int) -> Prefix:
        """Padded to `length` tokens, which changes no result: prefixes of several batches can then be laid end to end."""
        n = length - self.valid.shape[1]
        return Prefix(F.pad(self.keys, (0, 0, 0, n)), F.pad(self.values, (0, 0, 0, n)), F.pad(self.valid, (0, n)))

    @staticmethod
    def cat(parts: Sequence[Prefix]) -> Prefix:
        parts = [p.widen(max(p.valid.shape[1] for p in parts)) for p in parts]
        return Prefix(*(torch.cat([getattr(p, name) for p in parts]) for name in ("keys", "values", "valid")))


@dataclass
class Embedded:
    """What goes into the language model's layers: the tokens of a prefix. Observations first, like a Prefix."""

    tokens: Tensor  # (B, S, width)
    valid: Tensor  # (B, S) bool

    def select(self, index: Tensor) -> Embedded:
        return Embedded(self.tokens[index], self.valid[index])

    @staticmethod
    def cat(parts: Sequence[Embedded]) -> Embedded:
        length = max(p.valid.shape[1] for p in parts)
        padded = [
            (F.pad(p.tokens, (0, 0, 0, length - p.valid.shape[1])), F.pad(p.valid, (0, length - p.valid.shape[1]))) for p in parts
        ]
        return Embedded(*(torch.cat(part) for part in zip(*padded, strict=True)))
