"""The chain on the command line: attribute on the source, fit, transfer, evaluate on the target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfa_lens.cli import options as option
from dfa_lens.cli import reading
from dfa_lens.cli.app import app
from dfa_lens.cli.writing import records, require_suffix, say, written
from dfa_lens.data.files import write_atomically
from dfa_lens.errors import DfaError, TaskError

#: How many edges of a circuit are printed; JSON has all.
MOST_EDGES = 20


def save_scores(scores: Any, out: Path, suffix: str, as_json: bool) -> None:
    """Write scores, or measurements, as what the file's name says."""
    with written(out, as_json) as path:
        if suffix == ".csv":
            write_atomically(path, scores.to_frame().to_csv(index=False).encode())
        elif suffix in reading.MIB_SUFFIXES:
            scores.to_mib(path)
        else:
            scores.save(path)


def suffix_of_scores(out: Path, edges: bool) -> str:
    """What scores will be written as, asked before the work."""
    what = f"Scores of {'edges' if edges else 'nodes'}"
    return require_suffix(out, what, (".safetensors", ".csv", *reading.MIB_SUFFIXES))


def say_scores(scores: Any, out: Path, as_json: bool) -> None:
    """Print the ten best, or all as JSON."""
    table = scores.to_frame()
    best = table.nsmallest(10, "rank").to_string(index=False)
    facts = {"out": str(out), "scores": records(table) if as_json else [], "meta": scores.meta}
    say(f"{best}\n{out} written.", facts, as_json=as_json, out=out)


