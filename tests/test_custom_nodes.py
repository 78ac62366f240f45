"""Nodes at any hook point: everything works over them, and what must be equal is."""

import pytest
import torch
from helpers import random_pairs

import dfa_lens as dfa
from dfa_lens.errors import NodeError
from dfa_lens.models import hooks
from dfa_lens.models.runner import Runner

WIDTH = 10


def node_sets(model):
    of = dfa.NodeSet.from_points
    heads = dfa.NodeSet.heads_and_mlps(model).where(kind="head")
    return {
        "key-value heads of v": of(model, {"blocks.{layer}.attn.hook_v": 2}),
        "key-value heads of k": of(model, {"blocks.{layer}.attn.hook_k": 2}),
        "query heads": of(model, {"blocks.{layer}.attn.hook_q": 2}),
        "neurons": of(model, {"blocks.{layer}.mlp.hook_post": 2}),
        "attention layers": of(model, {"blocks.{layer}.hook_attn_out": None}),
        "residual streams": of(model, {"blocks.{layer}.hook_resid_pre": None}),
        "residual streams by position": of(model, {"blocks.{layer}.hook_resid_pre": 1}, n_positions=WIDTH),
        "attention patterns": of(model, {"blocks.{layer}.attn.hook_pattern": 1}),
        "patterns by query position": of(model, {"blocks.{layer}.attn.hook_pattern": 2}, n_positions=WIDTH),
        "last residual stream by position": of(model, {"blocks.2.hook_resid_post": 1}, n_positions=WIDTH),
        "final norm": of(model, {"ln_final.hook_normalized": None}),
        "heads and their values": heads + of(model, {"blocks.{layer}.attn.hook_v": 2}),
        "some neurons": of(model, {"blocks.{layer}.mlp.hook_post": 2})[5:60:3],
    }


