"""Circuits of edges: which edges of a model are said to do a task. As circuits of nodes, values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from dfa_lens.data import html, mib_graphs
from dfa_lens.data.chosen import Chosen
from dfa_lens.data.circuit import Circuit
from dfa_lens.data.content import plain
from dfa_lens.data.edges import EdgeSet, edges_of_file
from dfa_lens.data.files import (
    checked_name,
    load_tensors,
    made_from,
    parse_json,
    read_json,
    save_tensors,
    write_atomically,
)
from dfa_lens.errors import CircuitError, ScoreError, short

_FORMAT = "dfa_lens edge circuit 1"
_JSON = "a circuit of edges as JSON (format, name, sizes, edges and universe)"


class EdgeCircuit(Chosen):
    """Some of a model's edges, under a name. It can't be changed; two are equal (``==``) if their edges are.

    ``len`` is the number of its edges, iteration gives their names, ``in`` asks for one ("a0.h1->m2"). Circuits over
    the same edges combine as sets do, as circuits of nodes do: ``|``, ``&``, ``-``, ``^``, ``~``, ``<=``.

    Parameters
    ----------
    edges:
        The edges in it: names ("a0.h1->m2", or pairs of names) in any order, or [writer, reader] booleans. None at all
        is the empty circuit.
    universe:
        The edges among which they were chosen. Those outside the circuit carry their writers' corrupt activations when
        it is run; whatever else the model has runs as it does. So a universe without the edges of the input is that of
        the ``nodes`` protocol, and one of all edges that of ``mib``.
    name:
        What it is called in tables and figures.
    meta:
        Where it comes from (model, method, …): JSON-like.

    Raises
    ------
    EdgeError
        If an edge is not among the universe.
    CircuitError
        If an edge is given twice, or the circuit's own name is no text of one line.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> edges = dfa.EdgeSet(2, 2)
    >>> first = dfa.EdgeCircuit(["input->a0.h1<v>", "a0.h1->logits"], edges, name="first")
    >>> second = dfa.EdgeCircuit(["a0.h1->logits", "m0->m1"], edges, name="second")
    >>> (first & second).names, first.overlap(second).common, first.live_size, second.live_size
    (('a0.h1->logits',), 1, 2, 0)
    """

    unit = "edges"

    def __init__(
        self,
        edges: Iterable[str | tuple[str, str]] | Bool[Tensor, "writer reader"],
        universe: EdgeSet,
        *,
        name: str = "circuit",
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self._kept = self._of_mask(edges, universe) if isinstance(edges, Tensor) else self._of_names(edges, universe)
        self._universe = universe
        self._name = checked_name(name, "circuit", CircuitError)
        self._meta = dict(meta or {})

    @staticmethod
    def _of_mask(kept: Tensor, universe: EdgeSet) -> Tensor:
        if kept.dtype != torch.bool or kept.shape != universe.shape:
            raise CircuitError(
                f"Edges are chosen by a boolean tensor {list(universe.shape)} [writer, reader], not "
                f"{kept.dtype}{list(kept.shape)}."
            )
        for row, column in (kept.cpu() & ~universe.chosen).nonzero()[:1].tolist():
            universe.position((universe.writers[row], universe.readers[column]))  # says why it is not there
        return kept.detach().cpu().clone()

    @staticmethod
    def _of_names(edges: Iterable[str | tuple[str, str]], universe: EdgeSet) -> Tensor:
        if isinstance(edges, str):
            raise CircuitError(f"A circuit's edges are several names, not the text {short(edges)!r}.")
        kept = torch.zeros(universe.shape, dtype=torch.bool)
        for edge in edges:
            at = universe.position(edge)
            if kept[at]:
                raise CircuitError(f"Edge {short(str(edge))!r} is in the circuit twice.")
            kept[at] = True
        return kept

    # --- reading ---------------------------------------------------------------------------------------------

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of its edges, writer by writer."""
        writers, readers = self._universe.writers, self._universe.readers
        return tuple(f"{writers[row]}->{readers[column]}" for row, column in self._kept.nonzero().tolist())

    @property
    def universe(self) -> EdgeSet:
        """The edges among which they were chosen."""
        return self._universe

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the universe: of a model of 8 B parameters a million."""
        return tuple(map(str, self._universe))

    @property
    def edges(self) -> EdgeSet:
        """Its edges as a set.

        Raises
        ------
        CircuitError
            If it is empty: there is no set without edges.
        """
        if not len(self):
            raise CircuitError(f"The circuit {self._name!r} is empty: it has no set of edges.")
        return self._universe.choose(self._kept)

    @property
    def kept(self) -> Bool[Tensor, "writer reader"]:
        """[writer, reader] whether the edge is in the circuit; False where the universe has none. A copy."""
        return self._kept.clone()

    @property
    def flags(self) -> Bool[Tensor, " edge"]:
        """[edge] of the universe: whether it is in the circuit."""
        return self._kept[self._universe.chosen]

    @property
    def open(self) -> Bool[Tensor, "writer reader"]:
        """[writer, reader] what runs when it is run: its edges, and those of the model outside the universe."""
        return self._kept | (self._universe.existing & ~self._universe.chosen)

    @property
    def live(self) -> Bool[Tensor, "writer reader"]:
        """Of :attr:`open`, what lies on a path from the input to the logits. The rest changes nothing."""
        return self._universe.live(self.open)

    @property
    def live_size(self) -> int:
        """How many of its edges lie on a path from the input to the logits."""
        return int((self.live & self._kept).sum())

    def pruned(self) -> EdgeCircuit:
        """The same without edges on no path from the input to the logits; what it does is the same.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> circuit = dfa.EdgeCircuit(["input->m0", "m0->logits", "a0.h0->m1"], dfa.EdgeSet(2, 1))
        >>> circuit.pruned().names
        ('input->m0', 'm0->logits')
        """
        return EdgeCircuit(self._kept & self.live, self._universe, name=self._name, meta={**self._meta, "pruned": True})

    def to_nodes(self) -> Circuit:
        """The heads and MLP blocks that its edges go through: those that are written by one and read by another.

        Edges outside the universe count where they are on such a path, as those of the input do.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> circuit = dfa.EdgeCircuit(["input->m0", "m0->logits", "a0.h0->m1"], dfa.EdgeSet(2, 1))
        >>> circuit.to_nodes().names
        ('m0',)
        """
        used = self.live.any(1)[1:].tolist()
        universe = self._universe.nodes[1:]
        names = [name for name, inside in zip(universe.names, used, strict=True) if inside]
        meta = {key: value for key, value in self._meta.items() if key in ("model", "target")}
        return Circuit(names, universe, name=self._name, meta={**meta, "made_of": [self._name]})

    def to_frame(self) -> Any:
        """A pandas table, a row per edge of the universe: edge, writer, reader, in_circuit, live."""
        import pandas as pd

        chosen = self._universe.chosen
        rows, columns = self._universe.positions.unbind(1)
        return pd.DataFrame(
            {
                "edge": self.labels,
                "writer": pd.Categorical.from_codes(rows.numpy(), list(self._universe.writers)),
                "reader": pd.Categorical.from_codes(columns.numpy(), list(self._universe.readers)),
                "in_circuit": self.flags.numpy(),
                "live": (self.live & self._kept)[chosen].numpy(),
            }
        )

    def summary(self) -> dict[str, Any]:
        """Edges, live edges, heads and MLP blocks, as :func:`~dfa_lens.data.circuit.compare` shows them."""
        through = self.to_nodes().summary()
        return {
            "edges": len(self),
            "of": len(self._universe),
            "fraction": self.fraction,
            "live_size": self.live_size,
            "heads": through["heads"],
            "mlps": through["mlps"],
            "relative_depth": through["relative_depth"],
        }

    def require(self, universe: EdgeSet, what: str = "this circuit") -> None:
        """A :class:`~dfa_lens.errors.CircuitError` unless its edges were chosen among ``universe``."""
        if self._universe != universe:
            raise CircuitError(
                f"{what} was chosen among the {self._universe!r}, the other among the {universe!r}: they are of "
                "different models, of different readers (grouped or per head), or of different choices of edges (with "
                "those of the input or without)."
            )

    def _require(self, other: EdgeCircuit, what: str = "this circuit") -> None:
        self.require(other._universe, what)

    def _like(self, flags: Bool[Tensor, " edge"], name: str, meta: Mapping[str, Any]) -> EdgeCircuit:
        kept = torch.zeros_like(self._kept)
        kept[self._universe.chosen] = flags
        return EdgeCircuit(kept, self._universe, name=name, meta=meta)

    def _content(self) -> tuple[Any, ...]:
        return self._kept, self._universe

    def __len__(self) -> int:
        return int(self._kept.sum())

    def __contains__(self, edge: object) -> bool:
        return edge in self._universe and bool(self._kept[self._universe.position(edge)])  # type: ignore[arg-type]

    def _repr_html_(self) -> str:
        """Its edges, for notebooks."""
        return html.shown(repr(self), self.to_frame().query("in_circuit")[["edge", "writer", "reader", "live"]])

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the edges, the name and the provenance, and a checksum of all of it."""
        sizes, meta = json.dumps(self._universe.sizes), json.dumps(plain(self._meta))
        metadata = {"name": self._name, "sizes": sizes, "meta": meta}
        tensors = {"kept": self._kept.nonzero().to(torch.int32), "universe": self._universe.chosen}
        save_tensors(path, tensors, metadata, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> EdgeCircuit:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not a file of a circuit of edges.
        """
        tensors, metadata = load_tensors(path, _FORMAT, ("name", "sizes", "meta"))

        def make() -> EdgeCircuit:
            meta, universe = parse_json(metadata["meta"]), tensors["universe"]
            edges = edges_of_file(parse_json(metadata["sizes"]), cells=universe.numel()).choose(universe)
            kept = edges.mask(tensors["kept"])
            return cls(kept, edges, name=metadata["name"], meta=dict(meta))

        return made_from(path, "a file of a circuit of edges", make)

    def to_json(self, path: str | Path) -> None:
        """Write name, edges, universe and provenance as JSON, for other tools; :meth:`from_json` reads it.

        The universe is the model's sizes, and ``"all"``, ``"without input"``, or the names of its edges.
        """
        content = {
            "format": _FORMAT,
            "name": self._name,
            "sizes": self._universe.sizes,
            "edges": list(self.names),
            "universe": next((name for name, own in _universes(self._universe).items() if own == self._universe), None)
            or list(self.labels),
            "meta": plain(self._meta),
        }
        write_atomically(path, json.dumps(content, indent=1).encode())

    @classmethod
    def from_json(cls, path: str | Path) -> EdgeCircuit:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not such a file.
        """
        data = read_json(path, _JSON, _FORMAT)

        def make() -> EdgeCircuit:
            names, meta, universe = data["edges"], data["meta"], data["universe"]
            if not isinstance(names, list) or not isinstance(meta, dict):
                raise CircuitError(f"its edges are a {type(names).__name__}, its provenance a {type(meta).__name__}")
            edges = edges_of_file(data["sizes"])
            if isinstance(universe, list):
                edges = edges.choose(cls(universe, edges)._kept)
            else:
                edges = _universes(edges)[universe]
            return cls(names, edges, name=data["name"], meta=meta)

        return made_from(path, _JSON, make)

    def to_mib(self, path: str | Path) -> None:
        """Write MIB's (EAP-IG's) graph: as ``.pt`` where the path ends so, else as JSON.

        ``in_graph`` is what runs (:attr:`open`), and the score of an edge is 1 in it and 0 outside.

        Raises
        ------
        ScoreError
            If the readers are grouped: the format has readers of keys and values for every query head. Or if attention
            and MLP run side by side.
        """
        if self._universe.parallel:
            raise ScoreError("MIB's graphs of models whose attention and MLP run side by side are not written.")
        if self._universe.grouped:
            raise ScoreError(
                "MIB's format has a reader of keys and of values for every query head, and this circuit has one for "
                "every key-value head: attribute with readers='per-head'."
            )
        inside = self.open
        graph = mib_graphs.Graph(
            self._universe.n_layers, self._universe.n_heads, values=inside.double(), in_graph=inside, meta=self._meta
        )
        mib_graphs.write(path, graph, self._universe.writers, self._universe.readers, self._universe.existing)

    @classmethod
    def from_mib(cls, path: str | Path, *, name: str | None = None) -> EdgeCircuit:
        """The edges that one of MIB's files (JSON or ``.pt``) says are in the circuit, whatever their scores.

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
        >>> circuit = dfa.EdgeCircuit(["input->m0", "m0->logits"], dfa.EdgeSet(1, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     circuit.to_mib(f"{folder}/found.pt")
        ...     dfa.EdgeCircuit.from_mib(f"{folder}/found.pt")
        EdgeCircuit('found': 2 of 13 edges: input->m0, m0->logits)
        """
        graph = mib_graphs.read(path, mib_graphs.per_head)
        universe = EdgeSet(graph.n_layers, graph.n_heads)
        return cls(graph.in_graph, universe, name=name or Path(path).stem, meta=graph.meta)


def _universes(edges: EdgeSet) -> dict[str, EdgeSet]:
    """The universes that have a name in files: those of the two protocols."""
    everything = edges.all_of_model
    return {"all": everything, "without input": everything.without_input()}
