"""The main job on the shipped models: source attribution, gold, transfers, controls; a table and a report."""

from __future__ import annotations

import multiprocessing
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from tqdm.auto import tqdm

import dfa_lens
from dfa_lens import zoo
from dfa_lens.attribution.attribute import attribute
from dfa_lens.data.inspection import Inspection
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.data.spans import Schema
from dfa_lens.errors import ModelError, TaskError, unknown
from dfa_lens.evaluation.inspection import inspect
from dfa_lens.experiments.executors import processes
from dfa_lens.experiments.experiment import QUICK, Budget, Experiment, ModelPair, Outcome
from dfa_lens.experiments.functional import FUNCTIONAL
from dfa_lens.experiments.settings import SETTINGS
from dfa_lens.experiments.table import GOLD, Results, TaskResult
from dfa_lens.models.backend import HookedModel
from dfa_lens.tasks.own import TaskSource, sources

SHOWN = {
    "in-distribution": SETTINGS["in-distribution"],
    "zero-shot": SETTINGS["zero-shot"],
    "functional": FUNCTIONAL["functional, zero-shot, own scores"],
    **{name: SETTINGS[name] for name in ("uniform-s", "depth-mean", "random-w")},
}
FULL = Budget(steps=100, curve_points=16)  # half of fit's default and of a study's sizes: a table in minutes
#: Trainings that share a forward pass: the shipped models are so small that a pass costs more than its examples.
JOBS_PER_PASS = 18

__all__ = ["FULL", "QUICK", "SHOWN", "Budget", "run"]


def run(
    *,
    families: Sequence[str | ModelPair] | None = None,
    only: Sequence[str] | None = None,
    seed: int = 0,
    budget: Budget = FULL,
    tasks: Mapping[str, str | TaskSource] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    collection: str = "offline",
    workers: int = 1,
    progress: bool = False,
) -> Results:
    """Transfer circuits in the shipped families, and measure them.

    For every task: nap-ig-inputs on the source, the same directly on the target ("gold"), W trained on the task itself
    ("in-distribution"), W trained on the other five tasks ("zero-shot"), a functional alignment of those and the task's
    own source scores ("functional"), and three controls: the training of zero-shot with equal scores for all source
    nodes ("uniform-s"), a fixed map by relative depth ("depth-mean"), a random W ("random-w"). Each is judged by its
    faithfulness curve on held-out prompts.

    Parameters
    ----------
    families:
        Of ``dfa.zoo.pairs("all")``, or pairs of models of your own; default: those that know the paper's tasks.
    only:
        The tasks to evaluate; default: all. Zero-shot training uses all others in any case.
    seed:
        Of the prompts, of training, of the controls.
    budget:
        How much to run.
    tasks, device, dtype, collection:
        As in :func:`dfa_lens.study.run`.
    workers:
        Processes. Each takes one family after the other, so more than there are families are of no use. Results do not
        depend on them.
    """
    chosen = [ModelPair.of(family) for family in families or zoo.pairs()]
    known = sources(tasks, collection)
    names = list(only or known)
    for name in names:
        if name not in known:
            raise unknown("task", name, known, TaskError)
    started = time.perf_counter()
    results = Results()
    work = partial(_family, names=names, seed=seed, budget=budget, tasks=known, device=device, dtype=dtype)
    total = len(chosen) * _passes(budget, len(names))
    with tqdm(total=total, desc="demo", unit="pass", unit_scale=True, disable=not progress) as bar:

        def tell(step: Step) -> None:
            bar.set_postfix_str(step.what, refresh=False)
            bar.update(step.passes)

        for found in _each(work, chosen, min(workers, len(chosen)), tell):
            results.tasks += found
        bar.update(total - bar.n)  # passes were an estimate
    results.provenance = {
        "command": f"dfa-lens demo, seed {seed}, {budget.train} training and {budget.test} test pairs a task, "
        f"{budget.steps} training steps",
        "versions": f"dfa_lens {dfa_lens.__version__}, "
        + ", ".join(f"{package} {version(package)}" for package in ("transformer-lens", "torch")),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "time": f"{time.perf_counter() - started:.0f} s",
    }
    return results


@dataclass(frozen=True)
class Step:
    """A piece of work that is done, for the bar."""

    passes: int  #: of one example through the target
    what: str


