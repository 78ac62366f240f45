"""EdgeAlignment: two matrices, A and B, that carry edge scores from a source model to a target model.

Ŝ = Aᵀ·S·B (+ C, where a bias was trained), with S [writer, reader] the scores: A carries writers to writers, B readers
to readers. What would run backwards in the target is left out. The number of entries grows with the number of nodes,
not with that of edges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.chain import Chain
from dfa_lens.data.content import ByContent, float_copy, plain
from dfa_lens.data.edges import EdgeScores, EdgeSet
from dfa_lens.data.files import load_tensors, made_from, parse_json, save_tensors
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.scaling import Scaling, scale
from dfa_lens.errors import AlignmentError, unknown

_FORMAT = "dfa_lens edge alignment 1"


def scaled(scores: EdgeScores, scaling: Scaling) -> Float[Tensor, "writer reader"]:
    """S: the scores made ready to be carried over, 0 where there is none."""
    matrix = torch.zeros(scores.edges.shape, dtype=torch.float32)
    matrix[scores.edges.chosen] = scale(scores.flat, scaling)
    return matrix


@dataclass(frozen=True, eq=False)
class EdgeMap(ByContent):
    """One step of an edge alignment: scale the scores, multiply from both sides, add the bias.

    Attributes
    ----------
    A:
        [source writer, target writer].
    B:
        [source reader, target reader].
    source, target:
        The edges that it takes scores on (all of a model: what has no score counts as 0), and those that it gives
        scores on.
    scaling:
        See :data:`~dfa_lens.data.scaling.Scaling`.
    bias:
        [target writer, target reader] what is added, or None.

    Raises
    ------
    AlignmentError
        If a matrix has another shape or is not finite.
    """

    A: Float[Tensor, "source_writer target_writer"]
    B: Float[Tensor, "source_reader target_reader"]
    source: EdgeSet
    target: EdgeSet
    scaling: Scaling = "unit"
    bias: Float[Tensor, "target_writer target_reader"] | None = None

    def __post_init__(self) -> None:
        if self.scaling not in get_args(Scaling):
            raise unknown("scaling", self.scaling, get_args(Scaling), AlignmentError)
        object.__setattr__(self, "source", self.source.all_of_model)
        (writers, readers), (new_writers, new_readers) = self.source.shape, self.target.shape
        shapes = {"A": (writers, new_writers), "B": (readers, new_readers), "bias": self.target.shape}
        for name, shape in shapes.items():
            given = getattr(self, name)
            if given is None and name == "bias":
                continue
            matrix = float_copy(given, name, AlignmentError)
            if tuple(matrix.shape) != shape:
                raise AlignmentError(
                    f"{name} has shape {list(matrix.shape)}, but {list(shape)} is needed from the {self.source!r} to "
                    f"the {self.target!r}."
                )
            if name == "bias":
                matrix = matrix.masked_fill_(~self.target.chosen, 0.0)
            if not torch.isfinite(matrix).all():
                raise AlignmentError(f"{name} has {int((~torch.isfinite(matrix)).sum())} entries that are not finite.")
            object.__setattr__(self, name, matrix)

    @classmethod
    def from_nodes(
        cls,
        W: Float[Tensor, "source target"],
        source_nodes: NodeSet,
        target_nodes: NodeSet,
        source: EdgeSet,
        target: EdgeSet,
        *,
        scaling: Scaling = "unit",
    ) -> EdgeMap:
        """W at both ends of every edge.

        Between heads, queries go to queries, keys to keys and values to values. A key-value head stands for its heads:
        its score is spread evenly over them, carried over, and added up again. What goes from a head to an MLP block is
        carried from all three of its inputs, and from an MLP block to a head into all three. The input goes to the
        input and the logits go to the logits, where W has no row for them, with the root mean square length of its
        columns.

        Raises
        ------
        AlignmentError
            If the nodes are not the heads and MLP blocks (with the input or without) of models of these sizes.
        """
        for nodes, edges in ((source_nodes, source), (target_nodes, target)):
            if nodes not in (edges.nodes, edges.nodes[1:]):
                raise AlignmentError(
                    f"The alignment's {len(nodes)} nodes ({nodes.names[0]} … {nodes.names[-1]}) are not the heads and "
                    f"MLP blocks of the {edges!r}."
                )
        typical = float(W.pow(2).sum(0).mean().sqrt())
        whole = torch.zeros(len(source.nodes), len(target.nodes), dtype=torch.float32)
        whole[0, 0] = typical
        whole[len(source.nodes) - len(source_nodes) :, len(target.nodes) - len(target_nodes) :] = W
        return cls(whole, ReaderMap(source, target)(whole, typical), source, target, scaling)

    def __call__(self, scores: EdgeScores) -> EdgeScores:
        """Target scores of source scores."""
        scores.require(self.source, "The source scores")
        found = self.A.T @ scaled(scores, self.scaling) @ self.B
        return EdgeScores(found if self.bias is None else found + self.bias, self.target)


@dataclass(frozen=True, eq=False, repr=False)
class EdgeAlignment(Chain):
    """Carries edge scores from a source model to a target model: Ŝ = Aᵀ·S·B (+ C, where one was trained).

    Made by :func:`dfa_lens.fit` of edge scores, by :meth:`of`, from an alignment of nodes
    (:meth:`~dfa_lens.Alignment.on_edges`), or by chaining: ``second @ first`` first applies ``first``. Two are equal
    (``==``) if their stages and temperature are; history and meta, where they come from, do not count.

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
    >>> import torch
    >>> source, target = dfa.EdgeSet(1, 1), dfa.EdgeSet(1, 2)
    >>> alignment = dfa.EdgeAlignment.of(torch.ones(3, 4), torch.ones(5, 8), source, target)
    >>> scores = dfa.EdgeScores(torch.ones(3, 5), source)
    >>> len(alignment.transfer(scores)), alignment.mask(scores).shape
    (13, torch.Size([4, 8]))
    """

    stages: tuple[EdgeMap, ...]

    unit: ClassVar[str] = "edges"

    @staticmethod
    def _meet(first: EdgeMap, second: EdgeMap) -> bool:
        return first.target.all_of_model == second.source

    @classmethod
    def of(
        cls,
        A: Float[Tensor, "source_writer target_writer"],
        B: Float[Tensor, "source_reader target_reader"],
        source: EdgeSet,
        target: EdgeSet,
        *,
        scaling: Scaling = "unit",
        bias: Float[Tensor, "target_writer target_reader"] | None = None,
        temperature: float = 1.0,
        history: Sequence[Mapping[str, float | int]] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> EdgeAlignment:
        """An alignment of one pair of matrices, with an added matrix if ``bias`` is given; all are copied."""
        return cls((EdgeMap(A, B, source, target, scaling, bias),), temperature, tuple(history), meta or {})

    @property
    def source(self) -> EdgeSet:
        """The edges that it takes scores on: all of the source model."""
        return self.stages[0].source

    @property
    def target(self) -> EdgeSet:
        """The edges that it gives scores on."""
        return self.stages[-1].target

    def transfer(self, scores: EdgeScores) -> EdgeScores:
        """Ŝ = Aᵀ·S·B: scores on the target's edges; an edge of the source without a score counts as 0.

        Raises
        ------
        ScoreError
            If the scores belong to edges of another model than the alignment's source.
        """
        found = scores
        for stage in self.stages:
            found = stage(found)
        return EdgeScores(found.values, self.target, {"method": "transfer", "source": dict(scores.meta), **self.meta})

    def mask(self, scores: EdgeScores) -> Float[Tensor, "writer reader"]:
        """The soft mask g = sigmoid(ŝ/T) that the scores give on the target: 0 to 1 for every edge, NaN elsewhere."""
        return torch.sigmoid(self.transfer(scores).values / self.temperature)

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: matrices, edge sets, temperature, history and provenance."""
        tensors: dict[str, Tensor] = {}
        for i, stage in enumerate(self.stages):
            tensors |= {f"A.{i}": stage.A, f"B.{i}": stage.B}
            if stage.bias is not None:
                tensors[f"bias.{i}"] = stage.bias
            if stage.target != stage.target.all_of_model:
                tensors[f"edges.{i}"] = stage.target.chosen.to(torch.uint8)
        description = {
            "temperature": self.temperature,
            "meta": dict(self.meta),
            "history": [dict(record) for record in self.history],
            "stages": [
                {"scaling": s.scaling, "source": _sizes(s.source), "target": _sizes(s.target)} for s in self.stages
            ],
        }
        save_tensors(path, tensors, {"alignment": json.dumps(plain(description))}, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> EdgeAlignment:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not an alignment of edges.
        """
        tensors, metadata = load_tensors(path, _FORMAT, ("alignment",))
        return made_from(path, "an edge alignment", lambda: cls._read(tensors, parse_json(metadata["alignment"])))

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> EdgeAlignment:
        """The alignment of a file's content; some error if it is none."""
        wrong = next((n for n, each in tensors.items() if not each.is_floating_point() and n[:5] != "edges"), None)
        if wrong is not None:
            raise AlignmentError(f"{wrong} is {tensors[wrong].dtype}")
        stages, used = [], 0
        for i, record in enumerate(description["stages"]):
            writers = tensors[f"A.{i}"].shape
            source, target = (_of_sizes(record[end], n) for end, n in zip(("source", "target"), writers, strict=True))
            chosen, bias = tensors.get(f"edges.{i}"), tensors.get(f"bias.{i}")
            if chosen is not None:
                target = target.choose(chosen.bool())
            stages.append(EdgeMap(tensors[f"A.{i}"], tensors[f"B.{i}"], source, target, record["scaling"], bias))
            used += 2 + (chosen is not None) + (bias is not None)
        if len(tensors) != used:
            raise AlignmentError(f"it has {len(stages)} stages, but the tensors {', '.join(sorted(tensors))}")
        return cls(tuple(stages), description["temperature"], tuple(description["history"]), description["meta"])


def _sizes(edges: EdgeSet) -> list[int]:
    return [edges.n_layers, edges.n_heads, edges.n_kv_heads, *([1] if edges.parallel else [])]


def _of_sizes(sizes: Sequence[int], n_writers: int) -> EdgeSet:
    """The edges of saved sizes, which must be those of so many writers: a broken file makes no huge set."""
    n_layers, n_heads, n_kv_heads, *parallel = sizes
    if 1 + n_layers * (n_heads + 1) != n_writers:
        raise AlignmentError(f"it has matrices for {n_writers} writers, but sizes {sizes}")
    return EdgeSet(n_layers, n_heads, n_kv_heads, parallel=bool(parallel))


def sizes_of(nodes: NodeSet) -> tuple[int, int]:
    """Layers and heads of the model whose heads and MLP blocks (with the input or without) these nodes are.

    Raises
    ------
    AlignmentError
        If they are other nodes.
    """
    n_heads = sum(node.kind == "head" and node.layer == 0 for node in nodes)
    if n_heads and nodes in (
        NodeSet.for_sizes(nodes.n_layers, n_heads),
        NodeSet.for_sizes(nodes.n_layers, n_heads, with_input=True),
    ):
        return nodes.n_layers, n_heads
    raise AlignmentError(f"{len(nodes)} nodes ({nodes.names[0]} … {nodes.names[-1]}) are not a model's writers.")


# --- readers as nodes ----------------------------------------------------------------------------------------------


class ReaderMap:
    """How a map between writers becomes one between readers; see :meth:`EdgeMap.from_nodes`.

    Parameters
    ----------
    source, target:
        The edges of the two models.
    """

    def __init__(self, source: EdgeSet, target: EdgeSet) -> None:
        ours, theirs = source.inputs.float(), target.inputs.float()
        # a key-value head's score is the sum over its heads: spread evenly over those of the source, and added up again
        self.spread, self.gather = ours / ours.sum(1, keepdim=True).clamp_min(1), theirs.T.contiguous()
        first, second = ([site.kind for site in edges.sites for _ in range(len(site))] for edges in (source, target))
        #: [source reader, target reader] 1 where readers are of the same kind
        self.same_kind = torch.tensor([[float(a == b) for b in second] for a in first], dtype=torch.float32)
        #: and where one of the two is an MLP block's
        self.allowed = torch.tensor([[float(a == b or "mlp" in (a, b)) for b in second] for a in first])
        self.allowed[-1], self.allowed[:, -1] = 0.0, 0.0

    def to(self, device: torch.device) -> ReaderMap:
        """Itself, with its tensors on a device."""
        for name in ("spread", "gather", "same_kind", "allowed"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def __call__(
        self, W: Float[Tensor, "source target"], logits: Float[Tensor, ""] | float
    ) -> Float[Tensor, "source_reader target_reader"]:
        """The map between readers, with ``logits`` from the logits to the logits."""
        between = (self.spread @ W @ self.gather) * self.allowed
        corner = torch.zeros_like(between)
        corner[-1, -1] = 1.0
        return between + logits * corner
