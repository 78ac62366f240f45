"""The training examples and what is kept of the clean and corrupt runs on them, so that each is made only once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from dfa_lens.data.curve import Direction
from dfa_lens.data.edges import EdgeSet
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.models import ablations, memory
from dfa_lens.models.ablations import Ablation, Reference
from dfa_lens.models.backend import KeysValues
from dfa_lens.models.edge_gates import run_gated
from dfa_lens.models.hooks import Activations, Intervention
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.passes import Layout, Prefix
from dfa_lens.models.runner import Runner
from dfa_lens.models.stream import Stream
from dfa_lens.transfer import grouping
from dfa_lens.transfer.recipe import Positions

Cache = Literal["device", "cpu", "recompute"]
"""Where the clean and corrupt runs are kept: beside the model, in main memory, or nowhere (two more passes a step)."""

_NEEDS: Mapping[Intervention, tuple[Literal["clean", "corrupt"], ...]] = {
    "circuit": ("corrupt",),
    "restore": ("clean",),
    "interpolate": ("clean", "corrupt"),
}
"""The runs whose activations an intervention mixes in."""


@dataclass
class Batch:
    """Some examples: prompts to run, the other runs' activations, and what the masked run is to predict.

    Everything begins after ``first`` tokens, those of the ``prefix``.
    """

    pairs: PromptPairs
    runs: Mapping[str, Activations]
    log_p_goal: Float[Tensor, "..."]
    prefix: Prefix | None
    before: Activations
    first: int

    @property
    def goal_difference(self) -> Float[Tensor, " example"]:
        """logit(answer) − logit(wrong) of the run that the masked one is to equal."""
        two = torch.stack([self.pairs.answer, self.pairs.wrong], 1).to(self.log_p_goal.device)
        right, wrong = self.log_p_goal.gather(1, two).unbind(1)
        return right - wrong


class ExampleStore:
    """All training examples of one or more trainings, and the clean and corrupt runs on them.

    Parameters
    ----------
    runner:
        The target, inside a :meth:`~dfa_lens.models.runner.Runner.session` whenever batches are made.
    nodes:
        What is gated.
    pairs:
        Task → its training pairs.
    intervention, positions, ablation, direction:
        As in :class:`~dfa_lens.transfer.recipe.Recipe`.
    cache:
        See :data:`Cache`.
    share_prefix:
        Whether a common beginning may be run once.

    Attributes
    ----------
    task:
        The number of each example's task, in the order of ``tasks``.
    """

    def __init__(
        self,
        runner: Runner,
        nodes: NodeSet,
        pairs: Mapping[str, PromptPairs],
        *,
        intervention: Intervention,
        positions: Positions,
        cache: Cache,
        share_prefix: bool,
        ablation: str | Ablation = "corrupt",
        direction: Direction = "denoising",
    ) -> None:
        self.runner, self.nodes, self.intervention, self.cache = runner, nodes, intervention, cache
        self.ablation, self.direction = ablations.resolve(ablation), direction
        self._reference: Reference | None = None
        self.tasks = tuple(pairs)
        self.pairs = PromptPairs.concat(list(pairs.values()))
        if positions == "all-padded":  # padding is taken for real tokens
            full = torch.full_like(self.pairs.lengths, self.pairs.clean.shape[1])
            self.pairs = replace(self.pairs, lengths=full, corrupt_lengths=full)
        self.task = torch.cat([torch.full((len(each),), i) for i, each in enumerate(pairs.values())])
        self.positions: Literal["answer", "all"] = "answer" if positions == "answer" else "all"
        corrupted = isinstance(self.ablation, ablations.Corrupt)
        self.share_prefix = share_prefix and corrupted and self.positions == "answer"
        self._first = torch.zeros(len(self.pairs), dtype=torch.long)  # where each example's runs begin
        self._runs: dict[str, dict[str, _Kept]] = {}
        self._log_p: _Kept | None = None
        self._keys_values: list[tuple[_Kept, _Kept]] = []
        self._prefix_axis = 0

    @property
    def _left_out(self) -> NodeSet:
        """The nodes that an ablation puts something in the place of."""
        return self.nodes

    def fill(self, batch_size: int) -> None:
        """Run everything once and keep it, unless it is to be recomputed."""
        how: Any = {"batch_size": batch_size, "positions": self.positions}
        self._reference = self.ablation.reference(self.runner, self._left_out, self.pairs, **how)
        if self.cache == "recompute":
            return
        layout = self.runner.layout(self.nodes.points, positions=self.positions)
        axes = {point: each.position_axes for point, each in layout.items()}
        self._require_room(layout)
        for rows, part in self.runner.batches(self.pairs, batch_size):
            self._keep(rows, self._run(part, keep_before=True), axes)

    def _require_room(self, layout: Mapping[str, Layout]) -> None:
        """Refuse more examples than there is memory for: of each, what the nodes do in one run, but for the shared
        beginning."""
        own = self.pairs.longest - self.pairs.shared if self.share_prefix else self.pairs.longest
        least = sum(each.values(width) for each in layout.values() for width in own.tolist())
        memory.require_room(
            self.runner.device if self.cache == "device" else torch.device("cpu"),
            least * self.runner.backend.dtype.itemsize,
            f"The runs of {len(self.pairs)} training pairs, kept with cache={self.cache!r},",
            "take cache='cpu' or 'recompute', or fewer pairs",
        )

    def _keep(self, rows: Int[Tensor, " batch"], made: Batch, axes: Mapping[str, tuple[int, ...]]) -> None:
        self._first[rows] = made.first
        for name, activations in made.runs.items():
            store = self._runs.setdefault(name, {})
            for point, activation in activations.items():
                if point not in store:
                    store[point] = self._kept_like(activation, axes[point])
                store[point].put(rows, made.first, activation)
                if point in made.before:  # the same in the clean and in the corrupt run
                    store[point].put(rows, 0, made.before[point])
        if made.prefix is not None:
            self._keep_prefix(rows, made.prefix.kept)
        if self._log_p is None:
            position_axes = (1,) if made.log_p_goal.ndim == 3 else ()
            self._log_p = self._kept_like(made.log_p_goal, position_axes, here=True)
        self._log_p.put(rows, made.first, made.log_p_goal)

    def _keep_prefix(self, rows: Int[Tensor, " batch"], found: KeysValues) -> None:
        self._prefix_axis = found.axis
        for layer, (keys, values) in enumerate(zip(found.keys, found.values, strict=True)):
            if layer == len(self._keys_values):
                self._keys_values.append((self._kept_like(keys, (found.axis,)), self._kept_like(values, (found.axis,))))
            for kept, tensor in zip(self._keys_values[layer], (keys, values), strict=True):
                kept.put(rows, 0, tensor)

    def _kept_like(self, example: Tensor, position_axes: tuple[int, ...], *, here: bool = False) -> _Kept:
        """Room for what ``example`` is of some examples, of all of them and at all positions."""
        width = self.pairs.clean.shape[1]
        sizes = [width if axis in position_axes else n for axis, n in enumerate(example.shape)]
        where = "cpu" if self.cache == "cpu" and not here else example.device
        return _Kept(torch.zeros((len(self.pairs), *sizes[1:]), dtype=example.dtype, device=where), position_axes)

    def groups(self, rows: Int[Tensor, " batch"]) -> list[Int[Tensor, " group"]]:
        """Which examples of a batch go through the model together: on a GPU all of them, on a CPU what costs least."""
        lengths = self.pairs.longest[rows]
        if self.runner.device.type != "cpu" or self.cache == "recompute" or self.positions == "all":
            return self.runner.together(lengths)
        spans = list(zip(lengths.tolist(), self._first[rows].tolist(), strict=True))
        if len(set(spans)) > 1 and not self.runner.allows_padding(max(lengths.tolist())):
            return self.runner.together(lengths)
        return grouping.cheapest(spans)

    def batch(self, rows: Int[Tensor, " batch"]) -> Batch:
        """The examples ``rows``, with everything cut to their longest prompt, and their common beginning left out."""
        part = self.pairs[rows]
        if self.cache == "recompute":
            return self._run(part)
        width, first = part.clean.shape[1], int(self._first[rows].min())
        runs = {
            name: {point: kept.get(rows, first, width) for point, kept in store.items()}
            for name, store in self._runs.items()
        }
        assert self._log_p is not None
        return Batch(part, runs, self._log_p.get(rows, first, width), self._prefix(rows, first), {}, first)

    def _prefix(self, rows: Int[Tensor, " batch"], length: int) -> Prefix | None:
        if not length:
            return None
        device = self.runner.device
        both = [[kept.get(rows, 0, length).to(device) for kept in pair] for pair in self._keys_values]
        keys, values = zip(*both, strict=True)
        return Prefix(length, KeysValues(keys, values, self._prefix_axis))

    def _run(self, part: PromptPairs, *, keep_before: bool = False) -> Batch:
        """The clean and the corrupt run of some pairs; with ``keep_before`` also what the nodes do at their common
        beginning."""
        run = PairedRun(
            self.runner,
            part,
            self.nodes,
            share_prefix=self.share_prefix,
            keep_before=keep_before,
            positions=self.positions,
            reference=self._reference,
        )
        needs = _NEEDS[self.intervention]
        runs: dict[str, Activations] = {}
        if "corrupt" in needs:
            runs["corrupt"], corrupt_logits = run.record("corrupt")
        if self.direction == "denoising" or "clean" in needs:
            clean, logits = run.record("clean", nodes="clean" in needs)
        if "clean" in needs:
            runs["clean"] = clean
        if self.direction == "noising":
            logits = corrupt_logits
        return Batch(part, runs, logits.float().log_softmax(-1), run.prefix, run.before, run.first)

    def _again(self, batch: Batch) -> PairedRun:
        """The pairs of a batch, to be run after what they have in common."""
        return PairedRun(
            self.runner,
            batch.pairs,
            self.nodes,
            share_prefix=False,
            prefix=batch.prefix,
            positions=self.positions,
            reference=self._reference,
        )

    def _kept_by(self, gates: Tensor) -> Tensor:
        """How much stays of each node: under noising the mask says what is destroyed."""
        return 1 - gates if self.direction == "noising" else gates

    def masked(self, batch: Batch, gates: Float[Tensor, "example node"]) -> Float[Tensor, "..."]:
        """The logits of a batch under masks: at the answer, or at every position that is run."""
        run, gates = self._again(batch), self._kept_by(gates)
        clean, corrupt = (batch.runs.get(name) for name in ("clean", "corrupt"))
        return run.gated(self.nodes, gates, clean=clean, corrupt=corrupt, intervention=self.intervention)


class EdgeStore(ExampleStore):
    """The same for masks of edges: what their writers do in the corrupt run is kept.

    Parameters
    ----------
    edges:
        What is gated; all other edges of the model stay open.
    """

    def __init__(
        self,
        runner: Runner,
        edges: EdgeSet,
        pairs: Mapping[str, PromptPairs],
        *,
        positions: Positions,
        cache: Cache,
        share_prefix: bool,
        ablation: str | Ablation = "corrupt",
        direction: Direction = "denoising",
    ) -> None:
        super().__init__(
            runner,
            edges.nodes,
            pairs,
            intervention="circuit",
            positions=positions,
            cache=cache,
            share_prefix=share_prefix,
            ablation=ablation,
            direction=direction,
        )
        self.edges, self.stream = edges, Stream(runner, edges)
        self.chosen = edges.chosen.to(runner.device)

    @property
    @override
    def _left_out(self) -> NodeSet:
        return self.nodes[1:]  # an ablation has something for the input in any case

    @override
    def masked(self, batch: Batch, gates: Float[Tensor, "example edge"]) -> Float[Tensor, "..."]:
        """The logits of a batch under masks of the edges, in their order."""
        whole = gates.new_ones(len(gates), *self.edges.shape)
        whole = whole.masked_scatter(self.chosen, self._kept_by(gates))
        return run_gated(self.stream, self._again(batch), whole, batch.runs["corrupt"])


@dataclass
class _Kept:
    """One tensor for all examples, axis 0, that is written and read in parts; some axes are positions."""

    whole: Tensor
    position_axes: tuple[int, ...]

    def put(self, rows: Int[Tensor, " batch"], first: int, part: Tensor) -> None:
        lengths = {part.shape[axis] for axis in self.position_axes} or {0}
        self.whole[self._window(rows, first, first + lengths.pop())] = part.to(self.whole.device)

    def get(self, rows: Int[Tensor, " batch"], first: int, end: int) -> Tensor:
        return self.whole[self._window(rows, first, end)]

    def _window(self, rows: Int[Tensor, " batch"], first: int, end: int) -> tuple[Any, ...]:
        cut = slice(first, end)
        axes = range(1, self.whole.ndim)
        return (rows.to(self.whole.device), *(cut if axis in self.position_axes else slice(None) for axis in axes))
