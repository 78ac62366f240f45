"""Attribution: how much every node matters for the metric.

With A the activation of node j, Δ = A_clean - A_corrupt and m the metric (positive scores: restoring the clean
activation helps):

- ``nap``: s_j = Δ·∂m/∂A at the clean run (node attribution patching).
- ``nap-ig-inputs``: the gradient averaged over runs whose embedding is corrupt + (k/steps)(clean - corrupt),
  k = 1 … steps. ``nap`` is its case of one step.
- ``nap-ig-activations``: the gradient averaged over runs in which the node's hook point, and nothing else, is at
  corrupt + (k/steps)(clean - corrupt): the path integral of that group alone.
- ``exact``: m(clean) - m(clean with this node at its corrupt activation), what the others approximate.
- ``relp``, ``attnlrp``, ``gim``: ``nap`` under other rules for the gradient (:mod:`~dfa_lens.attribution.gradients`).
- ``atp-star``: gradients without one block each (:mod:`~dfa_lens.attribution.atp_star`).
- ``expected-gradients``: ``nap-ig-inputs`` at random places.
- ``matryoshka``, ``node-pruning``, ``ugs``: learned (:mod:`~dfa_lens.attribution.learned`).

All sums run over positions and width, then over examples in float64, and are divided by the number of examples: no
result depends on how the examples are batched.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.attribution.atp_star import AtpStar
from dfa_lens.attribution.exact import Exact
from dfa_lens.attribution.gradients import AttnLrp, ExpectedGradients, Gim, Nap, NapIgInputs, RelP
from dfa_lens.attribution.learned import Matryoshka, NodePruning, UniformGradientSampling
from dfa_lens.attribution.method import Measurement, Method, Sums
from dfa_lens.attribution.paths import NapIgActivations
from dfa_lens.data import metrics
from dfa_lens.data.arguments import expect
from dfa_lens.data.curve import Direction
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.registry import Registry
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import DfaError, unknown
from dfa_lens.models import ablations, backend, memory
from dfa_lens.models.ablations import Ablation
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.memory import Footprint, Need
from dfa_lens.models.runner import Runner

logger = logging.getLogger(__name__)

METHODS: Registry[Method] = Registry(
    "method",
    entries={
        each.name: each
        for each in (
            Nap(),
            NapIgInputs(),
            NapIgActivations(),
            Exact(),
            RelP(),
            AttnLrp(),
            Gim(),
            AtpStar(),
            ExpectedGradients(),
            Matryoshka(),
            NodePruning(),
            UniformGradientSampling(),
        )
    },
)
"""The attribution methods by name; see the module's text for their equations. Add one of your own by ``register``."""

#: Above this part of m(clean) - m(corrupt) left unexplained, the integration steps are called too few.
INCOMPLETE = 0.25
#: ``steps="auto"`` starts here, doubles, and gives up (with a warning) beyond the last.
AUTO_STEPS = (5, 10, 20, 40, 80)


class IntegrationWarning(UserWarning):
    """The integration steps are too few for the scores to mean what they promise."""


