import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.data.statistics import compare, holm, mean_interval
from dfa_lens.errors import AlignmentError, DfaError, ScoreError
from dfa_lens.evaluation import diagnostics

A, B = dfa.NodeSet.for_sizes(2, 2), dfa.NodeSet.for_sizes(3, 4)


def alignment(W):
    return dfa.Alignment.of(W, A, B)


def test_effective_rank():
    """A matrix with r equal singular values has rank r; one large and a little noise, nearly 1."""
    U, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    V, _ = torch.linalg.qr(torch.randn(15, 6, generator=torch.Generator().manual_seed(1)))
    for r in (1, 3, 6):
        assert diagnostics.effective_rank(alignment(U[:, :r] @ V[:, :r].T)) == pytest.approx(r, rel=1e-4)
    with pytest.raises(AlignmentError, match="W is zero"):
        diagnostics.effective_rank(alignment(torch.zeros(6, 15)))


def test_shared_part():
    one, two = dfa.controls.random_scores(B, seed=0), dfa.controls.random_scores(B, seed=1)
    assert diagnostics.shared_part({"a": one, "b": one}) == pytest.approx(1)
    negative = dfa.NodeScores(-one.values, B)
    assert diagnostics.shared_part({"a": one, "b": negative}) == pytest.approx(0, abs=1e-9)
    x, y = (s.values.numpy() - s.values.numpy().mean() for s in (one, two))
    expected = (((x + y) / 2) ** 2).sum() / (((x**2).sum() + (y**2).sum()) / 2)
    assert diagnostics.shared_part({"a": one, "b": two}) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ScoreError, match="at least two"):
        diagnostics.shared_part({"a": one})
    with pytest.raises(ScoreError, match="constant"):
        diagnostics.shared_part(dict.fromkeys("ab", dfa.controls.uniform(B)))


def test_depth_stability_and_contributors():
    s = dfa.controls.random_scores(A, seed=3)
    fixed = dfa.controls.depth_mean(A, B)
    found = diagnostics.depth_correlation(s, fixed.transfer(s))
    assert found.spearman == pytest.approx(1) and found.sign_agreement == 1
    free = alignment(torch.randn(6, 15, generator=torch.Generator().manual_seed(2)))
    calm, rough = (diagnostics.stability(free, s, noise=noise) for noise in (0.01, 2.0))
    assert rough < calm <= 1 and calm > 0.95
    table = diagnostics.contributors(free, s, nodes=4, each=6)
    assert list(dict.fromkeys(table["target"])) == list(free.transfer(s).top(4))
    for _, part in table.groupby("target"):  # all six source nodes: the products add up to the score
        assert part["product"].sum() == pytest.approx(part["target_score"].iloc[0], rel=1e-4)
    np.testing.assert_allclose(
        table["product"], table["weight"] * table["source_score"] / float(s.values.norm()), rtol=1e-4
    )
    with pytest.raises(ScoreError, match="nodes must be 1 to 15"):
        diagnostics.contributors(free, s, nodes=16)
    with pytest.raises(ScoreError, match="noise must be positive"):
        diagnostics.stability(free, s, noise=0.0)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_as_the_step_down_rule_does(values):
    p = {str(i): value for i, value in enumerate(values)}
    corrected = holm(p)
    assert all(corrected[name] >= p[name] for name in p)
    for alpha in (0.01, 0.05, 0.2):
        rejected, m = set(), len(p)
        for i, name in enumerate(sorted(p, key=p.__getitem__)):  # the definition: stop at the first that is too large
            if p[name] * (m - i) > alpha:
                break
            rejected.add(name)
        assert {name for name in p if corrected[name] <= alpha} == rejected


def test_compare():
    import pandas as pd

    rng = np.random.default_rng(0)
    rows = [
        {"family": f, "task": t, "seed": s, "setting": name, "cpr": base + 0.3 * (t == "x") + 0.01 * rng.normal()}
        for f in "ab"
        for t in "xyz"
        for s in range(3)
        for name, base in (("ours", 0.6), ("worse", 0.4), ("same", 0.6))
    ]
    table = pd.DataFrame(rows)
    found = compare(table, "ours", ["worse", "same"]).set_index("against")
    assert found["pairs"].tolist() == [18, 18]
    assert found.loc["worse", "difference"] == pytest.approx(0.2, abs=0.02)
    assert found.loc["worse", "low"] < 0.2 < found.loc["worse", "high"]
    assert found.loc["worse", "p_holm"] < 0.001 < found.loc["same", "p"]
    assert compare(table, "ours", ["worse"], by=("family", "task"))["pairs"].tolist() == [6]
    with pytest.raises(DfaError, match="Unknown setting 'best'"):
        compare(table, "best", ["same"])
    low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4
