"""Learned rankings against a loop written anew: other hooks, another solver for the top-k, autograd all the way."""

import pytest
import torch
from helpers import random_pairs, unchecked
from scipy.optimize import brentq
from test_attribution import planted

import dfa_lens as dfa
from dfa_lens.attribution.learned import Matryoshka
from dfa_lens.errors import DfaError


def top_k(scores, k, temperature):
    """sigmoid((s - b)/T) that adds up to k: b by Brent's method, its gradient from one step of Newton's."""
    scale = float(scores.detach().abs().max()) + 50 * temperature

    def excess(b):
        return float(torch.sigmoid((scores.detach().double() - b) / temperature).sum()) - k

    b = brentq(excess, -scale, scale, xtol=1e-14)
    gates = torch.sigmoid((scores - b) / temperature)
    slope = float((gates * (1 - gates)).detach().sum()) / temperature
    return torch.sigmoid((scores - b - (gates.sum() - k) / slope) / temperature)


def by_hand(model, pairs, nodes, steps, seed, loss_of, kept=lambda gates: gates):
    """Matryoshka attribution with TransformerLens's own hooks, all pairs in every step."""
    rows = torch.arange(len(pairs))

    def metric(logits):
        last = logits[rows, pairs.lengths - 1]
        return last[rows, pairs.answer] - last[rows, pairs.wrong]

    with torch.no_grad():
        corrupt_logits, cache = model.run_with_cache(pairs.corrupt)
        clean, corrupt = metric(model(pairs.clean)), metric(corrupt_logits)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(len(nodes), requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(steps):
        torch.randperm(1, generator=generator)  # the order of the groups, of which there is one
        sizes = torch.randint(1, len(nodes), (len(pairs),), generator=generator).tolist()
        gates = kept(torch.stack([top_k(scores, k, 0.5) for k in sizes]))
        hooks = []
        for layer in range(3):
            heads = [nodes.position(f"a{layer}.h{head}") for head in range(4)]
            mlp = nodes.position(f"m{layer}")
            z, out = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"

            def mix_heads(now, hook, g=gates[:, heads], name=z):
                return g[:, None, :, None] * now + (1 - g[:, None, :, None]) * cache[name]

            def mix_mlp(now, hook, g=gates[:, mlp], name=out):
                return g[:, None, None] * now + (1 - g[:, None, None]) * cache[name]

            hooks += [(z, mix_heads), (out, mix_mlp)]
        loss = loss_of(metric(model.run_with_hooks(pairs.clean, fwd_hooks=hooks)), clean, corrupt).mean()
        optimizer.zero_grad()
        (scores.grad,) = torch.autograd.grad(loss, [scores])
        optimizer.step()
    return scores.detach()


LOSSES = {
    ("metric", "denoising"): lambda found, clean, corrupt: -found,
    ("closeness", "denoising"): lambda found, clean, corrupt: (found - clean).abs(),
    ("metric", "noising"): lambda found, clean, corrupt: found,
    ("closeness", "noising"): lambda found, clean, corrupt: (found - corrupt).abs(),
}


@pytest.mark.parametrize(("objective", "direction"), LOSSES)
def test_matryoshka_is_the_loop_by_hand(model, pairs, objective, direction):
    nodes = dfa.NodeSet.heads_and_mlps(model)
    kept = (lambda gates: 1 - gates) if direction == "noising" else (lambda gates: gates)
    expected = by_hand(model, pairs, nodes, 6, 3, LOSSES[objective, direction], kept)
    method = Matryoshka(iterations=6, objective=objective, direction=direction)
    found = dfa.attribute(model, pairs, method=method, seed=3)
    torch.testing.assert_close(found.values, expected - expected.min(), atol=2e-4, rtol=1e-3)
    assert found.meta["options"]["objective"] == objective
    assert found.meta["seed"] == 3


def test_a_planted_circuit_comes_first():
    model, pairs = planted(), random_pairs(12, seed=5)
    scores = dfa.attribute(model, pairs, method=Matryoshka(iterations=30))
    assert set(scores.top(2)) == {"a0.h2", "a2.h1"}


def test_batches_change_nothing_groups_and_seeds_do(any_model, ragged):
    method = Matryoshka(iterations=8, examples=3)
    whole, single = (dfa.attribute(any_model, ragged, method=method, batch_size=size).values for size in (6, 1))
    torch.testing.assert_close(single, whole, atol=1e-3, rtol=1e-3)
    assert not torch.equal(dfa.attribute(any_model, ragged, method=method, seed=1).values, whole)
    assert not torch.equal(dfa.attribute(any_model, ragged, method=Matryoshka(iterations=8)).values, whole)


def test_the_embedding_can_be_ranked(zoo_source, unchanged):
    """It carries all clean information: in MIB's protocol nothing works without it, so it comes early."""
    nodes = dfa.NodeSet.heads_and_mlps(zoo_source, with_input=True)
    pairs = dfa.tasks.load("ioi", zoo_source.tokenizer, n=8)
    with unchanged(zoo_source):
        scores = dfa.attribute(zoo_source, pairs, nodes=nodes, method=Matryoshka(iterations=40))
    assert scores.ranks()[nodes.position("input")] <= 10
    curve = dfa.faithfulness_curve(zoo_source, pairs, scores, protocol="mib")
    assert curve.cpr > 0.5  # 0.25 where the embedding comes in last


def test_bad_options(any_model, pairs):
    def made(**options):
        return unchecked(Matryoshka.__init__)(object.__new__(Matryoshka), **options)

    with pytest.raises(DfaError, match="Unknown objective 'cpr'"):
        made(objective="cpr")
    for wrong, message in (({"iterations": 0}, "iterations must be"), ({"lr": 0.0}, "lr must be positive")):
        with pytest.raises(DfaError, match=message):
            made(**wrong)
    with pytest.raises(DfaError, match="at least two"):
        dfa.attribute(any_model, pairs, nodes=dfa.NodeSet.heads_and_mlps(any_model)["m0"], method="matryoshka")
