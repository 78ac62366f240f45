"""Circuits of edges as values, and what they do: against curves, circuits of nodes, single edges and sets."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import random_pairs, unchecked
from hypothesis import given
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.errors import CircuitError, EdgeError, FaithfulnessError, FileError, ScoreError

EDGES = dfa.EdgeSet(2, 2, 1)
NAMES = tuple(map(str, EDGES))


def a_circuit(names=("input->a0.h1<q>", "a0.h1->logits"), universe=EDGES, **more):
    return dfa.EdgeCircuit(names, universe, **more)


# --- running -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"protocol": "mib", "ranking": "absolute"}, {"selection": "greedy", "batch_size": 2}],
    ids=["top", "mib", "greedy"],
)
def test_f_is_the_edge_curve_at_that_size(any_model, options):
    """Bit for bit, and so is the smallest circuit's."""
    pairs = random_pairs(n=3, width=9, ragged=True)
    scores = dfa.attribute_edges(any_model, pairs, method="eap")
    with_input = options.get("protocol") == "mib"
    n = len(scores.circuit(0, with_input=with_input).flags)
    sizes = [0, 3, 40, n - 1, n]
    curve = dfa.faithfulness_curve(any_model, pairs, scores, sizes=sizes, **options)
    chosen = {key: options[key] for key in ("ranking", "selection") if key in options}
    for i, k in enumerate(sizes):
        circuit = scores.circuit(k, with_input=with_input, **chosen)
        found = dfa.circuits.run(any_model, pairs, circuit, batch_size=options.get("batch_size", 16))
        assert found.faithfulness == curve.faithfulness[i]
        assert np.array_equal(found.values, curve.per_example[i])
        assert curve.live_sizes[i] == circuit.live.sum()
    f = float(np.sort(curve.faithfulness)[-2])
    smallest = curve.smallest(f=f)
    at = int((curve.faithfulness >= f).argmax())
    assert smallest == scores.circuit(sizes[at], with_input=with_input, **chosen)
    assert smallest.meta["faithfulness"] == curve.faithfulness[at] and len(smallest.meta["size_interval"]) == 2
    submitted = dfa.mib.of_circuits(any_model, pairs, [scores.circuit(40, with_input=with_input, **chosen)])
    np.testing.assert_allclose(submitted.per_example[0], curve.per_example[2], atol=1e-4)


def test_edges_of_some_nodes_and_one_edge_less(model, unchanged):
    """All edges of some nodes are the nodes; knocking one edge out is its exact effect; pruning changes nothing."""
    pairs = random_pairs(n=3, width=7)
    edges = dfa.EdgeSet.of_model(model)
    nodes = dfa.Circuit(["a0.h1", "m0", "a2.h3", "m2"], edges.nodes[1:])
    own = torch.tensor([name in nodes for name in edges.writers])
    circuit = dfa.EdgeCircuit(edges.existing & own[:, None] & edges.without_input().chosen, edges.without_input())
    with unchanged(model):
        found = dfa.circuits.run(model, pairs, circuit)
    expected = dfa.circuits.run(model, pairs, nodes)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=1e-4)
    few = dfa.attribute_edges(model, pairs, method="eap").circuit(12)
    assert len(few.pruned()) == few.live_size < 12
    np.testing.assert_allclose(
        dfa.circuits.run(model, pairs, few.pruned()).values, dfa.circuits.run(model, pairs, few).values, atol=2e-4
    )
    edge = ("m0", "a1.h2<q>")
    one = dfa.circuits.ablate(model, pairs, dfa.EdgeCircuit([edge], edges))
    exact = dfa.attribute_edges(model, pairs, method="exact", edges=edges[edge])
    assert one.clean_values.mean() - one.values.mean() == pytest.approx(exact[edge], abs=2e-5)
    whole = dfa.circuits.generate(model, pairs, dfa.EdgeCircuit(edges.existing, edges), max_new_tokens=2)
    assert torch.equal(
        whole, dfa.circuits.generate(model, pairs, dfa.Circuit(nodes.universe.names, nodes.universe), max_new_tokens=2)
    )


