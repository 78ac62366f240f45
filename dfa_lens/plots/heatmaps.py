"""Layer × head heatmaps of node scores, of one model or of two side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.curve import FaithfulnessCurve
from dfa_lens.data.nodes import NodeSet, SpanNode
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import ScoreError
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import links as linking
from dfa_lens.plots import style as styling
from dfa_lens.plots.masks import mask_of
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style

T = TypeVar("T")

# What lies over a panel: 0 shows the cell, 1 dims it.
_DIM = ((0.0, "rgba(255,255,255,0)"), (1.0, "rgba(255,255,255,0.8)"))


@dataclass(frozen=True)
class _Panel:
    """One grid of a node set: rows are layers, bottom to top; columns are heads, or one column for all MLPs."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[int, ...]
    position: np.ndarray  # [row, column] → position in the node set, -1 where there is no node

    def place(self, values: np.ndarray) -> np.ndarray:
        """Values per node as a grid; NaN where there is no node."""
        return np.where(self.position >= 0, np.asarray(values, dtype=float)[self.position], np.nan)

    def place_text(self, values: list[str]) -> np.ndarray:
        return np.where(self.position >= 0, np.asarray(values, dtype=object)[self.position], "")


def _panels(nodes: NodeSet) -> list[_Panel]:
    """Heads, then MLPs, then whatever else there is, one panel for each kind of hook point."""
    groups: dict[str, list[int]] = {}
    for position, node in enumerate(nodes):
        if node.kind in ("head", "mlp"):
            key = {"head": "heads", "mlp": "MLP"}[node.kind]
        else:
            key = "input" if node.kind == "input" else node.point.split(".", 2)[-1]
        key += f" @ {node.span}" if isinstance(node, SpanNode) else ""
        groups.setdefault(key, []).append(position)
    rows = tuple(sorted({node.layer for node in nodes}))
    row_of = {layer: i for i, layer in enumerate(rows)}
    panels = []
    for title, positions in groups.items():
        indices = sorted({nodes[p].index or 0 for p in positions})
        grid = np.full((len(rows), len(indices)), -1)
        for p in positions:
            grid[row_of[nodes[p].layer], indices.index(nodes[p].index or 0)] = p
        columns = tuple(str(i) for i in indices) if len(indices) > 1 else ("",)
        panels.append(_Panel(title, columns, rows, grid))
    order = {"input": 0, "heads": 1, "MLP": 2}
    return sorted(panels, key=lambda panel: order.get(panel.title, 3))


def _hover(scores: NodeScores, extra: list[str] | None = None) -> list[str]:
    ranks = scores.ranks().tolist()
    n = len(scores)
    texts = []
    for i, (node, value) in enumerate(zip(scores.nodes, scores.values.tolist(), strict=True)):
        percentile = 100 * (n - ranks[i]) / max(n - 1, 1)
        lines = [
            f"<b>{styling.text(node.name)}</b>",
            f"score {value:+.4g}",
            f"rank {ranks[i]} of {n} (percentile {percentile:.0f})",
        ]
        texts.append("<br>".join(lines + ([extra[i]] if extra else [])))
    return texts


def _contributors(alignment: Alignment, source: NodeScores, n_shown: int) -> list[str]:
    """For each target node, its mask and the source nodes that moved it most."""
    products = alignment.contributions(source)
    W, mask = alignment.W, alignment.mask(source)
    texts = []
    for j in range(products.shape[1]):
        top = torch.argsort(products[:, j].abs(), descending=True, stable=True)[:n_shown].tolist()
        lines = [f"mask {mask[j]:.3f}", "most from:"]
        lines += [
            f"&nbsp;&nbsp;{styling.text(source.nodes.names[i])}: {products[i, j]:+.3g} (W {W[i, j]:+.3g})" for i in top
        ]
        texts.append("<br>".join(lines))
    return texts


