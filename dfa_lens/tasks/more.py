"""Twelve further offline tasks of nine families: the small tasks on which circuits are known, for any tokenizer.

They have the protocol of the six (:mod:`~dfa_lens.tasks.offline`): a seeded stream of examples, a ``key`` that a
clean and its corrupt prompt share, splits by the key. Every field of a key stands in every template of its task, so
that a prompt has one key and no two splits share a prompt. What a task is *about* (facts, the order of numbers, how to
copy) has to be known; what a split holds back are the combinations of the words round it.

The words are ordinary ones and the facts are true: a pretrained model can be asked, too. With another tokenizer than
that of the shipped models, pairs whose answers have several tokens are passed over and counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from dfa_lens.tasks import words
from dfa_lens.tasks.example import Example, OfflineTask, choose_template

_PEOPLE = (*words.WOMEN, *words.MEN)


# --- comparison ----------------------------------------------------------------------------------------------

_COMPARISON_TEMPLATES = {
    "greater-than": (
        "{a} has {x} {object}s and {b} has {y} {object}s. The one with more {object}s is",
        "{a} sold {x} {object}s, {b} sold {y} {object}s. More {object}s were sold by",
        "There are {x} {object}s for {a} and {y} {object}s for {b}. The greater number is for",
    ),
    "less-than": (
        "{a} has {x} {object}s and {b} has {y} {object}s. The one with fewer {object}s is",
        "{a} sold {x} {object}s, {b} sold {y} {object}s. Fewer {object}s were sold by",
        "There are {x} {object}s for {a} and {y} {object}s for {b}. The smaller number is for",
    ),
}


def _comparison(
    rng: random.Random,
    *,
    split: str | None,
    counterfactual: str,
    name: str,
    templates: Sequence[int] | None = None,
) -> Example:
    people, numbers = rng.sample(_PEOPLE, 2), rng.sample(words.NUMBERS, 2)
    thing = rng.choice(words.OBJECTS)
    template = choose_template(rng, len(_COMPARISON_TEMPLATES[name]), templates)
    fill = partial(_COMPARISON_TEMPLATES[name][template].format, object=thing)
    (a, b), (x, y) = people, numbers
    # either the numbers change places, or the people do
    corrupt = fill(a=a, b=b, x=y, y=x) if counterfactual == "numbers" else fill(a=b, b=a, x=x, y=y)
    first = (int(x) > int(y)) == (name == "greater-than")
    return Example(
        clean=fill(a=a, b=b, x=x, y=y),
        corrupt=corrupt,
        answer=f" {a if first else b}",
        wrong=f" {b if first else a}",
        key="|".join([name, *sorted(people), *sorted(numbers), thing]),
        template=template,
    )


# --- gender --------------------------------------------------------------------------------------------------

_PRONOUN_TEMPLATES = (
    "At the {place} {name} looked for the {object} because",
    "{name} took the {object} to the {place} because",
    "{name} forgot the {object} at the {place}, didn't",
    "When {name} found the {object} at the {place},",
    "{name} saw a {object} at the {place} and said that",
)


def _pronouns(
    rng: random.Random, *, split: str | None, counterfactual: str, templates: Sequence[int] | None = None
) -> Example:
    place, thing = rng.choice(words.PLACES), rng.choice(words.OBJECTS)
    template = choose_template(rng, len(_PRONOUN_TEMPLATES), templates)
    fill = partial(_PRONOUN_TEMPLATES[template].format, place=place, object=thing)
    woman, man = fill(name=rng.choice(words.WOMEN)), fill(name=rng.choice(words.MEN))
    about_her = rng.random() < 0.5
    return Example(
        clean=woman if about_her else man,
        corrupt=man if about_her else woman,
        answer=" she" if about_her else " he",
        wrong=" he" if about_her else " she",
        key="|".join(["pronouns", place, thing]),
        template=template,
    )


# --- code ----------------------------------------------------------------------------------------------------

_DOCSTRING_TEMPLATES = (
    'def {function}({names}):\n    """\n    :param {p}: the {x}\n    :param {q}: the {y}\n    :param',
    'def {function}({names}):\n    """\n    :arg {p}: a {x}\n    :arg {q}: a {y}\n    :arg',
    "function {function}({names}):\n    @param {p} the {x}\n    @param {q} the {y}\n    @param",
)


