"""OpenVLA's image pipeline: what its published checkpoints saw when they were evaluated on LIBERO.

Follows experiments/robot/openvla_utils.py and robot/libero/libero_utils.py of openvla, which use TensorFlow,
in numpy and PIL. Exact but for the JPEG decoder; the resize is off by one level in a few pixels. All images
are uint8 (h, w, 3).
"""

import io

import numpy as np
from PIL import Image


def jpeg(image: np.ndarray) -> np.ndarray:
    """JPEG round trip at quality 95, 4:2:0, which the training data went through.

    TensorFlow decodes with a less exact inverse cosine transform than PIL: from the same bytes its pixels
    differ by up to 17 grey levels, 1.3 on average.
    """
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=2)
    return np.asarray(Image.open(file))


def lanczos3_weights(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in) float32: rows of the antialiased kernel sinc(x) sinc(x / 3), normalised.

    Zero outside the image.
    """
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
    """The central 90 % of the area, back at the same size: tf.image.crop_and_resize, bilinear, float32.

    It maps corners to corners. The published checkpoints were trained with random crops of this area.
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


def resize_bicubic(image: np.ndarray, size: int) -> np.ndarray:  # the processor's: no aspect is kept
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
