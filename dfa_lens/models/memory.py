"""How many examples go through a model at a time: a number, or what fits into memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

from dfa_lens.errors import DfaError
from dfa_lens.models import private
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.runner import Runner
from dfa_lens.nodes import NodeSet
from dfa_lens.prompts import PromptPairs

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]
"""Examples a pass, or "auto": what fits into free memory; halved, with a line in the log, when it did not."""

#: "auto" takes no more than this: larger batches are not faster.
MOST = {"cpu": 64, "cuda": 512}
#: ... and leaves a part of the free memory for what can't be foreseen (fragments, work space of the libraries).
USABLE = 0.7

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
        What of :func:`~dfa_lens.planning.estimate` tells its memory.
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
    from dfa_lens.planning import estimate  # it knows all operations, this one among them

    one, two = (estimate(model, pairs, nodes, batch_size=n, **options)[operation].peak_bytes for n in (1, 2))
    device = Runner(model).device
    per_example = max(two - one, 1)
    room = int((USABLE * free_bytes(device) - (one - per_example)) / per_example)
    most = max(1, min(room, len(pairs), MOST.get(device.type, MOST["cuda"])))
    size = 1 << (most.bit_length() - 1)
    logger.info("%s: %d examples a pass (%.0f MiB each)", operation, size, per_example / 2**20)
    return size


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, what torch holds unused included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
