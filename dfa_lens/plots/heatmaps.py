"""Layer × head heatmaps of node scores, of one model or of two side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import torch

from dfa_lens.alignment import Alignment
from dfa_lens.errors import ScoreError
from dfa_lens.faithfulness import FaithfulnessCurve
from dfa_lens.nodes import NodeSet
from dfa_lens.plots import style
from dfa_lens.scores import NodeScores

_DIM = ((0.0, "rgba(255,255,255,0.8)"), (1.0, "rgba(255,255,255,0.8)"))


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
            f"<b>{style.text(node.name)}</b>",
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
            f"&nbsp;&nbsp;{style.text(source.nodes.names[i])}: {products[i, j]:+.3g} (W {W[i, j]:+.3g})" for i in top
        ]
        texts.append("<br>".join(lines))
    return texts


def _draw(
    figure: go.Figure,
    scores: NodeScores,
    hover: list[str],
    left: float,
    right: float,
    title: str,
    first_axis: int,
) -> tuple[int, list[tuple[_Panel, int]]]:
    """Draw one model's panels between two fractions of the width.

    Returns the next free axis, and for each panel the trace that dims it.
    """
    panels = _panels(scores.nodes)
    limit = style.robust_limit(scores.values.numpy())
    # Cells are equally wide in all panels of a model, but no panel vanishes beside a wide one.
    total = sum(len(panel.columns) for panel in panels)
    widths = np.array([max(len(panel.columns), 0.08 * total) for panel in panels], dtype=float)
    gap = 0.018
    widths *= (right - left - gap * (len(panels) - 1)) / widths.sum()
    start = left
    drawn = []
    for i, (panel, width) in enumerate(zip(panels, widths, strict=True)):
        axis = first_axis + i
        suffix = "" if axis == 1 else str(axis)
        cells = {"xgap": 1, "ygap": 1, "xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        z = panel.place(scores.values.numpy())
        figure.add_trace(
            go.Heatmap(
                z=z / limit,
                customdata=z,
                text=panel.place_text(hover),
                hovertemplate="%{text}<extra></extra>",
                hoverongaps=False,
                coloraxis="coloraxis",
                name=f"{title} {panel.title}",
                **cells,
            )
        )
        figure.add_trace(
            go.Heatmap(
                z=np.full(z.shape, np.nan),
                colorscale=[list(stop) for stop in _DIM],
                showscale=False,
                hoverinfo="skip",
                name=f"{title} {panel.title} outside",
                **cells,
            )
        )
        drawn.append((panel, len(figure.data) - 1))
        labelled = max(1, len(panel.columns) // 12 + 1)
        n_rows = len(panel.rows)
        row_step = max(1, n_rows // 16 + 1)
        figure.update_layout(
            {
                f"xaxis{suffix}": {
                    "domain": [start, start + width],
                    "anchor": f"y{suffix}",
                    "title": {"text": style.text(panel.title), "standoff": 6},
                    "tickvals": list(range(0, len(panel.columns), labelled)),
                    "ticktext": [panel.columns[c] for c in range(0, len(panel.columns), labelled)],
                    "showgrid": False,
                    "zeroline": False,
                    "constrain": "domain",
                },
                f"yaxis{suffix}": {
                    "anchor": f"x{suffix}",
                    "range": [-0.5, n_rows - 0.5],
                    "tickvals": list(range(0, n_rows, row_step)) if i == 0 else [],
                    "ticktext": [_row_name(panel.rows[r]) for r in range(0, n_rows, row_step)] if i == 0 else [],
                    "title": {"text": "layer", "standoff": 4} if i == 0 else None,
                    "showgrid": False,
                    "zeroline": False,
                    "matches": None if i == 0 else f"y{first_axis if first_axis > 1 else ''}",
                },
            }
        )
        start += width + gap
    figure.add_annotation(
        text=f"<b>{style.text(title)}</b>",
        x=left,
        y=1.0,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        yshift=6,
        showarrow=False,
    )
    return first_axis + len(panels), drawn


def _row_name(layer: int) -> str:
    return "embed" if layer < 0 else str(layer)


def _outside(scores: NodeScores, k: int) -> np.ndarray:
    """1 for every node outside the k best, NaN for those inside."""
    out = np.ones(len(scores))
    out[scores.order()[:k].numpy()] = np.nan
    return out


def _dim(figure: go.Figure, scores: NodeScores, drawn: list[tuple[_Panel, int]], size: int | None) -> None:
    """Dim all but the ``size`` best nodes; None dims nothing."""
    if size is not None:
        for panel, overlay in drawn:
            figure.data[overlay].z = panel.place(_outside(scores, size))


def _check_size(size: int | None, scores: NodeScores) -> None:
    if size is not None and not 0 <= size <= len(scores):
        raise ScoreError(f"size must be between 0 and the number of nodes, {len(scores)}, not {size}.")


def _colors(figure: go.Figure) -> None:
    figure.update_layout(
        coloraxis={
            "colorscale": [list(stop) for stop in style.DIVERGING],
            "cmin": -1,
            "cmax": 1,
            "colorbar": {
                "title": {"text": "score /<br>model's<br>98th pct.", "font": {"size": 11}},
                "thickness": 12,
                "len": 0.8,
                "tickvals": [-1, -0.5, 0, 0.5, 1],
            },
        },
        plot_bgcolor=style.NO_NODE,
    )


def scores_heatmap(
    scores: NodeScores,
    *,
    title: str | None = None,
    size: int | None = None,
    width: int | None = None,
    height: int = 460,
) -> go.Figure:
    """Scores of one model: layers bottom to top, heads left to right, MLP blocks in a column of their own.

    Colours are scores divided by the 98th percentile of their absolute values, so that one large node does not bleach
    the others; white is zero, grey is no node. The hover shows the score itself, and ``trace.customdata`` holds it.

    Parameters
    ----------
    size:
        Dim all but the ``size`` best nodes; default: none is dimmed.
    width, height:
        In pixels; by default as wide as the page.

    Raises
    ------
    ScoreError
        If ``size`` is out of range.
    """
    _check_size(size, scores)
    figure = go.Figure()
    _, drawn = _draw(figure, scores, _hover(scores), 0.0, 1.0, title or "scores", 1)
    style.layout(figure, None, width=width, height=height)
    _colors(figure)
    _dim(figure, scores, drawn, size)
    return figure


def aligned_heatmap(
    source: NodeScores,
    target: NodeScores,
    *,
    alignment: Alignment | None = None,
    size: int | None = None,
    curve: FaithfulnessCurve | None = None,
    title: str | None = None,
    source_name: str = "source",
    target_name: str = "target",
    slider: bool = True,
    contributors: int = 5,
    width: int | None = None,
    height: int = 560,
) -> go.Figure:
    """Source and target scores side by side, layers aligned by relative depth.

    Both models fill the same height, so that equal height is equal relative depth. One colour scale serves both:
    scores divided by each model's own 98th percentile of absolute scores, white at zero. The hover shows name, score,
    rank and percentile; on the target, with ``alignment``, also the soft mask and the source nodes that contributed
    most.

    Parameters
    ----------
    source, target:
        Scores on the two models; ``target`` is usually ``alignment.transfer(source)``.
    alignment:
        What carried one to the other; default: no contributors in the hover.
    size:
        The circuit size shown at first: the rest of the target is dimmed. Default: everything is shown.
    curve:
        A faithfulness curve of ``target``: the slider then shows f at each size.
    slider:
        Whether a slider below the target changes the circuit size. Default: yes.
    contributors:
        How many source nodes the hover lists for each target node.

    Raises
    ------
    ScoreError
        If ``size`` is out of range, or the scores are not those of the alignment's nodes.

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
    _check_size(size, target)
    extra = None
    if alignment is not None:
        source.require(alignment.source, "The source scores")
        target.require(alignment.target, "The target scores")
        extra = _contributors(alignment, source, contributors)
    figure = go.Figure()
    axis, _ = _draw(figure, source, _hover(source), 0.0, 0.4, source_name, 1)
    _, drawn = _draw(figure, target, _hover(target, extra), 0.47, 1.0, target_name, axis)
    style.layout(figure, title, width=width, height=height)
    _colors(figure)
    _dim(figure, target, drawn, size)
    if slider:
        _add_slider(figure, target, drawn, size, curve)
    return figure


