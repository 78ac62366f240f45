"""Picture: a plotly Figure that carries the numbers it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go

from dfa_lens.data.files import writing
from dfa_lens.errors import DfaError

#: The line of text that a click writes below a figure; "yshift" says how far below.
NOTE = {
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


def script(template: str, data: Any) -> str:
    """What makes the HTML of a figure react: a function of ``templates/`` called with the figure and some data.

    plotly fills in ``{plot_id}``.
    """
    # "</" would end the script that this is written into
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    source = files("dfa_lens.plots").joinpath(f"templates/{template}").read_text(encoding="utf-8")
    return f"({source})(document.getElementById('{{plot_id}}'), {text});"


class Picture(go.Figure):
    """A plotly Figure with its numbers as a table and, where it reacts to clicks, what makes it react.

    It is a Figure in every respect. In HTML (:meth:`write_html`, :meth:`to_html`) a script does the linking; in a
    notebook :meth:`widget` gives a FigureWidget that does the same in Python.
    """

    _frame: Any = None
    _script: str | None = None
    _react: Callable[[go.FigureWidget], None] | None = None

    def carry(
        self, frame: Any, *, script: str | None = None, react: Callable[[go.FigureWidget], None] | None = None
    ) -> Picture:
        """Attach the table that is drawn, the script for HTML, and the function that wires a widget."""
        self._frame, self._script, self._react = frame, script, react
        return self

    def to_frame(self) -> Any:
        """What is drawn, as a pandas table."""
        if self._frame is None:
            raise DfaError("This figure was not made by dfa_lens.plots, or was copied: it carries no table.")
        return self._frame.copy()

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        """As plotly's, with the script for clicks."""
        return super().to_html(*args, **self._with_script(kwargs))

    def write_html(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """As plotly's, with the script for clicks; a :class:`~dfa_lens.errors.FileError` if it can't be written."""
        with writing(file):
            super().write_html(file, *args, **self._with_script(kwargs))

    def to_image(self, *args: Any, **kwargs: Any) -> bytes:
        """As plotly's (kaleido and a Chromium are needed), without sliders and buttons."""
        return self._still().to_image(*args, **kwargs)

    def write_image(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """As plotly's (kaleido and a Chromium are needed), without sliders and buttons; a FileError as well."""
        with writing(file):
            self._still().write_image(file, *args, **kwargs)

    def _still(self) -> go.Figure:
        still = go.Figure(self)
        if still.layout.sliders or still.layout.updatemenus or self._script:
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

    def _with_script(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._script is None:
            return kwargs
        given = kwargs.get("post_script") or []
        return kwargs | {"post_script": [*([given] if isinstance(given, str) else given), self._script]}
