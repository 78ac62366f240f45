"""The functional benchmark: transfer by what nodes do, with no relative of the task to learn from, and its controls.

    python tests/benchmarks/functional.py                            # the tables of docs/method.md; hours on 2 cores
    python tests/benchmarks/functional.py --seeds 0 --settings functional "group-share alone"
    python tests/benchmarks/functional.py --pair mine=SOURCE:TARGET  # shipped names, hub names or checkpoint folders
    python tests/benchmarks/functional.py --tables-only              # from the rows on disk

Scores, measurements and rows go to ``build/functional`` as they are made, and a second call makes what is missing.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import dfa_lens as dfa
from dfa_lens.transfer.measure import GROUP_MEASURES, MEASURES

ROOT = Path(__file__).parents[2]
#: The shipped pairs, six tasks or twelve others each, and one of two families of models.
PAIRS = {**dfa.zoo.pairs("all"), "llama3 to qwen2.5": ("llama3-tiny-source", "qwen2.5-tiny-target")}
#: A pair and one of the same family of models that knows other tasks, whose source can teach, too.
ALSO = {"llama3": "llama3-more", "qwen2.5": "qwen2.5-more", "llama3-more": "llama3", "qwen2.5-more": "qwen2.5"}
#: Those that a pair of two families needs: the others know no source.
ACROSS = ("functional", "functional, own scores", "functional, own scores alone")
SINGLE = (*MEASURES, *GROUP_MEASURES)
#: Measurements that fused attention kernels do not allow.
PATTERNS = tuple(name for name, each in MEASURES.items() if each.needs == "patterns")
#: Ranked by how large their scores are, too.
BY_SIZE = ("gold, 20 steps", "functional", "functional, own scores", "group-share alone")
TRAIN, TEST, SIZES = 64, 32, 18


class Side:
    """One model with one seed: what is known of it, on disk or in memory."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.name, self.seed = name, seed
        self.folder = folder / f"{Path(name).name}-{seed}"
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = dfa.zoo.load(self.name) if self.name in dfa.zoo.SPECS else dfa.load_model(self.name)
        return self._model

    def pairs(self, task: str, split: str = "train", n: int = TRAIN) -> Any:
        return dfa.tasks.load(task, self.model.tokenizer, split=split, n=n, seed=self.seed)

    def _kept(self, kind: type, task: str, what: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{task}.{what}.safetensors"
        if not path.exists():
            make().save(path)
        return kind.load(path)  # type: ignore[attr-defined]

    def scores(self, task: str, method: str = "nap-ig-inputs", steps: int = 5) -> dfa.NodeScores:
        def make() -> dfa.NodeScores:
            return dfa.attribute(self.model, self.pairs(task), method=method, steps=steps, batch_size=32)

        return self._kept(dfa.NodeScores, task, f"{method}-{steps}", make)

    def measured(self, task: str) -> dfa.Measurements:
        return self._kept(
            dfa.Measurements, task, "measured", lambda: dfa.measure(self.model, self.pairs(task), batch_size=32)
        )


class Pair:
    """A source and a target with one seed, and every circuit between them."""

    def __init__(
        self, source: Side, target: Side, tasks: Sequence[str] | None = None, also: Pair | None = None
    ) -> None:
        self.source, self.target, self.also = source, target, also
        self.tasks = tuple(tasks or dfa.tasks.names())
        self.settings: dict[str, Callable[[str], dfa.NodeScores]] = {
            "gold": target.scores,
            "gold, 20 steps": lambda task: target.scores(task, steps=20),
            "nap on the target": lambda task: target.scores(task, "nap"),
            "exact, 16 pairs": self.exact,
            "functional": self.functional,
            "functional, own scores": lambda task: self.functional(task, own=True),
            "functional, all families": lambda task: self.functional(task, also=True),
            "functional, all families, own scores": lambda task: self.functional(task, own=True, also=True),
            "functional, own scores alone": lambda task: self.functional(task, own=True, others=False),
            "source-blind": lambda task: self.functional(task, teacher=target),
            "scrambled": lambda task: self.functional(task, scramble=True),
            "wrong task": lambda task: self.functional(task, wrong=True),
            "attention": lambda task: self.functional(task, reader="attention"),
            "attention, own scores": lambda task: self.functional(task, own=True, reader="attention"),
            **{f"{name} alone": lambda task, name=name: target.measured(task).scores(name) for name in SINGLE},
            "functional, no guard": lambda task: self.functional(task, guard=0.0),
            "functional, own scores, no guard": lambda task: self.functional(task, own=True, guard=0.0),
            "functional, sizes learned": lambda task: self.functional(task, learns="sizes"),
            "functional, own scores, sizes learned": lambda task: self.functional(task, own=True, learns="sizes"),
            "without groups": lambda task: self.functional(task, without=GROUP_MEASURES),
            "without attention": lambda task: self.functional(task, without=PATTERNS),
            "without attention, own scores": lambda task: self.functional(task, own=True, without=PATTERNS),
            **{f"{name}, by size": self.by_size(name) for name in BY_SIZE},
            "W": self.trained,
            "uniform-s": lambda task: self.trained(task, uniform=True),
        }
        self._alignments: dict[Any, dfa.Alignment] = {}

    def exact(self, task: str) -> dfa.NodeScores:
        """One node ablated at a time: what attribution can come to, at many times the passes."""
        return dfa.attribute(self.target.model, self.target.pairs(task)[:16], method="exact", batch_size=32)

    def by_size(self, name: str) -> Callable[[str], dfa.NodeScores]:
        """The same scores without their signs: nodes that work against the answer are kept, too."""

        def sizes(task: str) -> dfa.NodeScores:
            found = self.settings[name](task)
            return dfa.NodeScores(found.values.abs(), found.nodes, found.meta)

        return sizes

    def others(self, task: str) -> list[str]:
        family = dfa.tasks.FAMILIES
        return [other for other in self.tasks if family[other] != family[task]]

    def functional(
        self,
        task: str,
        *,
        own: bool = False,
        others: bool = True,
        wrong: bool = False,
        without: tuple[str, ...] = (),
        **teaching: Any,
    ) -> dfa.NodeScores:
        fitted = self.fitted(task, self.others(task) if others else [task], without=without, **teaching)
        read = self.measured(self.target, self.others(task)[0] if wrong else task, without)
        more = (self.source.scores(task), self.measured(self.source, task, without)) if own and others else ()
        return fitted.transfer(read, *more)

    @staticmethod
    def measured(side: Side, task: str, without: tuple[str, ...] = ()) -> dfa.Measurements:
        return side.measured(task).without(*without)

    def fitted(
        self,
        task: str,
        teaching: Sequence[str],
        *,
        teacher: Side | None = None,
        scramble: bool = False,
        reader: str = "trees",
        without: tuple[str, ...] = (),
        guard: float | None = None,
        learns: str = "scores",
        also: bool = False,
    ) -> dfa.FunctionalAlignment:
        """What ``teaching`` teaches, and with ``also`` all tasks of the other pair that are no relatives of ``task``."""
        side = teacher or self.source

        def scores(name: str) -> dfa.NodeScores:
            found = side.scores(name)
            seed = 100 * side.seed + list(dfa.tasks.FAMILIES).index(name)
            return dfa.controls.scrambled_within(found, seed=seed) if scramble else found

        known = {name: (scores(name), self.measured(side, name, without)) for name in teaching}
        if also and self.also is not None:
            for name in self.also.tasks:
                if dfa.tasks.FAMILIES[name] != dfa.tasks.FAMILIES[task]:
                    known[name] = self.also.source.scores(name), self.measured(self.also.source, name, without)
        return dfa.fit_functional(
            {name: both[0] for name, both in known.items()},
            {name: both[1] for name, both in known.items()},
            families=dfa.tasks.FAMILIES,
            seed=side.seed,
            reader=reader,
            guard=guard,
            learns=learns,
        )

    def trained(self, task: str, *, uniform: bool = False) -> dfa.NodeScores:
        """The published form of W, trained on the target on the same tasks."""
        others = tuple(self.others(task))
        nodes = dfa.NodeSet.heads_and_mlps(self.source.model)

        def scores(name: str) -> dfa.NodeScores:
            return dfa.controls.uniform(nodes) if uniform else self.source.scores(name)

        if (others, uniform) not in self._alignments:
            pairs = {name: self.target.pairs(name) for name in others}
            taught = {name: scores(name) for name in others}
            self._alignments[others, uniform] = dfa.fit(self.target.model, taught, pairs, seed=self.target.seed)
        return self._alignments[others, uniform].transfer(scores(task))

    def judged(self, task: str, circuit: dfa.NodeScores) -> dict[str, float]:
        """How faithful a circuit is on the task's test pairs."""
        n = len(circuit)
        curve = dfa.faithfulness_curve(
            self.target.model,
            self.target.pairs(task, "test", TEST),
            circuit,
            ranking="signed",  # what ranks by size is a row of its own
            sizes=sorted({round(i * n / SIZES) for i in range(SIZES + 1)}),
            batch_size=32,
        )
        return {"cpr": curve.cpr, "cmd": curve.cmd, "kl": curve.mean_kl}

    def row(self, task: str, setting: str) -> dict[str, Any]:
        return {"task": task, "setting": setting, **self.judged(task, self.settings[setting](task))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=None, help="default: all")
    parser.add_argument("--pair", nargs="+", default=None, help="NAME=SOURCE:TARGET; default: the shipped ones")
    parser.add_argument("--only", nargs="+", default=None, help="some of the pairs by name; the others can teach")
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "functional")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    given = parser.parse_args()
    pairs = dict(PAIRS)
    if given.pair:
        pairs = {name: tuple(both.split(":")) for name, both in (each.split("=", 1) for each in given.pair)}
    os.nice(10)
    path = given.build / "rows.csv"
    if not given.tables_only:
        warnings.simplefilter("ignore", dfa.IntegrationWarning)  # gold with 5 steps is what it is
        for seed in given.seeds:
            made = made_pairs(pairs, seed, given.build)
            for name in given.only or made:
                run(name, made[name], given.settings, path)
    table = pd.read_csv(path).drop_duplicates(["family", "seed", "task", "setting"])
    text = tables(table)
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    table.sort_values(["family", "seed", "setting", "task"]).round(5).to_csv(given.out / "functional.csv", index=False)
    (given.out / "functional.md").write_text(text, encoding="utf-8")


