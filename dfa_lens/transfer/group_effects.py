"""What whole groups of nodes do, exactly: all heads of a layer together, or one MLP block.

Two runs cannot show an early node's indirect effect. Setting a whole group to its corrupt activations does, and there
are only two groups a layer: 2 + 2L passes, on a few pairs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner


def group_effects(
    runner: Runner, pairs: PromptPairs, nodes: NodeSet, *, batch_size: int = 16
) -> tuple[Float[Tensor, " group"], float]:
    """m(clean) − m(clean with the group at its corrupt activations) of every group, and m(clean) − m(corrupt).

    Parameters
    ----------
    runner, pairs:
        The model, and the pairs over which effects are averaged; m is logit(answer) − logit(wrong).
    nodes:
        Cut into groups by hook point: one of ``nodes.sites`` is one group.
    batch_size:
        Rows a pass: groups share a pass where there is room.
    """
    sites = nodes.sites
    totals, whole = torch.zeros(len(sites), dtype=torch.float64), 0.0
    with runner.session(passes=len(sites) + 2), torch.no_grad():
        for _, batch in runner.batches(pairs, batch_size):
            run = PairedRun(runner, batch, nodes, columns=torch.stack([batch.answer, batch.wrong], 1))
            corrupt, corrupt_logits = run.record("corrupt")
            restarts = runner.restarts(nodes) if runner.allows("start", batch.clean.shape[1]) else []
            _, clean_logits = run.record("clean", nodes=False, streams=restarts)
            clean = _difference(clean_logits)
            whole += float((clean - _difference(corrupt_logits)).sum())
            room = max(1, batch_size // len(batch))
            for layer in sorted({site.layer for site in sites}):
                own = [i for i, site in enumerate(sites) if site.layer == layer]
                for some in (own[first : first + room] for first in range(0, len(own), room)):
                    subset = nodes[[position for i in some for position in sites[i].positions]]
                    masks = torch.ones(len(some), len(subset), dtype=torch.float32)
                    group = [row for row, i in enumerate(some) for _ in sites[i].positions]
                    masks[group, range(len(subset))] = 0
                    rows = masks.repeat_interleave(len(batch), 0)
                    values = _difference(run.gated(subset, rows, corrupt=corrupt, layer=layer))
                    totals[some] += (clean - values.unflatten(0, (len(some), -1))).sum(1)
    return (totals / len(pairs)).float(), whole / len(pairs)


def _difference(logits: Float[Tensor, "row 2"]) -> Float[Tensor, " row"]:
    return (logits[:, 0].double() - logits[:, 1].double()).cpu()
