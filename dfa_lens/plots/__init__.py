"""Figures: heatmaps of scores, graphs of circuits, faithfulness curves, matrices, trends, the report, the paper's own.

Every function returns a :class:`~dfa_lens.plots.picture.Picture`, a plotly Figure that carries its numbers
(``.to_frame()``); ``report`` and ``paper`` write files. Nothing is shown by itself and no global setting is changed.
"""

from dfa_lens.plots.comparison import circuit_comparison
from dfa_lens.plots.curves import curves
from dfa_lens.plots.edge_graph import circuit_graph
from dfa_lens.plots.edge_heatmap import edge_heatmap
from dfa_lens.plots.heatmaps import aligned_heatmap, scores_heatmap
from dfa_lens.plots.matrices import alignment_explorer, transfer_matrix
from dfa_lens.plots.node_graph import node_graph
from dfa_lens.plots.overlap import circuit_overlap
from dfa_lens.plots.paper_figures import paper, paper_curves, paper_matrices, paper_recovery
from dfa_lens.plots.picture import Picture
from dfa_lens.plots.report import report
from dfa_lens.plots.tokens import token_heatmap
from dfa_lens.plots.trends import recovery_bars, score_scatter, size_sensitivity, training_history

__all__ = [
    "Picture",
    "aligned_heatmap",
    "alignment_explorer",
    "circuit_comparison",
    "circuit_graph",
    "circuit_overlap",
    "curves",
    "edge_heatmap",
    "node_graph",
    "paper",
    "paper_curves",
    "paper_matrices",
    "paper_recovery",
    "recovery_bars",
    "report",
    "score_scatter",
    "scores_heatmap",
    "size_sensitivity",
    "token_heatmap",
    "training_history",
    "transfer_matrix",
]
