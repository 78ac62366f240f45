"""How sure it is that a node or an edge is in the circuit: its probability over prompts and seeds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data import html
from dfa_lens.data.circuit import Circuit
from dfa_lens.data.content import ByContent, float_copy
from dfa_lens.data.edge_circuit import EdgeCircuit
from dfa_lens.data.edges import EdgeScores, EdgeSet, Selection
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.errors import CircuitError

Own = TypeVar("Own", bound="_Probabilities")


class _Probabilities(ByContent):
    """What memberships of nodes and of edges have in common: a probability for each of the parts of a model."""

    unit: ClassVar[str]
    k: int
    meta: dict[str, Any]
    probabilities: Tensor

    def __init__(self, probabilities: Tensor, parts: Any, k: int, meta: Mapping[str, Any] | None) -> None:
        values = float_copy(probabilities, "Probabilities", CircuitError)
        if values.shape != (len(parts),) or not bool(((values >= 0) & (values <= 1)).all()):
            raise CircuitError(f"A probability, from 0 to 1, is needed for each of the {len(parts)} {self.unit}.")
        self.probabilities = values
        self._parts = parts
        self.k = self._size(k, parts)
        self.meta = dict(meta or {})

    @classmethod
    def _size(cls, k: int, parts: Any) -> int:
        if not 0 <= k <= len(parts):
            raise CircuitError(f"k must be between 0 and the number of {cls.unit}, {len(parts)}, not {k}.")
        return k

    @classmethod
    def _of(cls: type[Own], orders: Sequence[Tensor], k: int, parts: Any, meta: Mapping[str, Any]) -> Own:
        """From rankings, each best first."""
        size = cls._size(k, parts)
        inside = torch.zeros(len(parts), dtype=torch.float64)
        for order in orders:
            inside[order[:size]] += 1
        return cls(inside / len(orders), parts, k, meta)

    @classmethod
    def _resampled(
        cls: type[Own], values: Tensor, order: Callable[[Tensor], Tensor], k: int, parts: Any, resamples: int, seed: int
    ) -> Own:
        """From the rankings of means of [prompt, part] values, prompts drawn with replacement."""
        cls._size(k, parts)
        n = len(values)
        if n < 2:
            raise CircuitError("One score vector can't be resampled: give one for each prompt pair.")
        if resamples < 1:
            raise CircuitError(f"resamples must be at least 1, not {resamples}.")
        generator = torch.Generator().manual_seed(seed)
        inside = torch.zeros(len(parts), dtype=torch.float64)
        for _ in range(resamples):
            inside[order(values[torch.randint(n, (n,), generator=generator)].mean(0))[:k]] += 1
        return cls(inside / resamples, parts, k, {"prompts": n, "resamples": resamples, "seed": seed})

    @classmethod
    def pooled(cls: type[Own], parts: Sequence[Own]) -> Own:
        """The mean of several, of one size and over the same nodes: of seeds, each with its prompts resampled.

        Raises
        ------
        CircuitError
            If there are none, or they differ in nodes (edges) or size.
        """
        if not parts or any((each._parts, each.k) != (parts[0]._parts, parts[0].k) for each in parts):
            raise CircuitError(f"Memberships are pooled if there are some, of the same {cls.unit} and of one size.")
        mean = torch.stack([each.probabilities.double() for each in parts]).mean(0)
        return cls(mean, parts[0]._parts, parts[0].k, {"pooled": [each.meta for each in parts]})

    def _at_least(self, at_least: float, name: str | None) -> tuple[Tensor, dict[str, Any]]:
        """Which parts are so probable, and what their circuit is called and comes from."""
        if not 0 < at_least <= 1:
            raise CircuitError(f"at_least is a probability above 0, not {at_least}.")
        meta = {**self.meta, "k": self.k, "membership at least": at_least}
        return self.probabilities >= at_least - 1e-9, {"name": name or f"top {self.k}, p ≥ {at_least:g}", "meta": meta}

    @abstractmethod
    def to_frame(self) -> Any:
        """A pandas table, the surest first."""

    def _surest_first(self, columns: Mapping[str, Any]) -> Any:
        import pandas as pd

        table = pd.DataFrame({**columns, "probability": self.probabilities.numpy()})
        return table.sort_values("probability", ascending=False, kind="stable", ignore_index=True)

    def __len__(self) -> int:
        return len(self._parts)

    def _content(self) -> tuple[Any, ...]:
        return self.probabilities, self._parts, self.k

    def __repr__(self) -> str:
        sure, unsure = int((self.probabilities >= 0.95).sum()), int(((self.probabilities - 0.5).abs() < 0.45).sum())
        return (
            f"{type(self).__name__}(the {self.k} best of {len(self)} {self.unit}: {sure} in at least 95 % of rankings, "
            f"{unsure} in 5 to 95 %)"
        )

    def _repr_html_(self) -> str:
        """The surest, for notebooks."""
        return html.shown(repr(self), self.to_frame())


class Membership(_Probabilities):
    """For every node, in which part of equally good rankings it is among the k best.

    Parameters
    ----------
    probabilities:
        [node], from 0 to 1.
    nodes:
        What they belong to.
    k:
        The size of the circuits.
    meta:
        What was varied.

    Raises
    ------
    CircuitError
        If the probabilities are of other nodes, or k is out of range.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(1, 2)
    >>> seeds = [dfa.NodeScores(torch.tensor(values), nodes) for values in ([3.0, 2.0, 1.0], [3.0, 1.0, 2.0])]
    >>> found = dfa.Membership.of(seeds, k=2)
    >>> found["a0.h0"], found["m0"], found.circuit(at_least=0.9).names
    (1.0, 0.5, ('a0.h0',))
    """

    unit = "nodes"

    def __init__(
        self,
        probabilities: Float[Tensor, " node"],
        nodes: NodeSet,
        k: int,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(probabilities, nodes, k, meta)
        self.nodes = nodes

    @classmethod
    def of(cls, scores: Sequence[NodeScores], k: int, *, ranking: Ranking | None = None) -> Membership:
        """Over rankings as they are: transfers with several seeds, say, or several methods. Default: each by its own.

        Raises
        ------
        CircuitError, ScoreError
            If there are none, they are of different nodes, or k is out of range.
        """
        nodes = _nodes(scores)
        return cls._of([each.order(ranking) for each in scores], k, nodes, {"rankings": len(scores)})

    @classmethod
    def resampled(
        cls,
        scores: Sequence[NodeScores],
        k: int,
        *,
        ranking: Ranking = "signed",
        resamples: int = 1000,
        seed: int = 0,
    ) -> Membership:
        """Over a bootstrap of what the scores are a mean of.

        Parameters
        ----------
        scores:
            One for each prompt pair (or for each of several equally large groups of them), at least two.
        resamples:
            How often they are drawn with replacement, and averaged; the k best of each mean count.

        Raises
        ------
        CircuitError, ScoreError
            If there are fewer than two, they are of different nodes, or k or the number of resamples is out of range.

        Examples
        --------
        >>> import torch, dfa_lens as dfa
        >>> nodes = dfa.NodeSet.for_sizes(1, 2)
        >>> prompts = [dfa.NodeScores(torch.tensor([9.0, x, 1.0]), nodes) for x in (0.0, 0.5, 2.0, 2.0)]
        >>> found = dfa.Membership.resampled(prompts, k=2)
        >>> found["a0.h0"], 0.4 < found["a0.h1"] < 0.9
        (1.0, True)
        """
        nodes = _nodes(scores)
        scores[0].order(ranking)  # whether there is such a ranking

        def order(mean: Tensor) -> Tensor:
            return (mean if ranking == "signed" else mean.abs()).argsort(descending=True, stable=True)

        return cls._resampled(torch.stack([each.values.double() for each in scores]), order, k, nodes, resamples, seed)

    def circuit(self, at_least: float = 0.5, *, name: str | None = None) -> Circuit:
        """The nodes whose probability is at least so high; it may have more or fewer than k."""
        inside, told = self._at_least(at_least, name)
        return Circuit([self.nodes.names[i] for i in inside.nonzero()[:, 0].tolist()], self.nodes, **told)

    def to_frame(self) -> Any:
        """A pandas table, a row per node, the surest first: node, kind, layer, index, probability."""
        import pandas as pd

        return self._surest_first(
            {
                "node": self.nodes.names,
                "kind": [node.kind for node in self.nodes],
                "layer": [node.layer for node in self.nodes],
                "index": pd.array([node.index for node in self.nodes], dtype="Int64"),
            }
        )

    def __getitem__(self, name: str) -> float:
        """The probability of the node called ``name``."""
        return float(self.probabilities[self.nodes.position(name)])


class EdgeMembership(_Probabilities):
    """For every edge, in which part of equally good rankings it is among the k best.

    Parameters
    ----------
    probabilities:
        [edge], from 0 to 1.
    edges, k, meta:
        As for :class:`Membership`.

    Raises
    ------
    CircuitError
        If the probabilities are of other edges, or k is out of range.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> edges = dfa.EdgeSet(1, 1).without_input()
    >>> seeds = [dfa.EdgeScores.of_flat(torch.tensor(v), edges) for v in ([3.0, 2.0, 1.0], [3.0, 1.0, 2.0])]
    >>> found = dfa.EdgeMembership.of(seeds, k=2)
    >>> found["a0.h0->m0"], found["m0->logits"], found.circuit(at_least=0.9).names
    (1.0, 0.5, ('a0.h0->m0',))
    """

    unit = "edges"

    def __init__(
        self,
        probabilities: Float[Tensor, " edge"],
        edges: EdgeSet,
        k: int,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(probabilities, edges, k, meta)
        self.edges = edges

    @classmethod
    def of(
        cls,
        scores: Sequence[EdgeScores],
        k: int,
        *,
        ranking: Ranking = "signed",
        selection: Selection = "top",
    ) -> EdgeMembership:
        """Over rankings as they are, as :meth:`Membership.of`.

        Raises
        ------
        CircuitError, ScoreError
            If there are none, they are of different edges, or k is out of range.
        """
        edges = _edges(scores)
        orders = [each.order(ranking, selection=selection) for each in scores]
        return cls._of(orders, k, edges, {"rankings": len(scores)})

    @classmethod
    def resampled(
        cls,
        scores: Sequence[EdgeScores],
        k: int,
        *,
        ranking: Ranking = "signed",
        selection: Selection = "top",
        resamples: int = 1000,
        seed: int = 0,
    ) -> EdgeMembership:
        """Over a bootstrap of what the scores are a mean of, as :meth:`Membership.resampled`.

        Raises
        ------
        CircuitError, ScoreError
            If there are fewer than two, they are of different edges, or k or the number of resamples is out of range.
        """
        edges = _edges(scores)

        def order(mean: Tensor) -> Tensor:
            return EdgeScores.of_flat(mean, edges).order(ranking, selection=selection)

        flat = torch.stack([each.flat.double() for each in scores])
        return cls._resampled(flat, order, k, edges, resamples, seed)

    def circuit(self, at_least: float = 0.5, *, name: str | None = None) -> EdgeCircuit:
        """The edges whose probability is at least so high; it may have more or fewer than k."""
        inside, told = self._at_least(at_least, name)
        return EdgeCircuit(self.edges.mask(self.edges.positions[inside]), self.edges, **told)

    def to_frame(self) -> Any:
        """A pandas table, a row per edge, the surest first: edge, writer, reader, probability."""
        ends = list(self.edges)
        return self._surest_first(
            {
                "edge": [str(edge) for edge in ends],
                "writer": [edge.writer for edge in ends],
                "reader": [edge.reader for edge in ends],
            }
        )

    def __getitem__(self, edge: str | tuple[str, str]) -> float:
        """The probability of an edge: "a0.h1->m2", or writer and reader."""
        row, column = self.edges.position(edge)
        return float(self.probabilities[int(self.edges.chosen.flatten()[: row * self.edges.shape[1] + column].sum())])


def _nodes(scores: Sequence[NodeScores]) -> NodeSet:
    if not scores:
        raise CircuitError("There are no scores to rank nodes by.")
    for i, each in enumerate(scores):
        each.require(scores[0].nodes, f"The scores number {i}")
    return scores[0].nodes


def _edges(scores: Sequence[EdgeScores]) -> EdgeSet:
    if not scores:
        raise CircuitError("There are no scores to rank edges by.")
    for i, each in enumerate(scores):
        if each.edges != scores[0].edges:
            raise CircuitError(
                f"The scores number {i} are of the {each.edges!r}, the first of the {scores[0].edges!r}."
            )
    return scores[0].edges
