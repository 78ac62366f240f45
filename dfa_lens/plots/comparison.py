"""Two circuits in one geometry: what is in both, what is in one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from dfa_lens.data.circuit import Circuit, compare
from dfa_lens.data.nodes import Node
from dfa_lens.errors import CircuitError
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.grid import AROUND, Grid
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style

#: Of nodes in both circuits, in the first alone, in the second alone, in neither: colour and shape.
MARKS = (("#7a7a7a", "square"), ("#D55E00", "triangle-left"), ("#009E73", "triangle-right"), ("#c4c7cd", "circle"))


def circuit_comparison(
    circuits: Mapping[str, Circuit],
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    style: Style = "screen",
) -> Picture:
    """Two circuits in one geometry: two tasks, seeds or methods of one model, or two models.

    Of one model, nodes in both are squares, those in the first alone point to the left and those in the second alone to
    the right; the words above say how much the two have in common against chance. Two models, whose nodes can't be the
    same, have a panel each, equally high, so that layers of equal relative depth stand side by side; the words say how
    deep the circuits lie. Several circuits of one model: :func:`~dfa_lens.plots.overlap.circuit_overlap`.

    Parameters
    ----------
    circuits:
        Two, by name; of heads and MLP blocks.
    style:
        See :data:`~dfa_lens.plots.style.Style`.

    Raises
    ------
    CircuitError
        If there are not two, or they have other nodes than heads and MLP blocks.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(4, 4)
    >>> circuits = {"ioi": dfa.Circuit(nodes.names[:5], nodes), "mcqa": dfa.Circuit(nodes.names[1:6], nodes)}
    >>> dfa.plots.circuit_comparison(circuits).to_frame()["where"].value_counts().to_dict()
    {'neither': 14, 'both': 4, 'ioi': 1, 'mcqa': 1}
    """
    arguments.expect_each("circuits", circuits, Circuit)
    if len(circuits) != 2:
        raise CircuitError(f"This figure compares two circuits, not {len(circuits)}; circuit_overlap takes several.")
    (a, first), (b, second) = circuits.items()
    grids = [Grid.of(each.universe) for each in circuits.values()]
    scale = 0.6 if styling.on_paper(style) else 1.0
    figure = Picture()
    one = first.universe == second.universe
    if one:
        places = _places(first, second)
        overlap = first.overlap(second)
        words = f"Jaccard {overlap.jaccard:.2f} (by chance {overlap.expected:.2f}, p = {overlap.p:.2g})"
        names = (f"{a} and {b}", f"{a} alone", f"{b} alone", "neither")
        for number in (3, 0, 1, 2):
            chosen = [node for node, at in zip(first.universe, places, strict=True) if at == number]
            _add(figure, grids[0], chosen, f"{names[number]} ({len(chosen)})", number, scale)
        grids[0].axes(figure, with_input="input" in first.universe, domain=(0, 1))
        where = [("both", a, b, "neither")[at] for at in places]
        table = pd.DataFrame({"node": first.universe.names, "where": where})
    else:
        words, table = _in_panels(figure, circuits, grids, scale)
    panel = max(grid.tall() for grid in grids)
    tall = height or panel + AROUND + 50
    styling.layout(figure, title or words, width=width, height=tall, style=style)
    if title:
        figure.update_layout(title={"text": f"{styling.text(title)}: {words}"})
    figure.update_layout(hovermode="closest", legend=styling.LEGEND_ABOVE)
    arrangements = [(0, {"height": tall})] if one else _stacked(tall, panel)
    return figure.carry(table, fit=None if styling.on_paper(style) else picture.fit(arrangements))


def _places(first: Circuit, second: Circuit) -> list[int]:
    """Of every node: 0 in both, 1 in the first alone, 2 in the second alone, 3 in neither."""
    return [
        {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[each]
        for each in zip(first.kept.tolist(), second.kept.tolist(), strict=True)
    ]


def _add(
    figure: go.Figure, grid: Grid, nodes: Sequence[Node], name: str, number: int, scale: float, axis: str = ""
) -> None:
    """Some nodes with one mark."""
    color, symbol = MARKS[number]
    small = grid.n_heads > 16
    places = [grid.place(node) for node in nodes]
    figure.add_scatter(
        x=[x for x, _ in places],
        y=[y for _, y in places],
        xaxis=f"x{axis}",
        yaxis=f"y{axis}",
        mode="markers",
        name=styling.text(name),
        customdata=[node.name for node in nodes],
        hovertemplate="<b>%{customdata}</b><br>%{fullData.name}<extra></extra>",
        marker={
            "size": scale * ((4 if small else 7) if number == 3 else (9 if small else 16)),
            "symbol": symbol,
            "color": color,
            "line": {"color": "#555555", "width": 0 if number == 3 else 1},
        },
    )


def _in_panels(
    figure: go.Figure, circuits: Mapping[str, Circuit], grids: Sequence[Grid], scale: float
) -> tuple[str, pd.DataFrame]:
    """Two models side by side; what is said of them, and the table."""
    depths = compare(circuits)
    rows: list[dict[str, Any]] = []
    for number, ((name, circuit), grid) in enumerate(zip(circuits.items(), grids, strict=True), 1):
        axis = "" if number == 1 else "2"
        outside = [node for node in circuit.universe if node.name not in circuit]
        inside = [node for node in circuit.universe if node.name in circuit]
        _add(figure, grid, outside, "neither", 3, scale, axis)
        figure.data[-1].update(name="not in it", showlegend=number == 1)
        _add(figure, grid, inside, f"{name} ({len(circuit)} of {len(circuit.universe)})", number, scale, axis)
        domain = (0, 0.46) if number == 1 else (0.54, 1)
        grid.axes(figure, f"xaxis{axis}", f"yaxis{axis}", with_input="input" in circuit.universe, domain=domain)
        figure.update_layout({f"yaxis{axis}": {"anchor": f"x{axis}"}, f"xaxis{axis}": {"anchor": f"y{axis}"}})
        if "input" not in circuit.universe and grid.n_layers > 1:  # first and last layers at the same heights
            beyond = 0.07 * (grid.n_layers - 1)
            figure.update_layout({f"yaxis{axis}": {"range": [-beyond, grid.n_layers - 1 + beyond]}})
        rows += [{"circuit": name, "node": node.name, "in_circuit": node.name in circuit} for node in circuit.universe]
    told = " and ".join(f"{depth:.2f}" for depth in depths["relative_depth"])
    return f"mean relative depth {told}", pd.DataFrame(rows)


def _stacked(tall: int, panel: int) -> list[tuple[int, dict[str, Any]]]:
    """Panels side by side, or one below the other."""
    high = tall + panel + 70
    part = round(panel / (2 * panel + 70), 4)
    wide: dict[str, Any] = {"height": tall, "xaxis.domain": [0, 0.46], "xaxis2.domain": [0.54, 1]}
    narrow: dict[str, Any] = {"height": high, "xaxis.domain": [0, 1], "xaxis2.domain": [0, 1]}
    return [
        (700, {**wide, "yaxis.domain": [0, 1], "yaxis2.domain": [0, 1]}),
        (0, {**narrow, "yaxis.domain": [1 - part, 1], "yaxis2.domain": [0, part]}),
    ]
