"""Scores against finite differences, brute force, and a model whose circuit is known."""

import pytest
import torch
from helpers import float64_model, random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.errors import DfaError, PromptError
from dfa_lens.models import hooks
from dfa_lens.models.backend import is_bridge
from dfa_lens.models.runner import Runner

METHODS = ("nap", "nap-ig-inputs", "nap-ig-activations", "exact")


def metric_of(logits, pairs):
    rows = torch.arange(len(pairs))
    return (logits[rows, pairs.answer] - logits[rows, pairs.wrong]).mean()


def record(model, tokens, pairs, nodes):
    into = {}
    with torch.no_grad():
        Runner(model).run(tokens, pairs.lengths, hooks.record_hooks(nodes, into))
    return into


def blended(model, pairs, nodes, j, amount, clean, corrupt):
    """The metric when node j, and it alone, is at corrupt + amount·(clean - corrupt)."""
    node = nodes[j]

    def function(now):
        value = corrupt[node.point] + amount * (clean[node.point] - corrupt[node.point])
        if node.index is None:
            return value
        out = now.clone()
        out[:, :, node.index] = value[:, :, node.index]
        return out

    with torch.no_grad():
        return metric_of(Runner(model).run(pairs.clean, pairs.lengths, [(node.point, function)]), pairs)


@pytest.fixture(scope="module")
def double():
    return float64_model(seed=4)


