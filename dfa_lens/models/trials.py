"""Trials of short cuts: two prompts run the plain way and the short way, and every activation compared.

A verdict holds for one model in one setting (dtype, devices, flags, modules) and for prompts of about one length. It
is found when it is first needed and kept until something that it depends on has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.errors import DfaError
from dfa_lens.models import private
from dfa_lens.models.backend import Backend, HookFunction
from dfa_lens.models.passes import Prefix, Start

ShortCut = Literal["answer", "unembedding", "prefix", "start"]
"""What need not be computed, see :mod:`~dfa_lens.models.runner`."""

#: What a trial may differ by from the plain pass, as a part of the spread (standard deviation) of the plain values:
#: so many rounding errors of the dtype, and never more than a few per cent.
ROUNDING_ERRORS, MOST_OFF = 2000.0, 0.03
#: Trials are run on prompts of up to so many tokens, on longer ones only where attention has a shorter window.
LONGEST = 128


class Verdict(NamedTuple):
    """What a trial found."""

    holds: bool
    detail: str = ""  #: why not; for "answer", the hook point at which positions are dropped
    unexpected: bool = True  #: whether a refusal is worth a warning


@runtime_checkable
class Passes(Protocol):
    """What a trial needs of a :class:`~dfa_lens.models.runner.Runner`."""

    backend: Backend
    state: Any

    @property
    def n_layers(self) -> int:
        """Number of blocks."""

    @property
    def d_vocab(self) -> int:
        """Number of logits."""

    @property
    def n_ctx(self) -> int | None:
        """The longest prompt."""

    @property
    def run_as_told(self) -> Callable[..., Tensor]:
        """A pass with the short cuts that are named, tried or not."""

    def prefix_of(self, tokens: Tensor) -> Prefix:
        """The keys and values at the first tokens."""


class _DiffersError(Exception):
    """A short cut changes what the model computes."""


class Plain(NamedTuple):
    """Two prompts, the second one token shorter, and what a plain pass gives."""

    tokens: Int[Tensor, "2 pos"]
    lengths: Int[Tensor, "2"]
    streams: dict[str, Float[Tensor, "2 pos d_model"]]  #: behind every block
    logits: Float[Tensor, "2 pos vocab"]


def remembered(runner: Passes, what: ShortCut | Literal["causal", "structure"], width: int) -> Verdict:
    """The verdict on prompts of about ``width`` tokens in the running session's setting, found if need be."""
    state, size = runner.state, _size(runner, width)
    key = (what, size, state.setting)
    if key not in state.verdicts:
        state.verdicts[key] = _find(runner, _TRIALS[what], size)
    return state.verdicts[key]


def _size(runner: Passes, width: int) -> int:
    """How long the trial's prompts are: a power of two, so that few trials are needed."""
    window = runner.backend.window()
    longest = LONGEST if window is None or window >= width else max(LONGEST, window + 16)
    size = min(1 << max(width - 1, 7).bit_length(), longest)
    return size if runner.n_ctx is None else min(size, int(runner.n_ctx))


def _find(runner: Passes, trial: Callable[[Passes, Plain], Verdict], size: int) -> Verdict:
    try:
        with torch.no_grad():
            if size not in runner.state.plain:
                runner.state.plain[size] = _run_plain(runner, size)
            plain = runner.state.plain[size]
            if not bool(plain.logits.isfinite().all()):  # whoever reads such logits says so
                return Verdict(False, "its logits are not finite", unexpected=False)
            return trial(runner, plain)
    except RuntimeError as error:
        if private.out_of_memory(error):
            raise
        return Verdict(False, _reason(error))
    except (_DiffersError, DfaError, TypeError, ValueError, NotImplementedError, AttributeError, LookupError) as error:
        return Verdict(False, _reason(error))