@app.command(
    epilog="Example: dfa-lens attribute --model llama3-tiny-source --task ioi --out ioi-source.safetensors; "
    "of edges: dfa-lens attribute --edges --model llama3-tiny-source --task ioi --out ioi-edges.safetensors"
)
def attribute(
    model: option.ModelOption,
    out: option.OutOption,
    task: option.TaskOption = None,
    pairs: option.PairsOption = None,
    edges: Annotated[bool, typer.Option("--edges", help="Score edges, not nodes.")] = False,
    nodes: option.NodesOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="nap, nap-ig-inputs (default), nap-ig-activations, exact, expected-gradients, relp, attnlrp, gim, "
            "atp-star, matryoshka, node-pruning or ugs; of edges: eap, eap-ig-inputs (default), eap-ig-activations, "
            "exact, expected-gradients, relp, attnlrp, gim, matryoshka, edge-pruning or ugs."
        ),
    ] = None,
    integration_steps: Annotated[int, typer.Option(help="Points on the path that gradients are averaged over.")] = 5,
    readers: Annotated[
        str, typer.Option(help="Of edges: grouped, or per-head, as published results and MIB's files have them.")
    ] = "grouped",
    step_points: Annotated[
        str, typer.Option(help="Of edges: to-clean (k = 1 … steps) or from-corrupt (0 … steps - 1).")
    ] = "to-clean",
    metric: option.MetricOption = "logit-difference",
    ablation: option.AblationOption = "corrupt",
    direction: Annotated[
        str,
        typer.Option(help="noising breaks a node or edge of the clean run, denoising repairs one of the corrupt run."),
    ] = "noising",
    split: option.SplitOption = "train",
    examples: option.ExamplesOption = 64,
    seed: Annotated[int, typer.Option(help="Of prompts, and of methods that draw random numbers.")] = 0,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: option.BatchOption = "16",
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Score every node of a model on a task, or every edge, and save the scores.

    The file is ours (.safetensors), a table (.csv), or MIB's (.json or .pt; of edges with --readers per-head).
    """
    import dfa_lens as dfa

    if not edges and (readers, step_points) != ("grouped", "to-clean"):
        raise DfaError("--readers and --step-points are options of edges: add --edges.")
    if edges and nodes:
        raise DfaError("--nodes chooses nodes; of edges all are scored.")
    suffix = suffix_of_scores(out, edges)
    if edges and readers == "grouped" and suffix in reading.MIB_SUFFIXES:
        raise DfaError(f"MIB's graph files ({suffix}) hold per-head readers: add --readers per-head.")
    loaded = reading.model(model, backend, device, dtype)
    prompts = reading.pairs(loaded, task, pairs, split=split, examples=examples, seed=seed, collection=collection)
    size = option.batch_size_of(batch_size)
    common: dict[str, Any] = {"steps": integration_steps, "batch_size": size, "progress": option.bars(quiet)}
    common |= {"ablation": ablation, "direction": direction, "metric": reading.metric(metric, loaded), "seed": seed}
    scores: Any
    if edges:
        scores = dfa.attribute_edges(
            loaded,
            prompts,
            method=method or "eap-ig-inputs",
            readers=readers,  # type: ignore[arg-type]
            step_points=step_points,  # type: ignore[arg-type]
            **common,
        )
    else:
        chosen = reading.nodes(loaded, nodes)
        scores = dfa.attribute(loaded, prompts, method=method or "nap-ig-inputs", nodes=chosen, **common)
    save_scores(scores, out, suffix, as_json)
    say_scores(scores, out, as_json)


@app.command(
    epilog="Example: dfa-lens fit --target llama3-tiny-target --scores ioi=ioi-source.safetensors --out w.safetensors"
)
def fit(
    target: option.ModelOption,
    scores: Annotated[list[str], typer.Option(help="TASK=FILE, source scores of a training task; repeat for several.")],
    out: option.OutOption,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 200,
    sparsity_weight: Annotated[float, typer.Option(help="The weight of the mean mask in the loss.")] = 10.0,
    form: Annotated[
        str,
        typer.Option(
            help="full, kernel, full+bias, low-rank, block or depth-band: what W is made of; of edges: full or free."
        ),
    ] = "full",
    objective: Annotated[str, typer.Option(help="sparse, target-size or matryoshka.")] = "sparse",
    ablation: option.AblationOption = "corrupt",
    examples: option.ExamplesOption = 64,
    seed: option.SeedOption = 0,
    pairs: option.NamedPairsOption = None,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(help="Examples of each step.")] = 16,
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Learn an alignment from source scores to a target model, and save it; scores of edges give one of edges."""
    import dfa_lens as dfa

    require_suffix(out, "An alignment", (".safetensors",))
    recipe = dfa.Recipe(
        form=form,
        objective=objective,
        sparsity_weight=sparsity_weight,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        ablation=ablation,
    )
    loaded = {task: reading.scores(path) for task, path in reading.named(scores, "Scores").items()}
    own = reading.own_tasks(pairs)
    foreign = next((task for task in own if task not in loaded), None)
    if foreign is not None:
        raise TaskError(f"There are pairs of task {foreign!r}, but no scores: add --scores {foreign}=FILE.")
    model = reading.model(target, backend, device, dtype)
    prompts = {
        task: own[task](model.tokenizer, split="train" if own[task].has_splits else None, n=examples, seed=seed)
        if task in own
        else reading.pairs(model, task, None, split="train", examples=examples, seed=seed, collection=collection)
        for task in loaded
    }
    learned = dfa.fit(model, loaded, prompts, recipe=recipe, progress=option.bars(quiet))
    with written(out, as_json) as path:
        learned.save(path)
    facts = {"out": str(out), "tasks": list(loaded), "last": learned.history[-1] if learned.history else {}}
    say(f"{learned}; {out} written.", facts | {"meta": learned.meta}, as_json=as_json, out=out)


@app.command(
    epilog="Example: dfa-lens transfer --alignment w.safetensors --scores ioi-source.safetensors "
    "--out ioi-target.safetensors"
)
def transfer(
    alignment: Annotated[Path, typer.Option(help="A saved alignment.")],
    scores: Annotated[Path, typer.Option(help="Saved source scores, of nodes or of edges as the alignment is.")],
    out: option.OutOption,
    as_json: option.JsonOption = False,
) -> None:
    """Carry source scores to the target, and save them."""
    import dfa_lens as dfa

    found = reading.kind(alignment)
    if "scores" in found:
        raise DfaError(f"{alignment} holds scores, not an alignment: are --alignment and --scores swapped?")
    carrier = (dfa.EdgeAlignment if "edge" in found else dfa.Alignment).load(alignment)
    given = reading.scores(scores)
    of_edges = isinstance(carrier, dfa.EdgeAlignment)
    if isinstance(given, dfa.EdgeScores) != of_edges:
        raise DfaError(
            f"{scores} holds {given!r}, and {alignment} an {carrier!r}: one is of edges, the other of nodes."
        )
    suffix = suffix_of_scores(out, of_edges)
    circuit = carrier.transfer(given)
    save_scores(circuit, out, suffix, as_json)
    say_scores(circuit, out, as_json)


