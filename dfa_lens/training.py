"""fit: learn W by making the target behave faithfully under the soft mask.

Every step takes a batch of prompt pairs, mixed over tasks. Each example is gated by the mask of its own task,
g = sigmoid(scale(s)·W / T), and the loss is KL(P_clean ‖ P_masked) + sparsity·mean(g). Only W gets a gradient; the
clean and corrupt runs of every batch are computed once and kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens import adapter, hooks
from dfa_lens.adapter import HookedModel, Layout
from dfa_lens.alignment import Alignment, Scaling, scale
from dfa_lens.errors import AlignmentError, PromptError, TrainingError, unknown
from dfa_lens.hooks import Activations, Intervention
from dfa_lens.nodes import NodeSet
from dfa_lens.prompts import PromptPairs
from dfa_lens.scores import NodeScores

logger = logging.getLogger(__name__)

Positions = Literal["answer", "all", "all-padded"]
"""Where the KL is taken.

- ``answer``: at the last real token.
- ``all``: summed over the real tokens.
- ``all-padded``: summed over all positions, padding included and not masked, as the released code does.
"""
Cache = Literal["device", "cpu", "recompute"]
"""Where the clean and corrupt runs are kept: beside the model, in main memory, or nowhere (two more passes a step)."""


def fit(
    target: HookedModel,
    scores: Mapping[str, NodeScores],
    pairs: Mapping[str, PromptPairs],
    *,
    intervention: Intervention = "circuit",
    positions: Positions = "answer",
    sparsity: float = 3.0,
    lr: float = 0.1,
    steps: int = 200,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    nodes: NodeSet | None = None,
    scaling: Scaling = "unit",
    temperature: float = 1.0,
    initial: Float[Tensor, "source target"] | None = None,
    initial_scale: float = 0.01,
    gate_heads: bool = True,
    cache: Cache = "device",
    shuffle: bool = True,
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
    sparsity:
        λ, the weight of mean(g). 3 keeps a fraction of the nodes; 0.1 (the paper) keeps nearly all with scores of
        unit length.
    lr, steps, batch_size:
        Adam's learning rate, the number of its steps, and the examples in the batch of each.
    seed:
        Of W's start and the order of the examples. The global random state is neither read nor changed.
    nodes:
        The target's nodes; default: all heads and MLP blocks.
    scaling:
        What is done to the scores before W, see :data:`~dfa_lens.alignment.Scaling`; kept with the alignment.
    temperature:
        T in g = sigmoid(ŝ/T).
    initial, initial_scale:
        W's start, or the standard deviation of its normal start; the default is small, so that every mask starts
        near one half.
    gate_heads:
        False leaves attention heads ungated, as the released code does without meaning to: comparison only.
    cache:
        See :data:`Cache`.
    shuffle:
        False takes the examples in the order given, again and again.

    Returns
    -------
    Alignment
        With ``.history``: loss, kl and mean mask ("sparsity") of every step.

    Raises
    ------
    AlignmentError
        If the two mappings differ, source scores belong to different node sets, or a number is out of range.
    TrainingError
        If the loss is not finite: at which step, on which tasks.
    """
    _check_numbers(sparsity, lr, steps, batch_size, temperature)
    for name, value, valid in (
        ("positions", positions, Positions),
        ("intervention", intervention, Intervention),
        ("cache", cache, Cache),
    ):
        if value not in get_args(valid):
            raise unknown(name, value, get_args(valid), AlignmentError)
    tasks, source = _check_tasks(scores, pairs)
    for task in tasks:
        try:
            pairs[task].require(d_vocab=int(target.cfg.d_vocab), n_ctx=target.cfg.n_ctx)
        except PromptError as error:
            raise PromptError(f"Task {task!r}: {error}") from None
    nodes = nodes if nodes is not None else NodeSet.heads_and_mlps(target)

    s = scale(torch.stack([scores[task].values for task in tasks]), scaling)
    device = adapter.device_of(target)
    generator = torch.Generator().manual_seed(seed)
    if initial is None:
        initial = initial_scale * torch.randn(len(source), len(nodes), generator=generator)
    elif tuple(initial.shape) != (len(source), len(nodes)):
        raise AlignmentError(f"initial has shape {list(initial.shape)}; [{len(source)}, {len(nodes)}] is needed.")
    W = initial.detach().clone().float().to(device).requires_grad_(True)
    s = s.to(device)
    optimizer = torch.optim.Adam([W], lr=lr)
    gated = nodes if gate_heads else nodes.where(lambda node: node.kind != "head")
    adapter.check_points(target, gated.points)
    columns = torch.tensor([nodes.position(name) for name in gated.names], device=device)

    data = _Data(target, gated, tasks, pairs, intervention, positions, cache)
    order = _order(len(data), batch_size, steps, generator if shuffle else None)
    history: list[dict[str, float | int]] = []
    with adapter.frozen(target):
        data.fill(batch_size)
        bar = tqdm(range(steps), desc="fit", unit="step", disable=not progress)
        for step in bar:
            batch = data.batch(order[step])
            with torch.enable_grad():
                masks = torch.sigmoid(s @ W / temperature)  # [task, node]
                kl = batch.kl(target, gated, masks[:, columns], intervention, positions)
                mean_mask = masks[batch.task.to(device)].mean()
                loss = kl.to(device) + sparsity * mean_mask  # the last layers may be on another device
                values = {"step": step, "loss": loss.item(), "kl": kl.item(), "sparsity": mean_mask.item()}
                if not math.isfinite(values["loss"]):
                    present = sorted({tasks[i] for i in batch.task.tolist()})
                    raise TrainingError(
                        f"The loss became {values['loss']} at step {step} on {', '.join(present)} (kl {values['kl']}): "
                        "lower lr, or run the model in float32."
                    )
                optimizer.zero_grad(set_to_none=True)
                (W.grad,) = torch.autograd.grad(loss, [W])
            optimizer.step()
            history.append(values)
            if progress:
                bar.set_postfix(kl=f"{values['kl']:.3f}", mask=f"{values['sparsity']:.3f}")

    meta = {
        "tasks": list(tasks),
        "intervention": intervention,
        "positions": positions,
        "sparsity": sparsity,
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "examples": {task: len(pairs[task]) for task in tasks},
        "target": str(getattr(target.cfg, "model_name", "")),
    }
    if not gate_heads:
        meta["gate_heads"] = False
    return Alignment.of(W, source, nodes, scaling=scaling, temperature=temperature, history=history, meta=meta)


