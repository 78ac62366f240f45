"""MIB's circuit track: files in the published schema, written here by hand, and submissions."""

import json

import numpy as np
import pytest
import torch
from helpers import random_model, random_pairs
from typer.testing import CliRunner

import dfa_lens as dfa
from dfa_lens.cli import app
from dfa_lens.data.curve import MIB_FRACTIONS
from dfa_lens.errors import FaithfulnessError, FileError

L, H, D = 3, 4, 32
CFG = {"n_layers": L, "n_heads": H, "parallel_attn_mlp": False, "d_model": D}


def forward(name):
    """EAP-IG's place of a node among the writers."""
    if name == "input":
        return 0
    if name[0] == "m":
        return 1 + int(name[1:]) * (H + 1) + H
    layer, head = name[1:].split(".h")
    return 1 + int(layer) * (H + 1) + int(head)


NAMES = sorted(
    ["input", *(f"m{i}" for i in range(L)), *(f"a{i}.h{j}" for i in range(L) for j in range(H))], key=forward
)
READERS = [
    reader for i in range(L) for reader in (*(f"a{i}.h{j}<{letter}>" for letter in "qkv" for j in range(H)), f"m{i}")
] + ["logits"]


def before(reader):
    """How many writers come before a reader."""
    if reader == "logits":
        return len(NAMES)
    layer = int(reader[1:].split(".")[0])
    return 1 + layer * (H + 1) + (H if reader[0] == "m" else 0)


REAL = torch.tensor([[forward(writer) < before(reader) for reader in READERS] for writer in NAMES])
SCORES = torch.randn(len(NAMES), generator=torch.Generator().manual_seed(0))
INSIDE = SCORES > 0


def node_graph(path, **changes):
    """A graph with scores of nodes, as EAP-IG's ``to_pt`` and ``to_json`` write it; None takes a part away."""
    if path.suffix == ".pt":
        parts = {
            "cfg": CFG,
            "src_nodes": NAMES,
            "dst_nodes": READERS,
            "edges_scores": torch.zeros(REAL.shape),
            "edges_in_graph": REAL & INSIDE[:, None],
            "nodes_in_graph": INSIDE,
            "nodes_scores": SCORES,
        } | changes
        torch.save({name: part for name, part in parts.items() if part is not None}, path)
        return path
    nodes = {
        name: {"in_graph": bool(used), "score": float(score)}
        for name, used, score in zip(NAMES, INSIDE, SCORES, strict=True)
    }
    nodes["logits"] = {"in_graph": True}
    edges = {
        f"{NAMES[i]}->{READERS[j]}": {"score": 0.0, "in_graph": bool(INSIDE[i])} for i, j in REAL.nonzero().tolist()
    }
    path.write_text(json.dumps({"cfg": CFG, "nodes": nodes, "edges": edges} | changes))
    return path


@pytest.fixture(scope="module")
def model():
    return random_model(num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=H)


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(4)


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_graphs_of_nodes_are_read(tmp_path, suffix):
    path = node_graph(tmp_path / f"graph{suffix}")
    for read in (dfa.NodeScores.from_mib, dfa.mib.scores):
        scores = read(path)
        assert scores.nodes.names == tuple(NAMES)
        torch.testing.assert_close(scores.values, SCORES)
    circuit = dfa.Circuit.from_mib(path)
    assert circuit.names == tuple(name for name, used in zip(NAMES, INSIDE, strict=True) if used)
    assert circuit.name == "graph"


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_what_is_written_is_what_the_schema_says(tmp_path, suffix):
    nodes = dfa.NodeSet.for_sizes(L, H, with_input=True)
    circuit = dfa.Circuit([name for name, used in zip(NAMES, INSIDE, strict=True) if used], nodes)
    dfa.NodeScores(SCORES, nodes).to_mib(tmp_path / f"s{suffix}", d_model=D)
    circuit.to_mib(tmp_path / f"c{suffix}", d_model=D)
    assert dfa.NodeScores.from_mib(tmp_path / f"s{suffix}").values.tolist() == SCORES.tolist()
    assert dfa.Circuit.from_mib(tmp_path / f"c{suffix}") == circuit
    if suffix == ".json":
        for name in "sc":
            found = json.loads((tmp_path / f"{name}.json").read_text())
            assert CFG.items() <= found["cfg"].items()
            assert set(found["nodes"]) == {*NAMES, "logits"}
            assert [found["nodes"][each]["in_graph"] for each in NAMES] == (
                INSIDE.tolist() if name == "c" else [True] * len(NAMES)
            )
        return
    for name, used in (("s", torch.ones_like(INSIDE)), ("c", INSIDE)):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert CFG.items() <= found["cfg"].items()
        assert (found["src_nodes"], found["dst_nodes"]) == (NAMES, READERS)
        assert found["edges_scores"].shape == found["edges_in_graph"].shape == REAL.shape
        assert torch.equal(found["nodes_in_graph"], used)
        assert torch.equal(found["edges_in_graph"], REAL & used[:, None])
        torch.testing.assert_close(found["nodes_scores"], SCORES if name == "s" else INSIDE.float())


