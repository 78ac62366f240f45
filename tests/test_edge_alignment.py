"""Alignments of edges as values, and alignments of nodes put at both ends of edges."""

import json

import numpy as np
import pytest
import torch
from helpers import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dfa_lens as dfa
from dfa_lens.data.edge_alignment import EdgeMap
from dfa_lens.data.scaling import scale
from dfa_lens.errors import AlignmentError, FileError, ScoreError

SOURCE, TARGET, THIRD = dfa.EdgeSet(2, 4, 2), dfa.EdgeSet(3, 6, 3), dfa.EdgeSet(2, 2)


def drawn(edges, seed=0):
    return dfa.controls.random_scores(edges, seed=seed)


@pytest.mark.parametrize("scaling", ["unit", "raw", "rank", "signed-sqrt"])
def test_transfer_is_its_sum(scaling):
    """Ŝ_u'v' = Σ_u Σ_v A_uu' S_uv B_vv', edge by edge."""
    random = dfa.controls.random_w(SOURCE, TARGET, seed=1).stages[0]
    bias = torch.randn(TARGET.shape, generator=torch.Generator().manual_seed(2))
    alignment = dfa.EdgeAlignment.of(random.A, random.B, SOURCE, TARGET, scaling=scaling, bias=bias)
    scores = drawn(SOURCE)
    values = dict(zip(SOURCE, scale(scores.flat, scaling).tolist(), strict=True))
    found = alignment.transfer(scores)
    assert found.edges == TARGET
    for edge in ("input->a0.h0<q>", "a0.h3->a2.kv1<v>", "m1->logits"):
        row, column = TARGET.position(edge)
        expected = bias[row, column].item() + sum(
            random.A[SOURCE.position(tuple(own))[0], row].item()
            * value
            * random.B[SOURCE.position(tuple(own))[1], column].item()
            for own, value in values.items()
        )
        assert found[edge] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    mask = alignment.mask(scores)
    assert mask.isnan().equal(~TARGET.existing)
    torch.testing.assert_close(mask[TARGET.existing], torch.sigmoid(found.flat))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12))
def test_ranks_are_those_of_all_pairs(values):
    given_values = torch.tensor(values)
    below = (given_values[None, :] < given_values[:, None]).sum(1)
    above = (given_values[None, :] > given_values[:, None]).sum(1)
    centred = (below - above).float()
    if not centred.any():
        with pytest.raises(AlignmentError, match="are equal"):
            scale(given_values, "rank")
    else:
        torch.testing.assert_close(scale(given_values, "rank"), centred / centred.norm())


def test_edges_without_a_score_count_as_zero():
    alignment = dfa.controls.random_w(SOURCE, TARGET)
    whole = drawn(SOURCE)
    part = whole.where(writer="a*")
    zeros = dfa.EdgeScores(part.values.nan_to_num(0.0), SOURCE)
    torch.testing.assert_close(alignment.transfer(part).flat, alignment.transfer(zeros).flat)


def test_chains():
    first, second = dfa.controls.random_w(SOURCE, TARGET), dfa.controls.random_w(TARGET, THIRD, seed=1)
    scores = drawn(SOURCE)
    chain = second @ first
    assert (chain.source, chain.target) == (SOURCE, THIRD)
    torch.testing.assert_close(chain.transfer(scores).flat, second.transfer(first.transfer(scores)).flat)
    assert repr(chain) == f"EdgeAlignment({len(SOURCE)} → {len(TARGET)} → {len(THIRD)} edges)"
    with pytest.raises(AlignmentError, match="can't be chained: one ends on 46 edges"):
        first @ second
    with pytest.raises(TypeError):
        first @ dfa.controls.depth_mean(SOURCE.nodes, TARGET.nodes)


