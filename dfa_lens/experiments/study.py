"""Regimes × controls × methods × seeds, on one or more pairs of models, in one tidy table.

A :class:`Setting` says what W is trained on (regime), what stands in for the source's scores or for W (control) and how
W is trained (recipe). :func:`run` runs many of them over tasks, pairs and seeds, in several processes, and goes on
where it was stopped: every unit of it is on disk as soon as it is done. They may run anywhere, see ``executor``.

    table = dfa.study.run(["llama3"], {"zero-shot": Setting("zero-shot")}, seeds=(0, 1), out="study")
    dfa.statistics.compare(table, "zero-shot", ["gold"])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dfa_lens import zoo
from dfa_lens.data.content import fingerprint
from dfa_lens.data.curve import Protocol
from dfa_lens.data.files import held, read_json, writable, write_atomically
from dfa_lens.errors import DfaError, FileError, StudyError
from dfa_lens.experiments import progress as progress_of
from dfa_lens.experiments.drive import OnUnit, drive
from dfa_lens.experiments.executors import Executor, Here, processes
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
from dfa_lens.experiments.folder import Folder
from dfa_lens.experiments.setting import Regime, Setting
from dfa_lens.experiments.settings import SETTINGS
from dfa_lens.experiments.table import read
from dfa_lens.experiments.units import Plan, Study, collect
from dfa_lens.tasks.own import TaskSource, sources
from dfa_lens.transfer.trainer import OnStep

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
    executor: Executor | None = None,
    retries: int = 1,
    on_unit: OnUnit | None = None,
    on_step: OnStep | None = None,
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
        A folder for all that is found, a file for each unit (see :mod:`~dfa_lens.experiments.folder`), and
        ``table.csv`` at the end. A second call with the same folder runs only what is missing, however the first one
        ended. ``study.json`` keeps what the rows were made with. One run at a time holds the folder; its workers may
        be on many machines. Without a folder nothing is kept on disk.
    workers:
        How many units are at work at one time: processes, each with its share of the processor's cores, which end when
        this one does; or what the executor makes of them. Each keeps its models until it ends.
    executor:
        What runs the workers: anything with the ``submit`` of :class:`concurrent.futures.Executor`, submitit's for
        SLURM among it. Needs ``out``, on a disk that the workers see. Default: processes of this machine.
    retries:
        How often a unit is tried again that failed. Errors of the library itself are not, and one that ran out of
        memory is tried once with half the batch.
    on_unit:
        Called here with a dictionary for every unit that is done, see :data:`~dfa_lens.experiments.drive.OnUnit`.
    on_step:
        Called by the workers after each step of a training, with the unit's label and the step's record; a function at
        module level where workers are processes.
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
    StudyError
        If units failed: after all others are done. ``.failures`` has all, ``.table`` the rows that there are.
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
    plan = planned(
        families,
        settings,
        seeds=seeds,
        test_tasks=test_tasks,
        tasks=tasks,
        budget=budget,
        device=device,
        dtype=dtype,
        collection=collection,
        attribution=attribution,
        protocol=protocol,
    )
    if executor is not None and out is None:
        raise DfaError("Workers elsewhere need a folder that they see, too: give out=.")
    options: dict[str, Any] = {"workers": min(workers, len(plan.units)), "retries": retries, "progress": progress}
    with ExitStack() as stack:
        if out is None:
            folder = Folder(stack.enter_context(TemporaryDirectory(prefix="dfa-lens-")))
        else:
            folder = Folder(writable(out, folder=True).resolve())
            stack.enter_context(_held(folder.path))
            _check_folder(folder.path, plan.study)
        progress_of.note(plan, folder)
        if executor is None:
            executor = stack.enter_context(processes(workers)) if options["workers"] > 1 else Here()
        failures = drive(plan, folder, executor, on_unit=on_unit, on_step=on_step, **options)
        found = collect(plan.rows, folder)
        if out is not None:
            progress_of.write_table(folder)
    if failures:
        raise _failed(failures, len(plan.units), found, out)
    return found


def planned(
    families: Sequence[str | ModelPair] | None = None,
    settings: Mapping[str, Setting] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    test_tasks: Sequence[str] | None = None,
    tasks: Mapping[str, str | TaskSource] | None = None,
    budget: Budget = FULL,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    collection: str = "offline",
    attribution: Attribution = ATTRIBUTION,
    protocol: Protocol = "nodes",
) -> Plan:
    """The units of a study, of which nothing is run: arguments as for :func:`run`.

    Examples
    --------
    >>> from dfa_lens.experiments.study import SETTINGS, planned
    >>> plan = planned(["llama3"], {"zero-shot": SETTINGS["zero-shot"]}, seeds=(0,), test_tasks=["ioi"])
    >>> [unit.label for unit in plan.units if unit.kind == "fit"]
    ['fit of zero-shot on mcqa addition subtraction arc-easy arc-challenge, llama3, seed 0']
    """
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
    return Plan.of(study, tuple(dict.fromkeys(seeds)), study.tested(test_tasks))


def _failed(failures: Sequence[Mapping[str, Any]], units: int, found: Any, out: str | Path | None) -> StudyError:
    first, *others = failures
    kept = "" if out is None else f" The rest is in {out}: run the study again to try these again."
    more = f" ({len(others)} more)" if others else ""
    what = f"{first['unit']}: {first['error'].rstrip('.')}{more}"
    error = StudyError(f"{len(failures)} of {units} units of the study failed: {what}.{kept}")
    error.failures, error.table = tuple(failures), found
    return error


def _held(folder: Path) -> AbstractContextManager[None]:
    refusal = f"Another run writes study in {folder}: wait until it has ended, or take another folder."
    return held(folder / ".study.lock", refusal, where_possible=True)


def _description(path: Path) -> dict[str, Any]:
    """What rows were made with, as :meth:`Study.to_meta` was written down."""
    found = read_json(path, "the description of a study")
    checksum = found.pop("checksum", None)  # those of the first versions have none
    if checksum is not None and checksum != fingerprint(found):
        raise FileError(f"{path} was damaged after it was written: its checksum is not that of its content.")
    # folders of earlier versions do not say what was the only way then, and have other rows
    found = {"attribution": {}, "protocol": "", "units": 0, **found}
    tables: dict[str, type] = dict.fromkeys(("budget", "attribution", "pairs", "tasks", "settings"), dict)
    known = tables | {"dtype": str, "protocol": str, "units": int}
    if found.keys() != known.keys() or any(not isinstance(found[name], kind) for name, kind in known.items()):
        raise FileError(f"{path} does not describe a study: it lacks what rows were made with. Take another folder.")
    return found


def _check_folder(folder: Path, study: Study) -> None:
    """Rows that are there already must have been made in the same way; then what is to come is noted, too."""
    path = folder / "study.json"
    ours = study.to_meta()
    if path.exists():
        theirs = _description(path)
        if theirs["units"] != ours["units"]:
            raise DfaError(f"{folder} has the study of another version of dfa_lens: take another folder.")
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
