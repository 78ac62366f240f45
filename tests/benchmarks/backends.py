"""The three classes of models beside each other: the same numbers, and what each costs.

    python tests/benchmarks/backends.py --numbers [--n 32]     six tasks on the shipped models: scores, CPR and CMD
    python tests/benchmarks/backends.py --cost [--layers 2]    nap and nap-ig-inputs on a model shaped like Llama-3.2 1B
    python tests/benchmarks/backends.py --cost --shape small --layers 12 --batch 8 --width 32

Numbers: the largest difference from the bridge, scores as a part of the largest score of their task. Cost: FE and bytes as
in ``speed.py``; each class in a process of its own, all from one checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from speed import SHAPES, Bench, make_pairs

import dfa_lens as dfa
from dfa_lens.models.loading import transformer_lens_major

BACKENDS = ("bridge", "transformers") if transformer_lens_major() >= 4 else ("bridge", "hooked", "transformers")
METHODS = ("nap", "nap-ig-inputs")


def numbers(n: int) -> None:
    """What differs on the shipped models."""
    for name in dfa.zoo.names():
        worst = {backend: {"scores": 0.0, "CPR": 0.0, "CMD": 0.0} for backend in BACKENDS[1:]}
        models = {backend: dfa.load_model(name, backend=backend) for backend in BACKENDS}
        for task in dfa.tasks.names():
            pairs = dfa.tasks.load(task, models["bridge"].tokenizer, n=n)
            for method in METHODS:
                found = {backend: _numbers(model, pairs, method) for backend, model in models.items()}
                scores, cpr, cmd = found["bridge"]
                print(f"{name:22} {task:14} {method:14} CPR {cpr:.4f} CMD {cmd:.4f}")
                for backend, own in worst.items():
                    other = found[backend]
                    off = float((other[0] - scores).abs().max() / scores.abs().max())
                    own["scores"] = max(own["scores"], off)
                    own["CPR"], own["CMD"] = max(own["CPR"], abs(other[1] - cpr)), max(own["CMD"], abs(other[2] - cmd))
        for backend, own in worst.items():
            print(f"{name:22} {backend:14} " + ", ".join(f"{key} {value:.1e}" for key, value in own.items()))


def _numbers(model: Any, pairs: dfa.PromptPairs, method: str) -> tuple[torch.Tensor, float, float]:
    scores = dfa.attribute(model, pairs, method=method)
    curve = dfa.faithfulness_curve(model, pairs, scores)
    return scores.values, float(curve.cpr), float(curve.cmd)


def cost(shape: dict[str, int], layers: int, batch: int, width: int) -> None:
    """What each class costs, in a process of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dfa_lens.zoo.tokenizer import build

    config = LlamaConfig(
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_mlp"],
        num_hidden_layers=layers,
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_key_value_heads"],
        vocab_size=shape["d_vocab"],
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        build(begin_of_text=False).save_pretrained(folder)
        for backend in BACKENDS:
            command = [sys.executable, __file__, "--one", folder, backend, str(batch), str(width)]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            for work, own in found.items():
                print(f"{backend:14} {work:16} {own['FE']:6.2f} FE {own['MiB']:8.1f} MiB", flush=True)


def one(folder: str, backend: str, batch: int, width: int) -> None:
    """One class: FE and bytes of every method, as JSON."""
    model = dfa.load_model(Path(folder), backend=backend)
    bench, pairs = Bench(model, repeats=3), make_pairs(batch, width, int(model.cfg.d_vocab))
    found = {}
    for method in METHODS:

        def work(method: str = method) -> Any:
            return dfa.attribute(model, pairs, method=method, batch_size=batch)

        fe = bench.ratio(work, bench.forward(pairs))[1]
        found[method] = {"FE": fe, "MiB": bench.peak(work) / 2**20}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", action="store_true")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--one", nargs=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        one(args.one[0], args.one[1], int(args.one[2]), int(args.one[3]))
    if args.numbers:
        numbers(args.n)
    if args.cost:
        cost(SHAPES[args.shape], args.layers, args.batch, args.width)


if __name__ == "__main__":
    main()
