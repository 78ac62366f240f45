"""What the masks are and what is minimised: soft masks, their sparsity, and the distance to the clean run.

The loss of a step is mean(divergence) + penalty. An :class:`Objective` makes masks and penalty from transferred
scores, :data:`Loss` names the divergence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from dfa_lens.data import metrics
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.registry import Registry
from dfa_lens.data.soft_top_k import gates_of_size
from dfa_lens.errors import AlignmentError, unknown
from dfa_lens.models.passes import attention_mask

Loss = Literal["kl", "logit-difference", "probability"]
"""How far the masked run is from the clean one (with ``direction="noising"`` from the corrupt one, which stands for it
below, too); each averaged over examples.

- ``kl``: KL(P_clean ‖ P_masked) (the paper).
- ``logit-difference``: ``((m_masked − m_clean) / mean |m_clean|)²`` with m = logit(answer) − logit(wrong); answer
  position only. Asks for less than kl: other tokens may move.
- ``probability``: (P_clean(answer) − P_masked(answer))²; answer position only.
"""


def distance(
    loss: Loss,
    log_p_goal: Float[Tensor, "*position vocab"],
    logits: Float[Tensor, "*position vocab"],
    pairs: PromptPairs,
) -> Float[Tensor, " example"]:
    """How far each example's masked run is from its goal; the logit difference in logits, not yet in its unit.

    Parameters
    ----------
    log_p_goal, logits:
        Log probabilities of the run that is the goal (the clean one) and logits of the masked one: at the answer,
        [example, vocab], or at every position, [example, pos, vocab], where ``kl`` is summed over those that are real
        in both prompts.
    """
    log_p = logits.float().log_softmax(-1)
    goal = log_p_goal.to(log_p.device)
    if loss == "kl":
        divergence = metrics.divergence(goal, log_p)
        if log_p.ndim == 3:
            shortest = torch.minimum(pairs.lengths, pairs.corrupt_lengths)
            real = attention_mask(shortest.to(divergence.device), divergence.shape[1])
            divergence = (divergence * real).sum(1)
        return divergence
    rows = torch.arange(len(pairs), device=log_p.device)
    answer, wrong = pairs.answer.to(log_p.device), pairs.wrong.to(log_p.device)
    if loss == "probability":
        return (goal[rows, answer].exp() - log_p[rows, answer].exp()) ** 2
    masked_difference, goal_difference = (each[rows, answer] - each[rows, wrong] for each in (log_p, goal))
    return (masked_difference - goal_difference) ** 2


class Masks(NamedTuple):
    """[example, node] what each node is gated with, and [example] what is added to each example's loss."""

    gates: Float[Tensor, "example node"]
    penalty: Float[Tensor, " example"]


class Objective(ABC):
    """Makes masks of transferred scores; derive from it for one of your own."""

    name: ClassVar[str]

    @abstractmethod
    def masks(
        self, scores: Float[Tensor, "example node"], *, temperature: float, progress: float, generator: torch.Generator
    ) -> Masks:
        """Masks and penalty.

        Parameters
        ----------
        scores:
            ŝ of each example's task; masks must be differentiable in it.
        temperature:
            T in sigmoid(ŝ/T) at this step.
        progress:
            From 0 at the first step to nearly 1 at the last.
        generator:
            The only source of randomness.
        """

    def weighted(self, sparsity_weight: float) -> Objective:
        """The same objective with another λ.

        Raises
        ------
        AlignmentError
            If the objective has no field ``sparsity_weight``.
        """
        if not hasattr(self, "sparsity_weight"):
            raise AlignmentError(f"The objective {self.name!r} has no sparsity_weight.")
        return replace(self, sparsity_weight=sparsity_weight)  # type: ignore[type-var]


@dataclass(frozen=True)
class Sparse(Objective):
    """g = sigmoid(ŝ/T), penalty λ·mean(g): the paper's objective.

    Attributes
    ----------
    sparsity_weight:
        λ. Measured on the shipped models (docs/method.md), 3 to 10 rank about equally well, 0.1 (the paper) keeps
        nearly everything, 30 begins to cost.
    """

    name: ClassVar[str] = "sparse"
    sparsity_weight: float = 10.0

    @override
    def masks(
        self, scores: Float[Tensor, "example node"], *, temperature: float, progress: float, generator: torch.Generator
    ) -> Masks:
        gates = torch.sigmoid(scores / temperature)
        return Masks(gates, self.sparsity_weight * gates.mean(1))