def _docstring(
    rng: random.Random, *, split: str | None, counterfactual: str, templates: Sequence[int] | None = None
) -> Example:
    function = rng.choice(words.FUNCTIONS)
    arguments = rng.sample(words.ARGUMENTS, 4)
    template = choose_template(rng, len(_DOCSTRING_TEMPLATES), templates)
    described = dict(zip("xy", rng.sample(words.OBJECTS, 2), strict=True))
    fill = partial(_DOCSTRING_TEMPLATES[template].format, function=function, **described)
    a, b, c, d = arguments
    if counterfactual == "order":  # the last two arguments change places
        corrupt = fill(names=f"{a}, {b}, {d}, {c}", p=a, q=b)
    else:  # parameters: others are described
        corrupt = fill(names=f"{a}, {b}, {c}, {d}", p=b, q=c)
    return Example(
        clean=fill(names=f"{a}, {b}, {c}, {d}", p=a, q=b),
        corrupt=corrupt,
        answer=f" {c}",
        wrong=f" {d}",
        key="|".join(["docstring", function, *sorted(arguments), *described.values()]),
        template=template,
    )


# --- geography -----------------------------------------------------------------------------------------------

_GEOGRAPHY_TEMPLATES = {
    "capital": (
        "{name} bought a {object} in the capital of {country}, which is",
        "{name} took the {object} to the capital of {country}, the city of",
        "The {object} of {name} comes from the capital of {country}, called",
    ),
    "language": (
        "{name} bought a {object} in {country}, where people speak",
        "{name} lost the {object} in {country}, where the main language is",
        "The {object} of {name} comes from {country}, where they speak",
    ),
}


def _geography(
    rng: random.Random,
    *,
    split: str | None,
    counterfactual: str,
    fact: str,
    templates: Sequence[int] | None = None,
) -> Example:
    name, thing = rng.choice(_PEOPLE), rng.choice(words.OBJECTS)
    template = choose_template(rng, len(_GEOGRAPHY_TEMPLATES[fact]), templates)
    fill = partial(_GEOGRAPHY_TEMPLATES[fact][template].format, name=name, object=thing)
    here = rng.choice(words.COUNTRIES)
    there = rng.choice([each for each in words.COUNTRIES if getattr(each, fact) != getattr(here, fact)])
    return Example(
        clean=fill(country=here.name),
        corrupt=fill(country=there.name),
        answer=f" {getattr(here, fact)}",
        wrong=f" {getattr(there, fact)}",
        key="|".join([fact, name, thing]),
        template=template,
    )


# --- succession ----------------------------------------------------------------------------------------------

_SUCCESSION_TEMPLATES = (
    "At the {place} {name} wrote {items},",
    "{name} went to the {place} and said: {items},",
    "On the wall of the {place} {name} read: {items},",
)


def _succession(
    rng: random.Random,
    *,
    split: str | None,
    counterfactual: str,
    name: str,
    templates: Sequence[int] | None = None,
) -> Example:
    person, place = rng.choice(_PEOPLE), rng.choice(words.PLACES)
    template = choose_template(rng, len(_SUCCESSION_TEMPLATES), templates)
    if name == "calendar":  # both go round
        series = rng.choice((words.DAYS, words.MONTHS))
        starts = range(len(series))
    else:
        series = words.NUMBER_WORDS
        starts = range(len(series) - 3)
    first, second = rng.sample(starts, 2)

    def at(start: int) -> list[str]:
        return [series[(start + i) % len(series)] for i in range(4)]

    fill = partial(_SUCCESSION_TEMPLATES[template].format, place=place, name=person)
    return Example(
        clean=fill(items=", ".join(at(first)[:3])),
        corrupt=fill(items=", ".join(at(second)[:3])),
        answer=f" {at(first)[3]}",
        wrong=f" {at(second)[3]}",
        key="|".join([name, person, place]),
        template=template,
    )


