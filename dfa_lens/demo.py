"""The main job on the shipped models: source attribution, gold, transfers, random W; a table and a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from tqdm.auto import tqdm

import dfa_lens
from dfa_lens import controls, tasks, zoo
from dfa_lens.alignment import Alignment
from dfa_lens.attribution import attribute
from dfa_lens.errors import DfaError, unknown
from dfa_lens.faithfulness import FaithfulnessCurve, faithfulness_curve
from dfa_lens.nodes import NodeSet
from dfa_lens.results import GOLD, Results, TaskResult
from dfa_lens.scores import NodeScores
from dfa_lens.training import fit

IN_DISTRIBUTION, ZERO_SHOT, RANDOM = "in-distribution", "zero-shot", "random W"


@dataclass(frozen=True)
class Size:
    """How much the demo runs."""

    train: int = 64  #: training pairs a task
    test: int = 32  #: test pairs a task
    steps: int = 100  #: training steps of each alignment
    curve_points: int = 32  #: circuit sizes of each curve
    batch_size: int = 32  #: of attribution and curves


FULL = Size()
QUICK = Size(train=8, test=8, steps=10, curve_points=6)


def run(
    *,
    families: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    seed: int = 0,
    size: Size = FULL,
    progress: bool = False,
) -> Results:
    """Transfer circuits in the shipped families, and measure them.

    For every task: nap-ig-inputs on the source, the same directly on the target ("gold"), W trained on the task itself
    ("in-distribution"), W trained on the other five tasks ("zero-shot"), and a random W; each judged by its
    faithfulness curve on held-out prompts.

    Parameters
    ----------
    families:
        Of :func:`dfa_lens.zoo.pairs`; default: all.
    only:
        The tasks to evaluate; default: all six. Zero-shot training uses all others in any case.
    seed:
        Of the prompts, of training, of the random W.
    size:
        How much to run.
    """
    known = zoo.pairs()
    families = list(families or known)
    names = list(only or tasks.names())
    for family in families:
        if family not in known:
            raise unknown("family", family, known, DfaError)
    for name in names:
        tasks.describe(name)  # an unknown name is an error here, not after minutes
    started = time.perf_counter()
    results = Results()
    per_task = 4 + 2  # curves and fits
    total = len(families) * (2 * len(tasks.names()) + per_task * len(names))
    with tqdm(total=total, desc="demo", unit="job", disable=not progress) as bar:
        for family in families:
            _family(family, known[family], names, seed, size, results, bar)
    results.provenance = {
        "command": f"dfa-lens demo, seed {seed}, {size.train} training and {size.test} test pairs a task, "
        f"{size.steps} training steps",
        "versions": f"dfa_lens {dfa_lens.__version__}, "
        + ", ".join(f"{package} {version(package)}" for package in ("transformer-lens", "torch")),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "time": f"{time.perf_counter() - started:.0f} s",
    }
    return results


def _family(
    family: str,
    models: tuple[str, str],
    names: list[str],
    seed: int,
    size: Size,
    results: Results,
    bar: Any,
) -> None:
    source, target = (zoo.load(name) for name in models)
    n = size.train
    scores: dict[str, NodeScores] = {}
    gold: dict[str, NodeScores] = {}
    train = {task: tasks.load(task, target.tokenizer, split="train", n=n, seed=seed) for task in tasks.names()}
    for task in tasks.names():
        bar.set_postfix_str(f"{family} {task}: attribution")
        on_source = tasks.load(task, source.tokenizer, split="train", n=n, seed=seed)
        scores[task] = attribute(source, on_source, batch_size=size.batch_size)
        bar.update()
        if task in names:
            gold[task] = attribute(target, train[task], batch_size=size.batch_size)
        bar.update()
    random_w = controls.random_w(NodeSet.heads_and_mlps(source), NodeSet.heads_and_mlps(target), seed=seed)
    for task in names:
        test = tasks.load(task, target.tokenizer, split="test", n=size.test, seed=seed)
        alignments: dict[str, Alignment] = {}
        for setting, used in (
            (IN_DISTRIBUTION, [task]),
            (ZERO_SHOT, [other for other in tasks.names() if other != task]),
        ):
            bar.set_postfix_str(f"{family} {task}: {setting} training")
            alignments[setting] = fit(
                target, {t: scores[t] for t in used}, {t: train[t] for t in used}, seed=seed, steps=size.steps
            )
            bar.update()
        alignments[RANDOM] = random_w
        circuits = {setting: alignment.transfer(scores[task]) for setting, alignment in alignments.items()}
        found: dict[str, FaithfulnessCurve] = {}
        grid = sorted({round(i * len(gold[task]) / size.curve_points) for i in range(size.curve_points + 1)})
        for setting, circuit in {GOLD: gold[task], **circuits}.items():
            bar.set_postfix_str(f"{family} {task}: {setting} curve")
            found[setting] = faithfulness_curve(target, test, circuit, sizes=grid, batch_size=size.batch_size)
            bar.update()
        results.tasks.append(TaskResult(family, task, scores[task], gold[task], alignments, circuits, found))