def made_pairs(pairs: dict[str, tuple[str, ...]], seed: int, build: Path) -> dict[str, Pair]:
    """The pairs of models with one seed, each model once."""
    sides = {name: Side(name, seed, build) for both in pairs.values() for name in both}
    made = {}
    for name, (source, target) in pairs.items():
        solved = [
            [*dfa.zoo.solves(model)] if model in dfa.zoo.SPECS else [*dfa.tasks.names()] for model in (source, target)
        ]
        made[name] = Pair(sides[source], sides[target], [task for task in solved[0] if task in solved[1]])
    for name, other in ALSO.items():
        if name in made and other in made:
            made[name].also = made[other]
    return made


def run(name: str, pair: Pair, settings: list[str] | None, path: Path) -> None:
    """Every row of a pair and seed that is not on disk yet."""
    known = set()
    if path.exists():
        known = set(pd.read_csv(path)[["family", "seed", "task", "setting"]].itertuples(index=False, name=None))
    across = name == "llama3 to qwen2.5"
    chosen = [each for each in settings or pair.settings if not across or each in ACROSS]
    if pair.also is None:
        chosen = [each for each in chosen if "all families" not in each]
    for setting in chosen:
        for task in pair.tasks:
            if (name, pair.target.seed, task, setting) in known:
                continue
            row = {"family": name, "seed": pair.target.seed, **pair.row(task, setting)}
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)