def _passes(budget: Budget, n_tasks: int) -> int:
    """About how many passes a family takes: those of training and of curves."""
    trained = sum(setting.is_trained for setting in SHOWN.values())
    steps = (FULL.steps or 0) if budget.steps is None else budget.steps
    return n_tasks * (trained * steps * _OF_A_STEP + (1 + len(SHOWN)) * _of_a_curve(budget))


#: Examples of a step of training, clean and under the mask, forwards and backwards.
_OF_A_STEP = 2 * 16


def _of_a_curve(budget: Budget) -> int:
    return (budget.curve_points + 1) * budget.test


def _each(
    work: Callable[..., list[TaskResult]], families: Sequence[ModelPair], workers: int, tell: Callable[[Step], None]
) -> list[list[TaskResult]]:
    """What ``work`` makes of each family, in their order."""
    if workers <= 1:
        return [work(models, tell=tell) for models in families]
    told = multiprocessing.get_context("spawn").SimpleQueue()
    with processes(workers, torch.get_num_threads(), begin=partial(_tell_by, told)) as pool:
        futures = [pool.submit(_elsewhere, work, models) for models in families]
        left = set(futures)
        while left:
            done, left = wait(left, timeout=0.2)
            for future in done:
                future.result()  # an error of one is told at once
            while not told.empty():
                tell(told.get())
        made = []
        for found, raised in (future.result() for future in futures):
            made.append(found)
            for message, category in raised:
                warnings.warn(message, category, stacklevel=3)
        return made


#: In another process: the queue by which it says what is done. Only what begins a process can hand it one.
_TOLD: list[SimpleQueue[Step]] = []


def _tell_by(queue: SimpleQueue[Step]) -> None:
    _TOLD[:] = [queue]


def _elsewhere(
    work: Callable[..., list[TaskResult]], models: ModelPair
) -> tuple[list[TaskResult], list[tuple[str, type[Warning]]]]:
    """In another process: what work makes, and the warnings that it raised, for the first process to raise."""
    with warnings.catch_warnings(record=True) as raised:
        found = work(models, tell=_TOLD[0].put)
    return found, [(str(each.message), each.category) for each in raised]


def _family(
    models: ModelPair, *, names: Sequence[str], seed: int, budget: Budget, tell: Callable[[Step], Any], **options: Any
) -> list[TaskResult]:
    """All of one family: gold, the settings, and their curves."""

    def on_step(trained: str, record: Mapping[str, Any]) -> None:
        tell(Step(_OF_A_STEP, f"{models.name}: training"))

    experiment = Experiment(models, seed, budget, on_step=on_step, **options)
    if isinstance(models.target, str):  # one's own may be too large for so many examples at once
        experiment.jobs_per_pass = JOBS_PER_PASS
    found = dict[str, list[Outcome]]()
    for outcome in experiment.run(SHOWN, names):
        found.setdefault(outcome.task, []).append(outcome)
        tell(Step(_of_a_curve(budget), f"{models.name} {outcome.task}: {outcome.name}"))
    return [task_result(experiment, outcomes) for outcomes in found.values()]


def task_result(experiment: Experiment, outcomes: Sequence[Outcome]) -> TaskResult:
    """What a report needs of one task: gold's outcome and those of the settings, and a look at the first test pair."""
    task = outcomes[0].task
    example = experiment.test(task)[:1]
    return TaskResult(
        experiment.models.name,
        task,
        experiment.scores[task],
        experiment.gold_of(task),
        {each.name: each.alignment for each in outcomes if each.alignment is not None},
        {each.name: each.circuit for each in outcomes if each.name != GOLD},
        {each.name: each.curve for each in outcomes},
        experiment.seed,
        {each.name: each.labels for each in outcomes},
        looked_at(experiment.target, example),
        by_token(experiment.target, example, experiment.target_nodes),
    )


def by_token(model: HookedModel, example: PromptPairs, nodes: NodeSet) -> NodeScores:
    """What matters where in an example: ``nap`` of the nodes at each of its tokens."""
    tokens = Schema.by_token(example)
    return attribute(model, tokens.apply(example), nodes=nodes.at_spans(tokens.names), method="nap")


def looked_at(model: HookedModel, example: PromptPairs) -> Inspection | None:
    """What the nodes do on an example; None of models that do not show it (fused attention, a norm behind it)."""
    try:
        return inspect(model, example)
    except ModelError:
        return None
