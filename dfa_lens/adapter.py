"""All that is known of TransformerLens: what its models share, where they differ, and how one of them is run.

One code path serves HookedTransformer (TransformerLens 3.x) and TransformerBridge (3.9 and 4.x): hook points are
taken from ``hook_dict``, hooks are closures put on the hook points themselves, and padding is always masked. What
would be silently wrong is refused here:

- hook points that do not exist, never fire, fire more than once a pass, or are not what their name says;
- one hook point under two names;
- activations that are no floating-point numbers or have no batch axis.

When a context ends, by whatever way, the model is as it was: the same hooks, ``requires_grad`` and training mode.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from dfa_lens.errors import HookError

logger = logging.getLogger(__name__)

HookFunction = Callable[[Tensor], "Tensor | None"]
"""Takes an activation; returns its replacement, or None to leave it as it is."""

# Points that exist on every model but fire only when a config flag is set.
_FLAGS = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
}


class ProcessedWeightsWarning(UserWarning):
    """The model's weights were transformed when it was loaded."""


@runtime_checkable
class HookedModel(Protocol):
    """What dfa_lens needs of a model: a HookedTransformer and a TransformerBridge both have it."""

    cfg: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook point name → HookPoint."""

    def __call__(self, tokens: Tensor, /, *, attention_mask: Tensor) -> Any:
        """Logits [batch, pos, vocab]."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights."""


