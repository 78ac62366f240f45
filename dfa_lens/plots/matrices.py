"""Matrices: transfer from task to task, and the alignment itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.nodes import NodeSet
from dfa_lens.errors import AlignmentError, DfaError
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style


def transfer_matrix(
    table: Any,
    *,
    value: str = "cpr",
    train: str | None = None,
    test: str | None = None,
    title: str | None = None,
    limits: tuple[float, float] | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 460,
) -> Picture:
    """How well an alignment trained on one task does on another: a cell per training and test task.

    Parameters
    ----------
    table:
        A pandas table with the columns ``train``, ``test`` and ``value``; several rows of one cell (seeds) are
        averaged, and the hover shows their number and spread. Or the table of :func:`dfa_lens.study.run`, of one
        setting and one pair of models: ``table[(table.setting == "one-task") & (table.family == "llama3")]``.
    value:
        The column shown.
    train, test:
        The columns that name the tasks; default: ``train`` and ``test`` or, of a study's table, ``trained_on`` and
        ``task``. Their order of first appearance is that of rows and columns.
    limits:
        Of the colours; default: the smallest and the largest value.

    Raises
    ------
    DfaError
        If the table is empty, lacks a column, or has no number in it; or if a study's table is of several settings or
        pairs of models, which would be averaged.

    Examples
    --------
    >>> import dfa_lens as dfa, pandas as pd
    >>> table = pd.DataFrame({"train": ["ioi", "mcqa"], "test": ["ioi", "ioi"], "cpr": [0.8, 0.6]})
    >>> dfa.plots.transfer_matrix(table).to_frame().shape
    (2, 5)
    """
    of_study = train is None and test is None and isinstance(table, pd.DataFrame) and "trained_on" in table
    if of_study:
        table = _of_one(table[table["trained_on"] != ""])
    train, test = train or ("trained_on" if of_study else "train"), test or ("task" if of_study else "test")
    require(table, (train, test, value))
    cells = summary(table, [train, test], value)
    rows, columns = list(dict.fromkeys(table[train])), list(dict.fromkeys(table[test]))
    wide = cells.pivot(index=train, columns=test, values="mean").reindex(index=rows, columns=columns)
    z = wide.to_numpy(dtype=float)
    if not np.isfinite(z).any():
        raise DfaError(f"Column {value!r} has no finite number.")
    spread = cells.pivot(index=train, columns=test, values="std").reindex(index=rows, columns=columns).to_numpy(float)
    counts = cells.pivot(index=train, columns=test, values="count").reindex(index=rows, columns=columns).to_numpy(float)
    low, high = limits or (float(np.nanmin(z)), float(np.nanmax(z)))
    figure = Picture()
    hover = [
        [
            f"<b>{styling.text(r)}</b> → <b>{styling.text(c)}</b><br>{styling.text(value)} {z[i, j]:.3f}"
            + (f" ± {spread[i, j]:.3f} ({counts[i, j]:.0f})" if counts[i, j] > 1 else "")
            for j, c in enumerate(columns)
        ]
        for i, r in enumerate(rows)
    ]
    figure.add_trace(
        go.Heatmap(
            z=z,
            x=[styling.text(c) for c in columns],
            y=[styling.text(r) for r in rows],
            zmin=low,
            zmax=high,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=[list(stop) for stop in styling.SEQUENTIAL],
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": styling.text(value)}, "thickness": 12},
        )
    )
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            if np.isfinite(z[i, j]):
                dark = (z[i, j] - low) > 0.55 * max(high - low, 1e-12)
                figure.add_annotation(
                    x=styling.text(c),
                    y=styling.text(r),
                    text=f"{z[i, j]:.2f}",
                    showarrow=False,
                    font={"color": "white" if dark else styling.INK},
                )
    styling.layout(figure, title, width=width, height=height, style=style)
    figure.update_layout(
        xaxis={"title": {"text": "tested on"}, "side": "bottom", "showgrid": False, "automargin": True},
        yaxis={
            "title": {"text": "trained on", "standoff": 12},
            "autorange": "reversed",
            "showgrid": False,
            "automargin": True,
        },
        plot_bgcolor=styling.NO_NODE,
        margin={"b": 70},
    )
    steep = [(700, {"xaxis.tickangle": 0, "height": height}), (0, {"xaxis.tickangle": -90, "height": height + 60})]
    return figure.carry(cells, fit=None if styling.on_paper(style) else picture.fit(steep))


def _of_one(table: pd.DataFrame) -> pd.DataFrame:
    """A study's table, if it is of one setting and one pair of models: cells of several would be their mean."""
    for column, what in (("setting", "settings"), ("family", "pairs of models")):
        found = list(dict.fromkeys(table[column])) if column in table else []
        if len(found) > 1:
            raise DfaError(
                f"The table is of {len(found)} {what} ({', '.join(map(repr, found[:4]))}{', …' * (len(found) > 4)}): "
                f"draw one at a time, table[table[{column!r}] == {found[0]!r}]."
            )
    return table


