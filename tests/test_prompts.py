import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import random_pairs, unchecked, unchecked_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.errors import PromptError, TaskError
from dfa_lens.models import runner
from dfa_lens.models.runner import Runner
from dfa_lens.zoo.tokenizer import build


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
    with pytest.raises(PromptError, match="Pair 1: clean has 5 tokens, corrupt 6"):
        dfa.PromptPairs.from_strings(tokenizer, **texts, different_lengths="error")
    for change, message in (
        ({"answer": [" 7 8", " 7"]}, "Pair 0: answer is ' 7 8', which is 2 tokens"),
        (
            {"clean": ["The zeppelin of 3 and 4 is", "3 + 4 ="]},
            "Pair 0: clean has a word that the tokenizer does not know",
        ),
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


# --- tokens, lengths, selections ---------------------------------------------------------------------------------


def test_from_tokens():
    lists = [[5, 6, 7], [5, 6]], [[5, 8, 7], [9, 6]]
    pairs = dfa.PromptPairs.from_tokens(*lists, answer=[1, 2], wrong=[3, 4])
    assert pairs.lengths.tolist() == [3, 2]
    assert pairs.clean.tolist() == [[5, 6, 7], [5, 6, 0]]
    tensors = torch.tensor([[5, 6, 7], [5, 6, 99]]), torch.tensor([[5, 8, 7], [9, 6, 99]])
    padded = dfa.PromptPairs.from_tokens(*tensors, answer=torch.tensor([1, 2]), wrong=torch.tensor([3, 4]), pad=99)
    assert padded.lengths.tolist() == [3, 2]
    for rows, options, message in (
        (([[5, 6]], [[5, 6, 7]]), {}, r"Pair 0: clean has 2 tokens, corrupt 3 \(1 such"),
        (([[5, 6], [1]], [[5, 7]]), {}, "must be equally long"),
        (([[]], [[]]), {}, "The prompts are empty"),
        ((torch.tensor([[0, 5]]), torch.tensor([[0, 6]])), {"pad": 0}, "clean 0 starts with padding .0.: pad on the"),
        ((torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2)), {"pad": 0}, r"clean must be token ids \[pair"),
    ):
        with pytest.raises(PromptError, match=message):
            unchecked(dfa.PromptPairs.from_tokens.__func__)(dfa.PromptPairs, *rows, [1], [2], **options)
    dropped = dfa.PromptPairs.from_tokens([[1, 2], [3]], [[1, 4], [3, 5]], [1, 1], [2, 2], different_lengths="drop")
    assert len(dropped) == 1 and dropped.dropped == {"different lengths": 1}


def test_misfits_are_dropped_and_counted(zoo_source):
    texts = {
        "clean": ["3 + 4 =", "3 + 4 =", "3 + zeppelin =", "3 + 4 =", "3 + 4 =", "3 + 4 ="],
        "corrupt": ["3 + 5 =", "3 + 5 =", "3 + 5 =", "3 + 4 =", "3 + 5 =", "The 3 + 5 ="],
        "answer": [" 7", " 7 8", " 7", " 7", " 8", " 7"],
        "wrong": [" 8", " 8", " 8", " 8", " 8", " 8"],
    }
    pairs = dfa.PromptPairs.from_strings(zoo_source.tokenizer, **texts, unusable="drop")
    assert len(pairs) == 1
    assert pairs.dropped == {
        "answer of several tokens": 1,
        "unknown word": 1,
        "equal prompts": 1,
        "equal answers": 1,
        "different lengths": 1,
    }
    bad = {name: values[1:] for name, values in texts.items()}
    with pytest.raises(
        PromptError, match=r"None of 5 pairs can be used with this tokenizer \(answer of several tokens: 1"
    ):
        dfa.PromptPairs.from_strings(zoo_source.tokenizer, **bad, unusable="drop")
    first = dfa.PromptPairs.from_strings(
        zoo_source.tokenizer, **{name: values[1:2] for name, values in texts.items()}, first_token=True
    )
    assert zoo_source.tokenizer.decode(first.answer[0]) == "7"


