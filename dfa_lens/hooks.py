"""The only module that touches a running model: record, gate and ablate activations.

Everything here is a context manager or uses one. When it ends, by whatever way, the model is as it was: the same
hooks, flags, ``requires_grad``, training mode. Nothing edits an activation in place.

One code path serves HookedTransformer (TransformerLens 3.x) and TransformerBridge (3.9 and 4.x): hook points are
taken from ``hook_dict``, hooks are closures put on the hook points themselves, and padding is always masked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, get_args, runtime_checkable
from weakref import WeakKeyDictionary

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfa_lens.errors import HookError, NodeError, ScoreError, unknown
from dfa_lens.nodes import NodeSet, Site

logger = logging.getLogger(__name__)

Intervention = Literal["circuit", "restore", "interpolate"]
"""What a mask does to the target (g: the mask; "now": what the node computes in the running pass).

- ``circuit``: run the clean prompt; output = g·now + (1 - g)·corrupt activation. What the curves evaluate.
- ``restore``: run the corrupt prompt; output = now + g·(clean activation - now). The authors' released code.
- ``interpolate``: output = g·clean + (1 - g)·corrupt, both cached (the paper's equation). Every node becomes a
  constant, so only its direct effect on the logits remains.
"""

Activations = dict[str, Tensor]
"""Hook point → activation [batch, pos, ...]."""

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


# --- hook points -----------------------------------------------------------------------------------------------

# hook_dict is rebuilt on every access by a bridge; a model's points change only when somebody adds one.
_snapshots: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def points(model: HookedModel, names: Iterable[str]) -> dict[str, Any]:
    """The hook points called ``names``, checked.

    Raises
    ------
    HookError
        If the model is not hookable, a point does not exist, a config flag that is off keeps it from firing, or
        editing it would not do what its name says.
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
    return {name: known[name] for name in names}


def is_bridge(model: Any) -> bool:
    """Whether the model is a TransformerBridge (told by its class name: no TransformerLens import needed)."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)


@contextmanager
def attached(model: HookedModel, hooks: Sequence[tuple[str, HookFunction]]) -> Iterator[None]:
    """Put functions on hook points for the length of the context; in the order given where a point occurs twice.

    A function that was never called by the end of a context that ended well is a :class:`HookError`: a node that was
    silently not gated looks like a result.
    """
    taken = points(model, [name for name, _ in hooks])
    fired = [False] * len(hooks)

    def wrap(index: int, function: HookFunction) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: Any = None) -> Tensor:
            fired[index] = True
            out = function(activation)
            # Always hand a tensor on: a bridge drops a tensor that was captured but not returned from the graph.
            return activation if out is None else out

        return hook

    with ExitStack() as stack:
        for index, (name, function) in enumerate(hooks):
            point = taken[name]
            point.add_hook(wrap(index, function))
            stack.callback(_detach, point, point.fwd_hooks[-1])
        yield
    missing = [name for (name, _), ok in zip(hooks, fired, strict=True) if not ok]
    if missing:
        raise HookError(f"Hook point {missing[0]!r} did not fire ({len(missing)} of {len(hooks)}): was the model run?")


def _detach(point: Any, handle: Any) -> None:
    handle.hook.remove()
    # The user may have reset all hooks inside the context.
    point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """No gradient for weights and no dropout inside; ``requires_grad`` and training modes as before afterwards."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    modules = getattr(model, "modules", None)
    training = [m for m in modules() if m.training] if modules is not None else []
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


# --- running ---------------------------------------------------------------------------------------------------


def device_of(model: HookedModel) -> torch.device:
    """Where the model takes its tokens."""
    return next(iter(model.parameters())).device


def attention_mask(lengths: Int[Tensor, " batch"], n_positions: int, device: torch.device) -> Int[Tensor, "batch pos"]:
    """1 at real tokens, 0 at the padding on the right."""
    return (torch.arange(n_positions, device=device) < lengths.to(device)[:, None]).long()


def run(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    lengths: Int[Tensor, " batch"],
    hooks: Sequence[tuple[str, HookFunction]] = (),
    *,
    positions: Literal["answer", "all"] = "answer",
) -> Float[Tensor, ...]:
    """One forward pass under hooks.

    Parameters
    ----------
    tokens, lengths:
        Right-padded prompts and how many of their tokens are real.
    hooks:
        (hook point, function) pairs.
    positions:
        "answer": logits [batch, vocab] at the last real token, and the unembedding runs there only. "all": logits
        [batch, pos, vocab]; what stands at padding positions means nothing.
    """
    device = device_of(model)
    tokens = tokens.to(device)
    mask = attention_mask(lengths, tokens.shape[1], device)
    hooks = list(hooks)
    if positions == "answer":
        # The final norm and the unembedding work position by position, so all others can be dropped before them.
        def keep_last(residual: Tensor) -> Tensor:
            last = lengths.to(residual.device) - 1
            index = einops.repeat(last, "batch -> batch 1 d_model", d_model=residual.shape[-1])
            return residual.gather(1, index)

        hooks.append((f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post", keep_last))
    with attached(model, hooks):
        logits = model(tokens, attention_mask=mask)
    if not isinstance(logits, Tensor):
        raise HookError(f"The model returned a {type(logits).__name__} instead of logits.")
    return logits[:, 0] if positions == "answer" else logits


def shapes(model: HookedModel, names: Sequence[str]) -> dict[str, torch.Size]:
    """The shapes of the activations at hook points for one prompt of one token: [1, 1, ...]."""
    found: dict[str, torch.Size] = {}

    def look(name: str) -> HookFunction:
        def function(activation: Tensor) -> None:
            found[name] = activation.shape

        return function

    with torch.no_grad(), frozen(model):
        run(model, torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long), [(n, look(n)) for n in names])
    return found


# --- record, gate, ablate ----------------------------------------------------------------------------------------


def record_hooks(nodes: NodeSet, into: Activations) -> list[tuple[str, HookFunction]]:
    """Hooks that copy the activations at every site of ``nodes`` into ``into``."""

    def keep(site: Site) -> HookFunction:
        def function(activation: Tensor) -> None:
            check_site(site, activation)
            into[site.point] = activation.detach().clone()

        return function

    return [(site.point, keep(site)) for site in nodes.sites]


@contextmanager
def record(model: HookedModel, nodes: NodeSet) -> Iterator[Activations]:
    """Record what the nodes' hook points compute.

    Yields
    ------
    Activations
        Empty at first; after the model ran, hook point → activation [batch, pos, ...], detached.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> with dfa.hooks.record(model, dfa.NodeSet.heads_and_mlps(model)) as activations:
    ...     _ = model(torch.tensor([[2, 30, 31]]))
    >>> activations["blocks.0.attn.hook_z"].shape
    torch.Size([1, 3, 8, 16])
    """
    into: Activations = {}
    with attached(model, record_hooks(nodes, into)):
        yield into


def check_site(site: Site, activation: Tensor) -> None:
    """The activation must have the shape that the node set was made for."""
    if site.axis is None:
        return
    if activation.ndim <= site.axis or activation.shape[site.axis] != site.size:
        raise NodeError(
            f"Hook point {site.point!r} has shape {list(activation.shape)}, but the node set cuts axis {site.axis} "
            f"into {site.size} nodes: it was made for another model."
        )


def spread(site: Site, mask: Float[Tensor, "*batch node"], activation: Tensor) -> Tensor:
    """A site's part of a mask, shaped to broadcast over the site's activation.

    Parameters
    ----------
    mask:
        One number per node of the whole set; with a batch axis, another mask for every example.
    activation:
        [batch, pos, ...]; says device, dtype and number of axes.
    """
    index = site.span if site.span is not None else torch.tensor(site.positions, device=mask.device)
    own = mask[..., index]
    if not site.covers_all:  # slices that are not nodes of the set stay as they are computed: mask 1
        full = own.new_ones((*own.shape[:-1], site.size or 1))
        own = full.index_copy(-1, torch.tensor(site.slices, device=own.device), own)
    shape = [own.shape[0] if own.ndim == 2 else 1] + [1] * (activation.ndim - 1)
    if site.axis is not None:
        shape[site.axis] = own.shape[-1]
    return own.reshape(shape).to(device=activation.device, dtype=activation.dtype)


def gate_hooks(
    nodes: NodeSet,
    mask: Float[Tensor, "*batch node"],
    *,
    clean: Mapping[str, Tensor] | None = None,
    corrupt: Mapping[str, Tensor] | None = None,
    intervention: Intervention = "circuit",
) -> list[tuple[str, HookFunction]]:
    """The hooks of :func:`gate`: one fused multiply-add per hook point."""
    if intervention not in get_args(Intervention):
        raise unknown("intervention", intervention, get_args(Intervention), HookError)
    if mask.shape[-1] != len(nodes):
        raise ScoreError(f"The mask has {mask.shape[-1]} entries, but the node set has {len(nodes)} nodes.")
    needed = {"circuit": (corrupt,), "restore": (clean,), "interpolate": (clean, corrupt)}[intervention]
    if any(activations is None for activations in needed):
        names = {"circuit": "corrupt", "restore": "clean", "interpolate": "clean and corrupt"}[intervention]
        raise HookError(f"intervention={intervention!r} needs the recorded {names} activations.")

    def other(activations: Mapping[str, Tensor] | None, site: Site, now: Tensor) -> Tensor:
        assert activations is not None
        if site.point not in activations:
            raise HookError(f"No activations were recorded at hook point {site.point!r}.")
        return activations[site.point].to(device=now.device, dtype=now.dtype)

    def make(site: Site) -> HookFunction:
        def function(now: Tensor) -> Tensor:
            check_site(site, now)
            g = spread(site, mask, now)
            if intervention == "circuit":
                return torch.lerp(other(corrupt, site, now), now, g)  # exact at g = 0 and g = 1
            if intervention == "restore":
                return torch.lerp(now, other(clean, site, now), g)
            return torch.lerp(other(corrupt, site, now), other(clean, site, now), g)

        return function

    return [(site.point, make(site)) for site in nodes.sites]


@contextmanager
def gate(
    model: HookedModel,
    nodes: NodeSet,
    mask: Float[Tensor, "*batch node"],
    *,
    clean: Mapping[str, Tensor] | None = None,
    corrupt: Mapping[str, Tensor] | None = None,
    intervention: Intervention = "circuit",
) -> Iterator[None]:
    """Gate the nodes' activations with a soft mask (differentiable in the mask).

    Parameters
    ----------
    mask:
        [node] or [batch, node], from 0 (the other run) to 1 (this run, for ``circuit``).
    clean, corrupt:
        Activations recorded with :func:`record`, of the same batch and padding: ``corrupt`` for ``circuit``,
        ``clean`` for ``restore``, both for ``interpolate``.
    intervention:
        See :data:`Intervention`. Run the model on the clean prompts inside the context, for ``restore`` on the
        corrupt ones.

    Raises
    ------
    ScoreError
        If the mask has another length than the node set.
    HookError
        If activations are missing or a hook point does not fire.
    """
    with attached(model, gate_hooks(nodes, mask, clean=clean, corrupt=corrupt, intervention=intervention)):
        yield


@contextmanager
def ablate(
    model: HookedModel,
    nodes: NodeSet,
    *,
    keep: Bool[Tensor, "*batch node"] | Sequence[str],
    corrupt: Mapping[str, Tensor],
) -> Iterator[None]:
    """Set every node outside ``keep`` to its activation in the corrupt run.

    Parameters
    ----------
    keep:
        The circuit: names of nodes, or True where a node is kept, [node] or [batch, node].
    corrupt:
        Activations recorded on the corrupt prompts.
    """
    if isinstance(keep, Tensor):
        mask = keep.float()
    else:
        mask = torch.zeros(len(nodes))
        mask[[nodes.position(name) for name in keep]] = 1.0
    with gate(model, nodes, mask, corrupt=corrupt):
        yield
