"""Other rules for the way back: what a model computes stays as it is, and its gradient is another one.

The rules of layer-wise relevance propagation, written as changes of the gradient: a norm's scale taken for a constant,
a nonlinearity for the line through zero and its value, a product's gradient shared by its two factors. They are hooks
on queries, keys, values and neurons, and for the norms a forward that hands on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dfa_lens.errors import HookError, ModelError
from dfa_lens.models import private
from dfa_lens.models.backend import HookFunction, Norm
from dfa_lens.models.runner import Runner

Taps = list[tuple[str, HookFunction]]


class RuleTaps(NamedTuple):
    """Hooks that go before and after those of the nodes, where both are on one hook point.

    What replaces an activation's way back goes first, so that a node there still has a gradient. What cuts or scales
    the way back goes last, so that the node is seen as it is.
    """

    first: Taps
    last: Taps


@dataclass(frozen=True)
class Rules:
    """Rules for the gradient; as it stands, none.

    Attributes
    ----------
    frozen_norms:
        What a norm divides by is a constant.
    attention:
        "exact"; "frozen": attention patterns are constants, nothing goes back through queries and keys; "halved": each
        of the two products, of queries with keys and of patterns with values, shares its gradient among its factors: a
        quarter for queries and keys, a half for values.
    temperature:
        The softmax of attention has the gradient that it would have at this temperature.
    secant:
        A nonlinearity f has the slope f(x)/x instead of f'(x).
    halved_gates:
        The product in a gated MLP shares its gradient among its two factors.

    Examples
    --------
    >>> from dfa_lens.models.gradient_rules import Rules
    >>> Rules(frozen_norms=True) == Rules(), Rules().changes
    (False, False)
    """

    frozen_norms: bool = False
    attention: Literal["exact", "frozen", "halved"] = "exact"
    temperature: float = 1.0
    secant: bool = False
    halved_gates: bool = False

    @property
    def changes(self) -> bool:
        """Whether there is any."""
        return self != Rules()

    def taps(self, runner: Runner) -> RuleTaps:
        """The hooks for one pass.

        Raises
        ------
        ModelError
            If the model does not show what a rule is about: which, and what to do.
        """
        found = RuleTaps([], [])
        for layer in range(runner.n_layers):
            block = f"blocks.{layer}"
            self._attention(f"{block}.attn", found)
            if runner.backend.mlp(layer) is not None and (self.secant or self.halved_gates):
                self._mlp(runner, f"{block}.mlp", layer, found)
        try:
            runner.points([point for point, _ in (*found.first, *found.last)])
        except HookError as error:
            raise ModelError(
                f"The rules for the gradient need a hook point that this model does not have: {error} Attention scores "
                "are shown by TransformerLens's models alone (backend='bridge'); queries, keys, values and neurons not "
                "by mixtures of experts."
            ) from error
        return found

    def _attention(self, attention: str, found: RuleTaps) -> None:
        if self.attention == "frozen":
            found.last.extend((f"{attention}.hook_{letter}", torch.Tensor.detach) for letter in "qk")
        elif self.attention == "halved":
            for letter, part in (("q", 0.25), ("k", 0.25), ("v", 0.5)):
                found.last.append((f"{attention}.hook_{letter}", partial(_scaled, part)))
        if self.temperature != 1.0:
            softmax = _Softmax(self.temperature)
            found.last.append((f"{attention}.hook_attn_scores", softmax.keep))
            found.first.append((f"{attention}.hook_pattern", softmax.hand_on))

    def _mlp(self, runner: Runner, mlp: str, layer: int, found: RuleTaps) -> None:
        gated = runner.has_point(f"{mlp}.hook_pre_linear")
        if runner.backend.mixes_experts(layer) or not (self.secant or runner.has_point(f"{mlp}.hook_pre")):
            raise ModelError(
                f"The MLP of block {layer} does not show what its neurons are made of, as in a mixture of experts: "
                "whether a product in it has to share its gradient is not known."
            )
        added = getattr(runner.backend.mlp(layer), "_parameters", {}).get("b_in")
        if gated and added is not None and bool(added.any()):  # a HookedTransformer's, behind the product
            raise ModelError(f"The gated MLP of block {layer} adds a bias to its product: no rule is known for it.")
        if self.secant:
            product = _Product(gated, 0.5 if gated and self.halved_gates else 1.0)
            found.last.append((f"{mlp}.hook_pre", product.keep_gate))
            if gated:
                found.last.append((f"{mlp}.hook_pre_linear", product.keep_other))
            found.first.append((f"{mlp}.hook_post", product.hand_on))
        elif gated:
            for name in ("hook_pre", "hook_pre_linear"):
                found.last.append((f"{mlp}.{name}", partial(_scaled, 0.5)))

    @contextmanager
    def norms(self, runner: Runner) -> Iterator[None]:
        """Norms whose scale is a constant for the gradient, for passes inside the context.

        Raises
        ------
        ModelError
            If a norm is of a kind that is not known.
        """
        if not self.frozen_norms:
            yield
            return
        try:
            norms = runner.backend.norms()
        except (AttributeError, TypeError) as error:
            raise ModelError(f"The norms of this model can't be frozen: {error}.") from error
        with ExitStack() as stack:
            for module, norm in norms:
                stack.enter_context(private.replaced_forward(module, _frozen(module, norm)))
            yield


def _frozen(module: Any, norm: Norm) -> Callable[..., Tensor]:
    """A norm's forward whose values are the same, and whose gradient takes the scale for a constant.

    What goes back through the scale is taken off again: the forward keeps its own way back, for there may be nodes in
    it (the MLP's output, where a norm is behind it). A bridge's norm has a hook point at its beginning, which is to
    see the gradient without that, too.
    """
    forward, point = module.forward, getattr(module, "hook_in", None)

    def function(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read = [stream]
        handle = None if point is None else point.register_forward_hook(lambda *seen: read.append(seen[-1]))
        try:
            values = forward(stream, *args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
        stream = read[-1]
        if not (torch.is_grad_enabled() and stream.requires_grad):
            return values
        wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True) if norm.centred else wide
        inverse = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        through_scale = centred.detach() * inverse
        if norm.weight is not None:
            through_scale = through_scale * norm.weight.to(through_scale)
        return values - (through_scale - through_scale.detach()).to(values.dtype)

    return function


def _with_gradient_of(values: Tensor, line: Tensor) -> Tensor:
    """These values, with the gradient of ``line``; exact also where that is wider."""
    return values.detach() + (line - line.detach()).to(values.dtype)


def _scaled(part: float, now: Tensor) -> Tensor:
    """The same values, and a part of the gradient."""
    if not now.requires_grad:
        return now
    now = now.view_as(now)  # a view of our own: what else uses the tensor keeps its gradient
    now.register_hook(lambda gradient: part * gradient)
    return now


class _Product:
    """Neurons, f(gate)·other or f(gate): the slopes are those of lines through zero, and each factor's its share."""

    def __init__(self, gated: bool, share: float) -> None:
        self.gated, self.share = gated, share
        self.factors: list[Tensor] = []

    def keep_gate(self, now: Tensor) -> None:
        self.factors = [now]

    def keep_other(self, now: Tensor) -> None:
        self.factors.append(now)

    def hand_on(self, now: Tensor) -> Tensor:
        factors, self.factors = self.factors, []
        if not torch.is_grad_enabled():
            return now
        values = now.detach()
        line = torch.zeros_like(values)
        for factor in factors:
            own = factor.reshape(values.shape)
            known = own.detach()
            slope = torch.where(known == 0, torch.zeros_like(values), values / known)
            line = line + self.share * slope * own
        return _with_gradient_of(values, line)


class _Softmax:
    """An attention pattern whose gradient goes back to the scores as if they had been divided by a temperature."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def keep(self, now: Tensor) -> Tensor:
        self.scores = now.view_as(now)  # the model's own softmax goes back to it, too, but nothing goes back there
        return self.scores

    def hand_on(self, now: Tensor) -> Tensor:
        scores = self.scores
        del self.scores
        return _Tempered.apply(now.detach(), scores, self.temperature) if torch.is_grad_enabled() else now


class _Tempered(torch.autograd.Function):
    """(pattern, scores) → pattern; backward J(softmax(scores/T))ᵀ·gradient for the scores."""

    @staticmethod
    def forward(ctx: Any, pattern: Tensor, scores: Tensor, temperature: float) -> Tensor:
        # softmax(x/T) is softmax(x)^(1/T), normed: so masks that come after the scores are in it
        soft = pattern.float().pow(1 / temperature)
        ctx.save_for_backward(soft / soft.sum(-1, keepdim=True).clamp_min(1e-30))
        ctx.dtype = scores.dtype
        return pattern.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (soft,) = ctx.saved_tensors
        gradient = gradients[0].to(soft.dtype)
        found = soft * (gradient - (gradient * soft).sum(-1, keepdim=True))
        return None, found.to(ctx.dtype), None
