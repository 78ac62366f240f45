"""Circuits of edges: against independent numbers, and against circuits of nodes."""

import json

import numpy as np
import pytest
import torch
from helpers import BACKENDS, plain_passes, random_model, random_pairs, unchecked
from test_edge_attribution import matrix
from test_reference import FOLDER, KINDS, NAMES, setting
from test_reference import pytestmark as hooked_only

import dfa_lens as dfa
from dfa_lens.data.curve import MIB_FRACTIONS
from dfa_lens.errors import FaithfulnessError, ModelError, ScoreError
from dfa_lens.models import stream

#: name of the reference curves → readers, where the random scores and those of EAP-IG are, how the curve is made
CURVES = {
    "curves": ("per-head", "random_scores", "scores", {"protocol": "mib"}),
    "curves_grouped": ("grouped", "random_scores_grouped", "scores_grouped", {"protocol": "mib"}),
    "curves_input_kept": ("per-head", "random_scores", "scores", {"fractions": MIB_FRACTIONS}),
}


@hooked_only
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curves", CURVES)
def test_reference(name, kind, curves):
    reference = json.loads((FOLDER / f"edges_{name}.json").read_text())[kind]
    model, pairs, *_ = setting(name, kind)
    readers, random, scored, options = CURVES[curves]
    edges = dfa.EdgeSet.of_model(model, readers=readers)
    for which, expected in reference[curves].items():
        ranked, ranking = which.split(".")
        values = reference[random] if ranked == "random" else reference[scored]["eap_ig_inputs.k_1_to_S"]
        scores = dfa.EdgeScores(matrix(values), edges)
        curve = dfa.faithfulness_curve(model, pairs, scores, ranking=ranking, batch_size=4, **options)
        assert curve.n_nodes == expected["n_edges"] and curve.unit == "edges"
        assert curve.sizes.tolist() == expected["k"]
        assert curve.live_sizes.tolist() == expected["k_pruned"]
        np.testing.assert_allclose(curve.faithfulness, expected["faithfulness"], atol=1e-5)
        assert curve.cpr == pytest.approx(expected["cpr"], abs=1e-5)
        assert curve.cmd == pytest.approx(expected["cmd"], abs=1e-5)
        if options.get("protocol") == "mib":
            assert curve.floor == pytest.approx(0.25) and curve.cmd_floor == pytest.approx(0.749)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("readers", ["grouped", "per-head"])
