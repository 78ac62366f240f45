"""Rankings that are learned: masks of the nodes, trained on one model by what its circuits do.

The clean prompts are run with every node at g·(what it computes) + (1 - g)·(its corrupt activation), so that a mask of
zeros and ones is exactly a circuit of the faithfulness curve, and the numbers that the masks are made of are trained by
Adam. Every step takes a group of the pairs, and each of its examples draws a mask of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.attribution.method import Batch, Measurement, Method, Sums
from dfa_lens.data.curve import Direction
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.soft_top_k import gates_of_size
from dfa_lens.errors import DfaError, unknown
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint, Need

Objective = Literal["metric", "closeness"]
"""What a learned ranking maximises.

- ``metric``: the metric of the circuit. What CPR measures.
- ``closeness``: -\\|metric of the circuit - metric of the clean run\\|. What CMD measures: overshooting costs as much
  as falling short.
"""


@dataclass
class Part:
    """A part of a group of examples: how it is run, and what is known of its clean and corrupt runs."""

    batch: Batch
    corrupt: Activations
    clean_logits: Tensor
    clean: Float[Tensor, " pair"]
    nothing: Float[Tensor, " pair"]  # the metric of the corrupt run


GatedRun = Callable[[Part, Tensor], Tensor]
"""(part, gates [pair, …]) → the logits of its clean prompts under a mask for each of them."""


@dataclass(frozen=True)
class Learned(Method):
    """A mask that is trained; derive from it for one of your own.

    Attributes
    ----------
    iterations:
        Optimiser steps, each with one backward pass of a group.
    lr:
        Adam's learning rate.
    examples:
        The most examples of a group. Unlike the batch size, it changes the scores.
    objective:
        See :data:`Objective`.
    direction:
        "denoising": a mask says what is kept. "noising": what is destroyed; the metric is then minimised, and
        ``closeness`` is that to the corrupt run. What is ranked high by it is needed; where several nodes stand in for
        each other, it finds all of them.
    """

    differentiates: ClassVar[bool] = True
    random: ClassVar[bool] = True

    iterations: int = 500
    lr: float = 0.05
    examples: int = 16
    objective: Objective = "metric"
    direction: Direction = "denoising"

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise unknown("objective", self.objective, get_args(Objective))
        if self.direction not in get_args(Direction):
            raise unknown("direction", self.direction, get_args(Direction))
        for field in ("iterations", "examples"):
            if getattr(self, field) < 1:
                raise DfaError(f"{field} must be at least 1, not {getattr(self, field)}.")
        if not self.lr > 0:
            raise DfaError(f"lr must be positive, not {self.lr}.")

    @abstractmethod
    def start(self, n: int) -> Float[Tensor, " node"]:
        """The numbers that are trained, one for each of n nodes, as they are at first."""

    @abstractmethod
    def gates(
        self, numbers: Float[Tensor, " node"], examples: int, generator: torch.Generator
    ) -> Float[Tensor, "example node"]:
        """Masks of some examples, differentiable in the numbers."""

    def penalty(
        self,
        numbers: Float[Tensor, " node"],
        gates: Float[Tensor, "example node"],
        multipliers: Float[Tensor, "2"],
        progress: float,
    ) -> Tensor | float:
        """What is added to the loss of a step, in units of m(clean) - m(corrupt).

        Parameters
        ----------
        multipliers:
            Two numbers that start at zero and are trained to make this larger, for Lagrangians.
        progress:
            From 0 at the first step to nearly 1 at the last.
        """
        return 0.0

    def scores(self, numbers: Float[Tensor, " node"]) -> Float[Tensor, " node"]:
        """What is reported of the trained numbers."""
        return numbers

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"options": asdict(self)}

    def score(self, batch: Batch) -> Sums:
        """Not to be had of one batch: all pairs are trained on."""
        raise NotImplementedError("A learned ranking is made of all pairs: Learned.mean.")

    def passes(self, nodes: NodeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 2 + self.iterations, self.iterations  # of up to self.examples pairs; fewer of more, see need()

    def units(self, nodes: NodeSet, steps: int) -> int:  # noqa: D102
        return self.iterations

    def total(self, nodes: NodeSet, steps: int, examples: int) -> int:  # noqa: D102
        return self.iterations * min(examples, self.examples)

    def need(self, footprint: Footprint, nodes: NodeSet, *, steps: int, examples: int, batch: int) -> Need:  # noqa: D102
        trained = self.total(nodes, steps, examples)
        held = examples * (footprint.site_bytes + footprint.logit_bytes)
        graph = footprint.gradient_bytes(batch, gated=True)
        working = footprint.working_bytes(batch)
        return Need("attribute", 2 * examples + trained, trained, held, graph, working)

    def mean(self, measurement: Measurement, pairs: PromptPairs) -> Sums:  # noqa: D102
        def run(part: Part, gates: Float[Tensor, "pair node"]) -> Float[Tensor, "..."]:
            return part.batch.gated(measurement.nodes, gates, corrupt=part.corrupt)

        return self.ranked(measurement, pairs, len(measurement.nodes), run)

    def ranked(self, measurement: Measurement, pairs: PromptPairs, n: int, run: GatedRun) -> Sums:
        """Scores of n nodes, or of whatever else ``run`` gates; and the metric, as means over examples.

        Raises
        ------
        DfaError
            If there is nothing to rank.
        """
        if n < 2:
            raise DfaError(f"{self.name!r} ranks nodes or edges: it needs at least two.")
        groups = [list(group) for group in self._groups(measurement, pairs)]
        kept = [part for group in groups for part in group]
        clean = float(sum(part.clean.double().sum() for part in kept)) / len(pairs)
        corrupt = float(sum(part.nothing.double().sum() for part in kept)) / len(pairs)
        numbers = self._train(measurement, groups, n, run, scale=max(abs(clean - corrupt), 1e-6))
        return Sums(self.scores(numbers).double(), {"clean": clean, "corrupt": corrupt})

    def _groups(self, measurement: Measurement, pairs: PromptPairs) -> Iterator[Iterator[Part]]:
        n_groups = -(-len(pairs) // self.examples)
        for own in torch.arange(len(pairs)).chunk(n_groups):
            yield self._record(measurement, pairs, own)

    def _record(self, measurement: Measurement, pairs: PromptPairs, own: Tensor) -> Iterator[Part]:
        for rows, part in measurement.runner.batches(pairs[own], measurement.batch_size):
            batch = Batch(measurement, part, rows)
            corrupt, corrupt_logits = batch.record("corrupt")
            _, clean_logits = batch.record("clean", nodes=False)
            clean, nothing = (batch.values(logits, clean_logits) for logits in (clean_logits, corrupt_logits))
            yield Part(batch, corrupt, clean_logits, clean, nothing)

    def _train(
        self, measurement: Measurement, groups: list[list[Part]], n: int, run: GatedRun, scale: float
    ) -> Float[Tensor, " node"]:
        generator = torch.Generator().manual_seed(measurement.seed)
        numbers = self.start(n).requires_grad_(True)
        multipliers = torch.zeros(2, dtype=torch.float32, requires_grad=True)
        parts: list[dict[str, Any]] = [{"params": [numbers]}, {"params": [multipliers], "maximize": True}]
        optimizer = torch.optim.Adam(parts, lr=self.lr)
        order: list[int] = []
        for step in range(self.iterations):
            order = order or torch.randperm(len(groups), generator=generator).tolist()
            group = groups[order.pop()]
            examples = sum(len(part.batch) for part in group)
            with torch.enable_grad():
                gates = self.gates(numbers, examples, generator)
                slope = torch.zeros_like(gates)
                for part in group:
                    own = gates.detach()[part.batch.rows]
                    slope[part.batch.rows] = self._slope(part, own, run, scale) / examples
                total = (gates * slope).sum() + self.penalty(numbers, gates, multipliers, step / self.iterations)
                numbers.grad, multipliers.grad = torch.autograd.grad(total, [numbers, multipliers], allow_unused=True)
            optimizer.step()
            measurement.done(examples)
        return numbers.detach()

    def _slope(
        self, part: Part, gates: Float[Tensor, "pair node"], run: GatedRun, scale: float
    ) -> Float[Tensor, "pair node"]:
        """The gradient of the loss of a part's examples by their gates, in one backward pass."""
        leaf, noising = gates.requires_grad_(True), self.direction == "noising"
        found = part.batch.values(run(part, 1 - leaf if noising else leaf), part.clean_logits)
        if self.objective == "metric":
            loss = found if noising else -found
        else:
            loss = (found - (part.nothing if noising else part.clean)).abs()
        (gradient,) = torch.autograd.grad(loss.sum(), [leaf])
        return gradient / scale