def is_bridge(model: Any) -> bool:
    """Whether the model is a TransformerBridge (told by its class name: no TransformerLens import needed)."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)


# --- hook points -----------------------------------------------------------------------------------------------

# hook_dict is rebuilt on every access by a bridge; a model's points change only when somebody adds one.
_snapshots: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def points(model: HookedModel, names: Iterable[str]) -> dict[str, Any]:
    """The hook points called ``names``, checked.

    Raises
    ------
    HookError
        If the model is not hookable; a point does not exist; a config flag that is off keeps it from firing; it fires
        several times a pass; or editing it would not do what its name says.
    """
    if not hasattr(model, "hook_dict") or not hasattr(model, "cfg"):
        raise HookError(
            f"A {type(model).__name__} can't be hooked: pass a TransformerLens HookedTransformer or TransformerBridge."
        )
    names = list(names)
    known = _snapshots.get(model)
    if known is None or any(name not in known for name in names):
        known = _snapshots[model] = dict(model.hook_dict)
    bridge = is_bridge(model)
    for name in names:
        if name not in known:
            raise HookError(
                f"The model has no hook point {name!r}; see model.hook_dict for the {len(known)} that it has."
            )
        flag = _FLAGS.get(name.rsplit(".", 1)[-1])
        if flag is not None and not getattr(model.cfg, flag, False):
            raise HookError(
                f"Hook point {name!r} fires only when model.cfg.{flag} is set, and it is not. Set it with "
                f"model.set_{flag}(True); for attention heads use 'attn.hook_z', which needs no flag."
            )
        if bridge and name.endswith("hook_resid_mid"):
            raise HookError(
                f"On a TransformerBridge {name!r} is the input of the second norm only: a change there misses the skip "
                "path. Use 'hook_attn_out' or 'hook_resid_pre' of the same layer."
            )
        if not bridge and ".ln1.hook_" in name:
            raise HookError(
                f"On a HookedTransformer {name!r} fires three times a pass (for queries, keys and values), so what is "
                "recorded there is not one activation. Use 'attn.hook_q', 'attn.hook_k', 'attn.hook_v' or "
                "'hook_resid_pre'."
            )
    return {name: known[name] for name in names}


def is_hooked(model: HookedModel) -> bool:
    """Whether somebody has hooks on the model now."""
    points(model, [])
    return any(point.fwd_hooks or point.bwd_hooks for point in _snapshots[model].values())


def check_points(model: HookedModel, names: Sequence[str]) -> None:
    """As :func:`points`, and no two names may be one hook point: it would be edited twice.

    Raises
    ------
    HookError
        Also if two of ``names`` are aliases of each other, as on a TransformerBridge "blocks.0.hook_attn_out" and
        "blocks.0.attn.hook_out".
    """
    seen: dict[int, str] = {}
    for name, point in points(model, names).items():
        if id(point) in seen:
            raise HookError(
                f"{seen[id(point)]!r} and {name!r} are two names of one hook point on this model: a node set can have "
                "one of them."
            )
        seen[id(point)] = name
    warn_if_processed(model)


@dataclass(frozen=True)
class _Added:
    module: Any
    attribute: str
    handle: Any


_added: WeakKeyDictionary[Any, dict[str, _Added]] = WeakKeyDictionary()


def add_hook_point(
    model: HookedModel, module: str, name: str = "hook_custom", *, at: Literal["output", "input"] = "output"
) -> str:
    """Give a model a hook point of your own, on any of its modules.

    Parameters
    ----------
    module:
        The module's path in the model, "blocks.3.mlp" say.
    name:
        What the hook point is called there; it must start with ``hook_``.
    at:
        Whether it sees what the module returns or what it is given. Of several tensors it sees the first.

    Returns
    -------
    str
        The hook point's full name, for :meth:`~dfa_lens.nodes.NodeSet.from_points` and ``model.hook_dict``. It stays
        until :func:`remove_hook_point`.

    Raises
    ------
    HookError
        If there is no such module, or the name is taken.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> point = dfa.hooks.add_hook_point(model, "blocks.3.mlp", "hook_mine")
    >>> dfa.NodeSet.from_points(model, {point: None}).names
    ('blocks.3.mlp.hook_mine',)
    >>> dfa.hooks.remove_hook_point(model, point)
    """
    from transformer_lens.hook_points import HookPoint

    points(model, [])
    try:
        place: Any = model.get_submodule(module)  # type: ignore[attr-defined]
    except AttributeError:
        raise HookError(f"The model has no module {module!r}; model.named_modules() lists those it has.") from None
    if not name.startswith("hook_"):
        raise HookError(f"The name of a hook point must start with 'hook_', not {name!r}.")
    if hasattr(place, name) or f"{module}.{name}" in model.hook_dict:
        raise HookError(f"Module {module!r} already has {name!r}.")
    point = HookPoint()
    setattr(place, name, point)

    def first(value: Any) -> Any:
        return (point(value[0]), *value[1:]) if isinstance(value, tuple) else point(value)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return first(args), kwargs
        key = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return args, kwargs | {key: point(kwargs[key])}

    if at == "output":
        handle = place.register_forward_hook(lambda _module, _args, output: first(output))
    else:
        handle = place.register_forward_pre_hook(before, with_kwargs=True)
    full = f"{module}.{name}"
    _added.setdefault(model, {})[full] = _Added(place, name, handle)
    _register(model, full, point)
    return full


def remove_hook_point(model: HookedModel, name: str) -> None:
    """Take away a hook point that :func:`add_hook_point` made; ``name`` is what it returned."""
    added = _added.get(model, {})
    if name not in added:
        raise HookError(f"{name!r} is not a hook point that was added to this model.")
    entry = added.pop(name)
    entry.handle.remove()
    delattr(entry.module, entry.attribute)
    _register(model, name, None)


def _register(model: Any, name: str, point: Any) -> None:
    """Let TransformerLens know of a hook point, or (None) forget it."""
    _snapshots.pop(model, None)
    if not is_bridge(model):
        model.setup()
    elif point is None:
        model._hook_registry.pop(name)
    else:
        # Only the entry itself: a scan of the whole model would also list its aliases as points of their own.
        point.name = name
        model._hook_registry[name] = point


# --- weights -----------------------------------------------------------------------------------------------------

_told: WeakSet[Any] = WeakSet()


def processing(model: HookedModel) -> tuple[str, ...]:
    """What was done to the weights on loading: "norm folded", "unembedding centred", "value biases folded".

    A bridge says only whether anything was done: "processed".
    """
    if is_bridge(model):
        return ("processed",) if getattr(model, "_weights_processed", False) else ()
    found = []
    if str(getattr(model.cfg, "normalization_type", "")).endswith("Pre"):
        found.append("norm folded")
    with torch.no_grad():
        unembed = getattr(getattr(model, "unembed", None), "W_U", None)
        if unembed is not None and unembed.shape[1] > 1:
            row = unembed[: min(64, len(unembed))].float()  # centred means: every row, so a few rows tell
            if row.mean(1).abs().max() < 1e-5 * row.abs().mean():
                found.append("unembedding centred")
        attentions = [block.attn for block in getattr(model, "blocks", ())]
        if any(bool(a.b_O.any()) and not bool(a.b_V.any()) for a in attentions if hasattr(a, "b_V")):
            found.append("value biases folded")
    return tuple(found)


def warn_if_processed(model: HookedModel) -> None:
    """Say once per model what processed weights mean here (:class:`ProcessedWeightsWarning`)."""
    if model in _told:
        return
    _told.add(model)
    found = processing(model)
    if found:
        warnings.warn(
            f"This model's weights were processed when it was loaded ({', '.join(found)}). Logit differences, scores, "
            "masks and curves are those of the original weights: what processing adds to an activation it adds to the "
            "clean and the corrupt run alike. Not the same are single logits, activations after a norm, hook_v and "
            "hook_z by themselves (on Qwen), and any ablation of your own to zero or to a mean. To be safe, load "
            "unprocessed weights: dfa.load_model, HookedTransformer.from_pretrained_no_processing, or a bridge without "
            "enable_compatibility_mode().",
            ProcessedWeightsWarning,
            stacklevel=4,
        )


# --- running -----------------------------------------------------------------------------------------------------


@contextmanager
def attached(model: HookedModel, hooks: Sequence[tuple[str, HookFunction]]) -> Iterator[list[int]]:
    """Put functions on hook points for the length of the context; in the order given where a point occurs twice.

    Yields how often each was called so far. A function that was never called by the end of a context that ended well
    is a :class:`~dfa_lens.errors.HookError`: a node that was silently not gated looks like a result.
    """
    taken = points(model, [name for name, _ in hooks])
    fired = [0] * len(hooks)

    def wrap(index: int, function: HookFunction) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: Any = None) -> Tensor:
            fired[index] += 1
            out = function(activation)
            # Always hand a tensor on: a bridge drops a tensor that was captured but not returned from the graph.
            return activation if out is None else out

        return hook

    with ExitStack() as stack:
        for index, (name, function) in enumerate(hooks):
            point = taken[name]
            point.add_hook(wrap(index, function))
            stack.callback(_detach, point, point.fwd_hooks[-1])
        yield fired
    missing = [name for (name, _), n in zip(hooks, fired, strict=True) if n == 0]
    if missing:
        raise HookError(f"Hook point {missing[0]!r} did not fire ({len(missing)} of {len(hooks)}): was the model run?")


def _detach(point: Any, handle: Any) -> None:
    handle.hook.remove()
    # The user may have reset all hooks inside the context.
    point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """No gradient for weights and no dropout inside; ``requires_grad`` and training modes as before afterwards."""
    # by number, because accelerate makes new parameters of those that it loads from elsewhere
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    modules = getattr(model, "modules", None)
    training = [m for m in modules() if m.training] if modules is not None else []
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter, before in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(before)
        for module in training:
            module.training = True


def device_of(model: HookedModel) -> torch.device:
    """Where the model takes its tokens; of a model whose weights are offloaded, where they are brought to."""
    device = next(iter(model.parameters())).device
    if device.type == "meta":
        for module in model.modules():  # type: ignore[attr-defined]
            where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if where is not None:
                return torch.device(where)
    return device


@contextmanager
def prepared(model: HookedModel) -> Iterator[None]:
    """:func:`frozen`, and the weights laid out in memory as the passes read them; for more than a pass or two.

    A HookedTransformer turns every weight matrix round on every pass (``W.T.contiguous()``): it copies the whole model
    each time, and a pass with gradients keeps that copy until it has gone backward. A matrix that lies in memory the
    other way round, with the same values at the same indices, needs no copy.
    """
    with frozen(model):
        turned: list[torch.nn.Parameter] = []
        try:
            if not is_bridge(model):
                for parameter, order in _turned_round(model):
                    if _nobody_else_holds(parameter):
                        turned.append(parameter)
                        parameter.data = _laid_out(parameter.data, order)
            yield
        finally:
            for parameter in turned:
                parameter.data = parameter.data.contiguous()


def _turned_round(model: Any) -> Iterator[tuple[torch.nn.Parameter, tuple[int, ...]]]:
    """The weights that a HookedTransformer copies on every pass, and the order of axes in which it reads them."""
    for block in getattr(model, "blocks", ()):
        attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        wanted: list[tuple[Any, str, tuple[int, ...]]]
        wanted = [(attention, name, (0, 2, 1)) for name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V")]
        wanted.append((attention, "W_O", (2, 0, 1)))
        if hasattr(mlp, "W_gate"):
            wanted += [(mlp, name, (1, 0)) for name in ("W_gate", "W_in", "W_out")]
        for module, name, order in wanted:
            parameter = getattr(module, "_parameters", {}).get(name)
            if parameter is not None and parameter.is_floating_point() and parameter.ndim == len(order):
                yield parameter, order


def _laid_out(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same tensor, contiguous when its axes are taken in this order."""
    back = [order.index(axis) for axis in range(len(order))]
    return weight.permute(order).contiguous().permute(back)


def _nobody_else_holds(parameter: torch.nn.Parameter) -> bool:
    """Whether no view of the parameter's memory is about, which would be cut off from it."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = parameter.untyped_storage()
    # two: the parameter and `storage`
    return count is not None and parameter.is_contiguous() and not parameter.is_shared() and count(storage._cdata) <= 2
