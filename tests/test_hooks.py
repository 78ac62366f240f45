"""Recording, gating and ablating, against Hugging Face's own modules and against themselves."""

import pytest
import torch
from helpers import float64_model, random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.errors import DfaError, HookError, NodeError, ScoreError
from dfa_lens.models import hooks
from dfa_lens.models.loading import transformer_lens_major
from dfa_lens.models.passes import attention_mask
from dfa_lens.models.runner import Runner

FAMILIES = ("llama", "qwen")


def clean_and_corrupt(model, pairs, nodes):
    clean, corrupt = {}, {}
    with torch.no_grad():
        m = Runner(model).run(pairs.clean, pairs.lengths, hooks.record_hooks(nodes, clean))
        c = Runner(model).run(pairs.corrupt, pairs.lengths, hooks.record_hooks(nodes, corrupt))
    return clean, corrupt, m, c


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_hugging_face(family):
    """o_proj's input is z, the MLP's output is mlp_out: an oracle that knows nothing of TransformerLens."""
    bridge = random_model("bridge", family=family)
    hf = bridge.original_model
    pairs = random_pairs(ragged=True)
    seen = {}
    handles = []
    for layer, block in enumerate(hf.model.layers):
        o_proj, mlp = block.self_attn.o_proj, block.mlp
        handles.append(o_proj.register_forward_pre_hook(lambda m, i, layer=layer: seen.__setitem__(f"a{layer}", i[0])))
        handles.append(mlp.register_forward_hook(lambda m, i, o, layer=layer: seen.__setitem__(f"m{layer}", o)))
    mask = attention_mask(pairs.lengths, pairs.clean.shape[1])
    with torch.no_grad():
        logits = hf(input_ids=pairs.clean, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    real = mask.bool()
    expected = {name: tensor.detach().clone() for name, tensor in seen.items()}
    models = [bridge]
    if transformer_lens_major() < 4:
        models.append(random_model("hooked", family=family))
    for model in models:
        nodes = dfa.NodeSet.heads_and_mlps(model)
        found = {}
        with torch.no_grad():
            at_answer = Runner(model).run(pairs.clean, pairs.lengths, hooks.record_hooks(nodes, found))
        torch.testing.assert_close(at_answer, logits[torch.arange(len(pairs)), pairs.lengths - 1], atol=1e-4, rtol=1e-4)
        for layer in range(3):
            z = found[f"blocks.{layer}.attn.hook_z"].flatten(2)
            torch.testing.assert_close(z[real], expected[f"a{layer}"].reshape(z.shape)[real], atol=1e-4, rtol=1e-4)
            out = found[f"blocks.{layer}.hook_mlp_out"]
            torch.testing.assert_close(out[real], expected[f"m{layer}"][real], atol=1e-4, rtol=1e-4)


def test_answer_only_unembedding_changes_nothing(model, ragged):
    with torch.no_grad():
        everywhere = Runner(model).run(ragged.clean, ragged.lengths, positions="all")
        at_answer = Runner(model).run(ragged.clean, ragged.lengths)
    torch.testing.assert_close(at_answer, everywhere[torch.arange(len(ragged)), ragged.lengths - 1])


def test_padding_does_not_matter(model, ragged):
    """The same prompts, each alone and without padding, give the same logits."""
    with torch.no_grad():
        together = Runner(model).run(ragged.clean, ragged.lengths)
        alone = torch.cat([Runner(model).run(p.clean, p.lengths) for p in (ragged[i] for i in range(len(ragged)))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_gate_of_ones_is_the_clean_run_and_of_zeros_corrupts_every_node(model, padded, unchanged):
    pairs = random_pairs(ragged=padded)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    _, corrupt, m_clean, _ = clean_and_corrupt(model, pairs, nodes)
    with unchanged(model), torch.no_grad():
        ones = Runner(model).run(pairs.clean, pairs.lengths, hooks.gate_hooks(nodes, torch.ones(15), corrupt=corrupt))
        zeros = Runner(model).run(pairs.clean, pairs.lengths, hooks.gate_hooks(nodes, torch.zeros(15), corrupt=corrupt))

        # all nodes corrupt, by replacing what they give, written without a mask
        def replace(point):
            return lambda now: corrupt[point].clone()

        replaced = Runner(model).run(pairs.clean, pairs.lengths, [(point, replace(point)) for point in corrupt])
    assert torch.equal(ones, m_clean)
    assert torch.equal(zeros, replaced)


def test_restore_of_ones_restores_every_node(any_model, pairs):
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    clean, corrupt, _, m_corrupt = clean_and_corrupt(any_model, pairs, nodes)
    with torch.no_grad():
        none = Runner(any_model).run(
            pairs.corrupt,
            pairs.lengths,
            hooks.gate_hooks(nodes, torch.zeros(15), clean=clean, intervention="restore"),
        )
        both = {
            g: Runner(any_model).run(
                pairs.clean,
                pairs.lengths,
                hooks.gate_hooks(nodes, torch.full((15,), g), clean=clean, corrupt=corrupt, intervention="interpolate"),
            )
            for g in (0.0, 1.0)
        }
        zeros = Runner(any_model).run(
            pairs.clean, pairs.lengths, hooks.gate_hooks(nodes, torch.zeros(15), corrupt=corrupt)
        )
        plain = Runner(any_model).run(pairs.clean, pairs.lengths)
    assert torch.equal(none, m_corrupt)
    assert torch.equal(both[0.0], zeros)
    torch.testing.assert_close(both[1.0], plain)


def test_soft_gate_is_its_equation_at_one_node(any_model, pairs):
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    clean, corrupt, _, _ = clean_and_corrupt(any_model, pairs, nodes)
    mask = torch.ones(15)
    mask[nodes.position("a2.h1")] = 0.3
    after = {}
    gates = hooks.gate_hooks(nodes, mask, corrupt=corrupt)
    with torch.no_grad():
        Runner(any_model).run(pairs.clean, pairs.lengths, [*gates, *hooks.record_hooks(nodes, after)])
    point = "blocks.2.attn.hook_z"
    torch.testing.assert_close(after[point][:, :, 1], 0.3 * clean[point][:, :, 1] + 0.7 * corrupt[point][:, :, 1])
    torch.testing.assert_close(after[point][:, :, 0], clean[point][:, :, 0])


@pytest.mark.parametrize("intervention", ["circuit", "restore", "interpolate"])
def test_soft_gate_gradient_is_that_of_finite_differences(intervention, pairs):
    model = float64_model()
    nodes = dfa.NodeSet.heads_and_mlps(model)
    clean, corrupt, _, _ = clean_and_corrupt(model, pairs, nodes)
    tokens = pairs.corrupt if intervention == "restore" else pairs.clean
    mask = torch.rand(15, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def value(mask):
        gates = hooks.gate_hooks(nodes, mask, clean=clean, corrupt=corrupt, intervention=intervention)
        return Runner(model).run(tokens, pairs.lengths, gates)[:, 5].sum()

    leaf = mask.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), [leaf])
    h = 1e-5
    with torch.no_grad():
        for j in range(15):
            step = torch.zeros_like(mask)
            step[j] = h
            difference = (value(mask + step) - value(mask - step)) / (2 * h)
            torch.testing.assert_close(gradient[j], difference, atol=1e-6, rtol=1e-5)


def test_masks_per_example(any_model, pairs):
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    _, corrupt, _, _ = clean_and_corrupt(any_model, pairs, nodes)
    masks = torch.rand(len(pairs), 15, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = Runner(any_model).run(pairs.clean, pairs.lengths, hooks.gate_hooks(nodes, masks, corrupt=corrupt))
        for i in range(len(pairs)):
            one = {point: a[i : i + 1] for point, a in corrupt.items()}
            alone = Runner(any_model).run(
                pairs.clean[i : i + 1],
                pairs.lengths[i : i + 1],
                hooks.gate_hooks(nodes, masks[i], corrupt=one),
            )
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_subsets_leave_other_slices_alone(any_model, pairs):
    every = dfa.NodeSet.heads_and_mlps(any_model)
    some = every[["a1.h3", "a1.h0", "m2"]]
    _, corrupt, _, _ = clean_and_corrupt(any_model, pairs, every)
    mask = torch.ones(15)
    for name, value in (("a1.h3", 0.0), ("a1.h0", 0.5), ("m2", 0.25)):
        mask[every.position(name)] = value
    with torch.no_grad():
        small = Runner(any_model).run(
            pairs.clean,
            pairs.lengths,
            hooks.gate_hooks(some, torch.tensor([0.0, 0.5, 0.25]), corrupt=corrupt),
        )
        full = Runner(any_model).run(pairs.clean, pairs.lengths, hooks.gate_hooks(every, mask, corrupt=corrupt))
    torch.testing.assert_close(small, full)


def test_contexts(model, pairs, unchanged):
    nodes = dfa.NodeSet.heads_and_mlps(model)
    mask = attention_mask(pairs.lengths, 10)
    with unchanged(model), torch.no_grad():
        with dfa.hooks.record(model, nodes) as corrupt:
            model(pairs.corrupt, attention_mask=mask)
        with dfa.hooks.record(model, nodes) as clean:
            expected = model(pairs.clean, attention_mask=mask)
        with dfa.hooks.ablate(model, nodes, keep=nodes.names, corrupt=corrupt):
            kept = model(pairs.clean, attention_mask=mask)
        with dfa.hooks.ablate(model, nodes, keep=torch.zeros(15, dtype=torch.bool), corrupt=corrupt):
            dropped = model(pairs.clean, attention_mask=mask)
        with dfa.hooks.gate(model, nodes, torch.zeros(15), corrupt=corrupt):
            gated = model(pairs.clean, attention_mask=mask)
    assert set(clean) == {site.point for site in nodes.sites}
    assert torch.equal(kept, expected)
    assert torch.equal(dropped, gated)
    assert not torch.allclose(dropped, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_when_an_exception_arrives(model, pairs, error, unchanged):
    nodes = dfa.NodeSet.heads_and_mlps(model)
    model.train()
    try:
        with unchanged(model), pytest.raises(error), Runner(model).session(), dfa.hooks.record(model, nodes):
            raise error

        def broken(logits, batch):
            raise error

        for method in ("nap", "nap-ig-activations", "exact"):
            with unchanged(model), pytest.raises(error):
                dfa.attribute(model, pairs, method=method, metric=broken)
        with unchanged(model), pytest.raises(error):
            dfa.faithfulness_curve(model, pairs, dfa.controls.uniform(nodes), metric=broken)
    finally:
        model.eval()


def test_whole_operations_leave_the_model_as_it_was(model, pairs, unchanged):
    nodes = dfa.NodeSet.heads_and_mlps(model)
    source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
    with unchanged(model), torch.no_grad():  # also under the user's no_grad
        scores = dfa.attribute(model, pairs)
        dfa.fit(model, {"a": source}, {"a": pairs}, steps=2)
        dfa.faithfulness_curve(model, pairs, scores, sizes=[0, 5, 15])
    assert scores.nodes == nodes


def test_the_users_own_hooks_stay(model, pairs):
    calls = []
    point = model.hook_dict["blocks.1.hook_mlp_out"]
    point.add_hook(lambda activation, hook: calls.append(1))
    try:
        dfa.attribute(model, pairs, method="nap")
        assert calls
        assert len(point.fwd_hooks) == 1
    finally:
        point.remove_hooks()


def test_flag_gated_points_are_refused(model):
    with pytest.raises(HookError, match="fires only when model.cfg.use_attn_result is set"):
        Runner(model).points(["blocks.0.attn.hook_result"])


def test_a_hook_that_does_not_fire_is_an_error(any_model, unchanged):
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    with unchanged(any_model), pytest.raises(HookError, match="did not fire"), dfa.hooks.record(any_model, nodes):
        pass


def test_resid_mid_is_refused_on_a_bridge():
    with pytest.raises(HookError, match="skip path"):
        Runner(random_model("bridge")).points(["blocks.0.hook_resid_mid"])


def test_bad_input(any_model, pairs):
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    with pytest.raises(ScoreError, match="The mask has 3 entries, but the node set has 15"):
        hooks.gate_hooks(nodes, torch.zeros(3), corrupt={})
    with pytest.raises(HookError, match="needs the recorded corrupt activations"):
        hooks.gate_hooks(nodes, torch.zeros(15))
    with pytest.raises(HookError, match=r"Unknown intervention 'circiut'.*Did you mean 'circuit'"):
        unchecked(hooks.gate_hooks)(nodes, torch.zeros(15), corrupt={}, intervention="circiut")
    with pytest.raises(NodeError, match="made for another model"):
        dfa.attribute(any_model, pairs, nodes=dfa.NodeSet.for_sizes(3, 5))
    with pytest.raises(DfaError, match="has no hook point"):
        dfa.attribute(any_model, pairs, nodes=dfa.NodeSet.for_sizes(9, 4))


def test_heads_at_z_are_heads_at_result(pairs):
    """Gating hook_z of a head is gating its hook_result: W_O is linear."""
    if transformer_lens_major() >= 4:
        pytest.skip("HookedTransformer is gone in TransformerLens 4")
    model = random_model("hooked")
    nodes = dfa.NodeSet.heads_and_mlps(model).where(lambda n: n.kind == "head")
    model.set_use_attn_result(True)
    try:
        results = dfa.NodeSet.from_points(model, {"blocks.{layer}.attn.hook_result": 2})
        for method in ("nap", "nap-ig-inputs", "nap-ig-activations", "exact"):
            at_z = dfa.attribute(model, pairs, nodes=nodes, method=method, steps=3)
            at_result = dfa.attribute(model, pairs, nodes=results, method=method, steps=3)
            torch.testing.assert_close(at_z.values, at_result.values, atol=1e-4, rtol=1e-4)
    finally:
        model.set_use_attn_result(False)
