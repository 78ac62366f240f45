"""One forward pass under hooks, and no more of it than is needed.

What need not be computed, and what is done instead; each gives the numbers of the whole pass, up to rounding:

- logits at positions or in columns that nobody reads: the unembedding runs at the answer alone, and for a logit
  difference in the two columns that are compared (:func:`run`);
- the tokens that a clean and a corrupt prompt share at their beginning: there all activations are equal, whatever is
  patched, so keys and values are computed once and kept (:class:`Prefix`);
- the blocks below the first one in which anything is patched: the pass starts from the residual stream that is
  already known there (:class:`Start`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens import adapter
from dfa_lens.adapter import HookedModel, HookFunction
from dfa_lens.errors import HookError
from dfa_lens.nodes import NodeSet
from dfa_lens.prompts import PromptPairs

logger = logging.getLogger(__name__)

#: Shorter common beginnings are not worth a pass of their own.
LEAST_SHARED = 4

# Points whose activation has the positions of the running tokens on axis 1, however many came before them.
_BY_TOKEN = {
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "hook_mlp_in",
    "hook_attn_in",
    "hook_q",
    "hook_k",
    "hook_v",
    "hook_z",
    "hook_result",
    "hook_pre",
    "hook_pre_linear",
    "hook_post",
}


def again(activation: Tensor, times: int) -> Tensor:
    """A batch so many times over, one after the other."""
    return activation if times == 1 else activation.repeat(times, *[1] * (activation.ndim - 1))


class Start(NamedTuple):
    """Where a pass begins when the blocks below are not run: the residual stream [batch, pos, d_model] there."""

    layer: int
    residual: Tensor


@dataclass(frozen=True)
class Prefix:
    """The keys and values of every layer at the first ``length`` tokens of some prompts.

    ``keys`` and ``values`` are laid out as the model has them; axis 0 is the batch, ``axis`` that of positions.
    """

    length: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    axis: int

    def repeat(self, times: int) -> Prefix:
        """The same prompts so many times over, one after the other."""
        keys, values = (tuple(again(kept, times) for kept in side) for side in (self.keys, self.values))
        return Prefix(self.length, keys, values, self.axis)

    def arguments(self, model: HookedModel, mask: Int[Tensor, "batch rest"]) -> dict[str, Any]:
        """What makes ``model`` run the rest of the prompts after this."""
        before = mask.new_ones(len(mask), self.length)
        if adapter.is_bridge(model):
            from transformers import DynamicCache

            cache: Any = DynamicCache()  # a new one each time: the run appends to it
            for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
                cache.update(key, value, layer)
            # the cache may not choose the attention mask: all of it is told
            return {"past_key_values": cache, "use_cache": True, "attention_mask": torch.cat([before, mask], 1)}
        cache = _hooked_cache(model, len(mask))
        cache.previous_attention_mask = before
        for entry, key, value in zip(cache.entries, self.keys, self.values, strict=True):
            entry.past_keys, entry.past_values = key, value
        cache.freeze()
        return {"past_kv_cache": cache, "attention_mask": mask}


def _hooked_cache(model: HookedModel, batch: int) -> Any:
    try:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
    except ImportError as error:  # moved: shared_prefix then runs whole prompts
        raise NotImplementedError(str(error)) from None
    return TransformerLensKeyValueCache.init_cache(model.cfg, adapter.device_of(model), batch)


def prefix_of(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], hooks: Sequence[tuple[str, HookFunction]] = ()
) -> Prefix:
    """Run the first tokens of some prompts, under hooks, and keep their keys and values."""
    batch, length = tokens.shape
    tokens = tokens.to(adapter.device_of(model))
    mask = torch.ones_like(tokens)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(adapter.attached(model, hooks))
        stack.enter_context(_short_unembedding(model, torch.zeros(batch, 1).long()))
        if not hooks:  # after the last keys and values nothing is read any more
            stack.enter_context(_replaced(model.blocks[-1].mlp, _skip))  # type: ignore[attr-defined]
        if adapter.is_bridge(model):
            from transformers import DynamicCache

            cache: Any = DynamicCache()
            model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)  # type: ignore[call-arg]
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
            axis = 2
        else:
            cache = _hooked_cache(model, batch)
            model(tokens, attention_mask=mask, past_kv_cache=cache)  # type: ignore[call-arg]
            pairs = [(entry.past_keys, entry.past_values) for entry in cache.entries]
            axis = 1
    return Prefix(length, tuple(key for key, _ in pairs), tuple(value for _, value in pairs), axis)


def shared_length(model: HookedModel, batch: PromptPairs, nodes: NodeSet | None = None, *, switch: bool = True) -> int:
    """How many tokens at the beginning of a batch need to be run only once; 0 where that can't be or does not pay.

    It can't be with nodes that are not indexed by token (attention patterns, nodes that are positions, hook points of
    one's own), nor with a model on which a trial does not give the same logits.
    """
    length = int(batch.shared.min()) if switch else 0
    if length < max(LEAST_SHARED, batch.clean.shape[1] // 8):
        return 0
    sites = nodes.sites if nodes is not None else ()
    by_token = all(not site.by_position and site.point.rsplit(".", 1)[-1] in _BY_TOKEN for site in sites)
    return length if by_token and can_share(model) else 0


def shared_prefix(
    model: HookedModel, batch: PromptPairs, nodes: NodeSet | None = None, *, switch: bool = True
) -> Prefix | None:
    """The common beginning of a batch's clean and corrupt prompts, run once; None where :func:`shared_length` is 0."""
    length = shared_length(model, batch, nodes, switch=switch)
    return prefix_of(model, batch.clean[:, :length]) if length else None


