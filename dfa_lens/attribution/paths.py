"""nap-ig-activations: the path integral of each group of nodes by itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dfa_lens.attribution.gradients import gradient_taps
from dfa_lens.attribution.method import Batch, Method, Sums
from dfa_lens.data.nodes import INPUT_POINT, NodeSet, Site
from dfa_lens.models import hooks
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.memory import Footprint


class NapIgActivations(Method):
    """The gradient averaged over runs in which the node's hook point, and nothing else, is at
    corrupt + (k/steps)(clean - corrupt), k = 1 … steps."""

    name: ClassVar[str] = "nap-ig-activations"
    integrates: ClassVar[bool] = True
    checkpointing: ClassVar[bool] = True

    def passes(self, nodes: NodeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        whole = sum(site.whole for site in nodes.sites)
        return 2 + len(nodes.sites) * steps + whole, len(nodes.sites) * steps

    def units(self, nodes: NodeSet, steps: int) -> int:  # noqa: D102
        return len(nodes.sites)

    def held(self, footprint: Footprint, batch: int) -> int:  # noqa: D102
        return batch * (2 * footprint.site_bytes + footprint.stream_bytes)

    def score(self, batch: Batch) -> Sums:  # noqa: D102
        return self._all(batch) if batch.measurement.accumulate == "all" else self._own(batch)

    def _own(self, batch: Batch) -> Sums:
        nodes, places = batch.measurement.nodes, batch.measurement.fractions
        totals = batch.empty_scores()
        corrupt, corrupt_logits = batch.record("corrupt")
        deltas, clean_logits = batch.record("clean", streams=batch.restarts)
        for point in deltas:  # in place of the clean activations, which nothing else needs
            deltas[point] -= corrupt[point]
        clean_value = batch.total(clean_logits, clean_logits)
        sums = {"clean": clean_value, "corrupt": batch.total(corrupt_logits, clean_logits)}
        whole: dict[str, tuple[float, float]] = {}
        for site in nodes.sites:
            before = totals.clone()
            for fractions in batch.chunks(places):
                self._path(batch, site, fractions, corrupt[site.point], deltas[site.point], clean_logits, totals)
            if site.whole:  # the whole group is scored: its scores must add up
                group = NodeSet(nodes[position] for position in site.positions)
                off = torch.zeros(1, len(group), dtype=torch.float32)
                effect = clean_value - float(batch.ablated(group, off, corrupt, clean_logits).sum())
                explained = float((totals - before)[list(site.positions)].sum()) / len(places)
                whole[site.point] = (effect, explained)
            batch.done()
        return Sums(totals / len(places), sums, whole)

    def _path(
        self,
        batch: Batch,
        site: Site,
        fractions: list[float],
        corrupt: Tensor,
        delta: Tensor,
        clean_logits: Tensor,
        totals: Tensor,
    ) -> None:
        """The gradient at some places of one site's path, in one pass that begins at the site's block."""
        leaves: list[Tensor] = []

        def function(now: Tensor) -> Tensor:
            hooks.check_site(site, now)
            places = torch.cat([corrupt + fraction * delta for fraction in fractions])
            leaves.append(places.requires_grad_(True))
            return leaves[0]

        with torch.enable_grad():
            logits = batch.run([(site.point, function)], times=len(fractions), layer=site.layer)
            values = batch.values(logits, clean_logits, len(fractions))
            (gradient,) = torch.autograd.grad(values.sum(), leaves)
        batch.add(totals, site, delta, gradient)

    def _all(self, batch: Batch) -> Sums:
        """As released: on every pass of every group's path, the embedding's among them, every node's Δ·gradient is
        added up; the mean over all passes."""
        places = batch.measurement.fractions
        totals = batch.empty_scores()
        corrupt, corrupt_logits = batch.record("corrupt", also=INPUT_POINT)
        clean, clean_logits = batch.record("clean", also=INPUT_POINT)
        deltas = {point: clean[point] - corrupt[point] for point in clean}
        for point in clean:
            for place in places:
                leaves: dict[str, Tensor] = {}

                def embed(now: Tensor, leaves: dict[str, Tensor] = leaves) -> Tensor:
                    leaves["embed"] = now.detach().clone().requires_grad_(True)
                    return leaves["embed"]

                def move(now: Tensor, point: str = point, fraction: float = place) -> Tensor:
                    # keeps `now` in the graph at weight 0, so that every node has a gradient
                    return corrupt[point] + fraction * deltas[point] + 0 * now

                taps: list[tuple[str, HookFunction]] = [(INPUT_POINT, embed), (point, move)]
                with torch.enable_grad():
                    logits = batch.run([*taps, *gradient_taps(batch, deltas, totals)])
                    values = batch.values(logits, clean_logits)
                    torch.autograd.grad(values.sum(), [leaves["embed"]])
            if point != INPUT_POINT:
                batch.done()
        names = {"clean": clean_logits, "corrupt": corrupt_logits}
        sums = {name: batch.total(logits, clean_logits) for name, logits in names.items()}
        return Sums(totals / (len(clean) * len(places)), sums)
