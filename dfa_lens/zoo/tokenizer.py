"""The word-level tokenizer of the shipped models: one token for each word of the offline tasks."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from dfa_lens.tasks import more, offline, words, world
from dfa_lens.zoo.specs import Tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, BEGIN = "<|pad|>", "<|unknown|>", "<|begin_of_text|>"


def vocabulary(tasks: Tasks = "paper") -> list[str]:
    """Special tokens, then every word of the word lists and of the tasks' templates, in a fixed order."""
    known: dict[str, None]
    if tasks == "paper":
        lists = [world.LETTERS, world.NUMBERS, world.NAMES, world.PLACES, world.OBJECTS, world.COLORS, *world.ANIMALS]
        known = dict.fromkeys(word for group in lists for word in group)
        drawn_from = list(offline.TASKS.values())
    else:
        known = dict.fromkeys(words.all_words())
        drawn_from = list(more.TASKS)
    # The words of the templates are read off drawn examples: nothing to keep in step by hand.
    drawn: set[str] = set()
    for task in drawn_from:
        rng = random.Random(task.name)
        for _ in range(400):
            example = task.draw(rng, split=None, counterfactual=task.counterfactuals[0])
            drawn.update(re.findall(r"\w+|[^\w\s]+", example.clean + example.answer + example.wrong))
    known.update(dict.fromkeys(sorted(drawn)))
    return [PAD, UNKNOWN, BEGIN, *known]


def build(*, begin_of_text: bool, tasks: Tasks = "paper") -> PreTrainedTokenizerFast:
    """A fast tokenizer over :func:`vocabulary`.

    Parameters
    ----------
    begin_of_text:
        Whether every text starts with the begin-of-text token, as with Llama-3; Qwen-2.5 has none.
    tasks:
        Whose words it knows.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary(tasks))}
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
