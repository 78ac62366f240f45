"""Hugging Face's models as they are: against hooks made by hand, against TransformerLens, and left as they were."""

import copy
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from attack import interrupts
from families import PLAIN_FAMILIES, bridge, hugging_face
from helpers import checkpoint, plain_passes, random_pairs
from transformers import AutoModelForCausalLM

import dfa_lens as dfa
from dfa_lens.errors import HookError, ModelError
from dfa_lens.models import private
from dfa_lens.models.backend import FAMILIES, Family, PlainModel
from dfa_lens.models.runner import Runner
from dfa_lens.zoo.tokenizer import build

#: By hand: the list of blocks, what heads write by, and what the MLP adds to the stream.
BY_HAND = dict.fromkeys(PLAIN_FAMILIES, ("model.layers", "self_attn.o_proj", "mlp")) | {
    "gpt2": ("transformer.h", "attn.c_proj", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp"),
    "gemma2": ("model.layers", "self_attn.o_proj", "post_feedforward_layernorm"),
    "gemma3": ("model.layers", "self_attn.o_proj", "post_feedforward_layernorm"),
    "olmo2": ("model.layers", "self_attn.o_proj", "post_feedforward_layernorm"),
}
PAIRS = random_pairs(3, 10, ragged=True)


def values(model, pairs, tokens, change=lambda name, now: now):
    """logit(answer) − logit(wrong) of every pair, under a change of what modules get or give."""
    blocks, output, mlp = BY_HAND[family_of(model)]
    handles = []
    for layer, block in enumerate(model.get_submodule(blocks)):
        z, m = block.get_submodule(output), block.get_submodule(mlp)
        handles.append(z.register_forward_pre_hook(lambda _, args, layer=layer: (change(f"a{layer}", args[0]),)))
        handles.append(m.register_forward_hook(lambda _, args, now, layer=layer: change(f"m{layer}", now)))
    mask = (torch.arange(tokens.shape[1]) < pairs.lengths[:, None]).long()
    logits = model(tokens, attention_mask=mask).logits[torch.arange(len(pairs)), pairs.lengths - 1]
    for handle in handles:
        handle.remove()
    rows = torch.arange(len(pairs))
    return logits[rows, pairs.answer] - logits[rows, pairs.wrong]


def family_of(model):
    return next(family for family in PLAIN_FAMILIES if model is hugging_face(family))


def recorded(model, pairs, tokens):
    found = {}

    def keep(name, now):
        found[name] = now.requires_grad_(True) if now.is_leaf else now
        found[name].retain_grad()
        return now

    with torch.enable_grad():
        metric = values(model, pairs, tokens, keep)
        metric.sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return found, metric.detach()


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_scores_against_hooks_made_by_hand(family, unchanged, monkeypatch):
    model = hugging_face(family)
    plain_passes(monkeypatch)  # no trials: quicker
    with unchanged(PlainModel(model)):
        nap = dfa.attribute(model, PAIRS, method="nap")
        chosen = nap.nodes[["a0.h1", "m0", "a2.h3", "m2"]]
        exact = dfa.attribute(model, PAIRS, nodes=chosen, method="exact")
    clean, metric = recorded(model, PAIRS, PAIRS.clean)
    corrupt, _ = recorded(model, PAIRS, PAIRS.corrupt)
    wanted = []
    for layer in range(len(PlainModel(model).blocks)):
        parts = {
            name: ((clean[name] - corrupt[name]) * clean[name].grad).detach() for name in (f"a{layer}", f"m{layer}")
        }
        wanted += parts[f"a{layer}"].unflatten(-1, (4, -1)).sum((0, 1, 3)).tolist()
        wanted.append(parts[f"m{layer}"].sum().item())
    torch.testing.assert_close(nap.values, torch.tensor(wanted) / len(PAIRS), atol=2e-4, rtol=2e-4)
    for node, score in zip(chosen, exact.values, strict=True):

        def change(name, now, node=node):
            if name != (f"a{node.layer}" if node.kind == "head" else node.name):
                return now
            if node.kind == "mlp":
                return corrupt[name].detach()
            heads = now.unflatten(-1, (4, -1)).clone()
            heads[:, :, node.index] = corrupt[name].detach().unflatten(-1, (4, -1))[:, :, node.index]
            return heads.flatten(2)

        with torch.no_grad():
            damage = metric - values(model, PAIRS, PAIRS.clean, change)
        torch.testing.assert_close(score, damage.mean(), atol=2e-4, rtol=2e-4)


def outcome(function, model):
    """What a function returns, or why it is refused."""
    try:
        return function(model)
    except ModelError as error:
        return str(error)


#: Whether edges can be scored, and nodes be measured: what the table in docs/models.md says.
CAPABLE = {
    row[0]: (row[1] == "yes", row[2] == "yes")
    for row in re.findall(
        r"^\| `(\w+)` \|[^|]*\| \w+ \| (yes|no)[^|]* \| (yes|no)",
        (Path(__file__).parents[1] / "docs" / "models.md").read_text(),
        re.M,
    )
}


def same(ours, theirs):
    assert (isinstance(ours, str), isinstance(theirs, str)) in ((True, True), (False, False))
    if not isinstance(ours, str):
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4, equal_nan=True)


