"""Arguments in the wrong order or of the wrong kind, named before anything is run."""

from __future__ import annotations

from dfa_lens.errors import ArgumentError

_NUMBERS = ("first", "second", "third", "fourth")


def expect(place: int, name: str, value: object, *kinds: type) -> None:
    """An :class:`~dfa_lens.errors.ArgumentError` unless an argument is of one of some kinds.

    Parameters
    ----------
    place:
        Which argument it is, counted from 1.
    name:
        What it is called.

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
            f"The {_NUMBERS[place - 1]} argument ({name}) must be {wanted}, got {type(value).__name__}."
        )
