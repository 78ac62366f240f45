"""Clean and corrupt prompts in one pass, so that every hook sees both runs of a layer, and nothing has to be kept.

A pass over a batch of pairs has the clean prompts in its first half and the corrupt ones in its second. What is
measured of a layer is measured when the layer ends; its activations are then forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import HookError, ModelError
from dfa_lens.models.backend import HookFunction, Norm
from dfa_lens.models.runner import Runner

PATTERN_POINT = "blocks.{layer}.attn.hook_pattern"
#: Rounding errors of the dtype by which logits may differ from what the stream gives, and the least that is asked for.
ROUNDING_ERRORS, LEAST_OFF = 16.0, 1e-3


@dataclass
class Layer:
    """One layer of one batch in both runs, for what measures its nodes. Positions count from the prompt's beginning.

    Attributes
    ----------
    pairs:
        The batch, on the model's device.
    kind:
        What is looked at: the layer's heads, or its MLP block as one node.
    activations:
        Hook point (without "blocks.N.") → activation [clean and corrupt, pos, ...].
    output:
        [head, d_head, d_model] what heads write by; None for the MLP block.
    direction:
        [pair, d_model] what a change of the last residual stream is multiplied with for its effect on
        logit(answer) − logit(wrong), but for the final norm's scale; None where nobody asked for it.
    """

    pairs: PromptPairs
    kind: Literal["head", "mlp"]
    activations: dict[str, Tensor]
    output: Float[Tensor, "head d_head d_model"] | None = None
    direction: Float[Tensor, "pair d_model"] | None = None
    shared: dict[str, Any] = field(default_factory=dict)  #: kept between the measurements of a batch

    @cached_property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.activations["hook_resid_post"].device

    def _halves(self, name: str) -> tuple[Tensor, Tensor]:
        """The activation in the clean and in the corrupt run, in float32 or wider."""
        both = self.activations[name]
        clean, corrupt = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2)
        return clean, corrupt

    def _to(self, values: Tensor) -> Tensor:
        return values.to(self.device)

    @cached_property
    def real(self) -> Bool[Tensor, "pair pos"]:
        """Where the clean prompt has a token."""
        return self._to(torch.arange(self.pairs.clean.shape[1]) < self.pairs.lengths[:, None])

    @cached_property
    def differs(self) -> Bool[Tensor, "pair pos"]:
        """The tokens of the clean prompt that the corrupt one has not."""
        return self._to(self.pairs.clean != self.pairs.corrupt) & self.real

    def _rows(self) -> Tensor:
        return torch.arange(len(self.pairs), device=self.device)

    # --- outputs ---------------------------------------------------------------------------------------------

    @cached_property
    def _node_activations(self) -> tuple[Float[Tensor, "pair pos node width"], Float[Tensor, "pair pos node width"]]:
        if self.kind == "head":
            return self._halves("attn.hook_z")
        clean, corrupt = self._halves("hook_mlp_out")
        return clean[:, :, None], corrupt[:, :, None]

    @cached_property
    def change(self) -> Float[Tensor, "pair pos node width"]:
        """Clean less corrupt activation, position by position."""
        clean, corrupt = self._node_activations
        return clean - corrupt

    @cached_property
    def change_at_answer(self) -> Float[Tensor, "pair node width"]:
        """The same where each prompt is read: at its own last token."""
        clean, corrupt = self._node_activations
        rows = self._rows()
        return clean[rows, self._to(self.pairs.lengths) - 1] - corrupt[rows, self._to(self.pairs.corrupt_lengths) - 1]

    @cached_property
    def output_at_answer(self) -> Float[Tensor, "pair node d_model"]:
        """What nodes add to the residual stream at the last token of the clean prompt; of heads without b_O."""
        clean = self._node_activations[0][self._rows(), self._to(self.pairs.lengths) - 1]
        return clean if self.output is None else torch.einsum("bhe,hem->bhm", clean, self.output.to(clean))

    def norms(self, change: Float[Tensor, "*row node width"]) -> Float[Tensor, "*row node"]:
        """How long the change of what a node adds to the residual stream is.

        Of a head ‖Δz·W_O‖, by its Gram matrix W_O·W_Oᵀ: nothing becomes heads × d_model.
        """
        if self.output is None:
            return change.norm(dim=-1)
        weights = self.output.to(change)
        gram = torch.einsum("hem,hfm->hef", weights, weights)
        return torch.einsum("...he,hef,...hf->...h", change, gram, change).clamp_min(0).sqrt()

    @cached_property
    def stream_norms(self) -> Float[Tensor, "pair pos"]:
        """The length of the clean residual stream behind the layer."""
        return self._halves("hook_resid_post")[0].norm(dim=-1).clamp_min(1e-12)

    @cached_property
    def stream_norm_at_answer(self) -> Float[Tensor, " pair"]:
        """The same at the last token."""
        return self.stream_norms[self._rows(), self._to(self.pairs.lengths) - 1]

    @cached_property
    def direct(self) -> Float[Tensor, "pair node"]:
        """Δ·w⊙(u_answer − u_wrong) at the answer: the direct effect, but for the final norm's scale."""
        assert self.direction is not None
        change = self.change_at_answer
        direction = self.direction.to(change)
        if self.output is None:
            return torch.einsum("bnd,bd->bn", change, direction)
        return torch.einsum("bhe,hem,bm->bh", change, self.output.to(change), direction)

    # --- attention -------------------------------------------------------------------------------------------

    @cached_property
    def pattern(self) -> Float[Tensor, "pair head query key"]:
        """How the heads attend in the clean run."""
        return self._halves("attn.hook_pattern")[0]

    @cached_property
    def corrupt_pattern(self) -> Float[Tensor, "pair head query key"]:
        """How the heads attend in the corrupt run."""
        return self._halves("attn.hook_pattern")[1]

    @cached_property
    def pattern_at_answer(self) -> Float[Tensor, "pair head key"]:
        """How the heads attend from the last token of the clean prompt."""
        return self.pattern[self._rows(), :, self._to(self.pairs.lengths) - 1]

    @cached_property
    def corrupt_pattern_at_answer(self) -> Float[Tensor, "pair head key"]:
        """How the heads attend from the last token of the corrupt prompt."""
        return self.corrupt_pattern[self._rows(), :, self._to(self.pairs.corrupt_lengths) - 1]


