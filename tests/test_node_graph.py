"""Circuits in layers, two circuits side by side, layer × token: the figures' numbers are those of the values."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TOKENS, made_inspection

import dfa_lens as dfa
from dfa_lens.errors import CircuitError, PromptError, ScoreError

NODES = dfa.NodeSet.for_sizes(3, 4)
CIRCUIT = dfa.Circuit(["a0.h1", "a2.h3", "m1"], NODES, name="found")


def drawn(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def meaning(figure):
    """What the legend says of colours."""
    shown = figure.layout.showlegend
    return {trace.name: trace.marker.color for trace in figure.data if shown and trace.showlegend is not False}


def test_nodes_stand_where_they_are_and_say_what_they_are():
    scores = dfa.controls.random_scores(NODES)
    figure = dfa.plots.node_graph(CIRCUIT, scores=scores)
    inside, outside = drawn(figure, "circuit"), drawn(figure, "outside")
    assert list(inside.customdata) == ["a0.h1", "m1", "a2.h3"]
    assert list(zip(inside.x, inside.y, strict=True)) == [(1, 0), (4.3, 1), (3, 2)]
    assert inside.marker.symbol == ("circle", "square", "circle")
    assert len(outside.x) == len(NODES) - 3
    assert f"score {scores['m1']:+.4g}, rank {int(scores.ranks()[NODES.position('m1')])}" in inside.hovertext[1]
    table = figure.to_frame()
    np.testing.assert_array_equal(table["score"], scores.values.double())
    assert table["node"][table["in_circuit"]].tolist() == ["a0.h1", "m1", "a2.h3"]


def test_colours_go_by_the_sign_and_a_mask_has_no_blue():
    values = torch.zeros(len(NODES))
    values[[NODES.position("a0.h1"), NODES.position("m1")]] = torch.tensor([1.0, -1.0])
    plain = dfa.plots.node_graph(CIRCUIT, scores=dfa.NodeScores(values, NODES))
    assert list(drawn(plain, "circuit").marker.color) == ["#b2182b", "#2166ac", "#f7f7f7"]
    assert meaning(plain) == {"helps": "#b2182b", "hurts": "#2166ac"}
    assert meaning(dfa.plots.node_graph(CIRCUIT)) == {}
    meta = {"method": "transfer", "sparsity_weight": 3.0}
    masked = dfa.plots.node_graph(CIRCUIT, scores=dfa.NodeScores(values * 20, NODES, meta))
    assert meaning(masked) == {"mask 1 (kept)": "#b2182b", "mask 0 (left out)": "#f7f7f7"}
    mask = drawn(masked, "circuit")
    assert list(mask.marker.color) == ["#b2182b", "#f7f7f7", "#f4a582"]  # kept, left out, half
    assert "mask 0.500" in mask.hovertext[2]


def test_what_a_node_does():
    found = made_inspection(NODES)
    figure = dfa.plots.node_graph(CIRCUIT, inspection=found)
    table = figure.to_frame()
    np.testing.assert_allclose(table["direct"], found.direct)
    heads = {name: abs(float(found.direct[NODES.position(name)])) for name in ("a0.h1", "a2.h3")}
    first = max(heads, key=heads.get)  # a head of the circuit: m1 has no pattern to show
    words = figure.layout.annotations[0].text.replace("<br>", " ")
    assert words.startswith(f"<b>{first}</b> direct effect on logit(␣Mary) − logit(␣John): ")
    assert f"{float(found.direct[NODES.position(first)]):+.3f}" in words
    one = f"␣&lt;b&gt;{NODES.position(first)}\N{NO-BREAK SPACE}{1 + NODES.position(first) / 10:+.2f}"
    assert f"promotes {one}, x\N{NO-BREAK SPACE}+0.50" in words
    z = np.array(drawn(figure, "pattern").z, dtype=float)
    expected = found.pattern(first).numpy()
    rows = np.tril_indices(len(TOKENS))
    np.testing.assert_allclose(z[rows], expected[rows], atol=0.5 / 50 + 1e-6)
    assert np.isnan(z[np.triu_indices(len(TOKENS), 1)]).all()
    assert figure.layout.xaxis2.ticktext == ("&lt;bos&gt;", "␣John", "↵", "␣gave")
    assert drawn(figure, "pattern").x == ("0 &lt;bos&gt;", "1 ␣John", "2 ↵", "3 ␣gave")
    data = figure.reactions[-1].data
    assert set(data["words"]) == set(NODES.names)
    assert set(data["patterns"]) == {name for name in NODES.names if name[0] == "a"}
    assert len(data["patterns"]["a1.h0"]) == 4 * 5 / 2


def test_patterns_that_look_ahead_are_whole():
    found = made_inspection(NODES)
    whole = torch.full((12, 4, 4), 0.25)
    both = dfa.Inspection(NODES, TOKENS, "a", "b", found.direct, found.promoted, found.suppressed, whole)
    figure = dfa.plots.node_graph(CIRCUIT, inspection=both)
    assert not figure.reactions[-1].data["causal"]
    np.testing.assert_allclose(np.array(drawn(figure, "pattern").z, dtype=float), 0.25, atol=0.5 / 50)


def test_a_widget_shows_the_node_that_is_clicked():
    pytest.importorskip("anywidget")
    found = made_inspection(NODES)
    widget = dfa.plots.node_graph(CIRCUIT, inspection=found).widget()
    outside = drawn(widget, "outside")
    for name in ("a1.h2", "m0"):
        at = list(outside.customdata).index(name)
        outside._click_callbacks[0](outside, SimpleNamespace(point_inds=[at]))
        assert widget.layout.annotations[0].text.startswith(f"<b>{name}</b>")
        assert drawn(widget, "chosen").x == (outside.x[at],)
        assert widget.layout.xaxis2.visible == (name == "a1.h2")
    assert all(value is None for row in drawn(widget, "pattern").z for value in row)


def test_edges_within_the_circuit():
    edges = dfa.EdgeSet(3, 4, 4)
    values = torch.sin(torch.arange(edges.existing.numel()) * 1.7).reshape(edges.shape)
    scores = dfa.EdgeScores(values, edges)
    circuit = dfa.Circuit(["a0.h1", "m1", "a2.h3"], NODES)
    figure = dfa.plots.node_graph(circuit, edges=scores)
    lines = {trace.name: trace for trace in figure.data if "->" in trace.name}
    assert set(lines) == {"a0.h1->m1", "a0.h1->a2.h3", "m1->a2.h3"}
    strongest = max((float(scores[f"a0.h1->a2.h3<{letter}>"]) for letter in "qkv"), key=abs)
    assert f"score {strongest:+.4g}" in lines["a0.h1->a2.h3"].text
    assert lines["a0.h1->m1"].line.color == ("#b2182b" if scores["a0.h1->m1"] >= 0 else "#2166ac")
    assert sum("->" in t.name for t in dfa.plots.node_graph(circuit, edges=scores, most_edges=1).data) == 1
    assert meaning(figure) == {"helps": "#b2182b", "hurts": "#2166ac"}


def test_a_circuit_of_edges():
    edges = dfa.EdgeSet(3, 4, 4)
    kept = ["input->a0.h1<v>", "a0.h1->m1", "m1->logits", "a0.h1->a2.h3<q>", "m1->a2.h3<v>", "a2.h3->logits", "m0->m2"]
    circuit = dfa.EdgeCircuit(kept, edges)
    figure = dfa.plots.node_graph(circuit)
    table = figure.to_frame()
    assert table["node"][table["in_circuit"]].tolist() == ["a0.h1", "m1", "a2.h3"]  # m0->m2 lies on no path
    lines = {trace.name: trace for trace in figure.data if "->" in trace.name}
    assert set(lines) == {"a0.h1->m1", "a0.h1->a2.h3", "m1->a2.h3"}
    assert {trace.line.color for trace in lines.values()} == {"#7a7a7a"}
    scores = dfa.EdgeScores(torch.full(edges.shape, -2.0), edges)
    lines = [t for t in dfa.plots.node_graph(circuit, edges=scores).data if "->" in t.name]
    assert {(t.line.color, t.text[-8:]) for t in lines} == {("#2166ac", "score -2")}
    alone = dfa.EdgeCircuit(["input->m1", "m1->logits"], edges)  # no edge between two nodes
    assert not [t for t in dfa.plots.node_graph(alone, edges=scores).data if "->" in t.name]
    with pytest.raises(CircuitError, match="edges are of another model"):
        dfa.plots.node_graph(
            circuit, edges=dfa.EdgeScores(torch.ones(dfa.EdgeSet(2, 4, 4).shape), dfa.EdgeSet(2, 4, 4))
        )


def test_what_a_graph_refuses():
    other = dfa.NodeSet.for_sizes(2, 4)
    with pytest.raises(CircuitError, match="scores are of other nodes"):
        dfa.plots.node_graph(CIRCUIT, scores=dfa.controls.random_scores(other))
    with pytest.raises(CircuitError, match="inspection is of another model"):
        dfa.plots.node_graph(CIRCUIT, inspection=made_inspection(other))
    spans = NODES.at_spans(["subject"])
    with pytest.raises(CircuitError, match=r"'a0.h0@subject' is neither"):
        dfa.plots.node_graph(dfa.Circuit(spans.names[:2], spans))


def test_two_circuits_of_one_model():
    other = dfa.Circuit(["a0.h1", "m1", "a1.h0", "m0"], NODES)
    figure = dfa.plots.circuit_comparison({"ioi": CIRCUIT, "mcqa": other})
    shown = {trace.name: set(trace.customdata) for trace in figure.data}
    assert shown["ioi and mcqa (2)"] == {"a0.h1", "m1"}
    assert shown["ioi alone (1)"] == {"a2.h3"}
    assert shown["mcqa alone (2)"] == {"a1.h0", "m0"}
    assert len(shown["neither (10)"]) == 10
    overlap = CIRCUIT.overlap(other)
    assert f"Jaccard {overlap.jaccard:.2f} (by chance {overlap.expected:.2f}, p" in figure.layout.title.text
    assert len({(trace.marker.color, trace.marker.symbol) for trace in figure.data}) == 4
    with pytest.raises(CircuitError, match="not 1; circuit_overlap takes several"):
        dfa.plots.circuit_comparison({"ioi": CIRCUIT})


def test_two_circuits_of_two_models():
    large = dfa.NodeSet.for_sizes(5, 6)
    figure = dfa.plots.circuit_comparison({"small": CIRCUIT, "large": dfa.Circuit(["m4"], large)}, title="IOI")
    assert "mean relative depth 0.50 and 1.00" in figure.layout.title.text
    own = {trace.name: set(trace.customdata) for trace in figure.data if trace.name != "not in it"}
    assert own == {"small (3 of 15)": set(CIRCUIT), "large (1 of 35)": {"m4"}}
    # equal relative depth is at equal heights
    first, second = figure.layout.yaxis.range, figure.layout.yaxis2.range
    assert -first[0] / 2 == pytest.approx(-second[0] / 4)
    table = figure.to_frame()
    assert table.groupby("circuit")["in_circuit"].sum().to_dict() == {"small": 3, "large": 1}


def test_layer_by_token():
    spans = ["0 When", "1 <b>John", "2"]
    nodes = NODES.at_spans(spans)
    scores = dfa.controls.random_scores(nodes)
    figure = dfa.plots.token_heatmap(scores)
    heads, mlps = figure.data
    for layer in range(3):
        for i, span in enumerate(spans):
            own = [scores[f"a{layer}.h{head}@{span}"] for head in range(4)]
            assert heads.z[layer][i] == pytest.approx(sum(own), abs=1e-6)
            assert mlps.z[layer][i] == pytest.approx(scores[f"m{layer}@{span}"], abs=1e-6)
            strongest = max(range(4), key=lambda head, own=own: abs(own[head]))
            assert f"most of it: a{layer}.h{strongest} {own[strongest]:+.3g}" in heads.text[layer][i]
    assert figure.layout.xaxis.ticktext == ("0 When", "1 &lt;b&gt;John", "2")
    assert len(figure.to_frame()) == 3 * 3 * 2
    with pytest.raises(ScoreError, match="'a0.h0' is not: attribute with"):
        dfa.plots.token_heatmap(dfa.controls.random_scores(NODES))


def test_spans_by_token(zoo_source):
    pairs = dfa.tasks.load("ioi", zoo_source.tokenizer, n=24)
    lengths = pairs.lengths
    same = pairs[lengths == lengths[0]]
    names = dfa.Schema.by_token(same).names
    for i, name in enumerate(names):
        tokens = {zoo_source.tokenizer.decode([token]).strip() for token in same.clean[:, i].tolist()}
        assert name == (f"{i} {tokens.pop()}" if len(tokens) == 1 else str(i))
    assert any(" " in name for name in names) and any(" " not in name for name in names)
    assert len(names) == int(lengths[0])
    if len(lengths.unique()) > 1:
        with pytest.raises(PromptError, match="prompts of one length"):
            dfa.Schema.by_token(pairs)