# --- binding -------------------------------------------------------------------------------------------------

_BINDING_TEMPLATES = (
    "The {o[0]} is {c[0]}, the {o[1]} is {c[1]} and the {o[2]} is {c[2]}. The color of the {query} is",
    "On the table are a {c[0]} {o[0]}, a {c[1]} {o[1]} and a {c[2]} {o[2]}. The {query} is",
    "Here are the {c[0]} {o[0]}, the {c[1]} {o[1]} and the {c[2]} {o[2]}. The color of this {query} is",
)


def _binding(
    rng: random.Random, *, split: str | None, counterfactual: str, templates: Sequence[int] | None = None
) -> Example:
    things = rng.sample(words.OBJECTS, 3)
    colors = rng.sample(words.COLORS, 3)
    template = choose_template(rng, len(_BINDING_TEMPLATES), templates)
    fill = _BINDING_TEMPLATES[template].format
    asked, other = rng.sample(range(3), 2)
    if counterfactual == "query":  # another of the three is asked for
        corrupt = fill(o=things, c=colors, query=things[other])
    else:  # colors: two of them change places
        exchanged = list(colors)
        exchanged[asked], exchanged[other] = colors[other], colors[asked]
        corrupt = fill(o=things, c=exchanged, query=things[asked])
    return Example(
        clean=fill(o=things, c=colors, query=things[asked]),
        corrupt=corrupt,
        answer=f" {colors[asked]}",
        wrong=f" {colors[other]}",
        key="|".join(["colored-objects", *sorted(things), *sorted(colors)]),
        template=template,
    )


# --- opposites -----------------------------------------------------------------------------------------------

_ANTONYM_TEMPLATES = (
    "{a} and {b}, {c} and {d}, {word} and",
    "The opposite of {a} is {b}, the opposite of {c} is {d}, and the opposite of {word} is",
    "Opposites: {a} - {b}, {c} - {d}, {word} -",
)


def _antonyms(
    rng: random.Random, *, split: str | None, counterfactual: str, templates: Sequence[int] | None = None
) -> Example:
    template = choose_template(rng, len(_ANTONYM_TEMPLATES), templates)
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in rng.sample(words.ANTONYMS, 4)]
    (a, b), (c, d), clean, corrupt = pairs
    fill = partial(_ANTONYM_TEMPLATES[template].format, a=a, b=b, c=c, d=d)
    return Example(
        clean=fill(word=clean[0]),
        corrupt=fill(word=corrupt[0]),
        answer=f" {clean[1]}",
        wrong=f" {corrupt[1]}",
        key="|".join(["antonyms", a, c]),
        template=template,
    )


# --- copying -------------------------------------------------------------------------------------------------

_INDUCTION_SEPARATORS = (" ", ", ", " / ")


def _induction(
    rng: random.Random, *, split: str | None, counterfactual: str, templates: Sequence[int] | None = None
) -> Example:
    template = choose_template(rng, len(_INDUCTION_SEPARATORS), templates)
    separator = _INDUCTION_SEPARATORS[template]
    series = rng.sample(words.OBJECTS, 6)
    start = rng.randrange(4)  # two words are repeated, and the next one is asked for

    def text(shown: list[str], again: list[str]) -> str:
        return (separator.join([*shown, *again]) + separator).rstrip()

    if counterfactual == "cue":  # two others are repeated
        elsewhere = rng.choice([i for i in range(4) if i != start])
        corrupt, wrong = text(series, series[elsewhere : elsewhere + 2]), series[elsewhere + 2]
    else:  # order: what followed them changes places with another word
        there = rng.choice([i for i in range(6) if not start <= i <= start + 2])
        exchanged = list(series)
        exchanged[start + 2], exchanged[there] = series[there], series[start + 2]
        corrupt, wrong = text(exchanged, series[start : start + 2]), series[there]
    return Example(
        clean=text(series, series[start : start + 2]),
        corrupt=corrupt,
        answer=f" {series[start + 2]}",
        wrong=f" {wrong}",
        key="|".join(["induction", *sorted(series)]),
        template=template,
    )


