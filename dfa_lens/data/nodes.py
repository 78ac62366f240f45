"""Which slices of which hook points are nodes, and in what order.

A node is one attention head or one MLP block; more generally one slice of one hook point. A :class:`NodeSet` is
plain data: it needs a model to be made, but not to be kept, compared, saved or read.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, SupportsIndex, overload

from dfa_lens.data import selection
from dfa_lens.data.content import ByContent
from dfa_lens.errors import ModelError, NodeError, NodeIndexError, short

HEAD_POINT = "blocks.{layer}.attn.hook_z"
MLP_POINT = "blocks.{layer}.hook_mlp_out"
INPUT_POINT = "hook_embed"


@dataclass(frozen=True, slots=True)
class Node:
    """One node: a slice of the activation at one hook point.

    Attributes
    ----------
    name:
        "a3.h7", "m3", "input", or the hook point's name with the slice in brackets.
    point:
        The hook point's name in TransformerLens.
    kind:
        "head", "mlp", "input", "custom", or "position" for a slice along an axis of positions.
    layer:
        The block that it belongs to, counted from 0; -1 before the first block, the number of blocks after the last.
    axis, index, size:
        The node is slice ``index`` of ``size`` along ``axis`` of the activation (axis 0 is the batch); all three
        are None when the node is the whole activation.

    Raises
    ------
    NodeError
        If a text is empty or no text, a number no integer, or the slice is not one of the axis.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.NodeSet.for_sizes(2, 2)[2]
    Node(name='m0', point='blocks.0.hook_mlp_out', kind='mlp', layer=0, axis=None, index=None, size=None)
    """

    name: str
    point: str
    kind: str
    layer: int
    axis: int | None = None
    index: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        for text in ("name", "point", "kind"):
            if not isinstance(getattr(self, text), str) or not getattr(self, text):
                raise NodeError(f"A node's {text} is a text, not {short(repr(getattr(self, text)))}.")
            if not getattr(self, text).isprintable():  # it is shown in terminals and in figures
                raise NodeError(
                    f"A node's {text} is one line without control characters, not {short(repr(getattr(self, text)))}."
                )
        for number in ("layer", "axis", "index", "size"):
            given = getattr(self, number)
            whole = selection.integer(given)  # numpy's integers become Python's, which JSON can hold
            if whole is None and (number == "layer" or given is not None):
                raise NodeError(f"Node {short(self.name)!r}: {number} is an integer, not {short(repr(given))}.")
            object.__setattr__(self, number, whole)
        cut = (self.axis, self.index, self.size)
        if cut == (None, None, None):
            return
        if self.axis is None or self.index is None or self.size is None:
            raise NodeError(f"Node {short(self.name)!r}: axis, index and size are given together or not at all.")
        if self.axis < 1 or not 0 <= self.index < self.size:
            raise NodeError(
                f"Node {short(self.name)!r} is slice {self.index} of {self.size} along axis {self.axis}: the axis must "
                "be 1 or more (0 is the batch) and the slice one of those there are."
            )


@dataclass(frozen=True, slots=True)
class SpanNode(Node):
    """A node at the tokens of one span: a head at the subject, whatever its position in each prompt.

    Attributes
    ----------
    span:
        The span's name, in the :class:`~dfa_lens.data.spans.Schema` of the prompts.

    Raises
    ------
    NodeError
        If the span has no name, or the node is cut along an axis of positions.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.NodeSet.for_sizes(1, 2).at_spans(["subject", "answer"]).names
    ('a0.h0@subject', 'a0.h0@answer', 'a0.h1@subject', 'a0.h1@answer', 'm0@subject', 'm0@answer')
    """

    span: str = ""

    def __post_init__(self) -> None:
        Node.__post_init__(self)
        if not isinstance(self.span, str) or not self.span.isprintable() or not self.span:
            raise NodeError(f"A node's span is the name of one, not {short(repr(self.span))}.")
        if self.axis == 1:
            raise NodeError(f"Node {short(self.name)!r} is cut along axis 1, which is that of the tokens of a span.")


#: The embedding as a node, where it is one.
INPUT = Node("input", INPUT_POINT, "input", -1)


@dataclass(frozen=True)
class Site:
    """The nodes that share one hook point: they are recorded, gated and ablated together.

    Attributes
    ----------
    point, layer, axis, size:
        As in :class:`Node`.
    slices:
        The slices along ``axis`` that are nodes of the set, or () when the whole activation is one node.
    positions:
        Where those nodes stand in the node set, in the order of ``slices``.
    """

    point: str
    layer: int
    axis: int | None
    size: int | None
    slices: tuple[int, ...]
    positions: tuple[int, ...]

    by_position: bool = False  #: the slices are positions of the prompt; a shorter prompt has fewer
    spans: tuple[
        str, ...
    ] = ()  #: the span of every node, where they are nodes at spans; ``slices`` is then 0 for whole ones

    @cached_property
    def covers_all(self) -> bool:
        """Whether every slice of the activation is a node of the set, in order."""
        return not self.spans and (self.axis is None or self.slices == tuple(range(self.size or 0)))

    @cached_property
    def whole(self) -> bool:
        """Whether the nodes are all of the activation together, in any order."""
        return not self.spans and len(self.positions) == (self.size or 1)

    @cached_property
    def span(self) -> slice | None:
        """The nodes' positions as a slice, where they are consecutive."""
        first, n = self.positions[0], len(self.positions)
        return slice(first, first + n) if self.positions == tuple(range(first, first + n)) else None