def test_circuits_without_scores(tmp_path):
    path = node_graph(tmp_path / "edges.pt", nodes_scores=None, edges_scores=None)
    found = dfa.mib.circuit(path)
    assert int((found.flat == 1).sum()) == int((REAL & INSIDE[:, None]).sum()) and set(found.flat.tolist()) == {0, 1}
    assert dfa.mib.scores(path) == found
    nodes = {name: {"in_graph": bool(used)} for name, used in zip(NAMES, INSIDE, strict=True)}
    path = node_graph(tmp_path / "nodes.json", nodes=nodes, edges={})
    assert dfa.mib.circuit(path).kept.tolist() == INSIDE.tolist() == dfa.mib.scores(path).values.tolist()


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    class Code:
        def __reduce__(self):
            return (pytest.fail, ("code of the file's was run",))

    for changes, said in (
        ({"nodes_scores": Code()}, "plain tensors"),
        ({"nodes_scores": SCORES[1:]}, "nodes_scores is not one number"),
        ({"nodes_scores": torch.full_like(SCORES, torch.nan)}, "score of node 'input' is nan"),
        ({"nodes_in_graph": INSIDE.float()}, "no tensor of booleans"),
        ({"src_nodes": ["input", *NAMES[2:], "m9"]}, "lacks the score of node 'a0.h0'"),
        ({"cfg": None}, "no cfg"),
        ({"neurons_scores": torch.zeros(len(NAMES), D)}, "scores neurons"),
    ):
        path = node_graph(tmp_path / "graph.pt", **changes)
        with pytest.raises(FileError, match=said):
            dfa.mib.scores(path)
    (tmp_path / "list.pt").write_bytes(b"no torch file")
    with pytest.raises(FileError, match="plain tensors"):
        dfa.mib.scores(tmp_path / "list.pt")


def test_both_areas(model, pairs):
    scores = dfa.attribute(model, pairs, method="nap")
    found = dfa.mib.areas(model, pairs, scores)
    for curve, ranking in ((found.signed, "signed"), (found.absolute, "absolute")):
        assert curve == dfa.faithfulness_curve(model, pairs, scores, protocol="mib", ranking=ranking)
    assert (found.cpr, found.cmd) == (found.signed.cpr, found.absolute.cmd)
    assert found.signed.cpr != found.absolute.cpr
    assert f"signed    {found.cpr:8.3f}*" in str(found) and f"{found.cmd:8.3f}*" in str(found)


@pytest.mark.parametrize("of_edges", [False, True])
def test_nine_circuits_are_the_curve_of_the_scores_that_made_them(model, pairs, of_edges):
    """As MIB puts them: the smallest for .1 % and so on; two of them may be equal."""
    if of_edges:
        scores = dfa.attribute_edges(model, pairs, method="eap", readers="per-head")
    else:
        scores = dfa.attribute(model, pairs, nodes=dfa.NodeSet.heads_and_mlps(model, with_input=True))
    expected = dfa.faithfulness_curve(model, pairs, scores, protocol="mib")
    circuits = []
    for k in expected.sizes[:-1].tolist():
        if of_edges:
            inside = torch.where(scores.edges.existing, 0.0, torch.nan).flatten()
            inside[scores.values.flatten().nan_to_num(-torch.inf).argsort(descending=True, stable=True)[:k]] = 1
            circuits.append(dfa.EdgeScores(inside.reshape(scores.values.shape), scores.edges))
        else:
            circuits.append(scores.circuit(k))
    found = dfa.mib.of_circuits(model, pairs, circuits[::-1])
    np.testing.assert_allclose(found.faithfulness, expected.faithfulness, atol=1e-6)
    assert (found.cpr, found.cmd) == pytest.approx((expected.cpr, expected.cmd), abs=1e-6)
    assert found.fractions.tolist() == list(MIB_FRACTIONS)
    assert found.sizes.tolist() == expected.sizes.tolist()


