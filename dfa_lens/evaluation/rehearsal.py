"""A rehearsal: transfers to the source itself, where the labels are known, before anything is run on a target's.

Each task is read as if it were new: without its family to learn from. How faithful those circuits are, and how much
that differs from family to family, is what can be known of a new task without labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from jaxtyping import Float
from scipy import stats

from dfa_lens.data.arguments import same_tasks
from dfa_lens.data.content import ByContent
from dfa_lens.data.measurements import Measurements
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.data.statistics import Interval
from dfa_lens.errors import AlignmentError
from dfa_lens.evaluation.faithfulness import faithfulness_curve
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel
from dfa_lens.transfer.functional import FunctionalAlignment


@dataclass(frozen=True, eq=False)
class Rehearsal(ByContent):
    """How faithful circuits are that were read without their task's family. Made by :func:`dfa_lens.rehearse`.

    Attributes
    ----------
    tasks, families:
        [task] names.
    cpr, cmd:
        [task] areas of the curves on the model that was rehearsed on.

    Examples
    --------
    >>> import numpy as np
    >>> from dfa_lens.evaluation.rehearsal import Rehearsal
    >>> found = Rehearsal(("a", "b", "c"), ("x", "x", "y"), np.array([0.8, 0.6, 0.9]), np.array([0.2, 0.4, 0.1]))
    >>> [round(bound, 2) for bound in found.interval(confidence=0.8)]
    [0.27, 1.33]
    """

    tasks: tuple[str, ...]
    families: tuple[str, ...]
    cpr: Float[np.ndarray, " task"]
    cmd: Float[np.ndarray, " task"]

    def interval(self, *, confidence: float = 0.9) -> Interval:
        """Where the CPR of a task of a new family is to be expected.

        Student's prediction interval for one more family: mean ± t·s·√(1 + 1/n) over the n families' means. It takes a
        new family for one of the same kind, and a target to be as easy to read as the model that was rehearsed on;
        docs/method.md says how often it held.

        Raises
        ------
        AlignmentError
            With fewer than two families, or a confidence outside of 0 to 1.
        """
        if not 0 < confidence < 1:
            raise AlignmentError(f"confidence must be between 0 and 1, not {confidence}.")
        means = self._by_family(self.cpr)
        if len(means) < 2:
            raise AlignmentError("What a new family may bring is learned from several: two are needed.")
        half = stats.t.ppf((1 + confidence) / 2, len(means) - 1) * means.std(ddof=1) * np.sqrt(1 + 1 / len(means))
        return Interval(float(means.mean() - half), float(means.mean() + half))

    @property
    def mean_cmd(self) -> float:
        """The mean over families of their tasks' mean CMD: relatives count once."""
        return float(self._by_family(self.cmd).mean())

    def _by_family(self, values: Float[np.ndarray, " task"]) -> Float[np.ndarray, " family"]:
        own = np.array(self.families)
        return np.array([values[own == family].mean() for family in dict.fromkeys(self.families)])

    def to_frame(self) -> Any:
        """A pandas table: task, family, cpr, cmd."""
        import pandas as pd

        columns = {"task": self.tasks, "family": self.families, "cpr": self.cpr, "cmd": self.cmd}
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return f"Rehearsal({len(self.tasks)} tasks of {len(set(self.families))} families: CPR {self.cpr.mean():.3f})"


