"""Faithfulness curves in one figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dfa_lens.data.curve import FaithfulnessCurve
from dfa_lens.errors import FaithfulnessError
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style


def curves(
    curves: Mapping[str, FaithfulnessCurve],
    *,
    title: str | None = None,
    confidence: float | None = 0.95,
    style: Style = "screen",
    width: int | None = None,
    height: int = 420,
) -> Picture:
    """Faithfulness against the kept fraction, one line for each setting.

    The legend gives each setting's CPR; the dashed line is f of the empty circuit (its CPR is the floor), the
    dotted one a faithful circuit, f = 1. A button switches the horizontal axis to logarithmic, where the empty circuit
    is not shown.

    Parameters
    ----------
    curves:
        Label → curve, all of one protocol.
    confidence:
        Of the bootstrap bands over examples; None leaves them out.
    style:
        See :data:`~dfa_lens.plots.style.Style`.

    Raises
    ------
    FaithfulnessError
        If there are no curves, or they are of different protocols.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> curve = dfa.faithfulness_curve(model, pairs, dfa.attribute(model, pairs, method="nap"), sizes=[0, 9, 54])
    >>> dfa.plots.curves({"nap": curve}).to_frame().shape[0]
    3
    """
    arguments.expect_each("curves", curves, FaithfulnessCurve)
    if not curves:
        raise FaithfulnessError("There are no curves to draw.")
    protocols = {curve.protocol for curve in curves.values()}
    if len(protocols) > 1:
        raise FaithfulnessError(f"Curves of different protocols don't compare: {', '.join(sorted(protocols))}.")
    figure = Picture()
    first = next(iter(curves.values()))
    figure.add_trace(
        go.Scatter(
            x=[0, 1],
            y=[first.empty_faithfulness] * 2,
            mode="lines",
            line={"color": "#888888", "dash": "dash", "width": 1.5},
            name=f"empty circuit (floor {first.floor:.3f})",
            hoverinfo="skip",
        )
    )
    colors = styling.line_colors(curves)
    for label, curve in curves.items():
        color = colors[label]
        if confidence is not None and len(curve.clean_values) > 1:
            low, high = curve.band(confidence)
            figure.add_trace(
                go.Scatter(
                    x=np.concatenate([curve.fractions, curve.fractions[::-1]]),
                    y=np.concatenate([high, low[::-1]]),
                    mode="lines",  # of few points plotly would draw dots
                    fill="toself",
                    fillcolor=styling.rgba(color, 0.15),
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=label,
                    name=f"{styling.text(label)} band",
                )
            )
        figure.add_trace(
            go.Scatter(
                x=curve.fractions,
                y=curve.faithfulness,
                customdata=curve.sizes,
                mode="lines+markers",
                marker={"size": 4},
                line={"color": color, "width": 2},
                legendgroup=label,
                name=f"{styling.text(label)} (CPR {curve.cpr:.3f})",
                hovertemplate=f"<b>{styling.text(label)}</b><br>%{{customdata}} nodes (%{{x:.1%}})<br>f = %{{y:.3f}}"
                "<extra></extra>",
            )
        )
    figure.add_hline(y=1, line={"color": "#888888", "dash": "dot", "width": 1})
    paper = styling.on_paper(style)
    styling.layout(figure, title, width=width, height=height, style=style)
    figure.update_layout(
        xaxis={"title": {"text": "fraction of nodes kept"}, "tickformat": ".0%", "gridcolor": "#eeeeee"},
        yaxis={"title": {"text": "faithfulness f"}, "gridcolor": "#eeeeee", "zerolinecolor": "#cccccc"},
        legend={"x": 0.99, "xanchor": "right", "y": 0.03, "yanchor": "bottom"} if paper else {"x": 1.02, "y": 1},
        updatemenus=[]
        if paper
        else [
            {
                "type": "buttons",
                "direction": "right",
                "x": 1.0,
                "y": 1.02,
                "xanchor": "right",
                "yanchor": "bottom",
                "pad": {"b": 2},
                "font": {"size": 11},
                "buttons": [
                    {"label": "linear", "method": "relayout", "args": [{"xaxis.type": "linear"}]},
                    {"label": "log", "method": "relayout", "args": [{"xaxis.type": "log"}]},
                ],
            }
        ],
    )
    parts = [curve.to_frame().assign(setting=label) for label, curve in curves.items()]
    return figure.carry(pd.concat(parts, ignore_index=True), fit=None if paper else picture.fit(_arrangements(height)))


def _arrangements(height: int) -> list[tuple[int, dict[str, Any]]]:
    """The legend is beside the plot or, in a narrow window, above it."""
    beside = {"legend.orientation": "v", "legend.x": 1.02, "legend.y": 1, "legend.yref": "paper"}
    return [(700, beside | {"height": height}), (0, {"legend.orientation": "h", "legend.x": 0, "height": height + 140})]