@pytest.mark.parametrize("padded", [False, True])
def test_nap_is_the_derivative_along_the_difference(double, padded):
    """Moving one node along Δ from the clean run changes the metric at the rate of its nap score."""
    pairs = random_pairs(ragged=padded, seed=2)
    nodes = dfa.NodeSet.heads_and_mlps(double)
    clean, corrupt = record(double, pairs.clean, pairs, nodes), record(double, pairs.corrupt, pairs, nodes)
    scores = dfa.attribute(double, pairs, method="nap", batch_size=4)
    h = 1e-5
    for j in range(len(nodes)):
        up, down = (blended(double, pairs, nodes, j, 1 + step, clean, corrupt) for step in (h, -h))
        torch.testing.assert_close(scores.values[j].double(), (up - down) / (2 * h), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_exact_is_two_forward_passes(double, padded):
    pairs = random_pairs(ragged=padded, seed=2)
    nodes = dfa.NodeSet.heads_and_mlps(double)
    clean, corrupt = record(double, pairs.clean, pairs, nodes), record(double, pairs.corrupt, pairs, nodes)
    scores = dfa.attribute(double, pairs, method="exact", batch_size=4)
    whole = blended(double, pairs, nodes, 0, 1.0, clean, corrupt)
    for j in range(len(nodes)):
        effect = whole - blended(double, pairs, nodes, j, 0.0, clean, corrupt)
        torch.testing.assert_close(scores.values[j].double(), effect, atol=1e-5, rtol=1e-5)


def test_ig_activations_converge_to_the_exact_effect_of_an_mlp(double, pairs):
    """The path integral of a group of one node is that node's exact effect."""
    nodes = dfa.NodeSet.heads_and_mlps(double)["m*"]
    exact = dfa.attribute(double, pairs, nodes=nodes, method="exact")
    coarse = dfa.attribute(double, pairs, nodes=nodes, method="nap-ig-activations", steps=50)
    fine = dfa.attribute(double, pairs, nodes=nodes, method="nap-ig-activations", steps=200)
    assert (fine.values - exact.values).abs().max() < 0.3 * (coarse.values - exact.values).abs().max()
    torch.testing.assert_close(fine.values, exact.values, atol=0.05, rtol=0.02)
    completeness = fine.meta["completeness"]
    assert completeness["residual"] < 0.02
    assert completeness["expected"] == pytest.approx(float(exact.values.sum()), rel=1e-4)
    assert completeness["explained"] == pytest.approx(float(fine.values.sum()), rel=1e-4)


def test_ig_inputs_of_the_embedding_converge_to_the_metrics_change(double, pairs):
    nodes = dfa.NodeSet.heads_and_mlps(double, with_input=True)
    scores = dfa.attribute(double, pairs, nodes=nodes, steps=300)
    with torch.no_grad():
        clean = metric_of(Runner(double).run(pairs.clean, pairs.lengths), pairs)
        corrupt = metric_of(Runner(double).run(pairs.corrupt, pairs.lengths), pairs)
    assert scores.meta["completeness"]["expected"] == pytest.approx(float(clean - corrupt), rel=1e-6)
    assert scores.meta["completeness"]["explained"] == pytest.approx(scores["input"], rel=1e-5)
    assert scores["input"] == pytest.approx(float(clean - corrupt), rel=0.05)


def test_nap_is_ig_inputs_of_one_step(model, pairs):
    one = dfa.attribute(model, pairs, steps=1)
    torch.testing.assert_close(dfa.attribute(model, pairs, method="nap").values, one.values)


@pytest.mark.parametrize("method", METHODS)
def test_batching_changes_nothing(model, ragged, method):
    results = [dfa.attribute(model, ragged, method=method, steps=2, batch_size=size).values for size in (1, 4, 6)]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-5 * float(results[0].abs().max()), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_extra_padding_changes_nothing(any_model, pairs, method):
    wide = dfa.PromptPairs.concat([pairs, random_pairs(1, 14, seed=9)])
    wide = dfa.PromptPairs(
        clean=wide.clean[:-1].index_fill(1, torch.arange(10, 14), 7),  # padding is any token at all
        corrupt=wide.corrupt[:-1],
        answer=wide.answer[:-1],
        wrong=wide.wrong[:-1],
        lengths=wide.lengths[:-1],
    )
    expected = dfa.attribute(any_model, pairs, method=method, steps=2).values
    found = dfa.attribute(any_model, wide, method=method, steps=2, batch_size=6).values
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def planted(backend="auto"):
    """A random model in which only a0.h2 and a2.h1 write anything: whatever it answers, it answers by them."""
    model = random_model(backend, seed=7)
    alive = {(0, 2), (2, 1)}
    with torch.no_grad():
        for layer in range(3):
            if hasattr(model, "blocks") and hasattr(model.blocks[layer].attn, "W_O") and not is_bridge(model):
                for head in range(4):
                    if (layer, head) not in alive:
                        model.blocks[layer].attn.W_O[head] = 0
                model.blocks[layer].mlp.W_out.zero_()
            else:
                block = model.original_model.model.layers[layer]
                weight = getattr(block.self_attn.o_proj, "original_component", block.self_attn.o_proj).weight
                for head in range(4):
                    if (layer, head) not in alive:
                        weight[:, head * 8 : (head + 1) * 8] = 0
                getattr(block.mlp.down_proj, "original_component", block.mlp.down_proj).weight.zero_()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_circuit_is_found(method):
    scores = dfa.attribute(planted(), random_pairs(12, seed=5), method=method)
    others = [scores[name] for name in scores.nodes.names if name not in ("a0.h2", "a2.h1")]
    assert max(map(abs, others)) < 1e-6
    assert min(abs(scores["a0.h2"]), abs(scores["a2.h1"])) > 1e-3


def test_a_planted_circuit_is_found_by_training():
    model = planted()
    nodes = dfa.NodeSet.heads_and_mlps(model)
    source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
    alignment = dfa.fit(model, {"task": source}, {"task": random_pairs(16, seed=5)}, sparsity_weight=0.3, steps=120)
    mask = alignment.mask(source)
    kept = {nodes.names[i] for i in (mask > 0.5).nonzero()[:, 0].tolist()}
    assert kept == {"a0.h2", "a2.h1"}
    curve = dfa.faithfulness_curve(model, random_pairs(16, seed=6), alignment.transfer(source), sizes=range(16))
    assert curve.faithfulness[2] == pytest.approx(1.0, abs=1e-4)


def test_determinism(any_model, pairs):
    first, second = (dfa.attribute(any_model, pairs).values for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(pairs, dtype):
    """Sixty-four times the same examples must not change the mean, as they do when sums run in half precision."""
    model = random_model().to(dtype)
    many = dfa.PromptPairs.concat([pairs] * 64)
    few = dfa.attribute(model, pairs, method="nap", batch_size=6).values
    torch.testing.assert_close(dfa.attribute(model, many, method="nap", batch_size=6).values, few, atol=1e-6, rtol=1e-5)
    assert few.dtype == torch.float32


def test_metrics(any_model, pairs):
    def own(logits, batch):
        return logits[torch.arange(len(batch)), batch.answer] - logits[torch.arange(len(batch)), batch.wrong]

    usual = dfa.attribute(any_model, pairs, method="nap").values
    torch.testing.assert_close(dfa.attribute(any_model, pairs, method="nap", metric=own).values, usual)
    log = dfa.attribute(any_model, pairs, method="nap", metric="log-probability-difference").values
    torch.testing.assert_close(log, usual, atol=1e-4, rtol=1e-3)
    assert dfa.attribute(any_model, pairs, method="nap", metric="kl").values.abs().max() < 1e-4
    assert dfa.attribute(any_model, pairs, metric="kl").values.abs().max() > 1e-2
    probability = dfa.attribute(any_model, pairs, method="exact", metric="probability-difference").values
    assert probability.abs().max() <= 2


def test_auto_steps_settle(any_model, pairs):
    with pytest.warns(dfa.IntegrationWarning, match="still move"):
        dfa.attribute(any_model, pairs, steps="auto", tolerance=1e-9)
    scores = dfa.attribute(any_model, pairs, steps="auto", tolerance=0.5)
    assert scores.meta["settled"] <= 0.5
    assert scores.meta["steps"] in (10, 20, 40, 80)


@pytest.mark.filterwarnings("default")
def test_too_few_steps_warn(any_model, pairs):
    with pytest.warns(dfa.IntegrationWarning, match=r"unexplained .* compare with nap-ig-activations or exact"):
        dfa.attribute(any_model, pairs, steps=1)
    with pytest.warns(dfa.IntegrationWarning, match=r"unexplained .* take more steps, or steps='auto'"):
        dfa.attribute(any_model, pairs, steps=1, method="nap-ig-activations")


def test_bad_input(any_model, pairs):
    attribute = unchecked(dfa.attribute)
    with pytest.raises(DfaError, match=r"Unknown method 'nup': expected one of 'nap', .*Did you mean 'nap'"):
        attribute(any_model, pairs, method="nup")
    for steps in (0, -1, 1.5):
        with pytest.raises(DfaError, match="steps must be a whole number"):
            attribute(any_model, pairs, steps=steps)
    with pytest.raises(DfaError, match="Unknown metric 'logits'"):
        attribute(any_model, pairs, metric="logits")
    with pytest.raises(DfaError, match=r"one number per example, \[6\]"):
        attribute(any_model, pairs, metric=lambda logits, batch: logits.sum())
    with pytest.raises(DfaError, match="returned nan for example 0"):
        attribute(any_model, pairs, metric=lambda logits, batch: logits[:, 0] * float("nan"))
    foreign = dfa.PromptPairs(clean=pairs.clean, corrupt=pairs.corrupt, answer=pairs.answer + 500, wrong=pairs.wrong)
    with pytest.raises(PromptError, match="vocabulary has 101 tokens"):
        dfa.attribute(any_model, foreign)
    with pytest.raises(DfaError, match="can't be hooked"):
        unchecked(Runner)(torch.nn.Linear(1, 1))
