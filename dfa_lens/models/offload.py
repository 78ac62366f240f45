"""Models that do not fit: weights that accelerate brings when they are used, and blocks that autograd runs again.

With gradients a block's weights and activations are kept until the pass has gone backward. Of offloaded weights that
would be the whole model on the device that has no room for it, so there every block is checkpointed: only what goes
into it is kept, and it is run once more, its weights brought again, when its gradient is due.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dfa_lens.models import private


def offloaded(model: Any) -> bool:
    """Whether accelerate keeps some of the weights elsewhere, and brings them when their module runs."""
    elsewhere = any(parameter.device.type == "meta" for parameter in model.parameters())
    return elsewhere and private.execution_device(model) is not None


def brought(module: Any) -> AbstractContextManager[None]:
    """A module with its own weights where they are used, for the length of the context, if they are offloaded."""
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    return align_module_device(module) if hasattr(module, "_hf_hook") else nullcontext()


def checkpointed(function: Callable[..., Any], again: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    """A function of which autograd keeps the arguments only, and which runs once more on the way backward.

    Parameters
    ----------
    function:
        Without random numbers, and the same each time.
    again:
        What the second run is made in: hooks of the first, which may be gone by then.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        # to the function's end, also the second time: accelerate takes weights away when their module has run
        with set_checkpoint_early_stop(False):
            return checkpoint(
                function,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again()),
                **kwargs,
            )

    return run
