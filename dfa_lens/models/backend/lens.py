"""TransformerLens's two classes: HookedTransformer (3.x) and TransformerBridge (3.9 and 4.x)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.models import private
from dfa_lens.models.backend.protocol import (
    AddedPoint,
    Backend,
    HookFunction,
    HuggingFaceBackend,
    KeysValues,
    Norm,
)


class LensBackend(Backend):
    """What the two classes share: hook points are modules, which are a part of the model."""

    def module_of(self, point: Any) -> Any:
        """The point itself."""
        return point

    def new_point(self, place: Any, path: str, name: str, at: str) -> AddedPoint:
        """A HookPoint in the module, which a torch hook on the module calls."""
        from transformer_lens.hook_points import HookPoint

        point, full = HookPoint(), f"{path}.{name}"

        def first(value: Any) -> Any:
            return (point(value[0]), *value[1:]) if isinstance(value, tuple) else point(value)

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return first(args), kwargs
            key = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
            return args, kwargs | {key: point(kwargs[key])}

        def behind(_: Any, args: Any, output: Any) -> Any:
            return first(output)

        def put() -> None:
            setattr(place, name, point)
            if at == "output":
                place.register_forward_hook(behind)
            else:
                place.register_forward_pre_hook(before, with_kwargs=True)
            self._register(full, point)

        def attribute() -> None:
            if name in place._modules:
                delattr(place, name)

        function = behind if at == "output" else before
        away = (partial(private.remove_torch_hook, place, function), attribute, partial(self._register, full, None))
        return AddedPoint(point, put, away)

    @abstractmethod
    def _register(self, name: str, point: Any) -> None:
        """Let TransformerLens know of a hook point, or (None) forget it."""

    def norms(self) -> list[tuple[Any, Norm]]:
        """Both classes of models have a hook point in theirs."""
        return [(each, self._norm(each)) for each in self.model.modules() if hasattr(each, "hook_normalized")]

    def final_norm(self) -> Norm:  # noqa: D102
        return self._norm(self.model.ln_final)

    def _norms_of_attention(self, layer: int) -> tuple[Norm | None, Norm | None]:
        block = self.blocks[layer]
        before, behind = getattr(block, "ln1", None), getattr(block, "ln1_post", None)
        if getattr(block, "hook_aliases", {}).get("hook_attn_out") == "ln1.hook_out":  # a bridge's name of the only one
            before, behind = None, before
        return self._norm(before) if before is not None else None, self._norm(behind) if behind is not None else None

    def _output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        return getattr(self.blocks[layer].attn, "b_O", None)

    @abstractmethod
    def _norm(self, module: Any) -> Norm:
        """A norm's numbers; a TypeError or AttributeError if it is none that we know."""


