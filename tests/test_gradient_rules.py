"""Rules for the gradient against a Llama written anew, in which every rule stands where the papers write it."""

import copy
import math
from functools import cache

import pytest
import torch
from families import bridge, hugging_face
from helpers import BACKENDS, plain_passes, random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.attribution.learned import Matryoshka, NodePruning, UniformGradientSampling
from dfa_lens.errors import DfaError, ModelError
from dfa_lens.models.gradient_rules import Rules

METHODS = ("relp", "attnlrp", "gim")


def shared(x, y, multiply):
    """x·y, of whose gradient each factor gets a half."""
    half = 0.5 * (multiply(x, y.detach()) + multiply(x.detach(), y))
    return half + (multiply(x, y) - half).detach()


def softened(scores, temperature):
    """A softmax with the slope that it has at a temperature: d T·softmax(x/T) = J(x/T)·dx."""
    soft = temperature * (scores / temperature).softmax(-1)
    return soft + (scores.softmax(-1) - soft).detach()


class Written:
    """Llama or Qwen-2 from its weights, in float64."""

    def __init__(self, model, method):
        self.model, self.method = model, method
        self.config = model.config

    def weight(self, module):
        bias = None if module.bias is None else module.bias.double()
        return module.weight.double(), bias

    def linear(self, module, x):
        return torch.nn.functional.linear(x, *self.weight(module))

    def norm(self, module, x):
        scale = (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        return module.weight.double() * x / scale.detach()

    def rotated(self, x):
        n, d = x.shape[2], x.shape[3]
        angle = torch.arange(n)[:, None] * (10000.0 ** (-torch.arange(0, d, 2) / d))
        cos, sin = angle.cos().repeat(1, 2).double(), angle.sin().repeat(1, 2).double()
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def attention(self, module, x):
        config = self.config
        d = config.hidden_size // config.num_attention_heads
        q, k, v = (
            self.linear(each, x).unflatten(-1, (-1, d)).transpose(1, 2)
            for each in (module.q_proj, module.k_proj, module.v_proj)
        )
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        q, k = self.rotated(q), self.rotated(k).transpose(2, 3)
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1).double()
        if self.method == "relp":
            pattern = (q @ k / d**0.5 + mask).softmax(-1).detach()
            return pattern @ v
        scores = shared(q, k, torch.matmul) / d**0.5 + mask
        pattern = softened(scores, 2.0) if self.method == "gim" else scores.softmax(-1)
        return shared(pattern, v, torch.matmul)

    def mlp(self, module, x):
        gate, up = self.linear(module.gate_proj, x), self.linear(module.up_proj, x)
        silu = gate * gate.sigmoid() if self.method == "gim" else gate * gate.sigmoid().detach()
        return self.linear(module.down_proj, shared(silu, up, torch.mul))

    def run(self, tokens):
        """The logits, and what each node computes, with its gradient kept."""
        nodes = {}
        x = self.model.model.embed_tokens.weight.double()[tokens].requires_grad_(True)
        for i, layer in enumerate(self.model.model.layers):
            z = self.attention(layer.self_attn, self.norm(layer.input_layernorm, x)).transpose(1, 2)
            nodes[f"a{i}"] = z
            x = x + self.linear(layer.self_attn.o_proj, z.flatten(2))
            nodes[f"m{i}"] = self.mlp(layer.mlp, self.norm(layer.post_attention_layernorm, x))
            x = x + nodes[f"m{i}"]
        return self.linear(self.model.lm_head, self.norm(self.model.model.norm, x)), nodes

    def scores(self, pairs):
        logits, clean = self.run(pairs.clean)
        _, corrupt = self.run(pairs.corrupt)
        rows = torch.arange(len(pairs))
        last = logits[rows, pairs.lengths - 1]
        metric = (last[rows, pairs.answer] - last[rows, pairs.wrong]).mean()
        gradients = torch.autograd.grad(metric, list(clean.values()))
        found = {}
        for (name, now), gradient in zip(clean.items(), gradients, strict=True):
            product = ((now - corrupt[name]) * gradient).detach()
            if name[0] == "m":
                found[name] = float(product.sum())
            else:
                found |= {f"{name}.h{head}": float(product[:, :, head].sum()) for head in range(product.shape[2])}
        return found


@cache
def model_of(family, backend):
    return random_model(backend, family=family)


@pytest.fixture(scope="module", params=["llama", "qwen"])
def plain(request):
    return request.param, model_of(request.param, "transformers")


@pytest.mark.parametrize("method", METHODS)
def test_rules_are_those_of_a_model_written_anew(plain, method, unchanged):
    family, direct = plain
    pairs = random_pairs(ragged=True, seed=3)
    written = Written(direct.original_model, method).scores(pairs)
    models = [model_of(family, backend) for backend in BACKENDS]
    for model in models if method == "gim" else [direct, *models]:
        with unchanged(model):
            found = dfa.attribute(model, pairs, method=method, batch_size=4)
        expected = torch.tensor([written[name] for name in found.nodes.names])
        torch.testing.assert_close(found.values, expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-3)


