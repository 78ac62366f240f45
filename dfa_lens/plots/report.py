"""One self-contained HTML page with everything that a run found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from dfa_lens.data.curve import FaithfulnessCurve, cpr_difference
from dfa_lens.data.edges import EdgeScores
from dfa_lens.data.files import write_atomically
from dfa_lens.data.statistics import holm
from dfa_lens.errors import DfaError, EdgeError
from dfa_lens.experiments.table import GOLD, WEAK_GOLD, Results, TaskResult, recovery
from dfa_lens.plots.curves import curves
from dfa_lens.plots.edge_graph import circuit_graph
from dfa_lens.plots.edge_heatmap import edge_heatmap
from dfa_lens.plots.heatmaps import aligned_heatmap, scores_heatmap
from dfa_lens.plots.matrices import alignment_explorer
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import FONT
from dfa_lens.plots.trends import recovery_bars, score_scatter, training_history

SIGNIFICANT = 0.05
"""Marks are set where p, corrected for all cells of the table, is below this."""
ABOVE, UNLIKE = "▲", "†"
"""The marks: above every control; not the same as gold."""

_TEMPLATES = Environment(
    loader=PackageLoader("dfa_lens.plots"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def report(
    results: Results | EdgeScores | Mapping[str, EdgeScores],
    path: str | Path,
    *,
    edges: Mapping[str, EdgeScores] | None = None,
) -> Path:
    """Write one HTML page: words, the table, and for every family and task the curves and the aligned heatmaps.

    Of edges there is the graph of the circuit and the heatmap of blocks, in a part of their own. Plotly is embedded
    once; the page needs no network, is light or dark as the reader's system is, and prints. All labels are escaped.

    Parameters
    ----------
    results:
        As :func:`dfa_lens.experiments.demo.run` returns them; or edge scores alone, also several by name.
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
    if isinstance(results, EdgeScores):
        shown[str(results.meta.get("model") or "edges")] = results
    elif not isinstance(results, Results):
        shown |= results
    if not isinstance(results, Results):
        results = Results()
    if not results.tasks and not shown:
        raise DfaError("There are no results to report.")
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / "index.html"
    table = results.table()
    known = {**_summary(results, table), **_table(results, table)} if results.tasks else {}
    page = _TEMPLATES.get_template("report.html.j2").render(
        font=FONT,
        plotly_js=get_plotlyjs(),
        provenance=results.provenance,
        significant=SIGNIFICANT,
        above=ABOVE,
        unlike=UNLIKE,
        **known,
        families=[_family(results, table, name) for name in dict.fromkeys(r.family for r in results.tasks)],
        edges=[_edges(name, scores) for name, scores in shown.items()],
    )
    write_atomically(path, page.encode())
    return path


def _summary(results: Results, table: Any) -> dict[str, Any]:
    """What the first paragraph says: mean CPR and recovery by setting, and the lowest recovery of a transfer."""
    transferred, gold = table[table["setting"] != GOLD], table[table["setting"] == GOLD]
    own = {(r.family, r.task, setting) for r in results.tasks for setting in r.curves if setting not in r.controls}
    cells = transferred[["family", "task", "setting"]].itertuples(index=False, name=None)
    lowest = transferred.loc[[cell in own for cell in cells]].sort_values("recovery").head(1)
    return {
        "n_tasks": len(results.tasks),
        "means": table.groupby("setting", sort=False)["cpr"].mean().to_dict(),
        "recovered": recovery(table)["recovery"].dropna().to_dict(),
        "weak": [f"{one.task} in {one.family}" for one in gold[gold["cpr"] < WEAK_GOLD].itertuples()],
        "weakest": next(lowest.itertuples(), None),
    }


def _table(results: Results, table: Any) -> dict[str, Any]:
    """CPR by task and setting, with its interval and marks where a curve was measured (means and floors have none)."""
    intervals = table.set_index(["family", "task", "setting"])[["cpr_low", "cpr_high"]]
    marks = _marks(results)
    wide = results.summary()

    def cell(where: tuple[str, str, str], cpr: float) -> dict[str, Any]:
        known = where in intervals.index
        return {"cpr": cpr, "interval": tuple(intervals.loc[where]) if known else None, "marks": marks.get(where, "")}

    return {
        "settings": list(wide.columns),
        "rows": [
            {"family": family, "task": task, "cells": [cell((family, task, name), row[name]) for name in wide.columns]}
            for (family, task), row in wide.iterrows()
        ],
    }


