"""Any Llama or Qwen-2 checkpoint folder, on every backend, against Hugging Face's own logits."""

import json
from pathlib import Path

import pytest
import torch
from helpers import BACKENDS, random_model, random_pairs, state_of

import dfa_lens as dfa
from dfa_lens.errors import ModelError, PromptError
from dfa_lens.models import backend
from dfa_lens.models.loading import transformer_lens_major
from dfa_lens.models.runner import Runner, attention_mask
from dfa_lens.zoo.tokenizer import build

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
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
}


def checkpoint(folder: Path, kind: str, options: dict) -> Path:
    """A folder whose config.json says exactly what ``options`` say, in the style in which they say it."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    made = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    model = made[1](made[0](**(SIZES | options)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        written.pop(key, None)
    written |= {key: value for key, value in options.items() if key.startswith("rope")}
    (folder / "config.json").write_text(json.dumps(written))
    build(begin_of_text=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_hugging_face(name, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path, *CONFIGS[name])
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
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
    assert backend.is_bridge(model)
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
