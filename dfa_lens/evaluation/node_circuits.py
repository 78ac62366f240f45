"""Circuits of nodes: the clean run in which every node outside the circuit is at its corrupt activation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.data import metrics
from dfa_lens.data.nodes import INPUT, NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import ScoreError
from dfa_lens.evaluation.runs import Runs
from dfa_lens.models.ablations import Ablation, Corrupt
from dfa_lens.models.hooks import Activations
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner


def run_circuits(
    runner: Runner,
    pairs: PromptPairs,
    nodes: NodeSet,
    keep: Bool[Tensor, "size node"],
    with_input: Bool[Tensor, " size"],
    metric: metrics.Metric,
    *,
    batch_size: int,
    sizes_per_pass: int = 1,
    progress: bool = False,
    share_prefix: bool = True,
    keep_logits: bool = False,
    ablation: Ablation | None = None,
) -> Runs:
    """Run circuits on prompt pairs.

    Parameters
    ----------
    nodes:
        What is kept or corrupted: heads, MLP blocks, nodes of one's own; not the input.
    keep:
        [size, node] which nodes are in each circuit.
    with_input:
        [size] whether the embedding is clean; if not, no clean information enters.
    keep_logits:
        Also keep the logits of every circuit and of the whole model at the answer.
    ablation:
        What stands in the place of nodes that are left out; default: their corrupt activations.
    """
    n, n_sizes = len(pairs), len(keep)
    runs = Runs.empty(n_sizes, n, d_vocab=runner.d_vocab if keep_logits else 0)
    corrupted = ablation is None or isinstance(ablation, Corrupt)
    if not corrupted and not with_input.all():  # the embedding is left out as any other node is
        nodes, keep = NodeSet((INPUT, *nodes)), torch.cat([with_input[:, None], keep], 1)
        with_input = torch.ones_like(with_input)
    circuits = _Circuits(nodes, keep, sizes_per_pass)
    with (
        runner.session(passes=n_sizes),
        torch.no_grad(),
        tqdm(total=n * n_sizes, desc="curve", unit="run", disable=not progress) as bar,
    ):
        reference = None if ablation is None else ablation.reference(runner, nodes, pairs, batch_size=batch_size)
        for rows, batch in runner.batches(pairs, batch_size):
            run = PairedRun(runner, batch, nodes, share_prefix=share_prefix, reference=reference)
            _, clean_logits = run.record("clean", nodes=False, streams=circuits.restarts(run))
            corrupt, corrupt_logits = run.record("corrupt")
            runs.record_whole(rows, batch, metric, clean_logits, corrupt_logits)

            gated = []
            for i in range(n_sizes):
                if not with_input[i]:  # no clean information enters: exactly the corrupt run
                    runs.record(i, rows, batch, metric, corrupt_logits, clean_logits)
                elif keep[i].all():
                    runs.record(i, rows, batch, metric, clean_logits, clean_logits)
                else:
                    gated.append(i)
            bar.update(len(batch) * (n_sizes - len(gated)))
            for i, logits in circuits.run(gated, run, corrupt):
                runs.record(i, rows, batch, metric, logits, clean_logits)
                bar.update(len(batch))
            corrupt.clear()  # before the next batch is recorded: the gates of the last size still hold it
    return runs


def need_of_curve(footprint: Footprint, examples: int, batch: int, sizes: int, sizes_per_pass: int) -> Need:
    """What a curve needs: so many examples, sizes, and sizes that share a pass."""
    one = footprint.site_bytes + footprint.logit_bytes
    working = footprint.working_bytes(batch)
    held = batch * (one + footprint.stream_bytes + 2 * footprint.logit_bytes)
    share = min(sizes_per_pass, sizes)
    if share > 1:  # no pass begins at a later block, and the corrupt activations are repeated
        repeated = share * batch * one
        held = batch * (one + footprint.logit_bytes) + repeated
        # the next repetition is made before the last is let go
        working = max(footprint.working_bytes(share * batch), repeated)
    return Need("faithfulness_curve", examples * (1 + sizes), 0, held, 0, working)


class _Circuits:
    """Circuits of several sizes, and how they are run on a batch."""

    def __init__(self, nodes: NodeSet, keep: Bool[Tensor, "size node"], sizes_per_pass: int) -> None:
        self.nodes, self.keep, self.sizes_per_pass = nodes, keep, sizes_per_pass
        self.layers = torch.tensor([node.layer for node in nodes])
        self._from: dict[int | None, tuple[Bool[Tensor, " node"], NodeSet]] = {}

    def _met(self, layer: int | None) -> tuple[Bool[Tensor, " node"], NodeSet]:
        """The nodes that a pass beginning at a block meets (None: all), as a mask and as a set."""
        if layer not in self._from:
            met = self.layers >= layer if layer is not None else torch.ones(len(self.nodes), dtype=torch.bool)
            self._from[layer] = met, NodeSet(node for node, own in zip(self.nodes, met.tolist(), strict=True) if own)
        return self._from[layer]

    def restarts(self, run: PairedRun) -> list[int]:
        """The blocks that passes on a batch may begin at."""
        if self.sizes_per_pass > 1 or not run.runner.allows("start", run.pairs.clean.shape[1]):
            return []
        return run.runner.restarts(self.nodes)

    def run(
        self, sizes: list[int], on: PairedRun, corrupt: Activations
    ) -> Iterator[tuple[int, Float[Tensor, "example vocab"]]]:
        """The logits of each of ``sizes``, with its number."""
        if self.sizes_per_pass == 1:
            yield from self._downwards(sizes, on, corrupt)
            return
        for first in range(0, len(sizes), self.sizes_per_pass):
            group = sizes[first : first + self.sizes_per_pass]
            masks = self.keep[group].float().repeat_interleave(len(on), 0)
            logits = on.gated(self.nodes, masks, corrupt=corrupt)
            yield from zip(group, logits.split(len(on)), strict=True)

    def _downwards(
        self, sizes: list[int], on: PairedRun, corrupt: Activations
    ) -> Iterator[tuple[int, Float[Tensor, "example vocab"]]]:
        """From the clean run downwards: each circuit differs from the one before in a few nodes, and below the first
        of them nothing changes."""
        restarts = self.restarts(on)
        before = torch.ones_like(self.keep[0])
        for i in reversed(sizes):
            changed = self.layers[self.keep[i] != before]
            if len(changed):  # two sizes may be one circuit
                first = int(changed.min())
                # nodes behind the last block are reached from its beginning
                layer = max((each for each in restarts if each <= first), default=None)
                met, nodes = self._met(layer)
                logits = on.gated(
                    nodes,
                    self.keep[i][met].float(),
                    corrupt=corrupt,
                    layer=layer,
                    streams=[each for each in restarts if each > (layer or 0)],
                )
            yield i, logits
            before = self.keep[i]


def require_model(nodes: NodeSet, meta: Mapping[str, Any], model: Any) -> None:
    """Refuse the nodes of a smaller model with equally many heads, which all exist here, too.

    Any other foreign node set is found out when its hook points are looked up or cut. A subset of this model's own
    nodes is welcome.
    """
    own = NodeSet.heads_and_mlps(model, with_input=True)
    theirs = meta.get("target", meta.get("model", ""))
    ours = str(getattr(model.cfg, "model_name", ""))
    layers = nodes.n_layers
    whole = [node for node in own if node.layer < layers]
    if theirs and theirs != ours and layers < own.n_layers and list(nodes) in (whole, whole[1:]):
        raise ScoreError(
            f"The scores cover the first {layers} of this model's {own.n_layers} layers and come from {theirs!r}, not "
            f"from {ours!r}: they belong to another model."
        )
