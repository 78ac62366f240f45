"""Edges by blocks: layers of writers against layers of readers, and the heads of one such block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dfa_lens.data.edges import EdgeScores
from dfa_lens.errors import EdgeError, unknown
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style

Measure = Literal["sum", "largest"]
"""What stands for a block of edges: the sum of their absolute scores, or the largest."""

#: Pixels: of a row of blocks, of the lower panel, free between the two; on paper a part of that.
ROW, LOWER, BETWEEN, ON_PAPER = 14, 230, 120, 0.6
#: Of the margins above and below.
MARGINS = 120
MISSING = "the edges of this block are not in the figure (most=)"


class Axis(NamedTuple):
    """Rows or columns that belong together: the writers of a layer's heads, the readers of its queries, …"""

    name: str
    first: int
    stop: int


class Block(NamedTuple):
    """The edges between some writers and some readers."""

    row: int  #: of the upper panel
    column: int
    names: tuple[list[str], list[str]]  #: of its writers and readers
    scores: np.ndarray  #: [writer, reader], NaN where there is no edge


@dataclass(frozen=True)
class Blocks:
    """The edges by blocks."""

    scores: EdgeScores
    measure: Measure

    @cached_property
    def rows(self) -> list[Axis]:
        """The writers: the input, then heads and MLP of each layer."""
        nodes = self.scores.edges.nodes
        return [
            Axis(nodes.names[site.positions[0]].split(".")[0], site.positions[0], site.positions[-1] + 1)
            for site in nodes.sites
        ]

    @cached_property
    def columns(self) -> list[Axis]:
        """The readers: queries, keys, values and MLP of each layer, then the logits."""
        return [
            Axis(
                {"logits": "logits", "mlp": f"m{site.layer}"}.get(site.kind, f"a{site.layer}<{site.kind}>"),
                site.first,
                site.stop,
            )
            for site in self.scores.edges.sites
        ]

    @cached_property
    def _values(self) -> np.ndarray:
        return self.scores.values.numpy().astype(float)

    def block(self, row: int, column: int) -> Block:
        """The edges behind a cell."""
        rows, columns = (slice(axis.first, axis.stop) for axis in (self.rows[row], self.columns[column]))
        names = list(self.scores.writers[rows]), list(self.scores.readers[columns])
        return Block(row, column, names, self._values[rows, columns])

    @cached_property
    def blocks(self) -> list[Block]:
        """All with an edge, the strongest first; ties as they stand."""
        found = [self.block(row, column) for row in range(len(self.rows)) for column in range(len(self.columns))]
        return sorted((b for b in found if np.isfinite(b.scores).any()), key=lambda block: -self.of(block))

    def of(self, block: Block) -> float:
        """What stands for a block."""
        sizes = np.abs(block.scores)
        return float(np.nansum(sizes) if self.measure == "sum" else np.nanmax(sizes))

    def table(self) -> Any:
        """A row per block, the strongest first."""
        return pd.DataFrame(
            {
                "writers": self.rows[block.row].name,
                "readers": self.columns[block.column].name,
                "edges": int(np.isfinite(block.scores).sum()),
                "sum": float(np.nansum(np.abs(block.scores))),
                "largest": float(np.nanmax(np.abs(block.scores))),
                "edge": "->".join(_largest(block)[:2]),
            }
            for block in self.blocks
        )


def _largest(block: Block) -> tuple[str, str, float]:
    """Writer, reader and score of the edge with the largest absolute score."""
    row, column = np.unravel_index(np.nanargmax(np.abs(block.scores)), block.scores.shape)
    return block.names[0][row], block.names[1][column], float(block.scores[row, column])