@dataclass(frozen=True)
class Matryoshka(Learned):
    """Matryoshka attribution (arXiv 2609.25518): one ranking, trained to be faithful at every size.

    Each example of a step draws a size k, uniform over 1 … n-1, and is run under g = sigmoid((s - b)/T) with b such
    that Σg = k. The scores s start at zero. Adding a constant to all of them changes no mask, so they are reported with
    the lowest at zero: their ranking by size is that by sign.

    Attributes
    ----------
    temperature:
        T.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.attribution.learned import Matryoshka
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> scores = dfa.attribute(model, pairs, method=Matryoshka(iterations=5))
    >>> float(scores.values.min()), scores.meta["options"]["iterations"]
    (0.0, 5)
    """

    name: ClassVar[str] = "matryoshka"

    temperature: float = 0.5

    def start(self, n: int) -> Float[Tensor, " node"]:  # noqa: D102
        return torch.zeros(n, dtype=torch.float32)

    def gates(  # noqa: D102
        self, numbers: Float[Tensor, " node"], examples: int, generator: torch.Generator
    ) -> Float[Tensor, "example node"]:
        sizes = torch.randint(1, len(numbers), (examples,), generator=generator).to(numbers.dtype)
        return gates_of_size(numbers.expand(examples, -1), sizes, self.temperature)

    def scores(self, numbers: Float[Tensor, " node"]) -> Float[Tensor, " node"]:  # noqa: D102
        return numbers - numbers.min()


