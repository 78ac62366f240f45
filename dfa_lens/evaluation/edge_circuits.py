"""Circuits of edges: the clean run in which edges outside the circuit carry their writers' corrupt activations, or
whatever else stands in the place of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.data import metrics
from dfa_lens.data.curve import Direction, FaithfulnessCurve, Protocol
from dfa_lens.data.edge_circuit import EdgeCircuit
from dfa_lens.data.edges import EdgeScores, EdgeSet, Selection
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import Ranking
from dfa_lens.errors import FaithfulnessError, ScoreError
from dfa_lens.evaluation.runs import Runs, extra, grid
from dfa_lens.models import memory
from dfa_lens.models.ablations import Ablation
from dfa_lens.models.edge_gates import run_gated
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner
from dfa_lens.models.stream import Stream, require_room


@dataclass(frozen=True)
class CurveOfEdges:
    """What is asked for, as in :func:`~dfa_lens.evaluation.faithfulness.faithfulness_curve`."""

    protocol: Protocol
    ranking: Ranking
    selection: Selection
    sizes: Sequence[int] | None
    fractions: Sequence[float] | None
    metric: str | Callable[..., Tensor]
    progress: bool
    share_prefix: bool
    ablation: Ablation
    direction: Direction

    def run(
        self, runner: Runner, pairs: PromptPairs, scores: EdgeScores, batch_size: int | Literal["auto"]
    ) -> FaithfulnessCurve:
        """The curve."""
        require_edges(scores.edges, runner)
        require_room(runner, scores.edges, pairs, batch_size, "faithfulness_curve of edges")
        ranked = self._ranked(scores)
        order, n = ranked.order(self.ranking, selection=self.selection), len(ranked)
        fractions, ks = grid(n, self.protocol, self.sizes, self.fractions)
        added = extra(self.protocol, ks)
        ends = ranked.edges.positions[order]
        always = scores.edges.existing & ~ranked.edges.chosen
        denoising = self.direction == "denoising"
        circuits = [_with(always, ends[:k] if denoising else ends[k:]) for k in [0] * added + ks]
        chosen = metrics.checked(self.metric)

        def work(size: int) -> Runs:
            return run_edge_circuits(
                runner,
                pairs,
                scores.edges,
                circuits,
                chosen,
                batch_size=size,
                progress=self.progress,
                share_prefix=self.share_prefix,
                ablation=self.ablation,
            )

        def need(footprint: Footprint, size: int) -> Need:
            return need_of_edge_curve(footprint, len(pairs), size, len(circuits))

        runs = memory.run(work, batch_size, runner, pairs, scores.edges.nodes, need)
        told: dict[str, Any] = {"ablation": self.ablation.name, "direction": self.direction}
        curve = runs.curve(fractions, ks, added=added, protocol=self.protocol, ranking=self.ranking, n=n, **told)
        live = torch.tensor([int(scores.edges.live(kept).sum()) for kept in circuits[added:]])
        return replace(curve, unit="edges", live_sizes=live.numpy(), ranked=ranked, selection=self.selection)

    def _ranked(self, scores: EdgeScores) -> EdgeScores:
        """The scores of the edges that the protocol ranks; whatever else there is stays in every circuit."""
        if self.protocol == "mib":
            if len(scores) < len(scores.edges.all_of_model):
                raise FaithfulnessError(
                    f"The mib protocol ranks all {len(scores.edges.all_of_model)} edges of the model, and there are "
                    f"scores of {len(scores)}. Use protocol='nodes': edges without a score are then always in it."
                )
            return scores
        if not scores.edges.chosen[1:].any():
            raise FaithfulnessError(
                "All of the scores are of edges of the input, which are always in the circuit: use protocol='mib'."
            )
        return EdgeScores(scores.values, scores.edges.without_input(), scores.meta)


def run_edge_circuits(
    runner: Runner,
    pairs: PromptPairs,
    edges: EdgeSet,
    circuits: Sequence[Bool[Tensor, "writer reader"]],
    metric: metrics.Metric,
    *,
    batch_size: int,
    progress: bool = False,
    share_prefix: bool = True,
    keep_logits: bool = False,
    ablation: Ablation | None = None,
) -> Runs:
    """Run circuits of edges on prompt pairs.

    Parameters
    ----------
    edges:
        Edges of the model, by whose writers and readers the circuits are written.
    circuits:
        Of each, which edges of the model run.
    keep_logits:
        Also keep the logits of every circuit and of the whole model at the answer.
    ablation:
        What edges outside carry; default: what their writers do in the corrupt run.
    """
    runs = Runs.empty(len(circuits), len(pairs), d_vocab=runner.d_vocab if keep_logits else 0)
    total = len(pairs) * len(circuits)
    with (
        runner.session(passes=len(circuits)),
        torch.no_grad(),
        tqdm(total=total, desc="curve", unit="run", disable=not progress) as bar,
    ):
        stream, nodes = Stream(runner, edges), edges.nodes[1:]
        reference = None if ablation is None else ablation.reference(runner, nodes, pairs, batch_size=batch_size)
        for rows, batch in runner.batches(pairs, batch_size):
            run = PairedRun(runner, batch, edges.nodes, share_prefix=share_prefix, reference=reference)
            _, clean = run.record("clean", nodes=False)
            corrupt, corrupt_logits = run.record("corrupt")
            runs.record_whole(rows, batch, metric, clean, corrupt_logits)
            for i, kept in enumerate(circuits):
                if torch.equal(kept, edges.existing):
                    logits = clean
                elif not (edges.live(kept) if reference is None else kept).any():
                    # no clean information arrives: exactly the corrupt run. A writer that reads constants alone need
                    # not write its own, though, so with those no edge at all may be left
                    logits = corrupt_logits
                else:
                    logits = run_gated(stream, run, kept.to(torch.float32), corrupt)
                runs.record(i, rows, batch, metric, logits, clean)
                bar.update(len(batch))
    return runs


def run_edge_circuit(
    runner: Runner,
    pairs: PromptPairs,
    circuit: EdgeCircuit,
    metric: metrics.Metric,
    batch_size: int | Literal["auto"],
    *,
    progress: bool,
    share_prefix: bool,
    ablation: Ablation | None = None,
) -> Runs:
    """Run one circuit, its logits kept."""
    require_edges(circuit.universe, runner, "The circuit belongs")
    require_room(runner, circuit.universe, pairs, batch_size, "a circuit of edges")

    def work(size: int) -> Runs:
        return run_edge_circuits(
            runner,
            pairs,
            circuit.universe,
            [circuit.open],
            metric,
            batch_size=size,
            progress=progress,
            share_prefix=share_prefix,
            keep_logits=True,
            ablation=ablation,
        )

    def need(footprint: Footprint, size: int) -> Need:
        return need_of_edge_curve(footprint, len(pairs), size, 1)

    return memory.run(work, batch_size, runner, pairs, circuit.universe.nodes, need)


def need_of_edge_curve(footprint: Footprint, examples: int, batch: int, sizes: int) -> Need:
    """What a curve of circuits of edges needs: so many examples and sizes."""
    # of each batch the corrupt activations, the differences that run, and the streams that readers are given
    held = batch * (2 * footprint.site_bytes + 2 * footprint.embed_bytes + 3 * footprint.logit_bytes)
    return Need("faithfulness_curve", examples * (2 + sizes), 0, held, 0, 2 * footprint.working_bytes(batch))


def _with(always: Bool[Tensor, "writer reader"], ends: Int[Tensor, "edge 2"]) -> Bool[Tensor, "writer reader"]:
    kept = always.clone()
    kept[ends[:, 0], ends[:, 1]] = True
    return kept


def require_edges(edges: EdgeSet, runner: Runner, what: str = "The scores belong") -> None:
    """A :class:`~dfa_lens.errors.ScoreError` unless they are edges of the runner's model."""
    if not edges.fits(runner.model):
        raise ScoreError(
            f"{what} to the {edges!r}, but this model has the {EdgeSet.of_model(runner.model)!r}: "
            f"{'they come' if what.endswith('belong') else 'it comes'} from another model."
        )
