"""A study's folder: what is done, what somebody is at, what went wrong. Many workers write to it at once.

Every unit has a name that says what it is of (:meth:`~dfa_lens.experiments.experiment.Experiment.key`), so a file is
right whoever wrote it, and written whole or not at all. Nothing depends on locks: that two workers do one thing twice
is prevented by claims, whose worst failure is that it is done twice.

    study.json   plan.json   table.csv
    units/KEY.json           a finished unit: its numbers, who did it and how long it took
    units/KEY.safetensors    its scores, measurements or W
    claims/KEY               the worker that is at it
    workers/WORKER.json      where it runs; its time is when it was last heard of
    failed/KEY.N.json        what went wrong, and how often
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.content import fingerprint
from dfa_lens.data.files import read_json, write_atomically
from dfa_lens.data.measurements import Measurements
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import FileError

#: Seconds between two signs of life, and after which a worker on another machine counts as dead.
BEAT, SILENCE = 15.0, 120.0


Kept = NodeScores | Measurements | Alignment
"""What units leave behind."""
Value = TypeVar("Value")


class Folder:
    """The folder of a study.

    Examples
    --------
    >>> import tempfile
    >>> from dfa_lens.experiments.folder import Folder
    >>> folder = Folder(tempfile.mkdtemp())
    >>> folder.claim("abc", "me"), folder.claim("abc", "you")
    (True, False)
    >>> folder.finish("abc", {"cpr": 0.5})
    >>> folder.finished(), folder.record("abc")
    ({'abc'}, {'cpr': 0.5})
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def _names(self, part: str) -> list[str]:
        with suppress(FileNotFoundError):
            return [entry.name for entry in os.scandir(self.path / part) if not entry.name.startswith(".")]
        return []

    # --- what is done --------------------------------------------------------------------------------------------

    def value(self, key: str, load: Callable[[Path], Value]) -> Value | None:
        """What a unit left behind, if it was there."""
        path = self.path / "units" / f"{key}.safetensors"
        return load(path) if path.is_file() else None

    def keep(self, key: str, value: Kept) -> None:
        """Leave something behind."""
        value.save(self.path / "units" / f"{key}.safetensors")

    def finish(self, key: str, record: Mapping[str, Any]) -> None:
        """A unit is done: the last that is written of it."""
        write_checked(self.path / "units" / f"{key}.json", record)

    def finished(self) -> set[str]:
        """The keys of what is done."""
        return {name[:-5] for name in self._names("units") if name.endswith(".json")}

    def is_finished(self, key: str) -> bool:
        """Whether a unit is done."""
        return (self.path / "units" / f"{key}.json").exists()

    def record(self, key: str) -> dict[str, Any]:
        """What was found of a finished unit."""
        return read_checked(self.path / "units" / f"{key}.json", "a unit of a study")

    # --- who is at what ------------------------------------------------------------------------------------------

    def claim(self, key: str, worker: str) -> bool:
        """Begin a unit, unless another worker has."""
        path = self.path / "claims" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)  # one succeeds, also over NFS
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(worker)
        return True

    def release(self, key: str) -> None:
        """Nobody is at a unit any more."""
        (self.path / "claims" / key).unlink(missing_ok=True)

    def claims(self) -> dict[str, str]:
        """Key → the worker that is at it; "" where it was killed before it could say so."""
        found = {}
        for key in self._names("claims"):
            with suppress(FileNotFoundError):
                found[key] = (self.path / "claims" / key).read_text()
        return found

    @contextmanager
    def at_work(self, worker: str) -> Iterator[None]:
        """Signs of life, for the length of the context."""
        path = self.path / "workers" / f"{worker}.json"
        write_atomically(path, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT):
                with suppress(OSError):
                    os.utime(path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            path.unlink(missing_ok=True)

    def alive(self) -> set[str]:
        """The workers that have been heard of lately, and on this machine are there."""
        import psutil

        probe = self.path / ".now"  # the time of the machine whose disk this is
        probe.touch()
        now, found = probe.stat().st_mtime, set()
        for name in self._names("workers"):
            path = self.path / "workers" / name
            with suppress(FileError, FileNotFoundError, KeyError):
                where = read_json(path, "a worker of a study")
                here = where["host"] == socket.gethostname()
                if psutil.pid_exists(where["pid"]) if here else now - path.stat().st_mtime < SILENCE:
                    found.add(name.removesuffix(".json"))
        return found

    # --- what went wrong -----------------------------------------------------------------------------------------

    def fail(self, key: str, note: Mapping[str, Any]) -> None:
        """A unit did not work."""
        number = sum(name.startswith(f"{key}.") for name in self._names("failed"))
        write_checked(self.path / "failed" / f"{key}.{number}.json", note)

    def failures(self) -> dict[str, list[dict[str, Any]]]:
        """Key → what went wrong with it, in order."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name in sorted(self._names("failed")):
            note = read_checked(self.path / "failed" / name, "the failure of a unit")
            found.setdefault(name.split(".")[0], []).append(note)
        return found

    def forgive(self) -> None:
        """Forget what went wrong: all of it is tried again."""
        for name in self._names("failed"):
            (self.path / "failed" / name).unlink(missing_ok=True)

    # --- the end of a run ----------------------------------------------------------------------------------------

    def stop(self, run: str) -> None:
        """Let the workers of a run end after the unit that they are at."""
        write_atomically(self.path / "workers" / f".{run}.stop", b"")

    def stopped(self, run: str) -> bool:
        """Whether they are to."""
        return (self.path / "workers" / f".{run}.stop").exists()


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file with a checksum."""
    written = json.loads(json.dumps(content))  # a tuple is read as a list, and a number as a key as its text
    write_atomically(path, json.dumps({**written, "checksum": fingerprint(written)}).encode())


def read_checked(path: Path, what: str) -> dict[str, Any]:
    """What :func:`write_checked` wrote.

    Raises
    ------
    FileError
        If it is missing, damaged or something else.
    """
    found = read_json(path, what)
    checksum = found.pop("checksum", None)
    if checksum != fingerprint(found):
        raise FileError(f"{path} was damaged after it was written: remove it, and it is made again.")
    return found
