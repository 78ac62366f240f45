"""Files: written whole or not at all, read with one error for whatever is wrong with them; names and locks of files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dfa_lens.data.content import fingerprint
from dfa_lens.errors import DfaError, FileError, short

_Made = TypeVar("_Made")


# --- writing -------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a whole file or none: an interrupted write leaves what was there before.

    A link stays a link, to a file with the new content; a file that was there keeps its mode.

    Raises
    ------
    FileError
        If it can't be written.
    """
    path = writable(path)
    with _as_file_error(f"Can't write {_shown(path)}"):
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
        # a name of its own, not the file's and more: that could be too long
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".dfa-lens-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, mode)  # mkstemp makes private files
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def writing(file: Any) -> Iterator[None]:
    """Around another library's writing of a file: a :class:`FileError` if it can't be done, before it is begun."""
    if not isinstance(file, (str, os.PathLike)):  # an open file is its owner's
        yield
        return
    path = writable(file)
    try:
        yield
    except OSError as error:
        raise FileError(f"Can't write {_shown(path)}: {error.strerror or short(error)}.") from error


def writable(path: str | os.PathLike[str], *, folder: bool = False) -> Path:
    """The path, if a file (or ``folder``) can be written there: asked before the work, not after it.

    Raises
    ------
    FileError
        If the path is empty, has a NUL in it, is a folder where a file is wanted or a file where a folder is, is a
        device or a pipe (also through a link), or lies where nothing may be written.
    """
    text = os.fspath(path)
    if (text in ("", ".") and not folder) or "\0" in text:
        raise FileError(f"Can't write a file called {short(repr(text))}.")
    path = Path(path)
    with _as_file_error(f"Can't write {_shown(path)}"):
        if path.exists() and path.is_dir() != folder:
            raise FileError(f"Can't write {_shown(path)}: it is a {'folder' if path.is_dir() else 'file'}.")
        if path.exists() and not path.is_dir() and not path.is_file():
            raise FileError(f"Can't write {_shown(path)}: it is a device or a pipe, and would be replaced.")
        existing = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not existing.is_dir() and existing != path:
            raise FileError(f"Can't write {_shown(path)}: {_shown(existing)} is no folder.")
        if not os.access(existing if existing.is_dir() else existing.resolve().parent, os.W_OK):
            raise FileError(f"Can't write {_shown(path)}: permission denied.")
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _as_file_error(what: str) -> Iterator[None]:
    """Whatever the system says of a file becomes a FileError: "``what``: its reason"."""
    try:
        yield
    except FileError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL; RuntimeError: links in a circle
        raise FileError(f"{what}: {getattr(error, 'strerror', None) or short(error)}.") from error


def _shown(path: str | Path) -> str:
    return short(path, 250)


# --- names ---------------------------------------------------------------------------------------------------------

#: What a name may have: it goes into tables, messages and the names of files.
LONGEST_NAME = 200
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]{0,79}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def checked_name(name: object, what: str, error: type[DfaError] = DfaError) -> str:
    """A name of somebody's choice, if it can stand in a table and in a message.

    That is: a text of up to 200 characters on one line, which begins with a letter, a digit or "_" (a cell that begins
    with "=" would be a formula to a spreadsheet).

    Raises
    ------
    DfaError
        Or ``error``, if it is another thing.

    Examples
    --------
    >>> from dfa_lens.data.files import checked_name
    >>> checked_name("zero-shot", "setting")
    'zero-shot'
    """
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise error(
            f"The name of a {what} must be a text of one line, of 1 to {LONGEST_NAME} characters, not {_q(name)}."
        )
    if not (name[0].isalnum() or name[0] == "_"):
        raise error(f"The name of a {what} must begin with a letter, a digit or '_', not as {_q(name)} does.")
    return name


def _q(value: object) -> str:
    return short(repr(value[:200] if isinstance(value, str) else value), 60)


def file_name(name: str) -> str:
    """A name as that of a file: itself where every system takes it, else what is left of it and a hash.

    It never leads to another folder, and two names never share a file.

    Examples
    --------
    >>> from dfa_lens.data.files import file_name
    >>> file_name("llama3"), file_name("../../a/b")
    ('llama3', '_a_b-de731b84b865')
    """
    if _SAFE.fullmatch(name) and not _RESERVED.fullmatch(name) and not name.endswith("."):
        return name
    kept = re.sub(r"[^A-Za-z0-9_+@=-]+", "_", name)[:40].strip("-") or "_"
    return f"{kept}-{hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"


# --- one at a time -------------------------------------------------------------------------------------------------


@contextmanager
def held(path: Path, refusal: str, *, wait: float = 0.0, where_possible: bool = False) -> Iterator[None]:
    """Hold a lock file for the length of the context; the system lets go of it however the process ends.

    Parameters
    ----------
    refusal:
        What the error says if another process holds it.
    wait:
        Seconds to wait for it.
    where_possible:
        Go on without a lock on file systems that have none (some network mounts).

    Raises
    ------
    FileError
        If another process holds it, or it can't be made.
    """
    from filelock import FileLock, Timeout

    with _as_file_error(f"Can't write {_shown(path)}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=wait, poll_interval=0.05)
        except Timeout:
            raise FileError(refusal) from None
        except NotImplementedError as error:  # some network file systems
            if where_possible:
                yield
                return
            raise FileError(f"{_shown(path.parent)} can't be locked: {short(error)}.") from error
    try:
        yield
    finally:
        lock.release()


# --- reading -------------------------------------------------------------------------------------------------------


def read_bytes(path: str | Path) -> bytes:
    """What is in a file; a :class:`FileError` if there is none, or it can't be read."""
    text = os.fspath(path)
    if not text or "\0" in text:
        raise FileError(f"There is no file called {short(repr(text))}.")
    path = Path(path)
    with _as_file_error(f"Can't read {_shown(path)}"):
        if path.is_dir():
            raise FileError(f"{_shown(path)} is a folder, not a file.")
        if not path.is_file():
            raise FileError(f"There is no file {_shown(path)}.")
        return path.read_bytes()


def read_json(path: str | Path, what: str, kind: str | None = None) -> dict[str, Any]:
    """The JSON object in a file that should be ``what``, and say that its format is ``kind``.

    Raises
    ------
    FileError
        If the file is missing, not UTF-8, not JSON, nested too deeply, no object, or names a key twice; or of
        another format.
    """
    try:
        data = parse_json(read_bytes(path).decode("utf-8-sig"))  # some editors begin a file with a byte-order mark
        if not isinstance(data, dict):
            raise ValueError(f"it holds a {type(data).__name__}, not an object")
    except ValueError as error:
        raise FileError(f"{path} is not {what}: {_reason(error)}.") from error
    if kind is not None and data.get("format") != kind:
        raise FileError(f"{path} is not {what}.")
    return data


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


def load_tensors(path: str | Path, kind: str, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata, called ``names``, of a safetensors file that was written as ``kind``.

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
        found = metadata.get("format", "")
        what = f": it is one of {short(found.rsplit(' ', 1)[0])!r}" if found.startswith("dfa_lens ") else ""
        raise FileError(f"{path} is not a file of {kind.rsplit(' ', 1)[0]!r}{what}.")
    checksum = metadata.pop("checksum", None)  # files of the first versions have none
    foreign = metadata.keys() - {"format", *names}
    if foreign:
        raise FileError(f"{path} has {short(min(foreign))!r} in it, which a file of its kind has not.")
    if checksum is not None and checksum != fingerprint((tensors, metadata)):
        raise FileError(f"{path} was damaged after it was written: its checksum is not that of its content.")
    return tensors, metadata
