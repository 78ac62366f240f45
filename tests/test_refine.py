"""Training an attention by its masks: the gradient against finite differences, and the loss of a held-out family."""

import pytest
import torch
from helpers import random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.data.nodes import NodeSet
from dfa_lens.errors import AlignmentError, MeasurementError
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner
from dfa_lens.transfer.refine import _divergence
from dfa_lens.transfer.store import ExampleStore


@pytest.fixture(scope="module")
def known():
    model = random_model()
    pairs = {task: random_pairs(4, 8, seed=i) for i, task in enumerate("abc")}
    scores = {task: dfa.attribute(model, each, method="nap") for task, each in pairs.items()}
    measured = {task: dfa.measure(model, each) for task, each in pairs.items()}
    return model, pairs, scores, measured


def test_training_lowers_the_loss_and_leaves_the_model(known, unchanged):
    model, pairs, scores, measured = known
    start = dfa.fit_functional(scores, measured, reader="attention", steps=5)
    before = {name: value.clone() for name, value in start.learned.items()}
    with unchanged(model):
        found = dfa.refine(start, model, measured, pairs, steps=30, lr=0.1)
    first, last = found.meta["refined"]["loss"]
    assert last < first - 0.05
    assert all(torch.equal(before[name], value) for name, value in start.learned.items())
    assert found != start and found.table is start.table
    assert not any(value.requires_grad for value in found.learned.values())
    assert found == dfa.refine(start, model, measured, pairs, steps=30, lr=0.1)


def test_the_masks_are_those_of_the_curve(known):
    """An open mask changes nothing; with a gradient that finite differences confirm."""
    model, pairs, *_ = known
    nodes, runner = NodeSet.heads_and_mlps(model), Runner(model)
    mask = torch.rand(len(nodes), generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    shared = {"intervention": "circuit", "positions": "answer", "cache": "device", "share_prefix": True}
    store, rows = ExampleStore(runner, nodes, {"a": pairs["a"]}, **shared), torch.arange(len(pairs["a"]))
    with runner.session():
        store.fill(8)
        assert float(_divergence(store, rows, torch.ones(len(nodes)))) < 1e-5
        loss = _divergence(store, rows, mask)
        (gradient,) = torch.autograd.grad(loss, mask)
        for i in gradient.abs().topk(3).indices.tolist():
            step = torch.zeros(len(nodes))
            step[i] = 1e-2
            ends = [float(_divergence(store, rows, mask.detach() + sign * step)) for sign in (1, -1)]
            assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(gradient[i]), rel=0.05)


def test_runs_are_made_once_or_at_every_step(known, monkeypatch):
    """What is learned is the same; with a cache, clean and corrupt runs are made before the first step only."""
    model, pairs, scores, measured = known
    start = dfa.fit_functional(scores, measured, reader="attention", steps=2)
    recorded, record = [], PairedRun.record

    def counted(self, run, **options):
        recorded.append(run)
        return record(self, run, **options)

    monkeypatch.setattr(PairedRun, "record", counted)
    found = {}
    for cache, n in (("device", 2), ("recompute", 2 * 6)):  # all pairs fit into one batch
        recorded.clear()
        found[cache] = dfa.refine(start, model, measured, pairs, steps=6, lr=0.1, batch_size=16, cache=cache)
        assert len(recorded) == n
    for name, value in found["device"].learned.items():
        torch.testing.assert_close(value, found["recompute"].learned[name], rtol=1e-3, atol=1e-4)


def test_a_task_is_read_from_other_families_only(known):
    """Other scores of its own family change nothing in what it teaches."""
    model, pairs, scores, measured = known
    families = {"a": "x", "b": "x", "c": "y"}

    def refined(given):
        start = dfa.fit_functional(given, measured, reader="attention", steps=1, families=families)
        same = dfa.fit_functional(scores, measured, reader="attention", steps=1, families=families)
        start = dfa.FunctionalAlignment(start.table, start.names, start.reader, same.learned, 0, 1.0, start.meta)
        return dfa.refine(start, model, {"a": measured["a"]}, {"a": pairs["a"]}, steps=2).learned

    plain = refined(scores)
    relative = refined(scores | {"b": dfa.controls.random_scores(scores["b"].nodes)})
    other = refined(scores | {"c": dfa.controls.random_scores(scores["c"].nodes)})
    assert all(torch.equal(plain[name], relative[name]) for name in plain)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_bad_input(known):
    model, pairs, scores, measured = known
    refine = unchecked(dfa.refine)
    with pytest.raises(AlignmentError, match="Only an 'attention' can be trained by its masks, not 'trees'"):
        refine(dfa.fit_functional(scores, measured, trees=2), model, measured, pairs)
    start = dfa.fit_functional(scores, measured, reader="attention", steps=1)
    with pytest.raises(AlignmentError, match="need the same tasks"):
        refine(start, model, measured, {"a": pairs["a"]})
    with pytest.raises(AlignmentError, match="lr positive"):
        refine(start, model, measured, pairs, lr=0)
    nodes = NodeSet.for_sizes(2, 2)
    foreign = dfa.Measurements(torch.zeros(6, len(measured["a"].names)), nodes, measured["a"].names)
    with pytest.raises(MeasurementError, match="The measurements of task 'a' are of another model"):
        refine(start, model, measured | {"a": foreign}, pairs)