#: Of each kind one; the others have the same names of modules, and are only slower to wrap.
BRIDGED = ("llama", "qwen3", "gemma3", "olmo2", "phi3", "gpt_neox", "mixtral", "gpt2")


@pytest.mark.parametrize("family", BRIDGED)
def test_the_same_numbers_as_the_bridge(family, monkeypatch):
    """Every hook point, scores, a curve, edges and measurements."""
    plain_passes(monkeypatch)  # no trials: quicker
    plain, other = hugging_face(family), bridge(family)
    names = [name for name in PlainModel(plain).hook_dict if not name.endswith(("resid_mid", "hook_experts"))]
    activations = []
    for model in (plain, other):
        found = {}
        taps = [(name, lambda now, name=name: found.__setitem__(name, now.detach().clone())) for name in names]
        runner = Runner(model)
        with torch.no_grad(), runner.session():
            found["logits"] = runner.run_as_told(PAIRS.clean, PAIRS.lengths, taps)
        activations.append(found)
    for name, activation in activations[0].items():
        # at padding, Hugging Face's kernels differ; nobody reads it
        shown = activation.transpose(1, 2) if name.endswith("hook_pattern") else activation
        theirs = activations[1][name]
        theirs = theirs.transpose(1, 2) if name.endswith("hook_pattern") else theirs
        real = torch.arange(10) < PAIRS.lengths[:, None]
        torch.testing.assert_close(shown[real], theirs[real], atol=2e-5, rtol=1e-4)
    scores = [dfa.attribute(model, PAIRS, method="nap-ig-inputs", steps=3) for model in (plain, other)]
    same(*scores)
    curves = [dfa.faithfulness_curve(model, PAIRS, scores[0], sizes=[0, 3, 9]) for model in (plain, other)]
    torch.testing.assert_close(*[torch.tensor(curve.per_example) for curve in curves], atol=1e-4, rtol=1e-4)
    edges = [outcome(lambda each: dfa.attribute_edges(each, PAIRS, method="eap"), model) for model in (plain, other)]
    same(*edges)
    measured = [outcome(lambda each: dfa.measure(each, PAIRS, groups=0), model) for model in (plain, other)]
    same(*measured)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_what_the_table_says(family, monkeypatch):
    plain_passes(monkeypatch)
    model = hugging_face(family)
    edges = outcome(lambda each: dfa.attribute_edges(each, PAIRS[:1], method="eap"), model)
    measured = outcome(lambda each: dfa.measure(each, PAIRS[:1], groups=0), model)
    assert CAPABLE[family] == (not isinstance(edges, str), not isinstance(measured, str))


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox", "phi3", "mixtral"])
def test_short_cuts_change_no_number(family, monkeypatch):
    model = hugging_face(family)
    pairs = random_pairs(2, 12)
    pairs = dfa.PromptPairs(  # what begins alike is run once
        clean=torch.cat([pairs.corrupt[:, :6], pairs.clean], 1),
        corrupt=torch.cat([pairs.corrupt[:, :6], pairs.corrupt], 1),
        answer=pairs.answer,
        wrong=pairs.wrong,
    )
    runner = Runner(model)
    assert all(runner.allows(short_cut, 18) for short_cut in ("answer", "unembedding", "prefix", "start"))
    short = dfa.attribute(model, pairs, method="nap-ig-activations", steps=2)
    plain_passes(monkeypatch)
    torch.testing.assert_close(
        short.values, dfa.attribute(model, pairs, method="nap-ig-activations", steps=2).values, atol=1e-4, rtol=1e-4
    )


