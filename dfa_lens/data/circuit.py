"""Circuits: which nodes of a model are said to do a task. Values that are named, saved, compared and combined.

What a circuit does is found out by running it: :mod:`dfa_lens.evaluation.circuits`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from dfa_lens.data import html, mib_nodes
from dfa_lens.data.content import ByContent, plain
from dfa_lens.data.files import (
    LONGEST_NAME,
    checked_name,
    load_tensors,
    made_from,
    parse_json,
    read_json,
    save_tensors,
    write_atomically,
)
from dfa_lens.data.nodes import NodeSet
from dfa_lens.errors import CircuitError, FileError, short

_FORMAT = "dfa_lens circuit 1"
_JSON = "a circuit as JSON (format, name, nodes and universe)"


class Circuit(ByContent):
    """Some of a model's nodes, under a name. It can't be changed; two are equal (``==``) if their nodes are.

    ``len`` is the number of its nodes, iteration gives their names, ``in`` asks for one. Circuits over the same nodes
    combine as sets do: ``|`` (in either), ``&`` (in both), ``-`` (in the first alone), ``^`` (in one alone),
    ``~`` (all other nodes), ``<=`` (part of).

    Parameters
    ----------
    names:
        The names of the nodes in it, in any order; none at all is the empty circuit.
    universe:
        The nodes among which they were chosen. Those outside the circuit are at their corrupt activations when it is
        run; whatever else the model has runs as it does.
    name:
        What it is called in tables and figures.
    meta:
        Where it comes from (model, method, …): JSON-like.

    Raises
    ------
    NodeError
        If a name is not among the universe.
    CircuitError
        If a name is given twice, or the circuit's own name is no text of one line.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(2, 2)
    >>> first = dfa.Circuit(["a0.h1", "m1"], nodes, name="first")
    >>> second = dfa.Circuit(["m1", "a1.h0"], nodes, name="second")
    >>> (first & second).names, (first | second).names, len(~first)
    (('m1',), ('a0.h1', 'a1.h0', 'm1'), 4)
    """

    def __init__(
        self,
        names: Iterable[str],
        universe: NodeSet,
        *,
        name: str = "circuit",
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(names, str):
            raise CircuitError(f"A circuit's nodes are several names, not the text {short(names)!r}.")
        given = list(names)
        positions = [universe.position(each) for each in given]
        if len(set(positions)) < len(positions):
            double = next(each for i, each in enumerate(given) if each in given[:i])
            raise CircuitError(f"Node {double!r} is in the circuit twice.")
        self._names = tuple(universe.names[i] for i in sorted(positions))
        self._universe = universe
        self._name = checked_name(name, "circuit", CircuitError)
        self._meta = dict(meta or {})

    # --- reading ---------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its nodes, in the order of the model."""
        return self._names

    @property
    def universe(self) -> NodeSet:
        """The nodes among which they were chosen."""
        return self._universe

    @property
    def name(self) -> str:
        """What it is called."""
        return self._name

    @property
    def meta(self) -> dict[str, Any]:
        """Where it comes from; a copy."""
        return dict(self._meta)

    @property
    def nodes(self) -> NodeSet:
        """Its nodes as a set.

        Raises
        ------
        CircuitError
            If it is empty: there is no set without nodes.
        """
        if not self._names:
            raise CircuitError(f"The circuit {self._name!r} is empty: it has no set of nodes.")
        return self._universe[list(self._names)]

    @property
    def kept(self) -> Bool[Tensor, " node"]:
        """[node] of the universe: whether it is in the circuit; what :func:`dfa_lens.hooks.ablate` keeps."""
        inside = set(self._names)
        return torch.tensor([name in inside for name in self._universe.names])

    @property
    def fraction(self) -> float:
        """The part of the universe that is in it."""
        return len(self) / len(self._universe)

    def named(self, name: str) -> Circuit:
        """The same circuit under another name."""
        return Circuit(self._names, self._universe, name=name, meta=self._meta)

    def to_frame(self) -> Any:
        """A pandas table, a row per node of the universe: node, kind, layer, index, in_circuit."""
        import pandas as pd

        return pd.DataFrame(
            {
                "node": self._universe.names,
                "kind": [node.kind for node in self._universe],
                "layer": [node.layer for node in self._universe],
                "index": pd.array([node.index for node in self._universe], dtype="Int64"),
                "in_circuit": self.kept.numpy(),
            }
        )

    def by_layer(self) -> Any:
        """A pandas table, a row per layer with nodes of the circuit: layer, nodes (their number), names."""
        import pandas as pd

        inside = self.to_frame().query("in_circuit")
        groups = inside.groupby("layer")["node"]
        return pd.DataFrame({"nodes": groups.size(), "names": groups.agg(", ".join)}).reset_index()

    def require(self, universe: NodeSet, what: str = "this circuit") -> None:
        """A :class:`~dfa_lens.errors.CircuitError` unless its nodes were chosen among ``universe``."""
        if self._universe != universe:
            raise CircuitError(
                f"{what} was chosen among {len(self._universe)} nodes ({self._universe.names[0]} … "
                f"{self._universe.names[-1]}), the other among {len(universe)} ({universe.names[0]} … "
                f"{universe.names[-1]}): they are of different models, or of different choices of nodes."
            )

    def _content(self) -> tuple[Any, ...]:
        return self._names, self._universe

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        found = self._meta.get("faithfulness")
        f = "" if found is None else f", f = {found:.3f}"
        listed = ", ".join(self._names[:8]) + (", …" if len(self) > 8 else "")
        return (
            f"Circuit({self._name!r}: {len(self)} of {len(self._universe)} nodes{f}{': ' * bool(self._names)}{listed})"
        )

    def _repr_html_(self) -> str:
        """Its nodes by layer, for notebooks."""
        return html.shown(repr(self), self.by_layer())

    # --- combining -------------------------------------------------------------------------------------------

    def __and__(self, other: Circuit) -> Circuit:
        return self._combined(other, set.__and__, "and")

    def __or__(self, other: Circuit) -> Circuit:
        return self._combined(other, set.__or__, "or")

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combined(other, set.__sub__, "without")

    def __xor__(self, other: Circuit) -> Circuit:
        return self._combined(other, set.__xor__, "or else")

    def __invert__(self) -> Circuit:
        rest = [name for name in self._universe.names if name not in set(self._names)]
        return Circuit(rest, self._universe, name=_name(f"not {self._name}"), meta={"made_of": [self._name]})

    def __le__(self, other: Circuit) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        self.require(other._universe)
        return set(self._names) <= set(other._names)

    def _combined(self, other: Circuit, operation: Any, word: str) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        self.require(other._universe)
        names: Set[str] = operation(set(self._names), set(other._names))
        meta = {"made_of": [self._name, other._name]}
        return Circuit(names, self._universe, name=_name(f"{self._name} {word} {other._name}"), meta=meta)

    def overlap(self, other: Circuit) -> Overlap:
        """How much two circuits have in common, and how much two random ones of their sizes would.

        Raises
        ------
        CircuitError
            If they were chosen among different nodes.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> nodes = dfa.NodeSet.for_sizes(4, 4)
        >>> first = dfa.Circuit(nodes.names[:5], nodes)
        >>> found = first.overlap(dfa.Circuit(nodes.names[1:6], nodes))
        >>> found.common, round(found.jaccard, 2), round(found.expected, 2), round(found.p, 4)
        (4, 0.67, 0.15, 0.0049)
        """
        self.require(other._universe)
        return Overlap(len(set(self._names) & set(other._names)), len(self), len(other), len(self._universe))

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the nodes, the name and the provenance, and a checksum of all of it."""
        metadata = {
            "name": self._name,
            "nodes": json.dumps(self._universe.to_records()),
            "meta": json.dumps(plain(self._meta)),
        }
        save_tensors(path, {"kept": self.kept}, metadata, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not a file of a circuit.
        """
        tensors, metadata = load_tensors(path, _FORMAT, ("name", "nodes", "meta"))

        def make() -> Circuit:
            kept, meta = tensors["kept"], parse_json(metadata["meta"])
            universe = NodeSet.from_records(parse_json(metadata["nodes"]))
            if kept.dtype != torch.bool or kept.shape != (len(universe),) or not isinstance(meta, dict):
                raise CircuitError(f"it says of {list(kept.shape)} nodes ({kept.dtype}) what is in it")
            names = [name for name, inside in zip(universe.names, kept.tolist(), strict=True) if inside]
            return cls(names, universe, name=metadata["name"], meta=meta)

        return made_from(path, "a file of a circuit", make)

    def to_json(self, path: str | Path) -> None:
        """Write name, nodes, universe and provenance as JSON, for other tools; :meth:`from_json` reads it."""
        content = {
            "format": _FORMAT,
            "name": self._name,
            "nodes": list(self._names),
            "universe": self._universe.to_records(),
            "meta": plain(self._meta),
        }
        write_atomically(path, json.dumps(content, indent=1).encode())

    @classmethod
    def from_json(cls, path: str | Path) -> Circuit:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not such a file.
        """
        data = read_json(path, _JSON)
        if data.get("format") != _FORMAT:
            raise FileError(f"{path} is not {_JSON}.")

        def make() -> Circuit:
            names, meta = data["nodes"], data["meta"]
            if not isinstance(names, list) or not isinstance(meta, dict):
                raise CircuitError(f"its nodes are a {type(names).__name__}, its provenance a {type(meta).__name__}")
            return cls(names, NodeSet.from_records(data["universe"]), name=data["name"], meta=meta)

        return made_from(path, _JSON, make)

    def to_csv(self, path: str | Path) -> None:
        """Write the table of :meth:`to_frame` as CSV, for spreadsheets."""
        write_atomically(path, self.to_frame().to_csv(index=False).encode())

    def to_mib(self, path: str | Path, *, d_model: int | None = None) -> None:
        """Write one of MIB's files (``.pt`` or JSON): ``in_graph`` says which nodes are in it, and the score is 1 or 0.

        MIB runs a circuit by its edges, which only the ``.pt`` file has: all that a node in the circuit writes.

        Parameters
        ----------
        d_model:
            Of the model: EAP-IG's reader of JSON asks for it.

        Raises
        ------
        ScoreError
            If the universe is not every head and MLP block of a model (and the input, or not).
        """
        model = str(self._meta.get("model", ""))
        mib_nodes.write(path, self._universe, self.kept.float(), model=model, kept=self._names, d_model=d_model)

    @classmethod
    def from_mib(cls, path: str | Path, *, name: str | None = None) -> Circuit:
        """The nodes that one of MIB's files (JSON or ``.pt``) says are in the circuit, whatever their scores.

        Parameters
        ----------
        name:
            What it is called; default: the file's name.

        Raises
        ------
        FileError
            If the file is not such a file.

        Examples
        --------
        >>> import tempfile, dfa_lens as dfa
        >>> circuit = dfa.Circuit(["input", "m0"], dfa.NodeSet.for_sizes(1, 2, with_input=True))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     circuit.to_mib(f"{folder}/found.pt")
        ...     dfa.Circuit.from_mib(f"{folder}/found.pt")
        Circuit('found': 2 of 4 nodes: input, m0)
        """
        graph = mib_nodes.read(path)
        universe = NodeSet.for_sizes(graph.n_layers, graph.n_heads, with_input="input" in graph.in_graph)
        inside = [node for node in universe.names if graph.in_graph[node]]
        return cls(inside, universe, name=name or Path(path).stem, meta={"model": graph.model, "format": "mib"})


def _name(text: str) -> str:
    """A name made of names, cut where it would be too long for one."""
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"


@dataclass(frozen=True)
class Overlap:
    """What two circuits over the same nodes have in common, against chance.

    By chance means: two random circuits of their sizes, whose common nodes follow the hypergeometric distribution.

    Attributes
    ----------
    common:
        Nodes in both.
    first, second:
        Nodes in either circuit.
    n:
        Nodes of the universe.
    """

    common: int
    first: int
    second: int
    n: int

    @property
    def jaccard(self) -> float:
        """Nodes in both over nodes in either (Jaccard 1912); 1 for two empty circuits."""
        union = self.first + self.second - self.common
        return self.common / union if union else 1.0

    @property
    def expected(self) -> float:
        """The mean Jaccard index of two random circuits of these sizes."""
        chances = self._chance()
        low, high = (int(end) for end in chances.support())
        return sum(
            float(chances.pmf(i)) * Overlap(i, self.first, self.second, self.n).jaccard for i in range(low, high + 1)
        )

    @property
    def p(self) -> float:
        """The probability that two random circuits of these sizes have as many nodes in common, or more."""
        return float(self._chance().sf(self.common - 1))

    def _chance(self) -> Any:
        from scipy import stats

        return stats.hypergeom(self.n, self.first, self.second)

    def __str__(self) -> str:
        return (
            f"{self.common} nodes in common of {self.first} and {self.second}; Jaccard {self.jaccard:.2f}, by chance "
            f"{self.expected:.2f} (p = {self.p:.2g})"
        )


def compare(circuits: Mapping[str, Circuit]) -> Any:
    """Circuits side by side, of one model or of several: how large they are, and where in the model they lie.

    Parameters
    ----------
    circuits:
        What each is called in the table → the circuit.

    Returns
    -------
    pandas.DataFrame
        A row per circuit: circuit, model, nodes, of (the universe), fraction, heads, mlps, relative_depth (the mean of
        its nodes, 0 for the first layer and 1 for the last; NaN if it is empty), faithfulness (where it is known).

    Raises
    ------
    CircuitError
        If there are none.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> small, large = dfa.NodeSet.for_sizes(2, 2), dfa.NodeSet.for_sizes(4, 2)
    >>> table = dfa.circuits.compare({"1B": dfa.Circuit(["m1"], small), "3B": dfa.Circuit(["m0", "a1.h0"], large)})
    >>> table[["circuit", "nodes", "of", "heads", "relative_depth"]].round(2).values.tolist()
    [['1B', 1, 6, 0, 1.0], ['3B', 2, 12, 1, 0.17]]
    """
    import pandas as pd

    _some(circuits)
    rows = []
    for name, circuit in circuits.items():
        kinds = [node.kind for node in circuit.universe[list(circuit.names)]] if len(circuit) else []
        depth = dict(zip(circuit.universe.names, circuit.universe.relative_depth(), strict=True))
        meta = circuit.meta
        rows.append(
            {
                "circuit": name,
                "model": meta.get("target", meta.get("model", "")),
                "nodes": len(circuit),
                "of": len(circuit.universe),
                "fraction": circuit.fraction,
                "heads": kinds.count("head"),
                "mlps": kinds.count("mlp"),
                "relative_depth": sum(depth[each] for each in circuit) / len(circuit) if len(circuit) else float("nan"),
                "faithfulness": meta.get("faithfulness", float("nan")),
            }
        )
    return pd.DataFrame(rows)


def side_by_side(circuits: Mapping[str, Circuit]) -> Any:
    """Which node is in which circuit, of tasks, seeds or methods on one model.

    Returns
    -------
    pandas.DataFrame
        A row per node of the universe, in its order, and a boolean column per circuit. ``table.sum(axis=1)`` counts
        the circuits that have a node.

    Raises
    ------
    CircuitError
        If there are none, or they were chosen among different nodes.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(1, 2)
    >>> table = dfa.circuits.side_by_side({"ioi": dfa.Circuit(["m0"], nodes), "mcqa": dfa.Circuit(nodes.names, nodes)})
    >>> table.sum(axis=1).to_dict()
    {'a0.h0': 1, 'a0.h1': 1, 'm0': 2}
    """
    import pandas as pd

    universe = _one_universe(circuits)
    columns = {name: circuit.kept.numpy() for name, circuit in circuits.items()}
    return pd.DataFrame(columns, index=pd.Index(universe.names, name="node"))


def overlaps(circuits: Mapping[str, Circuit]) -> Any:
    """The overlap of every two circuits of one model, against chance.

    Returns
    -------
    pandas.DataFrame
        A row per pair: first, second, common, jaccard, expected (by chance), p, p_holm (corrected for the number of
        pairs by Holm's method).

    Raises
    ------
    CircuitError
        If there are fewer than two, or they were chosen among different nodes.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(4, 4)
    >>> one, two = dfa.Circuit(nodes.names[:4], nodes), dfa.Circuit(nodes.names[2:6], nodes)
    >>> dfa.circuits.overlaps({"one": one, "two": two})[["common", "jaccard"]].round(2).values.tolist()
    [[2.0, 0.33]]
    """
    import pandas as pd

    from dfa_lens.data.statistics import holm

    if len(circuits) < 2:
        raise CircuitError(f"An overlap takes two circuits at least, not {len(circuits)}.")
    _one_universe(circuits)
    found = {pair: circuits[pair[0]].overlap(circuits[pair[1]]) for pair in combinations(circuits, 2)}
    corrected = holm({pair: min(1.0, each.p) for pair, each in found.items()})
    return pd.DataFrame(
        [
            {
                "first": first,
                "second": second,
                "common": each.common,
                "jaccard": each.jaccard,
                "expected": each.expected,
                "p": each.p,
                "p_holm": corrected[first, second],
            }
            for (first, second), each in found.items()
        ]
    )


def _some(circuits: Mapping[str, Circuit]) -> None:
    if not circuits:
        raise CircuitError("There are no circuits to compare.")
    for name, circuit in circuits.items():
        if not isinstance(circuit, Circuit):
            raise CircuitError(f"{short(name)!r} is a {type(circuit).__name__}, not a Circuit.")


def _one_universe(circuits: Mapping[str, Circuit]) -> NodeSet:
    _some(circuits)
    (_, first), *rest = circuits.items()
    for name, circuit in rest:
        circuit.require(first.universe, f"The circuit {name!r}")
    return first.universe
