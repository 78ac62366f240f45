"""A circuit of nodes as a graph in layers, and what a node does on click."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.circuit import Circuit
from dfa_lens.data.edge_circuit import EdgeCircuit
from dfa_lens.data.edges import EdgeScores, EdgeSet
from dfa_lens.data.inspection import Inspection, TokenLogit
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import CircuitError
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.grid import AROUND, Grid
from dfa_lens.plots.masks import mask_of
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style

POSITIVE, NEGATIVE = styling.DIVERGING[-1][1], styling.DIVERGING[0][1]
KEPT, OUTSIDE = "#f4a582", "#b8bcc4"
#: Of the words above an attention pattern: pixels of their font, of a letter and a line of it; what they are on paper.
FONT, LETTER, LINE, ON_PAPER = 12, 6.6, 15.6, 0.6
#: Pixels of a figure that nobody has given a width to, as in images, and of its margins at the sides.
WIDTH, SIDES = 700, 90
#: Pixels of an attention pattern where it stands alone, and beside a graph at least.
PATTERN, PATTERN_BESIDE = 330, 230
#: The part of the width that the graph has beside an attention pattern, and the pattern's.
LEFT, RIGHT = (0.0, 0.52), (0.62, 1.0)
#: A page keeps attention in fiftieths, a letter each: a third less than as numbers.
LETTER_OF = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxy"
STEPS = len(LETTER_OF) - 1
#: Letters of a token that are shown, and tokens that get a label each.
LETTERS, LABELLED = 12, 26


def node_graph(
    circuit: Circuit | EdgeCircuit,
    *,
    scores: NodeScores | None = None,
    edges: EdgeScores | None = None,
    most_edges: int = 60,
    inspection: Inspection | None = None,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    style: Style = "screen",
) -> Picture:
    """A circuit as a graph in layers, from the first at the bottom to the last at the top, and what its nodes do.

    A circle is a head, a square an MLP block; nodes outside the circuit are small and grey. With ``edges``, the best of
    them between nodes of the circuit are lines. With an ``inspection``, a click on a node (also one outside) shows what
    it does on an example: its direct effect on the logits, the tokens that it promotes and suppresses, and of a head
    its attention pattern, queries down and keys across. At first that is the node with the largest direct effect.

    Parameters
    ----------
    circuit:
        Of heads and MLP blocks; or of edges, of which the nodes on a path and the edges between them are drawn (those
        from the input and to the logits are in :func:`~dfa_lens.plots.edge_graph.circuit_graph`).
    scores:
        Of the same nodes, for colours: red where the clean activation helps and blue where it hurts, in proportion up
        to the 98th percentile; of a trained transfer the mask, from white to red. Without them, nodes of the circuit
        have one colour.
    edges, most_edges:
        Scores of edges of the same model, and how many of those within the circuit are drawn, the largest absolute
        scores first. The edges of a circuit of edges are grey without them.
    inspection:
        What :func:`dfa.inspect <dfa_lens.evaluation.inspection.inspect>` found on an example.
    style:
        See :data:`~dfa_lens.plots.style.Style`.

    Raises
    ------
    CircuitError
        If the circuit has other nodes than heads and MLP blocks, or scores, edges or inspection are of other nodes.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> scores = dfa.attribute(model, pairs, method="nap")
    >>> figure = dfa.plots.node_graph(scores.circuit(20), scores=scores, inspection=dfa.inspect(model, pairs))
    >>> figure.to_frame().columns.tolist()
    ['node', 'in_circuit', 'score', 'direct']
    """
    arguments.expect(1, "circuit", circuit, Circuit, EdgeCircuit)
    lines = circuit if isinstance(circuit, EdgeCircuit) else None
    circuit = circuit.to_nodes() if isinstance(circuit, EdgeCircuit) else circuit
    grid = Grid.of(circuit.universe)
    on_paper = styling.on_paper(style)
    if scores is not None and scores.nodes != circuit.universe:
        raise CircuitError("The scores are of other nodes than those among which the circuit was chosen.")
    if inspection is not None and not set(circuit.universe.names) - {"input"} <= set(inspection.nodes.names):
        raise CircuitError("The inspection is of another model than the circuit: it lacks some of its nodes.")
    numbers, words, colors, meaning = _coloured(circuit, scores)
    figure = Picture()
    drawn = None if edges is None else (edges.edges, edges.values.nan_to_num(0.0))
    if lines is not None:
        if edges is not None and edges.edges.shape != lines.universe.shape:
            raise CircuitError("The scores of edges are of another model than the circuit, or have other readers.")
        values = torch.ones(lines.universe.shape) if drawn is None else drawn[1]
        drawn = lines.universe, torch.where(lines.live & lines.kept, values, 0.0)
    if drawn is not None:
        _add_edges(figure, _within(circuit, *drawn).head(most_edges), circuit, grid, scored=edges is not None)
    _add_nodes(figure, circuit, inspection, grid, numbers, words, colors, 0.6 if on_paper else 1.0)
    tall = height or grid.tall() + AROUND
    styling.layout(figure, title, width=width, height=tall, style=style)
    grid.axes(figure, with_input="input" in circuit.universe, domain=LEFT if inspection is not None else (0, 1))
    if edges is not None and not meaning:
        meaning = {"helps": POSITIVE, "hurts": NEGATIVE}
    figure.update_traces(showlegend=False)
    for name, color in meaning.items():
        mark = {"color": color, "size": 10, "line": {"color": "#555555", "width": 1}}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=name, marker=mark)
    figure.update_layout(hovermode="closest", showlegend=bool(meaning), legend=styling.LEGEND_ABOVE)
    table = pd.DataFrame({"node": circuit.universe.names, "in_circuit": circuit.kept.numpy(), "score": numbers})
    if inspection is None:
        shrink = picture.Reaction("nodes.js", None)
        plain = picture.fit([(0, {"height": tall})])
        return figure.carry(table, click=None if on_paper else shrink, fit=None if on_paper else plain)
    known = dict(zip(inspection.nodes.names, inspection.direct.tolist(), strict=True))
    table["direct"] = [known.get(name, float("nan")) for name in circuit.universe.names]
    told = Told.of(inspection, scale=ON_PAPER if on_paper else 1.0, width=figure.layout.width)
    first = told.first(table)
    tall = height or max(grid.tall(), PATTERN_BESIDE) + AROUND + told.high
    figure.update_layout(height=tall)
    told.add(figure, first, tall)
    arrangements = told.arrangements(tall, grid)
    return figure.carry(
        table,
        click=None if on_paper else picture.Reaction("nodes.js", told.data(first)),
        fit=None if on_paper else picture.fit(arrangements),
        react=told.wire,
    )


def _coloured(circuit: Circuit, scores: NodeScores | None) -> tuple[np.ndarray, list[str], list[str], dict[str, str]]:
    """Of every node of the universe its number, what is said of it, and its colour in the circuit; what these mean."""
    n = len(circuit.universe)
    if scores is None:
        return np.full(n, np.nan), [""] * n, [KEPT] * n, {}
    mask = mask_of(scores)
    values = scores.values.double().numpy() if mask is None else mask
    limit = styling.robust_limit(values) if mask is None else 1.0
    ranks = [int(rank) for rank in scores.ranks()]
    word, form = ("score", "+.4g") if mask is None else ("mask", ".3f")
    said = [f"<br>{word} {value:{form}}, rank {rank}" for value, rank in zip(values, ranks, strict=True)]
    meaning = {"helps": 1, "hurts": -1} if mask is None else {"mask 1 (kept)": 1, "mask 0 (left out)": 0}
    colors = [_color(value / limit) for value in values]
    return values, said, colors, {name: _color(value) for name, value in meaning.items()}


def _color(value: float) -> str:
    """From blue through white to red."""
    at = (min(1.0, max(-1.0, value)) + 1) / 2
    stops = styling.DIVERGING
    i = next(i for i in range(len(stops) - 1) if at <= stops[i + 1][0])
    (low, a), (high, b) = stops[i], stops[i + 1]
    part = (at - low) / (high - low)
    mixed = (int(a[k : k + 2], 16) * (1 - part) + int(b[k : k + 2], 16) * part for k in (1, 3, 5))
    return "#" + "".join(f"{round(each):02x}" for each in mixed)


def _add_nodes(
    figure: go.Figure,
    circuit: Circuit,
    inspection: Inspection | None,
    grid: Grid,
    values: np.ndarray,
    words: Sequence[str],
    colors: Sequence[str],
    scale: float,
) -> None:
    """Nodes outside the circuit small and grey, those in it on top with their numbers."""
    direct = {} if inspection is None else dict(zip(inspection.nodes.names, inspection.direct.tolist(), strict=True))
    small = grid.n_heads > 16
    for inside in (False, True):
        chosen = [i for i, kept in enumerate(circuit.kept.tolist()) if kept == inside]
        nodes = [circuit.universe[i] for i in chosen]
        places = [grid.place(node) for node in nodes]
        where = "in the circuit" if inside else "not in the circuit"
        effects = [f"<br>direct effect {direct[node.name]:+.3f}" if node.name in direct else "" for node in nodes]
        size = (9 if small else 23) if inside else (4 if small else 9)
        dark = [abs(int(colors[i][1:3], 16) * 0.3 + int(colors[i][3:5], 16) * 0.6) < 110 for i in chosen]
        figure.add_scatter(
            x=[x for x, _ in places],
            y=[y for _, y in places],
            mode="markers+text" if inside and not small else "markers",
            name="circuit" if inside else "outside",
            customdata=[node.name for node in nodes],
            hovertext=[
                f"<b>{styling.text(node.name)}</b>, {where}{words[i]}{effect}"
                for i, node, effect in zip(chosen, nodes, effects, strict=True)
            ],
            hoverinfo="text",
            text=[str(node.index) if node.kind == "head" else f"m{node.layer}"[: 3 if inside else 0] for node in nodes],
            textfont={
                "size": 10 * scale,
                "color": ["#ffffff" if each else styling.INK for each in dark] if inside else styling.INK,
            },
            marker={
                "size": size * scale,
                "symbol": ["circle" if node.kind == "head" else "square" for node in nodes],
                "color": [colors[i] for i in chosen] if inside else OUTSIDE,
                "line": {"color": "#555555", "width": 1 if inside else 0},
            },
        )


def _add_edges(figure: go.Figure, table: pd.DataFrame, circuit: Circuit, grid: Grid, *, scored: bool) -> None:
    """Edges between nodes of the circuit, thick and opaque by their scores; grey where they have none."""
    limit = styling.robust_limit(table["score"].to_numpy())
    by_name = {node.name: node for node in circuit.universe}
    for row in table.iloc[::-1].itertuples():
        strength = min(1.0, abs(row.score) / limit) if scored else 0.3
        color = (POSITIVE if row.score >= 0 else NEGATIVE) if scored else "#7a7a7a"
        (x0, y0), (x1, y1) = grid.place(by_name[row.writer]), grid.place(by_name[row.reader])
        bow = 0.35 if abs(x0 - x1) < 0.5 and y1 - y0 > 1 else 0.0
        t = np.linspace(0, 1, 15)
        figure.add_scatter(
            x=((1 - t) * x0 + t * x1 + bow * 4 * t * (1 - t)).round(3),
            y=((1 - t) * y0 + t * y1).round(3),
            mode="lines",
            name=f"{row.writer}->{row.reader}",
            line={"color": color, "width": round(1 + 3 * strength, 2)},
            opacity=round(0.25 + 0.5 * strength, 2),
            hoverinfo="text",
            text=f"<b>{row.writer} → {row.reader}</b>" + (f"<br>score {row.score:+.4g}" if scored else ""),
        )


def _within(circuit: Circuit, edges: EdgeSet, values: Float[Tensor, "writer reader"]) -> pd.DataFrame:
    """Edges between nodes of the circuit, best first; of the readers of one node the one with the largest score."""
    writers, known = edges.writers, set(circuit.universe.names)
    owners = [[writers[i] for i in row.nonzero()[:, 0].tolist()] for row in edges.inputs]
    if not known & {owner for each in owners for owner in each}:
        raise CircuitError("The edges are of another model than the circuit: none of them ends at one of its nodes.")
    best: dict[tuple[str, str], float] = {}
    for column, names in enumerate(owners):
        for reader in (name for name in names if name in circuit):
            for row in values[:, column].nonzero()[:, 0].tolist():
                key, value = (writers[row], reader), float(values[row, column])
                if key[0] in circuit and abs(value) > abs(best.get(key, 0.0)):
                    best[key] = value
    table = pd.DataFrame([(*key, value) for key, value in best.items()], columns=["writer", "reader", "score"])
    table["score"] = table["score"].astype(float)  # also where there is none
    return table.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)


# --- what a node does ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What is shown of a node beside the graph: lines of words, and of a head its attention pattern."""

    tokens: list[str]
    words: dict[str, list[str]]
    patterns: dict[str, str]  #: row by row, a letter a weight; where none looks ahead, the lower triangle alone
    causal: bool
    scale: float = 1.0  #: of the font
    room: float = 34.0  #: letters of a line, where no script measures them

    @classmethod
    def of(cls, inspection: Inspection, *, scale: float = 1.0, width: int | None = None) -> Told:
        """Of every node of a model, in a figure of so many pixels."""
        words, patterns = {}, {}
        pair = f"logit({_shown(inspection.answer)}) − logit({_shown(inspection.wrong)})"
        causal = inspection.patterns is None or not bool(inspection.patterns.triu(1).any())
        seen = np.ones((len(inspection.tokens),) * 2, dtype=bool)
        seen = np.tril(seen) if causal else seen
        for i, name in enumerate(inspection.nodes.names):
            words[name] = [
                f"direct effect on {pair}: {float(inspection.direct[i]):+.3f}",
                f"promotes {_listed(inspection.promoted[i])}",
                f"suppresses {_listed(inspection.suppressed[i])}",
            ]
        if inspection.patterns is not None:
            for name, pattern in zip(inspection.heads, inspection.patterns.float().numpy(), strict=True):
                patterns[name] = "".join(LETTER_OF[step] for step in np.rint(pattern[seen] * STEPS).astype(int))
        room = (RIGHT[1] - RIGHT[0]) * ((width or WIDTH) - SIDES) / (LETTER * scale)
        return cls([_shown(token) for token in inspection.tokens], words, patterns, causal, scale, room)

    @property
    def high(self) -> int:
        """Pixels of the most lines that any node has."""
        return round(LINE * self.scale * (max(len(self.lines(name)) for name in self.words) + 1))

    def first(self, table: pd.DataFrame) -> str:
        """The node that is shown at first: of the circuit, if it has some, and a head, if they have patterns, that with
        the largest direct effect."""
        found = table[table["direct"].notna()]
        for better in (found["in_circuit"], found["node"].isin(list(self.patterns))):
            if better.any():
                found = found[better.reindex(found.index)]
        return str(found.loc[found["direct"].abs().idxmax(), "node"])

    def z(self, name: str) -> list[list[float | None]]:
        """[query][key] the attention of a head; None above the diagonal, and everywhere of an MLP block."""
        n = len(self.tokens)
        if name not in self.patterns:
            return [[None] * n for _ in range(n)]
        flat = (LETTER_OF.index(letter) / STEPS for letter in self.patterns[name])
        return [[next(flat) if k <= q or not self.causal else None for k in range(n)] for q in range(n)]

    def lines(self, name: str) -> list[str]:
        """What stands below its name."""
        last = "attention pattern:" if name in self.patterns else "no attention pattern: it is an MLP block"
        return [line for text in (*self.words[name], *([last] * bool(self.patterns))) for line in self._wrapped(text)]

    def _wrapped(self, text: str) -> list[str]:
        """A text in lines; as in fit.js, where the browser measures it."""
        lines: list[str] = []
        for word in text.split(" "):
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and _letters(longer) <= self.room:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines

    def heading(self, name: str) -> str:
        """The lines above the pattern."""
        return "<br>".join([f"<b>{styling.text(name)}</b>", *map(styling.text, self.lines(name))])

    def data(self, first: str) -> dict[str, Any]:
        """For the script of a page."""
        return {
            "n": len(self.tokens),
            "words": self.words,
            "patterns": self.patterns,
            "causal": self.causal,
            "letters": LETTER_OF,
            "first": first,
        }

    def add(self, figure: go.Figure, first: str, tall: int) -> None:
        """The pattern's panel with what is said of a node, and a ring around the node."""
        n = len(self.tokens)
        names = [f"{i} {styling.text(token)}" for i, token in enumerate(self.tokens)]
        step = max(1, -(-n // LABELLED))
        ticks = list(range(0, n, step))
        where = next(
            (x, y)
            for trace in figure.data
            if trace.customdata is not None
            for x, y, name in zip(trace.x, trace.y, trace.customdata, strict=True)
            if name == first
        )
        figure.add_scatter(
            x=[where[0]],
            y=[where[1]],
            mode="markers",
            name="chosen",
            showlegend=False,
            hoverinfo="skip",
            marker={"size": 30, "symbol": "circle-open", "color": "#E69F00", "line": {"width": 3}},
        )
        if self.patterns:
            figure.add_heatmap(
                z=self.z(first),
                x=names,
                y=names,
                zmin=0,
                zmax=1,
                xaxis="x2",
                yaxis="y2",
                name="pattern",
                colorscale=[list(stop) for stop in styling.SEQUENTIAL],
                showscale=False,
                hoverongaps=False,
                xgap=1,
                ygap=1,
                hovertemplate="%{y} → %{x}<br>attention %{z:.2f}<extra></extra>",
            )
        labels = {
            "type": "category",
            "categoryarray": names,
            "tickvals": ticks,
            "ticktext": [styling.text(self.tokens[i]) for i in ticks],
            "tickfont": {"size": 10 * (0.7 if self.scale < 1 else 1)},
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
        }
        shown = {"visible": first in self.patterns}
        figure.update_layout(
            xaxis2={
                "domain": list(RIGHT),
                "anchor": "y2",
                "range": [-0.5, n - 0.5],
                "tickangle": -90,
                "title": {"text": "key", "standoff": 4},
                "automargin": True,
                **labels,
                **shown,
            },
            yaxis2={
                "domain": [0, self.below(tall)],
                "anchor": "x2",
                "range": [n - 0.5, -0.5],
                "title": {"text": "query", "standoff": 4},
                "automargin": True,
                **labels,
                **shown,
            },
        )
        figure.add_annotation(
            name="node",
            text=self.heading(first),
            xref="x2 domain",
            yref="y2 domain",
            x=0,
            y=1,
            yshift=2,
            xanchor="left",
            yanchor="bottom",
            align="left",
            showarrow=False,
            font={"size": FONT * self.scale},
        )

    def arrangements(self, tall: int, grid: Grid) -> list[tuple[int, dict[str, Any]]]:
        """Side by side where there is room, one below the other where there is none."""
        graph = grid.tall() + 30
        pattern = PATTERN
        high = AROUND + graph + self.high + 90 + pattern
        inner = high - AROUND
        narrow = {
            "height": high,
            "xaxis.domain": [0, 1],
            "yaxis.domain": [1 - graph / inner, 1],
            "xaxis2.domain": [0, 1],
            "yaxis2.domain": [0, pattern / inner],
        }
        wide = {
            "height": tall,
            "xaxis.domain": list(LEFT),
            "yaxis.domain": [0, 1],
            "xaxis2.domain": list(RIGHT),
            "yaxis2.domain": [0, self.below(tall)],
        }
        return [(900, wide), (0, narrow)]

    def below(self, tall: int) -> float:
        """The part of the height that a pattern has below what is said of its head."""
        return round(1 - self.high / max(tall - AROUND, 2 * self.high), 4)

    def wire(self, widget: go.FigureWidget) -> None:
        """Make a widget react to clicks."""
        pattern = next((trace for trace in widget.data if trace.name == "pattern"), None)
        ring = next(trace for trace in widget.data if trace.name == "chosen")

        def clicked(trace: Any, points: Any, state: Any = None) -> None:
            for index in points.point_inds:
                name = trace.customdata[index]
                if name not in self.words:
                    continue
                with widget.batch_update():
                    ring.x, ring.y = [trace.x[index]], [trace.y[index]]
                    widget.layout.annotations[0].text = self.heading(name)
                    if pattern is not None:
                        pattern.z = self.z(name)
                        widget.layout.xaxis2.visible = widget.layout.yaxis2.visible = name in self.patterns

        for trace in widget.data:
            if trace.name in ("circuit", "outside"):
                trace.on_click(clicked)


def _letters(text: str) -> int:
    """How many letters wide a text is; those of Chinese, Japanese and Korean count twice."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def _shown(token: str) -> str:
    """A token as a label: blanks and line ends seen, the long cut."""
    text = token.replace("\n", "↵").replace("\t", "⇥")
    text = f"␣{text[1:]}" if text.startswith(" ") else text
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


def _listed(tokens: Sequence[TokenLogit]) -> str:
    return ", ".join(f"{_shown(each.text)}\N{NO-BREAK SPACE}{each.logit:+.2f}" for each in tokens)
