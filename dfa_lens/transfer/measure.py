"""Measure every node of a model on a task by forward passes alone: no gradient, and no training.

One pass over clean and corrupt prompts shows what each node does: how much its output differs, what that does to the
answer's logits directly, and where its heads look. A few more on a few pairs show what whole groups of nodes do
through the rest of the model (:mod:`~dfa_lens.transfer.group_effects`).

``MEASURES`` has them by name; ``MEASURES.register`` adds one of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.data.measurements import Measurements
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.registry import Registry
from dfa_lens.errors import MeasurementError
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.runner import Runner
from dfa_lens.models.side_by_side import Layer, SideBySide
from dfa_lens.transfer.group_effects import group_effects
from dfa_lens.transfer.similarity import ATTENTION, keys_of

Needs = Literal["outputs", "logits", "patterns"]
"""What a measurement looks at: what nodes compute, their way to the logits, or where heads look."""


@dataclass(frozen=True)
class Measure:
    """One measurement.

    Attributes
    ----------
    function:
        Of a :class:`~dfa_lens.models.side_by_side.Layer`, [pair, node] for its heads or its MLP block. What needs
        patterns is asked for heads only, and 0 for MLP blocks.
    needs:
        See :data:`Needs`. The values of one that needs "logits" are divided by the scale of the final norm.
    summary:
        One line on what it says.

    Examples
    --------
    >>> from dfa_lens.transfer.measure import MEASURES
    >>> MEASURES["direct-effect"].needs
    'logits'
    """

    function: Callable[[Layer], Float[Tensor, "pair node"]]
    needs: Needs
    summary: str


def _change_at_answer(layer: Layer) -> Tensor:
    return layer.norms(layer.change_at_answer) / layer.stream_norm_at_answer[:, None]


def _change(layer: Layer) -> Tensor:
    return ((layer.norms(layer.change) / layer.stream_norms[:, :, None]) * layer.real[:, :, None]).sum(1)


def _attention_change(layer: Layer) -> Tensor:
    moved = (layer.pattern - layer.corrupt_pattern).abs().sum(-1)
    return (moved * layer.real[:, None]).sum(-1) / 2


def _entropy(layer: Layer) -> Tensor:
    return torch.special.entr(layer.pattern_at_answer).sum(-1)


def _on_keys(feature: str) -> Callable[[Layer], Tensor]:
    def function(layer: Layer) -> Tensor:
        if "keys" not in layer.shared:
            layer.shared["keys"] = keys_of(layer.pairs.clean, layer.pairs.lengths)
        wanted = layer.shared["keys"][:, ATTENTION.index(feature)].to(layer.device)
        queries = wanted.any(-1).sum(1).clamp_min(1)
        return torch.einsum("bhqk,bqk->bh", layer.pattern, wanted.to(layer.pattern)) / queries[:, None]

    return function


MEASURES: Registry[Measure] = Registry(
    "measurement",
    MeasurementError,
    {
        "change-at-answer": Measure(
            _change_at_answer, "outputs", "‖Δ‖/‖stream‖ at the answer: how much what the node adds differs there"
        ),
        "change": Measure(_change, "outputs", "the same, summed over the prompt's positions"),
        "direct-effect": Measure(
            lambda layer: layer.direct, "logits", "what Δ at the answer does to the logit difference, directly"
        ),
        "direct-effect-size": Measure(
            lambda layer: layer.direct.abs(), "logits", "the same, its absolute value averaged"
        ),
        "attention-to-change": Measure(
            lambda layer: torch.einsum("bhk,bk->bh", layer.pattern_at_answer, layer.differs.to(layer.pattern)),
            "patterns",
            "attention from the answer's position to the tokens that differ, in the clean run",
        ),
        "corrupt-attention-to-change": Measure(
            lambda layer: torch.einsum("bhk,bk->bh", layer.corrupt_pattern_at_answer, layer.differs.to(layer.pattern)),
            "patterns",
            "the same in the corrupt run",
        ),
        "attention-change-at-answer": Measure(
            lambda layer: (layer.pattern_at_answer - layer.corrupt_pattern_at_answer).abs().sum(-1) / 2,
            "patterns",
            "how much of the answer's attention moves between the runs, from 0 to 1",
        ),
        "attention-change": Measure(_attention_change, "patterns", "the same, summed over the prompt's positions"),
        "previous-token": Measure(_on_keys("previous-token"), "patterns", "attention to the token before"),
        "duplicate-token": Measure(_on_keys("duplicate-token"), "patterns", "attention to earlier copies of the token"),
        "induction": Measure(_on_keys("induction"), "patterns", "attention to what followed those copies"),
        "first-token": Measure(_on_keys("first-token"), "patterns", "attention to the first token"),
        "entropy": Measure(_entropy, "patterns", "entropy of the answer's attention, in nats"),
    },
)
"""What is measured, each a mean over examples; those of attention are 0 for MLP blocks. ``MEASURES[name].summary`` says
what each means."""

GROUP_MEASURES = ("group-effect", "group-effect-per-node", "group-share")
"""What the exact effects of groups say about their nodes: the effect over the largest of all groups; that over the
number of nodes in the group; and that effect split over the group's nodes in proportion to ``change``."""


