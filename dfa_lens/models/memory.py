"""How many examples go through a model at a time: a number, or what fits into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch

from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import DfaError
from dfa_lens.models import private
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.runner import Runner

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]
"""Examples a pass, or "auto": what fits into free memory; halved, with a line in the log, when it did not."""

#: "auto" takes no more than this: larger batches are not faster.
MOST = {"cpu": 64, "cuda": 512}
#: ... and leaves a part of the free memory for what can't be foreseen (fragments, work space of the libraries).
USABLE = 0.7

#: Where Linux says which control groups a process is in, and what they are allowed.
CGROUPS_OF_PROCESS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: Their files with the limit and with what is used of it, and the entry of memory.stat with the file cache in that.
CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

Result = TypeVar("Result")


def run(
    work: Callable[[int], Result],
    batch_size: BatchSize,
    model: HookedModel,
    pairs: PromptPairs,
    nodes: NodeSet,
    operation: str,
    **options: Any,
) -> Result:
    """``work`` with that batch size; for "auto", with half as much after an out-of-memory error, down to 1.

    Parameters
    ----------
    operation, options:
        What of :func:`~dfa_lens.models.estimate.estimate` tells its memory.
    """
    if batch_size != "auto":
        if isinstance(batch_size, str) or batch_size < 1:
            raise DfaError(f"batch_size must be a number of at least 1, or 'auto', not {batch_size!r}.")
        return work(batch_size)
    size = fitting(model, pairs, nodes, operation, **options)
    while True:
        try:
            return work(size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not private.out_of_memory(error) or size == 1:
                raise
            logger.warning("%s does not fit into memory with %d examples a pass: %d now", operation, size, size // 2)
            size //= 2
        if torch.cuda.is_available():  # outside the except: the error's traceback holds tensors
            torch.cuda.empty_cache()


def fitting(model: HookedModel, pairs: PromptPairs, nodes: NodeSet, operation: str, **options: Any) -> int:
    """The largest power of two whose estimated memory is free: at least 1, at most the number of pairs."""
    from dfa_lens.models.estimate import estimate  # it knows all operations, this one among them

    one, two = (estimate(model, pairs, nodes, batch_size=n, **options)[operation].peak_bytes for n in (1, 2))
    device = Runner(model).device
    per_example = max(two - one, 1)
    room = int((USABLE * free_bytes(device) - (one - per_example)) / per_example)
    most = max(1, min(room, len(pairs), MOST.get(device.type, MOST["cuda"])))
    size = 1 << (most.bit_length() - 1)
    logger.info("%s: %d examples a pass (%.0f MiB each)", operation, size, per_example / 2**20)
    return size


def free_bytes(device: torch.device) -> int:
    """Memory that a device still has for us, in bytes.

    On a GPU with what torch holds unused. Elsewhere what the system can give without swapping (file cache that it
    would drop included), or less where a control group allows less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return max(0, min((psutil.virtual_memory().available, *_left_by_control_groups())))


def _left_by_control_groups() -> Iterator[int]:
    """Bytes that each control group of this process leaves it: its own (a container, a cluster's job) and those above.

    Nothing where there are none (macOS, Windows) or none has a limit.
    """
    try:
        lines = CGROUPS_OF_PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)  # "0::/job" in version 2, "4:memory:/job" in version 1
        if not controllers:
            root, files = CGROUPS, CGROUP_V2
        elif "memory" in controllers.split(","):
            root, files = CGROUPS / "memory", CGROUP_V1
        else:
            continue
        own = root / name.lstrip("/")
        for folder in (own, *own.parents):  # within a container the name may be the host's: then only the root is there
            yield from _left_by(folder, *files)


def _left_by(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """A control group's limit less its use; file cache is no use, for it is dropped when memory is short."""
    try:
        allowed, in_use = (folder / limit).read_text().strip(), int((folder / used).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return
    if allowed != "max":
        yield int(allowed) - in_use + sum(int(line.split()[1]) for line in lines if line.split()[0] == cache)
