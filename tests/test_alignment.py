import numpy as np
import pytest
import torch
from helpers import unchecked

import dfa_lens as dfa
from dfa_lens.data.alignment import LinearMap
from dfa_lens.data.scaling import scale
from dfa_lens.errors import AlignmentError, FileError, ScoreError

A, B, C = dfa.NodeSet.for_sizes(2, 2), dfa.NodeSet.for_sizes(3, 3), dfa.NodeSet.for_sizes(4, 5)


def alignment(source, target, seed=0, **options):
    W = torch.randn(len(source), len(target), generator=torch.Generator().manual_seed(seed))
    return dfa.Alignment.of(W, source, target, **options)


def test_transfer_is_its_equation():
    s = dfa.controls.random_scores(A)
    raw, unit = alignment(A, B, scaling="raw"), alignment(A, B, temperature=2.0)
    np.testing.assert_allclose(raw.transfer(s).values, s.values.numpy() @ raw.W.numpy(), rtol=1e-5)
    expected = s.values.numpy() / np.linalg.norm(s.values.numpy()) @ unit.W.numpy()
    np.testing.assert_allclose(unit.transfer(s).values, expected, rtol=1e-5)
    np.testing.assert_allclose(unit.mask(s), 1 / (1 + np.exp(-expected / 2)), rtol=1e-5)
    assert unit.transfer(s).nodes == B


