"""Where the parts of Hugging Face's decoders are: one line for each kind of block.

Embedding, unembedding and the list of blocks are found by what they are. Within a block, kinds of models differ in the
names of modules and in how queries, keys and values lie in what one module returns; a :class:`Family` says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.registry import Registry
from dfa_lens.errors import ModelError


@dataclass(frozen=True)
class View:
    """How the last axis of a tensor is cut into heads, and which part of it, or of each head, is meant.

    Attributes
    ----------
    width:
        How many numbers a head has.
    part:
        From where to where along the whole axis; None for all of it.
    inner:
        From where to where within each head; None for all of it.
    whole:
        That part as it is, not cut into heads.
    """

    width: int
    part: tuple[int, int] | None = None
    inner: tuple[int, int] | None = None
    whole: bool = False

    def take(self, whole: Float[Tensor, "*rows all"]) -> Float[Tensor, "..."]:
        """The heads of a tensor, [rows, head, d_head]."""
        own = whole if self.part is None else whole[..., slice(*self.part)]
        if self.whole:
            return own
        heads = own.unflatten(-1, (-1, self.width))
        return heads if self.inner is None else heads[..., slice(*self.inner)]

    def put(self, whole: Float[Tensor, "*rows all"], heads: Float[Tensor, "..."]) -> Float[Tensor, "*rows all"]:
        """The tensor with other heads; the old one is not written to."""
        own = whole if self.part is None else whole[..., slice(*self.part)]
        if self.inner is not None:
            heads = torch.slice_scatter(own.unflatten(-1, (-1, self.width)), heads, -1, *self.inner)
        own = heads if self.whole else heads.flatten(-2)
        return own if self.part is None else torch.slice_scatter(whole, own, -1, *self.part)


@dataclass(frozen=True)
class Block:
    """The parts of one block.

    ``reads``: of "q", "k" and "v" the module that makes them, and where in its output. ``factors``: the same of what
    neurons are made of, "hook_pre" and, in a gated MLP, "hook_pre_linear".
    """

    module: Any
    ln1: Any
    ln2: Any
    attention: Any
    attention_out: Any
    output: Any
    heads: View
    mlp: Any
    mlp_out: Any
    router: Any
    experts: Any
    neurons: Any
    reads: Mapping[str, tuple[Any, View]]
    factors: Mapping[str, tuple[Any, View | None]]


@dataclass(frozen=True)
class Family:
    """What the parts of a block are called.

    Attributes
    ----------
    ln1, ln2:
        What reads the residual stream for the attention and for the MLP: norms, or attention and MLP themselves.
    ln1_post, ln2_post:
        Norms through which attention and MLP write to the stream, where there are any.
    attention, output:
        The attention, and the projection in it that heads write to the stream by.
    qkv:
        The projections to queries, keys and values, one after the other; or one that makes all three.
    fused:
        How one projection lays them out: all queries, all keys, all values ("blocks"), or the three head by head.
    mlp, neurons:
        The MLP, and the projection in it that neurons write by.
    gate, up:
        The projection in it that a neuron's nonlinearity reads, and the one that it is multiplied with; None for no
        such product, or where one projection makes both, one after the other.
    router, experts:
        In a mixture of experts, what chooses some for each token and what computes all of them.
    parallel:
        Whether attention and MLP read the same stream: the name of the config's field that says so, or nothing.

    Examples
    --------
    >>> from dfa_lens.models.backend import FAMILIES, Family
    >>> FAMILIES["llama"] == Family()
    True
    """

    ln1: str = "input_layernorm"
    ln2: str = "post_attention_layernorm"
    ln1_post: str | None = None
    ln2_post: str | None = None
    attention: str = "self_attn"
    output: str = "o_proj"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    fused: Literal["blocks", "heads"] = "blocks"
    mlp: str = "mlp"
    neurons: str = "down_proj"
    gate: str = "gate_proj"
    up: str | None = "up_proj"
    router: str = "gate"
    experts: str = "experts"
    parallel: str = ""

    def block(self, module: Any, n_heads: int, n_key_value_heads: int) -> Block:
        """The parts of a block.

        Raises
        ------
        LookupError
            Naming the part that is not there. What not every node needs (queries, keys, values, neurons, an MLP) may be
            missing.
        """
        attention = _part(module, self.attention)
        output = _part(attention, self.output)
        width = features(output, "in") or n_heads * int(getattr(attention, "head_dim", 0))
        if not width or width % n_heads:
            raise LookupError(f"{self.attention}.{self.output} takes {width} numbers, which are not {n_heads} heads")
        mlp = getattr(module, self.mlp, None)
        return Block(
            module=module,
            ln1=_part(module, self.ln1),
            ln2=_part(module, self.ln2) if mlp is not None else None,
            attention=attention,
            attention_out=_part(module, self.ln1_post) if self.ln1_post else attention,
            output=output,
            heads=View(width // n_heads),
            mlp=mlp,
            mlp_out=_part(module, self.ln2_post) if self.ln2_post and mlp is not None else mlp,
            router=getattr(mlp, self.router, None),
            experts=getattr(mlp, self.experts, None),
            neurons=getattr(mlp, self.neurons, None),
            reads=self._reads(attention, n_heads, n_key_value_heads),
            factors=self._factors(mlp),
        )

    def _factors(self, mlp: Any) -> dict[str, tuple[Any, View | None]]:
        """What neurons are made of; nothing where the sizes do not say it."""
        gate = getattr(mlp, self.gate, None)
        size, n = features(gate, "out"), features(getattr(mlp, self.neurons, None), "in")
        if self.up is not None:
            up = getattr(mlp, self.up, None)
            return {"hook_pre": (gate, None), "hook_pre_linear": (up, None)} if size and features(up, "out") else {}
        if not n or size not in (n, 2 * n):
            return {}
        if size == n:
            return {"hook_pre": (gate, None)}
        return {
            name: (gate, View(n, (i * n, (i + 1) * n), whole=True))
            for i, name in enumerate(("hook_pre", "hook_pre_linear"))
        }

    def _reads(self, attention: Any, n_heads: int, n_key_value_heads: int) -> dict[str, tuple[Any, View]]:
        """Where queries, keys and values are; nothing where the sizes do not say it."""
        modules = [getattr(attention, name, None) for name in self.qkv]
        sizes = [features(module, "out") for module in modules]
        n_kv = n_heads if self.fused == "heads" else n_key_value_heads
        counts = (n_heads, n_kv, n_kv)
        if len(modules) == 3:
            return {
                letter: (module, View(size // n))
                for letter, module, size, n in zip("qkv", modules, sizes, counts, strict=True)
                if size and size % n == 0
            }
        if not sizes[0] or sizes[0] % sum(counts):
            return {}
        width, module = sizes[0] // sum(counts), modules[0]
        if self.fused == "heads":
            return {
                letter: (module, View(3 * width, None, (i * width, (i + 1) * width))) for i, letter in enumerate("qkv")
            }
        ends = [width * sum(counts[:i]) for i in range(4)]
        return {letter: (module, View(width, (ends[i], ends[i + 1]))) for i, letter in enumerate("qkv")}


_POST = ("post_attention_layernorm", "post_feedforward_layernorm")
LLAMA, PHI = Family(), Family(qkv=("qkv_proj",), gate="gate_up_proj", up=None)
GEMMA, OLMO = Family("input_layernorm", "pre_feedforward_layernorm", *_POST), Family("self_attn", "mlp", *_POST)
GPT2 = Family(
    "ln_1", "ln_2", attention="attn", output="c_proj", qkv=("c_attn",), neurons="c_proj", gate="c_fc", up=None
)
NEOX = Family(
    attention="attention",
    output="dense",
    qkv=("query_key_value",),
    fused="heads",
    neurons="dense_4h_to_h",
    gate="dense_h_to_4h",
    up=None,
    parallel="use_parallel_residual",
)

FAMILIES: Registry[Family] = Registry(
    "family of models",
    ModelError,
    {
        "llama": LLAMA,
        "mistral": LLAMA,
        "qwen2": LLAMA,
        "qwen3": LLAMA,
        "gemma": LLAMA,
        "mixtral": LLAMA,
        "qwen2_moe": LLAMA,
        "qwen3_moe": LLAMA,
        "gemma2": GEMMA,
        "gemma3_text": GEMMA,
        "olmo2": OLMO,
        "phi3": PHI,
        "gpt2": GPT2,
        "gpt_neox": NEOX,
    },
)
"""``model_type`` of a config → its family. One of your own is registered under its ``model_type``."""


@dataclass(frozen=True)
class Decoder:
    """A Hugging Face model taken apart.

    ``guess`` is what it is called where its ``model_type`` is not in the table; ``parallel``: attention and MLP of a
    block read the same stream.
    """

    family: Family
    guess: str | None
    embedding: Any
    unembedding: Any
    norm: Any
    blocks: tuple[Block, ...]
    parallel: bool


def take_apart(model: Any) -> Decoder:
    """Find the parts of a model: by its family, or by its structure where the family is not known.

    Raises
    ------
    ModelError
        If it is no decoder with an unembedding, or has parts that no family has; says what to add.
    """
    kind, config = type(model).__name__, model.config.get_text_config()
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or unembedding is None:
        raise ModelError(f"This {kind} has no unembedding: load it by transformers' AutoModelForCausalLM.")
    parent, modules = _blocks(model, embedding, int(config.num_hidden_layers))
    n_heads = int(config.num_attention_heads)
    n_key_value_heads = int(getattr(config, "num_key_value_heads", None) or n_heads)
    known = FAMILIES.get(config.model_type) or FAMILIES.get(model.config.model_type)
    found: list[tuple[int, Family, tuple[Block, ...]]] = []
    reasons: list[str] = []
    for family in [known] if known is not None else dict.fromkeys(FAMILIES.values()):
        try:
            blocks = tuple(family.block(module, n_heads, n_key_value_heads) for module in modules)
        except LookupError as error:
            reasons.append(str(error))
            continue
        if len({block.mlp is None for block in blocks}) == 1:
            first = blocks[0]
            named = (first.mlp, first.neurons, family.ln1_post, family.ln2_post)
            found.append((len(first.reads) + sum(part is not None for part in named), family, blocks))
    if not found:
        raise ModelError(
            f"The parts of this {kind} (model_type {config.model_type!r}) are not where those of a known family are "
            f"({reasons[0] if reasons else 'some blocks have an MLP, and some have none'}). "
            + how_to_add(config.model_type)
        )
    _, family, blocks = max(found, key=lambda each: each[0])
    norms = [child for child in parent.children() if type(child).__name__.endswith("Norm")]
    parallel = bool(getattr(config, family.parallel, False)) if family.parallel else False
    guess = None if known is not None else f"{kind} (model_type {config.model_type!r})"
    return Decoder(family, guess, embedding, unembedding, norms[-1] if norms else None, blocks, parallel)


def how_to_add(model_type: str) -> str:
    """What to do about a model that is not known."""
    return (
        f"Say where they are: dfa_lens.models.backend.FAMILIES.register({model_type!r}, Family(…)), see 'A family of "
        "models' in the documentation's page Extending; or load it by TransformerLens."
    )


def _blocks(model: Any, embedding: Any, n_layers: int) -> tuple[Any, list[Any]]:
    """The module that holds embedding and blocks, and its blocks."""
    for parent in model.modules():
        children = list(parent.children())
        if any(child is embedding for child in children):
            for child in children:
                if isinstance(child, torch.nn.ModuleList) and len(child) == n_layers:
                    return parent, list(child)
    raise ModelError(
        f"This {type(model).__name__} has no list of {n_layers} blocks beside its embedding: it can't be hooked."
    )


def _part(module: Any, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise LookupError(f"a {type(module).__name__} has no {name!r}")
    return found


def features(module: Any, side: Literal["in", "out"]) -> int | None:
    """How many numbers a linear module takes or returns, whatever class it has; None if it does not say."""
    names = ("in_features", "infeatures", "nx") if side == "in" else ("out_features", "outfeatures", "nf")
    sizes = (getattr(module, name, None) for name in names)
    return next((size for size in sizes if isinstance(size, int)), None)


def plain_numbers(weight: Any) -> TypeGuard[Tensor]:
    """Whether a weight is a tensor of numbers as they are: torchao's weights are tensors, too, but of packed ones."""
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.is_floating_point()


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """A module as it computes when it is not trained, for the length of the context: an adapter may drop some of it."""
    training = [each for each in module.modules() if each.training]
    try:
        for each in training:
            each.training = False
        yield
    finally:
        for each in training:
            each.training = True


def affine(module: Any, dtype: torch.dtype) -> tuple[Float[Tensor, "in out"], Float[Tensor, " out"] | None]:
    """Matrix and bias of a linear module.

    The weights themselves where they are plain numbers. Quantised or offloaded weights, or weights with an adapter, are
    not: then what the module makes of the unit vectors, which takes the memory of one matrix.
    """
    weight, kind = getattr(module, "weight", None), type(module)
    if plain_numbers(weight) and weight.device.type != "meta":
        if kind is torch.nn.Linear and not hasattr(module, "_hf_hook"):
            return weight.T, module.bias
        if kind.__name__ == "Conv1D" and not hasattr(module, "_hf_hook"):
            return weight, module.bias
    size = features(module, "in")
    if size is None:
        raise TypeError(f"a {kind.__name__} does not say how many numbers it takes")
    places = [t.device for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"]
    device = places[0] if places else torch.device("cpu")
    with torch.no_grad(), evaluating(module):
        bias = module(torch.zeros(1, size, dtype=dtype, device=device))[0]
        matrix = module(torch.eye(size, dtype=dtype, device=device)) - bias
    return matrix, bias if bool(bias.any()) else None
