"""Values by what they hold: equality, hashes and fingerprints."""

import copy
import functools
import subprocess
import sys
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import made_curve, random_pairs, unchecked
from hypothesis import given
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.data.alignment import LinearMap
from dfa_lens.data.content import fingerprint, plain, same
from dfa_lens.errors import AlignmentError, DfaError, ScoreError
from dfa_lens.experiments.study import Setting
from dfa_lens.transfer.forms import Full, Kernel, LowRank

A, B = dfa.NodeSet.for_sizes(2, 2), dfa.NodeSet.for_sizes(3, 3)


def alignment(seed=0, **options):
    W = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
    return dfa.Alignment.of(W, A, B, **options)


def curve(**changes):
    given = {
        "per_example": [[0.0, 0], [1, 1], [2, 2]],
        "clean": [2, 2],
        "corrupt": [0, 0],
        "sizes": [0, 1, 2],
        "n_nodes": 2,
    }
    return made_curve(**(given | changes))


#: how to make an object, and others that differ from it in one thing each
KINDS = {
    "scores": (
        lambda: dfa.NodeScores(torch.arange(6.0), A, {"method": "nap"}),
        [lambda: dfa.NodeScores(torch.arange(6.0) + 1e-6, A), lambda: dfa.NodeScores(torch.arange(12.0), B)],
    ),
    "alignment": (
        lambda: alignment(meta={"lr": 0.1}, history=[{"step": 0}]),
        [
            lambda: alignment(1),
            lambda: alignment(scaling="raw"),
            lambda: alignment(temperature=2.0),
            lambda: alignment(bias=torch.ones(12)),
        ],
    ),
    "pairs": (
        lambda: random_pairs(3),
        [
            lambda: random_pairs(3, seed=1),
            lambda: random_pairs(3)[:2],
            lambda: replace(random_pairs(3), choices=torch.stack([random_pairs(3).answer, random_pairs(3).wrong], 1)),
        ],
    ),
    "curve": (
        curve,
        [lambda: curve(clean=[2, 3]), lambda: curve(n_nodes=3), lambda: curve(sizes=[0, 1, 3], n_nodes=3)],
    ),
    "nodes": (lambda: dfa.NodeSet.for_sizes(2, 2), [lambda: B, lambda: A[::-1]]),
    "kernel": (
        lambda: Kernel({"a": torch.ones(6, 12)}),
        [lambda: Kernel({"a": torch.zeros(6, 12)}), lambda: Kernel({"b": torch.ones(6, 12)}), Kernel],
    ),
    "full": (lambda: Full(torch.ones(6, 12)), [lambda: Full(torch.zeros(6, 12)), Full, lambda: LowRank(6)]),
    "job": (
        lambda: dfa.Job({"a": dfa.controls.uniform(A)}, dfa.Recipe(initial=torch.ones(6, 12))),
        [
            lambda: dfa.Job({"a": dfa.controls.uniform(A)}),
            lambda: dfa.Job({"b": dfa.controls.uniform(A)}, dfa.Recipe(initial=torch.ones(6, 12))),
        ],
    ),
    "setting": (
        lambda: Setting(recipe=dfa.Recipe(initial=torch.ones(2, 3))),
        [
            lambda: Setting(recipe=dfa.Recipe(initial=torch.zeros(2, 3))),
            lambda: Setting(recipe=dfa.Recipe(initial=torch.ones(3, 2))),
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_if_it_holds_the_same(kind):
    make, others = KINDS[kind]
    one, again = make(), make()
    assert one is not again
    assert all(one == other for other in (one, again, copy.deepcopy(one)))
    assert hash(one) == hash(again)
    assert fingerprint(one) == fingerprint(again)
    assert len({one, again}) == 1 and {one: 3}[again] == 3
    for other in others:
        assert one != other()
        assert fingerprint(one) != fingerprint(other())
    assert one != "something else" and one is not None


def test_provenance_does_not_count():
    assert alignment(meta={"seed": 1}, history=[{"step": 0, "loss": 1.0}]) == alignment()
    assert dfa.NodeScores(torch.ones(6), A, {"x": 1}) == dfa.controls.uniform(A)
    assert replace(random_pairs(2), dropped={"x": 1}, tokenizer=object()) == random_pairs(2)


def test_a_hash_stays_when_numbers_change_in_place():
    scores = dfa.controls.uniform(A)
    kept = {scores: "found"}
    scores.values[0] = 7
    assert kept[scores] == "found"


# --- nothing is shared with the caller ---------------------------------------------------------------------------


def own(kind, *values):
    """An object made without the run-time type checks of the tests, which know tensors only."""
    made = object.__new__(kind)
    unchecked(kind.__init__)(made, *values)
    return made


@pytest.mark.parametrize(
    "convert", [lambda t: t, torch.Tensor.numpy, torch.Tensor.double, lambda t: t.double().numpy()]
)
def test_scores_and_alignments_are_copies(convert):
    given = [convert(torch.ones(shape)) for shape in ((6,), (6, 12), (12,))]
    scores, stage = own(dfa.NodeScores, given[0], A), own(LinearMap, given[1], A, B, "raw", given[2])
    for theirs in given:
        theirs[...] = 5
    assert scores == dfa.controls.uniform(A)
    assert scores.values.dtype == stage.W.dtype == stage.bias.dtype == torch.float32
    assert stage == LinearMap(torch.ones(6, 12), A, B, "raw", torch.ones(12))


def test_alignments_are_copies():
    W, bias, meta, history = torch.ones(6, 12), torch.ones(12), {"lr": 0.1}, [{"step": 0}]
    one = dfa.Alignment.of(W, A, B, bias=bias, meta=meta, history=history)
    W.fill_(5), bias.fill_(5), meta.clear(), history[0].clear()
    assert one == dfa.Alignment.of(torch.ones(6, 12), A, B, bias=torch.ones(12))
    assert (one.meta, one.history) == ({"lr": 0.1}, ({"step": 0},))


def test_prompt_pairs_are_copies():
    given = random_pairs(3, ragged=True)
    columns = {
        name: getattr(given, name).to(torch.int32) for name in ("clean", "corrupt", "answer", "wrong", "lengths")
    }
    pairs = dfa.PromptPairs(**columns)
    some = pairs[:2]
    for tensor in columns.values():
        tensor.fill_(0)
    assert pairs == given
    pairs.clean.fill_(0)
    assert some == given[:2]


@pytest.mark.parametrize("values", ["abc", ["1", "2"], None, {"a": 1}, [1j] * 6, [[1.0], [1.0, 2.0]], object()])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(ScoreError, match=r"Scores (must be|of shape)"):
        own(dfa.NodeScores, values, A)
    with pytest.raises(AlignmentError, match="W (must be|has shape)"):
        own(LinearMap, values, A, B)


# --- fingerprints ------------------------------------------------------------------------------------------------

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4), st.binary(max_size=4)
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


def typed(value):
    """A value as a text that tells everything apart that a fingerprint should."""
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{typed(k)}:{typed(v)}" for k, v in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(typed, value)) + "]"
    return f"{type(value).__name__}({value!r})"


@given(values, values)
def test_fingerprints_are_equal_when_the_values_are(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (typed(a) == typed(b))
    assert fingerprint(a) == fingerprint(copy.deepcopy(a))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_go_by_every_number(dtype):
    tensor = (torch.arange(2000) % 7).to(dtype).reshape(40, 50)
    known = fingerprint(tensor)
    assert known == fingerprint(tensor.clone()) == fingerprint(tensor.t().contiguous().t())  # whatever the strides
    changed = tensor.clone()
    changed[20, 25] = changed[20, 25] == 0
    assert fingerprint(changed) != known and repr(changed) == repr(tensor)
    assert fingerprint(tensor.reshape(50, 40)) != known
    assert fingerprint(tensor.to(torch.complex64)) != known
    assert fingerprint(tensor[0, 0]) != fingerprint(tensor[:1, 0])


def test_arrays_go_by_every_number():
    array = np.arange(2000.0)
    assert fingerprint(array) == fingerprint(array.copy())
    assert len({fingerprint(x) for x in (array, array.astype("f4"), array.reshape(2, 1000), array + 1e-9)}) == 4
    assert fingerprint(np.array(["a", None], object)) != fingerprint(np.array(["a", 1], object))
    assert fingerprint(np.float64(0.5)) == fingerprint(0.5)


class Color(Enum):
    RED = 1
    BLUE = 2


@dataclass
class Own:
    x: object
    note: str = field(default="", compare=False)


@dataclass
class Other:
    x: object


def one(cell, trained):
    return 1


def two(cell, trained):
    return 1


def closing_over(number):
    return lambda: number


class Method:
    def __call__(self):
        return 1


def test_other_kinds():
    different = [
        Color.RED, Color.BLUE, 1, 1.0, True, "1", b"1", None, (), {}, set(), {1}, {1: None}, [None],
        Own(1), Own(2), Other(1), Own, Other, one, two, len, min,
        functools.partial(one, 1), functools.partial(one, 2), functools.partial(one, cell=1),
        closing_over(1), closing_over(2), lambda: 1, lambda: 2, lambda x=1: 1, lambda x=2: 1, lambda: len, lambda: min,
        torch.float32, torch.float64, torch.device("cpu"), Path("a"), Path("b"), range(3), slice(3),
    ]  # fmt: skip
    assert len({fingerprint(value) for value in different}) == len(different)
    assert fingerprint(Own(1, "a note")) == fingerprint(Own(1, "another"))
    assert fingerprint([1, 2]) == fingerprint((1, 2))
    assert fingerprint(closing_over(1)) == fingerprint(closing_over(1))
    assert fingerprint({1, 2, 3}) == fingerprint(frozenset({3, 2, 1}))


def test_what_nothing_tells_apart_is_refused():
    looped: list[object] = []
    looped.append(looped)
    for value, message in (
        (object(), "two objects of type builtins.object"),
        ({"a": [Method()]}, "two objects of type .*Method apart: use a dataclass"),
        (Method().__call__, "two objects"),
        (torch.nn.Linear(1, 1), "two objects of type"),
        (looped, "holds itself"),
        (torch.ones(2, device="meta"), "has no bytes to compare"),
    ):
        with pytest.raises(DfaError, match=message):
            fingerprint(value)


def test_fingerprints_are_those_of_every_process():
    """Python's own hashes of texts differ from process to process."""
    code = (
        "import torch, dfa_lens as dfa\nfrom dfa_lens.data.content import fingerprint\n"
        "print(fingerprint([{'b', 'a', 'c'}, {'x': torch.arange(3.)}, dfa.controls.depth_mean, dfa.NodeSet.for_sizes(2, 2)]))"
    )
    here = fingerprint([{"b", "a", "c"}, {"x": torch.arange(3.0)}, dfa.controls.depth_mean, A])
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here


def test_same_and_plain():
    assert same({"a": [torch.ones(2), np.array([np.nan])]}, {"a": [torch.ones(2), np.array([np.nan])]})
    assert not same(torch.ones(2), torch.ones(3)) and not same(torch.ones(2), torch.ones(2).double())
    assert not same(torch.ones(2), [1.0, 1.0]) and not same([1], (1,)) and not same({"a": 1}, {"b": 1})
    found = plain(
        {"form": LowRank(3), 1: np.int64(2), "f": one, "c": Color.RED, "t": (torch.ones(2), Method()), "n": A}
    )
    assert found["form"] == {"type": "LowRank", "rank": 3}
    assert (found["1"], found["c"], found["f"].rsplit(".")[-1]) == (2, "RED", "one")
    assert found["t"] == [f"float32[2] {fingerprint(torch.ones(2))}", "Method"]
    assert found["n"] == f"NodeSet {fingerprint(A)}"