def test_rules_change_no_logit(plain):
    """Only the way back is another one: the metric of the clean run is the same to the bit."""
    _, model = plain
    pairs = random_pairs(seed=3)
    usual = dfa.attribute(model, pairs, method="nap").meta["metric_clean"]
    for method in METHODS[:2]:
        assert dfa.attribute(model, pairs, method=method).meta["metric_clean"] == pytest.approx(usual, rel=1e-5)


def test_neurons_and_queries_have_scores(any_model, pairs):
    """A neuron's score is its part of its MLP's; with attention frozen a query's is zero."""
    mlps = dfa.attribute(any_model, pairs, method="relp")
    neurons = dfa.NodeSet.from_points(any_model, {"blocks.1.mlp.hook_post": 2})
    found = dfa.attribute(any_model, pairs, nodes=neurons, method="relp")
    assert float(found.values.sum()) == pytest.approx(mlps["m1"], rel=1e-3)
    queries = dfa.NodeSet.from_points(any_model, {"blocks.{layer}.attn.hook_q": 2})
    assert not dfa.attribute(any_model, pairs, nodes=queries, method="relp").values.any()
    assert dfa.attribute(any_model, pairs, nodes=queries, method="attnlrp").values.any()


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", "relp"), ("gpt_neox", "relp"), ("gemma2", "relp"), ("phi3", "relp"), ("qwen3", "attnlrp")],
)
def test_other_kinds_of_models(family, method):
    """Layer norms, MLPs without gates or with one projection for both factors, norms of 1 + w and behind attention: a
    TransformerBridge and the Hugging Face model that it wraps give the same scores."""
    model, pairs = hugging_face(family), random_pairs(seed=4)
    nap, found = (dfa.attribute(model, pairs, method=each).values for each in ("nap", method))
    assert (found - nap).abs().max() > 1e-2 * nap.abs().max()
    bridged = dfa.attribute(bridge(family), pairs, method=method).values
    torch.testing.assert_close(bridged, found, atol=1e-4 * float(found.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("made", [hugging_face, bridge])
def test_a_mixture_of_experts_is_refused(made, method):
    """Its neurons are not shown, so that a part of the gradient would be as it is without the rules, in silence."""
    with pytest.raises(ModelError, match="mixtures? of experts"):
        dfa.attribute(made("qwen3_moe"), random_pairs(2), method=method)


def test_a_norm_of_an_unknown_kind_is_refused():
    model = copy.deepcopy(hugging_face("qwen3"))

    class Scaled(torch.nn.Module):
        def forward(self, x):
            return x / (1 + x.abs().mean(-1, keepdim=True))

    Scaled.__module__ = "transformers.mine"
    model.model.layers[1].input_layernorm = Scaled()
    with pytest.raises(ModelError, match="norms of this model can't be frozen: the norm is a Scaled"):
        dfa.attribute(model, random_pairs(2), method="relp")


#: What is new among the methods, quick; each with what it ablates by
NEWER = [
    ("atp-star", "corrupt"),
    ("expected-gradients", "corrupt"),
    ("exact", "zero"),
    ("nap-ig-activations", "mean"),
    (Matryoshka(iterations=2), "corrupt"),
    (NodePruning(iterations=2), "mean"),
    (UniformGradientSampling(iterations=2), "corrupt"),
    ("nap", dfa.ablations.Optimal(steps=2)),
]


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt2", "phi3", "qwen3_moe"])
def test_the_newer_methods_on_families(family, monkeypatch):
    """A TransformerBridge and the Hugging Face model that it wraps give the same scores, none of them all zero."""
    plain_passes(monkeypatch)  # no trials: quicker
    models, pairs = (hugging_face(family), bridge(family)), random_pairs(2, 6, seed=4)
    nodes = dfa.NodeSet.heads_and_mlps(models[0])[["a0.h1", "m0", "a2.h3", "m2"]]
    for method, ablation in NEWER:
        scores = [
            dfa.attribute(model, pairs, nodes=nodes, method=method, ablation=ablation, steps=2).values
            for model in models
        ]
        assert scores[0].any(), method
        torch.testing.assert_close(*scores, atol=1e-4 * float(scores[0].abs().max()), rtol=1e-3)


def test_what_can_not_be(plain, any_model, pairs):
    _, direct = plain
    with pytest.raises(ModelError, match="hook_attn_scores"):
        dfa.attribute(direct, pairs, method="gim")
    attribute = unchecked(dfa.attribute)
    with pytest.raises(DfaError, match="released code, which has no 'relp'"):
        attribute(any_model, pairs, method="relp", mlp_gradient="input")
    within = dfa.NodeSet.from_points(any_model, {"blocks.1.ln2.hook_normalized": None})
    with pytest.raises(DfaError, match="is within one"):
        dfa.attribute(any_model, pairs, nodes=within, method="relp")
    assert not Rules().changes
    assert Rules(temperature=2.0).changes
