"""Settings of studies whose circuits come from measurements, or from the target itself: no W is trained.

``FUNCTIONAL`` has those of the functional benchmark by name. Each can stand beside any other setting of a study:

    settings = {**FUNCTIONAL, "zero-shot": SETTINGS["zero-shot"]}
    dfa.study.run(["llama3"], settings, seeds=(0, 1, 2), out="study")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dfa_lens.attribution.attribute import attribute
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.errors import AlignmentError
from dfa_lens.experiments.experiment import Experiment
from dfa_lens.experiments.setting import Circuits, Needed, Setting, Side
from dfa_lens.transfer import controls
from dfa_lens.transfer.functional import Learned, fit_functional


@dataclass(frozen=True)
class Functional(Circuits):
    """A functional alignment, or one of its controls.

    Attributes
    ----------
    own:
        Whether the task's own scores on the source teach, too.
    reader:
        See :data:`~dfa_lens.transfer.readers.READERS`.
    teacher:
        Whose scores and measurements teach; "target": gold scores of the training tasks on the target, no source at
        all.
    wrong:
        Read the measurements of another task: one of another family where there is one.
    scramble:
        Teach with the scores of the wrong nodes, within kinds and thirds of depth.
    without:
        Measurements that are left out.
    ranking, learns:
        As for :func:`dfa_lens.fit_functional`.
    """

    own: bool = False
    reader: str = "trees"
    teacher: Literal["source", "target"] = "source"
    wrong: bool = False
    scramble: bool = False
    without: tuple[str, ...] = ()
    ranking: Ranking = "absolute"
    learns: Learned = "scores"

    def needs(  # noqa: D102
        self, experiment: Experiment, task: str, trained: tuple[str, ...]
    ) -> list[tuple[Needed, Side, str]]:
        read = self._another(experiment, task) if self.wrong else task
        taught: list[tuple[Needed, Side, str]] = []
        for name in [*trained, *([task] if self.own else [])]:
            taught += [("attribution", self.teacher, name), ("measurements", self.teacher, name)]
        return [*taught, ("measurements", "target", read)]

    def circuit(  # noqa: D102
        self, experiment: Experiment, task: str, trained: tuple[str, ...]
    ) -> tuple[NodeScores, int]:
        if not trained and not self.own:
            raise AlignmentError(f"Task {task!r} has no others to learn from.")
        tasks = [*trained, task] if self.own and not trained else list(trained)

        def scores(name: str) -> NodeScores:
            if self.teacher == "target":
                return experiment.gold_of(name)
            seed = 1000 * experiment.seed + experiment.tasks.index(name)
            known = experiment.scores_of(name)
            return controls.scrambled_within(known, seed=seed) if self.scramble else known

        fitted = fit_functional(
            {name: scores(name) for name in tasks},
            {name: experiment.measured(name, self.teacher).without(*self.without) for name in tasks},
            seed=experiment.seed,
            reader=self.reader,
            families=experiment.families,
            ranking=self.ranking,
            learns=self.learns,
        )
        read = self._another(experiment, task) if self.wrong else task
        target = experiment.measured(read, "target")
        own = (scores(task), experiment.measured(task, "source")) if self.own and trained else (None, None)
        forwards = target.meta["passes"]
        if self.teacher == "target":
            forwards += sum(experiment.gold_passes(name) for name in tasks)
        return fitted.transfer(target, *own), forwards

    def _another(self, experiment: Experiment, task: str) -> str:
        start = experiment.tasks.index(task)
        later = [*experiment.tasks[start + 1 :], *experiment.tasks[:start]]
        foreign = [name for name in later if experiment.families[name] != experiment.families[task]]
        if not later:
            raise AlignmentError("The wrong measurements need a second task.")
        return (foreign or later)[0]


@dataclass(frozen=True)
class OneMeasurement(Circuits):
    """The ranking of one measurement of the target, with nothing learned.

    Attributes
    ----------
    name:
        Of :data:`~dfa_lens.transfer.measure.MEASURES` or :data:`~dfa_lens.transfer.measure.GROUP_MEASURES`.
    """

    name: str

    def needs(  # noqa: D102
        self, experiment: Experiment, task: str, trained: tuple[str, ...]
    ) -> list[tuple[Needed, Side, str]]:
        return [("measurements", "target", task)]

    def circuit(  # noqa: D102
        self, experiment: Experiment, task: str, trained: tuple[str, ...]
    ) -> tuple[NodeScores, int]:
        found = experiment.measured(task, "target")
        return found.scores(self.name), found.meta["passes"]


@dataclass(frozen=True)
class OnTarget(Circuits):
    """Attribution on the target itself by any method: what a transfer has to be cheaper than, or better.

    Attributes
    ----------
    method, steps:
        As for :func:`dfa_lens.attribute`.
    """

    method: str
    steps: int = 5

    def circuit(  # noqa: D102
        self, experiment: Experiment, task: str, trained: tuple[str, ...]
    ) -> tuple[NodeScores, int]:
        found = attribute(
            experiment.target,
            experiment.train[task],
            method=self.method,
            steps=self.steps,
            batch_size=experiment.budget.batch_size,
        )
        return found, experiment.passes_of(task, self.method, self.steps)


_LEFT_OUT: Literal["leave-family-out"] = "leave-family-out"

FUNCTIONAL: dict[str, Setting] = {
    "functional": Setting(_LEFT_OUT, "", Functional(), "functional"),
    "functional, own scores": Setting(_LEFT_OUT, "", Functional(own=True), "functional, own scores"),
    "functional, own scores alone": Setting(
        "in-distribution", "", Functional(own=True), "functional, own scores alone"
    ),
    "functional, zero-shot": Setting("zero-shot", "", Functional(), "functional"),
    "functional, zero-shot, own scores": Setting("zero-shot", "", Functional(own=True), "functional, own scores"),
    "attention": Setting(_LEFT_OUT, "", Functional(reader="attention"), "functional attention"),
    "attention, own scores": Setting(_LEFT_OUT, "", Functional(own=True, reader="attention"), "functional attention"),
    "functional, scrambled": Setting(_LEFT_OUT, "scrambled-s", Functional(scramble=True), "functional"),
    "functional, wrong task": Setting(_LEFT_OUT, "wrong-measurements", Functional(wrong=True), "functional"),
    "functional, source-blind": Setting(_LEFT_OUT, "source-blind", Functional(teacher="target"), "functional"),
    "group share alone": Setting(_LEFT_OUT, "one-measurement", OneMeasurement("group-share"), "group-share"),
    "direct effect alone": Setting(_LEFT_OUT, "one-measurement", OneMeasurement("direct-effect"), "direct-effect"),
    "change alone": Setting(_LEFT_OUT, "one-measurement", OneMeasurement("change-at-answer"), "change-at-answer"),
    "nap on the target": Setting("in-distribution", "", OnTarget("nap"), "nap"),
    "gold, 20 steps": Setting("in-distribution", "", OnTarget("nap-ig-inputs", 20), "nap-ig-inputs, 20 steps"),
    "W, leave-family-out": Setting(_LEFT_OUT),
    "uniform-s, leave-family-out": Setting(_LEFT_OUT, "uniform-s"),
}
"""The settings of the functional benchmark: the method with and without the task's own scores, its controls, single
measurements, what the same passes buy on the target itself, and the published W in the same regime."""
