"""Results of transfers: one tidy table, and the scores, alignments and curves behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.curve import FaithfulnessCurve
from dfa_lens.data.scores import NodeScores

GOLD = "gold"
Control = Literal[
    "",
    "uniform-s",
    "random-s",
    "scrambled-s",
    "permuted-w",
    "random-w",
    "depth-mean",
    "regression",
    "target-only",
]
"""What is put in the place of the source's scores or of W, see :mod:`dfa_lens.transfer.controls`; "" is the
method itself."""


def row(curve: FaithfulnessCurve, gold_cpr: float) -> dict[str, Any]:
    """What a table says of one curve: CPR and its interval over examples, CMD, mean KL, recovery, floor.

    Of one example there is no interval: it is NaN, with a :class:`~dfa_lens.data.statistics.StatisticsWarning`. Where
    gold's CPR is 0, recovery is NaN.
    """
    low, high = curve.cpr_interval()
    return {
        "cpr": curve.cpr,
        "cpr_low": low,
        "cpr_high": high,
        "cmd": curve.cmd,
        "kl": curve.mean_kl,
        "recovery": curve.cpr / gold_cpr if gold_cpr else float("nan"),
        "floor": curve.floor,
        "examples": len(curve.clean_values),
    }


@dataclass(frozen=True)
class TaskResult:
    """What was found for one task in one family.

    Attributes
    ----------
    source, gold:
        Attribution on the source, and directly on the target.
    alignments, circuits:
        Setting → alignment, and setting → transferred scores ("in-distribution", "zero-shot", "random W", …).
    curves:
        Setting → faithfulness curve on the target, "gold" among them.
    seed:
        Of prompts and training.
    labels:
        Setting → further columns of its row in tables (regime, method, control, …).
    """

    family: str
    task: str
    source: NodeScores
    gold: NodeScores
    alignments: Mapping[str, Alignment]
    circuits: Mapping[str, NodeScores]
    curves: Mapping[str, FaithfulnessCurve]
    seed: int = 0
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def controls(self) -> list[str]:
        """The settings that are controls, by their labels or, without any, by their names."""
        known = {"random W", *get_args(Control)}
        return [
            setting
            for setting in self.curves
            if (self.labels[setting].get("control") if setting in self.labels else setting in known)
        ]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row for every setting; made once, since every row has a bootstrap interval."""
        gold_cpr = self.curves[GOLD].cpr
        return [
            {
                "family": self.family,
                "seed": self.seed,
                "task": self.task,
                "setting": setting,
                **self.labels.get(setting, {}),
                **row(curve, gold_cpr),
            }
            for setting, curve in self.curves.items()
        ]


@dataclass
class Results:
    """All results of a run, and where they come from.

    Attributes
    ----------
    tasks:
        One entry for each family and task.
    provenance:
        Command, versions, seeds: shown at the end of a report.
    """

    tasks: list[TaskResult] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)

    def table(self) -> Any:
        """The tidy table (pandas): a row per family, task and setting, with CPR, its interval, CMD, mean KL, recovery
        (CPR over gold's CPR) and the floor."""
        import pandas as pd

        return pd.DataFrame([row for result in self.tasks for row in result.rows])

    def summary(self) -> Any:
        """CPR by family and task, a column for each setting and for the floor; a family ends with its mean."""
        import pandas as pd

        table = self.table()
        wide = table.pivot_table(index=["family", "task"], columns="setting", values="cpr", sort=False)
        wide["floor"] = table.groupby(["family", "task"], sort=False)["floor"].first()
        parts = []
        for family, part in wide.groupby(level="family", sort=False):
            mean = part.mean().to_frame().T
            mean.index = pd.MultiIndex.from_tuples([(family, "mean")], names=["family", "task"])
            parts += [part, mean] if len(part) > 1 else [part]
        return pd.concat(parts)
