from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import made_curve, random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.data import statistics
from dfa_lens.data.curve import area, cpr_difference, default_sizes
from dfa_lens.data.statistics import StatisticsWarning
from dfa_lens.errors import DfaError, FaithfulnessError, ScoreError
from dfa_lens.models import hooks
from dfa_lens.models.runner import Runner

NODES = dfa.NodeSet.for_sizes(3, 4)


@pytest.fixture(scope="module")
def scores():
    return dfa.controls.random_scores(NODES)


def test_end_points(model, ragged, scores):
    curve = dfa.faithfulness_curve(model, ragged, scores, batch_size=4)
    assert curve.sizes.tolist() == list(range(16))
    assert curve.fractions[0] == 0 and curve.fractions[-1] == 1
    assert curve.faithfulness[-1] == 1
    assert curve.kl[-1] == pytest.approx(0, abs=1e-6)
    assert (curve.kl > -1e-6).all()
    np.testing.assert_allclose(curve.kl_per_example.mean(1), curve.kl)
    # f_0: the clean embedding, every node corrupt
    corrupt = {}
    with torch.no_grad():
        Runner(model).run(ragged.corrupt, ragged.lengths, hooks.record_hooks(NODES, corrupt))
        gates = hooks.gate_hooks(NODES, torch.zeros(15), corrupt=corrupt)
        logits = Runner(model).run(ragged.clean, ragged.lengths, gates)
    rows = torch.arange(len(ragged))
    empty = float((logits[rows, ragged.answer] - logits[rows, ragged.wrong]).mean())
    clean, corrupted = curve.clean_values.mean(), curve.corrupt_values.mean()
    assert curve.faithfulness[0] == pytest.approx((empty - corrupted) / (clean - corrupted), abs=1e-4)


def test_what_is_lost_is_told_without_labels(model, ragged, scores):
    """The KL as a part of the empty circuit's: other answers change the metric and leave it, and it has no unit."""
    sizes = [0, 5, 15]
    curve = dfa.faithfulness_curve(model, ragged, scores, sizes=sizes)
    swapped = dfa.faithfulness_curve(
        model, replace(ragged, answer=ragged.wrong, wrong=ragged.answer), scores, sizes=sizes
    )
    assert curve.per_example[0].mean() != pytest.approx(swapped.per_example[0].mean(), abs=1e-3)
    assert curve.relative_kl == pytest.approx(swapped.relative_kl, abs=1e-6)
    by_hand = np.trapezoid([1, curve.kl[1] / curve.kl[0], curve.kl[2] / curve.kl[0]], np.array(sizes) / 15)
    assert 0 < curve.relative_kl == pytest.approx(by_hand)
    for options in ({"sizes": [5, 15]}, {"sizes": sizes, "direction": "noising"}):
        with pytest.raises(FaithfulnessError, match="KL of the empty circuit is not known"):
            dfa.faithfulness_curve(model, ragged, scores, **options).relative_kl  # noqa: B018


def test_batching_changes_nothing(any_model, ragged, scores):
    curves = [dfa.faithfulness_curve(any_model, ragged, scores, batch_size=size) for size in (1, 4, 6)]
    for other in curves[1:]:
        np.testing.assert_allclose(other.per_example, curves[0].per_example, atol=1e-4)
        assert other.cpr == pytest.approx(curves[0].cpr, abs=1e-5)


def test_backends_agree(pairs, scores):
    from helpers import BACKENDS

    if len(BACKENDS) < 2:
        pytest.skip("one backend only")
    first, second = (dfa.faithfulness_curve(random_model(b), pairs, scores) for b in BACKENDS)
    np.testing.assert_allclose(first.faithfulness, second.faithfulness, atol=1e-4)


