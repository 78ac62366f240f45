import numpy as np
import pytest
import torch
from helpers import random_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError
from dfa_lens.transfer import forms as p
from dfa_lens.transfer.similarity import depth_gap, kind_and_depth, same_kind

SOURCE, TARGET = dfa.NodeSet.for_sizes(2, 2), dfa.NodeSet.for_sizes(3, 4)


def problem(tasks=3, scale=0.1, seed=0):
    s = torch.randn(tasks, len(SOURCE), generator=torch.Generator().manual_seed(seed))
    return p.Problem(s, SOURCE, TARGET, torch.Generator().manual_seed(seed), scale)


@pytest.mark.parametrize("name", p.FORMS)
def test_every_form_fits_and_transfers(any_model, name, tmp_path):
    """What comes out is a plain W (and bias): ŝ is its equation, and survives saving."""
    scores = {t: dfa.controls.random_scores(SOURCE, seed=i) for i, t in enumerate("abcd")}
    pairs = {t: random_pairs(4, 8, seed=i) for i, t in enumerate("abcd")}
    alignment = dfa.fit(any_model, scores, pairs, steps=12, form=name, sparsity_weight=1.0)
    assert alignment.meta["form"] == name
    assert alignment.history[-1]["loss"] < alignment.history[0]["loss"]
    stage = alignment.stages[0]
    s = scores["a"].values.numpy()
    expected = s / np.linalg.norm(s) @ stage.W.numpy()
    if stage.bias is not None:
        expected = expected + stage.bias.numpy()
    np.testing.assert_allclose(alignment.transfer(scores["a"]).values, expected, rtol=1e-4, atol=1e-5)
    alignment.save(tmp_path / "w")
    assert torch.equal(
        dfa.Alignment.load(tmp_path / "w").transfer(scores["a"]).values, alignment.transfer(scores["a"]).values
    )


def test_standardised_is_centring_and_whitening():
    """At any A and b: ŝ = b + z·A with z of mean 0 and equal variance in all directions (without ridge)."""
    task = problem(tasks=4)
    numbers = p.Standardised(ridge=0.0).start(task)
    numbers.bias.data = torch.randn(len(TARGET))
    W, bias = numbers()
    shown = task.s @ W + bias
    z = (task.s - task.s.mean(0)) @ numbers.project
    torch.testing.assert_close(shown, numbers.bias + z @ numbers.A, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z.T @ z, torch.eye(3), atol=1e-4, rtol=1e-4)  # 4 tasks, centred: 3 directions
    torch.testing.assert_close(shown.mean(0), numbers.bias.data, atol=1e-4, rtol=1e-4)  # the bias is what is shared


def test_a_new_task_between_two_training_tasks_gets_their_mixture():
    task = problem(tasks=2)
    numbers = p.Standardised(ridge=0.0).start(task)
    W, bias = numbers()
    mixed = (0.3 * task.s[0] + 0.7 * task.s[1]) @ W + bias
    torch.testing.assert_close(mixed, 0.3 * (task.s[0] @ W + bias) + 0.7 * (task.s[1] @ W + bias), atol=1e-5, rtol=1e-4)


def test_low_rank_block_and_band():
    W, _ = p.LowRank(rank=2).start(problem())()
    assert torch.linalg.matrix_rank(W) == 2
    W, _ = p.Block().start(problem())()
    assert bool((W[same_kind(SOURCE, TARGET) == 0] == 0).all()) and bool((W[same_kind(SOURCE, TARGET) == 1] != 0).all())
    W, _ = p.DepthBand(width=0.5).start(problem())()
    assert bool(((W != 0) == (depth_gap(SOURCE, TARGET).abs() <= 0.5)).all())


def test_kernel_starts_at_its_similarities():
    similarity = kind_and_depth(SOURCE, TARGET)
    W, _ = p.Kernel(strength=2.0, free=False).start(problem())()
    torch.testing.assert_close(W, 2 * similarity / similarity.norm(dim=0))
    free = p.Kernel().start(problem())
    assert {name for name, _ in free.named_parameters()} == {"theta", "rest"}
    fixed = p.Kernel({"one": torch.ones(6, 15), "two": similarity}, free=False).start(problem())
    assert [tuple(each.shape) for each in fixed.parameters()] == [(2,)]


@settings(max_examples=25, deadline=None)
@given(layers=st.tuples(st.integers(1, 6), st.integers(1, 6)), heads=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_similarity_by_kind_and_depth(layers, heads):
    a, b = dfa.NodeSet.for_sizes(layers[0], heads[0]), dfa.NodeSet.for_sizes(layers[1], heads[1])
    alike = kind_and_depth(a, b)
    assert bool((kind_and_depth(b, a) == alike.T).all())
    assert float(alike.max()) == 1.0  # first layers meet
    assert bool((alike[same_kind(a, b) == 0] == 0).all())


def test_bad_input(any_model):
    scores = {t: dfa.controls.random_scores(SOURCE, seed=i) for i, t in enumerate("ab")}
    pairs = {t: random_pairs(4, 8, seed=i) for i, t in enumerate("ab")}
    with pytest.raises(AlignmentError, match="Unknown form 'lowrank'.*Did you mean 'low-rank'"):
        dfa.fit(any_model, scores, pairs, form="lowrank")
    with pytest.raises(AlignmentError, match="goes with form='full', not 'block'"):
        dfa.fit(any_model, scores, pairs, form="block", initial=torch.zeros(6, 15))
    with pytest.raises(AlignmentError, match=r"similarity 'x' must be finite and of shape \[6, 15\]"):
        dfa.fit(any_model, scores, pairs, form=p.Kernel({"x": torch.ones(2, 2)}))
    with pytest.raises(AlignmentError, match="at least one similarity"):
        p.Kernel({}).start(problem())
    for bad, words in (
        (p.LowRank(0), "rank must"),
        (p.DepthBand(0.0), "width must"),
        (p.Standardised(-1.0), "ridge must"),
    ):
        with pytest.raises(AlignmentError, match=words):
            bad.start(problem())
    with pytest.raises(AlignmentError, match="No source node is connected"):
        p.Block().start(p.Problem(torch.ones(1, 2), SOURCE["m*"], TARGET["a*"], torch.Generator()))
    for name, needed in (("low-rank", 4), ("full+bias", 2)):
        one = {"a": scores["a"]}
        with pytest.warns(dfa.TrainingWarning, match=f"can tell {needed} tasks apart, but there are 1"):
            dfa.fit(any_model, one, {"a": pairs["a"]}, steps=1, form=name)
