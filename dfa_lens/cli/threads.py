"""How many threads compute, and how they wait: by the size of the work, unless the user has said so.

Threads of a tiny model wait for each other longer than they compute. Worse, they wait spinning: beside other busy
processes two threads took ten times as long as one. The library itself leaves all this alone.
"""

from __future__ import annotations

import os
import sys
from typing import Any

#: Models of fewer parameters than this compute with one thread.
SMALL = 20_000_000
#: What the user may have set: then nothing is changed.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def before_torch() -> None:
    """Let waiting threads sleep; has an effect only before torch is imported."""
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def for_model(model: Any) -> None:
    """One thread, if this model and all that were loaded before it are small and on a CPU."""
    parameters = list(model.parameters())
    LOADED.append(sum(parameter.numel() for parameter in parameters))
    if all(parameter.device.type == "cpu" for parameter in parameters):
        _choose(sum(LOADED))


def for_shipped() -> None:
    """One thread, for the models that ship with the package."""
    _choose(sum(LOADED))


#: Parameters of the models that were loaded.
LOADED: list[int] = []


def _choose(n_parameters: int) -> None:
    if n_parameters < SMALL and not any(name in os.environ for name in THREADS):
        import torch

        torch.set_num_threads(1)
