"""Regimes × controls × methods × seeds, on one or more pairs of models, in one tidy table.

A :class:`Setting` says what W is trained on (regime), what stands in for the source's scores or for W (control) and how
W is trained (recipe). :func:`run` runs many of them over tasks, pairs and seeds, in several processes, and goes on
where it was stopped: every row is on disk as soon as it is known.

    table = dfa.study.run(["llama3"], {"zero-shot": Setting("zero-shot")}, seeds=(0, 1), out="study")
    dfa.statistics.compare(table, "zero-shot", ["gold"])
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm.auto import tqdm

from dfa_lens import zoo
from dfa_lens.attribution.attribute import IntegrationWarning
from dfa_lens.data.content import fingerprint
from dfa_lens.data.curve import Protocol
from dfa_lens.data.files import checked_name, file_name, held, read_json, writable, write_atomically
from dfa_lens.errors import DfaError, FileError, TaskError, unknown
from dfa_lens.experiments import table
from dfa_lens.experiments import workers as processes
from dfa_lens.experiments.experiment import (
    ATTRIBUTION,
    FULL,
    QUICK,
    Attribution,
    Budget,
    Experiment,
    ModelPair,
    Outcome,
)
from dfa_lens.experiments.setting import Regime, Setting
from dfa_lens.experiments.settings import SETTINGS
from dfa_lens.experiments.table import GOLD, read
from dfa_lens.tasks.own import TaskSource, sources

__all__ = [
    "FULL",
    "QUICK",
    "SETTINGS",
    "Budget",
    "Experiment",
    "ModelPair",
    "Outcome",
    "Regime",
    "Setting",
    "read",
    "run",
]


def run(
    families: Sequence[str | ModelPair] | None = None,
    settings: Mapping[str, Setting] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    test_tasks: Sequence[str] | None = None,
    tasks: Mapping[str, str | TaskSource] | None = None,
    budget: Budget = FULL,
    out: str | Path | None = None,
    workers: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    collection: str = "offline",
    attribution: Attribution = ATTRIBUTION,
    protocol: Protocol = "nodes",
    progress: bool = False,
) -> Any:
    """Run every setting on every pair of models, task and seed.

    Parameters
    ----------
    families:
        Pairs of models, see :class:`~dfa_lens.experiments.experiment.ModelPair`; default: the shipped ones that
        know the paper's tasks.
    settings:
        Default: :data:`~dfa_lens.experiments.setting.SETTINGS`.
    seeds:
        Each gives other prompts, another start of training and other random controls.
    test_tasks:
        Those that are tested; default: all of ``tasks``.
    tasks:
        Those that are tested and trained on: name → one of our tasks by its name, or a source of one's own (see
        :class:`~dfa_lens.tasks.own.TaskSource`; a file is one, :class:`~dfa_lens.tasks.own.FileTask`). Default: the
        paper's six.
    budget:
        How much to run.
    out:
        A folder for the rows: ``<pair>-<seed>.csv`` grows row by row, and a second call with the same folder runs only
        what is missing, however the first one ended. ``study.json`` keeps what the rows were made with. One run at a
        time holds the folder. Without a folder nothing is kept on disk.
    workers:
        Processes, a pair and seed in each; each takes its share of the processor's cores. They end when this one does.
    device, dtype:
        For shipped models.
    collection:
        Of our tasks.
    attribution:
        How nodes are scored, on the source and for gold.
    protocol:
        Of curves, see :data:`~dfa_lens.data.curve.Protocol`.

    Returns
    -------
    pandas.DataFrame
        A row per pair ("family"), seed, test task and setting; the columns are those of
        :data:`dfa_lens.experiments.table.COLUMNS`.

    Raises
    ------
    DfaError
        If a pair, task or setting is unknown or has a name that can't stand in a table, or the folder holds rows of
        another budget, or of other settings, models or tasks by the same names.
    FileError
        If the folder can't be written, another run holds it, or what is in it is damaged.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.experiments.study import SETTINGS, Budget, run
    >>> budget = Budget(train=4, test=4, steps=2, curve_points=3)
    >>> table = run(["llama3"], {"zero-shot": SETTINGS["zero-shot"]}, seeds=(0,), test_tasks=["ioi"], budget=budget)
    >>> table["setting"].tolist()
    ['gold', 'zero-shot']
    """
    import pandas as pd

    study = Study(
        tuple(ModelPair.of(family) for family in (families or zoo.pairs())),
        dict(SETTINGS if settings is None else settings),
        sources(tasks, collection),
        budget,
        device,
        dtype,
        attribution,
        protocol,
    )
    folder = None if out is None else writable(out, folder=True)
    plans = [
        _Plan(study, models, seed, study.tested(test_tasks), folder) for seed in seeds for models in study.families
    ]
    with (
        nullcontext() if folder is None else _held(folder, "study"),
        tqdm(total=len(plans), desc="study", unit="experiment", disable=not progress) as bar,
    ):
        if folder is not None:
            _check_folder(folder, study)
        frames = []
        with closing(processes.each(_run_plan, plans, workers)) as made:
            for frame in made:
                frames.append(frame)
                bar.update()
    return pd.concat(frames, ignore_index=True).sort_values(["family", "seed"], kind="stable", ignore_index=True)


def _held(folder: Path, name: str, wait: float = 0.0) -> AbstractContextManager[None]:
    refusal = f"Another run writes {name} in {folder}: wait until it has ended, or take another folder."
    return held(folder / f".{name}.lock", refusal, wait=wait)


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
            "budget": asdict(self.budget),
            "dtype": str(self.dtype),
            "attribution": asdict(self.attribution),
            "protocol": self.protocol,
            "pairs": {models.name: fingerprint(models) for models in self.families},
            "tasks": {name: fingerprint(source) for name, source in self.tasks.items()},
            "settings": {name: setting.to_meta() for name, setting in self.settings.items()},
        }


def _description(path: Path) -> dict[str, Any]:
    """What rows were made with, as :meth:`Study.to_meta` was written down."""
    found = read_json(path, "the description of a study")
    checksum = found.pop("checksum", None)  # those of the first versions have none
    if checksum is not None and checksum != fingerprint(found):
        raise FileError(f"{path} was damaged after it was written: its checksum is not that of its content.")
    # folders of earlier versions do not say what was the only way then
    found = {"attribution": asdict(ATTRIBUTION), "protocol": "nodes", **found}
    texts = dict.fromkeys(("dtype", "protocol"), str)
    known = dict.fromkeys(("budget", "attribution", "pairs", "tasks", "settings"), dict) | texts
    if found.keys() != known.keys() or any(not isinstance(found[name], kind) for name, kind in known.items()):
        raise FileError(f"{path} does not describe a study: it lacks what rows were made with. Take another folder.")
    return found


def _check_folder(folder: Path, study: Study) -> None:
    """Rows that are there already must have been made in the same way; then what is to come is noted, too."""
    path = folder / "study.json"
    ours = study.to_meta()
    if path.exists():
        theirs = _description(path)
        changed = [name for name in ("budget", "dtype", "attribution", "protocol") if theirs[name] != ours[name]]
        # zero-shot training uses all tasks: with one more, no row is what it was
        if theirs["tasks"].keys() != ours["tasks"].keys():
            changed.append("set of tasks")
        for what, name in (("setting", "settings"), ("pair", "pairs"), ("task", "tasks")):
            known = theirs[name]
            changed += [f"{what} {key!r}" for key, value in ours[name].items() if known.get(key, value) != value]
            ours[name] = known | ours[name]
        if changed:
            raise DfaError(
                f"The rows in {folder} were made with another {' and '.join(changed)}: take another folder or name."
            )
    written = json.loads(json.dumps(ours))  # a tuple is read as a list, and a number as a key as its text
    write_atomically(path, json.dumps({**written, "checksum": fingerprint(written)}, indent=1).encode())


@dataclass(frozen=True)
class _Plan:
    """The rows of one pair of models with one seed: the work of one process."""

    study: Study
    models: ModelPair
    seed: int
    test_tasks: tuple[str, ...]
    folder: Path | None

    @property
    def path(self) -> Path | None:
        return None if self.folder is None else self.folder / f"{file_name(self.models.name)}-{self.seed}.csv"

    def experiment(self) -> Experiment:
        study = self.study
        options = {
            "tasks": study.tasks,
            "device": study.device,
            "dtype": study.dtype,
            "attribution": study.attribution,
            "protocol": study.protocol,
        }
        return Experiment(self.models, self.seed, study.budget, **options)  # type: ignore[arg-type]


def _run_plan(plan: _Plan) -> Any:
    if plan.path is None:
        return _run_rows(plan, None)
    # a worker of a run that was killed may still be about, for a moment
    with _held(plan.path.parent, plan.path.name, wait=30):
        return _run_rows(plan, plan.path)


def _run_rows(plan: _Plan, path: Path | None) -> Any:
    import pandas as pd

    known = table.frame([]) if path is None else table.read_rows(path)
    if not known.empty and (set(known["family"]) != {plan.models.name} or set(known["seed"]) != {plan.seed}):
        raise FileError(f"{path} has rows of other models or another seed than its name says.")
    done = set(known[list(table.KEY)].itertuples(index=False, name=None))
    gold = dict(known.loc[known["setting"] == GOLD, ["task", "cpr"]].itertuples(index=False, name=None))
    experiment, rows = plan.experiment(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IntegrationWarning)  # gold is what it is; the tables show it
        for outcome in experiment.run(
            plan.study.settings,
            plan.test_tasks,
            skip=lambda name, task, trained: (name, task, " ".join(trained)) in done,
        ):
            if outcome.name == GOLD:
                gold[outcome.task] = outcome.curve.cpr
            row = table.row(
                family=plan.models.name,
                seed=plan.seed,
                task=outcome.task,
                **outcome.labels,
                **table.measured(outcome.curve, gold[outcome.task]),
                **experiment.diagnose(outcome),
            )
            rows.append(row)
            if path is not None:
                table.append(path, row)
    parts = [part for part in (known, table.frame(rows)) if len(part)]
    frame = pd.concat(parts, ignore_index=True) if parts else known
    return frame[frame["setting"].isin({GOLD, *plan.study.settings}) & frame["task"].isin(plan.test_tasks)]
