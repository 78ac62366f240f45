"""The main job on the shipped models: source attribution, gold, transfers, controls; a table and a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib.metadata import version

from tqdm.auto import tqdm

import dfa_lens
from dfa_lens import tasks, zoo
from dfa_lens.experiments.study import QUICK, SETTINGS, Budget, Experiment, ModelPair, Outcome, labels
from dfa_lens.experiments.table import GOLD, Results, TaskResult

SHOWN = {name: SETTINGS[name] for name in ("in-distribution", "zero-shot", "uniform-s", "depth-mean", "random-w")}
FULL = Budget(steps=100)  # half of fit's default: a table in minutes

__all__ = ["FULL", "QUICK", "SHOWN", "Budget", "run"]


def run(
    *,
    families: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    seed: int = 0,
    budget: Budget = FULL,
    progress: bool = False,
) -> Results:
    """Transfer circuits in the shipped families, and measure them.

    For every task: nap-ig-inputs on the source, the same directly on the target ("gold"), W trained on the task itself
    ("in-distribution"), W trained on the other five tasks ("zero-shot"), and three controls: the same training with
    equal scores for all source nodes ("uniform-s"), a fixed map by relative depth ("depth-mean"), a random W
    ("random-w"). Each is judged by its faithfulness curve on held-out prompts.

    Parameters
    ----------
    families:
        Of :func:`dfa_lens.zoo.pairs`; default: all.
    only:
        The tasks to evaluate; default: all six. Zero-shot training uses all others in any case.
    seed:
        Of the prompts, of training, of the controls.
    budget:
        How much to run.
    """
    pairs = [ModelPair.of(family) for family in families or zoo.pairs()]
    names = list(only or tasks.names())
    for name in names:
        tasks.describe(name)  # an unknown name is an error here, not after minutes
    started = time.perf_counter()
    results = Results()
    with tqdm(total=len(pairs) * len(names) * (1 + len(SHOWN)), desc="demo", unit="curve", disable=not progress) as bar:
        for pair in pairs:
            experiment, found = Experiment(pair, seed, budget), dict[str, list[Outcome]]()
            for outcome in experiment.run(SHOWN, names):
                found.setdefault(outcome.task, []).append(outcome)
                bar.set_postfix_str(f"{pair.name} {outcome.task}: {outcome.name}")
                bar.update()
            results.tasks += [task_result(experiment, outcomes) for outcomes in found.values()]
    results.provenance = {
        "command": f"dfa-lens demo, seed {seed}, {budget.train} training and {budget.test} test pairs a task, "
        f"{budget.steps} training steps",
        "versions": f"dfa_lens {dfa_lens.__version__}, "
        + ", ".join(f"{package} {version(package)}" for package in ("transformer-lens", "torch")),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "time": f"{time.perf_counter() - started:.0f} s",
    }
    return results


def task_result(experiment: Experiment, outcomes: Sequence[Outcome]) -> TaskResult:
    """What a report needs of one task: gold's outcome and those of the settings."""
    task = outcomes[0].task
    return TaskResult(
        experiment.pair.name,
        task,
        experiment.scores[task],
        experiment.gold_of(task),
        {each.name: each.alignment for each in outcomes if each.alignment is not None},
        {each.name: each.circuit for each in outcomes if each.name != GOLD},
        {each.name: each.curve for each in outcomes},
        experiment.seed,
        {each.name: labels(each) for each in outcomes},
    )
