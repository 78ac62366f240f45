"""The command line: ``dfa-lens demo | attribute | measure | carry | fit | transfer | evaluate | report | study`` and
``doctor``."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from dfa_lens.data.files import writable, write_atomically
from dfa_lens.errors import DfaError, ModelError, TaskError, plain_text, short, unknown

app = typer.Typer(
    help="Carry a circuit from a small language model to a large one.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

#: Of MIB's graph files.
MIB_SUFFIXES = (".json", ".pt")

ModelOption = Annotated[str, typer.Option(help="A shipped model, a checkpoint folder, or a Hugging Face name.")]
TaskOption = Annotated[
    str | None,
    typer.Option(
        help="ioi, mcqa, addition, subtraction, arc-easy, arc-challenge, or a further offline task; or give --pairs."
    ),
]
PairsOption = Annotated[
    Path | None,
    typer.Option(help="Instead of a task: a .csv or .jsonl file with the columns clean, corrupt, answer and wrong."),
]
NamedPairsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="TASK=FILE, a task of your own, as .csv or .jsonl with the columns clean, corrupt, answer and wrong."
    ),
]
CollectionOption = Annotated[str, typer.Option(help="Where the tasks come from: offline, or mib (Hugging Face hub).")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, …")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64: of the weights.")]
BatchOption = Annotated[str, typer.Option(help="Examples a pass, or auto: what fits into memory.")]
SplitOption = Annotated[str, typer.Option(help="train, validation or test.")]
ExamplesOption = Annotated[int, typer.Option("--examples", "-n", help="Prompt pairs.")]
SeedOption = Annotated[int, typer.Option(help="Of prompts and training.")]


def _writable(path: Path | None) -> Path | None:
    """Asked before the work: that a file can't be written is not to be learned after it."""
    return path if path is None else writable(path)


def _writable_folder(path: Path) -> Path:
    return writable(path, folder=True)


OutOption = Annotated[Path, typer.Option("--out", "-o", help="File to write.", callback=_writable)]
BackendOption = Annotated[str, typer.Option(help="auto, hooked or bridge.")]


def _dtype(name: str) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in known:
        raise unknown("dtype", name, known, ModelError)
    return known[name]


def _model(name: str, backend: str = "auto", device: str = "cpu", dtype: str = "float32") -> Any:
    from dfa_lens.models.loading import load_model

    return load_model(name, backend=backend, device=device, dtype=_dtype(dtype))  # type: ignore[arg-type]


def _batch_size(given: str) -> Any:
    if given != "auto" and not (given.isdecimal() and len(given) < 10):
        raise DfaError(f"--batch-size must be a number or auto, not {short(given)!r}.")
    return given if given == "auto" else int(given)


def _pairs(
    model: Any, task: str | None, file: Path | None, *, split: str, examples: int, seed: int, collection: str
) -> Any:
    """The prompt pairs of one of our tasks or of a file, whose rows all count unless they name their splits."""
    from dfa_lens import tasks
    from dfa_lens.tasks.own import FileTask

    if (task is None) == (file is None):
        raise TaskError("Give either --task or --pairs.")
    if task is not None:
        return tasks.load(task, model.tokenizer, split=split, n=examples, seed=seed, collection=collection)  # type: ignore[arg-type]
    own = FileTask.read(file)  # type: ignore[arg-type]
    return own(model.tokenizer, split=split if own.has_splits else None, n=examples, seed=seed)


def _own_tasks(pairs: list[str] | None) -> dict[str, Any]:
    """Task → the file that it is read from."""
    from dfa_lens.tasks.own import FileTask

    return {task: FileTask.read(path) for task, path in _named(pairs or [], "Pairs").items()}


def _all_tasks(pairs: list[str] | None, named: list[str] | None, families: list[str] | None) -> dict[str, Any] | None:
    """Our tasks and those of files; None: the paper's six. Where a further one is named, or models of those: those."""
    from dfa_lens import tasks, zoo

    own = _own_tasks(pairs)
    models = [name for family in families or () for name in zoo.pairs("more").get(family, ())]
    solved = [task for task in tasks.names("more") if all(task in zoo.solves(name) for name in models)]
    if models or set(named or ()) & set(tasks.names("more")):
        return {name: name for name in solved} | own
    return {name: name for name in tasks.names()} | own if own else None


