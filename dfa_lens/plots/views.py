"""What a report shows of one task, or of some edge scores: words, figures, a table of nodes; packed."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dfa_lens.data.edges import EdgeScores
from dfa_lens.errors import EdgeError
from dfa_lens.experiments.table import GOLD, TaskResult
from dfa_lens.plots.comparison import circuit_comparison
from dfa_lens.plots.curves import curves
from dfa_lens.plots.edge_graph import circuit_graph
from dfa_lens.plots.edge_heatmap import edge_heatmap
from dfa_lens.plots.heatmaps import aligned_heatmap, scores_heatmap
from dfa_lens.plots.masks import mask_of
from dfa_lens.plots.matrices import alignment_explorer
from dfa_lens.plots.node_graph import node_graph
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.summary import FAITHFUL, Cell, Row, link_of, smallest
from dfa_lens.plots.tokens import token_heatmap
from dfa_lens.plots.trends import score_scatter, training_history

#: The functions that make figures of a page react; each is in it once.
REACTIONS = ("fit.js", "links.js", "graph.js", "blocks.js", "nodes.js")
#: Source nodes that a hover names and a click outlines: many figures share the page.
CONTRIBUTORS = 3
#: The part of the nodes that is drawn as the circuit where no curve says how many are faithful, or only all are.
WITHOUT_CURVE = 0.2


@dataclass(frozen=True)
class Nodes:
    """The table of a task's nodes; of its columns the first ``words`` are words."""

    columns: list[str]
    rows: list[Row]
    words: int = 2


@dataclass(frozen=True)
class View:
    """What is shown when one entry of the menu is chosen.

    Attributes
    ----------
    group, name, link:
        Where it is in the menu, and what the address says of it.
    words:
        Lines above the figures.
    packed:
        All its figures by name: numbers, those of settings, what is below them, those of closed parts.
    closed:
        What a closed part is called → its figures.
    """

    group: str
    name: str
    link: str
    words: list[str]
    packed: str
    n_figures: int = 0
    settings: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)
    closed: dict[str, list[str]] = field(default_factory=dict)
    nodes: Nodes | None = None

    @property
    def anchor(self) -> str:
        """Its id in the page."""
        return "view-" + re.sub(r"[^\w-]+", "-", self.link)


def view_of_task(result: TaskResult) -> View:
    """Curves; a heatmap for each transfer; in a closed part what training did; the nodes as a table."""
    trained = {
        setting: alignment
        for setting, alignment in result.alignments.items()
        if alignment.history and setting not in result.controls
    }
    shown = [*trained, *(name for name in result.circuits if name not in trained and name not in result.controls)]
    figures: dict[str, Picture] = {}
    if result.curves:
        figures["0"] = curves(result.curves, title="Faithfulness by circuit size")
    n_figures = len(figures)
    for setting in shown:
        curve = result.curves.get(setting)
        size = smallest(curve)
        figures[setting] = aligned_heatmap(
            result.source,
            result.circuits[setting],
            alignment=result.alignments.get(setting),
            curve=curve,
            gold=result.gold,
            size=size[0] if size is not None and size[0] <= len(result.circuits[setting]) else None,
            contributors=CONTRIBUTORS,
            title=f"{setting}: source, target{', gold, and their difference' if result.gold is not None else ''}",
            source_name=f"source: {result.source.meta.get('method', 'scores')}",
        )
    if not shown and result.gold is not None:
        figures[str(n_figures)] = scores_heatmap(result.gold, title=f"target: {GOLD}")
        n_figures += 1
    below, closer = _circuit(result, shown)
    trained_figures: dict[str, Picture] = {}
    if trained:
        last = list(trained)[-1]
        trained_figures["training"] = training_history(trained, smooth=5, title="Training")
        trained_figures["W"] = alignment_explorer(trained[last], button=False, title=f"W, {last}", height=640)
        if result.gold is not None:
            trained_figures["agreement"] = score_scatter(
                result.gold,
                result.circuits[last],
                first_name=GOLD,
                second_name=f"{last} transfer",
                title="Agreement with gold",
            )
    closed = {
        "The circuit beside gold's, and where in the prompt": closer,
        "Training, W, agreement with gold": trained_figures,
    }
    return View(
        result.family,
        result.task,
        link_of(family=result.family, task=result.task),
        _words(result, shown) if result.curves else [],
        _packed_figures({**figures, **below, **closer, **trained_figures}),
        n_figures,
        shown,
        list(below),
        {words: list(named) for words, named in closed.items() if named},
        _nodes(result, shown),
    )


