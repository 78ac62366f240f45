"""Transfer by what nodes do, on the command line: measurements, and the whole way in one go."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import typer

from dfa_lens.cli import options as option
from dfa_lens.cli import reading
from dfa_lens.cli.app import app
from dfa_lens.cli.scores import save_scores, say_scores, suffix_of_scores
from dfa_lens.cli.writing import records, require_suffix, say
from dfa_lens.errors import TaskError, unknown


@app.command(epilog="Example: dfa-lens measure --model llama3-tiny-target --task ioi --out ioi-measured.safetensors")
def measure(
    model: option.ModelOption,
    out: option.OutOption,
    task: option.TaskOption = None,
    pairs: option.PairsOption = None,
    groups: Annotated[int, typer.Option(help="Pairs on which whole groups of nodes are tried; 0: none.")] = 4,
    examples: option.ExamplesOption = 64,
    split: option.SplitOption = "train",
    seed: option.SeedOption = 0,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(help="Examples a pass.")] = 16,
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Measure every head and MLP block by forward passes, and save what was found (.safetensors, or a table: .csv).

    There is no choice of nodes: what is measured (direct effects, where heads look, what whole layers do) is defined
    for heads and MLP blocks, and compared with that of all the others.
    """
    import dfa_lens as dfa

    suffix = require_suffix(out, "Measurements", (".safetensors", ".csv"))
    loaded = reading.model(model, backend, device, dtype)
    prompts = reading.pairs(loaded, task, pairs, split=split, examples=examples, seed=seed, collection=collection)
    found = dfa.measure(loaded, prompts, groups=groups, batch_size=batch_size, progress=option.bars(quiet))
    save_scores(found, out, suffix, as_json)
    facts = {"out": str(out), "measurements": records(found.to_frame()) if as_json else [], "meta": found.meta}
    say(f"{found}; {found.meta['passes']} passes; {out} written.", facts, as_json=as_json, out=out)


@app.command(
    epilog="Example: dfa-lens carry --source llama3-tiny-source --target llama3-tiny-target --task ioi "
    "--out ioi-target.safetensors"
)
def carry(
    source: option.ModelOption,
    target: option.ModelOption,
    task: Annotated[str, typer.Option(help="What is carried: one of our tasks, or one of --pairs.")],
    out: option.OutOption,
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
    examples: option.ExamplesOption = 64,
    seed: option.SeedOption = 0,
    pairs: option.NamedPairsOption = None,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: Annotated[int, typer.Option(help="Examples a pass, of attribution and measurements.")] = 16,
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Carry a task's circuit from one model to another in one go, and save its scores on the target.

    All heads and MLP blocks of both models take part, without a choice: see dfa-lens measure for why.
    """
    import dfa_lens as dfa
    from dfa_lens.experiments.carry import By
    from dfa_lens.tasks.own import sources

    suffix = suffix_of_scores(out, edges=False)
    if by not in get_args(By):
        raise unknown("way to carry", by, get_args(By))
    own = reading.own_tasks(pairs)
    known = sources({name: name for name in dfa.tasks.names("all")} | own, collection)
    for name in (task, *(teach or ())):
        if name not in known:
            raise unknown("task", name, known, TaskError)
    reading.require_models(source, target)
    usual = dfa.zoo.solves(source) if source in dfa.zoo.names("all") else dfa.tasks.names()
    names = dict.fromkeys([*(teach or (*usual, *own)), task])
    small, large = (reading.model(name, backend, device, dtype) for name in (source, target))
    ours, theirs = (
        {name: known[name](model.tokenizer, split="train", n=examples, seed=seed) for name in chosen}
        for model, chosen in ((small, names), (large, [task] if by == "functional" else names))
    )
    how: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": option.bars(quiet)}
    found = dfa.carry(small, large, task, ours, theirs, by=by, **how)  # type: ignore[arg-type]
    save_scores(found, out, suffix, as_json)
    say_scores(found, out, as_json)
