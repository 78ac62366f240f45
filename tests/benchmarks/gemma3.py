"""Gemma-3-270m: which tasks it solves, and circuits for one of each family. The tables of docs/real-model.md.

python tools/gemma3.py .cache/gemma-3-270m
OMP_NUM_THREADS=1 python tests/benchmarks/gemma3.py [--pairs 24]
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import dfa_lens as dfa

METHODS = ("nap", "nap-ig-inputs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".cache/gemma-3-270m"))
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--tasks", nargs="*", default=None, help="default: those without numbers as answers")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    model = dfa.load_model(given.folder, backend="transformers")
    tasks = given.tasks or [each for each in dfa.tasks.names("all") if each not in ("addition", "subtraction")]
    judged: set[str] = set()
    print("| task | right, clean / corrupt | logit difference | method | CPR | CMD | KL | strongest | seconds |")
    for task in tasks:
        sides = {
            split: dfa.tasks.load(task, model.tokenizer, split=split, n=given.pairs) for split in ("train", "test")
        }
        found = dfa.check(model, sides["test"]).summary()
        right = [found["answer above wrong"], found["answer above wrong, corrupt"]]
        cells = [
            task,
            " / ".join(f"{100 * each:.0f} %" for each in right),
            f"{found['logit difference']:.1f} / {found['logit difference, corrupt']:.1f}",
        ]
        if min(right) < 0.9 or dfa.tasks.FAMILIES[task] in judged:
            print("| " + " | ".join(cells) + " |", flush=True)
            continue
        judged.add(dfa.tasks.FAMILIES[task])
        for method in METHODS:
            started = time.process_time()
            scores = dfa.attribute(model, sides["train"], method=method)
            seconds = time.process_time() - started
            sizes = [round(i * len(scores) / 12) for i in range(13)]
            curve = dfa.faithfulness_curve(model, sides["test"], scores, sizes=sizes)
            row = [method, f"{curve.cpr:.2f}", f"{curve.cmd:.2f}", f"{curve.mean_kl:.2f}", ", ".join(scores.top(3))]
            print("| " + " | ".join([*cells, *row, f"{seconds:.0f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
