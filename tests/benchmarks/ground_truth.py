"""Attribution and transfer against circuits that are known, because they were planted (``dfa.zoo.planted``).

    python tests/benchmarks/ground_truth.py                      # resumable; about ten minutes a seed on one core
    python tests/benchmarks/ground_truth.py --pairs induction --seeds 0
    python tests/benchmarks/ground_truth.py --tables-only        # from the rows on disk

Three kinds of rows, in ``--out``/ground-truth.csv:

- ``attribution``: for every method, side and task, the area under the ROC curve of the scores against the circuit, and
  the part of the circuit that is among the best k nodes, k its size.
- ``transfer``: the same on the target, for scores that were carried there, on tasks that combine what other tasks did;
  and the part of the task's roles of which a node is among the best k.
- ``roles``: what a W makes of a score on one source node: whether the target's best node has that node's role.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

import dfa_lens as dfa
from dfa_lens.zoo.planted import PlantedModel, PlantedPair

METHODS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "nap": {"method": "nap"},
    "nap-ig-inputs, 5 steps": {"method": "nap-ig-inputs", "steps": 5},
    "nap-ig-inputs, 20 steps": {"method": "nap-ig-inputs", "steps": 20},
    "nap-ig-activations, 5 steps": {"method": "nap-ig-activations", "steps": 5},
    "relp": {"method": "relp"},
    "attnlrp": {"method": "attnlrp"},
    "gim": {"method": "gim"},
    "atp-star": {"method": "atp-star"},
    "expected-gradients": {"method": "expected-gradients"},
    "matryoshka": {"method": "matryoshka"},
    "node-pruning": {"method": "node-pruning"},
    "ugs": {"method": "ugs"},
}
#: What is carried.
SOURCE_SCORES = "nap-ig-inputs, 5 steps"
SIZE = 32

Row = dict[str, Any]


def judged(side: PlantedModel, task: str, scores: dfa.NodeScores) -> Row:
    """How well a ranking finds a planted circuit."""
    circuit = side.circuit(task)
    best = set(scores.top(len(circuit)))
    roles = side.tasks[task]
    return {
        "auroc": roc_auc_score(circuit.kept.numpy(), scores.values.numpy()),
        "top_k": len(best & set(circuit)) / len(circuit),
        "roles": sum(bool(best & set(side.roles[role])) for role in roles) / len(roles),
    }


def of_attribution(pair: PlantedPair, method: str) -> Iterable[Row]:
    for name, side in (("source", pair.source), ("target", pair.target)):
        for task in pair.tasks:
            scores = dfa.attribute(side.model, pair.pairs(task, n=SIZE), batch_size=SIZE, **METHODS[method])
            yield {"side": name, "task": task} | judged(side, task, scores)


def of_transfer(pair: PlantedPair, method: str, seed: int) -> Iterable[Row]:
    """Everything that is learned from the tasks that are not held out."""
    others = [task for task in pair.tasks if task not in pair.held_out]
    prompts = {task: pair.pairs(task, n=SIZE) for task in pair.tasks}
    scores = {
        task: dfa.attribute(pair.source.model, prompts[task], batch_size=SIZE, **METHODS[method]) for task in pair.tasks
    }
    taught, seen = {task: scores[task] for task in others}, {task: prompts[task] for task in others}
    uniform = dfa.controls.uniform(pair.source.nodes)
    jobs = {"W": taught, "uniform-s": dict.fromkeys(others, uniform)}
    ways: dict[str, dfa.Alignment] = {
        way: dfa.fit(pair.target.model, given, seen, seed=seed) for way, given in jobs.items()
    }
    ways["W, kernel"] = dfa.fit(pair.target.model, taught, seen, form="kernel", seed=seed)
    gold = {task: dfa.attribute(pair.target.model, seen[task], batch_size=SIZE, **METHODS[method]) for task in others}
    ways["regression"] = dfa.controls.regression(taught, gold)
    ways["depth-mean"] = dfa.controls.depth_mean(pair.source.nodes, pair.target.nodes)
    ways["random-w"] = dfa.controls.random_w(pair.source.nodes, pair.target.nodes, seed=seed)
    ways["permuted-w"] = dfa.controls.permuted_w(ways["W"], seed=seed)
    for way, alignment in ways.items():
        yield {"kind": "roles", "way": way} | mapped(pair, alignment)

    measured = {task: dfa.measure(pair.source.model, prompts[task], batch_size=SIZE) for task in pair.tasks}
    functional = dfa.fit_functional(
        taught, {task: measured[task] for task in others}, families=pair.families, seed=seed
    )
    for task in pair.held_out:
        read = dfa.measure(pair.target.model, prompts[task], batch_size=SIZE)
        carried = {
            way: alignment.transfer(uniform if way == "uniform-s" else scores[task]) for way, alignment in ways.items()
        }
        carried["scrambled-s"] = ways["W"].transfer(dfa.controls.scrambled(scores[task], seed=seed))
        carried["functional"] = functional.transfer(read)
        carried["functional, wrong task"] = functional.transfer(
            dfa.measure(pair.target.model, prompts[others[0]], batch_size=SIZE)
        )
        options = {"method": METHODS[method]["method"], "families": pair.families, "seed": seed, "batch_size": SIZE}
        carried["carry (functional, own scores)"] = dfa.carry(
            pair.source.model, pair.target.model, task, {**seen, task: prompts[task]}, {task: prompts[task]}, **options
        )
        carried["random scores"] = dfa.controls.random_scores(pair.target.nodes, seed=seed)
        carried["attribution on the target"] = dfa.attribute(
            pair.target.model, prompts[task], batch_size=SIZE, **METHODS[method]
        )
        for way, found in carried.items():
            yield {"kind": "transfer", "way": way, "task": task} | judged(pair.target, task, found)


def mapped(pair: PlantedPair, alignment: dfa.Alignment) -> Row:
    """Where W sends each role of the source: to the target's node of the largest weight, or to the mean over roles."""
    right = []
    areas = []
    for role, (node,) in pair.source.roles.items():
        row = alignment.W[pair.source.nodes.position(node)]
        members = torch.tensor([name in pair.target.roles[role] for name in pair.target.nodes.names])
        right.append(bool(members[row.argmax()]))
        areas.append(roc_auc_score(members.numpy(), row.numpy()))
    return {"mapped": sum(right) / len(right), "auroc": sum(areas) / len(areas)}


