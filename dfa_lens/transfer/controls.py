"""Honest controls: what a transferred circuit must beat before its source can be said to matter.

- :func:`random_w`, :func:`permuted_w`, :func:`scrambled`: is it this W, and this pairing with s?
- :func:`depth_mean`: does a fixed map by relative depth do as well?
- :func:`uniform`, :func:`random_scores`, put in for s in training *and* transfer: does the source matter at all?
- :func:`target_only`: a free mask on the target under the same loss: what is the ceiling?
- :func:`regression`: least squares from source scores to gold scores of the target.

All but the last also take edges in the place of nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack, overload

import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.arguments import same_tasks
from dfa_lens.data.edge_alignment import EdgeAlignment
from dfa_lens.data.edges import EdgeScores, EdgeSet
from dfa_lens.data.nodes import Node, NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scaling import Scaling, scale
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import AlignmentError
from dfa_lens.models.backend import HookedModel
from dfa_lens.transfer.recipe import Options
from dfa_lens.transfer.trainer import fit


@overload
def random_w(source: NodeSet, target: NodeSet, *, seed: int = 0) -> Alignment: ...


@overload
def random_w(source: EdgeSet, target: EdgeSet, *, seed: int = 0) -> EdgeAlignment: ...


def random_w(source: NodeSet | EdgeSet, target: NodeSet | EdgeSet, *, seed: int = 0) -> Alignment | EdgeAlignment:
    """An alignment whose W, or A and B, are drawn from a standard normal distribution.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source = dfa.NodeSet.for_sizes(6, 8)
    >>> target = dfa.NodeSet.for_sizes(10, 10)
    >>> dfa.controls.random_w(source, target).W.shape
    torch.Size([54, 110])
    """
    generator = torch.Generator().manual_seed(seed)
    meta = {"control": "random-w", "seed": seed}
    if isinstance(source, EdgeSet) and isinstance(target, EdgeSet):
        A, B = (
            torch.randn(*shape, generator=generator, dtype=torch.float32)
            for shape in zip(source.shape, target.shape, strict=True)
        )
        return EdgeAlignment.of(A, B, source, target, meta=meta)
    if isinstance(source, EdgeSet) or isinstance(target, EdgeSet):
        raise AlignmentError("Nodes and edges are no pair: give two node sets or two edge sets.")
    W = torch.randn(len(source), len(target), generator=generator, dtype=torch.float32)
    return Alignment.of(W, source, target, meta=meta)


@overload
def permuted_w(alignment: Alignment, *, seed: int = 0) -> Alignment: ...


@overload
def permuted_w(alignment: EdgeAlignment, *, seed: int = 0) -> EdgeAlignment: ...


def permuted_w(alignment: Alignment | EdgeAlignment, *, seed: int = 0) -> Alignment | EdgeAlignment:
    """The alignment with the columns of W (the target nodes), or of A and of B, in random order.

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
    generator = torch.Generator().manual_seed(seed)
    if isinstance(alignment, EdgeAlignment):
        of_edges = alignment.stages[-1]
        rows, columns = (torch.randperm(n, generator=generator) for n in of_edges.target.shape)
        added = None if of_edges.bias is None else of_edges.bias[rows][:, columns]
        moved = replace(of_edges, A=of_edges.A[:, rows], B=of_edges.B[:, columns], bias=added)
        about = {"control": "permuted-w", "seed": seed, "of": dict(alignment.meta)}
        return EdgeAlignment((*alignment.stages[:-1], moved), alignment.temperature, (), about)
    order = torch.randperm(len(alignment.target), generator=generator)
    last = alignment.stages[-1]
    bias = None if last.bias is None else last.bias[order]
    permuted = Alignment.of(last.W[:, order], last.source, last.target, scaling=last.scaling, bias=bias)
    meta = {"control": "permuted-w", "seed": seed, "of": dict(alignment.meta)}
    return Alignment((*alignment.stages[:-1], *permuted.stages), alignment.temperature, (), meta)


@overload
def scrambled(scores: NodeScores, *, seed: int = 0) -> NodeScores: ...


@overload
def scrambled(scores: EdgeScores, *, seed: int = 0) -> EdgeScores: ...


def scrambled(scores: NodeScores | EdgeScores, *, seed: int = 0) -> NodeScores | EdgeScores:
    """The same values on the wrong nodes, or edges: put in for s at transfer.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(6, 8)
    >>> scores = dfa.controls.random_scores(nodes)
    >>> bool((dfa.controls.scrambled(scores).values.sort()[0] == scores.values.sort()[0]).all())
    True
    """
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    meta = {**scores.meta, "control": "scrambled-s", "seed": seed}
    if isinstance(scores, EdgeScores):
        return EdgeScores.of_flat(scores.flat[order], scores.edges, meta)
    return NodeScores(scores.values[order], scores.nodes, meta)


