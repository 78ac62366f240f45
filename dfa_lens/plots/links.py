"""Clicking a node of an aligned heatmap: which nodes it is fed by, and where its own importance goes.

What a click on each cell brings is worked out here, once. The script of an HTML file (``templates/links.js``) and the
callback of a notebook's widget only look it up and draw it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.scores import NodeScores
from dfa_lens.plots import picture, style

POSITIVE, NEGATIVE = style.DIVERGING[-1][1], style.DIVERGING[0][1]

# Where the line of text stands: below axes and slider.
_NOTE = {**picture.NOTE, "yshift": -108}
#: A white line below that of an outline keeps it visible on a cell of its own colour.
HALO = 3


@dataclass(frozen=True)
class Cell:
    """Where a node is drawn: the trace, its axes, row and column."""

    trace: int
    axis: str  #: "" for the first pair of axes, "2" for the second, …
    row: int
    column: int

    @property
    def key(self) -> str:
        """What a click says of the cell."""
        return f"{self.trace},{self.row},{self.column}"

    @property
    def rectangle(self) -> dict[str, Any]:
        """The outline as a shape of plotly, without its line."""
        return {
            "type": "rect",
            "xref": f"x{self.axis}",
            "yref": f"y{self.axis}",
            "x0": self.column - 0.5,
            "x1": self.column + 0.5,
            "y0": self.row - 0.5,
            "y1": self.row + 0.5,
        }


@dataclass(frozen=True)
class Links:
    """For every node of both models the strongest products s_i·W_ij in which it takes part."""

    goes: list[list[tuple[int, float]]]  #: source node → (target node, product), strongest first
    feeds: list[list[tuple[int, float]]]  #: target node → (source node, product), strongest first

    @classmethod
    def of(cls, alignment: Alignment, source: NodeScores, n: int) -> Links:
        """The ``n`` strongest of each node."""
        products = alignment.contributions(source)
        return cls(goes=_strongest(products, n), feeds=_strongest(products.T, n))


def _strongest(products: torch.Tensor, n: int) -> list[list[tuple[int, float]]]:
    rows = []
    for row in products:
        best = torch.argsort(row.abs(), descending=True, stable=True)[:n]
        rows.append([(int(i), float(row[i])) for i in best])
    return rows


class Side(NamedTuple):
    """The nodes of one model: their names, and where each is drawn."""

    names: Sequence[str]
    cells: Sequence[Cell]


class Answer(NamedTuple):
    """What a click on one node brings."""

    text: str
    outlines: list[tuple[str, str, float]]  #: key of a cell, colour and width of its line


@dataclass(frozen=True)
class Clicks:
    """What a click on each node of a figure brings.

    ``rectangles`` are outlines by the key of their cell; ``answers`` are, for each task of the dropdown, those to a
    click on a cell. The dropdown notes in ``layout.meta`` which task is drawn.
    """

    rectangles: dict[str, dict[str, Any]]
    answers: list[dict[str, Answer]]

    @classmethod
    def of(cls, links: Sequence[Links], source: Side, target: Side) -> Clicks:
        """From one :class:`Links` per task of the dropdown."""
        return cls(
            {cell.key: cell.rectangle for side in (source, target) for cell in side.cells},
            [
                _answers(each.goes, "goes to", source, target) | _answers(each.feeds, "is fed by", target, source)
                for each in links
            ],
        )

    def reaction(self) -> picture.Reaction:
        """What makes the HTML of a figure react to clicks."""
        return picture.Reaction("links.js", {"rectangles": self.rectangles, "answers": self.answers, "note": _NOTE})

    def wire(self, widget: go.FigureWidget) -> None:
        """Make a widget react to clicks."""
        notes = tuple(widget.layout.annotations)

        def clicked(trace: Any, points: Any, state: Any = None) -> None:
            for row, column in points.point_inds:
                answer = self.answers[widget.layout.meta or 0].get(f"{points.trace_index},{row},{column}")
                if answer is None:
                    continue
                with widget.batch_update():
                    widget.layout.shapes = [
                        {**self.rectangles[cell], "line": {"color": color, "width": width}}
                        for cell, color, width in answer.outlines
                    ]
                    widget.layout.annotations = (*notes, {**_NOTE, "text": answer.text})

        for index in sorted({int(key.split(",")[0]) for key in self.rectangles}):
            widget.data[index].on_click(clicked)


def _answers(links: Sequence[Sequence[tuple[int, float]]], verb: str, clicked: Side, other: Side) -> dict[str, Answer]:
    """By cell of one model: its own outline and those of its partners in the other, and a line of text."""
    answers = {}
    for name, cell, partners in zip(clicked.names, clicked.cells, links, strict=True):
        most = max((abs(product) for _, product in partners), default=0.0) or 1.0
        lines, words = [(cell.key, style.INK, 2.5)], []
        for partner, product in partners:
            color = POSITIVE if product > 0 else NEGATIVE
            lines.append((other.cells[partner].key, color, round(1 + 3 * abs(product) / most, 2)))
            words.append(f"{style.text(other.names[partner])} {product:+.3g}")
        outlines = []
        for key, color, width in lines:
            outlines += [(key, "#ffffff", width + HALO), (key, color, width)]
        answers[cell.key] = Answer(f"<b>{style.text(name)}</b> {verb} {', '.join(words)}", outlines)
    return answers