def _check_numbers(sparsity: float, lr: float, steps: int, batch_size: int, temperature: float) -> None:
    for name, value, ok, needed in (
        ("sparsity", sparsity, sparsity >= 0, "0 or more"),
        ("lr", lr, lr > 0, "positive"),
        ("steps", steps, steps >= 1, "at least 1"),
        ("batch_size", batch_size, batch_size >= 1, "at least 1"),
        ("temperature", temperature, temperature > 0, "positive"),
    ):
        if not ok or not math.isfinite(value):
            raise AlignmentError(f"{name} must be {needed}, not {value}.")


def _check_tasks(scores: Mapping[str, NodeScores], pairs: Mapping[str, PromptPairs]) -> tuple[tuple[str, ...], NodeSet]:
    if not scores:
        raise AlignmentError("There is no training task: scores and pairs are empty.")
    for ours, theirs, names in ((scores, pairs, ("scores", "pairs")), (pairs, scores, ("pairs", "scores"))):
        missing = [task for task in ours if task not in theirs]
        if missing:
            raise AlignmentError(f"Task {missing[0]!r} is in {names[0]} but not in {names[1]}; both need every task.")
    tasks = tuple(scores)
    source = scores[tasks[0]].nodes
    for task in tasks:
        scores[task].require(source, f"The scores of task {task!r}")
    return tasks, source


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
    task: Int[Tensor, " batch"]
    clean: Activations | None
    corrupt: Activations | None
    log_p_clean: Float[Tensor, ...]

    def kl(
        self,
        model: HookedModel,
        nodes: NodeSet,
        masks: Float[Tensor, "task node"],
        intervention: Intervention,
        positions: Positions,
    ) -> Float[Tensor, ""]:
        """KL(P_clean ‖ P_masked), averaged over the batch."""
        own = masks[self.task.to(masks.device)]
        gates = hooks.gate_hooks(nodes, own, clean=self.clean, corrupt=self.corrupt, intervention=intervention)
        pairs = self.pairs
        tokens, lengths = pairs.clean, pairs.lengths
        if intervention == "restore":
            tokens, lengths = pairs.corrupt, pairs.corrupt_lengths
        where: Literal["answer", "all"] = "answer" if positions == "answer" else "all"
        logits = adapter.run(model, tokens, lengths, gates, positions=where)
        log_p = logits.float().log_softmax(-1)
        target = self.log_p_clean.to(log_p.device)
        divergence = (target.exp() * (target - log_p)).sum(-1)
        if where == "all":
            shortest = torch.minimum(pairs.lengths, pairs.corrupt_lengths)
            real = adapter.attention_mask(shortest, tokens.shape[1], divergence.device)
            divergence = divergence * real
        return divergence.sum() / len(self.pairs)


