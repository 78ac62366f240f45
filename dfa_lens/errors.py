"""Every error that dfa_lens raises on purpose.

All of them derive from :class:`DfaError`, so one ``except dfa.DfaError`` catches what the library itself rejects
and lets everything else (a bug, an out-of-memory, Ctrl-C) through. Where a built-in error says the same thing,
ours derives from that as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DfaError(Exception):
    """The root of every error of ours."""


class ArgumentError(DfaError, TypeError):
    """An argument of another kind than the function takes, or two of them in the wrong order."""


class NodeError(DfaError, ValueError):
    """A node, node set or hook point that does not exist, or does not fit where it is used."""


class NodeIndexError(NodeError, IndexError):
    """A number beyond the last node; an IndexError too, since that is what ends a loop over numbers."""


class EdgeError(DfaError, ValueError):
    """An edge or edge set that does not exist, or does not fit where it is used."""


class HookError(DfaError, RuntimeError):
    """The model can't be hooked as asked: a point that never fires, a flag that is off, a wrong shape."""


class PromptError(DfaError, ValueError):
    """Prompt pairs that can't be used: lengths, ids, answers."""


class PromptIndexError(PromptError, IndexError):
    """A number beyond the last prompt pair; an IndexError too, since that is what ends a loop over numbers."""


class TaskError(DfaError, ValueError):
    """An unknown task, split or counterfactual, or data that does not have the expected form."""


class ScoreError(DfaError, ValueError):
    """Scores that can't be used: not finite, of the wrong length, of another node set."""


class MeasurementError(DfaError, ValueError):
    """Measurements that can't be used: not finite, of another model or task, too few."""


class AlignmentError(DfaError, ValueError):
    """An alignment that can't be trained, composed or applied."""


class TrainingError(DfaError, RuntimeError):
    """Training that went wrong: a loss that is not finite.

    ``alignment`` is what had been learned before, or None if nothing had.
    """

    alignment: Any = None


class CircuitError(DfaError, ValueError):
    """A circuit that can't be made or compared: of other nodes, of a size that it can't have."""


class FaithfulnessError(DfaError, ValueError):
    """A faithfulness curve that is not defined."""


class ModelError(DfaError, ValueError):
    """A model that can't be loaded or used."""


class StudyError(DfaError, RuntimeError):
    """A study of which some units failed; the others are done, and kept where there is a folder.

    ``failures`` has a dictionary for each unit that was given up (unit, error, traceback, worker), ``table`` the
    rows that there are.
    """

    failures: Any = ()
    table: Any = None


class FileError(DfaError, OSError):
    """A file that is missing, broken, or not one of ours."""


def unknown(what: str, given: object, valid: Iterable[str], error: type[DfaError] = DfaError) -> DfaError:
    """An error that quotes the misspelt name, lists the valid ones and guesses which was meant."""
    names = list(valid)
    close = difflib.get_close_matches(short(given), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listing = ", ".join(repr(name) for name in names) if names else "there are none"
    return error(f"Unknown {what} {short(repr(given))}: expected one of {listing}.{hint}")


def short(text: object, limit: int = 120) -> str:
    """At most so many characters of a text, for messages: what is wrong, not the file that it is in."""
    whole = str(text)
    return plain_text(whole) if len(whole) <= limit else f"{plain_text(whole[:limit])}…"


def plain_text(text: object) -> str:
    """A text as a terminal may have it: a name out of a file can't move its cursor or set its title.

    Examples
    --------
    >>> from dfa_lens.errors import plain_text
    >>> plain_text("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))
