"""Faithfulness curves: how much of the model's behaviour the best k nodes keep, for every k.

f_k = (m(C_k) - m(∅)) / (m(M) - m(∅)), with m(M) the clean run, m(∅) the corrupt run (embedding included) and C_k the
clean run in which every node outside the k best is at its corrupt activation. Each m is averaged over examples before
the division; f is never clipped, and goes above 1 when nodes that work against the answer are left out.

CPR is the area under f over the kept fraction, CMD the area under ``|1 - f|`` (trapezoids, linear axis).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.data import metrics
from dfa_lens.data.curve import FaithfulnessCurve, Protocol
from dfa_lens.data.edges import EdgeScores, Selection
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.errors import FaithfulnessError, ScoreError, unknown
from dfa_lens.evaluation.edge_circuits import CurveOfEdges
from dfa_lens.evaluation.runs import Runs, extra, grid
from dfa_lens.models import backend, memory
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner


@backend.runs("model")
def faithfulness_curve(
    model: HookedModel,
    pairs: PromptPairs,
    scores: NodeScores | EdgeScores,
    *,
    protocol: Protocol = "nodes",
    ranking: Ranking = "signed",
    selection: Selection = "top",
    batch_size: int | Literal["auto"] = 16,
    progress: bool = False,
    sizes: Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    metric: str | Callable[..., Tensor] = "logit-difference",
    sizes_per_pass: int = 1,
    share_prefix: bool = True,
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
        "signed" (for CPR) or "absolute" (for CMD); ties keep node order.
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
    if protocol not in get_args(Protocol):
        raise unknown("protocol", protocol, get_args(Protocol), FaithfulnessError)
    if sizes_per_pass < 1:
        raise FaithfulnessError(f"sizes_per_pass must be at least 1, not {sizes_per_pass}.")
    runner = Runner(model)
    runner.require(pairs)
    if isinstance(scores, EdgeScores):
        asked = CurveOfEdges(protocol, ranking, selection, sizes, fractions, metric, progress, share_prefix)
        return asked.run(runner, pairs, scores, batch_size)
    if selection != "top":
        raise FaithfulnessError("Only circuits of edges are selected otherwise than from the top: selection='greedy'.")
    ranked = _with_input(scores, model) if protocol == "mib" else _without_input(scores)
    _check_model(scores, model)
    n = len(ranked)
    order = ranked.order(ranking)
    kept, ks = grid(n, protocol, sizes, fractions)

    added = extra(protocol, ks)
    run_ks = [0] * added + ks
    keep = torch.zeros(len(run_ks), n, dtype=torch.bool)
    for i, k in enumerate(run_ks):
        keep[i, order[:k]] = True
    if protocol == "mib":  # the first node is the embedding
        with_input, keep = keep[:, 0], keep[:, 1:]
        nodes = ranked.nodes[1:]
    else:
        with_input, nodes = torch.ones(len(run_ks), dtype=torch.bool), ranked.nodes

    runner.check_points(nodes.points)
    chosen = metrics.checked(metric)

    def work(size: int) -> Runs:
        return _run_all(runner, pairs, nodes, keep, with_input, chosen, size, sizes_per_pass, progress, share_prefix)

    def need(footprint: Footprint, size: int) -> Need:
        return need_of_curve(footprint, len(pairs), size, len(run_ks), sizes_per_pass)

    runs = memory.run(work, batch_size, runner, pairs, nodes, need)
    return runs.curve(kept, ks, added=added, protocol=protocol, ranking=ranking, n=n)


def _check_model(scores: NodeScores, model: Any) -> None:
    """Refuse the scores of a smaller model with equally many heads, whose nodes all exist here, too.

    Any other foreign node set is found out when its hook points are looked up or cut. A subset of this model's own
    nodes is welcome.
    """
    own = NodeSet.heads_and_mlps(model, with_input=True)
    theirs = scores.meta.get("target", scores.meta.get("model", ""))
    ours = str(getattr(model.cfg, "model_name", ""))
    layers = scores.nodes.n_layers
    whole = [node for node in own if node.layer < layers]
    if theirs and theirs != ours and layers < own.n_layers and list(scores.nodes) in (whole, whole[1:]):
        raise ScoreError(
            f"The scores cover the first {layers} of this model's {own.n_layers} layers and come from {theirs!r}, not "
            f"from {ours!r}: they belong to another model."
        )


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


def _run_all(
    runner: Runner,
    pairs: PromptPairs,
    nodes: NodeSet,
    keep: Bool[Tensor, "size node"],
    with_input: Bool[Tensor, " size"],
    metric: metrics.Metric,
    batch_size: int,
    sizes_per_pass: int,
    progress: bool,
    share_prefix: bool,
) -> Runs:
    n, n_sizes = len(pairs), len(keep)
    runs = Runs.empty(n_sizes, n)
    circuits = _Circuits(nodes, keep, sizes_per_pass)
    with (
        torch.no_grad(),
        runner.session(passes=n_sizes),
        tqdm(total=n * n_sizes, desc="curve", unit="run", disable=not progress) as bar,
    ):
        for rows, batch in runner.batches(pairs, batch_size):
            run = PairedRun(runner, batch, nodes, share_prefix=share_prefix)
            _, clean_logits = run.record("clean", nodes=False, streams=circuits.restarts(run))
            corrupt, corrupt_logits = run.record("corrupt")
            runs.record_whole(rows, batch, metric, clean_logits, corrupt_logits)

            gated = []
            for i in range(n_sizes):
                if not with_input[i]:  # no clean information enters: exactly the corrupt run
                    runs.record(i, rows, batch, metric, corrupt_logits, clean_logits)
                elif keep[i].all():
                    runs.record(i, rows, batch, metric, clean_logits, clean_logits)
                else:
                    gated.append(i)
            bar.update(len(batch) * (n_sizes - len(gated)))
            for i, logits in circuits.run(gated, run, corrupt):
                runs.record(i, rows, batch, metric, logits, clean_logits)
                bar.update(len(batch))
            corrupt.clear()  # before the next batch is recorded: the gates of the last size still hold it
    return runs


def need_of_curve(footprint: Footprint, examples: int, batch: int, sizes: int, sizes_per_pass: int) -> Need:
    """What a curve needs: so many examples, sizes, and sizes that share a pass."""
    one = footprint.site_bytes + footprint.logit_bytes
    working = footprint.working_bytes(batch)
    held = batch * (one + footprint.stream_bytes + 2 * footprint.logit_bytes)
    share = min(sizes_per_pass, sizes)
    if share > 1:  # no pass begins at a later block, and the corrupt activations are repeated
        repeated = share * batch * one
        held = batch * (one + footprint.logit_bytes) + repeated
        # the next repetition is made before the last is let go
        working = max(footprint.working_bytes(share * batch), repeated)
    return Need("faithfulness_curve", examples * (1 + sizes), 0, held, 0, working)


class _Circuits:
    """Circuits of several sizes, and how they are run on a batch."""

    def __init__(self, nodes: NodeSet, keep: Bool[Tensor, "size node"], sizes_per_pass: int) -> None:
        self.nodes, self.keep, self.sizes_per_pass = nodes, keep, sizes_per_pass
        self.layers = torch.tensor([node.layer for node in nodes])
        self._from: dict[int | None, tuple[Bool[Tensor, " node"], NodeSet]] = {}

    def _met(self, layer: int | None) -> tuple[Bool[Tensor, " node"], NodeSet]:
        """The nodes that a pass beginning at a block meets (None: all), as a mask and as a set."""
        if layer not in self._from:
            met = self.layers >= layer if layer is not None else torch.ones(len(self.nodes), dtype=torch.bool)
            self._from[layer] = met, NodeSet(node for node, own in zip(self.nodes, met.tolist(), strict=True) if own)
        return self._from[layer]

    def restarts(self, run: PairedRun) -> list[int]:
        """The blocks that passes on a batch may begin at."""
        if self.sizes_per_pass > 1 or not run.runner.allows("start", run.pairs.clean.shape[1]):
            return []
        return run.runner.restarts(self.nodes)

    def run(
        self, sizes: list[int], on: PairedRun, corrupt: Activations
    ) -> Iterator[tuple[int, Float[Tensor, "example vocab"]]]:
        """The logits of each of ``sizes``, with its number."""
        if self.sizes_per_pass == 1:
            yield from self._downwards(sizes, on, corrupt)
            return
        for first in range(0, len(sizes), self.sizes_per_pass):
            group = sizes[first : first + self.sizes_per_pass]
            masks = self.keep[group].float().repeat_interleave(len(on), 0)
            logits = on.gated(self.nodes, masks, corrupt=corrupt)
            yield from zip(group, logits.split(len(on)), strict=True)

    def _downwards(
        self, sizes: list[int], on: PairedRun, corrupt: Activations
    ) -> Iterator[tuple[int, Float[Tensor, "example vocab"]]]:
        """From the clean run downwards: each circuit differs from the one before in a few nodes, and below the first
        of them nothing changes."""
        restarts = self.restarts(on)
        before = torch.ones_like(self.keep[0])
        for i in reversed(sizes):
            changed = self.layers[self.keep[i] != before]
            if len(changed):  # two sizes may be one circuit
                first = int(changed.min())
                # nodes behind the last block are reached from its beginning
                layer = max((each for each in restarts if each <= first), default=None)
                met, nodes = self._met(layer)
                logits = on.gated(
                    nodes,
                    self.keep[i][met].float(),
                    corrupt=corrupt,
                    layer=layer,
                    streams=[each for each in restarts if each > (layer or 0)],
                )
            yield i, logits
            before = self.keep[i]
