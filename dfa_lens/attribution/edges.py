"""Edge attribution: how much every edge matters for the metric.

With Δ_u = clean - corrupt of what writer u adds to the residual stream, and m the metric (positive scores: the clean
activation on this edge helps):

- ``eap``: Δ_u·∂m/∂(input of reader v) at the clean run.
- ``eap-ig-inputs``: the gradient averaged over runs whose embedding is corrupt + (k/steps)(clean - corrupt).
- ``eap-ig-activations``: for the edges of u, the gradient averaged over runs in which the hook point of u (all heads of
  its layer; its MLP; the embedding), and nothing else, is at corrupt + (k/steps)(clean - corrupt).
- ``exact``: m(clean) - m(clean in which v alone reads the corrupt activation of u).
- ``relp``, ``attnlrp``, ``gim``: ``eap`` under other rules for the gradient, as of nodes.
- ``expected-gradients``: ``eap-ig-inputs`` at random places.
- ``matryoshka``, ``edge-pruning``, ``ugs``: learned masks with a gate for each edge.

k = 1 … steps, or 0 … steps - 1 by name. The sum of an edge score by gradients over u's readers is the node score of u
by the method of the same passes (``nap``, ``nap-ig-inputs``, ``nap-ig-activations``, or that of the same name).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.attribution.attribute import INCOMPLETE, IntegrationWarning, directed
from dfa_lens.attribution.edge_methods import (
    AttnLrpEdges,
    Eap,
    EapIgActivations,
    EapIgInputs,
    EdgeMethod,
    EdgeTask,
    ExactEdges,
    ExpectedGradientsEdges,
    GimEdges,
    LearnedEdges,
    RelPEdges,
)
from dfa_lens.attribution.learned import Matryoshka, NodePruning, UniformGradientSampling
from dfa_lens.attribution.method import Measurement
from dfa_lens.data import metrics
from dfa_lens.data.arguments import expect
from dfa_lens.data.curve import Direction
from dfa_lens.data.edges import EdgeScores, EdgeSet, Readers
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.registry import Registry
from dfa_lens.errors import DfaError, EdgeError, unknown
from dfa_lens.models import ablations, backend, memory
from dfa_lens.models.ablations import Ablation
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.runner import Runner
from dfa_lens.models.stream import Stream, require_room

EDGE_METHODS: Registry[EdgeMethod] = Registry(
    "edge method",
    entries={
        "eap": Eap(),
        "eap-ig-inputs": EapIgInputs(),
        "eap-ig-activations": EapIgActivations(),
        "exact": ExactEdges(),
        "relp": RelPEdges(),
        "attnlrp": AttnLrpEdges(),
        "gim": GimEdges(),
        "expected-gradients": ExpectedGradientsEdges(),
        "matryoshka": LearnedEdges(Matryoshka()),
        "edge-pruning": LearnedEdges(NodePruning()),
        "ugs": LearnedEdges(UniformGradientSampling()),
    },
)
"""The edge attribution methods by name; see the module's text for their equations."""

StepPoints = Literal["to-clean", "from-corrupt"]
"""Where on the way from corrupt to clean the gradients of the ``eap-ig`` methods are taken.

- ``to-clean``: k = 1 … steps; the last is the clean run. What node scores do as well.
- ``from-corrupt``: k = 0 … steps - 1, as published edge scores have it.
"""


