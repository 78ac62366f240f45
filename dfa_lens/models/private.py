"""Every reach into what other libraries keep to themselves, and nothing else.

Each function says why it is needed and in which releases it was seen to hold; tests/test_private.py has one test for
each, so that a release that moves something is found by its name and not by wrong numbers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dfa_lens.errors import HookError

# --- torch ---------------------------------------------------------------------------------------------------------


def nobody_else_holds(parameter: torch.nn.Parameter) -> bool:
    """Whether no view of a parameter's memory is about, which re-laying the parameter would cut off from it.

    torch counts the users of a storage, but offers the count to Python under a private name only (2.6 to 2.14).
    """
    return parameter.is_contiguous() and not parameter.is_shared() and users_of(parameter) <= 2


def users_of(tensor: Tensor) -> float:
    """How many tensors and storages share a tensor's memory, one that is made here included (torch 2.6 to 2.14)."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = tensor.untyped_storage()
    return float("inf") if count is None else count(storage._cdata)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says, on a GPU or on a CPU (torch 2.6 to 2.14: on a CPU only the text tells)."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text


def foreign_hook(model: Any) -> str | None:
    """Where somebody else's torch hook or replaced ``forward`` sits on a model, or None.

    torch lists a module's hooks under private names only (2.6 to 2.14). Hooks that TransformerLens, transformers,
    accelerate and torch itself put on (for norms of GPT-2, offloading, parametrisations) are part of the model.
    """
    lists = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for kind in lists:
        if any(_is_foreign(hook) for hook in getattr(torch.nn.modules.module, f"_global{kind}").values()):
            return "every module (a global torch hook)"
    for name, module in model.named_modules():
        own = vars(module)
        for kind in lists:
            hooks = own.get(kind)
            if hooks and any(_is_foreign(hook) for hook in hooks.values()):
                return f"module {name!r}"
        # accelerate keeps the forward that it replaced beside its own
        if "forward" in own and "_old_forward" not in own and _is_foreign(own["forward"]):
            return f"the replaced forward of module {name!r}"
    return None


_KNOWN = ("transformer_lens.", "transformers.", "accelerate.", "torch.", "dfa_lens.")


