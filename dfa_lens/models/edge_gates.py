"""Masks of edges, soft or hard: what is not open of an edge carries its writer's corrupt activation.

What reader v reads is the stream as it runs, plus (1 - g_uv)(corrupt_u - now_u) of every writer u before it; of heads
behind which there is a norm, what comes out of it of their sum. With all gates at 1 that is the clean run, with all at
0 the corrupt one, with zeros and ones the circuit of the ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.data.edges import ReaderSite
from dfa_lens.models.edge_patches import EdgePatch
from dfa_lens.models.hooks import Activations
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.stream import Stream


def run_gated(
    stream: Stream,
    batch: PairedRun,
    gates: Float[Tensor, "writer reader"] | Float[Tensor, "example writer reader"],
    corrupt: Mapping[str, Tensor],
) -> Float[Tensor, "..."]:
    """The logits of a batch under masks of edges, with a gradient in the gates where they have one.

    The gradient goes through what the writers compute now. What is d_model wide for every writer is made for some
    tokens at a time, and made again in the backward pass.

    Parameters
    ----------
    stream:
        The model's stream, between the writers and readers of the gates.
    batch:
        The prompts; run clean.
    gates:
        How much of each edge is open, one mask for all examples or one for each. Where the model has no edge they do
        not matter.
    corrupt:
        What the writers do in the corrupt run, by hook point.
    """
    closed = (1 - gates).to(stream.device, stream.dtype)
    rows, width = len(batch), batch.pairs.clean.shape[1] - batch.first
    missing: Activations = {}  # corrupt less running activations

    def compare(point: str, now: Tensor) -> None:
        missing[point] = corrupt[point].to(now.device) - now[:rows]

    def change(sites: Sequence[ReaderSite], places: Int[Tensor, " place"]) -> Float[Tensor, "place reader d_model"]:
        n = sites[0].n_before
        own = torch.cat([closed[..., :n, site.columns] for site in sites], -1)
        if own.ndim == 3:
            own = own[places // width]
        if own.shape[-1] == 1:
            return _weighted(stream, own[..., 0], missing, places, corrupt)[:, None]
        if stream.heads_write_together:
            parts = [_weighted(stream, each, missing, places, corrupt) for each in own.unbind(-1)]
            return torch.stack(parts, 1)
        written = stream.written_until(n, missing, places)
        if own.ndim == 3:
            return torch.einsum("pwr,wpd->prd", own, written)
        return torch.einsum("wr,wpd->prd", own, written)

    patched = [site for site in stream.edges.sites if closed.requires_grad or _any(closed, site)]
    patch = EdgePatch(stream, patched, change, stream.places(batch), rows)
    also = [(point, partial(compare, point)) for point in stream.edges.nodes.points]
    return patch.run(batch, also=also)


def _any(closed: Tensor, site: ReaderSite) -> bool:
    return bool(closed[..., : site.n_before, site.columns].any())


def _weighted(
    stream: Stream,
    weights: Float[Tensor, " writer"] | Float[Tensor, "place writer"],
    activations: Mapping[str, Tensor],
    places: Int[Tensor, " place"],
    corrupt: Mapping[str, Tensor],
) -> Float[Tensor, "place d_model"]:
    """The weighted sum of what the first writers add: a head's z is weighted before its W_O, which is less work.

    ``activations`` are corrupt less running ones.
    """
    weights, parts = weights.expand(len(places), -1), []
    for site in stream.edges.nodes.sites:
        if site.positions[0] >= weights.shape[1]:
            break
        own = activations[site.point].flatten(0, 1).to(stream.device)[places].to(stream.dtype)
        scales = weights[:, list(site.positions)]
        if site.axis is None:
            parts.append(own * scales)
        else:
            output = stream.attention(site.layer).output.to(own)
            whole = (own * scales[..., None]).flatten(1) @ output.flatten(0, 1)
            if stream.heads_write_together:
                now = corrupt[site.point].to(activations[site.point]) - activations[site.point]
                whole = stream.behind_norm(site, whole, now, places)
            parts.append(whole)
    return torch.stack(parts).sum(0)
