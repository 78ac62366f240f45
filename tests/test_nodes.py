import pytest

import dfa_lens as dfa
from dfa_lens.data.nodes import Node
from dfa_lens.errors import HookError, NodeError


@pytest.mark.parametrize(
    ("layers", "heads", "expected"),
    [(16, 32, 528), (28, 24, 700), (32, 32, 1056), (24, 14, 360), (28, 12, 364), (36, 16, 612)],
)
def test_the_papers_models_have_the_published_numbers_of_nodes(layers, heads, expected):
    assert len(dfa.NodeSet.for_sizes(layers, heads)) == expected


def test_canonical_order():
    nodes = dfa.NodeSet.for_sizes(2, 2, with_input=True)
    assert nodes.names == ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
    assert [site.point for site in nodes.sites] == [
        "hook_embed",
        "blocks.0.attn.hook_z",
        "blocks.0.hook_mlp_out",
        "blocks.1.attn.hook_z",
        "blocks.1.hook_mlp_out",
    ]
    assert nodes.sites[3].positions == (4, 5)


def test_from_model(model):
    nodes = dfa.NodeSet.heads_and_mlps(model)
    assert len(nodes) == 3 * 5
    assert nodes == dfa.NodeSet.for_sizes(3, 4)


def test_from_points(model):
    nodes = dfa.NodeSet.from_points(model, {"blocks.{layer}.hook_attn_out": None, "blocks.{layer}.attn.hook_v": 2})
    assert len(nodes) == 3 * (1 + 2)  # grouped: two key-value heads
    # in the order in which they fire
    assert nodes.names[:3] == ("blocks.0.attn.hook_v[0]", "blocks.0.attn.hook_v[1]", "blocks.0.hook_attn_out")


def test_from_points_errors(model):
    with pytest.raises(HookError, match=r"no hook point 'blocks\.0\.nothing'"):
        dfa.NodeSet.from_points(model, {"blocks.0.nothing": None})
    with pytest.raises(NodeError, match=r"axis 4 can't be cut.*use 1 to 3"):
        dfa.NodeSet.from_points(model, {"blocks.0.attn.hook_z": 4})


def test_selection_and_records():
    nodes = dfa.NodeSet.for_sizes(3, 4)
    assert nodes["a1.*"].names == ("a1.h0", "a1.h1", "a1.h2", "a1.h3")
    assert nodes[["m2", "a0.h1"]].names == ("m2", "a0.h1")
    assert nodes[1:3].names == ("a0.h1", "a0.h2")
    assert nodes.where(lambda n: n.kind == "mlp").names == ("m0", "m1", "m2")
    assert "m1" in nodes and "m7" not in nodes
    assert dfa.NodeSet.from_records(nodes.to_records()) == nodes
    assert (nodes["a0.*"] + nodes["m*"]).names[-1] == "m2"
    with pytest.raises(NodeError, match="No node 'm7'"):
        nodes.position("m7")
    with pytest.raises(NodeError, match=r"No node matches 'x\*'"):
        nodes["x*"]


def test_overlapping_nodes_are_refused():
    whole = Node("whole", "blocks.0.attn.hook_z", "custom", 0)
    with pytest.raises(NodeError, match="overlap"):
        dfa.NodeSet([whole, *dfa.NodeSet.for_sizes(1, 2)])
    with pytest.raises(NodeError, match="twice"):
        dfa.NodeSet([whole, whole])
    with pytest.raises(NodeError, match="at least one"):
        dfa.NodeSet([])
