"""What one forward pass is given beside tokens and hooks: where it begins, and what is known before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dfa_lens.models.backend import HookFunction, KeysValues


def tile(activation: Tensor, n: int) -> Tensor:
    """A batch repeated n times, one copy after the other: [batch, ...] → [n·batch, ...]."""
    return activation if n == 1 else activation.repeat(n, *[1] * (activation.ndim - 1))


class Start(NamedTuple):
    """Where a pass begins when the blocks below are not run: the residual stream [batch, pos, d_model] there."""

    layer: int
    residual: Tensor


@dataclass(frozen=True)
class Prefix:
    """The keys and values of every layer at the first ``length`` tokens of some prompts."""

    length: int
    kept: KeysValues

    def tile(self, n: int) -> Prefix:
        """The same prompts repeated n times, one copy after the other."""
        keys, values = (tuple(tile(each, n) for each in side) for side in (self.kept.keys, self.kept.values))
        return Prefix(self.length, KeysValues(keys, values, self.kept.axis))


class Layout(NamedTuple):
    """The shape of the activation at a hook point.

    ``shape`` is that for two prompts of two tokens; ``position_axes`` are the axes that grow with the prompt: one for
    most points, the last two of an attention pattern, none after all positions but the answer's have been dropped.
    """

    shape: tuple[int, ...]
    position_axes: tuple[int, ...]

    def values(self, width: int) -> int:
        """How many numbers it has for one prompt of ``width`` tokens."""
        return math.prod(width if axis in self.position_axes else size for axis, size in enumerate(self.shape) if axis)


def stream_hooks(into: dict[int, Tensor], layers: Sequence[int]) -> list[tuple[str, HookFunction]]:
    """Hooks that keep the residual stream at the beginning of ``layers``, for :class:`Start`."""

    def keep(layer: int) -> HookFunction:
        # no copy: nothing edits an activation in place
        return lambda now: into.__setitem__(layer, now.detach())

    return [(f"blocks.{layer}.hook_resid_pre", keep(layer)) for layer in layers]


def attention_mask(lengths: Int[Tensor, " batch"], n_positions: int) -> Int[Tensor, "batch pos"]:
    """1 at real tokens, 0 at the padding on the right; on the device of ``lengths``."""
    return (torch.arange(n_positions, device=lengths.device) < lengths[:, None]).long()
