"""Picture: a plotly Figure that carries the numbers it shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go

from dfa_lens.data.files import writing
from dfa_lens.errors import DfaError

#: The line of text that a click writes below a figure, as wide as that; "yshift" says how far below.
NOTE = {
    "name": "what was clicked",
    "xref": "paper",
    "yref": "paper",
    "x": 0,
    "y": 0,
    "xanchor": "left",
    "yanchor": "top",
    "width": 480,
    "align": "left",
    "showarrow": False,
    "font": {"size": 12},
}


@dataclass(frozen=True)
class Reaction:
    """What makes the HTML of a figure react: a function of ``templates/``, called with the figure and some data."""

    template: str
    data: Any

    @property
    def source(self) -> str:
        """The function."""
        return files("dfa_lens.plots").joinpath(f"templates/{self.template}").read_text(encoding="utf-8")

    def script(self) -> str:
        """The call; plotly fills in ``{plot_id}``."""
        # "</" would end the script that this is written into
        text = json.dumps(self.data, separators=(",", ":")).replace("</", "<\\/")
        return f"({self.source})(document.getElementById('{{plot_id}}'), {text});"


#: What HTML says to plotly, unless it is told otherwise.
CONFIG = {"responsive": True, "displaylogo": False}


def fit(arrangements: Sequence[tuple[int, dict[str, Any]]] = (), *, captions: int = 0, below: int = 0) -> Reaction:
    """What fits a figure into its window.

    Parameters
    ----------
    arrangements:
        What plotly is to change from so many pixels of width on, the widest first; all change the same things.
    captions, below:
        Pixels for words right above the plot, and for those below axes and slider.
    """
    return Reaction("fit.js", {"arrangements": arrangements, "captions": captions, "below": below})


#: Pixels of a letter below an axis, between two labels, and of what stands beside a plot.
LETTER, BETWEEN, BESIDE = 7.2, 14, 150


def labelled(labels: Sequence[str], height: int) -> list[tuple[int, dict[str, Any]]]:
    """For :func:`fit`: labels of the horizontal axis lie where all fit, else they stand, and the figure is higher."""
    longest = max(map(len, labels), default=0)
    least = round(BESIDE + len(labels) * (LETTER * longest + BETWEEN))
    stand = {"xaxis.tickangle": -90, "height": height + round(LETTER * longest)}
    return [(least, {"xaxis.tickangle": 0, "height": height}), (0, stand)]


class Picture(go.Figure):
    """A plotly Figure with its numbers as a table and, where it reacts to clicks, what makes it react.

    It is a Figure in every respect. In HTML (:meth:`write_html`, :meth:`to_html`) a script does the linking; in a
    notebook :meth:`widget` gives a FigureWidget that does the same in Python.
    """

    _frame: Any = None
    _reactions: tuple[Reaction, ...] = ()
    _react: Callable[[go.FigureWidget], None] | None = None

    def carry(
        self,
        frame: Any,
        *,
        click: Reaction | None = None,
        fit: Reaction | None = None,
        react: Callable[[go.FigureWidget], None] | None = None,
    ) -> Picture:
        """Attach the table that is drawn, what HTML does on clicks and to fit its window, and what wires a widget."""
        self._frame, self._react = frame, react
        self._reactions = tuple(each for each in (fit, click) if each is not None)
        return self

    @property
    def reactions(self) -> tuple[Reaction, ...]:
        """What makes its HTML react."""
        return self._reactions

    def to_frame(self) -> Any:
        """What is drawn, as a pandas table."""
        if self._frame is None:
            raise DfaError("This figure was not made by dfa_lens.plots, or was copied: it carries no table.")
        return self._frame.copy()

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        """As plotly's, with the scripts for clicks and narrow windows."""
        return super().to_html(*args, **self._options(kwargs))

    def write_html(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """As :meth:`to_html`; a :class:`~dfa_lens.errors.FileError` if it can't be written."""
        with writing(file):
            super().write_html(file, *args, **self._options(kwargs))

    def to_image(self, *args: Any, **kwargs: Any) -> bytes:
        """As plotly's (kaleido and a Chromium are needed), without sliders and buttons."""
        return self._still().to_image(*args, **kwargs)

    def write_image(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """As plotly's (kaleido and a Chromium are needed), without sliders and buttons; a FileError as well."""
        with writing(file):
            self._still().write_image(file, *args, **kwargs)

    def _still(self) -> go.Figure:
        still = go.Figure(self)
        if still.layout.sliders or still.layout.updatemenus or self._reactions:
            still.layout.sliders, still.layout.updatemenus = (), ()
            still.layout.margin.b = 60
        return still

    def widget(self) -> go.FigureWidget:
        """The figure for a notebook, with clicks handled in Python; needs anywidget (``dfa-lens[notebook]``)."""
        try:
            widget = go.FigureWidget(self)
        except ImportError as error:
            raise DfaError("A notebook widget needs anywidget: pip install 'dfa-lens[notebook]'.") from error
        if self._react is not None:
            self._react(widget)
        return widget

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = kwargs.get("post_script") or []
        scripts = [*([given] if isinstance(given, str) else given), *(each.script() for each in self._reactions)]
        options = kwargs | {"config": CONFIG | (kwargs.get("config") or {})}
        return options | {"post_script": scripts} if scripts else options
