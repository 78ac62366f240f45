"""What the shipped models are: sizes, families, and the recipe that trained them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dfa_lens.errors import ModelError, unknown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODELS_DIR = Path(__file__).parent / "models"
CONTEXT = 256

Tasks = Literal["paper", "more"]
"""The paper's six tasks, or the further ones."""


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
    tasks: Tasks = "paper"  #: what it was trained on

    @property
    def n_nodes(self) -> int:
        """Attention heads and MLP blocks."""
        return self.n_layers * (self.n_heads + 1)

    @property
    def begin_of_text(self) -> bool:
        """Llama-3 starts every text with a token of its own, Qwen-2.5 does not."""
        return self.family == "llama3"

    @property
    def recipe(self) -> Recipe:
        """How it was trained."""
        return RECIPES[self.tasks]

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
        ZooModel("llama3-more-source", "llama3", 6, 8, 2, 96, 12, d_mlp=96, seed=5, steps=14000, tasks="more"),
        ZooModel("llama3-more-target", "llama3", 8, 9, 3, 108, 12, d_mlp=108, seed=6, steps=13000, tasks="more"),
        ZooModel("qwen2.5-more-source", "qwen2.5", 6, 7, 1, 112, 16, d_mlp=128, seed=7, steps=14000, tasks="more"),
        ZooModel("qwen2.5-more-target", "qwen2.5", 9, 8, 2, 128, 16, d_mlp=144, seed=8, steps=13000, tasks="more"),
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
    """How a shipped model is trained: the same for all that know the same tasks."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """Each task's part of the training pool, in units of ``pairs_per_task``: what is hard gets more."""

    steps: int | None = None  #: default: the model's own number
    batch_size: int = 256
    learning_rate: float = 1.5e-3
    warmup_steps: int = 500
    weight_decay: float = 0.1
    pairs_per_task: int = 40_000
    language_modelling_weight: float = 0.1
    lessons: float = 0.0
    """Plainer texts beside the tasks, in the same units: facts of the six tasks' small world, or easier prompts."""


RECIPES: dict[Tasks, Recipe] = {
    "paper": Recipe(
        shares={"ioi": 0.5, "mcqa": 1.0, "addition": 1.5, "subtraction": 1.5, "arc-easy": 1.0, "arc-challenge": 1.5},
        lessons=1.0,
    ),
    "more": Recipe(
        shares={
            "greater-than": 2.0,
            "less-than": 2.0,
            "pronouns": 0.75,
            "docstring": 0.75,
            "capitals": 0.4,
            "languages": 0.4,
            "calendar": 0.3,
            "counting": 0.3,
            "colored-objects": 1.5,
            "antonyms": 1.0,
            "induction": 2.0,
            "agreement": 0.4,
        },
        lessons=1.5,
        learning_rate=2e-3,
        pairs_per_task=24_000,
    ),
}