@backend.runs("model")
def attribute_edges(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    method: str | EdgeMethod = "eap-ig-inputs",
    steps: int = 5,
    readers: Readers = "grouped",
    step_points: StepPoints = "to-clean",
    edges: EdgeSet | None = None,
    metric: str | Callable[..., Tensor] = "logit-difference",
    batch_size: int | Literal["auto"] = 16,
    progress: bool = False,
    share_prefix: bool = True,
    seed: int = 0,
    ablation: str | Ablation = "corrupt",
    direction: Direction = "noising",
) -> EdgeScores:
    """Score every edge by how much the clean activation on it helps the metric.

    No flag of the model is needed, and nothing of size [batch, pos, writers, d_model] is held.

    Parameters
    ----------
    model:
        A HookedTransformer, TransformerBridge or Hugging Face model; left as it was. Where norms stand behind attention
        (Gemma 2 and 3, OLMo 2), an edge from a head carries what its change makes of their norm, the other heads as
        they are: :mod:`dfa_lens.models.stream`.
    pairs:
        Clean and corrupt prompts with their answers.
    method:
        A name of :data:`EDGE_METHODS`, or an instance with options of its own,
        ``LearnedEdges(Matryoshka(iterations=100))``. ``eap`` and its other rules take 3 passes a batch,
        ``eap-ig-inputs`` ``1 + 2·steps``, and all of them the product of all writers with all readers, less than one
        more forward pass. ``eap-ig-activations`` takes passes in proportion to the number of layers, ``exact`` one for
        each edge: for small models, or a sample (``edges=EdgeSet.of_model(model).sample(100)``). The learned ones
        take 500 steps, and for every token of each what all writers add: for small models.
    steps:
        Integration steps of the two ``eap-ig`` methods and draws of ``expected-gradients``, at least 1.
    readers:
        "grouped": keys and values are read by the model's key-value heads. "per-head": by every query head for itself,
        for comparison with published results. Where ``edges`` are given, these decide.
    step_points:
        See :data:`StepPoints`.
    edges:
        Which edges; default: all. The gradient methods cost the same for fewer.
    metric:
        As in :func:`~dfa_lens.attribution.attribute.attribute`.
    batch_size:
        Examples a pass; "auto" takes what fits into free memory. Changes memory and time, never the scores.
    progress:
        Show a progress bar.
    share_prefix, seed, direction:
        As in :func:`~dfa_lens.attribution.attribute.attribute`.
    ablation:
        What a writer's activation on an edge is compared with, instead of that in the corrupt run: as in
        :func:`~dfa_lens.attribution.attribute.attribute`.

    Returns
    -------
    EdgeScores
        On the CPU in float32. ``.meta["completeness"]`` of ``eap-ig-inputs`` as for nodes.

    Raises
    ------
    DfaError
        If a name is misspelt, ``steps`` is below 1, the metric is not finite or has no gradient, or
        ``direction="denoising"`` is asked for with another ablation than the corrupt run.
    EdgeError
        If ``edges`` are those of another model.
    ModelError
        If the model's residual stream is not the sum of what embedding, heads and MLP blocks add.
    PromptError
        If the pairs do not fit the model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> scores = dfa.attribute_edges(model, pairs, method="eap")
    >>> scores.values.shape, len(scores)
    (torch.Size([55, 103]), 2500)
    """
    expect(2, "pairs", pairs, PromptPairs)
    own = method if isinstance(method, EdgeMethod) else EDGE_METHODS.find(method)
    name = method if isinstance(method, str) else type(own).__name__
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise DfaError(f"steps must be a whole number of at least 1, not {steps!r}.")
    if step_points not in get_args(StepPoints):
        raise unknown("step_points", step_points, get_args(StepPoints))
    if own.differentiates:
        metrics.require_gradient(metric, name)
    instead = ablations.resolve(ablation)
    pairs, sign = directed(direction, pairs, instead, metric)
    chosen = EdgeSet.of_model(model, readers=readers) if edges is None else _of_this_model(edges, model)
    runner = Runner(model)
    runner.require(pairs)
    require_room(runner, chosen, pairs, batch_size, "attribute_edges")
    n = steps if own.integrates else 1
    first = 1 if step_points == "to-clean" or not own.has_ends else 0
    fractions = [k / n for k in range(first, first + n)]

    def work(size: int) -> EdgeScores:
        units = own.units(chosen, n)
        n_passes = 3 * (len(pairs) // size + 1) * max(1, units // max(1, size))
        with (
            # readers of single heads take several gradients of one pass, more than a block that runs again can give
            runner.session(passes=n_passes, checkpointing=None if chosen.grouped and own.checkpointing else False),
            tqdm(total=own.total(chosen, n, len(pairs)), desc=name, unit="run", disable=not progress) as bar,
        ):
            task = EdgeTask(Stream(runner, chosen), chosen, fractions)
            measurement = Measurement(
                runner,
                chosen.nodes,
                metrics.checked(metric),
                steps=n,
                batch_size=size,
                share_prefix=share_prefix,
                two_columns=metrics.reads_two_columns(metric),
                done=bar.update,
                seed=seed,
                examples=len(pairs),
                reference=instead.reference(runner, chosen.nodes[1:], pairs, batch_size=size),
            )
            found = own.mean(measurement, pairs, task)
        values = dict(found.values)
        if direction == "denoising":
            values["clean"], values["corrupt"] = values["corrupt"], values["clean"]
        meta = _meta(name, metric, pairs, runner, values, sign) | own.meta() | ablations.described(instead)
        if own.integrates:
            meta["steps"] = n
        if own.has_ends:
            meta["step_points"] = step_points
        if own.random:
            meta["seed"] = seed
        if direction == "denoising":
            meta["direction"] = direction
        return EdgeScores(sign * found.scores, chosen, meta)

    def need(footprint: Footprint, size: int) -> Need:
        return own.need(footprint, chosen, steps=n, examples=len(pairs), batch=size)

    scores = memory.run(work, batch_size, runner, pairs, chosen.nodes, need)
    residual = scores.meta.get("completeness", {}).get("residual", 0.0)
    if residual > INCOMPLETE:
        warnings.warn(
            f"{name} with {steps} steps on {runner.name or 'this model'} leaves {residual:.0%} of the "
            "metric's change unexplained (see meta['completeness']): take more steps.",
            IntegrationWarning,
            stacklevel=3,
        )
    return scores


def _meta(
    method: str,
    metric: str | Callable[..., Tensor],
    pairs: PromptPairs,
    runner: Runner,
    means: dict[str, float],
    sign: int,
) -> dict[str, Any]:
    """The provenance, from what was found on average."""
    meta: dict[str, Any] = {
        "method": method,
        "metric": metrics.name_of(metric),
        "examples": len(pairs),
        "model": runner.name,
        "d_model": int(runner.model.cfg.d_model),
        "metric_clean": means["clean"],
        "metric_corrupt": means["corrupt"],
    }
    if "expected" in means:
        expected, explained = sign * means["expected"], sign * means["explained"]
        residual = abs(expected - explained) / max(abs(expected), 1e-12)
        meta["completeness"] = {"expected": expected, "explained": explained, "residual": residual}
    return meta


def _of_this_model(edges: EdgeSet, model: HookedModel) -> EdgeSet:
    if not edges.fits(model):
        raise EdgeError(f"The {edges!r} are those of another model; this one has the {EdgeSet.of_model(model)!r}.")
    return edges
