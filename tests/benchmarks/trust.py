"""Round functional transfer: how far it can be trusted, what it learns from, and what a trained mask gains by it.

    python tests/benchmarks/trust.py                        # the tables of docs/method.md; hours on 2 cores
    python tests/benchmarks/trust.py --parts trust importance --seeds 0
    python tests/benchmarks/trust.py --tables-only          # from the rows on disk

- ``trust``: transfers from few or all families, with and without group effects, of the wrong task's measurements, and
  of what scrambled scores taught; what was said beforehand (distance, spread, a rehearsal, the circuit's KL on eight
  prompts without their labels), and how faithful the circuit is.
- ``importance``: what shuffling a measurement takes, and what one alone, or all but one kind, are worth.
- ``warm``: a mask trained on the target, from one half, transferred scores, one measurement, `nap` or gold.

Scores and measurements are shared with ``functional.py``, whose rows of uniform-s are needed for ``trust``.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from functional import PAIRS, ROOT, TEST, Pair, made_pairs, markdown
from sklearn.metrics import roc_auc_score

import dfa_lens as dfa
from dfa_lens.transfer.measure import GROUP_MEASURES

WARM_STEPS = (1, 5, 10, 20, 40, 160)


@dataclass(frozen=True)
class Way:
    """How a transfer is taught and what it reads."""

    groups: bool = True  #: whether groups are measured
    wrong: bool = False  #: whether the measurements are of another task
    scrambled: bool = False  #: whether the scores that teach are of other nodes of their kind and depth


WAYS = {
    "as it is": Way(),
    "without groups": Way(groups=False),
    "the wrong task's measurements": Way(wrong=True),
    "scrambled teachers": Way(scrambled=True),
    "scrambled teachers, without groups": Way(groups=False, scrambled=True),
}
#: Said before a label of the target is used: column, and whether high (+1) or low (−1) should foretell a failure.
PREDICTORS = {"distance": 1, "spread": 1, "rehearsed": -1, "unlabelled": 1}

Rows = Iterator[tuple[tuple[str, ...], Callable[[], dict[str, Any]]]]


def trust(pair: Pair) -> Rows:
    """All other families teach, in every way; each alone, as it is."""
    for task in pair.tasks:
        others = pair.others(task)
        families = sorted({dfa.tasks.FAMILIES[other] for other in others})
        for teaching in [families, *([family] for family in families)]:
            for name, way in WAYS.items():
                if len(teaching) < len(families) and way != Way():
                    continue
                names = [other for other in others if dfa.tasks.FAMILIES[other] in teaching]
                # the names are bound now, the work is done if the row is missing
                yield (
                    (task, "+".join(teaching), name),
                    lambda task=task, names=names, way=way: trusted(pair, task, names, way),
                )


def trusted(pair: Pair, task: str, names: list[str], way: Way) -> dict[str, float]:
    without = () if way.groups else GROUP_MEASURES
    fitted, rehearsed = taught(pair, task, tuple(names), without, way.scrambled)
    read = pair.measured(pair.target, pair.others(task)[0] if way.wrong else task, without)
    circuit = fitted.transfer(read)
    found: dict[str, float] = {"families": len(set(fitted.meta["families"].values()))}
    if rehearsed is not None:
        said = fitted.trust(read)
        found |= {"distance": said.distance, "spread": said.spread, "unlabelled": unlabelled(pair, task, circuit)}
        low, high = rehearsed.interval(confidence=0.9)
        found |= {"low": low, "high": high, "rehearsed": float(rehearsed.cpr.mean())}
    return found | pair.judged(task, circuit)


@lru_cache(maxsize=len(WAYS))
def taught(
    pair: Pair, task: str, names: tuple[str, ...], without: tuple[str, ...], scrambled: bool
) -> tuple[dfa.FunctionalAlignment, dfa.Rehearsal | None]:
    """What was learned, and its rehearsal if there is more than one family: the same whatever it then reads."""
    fitted = pair.fitted(task, names, without=without, scramble=scrambled)
    if len(set(fitted.meta["families"].values())) < 2:
        return fitted, None
    held_out = {name: pair.source.pairs(name, "test", TEST) for name in names}
    measured = {name: pair.measured(pair.source, name, without) for name in names}
    # signed, as the circuits that are judged
    return fitted, dfa.rehearse(fitted, pair.source.model, measured, held_out, ranking="signed", batch_size=32)


def unlabelled(pair: Pair, task: str, circuit: dfa.NodeScores) -> float:
    """The circuit's KL on eight training prompts of the target, as a part of the empty circuit's: no label is used."""
    sizes = [len(circuit) * i // 4 for i in range(5)]
    given = {"ranking": "signed", "sizes": sizes, "batch_size": 32}
    return dfa.faithfulness_curve(pair.target.model, pair.target.pairs(task)[:8], circuit, **given).relative_kl


def importance(pair: Pair) -> Rows:
    """Of all tasks of a pair at once, with the guard, which adds one measurement to what is read, and without it."""
    for guard in (1.0, 0.0):
        yield ("all", "guard", str(guard)), lambda guard=guard: pair.fitted("", pair.tasks, guard=guard).importance()


def warm(pair: Pair) -> Rows:
    """From each start to each number of steps."""
    starts: dict[str, Callable[[str], dfa.NodeScores | None]] = {
        "one half (cold)": lambda task: None,
        "functional, own scores": lambda task: pair.functional(task, own=True),
        "group-share": pair.settings["group-share alone"],
        "nap": lambda task: pair.target.scores(task, "nap"),
        "gold": pair.target.scores,
    }
    families = dfa.tasks.FAMILIES
    for task in {families[task]: task for task in reversed(pair.tasks)}.values():  # the first of each family
        for name, start in starts.items():
            for steps in WARM_STEPS:

                def row(task: str = task, start: Any = start, steps: int = steps) -> dict[str, Any]:
                    pairs = {task: pair.target.pairs(task)}
                    seed = pair.target.seed
                    mask = dfa.controls.target_only(pair.target.model, pairs, start=start(task), steps=steps, seed=seed)
                    return pair.judged(task, mask)

                yield (task, name, str(steps)), row


PARTS: dict[str, Callable[[Pair], Rows]] = {"trust": trust, "importance": importance, "warm": warm}
COLUMNS = {
    "trust": ["task", "teaching", "way"],
    "importance": ["task", "what", "how"],
    "warm": ["task", "start", "steps"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", nargs="+", default=list(dfa.zoo.pairs("all")))
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "functional")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    given = parser.parse_args()
    os.nice(10)
    warnings.simplefilter("ignore", dfa.IntegrationWarning)
    if not given.tables_only:
        for seed in given.seeds:
            made = made_pairs({name: PAIRS[name] for name in given.pairs}, seed, given.build)
            for part in given.parts:
                for name, pair in made.items():
                    run(part, name, pair, given.build / f"{part}.csv")
    text = [f"# How far functional transfer can be trusted\n\n`python tests/benchmarks/trust.py`; {dfa.__version__}.\n"]
    for part in PARTS:
        path = given.build / f"{part}.csv"
        if path.exists():
            table = pd.read_csv(path).drop_duplicates(["family", "seed", *COLUMNS[part]])
            table.round(5).to_csv(given.out / f"functional-{part}.csv", index=False)
            text += TABLES[part](table, given.build)
    (given.out / "trust.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def run(part: str, name: str, pair: Pair, path: Path) -> None:
    known = set()
    if path.exists():
        known = set(
            pd.read_csv(path, dtype=str, keep_default_na=False)[["family", "seed", *COLUMNS[part]]].itertuples(
                index=False, name=None
            )
        )
    for key, make in PARTS[part](pair):
        if (name, str(pair.target.seed), *key) in known:
            continue
        row = {"family": name, "seed": pair.target.seed, **dict(zip(COLUMNS[part], key, strict=True)), **make()}
        # files of the same columns: what a row lacks is empty
        known_columns = list(pd.read_csv(path, nrows=0)) if path.exists() else [*row, *REST.get(part, ())]
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).reindex(columns=list(dict.fromkeys(known_columns))).to_csv(
            path, mode="a", header=not path.exists(), index=False
        )


#: Columns that not every row has.
REST = {"trust": ("distance", "spread", "unlabelled", "low", "high", "rehearsed")}


def trust_tables(table: pd.DataFrame, build: Path) -> list[str]:
    rows = pd.read_csv(build / "rows.csv").drop_duplicates(["family", "seed", "task", "setting"])
    uniform = rows[rows["setting"] == "uniform-s"].set_index(["family", "seed", "task"])["cpr"]
    keys = list(table[["family", "seed", "task"]].itertuples(index=False, name=None))
    table = table.assign(uniform=[uniform.get(key) for key in keys]).dropna(subset=["uniform"])
    table["worse"] = table["cpr"] < table["uniform"]
    table["taught by"] = ["one family" if n == 1 else "all other families" for n in table["families"]]
    shown = table.groupby(["way", "taught by"], sort=False).agg(
        n=("cpr", "size"), CPR=("cpr", "mean"), lowest=("cpr", "min"), worse=("worse", "sum")
    )
    said = table[table["families"] > 1]
    right = said[[not WAYS[way].wrong for way in said["way"]]]
    covered = right.assign(inside=(right["cpr"] >= right["low"]) & (right["cpr"] <= right["high"]))
    covered["width"] = covered["high"] - covered["low"]
    text = [
        "\n## Circuits worse than those of uniform-s\n",
        markdown(shown.reset_index()),
        "\n## Rehearsals: how often CPR is inside of the 90 % interval\n",
        markdown(
            covered.groupby(["family", "way"], sort=False)
            .agg(n=("inside", "size"), inside=("inside", "mean"), width=("width", "mean"))
            .reset_index()
        ),
        "\n## What foretells a circuit worse than that of uniform-s (AUROC)\n",
    ]
    honest = right[[not WAYS[way].scrambled for way in right["way"]]]
    asked = {"all ways": said, "the right measurements": right, "and not scrambled": honest}
    found = []
    for name, sign in PREDICTORS.items():
        row: dict[str, Any] = {"predictor": name}
        for which, part in asked.items():
            both = 0 < part["worse"].sum() < len(part)
            auroc = roc_auc_score(part["worse"], sign * part[name]) if both else float("nan")
            row |= {which: auroc, f"worse, {which}": f"{part['worse'].sum()} of {len(part)}"}
        found.append(row)
    return [*text, markdown(pd.DataFrame(found))]


def importance_tables(table: pd.DataFrame, build: Path) -> list[str]:
    columns = [name for name in table if name not in ("family", "seed", *COLUMNS["importance"])]
    text = []
    for guard, part in table.groupby("how", sort=False):
        wide = part.groupby("family", sort=False)[columns].mean().T
        wide["mean"] = wide.mean(axis=1)
        wide = wide.sort_values("mean", ascending=False).rename_axis("measurement").reset_index()
        text += [f"\n## Correlation lost by shuffling a measurement, guard {guard}\n", markdown(wide)]
    return text


def warm_tables(table: pd.DataFrame, build: Path) -> list[str]:
    text = []
    keys = ["family", "seed", "task"]
    # what training comes to from one half, and the first number of steps that is within 5 % of it
    cold = table[(table["start"] == "one half (cold)") & (table["steps"] == max(WARM_STEPS))].set_index(keys)
    table = table.join(cold[["cpr", "cmd"]].rename(columns=lambda name: f"{name}_end"), on=keys)
    for value, good in (
        ("cpr", lambda each: each["cpr"] >= 0.95 * each["cpr_end"]),
        ("cmd", lambda each: each["cmd"] <= each["cmd_end"] / 0.95),
    ):
        reached = table[good(table)].groupby(["start", *keys], sort=False)["steps"].min().unstack(keys)
        reached = reached.fillna(2 * max(WARM_STEPS))
        shown = table.pivot_table(index="start", columns="steps", values=value, sort=False)
        shown["median steps to 95 %"] = reached.median(axis=1)
        text += [f"\n## A trained mask by its start: {value.upper()} after steps\n", markdown(shown.reset_index())]
    return text


TABLES = {"trust": trust_tables, "importance": importance_tables, "warm": warm_tables}


if __name__ == "__main__":
    main()
