"""What every node does on one prompt, by one pass: attention patterns, direct effects on the logits, top tokens."""

from __future__ import annotations

import operator

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.arguments import expect
from dfa_lens.data.inspection import Inspection, TokenLogit
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import PromptError
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.runner import Runner
from dfa_lens.models.side_by_side import Layer, SideBySide

#: Rows of the unembedding that are looked at together; more would only take more memory.
CHUNK = 8192


@backend.runs("model")
def inspect(
    model: HookedModel, pairs: PromptPairs, *, example: int = 0, top: int = 5, patterns: bool = True
) -> Inspection:
    """Look at what every head and MLP block does on one prompt.

    One pass over the clean and the corrupt prompt of a pair. :func:`dfa_lens.plots.node_graph` draws what it finds.

    Parameters
    ----------
    model:
        In any precision; left as it was.
    pairs:
        Prompts, with this model's tokens. Texts of tokens need the tokenizer, the pairs' or the model's; without one
        they are numbers.
    example:
        Which pair.
    top:
        How many tokens are named that a node promotes, and that it suppresses.
    patterns:
        Whether attention patterns are kept, heads × tokens² numbers.

    Raises
    ------
    PromptError
        If there is no such pair, or it does not fit the model.
    ModelError
        If the model shows no attention patterns (fused kernels; ``patterns=False`` does without), a norm stands behind
        attention (Gemma 2), or the way from the residual stream to the logits can't be read.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=4)
    >>> found = dfa.inspect(model, pairs, example=1)
    >>> len(found.nodes), found.pattern("a3.h2").shape == (len(found.tokens),) * 2
    (54, True)
    >>> found.to_frame().columns.tolist()
    ['node', 'direct', 'promoted', 'suppressed', 'looks_at']
    """
    expect(2, "pairs", pairs, PromptPairs)
    number = operator.index(example)
    if not -len(pairs) <= number < len(pairs):
        raise PromptError(f"There is no example {number}: there are {len(pairs)} pairs.")
    runner = Runner(model)
    if not 1 <= top <= runner.d_vocab:
        raise PromptError(f"top must be between 1 and the {runner.d_vocab} tokens of the vocabulary, not {top}.")
    number %= len(pairs)
    pair = pairs[number : number + 1]
    runner.require(pair)
    nodes = NodeSet.heads_and_mlps(model)
    runner.check_points(nodes.points)
    outputs: list[Tensor] = []
    shown: list[Tensor] = []
    directions: list[Tensor] = []
    length = int(pair.lengths[0])
    kinds = {node.kind for node in nodes}

    def look(_: int, layer: Layer) -> None:
        if layer.kind not in kinds:
            return
        outputs.append(layer.output_at_answer[0].cpu())
        if layer.kind == "head":
            assert layer.direction is not None
            directions[:] = [layer.direction[0]]
            if patterns:
                shown.append(layer.pattern[0, :, :length, :length].cpu())

    with runner.session(), torch.no_grad():
        passes = SideBySide(runner, patterns=patterns, direct=True)
        scale = passes.run(pair, look)
        assert passes.norm is not None
        written = torch.cat(outputs) / scale
        direct = written @ directions[0].to(written)
        if passes.norm.centred:
            written = written - written.mean(-1, keepdim=True)
        if passes.norm.weight is not None:
            written = written * passes.norm.weight.detach().to(written)
        best, worst = _extremes(runner, written, top)
    tokenizer = pairs.tokenizer if pairs.tokenizer is not None else getattr(model, "tokenizer", None)

    def text(token: int) -> str:
        return str(token) if tokenizer is None else str(tokenizer.decode([token]))

    def named(found: tuple[Tensor, Tensor]) -> tuple[tuple[TokenLogit, ...], ...]:
        rows = zip(*(each.tolist() for each in found), strict=True)
        return tuple(
            tuple(TokenLogit(text(token), token, logit) for logit, token in zip(*row, strict=True)) for row in rows
        )

    return Inspection(
        nodes,
        tuple(text(token) for token in pair.clean[0, :length].tolist()),
        text(int(pair.answer[0])),
        text(int(pair.wrong[0])),
        direct,
        named(best),
        named(worst),
        torch.cat(shown) if patterns else None,
    )


def _extremes(
    runner: Runner, written: Float[Tensor, "node d_model"], top: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The largest and the smallest logits [node, top] that what is written gives, less their mean, with the tokens."""
    best: list[Tensor] = []
    worst: list[Tensor] = []
    total = torch.zeros(len(written), dtype=torch.float64)
    tokens: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first in range(0, runner.d_vocab, CHUNK):
        columns, _ = runner.backend.unembedding_columns(torch.arange(first, min(first + CHUNK, runner.d_vocab)))
        columns = columns.detach().to(torch.promote_types(columns.dtype, torch.float32))
        logits = (written.to(columns) @ columns.T).cpu()
        total += logits.double().sum(1)
        k = min(top, logits.shape[1])
        for values, ids, largest in ((best, tokens[0], True), (worst, tokens[1], False)):
            found = logits.topk(k, dim=1, largest=largest)
            values.append(found.values)
            ids.append(found.indices + first)
    mean = (total / runner.d_vocab).float()[:, None]

    def merged(values: list[Tensor], ids: list[Tensor], largest: bool) -> tuple[Tensor, Tensor]:
        found = torch.cat(values, 1).topk(top, dim=1, largest=largest)
        return found.values - mean, torch.cat(ids, 1).gather(1, found.indices)

    return merged(best, tokens[0], True), merged(worst, tokens[1], False)
