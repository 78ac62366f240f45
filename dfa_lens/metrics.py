"""What a run is measured by: one number per example, from the logits at the answer position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.errors import DfaError, short, unknown
from dfa_lens.prompts import PromptPairs

Metric = Callable[[Float[Tensor, "batch vocab"], PromptPairs, "Tensor | None"], Float[Tensor, " batch"]]
"""(logits at the last real token, the pairs, the clean run's logits) → one number per example."""


def _pick(values: Tensor, pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(pairs), device=values.device)
    return values[rows, pairs.answer.to(values.device)], values[rows, pairs.wrong.to(values.device)]


def logit_difference(logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:
    """logit(answer) - logit(wrong)."""
    right, wrong = _pick(logits, pairs)
    return right.float() - wrong.float()


def probability_difference(logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:
    """P(answer) - P(wrong), over the whole vocabulary."""
    right, wrong = _pick(logits.float().softmax(-1), pairs)
    return right - wrong


def log_probability_difference(logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:
    """log P(answer) - log P(wrong). Equal to the logit difference; kept because other tools name it so."""
    right, wrong = _pick(logits.float().log_softmax(-1), pairs)
    return right - wrong


def negative_kl(logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:
    """-KL(P_clean ‖ P): 0 at the clean run, lower the further the run is from it.

    Its gradient at the clean run is zero, so use it with a method that looks elsewhere as well
    (``nap-ig-inputs``, ``nap-ig-activations``, ``exact``), not with ``nap``.
    """
    if clean_logits is None:
        raise DfaError("The metric 'kl' needs the clean run's logits.")
    clean = clean_logits.float().log_softmax(-1)
    return -(clean.exp() * (clean - logits.float().log_softmax(-1))).sum(-1)


METRICS: dict[str, Metric] = {
    "logit-difference": logit_difference,
    "probability-difference": probability_difference,
    "log-probability-difference": log_probability_difference,
    "kl": negative_kl,
}

#: Those that read the logits of the answer and of the wrong answer, and no others.
TWO_COLUMNS = ("logit-difference",)


def resolve(metric: str | Callable[..., Any]) -> Metric:
    """The metric called ``metric``, or the user's own function; either with its result checked.

    A function takes (logits [batch, vocab], pairs) and returns [batch].
    """
    if isinstance(metric, str) and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if not isinstance(metric, str) and not callable(metric):
        raise DfaError(f"A metric is a name or a function of (logits, pairs), not {short(repr(metric))}.")

    def checked(logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:
        values = METRICS[metric](logits, pairs, clean_logits) if isinstance(metric, str) else metric(logits, pairs)
        if not isinstance(values, Tensor) or values.shape != (len(pairs),):
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise DfaError(f"The metric returned {shape}; one number per example, [{len(pairs)}], is needed.")
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).nonzero()[0])
            raise DfaError(
                f"The metric returned {values[bad].item()} for example {bad} of a batch: the model's logits overflow, "
                "or the metric does not suit them."
            )
        return values

    return checked


def name_of(metric: str | Callable[..., Any]) -> str:
    """A metric's name, for provenance."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
