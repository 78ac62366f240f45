"""Intervals, tests and correlations, all by scipy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import DfaError, ScoreError, unknown

K = TypeVar("K")


class StatisticsWarning(UserWarning):
    """A figure that is not defined on so few examples, and comes back as NaN."""


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Correlation:
    """How well two score vectors agree: Pearson's r, Spearman's ρ, and the part of nodes with equal sign."""

    pearson: float
    spearman: float
    sign_agreement: float


def bootstrap(
    data: np.ndarray,
    statistic: Callable[..., np.ndarray],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of ``statistic(data, axis=…)``.

    Raises
    ------
    DfaError
        If ``confidence`` or ``resamples`` is out of range.

    Warns
    -----
    StatisticsWarning
        If there is one example only: nothing can be resampled, and the interval is (nan, nan).

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import numpy as np
    >>> interval = dfa.statistics.bootstrap(np.arange(20.0), np.mean)
    >>> interval.low < 9.5 < interval.high
    True
    """
    if not enough(len(data), "an interval", confidence, resamples):
        return UNDEFINED
    (low, high), _ = resampled(data, statistic, confidence, resamples, seed)
    return Interval(float(low), float(high))


def resampled(
    data: np.ndarray, statistic: Callable[..., np.ndarray], confidence: float, resamples: int, seed: int
) -> tuple[tuple[Any, Any], Float[np.ndarray, "..."]]:
    """The limits of a percentile bootstrap, and the statistic of every resample behind them.

    Parameters
    ----------
    data:
        [example], at least two.
    statistic:
        Of (examples, axis=…); it may give several values, on axes before that of the resamples.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import numpy as np
    >>> (low, high), means = dfa.statistics.resampled(np.arange(20.0), np.mean, 0.95, 500, seed=0)
    >>> bool(low < 9.5 < high), means.shape
    (True, (500,))
    """
    from scipy import stats

    found = stats.bootstrap(
        (data,),
        statistic,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    limits = found.confidence_interval
    return (limits.low, limits.high), found.bootstrap_distribution


UNDEFINED = Interval(float("nan"), float("nan"))


def enough(n: int, what: str, confidence: float, resamples: int) -> bool:
    """Whether ``n`` examples can be resampled; with fewer than two a :class:`StatisticsWarning` says that ``what`` is
    NaN.

    Raises
    ------
    DfaError
        If ``confidence`` or ``resamples`` is out of range.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.statistics.enough(8, "an interval", 0.95, 2000)
    True
    """
    if not 0 < confidence < 1:
        raise DfaError(f"confidence must be between 0 and 1, not {confidence}.")
    if resamples < 1:
        raise DfaError(f"resamples must be at least 1, not {resamples}.")
    if n < 2:
        warnings.warn(
            f"Of {n} example{'s' * (n != 1)} {what} is not defined: it is NaN.", StatisticsWarning, stacklevel=4
        )
    return n >= 2


def correlation(first: NodeScores, second: NodeScores) -> Correlation:
    """Agreement of two score vectors over the same nodes.

    Raises
    ------
    ScoreError
        If the nodes differ, or one vector is constant.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> scores = dfa.controls.random_scores(dfa.NodeSet.for_sizes(6, 8))
    >>> round(dfa.statistics.correlation(scores, scores).spearman, 3)
    1.0
    """
    from scipy import stats

    second.require(first.nodes, "The second scores")
    a, b = first.values.double().numpy(), second.values.double().numpy()
    if a.std() == 0 or b.std() == 0:
        raise ScoreError("A constant score vector has no correlation with anything.")
    return Correlation(
        pearson=float(stats.pearsonr(a, b).statistic),
        spearman=float(stats.spearmanr(a, b).statistic),
        sign_agreement=float((np.sign(a) == np.sign(b)).mean()),
    )


def paired_test(first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value that paired values (same task, family, seed) have the same mean: sign-flip permutation test.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.statistics.paired_test([0.8, 0.7, 0.9, 0.8], [0.5, 0.6, 0.4, 0.5])
    0.125
    """
    from scipy import stats

    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise DfaError(f"A paired test needs two equally long lists of at least 2 values, not {a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise DfaError("A paired test needs finite values: some are NaN or infinite.")
    return float(
        stats.permutation_test(
            (a, b),
            lambda x, y, axis: (x - y).mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """p-values corrected for the number of tests by Holm's step-down method (Holm 1979); family-wise error.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> {name: round(p, 3) for name, p in dfa.statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03}).items()}
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    wrong = next((name for name, p in p_values.items() if not 0 <= p <= 1), None)
    if wrong is not None:
        raise DfaError(f"The p-value of {wrong!r} is {p_values[wrong]}: it must be between 0 and 1.")
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    out: dict[K, float] = {}
    largest = 0.0
    for i, (name, p) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - i) * p))
        out[name] = largest
    return {name: out[name] for name in p_values}


