"""What both backbones use beside transformers' modules: attention, a convolutional stem, the prefix.

Shapes: B observations, S tokens, L layers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValues = list[tuple[Tensor, Tensor]]  # of each layer, (B, kv heads, S, head_dim), keys rotated


STEM = (  # what a model of such sizes is told
    "{}: conv_stem needs a patch_size that is a power of 2, an image_size that is a multiple of it, and a"
    " hidden_size of 16 or more that is a multiple of 8"
)


def conv_stem(width: int, patch_size: int) -> nn.Sequential:
    """log2(patch_size) convolutions of stride 2 that end in `width` channels: a patch embedding's token grid.

    The number of channels doubles from layer to layer.
    """
    steps = patch_size.bit_length() - 1
    channels = [3] + [max(width // 2 ** (steps - 1 - i) // 8 * 8, 16) for i in range(steps)]  # of 8 groups
    layers = []
    for i in range(steps):
        conv = nn.Conv2d(channels[i], channels[i + 1], 3, stride=2, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.GroupNorm(8, channels[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def init_matrices(named: Iterable[tuple[str, Tensor]], depth: int) -> None:
    """For training from scratch: matrices of variance 1 / fan-in; at a branch's end 1 / (2 depth fan-in)."""
    for name, p in named:
        if p.ndim == 2:
            p.normal_(
                std=(p.shape[1] * (2 * depth if "o_proj" in name or "down_proj" in name else 1)) ** -0.5
            )


def full(x: Tensor) -> Tensor:  # in float32, or as it is where its precision is higher
    return x.to(torch.promote_types(x.dtype, torch.float32))


def each_image(images: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    # `change` of each uint8 image of (B, h, w, 3), on the CPU
    return torch.from_numpy(np.stack([change(image) for image in images.cpu().numpy()])).to(images.device)


def padded(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    # ids and their validity, both (B, longest row), padded on the right
    ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Tables (B, S, 1, head_dim) of the rotary embedding, base 10000: [cos, cos] and [-sin, sin]."""
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = positions[..., None, None].float() * inv_freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (B, S, heads, head_dim)
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def project_kv(attn: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    # rotated keys, and values (B, kv heads, S, head_dim), of the normed tokens x (B, S, width)
    k, v = (proj(x).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.k_proj, attn.v_proj))
    return rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)


def attend(attn: nn.Module, x: Tensor, rope: tuple, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the tokens x (B, S, width) to keys and values (B, kv heads, keys, head_dim), output
    projection included.

    mask (B, 1, S or 1, keys) is True where a token may look, or 0 there and -inf elsewhere. None: each looks
    at itself and those before it. Heads that share a key become further queries of it, so no key is copied
    for them. A mask must then be the same for all queries.
    """
    q = rotate(attn.q_proj(x).unflatten(-1, (-1, attn.head_dim)), *rope)  # (B, S, heads, head_dim)
    b, s, heads, dim = q.shape
    kv = k.shape[1]
    q = q.view(b, s, kv, heads // kv, dim).transpose(1, 2).reshape(b, kv, -1, dim)  # queries: S * heads / kv
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return attn.o_proj(out.view(b, kv, s, -1, dim).transpose(1, 2).reshape(b, s, -1))


def siglip_features(tower: nn.Module, pixels: Tensor) -> Tensor:  # (B, 3, s, s) -> (B, patches, hidden)
    emb, layers = tower.embeddings, tower.encoder.layers  # and no final norm
    x = emb.patch_embedding(pixels).flatten(2).transpose(1, 2) + emb.position_embedding.weight
    x = x.to(layers[0].layer_norm1.weight.dtype)
    for layer in layers:
        x = layer(x, None)
    return x


def decoder_layer(
    layer: nn.Module, x: Tensor, rope: tuple, past: Sequence | None, mask: Tensor | None, kv_only: bool
):
    """A language model's layer on tokens x (B, S, width) behind the keys and values `past`: its output (None
    with kv_only), and the keys and values of all tokens.
    """
    h = layer.input_layernorm(x)
    k, v = project_kv(layer.self_attn, h, rope)
    if past is not None:
        k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
    if kv_only:
        return None, k, v
    x = x + attend(layer.self_attn, h, rope, k, v, mask)
    return x + layer.mlp(layer.post_attention_layernorm(x)), k, v


class Rows:
    """Tensors of a batch. The first dimension counts observations. The last but one counts tokens, except in
    the last tensor, `valid` (B, S).
    """

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.__dataclass_fields__]

    def __len__(self) -> int:
        return len(self.valid)

    def select(self, index: Tensor) -> Self:  # (N,) observations; may be on another device
        return type(self)(*(x[index.to(x.device)] for x in self.tensors()))

    def widen(self, length: int) -> Self:  # by invalid tokens, which change no result
        n = length - self.valid.shape[1]
        *tokens, valid = self.tensors()
        return type(self)(*(F.pad(x, (0, 0, 0, n)) for x in tokens), F.pad(valid, (0, n)))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Several batches end to end, padded to the longest."""
        length = max(part.valid.shape[1] for part in parts)
        return cls(*map(torch.cat, zip(*(part.widen(length).tensors() for part in parts), strict=True)))


@dataclass
class Prefix(Rows):  # keys and values of the vision-language part: all of it that the actions read
    keys: Tensor  # (B, L, kv heads, S, head_dim), rotated
    values: Tensor  # (B, L, kv heads, S, head_dim)
    valid: Tensor  # (B, S) bool; False where the prompt is padded

    def layers(self) -> KeyValues:
        return list(zip(self.keys.unbind(1), self.values.unbind(1), strict=True))


@dataclass
class Embedded(Rows):  # a prefix before the language model's layers
    tokens: Tensor  # (B, S, width)
    valid: Tensor  # (B, S) bool