def _is_foreign(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    home = getattr(function, "__module__", None) or type(function).__module__
    return not f"{home}.".startswith(_KNOWN)


def compiled(model: Any) -> bool:
    """Whether ``module.compile()`` was called on the model or a part of it (torch 2.6 to 2.14: a private field)."""
    return any(vars(module).get("_compiled_call_impl") is not None for module in model.modules())


@contextmanager
def replaced_forward(module: Any, function: Any) -> Iterator[None]:
    """Another ``forward`` for one module, for the length of the context.

    Set in the module's dictionary: a bridge hands ``setattr`` on to the module that it wraps (TransformerLens 3.9,
    4.3), and accelerate may have put a ``forward`` of its own there, which comes back afterwards.
    """
    before = vars(module).get("forward")
    try:
        put_forward(module, function)
        yield
    finally:
        put_forward(module, before)


def put_forward(module: Any, function: Any) -> None:
    """Make ``function`` a module's own ``forward``, or (None) let it have that of its class."""
    own = vars(module)
    if function is None:
        own.pop("forward", None)
    elif own.get("forward") is not function:
        own["forward"] = function


def execution_device(model: Any) -> torch.device | None:
    """Where accelerate brings offloaded weights to be used (accelerate 1.x: a hook in a private field), or None."""
    for module in model.modules():
        where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if where is not None:
            return torch.device(where)
    return None


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def packing(model: Any) -> list[Any]:
    """The four-bit modules that would pack their weights at the next pass without gradients.

    On CPUs with AVX512-BF16, bitsandbytes (0.50) lays weights out anew in such a pass, for good: their scales are
    rounded to bfloat16, and there is no gradient through them from then on. A module's field says whether it may.
    """
    return [module for module in model.modules() if vars(module).get(_MAY_PACK)]


def put_packing(module: Any, may: bool) -> None:
    """Let a four-bit module pack its weights, or not."""
    vars(module)[_MAY_PACK] = may


@contextmanager
def unpacked(model: Any) -> Iterator[None]:
    """Four-bit weights stay as they are in passes inside the context."""
    modules = packing(model)
    try:
        for module in modules:
            put_packing(module, False)
        yield
    finally:
        for module in modules:
            put_packing(module, True)


def packed(model: Any) -> bool:
    """Whether some four-bit weights have been packed."""
    modules = (module for module in model.modules() if _MAY_PACK in vars(module))
    states = (getattr(module.weight, "quant_state", None) for module in modules)
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


_MAY_PACK = "support_avx512bf16_for_cpu"


# --- TransformerLens -----------------------------------------------------------------------------------------------


def hooked(module: Any) -> list[Any]:
    """The functions on a hook point, or on a module of a model without hook points.

    ``HookPoint.add_hook`` wraps each, and keeps it in a closure (TransformerLens 3.9, 4.3), as we do.
    """
    wrapped = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [found for each in wrapped for found in _held(each)]


def _held(wrapped: Any) -> list[Any]:
    cells = getattr(wrapped, "__closure__", None) or ()
    return [getattr(wrapped, "function", None), *(cell.cell_contents for cell in cells)]


def remove_hook(module: Any, function: Callable[..., Any]) -> None:
    """Take a function off a hook point or a module, also where putting it on was cut short; nothing if it is not there.

    It is in torch's lists of a module's hooks (private names, torch 2.6 to 2.14) before it is in a hook point's
    ``fwd_hooks``, where a handle has its number.
    """
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = getattr(module, kind)
        numbers = [number for number, wrapped in hooks.items() if any(f is function for f in _held(wrapped))]
        if "fwd_hooks" in vars(module):
            module.fwd_hooks[:] = [kept for kept in module.fwd_hooks if kept.hook.id not in numbers]
        for number in numbers:
            getattr(module, f"{kind}_with_kwargs").pop(number, None)
            module._forward_hooks_always_called.pop(number, None)
            hooks.pop(number, None)


def remove_torch_hook(module: Any, function: Callable[..., Any]) -> None:
    """Take a function off a module's own hooks, also where registering it was cut short (torch 2.6 to 2.14)."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        hooks, with_kwargs = getattr(module, kind), getattr(module, f"{kind}_with_kwargs")
        for number in [number for number, own in hooks.items() if own is function]:
            with_kwargs.pop(number, None)
            hooks.pop(number, None)


def remove_cache_hooks(module: Any) -> None:
    """Take away what :func:`bridge_cache_arguments` has left on a module, if it was cut short."""
    for own in list(module._forward_pre_hooks.values()):
        if getattr(own, "__qualname__", "").startswith("bridge_cache_arguments."):
            remove_torch_hook(module, own)


def enter_in_registry(bridge: Any, name: str, point: Any) -> None:
    """Let a bridge know of a hook point, or (None) forget it.

    Its own scan of the whole model would list a new point's aliases as points, too (TransformerLens 3.9, 4.3).
    """
    if point is None:
        bridge._hook_registry.pop(name, None)
    else:
        point.name = name
        bridge._hook_registry[name] = point


def enter_in_dictionaries(model: Any, name: str, point: Any) -> None:
    """Let a HookedTransformer know of a hook point, or (None) forget it.

    Its ``setup`` makes all dictionaries anew, which an interrupt would leave half made (TransformerLens 3.9).
    """
    if point is not None:
        point.name = name
    for entries in (model.mod_dict, model.hook_dict):
        if point is None:
            entries.pop(name, None)
        else:
            entries[name] = point


def weights_processed(bridge: Any) -> bool:
    """Whether a bridge's weights were folded or centred (TransformerLens 3.9, 4.3: a private flag)."""
    return bool(getattr(bridge, "_weights_processed", False))


def set_tokenizer(bridge: Any, tokenizer: Any) -> None:
    """Give a bridge a tokenizer as it is; assigning to ``.tokenizer`` would change it (TransformerLens 3.9, 4.3)."""
    bridge._tokenizer = tokenizer


def hooked_cache(cfg: Any, device: torch.device, batch: int) -> Any:
    """An empty key-value cache of a HookedTransformer (TransformerLens 3.x; the module has moved before)."""
    try:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
    except ImportError as error:
        raise NotImplementedError(str(error)) from None
    return TransformerLensKeyValueCache.init_cache(cfg, device, batch)


# --- transformers ----------------------------------------------------------------------------------------------------


def key_value_cache(layers: Sequence[tuple[Tensor, Tensor]] = ()) -> Any:
    """A key-value cache for a Hugging Face model that holds these keys and values, layer by layer."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for layer, (key, value) in enumerate(layers):
        cache.update(key, value, layer)
    return cache


def cached_layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of every layer of such a cache (transformers 5.x: ``DynamicCache.layers``)."""
    return [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]


@contextmanager
def bridge_cache_arguments(bridge: Any, cache: Any) -> Iterator[dict[str, Any]]:
    """The arguments with which a bridge runs on a key-value cache, for passes inside the context.

    Until transformers 5.23 a model's argument and that of its attention are called ``past_key_values``; from 5.24 on
    both are ``cache``, and the bridge's attention (TransformerLens 3.9, 4.3) still reads ``past_key_values``: the cache
    stays empty. So the attention is told under both names, and the model under the one that it knows.
    """
    name = cache_argument(bridge.original_model)
    with ExitStack() as stack:
        if name == "cache":

            def both_names(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
                return args, kwargs | {"past_key_values": kwargs.get("cache", kwargs.get("past_key_values"))}

            for block in bridge.blocks:
                stack.callback(remove_torch_hook, block.attn, both_names)
                block.attn.register_forward_pre_hook(both_names, with_kwargs=True)
        yield {name: cache, "use_cache": True}


def cache_argument(model: Any) -> str:
    """What a Hugging Face model calls its key-value cache (transformers until 5.23, and from 5.24 on)."""
    return "cache" if "cache" in _parameters_of_forward(model) else "past_key_values"


def attention_configs(model: Any) -> list[Any]:
    """The configs that say by which kernel a Hugging Face model computes attention (transformers 5.x), each once."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list(
        {id(each): each for each in configs if "_attn_implementation_internal" in vars(each or object)}.values()
    )


def put_attention(config: Any, kernel: Any) -> None:
    """Let attention be computed by a kernel; past the setter, which would look whether others could, too."""
    vars(config)["_attn_implementation_internal"] = kernel


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attention that hands out its patterns, for passes inside the context.

    A config's field says which kernel is taken; its setter is meant for loading (transformers 5.x: a private field).
    """
    before = [(config, config._attn_implementation_internal) for config in attention_configs(model)]
    try:
        for config, _ in before:
            put_attention(config, "eager")
        yield
    finally:
        for config, kernel in before:
            put_attention(config, kernel)


def _parameters_of_forward(model: Any) -> set[str]:
    """What a Hugging Face model's ``forward`` takes, and that of the model inside it."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), None)
    found: set[str] = set()
    for each in (model, inner):
        if each is not None:
            found |= set(inspect.signature(type(each).forward).parameters)
    return found


def check_cache(layers: Sequence[tuple[Tensor, Tensor]], n_layers: int, length: int, axis: int) -> None:
    """A key-value cache must hold as many layers and tokens as were run; one that was not filled is wrong in silence.

    Raises
    ------
    HookError
        If it does not.
    """
    found = [tuple(key.shape[axis] for key in pair) for pair in layers]
    if len(found) != n_layers or any(tokens != (length, length) for tokens in found):
        raise HookError(
            f"after {length} tokens on {n_layers} layers the model's key-value cache holds {len(found)} layers of "
            f"{sorted(set(found))} tokens"
        )