def test_files(tmp_path):
    some = TARGET.where(writer="[am]*")
    bias = torch.randn(TARGET.shape, generator=torch.Generator().manual_seed(2))
    first = dfa.controls.random_w(SOURCE, TARGET).stages[0]
    made = dfa.EdgeAlignment.of(
        first.A, first.B, SOURCE, some, bias=bias, temperature=0.5, history=[{"step": 0, "loss": 1.5}], meta={"a": [1]}
    )
    chain = dfa.controls.random_w(TARGET, THIRD) @ made
    for i, each in enumerate((made, chain)):
        each.save(tmp_path / f"{i}.safetensors")
        found = dfa.EdgeAlignment.load(tmp_path / f"{i}.safetensors")
        assert found == each
        assert found.meta == each.meta
        assert found.history == each.history
    assert made != chain
    content = bytearray((tmp_path / "0.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "0.safetensors").write_bytes(content)
    with pytest.raises(FileError, match="damaged"):
        dfa.EdgeAlignment.load(tmp_path / "0.safetensors")
    dfa.controls.depth_mean(SOURCE.nodes, TARGET.nodes).save(tmp_path / "nodes.safetensors")
    with pytest.raises(FileError, match="not a file of 'dfa_lens edge alignment'"):
        dfa.EdgeAlignment.load(tmp_path / "nodes.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"stages": []}, {"stages": [{}]}, {"stages": 3}, {"temperature": -1.0}, {"source": [1, 1]}, {"source": [0, 4, 2]},
        {"target": "abc"}, {"target": [10**9, 10**9, 1]}, {"scaling": "none"}, {"B.0": None}, {"C.0": torch.ones(1)},
        {"A.0": torch.ones(2, 2)}, {"A.0": torch.ones(11, 22, dtype=torch.long)}, {"edges.0": torch.ones(3, 3)},
    ],
)  # fmt: skip
def test_what_is_no_edge_alignment(tmp_path, change):
    """Files that another program might write, wrong in one place."""
    random = dfa.controls.random_w(SOURCE, TARGET).stages[0]
    stage = {"scaling": "unit", "source": [2, 4, 2], "target": [3, 6, 3]}
    description = {"temperature": 1.0, "meta": {}, "history": [], "stages": [stage]}
    tensors = {"A.0": random.A, "B.0": random.B}
    path = tmp_path / "file"

    def write():
        kept = {name: each for name, each in tensors.items() if each is not None}
        save_file(kept, path, {"format": "dfa_lens edge alignment 1", "alignment": json.dumps(description)})

    write()
    assert dfa.EdgeAlignment.load(path).stages[0] == random
    for name, value in change.items():
        place = tensors if name[1:] == ".0" or "edges" in name else stage if name in stage else description
        place[name] = value
    write()
    with pytest.raises(FileError, match="is not an edge alignment"):
        dfa.EdgeAlignment.load(path)


def test_nodes_at_both_ends():
    """Between per-head readers, each edge is carried by W of its writer times W of its reader's node."""
    source, target = dfa.EdgeSet(2, 2), dfa.EdgeSet(2, 3)
    W = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    alignment = dfa.Alignment.of(W, source.nodes[1:], target.nodes[1:], scaling="raw")
    scores = drawn(source)
    found = alignment.transfer(scores, edges=target)
    logits = W.pow(2).sum(0).mean().sqrt().item()

    def node(reader):
        return "m" + reader[1:] if reader[0] == "m" else reader.split("<")[0]

    def weight(reader, new):
        if "logits" in (reader, new):
            return logits if reader == new else 0.0
        kinds = {reader[-2] if "<" in reader else "m", new[-2] if "<" in new else "m"}
        if len(kinds) == 2 and "m" not in kinds:
            return 0.0
        return W[source.nodes[1:].position(node(reader)), target.nodes[1:].position(node(new))].item()

    for edge in ("a0.h0->a1.h2<k>", "a0.h1->m0", "m0->logits", "a0.h2->m1"):
        writer, new = edge.split("->")
        expected = 0.0
        for own in source:
            if own.writer != "input":
                i, j = source.nodes[1:].position(own.writer), target.nodes[1:].position(writer)
                expected += W[i, j].item() * scores[tuple(own)] * weight(own.reader, new)
        assert found[edge] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_grouped_readers_carry_the_sums_of_their_heads():
    """Scores that are even within a group: carried per head and then summed, or summed and then carried."""
    source, target = dfa.EdgeSet(2, 4), dfa.EdgeSet(3, 4)
    W = torch.randn(10, 15, generator=torch.Generator().manual_seed(0))
    alignment = dfa.Alignment.of(W, source.nodes[1:], target.nodes[1:], scaling="raw")
    values = drawn(source).values.clone()
    for site in source.sites:
        if site.kind in ("k", "v"):
            even = values[:, site.columns].unflatten(1, (2, 2)).mean(2, keepdim=True)
            values[:, site.columns] = even.expand(-1, -1, 2).flatten(1)
    scores = dfa.EdgeScores(values, source)
    first = alignment.transfer(scores, edges=target).to_grouped(2)
    second = alignment.transfer(scores.to_grouped(2), edges=first.edges)
    torch.testing.assert_close(second.flat, first.flat, atol=1e-4, rtol=1e-4)


def test_chained_nodes_on_edges():
    nodes = [edges.nodes[1:] for edges in (SOURCE, TARGET, THIRD)]
    chain = dfa.controls.depth_mean(nodes[1], nodes[2]) @ dfa.controls.depth_mean(nodes[0], nodes[1])
    found = chain.transfer(drawn(SOURCE), edges=THIRD)
    assert found.edges == THIRD
    assert found.flat.isfinite().all()


def test_controls():
    scores = drawn(SOURCE)
    scrambled = dfa.controls.scrambled(scores, seed=1)
    np.testing.assert_array_equal(np.sort(scrambled.flat), np.sort(scores.flat))
    assert not torch.equal(scrambled.flat, scores.flat)
    assert dfa.controls.uniform(SOURCE).flat.tolist() == [1.0] * len(SOURCE)
    alignment = dfa.controls.random_w(SOURCE, TARGET)
    permuted = dfa.controls.permuted_w(alignment, seed=3)
    torch.testing.assert_close(permuted.stages[0].A.sum(1), alignment.stages[0].A.sum(1))
    torch.testing.assert_close(permuted.stages[0].B.sort(1).values, alignment.stages[0].B.sort(1).values)
    assert permuted != alignment
    fixed = dfa.controls.depth_mean(SOURCE, TARGET).stages[0]
    assert (fixed.A >= 0).all()
    assert (fixed.B >= 0).all()
    with pytest.raises(AlignmentError, match="two node sets or two edge sets"):
        unchecked(dfa.controls.random_w)(SOURCE, TARGET.nodes)


def test_bad_input():
    random = dfa.controls.random_w(SOURCE, TARGET)
    A, B = random.stages[0].A, random.stages[0].B
    with pytest.raises(AlignmentError, match=r"A has shape \[40, 11\], but \[11, 22\] is needed"):
        EdgeMap(B.T[:, :11], B, SOURCE, TARGET)
    wrong = B.clone()
    wrong[0, 0] = torch.nan
    with pytest.raises(AlignmentError, match="B has 1 entries that are not finite"):
        EdgeMap(A, wrong, SOURCE, TARGET)
    made = object.__new__(EdgeMap)
    with pytest.raises(AlignmentError, match="Unknown scaling 'units'"):
        unchecked(EdgeMap.__init__)(made, A, B, SOURCE, TARGET, "units")
    with pytest.raises(ScoreError, match="they come from another model"):
        random.transfer(drawn(TARGET))
    nodes = dfa.controls.depth_mean(SOURCE.nodes[1:], TARGET.nodes[1:])
    with pytest.raises(AlignmentError, match="name the target's edges="):
        nodes.transfer(drawn(SOURCE))
    with pytest.raises(AlignmentError, match="these are scores of nodes"):
        nodes.transfer(dfa.controls.random_scores(SOURCE.nodes[1:]), edges=TARGET)
    with pytest.raises(AlignmentError, match="are not the heads and MLP blocks"):
        nodes.transfer(drawn(THIRD), edges=TARGET)
