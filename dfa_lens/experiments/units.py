"""A study as a graph of units: attribution or measurements of a model on a task, one fit, one row of the table.

A unit goes by all that decides what comes out of it, so what several settings, seeds or pairs of models ask for in the
same way is one unit. Which is done where is nobody's business here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

import torch

from dfa_lens.data.content import fingerprint
from dfa_lens.data.curve import Protocol
from dfa_lens.data.files import checked_name
from dfa_lens.errors import DfaError, TaskError, unknown
from dfa_lens.experiments import table
from dfa_lens.experiments.experiment import ATTRIBUTION, UNITS, Attribution, Budget, Experiment, ModelPair, UnitKind
from dfa_lens.experiments.folder import Folder
from dfa_lens.experiments.setting import OTHER_SCORES, Circuits, Setting, labels
from dfa_lens.experiments.table import GOLD
from dfa_lens.tasks.own import TaskSource


@dataclass(frozen=True)
class Study:
    """What all rows of a study have in common."""

    families: tuple[ModelPair, ...]
    settings: Mapping[str, Setting]
    tasks: Mapping[str, TaskSource]
    budget: Budget
    device: str
    dtype: torch.dtype
    attribution: Attribution = ATTRIBUTION
    protocol: Protocol = "nodes"

    def __post_init__(self) -> None:
        names = [models.name for models in self.families]
        double = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if double is not None:
            raise DfaError(f"Two pairs of models are called {double!r}: their rows could not be told apart.")
        for what, chosen in (("pair of models", names), ("setting", self.settings)):
            for name in chosen:
                checked_name(name, what)
        for setting in self.settings.values():
            checked_name(setting.method, "method")
        if self.protocol not in get_args(Protocol):
            raise unknown("protocol", self.protocol, get_args(Protocol))

    def tested(self, chosen: Sequence[str] | None) -> tuple[str, ...]:
        """The test tasks; all, if none are chosen."""
        for task in chosen or ():
            if task not in self.tasks:
                raise unknown("task", task, self.tasks, TaskError)
        return tuple(chosen or self.tasks)

    def to_meta(self) -> dict[str, Any]:
        """As JSON has it; what can't be written out by its fingerprint."""
        return {
            "units": UNITS,
            "budget": asdict(self.budget),
            "dtype": str(self.dtype),
            "attribution": asdict(self.attribution),
            "protocol": self.protocol,
            "pairs": {models.name: fingerprint(models) for models in self.families},
            "tasks": {name: fingerprint(source) for name, source in self.tasks.items()},
            "settings": {name: setting.to_meta() for name, setting in self.settings.items()},
        }

    def experiment(self, models: ModelPair, seed: int, **options: Any) -> Experiment:
        """One pair of models with one seed."""
        return Experiment(
            models,
            seed,
            self.budget,
            tasks=self.tasks,
            device=self.device,
            dtype=self.dtype,
            attribution=self.attribution,
            protocol=self.protocol,
            **options,
        )


@dataclass(frozen=True)
class Unit:
    """Something that one worker does in one go.

    Attributes
    ----------
    key:
        All that decides what comes out, see :meth:`~dfa_lens.experiments.experiment.Experiment.key`.
    kind, what:
        See there; a setting by its name, gold by "gold".
    place:
        The number of a pair of models and seed in :attr:`Plan.places` that it can be done with.
    needs:
        Keys of what has to be done before it.
    label:
        What it is, in words.
    """

    key: str
    kind: UnitKind
    what: tuple[Any, ...]
    place: int
    needs: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Row:
    """One row of the table: what stands in it beforehand, and the keys of the units that have the rest.

    Attributes
    ----------
    labels:
        Columns that are known.
    key, gold:
        Of its own unit, and of gold's on the same task.
    timed:
        Of the unit whose seconds it shows; "": its own.
    """

    labels: Mapping[str, Any]
    key: str
    gold: str
    timed: str


