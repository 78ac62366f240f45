"""The tables and the figure of docs/leaderboard.md, from docs/results/leaderboard*.csv: python tools/leaderboard.py.

Building the documentation does it, too. `dfa-lens bench` makes the CSVs: of the models that were trained, and of those
with planted circuits.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.sax.saxutils import escape

import pandas as pd

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURE = DOCS / "results/leaderboard.md", DOCS / "images/leaderboard.svg"
CELL = ["model", "task", "seed"]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 70, 190, 20, 50


def rows() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of models that were trained, and of those with planted circuits."""
    table = pd.concat([pd.read_csv(path) for path in sorted((DOCS / "results").glob("leaderboard*.csv"))])
    planted = table["model"].str.startswith("planted-")
    return table[~planted], table[planted]


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over cells, best first, with the difference to ``exact`` on the same cells."""
    ran = table[table["cpr"].notna()]
    exact = ran[ran["contender"] == "exact"].set_index(CELL)
    rows = ran.merge(exact[["cpr", "cmd_absolute"]].add_suffix("_exact"), left_on=CELL, right_index=True)
    rows["above"] = rows["cpr"] - rows["cpr_exact"]
    rows["above_size"] = rows["cmd_absolute"] - rows["cmd_absolute_exact"]
    rows["passes"] = rows["forward"] + rows["backward"]
    grouped = rows.groupby("contender", sort=False)
    found = grouped.mean(numeric_only=True).drop(columns="seed")
    found["cells"] = grouped.size()
    return found.sort_values("above", ascending=False)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def known_circuits(planted: pd.DataFrame) -> str:
    """AUROC and CPR on models with planted circuits, by pair."""
    planted = planted[planted["cpr"].notna()]
    pair = planted["model"].str.removeprefix("planted-").str.rsplit("-", n=1).str[0]
    wide = planted.pivot_table(index="contender", columns=pair, values="auroc", sort=False)
    every = planted.groupby("contender")[["auroc", "cpr", "cmd_absolute"]].mean()
    cells = planted.groupby("contender").size()
    order = every.sort_values(["auroc", "cpr"], ascending=False, kind="stable").index
    lines = [
        [
            f"`{name}`",
            *("" if pd.isna(value) else f"{value:.2f}" for value in wide.loc[name]),
            *(f"{value:.3f}" for value in every.loc[name]),
            str(cells[name]),
        ]
        for name in order
    ]
    return markdown(["contender", *wide.columns, "AUROC", "CPR", "CMD by size", "cells"], lines)


def page(table: pd.DataFrame, planted: pd.DataFrame) -> str:
    """All tables."""
    found = means(table)
    columns = {
        "cells": ("cells", "{:.0f}"),
        "CPR": ("cpr", "{:.3f}"),
        "less exact": ("above", "{:+.3f}"),
        "CMD": ("cmd", "{:.3f}"),
        "CPR by size": ("cpr_absolute", "{:.3f}"),
        "CMD by size": ("cmd_absolute", "{:.3f}"),
        "CMD less exact": ("above_size", "{:+.3f}"),
        "Pearson": ("pearson", "{:.2f}"),
        "of MLPs": ("pearson_mlp", "{:.2f}"),
        "Spearman": ("spearman", "{:.2f}"),
        "passes": ("passes", "{:.0f}"),
        "MB": ("megabytes", "{:.0f}"),
    }
    rows = [[f"`{name}`", *(form.format(row[key]) for key, form in columns.values())] for name, row in found.iterrows()]
    parts = [
        "# Leaderboard: all tables\n",
        "`dfa-lens bench`. Means over cells (a model and a task), the best first. Contenders of fewer cells were\n"
        'not run on the others: compare what stands under "less exact", the difference to `exact` on the same cells.\n',
        markdown(["contender", *columns], rows),
    ]
    for value, title in (("cpr", "CPR, ranked by sign"), ("cmd_absolute", "CMD, ranked by size")):
        wide = table.pivot_table(index=["model", "task"], columns="contender", values=value, sort=False)
        wide = wide[[name for name in found.index if name in wide]]
        cells = [
            [f"`{model}`", task, *("" if pd.isna(v) else f"{v:.3f}" for v in row)]
            for (model, task), row in zip(wide.index, wide.values, strict=True)
        ]
        parts += [f"## {title}, by cell\n", markdown(["model", "task", *wide.columns], cells)]
    refused = table[table["cpr"].isna()] if "refused" in table else table[:0]
    for name, part in refused.groupby("contender"):
        parts.append(f"`{name}` was refused on {len(part)} cells: {part['refused'].iloc[0]}\n")
    if len(planted):
        parts += ["## AUROC on planted circuits, by pair\n", known_circuits(planted)]
    return "\n".join(parts)


def svg(table: pd.DataFrame) -> str:
    """CPR against passes, less the CPR of ``exact``; passes on a logarithmic axis."""
    found = means(table)
    found = found[found["passes"] > 0]
    low, high = min(found["above"].min(), 0), max(found["above"].max(), 0)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    most = found["passes"].max() * 1.2

    def x(passes: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(passes / 2) / math.log(most / 2)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">'
    ]
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for passes in (3, 10, 30, 100, 300):
        if passes < most:
            parts.append(f'<path d="M{x(passes):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e5e5e5"/>')
            parts.append(
                f'<text x="{x(passes):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" fill="#444">{passes}</text>'
            )
    step = next(each for each in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / each <= 8)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        parts.append(
            f'<path d="M{LEFT} {y(i * step):.1f}H{WIDTH - RIGHT}" stroke="{"#888" if i == 0 else "#e5e5e5"}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(i * step) + 4:.1f}" text-anchor="end" fill="#444">{i * step:+.2f}</text>'
        )
    taken = -1e9
    for name, row in found.sort_values("above", ascending=False).iterrows():
        at_x, at_y = x(row["passes"]), y(row["above"])
        label = max(at_y, taken + 14)  # labels in a column of their own, none over another
        taken = label
        parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="#1f6f8b"/>')
        parts.append(
            f'<path d="M{at_x + 5:.1f} {at_y:.1f}L{WIDTH - RIGHT + 4} {label:.1f}" stroke="#bbb" stroke-width=".7"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{label + 4:.1f}" fill="#222">{escape(str(name))}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">passes for each example (logarithmic)</text>'
    )
    parts.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">CPR less that of exact</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def write() -> None:
    """Write both, if they are others than those that are there."""
    trained, planted = rows()
    for path, text in ((PAGE, page(trained, planted)), (FIGURE, svg(trained))):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
