"""What alignments of nodes and of edges have in common: stages that are applied one after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from dfa_lens.data import html
from dfa_lens.data.content import ByContent
from dfa_lens.errors import AlignmentError, short

Same = TypeVar("Same", bound="Chain")


@dataclass(frozen=True, eq=False)
class Chain(ByContent):
    """One or more stages that carry scores from model to model, and how they were trained.

    ``second @ first`` first applies ``first``. Two are equal (``==``) if their stages and temperature are; history and
    meta, where they come from, do not count.

    Attributes
    ----------
    stages:
        One for a trained alignment; several for a chain.
    temperature:
        T in the soft mask g = sigmoid(ŝ/T).
    history:
        One record per training step (step, loss, divergence, mask_mean); empty when it was not trained.
    meta:
        How it was trained: JSON-like.
    """

    stages: tuple[Any, ...]
    temperature: float = 1.0
    history: tuple[Mapping[str, float | int], ...] = field(default=(), compare=False)
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    unit: ClassVar[str] = ""  #: what the scores are of, in the plural

    def __post_init__(self) -> None:
        if not self.stages:
            raise AlignmentError("An alignment needs at least one stage.")
        number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not number or not self.temperature > 0 or not math.isfinite(self.temperature):
            raise AlignmentError(f"The temperature must be positive, not {short(repr(self.temperature))}.")
        object.__setattr__(self, "history", tuple(dict(record) for record in self.history))
        object.__setattr__(self, "meta", dict(self.meta))
        for first, second in zip(self.stages, self.stages[1:], strict=False):
            if not self._meet(first, second):
                raise AlignmentError(
                    f"The alignments can't be chained: one ends on {len(first.target)} {self.unit}, the next starts "
                    f"from {len(second.source)} other {self.unit}. `second @ first` applies `first` first."
                )

    @staticmethod
    def _meet(first: Any, second: Any) -> bool:
        return bool(first.target == second.source)

    def __matmul__(self: Same, first: Same) -> Same:
        """``second @ first``: the alignment that applies ``first``, then ``second`` (1B→3B, then 3B→8B)."""
        if type(first) is not type(self):
            return NotImplemented
        meta = {"chain": [dict(first.meta), dict(self.meta)]}
        return type(self)((*first.stages, *self.stages), self.temperature, (), meta)

    def _repr_html_(self) -> str:
        """How it was made, for notebooks."""
        import pandas as pd

        plain = {key: value for key, value in self.meta.items() if isinstance(value, (str, int, float))}
        last = {f"last {key}": value for key, value in self.history[-1].items()} if self.history else {}
        rows = {"temperature": self.temperature, **plain, **last}
        return html.shown(repr(self), pd.DataFrame({"": rows.keys(), "value": map(str, rows.values())}))

    def __repr__(self) -> str:
        sizes = " → ".join(str(len(each)) for each in (self.stages[0].source, *(stage.target for stage in self.stages)))
        return f"{type(self).__name__}({sizes} {self.unit})"
