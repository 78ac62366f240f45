"""The settings of the method benchmark, by name."""

from __future__ import annotations

from dfa_lens.data.pairs import PromptPairs
from dfa_lens.experiments.experiment import Experiment
from dfa_lens.experiments.setting import Setting
from dfa_lens.transfer import similarity
from dfa_lens.transfer.forms import Kernel
from dfa_lens.transfer.recipe import RELEASED, Recipe


def attention_kernel(experiment: Experiment, trained: tuple[str, ...]) -> Recipe:
    """Like nodes by kind, depth and how heads attend to random repeated tokens."""
    return Recipe(form=Kernel(experiment.attention_similarities))


def behaviour_kernel(experiment: Experiment, trained: tuple[str, ...]) -> Recipe:
    """As :func:`attention_kernel`, and by what nodes do at the answers of the *training* tasks (CKA)."""
    alike = similarity.cka_similarity(
        experiment.source,
        PromptPairs.concat([experiment.on_source[task] for task in trained]),
        experiment.target,
        PromptPairs.concat([experiment.train[task] for task in trained]),
    )
    depth = similarity.kind_and_depth(experiment.source_nodes, experiment.target_nodes)
    similarities = {**experiment.attention_similarities, "behaviour": alike, "behaviour and depth": alike * depth}
    return Recipe(form=Kernel(similarities))


MATRYOSHKA = Recipe(objective="matryoshka")

SETTINGS: dict[str, Setting] = {
    "in-distribution": Setting("in-distribution"),
    "near-distribution": Setting("near-distribution"),
    "zero-shot": Setting("zero-shot"),
    "one-task": Setting("one-task"),
    # controls of the zero-shot default
    "uniform-s": Setting("zero-shot", "uniform-s"),
    "random-s": Setting("zero-shot", "random-s"),
    "scrambled-s": Setting("zero-shot", "scrambled-s"),
    "permuted-w": Setting("zero-shot", "permuted-w"),
    "random-w": Setting("zero-shot", "random-w"),
    "depth-mean": Setting("zero-shot", "depth-mean"),
    "regression": Setting("zero-shot", "regression", method="ridge 0.1", ridge=0.1),
    "target-only": Setting("in-distribution", "target-only"),
    "in-distribution, uniform-s": Setting("in-distribution", "uniform-s"),
    # other objectives and forms
    "in-distribution, matryoshka": Setting("in-distribution", "", MATRYOSHKA, "matryoshka"),
    "in-distribution, released": Setting("in-distribution", "", RELEASED, "released"),
    "zero-shot, released": Setting("zero-shot", "", RELEASED, "released"),
    "zero-shot, matryoshka": Setting("zero-shot", "", MATRYOSHKA, "matryoshka"),
    "zero-shot, kernel": Setting("zero-shot", "", Recipe(form="kernel"), "kernel: depth"),
    "zero-shot, attention kernel": Setting("zero-shot", "", attention_kernel, "kernel: attention"),
    "zero-shot, behaviour kernel": Setting("zero-shot", "", behaviour_kernel, "kernel: behaviour"),
    "zero-shot, full+bias": Setting("zero-shot", "", Recipe(form="full+bias"), "full+bias"),
    "zero-shot, low-rank": Setting("zero-shot", "", Recipe(form="low-rank"), "low-rank"),
    "zero-shot, block": Setting("zero-shot", "", Recipe(form="block"), "block"),
    "zero-shot, depth-band": Setting("zero-shot", "", Recipe(form="depth-band"), "depth-band"),
}
"""The settings of the method benchmark: four regimes, all controls, and the named objectives and forms."""