def edge_heatmap(
    scores: EdgeScores,
    *,
    measure: Measure = "sum",
    block: tuple[str, str] | None = None,
    most: int = 50_000,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    style: Style = "screen",
) -> Picture:
    """Edges by layers, and head by head within one block.

    Above, writers (rows: the input, the heads and the MLP of each layer) against readers (columns: queries, keys,
    values and MLP of each layer, logits): the sum, or the largest, of the absolute scores in each block; grey is no
    edge. Below, the edges of one block with their signs, red where the clean activation helps and blue where it hurts.
    A click on a block shows its edges below. Hover: names, scores, and of a block its strongest edge.

    Parameters
    ----------
    scores:
        Of edges, all or some.
    measure:
        See :data:`Measure`.
    block:
        The one that is shown below at first, by the names of its row and column (``("a0", "a3<v>")``). Default: the
        strongest between heads.
    most:
        How many edges the figure holds for clicks, at about ten bytes each: those of the block that is shown, and of
        the strongest others. A model of 8 B parameters has 1.6 million.
    style:
        See :data:`~dfa_lens.plots.style.Style`.

    Raises
    ------
    EdgeError
        If there is no such measure or block.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> figure = dfa.plots.edge_heatmap(dfa.attribute_edges(model, pairs, method="eap"), block=("input", "a0<v>"))
    >>> figure.to_frame().columns.tolist()
    ['writers', 'readers', 'edges', 'sum', 'largest', 'edge']
    """
    arguments.expect(1, "scores", scores, EdgeScores)
    on_paper = styling.on_paper(style)
    if measure not in get_args(Measure):
        raise unknown("measure", measure, get_args(Measure), EdgeError)
    blocks = Blocks(scores, measure)
    shown = _named(blocks, block)
    above = np.full((len(blocks.rows), len(blocks.columns)), np.nan)
    hover = np.full(above.shape, "", dtype=object)
    for each in blocks.blocks:
        above[each.row, each.column] = blocks.of(each)
        hover[each.row, each.column] = _hover(blocks, each)
    scale = ON_PAPER if on_paper else 1
    inside = scale * (ROW * len(blocks.rows) + LOWER + BETWEEN) if height is None else max(height - MARGINS, 1)
    gap = scale * BETWEEN / inside
    tall = height or round(inside + MARGINS)
    figure = Picture()
    styling.layout(figure, title, width=width, height=tall, style=style)
    figure.add_heatmap(
        z=above,
        x=[styling.text(axis.name) for axis in blocks.columns],
        y=[axis.name for axis in blocks.rows],
        text=hover,
        hoverinfo="text",
        coloraxis="coloraxis",
        name="blocks",
        xgap=1,
        ygap=1,
    )
    details = _details(blocks, most, shown)
    first = details[f"{shown.row},{shown.column}"]
    figure.add_heatmap(
        **first["trace"],
        hovertemplate="<b>%{y}->%{x}</b><br>score %{z:+.4g}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis2",
        name="edges",
        xaxis="x2",
        yaxis="y2",
        xgap=1,
        ygap=1,
    )
    lower = (1 - gap) * LOWER / (LOWER + ROW * len(blocks.rows))
    _arrange(figure, blocks, first, (lower, gap))
    clicks = Clicks(details)
    return figure.carry(blocks.table(), click=None if on_paper else clicks.reaction(), react=clicks.wire)


def _named(blocks: Blocks, block: tuple[str, str] | None) -> Block:
    """The block of these names; for None the strongest of heads on both sides, or of all."""
    if block is None:
        return next((each for each in blocks.blocks if min(each.scores.shape) > 1), blocks.blocks[0])
    places = []
    for name, axes, what in zip(block, (blocks.rows, blocks.columns), ("writers", "readers"), strict=True):
        names = [axis.name for axis in axes]
        if name not in names:
            raise unknown(what, name, names, EdgeError)
        places.append(names.index(name))
    found = blocks.block(*places)
    if not np.isfinite(found.scores).any():
        raise EdgeError(f"No edge of these scores goes from {block[0]} to {block[1]}.")
    return found


def _hover(blocks: Blocks, block: Block) -> str:
    writer, reader, score = _largest(block)
    sizes = np.abs(block.scores)
    return (
        f"<b>{blocks.rows[block.row].name} to {styling.text(blocks.columns[block.column].name)}</b><br>"
        f"{int(np.isfinite(sizes).sum())} edges, sum of |score| {np.nansum(sizes):.4g}<br>"
        f"largest: {styling.text(f'{writer}->{reader}')} {score:+.4g}"
    )