def require(table: Any, columns: tuple[str, ...]) -> None:
    """The table must be there, not be empty, and have the columns."""
    if not isinstance(table, pd.DataFrame):
        raise DfaError(f"A pandas table is needed, not {type(table).__name__}.")
    if table.empty:
        raise DfaError("The table is empty.")
    for column in columns:
        if column not in table.columns:
            raise DfaError(f"The table has no column {column!r}; it has {', '.join(map(repr, table.columns))}.")


def summary(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """Mean, standard deviation and number of rows of every group, in the order of first appearance."""
    return table.groupby(by, sort=False)[value].agg(["mean", "std", "count"]).reset_index()


def alignment_explorer(
    alignment: Alignment,
    *,
    button: bool = True,
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 720,
) -> Picture:
    """The matrix W as a picture, with its marginals and a map by depth.

    Large panel: W, a row per source node and a column per target node, red for positive and blue for negative, white
    at zero, lines between layers (zoom in for single nodes). Above and to the right: the mean of ``|W|`` of each
    target and each source node. Bottom: the mean of ``|W|`` by source and target layer, where a transfer by depth
    alone would show a diagonal, and by kind of node. A button orders nodes by layer or by kind.

    Parameters
    ----------
    alignment:
        Of one stage or several (their product is shown).
    button:
        Whether a button orders nodes by kind; without it the file has a third of the size. Default: yes; never on
        paper.

    Raises
    ------
    AlignmentError
        If W is zero everywhere.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> alignment = dfa.controls.depth_mean(dfa.NodeSet.for_sizes(6, 8), dfa.NodeSet.for_sizes(10, 10))
    >>> type(dfa.plots.alignment_explorer(alignment)).__name__
    'Picture'
    """
    arguments.expect(1, "alignment", alignment, Alignment)
    W = alignment.W.detach().cpu().numpy().astype(float)
    if not np.abs(W).max() > 0:
        raise AlignmentError("W is zero everywhere: there is nothing to see.")
    source, target = alignment.source, alignment.target
    limit = styling.robust_limit(W)
    orders = {"by layer": (_by_layer(source), _by_layer(target)), "by kind": (_by_kind(source), _by_kind(target))}
    figure = Picture()
    colors = {"colorscale": [list(stop) for stop in styling.DIVERGING], "zmin": -limit, "zmax": limit}
    views = {}
    for label, (rows, columns) in orders.items():
        z = W[np.ix_(rows, columns)]
        views[label] = {
            "z": z.astype(np.float32),
            "x": [styling.text(target.names[c]) for c in columns],
            "y": [styling.text(source.names[r]) for r in rows],
            "above": np.abs(z).mean(0),
            "beside": np.abs(z).mean(1),
        }
    first = views["by layer"]
    figure.add_trace(
        go.Heatmap(
            z=first["z"],
            x=first["x"],
            y=first["y"],
            hovertemplate="%{y} → %{x}<br>W %{z:+.4g}<extra></extra>",
            colorbar={"title": {"text": "W"}, "thickness": 12, "len": 0.6, "y": 0.68, "x": 1.02},
            name="W",
            **colors,
        )
    )
    bars = {"marker": {"color": styling.LINES[0]}, "showlegend": False}
    figure.add_trace(
        go.Bar(
            x=first["x"],
            y=first["above"],
            xaxis="x",
            yaxis="y2",
            name="target nodes",
            hovertemplate="%{x}<br>mean |W| %{y:.4g}<extra></extra>",
            **bars,
        )
    )
    figure.add_trace(
        go.Bar(
            x=first["beside"],
            y=first["y"],
            xaxis="x2",
            yaxis="y",
            orientation="h",
            name="source nodes",
            hovertemplate="%{y}<br>mean |W| %{x:.4g}<extra></extra>",
            **bars,
        )
    )
    depth, kinds = _block_means(W, source, target, "layer"), _block_means(W, source, target, "kind")
    for at, (blocks, name) in enumerate(((depth, "layers"), (kinds, "kinds"))):
        figure.add_trace(
            go.Heatmap(
                z=blocks.to_numpy(),
                x=[str(x) for x in blocks.columns],
                y=[str(y) for y in blocks.index],
                xaxis=f"x{3 + at}",
                yaxis=f"y{3 + at}",
                colorscale=[list(stop) for stop in styling.SEQUENTIAL],
                zmin=0,
                showscale=False,
                hovertemplate="source %{y} → target %{x}<br>mean |W| %{z:.4g}<extra></extra>",
                name=name,
                xgap=1,
                ygap=1,
            )
        )
    styling.layout(figure, title, width=width, height=height, style=style)
    plain = {"showgrid": False, "zeroline": False, "automargin": True}
    figure.update_layout(
        bargap=0,
        xaxis={"domain": [0, 0.86], "anchor": "y", "title": {"text": "target nodes", "standoff": 4}, "type": "category"}
        | {"tickangle": 0, "nticks": 10}
        | plain,
        yaxis={
            "domain": [0.42, 0.9],
            "anchor": "x",
            "title": {"text": "source nodes"},
            "type": "category",
            "nticks": 14,
        }
        | plain,
        xaxis2={"domain": [0.88, 1], "anchor": "y", "title": {"text": "mean |W|", "standoff": 4}, "nticks": 3} | plain,
        yaxis2={"domain": [0.92, 1], "anchor": "x", "nticks": 3} | plain,
        xaxis3={"domain": [0, 0.55], "anchor": "y3", "title": {"text": "target layer"}, "type": "category"} | plain,
        yaxis3={"domain": [0, 0.26], "anchor": "x3", "title": {"text": "source layer"}, "type": "category"} | plain,
        xaxis4={"domain": [0.68, 1], "anchor": "y4", "title": {"text": "target kind"}, "type": "category"} | plain,
        yaxis4={"domain": [0, 0.26], "anchor": "x4", "title": {"text": "source kind"}, "type": "category"} | plain,
        shapes=_lines(source, target, orders["by layer"]),
    )
    if button and not styling.on_paper(style):
        figure.update_layout(
            updatemenus=[
                {
                    "type": "buttons",
                    "direction": "right",
                    "x": 1.0,
                    "xanchor": "right",
                    "y": 1.02,
                    "yanchor": "bottom",
                    "font": {"size": 11},
                    "buttons": [
                        {
                            "label": label,
                            "method": "update",
                            "args": [
                                {
                                    "z": [[[float(f"{w:.4g}") for w in row] for row in view["z"]], None, None],
                                    "x": [view["x"], view["x"], view["beside"].tolist()],
                                    "y": [view["y"], view["above"].tolist(), view["y"]],
                                },
                                {"shapes": _lines(source, target, orders[label])},
                                [0, 1, 2],
                            ],
                        }
                        for label, view in views.items()
                    ],
                }
            ]
        )
    table = pd.DataFrame(W, index=list(source.names), columns=list(target.names))
    return figure.carry(table, fit=None if styling.on_paper(style) else picture.fit(_explorer(height)))


def _explorer(height: int) -> list[tuple[int, dict[str, Any]]]:
    """The two small panels of the explorer are beside each other or, in a narrow window, one below the other."""
    wide = {
        "yaxis.domain": [0.38, 0.9],
        "yaxis2.domain": [0.92, 1],
        "xaxis3.domain": [0, 0.54],
        "yaxis3.domain": [0, 0.27],
        "xaxis4.domain": [0.66, 1],
        "yaxis4.domain": [0, 0.27],
        "xaxis2.title.text": "mean |W|",
        "xaxis.nticks": 10,
        "xaxis2.showticklabels": True,
    }
    narrow = wide | {
        "yaxis.domain": [0.58, 0.93],
        "yaxis2.domain": [0.94, 1],
        "xaxis3.domain": [0, 1],
        "yaxis3.domain": [0.28, 0.44],
        "xaxis4.domain": [0.1, 1],
        "yaxis4.domain": [0, 0.14],
        "xaxis2.title.text": "",
        "xaxis.nticks": 4,
        "xaxis2.showticklabels": False,
    }
    return [(700, wide | {"height": height}), (0, narrow | {"height": height + 240})]


def _by_layer(nodes: NodeSet) -> list[int]:
    return sorted(range(len(nodes)), key=lambda i: nodes[i].layer)


def _by_kind(nodes: NodeSet) -> list[int]:
    kinds = list(dict.fromkeys(node.kind for node in nodes))
    return sorted(range(len(nodes)), key=lambda i: (kinds.index(nodes[i].kind), nodes[i].layer))


def _block_means(W: np.ndarray, source: NodeSet, target: NodeSet, by: str) -> pd.DataFrame:
    """The mean of |W| by blocks of source and target nodes."""
    table = pd.DataFrame(np.abs(W), index=[getattr(n, by) for n in source], columns=[getattr(n, by) for n in target])
    return table.groupby(level=0, sort=False).mean().T.groupby(level=0, sort=False).mean().T


def _lines(source: NodeSet, target: NodeSet, order: tuple[list[int], list[int]]) -> list[dict[str, Any]]:
    """Thin lines where one layer, or one kind, ends and the next begins."""
    shapes = []
    for nodes, positions, across in ((source, order[0], False), (target, order[1], True)):
        for at in range(1, len(positions)):
            before, after = nodes[positions[at - 1]], nodes[positions[at]]
            if (before.layer, before.kind if before.layer > after.layer else "") != (
                after.layer,
                after.kind if before.layer > after.layer else "",
            ):
                new_kind = before.layer > after.layer
                line = {"color": "#444444" if new_kind else "rgba(0,0,0,0.4)", "width": 1.5 if new_kind else 0.7}
                along = {"type": "line", "line": line, "layer": "above"}
                if across:
                    shapes.append(along | {"x0": at - 0.5, "x1": at - 0.5, "y0": -0.5, "y1": len(source) - 0.5})
                else:
                    shapes.append(along | {"y0": at - 0.5, "y1": at - 0.5, "x0": -0.5, "x1": len(target) - 0.5})
    return shapes
