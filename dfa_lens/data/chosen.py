"""What circuits of nodes and of edges have in common: parts of a model, chosen among others, combined as sets."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from jaxtyping import Bool
from torch import Tensor

from dfa_lens.data.content import ByContent
from dfa_lens.data.files import LONGEST_NAME, checked_name, write_atomically
from dfa_lens.errors import CircuitError

Own = TypeVar("Own", bound="Chosen")
"""A circuit of the one kind or of the other: what methods take and return is of the kind of their object."""


class Chosen(ByContent):
    """Some parts of a model, chosen among a universe of them, under a name. It can't be changed.

    ``len`` is the number of its parts, iteration gives their names, ``in`` asks for one. Two over the same universe
    combine as sets do: ``|`` (in either), ``&`` (in both), ``-`` (in the first alone), ``^`` (in one alone), ``~`` (all
    others), ``<=`` (part of).

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.data.chosen import Chosen
    >>> issubclass(dfa.Circuit, Chosen) and issubclass(dfa.EdgeCircuit, Chosen)
    True
    """

    unit: ClassVar[str]  #: what the parts are, in messages
    _name: str
    _meta: dict[str, Any]

    # --- what derived classes say ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of its parts, in the order of the model."""

    @property
    @abstractmethod
    def labels(self) -> tuple[str, ...]:
        """The names of all parts of the universe, in the order of the model."""

    @property
    @abstractmethod
    def flags(self) -> Bool[Tensor, " part"]:
        """[part] of the universe: whether it is in the circuit."""

    @abstractmethod
    def to_frame(self) -> Any:
        """A pandas table with a row for each part of the universe."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """How large it is and where it lies: its row in :func:`~dfa_lens.data.circuit.compare`."""

    @abstractmethod
    def _require(self: Own, other: Own, what: str = "this circuit") -> None:
        """A :class:`~dfa_lens.errors.CircuitError` unless both were chosen among the same."""

    @abstractmethod
    def _like(self: Own, flags: Bool[Tensor, " part"], name: str, meta: Mapping[str, Any]) -> Own:
        """Other parts of the same universe."""

    # --- reading ---------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What it is called."""
        return self._name

    @property
    def meta(self) -> dict[str, Any]:
        """Where it comes from; a copy."""
        return dict(self._meta)

    @property
    def fraction(self) -> float:
        """The part of the universe that is in it."""
        return len(self) / len(self.flags)

    def to_csv(self, path: str | Path) -> None:
        """Write the table of :meth:`to_frame` as CSV, for spreadsheets."""
        write_atomically(path, self.to_frame().to_csv(index=False).encode())

    def named(self: Own, name: str) -> Own:
        """The same circuit under another name."""
        return self._like(self.flags, checked_name(name, "circuit", CircuitError), self._meta)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __repr__(self) -> str:
        found = self._meta.get("faithfulness")
        f = "" if found is None else f", f = {found:.3f}"
        listed = ", ".join(self.names[:8]) + (", …" if len(self) > 8 else "")
        what = f"{self._name!r}: {len(self)} of {len(self.flags)} {self.unit}{f}"
        return f"{type(self).__name__}({what}{': ' * bool(self.names)}{listed})"

    # --- combining -------------------------------------------------------------------------------------------

    def __and__(self: Own, other: Own) -> Own:
        return self._combined(other, operator.and_, "and")

    def __or__(self: Own, other: Own) -> Own:
        return self._combined(other, operator.or_, "or")

    def __sub__(self: Own, other: Own) -> Own:
        return self._combined(other, lambda one, two: one & ~two, "without")

    def __xor__(self: Own, other: Own) -> Own:
        return self._combined(other, operator.xor, "or else")

    def __invert__(self: Own) -> Own:
        return self._like(~self.flags, _short(f"not {self._name}"), {"made_of": [self._name]})

    def __le__(self: Own, other: Own) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        self._require(other)
        return not bool((self.flags & ~other.flags).any())

    def _combined(self: Own, other: Own, operation: Callable[[Tensor, Tensor], Tensor], word: str) -> Own:
        if not isinstance(other, type(self)):
            return NotImplemented
        self._require(other)
        meta = {"made_of": [self._name, other._name]}
        return self._like(operation(self.flags, other.flags), _short(f"{self._name} {word} {other._name}"), meta)

    def overlap(self: Own, other: Own) -> Overlap:
        """How much two circuits have in common, and how much two random ones of their sizes would.

        Raises
        ------
        CircuitError
            If they were chosen among different nodes or edges.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> nodes = dfa.NodeSet.for_sizes(4, 4)
        >>> first = dfa.Circuit(nodes.names[:5], nodes)
        >>> found = first.overlap(dfa.Circuit(nodes.names[1:6], nodes))
        >>> found.common, round(found.jaccard, 2), round(found.expected, 2), round(found.p, 4)
        (4, 0.67, 0.15, 0.0049)
        """
        if not isinstance(other, type(self)):
            raise CircuitError(
                f"A circuit of {self.unit} has an overlap with another one, not with a {type(other).__name__}."
            )
        self._require(other)
        return Overlap(int((self.flags & other.flags).sum()), len(self), len(other), len(self.flags), self.unit)


def _short(text: str) -> str:
    """A name made of names, cut where it would be too long for one."""
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"


@dataclass(frozen=True)
class Overlap:
    """What two circuits over the same nodes (or edges) have in common, against chance.

    By chance means: two random circuits of their sizes, whose common nodes follow the hypergeometric distribution.

    Attributes
    ----------
    common:
        Nodes in both.
    first, second:
        Nodes in either circuit.
    n:
        Nodes of the universe.
    unit:
        "nodes" or "edges": what is counted.
    """

    common: int
    first: int
    second: int
    n: int
    unit: str = "nodes"

    @property
    def jaccard(self) -> float:
        """Nodes in both over nodes in either (Jaccard 1912); 1 for two empty circuits."""
        return float(self._jaccard(self.common))

    def _jaccard(self, common: Any) -> Any:
        union = self.first + self.second - common
        return common / union if self.first + self.second else 1.0

    @property
    def expected(self) -> float:
        """The mean Jaccard index of two random circuits of these sizes."""
        import numpy as np

        chances = self._chance()
        low, high = (int(end) for end in chances.support())
        common = np.arange(low, high + 1)
        return float((chances.pmf(common) * self._jaccard(common)).sum())

    @property
    def p(self) -> float:
        """The probability that two random circuits of these sizes have as many nodes in common, or more."""
        return float(self._chance().sf(self.common - 1))

    def _chance(self) -> Any:
        from scipy import stats

        return stats.hypergeom(self.n, self.first, self.second)

    def __str__(self) -> str:
        return (
            f"{self.common} {self.unit} in common of {self.first} and {self.second}; Jaccard {self.jaccard:.2f}, by "
            f"chance {self.expected:.2f} (p = {self.p:.2g})"
        )