class _Data:
    """All training examples, and the clean and corrupt runs on them."""

    def __init__(
        self,
        model: HookedModel,
        nodes: NodeSet,
        tasks: tuple[str, ...],
        pairs: Mapping[str, PromptPairs],
        intervention: Intervention,
        positions: Positions,
        cache: Cache,
    ) -> None:
        self.model, self.nodes, self.positions, self.cache = model, nodes, positions, cache
        self.pairs = PromptPairs.concat([pairs[task] for task in tasks])
        if positions == "all-padded":  # padding is taken for real tokens
            full = torch.full_like(self.pairs.lengths, self.pairs.clean.shape[1])
            self.pairs = replace(self.pairs, lengths=full, corrupt_lengths=full)
        self.task = torch.cat([torch.full((len(pairs[task]),), i) for i, task in enumerate(tasks)])
        self.where: Literal["answer", "all"] = "answer" if positions == "answer" else "all"
        self.layout: dict[str, Layout] = {}
        self.needs = {"circuit": ("corrupt",), "restore": ("clean",), "interpolate": ("clean", "corrupt")}[intervention]
        self.kept: dict[str, Activations] = {}
        self.log_p: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def fill(self, batch_size: int) -> None:
        """Run everything once and keep it, unless it is to be recomputed."""
        if self.cache == "recompute":
            return
        self.layout = adapter.layout(self.model, self.nodes.points, positions=self.where)
        width = self.pairs.clean.shape[1]
        for rows in torch.arange(len(self)).split(batch_size):
            part = self.pairs[rows]
            runs, log_p = self._compute(part)
            for name, activations in runs.items():
                store = self.kept.setdefault(name, {})
                for point, activation in activations.items():
                    if point not in store:
                        where = "cpu" if self.cache == "cpu" else activation.device
                        axes = self.layout[point].position_axes
                        sizes = [width if axis in axes else n for axis, n in enumerate(activation.shape)]
                        store[point] = torch.zeros((len(self), *sizes[1:]), dtype=activation.dtype, device=where)
                    here = rows.to(store[point].device)
                    store[point][self._window(point, here, part.clean.shape[1])] = activation.to(store[point].device)
            if self.log_p is None:
                shape: tuple[int, ...] = (len(self), *log_p.shape[1:])
                if log_p.ndim == 3:
                    shape = (len(self), width, log_p.shape[2])
                self.log_p = torch.zeros(shape, dtype=log_p.dtype, device=log_p.device)
            if log_p.ndim == 3:
                self.log_p[rows, : log_p.shape[1]] = log_p
            else:
                self.log_p[rows] = log_p

    def batch(self, rows: Int[Tensor, " batch"]) -> _Batch:
        """The examples ``rows``, with everything cut to their longest prompt."""
        part = self.pairs[rows]
        if self.cache == "recompute":
            runs, log_p = self._compute(part)
        else:
            width = part.clean.shape[1]
            runs = {
                name: {point: kept[self._window(point, rows.to(kept.device), width)] for point, kept in store.items()}
                for name, store in self.kept.items()
            }
            assert self.log_p is not None
            log_p = self.log_p[rows.to(self.log_p.device)]
            if log_p.ndim == 3:
                log_p = log_p[:, :width]
        return _Batch(part, self.task[rows], runs.get("clean"), runs.get("corrupt"), log_p)

    def _window(self, point: str, rows: Int[Tensor, " batch"], width: int) -> tuple[Any, ...]:
        """The index of the examples ``rows`` in what is kept of a hook point, cut to prompts of ``width`` tokens."""
        shape, axes = self.layout[point]
        return (rows, *(slice(width) if axis in axes else slice(None) for axis in range(1, len(shape))))

    def _compute(self, part: PromptPairs) -> tuple[dict[str, Activations], Tensor]:
        runs: dict[str, Activations] = {}
        with torch.no_grad():
            if "corrupt" in self.needs:
                adapter.run(
                    self.model,
                    part.corrupt,
                    part.corrupt_lengths,
                    hooks.record_hooks(self.nodes, runs.setdefault("corrupt", {})),
                    positions=self.where,
                )
            taps = hooks.record_hooks(self.nodes, runs.setdefault("clean", {})) if "clean" in self.needs else []
            logits = adapter.run(self.model, part.clean, part.lengths, taps, positions=self.where)
        return runs, logits.float().log_softmax(-1)
