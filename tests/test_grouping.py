"""Which prompts share a pass: against every possible division of a few."""

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfa_lens.transfer.grouping import cheapest


def cost(groups, spans, pass_in_tokens):
    total = 0
    for group in groups:
        ends, firsts = zip(*(spans[i] for i in group), strict=True)
        total += pass_in_tokens + (max(ends) - min(firsts)) * len(group)
    return total


def divisions(n):
    """All ways to cut n neighbours into groups."""
    for size in range(n):
        for cuts in combinations(range(1, n), size):
            yield [range(a, b) for a, b in zip((0, *cuts), (*cuts, n), strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(5, 30), st.integers(0, 4)), min_size=1, max_size=7), st.integers(0, 60))
def test_no_division_of_the_sorted_kinds_is_cheaper(spans, pass_in_tokens):
    found = [group.tolist() for group in cheapest(spans, pass_in_tokens=pass_in_tokens)]
    assert sorted(i for group in found for i in group) == list(range(len(spans)))
    order = sorted(range(len(spans)), key=spans.__getitem__)
    least = min(
        cost([[order[i] for i in group] for group in groups], spans, pass_in_tokens) for groups in divisions(len(spans))
    )
    assert cost(found, spans, pass_in_tokens) <= least


def test_free_passes_never_pad_and_dear_ones_are_few():
    spans = [(10, 0), (20, 0), (10, 0), (30, 5)]
    assert {tuple(group.tolist()) for group in cheapest(spans, pass_in_tokens=0)} == {(0, 2), (1,), (3,)}
    (everything,) = cheapest(spans, pass_in_tokens=10_000)
    assert torch.equal(everything, torch.arange(4))
