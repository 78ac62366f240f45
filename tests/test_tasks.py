import re

import pytest

import dfa_lens as dfa
from dfa_lens.errors import TaskError
from dfa_lens.tasks import offline, world
from dfa_lens.zoo import tokenizer as zoo_tokenizer

ALL = [(task, cf) for task, known in offline.TASKS.items() for cf in known.counterfactuals]


@pytest.fixture(scope="module")
def word_level():
    return zoo_tokenizer.build(begin_of_text=True)


@pytest.mark.parametrize(("task", "counterfactual"), ALL)
def test_examples(task, counterfactual, word_level):
    """Equal lengths, one-token answers, no unknown word, the answer told by the prompt and not by the corrupt one."""
    drawn = offline.examples(task, n=200, counterfactual=counterfactual)
    assert len({e.clean for e in drawn}) == 200
    pairs = dfa.PromptPairs.from_strings(
        word_level, *([getattr(e, name) for e in drawn] for name in ("clean", "corrupt", "answer", "wrong"))
    )
    assert not pairs.dropped
    assert {e.template for e in drawn} == set(range(max(e.template for e in drawn) + 1))


@pytest.mark.parametrize("task", offline.TASKS)
def test_splits_share_no_prompt(task):
    # `abc` of ioi brings names from anywhere: those corrupt prompts belong to no split
    families = [cf for cf in offline.TASKS[task].counterfactuals if cf != "abc"]
    prompts = {
        split: {
            text
            for family in families
            for e in offline.examples(task, split=split, n=600, seed=3, counterfactual=family)
            for text in (e.clean, e.corrupt)
        }
        for split in offline.SPLITS
    }
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


@pytest.mark.parametrize("task", offline.TASKS)
def test_deterministic_and_many(task):
    assert offline.examples(task, n=50, seed=1) == offline.examples(task, n=50, seed=1)
    assert offline.examples(task, n=50, seed=1) != offline.examples(task, n=50, seed=2)
    assert len(offline.examples(task, n=4000)) == 4000


def test_a_known_example_never_changes():
    """The streams are part of what results mean: a change here changes every number."""
    assert offline.examples("addition", n=1, split="test")[0] == offline.Example(
        clean="The sum of 42 and 15 is 57. The sum of 7 and 39 is",
        corrupt="The sum of 42 and 15 is 57. The sum of 29 and 38 is",
        answer=" 46",
        wrong=" 67",
        key="addition|7|39",
        template=1,
    )


@pytest.mark.parametrize("task", ["addition", "subtraction"])
def test_arithmetic_is_right_and_shows_no_test_sum(task):
    sign = 1 if task == "addition" else -1
    for e in offline.examples(task, n=300, split="test", shots=2):
        for prompt, answer in ((e.clean, e.answer), (e.corrupt, e.wrong)):
            numbers = [int(x) for x in re.findall(r"\d+", prompt)]
            assert len(numbers) == 8
            for a, b, c in (numbers[:3], numbers[3:6]):
                assert a + sign * b == c
                assert offline.split_of(f"{task}|{a}|{b}") == "train"
            a, b = numbers[6:]
            assert a + sign * b == int(answer)
            assert offline.split_of(f"{task}|{a}|{b}") == "test"


def test_facts_are_right():
    animals = {a.name: a for a in world.ANIMALS}
    for e in offline.examples("arc-challenge", n=300):
        animal = animals[re.search(r"the (\w+)(?: lives| eats| have|\?)", e.clean.split("\n")[0]).group(1)]
        options = dict(re.findall(r"(\w)\. (\w+)", e.clean))
        assert len(options) == 4
        right = options[e.answer.strip()]
        assert any(table[getattr(animal, relation)] == right for (relation, _), table in world.SECOND_HOP.items())
        corrupt = dict(re.findall(r"(\w)\. (\w+)", e.corrupt))
        assert corrupt[e.wrong.strip()] == right
        assert not set(corrupt) & set(options)  # the letters of a symbol counterfactual are new ones


def test_world_tables_are_complete():
    for (relation, _), table in world.SECOND_HOP.items():
        assert set(table) == set(world.values(relation))
        assert len(set(table.values())) >= 4
    words = zoo_tokenizer.vocabulary()
    assert len(words) == len(set(words))


def test_ioi_flip():
    for e in offline.examples("ioi", n=100):
        clean, corrupt = re.findall(r"\w+", e.clean), re.findall(r"\w+", e.corrupt)
        different = [(a, b) for a, b in zip(clean, corrupt, strict=True) if a != b]
        assert different == [(e.wrong.strip(), e.answer.strip())]
        assert clean.count(e.answer.strip()) == 1
        assert clean.count(e.wrong.strip()) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "oio"}, "Unknown task 'oio': expected one of 'ioi'.*Did you mean 'ioi'"),
        ({"split": "tset"}, "Unknown split 'tset'.*Did you mean 'test'"),
        ({"counterfactual": "symbl"}, "Unknown counterfactual for 'ioi' 'symbl': expected one of 's2_io_flip', 'abc'"),
        ({"n": 0}, "n must be at least 1"),
        ({"shots": 2}, "Unknown option for 'ioi' 'shots': expected one of there are none"),
        ({"name": "addition", "shots": 99}, "shots must be between 0 and 8"),
        ({"name": "addition", "max_number": 500}, "max_number must be between 10 and 99"),
        ({"name": "addition", "shots": 0, "max_number": 10, "n": 500}, r"has only about \d+ distinct prompts"),
    ],
)
def test_bad_input(given, message, word_level):
    options = {"name": "ioi", "tokenizer": word_level} | given
    with pytest.raises(TaskError, match=message):
        dfa.tasks.load(**options)
