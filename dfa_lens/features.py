"""How alike a source node and a target node are, from what any model has: kind, depth, attention, behaviour.

Each function ends in a matrix [source, target] for :class:`dfa_lens.parameterisation.Kernel`. None looks at the task
that is transferred later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens import adapter, hooks
from dfa_lens.adapter import HookedModel
from dfa_lens.errors import AlignmentError, NodeError
from dfa_lens.nodes import NodeSet
from dfa_lens.prompts import PromptPairs

ATTENTION = ("previous-token", "duplicate-token", "induction", "first-token", "current-token")
"""What :func:`attention_features` measures, in order."""


def same_kind(source: NodeSet, target: NodeSet) -> Float[Tensor, "source target"]:
    """1 where both are heads, or both MLP blocks, or both of another same kind; else 0."""
    return torch.tensor([[float(a.kind == b.kind) for b in target] for a in source])


def depth_gap(source: NodeSet, target: NodeSet) -> Float[Tensor, "source target"]:
    """Relative depth of the target node less that of the source node; 0 is the first layer, 1 the last."""

    def depths(nodes: NodeSet) -> Tensor:
        return torch.tensor([max(node.layer, 0) / max(nodes.n_layers - 1, 1) for node in nodes])

    return depths(target)[None, :] - depths(source)[:, None]


def kind_and_depth(source: NodeSet, target: NodeSet, *, width: float = 0.15) -> Float[Tensor, "source target"]:
    """exp(−(gap/width)²) between nodes of the same kind, 0 between others; the gap is that of relative depth."""
    if not width > 0:
        raise AlignmentError(f"width must be positive, not {width}.")
    return same_kind(source, target) * torch.exp(-((depth_gap(source, target) / width) ** 2))


@dataclass(frozen=True)
class NodeFeatures:
    """One row of numbers per node: how a head attends; zeros for what is no head."""

    values: Float[Tensor, "node feature"]
    nodes: NodeSet
    names: tuple[str, ...] = ATTENTION


def attention_features(
    model: HookedModel, nodes: NodeSet | None = None, *, prompts: int = 32, length: int = 24, seed: int = 0
) -> NodeFeatures:
    """How much each head attends to the previous token, to the same token before, to what followed it, to the first.

    Measured on random tokens that are repeated once, so no task is needed: the mean attention, over the second half,
    on the token before ("previous-token"), on the same token in the first half ("duplicate-token"), on the one after
    that ("induction"), on the first of all and on itself.

    Parameters
    ----------
    model:
        Left as it was.
    nodes:
        Default: all heads and MLP blocks. Only nodes of kind "head" are measured.
    prompts, length:
        Number of prompts and of tokens before the repetition.
    seed:
        Of the random tokens; the global random state is neither read nor changed.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> dfa.features.attention_features(model).values.shape
    torch.Size([54, 5])
    """
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(model)
    if min(prompts, length) < 1:
        raise AlignmentError(f"prompts and length must be at least 1, not {prompts} and {length}.")
    tokens = _repeated(model, prompts, length, seed)
    heads = [(i, node) for i, node in enumerate(nodes) if node.kind == "head"]
    out = torch.zeros(len(nodes), len(ATTENTION))
    total = tokens.shape[1]
    if total > model.cfg.n_ctx:
        raise AlignmentError(f"{total} tokens are more than the model's context of {model.cfg.n_ctx}: lower length.")
    here = torch.arange(total - length, total)
    found: dict[int, Tensor] = {}

    def look(layer: int) -> adapter.HookFunction:
        def function(pattern: Tensor) -> None:  # [batch, head, query, key]
            rows = here.to(pattern.device)
            keys = (rows - 1, rows - length, rows - length + 1, torch.zeros_like(rows), rows)
            parts = [pattern[:, :, rows, key].float().mean((0, 2)) for key in keys]
            found[layer] = torch.stack(parts, -1).cpu()

        return function

    points = {node.layer: f"blocks.{node.layer}.attn.hook_pattern" for _, node in heads}
    adapter.points(model, list(points.values()))
    with torch.no_grad(), adapter.frozen(model):
        lengths = torch.full((prompts,), total)
        adapter.run(model, tokens, lengths, [(point, look(layer)) for layer, point in points.items()])
    for i, node in heads:
        if node.index is None or node.index >= len(found[node.layer]):
            raise NodeError(f"Node {node.name!r} is not one of the model's {len(found[node.layer])} heads.")
        out[i] = found[node.layer][node.index]
    return NodeFeatures(out, nodes)


def _repeated(model: HookedModel, prompts: int, length: int, seed: int) -> Tensor:
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
    """exp(−|difference of features|²/width²) between nodes of the same kind, wherever they stand; 0 between others."""
    if not width > 0:
        raise AlignmentError(f"width must be positive, not {width}.")
    if source.names != target.names:
        raise AlignmentError(f"The features differ: {source.names} and {target.names}.")
    distance = torch.cdist(source.values, target.values)
    return same_kind(source.nodes, target.nodes) * torch.exp(-((distance / width) ** 2))


def behaviour_similarity(
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
    out = torch.zeros(len(ours), len(theirs))
    alike = same_kind(*nodes).bool()
    for i, j in alike.nonzero().tolist():
        scale = grams[0][i] * grams[1][j]
        if scale > 0:
            out[i, j] = (ours[i].T @ theirs[j]).norm() ** 2 / scale
    return out


def _at_answer(model: HookedModel, pairs: PromptPairs, nodes: NodeSet, batch_size: int) -> list[Tensor]:
    """What every node computes at the answer position, [example, width], centred over examples."""
    pairs.require(d_vocab=int(model.cfg.d_vocab), n_ctx=model.cfg.n_ctx)
    adapter.check_points(model, nodes.points)
    parts: list[list[Tensor]] = [[] for _ in nodes]
    with torch.no_grad(), adapter.frozen(model):
        for _, batch in pairs.batches(batch_size):
            seen: dict[str, Tensor] = {}
            adapter.run(model, batch.clean, batch.lengths, hooks.record_hooks(nodes, seen), positions="all")
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
