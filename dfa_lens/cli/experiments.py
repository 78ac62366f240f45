"""Whole experiments on the command line: the demo, and studies."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from dfa_lens.cli import options as option
from dfa_lens.cli import reading
from dfa_lens.cli.app import app
from dfa_lens.cli.writing import records, require_suffix, say, written
from dfa_lens.data.files import read_json, writable, write_atomically
from dfa_lens.errors import DfaError, FileError, unknown

if TYPE_CHECKING:
    from dfa_lens.experiments.config import Config


@app.command(epilog="Example: dfa-lens demo --quick --family llama3 --out report")
def demo(
    out: option.FolderOption = Path("report"),
    family: Annotated[
        list[str] | None, typer.Option(help="llama3, qwen2.5, llama3-more or qwen2.5-more; default: the first two.")
    ] = None,
    models: option.ModelPairOption = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task; may be given several times. Default: all six.")
    ] = None,
    seed: option.SeedOption = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer examples, steps and sizes.")] = False,
    pairs: option.NamedPairsOption = None,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: option.MaybeBatchOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, a family each. Default: as many as there are cores, and one for models of your own.",
            callback=option.maybe_workers,
        ),
    ] = None,
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Transfer circuits in the shipped models, or in yours; print a table and write a report."""
    from dfa_lens.experiments import demo as module
    from dfa_lens.plots import report as write_report

    budget = module.QUICK if quick else module.FULL
    results = module.run(
        families=reading.model_pairs(family, models, device, dtype, backend),
        only=task,
        seed=seed,
        budget=budget if batch_size is None else replace(budget, batch_size=batch_size),
        tasks=reading.all_tasks(pairs, task, family),
        device=device,
        dtype=option.dtype_of(dtype),
        collection=collection,
        workers=workers or (1 if models or device != "cpu" else os.cpu_count() or 1),
        progress=option.bars(quiet),
    )
    rows = results.table()
    write_atomically(out / "results.csv", rows.to_csv(index=False).encode())
    page = write_report(results, out / "index.html")
    say(
        "CPR (area under the faithfulness curve; higher is better)\n\n"
        f"{results.summary().round(3).to_string()}\n"
        f"\n{page} and {out / 'results.csv'} written; it took {results.provenance['time']}.",
        {"report": str(page), "results": str(out / "results.csv"), "rows": records(rows) if as_json else []},
        as_json=as_json,
    )


class _Studies(typer.core.TyperGroup):
    """``dfa-lens study`` runs one, unless the next word says what else to do."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] and args[0] in self.commands else ["run", *args])


studies = typer.Typer(cls=_Studies, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(studies, name="study", help="Compare settings (regimes, controls, methods) in one tidy table.")


@studies.command("run", epilog="Example: dfa-lens study --quick --setting zero-shot --setting uniform-s --out study")
def study(
    context: typer.Context,
    out: option.MaybeFolderOption = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file that says all of the study; then nothing else but the next.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it will need: units, hours, memory, disk.")
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="One of dfa.study.SETTINGS or FUNCTIONAL; may be given several times. Default: all of the first."
        ),
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="llama3, qwen2.5, llama3-more or qwen2.5-more; default: the first two.")
    ] = None,
    models: option.ModelPairOption = None,
    task: Annotated[list[str] | None, typer.Option(help="A test task; default: all six.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default: 0, 1 and 2.")] = None,
    workers: option.WorkersOption = 1,
    pairs: option.NamedPairsOption = None,
    collection: option.CollectionOption = "offline",
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: option.MaybeBatchOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer examples, steps and sizes.")] = False,
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Compare settings (regimes, controls, methods) over tasks, families and seeds; one tidy table.

    The folder keeps what is done, and that is not run again. See also dfa-lens study status, resume and collect.
    """
    from dfa_lens.experiments import study as module
    from dfa_lens.experiments.config import NAMED, Config

    if config is not None:
        beside = ("config", "dry_run", "quiet", "as_json")
        given = {name: context.get_parameter_source(name) for name in context.params if name not in beside}
        if any(source is not None and source.name == "COMMANDLINE" for source in given.values()):
            raise DfaError("--config says all of a study: give no other options beside it.")
        found = Config.read(config)
    else:
        if out is None:
            raise DfaError("A study needs a folder, --out, or a file that says all of it, --config.")
        for name in setting or ():
            if name not in NAMED:
                raise unknown("setting", name, NAMED)
        budget = module.QUICK if quick else module.FULL
        run: dict[str, Any] = {
            "families": reading.model_pairs(family, models, device, dtype, backend),
            "settings": {name: NAMED[name] for name in setting} if setting else None,
            "seeds": seed or (0, 1, 2),
            "test_tasks": task,
            "tasks": reading.all_tasks(pairs, task, family),
            "budget": budget if batch_size is None else replace(budget, batch_size=batch_size),
            "out": out,
            "workers": workers,
            "device": device,
            "dtype": option.dtype_of(dtype),
            "collection": collection,
        }
        found = Config(run)
    if dry_run:
        _forecast(found, as_json)
    else:
        _run(found, config, as_json, quiet)


