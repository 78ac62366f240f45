"""What a comparison compares: what W is trained on, what stands in for the source, and how W is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from dfa_lens.data.content import ByContent, fingerprint, plain
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import DfaError, short, unknown
from dfa_lens.experiments.table import GOLD, Control
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

Needed = Literal["attribution", "measurements"]
"""What a study makes of a model on a task."""
Side = Literal["source", "target"]
"""One of the two models."""

RecipeFunction = Callable[[Any, tuple[str, ...]], Recipe]
"""Of the :class:`~dfa_lens.experiments.experiment.Experiment` and the training tasks: for a form of W that is made of
the two models, a kernel say."""


class Circuits(ABC):
    """A way to a circuit that trains no W, see :mod:`dfa_lens.experiments.functional`; best a frozen dataclass."""

    def needs(self, experiment: Any, task: str, trained: tuple[str, ...]) -> list[tuple[Needed, Side, str]]:
        """What :meth:`circuit` asks the experiment for, so that a study makes it beforehand, and once.

        What is left out is made when it is asked for.
        """
        return []

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

    @property
    def is_trained(self) -> bool:
        """Whether it trains a W."""
        return not isinstance(self.recipe, Circuits) and self.control not in UNTRAINED

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides its circuits: neither its name nor its method's."""
        return fingerprint((self.regime, self.control, self.recipe, self.ridge))

    @cached_property
    def fingerprint_of_fit(self) -> str:
        """Of what decides W, beside the tasks that it is trained on."""
        return fingerprint((self.control if self.control in OTHER_SCORES else "", self.recipe))

    def to_meta(self) -> dict[str, Any]:
        """As JSON has it: to read, and the fingerprint that its rows go by."""
        recipe = self.recipe.to_meta() if isinstance(self.recipe, Recipe) else plain(self.recipe)
        asked = {"regime": self.regime, "control": self.control, "recipe": recipe, "ridge": self.ridge}
        return {**asked, "fingerprint": self.fingerprint}


def labels(name: str, setting: Setting | None, trained: tuple[str, ...]) -> dict[str, str]:
    """The columns of a table that say what a row is of; no setting: gold."""
    return {
        "setting": name,
        "regime": setting.regime if setting else "",
        "method": setting.method if setting else GOLD,
        "control": setting.control if setting else "",
        "trained_on": " ".join(trained),
    }
