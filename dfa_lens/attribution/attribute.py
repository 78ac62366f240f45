"""Attribution: how much every node matters for the metric.

With A the activation of node j, Δ = A_clean - A_corrupt and m the metric (positive scores: restoring the clean
activation helps):

- ``nap``: s_j = Δ·∂m/∂A at the clean run (node attribution patching).
- ``nap-ig-inputs``: the gradient averaged over runs whose embedding is corrupt + (k/steps)(clean - corrupt),
  k = 1 … steps. ``nap`` is its case of one step.
- ``nap-ig-activations``: the gradient averaged over runs in which the node's hook point, and nothing else, is at
  corrupt + (k/steps)(clean - corrupt): the path integral of that group alone.
- ``exact``: m(clean) - m(clean with this node at its corrupt activation), what the others approximate.

All sums run over positions and width, then over examples in float64, and are divided by the number of examples: no
result depends on how the examples are batched.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.data import metrics
from dfa_lens.data.nodes import INPUT_POINT, NodeSet, Site
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import DfaError, unknown
from dfa_lens.models import backend, hooks, memory
from dfa_lens.models.backend import HookedModel, HookFunction
from dfa_lens.models.hooks import Activations
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner

logger = logging.getLogger(__name__)

Method = Literal["nap", "nap-ig-inputs", "nap-ig-activations", "exact"]
"""The attribution methods; see the module's text for their equations."""

#: Above this part of m(clean) - m(corrupt) left unexplained, the integration steps are called too few.
INCOMPLETE = 0.25
#: ``steps="auto"`` starts here, doubles, and gives up (with a warning) beyond the last.
AUTO_STEPS = (5, 10, 20, 40, 80)


class IntegrationWarning(UserWarning):
    """The integration steps are too few for the scores to mean what they promise."""