@dataclass(frozen=True)
class _Grid:
    """What one model's part of a figure shows: colours, the numbers behind them, hover texts; all per node."""

    colors: np.ndarray
    numbers: np.ndarray
    hover: list[str]

    @classmethod
    def of(cls, scores: NodeScores, extra: list[str] | None = None) -> _Grid:
        values = scores.values.numpy().astype(float)
        return cls(values / styling.robust_limit(values), values, _hover(scores, extra))

    @classmethod
    def of_mask(cls, scores: NodeScores, mask: np.ndarray, extra: list[str] | None = None) -> _Grid:
        """Transferred scores, which are mask logits: the mask gives the colour, from none (left out) to full (kept)."""
        values = scores.values.numpy().astype(float)
        extra = extra or [f"mask {value:.3f}" for value in mask]
        return cls(mask, values, _hover(scores, extra))

    @classmethod
    def difference(cls, first: NodeScores, second: NodeScores) -> _Grid:
        """How much higher ``first`` ranks a node than ``second`` does, as a part of all ranks: from -1 to 1."""
        ours, theirs = first.ranks().numpy(), second.ranks().numpy()
        values = (theirs - ours) / max(len(first) - 1, 1)
        hover = [
            f"<b>{styling.text(node.name)}</b><br>rank {a} against {b} of {len(first)}<br>difference {value:+.3f}"
            for node, value, a, b in zip(first.nodes, values, ours, theirs, strict=True)
        ]
        return cls(values, values, hover)


@dataclass(frozen=True)
class _Drawn:
    """One panel in a figure: its trace, the trace that dims it, its axes."""

    panel: _Panel
    trace: int
    overlay: int
    axis: str


