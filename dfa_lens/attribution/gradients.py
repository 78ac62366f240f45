"""nap and nap-ig-inputs: differences times gradients, at the clean run or on the way there from the corrupt one."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from dfa_lens.attribution.method import Batch, Measurement, Method, Sums, summed
from dfa_lens.data.nodes import INPUT_POINT, NodeSet, Site
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint


class Nap(Method):
    """s = Δ·∂m/∂A at the clean run: node attribution patching (Nanda 2023; Syed et al. 2023)."""

    def passes(self, nodes: NodeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 1 + self.units(nodes, steps), self.units(nodes, steps)

    def units(self, nodes: NodeSet, steps: int) -> int:  # noqa: D102
        return 1

    def held(self, footprint: Footprint, batch: int) -> int:  # noqa: D102
        return batch * (footprint.site_bytes + 2 * footprint.embed_bytes)

    def _steps(self, batch: Batch) -> int:
        return 1

    def score(self, batch: Batch) -> Sums:  # noqa: D102
        nodes, steps = batch.measurement.nodes, self._steps(batch)
        totals = batch.empty_scores()
        corrupt, corrupt_logits = batch.record("corrupt", also=INPUT_POINT)
        corrupt_embed = corrupt[INPUT_POINT]
        deltas: Activations = {}

        def difference(site: Site, now: Tensor) -> None:
            # in place of the recorded activation, which nothing else needs: one cache, not two
            deltas[site.point] = now.detach() - corrupt.pop(site.point)

        def backward(taps: list[tuple[str, HookFunction]], start: Tensor | None, times: int) -> tuple[Tensor, ...]:
            """One pass from the embedding ``start`` (None: its own), and back: embedding, gradient, logits, metric."""
            leaves: list[Tensor] = []

            def embed(now: Tensor) -> Tensor:
                leaves.append((now if start is None else start).detach().clone().requires_grad_(True))
                return leaves[0]

            with torch.enable_grad():
                logits = batch.run([(INPUT_POINT, embed), *taps, *gradient_taps(batch, deltas, totals)], times=times)
                values = batch.values(logits, logits.detach() if clean_logits is None else clean_logits, times)
                (gradient,) = torch.autograd.grad(values.sum(), leaves)
            return leaves[0].detach(), gradient, logits.detach(), values.detach()

        # The last step is the clean run, so it goes first: the differences are read off it.
        clean_logits: Tensor | None = None
        read: list[tuple[str, HookFunction]]
        read = [(site.point, partial(difference, site)) for site in nodes.sites]
        clean_embed, gradient, clean_logits, values = backward(read, None, 1)
        clean_value = float(values.sum(dtype=torch.float64))
        change = clean_embed.float() - corrupt_embed.float()
        input_score = float((change * gradient.float()).sum(dtype=torch.float64))
        batch.done()
        for fractions in batch.chunks([k / steps for k in range(steps - 1, 0, -1)]):
            start = torch.cat([torch.lerp(corrupt_embed, clean_embed, fraction) for fraction in fractions])
            _, gradient, _, _ = backward([], start, len(fractions))
            input_score += float((change * summed(gradient.float(), len(change))).sum(dtype=torch.float64))
            batch.done(len(fractions))
        totals /= steps
        sums = {"clean": clean_value, "corrupt": batch.total(corrupt_logits, clean_logits)}
        if self.integrates:
            begin = sums["corrupt"]
            if batch.reference is not None:  # the path begins where the embedding alone is at its reference
                with torch.no_grad():
                    logits = batch.run([(INPUT_POINT, lambda now: corrupt_embed)])
                begin = batch.total(logits, clean_logits)
            sums |= {"expected": clean_value - begin, "explained": input_score / steps}
        return Sums(totals, sums)


class NapIgInputs(Nap):
    """The gradient averaged over runs whose embedding is corrupt + (k/steps)(clean - corrupt), k = 1 … steps."""

    integrates: ClassVar[bool] = True

    def units(self, nodes: NodeSet, steps: int) -> int:  # noqa: D102
        return steps

    def _steps(self, batch: Batch) -> int:
        return batch.measurement.steps


def gradient_taps(batch: Batch, deltas: Activations, totals: Tensor) -> list[tuple[str, HookFunction]]:
    """Hooks that add Δ·gradient to ``totals`` while the gradient passes by, so that no gradient is kept."""

    def tap(site: Site, sign: float, now: Tensor) -> Tensor:
        # A view of our own: a hook on the tensor itself could fire for the parts of several users of it.
        now = now.view_as(now)
        now.register_hook(lambda gradient: batch.add(totals, site, deltas[site.point], sign * gradient))
        return now

    return [
        (point, partial(tap, site, sign))
        for site in batch.measurement.nodes.sites
        for point, sign in _gradient_points(batch.measurement, site)
    ]


def _gradient_points(measurement: Measurement, site: Site) -> list[tuple[str, float]]:
    """Where a site's gradient is read, and with which sign it counts."""
    if measurement.mlp_gradient == "output" or measurement.nodes[site.positions[0]].kind != "mlp":
        return [(site.point, 1.0)]
    block = site.point.removesuffix(".hook_mlp_out")
    return measurement.runner.backend.mlp_input_gradient(block)
