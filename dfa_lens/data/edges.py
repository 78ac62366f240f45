"""Edges: which writer is read by which reader, and a score for each.

A *writer* adds to the residual stream: the embedding ("input"), every attention head, every MLP block. A *reader*
reads it: the inputs of queries, keys and values, the MLP's input, and at last the logits. The edge u → v carries what u
adds to the input of v; it exists where u writes before v reads.

Queries are read head by head. Keys and values are read by the key-value heads that the model really has (*grouped*
readers, "a1.kv0<k>"), or, as published edge results have them, by every query head for itself (*per-head* readers,
"a1.h3<k>"). In a model without grouped-query attention the two are the same.
"""

from __future__ import annotations

import fnmatch
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfa_lens.data import html, mib_graphs, selection
from dfa_lens.data.content import ByContent, float_copy, plain
from dfa_lens.data.files import load_tensors, made_from, parse_json, save_tensors
from dfa_lens.data.nodes import NodeSet, cfg_of
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.errors import EdgeError, ScoreError, short, unknown

if TYPE_CHECKING:
    from dfa_lens.data.edge_circuit import EdgeCircuit

Readers = Literal["grouped", "per-head"]
"""How keys and values are read.

- ``grouped``: by the key-value heads that the model has, as Llama-3 and Qwen-2.5 compute them.
- ``per-head``: by every query head for itself, as in EAP-IG and on MIB's leaderboard. Scores by gradients of a grouped
  reader are the sums over its heads; exact effects are not.
"""

Selection = Literal["top", "greedy"]
"""How a circuit of k edges is chosen.

- ``top``: the k best edges, connected or not.
- ``greedy``: from the logits down: always the best edge whose reader is in the circuit already, so that every edge
  leads to the logits (EAP-IG's ``apply_greedy``).
"""

Kind = Literal["q", "k", "v", "mlp", "logits"]

_FORMAT = "dfa_lens edge scores 1"
_ARROW = "->"


class Edge(NamedTuple):
    """One edge, by the names of its ends."""

    writer: str
    reader: str

    def __str__(self) -> str:
        return f"{self.writer}{_ARROW}{self.reader}"


@dataclass(frozen=True)
class ReaderSite:
    """The readers that are computed together: the queries, keys or values of a layer, its MLP, or the logits.

    Attributes
    ----------
    kind, layer:
        Which; the logits belong to the last layer.
    first, stop:
        The columns of the readers.
    n_before:
        How many writers come before them: the edges into them are those of the first ``n_before``.
    """

    kind: Kind
    layer: int
    first: int
    stop: int
    n_before: int

    @property
    def columns(self) -> slice:
        """Where the readers stand among all of them."""
        return slice(self.first, self.stop)

    def __len__(self) -> int:
        return self.stop - self.first