@pytest.mark.parametrize("longer", ["clean", "corrupt"])
def test_left_aligned_pairs_are_read_at_their_own_last_tokens(model, longer):
    """Every run of such a pair is that of the prompt alone; positions are compared one by one from the start."""
    short, long = [3, 4, 5, 6], [3, 9, 4, 5, 6, 2]
    prompts = {"clean": long, "corrupt": short} if longer == "clean" else {"clean": short, "corrupt": long}
    mixed = dfa.PromptPairs.from_tokens(
        [prompts["clean"], [1, 2, 3]],
        [prompts["corrupt"], [1, 2, 4]],
        [7, 8],
        [9, 10],
        different_lengths="pad-left-aligned",
    )
    assert mixed.lengths.tolist() == [len(prompts["clean"]), 3]
    assert mixed.corrupt_lengths.tolist() == [len(prompts["corrupt"]), 3]
    scores = dfa.attribute(model, mixed[:1], method="exact")
    for which, key in (("clean", "metric_clean"), ("corrupt", "metric_corrupt")):
        with torch.no_grad():
            logits = model(torch.tensor([prompts[which]]), attention_mask=torch.ones(1, len(prompts[which])).long())
        expected = float(logits[0, -1, 7] - logits[0, -1, 9])
        assert scores.meta[key] == pytest.approx(expected, abs=1e-4)
    source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
    for intervention in ("circuit", "restore", "interpolate"):
        fits = [
            dfa.fit(model, {"a": source}, {"a": mixed}, steps=2, intervention=intervention, cache=cache).W
            for cache in ("device", "recompute")
        ]
        torch.testing.assert_close(*fits, atol=1e-5, rtol=1e-4)
    both = dfa.PromptPairs.concat([mixed, random_pairs(2, 5)])
    assert torch.equal(both[:2].corrupt_lengths, mixed.corrupt_lengths)
    curve = dfa.faithfulness_curve(model, both, dfa.attribute(model, both, method="nap"), sizes=[0, 15])
    assert curve.faithfulness[-1] == 1


def test_choices(zoo_source):
    pairs = dfa.tasks.load("mcqa", zoo_source.tokenizer, n=4)
    ioi = dfa.tasks.load("ioi", zoo_source.tokenizer, n=2)
    assert pairs.choices.shape == (4, 4)
    assert dfa.PromptPairs.concat([pairs, ioi]).choices is None
    fewer = dfa.tasks.load("mcqa", zoo_source.tokenizer, n=2, n_choices=2)
    both = dfa.PromptPairs.concat([pairs, fewer])
    assert both.choices.shape == (6, 4) and (both.choices[4:, 2:] == -1).all()
    with pytest.raises(PromptError, match="The answer of pair 0 is not among its choices"):
        unchecked_pairs(**tensors(1), choices=torch.tensor([[5, 6]]))
    with pytest.raises(PromptError, match=r"choices has shape \[2, 1\]"):
        unchecked_pairs(**tensors(1), choices=torch.tensor([[0], [6]]))


# --- texts and tokenizers as people have them --------------------------------------------------------------------

TEXTS = {
    "clean": ["3 + 4 =", "3 + 5 ="],
    "corrupt": ["3 + 5 =", "3 + 4 ="],
    "answer": [" 7", " 8"],
    "wrong": [" 8", " 7"],
}
GAPS = [None, float("nan"), np.float64("nan"), pd.NA, pd.NaT]
NO_TEXTS = [7, 7.0, True, b"7", ["7"], {"text": "7"}, np.array(["7"]), "\ud800"]


def from_strings(tokenizer, change=(), **options):
    """Without the run-time type checks of the tests."""
    return unchecked(dfa.PromptPairs.from_strings.__func__)(
        dfa.PromptPairs, tokenizer, **(TEXTS | dict(change)), **options
    )


@pytest.mark.parametrize("column", TEXTS)
@pytest.mark.parametrize("value", GAPS + NO_TEXTS, ids=repr)
def test_what_is_no_text(zoo_source, column, value):
    missing = any(value is gap for gap in GAPS)
    change = {column: [TEXTS[column][0], value]}
    message = f"Pair 1: {column} is missing" if missing else f"Pair 1: {column} (is .*not a text|holds half a char)"
    with pytest.raises(PromptError, match=message) as caught:
        from_strings(zoo_source.tokenizer, change)
    assert len(str(caught.value)) < 400
    kept = from_strings(zoo_source.tokenizer, change, unusable="drop")
    assert len(kept) == 1 and kept.dropped == {"missing" if missing else "not a text": 1}
    assert kept == from_strings(zoo_source.tokenizer)[:1]