@app.command(epilog="Example: dfa-lens demo --quick --family llama3 --out report")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.", callback=_writable_folder)] = Path("report"),
    family: Annotated[
        list[str] | None, typer.Option(help="llama3, qwen2.5 or llama3-more; default: the first two.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task; may be given several times. Default: all six.")
    ] = None,
    seed: SeedOption = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer examples, steps and sizes.")] = False,
    pairs: NamedPairsOption = None,
    collection: CollectionOption = "offline",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: Annotated[int | None, typer.Option(help="Examples a pass, of attribution and curves.")] = None,
) -> None:
    """Transfer circuits in the shipped models; print a table and write a report."""
    from dfa_lens.experiments import demo as module
    from dfa_lens.plots import report as write_report

    budget = module.QUICK if quick else module.FULL
    results = module.run(
        families=family,
        only=task,
        seed=seed,
        budget=budget if batch_size is None else replace(budget, batch_size=batch_size),
        tasks=_all_tasks(pairs, task, family),
        device=device,
        dtype=_dtype(dtype),
        collection=collection,
        progress=True,
    )
    write_atomically(out / "results.csv", results.table().to_csv(index=False).encode())
    page = write_report(results, out / "index.html")
    typer.echo("CPR (area under the faithfulness curve; higher is better)\n")
    typer.echo(results.summary().round(3).to_string())
    typer.echo(f"\n{page} and {out / 'results.csv'} written; it took {results.provenance['time']}.")


@app.command(
    epilog="Example: dfa-lens attribute --model llama3-tiny-source --task ioi --out ioi-source.safetensors; "
    "of edges: dfa-lens attribute --edges --model llama3-tiny-source --task ioi --out ioi-edges.safetensors"
)
def attribute(
    model: ModelOption,
    out: OutOption,
    task: TaskOption = None,
    pairs: PairsOption = None,
    edges: Annotated[bool, typer.Option("--edges", help="Score edges, not nodes.")] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="nap, nap-ig-inputs (default), nap-ig-activations or exact; of edges: eap, eap-ig-inputs (default), "
            "eap-ig-activations or exact."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Integration steps.")] = 5,
    readers: Annotated[
        str, typer.Option(help="Of edges: grouped, or per-head, as published results and MIB's files have them.")
    ] = "grouped",
    step_points: Annotated[
        str, typer.Option(help="Of edges: to-clean (k = 1 … steps) or from-corrupt (0 … steps - 1).")
    ] = "to-clean",
    split: SplitOption = "train",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    collection: CollectionOption = "offline",
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchOption = "16",
) -> None:
    """Score every node of a model on a task, or every edge, and save the scores.

    Scores of edges go to one of MIB's graph files where --out ends in .json or .pt; that needs --readers per-head.
    """
    import dfa_lens as dfa

    if not edges and (readers, step_points) != ("grouped", "to-clean"):
        raise DfaError("--readers and --step-points are options of edges: add --edges.")
    if edges and readers == "grouped" and out.suffix in MIB_SUFFIXES:
        raise DfaError(f"MIB's graph files ({out.suffix}) hold per-head readers: add --readers per-head.")
    loaded = _model(model, backend, device, dtype)
    prompts = _pairs(loaded, task, pairs, split=split, examples=examples, seed=seed, collection=collection)
    common: dict[str, Any] = {"steps": steps, "batch_size": _batch_size(batch_size), "progress": True}
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
        scores = dfa.attribute(loaded, prompts, method=method or "nap-ig-inputs", **common)
    if edges and out.suffix in MIB_SUFFIXES:
        scores.to_mib(out)
    else:
        scores.save(out)
    typer.echo(scores.to_frame().nsmallest(10, "rank").to_string(index=False))
    typer.echo(f"{out} written.")


