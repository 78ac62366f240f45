"""What an attribution method is, and what every one of them works with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.data.metrics import Metric
from dfa_lens.data.nodes import NodeSet, Site
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import PromptError
from dfa_lens.models.ablations import Reference
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner


class Sums(NamedTuple):
    """What a method found on a batch, summed over its examples.

    ``scores`` is [node] in float64. ``values`` has the metric of the "clean" and of the "corrupt" run. ``whole`` has,
    of a method whose scores add up to something, what they should add up to and what they do, for each group of nodes
    that has a sum of its own.
    """

    scores: Float[Tensor, " node"]
    values: Mapping[str, float]
    whole: Mapping[str, tuple[float, float]] = MappingProxyType({})

    def plus(self, other: Sums) -> Sums:
        """The sums of both batches."""
        values = {key: self.values.get(key, 0.0) + value for key, value in other.values.items()}
        zero = (0.0, 0.0)
        whole = {
            key: (self.whole.get(key, zero)[0] + expected, self.whole.get(key, zero)[1] + explained)
            for key, (expected, explained) in other.whole.items()
        }
        return Sums(self.scores + other.scores, values, whole)

    def times(self, factor: float) -> Sums:
        """All of it times a number."""
        values = {key: factor * value for key, value in self.values.items()}
        whole = {key: (factor * expected, factor * explained) for key, (expected, explained) in self.whole.items()}
        return Sums(factor * self.scores, values, whole)


@dataclass(frozen=True)
class Measurement:
    """One attribution: what every batch of it has in common.

    Attributes
    ----------
    runner, nodes, metric:
        What is run, what is scored, by what.
    steps:
        Integration steps.
    batch_size:
        Examples a pass; steps and ablated nodes of a smaller batch share a pass.
    share_prefix:
        Whether a common beginning may be run once.
    two_columns:
        Whether the metric reads the logits of the two answers only.
    mlp_gradient, accumulate:
        See :func:`~dfa_lens.attribution.attribute.attribute`.
    done:
        Told how many examples have gone through one more unit of work.
    seed:
        Of the methods that draw random numbers.
    examples:
        How many there are in all batches.
    only_new:
        Only the integration steps that half as many would not have taken.
    reference:
        What stands in the place of a node that is left out, where that is not its activation in the corrupt run.
    """

    runner: Runner
    nodes: NodeSet
    metric: Metric
    steps: int
    batch_size: int
    share_prefix: bool
    two_columns: bool = False
    mlp_gradient: str = "output"
    accumulate: str = "own"
    done: Callable[[int], Any] = lambda n: None
    seed: int = 0
    examples: int = 0
    only_new: bool = False
    reference: Reference | None = None

    @property
    def fractions(self) -> list[float]:
        """The places of the path, as parts of the way from the corrupt to the clean run."""
        return [k / self.steps for k in range(1, self.steps + 1, 1 + self.only_new)]


class Method(ABC):
    """One way to score nodes; derive from it and register it in :data:`~dfa_lens.attribution.attribute.METHODS`."""

    #: what it is called in metadata, and in :data:`~dfa_lens.attribution.attribute.METHODS`
    name: ClassVar[str] = "your own"
    #: whether it takes integration steps
    integrates: ClassVar[bool] = False
    #: whether it takes gradients
    differentiates: ClassVar[bool] = True
    #: whether it draws random numbers
    random: ClassVar[bool] = False
    #: whether blocks may run once more on the way backward, where weights are offloaded: not under hooks that hand
    #: things on to each other, nor with several gradients of one pass
    checkpointing: ClassVar[bool] = False

    @abstractmethod
    def score(self, batch: Batch) -> Sums:
        """The scores of a batch, summed over its examples."""

    def mean(self, measurement: Measurement, pairs: PromptPairs) -> Sums:
        """The scores of all pairs and the values beside them, as means over examples."""
        total = Sums(torch.zeros(len(measurement.nodes), dtype=torch.float64), {})
        for rows, part in measurement.runner.batches(pairs, measurement.batch_size):
            total = total.plus(self.score(Batch(measurement, part, rows)))
        return total.times(1 / len(pairs))

    def meta(self) -> dict[str, Any]:
        """What the scores' metadata say of the method beside its name: options of its own."""
        return {}

    def total(self, nodes: NodeSet, steps: int, examples: int) -> int:
        """Length of the progress bar."""
        return examples * self.units(nodes, steps)

    @abstractmethod
    def passes(self, nodes: NodeSet, steps: int) -> tuple[int, int]:
        """Forward and backward passes of one example, each counted as a whole one."""

    @abstractmethod
    def units(self, nodes: NodeSet, steps: int) -> int:
        """Steps of the progress bar for one example: how often it calls ``done``."""

    def held(self, footprint: Footprint, batch: int) -> int:
        """Bytes of recorded activations that are kept at one time."""
        return batch * (footprint.site_bytes + footprint.stream_bytes)

    def need(self, footprint: Footprint, nodes: NodeSet, *, steps: int, examples: int, batch: int) -> Need:
        """What scoring so many examples needs."""
        forward, backward = self.passes(nodes, steps)
        graph = footprint.gradient_bytes(batch) if self.differentiates else 0
        working = footprint.working_bytes(batch)
        held = self.held(footprint, batch)
        return Need("attribute", examples * forward, examples * backward, held, graph, working)