# --- agreement -----------------------------------------------------------------------------------------------

_AGREEMENT_TEMPLATES = (
    ("Today the {noun} near the {other} at the {place}", "is", "are"),
    ("Yesterday the {noun} behind the {other} in the {place}", "was", "were"),
    ("The {noun} next to the {other} in the {place}", "is", "are"),
    ("Last week the {noun} under the {other} at the {place}", "was", "were"),
)


def _agreement(
    rng: random.Random, *, split: str | None, counterfactual: str, templates: Sequence[int] | None = None
) -> Example:
    template = choose_template(rng, len(_AGREEMENT_TEMPLATES), templates)
    sentence, singular, plural = _AGREEMENT_TEMPLATES[template]
    noun, other = rng.sample(words.OBJECTS, 2)
    other += rng.choice(("", "s"))  # an attractor that may or may not have the subject's number
    place = rng.choice(words.PLACES)
    one, several = (sentence.format(noun=each, other=other, place=place) for each in (noun, f"{noun}s"))
    about_one = rng.random() < 0.5
    return Example(
        clean=one if about_one else several,
        corrupt=several if about_one else one,
        answer=f" {singular if about_one else plural}",
        wrong=f" {plural if about_one else singular}",
        key="|".join(["agreement", noun, other, place]),
        template=template,
    )


TASKS: tuple[OfflineTask, ...] = (
    OfflineTask(
        "greater-than",
        "comparison",
        "Two people have different numbers of things: who has more?",
        ("numbers", "names"),
        partial(_comparison, name="greater-than"),
        ("templates",),
    ),
    OfflineTask(
        "less-than",
        "comparison",
        "Two people have different numbers of things: who has fewer?",
        ("numbers", "names"),
        partial(_comparison, name="less-than"),
        ("templates",),
    ),
    OfflineTask(
        "pronouns",
        "gender",
        "Gendered pronouns: he or she, by the name of the person.",
        ("gender",),
        _pronouns,
        ("templates",),
    ),
    OfflineTask(
        "docstring",
        "code",
        "A function's arguments are described in order: which one comes next?",
        ("order", "parameters"),
        _docstring,
        ("templates",),
    ),
    OfflineTask(
        "capitals",
        "geography",
        "The capital of a country.",
        ("country",),
        partial(_geography, fact="capital"),
        ("templates",),
    ),
    OfflineTask(
        "languages",
        "geography",
        "The language that most people of a country speak.",
        ("country",),
        partial(_geography, fact="language"),
        ("templates",),
    ),
    OfflineTask(
        "calendar",
        "succession",
        "Three days or months in a row: the next one.",
        ("start",),
        partial(_succession, name="calendar"),
        ("templates",),
    ),
    OfflineTask(
        "counting",
        "succession",
        "Three number words in a row: the next one.",
        ("start",),
        partial(_succession, name="counting"),
        ("templates",),
    ),
    OfflineTask(
        "colored-objects",
        "binding",
        "Three things have a color each: that of one of them.",
        ("query", "colors"),
        _binding,
        ("templates",),
    ),
    OfflineTask(
        "antonyms",
        "opposites",
        "The opposite of a word, after two examples.",
        ("word",),
        _antonyms,
        ("templates",),
    ),
    OfflineTask(
        "induction",
        "copying",
        "Two words of a list of six are repeated: the one that followed them.",
        ("cue", "order"),
        _induction,
        ("templates",),
    ),
    OfflineTask(
        "agreement",
        "agreement",
        "Subject-verb agreement: is or are, by the subject and not by the noun in between.",
        ("number",),
        _agreement,
        ("templates",),
    ),
)
