"""Files as people have them: broken, of another kind, of another form. One error of ours each, that says which file."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dfa_lens as dfa
from dfa_lens.data.content import plain
from dfa_lens.data.files import load_tensors, save_tensors, write_atomically
from dfa_lens.errors import DfaError, FileError, ScoreError

A, B = dfa.NodeSet.for_sizes(2, 2), dfa.NodeSet.for_sizes(3, 3)
MIB = dfa.NodeSet.for_sizes(1, 2, with_input=True)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scores():
    return dfa.controls.random_scores(A)


def alignment():
    first = dfa.Alignment.of(torch.arange(72.0).reshape(6, 12), A, B, bias=torch.ones(12), history=[{"step": 0}])
    return dfa.controls.random_w(B, A) @ first


#: how to write and to read each kind of file
KINDS = {
    "scores": (lambda path: scores().save(path), dfa.NodeScores.load, scores),
    "alignment": (lambda path: alignment().save(path), dfa.Alignment.load, alignment),
    "mib": (
        lambda path: dfa.controls.uniform(MIB).to_mib(path), dfa.NodeScores.from_mib, lambda: dfa.controls.uniform(MIB)
    ),
    "released": (
        lambda path: torch.save({"W": torch.ones(3, 2), "small_nodes": ["a0.h0", "m0", "input"], "large_nodes": ["m0", "m1"]}, path),
        dfa.Alignment.from_released,
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, b"nonsense", b"\xff\xfe\xfa", b"[]", b"{}", b"null", b"1", b'"text"', b"[" * 50_000, b'{"a":' * 50_000,
     b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04", b"\x80\x04\x95"],
)  # fmt: skip
def test_what_is_no_such_file(tmp_path, kind, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(FileError, match=str(path)) as caught:
        KINDS[kind][1](path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_at_all(tmp_path, kind):
    read = KINDS[kind][1]
    with pytest.raises(FileError, match="is a folder, not a file"):
        read(tmp_path)
    with pytest.raises(FileError, match="There is no file"):
        read(tmp_path / "none")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_one_kind_are_not_read_as_another(tmp_path, kind):
    path = tmp_path / "file"
    KINDS[kind][0](path)
    for other, (_, read, _) in KINDS.items():
        if other != kind:
            with pytest.raises(FileError):
                read(path)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_a_damaged_file_is_the_same_or_one_error(tmp_path, kind, data):
    """Bytes changed, cut off or put in: what is read is what was written, or one FileError."""
    write, read, make = KINDS[kind]
    path = tmp_path / f"{kind}.file"
    write(path)
    whole = path.read_bytes()
    first = read(path)
    at = data.draw(st.integers(0, len(whole) - 1))
    width = data.draw(st.integers(0, 6))
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=6)) + whole[at + width :])
    try:
        found = read(path)
    except FileError as error:
        message = str(error)
    else:
        message = str(path)
        assert isinstance(found, type(first))
        if kind in ("scores", "alignment"):  # the formats of ours have a checksum
            assert found == make() and found.meta == first.meta
    assert str(path) in message and len(message) < 600


@quick
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6),
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.text(max_size=5), st.floats(allow_nan=False), st.lists(st.integers()))
    ),
)
def test_scores_come_back(tmp_path, values, meta):
    made = dfa.NodeScores(torch.tensor(values), A, meta)
    made.save(tmp_path / "s")
    found = dfa.NodeScores.load(tmp_path / "s")
    assert found == made and found.meta == meta


@quick
@given(st.integers(1, 3), st.sampled_from(["unit", "raw", "rank", "signed-sqrt"]), st.booleans(), st.floats(1e-3, 1e3))
def test_alignments_come_back(tmp_path, stages, scaling, bias, temperature):
    made = None
    for i in range(stages):
        one = dfa.Alignment.of(
            torch.randn(6, 6, generator=torch.Generator().manual_seed(i)), A, A,
            scaling=scaling, bias=torch.arange(6.0) if bias else None, temperature=temperature, meta={"i": i},
        )  # fmt: skip
        made = one if made is None else one @ made
    made.save(tmp_path / "w")
    found = dfa.Alignment.load(tmp_path / "w")
    assert found == made and found.meta == made.meta


def test_any_metadata_can_be_written(tmp_path):
    meta = {"tensor": torch.ones(3), 1: {"x": (1, 2)}, "function": scores, "object": object(), "set": {1}}
    dfa.NodeScores(torch.ones(6), A, meta).save(tmp_path / "s")
    assert dfa.NodeScores.load(tmp_path / "s").meta == json.loads(json.dumps(plain(meta)))


# --- our own formats, part by part -------------------------------------------------------------------------------


def without_checksum(path, tensors, metadata, kind):
    """A file as another program, or an earlier version, might write it."""
    save_file(tensors, path, {"format": f"dfa_lens {kind} 1", **metadata})


def test_files_without_a_checksum_are_read(tmp_path):
    """Those of earlier versions."""
    path = tmp_path / "s"
    made = scores()
    without_checksum(path, {"values": made.values}, {"nodes": json.dumps(A.to_records()), "meta": "{}"}, "scores")
    assert dfa.NodeScores.load(path) == made


RECORDS = A.to_records()
WRONG_NODES = {
    "twice": [RECORDS[0], *RECORDS[:5]],
    "too few": RECORDS[:3],
    "lacks a key": [{k: v for k, v in record.items() if k != "point"} for record in RECORDS],
    "another key": [record | {"color": "red"} for record in RECORDS],
    "no list": {"a": 1},
    "a number": 3,
    "no mappings": ["a0.h0"] * 6,
    "layers of text": [record | {"layer": "0"} for record in RECORDS],
    "no name": [record | {"name": None} for record in RECORDS],
    "a slice beyond": [record | {"axis": 2, "index": 7, "size": 2} for record in RECORDS],
    "null": None,
}


@pytest.mark.parametrize("nodes", WRONG_NODES)
def test_node_sets_in_files(tmp_path, nodes):
    path, text = tmp_path / "file", json.dumps(WRONG_NODES[nodes])
    without_checksum(path, {"values": torch.ones(6)}, {"nodes": text, "meta": "{}"}, "scores")
    with pytest.raises(FileError, match="is not a file of scores") as caught:
        dfa.NodeScores.load(path)
    assert len(str(caught.value)) < 600
    stage = {"scaling": "unit", "source": WRONG_NODES[nodes], "target": RECORDS}
    description = {"temperature": 1.0, "meta": {}, "history": [], "stages": [stage]}
    without_checksum(path, {"W.0": torch.ones(6, 6)}, {"alignment": json.dumps(description)}, "alignment")
    with pytest.raises(FileError, match="is not an alignment"):
        dfa.Alignment.load(path)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"values": torch.ones(5)}, {}),
        ({"values": torch.ones(6, 1)}, {}),
        ({"values": torch.ones(6, dtype=torch.long)}, {}),
        ({"values": torch.ones(6, dtype=torch.bool)}, {}),
        ({"values": torch.ones(6, dtype=torch.complex64)}, {}),
        ({"values": torch.full((6,), float("nan"))}, {}),
        ({"values": torch.full((6,), float("inf"))}, {}),
        ({"other": torch.ones(6)}, {}),
        ({"values": torch.ones(6)}, {"meta": "[]"}),
        ({"values": torch.ones(6)}, {"meta": "{"}),
        ({"values": torch.ones(6)}, {"meta": "[" * 50_000}),
        ({"values": torch.ones(6)}, {"nodes": "[" * 50_000}),
        ({"values": torch.ones(6)}, {"nodes": None}),
    ],
)
def test_scores_of_another_form(tmp_path, tensors, metadata):
    path = tmp_path / "file"
    given = {"nodes": json.dumps(RECORDS), "meta": "{}"} | metadata
    without_checksum(path, tensors, {k: v for k, v in given.items() if v is not None}, "scores")
    with pytest.raises(FileError, match="is not a file of scores") as caught:
        dfa.NodeScores.load(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("tensors", "change"),
    [
        ({"W.0": torch.ones(6, 5)}, {}),
        ({"W.0": torch.ones(36)}, {}),
        ({"W.0": torch.ones(6, 6, dtype=torch.long)}, {}),
        ({"W.0": torch.full((6, 6), float("nan"))}, {}),
        ({"W.1": torch.ones(6, 6)}, {}),
        ({"W.0": torch.ones(6, 6), "W.1": torch.ones(6, 6)}, {}),
        ({"W.0": torch.ones(6, 6), "bias.0": torch.ones(5)}, {}),
        ({"W.0": torch.ones(6, 6)}, {"temperature": "1"}),
        ({"W.0": torch.ones(6, 6)}, {"temperature": 0}),
        ({"W.0": torch.ones(6, 6)}, {"temperature": None}),
        ({"W.0": torch.ones(6, 6)}, {"temperature": float("nan")}),
        ({"W.0": torch.ones(6, 6)}, {"temperature": float("inf")}),
        ({"W.0": torch.ones(6, 6)}, {"temperature": True}),
        ({"W.0": torch.ones(6, 6)}, {"meta": [1]}),
        ({"W.0": torch.ones(6, 6)}, {"history": {"step": 1}}),
        ({"W.0": torch.ones(6, 6)}, {"history": [1]}),
        ({"W.0": torch.ones(6, 6)}, {"history": 7}),
        ({"W.0": torch.ones(6, 6)}, {"stages": []}),
        ({"W.0": torch.ones(6, 6)}, {"stages": None}),
        ({"W.0": torch.ones(6, 6)}, {"stages": "x"}),
        ({"W.0": torch.ones(6, 6)}, {"stages": [{"scaling": "unity", "source": RECORDS, "target": RECORDS}]}),
        ({"W.0": torch.ones(6, 6)}, {"stages": [{"scaling": "x" * 10_000, "source": RECORDS, "target": RECORDS}]}),
        ({"W.0": torch.ones(6, 6)}, {"stages": [{"scaling": ["unit"], "source": RECORDS, "target": RECORDS}]}),
        ({"W.0": torch.ones(6, 6)}, {"stages": [{"source": RECORDS, "target": RECORDS}]}),
    ],
)
def test_alignments_of_another_form(tmp_path, tensors, change):
    path = tmp_path / "file"
    stage = {"scaling": "unit", "source": RECORDS, "target": RECORDS}
    description = {"temperature": 1.0, "meta": {}, "history": [], "stages": [stage]} | change
    without_checksum(path, tensors, {"alignment": json.dumps(description)}, "alignment")
    with pytest.raises(FileError, match="is not an alignment") as caught:
        dfa.Alignment.load(path)
    assert len(str(caught.value)) < 600
    for text in ("[]", "1", "null", "{", "[" * 50_000):
        without_checksum(path, tensors, {"alignment": text}, "alignment")
        with pytest.raises(FileError, match="is not an alignment"):
            dfa.Alignment.load(path)


def test_a_damaged_number_is_noticed(tmp_path):
    path = tmp_path / "s"
    scores().save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the last score
    path.write_bytes(bytes(content))
    with pytest.raises(FileError, match="was damaged after it was written"):
        dfa.NodeScores.load(path)
    path.write_bytes(path.read_bytes().replace(b"a0.h0", b"a0.hX"))
    with pytest.raises(FileError, match="was damaged|is not a file of scores"):
        dfa.NodeScores.load(path)


# --- MIB's and the released files --------------------------------------------------------------------------------


def mib(**changes):
    data = {
        "cfg": {"n_layers": 1, "n_heads": 2, "model_name": "x"},
        "nodes": {name: {"score": 0.5, "in_graph": True} for name in MIB.names} | {"logits": {"in_graph": True}},
        "edges": {},
    }
    return data | changes


def cfg(**changes):
    return {"cfg": mib()["cfg"] | changes}


def nodes(**changes):
    return {"nodes": mib()["nodes"] | changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": []}, "cfg is a list"),
        ({"cfg": {"n_layers": 1}}, "lacks 'n_heads'"),
        ({"nodes": [["a0.h0", {"score": 1}]]}, "nodes is a list"),
        (cfg(n_layers="1"), "n_layers is '1', not a positive integer"),
        (cfg(n_layers=1.0), "n_layers is 1.0"),
        (cfg(n_layers=True), "n_layers is True"),
        (cfg(n_layers=0), "n_layers is 0"),
        (cfg(n_heads=-2), "n_heads is -2"),
        (cfg(n_layers=2), "lacks the score of node 'a1.h0', for 2 layers"),
        (cfg(n_heads=1), "has a node 'a0.h1', but 1 layers × 1 heads"),
        (cfg(n_layers=10**7), "lacks the score of node 'a1.h0'"),  # at once, and in no memory
        (cfg(n_heads=10**15), "lacks the score of node 'a0.h2'"),
        (nodes(m0={}), "lacks the score of node 'm0'"),
        (nodes(m0=[1]), "lacks the score of node 'm0'"),
        (nodes(m0={"score": None}), "lacks the score of node 'm0'"),
        (nodes(m0={"score": "0.5"}), "the score of node 'm0' is '0.5', not a number"),
        (nodes(m0={"score": True}), "is True, not a number"),
        (nodes(m0={"score": [0.5]}), "not a number"),
        (nodes(m0={"score": float("nan")}), "score of node 'm0' is nan"),
        (nodes(m0={"score": float("-inf")}), "score of node 'm0' is -inf"),
        (nodes(m0={"score": 10**400}), "is not a MIB score file"),
        (nodes(m0={"score": 1e300}), "not finite"),
        (nodes(**{"a7.h9": {"score": 1}}), "has a node 'a7.h9'"),
        (nodes(**{"x" * 10_000: {"score": 1}}), "has a node 'xxx"),
    ],
)  # fmt: skip
def test_mib_files_of_another_form(tmp_path, change, message):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(mib(**change)))
    with pytest.raises(FileError, match=message) as caught:
        dfa.NodeScores.from_mib(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_mib_files_in_detail(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(mib(**nodes(a0={"score": 1}))).replace('"a0"', '"m0"'))
    with pytest.raises(FileError, match="it has 'm0' twice"):
        dfa.NodeScores.from_mib(path)
    path.write_bytes(json.dumps(mib(**cfg(model_name="é")), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(FileError, match=r"byte \d+ is no UTF-8"):
        dfa.NodeScores.from_mib(path)
    path.write_text(json.dumps(mib(**cfg(model_name="é")), ensure_ascii=False), encoding="utf-8")
    assert dfa.NodeScores.from_mib(path).meta["model"] == "é"
    without = {name: entry for name, entry in mib()["nodes"].items() if name != "input"}
    path.write_text(json.dumps(mib(nodes=without)))
    assert len(dfa.NodeScores.from_mib(path, nodes=MIB[1:])) == 3
    with pytest.raises(FileError, match="lacks the score of node 'input'"):
        dfa.NodeScores.from_mib(path)
    with pytest.raises(ScoreError, match="1 layers × 2 heads, but the nodes are those of 2 layers"):
        dfa.NodeScores.from_mib(path, nodes=A)


@pytest.mark.parametrize(
    "change",
    [
        {"W": None}, {"W": "text"}, {"W": [1, 2]}, {"W": torch.ones(2, 3)}, {"W": torch.full((3, 2), float("nan"))},
        {"small_nodes": "a0.h0"}, {"small_nodes": 3}, {"small_nodes": [0, 1, 2]}, {"small_nodes": ["a0.h0"] * 3},
        {"small_nodes": ["a0.h0", "a00.h0", "m0"]}, {"small_nodes": []}, {"small_nodes": ["m" + "9" * 9000, "m0", "m1"]},
        {"small_nodes": ["x" * 10_000, "m0", "m1"]}, {"meta": [1]}, {"meta": "text"},
    ],
)  # fmt: skip
def test_released_files_of_another_form(tmp_path, change):
    path = tmp_path / "w.pt"
    good = {"W": torch.ones(3, 2), "small_nodes": ["a0.h0", "m0", "input"], "large_nodes": ["m0", "m1"], "meta": {}}
    torch.save(good | change, path)
    with pytest.raises(FileError, match="is not an alignment saved by the released code") as caught:
        dfa.Alignment.from_released(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_names_cost_what_they_are(tmp_path):
    """A file that names layer 999999 makes as many nodes as it names, not a million."""
    path = tmp_path / "w.pt"
    torch.save({"W": torch.ones(1, 2), "small_nodes": ["a999999.h999999"], "large_nodes": ["m0", "m1"]}, path)
    assert dfa.Alignment.from_released(path).source[0].size == 10**6


# --- writing -----------------------------------------------------------------------------------------------------


def test_what_can_not_be_written(tmp_path):
    with pytest.raises(FileError, match="Can't write"):
        write_atomically(tmp_path, b"")  # a folder is there
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Can't write"):
        scores().save(tmp_path / "file" / "below")
    assert issubclass(FileError, OSError) and issubclass(FileError, DfaError)


def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch):
    path = tmp_path / "s"
    scores().save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(FileError, match="No space left on device"):
        alignment().save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_tensors_of_any_strides_come_back(tmp_path):
    tensors = {
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "one": torch.arange(6.0)[::6],
        "half": torch.ones(2).bfloat16(),
    }
    save_tensors(tmp_path / "t", tensors, {"a": "ü"}, "some kind 1")
    found, metadata = load_tensors(tmp_path / "t", "some kind 1", ("a",))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert metadata == {"format": "some kind 1", "a": "ü"}
