"""estimate: what a run needs, before it is started: weights, caches, memory for gradients, forward passes.

Nothing is assumed about the architecture: the model itself runs on prompts of the longest prompt's length, with
gradients on two examples at most, and what it kept and used there tells what a run needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfa_lens.attribution.attribute import METHODS
from dfa_lens.attribution.edges import EDGE_METHODS
from dfa_lens.data.curve import default_sizes
from dfa_lens.data.edges import EdgeSet
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import DfaError
from dfa_lens.evaluation.edge_circuits import need_of_edge_curve
from dfa_lens.evaluation.node_circuits import need_of_curve
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.runner import Runner
from dfa_lens.transfer.trainer import Cache


@dataclass(frozen=True, repr=False)
class Estimate:
    """What :func:`estimate` found: the weights, and a :class:`Need` per operation.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> dfa.estimate(model, pairs).needs[0].operation
    'attribute'
    """

    parameters: int
    parameter_bytes: int
    needs: tuple[Need, ...]

    def __getitem__(self, operation: str) -> Need:
        for need in self.needs:
            if need.operation == operation:
                return need
        raise DfaError(f"No operation {operation!r}; there are {', '.join(need.operation for need in self.needs)}.")

    def to_frame(self) -> Any:
        """A pandas table, a row per operation; bytes in GiB."""
        import pandas as pd

        gib = 2.0**30
        return pd.DataFrame(
            {
                "operation": need.operation,
                "forward": need.forward,
                "backward": need.backward,
                "weights_gib": self.parameter_bytes / gib,
                "cache_gib": need.cache_bytes / gib,
                "gradient_gib": need.gradient_bytes / gib,
                "peak_gib": (self.parameter_bytes + need.peak_bytes) / gib,
            }
            for need in self.needs
        )

    def __repr__(self) -> str:
        lines = [f"Estimate({self.parameters:,} parameters, {_size(self.parameter_bytes)}"]
        lines += [
            f"  {need.operation}: {need.forward:,} forward and {need.backward:,} backward passes of one example, "
            f"{_size(need.peak_bytes)} beside the weights"
            for need in self.needs
        ]
        return "\n".join(lines) + ")"


def _size(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} GiB"


@backend.runs("model")
def estimate(
    model: HookedModel,
    pairs: PromptPairs,
    nodes: NodeSet | None = None,
    *,
    edges: EdgeSet | None = None,
    batch_size: int = 16,
    method: str | None = None,
    steps: int = 5,
    fit_steps: int = 200,
    sizes: int | None = None,
    cache: Cache = "device",
    sizes_per_pass: int = 1,
    checkpointing: bool | None = None,
) -> Estimate:
    """What attribution, training and a faithfulness curve on these pairs would need.

    Parameters
    ----------
    model:
        Run a few times: with gradients on one and two examples, without on one batch.
    pairs:
        The prompts of one call. Only their number and lengths matter.
    nodes:
        Default: all heads and MLP blocks.
    edges:
        Ask about edges instead: about :func:`~dfa_lens.attribution.edges.attribute_edges` and the curve of such scores.
    batch_size, method, steps:
        As for :func:`~dfa_lens.attribution.attribute.attribute`, or of edges, with the default of each; the batch size
        also as for the other two. The product of all writers with all readers, less than one more forward pass, is
        not among the passes of edge methods.
    fit_steps, cache, checkpointing:
        ``steps``, ``cache`` and ``checkpointing`` of :func:`~dfa_lens.transfer.trainer.fit`, with the default
        intervention. Where weights are offloaded, attribution checkpoints by itself.
    sizes:
        How many circuit sizes the curve runs; default: those of
        :func:`~dfa_lens.evaluation.faithfulness.faithfulness_curve`.
    sizes_per_pass:
        How many of them share a pass, as for the curve.

    Returns
    -------
    Estimate
        Memory is that of a device that holds everything; what lies on the CPU with ``cache="cpu"`` is left out of
        ``cache_bytes``.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> dfa.estimate(model, pairs)["attribute"].forward_equivalents
    88
    >>> dfa.estimate(model, pairs, edges=dfa.EdgeSet.of_model(model), method="eap").needs[0].forward_equivalents
    24
    """
    if edges is not None and nodes is not None:
        raise DfaError("An estimate is about nodes or about edges, not both: give one of them.")
    nodes = edges.nodes if edges is not None else nodes
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(model)
    if batch_size < 1:
        raise DfaError(f"batch_size must be at least 1, not {batch_size}.")
    if sizes_per_pass < 1:
        raise DfaError(f"sizes_per_pass must be at least 1, not {sizes_per_pass}.")
    runner = Runner(model)
    runner.check_points(nodes.points)
    parameters = {p.data_ptr() if p.device.type != "meta" else id(p): p for p in model.parameters()}.values()
    n = len(pairs)
    batch = min(batch_size, n)
    footprint = Footprint(runner, nodes, int(pairs.longest.max()))
    trained = Footprint(runner, nodes, footprint.width, checkpointing=checkpointing)
    needs: tuple[Need, ...]
    if edges is None:
        scoring = METHODS.find(method or "nap-ig-inputs")
        n_sizes = len(default_sizes(len(nodes))) if sizes is None else sizes
        needs = (
            scoring.need(footprint, nodes, steps=steps, examples=n, batch=batch),
            _need_of_fit(trained, n, batch, fit_steps, cache),
            need_of_curve(footprint, n, batch, n_sizes, sizes_per_pass),
        )
    else:
        edge_scoring = EDGE_METHODS.find(method or "eap-ig-inputs")
        n_sizes = len(default_sizes(len(edges))) if sizes is None else sizes
        needs = (
            edge_scoring.need(footprint, edges, steps=steps if edge_scoring.integrates else 1, examples=n, batch=batch),
            need_of_edge_curve(footprint, n, batch, n_sizes),
        )
    return Estimate(
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        needs=needs,
    )


def _need_of_fit(footprint: Footprint, examples: int, batch: int, steps: int, cache: Cache) -> Need:
    one = footprint.site_bytes + footprint.logit_bytes
    kept = {"device": examples * one, "cpu": examples * footprint.logit_bytes, "recompute": 0}[cache]
    runs = 2 * batch * steps if cache == "recompute" else 2 * examples
    graph = footprint.gradient_bytes(batch, gated=True)
    working = footprint.working_bytes(batch)
    again = batch * steps if footprint.checkpointing else 0
    return Need("fit", runs + batch * steps + again, batch * steps, kept + batch * one, graph, working)
