"""A circuit of edges as a graph: layers from the input at the bottom to the logits at the top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool
from torch import Tensor

from dfa_lens.data.edge_circuit import EdgeCircuit
from dfa_lens.data.edges import EdgeScores, EdgeSet, ReaderSite, Selection
from dfa_lens.data.scores import Ranking
from dfa_lens.errors import EdgeError
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style

POSITIVE, NEGATIVE = styling.DIVERGING[-1][1], styling.DIVERGING[0][1]
PALE = {POSITIVE: styling.DIVERGING[-2][1], NEGATIVE: styling.DIVERGING[1][1]}
HEAD, MLP = "#f2f6fa", "#fdf1e8"
#: Edges without scores: their colour, and how strong they look of 1.
PLAIN, PLAINLY = "#7a7a7a", 0.15
ENDS = {"input": "the embedding", "logits": "what the unembedding reads"}

#: Height of a layer and, within it, of what it holds, in units of the y axis.
LAYER = 3.0
KEYS, QUERIES, HEADS, BLOCK = 0.5, 1.05, 1.75, 2.7
#: Where the y axis begins, and how far it goes beyond the logits.
FLOOR, CEILING = -2.0, 1.1
#: Pixels of a unit (of models with more than twelve layers less), above the graph, and below it on paper.
UNIT, UNIT_OF_MANY, UNIT_ON_PAPER = 25, 20, 11
TOP, ON_PAPER = 80, 60
#: Below it on the screen: what the axis takes, the slider (both as in fit.js), and the line of a click.
AXIS, SLIDER, NOTE = 46, 58, 110
#: How far from the middle of a node, and of a reader, edges begin and end: what is hovered there is the node.
NEAR_NODE, NEAR_READER = 0.35, 0.2
#: Points of a curve: hovering finds the nearest.
N_POINTS = 24
#: Names that the line below the figure lists in each direction.
LISTED = 4
#: Of edges; the second is that of edges which a click leaves out.
OPACITY, FAINT = 0.85, 0.06


class Point(NamedTuple):
    """A place in the figure."""

    x: float
    y: float


@dataclass(frozen=True)
class Map:
    """Where writers and readers of a model are drawn: a column a head, one for the MLP blocks at the right."""

    edges: EdgeSet

    @property
    def middle(self) -> float:
        """The column of the input and the logits."""
        return (self.edges.n_heads - 1) / 2

    @property
    def mlps(self) -> float:
        """The column of the MLP blocks."""
        return self.edges.n_heads + 0.2

    @property
    def top(self) -> float:
        """The height of the logits."""
        return LAYER * self.edges.n_layers + 0.7

    @cached_property
    def writers(self) -> dict[str, Point]:
        """By name."""
        points = [Point(self.middle, -0.9)]
        for layer in range(self.edges.n_layers):
            points += [Point(head, LAYER * layer + HEADS) for head in range(self.edges.n_heads)]
            points.append(Point(self.mlps, LAYER * layer + BLOCK))
        return dict(zip(self.edges.writers, points, strict=True))

    @cached_property
    def readers(self) -> dict[str, Point]:
        """By name."""
        points: list[Point] = []
        for site in self.edges.sites:
            points += [self._reader(site, index) for index in range(len(site))]
        return dict(zip(self.edges.readers, points, strict=True))

    def _reader(self, site: ReaderSite, index: int) -> Point:
        bottom = LAYER * site.layer
        if site.kind == "logits":
            return Point(self.middle, self.top)
        if site.kind == "mlp":
            return Point(self.mlps, bottom + BLOCK)
        if site.kind == "q":
            return Point(index, bottom + QUERIES)
        members = self.edges.n_heads // len(site)
        return Point((index + 0.5) * members - 0.5 + (-0.3 if site.kind == "k" else 0.3), bottom + KEYS)

    @cached_property
    def owners(self) -> dict[str, list[str]]:
        """Reader → the writers whose input it is; of the logits none."""
        owners: dict[str, list[str]] = {reader: [] for reader in self.edges.readers}
        for column, row in self.edges.inputs.nonzero().tolist():
            owners[self.edges.readers[column]].append(self.edges.writers[row])
        return owners

    def curve(self, writer: str, reader: str) -> tuple[np.ndarray, np.ndarray]:
        """The way of an edge: up from its writer, and up into its reader, around what stands between."""
        start, end = self.writers[writer], self.readers[reader]
        start = Point(start.x, start.y + NEAR_NODE)
        end = Point(end.x, end.y - (NEAR_READER if "<" in reader else NEAR_NODE))
        rise = (end.y - start.y) / 2
        bow = 0.0
        if abs(end.x - start.x) < 0.75 and rise > 1:  # the column is full of others: go round them
            bow = min(0.6 + 0.1 * rise, 1.8) * (1 if start.x >= self.middle else -1)
        t = np.linspace(0, 1, N_POINTS)
        weights = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
        x = np.array([start.x, start.x + bow, end.x + bow, end.x]) @ weights
        y = np.array([start.y, start.y + rise, end.y - rise, end.y]) @ weights
        return x.round(3), y.round(3)


@dataclass(frozen=True)
class Drawn:
    """One edge of the figure."""

    writer: str
    reader: str
    score: float  #: NaN of an edge without one, as its rank
    rank: float
    entry: int  #: the number of the slider's step at which it appears

    @property
    def name(self) -> str:
        """As everywhere: "a0.h1->m2"."""
        return f"{self.writer}->{self.reader}"

    @property
    def as_read(self) -> str:
        """How its reader's node speaks of it."""
        at = f" ({self.reader[self.reader.index('<') + 1]})" if "<" in self.reader else ""
        return f"{self.writer}{self._number}{at}"

    @property
    def as_written(self) -> str:
        """How its writer speaks of it."""
        return f"{styling.text(self.reader)}{self._number}"

    @property
    def _number(self) -> str:
        return "" if np.isnan(self.score) else f" {self.score:+.3g}"


