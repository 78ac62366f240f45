"""Metrics and areas against other libraries, closed forms and the model itself."""

import numpy as np
import pytest
import torch
from helpers import made_curve, random_pairs, unchecked
from scipy.spatial.distance import jensenshannon

import dfa_lens as dfa
from dfa_lens.data import metrics
from dfa_lens.errors import DfaError, FaithfulnessError, PromptError


@pytest.fixture(scope="module")
def drawn():
    """Logits of a run and of the clean run, and the pairs that they answer."""
    pairs = random_pairs(5, 4, vocabulary=21)
    logits, clean = torch.randn(2, 5, 21, generator=torch.Generator().manual_seed(0)) * 3
    return logits, clean, pairs


def test_divergence_is_that_of_torch_distributions():
    clean, logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=clean), categorical(logits=logits))
    found = metrics.divergence(clean.log_softmax(-1), logits.log_softmax(-1))
    torch.testing.assert_close(found, expected)
    assert float(metrics.divergence(clean.log_softmax(-1), clean.log_softmax(-1)).abs().max()) == pytest.approx(0)


def test_jensen_shannon_is_that_of_scipy(drawn):
    logits, clean, pairs = drawn
    found = metrics.METRICS["js"](logits, pairs, clean)
    p, q = (each.double().softmax(-1).numpy() for each in (clean, logits))
    np.testing.assert_allclose(found.numpy(), -(jensenshannon(p, q, axis=1) ** 2), rtol=1e-5)
    assert metrics.METRICS["js"](clean, pairs, clean).abs().max() < 1e-6
    apart = torch.full((2, 5, 21), -1e9)
    apart[0, :, 0] = apart[1, :, 1] = 0
    torch.testing.assert_close(metrics.METRICS["js"](apart[0], pairs, apart[1]), torch.full((5,), -np.log(2)).float())


def test_each_metric_is_its_closed_form(drawn):
    logits, clean, pairs = drawn
    rows = np.arange(5)
    right, wrong = pairs.answer.numpy(), pairs.wrong.numpy()
    p = logits.double().softmax(-1).numpy()
    own, cleaned = (each.double().numpy() for each in (logits, clean))
    difference = own[rows, right] - own[rows, wrong]
    expected = {
        "logit-difference": difference,
        "normalised-logit-difference": difference / np.abs(cleaned[rows, right] - cleaned[rows, wrong]),
        "probability-difference": p[rows, right] - p[rows, wrong],
        "log-probability-difference": difference,
        "log-probability": np.log(p[rows, right]),
        "top-1-accuracy": (own.argmax(1) == right).astype(float),
        "top-5-accuracy": np.array([right[i] in np.argsort(-own[i])[:5] for i in rows]).astype(float),
    }
    for name, values in expected.items():
        found = metrics.checked(name)(logits, pairs, clean)
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-4, atol=1e-6, err_msg=name)
    assert set(expected) | {"kl", "js"} == set(metrics.METRICS)
    assert 0 < expected["top-5-accuracy"].mean() < 1


def test_greater_than_is_the_mass_above_less_the_rest():
    """Every threshold, token by token."""
    numbers = (7, 3, 12, 5)  # tokens of 0, 1, 2, 3
    metric = metrics.GreaterThan(numbers)
    logits = torch.randn(3, 15, generator=torch.Generator().manual_seed(1))
    pairs = random_pairs(3, 4, vocabulary=15)
    import dataclasses

    for threshold in range(4):
        wrong = torch.full((3,), numbers[threshold])
        own = dataclasses.replace(pairs, answer=wrong + 1, wrong=wrong, choices=None, corrupt_choices=None)
        p = logits.double().softmax(-1)
        expected = sum(p[:, t] * (1 if i > threshold else -1) for i, t in enumerate(numbers))
        torch.testing.assert_close(metric(logits, own).double(), expected, atol=1e-6, rtol=1e-5)
    foreign = dataclasses.replace(pairs, answer=torch.tensor([1, 1, 1]), wrong=torch.tensor([3, 4, 3]))
    with pytest.raises(DfaError, match=r"wrong answer of example 1 \(token 4\) is none of the numbers"):
        metric(logits, foreign)
    with pytest.raises(DfaError, match="at least two"):
        metrics.GreaterThan((1, 1))


def test_numbers_of_a_tokenizer():
    tokenizer = dfa.zoo.load("llama3-tiny-source").tokenizer
    metric = metrics.GreaterThan.of(tokenizer, range(10, 15), form=" {}")
    assert [tokenizer.decode([token]).strip() for token in metric.numbers] == ["10", "11", "12", "13", "14"]
    with pytest.raises(DfaError, match="is to be one"):
        metrics.GreaterThan.of(tokenizer, range(3), form=" {0} {0}")


