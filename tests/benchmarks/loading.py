"""What loading a model takes in memory: its peak, as a multiple of the weights that the loaded model has.

    python tests/benchmarks/loading.py [--mib 365]
    python tests/benchmarks/loading.py --like-8b 16 --stored bfloat16 --loaded bfloat16 --work FOLDER

A checkpoint of random weights is saved in float32 and in bfloat16, and loaded in both on each backend, every time in a
process of its own that has loaded a tiny model before. The peak is that of the resident set, which also counts the parts of
the checkpoint's file that are mapped; "private" is without them, what the system can't drop when memory is short.

``--like-8b``: of the shape of Llama-3.1-8B (16 GB in bfloat16), with so many of its 32 layers, in a file a layer; all layers
have the same numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import dfa_lens as dfa
from dfa_lens.models.loading import transformer_lens_major
from dfa_lens.zoo.tokenizer import build

DTYPES = ("float32", "bfloat16")
BACKENDS = ("hooked", "bridge", "transformers") if transformer_lens_major() < 4 else ("bridge", "transformers")
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 594}
LIKE_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256}


def save(folder: Path, dtype: str, sizes: dict[str, int], *, shards: bool) -> None:
    """A Llama checkpoint, without ever holding more than a file of it."""
    from transformers import LlamaConfig

    more: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(**sizes, **more, max_position_embeddings=256, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    build(begin_of_text=False).save_pretrained(folder)
    torch.manual_seed(0)
    parts = weights(config, getattr(torch, dtype))
    if not shards:
        save_file({name: weight for part in parts for name, weight in part.items()}, folder / "model.safetensors")
        return
    places = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"model-{i:05}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(part, f"model-{i:05}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def weights(config: Any, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """What is not in a layer, and each layer."""
    d, wide, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    d_kv = d // config.num_attention_heads * config.num_key_value_heads
    numbers = (0.02 * torch.randn(2**20 + 7)).to(
        dtype
    )  # again and again: drawing billions takes longer than loading them
    made = lambda *shape: numbers.repeat(math.prod(shape) // len(numbers) + 1)[: math.prod(shape)].view(shape)  # noqa: E731
    one = torch.ones(d, dtype=dtype)
    yield {
        "model.embed_tokens.weight": made(vocabulary, d),
        "lm_head.weight": made(vocabulary, d),
        "model.norm.weight": one,
    }
    layer = {  # copied below, for a file holds no tensor twice
        "self_attn.q_proj": made(d, d),
        "self_attn.k_proj": made(d_kv, d),
        "self_attn.v_proj": made(d_kv, d),
        "self_attn.o_proj": made(d, d),
        "mlp.gate_proj": made(wide, d),
        "mlp.up_proj": made(wide, d),
        "mlp.down_proj": made(d, wide),
        "input_layernorm": one,
        "post_attention_layernorm": one,
    }
    for i in range(config.num_hidden_layers):
        yield {f"model.layers.{i}.{name}.weight": weight.clone() for name, weight in layer.items()}


def memory() -> dict[str, int]:
    """The resident set in bytes, and the part of it that is no file."""
    status = Path("/proc/self/status").read_text()
    return {
        what: 1024 * int(re.search(rf"{key}:\s+(\d+)", status).group(1))  # type: ignore[union-attr]
        for what, key in (("resident", "VmRSS"), ("private", "RssAnon"))
    }


class Peak(threading.Thread):
    """Look every millisecond, until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.most, self.done = memory(), memory(), threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.look()

    def look(self) -> None:
        self.most = {what: max(self.most[what], now) for what, now in memory().items()}

    def stop(self) -> dict[str, int]:
        self.done.set()
        self.join()
        self.look()
        return {what: self.most[what] - self.before[what] for what in self.most}


def measure(folder: str, dtype: str, backend: Any) -> str:
    """Load one model; the end of a row."""
    dfa.zoo.load("llama3-tiny-source", backend=backend)  # what the first model of a process takes anyway
    peak = Peak()
    model = dfa.load_model(folder, dtype=getattr(torch, dtype), backend=backend)
    found = peak.stop()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return f"{dtype} | {size / 2**20:.0f} MiB | {found['private'] / size:.2f} | {found['resident'] / size:.2f} |"


def in_a_process(function: Callable[..., str], *arguments: Any) -> str:
    """What a function returns in a process of its own, which need not import everything anew."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(function(*arguments)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=365, help="size of the float32 checkpoint")
    parser.add_argument("--quick", action="store_true", help="what is the same on all backends on one of them only")
    parser.add_argument("--like-8b", type=int, metavar="LAYERS")
    parser.add_argument("--stored", nargs="+", default=DTYPES)
    parser.add_argument("--loaded", nargs="+", default=DTYPES)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--work", help="where checkpoints are written, and deleted again")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    sizes = SMALL | {"num_key_value_heads": 8, "num_hidden_layers": options.like_8b or 1}
    if options.like_8b:
        sizes |= LIKE_8B
    else:
        d, wide = sizes["hidden_size"], sizes["intermediate_size"]
        sizes["num_hidden_layers"] = max(1, round(options.mib * 2**20 / 4 / (d * (3 * d + 3 * wide))))
    print("| backend | stored in | loaded in | weights | private, peak | resident, peak |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    dfa.zoo.load("llama3-tiny-source")  # imports
    for stored in options.stored:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            save(Path(work), stored, sizes, shards=bool(options.like_8b))
            for backend in options.backends:
                for dtype in options.loaded:
                    # files are read and converted in one place
                    if options.quick and backend != "transformers" and (stored, dtype) != ("bfloat16", "float32"):
                        continue
                    print(f"| {backend} | {stored} | {in_a_process(measure, work, dtype, backend)}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