def _named(values: list[str], what: str) -> dict[str, Path]:
    named = {}
    for value in values:
        task, separator, path = value.partition("=")
        if not separator or not task:
            raise TaskError(f"{what} are given as TASK=FILE, not {value!r}.")
        if task in named:
            raise TaskError(f"{what} of task {task!r} are given twice.")
        named[task] = Path(path)
    return named


@app.command(epilog="Example: dfa-lens measure --model llama3-tiny-target --task ioi --out ioi-measured.safetensors")
def measure(
    model: ModelOption,
    out: OutOption,
    task: TaskOption = None,
    pairs: PairsOption = None,
    groups: Annotated[int, typer.Option(help="Pairs on which whole groups of nodes are tried; 0: none.")] = 4,
    examples: ExamplesOption = 64,
    split: SplitOption = "train",
    seed: SeedOption = 0,
    collection: CollectionOption = "offline",
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(help="Examples a pass.")] = 16,
) -> None:
    """Measure every head and MLP block by forward passes, and save the table; .csv writes it as one."""
    import dfa_lens as dfa

    loaded = _model(model, backend, device, dtype)
    prompts = _pairs(loaded, task, pairs, split=split, examples=examples, seed=seed, collection=collection)
    found = dfa.measure(loaded, prompts, groups=groups, batch_size=batch_size, progress=True)
    if out.suffix == ".csv":
        write_atomically(out, found.to_frame().to_csv(index=False).encode())
    else:
        found.save(out)
    typer.echo(f"{found}; {found.meta['passes']} passes; {out} written.")


@app.command(
    epilog="Example: dfa-lens carry --source llama3-tiny-source --target llama3-tiny-target --task ioi "
    "--out ioi-target.safetensors"
)
def carry(
    source: ModelOption,
    target: ModelOption,
    task: Annotated[str, typer.Option(help="What is carried: one of our tasks, or one of --pairs.")],
    out: OutOption,
    teach: Annotated[
        list[str] | None,
        typer.Option(
            help="A task that teaches; may be given several times. Default: the paper's six, or what a shipped source "
            "solves, and those of --pairs."
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(help="functional: by what nodes do; W: the paper's matrix, trained on the target.")
    ] = "functional",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    pairs: NamedPairsOption = None,
    collection: CollectionOption = "offline",
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(help="Examples a pass, of attribution and measurements.")] = 16,
) -> None:
    """Carry a task's circuit from one model to another in one go, and save its scores on the target."""
    import dfa_lens as dfa
    from dfa_lens.experiments.carry import By
    from dfa_lens.tasks.own import sources

    if by not in get_args(By):
        raise unknown("way to carry", by, get_args(By))
    own = _own_tasks(pairs)
    known = sources({name: name for name in dfa.tasks.names("all")} | own, collection)
    for name in (task, *(teach or ())):
        if name not in known:
            raise unknown("task", name, known, TaskError)
    usual = dfa.zoo.solves(source) if source in dfa.zoo.names("all") else dfa.tasks.names()
    names = dict.fromkeys([*(teach or (*usual, *own)), task])
    small, large = (_model(name, backend, device, dtype) for name in (source, target))
    ours, theirs = (
        {name: known[name](model.tokenizer, split="train", n=examples, seed=seed) for name in chosen}
        for model, chosen in ((small, names), (large, [task] if by == "functional" else names))
    )
    found = dfa.carry(small, large, task, ours, theirs, by=by, batch_size=batch_size, seed=seed)  # type: ignore[arg-type]
    found.save(out)
    typer.echo(found.to_frame().nsmallest(10, "rank").to_string(index=False))
    typer.echo(f"{out} written.")


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
        str,
        typer.Option(
            help="full, kernel, full+bias, low-rank, block or depth-band: what W is made of; of edges: full or free."
        ),
    ] = "full",
    objective: Annotated[str, typer.Option(help="sparse, target-size or matryoshka.")] = "sparse",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    pairs: NamedPairsOption = None,
    collection: CollectionOption = "offline",
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(help="Examples of each step.")] = 16,
) -> None:
    """Learn an alignment from source scores to a target model, and save it; scores of edges give one of edges."""
    import dfa_lens as dfa

    recipe = dfa.Recipe(
        form=form, objective=objective, sparsity_weight=sparsity_weight, steps=steps, batch_size=batch_size, seed=seed
    )
    loaded = {task: _scores(path) for task, path in _named(scores, "Scores").items()}
    own = _own_tasks(pairs)
    foreign = next((task for task in own if task not in loaded), None)
    if foreign is not None:
        raise TaskError(f"There are pairs of task {foreign!r}, but no scores: add --scores {foreign}=FILE.")
    model = _model(target, backend, device, dtype)
    prompts = {
        task: own[task](model.tokenizer, split="train" if own[task].has_splits else None, n=examples, seed=seed)
        if task in own
        else _pairs(model, task, None, split="train", examples=examples, seed=seed, collection=collection)
        for task in loaded
    }
    learned = dfa.fit(model, loaded, prompts, recipe=recipe, progress=True)
    learned.save(out)
    typer.echo(f"{learned}; {out} written.")


