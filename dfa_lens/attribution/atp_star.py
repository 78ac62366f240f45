"""AtP*: attribution patching with two failures mended (Kramár et al. 2024, arXiv 2403.00745).

- Effects that cancel: the gradient is taken L times, each time with what one block adds to the residual stream left
  out of it (GradDrop), and the absolute estimates of every example are added up.
- Saturated attention: what a query or a key does is not read off a gradient through the softmax. The pattern is
  computed anew with the corrupt query or key, and only what comes after it is linear. With P the pattern and V the
  values, a head's z is P·V: the model itself computes z with the corrupt query or key, and the clean z is put back
  behind it, so that one pass does all layers.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from dfa_lens.attribution.method import Batch, Method, Sums
from dfa_lens.data.nodes import INPUT_POINT, NodeSet, Site
from dfa_lens.errors import DfaError, ModelError, NodeError
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint

Taps = list[tuple[str, HookFunction]]


class AtpStar(Method):
    """Mean over examples of Σ_l \\|Δ·∂m/∂A without what block l adds\\| / (number of blocks that the node is not in).

    All scores are positive or zero: they say how much a node matters, not in which direction. Where nodes are queries
    or keys, Δ·∂m/∂A is (z - z with the corrupt query or key)·∂m/∂z.
    """

    name: ClassVar[str] = "atp-star"

    def passes(self, nodes: NodeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        letters = {letter for site in nodes.sites if (letter := _letter(site))}
        return 3 + 2 * len(letters), nodes.n_layers

    def units(self, nodes: NodeSet, steps: int) -> int:  # noqa: D102
        return nodes.n_layers

    def held(self, footprint: Footprint, batch: int) -> int:  # noqa: D102
        return 2 * batch * (footprint.site_bytes + footprint.embed_bytes)

    def score(self, batch: Batch) -> Sums:  # noqa: D102
        nodes, runner = batch.measurement.nodes, batch.runner
        if batch.measurement.mlp_gradient == "input":
            raise DfaError("mlp_gradient='input' is a mode of the released code, which has no 'atp-star'.")
        corrupt, corrupt_logits = batch.record("corrupt")
        clean, _ = batch.record("clean")
        deltas = {point: clean[point] - corrupt[point] for point in clean}
        recomputed = self._recomputed(batch, corrupt)
        found = torch.zeros(len(batch), len(nodes), dtype=torch.float64)
        dropped = [-1]
        leaves: list[Tensor] = []

        def embed(now: Tensor) -> Tensor:
            leaves.append(now.detach().clone().requires_grad_(True))
            return leaves[0]

        def look(site: Site, now: Tensor) -> Tensor:
            now = now.view_as(now)
            if not _letter(site):
                now.register_hook(partial(self._add, batch, site, deltas[site.point], found))
            return now

        def look_behind(site: Site, delta: Tensor, now: Tensor) -> Tensor:
            now = now.view_as(now)
            now.register_hook(partial(self._add_heads, batch, site, delta, found))
            return now

        def drop(layer: int, now: Tensor) -> Tensor:
            now = now.view_as(now)
            now.register_hook(lambda gradient: torch.zeros_like(gradient) if layer == dropped[0] else gradient)
            return now

        taps: Taps = [(INPUT_POINT, embed), *((site.point, partial(look, site)) for site in nodes.sites)]
        taps += [(point, partial(look_behind, site, delta)) for point, site, delta in recomputed]
        n_layers = runner.n_layers
        for layer in range(n_layers):
            written = [f"blocks.{layer}.hook_attn_out"]
            written += [f"blocks.{layer}.hook_mlp_out"] if runner.backend.mlp(layer) is not None else []
            taps += [(point, partial(drop, layer)) for point in written]
        totals = torch.zeros_like(found)
        with torch.enable_grad():
            logits = batch.run(taps)
            values = batch.values(logits, logits.detach())
            for layer in range(n_layers):
                dropped[0] = layer
                torch.autograd.grad(values.sum(), leaves, retain_graph=layer + 1 < n_layers)
                totals += found.abs()
                found.zero_()
                batch.done()
        terms = torch.tensor([n_layers - (0 <= node.layer < n_layers) for node in nodes]).clamp_min(1)
        sums = {"clean": float(values.detach().sum(dtype=torch.float64))}
        sums["corrupt"] = batch.total(corrupt_logits, logits.detach())
        return Sums(totals.sum(0) / terms, sums)

    @staticmethod
    def _add(batch: Batch, site: Site, delta: Tensor, found: Tensor, gradient: Tensor) -> None:
        found[:, list(site.positions)] += batch.each(site, delta, gradient)

    @staticmethod
    def _add_heads(batch: Batch, site: Site, delta: Tensor, found: Tensor, gradient: Tensor) -> None:
        """Of queries or keys: the heads of z that read each of them."""
        if site.spans:
            raise NodeError(f"'atp-star' has no scores of queries and keys at spans ({site.point!r}).")
        heads = (delta.float() * gradient.float()).sum((1, 3), dtype=torch.float64).cpu()
        if site.axis is None:
            found[:, list(site.positions)] += heads.sum(1, keepdim=True)
            return
        own = heads.unflatten(1, (site.size or heads.shape[1], -1)).sum(2)
        found[:, list(site.positions)] += own[:, list(site.slices)]

    def _recomputed(self, batch: Batch, corrupt: Activations) -> list[tuple[str, Site, Tensor]]:
        """For queries and keys: where z is, and z less what it is with the corrupt queries or keys."""
        found: list[tuple[str, Site, Tensor]] = []
        for letter in "qk":
            sites = [site for site in batch.measurement.nodes.sites if _letter(site) == letter]
            if not sites:
                continue
            for site in sites:
                if site.by_position or site.axis not in (None, 2):
                    raise DfaError(
                        f"'atp-star' takes queries and keys by head (axis 2) or as a whole: {site.point!r} is cut "
                        f"along axis {site.axis}."
                    )
            behind = {site.point: site.point.removesuffix(f"hook_{letter}") + "hook_z" for site in sites}
            if not all(batch.runner.has_point(point) for point in behind.values()):
                raise ModelError("'atp-star' of queries or keys needs hook points 'attn.hook_z'.")
            clean: Activations = {}
            changed: Activations = {}

            def keep(point: str, now: Tensor, clean: Activations = clean) -> None:
                clean[point] = now.detach()

            def swap(point: str, now: Tensor) -> Tensor:
                return corrupt[point].to(now)

            def put_back(point: str, now: Tensor, clean: Activations = clean, changed: Activations = changed) -> Tensor:
                changed[point] = clean[point] - now.detach()
                return clean[point]

            with torch.no_grad():
                batch.run([(point, partial(keep, point)) for point in behind.values()])
                patched: Taps = []
                for site in sites:
                    patched.append((site.point, partial(swap, site.point)))
                    patched.append((behind[site.point], partial(put_back, behind[site.point])))
                batch.run(patched)
            found += [(behind[site.point], site, changed[behind[site.point]]) for site in sites]
        return found


def _letter(site: Site) -> str:
    """ "q" or "k", of queries or keys; else ""."""
    return next((letter for letter in "qk" if site.point.endswith(f".attn.hook_{letter}")), "")
