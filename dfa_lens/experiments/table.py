"""The one table of studies, demo and report: its columns, its rows, its file, and the results behind it."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from dfa_lens.data import files
from dfa_lens.data.alignment import Alignment
from dfa_lens.data.curve import FaithfulnessCurve
from dfa_lens.data.inspection import Inspection
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import FileError, short

GOLD = "gold"
Control = Literal[
    "",
    "uniform-s",
    "random-s",
    "scrambled-s",
    "permuted-w",
    "random-w",
    "depth-mean",
    "regression",
    "target-only",
    "wrong-measurements",
    "one-measurement",
    "source-blind",
]
"""What is put in the place of the source's scores or of W, see :mod:`dfa_lens.transfer.controls`; "" is the
method itself."""

COLUMNS: dict[str, tuple[type, str]] = {
    "family": (str, "the pair of models"),
    "seed": (int, "of prompts, training and controls"),
    "task": (str, "tested on"),
    "setting": (str, "its name, or gold"),
    "regime": (str, "what W was trained on"),
    "method": (str, "the name of how it was trained"),
    "control": (str, "what stands in for the source's scores or for W; empty: the method itself"),
    "trained_on": (str, "the training tasks, with blanks between them"),
    "cpr": (float, "area under the faithfulness curve"),
    "cpr_low": (float, "its interval over examples"),
    "cpr_high": (float, "its interval over examples"),
    "cmd": (float, "area between the curve and 1"),
    "kl": (float, "mean KL to the clean run"),
    "recovery": (float, "CPR over gold's"),
    "floor": (float, "CPR of an empty circuit, whatever the sizes"),
    "examples": (int, "test pairs"),
    "forwards": (int, "passes of one example through the target to get the circuit"),
    "seconds": (float, "of training"),
    "effective_rank": (float, "of W"),
    "shared": (float, "how much of the scores of W is common to all tasks"),
    "depth": (float, "correlation with the source's scores carried over by depth alone"),
    "stability": (float, "under noise in the source's scores"),
}
"""The columns in order: what each holds, and what it means.

What is not known is "" among words and NaN among numbers.
"""

WORDS = tuple(name for name, (kind, _) in COLUMNS.items() if kind is str)
NUMBERS = tuple(name for name, (kind, _) in COLUMNS.items() if kind is not str)
#: What tells one row of a pair of models and seed from another.
KEY = ("setting", "task", "trained_on")
#: The last cell of a row in folders of earlier versions: a hash of what is before it. No column of the table.
CHECKSUM = "checksum"


# --- rows ----------------------------------------------------------------------------------------------------------


def measured(curve: FaithfulnessCurve, gold_cpr: float) -> dict[str, Any]:
    """The columns that a curve fills: CPR and its interval over examples, CMD, mean KL, recovery, floor.

    Of one example there is no interval: it is NaN, with a :class:`~dfa_lens.data.statistics.StatisticsWarning`. Where
    gold's CPR is 0, recovery is NaN.
    """
    low, high = curve.cpr_interval()
    return {
        "cpr": curve.cpr,
        "cpr_low": low,
        "cpr_high": high,
        "cmd": curve.cmd,
        "kl": curve.mean_kl,
        "recovery": recovered(curve.cpr, gold_cpr),
        "floor": curve.floor,
        "examples": len(curve.clean_values),
    }


def recovered(cpr: float, gold_cpr: float) -> float:
    """CPR over gold's; NaN where that is 0."""
    return cpr / gold_cpr if gold_cpr else float("nan")


def row(**known: Any) -> dict[str, Any]:
    """A row with all columns in order, of those that are known.

    Examples
    --------
    >>> from dfa_lens.experiments.table import row
    >>> [(name, value) for name, value in row(task="ioi", family="llama3", cpr=0.5).items()][:3]
    [('family', 'llama3'), ('seed', nan), ('task', 'ioi')]
    """
    foreign = next((name for name in known if name not in COLUMNS), None)
    if foreign is not None:
        raise KeyError(f"The table has no column {foreign!r}.")
    return {name: known.get(name, "" if name in WORDS else float("nan")) for name in COLUMNS}


def frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """The table (pandas) of some rows."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(COLUMNS))


# --- files ---------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Any:
    """A table from a CSV file: empty cells are "" in columns of words and NaN in columns of numbers.

    Raises
    ------
    FileError
        If it is not such a table, a row is there twice, was damaged after it was written, or holds a number that is
        infinite.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import tempfile
    >>> from dfa_lens.experiments.table import frame, read, row
    >>> path = tempfile.mkdtemp() + "/table.csv"
    >>> frame([row(family="llama3", seed=0, task="ioi", setting="gold", cpr=0.5)]).to_csv(path, index=False)
    >>> read(path)["cpr"].tolist()
    [0.5]
    """
    return _read(path, files.read_bytes(path))


def _hash(line: str) -> str:
    return hashlib.blake2b(line.encode(), digest_size=6).hexdigest()


def _read(path: str | Path, data: bytes) -> Any:
    try:
        return _parsed(data.decode("utf-8-sig"))
    except (ValueError, csv.Error, OverflowError) as error:
        reason = (
            f"byte {error.start} is no UTF-8" if isinstance(error, UnicodeDecodeError) else short(error).rstrip(".")
        )
        raise FileError(f"{path} is not a table of a study: {reason}. Remove it to start again.") from error


def _parsed(text: str) -> Any:
    header, *lines = text.split("\n")[:-1] if text.endswith("\n") else text.split("\n")
    names = next(csv.reader([header], strict=True), [])
    if not {*WORDS, "seed", "cpr"} <= set(names):
        raise ValueError(f"its columns are {', '.join(names[:4])} …")
    foreign = next(
        (name for i, name in enumerate(names) if name not in (*COLUMNS, CHECKSUM) or name in names[:i]), None
    )
    if foreign is not None:
        raise ValueError(f"it has a column {foreign!r} too much")
    if CHECKSUM in names:
        for number, line in enumerate(lines, 2):
            before, _, checksum = line.rpartition(",")
            if checksum != _hash(before):
                raise ValueError(f"line {number} was damaged after it was written")
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row][1:]
    wrong = next((number for number, row in enumerate(rows, 2) if len(row) != len(names)), None)
    if wrong is not None:
        raise ValueError(f"line {wrong} has not as many cells as the header")
    cells = dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True))
    return _checked({name: _column(name, cells[name]) for name in names if name != CHECKSUM})


def _column(name: str, cells: tuple[str, ...]) -> list[Any]:
    """The values in a column's cells."""
    if name in WORDS:
        return list(cells)
    whole = COLUMNS[name][0] is int and all(re.fullmatch(r"-?\d{1,18}", cell) for cell in cells)
    values = [(int(cell) if whole else float(cell)) if cell else math.nan for cell in cells]
    if any(math.isinf(value) for value in values):
        raise ValueError(f"{name} is infinite in a row")
    return values


def _checked(columns: Mapping[str, list[Any]]) -> Any:
    import pandas as pd

    table = pd.DataFrame(columns)
    double = table.duplicated(["family", "seed", *KEY])
    if double.any():
        one = table[double].iloc[0]
        which = f"setting {short(one['setting'])!r}, task {short(one['task'])!r}, seed {one['seed']}"
        raise ValueError(f"it has the row of {which} twice")
    return table


# --- what a table says ---------------------------------------------------------------------------------------------


#: Below this CPR gold itself is no circuit to speak of, and a recovery near 1 says little.
WEAK_GOLD = 0.5


def recovery(table: Any, by: Sequence[str] = ("setting",)) -> Any:
    """Recovery as a ratio of means: the mean CPR over the mean CPR of gold on the same tasks, families and seeds.

    A mean of ratios is ruled by the tasks on which gold is weakest: with CPRs of .2 and .9 where gold has .1 and 1, it
    says 145 %, and the ratio of means 100 %.

    Parameters
    ----------
    table:
        A tidy table with the columns setting (gold among them), cpr, and task, family and seed where there are several.
    by:
        What makes a group.

    Returns
    -------
    pandas.DataFrame
        A row for each group, gold's left out: cpr and gold (their means), recovery, rows (how many went into the
        means) and weak_gold (in how many of them gold's CPR is below :data:`WEAK_GOLD`). Recovery is NaN where gold's
        mean is not positive.

    Examples
    --------
    >>> import pandas as pd
    >>> from dfa_lens.experiments.table import recovery
    >>> rows = [("a", "gold", 0.1), ("b", "gold", 1.0), ("a", "zero-shot", 0.2), ("b", "zero-shot", 0.9)]
    >>> found = recovery(pd.DataFrame(rows, columns=["task", "setting", "cpr"]))
    >>> found.loc["zero-shot", ["recovery", "rows", "weak_gold"]].round(3).tolist()
    [1.0, 2.0, 1.0]
    """
    keys = [name for name in ("family", "seed", "task") if name in table]
    gold = table[table["setting"] == GOLD].groupby(keys)["cpr"].mean().rename("gold")
    rest = table[table["setting"] != GOLD].drop(columns="gold", errors="ignore").join(gold, on=keys)
    rest = rest[rest["gold"].notna()]
    groups = rest.assign(weak_gold=rest["gold"] < WEAK_GOLD).groupby(list(by), sort=False)
    found = groups[["cpr", "gold"]].mean()
    found["recovery"] = (found["cpr"] / found["gold"]).where(found["gold"] > 0)
    found["rows"], found["weak_gold"] = groups.size(), groups["weak_gold"].sum()
    return found