@app.command(epilog="Example: dfa-lens study --quick --setting zero-shot --setting uniform-s --out study")
def study(
    out: Annotated[
        Path,
        typer.Option(help="Folder for the rows; what is there already is not run again.", callback=_writable_folder),
    ],
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="One of dfa.study.SETTINGS or FUNCTIONAL; may be given several times. Default: all of the first."
        ),
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="llama3, qwen2.5 or llama3-more; default: the first two.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A test task; default: all six.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0, 1 and 2.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    pairs: NamedPairsOption = None,
    collection: CollectionOption = "offline",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: Annotated[int | None, typer.Option(help="Examples a pass, of attribution and curves.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer examples, steps and sizes.")] = False,
) -> None:
    """Compare settings (regimes, controls, methods) over tasks, families and seeds; one tidy table."""
    from dfa_lens.experiments import study as module
    from dfa_lens.experiments.functional import FUNCTIONAL
    from dfa_lens.experiments.table import means

    settings = {**module.SETTINGS, **FUNCTIONAL}
    for name in setting or ():
        if name not in settings:
            raise unknown("setting", name, settings)
    budget = module.QUICK if quick else module.FULL
    table = module.run(
        family,
        {name: settings[name] for name in setting} if setting else None,
        seeds=seed or (0, 1, 2),
        test_tasks=task,
        tasks=_all_tasks(pairs, task, family),
        budget=budget if batch_size is None else replace(budget, batch_size=batch_size),
        out=out,
        workers=workers,
        device=device,
        dtype=_dtype(dtype),
        collection=collection,
        progress=True,
    )
    write_atomically(out / "table.csv", table.to_csv(index=False).encode())
    typer.echo(f"{means(table).round(3).to_string()}\n{out / 'table.csv'} written.")


@app.command(
    epilog="Example: dfa-lens transfer --alignment w.safetensors --scores ioi-source.safetensors "
    "--out ioi-target.safetensors"
)
def transfer(
    alignment: Annotated[Path, typer.Option(help="A saved alignment.")],
    scores: Annotated[Path, typer.Option(help="Saved source scores, of nodes or of edges as the alignment is.")],
    out: OutOption,
) -> None:
    """Carry source scores to the target, and save them."""
    import dfa_lens as dfa

    kind = dfa.EdgeAlignment if "edge" in _kind(alignment) else dfa.Alignment
    carrier, given = kind.load(alignment), _scores(scores)
    if isinstance(given, dfa.EdgeScores) != isinstance(carrier, dfa.EdgeAlignment):
        raise DfaError(
            f"{scores} holds {given!r}, and {alignment} an {carrier!r}: one is of edges, the other of nodes."
        )
    circuit = carrier.transfer(given)
    circuit.save(out)
    typer.echo(circuit.to_frame().nsmallest(10, "rank").to_string(index=False))
    typer.echo(f"{out} written.")


