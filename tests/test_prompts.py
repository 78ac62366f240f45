import pytest
import torch
from helpers import random_pairs, unchecked, unchecked_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.errors import PromptError, TaskError


def tensors(n=3, width=4):
    clean = torch.arange(n * width).reshape(n, width)
    return {"clean": clean, "corrupt": clean + 1, "answer": torch.arange(n), "wrong": torch.arange(n) + 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupt": torch.zeros(3, 5, dtype=torch.long)}, r"clean has shape \[3, 4\] but corrupt \[3, 5\]"),
        ({"corrupt": torch.zeros(2, 4, dtype=torch.long)}, r"clean has shape \[3, 4\] but corrupt \[2, 4\]"),
        ({"answer": torch.zeros(2, dtype=torch.long)}, "answer has 2 entries for 3 prompt pairs"),
        ({"wrong": torch.tensor([1, 1, 3])}, "Pair 1 has the same answer and wrong answer"),
        ({"corrupt": torch.arange(12).reshape(3, 4)}, r"Pair 0 has a clean prompt equal to its corrupt one \(3 of 3"),
        ({"answer": torch.tensor([0, -1, 2])}, "Pair 1 has a negative id"),
        ({"lengths": torch.tensor([4, 5, 4])}, "Pair 1 has a length outside 1 to 4"),
        ({"clean": torch.zeros(3, 4)}, "clean must be a tensor of token ids"),
        ({"clean": torch.zeros(3, dtype=torch.long)}, r"clean has shape \[3\]"),
    ],
)
def test_bad_pairs(change, message):
    with pytest.raises(PromptError, match=message):
        unchecked_pairs(**(tensors() | change))


def test_no_pairs():
    with pytest.raises(PromptError, match="no prompt pairs"):
        unchecked_pairs(**tensors(0))
    with pytest.raises(PromptError, match="no prompt pairs"):
        random_pairs()[[]]
    with pytest.raises(PromptError, match="no prompt pairs"):
        dfa.PromptPairs.concat([])


def test_a_difference_in_the_padding_does_not_count():
    given = tensors(1)
    corrupt = given["clean"].clone()
    corrupt[0, 3] += 1
    with pytest.raises(PromptError, match="equal to its corrupt"):
        unchecked_pairs(**(given | {"corrupt": corrupt}), lengths=torch.tensor([3]))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(4, 9), st.integers(1, 7), st.integers(0, 99))
def test_batches_are_a_partition(n, width, batch_size, seed):
    pairs = random_pairs(n, width, seed=seed, ragged=True)
    seen = torch.zeros(n, dtype=torch.long)
    last = width
    for rows, batch in pairs.batches(batch_size):
        seen[rows] += 1
        assert len(batch) == len(rows) <= batch_size
        assert batch.clean.shape[1] == int(batch.lengths.max()) <= last
        last = batch.clean.shape[1]
        for at, row in enumerate(rows.tolist()):
            length = int(pairs.lengths[row])
            assert torch.equal(batch.clean[at, :length], pairs.clean[row, :length])
            assert batch.answer[at] == pairs.answer[row]
    assert (seen == 1).all()


def test_concat_and_select():
    first, second = random_pairs(2, 6), random_pairs(3, 9, seed=1)
    both = dfa.PromptPairs.concat([first, second])
    assert both.clean.shape == (5, 9)
    assert torch.equal(both[:2].clean, first.clean)
    assert torch.equal(both[[4, 2]].answer, second.answer[[2, 0]])
    assert repr(both) == "PromptPairs(5 pairs, 6 to 9 tokens)"


def test_from_strings(zoo_source):
    tokenizer = zoo_source.tokenizer
    texts = {
        "clean": ["The sum of 3 and 4 is", "3 + 4 ="],
        "corrupt": ["The sum of 3 and 5 is", "The 3 + 5 ="],
        "answer": [" 7", " 7"],
        "wrong": [" 8", " 8"],
    }
    pairs = dfa.PromptPairs.from_strings(tokenizer, **texts)
    assert len(pairs) == 1
    assert pairs.dropped == {"different lengths": 1}
    assert pairs.clean[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(pairs.answer[0]) == "7"
    with pytest.raises(PromptError, match=r"Pair 1: clean has 5 tokens, corrupt 6 \(1 such"):
        dfa.PromptPairs.from_strings(tokenizer, **texts, different_lengths="error")
    for change, message in (
        ({"answer": [" 7 8", " 7"]}, "answer 0 is ' 7 8', which is 2 tokens"),
        ({"clean": ["The zeppelin of 3 and 4 is", "3 + 4 ="]}, "clean 0 has a word that the tokenizer does not know"),
        ({"wrong": [" 8"]}, "must be equally long"),
    ):
        with pytest.raises(PromptError, match=message):
            dfa.PromptPairs.from_strings(tokenizer, **(texts | change))
    with pytest.raises(PromptError, match="Unknown policy"):
        unchecked(dfa.PromptPairs.from_strings.__func__)(dfa.PromptPairs, tokenizer, **texts, different_lengths="dorp")


def test_from_dataset(zoo_source):
    import datasets

    rows = [e._asdict() for e in dfa.tasks.examples("ioi", n=5)]
    dataset = datasets.Dataset.from_list(rows)
    pairs = dfa.PromptPairs.from_dataset(dataset, zoo_source.tokenizer)
    expected = dfa.tasks.load("ioi", zoo_source.tokenizer, n=5)
    assert torch.equal(pairs.clean, expected.clean)
    with pytest.raises(PromptError, match="no column 'wrong'; it has 'clean'"):
        dfa.PromptPairs.from_dataset(dataset.remove_columns("wrong"), zoo_source.tokenizer)


def test_tokens_are_those_of_the_tokenizer(zoo_source):
    """Training and evaluation see what the tokenizer makes of the text: one begin-of-text token, nothing else added."""
    example = dfa.tasks.examples("mcqa", n=1)[0]
    pairs = dfa.tasks.load("mcqa", zoo_source.tokenizer, n=1)
    assert pairs.clean[0].tolist() == zoo_source.tokenizer(example.clean)["input_ids"]
    assert (pairs.clean == zoo_source.tokenizer.bos_token_id).sum() == 1


def test_task_without_tokenizer():
    with pytest.raises(TaskError, match="tokenizer is None"):
        dfa.tasks.load("ioi", None)
