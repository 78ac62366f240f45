"""The recipe of a training: everything that decides which W comes out of it, checked and written down in one place.

What changes time or memory only (where runs are kept, what shares a pass, a progress bar) is no part of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, TypeVar, get_args

from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.content import ByContent, fingerprint, plain
from dfa_lens.data.curve import Direction
from dfa_lens.data.scaling import Scaling
from dfa_lens.errors import AlignmentError, short, unknown
from dfa_lens.models import ablations
from dfa_lens.models.ablations import Ablation
from dfa_lens.models.hooks import Intervention
from dfa_lens.transfer import edge_forms, forms, objectives
from dfa_lens.transfer.edge_forms import EdgeForm
from dfa_lens.transfer.forms import Form, Full
from dfa_lens.transfer.objectives import Loss, Objective

Positions = Literal["answer", "all", "all-padded"]
"""Where the loss is taken.

- ``answer``: at the last real token.
- ``all``: summed over the real tokens.
- ``all-padded``: summed over all positions, padding included and not masked, as the released code does.
"""

_CHOICES: dict[str, Any] = {
    "scaling": Scaling,
    "intervention": Intervention,
    "positions": Positions,
    "loss": Loss,
    "direction": Direction,
}


@dataclass(frozen=True, eq=False)
class Recipe(ByContent):
    """How W is trained: every option of :func:`dfa_lens.fit` that changes a number.

    Two are equal (``==``) if they ask for the same: ``"kernel"`` and ``Kernel()`` do. ``dataclasses.replace`` changes
    some of it.

    Attributes
    ----------
    form:
        What W is made of, a name or instance of :mod:`~dfa_lens.transfer.forms`; default: every entry is free. With
        edge scores, what A and B are made of: :mod:`~dfa_lens.transfer.edge_forms`.
    objective:
        Masks and penalty, a name or instance of :mod:`~dfa_lens.transfer.objectives`; default: the paper's.
    sparsity_weight:
        λ, the weight of the objective's sparsity; default: the objective's own, 10. The paper's 0.1 keeps nearly all
        nodes with scores of unit length.
    lr, steps, batch_size:
        Adam's learning rate, the number of its steps, and the examples in the batch of each.
    seed:
        Of W's start and the order of the examples. The global random state is neither read nor changed.
    scaling:
        What is done to the scores before W, see :data:`~dfa_lens.data.scaling.Scaling`; kept with the alignment.
    temperature:
        T in g = sigmoid(ŝ/T); a pair goes geometrically from the first to the second over the steps, and the
        alignment keeps the second.
    initial, initial_scale:
        W's start (``full`` only), or the standard deviation of its normal start; the default is small, so that every
        mask starts near one half.
    anchor, anchor_weight:
        An alignment W₀ between the same nodes to stay near: anchor_weight·‖W − W₀‖²/‖W₀‖² is added to the loss.
    shuffle:
        False takes the examples in the order given, again and again.
    intervention:
        What the mask does, see :data:`~dfa_lens.models.hooks.Intervention`; default: what the evaluation measures.
    positions:
        Where the loss is taken, see :data:`Positions`.
    loss:
        How far the masked run is from the clean one, see :data:`~dfa_lens.transfer.objectives.Loss`.
    gate_heads:
        False leaves attention heads ungated, as the released code does without meaning to: comparison only.
    ablation:
        What the mask mixes in, instead of the corrupt activation: a name of
        :data:`~dfa_lens.models.ablations.ABLATIONS` or an object of that module.
    direction:
        "denoising": the mask says what is kept, and the run is to be the clean one. "noising": it says what is
        destroyed (each node is at (1 - g)·now + g·A_corrupt), and the run is to be the corrupt one: what is found is
        needed, and nothing that could stand in for it is left out. With ``intervention="circuit"`` only.

    Raises
    ------
    AlignmentError
        If a name is unknown, a number is out of range, or two options do not go together: which, and what is needed.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> recipe = dfa.Recipe(form="kernel", steps=50)
    >>> recipe.to_meta()["form"], recipe.temperatures, recipe == dfa.Recipe(form=dfa.forms.Kernel(), steps=50)
    ('kernel', (1.0, 1.0), True)
    """

    form: str | Form | EdgeForm = "full"
    objective: str | Objective = "sparse"
    sparsity_weight: float | None = None
    lr: float = 0.1
    steps: int = 200
    batch_size: int = 16
    seed: int = 0
    scaling: Scaling = "unit"
    temperature: float | tuple[float, float] = 1.0
    initial: Float[Tensor, "source target"] | None = field(default=None, repr=False)
    initial_scale: float = 0.01
    anchor: Alignment | None = None
    anchor_weight: float = 1.0
    shuffle: bool = True
    intervention: Intervention = "circuit"
    positions: Positions = "answer"
    loss: Loss = "kl"
    gate_heads: bool = True
    ablation: str | Ablation = "corrupt"
    direction: Direction = "denoising"

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in get_args(valid):
                raise unknown(name, getattr(self, name), get_args(valid), AlignmentError)
        for name in ("lr", "temperature"):
            values = self.temperatures if name == "temperature" else (self.lr,)
            for value in values:
                _require(name, value, Real, lambda value: value > 0, "positive")
        for name in ("initial_scale", "anchor_weight", "sparsity_weight"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), Real, lambda value: value >= 0, "0 or more")
        for name in ("steps", "batch_size"):
            _require(name, getattr(self, name), Integral, lambda value: value >= 1, "an integer of at least 1")
        _require("seed", self.seed, Integral, lambda value: abs(value) < 2**63, "an integer")
        for name in ("shuffle", "gate_heads"):
            if not isinstance(getattr(self, name), bool):
                raise AlignmentError(f"{name} must be True or False, not {short(repr(getattr(self, name)))}.")
        if self.anchor is not None and not isinstance(self.anchor, Alignment):
            raise AlignmentError(f"anchor must be an Alignment, not {type(self.anchor).__name__}.")
        if self.loss != "kl" and self.positions != "answer":
            raise AlignmentError(
                f"loss={self.loss!r} looks at the answer: it needs positions='answer', not {self.positions!r}."
            )
        _ = self.resolved_form, self.resolved_objective  # each with its own errors
        if self.direction == "noising" and self.intervention != "circuit":
            raise AlignmentError(
                f"direction='noising' goes with intervention='circuit', not with {self.intervention!r}."
            )
        if self.intervention == "restore" and not isinstance(self.resolved_ablation, ablations.Corrupt):
            raise AlignmentError(
                "intervention='restore' runs the corrupt prompts: it goes with ablation='corrupt', not with "
                f"{self.resolved_ablation.name!r}."
            )

    @property
    def temperatures(self) -> tuple[float, float]:
        """T at the first and at the last step."""
        given = self.temperature
        if not isinstance(given, (tuple, list)):
            return (given, given)
        if len(given) != 2:
            raise AlignmentError(f"temperature must be a number or a pair of numbers, not {short(repr(given))}.")
        return (given[0], given[1])

    @cached_property
    def resolved_form(self) -> Form | EdgeForm:
        """The form itself, with its start; one of edges where it is no form of W."""
        of_edges = isinstance(self.form, EdgeForm) or (
            isinstance(self.form, str) and self.form in edge_forms.EDGE_FORMS and self.form not in forms.FORMS
        )
        form = edge_forms.resolve(self.form) if of_edges else forms.resolve(self.form)
        if self.initial is None:
            return form
        if not isinstance(form, Full):
            raise AlignmentError(f"initial sets W itself: it goes with form='full', not {form.name!r}.")
        return Full(initial=self.initial)

    def for_edges(self) -> Recipe:
        """The same with its form as one of edges.

        Raises
        ------
        AlignmentError
            If the form or another option can't be had for edges: which.
        """
        for name in ("initial", "anchor"):
            if getattr(self, name) is not None:
                raise AlignmentError(f"{name} is of an alignment of nodes: leave it out for edge scores.")
        for name, needed in (("intervention", "circuit"), ("gate_heads", True)):
            if getattr(self, name) != needed:
                raise AlignmentError(f"With edge scores {name} must be {needed!r}, not {getattr(self, name)!r}.")
        return replace(self, form=edge_forms.resolve(self.form))

    @cached_property
    def resolved_objective(self) -> Objective:
        """The objective itself, with its weight."""
        objective = objectives.resolve(self.objective)
        return objective if self.sparsity_weight is None else objective.weighted(self.sparsity_weight)

    @cached_property
    def resolved_ablation(self) -> Ablation:
        """The ablation itself."""
        return ablations.resolve(self.ablation)

    def _content(self) -> tuple[Any, ...]:
        """What is asked for, however it is spelt."""
        spelt = {
            "form",
            "initial",
            "objective",
            "sparsity_weight",
            "temperature",
            "anchor_weight",
            "ablation",
            "direction",
        }
        others = tuple(getattr(self, each.name) for each in fields(self) if each.name not in spelt)
        anchor_weight = None if self.anchor is None else self.anchor_weight
        # nothing of the default, so that a recipe goes by the same key as before there were others
        more: tuple[Any, ...] = ()
        if not isinstance(self.resolved_ablation, ablations.Corrupt):
            more += (self.resolved_ablation,)
        if self.direction != "denoising":
            more += (self.direction,)
        return (self.resolved_form, self.resolved_objective, self.temperatures, anchor_weight, *others, *more)

    def key(self) -> str:
        """What it goes by: equal for recipes that ask for the same, on every machine.

        Raises
        ------
        DfaError
            If the form or the objective has no :func:`~dfa_lens.data.content.fingerprint`.
        """
        return fingerprint(self)

    def to_meta(self) -> dict[str, Any]:
        """All of it as JSON has it; tensors and alignments by their fingerprints."""
        form, objective = self.resolved_form, self.resolved_objective
        as_it_is = (
            "scaling initial_scale lr steps batch_size seed shuffle intervention positions loss gate_heads".split()
        )
        meta: dict[str, Any] = {
            "form": form.name,
            "form_options": _options(form),
            "objective": objective.name,
            "objective_options": _options(objective),
            "sparsity_weight": getattr(objective, "sparsity_weight", None),
            "temperature": list(self.temperatures),
            **{name: plain(getattr(self, name)) for name in as_it_is},
            **ablations.described(self.resolved_ablation),
        }
        if self.direction != "denoising":
            meta["direction"] = self.direction
        if self.anchor is not None:
            meta |= {"anchor": fingerprint(self.anchor), "anchor_weight": self.anchor_weight}
        return meta


def _require(name: str, value: object, kind: type, ok: Callable[[Any], bool], needed: str) -> None:
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not ok(value):  # type: ignore[arg-type]
        raise AlignmentError(f"{name} must be {needed}, not {short(repr(value))}.")


def _options(value: Form | EdgeForm | Objective) -> dict[str, Any]:
    """The settings of a form of W or of an objective; tensors by their fingerprint."""
    described = plain(value)
    return {name: each for name, each in described.items() if name != "type"} if isinstance(described, dict) else {}


RELEASED = Recipe(intervention="restore", positions="all-padded", scaling="raw", sparsity_weight=0.1, gate_heads=False)
"""``fit(..., recipe=RELEASED)`` trains as the authors' released code does, faults included."""


class Options(TypedDict, total=False):
    """The fields of a :class:`Recipe` as keyword arguments, for type checkers."""

    form: str | Form | EdgeForm
    objective: str | Objective
    sparsity_weight: float | None
    lr: float
    steps: int
    batch_size: int
    seed: int
    scaling: Scaling
    temperature: float | tuple[float, float]
    initial: Float[Tensor, "source target"] | None
    initial_scale: float
    anchor: Alignment | None
    anchor_weight: float
    shuffle: bool
    intervention: Intervention
    positions: Positions
    loss: Loss
    gate_heads: bool
    ablation: str | Ablation
    direction: Direction


Function = TypeVar("Function", bound=Callable[..., Any])


def takes_options(function: Function) -> Function:
    """Show the fields of a recipe where a function takes ``**options``: in ``help``, notebooks and the docs."""
    shown = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in _signature(Recipe)]
    own = [parameter for parameter in _signature(function) if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = inspect.signature(function).replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
    return function


def _signature(value: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(value, eval_str=True).parameters.values())
