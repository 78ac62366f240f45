"""Pairs of tiny models whose circuits are known, because their weights were written and not trained.

Every pair does several tasks, each by a few of its *roles*: heads that fetch a symbol to the last position (by offset,
by induction, by inhibiting a name that was repeated, under a gate), and MLP blocks that look something up. Tasks share
roles in different combinations. The source has each role once. The target has more layers and heads, the roles at other
places, some of them split over two nodes, and more distractors: heads and MLP blocks that read the same prompts, change
as much from prompt to prompt, and move other logits than those that the tasks ask for, and a little also those.

Two things make weights easy to write, and are no part of real models. One direction of the residual stream holds a
constant much larger than all else, so that RMSNorm divides by nearly the same number everywhere (it varies by less
than 2 %), and serves as the bias that Llama's layers lack. Variables live in orthogonal subspaces; all of it is then
turned by a random rotation, so that no coordinate means anything.
"""

from __future__ import annotations

import json
import random
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dfa_lens.data.circuit import Circuit
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import TaskError, unknown
from dfa_lens.models import checkpoint as checkpoints
from dfa_lens.models.loading import Backend, load_model
from dfa_lens.zoo.planted_recipes import RECIPES, TABLES, fetch_head, task_of
from dfa_lens.zoo.planted_roles import SYMBOLS, Block, Head, Match, N, Recipe, Wanted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

BEGIN, PAD = "<|begin_of_text|>", "<|pad|>"
D_HEAD = 16
#: Rotation per position falls from one pair of a head's coordinates to the next, 1, .18, .03, …: the first two tell
#: positions; those from the fourth on hardly turn over a prompt, and compare contents.
ROPE_BASE = 1e6
_POSITIONAL = (0, 1)
_CONTENT = (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
#: The large constant; the squared norm of all else is at most 33.
CONSTANT = 32.0
LOGITS = 8.0  #: the answer's logit, over those of the other symbols
SINK = 6.0  #: how much every head likes the first token, where it has nothing to do
GATE = 12.0  #: how steep a look-up is
LEAK = 0.07  #: what distractors add to the answers' logits, by what they add to others


# --- what is handed out ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PlantedModel:
    """A model with the nodes that were planted in it.

    Attributes
    ----------
    model:
        The model, with a tokenizer.
    roles:
        Role → the nodes that play it; all other nodes are distractors.
    tasks:
        Task → the roles that it needs.
    """

    model: Any
    roles: Mapping[str, tuple[str, ...]]
    tasks: Mapping[str, tuple[str, ...]]

    @cached_property
    def nodes(self) -> NodeSet:
        """All heads and MLP blocks."""
        return NodeSet.heads_and_mlps(self.model)

    def role(self, node: str) -> str | None:
        """The role that a node plays; None for a distractor.

        Raises
        ------
        NodeError
            If the model has no such node.
        """
        self.nodes.position(node)
        return next((role for role, members in self.roles.items() if node in members), None)

    def circuit(self, task: str) -> Circuit:
        """The nodes that do a task.

        Raises
        ------
        TaskError
            If there is no such task.
        """
        if task not in self.tasks:
            raise unknown("task", task, self.tasks, TaskError)
        found = [node for role in self.tasks[task] for node in self.roles[role]]
        return Circuit(found, self.nodes, name=task, meta={"planted": True})


@dataclass(frozen=True, eq=False)
class PlantedPair:
    """A source and a target of which it is known which nodes do what.

    Attributes
    ----------
    name:
        As in :func:`names`.
    source, target:
        The models. A node of the source corresponds to the nodes of the target that have its role.
    """

    name: str
    source: PlantedModel
    target: PlantedModel

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, "fetch/table"."""
        return tuple(self.source.tasks)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Tasks that are new combinations of what the others do: to be tested on, when the others have taught."""
        return RECIPES[self.name].held_out

    @property
    def families(self) -> dict[str, str]:
        """Task → what is fetched: tasks of one family share all roles but the last."""
        return {task: task.partition("/")[0] for task in self.tasks}

    def pairs(self, task: str, *, split: Literal["train", "test"] = "train", n: int = 64, seed: int = 0) -> PromptPairs:
        """Prompt pairs of a task, the same for both models: two draws with different answers.

        Parameters
        ----------
        task:
            One of :attr:`tasks`.
        split:
            The two share no prompt.
        n:
            How many.
        seed:
            Of the draw.

        Raises
        ------
        TaskError
            If there is no such task or split, or ``n`` is no positive integer.
        """
        if task not in self.tasks:
            raise unknown("task", task, self.tasks, TaskError)
        if split not in ("train", "test"):
            raise unknown("split", split, ("train", "test"), TaskError)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise TaskError(f"n must be an integer of at least 1, not {n!r}.")
        recipe, ids = RECIPES[self.name], _ids(RECIPES[self.name])
        fetch, table = task.split("/")
        rng = random.Random(f"{self.name}/{task}/{split}/{seed}")

        def draw() -> tuple[list[int], int]:
            while True:
                words, fetched = recipe.draw(rng)
                if (zlib.crc32(" ".join(words).encode()) % 3 == 0) == (split == "test"):
                    tokens = [ids[word] for word in (BEGIN, *words, task)]
                    return tokens, ids[SYMBOLS[recipe.tables[table](*fetched[fetch])]]

        rows: list[tuple[tuple[list[int], int], tuple[list[int], int]]] = []
        while len(rows) < n:
            pair = draw(), draw()
            if pair[0][1] != pair[1][1]:
                rows.append(pair)
        clean, corrupt = zip(*rows, strict=True)
        prompts = [torch.tensor([tokens for tokens, _ in side]) for side in (clean, corrupt)]
        answer, wrong = (torch.tensor([answer for _, answer in side]) for side in (clean, corrupt))
        return PromptPairs(prompts[0], prompts[1], answer, wrong)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{side} {len(each.nodes)} nodes" for side, each in (("source", self.source), ("target", self.target))
        )
        return f"PlantedPair({self.name!r}: {sizes}, {len(self.source.roles)} roles, {len(self.tasks)} tasks)"