@backend.runs("model")
def measure(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    names: Sequence[str] | None = None,
    groups: int = 4,
    batch_size: int = 16,
    progress: bool = False,
) -> Measurements:
    """Measure all heads and MLP blocks on prompt pairs, by forward passes alone.

    It costs two passes for every pair, and for the group effects 2 + 2L for each of ``groups`` pairs. Memory: the
    activations of one layer of one batch; for the group effects, what the nodes compute on ``groups`` pairs.

    Parameters
    ----------
    model:
        A HookedTransformer or TransformerBridge, in any precision; left as it was.
    pairs:
        The task's prompts, with this model's tokens.
    names:
        Which of :data:`MEASURES`; default: all that are registered.
    groups:
        On how many pairs (the first) the exact effects of groups are measured, see :data:`GROUP_MEASURES`; 0 leaves
        them out. Four are enough to see what everything passes through.
    batch_size:
        Pairs a pass, each as two rows; changes memory and time, never the numbers.
    progress:
        Show a progress bar.

    Returns
    -------
    Measurements
        ``.meta["passes"]`` is what it cost, in passes of one example.

    Raises
    ------
    ModelError
        If the model shows no attention patterns (fused kernels), or its way to the logits can't be read; ``names``
        chooses what does not need them.
    MeasurementError
        If a name is unknown, or something measured is not finite.
    PromptError
        If the pairs do not fit the model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> found = dfa.measure(model, pairs)
    >>> found.shape, found.names[0], found.meta["passes"]
    ((54, 16), 'change-at-answer', 72)
    """
    chosen = {name: MEASURES.find(name) for name in (MEASURES if names is None else names)}
    for what, number, least in (("groups", groups, 0), ("batch_size", batch_size, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise MeasurementError(f"{what} must be an integer of at least {least}, not {number!r}.")
    if not chosen and not groups:
        raise MeasurementError("There is nothing to measure: names is empty and groups is 0.")
    runner = Runner(model)
    nodes = NodeSet.heads_and_mlps(model)
    runner.require(pairs)
    runner.check_points(nodes.points)
    columns: dict[str, Tensor] = {}
    passes = 0
    if chosen or groups:
        # what a group's effect is split by
        measured = chosen if not groups else {**chosen, "change": MEASURES["change"]}
        columns = _by_passes(runner, pairs, nodes, measured, batch_size, progress)
        passes += 2 * len(pairs)
    means = {name: columns[name] for name in chosen}
    if groups:
        some = pairs[: min(groups, len(pairs))]
        effects, _ = group_effects(runner, some, nodes, batch_size=batch_size)
        means |= _of_groups(nodes, effects, columns["change"])
        passes += len(some) * (2 + len(nodes.sites))
    meta = {"model": runner.name, "examples": len(pairs), "groups": min(groups, len(pairs)), "passes": passes}
    return Measurements(torch.stack(list(means.values()), 1).float(), nodes, list(means), meta)


def _by_passes(
    runner: Runner, pairs: PromptPairs, nodes: NodeSet, chosen: dict[str, Measure], batch_size: int, progress: bool
) -> dict[str, Float[Tensor, " node"]]:
    """The means of measurements over the pairs, each [node], summed in float64."""
    needs = {each.needs for each in chosen.values()}
    passes = SideBySide(runner, patterns="patterns" in needs, direct="logits" in needs)
    totals = {name: torch.zeros(len(nodes), dtype=torch.float64) for name in chosen}
    where = {(site.layer, nodes[site.positions[0]].kind): list(site.positions) for site in nodes.sites}
    bar = tqdm(total=len(pairs), desc="measure", unit="pair", disable=not progress)
    with bar, runner.session(passes=2 * len(pairs) // batch_size):
        for _, batch in runner.batches(pairs, batch_size):
            found: dict[str, list[tuple[list[int], Tensor]]] = {name: [] for name in chosen}

            def look(number: int, layer: Layer, found: dict[str, list[tuple[list[int], Tensor]]] = found) -> None:
                own = where[number, layer.kind]
                for name, measure in chosen.items():
                    if measure.needs != "patterns" or layer.kind == "head":
                        found[name].append((own, _checked(name, measure.function(layer), len(layer.pairs), len(own))))

            scale = passes.run(batch, look).double()[:, None]
            for name, parts in found.items():
                for own, values in parts:
                    totals[name][own] += (values / scale if chosen[name].needs == "logits" else values).sum(0)
            bar.update(len(batch))
    return {name: total / len(pairs) for name, total in totals.items()}


def _checked(name: str, values: Tensor, pairs: int, nodes: int) -> Float[Tensor, "pair node"]:
    if not isinstance(values, Tensor) or tuple(values.shape) != (pairs, nodes):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise MeasurementError(f"The measurement {name!r} gave {found}; a tensor [pair, node] is needed.")
    return values.detach().double().cpu()


def _of_groups(nodes: NodeSet, effects: Tensor, change: Tensor) -> dict[str, Float[Tensor, " node"]]:
    """The three measurements that a node has of its group."""
    found = {name: torch.zeros(len(nodes), dtype=torch.float64) for name in GROUP_MEASURES}
    largest = float(effects.abs().max().clamp_min(1e-12))
    for site, effect in zip(nodes.sites, (effects / largest).tolist(), strict=True):
        own = list(site.positions)
        whole = float(change[own].sum())
        found["group-effect"][own] = effect
        found["group-effect-per-node"][own] = effect / len(own)
        found["group-share"][own] = effect * change[own] / whole if whole > 0 else effect / len(own)
    return found
