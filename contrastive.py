"""The projection head on a policy's vision tower, and its loss: what 06_pretrain_head.py trains and 01_sft.py may add to its own.

Shapes: B frames, W width of the tower (1152 as published), D of the embedding (128).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disk
from common import UserError, stream


class Head(nn.Module):
    """Linear -> GELU -> Linear -> unit length; 656,000 parameters at the published 1152-512-128. One head for all views."""

    def __init__(self, width: int, hidden: int, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, W) -> (B, D)
        return F.normalize(self.fc2(F.gelu(self.fc1(x.float()))), dim=-1)

    def fold_in(self, mean: Tensor, spread: Tensor) -> Head:
        """Become the head that does to x what this one does to (x - mean) / spread."""
        weight = self.fc1.weight.data.double() / spread.double()
        self.fc1.bias.data = (
            self.fc1.bias.data.double() - weight @ mean.double().expand(weight.shape[1])
        ).float()
        self.fc1.weight.data = weight.float()
        return self


def load_head(path: str) -> Head:
    """A head that 06_pretrain_head.py has saved, frozen."""
    tensors = disk.load_tensors(path)
    try:
        (hidden, width), dim = tensors["fc1.weight"].shape, len(tensors["fc2.bias"])
        head = Head(width, hidden, dim).requires_grad_(False)
        head.load_state_dict(tensors)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is no head of 06_pretrain_head.py ({disk.one_line(error)})") from error
    return head


def info_nce(
    a: Tensor, b: Tensor, temperature: float, negatives: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE (arXiv 1807.03748, both ways as CLIP's): a[i] (B, D) has to find b[i] among all of b, and b[i] a[i].

    negatives (B, B): True where b[j] may serve as a negative of a[i]; None = everywhere, log(B) is then what chance gives.
    rows: the loss is the mean over these only (a rank's share); every row stays a candidate of the others.
    """
    assert a.shape == b.shape and a.ndim == 2, (a.shape, b.shape)
    logits = a @ b.T / temperature  # (B, B), the positives on the diagonal
    if negatives is not None:
        logits = logits.masked_fill(
            ~(negatives | torch.eye(len(a), dtype=torch.bool, device=a.device)), -torch.inf
        )
    log_p = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()  # (B,)
    return -(log_p if rows is None else log_p[rows]).mean() / 2


def tower_of(policy) -> nn.Module:
    """The SigLIP tower of either backbone."""
    from transformers import SiglipVisionModel

    for module in policy.modules():
        if isinstance(module, SiglipVisionModel):
            return module
    raise UserError("the policy has no SigLIP tower; put siglip into model.towers")


def pooled(policy, images: Tensor) -> Tensor:
    """uint8 images (B, h, w, 3) -> float32 (B, W): the mean over the tower's patches, as the policy reads them.

    So pi-0.5's pass its last norm, OpenVLA's are those before the last block. A mean, since SigLIP has no CLS token and the
    published policies come without its attention pooling.
    """
    tower = tower_of(policy)
    table = tower.embeddings.position_embedding.weight  # (patches, W)
    pixels = policy.pixels(images.to(table.device))[:, -3:]  # of OpenVLA's fused pixels, SigLIP's come last
    x = tower.embeddings.patch_embedding(pixels.to(table.dtype)).flatten(2).transpose(1, 2) + table
    x = x.to(next(tower.encoder.parameters()).dtype)
    for layer in tower.encoder.layers:
        x = layer(x, None)
    return (x if tower.post_layernorm is None else tower.post_layernorm(x)).float().mean(1)


def shuffle_weights(module: nn.Module, seed: int) -> None:
    """Every tensor keeps its numbers, and so its scale, in random places."""
    for name, p in module.named_parameters():
        p.data = p.data.flatten()[
            torch.randperm(p.numel(), generator=stream(seed, name)).to(p.device)
        ].view_as(p)
