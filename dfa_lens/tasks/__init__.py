"""The tasks: prompt pairs for a tokenizer, by name.

The paper's six are in two collections: "offline" (:mod:`~dfa_lens.tasks.offline`: generated, no network, what the
shipped models know) and "mib" (:mod:`~dfa_lens.tasks.mib`: the benchmark's data sets). Twelve further ones are offline
tasks only (:mod:`~dfa_lens.tasks.more`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from dfa_lens.data import tokenization
from dfa_lens.data.pairs import LengthPolicy, PromptPairs
from dfa_lens.errors import TaskError, unknown
from dfa_lens.tasks import mib, more, offline
from dfa_lens.tasks.offline import Example, examples, stream

__all__ = [
    "FAMILIES",
    "SIBLINGS",
    "Example",
    "card",
    "coverage",
    "describe",
    "examples",
    "load",
    "names",
    "stream",
    "to_dataset",
]

Collection = Literal["offline", "mib"]
"""Where prompts come from: generated offline tasks, or MIB's data sets on the Hugging Face hub."""

Which = Literal["paper", "more", "all"]
"""The paper's six tasks, the further ones, or both."""

#: The task of the same kind that near-distribution transfer trains on.
SIBLINGS: dict[str, str] = {
    "addition": "subtraction",
    "subtraction": "addition",
    "arc-easy": "arc-challenge",
    "arc-challenge": "arc-easy",
    "greater-than": "less-than",
    "less-than": "greater-than",
    "capitals": "languages",
    "languages": "capitals",
    "calendar": "counting",
    "counting": "calendar",
}

#: The families of all tasks: relatives, of which none may teach where transfer is to be more than recognition.
FAMILIES: dict[str, str] = {name: task.family for name, task in offline.ALL.items()}

# Prompts that are looked at before a tokenizer is declared unfit.
_PATIENCE = 200


def names(which: Which = "paper") -> tuple[str, ...]:
    """The tasks' names.

    Parameters
    ----------
    which:
        "paper": the six of the paper, the default of studies and tables; "more": the further offline tasks; "all":
        both.

    Raises
    ------
    TaskError
        If ``which`` is something else.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.tasks.names()
    ('ioi', 'mcqa', 'addition', 'subtraction', 'arc-easy', 'arc-challenge')
    >>> dfa.tasks.names("more")[:4]
    ('greater-than', 'less-than', 'pronouns', 'docstring')
    >>> len({dfa.tasks.FAMILIES[name] for name in dfa.tasks.names("all")})
    12
    """
    if which not in get_args(Which):
        raise unknown("set of tasks", which, get_args(Which), TaskError)
    further = tuple(task.name for task in more.TASKS)
    return {"paper": tuple(offline.TASKS), "more": further, "all": (*offline.TASKS, *further)}[which]


def describe(name: str) -> str:
    """One line on what a task asks for.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.tasks.describe("ioi")[:40]
    'Indirect object identification: two name'
    """
    return offline.ALL.find(name).summary


def card(name: str) -> str:
    """A page on an offline task: what it tests, an example, counterfactuals, options, what it lacks beside MIB's.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.tasks.card("ioi").splitlines()[0]
    '# Indirect object identification (`ioi`)'
    """
    describe(name)
    return files("dfa_lens.tasks").joinpath("cards", f"{name}.md").read_text(encoding="utf-8")


