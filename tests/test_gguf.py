"""A GGUF file as it is downloaded: the model that Hugging Face's classes make of its numbers."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from helpers import random_pairs

import dfa_lens as dfa
from dfa_lens.errors import ModelError

PAIRS = random_pairs(3, 10, ragged=True)
#: Hugging Face's names and llama.cpp's
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_name(name):
    *path, last = name.split(".")
    if path[1:2] == ["layers"]:
        return f"blk.{path[2]}.{NAMES['.'.join(path[3:])]}.{last}"
    return f"{NAMES['.'.join(path)]}.{last}"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level one of a few tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["When Eva and Max went to the park, Max gave a book to Eva"] * 3, trainer)
    return made


def written(path, kind, form, tokenizer, leave_out=()):
    """A tiny random model's weights in a GGUF file; returned: the plain model of the numbers that the file holds."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    n_tokens, n_kv = tokenizer.get_vocab_size(), 2
    config, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": n_kv, "max_position_embeddings": 64, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = model_class(config(vocab_size=n_tokens, **sizes, **more)).eval()
    writer = gguf.GGUFWriter(path, kind)
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_block_count, 2),
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, n_kv),
        (writer.add_rope_dimension_count, 16),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_vocab_size, n_tokens),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "qwen2"),
        (writer.add_token_list, [tokenizer.id_to_token(i) for i in range(n_tokens)]),
        (writer.add_token_types, [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (n_tokens - 1)),
        (writer.add_token_merges, [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]),
        (writer.add_eos_token_id, 0),
    ):
        add(value)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.3)
        own = form if parameter.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = quantize(parameter.detach().numpy(), own)
        parameter.data = torch.from_numpy(dequantize(packed, own).copy())
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):  # llama.cpp turns neighbours, not halves
            heads = 4 if "q_proj" in name else n_kv
            packed = packed.reshape(heads, 2, -1, packed.shape[-1]).swapaxes(1, 2).reshape(packed.shape)
        if name not in leave_out:
            writer.add_tensor(llama_cpp_name(name), np.ascontiguousarray(packed), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


FORMS = gguf.GGMLQuantizationType


@pytest.mark.parametrize(("kind", "form"), [("llama", FORMS.Q8_0), ("qwen2", FORMS.Q4_0)])
def test_the_model_of_the_file_s_numbers(kind, form, tokenizer, tmp_path, capfd):
    """The model and its tokenizer, to the last bit, as Hugging Face's; and the one that TransformerLens makes of it."""
    path = tmp_path / "tiny.gguf"
    plain = written(path, kind, form, tokenizer)
    expected = dfa.attribute(plain, PAIRS, method="nap").values
    model = dfa.load_model(path, backend="transformers")
    assert capfd.readouterr() == ("", "")
    weights = dict(plain.named_parameters())
    assert all(torch.equal(weights[name], own) for name, own in model.original_model.named_parameters())
    assert torch.equal(dfa.attribute(model, PAIRS, method="nap").values, expected)
    assert model.cfg.model_name == "tiny.gguf"
    text = "When Max went to a park"
    assert model.tokenizer(text).input_ids == tokenizer.encode(text).ids
    lens = dfa.load_model(str(path), dtype=torch.float32)
    torch.testing.assert_close(dfa.attribute(lens, PAIRS, method="nap").values, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "mine.gguf is empty"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "mine.gguf is a Git LFS pointer"),
        (lambda content: b"<!DOCTYPE html>" * 90, "mine.gguf can't be read as a GGUF file: "),
        (lambda content: content[:200], "mine.gguf can't be read as a GGUF file: "),
        (lambda content: content[:-5000], "mine.gguf can't be"),
    ],
)
def test_a_damaged_file(damage, message, tokenizer, tmp_path):
    path = tmp_path / "mine.gguf"
    written(path, "llama", FORMS.F32, tokenizer)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=message):
        dfa.load_model(path)


def test_weights_that_the_file_lacks(tokenizer, tmp_path):
    path = tmp_path / "mine.gguf"
    written(path, "llama", FORMS.F32, tokenizer, leave_out={"model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(ModelError, match=r"1 weights are missing \(model.layers.1.mlp.up_proj.weight\)"):
        dfa.load_model(path)


def test_the_folder_of_a_file(tokenizer, tmp_path):
    written(tmp_path / "mine.gguf", "llama", FORMS.F32, tokenizer)
    with pytest.raises(ModelError, match=r"it has no config.json. Of its GGUF files, name one: .*mine.gguf"):
        dfa.load_model(tmp_path)


def test_without_the_package(tokenizer, tmp_path, monkeypatch):
    written(tmp_path / "mine.gguf", "llama", FORMS.F32, tokenizer)
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    with pytest.raises(ModelError, match="is a GGUF file, which needs a package more: pip install gguf"):
        dfa.load_model(tmp_path / "mine.gguf")
