"""The training of optimal constants: what costs least where nodes are left out (see ``ablations.Optimal``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.data.metrics import divergence
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import TrainingError
from dfa_lens.models.ablations import Optimal, expanded
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.passes import Layout
from dfa_lens.models.runner import Runner


def train(
    runner: Runner,
    nodes: NodeSet,
    pairs: PromptPairs,
    layouts: Mapping[str, Layout],
    start: Mapping[str, Tensor],
    spreads: Mapping[str, float],
    settings: Optimal,
) -> dict[str, Tensor]:
    """Hook point → the trained constants, of the shape of what they start from; of the nodes' points.

    Parameters
    ----------
    start:
        Where they begin: the means.
    spreads:
        The unit of each hook point, so that one learning rate suits all of them.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    points = nodes.points
    with torch.enable_grad():
        moved = {point: torch.zeros_like(start[point], requires_grad=True) for point in points}
        optimiser = torch.optim.Adam(moved.values(), lr=settings.lr)
        for step, rows in zip(range(settings.steps), _batches(len(pairs), settings, generator), strict=False):
            made = {point: start[point] + spreads[point] * moved[point] for point in points}
            loss = torch.stack(
                [
                    _loss(runner, nodes, pairs[rows[own]], layouts, made, settings, generator)
                    for own in runner.together(pairs.longest[rows])
                ]
            ).sum() / len(rows)
            if not bool(loss.isfinite()):
                raise TrainingError(f"The loss of the optimal constants became {float(loss)} at step {step}: lower lr.")
            gradients = torch.autograd.grad(loss, list(moved.values()))
            for leaf, gradient in zip(moved.values(), gradients, strict=True):
                leaf.grad = gradient
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    return {point: (start[point] + spreads[point] * moved[point]).detach() for point in points}


def _loss(
    runner: Runner,
    nodes: NodeSet,
    batch: PromptPairs,
    layouts: Mapping[str, Layout],
    made: Mapping[str, Tensor],
    settings: Optimal,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """KL(P_clean ‖ P), summed over a batch, with some of the nodes at their constants."""
    run = PairedRun(runner, batch, nodes, share_prefix=False)
    _, clean = run.record("clean", nodes=False)
    masks = _left_out(len(batch), len(nodes), settings, generator)
    dtype = runner.backend.dtype
    instead: dict[str, Any] = {point: expanded(value.to(dtype), layouts[point], batch) for point, value in made.items()}
    logits = run.gated(nodes, 1 - masks, corrupt=instead)
    return divergence(clean.float().log_softmax(-1), logits.float().log_softmax(-1)).sum()


def _left_out(n: int, n_nodes: int, settings: Optimal, generator: torch.Generator) -> Float[Tensor, "example node"]:
    """1 where a node of an example is left out."""
    if settings.circuits == "one":
        chosen = torch.randint(n_nodes, (n,), generator=generator)
        return torch.nn.functional.one_hot(chosen, n_nodes).float()
    parts = torch.rand(n, 1, generator=generator, dtype=torch.float32)
    return (torch.rand(n, n_nodes, generator=generator, dtype=torch.float32) < parts).float()


def _batches(n: int, settings: Optimal, generator: torch.Generator) -> Iterator[Int[Tensor, " example"]]:
    """Whole shuffled epochs, one after the other."""
    while True:
        yield from torch.randperm(n, generator=generator).split(settings.batch_size)
