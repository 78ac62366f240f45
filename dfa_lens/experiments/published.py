"""Published numbers as data: those of the DFA paper and of MIB's circuit track, each with its source.

``published.csv`` holds the numbers that were collected, a row for each: the paper's averages for seven ordered pairs of
models with ``nap-ig-inputs``, its table 11, and what MIB's circuit track and one later paper report. ``checked`` says
whether a number was compared with the source: the paper's were, with the tables in the authors' repository
(github.com/jasonshaoshun/dfa-circuits, commit d048d07); the others are transcribed. The averages of Qwen-2.5 are of
five tasks: addition is empty there. A CMD that a table gives for two tasks at once is left out.

All else that the paper prints (the cells of tables 1 to 10 and 12 to 22, the matrices of figure 4) is not in the
package. Whoever has a checkout of the authors' repository has it: :func:`from_release` reads its ``tables`` folder.
"""

from __future__ import annotations

import io
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from dfa_lens.data.files import read_bytes
from dfa_lens.errors import FileError, short

COLUMNS = ("table", "pair", "method", "setting", "trained_on", "task", "metric", "value", "source", "checked")

#: A task as the paper's tables name it → ours.
TASK_OF = {
    "IOI": "ioi",
    "MCQA": "mcqa",
    "Arith +": "addition",
    "Arith -": "subtraction",
    "ARC-E": "arc-easy",
    "ARC-C": "arc-challenge",
}
#: A row of the paper's tables → the setting, however it is spelt there.
SETTING_OF = {
    "gold": "gold",
    "in-distribution": "in-distribution",
    "near-distribution": "near-distribution",
    "zero-shot": "zero-shot",
    "best": "best",
    "random": "random-w",
    "scrambled": "scrambled-s",
    "permuted": "permuted-w",
    "heuristic": "depth-mean",
}
METHOD_OF = {
    "NAP-IG-Inputs": "nap-ig-inputs",
    "NAP-IG-Activations": "nap-ig-activations",
    "NAP": "nap",
    "EAP-IG-inputs": "nap-ig-inputs",
    "EAP-IG-activations": "nap-ig-activations",
    "EAP": "nap",
}


def read() -> Any:
    """The numbers that ship with the package: a pandas table with the columns :data:`COLUMNS`.

    ``table`` is the number of a table of the DFA paper, or "mib" or "matryoshka"; ``pair`` a pair of
    :data:`dfa_lens.experiments.paper.PAIRS`, or a model; ``task`` may be "average"; ``checked`` is a truth value.

    Examples
    --------
    >>> from dfa_lens.experiments import published
    >>> known = published.read()
    >>> row = known[(known["pair"] == "qwen2.5-0.5b-to-3b") & (known["setting"] == "gold")].iloc[0]
    >>> float(row["value"]), row["source"], bool(row["checked"])
    (0.87, 'arXiv 2604.24302, table 8', True)
    """
    import pandas as pd

    text = files("dfa_lens.experiments").joinpath("published.csv").read_text(encoding="utf-8")
    words = {name: str for name in COLUMNS if name != "value"}
    table = pd.read_csv(io.StringIO(text), dtype=words, keep_default_na=False, na_values={"value": [""]})
    return table.assign(checked=table["checked"] == "yes")


def from_release(folder: str | Path) -> Any:
    """All numbers of the authors' tables, from a checkout of their repository that you have.

    Parameters
    ----------
    folder:
        The repository github.com/jasonshaoshun/dfa-circuits, or its folder ``tables``, with the files
        ``table1_leaderboard_*.csv``, ``table3_summary_*.csv``, ``table2_summary_*.csv`` and ``table4_heatmap_*.csv``.

    Returns
    -------
    pandas.DataFrame
        As :func:`read`; ``table`` is the name of the file, and ``checked`` is true: it is the source itself.

    Raises
    ------
    FileError
        If there are no such files, or one has other rows or columns than the authors'.
    """
    import pandas as pd

    place = Path(folder)
    place = place / "tables" if (place / "tables").is_dir() else place
    found = sorted(path for form in _FORMS for path in place.glob(f"{form}_*.csv") if not path.name.startswith("."))
    if not found:
        raise FileError(
            f"{folder} has none of the authors' tables (table1_leaderboard_*.csv, …): name a checkout of "
            "github.com/jasonshaoshun/dfa-circuits."
        )
    rows: list[dict[str, Any]] = []
    for path in found:
        form = next(form for form in _FORMS if path.name.startswith(form))
        try:
            cells = pd.read_csv(io.BytesIO(read_bytes(path)))
            rows += [_row(path, **entry) for entry in _FORMS[form](cells, path.stem.removeprefix(f"{form}_"))]
        except (KeyError, ValueError, UnicodeDecodeError) as error:
            raise FileError(f"{path} is not one of the authors' tables: {short(error)}.") from error
    return pd.DataFrame(rows, columns=list(COLUMNS))


