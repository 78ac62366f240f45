"""What dfa_lens needs of a model: one protocol, which each class of models fulfils in its own way.

Hook points have TransformerLens's names whatever the model is. What differs between classes of models is a method of
:class:`Backend`, and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.errors import ModelError
from dfa_lens.models import private

HookFunction = Callable[[Tensor], "Tensor | None"]
"""Takes an activation; returns its replacement, or None to leave it as it is."""


@runtime_checkable
class LensModel(Protocol):
    """A model with hook points: HookedTransformer, TransformerBridge, or what ``load_model`` makes."""

    cfg: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Hook point name → HookPoint."""

    def __call__(self, tokens: Tensor, /, *, attention_mask: Tensor) -> Any:
        """Logits [batch, pos, vocab]."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights."""


@runtime_checkable
class CausalModel(Protocol):
    """A Hugging Face causal language model as ``AutoModelForCausalLM.from_pretrained`` makes it."""

    config: Any

    def __call__(self, tokens: Tensor, /, *, attention_mask: Tensor) -> Any:
        """An output with ``logits`` [batch, pos, vocab]."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights."""

    def get_input_embeddings(self) -> Any:
        """The module that embeds tokens."""

    def get_output_embeddings(self) -> Any:
        """The module that unembeds."""


HookedModel = LensModel | CausalModel
"""What dfa_lens takes for a model."""