def test_scalings_are_their_definitions():
    from scipy import stats

    s = torch.tensor([[3.0, -1.0, 0.5, 0.5, -4.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    ranks = stats.rankdata(s.numpy(), axis=1) - 3.0
    np.testing.assert_allclose(scale(s, "rank"), ranks / np.linalg.norm(ranks, axis=1, keepdims=True), rtol=1e-6)
    roots = np.sign(s.numpy()) * np.sqrt(np.abs(s.numpy()))
    np.testing.assert_allclose(scale(s, "signed-sqrt"), roots / np.linalg.norm(roots, axis=1, keepdims=True), rtol=1e-6)
    with pytest.raises(AlignmentError, match="All source scores are equal"):
        scale(torch.ones(4), "rank")


def test_bias_and_chains_with_it(tmp_path):
    bias = torch.randn(len(B), generator=torch.Generator().manual_seed(5))
    first, second = alignment(A, B, bias=bias), alignment(B, C, 1, scaling="unit", bias=torch.ones(len(C)))
    s = dfa.controls.random_scores(A, seed=2)
    plain = alignment(A, B).transfer(s).values
    torch.testing.assert_close(first.transfer(s).values, plain + bias)
    torch.testing.assert_close(first.contributions(s).sum(0), plain, atol=1e-5, rtol=1e-4)
    chain = second @ first
    torch.testing.assert_close(chain.transfer(s).values, second.transfer(first.transfer(s)).values)
    chain.save(tmp_path / "w")
    assert torch.equal(dfa.Alignment.load(tmp_path / "w").transfer(s).values, chain.transfer(s).values)
    shuffled = dfa.controls.permuted_w(first, seed=1).transfer(s).values
    assert not torch.equal(shuffled, first.transfer(s).values)
    torch.testing.assert_close(shuffled.sort().values, first.transfer(s).values.sort().values)
    with pytest.raises(AlignmentError, match=r"The bias has shape \[2\] for 12"):
        unchecked(LinearMap.__init__)(object.__new__(LinearMap), torch.ones(6, 12), A, B, "unit", torch.ones(2))
    with pytest.raises(AlignmentError, match="bias has entries that are not finite"):
        alignment(A, B, bias=torch.full((12,), float("nan")))
    with pytest.raises(AlignmentError, match="can't be split over source nodes"):
        (alignment(B, C, 1, scaling="rank") @ first).contributions(s)


@pytest.mark.parametrize("scaling", ["unit", "raw"])
def test_chains(scaling):
    first, second = alignment(A, B, scaling=scaling), alignment(B, C, 1, scaling=scaling)
    chain = second @ first
    s = dfa.controls.random_scores(A, seed=3)
    expected = second.transfer(first.transfer(s)).values
    torch.testing.assert_close(chain.transfer(s).values, expected)
    torch.testing.assert_close(chain.W, first.W @ second.W)
    assert (chain.source, chain.target) == (A, C)
    torch.testing.assert_close(chain.contributions(s).sum(0), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(AlignmentError, match="can't be chained"):
        first @ second


def test_contributions_add_up():
    s, one = dfa.controls.random_scores(A), alignment(A, B)
    torch.testing.assert_close(one.contributions(s).sum(0), one.transfer(s).values, atol=1e-5, rtol=1e-4)


def test_save_and_load(tmp_path):
    chain = alignment(B, C, 1, temperature=0.5, meta={"lr": 0.1}) @ alignment(A, B, scaling="raw")
    chain.save(tmp_path / "w.safetensors")
    loaded = dfa.Alignment.load(tmp_path / "w.safetensors")
    s = dfa.controls.random_scores(A)
    assert torch.equal(loaded.mask(s), chain.mask(s))
    assert [stage.scaling for stage in loaded.stages] == ["raw", "unit"]
    assert loaded.meta == {"chain": [{}, {"lr": 0.1}]}
    with pytest.raises(FileError, match="There is no file"):
        dfa.Alignment.load(tmp_path / "other")


def test_bad_input():
    with pytest.raises(AlignmentError, match=r"W has shape \[2, 2\], but there are 6 source and 12 target"):
        dfa.Alignment.of(torch.zeros(2, 2), A, B)
    with pytest.raises(AlignmentError, match="1 entries that are not finite"):
        dfa.Alignment.of(
            torch.zeros(6, 12)
            .index_fill(0, torch.tensor([]).long(), 0)
            .masked_fill(torch.arange(72).reshape(6, 12) == 3, float("nan")),
            A,
            B,
        )
    with pytest.raises(AlignmentError, match="temperature must be positive"):
        alignment(A, B, temperature=0.0)
    with pytest.raises(ScoreError, match="The source scores belong to 12 nodes"):
        alignment(A, B).transfer(dfa.controls.random_scores(B))
    with pytest.raises(AlignmentError, match="All source scores are zero"):
        scale(torch.zeros(4), "unit")
    with pytest.raises(AlignmentError, match="Unknown scaling 'unity'"):
        unchecked(scale)(torch.ones(4), "unity")
    with pytest.raises(AlignmentError, match="at least one stage"):
        dfa.Alignment(())
    assert isinstance(alignment(A, B).stages[0], LinearMap)


def test_controls():
    s = dfa.controls.random_scores(A)
    one = alignment(A, B)
    permuted = dfa.controls.permuted_w(one, seed=1)
    assert not torch.equal(permuted.W, one.W)
    assert torch.equal(permuted.W.sort(1).values, one.W.sort(1).values)
    scrambled = dfa.controls.scrambled(s, seed=1)
    assert sorted(scrambled.values.tolist()) == sorted(s.values.tolist())
    assert not torch.equal(scrambled.values, s.values)
    assert dfa.controls.uniform(A).values.unique().tolist() == [1.0]
    assert torch.equal(dfa.controls.random_w(A, B, seed=2).W, dfa.controls.random_w(A, B, seed=2).W)


def test_depth_mean():
    """Two layers onto three: the first to the first, the last to the last; heads to heads, MLPs to MLPs."""
    W = dfa.controls.depth_mean(A, B).W
    torch.testing.assert_close(W.sum(1), torch.ones(6))
    assert W[A.position("a0.h0")].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert W[A.position("m1")].nonzero()[:, 0].tolist() == [B.position("m2")]
    # three layers onto two: the middle one goes half and half
    W = dfa.controls.depth_mean(B, A).W
    middle = W[B.position("m1")]
    assert {A.names[i]: float(middle[i]) for i in middle.nonzero()[:, 0].tolist()} == {"m0": 0.5, "m1": 0.5}


def test_regression_is_least_squares():
    tasks = [f"t{i}" for i in range(4)]
    scores = {t: dfa.controls.random_scores(A, seed=i) for i, t in enumerate(tasks)}
    gold = {t: dfa.controls.random_scores(B, seed=10 + i) for i, t in enumerate(tasks)}
    S = torch.stack([scale(scores[t].values, "unit") for t in tasks]).double().numpy()
    G = torch.stack([scale(gold[t].values, "unit") for t in tasks]).double().numpy()
    expected = np.linalg.lstsq(S, G, rcond=None)[0]
    np.testing.assert_allclose(dfa.controls.regression(scores, gold).W, expected, atol=1e-5)
    ridge = 0.3
    expected = np.linalg.solve(S.T @ S + ridge * np.eye(6), S.T @ G)
    np.testing.assert_allclose(dfa.controls.regression(scores, gold, ridge=ridge).W, expected, atol=1e-5)
    with pytest.raises(AlignmentError, match="same tasks"):
        dfa.controls.regression(scores, {})


def test_released_alignments(tmp_path):
    names = ["a0.h0", "a0.h1", "m0"], ["a0.h0", "m0", "a1.h0", "m1"]
    W = torch.randn(3, 4)
    path = tmp_path / "alignment.pt"
    torch.save({"W": W, "small_nodes": names[0], "large_nodes": names[1], "meta": {"task": "ioi"}}, path)
    loaded = dfa.Alignment.from_released(path)
    assert (list(loaded.source.names), list(loaded.target.names)) == names
    assert loaded.source == dfa.NodeSet.for_sizes(1, 2)
    assert loaded.target == dfa.NodeSet.for_sizes(2, 1)
    s = torch.randn(3)
    torch.testing.assert_close(loaded.transfer(dfa.NodeScores(s, loaded.source)).values, s @ W)
    torch.save({"W": W, "small_nodes": ["x"], "large_nodes": names[1]}, path)
    with pytest.raises(FileError, match="names a node 'x'"):
        dfa.Alignment.from_released(path)
    torch.save({"weights": W}, path)
    with pytest.raises(FileError, match="has no 'W'"):
        dfa.Alignment.from_released(path)
    torch.save(dfa.NodeSet.for_sizes(1, 1), path)  # a pickled object: refused, not run
    with pytest.raises(FileError, match="read safely"):
        dfa.Alignment.from_released(path)
    with pytest.raises(FileError, match="no file"):
        dfa.Alignment.from_released(tmp_path / "none.pt")
