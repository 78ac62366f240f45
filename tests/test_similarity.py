import numpy as np
import pytest
import torch
from helpers import random_model, random_pairs, state_of

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError, NodeError
from dfa_lens.transfer import similarity


def test_attention_features_against_the_patterns(any_model):
    """Every number again from the attention pattern itself, query by query."""
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    before = state_of(any_model)
    found = similarity.attention_features(any_model, prompts=3, length=5, seed=4)
    assert state_of(any_model) == before
    assert found.nodes == nodes
    tokens = similarity._repeated(any_model, 3, 5, 4)
    n = tokens.shape[1]
    assert torch.equal(tokens[:, -5:], tokens[:, -10:-5])
    _, cache = any_model.run_with_cache(tokens)
    for i, node in enumerate(nodes):
        if node.kind == "mlp":
            assert not found.values[i].any()
            continue
        pattern = cache[f"blocks.{node.layer}.attn.hook_pattern"][:, node.index]
        expected = np.zeros(5)
        for query in range(n - 5, n):
            for k, key in enumerate((query - 1, query - 5, query - 4, 0, query)):
                expected[k] += float(pattern[:, query, key].mean()) / 5
        np.testing.assert_allclose(found.values[i], expected, rtol=1e-4, atol=1e-6)


def test_attention_features_on_prompts(any_model):
    """On given prompts, counted query by query and key by key."""
    pairs = random_pairs(4, 12, seed=2, vocabulary=6, ragged=True)
    found = similarity.attention_features(any_model, pairs=pairs, batch_size=3)
    _, cache = any_model.run_with_cache(pairs.clean, attention_mask=(torch.arange(12) < pairs.lengths[:, None]).long())
    for i, node in enumerate(found.nodes):
        if node.kind == "mlp":
            continue
        sums, counts = np.zeros(5), np.zeros(5)
        for prompt, length in zip(range(4), pairs.lengths.tolist(), strict=True):
            row = pairs.clean[prompt].tolist()
            pattern = cache[f"blocks.{node.layer}.attn.hook_pattern"][prompt, node.index]
            for q in range(1, length):
                keys = [
                    [q - 1],
                    [k for k in range(q) if row[k] == row[q]],
                    [k for k in range(1, q + 1) if row[k - 1] == row[q]],
                    [0],
                    [q],
                ]
                for f, each in enumerate(keys):
                    sums[f] += float(pattern[q, each].sum())
                    counts[f] += bool(each)
        np.testing.assert_allclose(found.values[i], sums / np.maximum(counts, 1), rtol=1e-4, atol=1e-6)


def test_like_heads_are_alike():
    model = dfa.zoo.load("llama3-tiny-source")
    pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    found = similarity.attention_features(model, pairs=pairs)
    heads = found.values[found.values.any(1)]
    assert float(heads[:, 0].max()) > 1.5 * float(heads[:, 0].median())  # some head looks at the previous token
    alike = similarity.attention_similarity(found, found)
    torch.testing.assert_close(alike.diagonal(), torch.ones(len(alike)), atol=1e-4, rtol=1e-4)
    assert float(alike.min()) == 0  # a head and an MLP block


def test_behaviour_similarity_is_cka(any_model):
    """Against CKA from Gram matrices of examples, another way of computing it."""
    other = random_model(seed=5, num_hidden_layers=2)
    pairs = random_pairs(7, 9, seed=1, ragged=True)
    found = similarity.cka_similarity(any_model, pairs, other, pairs, batch_size=3)
    nodes = [dfa.NodeSet.heads_and_mlps(m) for m in (any_model, other)]

    def gram(model, node):
        _, cache = model.run_with_cache(pairs.clean, attention_mask=(torch.arange(9) < pairs.lengths[:, None]).long())
        x = cache[node.point][torch.arange(7), pairs.lengths - 1]
        x = x[:, node.index] if node.kind == "head" else x
        x = (x - x.mean(0)).double()
        return x @ x.T

    for i in (0, 4, 5):
        for j in (0, 4, 8):
            a, b = nodes[0][i], nodes[1][j]
            K, L = gram(any_model, a), gram(other, b)
            expected = float((K * L).sum() / (K.norm() * L.norm())) if a.kind == b.kind else 0.0
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    same = similarity.cka_similarity(any_model, pairs, any_model, pairs)
    torch.testing.assert_close(same.diagonal(), torch.ones(len(same)), atol=1e-5, rtol=1e-5)


def test_bad_input(any_model):
    pairs = random_pairs(4)
    with pytest.raises(AlignmentError, match="4 source and 2 target examples"):
        similarity.cka_similarity(any_model, pairs, any_model, pairs[:2])
    with pytest.raises(AlignmentError, match="more than the model's context"):
        similarity.attention_features(any_model, length=200)
    with pytest.raises(AlignmentError, match="at least 1"):
        similarity.attention_features(any_model, prompts=0)
    with pytest.raises(NodeError, match="is not one of the model's 4 heads"):
        similarity.attention_features(any_model, dfa.NodeSet.for_sizes(3, 9))
    found = similarity.attention_features(any_model)
    with pytest.raises(AlignmentError, match="width must be positive"):
        similarity.attention_similarity(found, found, width=0.0)
    with pytest.raises(AlignmentError, match="The features differ"):
        similarity.attention_similarity(found, similarity.NodeFeatures(found.values, found.nodes, ("a",) * 5))
    streams = dfa.NodeSet.from_points(any_model, {"blocks.{layer}.hook_resid_pre": 1}, n_positions=10)
    with pytest.raises(NodeError, match="can't be compared"):
        similarity.cka_similarity(any_model, pairs, any_model, pairs, source_nodes=streams, target_nodes=streams)
