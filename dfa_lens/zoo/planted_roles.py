"""What planted circuits are made of: the roles of heads and MLP blocks, and what a pair of models needs beside them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

SYMBOLS = ("A", "B", "C", "D", "E", "F", "G", "H")
N = len(SYMBOLS)
MATCH = 13.0  #: how much a head likes what it looks for
OFFSETS = 40.0  #: the same by position; a quarter of it at the right place is lost at the next


@dataclass(frozen=True)
class Match:
    """A head attends where the key's variable has the value of the query's."""

    query: str
    key: str
    gain: float = MATCH


@dataclass(frozen=True)
class Offset:
    """A head attends so many tokens back, from where a flag is set."""

    flag: str
    back: int
    gain: float = OFFSETS


@dataclass(frozen=True)
class Wanted:
    """A head attends to the tokens that have one flag, from where another is set."""

    flag: str
    key: str
    gain: float = MATCH


@dataclass(frozen=True)
class Head:
    """An attention head: where it attends, and which variable it copies into which."""

    terms: tuple[Match | Offset | Wanted, ...]
    value: str
    out: str
    kind: Literal["head"] = "head"


@dataclass(frozen=True)
class Block:
    """An MLP block: what it adds to a variable, for every combination of values of those that it reads.

    ``reads`` are variables, of which each is read as a value (several joined by "+" as one); with a ``flag`` it is
    silent where that is not set.
    """

    reads: tuple[str, ...]
    out: str
    function: Callable[..., int]
    flag: str | None = None
    kind: Literal["mlp"] = "mlp"


Role = Head | Block


@dataclass(frozen=True)
class Recipe:
    """A pair: its prompts, its roles, and the tasks that are made of them.

    Attributes
    ----------
    roles:
        Role → (stage, how it is made). Roles of a later stage read what those of earlier ones write.
    draw:
        The words of a prompt before its last token, and the fetched values by name, from a random generator.
    fetches:
        What is fetched → the roles that do it. Each has a flag of its own, which the last token sets.
    tables:
        What is looked up → its function of what was fetched, and its role.
    tasks:
        (fetch, table) of each task.
    source, target:
        Layers, heads, key-value heads, and for every stage the first and last layer that its roles may be in.
    split:
        Roles that the target has in two nodes, each with half of what they write.
    held_out:
        Tasks whose roles all occur in the others, in other combinations: for the test of what is learned from those.
    words:
        Words beside the symbols → the flag that one sets.
    groups:
        Variables that are made of flags → those flags.
    """

    family: Literal["llama", "qwen2"]
    roles: Mapping[str, tuple[int, Role]]
    draw: Callable[[random.Random], tuple[list[str], dict[str, tuple[int, ...]]]]
    fetches: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, Callable[..., int]]
    tasks: tuple[tuple[str, str], ...]
    source: tuple[int, int, int, tuple[tuple[int, int], ...]]
    target: tuple[int, int, int, tuple[tuple[int, int], ...]]
    split: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    words: Mapping[str, str | None] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
