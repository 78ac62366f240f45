"""Edge sets and edge scores as values: names, order, selection, files."""

import json

import pytest
import torch
from helpers import unchecked
from hypothesis import given
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.errors import EdgeError, FileError, ScoreError

EDGES = dfa.EdgeSet(2, 4, 2)
PER_HEAD = dfa.EdgeSet(2, 4)


def made(edges=EDGES, seed=0, **meta):
    values = torch.randn(edges.shape, generator=torch.Generator().manual_seed(seed))
    return dfa.EdgeScores(values, edges, meta)


def comes_before(writer, reader):
    """Whether a writer writes before a reader reads, from the names alone."""

    def place(name):
        layer = int(name[1:].split(".")[0])
        return 2 * layer + (name[0] == "m")

    if writer == "input" or reader == "logits":
        return True
    return place(writer) < place(reader)


@pytest.mark.parametrize("edges", [EDGES, PER_HEAD, dfa.EdgeSet(1, 1), dfa.EdgeSet(3, 6, 1)])
def test_edges_are_those_from_writers_to_later_readers(edges):
    for row, writer in enumerate(edges.writers):
        for column, reader in enumerate(edges.readers):
            assert bool(edges.existing[row, column]) == comes_before(writer, reader)
    assert len(edges) == int(edges.existing.sum()) == len(list(edges))
    assert [(w, r) for w, r in edges] == [(w, r) for w in edges.writers for r in edges.readers if comes_before(w, r)]


def test_selection_by_pattern():
    some = EDGES["a0.*", "a1.kv*"]
    assert len(some) == 4 * 4
    assert "a0.h3->a1.kv1<v>" in some
    assert "input->a1.kv1<v>" not in some
    assert "nonsense" not in some
    assert EDGES.where(reader="logits").where(writer="m*")["m1", "*"] == EDGES["m1", "logits"]
    assert EDGES["input", "*"] != PER_HEAD["input", "*"]
    sample = EDGES.sample(7, seed=3)
    assert len(sample) == 7 and sample == EDGES.sample(7, seed=3) != EDGES.sample(7, seed=4)
    scores = made()
    own = scores.where(writer="m0", reader="*<q>")
    assert own.edges == EDGES["m0", "*<q>"]
    assert torch.equal(own.flat, scores.flat[own.edges.chosen[EDGES.chosen]])
    with pytest.raises(EdgeError, match="is not among the 4 of the set"):
        own["m0->logits"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: EDGES.position("m1->a0.h0<q>"), r"There is no edge m1->a0\.h0<q>: a0\.h0<q> reads before m1 writes"),
        (lambda: EDGES.position("a1.h0->a1.h1<q>"), "reads before a1.h0 writes"),
        (lambda: EDGES.position(("m7", "logits")), "There is no writer 'm7'"),
        (lambda: EDGES.position("m0->a1.h0<k>"), r"There is no reader 'a1\.h0<k>'; they are like .*'a0\.kv0<k>'"),
        (lambda: EDGES.position("m0"), "An edge is 'writer->reader', or the two names, not 'm0'"),
        (lambda: EDGES["m1", "a0.*"], r"None of the \d+ edges goes from 'm1' to 'a0\.\*'"),
        (lambda: unchecked(dfa.EdgeSet.__getitem__)(EDGES, "m1"), "Edges are chosen by a writer and a reader"),
        (lambda: EDGES.sample(0), r"Between 1 and \d+ edges can be sampled, not 0"),
        (lambda: dfa.EdgeSet(2, 4, 3), "4 heads can't share 3 key-value heads evenly"),
        (lambda: dfa.EdgeSet(0, 4), "The number of layers is an integer of at least 1, not 0"),
        (lambda: EDGES.choose(torch.ones(EDGES.shape, dtype=torch.bool)), "There is no edge a0.h0->a0.h0<q>"),
        (lambda: EDGES.choose(torch.zeros(EDGES.shape, dtype=torch.bool)), "at least one edge"),
        (lambda: EDGES.choose(torch.zeros(3, 3, dtype=torch.bool)), r"boolean tensor \[11, 19\] \[writer, reader\]"),
        (lambda: made().top(10**6), "k must be between 0 and the number of edges"),
        (lambda: unchecked(dfa.EdgeScores.order)(made(), "sined"), "Unknown ranking 'sined'.*Did you mean 'signed'"),
        (
            lambda: unchecked(dfa.EdgeScores.order)(made(), selection="gredy"),
            "Unknown selection 'gredy'.*Did you mean 'greedy'",
        ),
        (
            lambda: dfa.EdgeScores(torch.zeros(2, 2), EDGES),
            r"Edge scores of shape \[2, 2\] for 11 writers and 19 readers",
        ),
        (
            lambda: dfa.EdgeScores(made().values, EDGES.all_of_model, {}) and made().require(PER_HEAD),
            "grouped or per head",
        ),
        (lambda: made().to_grouped(2), "grouped already"),
        (lambda: made(PER_HEAD).where(reader="a1.h0<k>").to_grouped(2), "lacks edges of some heads of a group"),
    ],
)
def test_bad_input(wrong, message):
    with pytest.raises((EdgeError, ScoreError), match=message):
        wrong()