def test_metrics_in_operations(any_model):
    """The clean run's logits arrive, and two columns are enough where they should be: one MLP block by hand."""
    pairs = random_pairs(4, 6, seed=3)
    point, seen = "blocks.1.hook_mlp_out", {}
    with torch.no_grad():
        clean = any_model(pairs.clean)[:, -1]
        any_model.run_with_hooks(pairs.corrupt, fwd_hooks=[(point, lambda a, hook: seen.update(at=a.clone()))])
        broken = any_model.run_with_hooks(pairs.clean, fwd_hooks=[(point, lambda a, hook: seen["at"])])[:, -1]
    for metric in ("normalised-logit-difference", "js", "log-probability"):
        exact = dfa.attribute(any_model, pairs, method="exact", metric=metric)
        assert exact.meta["metric"] == metric
        by_hand = (metrics.METRICS[metric](each, pairs, clean).mean() for each in (clean, broken))
        expected = float(next(by_hand) - next(by_hand))
        assert float(exact.values[exact.nodes.position("m1")]) == pytest.approx(expected, abs=1e-5)
    # the last block's slope, by autograd
    leaf = []

    def cut(activation, hook):
        leaf.append(activation.detach().clone().requires_grad_(True))
        return leaf[0]

    last = "blocks.2.hook_mlp_out"
    with torch.no_grad():
        any_model.run_with_hooks(pairs.corrupt, fwd_hooks=[(last, lambda a, hook: seen.update(last=a.clone()))])
    log_p = any_model.run_with_hooks(pairs.clean, fwd_hooks=[(last, cut)])[:, -1].log_softmax(-1)
    (gradient,) = torch.autograd.grad(log_p[torch.arange(4), pairs.answer].mean(), leaf)
    slope = float(((leaf[0].detach() - seen["last"]) * gradient).sum())
    found = dfa.attribute(any_model, pairs, method="nap", metric="log-probability")
    assert float(found.values[found.nodes.position("m2")]) == pytest.approx(slope, rel=1e-4, abs=1e-5)
    by_object = dfa.attribute(any_model, pairs, method="exact", metric=metrics.LogProbability())
    assert torch.equal(by_object.values, exact.values)
    assert by_object.meta["metric"] == "log-probability"
    plain = dfa.attribute(any_model, pairs, method="nap")
    single = dfa.attribute(any_model, pairs[0], method="nap", metric="normalised-logit-difference")
    of_one = dfa.attribute(any_model, pairs[0], method="nap")
    scale = abs(of_one.meta["metric_clean"])
    torch.testing.assert_close(single.values * scale, of_one.values, atol=1e-5, rtol=1e-4)
    curve = dfa.faithfulness_curve(any_model, pairs, plain, metric=metrics.TopK(50), sizes=[0, 15])
    assert set(np.unique(curve.per_example)) <= {0.0, 1.0}
    with pytest.raises(DfaError, match="'top-1-accuracy' has no gradient, which 'nap' takes"):
        dfa.attribute(any_model, pairs, method="nap", metric="top-1-accuracy")
    with pytest.raises(DfaError, match="'top-3-accuracy' has no gradient, which 'eap' takes"):
        dfa.attribute_edges(any_model, pairs, method="eap", metric=metrics.TopK(3))


def test_an_answer_of_several_tokens_is_a_sum_over_its_tokens(any_model):
    """Token by token with what came before, against one pass of the model over prompt and answer."""
    pairs = random_pairs(3, 6, ragged=True, seed=5)
    answers = [[5, 9, 11], [7], [3, 4]]
    spelled, of = pairs.spelled_out(answers)
    assert of.tolist() == [0, 0, 0, 1, 2, 2]
    assert spelled.answer.tolist() == [5, 9, 11, 7, 3, 4]
    circuit = dfa.Circuit(dfa.NodeSet.for_sizes(3, 4).names[:9], dfa.NodeSet.for_sizes(3, 4))
    run = dfa.circuits.run(any_model, spelled, circuit, metric="log-probability")
    sums = {name: np.bincount(of, weights=getattr(run, name)) for name in ("clean_values", "corrupt_values", "values")}
    for i, answer in enumerate(answers):
        for name, prompts in (("clean_values", pairs.clean), ("corrupt_values", pairs.corrupt)):
            whole = torch.cat([prompts[i, : pairs.lengths[i]], torch.tensor(answer)])
            with torch.no_grad():
                log_p = any_model(whole[None])[0].log_softmax(-1)
            at = torch.arange(len(answer)) + int(pairs.lengths[i]) - 1
            assert sums[name][i] == pytest.approx(float(log_p[at, torch.tensor(answer)].sum()), abs=1e-4)
    assert (np.abs(sums["values"] - sums["clean_values"]) > 1e-3).any()
    with pytest.raises(PromptError, match="3 pairs need 3 answers, not 2"):
        pairs.spelled_out(answers[:2])
    with pytest.raises(PromptError, match="answer of pair 1 has no tokens"):
        pairs.spelled_out([[1], [], [2]])