@backend.runs("model")
def rehearse(
    functional: FunctionalAlignment,
    model: HookedModel,
    measurements: Mapping[str, Measurements],
    pairs: Mapping[str, PromptPairs],
    *,
    families: Mapping[str, str] | None = None,
    ranking: Ranking | None = None,
    batch_size: int = 16,
) -> Rehearsal:
    """Transfer each task to a model whose labels are known, the source as a rule, without the task's family.

    It costs a faithfulness curve for each task.

    Parameters
    ----------
    functional:
        What is to be trusted.
    model:
        Left as it was.
    measurements:
        Task → what the model was measured to do.
    pairs:
        Task → prompts that it is judged on; others than those of the measurements, best.
    families:
        Task → family; default: what ``functional`` was fitted with, and any other task by itself.
    ranking:
        Of the circuits; default: that of ``functional``. :func:`choose_ranking` tries both.
    batch_size:
        Pairs a pass.

    Returns
    -------
    Rehearsal

    Raises
    ------
    AlignmentError
        If the tasks differ, or one is left with nothing to be read from.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = {task: dfa.tasks.load(task, model.tokenizer, n=4) for task in ("addition", "ioi", "mcqa")}
    >>> scores = {task: dfa.attribute(model, each, method="nap") for task, each in pairs.items()}
    >>> measured = {task: dfa.measure(model, each) for task, each in pairs.items()}
    >>> functional = dfa.fit_functional(scores, measured, trees=20)
    >>> dfa.rehearse(functional, model, measured, pairs).tasks
    ('addition', 'ioi', 'mcqa')
    """
    circuits, known = _read(functional, measurements, pairs, families)
    return _judged(model, pairs, circuits, known, ranking or functional.ranking, batch_size)


@backend.runs("model")
def choose_ranking(
    functional: FunctionalAlignment,
    model: HookedModel,
    measurements: Mapping[str, Measurements],
    pairs: Mapping[str, PromptPairs],
    *,
    families: Mapping[str, str] | None = None,
    batch_size: int = 16,
) -> FunctionalAlignment:
    """Rehearse with both rankings, and keep the one whose CMD is lower, as a mean over families.

    No label of a target is used: what is known of the source decides how circuits on every target are read. It costs
    two faithfulness curves for each task.

    Parameters
    ----------
    functional, model, measurements, pairs, families, batch_size:
        As for :func:`rehearse`.

    Returns
    -------
    FunctionalAlignment
        The same, with the better ``ranking``; ``.meta["rehearsed"]`` has the mean CMD of both.

    Raises
    ------
    AlignmentError
        As :func:`rehearse` does.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = {task: dfa.tasks.load(task, model.tokenizer, n=4) for task in ("addition", "ioi", "mcqa")}
    >>> scores = {task: dfa.attribute(model, each, method="nap") for task, each in pairs.items()}
    >>> measured = {task: dfa.measure(model, each) for task, each in pairs.items()}
    >>> functional = dfa.fit_functional(scores, measured, trees=20)
    >>> chosen = dfa.choose_ranking(functional, model, measured, pairs)
    >>> sorted(chosen.meta["rehearsed"])
    ['absolute', 'signed']
    """
    circuits, known = _read(functional, measurements, pairs, families)
    found = {
        ranking: _judged(model, pairs, circuits, known, ranking, batch_size).mean_cmd for ranking in get_args(Ranking)
    }
    best = min(found, key=lambda each: (found[each], each != functional.ranking))
    return replace(functional, ranking=best, meta={**functional.meta, "rehearsed": found})


def _read(
    functional: FunctionalAlignment,
    measurements: Mapping[str, Measurements],
    pairs: Mapping[str, PromptPairs],
    families: Mapping[str, str] | None,
) -> tuple[dict[str, NodeScores], dict[str, str]]:
    """Every task's circuit, without its family to learn from, and the families."""
    same_tasks(measurements, pairs, ("measurements", "pairs"))
    known = {task: task for task in pairs} | dict(functional.meta.get("families", {})) | dict(families or {})
    return {task: functional.without(known[task]).transfer(measurements[task]) for task in pairs}, known


def _judged(
    model: HookedModel,
    pairs: Mapping[str, PromptPairs],
    circuits: Mapping[str, NodeScores],
    known: Mapping[str, str],
    ranking: Ranking,
    batch_size: int,
) -> Rehearsal:
    curves = [
        faithfulness_curve(model, pairs[task], circuit, ranking=ranking, batch_size=batch_size)
        for task, circuit in circuits.items()
    ]
    return Rehearsal(
        tuple(circuits),
        tuple(known[task] for task in circuits),
        np.array([curve.cpr for curve in curves]),
        np.array([curve.cmd for curve in curves]),
    )