def test_gaps_in_tables(zoo_source, monkeypatch):
    import datasets

    monkeypatch.setattr(dfa.PromptPairs, "from_strings", classmethod(unchecked(dfa.PromptPairs.from_strings.__func__)))

    table = pd.DataFrame(TEXTS)
    expected = from_strings(zoo_source.tokenizer)
    for dataset in (table, datasets.Dataset.from_pandas(table), TEXTS):
        assert dfa.PromptPairs.from_dataset(dataset, zoo_source.tokenizer) == expected
    table.loc[1, "answer"] = None
    for dataset in (table, datasets.Dataset.from_pandas(table)):
        with pytest.raises(PromptError, match="Pair 1: answer is missing"):
            dfa.PromptPairs.from_dataset(dataset, zoo_source.tokenizer)
    numbers = pd.DataFrame(TEXTS | {"answer": [7, 8]})
    with pytest.raises(PromptError, match="Pair 0: answer is .*7.*, of type .*int.*not a text: write numbers as"):
        dfa.PromptPairs.from_dataset(numbers, zoo_source.tokenizer)
    for dataset in (None, 3, "text", [TEXTS], iter([])):
        with pytest.raises(PromptError, match="a table or a mapping of columns is needed"):
            dfa.PromptPairs.from_dataset(dataset, zoo_source.tokenizer)


def test_columns_that_are_none(zoo_source):
    for value in ("3 + 4 =", b"3", 3, None, {"a": 1}):
        with pytest.raises(PromptError, match="clean must be a list of texts, one for each pair"):
            from_strings(zoo_source.tokenizer, {"clean": value})
    for column, value in (("choices", "78"), ("corrupt_choices", 3)):
        with pytest.raises(PromptError, match=f"{column} must be a list of texts"):
            from_strings(zoo_source.tokenizer, **{column: value})
    for value in ("78", None, {"label": ["7", "8"]}, 3):
        with pytest.raises(PromptError, match="choices of pair 1 must be a list of texts"):
            from_strings(zoo_source.tokenizer, choices=[[" 7", " 8"], value])
    for value in ([" 7", None], [" 8", 7], [""]):
        with pytest.raises(PromptError, match="choices of pair 1 must be texts of at least one token"):
            from_strings(zoo_source.tokenizer, choices=[[" 7", " 8"], value])
    with pytest.raises(PromptError, match="The answer of pair 1 is not among its choices"):
        from_strings(zoo_source.tokenizer, choices=[[" 7", " 8"], []])


@pytest.mark.parametrize("tokenizer", ["llama3", object(), 3])
def test_tokenizers_that_are_none(tokenizer):
    with pytest.raises(PromptError, match="can't be called: pass model.tokenizer"):
        from_strings(tokenizer)


def ending(template):
    """The shipped models' tokenizer with another template, and an end token."""
    from tokenizers import processors

    tokenizer = build(begin_of_text=True)
    tokenizer.add_special_tokens({"eos_token": "</s>", "sep_token": "[SEP]"})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (tokenizer.bos_token, "</s>", "[SEP]")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template.format(begin=tokenizer.bos_token), special_tokens=list(ids.items())
    )
    return tokenizer


@pytest.mark.parametrize("token", ["</s>", "[SEP]"])
def test_a_tokenizer_that_ends_prompts_is_refused(token, zoo_source):
    tokenizer = ending(f"{{begin}} $A {token}")
    assert tokenizer("3 + 4 =").input_ids[-1] == tokenizer.convert_tokens_to_ids(token)
    message = re.escape(token) + "' behind every prompt.*set tokenizer.add_eos_token = False"
    for use in (
        lambda: from_strings(tokenizer),
        lambda: from_strings(tokenizer, unusable="drop"),
        lambda: dfa.tasks.load("ioi", tokenizer, n=4),
    ):
        with pytest.raises(PromptError, match=message):
            use()
    # a tokenizer that adds nothing at the end, and a text that ends so itself
    plain = ending("{begin} $A")
    assert from_strings(plain) == from_strings(zoo_source.tokenizer)
    ended = from_strings(plain, {name: [f"{text} </s>" for text in TEXTS[name]] for name in ("clean", "corrupt")})
    assert (ended.clean[:, -1] == plain.eos_token_id).all()


