"""DoRA (arXiv 2402.09353) as peft has it, at the price of LoRA: same parameters, same files, same values.

A DoRA layer computes g * (W x + s B A x). g = magnitude / norm has one number per output; the norm is that of
the rows of W + s B A. The backward pass takes it for a constant (section 4.3 of DoRA's paper). peft computes
the product B A, an out x in matrix, in every forward pass. Here the square of the norm is expanded row by
row, |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, without that product. (A bfloat16 W is copied to float32.)

Training uses this file, and so does acting in bfloat16, where adapters stay unmerged (common.load_adapter).
In float32 peft alone loads, merges and runs an adapter that was saved.
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn


class Product(torch.autograd.Function):
    """y = m / norm * (x W^T + s (x A^T) B^T) for x (N, in), in x's precision.

    W (out, in) is frozen; A (rank, in), B (out, rank), the magnitude m (out,); the norm (out,) is a constant.
    The backward pass keeps x, x A^T and y; the layers next to it mostly keep x and y anyway. It uses
    dL/dm = sum of dL/dy * y / m, so m must not be 0: it starts as the norm of W's row, and changes by a
    learning rate a step.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, A: Tensor, B: Tensor, m: Tensor, norm: Tensor, s: float) -> Tensor:
        low = F.linear(x.to(A.dtype), A)  # (N, rank)
        g = m / norm  # exactly 1 at the start
        y = F.linear(x, W).to(A.dtype).addmm_(low, B.T, alpha=s).mul_(g).to(x.dtype)
        ctx.save_for_backward(x, W, A, B, m, g, low, y)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, m, g, low, y = ctx.saved_tensors
        product = dy.to(m.dtype) * y
        dm = product.sum(0) / m
        dz = torch.mul(dy, g, out=product)  # (N, out)
        dlow = ctx.s * (dz @ B)
        dx = (dz.to(W.dtype) @ W).to(A.dtype).addmm_(dlow, A).to(x.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, dlow.T @ x.to(A.dtype), ctx.s * (dz.T @ low), dm, None, None


class FactoredDora(DoraLinearVariant):
    """peft's variant (files, merging), with `row_norm` as the first magnitude: m / norm is exactly 1.

    That holds in bfloat16 too.
    """

    @staticmethod
    def init(module: nn.Module, adapter_name: str, **kwargs) -> None:
        DoraLinearVariant.init(module, adapter_name, **kwargs)
        module.lora_magnitude_vector[adapter_name].weight.data = module.row_norm(adapter_name)


class DoraLinear(Linear):
    """peft's layer around a linear one, without dropout. One with a bias keeps peft's own forward pass."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs):
        assert config.use_dora and not config.lora_dropout
        self._squares = None, None  # which weight, and the squared norms of its rows
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    lora_variants = property(lambda self: {("use_dora",): FactoredDora})

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.disable_adapters or self.merged or self.get_base_layer().bias is not None:
            return super().forward(x)
        [adapter], base = self.active_adapters, self.get_base_layer()
        A, B, s = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
        m, norm = self.lora_magnitude_vector[adapter].weight, self.row_norm(adapter)
        return Product.apply(x.flatten(0, -2), base.weight, A, B, m, norm, s).unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def row_norm(self, adapter: str) -> Tensor:
        """Norm of each row of W + s B A, float32 (out,)."""
        weight, s = self.get_base_layer().weight, self.scaling[adapter]
        W, A, B = weight.float(), self.lora_A[adapter].weight.float(), self.lora_B[adapter].weight.float()
        which = weight.data_ptr(), weight._version, weight.dtype
        if self._squares[0] != which:
            self._squares = which, W.square().sum(1)
        cross = torch.addmm(B @ (A @ A.T), W, A.T, beta=s * s, alpha=2 * s)  # (out, rank)
        return cross.mul_(B).sum(1).add_(self._squares[1]).sqrt_()
