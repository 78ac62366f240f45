"""Looking, on the command line: a page of saved scores, and what is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from dfa_lens.cli import options as option
from dfa_lens.cli import reading
from dfa_lens.cli.app import app
from dfa_lens.cli.writing import require_suffix, say, written
from dfa_lens.errors import DfaError


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
    as_json: option.JsonOption = False,
) -> None:
    """Show results in one interactive HTML file: transfers of one or several tasks, circuits of edges, or a study."""
    import dfa_lens as dfa
    from dfa_lens.data.statistics import StatisticsWarning

    require_suffix(out, "A report", (".html", ".htm"))
    given = source or target or gold or alignment or curve or gold_curve
    if study is not None:
        if given or edges:
            raise DfaError("Give either --study, or files of scores.")
        found: Any = _table(study)
    elif given:
        found = _results(*(values or [] for values in (source, target, gold, alignment, curve, gold_curve)))
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
) -> Any:
    """What a report shows of files: a transfer for each task."""
    import dfa_lens as dfa
    from dfa_lens.experiments.table import GOLD, Results, TaskResult

    sources, targets = reading.by_task(source, "Source scores"), reading.by_task(target, "Target scores")
    if not sources or sources.keys() != targets.keys():
        raise DfaError("Give --source and --target, the same tasks of both, or --edges, or --study.")
    golds, alignments = reading.by_task(gold, "Gold scores"), reading.by_task(alignment, "Alignments")
    curves, gold_curves = reading.by_task(curve, "Curves"), reading.by_task(gold_curve, "Curves of gold")
    for what, files in (("gold", golds), ("curve", curves), ("gold-curve", gold_curves), ("alignment", alignments)):
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
            )
        )
    return results


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
