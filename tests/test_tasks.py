import re

import pytest
import torch
from helpers import byte_level_tokenizer

import dfa_lens as dfa
from dfa_lens.errors import TaskError
from dfa_lens.tasks import offline, world
from dfa_lens.zoo import tokenizer as zoo_tokenizer

ALL = [(task, cf) for task, known in offline.ALL.items() for cf in known.counterfactuals]


@pytest.fixture(scope="module")
def word_level():
    return zoo_tokenizer.build(begin_of_text=True)


@pytest.fixture(scope="module")
def tokenizer_of(word_level):
    """Task → the tokenizer of the shipped models that know it."""
    further = zoo_tokenizer.build(begin_of_text=True, tasks="more")
    return dict.fromkeys(dfa.tasks.names(), word_level) | dict.fromkeys(dfa.tasks.names("more"), further)


@pytest.mark.parametrize(("task", "counterfactual"), ALL)
def test_examples(task, counterfactual, tokenizer_of):
    """Equal lengths, one-token answers, no unknown word, the answer told by the prompt and not by the corrupt one."""
    drawn = offline.examples(task, n=200, counterfactual=counterfactual)
    assert len({e.clean for e in drawn}) == 200
    pairs = dfa.PromptPairs.from_strings(
        tokenizer_of[task], *([getattr(e, name) for e in drawn] for name in ("clean", "corrupt", "answer", "wrong"))
    )
    assert not pairs.dropped
    assert {e.template for e in drawn} == set(range(max(e.template for e in drawn) + 1))


@pytest.mark.parametrize("task", offline.ALL)
def test_splits_share_no_prompt(task):
    # `abc` of ioi brings names from anywhere: those corrupt prompts belong to no split
    n = 250 if task in offline.TASKS else 80
    families = [cf for cf in offline.ALL[task].counterfactuals if cf != "abc"]
    prompts = {
        split: {
            text
            for family in families
            for e in offline.examples(task, split=split, n=n, seed=3, counterfactual=family)
            for text in (e.clean, e.corrupt)
        }
        for split in offline.SPLITS
    }
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


@pytest.mark.parametrize("task", offline.ALL)
def test_deterministic_and_many(task):
    assert offline.examples(task, n=50, seed=1) == offline.examples(task, n=50, seed=1)
    assert offline.examples(task, n=50, seed=1) != offline.examples(task, n=50, seed=2)
    many = 4000 if task in offline.TASKS else 1000
    assert len(offline.examples(task, n=many)) == many


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
        ({"shots": 2}, "Unknown option for 'ioi' 'shots': expected one of 'templates', 'distractors'"),
        ({"templates": [8, 9]}, r"templates are numbered from 0 to 7 here, and none of \[8, 9\]"),
        ({"distractors": 4}, "distractors must be between 0 and 3"),
        ({"name": "mcqa", "n_choices": 5}, "n_choices must be between 2 and 4"),
        ({"n": None}, "The offline tasks have no end: say how many"),
        ({"name": "capitals", "collection": "mib"}, "MIB has no task 'capitals', which is an offline task only.*'ioi'"),
        ({"path": "somewhere"}, "path is for collection='mib'"),
        ({"name": "addition", "shots": 99}, "shots must be between 0 and 8"),
        ({"name": "addition", "max_number": 500}, "max_number must be between 10 and 99"),
        ({"name": "addition", "shots": 0, "max_number": 10, "n": 500}, r"has only about \d+ distinct prompts"),
    ],
)
def test_bad_input(given, message, word_level):
    options = {"name": "ioi", "tokenizer": word_level} | given
    with pytest.raises(TaskError, match=message):
        dfa.tasks.load(**options)


# --- options, cards, exports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", offline.ALL)
def test_templates_can_be_chosen(task, tokenizer_of):
    drawn = offline.examples(task, n=40, templates=[1])
    assert {e.template for e in drawn} == {1}
    pairs = dfa.tasks.load(task, tokenizer_of[task], n=10, templates=[0, 1])
    assert len(pairs) == 10


def test_difficulty(word_level):
    harder = offline.examples("ioi", n=30, distractors=2)
    for e in harder:
        assert e.clean.count("visited the") >= 2
        assert e.clean.count(e.wrong.strip()) == 2 and e.clean.count(e.answer.strip()) == 1
    for n_choices in (2, 3):
        for task in ("mcqa", "arc-easy", "arc-challenge"):
            for e in offline.examples(task, n=20, n_choices=n_choices):
                assert len(e.choices) == len(e.corrupt_choices) == n_choices
                assert e.answer in e.choices and e.wrong in e.corrupt_choices
    for task, sign in (("addition", 1), ("subtraction", -1)):
        for carry in (True, False):
            for e in offline.examples(task, n=40, shots=0, carry=carry):
                a, b = (int(x) % 10 for x in re.findall(r"\d+", e.clean))
                assert (a + b > 9 if sign > 0 else a < b) == carry
    for name, options in (("ioi", {"distractors": 3}), ("addition", {"shots": 3}), ("mcqa", {"n_choices": 2})):
        assert not dfa.tasks.load(name, word_level, n=20, **options).dropped  # every word is known


@pytest.mark.parametrize("task", offline.ALL)
def test_cards_tell_the_truth(task):
    card = dfa.tasks.card(task)
    example = offline.examples(task, split="test", n=1)[0]
    assert f"```text\n{example.clean}\n```\n\nAnswer: `{example.answer.strip()}`" in card
    assert f"```text\n{example.corrupt}\n```\n\nAnswer: `{example.wrong.strip()}`" in card
    known = offline.ALL[task]
    listed = re.findall(r"^- `(\w+)`", card, flags=re.MULTILINE)
    assert listed == [*known.counterfactuals, *known.options]
    assert f"- `{known.counterfactuals[0]}` (default)" in card


@pytest.mark.parametrize("task", offline.ALL)
def test_export_and_back(task, tokenizer_of):
    dataset = dfa.tasks.to_dataset(task, split="validation", n=7, seed=2)
    pairs = dfa.PromptPairs.from_dataset(dataset, tokenizer_of[task])
    expected = dfa.tasks.load(task, tokenizer_of[task], split="validation", n=7, seed=2)
    assert torch.equal(pairs.clean, expected.clean) and torch.equal(pairs.corrupt, expected.corrupt)
    assert (pairs.choices is None) == (expected.choices is None)
    if pairs.choices is not None:
        assert torch.equal(pairs.choices, expected.choices)


def test_other_tokenizers_get_what_they_can_use():
    """Names of one token are kept, others passed over and counted; nothing fits: the error says so."""
    tokenizer = byte_level_tokenizer("qwen")
    pairs = dfa.tasks.load("ioi", tokenizer, n=20)
    assert len(pairs) == 20
    table = dfa.tasks.coverage({"qwen": tokenizer}, collection="offline", n=300).set_index("task")
    assert table.loc["ioi", "kept"] + table.loc["ioi", "dropped"] == 300
    assert table.loc["addition", "answer of several tokens"] == 300
    with pytest.raises(
        TaskError, match=r"None of \d+ prompts of 'addition'.*one token for each answer, like that of the"
    ):
        dfa.tasks.load("addition", tokenizer, n=4)


def test_fewer_if_said_so(word_level):
    options = {"split": "train", "shots": 0, "max_number": 10, "n": 500}
    fewer = dfa.tasks.load("addition", word_level, allow_fewer=True, **options)
    assert 20 < len(fewer) < 500