def test_only_the_ranking_matters(any_model, pairs, scores):
    moved = dfa.NodeScores(scores.values * 7 + 100, NODES)
    first, second = (dfa.faithfulness_curve(any_model, pairs, s) for s in (scores, moved))
    np.testing.assert_array_equal(first.faithfulness, second.faithfulness)
    absolute = dfa.faithfulness_curve(any_model, pairs, scores, ranking="absolute")
    assert absolute.cpr != first.cpr and (first.ranking, absolute.ranking) == ("signed", "absolute")
    by_size = dfa.NodeScores(scores.values, scores.nodes, {"ranking": "absolute"})  # their own ranking, unless asked
    assert dfa.faithfulness_curve(any_model, pairs, by_size) == absolute
    assert dfa.faithfulness_curve(any_model, pairs, by_size, ranking="signed").cpr == first.cpr


def test_mib_of_scores_without_input(any_model, pairs):
    """`input` gets score 0: with every other score positive it comes last, and no circuit but the whole is faithful."""
    positive = dfa.NodeScores(torch.arange(1.0, 16.0), NODES)
    curve = dfa.faithfulness_curve(any_model, pairs, positive, protocol="mib")
    assert curve.n_nodes == 16
    assert curve.sizes.tolist() == [0, 0, 0, 0, 0, 0, 1, 3, 8, 16]
    assert curve.faithfulness.tolist() == [0] * 9 + [1]
    assert curve.cpr == pytest.approx(0.25)
    assert curve.cmd == pytest.approx(0.749)
    # the same ranking, scores shifted: the embedding comes first
    negative = dfa.NodeScores(torch.arange(1.0, 16.0) - 100, NODES)
    assert dfa.faithfulness_curve(any_model, pairs, negative, protocol="mib").faithfulness[7] != 0


def test_areas_in_closed_form():
    line = made_curve([[0.0, 0], [1, 1], [2, 2]], [2, 2], [0, 0], [0, 1, 2], 2)
    assert line.faithfulness.tolist() == [0, 0.5, 1]
    assert line.cpr == pytest.approx(0.5)
    assert line.cmd == pytest.approx(0.5)
    assert line.floor == 0 and line.cmd_floor == 1  # f_0, on any grid
    assert line.grid_floor == pytest.approx(0.25)  # 0 at 0 and one half, 1 at the end
    assert line.at(1) == 0.5
    above = made_curve([[0.0], [4], [2]], [2], [0], [0, 1, 2], 2)  # a circuit that does better than the model
    assert above.faithfulness.tolist() == [0, 2, 1]
    assert above.cpr == pytest.approx(1.25)
    assert above.cmd == pytest.approx(0.75)


def test_the_ratio_of_means_not_the_mean_of_ratios():
    curve = made_curve([[1.0, 1.0]], [1.0, 3.0], [0.0, 0.0], [0], 1)
    assert curve.faithfulness[0] == pytest.approx(0.5)  # the mean of 1 and 1/3 would be 2/3


def test_interval_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    n = 40
    curve = made_curve(rng.normal(1, 1, (5, n)), rng.normal(3, 1, n), rng.normal(-1, 1, n), [0, 1, 2, 3, 4], 4)
    draws = []
    for _ in range(4000):
        i = rng.integers(n, size=n)
        c, k = curve.clean_values[i].mean(), curve.corrupt_values[i].mean()
        draws.append(area(curve.fractions, (curve.per_example[:, i].mean(1) - k) / (c - k)))
    interval = curve.cpr_interval()
    assert interval.low == pytest.approx(np.quantile(draws, 0.025), abs=0.01)
    assert interval.high == pytest.approx(np.quantile(draws, 0.975), abs=0.01)
    assert interval.low < curve.cpr < interval.high
    assert curve.cpr_interval() == interval  # seeded
    narrow = curve.cpr_interval(confidence=0.5)
    assert narrow.high - narrow.low < interval.high - interval.low
    assert curve.cmd_interval().low < curve.cmd < curve.cmd_interval().high


