"""fit: learn W by making the target behave faithfully under the soft mask.

Every step takes a batch of prompt pairs, mixed over tasks. Each example is gated by the mask of its own task,
g = sigmoid(scale(s)·W / T), and the loss is KL(P_clean ‖ P_masked) + λ·mean(g). What W is made of is in
:mod:`~dfa_lens.transfer.forms`, masks and losses are in :mod:`~dfa_lens.transfer.objectives`. Only W gets a gradient;
the clean and corrupt runs are computed once and kept, also over several trainings (:func:`fit_many`).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.data.alignment import Alignment, Scaling, scale
from dfa_lens.data.content import ByContent, fingerprint, plain
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import AlignmentError, PromptError, TrainingError, unknown
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel, KeysValues
from dfa_lens.models.hooks import Activations, Intervention
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Prefix, Runner, attention_mask
from dfa_lens.transfer import forms, objectives
from dfa_lens.transfer.forms import Form, Full, Problem
from dfa_lens.transfer.objectives import Loss, Objective

logger = logging.getLogger(__name__)

Positions = Literal["answer", "all", "all-padded"]
"""Where the KL is taken.

- ``answer``: at the last real token.
- ``all``: summed over the real tokens.
- ``all-padded``: summed over all positions, padding included and not masked, as the released code does.
"""
Cache = Literal["device", "cpu", "recompute"]
"""Where the clean and corrupt runs are kept: beside the model, in main memory, or nowhere (two more passes a step)."""

RELEASED: Mapping[str, Any] = {
    "intervention": "restore",
    "positions": "all-padded",
    "scaling": "raw",
    "sparsity_weight": 0.1,
    "gate_heads": False,
}
"""The options with which ``fit(..., **RELEASED)`` trains as the authors' released code does, faults included."""


class TrainingWarning(UserWarning):
    """A training that can run but can hardly be meant: a mask saturated from the start, constant scores, few tasks."""


@dataclass(frozen=True, eq=False)
class Job(ByContent):
    """One training among several on the same target, for :func:`fit_many`; every field as in :func:`fit`.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(2, 2)
    >>> dfa.Job({"ioi": dfa.controls.random_scores(nodes)}, temperature=(1.0, 0.2)).temperatures
    (1.0, 0.2)
    """

    scores: Mapping[str, NodeScores]
    form: str | Form = "full"
    objective: str | Objective = "sparse"
    sparsity_weight: float | None = None
    lr: float = 0.1
    steps: int = 200
    batch_size: int = 16
    seed: int = 0
    scaling: Scaling = "unit"
    temperature: float | tuple[float, float] = 1.0
    initial: Float[Tensor, "source target"] | None = field(default=None, repr=False)
    initial_scale: float = 0.01
    anchor: Alignment | None = None
    anchor_weight: float = 1.0
    shuffle: bool = True

    @property
    def temperatures(self) -> tuple[float, float]:
        """T at the first and at the last step."""
        given = self.temperature
        return given if isinstance(given, tuple) else (float(given), float(given))