@dataclass(frozen=True)
class Plan:
    """All units of a study, each after those that it needs, and the rows that they make."""

    study: Study
    places: tuple[tuple[ModelPair, int], ...]
    units: tuple[Unit, ...]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, study: Study, seeds: Sequence[int], test_tasks: Sequence[str]) -> Plan:
        """The plan of a study; no model is loaded for it.

        Examples
        --------
        >>> import torch
        >>> from collections import Counter
        >>> from dfa_lens.experiments.study import QUICK, SETTINGS, ModelPair
        >>> from dfa_lens.experiments.units import Plan, Study
        >>> from dfa_lens.tasks.own import sources
        >>> some = {name: SETTINGS[name] for name in ("zero-shot", "permuted-w")}
        >>> study = Study((ModelPair.of("llama3"),), some, sources(None), QUICK, "cpu", torch.float32)
        >>> plan = Plan.of(study, [0], ["ioi"])
        >>> Counter(unit.kind for unit in plan.units), len(plan.rows)  # the two settings share a fit
        (Counter({'attribution': 7, 'row': 3, 'fit': 1}), 3)
        """
        places = tuple((models, seed) for seed in seeds for models in study.families)
        units: dict[str, Unit] = {}
        rows: list[Row] = []
        for place, (models, seed) in enumerate(places):
            made = _Planner(study, place, study.experiment(models, seed), units)
            rows += made.rows(test_tasks)
        return cls(study, places, tuple(units.values()), tuple(rows))

    def experiment(self, place: int, **options: Any) -> Experiment:
        """The experiment in which a unit can be done."""
        return self.study.experiment(*self.places[place], **options)

    @cached_property
    def by_key(self) -> dict[str, Unit]:
        """The units by their keys."""
        return {unit.key: unit for unit in self.units}

    @property
    def keys(self) -> Set[str]:
        """Of all units."""
        return self.by_key.keys()


@dataclass(frozen=True)
class _Planner:
    """Adds the units of one pair of models and seed."""

    study: Study
    place: int
    experiment: Experiment
    units: dict[str, Unit]

    def rows(self, test_tasks: Sequence[str]) -> list[Row]:
        found = []
        gold = {task: self._row(GOLD, None, task, ()) for task in test_tasks}
        for task in test_tasks:
            timed = self.experiment.key("attribution", "target", task)
            found.append(self._labelled(GOLD, None, task, (), gold[task], gold[task], timed))
        for name, setting in self.study.settings.items():
            for task in test_tasks:
                for trained in self.experiment.trained_on(setting, task):
                    key = self._row(name, setting, task, trained)
                    timed = self.experiment.key("fit", setting, trained) if setting.is_trained else ""
                    found.append(self._labelled(name, setting, task, trained, key, gold[task], timed))
        return found

    def _labelled(
        self, name: str, setting: Setting | None, task: str, trained: tuple[str, ...], key: str, gold: str, timed: str
    ) -> Row:
        known = {
            "family": self.experiment.models.name,
            "seed": self.experiment.seed,
            "task": task,
            **labels(name, setting, trained),
        }
        return Row(known, key, gold, timed)

    def _row(self, name: str, setting: Setting | None, task: str, trained: tuple[str, ...]) -> str:
        needs = self._needs(name, setting, task, trained)
        after = f" after {' '.join(trained)}" if trained else ""
        return self._add("row", (setting, task, trained), (name, task, trained), needs, f"{name} on {task}{after}")

    def _needs(self, name: str, setting: Setting | None, task: str, trained: tuple[str, ...]) -> list[str]:
        if setting is None:
            return [self._made("attribution", "target", task)]
        if isinstance(setting.recipe, Circuits):
            return [self._made(*need) for need in setting.recipe.needs(self.experiment, task, trained)]
        if setting.control == "regression":
            taught = [self._made("attribution", side, each) for each in trained for side in ("source", "target")]
            return [*taught, self._made("attribution", "source", task)]
        if not setting.is_trained:
            return [self._made("attribution", "source", task)]
        if setting.control in ("uniform-s", "target-only"):
            return [self._fit(name, setting, trained)]
        # columns of diagnostics compare with all tasks
        return [
            *(self._made("attribution", "source", each) for each in self.experiment.tasks),
            self._fit(name, setting, trained),
        ]

    def _fit(self, name: str, setting: Setting, trained: tuple[str, ...]) -> str:
        own = () if setting.control in OTHER_SCORES else trained
        needs = [self._made("attribution", "source", each) for each in own]
        return self._add("fit", (setting, trained), (name, trained), needs, f"fit of {name} on {' '.join(trained)}")

    def _made(self, kind: UnitKind, side: str, task: str) -> str:
        models = self.experiment.models.name
        return self._add(kind, (side, task), (side, task), [], f"{kind} of {task} on the {side} of {models}")

    def _add(
        self, kind: UnitKind, exact: tuple[Any, ...], what: tuple[Any, ...], needs: Sequence[str], label: str
    ) -> str:
        key = self.experiment.key(kind, *exact)
        if key not in self.units:
            where = f"{label}, {self.experiment.models.name}, seed {self.experiment.seed}"
            self.units[key] = Unit(key, kind, what, self.place, tuple(dict.fromkeys(needs)), where)
        return key


