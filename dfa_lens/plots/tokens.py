"""Layer × token heatmaps: what matters where in the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dfa_lens.data.nodes import SpanNode
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import ScoreError
from dfa_lens.plots import arguments, picture
from dfa_lens.plots import style as styling
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.style import Style

#: Pixels of a layer, of models with more than sixteen, and above and below the panels.
LAYER, LAYER_OF_MANY, AROUND = 26, 18, 190
_PANELS = {"head": "attention (the layer's heads added up)", "mlp": "MLP"}
#: Letters of a label; nodes that a hover names.
LETTERS, NAMED = 14, 4
#: Pixels of a token with a label, of what stands beside the panels, and of a figure that nobody has given a width to.
LABEL, BESIDE, WIDTH = 15, 150, 700
#: From so many pixels on there are two panels beside each other, and with more room more labels.
TWO, WIDER, NARROW = 700, (1000, 1300), 380


def token_heatmap(
    scores: NodeScores,
    *,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    style: Style = "screen",
) -> Picture:
    """What matters where: scores by layer and by token (or span) of the prompt.

    One panel for attention, in which the scores of a layer's heads at a token are added up, and one for the MLP blocks;
    both on one colour scale, red where restoring the clean activation there helps and blue where it hurts. Hover: the
    sum, and the heads that make most of it. First-order scores add up; of ``exact`` scores the sum is not the effect of
    all heads together.

    Parameters
    ----------
    scores:
        Of nodes at spans. For every token of a prompt: :meth:`dfa.Schema.by_token
        <dfa_lens.data.spans.Schema.by_token>`.
    style:
        See :data:`~dfa_lens.plots.style.Style`.

    Raises
    ------
    ScoreError
        If the nodes are not heads and MLP blocks at spans.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pair = dfa.tasks.load("ioi", model.tokenizer, n=4)[:1]
    >>> schema = dfa.Schema.by_token(pair)
    >>> nodes = dfa.NodeSet.heads_and_mlps(model).at_spans(schema.names)
    >>> scores = dfa.attribute(model, schema.apply(pair), nodes=nodes, method="nap")
    >>> dfa.plots.token_heatmap(scores).to_frame().columns.tolist()
    ['layer', 'token', 'kind', 'score']
    """
    arguments.expect(1, "scores", scores, NodeScores)
    table = _by_node(scores)
    sums = table.groupby(["layer", "token", "kind"], as_index=False, sort=False)["score"].sum()
    tokens = list(dict.fromkeys(table["token"]))
    layers = sorted(set(table["layer"].tolist()))
    kinds = [kind for kind in _PANELS if (table["kind"] == kind).any()]
    limit = styling.robust_limit(sums["score"].to_numpy())
    figure = Picture()
    gap = 0.05
    share = (1 - gap * (len(kinds) - 1)) / len(kinds)
    step = max(1, -(-len(layers) // 16))
    for number, kind in enumerate(kinds):
        axis = "" if number == 0 else "2"
        own = sums[sums["kind"] == kind].pivot(index="layer", columns="token", values="score")
        z = own.reindex(index=layers, columns=tokens).to_numpy()
        figure.add_heatmap(
            z=z,
            text=_hover(table[table["kind"] == kind], layers, tokens, z),
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
            name=kind,
            xgap=1,
            ygap=1,
            xaxis=f"x{axis}",
            yaxis=f"y{axis}",
        )
        start = number * (share + gap)
        figure.update_layout(
            {
                f"xaxis{axis}": {
                    "domain": [round(start, 4), round(start + share, 4)],
                    "anchor": f"y{axis}",
                    **_labels(tokens, share * ((width or WIDTH) - BESIDE)),
                    "tickangle": -90,
                    "tickfont": {"size": 11},
                    "showgrid": False,
                    "zeroline": False,
                    "automargin": True,
                },
                f"yaxis{axis}": {
                    "anchor": f"x{axis}",
                    "tickvals": list(range(0, len(layers), step)),
                    "ticktext": [str(layer) for layer in layers[::step]],
                    "title": {"text": "layer", "standoff": 4} if number == 0 else None,
                    "showgrid": False,
                    "zeroline": False,
                },
            }
        )
        figure.add_annotation(
            text=f"<b>{_PANELS[kind]}</b>",
            xref=f"x{axis} domain",
            yref=f"y{axis} domain",
            x=0,
            y=1,
            xanchor="left",
            yanchor="bottom",
            yshift=4,
            showarrow=False,
        )
    rows = (LAYER if len(layers) <= 16 else LAYER_OF_MANY) * len(layers)
    tall = height or rows + AROUND
    styling.layout(figure, title, width=width, height=tall, style=style)
    figure.update_layout(
        coloraxis={
            "cmin": -limit,
            "cmax": limit,
            "colorscale": [list(stop) for stop in styling.DIVERGING],
            "colorbar": {"thickness": 12, "title": {"text": "score"}, "tickformat": ".2~g"},
        },
    )
    if styling.on_paper(style):
        return figure.carry(sums)
    wide: dict[str, Any] = {
        "height": tall,
        "xaxis.domain": list(figure.layout.xaxis.domain),
        "yaxis.domain": [0, 1],
    }
    narrow: dict[str, Any] = {"height": tall, "xaxis.domain": [0, 1], "yaxis.domain": [0, 1]}
    if len(kinds) == 2:
        high = 2 * rows + 2 * AROUND
        part = round(rows / (2 * rows + AROUND), 4)
        wide |= {"xaxis2.domain": list(figure.layout.xaxis2.domain), "yaxis2.domain": [0, 1]}
        narrow |= {"height": high, "yaxis.domain": [1 - part, 1], "xaxis2.domain": [0, 1], "yaxis2.domain": [0, part]}
    arrangements = [(least, wide | _ticks(len(kinds), tokens, share * (least - BESIDE))) for least in (*WIDER, TWO)]
    arrangements = [*sorted(arrangements, reverse=True), (0, narrow | _ticks(len(kinds), tokens, NARROW - BESIDE))]
    return figure.carry(sums, fit=picture.fit(arrangements, captions=24))


def _labels(tokens: Sequence[str], room: float) -> dict[str, Any]:
    """As many labels as there is room for, in pixels."""
    every = max(1, math.ceil(len(tokens) * LABEL / max(room, LABEL)))
    return {"tickvals": list(range(0, len(tokens), every)), "ticktext": [_label(token) for token in tokens[::every]]}


def _ticks(panels: int, tokens: Sequence[str], room: float) -> dict[str, Any]:
    """The labels of all panels, as plotly is to change them."""
    labels = _labels(tokens, room)
    axes = ["xaxis", "xaxis2"][:panels]
    return {f"{axis}.{key}": value for axis in axes for key, value in labels.items()}


def _by_node(scores: NodeScores) -> pd.DataFrame:
    """node, kind, layer, token, score."""
    rows = []
    for node, value in zip(scores.nodes, scores.values.tolist(), strict=True):
        if not isinstance(node, SpanNode) or node.kind not in _PANELS:
            raise ScoreError(
                f"This figure is of heads and MLP blocks at tokens, and {node.name!r} is not: attribute with "
                "nodes=nodes.at_spans(schema.names), schema = dfa.Schema.by_token(pairs[:1])."
            )
        rows.append((node.name.partition("@")[0], node.kind, node.layer, node.span, value))
    return pd.DataFrame(rows, columns=["node", "kind", "layer", "token", "score"])


def _hover(table: pd.DataFrame, layers: list[int], tokens: list[str], z: np.ndarray) -> list[list[str]]:
    """[layer][token] the sum, and the nodes that make most of it."""
    most: dict[tuple[int, str], list[str]] = {}
    ranked = table.sort_values("score", key=abs, ascending=False, kind="stable")
    for each in ranked.groupby(["layer", "token"]).head(NAMED).itertuples(index=False):
        named = most.setdefault((each.layer, each.token), [])
        if each.kind == "head":
            named.append(f"{each.node} {each.score:+.3g}")

    def text(layer: int, token: str, value: float) -> str:
        if (layer, token) not in most:
            return ""
        parts = ", ".join(most[layer, token])
        of = f"<br>most of it: {parts}" if parts else ""
        return f"<b>layer {layer}, {styling.text(token)}</b><br>score {value:+.4g}{of}"

    return [
        [text(layer, token, value) for token, value in zip(tokens, row, strict=True)]
        for layer, row in zip(layers, z.tolist(), strict=True)
    ]


def _label(token: str) -> str:
    return styling.text(token if len(token) <= LETTERS else f"{token[: LETTERS - 1]}…")
