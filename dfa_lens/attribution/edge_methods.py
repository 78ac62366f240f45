"""The ways to score edges: by gradients at the readers' inputs, or by corrupting edges one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.attribution.method import Batch
from dfa_lens.attribution.reader_gradients import ReaderGradients
from dfa_lens.data.edges import EdgeSet, ReaderSite
from dfa_lens.data.nodes import INPUT_POINT, Site
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.edge_patches import EdgePatch
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.stream import Stream


class EdgeSums(NamedTuple):
    """What a method found on a batch, summed over its examples: scores in float64, and values as in
    :class:`~dfa_lens.attribution.method.Sums`."""

    scores: Float[Tensor, "writer reader"]
    values: dict[str, float]


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

    @abstractmethod
    def score(self, batch: Batch, task: EdgeTask) -> EdgeSums:
        """The scores of a batch, summed over its examples."""

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

    def passes(self, edges: EdgeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 1 + steps, steps  # the clean run is one of them; by steps from the corrupt end it is one more

    def units(self, edges: EdgeSet, steps: int) -> int:  # noqa: D102
        return steps

    def score(self, batch: Batch, task: EdgeTask) -> EdgeSums:  # noqa: D102
        nodes, fractions = task.edges.nodes, list(task.fractions)
        deltas, corrupt_logits = batch.record("corrupt")
        corrupt_embed = deltas[INPUT_POINT]
        gradients = ReaderGradients(task.stream, batch, deltas)

        def difference(site: Site, now: Tensor) -> None:
            # in place of the recorded activation, which nothing else needs: one cache, not two
            deltas[site.point] = now.detach() - deltas[site.point]

        reading: list[tuple[str, HookFunction]] = [(site.point, partial(difference, site)) for site in nodes.sites]
        clean_logits: Tensor | None = None
        if 1.0 in fractions:  # the clean run is one of those with gradients, and goes first
            fractions.remove(1.0)
            clean_logits = _backward(batch, gradients, None, reading)
            batch.done()
        else:
            with torch.no_grad():
                clean_logits = batch.run(reading)
        for some in gradients.chunks(sorted(fractions, reverse=True)):
            start = torch.cat([corrupt_embed + fraction * deltas[INPUT_POINT] for fraction in some])
            _backward(batch, gradients, start, [], clean_logits, len(some))
            batch.done(len(some))
        scores = gradients.scores() / len(task.fractions)
        clean, corrupt = (batch.total(logits, clean_logits) for logits in (clean_logits, corrupt_logits))
        sums = {"clean": clean, "corrupt": corrupt}
        if self.integrates:  # the edges of the embedding carry all that it changes
            sums |= {"expected": clean - corrupt, "explained": float(scores[0].sum())}
        return EdgeSums(scores, sums)


class EapIgInputs(Eap):
    """The gradient averaged over runs from embeddings between the corrupt and the clean one (Hanna et al. 2024)."""

    integrates: ClassVar[bool] = True


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

    one = gradients.one_pass()
    with torch.enable_grad():
        logits = batch.run([(INPUT_POINT, embed), *taps, *one.taps()], times=times)
        values = batch.values(logits, logits.detach() if clean_logits is None else clean_logits, times)
        torch.autograd.grad(values.sum(), leaves, retain_graph=one.keeps_graph)
    one.finish()
    return logits.detach()


class EapIgActivations(EdgeMethod):
    """The gradient averaged over runs in which the writer's hook point, and nothing else, is between its corrupt and
    its clean activation: every writer's own path."""

    integrates: ClassVar[bool] = True

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

    def passes(self, edges: EdgeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 2 + len(edges), 0

    def units(self, edges: EdgeSet, steps: int) -> int:  # noqa: D102
        return len(edges)

    def score(self, batch: Batch, task: EdgeTask) -> EdgeSums:  # noqa: D102
        edges = task.edges
        deltas, corrupt_logits = batch.record("corrupt")
        clean, clean_logits = batch.record("clean", streams=batch.restarts)
        for point in deltas:
            deltas[point] -= clean[point]
        clean = {site.point: clean[site.point] for site in edges.nodes.sites if task.stream.needs_heads(site)}
        metric = batch.total(clean_logits, clean_logits)
        scores = torch.zeros(edges.shape, dtype=torch.float64)
        for site in edges.sites:
            own = edges.chosen[:, site.columns].nonzero()
            members = task.stream.members if site.kind in ("k", "v") else 1
            for some in own.split(max(1, batch.room // members)) if len(own) else ():
                columns = site.first + some[:, 1]
                without = self._without(batch, task, site, some, deltas, clean, clean_logits)
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
        clean: Activations,
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
                if one.point in clean:
                    written = stream.behind_norm(one, written, clean[one.point], at[mine] % n_places)
                found[mine, column] = written
            return found

        copies = torch.cat([places + copy * n_places for copy in range(len(some))])
        with torch.no_grad():
            patch = EdgePatch(stream, [site], change, copies, len(some) * len(batch))
            logits = patch.run(batch, times=len(some), layer=site.layer)
            values = batch.values(logits, clean_logits, len(some))
        return values.unflatten(0, (len(some), -1)).sum(1, dtype=torch.float64).cpu()
