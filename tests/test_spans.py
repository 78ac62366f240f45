"""Nodes at spans of tokens, which align prompts of different lengths, against hooks written by hand."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from helpers import random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.data.content import fingerprint
from dfa_lens.data.nodes import SpanNode
from dfa_lens.data.spans import Spans
from dfa_lens.errors import DfaError, HookError, NodeError, PromptError

NODES = dfa.NodeSet.for_sizes(3, 4)
PLACES = {"subject": [(1, 3), (0, 2), None, (2, 4)], "answer": (-1, None)}


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def plain():
    return random_pairs(4, 8, ragged=True, seed=4)


@pytest.fixture(scope="module")
def schema():
    return dfa.Schema(PLACES, rest="rest")


def tokens_of(pairs, i, span):
    """By the definition: which tokens of prompt ``i`` are in a span."""
    n = int(pairs.lengths[i])
    subject = PLACES["subject"][i]
    own = set() if subject is None else set(range(*subject)) & set(range(n))
    answer = {n - 1} - own
    return {"subject": own, "answer": answer, "rest": set(range(n)) - own - answer}[span]


def hand_metric(model, pairs, out):
    """Each prompt by itself, without padding, with the nodes at spans ``out`` at their corrupt activations."""
    values = []
    for i in range(len(pairs)):
        n = int(pairs.lengths[i])
        seen, hooks = {}, []
        with torch.no_grad():
            keep = [(p, lambda a, hook, p=p: seen.__setitem__(p, a.clone())) for p in NODES.points]
            model.run_with_hooks(pairs.corrupt[i : i + 1, :n], fwd_hooks=keep)

        def replace(activation, hook, point, seen=seen, i=i):
            new = activation.clone()
            for node in out:
                if node.point != point:
                    continue
                for token in tokens_of(pairs, i, node.span):
                    if node.axis is None:
                        new[0, token] = seen[point][0, token]
                    else:
                        new[0, token, node.index] = seen[point][0, token, node.index]
            return new

        hooks = [(point, partial(replace, point=point)) for point in {node.point for node in out}]
        with torch.no_grad():
            logits = model.run_with_hooks(pairs.clean[i : i + 1, :n], fwd_hooks=hooks)[0, -1]
        values.append(float(logits[pairs.answer[i]] - logits[pairs.wrong[i]]))
    return np.array(values)


def test_exact_curves_and_circuits_are_those_of_hooks_by_hand(model, plain, schema, unchanged):
    pairs, nodes = schema.apply(plain), NODES.at_spans(schema.names)
    assert len(nodes) == 45
    with unchanged(model):
        scores = dfa.attribute(model, pairs, method="exact", nodes=nodes, batch_size=3)
        curve = dfa.faithfulness_curve(model, pairs, scores, sizes=[0, 20, 45], batch_size=3)
    whole = hand_metric(model, plain, ())
    for name in ("a0.h1@subject", "m1@answer", "a2.h3@answer", "m0@rest"):
        effect = float((whole - hand_metric(model, plain, [nodes[nodes.position(name)]])).mean())
        assert float(scores.values[nodes.position(name)]) == pytest.approx(effect, abs=1e-5), name
    order = scores.order("signed").tolist()
    out = [nodes[i] for i in order[20:]]
    np.testing.assert_allclose(curve.per_example[1], hand_metric(model, plain, out), atol=1e-5)
    run = dfa.circuits.run(model, pairs, scores.circuit(20))
    np.testing.assert_allclose(run.values, curve.per_example[1], atol=1e-5)


@pytest.mark.parametrize("method", ["nap", "nap-ig-activations"])
def test_the_spans_of_a_node_add_up_to_it(model, plain, schema, method):
    """Gradient scores are sums over tokens; in batches of any size, and where a beginning is shared."""
    before = torch.full((4, 5), 7)
    longer = {name: torch.cat([before, getattr(plain, name)], 1) for name in ("clean", "corrupt")}
    lengths = {name: getattr(plain, name) + 5 for name in ("lengths", "corrupt_lengths")}
    shared = dataclasses.replace(plain, **longer, **lengths)
    pairs, nodes = schema.apply(shared), NODES.at_spans(schema.names)
    whole = dfa.attribute(model, shared, method=method, steps=3)
    parts = [
        dfa.attribute(model, pairs, method=method, steps=3, nodes=nodes, batch_size=size, share_prefix=share)
        for size, share in ((16, True), (3, False))
    ]
    torch.testing.assert_close(parts[0].values, parts[1].values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts[0].values.reshape(15, 3).sum(1), whole.values, atol=1e-5, rtol=1e-4)
    assert (parts[0].values.reshape(15, 3)[:, 1].abs() > 1e-3).any()
    some = nodes[["m1@answer", "a0.h2@subject"]]
    few = dfa.attribute(model, pairs, method=method, steps=3, nodes=some)
    expected = parts[0].values[[nodes.position(name) for name in some.names]]
    torch.testing.assert_close(few.values, expected, atol=1e-5, rtol=1e-4)


def test_masks_have_a_gradient_at_every_span_and_for_every_pair(model, plain, schema):
    """Hooks, a fit, and an ablation, each with soft masks that differ from pair to pair."""
    pairs, nodes = schema.apply(plain), NODES.at_spans(schema.names)
    means = dfa.ablations.activations(model, pairs, "mean")
    masks = torch.rand(4, 45, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    with dfa.hooks.gate(model, nodes, masks, corrupt=means, spans=pairs.spans):
        together = model(pairs.clean)
    together.sum().backward()
    assert (masks.grad[0] != 0).sum() > 30
    assert (masks.grad[2].reshape(15, 3)[:, 0] == 0).all()  # pair 2 has no subject
    for i in (0, 2):
        one = pairs[i]
        own = {point: value[i : i + 1, : one.clean.shape[1]] for point, value in means.items()}
        with torch.no_grad(), dfa.hooks.gate(model, nodes, masks[i].detach(), corrupt=own, spans=one.spans):
            alone = model(one.clean)
        torch.testing.assert_close(together[i : i + 1, : one.clean.shape[1]], alone, atol=1e-4, rtol=1e-4)
    scores = dfa.NodeScores(torch.linspace(-1, 1, 45), nodes)
    assert dfa.fit(model, scores, pairs, steps=2, nodes=nodes).W.shape == (45, 45)
    with (
        pytest.raises(HookError, match="hand spans=pairs.spans to hooks"),
        dfa.hooks.gate(model, nodes, masks.detach(), corrupt=means),
    ):
        model(pairs.clean)


def test_a_schema_says_where_every_span_is(plain, schema):
    spans = schema.apply(plain).spans
    for i in range(4):
        for number, name in enumerate(schema.names):
            found = set((spans.labels[i] == number).nonzero()[:, 0].tolist())
            assert found == tokens_of(plain, i, name), (i, name)
    assert (spans.labels[torch.arange(8) >= plain.lengths[:, None]] == -1).all()
    without = dfa.Schema({"begin": (0, 1)}).apply(plain)
    assert (without.spans.labels[:, 1:] == -1).all()


def test_spans_of_texts():
    model = dfa.zoo.load("llama3-tiny-source")
    pairs = dfa.tasks.load("ioi", model.tokenizer, n=4)
    names = [model.tokenizer.decode([int(token)]) for token in pairs.answer]
    schema = dfa.Schema({"name": names})
    found = schema.apply(pairs)
    for i, name in enumerate(names):
        own = pairs.clean[i, : pairs.lengths[i]]
        at = (found.spans.labels[i] == 0).nonzero()[:, 0]
        assert model.tokenizer.decode(own[at].tolist()).strip() == name.strip()
        assert int(at[0]) == int((own == pairs.answer[i]).nonzero()[0])
    with pytest.raises(PromptError, match="clean prompt of pair 2 has no 'Zeppelin'"):
        dfa.Schema({"name": [*names[:2], "Zeppelin", names[3]]}).apply(pairs)


def test_spans_go_where_their_pairs_go(plain, schema):
    pairs = schema.apply(plain)
    assert torch.equal(pairs[2].spans.labels[0], pairs.spans.labels[2, : int(plain.lengths[2])])
    both = dfa.PromptPairs.concat([pairs[:1], pairs[1:]])
    assert both == pairs
    assert pairs != plain
    with pytest.raises(PromptError, match="apply one schema to all"):
        dfa.PromptPairs.concat([pairs, plain])
    spelled, _ = pairs.spelled_out([[3, 4]] * 4)
    assert torch.equal(spelled.spans.labels[1][: int(plain.lengths[0])], pairs.spans.labels[0, : int(plain.lengths[0])])
    assert (spelled.spans.labels[1][int(plain.lengths[0]) :] == -1).all()


def test_nodes_at_spans_are_saved_and_shown(tmp_path, schema):
    nodes = NODES.at_spans(schema.names)
    scores = dfa.NodeScores(torch.arange(45.0), nodes)
    scores.save(tmp_path / "s.safetensors")
    back = dfa.NodeScores.load(tmp_path / "s.safetensors")
    assert back.nodes == nodes
    assert isinstance(back.nodes[0], SpanNode)
    axes = dfa.plots.scores_heatmap(scores).select_xaxes()
    expected = {f"{kind} @ {span}" for kind in ("heads", "MLP") for span in schema.names}
    assert {axis.title.text for axis in axes} == expected
    with pytest.raises(DfaError, match="MIB's|at spans"):
        scores.to_mib(tmp_path / "s.json")


def test_what_goes_by_a_fingerprint_is_found_again(plain):
    """Pairs and node sets without spans go by the fingerprints that they had before there were spans."""
    assert (fingerprint(plain), fingerprint(NODES)) == (
        "0df2f073299140490872108675c7425d",
        "28ae1e422d03ab52457edd24aed461a7",
    )


def test_what_can_not_be_had_is_said_at_once(model, plain, schema):
    pairs, nodes = schema.apply(plain), NODES.at_spans(schema.names)
    with pytest.raises(DfaError, match="Schema"):
        dfa.attribute(model, plain, method="nap", nodes=nodes)
    with pytest.raises(PromptError, match="have no span 'verb'"):
        dfa.attribute(model, pairs, method="nap", nodes=NODES.at_spans(["verb"]))
    for places, what in (
        ({"x": "text"}, "needs a pair"),
        ({"x": [(0, 1)]}, "one for each of the 4 prompts"),
        ({"x": [(0, 1), 3, None, None]}, "of pair 1 is 3"),
        ({"x": ["a"] * 4}, "know no tokenizer"),
    ):
        with pytest.raises(PromptError, match=what):
            dfa.Schema(places).apply(plain)
    with pytest.raises(PromptError, match="different names"):
        dfa.Schema({"x": (0, 1)}, rest="x").apply(plain)
    with pytest.raises(NodeError, match="already"):
        nodes.at_spans(["x"])
    with pytest.raises(NodeError, match="some nodes are at spans"):
        dfa.NodeSet([*NODES["a0.h0"], *NODES["a0.h1"].at_spans(["x"])])
    with pytest.raises(PromptError, match="must be equal"):
        dataclasses.replace(plain, spans=Spans(("x",), torch.zeros(4, 3, dtype=torch.long)))
