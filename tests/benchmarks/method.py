"""The method benchmark: regimes, controls, objectives and alignments on the shipped models, with statistics.

    python tests/benchmarks/method.py --quick              # one seed, few examples: about 5 minutes on 2 cores
    python tests/benchmarks/method.py                      # the table of docs/method.md
    python tests/benchmarks/method.py --sensitivity        # λ, T, steps, learning rate, losses, …; one seed
    python tests/benchmarks/method.py --tables-only        # from the rows on disk

Rows go to ``build`` as they are made, and a second call runs what is missing; in the end they are in
``docs/results/method.csv`` (``sensitivity.csv``), with the tables in the ``.md`` beside it.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import pandas as pd

import dfa_lens as dfa
from dfa_lens.data.statistics import compare, mean_interval
from dfa_lens.experiments import study
from dfa_lens.experiments.study import SETTINGS, Budget, Setting

RESULTS = Path(__file__).parents[2] / "docs" / "results"
CONTROLS = ["uniform-s", "random-s", "scrambled-s", "permuted-w", "random-w", "depth-mean", "regression"]


def varied(name: str, **values: Any) -> dict[str, Setting]:
    """Zero-shot settings in which one field of the recipe is changed."""
    return {
        f"{name} {label}": Setting("zero-shot", "", dfa.Recipe(**{name: value}), f"{name} {label}")
        for label, value in values.items()
    }


SENSITIVITY: dict[str, Setting] = {
    "zero-shot": SETTINGS["zero-shot"],
    "uniform-s": SETTINGS["uniform-s"],
    **varied("sparsity_weight", **{str(x): x for x in (0.1, 1.0, 3.0, 30.0)}),
    **varied("temperature", **{"0.3": 0.3, "3": 3.0}),
    **varied("steps", **{str(x): x for x in (50, 100)}),
    **varied("lr", **{"0.3": 0.3}),
    **varied("scaling", **{x: x for x in ("raw", "rank")}),
    **varied("loss", **{"logit-difference": "logit-difference"}),
}
EXAMPLES = (16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few examples and steps")
    parser.add_argument("--sensitivity", action="store_true", help="one option changed at a time, seed 0")
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=None, help="test tasks; default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    name = "sensitivity" if given.sensitivity else "method"
    budget = study.QUICK if given.quick else study.FULL
    seeds = [0] if given.quick or given.sensitivity else given.seeds
    folder = given.build / (name + ("-quick" if given.quick else ""))
    if not given.tables_only:
        table = run(given.sensitivity, seeds, budget, folder, given.workers, given.device, given.tasks)
    elif given.sensitivity or given.quick:
        table = run(given.sensitivity, seeds, budget, folder, 1, given.device, given.tasks)
    else:
        table = study.read(given.out / "method.csv")
    title = "Sensitivity" if given.sensitivity else "Method benchmark"
    head = (
        f"# {title}: all tables\n\n`python tests/benchmarks/method.py{' --sensitivity' if given.sensitivity else ''}"
        f"{' --tasks ' + ' '.join(given.tasks) if given.tasks else ''}{' --quick' if given.quick else ''}`, seeds "
        f"{', '.join(map(str, seeds))}; dfa_lens {dfa.__version__}.\n"
    )
    text = head + (sensitivity(table) if given.sensitivity else tables(table))
    print(text)
    if not given.quick:
        given.out.mkdir(parents=True, exist_ok=True)
        table.round(5).to_csv(given.out / f"{name}.csv", index=False)
        (given.out / f"{name}.md").write_text(text, encoding="utf-8")
        if not given.sensitivity:
            figures(table, given.out.parent / "images")


def run(
    vary: bool, seeds: list[int], budget: Budget, folder: Path, workers: int, device: str, test_tasks: list[str] | None
) -> pd.DataFrame:
    """The rows, from disk where they are known."""
    options: dict[str, Any] = {
        "seeds": seeds,
        "workers": workers,
        "device": device,
        "test_tasks": test_tasks,
        "progress": True,
    }
    if not vary:
        return study.run(None, SETTINGS, budget=budget, out=folder, **options)
    parts = [study.run(None, SENSITIVITY, budget=budget, out=folder, **options)]
    for n in EXAMPLES:
        fewer = Budget(train=n, test=budget.test, steps=budget.steps, curve_points=budget.curve_points)
        part = study.run(
            None, {f"examples {n}": Setting(method=f"examples {n}")}, budget=fewer, out=folder / str(n), **options
        )
        parts.append(part[part["setting"] != "gold"])
    for points in (8, 16, 64):
        grid = Budget(train=budget.train, test=budget.test, steps=budget.steps, curve_points=points)
        part = study.run(None, {}, budget=grid, out=folder / f"grid-{points}", **options)
        parts.append(part.assign(setting=f"gold, {points} sizes"))
    return pd.concat(parts, ignore_index=True)


def with_interval(values: Any) -> str:
    low, high = mean_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def leaderboard(table: pd.DataFrame) -> pd.DataFrame:
    """Means over tasks, families and seeds, with bootstrap intervals over those."""
    rows = []
    for setting, part in table.groupby("setting", sort=False):
        by_family = part.groupby("family")["cpr"].mean()
        rows.append(
            {
                "setting": setting,
                "CPR": with_interval(part["cpr"]),
                "CMD": with_interval(part["cmd"]),
                "KL": with_interval(part["kl"]),
                "of gold": f"{part['cpr'].mean() / table.loc[table['setting'] == 'gold', 'cpr'].mean():.1%}",
                **{family: f"{value:.3f}" for family, value in by_family.items()},
                "n": len(part),
                "forwards": f"{part['forwards'].mean():.0f}",
            }
        )
    return pd.DataFrame(rows)


def tables(table: pd.DataFrame) -> str:
    """Leaderboard, controls, in-distribution comparisons, transfer matrix, diagnostics."""
    has = set(table["setting"])
    parts = ["\n## Leaderboard\n", markdown(leaderboard(table))]
    zero = [*CONTROLS, "zero-shot, released", "gold"]
    own = [
        "in-distribution, released",
        "target-only",
        "gold",
        "in-distribution, uniform-s",
        "in-distribution, matryoshka",
    ]
    pairs = (("zero-shot", zero), ("in-distribution", own))
    for setting, against in pairs:
        for by, what in (
            (("family", "task", "seed"), "pairs of task, family and seed"),
            (("family", "task"), "seeds averaged"),
        ):
            for value in ("cpr", "cmd", "kl"):
                if value != "cpr" and len(by) == 2:
                    continue
                found = compare(table, setting, [name for name in against if name in has], by=by, value=value)
                parts += [f"\n## {setting} against others, {value.upper()}, {what}\n", markdown(found)]
    others = [name for name in has if name.startswith("zero-shot, ") and name != "zero-shot, released"]
    parts += ["\n## Other alignments and objectives against the default, zero-shot\n"]
    rows = [compare(table, name, ["zero-shot"]) for name in sorted(others)]
    corrected = dfa.statistics.holm({row["setting"][0]: row["p"][0] for row in rows})
    parts.append(markdown(pd.concat(rows).assign(p_holm=[corrected[row["setting"][0]] for row in rows])))
    one = table[table["setting"].isin(["one-task", "in-distribution"])]
    matrix = one.pivot_table(index="trained_on", columns="task", values="cpr", sort=False)
    parts += ["\n## Trained on one task (rows), tested on another (columns): mean CPR\n"]
    parts.append(markdown(matrix.reindex(list(matrix.columns)).reset_index()))
    per = table[
        table["setting"].isin(["gold", "in-distribution", "zero-shot", "uniform-s", "zero-shot, behaviour kernel"])
    ]
    wide = per.pivot_table(index=["family", "task"], columns="setting", values="cpr", sort=False).reset_index()
    parts += ["\n## By task: mean CPR over seeds\n", markdown(wide)]
    columns = ["effective_rank", "shared", "depth", "stability"]
    found = table.dropna(subset=columns).groupby("setting", sort=False)[columns].mean().reset_index()
    parts += ["\n## Diagnostics: means\n", markdown(found)]
    return "\n".join(parts)


def figures(table: pd.DataFrame, folder: Path) -> None:
    """The two figures of docs/source.md."""
    shown = ["zero-shot", "uniform-s", "depth-mean", "permuted-w"]
    some = table[table["setting"].isin(shown)]
    some = some.sort_values("setting", key=lambda names: names.map(shown.index), kind="stable")
    bars = dfa.plots.recovery_bars(some, title="CPR as a part of gold's", style="paper", height=330)
    bars.write_image(folder / "method-recovery.png", scale=2)
    one = table[table["setting"].isin(["one-task", "in-distribution"])]
    order = list(dict.fromkeys(table["task"]))
    one = one.sort_values(["trained_on", "task"], key=lambda names: names.map(order.index), kind="stable")
    matrix = dfa.plots.transfer_matrix(
        one, train="trained_on", test="task", title="CPR", style="paper", height=380, limits=(0, 1)
    )
    matrix.write_image(folder / "method-matrix.png", scale=2)


def sensitivity(table: pd.DataFrame) -> str:
    """Each changed option against the default, and how far the grid moves CPR."""
    gold = table[table["setting"] == "gold"].set_index(["family", "task"])["cpr"]
    moved = []
    for setting, part in table[table["setting"].str.startswith("gold, ")].groupby("setting", sort=False):
        gap = part.set_index(["family", "task"])["cpr"] - gold
        moved.append({"grid": setting, "mean change": gap.mean(), "largest change": gap.abs().max()})
    settings = table[~table["setting"].str.startswith("gold")]
    names = [name for name in settings["setting"].unique() if name != "zero-shot"]
    found = pd.concat([compare(settings, name, ["zero-shot"]) for name in names])
    corrected = dfa.statistics.holm(dict(zip(found["setting"], found["p"], strict=True)))
    found = found.assign(p_holm=[corrected[name] for name in found["setting"]])
    return "\n".join(
        [
            "\n## Means\n",
            markdown(leaderboard(table)),
            "\n## Against the default\n",
            markdown(found),
            "\n## Circuit sizes in the curve of gold, against 33\n",
            markdown(pd.DataFrame(moved)),
        ]
    )


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown, three decimals (p-values four)."""

    def cell(name: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if name in ("p", "p_holm") else f"{value:.3f}"
        return str(value)

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + " --- |" * len(frame.columns)]
    for record in frame.to_dict("records"):
        lines.append("| " + " | ".join(cell(str(name), value) for name, value in record.items()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