def scrambled_within(scores: NodeScores, *, seed: int = 0) -> NodeScores:
    """The values on the wrong nodes of the same kind in the same third of the layers.

    What is lost is which of them it was; that heads of a depth matter as a whole is kept.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(6, 8)
    >>> scores = dfa.controls.random_scores(nodes)
    >>> found = dfa.controls.scrambled_within(scores)
    >>> bool((found.values[:18].sort()[0] == scores.values[:18].sort()[0]).all())  # two of six layers
    True
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(scores))
    groups: dict[tuple[str, int], list[int]] = {}
    for i, node in enumerate(scores.nodes):
        groups.setdefault((node.kind, 3 * max(node.layer, 0) // scores.nodes.n_layers), []).append(i)
    for members in groups.values():
        own = torch.tensor(members)
        order[own] = own[torch.randperm(len(own), generator=generator)]
    return NodeScores(scores.values[order], scores.nodes, {**scores.meta, "control": "scrambled-s", "seed": seed})


@overload
def uniform(nodes: NodeSet) -> NodeScores: ...


@overload
def uniform(nodes: EdgeSet) -> EdgeScores: ...


def uniform(nodes: NodeSet | EdgeSet) -> NodeScores | EdgeScores:
    """The same score, 1, for every node or edge: put in for s in training and transfer.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.controls.uniform(dfa.NodeSet.for_sizes(1, 2)).values.tolist()
    [1.0, 1.0, 1.0]
    """
    ones, meta = torch.ones(len(nodes), dtype=torch.float32), {"control": "uniform-s"}
    return EdgeScores.of_flat(ones, nodes, meta) if isinstance(nodes, EdgeSet) else NodeScores(ones, nodes, meta)


@overload
def random_scores(nodes: NodeSet, *, seed: int = 0) -> NodeScores: ...


@overload
def random_scores(nodes: EdgeSet, *, seed: int = 0) -> EdgeScores: ...


def random_scores(nodes: NodeSet | EdgeSet, *, seed: int = 0) -> NodeScores | EdgeScores:
    """Standard normal scores: put in for s in training and transfer, with another seed for every task.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.controls.random_scores(dfa.NodeSet.for_sizes(1, 2), seed=3).values.shape
    torch.Size([3])
    """
    values = torch.randn(len(nodes), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    meta = {"control": "random-s", "seed": seed}
    return EdgeScores.of_flat(values, nodes, meta) if isinstance(nodes, EdgeSet) else NodeScores(values, nodes, meta)


@overload
def depth_mean(source: NodeSet, target: NodeSet) -> Alignment: ...


@overload
def depth_mean(source: EdgeSet, target: EdgeSet) -> EdgeAlignment: ...


def depth_mean(source: NodeSet | EdgeSet, target: NodeSet | EdgeSet) -> Alignment | EdgeAlignment:
    """A fixed alignment by relative depth, with nothing learned.

    Every source layer goes to its two nearest target layers by relative depth, linearly weighted, and there evenly to
    all nodes of its own kind (heads to heads, MLPs to MLPs). Of edges: that at both ends.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> fixed = dfa.controls.depth_mean(dfa.NodeSet.for_sizes(2, 1), dfa.NodeSet.for_sizes(3, 1))
    >>> fixed.W[1].round(decimals=2).tolist()
    [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    if isinstance(source, EdgeSet) and isinstance(target, EdgeSet):
        both = depth_mean(source.nodes[1:], target.nodes[1:]).on_edges(source, target)
        return replace(both, meta={"control": "depth-mean"})
    if isinstance(source, EdgeSet) or isinstance(target, EdgeSet):
        raise AlignmentError("Nodes and edges are no pair: give two node sets or two edge sets.")
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


@overload
def target_only(
    target: HookedModel,
    pairs: Mapping[str, PromptPairs],
    *,
    edges: None = None,
    start: NodeScores | None = None,
    **options: Unpack[Options],
) -> NodeScores: ...


@overload
def target_only(
    target: HookedModel, pairs: Mapping[str, PromptPairs], *, edges: EdgeSet, **options: Unpack[Options]
) -> EdgeScores: ...


def target_only(
    target: HookedModel,
    pairs: Mapping[str, PromptPairs],
    *,
    edges: EdgeSet | None = None,
    start: NodeScores | None = None,
    **options: Unpack[Options],
) -> NodeScores | EdgeScores:
    """A free mask on the target, trained with the same loss: the ceiling of every transfer, and what one can begin.

    Parameters
    ----------
    pairs:
        The training pairs by task; all tasks share one mask.
    edges:
        Mask these edges of the target, a number for each, in the place of its nodes.
    start:
        Scores of the target's nodes, transferred ones say, to begin at (a warm start): their ranks become mask logits
        from −2 to 2, so that the highest node begins at a gate of .88, and the lowest of .12. Default: every gate
        begins near one half. How much sooner the training then ends is in docs/method.md.
    options:
        As for :func:`dfa_lens.fit`.

    Raises
    ------
    AlignmentError
        If ``start`` comes with ``initial``, or with edges, which begin near one half.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = {"ioi": dfa.tasks.load("ioi", model.tokenizer, n=4)}
    >>> dfa.controls.target_only(model, pairs, steps=2).values.shape
    torch.Size([54])
    >>> len(dfa.controls.target_only(model, pairs, edges=dfa.EdgeSet.of_model(model), steps=2))
    2500
    """
    if start is not None:
        clash = "edges" if edges is not None else "initial" if "initial" in options else None
        if clash:
            raise AlignmentError(f"start does not go with {clash}: both say where the mask begins.")
        options = {**options, "initial": _start(target, start)}
    if edges is not None:
        same = uniform(edges.all_of_model)
        same.meta["control"] = "target-only"
        given: Any = {**options, "form": "free"}
        free: EdgeAlignment = fit(target, dict.fromkeys(pairs, same), pairs, edges=edges, **given)
        return free.transfer(same)
    one = constant()
    return fit(target, dict.fromkeys(pairs, one), pairs, **options).transfer(one)


#: Mask logits of the highest and, negative, of the lowest node of a warm start: decided, and free to change.
START_LOGIT = 2.0


def _start(target: HookedModel, start: NodeScores) -> Float[Tensor, "1 node"]:
    """Mask logits in the order of the scores; ranks, so that neither scale nor outliers saturate a gate."""
    start.require(NodeSet.heads_and_mlps(target), "The scores to start at")
    ranks = torch.from_numpy(rankdata(start.values.numpy())).float() - 1
    return (START_LOGIT * (2 * ranks / max(len(start) - 1, 1) - 1))[None]


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
    same_tasks(scores, gold, ("scores", "gold"))
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