@pytest.mark.parametrize("column", ["clean", "corrupt"])
def test_a_begin_token_twice_is_refused(zoo_source, column):
    tokenizer = zoo_source.tokenizer
    twice = {column: [TEXTS[column][0], f"{tokenizer.bos_token} {TEXTS[column][1]}"]}
    assert tokenizer(twice[column][1]).input_ids[:2] == [tokenizer.bos_token_id] * 2
    with pytest.raises(PromptError, match=f"Pair 1: {column} begins with .*which the tokenizer adds by itself"):
        from_strings(tokenizer, twice, different_lengths="pad-left-aligned")
    kept = from_strings(tokenizer, twice, unusable="drop")
    assert kept.dropped == {"two begin tokens": 1} and kept == from_strings(tokenizer)[:1]
    # where the tokenizer adds none, the text may bring one
    bare = build(begin_of_text=False)
    bare.add_special_tokens({"bos_token": tokenizer.bos_token})
    assert from_strings(
        bare, {name: [f"{bare.bos_token} {t}" for t in TEXTS[name]] for name in ("clean", "corrupt")}
    ) == (from_strings(tokenizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": ["1", 2]}, "answer has '1' at 0, which is no token id"),
        ({"answer": [1.0, 2]}, "answer has 1.0 at 0"),
        ({"answer": [True, 2]}, "answer has True at 0"),
        ({"wrong": [None, 2]}, "wrong has None at 0"),
        ({"wrong": [float("nan"), 2]}, "wrong has nan at 0"),
        ({"wrong": [2**64, 2]}, "wrong has 18446744073709551616 at 0"),
        ({"wrong": "34"}, "wrong must be a list of token ids, not '34'"),
        ({"answer": 3}, "answer must be a list of token ids, not 3"),
        ({"clean": "56"}, "clean must be a list of prompts, each a list of token ids"),
        ({"clean": [5, 6]}, "clean 0 must be a list of token ids, not 5"),
        ({"clean": [[5, "6"], [7, 8]]}, "clean 0 has '6' at 1"),
        ({"clean": [[5, 6], "78"]}, "clean 1 must be a list of token ids, not '78'"),
        ({"clean": torch.ones(2, 2)}, r"clean must be token ids \[pair, pos\], not \[2, 2\] of torch.float32"),
        ({"clean": torch.ones(2, 2, dtype=torch.bool)}, "of torch.bool"),
        ({"pad": "0"}, "pad must be a token id, not '0'"),
        ({"pad": -1}, "pad must be a token id, not -1"),
    ],
)
def test_tokens_that_are_none(change, message):
    good = {"clean": [[5, 6], [7, 8]], "corrupt": [[5, 9], [7, 9]], "answer": [1, 2], "wrong": [3, 4]}
    make = unchecked(dfa.PromptPairs.from_tokens.__func__)
    expected = make(dfa.PromptPairs, **good)
    for convert in (np.array, torch.tensor, pd.Series, lambda row: np.array(row, dtype=np.uint8)):
        assert make(dfa.PromptPairs, **(good | {name: convert(good[name]) for name in ("answer", "wrong")})) == expected
    with pytest.raises(PromptError, match=message):
        make(dfa.PromptPairs, **(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": [[1, 2]]}, "clean must be a tensor of token ids .integers., not list"),
        ({"answer": np.arange(3)}, "answer must be a tensor of token ids .integers., not ndarray"),
        ({"lengths": torch.ones(3)}, "lengths must be a tensor of token ids .integers., not torch.float32"),
        ({"choices": torch.ones(3, 2)}, "choices must be a tensor of token ids .integers., not torch.float32"),
        ({"choices": torch.ones(3, dtype=torch.long)}, r"choices has shape \[3\]: \[pair, choice\] is needed"),
        ({"corrupt_choices": torch.ones(2, 2, dtype=torch.long)}, r"corrupt_choices has shape \[2, 2\]"),
        ({"answer": torch.ones(3, 1, dtype=torch.long)}, r"answer has shape \[3, 1\]: \[pair\] is needed"),
    ],
)
def test_tensors_of_another_kind(change, message):
    with pytest.raises(PromptError, match=message):
        unchecked_pairs(**(tensors() | change))


