"""Which rows an index means: one rule for prompt pairs and node sets, numpy's where numpy has one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor

from dfa_lens.errors import DfaError, short

Index = Any
"""What rows can be chosen by.

- an integer (Python's, numpy's, a tensor of no axes), negative ones from the end, or a slice;
- integers: a list, tuple, range, array, tensor or pandas column;
- booleans, one for each row: the same kinds. A pandas column whose labels are the numbers of the rows in another order
  (a table that was sorted) goes by its labels.

Anything else is refused: floats, a single boolean, booleans among integers, more than one axis.
"""


def integer(index: object) -> int | None:
    """The integer that ``index`` is, of whatever library; None if it is none. A boolean is none."""
    if isinstance(index, (bool, np.bool_)):
        return None
    if isinstance(index, (Tensor, np.ndarray)):
        return integer(index.item()) if index.ndim == 0 else None
    try:
        return operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        return None


def row(index: int, n: int, of: str, error: type[DfaError]) -> int:
    """The row from the start that ``index`` means among ``n``; ``error`` if there is none."""
    if not -n <= index < n:
        raise error(f"There is no number {index} among {n} {of}.")
    return index % n


def rows(
    index: Index, n: int, of: str, error: type[DfaError], *, lookup: Callable[[str], int] | None = None
) -> list[int]:
    """The rows that a slice, or several integers or booleans mean among ``n``.

    Parameters
    ----------
    of:
        What the rows are, for messages.
    error:
        What is raised.
    lookup:
        Makes rows of texts, where rows have names.
    """
    if isinstance(index, slice):
        try:
            return list(range(n)[index])
        except TypeError:
            raise error(f"A slice of {of} goes from integer to integer, not {index!r}.") from None
    items = _items(index, n, of, error)
    if lookup is not None:
        items = [lookup(item) if isinstance(item, str) else item for item in items]
    if items and all(_is_boolean(item) for item in items):
        if len(items) != n:
            raise error(f"A mask of {len(items)} booleans for {n} {of}: one for each is needed.")
        return [i for i, chosen in enumerate(items) if chosen]
    found = [integer(item) for item in items]
    if None in found:
        raise error(
            f"{short(repr(items[found.index(None)]))} does not choose among {of}: give integers, or one boolean for "
            f"each of the {n}."
        )
    return [row(at, n, of, error) for at in found if at is not None]


def _is_boolean(item: object) -> bool:
    return isinstance(item, (bool, np.bool_)) or (isinstance(item, Tensor) and isinstance(item.item(), bool))


def _items(index: Index, n: int, of: str, error: type[DfaError]) -> Sequence[Any]:
    """The index as a list of what is in it."""
    if hasattr(index, "to_numpy"):  # pandas
        index = _by_label(index, n, of, error) if hasattr(index, "index") else index.to_numpy()
    if isinstance(index, (Tensor, np.ndarray)):
        if index.ndim != 1:
            raise error(f"{of.capitalize()} have one axis; the index has {index.ndim}.")
        return list(index.tolist())
    if isinstance(index, (str, bytes, Mapping, Set)) or not isinstance(index, Iterable):
        raise error(f"{short(repr(index))} does not choose among {of}: give an integer, a slice, or several integers.")
    return list(index)


def _by_label(column: Any, n: int, of: str, error: type[DfaError]) -> np.ndarray:
    """A pandas column's values; booleans in the order of their labels, which must be the numbers of the rows."""
    values, labels = column.to_numpy(), column.index.tolist()
    if len(values) != n or not all(map(_is_boolean, values)) or labels == list(range(n)):
        return values
    if set(labels) != set(range(n)):
        raise error(
            f"The mask's labels are not the numbers of the {n} {of}: pass mask.to_numpy() to go by position instead."
        )
    return column.reindex(range(n)).to_numpy()
