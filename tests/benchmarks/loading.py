"""What loading a model takes in memory: its peak, as a multiple of the weights that the loaded model has.

    python tests/benchmarks/loading.py [--mib 365]

A checkpoint of random weights is saved in float32 and in bfloat16, and loaded in both on each backend, every time in a
process of its own that has loaded a tiny model before. The peak is that of the resident set, which also counts the parts of
the checkpoint's file that are mapped; "private" is without them, what the system can't drop when memory is short.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

import dfa_lens as dfa
from dfa_lens.models.loading import transformer_lens_major
from dfa_lens.zoo.tokenizer import build

DTYPES = ("float32", "bfloat16")
D_MODEL, D_MLP, D_VOCAB = 1024, 2816, 594
PER_LAYER = D_MODEL * (3 * D_MODEL + 3 * D_MLP)  # half as many key-value heads as heads


def save(folder: Path, dtype: str, mib: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=max(1, round(mib * 2**20 / 4 / PER_LAYER)),
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    build(begin_of_text=False).save_pretrained(folder)


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


def measure(folder: str, dtype: str, backend: str) -> None:
    """Load one model and print a row."""
    dfa.zoo.load("llama3-tiny-source", backend=backend)  # what the first model of a process takes anyway
    peak = Peak()
    model = dfa.load_model(folder, dtype=getattr(torch, dtype), backend=backend)
    found = peak.stop()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(
        f"| {dtype} | {weights / 2**20:.0f} MiB | {found['private'] / weights:.2f} | {found['resident'] / weights:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=365, help="size of the float32 checkpoint")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    print("| backend | stored in | loaded in | weights | private, peak | resident, peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as work:
        for stored in DTYPES:
            save(Path(work) / stored, stored, options.mib)
        for backend in ("hooked", "bridge") if transformer_lens_major() < 4 else ("bridge",):
            for stored in DTYPES:
                for dtype in DTYPES:
                    arguments = ["--measure", str(Path(work) / stored), dtype, backend]
                    done = subprocess.run(
                        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
                    )
                    print(f"| {backend} | {stored} {done.stdout.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