@backend.runs("target")
def fit(
    target: HookedModel,
    scores: Mapping[str, NodeScores],
    pairs: Mapping[str, PromptPairs],
    *,
    intervention: Intervention = "circuit",
    positions: Positions = "answer",
    sparsity_weight: float | None = None,
    lr: float = 0.1,
    steps: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    nodes: NodeSet | None = None,
    form: str | Form = "full",
    objective: str | Objective = "sparse",
    loss: Loss = "kl",
    scaling: Scaling = "unit",
    temperature: float | tuple[float, float] = 1.0,
    initial: Float[Tensor, "source target"] | None = None,
    initial_scale: float = 0.01,
    anchor: Alignment | None = None,
    anchor_weight: float = 1.0,
    gate_heads: bool = True,
    cache: Cache = "device",
    shuffle: bool = True,
    share_prefix: bool = True,
) -> Alignment:
    """Learn the alignment W from source scores to the target's nodes.

    Parameters
    ----------
    target:
        The model to align to; left as it was.
    scores, pairs:
        For every training task, the source model's scores, and prompt pairs made with the *target's* tokenizer. The
        two mappings must name the same tasks. One task is in-distribution training; several others, zero-shot.
    intervention:
        What the mask does, see :data:`~dfa_lens.hooks.Intervention`; default: what the evaluation measures.
    positions:
        Where the KL is taken, see :data:`Positions`.
    sparsity_weight:
        λ, the weight of the objective's sparsity; default: the objective's own, 10. The paper's 0.1 keeps nearly all
        nodes with scores of unit length.
    lr, steps, batch_size:
        Adam's learning rate, the number of its steps, and the examples in the batch of each.
    seed:
        Of W's start and the order of the examples. The global random state is neither read nor changed.
    nodes:
        The target's nodes; default: all heads and MLP blocks.
    form:
        What W is made of, a name or instance of :mod:`~dfa_lens.transfer.forms`; default: every entry is free.
    objective:
        Masks and penalty, a name or instance of :mod:`~dfa_lens.transfer.objectives`; default: the paper's.
    loss:
        How far the masked run is from the clean one, see :data:`~dfa_lens.transfer.objectives.Loss`.
    scaling:
        What is done to the scores before W, see :data:`~dfa_lens.data.alignment.Scaling`; kept with the alignment.
    temperature:
        T in g = sigmoid(ŝ/T); a pair goes geometrically from the first to the second over the steps, and the
        alignment keeps the second.
    initial, initial_scale:
        W's start (``full`` only), or the standard deviation of its normal start; the default is small, so that every
        mask starts near one half.
    anchor, anchor_weight:
        An alignment W₀ between the same nodes to stay near: anchor_weight·‖W − W₀‖²/‖W₀‖² is added to the loss.
    gate_heads:
        False leaves attention heads ungated, as the released code does without meaning to: comparison only.
    cache:
        See :data:`Cache`.
    shuffle:
        False takes the examples in the order given, again and again.
    share_prefix:
        Run the tokens that clean and corrupt prompts share at their beginning only once, where that can be done (see
        :meth:`~dfa_lens.models.runner.Runner.shared_length`; with ``positions="answer"`` only). Changes time, W by
        rounding only.

    Returns
    -------
    Alignment
        With ``.history``: step, loss, divergence (what ``loss`` names) and mask_mean of every step.

    Raises
    ------
    AlignmentError
        If the two mappings differ, source scores belong to different node sets, or a number is out of range.
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
    """
    job = Job(
        scores=scores,
        form=form,
        objective=objective,
        sparsity_weight=sparsity_weight,
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        scaling=scaling,
        temperature=temperature,
        initial=initial,
        initial_scale=initial_scale,
        anchor=anchor,
        anchor_weight=anchor_weight,
        shuffle=shuffle,
    )
    _check_names(intervention, positions, loss, cache)
    _check_tasks(scores, pairs, all_pairs=True)
    return fit_many(
        target,
        {"fit": job},
        pairs,
        intervention=intervention,
        positions=positions,
        nodes=nodes,
        loss=loss,
        gate_heads=gate_heads,
        cache=cache,
        share_prefix=share_prefix,
        progress=progress,
    )["fit"]