@backend.runs("model")
def attribute(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    method: Method = "nap-ig-inputs",
    steps: int | Literal["auto"] = 5,
    nodes: NodeSet | None = None,
    metric: str | Callable[..., Tensor] | None = None,
    batch_size: int | Literal["auto"] = 16,
    progress: bool = False,
    mlp_gradient: Literal["output", "input"] = "output",
    accumulate: Literal["own", "all"] = "own",
    tolerance: float = 0.02,
    share_prefix: bool = True,
) -> NodeScores:
    """Score every node by how much its clean activation helps the metric.

    Parameters
    ----------
    model:
        A HookedTransformer or TransformerBridge; left as it was.
    pairs:
        Clean and corrupt prompts with their answers.
    method:
        One of :data:`Method`. The default costs ``1 + 2·steps`` forward passes a batch and gets the size of large
        effects much better than ``nap`` (3 passes); docs/accuracy.md has the figures. ``nap-ig-activations`` and
        ``exact`` cost passes in proportion to the number of layers and of nodes.
    steps:
        Integration steps of the two ``nap-ig`` methods, at least 1; 5 as in the paper. "auto" doubles them from 5 on
        until no score moves by more than ``tolerance`` of the largest one.
    nodes:
        Which nodes; default: all attention heads and MLP blocks.
    metric:
        See :class:`~dfa_lens.data.pairs.PromptPairs`; default: that of ``pairs``, the logit difference.
    batch_size:
        Examples a pass; integration steps and ablated nodes share a pass where there is room in it. "auto" takes what
        fits into free memory, and half of that after an out-of-memory error. Changes memory and time, never the
        scores.
    progress:
        Show a progress bar.
    mlp_gradient:
        "output" is right. "input" multiplies an MLP's difference at its output with the gradient at its input, as
        the released code does (EAP-IG issue 22): comparison only.
    accumulate:
        "own" is right. "all" makes ``nap-ig-activations`` add up every node's gradient on the passes of every group,
        as the released code does: comparison only.
    tolerance:
        For ``steps="auto"``.
    share_prefix:
        Run the tokens that a batch's clean and corrupt prompts share at their beginning only once, where that can be
        done (see :meth:`~dfa_lens.models.runner.Runner.shared_length`). Changes time, the scores by rounding only.

    Returns
    -------
    NodeScores
        On the CPU in float32. ``.meta["completeness"]`` says how much of the metric's change theory promises as a sum
        ("expected"), what the scores add up to ("explained"), and the part that is missing ("residual", relative):
        for ``nap-ig-inputs`` the embedding's integral against m(clean) - m(corrupt); for ``nap-ig-activations`` each
        group's integral against ablating the group. The other methods promise no sum.

    Raises
    ------
    DfaError
        If a name is misspelt, ``steps`` is below 1, or the metric is not finite.
    PromptError, NodeError, HookError
        If pairs or nodes do not fit the model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> scores = dfa.attribute(model, pairs, method="nap")
    >>> scores.values.shape
    torch.Size([54])
    """
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    if steps != "auto" and (not isinstance(steps, int) or steps < 1):
        raise DfaError(f"steps must be a whole number of at least 1, or 'auto', not {steps!r}.")
    if mlp_gradient not in ("output", "input"):
        raise unknown("mlp_gradient", mlp_gradient, ("output", "input"))
    if accumulate not in ("own", "all"):
        raise unknown("accumulate", accumulate, ("own", "all"))
    if method in ("nap-ig-activations", "exact") and mlp_gradient == "input" and accumulate == "own":
        raise DfaError(
            f"mlp_gradient='input' reproduces the released code, in which {method!r} has it only together with "
            "accumulate='all'."
            if method == "nap-ig-activations"
            else "mlp_gradient says which gradient to take; 'exact' takes none."
        )
    runner = Runner(model)
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(model)
    chosen = pairs.metric if metric is None else metric
    runner.require(pairs)
    runner.check_points(nodes.points)

    def once(n: int, size: int) -> NodeScores:
        job = _Job(runner, nodes, metrics.resolve(chosen), method, n, mlp_gradient, accumulate, size, share_prefix)
        job.two_columns = isinstance(chosen, str) and chosen in metrics.TWO_COLUMNS
        totals = torch.zeros(len(nodes), dtype=torch.float64)
        sums: dict[str, float] = {}
        total = len(pairs) * job.units
        n_passes = 3 * (len(pairs) // size + 1) * max(1, job.units // max(1, size))
        with (
            runner.session(passes=n_passes),
            tqdm(total=total, desc=method, unit="run", disable=not progress) as bar,
        ):
            job.done = bar.update
            for _, batch in runner.batches(pairs, size):
                result = job.run(batch)
                totals += result.scores
                for key, value in result.sums.items():
                    sums[key] = sums.get(key, 0.0) + value
        values = totals / len(pairs)
        means = {key: value / len(pairs) for key, value in sums.items()}
        meta: dict[str, Any] = {
            "method": method,
            "metric": metrics.name_of(chosen),
            "examples": len(pairs),
            "model": runner.name,
        }
        if method.startswith("nap-ig"):
            meta["steps"] = n
        for name, mode, usual in (("mlp_gradient", mlp_gradient, "output"), ("accumulate", accumulate, "own")):
            if mode != usual:
                meta[name] = mode
        meta["metric_clean"], meta["metric_corrupt"] = means["clean"], means["corrupt"]
        if "expected" in means:
            expected, explained = means["expected"], means["explained"]
            scale = max(means.get("scale", abs(expected)), 1e-12)
            residual = means.get("gap", abs(expected - explained)) / scale
            meta["completeness"] = {"expected": expected, "explained": explained, "residual": residual}
        return NodeScores(values.float(), nodes, meta)

    def scored(size: int) -> NodeScores:
        if steps == "auto" and method.startswith("nap-ig"):
            return _until_settled(lambda n: once(n, size), tolerance)
        return once(1 if steps == "auto" else steps, size)

    scores = memory.run(scored, batch_size, model, pairs, nodes, "attribute", method=method)
    residual = scores.meta.get("completeness", {}).get("residual", 0.0)
    if residual > INCOMPLETE and steps != "auto":
        warnings.warn(
            f"{method} with {scores.meta['steps']} steps leaves {residual:.0%} of the metric's change unexplained "
            f"(see meta['completeness']): take more steps, or steps='auto'.",
            IntegrationWarning,
            stacklevel=2,
        )
    return scores


def _until_settled(once: Callable[[int], NodeScores], tolerance: float) -> NodeScores:
    scores = once(AUTO_STEPS[0])
    change = float("inf")
    for n in AUTO_STEPS[1:]:
        finer = once(n)
        change = float((finer.values - scores.values).abs().max() / finer.values.abs().max().clamp_min(1e-12))
        scores = finer
        scores.meta["settled"] = change
        if change <= tolerance:
            return scores
    warnings.warn(
        f"After {AUTO_STEPS[-1]} steps the scores still move by {change:.1%} of the largest one (tolerance "
        f"{tolerance:.1%}).",
        IntegrationWarning,
        stacklevel=5,
    )
    return scores


@dataclass
class _Result:
    """Sums over the examples of one batch."""

    scores: Float[Tensor, " node"]
    sums: dict[str, float]


@dataclass
class _Job:
    """One attribution: what every batch needs."""

    runner: Runner
    nodes: NodeSet
    metric: metrics.Metric
    method: str
    steps: int
    mlp_gradient: str
    accumulate: str
    batch_size: int
    share_prefix: bool
    two_columns: bool = False  #: the metric reads the logits of the two answers only
    done: Callable[[int], Any] = lambda n: None  #: told how many examples have gone through one more unit of work

    @property
    def units(self) -> int:
        """Steps of the progress bar for one example."""
        if self.method == "exact":
            return len(self.nodes)
        return {"nap": 1, "nap-ig-inputs": self.steps}.get(self.method, len(self.nodes.sites))

    def run(self, pairs: PromptPairs) -> _Result:
        batch = _Batch(self, pairs)
        if self.method in ("nap", "nap-ig-inputs"):
            return self._gradients(batch, 1 if self.method == "nap" else self.steps)
        if self.method == "nap-ig-activations":
            return self._all_paths(batch) if self.accumulate == "all" else self._paths(batch)
        return self._exact(batch)

    # --- nap and nap-ig-inputs -------------------------------------------------------------------------------

    def _gradients(self, batch: _Batch, steps: int) -> _Result:
        totals = torch.zeros(len(self.nodes), dtype=torch.float64)
        corrupt, corrupt_logits = batch.record("corrupt", also=INPUT_POINT)
        corrupt_embed = corrupt[INPUT_POINT]
        deltas: Activations = {}

        def difference(site: Site, now: Tensor) -> None:
            # in place of the recorded activation, which nothing else needs: one cache, not two
            deltas[site.point] = now.detach() - corrupt.pop(site.point)

        def backward(taps: list[tuple[str, HookFunction]], start: Tensor | None, times: int) -> tuple[Tensor, ...]:
            """One pass from the embedding ``start`` (None: its own), and back: embedding, gradient, logits, metric."""
            leaves: list[Tensor] = []

            def embed(now: Tensor) -> Tensor:
                leaves.append((now if start is None else start).detach().clone().requires_grad_(True))
                return leaves[0]

            with torch.enable_grad():
                logits = batch.run([(INPUT_POINT, embed), *taps, *self._gradient_taps(deltas, totals)], times=times)
                values = batch.values(logits, logits.detach() if clean_logits is None else clean_logits, times)
                (gradient,) = torch.autograd.grad(values.sum(), leaves)
            return leaves[0].detach(), gradient, logits.detach(), values.detach()

        # The last step is the clean run, so it goes first: the differences are read off it.
        clean_logits: Tensor | None = None
        read: list[tuple[str, HookFunction]]
        read = [(site.point, partial(difference, site)) for site in self.nodes.sites]
        clean_embed, gradient, clean_logits, values = backward(read, None, 1)
        clean_value = float(values.sum(dtype=torch.float64))
        change = clean_embed.float() - corrupt_embed.float()
        input_score = float((change * gradient.float()).sum(dtype=torch.float64))
        self.done(len(batch))
        for fractions in batch.chunks([k / steps for k in range(steps - 1, 0, -1)]):
            start = torch.cat([torch.lerp(corrupt_embed, clean_embed, fraction) for fraction in fractions])
            _, gradient, _, _ = backward([], start, len(fractions))
            input_score += float((change * _summed(gradient.float(), len(change))).sum(dtype=torch.float64))
            self.done(len(batch) * len(fractions))
        totals /= steps
        sums = {"clean": clean_value, "corrupt": batch.total(corrupt_logits, clean_logits)}
        if self.method == "nap-ig-inputs":
            sums |= {"expected": clean_value - sums["corrupt"], "explained": input_score / steps}
        return _Result(totals, sums)

    def _gradient_taps(self, deltas: Activations, totals: Tensor) -> list[tuple[str, HookFunction]]:
        """Hooks that add Δ·gradient to ``totals`` while the gradient passes by, so that no gradient is kept."""

        def tap(site: Site, sign: float, now: Tensor) -> Tensor:
            # A view of our own: a hook on the tensor itself could fire for the parts of several users of it.
            now = now.view_as(now)
            now.register_hook(lambda gradient: self._add(totals, site, deltas[site.point], sign * gradient))
            return now

        return [
            (point, partial(tap, site, sign))
            for site in self.nodes.sites
            for point, sign in self._gradient_points(site)
        ]

    def _gradient_points(self, site: Site) -> list[tuple[str, float]]:
        """Where a site's gradient is read, and with which sign it counts."""
        if self.mlp_gradient == "output" or self.nodes[site.positions[0]].kind != "mlp":
            return [(site.point, 1.0)]
        block = site.point.removesuffix(".hook_mlp_out")
        return self.runner.backend.mlp_input_gradient(block)

    def _add(self, totals: Tensor, site: Site, delta: Tensor, gradient: Tensor) -> None:
        """Add Σ Δ·gradient over examples, positions and width to each node of a site.

        Padding needs no care here: attention is causal and the padding is on the right, so the gradient of anything
        read at the last real token is exactly zero there.
        """
        product = delta.float() * _summed(gradient.float(), len(delta))
        if site.axis is None:
            part = product.sum(dtype=torch.float64)[None]
        else:
            others = [axis for axis in range(product.ndim) if axis != site.axis]
            part = product.sum(others, dtype=torch.float64)
            if site.by_position:
                part = torch.nn.functional.pad(part, (0, (site.size or 0) - len(part)))
            part = part[list(site.slices)]
        totals[list(site.positions)] += part.cpu()

    # --- nap-ig-activations ----------------------------------------------------------------------------------

    def _paths(self, batch: _Batch) -> _Result:
        totals = torch.zeros(len(self.nodes), dtype=torch.float64)
        corrupt, corrupt_logits = batch.record("corrupt")
        deltas, clean_logits = batch.record("clean", streams=batch.restarts)
        for point in deltas:  # in place of the clean activations, which nothing else needs
            deltas[point] -= corrupt[point]
        clean_value = batch.total(clean_logits, clean_logits)
        sums = {"clean": clean_value, "corrupt": batch.total(corrupt_logits, clean_logits)}
        sums |= {"expected": 0.0, "explained": 0.0, "gap": 0.0, "scale": 0.0}
        for site in self.nodes.sites:
            before = totals.clone()
            for fractions in batch.chunks([k / self.steps for k in range(1, self.steps + 1)]):
                self._path(batch, site, fractions, corrupt[site.point], deltas[site.point], clean_logits, totals)
            if len(site.positions) == (site.size or 1):  # the whole group is scored: its scores must add up
                group = NodeSet(self.nodes[position] for position in site.positions)
                off = torch.zeros(1, len(group), dtype=torch.float32)
                effect = clean_value - float(batch.ablated(group, off, corrupt, clean_logits).sum())
                explained = float((totals - before)[list(site.positions)].sum()) / self.steps
                sums["expected"] += effect
                sums["explained"] += explained
                sums["gap"] += abs(effect - explained)
                sums["scale"] += abs(effect)
            self.done(len(batch))
        return _Result(totals / self.steps, sums)

    def _path(
        self,
        batch: _Batch,
        site: Site,
        fractions: list[float],
        corrupt: Tensor,
        delta: Tensor,
        clean_logits: Tensor,
        totals: Tensor,
    ) -> None:
        """The gradient at some places of one site's path, in one pass that begins at the site's block."""
        leaves: list[Tensor] = []

        def function(now: Tensor) -> Tensor:
            hooks.check_site(site, now)
            places = torch.cat([corrupt + fraction * delta for fraction in fractions])
            leaves.append(places.requires_grad_(True))
            return leaves[0]

        with torch.enable_grad():
            logits = batch.run([(site.point, function)], times=len(fractions), layer=site.layer)
            values = batch.values(logits, clean_logits, len(fractions))
            (gradient,) = torch.autograd.grad(values.sum(), leaves)
        self._add(totals, site, delta, gradient)

    def _all_paths(self, batch: _Batch) -> _Result:
        """As released: on every pass of every group's path, the embedding's among them, every node's Δ·gradient is
        added up; the mean over all passes."""
        totals = torch.zeros(len(self.nodes), dtype=torch.float64)
        corrupt, corrupt_logits = batch.record("corrupt", also=INPUT_POINT)
        clean, clean_logits = batch.record("clean", also=INPUT_POINT)
        deltas = {point: clean[point] - corrupt[point] for point in clean}
        for point in clean:
            for k in range(1, self.steps + 1):
                leaves: dict[str, Tensor] = {}

                def embed(now: Tensor, leaves: dict[str, Tensor] = leaves) -> Tensor:
                    leaves["embed"] = now.detach().clone().requires_grad_(True)
                    return leaves["embed"]

                def move(now: Tensor, point: str = point, fraction: float = k / self.steps) -> Tensor:
                    # keeps `now` in the graph at weight 0, so that every node has a gradient
                    return corrupt[point] + fraction * deltas[point] + 0 * now

                taps: list[tuple[str, HookFunction]] = [(INPUT_POINT, embed), (point, move)]
                with torch.enable_grad():
                    logits = batch.run([*taps, *self._gradient_taps(deltas, totals)])
                    values = batch.values(logits, clean_logits)
                    torch.autograd.grad(values.sum(), [leaves["embed"]])
            if point != INPUT_POINT:
                self.done(len(batch))
        names = {"clean": clean_logits, "corrupt": corrupt_logits}
        sums = {name: batch.total(logits, clean_logits) for name, logits in names.items()}
        return _Result(totals / (len(clean) * self.steps), sums)

    # --- exact -----------------------------------------------------------------------------------------------

    def _exact(self, batch: _Batch) -> _Result:
        corrupt, corrupt_logits = batch.record("corrupt")
        _, clean_logits = batch.record("clean", nodes=False, streams=batch.restarts)
        clean = batch.total(clean_logits, clean_logits)
        effects = torch.zeros(len(self.nodes), dtype=torch.float64)
        for _, same_layer in groupby(range(len(self.nodes)), key=lambda position: self.nodes[position].layer):
            for some in batch.chunks(list(same_layer)):
                off = 1 - torch.eye(len(some), dtype=torch.float32)
                effects[some] = clean - batch.ablated(self.nodes[some], off, corrupt, clean_logits)
                self.done(len(batch) * len(some))
        return _Result(effects, {"clean": clean, "corrupt": batch.total(corrupt_logits, clean_logits)})


def _summed(gradient: Tensor, batch: int) -> Tensor:
    """The sum over several passes of a batch that were made in one."""
    return gradient if len(gradient) == batch else gradient.unflatten(0, (-1, batch)).sum(0)


class _Batch(PairedRun):
    """Some of the pairs, how the model is run on them, and the metric of what comes out."""

    def __init__(self, job: _Job, pairs: PromptPairs) -> None:
        two = torch.stack([pairs.answer, pairs.wrong], 1) if job.two_columns else None
        super().__init__(job.runner, pairs, job.nodes, share_prefix=job.share_prefix, columns=two)
        self.metric, self.labels = job.metric, pairs
        self.room = max(1, job.batch_size // len(pairs))  # how often the batch fits into one pass
        if job.two_columns:
            first = torch.zeros_like(pairs.answer)
            self.labels = replace(pairs, answer=first, wrong=first + 1, choices=None, corrupt_choices=None)

    @property
    def restarts(self) -> list[int]:
        """The blocks that passes may begin at: those with nodes, but for the first."""
        assert self.nodes is not None
        if not self.runner.allows("start", self.pairs.clean.shape[1]):
            return []
        return self.runner.restarts(self.nodes)

    def chunks(self, items: list[Any]) -> list[list[Any]]:
        """As many at a time as fit into one pass."""
        return [items[first : first + self.room] for first in range(0, len(items), self.room)]

    def values(self, logits: Tensor, clean_logits: Tensor, times: int = 1) -> Float[Tensor, " row"]:
        """The metric of every row."""
        labels = self.labels
        if times > 1:
            labels = labels[torch.arange(len(labels)).repeat(times)]
            clean_logits = clean_logits.repeat(times, 1)
        return self.metric(logits, labels, clean_logits)

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