def _add_slider(
    figure: go.Figure,
    target: NodeScores,
    drawn: list[tuple[_Panel, int]],
    size: int | None,
    curve: FaithfulnessCurve | None,
) -> None:
    n = len(target)
    sizes = sorted({*range(0, n + 1, max(1, n // 48)), n, *([size] if size is not None else [])})
    steps = []
    for k in sizes:
        outside = _outside(target, k)
        label = f"{k} of {n}"
        if curve is not None:
            label += f", f = {curve.at(min(k, curve.n_nodes)):.2f}"
        steps.append(
            {
                "method": "restyle",
                "label": label,
                "args": [
                    {"z": [_json_grid(panel.place(outside)) for panel, _ in drawn]},
                    [overlay for _, overlay in drawn],
                ],
            }
        )
    figure.update_layout(
        sliders=[
            {
                "active": sizes.index(size if size is not None else n),
                "steps": steps,
                "x": 0.47,
                "len": 0.53,
                "y": -0.09,
                "pad": {"t": 20, "b": 0},
                "currentvalue": {"prefix": "nodes kept: ", "font": {"size": 13, "color": style.INK}},
                "ticklen": 0,
                "minorticklen": 0,
                "font": {"color": "rgba(0,0,0,0)", "size": 1},
            }
        ]
    )
    figure.update_layout(margin={"b": 120})


def _json_grid(grid: np.ndarray) -> list[list[float | None]]:
    """NaN as null: slider steps are written as plain JSON."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in grid]
