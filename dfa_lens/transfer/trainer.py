"""fit: learn W, or A and B for edges, by making the target behave faithfully under the soft mask.

Every step takes a batch of prompt pairs, mixed over tasks. Each example is gated by the mask of its own task,
g = sigmoid(scale(s)·W / T), and the loss is KL(P_clean ‖ P_masked) + λ·mean(g). What decides which W comes out is the
:mod:`~dfa_lens.transfer.recipe`; what W is made of is in :mod:`~dfa_lens.transfer.forms`, masks and losses are in
:mod:`~dfa_lens.transfer.objectives`. Only W gets a gradient; the clean and corrupt runs are computed once and kept
(:mod:`~dfa_lens.transfer.store`), also over several trainings (:func:`fit_many`).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Generic, TypeVar, Unpack, get_args, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.arguments import every_task, expect
from dfa_lens.data.content import ByContent, fingerprint
from dfa_lens.data.edge_alignment import EdgeAlignment
from dfa_lens.data.edges import EdgeScores, EdgeSet
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import AlignmentError, PromptError, TrainingError, unknown
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.runner import Runner
from dfa_lens.transfer.carried import Carried, CarriedEdges, CarriedNodes, Made
from dfa_lens.transfer.objectives import distance
from dfa_lens.transfer.recipe import Options, Recipe, takes_options
from dfa_lens.transfer.store import Cache, EdgeStore, ExampleStore

logger = logging.getLogger(__name__)

Scores = TypeVar("Scores", NodeScores, EdgeScores)

OnStep = Callable[[str, Mapping[str, float | int]], None]
"""Of the name of a training and the record of a step."""


class TrainingWarning(UserWarning):
    """A training that can run but can hardly be meant: a mask saturated from the start, constant scores, few tasks."""


@dataclass(frozen=True, eq=False)
class Job(ByContent, Generic[Scores]):
    """One training among several on the same target, for :func:`fit_many`.

    Attributes
    ----------
    scores:
        Task → source scores, of nodes or of edges: the tasks it trains on.
    recipe:
        How; default: as :func:`fit` does when it is not told otherwise.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(2, 2)
    >>> job = dfa.Job({"ioi": dfa.controls.random_scores(nodes)}, dfa.Recipe(temperature=(1.0, 0.2)))
    >>> job.recipe.temperatures
    (1.0, 0.2)
    """

    scores: Mapping[str, Scores]
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def of_edges(self) -> bool:
        """Whether its scores are of edges."""
        return any(isinstance(each, EdgeScores) for each in self.scores.values())

    def require_one_source(self) -> None:
        """A :class:`~dfa_lens.errors.DfaError` unless all scores are of one kind, and of one source model."""
        first = next(iter(self.scores.values()))
        for task, scores in self.scores.items():
            what = f"The scores of task {task!r}"
            if isinstance(scores, NodeScores) and isinstance(first, NodeScores):
                scores.require(first.nodes, what)
            elif isinstance(scores, EdgeScores) and isinstance(first, EdgeScores):
                scores.require(first.edges, what)
            else:
                raise AlignmentError(f"{what} are {type(scores).__name__}, others are {type(first).__name__}.")


@overload
def fit(
    target: HookedModel,
    scores: Mapping[str, NodeScores] | NodeScores,
    pairs: Mapping[str, PromptPairs] | PromptPairs,
    *,
    recipe: Recipe | None = None,
    nodes: NodeSet | None = None,
    cache: Cache = "device",
    share_prefix: bool = True,
    checkpointing: bool | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
    **options: Unpack[Options],
) -> Alignment: ...


@overload
def fit(
    target: HookedModel,
    scores: Mapping[str, EdgeScores] | EdgeScores,
    pairs: Mapping[str, PromptPairs] | PromptPairs,
    *,
    recipe: Recipe | None = None,
    edges: EdgeSet | None = None,
    cache: Cache = "device",
    share_prefix: bool = True,
    checkpointing: bool | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
    **options: Unpack[Options],
) -> EdgeAlignment: ...


@takes_options
@backend.runs("target")
def fit(
    target: HookedModel,
    scores: Mapping[str, NodeScores] | Mapping[str, EdgeScores] | NodeScores | EdgeScores,
    pairs: Mapping[str, PromptPairs] | PromptPairs,
    *,
    recipe: Recipe | None = None,
    nodes: NodeSet | None = None,
    edges: EdgeSet | None = None,
    cache: Cache = "device",
    share_prefix: bool = True,
    checkpointing: bool | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
    **options: Unpack[Options],
) -> Alignment | EdgeAlignment:
    """Learn the alignment from source scores to the target: W of nodes, or A and B of edges. The scores decide.

    Parameters
    ----------
    target:
        The model to align to; left as it was.
    scores, pairs:
        For every training task, the source model's scores, and prompt pairs made with the *target's* tokenizer. The
        two mappings must name the same tasks. One task is in-distribution training, and needs no mappings; several
        others, zero-shot.
    recipe:
        How W is trained, for those who have it in one piece; default: ``Recipe()``.
    nodes:
        With node scores, the target's nodes; default: all heads and MLP blocks.
    edges:
        With edge scores, the target's edges; default: all of them, with grouped readers. Edges that are left out stay
        open: ``edges.where(writer="[am]*")`` leaves those of the input open, as the protocol ``nodes`` of curves does.
    cache:
        See :data:`~dfa_lens.transfer.store.Cache`.
    share_prefix:
        Run the tokens that clean and corrupt prompts share at their beginning only once, where that can be done (see
        :meth:`~dfa_lens.models.runner.Runner.shared_length`; with ``positions="answer"`` only). Changes time, W by
        rounding only.
    checkpointing:
        True keeps only what goes into each block of the target, and runs every block once more on the way backward: the
        memory of one block instead of all, for about a third more time. None: where weights are offloaded. Prompts are
        then run from their beginning. Changes W by rounding only. Of nodes only.
    progress:
        Show a progress bar.
    on_step:
        Called after each step with the job's name ("fit") and the step's record, as ``.history`` has it: to watch a
        training, with trackio or wandb say.
    options:
        Fields of :class:`~dfa_lens.transfer.recipe.Recipe`, where each is described; they replace those of ``recipe``:
        ``form`` (what is trained), ``objective``, ``sparsity_weight`` (λ) and ``loss`` (what is minimised),
        ``intervention``, ``direction``, ``ablation``, ``positions`` and ``gate_heads`` (what a mask does, and where
        that is measured), ``lr``, ``steps``, ``batch_size``, ``temperature`` and ``shuffle`` (how), ``scaling`` (of
        the scores), ``seed``, ``initial`` and ``initial_scale`` (where W starts), ``anchor`` and ``anchor_weight``
        (what it stays near).

    Returns
    -------
    Alignment or EdgeAlignment
        With ``.history``: step, loss, divergence (what ``loss`` names) and mask_mean of every step. Its ``.meta`` says
        all that the training was asked for.

    Raises
    ------
    AlignmentError
        If the two mappings differ, scores of nodes and edges are mixed, or an option is unknown, out of range, or not
        to be had for edges.
    ScoreError
        If source scores belong to different node sets or models.
    ModelError
        With edge scores, if the model's edges can't be gated (see :func:`dfa_lens.attribute_edges`).
    TrainingError
        If the loss is not finite: at which step, on which tasks. Its ``alignment`` is the last good one.

    Warns
    -----
    TrainingWarning
        If the mask is saturated from the start, all scores of a task are equal, or there are fewer tasks than the
        form can tell apart.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("llama3-tiny-target")
    >>> scores = {"ioi": dfa.attribute(source, dfa.tasks.load("ioi", source.tokenizer, n=4), method="nap")}
    >>> alignment = dfa.fit(target, scores, {"ioi": dfa.tasks.load("ioi", target.tokenizer, n=4)}, steps=2)
    >>> alignment.W.shape, len(alignment.history)
    (torch.Size([54, 110]), 2)
    >>> pairs = {"ioi": dfa.tasks.load("ioi", source.tokenizer, n=4)}
    >>> edge_scores = {"ioi": dfa.attribute_edges(source, pairs["ioi"], method="eap")}
    >>> dfa.fit(source, edge_scores, pairs, steps=2)
    EdgeAlignment(2500 → 2500 edges)
    """
    one = isinstance(scores, (NodeScores, EdgeScores)) and isinstance(pairs, PromptPairs)
    given: Any = {"task": scores} if one else scores
    prompts: Any = {"task": pairs} if one else pairs
    expect(2, "scores", given, Mapping)
    expect(3, "pairs", prompts, Mapping)
    known = [each.name for each in fields(Recipe)]
    misspelt = next((name for name in options if name not in known), None)
    if misspelt is not None:
        raise unknown("option", misspelt, known, AlignmentError)
    job: Any = Job(given, replace(recipe or Recipe(), **options))
    every_task(prompts, given, ("pairs", "scores"))
    shared: Any = {
        "cache": cache,
        "share_prefix": share_prefix,
        "checkpointing": checkpointing,
        "progress": progress,
        "on_step": on_step,
    }
    found: Alignment | EdgeAlignment
    found = fit_many(target, {"fit": job}, prompts, nodes=nodes, edges=edges, **shared)["fit"]
    return found


@overload
def fit_many(
    target: HookedModel,
    jobs: Mapping[str, Job[NodeScores] | tuple[Mapping[str, NodeScores], Recipe]],
    pairs: Mapping[str, PromptPairs],
    *,
    nodes: NodeSet | None = None,
    edges: EdgeSet | None = None,
    cache: Cache = "device",
    share_prefix: bool = True,
    checkpointing: bool | None = None,
    jobs_per_pass: int | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> dict[str, Alignment]: ...


@overload
def fit_many(
    target: HookedModel,
    jobs: Mapping[str, Job[EdgeScores] | tuple[Mapping[str, EdgeScores], Recipe]],
    pairs: Mapping[str, PromptPairs],
    *,
    nodes: NodeSet | None = None,
    edges: EdgeSet | None = None,
    cache: Cache = "device",
    share_prefix: bool = True,
    checkpointing: bool | None = None,
    jobs_per_pass: int | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> dict[str, EdgeAlignment]: ...


@backend.runs("target")
def fit_many(
    target: HookedModel,
    jobs: Mapping[str, Any],
    pairs: Mapping[str, PromptPairs],
    *,
    nodes: NodeSet | None = None,
    edges: EdgeSet | None = None,
    cache: Cache = "device",
    share_prefix: bool = True,
    checkpointing: bool | None = None,
    jobs_per_pass: int | None = None,
    progress: bool = False,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Several trainings on one target: the clean and corrupt runs are shared, and so are the forward passes.

    Each gives what :func:`fit` gives alone, up to rounding: its examples, random numbers and optimiser are its own.
    Runs and passes are shared by trainings whose recipes have the intervention, positions, loss and gate_heads in
    common.

    Parameters
    ----------
    jobs:
        By name, a :class:`Job` or (scores, recipe); a job trains on the tasks that its scores name.
    pairs:
        The training pairs of all tasks that occur.
    jobs_per_pass:
        How many trainings share a forward pass; default: 1 on a CPU, where a pass costs what its examples cost, else
        16, since a small model leaves most of a GPU idle. Of models of a few million parameters a pass costs more than
        its examples on a CPU, too: with 12 a step of the shipped targets takes a quarter less time.
    nodes, edges, cache, share_prefix, checkpointing, progress, on_step:
        As in :func:`fit`; the job is told by its name.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> target = dfa.zoo.load("llama3-tiny-target")
    >>> pairs = {"ioi": dfa.tasks.load("ioi", target.tokenizer, n=4)}
    >>> scores = {"ioi": dfa.controls.random_scores(dfa.NodeSet.for_sizes(6, 8))}
    >>> jobs = {f"seed {seed}": dfa.Job(scores, dfa.Recipe(steps=2, seed=seed)) for seed in (0, 1)}
    >>> list(dfa.fit_many(target, jobs, pairs))
    ['seed 0', 'seed 1']
    """
    if cache not in get_args(Cache):
        raise unknown("cache", cache, get_args(Cache), AlignmentError)
    if jobs_per_pass is not None and jobs_per_pass < 1:
        raise AlignmentError(f"jobs_per_pass must be at least 1, not {jobs_per_pass}.")
    if not jobs:
        return {}
    made = {name: job if isinstance(job, Job) else Job(*job) for name, job in jobs.items()}
    runner = Runner(target)
    used = _used(runner, made.values(), pairs)
    units = _units(target, list(made.values()), nodes, edges)
    if isinstance(units, EdgeSet):  # what edges carry is collected on the way: a block can't run by itself again
        if checkpointing:
            raise AlignmentError("checkpointing is for scores of nodes: leave it out for those of edges.")
        checkpointing = False
    if jobs_per_pass is None:
        jobs_per_pass = 1 if runner.device.type == "cpu" else 16
    total = sum(job.recipe.steps for job in made.values())
    with (
        runner.session(passes=total, checkpointing=checkpointing),
        tqdm(total=total, desc="fit", unit="step", disable=not progress) as bar,
    ):
        runs = {name: Training(job, units, runner.device) for name, job in made.items()}
        told = {id(run): partial(on_step, name) for name, run in runs.items()} if on_step is not None else {}
        for alike in _alike(runs.values()):
            own = {task: used[task] for task in used if any(task in run.tasks for run in alike)}
            loss = _Loss(runner, units, own, alike[0].recipe, cache, share_prefix)
            loss.store.fill(max(run.recipe.batch_size for run in alike))
            for first in range(0, len(alike), jobs_per_pass):
                _train(alike[first : first + jobs_per_pass], loss, bar, told)
    return {name: run.alignment({"target": runner.name}) for name, run in runs.items()}


