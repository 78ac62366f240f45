"""Extremely randomised trees (Geurts, Ernst and Wehenkel 2006), all of them grown together, level by level.

Their splits are plain arrays, made by numpy's own generator: the same table and seed give the same trees on every
machine, in every process and with every release, so that an alignment is saved as its table, and nothing is pickled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

#: Trees that grow together: bounds memory; part of what a seed means.
TOGETHER = 8


@dataclass(frozen=True)
class Forest:
    """Grown trees, the nodes of all of them one after the other.

    Attributes
    ----------
    feature:
        What a node splits by; −1 for a leaf.
    threshold:
        Rows with at most this go left.
    left:
        The node on the left; that on the right is the next one.
    value:
        The mean of the rows that came here.
    roots:
        Where each tree begins.
    """

    feature: Int[np.ndarray, " node"]
    threshold: Float[np.ndarray, " node"]
    left: Int[np.ndarray, " node"]
    value: Float[np.ndarray, " node"]
    roots: Int[np.ndarray, " tree"]

    def predict(self, x: Float[np.ndarray, "row feature"]) -> Float[np.ndarray, "tree row"]:
        """What each tree says of every row.

        Examples
        --------
        >>> import numpy as np
        >>> from dfa_lens.transfer.trees import grow
        >>> x = np.linspace(0, 1, 8)[:, None]
        >>> grow(x, (x[:, 0] > 0.5) * 1.0, n_trees=3, leaf=1).predict(x).mean(0).tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
        """
        at = np.repeat(self.roots[:, None], len(x), axis=1)
        rows = np.arange(len(x))
        while True:
            feature = self.feature[at]
            inner = feature >= 0
            if not inner.any():
                return self.value[at]
            right = x[rows, np.maximum(feature, 0)] > self.threshold[at]
            at = np.where(inner, self.left[at] + right, at)


def grow(
    x: Float[np.ndarray, "row feature"],
    y: Float[np.ndarray, " row"],
    *,
    n_trees: int = 200,
    leaf: int = 2,
    seed: int = 0,
) -> Forest:
    """Trees that predict ``y`` from ``x``.

    Each sees all rows. At every node each feature gets a threshold drawn evenly between its least and its largest value
    there, and the split that leaves the least squared error is taken; a node with equal ``y``, or that no split with
    ``leaf`` rows on both sides divides, is a leaf.

    Parameters
    ----------
    n_trees:
        Their mean is the prediction; more make it steadier.
    leaf:
        The fewest rows of a leaf.
    seed:
        Of the thresholds.

    Examples
    --------
    >>> import numpy as np
    >>> from dfa_lens.transfer.trees import grow
    >>> forest = grow(np.eye(4), np.arange(4.0), n_trees=2)
    >>> len(forest.roots)
    2
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    parts = [
        _grow_together(x, y, min(TOGETHER, n_trees - first), leaf, generator) for first in range(0, n_trees, TOGETHER)
    ]
    starts = np.cumsum([0, *(len(part.feature) for part in parts)])
    return Forest(
        np.concatenate([part.feature for part in parts]),
        np.concatenate([part.threshold for part in parts]),
        np.concatenate([part.left + start for part, start in zip(parts, starts[:-1], strict=True)]),
        np.concatenate([part.value for part in parts]),
        np.concatenate([part.roots + start for part, start in zip(parts, starts[:-1], strict=True)]),
    )


def _grow_together(
    x: Float[np.ndarray, "row feature"],
    y: Float[np.ndarray, " row"],
    n_trees: int,
    leaf: int,
    generator: np.random.Generator,
) -> Forest:
    n = len(y)
    rows = np.tile(np.arange(n), n_trees)  # those of one tree's node after those of another's
    starts = np.arange(n_trees) * n  # where the rows of each open node begin
    feature, threshold, left, value = [], [], [], []
    made = n_trees  # nodes so far, those of this level among them
    while len(starts):
        sizes = np.diff([*starts, len(rows)])
        own_y, own_x = y[rows], x[rows]
        sums = np.add.reduceat(own_y, starts)
        equal = np.maximum.reduceat(own_y, starts) == np.minimum.reduceat(own_y, starts)
        low, high = np.minimum.reduceat(own_x, starts), np.maximum.reduceat(own_x, starts)
        cuts = low + generator.random(low.shape) * (high - low)
        goes_left = own_x <= np.repeat(cuts, sizes, axis=0)
        n_left = np.add.reduceat(goes_left, starts, dtype=np.float64)
        y_left = np.add.reduceat(goes_left * own_y[:, None], starts)
        n_right, y_right = sizes[:, None] - n_left, sums[:, None] - y_left
        with np.errstate(invalid="ignore", divide="ignore"):
            gain = y_left**2 / n_left + y_right**2 / n_right
        gain[(n_left < leaf) | (n_right < leaf)] = -np.inf
        best = gain.argmax(1)
        every = np.arange(len(starts))
        split: Bool[np.ndarray, " node"] = (gain[every, best] > -np.inf) & ~equal
        feature.append(np.where(split, best, -1))
        threshold.append(cuts[every, best])
        value.append(sums / sizes)
        left.append(made + 2 * np.cumsum(split) - 2)  # of a leaf: never read
        made += 2 * int(split.sum())
        # the rows of nodes that split, first those that go left
        kept = np.repeat(split, sizes)
        side = ~goes_left[np.arange(len(rows)), np.repeat(best, sizes)]
        child = (2 * np.repeat(np.cumsum(split) - 1, sizes) + side)[kept]
        order = np.argsort(child, kind="stable")
        rows = rows[kept][order]
        starts = np.searchsorted(child[order], np.arange(2 * int(split.sum())))
    return Forest(
        np.concatenate(feature),
        np.concatenate(threshold),
        np.concatenate(left),
        np.concatenate(value),
        np.arange(n_trees),
    )
