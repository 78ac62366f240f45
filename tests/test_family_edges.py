"""Edges of models with layer norms, learned positions, attention and MLP side by side, or norms behind them.

Against edges set by hand: torch hooks on Hugging Face's own modules, no weight is read.
"""

from dataclasses import dataclass

import pytest
import torch
from families import bridge, family_model, hugging_face
from helpers import BACKENDS, plain_passes, random_pairs

import dfa_lens as dfa
from dfa_lens.errors import ScoreError

PAIRS = random_pairs(3, 8, ragged=True)
N_HEADS = 4


@dataclass(frozen=True)
class Parts:
    """By hand: names of modules in a block, and of what stands around the blocks."""

    blocks: str
    embedding: str
    norm: str
    attention_reads: str  # its input is the stream
    qkv: tuple[str, ...]
    z: str  # its input is what heads compute
    attention_writes: str  # its output is added to the stream
    mlp_reads: str
    mlp_writes: str


_LLAMA = ("model.layers", "model.embed_tokens", "model.norm")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")
PARTS = {
    "gpt2": Parts(
        "transformer.h",
        "transformer.wte",
        "transformer.ln_f",
        "ln_1",
        ("attn.c_attn",),
        "attn.c_proj",
        "attn",
        "ln_2",
        "mlp",
    ),
    "gpt_neox": Parts(
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        "input_layernorm",
        ("attention.query_key_value",),
        "attention.dense",
        "attention",
        "post_attention_layernorm",
        "mlp",
    ),
    "gemma2": Parts(
        *_LLAMA, "input_layernorm", _QKV, "self_attn.o_proj", _POST[0], "pre_feedforward_layernorm", _POST[1]
    ),
    "olmo2": Parts(*_LLAMA, "self_attn", _QKV, "self_attn.o_proj", _POST[0], "mlp", _POST[1]),
}


class ByHand:
    """Runs of a model in which what modules are given or return is looked at and changed."""

    def __init__(self, family):
        self.model, self.parts, self.family = hugging_face(family), PARTS[family], family
        (self.clean, self.metric), (self.corrupt, _) = self.run(PAIRS.clean), self.run(PAIRS.corrupt)

    def run(self, tokens, **edits):
        """What was seen by name, and the metric; ``edits`` has functions by name."""
        seen, handles = {}, []

        def look(name, now):
            seen[name] = edits[name](now) if name in edits else now
            return seen[name]

        def put(name, path, at):
            module = self.model.get_submodule(path)
            if at == "output":

                def behind(_, args, out):
                    return (look(name, out[0]), *out[1:]) if isinstance(out, tuple) else look(name, out)

                handles.append(module.register_forward_hook(behind))
            else:

                def before(_, args, kwargs):
                    if args:
                        return (look(name, args[0]), *args[1:]), kwargs
                    return args, kwargs | {"hidden_states": look(name, kwargs["hidden_states"])}

                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

        parts = self.parts
        put("input", parts.embedding, "output")
        put("logits", parts.norm, "input")
        for layer in range(3):
            block = f"{parts.blocks}.{layer}."
            put(f"attention{layer}", block + parts.attention_reads, "input")
            put(f"z{layer}", block + parts.z, "input")
            put(f"writes{layer}", block + parts.attention_writes, "output")
            put(f"mlp{layer}", block + parts.mlp_reads, "input")
            put(f"m{layer}", block + parts.mlp_writes, "output")
            for i, path in enumerate(parts.qkv):
                put(f"qkv{layer}.{i}", block + path, "output")
        mask = (torch.arange(tokens.shape[1]) < PAIRS.lengths[:, None]).long()
        rows = torch.arange(len(PAIRS))
        with torch.no_grad():
            logits = self.model(tokens, attention_mask=mask).logits[rows, PAIRS.lengths - 1]
        for handle in handles:
            handle.remove()
        return seen, (logits[rows, PAIRS.answer] - logits[rows, PAIRS.wrong])

    def change(self, writer):
        """Corrupt less clean, of what reaches the stream when this writer alone is as in the corrupt run."""
        if writer[0] != "a":
            return self.corrupt[writer] - self.clean[writer]
        layer, head = writer[1], int(writer.split(".h")[1])

        def swap(now):
            now = now.unflatten(-1, (N_HEADS, -1)).clone()
            now[:, :, head] = self.corrupt[f"z{layer}"].unflatten(-1, (N_HEADS, -1))[:, :, head]
            return now.flatten(2)

        swapped, _ = self.run(PAIRS.clean, **{f"z{layer}": swap})
        return swapped[f"writes{layer}"] - self.clean[f"writes{layer}"]

    def effect(self, writer, reader):
        """m(clean) - m(clean with this edge alone at its writer's corrupt activation)."""
        change, layer = self.change(writer), reader[1]
        if reader == "logits":
            return self.metric - self.run(PAIRS.clean, logits=lambda now: now + change)[1]
        if reader[0] == "m":
            return self.metric - self.run(PAIRS.clean, **{f"mlp{layer}": lambda now: now + change})[1]
        moved, _ = self.run(PAIRS.clean, **{f"attention{layer}": lambda now: now + change})
        letter, index = "qkv".index(reader[-2]), int(reader.split("<")[0][3:].lstrip("khv"))
        name = f"qkv{layer}.{letter if len(self.parts.qkv) == 3 else 0}"

        def one(now):
            if len(self.parts.qkv) == 3:  # modules of their own
                where = (index,)
                shape = (-1, 8)
            elif self.family == "gpt2":  # all queries, all keys, all values
                where, shape = (letter, index), (3, N_HEADS, 8)
            else:  # head by head
                where, shape = (index, letter), (N_HEADS, 3, 8)
            new = now.unflatten(-1, shape).clone()
            new[(slice(None), slice(None), *where)] = moved[name].unflatten(-1, shape)[
                (slice(None), slice(None), *where)
            ]
            return new.flatten(2)

        return self.metric - self.run(PAIRS.clean, **{name: one})[1]