@dataclass(frozen=True)
class Edges:
    """What is drawn: the edges, with their scores if they have some, and those that run besides and are not drawn."""

    scores: EdgeScores
    scored: bool
    beyond: Bool[Tensor, "writer reader"]

    @classmethod
    def of(cls, edges: EdgeScores | EdgeCircuit, scores: EdgeScores | None) -> Edges:
        """Of edge scores, or of a circuit and perhaps scores of its edges."""
        arguments.expect(1, "edges", edges, EdgeScores, EdgeCircuit)
        if isinstance(edges, EdgeScores):
            if scores is not None:
                raise EdgeError("scores= are of the edges of a circuit: the first argument has scores of its own.")
            return cls(edges, True, torch.zeros(edges.edges.shape, dtype=torch.bool))
        beyond = edges.open & ~edges.kept
        if scores is None:
            return cls(EdgeScores(torch.zeros(edges.universe.shape), edges.edges), False, beyond)
        scores.require(edges.universe, "The scores")
        missing = (edges.kept & ~scores.edges.chosen).nonzero()
        if len(missing):
            row, column = missing[0].tolist()
            raise EdgeError(f"The circuit's edge {scores.writers[row]}->{scores.readers[column]} has no score.")
        return cls(EdgeScores(scores.values, edges.edges, scores.meta), True, beyond)

    def live(self, kept: Bool[Tensor, "writer reader"]) -> Bool[Tensor, "writer reader"]:
        """Those of some of its edges that lie on a path."""
        return self.scores.edges.live(kept | self.beyond) & kept


