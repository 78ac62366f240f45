"""The gate that every function which runs a model goes through: what is a model, and in which state torch is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from dfa_lens.errors import ModelError
from dfa_lens.models import kept, private
from dfa_lens.models.backend.lens import BridgeBackend, HookedBackend
from dfa_lens.models.backend.plain import PlainBackend, PlainModel
from dfa_lens.models.backend.protocol import Backend, CausalModel

Function = TypeVar("Function", bound=Callable[..., Any])

_USE_ONE = (
    "pass a TransformerLens HookedTransformer or TransformerBridge, or a Hugging Face causal language model "
    "(dfa.load_model makes each)"
)


def backend_of(model: Any) -> Backend:
    """The backend of a model, which has passed :func:`usable`."""
    if isinstance(model, PlainModel):
        return PlainBackend(model)
    return BridgeBackend(model) if is_bridge(model) else HookedBackend(model)


def is_bridge(model: Any) -> bool:
    """Whether the model is a TransformerBridge (told by its class name: no TransformerLens import needed)."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)


def usable(model: Any) -> Any:
    """What an operation runs: the model itself, or the one in what is wrapped round it; or an error, before any work.

    Of a ``torch.compile`` the model as it was before (its graph knows nothing of hooks); of a PEFT model the model that
    its adapters are in; and a Hugging Face model under TransformerLens's names.

    Raises
    ------
    ModelError
        If it is no HookedTransformer, TransformerBridge or Hugging Face causal language model, one without weights or
        with weights that were made in inference mode, an encoder, compiled in place, or packed by bitsandbytes.
    """
    if type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    kind = type(model).__name__
    if model is None or isinstance(model, str):
        raise ModelError(f"A model is needed, not {model!r}: {_USE_ONE}.")
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        raise ModelError(f"A {kind} can't be hooked as one model: pass the model inside it, model.module.")
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = _in_adapters(model)
    lens = isinstance(model, torch.nn.Module) and hasattr(model, "hook_dict") and hasattr(model, "cfg")
    plain = isinstance(model, PlainModel) or (isinstance(model, torch.nn.Module) and isinstance(model, CausalModel))
    if not lens and not plain:
        raise ModelError(f"A {kind} can't be hooked: {_USE_ONE}.")
    if _encodes(model) or (lens and not isinstance(getattr(model, "blocks", None), torch.nn.ModuleList)):
        raise ModelError(f"This {kind} is no decoder-only language model: {_USE_ONE}.")
    weights = list(model.parameters())
    if not weights:
        raise ModelError(f"This {kind} has no weights.")
    if weights[0].device.type == "meta" and private.execution_device(model) is None:
        raise ModelError(f"The weights of this {kind} are on the meta device: load them before running it.")
    if any(parameter.is_inference() for parameter in weights):
        raise ModelError(
            f"The weights of this {kind} were made inside torch.inference_mode(), so nothing can be differentiated "
            "through it: load the model outside."
        )
    if private.compiled(model):
        raise ModelError(f"This {kind} was compiled in place: its graph knows no hooks. Load it anew.")
    if private.packed(model):
        raise ModelError(
            f"The four-bit weights of this {kind} were packed when bitsandbytes ran it on this CPU without gradients: "
            "their scales were rounded, and no gradient goes through them. Load the model anew, and pass it before it "
            "has run."
        )
    return model if lens or isinstance(model, PlainModel) else PlainModel(model, getattr(model, "tokenizer", None))


def _in_adapters(model: Any) -> Any:
    """The model that PEFT's adapters are in; they stay live."""
    configs = model.peft_config.values() if isinstance(model.peft_config, dict) else ()
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        raise ModelError(
            "This PEFT model puts learned tokens before every prompt, which would shift every position: only adapters "
            "inside the model (LoRA and the like) can be looked at."
        )
    return model.get_base_model()


def _encodes(model: Any) -> bool:
    names = {cls.__name__ for cls in type(model).__mro__}
    configs = (getattr(each, "config", None) for each in (model, getattr(model, "original_model", None)))
    return bool(names & {"HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"}) or any(
        getattr(config, "is_encoder_decoder", False) for config in configs
    )


@contextmanager
def neutral(device: torch.device) -> Iterator[None]:
    """torch as it is by default, whatever the caller has around: no inference mode, no autocast, gradients.

    Only what is otherwise is changed: a mode that is entered has a way back, which an interrupt can put off.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in sorted({"cpu", device.type} - {"meta"}):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        yield


def runs(*models: str) -> Callable[[Function], Function]:
    """The gate of every function that runs models: what its arguments ``models`` name must be usable.

    The function is called with torch's modes as they are by default, and with the model inside what is wrapped round it
    (:func:`usable`). Whatever ends it, an interrupt at any time among it, the models are as they were before.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            for name in models:
                bound.arguments[name] = usable(bound.arguments[name])
            own = [bound.arguments[name] for name in models]
            first, second = kept.locks(own)
            with first, second:
                before = kept.Kept(*own)
                try:
                    try:
                        for module in (each for model in own for each in private.packing(model)):
                            private.put_packing(module, False)
                        with neutral(backend_of(own[0]).device):
                            return function(*bound.args, **bound.kwargs)
                    finally:
                        before.restore()
                finally:
                    before.restore(last=True)

        return call  # type: ignore[return-value]

    return decorate
