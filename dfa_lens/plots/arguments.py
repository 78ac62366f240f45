"""What figures take: a value of another kind is refused, with the name of the figure that draws it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfa_lens.data import arguments
from dfa_lens.errors import ArgumentError, short

#: By class, the figures of a value.
DRAWN_BY = {
    "NodeScores": "scores_heatmap",
    "EdgeScores": "circuit_graph and edge_heatmap",
    "Circuit": "node_graph",
    "EdgeCircuit": "circuit_graph and node_graph, and with .to_nodes() by whatever draws circuits of nodes",
    "Alignment": "alignment_explorer",
    "FaithfulnessCurve": "curves, by name",
    "Inspection": "node_graph(circuit, inspection=…)",
    "Results": "report",
}


def expect(place: int, name: str, value: object, *kinds: type) -> None:
    """As :func:`dfa_lens.data.arguments.expect`, and says what draws such a value.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.plots.arguments import expect
    >>> expect(1, "scores", dfa.Circuit([], dfa.NodeSet.for_sizes(1, 1)), dfa.NodeScores)
    Traceback (most recent call last):
        ...
    dfa_lens.errors.ArgumentError: The first argument (scores) must be NodeScores, got Circuit (drawn by node_graph).
    """
    arguments.expect(place, name, value, *kinds, note=_drawn_by(value))


def expect_each(name: str, values: object, *kinds: type) -> None:
    """An :class:`~dfa_lens.errors.ArgumentError` unless the first argument is name → value, each of one of some kinds.

    Examples
    --------
    >>> from dfa_lens.plots.arguments import expect_each
    >>> expect_each("circuits", {"ioi": 1}, str)
    Traceback (most recent call last):
        ...
    dfa_lens.errors.ArgumentError: The first argument (circuits) must be name → str, and that of 'ioi' is int.
    """
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(values, Mapping):
        raise ArgumentError(
            f"The first argument ({name}) must be name → {wanted}, got {type(values).__name__}{_drawn_by(values)}."
        )
    for key, value in values.items():
        if not isinstance(value, kinds):
            raise ArgumentError(
                f"The first argument ({name}) must be name → {wanted}, and that of {short(repr(key))} is "
                f"{type(value).__name__}{_drawn_by(value)}."
            )


def _drawn_by(value: Any) -> str:
    drawn = DRAWN_BY.get(type(value).__name__)
    return f" (drawn by {drawn})" if drawn else ""
