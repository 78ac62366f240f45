"""Rehearsals: each task without its family, judged on the model itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_model, random_pairs
from scipy import stats

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError


@pytest.fixture(scope="module")
def rehearsed():
    model = random_model(num_hidden_layers=3)
    pairs = {task: random_pairs(4, 6, seed=i) for i, task in enumerate("abc")}
    scores = {task: dfa.attribute(model, each, method="nap") for task, each in pairs.items()}
    measured = {task: dfa.measure(model, each) for task, each in pairs.items()}
    functional = dfa.fit_functional(scores, measured, trees=10, families={"a": "x", "b": "x"})
    return model, pairs, scores, measured, functional


def test_each_task_is_read_without_its_family(rehearsed):
    model, pairs, scores, measured, functional = rehearsed
    found = dfa.rehearse(functional, model, measured, pairs)
    assert found.tasks == tuple("abc") and found.families == ("x", "x", "c")
    for i, (task, teaching) in enumerate({"a": "c", "b": "c", "c": "ab"}.items()):
        rest = dfa.fit_functional({t: scores[t] for t in teaching}, {t: measured[t] for t in teaching}, trees=10)
        curve = dfa.faithfulness_curve(model, pairs[task], rest.transfer(measured[task]))
        assert (found.cpr[i], found.cmd[i]) == pytest.approx((curve.cpr, curve.cmd), abs=1e-5)
    assert found.to_frame()["cpr"].tolist() == found.cpr.tolist()


def test_tasks_that_did_not_teach_are_read_from_all(rehearsed):
    model, pairs, _, measured, functional = rehearsed
    rest = functional.without("c")
    found = dfa.rehearse(rest, model, {"c": measured["c"]}, {"c": pairs["c"]})
    whole = dfa.rehearse(functional, model, {"c": measured["c"]}, {"c": pairs["c"]})
    assert found == whole and found.families == ("c",)
    with pytest.raises(AlignmentError, match="two are needed"):
        found.interval()
    with pytest.raises(AlignmentError, match="need the same tasks"):
        dfa.rehearse(functional, model, measured, {"c": pairs["c"]})
    with pytest.raises(AlignmentError, match="between 0 and 1, not 2"):
        found.interval(confidence=2)


def test_the_better_ranking_is_chosen(rehearsed):
    """By the mean CMD of families; the circuits are those of the rehearsal, judged in both ways."""
    model, pairs, _, measured, functional = rehearsed
    chosen = dfa.choose_ranking(functional, model, measured, pairs)
    cmd = {}
    for ranking in ("signed", "absolute"):
        curves = {
            task: dfa.faithfulness_curve(
                model,
                pairs[task],
                functional.without(functional.meta["families"][task]).transfer(measured[task]),
                ranking=ranking,
            ).cmd
            for task in pairs
        }
        cmd[ranking] = ((curves["a"] + curves["b"]) / 2 + curves["c"]) / 2
        again = dfa.rehearse(functional, model, measured, pairs, ranking=ranking)
        assert again.cmd == pytest.approx(list(curves.values()), abs=1e-5)
        assert again.mean_cmd == pytest.approx(cmd[ranking], abs=1e-5)
    assert chosen.meta["rehearsed"] == pytest.approx(cmd, abs=1e-5)
    assert abs(cmd["signed"] - cmd["absolute"]) > 1e-3  # it matters here
    assert chosen.ranking == min(cmd, key=cmd.__getitem__)
    for ranking in ("signed", "absolute"):  # whatever it was before
        assert dfa.choose_ranking(replace(functional, ranking=ranking), model, measured, pairs) == chosen
    assert chosen.table is functional.table


def test_the_interval_holds_one_more_family():
    """Families whose CPR are normal: as many new ones are inside as was asked for."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        *known, new = rng.normal(0.7, 0.1, size=6)
        values = np.array(known)
        low, high = dfa.Rehearsal(tuple("abcde"), tuple("abcde"), values, 1 - values).interval(confidence=0.8)
        inside += low <= new <= high
    assert stats.binomtest(inside, 2000, 0.8).pvalue > 0.01


def test_relatives_count_once():
    values = np.array([0.2, 0.4, 0.9])
    families = dfa.Rehearsal(tuple("abc"), ("x", "x", "y"), values, values).interval()
    means = dfa.Rehearsal(("a", "b"), ("x", "y"), np.array([0.3, 0.9]), values[:2]).interval()
    assert families == pytest.approx(means)


def test_the_model_is_left_alone(rehearsed):
    model, pairs, _, measured, functional = rehearsed
    before = {name: each.clone() for name, each in model.named_parameters()}
    dfa.rehearse(functional, model, measured, pairs)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())
