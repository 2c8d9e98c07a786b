"""The exact log-likelihood of an action chunk under a flow-matching policy.

Stage 07 compares the surrogate with it; stage 03 trains on it with `surrogate: exact`.

The policy's velocity field turns noise into a chunk along dx/dt = v(x, t, o), from t = 1 (noise) to t = 0
(chunk). Followed the other way, from the chunk to the noise that it came from, the field gives the chunk's
density (Chen et al., arXiv 1806.07366, Eq. 8):

    log p(a | o) = log N(x_1; 0, I) + integral over t from 0 to 1 of tr(dv/dx)(x_t, t, o) dt,    x_0 = a.

The policy does not act by this flow but by its Euler map of 10 steps, x - v / 10. That map has a density of
its own, which is known along the noise that a chunk was made from (`euler_sample`).

A velocity is a function of x (N, H, D) and a time t (), common to all rows, to (N, H, D);
`velocity_of(policy, prefix)` makes one of a policy. Densities are over all H x D dimensions as flowed, 10 x 7
for the tiny policy. Where a published checkpoint pads its actions to 32 dimensions, the density is that of
the padded chunk. All is computed in the chunk's precision.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (N, H, D), t () -> (N, H, D)
# velocity, x, t -> v (N, H, D), tr dv/dx (N,)
Divergence = Callable[[Velocity, Tensor, Tensor], tuple[Tensor, Tensor]]


def velocity_of(policy, prefix) -> Velocity:
    return lambda x, t: policy.velocity(prefix, x, t[None])


# -------------------------------------------------------------------------------------------------- the trace
def jacobian(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """v (N, H, D) and dv/dx (N, H D, H D), without gradients.

    One vector-Jacobian product for each of the H D outputs, all in one batch.
    """
    n, h, d = x.shape
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused kernels have one derivative
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        outputs = torch.eye(h * d, dtype=v.dtype, device=v.device).view(h * d, 1, h, d).expand(-1, n, -1, -1)
        (rows,) = torch.autograd.grad(v, x, outputs, is_grads_batched=True)  # (H D, N, H, D)
    return v.detach(), rows.flatten(2).transpose(0, 1)


def exact_trace(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    v, j = jacobian(velocity, x, t)
    return v, j.diagonal(dim1=1, dim2=2).sum(1)


def hutchinson(probes: Tensor) -> Divergence:
    """tr dv/dx = E[z' (dv/dx) z] over probes z with unit covariance: the mean over P fixed ones for each row.

    probes: (N, P, H, D).  The result can be differentiated where gradients are on.
    """
    each = probes.unbind(1)

    def divergence(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        training = torch.is_grad_enabled()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x = x if x.requires_grad else x.detach().requires_grad_()
            v = velocity(x, t)
            products = [  # z' dv/dx
                torch.autograd.grad(v, x, z, create_graph=training, retain_graph=True)[0] for z in each
            ]
            trace = sum((p * z).flatten(1).sum(1) for p, z in zip(products, each, strict=True)) / len(each)
        return (v, trace) if training else (v.detach(), trace.detach())

    return divergence


def make_probes(batch: int, n: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    # n Rademacher probes for each row (batch, n, H, D): independent entries, with the least variance
    return torch.randint(0, 2, (batch, n, *shape), generator=generator).float() * 2 - 1


# ---------------------------------------------------------------------------------------------------- the ODE
def log_normal(x: Tensor) -> Tensor:  # log N(x; 0, I) of x (N, H, D): (N,)
    return -0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def time_grid(steps: int) -> Tensor:
    """steps + 1 times from 0 to 1, (i / steps)^2: dense near the chunk, where v changes fastest.

    On an early policy ten midpoint steps of this grid err by 0.5 nats, five by 2.0 (results/validate); on
    another policy ten equal steps erred by 10 (docs/notes.md).
    """
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2


def ode_log_prob(
    velocity: Velocity,
    chunk: Tensor,
    divergence: Divergence,
    times: Tensor,
    solver: str = "midpoint",
    **options,
):
    """log p (N,) of chunks (N, H, D) under the flow, by a solver of torchdiffeq.

    times: from 0 to 1, the steps of a fixed-step solver. An adaptive one ("dopri5", rtol=, atol=) picks its
    own, for all rows together.
    """
    from torchdiffeq import odeint

    x, integral = odeint(
        lambda t, state: divergence(velocity, state[0], t),  # the rates of x and of the integral
        (chunk, chunk.new_zeros(len(chunk))),
        times.to(chunk),
        method=solver,
        **options,
    )
    return log_normal(x[-1]) + integral[-1]


def pair_log_probs(policy, prefix, chosen: Tensor, rejected: Tensor, probes: Tensor | None, steps: int):
    """log p (B,), (B,) of both chunks (B, H, 7) of each pair, behind B prefixes.

    probes: Hutchinson's (B, P, H, D), the same for both chunks; None: the exact trace, without gradients.
    """
    b = len(chosen)
    prefix = prefix.select(torch.arange(b).repeat(2))
    chunks = policy.pad(torch.cat([chosen, rejected])).to(prefix.keys.device)
    trace = exact_trace if probes is None else hutchinson(probes.repeat(2, 1, 1, 1).to(chunks))
    scores = ode_log_prob(velocity_of(policy, prefix), chunks, trace, time_grid(steps)).float()
    return scores[:b], scores[b:]


# ---------------------------------------------------------------------------------------------- the Euler map
def euler_sample(velocity: Velocity, noise: Tensor, steps: int = 10) -> tuple[Tensor, Tensor]:
    """How a policy acts: noise (N, H, D) -> chunk, and log p (N,) of the chunk under that map.

    The map is x <- x - v(x, t) / steps for t = 1, 1 - 1 / steps, ..., 1 / steps, so

        log p(a) = log N(x_1; 0, I) - sum over steps of log |det(I - (dv/dx)(x_t, t) / steps)|

    Where the map folds, other noise leads to the same chunk, and this value is a lower bound.
    """
    x, log_p = noise, log_normal(noise)
    eye = torch.eye(noise[0].numel(), dtype=noise.dtype, device=noise.device)
    for i in range(steps, 0, -1):
        v, j = jacobian(velocity, x, noise.new_tensor(i / steps))
        x, log_p = x - v / steps, log_p - torch.linalg.slogdet(eye - j / steps).logabsdet
    return x, log_p
