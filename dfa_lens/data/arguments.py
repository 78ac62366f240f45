"""Arguments in the wrong order, of the wrong kind or of other tasks, named before anything is run."""

from __future__ import annotations

from collections.abc import Mapping

from dfa_lens.errors import AlignmentError, ArgumentError, short

_NUMBERS = ("first", "second", "third", "fourth")


def expect(place: int, name: str, value: object, *kinds: type, note: str = "") -> None:
    """An :class:`~dfa_lens.errors.ArgumentError` unless an argument is of one of some kinds.

    Parameters
    ----------
    place:
        Which argument it is, counted from 1.
    name:
        What it is called.
    note:
        Said behind what was given instead.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.data.arguments import expect
    >>> expect(2, "pairs", dfa.NodeSet.for_sizes(1, 1), dfa.PromptPairs)
    Traceback (most recent call last):
        ...
    dfa_lens.errors.ArgumentError: The second argument (pairs) must be PromptPairs, got NodeSet.
    """
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ArgumentError(
            f"The {_NUMBERS[place - 1]} argument ({name}) must be {wanted}, got {type(value).__name__}{note}."
        )


def every_task(first: Mapping[str, object], second: Mapping[str, object], names: tuple[str, str]) -> None:
    """An :class:`~dfa_lens.errors.AlignmentError` unless ``second`` has every task of ``first``, which has one.

    Parameters
    ----------
    first, second:
        Task → anything.
    names:
        What the two are called.

    Examples
    --------
    >>> from dfa_lens.data.arguments import every_task
    >>> every_task({"ioi": 1}, {"ioi": 2, "mcqa": 3}, ("scores", "pairs"))
    >>> every_task({"ioi": 1}, {"mcqa": 3}, ("scores", "pairs"))
    Traceback (most recent call last):
        ...
    dfa_lens.errors.AlignmentError: Task 'ioi' is in scores but not in pairs; both need the same tasks.
    """
    if not first:
        raise AlignmentError(f"There is no task: {names[0]} are empty.")
    missing = next((task for task in first if task not in second), None)
    if missing is not None:
        raise AlignmentError(
            f"Task {short(repr(missing))} is in {names[0]} but not in {names[1]}; both need the same tasks."
        )


def same_tasks(first: Mapping[str, object], second: Mapping[str, object], names: tuple[str, str]) -> None:
    """An :class:`~dfa_lens.errors.AlignmentError` unless two mappings are of the same tasks; see :func:`every_task`.

    Examples
    --------
    >>> from dfa_lens.data.arguments import same_tasks
    >>> same_tasks({"ioi": 1}, {"ioi": 2, "mcqa": 3}, ("scores", "pairs"))
    Traceback (most recent call last):
        ...
    dfa_lens.errors.AlignmentError: Task 'mcqa' is in pairs but not in scores; both need the same tasks.
    """
    every_task(first, second, names)
    every_task(second, first, (names[1], names[0]))