def _used(runner: Runner, jobs: Iterable[Job], pairs: Mapping[str, PromptPairs]) -> dict[str, PromptPairs]:
    """The pairs of all tasks that are trained on, each of them checked."""
    for job in jobs:
        every_task(job.scores, pairs, ("scores", "pairs"))
        job.require_one_source()
    used = {task: each for task, each in pairs.items() if any(task in job.scores for job in jobs)}
    for task, each in used.items():
        try:
            runner.require(each)
        except PromptError as error:
            raise PromptError(f"Task {task!r}: {error}") from None
    return used


def _units(
    target: HookedModel, jobs: Sequence[Job[Any]], nodes: NodeSet | None, edges: EdgeSet | None
) -> NodeSet | EdgeSet:
    """What is gated: nodes or edges, as the scores are."""
    kinds = {job.of_edges for job in jobs}
    if len(kinds) > 1:
        raise AlignmentError("Some jobs have scores of nodes and others of edges: train them apart.")
    if kinds == {True}:
        if nodes is not None:
            raise AlignmentError("The scores are of edges: name the target's edges, edges=, not its nodes.")
        own = EdgeSet.of_model(target)
        if edges is None:
            return own
        if not edges.fits(target):
            raise AlignmentError(f"The {edges!r} is not of this target, which has the {own!r}.")
        return edges
    if edges is not None:
        raise AlignmentError("The scores are of nodes: name the target's nodes, nodes=, not its edges.")
    return nodes if nodes is not None else NodeSet.heads_and_mlps(target)


