"""One self-contained HTML page with everything that a run found."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from dfa_lens.errors import DfaError
from dfa_lens.plots.curves import curves
from dfa_lens.plots.heatmaps import aligned_heatmap, scores_heatmap
from dfa_lens.plots.style import FONT, text
from dfa_lens.results import GOLD, Results, TaskResult
from dfa_lens.scores import write_atomically

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font-family: {FONT}; color: #222; background: #fff; margin: 0 auto;
  max-width: 1180px; padding: 1rem 1.25rem 4rem; }}
h1 {{ font-size: 1.7rem; margin: .5rem 0; }} h2 {{ margin-top: 2.5rem; border-bottom: 2px solid #ddd; }}
h3 {{ margin: 2rem 0 .25rem; }} p, li {{ line-height: 1.5; max-width: 75ch; }}
nav {{ position: sticky; top: 0; background: #fffffff0; padding: .5rem 0; border-bottom: 1px solid #eee; z-index: 5; }}
nav a {{ margin-right: .9rem; white-space: nowrap; }} a {{ color: #0b57a4; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .75rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
tr.mean td {{ font-weight: 600; border-bottom: 2px solid #bbb; }} small, .small {{ color: #555; font-size: .85rem; }}
.ci {{ color: #666; font-size: .8rem; }}
figure {{ margin: 0 0 1rem; overflow-x: auto; }} figure > div {{ min-width: 620px; }}
@media print {{ nav {{ display: none; }} h3 {{ break-before: page; }} }}
"""


def report(results: Results, path: str | Path) -> Path:
    """Write one HTML page: the table, and for every family and task the curves and the aligned heatmap.

    Plotly is embedded once; the page needs no network. All labels are escaped.

    Parameters
    ----------
    results:
        As :func:`dfa_lens.demo.run` returns them.
    path:
        The file to write; a folder gets ``index.html``.

    Returns
    -------
    Path
        Of the written file.

    Raises
    ------
    DfaError
        If there are no results.
    """
    if not results.tasks:
        raise DfaError("There are no results to report.")
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / "index.html"
    families = list(dict.fromkeys(result.family for result in results.tasks))
    sections = []
    for family in families:
        sections.append(f'<h2 id="{text(family)}">{text(family)}</h2>')
        sections += [_task(result) for result in results.tasks if result.family == family]
    links = [
        f'<a href="#{_anchor(r)}">{text(r.family) + " " if len(families) > 1 else ""}{text(r.task)}</a>'
        for r in results.tasks
    ]
    provenance = "".join(f"<li>{text(key)}: {text(value)}</li>" for key, value in results.provenance.items())
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>dfa_lens: circuit transfer</title><link rel="icon" href="data:,"><style>{_STYLE}</style>
<script>{get_plotlyjs()}</script></head><body>
<h1>Circuit transfer from source to target</h1>
<p>{_words(results)}</p>
<nav><a href="#table">table</a> {" ".join(links)} <a href="#about">about</a></nav>
<h2 id="table">CPR by task</h2>
<div class="scroll">{_table(results)}</div>
<p class="small">CPR: area under the faithfulness curve over the fraction of nodes kept (higher is better), with 95 %
bootstrap intervals over examples. <b>gold</b>: attribution run directly on the target. <b>in-distribution</b>: W
trained on the task itself. <b>zero-shot</b>: W trained on all other tasks. <b>random W</b>: no training. <b>floor</b>:
what an empty circuit gets.</p>
{"".join(sections)}
<h2 id="about">About</h2>
<ul class="small">{provenance}</ul>
<p class="small">Method: Differentiable Faithfulness Alignment, arXiv 2604.24302. Nodes: attention heads and MLP blocks;
nodes outside a circuit are set to their activations on the corrupt prompt.</p>
</body></html>
"""
    write_atomically(path, page.encode())
    return path


def _anchor(result: TaskResult) -> str:
    return text(f"{result.family}-{result.task}").replace(" ", "-")


def _words(results: Results) -> str:
    table = results.table()
    means = table.groupby("setting", sort=False)["cpr"].mean()
    parts = [f"<b>{text(setting)}</b> {value:.3f}" for setting, value in means.items()]
    n = len(results.tasks)
    return f"Mean CPR over {n} {'task' if n == 1 else 'tasks and families'}: {', '.join(parts)}."


def _table(results: Results) -> str:
    tidy = results.table().set_index(["family", "task", "setting"])
    wide = results.summary()
    settings = list(wide.columns)
    head = "".join(f"<th>{text(setting)}</th>" for setting in settings)
    rows = []
    for (family, task), row in wide.iterrows():
        cells = []
        for setting in settings:
            cell = f"{row[setting]:.3f}"
            if (family, task, setting) in tidy.index:
                entry = tidy.loc[(family, task, setting)]
                cell += f' <span class="ci">[{entry["cpr_low"]:.2f}, {entry["cpr_high"]:.2f}]</span>'
            cells.append(f"<td>{cell}</td>")
        style = ' class="mean"' if task == "mean" else ""
        rows.append(f"<tr{style}><td>{text(family)}</td><td>{text(task)}</td>{''.join(cells)}</tr>")
    return f"<table><thead><tr><th>family</th><th>task</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _task(result: TaskResult) -> str:
    figures = [curves(result.curves, title=None)]
    for setting, alignment in result.alignments.items():
        if alignment.history:  # trained, so worth a picture
            figures.append(
                aligned_heatmap(
                    result.source,
                    result.circuits[setting],
                    alignment=alignment,
                    curve=result.curves[setting],
                    source_name=f"source: {result.source.meta.get('method', 'scores')}",
                    target_name=f"target: {setting} transfer",
                )
            )
    figures.append(scores_heatmap(result.gold, title=f"target: {GOLD} ({result.gold.meta.get('method', 'scores')})"))
    body = "".join(_html(figure) for figure in figures)
    return f'<h3 id="{_anchor(result)}">{text(result.family)}: {text(result.task)}</h3>{body}'


def _html(figure: go.Figure) -> str:
    config = {"responsive": True, "displaylogo": False}
    return f"<figure>{pio.to_html(figure, include_plotlyjs=False, full_html=False, config=config)}</figure>"
