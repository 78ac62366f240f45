"""pairs.check: what a model does on prompt pairs, against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch
from helpers import random_pairs

import dfa_lens as dfa
from dfa_lens.errors import PromptError
from dfa_lens.models.runner import Runner


def with_choices(pairs):
    n = len(pairs)
    offered = torch.stack([pairs.answer, pairs.wrong, torch.full((n,), 7), torch.full((n,), -1)], 1)
    corrupt = torch.stack([pairs.wrong, torch.full((n,), 9)], 1)
    return dfa.PromptPairs(
        pairs.clean, pairs.corrupt, pairs.answer, pairs.wrong, pairs.lengths, choices=offered, corrupt_choices=corrupt
    )


def test_every_number_is_what_it_says(model, ragged, unchanged):
    pairs = with_choices(ragged)
    with unchanged(model):
        found = dfa.check(model, pairs, batch_size=4)
    for i in range(len(pairs)):
        one = pairs[i]
        with torch.no_grad():
            clean = Runner(model).run(one.clean, one.lengths)[0]
            corrupt = Runner(model).run(one.corrupt, one.lengths)[0]
        a, w = int(pairs.answer[i]), int(pairs.wrong[i])
        assert found.difference[i] == pytest.approx(float(clean[a] - clean[w]), abs=1e-4)
        assert found.corrupt_difference[i] == pytest.approx(float(corrupt[a] - corrupt[w]), abs=1e-4)
        assert found.above[i] == (clean[a] > clean[w])
        assert found.corrupt_above[i] == (corrupt[w] > corrupt[a])
        assert found.best[i] == (clean[a] >= max(clean[a], clean[w], clean[7]))
        assert found.corrupt_best[i] == (corrupt[w] >= corrupt[9])
        assert found.prediction[i] == clean.argmax() and found.corrupt_prediction[i] == corrupt.argmax()
        assert found.top[i] == (clean.argmax() == a) and found.corrupt_top[i] == (corrupt.argmax() == w)
    assert torch.equal(found.right_in_both, found.best & found.corrupt_best & found.above & found.corrupt_above)
    summary = found.summary()
    assert summary["best of the choices"] == pytest.approx(float(found.best.float().mean()))
    assert len(found.to_frame()) == len(pairs)
    margins = [float(min(found.difference[i], -found.corrupt_difference[i])) for i in range(len(pairs))]
    assert torch.equal(found.worst(1).answer, pairs[[margins.index(min(margins))]].answer)


def test_where_keeps_what_is_solved(model, pairs):
    """Pairs made of the model's own predictions are solved; with the two answers the other way round they are not."""
    found = dfa.check(model, pairs)
    solved = torch.arange(len(pairs)) % 3 != 0
    right, wrong = found.prediction, found.corrupt_prediction
    assert bool((right != wrong).all())
    made = replace(pairs, answer=torch.where(solved, right, wrong), wrong=torch.where(solved, wrong, right))
    assert dfa.check(model, made).solved == made[solved]
    assert dfa.check(model, made).unsolved == made[~solved]


def test_where_nothing_is_left(zoo_source):
    pairs = dfa.tasks.load("ioi", zoo_source.tokenizer, n=8)
    assert len(dfa.check(zoo_source, pairs).solved) == 8
    with pytest.raises(PromptError, match="The model solves all of the 8 pairs"):
        _ = dfa.check(zoo_source, pairs).unsolved


# a model of one's own that takes no cache is run on whole prompts, and says so
@pytest.mark.filterwarnings("ignore:The short cut")
def test_answer_above_wrong_flatters_with_symbol_counterfactuals(any_model):
    """A model that has learned only that answers are among the clean letters looks right; the choices tell."""
    tokenizer = dfa.zoo.load("llama3-tiny-source").tokenizer
    pairs = dfa.tasks.load("mcqa", tokenizer, n=40)

    class Letters(torch.nn.Module):
        """Always the first letter of the clean prompts, then the others, whatever the question."""

        def __init__(self):
            super().__init__()
            self.inner = dfa.zoo.load("llama3-tiny-source")

        def __getattr__(self, name):
            return super().__getattr__(name) if name in ("inner", "_modules") else getattr(self.inner, name)

        def forward(self, tokens, *, attention_mask):
            logits = self.inner(tokens, attention_mask=attention_mask) * 0
            for rank, letter in enumerate(" A, B, C, D".split(",")):
                logits[..., tokenizer(letter, add_special_tokens=False)["input_ids"][0]] = 9.0 - rank
            return logits

    found = dfa.check(Letters(), pairs)
    assert found.summary()["answer above wrong"] == 1.0
    assert found.summary()["best of the choices"] < 0.5
    assert found.summary()["right in both directions"] < 0.5


@pytest.mark.parametrize("task", dfa.tasks.names())
def test_the_shipped_models_solve_their_tasks(task, zoo_source):
    found = dfa.check(zoo_source, dfa.tasks.load(task, zoo_source.tokenizer, split="test", n=32))
    assert found.summary()["right in both directions"] >= 0.95
    assert found.summary()["logit difference"] > 3 > -3 > found.summary()["logit difference, corrupt"]
    assert f"right in both directions {100 * found.summary()['right in both directions']:.1f} %," in repr(found)
    assert "<table" in found._repr_html_()
    words = [zoo_source.tokenizer.decode([int(token)]) for token in found.pairs.answer]
    assert found.to_frame()["answer"].tolist() == words


def test_pairs_of_another_model_are_refused(any_model):
    with pytest.raises(PromptError, match="the model's vocabulary has 101 tokens"):
        dfa.check(any_model, random_pairs(vocabulary=500))