def names() -> tuple[str, ...]:
    """The pairs that there are.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.zoo.planted.names()
    ('lookup', 'induction', 'names', 'arithmetic', 'gate', 'two-hop')
    """
    return tuple(RECIPES)


def tasks(name: str) -> tuple[str, ...]:
    """The tasks of a pair, "fetch/table", without making its models.

    Raises
    ------
    TaskError
        If there is no such pair.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.zoo.planted.tasks("arithmetic")[:2]
    ('both/sum', 'both/difference')
    """
    if name not in RECIPES:
        raise unknown("planted pair", name, RECIPES, TaskError)
    return tuple(task_of(*each) for each in RECIPES[name].tasks)


def load(
    name: str,
    *,
    seed: int = 0,
    backend: Backend = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PlantedPair:
    """Make a pair of models with planted circuits; nothing is downloaded or trained.

    Parameters
    ----------
    name:
        One of :func:`names`.
    seed:
        Of places, rotations and distractors; the roles and tasks are the same for all.
    backend, device, dtype:
        As in :func:`dfa_lens.load_model`.

    Raises
    ------
    TaskError
        If there is no such pair.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> pair = dfa.zoo.planted.load("lookup")
    >>> pair
    PlantedPair('lookup': source 15 nodes, target 42 nodes, 6 roles, 9 tasks)
    >>> pair.source.circuit("first/next")
    Circuit('first/next': 2 of 15 nodes: a0.h3, m1)
    >>> [pair.target.role(node) for node in pair.target.circuit("first/next")]
    ['fetch first', 'fetch first', 'next']
    """
    if name not in RECIPES:
        raise unknown("planted pair", name, RECIPES, TaskError)
    options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}
    return PlantedPair(name, *(_made(name, side, seed, options) for side in ("source", "target")))


# --- writing weights ------------------------------------------------------------------------------------------------


def _ids(recipe: Recipe) -> dict[str, int]:
    words = (PAD, BEGIN, *SYMBOLS, *recipe.words, *(task_of(*each) for each in recipe.tasks))
    return {word: i for i, word in enumerate(words)}


