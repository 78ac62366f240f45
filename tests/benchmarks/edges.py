"""Edge transfer on the shipped models: gold, zero-shot and in-distribution circuits of edges, and their controls.

    python tests/benchmarks/edges.py                       # the tables of docs/edge-transfer.md: some hours
    python tests/benchmarks/edges.py --seeds 0             # one seed
    python tests/benchmarks/edges.py --tables-only         # from the rows on disk

Rows go to ``build/edges`` as they are made, and a second call runs what is missing; in the end they are in
``docs/results/edges.csv``, with the tables in ``edges.md`` beside it.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from method import markdown, with_interval

import dfa_lens as dfa
from dfa_lens.data.statistics import compare

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FRACTIONS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TRAIN, TEST = 32, 24
RECIPE = dfa.Recipe(steps=50, batch_size=8, lr=0.3)


class Case:
    """A family and a seed: models, prompts and scores, each made when needed; scores are kept on disk."""

    def __init__(self, family: str, seed: int, folder: Path) -> None:
        self.family, self.seed, self.folder = family, seed, folder
        self.tasks = dfa.tasks.names()

    @cached_property
    def models(self) -> dict[str, Any]:
        return dict(zip(("source", "target"), map(dfa.zoo.load, dfa.zoo.pairs()[self.family]), strict=True))

    @cached_property
    def target(self) -> Any:
        return self.models["target"]

    @cached_property
    def edges(self) -> dict[str, dfa.EdgeSet]:
        return {which: dfa.EdgeSet.of_model(model) for which, model in self.models.items()}

    def pairs(self, which: str, task: str, split: str) -> dfa.PromptPairs:
        n = TRAIN if split == "train" else TEST
        return dfa.tasks.load(task, self.models[which].tokenizer, split=split, n=n, seed=self.seed)

    @cached_property
    def train(self) -> dict[str, dfa.PromptPairs]:
        return {task: self.pairs("target", task, "train") for task in self.tasks}

    def scores(self, which: str, task: str) -> dfa.EdgeScores:
        path = self.folder / f"{self.family}-{self.seed}-{which}-{task}.safetensors"
        if not path.exists():
            found = dfa.attribute_edges(self.models[which], self.pairs(which, task, "train"))
            found.save(path)
        return dfa.EdgeScores.load(path)

    @cached_property
    def s(self) -> dict[str, dfa.EdgeScores]:
        return {task: self.scores("source", task) for task in self.tasks}

    @cached_property
    def nodes(self) -> dict[str, dfa.NodeScores]:
        """The source's scores of heads and MLP blocks: sums over edges."""
        found = {}
        for task, scores in self.s.items():
            whole = scores.to_nodes()
            found[task] = dfa.NodeScores(whole.values[1:], whole.nodes[1:], whole.meta)
        return found

    def fit(self, scores: Mapping[str, Any], tasks: list[str], **options: Any) -> Any:
        recipe = {"recipe": RECIPE, "seed": self.seed, **options}
        return dfa.fit(self.target, {t: scores[t] for t in tasks}, {t: self.train[t] for t in tasks}, **recipe)

    def uniform(self) -> dict[str, dfa.EdgeScores]:
        return dict.fromkeys(self.tasks, dfa.controls.uniform(self.edges["source"]))


Circuits = Iterator[tuple[str, dfa.EdgeScores]]


def gold(case: Case, task: str) -> Circuits:
    yield "gold", case.scores("target", task)


def zero_shot(case: Case, task: str) -> Circuits:
    others = [other for other in case.tasks if other != task]
    alignment = case.fit(case.s, others)
    yield "scrambled-s", alignment.transfer(dfa.controls.scrambled(case.s[task], seed=case.seed))
    yield "permuted-w", dfa.controls.permuted_w(alignment, seed=case.seed).transfer(case.s[task])
    yield "zero-shot", alignment.transfer(case.s[task])


def uniform(case: Case, task: str) -> Circuits:
    scores = case.uniform()
    others = [other for other in case.tasks if other != task]
    yield "uniform-s", case.fit(scores, others).transfer(scores[task])


def nodes(case: Case, task: str) -> Circuits:
    """An alignment of nodes: its W at both ends of edges, and its node scores spread evenly over edges."""
    others = [other for other in case.tasks if other != task]
    alignment = case.fit(case.nodes, others, lr=0.1)
    target = case.edges["target"]
    yield "nodes, spread", dfa.EdgeScores.from_nodes(alignment.transfer(case.nodes[task]), target)
    yield "nodes, both ends", alignment.transfer(case.s[task], edges=target)


def untrained(case: Case, task: str) -> Circuits:
    both = (case.edges["source"], case.edges["target"])
    yield "depth-mean", dfa.controls.depth_mean(*both).transfer(case.s[task])
    yield "random-w", dfa.controls.random_w(*both, seed=case.seed).transfer(case.s[task])


def in_distribution(case: Case, task: str) -> Circuits:
    yield "in-distribution", case.fit(case.s, [task]).transfer(case.s[task])


def free(case: Case, task: str) -> Circuits:
    options: dict[str, Any] = {"recipe": RECIPE, "seed": case.seed, "edges": case.edges["target"]}
    yield "target-only", dfa.controls.target_only(case.target, {task: case.train[task]}, **options)