def jobs(pairs: Iterable[str], seeds: Iterable[int], methods: Iterable[str]) -> Iterable[tuple[str, str, int, str]]:
    pairs, methods = list(pairs), list(methods)
    for seed in seeds:
        for method in methods:
            yield from (("attribution", name, seed, method) for name in pairs)
        yield from (("transfer", name, seed, SOURCE_SCORES) for name in pairs)


def run(path: Path, pairs: Iterable[str], seeds: Iterable[int], methods: Iterable[str]) -> None:
    made = functools.lru_cache(6)(dfa.zoo.planted.load)
    keys = ["part", "pair", "seed", "method"]
    known = set(pd.read_csv(path)[keys].itertuples(index=False, name=None)) if path.exists() else set()
    path.parent.mkdir(parents=True, exist_ok=True)
    for part, name, seed, method in tqdm(
        [each for each in jobs(pairs, seeds, methods) if each not in known], unit="job"
    ):
        pair = made(name, seed=seed)
        common = dict(zip(keys, (part, name, seed, method), strict=True))
        rows = of_attribution(pair, method) if part == "attribution" else of_transfer(pair, method, seed)
        table = pd.DataFrame([{"kind": part} | common | row for row in rows])
        columns = [*keys, "kind", "way", "side", "task", "auroc", "top_k", "roles", "mapped"]
        table.reindex(columns=columns).round(4).to_csv(path, mode="a", header=not path.exists(), index=False)


def tables(found: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """What the page shows."""
    attribution = found[found.kind == "attribution"]
    transfer, roles = found[found.kind == "transfer"], found[found.kind == "roles"]
    order = list(METHODS)

    def mean(table: pd.DataFrame, index: list[str], column: str, values: str = "auroc") -> pd.DataFrame:
        return table.pivot_table(values, index, column, sort=False, observed=False)

    by_method = mean(attribution, ["method"], "pair")
    by_method["all"] = attribution.groupby("method").auroc.mean()
    by_method["top k"] = attribution.groupby("method").top_k.mean()
    carried = transfer.groupby("way", sort=False)[["auroc", "top_k", "roles"]].mean()
    carried["lowest pair"] = transfer.groupby(["way", "pair"]).auroc.mean().groupby("way").min()
    sent = roles.groupby("way", sort=False)[["mapped", "auroc"]].mean()
    return {
        "AUROC of attribution": by_method.reindex(order),
        "transfer to tasks that were held out": carried,
        "by pair, AUROC": mean(transfer, ["way"], "pair"),
        "roles that W maps to the right role": sent,
        "by pair, roles mapped": mean(roles, ["way"], "pair", "mapped"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(dfa.zoo.planted.names()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tables-only", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore", dfa.IntegrationWarning)
    warnings.simplefilter("ignore", dfa.TrainingWarning)
    path = given.out / "ground-truth.csv"
    if not given.tables_only:
        run(path, given.pairs, given.seeds, given.methods)
    for title, table in tables(pd.read_csv(path)).items():
        print(f"\n{title}\n{table.round(3).to_string()}")


if __name__ == "__main__":
    main()
