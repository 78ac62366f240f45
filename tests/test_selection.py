"""An index means what it means to numpy, whatever library it comes from; what has no clear meaning is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import random_pairs, unchecked
from hypothesis import given
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.data import selection
from dfa_lens.errors import NodeError, PromptError

N = 6
PAIRS = random_pairs(N, ragged=True)
NODES = dfa.NodeSet.for_sizes(2, 2)

integers = st.integers(-N, N - 1)
slices = st.slices(N)
several = st.lists(integers, min_size=1, max_size=8)
masks = st.lists(st.booleans(), min_size=N, max_size=N)
#: the same index as it comes from different libraries
kinds = st.sampled_from([list, tuple, np.array, torch.tensor, pd.Series, pd.array, lambda x: np.array(x, object)])


def chosen(index, n=N):
    return selection.rows(index, n, "pairs", PromptError)


@given(slices)
def test_slices_are_numpys(index):
    assert chosen(index) == np.arange(N)[index].tolist()


@given(several, kinds)
def test_integers_are_numpys(index, kind):
    assert chosen(kind(index)) == np.arange(N)[index].tolist()


@given(masks, kinds)
def test_masks_are_numpys(mask, kind):
    assert chosen(kind(mask)) == np.arange(N)[mask].tolist()


@given(masks, st.permutations(range(N)))
def test_a_sorted_tables_mask_goes_by_its_labels(mask, order):
    column = pd.Series(mask)
    assert chosen(column.iloc[order]) == chosen(column) == np.arange(N)[mask].tolist()


@given(integers, st.sampled_from([int, np.int64, np.uint8, torch.tensor, np.array]))
def test_one_integer_of_any_library(index, kind):
    index = index % N  # the unsigned have no negative ones
    assert torch.equal(PAIRS[kind(index)].answer, PAIRS.answer[index : index + 1])
    assert NODES[kind(index)] is NODES[index]
    assert NODES[kind(index)].name == NODES.names[index]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([True, False], "A mask of 2 booleans for 6"),
        (np.zeros(7, dtype=bool), "A mask of 7 booleans for 6"),
        ([True, 1, 2, 3, 4, 5], "True does not choose among"),
        (True, "True does not choose among"),
        (np.bool_(True), "does not choose among"),
        (torch.tensor(True), "have one axis; the index has 0"),
        (1.0, "1.0 does not choose among"),
        ([0.5], "0.5 does not choose among"),
        (torch.tensor([0.0, 1.0]), "0.0 does not choose among"),
        ([None], "None does not choose among"),
        (None, "None does not choose among"),
        ({1, 2}, "does not choose among"),
        ({0: 1}, "does not choose among"),
        (np.zeros((2, 2), dtype=int), "the index has 2"),
        (torch.zeros(6, 6, dtype=torch.bool), "the index has 2"),
        ([6], "There is no number 6 among 6"),
        ([0, -7], "There is no number -7 among 6"),
        (6, "There is no number 6 among 6"),
        (np.int64(-7), "There is no number -7 among 6"),
        ([], "The selection has no"),
        (slice(3, 3), "The selection has no"),
        ([False] * 6, "The selection has no"),
        (slice("a", None), "goes from integer to integer"),
        (pd.Series([True] * 6, index=list("abcdef")), "labels are not the numbers of the 6"),
        (pd.array([True, None] * 3), "does not choose among"),
    ],
)
def test_what_has_no_clear_meaning_is_refused(index, message):
    with pytest.raises(PromptError, match=message):
        PAIRS[index]
    with pytest.raises(NodeError, match=message):
        NODES[index]


def test_texts_choose_no_pairs():
    for index in ("0", b"0", ["0"]):
        with pytest.raises(PromptError, match="does not choose among prompt pairs"):
            PAIRS[index]


def test_masks_choose_pairs_and_nodes():
    mask = [True, False, True, False, False, True]
    for same in (mask, np.array(mask), torch.tensor(mask), pd.Series(mask)):
        assert torch.equal(PAIRS[same].answer, PAIRS.answer[[0, 2, 5]])
        assert NODES[same].names == ("a0.h0", "m0", "m1")
    table = pd.DataFrame({"length": PAIRS.lengths.numpy()}).sort_values("length")
    short = PAIRS[table["length"] < int(PAIRS.lengths.max())]
    assert torch.equal(short.answer, PAIRS.answer[PAIRS.lengths < PAIRS.lengths.max()])


def test_loops_over_numbers_end():
    """Python's older protocols ask for the next number until there is an IndexError."""
    assert [len(pair) for pair in PAIRS] == [1] * N
    assert torch.equal(torch.cat([pair.answer for pair in PAIRS]), PAIRS.answer)
    assert NODES.index(NODES[4]) == 4 and NODES.count(NODES[4]) == 1
    for values in (PAIRS, NODES):
        with pytest.raises(IndexError):
            values[len(values)]