def test_what_is_refused(any_model):
    pairs = random_pairs(n=2)
    scores = dfa.attribute_edges(any_model, pairs, method="eap")
    for call, error, message in (
        (lambda: dfa.circuits.run(any_model, pairs, a_circuit()), ScoreError, "it comes from another model"),
        (lambda: scores.circuit(10_000), ScoreError, "number of ranked edges, "),
        (lambda: a_circuit(["m1->m0"]), EdgeError, "m0 reads before m1 writes"),
        (lambda: a_circuit(["m0->m1"], EDGES["m0", "logits"]), EdgeError, "not among the 1 of the set"),
        (lambda: a_circuit(["m0->m1", ("m0", "m1")]), CircuitError, "twice"),
        (lambda: unchecked(dfa.EdgeCircuit)("m0->m1", EDGES), CircuitError, "not the text"),
        (lambda: dfa.EdgeCircuit(~EDGES.existing, EDGES), EdgeError, "reads before"),
        (
            lambda: unchecked(dfa.EdgeCircuit)(torch.ones(2, 2, dtype=torch.bool), EDGES),
            CircuitError,
            "by a boolean tensor",
        ),
        (lambda: a_circuit([]).edges, CircuitError, "is empty"),
        (lambda: a_circuit() & a_circuit(["m0->m1"], EDGES.without_input()), CircuitError, "with those of the input"),
        (lambda: a_circuit().overlap(dfa.Circuit(["m0"], EDGES.nodes)), CircuitError, "not with a Circuit"),
        (lambda: a_circuit().to_mib("x.pt"), ScoreError, "per-head"),
        (
            lambda: dfa.circuits.compare({"e": a_circuit(), "n": dfa.Circuit(["m0"], EDGES.nodes)}),
            CircuitError,
            "circuits of one kind",
        ),
        (lambda: unchecked(dfa.circuits.membership)(any_model, pairs, 5, unit="edge"), CircuitError, "edges"),
        (lambda: dfa.circuits.membership(any_model, pairs, 5, selection="greedy"), CircuitError, "unit='edges'"),
        (lambda: dfa.circuits.membership(any_model, pairs, 999, unit="edges"), CircuitError, "number of edges, "),
        (lambda: dfa.EdgeMembership.of([], 1), CircuitError, "no scores"),
    ):
        with pytest.raises(error, match=message):
            call()
    curve = dfa.faithfulness_curve(any_model, pairs, scores, sizes=[0, 5])
    with pytest.raises(FaithfulnessError, match="No circuit that was run reaches f = 99"):
        curve.smallest(f=99)


# --- values --------------------------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_they_combine_as_sets(first, second):
    one, two = a_circuit(first, name="one"), a_circuit(second, name="two")
    for made, expected in (
        (one & two, first & second),
        (one | two, first | second),
        (one - two, first - second),
        (one ^ two, first ^ second),
        (~one, set(NAMES) - first),
    ):
        assert set(made) == expected and list(made) == sorted(expected, key=NAMES.index)
    assert (one <= two) == (first <= second)
    assert len(one) == len(first) == one.flags.sum() and all(name in one for name in first)
    assert one.overlap(two).common == len(first & second)
    assert set(one.pruned()) == {name for name in first if one.live[EDGES.position(name)]}


