"""The same work in this library and in others, on the same model and prompts: time, memory, agreement of the numbers.

    python tests/benchmarks/peers.py                              # TransformerLens' own tools, as installed
    python tests/benchmarks/peers.py --eap FOLDER                 # and node attribution of EAP-IG
    python tests/benchmarks/peers.py --dfa FOLDER                 # and the authors' code: attribution, curve, training

FOLDER is a checkout that you have: of github.com/hannamw/EAP-IG, its ``src`` (``--package`` where it is not called
eap); of github.com/jasonshaoshun/dfa-circuits, the repository. Edges are in edge_peers.py.

Times are CPU time on one thread (seconds on the clock on a GPU), the median of the repeats after a warm-up; peaks are
bytes of the tensors alive at one time beyond the model. Difference: the largest of a score, an f or an entry of W, as a
part of the largest; of scores up to one factor, for some programs divide by the examples twice. Ours runs in the mode that
does what the other does. Where ours is less than five times ahead, what its time goes into is printed below the table.

Both programs name the device "cuda" in their code. Where there is no GPU, they are given the CPU instead; that costs
them a few microseconds for every call of torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import SMALL, Bench, build
from torch.overrides import TorchFunctionMode

import dfa_lens as dfa
from dfa_lens.transfer.recipe import RELEASED

#: Set on a HookedTransformer for programs that hook single heads and the readers' inputs.
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "ungroup_grouped_query_attention")
AHEAD = 5.0
COLUMNS = "peer, work, ours, theirs, theirs / ours, ours peak, theirs, theirs / ours, FE of ours, difference".split(
    ", "
)


@dataclass
class Work:
    """One comparison: two functions without arguments, and how far what they return is apart."""

    peer: str
    name: str
    model: Any  # ours runs on this one
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    difference: Callable[[Any, Any], float]


class Setting:
    """A model with random weights, a copy of it as others need it, and prompts of the indirect-object task."""

    def __init__(self, sizes: dict[str, int], examples: int, device: str = "cpu") -> None:
        self.sizes, self.device = sizes, device
        self.tokenizer = dfa.zoo.load("llama3-tiny-target").tokenizer
        self.pairs = dfa.tasks.load("ioi", self.tokenizer, n=examples, templates=[0])
        rows = texts(self.pairs, self.tokenizer)
        labels = torch.stack([self.pairs.answer, self.pairs.wrong], 1).to(device)
        self.batch = ([clean for clean, _ in rows], [corrupt for _, corrupt in rows], labels)

    def model(self, *, flags: bool = False) -> Any:
        """A HookedTransformer; every one has the same weights."""
        made = build(self.device, **self.sizes)
        made.set_tokenizer(self.tokenizer, default_padding_side="right")
        for flag in FLAGS if flags else ():
            setattr(made.cfg, flag, True)
        return made

    def bridge(self) -> Any:
        """A TransformerBridge of the same shape."""
        from transformers import LlamaConfig, LlamaForCausalLM

        from dfa_lens.models import loading

        names = {"n_layers": "num_hidden_layers", "d_model": "hidden_size", "n_heads": "num_attention_heads"}
        names |= {"n_key_value_heads": "num_key_value_heads", "d_mlp": "intermediate_size", "d_vocab": "vocab_size"}
        torch.manual_seed(0)
        config = LlamaConfig(**{names[key]: size for key, size in self.sizes.items()}, max_position_embeddings=256)
        hf_model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
        return loading._bridge("peers", hf_model, self.tokenizer, torch.float32, self.device)


def texts(pairs: dfa.PromptPairs, tokenizer: Any) -> list[tuple[str, str]]:
    """The prompts as strings; the other program puts the begin token before each."""
    sides = ((pairs.clean, pairs.lengths), (pairs.corrupt, pairs.corrupt_lengths))
    found = [
        [tokenizer.decode(row[1:length]) for row, length in zip(tokens, lengths, strict=True)]
        for tokens, lengths in sides
    ]
    return list(zip(*found, strict=True))


def logit_difference(logits: Any, _: Any, lengths: Any, labels: Any) -> torch.Tensor:
    """What is explained, as EAP-IG's programs want it: a loss, so with the other sign."""
    last = logits[torch.arange(len(logits)), lengths - 1]
    return -(last.gather(1, labels[:, :1]) - last.gather(1, labels[:, 1:])).mean()