@backend.runs("target")
def fit_many(
    target: HookedModel,
    jobs: Mapping[str, Job],
    pairs: Mapping[str, PromptPairs],
    *,
    intervention: Intervention = "circuit",
    positions: Positions = "answer",
    nodes: NodeSet | None = None,
    loss: Loss = "kl",
    gate_heads: bool = True,
    cache: Cache = "device",
    share_prefix: bool = True,
    jobs_per_pass: int | None = None,
    progress: bool = False,
) -> dict[str, Alignment]:
    """Several trainings on one target: the clean and corrupt runs are shared, and so are the forward passes.

    Each gives what :func:`fit` gives alone, up to rounding: its examples, random numbers and optimiser are its own.

    Parameters
    ----------
    jobs:
        By name; a job trains on the tasks that its scores name.
    pairs:
        The training pairs of all tasks that occur.
    jobs_per_pass:
        How many trainings share a forward pass; default: 1 on a CPU, where a pass costs what its examples cost, else
        16, since a small model leaves most of a GPU idle.
    intervention, positions, nodes, loss, gate_heads, cache, share_prefix, progress:
        As in :func:`fit`.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> target = dfa.zoo.load("llama3-tiny-target")
    >>> pairs = {"ioi": dfa.tasks.load("ioi", target.tokenizer, n=4)}
    >>> scores = {"ioi": dfa.controls.random_scores(dfa.NodeSet.for_sizes(6, 8))}
    >>> jobs = {f"seed {seed}": dfa.Job(scores, steps=2, seed=seed) for seed in (0, 1)}
    >>> list(dfa.fit_many(target, jobs, pairs))
    ['seed 0', 'seed 1']
    """
    _check_names(intervention, positions, loss, cache)
    if not jobs:
        return {}
    for job in jobs.values():
        _check_job(job)
        _check_tasks(job.scores, pairs)
    runner = Runner(target)
    used = tuple(task for task in pairs if any(task in job.scores for job in jobs.values()))
    for task in used:
        try:
            runner.require(pairs[task])
        except PromptError as error:
            raise PromptError(f"Task {task!r}: {error}") from None
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(target)
    device = runner.device
    gated = nodes if gate_heads else nodes.where(lambda node: node.kind != "head")
    runner.check_points(gated.points)
    columns = torch.tensor([nodes.position(name) for name in gated.names], device=device)
    if jobs_per_pass is None:
        jobs_per_pass = 1 if device.type == "cpu" else 16
    total = sum(job.steps for job in jobs.values())
    with (
        runner.session(passes=total),
        tqdm(total=total, desc="fit", unit="step", disable=not progress) as bar,
    ):
        runs = {name: _Run(job, nodes, device) for name, job in jobs.items()}
        data = _Data(runner, gated, used, pairs, intervention, positions, cache, share_prefix)
        data.fill(max(job.batch_size for job in jobs.values()))
        for group in _groups(list(runs.values()), jobs_per_pass):
            for run in group:
                run.start(data)
            for step in range(max(run.job.steps for run in group)):
                active = [run for run in group if step < run.job.steps]
                _step(active, step, data, columns, loss)
                bar.update(len(active))
                if progress:
                    last = active[0].history[-1]
                    bar.set_postfix(divergence=f"{last['divergence']:.3f}", mask=f"{last['mask_mean']:.3f}")
    shared: dict[str, Any] = {
        "intervention": intervention,
        "positions": positions,
        "target": runner.name,
    }
    if loss != "kl":
        shared["loss"] = loss
    if not gate_heads:
        shared["gate_heads"] = False
    return {name: run.alignment(shared, pairs) for name, run in runs.items()}


def _groups(runs: list[_Run], jobs_per_pass: int) -> Iterator[list[_Run]]:
    for first in range(0, len(runs), jobs_per_pass):
        yield runs[first : first + jobs_per_pass]


def _step(runs: Sequence[_Run], step: int, data: _Data, columns: Tensor, loss: Loss) -> None:
    """One optimiser step of every run, all on one forward and one backward pass."""
    with torch.enable_grad():
        drawn = [run.draw(step) for run in runs]
        gates = torch.cat([each.gates for each in drawn])
        sizes = [len(each.rows) for each in drawn]
        found = _divergence(data, torch.cat([each.rows for each in drawn]), gates, columns, loss)
        total = gates.new_zeros(())
        for run, each, (own, slope, unit) in zip(runs, drawn, _split(found, sizes), strict=True):
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


def _divergence(
    data: _Data, rows: Int[Tensor, " example"], gates: Float[Tensor, "example node"], columns: Tensor, loss: Loss
) -> tuple[Float[Tensor, " example"], Float[Tensor, "example node"], Float[Tensor, " example"]]:
    """Each example's divergence, its gradient by the example's gates, and what it is measured in.

    Group by group of the examples, each with its own backward pass, so that only one group's graph exists at a time.
    """
    divergence, gradient, unit = gates.new_zeros(len(rows)), torch.zeros_like(gates), gates.new_ones(len(rows))
    for members in data.groups(rows):
        batch = data.batch(rows[members])
        group = members.to(gates.device)
        leaf = gates.detach()[group].requires_grad_(True)
        own = batch.divergence(data, leaf[:, columns], loss).to(gates.device)
        (gradient[group],) = torch.autograd.grad(own.sum(), [leaf])
        divergence[group] = own.detach()
        if loss == "logit-difference":
            unit[group] = batch.clean_difference().abs().to(gates.device)
    return divergence, gradient, unit


