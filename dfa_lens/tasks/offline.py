"""The six offline tasks: small analogues of the MIB six that need no network.

Each task is a stream of :class:`Example`, drawn from a seeded generator. An example's ``key`` names what the
example is about and is the same for its clean and its corrupt prompt; the split is a hash of the key, so that no
split ever shares a prompt with another, not even a clean prompt of one with a corrupt prompt of the other.

These tasks keep the *roles* of the originals (which tokens must be moved, bound or looked up) and the same
default counterfactuals. They lack their natural language, their length and their open vocabulary; the two ARC
analogues ask about a fixed world of some sixty animals instead of school science, and whether a model puts the two
facts of ``arc-challenge`` together or has learned each combination by heart is not known.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from dfa_lens.data.registry import Registry
from dfa_lens.errors import TaskError, unknown
from dfa_lens.tasks import more, world
from dfa_lens.tasks.example import SPLITS, Example, OfflineTask, choose_template, split_of

# --- ioi -----------------------------------------------------------------------------------------------------

_IOI_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {object} to",
    "After {a} and {b} met at the {place}, {s} handed the {object} to",
    "While {a} and {b} were working at the {place}, {s} sent a {object} to",
    "{a} and {b} had lunch at the {place}. Later {s} offered the {object} to",
    "Yesterday {a} and {b} visited the {place}. There {s} showed a {object} to",
    "Friends {a} and {b} found a {object} at the {place}, and {s} gave it to",
    "The {place} was quiet when {a} and {b} came in with the {object}. Soon {s} passed it to",
    "Then {a} and {b} took the {object} from the {place}, and {s} wanted to sell it to",
)


def _ioi(
    rng: random.Random,
    *,
    split: str | None,
    counterfactual: str,
    templates: Sequence[int] | None = None,
    distractors: int = 0,
) -> Example:
    if not 0 <= distractors <= 3:
        raise TaskError(f"distractors must be between 0 and 3, not {distractors!r}.")
    indirect_object, subject = rng.sample(world.NAMES, 2)
    place, thing = rng.choice(world.PLACES), rng.choice(world.OBJECTS)
    template = choose_template(rng, len(_IOI_TEMPLATES), templates)
    first, second = (indirect_object, subject) if rng.random() < 0.5 else (subject, indirect_object)
    before = ""
    for _ in range(distractors):  # somebody else, who has nothing to do with it
        other = rng.choice([name for name in world.NAMES if name not in (indirect_object, subject)])
        before += f"Yesterday {other} visited the {rng.choice(world.PLACES)}. "
    fill = partial((before + _IOI_TEMPLATES[template]).format, place=place, object=thing)
    if counterfactual == "s2_io_flip":
        corrupt = fill(a=first, b=second, s=indirect_object)
    else:  # abc: three names that say nothing about who receives
        others = [name for name in rng.sample(world.NAMES, 5) if name not in (indirect_object, subject)]
        corrupt = fill(a=others[0], b=others[1], s=others[2])
    return Example(
        clean=fill(a=first, b=second, s=subject),
        corrupt=corrupt,
        answer=f" {indirect_object}",
        wrong=f" {subject}",
        key="|".join(["ioi", *sorted((indirect_object, subject)), place, thing]),
        template=template,
    )


# --- four-choice tasks: mcqa and the two arcs ------------------------------------------------------------------


class _Block(NamedTuple):
    """The lettered options as text, the right letter, all letters."""

    text: str
    answer: str
    choices: tuple[str, ...]


def _choices(rng: random.Random, counterfactual: str, options: list[str], right: str) -> tuple[_Block, _Block]:
    """The clean and the corrupt block for shuffled options."""
    n = len(options)
    clean_letters = list(world.LETTERS[:n])
    corrupt_options, corrupt_letters = options, clean_letters
    if counterfactual == "symbol":  # same options, letters that the clean prompt does not have
        corrupt_letters = rng.sample(world.LETTERS[n:], n)
    else:  # answer_position: same letters, the right option changes places with another
        here = options.index(right)
        there = rng.choice([i for i in range(n) if i != here])
        corrupt_options = list(options)
        corrupt_options[here], corrupt_options[there] = corrupt_options[there], corrupt_options[here]

    def block(letters: list[str], shown: list[str]) -> _Block:
        lines = [f"{letter}. {option}" for letter, option in zip(letters, shown, strict=True)]
        answers = tuple(f" {letter}" for letter in letters)
        return _Block("\n".join([*lines, "Answer:"]), answers[shown.index(right)], answers)

    return block(clean_letters, options), block(corrupt_letters, corrupt_options)


def _choice_example(
    rng: random.Random, counterfactual: str, name: str, stem: str, options: list[str], right: str, template: int
) -> Example:
    rng.shuffle(options)
    clean, corrupt = _choices(rng, counterfactual, options, right)
    return Example(
        clean=f"{stem}\n{clean.text}",
        corrupt=f"{stem}\n{corrupt.text}",
        answer=clean.answer,
        wrong=corrupt.answer,
        # the options as a set: a corrupt prompt may show them in another order
        key="|".join([name, stem, *sorted(options)]),
        template=template,
        choices=clean.choices,
        corrupt_choices=corrupt.choices,
    )


def _check_choices(n_choices: int) -> None:
    if not 2 <= n_choices <= 4:
        raise TaskError(f"n_choices must be between 2 and 4, not {n_choices!r}.")


_MCQA_TEMPLATES = (
    "Question: The {object} is {color}. What color is the {object}?",
    "The {object} on the table is {color}. Which color does the {object} have?",
    "Question: Someone found a {color} {object}. What is the color of the {object}?",
    "In the room is a {color} {object}. What color is the {object}?",
)


def _mcqa(
    rng: random.Random,
    *,
    split: str | None,
    counterfactual: str,
    templates: Sequence[int] | None = None,
    n_choices: int = 4,
) -> Example:
    _check_choices(n_choices)
    thing = rng.choice(world.OBJECTS)
    options = rng.sample(world.COLORS, n_choices)
    right = options[0]
    template = choose_template(rng, len(_MCQA_TEMPLATES), templates)
    stem = _MCQA_TEMPLATES[template].format(object=thing, color=right)
    return _choice_example(rng, counterfactual, "mcqa", stem, options, right, template)


def _about_an_animal(
    rng: random.Random,
    counterfactual: str,
    name: str,
    right: str,
    others: list[str],
    animal: world.Animal,
    questions: tuple[str, ...],
    templates: Sequence[int] | None,
    n_choices: int,
) -> Example:
    _check_choices(n_choices)
    options = [right, *rng.sample(others, n_choices - 1)]
    template = choose_template(rng, len(questions), templates)
    stem = "Question: " + questions[template].format(x=f"the {animal.name}")
    return _choice_example(rng, counterfactual, name, stem, options, right, template)


def _arc_easy(
    rng: random.Random,
    *,
    split: str | None,
    counterfactual: str,
    templates: Sequence[int] | None = None,
    n_choices: int = 4,
) -> Example:
    relation = rng.choice(list(world.QUESTIONS))
    animal = rng.choice(world.ANIMALS)
    right = getattr(animal, relation)
    others = [v for v in world.values(relation) if v != right]
    questions = world.QUESTIONS[relation]
    return _about_an_animal(rng, counterfactual, "arc-easy", right, others, animal, questions, templates, n_choices)


def _arc_challenge(
    rng: random.Random,
    *,
    split: str | None,
    counterfactual: str,
    templates: Sequence[int] | None = None,
    n_choices: int = 4,
) -> Example:
    relation, _ = hop = rng.choice(list(world.SECOND_HOP))
    table = world.SECOND_HOP[hop]
    animal = rng.choice(world.ANIMALS)
    right = table[getattr(animal, relation)]
    others = sorted({v for v in table.values() if v != right})
    questions = world.SECOND_HOP_QUESTIONS[hop]
    return _about_an_animal(
        rng, counterfactual, "arc-challenge", right, others, animal, questions, templates, n_choices
    )


# --- arithmetic ----------------------------------------------------------------------------------------------

_ARITHMETIC_TEMPLATES = {
    "addition": (
        ("{a} + {b} =", " {c}", ", "),
        ("The sum of {a} and {b} is", " {c}", ". "),
        ("Question: What is {a} plus {b}?\nAnswer:", " {c}", "\n"),
    ),
    "subtraction": (
        ("{a} - {b} =", " {c}", ", "),
        ("The difference between {a} and {b} is", " {c}", ". "),
        ("Question: What is {a} minus {b}?\nAnswer:", " {c}", "\n"),
    ),
}


def _carries(operation: str, a: int, b: int) -> bool:
    """Whether the ones carry into the tens, or borrow from them."""
    return a % 10 + b % 10 > 9 if operation == "addition" else a % 10 < b % 10


def _operands(
    rng: random.Random, operation: str, split: str | None, max_number: int, carry: bool | None = None
) -> tuple[int, int, int]:
    """Operands and result, all between 0 and ``max_number``, the operand pair belonging to ``split``."""
    for _ in range(20_000):
        if operation == "addition":
            c = rng.randrange(2, max_number + 1)
            a = rng.randrange(1, c)
            triple = (a, c - a, c)
        else:
            a = rng.randrange(1, max_number + 1)
            b = rng.randrange(1, a + 1)
            triple = (a, b, a - b)
        if carry is not None and _carries(operation, triple[0], triple[1]) != carry:
            continue
        if split is None or split_of(f"{operation}|{triple[0]}|{triple[1]}") == split:
            return triple
    raise TaskError(f"The {split} split of {operation!r} has no operands up to {max_number}: take a larger max_number.")


def _arithmetic(
    rng: random.Random,
    *,
    split: str | None,
    counterfactual: str,
    operation: str,
    templates: Sequence[int] | None = None,
    shots: int = 1,
    max_number: int = 99,
    carry: bool | None = None,
) -> Example:
    if not 0 <= shots <= 8:
        raise TaskError(f"shots must be between 0 and 8, not {shots!r}.")
    if not 10 <= max_number <= 99:
        raise TaskError(f"max_number must be between 10 and 99, not {max_number!r}: results have one token each.")
    template = choose_template(rng, len(_ARITHMETIC_TEMPLATES[operation]), templates)
    question, result, separator = _ARITHMETIC_TEMPLATES[operation][template]
    # worked examples come from the training pairs in every split: no test sum is ever shown solved
    shown = ""
    for _ in range(shots):
        a, b, c = _operands(rng, operation, "train", max_number)
        shown += question.format(a=a, b=b) + result.format(c=c) + separator
    for attempt in range(2000):
        if attempt % 50 == 0:  # no counterpart for these operands: others
            a, b, c = _operands(rng, operation, split, max_number, carry)
        a2, b2, c2 = _operands(rng, operation, split, max_number, carry)
        fits = True
        if counterfactual == "operand1":  # the second operand stays; the new pair must belong to the split, too
            b2, c2 = b, a2 + b if operation == "addition" else a2 - b
            fits = 0 <= c2 <= max_number and (split is None or split_of(f"{operation}|{a2}|{b2}") == split)
            fits = fits and (carry is None or _carries(operation, a2, b2) == carry)
        if fits and c2 != c:
            break
    else:
        raise TaskError(f"No two {operation} problems of the {split} split differ as {counterfactual!r} asks for.")
    return Example(
        clean=shown + question.format(a=a, b=b),
        corrupt=shown + question.format(a=a2, b=b2),
        answer=f" {c}",
        wrong=f" {c2}",
        key=f"{operation}|{a}|{b}",
        template=template,
    )


TASKS: Registry[OfflineTask] = Registry(
    "task",
    TaskError,
    {
        task.name: task
        for task in (
            OfflineTask(
                "ioi",
                "names",
                "Indirect object identification: two names, one of them acts; the other one receives.",
                ("s2_io_flip", "abc"),
                _ioi,
                ("templates", "distractors"),
            ),
            OfflineTask(
                "mcqa",
                "choice",
                "Copy-colours: a stated colour has to be found among four lettered options.",
                ("symbol", "answer_position"),
                _mcqa,
                ("templates", "n_choices"),
            ),
            OfflineTask(
                "addition",
                "arithmetic",
                "Two-operand addition with one worked example; results up to 99, one token each.",
                ("random", "operand1"),
                partial(_arithmetic, operation="addition"),
                ("templates", "shots", "max_number", "carry"),
            ),
            OfflineTask(
                "subtraction",
                "arithmetic",
                "Two-operand subtraction with one worked example; results from 0, one token each.",
                ("random", "operand1"),
                partial(_arithmetic, operation="subtraction"),
                ("templates", "shots", "max_number", "carry"),
            ),
            OfflineTask(
                "arc-easy",
                "choice",
                "One fact of the small world, four lettered options.",
                ("symbol", "answer_position"),
                _arc_easy,
                ("templates", "n_choices"),
            ),
            OfflineTask(
                "arc-challenge",
                "choice",
                "Two facts of the small world in a row (an animal's home, then that home's colour), four "
                "lettered options.",
                ("symbol", "answer_position"),
                _arc_challenge,
                ("templates", "n_choices"),
            ),
        )
    },
)

#: The six and those of :mod:`~dfa_lens.tasks.more`: all that can be drawn by name.
ALL: Registry[OfflineTask] = Registry("task", TaskError, {**TASKS, **{task.name: task for task in more.TASKS}})


def stream(
    task: str, *, split: str = "train", seed: int = 0, counterfactual: str | None = None, **options: Any
) -> Iterator[Example]:
    """An endless, deterministic stream of examples of ``task`` in ``split``; prompts may repeat.

    The same (task, split, seed, counterfactual, options) give the same stream on every machine.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> next(dfa.tasks.stream("mcqa")).answer
    ' C'
    """
    known = ALL.find(task)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS, TaskError)
    counterfactual = counterfactual or known.counterfactuals[0]
    if counterfactual not in known.counterfactuals:
        raise unknown(f"counterfactual for {task!r}", counterfactual, known.counterfactuals, TaskError)
    for option in options:
        if option not in known.options:
            raise unknown(f"option for {task!r}", option, known.options, TaskError)
    rng = random.Random(f"{task}/{split}/{seed}/{counterfactual}")
    while True:
        example = known.draw(rng, split=split, counterfactual=counterfactual, **options)
        if split_of(example.key) == split:
            yield example


def distinct(
    task: str, *, split: str = "train", seed: int = 0, counterfactual: str | None = None, **options: Any
) -> Iterator[Example]:
    """The examples of :func:`stream` without those whose clean prompt has occurred.

    It ends when a thousand draws, and twenty for every prompt found, brought no new one.
    """
    seen: set[str] = set()
    misses = 0
    for example in stream(task, split=split, seed=seed, counterfactual=counterfactual, **options):
        if example.clean not in seen:
            seen.add(example.clean)
            misses = 0
            yield example
        elif (misses := misses + 1) > 1000 + 20 * len(seen):
            return


def examples(
    task: str,
    *,
    split: str = "train",
    n: int = 64,
    seed: int = 0,
    counterfactual: str | None = None,
    allow_fewer: bool = False,
    **options: Any,
) -> list[Example]:
    """The first ``n`` of :func:`distinct`.

    Raises
    ------
    TaskError
        If a name is unknown, ``n`` is not positive, or there are fewer than ``n`` and not ``allow_fewer``.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.tasks.examples("addition", n=1)[0].clean
    'The sum of 51 and 27 is 78. The sum of 11 and 69 is'
    """
    if n < 1:
        raise TaskError(f"n must be at least 1, not {n}.")
    found = list(islice(distinct(task, split=split, seed=seed, counterfactual=counterfactual, **options), n))
    if len(found) < n and not allow_fewer:
        raise TaskError(
            f"task {task!r}, split {split!r} has only about {len(found)} distinct prompts with these options; {n} were "
            "asked for. Ask for fewer, or pass allow_fewer=True."
        )
    return found