def test_choices_of_another_vocabulary(any_model):
    pairs = random_pairs(2)
    far = replace(pairs, choices=torch.stack([pairs.answer, pairs.answer + 500], 1))
    with pytest.raises(PromptError, match="choices of pair 0 has token id .* vocabulary has 101"):
        dfa.check(any_model, far)


def test_what_is_put_together_must_belong_together(zoo_source):
    parts = [dfa.tasks.load("ioi", zoo_source.tokenizer, n=2, seed=seed) for seed in (0, 1)]
    again = dfa.tasks.load("ioi", build(begin_of_text=True), n=2, seed=1)  # the same tokenizer, loaded again
    assert dfa.PromptPairs.concat([parts[0], again]).tokenizer is zoo_source.tokenizer
    assert dfa.PromptPairs.concat([random_pairs(2), parts[0]]).tokenizer is zoo_source.tokenizer
    other = replace(parts[1], tokenizer=ending("{begin} $A"))
    with pytest.raises(PromptError, match="different tokenizers"):
        dfa.PromptPairs.concat([parts[0], other])
    dropped = [replace(parts[0], dropped={"a": 1, "b": 2}), replace(parts[1], dropped={"b": 3}), parts[0]]
    assert dfa.PromptPairs.concat(dropped).dropped == {"a": 1, "b": 5}


def test_shuffle():
    pairs = random_pairs(8, ragged=True)
    state = torch.get_rng_state()
    shuffled = pairs.shuffle(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(shuffled.answer.tolist()) == sorted(pairs.answer.tolist())
    assert shuffled.answer.tolist() != pairs.answer.tolist()
    assert torch.equal(shuffled.answer, pairs.shuffle(seed=1).answer)


def test_show(zoo_source, capsys):
    pairs = dfa.PromptPairs.from_strings(
        zoo_source.tokenizer, ["When Eva and Max went"], ["When Eva and Milo went"], [" Eva"], [" Milo"]
    )
    pairs.show()
    lines = capsys.readouterr().out.rstrip().split("\n")
    assert lines[0] == "clean  |<|begin_of_text|>|When|Eva|and|Max |went"
    assert lines[1] == "corrupt|<|begin_of_text|>|When|Eva|and|Milo|went"
    assert lines[2] == " " * lines[1].index("Milo") + "^^^^"
    assert lines[3] == "answer 'Eva', wrong 'Milo'"
    random_pairs(2).show(1)  # without a tokenizer: ids
    assert "|" in capsys.readouterr().out


def test_all_phases_see_the_same_tokens(zoo_source, monkeypatch):
    """Attribution, training, curves and checks run the tokens of the pairs, and the begin-of-text token once."""
    monkeypatch.setattr(runner, "LEAST_SHARED", 10**6)  # whole prompts
    assert Runner(zoo_source).allows_padding(17)  # tried once per model, on a few tokens of no prompt
    pairs = dfa.tasks.load("ioi", zoo_source.tokenizer, n=6)
    expected = {
        tuple(row[:n].tolist())
        for tokens, lengths in ((pairs.clean, pairs.lengths), (pairs.corrupt, pairs.corrupt_lengths))
        for row, n in zip(tokens, lengths, strict=True)
    }
    assert all(row[0] == zoo_source.tokenizer.bos_token_id and row.count(row[0]) == 1 for row in expected)
    seen = set()

    def look(module, args, kwargs):
        for row, mask in zip(args[0], kwargs["attention_mask"], strict=True):
            seen.add(tuple(row[: int(mask.sum())].tolist()))

    handle = zoo_source.register_forward_pre_hook(look, with_kwargs=True)
    try:
        for work in (
            lambda: dfa.attribute(zoo_source, pairs),
            lambda: dfa.fit(
                zoo_source,
                {"a": dfa.controls.uniform(dfa.NodeSet.for_sizes(1, 1))},
                {"a": pairs},
                steps=2,
                batch_size=3,
                cache="recompute",
            ),
            lambda: dfa.faithfulness_curve(
                zoo_source, pairs, dfa.controls.uniform(dfa.NodeSet.heads_and_mlps(zoo_source)), sizes=[0, 54]
            ),
            lambda: dfa.check(zoo_source, pairs),
        ):
            seen.clear()
            work()
            assert seen == expected
    finally:
        handle.remove()