def _split(tensors: Sequence[Tensor], sizes: list[int]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(sizes) for tensor in tensors), strict=True)


@dataclass
class _Drawn:
    """What one run brings to a step: its examples, their gates, what is added to its loss."""

    rows: Int[Tensor, " example"]
    gates: Float[Tensor, "example node"]
    penalty: Float[Tensor, ""]


class _Run:
    """One training: its numbers, optimiser, random numbers and history."""

    def __init__(self, job: Job, nodes: NodeSet, device: torch.device) -> None:
        self.job, self.nodes = job, nodes
        self.tasks = tuple(job.scores)
        self.source = job.scores[self.tasks[0]].nodes
        self.generator = torch.Generator().manual_seed(job.seed)
        self.s = scale(torch.stack([job.scores[task].values for task in self.tasks]), job.scaling).to(device)
        form = forms.resolve(job.form)
        if job.initial is not None:
            if not isinstance(form, Full):
                raise AlignmentError(f"initial sets W itself: it goes with form='full', not {form.name!r}.")
            form = Full(initial=job.initial)
        objective = objectives.resolve(job.objective)
        self.objective = objective if job.sparsity_weight is None else objective.weighted(job.sparsity_weight)
        problem = Problem(self.s, self.source, nodes, self.generator, job.initial_scale)
        self.form, self.parameters = form, form.start(problem)
        self.optimizer = torch.optim.Adam(self.parameters.parameters(), lr=job.lr)
        self.history: list[dict[str, float | int]] = []
        self.present: tuple[Tensor, Tensor | None] | None = None  # W and bias of this step
        self.good: tuple[Tensor, Tensor | None] | None = None  # the last under which the loss was finite
        self.order: list[Tensor] = []  # the examples of every step
        self.row_task = torch.empty(0)  # for every example of the data, the number of its task in this run, or -1
        self.anchor: Tensor | None = None
        if job.anchor is not None:
            if (job.anchor.source, job.anchor.target) != (self.source, nodes):
                raise AlignmentError("`anchor` must be an alignment between the same source and target nodes.")
            self.anchor = job.anchor.W.to(device)
            if not self.anchor.any():
                raise AlignmentError("`anchor` is zero everywhere: there is nothing to stay near.")
        needed = form.tasks_needed(problem)
        if len(self.tasks) < needed:
            _warn(
                f"form={form.name!r} can tell {needed} tasks apart, but there are {len(self.tasks)}: some of its "
                "numbers do nothing."
            )
        for task, scores in job.scores.items():
            if len(scores) > 1 and "control" not in scores.meta and bool((scores.values == scores.values[0]).all()):
                _warn(f"All source scores of task {task!r} are equal: they say nothing about its nodes.")

    def start(self, data: _Data) -> None:
        """Draw the order of the examples; all that is left of the random numbers goes to the objective."""
        task = torch.tensor([data.tasks.index(name) for name in self.tasks])
        own = torch.cat([(data.task == i).nonzero()[:, 0] for i in task.tolist()])
        where = torch.full((len(data.tasks),), -1)
        where[task] = torch.arange(len(task))
        self.row_task = where[data.task]
        job = self.job
        order = _order(len(own), job.batch_size, job.steps, self.generator if job.shuffle else None)
        self.order = [own[rows] for rows in order]

    def temperature(self, step: int) -> float:
        first, last = self.job.temperatures
        return float(first * (last / first) ** (step / max(self.job.steps - 1, 1)))

    def draw(self, step: int) -> _Drawn:
        """The examples of a step, gated as the present W says."""
        W, bias = self.parameters()
        scores = self.s @ W
        if bias is not None:
            scores = scores + bias
        rows = self.order[step]
        masks = self.objective.masks(
            scores[self.row_task[rows].to(scores.device)],
            temperature=self.temperature(step),
            progress=step / self.job.steps,
            generator=self.generator,
        )
        penalty = masks.penalty.mean()
        if self.anchor is not None:
            penalty = penalty + self.job.anchor_weight * ((W - self.anchor) ** 2).sum() / (self.anchor**2).sum()
        if step == 0:
            self._check_saturation(masks.gates.detach())
        # copies: the optimiser changes W in place
        self.present = (W.detach().clone(), None if bias is None else bias.detach().clone())
        return _Drawn(rows, masks.gates, penalty)

    def _check_saturation(self, gates: Tensor) -> None:
        stuck = float(((gates < 0.01) | (gates > 0.99)).float().mean())
        if stuck > 0.5:
            _warn(
                f"{stuck:.0%} of the mask is below .01 or above .99 before the first step, where the gradient is next "
                "to nothing: use scaling='unit', a smaller initial W or a higher temperature."
            )

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
            error.alignment = self.alignment({}, {}) if self.good is not None else None
            raise error
        self.good = self.present
        self.history.append(values)

    def alignment(self, shared: Mapping[str, Any], pairs: Mapping[str, PromptPairs]) -> Alignment:
        """What was learned; after a failure, what was learned before it."""
        if len(self.history) == self.job.steps:
            with torch.no_grad():
                W, bias = self.parameters()
        else:
            assert self.good is not None
            W, bias = self.good
        return Alignment.of(
            W,
            self.source,
            self.nodes,
            scaling=self.job.scaling,
            bias=bias,
            temperature=self.job.temperatures[1],
            history=self.history,
            meta={**self._asked(pairs), **shared},
        )

    def _asked(self, pairs: Mapping[str, PromptPairs]) -> dict[str, Any]:
        """Everything that this training was asked for, as metadata."""
        job = self.job
        asked: dict[str, Any] = {
            "tasks": list(self.tasks),
            "scores": {task: fingerprint(scores) for task, scores in job.scores.items()},
            "examples": {task: len(pairs[task]) for task in self.tasks if task in pairs},
            "form": self.form.name,
            "form_options": _options(self.form),
            "objective": self.objective.name,
            "objective_options": _options(self.objective),
            "sparsity_weight": getattr(self.objective, "sparsity_weight", None),
            "scaling": job.scaling,
            "temperature": list(job.temperatures),
            "initial_scale": job.initial_scale,
            "lr": job.lr,
            "steps": job.steps,
            "batch_size": job.batch_size,
            "shuffle": job.shuffle,
            "seed": job.seed,
        }
        if job.anchor is not None:
            asked |= {"anchor": fingerprint(job.anchor), "anchor_weight": job.anchor_weight}
        return asked


