"""What one training carries over, scores of nodes or of edges: its numbers, and what they make of the scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.edge_alignment import EdgeAlignment, scaled
from dfa_lens.data.edges import EdgeScores, EdgeSet
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.scaling import scale
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import AlignmentError
from dfa_lens.transfer.edge_forms import EdgeForm, EdgeProblem
from dfa_lens.transfer.forms import Form, Problem
from dfa_lens.transfer.recipe import Recipe

Made = Sequence[Any]
"""The matrices that the numbers under training make: W and bias, or A, B and bias."""

Result = TypeVar("Result", Alignment, EdgeAlignment)


class Carried(ABC, Generic[Result]):
    """The scores of the training tasks, and the numbers that carry them over.

    Attributes
    ----------
    parameters:
        The numbers; calling it gives the matrices that they make.
    tasks_needed:
        With fewer training tasks than this, some of the numbers do nothing.
    """

    parameters: nn.Module
    tasks_needed: int = 1

    @abstractmethod
    def scores(self, made: Made) -> Float[Tensor, "task unit"]:
        """Ŝ of every task, for each node or edge of the target."""

    @abstractmethod
    def from_anchor(self, made: Made) -> Tensor | None:
        """How far the matrices are from the recipe's anchor, or None where it has none."""

    @abstractmethod
    def alignment(self, made: Made, **what: Any) -> Result:
        """What was learned."""


class CarriedNodes(Carried[Alignment]):
    """ŝ = s·W (+ b)."""

    def __init__(
        self,
        scores: Mapping[str, NodeScores],
        nodes: NodeSet,
        recipe: Recipe,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.recipe, self.target = recipe, nodes
        self.source = next(iter(scores.values())).nodes
        self.s = scale(torch.stack([each.values for each in scores.values()]), recipe.scaling).to(device)
        form = recipe.resolved_form
        if not isinstance(form, Form):
            raise AlignmentError(f"The form {form.name!r} is one of edges, and the scores are of nodes.")
        problem = Problem(self.s, self.source, nodes, generator, recipe.initial_scale)
        self.parameters, self.tasks_needed = form.start(problem), form.tasks_needed(problem)
        self.anchor = self._anchor(device)

    def _anchor(self, device: torch.device) -> Tensor | None:
        given = self.recipe.anchor
        if given is None:
            return None
        if (given.source, given.target) != (self.source, self.target):
            raise AlignmentError("`anchor` must be an alignment between the same source and target nodes.")
        if not given.W.any():
            raise AlignmentError("`anchor` is zero everywhere: there is nothing to stay near.")
        return given.W.to(device)

    @override
    def scores(self, made: Made) -> Float[Tensor, "task unit"]:
        W, bias = made
        found = self.s @ W
        return found if bias is None else found + bias

    @override
    def from_anchor(self, made: Made) -> Tensor | None:
        if self.anchor is None or made[0] is None:
            return None
        return ((made[0] - self.anchor) ** 2).sum() / (self.anchor**2).sum()

    @override
    def alignment(self, made: Made, **what: Any) -> Alignment:
        W, bias = made
        return Alignment.of(W, self.source, self.target, bias=bias, **what)


class CarriedEdges(Carried[EdgeAlignment]):
    """Ŝ = Aᵀ·S·B (+ C), at the edges of the target."""

    def __init__(
        self,
        scores: Mapping[str, EdgeScores],
        edges: EdgeSet,
        recipe: Recipe,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        form = recipe.resolved_form
        assert isinstance(form, EdgeForm)
        self.target = edges
        self.source = next(iter(scores.values())).edges.all_of_model
        self.S = torch.stack([scaled(each, recipe.scaling) for each in scores.values()]).to(device)
        self.chosen = edges.chosen.to(device)
        problem = EdgeProblem(self.S, self.source, edges, generator, recipe.initial_scale)
        self.parameters = form.start(problem)

    @override
    def scores(self, made: Made) -> Float[Tensor, "task unit"]:
        A, B, bias = made
        found = A.T @ self.S @ B
        if bias is not None:
            found = found + bias
        return found[:, self.chosen]

    @override
    def from_anchor(self, made: Made) -> Tensor | None:
        return None

    @override
    def alignment(self, made: Made, **what: Any) -> EdgeAlignment:
        A, B, bias = made
        return EdgeAlignment.of(A, B, self.source, self.target, bias=bias, **what)
