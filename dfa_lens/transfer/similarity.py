"""How alike a source node and a target node are, from what any model has: kind, depth, attention, behaviour.

Each function ends in a matrix [source, target] for :class:`dfa_lens.transfer.forms.Kernel`. None looks at the task
that is transferred later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfa_lens.data.content import ByContent
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import AlignmentError, NodeError
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel, HookFunction
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner

ATTENTION = ("previous-token", "duplicate-token", "induction", "first-token", "current-token")
"""What :func:`attention_features` measures, in order."""


def same_kind(source: NodeSet, target: NodeSet) -> Float[Tensor, "source target"]:
    """1 where both are heads, or both MLP blocks, or both of another same kind; else 0.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.similarity.same_kind(dfa.NodeSet.for_sizes(1, 1), dfa.NodeSet.for_sizes(1, 1)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return torch.tensor([[float(a.kind == b.kind) for b in target] for a in source], dtype=torch.float32)


def depth_gap(source: NodeSet, target: NodeSet) -> Float[Tensor, "source target"]:
    """Relative depth of the target node less that of the source node; 0 is the first layer, 1 the last.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.similarity.depth_gap(dfa.NodeSet.for_sizes(2, 1), dfa.NodeSet.for_sizes(3, 1))[0].tolist()
    [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    """

    def depths(nodes: NodeSet) -> Tensor:
        last = max(nodes.n_layers - 1, 1)
        return torch.tensor([max(node.layer, 0) / last for node in nodes], dtype=torch.float32)

    return depths(target)[None, :] - depths(source)[:, None]


def kind_and_depth(source: NodeSet, target: NodeSet, *, width: float = 0.15) -> Float[Tensor, "source target"]:
    """exp(−(gap/width)²) between nodes of the same kind, 0 between others; the gap is that of relative depth.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source, target = dfa.NodeSet.for_sizes(2, 1), dfa.NodeSet.for_sizes(3, 1)
    >>> dfa.similarity.kind_and_depth(source, target)[0].round(decimals=2).tolist()
    [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if not width > 0:
        raise AlignmentError(f"width must be positive, not {width}.")
    return same_kind(source, target) * torch.exp(-((depth_gap(source, target) / width) ** 2))


@dataclass(frozen=True, eq=False)
class NodeFeatures(ByContent):
    """One row of numbers per node: how a head attends; zeros for what is no head."""

    values: Float[Tensor, "node feature"]
    nodes: NodeSet
    names: tuple[str, ...] = ATTENTION


@backend.runs("model")
def attention_features(
    model: HookedModel,
    nodes: NodeSet | None = None,
    *,
    pairs: PromptPairs | None = None,
    prompts: int = 32,
    length: int = 24,
    seed: int = 0,
    batch_size: int = 32,
) -> NodeFeatures:
    """How much each head attends to the previous token, to the same token before, to what followed it, to the first.

    The mean attention that a query gives to the token before it ("previous-token"), to earlier occurrences of its own
    token ("duplicate-token"), to what came after those ("induction"), to the first token and to itself; each over the
    queries that have such keys.

    Parameters
    ----------
    model:
        Left as it was.
    nodes:
        Default: all heads and MLP blocks. Only nodes of kind "head" are measured.
    pairs:
        Whose clean prompts to measure on; take training tasks only. Default: random tokens that are repeated once,
        queries in the second half: no task is needed, but a small model that never saw such text may attend to nothing
        in particular there.
    prompts, length:
        Number of random prompts and of tokens before the repetition.
    seed:
        Of the random tokens; the global random state is neither read nor changed.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> dfa.similarity.attention_features(model).values.shape
    torch.Size([54, 5])
    """
    runner = Runner(model)
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(model)
    if pairs is None:
        if min(prompts, length) < 1:
            raise AlignmentError(f"prompts and length must be at least 1, not {prompts} and {length}.")
        tokens = _repeated(model, prompts, length, seed)
        lengths = torch.full((prompts,), tokens.shape[1])
        if runner.n_ctx is not None and tokens.shape[1] > runner.n_ctx:
            raise AlignmentError(
                f"{tokens.shape[1]} tokens are more than the model's context of {runner.n_ctx}: lower length."
            )
        wanted = _keys_of_repeated(tokens, length)
    else:
        runner.require(pairs)
        tokens, lengths = pairs.clean, pairs.lengths
        wanted = keys_of(tokens, lengths)
    heads = [(i, node) for i, node in enumerate(nodes) if node.kind == "head"]
    points = {node.layer: f"blocks.{node.layer}.attn.hook_pattern" for _, node in heads}
    runner.points(points.values())
    totals: dict[int, Tensor] = {}
    queries = wanted.any(-1).sum((0, 2)).clamp_min(1)  # [feature]: queries that have such keys

    def look(layer: int, own: Tensor) -> HookFunction:
        def function(pattern: Tensor) -> None:  # [batch, head, query, key]
            mass = torch.einsum("bhqk,bfqk->hf", pattern.float(), own.to(pattern.device, torch.float32)).cpu()
            totals[layer] = totals.get(layer, torch.zeros_like(mass)) + mass

        return function

    with runner.session(), torch.no_grad():
        together = runner.together(lengths)
        for rows in (rows for group in together for rows in group.split(batch_size)):
            taps = [(point, look(layer, wanted[rows])) for layer, point in points.items()]
            runner.run(tokens[rows], lengths[rows], taps, positions="all")
    out = torch.zeros(len(nodes), len(ATTENTION), dtype=torch.float32)
    for i, node in heads:
        if node.index is None or node.index >= len(totals[node.layer]):
            raise NodeError(f"Node {node.name!r} is not one of the model's {len(totals[node.layer])} heads.")
        out[i] = totals[node.layer][node.index] / queries
    return NodeFeatures(out, nodes)


def keys_of(
    tokens: Int[Tensor, "prompt pos"], lengths: Int[Tensor, " prompt"]
) -> Bool[Tensor, "prompt feature pos pos"]:
    """Which keys count for which feature of :data:`ATTENTION`, for every query of real prompts but the first.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> found = dfa.similarity.keys_of(torch.tensor([[5, 6, 5, 0]]), torch.tensor([3]))
    >>> found[0, 1, 2].tolist()  # the third token is a copy of the first
    [True, False, False, False]
    """
    n = tokens.shape[1]
    where = torch.arange(n)
    query, key = where[:, None], where[None, :]
    same = tokens[:, :, None] == tokens[:, None, :]  # [prompt, query, key]
    followed = torch.zeros_like(same)
    followed[:, :, 1:] = same[:, :, :-1]  # the key before this one is the query's token
    parts = [key == query - 1, same & (key < query), followed & (key <= query) & (query > 0), key == 0, key == query]
    real = (where < lengths[:, None])[:, None, :, None] & (query > 0)
    return torch.stack([part.expand_as(same) for part in parts], 1) & real


def _keys_of_repeated(tokens: Int[Tensor, "prompt pos"], length: int) -> Bool[Tensor, "prompt feature pos pos"]:
    """The same for random tokens that are repeated: queries of the second half, and the one key that was meant."""
    n = tokens.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)[None, :]
    parts = [
        key == query - 1,
        key == query - length,
        key == query - length + 1,
        (key == 0) & (query >= 0),
        key == query,
    ]
    return (torch.stack(parts) & (query >= n - length)).expand(len(tokens), -1, -1, -1)


def _repeated(model: Any, prompts: int, length: int, seed: int) -> Tensor:
    """Random tokens twice over, after a begin-of-text token where the tokenizer has one."""
    tokenizer = getattr(model, "tokenizer", None)
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    usable = torch.tensor([i for i in range(int(model.cfg.d_vocab)) if i not in special])
    chosen = torch.randint(len(usable), (prompts, length), generator=torch.Generator().manual_seed(seed))
    half = usable[chosen]
    begin = getattr(tokenizer, "bos_token_id", None)
    parts = [half, half] if begin is None else [torch.full((prompts, 1), int(begin)), half, half]
    return torch.cat(parts, 1)


def attention_similarity(
    source: NodeFeatures, target: NodeFeatures, *, width: float = 0.3
) -> Float[Tensor, "source target"]:
    """exp(−|difference of features|²/width²) between nodes of the same kind, wherever they stand; 0 between others.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("llama3-tiny-target")
    >>> first, second = (dfa.similarity.attention_features(model) for model in (source, target))
    >>> dfa.similarity.attention_similarity(first, second).shape
    torch.Size([54, 110])
    """
    if not width > 0:
        raise AlignmentError(f"width must be positive, not {width}.")
    if source.names != target.names:
        raise AlignmentError(f"The features differ: {source.names} and {target.names}.")
    distance = torch.cdist(source.values, target.values)
    return same_kind(source.nodes, target.nodes) * torch.exp(-((distance / width) ** 2))


@backend.runs("source", "target")
def cka_similarity(
    source: HookedModel,
    source_pairs: PromptPairs,
    target: HookedModel,
    target_pairs: PromptPairs,
    *,
    source_nodes: NodeSet | None = None,
    target_nodes: NodeSet | None = None,
    batch_size: int = 32,
) -> Float[Tensor, "source target"]:
    """Linear CKA of what two nodes do at the answer position, over the same clean prompts; 0 between kinds.

    CKA(X, Y) = ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖) with X, Y [example, width] centred over examples: 1 when both nodes tell the
    examples apart in the same way, whatever their widths (Kornblith et al. 2019, eq. 4).

    Parameters
    ----------
    source_pairs, target_pairs:
        The same examples in the same order, each with its own model's tokens. Take training tasks only.

    Raises
    ------
    AlignmentError
        If the two have different numbers of examples.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("llama3-tiny-target")
    >>> first, second = (dfa.tasks.load("ioi", model.tokenizer, n=4) for model in (source, target))
    >>> dfa.similarity.cka_similarity(source, first, target, second).shape
    torch.Size([54, 110])
    """
    if len(source_pairs) != len(target_pairs):
        raise AlignmentError(
            f"There are {len(source_pairs)} source and {len(target_pairs)} target examples: the same ones are needed."
        )
    nodes = (
        source_nodes if source_nodes is not None else NodeSet.heads_and_mlps(source),
        target_nodes if target_nodes is not None else NodeSet.heads_and_mlps(target),
    )
    ours = _at_answer(source, source_pairs, nodes[0], batch_size)
    theirs = _at_answer(target, target_pairs, nodes[1], batch_size)
    grams = [[(x.T @ x).norm() for x in each] for each in (ours, theirs)]
    out = torch.zeros(len(ours), len(theirs), dtype=torch.float32)
    alike = same_kind(*nodes).bool()
    for i, j in alike.nonzero().tolist():
        scale = grams[0][i] * grams[1][j]
        if scale > 0:
            out[i, j] = (ours[i].T @ theirs[j]).norm() ** 2 / scale
    return out


def _at_answer(model: HookedModel, pairs: PromptPairs, nodes: NodeSet, batch_size: int) -> list[Tensor]:
    """What every node computes at the answer position, [example, width], centred over examples."""
    runner = Runner(model)
    runner.require(pairs)
    runner.check_points(nodes.points)
    parts: list[list[Tensor]] = [[] for _ in nodes]
    with runner.session(), torch.no_grad():
        for _, batch in runner.batches(pairs, batch_size):
            run = PairedRun(runner, batch, nodes, share_prefix=False, positions="all")
            seen, _ = run.record("clean")
            for site in nodes.sites:
                activation = seen[site.point]
                if site.by_position or activation.ndim < 3 or activation.shape[1] != batch.clean.shape[1]:
                    raise NodeError(f"Hook point {site.point!r} has no axis of positions: its nodes can't be compared.")
                last = activation[torch.arange(len(batch)), batch.lengths.to(activation.device) - 1].float().cpu()
                for k, position in enumerate(site.positions):
                    own = last if site.axis is None else last.select(site.axis - 1, site.slices[k])
                    parts[position].append(own.reshape(len(batch), -1))
    whole = [torch.cat(part) for part in parts]
    return [each - each.mean(0) for each in whole]
