"""Circuits: which nodes of a model are said to do a task. Values that are named, saved, compared and combined.

Circuits of edges are in :mod:`dfa_lens.data.edge_circuit`; the tables of several circuits, here, take either. What a
circuit does is found out by running it: :mod:`dfa_lens.evaluation.circuits`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from dfa_lens.data import html, mib_nodes
from dfa_lens.data.chosen import Chosen
from dfa_lens.data.content import plain
from dfa_lens.data.files import (
    checked_name,
    load_tensors,
    made_from,
    parse_json,
    read_json,
    save_tensors,
    write_atomically,
)
from dfa_lens.data.nodes import NodeSet
from dfa_lens.errors import CircuitError, short

_FORMAT = "dfa_lens circuit 1"
_JSON = "a circuit as JSON (format, name, nodes and universe)"


class Circuit(Chosen):
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

    unit = "nodes"

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
    def flags(self) -> Bool[Tensor, " node"]:
        """The same as :attr:`kept`."""
        return self.kept

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the universe."""
        return self._universe.names

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

    def _repr_html_(self) -> str:
        """Its nodes by layer, for notebooks."""
        return html.shown(repr(self), self.by_layer())

    def summary(self) -> dict[str, Any]:
        """Nodes, heads, MLP blocks and the mean relative depth, as :func:`compare` shows them."""
        kinds = [node.kind for node in self._universe[list(self._names)]] if self._names else []
        depth = dict(zip(self._universe.names, self._universe.relative_depth(), strict=True))
        return {
            "nodes": len(self),
            "of": len(self._universe),
            "fraction": self.fraction,
            "heads": kinds.count("head"),
            "mlps": kinds.count("mlp"),
            "relative_depth": sum(depth[each] for each in self) / len(self) if self._names else float("nan"),
        }

    def _require(self, other: Circuit, what: str = "this circuit") -> None:
        self.require(other._universe, what)

    def _like(self, flags: Bool[Tensor, " node"], name: str, meta: Mapping[str, Any]) -> Circuit:
        names = [each for each, inside in zip(self._universe.names, flags.tolist(), strict=True) if inside]
        return Circuit(names, self._universe, name=name, meta=meta)

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
        data = read_json(path, _JSON, _FORMAT)

        def make() -> Circuit:
            names, meta = data["nodes"], data["meta"]
            if not isinstance(names, list) or not isinstance(meta, dict):
                raise CircuitError(f"its nodes are a {type(names).__name__}, its provenance a {type(meta).__name__}")
            return cls(names, NodeSet.from_records(data["universe"]), name=data["name"], meta=meta)

        return made_from(path, _JSON, make)

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


AnyCircuit = TypeVar("AnyCircuit", bound=Chosen)


def compare(circuits: Mapping[str, AnyCircuit]) -> Any:
    """Circuits side by side, of one model or of several: how large they are, and where in the model they lie.

    Parameters
    ----------
    circuits:
        What each is called in the table → the circuit.

    Returns
    -------
    pandas.DataFrame
        A row per circuit: circuit, model, nodes, of (the universe), fraction, heads, mlps, relative_depth (the mean of
        its nodes, 0 for the first layer and 1 for the last; NaN if it is empty), faithfulness (where it is known). Of
        edges: edges, of, fraction, live_size (edges on a path from the input to the logits), and heads and mlps on one.

    Raises
    ------
    CircuitError
        If there are none, or some are of nodes and some of edges.

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
        model = circuit.meta.get("target", circuit.meta.get("model", ""))
        known = circuit.meta.get("faithfulness", float("nan"))
        rows.append({"circuit": name, "model": model, **circuit.summary(), "faithfulness": known})
    return pd.DataFrame(rows)


def side_by_side(circuits: Mapping[str, AnyCircuit]) -> Any:
    """Which node (or edge) is in which circuit, of tasks, seeds or methods on one model.

    Returns
    -------
    pandas.DataFrame
        A row per node (or edge) of the universe, in its order, and a boolean column per circuit.
        ``table.sum(axis=1)`` counts the circuits that have a node.

    Raises
    ------
    CircuitError
        If there are none, or they were chosen among different nodes or edges.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(1, 2)
    >>> table = dfa.circuits.side_by_side({"ioi": dfa.Circuit(["m0"], nodes), "mcqa": dfa.Circuit(nodes.names, nodes)})
    >>> table.sum(axis=1).to_dict()
    {'a0.h0': 1, 'a0.h1': 1, 'm0': 2}
    """
    import pandas as pd

    first = _one_universe(circuits)
    columns = {name: circuit.flags.numpy() for name, circuit in circuits.items()}
    return pd.DataFrame(columns, index=pd.Index(first.labels, name=first.unit.removesuffix("s")))


def overlaps(circuits: Mapping[str, AnyCircuit]) -> Any:
    """The overlap of every two circuits of one model, against chance.

    Returns
    -------
    pandas.DataFrame
        A row per pair: first, second, common, jaccard, expected (by chance), p, p_holm (corrected for the number of
        pairs by Holm's method).

    Raises
    ------
    CircuitError
        If there are fewer than two, or they were chosen among different nodes or edges.

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


def _some(circuits: Mapping[str, AnyCircuit]) -> AnyCircuit:
    if not circuits:
        raise CircuitError("There are no circuits to compare.")
    first = next(iter(circuits.values()))
    for name, circuit in circuits.items():
        if not isinstance(circuit, Chosen):
            raise CircuitError(f"{short(name)!r} is a {type(circuit).__name__}, not a Circuit.")
        if circuit.unit != first.unit:
            raise CircuitError(
                f"{short(name)!r} is a circuit of {circuit.unit}, others are of {first.unit}: a table has "
                "circuits of one kind (edge_circuit.to_nodes() makes one of nodes)."
            )
    return first


def _one_universe(circuits: Mapping[str, AnyCircuit]) -> AnyCircuit:
    first = _some(circuits)
    for name, circuit in circuits.items():
        circuit._require(first, f"The circuit {name!r}")
    return first
