"""The sigmoid top-k: soft masks that hold exactly so many nodes, with a gradient in the scores that rank them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gates_of_size(
    scores: Float[Tensor, "example node"], sizes: Float[Tensor, " example"], sharpness: float
) -> Float[Tensor, "example node"]:
    """sigmoid((scores − b)/sharpness), with b for each example such that the gates add up to its size.

    The gradient takes into account that b moves with the scores: adding a constant to all scores changes nothing.
    """
    with torch.no_grad():
        low, high = scores.amin(1) - 20 * sharpness, scores.amax(1) + 20 * sharpness
        for _ in range(50):  # halving, to the last bit
            middle = (low + high) / 2
            over = torch.sigmoid((scores - middle[:, None]) / sharpness).sum(1) > sizes
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        shift = (low + high) / 2
        gates = torch.sigmoid((scores - shift[:, None]) / sharpness)
        slope = gates * (1 - gates)
        slope = slope / slope.sum(1, keepdim=True).clamp_min(1e-12)  # ∂b/∂score
    moved = (slope * scores).sum(1)
    return torch.sigmoid((scores - (shift + moved - moved.detach())[:, None]) / sharpness)
