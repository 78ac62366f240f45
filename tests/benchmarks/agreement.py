"""How well each attribution method agrees with exact patching on the shipped models.

    python tests/benchmarks/agreement.py [--examples 16] [--out docs/results/agreement.csv]

Prints, for every model, task and method: Pearson and Spearman correlation with ``exact`` over all nodes, the part of
nodes with the same sign, the completeness residual, and seconds. Seconds are for orientation; compare ratios in one run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

import dfa_lens as dfa

METHODS = {
    "exact": {"method": "exact"},
    "nap": {"method": "nap"},
    "nap-ig-inputs": {"method": "nap-ig-inputs"},
    "nap-ig-activations": {"method": "nap-ig-activations"},
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
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    warnings.simplefilter("ignore", dfa.IntegrationWarning)
    rows = []
    jobs = [(name, task) for name in given.models for task in given.tasks]
    models: dict[str, object] = {}
    for name, task in tqdm(jobs, unit="task"):
        model = models.setdefault(name, dfa.zoo.load(name))
        pairs = dfa.tasks.load(task, model.tokenizer, split="test", n=given.examples)
        exact = None
        for label, options in METHODS.items():
            started = time.perf_counter()
            scores = dfa.attribute(model, pairs, batch_size=given.examples, **options)
            seconds = time.perf_counter() - started
            exact = exact or scores
            found = dfa.statistics.correlation(scores, exact)
            rows.append(
                {
                    "model": name,
                    "task": task,
                    "method": label,
                    "pearson": found.pearson,
                    "spearman": found.spearman,
                    "sign": found.sign_agreement,
                    "residual": scores.meta.get("completeness", {}).get("residual"),
                    "seconds": seconds,
                }
            )
    table = pd.DataFrame(rows)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        table.round(4).to_csv(given.out, index=False)
    print(table.drop(columns="task").groupby(["model", "method"], sort=False).mean().round(3).to_string())
    print(table.drop(columns=["model", "task"]).groupby("method", sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()
