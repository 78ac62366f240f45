"""What a report says before it shows anything: findings in words, one figure, and the table of CPR by task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

import numpy as np
import pandas as pd

from dfa_lens.data.curve import FaithfulnessCurve, cpr_difference
from dfa_lens.data.statistics import StatisticsWarning, holm
from dfa_lens.errors import FaithfulnessError
from dfa_lens.experiments.table import GOLD, WEAK_GOLD, Results, over, recovery
from dfa_lens.experiments.table import summary as wide_table
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.trends import recovery_bars

SIGNIFICANT = 0.05
"""Marks are set where p, corrected for all cells of the table, is below this."""
ABOVE, UNLIKE = "▲", "†"
"""The marks: above every control; not the same as gold."""
FAITHFUL = 0.9
"""A report presets circuits to the smallest with this faithfulness."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what is shown, and the value that it is sorted by."""

    text: str
    value: str
    interval: str = ""
    marks: str = ""
    link: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table; means are shown in bold."""

    cells: list[Cell]
    mean: bool = False


@dataclass(frozen=True)
class Summary:
    """Findings in words, the figure of recovery, and the table of CPR."""

    findings: list[str] = field(default_factory=list)
    figure: Picture | None = None
    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def summed(results: Results, table: pd.DataFrame) -> Summary:
    """What the results say, all tasks together."""
    marks = _marks(results)
    transferred = table[table["setting"] != GOLD]
    title = "Recovery: CPR of the transferred circuit / CPR of gold"
    drawn = not transferred.empty and (table["setting"] == GOLD).any()
    figure = recovery_bars(table, title=title, height=380) if drawn else None
    columns, rows = _table(results, table, marks)
    return Summary(_findings(results, table, marks), figure, columns, rows)


def _findings(results: Results, table: pd.DataFrame, marks: Mapping[tuple[str, str, str], str]) -> list[str]:
    """The result in a few sentences."""
    controls = set(table.loc[table["control"].fillna("") != "", "setting"]).union(*(r.controls for r in results.tasks))
    ratios = recovery(table) if (table["setting"] == GOLD).any() else pd.DataFrame({"recovery": []})
    means = table.groupby("setting", sort=False)["cpr"].mean()
    found = []
    for setting in means.index:
        if setting == GOLD or setting in controls:
            continue
        words = f"{setting}: CPR {means[setting]:.3f}"
        if setting in ratios.index and np.isfinite(ratios["recovery"][setting]):
            words += f", {ratios['recovery'][setting]:.0%} of gold's {ratios['gold'][setting]:.3f}"
        tasks = [result for result in results.tasks if setting in result.curves and result.controls]
        if tasks:
            n = sum(ABOVE in marks.get((result.family, result.task, setting), "") for result in tasks)
            words += f"; above every control ({ABOVE}) on {n} of {len(tasks)} tasks"
        found.append(words + _sizes(results, setting) + ".")
    best = means[[name for name in means.index if name in controls]]
    if len(best):
        found.append(f"The best control, {best.idxmax()}, has a CPR of {best.max():.3f}.")
    gold = table[table["setting"] == GOLD]
    if (gold["cpr"] < WEAK_GOLD).any():
        weak = [f"{one.task} ({one.family})" for one in gold[gold["cpr"] < WEAK_GOLD].itertuples()]
        found.append(f"Gold itself is weak (CPR below 0.5), so that recovery says little, on {', '.join(weak[:8])}.")
    return [*found, f"All means are over {over(table)}."]


def _sizes(results: Results, setting: str) -> str:
    """How large the faithful circuits are, against gold's."""
    parts: dict[str, list[float]] = {setting: [], GOLD: []}
    for result in results.tasks:
        for name, sizes in parts.items():
            size = smallest(result.curves.get(name))
            if size is not None:
                sizes.append(size[0] / result.curves[name].n_nodes)
    ours, theirs = parts[setting], parts[GOLD]
    if not ours:
        return ""
    against = f" (gold's {np.median(theirs):.0%})" if theirs else ""
    return f"; the median circuit with f ≥ {FAITHFUL:g} keeps {np.median(ours):.0%} of the nodes{against}"


def smallest(curve: FaithfulnessCurve | None) -> tuple[int, str] | None:
    """The size of the smallest circuit that is faithful, and its interval in words; None where there is none."""
    if curve is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StatisticsWarning)  # of one example there is no interval, and none is shown
            k, (low, high) = curve.smallest_size(FAITHFUL)
    except FaithfulnessError:
        return None
    return k, f"[{low:.0f}, {high:.0f}]" if np.isfinite(low) else ""


def _table(
    results: Results, table: pd.DataFrame, marks: Mapping[tuple[str, str, str], str]
) -> tuple[list[str], list[Row]]:
    """CPR by task and setting, with its interval and marks where a curve was measured (means and floors have none)."""
    wide = wide_table(table)
    one_each = table.drop_duplicates(["family", "task", "setting"], keep=False)  # of several seeds there is a mean
    intervals = one_each.set_index(["family", "task", "setting"])[["cpr_low", "cpr_high"]]
    linked = {(result.family, result.task) for result in results.tasks}

    def cell(where: tuple[str, str, str], cpr: float) -> Cell:
        if not np.isfinite(cpr):
            return Cell("", "")
        low, high = intervals.loc[where] if where in intervals.index else (np.nan, np.nan)
        interval = f"[{low:.2f}, {high:.2f}]" if np.isfinite(low) and np.isfinite(high) else ""
        return Cell(f"{cpr:.3f}", f"{cpr:.6g}", interval, marks.get(where, ""))

    rows = []
    for (family, task), row in wide.iterrows():
        link = f"#{link_of(family=family, task=task)}" if (family, task) in linked else ""
        cells = [Cell(family, family), Cell(task, task, link=link)]
        rows.append(Row([*cells, *(cell((family, task, name), row[name]) for name in wide.columns)], task == "mean"))
    return ["family", "task", *map(str, wide.columns)], rows


def link_of(**parts: str) -> str:
    """What an address says of a task, as a browser's URLSearchParams writes it."""
    return urlencode(parts)


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
        if GOLD not in result.curves or len(result.curves[GOLD].clean_values) < 2:
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
