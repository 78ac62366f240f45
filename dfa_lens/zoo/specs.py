"""What the shipped models are: sizes, families, and the recipe that trained them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dfa_lens.errors import ModelError, unknown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODELS_DIR = Path(__file__).parent / "models"
CONTEXT = 256


@dataclass(frozen=True)
class ZooModel:
    """One shipped model. Every size is a number of the Hugging Face config."""

    name: str
    family: Literal["llama3", "qwen2.5"]
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    seed: int
    steps: int

    @property
    def n_nodes(self) -> int:
        """Attention heads and MLP blocks."""
        return self.n_layers * (self.n_heads + 1)

    @property
    def begin_of_text(self) -> bool:
        """Llama-3 starts every text with a token of its own, Qwen-2.5 does not."""
        return self.family == "llama3"

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies inside the package."""
        return MODELS_DIR / self.name

    def config(self, vocab_size: int, *, pad_token_id: int, bos_token_id: int | None) -> PretrainedConfig:
        """The Hugging Face config: a plain ``LlamaConfig`` or ``Qwen2Config`` of this size."""
        from transformers import LlamaConfig, Qwen2Config

        common = dict(
            vocab_size=vocab_size,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_key_value_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=None,
        )
        if self.family == "llama3":
            rope = dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
            return LlamaConfig(head_dim=self.d_head, rms_norm_eps=1e-5, rope_parameters=rope, **common)
        rope = dict(rope_type="default", rope_theta=10000.0)
        return Qwen2Config(rms_norm_eps=1e-6, rope_parameters=rope, **common)


SPECS: dict[str, ZooModel] = {
    spec.name: spec
    for spec in (
        ZooModel("llama3-tiny-source", "llama3", 6, 8, 4, d_model=128, d_head=16, d_mlp=256, seed=1, steps=10000),
        ZooModel("llama3-tiny-target", "llama3", 10, 10, 5, d_model=160, d_head=16, d_mlp=224, seed=2, steps=8000),
        ZooModel("qwen2.5-tiny-source", "qwen2.5", 7, 7, 1, d_model=112, d_head=16, d_mlp=256, seed=3, steps=10000),
        ZooModel("qwen2.5-tiny-target", "qwen2.5", 11, 9, 3, d_model=144, d_head=16, d_mlp=240, seed=4, steps=8000),
    )
}


def spec(name: str) -> ZooModel:
    """The shipped model called ``name``; an unknown name is an error that lists the known ones.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.zoo.spec("llama3-tiny-source").n_layers
    6
    """
    if name not in SPECS:
        raise unknown("shipped model", name, SPECS, ModelError)
    return SPECS[name]


@dataclass(frozen=True)
class Recipe:
    """How a shipped model is trained. The same for all four."""

    steps: int | None = None  #: default: the model's own number
    batch_size: int = 256
    learning_rate: float = 1.5e-3
    warmup_steps: int = 500
    weight_decay: float = 0.1
    pairs_per_task: int = 40_000
    language_modelling_weight: float = 0.1
