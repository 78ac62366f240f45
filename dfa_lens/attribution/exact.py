"""exact: every node set to its corrupt activation by itself, what the other methods approximate."""

from __future__ import annotations

from itertools import groupby
from typing import ClassVar

import torch

from dfa_lens.attribution.method import Batch, Method, Sums
from dfa_lens.data.nodes import NodeSet


class Exact(Method):
    """m(clean) - m(clean with this node at its corrupt activation)."""

    name: ClassVar[str] = "exact"
    differentiates: ClassVar[bool] = False

    def passes(self, nodes: NodeSet, steps: int) -> tuple[int, int]:  # noqa: D102
        return 2 + len(nodes), 0

    def units(self, nodes: NodeSet, steps: int) -> int:  # noqa: D102
        return len(nodes)

    def score(self, batch: Batch) -> Sums:  # noqa: D102
        nodes = batch.measurement.nodes
        corrupt, corrupt_logits = batch.record("corrupt")
        _, clean_logits = batch.record("clean", nodes=False, streams=batch.restarts)
        clean = batch.total(clean_logits, clean_logits)
        effects = batch.empty_scores()
        for _, same_layer in groupby(range(len(nodes)), key=lambda position: nodes[position].layer):
            for some in batch.chunks(list(same_layer)):
                off = 1 - torch.eye(len(some), dtype=torch.float32)
                effects[some] = clean - batch.ablated(nodes[some], off, corrupt, clean_logits)
                batch.done(len(some))
        return Sums(effects, {"clean": clean, "corrupt": batch.total(corrupt_logits, clean_logits)})
