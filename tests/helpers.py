"""Small models and prompt pairs that the tests share."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dfa_lens as dfa
from dfa_lens.models.loading import transformer_lens_major

BACKENDS = ("hooked", "bridge") if transformer_lens_major() < 4 else ("bridge",)


def random_model(backend: str = "auto", *, seed: int = 0, family: str = "llama", **sizes: Any) -> Any:
    """A small random Llama- or Qwen-shaped model that was saved and loaded like any checkpoint."""
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from dfa_lens.zoo.tokenizer import build

    common: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.3,  # large enough that nodes interact
    } | sizes
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**common))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero
                torch.nn.init.normal_(parameter, std=0.3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        build(begin_of_text=False).save_pretrained(folder)
        settings = Path(folder) / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        return dfa.load_model(folder, backend=backend)


def random_pairs(n: int = 6, width: int = 10, *, seed: int = 0, vocabulary: int = 101, ragged: bool = False) -> Any:
    """Prompt pairs that differ in some positions; with ``ragged``, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(1, vocabulary, (n, width), generator=generator)
    corrupt = clean.clone()
    lengths = torch.randint(width // 2, width + 1, (n,), generator=generator) if ragged else torch.full((n,), width)
    for i in range(n):
        for position in torch.randint(0, int(lengths[i]), (4,), generator=generator).tolist():
            corrupt[i, position] = corrupt[i, position] % (vocabulary - 1) + 1
        clean[i, lengths[i] :] = corrupt[i, lengths[i] :] = 0
    answer = torch.randint(1, vocabulary - 1, (n,), generator=generator)
    return dfa.PromptPairs(
        clean=clean, corrupt=corrupt, answer=answer, wrong=answer % (vocabulary - 1) + 1, lengths=lengths
    )


def made_curve(
    per_example: Any, clean: Any, corrupt: Any, sizes: list[int], n_nodes: int, **more: Any
) -> dfa.FaithfulnessCurve:
    """A curve made of numbers, [size, example] and [example]."""
    if "empty_values" in more:
        more["empty_values"] = np.asarray(more["empty_values"], dtype=float)
    return dfa.FaithfulnessCurve(
        fractions=np.asarray(sizes) / n_nodes,
        sizes=np.asarray(sizes),
        per_example=np.asarray(per_example, dtype=float),
        clean_values=np.asarray(clean, dtype=float),
        corrupt_values=np.asarray(corrupt, dtype=float),
        kl=np.zeros(len(sizes)),
        protocol="nodes",
        ranking="signed",
        n_nodes=n_nodes,
        **more,
    )


#: Of a made-up prompt; some would be markup, or break a line.
TOKENS = ("<bos>", " John", "\n", " gave")


def made_inspection(nodes: dfa.NodeSet, *, patterns: bool = True) -> dfa.Inspection:
    """What nodes do on a prompt, every number another."""
    from dfa_lens.data.inspection import TokenLogit

    n, heads, length = len(nodes), sum(node.kind == "head" for node in nodes), len(TOKENS)
    seen = torch.rand(heads, length, length, generator=torch.Generator().manual_seed(0)).tril()
    named = tuple((TokenLogit(f" <b>{i}", i, 1 + i / 10), TokenLogit("x", 99, 0.5)) for i in range(n))
    direct = torch.sin(torch.arange(n) * 1.0)
    pattern = seen / seen.sum(-1, keepdim=True) if patterns else None
    return dfa.Inspection(nodes, TOKENS, " Mary", " John", direct, named, named, pattern)


def float64_model(**options: Any) -> Any:
    """A random model that really computes in float64, for finite differences."""
    if "hooked" not in BACKENDS:
        pytest.skip("a bridge runs Hugging Face's norms, which compute in float32 whatever the weights are")
    return random_model("hooked", **options).to(torch.float64)


def state_of(model: Any) -> dict[str, Any]:
    """All that a run could leave behind in a model."""
    return {
        "hooks": {name: len(p.fwd_hooks) + len(p.bwd_hooks) for name, p in model.hook_dict.items()},
        "torch hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
            for m in model.modules()
        ),
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "dtype": [p.dtype for p in model.parameters()],
        "weights": sum(
            float(p.detach().double().sum())
            for p in model.parameters()
            if p.device.type != "meta" and type(p) is torch.nn.Parameter  # some quantised ones can't be summed
        ),
        "rng": torch.get_rng_state().tolist(),
        "strides": [p.stride() for p in model.parameters()],
        "forward": [name for name, m in model.named_modules() if "forward" in vars(m)],
        "grad enabled": torch.is_grad_enabled(),
    }


def plain_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No short cuts from here on: whole prompts through all blocks, all logits, weights as they lie."""
    from dfa_lens.models import runner

    monkeypatch.setattr(runner.Runner, "_verdict", lambda *args: runner.Verdict(False, "switched off"))
    monkeypatch.setattr(runner, "WORTH_LAYING_OUT", 10**9)


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function without the run-time type checks of the tests: what a user gets, who may misspell a literal."""
    return inspect.unwrap(function)


def unchecked_pairs(**columns: Any) -> dfa.PromptPairs:
    """``PromptPairs(**columns)`` without the run-time type checks of the tests."""
    made = object.__new__(dfa.PromptPairs)
    unchecked(dfa.PromptPairs.__init__)(made, **columns)
    return made


def byte_level_tokenizer(kind: str) -> Any:
    """A byte-level tokenizer with the habits of Llama-3 (up to three digits a token, a begin-of-text token) or of
    Qwen-2.5 (one digit a token, none), trained on the offline tasks' words and on numbers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    digits = r"\p{N}{1,3}" if kind == "llama" else r"\p{N}"
    pattern = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    begin = "<|begin_of_text|>"
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        special_tokens=[begin, "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # " Anneliese" stays several tokens: a name that is in no training text
    texts = [e.clean for task in dfa.tasks.names() for e in dfa.tasks.examples(task, n=400)]
    texts += [f"{i} {i}" for i in range(1000)]
    backend.train_from_iterator(texts, trainer)
    if kind == "llama":
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin if kind == "llama" else None,
        eos_token="<|end_of_text|>",
        pad_token="<|end_of_text|>",
    )


CHECKPOINT_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}


def checkpoint(folder: Path, kind: str = "llama", options: dict[str, Any] | None = None) -> Path:
    """A folder whose config.json says exactly what ``options`` say, in the style in which they say it."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from dfa_lens.zoo.tokenizer import build

    options = options or {}
    torch.manual_seed(0)
    made = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    model = made[1](made[0](**(CHECKPOINT_SIZES | options)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "rope_theta", "rope_scaling"):
        written.pop(key, None)
    written |= {key: value for key, value in options.items() if key.startswith("rope")}
    (folder / "config.json").write_text(json.dumps(written))
    build(begin_of_text=False).save_pretrained(folder)
    return folder
