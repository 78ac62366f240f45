"""Figures: heatmaps of scores, faithfulness curves, the report.

Every function returns a plotly Figure (``report`` writes HTML), shows nothing by itself and changes no global setting.
"""

from dfa_lens.plots.curves import curves
from dfa_lens.plots.heatmaps import aligned_heatmap, scores_heatmap
from dfa_lens.plots.report import report

__all__ = ["aligned_heatmap", "curves", "report", "scores_heatmap"]