def _options(value: Form | Objective) -> dict[str, Any]:
    """The settings of a form of W or of an objective; tensors by their fingerprint."""
    described = plain(value)
    return {name: each for name, each in described.items() if name != "type"} if isinstance(described, dict) else {}


def _warn(message: str) -> None:
    warnings.warn(message, TrainingWarning, stacklevel=5)


def _check_names(intervention: str, positions: str, loss: str, cache: str) -> None:
    for name, value, valid in (
        ("positions", positions, Positions),
        ("intervention", intervention, Intervention),
        ("cache", cache, Cache),
        ("loss", loss, Loss),
    ):
        if value not in get_args(valid):
            raise unknown(name, value, get_args(valid), AlignmentError)
    if loss != "kl" and positions != "answer":
        raise AlignmentError(f"loss={loss!r} looks at the answer: it needs positions='answer', not {positions!r}.")


def _check_job(job: Job) -> None:
    first, last = job.temperatures
    for name, value, ok, needed in (
        (
            "sparsity_weight",
            job.sparsity_weight if job.sparsity_weight is not None else 0.0,
            (job.sparsity_weight or 0.0) >= 0,
            "0 or more",
        ),
        ("lr", job.lr, job.lr > 0, "positive"),
        ("steps", job.steps, job.steps >= 1, "at least 1"),
        ("batch_size", job.batch_size, job.batch_size >= 1, "at least 1"),
        ("temperature", first, first > 0, "positive"),
        ("temperature", last, last > 0, "positive"),
        ("anchor_weight", job.anchor_weight, job.anchor_weight >= 0, "0 or more"),
        ("initial_scale", job.initial_scale, job.initial_scale >= 0, "0 or more"),
    ):
        if not ok or not math.isfinite(value):
            raise AlignmentError(f"{name} must be {needed}, not {value}.")


