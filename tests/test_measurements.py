"""Measurements against plain loops over runs that TransformerLens itself records."""

import copy
import math

import pytest
import torch
from families import family_model
from helpers import BACKENDS, random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.errors import FileError, MeasurementError, ModelError
from dfa_lens.models.runner import Runner
from dfa_lens.transfer.measure import GROUP_MEASURES, MEASURES, Measure


def direct_parts(model):
    """The final norm's weight and the unembedding [vocab, d_model], by each class's own names."""
    if hasattr(model, "original_model"):
        return model.original_model.model.norm.weight, model.original_model.lm_head.weight
    return model.ln_final.w, model.unembed.W_U.T


def by_hand(model, pairs):
    """Every measurement of every node, prompt by prompt and token by token."""
    weight, unembedding = (part.detach().double() for part in direct_parts(model))
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    totals = {name: torch.zeros(layers, heads + 1, dtype=torch.float64) for name in MEASURES}
    for pair in pairs:
        n = int(pair.lengths[0])
        caches = []
        for tokens in (pair.clean, pair.corrupt):
            _, cache = model.run_with_cache(tokens[:, :n])
            caches.append({name: value.detach().double()[0] for name, value in cache.items()})
        clean, corrupt = caches
        stream = clean[f"blocks.{layers - 1}.hook_resid_post"][-1]
        scale = math.sqrt(float(stream.square().mean()) + 1e-6)
        difference = weight * (unembedding[pair.answer[0]] - unembedding[pair.wrong[0]]) / scale
        row = pair.clean[0].tolist()
        differing = [i for i in range(n) if row[i] != int(pair.corrupt[0, i])]
        for layer in range(layers):
            block = f"blocks.{layer}"
            norms = clean[f"{block}.hook_resid_post"].norm(dim=-1)
            for node in range(heads + 1):
                found = dict.fromkeys(MEASURES, 0.0)
                if node == heads:
                    change = clean[f"{block}.hook_mlp_out"] - corrupt[f"{block}.hook_mlp_out"]
                else:
                    z = [cache[f"{block}.attn.hook_z"][:, node] for cache in caches]
                    change = (z[0] - z[1]) @ model.blocks[layer].attn.W_O[node].detach().double()
                    p, q = (cache[f"{block}.attn.hook_pattern"][node] for cache in caches)
                    found["attention-to-change"] = float(sum(p[-1, i] for i in differing))
                    found["corrupt-attention-to-change"] = float(sum(q[-1, i] for i in differing))
                    found["attention-change-at-answer"] = float((p[-1] - q[-1]).abs().sum()) / 2
                    found["attention-change"] = float((p - q).abs().sum()) / 2
                    found["entropy"] = -sum(float(x) * math.log(float(x)) for x in p[-1] if x > 0)
                    wanted = {
                        "previous-token": lambda i: [i - 1],
                        "duplicate-token": lambda i: [k for k in range(i) if row[k] == row[i]],
                        "induction": lambda i: [k for k in range(1, i + 1) if row[k - 1] == row[i]],
                        "first-token": lambda i: [0],
                    }
                    for name, keys in wanted.items():
                        masses = [float(p[i, keys(i)].sum()) for i in range(1, n) if keys(i)]
                        found[name] = sum(masses) / max(len(masses), 1)
                found["change-at-answer"] = float(change[-1].norm() / norms[-1])
                found["change"] = float((change.norm(dim=-1) / norms).sum())
                found["direct-effect"] = float(change[-1] @ difference)
                found["direct-effect-size"] = abs(found["direct-effect"])
                for name, value in found.items():
                    totals[name][layer, node] += value / len(pairs)
    return {name: total.flatten() for name, total in totals.items()}