class BridgeBackend(HuggingFaceBackend, LensBackend):
    """TransformerBridge: a Hugging Face model with hook points in it."""

    name = "bridge"

    def processing(self) -> tuple[str, ...]:
        """ "processed" or nothing: a bridge does not say what was done."""
        return ("processed",) if private.weights_processed(self.model) else ()

    def _mlp_reads(self, block: str) -> str:
        aliases = getattr(self.blocks[int(block.rpartition(".")[2])], "hook_aliases", {})
        return str(aliases.get("hook_resid_mid", "ln2.hook_in"))

    def _projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor | None]:
        attention = self.blocks[layer].attn
        return getattr(attention, f"W_{letter.upper()}"), getattr(attention, f"b_{letter.upper()}")

    def _norm(self, module: Any) -> Norm:
        norm = module.original_component
        kind = type(norm).__name__
        if "RMSNorm" not in kind and kind != "LayerNorm":
            raise TypeError(f"there is a norm that is a {kind}")
        weight = norm.weight
        if getattr(module.config, "rmsnorm_uses_offset", False):
            weight = 1.0 + weight
        eps = getattr(norm, "variance_epsilon", None)
        bias = getattr(norm, "bias", None)
        return Norm(weight, bias, float(norm.eps if eps is None else eps), kind == "LayerNorm")

    def unembedding_columns(  # noqa: D102
        self, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"] | None]:
        unembed = self.model.unembed.original_component
        own = tokens.to(unembed.weight.device)
        return unembed.weight[own], None if unembed.bias is None else unembed.bias[own]

    def set_tokenizer(self, tokenizer: Any) -> None:  # noqa: D102
        private.set_tokenizer(self.model, tokenizer)

    def _register(self, name: str, point: Any) -> None:
        private.enter_in_registry(self.model, name, point)

    def _with_cache(self, cache: Any) -> AbstractContextManager[dict[str, Any]]:
        return private.bridge_cache_arguments(self.model, cache)


class HookedBackend(LensBackend):
    """HookedTransformer: TransformerLens's own model."""

    name = "hooked"

    @property
    def unembedding(self) -> tuple[Any, Float[Tensor, "d_model vocab"], Tensor | None] | None:  # noqa: D102
        unembed = getattr(self.model, "unembed", None)
        weight, bias = getattr(unembed, "W_U", None), getattr(unembed, "b_U", None)
        if not isinstance(weight, Tensor) or weight.device.type == "meta" or not weight.is_floating_point():
            return None
        return unembed, weight, bias

    def window(self) -> int | None:  # noqa: D102
        cfg = self.model.cfg
        return getattr(cfg, "window_size", None) if getattr(cfg, "use_local_attn", False) else None

    def refusal(self, name: str) -> str | None:  # noqa: D102
        if ".ln1.hook_" in name:
            return (
                f"On a HookedTransformer {name!r} fires three times a pass (for queries, keys and values), so what is "
                "recorded there is not one activation. Use 'attn.hook_q', 'attn.hook_k', 'attn.hook_v' or "
                "'hook_resid_pre'."
            )
        return None

    def processing(self) -> tuple[str, ...]:
        """ "norm folded", "unembedding centred", "value biases folded": read off the weights themselves."""
        model, found = self.model, []
        if str(getattr(model.cfg, "normalization_type", "")).endswith("Pre"):
            found.append("norm folded")
        with torch.no_grad():
            unembed = getattr(getattr(model, "unembed", None), "W_U", None)
            if unembed is not None and unembed.shape[1] > 1:
                row = unembed[: min(64, len(unembed))].float()  # centred means: every row, so a few rows tell
                if row.mean(1).abs().max() < 1e-5 * row.abs().mean():
                    found.append("unembedding centred")
            attentions = [block.attn for block in getattr(model, "blocks", ())]
            if any(bool(a.b_O.any()) and not bool(a.b_V.any()) for a in attentions if hasattr(a, "b_V")):
                found.append("value biases folded")
        return tuple(found)

    def mlp_input_gradient(self, block: str) -> list[tuple[str, float]]:
        """That of the stream before the MLP less what skips it: it needs no flag."""
        return [(f"{block}.hook_resid_mid", 1.0), (f"{block}.hook_resid_post", -1.0)]

    def shifted_mlp_input(self, block: str, shift: Callable[[Tensor], Tensor]) -> list[tuple[str, HookFunction]]:
        """Into the stream before the MLP, and out of it again behind it."""
        added: list[Tensor] = []

        def forth(now: Tensor) -> Tensor:
            added.append(shift(now))
            return now + added[0]

        return [(f"{block}.hook_resid_mid", forth), (f"{block}.hook_resid_post", lambda now: now - added.pop())]

    def _norm(self, module: Any) -> Norm:
        kind = type(module).__name__
        if kind not in ("RMSNorm", "RMSNormPre", "LayerNorm", "LayerNormPre"):
            raise TypeError(f"there is a norm that is a {kind}")
        weight = None if kind.endswith("Pre") else module.w
        return Norm(weight, getattr(module, "b", None), float(module.eps), kind.startswith("Layer"))

    def unembedding_columns(  # noqa: D102
        self, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"] | None]:
        weight, bias = self.model.unembed.W_U, self.model.unembed.b_U
        own = tokens.to(weight.device)
        return weight.T[own], bias[own]

    def _projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor | None]:
        """Keys and values of grouped heads have their own, unexpanded weights."""
        attention, letter = self.blocks[layer].attn, letter.upper()
        grouped = hasattr(attention, f"_W_{letter}")
        prefix = "_" if grouped else ""
        return getattr(attention, f"{prefix}W_{letter}"), getattr(attention, f"{prefix}b_{letter}")

    def _register(self, name: str, point: Any) -> None:
        private.enter_in_dictionaries(self.model, name, point)

    def set_tokenizer(self, tokenizer: Any) -> None:  # noqa: D102
        self.model.tokenizer = tokenizer

    def run_and_keep(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> KeysValues:  # noqa: D102
        cache = private.hooked_cache(self.model.cfg, self.device, len(tokens))
        self.model(tokens, attention_mask=mask, past_kv_cache=cache)
        pairs = [(entry.past_keys, entry.past_values) for entry in cache.entries]
        return self._checked(pairs, tokens, axis=1)

    def run_after(  # noqa: D102
        self, before: KeysValues, tokens: Int[Tensor, "batch rest"], mask: Int[Tensor, "batch rest"]
    ) -> Float[Tensor, "batch kept logit"]:
        length = before.keys[0].shape[before.axis]
        cache = private.hooked_cache(self.model.cfg, self.device, len(tokens))
        cache.previous_attention_mask = mask.new_ones(len(mask), length)
        for entry, key, value in zip(cache.entries, before.keys, before.values, strict=True):
            entry.past_keys, entry.past_values = key, value
        cache.freeze()
        return self.model(tokens, attention_mask=mask, past_kv_cache=cache)

    def copied_weights(self) -> Iterator[tuple[torch.nn.Parameter, tuple[int, ...]]]:
        """It turns every weight matrix round on every pass (``W.T.contiguous()``; TransformerLens 3.9)."""
        for block in getattr(self.model, "blocks", ()):
            attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
            wanted: list[tuple[Any, str, tuple[int, ...]]]
            wanted = [(attention, name, (0, 2, 1)) for name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V")]
            wanted.append((attention, "W_O", (2, 0, 1)))
            if hasattr(mlp, "W_gate"):
                wanted += [(mlp, name, (1, 0)) for name in ("W_gate", "W_in", "W_out")]
            for module, name, order in wanted:
                parameter = getattr(module, "_parameters", {}).get(name)
                if parameter is not None and parameter.is_floating_point() and parameter.ndim == len(order):
                    yield parameter, order