def _circuit(result: TaskResult, shown: list[str]) -> tuple[dict[str, Picture], dict[str, Picture]]:
    """The circuit in layers; and beside gold's of the same size, and by token, which are closed at first."""
    main = next((name for name in ("zero-shot", *reversed(shown)) if name in shown), GOLD)
    scores = result.circuits.get(main, result.gold)
    if scores is None or any(node.kind not in ("head", "mlp", "input") for node in scores.nodes):
        return {}, {}
    size = smallest(result.curves.get(main))
    k = len(scores) if size is None else size[0]
    of = ""
    if k >= len(scores):  # nothing to see
        of = f" (f ≥ {FAITHFUL:g} takes all {len(scores)})" if size is not None else ""
        k = max(1, round(WITHOUT_CURVE * len(scores)))
    circuit = scores.circuit(k, name=main)
    of = f"{main}: the {k} best nodes{of}"
    told = result.inspection if result.inspection is not None and len(result.inspection.nodes) else None
    does = "" if told is None else ", and on click what a node does on a test prompt"
    below = {"circuit": node_graph(circuit, scores=scores, inspection=told, title=f"{of}{does}")}
    closer: dict[str, Picture] = {}
    if main != GOLD and result.gold is not None and result.gold.nodes == scores.nodes:
        closer["beside gold"] = circuit_comparison(
            {main: circuit, GOLD: result.gold.circuit(k, name=GOLD)}, title=f"The {k} best nodes of {main} and of gold"
        )
    if result.by_token is not None:
        method = result.by_token.meta.get("method", "scores")
        closer["tokens"] = token_heatmap(result.by_token, title=f"Target: {method} on a test prompt, token by token")
    return below, closer


def _words(result: TaskResult, shown: list[str]) -> list[str]:
    """CPR and the smallest faithful circuit of gold and of each transfer."""
    gold = result.curves.get(GOLD)
    lines = []
    for name in [GOLD, *shown]:
        curve = result.curves.get(name)
        if curve is None:
            continue
        ratio = f" ({curve.cpr / gold.cpr:.0%} of gold's)" if gold is not None and name != GOLD and gold.cpr > 0 else ""
        size = smallest(curve)
        circuit = f"{size[0]} of {curve.n_nodes} nodes {size[1]}".rstrip() if size else "none that was run"
        lines.append(f"{name}: CPR {curve.cpr:.3f}{ratio}; smallest circuit with f ≥ {FAITHFUL:g}: {circuit}")
    if shown:
        lines.append("Each heatmap is preset to that circuit; what is outside is pale.")
    return lines


def _nodes(result: TaskResult, shown: list[str]) -> Nodes | None:
    """Every node of the target: gold's score and rank, and of each transfer the mask (or score) and rank."""
    given = {name: scores for name, scores in ((GOLD, result.gold),) if scores is not None}
    given |= {name: result.circuits[name] for name in shown}
    if not given:
        return None
    nodes = next(iter(given.values())).nodes
    columns: dict[str, list[str]] = {"node": list(nodes.names), "kind": [node.kind for node in nodes]}
    columns["layer"] = [str(node.layer) for node in nodes]
    for name, scores in given.items():
        mask = mask_of(scores)
        values = scores.values.numpy() if mask is None else mask
        columns[f"{name}: {'score' if mask is None else 'mask'}"] = [f"{value:.3g}" for value in np.asarray(values)]
        columns[f"{name}: rank"] = [str(int(rank)) for rank in scores.ranks()]
    rows = [Row([Cell(cell, cell) for cell in cells]) for cells in zip(*columns.values(), strict=True)]
    return Nodes(list(columns), rows)


def view_of_edges(name: str, scores: EdgeScores) -> View:
    """The circuit as a graph, and the blocks of edges."""
    words = [str(scores.meta[key]) for key in ("method", "model") if scores.meta.get(key)]
    return View(
        "edges",
        name,
        link_of(edges=name),
        [
            ", ".join([*words, f"{len(scores):,} edges"]),
            "From the writers (embedding, heads, MLP blocks) to what reads them (queries, keys, values, MLP blocks, "
            "logits). Red: the clean activation on the edge helps; blue: it hurts. A click on a node of the graph "
            "shows what it reads and writes, a click on a block of the heatmap its edges.",
        ],
        _packed_figures({"0": _graph(scores), "1": edge_heatmap(scores)}),
        2,
    )


def _graph(scores: EdgeScores) -> Picture:
    """The graph; where none of the best edges lies on a path (a sample of edges), of all of them."""
    try:
        return circuit_graph(scores)
    except EdgeError:
        return circuit_graph(scores, prune=False)


def parts_of(figure: Picture) -> dict[str, Any]:
    """Data, layout and reactions of a figure, as JSON has them."""
    made = json.loads(str(figure.to_json(remove_uids=True)))
    made["layout"].pop("template", None)
    reacts = [(reaction.template, reaction.data) for reaction in figure.reactions]
    return {"data": made["data"], "layout": made["layout"], "reacts": reacts}


def _packed_figures(figures: Mapping[str, Picture]) -> str:
    return packed(json.dumps({name: parts_of(figure) for name, figure in figures.items()}, separators=(",", ":")))


def packed(text: str) -> str:
    """Text as a page holds it: gzip, base64."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def unpacked(text: str) -> str:
    """The text again.

    Examples
    --------
    >>> from dfa_lens.plots.views import packed, unpacked
    >>> unpacked(packed("a page"))
    'a page'
    """
    return gzip.decompress(base64.b64decode(text)).decode()
