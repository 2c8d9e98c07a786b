"""Jobs in parallel processes: nothing left running, errors with their cause."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from runtime import ranks
from runtime.errors import UserError


def progress(iterable=None, **kwargs):
    """tqdm that is quiet when the output is not a terminal, and on all ranks but the first."""
    from tqdm import tqdm

    return tqdm(iterable, disable=None if ranks.first() else True, dynamic_ncols=True, **kwargs)


def run(
    function: Callable, jobs: Sequence, workers: int, title: str, count: Callable[[], int], total: int
) -> None:
    """Call `function(job)` for every job, in `workers` processes. The jobs write their own results.

    function stands at the top level of a module. It skips what an earlier run has written, so a killed stage
    goes on where it was. Torch has one thread in every process, so no result depends on the number of
    workers.
    count: how much of `total` is done; a progress bar asks it every second.
    No worker outlives this call, nor the death of this process.

    Raises:
        UserError: a job raised it, or a worker died.
        Exception: a job's own, with the worker's traceback as its cause.
    """
    bar = progress(total=total, initial=count(), desc=title)
    torch.set_num_threads(1)
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            function(job)
            bar.update(count() - bar.n)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers read it when they import numpy and torch
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), _begin_worker)
    try:
        waiting = {pool.submit(function, job) for job in jobs}
        while waiting:
            done, waiting = wait(waiting, timeout=1, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            bar.update(count() - bar.n)
        pool.shutdown()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (the system kills one where memory runs out); "
            "run the same command again, it goes on, with workers=1 if it dies again"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()


def _begin_worker() -> None:
    """A worker has one torch thread, leaves Ctrl-C to its parent, and ends when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
