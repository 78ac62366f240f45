"""What every operation costs, in forward passes and in bytes: the tables in docs/performance.md.

    python tests/benchmarks/speed.py [--model small wide] [--repeats 5] [--json FILE]
    python tests/benchmarks/speed.py --prefix                  what a shared prefix saves
    python tests/benchmarks/speed.py --scaling                 cost against layers, heads, tokens, examples, vocabulary
    python tests/benchmarks/speed.py --edges                   edges beside nodes of the same passes
    python tests/benchmarks/speed.py --variants                bfloat16 autocast and torch.compile
    python tests/benchmarks/speed.py --overhead                what a pass costs beside its tokens
    python tests/benchmarks/speed.py --model 1b 3b 8b --device cuda --dtype bfloat16 --batch 2x32 32x64

One FE (forward-equivalent) is the time of a plain forward pass, ``model(tokens)`` without gradients and with all
logits, on the same batch in the same process. Times are CPU time on one thread (seconds on the clock on a GPU), the
median of the repeats after a warm-up, each divided by the forward passes measured around it. Bytes are those of the
tensors alive at one time beyond the model, counted operation by operation; "graph" is the same of one forward pass
that keeps its graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dfa_lens as dfa
from dfa_lens.models import hooks, memory
from dfa_lens.models.runner import Runner

SMALL = {"n_layers": 12, "d_model": 512, "n_heads": 8, "n_key_value_heads": 4, "d_mlp": 1408, "d_vocab": 8192}
WIDE = {"n_layers": 4, "d_model": 2048, "n_heads": 32, "n_key_value_heads": 8, "d_mlp": 8192, "d_vocab": 128256}
#: Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B, with random weights.
LLAMA = {
    name: {"n_layers": layers, "d_model": d_model, "n_heads": heads, "n_key_value_heads": 8, "d_mlp": d_mlp}
    | {"d_vocab": 128256}
    for name, layers, d_model, heads, d_mlp in (
        ("1b", 16, 2048, 32, 8192),
        ("3b", 28, 3072, 24, 8192),
        ("8b", 32, 4096, 32, 14336),
    )
}
SHAPES = {"small": SMALL, "wide": WIDE, **LLAMA}


def build(device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """A HookedTransformer of Llama's architecture with random weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        **{"n_ctx": 256, "seed": 0, **sizes},
        d_head=sizes["d_model"] // sizes["n_heads"],
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=sizes["d_model"] // sizes["n_heads"],
        rotary_adjacent_pairs=False,
        device=device,
        dtype=dtype,
        init_weights=True,
        initializer_range=0.02,
    )
    state = torch.get_rng_state()
    with torch.device(device):  # weights of this size are drawn where they are needed
        model = HookedTransformer(config, move_to_device=False).to(device).eval()
    torch.set_rng_state(state)
    return model


