"""What nodes do on one prompt, against runs that TransformerLens itself records, and sums that must come out."""

import math

import pytest
import torch
from families import bridge, hugging_face
from helpers import made_inspection, random_pairs

import dfa_lens as dfa
from dfa_lens.errors import FileError, MeasurementError, NodeError, PromptError
from dfa_lens.evaluation import inspection


def parts(model):
    """The final norm's weight and the unembedding [vocab, d_model], by each class's own names."""
    if hasattr(model, "original_model"):
        return model.original_model.model.norm.weight, model.original_model.lm_head.weight
    return model.ln_final.w, model.unembed.W_U.T


def test_patterns_direct_effects_and_tokens_by_hand(model, unchanged, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", 30)  # the vocabulary of 101 in four parts
    pairs = random_pairs(4, 9, seed=2, ragged=True)
    with unchanged(model):
        found = dfa.inspect(model, pairs, example=-2, top=3)
    pair = pairs[2]
    n = int(pair.lengths[0])
    _, cache = model.run_with_cache(pair.clean[:, :n])
    weight, unembedding = (part.detach() for part in parts(model))
    last = model.cfg.n_layers - 1
    stream = cache[f"blocks.{last}.hook_resid_post"][0, -1]
    scale = math.sqrt(float(stream.square().mean()) + 1e-6)

    def text(token):
        return model.tokenizer.decode([int(token)])

    assert found.tokens == tuple(map(text, pair.clean[0, :n]))
    assert (found.answer, found.wrong) == (text(pair.answer), text(pair.wrong))
    for i, node in enumerate(found.nodes):
        block = f"blocks.{node.layer}"
        if node.kind == "head":
            torch.testing.assert_close(found.pattern(node.name), cache[f"{block}.attn.hook_pattern"][0, node.index])
            written = cache[f"{block}.attn.hook_z"][0, -1, node.index] @ model.blocks[node.layer].attn.W_O[node.index]
        else:
            written = cache[f"{block}.hook_mlp_out"][0, -1]
        logits = (weight * written / scale) @ unembedding.T
        expected = logits[pair.answer] - logits[pair.wrong]
        torch.testing.assert_close(found.direct[i : i + 1], expected, rtol=1e-3, atol=1e-4)
        order = logits.argsort(descending=True)
        centred = logits - logits.mean()
        for told, ids in ((found.promoted[i], order[:3]), (found.suppressed[i], order.flip(0)[:3])):
            assert [each.token for each in told] == ids.tolist()
            assert [each.logit for each in told] == pytest.approx(centred[ids].tolist(), rel=1e-3, abs=1e-4)
            assert [each.text for each in told] == list(map(text, ids))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_hugging_faces_models(family):
    """The same numbers without TransformerLens; of layer norms, biases and learned positions, too."""
    pairs = random_pairs(2, 8, seed=4)
    plain, lens = hugging_face(family), bridge(family)
    ours, theirs = dfa.inspect(plain, pairs), dfa.inspect(lens, pairs)
    assert ours.tokens == tuple(map(str, pairs.clean[0].tolist()))  # nobody knows a tokenizer
    torch.testing.assert_close(ours.direct, theirs.direct, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.patterns, theirs.patterns, rtol=1e-3, atol=1e-5)
    assert [[each.token for each in row] for row in ours.promoted] == [
        [each.token for each in row] for row in theirs.promoted
    ]


def test_direct_effects_add_up(zoo_source):
    """Those of all nodes and the embedding's are the logit difference of the clean run."""
    pairs = dfa.tasks.load("ioi", zoo_source.tokenizer, n=2)
    found = dfa.inspect(zoo_source, pairs)
    logits, cache = zoo_source.run_with_cache(pairs[0].clean)
    weight, unembedding = parts(zoo_source)
    stream = cache[f"blocks.{zoo_source.cfg.n_layers - 1}.hook_resid_post"][0, -1]
    direction = weight * (unembedding[pairs.answer[0]] - unembedding[pairs.wrong[0]])
    embedding = cache["hook_embed"][0, -1] @ direction / (stream.square().mean() + 1e-5).sqrt()
    difference = logits[0, -1, pairs.answer[0]] - logits[0, -1, pairs.wrong[0]]
    torch.testing.assert_close(found.direct.sum() + embedding, difference, rtol=1e-3, atol=1e-3)
    # the tokens have texts, and the table begins with the largest effect
    assert "".join(found.tokens).startswith("<|begin_of_text|>")
    table = found.to_frame()
    assert table["node"][0] == found.nodes.names[int(found.direct.abs().argmax())]
    assert "<table" in found._repr_html_()


def test_what_is_refused(any_model, pairs):
    for example in (len(pairs), -len(pairs) - 1):
        with pytest.raises(PromptError, match=f"no example {example}"):
            dfa.inspect(any_model, pairs, example=example)
    with pytest.raises(PromptError, match="top must be between 1 and"):
        dfa.inspect(any_model, pairs, top=0)
    found = dfa.inspect(any_model, pairs, patterns=False)
    assert found.patterns is None
    assert set(found.to_frame()["looks_at"]) == {""}
    with pytest.raises(NodeError, match="without attention patterns"):
        found.pattern("a0.h0")
    with pytest.raises(NodeError, match="'m0' is no head"):
        dfa.inspect(any_model, pairs).pattern("m0")
    with pytest.raises(MeasurementError, match="patterns of"):
        dfa.Inspection(
            found.nodes, ("a",), "b", "c", found.direct, found.promoted, found.suppressed, torch.zeros(1, 1, 1)
        )


def test_files_hold_all_of_it(tmp_path, model):
    pairs = random_pairs(2, 7, seed=3)
    for found in (dfa.inspect(model, pairs, top=3), dfa.inspect(model, pairs, patterns=False)):
        found.save(tmp_path / "found.safetensors")
        again = dfa.Inspection.load(tmp_path / "found.safetensors")
        assert again == found
        assert again.promoted == found.promoted  # to the bit: they are compared as Python compares tuples
        torch.testing.assert_close(again.direct, found.direct, rtol=0, atol=0)
        if found.patterns is None:
            assert again.patterns is None
        else:
            torch.testing.assert_close(again.patterns, found.patterns, rtol=0, atol=0)


def test_files_that_hold_something_else(tmp_path):
    """Files with a valid checksum whose parts do not fit: one error each, which says what."""
    nodes = dfa.NodeSet.for_sizes(1, 2)
    found = made_inspection(nodes)
    path = tmp_path / "found.safetensors"
    cases = {
        "another number": replace_unchecked(found, direct=torch.zeros(2)),
        r"\(torch.int64\) are not all finite": replace_unchecked(found, direct=torch.zeros(3, dtype=torch.int64)),
        "attention patterns .* are not all finite": replace_unchecked(found, patterns=found.patterns * float("nan")),
        "not one for each node": replace_unchecked(found, direct=torch.zeros(3, 1)),
        "tokens are not all texts": replace_unchecked(found, answer=7),
        "a text, a number": replace_unchecked(found, promoted=[[[7, 7, 1.0]]] * 3),
        "attention|Attention patterns of 2 heads": replace_unchecked(found, tokens=("one",)),
    }
    for message, broken in cases.items():
        dfa.Inspection.save(broken, path)
        with pytest.raises(FileError, match=message):
            dfa.Inspection.load(path)
    dfa.controls.random_scores(nodes).save(path)
    with pytest.raises(FileError, match="it is one of 'dfa_lens scores'"):
        dfa.Inspection.load(path)
    with pytest.raises(FileError, match="no file"):
        dfa.Inspection.load(tmp_path / "missing")


def replace_unchecked(found, **changes):
    """An inspection with other parts, which nobody looked at."""
    made = object.__new__(dfa.Inspection)
    for name, value in (vars(found) | changes).items():
        object.__setattr__(made, name, value)
    return made
