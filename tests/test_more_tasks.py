"""The further offline tasks: what each asks for, told by a rule of this file's own that reads nothing but the prompt."""

import re

import pytest
from helpers import unchecked

import dfa_lens as dfa
from dfa_lens.errors import ModelError, TaskError
from dfa_lens.tasks import offline, words
from dfa_lens.tasks.own import sources

# --- rules -------------------------------------------------------------------------------------------------------


def comparison(prompt):
    people = [word for word in re.findall(r"[A-Z]\w+", prompt) if word in (*words.WOMEN, *words.MEN)]
    by_number = dict(zip(map(int, re.findall(r"\d+", prompt)), people, strict=True))
    return by_number[min(by_number) if re.search("fewer|Fewer|smaller", prompt) else max(by_number)]


def pronouns(prompt):
    (woman,) = ({*re.findall(r"\w+", prompt)} & {*words.WOMEN}) or [None]
    (man,) = ({*re.findall(r"\w+", prompt)} & {*words.MEN}) or [None]
    assert (woman is None) != (man is None)
    return "she" if woman else "he"


def docstring(prompt):
    arguments = re.search(r"\((.*?)\)", prompt).group(1).split(", ")
    described = re.findall(r"(?:param|arg) (\w+)", prompt)
    assert len(set(arguments)) == 4 and arguments.index(described[0]) + 1 == arguments.index(described[1])
    return arguments[arguments.index(described[-1]) + 1]


def capitals(prompt):
    (country,) = [each for each in words.COUNTRIES if re.search(rf"\b{each.name}\b", prompt)]
    return country.capital


def languages(prompt):
    (country,) = [each for each in words.COUNTRIES if re.search(rf"\b{each.name}\b", prompt)]
    return country.language


def succession(prompt):
    after = {}
    for series, n in ((words.DAYS, 7), (words.MONTHS, 12), (words.NUMBER_WORDS, 20)):
        assert len(set(series)) == n
        after |= dict(zip(series, (*series[1:], series[0]), strict=True))
    shown = re.findall(r"\w+", prompt)[-3:]
    assert [after[shown[0]], after[shown[1]]] == shown[1:]
    return after[shown[2]]


def colored_objects(prompt):
    head, question = prompt.rsplit(". ", 1)
    thing = re.search(r"(\w+) is$", question).group(1)
    told = [re.search(rf"{thing} is (\w+)", head), re.search(rf"(\w+) {thing}\b", head)]
    (color,) = [found.group(1) for found in told if found and found.group(1) in words.COLORS]
    return color


def antonyms(prompt):
    opposite = dict(words.ANTONYMS) | {second: first for first, second in words.ANTONYMS}
    asked = [word for word in re.findall(r"\w+", prompt) if word in opposite]
    assert len(asked) == 5 and opposite[asked[0]] == asked[1] and opposite[asked[2]] == asked[3]
    return opposite[asked[4]]


def induction(prompt):
    shown = re.findall(r"\w+", prompt)
    return shown[shown.index(shown[-1]) + 1]


def agreement(prompt):
    subject = next(word for word in re.findall(r"\w+", prompt) if word.removesuffix("s") in words.OBJECTS)
    past = prompt.startswith(("Yesterday", "Last"))
    return {(False, False): "is", (False, True): "was", (True, False): "are", (True, True): "were"}[
        subject not in words.OBJECTS, past
    ]


RULES = {
    "greater-than": comparison,
    "less-than": comparison,
    "pronouns": pronouns,
    "docstring": docstring,
    "capitals": capitals,
    "languages": languages,
    "calendar": succession,
    "counting": succession,
    "colored-objects": colored_objects,
    "antonyms": antonyms,
    "induction": induction,
    "agreement": agreement,
}


@pytest.mark.parametrize("task", dfa.tasks.names("more"))
def test_answers_are_right(task):
    for counterfactual in offline.ALL[task].counterfactuals:
        for e in offline.examples(task, n=200, split="test", seed=5, counterfactual=counterfactual):
            assert f" {RULES[task](e.clean)}" == e.answer != e.wrong
            assert f" {RULES[task](e.corrupt)}" == e.wrong


@pytest.mark.parametrize("task", dfa.tasks.names("more"))
def test_a_key_stands_in_its_prompts(task):
    """Two splits share a prompt where a prompt does not tell its key."""
    for e in offline.examples(task, n=100):
        fields = e.key.split("|")[1:]
        for prompt in (e.clean, e.corrupt):
            missing = [field for field in fields if not re.search(rf"\b{field.removesuffix('s')}s?\b", prompt)]
            assert not missing, (missing, prompt)


def test_answers_are_balanced():
    """No answer is right much more often than its alternatives: always saying one word is no way to solve a task."""
    for task, most in (("greater-than", 0.06), ("pronouns", 0.6), ("agreement", 0.35), ("colored-objects", 0.15)):
        answers = [e.answer for e in offline.examples(task, n=400)]
        assert max(map(answers.count, answers)) / 400 < most
    first = [
        e.clean.index(e.answer.strip()) < e.clean.index(e.wrong.strip()) for e in offline.examples("less-than", n=400)
    ]
    assert 150 < sum(first) < 250
    attracted = [e for e in offline.examples("agreement", n=400) if (e.answer in (" are", " were")) != ("s|" in e.key)]
    assert 150 < len(attracted) < 250


# --- names and families --------------------------------------------------------------------------------------------


def test_names_and_families():
    assert dfa.tasks.names() == dfa.tasks.names("paper") == tuple(offline.TASKS)
    assert dfa.tasks.names("all") == (*dfa.tasks.names(), *dfa.tasks.names("more")) == tuple(dfa.tasks.FAMILIES)
    families = {dfa.tasks.FAMILIES[name] for name in dfa.tasks.names("more")}
    assert len(families) == 9
    assert not families & {dfa.tasks.FAMILIES[name] for name in dfa.tasks.names()}
    for task, sibling in dfa.tasks.SIBLINGS.items():
        assert dfa.tasks.SIBLINGS[sibling] == task
        assert dfa.tasks.FAMILIES[sibling] == dfa.tasks.FAMILIES[task]
    with pytest.raises(TaskError, match="Unknown set of tasks 'moer': expected one of 'paper', 'more', 'all'"):
        unchecked(dfa.tasks.names)("moer")
    with pytest.raises(ModelError, match="Unknown set of models 'moer'"):
        unchecked(dfa.zoo.names)("moer")


def test_a_study_takes_them_by_name():
    assert list(sources({"a": "capitals", "b": "ioi"})) == ["a", "b"]
    with pytest.raises(TaskError, match="MIB has no task 'capitals'"):
        sources({"a": "capitals"}, "mib")


def test_the_command_line_takes_them():
    """The paper's six stay the default; where a further task or a pair of their models is named, theirs are taken."""
    from dfa_lens.cli.reading import all_tasks

    by_target = dfa.zoo.solves("llama3-more-target")
    solved = tuple(task for task in dfa.zoo.solves("llama3-more-source") if task in by_target)
    assert all_tasks(None, ["ioi"], ["llama3"]) is None
    assert tuple(all_tasks(None, ["capitals"], None)) == dfa.tasks.names("more")
    assert tuple(all_tasks(None, None, ["llama3-more"])) == solved
    assert {"capitals", "docstring"} < set(solved) < set(dfa.tasks.names("more"))