def test_a_score_that_is_not_finite_is_named():
    values = torch.zeros(EDGES.shape)
    values[EDGES.position("a0.h1->m1")] = torch.inf
    values[-1, 0] = torch.nan  # no edge there
    with pytest.raises(ScoreError, match=r"1 of \d+ scores are not finite \(first: inf at a0\.h1->m1\)"):
        dfa.EdgeScores(values, EDGES)


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=11, max_size=11))
def test_order_agrees_with_pythons_stable_sort(values):
    edges = dfa.EdgeSet(1, 2, 1)
    matrix = torch.zeros(edges.shape)
    matrix[edges.chosen] = torch.tensor(values)
    scores = dfa.EdgeScores(matrix, edges)
    assert scores.flat.tolist() == values
    assert scores.order().tolist() == sorted(range(11), key=lambda i: -values[i])
    assert scores.order("absolute").tolist() == sorted(range(11), key=lambda i: -abs(values[i]))
    names = [str(edge) for edge in edges]
    assert list(scores.top(4)) == [names[i] for i in scores.order()[:4]]
    assert sorted(scores.order(selection="greedy").tolist()) == list(range(11))


@pytest.mark.parametrize("edges", [EDGES, PER_HEAD])
@pytest.mark.parametrize("ranking", ["signed", "absolute"])
def test_greedy_takes_the_best_edge_whose_reader_is_there(edges, ranking):
    """The definition, step by step."""
    scores = made(edges)
    key = {str(e): abs(scores[e]) if ranking == "absolute" else scores[e] for e in edges}
    present, left, expected = {"logits"}, [str(edge) for edge in edges], []

    def node(reader):
        """The nodes whose input a reader is."""
        head = reader.split("<")[0]
        if ".kv" not in head:
            return {head}
        layer, group = head.split(".kv")
        return {f"{layer}.h{2 * int(group) + i}" for i in range(2)}

    while left:
        candidates = [name for name in left if node(name.split("->")[1]) & present]
        best = max(candidates, key=key.__getitem__)
        expected.append(best)
        left.remove(best)
        present.add(best.split("->")[0])
    assert list(scores.top(len(edges), ranking=ranking, selection="greedy")) == expected


