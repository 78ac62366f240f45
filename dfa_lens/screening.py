"""From text to tokens: which prompt pairs can be used with a tokenizer, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dfa_lens.errors import PromptError

PROMPTS = ("clean", "corrupt")
DIFFERENT_LENGTHS = "different lengths"


class Misfit(NamedTuple):
    """Why a pair can't be used: a reason to count by, and what to tell."""

    reason: str
    message: str


class Screened(NamedTuple):
    """Token ids by column, and for every pair why it can't be used, or None."""

    ids: dict[str, list[list[int]]]
    misfits: list[Misfit | None]


def tokens(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """The token ids of every text; with ``special``, and what the tokenizer adds to a prompt by itself."""
    return [list(row) for row in tokenizer(list(texts), add_special_tokens=special)["input_ids"]]


def screen(
    tokenizer: Any,
    clean: Sequence[str],
    corrupt: Sequence[str],
    answer: Sequence[str],
    wrong: Sequence[str],
    *,
    first_token: bool = False,
) -> Screened:
    """Tokenize prompt pairs and find out which of them can be used.

    Parameters
    ----------
    first_token:
        An answer of several tokens is welcome: its first token is taken.

    Raises
    ------
    PromptError
        If the tokenizer is None.
    """
    if tokenizer is None:
        raise PromptError("The tokenizer is None: pass model.tokenizer, or the tokenizer that belongs to the model.")
    columns = {"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": wrong}
    ids = {name: tokens(tokenizer, texts, special=name in PROMPTS) for name, texts in columns.items()}
    misfits = [
        _misfit(
            tokenizer,
            {name: rows[i] for name, rows in ids.items()},
            {name: texts[i] for name, texts in columns.items()},
            first_token,
        )
        for i in range(len(clean))
    ]
    return Screened(ids, misfits)


def _misfit(tokenizer: Any, ids: Mapping[str, list[int]], texts: Mapping[str, str], first: bool) -> Misfit | None:
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    for name, row in ids.items():
        if unknown_id is not None and unknown_id in row:
            return Misfit(
                "unknown word",
                f"{name} has a word that the tokenizer does not know: {texts[name]!r}. The shipped models know only "
                "the words of the offline tasks.",
            )
        if not row:
            return Misfit("empty", f"{name} is empty: {texts[name]!r}.")
        if name not in PROMPTS and len(row) != 1 and not first:
            return Misfit(
                "answer of several tokens", f"{name} is {texts[name]!r}, which is {len(row)} tokens; one is needed."
            )
    if ids["answer"][0] == ids["wrong"][0]:
        return Misfit(
            "equal answers", f"answer {texts['answer']!r} and wrong answer {texts['wrong']!r} are the same token."
        )
    if ids["clean"] == ids["corrupt"]:
        return Misfit("equal prompts", f"clean and corrupt are the same tokens: {texts['clean']!r}.")
    if len(ids["clean"]) != len(ids["corrupt"]):
        return Misfit(
            DIFFERENT_LENGTHS,
            f"clean has {len(ids['clean'])} tokens, corrupt {len(ids['corrupt'])}: {texts['clean']!r}.",
        )
    return None
