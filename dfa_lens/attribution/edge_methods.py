"""The ways to score edges: by gradients at the readers' inputs, by corrupting edges one by one, or by learned masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.attribution.gradients import AttnLrp, Gim, RelP, between, places_of_draw
from dfa_lens.attribution.learned import Learned, Part
from dfa_lens.attribution.method import Batch, Measurement
from dfa_lens.attribution.reader_gradients import ReaderGradients
from dfa_lens.data.edges import EdgeSet, ReaderSite
from dfa_lens.data.nodes import INPUT_POINT, Site
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.edge_gates import run_gated
from dfa_lens.models.edge_patches import EdgePatch
from dfa_lens.models.gradient_rules import Rules
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.stream import Stream


class EdgeSums(NamedTuple):
    """What a method found on a batch, summed over its examples: scores in float64, and values as in
    :class:`~dfa_lens.attribution.method.Sums`."""

    scores: Float[Tensor, "writer reader"]
    values: dict[str, float]

    def plus(self, other: EdgeSums) -> EdgeSums:
        """The sums of both batches."""
        keys = self.values.keys() | other.values.keys()
        values = {key: self.values.get(key, 0.0) + other.values.get(key, 0.0) for key in keys}
        return EdgeSums(self.scores + other.scores, values)

    def times(self, factor: float) -> EdgeSums:
        """All of it times a number."""
        return EdgeSums(factor * self.scores, {key: factor * value for key, value in self.values.items()})


@dataclass(frozen=True)
class EdgeTask:
    """What is asked for: which edges, and at which places of a path, as parts of the way from corrupt to clean."""

    stream: Stream
    edges: EdgeSet
    fractions: Sequence[float]


class EdgeMethod(ABC):
    """One way to score edges."""

    #: whether it takes integration steps
    integrates: ClassVar[bool] = False
    #: whether those can be taken from either end of the path
    has_ends: ClassVar[bool] = False
    #: whether it takes gradients
    differentiates: ClassVar[bool] = True
    #: whether it draws random numbers
    random: ClassVar[bool] = False
    #: whether blocks may run once more on the way backward, where weights are offloaded
    checkpointing: ClassVar[bool] = True

    @abstractmethod
    def score(self, batch: Batch, task: EdgeTask) -> EdgeSums:
        """The scores of a batch, summed over its examples."""

    def mean(self, measurement: Measurement, pairs: PromptPairs, task: EdgeTask) -> EdgeSums:
        """The scores of all pairs and the values beside them, as means over examples."""
        total = EdgeSums(torch.zeros(task.edges.shape, dtype=torch.float64), {})
        for rows, part in measurement.runner.batches(pairs, measurement.batch_size):
            total = total.plus(self.score(Batch(measurement, part, rows), task))
        return total.times(1 / len(pairs))

    def meta(self) -> dict[str, Any]:
        """What the scores' metadata say of the method beside its name: options of its own."""
        return {}

    def total(self, edges: EdgeSet, steps: int, examples: int) -> int:
        """Length of the progress bar."""
        return examples * self.units(edges, steps)

    @abstractmethod
    def passes(self, edges: EdgeSet, steps: int) -> tuple[int, int]:
        """Forward and backward passes of one example, each counted as a whole one."""

    @abstractmethod
    def units(self, edges: EdgeSet, steps: int) -> int:
        """Steps of the progress bar for one example."""

    def need(self, footprint: Footprint, edges: EdgeSet, *, steps: int, examples: int, batch: int) -> Need:
        """What scoring so many examples needs."""
        forward, backward = self.passes(edges, steps)
        graph = footprint.gradient_bytes(batch) if backward else 0
        # the readers' gradients in float32, about as wide as the writers' differences and the streams together
        itemsize = footprint.runner.backend.dtype.itemsize
        streams = edges.n_layers * footprint.embed_bytes
        gradients = (footprint.site_bytes + 2 * streams) * max(4, itemsize) // itemsize if backward else 0
        held = batch * (2 * footprint.site_bytes + streams + gradients)
        working = footprint.working_bytes(batch)
        return Need("attribute_edges", examples * forward, examples * backward, held, graph, working)