def _details(blocks: Blocks, most: int, shown: Block) -> dict[str, dict[str, Any]]:
    """Row and column → what the lower panel shows of that block: of the strongest, so many edges in all."""
    details: dict[str, dict[str, Any]] = {}
    left = most
    for block in (shown, *blocks.blocks):
        key = f"{block.row},{block.column}"
        left -= 0 if key in details else block.scores.size
        if left < 0 and details:
            break
        z = [[None if np.isnan(value) else float(f"{value:.4g}") for value in row] for row in block.scores]
        title = f"{blocks.rows[block.row].name} to {styling.text(blocks.columns[block.column].name)}"
        details[key] = {
            "title": f"edges from {title}",
            "limit": float(f"{styling.robust_limit(block.scores, 1):.4g}"),
            "trace": {"z": z, "x": [styling.text(name) for name in block.names[1]], "y": block.names[0]},
        }
    return details


def _arrange(figure: go.Figure, blocks: Blocks, first: dict[str, Any], parts: tuple[float, float]) -> None:
    """The two panels one above the other, so that they are readable in any width."""
    upper, lower = [sum(parts), 1.0], [0.0, parts[0]]
    axis = {"showgrid": False, "zeroline": False, "type": "category", "automargin": True, "ticks": "", "tickangle": 0}
    names = {"sum": "sum of |score|", "largest": "largest |score|"}
    bar = {"thickness": 12, "yanchor": "bottom", "x": 1.01, "outlinewidth": 0, "tickfont": {"size": 11}}
    top = styling.robust_limit(np.array([blocks.of(block) for block in blocks.blocks]))

    def heading(text: str, y: float) -> dict[str, Any]:
        return {
            "text": text,
            "x": 0,
            "y": y,
            "xref": "paper",
            "yref": "paper",
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
        }

    figure.update_layout(
        xaxis={**axis, "tickangle": -90, "anchor": "y", "title": {"text": "readers", "standoff": 4}},
        yaxis={**axis, "domain": upper, "title": {"text": "writers", "standoff": 4}},
        xaxis2={**axis, "tickangle": -90, "anchor": "y2"},
        yaxis2={**axis, "domain": lower, "anchor": "x2"},
        plot_bgcolor=styling.NO_NODE,
        coloraxis={
            "colorscale": styling.SEQUENTIAL,
            "cmin": 0,
            "cmax": top,
            "colorbar": {**bar, "y": upper[0], "len": upper[1] - upper[0]},
        },
        coloraxis2={
            "colorscale": styling.DIVERGING,
            "cmin": -first["limit"],
            "cmax": first["limit"],
            "colorbar": {**bar, "y": lower[0], "len": lower[1]},
        },
        annotations=[
            heading(f"{names[blocks.measure]} of a block of edges", 1.005),
            heading(first["title"], parts[0] + 0.005),
        ],
        hovermode="closest",
    )


@dataclass(frozen=True)
class Clicks:
    """What a click on a block brings: its edges in the lower panel, the largest in full colour.

    ``details`` are heading, grid and largest score by "row,column" of the upper panel, of the blocks that the figure
    holds.
    """

    details: dict[str, dict[str, Any]]

    def reaction(self) -> picture.Reaction:
        """What makes the HTML of a figure react to clicks."""
        return picture.Reaction("blocks.js", {"details": self.details, "missing": MISSING})

    def wire(self, widget: go.FigureWidget) -> None:
        """Make a widget react to clicks."""

        def clicked(trace: Any, points: Any, state: Any = None) -> None:
            for row, column in points.point_inds:
                if trace.z[row][column] is None or np.isnan(trace.z[row][column]):
                    continue
                found = self.details.get(f"{row},{column}")
                with widget.batch_update():
                    if found is None:
                        widget.layout.annotations[1].text = MISSING
                    else:
                        widget.layout.annotations[1].text = found["title"]
                        widget.data[1].update(found["trace"])
                        widget.layout.coloraxis2.update(cmin=-found["limit"], cmax=found["limit"])

        widget.data[0].on_click(clicked)