def tables(table: pd.DataFrame) -> str:
    """Means with intervals, by task, and paired tests; of the shipped pairs that are one family each."""
    inside = table[table["family"].isin(dfa.zoo.pairs("all"))]
    seeds = ", ".join(map(str, sorted(table["seed"].unique())))
    parts = [
        f"# Functional alignment: all tables\n\n`python tests/benchmarks/functional.py`, seeds {seeds}; dfa_lens "
        f"{dfa.__version__}. {TRAIN} training and {TEST} test pairs a task, circuits of {SIZES + 1} sizes. Only tasks "
        'of other families teach, but where "own" says so. Intervals over pairs of task, family and seed.\n',
        "## Means\n",
        markdown(leaderboard(inside)),
        "\n## CPR by task\n",
        markdown(by_task(inside)),
    ]
    for setting in ("functional", "functional, own scores"):
        whole = inside.groupby("setting").size()
        against = [
            each
            for each in (
                "gold",
                "gold, 20 steps",
                "nap on the target",
                "source-blind",
                "scrambled",
                "wrong task",
                "group-share alone",
                "functional, own scores alone",
                "attention",
                "W",
                "uniform-s",
            )
            if each in whole
        ]
        if setting in whole and against:
            for value in ("cpr", "kl"):
                found = dfa.statistics.compare(inside, setting, against, value=value)
                parts += [f"\n## {setting}: paired tests, {value.upper()}\n", markdown(found.drop(columns="setting"))]
    across = table[table["family"] == "llama3 to qwen2.5"]
    if len(across):
        both = pd.concat([across, inside[(inside["family"] == "qwen2.5") & inside["setting"].isin([*ACROSS, "gold"])]])
        wide = both.pivot_table(index=["family", "setting"], columns="task", values="cpr", sort=False)
        wide["mean"] = wide.mean(axis=1)
        parts += [
            "\n## From another family of models: the target is qwen2.5-tiny-target\n",
            markdown(wide.reset_index()),
        ]
    return "\n".join(parts) + "\n"


def leaderboard(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for setting, part in table.groupby("setting", sort=False):
        shown: dict[str, Any] = {"setting": setting}
        for value in ("cpr", "cmd", "kl"):
            low, high = dfa.statistics.mean_interval(part[value])
            shown[value.upper()] = f"{part[value].mean():.3f} [{low:.3f}, {high:.3f}]"
        rows.append({**shown, "n": len(part)})
    return pd.DataFrame(rows)


def by_task(table: pd.DataFrame) -> pd.DataFrame:
    wide = table.pivot_table(index="setting", columns=["family", "task"], values="cpr", sort=False)
    wide.columns = [f"{family} {task}" for family, task in wide.columns]
    return wide.reset_index()


def markdown(frame: pd.DataFrame) -> str:
    def cell(name: str, value: Any) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.4f}" if name in ("p", "p_holm") else f"{value:.3f}"
        return str(value)

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + " --- |" * len(frame.columns)]
    for record in frame.to_dict("records"):
        lines.append("| " + " | ".join(cell(str(name), value) for name, value in record.items()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
