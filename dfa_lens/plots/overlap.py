"""How much circuits have in common: tasks, seeds or models side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from dfa_lens.data.circuit import Circuit, overlaps
from dfa_lens.data.edge_circuit import EdgeCircuit
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style


def circuit_overlap(
    circuits: Mapping[str, Circuit] | Mapping[str, EdgeCircuit],
    *,
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 460,
) -> Picture:
    """The Jaccard index of every two circuits: nodes (or edges) in both over those in either.

    The hover says how many are common, what two random circuits of these sizes would have (``expected``), and p,
    corrected for all pairs by Holm's method; a star marks p below 0.05. Large circuits have a high Jaccard index by
    chance alone.

    Parameters
    ----------
    circuits:
        By name (task, seed, setting), of one model, all of nodes or all of edges; at least two.
    style:
        See :data:`~dfa_lens.plots.style.Style`.

    Raises
    ------
    CircuitError
        If there are fewer than two, or they were chosen among different nodes or edges.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(4, 4)
    >>> circuits = {"one": dfa.Circuit(nodes.names[:5], nodes), "two": dfa.Circuit(nodes.names[1:6], nodes)}
    >>> dfa.plots.circuit_overlap(circuits).to_frame()["jaccard"].round(2).tolist()
    [0.67]
    """
    arguments.expect_each("circuits", circuits, Circuit, EdgeCircuit)
    table = overlaps(circuits)
    unit = next(iter(circuits.values())).unit
    names = list(circuits)
    n = len(names)
    z, marks = np.eye(n), [[""] * n for _ in names]
    hover = [[f"<b>{styling.text(name)}</b><br>{len(circuits[name])} {unit}"] * n for name in names]
    for row in table.itertuples():
        i, j = names.index(row.first), names.index(row.second)
        words = (
            f"<b>{styling.text(row.first)}</b> and <b>{styling.text(row.second)}</b><br>{row.common} {unit} of "
            f"{len(circuits[row.first])} and {len(circuits[row.second])}<br>Jaccard {row.jaccard:.3f}, by chance "
            f"{row.expected:.3f}<br>p {row.p_holm:.2g}"
        )
        for at in ((i, j), (j, i)):
            z[at] = row.jaccard
            hover[at[0]][at[1]] = words
            marks[at[0]][at[1]] = "*" * (row.p_holm < 0.05)
    labels = [styling.text(name) for name in names]
    figure = Picture()
    figure.add_trace(
        go.Heatmap(
            z=z,
            x=labels,
            y=labels,
            zmin=0,
            zmax=1,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=[list(stop) for stop in styling.SEQUENTIAL],
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "Jaccard"}, "thickness": 12},
        )
    )
    for i in range(n):
        for j in range(n):
            figure.add_annotation(
                x=labels[j],
                y=labels[i],
                text=f"{z[i, j]:.2f}".removeprefix("0") + marks[i][j],
                showarrow=False,
                font={"size": 11, "color": "white" if z[i, j] > 0.55 else styling.INK},
            )
    styling.layout(figure, title, width=width, height=height, style=style)
    figure.update_layout(
        xaxis={"side": "bottom", "showgrid": False, "automargin": True, "type": "category"},
        yaxis={"autorange": "reversed", "showgrid": False, "automargin": True, "type": "category"},
    )
    steep = [(700, {"xaxis.tickangle": 0, "height": height}), (0, {"xaxis.tickangle": -90, "height": height + 60})]
    return figure.carry(table, fit=None if styling.on_paper(style) else picture.fit(steep))
