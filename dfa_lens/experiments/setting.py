"""What a comparison compares: what W is trained on, what stands in for the source, and how W is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from dfa_lens.data.content import ByContent, fingerprint, plain
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import DfaError, short, unknown
from dfa_lens.experiments.table import Control
from dfa_lens.transfer import similarity
from dfa_lens.transfer.forms import Kernel
from dfa_lens.transfer.recipe import RELEASED, Recipe

if TYPE_CHECKING:
    from dfa_lens.experiments.experiment import Experiment

Regime = Literal["in-distribution", "near-distribution", "zero-shot", "one-task"]
"""What W is trained on, for a test task.

- ``in-distribution``: the task itself.
- ``near-distribution``: its sibling (:data:`dfa_lens.tasks.SIBLINGS`); tasks without one are left out.
- ``zero-shot``: all other tasks.
- ``one-task``: every other task by itself, a row for each (the column ``trained_on``).
"""
OTHER_SCORES: tuple[Control, ...] = ("uniform-s", "random-s", "target-only")
"""Controls that are trained like the method, on other scores."""
UNTRAINED: tuple[Control, ...] = ("random-w", "depth-mean", "regression")
"""Controls whose W is not trained."""

RecipeFunction = Callable[["Experiment", tuple[str, ...]], Recipe]
"""Of the experiment and the training tasks: for a form of W that is made of the two models, a kernel say."""


@dataclass(frozen=True, eq=False)
class Setting(ByContent):
    """One line of a comparison.

    Attributes
    ----------
    regime, control:
        See :data:`Regime` and :data:`~dfa_lens.experiments.table.Control`.
    recipe:
        How W is trained: a :class:`~dfa_lens.transfer.recipe.Recipe`, or a function that makes one. The experiment
        puts in its own seed and, where its budget says so, its own number of steps.
    method:
        The recipe's name in tables.
    ridge:
        Of the control "regression" alone, see :func:`dfa_lens.controls.regression`.
    """

    regime: Regime = "zero-shot"
    control: Control = ""
    recipe: Recipe | RecipeFunction = field(default_factory=Recipe)
    method: str = "default"
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if self.regime not in get_args(Regime):
            raise unknown("regime", self.regime, get_args(Regime), DfaError)
        if self.control not in get_args(Control):
            raise unknown("control", self.control, get_args(Control), DfaError)
        if not isinstance(self.recipe, Recipe) and not callable(self.recipe):
            raise DfaError(f"recipe must be a Recipe, or a function that makes one, not {short(repr(self.recipe))}.")

    def to_meta(self) -> dict[str, Any]:
        """As JSON has it: to read, and the fingerprint that its rows go by."""
        recipe = self.recipe.to_meta() if isinstance(self.recipe, Recipe) else plain(self.recipe)
        asked = {"regime": self.regime, "control": self.control, "recipe": recipe, "ridge": self.ridge}
        return {**asked, "fingerprint": fingerprint((self.regime, self.control, self.recipe, self.ridge))}


def attention_kernel(experiment: Experiment, trained: tuple[str, ...]) -> Recipe:
    """Like nodes by kind, depth and how heads attend to random repeated tokens."""
    return Recipe(form=Kernel(experiment.attention_similarities))


def behaviour_kernel(experiment: Experiment, trained: tuple[str, ...]) -> Recipe:
    """As :func:`attention_kernel`, and by what nodes do at the answers of the *training* tasks (CKA)."""
    alike = similarity.cka_similarity(
        experiment.source,
        PromptPairs.concat([experiment.on_source[task] for task in trained]),
        experiment.target,
        PromptPairs.concat([experiment.train[task] for task in trained]),
    )
    depth = similarity.kind_and_depth(experiment.source_nodes, experiment.target_nodes)
    similarities = {**experiment.attention_similarities, "behaviour": alike, "behaviour and depth": alike * depth}
    return Recipe(form=Kernel(similarities))


MATRYOSHKA = Recipe(objective="matryoshka")

SETTINGS: dict[str, Setting] = {
    "in-distribution": Setting("in-distribution"),
    "near-distribution": Setting("near-distribution"),
    "zero-shot": Setting("zero-shot"),
    "one-task": Setting("one-task"),
    # controls of the zero-shot default
    "uniform-s": Setting("zero-shot", "uniform-s"),
    "random-s": Setting("zero-shot", "random-s"),
    "scrambled-s": Setting("zero-shot", "scrambled-s"),
    "permuted-w": Setting("zero-shot", "permuted-w"),
    "random-w": Setting("zero-shot", "random-w"),
    "depth-mean": Setting("zero-shot", "depth-mean"),
    "regression": Setting("zero-shot", "regression", method="ridge 0.1", ridge=0.1),
    "target-only": Setting("in-distribution", "target-only"),
    "in-distribution, uniform-s": Setting("in-distribution", "uniform-s"),
    # other objectives and forms
    "in-distribution, matryoshka": Setting("in-distribution", "", MATRYOSHKA, "matryoshka"),
    "in-distribution, released": Setting("in-distribution", "", RELEASED, "released"),
    "zero-shot, released": Setting("zero-shot", "", RELEASED, "released"),
    "zero-shot, matryoshka": Setting("zero-shot", "", MATRYOSHKA, "matryoshka"),
    "zero-shot, kernel": Setting("zero-shot", "", Recipe(form="kernel"), "kernel: depth"),
    "zero-shot, attention kernel": Setting("zero-shot", "", attention_kernel, "kernel: attention"),
    "zero-shot, behaviour kernel": Setting("zero-shot", "", behaviour_kernel, "kernel: behaviour"),
    "zero-shot, full+bias": Setting("zero-shot", "", Recipe(form="full+bias"), "full+bias"),
    "zero-shot, low-rank": Setting("zero-shot", "", Recipe(form="low-rank"), "low-rank"),
    "zero-shot, block": Setting("zero-shot", "", Recipe(form="block"), "block"),
    "zero-shot, depth-band": Setting("zero-shot", "", Recipe(form="depth-band"), "depth-band"),
}
"""The settings of the method benchmark: four regimes, all controls, and the named objectives and forms."""