@backend.runs("model")
def attribute(
    model: HookedModel,
    pairs: PromptPairs,
    *,
    method: str | Method = "nap-ig-inputs",
    steps: int | Literal["auto"] = 5,
    nodes: NodeSet | None = None,
    metric: str | Callable[..., Tensor] = "logit-difference",
    batch_size: int | Literal["auto"] = 16,
    progress: bool = False,
    mlp_gradient: Literal["output", "input"] = "output",
    accumulate: Literal["own", "all"] = "own",
    tolerance: float = 0.02,
    share_prefix: bool = True,
    seed: int = 0,
    ablation: str | Ablation = "corrupt",
    direction: Direction = "noising",
) -> NodeScores:
    """Score every node by how much its clean activation helps the metric.

    Parameters
    ----------
    model:
        A HookedTransformer or TransformerBridge; left as it was.
    pairs:
        Clean and corrupt prompts with their answers.
    method:
        A name of :data:`METHODS`, or a :class:`~dfa_lens.attribution.method.Method` with options of its own. The
        default costs ``1 + 2·steps`` forward passes a batch and gets the size of large effects much better than
        ``nap`` (3 passes); docs/accuracy.md has the figures of all.
    steps:
        Integration steps of the two ``nap-ig`` methods and draws of ``expected-gradients``, at least 1; 5 as in the
        paper. "auto" doubles them from 5 on until no score moves by more than ``tolerance`` of the largest one.
    nodes:
        Which nodes; default: all attention heads and MLP blocks.
    metric:
        A name of :data:`~dfa_lens.data.metrics.METRICS`, a :class:`~dfa_lens.data.metrics.Metric`, or a function of
        (logits [batch, vocab], pairs) that returns [batch].
    batch_size:
        Examples a pass; integration steps and ablated nodes share a pass where there is room in it. "auto" takes what
        fits into free memory, and half of that after an out-of-memory error. Changes memory and time, never the
        scores.
    progress:
        Show a progress bar.
    mlp_gradient:
        "output" is right. "input" multiplies an MLP's difference at its output with the gradient at its input, as
        the released code does (EAP-IG issue 22): comparison only.
    accumulate:
        "own" is right. "all" makes ``nap-ig-activations`` add up every node's gradient on the passes of every group,
        as the released code does: comparison only.
    tolerance:
        For ``steps="auto"``.
    share_prefix:
        Run the tokens that a batch's clean and corrupt prompts share at their beginning only once, where that can be
        done (see :meth:`~dfa_lens.models.runner.Runner.shared_length`). Changes time, the scores by rounding only.
    seed:
        Of the methods that draw random numbers; torch's own random state is neither read nor changed.
    ablation:
        What stands in the place of a node, instead of its activation in the corrupt run: a name of
        :data:`~dfa_lens.models.ablations.ABLATIONS` or an object of that module. Δ is then A_clean less that, and the
        path of ``nap-ig-inputs`` begins at the embedding's.
    direction:
        "noising" breaks one node of the clean run, as above. "denoising" repairs one node of the corrupt run:
        ``exact`` is then m(corrupt with this node at its clean activation) - m(corrupt), and the gradients are those
        at the corrupt run and on the way to it. Positive scores help in either case.

    Returns
    -------
    NodeScores
        On the CPU in float32. ``.meta["completeness"]`` says how much of the metric's change theory promises as a sum
        ("expected"), what the scores add up to ("explained"), and the part that is missing ("residual", relative):
        for ``nap-ig-inputs`` the embedding's integral against m(clean) - m(corrupt); for ``nap-ig-activations`` each
        group's integral against ablating the group. The other methods promise no sum.

    Raises
    ------
    DfaError
        If a name is misspelt, ``steps`` is below 1, the metric is not finite, or has no gradient and the
        method takes some; or with ``direction="denoising"``, if
        the ablation is another than the corrupt run, or the metric looks at the clean run.
    PromptError, NodeError, HookError
        If pairs or nodes do not fit the model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> scores = dfa.attribute(model, pairs, method="nap")
    >>> scores.values.shape
    torch.Size([54])
    """
    expect(2, "pairs", pairs, PromptPairs)
    own = method if isinstance(method, Method) else METHODS.find(method)
    name = method if isinstance(method, str) else own.name
    if steps != "auto" and (not isinstance(steps, int) or steps < 1):
        raise DfaError(f"steps must be a whole number of at least 1, or 'auto', not {steps!r}.")
    if mlp_gradient not in ("output", "input"):
        raise unknown("mlp_gradient", mlp_gradient, ("output", "input"))
    if accumulate not in ("own", "all"):
        raise unknown("accumulate", accumulate, ("own", "all"))
    if name in ("nap-ig-activations", "exact") and mlp_gradient == "input" and accumulate == "own":
        raise DfaError(
            f"mlp_gradient='input' reproduces the released code, in which {name!r} has it only together with "
            "accumulate='all'."
            if name == "nap-ig-activations"
            else "mlp_gradient says which gradient to take; 'exact' takes none."
        )
    if own.differentiates:
        metrics.require_gradient(metric, name)
    instead = ablations.resolve(ablation)
    pairs, sign = directed(direction, pairs, instead, metric)
    runner = Runner(model)
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(model)
    runner.require(pairs)
    runner.check_points(nodes.points)

    def sums(n: int, size: int, only_new: bool = False) -> Sums:
        units = own.units(nodes, n)
        n_passes = 3 * (len(pairs) // size + 1) * max(1, units // max(1, size))
        with (
            runner.session(passes=n_passes, checkpointing=None if own.checkpointing else False),
            tqdm(total=own.total(nodes, n, len(pairs)), desc=name, unit="run", disable=not progress) as bar,
        ):
            measurement = Measurement(
                runner,
                nodes,
                metrics.checked(metric),
                steps=n,
                batch_size=size,
                share_prefix=share_prefix,
                two_columns=metrics.reads_two_columns(metric),
                mlp_gradient=mlp_gradient,
                accumulate=accumulate,
                done=bar.update,
                seed=seed,
                examples=len(pairs),
                only_new=only_new,
                reference=instead.reference(runner, nodes, pairs, batch_size=size),
            )
            return own.mean(measurement, pairs)

    def made(n: int, found: Sums) -> NodeScores:
        meta: dict[str, Any] = {
            "method": name,
            **own.meta(),
            "metric": metrics.name_of(metric),
            "examples": len(pairs),
            "model": runner.name,
        }
        if own.integrates:
            meta["steps"] = n
        if own.random:
            meta["seed"] = seed
        for option, mode, usual in (("mlp_gradient", mlp_gradient, "output"), ("accumulate", accumulate, "own")):
            if mode != usual:
                meta[option] = mode
        meta |= ablations.described(instead)
        values = dict(found.values)
        if direction == "denoising":
            meta["direction"] = direction
            values["clean"], values["corrupt"] = values["corrupt"], values["clean"]
        meta["metric_clean"], meta["metric_corrupt"] = values["clean"], values["corrupt"]
        if found.whole:
            expected, explained = (sign * sum(each) for each in zip(*found.whole.values(), strict=True))
            gap = sum(abs(one - other) for one, other in found.whole.values())
            residual = gap / max(sum(abs(one) for one, _ in found.whole.values()), 1e-12)
            meta["completeness"] = {"expected": expected, "explained": explained, "residual": residual}
        return NodeScores(sign * found.scores.float(), nodes, meta)

    def scored(size: int) -> NodeScores:
        if steps == "auto" and own.integrates:
            return _until_settled(partial(sums, size=size), made, tolerance)
        n = 1 if steps == "auto" else steps
        return made(n, sums(n, size))

    def need(footprint: Footprint, size: int) -> Need:
        return own.need(footprint, nodes, steps=1, examples=len(pairs), batch=size)

    scores = memory.run(scored, batch_size, runner, pairs, nodes, need)
    residual = scores.meta.get("completeness", {}).get("residual", 0.0)
    if residual > INCOMPLETE and steps != "auto":
        warnings.warn(
            f"{name} with {scores.meta['steps']} steps on {runner.name or 'this model'} leaves {residual:.0%} of the "
            f"metric's change unexplained (see meta['completeness']): {_advice(name)}.",
            IntegrationWarning,
            stacklevel=3,  # past the gate: where the user called
        )
    return scores


def _advice(method: str) -> str:
    """What helps where much is unexplained: of ``nap-ig-inputs`` not always more steps, see the second demo."""
    if method == "nap-ig-inputs":
        return "more steps help on some tasks and make it worse on others; compare with nap-ig-activations or exact"
    return "take more steps, or steps='auto'"


def directed(
    direction: Direction, pairs: PromptPairs, ablation: Ablation, metric: str | Callable[..., Tensor]
) -> tuple[PromptPairs, int]:
    """The pairs that are run, and the sign of what they give.

    Denoising: those with clean and corrupt prompts exchanged, and the same answers; what is broken is then repaired.
    """
    if direction not in get_args(Direction):
        raise unknown("direction", direction, get_args(Direction))
    if direction == "noising":
        return pairs, 1
    if not isinstance(ablation, ablations.Corrupt):
        raise DfaError(
            "direction='denoising' repairs one node of the corrupt run: it goes with ablation='corrupt', not with "
            f"{ablation.name!r}."
        )
    if metrics.needs_clean(metric):
        raise DfaError(
            f"direction='denoising' begins at the corrupt run, and the metric {metrics.name_of(metric)!r} compares "
            "with the clean one: take another metric."
        )
    exchanged = replace(
        pairs,
        clean=pairs.corrupt,
        corrupt=pairs.clean,
        lengths=pairs.corrupt_lengths,
        corrupt_lengths=pairs.lengths,
        choices=None,
        corrupt_choices=None,
    )
    return exchanged, -1


def _until_settled(sums: Callable[..., Sums], made: Callable[[int, Sums], NodeScores], tolerance: float) -> NodeScores:
    """Scores of more and more steps, until they settle. Twice as many are those that were taken and as many between."""
    found = sums(AUTO_STEPS[0])
    scores = made(AUTO_STEPS[0], found)
    change = float("inf")
    for n in AUTO_STEPS[1:]:
        found = found.plus(sums(n, only_new=True)).times(0.5)
        finer = made(n, found)
        change = float((finer.values - scores.values).abs().max() / finer.values.abs().max().clamp_min(1e-12))
        scores = finer
        scores.meta["settled"] = change
        if change <= tolerance:
            return scores
    warnings.warn(
        f"After {AUTO_STEPS[-1]} steps the scores still move by {change:.1%} of the largest one (tolerance "
        f"{tolerance:.1%}).",
        IntegrationWarning,
        stacklevel=6,
    )
    return scores
