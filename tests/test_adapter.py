"""What the adapter promises on every TransformerLens: no silent mistake, and a model left as it was."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import BACKENDS, random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.errors import HookError, ModelError
from dfa_lens.models import backend, hooks
from dfa_lens.models.runner import ProcessedWeightsWarning, Runner


def test_protocol(model):
    assert isinstance(model, backend.HookedModel)
    assert not isinstance(torch.nn.Linear(2, 2), backend.HookedModel)
    with pytest.raises(ModelError, match="A Linear can't be hooked: pass a TransformerLens HookedTransformer"):
        Runner(torch.nn.Linear(2, 2))


def test_two_names_of_one_point_are_refused():
    bridge = random_model("bridge")
    with pytest.raises(HookError, match="are two names of one hook point"):
        dfa.NodeSet.from_points(bridge, {"blocks.0.hook_attn_out": None, "blocks.0.attn.hook_out": None})
    one = dfa.NodeSet.from_points(bridge, {"blocks.0.hook_attn_out": None})
    other = dfa.NodeSet.from_points(bridge, {"blocks.0.attn.hook_out": None})
    pairs = random_pairs()
    with pytest.raises(HookError, match="are two names of one hook point"):
        dfa.attribute(bridge, pairs, nodes=one + other)
    # either name alone is the same node
    values = [dfa.attribute(bridge, pairs, nodes=nodes, method="exact").values for nodes in (one, other)]
    assert torch.equal(*values)


def test_points_that_are_no_nodes(model):
    """Each is refused when the node set is made, with the reason."""
    if backend.is_bridge(model):
        cases = {
            "embed.hook_in": "gives torch.int64, not an activation",
            "blocks.0.attn.hook_cos": "axis 0 is not the batch",
        }
    else:
        cases = {
            "blocks.0.ln1.hook_normalized": "fires three times a pass",
            "blocks.0.attn.hook_attn_scores": "holds infinite values",
        }
    for name, message in cases.items():
        with pytest.raises(HookError, match=message):
            dfa.NodeSet.from_points(model, {name: None})


def test_a_point_that_fires_several_times_is_refused():
    if "hooked" not in BACKENDS:
        pytest.skip("HookedTransformer is gone in TransformerLens 4")
    model = random_model("hooked")
    point = dfa.hooks.add_hook_point(model, "blocks.1.ln1", "hook_mine")
    with pytest.raises(HookError, match="three times a pass"):
        dfa.NodeSet.from_points(model, {point: None})
    dfa.hooks.remove_hook_point(model, point)
    # one that no rule knows: the same module called twice in a pass
    twice = model.blocks[2].mlp
    original = twice.forward
    twice.forward = lambda x: original(x) + 0 * original(x)
    with pytest.raises(HookError, match=r"'blocks.2.mlp.hook_post' fired 2 times in one pass"):
        dfa.NodeSet.from_points(model, {"blocks.2.mlp.hook_post": 2})


def test_what_is_recorded_is_never_edited(model, pairs):
    """Gating after recording, on views that share storage, leaves the recorded tensors as they were."""
    nodes = dfa.NodeSet.from_points(
        model, {"blocks.{layer}.hook_resid_pre": None, "blocks.{layer}.hook_resid_post": None}
    )
    corrupt = {}
    with torch.no_grad():
        Runner(model).run(pairs.corrupt, pairs.lengths, hooks.record_hooks(nodes, corrupt))
        before = {point: activation.clone() for point, activation in corrupt.items()}
        for _ in range(2):
            gates = hooks.gate_hooks(nodes, torch.full((len(nodes),), 0.3), corrupt=corrupt)
            Runner(model).run(pairs.clean, pairs.lengths, gates)
    assert all(torch.equal(before[point], corrupt[point]) for point in corrupt)
    addresses = [activation.untyped_storage().data_ptr() for activation in corrupt.values()]
    assert len(set(addresses)) == len(addresses)


def test_another_batch_s_activations_are_refused(any_model, pairs, ragged):
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    corrupt = {}
    with torch.no_grad():
        Runner(any_model).run(ragged.corrupt[:1], ragged.lengths[:1], hooks.record_hooks(nodes, corrupt))
        gates = hooks.gate_hooks(nodes, torch.zeros(15), corrupt=corrupt)
        with pytest.raises(HookError, match="record on the same batch, with the same padding"):
            Runner(any_model).run(pairs.clean, pairs.lengths, gates)


# --- hook points of one's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["output", "input"])
def test_a_hook_point_of_ones_own(model, pairs, unchanged, at):
    """On the MLP its output is hook_mlp_out; on the second norm its input is what the MLP reads."""
    with unchanged(model):
        module = "blocks.1.mlp" if at == "output" else "blocks.1.ln2"
        point = dfa.hooks.add_hook_point(model, module, "hook_mine", at=at)
        try:
            assert point == f"{module}.hook_mine"
            nodes = dfa.NodeSet.from_points(model, {point: None})
            with pytest.raises(HookError, match="already has 'hook_mine'"):
                dfa.hooks.add_hook_point(model, module, "hook_mine")
            found = dfa.attribute(model, pairs, nodes=nodes, method="exact").values[0]
            dfa.faithfulness_curve(model, pairs, dfa.attribute(model, pairs, nodes=nodes), sizes=[0, 1])
            if at == "output":
                mlp = dfa.NodeSet.heads_and_mlps(model)[["m1"]]
                torch.testing.assert_close(found, dfa.attribute(model, pairs, nodes=mlp, method="exact").values[0])
            else:
                assert abs(found) > 1e-3
        finally:
            dfa.hooks.remove_hook_point(model, point)
    assert point not in model.hook_dict
    with pytest.raises(HookError, match="has no hook point"):
        dfa.attribute(model, pairs, nodes=nodes)
    with pytest.raises(HookError, match="is not a hook point that was added"):
        dfa.hooks.remove_hook_point(model, point)


def test_adding_a_point_to_nothing(model):
    with pytest.raises(HookError, match="has no module 'blocks.9.mlp'"):
        dfa.hooks.add_hook_point(model, "blocks.9.mlp")
    with pytest.raises(HookError, match="must start with 'hook_'"):
        dfa.hooks.add_hook_point(model, "blocks.1.mlp", "mine")


# --- processed weights -------------------------------------------------------------------------------------------


def processed(backend, family):
    model = random_model(backend, family=family)
    if backend == "bridge":
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_and_process_state_dict(
            state, fold_ln=True, center_writing_weights=False, center_unembed=True, fold_value_biases=True
        )
    return model


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_processed_weights_warn_once_and_change_what_the_warning_says(backend, family, ragged):
    plain, changed = random_model(backend, family=family), processed(backend, family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProcessedWeightsWarning)
        expected = dfa.attribute(plain, ragged, method="exact")  # no warning
    with pytest.warns(ProcessedWeightsWarning, match="Logit differences, scores, masks and curves are those of"):
        found = dfa.attribute(changed, ragged, method="exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProcessedWeightsWarning)
        gradients = dfa.attribute(changed, ragged)  # told already
        curve = dfa.faithfulness_curve(changed, ragged, found, sizes=[0, 3, 9, 15])
    # what stays the same
    torch.testing.assert_close(found.values, expected.values, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gradients.values, dfa.attribute(plain, ragged).values, atol=1e-3, rtol=1e-3)
    same = dfa.faithfulness_curve(plain, ragged, expected, sizes=[0, 3, 9, 15])
    assert abs(curve.cpr - same.cpr) < 1e-3
    # what does not: single logits always, hook_z by a constant on Qwen
    nodes = dfa.NodeSet.heads_and_mlps(plain).where(kind="head")
    logits, z = {}, {}
    for name, model in (("plain", plain), ("changed", changed)):
        for run, tokens in (("clean", ragged.clean), ("corrupt", ragged.corrupt)):
            into = {}
            with torch.no_grad():
                logits[name, run] = Runner(model).run(tokens, ragged.lengths, hooks.record_hooks(nodes, into))
            z[name, run] = into["blocks.1.attn.hook_z"][:, 0]
    assert not torch.allclose(logits["plain", "clean"], logits["changed", "clean"], atol=1e-2)
    moved = (z["plain", "clean"] - z["changed", "clean"]).abs().max()
    assert (moved > 0.05) == (family == "qwen")
    torch.testing.assert_close(
        z["plain", "clean"] - z["plain", "corrupt"],
        z["changed", "clean"] - z["changed", "corrupt"],
        atol=1e-4,
        rtol=1e-4,
    )


def test_processing_is_named():
    if "hooked" not in BACKENDS:
        pytest.skip("HookedTransformer is gone in TransformerLens 4")
    assert Runner(random_model("hooked")).backend.processing() == ()
    assert Runner(processed("hooked", "llama")).backend.processing() == ("norm folded", "unembedding centred")
    assert Runner(processed("hooked", "qwen")).backend.processing()[-1] == "value biases folded"


def test_gradients_in_compatibility_mode_are_finite_with_padding(ragged):
    """TransformerLens 3.9 gives NaN there with padding on the left; ours is on the right."""
    model = processed("bridge", "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProcessedWeightsWarning)
        scores = dfa.attribute(model, ragged)
        source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
        alignment = dfa.fit(model, {"a": source}, {"a": ragged}, steps=2)
    assert scores.values.isfinite().all()
    assert alignment.W.isfinite().all()


def test_weights_that_live_elsewhere_say_where_they_are_brought_to():
    """Offloaded weights are on no device; accelerate's hooks know the one that they are run on. No GPU is needed."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), torch.nn.Linear(2, 2, device="meta"))
    assert backend.HookedBackend(model).device == torch.device("meta")
    model[1]._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert backend.HookedBackend(model).device == torch.device("cuda:1")
    assert backend.HookedBackend(torch.nn.Linear(2, 2)).device == torch.device("cpu")
