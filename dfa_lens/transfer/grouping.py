"""Which prompts go through the model together: as many as can, but none that padding costs more than it saves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

#: What a pass costs on a CPU beside its tokens, in tokens (27 to 128: `python tests/benchmarks/speed.py --overhead`).
PASS_IN_TOKENS = 64


def cheapest(spans: Sequence[tuple[int, int]], *, pass_in_tokens: int = PASS_IN_TOKENS) -> list[Int[Tensor, " group"]]:
    """The groups that cost least where a pass takes what its tokens take, and something beside.

    Prompts of another length, or with a shorter common beginning, are better off in a pass of their own as soon as the
    padding that this saves exceeds what a pass costs. Sorted by their spans, the groups are neighbours, so the best
    division of the first j kinds of span is found from those of fewer.

    Parameters
    ----------
    spans:
        Of each prompt, where its tokens end and where those that must be run begin.
    pass_in_tokens:
        What a pass costs beside its tokens.

    Examples
    --------
    >>> from dfa_lens.transfer.grouping import cheapest
    >>> [group.tolist() for group in cheapest([(10, 0), (40, 0), (11, 0), (40, 0)], pass_in_tokens=20)]
    [[1, 3], [0, 2]]
    """
    kinds: dict[tuple[int, int], list[int]] = {}
    for prompt, span in enumerate(spans):
        kinds.setdefault(span, []).append(prompt)
    order = sorted(kinds)
    best: list[tuple[int, int]] = [(0, 0)]  # of the first j kinds: the cost, and where the last group begins
    for j in range(1, len(order) + 1):
        options = []
        for i in range(j):
            some = order[i:j]
            width = some[-1][0] - min(first for _, first in some)
            options.append((best[i][0] + pass_in_tokens + width * sum(len(kinds[kind]) for kind in some), i))
        best.append(min(options))
    found, j = [], len(order)
    while j:
        i = best[j][1]
        found.append(torch.tensor(sorted(prompt for kind in order[i:j] for prompt in kinds[kind])))
        j = i
    return found
