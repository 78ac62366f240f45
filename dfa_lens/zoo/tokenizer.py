"""The word-level tokenizer of the shipped models: one token for each word of the offline tasks."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from dfa_lens.tasks import offline, world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, BEGIN = "<|pad|>", "<|unknown|>", "<|begin_of_text|>"


def vocabulary() -> list[str]:
    """Special tokens, then every word of the world and of the tasks' templates, in a fixed order."""
    lists = [world.LETTERS, world.NUMBERS, world.NAMES, world.PLACES, world.OBJECTS, world.COLORS]
    words: dict[str, None] = dict.fromkeys(word for group in lists for word in group)
    for animal in world.ANIMALS:
        words.update(dict.fromkeys(animal))
    # The words of the templates are read off drawn examples: nothing to keep in step by hand.
    drawn: set[str] = set()
    for name, task in offline.TASKS.items():
        rng = random.Random(name)
        for _ in range(400):
            example = task.draw(rng, split=None, counterfactual=task.counterfactuals[0])
            drawn.update(re.findall(r"\w+|[^\w\s]+", example.clean))
    words.update(dict.fromkeys(sorted(drawn)))
    return [PAD, UNKNOWN, BEGIN, *words]


def build(*, begin_of_text: bool) -> PreTrainedTokenizerFast:
    """A fast tokenizer over :func:`vocabulary`.

    Parameters
    ----------
    begin_of_text:
        Whether every text starts with the begin-of-text token, as with Llama-3; Qwen-2.5 has none.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin_of_text:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNKNOWN,
        pad_token=PAD,
        bos_token=BEGIN if begin_of_text else None,
        padding_side="right",
        model_max_length=256,
    )