@pytest.mark.parametrize("edges", [EDGES, PER_HEAD])
def test_live_edges_are_those_on_a_path(edges):
    """Against a search through the paths themselves."""
    kept = edges.sample(len(edges) // 3, seed=1)
    names = [tuple(edge) for edge in kept]

    def heads(reader):
        head = reader.split("<")[0]
        if ".kv" not in head:
            return [head]
        layer, group = head.split(".kv")
        return [f"{layer}.h{2 * int(group) + i}" for i in range(2)]

    found = set()

    def walk(node, path):
        for edge in names:
            if edge[0] == node:
                if edge[1] == "logits":
                    found.update([*path, edge])
                else:
                    for head in heads(edge[1]):
                        walk(head, [*path, edge])

    walk("input", [])
    live = edges.live(kept.chosen)
    assert {(edges.writers[r], edges.readers[c]) for r, c in live.nonzero().tolist()} == found
    assert 0 < len(found) < len(kept)
    assert torch.equal(edges.live(edges.existing), edges.existing)


def test_sums():
    scores = made(PER_HEAD, method="eap")
    nodes = scores.to_nodes()
    assert nodes.nodes == dfa.NodeSet.for_sizes(2, 4, with_input=True)
    for writer in PER_HEAD.writers:
        assert nodes[writer] == pytest.approx(sum(scores[e] for e in PER_HEAD[writer, "*"]), abs=1e-5)
    grouped = scores.to_grouped(2)
    assert grouped.edges == EDGES
    assert grouped["m0->a1.kv1<k>"] == pytest.approx(scores["m0->a1.h2<k>"] + scores["m0->a1.h3<k>"], abs=1e-6)
    assert grouped["m0->a1.h2<q>"] == scores["m0->a1.h2<q>"]
    torch.testing.assert_close(grouped.to_nodes().values, nodes.values)


@pytest.mark.parametrize("with_input", [True, False])
def test_node_scores_on_edges_add_up_again(with_input):
    nodes = dfa.NodeSet.for_sizes(2, 4, with_input=with_input)
    scores = dfa.NodeScores(torch.randn(len(nodes)), nodes)
    shared = dfa.EdgeScores.from_nodes(scores, EDGES)
    assert len(set(shared.where(writer="a0.h1").flat.tolist())) == 1
    again = shared.to_nodes()
    torch.testing.assert_close(again.values[-len(nodes) :], scores.values)
    assert with_input or again["input"] == 0
    with pytest.raises(ScoreError, match="are not those of the writers"):
        dfa.EdgeScores.from_nodes(dfa.NodeScores(torch.randn(4), nodes[:4]), EDGES)
    with pytest.raises(ScoreError, match="no edge of 'a0.h0'"):
        dfa.EdgeScores.from_nodes(scores, EDGES["m*", "*"] if not with_input else EDGES.choose(without_heads()))


def without_heads():
    chosen = EDGES.chosen.clone()
    chosen[[i for i, name in enumerate(EDGES.writers) if name[0] == "a"]] = False
    return chosen


def test_frame():
    frame = made().to_frame()
    assert frame["edge"].tolist() == [str(edge) for edge in EDGES]
    assert frame.sort_values("rank")["score"].is_monotonic_decreasing
    assert frame.query("writer == 'm0' and reader == 'logits'")["score"].item() == pytest.approx(made()["m0->logits"])


@pytest.mark.parametrize("edges", [EDGES, PER_HEAD, EDGES["a0.*", "m*"], EDGES.sample(1)])
def test_save_and_load(edges, tmp_path):
    scores = made(edges, method="eap", steps=5)
    path = tmp_path / "new" / "edges.safetensors"
    scores.save(path)
    loaded = dfa.EdgeScores.load(path)
    assert loaded == scores and loaded.meta == scores.meta
    assert loaded != made(edges, seed=1) and hash(loaded) == hash(scores)
    assert [p.name for p in path.parent.iterdir()] == ["edges.safetensors"]


def test_bad_files(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileError, match="There is no file"):
        dfa.EdgeScores.load(path)
    dfa.NodeScores(torch.zeros(8), dfa.NodeSet.for_sizes(2, 3)).save(path)
    with pytest.raises(FileError, match="not a file of 'dfa_lens edge scores'"):
        dfa.EdgeScores.load(path)
    from dfa_lens.data.files import save_tensors

    good = {"sizes": json.dumps({"n_layers": 1, "n_heads": 1, "n_kv_heads": 1}), "meta": "{}"}
    for tensors, metadata, message in (
        ({"scores": torch.zeros(3)}, good, r"it has 3 scores, not those of"),
        ({"scores": torch.zeros(8, dtype=torch.int64)}, good, "the scores are torch.int64"),
        ({"scores": torch.zeros(8)}, good | {"sizes": "[]"}, "is not a file of edge scores"),
        ({"scores": torch.zeros(8)}, good | {"sizes": "{}"}, "lacks 'n_layers'"),
        ({"scores": torch.zeros(1), "edges": torch.tensor([[9, 9]])}, good, "beyond its sizes"),
        ({"scores": torch.zeros(1), "edges": torch.tensor([2, 0])}, good, "its edges are"),
        ({"scores": torch.zeros(1), "edges": torch.tensor([[2, 0]])}, good, "There is no edge m0->a0.h0<q>"),
        ({"scores": torch.full((8,), torch.nan)}, good, "8 of 8 scores are not finite"),
    ):
        save_tensors(path, tensors, metadata, "dfa_lens edge scores 1")
        with pytest.raises(FileError, match=message):
            dfa.EdgeScores.load(path)


@pytest.mark.parametrize("name", ["graph.json", "graph.pt"])
def test_mib_round_trip(name, tmp_path):
    scores = made(PER_HEAD, model="some-model", d_model=32)
    scores.to_mib(tmp_path / name)
    loaded = dfa.EdgeScores.from_mib(tmp_path / name)
    assert loaded == scores
    assert loaded.meta == {"model": "some-model", "d_model": 32, "format": "mib"}
    with pytest.raises(ScoreError, match="use readers='per-head'"):
        made(EDGES).to_mib(tmp_path / name)


def test_what_mib_s_files_hold(tmp_path):
    """The keys and shapes that EAP-IG's own readers ask for."""
    scores = made(PER_HEAD["a0.*", "*"], d_model=32)
    scores.to_mib(tmp_path / "graph.json")
    content = json.loads((tmp_path / "graph.json").read_text())
    assert set(content) == {"cfg", "nodes", "edges"}
    assert content["cfg"].items() >= {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32}.items()
    assert set(content["nodes"]) == {*PER_HEAD.writers, "logits"}
    assert set(content["edges"]) == {str(edge) for edge in PER_HEAD}
    assert content["edges"]["a0.h1->m1"] == {"score": scores["a0.h1->m1"], "in_graph": True}
    assert content["edges"]["m0->m1"] == {"score": 0.0, "in_graph": False}
    scores.to_mib(tmp_path / "graph.pt")
    content = torch.load(tmp_path / "graph.pt", weights_only=True)
    assert set(content) == {"cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph"}
    assert content["src_nodes"] == list(PER_HEAD.writers) and content["dst_nodes"] == list(PER_HEAD.readers)
    assert content["edges_scores"].shape == content["edges_in_graph"].shape == PER_HEAD.shape
    assert not content["edges_scores"].isnan().any()
    assert content["nodes_in_graph"].tolist() == [w.startswith("a0") for w in PER_HEAD.writers]


@pytest.mark.parametrize("name", ["graph.json", "graph.pt"])
def test_bad_mib_files(name, tmp_path):
    path = tmp_path / name
    path.write_text("nonsense")
    with pytest.raises(FileError, match="is not an edge graph of MIB"):
        dfa.EdgeScores.from_mib(path)
    made(PER_HEAD).to_mib(path)
    if name.endswith("json"):
        content, save = json.loads(path.read_text()), lambda value: path.write_text(json.dumps(value))
        one = dict(content["edges"])
        one.pop("m0->m1")
        wrongs = [
            ({**content, "edges": one}, r"it has \d+ edges; 2 layers × 4 heads have \d+"),
            ({**content, "edges": {**one, "m1->m0": {"score": 1.0}}}, "it lacks the edge 'm0->m1'"),
            ({**content, "edges": {**one, "m0->m1": {"score": None}}}, "the score of edge 'm0->m1' is None"),
        ]
    else:
        content, save = torch.load(path, weights_only=True), lambda value: torch.save(value, path)
        wrongs = [
            ({**content, "src_nodes": content["src_nodes"][::-1]}, "its writers are not those of 2 layers × 4 heads"),
            ({**content, "edges_scores": torch.zeros(3, 3)}, r"edges_scores is \[3, 3\], not \[11, 27\]"),
            ({**content, "edges_scores": torch.full((11, 27), torch.nan)}, "scores are not finite"),
            ([1], "it holds a list"),
        ]
    cfg = content["cfg"]
    wrongs += [
        ({**content, "cfg": {**cfg, "n_layers": "2"}}, "n_layers is '2', not a positive integer"),
        ({**content, "cfg": {**cfg, "n_heads": 10**9}}, "edges|writers"),
        ({**content, "cfg": {**cfg, "parallel_attn_mlp": True}}, "run in parallel"),
        ({"nodes": {}}, "lacks 'cfg'"),
    ]
    for value, message in wrongs:
        save(value)
        with pytest.raises(FileError, match=message):
            dfa.EdgeScores.from_mib(path)
