"""What a run is measured by: one number per example, from the logits at the answer position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.registry import Registry
from dfa_lens.errors import DfaError, short

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
    return -divergence(clean_logits.float().log_softmax(-1), logits.float().log_softmax(-1))


def divergence(
    log_p_clean: Float[Tensor, "*example vocab"], log_p: Float[Tensor, "*example vocab"]
) -> Float[Tensor, "*example"]:
    """KL(P_clean ‖ P) in nats, from log probabilities."""
    return torch.nn.functional.kl_div(log_p, log_p_clean, reduction="none", log_target=True).sum(-1)


METRICS: Registry[Metric] = Registry(
    "metric",
    entries={
        "logit-difference": logit_difference,
        "probability-difference": probability_difference,
        "log-probability-difference": log_probability_difference,
        "kl": negative_kl,
    },
)
"""The metrics by name; add one of your own by ``register``, or hand the function in."""


def reads_two_columns(metric: str | Callable[..., Any]) -> bool:
    """Whether a metric reads the logits of the answer and of the wrong answer, and no others."""
    return metric in ("logit-difference", logit_difference)


def needs_clean(metric: str | Callable[..., Any]) -> bool:
    """Whether a metric compares with the clean run's logits."""
    return metric in ("kl", negative_kl)


def checked(metric: str | Callable[..., Any]) -> Metric:
    """The metric of that name, or the user's own function; either with its result checked.

    A function takes (logits [batch, vocab], pairs) and returns [batch].
    """
    named = METRICS.find(metric) if isinstance(metric, str) else None
    if not isinstance(metric, str) and not callable(metric):
        raise DfaError(f"A metric is a name or a function of (logits, pairs), not {short(repr(metric))}.")

    def values_of(logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:
        own = not isinstance(metric, str)
        values = metric(logits, pairs) if own else named(logits, pairs, clean_logits)  # type: ignore[operator, misc]
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

    return values_of


def name_of(metric: str | Callable[..., Any]) -> str:
    """A metric's name, for provenance."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
