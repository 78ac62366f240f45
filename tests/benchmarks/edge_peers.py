"""Edge attribution beside a public program with EAP-IG's interface: CPU time, memory, and whether the numbers agree.

    python tests/benchmarks/edge_peers.py --path FOLDER [--package eap]

FOLDER is a checkout of github.com/hannamw/EAP-IG (its ``src``), or any other with its ``graph.Graph`` and
``attribute.attribute`` in a package. Both score the same prompts of the indirect-object task with per-head readers and
the same steps, on a model of random weights with 12 layers, on one thread. The other program needs three flags of a
HookedTransformer, and a fourth where query heads share keys and values; it gets a model of its own with all four set.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import warnings
from functools import partial
from typing import Any, get_args

import torch
from peers import FLAGS, logit_difference, texts
from speed import SMALL, Bench, build

import dfa_lens as dfa
from dfa_lens.attribution.edges import StepPoints

#: our method → theirs, and the steps
METHODS = {"eap": ("EAP", 1), "eap-ig-inputs": ("EAP-IG-inputs", 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="the folder that holds the package")
    parser.add_argument("--package", default="eap", help="what it is imported as")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, default=8, help="all in one batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, options.path)
    graph = importlib.import_module(f"{options.package}.graph")
    attribute = importlib.import_module(f"{options.package}.attribute").attribute

    tokenizer = dfa.zoo.load("llama3-tiny-target").tokenizer
    model, other = build(**SMALL), build(**SMALL)
    other.load_state_dict(model.state_dict())
    other.set_tokenizer(tokenizer, default_padding_side="right")
    for flag in FLAGS:
        setattr(other.cfg, flag, True)
    pairs = dfa.tasks.load("ioi", tokenizer, n=options.examples, templates=[0])
    rows = texts(pairs, tokenizer)
    batch = (
        [clean for clean, _ in rows],
        [corrupt for _, corrupt in rows],
        torch.stack([pairs.answer, pairs.wrong], 1),
    )
    bench = Bench(model, options.repeats)
    print(
        "| method | ours, CPU s | theirs | theirs / ours | ours, peak | theirs | theirs / ours | largest difference |"
    )
    print("| --- " * 8 + "|")
    for method, (name, steps) in METHODS.items():
        settings = {"readers": "per-head", "batch_size": len(pairs), "steps": steps}
        found = graph.Graph.from_model(other)
        theirs = partial(attribute, other, found, [batch], logit_difference, name, ig_steps=steps, quiet=True)
        theirs()
        points = get_args(StepPoints)  # its releases take the steps from either end
        both = [partial(dfa.attribute_edges, model, pairs, method=method, step_points=at, **settings) for at in points]
        difference, ours = min(((compare(work(), found), work) for work in both), key=lambda each: each[0])
        seconds = [statistics.median(bench.seconds(work) for _ in range(options.repeats)) for work in (ours, theirs)]
        peaks = [bench.peak(work) / 2**20 for work in (ours, theirs)]
        cells = [method, *(f"{each:.2f}" for each in seconds), f"{seconds[1] / seconds[0]:.1f}"]
        cells += [*(f"{each:.0f} MiB" for each in peaks), f"{peaks[1] / peaks[0]:.1f}", f"{difference:.1e}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def compare(ours: dfa.EdgeScores, graph: Any) -> float:
    """The largest difference, as a part of the largest score, up to one factor: some divide by the examples twice."""
    scores = torch.zeros(ours.values.shape)
    rows = {name: i for i, name in enumerate(ours.writers)}
    columns = {name: i for i, name in enumerate(ours.readers)}
    for name, edge in graph.edges.items():
        writer, reader = name.split("->")
        scores[rows[writer], columns[reader]] = float(edge.score)
    mine = ours.values.nan_to_num()
    factor = float((mine * scores).sum() / scores.square().sum())
    return float((mine - factor * scores).abs().max() / mine.abs().max())


if __name__ == "__main__":
    main()
