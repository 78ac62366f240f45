"""Record, gate and ablate the activations of nodes.

Everything here is a context manager or makes the hooks of one. Nothing edits an activation in place; what a context
did to a model is undone when it ends, by whatever way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dfa_lens.data.nodes import NodeSet, Site
from dfa_lens.data.spans import Spans
from dfa_lens.errors import HookError, NodeError, ScoreError, unknown
from dfa_lens.models.backend import HookedModel, HookFunction
from dfa_lens.models.runner import WORTH_LAYING_OUT, Runner

__all__ = [
    "Activations",
    "HookFunction",
    "HookedModel",
    "Intervention",
    "ablate",
    "add_hook_point",
    "check_site",
    "gate",
    "gate_hooks",
    "prepared",
    "record",
    "record_hooks",
    "remove_hook_point",
    "spread",
]

Intervention = Literal["circuit", "restore", "interpolate"]
"""What a mask does to the target (g: the mask; "now": what the node computes in the running pass).

- ``circuit``: run the clean prompt; output = g·now + (1 - g)·corrupt activation. What the curves evaluate.
- ``restore``: run the corrupt prompt; output = now + g·(clean activation - now). The authors' released code.
- ``interpolate``: output = g·clean + (1 - g)·corrupt, both cached (the paper's equation). Every node becomes a
  constant, so only its direct effect on the logits remains.
"""

Activations = dict[str, Tensor]
"""Hook point → activation [batch, pos, ...]."""


def record_hooks(
    nodes: NodeSet, into: Activations, *, device: torch.device | str | None = None
) -> list[tuple[str, HookFunction]]:
    """Hooks that copy the activations at every site of ``nodes`` into ``into``, on ``device`` or where they are.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> activations = {}
    >>> hooks = dfa.hooks.record_hooks(dfa.NodeSet.for_sizes(2, 4), activations)
    >>> [point for point, _ in hooks][:2]
    ['blocks.0.attn.hook_z', 'blocks.0.hook_mlp_out']
    """

    def keep(site: Site) -> HookFunction:
        def function(activation: Tensor) -> None:
            check_site(site, activation)
            into[site.point] = activation.detach().to(device or activation.device, copy=True)

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
    runner = Runner(model)
    runner.check_points(nodes.points)
    with runner.attach(record_hooks(nodes, into)):
        yield into


def check_site(site: Site, activation: Tensor) -> None:
    """The activation must have the shape that the node set was made for.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> site = dfa.NodeSet.for_sizes(1, 4).sites[0]
    >>> dfa.hooks.check_site(site, torch.zeros(2, 5, 4, 8)) is None  # four heads: fine
    True
    """
    if site.axis is None:
        return
    found = activation.shape[site.axis] if activation.ndim > site.axis else 0
    if site.by_position and 0 < found <= (site.size or 0):  # a shorter prompt has not all of the nodes
        return
    if found != site.size:
        raise NodeError(
            f"Hook point {site.point!r} has shape {list(activation.shape)}, but the node set cuts axis {site.axis} "
            f"into {site.size} nodes: it was made for "
            + (f"prompts of up to {site.size} tokens." if site.by_position else "another model.")
        )


def spread(site: Site, mask: Float[Tensor, "*batch node"], activation: Tensor, spans: Spans | None = None) -> Tensor:
    """A site's part of a mask, shaped to broadcast over the site's activation.

    Parameters
    ----------
    mask:
        One number per node of the whole set; with a batch axis, another mask for every example.
    activation:
        [batch, pos, ...]; says device, dtype and number of axes.
    spans:
        Which span every token of the activation is in, for nodes at spans.

    Raises
    ------
    HookError
        If there are nodes at spans and no spans, or those of other tokens.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> nodes = dfa.NodeSet.for_sizes(1, 4)
    >>> dfa.hooks.spread(nodes.sites[0], torch.ones(len(nodes)), torch.zeros(2, 5, 4, 8)).shape
    torch.Size([1, 1, 4, 1])
    """
    if site.spans:
        return _spread_over_spans(site, mask, activation, spans)
    index = site.span if site.span is not None else torch.tensor(site.positions, device=mask.device)
    own = mask[..., index]
    if not site.covers_all:  # slices that are not nodes of the set stay as they are computed: mask 1
        full = own.new_ones((*own.shape[:-1], site.size or 1))
        own = full.index_copy(-1, torch.tensor(site.slices, device=own.device), own)
    if site.by_position:
        own = own[..., : activation.shape[site.axis or 0]]
    shape = [own.shape[0] if own.ndim == 2 else 1] + [1] * (activation.ndim - 1)
    if site.axis is not None:
        shape[site.axis] = own.shape[-1]
    return own.reshape(shape).to(device=activation.device, dtype=activation.dtype)


def _spread_over_spans(site: Site, mask: Tensor, activation: Tensor, spans: Spans | None) -> Tensor:
    """[batch, pos, 1, …]: of every token the mask of its span; 1 where it is in none that has a node."""
    if spans is None or spans.labels.shape != activation.shape[:2]:
        found = "none" if spans is None else f"those of tokens {list(spans.labels.shape)}"
        raise HookError(
            f"Nodes at spans need to know the spans of the {list(activation.shape[:2])} tokens at {site.point!r}, and "
            f"there are {found}: apply a dfa.Schema to the prompt pairs, and hand spans=pairs.spans to hooks."
        )
    device = mask.device
    rows = mask if mask.ndim == 2 else mask[None]
    full = rows.new_ones(len(rows), site.size or 1, len(spans.names) + 1)
    numbers = torch.tensor([spans.number(name) for name in site.spans], device=device)
    places = (torch.arange(len(rows), device=device)[:, None], torch.tensor(site.slices, device=device), numbers)
    full = full.index_put(places, rows[:, torch.tensor(site.positions, device=device)])
    labels = torch.where(spans.labels < 0, len(spans.names), spans.labels).to(device)
    n = len(activation)
    own = full.expand(n, -1, -1).gather(2, labels[:, None].expand(-1, full.shape[1], -1))
    shape = [n, activation.shape[1]] + [1] * (activation.ndim - 2)
    if site.axis is not None:
        shape[site.axis] = own.shape[1]
    return own.transpose(1, 2).reshape(shape).to(device=activation.device, dtype=activation.dtype)


def gate_hooks(
    nodes: NodeSet,
    mask: Float[Tensor, "*batch node"],
    *,
    clean: Mapping[str, Tensor] | None = None,
    corrupt: Mapping[str, Tensor] | None = None,
    intervention: Intervention = "circuit",
    spans: Spans | None = None,
) -> list[tuple[str, HookFunction]]:
    """The hooks of :func:`gate`: one fused multiply-add per hook point.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> nodes = dfa.NodeSet.for_sizes(2, 4)
    >>> len(dfa.hooks.gate_hooks(nodes, torch.ones(len(nodes)), corrupt={}))
    4
    """
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
        recorded = activations[site.point]
        if recorded.shape != now.shape:
            raise HookError(
                f"At {site.point!r} the recorded activation has shape {list(recorded.shape)}, the running one "
                f"{list(now.shape)}: record on the same batch, with the same padding."
            )
        return recorded.to(device=now.device, dtype=now.dtype)

    def make(site: Site) -> HookFunction:
        def function(now: Tensor) -> Tensor:
            check_site(site, now)
            g = spread(site, mask, now, spans)
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
    spans: Spans | None = None,
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
    spans:
        Of the prompts, ``pairs.spans``, for nodes at spans.

    Raises
    ------
    ScoreError
        If the mask has another length than the node set.
    HookError
        If activations are missing or a hook point does not fire.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> nodes = dfa.NodeSet.heads_and_mlps(model)
    >>> with dfa.hooks.record(model, nodes) as corrupt:
    ...     _ = model(pairs.corrupt)
    >>> with dfa.hooks.gate(model, nodes, torch.full((len(nodes),), 0.5), corrupt=corrupt):
    ...     logits = model(pairs.clean)
    >>> logits.shape[:2] == pairs.clean.shape
    True
    """
    runner = Runner(model)
    runner.check_points(nodes.points)
    others = {"clean": clean, "corrupt": corrupt}
    with runner.attach(gate_hooks(nodes, mask, **others, intervention=intervention, spans=spans)):
        yield


@contextmanager
def ablate(
    model: HookedModel,
    nodes: NodeSet,
    *,
    keep: Bool[Tensor, "*batch node"] | Sequence[str] | None = None,
    remove: Bool[Tensor, "*batch node"] | Sequence[str] | None = None,
    corrupt: Mapping[str, Tensor],
    spans: Spans | None = None,
) -> Iterator[None]:
    """Set every node outside ``keep``, or every node of ``remove``, to its activation in the corrupt run.

    Parameters
    ----------
    keep:
        The circuit: names of nodes, or True where a node is kept, [node] or [batch, node].
    remove:
        Instead: what is destroyed, while all other nodes run.
    corrupt:
        Activations recorded on the corrupt prompts; or what else is to stand there, from
        :func:`dfa_lens.ablations.activations`.
    spans:
        As in :func:`gate`.

    Raises
    ------
    HookError
        If not exactly one of ``keep`` and ``remove`` is given.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> nodes = dfa.NodeSet.heads_and_mlps(model)
    >>> with dfa.hooks.record(model, nodes) as corrupt:
    ...     _ = model(pairs.corrupt)
    >>> with dfa.hooks.ablate(model, nodes, keep=["a5.h6", "m0"], corrupt=corrupt):
    ...     logits = model(pairs.clean)
    >>> logits.shape[:2] == pairs.clean.shape
    True
    """
    if (keep is None) == (remove is None):
        raise HookError("Say what is kept, keep=, or what is destroyed, remove=: one of the two.")
    chosen = keep if keep is not None else remove
    if isinstance(chosen, Tensor):
        mask = chosen.float()
    else:
        mask = torch.zeros(len(nodes), dtype=torch.float32)
        mask[[nodes.position(name) for name in chosen or ()]] = 1.0
    if remove is not None:
        mask = 1 - mask
    with gate(model, nodes, mask, corrupt=corrupt, spans=spans):
        yield


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
        The hook point's full name, for :meth:`~dfa_lens.data.nodes.NodeSet.from_points` and ``model.hook_dict``. It
        stays until :func:`remove_hook_point`.

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
    return Runner(model).add_point(module, name, at)


def remove_hook_point(model: HookedModel, name: str) -> None:
    """Take away a hook point that :func:`add_hook_point` made; ``name`` is what it returned.

    Raises
    ------
    HookError
        If no such point was added.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> point = dfa.hooks.add_hook_point(model, "blocks.3.mlp", "hook_mine")
    >>> dfa.hooks.remove_hook_point(model, point)
    >>> point in model.hook_dict
    False
    """
    Runner(model).remove_point(name)


@contextmanager
def prepared(model: HookedModel) -> Iterator[None]:
    """Hold a model ready over several calls: its weights stay laid out as the passes read them.

    Every operation does this for itself where it makes enough passes; with many small calls on one HookedTransformer it
    pays to do it once around them. Inside, the weights have no gradient and other threads wait for the model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> with dfa.prepared(model):
    ...     for task in ("ioi", "mcqa"):
    ...         _ = dfa.attribute(model, dfa.tasks.load(task, model.tokenizer, n=4), method="nap")
    """
    runner = Runner(model)
    with runner.session(passes=WORTH_LAYING_OUT):
        yield
