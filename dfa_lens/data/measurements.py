"""Measurements: what forward passes alone say about every node on a task, with their provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.content import ByContent, float_copy, plain
from dfa_lens.data.files import load_tensors, made_from, parse_json, save_tensors
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import MeasurementError, unknown

_FORMAT = "dfa_lens measurements 1"


class Measurements(ByContent):
    """A table of numbers, a row for every node and a column for every measurement.

    Made by :func:`dfa_lens.measure`. Two are equal (``==``) if values, names and nodes are; where they come from does
    not count.

    Parameters
    ----------
    values:
        [node, measurement], any floating dtype; copied, as float32 on the CPU.
    nodes:
        What the rows belong to.
    names:
        What the columns are called, see :data:`dfa_lens.transfer.measure.MEASURES`.
    meta:
        Where they come from (model, number of examples, …): JSON-like.

    Raises
    ------
    MeasurementError
        If the shape is wrong, a name occurs twice, or a value is not finite.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(1, 2)
    >>> found = dfa.Measurements(torch.tensor([[0.1], [0.4], [0.2]]), nodes, ["change"])
    >>> found.shape, found.scores("change").top(1)
    ((3, 1), {'a0.h1': 0.4000000059604645})
    """

    def __init__(
        self,
        values: Float[Tensor, "node measurement"],
        nodes: NodeSet,
        names: Sequence[str],
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        values = float_copy(values, "Measurements", MeasurementError)
        names = tuple(names)
        if values.ndim != 2 or tuple(values.shape) != (len(nodes), len(names)) or not names:
            raise MeasurementError(
                f"Measurements of shape {list(values.shape)} for {len(nodes)} nodes and {len(names)} names; "
                "[node, measurement] is needed."
            )
        if len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
            raise MeasurementError(f"Measurements need different names, not {', '.join(map(repr, names))}.")
        wrong = (~torch.isfinite(values)).nonzero().tolist()
        if wrong:
            node, column = wrong[0]
            raise MeasurementError(
                f"{len(wrong)} measurements are not finite (first: {names[column]!r} of {nodes.names[node]}, "
                f"{values[node, column].item()}). In half precision an overflow in the model is the usual cause."
            )
        self.values: Tensor = values
        self.nodes = nodes
        self.names: tuple[str, ...] = names
        self.meta: dict[str, Any] = dict(meta or {})

    @property
    def shape(self) -> tuple[int, int]:
        """Number of nodes, number of measurements."""
        return len(self.nodes), len(self.names)

    def __getitem__(self, name: str) -> Float[Tensor, " node"]:
        """One measurement of all nodes."""
        if name not in self.names:
            raise unknown("measurement", name, self.names, MeasurementError)
        return self.values[:, self.names.index(name)]

    def scores(self, name: str) -> NodeScores:
        """One measurement as scores: a ranking that knows nothing else."""
        return NodeScores(self[name], self.nodes, {**self.meta, "method": f"measurement {name}"})

    def without(self, *names: str) -> Measurements:
        """The same table without some columns: which are enough?"""
        for name in names:
            self[name]
        kept = [name for name in self.names if name not in names]
        if not kept:
            raise MeasurementError("No measurement is left.")
        index = [self.names.index(name) for name in kept]
        return Measurements(self.values[:, index], self.nodes, kept, self.meta)

    def to_frame(self) -> Any:
        """A pandas table, a row per node: node, kind, layer, index, and a column for every measurement."""
        import pandas as pd

        columns = {
            "node": list(self.nodes.names),
            "kind": [node.kind for node in self.nodes],
            "layer": [node.layer for node in self.nodes],
            "index": pd.array([node.index for node in self.nodes], dtype="Int64"),
        }
        return pd.DataFrame(columns | {name: self[name].numpy() for name in self.names})

    def _content(self) -> tuple[Any, ...]:
        return self.values, self.nodes, self.names

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"Measurements({len(self.nodes)} nodes: {', '.join(self.names)})"

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the values, names, nodes and the provenance."""
        metadata = {
            "names": json.dumps(self.names),
            "nodes": json.dumps(self.nodes.to_records()),
            "meta": json.dumps(plain(self.meta)),
        }
        save_tensors(path, {"values": self.values}, metadata, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> Measurements:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not a file of measurements.
        """
        tensors, metadata = load_tensors(path, _FORMAT, ("names", "nodes", "meta"))

        def make() -> Measurements:
            values, meta = tensors["values"], parse_json(metadata["meta"])
            if not values.is_floating_point() or not isinstance(meta, dict):
                raise MeasurementError(f"the values are {values.dtype}, the provenance is a {type(meta).__name__}")
            nodes = NodeSet.from_records(parse_json(metadata["nodes"]))
            return cls(values, nodes, parse_json(metadata["names"]), meta)

        return made_from(path, "a file of measurements", make)