def in_distribution_uniform(case: Case, task: str) -> Circuits:
    scores = case.uniform()
    yield "in-distribution, uniform-s", case.fit(scores, [task]).transfer(scores[task])


#: what is made together → the last of its settings: when that is there, all are
BLOCKS: dict[str, Callable[[Case, str], Circuits]] = {
    "gold": gold,
    "zero-shot": zero_shot,
    "uniform-s": uniform,
    "nodes, both ends": nodes,
    "random-w": untrained,
    "in-distribution": in_distribution,
    "target-only": free,
    "in-distribution, uniform-s": in_distribution_uniform,
}


def judge(case: Case, task: str, circuit: dfa.EdgeScores) -> dict[str, float]:
    """CPR, CMD and KL of the circuit on the test pairs, and the mean faithfulness up to a tenth of the edges."""
    test = case.pairs("target", task, "test")
    curve = dfa.faithfulness_curve(case.target, test, circuit, fractions=FRACTIONS, batch_size=TEST)
    few = curve.fractions <= 0.1 + 1e-9
    x, y = np.asarray(curve.fractions)[few], np.asarray(curve.faithfulness)[few]
    area = float(np.sum((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2) / x[-1])
    return {"cpr": curve.cpr, "cmd": curve.cmd, "few": area, "kl": float(curve.mean_kl)}


def run(families: list[str], seeds: list[int], blocks: list[str], folder: Path) -> None:
    """Every row that is missing, seed by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.csv"
    done = set()
    if path.exists():
        known = pd.read_csv(path)
        done = set(zip(known["family"], known["seed"], known["task"], known["setting"], strict=True))
    for seed in seeds:
        cases = {family: Case(family, seed, folder) for family in families}
        for block in blocks:
            for family, case in cases.items():
                for task in case.tasks:
                    if (family, seed, task, block) in done:
                        continue
                    started, rows = time.process_time(), []
                    for setting, circuit in BLOCKS[block](case, task):
                        key = {"family": family, "seed": seed, "task": task, "setting": setting}
                        rows.append(key | judge(case, task, circuit))
                    made = pd.DataFrame(rows).assign(seconds=round(time.process_time() - started, 1))
                    made.to_csv(path, mode="a", header=not path.exists(), index=False)
                    print(made.round(3).to_string(header=False), flush=True)


def leaderboard(table: pd.DataFrame) -> pd.DataFrame:
    """Means over families, tasks and seeds, with bootstrap intervals over those."""
    of_gold = table[table["setting"] == "gold"].set_index(["family", "seed", "task"])["cpr"]
    rows = []
    for setting, part in table.groupby("setting", sort=False):
        same = of_gold.reindex(pd.MultiIndex.from_frame(part[["family", "seed", "task"]]))
        rows.append(
            {
                "setting": setting,
                "CPR": with_interval(part["cpr"]),
                "CMD": with_interval(part["cmd"]),
                "few edges": with_interval(part["few"]),
                "KL": with_interval(part["kl"]),
                "CPR of gold's": f"{part['cpr'].mean() / same.mean():.1%}",
                "n": len(part),
            }
        )
    return pd.DataFrame(rows)


def tables(table: pd.DataFrame) -> str:
    """Leaderboard, paired comparisons, results by task."""
    order = [
        "gold", "zero-shot", "uniform-s", "scrambled-s", "permuted-w", "random-w", "depth-mean", "nodes, both ends",
        "nodes, spread", "in-distribution", "in-distribution, uniform-s", "target-only",
    ]  # fmt: skip
    table = table.sort_values("setting", key=lambda names: names.map(order.index), kind="stable")
    counted = table["setting"].value_counts()
    has = set(counted[counted > 1].index)  # a paired test needs two pairs
    parts = ["\n## Leaderboard\n", markdown(leaderboard(table))]
    for setting, against in (("zero-shot", order[:1] + order[2:9]), ("in-distribution", ["gold", *order[10:]])):
        others = [name for name in against if name in has]
        if setting not in has or not others:
            continue
        for value in ("cpr", "cmd", "few"):
            parts.append(f"\n## {setting} against others, {value}: pairs of family, task and seed\n")
            parts.append(markdown(compare(table, setting, others, value=value)))
    for value in ("cpr", "few"):
        wide = table.pivot_table(index=["family", "task"], columns="setting", values=value, sort=False).reset_index()
        parts += [f"\n## By task: mean {value} over seeds\n", markdown(wide)]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", default=list(dfa.zoo.pairs()))
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--build", type=Path, default=Path("build/edges"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if not given.tables_only:
        run(given.families, given.seeds, given.blocks, given.build)
    known = given.build / "rows.csv"
    table = pd.read_csv(known if known.exists() else given.out / "edges.csv")
    seeds = ", ".join(map(str, sorted(table["seed"].unique())))
    head = f"# Edge transfer: all tables\n\n`python tests/benchmarks/edges.py`, seeds {seeds}; dfa_lens {dfa.__version__}.\n"
    given.out.mkdir(parents=True, exist_ok=True)
    table.round(5).to_csv(given.out / "edges.csv", index=False)
    (given.out / "edges.md").write_text(head + tables(table), encoding="utf-8")


if __name__ == "__main__":
    main()
