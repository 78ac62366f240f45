"""How well each attribution method agrees with exact patching on the shipped models.

    python tests/benchmarks/agreement.py [--examples 16] [--methods nap relp] [--out docs/results/agreement.csv]

Prints, for every model, task and method: Pearson and Spearman correlation with ``exact`` over all nodes, and Pearson
over MLP blocks alone, the part of nodes with the same sign, the completeness residual, the steps that "auto" took, and
seconds. Seconds are for orientation; compare ratios in one run. Rows are written task by task; those that are in the
file are not made again.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import dfa_lens as dfa

METHODS = {
    "exact": {"method": "exact"},
    "nap": {"method": "nap"},
    "nap-ig-inputs": {"method": "nap-ig-inputs"},
    "nap-ig-activations": {"method": "nap-ig-activations"},
    "nap-ig-inputs, 10 steps": {"method": "nap-ig-inputs", "steps": 10},
    "nap-ig-inputs, 20 steps": {"method": "nap-ig-inputs", "steps": 20},
    "nap-ig-inputs, auto": {"method": "nap-ig-inputs", "steps": "auto"},
    "expected-gradients": {"method": "expected-gradients"},
    "relp": {"method": "relp"},
    "attnlrp": {"method": "attnlrp"},
    "gim": {"method": "gim"},
    "atp-star": {"method": "atp-star"},
    "nap, released": {"method": "nap", "mlp_gradient": "input"},
    "nap-ig-inputs, released": {"method": "nap-ig-inputs", "mlp_gradient": "input"},
    "nap-ig-activations, released": {
        "method": "nap-ig-activations",
        "accumulate": "all",
        "mlp_gradient": "input",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=list(dfa.zoo.names()))
    parser.add_argument("--tasks", nargs="+", default=list(dfa.tasks.names()))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    warnings.simplefilter("ignore", dfa.IntegrationWarning)
    known = pd.read_csv(given.out) if given.out is not None and given.out.exists() else pd.DataFrame()
    rows = known.to_dict("records")
    there = {(row["model"], row["task"], row["method"]) for row in rows if not pd.isna(row.get("pearson_mlp"))}
    models: dict[str, object] = {}
    for name, task in tqdm([(name, task) for name in given.models for task in given.tasks], unit="task"):
        missing = [label for label in given.methods if (name, task, label) not in there]
        if not missing:
            continue
        model = models.setdefault(name, dfa.zoo.load(name))
        pairs = dfa.tasks.load(task, model.tokenizer, split="test", n=given.examples)
        exact = dfa.attribute(model, pairs, batch_size=given.examples, method="exact")
        mlps = [i for i, node in enumerate(exact.nodes) if node.kind == "mlp"]
        for label in missing:
            started = time.perf_counter()
            scores = dfa.attribute(model, pairs, batch_size=given.examples, **METHODS[label])
            seconds = time.perf_counter() - started
            found = dfa.statistics.correlation(scores, exact)
            rows = [row for row in rows if (row["model"], row["task"], row["method"]) != (name, task, label)]
            rows.append(
                {
                    "model": name,
                    "task": task,
                    "method": label,
                    "pearson": found.pearson,
                    "spearman": found.spearman,
                    "sign": found.sign_agreement,
                    "pearson_mlp": float(np.corrcoef(scores.values[mlps], exact.values[mlps])[0, 1]),
                    "residual": scores.meta.get("completeness", {}).get("residual"),
                    "steps": scores.meta.get("steps"),
                    "seconds": seconds,
                }
            )
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).round(4).to_csv(given.out, index=False)
    table = pd.DataFrame(rows)
    print(
        table.drop(columns="task").groupby(["model", "method"], sort=False).mean(numeric_only=True).round(3).to_string()
    )
    print(
        table.drop(columns=["model", "task"]).groupby("method", sort=False).mean(numeric_only=True).round(3).to_string()
    )


if __name__ == "__main__":
    main()