NAMES = (
    "key-value heads of v",
    "key-value heads of k",
    "query heads",
    "neurons",
    "attention layers",
    "residual streams",
    "residual streams by position",
    "attention patterns",
    "patterns by query position",
    "last residual stream by position",
    "final norm",
    "heads and their values",
    "some neurons",
)


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_everything_works_over_any_nodes(model, name, ragged, unchanged):
    nodes = node_sets(model)[name]
    source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 3))
    with unchanged(model):
        scores = dfa.attribute(model, ragged, nodes=nodes)
        assert scores.values.any()
        fits = {
            (positions, cache): dfa.fit(
                model,
                {"a": source},
                {"a": ragged},
                nodes=nodes,
                steps=3,
                batch_size=4,
                cache=cache,
                positions=positions,
            ).W
            for positions in ("answer", "all")
            for cache in ("device", "recompute")
        }
        curve = dfa.faithfulness_curve(model, ragged, scores, sizes=sorted({0, len(nodes) // 2, len(nodes)}))
    for positions in ("answer", "all"):  # what is kept is what would be computed again
        torch.testing.assert_close(fits[positions, "device"], fits[positions, "recompute"], atol=1e-5, rtol=1e-4)
    assert curve.faithfulness[-1] == pytest.approx(1.0)
    assert len(dfa.plots.scores_heatmap(scores).data) >= 1


@pytest.mark.parametrize("name", ["neurons", "patterns by query position", "key-value heads of k"])
def test_exact_scores_by_hand(model, name, ragged):
    """Each of some nodes is set to its corrupt activation by indexing, without a mask."""
    nodes = node_sets(model)[name]
    some = nodes[[nodes.names[i] for i in (0, 3, len(nodes) - 1)]]
    scores = dfa.attribute(model, ragged, nodes=some, method="exact").values
    rows = torch.arange(len(ragged))

    def difference(logits):
        return (logits[rows, ragged.answer] - logits[rows, ragged.wrong]).mean()

    for node, score in zip(some, scores, strict=True):
        corrupt = {}

        def keep(now, corrupt=corrupt):
            corrupt["at"] = now.clone()

        def put(now, corrupt=corrupt, node=node):
            now = now.clone()
            index = (slice(None),) * node.axis + (node.index,)
            now[index] = corrupt["at"][index]
            return now

        with torch.no_grad():
            Runner(model).run(ragged.corrupt, ragged.lengths, [(node.point, keep)])
            clean = Runner(model).run(ragged.clean, ragged.lengths)
            patched = Runner(model).run(ragged.clean, ragged.lengths, [(node.point, put)])
        torch.testing.assert_close(score, difference(clean) - difference(patched), atol=1e-4, rtol=1e-4)


def test_the_whole_is_its_parts(any_model, ragged):
    """Gating all parts of a hook point alike is gating the whole of it."""
    of = dfa.NodeSet.from_points
    corrupt = {}
    wholes = of(any_model, {"blocks.1.hook_attn_out": None})
    heads = of(any_model, {"blocks.1.attn.hook_z": 2})
    stream = of(any_model, {"blocks.0.hook_resid_pre": None})
    places = of(any_model, {"blocks.0.hook_resid_pre": 1}, n_positions=WIDTH)
    with torch.no_grad():
        taps = hooks.record_hooks(wholes + heads + stream, corrupt)
        at_corrupt = Runner(any_model).run(ragged.corrupt, ragged.lengths, taps)

        def gated(nodes, value):
            gates = hooks.gate_hooks(nodes, torch.full((len(nodes),), value), corrupt=corrupt)
            return Runner(any_model).run(ragged.clean, ragged.lengths, gates)

        for value in (0.0, 0.4):
            # z is linear in the output, and on Llama there is no bias
            torch.testing.assert_close(gated(wholes, value), gated(heads, value), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(gated(stream, value), gated(places, value))
        # no clean information is left when the first stream is corrupt
        torch.testing.assert_close(gated(stream, 0.0), at_corrupt)


@pytest.mark.parametrize("cut", ["whole", "positions"])
def test_gradients_of_a_stream_add_up(model, cut, ragged):
    """The path integral of the first residual stream is the whole effect, however it is cut."""
    axis, options = (None, {}) if cut == "whole" else (1, {"n_positions": WIDTH})
    nodes = dfa.NodeSet.from_points(model, {"blocks.0.hook_resid_pre": axis}, **options)
    scores = dfa.attribute(model, ragged, nodes=nodes, method="nap-ig-activations", steps=100)
    whole = scores.meta["metric_clean"] - scores.meta["metric_corrupt"]
    assert float(scores.values.sum()) == pytest.approx(whole, rel=0.05)
    embedding = dfa.attribute(model, ragged, nodes=nodes, method="nap-ig-inputs", steps=100)
    torch.testing.assert_close(scores.values, embedding.values, atol=1e-3, rtol=1e-3)


def test_batches_of_different_width_change_nothing(model, ragged):
    nodes = node_sets(model)["residual streams by position"]
    for method in ("nap", "nap-ig-activations", "exact"):
        together = dfa.attribute(model, ragged, nodes=nodes, method=method, batch_size=6)
        apart = dfa.attribute(model, ragged, nodes=nodes, method=method, batch_size=1)
        torch.testing.assert_close(together.values, apart.values, atol=1e-5, rtol=1e-4)


def test_source_and_target_of_different_kinds(any_model, pairs):
    """Key-value heads of one model are carried to neurons and streams of another."""
    values = node_sets(any_model)["key-value heads of v"]
    scores = dfa.attribute(any_model, pairs, nodes=values)
    target = node_sets(any_model)["some neurons"] + node_sets(any_model)["residual streams"]
    alignment = dfa.fit(any_model, {"a": scores}, {"a": pairs}, nodes=target, steps=3)
    circuit = alignment.transfer(scores)
    assert circuit.nodes == target
    figure = dfa.plots.aligned_heatmap(scores, circuit, alignment=alignment, size=5)
    assert len(figure.data) >= 3


def test_saved_and_read_again(tmp_path, any_model, pairs):
    nodes = node_sets(any_model)["residual streams by position"]
    scores = dfa.attribute(any_model, pairs, nodes=nodes, method="nap")
    scores.save(tmp_path / "scores.safetensors")
    again = dfa.NodeScores.load(tmp_path / "scores.safetensors")
    assert again.nodes == nodes
    assert again.nodes.sites[0].by_position


def test_subsets():
    nodes = dfa.NodeSet.for_sizes(4, 2)
    assert nodes.where(layer=1).names == ("a1.h0", "a1.h1", "m1")
    assert nodes.where(layer=(0, 3), kind="mlp").names == ("m0", "m3")
    assert nodes.where(name="a*.h1", layer=range(2)).names == ("a0.h1", "a1.h1")
    assert nodes.where(lambda node: node.layer > 1, kind="mlp").names == ("m2", "m3")
    assert nodes["a3.*"] == nodes.where(name="a3.*")
    with pytest.raises(NodeError, match="None of the 12 nodes fulfils"):
        nodes.where(layer=7)


def test_bad_input(model):
    of = dfa.NodeSet.from_points
    with pytest.raises(NodeError, match="is the position in the prompt: say how many there are, n_positions="):
        of(model, {"blocks.0.hook_resid_pre": 1})
    with pytest.raises(NodeError, match="has 3 axes .* axis 3 can't be cut"):
        of(model, {"blocks.0.hook_resid_pre": 3})
    short = of(model, {"blocks.0.hook_resid_pre": 1}, n_positions=4)
    with pytest.raises(NodeError, match="was made for prompts of up to 4 tokens"):
        dfa.attribute(model, random_pairs(), nodes=short)
