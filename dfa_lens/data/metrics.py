"""What a run is measured by: one number per example, from the logits at the answer position.

A metric is a small object that is called with the logits [example, vocab], the prompt pairs, and, where it compares
with the clean run, that run's logits; it gives [example]. Higher means that the run does more of what the clean run
does.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data import tokenization
from dfa_lens.data.content import ByContent
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.registry import Registry
from dfa_lens.errors import DfaError, short


@dataclass(frozen=True, eq=False)
class Metric(ByContent, ABC):
    """One number per example; derive from it for one of your own that has options or needs the clean run.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> pairs = dfa.PromptPairs(torch.tensor([[5, 6]]), torch.tensor([[5, 7]]), torch.tensor([1]), torch.tensor([2]))
    >>> dfa.metrics.LogitDifference()(torch.tensor([[0.0, 3.0, 1.0]]), pairs)
    tensor([2.])
    """

    name: ClassVar[str]  #: what it is called, in metadata
    two_columns: ClassVar[bool] = (
        False  #: whether it reads the logits of the answer and the wrong answer, and no others
    )
    compares: ClassVar[bool] = False  #: whether it needs the clean run's logits
    differentiable: ClassVar[bool] = True  #: whether its gradient says anything

    @abstractmethod
    def __call__(
        self,
        logits: Float[Tensor, "example vocab"],
        pairs: PromptPairs,
        clean_logits: Float[Tensor, "example vocab"] | None = None,
    ) -> Float[Tensor, " example"]:
        """The metric of every example."""


def _pick(values: Tensor, pairs: PromptPairs) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(pairs), device=values.device)
    return values[rows, pairs.answer.to(values.device)], values[rows, pairs.wrong.to(values.device)]


def _clean(metric: Metric, clean_logits: Tensor | None) -> Tensor:
    if clean_logits is None:
        raise DfaError(f"The metric {metric.name!r} needs the clean run's logits.")
    return clean_logits


@dataclass(frozen=True, eq=False)
class LogitDifference(Metric):
    """logit(answer) - logit(wrong): the default, and linear in what the last layer adds to the stream."""

    name: ClassVar[str] = "logit-difference"
    two_columns: ClassVar[bool] = True

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        right, wrong = _pick(logits, pairs)
        return right.float() - wrong.float()


@dataclass(frozen=True, eq=False)
class NormalisedLogitDifference(Metric):
    """The logit difference over the size of the clean run's, of the same example: 1 at the clean run of a solved one.

    Every example then counts alike; in the logit difference those count most of which the model is surest.

    Raises
    ------
    DfaError
        If the clean run's difference is 0.
    """

    name: ClassVar[str] = "normalised-logit-difference"
    two_columns: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        scale = logit_difference(_clean(self, clean_logits), pairs).abs()
        if bool((scale == 0).any()):
            raise DfaError(
                "The clean run's logit difference of an example is 0: it can't be what others are divided by."
            )
        return logit_difference(logits, pairs) / scale.to(logits.device)


@dataclass(frozen=True, eq=False)
class ProbabilityDifference(Metric):
    """P(answer) - P(wrong), over the whole vocabulary."""

    name: ClassVar[str] = "probability-difference"

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        right, wrong = _pick(logits.float().softmax(-1), pairs)
        return right - wrong


@dataclass(frozen=True, eq=False)
class LogProbabilityDifference(Metric):
    """log P(answer) - log P(wrong). Equal to the logit difference; kept because other tools name it so."""

    name: ClassVar[str] = "log-probability-difference"

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        right, wrong = _pick(logits.float().log_softmax(-1), pairs)
        return right - wrong


@dataclass(frozen=True, eq=False)
class LogProbability(Metric):
    """log P(answer), over the whole vocabulary; the wrong answer plays no part.

    Of an answer of several tokens log P is a sum over them: :meth:`PromptPairs.spelled_out
    <dfa_lens.data.pairs.PromptPairs.spelled_out>` makes a pair of every token.
    """

    name: ClassVar[str] = "log-probability"

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        return _pick(logits.float().log_softmax(-1), pairs)[0]


@dataclass(frozen=True, eq=False)
class NegativeKL(Metric):
    """-KL(P_clean ‖ P): 0 at the clean run, lower the further the run is from it.

    Its gradient at the clean run is zero, so use it with a method that looks elsewhere as well
    (``nap-ig-inputs``, ``nap-ig-activations``, ``exact``), not with ``nap``.
    """

    name: ClassVar[str] = "kl"
    compares: ClassVar[bool] = True

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        clean = _clean(self, clean_logits).float().log_softmax(-1)
        return -divergence(clean, logits.float().log_softmax(-1))


@dataclass(frozen=True, eq=False)
class NegativeJensenShannon(Metric):
    """-JS(P_clean, P) in nats: 0 at the clean run, -log 2 where the two have nothing in common.

    JS = ½ KL(P_clean ‖ M) + ½ KL(P ‖ M), with M half of each. Bounded, where KL is not: one example on which the run
    goes wrong weighs no more than log 2. As with KL, the gradient at the clean run is zero.
    """

    name: ClassVar[str] = "js"
    compares: ClassVar[bool] = True

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        clean, own = _clean(self, clean_logits).float().log_softmax(-1), logits.float().log_softmax(-1)
        mixed = torch.logaddexp(clean, own) - math.log(2)
        return -(divergence(clean, mixed) + divergence(own, mixed)) / 2


@dataclass(frozen=True, eq=False)
class TopK(Metric):
    """Whether the answer is among the k tokens with the largest logits: 1 or 0, so that its mean is the accuracy.

    It has no gradient: for curves, circuits and ``exact``.

    Parameters
    ----------
    k:
        At least 1.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> pairs = dfa.PromptPairs(torch.tensor([[5, 6]]), torch.tensor([[5, 7]]), torch.tensor([1]), torch.tensor([2]))
    >>> logits = torch.tensor([[4.0, 3.0, 1.0]])
    >>> dfa.metrics.TopK(1)(logits, pairs), dfa.metrics.TopK(2)(logits, pairs)
    (tensor([0.]), tensor([1.]))
    """

    k: int = 1
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise DfaError(f"k must be a whole number of at least 1, not {self.k!r}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """What it is called, in metadata."""
        return f"top-{self.k}-accuracy"

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        right, _ = _pick(logits, pairs)
        return ((logits > right[:, None]).sum(-1) < self.k).float()


@dataclass(frozen=True, eq=False)
class GreaterThan(Metric):
    """P(larger numbers) - P(all others), where the wrong answer is the largest number that is wrong.

    Of "The war lasted from the year 1732 to the year 17" (Hanna et al., 2023) every number above 32 is right, and 32 is
    the wrong answer: Σ_{y > 32} P(y) - Σ_{y ≤ 32} P(y).

    Parameters
    ----------
    numbers:
        The tokens of all numbers, rising; :meth:`of` makes them.

    Raises
    ------
    DfaError
        If there are fewer than two, or one twice; in use, if a wrong answer is none of them.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> pairs = dfa.PromptPairs(torch.tensor([[5, 6]]), torch.tensor([[5, 7]]), torch.tensor([2]), torch.tensor([1]))
    >>> years = dfa.metrics.GreaterThan((0, 1, 2, 3))
    >>> round(float(years(torch.tensor([0.1, 0.2, 0.3, 0.4]).log()[None], pairs)), 3)
    0.4
    """

    numbers: tuple[int, ...]
    name: ClassVar[str] = "greater-than"

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", tuple(int(token) for token in self.numbers))
        if len(self.numbers) < 2 or len(set(self.numbers)) < len(self.numbers):
            raise DfaError("Numbers are compared by at least two tokens, each given once.")

    @classmethod
    def of(cls, tokenizer: Any, numbers: Iterable[int] = range(100), *, form: str = "{:02d}") -> GreaterThan:
        """The metric of a tokenizer's numbers.

        Parameters
        ----------
        numbers:
            Rising.
        form:
            How one is written, as the model would go on: "{:02d}" after "17", " {}" after a word.

        Raises
        ------
        DfaError
            If one is not one token.
        """
        texts = [form.format(number) for number in numbers]
        found = tokenization.tokens(tokenizer, texts, special=False)
        for text, tokens in zip(texts, found, strict=True):
            if len(tokens) != 1:
                raise DfaError(f"{text!r} is {len(tokens)} tokens, and a number is to be one: choose another form.")
        return cls(tuple(tokens[0] for tokens in found))

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        wrong = pairs.wrong.to(logits.device)
        numbers = torch.tensor(self.numbers, device=logits.device)
        at = wrong[:, None] == numbers
        if not bool(at.any(1).all()):
            bad = int((~at.any(1)).nonzero()[0])
            raise DfaError(f"The wrong answer of example {bad} (token {int(wrong[bad])}) is none of the numbers.")
        larger = at.long().cumsum(1) - at.long() > 0
        probabilities = logits.float().softmax(-1)[:, numbers]
        return torch.where(larger, probabilities, -probabilities).sum(1)


def divergence(
    log_p_clean: Float[Tensor, "*example vocab"], log_p: Float[Tensor, "*example vocab"]
) -> Float[Tensor, "*example"]:
    """KL(P_clean ‖ P) in nats, from log probabilities."""
    return torch.nn.functional.kl_div(log_p, log_p_clean, reduction="none", log_target=True).sum(-1)


logit_difference = LogitDifference()
probability_difference = ProbabilityDifference()
log_probability_difference = LogProbabilityDifference()
negative_kl = NegativeKL()

METRICS: Registry[Callable[..., Tensor]] = Registry(
    "metric",
    entries={
        metric.name: metric
        for metric in (
            logit_difference,
            probability_difference,
            log_probability_difference,
            negative_kl,
            NegativeJensenShannon(),
            NormalisedLogitDifference(),
            LogProbability(),
            TopK(1),
            TopK(5),
        )
    },
)
"""The metrics by name; add one of your own by ``register``, or hand a :class:`Metric` or a function in."""


@dataclass(frozen=True, eq=False)
class Checked(Metric):
    """A metric whose results are checked: one finite number per example."""

    metric: Callable[..., Tensor]
    of_the_user: bool  # a function of (logits, pairs)
    name: ClassVar[str] = "checked"

    def __call__(self, logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None = None) -> Tensor:  # noqa: D102
        given = (logits, pairs) if self.of_the_user else (logits, pairs, clean_logits)
        values = self.metric(*given)
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


def checked(metric: str | Callable[..., Any]) -> Metric:
    """The metric of that name, the object itself, or the user's own function; each with its result checked.

    A function takes (logits [batch, vocab], pairs) and returns [batch].
    """
    if isinstance(metric, str):
        return Checked(METRICS.find(metric), False)
    if not callable(metric):
        raise DfaError(f"A metric is a name or a function of (logits, pairs), not {short(repr(metric))}.")
    return Checked(metric, not isinstance(metric, Metric))


def _found(metric: str | Callable[..., Any]) -> Any:
    return METRICS.get(metric) if isinstance(metric, str) else metric


def reads_two_columns(metric: str | Callable[..., Any]) -> bool:
    """Whether a metric reads the logits of the answer and of the wrong answer, and no others."""
    return isinstance(_found(metric), Metric) and _found(metric).two_columns


def needs_clean(metric: str | Callable[..., Any]) -> bool:
    """Whether a metric compares with the clean run's logits."""
    return isinstance(_found(metric), Metric) and _found(metric).compares


def require_gradient(metric: str | Callable[..., Any], method: str) -> None:
    """A :class:`~dfa_lens.errors.DfaError` if a method takes gradients of a metric that has none."""
    found = _found(metric)
    if isinstance(found, Metric) and not found.differentiable:
        raise DfaError(f"The metric {found.name!r} has no gradient, which {method!r} takes: use method='exact'.")


def name_of(metric: str | Callable[..., Any]) -> str:
    """A metric's name, for provenance."""
    if isinstance(metric, Metric):
        return metric.name
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
