"""MIB's circuit track: both of its areas, circuits of several files, and submissions, written, checked and judged.

MIB takes CPR from circuits ranked by signed scores and CMD from circuits ranked by absolute ones: two curves, so that
neither alone gives both. The files themselves are read and written by :mod:`dfa_lens.data`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dfa_lens.data import mib_graphs
from dfa_lens.data.circuit import Circuit
from dfa_lens.data.curve import MIB_FRACTIONS, FaithfulnessCurve, Protocol
from dfa_lens.data.edge_circuit import EdgeCircuit
from dfa_lens.data.edges import EdgeScores, EdgeSet
from dfa_lens.data.mib_submission import N_CIRCUITS, Entry, check, entries, export
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import FaithfulnessError, FileError
from dfa_lens.evaluation.faithfulness import faithfulness_curve
from dfa_lens.models.backend import HookedModel

__all__ = ["Areas", "Entry", "areas", "check", "circuit", "entries", "evaluate", "export", "of_circuits", "scores"]


@dataclass(frozen=True)
class Areas:
    """Both areas of a ranking, each from its own curve.

    Attributes
    ----------
    signed, absolute:
        The curves by signed and by absolute scores. They are one curve where circuits were given and not scores.
    """

    signed: FaithfulnessCurve
    absolute: FaithfulnessCurve

    @property
    def cpr(self) -> float:
        """Area under f of the signed ranking: higher is better."""
        return self.signed.cpr

    @property
    def cmd(self) -> float:
        """Area under ``|1 - f|`` of the absolute ranking: lower is better."""
        return self.absolute.cmd

    def __str__(self) -> str:
        rows = [f"{'ranking':10}{'CPR':>8}{'CMD':>9}"]
        for name, curve, marks in (("signed", self.signed, "* "), ("absolute", self.absolute, " *")):
            rows.append(f"{name:10}{curve.cpr:8.3f}{marks[0]}{curve.cmd:8.3f}{marks[1]}".rstrip())
        return "\n".join([*rows, "* MIB's"])


def areas(
    model: HookedModel,
    pairs: PromptPairs,
    scores: NodeScores | EdgeScores,
    *,
    protocol: Protocol = "mib",
    batch_size: int | Literal["auto"] = 16,
    metric: str | Callable[..., Tensor] = "logit-difference",
    progress: bool = False,
) -> Areas:
    """CPR of the signed and CMD of the absolute ranking, side by side with the other two.

    Parameters
    ----------
    model, pairs, scores, protocol, batch_size, metric, progress:
        As in :func:`dfa_lens.faithfulness_curve`; the protocol is MIB's unless another is asked for.

    Raises
    ------
    FaithfulnessError, NodeError, ScoreError
        As :func:`dfa_lens.faithfulness_curve`.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> found = dfa.mib.areas(model, pairs, dfa.attribute(model, pairs, method="nap"))
    >>> found.cpr == found.signed.cpr, found.cmd == found.absolute.cmd
    (True, True)
    """

    def curve(ranking: Literal["signed", "absolute"]) -> FaithfulnessCurve:
        return faithfulness_curve(
            model,
            pairs,
            scores,
            protocol=protocol,
            ranking=ranking,
            batch_size=batch_size,
            metric=metric,
            progress=progress,
        )

    return Areas(curve("signed"), curve("absolute"))


def of_circuits(
    model: HookedModel,
    pairs: PromptPairs,
    circuits: Sequence[Circuit | EdgeCircuit | EdgeScores],
    *,
    batch_size: int | Literal["auto"] = 16,
    metric: str | Callable[..., Tensor] = "logit-difference",
) -> FaithfulnessCurve:
    """The curve of several circuits, the smallest first, and the whole model: MIB's for submissions of circuits.

    Parameters
    ----------
    circuits:
        Circuits of nodes or of edges, with the input in their universe or not, or edges that score 1 inside and 0
        outside.
        Nine are taken for MIB's first nine fractions, as MIB does, whatever their sizes; of another number each stands
        at its own fraction.
    model, pairs, batch_size, metric:
        As in :func:`dfa_lens.faithfulness_curve`.

    Raises
    ------
    FaithfulnessError
        If there are none, or two of equal size where each stands at its own fraction.
    NodeError, ScoreError
        If they belong to another model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> scores = dfa.attribute(model, pairs, method="nap", nodes=dfa.NodeSet.heads_and_mlps(model))
    >>> curve = dfa.mib.of_circuits(model, pairs, [scores.circuit(k) for k in (10, 30)])
    >>> curve.sizes.tolist(), len(curve.faithfulness)
    ([10, 30, 54], 3)
    """
    if not circuits:
        raise FaithfulnessError("There are no circuits to run.")
    made = sorted((_one(model, pairs, each, batch_size, metric) for each in circuits), key=lambda one: one.sizes[0])
    n, sizes = made[0].n_nodes, [int(one.sizes[0]) for one in made]
    if any(one.n_nodes != n or one.protocol != made[0].protocol for one in made):
        raise FaithfulnessError("The circuits were not chosen among the same nodes or edges.")
    whole = sizes[-1] == n
    fractions = [size / n for size in sizes] + ([] if whole else [1.0])
    if len(circuits) == N_CIRCUITS and not whole:
        fractions = list(MIB_FRACTIONS)
    elif len(set(fractions)) < len(fractions):
        raise FaithfulnessError(f"Two circuits have the same size ({sizes}): a curve has one at each.")

    def rows(name: str) -> Any:
        found = [getattr(one, name)[:1] for one in made] + ([] if whole else [getattr(made[-1], name)[-1:]])
        return np.concatenate(found)

    return replace(
        made[0],
        fractions=np.array(fractions),
        sizes=np.array(sizes + ([] if whole else [n])),
        per_example=rows("per_example"),
        kl=rows("kl"),
        kl_per_example=rows("kl_per_example"),
        live_sizes=None if made[0].live_sizes is None else rows("live_sizes"),
        ranked=None,
    )


def _one(
    model: HookedModel, pairs: PromptPairs, circuit: Circuit | EdgeCircuit | EdgeScores, batch_size: Any, metric: Any
) -> FaithfulnessCurve:
    """The circuit and the whole model: the k best of scores that are 1 inside and 0 outside."""
    if isinstance(circuit, Circuit):
        inside: NodeScores | EdgeScores = NodeScores(circuit.kept.float(), circuit.universe, circuit.meta)
        size, n = len(circuit), len(circuit.universe)
        protocol: Protocol = "mib" if "input" in circuit.universe else "nodes"
    elif isinstance(circuit, EdgeCircuit):
        inside = EdgeScores(circuit.kept.float(), circuit.universe, circuit.meta)
        size, n = len(circuit), len(circuit.universe)
        protocol = "mib" if circuit.universe.chosen[0].any() else "nodes"
    else:
        inside, protocol = circuit, "mib"
        size, n = int((circuit.flat != 0).sum()), len(circuit.edges)
    sizes = [size, n] if size < n else [0, n]
    curve = faithfulness_curve(
        model, pairs, inside, protocol=protocol, sizes=sizes, batch_size=batch_size, metric=metric
    )
    if size < n:
        return curve
    last = slice(1, None)
    return replace(
        curve,
        fractions=curve.fractions[last],
        sizes=curve.sizes[last],
        per_example=curve.per_example[last],
        kl=curve.kl[last],
        kl_per_example=None if curve.kl_per_example is None else curve.kl_per_example[last],
        live_sizes=None if curve.live_sizes is None else curve.live_sizes[last],
    )


def scores(path: str | Path) -> NodeScores | EdgeScores:
    """What one of MIB's files scores: nodes or edges, JSON or ``.pt``.

    Raises
    ------
    FileError
        If it is no such file, or scores neurons.

    Examples
    --------
    >>> import tempfile, dfa_lens as dfa
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dfa.controls.uniform(dfa.NodeSet.for_sizes(1, 2, with_input=True)).to_mib(f"{folder}/scores.pt")
    ...     len(dfa.mib.scores(f"{folder}/scores.pt"))
    4
    """
    level = mib_graphs.level(path)
    if level == "neurons":
        raise FileError(f"{path} scores neurons; only nodes and edges are run here.")
    return NodeScores.from_mib(path) if level == "nodes" else EdgeScores.from_mib(path)


def circuit(path: str | Path) -> Circuit | EdgeScores:
    """What one of MIB's files says is in the circuit, whatever its scores: nodes, or edges with 1 inside and 0 outside.

    A circuit of nodes without scores is taken for what its file has edges of.

    Raises
    ------
    FileError
        If it is no such file, or is of neurons.
    """
    level = mib_graphs.level(path)
    if level == "neurons":
        raise FileError(f"{path} is of neurons; only nodes and edges are run here.")
    if level == "nodes":
        return Circuit.from_mib(path)
    graph = mib_graphs.read(path, mib_graphs.per_head)
    edges = EdgeSet(graph.n_layers, graph.n_heads)
    inside = torch.where(edges.existing, graph.in_graph.double(), torch.nan)
    return EdgeScores(inside, edges, graph.meta)


def evaluate(
    model: HookedModel,
    pairs: PromptPairs,
    entry: Entry,
    *,
    batch_size: int | Literal["auto"] = 16,
    metric: str | Callable[..., Tensor] = "logit-difference",
    progress: bool = False,
) -> Areas:
    """Judge what a submission has for one task and model: its scores by both rankings, or its circuits.

    Parameters
    ----------
    model, pairs:
        The model, and prompts of the task.
    entry:
        One of :func:`entries`.
    batch_size, metric, progress:
        As in :func:`dfa_lens.faithfulness_curve`.

    Raises
    ------
    FileError
        If a file can't be read.
    FaithfulnessError, NodeError, ScoreError
        As :func:`areas` and :func:`of_circuits`.

    Examples
    --------
    >>> import tempfile, dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = dfa.mib.export(folder, {("ioi", "tiny"): dfa.attribute(model, pairs, method="nap")})
    ...     found = dfa.mib.evaluate(model, pairs, dfa.mib.entries(folder)[0])
    >>> len(found.signed.sizes)
    10
    """
    if len(entry.files) == 1:
        return areas(model, pairs, scores(entry.files[0]), batch_size=batch_size, metric=metric, progress=progress)
    curve = of_circuits(model, pairs, [circuit(path) for path in entry.files], batch_size=batch_size, metric=metric)
    return Areas(curve, curve)