class Batch(PairedRun):
    """Some of the pairs, how the model is run on them, and the metric of what comes out.

    ``rows`` are their places among the pairs that batches are made of.
    """

    def __init__(self, measurement: Measurement, pairs: PromptPairs, rows: Int[Tensor, " pair"] | None = None) -> None:
        own = measurement
        self.rows = torch.arange(len(pairs)) if rows is None else rows
        two = torch.stack([pairs.answer, pairs.wrong], 1) if own.two_columns else None
        more: dict[str, Any] = {"share_prefix": own.share_prefix, "reference": own.reference}
        super().__init__(own.runner, pairs, own.nodes, columns=two, **more)
        self.measurement, self.labels = own, pairs
        self.room = max(1, own.batch_size // len(pairs))  # how often the batch fits into one pass
        if own.two_columns:
            first = torch.zeros_like(pairs.answer)
            self.labels = replace(pairs, answer=first, wrong=first + 1, choices=None, corrupt_choices=None)

    @property
    def restarts(self) -> list[int]:
        """The blocks that passes may begin at: those with nodes, but for the first."""
        if not self.runner.allows("start", self.pairs.clean.shape[1]):
            return []
        return self.runner.restarts(self.measurement.nodes)

    def chunks(self, items: list[Any]) -> list[list[Any]]:
        """As many at a time as fit into one pass."""
        return [items[first : first + self.room] for first in range(0, len(items), self.room)]

    def values(self, logits: Tensor, clean_logits: Tensor, times: int = 1) -> Float[Tensor, " row"]:
        """The metric of every row."""
        labels = self.labels
        if times > 1:
            labels = labels[torch.arange(len(labels)).repeat(times)]
            clean_logits = clean_logits.repeat(times, 1)
        return self.measurement.metric(logits, labels, clean_logits)

    def total(self, logits: Tensor, clean_logits: Tensor) -> float:
        """The metric summed over the batch."""
        return float(self.values(logits, clean_logits).sum(dtype=torch.float64))

    def ablated(
        self, nodes: NodeSet, masks: Float[Tensor, "times node"], corrupt: Activations, clean_logits: Tensor
    ) -> Float[Tensor, " times"]:
        """The metric summed over the batch, of the clean run under every one of several masks; ``nodes``: those of
        one layer."""
        times = len(masks)
        with torch.no_grad():
            rows = masks.repeat_interleave(len(self), 0)
            logits = self.gated(nodes, rows, corrupt=corrupt, layer=nodes[0].layer)
            values = self.values(logits, clean_logits, times)
        return values.unflatten(0, (times, -1)).sum(1, dtype=torch.float64).cpu()

    def add(self, totals: Tensor, site: Site, delta: Tensor, gradient: Tensor) -> None:
        """Add Σ Δ·gradient over examples, positions and width to each node of a site.

        Padding needs no care here: attention is causal and the padding is on the right (or there is none), so the
        gradient of anything read at the last real token is exactly zero there.
        """
        product = delta.float() * summed(gradient.float(), len(delta))
        if site.spans:
            part = self._over_spans(site, product).sum(0)
        elif site.axis is None:
            part = product.sum(dtype=torch.float64)[None]
        else:
            others = [axis for axis in range(product.ndim) if axis != site.axis]
            part = product.sum(others, dtype=torch.float64)
            if site.by_position:
                part = torch.nn.functional.pad(part, (0, (site.size or 0) - len(part)))
            part = part[list(site.slices)]
        totals[list(site.positions)] += part.cpu()

    def each(self, site: Site, delta: Tensor, gradient: Tensor) -> Float[Tensor, "pair node"]:
        """Δ·gradient of every example, summed over positions and width, for the nodes of a site; in float64."""
        product = delta.float() * gradient.float()
        if site.spans:
            return self._over_spans(site, product).cpu()
        others = [axis for axis in range(1, product.ndim) if axis != site.axis]
        part = product.sum(others, dtype=torch.float64) if others else product.double()
        if site.axis is None:
            return part[:, None].cpu()
        if site.by_position:
            part = torch.nn.functional.pad(part, (0, (site.size or 0) - part.shape[1]))
        return part[:, list(site.slices)].cpu()

    def _over_spans(self, site: Site, product: Tensor) -> Float[Tensor, "pair node"]:
        """Σ over the tokens of each node's span, and over width, of every example; in float64."""
        spans = self.spans()
        if spans is None:
            raise PromptError("Nodes at spans need prompt pairs that know theirs: apply a dfa.Schema to them.")
        others = [axis for axis in range(2, product.ndim) if axis != site.axis]
        each = product.sum(others, dtype=torch.float64) if others else product.double()
        each = each.reshape(*product.shape[:2], -1)  # [pair, token, slice]
        sums = each.new_zeros(len(each), len(spans.names) + 1, each.shape[2])
        labels = torch.where(spans.labels < 0, len(spans.names), spans.labels).to(each.device)
        sums.scatter_add_(1, labels[:, :, None].expand_as(each), each)
        return sums[:, [spans.number(name) for name in site.spans], list(site.slices)]

    def done(self, times: int = 1) -> None:
        """Say that every example has gone through so many more units of work."""
        self.measurement.done(len(self) * times)

    def empty_scores(self) -> Float[Tensor, " node"]:
        """Zeros to add up scores in, in float64."""
        return torch.zeros(len(self.measurement.nodes), dtype=torch.float64)


def summed(gradient: Tensor, batch: int) -> Tensor:
    """The sum over several passes of a batch that were made in one."""
    return gradient if len(gradient) == batch else gradient.unflatten(0, (-1, batch)).sum(0)
