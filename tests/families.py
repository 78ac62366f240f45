"""Tiny random models of several architectures, in both of TransformerLens's classes."""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers import random_model

VOCABULARY = 101
WINDOW = 6  #: of Mistral's and Gemma-2's sliding attention: shorter than the prompts

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

FAMILIES = ("llama", "qwen", "gpt2", "mistral", "gemma", "gemma2")
#: Gemma-2 caps its logits and norms behind attention: as a HookedTransformer it would be made by hand of nothing known
HOOKED_FAMILIES = ("llama", "qwen", "gpt2", "mistral", "gemma")


@cache
def family_model(family: str, backend: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a family; the weights of one family and backend are the same in every dtype, but for rounding."""
    if family in ("llama", "qwen"):
        model = random_model(backend, family=family)
    else:
        model = _bridge(family) if backend == "bridge" else _hooked(family)
    return model.to(dtype) if dtype != torch.float32 else model


def _bridge(family: str) -> Any:
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    config: Any
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    elif family == "mistral":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**_SHAPE, sliding_window=WINDOW))
    elif family == "gemma":
        model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**_SHAPE, head_dim=8))
    else:
        config = transformers.Gemma2Config(**_SHAPE, head_dim=8, sliding_window=WINDOW)
        model = transformers.Gemma2ForCausalLM(config)
    from dfa_lens.zoo.tokenizer import build

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        build(begin_of_text=False).save_pretrained(folder)
        settings = Path(folder) / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    return bridge.eval()


def _hooked(family: str) -> Any:
    """Made of the configuration alone: the weights are random, as TransformerLens starts them."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    rotary = {"positional_embedding_type": "rotary", "rotary_dim": 8, "rotary_adjacent_pairs": False}
    gated = {"normalization_type": "RMS", "final_rms": True, "gated_mlp": True, **rotary}
    own: dict[str, Any] = {
        "gpt2": {"normalization_type": "LN", "act_fn": "gelu_new", "attn_only": False},
        "mistral": {
            **gated,
            "act_fn": "silu",
            "n_key_value_heads": 2,
            "use_local_attn": True,
            "window_size": WINDOW,
            "attn_types": ["local"] * 3,
        },
        "gemma": {**gated, "act_fn": "gelu_new", "n_key_value_heads": 2},
    }[family]
    config = HookedTransformerConfig(
        **own,
        model_name=family,
        n_layers=3,
        d_model=32,
        n_heads=4,
        d_head=8,
        d_mlp=48,
        d_vocab=VOCABULARY,
        n_ctx=64,
        seed=0,
        initializer_range=0.3,
        device="cpu",
        init_weights=True,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        return HookedTransformer(config, move_to_device=False).eval()
