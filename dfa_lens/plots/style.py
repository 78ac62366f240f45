"""What all figures share: colours, fonts, colour limits, and the two styles."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import plotly.graph_objects as go

from dfa_lens.errors import DfaError, unknown

Style = Literal["screen", "paper", "paper-narrow"]
"""``screen``: sans-serif, as wide as the page, with sliders and buttons. ``paper``: serif, 6.8 inches wide (both
columns), for ``write_image`` to PDF or PNG, without controls. ``paper-narrow``: 3.3 inches, one column."""

INCH = 96  # pixels; what kaleido takes an inch for in PDF
_WIDTHS = {"paper": 6.8, "paper-narrow": 3.3}

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
#: The settings that figures show together: each has the line colour of its place, whatever else is drawn.
SETTINGS = ("gold", "in-distribution", "zero-shot", "uniform-s", "depth-mean", "random-w", "functional")
NO_NODE = "#e4e4e4"
INK = "#222222"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
SERIF = "'Times New Roman', 'Liberation Serif', Times, serif"
#: From little to much, for values without a natural middle.
SEQUENTIAL = ((0.0, "#f7fbff"), (0.25, "#c6dbef"), (0.5, "#6baed6"), (0.75, "#2171b5"), (1.0, "#08306b"))


def line_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: for a known setting always the same, for others those that are left, in their order."""
    wanted = list(dict.fromkeys(names))
    found = {name: LINES[SETTINGS.index(name)] for name in wanted if name in SETTINGS}
    free = [color for color in LINES if color not in found.values()] or LINES
    others = [name for name in wanted if name not in found]
    return found | {name: free[i % len(free)] for i, name in enumerate(others)}


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


def on_paper(style: Style) -> bool:
    """Whether a style is for print; an unknown one is an error."""
    if style not in get_args(Style):
        raise unknown("style", style, get_args(Style), DfaError)
    return style != "screen"


def layout(
    figure: go.Figure, title: str | None, *, width: int | None, height: int, style: Style = "screen"
) -> go.Figure:
    """Fonts, margins, size and background, on this figure alone."""
    paper = on_paper(style)
    family = SERIF if paper else FONT
    size = 9 if paper else 13
    if paper and width is None:
        width = round(_WIDTHS[style] * INCH)
    figure.update_layout(
        template="none",
        font={"family": family, "size": size, "color": INK},
        title={"text": text(title), "x": 0.01, "xanchor": "left", "font": {"size": size + 4}} if title else None,
        paper_bgcolor="white",
        plot_bgcolor="white",
        width=width,
        height=height,
        margin={"l": 60, "r": 30, "t": 70 if title else 40, "b": 50},
        hoverlabel={"font": {"family": family, "size": 12}, "align": "left"},
        modebar={"remove": list(UNUSED)},
    )
    return figure


#: Buttons of plotly's bar that serve none of these figures.
UNUSED = ("select", "lasso", "zoomin", "zoomout", "autoscale")
AXIS = {
    "gridcolor": "#eeeeee",
    "zerolinecolor": "#cccccc",
    "linecolor": "#999999",
    "ticks": "outside",
    "ticklen": 4,
    "automargin": True,
}


LEGEND_ABOVE = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def rgba(color: str, alpha: float) -> str:
    """A "#rrggbb" colour, see-through."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