@pytest.mark.parametrize("batch_size", [2, 6])
def test_every_measurement_by_hand(model, unchanged, batch_size):
    """Prompts of different lengths, with tokens that occur twice; any batch size."""
    pairs = random_pairs(5, 10, seed=3, vocabulary=7, ragged=True)
    with unchanged(model):
        found = dfa.measure(model, pairs, batch_size=batch_size)
    expected = by_hand(model, pairs)
    assert found.names == (*MEASURES, *GROUP_MEASURES)
    for name, values in expected.items():
        assert values.abs().max() > 0, name
        torch.testing.assert_close(
            found[name].double(), values, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_direct_effects_and_the_embedding_make_the_logit_difference(any_model, pairs):
    """All that is added to the stream, through a frozen final norm, is the clean logit difference."""
    short = pairs[:1]
    found = dfa.measure(any_model, short, groups=0)
    _, clean = any_model.run_with_cache(short.clean)
    _, corrupt = any_model.run_with_cache(short.corrupt)
    weight, unembedding = direct_parts(any_model)
    stream = clean[f"blocks.{any_model.cfg.n_layers - 1}.hook_resid_post"][0, -1]
    scale = (stream.square().mean() + 1e-6).sqrt()
    direction = weight * (unembedding[short.answer[0]] - unembedding[short.wrong[0]]) / scale
    other = corrupt[f"blocks.{any_model.cfg.n_layers - 1}.hook_resid_post"][0, -1]
    embedding = (clean["hook_embed"] - corrupt["hook_embed"])[0, -1]
    torch.testing.assert_close(
        found["direct-effect"].sum() + (embedding @ direction), (stream - other) @ direction, rtol=1e-4, atol=1e-4
    )


def test_group_effects_by_hand(model):
    """Each group's clean activations replaced by hooks of our own."""
    pairs = random_pairs(3, 9, seed=5)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    found = dfa.measure(model, pairs, names=["change"], groups=2, batch_size=3)
    some = pairs[:2]
    rows = torch.arange(2)

    def metric(logits):
        return (logits[rows, -1, some.answer] - logits[rows, -1, some.wrong]).mean()

    with torch.no_grad():
        clean = metric(model(some.clean))
    _, corrupt = model.run_with_cache(some.corrupt)
    effects = []
    for site in nodes.sites:

        def put(activation, hook=None, point=site.point):
            return corrupt[point].clone()

        with torch.no_grad():
            effects.append(float(clean - metric(model.run_with_hooks(some.clean, fwd_hooks=[(site.point, put)]))))
    largest = max(map(abs, effects))
    assert largest > 0.1
    for site, effect in zip(nodes.sites, effects, strict=True):
        own = list(site.positions)
        share = found["change"][own] / found["change"][own].sum()
        expected = torch.stack([torch.ones(len(own)), torch.ones(len(own)) / len(own), share], 1) * effect / largest
        torch.testing.assert_close(found.values[own][:, 1:], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen", "gpt2"])
def test_other_families(family):
    """Layer norms, biases and learned positions: the check against the logits is inside."""
    pairs = random_pairs(4, 8, seed=1)
    tables = (
        [dfa.measure(family_model(family, backend), pairs) for backend in BACKENDS]
        if family == "qwen"
        else [dfa.measure(family_model(family, "bridge"), pairs)]
    )
    for table in tables[1:]:
        torch.testing.assert_close(table.values, tables[0].values, rtol=1e-3, atol=1e-4)
    assert tables[0]["direct-effect"].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(any_model, dtype):
    pairs = random_pairs(4, 8, seed=1)
    whole = dfa.measure(any_model, pairs)
    half = dfa.measure(copy.deepcopy(any_model).to(dtype), pairs)
    assert torch.corrcoef(torch.stack([whole.values.flatten(), half.values.flatten()]))[0, 1] > 0.999


def test_prompts_with_a_shared_beginning(any_model):
    """What is run once elsewhere is looked at here from the first token on."""
    pairs = random_pairs(4, 12, seed=8)
    same = dfa.PromptPairs(
        clean=torch.cat([torch.arange(1, 9).repeat(4, 1), pairs.clean], 1),
        corrupt=torch.cat([torch.arange(1, 9).repeat(4, 1), pairs.corrupt], 1),
        answer=pairs.answer,
        wrong=pairs.wrong,
    )
    found = dfa.measure(any_model, same)
    for name, values in by_hand(any_model, same).items():
        torch.testing.assert_close(found[name].double(), values, rtol=1e-4, atol=2e-5)


def test_the_passes_are_counted(any_model, monkeypatch):
    """Rows through the model: two a pair, and two and one a group for each pair of the groups."""
    rows = []
    plain = Runner.run

    def counting(self, tokens, *args, **kwargs):
        if tokens.shape[1] == 8:  # not the two short runs that look for attention patterns
            rows.append(len(tokens))
        return plain(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Runner, "run", counting)
    pairs = random_pairs(7, 8)
    found = dfa.measure(any_model, pairs, groups=3)
    assert sum(rows) == found.meta["passes"] == 2 * 7 + 3 * (2 + 2 * any_model.cfg.n_layers)


def test_no_gradients_are_needed(any_model, pairs):
    """Weights that refuse a gradient, and a caller's inference mode around."""
    outside = dfa.measure(any_model, pairs)
    with torch.inference_mode():
        assert dfa.measure(any_model, pairs) == outside
    assert all(parameter.grad is None for parameter in any_model.parameters())


def test_a_measurement_of_ones_own(any_model, pairs):
    MEASURES.register("largest", Measure(lambda layer: layer.change.abs().amax((1, 3)), "outputs", "largest change"))
    found = dfa.measure(any_model, pairs, names=["largest"], groups=0)
    assert found.names == ("largest",)
    assert found.values.min() > 0
    MEASURES.register("wrong", Measure(lambda layer: layer.stream_norms, "outputs", "of another shape"))
    with pytest.raises(MeasurementError, match=r"'wrong' gave \[6, 10\]; a tensor \[pair, node\] is needed"):
        dfa.measure(any_model, pairs, names=["wrong"])


def test_without_attention_patterns(pairs, monkeypatch):
    """Fused kernels: the pattern's hook point is there, and never fires."""
    model = random_model()
    attention = model.blocks[1].attn
    point, silent = attention.hook_pattern, torch.nn.Identity()
    attention._modules["hook_pattern"] = silent
    if hasattr(model, "original_model"):  # a bridge would look it up anew
        monkeypatch.setattr(type(point), "forward", lambda self, x: x)
    else:
        assert model.hook_dict["blocks.1.attn.hook_pattern"] is point
    with pytest.raises(ModelError, match="attn_implementation='eager'"):
        dfa.measure(model, pairs)
    if not hasattr(model, "original_model"):
        assert dfa.measure(model, pairs, names=["change", "direct-effect"]).shape[1] == 5


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")  # TransformerLens 4's own
def test_logits_that_are_not_the_streams(any_model, pairs):
    """Somebody's hook between the stream and the logits: the direct effect would be wrong, and says so."""
    model = copy.deepcopy(any_model)
    model.hook_dict["ln_final.hook_normalized"].add_hook(lambda activation, hook: activation * 1.5)
    with pytest.raises(ModelError, match="does not give this model's logits"):
        dfa.measure(model, pairs)
    dfa.measure(model, pairs, names=["change", "entropy"])


def test_norms_behind_attention_are_refused(pairs):
    with pytest.raises(ModelError, match="a norm stands between"):
        dfa.measure(family_model("gemma2", "bridge"), pairs)


def test_bad_input(any_model, pairs):
    measure = unchecked(dfa.measure)
    with pytest.raises(MeasurementError, match="Unknown measurement 'chang': .*Did you mean 'change'"):
        measure(any_model, pairs, names=["chang"])
    with pytest.raises(MeasurementError, match="groups must be an integer of at least 0, not -1"):
        measure(any_model, pairs, groups=-1)
    with pytest.raises(MeasurementError, match="nothing to measure"):
        measure(any_model, pairs, names=[], groups=0)


def test_the_table(tmp_path):
    nodes = dfa.NodeSet.for_sizes(2, 3)
    values = torch.rand(8, 2, generator=torch.Generator().manual_seed(0))
    found = dfa.Measurements(values, nodes, ["change", "entropy"], {"model": "m"})
    found.save(tmp_path / "m.safetensors")
    again = dfa.Measurements.load(tmp_path / "m.safetensors")
    assert again == found and again.meta == {"model": "m"} and hash(again) == hash(found)
    assert found != dfa.Measurements(values + 1, nodes, ["change", "entropy"])
    frame = found.to_frame()
    assert list(frame.columns) == ["node", "kind", "layer", "index", "change", "entropy"]
    assert frame["entropy"].tolist() == found["entropy"].tolist() == found.scores("entropy").values.tolist()
    assert found.without("change").names == ("entropy",)
    assert len(found) == 8 and repr(found) == "Measurements(8 nodes: change, entropy)"
    with pytest.raises(MeasurementError, match="Unknown measurement 'chang'"):
        found["chang"]
    with pytest.raises(MeasurementError, match="No measurement is left"):
        found.without("change", "entropy")
    dfa.controls.uniform(nodes).save(tmp_path / "s")
    with pytest.raises(FileError, match=r"not a file of 'dfa_lens measurements'"):
        dfa.Measurements.load(tmp_path / "s")


def test_wrong_tables():
    nodes = dfa.NodeSet.for_sizes(1, 1)
    make = unchecked(dfa.Measurements.__init__)
    blank = object.__new__(dfa.Measurements)
    with pytest.raises(MeasurementError, match=r"shape \[2, 1\] for 2 nodes and 2 names"):
        make(blank, torch.zeros(2, 1), nodes, ["a", "b"])
    with pytest.raises(MeasurementError, match="different names"):
        make(blank, torch.zeros(2, 2), nodes, ["a", "a"])
    with pytest.raises(MeasurementError, match="1 measurements are not finite .first: 'b' of m0, nan"):
        make(blank, torch.tensor([[0.0, 1.0], [2.0, math.nan]]), nodes, ["a", "b"])
