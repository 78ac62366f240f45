"""Which scores are logits of a mask: those that an alignment trained under one gives."""

from __future__ import annotations

import numpy as np
import torch

from dfa_lens.data.scores import NodeScores


def mask_of(scores: NodeScores) -> np.ndarray | None:
    """The soft mask [node] of transferred scores; None of scores that mean how much a node helps.

    Told by their provenance: a trained alignment writes down the weight of its mask in the loss. Controls that carry
    scores over by a fixed map give scores again, not logits.
    """
    chain = scores.meta.get("chain")
    trained = chain[-1] if chain else scores.meta
    if scores.meta.get("method") != "transfer" or "sparsity_weight" not in trained:
        return None
    given = trained.get("temperature", 1.0)
    temperature = float(given[-1] if isinstance(given, (list, tuple)) else given)
    return torch.sigmoid(scores.values.double() / temperature).numpy()