def test_a_circuit_of_edges_is_a_value(tmp_path):
    circuit = a_circuit(name="mine", meta={"method": "eap", "k": 2})
    assert circuit == a_circuit([("a0.h1", "logits"), ("input", "a0.h1<q>")]) and hash(circuit) == hash(a_circuit())
    assert circuit != a_circuit(["a0.h1->logits"], EDGES.without_input())
    assert repr(circuit) == f"EdgeCircuit('mine': 2 of {len(EDGES)} edges: input->a0.h1<q>, a0.h1->logits)"
    assert circuit.live_size == 2 and circuit.to_nodes().names == ("a0.h1",)
    assert circuit.edges == EDGES.choose(circuit.kept) and circuit.named("b").name == "b"
    assert "a0.h1-&gt;logits" in circuit._repr_html_()
    assert circuit.to_frame().query("in_circuit")["edge"].tolist() == list(circuit)
    without = a_circuit(["a0.h1->logits"], EDGES.without_input(), name="without")
    some = a_circuit(["m0->m1"], EDGES["m0", "*"], name="some")
    assert without.live_size == 1 and without.open.sum() == 1 + EDGES.existing[0].sum()
    beside = dfa.EdgeCircuit(["m0->m1"], dfa.EdgeSet(2, 2, parallel=True), name="side by side")
    for each in (circuit, without, some, a_circuit([]), beside):
        each.save(tmp_path / "c.safetensors")
        each.to_json(tmp_path / "c.json")
        for back in (dfa.EdgeCircuit.load(tmp_path / "c.safetensors"), dfa.EdgeCircuit.from_json(tmp_path / "c.json")):
            assert back == each and back.name == each.name and back.meta == each.meta
    circuit.to_csv(tmp_path / "c.csv")
    assert "input->a0.h1<q>,input,a0.h1<q>,True,True" in (tmp_path / "c.csv").read_text()
    per_head = dfa.EdgeCircuit(["m0->a1.h0<v>"], dfa.EdgeSet(2, 2).without_input())
    with pytest.raises(ScoreError, match="side by side are not written"):
        beside.to_mib(tmp_path / "mib.pt")
    for suffix in (".pt", ".json"):
        per_head.to_mib(tmp_path / f"mib{suffix}")
        back = dfa.EdgeCircuit.from_mib(tmp_path / f"mib{suffix}")
        assert torch.equal(back.kept, per_head.open) and back.name == "mib"
    for path, content, message in (
        ("c.safetensors", None, "damaged"),
        ("bad.json", {"format": "x"}, "is not a circuit of edges as JSON"),
        ("bad.json", {"format": "dfa_lens edge circuit 1", "edges": "x", "universe": "all", "meta": {}}, "are a str"),
        (
            "bad.json",
            {"format": "dfa_lens edge circuit 1", "edges": [], "universe": "none", "meta": {}, "sizes": EDGES.sizes},
            "none",
        ),
    ):
        if content is None:
            raw = bytearray((tmp_path / path).read_bytes())
            raw[-3] ^= 1
            (tmp_path / path).write_bytes(raw)
        else:
            (tmp_path / path).write_text(json.dumps({"name": "a", **content}))
        with pytest.raises(FileError, match=message):
            (dfa.EdgeCircuit.load if content is None else dfa.EdgeCircuit.from_json)(tmp_path / path)


def test_tables_of_several():
    one, two = a_circuit(name="one"), a_circuit(["m0->m1", "a0.h1->logits"])
    table = dfa.circuits.side_by_side({"ioi": one, "mcqa": two})
    assert table.index.name == "edge" and table.sum(axis=1)["a0.h1->logits"] == 2 and table["ioi"].sum() == 2
    compared = dfa.circuits.compare({"one": one, "two": two})
    assert compared["edges"].tolist() == [2, 2] and compared["live_size"].tolist() == [2, 0]
    assert compared["heads"].tolist() == [1, 0]
    pairs = dfa.circuits.overlaps({"a": one, "b": two})
    assert pairs["common"].tolist() == [1] and "1 edges in common of 2 and 2" in str(one.overlap(two))


def test_membership_over_prompts_is_the_bootstrap_enumerated(any_model):
    """Three prompts: all 27 draws with replacement, by hand; and of a model, that it is of its own prompts."""
    edges = dfa.EdgeSet(1, 1).without_input()
    values = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [2.0, 1.0, 1.5]])
    best = [values[list(draw)].mean(0).argmax() for draw in itertools.product(range(3), repeat=3)]
    prompts = [dfa.EdgeScores.of_flat(torch.tensor(each), edges) for each in values]
    found = dfa.EdgeMembership.resampled(prompts, 1, resamples=2000)
    np.testing.assert_allclose(found.probabilities, np.bincount(best, minlength=3) / 27, atol=0.04)
    assert found[next(iter(edges))] == float(found.probabilities[0])
    assert [found[edge] for edge in edges] == found.probabilities.tolist()
    seeds = dfa.EdgeMembership.pooled([found, dfa.EdgeMembership.of(prompts, 1)])
    np.testing.assert_allclose(
        seeds.probabilities, (found.probabilities + torch.tensor([2 / 3, 1 / 3, 0])) / 2, atol=1e-6
    )
    assert len(found.circuit(at_least=0.01)) == (found.probabilities >= 0.01).sum()

    of_model = dfa.circuits.membership(any_model, random_pairs(n=3), 7, unit="edges", method="eap", resamples=20)
    assert float(of_model.probabilities.sum()) == pytest.approx(7, abs=1e-4) and of_model.meta["method"] == "eap"
    assert of_model.edges == dfa.EdgeSet.of_model(any_model).without_input()
