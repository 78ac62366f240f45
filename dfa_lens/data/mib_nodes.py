"""MIB's file of nodes: the circuit track's JSON, with ``cfg``, ``nodes`` (score, in_graph) and ``edges`` (none).

Node names are the same there. "input" gets score 0 when it is not among the nodes, as MIB's loaders want it, and
"logits" has no score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.files import write_atomically
from dfa_lens.data.nodes import NodeSet
from dfa_lens.errors import ScoreError, short


def write(
    path: str | Path, nodes: NodeSet, values: Float[Tensor, " node"], *, model: str, kept: Iterable[str] | None = None
) -> None:
    """Write scores, and which nodes are in the circuit.

    Parameters
    ----------
    values:
        [node] the scores.
    model:
        What the model is called.
    kept:
        The names of the nodes in the circuit; default: all.

    Raises
    ------
    ScoreError
        If the nodes are not every head and MLP block of a model.
    """
    layers, heads = layers_and_heads(nodes)
    full = NodeSet.for_sizes(layers, heads, with_input=True)
    by_name = dict(zip(nodes.names, values.tolist(), strict=True))
    inside = set(full.names if kept is None else kept)
    if "input" not in nodes:  # it then stands outside the ranking, in every circuit
        inside.add("input")
    entries: dict[str, Any] = {
        name: {"score": by_name.get(name, 0.0), "in_graph": name in inside} for name in full.names
    }
    entries["logits"] = {"in_graph": True}
    cfg = {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": False, "model_name": model}
    write_atomically(path, json.dumps({"cfg": cfg, "nodes": entries, "edges": {}}, indent=1).encode())


def read(data: Mapping[str, Any]) -> tuple[int, int, dict[str, float]]:
    """Layers, heads and the scores by node of MIB's JSON; a ScoreError or KeyError says what is wrong with it."""
    cfg, entries = data["cfg"], data["nodes"]
    for name, part in (("cfg", cfg), ("nodes", entries)):
        if not isinstance(part, dict):
            raise ScoreError(f"{name} is a {type(part).__name__}, not an object")
    layers, heads = cfg["n_layers"], cfg["n_heads"]
    for name, size in (("n_layers", layers), ("n_heads", heads)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ScoreError(f"{name} is {short(repr(size))}, not a positive integer")
    scores = {name: _score(name, entry) for name, entry in entries.items() if name != "logits"}
    # one name after the other, so that a wrong size ends at the first node that is missing and costs nothing
    known = {"input"}
    for layer in range(layers):
        for name in chain((f"a{layer}.h{head}" for head in range(heads)), [f"m{layer}"]):
            if name not in scores:
                raise ScoreError(f"it lacks the score of node {name!r}, for {layers} layers × {heads} heads")
            known.add(name)
    more = scores.keys() - known
    if more:
        raise ScoreError(f"it has a node {short(min(more))!r}, but {layers} layers × {heads} heads")
    return layers, heads, scores


def _score(name: str, entry: object) -> float:
    score = entry.get("score") if isinstance(entry, dict) else None
    if score is None:
        raise ScoreError(f"it lacks the score of node {short(name)!r}")
    if not isinstance(score, (int, float)) or isinstance(score, bool):
        raise ScoreError(f"the score of node {short(name)!r} is {short(repr(score))}, not a number")
    if not math.isfinite(score):
        raise ScoreError(f"the score of node {short(name)!r} is {score}")
    return float(score)


def layers_and_heads(nodes: NodeSet) -> tuple[int, int]:
    """The sizes of the model whose heads and MLP blocks these are; a ScoreError if they are other nodes."""
    layers, heads = nodes.n_layers, max((node.size or 0 for node in nodes if node.kind == "head"), default=0)
    if heads == 0 or nodes not in (NodeSet.for_sizes(layers, heads), NodeSet.for_sizes(layers, heads, with_input=True)):
        raise ScoreError(
            "MIB's format holds every head and MLP block of a model (and the input); these are other nodes."
        )
    return layers, heads