class Eap(EdgeMethod):
    """Δ·g at the clean run: edge attribution patching (Syed et al. 2023)."""

    rules: ClassVar[Rules] = Rules()

    def passes(self, edges: EdgeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 1 + steps, steps  # the clean run is one of them; by steps from the corrupt end it is one more

    def units(self, edges: EdgeSet, steps: int) -> int:  # noqa: D102
        return steps

    def _places(self, batch: Batch, task: EdgeTask) -> list[float | Float[Tensor, " pair"]]:
        """Where gradients are taken, as parts of the way from the corrupt to the clean embedding: of all examples, or
        of each; those nearest to the clean end first."""
        return sorted(task.fractions, reverse=True)

    def score(self, batch: Batch, task: EdgeTask) -> EdgeSums:  # noqa: D102
        nodes, places = task.edges.nodes, self._places(batch, task)
        n_places = len(places)
        deltas, corrupt_logits = batch.record("corrupt")
        corrupt_embed = deltas[INPUT_POINT]
        gradients = ReaderGradients(task.stream, batch, deltas, rules=self.rules)

        def difference(site: Site, now: Tensor) -> None:
            # in place of the recorded activation, which nothing else needs: one cache, not two
            deltas[site.point] = now.detach() - deltas[site.point]

        reading: list[tuple[str, HookFunction]] = [(site.point, partial(difference, site)) for site in nodes.sites]
        clean_logits: Tensor | None = None
        if not isinstance(places[0], Tensor) and places[0] == 1.0:  # the clean run is one of those with gradients
            del places[0]
            clean_logits = _backward(batch, gradients, None, reading)
            batch.done()
        else:
            with torch.no_grad():
                clean_logits = batch.run(reading)
        clean_embed = corrupt_embed + deltas[INPUT_POINT]
        for some in gradients.chunks(places):
            start = torch.cat([between(corrupt_embed, clean_embed, place) for place in some])
            _backward(batch, gradients, start, [], clean_logits, len(some))
            batch.done(len(some))
        scores = gradients.scores() / n_places
        clean, corrupt = (batch.total(logits, clean_logits) for logits in (clean_logits, corrupt_logits))
        sums = {"clean": clean, "corrupt": corrupt}
        if self.integrates:  # the edges of the embedding carry all that it changes
            begin = corrupt
            if batch.reference is not None:  # the path begins where the embedding alone is at its reference
                with torch.no_grad():
                    begin = batch.total(batch.run([(INPUT_POINT, lambda now: corrupt_embed)]), clean_logits)
            sums |= {"expected": clean - begin, "explained": float(scores[0].sum())}
        return EdgeSums(scores, sums)


class RelPEdges(Eap):
    """:class:`~dfa_lens.attribution.gradients.RelP` on edges: those into queries and keys score 0."""

    checkpointing: ClassVar[bool] = False
    rules: ClassVar[Rules] = RelP.rules


class AttnLrpEdges(Eap):
    """:class:`~dfa_lens.attribution.gradients.AttnLrp` on edges."""

    checkpointing: ClassVar[bool] = False
    rules: ClassVar[Rules] = AttnLrp.rules


class GimEdges(Eap):
    """:class:`~dfa_lens.attribution.gradients.Gim` on edges."""

    checkpointing: ClassVar[bool] = False
    rules: ClassVar[Rules] = Gim.rules


class EapIgInputs(Eap):
    """The gradient averaged over runs from embeddings between the corrupt and the clean one (Hanna et al. 2024)."""

    integrates: ClassVar[bool] = True
    has_ends: ClassVar[bool] = True


class ExpectedGradientsEdges(Eap):
    """The gradient at random places of the path, uniform and drawn anew for every example and step:
    :class:`~dfa_lens.attribution.gradients.ExpectedGradients` on edges, at the same places."""

    integrates: ClassVar[bool] = True
    random: ClassVar[bool] = True

    def passes(self, edges: EdgeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 2 + steps, steps

    def _places(self, batch: Batch, task: EdgeTask) -> list[float | Float[Tensor, " pair"]]:
        own = batch.measurement
        return [places_of_draw(own.examples, own.seed, draw)[batch.rows] for draw in range(own.steps)]


def _backward(
    batch: Batch,
    gradients: ReaderGradients,
    start: Tensor | None,
    taps: list[tuple[str, HookFunction]],
    clean_logits: Tensor | None = None,
    times: int = 1,
) -> Float[Tensor, "row vocab"]:
    """One pass from the embedding ``start`` (None: its own), and back; its logits."""
    leaves: list[Tensor] = []

    def embed(now: Tensor) -> Tensor:
        leaves.append((now if start is None else start).detach().clone().requires_grad_(True))
        return leaves[0]

    one, rules = gradients.one_pass(), gradients.rules.taps(batch.runner)
    with torch.enable_grad(), gradients.rules.norms(batch.runner):
        every = [(INPUT_POINT, embed), *taps, *rules.first, *one.taps(), *rules.last]
        logits = batch.run(every, times=times)
        values = batch.values(logits, logits.detach() if clean_logits is None else clean_logits, times)
        torch.autograd.grad(values.sum(), leaves, retain_graph=one.keeps_graph)
    one.finish()
    return logits.detach()


class EapIgActivations(EdgeMethod):
    """The gradient averaged over runs in which the writer's hook point, and nothing else, is between its corrupt and
    its clean activation: every writer's own path."""

    integrates: ClassVar[bool] = True
    has_ends: ClassVar[bool] = True

    def passes(self, edges: EdgeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        n = len(edges.nodes.sites) * steps
        return 2 + n, n

    def units(self, edges: EdgeSet, steps: int) -> int:  # noqa: D102
        return len(edges.nodes.sites)

    def score(self, batch: Batch, task: EdgeTask) -> EdgeSums:  # noqa: D102
        corrupt, corrupt_logits = batch.record("corrupt")
        deltas, clean_logits = batch.record("clean", streams=batch.restarts)
        for point in deltas:  # in place of the clean activations, which nothing else needs
            deltas[point] -= corrupt[point]
        scores = torch.zeros(task.edges.shape, dtype=torch.float64)
        for site in task.edges.nodes.sites:
            rows = slice(site.positions[0], site.positions[-1] + 1)
            if bool(task.edges.chosen[rows].any()):
                gradients = ReaderGradients(task.stream, batch, deltas, (site,))
                for some in gradients.chunks(list(task.fractions)):
                    self._path(batch, gradients, site, some, corrupt[site.point], clean_logits)
                scores += gradients.scores() / len(task.fractions)
            batch.done()
        names = {"clean": clean_logits, "corrupt": corrupt_logits}
        return EdgeSums(scores, {name: batch.total(logits, clean_logits) for name, logits in names.items()})

    def _path(
        self,
        batch: Batch,
        gradients: ReaderGradients,
        site: Site,
        fractions: list[float],
        corrupt: Tensor,
        clean_logits: Tensor,
    ) -> None:
        """The gradients at some places of one site's path, in one pass that begins at the site's block."""
        leaves: list[Tensor] = []

        def move(now: Tensor) -> Tensor:
            places = torch.cat([corrupt + fraction * gradients.deltas[site.point] for fraction in fractions])
            leaves.append(places.requires_grad_(True))
            return leaves[0]

        one = gradients.one_pass()
        with torch.enable_grad():
            logits = batch.run([(site.point, move), *one.taps()], times=len(fractions), layer=site.layer)
            values = batch.values(logits, clean_logits, len(fractions))
            torch.autograd.grad(values.sum(), leaves, retain_graph=one.keeps_graph)
        one.finish()


class ExactEdges(EdgeMethod):
    """m(clean) - m(clean with this edge at its writer's corrupt activation), edge by edge."""

    differentiates: ClassVar[bool] = False

    def passes(self, edges: EdgeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 2 + len(edges), 0

    def units(self, edges: EdgeSet, steps: int) -> int:  # noqa: D102
        return len(edges)

    def score(self, batch: Batch, task: EdgeTask) -> EdgeSums:  # noqa: D102
        edges = task.edges
        deltas, corrupt_logits = batch.record("corrupt")
        clean, clean_logits = batch.record("clean", streams=batch.restarts)
        behind = {site.point: clean[site.point] for site in edges.nodes.sites if task.stream.needs_heads(site)}
        for point in deltas:  # in place of the corrupt activations, which may be views of one constant
            deltas[point] = deltas[point] - clean.pop(point)
        metric = batch.total(clean_logits, clean_logits)
        scores = torch.zeros(edges.shape, dtype=torch.float64)
        for site in edges.sites:
            own = edges.chosen[:, site.columns].nonzero()
            members = task.stream.members if site.kind in ("k", "v") else 1
            for some in own.split(max(1, batch.room // members)) if len(own) else ():
                columns = site.first + some[:, 1]
                without = self._without(batch, task, site, some, deltas, behind, clean_logits)
                scores[some[:, 0], columns] = metric - without
                batch.done(len(some))
        return EdgeSums(scores, {"clean": metric, "corrupt": batch.total(corrupt_logits, clean_logits)})

    def _without(
        self,
        batch: Batch,
        task: EdgeTask,
        site: ReaderSite,
        some: Int[Tensor, "edge 2"],
        deltas: Activations,
        behind: Activations,
        clean_logits: Tensor,
    ) -> Float[Tensor, " edge"]:
        """The metric, summed over the batch, without each of some edges into one site: (writer, reader of the site)."""
        stream, ends = task.stream, some.tolist()
        nodes, places = task.edges.nodes, stream.places(batch)
        n_places = len(batch) * deltas[INPUT_POINT].shape[1]

        def change(of: Sequence[ReaderSite], at: Int[Tensor, " place"]) -> Float[Tensor, "place reader d_model"]:
            """In each copy of the batch its own edge: its writer's corrupt activation in place of the clean one."""
            found = torch.zeros(
                len(at), sum(map(len, of)), deltas[INPUT_POINT].shape[2], dtype=stream.dtype, device=at.device
            )
            for copy in (at // n_places).unique().tolist():
                mine = at // n_places == copy
                row, column = ends[copy]
                one = next(each for each in nodes.sites if row in each.positions)
                written = stream.written(one, deltas[one.point], at[mine] % n_places)[row - one.positions[0]]
                if one.point in behind:
                    written = stream.behind_norm(one, written, behind[one.point], at[mine] % n_places)
                found[mine, column] = written
            return found

        copies = torch.cat([places + copy * n_places for copy in range(len(some))])
        with torch.no_grad():
            patch = EdgePatch(stream, [site], change, copies, len(some) * len(batch))
            logits = patch.run(batch, times=len(some), layer=site.layer)
            values = batch.values(logits, clean_logits, len(some))
        return values.unflatten(0, (len(some), -1)).sum(1, dtype=torch.float64).cpu()


@dataclass(frozen=True)
class LearnedEdges(EdgeMethod):
    """A :class:`~dfa_lens.attribution.learned.Learned` mask with a gate for each edge.

    ``ugs`` was published for edges, as was what ``node-pruning`` does, which is called ``edge-pruning`` here.

    Attributes
    ----------
    learned:
        The mask, and how it is trained.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.attribution.edge_methods import LearnedEdges
    >>> from dfa_lens.attribution.learned import Matryoshka
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=2)
    >>> len(dfa.attribute_edges(model, pairs, method=LearnedEdges(Matryoshka(iterations=1))))
    2500
    """

    random: ClassVar[bool] = True
    checkpointing: ClassVar[bool] = False

    learned: Learned

    def score(self, batch: Batch, task: EdgeTask) -> EdgeSums:
        """Not to be had of one batch: all pairs are trained on."""
        raise NotImplementedError("A learned ranking is made of all pairs: LearnedEdges.mean.")

    def mean(self, measurement: Measurement, pairs: PromptPairs, task: EdgeTask) -> EdgeSums:  # noqa: D102
        at = task.edges.positions
        open_ = torch.ones(task.edges.shape, dtype=torch.float32)  # the edges that are not asked for

        def run(part: Part, gates: Float[Tensor, "pair edge"]) -> Float[Tensor, "..."]:
            whole = open_.expand(len(gates), -1, -1).clone()
            whole[:, at[:, 0], at[:, 1]] = gates
            return run_gated(task.stream, part.batch, whole, part.corrupt)

        found = self.learned.ranked(measurement, pairs, len(at), run)
        scores = torch.zeros(task.edges.shape, dtype=torch.float64)
        scores[at[:, 0], at[:, 1]] = found.scores
        return EdgeSums(scores, dict(found.values))

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return self.learned.meta()

    def passes(self, edges: EdgeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 2 + self.learned.iterations, self.learned.iterations

    def units(self, edges: EdgeSet, steps: int) -> int:  # noqa: D102
        return self.learned.iterations

    def total(self, edges: EdgeSet, steps: int, examples: int) -> int:  # noqa: D102
        return self.learned.total(edges.nodes, steps, examples)

    def need(self, footprint: Footprint, edges: EdgeSet, *, steps: int, examples: int, batch: int) -> Need:  # noqa: D102
        of_nodes = self.learned.need(footprint, edges.nodes, steps=steps, examples=examples, batch=batch)
        streams = batch * 4 * edges.n_layers * footprint.embed_bytes
        return replace(of_nodes, operation="attribute_edges", cache_bytes=of_nodes.cache_bytes + streams)