@pytest.mark.parametrize("family", PARTS)
def test_edges_against_hooks_made_by_hand(family, monkeypatch):
    """Exact effects, masks that leave out one edge, and the masks' gradient against the scores by gradients."""
    plain_passes(monkeypatch)
    hand = ByHand(family)
    edges = dfa.EdgeSet.of_model(hand.model)
    some = ["*<q>", "*<k>", "*<v>", "m*", "logits"]
    chosen = [edges.where(writer=w, reader=r).sample(1, seed=3).chosen for w in ("a*", "m*") for r in some]
    own = edges.choose(torch.stack(chosen).any(0) | edges["input", "a1.*"].sample(1).chosen)
    exact = dfa.attribute_edges(hand.model, PAIRS, method="exact", edges=own)
    expected = {str(edge): hand.effect(*edge) for edge in own}
    torch.testing.assert_close(exact.flat, torch.stack(list(expected.values())).mean(1), atol=2e-4, rtol=2e-4)
    assert exact.flat.abs().max() > 0.1
    # all but one edge: what a circuit of the others loses
    for edge in [each for each in own if each.writer[0] == "a"][:3]:
        last = -edges[edge.writer, edge.reader].chosen.float()
        n = len(edges.where(writer="[am]*"))
        curve = dfa.faithfulness_curve(hand.model, PAIRS, dfa.EdgeScores(last, edges), sizes=[0, n - 1, n])
        lost = torch.tensor(curve.per_example[2]) - torch.tensor(curve.per_example[1])
        torch.testing.assert_close(lost.float(), expected[str(edge)], atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("method", ["nap-ig-inputs", "nap-ig-activations"])
def test_row_sums_are_node_scores(family, method, monkeypatch):
    plain_passes(monkeypatch)
    model = hugging_face(family)
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    scores = dfa.attribute_edges(model, PAIRS, method=method.replace("nap", "eap"), steps=2, batch_size=2)
    expected = dfa.attribute(model, PAIRS, nodes=nodes, method=method, steps=2).values
    torch.testing.assert_close(scores.to_nodes().values, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "made", [lambda: family_model("gpt2", BACKENDS[0]), lambda: bridge("gemma2")], ids=["gpt2", "gemma2"]
)
def test_transformer_lens_s_classes_per_head(made, monkeypatch):
    plain_passes(monkeypatch)
    model = made()
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    scores = dfa.attribute_edges(model, PAIRS, method="eap", readers="per-head")
    expected = dfa.attribute(model, PAIRS, method="nap", nodes=nodes).values
    torch.testing.assert_close(scores.to_nodes().values, expected, atol=1e-4, rtol=1e-4)


def test_masks_of_edges_have_their_gradient_behind_norms():
    """Of a mask that is all open, the derivative is the edge score by one gradient at the clean run, to first order."""
    from dfa_lens.models.edge_gates import run_gated
    from dfa_lens.models.paired_run import PairedRun
    from dfa_lens.models.runner import Runner
    from dfa_lens.models.stream import Stream

    model = hugging_face("gemma2")
    runner, edges = Runner(model), dfa.EdgeSet.of_model(model)
    with runner.session():
        run = PairedRun(runner, PAIRS, edges.nodes)
        corrupt, _ = run.record("corrupt")
        gates = torch.ones(edges.shape, requires_grad=True)
        logits = run_gated(Stream(runner, edges), run, gates, corrupt)
        rows = torch.arange(len(PAIRS))
        metric = logits[rows, PAIRS.answer] - logits[rows, PAIRS.wrong]
        metric.mean().backward()
    scores = dfa.attribute_edges(model, PAIRS, method="eap")
    found = gates.grad[edges.chosen]
    torch.testing.assert_close(found, scores.flat, atol=1e-3, rtol=1e-3)
    assert scores.flat.abs().max() > 0.1


def test_side_by_side_is_a_property_of_edges(tmp_path):
    model = hugging_face("gpt_neox")
    edges = dfa.EdgeSet.of_model(model)
    assert edges.parallel and "a0.h0->m0" not in edges and "a0.h0->m1" in edges
    assert edges != dfa.EdgeSet(3, 4) and edges["a0.*", "m*"].all_of_model == edges
    for own in (edges, edges["a0.*", "m*"]):
        scores = dfa.EdgeScores(torch.randn(own.shape), own)
        scores.save(tmp_path / "edges.safetensors")
        assert dfa.EdgeScores.load(tmp_path / "edges.safetensors") == scores
    circuit = dfa.EdgeCircuit(["input->m0", "m0->logits", "a0.h0->m1"], edges)
    circuit.save(tmp_path / "circuit.safetensors")
    assert dfa.EdgeCircuit.load(tmp_path / "circuit.safetensors") == circuit
    with pytest.raises(ScoreError, match="side by side are not written"):
        scores.to_mib(tmp_path / "graph.json")
