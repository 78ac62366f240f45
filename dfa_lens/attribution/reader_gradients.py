"""What the readers' gradients add up to over several passes, and their products with what the writers change.

With G the gradient at a head's queries (or keys, or values), x the stream before the norm, w its weight and
s = √(mean x² + eps), the gradient at the reader's input is

    g = ĝ/s - x·(x·ĝ)/(d_model·s³),    ĝ = w⊙(G·W_Qᵀ).

The first part is linear in G/s, so its sum over passes is kept d_head wide and made d_model wide once, at the end. The
second is x times one number for each reader, x·ĝ = s·(q - b)·G: each pass multiplies x with the writers' differences
and is done with it. Biases play no part. In a layer norm x and g are less their means; without a norm g = ĝ. Under
rules by which a norm's scale is a constant, the first part is all.

Where norms stand behind attention, what a head's difference adds to the stream depends on the pass (the derivative of
the norm there), so each pass is multiplied with the writers' differences in whole and is done with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.attribution.method import Batch, summed
from dfa_lens.data.edges import ReaderSite
from dfa_lens.data.nodes import Site
from dfa_lens.errors import HookError, ModelError
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.gradient_rules import Rules
from dfa_lens.models.stream import Stream, head_mask

Taps = list[tuple[str, HookFunction]]


SCORES_POINT = "blocks.{layer}.attn.hook_attn_scores"


class ReaderGradients:
    """The sum of the readers' gradients over passes of one batch, and its products with the writers' differences.

    Parameters
    ----------
    stream, batch:
        The model's stream, and the batch.
    deltas:
        Hook point → clean less corrupt activation, of the writers; may still be filled while the first pass runs.
    writers:
        The sites of the writers whose edges are scored, neighbours in order; default: all.
    rules:
        Those that the gradients are taken under.
    """

    def __init__(
        self,
        stream: Stream,
        batch: Batch,
        deltas: Mapping[str, Tensor],
        writers: tuple[Site, ...] | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.stream, self.batch, self.deltas = stream, batch, deltas
        self.rules = Rules() if rules is None else rules
        self.writers = stream.edges.nodes.sites if writers is None else writers
        self.first = self.writers[0].positions[0]
        self.stop = self.writers[-1].positions[-1] + 1
        constant = ("q", "k") if self.rules.attention == "frozen" else ()
        #: the sites with a reader behind one of the writers, and a gradient
        self.sites = tuple(
            site for site in stream.edges.sites if site.n_before > self.first and site.kind not in constant
        )
        self.sums: dict[ReaderSite, Tensor] = {}
        self.along = torch.zeros(stream.edges.shape, dtype=torch.float64)
        self.heads: dict[str, Tensor] = {}  # hook point → the running pass's z, where norms stand behind attention
        self.places = stream.places(batch)
        if stream.members > 1:
            self._require_scores()

    def _require_scores(self) -> None:
        if not any(site.kind == "k" for site in self.sites):
            return
        try:
            self.stream.runner.points([SCORES_POINT.format(layer=0)])
        except HookError as error:
            raise ModelError(
                "The gradients of edges into single heads that share keys and values are read off attention scores, "
                "which this model does not show: use readers='grouped', method='exact', or backend='bridge'."
            ) from error

    def scores(self) -> Float[Tensor, "writer reader"]:
        """Δ·g summed over positions and width, examples and passes, in float64; 0 where there is no edge."""
        self.settle()
        return -self.along

    def chunks(self, places: list[Any]) -> list[list[Any]]:
        """As many passes at a time as fit into one, and as can be added up."""
        return [[place] for place in places] if self.stream.heads_write_together else self.batch.chunks(places)

    def settle(self) -> None:
        """Multiply the gradients that were added with the writers' differences, and forget them."""
        if not self.sums:
            return
        widest = max(len(site) for site in self.sites)
        for places in self.stream.tiles(self.places, widest):
            written = self._written(places, self.stop)
            part = torch.zeros(self.along.shape, dtype=self.stream.dtype, device=written.device)
            for site in self.sites:
                rows = self._rows(site)
                own = self._at_input(site, places).transpose(0, 1).flatten(1)
                # as a plain product of matrices: einsum would copy all writers into another order, for every site
                torch.mm(written[: rows.stop - rows.start].flatten(1), own.T, out=part[rows, site.columns])
            self.along -= part.double().cpu()
        self.sums.clear()

    def _written(self, places: Int[Tensor, " place"], before: int) -> Float[Tensor, "writer place d_model"]:
        """What those of the writers add that are among the first ``before`` of all."""
        frozen = self.rules.frozen_norms
        return self.stream.written_until(before, self.deltas, places, self.writers, self.heads, frozen=frozen)

    def _rows(self, site: ReaderSite) -> slice:
        """The writers before a site."""
        return slice(self.first, min(self.stop, site.n_before))

    def _at_input(self, site: ReaderSite, places: Int[Tensor, " place"]) -> Float[Tensor, "place reader d_model"]:
        """The gradient at the readers' inputs, but for its part along the stream."""
        own = self.sums[site].flatten(0, 1).to(self.stream.device)[places]
        if site.kind in ("mlp", "logits"):
            return own[:, None]
        weights = self.stream.attention(site.layer)
        matrix = weights.projections[site.kind][0].to(own)
        members = own.shape[1] // len(matrix)
        own = own.unflatten(1, (len(matrix), members))
        found = torch.einsum("phme,hde->phmd", own, matrix).flatten(1, 2)
        return found if weights.norm is None else weights.norm.centre(weights.norm.weighted(found))

    def one_pass(self) -> GradientPass:
        """Whatever is needed to add the gradients of one more pass."""
        return GradientPass(self)

    def add(self, site: ReaderSite, gradient: Float[Tensor, "row pos *width"]) -> None:
        """Add a pass's gradient, of one or several repetitions of the batch."""
        own = summed(gradient, len(self.batch))
        self.sums[site] = self.sums[site] + own if site in self.sums else own

    def add_along(self, streams: Mapping[int, Tensor], along: Mapping[int, Mapping[ReaderSite, Tensor]]) -> None:
        """Take off a pass's parts along the stream, x·(x·ĝ)/(d_model·s³).

        Parameters
        ----------
        streams:
            Layer → x [row, pos, d_model], what its attention reads.
        along:
            Layer → site → (x·ĝ)/(d_model·s³) [row, pos, reader].
        """
        times = len(next(iter(streams.values()))) // len(self.batch)

        def at(values: Tensor, places: Tensor) -> Tensor:
            """[row, pos, width] → [repetition, place, width]."""
            return (
                values.unflatten(0, (times, -1)).flatten(1, 2).to(self.stream.device)[:, places].to(self.stream.dtype)
            )

        before = max(site.n_before for sites in along.values() for site in sites)
        # all layers in one go: what the writers add is made once for a pass, not once for each of its layers
        for places in self.stream.tiles(self.places, times):
            written = self._written(places, before)
            for layer, own in along.items():
                in_order = sorted(own, key=lambda site: site.first)
                rows, columns = self._rows(in_order[0]), slice(in_order[0].first, in_order[-1].stop)
                likeness = torch.einsum("wpd,tpd->wtp", written[: rows.stop - rows.start], at(streams[layer], places))
                factors = at(torch.cat([own[site] for site in in_order], 2), places)
                self.along[rows, columns] += torch.einsum("wtp,tpr->wr", likeness, factors).double().cpu()