class _NoGpu(TorchFunctionMode):
    """The CPU where a program says cuda."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return function(*("cpu" if isinstance(each, str) and each == "cuda" else each for each in args), **kwargs)


def quietly(work: Callable[[], Any]) -> Callable[[], Any]:
    """Without what the program prints, and on the CPU where there is no GPU."""

    def run() -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            if not torch.cuda.is_available():
                stack.enter_context(_NoGpu())
            return work()

    return run


def apart(ours: Any, theirs: Any, *, up_to_a_factor: bool = False) -> float:
    """The largest difference as a part of our largest number."""
    mine, other = (torch.as_tensor(each).detach().double().cpu().flatten() for each in (ours, theirs))
    factor = float((mine * other).sum() / other.square().sum()) if up_to_a_factor else 1.0
    return float((mine - factor * other).abs().max() / mine.abs().max())


# --- TransformerLens -----------------------------------------------------------------------------------------------


def transformer_lens(setting: Setting) -> Iterator[Work]:
    """Attribution patching and activation patching of the installed version, on a bridge.

    Both start from the corrupt run and restore clean activations: ours does with the two sides of each pair exchanged,
    and the other sign.
    """
    from transformer_lens import patching
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    # one each: while ours is measured, the weights of its model have no gradient
    model, other, pairs = setting.bridge(), setting.bridge(), setting.pairs
    exchanged = dfa.PromptPairs(pairs.corrupt, pairs.clean, pairs.answer, pairs.wrong, lengths=pairs.lengths)
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    clean, corrupt = pairs.clean.to(setting.device), pairs.corrupt.to(setting.device)
    answers, wrong = (each.to(setting.device) for each in (pairs.answer, pairs.wrong))

    def difference(logits: Any, rows: Any = slice(None)) -> torch.Tensor:
        last = logits[:, -1]
        return (last.gather(1, answers[rows, None]) - last.gather(1, wrong[rows, None])).mean()

    def one_by_one() -> torch.Tensor:
        # its metric sees one example at a time and is not told which: so one call for each
        total = torch.zeros(len(nodes), dtype=torch.float64)
        for i in range(len(pairs)):
            row = slice(i, i + 1)
            found = attribution_patch(other, clean[row], corrupt[row], partial(difference, rows=row))
            for node, score in found.node_scores.items():
                name = {"embed": "input", "mlp_out": f"m{node.layer}"}.get(node.kind, f"a{node.layer}.h{node.head}")
                total[nodes.position(name)] += score
        return -total / len(pairs)

    for batch_size in (1, len(pairs)):
        ours = partial(dfa.attribute, model, exchanged, method="nap", nodes=nodes, batch_size=batch_size)
        name = f"nap, ours in batches of {batch_size}"
        yield Work("TransformerLens", name, model, ours, one_by_one, lambda a, b: apart(a.values, b))

    heads = dfa.NodeSet.heads_and_mlps(model).where(lambda node: node.kind == "head")

    def restored() -> torch.Tensor:
        with torch.no_grad():
            _, cache = other.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))
            start = difference(other(corrupt))
            return start - patching.get_act_patch_attn_head_out_all_pos(other, corrupt, cache, difference)

    ours = partial(dfa.attribute, model, exchanged, method="exact", nodes=heads, batch_size=len(pairs))
    yield Work("TransformerLens", "exact, heads", model, ours, restored, lambda a, b: apart(a.values, b))


# --- programs by path ----------------------------------------------------------------------------------------------


def nodes_of_eap(setting: Setting, folder: str, package: str = "eap", peer: str = "EAP-IG") -> Iterator[Work]:
    """Node attribution: ``attribute_node(model, graph, batches, metric, method, ig_steps=…)``."""
    sys.path.insert(0, folder)
    graph = importlib.import_module(f"{package}.graph").Graph
    attribute_node = importlib.import_module(f"{package}.attribute_node").attribute_node
    model, other = setting.model(), setting.model(flags=True)
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    modes: dict[str, dict[str, Any]] = {
        "EAP": {"method": "nap"},
        "EAP-IG-inputs": {"method": "nap-ig-inputs", "steps": 5},
        "EAP-IG-activations": {"method": "nap-ig-activations", "steps": 1, "accumulate": "all"},
    }
    for method, mode in modes.items():
        found = graph.from_model(other, node_scores=True)

        def theirs(found: Any = found, method: str = method, steps: int = mode.get("steps", 1)) -> torch.Tensor:
            attribute_node(other, found, [setting.batch], logit_difference, method, ig_steps=steps, quiet=True)
            return found.nodes_scores.clone()

        ours = partial(
            dfa.attribute,
            model,
            setting.pairs,
            nodes=nodes,
            mlp_gradient="input",
            batch_size=len(setting.pairs),
            **mode,
        )
        name = f"{mode['method']}({mode['steps']})" if "steps" in mode else mode["method"]
        yield Work(peer, name, model, ours, quietly(theirs), lambda a, b: apart(a.values, b, up_to_a_factor=True))


def dfa_circuits(setting: Setting, folder: str) -> Iterator[Work]:
    """The authors' program: attribution by its copy of EAP-IG, the curve, and training."""
    root = Path(folder)
    sys.path.insert(0, str(root))
    yield from nodes_of_eap(setting, str(root / "EAP-IG" / "src"), peer="dfa-circuits")
    yield _curve(setting)
    for gated in (False, True):
        yield _training(setting, gated)


