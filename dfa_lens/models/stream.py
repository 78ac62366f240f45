"""The residual stream taken apart: what every writer adds to it, and what every reader reads of it.

The stream is the sum of what the embedding, the heads and the MLP blocks add, plus biases and learned positions, which
no prompt changes. A head's part is z·W_O, so the difference between two runs is the difference of z times W_O. Queries,
keys and values read the stream through a norm: q = (w⊙x/s)·W_Q + b, s = √(mean x² + eps), each head its own part, which
is what lets one head read another stream than the rest without any flag of the model. In a layer norm x is less its
mean, and without a norm s is 1.

Where a norm N stands behind attention, heads write together: N(y), y = Σ z·W_O + b. What a head adds is then what it
changes of N(y), the other heads as they are: N(y + Δ) - N(y), and for gradients, to first order, Δ times the derivative
of N at the running y. An MLP's part is what comes out of the norm behind it.

What is d_model wide for every writer is made for a few tokens at a time (:meth:`Stream.tiles`), never for a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfa_lens.data.edges import EdgeSet
from dfa_lens.data.nodes import INPUT_POINT, Site
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import HookError, ModelError
from dfa_lens.models import memory
from dfa_lens.models.backend import AttentionWeights, HookFunction
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner

#: What a tile may take: all writers and the readers of a layer, d_model wide, for some tokens.
TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
#: Rounding errors of the dtype that the parts may differ by from the whole, and the least that is asked for.
ROUNDING_ERRORS, LEAST_OFF = 8.0, 1e-4


class Stream:
    """The residual stream of a model, between the writers and readers of an edge set.

    Parameters
    ----------
    runner:
        The model, inside a :meth:`~dfa_lens.models.runner.Runner.session`.
    edges:
        The edges; only their writers and readers count, not which of them are chosen.

    Raises
    ------
    ModelError
        If the model's stream is not the sum of what embedding, heads and MLP blocks add.
    """

    def __init__(self, runner: Runner, edges: EdgeSet) -> None:
        self.runner, self.edges = runner, edges
        self.device = runner.device
        #: What sums are made in: float32, or wider where the model is.
        self.dtype = torch.promote_types(runner.backend.dtype, torch.float32)
        self.attention = cache(self._attention)
        self._check()

    @property
    def members(self) -> int:
        """How many readers share each of the model's key-value heads: 1 where the edges are grouped as the model is."""
        return self.edges.n_kv_heads // self.attention(0).projections["k"][0].shape[0]

    @property
    def heads_write_together(self) -> bool:
        """Whether there is a norm behind attention, so that what a head adds depends on the others."""
        return self.attention(0).behind is not None

    def needs_heads(self, site: Site) -> bool:
        """Whether what a site's writers add to the stream depends on what all of them compute."""
        return self.heads_write_together and site.axis is not None

    def _attention(self, layer: int) -> AttentionWeights:
        return self.runner.backend.attention_weights(layer)

    # --- tokens ----------------------------------------------------------------------------------------------

    def places(self, batch: PairedRun) -> Int[Tensor, " place"]:
        """The tokens of a batch, counted through its examples, in which anything can differ between the two runs.

        From the first token that differs to the last real one of the clean prompt, but for those not run again. What
        stands in the place of the corrupt run (an ablation) differs from the first token on.
        """
        pairs = batch.pairs
        position = torch.arange(pairs.clean.shape[1])
        first = pairs.shared if batch.reference is None else torch.zeros_like(pairs.lengths)
        differs = (position >= first[:, None]) & (position < pairs.lengths[:, None])
        return differs[:, batch.first :].flatten().nonzero()[:, 0].to(self.device)

    def tiles(self, places: Int[Tensor, " place"], columns: int) -> Iterator[Int[Tensor, " place"]]:
        """The places, as many at a time as keep all writers and ``columns`` readers small."""
        d_model = self.attention(0).output.shape[2]
        each = (len(self.edges.nodes) + 2 * columns) * d_model * self.dtype.itemsize
        return iter(places.split(max(1, TILE_BYTES["cpu" if self.device.type == "cpu" else "cuda"] // each)))

    # --- writers ---------------------------------------------------------------------------------------------

    def written(
        self, site: Site, activation: Float[Tensor, "batch pos *width"], places: Int[Tensor, " place"]
    ) -> Float[Tensor, "writer place d_model"]:
        """What the writers of a site add at some places, from their activation or a difference of two.

        Of heads behind which there is a norm: before the norm.
        """
        own = activation.flatten(0, 1).to(self.device)[places].to(self.dtype)
        if site.axis is None:
            return own[None]
        return torch.einsum("phe,hed->hpd", own, self.attention(site.layer).output.to(own))

    def behind_norm(
        self,
        site: Site,
        change: Float[Tensor, "*writer place d_model"],
        activation: Float[Tensor, "batch pos *width"],
        places: Int[Tensor, " place"],
        *,
        first_order: bool = False,
        frozen: bool = False,
    ) -> Float[Tensor, "*writer place d_model"]:
        """What reaches the stream of a change in what the heads of a site write, where there is a norm behind them.

        Parameters
        ----------
        change:
            Before the norm; several are several changes, each by itself.
        activation:
            The running z of all heads.
        first_order:
            By the norm's derivative.
        frozen:
            By the derivative, with what the norm divides by taken for a constant.
        """
        weights = self.attention(site.layer)
        norm = weights.behind
        if norm is None or site.axis is None:
            return change
        z = activation.flatten(0, 1).to(self.device)[places].to(self.dtype)
        y = torch.einsum("phe,hed->pd", z, weights.output.to(z))
        if weights.output_bias is not None:
            y = y + weights.output_bias.to(y)
        if not first_order:
            return norm.without_bias(y + change) - norm.without_bias(y)
        scale, centred = norm.scale(y), norm.centre(y)
        if frozen:
            return norm.weighted(norm.centre(change) / scale)
        along = (centred * change).mean(-1, keepdim=True) / scale.square()
        return norm.weighted((norm.centre(change) - centred * along) / scale)

    def written_until(
        self,
        n: int,
        activations: Mapping[str, Tensor],
        places: Int[Tensor, " place"],
        sites: Sequence[Site] | None = None,
        heads: Mapping[str, Tensor] | None = None,
        *,
        frozen: bool = False,
    ) -> Float[Tensor, "writer place d_model"]:
        """What the first ``n`` writers add, or those of them that are of some ``sites``.

        With ``heads``, the running z by hook point: to first order behind the norms behind attention, whose scales are
        constants with ``frozen``.
        """
        found = []
        for site in sites or self.edges.nodes.sites:
            if site.positions[0] < n:
                own = self.written(site, activations[site.point], places)
                if heads and site.point in heads:
                    own = self.behind_norm(site, own, heads[site.point], places, first_order=True, frozen=frozen)
                found.append(own)
        return torch.cat(found)

    # --- readers ---------------------------------------------------------------------------------------------

    def scale(self, layer: int, stream: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place 1"]:
        """What the norm before a layer's attention divides by."""
        norm, stream = self.attention(layer).norm, stream.to(self.dtype)
        return torch.ones_like(stream[..., :1]) if norm is None else norm.scale(stream)

    def centred(self, layer: int, stream: Float[Tensor, "*place d_model"]) -> Float[Tensor, "*place d_model"]:
        """What the norm before a layer's attention divides."""
        norm = self.attention(layer).norm
        return stream if norm is None else norm.centre(stream)

    def read(
        self, layer: int, letter: str, streams: Float[Tensor, "place reader d_model"], members: int = 1
    ) -> Float[Tensor, "place reader d_head"]:
        """The queries, keys or values of a layer whose readers each read a stream of their own.

        With ``members``, so many readers in a row share the weights of one head.
        """
        weights = self.attention(layer)
        matrix, bias = weights.projections[letter]
        normed = streams.to(self.dtype)
        if weights.norm is not None:
            normed = weights.norm.without_bias(normed)
        if members > 1:
            matrix = matrix.repeat_interleave(members, 0)
            bias = bias if bias is None else bias.repeat_interleave(members, 0)
        found = torch.einsum("phd,hde->phe", normed.to(matrix), matrix)
        return found if bias is None else found + bias

    # --- whether it is so ------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Run a few tokens, and compare the parts with the whole."""
        seen: dict[str, Tensor] = {}

        def look(name: str) -> tuple[str, HookFunction]:
            return name, lambda now: seen.__setitem__(name, now.detach())

        middle = {layer: self.runner.backend.mlp_input_gradient(f"blocks.{layer}")[0][0] for layer in self._layers}
        own = ("hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
        rest = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")
        names = [INPUT_POINT, *(f"blocks.{layer}.{name}" for layer in self._layers for name in (*own, *rest))]
        tokens = (torch.arange(6).reshape(2, 3) * 7919 + 13) % self.runner.d_vocab
        try:
            with torch.no_grad():
                taps = [look(name) for name in [*names, *middle.values()]]
                # nobody looks at the logits, so the unembedding, often the largest matrix, runs in one column
                column = torch.zeros(2, 1, dtype=torch.long)
                self.runner.run_as_told(tokens, torch.full((2,), 3), taps, columns=column, short_unembedding=True)
        except HookError as error:
            raise ModelError(f"Edges need hook points that this model does not have: {error}") from error
        # but for learned positions: in which the two rows do not differ
        first, embedded = seen["blocks.0.hook_resid_pre"], seen[INPUT_POINT]
        self._same("the stream before block 0", first - first[:1], embedded - embedded[:1], like=first)
        for layer in self._layers:
            block = {name: seen[f"blocks.{layer}.{name}"] for name in (*own, *rest)}
            if layer:
                last = seen[f"blocks.{layer - 1}.hook_resid_post"]
                self._same(f"the stream before block {layer}", block["hook_resid_pre"], last)
            self._check_block(layer, block, seen[middle[layer]])

    def _check_block(self, layer: int, block: Mapping[str, Tensor], middle: Tensor) -> None:
        before, places = block["hook_resid_pre"], torch.arange(6, device=self.device)
        read = before if self.edges.parallel else before + block["hook_attn_out"]
        self._same(f"what the MLP of block {layer} reads", middle, read)
        whole = before + block["hook_attn_out"] + block["hook_mlp_out"]
        self._same(f"the stream behind block {layer}", block["hook_resid_post"], whole)
        site = next(site for site in self.edges.nodes.sites if site.point == f"blocks.{layer}.attn.hook_z")
        heads = self.written(site, block["attn.hook_z"], places).sum(0)
        # before a norm behind them: from nothing but their bias to all of it
        heads = self.behind_norm(site, heads, torch.zeros_like(block["attn.hook_z"]), places)
        added = block["hook_attn_out"].flatten(0, 1).to(heads)
        # less the first token's, and so less the bias
        self._same(f"what the heads of block {layer} add", added - added[0], heads - heads[0], like=added)
        flat = before.flatten(0, 1).to(self.device)
        for letter in "qkv":
            now = block[f"attn.hook_{letter}"].flatten(0, 1)
            n_heads = self.attention(layer).projections[letter][0].shape[0]
            if now.shape[1] != n_heads or self.edges.n_kv_heads % (n_heads if letter != "q" else 1):
                raise ModelError(
                    f"Block {layer} has {now.shape[1]} heads at attn.hook_{letter}, and weights for {n_heads}: switch "
                    "model.cfg.ungroup_grouped_query_attention off."
                )
            read = self.read(layer, letter, flat[:, None].expand(-1, n_heads, -1))
            self._same(f"what attn.hook_{letter} of block {layer} reads", now, read)

    @property
    def _layers(self) -> range:
        return range(self.runner.n_layers)

    def _same(self, what: str, whole: Tensor, parts: Tensor, like: Tensor | None = None) -> None:
        whole, parts = whole.to(self.device).double(), parts.to(self.device).double()
        size = float((whole if like is None else like.double()).abs().max())
        off = float((whole - parts).abs().max())
        most = max(ROUNDING_ERRORS * torch.finfo(self.runner.backend.dtype).eps, LEAST_OFF)
        if not off <= most * max(size, 1e-30):
            raise ModelError(
                "Edges need a residual stream that is the sum of what embedding, heads and MLP blocks add. Here "
                f"{what} differs from the sum of its parts by {off:.2g} ({size:.2g} at most): another kind of model "
                "(scaled sums, say), one that rounds what its weights are multiplied with (LLM.int8), or somebody's "
                "hooks on it. Node scores do not need it: dfa.attribute."
            )


def require_room(runner: Runner, edges: EdgeSet, pairs: PromptPairs, batch_size: int | str, what: str) -> None:
    """Refuse batches whose writers alone, in one run, are more than there is memory for.

    Raises
    ------
    ModelError
        Says how much that would be.
    """
    if not isinstance(batch_size, int):  # "auto" takes what fits
        return
    width = 1 + 2 * edges.n_layers  # the embedding, and in every layer all heads' z and the MLP's output
    tokens = min(batch_size, len(pairs)) * int(pairs.longest.max())
    least = tokens * width * int(runner.model.cfg.d_model) * runner.backend.dtype.itemsize
    memory.require_room(
        runner.device, least, f"{what} with batch_size={batch_size}", "take a smaller one, or batch_size='auto'"
    )


def head_mask(n_heads: int, members: int, member: int) -> Bool[Tensor, " head"]:
    """The heads that are number ``member`` of those that share a key-value head."""
    return torch.arange(n_heads) % members == member
