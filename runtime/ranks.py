"""Several processes for one stage, started by torchrun. Without torchrun a stage is alone: size 1, rank 0.

    torchrun --nproc_per_node 2 03_dpo.py configs/tiny.yaml

A stage whose config has `processes` starts that many itself, on every machine's CPU, so results don't depend
on its cores. On a GPU it stays alone.

Training (01, 03): every rank takes its rows of the same batch and gradients are averaged, so the result
is that of one process but for rounding. (03 with surrogate=independent: each rank has draws of its own.)
Rollouts (02, 04, cells): every rank takes its share of the tasks; the result is the same. Only the first rank
opens and finishes a stage. A rank that ends too early ends the job: torchrun stops the others, and the same
command goes on. The ranks talk through gloo on CPUs and nccl on GPUs.
"""

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

# Imported before there is a group: this module keeps a group that it finds as a default argument, and gloo's
# threads would then outlive `part` and abort the process.
import torch.distributed.nn.functional

from runtime.errors import UserError, one_line, refuse

MEET, WEEK = timedelta(minutes=3), timedelta(days=7)  # how long ranks wait at their start, and later


def number(variable: str, least: int = 0, below: int = 2**16) -> int:  # that a launcher has set
    text = os.environ.get(variable, "").strip()
    refuse(
        not (text.isdecimal() and least <= int(text) < below),
        f"the environment's {variable}={text!r} is no number from {least} to {below - 1}; "
        "start them with torchrun (with device=cuda one per GPU), or unset WORLD_SIZE to run one process",
    )
    return int(text)


def size() -> int:
    return number("WORLD_SIZE", 1) if os.environ.get("WORLD_SIZE", "").strip() else 1


def rank() -> int:
    return number("RANK", 0, size()) if size() > 1 else 0  # alone: whatever a cluster has set


def first() -> bool:
    return rank() == 0


def place(device: str) -> str:
    """The device on which this process, or a worker that it started, puts its policy."""
    own = number("LOCAL_RANK", 0, torch.cuda.device_count()) if size() > 1 and device == "cuda" else 0
    return f"cuda:{own}" if device == "cuda" else device


def launch(processes: int) -> None:
    """Start this stage's other processes on this machine. This one is the first, and they end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(group, RANK="0", LOCAL_RANK="0", TORCHELASTIC_USE_AGENT_STORE="False")
    with ctrl_c_here():
        for each in map(str, range(1, processes)):
            env = os.environ | {"RANK": each, "LOCAL_RANK": each}
            atexit.register(subprocess.Popen([sys.executable, *sys.argv], env=env).kill)


@contextlib.contextmanager
def ctrl_c_here() -> Iterator[None]:  # processes started in this block never see it: this one ends them
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def meeting(remedy: str = "run the same command again, it goes on") -> Iterator[None]:
    """One line in place of a traceback when another rank does not come, or has ended while this one waits."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # of gloo and nccl alike
        raise UserError(
            f"RANK={os.environ.get('RANK')} of WORLD_SIZE={size()} lost the others, or never met them "
            f"({one_line(error)}); {remedy}"
        ) from error


@meeting("start all of them with torchrun, or unset WORLD_SIZE to run one process")
def join(device: str) -> None:
    """Connect this rank to the others, once per process. With device "cuda", each rank uses its own GPU."""
    if size() > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(place(device))
        # the others come within MEET, or not at all: a cluster may have set WORLD_SIZE for a single process
        store = next(dist.rendezvous("env://", rank(), size(), timeout=MEET))[0]
        store.set_timeout(WEEK)  # from here on: a rank's episodes may take hours longer
        dist.init_process_group("nccl" if device == "cuda" else "gloo", None, WEEK, size(), rank(), store)


@meeting()
def wait() -> None:
    if size() > 1:
        dist.barrier()


@meeting()
def told(message):
    """What the first rank says; the others' message does not matter."""
    box = [message]
    if size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def share(x):
    """This rank's part of a list or of a tensor's rows."""
    return x[rank() :: size()]


@meeting()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each rank's gradients, of the mean over its rows, by those of the mean over all rows."""
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
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(values, (total / size()).tolist(), strict=True))


def part() -> None:
    """Leave the group. A thread of gloo's that outlives Python may abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this rank early. An nccl group ends with its process: to leave it might mean to wait for the
    others.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        part()
    sys.exit(code)