def test_names_before_patterns():
    """Square brackets are part of many names, and a pattern's sign for a set of characters."""
    points = [dfa.Node(f"blocks.0.attn.hook_v[{i}]", "blocks.0.attn.hook_v", "custom", 0, 2, i, 3) for i in range(3)]
    star = dfa.Node("m*", "blocks.1.hook_mlp_out", "custom", 1)
    nodes = dfa.NodeSet([*points, star, dfa.Node("mine", "blocks.2.hook_mlp_out", "custom", 2)])
    for node in nodes:
        assert nodes[node.name] == nodes.where(name=node.name) == nodes[[node.name]] == dfa.NodeSet([node])
        assert node.name in nodes
    assert len(nodes["blocks.0.*"]) == 3
    assert nodes["m?ne"].names == ("mine",)
    assert nodes[["mine", 0]].names == ("mine", "blocks.0.attn.hook_v[0]")
    assert nodes[np.array(["mine", "m*"])].names == ("mine", "m*")
    with pytest.raises(NodeError, match="No node 'm.ne' in this set"):
        nodes[["m?ne"]]


def test_layers_of_any_library():
    for layer in (1, np.int64(1), torch.tensor(1), [1], np.array([1]), range(1, 2)):
        assert unchecked(dfa.NodeSet.where)(NODES, layer=layer).names == ("a1.h0", "a1.h1", "m1")
    for layer in ("1", 1.0, [1.5], object()):
        with pytest.raises(NodeError, match="layer is an integer or several"):
            unchecked(dfa.NodeSet.where)(NODES, layer=layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "A node's name is a text"),
        ({"point": 3}, "A node's point is a text"),
        ({"layer": "0"}, "layer is an integer, not '0'"),
        ({"layer": None}, "layer is an integer, not None"),
        ({"axis": True}, "axis is an integer"),
        ({"size": None}, "given together or not at all"),
        ({"axis": 0}, "slice 1 of 4 along axis 0"),
        ({"index": 4}, "slice 4 of 4 along axis 2"),
        ({"index": -1}, "slice -1 of 4 along axis 2"),
    ],
)
def test_nodes_that_are_none(change, message):
    good = {
        "name": "a0.h1",
        "point": "blocks.0.attn.hook_z",
        "kind": "head",
        "layer": 0,
        "axis": 2,
        "index": 1,
        "size": 4,
    }
    with pytest.raises(NodeError, match=message):
        unchecked(dfa.Node.__init__)(object.__new__(dfa.Node), **(good | change))


def test_numpys_integers_become_pythons():
    node = object.__new__(dfa.Node)
    unchecked(dfa.Node.__init__)(node, "x", "p", "custom", np.int64(0), np.int32(2), np.int64(1), np.int64(4))
    assert all(type(getattr(node, name)) is int for name in ("layer", "axis", "index", "size"))


def test_sizes_that_are_none():
    for sizes in ((0, 2), (2, 0), (-1, 2), (2.0, 2), (True, 2), ("2", 2)):
        with pytest.raises(NodeError, match="is an integer of at least 1"):
            unchecked(dfa.NodeSet.for_sizes.__func__)(dfa.NodeSet, *sizes)
    with pytest.raises(NodeError, match="A node set is made of nodes, not 'm0'"):
        unchecked(dfa.NodeSet.__init__)(object.__new__(dfa.NodeSet), ["m0"])
