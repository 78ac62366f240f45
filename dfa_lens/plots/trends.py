"""Figures of numbers against numbers: recovery, training, sizes, scores against scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.scores import NodeScores
from dfa_lens.data.statistics import correlation
from dfa_lens.errors import DfaError
from dfa_lens.experiments.table import GOLD, recovery
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.masks import mask_of
from dfa_lens.plots.matrices import require, summary
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style


def recovery_bars(
    table: Any,
    *,
    value: str = "recovery",
    by: str = "task",
    group: str = "setting",
    leave_out: Sequence[str] = ("gold",),
    parity: float | None = 1.0,
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 420,
) -> Picture:
    """Recovery, CPR(transferred) / CPR(gold), by task and setting.

    A bar is the mean of its rows, of recovery the ratio of means (:func:`dfa_lens.experiments.table.recovery`) where
    gold's CPRs are in the table. Where there are several rows (seeds) the whisker spans their standard deviation and
    every row is a dot, for a mean of few numbers hides them; a single row has no whisker. Tasks of several families
    have bars of their own. A task on which gold itself is weak has a star.

    Parameters
    ----------
    table:
        A tidy table, as :meth:`dfa_lens.experiments.table.Results.table` gives it.
    value:
        The column shown.
    by, group:
        The columns that make the groups of bars and the bars within each.
    leave_out:
        Values of ``group`` that are not drawn; gold recovers itself.
    parity:
        Where a dashed line is drawn; 1: as good as attribution run on the target. None: no line.

    Raises
    ------
    DfaError
        If the table is empty, lacks a column, or nothing is left to draw.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import pandas as pd
    >>> table = pd.DataFrame({"task": ["ioi", "mcqa"], "setting": ["zero-shot"] * 2, "recovery": [0.9, 1.0]})
    >>> type(dfa.plots.recovery_bars(table)).__name__
    'Picture'
    """
    require(table, (value, by, group))
    shown = table[~table[group].isin(list(leave_out))]
    if shown.empty:
        raise DfaError(f"Nothing is left to draw without {', '.join(map(repr, leave_out))}.")
    figure = Picture()
    groups = list(dict.fromkeys(shown[group]))
    families = ["family"] if by == "task" and "family" in shown and shown["family"].nunique() > 1 else []
    means = summary(shown, [group, *families, by], value)
    weak: set[str] = set()
    if value == "recovery" and {"cpr", "task", "setting"} <= set(table.columns) and (table["setting"] == GOLD).any():
        ratios = recovery(table, [group, *families, by]).reset_index()
        means = means.drop(columns="mean").merge(ratios, on=[group, *families, by], how="left")
        means = means.rename(columns={"recovery": "mean"})
    if families:
        means, shown = (each.assign(**{by: each["family"] + ": " + each[by]}) for each in (means, shown))
    if "weak_gold" in means:
        weak = set(means.loc[means["weak_gold"] > 0, by])
    labels = list(dict.fromkeys(shown[by]))
    ticks = {label: styling.text(label) + (" *" if label in weak else "") for label in labels}
    colors = styling.line_colors(table[group])  # also of what is left out, so that the others keep theirs
    for i, name in enumerate(groups):
        part = means[means[group] == name].set_index(by).reindex(labels)
        color = colors[name]
        figure.add_trace(
            go.Bar(
                x=[ticks[label] for label in labels],
                y=part["mean"],
                error_y={"array": part["std"], "color": "#888888", "thickness": 1, "width": 3}
                if (part["count"] > 1).any()
                else None,
                name=styling.text(name),
                marker={"color": color},
                offsetgroup=str(i),
                customdata=part["count"],
                hovertemplate=f"<b>%{{x}}</b>, {styling.text(name)}<br>{styling.text(value)} %{{y:.3f}} "
                "(mean of %{customdata})<extra></extra>",
            )
        )
        several = shown[shown[group] == name]
        if (part["count"] > 1).any():
            figure.add_trace(
                go.Box(
                    x=[ticks[label] for label in several[by]],
                    y=several[value],
                    boxpoints="all",
                    pointpos=0,
                    jitter=0.4,
                    fillcolor="rgba(0,0,0,0)",
                    line={"color": "rgba(0,0,0,0)"},
                    marker={"color": "#888888", "size": 4, "opacity": 0.7},
                    hoverinfo="skip",
                    showlegend=False,
                    offsetgroup=str(i),
                    name=f"{styling.text(name)} rows",
                )
            )
    if parity is not None:
        figure.add_hline(y=parity, line={"color": "#888888", "dash": "dash", "width": 1})
    styling.layout(figure, title, width=width, height=height, style=style)
    figure.update_layout(
        barmode="group",
        boxmode="group",
        bargap=0.25,
        xaxis={"showgrid": False, "automargin": True},
        yaxis={"title": {"text": styling.text(value) + " (* gold's CPR below 0.5)" * bool(weak)}, **styling.AXIS},
        legend=styling.LEGEND_ABOVE,
    )
    steep = [(700, {"xaxis.tickangle": 0, "height": height}), (0, {"xaxis.tickangle": -90, "height": height + 180})]
    return figure.carry(means, fit=None if styling.on_paper(style) else picture.fit(steep))


def training_history(
    alignments: Alignment | Mapping[str, Alignment],
    *,
    smooth: int = 1,
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 400,
) -> Picture:
    """What happened in training: the KL to the clean run, and the mean of the mask, by step.

    Parameters
    ----------
    alignments:
        One, or label → alignment.
    smooth:
        Show the running mean over so many steps; 1 shows what was recorded.

    Raises
    ------
    DfaError
        If an alignment has no history (it was not trained), or ``smooth`` is below 1.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = {"ioi": dfa.tasks.load("ioi", model.tokenizer, n=4)}
    >>> scores = {"ioi": dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))}
    >>> type(dfa.plots.training_history(dfa.fit(model, scores, pairs, steps=2))).__name__
    'Picture'
    """
    if smooth < 1:
        raise DfaError(f"smooth must be at least 1, not {smooth}.")
    named = {"": alignments} if isinstance(alignments, Alignment) else dict(alignments)
    if not named:
        raise DfaError("There are no alignments to draw.")
    figure = Picture()
    parts = []
    colors = styling.line_colors(named)
    for label, alignment in named.items():
        if not alignment.history:
            raise DfaError(f"Alignment {label!r} has no history: it was not trained.")
        history = pd.DataFrame(alignment.history)
        parts.append(history.assign(alignment=label))
        color = colors[label]
        for column, axis, words in (("divergence", "", "KL"), ("mask_mean", "2", "mean mask")):
            figure.add_trace(
                go.Scatter(
                    x=history["step"],
                    y=history[column].rolling(smooth, min_periods=1).mean(),
                    xaxis=f"x{axis}",
                    yaxis=f"y{axis}",
                    mode="lines",
                    line={"color": color, "width": 1.8},
                    name=styling.text(label) or words,
                    legendgroup=label,
                    showlegend=bool(label) and column == "divergence",
                    hovertemplate=f"{styling.text(label)}<br>step %{{x}}<br>{words} %{{y:.4g}}<extra></extra>",
                )
            )
    styling.layout(figure, title, width=width, height=height, style=style)
    step = {"title": {"text": "step"}, **styling.AXIS}
    figure.update_layout(
        xaxis={"domain": [0, 0.46], "anchor": "y", **step},
        xaxis2={"domain": [0.56, 1], "anchor": "y2", **step},
        yaxis={"title": {"text": "KL(P_clean ‖ P_masked)"}, "rangemode": "tozero", **styling.AXIS},
        yaxis2={"title": {"text": "mean of the mask"}, "range": [0, 1], "anchor": "x2", **styling.AXIS},
        legend=styling.LEGEND_ABOVE,
    )
    beside = {"xaxis.domain": [0, 0.46], "xaxis2.domain": [0.56, 1], "yaxis.domain": [0, 1], "yaxis2.domain": [0, 1]}
    below = {"xaxis.domain": [0, 1], "xaxis2.domain": [0, 1], "yaxis.domain": [0.6, 1], "yaxis2.domain": [0, 0.4]}
    arrangements = [(700, beside | {"height": height}), (0, below | {"height": 2 * height - 140})]
    fit = None if styling.on_paper(style) else picture.fit(arrangements)
    return figure.carry(pd.concat(parts, ignore_index=True), fit=fit)


def size_sensitivity(
    table: Any,
    *,
    x: str = "examples",
    value: str = "cpr",
    group: str = "setting",
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 400,
) -> Picture:
    """How a result depends on a size: training pairs, steps, integration steps, nodes, …

    A line per setting through the means at each size; the band spans the standard deviation of several rows (seeds,
    tasks). The horizontal axis is logarithmic where the sizes span more than a factor of ten.

    Parameters
    ----------
    table:
        A tidy table with a row per run.
    x, value, group:
        Its columns: the size, what is shown, and what makes the lines.

    Raises
    ------
    DfaError
        If the table is empty, lacks a column, or has one size only.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import pandas as pd
    >>> table = pd.DataFrame({"examples": [16, 32], "setting": ["zero-shot"] * 2, "cpr": [0.6, 0.7]})
    >>> type(dfa.plots.size_sensitivity(table)).__name__
    'Picture'
    """
    require(table, (x, value, group))
    if table[x].nunique() < 2:
        raise DfaError(f"Column {x!r} has only one size: there is no sensitivity to show.")
    totals = summary(table, [group, x], value)
    figure = Picture()
    for name, color in styling.line_colors(table[group]).items():
        part = totals[totals[group] == name].sort_values(x)
        spread = part["std"].fillna(0).to_numpy()
        sizes, means = part[x].to_numpy(), part["mean"].to_numpy()
        if spread.any():
            figure.add_trace(
                go.Scatter(
                    x=np.concatenate([sizes, sizes[::-1]]),
                    y=np.concatenate([means + spread, (means - spread)[::-1]]),
                    fill="toself",
                    fillcolor=styling.rgba(color, 0.15),
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=str(name),
                    name=f"{styling.text(name)} spread",
                )
            )
        figure.add_trace(
            go.Scatter(
                x=sizes,
                y=means,
                customdata=part["count"],
                mode="lines+markers",
                line={"color": color, "width": 2},
                legendgroup=str(name),
                name=styling.text(name),
                hovertemplate=f"<b>{styling.text(name)}</b><br>{styling.text(x)} %{{x}}<br>"
                f"{styling.text(value)} %{{y:.3f}} (mean of %{{customdata}})<extra></extra>",
            )
        )
    styling.layout(figure, title, width=width, height=height, style=style)
    wide = table[x].min() > 0 and table[x].max() > 10 * table[x].min()
    figure.update_layout(
        xaxis={"title": {"text": styling.text(x)}, "type": "log" if wide else "linear", **styling.AXIS},
        yaxis={"title": {"text": styling.text(value)}, **styling.AXIS},
        legend=styling.LEGEND_ABOVE,
    )
    return figure.carry(totals, fit=None if styling.on_paper(style) else picture.fit())


def score_scatter(
    first: NodeScores,
    second: NodeScores,
    *,
    first_name: str | None = None,
    second_name: str | None = None,
    title: str | None = None,
    style: Style = "screen",
    width: int | None = None,
    height: int = 480,
) -> Picture:
    """One score against another, a dot per node, with Pearson's r, Spearman's ρ and the part of equal signs.

    Transferred against gold; or the source against the target, after the source has been carried over by depth alone:
    ``dfa.controls.depth_mean(source.nodes, target.nodes).transfer(source)``.

    Parameters
    ----------
    first, second:
        Scores of the same nodes: horizontal and vertical.
    first_name, second_name:
        What the axes are called; default: what the scores say of themselves (the method; of transferred scores that
        they are mask logits).

    Raises
    ------
    ScoreError
        If the node sets differ, or one of the scores is constant.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(6, 8)
    >>> first, second = (dfa.controls.random_scores(nodes, seed=seed) for seed in (0, 1))
    >>> len(dfa.plots.score_scatter(first, second).to_frame())
    54
    """
    arguments.expect(1, "first", first, NodeScores)
    arguments.expect(2, "second", second, NodeScores)
    agreement = correlation(first, second)
    first_name = first_name or _called(first, "first scores")
    second_name = second_name or _called(second, "second scores")
    figure = Picture()
    table = pd.DataFrame(
        {
            "node": list(first.nodes.names),
            "kind": [node.kind for node in first.nodes],
            "layer": [node.layer for node in first.nodes],
            first_name: first.values.numpy(),
            second_name if second_name != first_name else f"{second_name} (2)": second.values.numpy(),
        }
    )
    symbols = ("circle", "square", "diamond", "cross", "x")
    for i, (kind, part) in enumerate(table.groupby("kind", sort=False)):
        figure.add_trace(
            go.Scatter(
                x=part.iloc[:, 3],
                y=part.iloc[:, 4],
                mode="markers",
                text=[styling.text(node) for node in part["node"]],
                marker={
                    "symbol": symbols[i % len(symbols)],
                    "size": 8,
                    "color": part["layer"],
                    "coloraxis": "coloraxis",
                    "line": {"color": styling.INK, "width": 0.5},
                },
                name=styling.text(kind),
                hovertemplate="<b>%{text}</b><br>%{x:.4g}, %{y:.4g}<extra></extra>",
            )
        )
    styling.layout(figure, title, width=width, height=height, style=style)
    figure.add_annotation(
        text=f"r {agreement.pearson:.2f}, ρ {agreement.spearman:.2f}, equal signs {agreement.sign_agreement:.0%}",
        xref="paper",
        yref="paper",
        x=0,
        y=1,
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
    )
    figure.update_layout(
        xaxis={"title": {"text": styling.text(first_name)}, **styling.AXIS},
        yaxis={"title": {"text": styling.text(second_name)}, **styling.AXIS},
        coloraxis={"colorscale": "Viridis", "colorbar": {"title": {"text": "layer"}, "thickness": 12, "len": 0.7}},
        legend=styling.LEGEND_ABOVE,
    )
    return figure.carry(table, fit=None if styling.on_paper(style) else picture.fit(captions=20))


def _called(scores: NodeScores, otherwise: str) -> str:
    """What scores say of themselves, for an axis."""
    method = str(scores.meta.get("method", ""))
    if method == "transfer":
        return "transferred score" + " (mask logit)" * (mask_of(scores) is not None)
    model = f" on {scores.meta['model']}" if scores.meta.get("model") else ""
    return f"{method} score{model}" if method else otherwise