def _curve(setting: Setting) -> Work:
    graph = importlib.import_module("eap.graph").Graph
    area = importlib.import_module("MIB_circuit_track.evaluation").evaluate_area_under_curve
    model, other = setting.model(), setting.model(flags=True)
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    scores = dfa.NodeScores(torch.randn(len(nodes), generator=torch.Generator().manual_seed(1)), nodes)
    found = graph.from_model(other, node_scores=True)
    found.nodes_scores[:] = scores.values.to(found.nodes_scores)

    def theirs() -> list[float]:
        return area(other, found, [setting.batch], logit_difference, quiet=True, level="node", absolute=False)[4]

    ours = partial(dfa.faithfulness_curve, model, setting.pairs, scores, protocol="mib", batch_size=len(setting.pairs))
    return Work("dfa-circuits", "curve", model, ours, quietly(theirs), lambda a, b: apart(a.faithfulness, b))


def _training(setting: Setting, gated: bool, steps: int = 4) -> Work:
    """The steps of its training loop; heads are gated only where a flag of TransformerLens is set, which it does not set."""
    aligned = importlib.import_module("differentiable_alignment.model").AlignmentModel
    hooks_of = importlib.import_module("differentiable_alignment.hooks").get_faithfulness_hooks
    loss_of = importlib.import_module("differentiable_alignment.loss").faithfulness_loss
    model, other = setting.model(), setting.model()
    other.cfg.use_attn_result = gated
    source, target = dfa.NodeSet.for_sizes(6, 8), dfa.NodeSet.heads_and_mlps(model)
    s = torch.randn(len(source), generator=torch.Generator().manual_seed(0))
    start = 0.02 * torch.randn(len(source), len(target), generator=torch.Generator().manual_seed(1))
    half = len(setting.pairs) // 2
    batches = [tuple(side[i : i + half] for side in setting.batch[:2]) for i in (0, half)]

    def theirs() -> torch.Tensor:
        alignment = aligned(list(source.names), list(target.names)).to(setting.device)
        alignment.W.data = start.clone().to(setting.device)
        optimizer = torch.optim.Adam(alignment.parameters(), lr=RELEASED.lr)
        for step in range(steps):
            clean, corrupt = batches[step % 2]
            optimizer.zero_grad(set_to_none=True)
            mask = alignment.predict_mask(s.to(setting.device))
            with torch.no_grad():
                kept = lambda name: "hook_result" in name or "hook_mlp_out" in name  # noqa: E731
                logits, cache = other.run_with_cache(clean, names_filter=kept)
            hooks = hooks_of(other, mask, alignment.get_large_component_mapping(), cache)
            masked = other.run_with_hooks(corrupt, fwd_hooks=hooks)
            loss_of(logits, masked, mask, lambda_sparsity=RELEASED.sparsity_weight)[0].backward()
            optimizer.step()
        return alignment.W.detach() - start.to(setting.device)

    recipe = replace(
        RELEASED, steps=steps, batch_size=half, shuffle=False, initial=start, gate_heads=gated, initial_scale=0.02
    )

    def ours() -> torch.Tensor:
        scores = dfa.NodeScores(s, source)
        return dfa.fit(model, {"ioi": scores}, {"ioi": setting.pairs}, recipe=recipe).W - start

    name = f"fit, {steps} steps" + (", heads gated" if gated else "")
    return Work("dfa-circuits", name, model, ours, quietly(theirs), apart)


