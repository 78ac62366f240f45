"""The command line: ``dfa-lens demo | attribute | fit | transfer | evaluate | report | study | doctor``."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from dfa_lens.errors import DfaError, TaskError, unknown

app = typer.Typer(
    help="Carry a circuit from a small language model to a large one.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[str, typer.Option(help="A shipped model, a checkpoint folder, or a Hugging Face name.")]
TaskOption = Annotated[str, typer.Option(help="ioi, mcqa, addition, subtraction, arc-easy or arc-challenge.")]
SplitOption = Annotated[str, typer.Option(help="train, validation or test.")]
ExamplesOption = Annotated[int, typer.Option("--examples", "-n", help="Prompt pairs.")]
SeedOption = Annotated[int, typer.Option(help="Of prompts and training.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]
BackendOption = Annotated[str, typer.Option(help="auto, hooked or bridge.")]


def _model(name: str, backend: str = "auto") -> Any:
    from dfa_lens.models.loading import load_model

    return load_model(name, backend=backend)  # type: ignore[arg-type]


@app.command(epilog="Example: dfa-lens demo --quick --family llama3 --out report")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("report"),
    family: Annotated[list[str] | None, typer.Option(help="llama3 or qwen2.5; default: both.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task; may be given several times. Default: all six.")
    ] = None,
    seed: SeedOption = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer examples, steps and sizes.")] = False,
) -> None:
    """Transfer circuits in the shipped models; print a table and write a report."""
    from dfa_lens.experiments import demo as module
    from dfa_lens.plots import report as write_report

    budget = module.QUICK if quick else module.FULL
    results = module.run(families=family, only=task, seed=seed, budget=budget, progress=True)
    out.mkdir(parents=True, exist_ok=True)
    results.table().to_csv(out / "results.csv", index=False)
    page = write_report(results, out / "index.html")
    typer.echo("CPR (area under the faithfulness curve; higher is better)\n")
    typer.echo(results.summary().round(3).to_string())
    typer.echo(f"\n{page} and {out / 'results.csv'} written; it took {results.provenance['time']}.")


@app.command(epilog="Example: dfa-lens attribute --model llama3-tiny-source --task ioi --out ioi-source.safetensors")
def attribute(
    model: ModelOption,
    task: TaskOption,
    out: OutOption,
    method: Annotated[str, typer.Option(help="nap, nap-ig-inputs, nap-ig-activations or exact.")] = "nap-ig-inputs",
    steps: Annotated[int, typer.Option(help="Integration steps.")] = 5,
    split: SplitOption = "train",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
) -> None:
    """Score every node of a model on a task, and save the scores."""
    import dfa_lens as dfa

    loaded = _model(model, backend)
    pairs = dfa.tasks.load(task, loaded.tokenizer, split=split, n=examples, seed=seed)
    scores = dfa.attribute(loaded, pairs, method=method, steps=steps, progress=True)
    scores.save(out)
    typer.echo(scores.to_frame().nsmallest(10, "rank").to_string(index=False))
    typer.echo(f"{out} written.")


def _named(values: list[str]) -> dict[str, Path]:
    named = {}
    for value in values:
        task, separator, path = value.partition("=")
        if not separator:
            raise TaskError(f"Scores are given as TASK=FILE, not {value!r}.")
        named[task] = Path(path)
    return named


@app.command(
    epilog="Example: dfa-lens fit --target llama3-tiny-target --scores ioi=ioi-source.safetensors --out w.safetensors"
)
def fit(
    target: ModelOption,
    scores: Annotated[list[str], typer.Option(help="TASK=FILE, source scores of a training task; repeat for several.")],
    out: OutOption,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 200,
    sparsity_weight: Annotated[float, typer.Option(help="The weight of the mean mask in the loss.")] = 10.0,
    form: Annotated[
        str, typer.Option(help="full, kernel, full+bias, low-rank, block or depth-band: what W is made of.")
    ] = "full",
    objective: Annotated[str, typer.Option(help="sparse, target-size or matryoshka.")] = "sparse",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
) -> None:
    """Learn an alignment from source scores to a target model, and save it."""
    import dfa_lens as dfa

    loaded_scores = {task: dfa.NodeScores.load(path) for task, path in _named(scores).items()}
    model = _model(target, backend)
    pairs = {task: dfa.tasks.load(task, model.tokenizer, n=examples, seed=seed) for task in loaded_scores}
    learned = dfa.fit(
        model,
        loaded_scores,
        pairs,
        steps=steps,
        sparsity_weight=sparsity_weight,
        form=form,
        objective=objective,
        seed=seed,
        progress=True,
    )
    learned.save(out)
    typer.echo(f"{learned}; {out} written.")


@app.command(epilog="Example: dfa-lens study --quick --setting zero-shot --setting uniform-s --out study")
def study(
    out: Annotated[Path, typer.Option(help="Folder for the rows; what is there already is not run again.")],
    setting: Annotated[
        list[str] | None, typer.Option(help="One of dfa.study.SETTINGS; may be given several times. Default: all.")
    ] = None,
    family: Annotated[list[str] | None, typer.Option(help="llama3 or qwen2.5; default: both.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A test task; default: all six.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0, 1 and 2.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer examples, steps and sizes.")] = False,
) -> None:
    """Compare settings (regimes, controls, methods) over tasks, families and seeds; one tidy table."""
    from dfa_lens.experiments import study as module

    for name in setting or ():
        if name not in module.SETTINGS:
            raise unknown("setting", name, module.SETTINGS)
    table = module.run(
        family,
        {name: module.SETTINGS[name] for name in setting} if setting else None,
        seeds=seed or (0, 1, 2),
        test_tasks=task,
        budget=module.QUICK if quick else module.FULL,
        out=out,
        workers=workers,
        device=device,
        progress=True,
    )
    table.to_csv(out / "table.csv", index=False)
    means = table.groupby("setting", sort=False)[["cpr", "cmd", "kl"]].agg(["mean", "std"]).round(3)
    typer.echo(f"{means.to_string()}\n{out / 'table.csv'} written.")


@app.command(
    epilog="Example: dfa-lens transfer --alignment w.safetensors --scores ioi-source.safetensors "
    "--out ioi-target.safetensors"
)
def transfer(
    alignment: Annotated[Path, typer.Option(help="A saved alignment.")],
    scores: Annotated[Path, typer.Option(help="Saved source scores.")],
    out: OutOption,
) -> None:
    """Carry source scores to the target, and save them."""
    import dfa_lens as dfa

    circuit = dfa.Alignment.load(alignment).transfer(dfa.NodeScores.load(scores))
    circuit.save(out)
    typer.echo(circuit.to_frame().nsmallest(10, "rank").to_string(index=False))
    typer.echo(f"{out} written.")


@app.command(epilog="Example: dfa-lens evaluate --model llama3-tiny-target --scores ioi-target.safetensors --task ioi")
def evaluate(
    model: ModelOption,
    scores: Annotated[Path, typer.Option(help="Saved scores on this model's nodes.")],
    task: TaskOption,
    protocol: Annotated[str, typer.Option(help="nodes or mib.")] = "nodes",
    split: SplitOption = "test",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the curve as CSV.")] = None,
) -> None:
    """Measure a circuit: its faithfulness curve, CPR and CMD."""
    import dfa_lens as dfa

    ranked = dfa.NodeScores.load(scores)
    loaded = _model(model, backend)
    pairs = dfa.tasks.load(task, loaded.tokenizer, split=split, n=examples, seed=seed)
    curve = dfa.faithfulness_curve(loaded, pairs, ranked, protocol=protocol, progress=True)  # type: ignore[arg-type]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        curve.to_frame().to_csv(out, index=False)
    typer.echo(f"CPR {curve.cpr:.3f} {curve.cpr_interval()}, CMD {curve.cmd:.3f} {curve.cmd_interval()}")
    typer.echo(f"empty circuit: CPR {curve.floor:.3f}, CMD {curve.cmd_floor:.3f}")


@app.command(
    epilog="Example: dfa-lens report --source ioi-source.safetensors --target ioi-target.safetensors "
    "--alignment w.safetensors --out ioi.html"
)
def report(
    source: Annotated[Path, typer.Option(help="Saved source scores.")],
    target: Annotated[Path, typer.Option(help="Saved scores on the target.")],
    out: OutOption,
    alignment: Annotated[Path | None, typer.Option(help="The alignment between them.")] = None,
) -> None:
    """Draw saved scores as an interactive aligned heatmap in one HTML file."""
    import dfa_lens as dfa
    from dfa_lens.data.files import write_atomically

    figure = dfa.plots.aligned_heatmap(
        dfa.NodeScores.load(source),
        dfa.NodeScores.load(target),
        alignment=dfa.Alignment.load(alignment) if alignment is not None else None,
    )
    write_atomically(out, figure.to_html(include_plotlyjs=True).encode())
    typer.echo(f"{out} written.")


@app.command(epilog="Example: dfa-lens doctor --model llama3-tiny-source")
def doctor(
    model: Annotated[str | None, typer.Option(help="Also load this model and try what it can do.")] = None,
) -> None:
    """Say what is installed, what there is to compute with, and what will work."""
    from dfa_lens import doctor as diagnosis

    for line in diagnosis.lines(_model(model) if model is not None else None):
        typer.echo(line)


def main() -> None:
    """Run the command line; an error of ours is one line, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.showwarning = _one_line_warning
    try:
        app()
    except DfaError as error:
        typer.echo(f"dfa-lens: {error}", err=True)
        sys.exit(2)


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


if __name__ == "__main__":
    main()