class KeysValues(NamedTuple):
    """The keys and values of every layer, laid out as the model has them; axis 0 is the batch."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    axis: int  #: that of positions


class AttentionWeights(NamedTuple):
    """What the heads of a layer read the residual stream by, and write to it by.

    ``norm`` is the one before them, None where they read the stream as it is. ``projections`` has for "q", "k" and "v"
    the matrix [head, d_model, d_head] and the bias [head, d_head] or None, what the norm's own bias adds included; keys
    and values have the model's key-value heads. ``output`` is [head, d_head, d_model], ``output_bias`` what is added to
    all heads' sum, and ``behind`` the norm that the whole then goes through, None where it goes to the stream as it is.
    """

    norm: Norm | None
    projections: Mapping[str, tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"] | None]]
    output: Float[Tensor, "head d_head d_model"]
    output_bias: Float[Tensor, " d_model"] | None = None
    behind: Norm | None = None


class Norm(NamedTuple):
    """A norm, the one before the unembedding or another: w⊙(x − mean)/scale + b, without the mean in an RMS norm.

    ``weight`` and ``bias`` are None where there is none, or it is folded into what comes next.
    """

    weight: Float[Tensor, " d_model"] | None
    bias: Float[Tensor, " d_model"] | None
    eps: float
    centred: bool

    def centre(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """x less its mean, in a layer norm."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row 1"]:
        """What x is divided by."""
        return (self.centre(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def weighted(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """x times the weight."""
        return x if self.weight is None else x * self.weight.to(x)

    def without_bias(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The normed x, but for the bias."""
        return self.weighted(self.centre(x) / self.scale(x))


class Backend(ABC):
    """One class of models."""

    #: What :func:`~dfa_lens.models.loading.load_model` calls it.
    name: ClassVar[str]
    #: Whether hook points are a part of the model.
    has_points: ClassVar[bool] = True
    #: What keeps a pass from filling a key-value cache, which a block that runs once more would fill twice.
    without_cache: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: Any) -> None:
        self.model = model

    # --- what the model is -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens; of a model whose weights are offloaded, where they are brought to."""
        device = next(iter(self.model.parameters())).device
        if device.type == "meta":
            return private.execution_device(self.model) or device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights that are not quantised."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def config(self) -> Any:
        """Hugging Face's config, or None."""
        return getattr(getattr(self.model, "original_model", None), "config", None)

    @property
    def blocks(self) -> Sequence[Any]:
        """The modules that the residual stream goes through, one after the other."""
        return list(self.model.blocks)

    @property
    def guess(self) -> str | None:
        """What was assumed of the model and has to be tried before it is believed, or None."""
        return None

    def mlp(self, layer: int) -> Any:
        """The MLP of a block; None if it has none."""
        return getattr(self.blocks[layer], "mlp", None)

    def mixes_experts(self, layer: int) -> bool:
        """Whether the MLP of a block is a mixture of experts; a bridge has hook points of neurons even so."""
        mlp = self.mlp(layer)
        inner = getattr(mlp, "original_component", mlp)
        return getattr(inner, "experts", None) is not None

    @property
    def unembedding(self) -> tuple[Any, Float[Tensor, "d_model vocab"], Tensor | None] | None:
        """The module that unembeds, its matrix and its bias, where the matrix can be used without the module."""
        return None

    def window(self) -> int | None:
        """How far back attention looks in the layers that do not look back all the way, or None."""
        return None

    @abstractmethod
    def processing(self) -> tuple[str, ...]:
        """What was done to the weights on loading."""

    @abstractmethod
    def set_tokenizer(self, tokenizer: Any) -> None:
        """Give the model a tokenizer as it is."""

    # --- hook points -------------------------------------------------------------------------------------------

    @abstractmethod
    def refusal(self, name: str) -> str | None:
        """Why an edit at this hook point would not do what its name says, or None."""

    @abstractmethod
    def module_of(self, point: Any) -> Any:
        """The torch module that carries the functions on a hook point."""

    @abstractmethod
    def new_point(self, place: Any, path: str, name: str, at: str) -> AddedPoint:
        """A hook point of the user's own on the module ``place`` at ``path``; nothing is done to the model yet."""

    def showing(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Whatever the model must be told so that these hook points fire."""
        return nullcontext()

    @abstractmethod
    def mlp_input_gradient(self, block: str) -> list[tuple[str, float]]:
        """The hook points whose gradients, with these signs, add up to the gradient at the MLP's input."""

    @abstractmethod
    def shifted_mlp_input(self, block: str, shift: Callable[[Tensor], Tensor]) -> list[tuple[str, HookFunction]]:
        """Hooks that add ``shift(x)`` to the stream x [batch, pos, d_model] that the MLP reads, and to nothing else."""

    # --- weights -----------------------------------------------------------------------------------------------

    def attention_weights(self, layer: int) -> AttentionWeights:
        """The weights between the residual stream and the heads of a layer.

        Raises
        ------
        ModelError
            If they can't be read, or a norm beside them is of a kind that is not known.
        """
        try:
            before, behind = self._norms_of_attention(layer)
            letters = {letter: _with_bias_of(before, *self._projection(layer, letter)) for letter in "qkv"}
            output, bias = self.output_weights(layer), self._output_bias(layer)
            weights = AttentionWeights(before, letters, output, bias, behind)
            tensors = [weights.output, *(matrix for matrix, _ in letters.values())]
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"The attention weights of block {layer} can't be read ({error}).") from error
        if any(each.device.type == "meta" or not each.is_floating_point() or each.ndim != 3 for each in tensors):
            raise ModelError(
                f"The attention weights of block {layer} are offloaded or quantised, and edges need them as numbers."
            )
        return weights

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What the heads of a layer write to the residual stream by; an AttributeError or the like if unreadable."""
        return self.blocks[layer].attn.W_O

    @abstractmethod
    def final_norm(self) -> Norm:
        """The norm before the unembedding; a TypeError or AttributeError if it is none that we know."""

    @abstractmethod
    def norms(self) -> list[tuple[Any, Norm]]:
        """All norms, as modules that take a stream and return it normed, with their numbers; errors as there."""

    @abstractmethod
    def unembedding_columns(
        self, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"] | None]:
        """What the normed stream is multiplied with for the logits of some tokens, and what is added."""

    @abstractmethod
    def _norms_of_attention(self, layer: int) -> tuple[Norm | None, Norm | None]:
        """The norms before and behind a block's attention, None where there is none; a TypeError if not known."""

    @abstractmethod
    def _output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """What is added to what a layer's heads write together."""

    @abstractmethod
    def _projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor | None]:
        """Matrix and bias of "q", "k" or "v", of the heads that there are."""

    def copied_weights(self) -> Iterator[tuple[torch.nn.Parameter, tuple[int, ...]]]:
        """The weights that the model copies on every pass, and the order of axes in which it reads them."""
        return iter(())

    # --- passes ------------------------------------------------------------------------------------------------

    @abstractmethod
    def run_and_keep(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> KeysValues:
        """Run the model and hand back the keys and values of its attention."""

    @abstractmethod
    def run_after(
        self, before: KeysValues, tokens: Int[Tensor, "batch rest"], mask: Int[Tensor, "batch rest"]
    ) -> Float[Tensor, "batch kept logit"]:
        """Run the model on what comes after tokens whose keys and values are known."""

    def _checked(self, layers: list[tuple[Tensor, Tensor]], tokens: Tensor, axis: int) -> KeysValues:
        private.check_cache(layers, int(self.model.cfg.n_layers), tokens.shape[1], axis)
        return KeysValues(tuple(key for key, _ in layers), tuple(value for _, value in layers), axis)


def _with_bias_of(
    norm: Norm | None, matrix: Float[Tensor, "head d_model d_head"], bias: Float[Tensor, "head d_head"] | None
) -> tuple[Tensor, Tensor | None]:
    """A projection of what a norm gives: what the norm's bias adds becomes a part of the projection's."""
    if norm is None or norm.bias is None:
        return matrix, bias
    added = torch.einsum("d,hde->he", norm.bias.to(matrix), matrix)
    return matrix, added if bias is None else bias + added


class AddedPoint(NamedTuple):
    """A hook point of the user's own: what puts it on a model, and what takes it away again.

    The steps of ``away`` can be taken more than once, and after a ``put`` that was cut short.
    """

    point: Any
    put: Callable[[], object]
    away: Sequence[Callable[[], object]]


class HuggingFaceBackend(Backend):
    """Models that run Hugging Face's modules, wrapped or not."""

    without_cache: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def refusal(self, name: str) -> str | None:  # noqa: D102
        if name.endswith("hook_resid_mid"):
            return (
                f"On a {type(self.model).__name__} {name!r} is the input of the second norm only: a change there "
                "misses the skip path. Use 'hook_attn_out' or 'hook_resid_pre' of the same layer."
            )
        return None

    def window(self) -> int | None:  # noqa: D102
        names = ("sliding_window", "attention_chunk_size", "window_size")
        sizes = (getattr(self.config, name, None) for name in names)
        return min((size for size in sizes if isinstance(size, int) and size > 0), default=None)

    def mlp_input_gradient(self, block: str) -> list[tuple[str, float]]:  # noqa: D102
        return [(f"{block}.{self._mlp_reads(block)}", 1.0)]

    def shifted_mlp_input(self, block: str, shift: Callable[[Tensor], Tensor]) -> list[tuple[str, HookFunction]]:
        """At the second norm's input, which the skip path does not go through."""
        return [(f"{block}.{self._mlp_reads(block)}", lambda now: now + shift(now))]

    @abstractmethod
    def _mlp_reads(self, block: str) -> str:
        """Where the MLP reads the stream: the second norm's input, or its own where there is no norm before it."""

    def run_and_keep(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> KeysValues:  # noqa: D102
        cache = private.key_value_cache()
        with self._with_cache(cache) as arguments:
            self.model(tokens, attention_mask=mask, **arguments)
        return self._checked(private.cached_layers(cache), tokens, axis=2)

    def run_after(  # noqa: D102
        self, before: KeysValues, tokens: Int[Tensor, "batch rest"], mask: Int[Tensor, "batch rest"]
    ) -> Float[Tensor, "batch kept logit"]:
        length = before.keys[0].shape[before.axis]
        # a new cache each time: the run appends to it
        cache = private.key_value_cache(list(zip(before.keys, before.values, strict=True)))
        # all of the mask is told: the cache may not choose it
        whole = torch.cat([mask.new_ones(len(mask), length), mask], 1)
        with self._with_cache(cache) as arguments:
            return self.model(tokens, attention_mask=whole, **arguments)

    @abstractmethod
    def _with_cache(self, cache: Any) -> AbstractContextManager[dict[str, Any]]:
        """The arguments with which the model runs on a key-value cache, for passes inside the context."""
