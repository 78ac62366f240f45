"""What circuits do: run one, knock it out, generate under it, and how sure it is which nodes are in it.

A circuit is run as faithfulness curves run it: the clean prompt, with every node outside the circuit at its activation
in the corrupt run; of edges, with every edge outside it carrying what its writer does in the corrupt run. The values
themselves, and what can be said of them without a model, are in :mod:`dfa_lens.data.circuit` and
:mod:`dfa_lens.data.edge_circuit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.attribution.attribute import attribute
from dfa_lens.attribution.edges import attribute_edges
from dfa_lens.data import html, metrics
from dfa_lens.data.arguments import expect
from dfa_lens.data.chosen import Overlap
from dfa_lens.data.circuit import Circuit, compare, overlaps, side_by_side
from dfa_lens.data.content import ByContent
from dfa_lens.data.edge_circuit import EdgeCircuit
from dfa_lens.data.edges import EdgeSet, Selection
from dfa_lens.data.membership import EdgeMembership, Membership
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import Ranking
from dfa_lens.data.statistics import UNDEFINED, Interval, enough, resampled
from dfa_lens.errors import CircuitError, PromptError, unknown
from dfa_lens.evaluation.edge_circuits import run_edge_circuit
from dfa_lens.evaluation.node_circuits import need_of_curve, require_model, run_circuits
from dfa_lens.evaluation.runs import Runs, require_gap
from dfa_lens.models import ablations, backend, memory
from dfa_lens.models.ablations import Ablation
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.runner import Runner

__all__ = [
    "CircuitRun",
    "Overlap",
    "ablate",
    "compare",
    "generate",
    "membership",
    "overlaps",
    "run",
    "side_by_side",
]


@dataclass(frozen=True, eq=False, repr=False)
class CircuitRun(ByContent):
    """What a circuit does on prompt pairs.

    Attributes
    ----------
    circuit:
        What was run.
    logits, clean_logits:
        [example, vocab] at the answer, of the circuit and of the whole model; float32.
    values, clean_values, corrupt_values:
        [example] the metric of the circuit, of the clean and of the corrupt run.
    kl:
        [example] KL(P_clean ‖ P_circuit) at the answer.
    """

    circuit: Circuit | EdgeCircuit
    logits: Float[Tensor, "example vocab"]
    clean_logits: Float[Tensor, "example vocab"]
    values: Float[np.ndarray, " example"]
    clean_values: Float[np.ndarray, " example"]
    corrupt_values: Float[np.ndarray, " example"]
    kl: Float[np.ndarray, " example"]

    @cached_property
    def faithfulness(self) -> float:
        """f of the circuit: the ratio of means, as on a curve.

        Raises
        ------
        FaithfulnessError
            If the clean and the corrupt run have the same mean metric.
        """
        clean, corrupt = self.clean_values.mean(), self.corrupt_values.mean()
        require_gap(float(clean), float(corrupt))
        return float((self.values.mean() - corrupt) / (clean - corrupt))

    def interval(self, confidence: float = 0.95, *, resamples: int = 2000, seed: int = 0) -> Interval:
        """Bootstrap interval of :attr:`faithfulness` over examples, the ratio resampled as a ratio.

        Warns
        -----
        StatisticsWarning
            If there is one example only: the interval is (nan, nan).
        """
        n = len(self.values)
        if not enough(n, "an interval", confidence, resamples):
            return UNDEFINED

        def ratio(index: np.ndarray, axis: int = -1) -> np.ndarray:
            rows = index.astype(int)
            corrupt = self.corrupt_values[rows].mean(axis)
            return (self.values[rows].mean(axis) - corrupt) / (self.clean_values[rows].mean(axis) - corrupt)

        (low, high), _ = resampled(np.arange(n), ratio, confidence, resamples, seed)
        return Interval(float(low), float(high))

    @property
    def prediction(self) -> Int[Tensor, " example"]:
        """[example] the token with the largest logit."""
        return self.logits.argmax(1)

    @property
    def agreement(self) -> float:
        """The part of examples on which circuit and model predict the same token."""
        return float((self.prediction == self.clean_logits.argmax(1)).float().mean())

    def to_frame(self) -> Any:
        """A pandas table, a row per example: value, clean, corrupt, kl, prediction, clean_prediction (token ids)."""
        import pandas as pd

        return pd.DataFrame(
            {
                "value": self.values,
                "clean": self.clean_values,
                "corrupt": self.corrupt_values,
                "kl": self.kl,
                "prediction": self.prediction.numpy(),
                "clean_prediction": self.clean_logits.argmax(1).numpy(),
            }
        )

    def __repr__(self) -> str:
        return (
            f"CircuitRun({self.circuit.name!r}: f = {self.faithfulness:.3f}, predicts as the model does on "
            f"{100 * self.agreement:.0f} % of {len(self.values)} examples)"
        )

    def _repr_html_(self) -> str:
        """The examples, for notebooks."""
        return html.shown(repr(self), self.to_frame(), index=True)


@backend.runs("model")
def run(
    model: HookedModel,
    pairs: PromptPairs,
    circuit: Circuit | EdgeCircuit,
    *,
    metric: str | Callable[..., Tensor] = "logit-difference",
    batch_size: int | Literal["auto"] = 16,
    progress: bool = False,
    share_prefix: bool = True,
    ablation: str | Ablation = "corrupt",
) -> CircuitRun:
    """Run the clean prompts with every node (or edge) outside the circuit at its corrupt activation.

    Parameters
    ----------
    model:
        The model that the circuit is of; left as it was.
    pairs:
        Prompts. Those by which the circuit was chosen flatter it.
    circuit:
        Of nodes or of edges. Where its universe has a node "input" that the circuit lacks, nothing clean enters, as in
        the ``mib`` protocol.
    metric, batch_size, share_prefix, ablation:
        As in :func:`~dfa_lens.evaluation.faithfulness.faithfulness_curve`, whose value at this size is the same number.

    Raises
    ------
    CircuitError
        If it is no circuit, or one of the input alone.
    NodeError, ScoreError
        If it is of another model.
    ModelError
        Of edges: if the model can't have them, see :func:`~dfa_lens.attribution.edges.attribute_edges`.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, split="test", n=8)
    >>> circuit = dfa.attribute(model, dfa.tasks.load("ioi", model.tokenizer, n=8), method="nap").circuit(30)
    >>> found = dfa.circuits.run(model, pairs, circuit)
    >>> found.logits.shape[0], 0.5 < found.faithfulness < 1.5
    (8, True)
    """
    expect(2, "pairs", pairs, PromptPairs)
    runner = Runner(model)
    runner.require(pairs)
    chosen, instead = metrics.checked(metric), ablations.resolve(ablation)
    if isinstance(circuit, EdgeCircuit):
        how: Any = {"progress": progress, "share_prefix": share_prefix, "ablation": instead}
        runs = run_edge_circuit(runner, pairs, circuit, chosen, batch_size, **how)
    else:
        universe, keep = _gated(circuit)
        require_model(circuit.universe, circuit.meta, model)
        runner.check_points(universe.points)
        with_input = torch.tensor(["input" in circuit or "input" not in circuit.universe])

        def work(size: int) -> Runs:
            return run_circuits(
                runner,
                pairs,
                universe,
                keep[None],
                with_input,
                chosen,
                batch_size=size,
                progress=progress,
                share_prefix=share_prefix,
                keep_logits=True,
                ablation=instead,
            )

        def need(footprint: Footprint, size: int) -> Need:
            return need_of_curve(footprint, len(pairs), size, 1, 1)

        runs = memory.run(work, batch_size, runner, pairs, universe, need)
    assert runs.logits is not None
    assert runs.clean_logits is not None
    return CircuitRun(
        circuit,
        logits=runs.logits[0],
        clean_logits=runs.clean_logits,
        values=runs.circuits[0].numpy(),
        clean_values=runs.clean.numpy(),
        corrupt_values=runs.corrupt.numpy(),
        kl=runs.kl[0].numpy(),
    )


def _gated(circuit: Any) -> tuple[NodeSet, Tensor]:
    """The nodes of the universe that are kept or corrupted, and which are kept: all but the input."""
    if not isinstance(circuit, Circuit):
        raise CircuitError(f"A Circuit is run, not a {type(circuit).__name__}: scores.circuit(k) makes one of scores.")
    rest = [i for i, node in enumerate(circuit.universe) if node.kind != "input"]
    if not rest:
        raise CircuitError("The circuit is one of the input alone: there is nothing to run in it.")
    return circuit.universe[rest], circuit.kept[rest]


def ablate(model: HookedModel, pairs: PromptPairs, circuit: Circuit | EdgeCircuit, **options: Any) -> CircuitRun:
    """Knock the circuit out: its nodes (or edges) are at their corrupt activations, and all others run.

    The faithfulness of what is left says whether the rest can do without: near 0, the circuit is needed.

    Parameters
    ----------
    circuit:
        What is knocked out. A node "input" in its universe stays clean; edges of the input go with the others.
    options:
        As in :func:`run`.

    Returns
    -------
    CircuitRun
        Of the other nodes or edges.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, split="test", n=8)
    >>> circuit = dfa.attribute(model, pairs, method="nap").circuit(10)
    >>> dfa.circuits.ablate(model, pairs, circuit).faithfulness < 0.3
    True
    """
    if isinstance(circuit, EdgeCircuit):
        return run(model, pairs, ~circuit, **options)
    _gated(circuit)
    rest = ~circuit
    names = ["input", *rest.names] if "input" in circuit else rest.names
    model_of = {key: value for key, value in circuit.meta.items() if key in ("model", "target")}
    rest = Circuit(names, rest.universe, name=rest.name, meta={**rest.meta, **model_of})
    return run(model, pairs, rest, **options)


def generate(
    model: HookedModel,
    pairs: PromptPairs,
    circuit: Circuit | EdgeCircuit,
    *,
    max_new_tokens: int = 8,
    batch_size: int | Literal["auto"] = 16,
    progress: bool = False,
) -> Int[Tensor, "pair new"]:
    """The tokens with which the circuit goes on after the clean prompts, each time the one with the largest logit.

    A node outside the circuit needs a corrupt activation at every position, new ones among them: the corrupt prompt is
    continued by the same tokens.

    Parameters
    ----------
    max_new_tokens:
        How many tokens. Each costs three passes over the whole prompt.

    Returns
    -------
    Tensor
        [pair, new] token ids; ``model.tokenizer.decode`` makes texts of them.

    Raises
    ------
    PromptError
        If the model takes no prompts so long.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, split="test", n=4)
    >>> circuit = dfa.attribute(model, pairs, method="nap").circuit(40)
    >>> dfa.circuits.generate(model, pairs, circuit, max_new_tokens=2).shape
    torch.Size([4, 2])
    """
    if max_new_tokens < 1:
        raise PromptError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    limit = Runner(model).n_ctx
    longest = int(pairs.longest.max()) + max_new_tokens - 1
    if limit is not None and longest > limit:
        raise PromptError(f"The prompts and new tokens are up to {longest} tokens, but the model takes {limit}.")
    new: list[Tensor] = []
    for _ in tqdm(range(max_new_tokens), desc="generate", unit="token", disable=not progress):
        new.append(run(model, pairs, circuit, batch_size=batch_size).prediction)
        if len(new) < max_new_tokens:
            pairs = _continued(pairs, new[-1])
    return torch.stack(new, 1)


def _continued(pairs: PromptPairs, token: Int[Tensor, " pair"]) -> PromptPairs:
    """The pairs with one more token at the end of either prompt."""
    rows = torch.arange(len(pairs))

    def longer(tokens: Tensor, lengths: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(tokens, (0, 1))
        wide[rows, lengths] = token
        return wide

    return replace(
        pairs,
        clean=longer(pairs.clean, pairs.lengths),
        corrupt=longer(pairs.corrupt, pairs.corrupt_lengths),
        lengths=pairs.lengths + 1,
        corrupt_lengths=pairs.corrupt_lengths + 1,
        spans=None if pairs.spans is None else pairs.spans.take(rows, pairs.clean.shape[1] + 1),
    )


@overload
def membership(
    model: HookedModel, pairs: PromptPairs, k: int, *, unit: Literal["nodes"] = "nodes", **options: Any
) -> Membership: ...


@overload
def membership(
    model: HookedModel, pairs: PromptPairs, k: int, *, unit: Literal["edges"], **options: Any
) -> EdgeMembership: ...


def membership(
    model: HookedModel,
    pairs: PromptPairs,
    k: int,
    *,
    unit: Literal["nodes", "edges"] = "nodes",
    ranking: Ranking = "signed",
    selection: Selection = "top",
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Membership | EdgeMembership:
    """For every node or edge, the probability that it is among the k best when other prompts like these had been drawn.

    Each pair is attributed by itself; then pairs are drawn with replacement, their scores averaged, and the k best
    taken (a bootstrap). Of transfers with several seeds: :meth:`Membership.of <dfa_lens.data.membership.Membership.of>`
    and :meth:`~dfa_lens.data.membership.Membership.pooled`.

    Parameters
    ----------
    k:
        The size of the circuit.
    unit:
        Of what: "nodes" or "edges".
    selection:
        Of edges, as for the curve.
    resamples, seed:
        Of the bootstrap.
    options:
        As in :func:`~dfa_lens.attribution.attribute.attribute`: ``method``, ``steps``, ``nodes``, ``metric``, …. Of
        edges as in :func:`~dfa_lens.attribution.edges.attribute_edges`; those of the input are ranked only if ``edges``
        has them.

    Raises
    ------
    CircuitError
        If there are fewer than two pairs, or k is out of range.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> found = dfa.circuits.membership(model, pairs, k=10, method="nap")
    >>> len(found), round(float(found.probabilities.sum()), 3)
    (54, 10.0)
    """
    if unit not in ("nodes", "edges"):
        raise unknown("unit", unit, ("nodes", "edges"), CircuitError)
    if unit == "nodes" and selection != "top":
        raise CircuitError("Only circuits of edges are selected otherwise than from the top: unit='edges'.")
    if unit == "edges":
        readers = options.pop("readers", "grouped")
        edges = options.pop("edges", None) or EdgeSet.of_model(model, readers=readers).without_input()
        options["edges"] = edges
    n = len(edges) if unit == "edges" else len(options.get("nodes") or NodeSet.heads_and_mlps(model))
    if not 0 <= k <= n:
        raise CircuitError(f"k must be between 0 and the number of {unit}, {n}, not {k}.")
    if len(pairs) < 2:
        raise CircuitError("One prompt pair can't be resampled: give several.")
    rows = tqdm(range(len(pairs)), desc="membership", unit="pair", disable=not progress)
    drawn: dict[str, Any] = {"ranking": ranking, "resamples": resamples, "seed": seed}
    if unit == "edges":
        of_edges = [attribute_edges(model, pairs[i : i + 1], **options) for i in rows]
        found = EdgeMembership.resampled(of_edges, k, selection=selection, **drawn)
        return EdgeMembership(found.probabilities, found.edges, k, {**_told(of_edges[0].meta), **found.meta})
    scores = [attribute(model, pairs[i : i + 1], **options) for i in rows]
    of_nodes = Membership.resampled(scores, k, **drawn)
    return Membership(of_nodes.probabilities, of_nodes.nodes, k, {**_told(scores[0].meta), **of_nodes.meta})


def _told(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the scores of one pair say that holds of all of them."""
    return {key: meta[key] for key in ("method", "metric", "model") if key in meta}