@app.command(epilog="Example: dfa-lens evaluate --model llama3-tiny-target --scores ioi-target.safetensors --task ioi")
def evaluate(
    model: option.ModelOption,
    scores: Annotated[
        Path, typer.Option(help="Saved scores of this model's nodes or edges, a table of nodes, or one of MIB's files.")
    ],
    task: option.TaskOption = None,
    pairs: option.PairsOption = None,
    protocol: Annotated[str, typer.Option(help="nodes or mib.")] = "nodes",
    ranking: Annotated[
        str | None,
        typer.Option(help="signed (for CPR) or absolute (for CMD); default: the scores' own, or signed."),
    ] = None,
    selection: Annotated[str, typer.Option(help="Of edges: top, or greedy, the best that lead to the logits.")] = "top",
    metric: option.MetricOption = "logit-difference",
    control: option.ControlOption = False,
    areas: Annotated[
        bool, typer.Option("--areas", help="Also print the areas on a logarithmic axis, and under the metric itself.")
    ] = False,
    ablation: option.AblationOption = "corrupt",
    direction: Annotated[
        str, typer.Option(help="denoising keeps the best and leaves the others out, noising the reverse.")
    ] = "denoising",
    faithful: Annotated[float, typer.Option(help="Name the smallest circuit that is so faithful.")] = 0.9,
    split: option.SplitOption = "test",
    examples: option.ExamplesOption = 64,
    seed: option.SeedOption = 0,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: option.BatchOption = "16",
    out: option.MaybeOutOption = None,
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Measure a circuit: its faithfulness curve, CPR and CMD, and the smallest circuit that is faithful."""
    import dfa_lens as dfa

    if out is not None:
        require_suffix(out, "A curve", (".csv",))
    ranked = reading.scores(scores)
    loaded = reading.model(model, backend, device, dtype)
    drawn: dict[str, Any] = {"split": split, "examples": examples, "seed": seed, "collection": collection}
    prompts = reading.pairs(loaded, task, pairs, **drawn, control=control)
    curve = dfa.faithfulness_curve(
        loaded,
        prompts,
        ranked,
        protocol=protocol,  # type: ignore[arg-type]
        ranking=ranking,  # type: ignore[arg-type]
        selection=selection,  # type: ignore[arg-type]
        metric=reading.metric(metric, loaded),
        ablation=ablation,
        direction=direction,  # type: ignore[arg-type]
        batch_size=option.batch_size_of(batch_size),
        progress=option.bars(quiet),
    )
    if out is not None:
        with written(out, as_json) as path:
            write_atomically(path, curve.to_frame().to_csv(index=False).encode())
    named = curve.ranked is not None and curve.direction == "denoising"
    reached = named and bool((curve.faithfulness >= faithful).any())
    circuit = curve.smallest(faithful) if reached else None
    facts: dict[str, Any] = {
        "cpr": curve.cpr,
        "cpr_interval": curve.cpr_interval(),
        "cmd": curve.cmd,
        "cmd_interval": curve.cmd_interval(),
        "floor": curve.floor,
        "cmd_floor": curve.cmd_floor,
        "examples": len(curve.clean_values),
        "circuit": None if circuit is None else {circuit.unit: list(circuit.names), **circuit.meta},
    }
    lines = [
        f"CPR {curve.cpr:.3f} {facts['cpr_interval']}, CMD {curve.cmd:.3f} {facts['cmd_interval']} "
        f"(95 % intervals over {len(curve.clean_values)} prompt pairs)",
        f"empty circuit: CPR {curve.floor:.3f}, CMD {curve.cmd_floor:.3f}",
    ]
    if areas:
        facts["areas"] = {
            of: {axis: curve.area(of, axis=axis) for axis in ("linear", "log")}
            for of in ("faithfulness", "distance", "metric")
        }
        lines += [
            f"area of {of}: {found['linear']:.3f}, log axis {found['log']:.3f}" for of, found in facts["areas"].items()
        ]
    if circuit is not None:
        low, high = circuit.meta["size_interval"]
        listed = circuit.names if circuit.unit == "nodes" else circuit.names[:MOST_EDGES]
        more = ", …" * (len(listed) < len(circuit))
        lines.append(
            f"smallest circuit with f ≥ {faithful:g}: {len(circuit)} of {curve.n_nodes} {circuit.unit} "
            f"[{low:.0f}, {high:.0f}]: {', '.join(listed)}{more}"
        )
    text = "\n".join(lines)
    say(text, facts | {"curve": records(curve.to_frame())}, as_json=as_json, out=out)
