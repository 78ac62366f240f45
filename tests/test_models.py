"""Any Llama or Qwen-2 checkpoint folder, on every backend, against Hugging Face's own logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BACKENDS, checkpoint, random_model, random_pairs, state_of

import dfa_lens as dfa
from dfa_lens.errors import ModelError, PromptError
from dfa_lens.models import loading
from dfa_lens.models.backend import is_bridge
from dfa_lens.models.loading import transformer_lens_major
from dfa_lens.models.passes import attention_mask
from dfa_lens.models.runner import Runner
from dfa_lens.zoo.tokenizer import build

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "llama, untied": ("llama", {"tie_word_embeddings": False, "rope_theta": 500.0}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "rope_theta": 500.0}),
    "llama, no grouping": ("llama", {"num_key_value_heads": 6, "rope_theta": 500.0}),
    "llama, wide heads": ("llama", {"head_dim": 16, "rope_theta": 500.0}),
    "llama, rope_scaling": ("llama", {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING}),
    "llama, rope_parameters": ("llama", {"rope_parameters": {"rope_theta": 500.0} | LLAMA3_SCALING}),
    "qwen, untied": ("qwen2", {"tie_word_embeddings": False, "rope_theta": 700.0}),
    "qwen, tied": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    ),
    "qwen, no grouping": ("qwen2", {"num_key_value_heads": 6, "rope_theta": 700.0}),
    "llama, attention_bias": ("llama", {"attention_bias": True}),
    "llama, attention_bias, no grouping": ("llama", {"attention_bias": True, "num_key_value_heads": 6}),
    "llama, gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama, large eps": ("llama", {"rms_norm_eps": 0.1}),
    "qwen, a window that no prompt fills": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0},
    ),
}
# What HookedTransformer has no place for; a bridge runs Hugging Face's own modules.
WINDOW = {"use_sliding_window": True, "sliding_window": 20}
FOR_A_BRIDGE = {
    "mlp_bias": ("llama", {"mlp_bias": True}, r"biases inside its MLPs \(mlp_bias\)"),
    "window in all layers": ("qwen2", WINDOW | {"max_window_layers": 0}, "a sliding window of 20 tokens"),
    "window in the last layer": ("qwen2", WINDOW | {"max_window_layers": 1}, "a sliding window of 20 tokens"),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "scaled by 'linear'"),
    "yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        "scaled by 'yarn'",
    ),
}
only_hooked = pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer is gone in TransformerLens 4")


def logits(model, n_tokens=60):
    tokens = torch.randint(1, 101, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(tokens, attention_mask=torch.ones_like(tokens))
    return getattr(found, "logits", found)[0]


def hugging_face(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_hugging_face(name, tmp_path):
    folder = checkpoint(tmp_path, *CONFIGS[name])
    hf = hugging_face(folder)
    pairs = random_pairs(4, 60, ragged=True)  # beyond the original context of the scaled ones
    mask = attention_mask(pairs.lengths, 60)
    with torch.no_grad():
        expected = hf(input_ids=pairs.clean, attention_mask=mask).logits[torch.arange(4), pairs.lengths - 1]
        for backend in BACKENDS:
            model = dfa.load_model(folder, backend=backend)
            found = Runner(model).run(pairs.clean, pairs.lengths)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("defined", [True, False])
def test_the_tokenizer_stays_the_checkpoint_s(backend, defined, tmp_path):
    """A begin-of-text token is defined in both; only the first tokenizer adds it. ``to_tokens`` agrees."""
    folder = checkpoint(tmp_path, "llama", {})
    tokenizer = build(begin_of_text=True)
    if not defined:  # as in SmolLM2: the token exists, and nothing adds it
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    model = dfa.load_model(folder, backend=backend)
    text = "The sum of 3 and 4 is"
    expected = tokenizer(text)["input_ids"]
    assert (expected[0] == tokenizer.bos_token_id) == defined
    assert model.tokenizer(text)["input_ids"] == expected
    assert model.to_tokens(text)[0].tolist() == expected
    pairs = dfa.PromptPairs.from_strings(model.tokenizer, [text], ["The sum of 3 and 5 is"], [" 7"], [" 8"])
    assert pairs.clean[0].tolist() == expected


def test_long_contexts_are_cut_for_hooked_transformers(tmp_path):
    """Its tables grow with the square of n_ctx; a prompt beyond it is refused before anything runs."""
    if "hooked" not in BACKENDS:
        pytest.skip("HookedTransformer is gone in TransformerLens 4")
    folder = checkpoint(tmp_path, "llama", {"max_position_embeddings": 131072})
    assert dfa.load_model(folder, backend="hooked").cfg.n_ctx == 2048
    model = dfa.load_model(folder, backend="hooked", n_ctx=8)
    with pytest.raises(PromptError, match="prompts of up to 10 tokens, but the model takes 8"):
        dfa.attribute(model, random_pairs(), method="nap")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(backend, dtype, tmp_path):
    model = dfa.load_model(checkpoint(tmp_path, "llama", {}), backend=backend, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    pairs = random_pairs()
    scores = dfa.attribute(model, pairs, method="nap")
    assert scores.values.dtype == torch.float32
    exact = dfa.load_model(tmp_path, backend=backend)
    expected = dfa.attribute(exact, pairs, method="nap").values
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-3
    assert (scores.values - expected).abs().max() < tolerance * expected.abs().max()
    source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
    assert dfa.fit(model, {"a": source}, {"a": pairs}, steps=2).W.dtype == torch.float32


# --- another model without a word --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOR_A_BRIDGE)
def test_what_only_a_bridge_can_represent(name, tmp_path):
    """Left out, each of these moves the logits by 0.3 to 1.4 of the largest."""
    kind, options, reason = FOR_A_BRIDGE[name]
    folder = checkpoint(tmp_path, kind, options)
    model = dfa.load_model(folder, backend="bridge")
    torch.testing.assert_close(logits(model), logits(hugging_face(folder)), atol=1e-4, rtol=1e-4)
    if "hooked" in BACKENDS:
        with pytest.raises(ModelError, match=f"has .*{reason}.*, which HookedTransformer can't: use backend='bridge'"):
            dfa.load_model(folder, backend="hooked")


@only_hooked
def test_a_window_makes_no_difference_to_shorter_prompts(tmp_path):
    folder = checkpoint(tmp_path, "qwen2", WINDOW | {"max_window_layers": 0})
    model = dfa.load_model(folder, backend="hooked", n_ctx=20)
    torch.testing.assert_close(logits(model, 20), logits(hugging_face(folder), 20), atol=1e-4, rtol=1e-4)


@only_hooked
def test_everything_that_is_missing_is_named_at_once(tmp_path):
    scaled = {"mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    with pytest.raises(ModelError, match="mlp_bias.* and a rotary embedding scaled by 'linear'"):
        dfa.load_model(checkpoint(tmp_path, "llama", scaled), backend="hooked")


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_that_attend_in_both_directions_are_refused(backend, tmp_path):
    """TransformerLens runs them as causal ones, a bridge too: off by 1.4 of the largest logit."""
    with pytest.raises(ModelError, match="attends in both directions"):
        dfa.load_model(checkpoint(tmp_path, "llama", {"is_causal": False}), backend=backend)


@only_hooked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lost", ["b_Q", "b_V", "b_O"])
def test_logits_are_compared_whatever_the_config_says(lost, dtype, tmp_path, monkeypatch):
    """A weight that does not arrive is noticed in half precision too."""
    folder = checkpoint(tmp_path, "llama", {"attention_bias": True, "num_key_value_heads": 6})
    dfa.load_model(folder, backend="hooked", dtype=dtype)
    whole = loading._hooked_weights

    def without(hf_model, cfg):
        return {name: weight for name, weight in whole(hf_model, cfg).items() if not name.endswith(lost)}

    monkeypatch.setattr(loading, "_hooked_weights", without)
    with pytest.raises(
        ModelError,
        match="As a HookedTransformer, .* is another model than .* logits are off by .* of their spread"
        r".* differs from a plain LlamaConfig in attention_bias=True.* Use backend='bridge'",
    ):
        dfa.load_model(folder, backend="hooked", dtype=dtype)


def test_logits_of_a_bridge_are_compared(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path)
    made = loading._bridge

    def other(*arguments):
        model = made(*arguments)
        list(model.parameters())[-3].data.mul_(2)
        return model

    monkeypatch.setattr(loading, "_bridge", other)
    with pytest.raises(ModelError, match="As a TransformerBridge, .* is another model.* This checkpoint can't be used"):
        dfa.load_model(folder, backend="bridge")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_a_deep_model_is_no_other_model(backend, dtype, tmp_path):
    folder = checkpoint(tmp_path, "llama", {"num_hidden_layers": 40})
    assert dfa.load_model(folder, backend=backend, dtype=dtype).cfg.n_layers == 40


@only_hooked
def test_weights_that_do_not_fit_into_a_hooked_transformer(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path)
    whole = loading._hooked_weights
    monkeypatch.setattr(loading, "_hooked_weights", lambda *given: whole(*given) | {"blocks.0.attn.b_X": torch.ones(1)})
    with pytest.raises(ModelError, match="no place for 'blocks.0.attn.b_X'"):
        dfa.load_model(folder, backend="hooked")
    monkeypatch.setattr(
        loading, "_hooked_weights", lambda *given: {k: v for k, v in whole(*given).items() if k != "ln_final.w"}
    )
    with pytest.raises(ModelError, match=r"expects a weight 'ln_final.w'"):
        dfa.load_model(folder, backend="hooked")


# --- what the caller has set, and what is left in memory ---------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "context",
    [torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta")],
    ids=["inference", "no-grad", "autocast", "meta"],
)
def test_loading_does_not_depend_on_where_it_is_done(backend, context, tmp_path):
    folder = checkpoint(tmp_path)
    with context:
        model = dfa.load_model(folder, backend=backend)
    pairs = random_pairs()
    expected = dfa.attribute(dfa.load_model(folder, backend=backend), pairs, method="nap")
    assert torch.equal(dfa.attribute(model, pairs, method="nap").values, expected.values)
    assert all(parameter.requires_grad for parameter in model.parameters())


@only_hooked
@pytest.mark.parametrize("tied", [True, False])
def test_a_hooked_transformer_holds_each_weight_once(tied, tmp_path):
    """Its parameters share no memory, so that changing one in place changes no other."""
    model = dfa.load_model(checkpoint(tmp_path, "llama", {"tie_word_embeddings": tied}), backend="hooked")
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    before = model.W_U.detach().clone()
    with torch.no_grad():
        model.W_E.zero_()
    assert torch.equal(model.W_U, before)
    assert torch.equal(hugging_face(tmp_path).lm_head.weight.T, before)  # nor does it change the file


@only_hooked
def test_weights_lie_as_passes_read_them(tmp_path):
    """HookedTransformer computes with ``W.T.contiguous()``, which copies a matrix that lies the other way."""
    model = dfa.load_model(checkpoint(tmp_path), backend="hooked")
    block = model.blocks[0]
    for weight in (block.mlp.W_in, block.mlp.W_gate, block.mlp.W_out, model.W_U):
        assert weight.T.is_contiguous()
    for weight, order in ((block.attn.W_Q, (0, 2, 1)), (block.attn._W_K, (0, 2, 1)), (block.attn.W_O, (2, 0, 1))):
        assert weight.permute(order).is_contiguous()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_converted_as_torch_does(stored, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path, "llama", {"tie_word_embeddings": True})
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=stored)
    weight = small.model.layers[1].mlp.down_proj.weight.detach().clone()
    embedding = small.model.embed_tokens.weight.detach().clone()
    small.save_pretrained(tmp_path / "stored")
    dfa_folder = tmp_path / "stored"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dfa_folder / name).write_bytes((folder / name).read_bytes())
    for backend in BACKENDS:
        model = dfa.load_model(dfa_folder, backend=backend, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.equal(model.blocks[1].mlp.W_out, weight.T.to(dtype))
        assert torch.equal(model.W_U, embedding.T.to(dtype))


@pytest.mark.slow
def test_loading_takes_little_more_memory_than_the_model():
    script = Path(__file__).parent / "benchmarks" / "loading.py"
    done = subprocess.run(
        [sys.executable, script, "--quick"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
    )
    rows = [line.split("|") for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 4 + len(BACKENDS)
    assert max(float(row[-2]) for row in rows) <= 1.15


# --- larger than one device --------------------------------------------------------------------------------------


def same_results(model, plain, pairs):
    """Scores, training, every cache, and curves are those of the model on one device; and it is left as it was."""
    before = state_of(model)
    scores, expected = dfa.attribute(model, pairs), dfa.attribute(plain, pairs)
    torch.testing.assert_close(scores.values, expected.values, atol=1e-5, rtol=1e-4)
    weights = dfa.fit(plain, {"a": expected}, {"a": pairs}, steps=3).W
    for cache in ("device", "cpu", "recompute"):
        found = dfa.fit(model, {"a": expected}, {"a": pairs}, steps=3, cache=cache).W
        torch.testing.assert_close(found, weights, atol=1e-4, rtol=1e-3)
    sizes = [0, 2, 7]
    curve = dfa.faithfulness_curve(model, pairs, expected, sizes=sizes)
    assert curve.cpr == pytest.approx(dfa.faithfulness_curve(plain, pairs, expected, sizes=sizes).cpr, abs=1e-5)
    assert state_of(model) == before


def test_device_map(tmp_path):
    folder = checkpoint(tmp_path, "llama", {})
    plain = dfa.load_model(folder, backend="bridge")
    model = dfa.load_model(folder, device_map={"": "cpu"})
    assert is_bridge(model)
    same_results(model, plain, random_pairs(ragged=True))


def test_offload_to_disk(tmp_path):
    folder = checkpoint(tmp_path / "model", "llama", {})
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1")
    places = {"device_map": dict.fromkeys(names, "cpu") | {"model.layers.0": "disk"}}
    places["offload_folder"] = tmp_path / "offload"
    if transformer_lens_major() < 4:
        with pytest.raises(ModelError, match="can't be placed so"):
            dfa.load_model(folder, **places)
        return
    model = dfa.load_model(folder, **places)
    assert any(p.device.type == "meta" for p in model.parameters())
    same_results(model, dfa.load_model(folder, backend="bridge"), random_pairs(ragged=True))


def test_a_model_of_which_even_the_embedding_is_offloaded(tmp_path):
    if transformer_lens_major() < 4:
        pytest.skip("disk offload needs TransformerLens 4")
    folder = checkpoint(tmp_path / "model", "llama", {"tie_word_embeddings": False})
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head")
    places = dict.fromkeys(names, "disk") | {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = dfa.load_model(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert Runner(model).device == torch.device("cpu")
    same_results(model, dfa.load_model(folder, backend="bridge"), random_pairs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto", "device": "cpu"}, "Give device, or device_map and max_memory, not both"),
        ({"device_map": "auto", "backend": "hooked"}, "A HookedTransformer has no device map"),
        ({"n_devices": 2, "backend": "bridge"}, "n_devices is for HookedTransformer"),
    ],
)
def test_placements_that_do_not_exist(options, message, tmp_path):
    if options.get("backend") == "hooked" and transformer_lens_major() >= 4:
        message = "has no HookedTransformer any more"
    with pytest.raises(ModelError, match=message):
        dfa.load_model(checkpoint(tmp_path, "llama", {}), **options)


def test_more_devices_than_there_are(tmp_path):
    if "hooked" not in BACKENDS:
        pytest.skip("HookedTransformer is gone in TransformerLens 4")
    with pytest.raises(ModelError, match="n_devices=64, but there are"):
        dfa.load_model(checkpoint(tmp_path, "llama", {}), n_devices=64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend, tmp_path):
    folder = checkpoint(tmp_path, "llama", {})
    same_results(
        dfa.load_model(folder, backend=backend, device="cuda"),
        dfa.load_model(folder, backend=backend),
        random_pairs(ragged=True),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_and_the_cpu(tmp_path):
    if transformer_lens_major() < 4:
        pytest.skip("a GPU together with the CPU needs TransformerLens 4")
    folder = checkpoint(tmp_path, "llama", {})
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1")
    places = dict.fromkeys(names, 0) | {"model.layers.0": "cpu"}
    model = dfa.load_model(folder, device_map=places)
    same_results(model, dfa.load_model(folder, backend="bridge"), random_pairs(ragged=True))


# --- across families ---------------------------------------------------------------------------------------------


def test_from_llama_to_qwen_and_on(unchanged):
    """Each model has its own prompts of the same task; alignments compose."""
    source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("qwen2.5-tiny-source")
    tasks = ("ioi", "mcqa")
    scores, pairs = {}, {}
    for task in tasks:
        ours = dfa.tasks.load(task, source.tokenizer, n=16)
        pairs[task] = dfa.tasks.load(task, target.tokenizer, n=16)
        assert torch.equal(ours.lengths, pairs[task].lengths + 1)  # Llama's begin-of-text token
        scores[task] = dfa.attribute(source, ours, method="nap")
    with unchanged(target):
        first = dfa.fit(target, scores, pairs, steps=40, sparsity_weight=1.0)
    transferred = first.transfer(scores["ioi"])
    assert transferred.nodes == dfa.NodeSet.heads_and_mlps(target)
    test = dfa.tasks.load("ioi", target.tokenizer, split="test", n=16)
    found = dfa.faithfulness_curve(target, test, transferred).cpr
    chance = [
        dfa.faithfulness_curve(
            target, test, dfa.controls.random_w(first.source, first.target, seed=seed).transfer(scores["ioi"])
        ).cpr
        for seed in range(2)
    ]
    assert found > max(chance) + 0.1
    # and from there to a third model
    third = random_model("auto", num_hidden_layers=2)
    prompts = random_pairs()
    second = dfa.fit(third, {"ioi": transferred}, {"ioi": prompts}, steps=5, scaling="raw")
    both = second @ first
    torch.testing.assert_close(
        both.transfer(scores["ioi"]).values, second.transfer(first.transfer(scores["ioi"])).values
    )