# --- measuring -----------------------------------------------------------------------------------------------------


def compare(work: Work, setting: Setting, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    bench = Bench(work.model, repeats)
    difference = work.difference(work.ours(), work.theirs())
    seconds = [statistics.median(bench.seconds(each) for _ in range(repeats)) for each in (work.ours, work.theirs)]
    peaks = [bench.peak(each) / 2**20 for each in (work.ours, work.theirs)]
    forward = statistics.median(bench.seconds(bench.forward(setting.pairs)) for _ in range(max(3, repeats)))
    row = [work.peer, work.name, *seconds, seconds[1] / seconds[0], *peaks, peaks[1] / max(peaks[0], 1e-9)]
    return dict(
        zip(["peer", "work", "ours", "theirs", "ratio", "peak", "their_peak", "peak_ratio"], row, strict=True)
    ) | {
        "fe": seconds[0] / forward,
        "difference": difference,
    }


def where_it_goes(work: Work, top: int = 5) -> str:
    """The operations of torch that our time goes into."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as profile:
        work.ours()
    events = profile.key_averages()
    total = sum(getattr(event, key) for event in events) or 1
    largest = sorted(events, key=lambda event: -getattr(event, key))[:top]
    return ", ".join(f"{event.key} {getattr(event, key) / total:.0%}" for event in largest)


def works(setting: Setting, options: argparse.Namespace) -> Iterator[Work]:
    """All comparisons that were asked for."""
    yield from transformer_lens(setting)
    if options.eap:
        yield from nodes_of_eap(setting, options.eap, options.package)
    if options.dfa:
        yield from dfa_circuits(setting, options.dfa)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eap", help="the folder that holds the package eap of a checkout of EAP-IG")
    parser.add_argument("--package", default="eap", help="what it is imported as")
    parser.add_argument(
        "--dfa", help="a checkout of dfa-circuits; in another run than --eap, for both have a package eap"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--examples", type=int, default=8, help="all in one batch")
    parser.add_argument("--layers", type=int, default=SMALL["n_layers"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.eap and options.dfa:
        parser.error("--eap and --dfa in one run: both have a package eap")
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setting = Setting({**SMALL, "n_layers": options.layers}, options.examples, options.device)
        print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
        slow = []
        for work in works(setting, options):
            row = compare(work, setting, options.repeats)
            rows.append(row)
            cells = [row["peer"], row["work"], f"{row['ours']:.2f} s", f"{row['theirs']:.2f} s", f"{row['ratio']:.1f}"]
            cells += [f"{row['peak']:.0f} MiB", f"{row['their_peak']:.0f} MiB", f"{row['peak_ratio']:.1f}"]
            print("| " + " | ".join([*cells, f"{row['fe']:.1f}", f"{row['difference']:.0e}"]) + " |", flush=True)
            if row["ratio"] < AHEAD:
                slow.append(f"{row['peer']}, {row['work']}: {where_it_goes(work)}")
        if slow:
            print(
                f"\nLess than {AHEAD:.0f} times ahead; where our time goes:\n" + "\n".join(f"- {line}" for line in slow)
            )
    return rows


if __name__ == "__main__":
    main()
