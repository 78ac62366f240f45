"""What dfa_lens needs of a model, and how the classes of TransformerLens that have it differ.

One code path serves HookedTransformer (TransformerLens 3.x) and TransformerBridge (3.9 and 4.x): hook points are
taken from ``hook_dict``, hooks are closures put on the hook points themselves, and padding is always masked. What
differs is a method of :class:`HookedBackend` or :class:`BridgeBackend`, and nowhere else.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.errors import ModelError
from dfa_lens.models import kept, private

HookFunction = Callable[[Tensor], "Tensor | None"]
"""Takes an activation; returns its replacement, or None to leave it as it is."""

Function = TypeVar("Function", bound=Callable[..., Any])

_USE_ONE = "pass a TransformerLens HookedTransformer or TransformerBridge (dfa.load_model makes either)"


@runtime_checkable
class HookedModel(Protocol):
    """What dfa_lens needs of a model: a HookedTransformer and a TransformerBridge both have it."""

    cfg: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook point name → HookPoint."""

    def __call__(self, tokens: Tensor, /, *, attention_mask: Tensor) -> Any:
        """Logits [batch, pos, vocab]."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights."""


class KeysValues(NamedTuple):
    """The keys and values of every layer, laid out as the model has them; axis 0 is the batch."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    axis: int  #: that of positions


class AttentionWeights(NamedTuple):
    """What the heads of a layer read the residual stream by, and write to it by.

    ``norm`` is the weight of the norm before them, None where it is folded into the projections. ``projections`` has
    for "q", "k" and "v" the matrix [head, d_model, d_head] and the bias [head, d_head] or None; keys and values have
    the model's key-value heads. ``output`` is [head, d_head, d_model].
    """

    norm: Float[Tensor, " d_model"] | None
    eps: float
    projections: Mapping[str, tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"] | None]]
    output: Float[Tensor, "head d_head d_model"]


class FinalNorm(NamedTuple):
    """The norm before the unembedding: w⊙(x − mean)/scale + b, without the mean in an RMS norm.

    ``weight`` and ``bias`` are None where there is none, or it is folded into the unembedding.
    """

    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float
    centred: bool


class Backend(ABC):
    """One class of models of TransformerLens."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @staticmethod
    def of(model: Any) -> Backend:
        """The backend of a model, which has passed :func:`usable`."""
        return BridgeBackend(model) if is_bridge(model) else HookedBackend(model)

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens; of a model whose weights are offloaded, where they are brought to."""
        device = next(iter(self.model.parameters())).device
        if device.type == "meta":
            return private.execution_device(self.model) or device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return next(iter(self.model.parameters())).dtype

    @property
    def unembedding(self) -> tuple[Any, Float[Tensor, "d_model vocab"], Tensor | None] | None:
        """The module that unembeds, its matrix and its bias, where the matrix can be used without the module."""
        return None

    def window(self) -> int | None:
        """How far back attention looks in the layers that do not look back all the way, or None."""
        return None

    @abstractmethod
    def refusal(self, name: str) -> str | None:
        """Why an edit at this hook point would not do what its name says, or None."""

    @abstractmethod
    def processing(self) -> tuple[str, ...]:
        """What was done to the weights on loading."""

    @abstractmethod
    def mlp_input_gradient(self, block: str) -> list[tuple[str, float]]:
        """The hook points whose gradients, with these signs, add up to the gradient at the MLP's input."""

    @abstractmethod
    def shifted_mlp_input(self, block: str, shift: Callable[[Tensor], Tensor]) -> list[tuple[str, HookFunction]]:
        """Hooks that add ``shift(x)`` to the stream x [batch, pos, d_model] that the MLP reads, and to nothing else."""

    def attention_weights(self, layer: int) -> AttentionWeights:
        """The weights between the residual stream and the heads of a layer.

        Raises
        ------
        ModelError
            If they can't be read, or the norm before them is no RMS norm.
        """
        block = self.model.blocks[layer]
        try:
            norm, eps = self._rms_norm(block)
            attention = block.attn
            letters = {letter: self._projection(attention, letter.upper()) for letter in "qkv"}
            weights = AttentionWeights(norm, eps, letters, attention.W_O)
            tensors = [weights.output, *(matrix for matrix, _ in letters.values())]
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"The attention weights of block {layer} can't be read ({error}).") from error
        if any(each.device.type == "meta" or not each.is_floating_point() or each.ndim != 3 for each in tensors):
            raise ModelError(
                f"The attention weights of block {layer} are offloaded or quantised, and edges need them as numbers."
            )
        return weights

    @abstractmethod
    def final_norm(self) -> FinalNorm:
        """The norm before the unembedding; a TypeError or AttributeError if it is none that we know."""

    @abstractmethod
    def unembedding_columns(
        self, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"] | None]:
        """What the normed stream is multiplied with for the logits of some tokens, and what is added."""

    @abstractmethod
    def _rms_norm(self, block: Any) -> tuple[Tensor | None, float]:
        """Weight (None: folded) and epsilon of the norm before a block's attention; a TypeError if it is another."""

    @abstractmethod
    def _projection(self, attention: Any, letter: str) -> tuple[Tensor, Tensor | None]:
        """Matrix and bias of "Q", "K" or "V", of the heads that there are."""

    @abstractmethod
    def register(self, name: str, point: Any) -> None:
        """Let TransformerLens know of a hook point, or (None) forget it."""

    @abstractmethod
    def set_tokenizer(self, tokenizer: Any) -> None:
        """Give the model a tokenizer as it is."""

    @abstractmethod
    def run_and_keep(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> KeysValues:
        """Run the model and hand back the keys and values of its attention."""

    @abstractmethod
    def run_after(
        self, before: KeysValues, tokens: Int[Tensor, "batch rest"], mask: Int[Tensor, "batch rest"]
    ) -> Float[Tensor, "batch kept logit"]:
        """Run the model on what comes after tokens whose keys and values are known."""

    def copied_weights(self) -> Iterator[tuple[torch.nn.Parameter, tuple[int, ...]]]:
        """The weights that the model copies on every pass, and the order of axes in which it reads them."""
        return iter(())


class BridgeBackend(Backend):
    """TransformerBridge: a Hugging Face model with hook points in it."""

    def refusal(self, name: str) -> str | None:  # noqa: D102
        if name.endswith("hook_resid_mid"):
            return (
                f"On a TransformerBridge {name!r} is the input of the second norm only: a change there misses the skip "
                "path. Use 'hook_attn_out' or 'hook_resid_pre' of the same layer."
            )
        return None

    def window(self) -> int | None:  # noqa: D102
        config = getattr(getattr(self.model, "original_model", None), "config", None)
        names = ("sliding_window", "attention_chunk_size", "window_size")
        sizes = (getattr(config, name, None) for name in names)
        return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)

    def processing(self) -> tuple[str, ...]:
        """ "processed" or nothing: a bridge does not say what was done."""
        return ("processed",) if private.weights_processed(self.model) else ()

    def mlp_input_gradient(self, block: str) -> list[tuple[str, float]]:  # noqa: D102
        return [(f"{block}.ln2.hook_in", 1.0)]

    def shifted_mlp_input(self, block: str, shift: Callable[[Tensor], Tensor]) -> list[tuple[str, HookFunction]]:
        """At the second norm's input, which the skip path does not go through."""
        return [(f"{block}.ln2.hook_in", lambda now: now + shift(now))]

    def _rms_norm(self, block: Any) -> tuple[Tensor | None, float]:
        norm = block.ln1.original_component
        if "RMSNorm" not in type(norm).__name__:
            raise TypeError(f"the norm before them is a {type(norm).__name__}, no RMS norm")
        eps = getattr(norm, "variance_epsilon", None)
        weight = norm.weight
        if getattr(block.ln1.config, "rmsnorm_uses_offset", False):
            weight = 1.0 + weight
        return weight, float(norm.eps if eps is None else eps)

    def _projection(self, attention: Any, letter: str) -> tuple[Tensor, Tensor | None]:
        return getattr(attention, f"W_{letter}"), getattr(attention, f"b_{letter}")

    def final_norm(self) -> FinalNorm:  # noqa: D102
        norm = self.model.ln_final.original_component
        kind = type(norm).__name__
        if "RMSNorm" not in kind and kind != "LayerNorm":
            raise TypeError(f"the final norm is a {kind}")
        weight = norm.weight
        if getattr(self.model.ln_final.config, "rmsnorm_uses_offset", False):
            weight = 1.0 + weight
        eps = getattr(norm, "variance_epsilon", None)
        bias = getattr(norm, "bias", None)
        return FinalNorm(weight, bias, float(norm.eps if eps is None else eps), kind == "LayerNorm")

    def unembedding_columns(  # noqa: D102
        self, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"] | None]:
        unembed = self.model.unembed.original_component
        own = tokens.to(unembed.weight.device)
        return unembed.weight[own], None if unembed.bias is None else unembed.bias[own]

    def register(self, name: str, point: Any) -> None:  # noqa: D102
        private.enter_in_registry(self.model, name, point)

    def set_tokenizer(self, tokenizer: Any) -> None:  # noqa: D102
        private.set_tokenizer(self.model, tokenizer)

    def run_and_keep(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> KeysValues:  # noqa: D102
        cache = private.bridge_cache()
        with private.bridge_cache_arguments(self.model, cache) as arguments:
            self.model(tokens, attention_mask=mask, **arguments)
        return _checked(private.cached_layers(cache), self.model, tokens, axis=2)

    def run_after(  # noqa: D102
        self, before: KeysValues, tokens: Int[Tensor, "batch rest"], mask: Int[Tensor, "batch rest"]
    ) -> Float[Tensor, "batch kept logit"]:
        length = before.keys[0].shape[before.axis]
        # a new cache each time: the run appends to it
        cache = private.bridge_cache(list(zip(before.keys, before.values, strict=True)))
        # all of the mask is told: the cache may not choose it
        whole = torch.cat([mask.new_ones(len(mask), length), mask], 1)
        with private.bridge_cache_arguments(self.model, cache) as arguments:
            return self.model(tokens, attention_mask=whole, **arguments)


class HookedBackend(Backend):
    """HookedTransformer: TransformerLens's own model."""

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

    def _rms_norm(self, block: Any) -> tuple[Tensor | None, float]:
        name = type(block.ln1).__name__
        if name not in ("RMSNorm", "RMSNormPre"):
            raise TypeError(f"the norm before them is a {name}, no RMS norm")
        return (block.ln1.w if name == "RMSNorm" else None), float(block.ln1.eps)

    def final_norm(self) -> FinalNorm:  # noqa: D102
        norm = self.model.ln_final
        kind = type(norm).__name__
        if kind not in ("RMSNorm", "RMSNormPre", "LayerNorm", "LayerNormPre"):
            raise TypeError(f"the final norm is a {kind}")
        weight = None if kind.endswith("Pre") else norm.w
        bias = getattr(norm, "b", None)
        return FinalNorm(weight, bias, float(norm.eps), kind.startswith("Layer"))

    def unembedding_columns(  # noqa: D102
        self, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"] | None]:
        weight, bias = self.model.unembed.W_U, self.model.unembed.b_U
        own = tokens.to(weight.device)
        return weight.T[own], bias[own]

    def _projection(self, attention: Any, letter: str) -> tuple[Tensor, Tensor | None]:
        """Keys and values of grouped heads have their own, unexpanded weights."""
        grouped = hasattr(attention, f"_W_{letter}")
        prefix = "_" if grouped else ""
        return getattr(attention, f"{prefix}W_{letter}"), getattr(attention, f"{prefix}b_{letter}")

    def register(self, name: str, point: Any) -> None:  # noqa: D102
        self.model.setup()

    def set_tokenizer(self, tokenizer: Any) -> None:  # noqa: D102
        self.model.tokenizer = tokenizer

    def run_and_keep(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> KeysValues:  # noqa: D102
        cache = private.hooked_cache(self.model.cfg, self.device, len(tokens))
        self.model(tokens, attention_mask=mask, past_kv_cache=cache)
        pairs = [(entry.past_keys, entry.past_values) for entry in cache.entries]
        return _checked(pairs, self.model, tokens, axis=1)

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


def _checked(layers: list[tuple[Tensor, Tensor]], model: Any, tokens: Tensor, axis: int) -> KeysValues:
    private.check_cache(layers, int(model.cfg.n_layers), tokens.shape[1], axis)
    return KeysValues(tuple(key for key, _ in layers), tuple(value for _, value in layers), axis)


def is_bridge(model: Any) -> bool:
    """Whether the model is a TransformerBridge (told by its class name: no TransformerLens import needed)."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)


def usable(model: Any) -> Any:
    """The model itself, or the one inside a ``torch.compile``; refuses what can't be run, before anything is.

    A compiled model is run as it was before: its graph knows nothing of hooks.

    Raises
    ------
    ModelError
        If it is no HookedTransformer or TransformerBridge, one without weights or with weights that were made in
        inference mode, an encoder, or compiled in place.
    """
    if type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    kind = type(model).__name__
    if model is None or isinstance(model, str):
        raise ModelError(f"A model is needed, not {model!r}: {_USE_ONE}.")
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        raise ModelError(f"A {kind} can't be hooked as one model: pass the model inside it, model.module.")
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "hook_dict") or not hasattr(model, "cfg"):
        hint = ""
        if hasattr(model, "config") and hasattr(model, "generate"):
            hint = "; TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=…) wraps this one"
        raise ModelError(f"A {kind} can't be hooked: {_USE_ONE}{hint}.")
    if not isinstance(getattr(model, "blocks", None), torch.nn.ModuleList) or _encodes(model):
        raise ModelError(f"This {kind} is no decoder-only language model: {_USE_ONE}.")
    weights = list(model.parameters())
    if not weights:
        raise ModelError(f"This {kind} has no weights.")
    if weights[0].device.type == "meta" and private.execution_device(model) is None:
        raise ModelError(f"The weights of this {kind} are on the meta device: load them before running it.")
    if any(parameter.is_inference() for parameter in weights):
        raise ModelError(
            f"The weights of this {kind} were made inside torch.inference_mode(), so nothing can be differentiated "
            "through it: load the model outside."
        )
    if private.compiled(model):
        raise ModelError(f"This {kind} was compiled in place: its graph knows no hooks. Load it anew.")
    return model


def _encodes(model: Any) -> bool:
    names = {cls.__name__ for cls in type(model).__mro__}
    config = getattr(getattr(model, "original_model", None), "config", None)
    return bool(names & {"HookedEncoder", "HookedEncoderDecoder", "HookedAudioEncoder"}) or bool(
        getattr(config, "is_encoder_decoder", False)
    )


@contextmanager
def neutral(device: torch.device) -> Iterator[None]:
    """torch as it is by default, whatever the caller has around: no inference mode, no autocast."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        if device.type in ("cpu", "meta"):
            yield
        else:
            with torch.autocast(device.type, enabled=False):
                yield


def runs(*models: str) -> Callable[[Function], Function]:
    """The gate of every function that runs models: what its arguments ``models`` name must be usable.

    The function is called with torch's modes as they are by default, and with the model inside a ``torch.compile``.
    Whatever ends it, an interrupt at any time among it, the models are as they were before.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            for name in models:
                bound.arguments[name] = usable(bound.arguments[name])
            own = [bound.arguments[name] for name in models]
            first, second = kept.locks(own)
            with first, second:
                before = kept.Kept(*own)
                try:
                    try:
                        with neutral(Backend.of(own[0]).device):
                            return function(*bound.args, **bound.kwargs)
                    finally:
                        before.restore()
                finally:
                    before.restore()

        return call  # type: ignore[return-value]

    return decorate
