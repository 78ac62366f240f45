"""One self-contained HTML page with everything that a run found."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from dfa_lens.data.edges import EdgeScores
from dfa_lens.data.files import write_atomically
from dfa_lens.errors import DfaError
from dfa_lens.experiments.table import Results
from dfa_lens.plots import arguments
from dfa_lens.plots.picture import CONFIG
from dfa_lens.plots.style import FONT
from dfa_lens.plots.summary import ABOVE, SIGNIFICANT, UNLIKE, Summary, summed
from dfa_lens.plots.views import REACTIONS, packed, parts_of, view_of_edges, view_of_task

_TEMPLATES = Environment(
    loader=PackageLoader("dfa_lens.plots"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def report(
    results: Results | EdgeScores | Mapping[str, EdgeScores] | pd.DataFrame,
    path: str | Path,
    *,
    edges: Mapping[str, EdgeScores] | None = None,
) -> Path:
    """Write one HTML page: what was found in words and one figure, a task to look at, and the table.

    A menu chooses the task: its curves, and source, transferred, gold and the difference of ranks in one figure, with
    the circuit preset to the smallest with f of :data:`FAITHFUL` or more. The address says what is shown
    (``#task=ioi&setting=zero-shot&size=20``) and can be passed on. Tables sort and filter. Of edges there is the graph
    of the circuit and the heatmap of blocks. Everything, plotly included, is in the file, packed; the page needs no
    network, is light or dark as the reader's system is, and prints what is shown. All labels are escaped.

    Parameters
    ----------
    results:
        As :func:`dfa_lens.experiments.demo.run` returns them, or made of one's own
        :class:`~dfa_lens.experiments.table.TaskResult`; the table of a study (without figures of single tasks); or edge
        scores alone, also several by name.
    path:
        The file to write; a folder gets ``index.html``.
    edges:
        Edge scores by name (the task, the model), to be shown beside the results.

    Returns
    -------
    Path
        Of the written file.

    Raises
    ------
    DfaError
        If there are no results and no edges.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import tempfile
    >>> from dfa_lens.experiments import demo
    >>> budget = demo.Budget(train=4, test=4, steps=2, curve_points=3)
    >>> results = demo.run(families=["llama3"], only=["ioi"], budget=budget)
    >>> dfa.plots.report(results, tempfile.mkdtemp()).name
    'index.html'
    """
    shown = dict(edges or {})
    table = results if isinstance(results, pd.DataFrame) else None
    if isinstance(results, EdgeScores):
        shown[str(results.meta.get("model") or "edges")] = results
    elif not isinstance(results, (Results, pd.DataFrame)):
        if not isinstance(results, Mapping):
            arguments.expect(1, "results", results, Results, EdgeScores, Mapping, pd.DataFrame)
        arguments.expect_each("results", results, EdgeScores)
        shown |= results
    if not isinstance(results, Results):
        results = Results()
    if table is None:
        table = results.table()
    if table.empty and not results.tasks and not shown:
        raise DfaError("There are no results to report.")
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / "index.html"
    found = summed(results, table) if not table.empty else Summary()
    views = [*(view_of_task(result) for result in results.tasks), *(view_of_edges(*each) for each in shown.items())]
    page = _TEMPLATES.get_template("report.html.j2").render(
        font=FONT,
        config=json.dumps(CONFIG),
        plotly_js=packed(_by_need(get_plotlyjs())) if views or found.figure is not None else "",
        provenance=results.provenance,
        significant=SIGNIFICANT,
        above=ABOVE,
        unlike=UNLIKE,
        transfers=bool(found.rows or results.tasks),
        findings=found.findings,
        summary=packed(json.dumps({"summary": parts_of(found.figure)})) if found.figure is not None else "",
        columns=found.columns,
        rows=found.rows,
        views=views,
        reactions=REACTIONS,
    )
    write_atomically(path, page.encode())
    return path


#: Where plotly.js takes in its kinds of traces, some fifty, each of which is run by that.
_KINDS = re.compile(r"\b([\w$]+)\.register\(\[((?:[\w$]+\(\),?){20,})\]\)")


def _by_need(plotly: str) -> str:
    """plotly.js with its kinds of traces in ``Plotly.later``, to be taken in when a figure has them (``report.js``).

    To run what defines all kinds takes a third of the time until the page shows its first figure, which has one of
    them. A plotly.js that is written in another way stays as it is, and has them all at once.
    """

    def later(found: re.Match[str]) -> str:
        kinds = ",".join(f"()=>{kind}" for kind in found[2].split(",") if kind)
        return f"{found[1]}.later=[{kinds}]"

    return _KINDS.sub(later, plotly, count=1)
