"""The DFA paper's tables and figures from a study, the published numbers beside ours: as files, and as one page.

Figure 1 of the paper draws the method and shows no number. Figures 2 and 5 are faithfulness curves
(:func:`paper_curves`), figure 3 recovery by pair (:func:`paper_recovery`), figure 4 transfer from task to task
(:func:`paper_matrices`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from dfa_lens.data.curve import FaithfulnessCurve, area
from dfa_lens.data.files import writable, write_atomically
from dfa_lens.errors import DfaError, FaithfulnessError
from dfa_lens.experiments import paper as tables
from dfa_lens.experiments.paper import AVERAGE, METHODS, TASKS, Numbers, pair_label
from dfa_lens.experiments.table import GOLD
from dfa_lens.plots import style as styling
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style

_TEMPLATES = Environment(
    loader=PackageLoader("dfa_lens.plots"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def paper(
    study: Any,
    out: str | Path,
    *,
    published: Any = None,
    recipe: str | None = None,
    attribution: str = "nap-ig-inputs",
    curves: Any = None,
) -> Path:
    """Write the paper's tables and figures of a study: CSV, TeX and HTML for each table, and one page with all.

    Parameters
    ----------
    study, recipe, attribution:
        As for :func:`dfa_lens.experiments.paper.ours`.
    out:
        A folder: ``table-3.csv``, ``table-3.tex``, ``table-3.html``, …, ``figure-3.csv``, ``figure-3.html``, …, and
        ``index.html``, which needs no network.
    published:
        The numbers beside ours, as :mod:`dfa_lens.experiments.published` gives them; default: those of the package.
    curves:
        For figures 2 and 5: the table of curves of :func:`dfa_lens.experiments.progress.curves`, or of several studies
        with a column ``attribution``, as ``study``.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    DfaError
        If it is no table of a study, or none of its pairs, tasks and methods is in a table of the paper.
    FileError
        If the folder can't be written.

    Examples
    --------
    >>> import dfa_lens as dfa, tempfile
    >>> from dfa_lens.experiments.table import frame, row
    >>> common = {"family": "llama3-1b-to-3b", "seed": 0, "task": "ioi"}
    >>> study = frame([row(**common, setting="gold", method="gold", cpr=0.5)])
    >>> page = dfa.plots.paper(study, tempfile.mkdtemp())
    >>> sorted(path.name for path in page.parent.iterdir())[:3]
    ['index.html', 'table-1.csv', 'table-1.html']
    """
    folder = writable(out, folder=True)
    own, theirs = tables.ours(study, recipe=recipe, attribution=attribution), tables.published(published)
    made = tables.tables(own, theirs)
    if not made:
        raise DfaError(
            "Nothing in this study is in a table of the paper: its pairs are named as in "
            f"dfa_lens.experiments.paper.PAIRS, {', '.join(tables.SMALL_TO_LARGE[:2])}, …"
        )
    figures = _figures(own, theirs)
    if curves is not None:
        figures = _curves(tables.chosen(curves, recipe=recipe, attribution=attribution)) | figures
    for known, table in made:
        for kind, text in (
            ("csv", tables.to_csv(table)),
            ("tex", tables.to_tex(table, known)),
            ("html", tables.to_html(table)),
        ):
            write_atomically(folder / f"table-{known.name}.{kind}", text.encode())
    for title, figure in figures.items():
        name = f"figure-{title.split()[1].rstrip('.')}"
        write_atomically(folder / f"{name}.csv", figure.to_frame().to_csv(index=False).encode())
        write_atomically(folder / f"{name}.html", figure.to_html(include_plotlyjs=True).encode())
    page = _TEMPLATES.get_template("paper.html.j2").render(
        font=styling.FONT,
        plotly_js=get_plotlyjs() if figures else "",
        tables=[(known.caption, tables.to_html(table)) for known, table in made],
        figures=[(title, figure.to_html(full_html=False, include_plotlyjs=False)) for title, figure in figures.items()],
    )
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


def _figures(own: Numbers, theirs: Numbers) -> dict[str, Picture]:
    """Those that the study has something to show in."""
    found: dict[str, Picture] = {}
    if any(setting == "zero-shot" for _, _, setting, _ in own.cpr):
        found["Figure 3. Recovery, zero-shot"] = paper_recovery(own, theirs)
    trained = {(method, pair) for method, pair, train, test in own.one_task if train != test}
    for i, method in enumerate(method for method in METHODS if any(method == each for each, _ in trained)):
        letter = "abc"[i]
        found[f"Figure 4{letter}. Transfer from task to task, {METHODS[method]}"] = paper_matrices(own, method)
    return found


def _curves(found: Any) -> dict[str, Picture]:
    """Gold and zero-shot of each attribution method, by pair and by task: means over seeds, and over tasks by pair."""
    shown = found[found["key"].isin([GOLD, "zero-shot"])]
    made: dict[str, Picture] = {}
    for i, (method, own) in enumerate(shown.groupby("attribution", sort=False)):
        title = f"Figure 2{'abc'[i]}. Faithfulness by pair, {METHODS[method]}: means over tasks"
        mean = own.groupby(["family", "key", "fraction"], sort=False)["faithfulness"].mean().reset_index()
        made[title] = _drawn(mean.assign(panel=mean["family"].map(pair_label), setting=mean["key"]), title)
        for j, (pair, part) in enumerate(own.groupby("family", sort=False)):
            title = f"Figure 5{'abc'[i]}{j + 1}. Faithfulness by task, {METHODS[method]}, {pair_label(pair)}"
            mean = part.groupby(["task", "key", "fraction"], sort=False)["faithfulness"].mean().reset_index()
            names = [TASKS.get(task, task) for task in mean["task"]]
            made[title] = _drawn(mean.assign(panel=names, setting=mean["key"]), title)
    return made


def paper_recovery(
    own: Numbers,
    theirs: Numbers | None = None,
    *,
    setting: str = "zero-shot",
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 420,
) -> Picture:
    """CPR over gold's CPR by pair of models and attribution method: the mean over tasks, and its standard deviation.

    A diamond is the published one: the same mean where every task's numbers are known, else the ratio of the two
    published averages.

    Parameters
    ----------
    own, theirs:
        See :class:`~dfa_lens.experiments.paper.Numbers`.
    setting:
        A regime, or "best".

    Raises
    ------
    DfaError
        If there is no task with both gold and the setting.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.experiments.paper import Numbers
    >>> keys = [("nap", "llama3-1b-to-3b", setting, "ioi") for setting in ("gold", "zero-shot")]
    >>> dfa.plots.paper_recovery(Numbers(dict(zip(keys, (0.5, 0.4))))).to_frame()["recovery"].tolist()
    [0.8]
    """
    rows = []
    for method in METHODS:
        for pair in own.pairs:
            ratios = _ratios(own, method, pair, setting)
            if ratios:
                published, how = _published_recovery(theirs, method, pair, setting)
                row = {"method": METHODS[method], "pair": pair_label(pair), "recovery": fmean(ratios)}
                spread = stdev(ratios) if len(ratios) > 1 else math.nan
                rows.append({**row, "std": spread, "tasks": len(ratios), "published": published, "published_is": how})
    if not rows:
        raise DfaError(f"No task has a CPR both of gold and of {setting!r}.")
    frame = pd.DataFrame(rows)
    figure = Picture()
    colors = styling.line_colors(METHODS.values())
    for method, part in frame.groupby("method", sort=False):
        common = {"x": part["pair"], "offsetgroup": method}
        figure.add_trace(
            go.Bar(
                **common,
                y=part["recovery"],
                error_y={"array": part["std"], "thickness": 1, "width": 3},
                name=method,
                marker={"color": colors[method]},
                customdata=part["tasks"],
                hovertemplate="<b>%{x}</b><br>recovery %{y:.3f} (mean of %{customdata} tasks)<extra></extra>",
            )
        )
        if part["published"].notna().any():
            figure.add_trace(
                go.Scatter(
                    **common,
                    y=part["published"],
                    mode="markers",
                    marker={"symbol": "diamond-open", "size": 9, "color": styling.INK},
                    name=f"{method}, published",
                    customdata=part["published_is"],
                    hovertemplate="<b>%{x}</b><br>published %{y:.3f} (%{customdata})<extra></extra>",
                )
            )
    figure.add_hline(y=1, line={"dash": "dash", "width": 1, "color": "#888888"})
    styling.layout(figure, title, width=width, height=height, style=style)
    figure.update_layout(barmode="group", scattermode="group", legend=styling.LEGEND_ABOVE)
    figure.update_xaxes(**styling.AXIS)
    figure.update_yaxes(title="CPR / CPR of gold", rangemode="tozero", **styling.AXIS)
    return figure.carry(frame)


def _ratios(numbers: Numbers, method: str, pair: str, setting: str) -> list[float]:
    found = []
    for task in TASKS:
        gold, carried = (numbers.of(method, pair, each, task) for each in (GOLD, setting))
        if gold and not math.isnan(gold + carried):
            found.append(carried / gold)
    return found


def _published_recovery(theirs: Numbers | None, method: str, pair: str, setting: str) -> tuple[float, str]:
    if theirs is None:
        return math.nan, ""
    ratios = _ratios(theirs, method, pair, setting)
    if ratios:
        return fmean(ratios), f"mean of {len(ratios)} tasks"
    gold, carried = (theirs.of(method, pair, each, AVERAGE) for each in (GOLD, setting))
    return (carried / gold, "ratio of averages") if gold and not math.isnan(gold + carried) else (math.nan, "")


def paper_matrices(
    own: Numbers,
    method: str = "nap-ig-inputs",
    pairs: Sequence[str] | None = None,
    *,
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 400,
) -> Picture:
    """CPR by training and test task, a matrix for each pair of models, all in one scale of colours.

    Parameters
    ----------
    own:
        Its ``one_task``; a study has them of the regimes ``one-task`` and, on the diagonal, ``in-distribution``.
    method:
        Of attribution.
    pairs:
        Default: all that have such numbers.

    Raises
    ------
    DfaError
        If there are none.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.experiments.paper import Numbers
    >>> known = Numbers(one_task={("nap", "llama3-1b-to-3b", "ioi", "mcqa"): 0.29})
    >>> dfa.plots.paper_matrices(known, "nap").to_frame()["cpr"].tolist()
    [0.29]
    """
    found = {at: cpr for at, cpr in own.one_task.items() if at[0] == method and at[2] in TASKS and at[3] in TASKS}
    shown = [pair for pair in (own.pairs if pairs is None else pairs) if any(at[1] == pair for at in found)]
    if not shown:
        raise DfaError(f"No W was trained on one task alone with {method!r}: the study needs the regime 'one-task'.")
    figure = Picture(
        make_subplots(
            cols=len(shown), shared_yaxes=True, subplot_titles=[styling.text(pair_label(pair)) for pair in shown]
        )
    )
    labels = list(TASKS.values())
    for column, pair in enumerate(shown, 1):
        z = [[found.get((method, pair, train, test), math.nan) for test in TASKS] for train in TASKS]
        text = [["" if math.isnan(cpr) else f"{cpr:.2f}" for cpr in row] for row in z]
        trace = go.Heatmap(z=z, x=labels, y=labels, coloraxis="coloraxis", text=text, texttemplate="%{text}")
        trace.hovertemplate = "trained on %{y}, tested on %{x}: %{z:.3f}<extra></extra>"
        figure.add_trace(trace, row=1, col=column)
    styling.layout(figure, title, width=width, height=height, style=style)
    scale = [list(stop) for stop in styling.SEQUENTIAL]
    figure.update_layout(coloraxis={"colorscale": scale, "colorbar": {"title": {"text": "CPR"}, "thickness": 12}})
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_yaxes(title="trained on", col=1)
    figure.update_xaxes(title="tested on")
    rows = [
        {"pair": pair, "trained_on": train, "task": test, "cpr": cpr}
        for (_, pair, train, test), cpr in found.items()
        if pair in shown
    ]
    return figure.carry(pd.DataFrame(rows))


def paper_curves(
    panels: Mapping[str, Mapping[str, FaithfulnessCurve]],
    *,
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int | None = None,
) -> Picture:
    """Faithfulness curves in panels, up to three beside each other: gold and aligned by pair, or by task.

    Parameters
    ----------
    panels:
        Panel → label ("gold", "zero-shot", …) → curve; all of one protocol. CPRs are in the hover and the table.
    height:
        In pixels; default: by the number of rows.

    Raises
    ------
    FaithfulnessError
        If there is no curve, or the curves are of different protocols.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=4)
    >>> curve = dfa.faithfulness_curve(model, pairs, dfa.attribute(model, pairs, method="nap"), sizes=[0, 9, 54])
    >>> dfa.plots.paper_curves({"IOI": {"gold": curve}}).to_frame()["panel"].tolist()
    ['IOI', 'IOI', 'IOI']
    """
    every = [curve for panel in panels.values() for curve in panel.values()]
    if not every:
        raise FaithfulnessError("There are no curves to draw.")
    protocols = {curve.protocol for curve in every}
    if len(protocols) > 1:
        raise FaithfulnessError(f"Curves of different protocols don't compare: {', '.join(sorted(protocols))}.")
    parts = [
        curve.to_frame().assign(panel=name, setting=label, cpr=curve.cpr)
        for name, panel in panels.items()
        for label, curve in panel.items()
    ]
    return _drawn(pd.concat(parts, ignore_index=True), title, style=style, width=width, height=height)


def _drawn(
    found: Any, title: str | None, *, style: Style = "screen", width: int | None = None, height: int | None = None
) -> Picture:
    """A line for each panel and setting of a table with ``panel``, ``setting``, ``fraction``, ``faithfulness``."""
    panels = list(dict.fromkeys(found["panel"]))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    titles = [styling.text(name) for name in panels]
    figure = Picture(make_subplots(rows=rows, cols=columns, shared_yaxes=True, subplot_titles=titles))
    colors = styling.line_colors(dict.fromkeys(found["setting"]))
    lines: list[Any] = []
    for (panel, setting), part in found.groupby(["panel", "setting"], sort=False):
        i, line = panels.index(panel), part.sort_values("fraction")
        cpr = area(line["fraction"].to_numpy(), line["faithfulness"].to_numpy())
        figure.add_trace(
            go.Scatter(
                x=line["fraction"],
                y=line["faithfulness"],
                mode="lines+markers",
                marker={"size": 4},
                line={"color": colors[setting], "width": 2},
                name=styling.text(setting),
                legendgroup=setting,
                showlegend=all(setting != each["setting"].iloc[0] for each in lines),
                hovertemplate=f"<b>{styling.text(setting)}</b> (CPR {cpr:.3f})<br>%{{x:.1%}} kept, "
                "f = %{y:.3f}<extra></extra>",
            ),
            row=i // columns + 1,
            col=i % columns + 1,
        )
        lines.append(line.assign(cpr=cpr))
    styling.layout(figure, title, width=width, height=height or 130 + 260 * rows, style=style)
    figure.update_layout(legend={"orientation": "h", "y": -0.15})
    figure.update_xaxes(tickformat=".0%", **styling.AXIS)
    figure.update_yaxes(**styling.AXIS)
    return figure.carry(pd.concat(lines, ignore_index=True))
