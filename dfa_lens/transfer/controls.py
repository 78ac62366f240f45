"""Honest controls: what a transferred circuit must beat before its source can be said to matter.

- :func:`random_w`, :func:`permuted_w`, :func:`scrambled`: is it this W, and this pairing with s?
- :func:`depth_mean`: does a fixed map by relative depth do as well?
- :func:`uniform`, :func:`random_scores`, put in for s in training *and* transfer: does the source matter at all?
- :func:`target_only`: a free mask on the target under the same loss: what is the ceiling?
- :func:`regression`: least squares from source scores to gold scores of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack

import torch

from dfa_lens.data.alignment import Alignment, Scaling, scale
from dfa_lens.data.nodes import Node, NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import AlignmentError, unknown
from dfa_lens.models.backend import HookedModel
from dfa_lens.transfer.recipe import Options
from dfa_lens.transfer.trainer import fit


def random_w(source: NodeSet, target: NodeSet, *, seed: int = 0) -> Alignment:
    """An alignment whose W is drawn from a standard normal distribution.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source = dfa.NodeSet.for_sizes(6, 8)
    >>> target = dfa.NodeSet.for_sizes(10, 10)
    >>> dfa.controls.random_w(source, target).W.shape
    torch.Size([54, 110])
    """
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(len(source), len(target), generator=generator, dtype=torch.float32)
    return Alignment.of(W, source, target, meta={"control": "random-w", "seed": seed})


def permuted_w(alignment: Alignment, *, seed: int = 0) -> Alignment:
    """The alignment with the columns of W (the target nodes) in random order.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source = dfa.NodeSet.for_sizes(6, 8)
    >>> target = dfa.NodeSet.for_sizes(10, 10)
    >>> alignment = dfa.controls.random_w(source, target)
    >>> permuted = dfa.controls.permuted_w(alignment)
    >>> bool((permuted.W.sum(1) - alignment.W.sum(1)).abs().max() < 1e-4)
    True
    """
    order = torch.randperm(len(alignment.target), generator=torch.Generator().manual_seed(seed))
    last = alignment.stages[-1]
    bias = None if last.bias is None else last.bias[order]
    permuted = Alignment.of(last.W[:, order], last.source, last.target, scaling=last.scaling, bias=bias)
    meta = {"control": "permuted-w", "seed": seed, "of": dict(alignment.meta)}
    return Alignment((*alignment.stages[:-1], *permuted.stages), alignment.temperature, (), meta)


def scrambled(scores: NodeScores, *, seed: int = 0, within: Literal["all", "kind and depth"] = "all") -> NodeScores:
    """The same values on the wrong nodes: put in for s at transfer.

    Parameters
    ----------
    within:
        "all": any node's value may come to any other. "kind and depth": only to nodes of its kind in the same third of
        the layers, so that what is lost is which of them it was.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(6, 8)
    >>> scores = dfa.controls.random_scores(nodes)
    >>> bool((dfa.controls.scrambled(scores).values.sort()[0] == scores.values.sort()[0]).all())
    True
    """
    if within not in ("all", "kind and depth"):
        raise unknown("within", within, ("all", "kind and depth"), AlignmentError)
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(scores))
    groups: dict[tuple[str, int], list[int]] = {}
    for i, node in enumerate(scores.nodes):
        place = (node.kind, 3 * max(node.layer, 0) // scores.nodes.n_layers) if within == "kind and depth" else ("", 0)
        groups.setdefault(place, []).append(i)
    for members in groups.values():
        own = torch.tensor(members)
        order[own] = own[torch.randperm(len(own), generator=generator)]
    return NodeScores(scores.values[order], scores.nodes, {**scores.meta, "control": "scrambled-s", "seed": seed})


def uniform(nodes: NodeSet) -> NodeScores:
    """The same score, 1, for every node: put in for s in training and transfer.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.controls.uniform(dfa.NodeSet.for_sizes(1, 2)).values.tolist()
    [1.0, 1.0, 1.0]
    """
    return NodeScores(torch.ones(len(nodes), dtype=torch.float32), nodes, {"control": "uniform-s"})


def random_scores(nodes: NodeSet, *, seed: int = 0) -> NodeScores:
    """Standard normal scores: put in for s in training and transfer, with another seed for every task.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.controls.random_scores(dfa.NodeSet.for_sizes(1, 2), seed=3).values.shape
    torch.Size([3])
    """
    values = torch.randn(len(nodes), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return NodeScores(values, nodes, {"control": "random-s", "seed": seed})


def depth_mean(source: NodeSet, target: NodeSet) -> Alignment:
    """A fixed alignment by relative depth, with nothing learned.

    Every source layer goes to its two nearest target layers by relative depth, linearly weighted, and there evenly to
    all nodes of its own kind (heads to heads, MLPs to MLPs).

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> fixed = dfa.controls.depth_mean(dfa.NodeSet.for_sizes(2, 1), dfa.NodeSet.for_sizes(3, 1))
    >>> fixed.W[1].round(decimals=2).tolist()
    [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    W = torch.zeros(len(source), len(target), dtype=torch.float32)
    last_source, last_target = max(source.n_layers - 1, 1), max(target.n_layers - 1, 1)
    members: dict[tuple[int, str], list[int]] = {}
    for j, node in enumerate(target):
        members.setdefault((node.layer, node.kind), []).append(j)
    for i, node in enumerate(source):
        at = max(node.layer, 0) / last_source * last_target
        below = min(int(at), target.n_layers - 1)
        above = min(below + 1, target.n_layers - 1)
        for layer, weight in ((below, 1 - (at - below)), (above, at - below)):
            alike = members.get((layer, node.kind), [])
            if alike and weight > 0:
                W[i, alike] += weight / len(alike)
    if not W.any():
        raise AlignmentError("Source and target have no nodes of the same kind: depth_mean has nothing to map.")
    return Alignment.of(W, source, target, meta={"control": "depth-mean"})


_CONSTANT = NodeSet([Node("constant", "constant", "custom", -1)])


def constant() -> NodeScores:
    """The score 1 on a single node: with it as s in training and transfer, W is a free mask of the target.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> len(dfa.controls.constant())
    1
    """
    return NodeScores(torch.ones(1, dtype=torch.float32), _CONSTANT, {"control": "target-only"})


def target_only(target: HookedModel, pairs: Mapping[str, PromptPairs], **options: Unpack[Options]) -> NodeScores:
    """A free mask on the target, trained with the same loss: the ceiling of every transfer.

    Parameters
    ----------
    pairs:
        The training pairs by task; all tasks share one mask.
    options:
        As for :func:`dfa_lens.fit`.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = {"ioi": dfa.tasks.load("ioi", model.tokenizer, n=4)}
    >>> dfa.controls.target_only(model, pairs, steps=2).values.shape
    torch.Size([54])
    """
    one = constant()
    return fit(target, dict.fromkeys(pairs, one), pairs, **options).transfer(one)


def regression(
    scores: Mapping[str, NodeScores],
    gold: Mapping[str, NodeScores],
    *,
    ridge: float = 0.0,
    scaling: Scaling = "unit",
) -> Alignment:
    """Least squares from source scores to gold scores of the target, both scaled.

    Parameters
    ----------
    ridge:
        Weight of the squared entries of W. At 0 the solution of least norm is taken (there are fewer tasks than
        nodes, so many fit exactly).

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source, target = dfa.NodeSet.for_sizes(1, 2), dfa.NodeSet.for_sizes(2, 2)
    >>> given = {t: dfa.controls.random_scores(source, seed=i) for i, t in enumerate("ab")}
    >>> gold = {t: dfa.controls.random_scores(target, seed=9 + i) for i, t in enumerate("ab")}
    >>> fitted = dfa.controls.regression(given, gold)
    >>> round(dfa.statistics.correlation(fitted.transfer(given["a"]), gold["a"]).pearson, 3)
    1.0
    """
    if set(scores) != set(gold) or not scores:
        raise AlignmentError(f"scores and gold need the same tasks, not {sorted(scores)} and {sorted(gold)}.")
    if ridge < 0:
        raise AlignmentError(f"ridge must be 0 or more, not {ridge}.")
    tasks = list(scores)
    source, target = scores[tasks[0]].nodes, gold[tasks[0]].nodes
    for task in tasks:
        scores[task].require(source, f"The scores of task {task!r}")
        gold[task].require(target, f"The gold scores of task {task!r}")
    S = scale(torch.stack([scores[task].values for task in tasks]), scaling).double()
    G = scale(torch.stack([gold[task].values for task in tasks]), "unit").double()
    gram = S @ S.T + ridge * torch.eye(len(tasks), dtype=torch.float64)
    W = S.T @ torch.linalg.pinv(gram, hermitian=True) @ G  # the dual form: tasks are few, nodes are many
    meta = {"control": "regression", "tasks": tasks, "ridge": ridge, "scaling": scaling}
    return Alignment.of(W, source, target, scaling=scaling, meta=meta)