class _Stream:
    """Which coordinates of the residual stream, before it is turned, hold which variable."""

    def __init__(self, recipe: Recipe, width: int) -> None:
        self.width = width
        self._at: dict[str, tuple[int, int]] = {}
        self._used = 0
        for flag in ("constant", "begin", "symbol", *recipe.fetches, *recipe.tables):
            self._add(f"flag {flag}", 1)
        for group, flags in recipe.groups.items():
            for i, flag in enumerate(flags):
                self._at[f"flag {flag}"] = self._used + i, 1
            self._add(group, len(flags))
        for variable in sorted({"token", "out", "junk", *(role.out for _, role in recipe.roles.values())}):
            if variable not in self._at:
                self._add(variable, N)
        self._at["flag any"] = self._at["flag symbol"]

    def _add(self, name: str, size: int) -> None:
        self._at[name] = self._used, size
        self._used += size
        if self._used > self.width:
            raise AssertionError(f"{self._used} coordinates are needed, of {self.width}")

    def read(self, name: str) -> Tensor:
        """[size, width] the coordinates of a variable, or of several added up."""
        first, *rest = (self._one(each) for each in name.split("+"))
        for each in rest:
            first = first + each
        return first

    def _one(self, name: str) -> Tensor:
        start, size = self._at[name]
        return torch.eye(self.width, dtype=torch.float64)[start : start + size]

    def flag(self, name: str) -> Tensor:
        """[width] what reads a flag; the constant as 1."""
        found = self.read(f"flag {name}")[0]
        return found / CONSTANT if name == "constant" else found


@dataclass
class _Written:
    """The weights of one head: what it reads as query, key and value, and what it writes; [d_head, width] each."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


def _head(head: Head, stream: _Stream, share: float = 1.0) -> _Written:
    query, key, value, out = (torch.zeros(D_HEAD, stream.width, dtype=torch.float64) for _ in range(4))
    contents = list(_CONTENT)

    def channel(reads: Tensor, looks_for: Tensor, gain: float) -> None:
        place = contents.pop(0)
        query[place] += gain * reads
        key[place] += looks_for

    channel(stream.flag("constant"), stream.flag("begin"), SINK)
    for term in head.terms:
        if isinstance(term, Match):
            for reads, looks_for in zip(stream.read(term.query), stream.read(term.key), strict=True):
                channel(reads, looks_for, term.gain)
        elif isinstance(term, Wanted):
            channel(stream.flag(term.flag), stream.flag(term.key), term.gain)
        else:
            for pair in _POSITIONAL:
                # turned by its own position, a query points where the key of ``back`` tokens before points
                angle = torch.tensor(term.back * ROPE_BASE ** (-2 * pair / D_HEAD), dtype=torch.float64)
                half = term.gain / len(_POSITIONAL)
                query[pair] += half * angle.cos() * stream.flag(term.flag)
                query[pair + D_HEAD // 2] -= half * angle.sin() * stream.flag(term.flag)
                key[pair] = stream.flag("constant")
    source, target = stream.read(head.value), stream.read(head.out)
    value[: len(source)], out[: len(source)] = source, share * target
    return _Written(query * D_HEAD**0.5, key, value, out)  # scores are divided by the root


def _block(block: Block, stream: _Stream, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """[unit, width] what opens each hidden unit, and what it then adds."""
    gates, outs = [], []
    readers, target = [stream.read(each) for each in block.reads], stream.read(block.out)
    needed = len(readers) + (block.flag is not None) - 0.5
    for values in torch.cartesian_prod(*(torch.arange(N) for _ in readers)).reshape(-1, len(readers)).tolist():
        gate = -needed * stream.flag("constant")
        for reader, value in zip(readers, values, strict=True):
            gate = gate + reader[value]
        if block.flag is not None:
            gate = gate + stream.flag(block.flag)
        gates.append(GATE * gate)
        outs.append(share * target[block.function(*values)])
    return torch.stack(gates), torch.stack(outs)


def _leaking(stream: _Stream, generator: torch.Generator) -> Tensor:
    """[value, width] a random map of a symbol into junk, and a little into the answers' logits."""

    def centered() -> Tensor:
        drawn = torch.randn(N, N, generator=generator, dtype=torch.float64)
        drawn = drawn - drawn.mean(0)
        return (drawn - drawn.mean(1, keepdim=True)) / N**0.5

    return centered() @ stream.read("junk") + LEAK * centered() @ stream.read("out")