def test_random_answers_are_a_control():
    pairs = dfa.tasks.load("addition", dfa.zoo.load("llama3-tiny-source").tokenizer, n=32)
    control = pairs.with_random_answers(seed=1)
    assert torch.equal(control.clean, pairs.clean)
    assert torch.equal(control.corrupt, pairs.corrupt)
    assert set(control.answer.tolist()) <= set(pairs.answer.tolist()) | set(pairs.wrong.tolist())
    for own in (control.answer, control.wrong):  # neither is an answer to either prompt
        assert not ((own == pairs.answer) | (own == pairs.wrong)).any()
    assert (control.answer != control.wrong).all()
    assert control == pairs.with_random_answers(seed=1)
    assert control != pairs.with_random_answers(seed=2)
    by_task = dfa.tasks.load("addition", dfa.zoo.load("llama3-tiny-source").tokenizer, n=32, seed=1, control=True)
    plain = dfa.tasks.load("addition", dfa.zoo.load("llama3-tiny-source").tokenizer, n=32, seed=1)
    assert by_task == plain.with_random_answers(seed=1)
    with pytest.raises(PromptError, match="at least four different"):
        random_pairs(1).with_random_answers()


def test_areas_on_other_axes():
    """Against the integral of a straight line, by hand."""
    f = np.array([0.0, 0.25, 0.5, 1.0])
    curve = made_curve(f[:, None] * 4 - 2, [2.0], [-2.0], [0, 25, 50, 100], 100)
    assert curve.area() == pytest.approx(curve.cpr)
    assert curve.area("distance") == pytest.approx(curve.cmd)
    assert curve.area("metric") == pytest.approx(4 * 0.5 - 2)
    log = np.log(2) * (0.25 + 0.5) / 2 + np.log(2) * (0.5 + 1) / 2  # from a quarter on; size 0 has no logarithm
    assert curve.area(axis="log") == pytest.approx(log)
    assert curve.area(axis="log", normalised=True) == pytest.approx(log / np.log(4))
    assert curve.area("metric", axis="log", normalised=True) == pytest.approx(4 * log / np.log(4) - 2)
    for options in ({"of": "cpr"}, {"axis": "cubic"}):
        with pytest.raises(FaithfulnessError, match="distance|linear"):
            unchecked(type(curve).area)(curve, **options)
    with pytest.raises(FaithfulnessError, match="two sizes above 0"):
        made_curve(f[:2, None], [1.0], [0.0], [0, 25], 100).area(axis="log")


def test_the_command_line_has_every_metric_areas_and_the_control(tmp_path):
    import json
    from types import SimpleNamespace

    from typer.testing import CliRunner

    from dfa_lens.cli import app, reading

    model = dfa.zoo.load("llama3-tiny-source")
    for name in metrics.METRICS:
        assert reading.metric(name, model) == name
    with pytest.raises(DfaError, match="Unknown metric 'greater'.*greater-than"):
        reading.metric("greater", model)

    def written(texts, **options):
        return {"input_ids": [[int(text)] for text in texts]}

    assert reading.metric("greater-than", SimpleNamespace(tokenizer=written)).numbers == tuple(range(100))
    pairs = dfa.tasks.load("ioi", model.tokenizer, split="test", n=4)
    scores = dfa.attribute(model, pairs, method="nap", metric="probability-difference")
    scores.save(tmp_path / "s.safetensors")
    control = pairs.with_random_answers(0)
    curve = dfa.faithfulness_curve(model, control, scores, metric="log-probability")
    command = f"evaluate --model llama3-tiny-source --task ioi -n 4 --scores {tmp_path}/s.safetensors --control --json"
    done = CliRunner().invoke(app, f"{command} --metric log-probability --areas".split(), catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["cpr"] == pytest.approx(curve.cpr, rel=1e-4)
    assert found["areas"]["metric"]["log"] == pytest.approx(curve.area("metric", axis="log"), rel=1e-4)
    scored = (
        f"attribute --model llama3-tiny-source --task ioi --split test -n 4 --method nap -o {tmp_path}/t.safetensors"
    )
    CliRunner().invoke(app, f"{scored} --metric probability-difference".split(), catch_exceptions=False)
    assert torch.allclose(dfa.NodeScores.load(tmp_path / "t.safetensors").values, scores.values, rtol=1e-4)
