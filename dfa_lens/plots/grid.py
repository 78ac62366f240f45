"""Where figures draw heads and MLP blocks: a row a layer, a column a head, one column for the MLP blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dfa_lens.data.nodes import Node, NodeSet, SpanNode
from dfa_lens.errors import CircuitError

#: Pixels of a layer, of models with more than sixteen, and above and below all layers.
LAYER, LAYER_OF_MANY, AROUND = 34, 24, 130


@dataclass(frozen=True)
class Grid:
    """Where the nodes of a model are drawn: a row a layer, a column a head, one for the MLP blocks at the right."""

    n_layers: int
    n_heads: int
    mlps: bool

    @classmethod
    def of(cls, nodes: NodeSet) -> Grid:
        """That of heads and MLP blocks (and the input).

        Raises
        ------
        CircuitError
            If there are others.
        """
        foreign = next((n for n in nodes if n.kind not in ("head", "mlp", "input") or isinstance(n, SpanNode)), None)
        if foreign is not None:
            raise CircuitError(f"Heads and MLP blocks are drawn in layers, and {foreign.name!r} is neither.")
        heads = [node.size or 1 for node in nodes if node.kind == "head"]
        return cls(nodes.n_layers, max(heads, default=0), any(node.kind == "mlp" for node in nodes))

    @property
    def column_of_mlps(self) -> float:
        """Beside the heads, with a gap."""
        return self.n_heads + 0.3

    def place(self, node: Node) -> tuple[float, float]:
        """x and y of a node; the input is below the middle."""
        if node.kind == "input":
            return (self.n_heads - 1) / 2, -1.0
        return (self.column_of_mlps if node.kind == "mlp" else float(node.index or 0)), float(node.layer)

    def axes(self, figure: go.Figure, x: str = "xaxis", y: str = "yaxis", *, with_input: bool, domain: Any) -> None:
        """Layers and heads along the sides."""
        every = 1 if self.n_heads <= 12 else 4 if self.n_heads <= 32 else 8
        rows = 1 if self.n_layers <= 16 else 4
        plain = {"showgrid": False, "zeroline": False, "showline": False, "ticks": "", "automargin": True}
        ticks, words = [*range(0, self.n_heads, every)], [*map(str, range(0, self.n_heads, every))]
        if self.mlps:
            ticks, words = [*ticks, self.column_of_mlps], [*words, "MLP"]
        lowest = -1.6 if with_input else -0.6
        figure.update_layout(
            {
                x: {
                    **plain,
                    "domain": list(domain),
                    "range": [-0.8, (self.column_of_mlps if self.mlps else self.n_heads - 1) + 0.8],
                    "tickvals": ticks,
                    "ticktext": words,
                    "title": {"text": "head", "standoff": 6},
                },
                y: {
                    **plain,
                    "range": [lowest, self.n_layers - 0.4],
                    "tickvals": [*([-1] if with_input else []), *range(0, self.n_layers, rows)],
                    "ticktext": [*(["input"] if with_input else []), *map(str, range(0, self.n_layers, rows))],
                    "title": {"text": "layer", "standoff": 6},
                },
            }
        )

    def tall(self) -> int:
        """Pixels of the layers."""
        return (LAYER if self.n_layers <= 16 else LAYER_OF_MANY) * self.n_layers