def _forecast(config: Config, as_json: bool) -> None:
    from dfa_lens.experiments.forecast import forecast
    from dfa_lens.experiments.study import planned

    elsewhere = ("out", "workers", "retries")
    found = forecast(planned(**{key: value for key, value in config.run.items() if key not in elsewhere}))
    workers = config.run.get("workers", 1)
    hours = found.seconds / 3600 / workers
    shared = f"\n{workers} workers: about {hours:.2g} hours" if workers > 1 else ""
    say(f"{found}{shared}", {**asdict(found), "workers": workers, "hours": hours}, as_json=as_json)


def _run(config: Config, path: Path | None, as_json: bool, quiet: bool) -> None:
    from dfa_lens.experiments import study as module
    from dfa_lens.experiments.table import means, over

    out, options = Path(config.run["out"]), dict(config.run)
    if path is not None:
        write_atomically(
            writable(out, folder=True) / "config.json", json.dumps({"config": str(path.absolute())}).encode()
        )
    if config.resources.kind != "processes":
        options["executor"] = _jobs(config)
    table = module.run(**options, progress=option.bars(quiet))
    say(
        f"{means(table).round(3).to_string()}\n(mean and std: over {over(table)})\n{out / 'table.csv'} written.",
        {"table": str(out / "table.csv"), "rows": records(table) if as_json else []},
        as_json=as_json,
    )


def _jobs(config: Config) -> Any:
    """Submitit's executor; memory and time by estimate where the file does not say."""
    from dfa_lens.experiments.executors import jobs
    from dfa_lens.experiments.forecast import forecast
    from dfa_lens.experiments.study import planned

    folder, resources = Path(config.run["out"]) / "logs", config.resources
    jobs(resources, folder, 1, 1)  # that there is no SLURM is said before models are loaded
    memory, minutes = 1.0, 1.0
    if resources.memory is None or resources.time is None:
        elsewhere = ("out", "workers", "retries")
        found = forecast(planned(**{key: value for key, value in config.run.items() if key not in elsewhere}))
        memory, minutes = found.request(config.run.get("workers", 1))
    return jobs(resources, folder, memory, minutes, config.run.get("device", "cpu"))


FolderArgument = Annotated[Path, typer.Argument(help="The folder of a study.")]


@studies.command(epilog="Example: dfa-lens study status study")
def status(folder: FolderArgument, as_json: option.JsonOption = False) -> None:
    """Say what is done, at work and failed, and how long the rest will take."""
    from dfa_lens.experiments import progress

    found = progress.status(folder)
    say(str(found), asdict(found), as_json=as_json)


@studies.command(epilog="Example: dfa-lens study resume study")
def resume(folder: FolderArgument, quiet: option.QuietOption = False, as_json: option.JsonOption = False) -> None:
    """Go on with a study that was begun with --config."""
    from dfa_lens.experiments.config import Config

    if not (folder / "config.json").exists():
        raise FileError(f"{folder} has no study that was begun with --config: to go on, give the same command again.")
    path = Path(str(read_json(folder / "config.json", "the place of a study's config").get("config", "")))
    config = Config.read(path)
    if Path(config.run["out"]).resolve() != folder.resolve():
        raise DfaError(f"{path}, by which {folder} was begun, now says another folder: {config.run['out']}.")
    _run(config, path, as_json, quiet)


