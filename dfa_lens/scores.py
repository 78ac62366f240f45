"""NodeScores: one number per node, with its provenance."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.errors import FileError, ScoreError, unknown
from dfa_lens.nodes import NodeSet

Ranking = Literal["signed", "absolute"]
"""How nodes are ordered: by score, or by its absolute value. Ties keep node order."""

_FORMAT = "dfa_lens scores 1"


class NodeScores:
    """A score for every node of a node set.

    Positive means: restoring this node's clean activation helps the metric.

    Parameters
    ----------
    values:
        [node], any floating dtype; kept as float32 on the CPU.
    nodes:
        The node set that they belong to.
    meta:
        Where they come from (method, metric, number of examples, …): JSON-like.

    Raises
    ------
    ScoreError
        If the number of values is wrong or one is not finite.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import torch
    >>> nodes = dfa.NodeSet.for_sizes(1, 2)
    >>> scores = dfa.NodeScores(torch.tensor([0.1, 2.0, -1.0]), nodes)
    >>> scores.top(2)
    {'a0.h1': 2.0, 'a0.h0': 0.10000000149011612}
    """

    def __init__(self, values: Float[Tensor, " node"], nodes: NodeSet, meta: Mapping[str, Any] | None = None) -> None:
        values = torch.as_tensor(values).detach().to(device="cpu", dtype=torch.float32)
        if values.ndim != 1 or len(values) != len(nodes):
            raise ScoreError(f"Scores of shape {list(values.shape)} for {len(nodes)} nodes; one per node is needed.")
        finite = torch.isfinite(values)
        if not finite.all():
            bad = [nodes.names[i] for i in (~finite).nonzero()[:, 0].tolist()]
            raise ScoreError(
                f"{len(bad)} of {len(nodes)} scores are not finite (first: {values[~finite][0].item()} at {bad[0]}). "
                "In half precision an overflow in the model is the usual cause."
            )
        self.values: Tensor = values
        self.nodes = nodes
        self.meta: dict[str, Any] = dict(meta or {})

    # --- reading ---------------------------------------------------------------------------------------------

    def order(self, rank: Ranking = "signed") -> Int[Tensor, " node"]:
        """The nodes' positions, best first; ties keep node order."""
        if rank not in ("signed", "absolute"):
            raise unknown("ranking", rank, ("signed", "absolute"), ScoreError)
        key = self.values if rank == "signed" else self.values.abs()
        return torch.argsort(key, descending=True, stable=True)

    def ranks(self, rank: Ranking = "signed") -> Int[Tensor, " node"]:
        """Each node's rank: 1 for the best."""
        out = torch.empty(len(self), dtype=torch.long)
        out[self.order(rank)] = torch.arange(1, len(self) + 1)
        return out

    def top(self, k: int, *, rank: Ranking = "signed") -> dict[str, float]:
        """The ``k`` best nodes, best first, with their scores."""
        if not 0 <= k <= len(self):
            raise ScoreError(f"k must be between 0 and the number of nodes, {len(self)}, not {k}.")
        return {self.nodes.names[i]: float(self.values[i]) for i in self.order(rank)[:k].tolist()}

    def to_frame(self) -> Any:
        """A pandas table, a row per node: node, kind, layer, index, score, rank."""
        import pandas as pd

        return pd.DataFrame(
            {
                "node": self.nodes.names,
                "kind": [node.kind for node in self.nodes],
                "layer": [node.layer for node in self.nodes],
                "index": pd.array([node.index for node in self.nodes], dtype="Int64"),
                "score": self.values.numpy(),
                "rank": self.ranks().numpy(),
            }
        )

    def require(self, nodes: NodeSet, what: str = "these scores") -> None:
        """A :class:`ScoreError` unless the scores belong to ``nodes``."""
        if self.nodes != nodes:
            raise ScoreError(
                f"{what} belong to {len(self.nodes)} nodes ({self.nodes.names[0]} … {self.nodes.names[-1]}), but "
                f"{len(nodes)} are expected ({nodes.names[0]} … {nodes.names[-1]}): they come from another model or "
                "another choice of nodes."
            )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> float:
        """The score of the node called ``name``."""
        return float(self.values[self.nodes.position(name)])

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {score:+.3g}" for name, score in self.top(min(3, len(self))).items())
        method = f"{self.meta['method']}, " if "method" in self.meta else ""
        return f"NodeScores({method}{len(self)} nodes, best: {best})"

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the values, the nodes and the provenance."""
        metadata = {"nodes": json.dumps(self.nodes.to_records()), "meta": json.dumps(self.meta, default=str)}
        save_tensors(path, {"values": self.values}, metadata, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> NodeScores:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not a file of scores.
        """
        tensors, metadata = load_tensors(path, _FORMAT)
        return cls(tensors["values"], NodeSet.from_records(json.loads(metadata["nodes"])), json.loads(metadata["meta"]))

    # --- MIB ---------------------------------------------------------------------------------------------------

    def to_mib(self, path: str | Path) -> None:
        """Write the scores as MIB's circuit-track JSON: ``cfg``, ``nodes`` (score, in_graph) and ``edges`` (none).

        Node names are the same there; "input" gets score 0 when it is not among the nodes, as MIB's loaders want it,
        and "logits" has no score.

        Raises
        ------
        ScoreError
            If the scores are not those of every head and MLP block of a model.
        """
        layers, heads = _layers_and_heads(self.nodes)
        full = NodeSet.for_sizes(layers, heads, with_input=True)
        by_name = dict(zip(self.nodes.names, self.values.tolist(), strict=True))
        nodes: dict[str, Any] = {name: {"score": by_name.get(name, 0.0), "in_graph": True} for name in full.names}
        nodes["logits"] = {"in_graph": True}
        cfg = {
            "n_layers": layers,
            "n_heads": heads,
            "parallel_attn_mlp": False,
            "model_name": str(self.meta.get("model", "")),
        }
        write_atomically(path, json.dumps({"cfg": cfg, "nodes": nodes, "edges": {}}, indent=1).encode())

    @classmethod
    def from_mib(cls, path: str | Path, *, nodes: NodeSet | None = None) -> NodeScores:
        """Read MIB's circuit-track JSON.

        Parameters
        ----------
        nodes:
            The nodes of the model that the scores are for; default: input, heads and MLP blocks, of the sizes that
            the file states.

        Raises
        ------
        FileError
            If the file is not such a file, or lacks a node.
        ScoreError
            If its sizes are not those of ``nodes``.
        """
        try:
            data = json.loads(Path(path).read_text())
            layers, heads = int(data["cfg"]["n_layers"]), int(data["cfg"]["n_heads"])
            entries = dict(data["nodes"])
        except OSError as error:
            raise FileError(f"There is no readable file {path}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise FileError(f"{path} is not a MIB score file (JSON with cfg and nodes): {error!r}.") from error
        if nodes is None:
            nodes = NodeSet.for_sizes(layers, heads, with_input=True)
        elif (wanted := _layers_and_heads(nodes)) != (layers, heads):
            raise ScoreError(
                f"{path} is for {layers} layers × {heads} heads, but the nodes are those of {wanted[0]} layers × "
                f"{wanted[1]} heads."
            )
        values = []
        for name in nodes.names:
            score = entries.get(name, {}).get("score")
            if score is None:
                raise FileError(f"{path} lacks the score of node {name!r}.")
            values.append(float(score))
        return cls(
            torch.tensor(values, dtype=torch.float32),
            nodes,
            {"model": data["cfg"].get("model_name", ""), "format": "mib"},
        )


def _layers_and_heads(nodes: NodeSet) -> tuple[int, int]:
    layers, heads = nodes.n_layers, max((node.size or 0 for node in nodes if node.kind == "head"), default=0)
    if heads == 0 or nodes not in (NodeSet.for_sizes(layers, heads), NodeSet.for_sizes(layers, heads, with_input=True)):
        raise ScoreError(
            "MIB's format holds every head and MLP block of a model (and the input); these are other nodes."
        )
    return layers, heads


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a whole file or none: an interrupted write leaves what was there before."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise FileError(f"Can't write {path}: {error.strerror or error}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes private files; these are ordinary ones
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str], format_name: str) -> None:
    """A safetensors file of ours, written whole or not at all."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(contiguous, {"format": format_name, **metadata}))


def load_tensors(path: str | Path, format_name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file that was written as ``format_name``."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileError(f"There is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise FileError(f"{path} is not a readable safetensors file: {error}.") from error
    if metadata.get("format") != format_name:
        raise FileError(f"{path} is not a file of {format_name.rsplit(' ', 1)[0]!r}.")
    return tensors, metadata
