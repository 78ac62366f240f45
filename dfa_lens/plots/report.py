"""One self-contained HTML page with everything that a run found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dfa_lens.errors import DfaError
from dfa_lens.faithfulness import cpr_difference
from dfa_lens.files import write_atomically
from dfa_lens.plots.curves import curves
from dfa_lens.plots.heatmaps import aligned_heatmap, scores_heatmap
from dfa_lens.plots.matrices import alignment_explorer
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import FONT, text
from dfa_lens.plots.trends import recovery_bars, score_scatter, training_history
from dfa_lens.results import GOLD, Results, TaskResult

SIGNIFICANT = 0.05
"""Marks are set where the false discovery rate over all cells of the table is below this."""

_STYLE = f"""
:root {{ color-scheme: light dark; --ink: #222; --page: #fff; --soft: #666; --line: #ddd; --link: #0b57a4; }}
:root[data-scheme=dark] {{ --ink: #e6e6e6; --page: #16181c; --soft: #a2a6ad; --line: #3a3e46; --link: #8ab8f0; }}
body {{ font-family: {FONT}; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 1180px; padding: 1rem 1.25rem 4rem; }}
h1 {{ font-size: 1.7rem; margin: .5rem 0; }} h2 {{ margin-top: 2.5rem; border-bottom: 2px solid var(--line); }}
h3 {{ margin: 2rem 0 .25rem; scroll-margin-top: 4rem; }} h2 {{ scroll-margin-top: 4rem; }}
p, li {{ line-height: 1.5; max-width: 75ch; }} a {{ color: var(--link); }}
nav {{ position: sticky; top: 0; background: var(--page); padding: .5rem 0; border-bottom: 1px solid var(--line);
  z-index: 5; display: flex; flex-wrap: wrap; gap: .25rem .9rem; max-height: 4.5rem; overflow-y: auto; }}
nav a {{ white-space: nowrap; }} nav button {{ margin-left: auto; font: inherit; color: var(--ink);
  background: none; border: 1px solid var(--line); border-radius: 4px; cursor: pointer; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) {{ text-align: left; }}
tr.mean td {{ font-weight: 600; border-bottom: 2px solid var(--soft); }}
small, .small {{ color: var(--soft); font-size: .85rem; }} .ci {{ color: var(--soft); font-size: .8rem; }}
figure {{ margin: 0 0 1rem; overflow-x: auto; }} figure > div {{ min-width: 620px; }}
details > summary {{ cursor: pointer; margin: .5rem 0; }} pre {{ overflow-x: auto; font-size: .85rem; }}
@media print {{ nav, details > summary {{ display: none; }} h3 {{ break-before: page; }}
  figure {{ break-inside: avoid; }} body {{ max-width: none; padding: 0; }} }}
"""

# Colours follow the reader's setting, the button changes them; figures in a closed part are drawn when it opens.
_SCRIPT = """
const scheme = window.matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
const paint = (graph, which) => {
  const dark = which === 'dark';
  const change = {'paper_bgcolor': dark ? '#16181c' : '#ffffff', 'font.color': dark ? '#e6e6e6' : '#222222'};
  if (graph.layout.plot_bgcolor === '#ffffff' || graph.layout.plot_bgcolor === 'white' ||
      graph.layout.plot_bgcolor === '#16181c') {
    change['plot_bgcolor'] = change['paper_bgcolor'];
  }
  Object.keys(graph.layout).filter(key => /^[xy]axis/.test(key)).forEach(key => {
    if (graph.layout[key].gridcolor) { change[key + '.gridcolor'] = dark ? '#33373f' : '#eeeeee'; }
  });
  Plotly.relayout(graph, change);
};
const show = which => {
  document.documentElement.dataset.scheme = which;
  document.querySelectorAll('.plotly-graph-div').forEach(graph => { if (graph.layout) { paint(graph, which); } });
};
document.addEventListener('DOMContentLoaded', () => {
  if (scheme === 'dark') { show('dark'); }
  document.getElementById('scheme').addEventListener('click', () =>
    show(document.documentElement.dataset.scheme === 'dark' ? 'light' : 'dark'));
  document.querySelectorAll('details').forEach(part => part.addEventListener('toggle', () =>
    part.querySelectorAll('.plotly-graph-div').forEach(graph => Plotly.Plots.resize(graph))));
});
window.addEventListener('beforeprint', () => {
  show('light');
  document.querySelectorAll('details').forEach(part => { part.open = true; });
});
"""

_CITE = """@article{dfa2026,
  title = {Differentiable Faithfulness Alignment},
  journal = {arXiv preprint arXiv:2604.24302}
}"""


def report(results: Results, path: str | Path) -> Path:
    """Write one HTML page: words, the table, and for every family and task the curves and the aligned heatmaps.

    Plotly is embedded once; the page needs no network, is light or dark as the reader's system is, and prints. All
    labels are escaped.

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

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import tempfile
    >>> from dfa_lens import demo
    >>> size = demo.Size(train=4, test=4, steps=2, curve_points=3)
    >>> results = demo.run(families=["llama3"], only=["ioi"], size=size)
    >>> dfa.plots.report(results, tempfile.mkdtemp()).name
    'index.html'
    """
    if not results.tasks:
        raise DfaError("There are no results to report.")
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / "index.html"
    families = list(dict.fromkeys(result.family for result in results.tasks))
    sections = []
    for family in families:
        members = [result for result in results.tasks if result.family == family]
        sections.append(f'<h2 id="{_slug(family)}">{text(family)}</h2>')
        sections.append(_family(results, family))
        sections += [_task(result) for result in members]
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
{_words(results)}
<nav><a href="#table">table</a> {" ".join(links)} <a href="#about">about</a>
<button id="scheme" title="light or dark">light / dark</button></nav>
<h2 id="table">CPR by task</h2>
<div class="scroll">{_table(results)}</div>
<p class="small">CPR: area under the faithfulness curve over the fraction of nodes kept (higher is better), with 95 %
bootstrap intervals over examples. <b>gold</b>: attribution run directly on the target. <b>in-distribution</b>: W
trained on the task itself. <b>zero-shot</b>: W trained on all other tasks. Controls: <b>uniform-s</b>: as zero-shot,
but every source node has the same score; <b>depth-mean</b>: a fixed map by relative depth; <b>random-w</b>: no
training. <b>floor</b>: what an empty circuit gets. ▲: above every control, † : not the same as gold (paired bootstrap
over examples, false discovery rate below {SIGNIFICANT:.0%} over all cells).</p>
{"".join(sections)}
<h2 id="about">About</h2>
<ul class="small">{provenance}</ul>
<p class="small">Method: Differentiable Faithfulness Alignment, arXiv 2604.24302. Nodes: attention heads and MLP blocks;
nodes outside a circuit are set to their activations on the corrupt prompt. A CPR above 1 means that nodes which work
against the answer were left out, not that the circuit is better than the model. To cite:</p>
<pre>{text(_CITE)}</pre>
<script>{_SCRIPT}</script>
</body></html>
"""
    write_atomically(path, page.encode())
    return path


def _slug(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)


def _anchor(result: TaskResult) -> str:
    return _slug(f"{result.family}-{result.task}")


def _words(results: Results) -> str:
    table = results.table()
    means = table.groupby("setting", sort=False)["cpr"].mean()
    parts = [f"<b>{text(setting)}</b> {value:.3f}" for setting, value in means.items()]
    n = len(results.tasks)
    first = f"Mean CPR over {n} {'task' if n == 1 else 'tasks and families'}: {', '.join(parts)}."
    transferred = table[table["setting"] != GOLD]
    if transferred.empty:
        return f"<p>{first}</p>"
    recovered = transferred.groupby("setting", sort=False)["recovery"].mean()
    second = "Recovery, the CPR as a part of gold's: " + ", ".join(
        f"<b>{text(setting)}</b> {value:.0%}" for setting, value in recovered.items()
    )
    own = {(r.family, r.task, setting) for r in results.tasks for setting in r.curves if setting not in r.controls}
    cells = transferred[["family", "task", "setting"]].itertuples(index=False, name=None)
    weakest = transferred[[cell in own for cell in cells]].sort_values("recovery").iloc[:1]
    third = "".join(
        f"The lowest that is no control is {row.recovery:.0%}: {text(row.setting)}, {text(row.task)} in "
        f"{text(row.family)}."
        for row in weakest.itertuples()
    )
    return f"<p>{first} {second}. {third}</p>"


def _marks(results: Results) -> Mapping[tuple[str, str, str], str]:
    """Where a circuit is above every control (▲), and where it is not the same as gold (†)."""
    from scipy import stats

    tests: list[tuple[tuple[str, str, str], str, float]] = []
    for result in results.tasks:
        if len(result.curves[GOLD].clean_values) < 2:
            continue
        for setting, curve in result.curves.items():
            cell = (result.family, result.task, setting)
            if result.controls and setting not in result.controls:
                gaps = [cpr_difference(curve, result.curves[control]) for control in result.controls]
                if all(gap.value > 0 for gap in gaps):
                    tests.append((cell, "▲", max(gap.p for gap in gaps)))  # all must hold: the largest counts
            if setting != GOLD:
                tests.append((cell, "†", cpr_difference(curve, result.curves[GOLD]).p))
    marks: dict[tuple[str, str, str], str] = {}
    if tests:
        adjusted = stats.false_discovery_control(np.array([p for *_, p in tests]))
        for (cell, mark, _), q in zip(tests, adjusted, strict=True):
            if q < SIGNIFICANT:
                marks[cell] = marks.get(cell, "") + mark
    return marks


def _table(results: Results) -> str:
    tidy = results.table().set_index(["family", "task", "setting"])
    wide = results.summary()
    marks = _marks(results)
    settings = list(wide.columns)
    head = "".join(f"<th>{text(setting)}</th>" for setting in settings)
    rows = []
    for (family, task), row in wide.iterrows():
        cells = []
        for setting in settings:
            cell = f"{row[setting]:.3f}"
            if (family, task, setting) in tidy.index:
                entry = tidy.loc[(family, task, setting)]
                cell += f"<sup>{marks.get((family, task, setting), '')}</sup>"
                cell += f' <span class="ci">[{entry["cpr_low"]:.2f}, {entry["cpr_high"]:.2f}]</span>'
            cells.append(f"<td>{cell}</td>")
        style = ' class="mean"' if task == "mean" else ""
        rows.append(f"<tr{style}><td>{text(family)}</td><td>{text(task)}</td>{''.join(cells)}</tr>")
    return f"<table><thead><tr><th>family</th><th>task</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _family(results: Results, family: str) -> str:
    table = results.table()
    transferred = table[(table["family"] == family) & (table["setting"] != GOLD)]
    if transferred.empty:
        return ""
    return _html(recovery_bars(transferred, title="recovery: CPR / gold's CPR", height=380))


def _task(result: TaskResult) -> str:
    figures = [curves(result.curves, title=None)]
    trained = {
        setting: alignment
        for setting, alignment in result.alignments.items()
        if alignment.history and setting not in result.controls
    }
    for setting, alignment in trained.items():
        figures.append(
            aligned_heatmap(
                result.source,
                result.circuits[setting],
                alignment=alignment,
                curve=result.curves[setting],
                contributors=2,  # 24 of these share the page
                source_name=f"source: {result.source.meta.get('method', 'scores')}",
                target_name=f"target: {setting} transfer",
            )
        )
    figures.append(scores_heatmap(result.gold, title=f"target: {GOLD} ({result.gold.meta.get('method', 'scores')})"))
    body = "".join(_html(figure) for figure in figures)
    if trained:
        last = list(trained)[-1]
        more = [
            training_history(trained, smooth=5),
            alignment_explorer(trained[last], button=False, title=f"W, {last}", height=640),
            score_scatter(result.gold, result.circuits[last], first_name=GOLD, second_name=f"{last} transfer"),
        ]
        closed = "".join(_html(figure) for figure in more)
        body += f"<details><summary>Training, W, agreement with gold</summary>{closed}</details>"
    return f'<h3 id="{_anchor(result)}">{text(result.family)}: {text(result.task)}</h3>{body}'


def _html(figure: go.Figure | Picture) -> str:
    config = {"responsive": True, "displaylogo": False}
    return f"<figure>{figure.to_html(include_plotlyjs=False, full_html=False, config=config)}</figure>"