def mean_interval(values: Sequence[float], *, confidence: float = 0.95, resamples: int = 5000) -> Interval:
    """Bootstrap interval of the mean of ``values`` (one for every task, family and seed, say).

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> interval = dfa.statistics.mean_interval([0.7, 0.8, 0.9, 0.8])
    >>> 0.7 <= interval.low <= interval.high <= 0.9
    True
    """
    return bootstrap(np.asarray(values, dtype=float), np.mean, confidence, resamples)


def compare(
    table: Any,
    setting: str,
    against: Sequence[str],
    *,
    value: str = "cpr",
    by: Sequence[str] = ("family", "task", "seed"),
    resamples: int = 20_000,
) -> Any:
    """One setting against others, paired over everything that both were run on.

    Parameters
    ----------
    table:
        A tidy table with the columns ``setting``, ``value`` and ``by``.
    setting, against:
        The one setting, and those it is compared with.
    value:
        What is compared.
    by:
        What makes a pair. Seeds of one task are not independent of each other: with ``("family", "task")`` they are
        averaged first, and the test is the harder one.

    Returns
    -------
    pandas.DataFrame
        A row for each other setting: pairs, mean, other's mean, difference, its interval (low, high), p (two-sided
        sign-flip permutation test) and p_holm (corrected for the number of rows).

    Raises
    ------
    DfaError
        If a column or setting is not in the table, or fewer than two pairs are.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import pandas as pd
    >>> rows = [("zero-shot", t, 0.7 + i / 99) for i, t in enumerate("abcd")] + [("uniform-s", t, 0.6) for t in "abcd"]
    >>> table = pd.DataFrame(rows, columns=["setting", "task", "cpr"])
    >>> round(float(dfa.statistics.compare(table, "zero-shot", ["uniform-s"], by=["task"])["difference"].iloc[0]), 3)
    0.115
    """
    import pandas as pd

    missing = next((name for name in ("setting", value, *by) if name not in table), None)
    if missing is not None:
        raise unknown("column", missing, list(map(str, table.columns)), DfaError)
    wide = table.pivot_table(index=list(by), columns="setting", values=value, aggfunc="mean")
    for name in (setting, *against):
        if name not in wide:
            raise unknown("setting", name, list(wide.columns), DfaError)
    rows = []
    for other in against:
        both = wide[[setting, other]].dropna()
        first, second = both[setting], both[other]
        p = paired_test(first.tolist(), second.tolist(), resamples=resamples)
        low, high = mean_interval((first - second).tolist())
        rows.append(
            {
                "setting": setting,
                "against": other,
                "pairs": len(both),
                "mean": first.mean(),
                "other": second.mean(),
                "difference": (first - second).mean(),
                "low": low,
                "high": high,
                "p": p,
            }
        )
    corrected = holm({row["against"]: row["p"] for row in rows})
    return pd.DataFrame([{**row, "p_holm": corrected[row["against"]]} for row in rows])
