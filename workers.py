"""Jobs in parallel processes: results as they are made, errors with their cause, nothing left running."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

import torch

from common import UserError


def parallel(fn, jobs: list, workers: int) -> Iterator[tuple[int, object]]:
    """Run `fn(job)`, a generator function at the top level of a file, for every job; yield (job index, item) as items are made.

    One worker runs here, more run in `spawn`ed processes with one job at a time each. Torch has one thread everywhere, so that
    an item does not depend on the number of workers. Items of one job keep their order, those of several interleave.
    No process outlives this generator, nor the death of this process.

    Raises:
        UserError: raised in a job, or a worker that died; this names the job.
        RuntimeError: any other exception of a job, with the child's traceback.
    """
    if workers < 1:
        raise UserError(f"workers must be 1 or more, not {workers}")
    if workers == 1 or len(jobs) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from ((index, item) for index, job in enumerate(jobs) for item in fn(job))
        finally:
            torch.set_num_threads(threads)
        return
    context, todo = multiprocessing.get_context("spawn"), iter(enumerate(jobs))
    busy, processes = {}, []  # busy: connection -> (job index, process)
    where = fn.__module__, os.path.abspath(sys.modules[fn.__module__].__file__), fn.__qualname__
    os.environ["OMP_NUM_THREADS"] = "1"  # for the children: read when numpy and torch are imported

    def next_job(connection, process) -> None:
        index, job = next(todo, (None, None))
        busy.pop(connection, None)
        if index is None:
            connection.close()  # the worker reads the end of its work, and cleans up
            return
        busy[connection] = index, process
        with contextlib.suppress(ConnectionError):  # a dead worker, noticed at recv
            connection.send(job)

    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_worker, args=(where, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            next_job(ours, processes[-1])
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                index, process = busy[connection]
                name = f"job {index} of {len(jobs)} ({repr(jobs[index])[:200]})"
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    died = f"{name} died with its worker process (exit code {process.exitcode}, -9 where memory runs out)"
                    raise UserError(
                        f"{died}; run the same command again, it goes on, with workers=1 if it happens again"
                    ) from None
                if kind == "item":
                    yield index, value
                elif kind == "done":
                    next_job(connection, process)
                elif kind == "user error":
                    raise UserError(value)
                else:
                    raise RuntimeError(f"{name} failed:\n{value}")
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _worker(where: tuple[str, str, str], connection) -> None:
    """A child's life: jobs in, ("item", x) ... ("done", None) out. It ends when the parent does, whatever it is doing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops us
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    try:
        module, file, name = where
        if module not in sys.modules:  # a file of any name; spawn has imported the parent's own script, as __main__
            spec = importlib.util.spec_from_file_location(module, file)
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        fn = getattr(sys.modules[module], name)
        while True:
            for item in fn(connection.recv()):
                connection.send(("item", item))
            connection.send(("done", None))
    except UserError as error:
        connection.send(("user error", str(error)))
    except EOFError:
        return  # the parent needs no more
    except Exception:
        connection.send(("error", traceback.format_exc()))
