"""Nodes at any hook point: everything works over them, and what must be equal is."""

import copy

import pytest
import torch
from families import hugging_face
from helpers import random_pairs

import dfa_lens as dfa
from dfa_lens.errors import HookError, NodeError
from dfa_lens.models import hooks
from dfa_lens.models.backend import PlainModel
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


# --- experts -------------------------------------------------------------------------------------------------------


def experts_by_hand(mlp, stream, family):
    """What each expert adds, [batch, pos, expert, d_model], from the weights; and what is added beside them."""
    probabilities = (stream @ mlp.gate.weight.T).softmax(-1)
    best = probabilities.topk(2, -1)
    weights = torch.zeros_like(probabilities).scatter(-1, best.indices, best.values)
    if family == "mixtral":  # the others leave them as they are
        weights = weights / weights.sum(-1, keepdim=True)
    gate, up = torch.einsum("bpd,efd->bpef", stream, mlp.experts.gate_up_proj).chunk(2, -1)
    neurons = torch.nn.functional.silu(gate) * up
    added = torch.einsum("bpef,edf->bped", neurons, mlp.experts.down_proj) * weights[..., None]
    shared = 0
    if hasattr(mlp, "shared_expert"):
        shared = mlp.shared_expert_gate(stream).sigmoid() * mlp.shared_expert(stream)
    return added, shared


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_experts_against_hooks_made_by_hand(family, unchanged):
    model, pairs = hugging_face(family), random_pairs(3, 8, ragged=True)
    rows = torch.arange(len(pairs))

    def run(tokens, change=lambda layer, now: now):
        seen, handles = {}, []
        for layer, block in enumerate(model.model.layers):

            def behind(mlp, args, out, layer=layer):
                added, shared = experts_by_hand(mlp, args[0], family)
                torch.testing.assert_close(added.sum(2) + shared, out, atol=1e-4, rtol=1e-4)
                seen[layer] = change(layer, added)
                if seen[layer].requires_grad:
                    seen[layer].retain_grad()
                return seen[layer].sum(2) + shared

            handles.append(block.mlp.register_forward_hook(behind))
        mask = (torch.arange(tokens.shape[1]) < pairs.lengths[:, None]).long()
        logits = model(tokens, attention_mask=mask).logits[rows, pairs.lengths - 1]
        for handle in handles:
            handle.remove()
        return seen, (logits[rows, pairs.answer] - logits[rows, pairs.wrong]).mean()

    nodes = dfa.NodeSet.from_points(model, {"blocks.{layer}.mlp.hook_experts": 2})
    assert len(nodes) == 3 * 4 and nodes[5].name == "blocks.1.mlp.hook_experts[1]"
    with unchanged(PlainModel(model)):
        nap = dfa.attribute(model, pairs, nodes=nodes, method="nap")
        some = nodes[[0, 6, 11]]
        exact = dfa.attribute(model, pairs, nodes=some, method="exact")
    with torch.no_grad():
        corrupt, _ = run(pairs.corrupt)
    clean, metric = run(pairs.clean)
    metric.backward()
    model.zero_grad()
    expected = [((clean[i] - corrupt[i]) * clean[i].grad).sum((0, 1, 3)) for i in range(3)]
    torch.testing.assert_close(nap.values, torch.cat(expected), atol=2e-4, rtol=2e-4)
    for node, score in zip(some, exact.values, strict=True):

        def without(layer, now, node=node):
            other = (torch.arange(4) == node.index)[:, None]
            return torch.where(other, corrupt[layer], now) if layer == node.layer else now

        with torch.no_grad():
            torch.testing.assert_close(score, metric.detach() - run(pairs.clean, without)[1], atol=2e-4, rtol=2e-4)
    # all of them together are the MLP, where no expert is shared
    if family != "qwen2_moe":
        mlps = dfa.attribute(model, pairs, nodes=dfa.NodeSet.heads_and_mlps(model)[["m0", "m1", "m2"]], method="nap")
        torch.testing.assert_close(nap.values.unflatten(0, (3, 4)).sum(1), mlps.values, atol=2e-4, rtol=2e-4)


def test_experts_that_are_not_of_that_kind_are_refused():
    model = copy.deepcopy(hugging_face("mixtral"))
    model.model.layers[0].mlp.gate.forward = lambda tokens: tokens
    with pytest.raises(HookError, match="can't be told apart .*: use 'hook_mlp_out'"):
        PlainModel(model).hook_dict["blocks.0.mlp.hook_experts"].parts(torch.zeros(1, 2, 32))