@dataclass(frozen=True)
class NodePruning(Learned):
    """Node pruning: hard-concrete gates, pressed by Lagrange multipliers to an ever larger part at zero.

    The recipe of edge pruning (arXiv 2406.16778), one gate for each node. A gate is a sample of the hard-concrete
    distribution: u uniform, ḡ = sigmoid((log u - log(1 - u) + α)/β) stretched to (-0.1, 1.1) and cut
    to [0, 1]. The loss has λ₁·(s - t) + λ₂·(s - t)² added to it, with s the part of the mask that is closed and t its
    target, which grows from 0 over the first five sixths of the steps; λ₁ and λ₂ climb by the gradient. The scores are
    the α.

    Attributes
    ----------
    sparsity:
        The part of the nodes that is closed in the end.
    temperature:
        β.
    alpha:
        Where every α starts: open.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.attribution.learned import NodePruning
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> dfa.attribute(model, pairs, method=NodePruning(iterations=3)).values.shape
    torch.Size([54])
    """

    name: ClassVar[str] = "node-pruning"

    lr: float = 0.1
    objective: Objective = "closeness"
    sparsity: float = 0.8
    temperature: float = 2 / 3
    alpha: float = 3.0

    def start(self, n: int) -> Float[Tensor, " node"]:  # noqa: D102
        return torch.full((n,), self.alpha, dtype=torch.float32)

    def gates(  # noqa: D102
        self, numbers: Float[Tensor, " node"], examples: int, generator: torch.Generator
    ) -> Float[Tensor, "example node"]:
        drawn = torch.rand(examples, len(numbers), generator=generator, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        return hard_concrete(numbers, drawn, self.temperature)

    def penalty(  # noqa: D102
        self,
        numbers: Float[Tensor, " node"],
        gates: Float[Tensor, "example node"],
        multipliers: Float[Tensor, "2"],
        progress: float,
    ) -> Tensor:
        excess = 1 - gates.mean() - self.sparsity * min(1.0, 6 / 5 * progress)
        return multipliers[0] * excess + multipliers[1] * excess**2


def hard_concrete(
    alpha: Float[Tensor, " node"], drawn: Float[Tensor, "example node"], temperature: float
) -> Float[Tensor, "example node"]:
    """Samples of the hard-concrete distribution, from uniform random numbers; differentiable in ``alpha``.

    Examples
    --------
    >>> import torch
    >>> from dfa_lens.attribution.learned import hard_concrete
    >>> hard_concrete(torch.tensor([-9.0, 0.0, 9.0]), torch.full((1, 3), 0.5), 2 / 3)
    tensor([[0.0000, 0.5000, 1.0000]])
    """
    soft = torch.sigmoid((drawn.log() - (1 - drawn).log() + alpha) / temperature)
    return (1.2 * soft - 0.1).clamp(0, 1)


@dataclass(frozen=True)
class UniformGradientSampling(Learned):
    """Uniform gradient sampling (arXiv 2409.09951): each node has a probability θ of being in the circuit.

    A gate is 1 - clamp((u - θ)/(θ·(1 - θ)) + 1/2, 0, 1) with u uniform: open, closed, or, with probability θ·(1 - θ),
    at a place that is uniform between the two. The gradient at the places between trains θ, and λ·mean(θ) is added to
    the loss. The scores are the logits of θ, which starts at one half.

    Attributes
    ----------
    sparsity_weight:
        λ, in units of m(clean) - m(corrupt).

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.attribution.learned import UniformGradientSampling
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> dfa.attribute(model, pairs, method=UniformGradientSampling(iterations=3)).values.shape
    torch.Size([54])
    """

    name: ClassVar[str] = "ugs"

    objective: Objective = "closeness"
    sparsity_weight: float = 1.0

    def start(self, n: int) -> Float[Tensor, " node"]:  # noqa: D102
        return torch.zeros(n, dtype=torch.float32)

    def gates(  # noqa: D102
        self, numbers: Float[Tensor, " node"], examples: int, generator: torch.Generator
    ) -> Float[Tensor, "example node"]:
        drawn = torch.rand(examples, len(numbers), generator=generator, dtype=torch.float32)
        kept = torch.sigmoid(numbers)
        return 1 - ((drawn - kept) / (kept * (1 - kept)).clamp_min(1e-6) + 0.5).clamp(0, 1)

    def penalty(  # noqa: D102
        self,
        numbers: Float[Tensor, " node"],
        gates: Float[Tensor, "example node"],
        multipliers: Float[Tensor, "2"],
        progress: float,
    ) -> Tensor:
        return self.sparsity_weight * torch.sigmoid(numbers).mean()
