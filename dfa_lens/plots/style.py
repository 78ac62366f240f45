"""What all figures share: colours, fonts, colour limits."""

from __future__ import annotations

import html

import numpy as np
import plotly.graph_objects as go

#: Blue through near-white to red: diverging, and safe for the common kinds of colour blindness.
DIVERGING = (
    (0.0, "#2166ac"),
    (0.25, "#92c5de"),
    (0.5, "#f7f7f7"),
    (0.75, "#f4a582"),
    (1.0, "#b2182b"),
)
#: Lines: the Okabe-Ito palette, in an order that keeps neighbours apart.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NO_NODE = "#e4e4e4"
INK = "#222222"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


def robust_limit(values: np.ndarray, quantile: float = 0.98) -> float:
    """The absolute score that gets the full colour: the 98th percentile of ``|values|``, so that one large node does
    not bleach all others; the largest where that is zero, 1 where all are."""
    magnitude = np.abs(values[np.isfinite(values)])
    if not magnitude.size:
        return 1.0
    return float(np.quantile(magnitude, quantile)) or float(magnitude.max()) or 1.0


def text(value: object) -> str:
    """Any label, safe inside a figure or a page."""
    return html.escape(str(value), quote=True)


def layout(figure: go.Figure, title: str | None, *, width: int | None, height: int) -> go.Figure:
    """Fonts, margins and background, on this figure alone."""
    figure.update_layout(
        template="none",
        font={"family": FONT, "size": 13, "color": INK},
        title={"text": text(title), "x": 0.01, "xanchor": "left", "font": {"size": 17}} if title else None,
        paper_bgcolor="white",
        plot_bgcolor="white",
        width=width,
        height=height,
        margin={"l": 60, "r": 30, "t": 70 if title else 40, "b": 50},
        hoverlabel={"font": {"family": FONT, "size": 12}, "align": "left"},
    )
    return figure