def test_training_and_hooks_by_hand_on_the_model_itself():
    model = hugging_face("llama")
    scores = {"a": dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 3))}
    trained = [
        dfa.fit(each, scores, {"a": PAIRS}, steps=2, batch_size=3, seed=0).W for each in (model, bridge("llama"))
    ]
    torch.testing.assert_close(*trained, atol=1e-5, rtol=1e-4)
    nodes = dfa.NodeSet.heads_and_mlps(model)
    with torch.no_grad():
        with dfa.hooks.record(model, nodes) as corrupt:
            model(PAIRS.corrupt)
        with dfa.hooks.ablate(model, nodes, keep=[], corrupt=corrupt):
            gone = model(PAIRS.clean).logits
        # with every node from the corrupt run, only the embedding is clean: the same token gives the same logits
        with dfa.hooks.ablate(model, nodes, keep=list(nodes.names), corrupt=corrupt):
            whole = model(PAIRS.clean).logits
        torch.testing.assert_close(whole, model(PAIRS.clean).logits)
        assert (gone - whole).abs().max() > 0.1


# --- hook points -------------------------------------------------------------------------------------------------


def test_eager_attention_only_where_patterns_are_looked_at():
    model = copy.deepcopy(hugging_face("llama"))
    assert model.config._attn_implementation == "sdpa"
    seen = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(model.config._attn_implementation))
    runner = Runner(model)
    patterns = {}
    for name in ("attn.hook_z", "attn.hook_pattern"):
        with runner.attach([(f"blocks.0.{name}", lambda now, name=name: patterns.update({name: now}))]):
            runner.model(PAIRS.clean)
    assert seen == ["sdpa", "eager"] and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(patterns["attn.hook_pattern"].sum(-1), torch.ones(3, 4, 10))
    with pytest.raises(HookError, match="can only be looked at on this model"):
        dfa.NodeSet.from_points(model, {"blocks.0.attn.hook_pattern": 1})
    with pytest.raises(RuntimeError), private.eager_attention(model):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


def test_a_hook_point_of_ones_own_has_hugging_faces_path():
    model = hugging_face("llama")
    point = dfa.hooks.add_hook_point(model, "model.layers.1.mlp", "hook_mine")
    try:
        nodes = dfa.NodeSet.from_points(model, {point: None, "blocks.2.mlp.hook_post": 2})
        assert (len(nodes), nodes[0].layer) == (1 + 48, 1)
        own = dfa.attribute(model, PAIRS, nodes=nodes[:1], method="exact")
        mlp = dfa.attribute(model, PAIRS, nodes=dfa.NodeSet.heads_and_mlps(model)[["m1"]], method="exact")
        torch.testing.assert_close(own.values, mlp.values)
    finally:
        dfa.hooks.remove_hook_point(model, point)
    with pytest.raises(HookError, match="has no hook point"):
        dfa.attribute(model, PAIRS, nodes=nodes)


def test_the_model_is_left_as_it_was_after_an_error_and_by_a_thread(monkeypatch):
    model = interrupts.fresh("transformers")
    before = interrupts.state(model)
    runs = []

    def cut_short(*args, real=torch.nn.functional.linear, **kwargs):
        runs.append(1)
        if len(runs) == 40:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "linear", cut_short)
    with pytest.raises(KeyboardInterrupt):
        dfa.measure(model, random_pairs(2, 8))
    monkeypatch.undo()
    assert interrupts.state(model) == before and model.config._attn_implementation == "sdpa"
    # two threads on one model, which each sees under names of its own
    found = {}

    def score(name):
        found[name] = dfa.attribute(model.original_model, random_pairs(2, 8), method="exact").values

    threads = [threading.Thread(target=score, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found["a"], found["b"])
    assert interrupts.state(model) == before


# --- models that are in no table ---------------------------------------------------------------------------------


def unknown(family="llama"):
    """A model whose kind nobody knows."""
    model = copy.deepcopy(hugging_face(family))
    model.config.model_type = "mine"
    return model


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "olmo2", "gpt2", "phi3"])
def test_an_unknown_family_is_found_by_its_structure(family):
    found = dfa.attribute(unknown(family), PAIRS, method="nap").values
    torch.testing.assert_close(found, dfa.attribute(hugging_face(family), PAIRS, method="nap").values)