def _alike(runs: Iterable[Training]) -> list[list[Training]]:
    """The trainings that can share runs and passes: those that measure the same under the same masks."""
    found: dict[Any, list[Training]] = {}
    for run in runs:
        recipe = run.recipe
        how = (recipe.intervention, recipe.positions, recipe.loss, recipe.gate_heads)
        found.setdefault((*how, recipe.resolved_ablation, recipe.direction), []).append(run)
    return list(found.values())


def _train(
    runs: Sequence[Training], loss: _Loss, bar: Any, told: Mapping[int, Callable[[Mapping[str, float | int]], None]]
) -> None:
    """All steps of some trainings, those of one number together; ``told`` of each."""
    for run in runs:
        run.deal(loss.store)
    for step in range(max(run.recipe.steps for run in runs)):
        active = [run for run in runs if step < run.recipe.steps]
        _step(active, step, loss)
        bar.update(len(active))
        for run in active:
            if id(run) in told:
                told[id(run)](run.history[-1])
        if not bar.disable:
            last = active[0].history[-1]
            bar.set_postfix(divergence=f"{last['divergence']:.3f}", mask=f"{last['mask_mean']:.3f}")


def _step(runs: Sequence[Training], step: int, loss: _Loss) -> None:
    """One optimiser step of every training, all on one forward and one backward pass."""
    with torch.enable_grad():
        drawn = [run.draw(step) for run in runs]
        gates = torch.cat([each.gates for each in drawn])
        sizes = [len(each.rows) for each in drawn]
        found = loss.of(torch.cat([each.rows for each in drawn]), gates)
        total = gates.new_zeros(())
        for run, each, own, slope, unit in zip(runs, drawn, *(part.split(sizes) for part in found), strict=True):
            square = unit.mean().clamp_min(1e-6) ** 2
            divergence = own.mean() / square
            run.note(step, divergence + each.penalty, divergence, each.gates)
            total = total + (each.gates * slope).sum() / len(own) / square + each.penalty
        parameters = [parameter for run in runs for parameter in run.parameters.parameters()]
        gradients = torch.autograd.grad(total, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for run in runs:
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)


