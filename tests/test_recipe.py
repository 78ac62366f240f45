"""Recipes: what decides which W comes out, checked, compared and written down."""

import inspect
import json
from dataclasses import fields, replace

import pytest
import torch
from helpers import random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError, DfaError
from dfa_lens.transfer import forms, objectives
from dfa_lens.transfer.recipe import RELEASED, Options, Recipe

SOURCE = dfa.NodeSet.for_sizes(2, 2)
ANCHOR = dfa.controls.depth_mean(SOURCE, dfa.NodeSet.for_sizes(3, 4))

#: another value of every field
OTHERS = {
    "form": "kernel", "objective": "matryoshka", "sparsity_weight": 1.0, "lr": 0.2, "steps": 3, "batch_size": 4, "seed": 1,
    "scaling": "raw", "temperature": (1.0, 0.5), "initial": torch.ones(6, 15), "initial_scale": 0.1, "anchor": ANCHOR,
    "anchor_weight": 2.0, "shuffle": False, "intervention": "restore", "positions": "all", "loss": "probability",
    "gate_heads": False, "ablation": "mean", "direction": "noising",
}  # fmt: skip


def test_every_field_tells_two_recipes_apart():
    """In what they go by and in what is written down; the weight of an anchor only if there is one."""
    assert OTHERS.keys() == {field.name for field in fields(Recipe)}
    base = Recipe(anchor=dfa.controls.random_w(SOURCE, ANCHOR.target))
    made = [base, *(replace(base, **{name: value}) for name, value in OTHERS.items())]
    assert len({recipe.key() for recipe in made}) == len(made)
    assert len({json.dumps(recipe.to_meta(), sort_keys=True) for recipe in made}) == len(made)
    assert Recipe(anchor_weight=2.0) == Recipe() and Recipe(anchor_weight=2.0).key() == Recipe().key()


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"form": "low-rank"}, {"form": forms.LowRank()}),
        ({"objective": "sparse"}, {"sparsity_weight": 10.0}),
        ({"objective": objectives.Sparse(2.0)}, {"sparsity_weight": 2.0}),
        ({"initial": torch.ones(2, 3)}, {"form": forms.Full(torch.ones(2, 3))}),
        ({"temperature": 0.5}, {"temperature": (0.5, 0.5)}),
    ],
)
def test_a_recipe_is_what_it_asks_for_however_it_is_spelt(one, same):
    first, second = Recipe(**one), Recipe(**same)
    assert first == second and hash(first) == hash(second) and first.key() == second.key()
    assert first.to_meta() == second.to_meta()


def test_what_is_not_written_down_is_not_trained(any_model):
    """The metadata of an alignment are the recipe's; its W is that of the recipe they describe."""
    scores = {t: dfa.controls.random_scores(SOURCE, seed=i) for i, t in enumerate("ab")}
    pairs = {t: random_pairs(4, 8, seed=i) for i, t in enumerate("ab")}
    recipe = Recipe(form="block", steps=2, sparsity_weight=1.0, batch_size=4)
    found = dfa.fit(any_model, scores, pairs, recipe=recipe, seed=3)
    assert found.meta.items() >= replace(recipe, seed=3).to_meta().items()
    assert found == dfa.fit(any_model, scores, pairs, form="block", steps=2, sparsity_weight=1.0, batch_size=4, seed=3)