def make_pairs(n: int, width: int, vocabulary: int, shared: int = 0) -> dfa.PromptPairs:
    """Random prompts whose first ``shared`` tokens are equal, and whose others all differ."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(1, vocabulary, (n, width), generator=generator)
    corrupt = clean.clone()
    corrupt[:, shared:] = clean[:, shared:] % (vocabulary - 1) + 1
    return dfa.PromptPairs(clean, corrupt, clean[:, 0], clean[:, 0] % (vocabulary - 1) + 1)


class Bench:
    """One model, and what is measured on it."""

    def __init__(self, model: Any, repeats: int) -> None:
        self.model, self.repeats = model, repeats
        self.device = Runner(model).device
        self.vocabulary = int(model.cfg.d_vocab)
        self.scores = dfa.NodeScores(
            torch.randn(54, generator=torch.Generator().manual_seed(0)), dfa.NodeSet.for_sizes(6, 8)
        )
        nodes = dfa.NodeSet.heads_and_mlps(model)
        self.ranking = dfa.NodeScores(torch.randn(len(nodes), generator=torch.Generator().manual_seed(1)), nodes)

    def seconds(self, work: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            return time.perf_counter() - start
        start = time.process_time()
        work()
        return time.process_time() - start

    def forward(self, pairs: dfa.PromptPairs) -> Callable[[], Any]:
        tokens = pairs.clean.to(self.device)

        def work() -> Any:
            with torch.no_grad():
                return self.model(tokens)

        return work

    def ratio(self, work: Callable[[], Any], plain: Callable[[], Any]) -> tuple[float, float]:
        """(seconds, FE) of ``work``: medians, every repeat between two measurements of the plain forward."""
        work()
        plain()
        seconds, ratios = [], []
        for _ in range(self.repeats):
            before = statistics.median(self.seconds(plain) for _ in range(3))
            took = self.seconds(work)
            after = statistics.median(self.seconds(plain) for _ in range(3))
            seconds.append(took)
            ratios.append(2 * took / (before + after))
        return statistics.median(seconds), statistics.median(ratios)

    def peak(self, work: Callable[[], Any]) -> int:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return torch.cuda.max_memory_allocated() - before
        # the weights are turned round in place of themselves: before, or they would be counted twice
        with Runner(self.model).session(passes=9), memory.LiveBytes() as live:
            work()
        return live.peak

    def caches(self, pairs: dfa.PromptPairs) -> int:
        """Bytes of the clean and the corrupt activations, without the padding that the model never has here."""
        nodes = dfa.NodeSet.heads_and_mlps(self.model)
        one = memory.Footprint(Runner(self.model), nodes, pairs.clean.shape[1]).site_bytes
        return 2 * len(pairs) * one

    def graph(self, pairs: dfa.PromptPairs) -> int:
        """Bytes of one forward pass that keeps its graph for the activations."""

        def work() -> None:
            def start(now: torch.Tensor) -> torch.Tensor:
                return now.detach().clone().requires_grad_(True)

            with Runner(self.model).session(), torch.enable_grad():
                Runner(self.model).run(pairs.clean, pairs.lengths, [("hook_embed", start)])

        return self.peak(work)

    def operations(
        self,
        *,
        one_batch: tuple[int, int] | None = None,
        shared: int = 0,
        batch_size: int | None = None,
        **options: Any,
    ) -> dict[str, tuple[dfa.PromptPairs, Callable[[], Any], Callable[[], Any] | None, int]]:
        """Name → pairs, work, the work to be taken off it (a warm-up), and how many units are left."""

        def pairs(n: int, width: int) -> dfa.PromptPairs:
            n, width = one_batch or (n, width)
            return make_pairs(n, width, self.vocabulary, shared)

        def attribute(data: dfa.PromptPairs, method: str, steps: int) -> Callable[[], Any]:
            return lambda: dfa.attribute(
                self.model, data, method=method, steps=steps, batch_size=batch_size or len(data), **options
            )

        def fit(data: dfa.PromptPairs, steps: int) -> Callable[[], Any]:
            return lambda: dfa.fit(
                self.model, {"a": self.scores}, {"a": data}, steps=steps, batch_size=batch_size or len(data), **options
            )

        def curve(data: dfa.PromptPairs, n: int) -> Callable[[], Any]:
            sizes = [round(i * len(self.ranking) / 9) for i in range(10)]
            return lambda: dfa.faithfulness_curve(
                self.model, data, self.ranking, sizes=sizes[1:9], batch_size=batch_size or n, **options
            )

        a, b, c, d = pairs(8, 32), pairs(2, 32), pairs(1, 16), pairs(2, 16)
        return {
            "nap": (a, attribute(a, "nap", 1), None, 1),
            "nap-ig-inputs(5)": (b, attribute(b, "nap-ig-inputs", 5), None, 1),
            "nap-ig-activations(5)": (c, attribute(c, "nap-ig-activations", 5), None, 1),
            "exact": (d, attribute(d, "exact", 1), None, 1),
            "curve, 8 sizes": (d, curve(d, len(d)), None, 1),
            "fit, a step": (b, fit(b, 12), fit(b, 2), 10),
        }

    def busy(self, work: Callable[[], Any]) -> float:
        """The part of the time in which the GPU computes; the rest waits for the next kernel to be launched."""
        from torch.profiler import ProfilerActivity, profile

        alone = self.seconds(work)  # being watched takes time of its own
        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            work()
            torch.cuda.synchronize()
        return sum(each.self_device_time_total for each in watched.key_averages()) / 1e6 / alone

    def measure(self, name: str, entry: Any, *, bytes_too: bool = True) -> dict[str, Any]:
        pairs, work, warm, units = entry
        plain = self.forward(pairs)
        seconds, fe = self.ratio(work, plain)
        if warm is not None:
            warm_seconds, warm_fe = self.ratio(warm, plain)
            seconds, fe = (seconds - warm_seconds) / units, (fe - warm_fe) / units
        row = {"operation": name, "batch": f"{len(pairs)}x{pairs.clean.shape[1]}", "seconds": seconds, "fe": fe}
        if bytes_too:
            peak, caches, graph = self.peak(work), self.caches(pairs), self.graph(pairs)
            row |= {"peak": peak, "caches": caches, "graph": graph, "memory": peak / (caches + graph)}
        if self.device.type == "cuda":
            many = name == "exact"  # hundreds of thousands of kernels, all alike
            row |= {"busy": float("nan") if many else self.busy(work)}
            row |= {"plain_busy": self.busy(plain), "plain": self.seconds(plain)}
        print(_line(row), flush=True)
        return row


def _line(row: dict[str, Any]) -> str:
    cells = [row["operation"], row["batch"], f"{row['seconds']:.3f} s", f"{row['fe']:.2f}"]
    if "peak" in row:
        cells += [f"{row['peak'] / 2**20:.1f} MiB", f"{row['memory']:.2f}"]
    if "busy" in row:
        cells += [f"{row['plain']:.4f} s", f"{row['busy']:.0%}", f"{row['plain_busy']:.0%}"]
    return "| " + " | ".join(cells) + " |"


def wanted(operation: str, options: argparse.Namespace) -> bool:
    return not options.only or operation.split(",", maxsplit=1)[0].split("(", maxsplit=1)[0] in options.only


def operations(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of all operations."""
    rows = []
    head = ["operation", "batch", "time", "FE", "peak", "of caches + graph"]
    head += ["plain", "GPU busy", "plain: busy"] if options.device == "cuda" else []
    for name in options.model:
        bench = Bench(build(options.device, options.dtype, **SHAPES[name]), options.repeats)
        print(f"\n{name}: {SHAPES[name]}\n")
        print(f"| {' | '.join(head)} |\n" + "| --- " * len(head) + "|")
        for batch in options.batch or [None]:
            for operation, entry in bench.operations(one_batch=batch).items():
                if wanted(operation, options):
                    rows.append({"model": name, **bench.measure(operation, entry)})
        del bench
    return rows