class _Loss:
    """How far the target under masks is from its clean run, or under noising from its corrupt one, on the stored
    examples."""

    def __init__(
        self,
        runner: Runner,
        units: NodeSet | EdgeSet,
        pairs: Mapping[str, PromptPairs],
        recipe: Recipe,
        cache: Cache,
        share_prefix: bool,
    ) -> None:
        self.name = recipe.loss
        self.columns: Any = slice(None)
        shared: Any = {"positions": recipe.positions, "cache": cache, "share_prefix": share_prefix}
        shared |= {"ablation": recipe.resolved_ablation, "direction": recipe.direction}
        self.store: ExampleStore
        if isinstance(units, EdgeSet):
            self.store = EdgeStore(runner, units, pairs, **shared)
            return
        nodes = units
        gated = nodes if recipe.gate_heads else nodes.where(lambda node: node.kind != "head")
        runner.check_points(gated.points)
        self.columns = torch.tensor([nodes.position(name) for name in gated.names], device=runner.device)
        self.store = ExampleStore(runner, gated, pairs, intervention=recipe.intervention, **shared)

    def of(
        self, rows: Int[Tensor, " example"], gates: Float[Tensor, "example node"]
    ) -> tuple[Float[Tensor, " example"], Float[Tensor, "example node"], Float[Tensor, " example"]]:
        """Each example's divergence, its gradient by the example's gates, and what it is measured in.

        Group by group of the examples, each with its own backward pass, so that only one group's graph exists at a
        time.
        """
        divergence, gradient, unit = gates.new_zeros(len(rows)), torch.zeros_like(gates), gates.new_ones(len(rows))
        for members in self.store.groups(rows):
            batch = self.store.batch(rows[members])
            group = members.to(gates.device)
            leaf = gates.detach()[group].requires_grad_(True)
            logits = self.store.masked(batch, leaf[:, self.columns])
            own = distance(self.name, batch.log_p_goal, logits, batch.pairs).to(gates.device)
            (gradient[group],) = torch.autograd.grad(own.sum(), [leaf])
            divergence[group] = own.detach()
            if self.name == "logit-difference":
                unit[group] = batch.goal_difference.abs().to(gates.device)
        return divergence, gradient, unit


