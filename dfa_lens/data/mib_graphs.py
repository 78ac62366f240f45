"""MIB's files of edges: the graphs that EAP-IG writes, as JSON and as ``.pt``.

Both hold ``cfg`` (n_layers, n_heads, parallel_attn_mlp, d_model where known). JSON: ``nodes`` (name → in_graph,
"logits" among them) and ``edges`` ("a0.h1->m2" → score, in_graph). ``.pt``: ``src_nodes`` and ``dst_nodes`` (names),
``edges_scores`` and ``edges_in_graph`` [writer, reader], ``nodes_in_graph`` [writer]. Graphs whose nodes are scored
have ``score`` beside ``in_graph`` (JSON) or ``nodes_scores`` [writer] too: :mod:`~dfa_lens.data.mib_nodes` reads those.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dfa_lens.data.files import made_from, read_bytes, read_json, write_atomically
from dfa_lens.errors import ScoreError, short

Level = Literal["nodes", "edges", "neurons"]
"""What a graph ranks."""

WHAT = "an edge graph of MIB (cfg, nodes and edges)"

Frame = Callable[[int, int], tuple[Sequence[str], Sequence[str], Tensor]]
"""Layers and heads → the writers' names, the readers' names, and which edges there are."""


@dataclass(frozen=True)
class Graph:
    """What such a file holds; scores and membership are [writer, reader], 0 and False where there is no edge."""

    n_layers: int
    n_heads: int
    values: Float[Tensor, "writer reader"]
    in_graph: Bool[Tensor, "writer reader"]
    meta: Mapping[str, Any] = field(default_factory=dict)


def write(path: str | Path, graph: Graph, writers: Sequence[str], readers: Sequence[str], existing: Tensor) -> None:
    """Write a graph: as ``.pt`` where the path ends so, else as JSON.

    A :class:`~dfa_lens.errors.ScoreError` if ``existing`` are other edges than those of MLPs that read after attention.
    """
    if not torch.equal(existing, per_head(graph.n_layers, graph.n_heads)[2]):
        raise ScoreError("MIB's graphs of models whose attention and MLP run side by side are not written.")
    cfg: dict[str, Any] = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": False}
    if "d_model" in graph.meta:  # EAP-IG's reader of JSON asks for it
        cfg["d_model"] = int(graph.meta["d_model"])
    cfg["model_name"] = str(graph.meta.get("model", ""))
    if Path(path).suffix == ".pt":
        content = {
            "cfg": cfg,
            "src_nodes": list(writers),
            "dst_nodes": list(readers),
            "edges_scores": graph.values,
            "edges_in_graph": graph.in_graph,
            "nodes_in_graph": graph.in_graph.any(1),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())
        return
    nodes = {name: {"in_graph": bool(used)} for name, used in zip(writers, graph.in_graph.any(1), strict=True)}
    edges = {
        f"{writers[row]}->{readers[column]}": {
            "score": float(graph.values[row, column]),
            "in_graph": bool(graph.in_graph[row, column]),
        }
        for row, column in existing.nonzero().tolist()
    }
    content = {"cfg": cfg, "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges}
    write_atomically(path, json.dumps(content).encode())


def read(path: str | Path, frame: Frame) -> Graph:
    """Read a graph; a :class:`~dfa_lens.errors.FileError` for whatever can be wrong with the file."""
    if Path(path).suffix == ".pt":
        data = load_pt(path, WHAT)
        return made_from(path, WHAT, lambda: _from_pt(data, frame))
    content = read_json(path, WHAT)
    return made_from(path, WHAT, lambda: _from_json(content, frame))


def level(path: str | Path) -> Level:
    """What one of MIB's files scores: the finest level that it has scores of; edges where it has no others.

    Raises
    ------
    FileError
        If it can't be read, or is no graph.
    """
    what = "one of MIB's graphs (with cfg)"
    data = load_pt(path, what) if Path(path).suffix == ".pt" else read_json(path, what)

    def find() -> Level:
        if not isinstance(data, dict) or "cfg" not in data:
            raise ScoreError("it has no cfg")
        if Path(path).suffix == ".pt":
            return "neurons" if "neurons_scores" in data else "nodes" if "nodes_scores" in data else "edges"
        entries = data["nodes"].values() if isinstance(data.get("nodes"), dict) else ()
        found = {key for entry in entries if isinstance(entry, dict) for key in entry}
        if "neurons_scores" in found:
            return "neurons"
        return "nodes" if "score" in found or not data.get("edges") else "edges"

    return made_from(path, what, find)


def per_head(layers: int, heads: int) -> tuple[list[str], list[str], Bool[Tensor, "writer reader"]]:
    """The frame of a graph as EAP-IG lays it out: writers, per-head readers, and which edges there are."""
    writers, readers, before = ["input"], [], []
    for layer in range(layers):
        readers += [f"a{layer}.h{head}<{letter}>" for letter in "qkv" for head in range(heads)]
        before += 3 * heads * [len(writers)]
        writers += [f"a{layer}.h{head}" for head in range(heads)]
        readers.append(f"m{layer}")
        before.append(len(writers))
        writers.append(f"m{layer}")
    readers.append("logits")
    before.append(len(writers))
    return writers, readers, torch.arange(len(writers))[:, None] < torch.tensor(before)


def load_pt(path: str | Path, what: str) -> Any:
    """What a ``.pt`` file holds; no code of the file's is run."""
    raw = read_bytes(path)

    def load() -> Any:
        try:  # weights_only: a file runs no code
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever its formats' readers do
            raise ScoreError(f"torch can't load it as plain tensors ({type(error).__name__})") from error

    return made_from(path, what, load)