def _check_tasks(
    scores: Mapping[str, NodeScores], pairs: Mapping[str, PromptPairs], *, all_pairs: bool = False
) -> None:
    if not scores:
        raise AlignmentError("There is no training task: scores and pairs are empty.")
    sides = [(scores, pairs, ("scores", "pairs"))] + ([(pairs, scores, ("pairs", "scores"))] if all_pairs else [])
    for ours, theirs, names in sides:
        missing = [task for task in ours if task not in theirs]
        if missing:
            raise AlignmentError(f"Task {missing[0]!r} is in {names[0]} but not in {names[1]}; both need every task.")
    source = next(iter(scores.values())).nodes
    for task, each in scores.items():
        each.require(source, f"The scores of task {task!r}")


def _order(n: int, batch_size: int, steps: int, generator: torch.Generator | None) -> list[Int[Tensor, " batch"]]:
    """The examples of each step: whole shuffled epochs one after the other, cut into batches."""
    needed = steps * min(batch_size, n)
    epochs = math.ceil(needed / n)
    rows = [torch.randperm(n, generator=generator) if generator is not None else torch.arange(n) for _ in range(epochs)]
    return list(torch.cat(rows)[:needed].split(min(batch_size, n)))


@dataclass
class _Batch:
    """What one step needs: prompts to run, the other runs' activations, and what the clean run predicted."""

    pairs: PromptPairs
    clean: Activations | None
    corrupt: Activations | None
    log_p_clean: Float[Tensor, "..."]
    prefix: Prefix | None

    def divergence(self, data: _Data, gates: Float[Tensor, "example node"], loss: Loss) -> Float[Tensor, " example"]:
        """How far the run under these gates is from the clean one."""
        pairs = self.pairs
        run = PairedRun(data.runner, pairs, data.nodes, share_prefix=False, prefix=self.prefix, positions=data.where)
        logits = run.gated(data.nodes, gates, clean=self.clean, corrupt=self.corrupt, intervention=data.intervention)
        log_p = logits.float().log_softmax(-1)
        target = self.log_p_clean.to(log_p.device)
        if loss != "kl":
            rows = torch.arange(len(pairs), device=log_p.device)
            answer, wrong = pairs.answer.to(log_p.device), pairs.wrong.to(log_p.device)
            if loss == "probability":
                return (target[rows, answer].exp() - log_p[rows, answer].exp()) ** 2
            return (log_p[rows, answer] - log_p[rows, wrong] - self.clean_difference().to(log_p.device)) ** 2
        divergence = (target.exp() * (target - log_p)).sum(-1)
        if data.where == "all":
            shortest = torch.minimum(pairs.lengths, pairs.corrupt_lengths)
            real = attention_mask(shortest.to(divergence.device), divergence.shape[1])
            divergence = (divergence * real).sum(1)
        return divergence

    def clean_difference(self) -> Float[Tensor, " example"]:
        """logit(answer) - logit(wrong) of the clean run."""
        two = torch.stack([self.pairs.answer, self.pairs.wrong], 1).to(self.log_p_clean.device)
        right, wrong = self.log_p_clean.gather(1, two).unbind(1)
        return right - wrong


