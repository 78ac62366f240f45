"""Readers that read another stream than the one that runs through the model, each its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dfa_lens.data.edges import ReaderSite
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.passes import tile
from dfa_lens.models.stream import Stream

Change = Callable[[Sequence[ReaderSite], Int[Tensor, " place"]], Float[Tensor, "place reader d_model"]]
"""What is added to what each reader of some sites reads, at some places (tokens, counted through the rows of a pass).

The sites are neighbours that read the stream at one point: some of a layer's queries, keys and values, an MLP, or the
logits.
"""


class EdgePatch:
    """One pass in which readers read a changed stream, while the stream itself goes on as it is.

    Where readers of keys and values are heads that the model computes them once for, the pass is made once for each
    member of a group, with its own keys and values; every head's z is taken from the pass that was its own.

    Parameters
    ----------
    stream:
        The model's stream.
    sites:
        Whose readers are changed.
    change:
        See :data:`Change`; asked for when the stream arrives at the site, so it may depend on what ran before.
    places:
        Where anything changes.
    rows:
        Of the pass, before it is repeated for members of groups.
    """

    def __init__(
        self, stream: Stream, sites: Sequence[ReaderSite], change: Change, places: Int[Tensor, " place"], rows: int
    ) -> None:
        self.stream, self.sites, self.change, self.places, self.rows = stream, sites, change, places, rows
        split = any(site.kind in ("k", "v") for site in sites)
        self.members = stream.members if split else 1
        self.read: dict[ReaderSite, Tensor] = {}

    def run(
        self,
        batch: PairedRun,
        *,
        times: int = 1,
        layer: int | None = None,
        also: Sequence[tuple[str, HookFunction]] = (),
    ) -> Float[Tensor, "row *place vocab"]:
        """The logits of the pass, as :meth:`PairedRun.run`; ``also`` are hooks that see it as it runs."""
        logits = batch.run([*self._exchange(), *also, *self.taps()], times=times * self.members, layer=layer)
        return logits[: self.rows]

    def taps(self) -> list[tuple[str, HookFunction]]:
        """The hooks at the readers."""
        found: list[tuple[str, HookFunction]] = []
        backend = self.stream.runner.backend
        for site in self.sites:
            block = f"blocks.{site.layer}"
            if site.kind == "mlp":
                found += backend.shifted_mlp_input(block, partial(self._whole_change, site))
            elif site.kind == "logits":
                found.append((f"{block}.hook_resid_post", partial(self._shifted, site)))
            else:
                found.append((f"{block}.attn.hook_{site.kind}", partial(self._take, site)))
        for layer, sites in self._attention().items():
            found.append((f"blocks.{layer}.hook_resid_pre", partial(self._read, sites)))
        return found

    def _attention(self) -> dict[int, list[ReaderSite]]:
        """By layer, the sites that read the stream before attention."""
        found: dict[int, list[ReaderSite]] = {}
        for site in self.sites:
            if site.kind in ("q", "k", "v"):
                found.setdefault(site.layer, []).append(site)
        return found

    def _exchange(self) -> list[tuple[str, HookFunction]]:
        """In every layer with readers of keys or values: each head's z from the copy that had its keys and values."""
        if self.members == 1:
            return []
        layers = sorted({site.layer for site in self.sites if site.kind in ("k", "v")})
        return [(f"blocks.{layer}.attn.hook_z", self._own_heads) for layer in layers]

    def _own_heads(self, now: Float[Tensor, "row pos head d_head"]) -> Tensor:
        copies = now.unflatten(0, (self.members, -1))
        own = torch.stack([copies[i, :, :, i :: self.members] for i in range(self.members)], 3).flatten(2, 3)
        return tile(own, self.members)

    # --- changes ---------------------------------------------------------------------------------------------

    def _whole_change(self, site: ReaderSite, like: Float[Tensor, "row pos d_model"]) -> Tensor:
        """The change of a site with one reader, for every row."""
        found = torch.zeros(self.rows * like.shape[1], like.shape[2], dtype=like.dtype, device=self.stream.device)
        for places in self.stream.tiles(self.places, 1):
            found[places] = _made_again(self.change, [site], places)[:, 0].to(found)
        return tile(found.unflatten(0, (self.rows, -1)), self.members).to(like.device)

    def _shifted(self, site: ReaderSite, now: Float[Tensor, "row pos d_model"]) -> Tensor:
        return now + self._whole_change(site, now)

    def _read(self, sites: Sequence[ReaderSite], now: Float[Tensor, "row pos d_model"]) -> None:
        """At the stream before attention: what the readers make of it, at the places where it changes."""
        flat = now[: self.rows].flatten(0, 1).to(self.stream.device)
        parts = [
            _made_again(self._read_tile, sites, flat, places)
            for places in self.stream.tiles(self.places, sum(map(len, sites)))
        ]
        self.read |= {site: torch.cat(own) for site, own in zip(sites, zip(*parts, strict=True), strict=True)}

    def _read_tile(
        self, sites: Sequence[ReaderSite], flat: Float[Tensor, "all d_model"], places: Int[Tensor, " place"]
    ) -> tuple[Tensor, ...]:
        """[place, reader, d_head] of each site, at some places."""
        streams = flat[places][:, None].to(self.stream.dtype) + self.change(sites, places)
        return tuple(
            self.stream.read(site.layer, site.kind, own, 1 if site.kind == "q" else self.stream.members)
            for site, own in zip(sites, streams.split([len(site) for site in sites], 1), strict=True)
        )

    def _take(self, site: ReaderSite, now: Float[Tensor, "row pos head d_head"]) -> Tensor:
        """At the queries, keys or values: what was made of the changed stream, each copy with its own heads."""
        read = self.read.pop(site).to(now)
        places = self.places.to(now.device)
        step = read.shape[1] // now.shape[2]
        copies = []
        for i, copy in enumerate(now.unflatten(0, (self.members, -1))):
            flat = copy.flatten(0, 1).clone()
            flat[places] = read[:, i % step :: step]
            copies.append(flat.unflatten(0, copy.shape[:2]))
        return torch.cat(copies)


def _made_again(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which nothing is kept for the backward pass: it is then called again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