def load(
    name: str,
    tokenizer: Any,
    *,
    split: str = "train",
    n: int | None = 64,
    seed: int = 0,
    collection: Collection = "offline",
    counterfactual: str | None = None,
    different_lengths: LengthPolicy = "drop",
    allow_fewer: bool = False,
    path: str | Path | None = None,
    control: bool = False,
    **options: Any,
) -> PromptPairs:
    """Prompt pairs of a task, made with a tokenizer.

    Parameters
    ----------
    name:
        One of ``names("all")``, see :func:`names`.
    tokenizer:
        A Hugging Face tokenizer: that of the model on which the pairs are to run (``model.tokenizer``).
    split:
        "train", "validation" or "test"; the offline splits never share a prompt.
    n:
        How many pairs, with distinct clean prompts; None: all that MIB's split has.
    seed:
        Which ones; the same seed gives the same pairs on every machine.
    collection:
        See :data:`Collection`. "mib" has the paper's six, and downloads the data set, unless ``path`` says where it is.
    counterfactual:
        How the corrupt prompt differs from the clean one; default: the task's first. Offline: see :func:`card`. MIB:
        any of the data set's counterfactuals ("…_counterfactual", or without that ending).
    different_lengths:
        What to do with pairs whose prompts have different numbers of tokens, see
        :data:`~dfa_lens.data.pairs.LengthPolicy`.
    allow_fewer:
        Take what there is when there are fewer than ``n``, instead of raising.
    path:
        A folder with MIB's data set, or with all six under the names that they have on the hub ("ioi",
        "copycolors_mcqa", "arithmetic_addition", …).
    control:
        Random answers instead of the task's: see :meth:`~dfa_lens.data.pairs.PromptPairs.with_random_answers`.
    options:
        Offline: ``templates`` (numbers of those to use); for ioi ``distractors`` (0 to 3 sentences about others
        before the prompt); for the four-choice tasks ``n_choices`` (2 to 4); for the arithmetic tasks ``shots``
        (worked examples before the question, 0 to 8, default 1), ``max_number`` (10 to 99, default 99) and ``carry``
        (True or False: whether the ones carry or borrow). The shipped models were trained with the defaults.

    Returns
    -------
    PromptPairs
        Right padded. ``.dropped`` counts the prompts that were passed over, by reason: those that this tokenizer can't
        use, until ``n`` were found.

    Raises
    ------
    TaskError
        If a name is unknown, the data can't be read or lacks a column, or there are fewer than ``n`` usable prompts.
    PromptError
        If there is no tokenizer, or ``different_lengths="error"`` finds some.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> tokenizer = dfa.zoo.load("llama3-tiny-source").tokenizer
    >>> dfa.tasks.load("ioi", tokenizer, split="test", n=4)
    PromptPairs(4 pairs, 15 to 17 tokens)
    """
    if tokenizer is None:
        raise TaskError("The tokenizer is None: pass model.tokenizer, or the tokenizer that belongs to the model.")
    if n is not None and n < 1:
        raise TaskError(f"n must be at least 1, not {n}.")
    drawn = _draw(name, tokenizer, collection, split, seed, counterfactual, path, options)
    if n is None and collection == "offline":
        raise TaskError("The offline tasks have no end: say how many pairs, n=….")
    kept, dropped = _select(drawn, tokenizer, n, keep_lengths=different_lengths != "drop", first=collection == "mib")
    if not kept or (n is not None and len(kept) < n and not allow_fewer):
        raise _too_few(name, split, len(kept), n, dropped, collection)
    offered = [example.choices is not None and example.corrupt_choices is not None for example in kept]
    pairs = PromptPairs.from_strings(
        tokenizer,
        clean=[e.clean for e in kept],
        corrupt=[e.corrupt for e in kept],
        answer=[e.answer for e in kept],
        wrong=[e.wrong for e in kept],
        choices=[e.choices or () for e in kept] if all(offered) else None,
        corrupt_choices=[e.corrupt_choices or () for e in kept] if all(offered) else None,
        different_lengths=different_lengths,
        first_token=collection == "mib",
    )
    made = replace(pairs, dropped=dropped)
    return made.with_random_answers(seed) if control else made


def require(name: str, collection: str) -> None:
    """Raise a TaskError if there is no such collection, or no such task in it.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.tasks.require("ioi", "mib")
    """
    if collection not in get_args(Collection):
        raise unknown("collection", collection, get_args(Collection), TaskError)
    offline.ALL.find(name)
    if collection == "mib" and name not in mib.TASKS:
        has = ", ".join(map(repr, mib.TASKS))
        raise TaskError(f"MIB has no task {name!r}, which is an offline task only: MIB has {has}.")


def _draw(
    name: str,
    tokenizer: Any,
    collection: str,
    split: str,
    seed: int,
    counterfactual: str | None,
    path: str | Path | None,
    options: dict[str, Any],
) -> Iterator[Example | mib.Reason]:
    require(name, collection)
    if collection == "mib":
        if options:
            raise unknown(f"option for {name!r} of MIB", next(iter(options)), (), TaskError)
        return mib.rows(name, tokenizer, split=split, seed=seed, counterfactual=counterfactual, path=path)
    if path is not None:
        raise TaskError("The offline tasks are generated: path is for collection='mib'.")
    return offline.distinct(name, split=split, seed=seed, counterfactual=counterfactual, **options)


