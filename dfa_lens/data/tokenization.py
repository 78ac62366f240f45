"""From text to tokens: which prompt pairs can be used with a tokenizer, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dfa_lens.errors import PromptError, short

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
    if not texts:
        return []  # tokenizers stumble over nothing
    return [list(row) for row in tokenizer(list(texts), add_special_tokens=special)["input_ids"]]


def texts(name: str, column: object) -> list[Any]:
    """A column as a list; a :class:`PromptError` if it is one text, or no column at all."""
    if isinstance(column, (str, bytes, Mapping)) or not isinstance(column, Iterable):
        raise PromptError(f"{name} must be a list of texts, one for each pair, not {short(repr(column))}.")
    return list(column)


def screen(
    tokenizer: Any,
    clean: Sequence[Any],
    corrupt: Sequence[Any],
    answer: Sequence[Any],
    wrong: Sequence[Any],
    *,
    first_token: bool = False,
) -> Screened:
    """Tokenize prompt pairs and find out which of them can be used.

    Parameters
    ----------
    clean, corrupt, answer, wrong:
        Columns of equal length; what is no text in them makes its pair a misfit.
    first_token:
        An answer of several tokens is welcome: its first token is taken.

    Raises
    ------
    PromptError
        If the tokenizer is none, or puts an end token behind every prompt.
    """
    columns = {"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": wrong}
    # an empty text stands for what is none, until that is said
    known = {name: ["" if _no_text(name, text) else text for text in column] for name, column in columns.items()}
    check_tokenizer(tokenizer, known["clean"])
    ids = {name: tokens(tokenizer, column, special=name in PROMPTS) for name, column in known.items()}
    misfits = []
    for i in range(len(clean)):
        one = {name: column[i] for name, column in columns.items()}
        no_text = next(filter(None, (_no_text(name, text) for name, text in one.items())), None)
        misfits.append(no_text or _misfit(tokenizer, {name: rows[i] for name, rows in ids.items()}, one, first_token))
    return Screened(ids, misfits)


def check_tokenizer(tokenizer: Any, prompts: Sequence[str]) -> None:
    """A :class:`PromptError` if the tokenizer is none, or ends prompts with a token of its own.

    The answer would then be read after that token, where the model predicts what follows the end of a text.
    """
    if tokenizer is None:
        raise PromptError("The tokenizer is None: pass model.tokenizer, or the tokenizer that belongs to the model.")
    if not callable(tokenizer):
        raise PromptError(f"The tokenizer is {short(repr(tokenizer))}, which can't be called: pass model.tokenizer.")
    prompt = next((text for text in prompts if text), None)
    if prompt is None:
        return
    plain, whole = (tokens(tokenizer, [prompt], special=special)[0] for special in (False, True))
    ends = {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "sep")} - {None}
    if whole and whole[-1] in ends and whole[-len(plain) :] != plain:
        raise PromptError(
            f"The tokenizer puts {tokenizer.decode([whole[-1]])!r} behind every prompt, so that answers would be read "
            "after the end of the text: set tokenizer.add_eos_token = False, or load it with add_eos_token=False."
        )


def _no_text(name: str, text: object) -> Misfit | None:
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            return Misfit(
                "not a text", f"{name} holds half a character that no tokenizer can read: {short(repr(text))}."
            )
        return None
    if text is None or (isinstance(text, float) and math.isnan(text)) or type(text).__name__ in ("NAType", "NaTType"):
        return Misfit("missing", f"{name} is missing ({text!r}).")
    return Misfit(
        "not a text",
        f"{name} is {short(repr(text))}, of type {type(text).__name__}, not a text: write numbers as the model would "
        'write them, like " 7".',
    )


def _misfit(tokenizer: Any, ids: Mapping[str, list[int]], texts: Mapping[str, str], first: bool) -> Misfit | None:
    unknown_id, begin = getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "bos_token_id", None)
    for name, row in ids.items():
        if unknown_id is not None and unknown_id in row:
            return Misfit(
                "unknown word",
                f"{name} has a word that the tokenizer does not know: {texts[name]!r}. The shipped models know only "
                "the words of the offline tasks.",
            )
        if not row:
            return Misfit("empty", f"{name} is empty: {texts[name]!r}.")
        if name in PROMPTS and begin is not None and row[:2] == [begin, begin]:
            return Misfit(
                "two begin tokens",
                f"{name} begins with {tokenizer.decode([begin])!r}, which the tokenizer adds by itself: leave it out "
                f"of the text ({short(repr(texts[name]))}).",
            )
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