def test_what_only_looks_like_a_family_is_refused():
    model = unknown()
    layer = model.model.layers[1]
    original = layer.forward
    # a branch that is neither attention nor MLP
    layer.forward = lambda stream, **kwargs: original(stream, **kwargs) + 0.1 * stream.tanh()
    layer.forward.__module__ = "transformers.mine"  # as if it were the class's own
    with pytest.raises(
        ModelError, match=r"its structure is not what it looks like: .*block 1.*FAMILIES.register\('mine'"
    ):
        dfa.attribute(model, PAIRS)
    model = unknown()
    for block in model.model.layers:
        block.self_attn.out = block.self_attn.__dict__["_modules"].pop("o_proj")
    with pytest.raises(ModelError, match=r"has no 'o_proj'\). Say where they are: .*FAMILIES.register\('mine'"):
        dfa.NodeSet.heads_and_mlps(model)


def test_a_family_of_ones_own():
    model = unknown()
    for block in model.model.layers:
        block.feed = block.__dict__["_modules"].pop("mlp")
        block.mlp = lambda x, block=block: block.feed(x)
    FAMILIES.register("mine", Family(mlp="feed"))
    torch.testing.assert_close(dfa.attribute(model, PAIRS).values, dfa.attribute(hugging_face("llama"), PAIRS).values)


def test_attention_alone():
    model = unknown()
    for block in model.model.layers:
        del block.mlp

        def forward(stream, block=block, **kwargs):
            return stream + block.self_attn(hidden_states=block.input_layernorm(stream), **kwargs)[0]

        forward.__module__ = "transformers.mine"
        block.forward = forward
    scores = dfa.attribute(model, PAIRS, method="exact")
    assert len(scores) == 12 and all(node.kind == "head" for node in scores.nodes)
    curve = dfa.faithfulness_curve(model, PAIRS, scores, sizes=[0, 12])
    assert curve.faithfulness[-1] == pytest.approx(1)


def compiled():
    model = copy.deepcopy(hugging_face("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 deprecates what it imports itself
        model.model.layers[0].compile()
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "A Linear can't be hooked: pass a TransformerLens"),
        (lambda: hugging_face("llama").model, "has no unembedding: load it by transformers' AutoModelForCausalLM"),
        (compiled, "was compiled in place"),
        (lambda: Prompted(hugging_face("llama")), "puts learned tokens before every prompt"),
    ],
)
def test_what_is_refused(model, message):
    with pytest.raises(ModelError, match=message):
        dfa.NodeSet.heads_and_mlps(model())


# --- adapters and weights ----------------------------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """A PEFT model by its looks: the adapters are inside the model that it wraps."""

    def __init__(self, model, prompts=False):
        super().__init__()
        self.inside = model
        self.peft_config = {"default": type("Config", (), {"is_prompt_learning": prompts})()}

    def get_base_model(self):
        return self.inside


def Prompted(model):
    return Adapted(model, prompts=True)


class LowRank(torch.nn.Module):
    """A linear module with an adapter, as PEFT makes it: its ``weight`` is that of the base, and it has dropout."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.A, self.B = (
            torch.nn.Parameter(torch.randn(*size) * 0.3) for size in ((2, self.in_features), (self.out_features, 2))
        )
        self.bias = base.bias

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + torch.nn.functional.dropout(x, 0.5, self.training) @ self.A.T @ self.B.T


class Quantised(torch.nn.Module):
    """A linear module whose weights are eight-bit integers, which have no gradient."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, None
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((base.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def exchanged(make, merge):
    """A model with other linear modules, and the plain model that computes the same."""
    torch.manual_seed(0)
    model, plain = copy.deepcopy(hugging_face("llama")), copy.deepcopy(hugging_face("llama"))
    for block, other in zip(model.model.layers, plain.model.layers, strict=True):
        for part, name in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "down_proj")):
            module = make(block.get_submodule(part).get_submodule(name))
            setattr(block.get_submodule(part), name, module)
            other.get_submodule(part).get_submodule(name).weight.data = merge(module).detach()
    model.lm_head = make(model.lm_head)
    plain.lm_head.weight = torch.nn.Parameter(merge(model.lm_head).detach())  # no longer that of the embedding
    return model, plain