def can_share(model: HookedModel) -> bool:
    """Whether a common beginning may be run once (:class:`Prefix`): a trial must give the same logits.

    Not while somebody else has hooks on the model: they are to see whole prompts.
    """
    return not adapter.is_hooked(model) and _works(model, "prefix")


def can_restart(model: HookedModel) -> bool:
    """Whether a pass may begin at a later block (:class:`Start`): a trial must give the same logits.

    Not while somebody else has hooks on the model: they are to see all blocks.
    """
    return not adapter.is_hooked(model) and _works(model, "start")


_tried: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()


def _works(model: HookedModel, what: Literal["prefix", "start"]) -> bool:
    known = _tried.setdefault(model, {})
    if what not in known:
        try:
            known[what] = _trial(model, what)
        except (HookError, TypeError, ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
            logger.info("%s is not used on this model: %s", what, error)
            known[what] = False
    return known[what]


def _trial(model: HookedModel, what: Literal["prefix", "start"]) -> bool:
    """Run a few tokens in both ways, and compare."""
    tokens = torch.arange(10).reshape(2, 5) % int(model.cfg.d_vocab)
    lengths = torch.tensor([5, 4])
    with torch.no_grad(), adapter.frozen(model):
        if what == "prefix":
            whole = run(model, tokens, lengths)
            short = run(model, tokens, lengths, prefix=prefix_of(model, tokens[:, :2]))
        else:
            last = int(model.cfg.n_layers) - 1
            streams: dict[int, Tensor] = {}
            whole = run(model, tokens, lengths, stream_hooks(streams, [last]))
            short = run(model, tokens, lengths, start=Start(last, streams[last]))
        precision = torch.finfo(next(iter(model.parameters())).dtype).eps
        same = bool((whole - short).abs().max() <= 1e3 * precision * whole.abs().max())
    if not same:
        logger.info("%s is not used on this model: it changes the logits", what)
    return same


def stream_hooks(into: dict[int, Tensor], layers: Sequence[int]) -> list[tuple[str, HookFunction]]:
    """Hooks that keep the residual stream at the beginning of ``layers``, for :class:`Start`."""

    def keep(layer: int) -> HookFunction:
        # no copy: nothing edits an activation in place
        return lambda now: into.__setitem__(layer, now.detach())

    return [(f"blocks.{layer}.hook_resid_pre", keep(layer)) for layer in layers]


@contextmanager
def _replaced(module: Any, function: Any) -> Iterator[None]:
    """Another ``forward`` for one module, for the length of the context."""
    own = vars(module)  # not setattr: a bridge hands that on to the module that it wraps
    before = own.get("forward")  # accelerate puts one there
    own["forward"] = function
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _skip(residual: Tensor, *_: Any, **__: Any) -> Tensor:
    return residual


@contextmanager
def _short_unembedding(model: HookedModel, columns: Int[Tensor, "batch column"] | None) -> Iterator[bool]:
    """Unembed without the copy of the weights that a HookedTransformer makes, or in some columns only.

    Yields whether that can be done: not where somebody looks at the unembedding, or its weights are elsewhere.
    """
    unembed: Any = getattr(model, "unembed", None)
    weight: Any = getattr(unembed, "W_U", None)
    bias: Any = getattr(unembed, "b_U", None)
    points = [getattr(unembed, name, None) for name in ("hook_in", "hook_out")]
    watched = any(point is not None and (point.fwd_hooks or point.bwd_hooks) for point in points)
    watched = watched or bool(getattr(unembed, "_forward_hooks", None))
    if not isinstance(weight, Tensor) or weight.device.type == "meta" or not weight.is_floating_point() or watched:
        yield False
        return

    def short(residual: Float[Tensor, "batch pos d_model"]) -> Tensor:
        if columns is None:
            return torch.nn.functional.linear(residual, weight.T, bias)
        own = columns.to(weight.device)
        logits = torch.einsum("bpd,dbc->bpc", residual, weight[:, own])
        return logits if bias is None else logits + bias[own][:, None]

    with _replaced(unembed, short):
        yield True


def attention_mask(lengths: Int[Tensor, " batch"], n_positions: int, device: torch.device) -> Int[Tensor, "batch pos"]:
    """1 at real tokens, 0 at the padding on the right."""
    return (torch.arange(n_positions, device=device) < lengths.to(device)[:, None]).long()


def run(
    model: HookedModel,
    tokens: Int[Tensor, "batch pos"],
    lengths: Int[Tensor, " batch"],
    hooks: Sequence[tuple[str, HookFunction]] = (),
    *,
    positions: Literal["answer", "all"] = "answer",
    columns: Int[Tensor, "batch column"] | None = None,
    prefix: Prefix | None = None,
    start: Start | None = None,
) -> Float[Tensor, ...]:
    """One forward pass under hooks.

    Parameters
    ----------
    tokens, lengths:
        Right-padded prompts and how many of their tokens are real.
    hooks:
        (hook point, function) pairs.
    positions:
        "answer": logits [batch, vocab] at the last real token, and the unembedding runs there only. "all": logits
        [batch, pos, vocab]; what stands at padding positions means nothing.
    columns:
        Token ids: the logits of these alone, [batch, column].
    prefix:
        The keys and values at the prompts' first tokens: hooks and logits then see the other positions only.
    start:
        Begin at this block with this residual stream; hooks of blocks below can't fire.

    Raises
    ------
    HookError
        If a hook point does not exist, or does not fire exactly once.
    """
    device = adapter.device_of(model)
    skipped = prefix.length if prefix is not None else 0
    tokens = tokens[:, skipped:].to(device)
    lengths = lengths - skipped
    mask = attention_mask(lengths, tokens.shape[1], device)
    arguments = {"attention_mask": mask} if prefix is None else prefix.arguments(model, mask)
    hooks = list(hooks)
    if start is not None:
        # first, so that hooks of the caller at the same point see the stream
        hooks.insert(0, (f"blocks.{start.layer}.hook_resid_pre", lambda now: start.residual.to(now.device)))
    if positions == "answer":
        # The final norm and the unembedding work position by position, so all others can be dropped before them.
        def keep_last(residual: Tensor) -> Tensor:
            last = lengths.to(residual.device) - 1
            index = einops.repeat(last, "batch -> batch 1 d_model", d_model=residual.shape[-1])
            return residual.gather(1, index)

        hooks.append((f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post", keep_last))
    with ExitStack() as stack:
        if start is not None:
            for block in list(model.blocks)[: start.layer]:  # type: ignore[attr-defined]
                stack.enter_context(_replaced(block, _skip))
        short = stack.enter_context(_short_unembedding(model, columns))
        fired = stack.enter_context(adapter.attached(model, hooks))
        logits = model(tokens, **arguments)
    often = [(name, n) for (name, _), n in zip(hooks, fired, strict=True) if n > 1]
    if often:
        raise HookError(f"Hook point {often[0][0]!r} fired {often[0][1]} times in one pass: it can't be a node.")
    if not isinstance(logits, Tensor):
        raise HookError(f"The model returned a {type(logits).__name__} instead of logits.")
    if columns is not None and not short:
        every = columns.to(logits.device)[:, None].expand(-1, logits.shape[1], -1)
        logits = logits.gather(2, every)
    return logits[:, 0] if positions == "answer" else logits


class Layout(NamedTuple):
    """The shape of the activation at a hook point.

    ``shape`` is that for two prompts of two tokens; ``position_axes`` are the axes that grow with the prompt: one for
    most points, the last two of an attention pattern, none after all positions but the answer's have been dropped.
    """

    shape: tuple[int, ...]
    position_axes: tuple[int, ...]


def layout(
    model: HookedModel, names: Sequence[str], *, positions: Literal["answer", "all"] = "answer"
) -> dict[str, Layout]:
    """The layout of the activations at hook points, from two runs on a few tokens.

    Raises
    ------
    HookError
        If a point does not fire, or gives no finite floating-point tensor with a batch axis.
    """
    seen: list[dict[str, tuple[int, ...]]] = []
    for width in (2, 3):
        found: dict[str, tuple[int, ...]] = {}

        def look(name: str, found: dict[str, tuple[int, ...]] = found) -> HookFunction:
            def function(activation: Tensor) -> None:
                if not isinstance(activation, Tensor) or not activation.is_floating_point():
                    kind = activation.dtype if isinstance(activation, Tensor) else type(activation).__name__
                    raise HookError(f"Hook point {name!r} gives {kind}, not an activation that can be gated.")
                if activation.ndim < 2 or activation.shape[0] != 2:
                    raise HookError(f"Hook point {name!r} has shape {list(activation.shape)}: axis 0 is not the batch.")
                if not bool(activation.isfinite().all()):
                    raise HookError(
                        f"Hook point {name!r} holds infinite values (masked attention scores?), which can't be mixed "
                        "with others: use 'attn.hook_pattern'."
                    )
                found[name] = tuple(activation.shape)

            return function

        tokens, lengths = torch.zeros(2, width, dtype=torch.long), torch.full((2,), width)
        with torch.no_grad(), adapter.frozen(model):
            run(model, tokens, lengths, [(name, look(name)) for name in names], positions=positions)
        seen.append(found)
    return {
        name: Layout(seen[0][name], tuple(i for i, n in enumerate(seen[0][name]) if seen[1][name][i] != n))
        for name in names
    }