def prefixes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """FE against the shared part of the prompts: 16 pairs of 48 tokens in one batch, one pair for the slow methods."""
    bench, rows = Bench(build(options.device, **SMALL), options.repeats), []
    for shared in options.shared:
        print(f"\n{shared} of 48 tokens shared\n")
        for operation in bench.operations():
            if not wanted(operation, options):
                continue
            few = operation in ("nap-ig-activations(5)", "exact")
            found = {}
            for share in (False, True):
                entry = bench.operations(
                    one_batch=(1 if few else 16, 48), shared=shared, batch_size=16, share_prefix=share
                )[operation]
                found[share] = bench.measure(operation, entry, bytes_too=False)
            ratio = found[True]["fe"] / found[False]["fe"]
            print(f"{operation}: {ratio:.2f} of the time with whole prompts")
            rows.append({"shared": shared / 48, **found[True], "whole": found[False]["fe"], "ratio": ratio})
    return rows


BASE = {"n_layers": 4, "d_model": 256, "n_heads": 8, "n_key_value_heads": 8, "d_mlp": 704, "d_vocab": 2048}
FACTORS = {
    "layers": (2, 4, 8, 16),
    "heads": (2, 4, 8, 16, 32),
    "tokens": (8, 16, 32, 64),
    "examples": (8, 16, 32, 64),
    "vocabulary": (2048, 8192, 32768, 131072),
}


