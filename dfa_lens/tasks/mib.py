"""The six data sets of the Mechanistic Interpretability Benchmark (MIB), read with ``datasets``.

Each row has a prompt and several counterfactuals: nested records with a prompt of their own and what is right there.
:func:`rows` turns rows into :class:`~dfa_lens.tasks.offline.Example` and says of the others why they can't be used;
which rows those are depends on the tokenizer, as in the benchmark's own selection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfa_lens.data import tokenization
from dfa_lens.data.registry import Registry
from dfa_lens.errors import TaskError, short, unknown
from dfa_lens.tasks.offline import Example

SPLITS = ("train", "validation", "test")

Reason = str
"""Why a row can't be used."""


class _UnusableError(Exception):
    """A row that is left out; the text is the reason."""


@dataclass(frozen=True)
class MibTask:
    """One data set and how its rows are read.

    Attributes
    ----------
    name, summary:
        As for the offline tasks.
    repository, revision, config:
        On the Hugging Face hub; a revision of None is the newest.
    counterfactual:
        The default one.
    columns:
        What every row must have, beside ``prompt`` and the counterfactual.
    read:
        (row, counterfactual record, tokenizer) → example; raises :class:`_UnusableError`.
    """

    name: str
    summary: str
    repository: str
    counterfactual: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any], Any], Example]
    revision: str | None = None
    config: str | None = None


