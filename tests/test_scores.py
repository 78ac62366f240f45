import json

import pytest
import torch
from helpers import unchecked
from hypothesis import given
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.errors import FileError, ScoreError

NODES = dfa.NodeSet.for_sizes(2, 3)


def test_order_is_stable_and_ranks_are_its_inverse():
    scores = dfa.NodeScores(torch.tensor([1.0, -3, 1, 0, 2, 0, 1, -1]), NODES)
    assert scores.order().tolist() == [4, 0, 2, 6, 3, 5, 7, 1]
    assert scores.order("absolute").tolist() == [1, 4, 0, 2, 6, 7, 3, 5]
    assert scores.ranks().tolist() == [2, 8, 3, 5, 1, 6, 4, 7]
    assert scores.top(2) == {"a1.h0": 2.0, "a0.h0": 1.0}
    assert scores["a0.h1"] == -3


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=8, max_size=8))
def test_order_agrees_with_pythons_stable_sort(values):
    scores = dfa.NodeScores(torch.tensor(values), NODES)
    assert scores.order().tolist() == sorted(range(8), key=lambda i: -values[i])
    assert scores.order("absolute").tolist() == sorted(range(8), key=lambda i: -abs(values[i]))


def test_frame():
    frame = dfa.NodeScores(torch.arange(8.0), NODES).to_frame()
    assert frame["node"].tolist() == list(NODES.names)
    assert frame["score"].tolist() == list(range(8))
    assert frame["rank"].tolist() == list(range(8, 0, -1))


def test_save_and_load(tmp_path):
    scores = dfa.NodeScores(torch.randn(8), NODES, {"method": "nap", "steps": 5})
    path = tmp_path / "new" / "scores.safetensors"
    scores.save(path)
    loaded = dfa.NodeScores.load(path)
    assert torch.equal(loaded.values, scores.values)
    assert loaded.nodes == NODES
    assert loaded.meta == scores.meta
    assert [p.name for p in path.parent.iterdir()] == ["scores.safetensors"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    dfa.NodeScores(torch.ones(8), NODES).save(path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dfa.NodeScores(torch.zeros(8), NODES).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]
    assert dfa.NodeScores.load(path).values.sum() == 8


def test_scores_may_rank_by_size(tmp_path):
    values = torch.tensor([1.0, -3, 2, 0, 0, 0, 0, 0])
    signed, by_size = (dfa.NodeScores(values, NODES, meta) for meta in ({}, {"ranking": "absolute"}))
    assert (signed.ranking, by_size.ranking) == ("signed", "absolute")
    assert list(by_size.top(2).values()) == [-3, 2] and list(signed.top(2).values()) == [2, 1]
    assert by_size.top(3, ranking="signed") == signed.top(3)
    assert (
        by_size.circuit(2) == signed.circuit(2, ranking="absolute") and by_size.circuit(2).meta["ranking"] == "absolute"
    )
    assert by_size.ranks().tolist()[:3] == [3, 1, 2]
    assert by_size != signed == dfa.NodeScores(values, NODES, {"method": "nap"})
    by_size.save(tmp_path / "s.safetensors")
    assert dfa.NodeScores.load(tmp_path / "s.safetensors") == by_size
    assert dfa.Membership.of([by_size], 1)[NODES.names[1]] == 1 == dfa.Membership.of([signed], 1)[NODES.names[2]]


def test_bad_input(tmp_path):
    with pytest.raises(ScoreError, match=r"Scores of shape \[3\] for 8 nodes"):
        dfa.NodeScores(torch.zeros(3), NODES)
    with pytest.raises(ScoreError, match=r"2 of 8 scores are not finite \(first: nan at a0.h2\)"):
        dfa.NodeScores(torch.tensor([0, 0, float("nan"), 0, 0, float("inf"), 0, 0]), NODES)
    scores = dfa.NodeScores(torch.zeros(8), NODES)
    with pytest.raises(ScoreError, match="between 0 and the number of nodes, 8, not 9"):
        scores.top(9)
    with pytest.raises(ScoreError, match="Unknown ranking 'sined'.*Did you mean 'signed'"):
        unchecked(dfa.NodeScores.order)(scores, "sined")
    with pytest.raises(FileError, match="There is no file"):
        dfa.NodeScores.load(tmp_path / "missing")
    broken = tmp_path / "broken"
    broken.write_bytes(b"nonsense")
    with pytest.raises(FileError, match="not a readable safetensors file"):
        dfa.NodeScores.load(broken)
    alignment = tmp_path / "w"
    dfa.controls.random_w(NODES, NODES).save(alignment)
    with pytest.raises(FileError, match="not a file of 'dfa_lens scores'"):
        dfa.NodeScores.load(alignment)


def test_mib_round_trip(tmp_path):
    nodes = dfa.NodeSet.for_sizes(2, 3, with_input=True)
    scores = dfa.NodeScores(torch.randn(9), nodes, {"model": "some-model"})
    path = tmp_path / "scores.json"
    scores.to_mib(path)
    written = json.loads(path.read_text())
    assert set(written) == {"cfg", "nodes", "edges"}
    assert set(written["nodes"]) == {*nodes.names, "logits"}
    assert written["cfg"]["n_layers"] == 2
    assert written["cfg"]["n_heads"] == 3
    loaded = dfa.NodeScores.from_mib(path)
    assert loaded.nodes == nodes
    torch.testing.assert_close(loaded.values, scores.values)
    assert dfa.NodeScores.from_mib(path, nodes=nodes).nodes == nodes
    # transferred scores have no `input`: it is written with score 0, and can be left out when reading
    bare = dfa.NodeScores(torch.randn(8), NODES)
    bare.to_mib(path)
    assert dfa.NodeScores.from_mib(path)["input"] == 0
    torch.testing.assert_close(dfa.NodeScores.from_mib(path, nodes=NODES).values, bare.values)
    with pytest.raises(ScoreError, match="2 layers × 3 heads.*3 layers × 4 heads"):
        dfa.NodeScores.from_mib(path, nodes=dfa.NodeSet.for_sizes(3, 4))


def test_bad_mib_files(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("[]")
    with pytest.raises(FileError, match="not a MIB score file"):
        dfa.NodeScores.from_mib(path)
    path.write_text(json.dumps({"cfg": {"n_layers": 1, "n_heads": 1}, "nodes": {"input": {"score": 1}}, "edges": {}}))
    with pytest.raises(FileError, match=r"lacks the score of node 'a0\.h0'"):
        dfa.NodeScores.from_mib(path)
    heads = dfa.NodeSet.for_sizes(1, 2).where(lambda n: n.kind == "head")
    with pytest.raises(ScoreError, match="every head and MLP block"):
        dfa.NodeScores(torch.ones(2), heads).to_mib(path)
