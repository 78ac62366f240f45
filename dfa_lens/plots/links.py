"""Clicking a node of an aligned heatmap: which nodes it is fed by, and where its own importance goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from dfa_lens.alignment import Alignment
from dfa_lens.plots import style
from dfa_lens.scores import NodeScores

POSITIVE, NEGATIVE = style.DIVERGING[-1][1], style.DIVERGING[0][1]


@dataclass(frozen=True)
class Cell:
    """Where a node is drawn: the trace, its axes, row and column."""

    trace: int
    axis: str  #: "" for the first pair of axes, "2" for the second, …
    row: int
    column: int


@dataclass(frozen=True)
class Links:
    """For every node of both models the strongest products s_i·W_ij in which it takes part."""

    feeds: list[list[tuple[int, float]]]  #: target node → (source node, product), strongest first
    goes: list[list[tuple[int, float]]]  #: source node → (target node, product), strongest first

    @classmethod
    def of(cls, alignment: Alignment, source: NodeScores, n: int) -> Links:
        """The ``n`` strongest of each node."""
        products = alignment.contributions(source)
        return cls(_strongest(products.T, n), _strongest(products, n))


def _strongest(products: torch.Tensor, n: int) -> list[list[tuple[int, float]]]:
    rows = []
    for row in products:
        best = torch.argsort(row.abs(), descending=True, stable=True)[:n]
        rows.append([(int(i), float(row[i])) for i in best])
    return rows


def outlines(
    links: Links, names: tuple[Sequence[str], Sequence[str]], cells: tuple[list[Cell], list[Cell]], side: int, node: int
) -> tuple[list[dict[str, Any]], str]:
    """The rectangles and the line of text that a click on a node brings; ``side`` 0 is the source, 1 the target."""
    partners = links.goes[node] if side == 0 else links.feeds[node]
    most = max((abs(product) for _, product in partners), default=0.0) or 1.0
    shapes = [_outline(cells[side][node], style.INK, 2.5)]
    words = []
    for partner, product in partners:
        color = POSITIVE if product > 0 else NEGATIVE
        shapes.append(_outline(cells[1 - side][partner], color, 1 + 3 * abs(product) / most))
        words.append(f"{style.text(names[1 - side][partner])} {product:+.3g}")
    verb = "goes to" if side == 0 else "is fed by"
    return shapes, f"<b>{style.text(names[side][node])}</b> {verb} {', '.join(words)}"


def _outline(cell: Cell, color: str, width: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "xref": f"x{cell.axis}",
        "yref": f"y{cell.axis}",
        "x0": cell.column - 0.5,
        "x1": cell.column + 0.5,
        "y0": cell.row - 0.5,
        "y1": cell.row + 0.5,
        "line": {"color": color, "width": round(width, 2)},
    }


# The same in the browser: links by task, cells by side; {plot_id} is filled in by plotly.
_SCRIPT = """
(function () {
  const graph = document.getElementById('{plot_id}');
  const data = __DATA__;
  const find = {};
  data.cells.forEach((cells, side) => cells.forEach(([trace, axis, row, column], node) => {
    find[[trace, row, column]] = [side, node];
  }));
  const outline = ([trace, axis, row, column], color, width) => ({
    type: 'rect', xref: 'x' + axis, yref: 'y' + axis, x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5,
    line: {color: color, width: width}});
  const shown = {key: null, notes: graph.layout.annotations || []};
  const clear = () => { shown.key = null; Plotly.relayout(graph, {shapes: [], annotations: shown.notes}); };
  const number = value => (value > 0 ? '+' : '') + Number(value.toPrecision(3));
  graph.on('plotly_click', event => {
    const point = event.points[0];
    const row = point.pointIndex ? point.pointIndex[0] : point.pointNumber[0];
    const column = point.pointIndex ? point.pointIndex[1] : point.pointNumber[1];
    const found = find[[point.curveNumber, row, column]];
    const task = (graph._dfaTask || 0);
    if (!found || found.join() + task === shown.key) { clear(); return; }
    const [side, node] = found;
    shown.key = found.join() + task;
    const partners = data.links[task][side][node];
    const most = Math.max(...partners.map(([_, product]) => Math.abs(product))) || 1;
    const shapes = [outline(data.cells[side][node], data.ink, 2.5)];
    partners.forEach(([partner, product]) => shapes.push(outline(data.cells[1 - side][partner],
      product > 0 ? data.positive : data.negative, 1 + 3 * Math.abs(product) / most)));
    const words = partners.map(([partner, product]) => data.names[1 - side][partner] + ' ' + number(product));
    const text = '<b>' + data.names[side][node] + '</b> ' + (side === 0 ? 'goes to ' : 'is fed by ') + words.join(', ');
    const note = Object.assign({text: text}, data.note);
    Plotly.relayout(graph, {shapes: shapes, annotations: shown.notes.concat([note])});
  });
  graph.on('plotly_doubleclick', clear);
  graph.on('plotly_buttonclicked', event => { graph._dfaTask = event.active; if (shown.key) { clear(); } });
})();
"""

# Where the line of text stands: below the source panel.
_NOTE = {
    "xref": "paper",
    "yref": "paper",
    "x": 0,
    "y": 0,
    "xanchor": "left",
    "yanchor": "top",
    "yshift": -48,
    "width": 480,
    "align": "left",
    "showarrow": False,
    "font": {"size": 12},
}


def script(links: list[Links], names: tuple[Sequence[str], Sequence[str]], cells: tuple[list[Cell], list[Cell]]) -> str:
    """What makes the HTML of a figure react to clicks; one :class:`Links` per task of the dropdown."""
    data = {
        "cells": [[(cell.trace, cell.axis, cell.row, cell.column) for cell in side] for side in cells],
        "links": [
            [[[(i, float(f"{p:.4g}")) for i, p in row] for row in side] for side in (each.goes, each.feeds)]
            for each in links
        ],
        "names": [[style.text(name) for name in side] for side in names],
        "ink": style.INK,
        "positive": POSITIVE,
        "negative": NEGATIVE,
        "note": _NOTE,
    }
    # "</" would end the script that this is written into
    return _SCRIPT.replace("__DATA__", json.dumps(data, separators=(",", ":")).replace("</", "<\\/"))


def _task_shown(widget: go.FigureWidget, trace: int) -> int:
    """Which task of the dropdown is drawn: the one whose numbers the trace holds (the menu itself does not say)."""
    menus = widget.layout.updatemenus
    numbers = _floats(widget.data[trace].customdata)
    for task, button in enumerate(menus[0].buttons if menus else ()):
        change, _, traces = button.args
        if np.array_equal(_floats(change["customdata"][list(traces).index(trace)]), numbers, equal_nan=True):
            return task
    return 0


def _floats(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=object).astype(float)


def react(
    links: list[Links], names: tuple[Sequence[str], Sequence[str]], cells: tuple[list[Cell], list[Cell]]
) -> Callable[[go.FigureWidget], None]:
    """What makes a FigureWidget react to clicks; one :class:`Links` per task of the dropdown."""
    where = {(cell.trace, cell.row, cell.column): (side, i) for side in (0, 1) for i, cell in enumerate(cells[side])}

    def wire(widget: go.FigureWidget) -> None:
        notes = tuple(widget.layout.annotations)

        def clicked(trace: Any, points: Any, state: Any = None) -> None:
            for index in points.point_inds:
                row, column = index
                found = where.get((points.trace_index, int(row), int(column)))
                if found is None:
                    continue
                task = _task_shown(widget, points.trace_index)
                shapes, text = outlines(links[task], names, cells, *found)
                with widget.batch_update():
                    widget.layout.shapes = shapes
                    widget.layout.annotations = (*notes, {**_NOTE, "text": text})

        for index in sorted({cell.trace for side in cells for cell in side}):
            widget.data[index].on_click(clicked)

    return wire
