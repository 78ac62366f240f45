"""Processes that end with the one that started them, at once and in whatever way that ends.

Importing this module imports no torch: a worker watches its parent from its first moments.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from dfa_lens.errors import DfaError

Given = TypeVar("Given")
Made = TypeVar("Made")


def each(work: Callable[[Given], Made], items: Sequence[Given], workers: int) -> Generator[Made, None, None]:
    """What ``work`` makes of every item, in the order in which it is done.

    Parameters
    ----------
    work:
        A function at module level.
    workers:
        Processes, each with its share of the processor's cores; with one there is no process but this.

    Raises
    ------
    DfaError
        If a process was killed from outside.

    Notes
    -----
    An error or an interrupt ends all workers at once, also what they are doing; what is queued is not begun. Workers
    ignore Ctrl-C, which the terminal sends to all of a group: this process decides.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    try:
        with _pool(min(workers, len(items))) as pool:
            for done in as_completed([pool.submit(work, item) for item in items]):
                yield done.result()
    except BrokenProcessPool as error:
        raise DfaError(
            "A process of the study was killed (is memory short?). What it had finished is kept: run the study again."
        ) from error


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads, as torch has them, may hang
    # nobody ever writes: that the other end is gone is the message
    here, there = context.Pipe(duplex=False)
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(here, threads))
    try:
        yield pool
        pool.shutdown()
    finally:
        there.close()
        pool.shutdown(wait=True, cancel_futures=True)
        here.close()


def _begin(parent: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _end_with(parent: Connection) -> None:
    with suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)