def test_all_edges_of_some_nodes_are_the_circuit_of_the_nodes(backend, readers):
    model, pairs = random_model(backend), random_pairs(n=3, width=8, ragged=True)
    edges = dfa.EdgeSet.of_model(model, readers=readers)
    values = torch.randperm(15, generator=torch.Generator().manual_seed(0)) - 7.0
    nodes = dfa.NodeScores(values, edges.nodes[1:])
    of_nodes = dfa.faithfulness_curve(model, pairs, nodes, sizes=[0, 4, 9, 15])
    scores = dfa.EdgeScores(torch.cat([torch.zeros(1), values])[:, None].expand(edges.shape), edges)
    n_edges = edges.existing.sum(1)[1:][nodes.order()].cumsum(0)
    sizes = [0, int(n_edges[3]), int(n_edges[8]), int(n_edges[14])]
    of_edges = dfa.faithfulness_curve(model, pairs, scores, sizes=sizes)
    np.testing.assert_allclose(of_edges.per_example, of_nodes.per_example, atol=2e-4)
    np.testing.assert_allclose(of_edges.kl, of_nodes.kl, atol=1e-4)
    np.testing.assert_allclose(of_edges.empty_values, of_nodes.empty_values, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("readers", ["grouped", "per-head"])
def test_one_edge_less_is_its_exact_effect(backend, readers):
    model, pairs = random_model(backend, family="qwen"), random_pairs(n=3, width=7)
    edges = dfa.EdgeSet.of_model(model, readers=readers)
    some = edges.choose(edges.where(writer="a*").sample(6).chosen)
    exact = dfa.attribute_edges(model, pairs, method="exact", edges=some)
    for edge in some:
        values = torch.ones(edges.shape)
        values[edges.position(tuple(edge))] = -1
        curve = dfa.faithfulness_curve(model, pairs, dfa.EdgeScores(values, edges), sizes=[0, 150])
        n = curve.n_nodes
        curve = dfa.faithfulness_curve(model, pairs, dfa.EdgeScores(values, edges), sizes=[n - 1, n])
        effect = curve.clean_values.mean() - curve.per_example[0].mean()
        assert effect == pytest.approx(exact[tuple(edge)], abs=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_cuts_and_batches_change_nothing(backend, monkeypatch):
    model, pairs = random_model(backend), random_pairs(n=3, width=20, seed=5)
    pairs.corrupt[:, :14] = pairs.clean[:, :14]
    pairs.corrupt[:, 15] = pairs.clean[:, 15] % 99 + 1
    scores = dfa.attribute_edges(model, pairs, method="eap", readers="per-head")
    short = dfa.faithfulness_curve(model, pairs, scores, sizes=[0, 60, 150])
    monkeypatch.setattr(stream, "TILE_BYTES", {"cpu": 10_000, "cuda": 10_000})
    plain_passes(monkeypatch)
    plain = dfa.faithfulness_curve(model, pairs, scores, sizes=[0, 60, 150], batch_size=2, share_prefix=False)
    np.testing.assert_allclose(short.per_example, plain.per_example, atol=2e-4)


def test_the_greedy_circuit_leads_to_the_logits(any_model, pairs):
    """Its live edges are all of its edges that are reached; from the top many lead nowhere."""
    scores = dfa.attribute_edges(any_model, pairs, method="eap")
    options = {"protocol": "mib", "sizes": [10, 30, 190]}
    top = dfa.faithfulness_curve(any_model, pairs, scores, **options)
    greedy = dfa.faithfulness_curve(any_model, pairs, scores, selection="greedy", **options)
    for i, k in enumerate((10, 30)):
        best = list(scores.top(k, selection="greedy"))
        chosen = torch.zeros(scores.edges.shape, dtype=torch.bool)
        for edge in best:
            chosen[scores.edges.position(edge)] = True
        assert greedy.live_sizes[i] == int(scores.edges.live(chosen).sum())
    assert greedy.live_sizes[-1] == top.live_sizes[-1] == 190
    assert greedy.faithfulness[-1] == 1


def test_edges_without_a_score_are_always_in(any_model, pairs):
    edges = dfa.EdgeSet.of_model(any_model)
    scores = dfa.EdgeScores(torch.randn(edges.shape), edges["m0", "*"])
    curve = dfa.faithfulness_curve(any_model, pairs, scores, sizes=[0, len(scores)])
    assert curve.n_nodes == len(scores)
    assert curve.faithfulness[-1] == 1
    assert curve.live_sizes.tolist() == [190 - len(scores) - 5, 190]  # nor what m0 reads matters then
    # without the edges of m0: as if m0 were ablated
    nodes = dfa.NodeSet.heads_and_mlps(any_model).where(name="m0")
    ablated = dfa.faithfulness_curve(any_model, pairs, dfa.NodeScores(torch.ones(1), nodes), sizes=[0, 1])
    np.testing.assert_allclose(curve.per_example, ablated.per_example, atol=2e-4)


def test_intervals_frame_and_repr(any_model, pairs):
    scores = dfa.attribute_edges(any_model, pairs, method="eap")
    curve = dfa.faithfulness_curve(any_model, pairs, scores, sizes=[0, 60, 150], ranking="absolute")
    low, high = curve.cpr_interval(resamples=200)
    assert low < curve.cpr < high
    assert curve.to_frame()["live_size"].tolist() == curve.live_sizes.tolist()
    assert "3 sizes of 162 edges" in repr(curve)


def test_the_model_is_left_as_it_was(model, pairs, unchanged):
    scores = dfa.attribute_edges(model, pairs, method="eap", readers="per-head")
    with unchanged(model):
        dfa.faithfulness_curve(model, pairs, scores, sizes=[0, 20, 100])


def made(edges):
    return dfa.EdgeScores(torch.ones(edges.shape), edges)


@pytest.mark.parametrize(
    ("scores", "options", "error", "message"),
    [
        (made(dfa.EdgeSet(5, 4, 2)), {}, ScoreError, r"belong to the EdgeSet\(\d+ edges of 5 layers.*another model"),
        (made(dfa.EdgeSet(3, 4, 1)), {}, ScoreError, "they come from another model"),
        (made(dfa.EdgeSet(3, 4, 2)["m*", "*"]), {"protocol": "mib"}, FaithfulnessError, "ranks all 190 edges"),
        (made(dfa.EdgeSet(3, 4, 2)["input", "*"]), {}, FaithfulnessError, "are always in the circuit"),
        (made(dfa.EdgeSet(3, 4, 2)), {"sizes": [3, 2]}, FaithfulnessError, "rising, and between 0 and 162"),
        (
            dfa.NodeScores(torch.ones(15), dfa.NodeSet.for_sizes(3, 4)),
            {"selection": "greedy"},
            FaithfulnessError,
            "edges",
        ),
    ],
)
def test_bad_input(any_model, pairs, scores, options, error, message):
    with pytest.raises(error, match=message):
        unchecked(dfa.faithfulness_curve)(any_model, pairs, scores, **options)


@pytest.mark.parametrize("point", ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"])
def test_models_without_edges_are_refused(any_model, pairs, point):
    """Where what reaches the stream is not the sum of what was written, for there is somebody's hook on it."""
    any_model.hook_dict[point].add_hook(lambda now, hook: 1.1 * now)
    try:
        with pytest.raises(ModelError, match="differs from the sum of its parts"):
            dfa.faithfulness_curve(any_model, pairs, made(dfa.EdgeSet.of_model(any_model)), sizes=[0, 20, 90])
    finally:
        any_model.reset_hooks()