def test_one_example_has_no_interval():
    one = made_curve([[0.0], [0.5], [2.0]], [2.0], [0.0], [0, 1, 2], 2)
    for of in (one.cpr_interval, one.cmd_interval, one.band, lambda: cpr_difference(one, one).interval):
        with pytest.warns(StatisticsWarning, match="Of 1 example .* not defined: it is NaN"):
            found = of()
        assert np.isnan(found).all()
    with pytest.warns(StatisticsWarning):
        assert np.isnan(cpr_difference(one, one).p)
    with pytest.warns(StatisticsWarning):
        assert np.isnan(statistics.mean_interval([0.5]).high)
    assert one.cpr == pytest.approx(0.375)  # what is defined stays
    for options, message in (({"confidence": 1.0}, "between 0 and 1"), ({"resamples": 0}, "at least 1, not 0")):
        for of in (one.cpr_interval, one.band, lambda **kw: cpr_difference(one, one, **kw)):
            with pytest.raises(DfaError, match=message):
                of(**options)


def test_the_floor_is_that_of_the_empty_circuit(any_model, ragged, scores):
    """Whatever sizes were asked for: the floor is f_0; on a grid, up to its last size, where that is the whole model."""
    whole = dfa.faithfulness_curve(any_model, ragged, scores)
    empty = whole.faithfulness[0]
    assert abs(empty - whole.faithfulness[3]) > 0.02  # else the test would say nothing
    for sizes in ([3, 7, 15], [0, 7, 15], [2, 5], [0, 5]):
        for together in (1, 4):
            part = dfa.faithfulness_curve(any_model, ragged, scores, sizes=sizes, sizes_per_pass=together)
            assert part.sizes.tolist() == sizes
            np.testing.assert_allclose(part.per_example, whole.per_example[sizes], atol=1e-4)
            np.testing.assert_allclose(part.kl, whole.kl[sizes], atol=1e-5)
            np.testing.assert_allclose(part.empty_values, whole.per_example[0], atol=1e-4)
            f = [empty] * (len(sizes) - 1) + [1.0 if sizes[-1] == 15 else empty]
            np.testing.assert_allclose(part.floor_faithfulness, f, atol=1e-4)
            assert part.floor == pytest.approx(empty, abs=1e-4)
            assert part.cmd_floor == pytest.approx(abs(1 - empty), abs=1e-4)
            assert part.grid_floor == pytest.approx(np.trapezoid(f, np.array(sizes) / 15), abs=1e-4)
            assert part.at(0) == pytest.approx(empty, abs=1e-4) and part.at(15) == 1
            assert part.at(sizes[1]) == pytest.approx(whole.faithfulness[sizes[1]], abs=1e-4)


def test_the_floor_of_the_mib_protocol(any_model, pairs):
    """A model with more than a thousand nodes keeps one at the first fraction; the floor is .25 all the same."""
    negative = dfa.NodeScores(torch.arange(1.0, 16.0) - 100, NODES)  # `input` comes first
    for fractions in ([0.1, 0.5, 1.0], None):
        curve = dfa.faithfulness_curve(any_model, pairs, negative, protocol="mib", fractions=fractions)
        assert curve.floor_faithfulness.tolist() == [0.0] * (len(curve.sizes) - 1) + [1.0]
        np.testing.assert_array_equal(curve.empty_values, curve.corrupt_values)
        assert curve.floor == pytest.approx(0.25)
    assert curve.grid_floor == pytest.approx(0.25)


def test_a_curve_that_does_not_know_its_floor_is_refused():
    with pytest.raises(FaithfulnessError, match="empty_values must say"):
        made_curve([[1.0, 2.0], [2.0, 3.0]], [2.0, 3.0], [0.0, 0.0], [1, 2], 2)
    known = made_curve([[1.0, 2.0], [2.0, 3.0]], [2.0, 3.0], [0.0, 0.0], [1, 2], 2, empty_values=[0.5, 0.0])
    assert known.empty_faithfulness == pytest.approx(0.1)


@pytest.mark.parametrize("n", [1, 5, 54, 110, 700, 1056])
def test_default_sizes(n):
    sizes = default_sizes(n)
    assert sizes[0] == 0 and sizes[-1] == n
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= 60


