"""What curves over nodes and over edges share: the sizes of the circuits, and the runs written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.data import metrics
from dfa_lens.data.curve import MIB_FRACTIONS, Direction, FaithfulnessCurve, Protocol, default_sizes
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import Ranking
from dfa_lens.errors import FaithfulnessError


def grid(
    n: int, protocol: Protocol, sizes: Sequence[int] | None, fractions: Sequence[float] | None
) -> tuple[list[float], list[int]]:
    """The kept fractions and the sizes of the circuits.

    Raises
    ------
    FaithfulnessError
        If there are fewer than two sizes, or they do not rise between 0 and ``n``.
    """
    if sizes is not None and fractions is not None:
        raise FaithfulnessError("Give sizes or fractions, not both.")
    if fractions is None and protocol == "mib" and sizes is None:
        fractions = MIB_FRACTIONS
    if fractions is not None:
        kept = [float(fraction) for fraction in fractions]
        ks = [int(fraction * n) for fraction in kept]
    else:
        ks = [int(k) for k in (default_sizes(n) if sizes is None else sizes)]
        kept = [k / n for k in ks]
    if len(ks) < 2 or ks != sorted(ks) or min(ks) < 0 or max(ks) > n or len(set(kept)) < len(kept):
        raise FaithfulnessError(f"Sizes must be at least two, rising, and between 0 and {n}, not {ks}.")
    return kept, ks


def extra(protocol: Protocol, ks: Sequence[int]) -> int:
    """How many circuits are run before those of sizes ``ks``: the empty one, where it is not asked for.

    It gives the floor; in mib the corrupt run does.
    """
    return int(protocol == "nodes" and ks[0] > 0)


@dataclass
class Runs:
    """The metric of every run on every example, in the order of the examples; float64.

    Where they are asked for, also the logits at the answer, in float32: of the circuits and of the clean run.
    """

    clean: Float[Tensor, " example"]
    corrupt: Float[Tensor, " example"]
    circuits: Float[Tensor, "size example"]
    kl: Float[Tensor, "size example"]
    logits: Float[Tensor, "size example vocab"] | None = None
    clean_logits: Float[Tensor, "example vocab"] | None = None

    @classmethod
    def empty(cls, n_sizes: int, n: int, *, d_vocab: int = 0) -> Runs:
        """Zeros, to be written over; with room for so many logits of each example."""
        runs = cls(*(torch.zeros(shape, dtype=torch.float64) for shape in ((n,), (n,), (n_sizes, n), (n_sizes, n))))
        if d_vocab:
            runs.logits = torch.zeros(n_sizes, n, d_vocab, dtype=torch.float32)
            runs.clean_logits = torch.zeros(n, d_vocab, dtype=torch.float32)
        return runs

    def record_whole(
        self,
        rows: Int[Tensor, " example"],
        batch: PromptPairs,
        metric: metrics.Metric,
        clean: Float[Tensor, "example vocab"],
        corrupt: Float[Tensor, "example vocab"],
    ) -> None:
        """Write down what the whole model gives on the examples ``rows``, clean and corrupt."""
        self.clean[rows] = metric(clean, batch, clean).double().cpu()
        self.corrupt[rows] = metric(corrupt, batch, clean).double().cpu()
        if self.clean_logits is not None:
            self.clean_logits[rows] = clean.float().cpu()

    def record(
        self,
        i: int,
        rows: Int[Tensor, " example"],
        batch: PromptPairs,
        metric: metrics.Metric,
        logits: Float[Tensor, "example vocab"],
        clean: Float[Tensor, "example vocab"],
    ) -> None:
        """Write down what the circuit of size number ``i`` gives on the examples ``rows``."""
        self.circuits[i, rows] = metric(logits, batch, clean).double().cpu()
        log_p_clean, log_p = clean.float().log_softmax(-1), logits.float().log_softmax(-1)
        self.kl[i, rows] = metrics.divergence(log_p_clean, log_p).double().cpu()
        if self.logits is not None:
            self.logits[i, rows] = logits.float().cpu()

    def curve(
        self,
        kept: Sequence[float],
        ks: Sequence[int],
        *,
        added: int,
        protocol: Protocol,
        ranking: Ranking,
        n: int,
        ablation: str = "corrupt",
        direction: Direction = "denoising",
    ) -> FaithfulnessCurve:
        """The curve of circuits of ``ks`` of ``n`` nodes, parts ``kept``; the first ``added`` circuits are not its.

        Raises
        ------
        FaithfulnessError
            If the clean and the corrupt run have the same mean metric.
        """
        require_gap(float(self.clean.mean()), float(self.corrupt.mean()))
        empty = self.circuits[0] if protocol == "nodes" else self.corrupt
        if direction == "noising":  # nothing is destroyed
            empty = self.clean
        return FaithfulnessCurve(
            fractions=np.asarray(kept, dtype=np.float64),
            sizes=np.asarray(ks),
            per_example=self.circuits[added:].numpy(),
            clean_values=self.clean.numpy(),
            corrupt_values=self.corrupt.numpy(),
            kl=self.kl[added:].numpy().mean(1),
            protocol=protocol,
            ranking=ranking,
            n_nodes=n,
            empty_values=empty.numpy(),
            kl_per_example=self.kl[added:].numpy(),
            ablation=ablation,
            direction=direction,
        )


def require_gap(clean: float, corrupt: float) -> None:
    """A :class:`~dfa_lens.errors.FaithfulnessError` if the clean and the corrupt run have the same mean metric."""
    if not abs(clean - corrupt) > 1e-9 * max(abs(clean), abs(corrupt), 1e-30):
        raise FaithfulnessError(
            f"The clean and the corrupt run have the same mean metric ({clean:.6g} and {corrupt:.6g}): "
            "faithfulness is not defined on these pairs."
        )
