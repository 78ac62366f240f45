"""How sure it is that a node is in the circuit: its probability over prompts and seeds, in the place of a bare list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data import html
from dfa_lens.data.circuit import Circuit
from dfa_lens.data.content import ByContent, float_copy
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.errors import CircuitError


class Membership(ByContent):
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

    def __init__(
        self,
        probabilities: Float[Tensor, " node"],
        nodes: NodeSet,
        k: int,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        values = float_copy(probabilities, "Probabilities", CircuitError)
        if values.shape != (len(nodes),) or not bool(((values >= 0) & (values <= 1)).all()):
            raise CircuitError(f"A probability, from 0 to 1, is needed for each of the {len(nodes)} nodes.")
        self.probabilities: Tensor = values
        self.nodes = nodes
        self.k = _size(k, len(nodes))
        self.meta: dict[str, Any] = dict(meta or {})

    @classmethod
    def of(cls, scores: Sequence[NodeScores], k: int, *, ranking: Ranking | None = None) -> Membership:
        """Over rankings as they are: transfers with several seeds, say, or several methods. Default: each by its own.

        Raises
        ------
        CircuitError, ScoreError
            If there are none, they are of different nodes, or k is out of range.
        """
        nodes = _nodes(scores)
        inside = torch.zeros(len(nodes), dtype=torch.float64)
        for each in scores:
            inside[each.order(ranking)[: _size(k, len(nodes))]] += 1
        return cls(inside / len(scores), nodes, k, {"rankings": len(scores)})

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
        size, n = _size(k, len(nodes)), len(scores)
        if n < 2:
            raise CircuitError("One score vector can't be resampled: give one for each prompt pair.")
        if resamples < 1:
            raise CircuitError(f"resamples must be at least 1, not {resamples}.")
        scores[0].order(ranking)  # whether there is such a ranking
        values = torch.stack([each.values.double() for each in scores])
        generator = torch.Generator().manual_seed(seed)
        inside = torch.zeros(len(nodes), dtype=torch.float64)
        for _ in range(resamples):
            mean = values[torch.randint(n, (n,), generator=generator)].mean(0)
            key = mean if ranking == "signed" else mean.abs()
            inside[key.argsort(descending=True, stable=True)[:size]] += 1
        meta = {"prompts": n, "resamples": resamples, "seed": seed}
        return cls(inside / resamples, nodes, k, meta)

    @classmethod
    def pooled(cls, parts: Sequence[Membership]) -> Membership:
        """The mean of several, of one size and over the same nodes: of seeds, each with its prompts resampled.

        Raises
        ------
        CircuitError
            If there are none, or they differ in nodes or size.
        """
        if not parts or any((each.nodes, each.k) != (parts[0].nodes, parts[0].k) for each in parts):
            raise CircuitError("Memberships are pooled if there are some, of the same nodes and of one size.")
        mean = torch.stack([each.probabilities.double() for each in parts]).mean(0)
        return cls(mean, parts[0].nodes, parts[0].k, {"pooled": [each.meta for each in parts]})

    def circuit(self, at_least: float = 0.5, *, name: str | None = None) -> Circuit:
        """The nodes whose probability is at least so high; it may have more or fewer than k."""
        if not 0 < at_least <= 1:
            raise CircuitError(f"at_least is a probability above 0, not {at_least}.")
        names = [
            name for name, p in zip(self.nodes.names, self.probabilities.tolist(), strict=True) if p >= at_least - 1e-9
        ]
        meta = {**self.meta, "k": self.k, "membership at least": at_least}
        return Circuit(names, self.nodes, name=name or f"top {self.k}, p ≥ {at_least:g}", meta=meta)

    def to_frame(self) -> Any:
        """A pandas table, a row per node, the surest first: node, kind, layer, index, probability."""
        import pandas as pd

        table = pd.DataFrame(
            {
                "node": self.nodes.names,
                "kind": [node.kind for node in self.nodes],
                "layer": [node.layer for node in self.nodes],
                "index": pd.array([node.index for node in self.nodes], dtype="Int64"),
                "probability": self.probabilities.numpy(),
            }
        )
        return table.sort_values("probability", ascending=False, kind="stable", ignore_index=True)

    def __getitem__(self, name: str) -> float:
        """The probability of the node called ``name``."""
        return float(self.probabilities[self.nodes.position(name)])

    def __len__(self) -> int:
        return len(self.nodes)

    def _content(self) -> tuple[Any, ...]:
        return self.probabilities, self.nodes, self.k

    def __repr__(self) -> str:
        sure, unsure = int((self.probabilities >= 0.95).sum()), int(((self.probabilities - 0.5).abs() < 0.45).sum())
        return (
            f"Membership(the {self.k} best of {len(self)} nodes: {sure} in at least 95 % of rankings, {unsure} in 5 to "
            "95 %)"
        )

    def _repr_html_(self) -> str:
        """The surest nodes, for notebooks."""
        return html.shown(repr(self), self.to_frame())


def _nodes(scores: Sequence[NodeScores]) -> NodeSet:
    if not scores:
        raise CircuitError("There are no scores to rank nodes by.")
    for i, each in enumerate(scores):
        each.require(scores[0].nodes, f"The scores number {i}")
    return scores[0].nodes


def _size(k: int, n: int) -> int:
    if not 0 <= k <= n:
        raise CircuitError(f"k must be between 0 and the number of nodes, {n}, not {k}.")
    return k
