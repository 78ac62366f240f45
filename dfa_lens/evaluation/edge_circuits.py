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
        _check_model(scores, runner)
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
            return self._run_all(runner, pairs, scores.edges, circuits, chosen, size)

        def need(footprint: Footprint, size: int) -> Need:
            return need_of_edge_curve(footprint, len(pairs), size, len(circuits))

        runs = memory.run(work, batch_size, runner, pairs, scores.edges.nodes, need)
        told: dict[str, Any] = {"ablation": self.ablation.name, "direction": self.direction}
        curve = runs.curve(fractions, ks, added=added, protocol=self.protocol, ranking=self.ranking, n=n, **told)
        live = torch.tensor([int(scores.edges.live(kept).sum()) for kept in circuits[added:]])
        return replace(curve, unit="edges", live_sizes=live.numpy())

    def _ranked(self, scores: EdgeScores) -> EdgeScores:
        """The scores of the edges that the protocol ranks; whatever else there is stays in every circuit."""
        if self.protocol == "mib":
            if len(scores) < len(scores.edges.all_of_model):
                raise FaithfulnessError(
                    f"The mib protocol ranks all {len(scores.edges.all_of_model)} edges of the model, and there are "
                    f"scores of {len(scores)}. Use protocol='nodes': edges without a score are then always in it."
                )
            return scores
        chosen = scores.edges.chosen.clone()
        chosen[0] = False
        if not chosen.any():
            raise FaithfulnessError(
                "All of the scores are of edges of the input, which are always in the circuit: use protocol='mib'."
            )
        return EdgeScores(scores.values, scores.edges.choose(chosen), scores.meta)

    def _run_all(
        self,
        runner: Runner,
        pairs: PromptPairs,
        edges: EdgeSet,
        circuits: list[Bool[Tensor, "writer reader"]],
        metric: metrics.Metric,
        batch_size: int,
    ) -> Runs:
        runs = Runs.empty(len(circuits), len(pairs))
        total = len(pairs) * len(circuits)
        with (
            runner.session(passes=len(circuits)),
            torch.no_grad(),
            tqdm(total=total, desc="curve", unit="run", disable=not self.progress) as bar,
        ):
            stream = Stream(runner, edges)
            reference = self.ablation.reference(runner, edges.nodes[1:], pairs, batch_size=batch_size)
            for rows, batch in runner.batches(pairs, batch_size):
                run = PairedRun(runner, batch, edges.nodes, share_prefix=self.share_prefix, reference=reference)
                _, clean = run.record("clean", nodes=False)
                corrupt, corrupt_logits = run.record("corrupt")
                runs.record_whole(rows, batch, metric, clean, corrupt_logits)
                for i, kept in enumerate(circuits):
                    if torch.equal(kept, edges.existing):
                        logits = clean
                    elif not (edges.live(kept) if reference is None else kept).any():
                        # no clean information arrives: exactly the corrupt run. A writer that reads constants alone
                        # need not write its own, though, so with those no edge at all may be left
                        logits = corrupt_logits
                    else:
                        logits = run_gated(stream, run, kept.to(torch.float32), corrupt)
                    runs.record(i, rows, batch, metric, logits, clean)
                    bar.update(len(batch))
        return runs


def need_of_edge_curve(footprint: Footprint, examples: int, batch: int, sizes: int) -> Need:
    """What a curve of circuits of edges needs: so many examples and sizes."""
    # of each batch the corrupt activations, the differences that run, and the streams that readers are given
    held = batch * (2 * footprint.site_bytes + 2 * footprint.embed_bytes + 3 * footprint.logit_bytes)
    return Need("faithfulness_curve", examples * (2 + sizes), 0, held, 0, 2 * footprint.working_bytes(batch))


def _with(always: Bool[Tensor, "writer reader"], ends: Int[Tensor, "edge 2"]) -> Bool[Tensor, "writer reader"]:
    kept = always.clone()
    kept[ends[:, 0], ends[:, 1]] = True
    return kept


def _check_model(scores: EdgeScores, runner: Runner) -> None:
    if not scores.edges.fits(runner.model):
        raise ScoreError(
            f"The scores belong to the {scores.edges!r}, but this model has the {EdgeSet.of_model(runner.model)!r}: "
            "they come from another model."
        )