def _select(
    drawn: Iterator[Example | mib.Reason], tokenizer: Any, n: int | None, *, keep_lengths: bool, first: bool
) -> tuple[list[Example], dict[str, int]]:
    """The first ``n`` usable examples (None: all), and how many others were passed over for which reason."""
    kept: list[Example] = []
    dropped: dict[str, int] = {}
    seen: set[str] = set()

    def drop(reason: str) -> None:
        dropped[reason] = dropped.get(reason, 0) + 1

    while n is None or len(kept) < n:
        chunk = list(islice(drawn, 256 if n is None else n - len(kept)))
        if not chunk:
            break
        found = [item for item in chunk if isinstance(item, Example)]
        for reason in chunk:
            if isinstance(reason, str):
                drop(reason)
        columns = ([getattr(e, name) for e in found] for name in ("clean", "corrupt", "answer", "wrong"))
        misfits = tokenization.screen(tokenizer, *columns, first_token=first).misfits if found else []
        for example, misfit in zip(found, misfits, strict=True):
            if misfit and not (keep_lengths and misfit.reason == tokenization.DIFFERENT_LENGTHS):
                drop(misfit.reason)
            elif example.clean in seen:
                drop("repeated")
            else:
                seen.add(example.clean)
                kept.append(example)
        if not kept and sum(dropped.values()) >= _PATIENCE and n is not None and not first:
            break
    return kept, dropped


def _too_few(
    name: str, split: str, found: int, wanted: int | None, dropped: Mapping[str, int], collection: str
) -> TaskError:
    reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.items())
    if not found and reasons:
        needs = (
            "The offline tasks need a tokenizer that knows every word and has one token for each answer, like that of "
            "the shipped models that know the task"
            if collection == "offline"
            else "Other tokenizers may keep some"
        )
        return TaskError(
            f"None of {sum(dropped.values())} prompts of {name!r}, split {split!r}, can be used with this tokenizer "
            f"({reasons}). {needs}."
        )
    left_out = f" (left out: {reasons})" if reasons else ""
    return TaskError(
        f"task {name!r}, split {split!r} has only about {found} distinct prompts with these options{left_out}; "
        f"{wanted} were asked for. Ask for fewer, or pass allow_fewer=True."
    )


def to_dataset(
    name: str,
    *,
    split: str = "train",
    n: int = 64,
    seed: int = 0,
    counterfactual: str | None = None,
    **options: Any,
) -> Any:
    """An offline task as a ``datasets.Dataset``.

    The columns are those that :meth:`~dfa_lens.data.pairs.PromptPairs.from_dataset` takes (clean, corrupt, answer,
    wrong, and choices and corrupt_choices for the four-choice tasks), and template and key.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.tasks.to_dataset("ioi", n=3).column_names
    ['clean', 'corrupt', 'answer', 'wrong', 'template', 'key']
    """
    import datasets

    drawn = examples(name, split=split, n=n, seed=seed, counterfactual=counterfactual, **options)
    columns = ["clean", "corrupt", "answer", "wrong"]
    if drawn[0].choices is not None:
        columns += ["choices", "corrupt_choices"]
    columns += ["template", "key"]
    return datasets.Dataset.from_dict({column: [getattr(e, column) for e in drawn] for column in columns})


def coverage(
    tokenizers: Mapping[str, Any],
    *,
    tasks: Iterable[str] | None = None,
    split: str = "train",
    n: int | None = None,
    collection: Collection = "mib",
    path: str | Path | None = None,
) -> Any:
    """How many prompts of every task each tokenizer can use, and why not the others.

    Parameters
    ----------
    tokenizers:
        Name → tokenizer.
    tasks:
        Default: the paper's six.
    n:
        How many prompts to look at; None: the whole split (for the offline tasks, 1000).

    Returns
    -------
    pandas.DataFrame
        A row per task and tokenizer: ``kept``, ``dropped``, and a column per reason.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> tokenizer = dfa.zoo.load("llama3-tiny-source").tokenizer
    >>> dfa.tasks.coverage({"tiny": tokenizer}, tasks=["ioi"], n=8, collection="offline").shape[0]
    1
    """
    import pandas as pd

    table = []
    for name in tasks if tasks is not None else names():
        for label, tokenizer in tokenizers.items():
            drawn = _draw(name, tokenizer, collection, split, 0, None, path, {})
            limit = n if n is not None or collection == "mib" else 1000
            some = islice(drawn, limit)
            kept, dropped = _select(some, tokenizer, None, keep_lengths=False, first=collection == "mib")
            counts = {"kept": len(kept), "dropped": sum(dropped.values()), **dropped}
            table.append({"task": name, "tokenizer": label, **counts})
    frame = pd.DataFrame(table)
    counted = frame.columns.difference(["task", "tokenizer"], sort=False)
    frame[counted] = frame[counted].fillna(0).astype(int)
    return frame
