"""NodeScores: one number per node, with its provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.data import html, mib_nodes
from dfa_lens.data.circuit import Circuit
from dfa_lens.data.content import ByContent, float_copy, plain
from dfa_lens.data.files import load_tensors, made_from, parse_json, save_tensors
from dfa_lens.data.nodes import NodeSet
from dfa_lens.errors import FileError, ScoreError, short, unknown

Ranking = Literal["signed", "absolute"]
"""How nodes are ordered: by score, or by its absolute value. Ties keep node order."""

_FORMAT = "dfa_lens scores 1"


class NodeScores(ByContent):
    """A score for every node of a node set.

    Positive means: restoring this node's clean activation helps the metric. Scores are equal (``==``) if their values,
    nodes and :attr:`ranking` are; where they come from does not count.

    Parameters
    ----------
    values:
        [node], any floating dtype; copied, as float32 on the CPU.
    nodes:
        The node set that they belong to.
    meta:
        Where they come from (method, metric, number of examples, …): JSON-like. ``"ranking": "absolute"`` says that
        they rank by size where nothing else is asked for.

    Raises
    ------
    ScoreError
        If the values are no numbers, their number is wrong, or one is not finite.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> nodes = dfa.NodeSet.for_sizes(1, 2)
    >>> scores = dfa.NodeScores(torch.tensor([0.1, 2.0, -1.0]), nodes)
    >>> scores.top(2)
    {'a0.h1': 2.0, 'a0.h0': 0.10000000149011612}
    """

    def __init__(self, values: Float[Tensor, " node"], nodes: NodeSet, meta: Mapping[str, Any] | None = None) -> None:
        values = float_copy(values, "Scores", ScoreError)
        if values.ndim != 1 or len(values) != len(nodes):
            raise ScoreError(f"Scores of shape {list(values.shape)} for {len(nodes)} nodes; one per node is needed.")
        finite = torch.isfinite(values)
        if not finite.all():
            bad = [nodes.names[i] for i in (~finite).nonzero()[:, 0].tolist()]
            raise ScoreError(
                f"{len(bad)} of {len(nodes)} scores are not finite (first: {values[~finite][0].item()} at {bad[0]}). "
                "In half precision an overflow in the model is the usual cause."
            )
        self.values: Tensor = values
        self.nodes = nodes
        self.meta: dict[str, Any] = dict(meta or {})

    # --- reading ---------------------------------------------------------------------------------------------

    @property
    def ranking(self) -> Ranking:
        """How they rank where nothing else is asked for: by size if ``meta["ranking"]`` is "absolute", else signed.

        A functional alignment says so of what it carries (:func:`dfa_lens.fit_functional`).
        """
        return "absolute" if self.meta.get("ranking") == "absolute" else "signed"

    def order(self, ranking: Ranking | None = None) -> Int[Tensor, " node"]:
        """The nodes' positions, best first; ties keep node order. Default: by their own :attr:`ranking`."""
        ranking = self.ranking if ranking is None else ranking
        if ranking not in ("signed", "absolute"):
            raise unknown("ranking", ranking, ("signed", "absolute"), ScoreError)
        key = self.values if ranking == "signed" else self.values.abs()
        return torch.argsort(key, descending=True, stable=True)

    def ranks(self, ranking: Ranking | None = None) -> Int[Tensor, " node"]:
        """Each node's rank: 1 for the best."""
        out = torch.empty(len(self), dtype=torch.long)
        out[self.order(ranking)] = torch.arange(1, len(self) + 1)
        return out

    def top(self, k: int, *, ranking: Ranking | None = None) -> dict[str, float]:
        """The ``k`` best nodes, best first, with their scores."""
        if not 0 <= k <= len(self):
            raise ScoreError(f"k must be between 0 and the number of nodes, {len(self)}, not {k}.")
        return {self.nodes.names[i]: float(self.values[i]) for i in self.order(ranking)[:k].tolist()}

    def circuit(self, k: int, *, ranking: Ranking | None = None, name: str | None = None) -> Circuit:
        """The ``k`` best nodes as a circuit: the one that a faithfulness curve runs at size ``k``.

        Parameters
        ----------
        k:
            How many nodes.
        ranking:
            As for the curve.
        name:
            What the circuit is called; default: "top k".

        Raises
        ------
        ScoreError
            If ``k`` is out of range.

        Examples
        --------
        >>> import torch, dfa_lens as dfa
        >>> scores = dfa.NodeScores(torch.tensor([0.1, 2.0, -1.0]), dfa.NodeSet.for_sizes(1, 2))
        >>> scores.circuit(2)
        Circuit('top 2': 2 of 3 nodes: a0.h0, a0.h1)
        """
        ranking = self.ranking if ranking is None else ranking
        names = self.top(k, ranking=ranking)
        return Circuit(names, self.nodes, name=name or f"top {k}", meta={**self.meta, "k": k, "ranking": ranking})

    def to_frame(self) -> Any:
        """A pandas table, a row per node: node, kind, layer, index, score, rank."""
        import pandas as pd

        return pd.DataFrame(
            {
                "node": self.nodes.names,
                "kind": [node.kind for node in self.nodes],
                "layer": [node.layer for node in self.nodes],
                "index": pd.array([node.index for node in self.nodes], dtype="Int64"),
                "score": self.values.numpy(),
                "rank": self.ranks().numpy(),
            }
        )

    @classmethod
    def from_frame(cls, table: Any, nodes: NodeSet | None = None, meta: Mapping[str, Any] | None = None) -> NodeScores:
        """From a pandas table with the columns ``node`` and ``score``, in any order of rows.

        Parameters
        ----------
        table:
            What :meth:`to_frame` gives, or a table of your own; other columns do not count.
        nodes:
            The nodes of the model; default: the heads and MLP blocks (and the input) that the names are, all of them.
        meta:
            Where the scores come from.

        Raises
        ------
        ScoreError
            If a column is missing, a node is missing, unknown or given twice, or a score is no finite number.

        Examples
        --------
        >>> import pandas as pd, dfa_lens as dfa
        >>> table = pd.DataFrame({"node": ["m0", "a0.h1", "a0.h0"], "score": [3.0, 2.0, 1.0]})
        >>> dfa.NodeScores.from_frame(table).values.tolist()
        [1.0, 2.0, 3.0]
        """
        for column in ("node", "score"):
            if column not in table:
                raise unknown("column", column, [str(each) for each in table.columns], ScoreError)
        names, given = [str(name) for name in table["node"]], table["score"].tolist()
        scores = dict(zip(names, given, strict=True))
        if len(scores) < len(names):
            raise ScoreError(f"Node {next(n for n in names if names.count(n) > 1)!r} is in the table twice.")
        nodes = nodes if nodes is not None else _nodes_called(names)
        missing = next((name for name in nodes.names if name not in scores), None)
        if missing is not None:
            raise ScoreError(f"The table lacks node {missing!r}: it has {len(scores)} nodes, not {len(nodes)}.")
        foreign = next((name for name in scores if name not in nodes), None)
        if foreign is not None:
            raise ScoreError(f"The table has a node {short(foreign)!r}, which is not among the {len(nodes)} nodes.")
        try:
            values = torch.tensor([float(scores[name]) for name in nodes.names], dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ScoreError(f"The scores must be numbers: {short(error)}.") from None
        return cls(values, nodes, meta)

    def require(self, nodes: NodeSet, what: str = "these scores") -> None:
        """A :class:`ScoreError` unless the scores belong to ``nodes``."""
        if self.nodes != nodes:
            raise ScoreError(
                f"{what} belong to {len(self.nodes)} nodes ({self.nodes.names[0]} … {self.nodes.names[-1]}), but "
                f"{len(nodes)} are expected ({nodes.names[0]} … {nodes.names[-1]}): they come from another model or "
                "another choice of nodes."
            )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> float:
        """The score of the node called ``name``."""
        return float(self.values[self.nodes.position(name)])

    def _content(self) -> tuple[Any, ...]:
        own = self.values, self.nodes
        return own if self.ranking == "signed" else (*own, self.ranking)

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {score:+.3g}" for name, score in self.top(min(3, len(self))).items())
        method = f"{self.meta['method']}, " if "method" in self.meta else ""
        return f"NodeScores({method}{len(self)} nodes, best: {best})"

    def _repr_html_(self) -> str:
        """The best nodes, for notebooks."""
        return html.shown(repr(self), self.to_frame().sort_values("rank"))

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the values, the nodes and the provenance."""
        metadata = {"nodes": json.dumps(self.nodes.to_records()), "meta": json.dumps(plain(self.meta))}
        save_tensors(path, {"values": self.values}, metadata, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> NodeScores:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not a file of scores.
        """
        tensors, metadata = load_tensors(path, _FORMAT, ("nodes", "meta"))

        def make() -> NodeScores:
            values, meta = tensors["values"], parse_json(metadata["meta"])
            if not values.is_floating_point() or not isinstance(meta, dict):
                raise ScoreError(f"the values are {values.dtype}, the provenance is a {type(meta).__name__}")
            return cls(values, NodeSet.from_records(parse_json(metadata["nodes"])), meta)

        return made_from(path, "a file of scores", make)

    # --- MIB ---------------------------------------------------------------------------------------------------

    def to_mib(self, path: str | Path, *, d_model: int | None = None) -> None:
        """Write the scores as one of MIB's files: as ``.pt`` where the path ends so, else as the circuit track's JSON.

        Node names are the same there; "input" gets score 0 when it is not among the nodes, as MIB's loaders want it,
        and "logits" has no score.

        Parameters
        ----------
        d_model:
            Of the model: EAP-IG's reader of JSON asks for it.

        Raises
        ------
        ScoreError
            If the scores are not those of every head and MLP block of a model.
        """
        mib_nodes.write(path, self.nodes, self.values, model=str(self.meta.get("model", "")), d_model=d_model)

    @classmethod
    def from_mib(cls, path: str | Path, *, nodes: NodeSet | None = None) -> NodeScores:
        """Read one of MIB's files of nodes, JSON or ``.pt``.

        Nodes of a circuit without scores have 1 inside and 0 outside of it.

        Parameters
        ----------
        nodes:
            The nodes of the model that the scores are for; default: input, heads and MLP blocks, of the sizes that
            the file states.

        Raises
        ------
        FileError
            If the file is not such a file, lacks a node or has more of them than its sizes say, or a score is no
            finite number.
        ScoreError
            If its sizes are not those of ``nodes``.
        """
        graph = mib_nodes.read(path)
        layers, heads, scores = graph.n_layers, graph.n_heads, graph.scores
        if nodes is not None and (wanted := mib_nodes.layers_and_heads(nodes)) != (layers, heads):
            raise ScoreError(
                f"{path} is for {layers} layers × {heads} heads, but the nodes are those of {wanted[0]} layers × "
                f"{wanted[1]} heads."
            )
        if nodes is None:
            nodes = NodeSet.for_sizes(layers, heads, with_input=True)
        if nodes.names[0] == "input" and "input" not in scores:
            raise FileError(f"{path} is not {mib_nodes.WHAT}: it lacks the score of node 'input'.")
        values = torch.tensor([scores[name] for name in nodes.names], dtype=torch.float64)
        meta = {"model": graph.model, "format": "mib"}
        return made_from(path, mib_nodes.WHAT, lambda: cls(values, nodes, meta))


def _nodes_called(names: Sequence[str]) -> NodeSet:
    """The heads and MLP blocks of the model that has the nodes of these names, told by the highest layer and head."""
    heads = [(int(found[1]), int(found[2])) for name in names if (found := re.fullmatch(r"a(\d+)\.h(\d+)", name))]
    layers = 1 + max((layer for layer, _ in heads), default=-1)
    n_heads = 1 + max((head for _, head in heads), default=-1)
    if not heads or layers * (n_heads + 1) > len(names):
        raise ScoreError(
            f"The table's {len(names)} nodes are not every head and MLP block of a model (a0.h0 …, m0, …): say which "
            "nodes they are with nodes=."
        )
    return NodeSet.for_sizes(layers, n_heads, with_input="input" in names)