class _Data:
    """All training examples, and the clean and corrupt runs on them."""

    def __init__(
        self,
        runner: Runner,
        nodes: NodeSet,
        tasks: tuple[str, ...],
        pairs: Mapping[str, PromptPairs],
        intervention: Intervention,
        positions: Positions,
        cache: Cache,
        share_prefix: bool,
    ) -> None:
        self.runner, self.nodes, self.intervention, self.cache = runner, nodes, intervention, cache
        self.tasks = tasks
        # the loss is measured here, whatever metric the pairs are otherwise measured by
        self.pairs = PromptPairs.concat([pairs[task] for task in tasks])
        if positions == "all-padded":  # padding is taken for real tokens
            full = torch.full_like(self.pairs.lengths, self.pairs.clean.shape[1])
            self.pairs = replace(self.pairs, lengths=full, corrupt_lengths=full)
        self.task = torch.cat([torch.full((len(pairs[task]),), i) for i, task in enumerate(tasks)])
        self.where: Literal["answer", "all"] = "answer" if positions == "answer" else "all"
        self.share_prefix = share_prefix and self.where == "answer"
        self.needs = {"circuit": ("corrupt",), "restore": ("clean",), "interpolate": ("clean", "corrupt")}[intervention]
        self.kept: dict[str, dict[str, _Store]] = {}
        self.log_p: _Store | None = None
        self.keys_and_values: list[tuple[_Store, ...]] = []
        self.prefix_axis = 0
        self.first = torch.zeros(len(self.pairs), dtype=torch.long)  # where each example's runs begin

    def __len__(self) -> int:
        return len(self.pairs)

    def fill(self, batch_size: int) -> None:
        """Run everything once and keep it, unless it is to be recomputed."""
        if self.cache == "recompute":
            return
        layout = self.runner.layout(self.nodes.points, positions=self.where)
        axes = {point: each.position_axes for point, each in layout.items()}
        for rows, part in self.runner.batches(self.pairs, batch_size):
            found = self._compute(part, keep_prefix=True)
            self.first[rows] = found.first
            for name, activations in found.runs.items():
                store = self.kept.setdefault(name, {})
                for point, activation in activations.items():
                    if point not in store:
                        store[point] = self._store(activation, axes[point])
                    kept = store[point]
                    kept.put(rows, found.first, activation)
                    if point in found.before:  # the same in the clean and in the corrupt run
                        kept.put(rows, 0, found.before[point])
            if found.prefix is not None:
                known = found.prefix.kept
                self.prefix_axis = known.axis
                for layer, each in enumerate(zip(known.keys, known.values, strict=True)):
                    if layer == len(self.keys_and_values):
                        self.keys_and_values.append(tuple(self._store(kept, (known.axis,)) for kept in each))
                    for kept, tensor in zip(self.keys_and_values[layer], each, strict=True):
                        kept.put(rows, 0, tensor)
            if self.log_p is None:
                self.log_p = self._store(found.log_p, (1,) if found.log_p.ndim == 3 else (), here=True)
            self.log_p.put(rows, found.first, found.log_p)

    def _store(self, example: Tensor, position_axes: tuple[int, ...], *, here: bool = False) -> _Store:
        width = self.pairs.clean.shape[1]
        sizes = [width if axis in position_axes else n for axis, n in enumerate(example.shape)]
        where = "cpu" if self.cache == "cpu" and not here else example.device
        return _Store(torch.zeros((len(self), *sizes[1:]), dtype=example.dtype, device=where), position_axes)

    def groups(self, rows: Int[Tensor, " batch"]) -> list[Int[Tensor, " group"]]:
        """Which examples of a batch go through the model together: those for which padding is worth while.

        On a GPU all of them. On a CPU a pass takes what its tokens take, so prompts of another length, or with a
        shorter common beginning, are better off in a pass of their own as soon as it saves :data:`PASS_IN_TOKENS`.
        """
        if self.runner.device.type != "cpu" or self.cache == "recompute" or self.where == "all":
            return self._of_one_length(rows)
        kinds: dict[tuple[int, int], list[int]] = {}
        spans = zip(self.pairs.longest[rows].tolist(), self.first[rows].tolist(), strict=True)
        for at, span in enumerate(spans):
            kinds.setdefault(span, []).append(at)
        order = sorted(kinds)
        if len(order) > 1 and not self.runner.allows_padding(max(order)[0]):
            return self._of_one_length(rows)
        best: list[tuple[int, int]] = [(0, 0)]  # of the first j kinds: the cost, and where the last group begins
        for j in range(1, len(order) + 1):
            options = []
            for i in range(j):
                some = order[i:j]
                width = some[-1][0] - min(first for _, first in some)
                options.append((best[i][0] + PASS_IN_TOKENS + width * sum(len(kinds[kind]) for kind in some), i))
            best.append(min(options))
        found, j = [], len(order)
        while j:
            i = best[j][1]
            found.append(torch.tensor(sorted(at for kind in order[i:j] for at in kinds[kind])))
            j = i
        return found

    def _of_one_length(self, rows: Int[Tensor, " batch"]) -> list[Int[Tensor, " group"]]:
        """All examples together, or those of each length where padding would be attended to."""
        lengths = self.pairs.longest[rows]
        if bool((lengths == lengths[0]).all()) or self.runner.allows_padding(int(lengths.max())):
            return [torch.arange(len(rows))]
        return [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]

    def batch(self, rows: Int[Tensor, " batch"]) -> _Batch:
        """The examples ``rows``, with everything cut to their longest prompt, and their common beginning left out."""
        part = self.pairs[rows]
        if self.cache == "recompute":
            found = self._compute(part)
            return _Batch(part, found.runs.get("clean"), found.runs.get("corrupt"), found.log_p, found.prefix)
        width, first = part.clean.shape[1], int(self.first[rows].min())
        runs = {
            name: {point: kept.get(rows, first, width) for point, kept in store.items()}
            for name, store in self.kept.items()
        }
        prefix = None
        if first:
            device = self.runner.device
            both = [[kept.get(rows, 0, first).to(device) for kept in pair] for pair in self.keys_and_values]
            keys, values = zip(*both, strict=True)
            prefix = Prefix(first, KeysValues(keys, values, self.prefix_axis))
        assert self.log_p is not None
        return _Batch(part, runs.get("clean"), runs.get("corrupt"), self.log_p.get(rows, first, width), prefix)

    def _compute(self, part: PromptPairs, *, keep_prefix: bool = False) -> _Computed:
        """The clean and the corrupt run of some pairs; with ``keep_prefix`` also what the nodes do at their common
        beginning."""
        share = self.share_prefix
        run = PairedRun(
            self.runner, part, self.nodes, share_prefix=share, keep_before=keep_prefix, positions=self.where
        )
        runs: dict[str, Activations] = {}
        if "corrupt" in self.needs:
            runs["corrupt"], _ = run.record("corrupt")
        clean, logits = run.record("clean", nodes="clean" in self.needs)
        if "clean" in self.needs:
            runs["clean"] = clean
        return _Computed(runs, logits.float().log_softmax(-1), run.prefix, run.before, run.first)


