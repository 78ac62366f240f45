"""estimate: what a run needs, before it is started: weights, caches, memory for gradients, forward passes.

Nothing is assumed about the architecture: the model itself runs on prompts of the longest prompt's length, with
gradients on two examples at most, and what it kept and used there tells what a run needs.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfa_lens.attribution.attribute import Method
from dfa_lens.data.nodes import INPUT_POINT, NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import DfaError
from dfa_lens.evaluation.faithfulness import default_sizes
from dfa_lens.models import backend, hooks
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.runner import WORTH_LAYING_OUT, Runner
from dfa_lens.transfer.trainer import Cache


@dataclass(frozen=True)
class Need:
    """What one operation needs.

    Attributes
    ----------
    operation:
        "attribute", "fit" or "faithfulness_curve".
    forward, backward:
        Examples that pass forward and backward through the model. Gradients reach activations only, so a backward
        pass costs about as much as a forward pass. A pass that begins at a later block, or after tokens that clean
        and corrupt prompts share, is counted as a whole one: these are upper limits.
    cache_bytes:
        Recorded activations and logits that are kept at one time.
    gradient_bytes:
        What autograd keeps of one batch until its backward pass.
    working_bytes:
        What comes and goes within a pass.
    """

    operation: str
    forward: int
    backward: int
    cache_bytes: int
    gradient_bytes: int
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Most memory beyond the weights at any time."""
        return self.cache_bytes + self.gradient_bytes + self.working_bytes

    @property
    def forward_equivalents(self) -> int:
        """Forward passes of one example, a backward pass counted as one."""
        return self.forward + self.backward


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
    batch_size: int = 16,
    method: Method = "nap-ig-inputs",
    steps: int = 5,
    fit_steps: int = 200,
    sizes: int | None = None,
    cache: Cache = "device",
    together: int = 1,
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
    batch_size, method, steps:
        As for :func:`~dfa_lens.attribution.attribute.attribute`; the batch size also as for the other two.
    fit_steps, cache:
        ``steps`` and ``cache`` of :func:`~dfa_lens.transfer.trainer.fit`, with the default intervention.
    sizes:
        How many circuit sizes the curve runs; default: those of
        :func:`~dfa_lens.evaluation.faithfulness.faithfulness_curve`.
    together:
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
    """
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(model)
    if batch_size < 1:
        raise DfaError(f"batch_size must be at least 1, not {batch_size}.")
    if together < 1:
        raise DfaError(f"together must be at least 1, not {together}.")
    Runner(model).check_points(nodes.points)
    parameters = {p.data_ptr() if p.device.type != "meta" else id(p): p for p in model.parameters()}.values()

    n, width = len(pairs), int(pairs.longest.max())
    batch = min(batch_size, n)
    probe = _Probe(model, nodes, width)
    site_bytes = probe.cache_bytes()  # of one example, all sites
    embed_bytes = probe.cache_bytes([INPUT_POINT])
    logit_bytes = 4 * int(model.cfg.d_vocab)
    working = probe.working_bytes(batch)
    graph_bytes = probe.gradient_bytes(batch) if method != "exact" else 0  # exact takes no gradient

    forward, backward = (n * passes for passes in attribution_passes(nodes, method, steps))
    streams = len({node.layer for node in nodes if node.layer > 0}) * embed_bytes  # where later passes begin
    held = {"nap-ig-activations": batch * (2 * site_bytes + streams), "exact": batch * (site_bytes + streams)}
    held_by_attribute = held.get(method, batch * (site_bytes + 2 * embed_bytes))
    attribute = (forward, backward, held_by_attribute, graph_bytes, working)

    kept = {"device": n * (site_bytes + logit_bytes), "cpu": n * logit_bytes, "recompute": 0}[cache]
    one_batch = batch * (site_bytes + logit_bytes)
    again = 2 * batch * fit_steps if cache == "recompute" else 2 * n
    gated_bytes = probe.gradient_bytes(batch, gated=True)
    fit = (again + batch * fit_steps, batch * fit_steps, kept + one_batch, gated_bytes, working)

    n_sizes = len(default_sizes(len(nodes))) if sizes is None else sizes
    held_by_curve = batch * (site_bytes + streams + 3 * logit_bytes)
    share = min(together, n_sizes)
    if share > 1:  # no pass begins at a later block, and the corrupt activations are repeated
        repeated = share * one_batch
        held_by_curve = batch * (site_bytes + 2 * logit_bytes) + repeated
        # the next repetition is made before the last is let go
        working = max(probe.working_bytes(share * batch), repeated)
    curve = (n * (1 + n_sizes), 0, held_by_curve, 0, working)

    return Estimate(
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        needs=tuple(
            Need(name, *numbers)
            for name, numbers in (("attribute", attribute), ("fit", fit), ("faithfulness_curve", curve))
        ),
    )


def attribution_passes(nodes: NodeSet, method: str, steps: int) -> tuple[int, int]:
    """Forward and backward passes of one example for its scores."""
    if method in ("nap", "nap-ig-inputs"):
        s = 1 if method == "nap" else steps
        return 1 + s, s
    if method == "nap-ig-activations":
        whole = sum(len(site.positions) == (site.size or 1) for site in nodes.sites)
        return 2 + len(nodes.sites) * steps + whole, len(nodes.sites) * steps
    return 2 + len(nodes), 0


class _Probe:
    """Runs a model on prompts of one length and watches its memory."""

    def __init__(self, model: HookedModel, nodes: NodeSet, width: int) -> None:
        self.runner, self.nodes, self.width = Runner(model), nodes, width

    def cache_bytes(self, names: Sequence[str] | None = None) -> int:
        """The activations at hook points for one example."""
        names = self.nodes.points if names is None else names
        bytes_per_value = self.runner.backend.dtype.itemsize
        total = 0
        for shape, axes in self.runner.layout(names).values():
            sizes = (self.width if axis in axes else size for axis, size in enumerate(shape) if axis > 0)
            total += math.prod(sizes) * bytes_per_value
        return total

    def gradient_bytes(self, batch: int, *, gated: bool = False) -> int:
        """What autograd keeps of one batch: under a soft mask, or with a gradient from the embedding on.

        From one and from two examples: everything that is kept is constant or in proportion to the examples.
        """
        one, two = self._kept(1, gated), self._kept(2, gated)
        return one + (batch - 1) * (two - one)

    def working_bytes(self, batch: int) -> int:
        """Most memory in use at one time during a gated pass without gradients."""
        tokens, lengths, corrupt, _ = self._recorded(batch)
        gates = hooks.gate_hooks(self.nodes, torch.full((len(self.nodes),), 0.5, dtype=torch.float32), corrupt=corrupt)
        with torch.no_grad(), self.runner.session(passes=WORTH_LAYING_OUT), _Live() as live:
            self.runner.run(tokens, lengths, gates)
        return live.peak

    def _kept(self, batch: int, gated: bool) -> int:
        model, nodes = self.runner.model, self.nodes
        tokens, lengths, corrupt, logits = self._recorded(batch)
        known: set[int] = set()
        kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            if _address(tensor) not in known:
                kept[_address(tensor)] = tensor
            return tensor

        def start(now: Tensor) -> Tensor:
            return now.detach().clone().requires_grad_(True)

        leaf = torch.full((len(nodes),), 0.5, dtype=torch.float32, requires_grad=True)
        taps = hooks.gate_hooks(nodes, leaf, corrupt=corrupt) if gated else [(INPUT_POINT, start)]
        session = self.runner.session(passes=WORTH_LAYING_OUT)
        with torch.enable_grad(), session, saved_tensors_hooks(keep, lambda tensor: tensor):
            permanent = [*model.parameters(), *getattr(model, "buffers", list)(), *corrupt.values(), logits]
            known.update(_address(tensor) for tensor in permanent)
            out = self.runner.run(tokens, lengths, taps)
            if gated:
                log_p, log_p_clean = out.float().log_softmax(-1), logits.float().log_softmax(-1)
                torch.nn.functional.kl_div(log_p, log_p_clean, reduction="batchmean", log_target=True)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def _recorded(self, batch: int) -> tuple[Tensor, Tensor, hooks.Activations, Tensor]:
        tokens, lengths = torch.zeros(batch, self.width, dtype=torch.long), torch.full((batch,), self.width)
        corrupt: hooks.Activations = {}
        with torch.no_grad(), self.runner.session():
            logits = self.runner.run(tokens, lengths, hooks.record_hooks(self.nodes, corrupt))
        return tokens, lengths, corrupt, logits


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still there; ``peak`` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _address(leaf) not in given | self.seen:
                storage = leaf.untyped_storage()
                self.seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return out

    def _gone(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
