"""Circuits as values, and what they do: against curves, hand-made hooks and enumeration."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import made_curve, random_pairs, unchecked
from hypothesis import given
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.errors import CircuitError, FaithfulnessError, FileError, NodeError, PromptError, ScoreError

NODES = dfa.NodeSet.for_sizes(2, 3)


def a_circuit(names=("a0.h1", "m1"), **more):
    return dfa.Circuit(names, NODES, **more)


# --- running -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"protocol": "mib", "ranking": "absolute"}], ids=str)
def test_f_is_the_curve_at_that_size(model, options):
    pairs = random_pairs(n=3, width=9, ragged=True)
    scores = dfa.attribute(
        model, pairs, method="nap", nodes=dfa.NodeSet.heads_and_mlps(model, with_input="protocol" in options)
    )
    n = len(scores)
    sizes = [0, 1, 5, n - 1, n]
    curve = dfa.faithfulness_curve(model, pairs, scores, sizes=sizes, batch_size=2, **options)
    for i, k in enumerate(sizes):
        circuit = scores.circuit(k, ranking=options.get("ranking", "signed"))
        found = dfa.circuits.run(model, pairs, circuit, batch_size=2)
        assert found.faithfulness == curve.faithfulness[i]
        assert np.array_equal(found.values, curve.per_example[i])
        assert found.kl.mean() == pytest.approx(curve.kl[i], abs=1e-12)


def test_running_leaves_the_model_and_agrees_with_hooks_of_ones_own(model, unchanged):
    pairs = random_pairs(n=3, width=8)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    circuit = dfa.Circuit(["a0.h1", "m0", "a2.h3", "m2"], nodes)
    with unchanged(model):
        found = dfa.circuits.run(model, pairs, circuit)
    with torch.no_grad():
        _, corrupt = model.run_with_cache(pairs.corrupt)

        def keep_heads(layer):
            own = [i for i in range(4) if f"a{layer}.h{i}" in circuit]

            def hook(z, hook):
                mixed = corrupt[f"blocks.{layer}.attn.hook_z"].clone()
                mixed[:, :, own] = z[:, :, own]
                return mixed

            return hook

        taps = [(f"blocks.{layer}.attn.hook_z", keep_heads(layer)) for layer in range(3)]
        lost = corrupt["blocks.1.hook_mlp_out"]
        taps.append(("blocks.1.hook_mlp_out", lambda now, hook: lost))
        expected = model.run_with_hooks(pairs.clean, fwd_hooks=taps)[:, -1]
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)
    assert found.agreement == float((found.logits.argmax(1) == found.clean_logits.argmax(1)).float().mean())


def test_knocked_out_is_the_run_of_all_the_others(any_model):
    model, pairs = any_model, random_pairs(n=3)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    circuit = dfa.Circuit(["a0.h1", "m1"], nodes)
    rest = dfa.Circuit([name for name in nodes.names if name not in ("a0.h1", "m1")], nodes)
    expected = dfa.circuits.run(model, pairs, rest)
    assert torch.equal(dfa.circuits.ablate(model, pairs, circuit).logits, expected.logits)
    # exact attribution is the same question for one node
    one = dfa.circuits.ablate(model, pairs, dfa.Circuit(["m1"], nodes))
    exact = dfa.attribute(model, pairs, method="exact")["m1"]
    assert one.clean_values.mean() - one.values.mean() == pytest.approx(exact, abs=1e-5)
    with_input = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    stays = dfa.circuits.ablate(model, pairs, dfa.Circuit(["input", "a0.h1", "m1"], with_input))
    assert torch.equal(stays.logits, expected.logits)


def test_generating(model):
    """The whole model's tokens are those of the model; a circuit's those of passes over the prompts so far."""
    pairs = random_pairs(n=2, width=7, ragged=True)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    whole = dfa.circuits.generate(model, pairs, dfa.Circuit(nodes.names, nodes), max_new_tokens=2)
    circuit = dfa.Circuit(["a0.h1", "m0", "a2.h3", "m2"], nodes)
    found = dfa.circuits.generate(model, pairs, circuit, max_new_tokens=2)
    for i, length in enumerate(pairs.lengths.tolist()):
        plain, clean, corrupt = (t[i, :length][None] for t in (pairs.clean, pairs.clean, pairs.corrupt))
        for step in range(2):
            with torch.no_grad():
                token = model(plain)[:, -1].argmax(-1)
                with dfa.hooks.record(model, nodes) as other:
                    model(corrupt)
                with dfa.hooks.ablate(model, nodes, keep=circuit.names, corrupt=other):
                    own = model(clean)[:, -1].argmax(-1)
            assert whole[i, step] == token.item()
            assert found[i, step] == own.item()
            plain = torch.cat([plain, token[None]], 1)
            clean, corrupt = torch.cat([clean, own[None]], 1), torch.cat([corrupt, own[None]], 1)
    with pytest.raises(PromptError, match="but the model takes 64"):
        dfa.circuits.generate(model, pairs, circuit, max_new_tokens=80)
    with pytest.raises(PromptError, match="at least 1"):
        dfa.circuits.generate(model, pairs, circuit, max_new_tokens=0)


def test_circuits_of_other_models_are_refused(any_model):
    model, pairs = any_model, random_pairs(n=2)
    with pytest.raises(NodeError, match="another model"):
        dfa.circuits.run(model, pairs, a_circuit())
    small = dfa.NodeSet.for_sizes(2, 4)
    with pytest.raises(ScoreError, match="first 2 of this model's 3 layers"):
        dfa.circuits.run(model, pairs, dfa.Circuit(["m0"], small, meta={"model": "the small one"}))
    with pytest.raises(CircuitError, match="not a NodeScores: scores.circuit"):
        unchecked(dfa.circuits.run)(model, pairs, dfa.attribute(model, pairs, method="nap"))
    with pytest.raises(CircuitError, match="input alone"):
        dfa.circuits.run(model, pairs, dfa.Circuit([], dfa.NodeSet.for_sizes(3, 4, with_input=True)[:1]))


# --- the smallest circuit ------------------------------------------------------------------------------------------


def test_the_smallest_faithful_circuit(any_model):
    model, pairs = any_model, random_pairs(n=6)
    scores = dfa.attribute(model, pairs, method="exact")
    curve = dfa.faithfulness_curve(model, pairs, scores, sizes=range(16))
    k = next(k for k in range(16) if curve.faithfulness[k] >= 0.8)
    circuit = curve.smallest(f=0.8)
    assert circuit == scores.circuit(k)
    assert circuit.meta["faithfulness"] == dfa.circuits.run(model, pairs, circuit).faithfulness >= 0.8
    low, high = circuit.meta["size_interval"]
    assert 0 <= low <= high <= 15
    with pytest.raises(FaithfulnessError, match="No circuit that was run reaches f = 99"):
        curve.smallest(f=99)


def test_the_interval_of_the_smallest_size():
    """Two kinds of examples, half of which need one node and half three: the resampled sizes are one or three."""
    easy, hard = [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]
    curve = made_curve(np.array([easy] * 4 + [hard] * 4).T, np.ones(8), np.zeros(8), [0, 1, 2, 3], 3)
    size, interval = curve.smallest_size(0.5, resamples=500)
    assert size == 1 and tuple(interval) == (1.0, 3.0)
    same = made_curve(np.array([easy] * 8).T, np.ones(8), np.zeros(8), [0, 1, 2, 3], 3)
    assert same.smallest_size(0.5)[1] == (1.0, 1.0)
    with pytest.raises(FaithfulnessError, match="without their scores"):
        curve.smallest()


# --- sets ----------------------------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from(NODES.names)), st.sets(st.sampled_from(NODES.names)))
def test_circuits_combine_as_sets(first, second):
    one, two = a_circuit(first, name="one"), a_circuit(second, name="two")
    for made, expected in (
        (one & two, first & second),
        (one | two, first | second),
        (one - two, first - second),
        (one ^ two, first ^ second),
        (~one, set(NODES.names) - first),
    ):
        assert set(made.names) == expected and list(made) == sorted(expected, key=NODES.position)
    assert (one <= two) == (first <= second)
    assert one.kept.sum() == len(one) == len(first)
    assert one.overlap(two).common == len(first & second)


def test_overlap_against_enumeration():
    """All pairs of circuits of two and three of five nodes."""
    nodes = dfa.NodeSet.for_sizes(1, 4)
    first = dfa.Circuit(nodes.names[:2], nodes)
    others = [dfa.Circuit(chosen, nodes) for chosen in itertools.combinations(nodes.names, 3)]
    common = np.array([len(first & other) for other in others])
    jaccard = np.array([len(first & other) / len(first | other) for other in others])
    found = first.overlap(others[0])
    assert found.jaccard == pytest.approx(jaccard[0]) and found.expected == pytest.approx(jaccard.mean())
    assert found.p == pytest.approx((common >= common[0]).mean())
    assert "2 nodes in common of 2 and 3; Jaccard 0.67" in str(found)
    empty = dfa.Circuit([], nodes)
    assert empty.overlap(empty).jaccard == empty.overlap(empty).p == 1.0
    with pytest.raises(CircuitError, match="different models"):
        first.overlap(a_circuit())


def test_tables_of_several():
    one, two = a_circuit(name="one"), a_circuit(["m0", "m1"])
    table = dfa.circuits.side_by_side({"ioi": one, "mcqa": two})
    assert table.sum(axis=1)["m1"] == 2 and table["ioi"].sum() == 2 and not table.loc["a0.h0"].any()
    large = dfa.Circuit(["m5"], dfa.NodeSet.for_sizes(6, 2), meta={"model": "large", "faithfulness": 0.93})
    compared = dfa.circuits.compare({"one": one, "large": large, "none": dfa.Circuit([], NODES)})
    assert compared["relative_depth"].tolist()[:2] == [0.5, 1.0]
    assert compared["faithfulness"].tolist()[1] == 0.93 and compared["heads"].tolist() == [1, 0, 0]
    pairs = dfa.circuits.overlaps({"a": one, "b": two, "c": ~one})
    assert pairs["common"].tolist() == [1, 0, 1]
    assert (pairs["p_holm"] >= pairs["p"]).all()
    for call in (dfa.circuits.side_by_side, dfa.circuits.overlaps):
        with pytest.raises(CircuitError, match="'large' was chosen among 18 nodes"):
            call({"one": one, "large": large})
    with pytest.raises(CircuitError, match="no circuits"):
        dfa.circuits.compare({})
    with pytest.raises(CircuitError, match="two circuits at least"):
        dfa.circuits.overlaps({"one": one})


# --- values --------------------------------------------------------------------------------------------------------


def test_a_circuit_is_a_value():
    circuit = a_circuit(["m1", "a0.h1"], name="mine", meta={"method": "nap"})
    assert circuit == a_circuit(name="another") and hash(circuit) == hash(a_circuit())
    assert circuit.names == ("a0.h1", "m1") and "m1" in circuit and circuit.nodes.names == circuit.names
    circuit.meta["method"] = "changed"
    assert circuit.meta == {"method": "nap"}
    with pytest.raises(AttributeError):
        circuit.name = "other"
    assert repr(circuit) == "Circuit('mine': 2 of 8 nodes: a0.h1, m1)"
    assert circuit.by_layer()["names"].tolist() == ["a0.h1", "m1"]
    assert circuit.named("b").name == "b"
    with pytest.raises(NodeError, match="No node 'a9"):
        a_circuit(["a9.h9"])
    with pytest.raises(CircuitError, match="twice"):
        a_circuit(["m0", "m0"])
    with pytest.raises(CircuitError, match="not the text"):
        dfa.Circuit("m0", NODES)
    with pytest.raises(CircuitError, match="The name of a circuit"):
        a_circuit(name="=1+1")
    with pytest.raises(CircuitError, match="is empty"):
        a_circuit([]).nodes  # noqa: B018


def test_files(tmp_path):
    circuit = a_circuit(name="mine", meta={"method": "nap", "model": "tiny", "k": 2})
    circuit.save(tmp_path / "c.safetensors")
    circuit.to_json(tmp_path / "c.json")
    for back in (dfa.Circuit.load(tmp_path / "c.safetensors"), dfa.Circuit.from_json(tmp_path / "c.json")):
        assert back == circuit and back.name == "mine" and back.meta == circuit.meta
    assert json.loads((tmp_path / "c.json").read_text())["nodes"] == ["a0.h1", "m1"]
    circuit.to_csv(tmp_path / "c.csv")
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert lines[:3] == ["node,kind,layer,index,in_circuit", "a0.h0,head,0,0,False", "a0.h1,head,0,1,True"]
    circuit.to_mib(tmp_path / "mib.json")
    entries = json.loads((tmp_path / "mib.json").read_text())["nodes"]
    assert [name for name, entry in entries.items() if entry["in_graph"]] == ["input", "a0.h1", "m1", "logits"]
    assert dfa.NodeScores.from_mib(tmp_path / "mib.json", nodes=NODES).circuit(2) == circuit
    raw = bytearray((tmp_path / "c.safetensors").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "c.safetensors").write_bytes(raw)
    with pytest.raises(FileError, match="damaged"):
        dfa.Circuit.load(tmp_path / "c.safetensors")
    for content, message in (
        ({"format": "x"}, "is not a circuit as JSON"),
        ({"format": "dfa_lens circuit 1"}, "it lacks 'nodes'"),
        ({"format": "dfa_lens circuit 1", "nodes": "m0", "meta": {}}, "its nodes are a str"),
        (
            {"format": "dfa_lens circuit 1", "nodes": ["x"], "meta": {}, "universe": [], "name": "a"},
            "at least one node",
        ),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(FileError, match=message):
            dfa.Circuit.from_json(tmp_path / "bad.json")


def test_notebooks_show_values_escaped():
    circuit = a_circuit(name="a<b>")
    assert "a&lt;b&gt;" in circuit._repr_html_() and "<td>a0.h1</td>" in circuit._repr_html_()
    scores = dfa.NodeScores(torch.arange(8.0), NODES)
    assert scores._repr_html_().index("<td>m1</td>") < scores._repr_html_().index("<td>a1.h2</td>")
    many = dfa.NodeScores(torch.arange(20.0), dfa.NodeSet.for_sizes(4, 4))
    assert "10 more rows" in many._repr_html_()
    curve = made_curve(np.eye(3), np.ones(3), np.zeros(3), [0, 1, 2], 2)
    assert "<th>faithfulness</th>" in curve._repr_html_()
    assert "54 → 110" in dfa.controls.random_w(dfa.NodeSet.for_sizes(6, 8), dfa.NodeSet.for_sizes(10, 10))._repr_html_()


# --- membership ----------------------------------------------------------------------------------------------------


def test_membership_of_rankings_counts_them():
    nodes = dfa.NodeSet.for_sizes(1, 2)
    rankings = [dfa.NodeScores(torch.tensor(v), nodes) for v in ([3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, -9.0, 0.0])]
    found = dfa.Membership.of(rankings, 2)
    assert found.probabilities.tolist() == pytest.approx([1, 1 / 3, 2 / 3])
    assert dfa.Membership.of(rankings, 1, ranking="absolute")["a0.h1"] == pytest.approx(1 / 3)
    assert found.circuit(at_least=0.6).names == ("a0.h0", "m0")
    assert found.to_frame()["node"].tolist() == ["a0.h0", "m0", "a0.h1"]
    assert dfa.Membership.pooled([found, dfa.Membership.of(rankings[:1], 2)])["m0"] == pytest.approx(1 / 3)
    assert "1 in at least 95 % of rankings, 2 in 5 to 95 %" in repr(found)
    for call, message in (
        (lambda: dfa.Membership.of([], 1), "no scores"),
        (lambda: dfa.Membership.of(rankings, 4), "k must be between 0 and"),
        (lambda: dfa.Membership.resampled(rankings[:1], 1), "can't be resampled"),
        (lambda: dfa.Membership.resampled(rankings, 1, resamples=0), "resamples must be"),
        (lambda: dfa.Membership.pooled([]), "if there are some"),
        (lambda: found.circuit(at_least=0), "a probability above 0"),
        (lambda: dfa.Membership(torch.tensor([2.0, 0, 0]), nodes, 1), "from 0 to 1"),
    ):
        with pytest.raises(CircuitError, match=message):
            call()


def test_membership_over_prompts_is_the_bootstrap_enumerated():
    """Three prompts: all 27 draws with replacement, by hand."""
    nodes = dfa.NodeSet.for_sizes(1, 2)
    prompts = [dfa.NodeScores(torch.tensor(v), nodes) for v in ([2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [2.0, 1.0, 1.5])]
    values = np.array([each.values.numpy() for each in prompts])
    best = [values[list(draw)].mean(0).argmax() for draw in itertools.product(range(3), repeat=3)]
    expected = np.bincount(best, minlength=3) / 27
    found = dfa.Membership.resampled(prompts, 1, resamples=4000)
    np.testing.assert_allclose(found.probabilities, expected, atol=0.03)


def test_membership_over_a_models_prompts(any_model):
    model, pairs = any_model, random_pairs(n=4)
    found = dfa.circuits.membership(model, pairs, 5, method="nap", resamples=200)
    whole = dfa.attribute(model, pairs, method="nap")
    assert float(found.probabilities.sum()) == pytest.approx(5, abs=1e-4)
    assert found[next(iter(whole.top(1)))] > 0.5
    assert found.meta["prompts"] == 4 and found.meta["method"] == "nap"
    with pytest.raises(CircuitError, match="can't be resampled"):
        dfa.circuits.membership(model, pairs[:1], 5)
    with pytest.raises(CircuitError, match="k must be"):
        dfa.circuits.membership(model, pairs, 16)


# --- scores from tables ---------------------------------------------------------------------------------------------


def test_scores_from_a_table():
    scores = dfa.NodeScores(torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0, -2.0, 0.25]), NODES)
    shuffled = scores.to_frame().sample(frac=1, random_state=0)
    assert dfa.NodeScores.from_frame(shuffled) == scores == dfa.NodeScores.from_frame(shuffled, NODES)
    with_input = dfa.NodeScores(torch.arange(9.0), dfa.NodeSet.for_sizes(2, 3, with_input=True))
    assert dfa.NodeScores.from_frame(with_input.to_frame()[::-1]) == with_input
    table = scores.to_frame()
    for changed, nodes, message in (
        (table.drop(columns="score"), None, "Unknown column 'score'"),
        (table[:-1], NODES, "lacks node 'm1'"),
        (table[:-1], None, "not every head and MLP block"),
        (table[table["kind"] == "mlp"], None, "not every head and MLP block"),
        (table.replace("m1", "m0"), None, "'m0' is in the table twice"),
        (table.replace("m1", "m7"), None, "lacks node 'm1'"),
        (table, NODES[:3], "a node 'm0', which is not among the 3"),
        (table.assign(score="x"), None, "must be numbers"),
        (table.assign(score=float("nan")), None, "not finite"),
    ):
        with pytest.raises(ScoreError, match=message):
            dfa.NodeScores.from_frame(changed, nodes)