class SideBySide:
    """Runs batches of pairs, clean and corrupt together, and looks at one layer after the other.

    Parameters
    ----------
    runner:
        The model.
    patterns, direct:
        Whether attention patterns, and the way through the final norm to the logits, are looked at.

    Raises
    ------
    ModelError
        If the model does not show what is asked for.
    """

    def __init__(self, runner: Runner, *, patterns: bool = True, direct: bool = True) -> None:
        self.runner, self.patterns = runner, patterns
        if getattr(runner.model.cfg, "use_normalization_before_and_after", False) or _norms_behind(runner):
            raise ModelError(
                "On this model a norm stands between what heads compute and the residual stream, so what a head adds "
                "can't be told from the others': it can't be measured yet."
            )
        self._points = ["attn.hook_z", "hook_mlp_out", *(["attn.hook_pattern"] if patterns else []), "hook_resid_post"]
        if patterns:
            self._require_patterns()
        self.norm: Norm | None = None
        if direct:
            try:
                self.norm = runner.backend.final_norm()
                runner.backend.unembedding_columns(torch.zeros(1, dtype=torch.long))
            except (AttributeError, TypeError, IndexError, RuntimeError) as error:
                raise ModelError(
                    f"The way from the residual stream to the logits can't be read ({error}): leave the direct effects "
                    "out, names=[…]."
                ) from error
        self.outputs = [self._output(layer) for layer in range(runner.n_layers)]

    def _require_patterns(self) -> None:
        names = [PATTERN_POINT.format(layer=layer) for layer in range(self.runner.n_layers)]
        try:
            with self.runner.session():
                self.runner.layout(names)
        except HookError as error:
            raise ModelError(
                f"The model shows no attention patterns ({error}). Flash and other fused kernels compute none: load it "
                "with attn_implementation='eager' (dfa.load_model does), or leave what looks at attention out: "
                "names=[…] in measure, patterns=False in inspect."
            ) from error

    def _output(self, layer: int) -> Tensor:
        try:
            weights = self.runner.backend.output_weights(layer)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"What the heads of block {layer} write by can't be read ({error}).") from error
        heads = int(self.runner.model.cfg.n_heads)
        if (
            not weights.is_floating_point()
            or weights.device.type == "meta"
            or weights.ndim != 3
            or len(weights) != heads
        ):
            raise ModelError(
                f"What the heads of block {layer} write by is offloaded or quantised, and is needed as numbers."
            )
        return weights.detach()

    def run(self, pairs: PromptPairs, look: Callable[[int, Layer], None]) -> Float[Tensor, " pair"]:
        """One pass; ``look`` is called with every layer's number and its heads, then its MLP block.

        Returns
        -------
        Tensor
            [pair] what the final norm divides by at the answer of the clean run (1 where direct effects are not looked
            at).

        Raises
        ------
        ModelError
            If the stream, through the final norm, does not give the logits: some other step is in between.
        """
        runner, n = self.runner, len(pairs)
        both = torch.cat([pairs.clean, pairs.corrupt]), torch.cat([pairs.lengths, pairs.corrupt_lengths])
        direction, constant = (None, None) if self.norm is None else self._direction(pairs)
        seen: dict[str, Tensor] = {}
        last: list[Tensor] = []
        shared: dict[str, Any] = {}

        def end(layer: int, stream: Tensor) -> None:
            seen["hook_resid_post"] = stream.detach()
            for kind, output in (("head", self.outputs[layer]), ("mlp", None)):
                look(layer, Layer(pairs, kind, dict(seen), output, direction, shared))  # type: ignore[arg-type]
            seen.clear()
            if layer == runner.n_layers - 1:
                answer = pairs.lengths.to(stream.device) - 1
                last.append(stream[torch.arange(n, device=stream.device), answer].detach())

        def tap(layer: int, name: str) -> tuple[str, HookFunction]:
            def keep(now: Tensor) -> None:
                if name == "hook_resid_post":
                    end(layer, now)
                else:
                    seen[name] = now.detach()

            return f"blocks.{layer}.{name}", keep

        taps = [tap(layer, name) for layer in range(runner.n_layers) for name in self._points]
        columns = torch.stack([pairs.answer, pairs.wrong], 1).repeat(2, 1)
        with torch.no_grad():
            logits = runner.run(*both, taps, columns=columns)
        if self.norm is None or direction is None or constant is None:
            return torch.ones(n, dtype=torch.float32)
        stream = last[0].to(torch.promote_types(last[0].dtype, torch.float32))
        if self.norm.centred:
            stream = stream - stream.mean(-1, keepdim=True)
        scale = (stream.square().mean(-1) + self.norm.eps).sqrt()
        found = (stream * direction.to(stream)).sum(-1) / scale + constant.to(stream)
        self._require_same(found, logits[:n].to(found))
        return scale.cpu()

    def _direction(self, pairs: PromptPairs) -> tuple[Float[Tensor, "pair d_model"], Float[Tensor, " pair"]]:
        """What the normed stream is multiplied with for logit(answer) − logit(wrong), and what is added."""
        assert self.norm is not None
        (answer, first), (wrong, second) = map(self.runner.backend.unembedding_columns, (pairs.answer, pairs.wrong))
        dtype = torch.promote_types(answer.dtype, torch.float32)
        direction = answer.detach().to(dtype) - wrong.detach().to(dtype)
        constant = direction.new_zeros(len(pairs))
        if first is not None and second is not None:
            constant = constant + first.detach().to(dtype) - second.detach().to(dtype)
        if self.norm.bias is not None:
            constant = constant + direction @ self.norm.bias.detach().to(direction)
        if self.norm.weight is not None:
            direction = direction * self.norm.weight.detach().to(direction)
        if self.norm.centred:  # the mean that is taken off a change may as well be taken off its factor
            direction = direction - direction.mean(-1, keepdim=True)
        return direction, constant

    def _require_same(self, found: Float[Tensor, " pair"], logits: Float[Tensor, "pair 2"]) -> None:
        off = float((found - (logits[:, 0] - logits[:, 1])).double().abs().max())
        size = float(logits.double().abs().max())
        most = max(ROUNDING_ERRORS * torch.finfo(self.runner.backend.dtype).eps, LEAST_OFF)
        if off > most * max(size, 1e-30):
            raise ModelError(
                f"The residual stream, through the final norm and the unembedding, does not give this model's logits "
                f"({off:.2g} off, logits up to {size:.2g}): capped or scaled logits, or somebody's hooks. Leave the "
                "direct effects out, names=[…]."
            )


def _norms_behind(runner: Runner) -> bool:
    """Whether a Hugging Face model's blocks have norms behind attention and MLP (Gemma 2, OLMo 2)."""
    first = runner.backend.blocks[0]
    original = getattr(first, "original_component", first)
    return hasattr(original, "post_feedforward_layernorm")
