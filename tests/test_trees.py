"""Extremely randomised trees: every leaf is a mean, every split a division of the rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfa_lens.transfer.trees import TOGETHER, grow


def table(n=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    return x, np.where(x[:, 0] > 0.2, x[:, 1], -2.0) + 0.1 * x[:, 2]


def leaves(forest, x):
    """[tree, row]: where every row ends, walked by hand."""
    out = np.empty((len(forest.roots), len(x)), dtype=int)
    for t, root in enumerate(forest.roots):
        for i, row in enumerate(x):
            at = root
            while forest.feature[at] >= 0:
                at = forest.left[at] + int(row[forest.feature[at]] > forest.threshold[at])
            out[t, i] = at
    return out


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 11), st.integers(0, 5))
def test_every_leaf_is_the_mean_of_its_rows(n, leaf, n_trees, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, size=(n, 3)).astype(float), rng.normal(size=n)
    forest = grow(x, y, n_trees=n_trees, leaf=leaf, seed=seed)
    ends, predicted = leaves(forest, x), forest.predict(x)
    assert len(forest.roots) == n_trees
    for t in range(n_trees):
        for end in np.unique(ends[t]):
            own = ends[t] == end
            assert own.sum() >= min(leaf, n)
            np.testing.assert_allclose(forest.value[end], y[own].mean(), atol=1e-9)
            np.testing.assert_allclose(predicted[t, own], y[own].mean(), atol=1e-9)


def test_a_leaf_that_could_be_split_is_split():
    """With leaves of one row and no two alike, every row is told apart, and the prediction is exact."""
    x, y = table()
    np.testing.assert_allclose(grow(x, y, n_trees=9, leaf=1).predict(x), np.tile(y, (9, 1)), atol=1e-12)


def test_the_best_of_the_random_cuts_is_taken():
    """One feature says it all, the other nothing: every root splits by the first, wherever it cuts."""
    x = np.stack([np.repeat([0.0, 1.0], 30), np.random.default_rng(0).normal(size=60)], 1)
    forest = grow(x, np.repeat([0.0, 1.0], 30), n_trees=20)
    assert (forest.feature[forest.roots] == 0).all()
    assert len(forest.feature) == 60  # and then nothing is left to split
    cuts = forest.threshold[forest.roots]
    assert cuts.min() >= 0 and cuts.max() < 1 and cuts.std() > 0.2


def test_it_generalises_better_than_the_mean():
    x, y = table(200)
    new, wanted = table(200, seed=1)
    found = grow(x, y).predict(new).mean(0)
    assert np.square(found - wanted).mean() < 0.2 * wanted.var()


def test_equal_values_are_one_leaf():
    forest = grow(np.random.default_rng(0).normal(size=(9, 2)), np.full(9, 3.0), n_trees=2)
    assert forest.feature.tolist() == [-1, -1] and forest.value.tolist() == [3.0, 3.0]
    assert grow(np.zeros((9, 2)), np.arange(9.0), n_trees=2).value.tolist() == [4.0, 4.0]  # nothing to split by


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_means_the_same_trees(seed):
    x, y = table()
    first, again = (grow(x, y, n_trees=2 * TOGETHER, seed=seed).predict(x) for _ in range(2))
    assert (first == again).all()
    assert (grow(x, y, n_trees=TOGETHER, seed=seed).predict(x) == first[:TOGETHER]).all()
    assert (grow(x, y, n_trees=TOGETHER, seed=seed + 1).predict(x) != first[:TOGETHER]).any()


def test_known_numbers():
    """What a saved alignment says must not change from one machine or release to the next."""
    x, y = table(20)
    found = grow(x, y, n_trees=3, leaf=2, seed=4).predict(x).mean(0)[:3]
    np.testing.assert_allclose(found, KNOWN, atol=1e-6)


KNOWN = [-1.6925966742028784, 0.2652861760253078, -2.0964693127835035]