def test_another_number_of_circuits_stands_where_it_is(model, pairs):
    scores = dfa.attribute(model, pairs, method="nap")
    found = dfa.mib.of_circuits(model, pairs, [scores.circuit(k) for k in (9, 0, 15)])
    expected = dfa.faithfulness_curve(model, pairs, scores, sizes=[0, 9, 15])
    np.testing.assert_allclose(found.faithfulness, expected.faithfulness, atol=1e-6)
    assert found.fractions.tolist() == [0, 0.6, 1] and found.cpr == pytest.approx(expected.cpr)
    with pytest.raises(FaithfulnessError, match="same size"):
        dfa.mib.of_circuits(model, pairs, [scores.circuit(3), scores.circuit(3)])
    with pytest.raises(FaithfulnessError, match="no circuits"):
        dfa.mib.of_circuits(model, pairs, [])
    other = dfa.NodeSet.heads_and_mlps(model)[1:]
    with pytest.raises(FaithfulnessError, match="same nodes"):
        dfa.mib.of_circuits(model, pairs, [scores.circuit(3), dfa.Circuit(["m1"], other)])


def qwen(seed=0):
    return dfa.controls.random_scores(dfa.NodeSet.for_sizes(24, 14, with_input=True), seed=seed)


def test_a_submission(tmp_path):
    llama = dfa.controls.random_scores(dfa.NodeSet.for_sizes(32, 32))
    given = {("ioi", "qwen2.5"): qwen(), ("mcqa", "qwen2.5"): qwen(1), ("addition", "llama3"): llama}
    written = dfa.mib.export(tmp_path, given)
    assert dfa.mib.check(tmp_path) == []
    assert dfa.mib.export(tmp_path, {("ioi", "qwen2.5"): qwen(2)}, suffix=".json")[0].suffix == ".json"
    assert not written[0].exists()
    found = {(entry.task, entry.model): entry for entry in dfa.mib.entries(tmp_path)}
    assert found.keys() == given.keys()
    assert dfa.mib.scores(found["ioi", "qwen2.5"].files[0]) == qwen(2)
    assert {path.parent.name for path in written} == {"ioi_qwen2.5", "mcqa_qwen2.5", "arithmetic-addition_llama3"}
    with pytest.raises(FileError, match="task of MIB 'docstring'"):
        dfa.mib.export(tmp_path, {("docstring", "llama3"): llama})
    with pytest.raises(FileError, match="suffix"):
        dfa.mib.export(tmp_path, given, suffix=".csv")


def test_what_mib_would_not_take(tmp_path):
    with pytest.raises(FileError, match="no folder"):
        dfa.mib.check(tmp_path / "nowhere")
    (tmp_path / "ioi_gpt2").mkdir()
    with pytest.raises(FileError, match="no folder of circuits"):
        dfa.mib.check(tmp_path)
    dfa.mib.export(tmp_path, {("ioi", "gpt2"): qwen(), ("arc-easy", "qwen2.5"): qwen(), ("mcqa", "own"): qwen()})
    qwen().to_mib(tmp_path / "mcqa_own" / "second.pt")
    (tmp_path / "ioi_llama3").mkdir()
    (tmp_path / "ioi_llama3" / "importances.json").write_text("{}")
    said = "\n".join(dfa.mib.check(tmp_path))
    for problem in (
        "ioi_gpt2: gpt2 has 12 layers × 12 heads, the files 24 layers × 14 heads",
        "does not judge qwen2.5 on arc-easy",
        "MIB has no model 'own'",
        "mcqa_own has 2 files: one of scores or 9 circuits",
        "ioi_llama3: ",
    ):
        assert problem in said


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = dfa.zoo.load("llama3-tiny-source")
    pairs = dfa.tasks.load("ioi", model.tokenizer, split="test", n=4)
    scores = dfa.attribute(model, pairs, method="nap")
    scores.save("ioi.safetensors")
    run = CliRunner().invoke
    for command in ("export", "check", "evaluate"):
        shown = run(app, ["mib", command, "--help"]).output
        assert f"Example: dfa-lens mib {command} " in " ".join(shown.split())
    done = run(app, "mib export --scores ioi=ioi.safetensors --as tiny --out sub".split())
    assert done.exit_code == 0 and "ioi_tiny/importances.pt written" in done.output and "asks for two" in done.output
    done = run(app, "mib check sub --json".split())
    assert done.exit_code == 1 and len(json.loads(done.stdout)["problems"]) == 3
    done = run(app, "mib evaluate sub --model llama3-tiny-source -n 4 --json".split())
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)["tasks"][0]
    expected = dfa.mib.areas(model, pairs, scores)
    assert (row["cpr"], row["cmd"]) == pytest.approx((expected.cpr, expected.cmd))
    done = run(app, "mib evaluate sub --model llama3-tiny-source --as gpt2".split())
    assert "no circuits of gpt2" in str(done.exception)
    dfa.mib.export("sub", {("mcqa", "qwen2.5"): qwen()})
    done = run(app, "mib evaluate sub --model llama3-tiny-source".split())
    assert "say which the model is with --as" in str(done.exception)
