"""Tasks of one's own: anything that makes prompt pairs for a tokenizer, or a file of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch

from dfa_lens.data.files import checked_name, parse_json, read_bytes
from dfa_lens.data.pairs import COLUMNS, PromptPairs
from dfa_lens.errors import FileError, PromptError, TaskError, short, unknown

__all__ = ["FileTask", "TaskSource", "family_of", "sources"]


@runtime_checkable
class TaskSource(Protocol):
    """Makes prompt pairs of a task: ``functools.partial(dfa.tasks.load, "ioi")`` is one, and so is a :class:`FileTask`.

    A study in several processes needs one that other processes find: a function at module level, or a dataclass.
    """

    def __call__(self, tokenizer: Any, *, split: str, n: int, seed: int) -> PromptPairs:
        """At most ``n`` pairs of a split ("train" or "test", which share no prompt), the same for the same seed."""


def sources(tasks: Mapping[str, str | TaskSource] | None, collection: str = "offline") -> dict[str, TaskSource]:
    """Name → what makes the task's pairs.

    Parameters
    ----------
    tasks:
        Name → the name of one of our tasks, or a source of one's own; default: the paper's six.
    collection:
        Where ours come from, see :data:`dfa_lens.tasks.Collection`.

    Raises
    ------
    TaskError
        If there are no tasks, ours has no task of that name, or a name can't stand in a table.

    Examples
    --------
    >>> from dfa_lens.tasks.own import FileTask, sources
    >>> list(sources({"ioi": "ioi", "capitals": FileTask((("Paris is in", "Rome is in", " France", " Italy", ""),))}))
    ['ioi', 'capitals']
    """
    from dfa_lens import tasks as ours

    if tasks is None:
        tasks = {name: name for name in ours.names()}
    if not tasks:
        raise TaskError("There are no tasks.")
    if collection not in get_args(ours.Collection):
        raise unknown("collection", collection, get_args(ours.Collection), TaskError)
    made: dict[str, TaskSource] = {}
    for name, source in tasks.items():
        checked_name(name, "task", TaskError)
        if isinstance(source, str):
            ours.require(source, collection)  # an unknown name is an error here, not after minutes
            made[name] = partial(ours.load, source, collection=collection)  # type: ignore[arg-type]
        elif callable(source):
            made[name] = source
        else:
            raise TaskError(f"Task {name!r} must be a name or a function that makes pairs, not {short(repr(source))}.")
    return made


def family_of(name: str, source: TaskSource) -> str:
    """The family of a task: what its source says (``source.family``), that of the shipped task, or the task's own name.

    Examples
    --------
    >>> from dfa_lens.tasks.own import FileTask, family_of, sources
    >>> family_of("sums", sources({"sums": "addition"})["sums"])
    'arithmetic'
    >>> family_of("capitals", FileTask((("Paris is in", "Rome is in", " France", " Italy", ""),), family="facts"))
    'facts'
    """
    from dfa_lens import tasks as ours

    declared = getattr(source, "family", "")
    if isinstance(source, partial) and source.func is ours.load and source.args:
        declared = ours.FAMILIES.get(source.args[0], "")
    return declared or name


@dataclass(frozen=True)
class FileTask:
    """The prompt pairs of a CSV or JSON-lines file, as text.

    The file has the columns (keys) clean, corrupt, answer and wrong, and may have a column split. Rows are compared by
    what they hold: a study notices that a file has changed.

    Attributes
    ----------
    rows:
        Clean prompt, corrupt prompt, answer, wrong answer and split of each row; the split is "" where there is none.
    name:
        Of the file, for messages.
    family:
        What relatives have in common: none of them teaches where a study leaves families out.
    """

    rows: tuple[tuple[str, str, str, str, str], ...]
    name: str = "the table of prompts"
    family: str = field(default="", compare=False)

    @classmethod
    def read(cls, path: str | Path) -> FileTask:
        """Read a file that ends in .csv, or in .jsonl, .ndjson or .json (one object a line).

        Raises
        ------
        FileError
            If it is missing, ends otherwise, or is no such file.
        TaskError
            If it has no rows, lacks a column, or a cell is no text.
        """
        path = Path(path)
        readers = {".csv": _csv_rows, ".jsonl": _json_rows, ".ndjson": _json_rows, ".json": _json_rows}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise FileError(f"{path} must end in {', '.join(readers)}: CSV with a header, or one JSON object a line.")
        try:
            found = reader(read_bytes(path).decode("utf-8-sig"))
        except (ValueError, csv.Error) as error:
            reason = f"byte {error.start} is no UTF-8" if isinstance(error, UnicodeDecodeError) else short(error)
            raise FileError(f"{path} is not a table of prompts: {reason.rstrip('.')}.") from error
        if not found:
            raise TaskError(f"{path} has no rows.")
        return cls(tuple(_row(path, line, record) for line, record in found), str(path))

    def __call__(self, tokenizer: Any, *, split: str | None = None, n: int | None = None, seed: int = 0) -> PromptPairs:
        """The pairs for a tokenizer.

        Parameters
        ----------
        tokenizer:
            A Hugging Face tokenizer.
        split:
            Only rows of this split; None: all rows.
        n:
            At most so many, drawn at random; None, or more than there are: all, in the file's order.
        seed:
            Which ones.

        Raises
        ------
        TaskError
            If there are no rows of the split.
        PromptError
            If a row can't be used with this tokenizer.
        """
        rows = [row for row in self.rows if split is None or row[-1] == split]
        if not rows and not self.has_splits:
            raise TaskError(f"{self.name} has no column 'split', which says what is for training and what for testing.")
        if not rows:
            known = sorted({repr(row[-1]) for row in self.rows})
            raise TaskError(f"{self.name} has no rows of split {split!r}; it has {short(', '.join(known))}.")
        if n is not None and n < 1:
            raise TaskError(f"n must be at least 1, not {n}.")
        if n is not None and n < len(rows):
            chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]
            rows = [rows[i] for i in chosen.tolist()]
        clean, corrupt, answer, wrong, _ = (list(column) for column in zip(*rows, strict=True))
        try:
            return PromptPairs.from_strings(tokenizer, clean=clean, corrupt=corrupt, answer=answer, wrong=wrong)
        except PromptError as error:
            raise PromptError(f"{self.name}: {error}") from error

    @property
    def has_splits(self) -> bool:
        """Whether the rows say which split they belong to."""
        return any(row[-1] for row in self.rows)


def _csv_rows(text: str) -> list[tuple[int, dict[str, Any]]]:
    """Number of the line and cells by column, of every row."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found = []
    for record in reader:
        if None in record or None in record.values():
            raise ValueError(f"line {reader.line_num} has not as many cells as the header")
        found.append((reader.line_num, record))
    return found


def _json_rows(text: str) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for line, one in enumerate(text.splitlines(), 1):
        if not one.strip():
            continue
        try:
            record = parse_json(one)
        except ValueError as error:
            raise ValueError(f"line {line} is no JSON ({short(error)})") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {line} holds a {type(record).__name__}, not an object")
        found.append((line, record))
    return found


def _row(path: Path, line: int, record: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    for name in COLUMNS:
        if name not in record:
            has = ", ".join(map(repr, record))
            raise TaskError(f"{path}, line {line}: there is no {name!r}; it has {short(has)}.")
        if not isinstance(record[name], str) or not record[name]:
            raise TaskError(f"{path}, line {line}: {name} must be a text, not {short(repr(record[name]))}.")
    clean, corrupt, answer, wrong = (record[name] for name in COLUMNS)
    return clean, corrupt, answer, wrong, str(record.get("split") or "")
