"""MIB's files of nodes, JSON and ``.pt``.

JSON: ``cfg``, ``nodes`` (score, in_graph) and ``edges`` (none are written). ``.pt``: what a graph of edges has, with
scores of 0, and ``nodes_scores`` [writer]. Node names are the same there. "input" gets score 0 when it is not among the
nodes, as MIB's loaders want it, and "logits" has no score.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data import mib_graphs
from dfa_lens.data.files import made_from, read_json, write_atomically
from dfa_lens.data.nodes import NodeSet
from dfa_lens.errors import ScoreError, short

WHAT = "a MIB score file (JSON with cfg and nodes)"


@dataclass(frozen=True)
class NodeGraph:
    """What such a file holds, by node: scores, and which are in the circuit."""

    n_layers: int
    n_heads: int
    scores: Mapping[str, float]
    in_graph: Mapping[str, bool]
    model: str


def write(
    path: str | Path,
    nodes: NodeSet,
    values: Float[Tensor, " node"],
    *,
    model: str,
    kept: Iterable[str] | None = None,
    d_model: int | None = None,
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
    d_model:
        Of the model, which EAP-IG's reader of JSON asks for.

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
    cfg: dict[str, Any] = {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": False, "model_name": model}
    if d_model is not None:
        cfg["d_model"] = int(d_model)
    if Path(path).suffix == ".pt":
        writers, readers, existing = mib_graphs.per_head(layers, heads)
        chosen = torch.tensor([entries[name]["in_graph"] for name in writers])
        buffer = io.BytesIO()
        torch.save(
            {
                "cfg": cfg,
                "src_nodes": writers,
                "dst_nodes": readers,
                "edges_scores": torch.zeros(existing.shape),
                "edges_in_graph": existing & chosen[:, None],
                "nodes_in_graph": chosen,
                "nodes_scores": torch.tensor([entries[name]["score"] for name in writers]),
            },
            buffer,
        )
        write_atomically(path, buffer.getvalue())
        return
    write_atomically(path, json.dumps({"cfg": cfg, "nodes": entries, "edges": {}}, indent=1).encode())


def read(path: str | Path) -> NodeGraph:
    """Read a file; a :class:`~dfa_lens.errors.FileError` for whatever can be wrong with it."""
    if Path(path).suffix == ".pt":
        data = mib_graphs.load_pt(path, WHAT)
        return made_from(path, WHAT, lambda: _from_entries(_entries_of_pt(data)))
    content = read_json(path, WHAT)
    return made_from(path, WHAT, lambda: _from_entries(content))


def _entries_of_pt(data: Any) -> dict[str, Any]:
    """The same as the JSON has."""
    if not isinstance(data, dict):
        raise ScoreError(f"it holds a {type(data).__name__}, not a dictionary")
    names, chosen = data["src_nodes"], data["nodes_in_graph"]
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool:
        raise ScoreError("nodes_in_graph is no tensor of booleans")
    scores = data.get("nodes_scores", chosen.double())  # a circuit that is only in or out has no scores
    for what, tensor in (("nodes_scores", scores), ("nodes_in_graph", chosen)):
        if not isinstance(tensor, Tensor) or tensor.shape != (len(names),):
            raise ScoreError(f"{what} is not one number for each of the {len(names)} src_nodes")
    rows = zip(names, scores.tolist(), chosen.tolist(), strict=True)
    return {"cfg": data["cfg"], "nodes": {name: {"score": score, "in_graph": used} for name, score, used in rows}}


def _from_entries(data: Mapping[str, Any]) -> NodeGraph:
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
    used = {name: bool(entries[name].get("in_graph", True)) for name in scores}
    return NodeGraph(layers, heads, scores, used, str(cfg.get("model_name", "")))


def _score(name: str, entry: object) -> float:
    score = entry.get("score") if isinstance(entry, dict) else None
    if isinstance(entry, dict) and "score" not in entry and isinstance(entry.get("in_graph"), bool):
        score = float(entry["in_graph"])  # a circuit that is only in or out has no scores
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
