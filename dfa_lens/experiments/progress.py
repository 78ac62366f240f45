"""How far a study is, from its folder alone: what is done, at work, waiting and failed, and the table so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfa_lens.data.files import write_atomically
from dfa_lens.errors import FileError
from dfa_lens.experiments.drive import Pace, duration
from dfa_lens.experiments.folder import Folder, read_checked, write_checked
from dfa_lens.experiments.units import Plan, Row, collect, collect_curves


@dataclass(frozen=True)
class Status:
    """What :func:`status` found.

    Attributes
    ----------
    done, units:
        How many units are done, and how many there are, by kind.
    at_work:
        Label of each unit that a worker is at.
    workers:
        How many have been heard of lately.
    failures:
        The last note of each unit that failed and is not done: unit, error, worker, traceback.
    remaining:
        Seconds that the rest will take these workers (one, if there is none); NaN before anything is done.
    """

    done: dict[str, int]
    units: dict[str, int]
    at_work: tuple[str, ...]
    workers: int
    failures: tuple[dict[str, Any], ...]
    remaining: float

    def __str__(self) -> str:
        lines = [f"{kind}: {self.done.get(kind, 0):,} of {number:,} done" for kind, number in self.units.items()]
        lines.append(f"{self.workers} workers, about {duration(self.remaining)} left")
        lines += [f"  at work: {label}" for label in self.at_work]
        lines += [f"  failed: {note['unit']}: {note['error']}" for note in self.failures]
        return "\n".join(lines)


def note(plan: Plan, folder: Folder) -> None:
    """Write down the units and rows of a plan, beside those of earlier runs."""
    path = folder.path / "plan.json"
    known = _plan(folder) if path.exists() else {"units": {}, "rows": {}}
    known["units"] |= {unit.key: [unit.kind, unit.label] for unit in plan.units}
    for row in plan.rows:
        name = [str(row.labels[column]) for column in ("family", "seed", "task", "setting", "trained_on")]
        known["rows"]["\n".join(name)] = asdict(row)
    write_checked(path, known)


def _plan(folder: Folder) -> dict[str, Any]:
    found = read_checked(folder.path / "plan.json", "the plan of a study")
    if found.keys() != {"units", "rows"}:
        raise FileError(f"{folder.path / 'plan.json'} is not the plan of a study.")
    return found


def _rows(folder: Folder) -> list[Row]:
    return [Row(**row) for row in _plan(folder)["rows"].values()]


def collected(path: str | Path) -> Any:
    """The table of all that is done in a folder, see :func:`dfa_lens.study.run`; also while workers write to it.

    Raises
    ------
    FileError
        If it is not the folder of a study, or a file in it is damaged.
    """
    folder = Folder(path)
    return collect(_rows(folder), folder)


def curves(path: str | Path) -> Any:
    """The faithfulness curves of all that is done in a folder.

    Returns
    -------
    pandas.DataFrame
        A line for each row of the table and circuit size: ``family``, ``seed``, ``task``, ``setting``, ``regime``,
        ``method``, ``control``, ``trained_on``, ``fraction``, ``size``, ``faithfulness`` (means over examples), ``kl``.

    Raises
    ------
    FileError
        If it is not the folder of a study, or a file in it is damaged.

    Examples
    --------
    >>> import tempfile
    >>> from dfa_lens.experiments.progress import curves
    >>> from dfa_lens.experiments.study import SETTINGS, Budget, run
    >>> budget, folder = Budget(train=2, test=2, steps=1, curve_points=3), tempfile.mkdtemp()
    >>> some = {"random-w": SETTINGS["random-w"]}
    >>> _ = run(["llama3"], some, seeds=(0,), test_tasks=["ioi"], budget=budget, out=folder)
    >>> found = curves(folder)
    >>> found[found["setting"] == "gold"]["size"].tolist()
    [0, 37, 73, 110]
    """
    folder = Folder(path)
    return collect_curves(_rows(folder), folder)


def write_table(folder: Folder) -> None:
    """The table of all that is done, as ``table.csv``."""
    write_atomically(folder.path / "table.csv", collected(folder.path).to_csv(index=False).encode())


def status(path: str | Path) -> Status:
    """How far the study in a folder is.

    Examples
    --------
    >>> import tempfile
    >>> from dfa_lens.experiments.progress import status
    >>> from dfa_lens.experiments.study import SETTINGS, Budget, run
    >>> budget, folder = Budget(train=2, test=2, steps=1, curve_points=2), tempfile.mkdtemp()
    >>> some = {"random-w": SETTINGS["random-w"]}
    >>> _ = run(["llama3"], some, seeds=(0,), test_tasks=["ioi"], budget=budget, out=folder)
    >>> status(folder).done
    {'attribution': 2, 'row': 2}

    Raises
    ------
    FileError
        If it is not the folder of a study.
    """
    folder = Folder(path)
    units = _plan(folder)["units"]
    finished, claims, workers = folder.finished() & units.keys(), folder.claims(), len(folder.alive())
    kinds = Counter(kind for kind, _ in units.values())
    done = Counter(units[key][0] for key in finished)
    pace = Pace()
    for key in finished:
        pace.add(units[key][0], folder.record(key)["took"])
    return Status(
        dict(sorted(done.items())),
        dict(sorted(kinds.items())),
        tuple(units[key][1] for key in claims if key in units),
        workers,
        tuple(notes[-1] for key, notes in folder.failures().items() if key not in finished),
        pace.remaining({kind: number - done[kind] for kind, number in kinds.items()}, workers),
    )