@pytest.mark.parametrize(
    ("make", "merge"),
    [
        (LowRank, lambda module: module.weight + module.B @ module.A),
        (Quantised, lambda module: module.weight * module.scale),
    ],
)
def test_adapters_and_quantised_weights_are_run_as_they_are(make, merge, unchanged):
    model, plain = exchanged(make, merge)
    dtypes = [parameter.dtype for parameter in model.parameters()]
    model.train()  # as PEFT hands a model out
    with unchanged(PlainModel(model)):
        for function in (
            lambda each: dfa.attribute(each, PAIRS, method="nap-ig-activations", steps=2),
            lambda each: dfa.attribute_edges(each, PAIRS, method="eap"),
            lambda each: dfa.measure(each, PAIRS, names=["direct-effect", "entropy"], groups=0),
        ):
            same(function(Adapted(model) if make is LowRank else model), function(plain))
    assert dtypes == [parameter.dtype for parameter in model.parameters()]


def test_an_adapter_that_comes_later_is_seen():
    model = copy.deepcopy(hugging_face("llama"))
    before = dfa.attribute(model, PAIRS).values
    attention = model.model.layers[1].self_attn
    attention.o_proj = LowRank(attention.o_proj)
    after = dfa.attribute(model, PAIRS).values
    assert not torch.allclose(before, after)
    attention.o_proj.A.data.zero_()
    torch.testing.assert_close(dfa.attribute(model, PAIRS).values, before)


def test_a_compiled_model_is_run_as_it_was():
    model = hugging_face("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        wrapped = torch.compile(model)
    assert torch.equal(dfa.attribute(wrapped, PAIRS).values, dfa.attribute(model, PAIRS).values)


# --- loading -----------------------------------------------------------------------------------------------------


def test_loading(tmp_path):
    """In shards, in another dtype, spread by accelerate: the same model, and the kernel that transformers takes."""
    folder = checkpoint(tmp_path / "whole")
    model = dfa.load_model(folder, backend="transformers")
    assert (model.cfg.model_name, model.config._attn_implementation) == ("whole", "sdpa")
    assert model.tokenizer("x") is not None
    wanted = dfa.attribute(dfa.load_model(folder, backend="bridge"), PAIRS).values
    torch.testing.assert_close(dfa.attribute(model, PAIRS).values, wanted, atol=1e-5, rtol=1e-4)
    model.original_model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.tokenizer.save_pretrained(tmp_path / "shards")
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    places = dict.fromkeys(names, "disk") | {"model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    spread = {"device_map": places, "offload_folder": tmp_path / "offload"}
    for options in ({}, spread):
        again = dfa.load_model(tmp_path / "shards", backend="transformers", **options)
        torch.testing.assert_close(dfa.attribute(again, PAIRS).values, wanted, atol=1e-5, rtol=1e-4)
    half = dfa.load_model(folder, backend="transformers", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="n_devices is for HookedTransformer"):
        dfa.load_model(folder, backend="transformers", n_devices=2)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe"])
def test_a_file_in_bfloat16_is_read_in_float32_as_transformers_does(family, tmp_path):
    """What a model computes for itself (the scale of embeddings) is not rounded as the file's weights are."""
    copy.deepcopy(hugging_face(family)).to(torch.bfloat16).save_pretrained(tmp_path)
    build(begin_of_text=False).save_pretrained(tmp_path)
    ours = dfa.load_model(tmp_path, backend="transformers").original_model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for found, expected in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert found[0] == expected[0] and found[1].dtype == expected[1].dtype
        torch.testing.assert_close(found[1], expected[1], atol=0, rtol=0, msg=found[0])
    with torch.no_grad():
        assert torch.equal(ours(PAIRS.clean).logits, theirs(PAIRS.clean).logits)


def test_loading_another_family(tmp_path):
    """What no HookedTransformer is made of is a bridge by default."""
    hugging_face("olmo2").save_pretrained(tmp_path)
    build(begin_of_text=False).save_pretrained(tmp_path)
    model = dfa.load_model(tmp_path, backend="transformers")
    torch.testing.assert_close(dfa.attribute(model, PAIRS).values, dfa.attribute(hugging_face("olmo2"), PAIRS).values)
    assert type(dfa.load_model(tmp_path)).__name__ == "TransformerBridge"
    with pytest.raises(ModelError, match="HookedTransformer"):
        dfa.load_model(tmp_path, backend="hooked")