#: What a pass costs on a CPU beside its tokens, in tokens (27 to 128: `python tests/benchmarks/speed.py --overhead`).
PASS_IN_TOKENS = 64


@dataclass
class _Computed:
    """The runs of some examples, beginning after ``first`` tokens."""

    runs: dict[str, Activations]
    log_p: Float[Tensor, "..."]
    prefix: Prefix | None
    before: Activations
    first: int


@dataclass
class _Store:
    """One tensor for all examples, axis 0, that is written and read in parts; some axes are positions."""

    kept: Tensor
    position_axes: tuple[int, ...]

    def put(self, rows: Int[Tensor, " batch"], first: int, part: Tensor) -> None:
        lengths = {part.shape[axis] for axis in self.position_axes} or {0}
        self.kept[self._window(rows, first, first + lengths.pop())] = part.to(self.kept.device)

    def get(self, rows: Int[Tensor, " batch"], first: int, end: int) -> Tensor:
        return self.kept[self._window(rows, first, end)]

    def _window(self, rows: Int[Tensor, " batch"], first: int, end: int) -> tuple[Any, ...]:
        cut = slice(first, end)
        axes = range(1, self.kept.ndim)
        return (rows.to(self.kept.device), *(cut if axis in self.position_axes else slice(None) for axis in axes))