class NodeSet(ByContent, Sequence[Node]):
    """An ordered set of nodes.

    ``len``, iteration, ``in`` (a node or a name) and equality work as expected; ``nodes[i]`` is a node,
    ``nodes[i:j]``, ``nodes["a3.*"]`` (a name or a name pattern) and ``nodes[[...]]`` (positions, names, or a boolean
    for every node) are node sets.

    Raises
    ------
    NodeError
        If two nodes have the same name, or overlap at one hook point; if an index chooses nothing.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._nodes = tuple(nodes)
        if not self._nodes:
            raise NodeError("A node set needs at least one node.")
        for node in self._nodes:
            if not isinstance(node, Node):
                raise NodeError(f"A node set is made of nodes, not {short(repr(node))}.")
        self._position = {node.name: i for i, node in enumerate(self._nodes)}
        if len(self._position) != len(self._nodes):
            double = next(n.name for i, n in enumerate(self._nodes) if self._position[n.name] != i)
            raise NodeError(f"Node {double!r} is in the set twice.")
        self.sites  # noqa: B018 - overlapping nodes are found here, not in the middle of a run

    # --- making one ------------------------------------------------------------------------------------------

    @classmethod
    def heads_and_mlps(cls, model: Any, with_input: bool = False) -> NodeSet:
        """All attention heads and MLP blocks in canonical order: a0.h0 … a0.h{H-1}, m0, a1.h0, …

        Of a model without MLP blocks the heads alone.

        Parameters
        ----------
        model:
            A HookedTransformer or TransformerBridge, of which only ``model.cfg`` is read, or a Hugging Face model.
        with_input:
            Put the embedding first, as the node "input", as MIB's released code ranks it.

        Raises
        ------
        ModelError
            If the model has no such numbers.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> nodes = dfa.NodeSet.heads_and_mlps(dfa.zoo.load("llama3-tiny-source"))
        >>> len(nodes), nodes.names[:3], nodes.names[-1]
        (54, ('a0.h0', 'a0.h1', 'a0.h2'), 'm5')
        """
        try:
            cfg = cfg_of(model)
            n_layers, n_heads = int(cfg.n_layers), int(cfg.n_heads)
        except (AttributeError, TypeError):
            raise ModelError(
                f"A {type(model).__name__} does not say how many layers and heads it has: pass a HookedTransformer, a "
                "TransformerBridge or a Hugging Face model (dfa.load_model makes each), or use NodeSet.for_sizes."
            ) from None
        mlps = not getattr(cfg, "attn_only", False)
        return cls.for_sizes(n_layers, n_heads, with_input=with_input, mlps=mlps)

    @classmethod
    def for_sizes(cls, n_layers: int, n_heads: int, *, with_input: bool = False, mlps: bool = True) -> NodeSet:
        """As :meth:`heads_and_mlps`, from the two numbers alone; ``mlps=False`` leaves the MLP blocks out."""
        for what, number in (("layers", n_layers), ("heads", n_heads)):
            if (selection.integer(number) or 0) < 1:
                raise NodeError(f"The number of {what} is an integer of at least 1, not {short(repr(number))}.")
        nodes: list[Node] = []
        if with_input:
            nodes.append(INPUT)
        for layer in range(n_layers):
            nodes += [
                Node(f"a{layer}.h{head}", HEAD_POINT.format(layer=layer), "head", layer, 2, head, n_heads)
                for head in range(n_heads)
            ]
            if mlps:
                nodes.append(Node(f"m{layer}", MLP_POINT.format(layer=layer), "mlp", layer))
        return cls(nodes)

    @classmethod
    def from_points(cls, model: Any, points: Mapping[str, int | None], *, n_positions: int | None = None) -> NodeSet:
        """Nodes at hook points of your choice.

        Parameters
        ----------
        model:
            Run twice on a few tokens, to see that the points fire and how large they are.
        points:
            Hook point (a name, or a pattern with ``{layer}``, which stands for every layer) → the axis that is cut
            into nodes (0 is the batch and can't be cut), or None for one node. Heads of ``attn.hook_z``,
            ``attn.hook_k`` and ``attn.hook_v`` lie along axis 2, as do the neurons of ``mlp.hook_post``; heads of
            ``attn.hook_pattern`` along axis 1. Axis 1 of most others is the position in the prompt.
        n_positions:
            How many positions an axis of positions is cut into: the longest prompt's number of tokens. Position i is
            the i-th token from the start, so position nodes make sense for prompts of one template.

        Returns
        -------
        NodeSet
            In the order in which the points fire. Names are like "blocks.3.attn.hook_v[1]".

        Raises
        ------
        NodeError
            If the axis is not there, or an axis of positions is cut without ``n_positions``.
        HookError
            If a point does not exist, does not fire, can't be edited, or is given twice under two names.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> model = dfa.zoo.load("llama3-tiny-source")
        >>> dfa.NodeSet.from_points(model, {"blocks.{layer}.attn.hook_v": 2})[:2].names
        ('blocks.0.attn.hook_v[0]', 'blocks.0.attn.hook_v[1]')
        >>> len(dfa.NodeSet.from_points(model, {"blocks.{layer}.hook_resid_pre": 1}, n_positions=10))
        60
        """
        from dfa_lens.models.runner import Runner

        runner = Runner(model)
        axes: dict[str, int | None] = {}
        for pattern, axis in points.items():
            layers = range(runner.n_layers) if "{layer}" in pattern else (0,)
            axes |= {pattern.format(layer=layer): axis for layer in layers}
        runner.check_points(list(axes))
        layouts = runner.layout(list(axes))
        nodes: list[Node] = []
        for name, layer in runner.depths(list(axes)).items():
            axis = axes[name]
            if axis is None:
                nodes.append(Node(name, name, "custom", layer))
                continue
            shape, position_axes = layouts[name]
            if not 1 <= axis < len(shape):
                raise NodeError(
                    f"Hook point {name!r} has {len(shape)} axes (batch first): axis {axis} can't be cut into nodes; "
                    f"use 1 to {len(shape) - 1}, or None for one node."
                )
            kind, size = "custom", shape[axis]
            if axis in position_axes:
                if n_positions is None:
                    raise NodeError(
                        f"Axis {axis} of hook point {name!r} is the position in the prompt: say how many there are, "
                        "n_positions=pairs.clean.shape[1]."
                    )
                kind, size = "position", n_positions
            nodes += [Node(f"{name}[{i}]", name, kind, layer, axis, i, size) for i in range(size)]
        return cls(nodes)

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> NodeSet:
        """The inverse of :meth:`to_records`.

        Raises
        ------
        NodeError
            If they are not the records of a node set.
        """
        try:
            return cls((SpanNode if "span" in record else Node)(**record) for record in records)
        except TypeError as error:
            raise NodeError(f"Not a list of nodes: {short(error)}.") from None

    def to_records(self) -> list[dict[str, Any]]:
        """The nodes as plain dictionaries, for JSON."""
        return [asdict(node) for node in self._nodes]

    # --- reading it ------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The nodes' names in order."""
        return tuple(self._position)

    @cached_property
    def n_layers(self) -> int:
        """One more than the highest layer of any node."""
        return 1 + max(node.layer for node in self._nodes)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The nodes grouped by hook point, in the order of each group's first node."""
        by_point: dict[str, list[int]] = {}
        for position, node in enumerate(self._nodes):
            by_point.setdefault(node.point, []).append(position)
        sites = []
        for point, positions in by_point.items():
            first = self._nodes[positions[0]]
            members = [self._nodes[p] for p in positions]
            spans = tuple(node.span for node in members if isinstance(node, SpanNode))
            if spans:
                sites.append(self._site_of_spans(point, members, spans, tuple(positions)))
                continue
            whole = [node for node in members if node.axis is None]
            slices = tuple(node.index for node in members if node.index is not None)
            if (whole and len(members) > 1) or len(set(slices)) < len(members) - len(whole):
                raise NodeError(f"Nodes at hook point {point!r} overlap: {', '.join(n.name for n in members[:4])}.")
            if any((node.axis, node.size) != (first.axis, first.size) for node in members):
                raise NodeError(f"Nodes at hook point {point!r} cut it along different axes or into different sizes.")
            by_position = first.kind == "position"
            sites.append(Site(point, first.layer, first.axis, first.size, slices, tuple(positions), by_position))
        return tuple(sites)

    @staticmethod
    def _site_of_spans(point: str, members: Sequence[Node], spans: tuple[str, ...], positions: tuple[int, ...]) -> Site:
        first = members[0]
        if len(spans) < len(members):
            raise NodeError(f"At hook point {point!r} some nodes are at spans and others at all tokens.")
        if any((node.axis, node.size) != (first.axis, first.size) for node in members):
            raise NodeError(f"Nodes at hook point {point!r} cut it along different axes or into different sizes.")
        slices = tuple(node.index or 0 for node in members)
        if len(set(zip(slices, spans, strict=True))) < len(members):
            raise NodeError(f"Nodes at hook point {point!r} overlap: {', '.join(n.name for n in members[:4])}.")
        return Site(point, first.layer, first.axis, first.size, slices, positions, spans=spans)

    def at_spans(self, spans: Iterable[str]) -> NodeSet:
        """Every node at every one of some spans, a node's spans one after the other.

        Parameters
        ----------
        spans:
            Names, those of a :class:`~dfa_lens.data.spans.Schema`. Run such nodes on pairs that it was applied to.

        Raises
        ------
        NodeError
            If there are no spans, or a node is one at a span or a position already.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> dfa.NodeSet.for_sizes(2, 2)["m*"].at_spans(["subject", "answer"]).names
        ('m0@subject', 'm0@answer', 'm1@subject', 'm1@answer')
        """
        names = list(spans)
        if any(isinstance(node, SpanNode) or node.kind == "position" for node in self._nodes):
            raise NodeError("Nodes that are at spans or positions already can't be put at spans.")
        return NodeSet(
            SpanNode(f"{node.name}@{span}", node.point, node.kind, node.layer, node.axis, node.index, node.size, span)
            for node in self._nodes
            for span in names
        )

    @property
    def points(self) -> tuple[str, ...]:
        """The hook points, in the order of each one's first node."""
        return tuple(site.point for site in self.sites)

    def position(self, name: str) -> int:
        """Where the node called ``name`` stands."""
        if name not in self._position:
            example = ", ".join(repr(n) for n in self.names[:3])
            raise NodeError(f"No node {name!r} in this set of {len(self)} nodes ({example}, …).")
        return self._position[name]

    def where(
        self,
        condition: Callable[[Node], bool] | None = None,
        *,
        layer: SupportsIndex | Iterable[SupportsIndex] | None = None,
        kind: str | None = None,
        name: str | None = None,
    ) -> NodeSet:
        """The nodes that fulfil every condition given.

        Parameters
        ----------
        condition:
            A function of a :class:`Node`.
        layer, kind, name:
            A layer or several, a kind, a name or a name pattern ("a3.*").

        Raises
        ------
        NodeError
            If no node fulfils them.

        Examples
        --------
        >>> nodes = NodeSet.for_sizes(4, 2)
        >>> nodes.where(kind="head", layer=range(2)).names
        ('a0.h0', 'a0.h1', 'a1.h0', 'a1.h1')
        >>> nodes.where(lambda node: node.layer == 3, name="m*").names
        ('m3',)
        """
        layers = None if layer is None else _layers(layer)
        named = None if name is None else set(self._named(name))
        kept = [
            node
            for node in self._nodes
            if (condition is None or condition(node))
            and (layers is None or node.layer in layers)
            and (kind is None or node.kind == kind)
            and (named is None or node in named)
        ]
        if not kept:
            raise NodeError(f"None of the {len(self)} nodes fulfils the conditions.")
        return NodeSet(kept)

    def relative_depth(self) -> list[float]:
        """Each node's depth between 0 (first block, and before) and 1 (last block)."""
        last = max(self.n_layers - 1, 1)
        return [max(node.layer, 0) / last for node in self._nodes]

    def __add__(self, other: NodeSet) -> NodeSet:
        """The nodes of both, this set's first; the names must differ."""
        return NodeSet((*self._nodes, *other._nodes))

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    def __contains__(self, item: object) -> bool:
        return item in self._position if isinstance(item, str) else item in self._nodes

    def _named(self, name: str) -> list[Node]:
        """The node of that name, brackets and all; where there is none, those that the name as a pattern fits."""
        if name in self._position:
            return [self._nodes[self._position[name]]]
        return [node for node in self._nodes if fnmatch.fnmatchcase(node.name, name)]

    @overload
    def __getitem__(self, item: int) -> Node: ...
    @overload
    def __getitem__(self, item: slice | str | Iterable[Any]) -> NodeSet: ...
    def __getitem__(self, item: selection.Index) -> Node | NodeSet:
        """A node for an integer; for a name or pattern, a slice, or several of names or
        :data:`~dfa_lens.data.selection.Index`, a node set."""
        if isinstance(item, str):
            found = self._named(item)
            if not found:
                raise NodeError(
                    f"No node matches {short(item)!r}; names are like {self.names[0]!r} and {self.names[-1]!r}."
                )
            return NodeSet(found)
        single = selection.integer(item)
        if single is not None:
            return self._nodes[selection.row(single, len(self), "nodes", NodeIndexError)]
        rows = selection.rows(item, len(self), "nodes", NodeError, lookup=self.position)
        if not rows:
            raise NodeError("The selection has no nodes.")
        return NodeSet(self._nodes[row] for row in rows)

    def _content(self) -> tuple[Any, ...]:
        return (self._nodes,)

    # as ByContent has them, by tuples alone, since node sets are compared all the time
    def __eq__(self, other: object) -> bool:
        return isinstance(other, NodeSet) and self._nodes == other._nodes

    def __hash__(self) -> int:
        return hash(self._nodes)

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:3]) + (f", …, {self.names[-1]}" if len(self) > 3 else "")
        return f"NodeSet({len(self)} nodes: {shown})"


def cfg_of(model: Any) -> Any:
    """What a model says of its sizes: its ``cfg``. A Hugging Face model has none and is looked at."""
    if hasattr(model, "cfg") or not hasattr(model, "parameters"):
        return model.cfg
    from dfa_lens.models.runner import Runner

    return Runner(model).model.cfg


def _layers(layer: object) -> set[int]:
    several = [layer] if selection.integer(layer) is not None or not isinstance(layer, Iterable) else list(layer)
    found = {selection.integer(each) for each in several}
    if None in found:
        raise NodeError(f"layer is an integer or several, not {short(repr(layer))}.")
    return {each for each in found if each is not None}