@dataclass(frozen=True)
class _Question:
    """Whether one curve differs from every one of some others, or is above them all."""

    curve: FaithfulnessCurve
    others: list[FaithfulnessCurve]
    above: bool

    def p(self, resamples: int) -> float:
        """All must hold: the largest p counts."""
        gaps = [cpr_difference(self.curve, other, resamples=resamples) for other in self.others]
        return max(1.0 if self.above and gap.value <= 0 else gap.p for gap in gaps)


def _marks(results: Results) -> Mapping[tuple[str, str, str], str]:
    """Where a circuit is above every control, and where it is not the same as gold."""
    questions: dict[tuple[tuple[str, str, str], str], _Question] = {}
    for result in results.tasks:
        if len(result.curves[GOLD].clean_values) < 2:
            continue
        controls = [result.curves[name] for name in result.controls]
        for setting, curve in result.curves.items():
            cell = (result.family, result.task, setting)
            if controls and setting not in result.controls:
                questions[cell, ABOVE] = _Question(curve, controls, above=True)
            if setting != GOLD:
                questions[cell, UNLIKE] = _Question(curve, [result.curves[GOLD]], above=False)
    # p is at least one part of the resamples: with many cells it needs many, or nothing could pass the correction
    resamples = max(2000, round(2 * len(questions) / SIGNIFICANT))
    corrected = holm({key: question.p(resamples) for key, question in questions.items()})
    marks: dict[tuple[str, str, str], str] = {}
    for (cell, mark), p in corrected.items():
        if p < SIGNIFICANT:
            marks[cell] = marks.get(cell, "") + mark
    return marks


def _family(results: Results, table: Any, name: str) -> dict[str, Any]:
    """The section of a family: recovery by task, and what was found for each."""
    own = table[table["family"] == name]
    bars = (
        [] if (own["setting"] == GOLD).all() else [recovery_bars(own, title="recovery: CPR / gold's CPR", height=380)]
    )
    return {
        "name": name,
        "anchor": _anchor(name),
        "recovery": _html(bars),
        "tasks": [_task(result) for result in results.tasks if result.family == name],
    }


def _task(result: TaskResult) -> dict[str, Any]:
    """The section of a task: its figures, and those in a part that is closed at first."""
    figures = [curves(result.curves, title=None)]
    trained = {
        setting: alignment
        for setting, alignment in result.alignments.items()
        if alignment.history and setting not in result.controls
    }
    carried = set(result.curves) - set(result.alignments) - set(result.controls)
    measured = [name for name in result.circuits if name in carried]
    for setting in [*trained, *measured]:
        figures.append(
            aligned_heatmap(
                result.source,
                result.circuits[setting],
                alignment=trained.get(setting),
                curve=result.curves[setting],
                contributors=2,  # 24 of these share the page
                source_name=f"source: {result.source.meta.get('method', 'scores')}",
                target_name=f"target: {setting} transfer",
            )
        )
    figures.append(scores_heatmap(result.gold, title=f"target: {GOLD} ({result.gold.meta.get('method', 'scores')})"))
    closed: list[go.Figure | Picture] = []
    if trained:
        last = list(trained)[-1]
        closed = [
            training_history(trained, smooth=5),
            alignment_explorer(trained[last], button=False, title=f"W, {last}", height=640),
            score_scatter(result.gold, result.circuits[last], first_name=GOLD, second_name=f"{last} transfer"),
        ]
    return {
        "name": result.task,
        "anchor": _anchor(f"{result.family}-{result.task}"),
        "figures": _html(figures),
        "closed": _html(closed),
    }


def _edges(name: str, scores: EdgeScores) -> dict[str, Any]:
    """The section of some edge scores: the circuit as a graph, and the blocks of edges."""
    words = [str(scores.meta[key]) for key in ("method", "model") if scores.meta.get(key)]
    return {
        "name": name,
        "words": ", ".join([*words, f"{len(scores):,} edges"]),
        "anchor": _anchor(f"edges-{name}"),
        "figures": _html([_graph(scores), edge_heatmap(scores)]),
    }


def _graph(scores: EdgeScores) -> Picture:
    """The graph; where none of the best edges lies on a path (a sample of edges), of all of them."""
    try:
        return circuit_graph(scores)
    except EdgeError:
        return circuit_graph(scores, prune=False)


def _anchor(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)


def _html(figures: list[go.Figure | Picture]) -> list[str]:
    config = {"responsive": True, "displaylogo": False}
    return [figure.to_html(include_plotlyjs=False, full_html=False, config=config) for figure in figures]
