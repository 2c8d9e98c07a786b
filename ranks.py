"""Several processes for one stage, started by torchrun; alone where nothing is said of others.

    torchrun --nproc_per_node 2 03_dpo.py configs/tiny.yaml

Training (01, 03, 06): every rank takes its rows of the same batch and gradients are averaged, so the result is that of one
process but for rounding (03 with surrogate=independent: but for its draws too, each rank has its own). Rollouts (02, 04, the
cells of 05): every rank takes its share of the tasks and appends to the same file; the result is the same. Only the first rank
opens and finishes a stage. A rank that ends too early ends the job: torchrun stops the others, and the same command goes on.
gloo on CPUs, nccl on GPUs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before any group: it keeps one that it finds as a default, and part() can't end it

from disk import UserError, one_line


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def first() -> bool:
    return rank() == 0


def join(device: str) -> None:
    """Meet the others, once per process. On "cuda" every rank has a GPU of its own."""
    if size() > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # a rank's share of episodes may take hours longer than another's
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=7))


def place(device: str) -> str:
    """Where this process, or a worker that it started, puts its policy."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """What the ranks do together; one line in place of a traceback when another one has ended."""
    try:
        yield
    except RuntimeError as error:  # of gloo and nccl alike
        said = f"rank {rank()} of {size()} lost another one, see what that one said ({one_line(error)})"
        raise UserError(f"{said}; run the same command again, it goes on") from error


@meeting()
def wait() -> None:
    if size() > 1:
        dist.barrier()


def share(x):
    """This rank's part of a list or of a tensor's rows."""
    return x[rank() :: size()]


@meeting()
def told(message: str) -> str:
    """What the first rank says."""
    box = [message]
    if size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


@meeting()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Gradients of the mean over all rows, given that each rank has those of the mean over as many."""
    if size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten().float() for g in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad) / size())


@meeting()
def mean(values: dict[str, float]) -> dict[str, float]:
    """Numbers averaged over the ranks."""
    if size() == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return dict(zip(values, (total / size()).tolist(), strict=True))


def part() -> None:
    """The end of what ranks do together, and of gloo's threads: one that outlives Python may abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End a rank early; what there is to say has been said, by this one or the first. (nccl's group ends with the process: to
    part from others who are at work might wait for them.)"""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        part()
    sys.exit(code)