def pair_of(source: str, target: str) -> str:
    """The name of an ordered pair, from the authors' names of two models.

    Examples
    --------
    >>> from dfa_lens.experiments.published import pair_of
    >>> pair_of("llama3-1b", "llama3-8b")
    'llama3-1b-to-8b'
    """
    family, _, _ = source.rpartition("-")
    if not family or not target.startswith(f"{family}-"):
        raise ValueError(f"{short(source)} and {short(target)} are no two models of one family")
    return f"{source}-to-{target.removeprefix(f'{family}-')}"


def _row(path: Path, *, value: float, **known: str) -> dict[str, Any]:
    source = f"github.com/jasonshaoshun/dfa-circuits, tables/{path.name}"
    empty = {"table": path.stem, "trained_on": "", "metric": "cpr", "source": source, "checked": True}
    return {**empty, **known, "value": float(value)}


def _setting(label: str) -> str:
    """ "DFA (Far/Zero-Shot)", "2. Scrambled input $s$", "Gold (Upper Bound)", … by the word that tells it."""
    small = label.lower()
    for word, setting in SETTING_OF.items():
        if word in small:
            return setting
    raise ValueError(f"the row {label!r} is unknown")


def _cells(row: Any, prefix: str = "") -> list[dict[str, Any]]:
    """The tasks' numbers of one row that are there; the average under the name "average"."""
    named = {f"{prefix}{label}": task for label, task in TASK_OF.items()} | {"Average": "average"}
    missing = next((label for label in named if label not in row and label != "Average"), None)
    if missing is not None:
        raise KeyError(f"it has no column {missing!r}")
    return [
        {"task": task, "value": float(row[label])}
        for label, task in named.items()
        if label in row and not math.isnan(row[label])
    ]


def _pair(text: str) -> str:
    source, _, target = text.partition("_to_")
    return pair_of(source, target)


def _leaderboard(cells: Any, rest: str) -> list[dict[str, Any]]:
    found = []
    for row in cells.to_dict("records"):
        # the one baseline is that of nap-ig-inputs: its row in the tables of controls is the same
        method = METHOD_OF[row["Method Category"]] if row["Method Category"] != "Baseline" else "nap-ig-inputs"
        known = {"pair": _pair(rest), "method": method, "setting": _setting(row["Transfer Setting"])}
        found += [{**known, **cell} for cell in _cells(row)]
    return found


def _controls(cells: Any, rest: str) -> list[dict[str, Any]]:
    found = []
    for row in cells.to_dict("records"):
        known = {"pair": _pair(rest), "method": METHOD_OF[row["Method"]], "setting": _setting(row["Setting / Control"])}
        found += [{**known, **cell} for cell in _cells(row)]
    return found


def _scaling(cells: Any, rest: str) -> list[dict[str, Any]]:
    """Six digits where the other tables have two."""
    task = {"arithmetic_addition": "addition", "arithmetic_subtraction": "subtraction"}.get(rest, rest)
    columns = {"Baseline": "random-w", "DFA (Best)": "best", "Gold": "gold"}
    found = []
    for row in cells.to_dict("records"):
        named = re.fullmatch(r"(Llama-3|Qwen-2\.5) \((\S+) \S+ (\S+)\)", row["Target Model Pair"])
        if named is None:
            raise ValueError(f"the pair {row['Target Model Pair']!r} is unknown")
        family = named[1].replace("-", "").lower()
        pair = pair_of(f"{family}-{named[2].lower()}", f"{family}-{named[3].lower()}")
        known = {"pair": pair, "method": METHOD_OF[row["Method"]], "task": task.replace("_", "-")}
        for column, setting in columns.items():
            if not math.isnan(row[column]):
                found.append({**known, "setting": setting, "value": float(row[column])})
    return found


def _heatmap(cells: Any, rest: str) -> list[dict[str, Any]]:
    method, _, pair = rest.partition("_")
    found = []
    for row in cells.to_dict("records"):
        trained = TASK_OF[row["Training Source"].removeprefix("Train: ")]
        known = {"pair": _pair(pair), "method": METHOD_OF[method], "setting": "one-task", "trained_on": trained}
        found += [{**known, **cell} for cell in _cells(row, "Test: ")]
    return found


_FORMS = {
    "table1_leaderboard": _leaderboard,
    "table3_summary": _controls,
    "table2_summary": _scaling,
    "table4_heatmap": _heatmap,
}
