"""Files: written whole or not at all, read with one error for whatever can be wrong with them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dfa_lens.data.content import fingerprint
from dfa_lens.errors import DfaError, FileError, short

_Made = TypeVar("_Made")


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a whole file or none: an interrupted write leaves what was there before.

    Raises
    ------
    FileError
        If it can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise FileError(f"Can't write {path}: {error.strerror or error}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes private files; these are ordinary ones
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise FileError(f"Can't write {path}: {error.strerror or error}.") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_bytes(path: str | Path) -> bytes:
    """What is in a file; a :class:`FileError` if there is none, or it can't be read."""
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder, not a file.")
    if not path.is_file():
        raise FileError(f"There is no file {path}.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"Can't read {path}: {error.strerror or error}.") from error


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The JSON object in a file that should be ``what``.

    Raises
    ------
    FileError
        If the file is missing, not UTF-8, not JSON, nested too deeply, no object, or names a key twice.
    """
    try:
        data = parse_json(read_bytes(path).decode("utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}, not an object")
        return data
    except ValueError as error:
        raise FileError(f"{path} is not {what}: {_reason(error)}.") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text; a ValueError for whatever can be wrong with it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"it has {short(double)!r} twice")
        return made

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _reason(error: Exception) -> str:
    """What an error says, without the data that some quote."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8"
    if isinstance(error, KeyError):
        return f"it lacks {short(error)}"
    return short(error).rstrip(".")


def made_from(path: str | Path, what: str, make: Callable[[], _Made]) -> _Made:
    """What ``make`` makes of data that was read; whatever is wrong with the data is one :class:`FileError`."""
    try:
        return make()
    except FileError:
        raise
    except (DfaError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise FileError(f"{path} is not {what}: {_reason(error)}.") from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], kind: str) -> None:
    """A safetensors file of ours, written whole or not at all."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {"format": kind, **metadata}
    write_atomically(path, save(contiguous, {**content, "checksum": fingerprint((contiguous, content))}))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file that was written as ``kind``.

    Raises
    ------
    FileError
        If the file is missing, broken, of another kind, or has changed since it was written.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        read_bytes(path)  # says why
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise FileError(f"{path} is not a readable safetensors file: {_reason(error)}.") from error
    if metadata.get("format") != kind:
        raise FileError(f"{path} is not a file of {kind.rsplit(' ', 1)[0]!r}.")
    checksum = metadata.pop("checksum", None)  # files of the first versions have none
    if checksum is not None and checksum != fingerprint((tensors, metadata)):
        raise FileError(f"{path} was damaged after it was written: its checksum is not that of its content.")
    return tensors, metadata
