"""nap and nap-ig-inputs: differences times gradients, at the clean run or on the way there from the corrupt one."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.attribution.method import Batch, Measurement, Method, Sums, summed
from dfa_lens.data.nodes import INPUT_POINT, NodeSet, Site
from dfa_lens.errors import DfaError
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.gradient_rules import Rules
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint


class Nap(Method):
    """s = Δ·∂m/∂A at the clean run: node attribution patching (Nanda 2023; Syed et al. 2023)."""

    name: ClassVar[str] = "nap"
    #: what is changed on the way back
    checkpointing: ClassVar[bool] = True
    rules: ClassVar[Rules] = Rules()

    def passes(self, nodes: NodeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 1 + self.units(nodes, steps), self.units(nodes, steps)

    def units(self, nodes: NodeSet, steps: int) -> int:  # noqa: D102
        return 1

    def held(self, footprint: Footprint, batch: int) -> int:  # noqa: D102
        return batch * (footprint.site_bytes + 2 * footprint.embed_bytes)

    def _places(self, batch: Batch) -> list[float | Float[Tensor, " pair"]]:
        """Where gradients are taken, as parts of the way from the corrupt to the clean embedding: of all examples, or
        of each."""
        return [1.0]

    def score(self, batch: Batch) -> Sums:  # noqa: D102
        nodes, places = batch.measurement.nodes, self._places(batch)
        self._check(batch)
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

            rules = self.rules.taps(batch.runner)
            taps = [*taps, *rules.first, *gradient_taps(batch, deltas, totals), *rules.last]
            with torch.enable_grad(), self.rules.norms(batch.runner):
                logits = batch.run([(INPUT_POINT, embed), *taps], times=times)
                values = batch.values(logits, logits.detach() if clean_logits is None else clean_logits, times)
                (gradient,) = torch.autograd.grad(values.sum(), leaves)
            return leaves[0].detach(), gradient, logits.detach(), values.detach()

        # The clean run goes first, whether its gradient is wanted or not: the differences are read off it.
        clean_logits: Tensor | None = None
        read: list[tuple[str, HookFunction]]
        read = [(site.point, partial(difference, site)) for site in nodes.sites]
        n_places, input_score = len(places), 0.0
        last = places[-1]
        if not isinstance(last, Tensor) and last == 1.0:
            places.pop()
            clean_embed, gradient, clean_logits, values = backward(read, None, 1)
            clean_value = float(values.sum(dtype=torch.float64))
            change = clean_embed.float() - corrupt_embed.float()
            input_score += float((change * gradient.float()).sum(dtype=torch.float64))
            batch.done()
        else:
            seen: list[Tensor] = []
            with torch.no_grad():
                clean_logits = batch.run([(INPUT_POINT, lambda now: seen.append(now.detach().clone())), *read])
            clean_value, clean_embed = batch.total(clean_logits, clean_logits), seen[0]
            change = clean_embed.float() - corrupt_embed.float()
        for some in batch.chunks(places[::-1]):
            start = torch.cat([between(corrupt_embed, clean_embed, place) for place in some])
            _, gradient, _, _ = backward([], start, len(some))
            input_score += float((change * summed(gradient.float(), len(change))).sum(dtype=torch.float64))
            batch.done(len(some))
        totals /= n_places
        values_of = {"clean": clean_value, "corrupt": batch.total(corrupt_logits, clean_logits)}
        if not self.integrates:
            return Sums(totals, values_of)
        begin = values_of["corrupt"]
        if batch.reference is not None:  # the path begins where the embedding alone is at its reference
            with torch.no_grad():
                logits = batch.run([(INPUT_POINT, lambda now: corrupt_embed)])
            begin = batch.total(logits, clean_logits)
        return Sums(totals, values_of, {"embedding": (clean_value - begin, input_score / n_places)})

    def _check(self, batch: Batch) -> None:
        if not self.rules.changes:
            return
        if batch.measurement.mlp_gradient == "input":
            raise DfaError(f"mlp_gradient='input' is a mode of the released code, which has no {self.name!r}.")
        within = next((point for point in batch.measurement.nodes.points if ".ln" in point or "ln_" in point), None)
        if within is not None and self.rules.frozen_norms:
            raise DfaError(f"{self.name!r} takes norms as a whole: {within!r} is within one, and has no gradient.")


class RelP(Nap):
    """Relevance patching (arXiv 2508.21258): nap with the gradient of layer-wise relevance propagation.

    Norms and attention patterns are constants, a nonlinearity f has the slope f(x)/x, and the product in a gated MLP
    shares its gradient among its factors.
    """

    name: ClassVar[str] = "relp"
    checkpointing: ClassVar[bool] = False
    rules: ClassVar[Rules] = Rules(frozen_norms=True, attention="frozen", secant=True, halved_gates=True)


class AttnLrp(Nap):
    """nap with the rules of AttnLRP (arXiv 2402.05602): as ``relp``, but attention's two products share their gradient,
    and its softmax keeps its own."""

    name: ClassVar[str] = "attnlrp"
    checkpointing: ClassVar[bool] = False
    rules: ClassVar[Rules] = Rules(frozen_norms=True, attention="halved", secant=True, halved_gates=True)


class Gim(Nap):
    """Gradient interaction modifications (arXiv 2505.17630): nap with norms as constants, the softmax of attention
    softened to temperature 2 on the way back, and the gradient of every product of two activations shared by them."""

    name: ClassVar[str] = "gim"
    checkpointing: ClassVar[bool] = False
    rules: ClassVar[Rules] = Rules(frozen_norms=True, attention="halved", temperature=2.0, halved_gates=True)


class NapIgInputs(Nap):
    """The gradient averaged over runs whose embedding is corrupt + (k/steps)(clean - corrupt), k = 1 … steps."""

    name: ClassVar[str] = "nap-ig-inputs"
    integrates: ClassVar[bool] = True

    def units(self, nodes: NodeSet, steps: int) -> int:  # noqa: D102
        return steps

    def _places(self, batch: Batch) -> list[float | Float[Tensor, " pair"]]:
        return [*batch.measurement.fractions]


class ExpectedGradients(NapIgInputs):
    """The gradient at random places of the path, uniform and drawn anew for every example and step.

    Right on average with any number of steps, where ``nap-ig-inputs`` has the error of its grid: expected gradients
    (arXiv 1906.10670) along the path of each pair. The places depend on the seed and on an example's row, not on
    batches.
    """

    name: ClassVar[str] = "expected-gradients"
    random: ClassVar[bool] = True

    def passes(self, nodes: NodeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 2 + steps, steps

    def _places(self, batch: Batch) -> list[float | Float[Tensor, " pair"]]:
        own = batch.measurement
        return [
            places_of_draw(own.examples, own.seed, draw)[batch.rows]
            for draw in range(own.steps // 2 if own.only_new else 0, own.steps)
        ]


def places_of_draw(examples: int, seed: int, draw: int) -> Float[Tensor, " example"]:
    """A place of the path for every example, uniform."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + draw) % 2**63)
    return torch.rand(examples, generator=generator, dtype=torch.float32)


def between(corrupt: Tensor, clean: Tensor, place: float | Float[Tensor, " pair"]) -> Tensor:
    """What lies at a part of the way from one to the other: of all examples, or of each."""
    if isinstance(place, Tensor):
        place = place.to(clean).reshape(-1, *[1] * (clean.ndim - 1))
    return torch.lerp(corrupt, clean, place)


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
