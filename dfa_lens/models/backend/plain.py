"""Hugging Face's causal language models as they are: torch hooks on their modules, under TransformerLens's names.

Nothing is put on a model but the hooks of a running operation, no weight is moved, copied or changed, and attention is
computed by whatever kernel the model was loaded with, unless somebody asks for attention patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.errors import HookError
from dfa_lens.models import kept, private
from dfa_lens.models.backend.families import View, affine, evaluating, plain_numbers, take_apart
from dfa_lens.models.backend.protocol import AddedPoint, HuggingFaceBackend, Norm
from dfa_lens.models.offload import brought


@dataclass(frozen=True, eq=False)
class Point:
    """A hook point: what a module is given or returns, the first tensor of it, and how that is cut into heads.

    Attributes
    ----------
    place:
        Which of the tensors that the module returns.
    read_only:
        Whether the model does not go on with this tensor, so that an edit would do nothing.
    """

    module: Any
    at: Literal["input", "output"]
    view: View | None = None
    place: int = 0
    read_only: bool = False

    #: As on a TransformerLens hook point: nobody else's functions are here.
    bwd_hooks = ()

    @property
    def fwd_hooks(self) -> list[Any]:
        """The functions of ours on the module, this point's and others'."""
        return [hook for hook in private.hooked(self.module) if isinstance(hook, kept.OwnHook)]

    def add_hook(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put a function on the module, behind those that are there."""
        if self.at == "input":
            self.module.register_forward_pre_hook(_Put(self, function), with_kwargs=True)
        else:
            self.module.register_forward_hook(_Put(self, function))

    def edited(self, whole: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """What the module is given, or what is made of what it returned, when the function has seen the activation."""
        if whole is None:
            raise HookError(
                f"This {type(self.module).__name__} hands out no attention pattern: load the model with "
                "attn_implementation='eager', or leave what looks at attention out."
            )
        seen = whole if self.view is None else self.view.take(whole)
        now = function(seen)
        if self.view is None:
            return now
        if now is seen and not (torch.is_grad_enabled() and now.requires_grad):
            return whole
        # with a gradient, the model goes on with what was seen: else there is no way from the output to it
        return self.view.put(whole, now)


@dataclass(frozen=True, eq=False)
class ExpertsPoint(Point):
    """What each expert of a mixture adds to the MLP's output, [batch, pos, expert, d_model]; 0 where it was not chosen.

    A model adds the experts up inside one module. Here they run once more behind the MLP, every choice of a token as if
    it were a token of its own; what a function changes of them is added to the MLP's output. Whatever else is in it, an
    expert that all tokens share, stays.

    Attributes
    ----------
    router, experts:
        The modules that choose and compute them, of transformers 5: ``experts(tokens, chosen, weights)``, and a router
        that returns its logits, the weights and the chosen.
    """

    router: Any = None
    experts: Any = None

    def add_hook(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put a function on the MLP, before those that see its output."""
        self.module.register_forward_hook(_PutOnExperts(self, function), prepend=True)

    def parts(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert d_model"]:
        """What each expert adds.

        Raises
        ------
        HookError
            If router and experts are not of this kind.
        """
        tokens = hidden.flatten(0, 1)
        try:
            _, weights, chosen = self.router.forward(tokens)
            n, own = int(self.experts.num_experts), chosen.shape[1]
            added = self.experts.forward(
                tokens.repeat_interleave(own, 0), chosen.reshape(-1, 1), weights.reshape(-1, 1)
            ).unflatten(0, (-1, own))
        except (AttributeError, TypeError, ValueError) as error:
            raise HookError(
                f"The experts of a {type(self.module).__name__} can't be told apart ({error}): use 'hook_mlp_out', "
                "their sum."
            ) from error
        places = chosen[..., None].expand(-1, -1, hidden.shape[-1])
        return (
            added.new_zeros(len(tokens), n, hidden.shape[-1]).scatter(1, places, added).unflatten(0, hidden.shape[:2])
        )


class _PutOnExperts:
    """A function on the experts of an MLP, as torch calls it behind the MLP."""

    def __init__(self, point: ExpertsPoint, function: Callable[[Tensor], Tensor]) -> None:
        self.point, self.function = point, function

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        parts = self.point.parts(args[0])
        now = self.function(parts)
        if now is parts and not (torch.is_grad_enabled() and now.requires_grad):
            return output
        return output + (now - parts).sum(2)


class _Put:
    """A function on a module, as torch calls it; an object, since a hook of ours must be known for one by its looks."""

    def __init__(self, point: Point, function: Callable[[Tensor], Tensor]) -> None:
        self.point, self.function = point, function

    def __call__(self, module: Any, args: tuple[Any, ...], third: Any) -> Any:
        """``third``: before the module runs its keyword arguments, afterwards what it returns."""
        if self.point.at == "input":
            if args:
                return (self._edited(args[0]), *args[1:]), third
            key = next(key for key, value in third.items() if isinstance(value, Tensor))
            return args, third | {key: self._edited(third[key])}
        if not isinstance(third, tuple):
            return self._edited(third)
        place = self.point.place
        return (*third[:place], self._edited(third[place]), *third[place + 1 :])

    def _edited(self, value: Any) -> Any:
        return self.point.edited(value, self.function)


@dataclass
class Sizes:
    """What is asked of a model's sizes, under TransformerLens's names."""

    model_name: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int | None
    attn_only: bool
    parallel_attn_mlp: bool
    original_architecture: str


class PlainModel:
    """A Hugging Face causal language model under TransformerLens's names.

    What :func:`~dfa_lens.models.loading.load_model` makes with ``backend="transformers"``, and what a model that is
    passed as it is stands in for as long as an operation lasts. Whatever is not defined here is the model's own.

    Parameters
    ----------
    model:
        The model, which stays as it is.
    tokenizer:
        Its tokenizer.
    name:
        What it is called, for provenance.

    Raises
    ------
    ModelError
        If its parts are not found.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.models.backend import PlainModel
    >>> model = dfa.load_model("llama3-tiny-source", backend="transformers")
    >>> isinstance(model, PlainModel), model.cfg.n_heads
    (True, 8)
    >>> type(model.original_model).__name__
    'LlamaForCausalLM'
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, name: str | None = None) -> None:
        self.original_model, self.tokenizer = model, tokenizer
        self.parts = take_apart(model)
        self.cfg = self._sizes(name)

    def _sizes(self, name: str | None) -> Sizes:
        model, first = self.original_model, self.parts.blocks[0]
        config = model.config.get_text_config()
        path = str(getattr(model.config, "_name_or_path", "") or "")
        return Sizes(
            model_name=name or (Path(path).name if Path(path).is_dir() else path) or config.model_type,
            n_layers=len(self.parts.blocks),
            n_heads=int(config.num_attention_heads),
            n_key_value_heads=int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
            d_model=int(config.hidden_size),
            d_head=first.heads.width,
            d_vocab=int(config.vocab_size),
            n_ctx=getattr(config, "max_position_embeddings", None),
            attn_only=first.mlp is None,
            parallel_attn_mlp=self.parts.parallel,
            original_architecture=type(model).__name__,
        )

    @property
    def hook_dict(self) -> Mapping[str, Point]:
        """Hook point name → hook point, read anew: an adapter may have changed the model's modules."""
        parts = self.parts = take_apart(self.original_model)
        points = {
            "hook_embed": Point(parts.embedding, "output"),
            "unembed.hook_in": Point(parts.unembedding, "input"),
        }
        for layer, block in enumerate(parts.blocks):
            here = {
                "hook_resid_pre": Point(block.module, "input"),
                "hook_resid_post": Point(block.module, "output"),
                "hook_attn_out": Point(block.attention_out, "output"),
                "attn.hook_z": Point(block.output, "input", block.heads),
                "attn.hook_pattern": Point(block.attention, "output", place=1, read_only=True),
            }
            here |= {
                f"attn.hook_{letter}": Point(module, "output", view) for letter, (module, view) in block.reads.items()
            }
            if block.mlp is not None:
                reader = "mlp.hook_in" if block.ln2 is block.mlp else "ln2.hook_in"
                here["hook_mlp_out"] = Point(block.mlp_out, "output")
                if block.router is not None and block.experts is not None:
                    here["mlp.hook_experts"] = ExpertsPoint(
                        block.mlp, "output", None, 0, False, block.router, block.experts
                    )
                here["hook_resid_mid"] = here[reader] = Point(block.ln2, "input")
            if block.neurons is not None:
                here["mlp.hook_post"] = Point(block.neurons, "input")
                here |= {f"mlp.{name}": Point(module, "output", view) for name, (module, view) in block.factors.items()}
            points |= {f"blocks.{layer}.{name}": point for name, point in here.items()}
        return points | {name: entry.point for name, entry in kept.remembered_of(self).added.items()}

    def __call__(self, tokens: Tensor, /, *, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor:
        """Logits [batch, pos, vocab]."""
        arguments = {"use_cache": False, "return_dict": True} | arguments
        return self.original_model(input_ids=tokens, attention_mask=attention_mask, **arguments).logits

    @property
    def blocks(self) -> Sequence[Any]:
        """The modules that the residual stream goes through, one after the other."""
        return [block.module for block in self.parts.blocks]

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights."""
        return self.original_model.parameters()

    def to(self, *args: Any, **kwargs: Any) -> PlainModel:
        """As ``torch.nn.Module.to``."""
        self.original_model.to(*args, **kwargs)
        return self

    def eval(self) -> PlainModel:
        """As ``torch.nn.Module.eval``."""
        self.original_model.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "original_model" or name.startswith("__"):  # copies ask before there is one
            raise AttributeError(name)
        return getattr(self.original_model, name)

    def __repr__(self) -> str:
        return f"PlainModel({self.original_model!r})"


class PlainBackend(HuggingFaceBackend):
    """Hugging Face's model, and nothing else."""

    name = "transformers"
    has_points = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding, which is what activations have."""
        weight = getattr(self.model.parts.embedding, "weight", None)
        return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else super().dtype

    @property
    def config(self) -> Any:  # noqa: D102
        return self.model.original_model.config.get_text_config()

    @property
    def guess(self) -> str | None:  # noqa: D102
        return self.model.parts.guess

    def mlp(self, layer: int) -> Any:  # noqa: D102
        return self.model.parts.blocks[layer].mlp

    @property
    def unembedding(self) -> tuple[Any, Float[Tensor, "d_model vocab"], Tensor | None] | None:  # noqa: D102
        module = self.model.parts.unembedding
        if not self._plain_unembedding or module.weight.device.type == "meta" or hasattr(module, "_hf_hook"):
            return None
        return module, module.weight.T, module.bias

    @property
    def _plain_unembedding(self) -> bool:
        """Whether it is a matrix of numbers: it has no adapter, and is not quantised."""
        module = self.model.parts.unembedding
        return type(module) is torch.nn.Linear and plain_numbers(module.weight)

    def processing(self) -> tuple[str, ...]:
        """Nothing ever is."""
        return ()

    def set_tokenizer(self, tokenizer: Any) -> None:  # noqa: D102
        self.model.tokenizer = tokenizer

    # --- hook points -------------------------------------------------------------------------------------------

    def module_of(self, point: Any) -> Any:  # noqa: D102
        return point.module

    def new_point(self, place: Any, path: str, name: str, at: Any) -> AddedPoint:
        """It is a name only: the model does not know of it."""
        return AddedPoint(Point(place, at), lambda: None, ())

    def showing(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """Attention patterns are made by eager attention alone."""
        if any(name.endswith("hook_pattern") for name in names):
            return private.eager_attention(self.model.original_model)
        return nullcontext()

    def _mlp_reads(self, block: str) -> str:
        parts = self.model.parts.blocks[int(block.rpartition(".")[2])]
        return "mlp.hook_in" if parts.ln2 is parts.mlp else "ln2.hook_in"

    # --- weights -----------------------------------------------------------------------------------------------

    def output_weights(self, layer: int) -> Float[Tensor, "head d_head d_model"]:  # noqa: D102
        block = self.model.parts.blocks[layer]
        return block.heads.take(affine(block.output, self.dtype)[0].T).permute(1, 2, 0)

    def _projection(self, layer: int, letter: str) -> tuple[Tensor, Tensor | None]:
        module, view = self.model.parts.blocks[layer].reads[letter]
        matrix, bias = affine(module, self.dtype)
        return view.take(matrix).transpose(0, 1), None if bias is None else view.take(bias)

    def _norms_of_attention(self, layer: int) -> tuple[Norm | None, Norm | None]:
        block = self.model.parts.blocks[layer]
        before = None if block.ln1 is block.attention else self._norm(block.ln1)
        return before, None if block.attention_out is block.attention else self._norm(block.attention_out)

    def _output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        return affine(self.model.parts.blocks[layer].output, self.dtype)[1]

    def final_norm(self) -> Norm:  # noqa: D102
        return self._norm(self.model.parts.norm)

    def norms(self) -> list[tuple[Any, Norm]]:
        """Told by their names; and those before and behind attention and MLP, whatever they are called."""
        found = [each for each in self.model.original_model.modules() if type(each).__name__.endswith("Norm")]
        for block in self.model.parts.blocks:
            beside = (block.ln1, block.ln2, block.attention_out, block.mlp_out)
            found += [each for each in beside if each not in (block.attention, block.mlp)]
        return [(each, self._norm(each)) for each in dict.fromkeys(found)]

    def _norm(self, norm: Any) -> Norm:
        """A norm's numbers; of an RMS norm what it makes of ones: some multiply by the weight, some by 1 + it."""
        kind = type(norm).__name__
        eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
        if kind == "LayerNorm":
            with brought(norm):
                return Norm(norm.weight.clone(), norm.bias.clone(), float(norm.eps), True)
        if "RMSNorm" not in kind or eps is None:
            raise TypeError(f"the norm is a {kind}")
        with torch.no_grad():
            ones = norm(torch.ones(norm.weight.shape, dtype=torch.float32, device=self._place(norm.weight)))
        return Norm(ones * (1 + float(eps)) ** 0.5, None, float(eps), False)

    def unembedding_columns(  # noqa: D102
        self, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"] | None]:
        module = self.model.parts.unembedding
        if not self._plain_unembedding:
            return self._columns_of(module, tokens)
        with brought(module):
            own, bias = tokens.to(module.weight.device), getattr(module, "bias", None)
            return module.weight[own].clone(), None if bias is None else bias[own].clone()

    def _columns_of(
        self, module: Any, tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
        """The same of any linear module: the logits' gradients are the columns, and the logits of nothing the bias."""
        with torch.enable_grad(), evaluating(module):
            size = int(self.model.cfg.d_model)
            stream = torch.zeros(len(tokens), size, dtype=self.dtype, device=self.device, requires_grad=True)
            own = module(stream).gather(1, tokens.to(self.device)[:, None])[:, 0]
            return torch.autograd.grad(own.sum(), stream)[0], own.detach()

    def _place(self, weight: Tensor) -> torch.device:
        """Where a weight is, or is brought to."""
        return self.device if weight.device.type == "meta" else weight.device

    def _with_cache(self, cache: Any) -> AbstractContextManager[dict[str, Any]]:
        return nullcontext({private.cache_argument(self.model.original_model): cache, "use_cache": True})
