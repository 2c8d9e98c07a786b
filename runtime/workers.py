"""Jobs in parallel processes: nothing left running, errors with their cause."""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from runtime import ranks
from runtime.errors import UserError

LINE_S = 60  # seconds between two lines where there is no terminal


class Lines:
    """What tqdm writes a bar to where there is no terminal: each state of it becomes a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), flush=True)

    def flush(self) -> None:
        """Nothing is kept."""


def progress(iterable=None, **kwargs):
    """tqdm on the first rank: a bar on a terminal, and elsewhere a line a minute."""
    from tqdm import tqdm

    if not (sys.stdout and sys.stdout.isatty() and sys.stderr.isatty()):
        text = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left, {rate_fmt}{postfix}"
        kwargs |= {"file": Lines(), "mininterval": LINE_S, "miniters": 0, "delay": LINE_S, "bar_format": text}
    return tqdm(iterable, disable=not ranks.first(), dynamic_ncols=True, **kwargs)


@contextlib.contextmanager
def watched(title: str, count: Callable[[], int], total: int, figure: Callable[[], str]) -> Iterator[None]:
    """Show every second how far the block is, from a thread: a job may take minutes."""
    bar, over = progress(total=total, initial=count(), desc=title), threading.Event()

    def watch() -> None:
        while not over.wait(1):
            with contextlib.suppress(UserError):  # it comes up again when the block ends
                bar.set_postfix_str(figure(), refresh=False)
                bar.update(count() - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.update(count() - bar.n)
        bar.close()


def run(
    function: Callable,
    jobs: Sequence,
    workers: int,
    title: str,
    count: Callable[[], int],
    total: int,
    figure: Callable[[], str] = str,
) -> None:
    """Call `function(job)` for every job, in `workers` processes. The jobs write their own results.

    function stands at the top level of a module. It skips what an earlier run has written, so a killed stage
    goes on where it was. Torch has one thread in every process, so no result depends on the number of
    workers.
    count: how much of `total` is done; it is asked every second.  figure: what else matters so far, in words.
    No worker outlives this call, nor the death of this process.

    Raises:
        UserError: a job raised it, or a worker died.
        Exception: a job's own, with the worker's traceback as its cause.
    """
    torch.set_num_threads(1)
    with watched(title, count, total, figure):
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                function(job)
        else:
            run_in_processes(function, jobs, workers)


def run_in_processes(function: Callable, jobs: Sequence, workers: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers read it when they import numpy and torch
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), _begin_worker)
    try:
        with ranks.ctrl_c_here():
            waiting = {pool.submit(function, job) for job in jobs}
        for future in wait(waiting, return_when=FIRST_EXCEPTION).done:
            future.result()
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
    """A worker has one torch thread, and ends when its parent ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
