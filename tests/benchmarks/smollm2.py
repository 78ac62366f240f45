"""IOI in a real pretrained model: attribution, faithfulness, and a circuit carried to it from a tiny Llama.

    python tools/smollm2.py .cache/smollm2-135m-instruct
    python tests/benchmarks/smollm2.py

Prints the table of docs/real-model.md with times, and writes its two pictures (kaleido and a Chromium are needed).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import dfa_lens as dfa

ROOT = Path(__file__).parents[2]
TEMPLATES = (0, 1, 2, 4, 6)  # the sentences that the model follows
SIZES = [0, 2, 4, 8, 12, 16, 24, 32, 45, 60, 90, 120, 150, 180, 210, 240, 270, 300]


def main() -> None:
    rows: list[dict[str, object]] = []

    def timed(what: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        rows.append({"work": what, "seconds": round(time.perf_counter() - start, 1)})
        print(rows[-1], flush=True)
        return result

    folder = ROOT / ".cache" / "smollm2-135m-instruct"
    model = timed("load (HookedTransformer, float32)", lambda: dfa.load_model(folder))
    train = dfa.tasks.load("ioi", model.tokenizer, n=64, templates=TEMPLATES)
    test = dfa.tasks.load("ioi", model.tokenizer, split="test", n=32, templates=TEMPLATES)
    found = timed(
        "check, 60 pairs",
        lambda: dfa.check(model, dfa.tasks.load("ioi", model.tokenizer, split="test", n=60, templates=TEMPLATES)),
    )
    print(pd.Series(found.summary()).round(3).to_string())

    scores = {
        "gold": timed("attribute, nap-ig-inputs, 5 steps, 64 pairs", lambda: dfa.attribute(model, train)),
        "gold, nap": timed("attribute, nap, 64 pairs", lambda: dfa.attribute(model, train, method="nap")),
    }
    print("completeness", scores["gold"].meta["completeness"])
    print("strongest", {name: round(value, 2) for name, value in scores["gold"].top(8).items()})

    source = dfa.zoo.load("llama3-tiny-source")
    pairs = dfa.tasks.load("ioi", source.tokenizer, n=64)
    tiny = dfa.attribute(source, pairs)
    flat = dfa.controls.uniform(tiny.nodes)
    fits = {
        "transferred": (
            tiny,
            timed(
                "fit, 60 steps of 16 pairs",
                lambda: dfa.fit(model, {"ioi": tiny}, {"ioi": train}, steps=60, sparsity_weight=3.0),
            ),
        ),
        "transferred, uniform source": (
            flat,
            dfa.fit(model, {"ioi": flat}, {"ioi": train}, steps=60, sparsity_weight=3.0),
        ),
    }
    for name, (given, alignment) in fits.items():
        scores[name] = alignment.transfer(given)
    alignment = fits["transferred"][1]
    scores["random W"] = dfa.controls.random_w(alignment.source, alignment.target).transfer(tiny)

    curves = {}
    for name, circuit in scores.items():
        work = lambda circuit=circuit: dfa.faithfulness_curve(model, test, circuit, sizes=SIZES)  # noqa: E731
        curves[name] = timed(f"curve of {name}, {len(SIZES)} sizes, 32 pairs", work)
    table = pd.DataFrame(
        {
            "circuit": name,
            "CPR": curve.cpr,
            "CMD": curve.cmd,
            "mean KL": curve.mean_kl,
            "f at 60 nodes": curve.at(60),
        }
        for name, curve in curves.items()
    )
    print(table.round(3).to_string(index=False))
    images = ROOT / "docs" / "images"
    dfa.plots.curves(
        {name: curves[name] for name in ("gold", "transferred", "random W")},
        title="IOI in SmolLM2-135M",
        width=900,
    ).write_image(images / "smollm2-curve.png", scale=2)
    dfa.plots.aligned_heatmap(
        tiny,
        scores["transferred"],
        alignment=alignment,
        source_name="llama3-tiny-source",
        target_name="SmolLM2-135M, transferred",
        slider=False,
        width=1100,
    ).write_image(images / "smollm2-transfer.png", scale=2)
    dfa.plots.scores_heatmap(
        scores["gold"], title="SmolLM2-135M: nap-ig-inputs on IOI", width=700, height=620
    ).write_image(images / "smollm2-scores.png", scale=2)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
