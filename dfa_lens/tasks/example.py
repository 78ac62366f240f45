"""What an offline task is: how an example looks, how a task is drawn, which split an example belongs to."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dfa_lens.errors import TaskError

SPLITS: dict[str, range] = {"train": range(80), "validation": range(80, 90), "test": range(90, 100)}
"""Per cent of all keys that belong to each split."""


class Example(NamedTuple):
    """One prompt pair as text. ``answer`` is right for ``clean``, ``wrong`` is right for ``corrupt``.

    (Under the ``abc`` counterfactual of ioi the corrupt prompt has no right answer among the two.)
    """

    clean: str
    corrupt: str
    answer: str
    wrong: str
    key: str
    template: int
    choices: tuple[str, ...] | None = None  #: what the clean prompt offers, where it offers a choice
    corrupt_choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class OfflineTask:
    """A task: how to draw an example, and what it is about."""

    name: str
    family: str  #: what relatives have in common
    summary: str
    counterfactuals: tuple[str, ...]  #: names, the default first
    draw: Callable[..., Example]  #: ``draw(rng, split=…, counterfactual=…, **options)``
    options: tuple[str, ...] = ()  #: names of further keyword options of ``draw``


def split_of(key: str) -> str:
    """The split to which a key belongs: a hash, so the same on every machine and in every session."""
    percent = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    return next(name for name, percents in SPLITS.items() if percent in percents)


def choose_template(rng: random.Random, n: int, templates: Sequence[int] | None) -> int:
    """One of ``n`` templates, or of those of them that were asked for."""
    if templates is None:
        return rng.randrange(n)
    allowed = [template for template in templates if 0 <= template < n]
    if not allowed:
        raise TaskError(f"templates are numbered from 0 to {n - 1} here, and none of {list(templates)} is among them.")
    return rng.choice(allowed)
