"""The main job on the shipped models: source attribution, gold, transfers, controls; a table and a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch
from tqdm.auto import tqdm

import dfa_lens
from dfa_lens import zoo
from dfa_lens.attribution.attribute import attribute
from dfa_lens.data.inspection import Inspection
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.spans import Schema
from dfa_lens.errors import ModelError, TaskError, unknown
from dfa_lens.evaluation.inspection import inspect
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
FULL = Budget(steps=100)  # half of fit's default: a table in minutes

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
    """
    chosen = [ModelPair.of(family) for family in families or zoo.pairs()]
    known = sources(tasks, collection)
    names = list(only or known)
    for name in names:
        if name not in known:
            raise unknown("task", name, known, TaskError)
    started = time.perf_counter()
    results = Results()
    with tqdm(
        total=len(chosen) * len(names) * (1 + len(SHOWN)), desc="demo", unit="curve", disable=not progress
    ) as bar:
        for models in chosen:
            experiment = Experiment(models, seed, budget, tasks=known, device=device, dtype=dtype)
            found = dict[str, list[Outcome]]()
            for outcome in experiment.run(SHOWN, names):
                found.setdefault(outcome.task, []).append(outcome)
                bar.set_postfix_str(f"{models.name} {outcome.task}: {outcome.name}")
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
    """What a report needs of one task: gold's outcome and those of the settings, and a look at the first test pair."""
    task = outcomes[0].task
    example = experiment.test(task)[:1]
    tokens = Schema.by_token(example)
    nodes = experiment.target_nodes.at_spans(tokens.names)
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
        _looked_at(experiment.target, example),
        attribute(experiment.target, tokens.apply(example), nodes=nodes, method="nap"),
    )


def _looked_at(model: HookedModel, example: PromptPairs) -> Inspection | None:
    """What the nodes do on an example; None of models that do not show it (fused attention, a norm behind it)."""
    try:
        return inspect(model, example)
    except ModelError:
        return None