def scaling(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds against one factor at a time; the slope is that of the last three points, both axes logarithmic."""
    rows = []
    for factor, values in FACTORS.items():
        for value in values:
            sizes, width, n = dict(BASE), 24, 16
            match factor:
                case "layers":
                    sizes["n_layers"] = value
                case "heads":
                    sizes |= {"n_heads": value, "n_key_value_heads": value}
                case "vocabulary":
                    sizes["d_vocab"] = value
                case "tokens":
                    width = value
                case "examples":
                    n = value
            bench = Bench(build(options.device, **sizes), options.repeats)
            for operation, entry in bench.operations(one_batch=(n, width), batch_size=16).items():
                if operation != "exact" and (operation != "nap-ig-activations(5)" or factor == "layers"):
                    row = bench.measure(operation, entry, bytes_too=factor == "examples")
                    rows.append({"factor": factor, "value": value, **row})
    for factor in FACTORS:
        for operation in dict.fromkeys(row["operation"] for row in rows if row["factor"] == factor):
            own = [row for row in rows if (row["factor"], row["operation"]) == (factor, operation)]
            x, y = np.log([row["value"] for row in own[-3:]]), np.log([row["seconds"] for row in own[-3:]])
            slope = float(np.polyfit(x, y, 1)[0])
            for row in own:
                row["slope"] = slope
            print(f"| {factor} | {operation} | {slope:.2f} |")
    return rows


def scaling_figure(rows: list[dict[str, Any]]) -> Any:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from dfa_lens.plots import style

    figure = make_subplots(cols=len(FACTORS), shared_yaxes=True, subplot_titles=list(FACTORS), horizontal_spacing=0.02)
    names = list(dict.fromkeys(row["operation"] for row in rows))
    for column, factor in enumerate(FACTORS, 1):
        for name, color in zip(names, style.LINES, strict=False):
            own = [row for row in rows if (row["factor"], row["operation"]) == (factor, name)]
            x, y = [row["value"] for row in own], [row["seconds"] for row in own]
            line = go.Scatter(x=x, y=y, name=name, line={"color": color}, legendgroup=name, showlegend=column == 1)
            figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(type="log", dtick=1, **style.AXIS, row=1, col=column)
    figure.update_yaxes(type="log", dtick=1, **style.AXIS)
    figure.update_yaxes(title="CPU seconds", row=1, col=1)
    style.layout(figure, None, width=1100, height=360)
    figure.update_layout(legend={"orientation": "h", "y": -0.15}, margin={"t": 40, "b": 70})
    return figure


EDGES = {"eap": ("nap", 1, 8), "eap-ig-inputs": ("nap-ig-inputs", 5, 2)}


def edges(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What edges cost beyond the nodes of the same passes, in FE and as a part of [batch, pos, writers, d_model]."""
    rows = []
    for name in options.model:
        model = build(options.device, options.dtype, **SHAPES[name])
        bench, nodes = Bench(model, options.repeats), dfa.NodeSet.heads_and_mlps(model, with_input=True)
        print(f"\n{name}: {SHAPES[name]}\n")
        print(
            "| method | batch | FE, nodes | FE, edges | beyond | peak beyond | of the tensor |\n" + "| --- " * 7 + "|"
        )
        for method, (beside, steps, n) in EDGES.items():

            def both(data: dfa.PromptPairs, method: str = method, beside: str = beside, steps: int = steps) -> Any:
                settings: dict[str, Any] = {"steps": steps, "batch_size": len(data)}
                return (
                    lambda: dfa.attribute(model, data, method=beside, nodes=nodes, **settings),
                    lambda: dfa.attribute_edges(model, data, method=method, **settings),
                )

            pairs = make_pairs(n, 32, bench.vocabulary)
            with Runner(model).session(passes=9):
                fe = [bench.ratio(work, bench.forward(pairs))[1] for work in both(pairs)]
            for size in (n, 16):
                data = make_pairs(size, 32, bench.vocabulary)
                beyond = bench.peak(both(data)[1]) - bench.peak(both(data)[0])
                tensor = data.clean.numel() * len(nodes) * model.cfg.d_model * options.dtype.itemsize
                row = {"model": name, "method": method, "batch": f"{size}x32", "beyond": beyond, "tensor": tensor}
                cells = [method, row["batch"], *[""] * 3, f"{beyond / 2**20:.1f} MiB", f"{beyond / tensor:.3f}"]
                if size == n:
                    row |= {"fe_nodes": fe[0], "fe_edges": fe[1]}
                    cells[2:5] = [f"{fe[0]:.2f}", f"{fe[1]:.2f}", f"{fe[1] - fe[0]:.2f}"]
                print("| " + " | ".join(cells) + " |", flush=True)
                rows.append(row)
    return rows


def variants(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What was tried: inference mode, bfloat16 autocast, torch.compile; seconds of a gated pass, beside a plain one."""
    bench = Bench(build(options.device, **SMALL), options.repeats)
    model, nodes = bench.model, dfa.NodeSet.heads_and_mlps(bench.model)
    pairs = make_pairs(8, 32, bench.vocabulary)
    corrupt: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        Runner(model).run(pairs.corrupt, pairs.lengths, hooks.record_hooks(nodes, corrupt))
    tokens, device = pairs.clean.to(bench.device), bench.device.type
    gates = hooks.gate_hooks(nodes, torch.full((len(nodes),), 0.5), corrupt=corrupt)

    def gated() -> Any:
        return Runner(model).run(tokens, pairs.lengths, gates)

    def under(context: Callable[[], Any], work: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with context():
                return work()

        return inside

    rows: list[dict[str, Any]] = []
    compiled = torch.compile(model)
    with Runner(model).session(passes=9):
        works = {
            "plain, no_grad": under(torch.no_grad, lambda: model(tokens)),
            "plain, compiled": under(torch.no_grad, lambda: compiled(tokens)),
            "gated, no_grad": under(torch.no_grad, gated),
            "gated, inference_mode": under(torch.inference_mode, gated),
            "gated, bfloat16 autocast": under(
                lambda: torch.autocast(device, torch.bfloat16), under(torch.no_grad, gated)
            ),
            "gated, compiled": under(torch.no_grad, lambda: Runner(compiled).run(tokens, pairs.lengths, gates)),
        }
        for name, work in works.items():
            try:
                start = time.perf_counter()
                work()
                first = time.perf_counter() - start
                seconds = statistics.median(bench.seconds(work) for _ in range(options.repeats))
            except Exception as error:  # what does not run is a finding, too
                print(f"| {name} | {type(error).__name__}: {str(error)[:120]!r} |")
                continue
            print(f"| {name} | first call {first:.1f} s | {seconds:.3f} s |", flush=True)
            rows.append({"variant": name, "first": first, "seconds": seconds})
    return rows


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a gated pass with gradients costs beside its tokens, in tokens: 2 against 16 prompts of 16 tokens."""
    rows = []
    shipped = ("llama3-tiny-target", "qwen2.5-tiny-target")
    for name, model in (("small", build(**SMALL)), *((each, dfa.zoo.load(each)) for each in shipped)):
        bench, nodes = Bench(model, options.repeats), dfa.NodeSet.heads_and_mlps(model)
        seconds = {}
        for n in (2, 16):
            pairs, corrupt = make_pairs(n, 16, bench.vocabulary), dict[str, torch.Tensor]()
            with torch.no_grad():
                Runner(model).run(pairs.corrupt, pairs.lengths, hooks.record_hooks(nodes, corrupt))

            def work(n: int = n, pairs: Any = pairs, corrupt: Any = corrupt) -> None:
                mask = torch.full((n, len(nodes)), 0.5, requires_grad=True)
                gates = hooks.gate_hooks(nodes, mask, corrupt=corrupt)
                logits = Runner(model).run(pairs.clean, pairs.lengths, gates)
                torch.autograd.grad(logits.logsumexp(-1).sum(), [mask])

            with Runner(model).session(passes=9):
                work()
                seconds[n] = statistics.median(bench.seconds(work) for _ in range(options.repeats))
        a_token = (seconds[16] - seconds[2]) / (14 * 16)
        rows.append({"model": name, "tokens": seconds[2] / a_token - 32})
        print(f"| {name} | {rows[-1]['tokens']:.0f} tokens |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    for name in ("prefix", "scaling", "edges", "variants", "overhead"):
        what.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--model", nargs="*", default=["small", "wide"], choices=list(SHAPES))
    parser.add_argument("--only", nargs="*", help="nap, nap-ig-inputs, nap-ig-activations, exact, curve, fit")
    parser.add_argument("--shared", nargs="*", type=int, default=[0, 16, 32, 40], help="of 48 tokens, for --prefix")
    parser.add_argument(
        "--batch",
        nargs="*",
        type=lambda text: tuple(int(n) for n in text.split("x")),
        help="pairs x tokens for every operation, 32x64; default: small ones of their own",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="with --scaling")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    other = {"prefix": prefixes, "scaling": scaling, "edges": edges, "variants": variants, "overhead": overhead}
    rows = next((work for name, work in other.items() if getattr(options, name)), operations)(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.figure:
        scaling_figure(rows).write_image(options.figure, scale=2)


if __name__ == "__main__":
    main()
