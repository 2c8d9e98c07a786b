"""What OpenVLA's published checkpoints need around the model: their keys, their statistics, their image pipeline."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

import common
from common import UserError

if TYPE_CHECKING:
    from backbones.openvla import OpenVLAConfig

# ----------------------------------------------------------------------------------------------------------------- files
PUBLISHED_NAMES = (  # what a published key has -> what it has here; one after the other
    ("vision_backbone.featurizer.", "vision.dino."),
    ("vision_backbone.fused_featurizer.", "vision.siglip."),
    ("language_model.model.", "language_model."),
    ("dino.blocks.", "dino.encoder.layer."),
    ("siglip.blocks.", "siglip.encoder.layers."),
    ("dino.patch_embed.proj.", "dino.embeddings.patch_embeddings.projection."),
    ("siglip.patch_embed.proj.", "siglip.embeddings.patch_embedding."),
    ("dino.pos_embed", "dino.embeddings.position_embeddings"),
    ("siglip.pos_embed", "siglip.embeddings.position_embedding.weight"),
    ("dino.cls_token", "dino.embeddings.cls_token"),
    ("dino.reg_token", "dino.embeddings.register_tokens"),
)
BLOCK_NAMES = {  # the same inside a tower's blocks; {} stands for q, k, v, which timm keeps in one matrix
    "dino": (("attn.qkv", "attention.{}_proj"), ("attn.proj", "attention.o_proj"), ("ls1.scale_factor", "layer_scale1.lambda1"))
    + (("ls2.scale_factor", "layer_scale2.lambda1"),),
    "siglip": (("attn.qkv", "self_attn.{}_proj"), ("attn.proj", "self_attn.out_proj"), (".norm", ".layer_norm")),
}


def native_key(key: str, cfg: OpenVLAConfig) -> str | None:
    """The name here of a tensor of OpenVLA's files, None where nothing uses it: last block, norm and pooling of the towers."""
    for theirs, ours in PUBLISHED_NAMES:
        key = key.replace(theirs, ours)
    for tower, names in BLOCK_NAMES.items():
        if key.startswith(f"vision.{tower}.encoder."):
            for theirs, ours in names:
                key = key.replace(theirs, ours)
            return key if int(key.split(".")[4]) < getattr(cfg, tower).num_hidden_layers else None
    return None if key.startswith(("vision.dino.norm.", "vision.siglip.norm.", "vision.siglip.attn_pool.")) else key


def native_tensors(tensors: dict[str, Tensor], cfg: OpenVLAConfig) -> dict[str, Tensor]:
    """OpenVLA's published tensors under the names here, as load_weights takes them: q, k, v apart, unused ones left out."""
    named = {}
    for key, tensor in tensors.items():
        name = native_key(key, cfg)
        if name is not None and "{}" in name:
            named |= {name.format(part): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        elif name is not None:
            named[name] = tensor[0] if name == "vision.siglip.embeddings.position_embedding.weight" else tensor
    return named


def suite_stats(published: dict, suite: str) -> dict:
    """norm_stats of one suite from a published config.json or dataset_statistics.json."""
    for name in (suite, f"{suite}_no_noops"):
        if name in published:
            return {"action": published[name]["action"]}
    raise UserError(f"the checkpoint has no statistics of {suite!r}; {common.did_you_mean(suite, published)}")


# ---------------------------------------------------------------------------------------------------------------- images
# experiments/robot/openvla_utils.py and robot/libero/libero_utils.py of openvla, which use TensorFlow; uint8 (h, w, 3) each.
def jpeg(image: np.ndarray) -> np.ndarray:
    """JPEG round trip at quality 95, 4:2:0, as the training data had. TensorFlow decodes with a less exact inverse cosine
    transform than PIL: the same bits, read up to 17 grey levels (1.3 on average) differently."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=2)
    return np.asarray(Image.open(file))


def lanczos3_weights(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in) float32 rows of the antialiased kernel sinc(x) sinc(x / 3), normalised; zero outside the image."""
    scale = n_in / n_out
    x = (np.arange(n_in) - ((np.arange(n_out)[:, None] + 0.5) * scale - 0.5)) / max(scale, 1.0)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize_lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    """tf.image.resize(..., "lanczos3", antialias=True) to (size, size, 3): rounded once, at the end."""
    rows, columns = lanczos3_weights(image.shape[0], size), lanczos3_weights(image.shape[1], size)
    x = np.einsum("ij,jkc->ikc", rows, image.astype(np.float32), optimize=True)
    x = np.einsum("lk,ikc->ilc", columns, x, optimize=True)
    return np.rint(x).clip(0, 255).astype(np.uint8)


def center_crop(image: np.ndarray, area: float = 0.9) -> np.ndarray:
    """tf.image.crop_and_resize of the central 90 % of the area, to the same size: bilinear, corners on corners, float32.

    Only because the published checkpoints were trained with random crops of this area.
    """
    n, side = len(image), np.sqrt(np.float32(area))
    low, high = (np.float32(1) - side) / 2, (np.float32(1) + side) / 2
    at = low * np.float32(n - 1) + np.arange(n, dtype=np.float32) * (high - low)  # (n,)
    first = np.floor(at).astype(int)
    second, part = np.minimum(first + 1, n - 1), (at - first).astype(np.float32)[:, None]  # (n, 1)
    x = image.astype(np.float32) / np.float32(255)
    x = x[:, first] + (x[:, second] - x[:, first]) * part
    x = x[first] + (x[second] - x[first]) * part[..., None]
    return np.floor(x.clip(0, 1) * np.float32(255.5)).astype(np.uint8)


def resize_bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """The processor's resize: PIL, antialiased, whatever the aspect."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