def _from_json(data: Mapping[str, Any], frame: Frame) -> Graph:
    cfg, entries = data["cfg"], data["edges"]
    layers, heads = _sizes(cfg)
    if not isinstance(entries, dict):
        raise ScoreError(f"edges is a {type(entries).__name__}, not an object")
    # by the number first, so that a wrong size costs nothing
    expected = n_edges(layers, heads, heads)
    if len(entries) != expected:
        raise ScoreError(f"it has {len(entries)} edges; {layers} layers × {heads} heads have {expected}")
    writers, readers, existing = frame(layers, heads)
    values = torch.zeros(existing.shape, dtype=torch.float64)
    in_graph = torch.zeros(existing.shape, dtype=torch.bool)
    for row, column in existing.nonzero().tolist():
        name = f"{writers[row]}->{readers[column]}"
        if name not in entries:
            raise ScoreError(f"it lacks the edge {name!r}, for {layers} layers × {heads} heads")
        values[row, column] = _score(name, entries[name])
        in_graph[row, column] = bool(entries[name].get("in_graph", True))
    return Graph(layers, heads, values, in_graph, _meta(cfg))


def n_edges(layers: int, heads: int, kv_heads: int) -> int:
    """How many edges a model of these sizes has, told without making any."""
    before = layers + (heads + 1) * layers * (layers - 1) // 2  # the writers before each layer, added up
    return (heads + 2 * kv_heads + 1) * before + layers * heads + 1 + layers * (heads + 1)


def _from_pt(data: Any, frame: Frame) -> Graph:
    if not isinstance(data, dict):
        raise ScoreError(f"it holds a {type(data).__name__}, not a dictionary")
    cfg, in_graph = data["cfg"], data["edges_in_graph"]
    # a circuit that is only in or out has no scores
    values = data["edges_scores"] if "edges_scores" in data else in_graph.double()
    layers, heads = _sizes(cfg)
    if len(data["src_nodes"]) != 1 + layers * (heads + 1):
        raise ScoreError(f"it has {len(data['src_nodes'])} writers, for {layers} layers × {heads} heads")
    writers, readers, existing = frame(layers, heads)
    for what, found, expected in (("writers", data["src_nodes"], writers), ("readers", data["dst_nodes"], readers)):
        if list(found) != list(expected):
            raise ScoreError(f"its {what} are not those of {layers} layers × {heads} heads, in their order")
    for what, tensor in (("edges_scores", values), ("edges_in_graph", in_graph)):
        if not isinstance(tensor, Tensor) or tensor.shape != existing.shape:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ScoreError(f"{what} is {shape}, not {list(existing.shape)}")
    if not values.is_floating_point() or in_graph.dtype != torch.bool:
        raise ScoreError(
            f"edges_scores is {values.dtype} and edges_in_graph {in_graph.dtype}, not numbers and booleans"
        )
    return Graph(layers, heads, values, in_graph & existing, _meta(cfg))


def _meta(cfg: Mapping[str, Any]) -> dict[str, Any]:
    meta: dict[str, Any] = {"model": str(cfg.get("model_name", "")), "format": "mib"}
    if isinstance(cfg.get("d_model"), int):
        meta["d_model"] = cfg["d_model"]
    return meta


def _sizes(cfg: Any) -> tuple[int, int]:
    if not isinstance(cfg, dict):
        raise ScoreError(f"cfg is a {type(cfg).__name__}, not an object")
    found = []
    for name in ("n_layers", "n_heads"):
        size = cfg[name]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ScoreError(f"{name} is {short(repr(size))}, not a positive integer")
        found.append(size)
    if cfg.get("parallel_attn_mlp"):
        raise ScoreError("its attention and MLP run in parallel, which is not supported")
    return found[0], found[1]


def _score(name: str, entry: object) -> float:
    score = entry.get("score") if isinstance(entry, dict) else None
    if isinstance(entry, dict) and "score" not in entry and isinstance(entry.get("in_graph"), bool):
        score = float(entry["in_graph"])  # a circuit that is only in or out has no scores
    if not isinstance(score, (int, float)) or isinstance(score, bool):
        raise ScoreError(f"the score of edge {name!r} is {short(repr(score))}, not a number")
    if not math.isfinite(score):
        raise ScoreError(f"the score of edge {name!r} is {score}")
    return float(score)
