"""Alignment: the matrix W that carries node scores from a source model to a target model."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, overload

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.chain import Chain
from dfa_lens.data.content import ByContent, float_copy, plain
from dfa_lens.data.edge_alignment import EdgeAlignment, EdgeMap, sizes_of
from dfa_lens.data.edges import EdgeScores, EdgeSet
from dfa_lens.data.files import load_tensors, made_from, parse_json, read_bytes, save_tensors
from dfa_lens.data.nodes import HEAD_POINT, INPUT_POINT, MLP_POINT, Node, NodeSet
from dfa_lens.data.scaling import Scaling, scale
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import AlignmentError, FileError, short, unknown

_FORMAT = "dfa_lens alignment 1"


@dataclass(frozen=True, eq=False)
class LinearMap(ByContent):
    """One step of an alignment: scale the scores, multiply by W, add the bias.

    W and the bias are copied, as float32 on the CPU. Linear maps are equal (``==``) if all that they hold is.
    """

    W: Float[Tensor, "source target"]
    source: NodeSet
    target: NodeSet
    scaling: Scaling = "unit"
    bias: Float[Tensor, " target"] | None = None

    def __post_init__(self) -> None:
        if self.scaling not in get_args(Scaling):
            raise unknown("scaling", self.scaling, get_args(Scaling), AlignmentError)
        object.__setattr__(self, "W", float_copy(self.W, "W", AlignmentError))
        if self.bias is not None:
            object.__setattr__(self, "bias", float_copy(self.bias, "The bias", AlignmentError))
        if tuple(self.W.shape) != (len(self.source), len(self.target)):
            raise AlignmentError(
                f"W has shape {list(self.W.shape)}, but there are {len(self.source)} source and {len(self.target)} "
                "target nodes."
            )
        if not torch.isfinite(self.W).all():
            raise AlignmentError(f"W has {int((~torch.isfinite(self.W)).sum())} entries that are not finite.")
        if self.bias is not None and tuple(self.bias.shape) != (len(self.target),):
            raise AlignmentError(f"The bias has shape {list(self.bias.shape)} for {len(self.target)} target nodes.")
        if self.bias is not None and not torch.isfinite(self.bias).all():
            raise AlignmentError("The bias has entries that are not finite.")

    def __call__(self, values: Float[Tensor, "*task source"]) -> Float[Tensor, "*task target"]:
        """Target scores of source scores."""
        out = scale(values, self.scaling) @ self.W
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True, eq=False, repr=False)
class Alignment(Chain):
    """Carries node scores from a source model to a target model: ŝ = s·W (+ b, where one was trained).

    Made by :func:`dfa_lens.fit`, by :meth:`of`, or by chaining: ``second @ first`` first applies ``first``. Two are
    equal (``==``) if their stages and temperature are; history and meta, where they come from, do not count.

    Attributes
    ----------
    stages:
        One for a trained alignment; several for a chain.
    temperature:
        T in the soft mask g = sigmoid(ŝ/T).
    history:
        One record per training step (step, loss, divergence, mask_mean); empty when it was not trained.
    meta:
        How it was trained: JSON-like.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> alignment = dfa.controls.depth_mean(dfa.NodeSet.for_sizes(6, 8), dfa.NodeSet.for_sizes(10, 10))
    >>> scores = dfa.controls.random_scores(alignment.source)
    >>> alignment.transfer(scores).values.shape, bool((alignment.mask(scores) < 1).all())
    (torch.Size([110]), True)
    """

    stages: tuple[LinearMap, ...]

    unit: ClassVar[str] = "nodes"

    @classmethod
    def of(
        cls,
        W: Float[Tensor, "source target"],
        source: NodeSet,
        target: NodeSet,
        *,
        scaling: Scaling = "unit",
        bias: Float[Tensor, " target"] | None = None,
        temperature: float = 1.0,
        history: Sequence[Mapping[str, float | int]] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> Alignment:
        """An alignment of one matrix, with an added vector if ``bias`` is given; both are copied."""
        return cls((LinearMap(W, source, target, scaling, bias),), temperature, tuple(history), meta or {})

    @property
    def W(self) -> Float[Tensor, "source target"]:
        """The matrix; of a chain, the product of its matrices, without what scaling and biases between them do."""
        product = self.stages[0].W
        for stage in self.stages[1:]:
            product = product @ stage.W
        return product

    @property
    def source(self) -> NodeSet:
        """The nodes it takes scores on."""
        return self.stages[0].source

    @property
    def target(self) -> NodeSet:
        """The nodes it gives scores on."""
        return self.stages[-1].target

    @overload
    def transfer(self, scores: NodeScores) -> NodeScores: ...

    @overload
    def transfer(self, scores: EdgeScores, *, edges: EdgeSet) -> EdgeScores: ...

    def transfer(self, scores: NodeScores | EdgeScores, *, edges: EdgeSet | None = None) -> NodeScores | EdgeScores:
        """ŝ = s·W: scores on the target's nodes; of edge scores, W at both ends of every edge (:meth:`on_edges`).

        Parameters
        ----------
        edges:
            With edge scores, the target's edges.

        Raises
        ------
        ScoreError
            If the scores belong to other nodes than the alignment's source.
        AlignmentError
            If there are edge scores but no edges of the target, or the other way round.
        """
        if isinstance(scores, EdgeScores):
            if edges is None:
                raise AlignmentError("To transfer edge scores by an alignment of nodes, name the target's edges=.")
            return self.on_edges(scores.edges.all_of_model, edges).transfer(scores)
        if edges is not None:
            raise AlignmentError("edges= is for edge scores, and these are scores of nodes.")
        scores.require(self.source, "The source scores")
        values = scores.values
        for stage in self.stages:
            values = stage(values)
        return NodeScores(values, self.target, {"method": "transfer", "source": dict(scores.meta), **self.meta})

    def mask(self, scores: NodeScores) -> Float[Tensor, " target"]:
        """The soft mask g = sigmoid(ŝ/T) that the scores give on the target: 0 to 1 for every node."""
        return torch.sigmoid(self.transfer(scores).values / self.temperature)

    def on_edges(self, source: EdgeSet, target: EdgeSet) -> EdgeAlignment:
        """The alignment of edges that has W at both ends of every edge: Ŝ = Wᵀ·S·W.

        See :meth:`~dfa_lens.data.edge_alignment.EdgeMap.from_nodes` for inputs, logits, and what heads read. Biases
        have no place in it. In a chain, the models in between read keys and values head by head.

        Raises
        ------
        AlignmentError
            If the nodes are not the heads and MLP blocks (with the input or without) of models of these sizes.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> source, target = dfa.EdgeSet(2, 4, 2), dfa.EdgeSet(3, 4, 2)
        >>> nodes = dfa.controls.depth_mean(source.nodes[1:], target.nodes[1:])
        >>> nodes.on_edges(source, target)
        EdgeAlignment(82 → 190 edges)
        """
        inner = [EdgeSet(*sizes_of(stage.target)) for stage in self.stages[:-1]]
        edges = [source.all_of_model, *inner, target]
        maps = [
            EdgeMap.from_nodes(stage.W, stage.source, stage.target, first, second, scaling=stage.scaling)
            for stage, first, second in zip(self.stages, edges, edges[1:], strict=False)
        ]
        return EdgeAlignment(tuple(maps), self.temperature, (), {"of_nodes": dict(self.meta)})

    def contributions(self, scores: NodeScores) -> Float[Tensor, "source target"]:
        """How much each source node adds to each target node: s_i·W_ij, after scaling; the columns add up to ŝ.

        A bias comes from no source node, so with one the columns add up to ŝ less what the bias gives. In a chain the
        scaling to unit length is one factor over everything; "rank" and "signed-sqrt" between two matrices are not
        sums, so what a source node adds there has no meaning.

        Raises
        ------
        AlignmentError
            For a chain that scales by rank or square root after its first matrix.
        """
        scores.require(self.source, "The source scores")
        values = scores.values
        out = scale(values, self.stages[0].scaling)[:, None]
        for i, stage in enumerate(self.stages):
            if i and stage.scaling not in ("unit", "raw"):
                raise AlignmentError(f"Scaling {stage.scaling!r} inside a chain can't be split over source nodes.")
            if i and stage.scaling == "unit":
                out = out / values.norm()
            out = out * stage.W if i == 0 else out @ stage.W
            values = stage(values)
        return out

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: matrices, node sets, temperature, history and provenance."""
        tensors = {f"W.{i}": stage.W for i, stage in enumerate(self.stages)}
        tensors |= {f"bias.{i}": stage.bias for i, stage in enumerate(self.stages) if stage.bias is not None}
        description = {
            "temperature": self.temperature,
            "meta": dict(self.meta),
            "history": [dict(record) for record in self.history],
            "stages": [
                {"scaling": s.scaling, "source": s.source.to_records(), "target": s.target.to_records()}
                for s in self.stages
            ],
        }
        save_tensors(path, tensors, {"alignment": json.dumps(plain(description))}, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not an alignment.
        """
        tensors, metadata = load_tensors(path, _FORMAT, ("alignment",))
        return made_from(path, "an alignment", lambda: cls._read(tensors, parse_json(metadata["alignment"])))

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Alignment:
        """The alignment of a file's content; some error if it is none."""
        wrong = next((name for name, tensor in tensors.items() if not tensor.is_floating_point()), None)
        if wrong is not None:
            raise AlignmentError(f"{wrong} is {tensors[wrong].dtype}")
        stages = tuple(
            LinearMap(
                tensors[f"W.{i}"],
                NodeSet.from_records(record["source"]),
                NodeSet.from_records(record["target"]),
                record["scaling"],
                tensors.get(f"bias.{i}"),
            )
            for i, record in enumerate(description["stages"])
        )
        if len(tensors) != len(stages) + sum(stage.bias is not None for stage in stages):
            raise AlignmentError(f"it has {len(stages)} stages, but the tensors {', '.join(sorted(tensors))}")
        return cls(stages, description["temperature"], tuple(description["history"]), description["meta"])

    @classmethod
    def from_released(cls, path: str | Path) -> Alignment:
        """Read an alignment that the authors' released code saved.

        Such a file is a ``.pt`` dict with W, small_nodes, large_nodes and meta. It is read with ``weights_only=True``,
        so that it can't run code. The released code multiplies raw scores:
        ``scaling`` is "raw".

        Raises
        ------
        FileError
            If the file is missing, not such a dict, or names nodes that are not heads, MLP blocks or the input.
        """
        try:
            data = torch.load(io.BytesIO(read_bytes(path)), map_location="cpu", weights_only=True)
        except FileError:
            raise
        except Exception as error:  # a broken pickle raises nearly anything
            raise FileError(
                f"{path} is not a file of plain tensors that torch can read safely: {short(error)}"
            ) from error
        missing = [key for key in ("W", "small_nodes", "large_nodes") if not isinstance(data, dict) or key not in data]
        if missing:
            raise FileError(f"{path} has no {missing[0]!r}: it is not an alignment saved by the released code.")

        def make() -> Alignment:
            W = data["W"]
            if not isinstance(W, Tensor) or not W.is_floating_point():
                kind = W.dtype if isinstance(W, Tensor) else f"a {type(W).__name__}"
                raise AlignmentError(f"its W is {kind}, not a matrix of floating-point numbers")
            source, target = _named_nodes(data["small_nodes"]), _named_nodes(data["large_nodes"])
            return cls.of(W, source, target, scaling="raw", meta=dict(data.get("meta") or {}))

        return made_from(path, "an alignment saved by the released code", make)


def _named_nodes(names: Sequence[str]) -> NodeSet:
    """The node set whose names these are, in their order; the highest head tells how many heads there are."""
    if not isinstance(names, (list, tuple)):
        raise AlignmentError(f"its nodes are a {type(names).__name__}, not a list of names")
    found = []
    for name in names:
        match = re.fullmatch(r"a(\d{1,6})\.h(\d{1,6})|m(\d{1,6})|input", name) if isinstance(name, str) else None
        if match is None:
            known = "names like 'a0.h1', 'm0' and 'input' are known"
            raise AlignmentError(f"it names a node {short(repr(name))}; {known}")
        found.append(match)
    heads = 1 + max((int(match[2]) for match in found if match[2]), default=0)
    return NodeSet(_named_node(match, heads) for match in found)


def _named_node(match: re.Match[str], heads: int) -> Node:
    name, layer = match[0], int(match[1] or match[3] or -1)
    if match[1]:
        return Node(name, HEAD_POINT.format(layer=layer), "head", layer, 2, int(match[2]), heads)
    return Node(name, MLP_POINT.format(layer=layer), "mlp", layer) if match[3] else Node(name, INPUT_POINT, "input", -1)