class GradientPass:
    """The hooks of one pass, which add the gradients while they go by; and what is left to do afterwards."""

    def __init__(self, sums: ReaderGradients) -> None:
        self.sums, self.stream = sums, sums.stream
        self.streams: dict[int, Tensor] = {}  # by layer: what its attention reads
        self.along: dict[int, dict[ReaderSite, Tensor]] = {}
        self.split: list[_SplitHeads] = []
        self.heads: dict[str, Tensor] = {}

    @property
    def keeps_graph(self) -> bool:
        """Whether the graph is needed after the gradient was taken."""
        return bool(self.split)

    def taps(self) -> Taps:
        """The hooks, for one pass."""
        found: Taps = []
        for layer in sorted({site.layer for site in self.sums.sites if site.kind in ("q", "k", "v")}):
            found.append((f"blocks.{layer}.hook_resid_pre", partial(self._keep_stream, layer)))
        for site in self.sums.sites:
            found += self._taps_of(site)
        points = [site.point for site in self.sums.writers if self.stream.needs_heads(site)]
        return found + [(point, partial(self._keep_heads, point)) for point in points]

    def _keep_heads(self, point: str, now: Tensor) -> None:
        self.heads[point] = now.detach()

    def _taps_of(self, site: ReaderSite) -> Taps:
        block = f"blocks.{site.layer}"
        if site.kind == "logits":
            return [(f"{block}.hook_resid_post", partial(self._whole, site, 1.0))]
        if site.kind == "mlp":
            points = self.stream.runner.backend.mlp_input_gradient(block)
            return [(point, partial(self._whole, site, sign)) for point, sign in points]
        point = f"{block}.attn.hook_{site.kind}"
        if site.kind == "q" or self.stream.members == 1:
            return [(point, partial(self._projected, site))]
        split = _SplitHeads(site, self.stream.members)
        self.split.append(split)
        mixed = SCORES_POINT.format(layer=site.layer) if site.kind == "k" else f"{block}.attn.hook_z"
        return [(point, split.keep_shared), (mixed, split.keep_mixed)]

    def _keep_stream(self, layer: int, now: Tensor) -> None:
        self.streams[layer] = self.stream.centred(layer, now.detach())

    def _whole(self, site: ReaderSite, sign: float, now: Tensor) -> Tensor:
        # A view of our own: a hook on the tensor itself could fire for the parts of several users of it.
        now = now.view_as(now)
        now.register_hook(lambda gradient: self.sums.add(site, sign * gradient.to(self.stream.dtype)))
        return now

    def _projected(self, site: ReaderSite, now: Tensor) -> Tensor:
        now = now.view_as(now)
        values = now.detach()
        now.register_hook(lambda gradient: self._add(site, values, gradient))
        return now

    def _add(self, site: ReaderSite, values: Tensor, gradient: Float[Tensor, "row pos head d_head"]) -> None:
        """Add the gradient at some queries, keys or values, which are ``values``."""
        layer, dtype = site.layer, self.stream.dtype
        if self.stream.attention(layer).norm is None:
            self.sums.add(site, gradient.to(dtype))
            return
        stream = self.streams[layer].to(gradient.device)
        scale = self.stream.scale(layer, stream)
        gradient, values = gradient.to(dtype), values.to(dtype)
        self.sums.add(site, gradient / scale[..., None])
        if self.sums.rules.frozen_norms:
            return
        bias = self.stream.attention(layer).projections[site.kind][1]
        if bias is not None:
            values = values - bias.to(values)
        values = values.repeat_interleave(gradient.shape[2] // values.shape[2], 2)
        along = (values * gradient).sum(-1) / (stream.shape[-1] * scale.square())
        self.along.setdefault(layer, {})[site] = along

    def finish(self) -> None:
        """Add what could not be added while the gradient went by."""
        self.sums.heads = self.heads
        for split in self.split:
            self._add(split.site, split.shared.detach(), split.gradient())
        self.split.clear()
        if self.along:
            self.sums.add_along(self.streams, self.along)
        self.along.clear()
        if self.stream.heads_write_together:
            self.sums.settle()


class _SplitHeads:
    """The gradient at keys or values for every query head, where the model computes them once for several.

    What is computed from them head by head (attention scores, z) has a gradient for every head. With all but one head
    of each group left out of it, the way back to the keys or values gives that head's part, whatever is on that way.
    """

    def __init__(self, site: ReaderSite, members: int) -> None:
        self.site, self.members = site, members
        self.head_axis = 1 if site.kind == "k" else 2  # scores [row, head, query, key], z [row, pos, head, d_head]

    def keep_shared(self, now: Tensor) -> Tensor:
        """At the keys or values."""
        self.shared = now.view_as(now)
        return self.shared

    def keep_mixed(self, now: Tensor) -> Tensor:
        """At what is computed from them."""
        self.mixed = now.view_as(now)
        self.handle = self.mixed.register_hook(self._keep_gradient)
        return self.mixed

    def _keep_gradient(self, gradient: Tensor) -> None:
        self.at_mixed = gradient
        self.handle.remove()  # of the whole pass, not of the parts of it that are taken afterwards

    def _parts(self) -> Iterator[Tensor]:
        for member in range(self.members):
            own = head_mask(self.at_mixed.shape[self.head_axis], self.members, member).to(self.at_mixed.device)
            shape = [1] * self.at_mixed.ndim
            shape[self.head_axis] = -1
            gradient = self.at_mixed * own.reshape(shape)
            yield torch.autograd.grad(self.mixed, self.shared, gradient, retain_graph=True)[0]

    def gradient(self) -> Float[Tensor, "row pos head d_head"]:
        """For every query head; lets go of the graph."""
        found = torch.stack(list(self._parts()), 3).flatten(2, 3)
        self.shared = self.shared.detach()
        del self.mixed, self.at_mixed
        return found