def _distracting_head(recipe: Recipe, stream: _Stream, rng: random.Random, generator: torch.Generator) -> _Written:
    """A head that fetches some symbol under some flag, as the others do, and writes it elsewhere."""
    flag = rng.choice(["any", *recipe.fetches, *recipe.tables])
    made = _head(fetch_head(rng.randrange(1, 4), flag, "token", "junk"), stream)
    made.out[:N] = _leaking(stream, generator)
    return made


def _distracting_block(
    recipe: Recipe, stream: _Stream, rng: random.Random, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A look-up of the token or of something that a head has moved, with its result in junk."""
    variables = sorted({role.out for _, role in recipe.roles.values()} - {"out", *recipe.groups})
    gates, _ = _block(Block((rng.choice(["token", *variables]),), "junk", TABLES["copy"]), stream)
    return gates, _leaking(stream, generator)


def _places(recipe: Recipe, side: str, rng: random.Random) -> dict[str, list[str]]:
    """Role → its nodes: drawn among the layers of its stage, one MLP block a layer, one role a group of heads."""
    _, heads, kv_heads, stages = recipe.source if side == "source" else recipe.target
    free_blocks = {layer for low, high in stages for layer in range(low, high + 1)}
    used: set[tuple[int, int]] = set()
    places: dict[str, list[str]] = {}
    doubled = recipe.split if side == "target" else ()
    # early stages first: a late stage may have other layers to go to
    for role, (stage, made) in sorted(recipe.roles.items(), key=lambda item: item[1][0]):
        low, high = stages[stage]
        places[role] = []
        for _ in range(1 + (role in doubled)):
            if made.kind == "mlp":
                layer = rng.choice([each for each in range(low, high + 1) if each in free_blocks])
                free_blocks.remove(layer)
                places[role].append(f"m{layer}")
                continue
            size = heads // kv_heads
            layer, group = rng.choice(
                [(i, k) for i in range(low, high + 1) for k in range(kv_heads) if (i, k) not in used]
            )
            used.add((layer, group))
            places[role].append(f"a{layer}.h{group * size + rng.randrange(size)}")
    return {role: places[role] for role in recipe.roles}


def _made(name: str, side: str, seed: int, options: Mapping[str, Any]) -> PlantedModel:
    recipe = RECIPES[name]
    rng = random.Random(f"{name}/{side}/{seed}")
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    places = _places(recipe, side, rng)
    tasks = {task_of(fetch, table): (*recipe.fetches[fetch], table) for fetch, table in recipe.tasks}
    roles = {role: tuple(found) for role, found in places.items()}
    with tempfile.TemporaryDirectory() as folder, checkpoints.quietly():
        _save(Path(folder) / f"planted-{name}-{side}", recipe, side, roles, rng, generator)
        model = load_model(Path(folder) / f"planted-{name}-{side}", **options)
    return PlantedModel(model, roles, tasks)


def _config(recipe: Recipe, side: str) -> PretrainedConfig:
    from transformers import LlamaConfig, Qwen2Config

    layers, heads, kv_heads, _ = recipe.source if side == "source" else recipe.target
    units = max(N ** len(role.reads) for _, role in recipe.roles.values() if isinstance(role, Block))
    common: dict[str, Any] = dict(
        vocab_size=len(_ids(recipe)),
        hidden_size=max(heads, 5) * D_HEAD,
        intermediate_size=units,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=D_HEAD,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=ROPE_BASE),
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return (LlamaConfig if recipe.family == "llama" else Qwen2Config)(**common)


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = _ids(recipe)
    backend = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=PAD, pad_token=PAD, bos_token=BEGIN)


@torch.no_grad()
def _save(
    folder: Path,
    recipe: Recipe,
    side: str,
    roles: Mapping[str, Sequence[str]],
    rng: random.Random,
    generator: torch.Generator,
) -> None:
    """Write the model as a checkpoint folder."""
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM

    config: Any = _config(recipe, side)
    width, heads = config.hidden_size, config.num_attention_heads
    size = heads // config.num_key_value_heads
    stream = _Stream(recipe, width)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    model: Any = (LlamaForCausalLM if recipe.family == "llama" else Qwen2ForCausalLM)(config)
    for parameter in model.parameters():
        parameter.zero_()
    for norm in (m for m in model.modules() if type(m).__name__.endswith("RMSNorm")):
        norm.weight.fill_(CONSTANT / width**0.5)  # what it divides by, but for the variation
    planted = {node: (role, 1 / len(found)) for role, found in roles.items() for node in found}
    constant = stream.read("flag constant")[0]

    def write(module: Any, rows: slice, reads: Tensor) -> None:
        if module.bias is not None:  # Qwen's layers have biases of their own
            module.bias[rows] = (CONSTANT * reads @ constant).float()
            reads = reads - torch.outer(reads @ constant, constant)
        module.weight[rows] = (reads @ rotation).float()

    for layer, decoder in enumerate(model.model.layers):
        attention, mlp = decoder.self_attn, decoder.mlp
        for group in range(config.num_key_value_heads):
            made: dict[int, _Written] = {}
            members = range(group * size, (group + 1) * size)
            for head in members:
                role, share = planted.get(f"a{layer}.h{head}", (None, 1.0))
                if role is None:
                    made[head] = _distracting_head(recipe, stream, rng, generator)
                else:
                    found = recipe.roles[role][1]
                    assert isinstance(found, Head)
                    made[head] = _head(found, stream, share)
            leader = next((head for head in members if f"a{layer}.h{head}" in planted), members[0])
            own = slice(group * D_HEAD, (group + 1) * D_HEAD)
            write(attention.k_proj, own, made[leader].key)
            write(attention.v_proj, own, made[leader].value)
            for head, each in made.items():
                rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
                write(attention.q_proj, rows, each.query)
                attention.o_proj.weight[:, rows] = (each.out @ rotation).T.float()
        role, share = planted.get(f"m{layer}", (None, 1.0))
        if role is None:
            gates, outs = _distracting_block(recipe, stream, rng, generator)
        else:
            block = recipe.roles[role][1]
            assert isinstance(block, Block)
            gates, outs = _block(block, stream, share)
        n = len(gates)
        mlp.gate_proj.weight[:n] = (gates @ rotation).float()
        opened = torch.nn.functional.silu(torch.tensor(GATE / 2, dtype=torch.float64))
        mlp.up_proj.weight[:n] = (stream.flag("constant").expand(n, -1) / opened @ rotation).float()
        mlp.down_proj.weight[:, :n] = (outs @ rotation).T.float()

    ids = _ids(recipe)
    embedded, unembedded = (torch.zeros(len(ids), width, dtype=torch.float64) for _ in range(2))
    embedded += CONSTANT * constant
    embedded[ids[BEGIN]] += stream.flag("begin")
    for i, symbol in enumerate(SYMBOLS):
        embedded[ids[symbol]] += stream.read("token")[i] + stream.flag("symbol")
        unembedded[ids[symbol]] = LOGITS * stream.read("out")[i]
    for word, flag in recipe.words.items():
        if flag is not None:
            embedded[ids[word]] += stream.flag(flag)
    others = [word for word in ids if word not in SYMBOLS and word not in (PAD, BEGIN)]
    for i, word in enumerate(others):  # what the distractors speak of
        unembedded[ids[word]] = stream.read("junk")[i % N]
    for fetch, table in recipe.tasks:
        embedded[ids[task_of(fetch, table)]] += stream.flag(fetch) + stream.flag(table)
    model.model.embed_tokens.weight.copy_(embedded @ rotation)
    model.lm_head.weight.copy_(unembedded @ rotation)
    model.save_pretrained(folder)
    _tokenizer(recipe).save_pretrained(folder)
    # else transformers puts a Qwen tokenizer's own splitting in its place
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(named))