def _draw(
    figure: go.Figure,
    nodes: NodeSet,
    grid: _Grid,
    left: float,
    right: float,
    title: str,
    first_axis: int,
    *,
    caption: str | None = None,
) -> list[_Drawn]:
    """Draw one model's panels between two fractions of the width."""
    panels = _panels(nodes)
    drawn = []
    axes: dict[str, Any] = {}  # all at once: each update of a layout takes plotly its time
    for i, (panel, domain) in enumerate(zip(panels, _domains(panels, left, right), strict=True)):
        axis = first_axis + i
        suffix = "" if axis == 1 else str(axis)
        cells = {"xgap": 1, "ygap": 1, "xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        z = panel.place(grid.colors).astype(np.float32)
        figure.add_trace(
            go.Heatmap(
                z=z,
                customdata=panel.place(grid.numbers).astype(np.float32),
                text=panel.place_text(grid.hover),
                hovertemplate="%{text}<extra></extra>",
                hoverongaps=False,
                coloraxis="coloraxis",
                name=f"{title} {panel.title}",
                **cells,
            )
        )
        figure.add_trace(
            go.Heatmap(
                z=np.zeros(z.shape, dtype=np.int8),
                zmin=0,
                zmax=1,
                colorscale=[list(stop) for stop in _DIM],
                showscale=False,
                hoverinfo="skip",
                name=f"{title} {panel.title} outside",
                **cells,
            )
        )
        drawn.append(_Drawn(panel, len(figure.data) - 2, len(figure.data) - 1, suffix))
        labelled = max(1, len(panel.columns) // 12 + 1)
        n_rows = len(panel.rows)
        row_step = max(1, n_rows // 16 + 1)
        axes[f"xaxis{suffix}"] = {
            "domain": domain,
            "anchor": f"y{suffix}",
            "title": {"text": styling.text(panel.title), "standoff": 6},
            "tickvals": list(range(0, len(panel.columns), labelled)),
            "ticktext": [panel.columns[c] for c in range(0, len(panel.columns), labelled)],
            "showgrid": False,
            "zeroline": False,
            "constrain": "domain",
        }
        axes[f"yaxis{suffix}"] = {
            "anchor": f"x{suffix}",
            "range": [-0.5, n_rows - 0.5],
            "tickvals": list(range(0, n_rows, row_step)) if i == 0 else [],
            "ticktext": [_row_name(panel.rows[r]) for r in range(0, n_rows, row_step)],
            "title": {"text": "layer", "standoff": 4} if i == 0 and left == 0 else None,
            "showgrid": False,
            "zeroline": False,
            "matches": None if i == 0 else f"y{first_axis if first_axis > 1 else ''}",
        }
    figure.update_layout(axes)
    figure.add_annotation(
        text=f"<b>{styling.text(caption or title)}</b>",
        x=left,
        y=1.0,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        yshift=6,
        showarrow=False,
    )
    return drawn


#: The fractions of the width and of the height that a part of a figure has.
_Place = tuple[tuple[float, float], tuple[float, float]]


def _domains(panels: list[_Panel], left: float, right: float) -> list[list[float]]:
    """Where panels are, between two fractions of the width.

    Cells are equally wide in all panels of a model, but no panel vanishes beside a wide one.
    """
    total = sum(len(panel.columns) for panel in panels)
    widths = np.array([max(len(panel.columns), 0.08 * total) for panel in panels], dtype=float)
    gap = min(0.045, 0.5 / len(panels)) * (right - left)  # with nodes at many spans there are many panels
    widths *= (right - left - gap * (len(panels) - 1)) / widths.sum()
    starts = left + np.concatenate([[0], np.cumsum(widths + gap)[:-1]])
    return [[float(start), min(float(start + width), right)] for start, width in zip(starts, widths, strict=True)]


def _row_name(layer: int) -> str:
    return "embed" if layer < 0 else str(layer)


def _outside(scores: NodeScores, k: int, panel: _Panel) -> np.ndarray:
    """1 for every node outside the k best, 0 for those inside and where there is no node."""
    out = np.ones(len(scores), dtype=np.int8)
    out[scores.order()[:k].numpy()] = 0
    return np.where(panel.position >= 0, out[panel.position], 0)


def _dim(figure: go.Figure, scores: NodeScores, drawn: list[_Drawn], size: int | None) -> None:
    """Dim all but the ``size`` best nodes; None dims nothing."""
    if size is not None:
        for each in drawn:
            figure.data[each.overlay].z = _outside(scores, size, each.panel)


def _check_size(size: int | None, scores: NodeScores) -> None:
    if size is not None and not 0 <= size <= len(scores):
        raise ScoreError(f"size must be between 0 and the number of nodes, {len(scores)}, not {size}.")


_OF_SCORES = "score /<br>model's<br>98th pct."


def _colors(figure: go.Figure, *, words: str = _OF_SCORES) -> None:
    figure.update_layout(
        coloraxis={
            "colorscale": [list(stop) for stop in styling.DIVERGING],
            "cmin": -1,
            "cmax": 1,
            "colorbar": {
                "title": {"text": words, "font": {"size": 11}},
                "thickness": 12,
                "len": 0.8,
                "tickvals": [-1, -0.5, 0, 0.5, 1],
            },
        },
        plot_bgcolor=styling.NO_NODE,
    )


def _table(scores: NodeScores, **columns: Any) -> pd.DataFrame:
    """A row per node, with what the hover says."""
    table = scores.to_frame()
    for at, (name, value) in enumerate(columns.items()):
        table.insert(at, name, value)
    return table


def scores_heatmap(
    scores: NodeScores,
    *,
    title: str | None = None,
    size: int | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 460,
) -> Picture:
    """Scores of one model: layers bottom to top, heads left to right, MLP blocks in a column of their own.

    Colours are scores divided by the 98th percentile of their absolute values, so that one large node does not bleach
    the others; white is zero, grey is no node. Of transferred scores, logits of a mask, that is shown, from white (0,
    left out) to red (1, kept). The hover shows the score itself, and ``trace.customdata`` holds it.

    Parameters
    ----------
    size:
        Dim all but the ``size`` best nodes; default: none is dimmed.
    style:
        See :data:`~dfa_lens.plots.style.Style`.
    width, height:
        In pixels; by default as wide as the page, or as the style says.

    Raises
    ------
    ScoreError
        If ``size`` is out of range.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> figure = dfa.plots.scores_heatmap(dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 3)))
    >>> len(figure.to_frame())
    8
    """
    arguments.expect(1, "scores", scores, NodeScores)
    _check_size(size, scores)
    figure = Picture()
    mask = mask_of(scores)
    grid = _Grid.of(scores) if mask is None else _Grid.of_mask(scores, mask)
    drawn = _draw(figure, scores.nodes, grid, 0.0, 1.0, title or ("scores" if mask is None else "mask"), 1)
    styling.layout(figure, None, width=width, height=height, style=style)
    _colors(figure, words=_OF_SCORES if mask is None else "mask")
    _dim(figure, scores, drawn, size)
    return figure.carry(_table(scores), fit=None if styling.on_paper(style) else picture.fit(captions=24))


@dataclass(frozen=True)
class _View:
    """What the figure shows for one task."""

    source: NodeScores
    target: NodeScores
    alignment: Alignment | None
    curve: FaithfulnessCurve | None
    gold: NodeScores | None

    def grids(self, contributors: int, masked: bool) -> list[_Grid]:
        """Source, target (its mask or its scores), and with gold that and the difference of ranks."""
        extra = _contributors(self.alignment, self.source, contributors) if self.alignment is not None else None
        mask = mask_of(self.target) if masked else None
        target = _Grid.of(self.target, extra) if mask is None else _Grid.of_mask(self.target, mask, extra)
        grids = [_Grid.of(self.source), target]
        if self.gold is not None:
            grids += [_Grid.of(self.gold), _Grid.difference(self.target, self.gold)]
        return grids

    def table(self, task: str) -> pd.DataFrame:
        parts = [_table(self.source, task=task, model="source"), _table(self.target, task=task, model="target")]
        if self.alignment is not None:
            parts[1]["mask"] = self.alignment.mask(self.source).numpy()
        if self.gold is not None:
            parts.append(_table(self.gold, task=task, model="gold"))
        return pd.concat(parts, ignore_index=True)


def _views(
    source: NodeScores | Mapping[str, NodeScores],
    target: NodeScores | Mapping[str, NodeScores],
    alignment: Alignment | Mapping[str, Alignment] | None,
    curve: FaithfulnessCurve | Mapping[str, FaithfulnessCurve] | None,
    gold: NodeScores | Mapping[str, NodeScores] | None,
) -> dict[str, _View]:
    """The views by task; everything must belong to the same two node sets."""
    for place, name, given in ((1, "source", source), (2, "target", target)):
        for value in given.values() if isinstance(given, Mapping) else [given]:
            arguments.expect(place, name, value, NodeScores)
    if isinstance(source, NodeScores) != isinstance(target, NodeScores):
        raise ScoreError("Give scores for one task, or mappings of scores for several, on both models alike.")
    tasks = [""] if isinstance(source, NodeScores) else list(source)
    if not tasks:
        raise ScoreError("There are no scores to draw.")

    def of(values: T | Mapping[str, T] | None, task: str, what: str) -> T | None:
        if not isinstance(values, Mapping):
            return values
        if task not in values:
            raise ScoreError(f"Task {task!r} has source scores but no {what}.")
        return values[task]

    views: dict[str, _View] = {}
    for task in tasks:
        s, t = of(source, task, "source scores"), of(target, task, "target scores")
        assert s is not None
        assert t is not None
        view = _View(s, t, of(alignment, task, "alignment"), of(curve, task, "curve"), of(gold, task, "gold scores"))
        first = next(iter(views.values()), view)
        s.require(first.source.nodes, "The source scores")
        t.require(first.target.nodes, "The target scores")
        if view.alignment is not None:
            s.require(view.alignment.source, "The source scores")
            t.require(view.alignment.target, "The target scores")
        if view.gold is not None:
            view.gold.require(t.nodes, "The gold scores")
        views[task] = view
    return views


def aligned_heatmap(
    source: NodeScores | Mapping[str, NodeScores],
    target: NodeScores | Mapping[str, NodeScores],
    *,
    alignment: Alignment | Mapping[str, Alignment] | None = None,
    size: int | None = None,
    curve: FaithfulnessCurve | Mapping[str, FaithfulnessCurve] | None = None,
    gold: NodeScores | Mapping[str, NodeScores] | None = None,
    title: str | None = None,
    source_name: str = "source",
    target_name: str = "target",
    slider: bool = True,
    contributors: int = 5,
    style: Style = "screen",
    width: int | None = None,
    height: int = 560,
) -> Picture:
    """Source and target scores side by side, layers aligned by relative depth.

    Both models fill the same height, so that equal height is equal relative depth. One colour scale serves all:
    scores divided by each model's own 98th percentile of absolute scores, white at zero. Scores that a trained
    alignment transferred are logits of a mask, in which negative means "left out", not "hurts": of them the mask is
    shown, from white (0, left out) to red (1, kept). The hover shows name, score, rank and percentile; on the
    target, with ``alignment``, also the soft mask and the source nodes that contributed most. A click on a node of
    either model, with ``alignment``, outlines the nodes of the other model that it is fed by or goes to (red:
    positive product, blue: negative; thicker: larger); another click, or a double click, clears.

    Parameters
    ----------
    source, target:
        Scores on the two models; ``target`` is usually ``alignment.transfer(source)``. Mappings of task → scores give a
        dropdown of tasks; the options below may then be mappings, too.
    alignment:
        What carried one to the other; default: no contributors in the hover, no links on click.
    size:
        The circuit size shown at first: the rest of the target is dimmed. Default: everything is shown.
    curve:
        A faithfulness curve of ``target``: the slider then shows f at each size.
    gold:
        Attribution run directly on the target: drawn beside the transferred scores, with the difference of ranks (as a
        part of all ranks; red: the transfer ranks the node higher). Default: not drawn.
    slider:
        Whether a slider below the target changes the circuit size. Default: yes; never on paper.
    contributors:
        How many source nodes the hover lists for each target node, and a click outlines.
    style:
        See :data:`~dfa_lens.plots.style.Style`.

    Raises
    ------
    ScoreError
        If ``size`` is out of range, scores are not those of the alignment's nodes, or tasks have different node sets.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes, more = dfa.NodeSet.for_sizes(2, 3), dfa.NodeSet.for_sizes(4, 5)
    >>> alignment = dfa.controls.random_w(nodes, more)
    >>> s = dfa.controls.random_scores(nodes)
    >>> figure = dfa.plots.aligned_heatmap(s, alignment.transfer(s), alignment=alignment)
    >>> len(figure.data)
    8
    """
    views = _views(source, target, alignment, curve, gold)
    first = next(iter(views.values()))
    _check_size(size, first.target)
    masked = all(mask_of(view.target) is not None for view in views.values())
    grids = {task: view.grids(contributors, masked) for task, view in views.items()}
    figure = Picture()
    names = [source_name, target_name, "gold", "difference"]
    captions = [source_name, f"{target_name}: mask" if masked else target_name, "gold", "difference of ranks"]
    n_parts = 2 if first.gold is None else 4
    places = _places(n_parts, n_parts)
    sets = [first.source.nodes, *[first.target.nodes] * 3]
    parts: list[list[_Drawn]] = []
    drawings = zip(next(iter(grids.values())), names, captions, sets, places, strict=False)
    for grid, name, caption, nodes, ((left, right), _) in drawings:
        first_axis = 1 + sum(map(len, parts))
        parts.append(_draw(figure, nodes, grid, left, right, name, first_axis, caption=caption))
    styling.layout(figure, title, width=width, height=height, style=style)
    _colors(figure, words=_OF_SCORES + "<br>or mask" * masked)
    _dim(figure, first.target, parts[1], size)
    controls = not styling.on_paper(style)
    sliders = {task: _slider(view, parts[1], size, places[1][0]) for task, view in views.items()} if slider else {}
    if slider and controls:
        figure.update_layout(sliders=[next(iter(sliders.values()))], margin={"b": 120})
    if len(views) > 1 and controls:
        _add_dropdown(figure, grids, sliders, parts)
    table = pd.concat([view.table(task) for task, view in views.items()], ignore_index=True)
    linked = all(view.alignment is not None for view in views.values())
    fit = picture.fit(_arrangements(parts, height, slider), captions=24, below=56 * linked) if controls else None
    if not linked:
        return figure.carry(table, fit=fit)
    links = [linking.Links.of(v.alignment, v.source, contributors) for v in views.values() if v.alignment is not None]
    source_side, target_side = _side(first.source.nodes, parts[0]), _side(first.target.nodes, parts[1])
    clicks = linking.Clicks.of(links, source_side, target_side)
    if controls:
        figure.update_layout(margin={"b": 150})
    return figure.carry(table, click=clicks.reaction(), fit=fit, react=clicks.wire)


def _places(n: int, columns: int, row: float = 0.0, between: float = 0.0) -> list[_Place]:
    """Where the parts of a figure are, in so many columns.

    Two parts in two columns are the two models; the source's has fewer heads, and the target's is wider.
    ``row`` and ``between`` are the heights of a row and of what is between two, in any unit.
    """
    if n == 2 and columns == 2:
        return [((0.0, 0.4), (0.0, 1.0)), ((0.47, 1.0), (0.0, 1.0))]
    rows, wide = -(-n // columns), (1 - 0.05 * (columns - 1)) / columns
    total = rows * row + (rows - 1) * between or 1.0
    places = []
    for i in range(n):
        left, above = (i % columns) * (wide + 0.05), (i // columns) * (row + between) / total
        places.append(((left, left + wide), (max(1 - above - (row / total or 1.0), 0.0), 1 - above)))
    return places


#: From so many pixels of width on four parts are in four columns and in two, and two parts in two.
FOUR, TWO = 1000, 560
#: Pixels between two rows of parts (axes and captions), and what is above and below all of them.
BETWEEN, AROUND = 84, 220


def _arrangements(parts: list[list[_Drawn]], height: int, slider: bool) -> list[tuple[int, dict[str, Any]]]:
    """In how many columns the parts of a figure are, by the width of the window."""
    n = len(parts)
    columns = [(0, 1), (TWO, 2), (FOUR, 4)] if n > 2 else [(0, 1), (TWO, 2)]
    return [(least, _arranged(parts, height, count, slider)) for least, count in reversed(columns)]


def _arranged(parts: list[list[_Drawn]], height: int, columns: int, slider: bool) -> dict[str, Any]:
    rows = -(-len(parts) // columns)
    row = max(height - AROUND, 200) if rows == 1 else min(max(height - AROUND, 200), 280)
    places = _places(len(parts), columns, row, BETWEEN)
    tall = height if rows == 1 else rows * row + (rows - 1) * BETWEEN + AROUND
    change: dict[str, Any] = {"height": tall}
    for number, (drawn, ((left, right), between)) in enumerate(zip(parts, places, strict=True)):
        for each, domain in zip(drawn, _domains([one.panel for one in drawn], left, right), strict=True):
            change |= {f"xaxis{each.axis}.domain": domain, f"yaxis{each.axis}.domain": list(between)}
        change |= {f"annotations[{number}].x": left, f"annotations[{number}].y": between[1]}
    if slider:
        under = places[1][0] if columns > 1 and columns == len(parts) else (0.0, 1.0)
        change |= {"sliders[0].x": under[0], "sliders[0].len": under[1] - under[0]}
    # of few pixels a colour bar takes too many
    change |= {"coloraxis.showscale": columns > 1 or len(parts) == 1, "margin.r": 30 if columns > 1 else 22}
    return change


def _side(nodes: NodeSet, drawn: list[_Drawn]) -> linking.Side:
    """The nodes of a model, and where each is drawn."""
    found = {}
    for each in drawn:
        for row, column in np.argwhere(each.panel.position >= 0):
            node = int(each.panel.position[row, column])
            found[node] = linking.Cell(each.trace, each.axis, int(row), int(column))
    return linking.Side(nodes.names, [found[node] for node in range(len(found))])


def _add_dropdown(
    figure: go.Figure, grids: Mapping[str, list[_Grid]], sliders: Mapping[str, Any], parts: list[list[_Drawn]]
) -> None:
    """A menu of tasks: new colours, numbers, texts, and the slider of that task."""
    flat = [(part, each) for part, drawn in enumerate(parts) for each in drawn]
    buttons = []
    for number, (task, of_task) in enumerate(grids.items()):
        change: dict[str, list[Any]] = {"z": [], "customdata": [], "text": []}
        for part, each in flat:
            change["z"].append(_json_grid(each.panel.place(of_task[part].colors)))
            change["customdata"].append(_json_grid(each.panel.place(of_task[part].numbers)))
            change["text"].append(each.panel.place_text(of_task[part].hover).tolist())
        indices = [each.trace for _, each in flat]
        for _, each in flat:  # nothing is dimmed until the slider is moved again
            blank = np.zeros(each.panel.position.shape, dtype=int).tolist()
            for key, values in change.items():
                values.append(blank if key == "z" else None)
            indices.append(each.overlay)
        layout: dict[str, Any] = {"meta": number}  # for clicks: which task is drawn
        if sliders:
            layout["sliders"] = [sliders[task] | {"active": len(sliders[task]["steps"]) - 1}]
        buttons.append({"label": styling.text(task), "method": "update", "args": [change, layout, indices]})
    figure.update_layout(
        updatemenus=[
            {
                "buttons": buttons,
                "x": 1.0,
                "xanchor": "right",
                "y": 1.02,
                "yanchor": "bottom",
                "font": {"size": 12},
                "pad": {"b": 4},
            }
        ]
    )


def _slider(view: _View, drawn: list[_Drawn], size: int | None, place: tuple[float, float]) -> dict[str, Any]:
    """A slider of circuit sizes under the target."""
    target, curve = view.target, view.curve
    n = len(target)
    sizes = sorted({*range(0, n + 1, max(1, n // 48)), n, *([size] if size is not None else [])})
    steps = []
    for k in sizes:
        label = f"{k} of {n}"
        if curve is not None:
            label += f", f = {curve.at(min(k, curve.n_nodes)):.2f}"
        steps.append(
            {
                "method": "restyle",
                "label": label,
                "args": [
                    {"z": [_outside(target, k, each.panel).tolist() for each in drawn]},
                    [each.overlay for each in drawn],
                ],
            }
        )
    return {
        "active": sizes.index(size if size is not None else n),
        "steps": steps,
        "x": place[0],
        "len": place[1] - place[0],
        "y": -0.09,
        "pad": {"t": 0, "b": 0},
        "currentvalue": {"prefix": "nodes kept: ", "font": {"size": 13, "color": styling.INK}},
        "ticklen": 0,
        "minorticklen": 0,
        "font": {"color": "rgba(0,0,0,0)", "size": 1},
    }


def _json_grid(grid: np.ndarray) -> list[list[float | None]]:
    """NaN as null: slider steps are written as plain JSON."""
    return [[None if np.isnan(value) else float(f"{value:.5g}") for value in row] for row in grid]
