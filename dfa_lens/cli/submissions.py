"""MIB's circuit track on the command line: write a submission, check one, judge one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfa_lens.cli import options as option
from dfa_lens.cli import reading
from dfa_lens.cli.app import app
from dfa_lens.cli.writing import say
from dfa_lens.errors import DfaError

mib = typer.Typer(help="Submissions to MIB's circuit track.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(mib, name="mib")

_Folder = Annotated[Path, typer.Argument(help="The submission's folder, with folders like ioi_qwen2.5 in it.")]


@mib.command(
    epilog="Example: dfa-lens mib export --scores ioi=ioi.safetensors --scores mcqa=mcqa.safetensors "
    "--as qwen2.5 --out submission"
)
def export(
    scores: Annotated[list[str], typer.Option(help="TASK=FILE, scores of the model's nodes or edges; repeat.")],
    name: Annotated[str, typer.Option("--as", help="What MIB calls the model: gpt2, qwen2.5, gemma2 or llama3.")],
    out: option.FolderOption,
    suffix: Annotated[str, typer.Option(help=".pt or .json.")] = ".pt",
    as_json: option.JsonOption = False,
) -> None:
    """Write scores as a submission, and say what MIB would not take; other models may be added to the folder."""
    import dfa_lens as dfa

    loaded = {(task, name): reading.scores(path) for task, path in reading.named(scores, "Scores").items()}
    written = dfa.mib.export(out, loaded, suffix=suffix)
    _say_problems(out, dfa.mib.check(out), [f"{path} written." for path in written], as_json)


@mib.command(epilog="Example: dfa-lens mib check submission")
def check(folder: _Folder, as_json: option.JsonOption = False) -> None:
    """Say what MIB would not take, or pass over, in a submission; the exit status is 1 if there is something."""
    import dfa_lens as dfa

    problems = dfa.mib.check(folder)
    _say_problems(folder, problems, [], as_json)
    if problems:
        raise typer.Exit(1)


def _say_problems(folder: Path, problems: list[str], lines: list[str], as_json: bool) -> None:
    found = problems or [f"{folder} is as MIB asks for."]
    say("\n".join([*lines, *found]), {"out": str(folder), "problems": problems}, as_json=as_json)


@mib.command(epilog="Example: dfa-lens mib evaluate submission --model Qwen/Qwen2.5-0.5B --as qwen2.5 --collection mib")
def evaluate(
    folder: _Folder,
    model: option.ModelOption,
    name: Annotated[
        str | None, typer.Option("--as", help="Which of the submission's models it is; needed if there are several.")
    ] = None,
    metric: option.MetricOption = "logit-difference",
    control: option.ControlOption = False,
    split: option.SplitOption = "test",
    examples: option.ExamplesOption = 64,
    seed: option.SeedOption = 0,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: option.BatchOption = "16",
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Judge somebody's submission: CPR and CMD of every task of a model, by signed and by absolute scores."""
    import dfa_lens as dfa

    found = dfa.mib.entries(folder)
    names = list(dict.fromkeys(entry.model for entry in found))
    if name is None and len(names) > 1:
        raise DfaError(f"{folder} has circuits of {', '.join(names)}: say which the model is with --as.")
    chosen = [entry for entry in found if entry.model == (name or names[0])]
    if not chosen:
        raise DfaError(f"{folder} has no circuits of {name}, but of {', '.join(names)}.")
    loaded = reading.model(model, backend, device, dtype)
    rows, texts = [], []
    for entry in chosen:
        drawn: dict[str, Any] = {"split": split, "examples": examples, "seed": seed, "collection": collection}
        prompts = reading.pairs(loaded, entry.task, None, **drawn, control=control)
        how: dict[str, Any] = {"batch_size": option.batch_size_of(batch_size), "progress": option.bars(quiet)}
        areas = dfa.mib.evaluate(loaded, prompts, entry, metric=reading.metric(metric, loaded), **how)
        rows.append({"task": entry.task, "model": entry.model, "circuits": len(entry.files), "cpr": areas.cpr})
        rows[-1] |= {"cmd": areas.cmd, "cpr_absolute": areas.absolute.cpr, "cmd_signed": areas.signed.cmd}
        texts.append(f"{entry.task}, {len(prompts)} prompt pairs\n{areas}")
    say("\n\n".join(texts), {"folder": str(folder), "tasks": rows}, as_json=as_json)