def test_the_released_recipe():
    expected = {"intervention": "restore", "positions": "all-padded", "scaling": "raw", "sparsity_weight": 0.1}
    assert RELEASED.to_meta().items() >= (expected | {"gate_heads": False}).items()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("form", "lowrank", "Unknown form 'lowrank'.*Did you mean 'low-rank'"),
        ("objective", "spars", "Unknown objective 'spars'"),
        ("sparsity_weight", -1.0, "sparsity_weight must be 0 or more, not -1.0"),
        ("sparsity_weight", float("nan"), "sparsity_weight must be 0 or more, not nan"),
        ("lr", 0.0, "lr must be positive, not 0.0"),
        ("lr", "fast", "lr must be positive, not 'fast'"),
        ("lr", float("inf"), "lr must be positive, not inf"),
        ("steps", 0, "steps must be an integer of at least 1, not 0"),
        ("steps", 2.5, "steps must be an integer of at least 1, not 2.5"),
        ("batch_size", True, "batch_size must be an integer of at least 1, not True"),
        ("seed", None, "seed must be an integer, not None"),
        ("scaling", "units", "Unknown scaling 'units'.*Did you mean 'unit'"),
        ("temperature", (1.0, 0.0), "temperature must be positive, not 0.0"),
        ("temperature", (1.0,), "temperature must be a number or a pair of numbers"),
        ("initial_scale", -0.1, "initial_scale must be 0 or more"),
        ("anchor", "w.safetensors", "anchor must be an Alignment, not str"),
        ("anchor_weight", -2.0, "anchor_weight must be 0 or more"),
        ("shuffle", "no", "shuffle must be True or False, not 'no'"),
        ("intervention", "restor", "Unknown intervention 'restor'"),
        ("positions", "last", "Unknown positions 'last'"),
        ("loss", "l2", "Unknown loss 'l2'"),
        ("gate_heads", 1, "gate_heads must be True or False, not 1"),
    ],
)  # fmt: skip
def test_one_error_for_every_field(field, value, message):
    made = object.__new__(Recipe)
    with pytest.raises(AlignmentError, match=message):
        unchecked(Recipe.__init__)(made, **{field: value})


def test_options_that_do_not_go_together():
    with pytest.raises(AlignmentError, match="goes with form='full', not 'block'"):
        Recipe(form="block", initial=torch.zeros(6, 15))
    with pytest.raises(AlignmentError, match="needs positions='answer', not 'all'"):
        Recipe(loss="probability", positions="all")

    class Plain(objectives.Objective):
        name = "plain"

        def masks(self, scores, **_):
            raise NotImplementedError

    with pytest.raises(AlignmentError, match="'plain' has no sparsity_weight"):
        Recipe(objective=Plain(), sparsity_weight=1.0)
    with pytest.raises(DfaError, match="Nothing tells two objects"):  # it may be trained, not told from others
        Recipe(objective=Plain()).key()


def test_fit_shows_and_takes_the_fields_of_a_recipe(any_model):
    """One list of options: that of the recipe. `help(dfa.fit)` and type checkers have the same."""
    names = {field.name for field in fields(Recipe)}
    assert Options.__annotations__.keys() == names
    shown = inspect.signature(dfa.fit).parameters
    assert names < shown.keys() and shown["lr"].default == Recipe().lr
    assert all(f"``{name}``" in dfa.fit.__doc__ for name in names)
    scores, pairs = {"a": dfa.controls.random_scores(SOURCE)}, {"a": random_pairs(4, 8)}
    with pytest.raises(AlignmentError, match="Unknown option 'sparsity'.*Did you mean 'sparsity_weight'"):
        dfa.fit(any_model, scores, pairs, sparsity=1.0)
    with pytest.raises(AlignmentError, match="jobs_per_pass must be at least 1"):
        dfa.fit_many(any_model, {"a": (scores, Recipe(steps=1))}, pairs, jobs_per_pass=0)


def test_own_forms_and_objectives_by_name(any_model):
    forms.FORMS.register("narrow", lambda: forms.LowRank(1))
    objectives.OBJECTIVES.register("half", lambda: objectives.TargetSize(0.5))
    assert Recipe(form="narrow", objective="half") == Recipe(
        form=forms.LowRank(1), objective=objectives.TargetSize(0.5)
    )
    with pytest.raises(AlignmentError, match="There is a form 'narrow' already"):
        forms.FORMS.register("narrow", forms.Full)
    one = forms.LowRank(3)
    assert forms.resolve(one) is one and objectives.resolve(objectives.Sparse()) == objectives.Sparse()
