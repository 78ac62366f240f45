"""What the paper's six models need: the table in the README.

    python tests/benchmarks/memory.py
    python tests/benchmarks/memory.py --edges --pairs 64    # what edges need: docs/performance.md
    python tests/benchmarks/memory.py --large --pairs 64 --batch-size 8    # 8B and 70B: docs/large-models.md

The weights are not needed, only the shapes. Each model is built with random weights and one, two and three layers, and
``dfa.estimate`` is asked about it; what a layer adds is the same for every layer, so the full model follows. The weights
are counted on the meta device. ``--large`` builds models of an eighth and a quarter of the width, Hugging Face's as they
are, and goes on from there to the whole width as well: all that is kept has a part that grows with the width and one
(the vocabulary's logits) that does not.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import dfa_lens as dfa
from dfa_lens.models import loading
from dfa_lens.zoo.tokenizer import build

LLAMA = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
QWEN = {"vocab_size": 151936, "rope_theta": 1000000.0, "max_position_embeddings": 32768}
SHAPES = {  # layers, heads, key-value heads, d_model, d_mlp, d_head, tied embeddings; from the public config.json files
    "Llama-3.2-1B": (LlamaConfig, LLAMA, 16, 32, 8, 2048, 8192, 64, True),
    "Llama-3.2-3B": (LlamaConfig, LLAMA, 28, 24, 8, 3072, 8192, 128, True),
    "Llama-3.1-8B": (LlamaConfig, LLAMA, 32, 32, 8, 4096, 14336, 128, False),
    "Qwen2.5-0.5B": (Qwen2Config, QWEN, 24, 14, 2, 896, 4864, 64, True),
    "Qwen2.5-1.5B": (Qwen2Config, QWEN, 28, 12, 2, 1536, 8960, 128, True),
    "Qwen2.5-3B": (Qwen2Config, QWEN, 36, 16, 2, 2048, 11008, 128, True),
}
LARGE = {
    "Llama-3.1-8B": SHAPES["Llama-3.1-8B"],
    "Llama-3.1-70B": (LlamaConfig, LLAMA, 80, 64, 8, 8192, 28672, 128, False),
}
GIB = 2.0**30


def config(name: str, n_layers: int) -> LlamaConfig | Qwen2Config:
    kind, common, _, heads, kv, d_model, d_mlp, d_head, tied = SHAPES[name]
    return kind(
        **common,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        head_dim=d_head,
        tie_word_embeddings=tied,
    )


def estimate(name: str, n_layers: int, n: int, width: int, batch_size: int, edges: bool = False) -> dfa.Estimate:
    torch.manual_seed(0)
    hf_model = AutoModelForCausalLM.from_config(
        config(name, n_layers), dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    model = loading._bridge(name, hf_model, build(begin_of_text=False), torch.bfloat16, "cpu")
    tokens = torch.ones(n, width, dtype=torch.long)
    pairs = dfa.PromptPairs(tokens, tokens + 1, tokens[:, 0], tokens[:, 0] + 1)
    return dfa.estimate(model, pairs, batch_size=batch_size, edges=dfa.EdgeSet.of_model(model) if edges else None)


def at_full_depth(few: list[dfa.Estimate], n_layers: int, operation: str, what: str) -> float:
    """From one, two and three layers."""
    one, two, three = (getattr(found[operation], what) for found in few)
    if not abs((three - two) - (two - one)) <= 0.02 * max(abs(three - two), 2**20):
        raise SystemExit(f"{operation} {what}: a layer does not always add the same ({one}, {two}, {three})")
    return two + (n_layers - 2) * (two - one)


def of_edges(name: str, few: list[dfa.Estimate], n: int) -> str:
    """The row of a model: edges, passes of one example, GiB beside the weights."""
    n_layers, heads, kv = SHAPES[name][2:5]
    need = few[1]["attribute_edges"]
    peaks = []
    for operation in ("attribute_edges", "faithfulness_curve"):
        grows = sum(at_full_depth(few, n_layers, operation, what) for what in ("cache_bytes", "gradient_bytes"))
        peaks.append((grows + few[1][operation].working_bytes) / GIB)
    counts = len(dfa.EdgeSet(n_layers, heads, kv)), len(dfa.EdgeSet(n_layers, heads))
    cells = [f"{counts[0]:,}", f"{counts[1]:,}", str(need.forward_equivalents // n), *(f"{p:.1f}" for p in peaks)]
    return f"| {name} | {' | '.join(cells)} |"


def narrow(name: str, share: int, n_layers: int, options: argparse.Namespace, **more: object) -> dfa.Estimate:
    """The same of a model with a part of the width, as Hugging Face has it."""
    kind, common, _, heads, kv, d_model, d_mlp, d_head, tied = LARGE[name]
    sizes = {"hidden_size": d_model // share, "intermediate_size": d_mlp // share, "num_hidden_layers": n_layers}
    sizes |= {"num_attention_heads": heads // share, "num_key_value_heads": kv // share, "head_dim": d_head}
    torch.manual_seed(0)
    made = kind(**common, **sizes, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
    tokens = torch.ones(options.pairs, options.tokens, dtype=torch.long)
    pairs = dfa.PromptPairs(tokens, tokens + 1, tokens[:, 0], tokens[:, 0] + 1)
    return dfa.estimate(model, pairs, batch_size=options.batch_size, **more)


def large(options: argparse.Namespace) -> None:
    print("| model | weights | attribute | curve | fit | fit, cache on the CPU | the same, checkpointing |")
    print("| --- " * 7 + "|")
    for name, (kind, common, n_layers, heads, kv, d_model, d_mlp, d_head, tied) in LARGE.items():
        found = {
            (share, layers, twice): narrow(name, share, layers, options, cache="cpu", checkpointing=twice)
            for share in (8, 4)
            for layers in (1, 2, 3)
            for twice in (False, True)
        }

        def at_full_size(
            operation: str, twice: bool = False, found: Any = found, n_layers: int = n_layers, beside: float = 0.0
        ) -> float:
            widths = []
            for share in (8, 4):
                few = [found[share, layers, twice] for layers in (1, 2, 3)]
                grows = sum(at_full_depth(few, n_layers, operation, what) for what in ("cache_bytes", "gradient_bytes"))
                widths.append(grows + few[1][operation].working_bytes)
            return (widths[0] + 7 * (widths[1] - widths[0])) / GIB + beside  # from 1/8 and 2/8 to 8/8

        with torch.device("meta"):
            whole = kind(
                **common,
                num_hidden_layers=n_layers,
                num_attention_heads=heads,
                num_key_value_heads=kv,
                hidden_size=d_model,
                intermediate_size=d_mlp,
                head_dim=d_head,
                tie_word_embeddings=tied,
            )
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(whole).parameters())
        # heads at d_head each, MLP blocks at d_model, two bytes a number
        cache = 2 * options.pairs * options.tokens * n_layers * (heads * d_head + d_model) / GIB
        cells = [at_full_size("attribute"), at_full_size("faithfulness_curve"), at_full_size("fit", beside=cache)]
        cells += [at_full_size("fit"), at_full_size("fit", True)]
        print(f"| {name} | {2 * parameters / GIB:.0f} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=320, help="prompt pairs: five tasks of 64")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("models", nargs="*", default=list(SHAPES))
    parser.add_argument("--edges", action="store_true", help="what eap-ig-inputs and curves of edges need instead")
    parser.add_argument("--large", action="store_true", help="8B and 70B instead, from narrower models")
    options = parser.parse_args()
    if options.large:
        large(options)
        return
    if options.edges:
        print("| model | edges | edges per head | passes | attribute_edges | curve |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in options.models:
            sizes = (options.pairs, options.tokens, options.batch_size)
            few = [estimate(name, layers, *sizes, edges=True) for layers in (1, 2, 3)]
            print(of_edges(name, few, options.pairs), flush=True)
        return
    print("| model | nodes | parameters | weights | attribute | fit | fit, cache on the CPU | curve |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        n_layers, heads = SHAPES[name][2:4]
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config(name, n_layers), dtype=torch.bfloat16)
        parameters = sum(p.numel() for p in whole.parameters())
        few = []
        for layers in (1, 2, 3):
            few.append(estimate(name, layers, options.pairs, options.tokens, options.batch_size))
            gc.collect()

        def peak(
            operation: str, *, without_cache: float = 0, few: list[dfa.Estimate] = few, n_layers: int = n_layers
        ) -> float:
            grows = sum(at_full_depth(few, n_layers, operation, what) for what in ("cache_bytes", "gradient_bytes"))
            return (grows - without_cache + few[1][operation].working_bytes) / GIB

        # all but one batch of the activations can live in main memory
        per_example = at_full_depth(few, n_layers, "faithfulness_curve", "cache_bytes") / options.batch_size
        on_cpu = options.pairs * (per_example - 3 * 4 * SHAPES[name][1]["vocab_size"])
        weights = 2 * parameters / GIB
        print(
            f"| {name} | {n_layers * (heads + 1)} | {parameters / 1e9:.2f} B | {weights:.1f} | {peak('attribute'):.1f} "
            f"| {peak('fit'):.1f} | {peak('fit', without_cache=on_cpu):.1f} | {peak('faithfulness_curve'):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
