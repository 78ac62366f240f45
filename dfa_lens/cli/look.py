"""Looking, on the command line: what nodes do on an example, a page of saved scores, and what is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dfa_lens.cli import options as option
from dfa_lens.cli import reading
from dfa_lens.cli.app import app
from dfa_lens.cli.writing import records, require_suffix, say, written
from dfa_lens.data.files import write_atomically
from dfa_lens.errors import DfaError, TaskError, unknown

#: What a node adds to tokens' logits, most and least.
TOKENS = ("promoted", "suppressed")
#: How many nodes are printed; a table and JSON have all.
MOST_NODES = 20


@app.command(
    epilog="Example: dfa-lens inspect --model llama3-tiny-target --task ioi --scores ioi-target.safetensors --size 20 "
    "--out ioi.html"
)
def inspect(
    model: option.ModelOption,
    task: option.TaskOption = None,
    pairs: option.PairsOption = None,
    scores: Annotated[
        Path | None, typer.Option(help="Saved scores of the model's nodes or edges: the circuit of the best of them.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="How many nodes or edges that circuit has. Default: 20.")] = None,
    nodes: Annotated[
        list[str] | None,
        typer.Option(help="Instead: a node by its name or pattern (a3.h2, m*); may be given several times."),
    ] = None,
    example: Annotated[int, typer.Option(help="Which of the prompt pairs, from 0 on.")] = 0,
    top: Annotated[int, typer.Option(help="Tokens that are named for each node.")] = 5,
    split: option.SplitOption = "test",
    examples: option.ExamplesOption = 64,
    seed: option.SeedOption = 0,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write the circuit as a graph with clicks (.html), the table (.csv), or what was seen of all nodes, "
            "for report --inspection (.safetensors); - is standard output.",
            callback=option.out_file,
        ),
    ] = None,
    as_json: option.JsonOption = False,
) -> None:
    """Say what nodes do on one example: direct effect on the logits, tokens promoted, where heads look.

    All nodes of the model, those of a circuit (--scores), or some (--nodes); the largest direct effects first.
    """
    import dfa_lens as dfa

    suffix = None if out is None else require_suffix(out, "What was seen", (".html", ".htm", ".csv", ".safetensors"))
    if nodes and scores is not None:
        raise DfaError("Give either --nodes or --scores.")
    if size is not None and scores is None:
        raise DfaError("--size is that of a circuit of scores: give --scores.")
    if any("hook_" in each for each in nodes or ()):
        raise DfaError("--nodes are heads and MLP blocks here, a3.h2 or m*: nothing is said of other hook points.")
    ranked = None if scores is None else reading.scores(scores)
    chosen: Any = None if ranked is None else ranked.circuit(20 if size is None else size)
    loaded = reading.model(model, backend, device, dtype)
    every = dfa.NodeSet.heads_and_mlps(loaded)
    if chosen is None:
        kept = reading.nodes(loaded, nodes)
        chosen = dfa.Circuit((every if kept is None else kept).names, every, name=", ".join(nodes or ["all nodes"]))
    of_edges = isinstance(chosen, dfa.EdgeCircuit)
    circuit = chosen.to_nodes() if of_edges else chosen
    if not set(circuit.universe.names) - {"input"} <= set(every.names):
        raise DfaError(f"{scores} holds scores of other nodes than the heads and MLP blocks of {model}.")
    drawn: dict[str, Any] = {"split": split, "examples": examples, "seed": seed, "collection": collection}
    found = dfa.inspect(loaded, reading.pairs(loaded, task, pairs, **drawn), example=example, top=top)
    table = found.to_frame()
    table = table[table["node"].isin(circuit.names)]
    if out is not None:
        with written(out, as_json) as path:
            if suffix == ".csv":
                write_atomically(path, table.to_csv(index=False).encode())
            elif suffix == ".safetensors":
                found.save(path)
            else:
                coloured: dict[str, Any] = {"edges" if of_edges else "scores": ranked}
                page = dfa.plots.node_graph(chosen, inspection=found, **coloured).to_html()
                write_atomically(path, page.encode())
    more = "" if len(table) <= MOST_NODES else f"\n… and {len(table) - MOST_NODES} more"
    text = f"{''.join(found.tokens)}\n{found.answer!r} against {found.wrong!r}; direct effects on their logits:\n\n"
    text += table.head(MOST_NODES).round({"direct": 3}).to_string(index=False) + more
    where = dict(zip(found.nodes.names, zip(found.promoted, found.suppressed, strict=True), strict=True))
    rows = [
        row | {key: [each._asdict() for each in of] for key, of in zip(TOKENS, where[row["node"]], strict=True)}
        for row in records(table)
    ]
    facts = {"tokens": list(found.tokens), "answer": found.answer, "wrong": found.wrong, "nodes": rows}
    say(text if out is None else f"{text}\n{out} written.", facts | {"out": out and str(out)}, as_json=as_json, out=out)


@app.command(
    epilog="Example: dfa-lens report --source ioi=ioi-source.safetensors --target ioi=ioi-target.safetensors "
    "--alignment w.safetensors --curve ioi=ioi.csv --out report.html; of a study: dfa-lens report --study study "
    "--out study.html; of edges: dfa-lens report --edges ioi=ioi-edges.safetensors --out edges.html"
)
def report(
    out: option.OutOption,
    source: Annotated[
        list[str] | None, typer.Option(help="Saved source scores; of several tasks TASK=FILE, as all that follows.")
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Saved scores on the target.")] = None,
    gold: Annotated[list[str] | None, typer.Option(help="Attribution run directly on the target.")] = None,
    alignment: Annotated[
        list[str] | None, typer.Option(help="The alignment between them; without a TASK that of all.")
    ] = None,
    curve: Annotated[list[str] | None, typer.Option(help="The curve of the target's scores (evaluate --out).")] = None,
    gold_curve: Annotated[list[str] | None, typer.Option(help="The curve of gold.")] = None,
    edges: Annotated[
        list[str] | None, typer.Option(help="TASK=FILE, saved scores of edges or MIB's graph file; repeat for several.")
    ] = None,
    study: Annotated[Path | None, typer.Option(help="Instead: the folder of a study, or its table.csv.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The target model. On the task's first test pair it is then seen what nodes do, on click, and what "
            "matters where in the prompt."
        ),
    ] = None,
    inspection: Annotated[
        list[str] | None,
        typer.Option(help="Clicks without the model: what inspect --out FILE.safetensors saw of the target."),
    ] = None,
    pairs: option.NamedPairsOption = None,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    as_json: option.JsonOption = False,
) -> None:
    """Show results in one interactive HTML file: transfers of one or several tasks, circuits of edges, or a study."""
    import dfa_lens as dfa
    from dfa_lens.data.statistics import StatisticsWarning

    require_suffix(out, "A report", (".html", ".htm"))
    given = source or target or gold or alignment or curve or gold_curve
    if (model is not None or inspection) and not given:
        raise DfaError("--model and --inspection are for clicks on the nodes of transfers: give --source and --target.")
    if pairs and model is None:
        raise DfaError("--pairs is for the example that --model runs on: give --model.")
    if study is not None:
        if given or edges:
            raise DfaError("Give either --study, or files of scores.")
        found: Any = _table(study)
    elif given:
        files = (source, target, gold, alignment, curve, gold_curve, inspection)
        found = _results(*(values or [] for values in files))
        if model is not None:
            _look_at(found, pairs, collection, lambda: reading.model(model, backend, device, dtype))
    elif edges:
        found = {}
    else:
        raise DfaError("Give --source and --target, or --edges, or --study.")
    ranked = {task: reading.scores(path) for task, path in reading.named(edges or [], "Edges").items()}
    wrong = next((task for task, each in ranked.items() if not isinstance(each, dfa.EdgeScores)), None)
    if wrong is not None:
        raise DfaError(f"The scores of {wrong!r} are of nodes: give them as --source and --target.")
    with written(out, as_json) as path, warnings.catch_warnings():
        # a curve from a table has no examples to resample; the report shows no interval where there is none
        warnings.simplefilter("ignore", StatisticsWarning)
        dfa.plots.report(found, path, edges=ranked)
    say(f"{out} written.", {"out": str(out)}, as_json=as_json, out=out)


def _table(study: Path) -> Any:
    """The table of a study: written at its end, or the rows that there are so far."""
    from dfa_lens.experiments import progress, table

    if not study.is_dir():
        return table.read(study)
    if not (study / "study.json").exists() and not (study / "table.csv").exists():
        raise DfaError(f"{study} is not the folder of a study: it has no study.json and no table.csv.")
    written_at_end = study / "table.csv"
    return table.read(written_at_end) if written_at_end.exists() else progress.collected(study)


def _results(
    source: list[str],
    target: list[str],
    gold: list[str],
    alignment: list[str],
    curve: list[str],
    gold_curve: list[str],
    inspection: list[str],
) -> Any:
    """What a report shows of files: a transfer for each task."""
    import dfa_lens as dfa
    from dfa_lens.experiments.table import GOLD, Results, TaskResult

    sources, targets = reading.by_task(source, "Source scores"), reading.by_task(target, "Target scores")
    if not sources or sources.keys() != targets.keys():
        raise DfaError("Give --source and --target, the same tasks of both, or --edges, or --study.")
    golds, alignments = reading.by_task(gold, "Gold scores"), reading.by_task(alignment, "Alignments")
    curves, gold_curves = reading.by_task(curve, "Curves"), reading.by_task(gold_curve, "Curves of gold")
    inspections = reading.by_task(inspection, "Inspections")
    for what, files in {
        "gold": golds,
        "curve": curves,
        "gold-curve": gold_curves,
        "inspection": inspections,
        "alignment": alignments,
    }.items():
        foreign = next((task for task in files if task not in sources and not (what == "alignment" and not task)), None)
        if foreign is not None:
            raise DfaError(f"--{what} is of the task {foreign!r}, of which there are no --source and --target.")
    results = Results(provenance={"versions": f"dfa_lens {dfa.__version__}"})
    for task, path in sources.items():
        small, large = _nodes(path, task), _nodes(targets[task], task)
        saved = alignments.get(task, alignments.get(""))
        w = dfa.Alignment.load(saved) if saved is not None else None
        swapped = w is not None and (w.source, w.target) == (large.nodes, small.nodes) != (small.nodes, large.nodes)
        if swapped or (small.meta.get("method") == "transfer" and large.meta.get("method") != "transfer"):
            raise DfaError(
                f"{path} holds scores on the target and {targets[task]} those on the source: they are swapped."
            )
        measured = {GOLD: gold_curves.get(task), "transfer": curves.get(task)}
        results.tasks.append(
            TaskResult(
                f"{small.meta.get('model') or 'source'} to {large.meta.get('model') or 'target'}",
                task or targets[task].stem,
                small,
                _nodes(golds[task], task) if task in golds else None,
                {} if w is None else {"transfer": w},
                {"transfer": large},
                {name: reading.curve(file) for name, file in measured.items() if file is not None},
                inspection=_inspection(inspections[task], large) if task in inspections else None,
            )
        )
    return results


def _inspection(path: Path, target: Any) -> Any:
    import dfa_lens as dfa

    found = dfa.Inspection.load(path)
    seen = {(node.name, node.size) for node in found.nodes}
    if not {(node.name, node.size) for node in target.nodes if node.kind != "input"} <= seen:
        raise DfaError(f"{path} is of another model than the target's scores, or those are of other nodes.")
    return found


def _look_at(results: Any, pairs: list[str] | None, collection: str, load: Callable[[], Any]) -> None:
    """Add what the target's nodes do on each task's first test pair, and what matters where in it."""
    import dfa_lens as dfa
    from dfa_lens.experiments.demo import by_token, looked_at
    from dfa_lens.tasks.own import sources

    known = sources({name: name for name in dfa.tasks.names("all")} | reading.own_tasks(pairs), collection)
    for result in results.tasks:
        if result.task not in known:
            raise unknown("task (TASK=FILE names it)", result.task, known, TaskError)
    model = load()
    every = dfa.NodeSet.heads_and_mlps(model)
    for i, result in enumerate(results.tasks):
        if result.circuits["transfer"].nodes != every:
            raise DfaError(f"The target's scores of {result.task!r} are of other nodes than those of --model.")
        example = known[result.task](model.tokenizer, split="test", n=1, seed=0)
        seen = result.inspection or looked_at(model, example)
        results.tasks[i] = replace(result, inspection=seen, by_token=by_token(model, example, every))


def _nodes(path: Path, task: str) -> Any:
    import dfa_lens as dfa

    found = reading.scores(path)
    if isinstance(found, dfa.EdgeScores):
        raise DfaError(f"{path} holds scores of edges: give it as --edges {task or 'TASK'}={path}.")
    return found


@app.command(epilog="Example: dfa-lens doctor --model llama3-tiny-source")
def doctor(
    model: Annotated[str | None, typer.Option(help="Also load this model and try what it can do.")] = None,
    as_json: option.JsonOption = False,
) -> None:
    """Say what is installed, what there is to compute with, and what will work."""
    from dfa_lens import doctor as diagnosis

    lines = list(diagnosis.lines(reading.model(model) if model is not None else None))
    say("\n".join(lines), {"lines": lines}, as_json=as_json)
