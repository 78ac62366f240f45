"""Tiny random models of several architectures, in both of TransformerLens's classes."""

from __future__ import annotations

import copy
import warnings
from functools import cache
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
        model = bridge(family) if backend == "bridge" else _hooked(family)
    return model.to(dtype) if dtype != torch.float32 else model


#: What Hugging Face calls a family, and what its config says beside :data:`_SHAPE`. Windows are shorter than prompts, and
#: some heads are not d_model / heads wide.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3",
        {"head_dim": 12, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 1,
        },
    ),
}
#: Qwen-2 with experts is looked at for its shared expert only; the rest is as in Qwen 3.
PLAIN_FAMILIES = (*(family for family in _KINDS if family != "qwen2_moe"), "gpt2")


@cache
def hugging_face(family: str) -> Any:
    """A random model of Hugging Face's, as ``AutoModelForCausalLM.from_pretrained`` would make it."""
    import transformers

    torch.manual_seed(0)
    if family == "gpt2":
        shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
        config: Any = transformers.GPT2Config(**shape, initializer_range=0.3)
    else:
        kind, more = _KINDS[family]
        layers = len(more.get("layer_types", "abc"))
        name = "Gemma3TextConfig" if family == "gemma3" else f"{kind}Config"
        config = getattr(transformers, name)(**(_SHAPE | {"num_hidden_layers": layers} | more))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@cache
def bridge(family: str) -> Any:
    """The same model as a TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    from dfa_lens.zoo.tokenizer import build

    model = copy.deepcopy(hugging_face(family))
    model.set_attn_implementation("eager")
    # as they stand in a checkpoint's config
    model.config.architectures, model.config._name_or_path = [type(model).__name__], family
    made = TransformerBridge.boot_transformers(
        family, hf_model=model, tokenizer=build(begin_of_text=False), device="cpu", dtype=torch.float32
    )
    return made.eval()


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