def _edge_scores(path: Path) -> Any:
    """Scores of edges, as saved or as one of MIB's graph files."""
    import dfa_lens as dfa

    return dfa.EdgeScores.from_mib(path) if path.suffix in MIB_SUFFIXES else dfa.EdgeScores.load(path)


def _kind(path: Path) -> str:
    """What a file of ours says that it holds, or nothing; what is wrong with it is said by the loading."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {}).get("format", ""))
    except (SafetensorError, OSError):
        return ""


def _scores(path: Path) -> Any:
    """Scores of nodes or of edges, whichever the file says that it holds."""
    import dfa_lens as dfa

    return _edge_scores(path) if path.suffix in MIB_SUFFIXES or "edge" in _kind(path) else dfa.NodeScores.load(path)


@app.command(epilog="Example: dfa-lens evaluate --model llama3-tiny-target --scores ioi-target.safetensors --task ioi")
def evaluate(
    model: ModelOption,
    scores: Annotated[Path, typer.Option(help="Saved scores of this model's nodes or edges, or MIB's graph file.")],
    task: TaskOption = None,
    pairs: PairsOption = None,
    protocol: Annotated[str, typer.Option(help="nodes or mib.")] = "nodes",
    ranking: Annotated[str, typer.Option(help="signed (for CPR) or absolute (for CMD).")] = "signed",
    selection: Annotated[str, typer.Option(help="Of edges: top, or greedy, the best that lead to the logits.")] = "top",
    split: SplitOption = "test",
    examples: ExamplesOption = 64,
    seed: SeedOption = 0,
    collection: CollectionOption = "offline",
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    batch_size: BatchOption = "16",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the curve as CSV.", callback=_writable)] = None,
) -> None:
    """Measure a circuit: its faithfulness curve, CPR and CMD."""
    import dfa_lens as dfa

    ranked = _scores(scores)
    loaded = _model(model, backend, device, dtype)
    prompts = _pairs(loaded, task, pairs, split=split, examples=examples, seed=seed, collection=collection)
    curve = dfa.faithfulness_curve(
        loaded,
        prompts,
        ranked,
        protocol=protocol,  # type: ignore[arg-type]
        ranking=ranking,  # type: ignore[arg-type]
        selection=selection,  # type: ignore[arg-type]
        batch_size=_batch_size(batch_size),
        progress=True,
    )
    if out is not None:
        write_atomically(out, curve.to_frame().to_csv(index=False).encode())
    typer.echo(f"CPR {curve.cpr:.3f} {curve.cpr_interval()}, CMD {curve.cmd:.3f} {curve.cmd_interval()}")
    typer.echo(f"empty circuit: CPR {curve.floor:.3f}, CMD {curve.cmd_floor:.3f}")


@app.command(
    epilog="Example: dfa-lens report --source ioi-source.safetensors --target ioi-target.safetensors "
    "--alignment w.safetensors --out ioi.html; of edges: dfa-lens report --edges ioi=ioi-edges.safetensors "
    "--out edges.html"
)
def report(
    out: OutOption,
    source: Annotated[Path | None, typer.Option(help="Saved source scores.")] = None,
    target: Annotated[Path | None, typer.Option(help="Saved scores on the target.")] = None,
    alignment: Annotated[Path | None, typer.Option(help="The alignment between them.")] = None,
    edges: Annotated[
        list[str] | None,
        typer.Option(help="Instead: TASK=FILE, saved scores of edges or MIB's graph file; repeat for several."),
    ] = None,
) -> None:
    """Draw saved scores in one interactive HTML file: an aligned heatmap, or circuits of edges."""
    import dfa_lens as dfa

    if edges:
        if source or target or alignment:
            raise DfaError("Give either --edges, or --source and --target.")
        written = dfa.plots.report({task: _edge_scores(path) for task, path in _named(edges, "Edges").items()}, out)
        typer.echo(f"{written} written.")
        return
    if source is None or target is None:
        raise DfaError("Give --source and --target, or --edges.")
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
        typer.echo(f"dfa-lens: {plain_text(error)}", err=True)
        sys.exit(2)


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {plain_text(message)}", err=True)


if __name__ == "__main__":
    main()
