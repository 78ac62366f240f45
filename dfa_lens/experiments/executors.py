"""Where workers run: what a study asks of an executor, and the processes that it takes by default.

Those end with the one that started them, at once and in whatever way that ends.

Importing this module imports no torch: a worker watches its parent from its first moments.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from dfa_lens.errors import DfaError, short

if TYPE_CHECKING:
    from dfa_lens.experiments.config import Resources

Given = TypeVar("Given")
Made = TypeVar("Made")


@runtime_checkable
class Executor(Protocol):
    """The part of :class:`concurrent.futures.Executor` that a study needs.

    ``submit`` gives something with ``done()`` and ``result()``, and ``cancel()`` where there is one: what
    :class:`concurrent.futures.ProcessPoolExecutor`, submitit's executors and ``dask.distributed``'s
    ``client.get_executor()`` give.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102


class Here:
    """An executor that does everything at once, in this thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call it."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def processes(
    workers: int, threads: int | None = None, begin: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Processes of this machine, each with its share of the processor's cores, or with fewer ``threads``.

    Each calls ``begin`` first.

    An error or an interrupt ends all of them at once, also what they are doing. They ignore Ctrl-C, which the terminal
    sends to all of a group: this process decides.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads, as torch has them, may hang
    # nobody ever writes: that the other end is gone is the message
    here, there = context.Pipe(duplex=False)
    share = max(1, (os.cpu_count() or 1) // workers)
    threads = share if threads is None else min(threads, share)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(here, threads, begin))
    try:
        yield pool
        pool.shutdown()
    finally:
        there.close()
        pool.shutdown(wait=True, cancel_futures=True)
        here.close()


def each(work: Callable[[Given], Made], items: Sequence[Given], workers: int) -> Generator[Made, None, None]:
    """What ``work``, a function at module level, makes of every item, in the order in which it is done.

    Raises
    ------
    DfaError
        If a process was killed from outside.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    try:
        with processes(min(workers, len(items))) as pool:
            for done in as_completed([pool.submit(work, item) for item in items]):
                yield done.result()
    except BrokenExecutor as error:
        raise DfaError(
            "A process was killed (is memory short?). What it had finished is kept: run the same again."
        ) from error


def _begin(parent: Any, threads: int, more: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    if more is not None:
        more()


def _end_with(parent: Connection) -> None:
    with suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def jobs(resources: Resources, folder: Path, memory: float, minutes: float, device: str = "cpu") -> Executor:
    """Submitit's executor.

    Parameters
    ----------
    folder:
        Of its logs.
    memory, minutes:
        What is asked for where the resources do not say.
    device:
        Of the study.

    Raises
    ------
    DfaError
        If submitit is missing, or SLURM.
    """
    try:
        import submitit
    except ImportError:
        raise DfaError("Jobs need submitit: pip install 'dfa-lens[cluster]'.") from None
    if resources.kind == "slurm" and shutil.which("sbatch") is None:
        raise DfaError('There is no SLURM on this machine (no sbatch): take kind = "local", or another machine.')
    executor = submitit.AutoExecutor(folder, cluster=resources.kind)
    asked: dict[str, Any] = {
        "timeout_min": math.ceil(resources.time or minutes),
        "mem_gb": math.ceil(resources.memory or memory),
        "cpus_per_task": resources.cpus,
        "gpus_per_node": int(device.startswith("cuda")) if resources.gpus is None else resources.gpus,
    }
    try:
        executor.update_parameters(**asked, **resources.options)
    except (NameError, TypeError, ValueError) as error:  # submitit's own, for what it does not know
        raise DfaError(f"submitit refuses the executor's options: {short(' '.join(str(error).split()))}") from error
    return executor