def _reason(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return text[:200] if text else type(error).__name__


def _run_plain(runner: Passes, size: int) -> Plain:
    # scattered over the vocabulary, the same everywhere
    tokens = (torch.arange(2 * size).reshape(2, size) * 7919 + 13) % runner.d_vocab
    lengths = torch.tensor([size, max(size - 1, 1)])
    streams: dict[str, Tensor] = {}
    logits = runner.run_as_told(tokens, lengths, _keep(runner, streams))
    return Plain(tokens, lengths, streams, logits)


def _keep(runner: Passes, into: dict[str, Tensor], layers: range | None = None) -> list[tuple[str, HookFunction]]:
    """Hooks that keep the residual stream behind blocks."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in (layers or range(runner.n_layers))]

    def keep(name: str) -> HookFunction:
        return lambda now: into.__setitem__(name, now.detach())

    return [(name, keep(name)) for name in names]


def _compare(what: str, found: Tensor, plain: Tensor, lengths: Tensor) -> None:
    """Raise unless two tensors [prompt, pos, ...] are the same at real tokens, but for rounding."""
    real = torch.arange(plain.shape[1], device=plain.device) < lengths.to(plain.device)[:, None]
    a, b = found.to(plain.device).double()[real], plain.double()[real]
    off = (a - b).square().flatten(1).mean(1).sqrt().max() / b.std().clamp_min(1e-30)
    # a bridge computes norms in float32 whatever the weights are
    precision = max(torch.finfo(plain.dtype).eps, torch.finfo(torch.float32).eps)
    most = min(ROUNDING_ERRORS * precision, MOST_OFF)
    if not float(off) <= most:  # NaN is not
        raise _DiffersError(f"it changes the {what} by {float(off):.2g} of their spread")


def _compare_all(found: dict[str, Tensor], logits: Tensor, plain: Plain, first: int = 0) -> None:
    lengths = plain.lengths - first
    for name, stream in found.items():
        _compare(f"activations at {name}", stream, plain.streams[name][:, first:], lengths)
    _compare("logits", logits, plain.logits[:, first:], lengths)


def _try_answer(runner: Passes, plain: Plain) -> Verdict:
    """Positions are dropped behind the last block or, where the model counts them there, before the unembedding."""
    points = (f"blocks.{runner.n_layers - 1}.hook_resid_post", "unembed.hook_in")
    reason = ""
    last = plain.lengths - 1
    rows = torch.arange(2, device=plain.logits.device)
    wanted = plain.logits[rows, last.to(plain.logits.device)][:, None]
    for point in points:
        try:
            found = runner.run_as_told(plain.tokens, plain.lengths, positions="answer", drop_at=point)
            _compare("logits", found[:, None], wanted, torch.ones(2))
            return Verdict(True, point)
        except (RuntimeError, DfaError, _DiffersError) as error:
            if private.out_of_memory(error):
                raise
            reason = _reason(error)
    return Verdict(False, reason)


def _try_unembedding(runner: Passes, plain: Plain) -> Verdict:
    if runner.backend.unembedding is None:
        return Verdict(False, "its unembedding is a part of the model", unexpected=False)
    found = runner.run_as_told(plain.tokens, plain.lengths, short_unembedding=True)
    _compare("logits", found, plain.logits, plain.lengths)
    columns = torch.tensor([[0, runner.d_vocab - 1], [runner.d_vocab // 2, 0]])
    found = runner.run_as_told(plain.tokens, plain.lengths, columns=columns, short_unembedding=True)
    every = columns.to(plain.logits.device)[:, None].expand(-1, plain.logits.shape[1], -1)
    # in the spread of all logits: two columns alone may have next to none
    short, wanted = (torch.cat([each, plain.logits], 2) for each in (found, plain.logits.gather(2, every)))
    _compare("logits of two columns", short, wanted, plain.lengths)
    return Verdict(True)


def _try_prefix(runner: Passes, plain: Plain) -> Verdict:
    if not remembered(runner, "causal", plain.tokens.shape[1]).holds:
        return Verdict(False, "its tokens attend to later ones", unexpected=False)
    length = max(plain.tokens.shape[1] // 2, 1)
    prefix = runner.prefix_of(plain.tokens[:, :length])
    found: dict[str, Tensor] = {}
    logits = runner.run_as_told(plain.tokens, plain.lengths, _keep(runner, found), prefix=prefix)
    _compare_all(found, logits, plain, length)
    return Verdict(True)


def _try_start(runner: Passes, plain: Plain) -> Verdict:
    for layer in sorted({1, runner.n_layers - 1}):
        if layer < 1 or layer >= runner.n_layers:
            continue
        found: dict[str, Tensor] = {}
        taps = _keep(runner, found, range(layer, runner.n_layers))
        start = Start(layer, plain.streams[f"blocks.{layer - 1}.hook_resid_post"])
        _compare_all(found, runner.run_as_told(plain.tokens, plain.lengths, taps, start=start), plain)
    return Verdict(True)


def _try_causal(runner: Passes, plain: Plain) -> Verdict:
    """Other tokens in the second half must leave the first half as it is."""
    half = plain.tokens.shape[1] // 2
    other = plain.tokens.clone()
    other[:, half:] = (other[:, half:] + 1) % runner.d_vocab
    found: dict[str, Tensor] = {}
    runner.run_as_told(other, plain.lengths, _keep(runner, found))
    for name, stream in found.items():
        _compare(f"activations at {name}", stream, plain.streams[name], torch.full((2,), half))
    return Verdict(True)


def _try_structure(runner: Passes, plain: Plain) -> Verdict:
    """With heads and MLPs at zero every block must add the same to every prompt: nothing else may go through it."""
    layers = range(runner.n_layers)
    taps: list[tuple[str, HookFunction]] = []
    streams: dict[str, Tensor] = {}

    def keep(name: str) -> HookFunction:
        return lambda now: streams.__setitem__(name, now.detach())

    for layer in layers:
        block = f"blocks.{layer}"
        outputs = [f"{block}.attn.hook_z"] + [f"{block}.hook_mlp_out"] * (runner.backend.mlp(layer) is not None)
        taps += [(name, keep(name)) for name in (f"{block}.hook_resid_pre", f"{block}.hook_resid_post")]
        taps += [(name, torch.zeros_like) for name in outputs]
    runner.run_as_told(plain.tokens, plain.lengths, taps)
    for layer in layers:
        before, behind = (streams[f"blocks.{layer}.hook_resid_{end}"] for end in ("pre", "post"))
        added = behind - before
        constant = added[:1, :1].expand_as(added)
        # in the spread of the stream
        _compare(f"stream behind block {layer} by more than its nodes", before + constant, behind, plain.lengths)
    return Verdict(True)


_TRIALS: dict[str, Callable[[Passes, Plain], Verdict]] = {
    "answer": _try_answer,
    "unembedding": _try_unembedding,
    "prefix": _try_prefix,
    "start": _try_start,
    "causal": _try_causal,
    "structure": _try_structure,
}
