"""Looking, on the command line: a page of saved scores, and what is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfa_lens.cli import options as option
from dfa_lens.cli import reading
from dfa_lens.cli.app import app
from dfa_lens.cli.writing import require_suffix, say, written
from dfa_lens.data.files import write_atomically
from dfa_lens.errors import DfaError


@app.command(
    epilog="Example: dfa-lens report --source ioi-source.safetensors --target ioi-target.safetensors "
    "--alignment w.safetensors --out ioi.html; of edges: dfa-lens report --edges ioi=ioi-edges.safetensors "
    "--out edges.html"
)
def report(
    out: option.OutOption,
    source: Annotated[Path | None, typer.Option(help="Saved source scores.")] = None,
    target: Annotated[Path | None, typer.Option(help="Saved scores on the target.")] = None,
    alignment: Annotated[Path | None, typer.Option(help="The alignment between them.")] = None,
    edges: Annotated[
        list[str] | None,
        typer.Option(help="Instead: TASK=FILE, saved scores of edges or MIB's graph file; repeat for several."),
    ] = None,
    as_json: option.JsonOption = False,
) -> None:
    """Draw saved scores in one interactive HTML file: an aligned heatmap, or circuits of edges."""
    import dfa_lens as dfa

    require_suffix(out, "A report", (".html", ".htm"))
    if edges:
        if source or target or alignment:
            raise DfaError("Give either --edges, or --source and --target.")
        found = {task: reading.scores(path) for task, path in reading.named(edges, "Edges").items()}
        wrong = next((task for task, each in found.items() if not isinstance(each, dfa.EdgeScores)), None)
        if wrong is not None:
            raise DfaError(f"The scores of {wrong!r} are of nodes: give them as --source and --target.")
        with written(out, as_json) as path:
            dfa.plots.report(found, path)
    else:
        page = _aligned(source, target, alignment).to_html(include_plotlyjs=True)
        with written(out, as_json) as path:
            write_atomically(path, page.encode())
    say(f"{out} written.", {"out": str(out)}, as_json=as_json, out=out)


def _aligned(source: Path | None, target: Path | None, alignment: Path | None) -> Any:
    import dfa_lens as dfa

    if source is None or target is None:
        raise DfaError("Give --source and --target, or --edges.")
    small, large = reading.scores(source), reading.scores(target)
    for path, each in ((source, small), (target, large)):
        if isinstance(each, dfa.EdgeScores):
            raise DfaError(f"{path} holds scores of edges: give it as --edges TASK={path}.")
    w = dfa.Alignment.load(alignment) if alignment is not None else None
    swapped = w is not None and (w.source, w.target) == (large.nodes, small.nodes) != (small.nodes, large.nodes)
    if swapped or (small.meta.get("method") == "transfer" and large.meta.get("method") != "transfer"):
        raise DfaError(f"{source} holds scores on the target and {target} those on the source: they are swapped.")
    return dfa.plots.aligned_heatmap(small, large, alignment=w)


@app.command(epilog="Example: dfa-lens doctor --model llama3-tiny-source")
def doctor(
    model: Annotated[str | None, typer.Option(help="Also load this model and try what it can do.")] = None,
    as_json: option.JsonOption = False,
) -> None:
    """Say what is installed, what there is to compute with, and what will work."""
    from dfa_lens import doctor as diagnosis

    lines = list(diagnosis.lines(reading.model(model) if model is not None else None))
    say("\n".join(lines), {"lines": lines}, as_json=as_json)
