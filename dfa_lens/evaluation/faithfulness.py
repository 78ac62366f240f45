"""Faithfulness curves: how much of the model's behaviour the best k nodes keep, for every k.

f_k = (m(C_k) - m(∅)) / (m(M) - m(∅)), with m(M) the clean run, m(∅) the corrupt run (embedding included) and C_k the
clean run in which every node outside the k best is at its corrupt activation, or at another reference
(:mod:`~dfa_lens.models.ablations`), of which m(∅) is then made, too. Each m is averaged over examples before
the division; f is never clipped, and goes above 1 when nodes that work against the answer are left out.

CPR is the area under f over the kept fraction, CMD the area under ``|1 - f|`` (trapezoids, linear axis).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dfa_lens.data import metrics
from dfa_lens.data.arguments import expect
from dfa_lens.data.curve import Direction, FaithfulnessCurve, Protocol
from dfa_lens.data.edges import EdgeScores, Selection
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.errors import FaithfulnessError, unknown
from dfa_lens.evaluation.edge_circuits import CurveOfEdges
from dfa_lens.evaluation.node_circuits import need_of_curve, require_model, run_circuits
from dfa_lens.evaluation.runs import Runs, extra, grid
from dfa_lens.models import ablations, backend, memory
from dfa_lens.models.ablations import Ablation
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.runner import Runner


@backend.runs("model")
def faithfulness_curve(
    model: HookedModel,
    pairs: PromptPairs,
    scores: NodeScores | EdgeScores,
    *,
    protocol: Protocol = "nodes",
    ranking: Ranking | None = None,
    selection: Selection = "top",
    batch_size: int | Literal["auto"] = 16,
    progress: bool = False,
    sizes: Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    metric: str | Callable[..., Tensor] = "logit-difference",
    sizes_per_pass: int = 1,
    share_prefix: bool = True,
    ablation: str | Ablation = "corrupt",
    direction: Direction = "denoising",
) -> FaithfulnessCurve:
    """Keep the k best nodes or edges, corrupt the others, measure; for every k.

    Of edges: the clean prompt is run, an edge in the circuit carries what its writer computes in this run, and any
    other its writer's output in the corrupt run.

    Parameters
    ----------
    model:
        The model that the scores belong to; left as it was.
    pairs:
        Prompts that were not used to get the scores.
    scores:
        The ranking to judge, of nodes or of edges. A node "input", and the edges of the input, take part in the ``mib``
        protocol only; else they are always in the circuit.
    protocol:
        See :data:`Protocol`.
    ranking:
        "signed" (for CPR) or "absolute" (for CMD); ties keep node order. Default: the scores' own
        (:attr:`NodeScores.ranking <dfa_lens.data.scores.NodeScores.ranking>`), which is signed but for those that a
        functional alignment carried by size; of edges signed.
    selection:
        Of edges: the k best ("top"), or the best that lead to the logits ("greedy").
    sizes, fractions:
        Circuit sizes to run, or fractions of the nodes (k = ⌊fraction·n⌋); default: :func:`default_sizes`, or MIB's
        ten fractions.
    metric:
        As in :func:`~dfa_lens.attribution.attribute.attribute`.
    batch_size:
        Examples a pass; "auto" takes what fits into free memory, and half of that after an out-of-memory error.
        Changes memory and time, never the curve.
    sizes_per_pass:
        Of nodes: how many sizes share a forward pass. More is faster for a small model on a GPU; the corrupt
        activations are repeated as often. With 1, a pass begins at the first block in which the circuit differs from
        the one before.
    share_prefix:
        As in :func:`~dfa_lens.attribution.attribute.attribute`.
    ablation:
        What stands in the place of nodes that are left out, instead of their corrupt activations: a name of
        :data:`~dfa_lens.models.ablations.ABLATIONS` or an object of that module. m(∅) is then the run with the
        embedding and all nodes at it. An edge outside a circuit of edges carries it.
    direction:
        See :data:`~dfa_lens.data.curve.Direction`: whether the k best are kept, or destroyed.

    Raises
    ------
    FaithfulnessError
        If the clean and the corrupt run have the same mean metric, so that f is not defined; or the sizes are out of
        range.
    NodeError, ScoreError
        If the scores belong to another model.
    ModelError
        Of edges: if the model can't have them, see :func:`~dfa_lens.attribution.edges.attribute_edges`.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, split="test", n=8)
    >>> curve = dfa.faithfulness_curve(model, pairs, dfa.attribute(model, pairs, method="nap"), sizes=[0, 27, 54])
    >>> curve.sizes.tolist(), float(curve.faithfulness[-1])
    ([0, 27, 54], 1.0)
    """
    expect(2, "pairs", pairs, PromptPairs)
    expect(3, "scores", scores, NodeScores, EdgeScores)
    if protocol not in get_args(Protocol):
        raise unknown("protocol", protocol, get_args(Protocol), FaithfulnessError)
    if sizes_per_pass < 1:
        raise FaithfulnessError(f"sizes_per_pass must be at least 1, not {sizes_per_pass}.")
    if ranking is None:
        ranking = scores.ranking if isinstance(scores, NodeScores) else "signed"
    instead = ablations.resolve(ablation)
    if direction not in get_args(Direction):
        raise unknown("direction", direction, get_args(Direction), FaithfulnessError)
    runner = Runner(model)
    runner.require(pairs)
    if isinstance(scores, EdgeScores):
        asked = CurveOfEdges(
            protocol, ranking, selection, sizes, fractions, metric, progress, share_prefix, instead, direction
        )
        return asked.run(runner, pairs, scores, batch_size)
    if selection != "top":
        raise FaithfulnessError("Only circuits of edges are selected otherwise than from the top: selection='greedy'.")
    ranked = _with_input(scores, model) if protocol == "mib" else _without_input(scores)
    require_model(scores.nodes, scores.meta, model)
    n = len(ranked)
    order = ranked.order(ranking)
    kept, ks = grid(n, protocol, sizes, fractions)

    added = extra(protocol, ks)
    run_ks = [0] * added + ks
    keep = torch.zeros(len(run_ks), n, dtype=torch.bool)
    for i, k in enumerate(run_ks):
        keep[i, order[:k]] = True
    if direction == "noising":
        keep = ~keep
    if protocol == "mib":  # the first node is the embedding
        with_input, keep = keep[:, 0], keep[:, 1:]
        nodes = ranked.nodes[1:]
    else:
        with_input, nodes = torch.ones(len(run_ks), dtype=torch.bool), ranked.nodes

    runner.check_points(nodes.points)
    chosen = metrics.checked(metric)

    def work(size: int) -> Runs:
        return run_circuits(
            runner,
            pairs,
            nodes,
            keep,
            with_input,
            chosen,
            batch_size=size,
            sizes_per_pass=sizes_per_pass,
            progress=progress,
            share_prefix=share_prefix,
            ablation=instead,
        )

    def need(footprint: Footprint, size: int) -> Need:
        return need_of_curve(footprint, len(pairs), size, len(run_ks), sizes_per_pass)

    runs = memory.run(work, batch_size, runner, pairs, nodes, need)
    told: dict[str, Any] = {"ablation": instead.name, "direction": direction}
    curve = runs.curve(kept, ks, added=added, protocol=protocol, ranking=ranking, n=n, **told)
    return replace(curve, ranked=ranked)


def _without_input(scores: NodeScores) -> NodeScores:
    inputs = [i for i, node in enumerate(scores.nodes) if node.kind == "input"]
    if not inputs:
        return scores
    rest = [i for i in range(len(scores)) if i not in inputs]
    return NodeScores(scores.values[rest], scores.nodes[rest], scores.meta)


def _with_input(scores: NodeScores, model: HookedModel) -> NodeScores:
    nodes = NodeSet.heads_and_mlps(model, with_input=True)
    if scores.nodes == nodes:
        return scores
    if scores.nodes != nodes[1:]:
        raise FaithfulnessError(
            f"The mib protocol ranks the {len(nodes)} nodes of this model (input, heads, MLP blocks); the scores have "
            f"{len(scores)} other nodes. Use protocol='nodes'."
        )
    return NodeScores(torch.cat([torch.zeros(1, dtype=torch.float32), scores.values]), nodes, scores.meta)
