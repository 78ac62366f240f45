"""What a comparison compares: what W is trained on, what stands in for the source, and how W is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dfa_lens.data.content import ByContent, fingerprint, plain
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import DfaError, short, unknown
from dfa_lens.experiments.table import Control
from dfa_lens.transfer.recipe import Recipe

Regime = Literal["in-distribution", "near-distribution", "zero-shot", "leave-family-out", "one-task"]
"""What W is trained on, for a test task.

- ``in-distribution``: the task itself.
- ``near-distribution``: its sibling (:data:`dfa_lens.tasks.SIBLINGS`); tasks without one are left out.
- ``zero-shot``: all other tasks.
- ``leave-family-out``: all other tasks that are no relatives (:data:`dfa_lens.tasks.FAMILIES`).
- ``one-task``: every other task by itself, a row for each (the column ``trained_on``).
"""
OTHER_SCORES: tuple[Control, ...] = ("uniform-s", "random-s", "target-only")
"""Controls that are trained like the method, on other scores."""
UNTRAINED: tuple[Control, ...] = ("random-w", "depth-mean", "regression")
"""Controls whose W is not trained."""

RecipeFunction = Callable[[Any, tuple[str, ...]], Recipe]
"""Of the :class:`~dfa_lens.experiments.experiment.Experiment` and the training tasks: for a form of W that is made of
the two models, a kernel say."""


class Circuits(ABC):
    """A way to a circuit that trains no W, see :mod:`dfa_lens.experiments.functional`; best a frozen dataclass."""

    @abstractmethod
    def circuit(self, experiment: Any, task: str, trained: tuple[str, ...]) -> tuple[NodeScores, int]:
        """Scores on the target for a task, with others to learn from, and the passes of one example that they cost."""


@dataclass(frozen=True, eq=False)
class Setting(ByContent):
    """One line of a comparison.

    Attributes
    ----------
    regime, control:
        See :data:`Regime` and :data:`~dfa_lens.experiments.table.Control`.
    recipe:
        How W is trained: a :class:`~dfa_lens.transfer.recipe.Recipe`, or a function that makes one. The experiment
        puts in its own seed and, where its budget says so, its own number of steps. Or :class:`Circuits`: a way that
        trains no W.
    method:
        The recipe's name in tables.
    ridge:
        Of the control "regression" alone, see :func:`dfa_lens.controls.regression`.
    """

    regime: Regime = "zero-shot"
    control: Control = ""
    recipe: Recipe | RecipeFunction | Circuits = field(default_factory=Recipe)
    method: str = "default"
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if self.regime not in get_args(Regime):
            raise unknown("regime", self.regime, get_args(Regime), DfaError)
        if self.control not in get_args(Control):
            raise unknown("control", self.control, get_args(Control), DfaError)
        if not isinstance(self.recipe, (Recipe, Circuits)) and not callable(self.recipe):
            raise DfaError(f"recipe must be a Recipe, or a function that makes one, not {short(repr(self.recipe))}.")

    def to_meta(self) -> dict[str, Any]:
        """As JSON has it: to read, and the fingerprint that its rows go by."""
        recipe = self.recipe.to_meta() if isinstance(self.recipe, Recipe) else plain(self.recipe)
        asked = {"regime": self.regime, "control": self.control, "recipe": recipe, "ridge": self.ridge}
        return {**asked, "fingerprint": fingerprint((self.regime, self.control, self.recipe, self.ridge))}