def _circuits(
    edges: Edges, sizes: Sequence[int], ranking: Ranking, selection: Selection, prune: bool
) -> tuple[list[Drawn], list[int]]:
    """The edges of the largest circuit, best first, with the circuit in which each first lies on a path; and how many
    there are in each circuit."""
    scores = edges.scores
    ends = scores.edges.positions[scores.order(ranking, selection=selection)[: sizes[-1]]]
    rows, columns = ends.unbind(1)
    entry = torch.full((len(ends),), len(sizes))
    numbers = []
    for step, size in enumerate(sizes):
        kept = torch.zeros(scores.edges.shape, dtype=torch.bool)
        kept[rows[:size], columns[:size]] = True
        live = (edges.live(kept) if prune else kept)[rows, columns]
        entry[live] = entry[live].clamp_max(step)  # more edges never cut a path
        numbers.append(int(live.sum()))
    found = []
    for rank, ((row, column), at) in enumerate(zip(ends.tolist(), entry.tolist(), strict=True), 1):
        if at < len(sizes):
            number = (float(scores.values[row, column]), rank) if edges.scored else (np.nan, np.nan)
            found.append(Drawn(scores.writers[row], scores.readers[column], number[0], number[1], at))
    return found, numbers


def _sizes(most: int, size: int) -> list[int]:
    """Some twenty circuit sizes, close together where they are small."""
    steps = [5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 100, 125, 150, 175]
    beyond = range(200, most, max(50, (most - 200) // 8 // 50 * 50))
    return sorted({size, most, *(k for k in [*steps, *beyond] if k < most)})


def circuit_graph(
    edges: EdgeScores | EdgeCircuit,
    *,
    scores: EdgeScores | None = None,
    size: int | None = None,
    most: int = 200,
    ranking: Ranking = "absolute",
    selection: Selection = "top",
    prune: bool = True,
    slider: bool = True,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    style: Style = "screen",
) -> Picture:
    """A circuit of edges as a graph.

    Layers go from the input at the bottom to the logits at the top. A circle is a head, with its number; below it are
    its readers q, k and v (k and v between the heads that share them); a square is an MLP block. Edges are red where
    the clean activation helps and blue where it hurts; width and depth of colour go by the absolute score, in
    proportion, up to the 98th percentile of those that are drawn. Hover: the edge, its score and rank. Click on a node
    or a reader: only what it reads and writes stays in colour, and a line below names the strongest. Slider: circuit
    size.

    A model of 8 B parameters has 1.6 million edges; the figure holds the ``most`` best alone, about one kilobyte each.

    Parameters
    ----------
    edges:
        Scores of edges, all or some; those of the input are ranked with the others, as in the ``mib`` protocol. Or a
        circuit of edges, of which its own are drawn. What runs beside it is not drawn, but counts for paths: the edges
        of the input, where the circuit was chosen among the others alone (as ``scores.circuit(k)`` does).
    scores:
        Scores of a circuit's edges. With them it is coloured and has a slider; without, its edges are grey.
    size:
        The circuit that is shown at first: so many edges. Default: 50 of scores, all of a circuit, or what there are.
    most:
        The largest circuit of the slider: no edge beyond it is in the figure. A circuit without scores has no best
        edges: a larger one is refused.
    ranking, selection:
        As in :func:`~dfa_lens.evaluation.faithfulness.faithfulness_curve`: the best by absolute score (the default
        here, so that edges which hurt are seen) or by signed score; from the top, or greedily from the logits down.
    prune:
        Leave out edges on no path from the input to the logits: they change nothing (:meth:`EdgeSet.live`). The slider
        says how many are left.
    slider:
        Whether there is one. Without it, and on paper, the circuit of ``size`` edges is all that is drawn.
    style:
        See :data:`~dfa_lens.plots.style.Style`.

    Raises
    ------
    EdgeError
        If ``size`` or ``most`` is out of range, no edge lies on a path, or a circuit's edge has no score.
    CircuitError
        If the circuit is empty.
    ScoreError
        If the scores of a circuit's edges are of another model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> figure = dfa.plots.circuit_graph(dfa.attribute_edges(model, pairs, method="eap"), size=20, most=50)
    >>> figure.to_frame().columns.tolist()
    ['edge', 'writer', 'reader', 'score', 'rank', 'size']
    """
    on_paper = styling.on_paper(style)
    found = Edges.of(edges, scores)
    scores = found.scores
    slider = slider and found.scored and not on_paper
    if not found.scored:
        _check_plain(len(scores), size, most)
    default = 50 if isinstance(edges, EdgeScores) else len(scores)
    size, most = _checked(len(scores), size, default, most, slider)
    sizes = _sizes(most, size) if slider else [size]
    drawn, numbers = _circuits(found, sizes, ranking, selection, prune)
    if not drawn:
        raise EdgeError(
            f"None of the {sizes[-1]} best edges lies on a path of such edges from the input to the logits: take more "
            "(most=, size=), selection='greedy', or prune=False to draw them all the same."
        )
    first = sizes.index(size)
    place = Map(scores.edges)
    traces = [
        *_edge_traces(drawn, place, 0.6 if on_paper else 1.0),
        *_node_traces(drawn, place, prune, 0.7 if on_paper else 1.0),
    ]
    entries = [entry for entry, _ in traces]
    figure = Picture([go.Scatter(**trace, visible=entry <= first, showlegend=False) for entry, trace in traces])
    unit = UNIT_ON_PAPER if on_paper else UNIT if scores.edges.n_layers <= 12 else UNIT_OF_MANY
    bottom = ON_PAPER if on_paper else AXIS + SLIDER * slider + NOTE
    tall = height or round(unit * (place.top - FLOOR + CEILING) + TOP + bottom)
    styling.layout(figure, title, width=width, height=tall, style=style)
    _axes(figure, place, tall, bottom)
    _legend(figure, found)
    if slider:
        labels = [f"{k} of {len(scores)}" + (f", {n} on a path" * prune) for k, n in zip(sizes, numbers, strict=True)]
        _add_slider(figure, labels, first, entries, -AXIS / max(tall - TOP - bottom, 1))
    table = pd.DataFrame(
        {
            "edge": [edge.name for edge in drawn],
            "writer": [edge.writer for edge in drawn],
            "reader": [edge.reader for edge in drawn],
            "score": [edge.score for edge in drawn],
            "rank": [edge.rank for edge in drawn],
            "size": [sizes[edge.entry] for edge in drawn],
        }
    )
    clicks = Clicks.of(drawn, place, AXIS + SLIDER * slider + 4)
    if on_paper:
        return figure.carry(table, react=clicks.wire)
    fit = picture.fit([(0, {"height": tall})], below=NOTE)
    return figure.carry(table, click=clicks.reaction(place), fit=fit, react=clicks.wire)


def _check_plain(n: int, size: int | None, most: int) -> None:
    """What can't be asked of a circuit without scores."""
    if size is not None:
        raise EdgeError("A circuit without scores has no best edges: give scores=, or leave size out.")
    if n > most:
        raise EdgeError(
            f"The circuit has {n} edges, and the figure is to hold {most}: give scores=, so that there are best ones, "
            f"or most={n} (about a kilobyte each)."
        )


def _checked(n: int, size: int | None, default: int, most: int, slider: bool) -> tuple[int, int]:
    if most < 1:
        raise EdgeError(f"most must be at least 1, not {most}.")
    most = min(most, n)
    if size is None:
        size = min(default, most)
    if not 1 <= size <= (most if slider else n):
        raise EdgeError(
            f"size must be between 1 and {f'most, which is {most}' if slider else f'the number of edges, {n}'}, "
            f"not {size}."
        )
    return size, most


Trace = tuple[int, dict[str, Any]]  #: the step at which it appears, and its attributes


def _edge_traces(drawn: Sequence[Drawn], place: Map, thickness: float) -> Iterator[Trace]:
    """One line each, from the weakest to the strongest, which is on top."""
    limit = styling.robust_limit(np.array([edge.score for edge in drawn]))
    for edge in reversed(drawn):
        plain = np.isnan(edge.score)
        strength = PLAINLY if plain else min(1.0, abs(edge.score) / limit)
        color, verb = (POSITIVE, "helps") if edge.score >= 0 else (NEGATIVE, "hurts")
        x, y = place.curve(edge.writer, edge.reader)
        words = "" if plain else f"<br>score {edge.score:+.4g}: the clean activation {verb}<br>rank {edge.rank}"
        yield (
            edge.entry,
            {
                "x": x,
                "y": y,
                "mode": "lines",
                "name": edge.name,
                "line": {
                    "color": PLAIN if plain else _mixed(PALE[color], color, strength),
                    "width": round(thickness * (1 + 6 * strength), 2),
                },
                "opacity": OPACITY,
                "text": f"<b>{styling.text(edge.name)}</b>{words}",
                "hoverinfo": "text",
            },
        )


def _mixed(pale: str, full: str, strength: float) -> str:
    """Between two "#rrggbb" colours."""
    parts = ((int(pale[i : i + 2], 16), int(full[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * strength):02x}" for a, b in parts)


def _entries(drawn: Sequence[Drawn], place: Map, prune: bool) -> tuple[dict[str, int], dict[str, int]]:
    """At which step each writer and each reader appears."""
    writers: dict[str, int] = {}
    readers: dict[str, int] = {}
    for edge in drawn:
        writers[edge.writer] = min(edge.entry, writers.get(edge.writer, edge.entry))
        readers[edge.reader] = min(edge.entry, readers.get(edge.reader, edge.entry))
    if not prune:  # heads that read and are not read: on a path each is read
        for reader, entry in readers.items():
            for owner in place.owners[reader]:
                writers[owner] = min(entry, writers.get(owner, entry))
    return writers, readers


def _node_traces(drawn: Sequence[Drawn], place: Map, prune: bool, scale: float) -> Iterator[Trace]:
    """What joins readers to their heads, the readers, the nodes: a trace for all that appear at one step."""
    writers, readers = _entries(drawn, place, prune)
    ports = {name: entry for name, entry in readers.items() if "<" in name}
    stems = [
        (max(entry, writers[owner]), place.readers[reader], place.writers[owner])
        for reader, entry in ports.items()
        for owner in place.owners[reader]
        if owner in writers
    ]
    for step in sorted({entry for entry, _, _ in stems}):
        ends = [(start, end) for entry, start, end in stems if entry == step]
        yield (
            step,
            {
                "x": [x for start, end in ends for x in (start.x, end.x, None)],
                "y": [y for start, end in ends for y in (start.y, end.y, None)],
                "mode": "lines",
                "line": {"color": "#999999", "width": 1},
                "name": "stems",
                "hoverinfo": "skip",
            },
        )
    for step, names in _by_step(ports):
        yield (
            step,
            {
                **_marked(names, place.readers, _reader_text),
                "name": "readers",
                "text": [name[name.index("<") + 1] for name in names],
                "textfont": {"size": 9 * scale, "color": styling.INK},
                "marker": {"size": 13 * scale, "color": "#ffffff", "line": {"color": "#999999", "width": 1}},
            },
        )
    outer = {name: entry for name, entry in {**writers, **readers}.items() if name in ENDS}
    for step, names in _by_step(outer):  # beside their labels, which are as light or dark as the page's
        yield (
            step,
            {
                **_marked(names, {**place.readers, **place.writers}, ENDS.__getitem__),
                "name": "nodes",
                "cliponaxis": False,
                "text": names,
                "textfont": {"size": 12 * scale},
                "textposition": ["bottom center" if name == "input" else "top center" for name in names],
                "marker": {
                    "size": 15 * scale,
                    "symbol": "square",
                    "color": MLP,
                    "line": {"color": "#555555", "width": 1},
                },
            },
        )
    nodes = {name: entry for name, entry in writers.items() if name not in ENDS}
    for name, entry in readers.items():  # MLP blocks are both
        if "<" not in name and name not in ENDS:
            nodes[name] = min(entry, nodes.get(name, entry))
    for step, names in _by_step(nodes):
        heads = [".h" in name for name in names]
        yield (
            step,
            {
                **_marked(names, place.writers, _node_text),
                "name": "nodes",
                "text": [_label(name) for name in names],
                "textfont": {"size": 10.5 * scale, "color": styling.INK},
                "marker": {
                    "size": 23 * scale,
                    "symbol": ["circle" if head else "square" for head in heads],
                    "color": [HEAD if head else MLP for head in heads],
                    "line": {"color": "#555555", "width": 1},
                },
            },
        )


def _by_step(entries: Mapping[str, int]) -> Iterator[tuple[int, list[str]]]:
    """The names that appear at each step."""
    for step in sorted(set(entries.values())):
        yield step, [name for name, entry in entries.items() if entry == step]


def _marked(names: Sequence[str], points: Mapping[str, Point], text: Callable[[str], str]) -> dict[str, Any]:
    """Where markers stand, and what they say."""
    return {
        "x": [points[name].x for name in names],
        "y": [points[name].y for name in names],
        "mode": "markers+text",
        "customdata": names,
        "hovertext": [f"<b>{styling.text(name)}</b><br>{text(name)}" for name in names],
        "hoverinfo": "text",
    }


def _label(name: str) -> str:
    return name[name.index(".h") + 2 :] if ".h" in name else name


def _node_text(name: str) -> str:
    return f"head {_label(name)} of layer {name[1 : name.index('.')]}" if ".h" in name else f"MLP of layer {name[1:]}"


def _reader_text(name: str) -> str:
    layer, rest = name[1:].split(".")
    kind = {"q": "queries", "k": "keys", "v": "values"}[rest[-2]]
    of = f"key-value head {rest[2 : rest.index('<')]}" if rest.startswith("kv") else f"head {rest[1 : rest.index('<')]}"
    return f"{kind} of {of}, layer {layer}"


def _axes(figure: go.Figure, place: Map, tall: int, bottom: int) -> None:
    """Layers and heads along the sides, layers on stripes."""
    layers, heads = place.edges.n_layers, place.edges.n_heads
    every = 1 if heads <= 12 else 4 if heads <= 32 else 8
    plain = {"showgrid": False, "zeroline": False, "showline": False, "ticks": "", "fixedrange": False}
    figure.update_xaxes(
        range=[-1.2, place.mlps + 1.7],
        tickvals=[*range(0, heads, every), place.mlps],
        ticktext=[*map(str, range(0, heads, every)), "MLP"],
        title={"text": "head", "standoff": 2},
        **plain,
    )
    figure.update_yaxes(
        range=[FLOOR, place.top + CEILING],
        tickvals=[LAYER * layer + LAYER / 2 for layer in range(layers)],
        ticktext=[str(layer) for layer in range(layers)],
        title={"text": "layer", "standoff": 6},
        **plain,
    )
    figure.update_layout(
        hovermode="closest",
        shapes=[
            {
                "type": "rect",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": LAYER * layer,
                "y1": LAYER * (layer + 1),
                "fillcolor": "rgba(128,128,128,0.10)",
                "line": {"width": 0},
                "layer": "below",
            }
            for layer in range(0, layers, 2)
        ],
        legend={
            "orientation": "h",
            "yref": "container",
            "y": 1 - 34 / tall,
            "yanchor": "top",
            "x": 0,
        },
        margin={"t": TOP, "b": bottom},
    )
    if figure.layout.title.text:
        figure.update_layout(title={"y": 1 - 8 / tall, "yanchor": "top"})


def _legend(figure: go.Figure, edges: Edges) -> None:
    """The two colours, or what is grey; and that edges run besides which are not drawn."""
    entries = [("helps", POSITIVE), ("hurts", NEGATIVE)] if edges.scored else [("in the circuit", PLAIN)]
    for name, color in entries:
        figure.add_scatter(x=[None], y=[None], mode="lines", name=name, line={"color": color, "width": 4})
    besides = int(edges.beyond.sum())
    if besides:
        of_input = not edges.beyond[1:].any()
        name = f"{besides:,} {'edges of the input' if of_input else 'other edges'} run, too"
        line = {"color": PLAIN, "width": 1, "dash": "dot"}
        figure.add_scatter(x=[None], y=[None], mode="lines", name=name, line=line)
    figure.update_layout(showlegend=True)  # also of one entry alone


def _add_slider(figure: go.Figure, labels: Sequence[str], first: int, entries: Sequence[int], y: float) -> None:
    """Circuit sizes; each step shows what has appeared by then, and notes its number for clicks."""
    indices = list(range(len(entries)))
    figure.update_layout(
        meta=first,
        sliders=[
            {
                "active": first,
                "steps": [
                    {
                        "method": "update",
                        "label": label,
                        "args": [{"visible": [entry <= step for entry in entries]}, {"meta": step}, indices],
                    }
                    for step, label in enumerate(labels)
                ],
                "x": 0,
                "len": 1,
                "y": y,
                "pad": {"t": 0, "b": 0},
                "currentvalue": {"prefix": "edges: ", "font": {"size": 13, "color": styling.INK}},
                "ticklen": 0,
                "minorticklen": 0,
                "font": {"color": "rgba(0,0,0,0)", "size": 1},
            }
        ],
    )


@dataclass(frozen=True)
class Clicks:
    """What a click on a node or reader brings: its edges stay in colour, a line of text names the strongest.

    ``edges`` are, by trace, the words of its reader and of its writer for it, and the step at which it appears;
    ``reads`` and ``writes`` the traces by name, strongest first.
    """

    edges: list[tuple[str, str, int]]
    reads: dict[str, list[int]]
    writes: dict[str, list[int]]
    below: int  #: pixels from the graph down to the line

    @classmethod
    def of(cls, drawn: Sequence[Drawn], place: Map, below: int) -> Clicks:
        """For the edges in the order in which they are drawn."""
        edges = drawn[::-1]
        reads: dict[str, list[int]] = {}
        writes: dict[str, list[int]] = {}
        for trace in sorted(range(len(edges)), key=lambda i: -np.nan_to_num(abs(edges[i].score))):
            edge = edges[trace]
            writes.setdefault(edge.writer, []).append(trace)
            for name in {edge.reader, *place.owners[edge.reader]}:
                reads.setdefault(name, []).append(trace)
        return cls([(edge.as_read, edge.as_written, edge.entry) for edge in edges], reads, writes, below)

    @property
    def note(self) -> dict[str, Any]:
        """The line, still without its text."""
        return {**picture.NOTE, "yshift": -self.below}

    def reaction(self, place: Map) -> picture.Reaction:
        """What makes the HTML of a figure react to clicks, and fits the labels into its width."""
        columns = place.mlps + 2.9
        data = {"edges": self.edges, "reads": self.reads, "writes": self.writes}
        return picture.Reaction(
            "graph.js", data | {"note": self.note, "listed": LISTED, "columns": columns, "opacity": [OPACITY, FAINT]}
        )

    def text(self, name: str, step: int) -> str:
        """The line that says what a node reads and writes in the circuit of a step."""
        lines = []
        for verb, traces, word in (("reads", self.reads, 0), ("writes to", self.writes, 1)):
            words = [str(self.edges[i][word]) for i in traces.get(name, ()) if self.edges[i][2] <= step]
            if words:
                more = f" and {len(words) - LISTED} more" if len(words) > LISTED else ""
                lines.append(f"{verb} {', '.join(words[:LISTED])}{more}")
        return f"<b>{styling.text(name)}</b> {'<br>'.join(lines)}"

    def wire(self, widget: go.FigureWidget) -> None:
        """Make a widget react to clicks."""

        def clicked(trace: Any, points: Any, state: Any = None) -> None:
            for index in points.point_inds:
                name = trace.customdata[index]
                mine = {*self.reads.get(name, ()), *self.writes.get(name, ())}
                step = widget.layout.meta if widget.layout.meta is not None else 0
                with widget.batch_update():
                    for i in range(len(self.edges)):
                        widget.data[i].opacity = OPACITY if i in mine else FAINT
                    widget.layout.annotations = [{**self.note, "text": self.text(name, step)}]

        for trace in widget.data:
            if trace.name in ("nodes", "readers"):
                trace.on_click(clicked)
