"""Jobs in parallel processes: nothing left running, errors with their cause."""

import contextlib
import io
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import UserError, ranks

LINE_S = 60  # seconds between two lines where there is no terminal


class Line(tqdm):  # for output that is no terminal: it prints each update as a new line
    def display(self, msg=None, pos=None) -> None:
        print(self, flush=True)


def progress(iterable=None, **kwargs):
    """tqdm on the first rank: a bar on a terminal, and elsewhere a line a minute."""
    if sys.stdout and sys.stdout.isatty() and sys.stderr.isatty():
        return tqdm(iterable, disable=not ranks.first(), dynamic_ncols=True, **kwargs)
    text = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left, {rate_fmt}{postfix}"
    kwargs |= {"file": io.StringIO(), "mininterval": LINE_S, "miniters": 0, "delay": LINE_S}
    return Line(iterable, disable=not ranks.first(), bar_format=text, **kwargs)


def run(
    function: Callable,
    jobs: Sequence,
    workers: int,
    title: str,
    count: Callable[[], int],
    total: int,
    note: Callable[[], str] = str,
) -> None:
    """Call `function(job)` for every job, in `workers` processes. The jobs write their own results.

    function stands at the top level of a module. It, or the caller, skips what an earlier run has written, so
    a killed stage goes on where it was. Torch has one thread in every process, so no result depends on the
    number of workers.
    count: how much of `total` is done, asked every second.  note: text beside the bar.
    No worker outlives this call, nor the death of this process.

    Raises:
        UserError: a job raised it, or a worker died.
        Exception: a job's own, with the worker's traceback as its cause.
    """
    torch.set_num_threads(1)
    bar, over = progress(total=total, initial=count(), desc=title), threading.Event()

    def watch() -> None:  # in a thread of its own: a job may take minutes
        while not over.wait(1):
            with contextlib.suppress(UserError):  # of a damaged file: the stage comes upon it too
                bar.set_postfix_str(note(), refresh=False)
                bar.update(count() - bar.n)

    threading.Thread(target=watch, daemon=True).start()
    try:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                function(job)
        else:
            run_in_processes(function, jobs, workers)
        bar.update(count() - bar.n)
    finally:
        over.set()
        bar.close()


def run_missing(function: Callable, jobs: dict[Path, object], workers: int, title: str) -> None:
    """`run` for jobs that write one file each, given by that file. A job whose file is there is done."""
    missing = [job for path, job in jobs.items() if not path.is_file()]
    run(function, missing, workers, title, lambda: sum(map(Path.is_file, jobs)), len(jobs))


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
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        # waits for the pool's thread, which else fails now and then at exit
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """A worker has one torch thread, and ends when its parent ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