@dataclass
class _Drawn:
    """What one training brings to a step: its examples, their gates, what is added to its loss."""

    rows: Int[Tensor, " example"]
    gates: Float[Tensor, "example node"]
    penalty: Float[Tensor, ""]


class Training:
    """One training: its numbers, optimiser, random numbers and history."""

    def __init__(self, job: Job[Any], units: NodeSet | EdgeSet, device: torch.device) -> None:
        recipe = job.recipe.for_edges() if isinstance(units, EdgeSet) else job.recipe
        self.job, self.recipe = job, recipe
        self.tasks = tuple(job.scores)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.carried: Carried[Any]
        if isinstance(units, EdgeSet):
            self.carried = CarriedEdges(job.scores, units, recipe, self.generator, device)
        else:
            self.carried = CarriedNodes(job.scores, units, recipe, self.generator, device)
        self.objective, self.parameters = recipe.resolved_objective, self.carried.parameters
        self.optimizer = torch.optim.Adam(self.parameters.parameters(), lr=recipe.lr)
        self.history: list[dict[str, float | int]] = []
        self.examples: dict[str, int] = {}  # how many there are of each task
        self.present: Made | None = None  # the matrices of this step
        self.good: Made | None = None  # the last under which the loss was finite
        self.order: list[Tensor] = []  # the examples of every step
        self.row_task = torch.empty(0)  # for every example of the store, the number of its task here, or -1
        self._warn()

    def _warn(self) -> None:
        needed = self.carried.tasks_needed
        if len(self.tasks) < needed:
            _warn(
                f"form={self.recipe.resolved_form.name!r} can tell {needed} tasks apart, but there are "
                f"{len(self.tasks)}: some of its numbers do nothing."
            )
        for task, scores in self.job.scores.items():
            values = scores.flat if isinstance(scores, EdgeScores) else scores.values
            if len(values) > 1 and "control" not in scores.meta and bool((values == values[0]).all()):
                what = "edges" if isinstance(scores, EdgeScores) else "nodes"
                _warn(f"All source scores of task {task!r} are equal: they say nothing about its {what}.")

    def deal(self, store: ExampleStore) -> None:
        """Draw the order of the examples; all that is left of the random numbers goes to the objective."""
        task = torch.tensor([store.tasks.index(name) for name in self.tasks])
        own = torch.cat([(store.task == i).nonzero()[:, 0] for i in task.tolist()])
        here = torch.full((len(store.tasks),), -1)
        here[task] = torch.arange(len(task))
        self.row_task = here[store.task]
        self.examples = {name: int((store.task == i).sum()) for name, i in zip(self.tasks, task.tolist(), strict=True)}
        recipe = self.recipe
        order = _order(len(own), recipe.batch_size, recipe.steps, self.generator if recipe.shuffle else None)
        self.order = [own[rows] for rows in order]

    def temperature(self, step: int) -> float:
        """T at a step: geometrically from the first to the last."""
        first, last = self.recipe.temperatures
        return float(first * (last / first) ** (step / max(self.recipe.steps - 1, 1)))

    def draw(self, step: int) -> _Drawn:
        """The examples of a step, gated as the present matrices say."""
        made = self.parameters()
        scores = self.carried.scores(made)
        rows = self.order[step]
        masks = self.objective.masks(
            scores[self.row_task[rows].to(scores.device)],
            temperature=self.temperature(step),
            progress=step / self.recipe.steps,
            generator=self.generator,
        )
        penalty = masks.penalty.mean()
        from_anchor = self.carried.from_anchor(made)
        if from_anchor is not None:
            penalty = penalty + self.recipe.anchor_weight * from_anchor
        if step == 0:
            _warn_if_saturated(masks.gates.detach())
        # copies: the optimiser changes the numbers in place
        self.present = tuple(None if each is None else each.detach().clone() for each in made)
        return _Drawn(rows, masks.gates, penalty)

    def note(self, step: int, loss: Tensor, divergence: Tensor, gates: Tensor) -> None:
        """Write down the step, or stop here if its loss is not finite."""
        values = {
            "step": step,
            "loss": loss.item(),
            "divergence": divergence.item(),
            "mask_mean": gates.detach().mean().item(),
        }
        if not math.isfinite(values["loss"]):
            present = sorted({self.tasks[i] for i in self.row_task[self.order[step]].tolist()})
            error = TrainingError(
                f"The loss became {values['loss']} at step {step} on {', '.join(present)} "
                f"(divergence {values['divergence']}): "
                "lower lr, or run the model in float32. The last good alignment is this error's `alignment`."
            )
            error.alignment = self.alignment({}) if self.good is not None else None
            raise error
        self.good = self.present
        self.history.append(values)

    def alignment(self, more: Mapping[str, Any]) -> Any:
        """What was learned; after a failure, what was learned before it. ``more`` goes into its metadata."""
        if len(self.history) == self.recipe.steps:
            with torch.no_grad():
                made = self.parameters()
        else:
            assert self.good is not None
            made = self.good
        trained_on = {
            "tasks": list(self.tasks),
            "scores": {task: fingerprint(scores) for task, scores in self.job.scores.items()},
            "examples": self.examples,
        }
        return self.carried.alignment(
            made,
            scaling=self.recipe.scaling,
            temperature=self.recipe.temperatures[1],
            history=self.history,
            meta={**trained_on, **self.recipe.to_meta(), **more},
        )


def _warn_if_saturated(gates: Float[Tensor, "example node"]) -> None:
    stuck = float(((gates < 0.01) | (gates > 0.99)).float().mean())
    if stuck > 0.5:
        _warn(
            f"{stuck:.0%} of the mask is below .01 or above .99 before the first step, where the gradient is next "
            "to nothing: use scaling='unit', a smaller initial W or a higher temperature."
        )


def _warn(message: str) -> None:
    warnings.warn(message, TrainingWarning, stacklevel=5)


def _order(n: int, batch_size: int, steps: int, generator: torch.Generator | None) -> list[Int[Tensor, " batch"]]:
    """The examples of each step: whole shuffled epochs one after the other, cut into batches."""
    needed = steps * min(batch_size, n)
    epochs = math.ceil(needed / n)
    rows = [torch.randperm(n, generator=generator) if generator is not None else torch.arange(n) for _ in range(epochs)]
    return list(torch.cat(rows)[:needed].split(min(batch_size, n)))