class EdgeSet(ByContent):
    """The edges of a model, or some of them; equal (``==``) if they are the same edges of models of the same sizes.

    ``len`` is their number, ``in`` asks for an edge ("a0.h1->m2"), ``edges["a0.*", "m*"]`` are the edges between the
    writers and readers of these names or name patterns.

    Parameters
    ----------
    n_layers, n_heads:
        Of the model.
    n_kv_heads:
        Readers of keys, and of values, in a layer: the model's key-value heads (grouped readers), or as many as heads
        (per-head readers; the default).
    chosen:
        [writer, reader] which of the edges; default: all.
    parallel:
        Whether attention and MLP of a layer read the same stream, as in GPT-NeoX: then no head is read by the MLP of
        its own layer.

    Raises
    ------
    EdgeError
        If a size is no positive integer, the key-value heads do not divide the heads, or ``chosen`` has another shape,
        no edge, or one that does not exist.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> edges = dfa.EdgeSet(1, 2, 1)
    >>> edges.writers
    ('input', 'a0.h0', 'a0.h1', 'm0')
    >>> edges.readers
    ('a0.h0<q>', 'a0.h1<q>', 'a0.kv0<k>', 'a0.kv0<v>', 'm0', 'logits')
    >>> len(edges), [str(edge) for edge in edges["a0.*", "*"]]
    (11, ['a0.h0->m0', 'a0.h0->logits', 'a0.h1->m0', 'a0.h1->logits'])
    >>> "a0.h0->m0" in dfa.EdgeSet(1, 2, 1, parallel=True)
    False
    """

    def __init__(
        self,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        *,
        chosen: Bool[Tensor, "writer reader"] | None = None,
        parallel: bool = False,
    ) -> None:
        sizes = {"layers": n_layers, "heads": n_heads, "key-value heads": n_heads if n_kv_heads is None else n_kv_heads}
        for what, number in sizes.items():
            if (selection.integer(number) or 0) < 1:
                raise EdgeError(f"The number of {what} is an integer of at least 1, not {short(repr(number))}.")
        self.n_layers, self.n_heads, self.n_kv_heads = (int(number) for number in sizes.values())
        if self.n_heads % self.n_kv_heads:
            raise EdgeError(f"{self.n_heads} heads can't share {self.n_kv_heads} key-value heads evenly.")
        self.parallel = bool(parallel)
        self.chosen = self.existing if chosen is None else self._checked(chosen)

    @classmethod
    def of_model(cls, model: Any, *, readers: str = "grouped") -> EdgeSet:
        """All edges of a model.

        Parameters
        ----------
        model:
            A HookedTransformer or TransformerBridge, of which only ``model.cfg`` is read, or a Hugging Face model.
        readers:
            See :data:`Readers`.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> model = dfa.zoo.load("llama3-tiny-source")
        >>> len(dfa.EdgeSet.of_model(model)), len(dfa.EdgeSet.of_model(model, readers="per-head"))
        (2500, 3628)
        """
        if readers not in get_args(Readers):
            raise unknown("readers", readers, get_args(Readers), EdgeError)
        cfg = cfg_of(model)
        heads = int(cfg.n_heads)
        kv = getattr(cfg, "n_key_value_heads", None) if readers == "grouped" else None
        parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        return cls(int(cfg.n_layers), heads, int(kv or heads), parallel=parallel)

    def _checked(self, chosen: Tensor) -> Tensor:
        if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != self.shape:
            found = f"{chosen.dtype}{list(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
            raise EdgeError(f"Edges are chosen by a boolean tensor {list(self.shape)} [writer, reader], not {found}.")
        chosen = chosen.detach().cpu().clone()
        wrong = (chosen & ~self.existing).nonzero()
        if len(wrong):
            raise self._backwards(*wrong[0].tolist())
        if not chosen.any():
            raise EdgeError("An edge set needs at least one edge.")
        return chosen

    # --- writers and readers ---------------------------------------------------------------------------------

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a reader of keys and of values."""
        return self.n_kv_heads < self.n_heads

    @cached_property
    def nodes(self) -> NodeSet:
        """The writers as nodes: the input, heads and MLP blocks."""
        return NodeSet.for_sizes(self.n_layers, self.n_heads, with_input=True)

    @property
    def writers(self) -> tuple[str, ...]:
        """The writers' names, in the order of the rows."""
        return self.nodes.names

    @cached_property
    def sites(self) -> tuple[ReaderSite, ...]:
        """The readers by what is computed together, in their order."""
        found: list[ReaderSite] = []
        column = 0

        def add(kind: Kind, layer: int, size: int, n_before: int) -> None:
            nonlocal column
            found.append(ReaderSite(kind, layer, column, column + size, n_before))
            column += size

        for layer in range(self.n_layers):
            before = 1 + layer * (self.n_heads + 1)
            add("q", layer, self.n_heads, before)
            add("k", layer, self.n_kv_heads, before)
            add("v", layer, self.n_kv_heads, before)
            add("mlp", layer, 1, before if self.parallel else before + self.n_heads)
        add("logits", self.n_layers - 1, 1, len(self.nodes))
        return tuple(found)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """The readers' names, in the order of the columns."""
        head = "kv" if self.grouped else "h"
        names: list[str] = []
        for site in self.sites:
            if site.kind == "logits":
                names.append("logits")
            elif site.kind == "mlp":
                names.append(f"m{site.layer}")
            else:
                own = "h" if site.kind == "q" else head
                names += [f"a{site.layer}.{own}{i}<{site.kind}>" for i in range(len(site))]
        return tuple(names)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of writers and of readers."""
        return len(self.nodes), self.sites[-1].stop

    @cached_property
    def existing(self) -> Bool[Tensor, "writer reader"]:
        """Where the model has an edge, whether or not it is in the set."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        for site in self.sites:
            mask[: site.n_before, site.columns] = True
        return mask

    @cached_property
    def inputs(self) -> Bool[Tensor, "reader writer"]:
        """Where a reader is an input of the node that is the writer: a key-value head's, of each of its heads."""
        mask = torch.zeros(self.shape[1], len(self.nodes), dtype=torch.bool)
        for site, own in self._inputs():
            columns = self._by_node(site, torch.arange(site.first, site.stop))
            mask[columns, torch.arange(own.start, own.stop)] = True
        return mask

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.writers)}

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.readers)}

    # --- edges -----------------------------------------------------------------------------------------------

    @property
    def positions(self) -> Int[Tensor, "edge 2"]:
        """Row and column of every edge of the set, in the order of the edges: writer by writer."""
        return self.chosen.nonzero()

    @property
    def all_of_model(self) -> EdgeSet:
        """All edges of a model of these sizes."""
        return EdgeSet(self.n_layers, self.n_heads, self.n_kv_heads, parallel=self.parallel)

    def fits(self, model: Any) -> bool:
        """Whether they are edges of this model, with grouped or per-head readers; only ``model.cfg`` is read."""
        return any(self.all_of_model == EdgeSet.of_model(model, readers=readers) for readers in get_args(Readers))

    def position(self, edge: str | tuple[str, str]) -> tuple[int, int]:
        """Row and column of an edge: "a0.h1->m2", or writer and reader.

        Raises
        ------
        EdgeError
            If there is no such writer or reader, the reader comes before the writer, or the edge is not in the set.
        """
        writer, reader = self._ends(edge)
        if writer not in self._rows:
            raise EdgeError(f"There is no writer {short(writer)!r}; they are like 'a0.h0', 'm0' and 'input'.")
        if reader not in self._columns:
            raise EdgeError(
                f"There is no reader {short(reader)!r}; they are like {self.readers[0]!r}, "
                f"{self.readers[self.n_heads]!r}, 'm0' and 'logits'."
            )
        row, column = self._rows[writer], self._columns[reader]
        if not self.existing[row, column]:
            raise self._backwards(row, column)
        if not self.chosen[row, column]:
            raise EdgeError(f"The edge {writer}{_ARROW}{reader} is not among the {len(self)} of the set.")
        return row, column

    def _backwards(self, row: int, column: int) -> EdgeError:
        writer, reader = self.writers[row], self.readers[column]
        return EdgeError(f"There is no edge {writer}{_ARROW}{reader}: {reader} reads before {writer} writes.")

    @staticmethod
    def _ends(edge: object) -> tuple[str, str]:
        ends = edge.split(_ARROW) if isinstance(edge, str) else edge
        if isinstance(ends, Sequence) and len(ends) == 2 and all(isinstance(end, str) for end in ends):
            return ends[0], ends[1]
        raise EdgeError(f"An edge is 'writer{_ARROW}reader', or the two names, not {short(repr(edge))}.")

    def where(self, *, writer: str = "*", reader: str = "*") -> EdgeSet:
        """The edges of the set between the writers and readers of these names or name patterns.

        Raises
        ------
        EdgeError
            If there are none.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> len(dfa.EdgeSet(2, 4).where(writer="input", reader="*<q>"))
        8
        """
        rows = torch.tensor([_fits(name, writer) for name in self.writers])
        columns = torch.tensor([_fits(name, reader) for name in self.readers])
        chosen = self.chosen & rows[:, None] & columns
        if not chosen.any():
            raise EdgeError(
                f"None of the {len(self)} edges goes from {short(writer)!r} to {short(reader)!r}; writers are like "
                f"{self.writers[1]!r}, readers like {self.readers[0]!r}, and a writer comes before its readers."
            )
        return self.choose(chosen)

    def choose(self, chosen: Bool[Tensor, "writer reader"]) -> EdgeSet:
        """Other edges of a model of these sizes."""
        return EdgeSet(self.n_layers, self.n_heads, self.n_kv_heads, chosen=chosen, parallel=self.parallel)

    @property
    def sizes(self) -> dict[str, int]:
        """The model's sizes, as files of edges have them."""
        sizes = {"n_layers": self.n_layers, "n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads}
        return sizes | ({"parallel": True} if self.parallel else {})

    def without_input(self) -> EdgeSet:
        """Those of the set that do not begin at the input: what the ``nodes`` protocol of curves ranks.

        Raises
        ------
        EdgeError
            If there are none.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> len(dfa.EdgeSet(1, 2)), len(dfa.EdgeSet(1, 2).without_input())
        (13, 5)
        """
        chosen = self.chosen.clone()
        chosen[0] = False
        return self.choose(chosen)

    def mask(self, positions: Tensor) -> Bool[Tensor, "writer reader"]:
        """[writer, reader] True at the given rows and columns, [edge, 2]: what :attr:`positions` is of.

        Raises
        ------
        EdgeError
            If they are no integers, or beyond the writers and readers.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> edges = dfa.EdgeSet(1, 2)
        >>> bool((edges.mask(edges.positions) == edges.chosen).all())
        True
        """
        if positions.ndim != 2 or positions.shape[1] != 2 or positions.dtype not in (torch.int32, torch.int64):
            raise EdgeError(f"its edges are {positions.dtype}{list(positions.shape)}")
        positions = positions.long()
        if bool((positions < 0).any() | (positions >= torch.tensor(self.shape)).any()):
            raise EdgeError("it names edges beyond its sizes")
        chosen = torch.zeros(self.shape, dtype=torch.bool)
        chosen[positions[:, 0], positions[:, 1]] = True
        return chosen

    def sample(self, n: int, *, seed: int = 0) -> EdgeSet:
        """``n`` edges of the set at random, the same for the same seed.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> len(dfa.EdgeSet(2, 4).sample(10))
        10
        """
        if not 1 <= n <= len(self):
            raise EdgeError(f"Between 1 and {len(self)} edges can be sampled, not {n}.")
        generator = torch.Generator().manual_seed(seed)
        rows = self.positions[torch.randperm(len(self), generator=generator)[:n]]
        chosen = torch.zeros(self.shape, dtype=torch.bool)
        chosen[rows[:, 0], rows[:, 1]] = True
        return self.choose(chosen)

    def live(self, kept: Bool[Tensor, "writer reader"]) -> Bool[Tensor, "writer reader"]:
        """Those of some edges that lie on a path of such edges from the input to the logits.

        A node passes on what enters it by any of its inputs. An edge on no path changes nothing: a writer without a
        path from the input computes what it does in the corrupt run, and one without a path to the logits is not read.
        """
        reached = torch.zeros(len(self.nodes), dtype=torch.bool)
        reached[0] = True
        for site, own in self._inputs():
            reached[own] |= self._by_node(site, (kept[:, site.columns] & reached[:, None]).any(0))
        leads = torch.zeros(len(self.nodes), dtype=torch.bool)
        read = torch.zeros(self.shape[1], dtype=torch.bool)
        read[-1] = True
        leads |= kept[:, -1]
        for site, own in reversed(self._inputs()):
            read[site.columns] = self._by_reader(site, leads[own])
            leads |= (kept[:, site.columns] & read[site.columns]).any(1)
        return kept & reached[:, None] & read

    def _inputs(self) -> list[tuple[ReaderSite, slice]]:
        """The readers' sites but for the logits, with the rows of the writers whose inputs they are."""
        found = []
        for site in self.sites[:-1]:
            first = 1 + site.layer * (self.n_heads + 1)
            own = slice(first + self.n_heads, first + self.n_heads + 1)
            found.append((site, own if site.kind == "mlp" else slice(first, first + self.n_heads)))
        return found

    def _by_node(self, site: ReaderSite, values: Tensor) -> Tensor:
        """[reader] of a site → [node]: a key-value head's, for each of its heads."""
        return values.repeat_interleave(self.n_heads // self.n_kv_heads) if site.kind in ("k", "v") else values

    def _by_reader(self, site: ReaderSite, nodes: Tensor) -> Tensor:
        """[node] → [reader] of a site: a key-value head's if any of its heads'."""
        return nodes.unflatten(0, (self.n_kv_heads, -1)).any(1) if site.kind in ("k", "v") else nodes

    def __len__(self) -> int:
        return int(self.chosen.sum())

    def __iter__(self) -> Any:
        for row, column in self.positions.tolist():
            yield Edge(self.writers[row], self.readers[column])

    def __contains__(self, edge: object) -> bool:
        try:
            self.position(edge)  # type: ignore[arg-type]
        except EdgeError:
            return False
        return True

    def __getitem__(self, patterns: tuple[str, str]) -> EdgeSet:
        """The edges between writers and readers of these names or name patterns, as :meth:`where`."""
        if not (isinstance(patterns, tuple) and len(patterns) == 2 and all(isinstance(each, str) for each in patterns)):
            raise EdgeError(
                f"Edges are chosen by a writer and a reader, edges['a0.*', 'm*'], not {short(repr(patterns))}."
            )
        return self.where(writer=patterns[0], reader=patterns[1])

    def _content(self) -> tuple[Any, ...]:
        return self.n_layers, self.n_heads, self.n_kv_heads, self.parallel, self.chosen

    def __repr__(self) -> str:
        heads = f"{self.n_heads} heads" + (f" ({self.n_kv_heads} key-value heads)" if self.grouped else "")
        parallel = ", attention and MLP side by side" if self.parallel else ""
        return f"EdgeSet({len(self)} edges of {self.n_layers} layers × {heads}{parallel})"


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


class EdgeScores(ByContent):
    """A score for every edge of an edge set.

    Positive means: the clean activation on this edge helps the metric. Scores are equal (``==``) if their values and
    edges are; where they come from does not count.

    Parameters
    ----------
    values:
        [writer, reader], any floating dtype; copied, as float32 on the CPU. What stands where the set has no edge does
        not matter; it becomes NaN.
    edges:
        The edges that they belong to.
    meta:
        Where they come from (method, metric, number of examples, …): JSON-like.

    Raises
    ------
    ScoreError
        If the values are no numbers, have another shape, or one is not finite.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> edges = dfa.EdgeSet(1, 1)
    >>> scores = dfa.EdgeScores(torch.arange(15.0).reshape(3, 5), edges)
    >>> scores.top(2)
    {'m0->logits': 14.0, 'a0.h0->logits': 9.0}
    >>> scores["input->m0"], scores.to_nodes().top(1)
    (3.0, {'a0.h0': 17.0})
    """

    def __init__(
        self, values: Float[Tensor, "writer reader"], edges: EdgeSet, meta: Mapping[str, Any] | None = None
    ) -> None:
        values = float_copy(values, "Edge scores", ScoreError)
        if values.shape != edges.shape:
            raise ScoreError(
                f"Edge scores of shape {list(values.shape)} for {edges.shape[0]} writers and {edges.shape[1]} readers: "
                "a matrix of these is needed."
            )
        bad = (edges.chosen & ~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise ScoreError(
                f"{len(bad)} of {len(edges)} scores are not finite (first: {values[row, column].item()} at "
                f"{Edge(edges.writers[row], edges.readers[column])}). In half precision an overflow in the model is "
                "the usual cause."
            )
        self.values: Tensor = values.masked_fill_(~edges.chosen, torch.nan)
        self.edges = edges
        self.meta: dict[str, Any] = dict(meta or {})

    @classmethod
    def of_flat(cls, flat: Float[Tensor, " edge"], edges: EdgeSet, meta: Mapping[str, Any] | None = None) -> EdgeScores:
        """From the scores of the edges alone, in their order: what :attr:`flat` gives back.

        Raises
        ------
        ScoreError
            If there are not as many as edges.
        """
        if flat.shape != (len(edges),):
            raise ScoreError(f"it has {list(flat.shape)} scores for {len(edges)} edges")
        values = torch.full(edges.shape, torch.nan, dtype=flat.dtype)
        values[edges.chosen] = flat
        return cls(values, edges, meta)

    # --- reading ---------------------------------------------------------------------------------------------

    @property
    def writers(self) -> tuple[str, ...]:
        """The names of the rows."""
        return self.edges.writers

    @property
    def readers(self) -> tuple[str, ...]:
        """The names of the columns."""
        return self.edges.readers

    @property
    def flat(self) -> Float[Tensor, " edge"]:
        """The scores of the edges of the set alone, writer by writer."""
        return self.values[self.edges.chosen]

    def order(self, ranking: Ranking = "signed", *, selection: Selection = "top") -> Int[Tensor, " edge"]:
        """The edges' positions in :attr:`flat`, best first; ties keep the order of the edges.

        Parameters
        ----------
        ranking:
            By score, or by its absolute value.
        selection:
            See :data:`Selection`.
        """
        if ranking not in get_args(Ranking):
            raise unknown("ranking", ranking, get_args(Ranking), ScoreError)
        if selection not in get_args(Selection):
            raise unknown("selection", selection, get_args(Selection), ScoreError)
        key = self.flat if ranking == "signed" else self.flat.abs()
        best = torch.argsort(key, descending=True, stable=True)
        return best if selection == "top" else self._from_the_logits(best)

    def _from_the_logits(self, best: Int[Tensor, " edge"]) -> Int[Tensor, " edge"]:
        """The greedy order, of the edges ranked by themselves; edges that lead nowhere come last, as ranked."""
        ends = self.edges.positions[best]
        into: dict[int, list[int]] = {}  # column → ranks of the edges into it, best first
        for rank, column in enumerate(ends[:, 1].tolist()):
            into.setdefault(column, []).append(rank)
        rows = ends[:, 0].tolist()
        inputs: dict[int, list[int]] = {}  # writer's row → columns of its inputs
        for row, column in self.edges.inputs.T.nonzero().tolist():
            inputs.setdefault(row, []).append(column)

        order: list[int] = []
        opened: set[int] = set()
        candidates: list[int] = []

        def open_reader(column: int) -> None:
            if column not in opened:
                opened.add(column)
                for rank in into.get(column, ()):
                    heapq.heappush(candidates, rank)

        open_reader(self.edges.shape[1] - 1)
        while candidates:
            rank = heapq.heappop(candidates)
            order.append(rank)
            for column in inputs.get(rows[rank], ()):
                open_reader(column)
        rest = sorted(set(range(len(best))) - set(order))
        return best[order + rest]

    def ranks(self, ranking: Ranking = "signed") -> Int[Tensor, " edge"]:
        """Each edge's rank: 1 for the best."""
        out = torch.empty(len(self), dtype=torch.long)
        out[self.order(ranking)] = torch.arange(1, len(self) + 1)
        return out

    def top(self, k: int, *, ranking: Ranking = "signed", selection: Selection = "top") -> dict[str, float]:
        """The ``k`` best edges, best first, with their scores."""
        if not 0 <= k <= len(self):
            raise ScoreError(f"k must be between 0 and the number of edges, {len(self)}, not {k}.")
        chosen = self.edges.positions[self.order(ranking, selection=selection)[:k]]
        return {
            str(Edge(self.writers[row], self.readers[column])): float(self.values[row, column])
            for row, column in chosen.tolist()
        }

    def circuit(
        self,
        k: int,
        *,
        ranking: Ranking = "signed",
        selection: Selection = "top",
        with_input: bool = False,
        name: str | None = None,
    ) -> EdgeCircuit:
        """The ``k`` best edges as a circuit: the one that a faithfulness curve runs at size ``k``.

        Parameters
        ----------
        k:
            How many edges.
        ranking, selection:
            As for the curve.
        with_input:
            Whether the edges of the input are ranked with the others, as in the ``mib`` protocol. Else they are in
            every circuit and not counted, as in the ``nodes`` protocol.
        name:
            What the circuit is called; default: "top k".

        Raises
        ------
        ScoreError
            If ``k`` is out of range.

        Examples
        --------
        >>> import torch, dfa_lens as dfa
        >>> scores = dfa.EdgeScores(torch.arange(15.0).reshape(3, 5), dfa.EdgeSet(1, 1))
        >>> scores.circuit(2)
        EdgeCircuit('top 2': 2 of 3 edges: a0.h0->logits, m0->logits)
        """
        from dfa_lens.data.edge_circuit import EdgeCircuit

        ranked = self if with_input else EdgeScores(self.values, self.edges.without_input(), self.meta)
        if not 0 <= k <= len(ranked):
            raise ScoreError(f"k must be between 0 and the number of ranked edges, {len(ranked)}, not {k}.")
        best = ranked.edges.positions[ranked.order(ranking, selection=selection)[:k]]
        meta = {**self.meta, "k": k, "ranking": ranking, "selection": selection}
        return EdgeCircuit(ranked.edges.mask(best), ranked.edges, name=name or f"top {k}", meta=meta)

    def where(self, *, writer: str = "*", reader: str = "*") -> EdgeScores:
        """The scores of the edges between the writers and readers of these names or name patterns."""
        return EdgeScores(self.values, self.edges.where(writer=writer, reader=reader), self.meta)

    def to_frame(self) -> Any:
        """A pandas table, a row per edge: edge, writer, reader, score, rank."""
        import pandas as pd

        rows, columns = self.edges.positions.unbind(1)
        writers = pd.Categorical.from_codes(rows.numpy(), list(self.writers))
        readers = pd.Categorical.from_codes(columns.numpy(), list(self.readers))
        return pd.DataFrame(
            {
                "edge": [str(edge) for edge in self.edges],
                "writer": writers,
                "reader": readers,
                "score": self.flat.numpy(),
                "rank": self.ranks().numpy(),
            }
        )

    def require(self, edges: EdgeSet, what: str = "these scores") -> None:
        """A :class:`~dfa_lens.errors.ScoreError` unless they are scores of edges of the model that ``edges`` is of."""
        if self.edges.all_of_model != edges.all_of_model:
            raise ScoreError(
                f"{what} belong to the {self.edges!r}, but the {edges!r} is expected: they come from another model, or "
                "have other readers (grouped or per head)."
            )

    # --- other forms -------------------------------------------------------------------------------------------

    @classmethod
    def from_nodes(cls, scores: NodeScores, edges: EdgeSet) -> EdgeScores:
        """Each node's score in equal parts on its edges, so that :meth:`to_nodes` gives the node scores back.

        Parameters
        ----------
        scores:
            Of heads and MLP blocks, and of the input or not (its edges then have 0).
        edges:
            Which edges get a part.

        Raises
        ------
        ScoreError
            If the scores are of other nodes than the writers, or of one without an edge in the set.

        Examples
        --------
        >>> import torch, dfa_lens as dfa
        >>> nodes = dfa.NodeScores(torch.tensor([0.0, 3.0, 1.0]), dfa.NodeSet.for_sizes(1, 1, with_input=True))
        >>> dfa.EdgeScores.from_nodes(nodes, dfa.EdgeSet(1, 1)).top(2)
        {'a0.h0->m0': 1.5, 'a0.h0->logits': 1.5}
        """
        if scores.nodes not in (edges.nodes, edges.nodes[1:]):
            raise ScoreError(
                f"Node scores of {len(scores)} nodes ({scores.nodes.names[0]} … {scores.nodes.names[-1]}) are not "
                f"those of the writers of the {edges!r}."
            )
        values = scores.values.double()
        if scores.nodes != edges.nodes:
            values = torch.cat([values.new_zeros(1), values])
        n_edges = edges.chosen.sum(1)
        lost = ((n_edges == 0) & (values != 0)).nonzero()
        if len(lost):
            raise ScoreError(f"The set has no edge of {edges.writers[int(lost[0])]!r} to carry its score.")
        parts = values / n_edges.clamp_min(1)
        return cls(parts[:, None].expand(edges.shape), edges, {**scores.meta, "shared": "nodes"})

    def to_nodes(self) -> NodeScores:
        """The sums over each writer's edges: of all edges of a model, the node scores of the same method.

        That holds of scores by gradients (``nap`` is the sum of ``eap``, and so on); exact effects do not add up.
        """
        return NodeScores(self.values.double().nansum(1), self.edges.nodes, {**self.meta, "summed": "edges"})

    def to_grouped(self, n_kv_heads: int) -> EdgeScores:
        """Per-head scores as those of grouped readers: the sums over the heads that share keys and values.

        Scores by gradients add up so; exact effects do not.

        Raises
        ------
        EdgeError
            If the readers are grouped already, the heads can't be shared so, or some heads of a group are missing.
        """
        if self.edges.grouped:
            raise EdgeError(f"The readers are grouped already ({self.edges.n_kv_heads} key-value heads).")
        whole = EdgeSet(self.edges.n_layers, self.edges.n_heads, n_kv_heads, parallel=self.edges.parallel)
        values = torch.full(whole.shape, torch.nan, dtype=torch.float64)
        for old, new in zip(self.edges.sites, whole.sites, strict=True):
            values[:, new.columns] = self.values[:, old.columns].double().unflatten(1, (len(new), -1)).sum(2)
        chosen = whole.existing & ~values.isnan()
        n_members = self.edges.n_heads // whole.n_kv_heads
        members = sum(
            int(chosen[:, site.columns].sum()) * (n_members if site.kind in ("k", "v") else 1) for site in whole.sites
        )
        if members != len(self.edges):
            raise EdgeError("The set lacks edges of some heads of a group, so the group has no sum.")
        return EdgeScores(values, whole.choose(chosen), self.meta)

    def __len__(self) -> int:
        return len(self.edges)

    def __getitem__(self, edge: str | tuple[str, str]) -> float:
        """The score of an edge: scores["a0.h1->m2"] or scores["a0.h1", "m2"]."""
        return float(self.values[self.edges.position(edge)])

    def _content(self) -> tuple[Any, ...]:
        return self.flat, self.edges

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {score:+.3g}" for name, score in self.top(min(3, len(self))).items())
        method = f"{self.meta['method']}, " if "method" in self.meta else ""
        return f"EdgeScores({method}{len(self)} edges, best: {best})"

    def _repr_html_(self) -> str:
        """The best edges, for notebooks."""
        return html.shown(repr(self), self.to_frame().sort_values("rank"))

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the scores, the edges and the provenance."""
        edges, tensors = self.edges, {"scores": self.flat}
        if not torch.equal(edges.chosen, edges.existing):
            tensors["edges"] = edges.positions.to(torch.int32)
        save_tensors(path, tensors, {"sizes": json.dumps(edges.sizes), "meta": json.dumps(plain(self.meta))}, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> EdgeScores:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not a file of edge scores.
        """
        tensors, metadata = load_tensors(path, _FORMAT, ("sizes", "meta"))

        def make() -> EdgeScores:
            flat, meta, sizes = tensors["scores"], parse_json(metadata["meta"]), parse_json(metadata["sizes"])
            if not flat.is_floating_point() or not isinstance(meta, dict) or not isinstance(sizes, dict):
                raise ScoreError(f"the scores are {flat.dtype}, the provenance is a {type(meta).__name__}")
            edges = edges_of_file(sizes, None if "edges" in tensors else flat.numel())
            if "edges" in tensors:
                edges = edges.choose(edges.mask(tensors["edges"]))
            return cls.of_flat(flat, edges, meta)

        return made_from(path, "a file of edge scores", make)

    # --- MIB ---------------------------------------------------------------------------------------------------

    def to_mib(self, path: str | Path) -> None:
        """Write MIB's (EAP-IG's) graph: as ``.pt`` where the path ends so, else as JSON.

        Every edge of the set is ``in_graph`` there; edges of the model that are not in it are written with score 0.

        Raises
        ------
        ScoreError
            If the readers are grouped: the format has readers of keys and values for every query head. Or if attention
            and MLP run side by side.
        """
        if self.edges.grouped:
            raise ScoreError(
                "MIB's format has a reader of keys and of values for every query head, and these scores have one for "
                "every key-value head: use readers='per-head'."
            )
        graph = mib_graphs.Graph(
            self.edges.n_layers,
            self.edges.n_heads,
            values=self.values.nan_to_num(0.0),
            in_graph=self.edges.chosen,
            meta=self.meta,
        )
        mib_graphs.write(path, graph, self.writers, self.readers, self.edges.existing)

    @classmethod
    def from_mib(cls, path: str | Path) -> EdgeScores:
        """Read MIB's (EAP-IG's) graph, a ``.pt`` or JSON file; the scores are of all edges, with per-head readers.

        Raises
        ------
        FileError
            If the file is no such file, lacks an edge or has more of them than its sizes say, or a score is no finite
            number.
        """

        def make(n_layers: int, n_heads: int) -> tuple[Sequence[str], Sequence[str], Tensor]:
            edges = EdgeSet(n_layers, n_heads)
            return edges.writers, edges.readers, edges.existing

        graph = mib_graphs.read(path, make)
        edges = EdgeSet(graph.n_layers, graph.n_heads)
        return made_from(path, mib_graphs.WHAT, lambda: cls(graph.values, edges, graph.meta))


#: The most cells (writers times readers) that a file of chosen edges may ask for, which says so by three numbers alone.
MOST_CELLS = 10**8


def edges_of_file(sizes: Mapping[str, Any], n_edges: int | None = None, *, cells: int | None = None) -> EdgeSet:
    """The edges of a model of a file's sizes, which are compared with what it holds before anything of them is made.

    Parameters
    ----------
    sizes:
        Those of :attr:`EdgeSet.sizes`, as the file has them.
    n_edges, cells:
        How many edges, or writers times readers, the file holds something of; None: it does not say.

    Raises
    ------
    ScoreError
        If there are others, or more than ``MOST_CELLS`` writers times readers.

    Examples
    --------
    >>> from dfa_lens.data.edges import edges_of_file
    >>> edges_of_file({"n_layers": 1, "n_heads": 2, "n_kv_heads": 1}, 11)
    EdgeSet(11 edges of 1 layers × 2 heads (1 key-value heads))
    """
    given = [sizes[name] for name in ("n_layers", "n_heads", "n_kv_heads")]
    layers, heads, kv_heads = (selection.integer(number) or 0 for number in given)
    parallel = sizes.get("parallel", False) is True
    if n_edges is not None and n_edges != mib_graphs.n_edges(layers, heads, kv_heads) - parallel * layers * heads:
        raise ScoreError(f"it has {n_edges} scores, not those of {short(given)} layers, heads and key-value heads")
    expected = (1 + layers * (heads + 1)) * (1 + layers * (heads + 2 * kv_heads + 1))
    if cells is not None and cells != expected:
        raise ScoreError(f"it has {cells} cells, not those of {short(given)} layers, heads and key-value heads")
    if expected > MOST_CELLS:
        raise ScoreError(f"its sizes are {short(given)}: more than {MOST_CELLS:.0e} writers times readers")
    return EdgeSet(*given, parallel=parallel)