def _text(value: object) -> str:
    """A cell that is a text, or a whole number as the data sets write results; a row without is left out."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _UnusableError("missing value" if value is None or value != value else "not a text")  # noqa: PLR0124 - NaN


def _n_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenization.tokens(tokenizer, [text], special=False)[0])


def _ioi(row: Mapping[str, Any], other: Mapping[str, Any], tokenizer: Any) -> Example:
    """Kept: rows whose indirect object, subject and third name have equally many tokens."""
    people = row["metadata"]
    names = [f" {_text(people[key])}" for key in ("indirect_object", "subject", "random_c")]
    if len({_n_tokens(tokenizer, name) for name in names}) > 1:
        raise _UnusableError("names of different lengths")
    return Example(row["prompt"], other["prompt"], names[0], names[1], "", 0)


def _choice(row: Mapping[str, Any], other: Mapping[str, Any], tokenizer: Any) -> Example:
    """Kept: rows whose two labels have equally many tokens."""

    def label(record: Mapping[str, Any]) -> str:
        labels, index = record["choices"]["label"], record["answerKey"]
        if index is None:
            raise _UnusableError("missing value")
        if not 0 <= int(index) < len(labels):
            raise _UnusableError("answer key outside the choices")
        return _text(labels[int(index)])

    answer, wrong = label(row), label(other)
    if _n_tokens(tokenizer, answer) != _n_tokens(tokenizer, wrong):
        raise _UnusableError("labels of different lengths")
    choices = tuple(map(_text, row["choices"]["label"])), tuple(map(_text, other["choices"]["label"]))
    return Example(row["prompt"], other["prompt"], answer, wrong, "", 0, *choices)


def _arithmetic(operator: str) -> Callable[[Mapping[str, Any], Mapping[str, Any], Any], Example]:
    def read(row: Mapping[str, Any], other: Mapping[str, Any], tokenizer: Any) -> Example:
        """Kept: rows of the operator whose two results are single tokens."""
        if row["operator"] != operator:
            raise _UnusableError("other operator")
        answer, wrong = _text(row["label"]), _text(other["label"])
        if _n_tokens(tokenizer, answer) != 1 or _n_tokens(tokenizer, wrong) != 1:
            raise _UnusableError("result of several tokens")
        return Example(row["prompt"], other["prompt"], answer, wrong, "", 0)

    return read


_SYMBOL = "symbol_counterfactual"
_RANDOM = "random_counterfactual"
_CHOICE_COLUMNS = ("choices", "answerKey")
_ARITHMETIC_COLUMNS = ("label", "operator")

TASKS: Registry[MibTask] = Registry(
    "task",
    TaskError,
    {
        task.name: task
        for task in (
            MibTask(
                "ioi",
                "Indirect object identification in natural templates.",
                "mib-bench/ioi",
                "s2_io_flip_counterfactual",
                ("metadata",),
                _ioi,
                revision="e5f3468f3af4c0883be35cd3bced8c711c95d286",
            ),
            MibTask(
                "mcqa",
                "Copy-colours: a stated colour among four lettered options.",
                "mib-bench/copycolors_mcqa",
                _SYMBOL,
                _CHOICE_COLUMNS,
                _choice,
                revision="682676b0e80d3a80e847a21810157710c1f23e27",
                config="4_answer_choices",
            ),
            MibTask(
                "addition",
                "Addition of two numbers.",
                "mib-bench/arithmetic_addition",
                _RANDOM,
                _ARITHMETIC_COLUMNS,
                _arithmetic("+"),
                revision="d56d68b7b1d8f9c7e9a262ec1f89331ed52c7516",
            ),
            MibTask(
                "subtraction",
                "Subtraction of two numbers.",
                "mib-bench/arithmetic_subtraction",
                _RANDOM,
                _ARITHMETIC_COLUMNS,
                _arithmetic("-"),
            ),
            MibTask(
                "arc-easy",
                "School science with four lettered options, the easy set.",
                "mib-bench/arc_easy",
                _SYMBOL,
                _CHOICE_COLUMNS,
                _choice,
                revision="be6999b975e8348387cc9a21f3c8b6be8021e7d6",
            ),
            MibTask(
                "arc-challenge",
                "School science with four lettered options, the hard set.",
                "mib-bench/arc_challenge",
                _SYMBOL,
                _CHOICE_COLUMNS,
                _choice,
            ),
        )
    },
)


def rows(
    name: str,
    tokenizer: Any,
    *,
    split: str,
    seed: int,
    counterfactual: str | None,
    path: str | Path | None,
) -> Iterator[Example | Reason]:
    """Every row in an order drawn from ``seed``: an example, or the reason why it can't be used.

    Raises
    ------
    TaskError
        If a name is unknown, the data set can't be read, or a column is missing.
    """
    task = TASKS.find(name)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS, TaskError)
    dataset, where = _read(task, split, path)
    offered = [column for column in dataset.column_names if column.endswith("_counterfactual")]
    chosen = counterfactual or task.counterfactual
    if not chosen.endswith("_counterfactual"):
        chosen += "_counterfactual"
    if chosen not in offered:
        raise unknown(f"counterfactual for {name!r}", counterfactual or chosen, offered, TaskError)
    for column in ("prompt", *task.columns):
        if column not in dataset.column_names:
            has = ", ".join(map(repr, dataset.column_names))
            raise TaskError(f"{where}, split {split!r}, has no column {column!r}; it has {has}.")
    return _examples(task, dataset.shuffle(seed=seed), chosen, tokenizer, where)


def _examples(
    task: MibTask, dataset: Any, counterfactual: str, tokenizer: Any, where: str
) -> Iterator[Example | Reason]:
    for number, row in enumerate(dataset):
        other = row[counterfactual]
        if other is None or (isinstance(other, Mapping) and other.get("prompt", "") is None):
            yield "no counterfactual"
            continue
        try:
            yield task.read(row, other, tokenizer)
        except _UnusableError as reason:
            yield str(reason)
        except KeyError as error:
            has = short(", ".join(map(repr, other)))
            raise TaskError(
                f"{where}: a record of {counterfactual!r} or its row lacks {error}; it has {has}."
            ) from error
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise TaskError(
                f"{where}: row {number} (in shuffled order) or its {counterfactual!r} does not have the form of "
                f"{task.repository}: {short(error)}."
            ) from error


def _read(task: MibTask, split: str, path: str | Path | None) -> tuple[Any, str]:
    """The rows of a split, and what to call the place they come from."""
    import datasets
    from datasets.exceptions import DatasetsError

    source, options = task.repository, {"revision": task.revision, "name": task.config}
    if path is not None:
        folder = Path(path)
        inner = folder / task.repository.split("/")[1]
        folder = inner if inner.is_dir() else folder
        if not folder.is_dir():
            raise TaskError(f"There is no folder {folder}.")
        _check_complete(folder)
        source, options = str(folder), {"name": task.config}
        if task.config is not None and (folder / task.config).is_dir():
            options = {"data_dir": task.config}
    try:
        with _quiet(datasets):
            return datasets.load_dataset(source, split=split, **options), source
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        if "Unknown split" in str(error):
            raise TaskError(f"{source} has no split {split!r}: {short(error, 300)}") from error
        hint = "Was it downloaded completely?" if path is not None else "Is the Hugging Face hub within reach?"
        raise TaskError(f"{source} can't be read. {hint} ({type(error).__name__}: {short(error, 300)})") from error


def _check_complete(folder: Path) -> None:
    """Refuse what an interrupted download leaves behind."""
    for file in folder.rglob("*"):
        if not file.is_file():
            continue
        if file.suffix in (".incomplete", ".part", ".lock"):
            raise TaskError(f"{file} was left by a download that did not finish: download the data set again.")
        if file.suffix in (".parquet", ".json", ".jsonl", ".csv"):
            with file.open("rb") as opened:
                head = opened.read(64)
            if not head or head.startswith(b"version https://git-lfs"):
                what = "is empty" if not head else "is a Git LFS pointer, not the data"
                raise TaskError(f"{file} {what}: download the data set again (git lfs pull).")
    if not any(folder.rglob("*")):
        raise TaskError(f"{folder} is empty: download the data set again.")


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars for reading a file; the setting is global in datasets, so it is put back."""
    enabled = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()