@studies.command(epilog="Example: dfa-lens study collect study --out table.parquet")
def collect(
    folder: FolderArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The table: .csv or .parquet.", callback=option.out_file)
    ] = Path("-"),
    as_json: option.JsonOption = False,
) -> None:
    """Write the table of all that is done, also while workers are at it."""
    from dfa_lens.experiments import progress

    suffix = require_suffix(out, "A table", (".csv", ".parquet"))
    table = progress.collected(folder)
    with written(out, as_json) as place:
        data = table.to_parquet(index=False) if suffix == ".parquet" else table.to_csv(index=False).encode()
        write_atomically(place, data)
    say(f"{len(table)} rows; {out} written.", {"out": str(out), "rows": len(table)}, as_json=as_json, out=out)


@app.command(epilog="Example: dfa-lens paper --write-configs configs --out tables")
def paper(
    out: option.FolderOption,
    config: Annotated[
        list[Path] | None,
        typer.Option(
            help="A config of a study, or a folder of them: the study is run, or gone on with, and its rows are taken."
        ),
    ] = None,
    study: Annotated[
        list[str] | None,
        typer.Option(
            help="A study that was run: its folder or table.csv; METHOD=PATH where it is of another attribution method "
            "than nap-ig-inputs. May be given several times."
        ),
    ] = None,
    write_configs: Annotated[
        Path | None,
        typer.Option(help="Write the configs of the published study to this folder (released and ours), and no more."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="How W was trained, where the study has several ways: the column method.")
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(help="A checkout of the authors' repository: all their numbers, not only those of the package."),
    ] = None,
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """Write the tables and figures of the DFA paper from studies, with the published numbers beside ours.

    CSV, TeX and HTML for each table, and one page with all.
    """
    from dfa_lens.experiments import paper_configs
    from dfa_lens.experiments import published as numbers
    from dfa_lens.plots import paper as write_paper

    if write_configs is not None:
        files = [str(path) for path in paper_configs.write(write_configs)]
        say(f"{', '.join(files)} written.", {"configs": files}, as_json=as_json)
        return
    rows, curves = reading.studies(study or (), reading.run_configs(config or (), option.bars(quiet)))
    known = None if published is None else numbers.from_release(published)
    page = write_paper(rows, out, published=known, recipe=recipe, curves=curves)
    found = {kind: sorted(map(str, out.glob(f"{kind}-*.csv"))) for kind in ("table", "figure")}
    say(
        f"{page} written: {len(found['table'])} tables as CSV, TeX and HTML, and {len(found['figure'])} figures as CSV "
        "and HTML.",
        {"page": str(page), "tables": found["table"], "figures": found["figure"]},
        as_json=as_json,
    )


@app.command(epilog="Example: dfa-lens bench --model llama3-tiny-source --task ioi --contender nap --out bench")
def bench(
    out: option.FolderOption,
    model: Annotated[
        list[str] | None, typer.Option(help="A shipped model, or one with a planted circuit; default: all.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task; default: all that a model solves.")] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help="A method, with its options; default: all of the leaderboard.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Pairs that the methods see.", callback=option.examples)] = 64,
    test: Annotated[int, typer.Option(help="Other pairs, that circuits are judged on.", callback=option.examples)] = 32,
    seed: option.SeedOption = 0,
    workers: option.WorkersOption = 1,
    backend: option.BackendOption = "auto",
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: Annotated[
        int, typer.Option(help="Examples a pass, of attribution and curves.", callback=option.at_least_one)
    ] = 16,
    quiet: option.QuietOption = False,
    as_json: option.JsonOption = False,
) -> None:
    """The leaderboard: attribution methods on the shipped models and tasks, by quality and by cost.

    On models with planted circuits, planted-lookup-target say, also by how well they find them (AUROC). The folder
    keeps the rows; what is there already is not run again.
    """
    from dfa_lens.experiments import leaderboard

    table = leaderboard.run(
        model,
        task,
        contender,
        out=out,
        examples=examples,
        test=test,
        seed=seed,
        workers=workers,
        backend=backend,
        device=device,
        dtype=option.dtype_of(dtype),
        batch_size=batch_size,
        progress=option.bars(quiet),
    )
    write_atomically(out / "leaderboard.csv", table.round(5).to_csv(index=False).encode())
    shown = ["cpr", "cmd", "cpr_absolute", "cmd_absolute", "pearson", "spearman", "auroc"]
    shown += ["forward", "backward", "seconds", "n"]
    means = leaderboard.summary(table)
    say(
        f"{means[[name for name in shown if name in means]].round(3).to_string()}\n{out / 'leaderboard.csv'} written.",
        {"table": str(out / "leaderboard.csv"), "rows": records(table) if as_json else []},
        as_json=as_json,
    )