@dataclass(frozen=True)
class TargetSize(Objective):
    """g = sigmoid(ŝ/T), penalty λ·((mean(g) − fraction)/fraction)²: circuits of one size.

    Attributes
    ----------
    fraction:
        The part of the nodes to keep.
    sparsity_weight:
        λ, the weight of the penalty.
    """

    name: ClassVar[str] = "target-size"
    fraction: float = 0.2
    sparsity_weight: float = 10.0

    @override
    def masks(
        self, scores: Float[Tensor, "example node"], *, temperature: float, progress: float, generator: torch.Generator
    ) -> Masks:
        if not 0 < self.fraction < 1:
            raise AlignmentError(f"fraction must be between 0 and 1, not {self.fraction}.")
        gates = torch.sigmoid(scores / temperature)
        return Masks(gates, self.sparsity_weight * (gates.mean(1) / self.fraction - 1) ** 2)


@dataclass(frozen=True)
class Matryoshka(Objective):
    """One ranking for every size: each example draws a size k, and its mask is shifted until it holds k nodes.

    g = sigmoid((ŝ/std(ŝ) − b)/sharpness) with b such that Σg = k; no penalty, since the size is given. At sizes below
    the smallest working circuit there is next to no gradient, so the first part of the training ("warm-up") uses
    :class:`Sparse`. Without it, some rankings put a node last that everything needs, and never recover.

    Attributes
    ----------
    sharpness:
        Temperature of the shifted mask, in standard deviations of ŝ; small is hard.
    sizes:
        How k is drawn: "uniform" over 1 … n−1, which is what CPR averages over, or "log-uniform".
    straight_through:
        True runs the hard circuit of the k best nodes and takes the gradient of the soft mask.
    warm_up:
        Part of the steps that :class:`Sparse` takes.
    sparsity_weight:
        λ of the warm-up.
    """

    name: ClassVar[str] = "matryoshka"
    sharpness: float = 0.3
    sizes: Literal["uniform", "log-uniform"] = "uniform"
    straight_through: bool = False
    warm_up: float = 0.5
    sparsity_weight: float = 10.0

    @override
    def masks(
        self, scores: Float[Tensor, "example node"], *, temperature: float, progress: float, generator: torch.Generator
    ) -> Masks:
        if self.sizes not in ("uniform", "log-uniform"):
            raise unknown("sizes", self.sizes, ("uniform", "log-uniform"), AlignmentError)
        if not self.sharpness > 0 or not 0 <= self.warm_up <= 1:
            raise AlignmentError(
                f"sharpness must be positive and warm_up between 0 and 1, not {self.sharpness} and {self.warm_up}."
            )
        if progress < self.warm_up:
            warm = Sparse(self.sparsity_weight)
            return warm.masks(scores, temperature=temperature, progress=progress, generator=generator)
        n = scores.shape[1]
        if n < 2:
            raise AlignmentError("Matryoshka needs at least two nodes.")
        drawn = torch.rand(len(scores), generator=generator, dtype=torch.float32).to(scores.device)
        sizes = 1 + drawn * (n - 2) if self.sizes == "uniform" else torch.exp(drawn * math.log(n - 1))
        gates = gates_of_size(scores / (scores.std(1, keepdim=True) + 1e-6), sizes, self.sharpness)
        if self.straight_through:
            best = scores.detach().argsort(dim=1, descending=True).argsort(dim=1)
            hard = (best < sizes.round()[:, None]).to(gates.dtype)
            gates = hard + gates - gates.detach()
        return Masks(gates, torch.zeros_like(drawn))


OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective", AlignmentError, {kind.name: kind for kind in (Sparse, TargetSize, Matryoshka)}
)
"""The objectives by name; add one of your own by ``register``, or pass an instance."""


def resolve(objective: object) -> Objective:
    """The objective of that name with its defaults; an instance is returned unchanged."""
    return objective if isinstance(objective, Objective) else OBJECTIVES.find(objective)()
