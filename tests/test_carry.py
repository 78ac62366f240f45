"""The one call against its parts."""

import pytest
from helpers import random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError


@pytest.fixture(scope="module")
def setup():
    source, target = random_model(seed=0, num_hidden_layers=2), random_model(seed=1, num_hidden_layers=3)
    ours = {task: random_pairs(4, 6, seed=i) for i, task in enumerate("abc")}
    theirs = {task: random_pairs(4, 6, seed=10 + i) for i, task in enumerate("abc")}
    scores = {task: dfa.attribute(source, pairs, method="nap") for task, pairs in ours.items()}
    return source, target, ours, theirs, scores


def test_functional_is_the_default(setup):
    source, target, ours, theirs, scores = setup
    measured = {task: dfa.measure(source, pairs) for task, pairs in ours.items()}
    functional = dfa.fit_functional(
        {task: scores[task] for task in "bc"}, {task: measured[task] for task in "bc"}, trees=20, seed=3
    )
    read = dfa.measure(target, theirs["a"])
    found = dfa.carry(source, target, "a", ours, {"a": theirs["a"]}, method="nap", trees=20, seed=3)
    assert found == functional.transfer(read, scores["a"], measured["a"])
    blind = {task: ours[task] for task in "bc"}
    assert dfa.carry(source, target, "a", blind, theirs, method="nap", trees=20, seed=3) == functional.transfer(read)


def test_the_papers_w_is_one_word_away(setup):
    source, target, ours, theirs, scores = setup
    others = {task: theirs[task] for task in "bc"}
    alignment = dfa.fit(target, {task: scores[task] for task in "bc"}, others, seed=3, steps=5)
    found = dfa.carry(source, target, "a", ours, others, by="W", method="nap", seed=3, steps=5)
    assert found == alignment.transfer(scores["a"])


@pytest.mark.parametrize(("by", "steps", "options"), [("functional", 8, {"trees": 5}), ("W", 3, {"steps": 2})])
def test_the_bar_comes_to_its_end(setup, capsys, by, steps, options):
    """Each attribution and measurement is a step, with that of the target and the learning; training has its own bar."""
    source, target, ours, theirs, _ = setup
    dfa.carry(source, target, "a", ours, theirs, by=by, method="nap", **options)
    assert capsys.readouterr().err == ""
    dfa.carry(source, target, "a", ours, theirs, by=by, method="nap", progress=True, **options)
    shown = capsys.readouterr().err
    assert f" {steps}/{steps} " in shown
    assert ("fit: " in shown) == (by == "W")


def test_what_is_missing_is_said_before_the_work(setup):
    source, target, ours, theirs, _ = setup
    with pytest.raises(AlignmentError, match="by='functional' needs prompts of task 'a' on the target"):
        dfa.carry(source, target, "a", ours, {"b": theirs["b"]})
    with pytest.raises(AlignmentError, match="by='W' needs prompts of task 'c' on the target"):
        dfa.carry(source, target, "a", ours, {"b": theirs["b"]}, by="W")
    with pytest.raises(AlignmentError, match="by='W' needs prompts of task 'a' on the source"):
        dfa.carry(source, target, "a", {"b": ours["b"]}, theirs, by="W")
    with pytest.raises(AlignmentError, match="no task but 'a' to learn from"):
        dfa.carry(source, target, "a", {"a": ours["a"]}, theirs)
    with pytest.raises(AlignmentError, match="Unknown way to carry 'w'"):
        unchecked(dfa.carry)(source, target, "a", ours, theirs, by="w")
