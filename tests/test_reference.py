"""Agreement with independent reference numbers for a Llama-like and a Qwen-like 3-layer model.

The files under tests/reference hold weights, prompts, and what another implementation of the published method (as
released, and with its faults corrected) gave for them.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dfa_lens as dfa
from dfa_lens.data.curve import MIB_FRACTIONS
from dfa_lens.models.loading import transformer_lens_major
from dfa_lens.models.runner import Runner

FOLDER = Path(__file__).parent / "reference"
NAMES = ("llama_a", "qwen_a")
KINDS = ("equal", "padded")

#: name of the reference scores → how attribute gives them
SCORES = {
    "eap.fixed": {"method": "nap"},
    "eap.released": {"method": "nap", "mlp_gradient": "input"},
    "eap_ig_inputs.fixed": {"method": "nap-ig-inputs"},
    "eap_ig_inputs.released": {"method": "nap-ig-inputs", "mlp_gradient": "input"},
    "eap_ig_activations.per_site": {"method": "nap-ig-activations"},
    "eap_ig_activations.fixed": {"method": "nap-ig-activations", "accumulate": "all"},
    "eap_ig_activations.released": {"method": "nap-ig-activations", "accumulate": "all", "mlp_gradient": "input"},
    "exact": {"method": "exact"},
}
#: how fit trains as released
RELEASED_TRAINING = {
    "intervention": "restore",
    "positions": "all-padded",
    "scaling": "raw",
    "sparsity_weight": 0.1,
    "lr": 0.1,
    "batch_size": 3,
    "shuffle": False,
}

pytestmark = pytest.mark.skipif(
    transformer_lens_major() >= 4, reason="the reference weights are those of a HookedTransformer"
)


@cache
def reference(name):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    description = json.loads((FOLDER / f"{name}.json").read_text())
    tensors = load_file(FOLDER / f"{name}.safetensors")
    flags = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "ungroup_grouped_query_attention")
    config = {key: value for key, value in description["config"].items() if key not in flags}
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(HookedTransformerConfig(**config), move_to_device=False)
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    return model.eval(), description, tensors


def setting(name, kind):
    model, description, tensors = reference(name)
    prompts = description[kind]
    pairs = dfa.PromptPairs(
        clean=tensors[f"{kind}.clean"].long(),
        corrupt=tensors[f"{kind}.corrupt"].long(),
        answer=torch.tensor(prompts["answer"]),
        wrong=torch.tensor(prompts["wrong"]),
        lengths=tensors[f"{kind}.mask"].sum(1).long(),
    )
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    assert list(nodes.names) == description["nodes"]
    return model, pairs, nodes, prompts, {k.removeprefix(f"{kind}."): v for k, v in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits(name, kind):
    model, pairs, _, _, tensors = setting(name, kind)
    with torch.no_grad():
        clean = Runner(model).run(pairs.clean, pairs.lengths)
    rows = torch.arange(len(pairs))
    torch.testing.assert_close(clean, tensors["clean_logits"][rows, pairs.lengths - 1], atol=1e-5, rtol=1e-4)
    difference = clean[rows, pairs.answer] - clean[rows, pairs.wrong]
    torch.testing.assert_close(difference, tensors["ld_clean"], atol=1e-4, rtol=1e-4)


def close(found, expected):
    """1e-4 relative to the largest score."""
    torch.testing.assert_close(found, expected.float(), atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key", "options"), SCORES.items())
def test_scores(name, kind, key, options):
    model, pairs, nodes, _, tensors = setting(name, kind)
    scores = dfa.attribute(model, pairs, nodes=nodes, steps=5, batch_size=4, **options)
    close(scores.values, tensors[key])


def assert_curve(curve, expected):
    assert curve.sizes.tolist() == expected["k"]
    np.testing.assert_allclose(curve.faithfulness, expected["faithfulness"], atol=1e-5)
    assert curve.cpr == pytest.approx(expected["cpr"], abs=1e-5)
    assert curve.cmd == pytest.approx(expected["cmd"], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranking", ["eap_ig_inputs", "random"])
def test_mib_protocol(name, kind, ranking):
    """Faithfulness, CPR and CMD as the released evaluation gives them: `input` ranked, ten fractions, signed scores."""
    model, pairs, nodes, prompts, tensors = setting(name, kind)
    values = tensors["eap_ig_inputs.released" if ranking == "eap_ig_inputs" else "random_scores"]
    expected = prompts[f"eval.{ranking}.released"]
    curve = dfa.faithfulness_curve(model, pairs, dfa.NodeScores(values, nodes), protocol="mib")
    assert_curve(curve, expected)
    assert curve.clean_values.mean() == pytest.approx(expected["baseline"], rel=1e-5)
    assert curve.corrupt_values.mean() == pytest.approx(expected["corrupted"], rel=1e-5)
    assert curve.floor == pytest.approx(0.25)
    assert curve.cmd_floor == pytest.approx(0.749)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranking", ["eap_ig_inputs", "random"])
def test_nodes_protocol(name, kind, ranking):
    """The same with the embedding kept clean, on the same fractions."""
    model, pairs, nodes, prompts, tensors = setting(name, kind)
    values = tensors["eap_ig_inputs.released" if ranking == "eap_ig_inputs" else "random_scores"]
    expected = prompts[f"eval.{ranking}.input_kept"]
    curve = dfa.faithfulness_curve(model, pairs, dfa.NodeScores(values, nodes), fractions=MIB_FRACTIONS)
    assert_curve(curve, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", ["gated", "noop_heads"])
def test_released_training(name, kind, heads):
    """Five training steps as released: `restore`, KL over all positions with padding, raw scores, λ 0.1."""
    model, pairs, _, _, tensors = setting(name, kind)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    tensors = {key.removeprefix("dfa."): value for key, value in tensors.items()}
    W0, s, expected = tensors["W0"], tensors["s"], {k: tensors[f"{heads}.{k}"] for k in ("losses", "masks", "W_final")}
    source_nodes = dfa.NodeSet.for_sizes(2, 3)
    options = RELEASED_TRAINING | {"gate_heads": heads == "gated", "initial": W0}
    source = dfa.NodeScores(s, source_nodes)

    def after(steps):
        return dfa.fit(model, {"task": source}, {"task": pairs}, steps=steps, **options)

    trained = after(5)
    losses = torch.tensor([[r["loss"], r["divergence"], r["mask_mean"]] for r in trained.history])
    torch.testing.assert_close(losses, expected["losses"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trained.W, expected["W_final"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trained.transfer(source).values, tensors[f"{heads}.scores_final"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.sigmoid(s @ W0), expected["masks"][0], atol=1e-5, rtol=1e-5)
    for step in range(1, 5):
        torch.testing.assert_close(after(step).mask(source), expected["masks"][step], atol=1e-4, rtol=1e-4)
    # Adam's first step is lr·sign(gradient) wherever the gradient is not negligible
    gradient = tensors[f"{heads}.grad_W_step0"]
    moved = W0 - after(1).W
    clear = gradient.abs() > 1e-5
    torch.testing.assert_close(moved[clear], 0.1 * gradient.sign()[clear], atol=1e-3, rtol=0)
    assert len(nodes) == trained.W.shape[1]
