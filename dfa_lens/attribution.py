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
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens import adapter, hooks, metrics
from dfa_lens.adapter import HookedModel, HookFunction
from dfa_lens.errors import DfaError, unknown
from dfa_lens.hooks import Activations
from dfa_lens.nodes import INPUT_POINT, NodeSet, Site
from dfa_lens.prompts import PromptPairs
from dfa_lens.scores import NodeScores

logger = logging.getLogger(__name__)

Method = Literal["nap", "nap-ig-inputs", "nap-ig-activations", "exact"]
"""The attribution methods; see the module's text for their equations."""

#: Above this part of m(clean) - m(corrupt) left unexplained, the integration steps are called too few.
INCOMPLETE = 0.25
#: ``steps="auto"`` starts here, doubles, and gives up (with a warning) beyond the last.
AUTO_STEPS = (5, 10, 20, 40, 80)


class IntegrationWarning(UserWarning):
    """The integration steps are too few for the scores to mean what they promise."""


def attribute(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    method: Method = "nap-ig-inputs",
    steps: int | Literal["auto"] = 5,
    nodes: NodeSet | None = None,
    metric: str | Callable[..., Tensor] | None = None,
    batch_size: int = 16,
    progress: bool = False,
    mlp_gradient: Literal["output", "input"] = "output",
    accumulate: Literal["own", "all"] = "own",
    tolerance: float = 0.02,
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
        See :class:`~dfa_lens.prompts.PromptPairs`; default: that of ``pairs``, the logit difference.
    batch_size:
        Examples a pass. Changes memory and time, never the scores.
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
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(model)
    chosen = pairs.metric if metric is None else metric
    pairs.require(d_vocab=int(model.cfg.d_vocab), n_ctx=model.cfg.n_ctx)
    adapter.check_points(model, nodes.points)

    def once(n: int) -> NodeScores:
        job = _Job(model, nodes, metrics.resolve(chosen), method, n, mlp_gradient, accumulate)
        totals = torch.zeros(len(nodes), dtype=torch.float64)
        sums: dict[str, float] = {}
        with adapter.frozen(model), tqdm(total=len(pairs), desc=method, unit="pair", disable=not progress) as bar:
            for _, batch in pairs.batches(batch_size):
                result = job.run(batch)
                totals += result.scores
                for key, value in result.sums.items():
                    sums[key] = sums.get(key, 0.0) + value
                bar.update(len(batch))
        values = totals / len(pairs)
        means = {key: value / len(pairs) for key, value in sums.items()}
        meta: dict[str, Any] = {
            "method": method,
            "metric": metrics.name_of(chosen),
            "examples": len(pairs),
            "model": str(getattr(model.cfg, "model_name", "")),
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

    if steps == "auto" and method.startswith("nap-ig"):
        scores = _until_settled(once, tolerance)
    else:
        scores = once(1 if steps == "auto" else steps)
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
        stacklevel=3,
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

    model: HookedModel
    nodes: NodeSet
    metric: metrics.Metric
    method: str
    steps: int
    mlp_gradient: str
    accumulate: str

    def run(self, batch: PromptPairs) -> _Result:
        if self.method in ("nap", "nap-ig-inputs"):
            return self._gradients(batch, 1 if self.method == "nap" else self.steps)
        if self.method == "nap-ig-activations":
            return self._all_paths(batch) if self.accumulate == "all" else self._paths(batch)
        return self._exact(batch)

    # --- nap and nap-ig-inputs -------------------------------------------------------------------------------

    def _gradients(self, batch: PromptPairs, steps: int) -> _Result:
        totals = torch.zeros(len(self.nodes), dtype=torch.float64)
        corrupt, corrupt_logits = self._record(batch, "corrupt", also=INPUT_POINT)
        corrupt_embed = corrupt[INPUT_POINT]
        deltas: Activations = {}
        seen: dict[str, Tensor] = {}  # of the clean run: embedding, logits
        clean_value = input_score = 0.0

        def read_clean_embedding(now: Tensor) -> None:
            seen["embed"] = now.detach().clone()

        def difference(site: Site, now: Tensor) -> None:
            # in place of the recorded activation, which nothing else needs: one cache, not two
            deltas[site.point] = now.detach() - corrupt.pop(site.point)

        # The last step is the clean run, so it goes first: the differences are read off it.
        for k in range(steps, 0, -1):
            leaves: dict[str, Tensor] = {}

            def embed(now: Tensor, k: int = k, leaves: dict[str, Tensor] = leaves) -> Tensor:
                leaf = now if k == steps else torch.lerp(corrupt_embed, seen["embed"], k / steps)
                leaves["embed"] = leaf.detach().clone().requires_grad_(True)
                return leaves["embed"]

            taps: list[tuple[str, HookFunction]] = [(INPUT_POINT, embed)]
            if k == steps:
                taps = [(INPUT_POINT, read_clean_embedding), *taps]
                taps += [(site.point, partial(difference, site)) for site in self.nodes.sites]
            taps += self._gradient_taps(deltas, totals)
            with torch.enable_grad():
                logits = adapter.run(self.model, batch.clean, batch.lengths, taps)
                clean_logits = seen.setdefault("logits", logits.detach())
                values = self.metric(logits, batch, clean_logits)
                (gradient,) = torch.autograd.grad(values.sum(), [leaves["embed"]])
            if k == steps:
                clean_value = float(values.detach().sum(dtype=torch.float64))
            delta = seen["embed"].float() - corrupt_embed.float()
            input_score += float((delta * gradient.float()).sum(dtype=torch.float64))
        totals /= steps
        corrupt_value = self._total(corrupt_logits, batch, seen["logits"])
        sums = {"clean": clean_value, "corrupt": corrupt_value}
        if self.method == "nap-ig-inputs":
            sums |= {"expected": clean_value - corrupt_value, "explained": input_score / steps}
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
        """Where a site's gradient is read, and with which sign it counts.

        The gradient at an MLP's input needs no flag: it is that of the stream before it, less what skips the MLP.
        """
        if self.mlp_gradient == "output" or self.nodes[site.positions[0]].kind != "mlp":
            return [(site.point, 1.0)]
        block = site.point.removesuffix(".hook_mlp_out")
        if adapter.is_bridge(self.model):
            return [(f"{block}.ln2.hook_in", 1.0)]
        return [(f"{block}.hook_resid_mid", 1.0), (f"{block}.hook_resid_post", -1.0)]

    def _add(self, totals: Tensor, site: Site, delta: Tensor, gradient: Tensor) -> None:
        """Add Σ Δ·gradient over examples, positions and width to each node of a site.

        Padding needs no care here: attention is causal and the padding is on the right, so the gradient of anything
        read at the last real token is exactly zero there.
        """
        product = delta.float() * gradient.float()
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

    def _paths(self, batch: PromptPairs) -> _Result:
        totals = torch.zeros(len(self.nodes), dtype=torch.float64)
        corrupt, corrupt_logits = self._record(batch, "corrupt")
        clean, clean_logits = self._record(batch, "clean")
        deltas = {point: clean[point] - corrupt[point] for point in clean}
        clean_value = self._total(clean_logits, batch, clean_logits)
        sums = {"clean": clean_value, "corrupt": self._total(corrupt_logits, batch, clean_logits)}
        sums |= {"expected": 0.0, "explained": 0.0, "gap": 0.0, "scale": 0.0}
        for site in self.nodes.sites:
            before = totals.clone()
            for k in range(1, self.steps + 1):
                self._one_path_step(batch, site, k / self.steps, corrupt, deltas, clean_logits, totals)
            if len(site.positions) == (site.size or 1):  # the whole group is scored: its scores must add up
                group = NodeSet(self.nodes[position] for position in site.positions)
                effect = clean_value - self._ablated(group, batch, corrupt, clean_logits)
                explained = float((totals - before)[list(site.positions)].sum()) / self.steps
                sums["expected"] += effect
                sums["explained"] += explained
                sums["gap"] += abs(effect - explained)
                sums["scale"] += abs(effect)
        return _Result(totals / self.steps, sums)

    def _one_path_step(
        self,
        batch: PromptPairs,
        site: Site,
        fraction: float,
        corrupt: Activations,
        deltas: Activations,
        clean_logits: Tensor,
        totals: Tensor,
    ) -> None:
        leaves: dict[str, Tensor] = {}

        def function(now: Tensor) -> Tensor:
            hooks.check_site(site, now)
            leaves["at"] = (corrupt[site.point] + fraction * deltas[site.point]).requires_grad_(True)
            return leaves["at"]

        with torch.enable_grad():
            logits = adapter.run(self.model, batch.clean, batch.lengths, [(site.point, function)])
            values = self.metric(logits, batch, clean_logits)
            (gradient,) = torch.autograd.grad(values.sum(), [leaves["at"]])
        self._add(totals, site, deltas[site.point], gradient)

    def _all_paths(self, batch: PromptPairs) -> _Result:
        """As released: on every pass of every group's path, the embedding's among them, every node's Δ·gradient is
        added up; the mean over all passes."""
        totals = torch.zeros(len(self.nodes), dtype=torch.float64)
        corrupt, corrupt_logits = self._record(batch, "corrupt", also=INPUT_POINT)
        clean, clean_logits = self._record(batch, "clean", also=INPUT_POINT)
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
                    logits = adapter.run(
                        self.model, batch.clean, batch.lengths, [*taps, *self._gradient_taps(deltas, totals)]
                    )
                    values = self.metric(logits, batch, clean_logits)
                    torch.autograd.grad(values.sum(), [leaves["embed"]])
        names = {"clean": clean_logits, "corrupt": corrupt_logits}
        sums = {name: self._total(logits, batch, clean_logits) for name, logits in names.items()}
        return _Result(totals / (len(clean) * self.steps), sums)

    # --- exact -----------------------------------------------------------------------------------------------

    def _exact(self, batch: PromptPairs) -> _Result:
        corrupt, corrupt_logits = self._record(batch, "corrupt")
        with torch.no_grad():
            clean_logits = adapter.run(self.model, batch.clean, batch.lengths)
        clean = self._total(clean_logits, batch, clean_logits)
        effects = [clean - self._ablated(NodeSet([node]), batch, corrupt, clean_logits) for node in self.nodes]
        sums = {"clean": clean, "corrupt": self._total(corrupt_logits, batch, clean_logits)}
        return _Result(torch.tensor(effects, dtype=torch.float64), sums)

    # --- shared ----------------------------------------------------------------------------------------------

    def _record(
        self, batch: PromptPairs, which: Literal["clean", "corrupt"], *, also: str | None = None
    ) -> tuple[Activations, Tensor]:
        into: Activations = {}
        corrupt = which == "corrupt"
        tokens, lengths = (batch.corrupt, batch.corrupt_lengths) if corrupt else (batch.clean, batch.lengths)
        taps = hooks.record_hooks(self.nodes, into)
        if also is not None and also not in {site.point for site in self.nodes.sites}:
            taps.append((also, lambda now: into.__setitem__(also, now.detach().clone())))
        with torch.no_grad():
            logits = adapter.run(self.model, tokens, lengths, taps)
        return into, logits

    def _total(self, logits: Tensor, batch: PromptPairs, clean_logits: Tensor) -> float:
        """The metric summed over the batch."""
        return float(self.metric(logits, batch, clean_logits).sum(dtype=torch.float64))

    def _ablated(self, nodes: NodeSet, batch: PromptPairs, corrupt: Activations, clean_logits: Tensor) -> float:
        """The metric summed over the batch, of the clean run with ``nodes`` at their corrupt activations."""
        gates = hooks.gate_hooks(nodes, torch.zeros(len(nodes)), corrupt=corrupt)
        with torch.no_grad():
            return self._total(adapter.run(self.model, batch.clean, batch.lengths, gates), batch, clean_logits)