def do(unit: Unit, plan: Plan, experiment: Experiment) -> dict[str, Any]:
    """Do a unit; what a table or another unit needs of it is in the folder then, or in the record that this returns."""
    if unit.kind == "attribution":
        experiment.attributed(*unit.what)
    elif unit.kind == "measurements":
        side, task = unit.what
        experiment.measured(task, side)
    elif unit.kind == "fit":
        name, trained = unit.what
        experiment.fit([(plan.study.settings[name], trained)])
    else:
        name, task, trained = unit.what
        setting = None if name == GOLD else plan.study.settings[name]
        outcome = experiment.outcome(name, setting, task, trained)
        measured = table.measured(outcome.curve, float("nan"))
        del measured["recovery"]  # gold's row has what it lacks
        return {
            "columns": {**measured, "forwards": outcome.forwards, **experiment.diagnose(outcome)},
            "curve": outcome.curve.to_frame().to_dict("list"),
            "seconds": outcome.seconds,
        }
    return {"seconds": experiment.seconds.get(unit.key, 0.0)}


def collect(rows: Sequence[Row], folder: Folder) -> Any:
    """The table of what is done of some rows; recovery is NaN where gold is not done."""
    finished = folder.finished()
    records: dict[str, dict[str, Any]] = {}

    def record(key: str) -> dict[str, Any]:
        if key not in records:
            records[key] = folder.record(key)
        return records[key]

    found = []
    for row in rows:
        if row.key not in finished:
            continue
        columns = record(row.key)["columns"]
        gold = record(row.gold)["columns"]["cpr"] if row.gold in finished else 0.0
        recovery = table.recovered(columns["cpr"], gold)
        timed = row.timed if row.timed in finished else row.key
        seconds = round(record(timed)["seconds"], 2)
        found.append(table.row(**row.labels, **columns, recovery=recovery, seconds=seconds))
    made = table.frame(found)
    return made.sort_values(["family", "seed"], kind="stable", ignore_index=True)


def collect_curves(rows: Sequence[Row], folder: Folder) -> Any:
    """The curves of what is done of some rows: a line for each row and circuit size."""
    import pandas as pd

    finished = folder.finished()
    labels = ("family", "seed", "task", "setting", "regime", "method", "control", "trained_on")
    parts = [
        pd.DataFrame(folder.record(row.key)["curve"]).assign(**{name: row.labels[name] for name in labels})
        for row in rows
        if row.key in finished
    ]
    if not parts:
        return pd.DataFrame(columns=[*labels, "fraction", "size", "faithfulness", "kl"])
    found = pd.concat(parts, ignore_index=True)
    return found[[*labels, *(name for name in found.columns if name not in labels)]]
