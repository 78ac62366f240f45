"""The six tasks: prompt pairs for a tokenizer, by name."""

from __future__ import annotations

from typing import Any, Literal

from dfa_lens.errors import TaskError, unknown
from dfa_lens.prompts import PromptPairs
from dfa_lens.tasks import offline
from dfa_lens.tasks.offline import Example, examples, stream

__all__ = ["SIBLINGS", "Example", "describe", "examples", "load", "names", "stream"]

Collection = Literal["offline"]

#: The task of the same kind that near-distribution transfer trains on.
SIBLINGS: dict[str, str] = {
    "addition": "subtraction",
    "subtraction": "addition",
    "arc-easy": "arc-challenge",
    "arc-challenge": "arc-easy",
}


def names() -> tuple[str, ...]:
    """The tasks' names.

    >>> import dfa_lens as dfa
    >>> dfa.tasks.names()
    ('ioi', 'mcqa', 'addition', 'subtraction', 'arc-easy', 'arc-challenge')
    """
    return tuple(offline.TASKS)


def describe(name: str) -> str:
    """One line on what a task asks for."""
    if name not in offline.TASKS:
        raise unknown("task", name, offline.TASKS, TaskError)
    return offline.TASKS[name].summary


def load(
    name: str,
    tokenizer: Any,
    *,
    split: str = "train",
    n: int = 64,
    seed: int = 0,
    collection: Collection = "offline",
    counterfactual: str | None = None,
    **options: int,
) -> PromptPairs:
    """Prompt pairs of a task, made with a tokenizer.

    Parameters
    ----------
    name:
        One of :func:`names`.
    tokenizer:
        A Hugging Face tokenizer: that of the model on which the pairs are to run (``model.tokenizer``).
    split:
        "train", "validation" or "test"; splits never share a prompt.
    n:
        How many pairs, with distinct clean prompts.
    seed:
        Which ones; the same seed gives the same pairs on every machine.
    collection:
        "offline": the tasks that the shipped models know; no network.
    counterfactual:
        How the corrupt prompt differs from the clean one; default: the task's first
        (see ``dfa_lens.tasks.offline.TASKS``).
    options:
        For the arithmetic tasks: ``shots`` (worked examples before the question, 0 to 8, default 1) and
        ``max_number`` (10 to 99, default 99).

    Returns
    -------
    PromptPairs
        Right padded. With another tokenizer than that of the shipped models, pairs whose prompts differ in length
        are left out and counted in ``.dropped``.

    Raises
    ------
    TaskError
        If a name is unknown, or fewer than ``n`` prompts exist.
    PromptError
        If the tokenizer does not know a word, or needs several tokens for an answer.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> tokenizer = dfa.zoo.load("llama3-tiny-source").tokenizer
    >>> dfa.tasks.load("ioi", tokenizer, split="test", n=4)
    PromptPairs(4 pairs, 15 to 17 tokens)
    """
    if collection != "offline":
        raise unknown("collection", collection, ("offline",), TaskError)
    if tokenizer is None:
        raise TaskError("The tokenizer is None: pass model.tokenizer, or the tokenizer that belongs to the model.")
    drawn = examples(name, split=split, n=n, seed=seed, counterfactual=counterfactual, **options)
    return PromptPairs.from_strings(
        tokenizer,
        clean=[e.clean for e in drawn],
        corrupt=[e.corrupt for e in drawn],
        answer=[e.answer for e in drawn],
        wrong=[e.wrong for e in drawn],
    )
