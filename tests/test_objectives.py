import numpy as np
import pytest
import torch
from helpers import random_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError
from dfa_lens.models import hooks
from dfa_lens.models.runner import Runner
from dfa_lens.transfer import objectives
from dfa_lens.transfer.objectives import Matryoshka, Sparse, TargetSize, gates_of_size

NODES = dfa.NodeSet.for_sizes(2, 2)


def masks(objective, scores, progress=0.9, temperature=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return objective.masks(scores, temperature=temperature, progress=progress, generator=generator)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.floats(0.05, 2.0), st.integers(0, 10_000))
def test_shifted_masks_have_the_size_asked_for(n, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, n, generator=generator)
    sizes = 1 + (n - 2) * torch.rand(3, generator=generator)
    gates = gates_of_size(scores, sizes, sharpness)
    torch.testing.assert_close(gates.sum(1), sizes, atol=2e-3, rtol=1e-3)
    assert bool((gates.gather(1, scores.argsort(1)).diff(dim=1) >= 0).all())  # the ranking is kept, up to ties
    assert bool((gates.amax(1) > gates.amin(1)).all())  # and the mask is not one number for all
    torch.testing.assert_close(gates_of_size(scores + 3.0, sizes, sharpness), gates, atol=2e-3, rtol=1e-3)


def test_the_gradient_of_a_shifted_mask():
    """Finite differences, with the shift solved again: the shift's own gradient is part of it."""
    scores = torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    sizes = torch.tensor([2.5, 4.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: gates_of_size(x, sizes, 0.5), (scores,), eps=1e-5, atol=1e-4)


def test_penalties_are_their_equations():
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    g = 1 / (1 + np.exp(-scores.numpy() / 0.5))
    found = masks(Sparse(2.0), scores, temperature=0.5)
    np.testing.assert_allclose(found.gates, g, rtol=1e-5)
    np.testing.assert_allclose(found.penalty, 2 * g.mean(1), rtol=1e-5)
    found = masks(TargetSize(0.25, 4.0), scores, temperature=0.5)
    np.testing.assert_allclose(found.penalty, 4 * (g.mean(1) / 0.25 - 1) ** 2, rtol=1e-4)


def test_matryoshka_draws_sizes_and_can_be_hard():
    scores = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    soft = masks(Matryoshka(), scores)
    sizes = soft.gates.sum(1)
    assert 1 <= float(sizes.min()) < 2 and 7 < float(sizes.max()) <= 8.01
    assert not soft.penalty.any()
    small = masks(Matryoshka(sizes="log-uniform"), scores).gates.sum(1)
    assert float(small.mean()) < float(sizes.mean())
    hard = masks(Matryoshka(straight_through=True), scores).gates
    assert set(hard.round(decimals=4).unique().tolist()) == {0.0, 1.0}
    best = scores.argsort(1, descending=True)
    ordered = hard.gather(1, best)
    assert bool((ordered[:, :-1] >= ordered[:, 1:] - 1e-4).all())  # always the best k
    warm = masks(Matryoshka(sparsity_weight=3.0), scores, progress=0.2)
    torch.testing.assert_close(warm.gates, torch.sigmoid(scores))


def inputs():
    scores = {t: dfa.controls.random_scores(NODES, seed=i) for i, t in enumerate("ab")}
    return scores, {t: random_pairs(6, 8 + i, seed=i, ragged=True) for i, t in enumerate("ab")}


@pytest.mark.parametrize("loss", ["logit-difference", "probability"])
def test_other_losses_are_their_equations(model, loss):
    scores, pairs = inputs()
    found = dfa.fit(model, scores, pairs, steps=1, batch_size=12, loss=loss, initial_scale=0.5, seed=2)
    W0 = 0.5 * torch.randn(6, 15, generator=torch.Generator().manual_seed(2))
    nodes = dfa.NodeSet.heads_and_mlps(model)
    rows = []
    for task in scores:
        g = torch.sigmoid(scores[task].values / scores[task].values.norm() @ W0)
        for i in range(6):
            one = pairs[task][i]
            corrupt = {}
            with torch.no_grad():
                Runner(model).run(one.corrupt, one.corrupt_lengths, hooks.record_hooks(nodes, corrupt))
                clean = Runner(model).run(one.clean, one.lengths)[0]
                masked = Runner(model).run(one.clean, one.lengths, hooks.gate_hooks(nodes, g, corrupt=corrupt))[0]
            a, w = int(one.answer), int(one.wrong)
            rows.append(
                (
                    float(masked[a] - masked[w]),
                    float(clean[a] - clean[w]),
                    float(masked.softmax(0)[a]),
                    float(clean.softmax(0)[a]),
                )
            )
    m, m0, q, q0 = np.array(rows).T
    expected = (((m - m0) / np.abs(m0).mean()) ** 2).mean() if loss == "logit-difference" else ((q - q0) ** 2).mean()
    assert found.history[0]["divergence"] == pytest.approx(expected, rel=1e-3)
    assert found.meta["loss"] == loss


@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_every_objective_trains(any_model, objective):
    scores, pairs = inputs()
    found = dfa.fit(any_model, scores, pairs, steps=8, objective=objective, sparsity_weight=1.0)
    assert found.meta["objective"] == objective
    assert len(found.history) == 8


def test_temperature_schedule(any_model):
    scores, pairs = inputs()
    found = dfa.fit(any_model, scores, pairs, steps=3, temperature=(1.0, 0.25))
    assert found.temperature == 0.25
    same = dfa.fit(any_model, scores, pairs, steps=3, temperature=(0.25, 0.25))
    assert torch.equal(same.W, dfa.fit(any_model, scores, pairs, steps=3, temperature=0.25).W)
    assert not torch.equal(same.W, found.W)


def test_bad_input(any_model):
    scores, pairs = inputs()
    with pytest.raises(AlignmentError, match="Unknown objective 'spars'.*Did you mean 'sparse'"):
        dfa.fit(any_model, scores, pairs, objective="spars")
    with pytest.raises(AlignmentError, match="needs positions='answer'"):
        dfa.fit(any_model, scores, pairs, loss="probability", positions="all")
    with pytest.raises(AlignmentError, match="temperature must be positive"):
        dfa.fit(any_model, scores, pairs, temperature=(1.0, 0.0))
    with pytest.raises(AlignmentError, match="fraction must be between 0 and 1"):
        dfa.fit(any_model, scores, pairs, steps=1, objective=TargetSize(1.5))
    with pytest.raises(AlignmentError, match="sharpness must be positive"):
        dfa.fit(any_model, scores, pairs, steps=1, objective=Matryoshka(sharpness=0.0))
    with pytest.raises(AlignmentError, match="at least two nodes"):
        masks(Matryoshka(), torch.ones(2, 1))
    with pytest.raises(AlignmentError, match="Unknown sizes"):
        masks(_with_sizes("all"), torch.ones(2, 3))


def _with_sizes(sizes):
    made = Matryoshka()
    object.__setattr__(made, "sizes", sizes)
    return made
