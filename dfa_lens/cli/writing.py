"""What commands write: a file, a folder or standard output, and text or JSON beside it."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from dfa_lens.data.content import plain
from dfa_lens.errors import DfaError, FileError

#: What ``--out`` says for standard output.
STANDARD_OUTPUT = Path("-")


def require_suffix(out: Path, what: str, suffixes: Sequence[str]) -> str:
    """The suffix of a file to write, if ``what`` is written so; the first one where there is none.

    Raises
    ------
    FileError
        If it is another: a file that is not what its name says is found out later.
    """
    if out == STANDARD_OUTPUT or not out.suffix:
        return suffixes[0]
    if out.suffix not in suffixes:
        raise FileError(f"{what} can't be written as {out.suffix}: use {' or '.join(suffixes)}.")
    return out.suffix


@contextmanager
def written(out: Path, as_json: bool = False) -> Iterator[Path]:
    """Where to write: the file itself, or for standard output one that is then copied there."""
    if out != STANDARD_OUTPUT:
        yield out
        return
    if as_json:
        raise DfaError("Both --out - and --json are for standard output: give one of them.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        yield path
        sys.stdout.flush()
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()


def say(text: str, facts: dict[str, Any], *, as_json: bool, out: Path | None = None) -> None:
    """Print what was found, as text or as JSON; beside the data, where they go to standard output."""
    if as_json:
        typer.echo(json.dumps(_finite(plain(facts)), ensure_ascii=False))
    else:
        typer.echo(text, err=out == STANDARD_OUTPUT)


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a pandas table."""
    return json.loads(table.to_json(orient="records", double_precision=15))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value
