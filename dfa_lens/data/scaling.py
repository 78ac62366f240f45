"""What is done to source scores before they are carried over."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.errors import AlignmentError, unknown

Scaling = Literal["unit", "raw", "rank", "signed-sqrt"]
"""What is done to source scores before they are carried over, in training and in every transfer.

- ``unit``: divided by their Euclidean length. Scores of one task and of another then weigh the same, and so does
  one model beside another.
- ``raw``: as they are (the paper).
- ``rank``: replaced by their ranks (ties share the mean rank), centred, then unit length.
- ``signed-sqrt``: sign(s)·√|s|, then unit length: a few very large scores weigh less.
"""


def scale(values: Float[Tensor, "*task score"], scaling: Scaling) -> Float[Tensor, "*task score"]:
    """Source scores made ready to be carried over.

    Raises
    ------
    AlignmentError
        If the scaling is unknown, or the scores are all zero (``rank``: all equal).

    Examples
    --------
    >>> import torch
    >>> from dfa_lens.data.scaling import scale
    >>> scale(torch.tensor([3.0, -4.0]), "unit").tolist()
    [0.6000000238418579, -0.800000011920929]
    """
    if scaling == "raw":
        return values
    if scaling not in get_args(Scaling):
        raise unknown("scaling", scaling, get_args(Scaling), AlignmentError)
    if scaling == "signed-sqrt":
        values = values.sign() * values.abs().sqrt()
    if scaling == "rank":
        values = values.contiguous()
        order = values.sort(-1).values
        below = torch.searchsorted(order, values)
        above = values.shape[-1] - torch.searchsorted(order, values, right=True)
        values = (below - above).to(values.dtype)  # twice the rank, centred; ties share the mean of theirs
    length = values.norm(dim=-1, keepdim=True)
    if (length == 0).any():
        what = "equal" if scaling == "rank" else "zero"
        raise AlignmentError(f"All source scores are {what}: they can't be scaled ({scaling!r}) and carry no ranking.")
    return values / length
