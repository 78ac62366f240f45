"""What a study will need, before it is begun: units, hours, memory, disk.

Each model is loaded once, measured by :func:`dfa_lens.estimate`, and timed on one batch.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from dfa_lens.data.nodes import NodeSet
from dfa_lens.estimate import Estimate, estimate
from dfa_lens.evaluation.check import check
from dfa_lens.experiments.drive import duration
from dfa_lens.experiments.experiment import Experiment
from dfa_lens.experiments.units import Plan, Unit
from dfa_lens.transfer.recipe import Recipe

#: What is asked for beside the forecast, for all that it does not see: the libraries, loading, slower machines.
SPARE_GB, SPARE_TIME = 4.0, 1.5


@dataclass(frozen=True)
class Forecast:
    """What :func:`forecast` found.

    Attributes
    ----------
    units:
        How many there are, by kind.
    seconds:
        What they will take one worker, on the machine that this was found on.
    memory:
        The most bytes that a worker needs at one time for models and passes, on the device that they are on.
    disk:
        Bytes of the folder.
    """

    units: dict[str, int]
    seconds: float
    memory: int
    disk: int

    def __str__(self) -> str:
        listed = ", ".join(f"{number:,} {kind}" for kind, number in self.units.items())
        return (
            f"{sum(self.units.values()):,} units ({listed})\n"
            f"about {duration(self.seconds)} of one worker, by the speed of this machine\n"
            f"{self.memory / 2**30:.2g} GiB of memory a worker for models and passes\n"
            f"{self.disk / 2**20:.3g} MiB on disk"
        )

    def request(self, workers: int) -> tuple[float, float]:
        """GB and minutes to ask for, for each of so many workers.

        Examples
        --------
        >>> from dfa_lens.experiments.forecast import Forecast
        >>> Forecast({"row": 8}, seconds=7200.0, memory=10 * 2**30, disk=0).request(workers=4)
        (16.0, 75)
        """
        gigabytes = SPARE_GB + 1.2 * self.memory / 2**30
        return gigabytes, 30 + math.ceil(SPARE_TIME * self.seconds / 60 / workers)


def forecast(plan: Plan) -> Forecast:
    """What a plan will need.

    Every pair of models is loaded, so this needs what loading them needs. Passes are counted as
    :func:`dfa_lens.estimate` counts them, on the longest prompts of the first seed; they are upper limits. What
    ways without a W do beside their measurements is not counted.

    Examples
    --------
    >>> import torch
    >>> from dfa_lens.experiments.forecast import forecast
    >>> from dfa_lens.experiments.study import QUICK, SETTINGS, ModelPair
    >>> from dfa_lens.experiments.units import Plan, Study
    >>> from dfa_lens.tasks.own import sources
    >>> some = {"zero-shot": SETTINGS["zero-shot"]}
    >>> tasks = sources({"ioi": "ioi", "mcqa": "mcqa"})
    >>> study = Study((ModelPair.of("llama3"),), some, tasks, QUICK, "cpu", torch.float32)
    >>> forecast(Plan.of(study, [0], ["ioi"])).units
    {'attribution': 3, 'row': 2, 'fit': 1}
    """
    known: dict[str, tuple[_Side, _Side]] = {}
    seconds, memory, disk = 0.0, 0, 0
    for unit in plan.units:
        models = plan.places[unit.place][0].name
        if models not in known:
            experiment = plan.experiment(unit.place)
            known[models] = (
                _Side.of(experiment.source, experiment.on_source, experiment),
                _Side.of(experiment.target, experiment.train, experiment),
            )
            both = sum(side.found.parameter_bytes for side in known[models])
            peak = max(need.peak_bytes for side in known[models] for need in side.found.needs)
            memory = max(memory, both + peak)
        passes, side = _passes(unit, plan, *known[models])
        seconds += passes * side.seconds
        disk += _bytes(unit, *known[models])
    return Forecast(dict(Counter(unit.kind for unit in plan.units)), seconds, memory, disk)


@dataclass(frozen=True)
class _Side:
    """One model: what its operations need, what a pass of one example takes, and how many nodes it has."""

    found: Estimate
    seconds: float
    nodes: int
    layers: int

    @classmethod
    def of(cls, model: Any, pairs: Any, experiment: Experiment) -> _Side:
        longest = max(pairs.values(), key=lambda each: int(each.longest.max()))
        budget, attribution = experiment.budget, experiment.attribution
        nodes = NodeSet.heads_and_mlps(model)
        found = estimate(
            model,
            longest,
            batch_size=budget.batch_size,
            method=attribution.method,
            steps=attribution.steps,
            fit_steps=1,
            sizes=budget.curve_points + 1,
        )
        few = longest[: budget.batch_size]
        check(model, few)  # trials of short cuts, and all that is done once
        started = time.perf_counter()
        check(model, few)
        return cls(found, (time.perf_counter() - started) / (2 * len(few)), len(nodes), len(nodes.sites) // 2)


def _passes(unit: Unit, plan: Plan, source: _Side, target: _Side) -> tuple[float, _Side]:
    """Forward passes of one example, a backward pass counted as one, and on which model."""
    budget = plan.study.budget
    if unit.kind == "row":
        curve = target.found["faithfulness_curve"].forward_equivalents
        return curve * budget.test / budget.train, target
    if unit.kind == "fit":
        recipe = plan.study.settings[unit.what[0]].recipe
        known = recipe if isinstance(recipe, Recipe) else Recipe()
        steps = known.steps if budget.steps is None else budget.steps
        return 2 * budget.train * len(unit.what[1]) + 2 * steps * known.batch_size, target
    side = source if unit.what[0] == "source" else target
    if unit.kind == "measurements":
        return budget.train * 2 + min(4, budget.train) * (2 + 2 * side.layers), side
    return side.found.needs[0].forward_equivalents, side


def _bytes(unit: Unit, source: _Side, target: _Side) -> int:
    """Of a unit's files: a record, and about 100 bytes for every node beside the numbers."""
    if unit.kind == "fit":
        return 4 * source.nodes * target.nodes + 100 * (source.nodes + target.nodes) + 40_000
    if unit.kind == "row":
        return 1_000
    nodes = (source if unit.what[0] == "source" else target).nodes
    return (200 if unit.kind == "measurements" else 110) * nodes
