"""What a referee would ask of an alignment: does it follow depth, how many directions has it, what is task-specific.

None of these runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.scores import NodeScores
from dfa_lens.data.statistics import Correlation, correlation
from dfa_lens.errors import AlignmentError, ScoreError
from dfa_lens.transfer import controls


def depth_correlation(source: NodeScores, target: NodeScores) -> Correlation:
    """Agreement of target scores with the source's, carried over by relative depth alone.

    Compare gold, the scores that an alignment gives, and those that it gave before training.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> nodes = dfa.NodeSet.for_sizes(4, 2)
    >>> source = dfa.NodeScores(torch.tensor([float(node.layer) for node in nodes]), nodes)
    >>> target = dfa.controls.depth_mean(nodes, dfa.NodeSet.for_sizes(8, 2)).transfer(source)
    >>> dfa.diagnostics.depth_correlation(source, target).pearson > 0.9
    True
    """
    return correlation(controls.depth_mean(source.nodes, target.nodes).transfer(source), target)


def effective_rank(alignment: Alignment) -> float:
    """exp of the entropy of W's normalised singular values: how many directions of source scores W tells apart.

    Between 1 and the smaller side of W (Roy and Vetterli 2007).

    Raises
    ------
    AlignmentError
        If W is zero.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source = dfa.NodeSet.for_sizes(6, 8)
    >>> target = dfa.NodeSet.for_sizes(10, 10)
    >>> round(dfa.diagnostics.effective_rank(dfa.controls.depth_mean(source, target)), 1)
    11.9
    """
    values = torch.linalg.svdvals(alignment.W.double())
    if not bool((values > 0).any()):
        raise AlignmentError("W is zero: it has no rank.")
    p = values / values.sum()
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def shared_part(transferred: Mapping[str, NodeScores]) -> float:
    """How much of the scores of several tasks is common to all: ‖mean of ŝ‖² / mean of ‖ŝ‖², each ŝ centred.

    1: the same ranking for every task, so the source scores play no part. 1 / (number of tasks): nothing in common.

    Raises
    ------
    ScoreError
        If there are fewer than two tasks, or their nodes differ.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> same = dfa.controls.random_scores(dfa.NodeSet.for_sizes(6, 8))
    >>> round(dfa.diagnostics.shared_part({"ioi": same, "mcqa": same}), 3)
    1.0
    """
    if len(transferred) < 2:
        raise ScoreError("What is shared between tasks needs the scores of at least two.")
    first = next(iter(transferred.values()))
    for task, scores in transferred.items():
        scores.require(first.nodes, f"The scores of task {task!r}")
    rows = torch.stack([scores.values.double() for scores in transferred.values()])
    rows = rows - rows.mean(1, keepdim=True)
    power = (rows**2).sum(1).mean()
    if power == 0:
        raise ScoreError("All scores are constant: nothing is shared or specific.")
    return float((rows.mean(0) ** 2).sum() / power)


def stability(alignment: Alignment, scores: NodeScores, *, noise: float = 0.1, draws: int = 20, seed: int = 0) -> float:
    """Mean Spearman correlation of the target's ranking with the one from perturbed source scores.

    Parameters
    ----------
    noise:
        Standard deviation of the normal numbers that are added, in units of the scores' own.
    draws, seed:
        How many perturbations, and of which random numbers.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source = dfa.NodeSet.for_sizes(6, 8)
    >>> target = dfa.NodeSet.for_sizes(10, 10)
    >>> alignment = dfa.controls.random_w(source, target)
    >>> dfa.diagnostics.stability(alignment, dfa.controls.random_scores(source), noise=0.01) > 0.9
    True
    """
    if not noise > 0 or draws < 1:
        raise ScoreError(f"noise must be positive and draws at least 1, not {noise} and {draws}.")
    generator = torch.Generator().manual_seed(seed)
    base = alignment.transfer(scores)
    spread = noise * float(scores.values.std(correction=0))
    found = []
    for _ in range(draws):
        moved = scores.values + spread * torch.randn(len(scores), generator=generator, dtype=torch.float32)
        found.append(correlation(base, alignment.transfer(NodeScores(moved, scores.nodes))).spearman)
    return sum(found) / len(found)


def contributors(alignment: Alignment, scores: NodeScores, *, nodes: int = 10, each: int = 3) -> Any:
    """The best target nodes and the source nodes that their scores come from.

    Parameters
    ----------
    nodes, each:
        How many target nodes, and how many source nodes for each.

    Returns
    -------
    pandas.DataFrame
        A row for every pair: target, target_score, source, source_score, weight (W), product.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source, target = dfa.NodeSet.for_sizes(2, 2), dfa.NodeSet.for_sizes(3, 2)
    >>> alignment = dfa.controls.random_w(source, target)
    >>> dfa.diagnostics.contributors(alignment, dfa.controls.random_scores(source), nodes=2, each=2).shape[0]
    4
    """
    import pandas as pd

    transferred = alignment.transfer(scores)
    if not 1 <= nodes <= len(transferred) or not 1 <= each <= len(scores):
        raise ScoreError(f"nodes must be 1 to {len(transferred)} and each 1 to {len(scores)}, not {nodes} and {each}.")
    products, W = alignment.contributions(scores), alignment.W
    rows = []
    for j in transferred.order()[:nodes].tolist():
        for i in products[:, j].abs().argsort(descending=True)[:each].tolist():
            rows.append(
                {
                    "target": transferred.nodes.names[j],
                    "target_score": float(transferred.values[j]),
                    "source": scores.nodes.names[i],
                    "source_score": float(scores.values[i]),
                    "weight": float(W[i, j]),
                    "product": float(products[i, j]),
                }
            )
    return pd.DataFrame(rows)
