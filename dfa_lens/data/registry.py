"""Things that are asked for by name: methods, metrics, forms of W, objectives, tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from dfa_lens.errors import DfaError, unknown

Thing = TypeVar("Thing")


class Registry(Mapping[str, Thing], Generic[Thing]):
    """Names and what they stand for, in the order in which they were registered.

    Parameters
    ----------
    what:
        What the things are called in an error, "method" say.
    error:
        What is raised for an unknown name.
    entries:
        Those that are known from the start.

    Examples
    --------
    >>> from dfa_lens.data.registry import Registry
    >>> colours = Registry("colour", entries={"red": 1, "green": 2})
    >>> colours.find("green"), list(colours)
    (2, ['red', 'green'])
    """

    def __init__(self, what: str, error: type[DfaError] = DfaError, entries: Mapping[str, Thing] | None = None) -> None:
        self.what, self.error = what, error
        self._entries: dict[str, Thing] = dict(entries or {})

    def find(self, name: object) -> Thing:
        """What is registered under a name.

        Raises
        ------
        DfaError
            If nothing is: the message lists what there is, and guesses what was meant.
        """
        if not isinstance(name, str) or name not in self._entries:
            raise unknown(self.what, name, self._entries, self.error)
        return self._entries[name]

    def register(self, name: str, thing: Thing) -> None:
        """Add something of your own.

        Raises
        ------
        DfaError
            If the name is taken.
        """
        if name in self._entries:
            raise self.error(f"There is a {self.what} {name!r} already: choose another name.")
        self._entries[name] = thing

    def __getitem__(self, name: str) -> Thing:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