def over(table: Any) -> str:
    """What a mean over a table's rows is over: tasks, families and seeds.

    Examples
    --------
    >>> import pandas as pd
    >>> from dfa_lens.experiments.table import over
    >>> over(pd.DataFrame({"task": ["a", "b"], "family": ["llama3"] * 2, "seed": [0, 0]}))
    '2 tasks, 1 family, 1 seed'
    """
    parts = []
    for name, several in (("task", "tasks"), ("family", "families"), ("seed", "seeds")):
        n = table[name].nunique()
        parts.append(f"{n} {name if n == 1 else several}")
    return ", ".join(parts)


def means(table: Any) -> Any:
    """Mean and standard deviation of CPR, CMD and KL by setting, over all other columns: :func:`over` says which.

    The deviation is of rows, tasks among them: it says how much tasks differ, not how sure the mean is.
    """
    return table.groupby("setting", sort=False)[["cpr", "cmd", "kl"]].agg(["mean", "std"])


def summary(table: Any) -> Any:
    """CPR by family and task, a column for each setting and for the floor; a family ends with its mean."""
    import pandas as pd

    wide = table.pivot_table(index=["family", "task"], columns="setting", values="cpr", sort=False)
    wide["floor"] = table.groupby(["family", "task"], sort=False)["floor"].first()
    parts = []
    for family, part in wide.groupby(level="family", sort=False):
        mean = part.mean().to_frame().T
        mean.index = pd.MultiIndex.from_tuples([(family, "mean")], names=["family", "task"])
        parts += [part, mean] if len(part) > 1 else [part]
    return pd.concat(parts)


# --- the results behind it -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskResult:
    """What was found for one task in one family.

    Attributes
    ----------
    source, gold:
        Attribution on the source, and directly on the target (None: it was not run).
    alignments, circuits:
        Setting → alignment, and setting → transferred scores ("in-distribution", "zero-shot", "random W", …).
    curves:
        Setting → faithfulness curve on the target; without "gold" among them there is no recovery.
    seed:
        Of prompts and training.
    labels:
        Setting → further columns of its row (regime, method, control, …), see :data:`COLUMNS`.
    inspection:
        What the target's nodes do on an example.
    by_token:
        Attribution on the target by the tokens of an example, over nodes of :meth:`dfa.Schema.by_token
        <dfa_lens.data.spans.Schema.by_token>`.
    """

    family: str
    task: str
    source: NodeScores
    gold: NodeScores | None
    alignments: Mapping[str, Alignment]
    circuits: Mapping[str, NodeScores]
    curves: Mapping[str, FaithfulnessCurve]
    seed: int = 0
    labels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inspection: Inspection | None = None
    by_token: NodeScores | None = None

    @property
    def controls(self) -> list[str]:
        """The settings that are controls, by their labels or, without any, by their names."""
        known = {"random W", *get_args(Control)}
        return [
            setting
            for setting in self.curves
            if (self.labels[setting].get("control") if setting in self.labels else setting in known)
        ]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row for every setting; made once, since every row has a bootstrap interval."""
        gold_cpr = self.curves[GOLD].cpr if GOLD in self.curves else float("nan")
        where = {"family": self.family, "seed": self.seed, "task": self.task}
        return [
            row(**{**where, "setting": setting, **self.labels.get(setting, {}), **measured(curve, gold_cpr)})
            for setting, curve in self.curves.items()
        ]


@dataclass
class Results:
    """All results of a run, and where they come from.

    Attributes
    ----------
    tasks:
        One entry for each family and task.
    provenance:
        Command, versions, seeds: shown at the end of a report.
    """

    tasks: list[TaskResult] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)

    def table(self) -> Any:
        """The tidy table (pandas), a row per family, task and setting; its columns are :data:`COLUMNS`."""
        return frame(row for result in self.tasks for row in result.rows)

    def summary(self) -> Any:
        """CPR by family and task, see :func:`summary`."""
        return summary(self.table())