def test_bad_input(any_model, pairs, scores):
    curve = unchecked(dfa.faithfulness_curve)
    with pytest.raises(FaithfulnessError, match="Unknown protocol 'node'.*Did you mean 'nodes'"):
        curve(any_model, pairs, scores, protocol="node")
    for sizes in ([3], [5, 2], [0, 16], [-1, 3], [2, 2]):
        with pytest.raises(FaithfulnessError, match="Sizes must be"):
            dfa.faithfulness_curve(any_model, pairs, scores, sizes=sizes)
    with pytest.raises(FaithfulnessError, match="not both"):
        dfa.faithfulness_curve(any_model, pairs, scores, sizes=[0, 1], fractions=[0.0, 1.0])
    with pytest.raises(FaithfulnessError, match=r"same mean metric \(1 and 1\)"):
        dfa.faithfulness_curve(any_model, pairs, scores, metric=lambda logits, batch: torch.ones(len(batch)))
    with pytest.raises(FaithfulnessError, match="mib protocol ranks the 16 nodes"):
        dfa.faithfulness_curve(any_model, pairs, dfa.controls.uniform(NODES["m*"]), protocol="mib")
    for metric in (None, 3, ["kl"]):
        with pytest.raises(DfaError, match="A metric is a name or a function"):
            unchecked(dfa.metrics.checked)(metric)
    with pytest.raises(DfaError, match="confidence must be between 0 and 1"):
        statistics.bootstrap(np.zeros(3), np.mean, confidence=2.0)


def test_scores_of_another_model(any_model, pairs):
    smaller = dfa.NodeScores(torch.randn(10), dfa.NodeSet.for_sizes(2, 4), {"model": "another"})
    with pytest.raises(ScoreError, match="first 2 of this model's 3 layers and come from 'another'"):
        dfa.faithfulness_curve(any_model, pairs, smaller)
    own = dfa.NodeScores(smaller.values, smaller.nodes)  # a subset of the model's own nodes
    assert dfa.faithfulness_curve(any_model, pairs, own).n_nodes == 10
    with pytest.raises(DfaError, match="made for another model"):
        dfa.faithfulness_curve(any_model, pairs, dfa.controls.uniform(dfa.NodeSet.for_sizes(3, 5)))


def test_a_metric_that_is_not_finite_is_an_error(pairs, scores):
    """Also for the built-in metrics: a model whose logits overflow gives no curve of NaN."""
    broken = random_model(seed=2)
    with torch.no_grad():
        for name, parameter in broken.named_parameters():
            if "unembed" in name or "lm_head" in name:
                parameter.fill_(float("nan"))
    with pytest.raises(DfaError, match="returned nan for example 0 of a batch: the model's logits overflow"):
        dfa.faithfulness_curve(broken, pairs, scores)


def test_correlation_and_paired_test(scores):
    from scipy import stats

    other = dfa.controls.random_scores(NODES, seed=5)
    found = statistics.correlation(scores, other)
    assert found.pearson == pytest.approx(np.corrcoef(scores.values, other.values)[0, 1], rel=1e-5)
    assert found.spearman == pytest.approx(stats.spearmanr(scores.values, other.values).statistic)
    assert found.sign_agreement == np.mean(np.sign(scores.values.numpy()) == np.sign(other.values.numpy()))
    with pytest.raises(ScoreError, match="constant"):
        statistics.correlation(scores, dfa.controls.uniform(NODES))
    with pytest.raises(DfaError, match="needs finite values"):
        statistics.paired_test([1.0, np.nan], [1.0, 2.0])
    with pytest.raises(DfaError, match="p-value of 'b' is nan"):
        statistics.holm({"a": 0.1, "b": np.nan})
    a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert statistics.paired_test(a, [x - 1 for x in a]) == pytest.approx(2 / 2**6)
    with pytest.raises(DfaError, match="two equally long lists"):
        statistics.paired_test([1.0], [2.0])


def test_random_pairs_helper_is_ragged():
    assert len(set(random_pairs(12, ragged=True).lengths.tolist())) > 1
