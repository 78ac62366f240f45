"""Whole experiments on the command line: the demo, and studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dfa_lens.cli import options as option
from dfa_lens.cli import reading
from dfa_lens.cli.app import app
from dfa_lens.cli.writing import records, say
from dfa_lens.data.files import write_atomically
from dfa_lens.errors import DfaError, unknown


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
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: Annotated[int | None, typer.Option(help="Examples a pass, of attribution and curves.")] = None,
    as_json: option.JsonOption = False,
) -> None:
    """Transfer circuits in the shipped models, or in yours; print a table and write a report."""
    from dfa_lens.experiments import demo as module
    from dfa_lens.plots import report as write_report

    budget = module.QUICK if quick else module.FULL
    results = module.run(
        families=reading.model_pairs(family, models, device, dtype),
        only=task,
        seed=seed,
        budget=budget if batch_size is None else replace(budget, batch_size=batch_size),
        tasks=reading.all_tasks(pairs, task, family),
        device=device,
        dtype=option.dtype_of(dtype),
        collection=collection,
        progress=True,
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


@app.command(epilog="Example: dfa-lens study --quick --setting zero-shot --setting uniform-s --out study")
def study(
    out: option.MaybeFolderOption = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file that says all of the study; then nothing else but --json.")
    ] = None,
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
    device: option.DeviceOption = "cpu",
    dtype: option.DtypeOption = "float32",
    batch_size: Annotated[int | None, typer.Option(help="Examples a pass, of attribution and curves.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer examples, steps and sizes.")] = False,
    as_json: option.JsonOption = False,
) -> None:
    """Compare settings (regimes, controls, methods) over tasks, families and seeds; one tidy table.

    The folder keeps the rows; what is there already is not run again.
    """
    from dfa_lens.experiments import study as module
    from dfa_lens.experiments.config import NAMED, Config
    from dfa_lens.experiments.table import means, over

    run: dict[str, Any]
    if config is not None:
        given = [each for each in (out, setting, family, models, task, seed, pairs) if each is not None]
        if given:
            raise DfaError("--config says all of a study: give no other options beside it.")
        run = dict(Config.read(config).run)
    else:
        if out is None:
            raise DfaError("A study needs a folder, --out, or a file that says all of it, --config.")
        for name in setting or ():
            if name not in NAMED:
                raise unknown("setting", name, NAMED)
        budget = module.QUICK if quick else module.FULL
        run = {
            "families": reading.model_pairs(family, models, device, dtype),
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
    table, out = module.run(**run, progress=True), run["out"]
    write_atomically(out / "table.csv", table.to_csv(index=False).encode())
    say(
        f"{means(table).round(3).to_string()}\n(mean and std: over {over(table)})\n{out / 'table.csv'} written.",
        {"table": str(out / "table.csv"), "rows": records(table) if as_json else []},
        as_json=as_json,
    )


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
    rows = reading.studies(study or (), reading.run_configs(config or ()))
    known = None if published is None else numbers.from_release(published)
    page = write_paper(rows, out, published=known, recipe=recipe)
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
    model: Annotated[list[str] | None, typer.Option(help="A shipped model; default: all.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task; default: all that a model solves.")] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help="A method, with its options; default: all of the leaderboard.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Pairs that the methods see.")] = 64,
    test: Annotated[int, typer.Option(help="Other pairs, that circuits are judged on.")] = 32,
    seed: option.SeedOption = 0,
    workers: option.WorkersOption = 1,
    device: option.DeviceOption = "cpu",
    as_json: option.JsonOption = False,
) -> None:
    """The leaderboard: attribution methods on the shipped models and tasks, by quality and by cost.

    The folder keeps the rows; what is there already is not run again.
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
        device=device,
        progress=True,
    )
    write_atomically(out / "leaderboard.csv", table.round(5).to_csv(index=False).encode())
    shown = ["cpr", "cmd", "cpr_absolute", "cmd_absolute", "pearson", "spearman", "forward", "backward", "seconds", "n"]
    say(
        f"{leaderboard.summary(table)[shown].round(3).to_string()}\n{out / 'leaderboard.csv'} written.",
        {"table": str(out / "leaderboard.csv"), "rows": records(table) if as_json else []},
        as_json=as_json,
    )
