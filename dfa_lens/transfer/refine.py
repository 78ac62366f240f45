"""Train an attention between nodes by what its masks do, instead of by the scores that it should give.

The objective is that of :func:`dfa_lens.fit`: open each node to the degree sigmoid(a·ŝ + b), mix the rest in from the
corrupt run, and ask for the clean answer with few nodes open. Here ŝ comes from measurements and from the tasks of
*other* families, so what is learned is how to read a task that nothing was taught about. On the source that is cheap,
and touches no target; on a target it needs prompts of some tasks, and no scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.data.arguments import same_tasks
from dfa_lens.data.measurements import Measurements
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import AlignmentError, MeasurementError, TrainingError
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.runner import Runner
from dfa_lens.transfer.functional import FunctionalAlignment, shares
from dfa_lens.transfer.objectives import distance
from dfa_lens.transfer.readers import Attention, features
from dfa_lens.transfer.store import Cache, ExampleStore


@backend.runs("model")
def refine(
    functional: FunctionalAlignment,
    model: HookedModel,
    measurements: Mapping[str, Measurements],
    pairs: Mapping[str, PromptPairs],
    *,
    steps: int = 60,
    lr: float = 0.02,
    sparsity_weight: float = 3.0,
    batch_size: int = 16,
    seed: int = 0,
    cache: Cache = "device",
) -> FunctionalAlignment:
    """Go on training an ``attention`` by the soft faithfulness objective, each task read from the other families.

    Parameters
    ----------
    functional:
        Fitted with ``reader="attention"``; it is where training begins, and stays as it was.
    model:
        The source, or a target; left as it was.
    measurements, pairs:
        Task → what this model was measured to do, and its prompts. Tasks that ``functional`` was fitted on are read
        from the rows of other families; those that it does not know, from all rows.
    steps, lr:
        Of Adam, each on one batch of one task; tasks take turns.
    sparsity_weight:
        λ, the weight of the mean gate.
    batch_size:
        Pairs a step.
    seed:
        Which pairs.
    cache:
        As in :func:`dfa_lens.fit`: the clean and corrupt runs, once before the first step.

    Returns
    -------
    FunctionalAlignment
        ``.meta["refined"]`` has the loss of the first and of the last round over the tasks.

    Raises
    ------
    AlignmentError
        If the reader is no attention, or a task is left with no family to be read from.
    TrainingError
        If the loss is not finite.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = {task: dfa.tasks.load(task, model.tokenizer, n=4) for task in ("ioi", "mcqa")}
    >>> scores = {task: dfa.attribute(model, each, method="nap") for task, each in pairs.items()}
    >>> measured = {task: dfa.measure(model, each) for task, each in pairs.items()}
    >>> functional = dfa.fit_functional(scores, measured, reader="attention", steps=10)
    >>> dfa.refine(functional, model, measured, pairs, steps=2).meta["refined"]["steps"]
    2
    """
    reader = functional.reader
    if not isinstance(reader, Attention):
        raise AlignmentError(f"Only an 'attention' can be trained by its masks, not {reader.name!r}.")
    same_tasks(measurements, pairs, ("measurements", "pairs"))
    if min(steps, batch_size) < 1 or not lr > 0 or not sparsity_weight >= 0:
        raise AlignmentError("steps and batch_size must be at least 1, lr positive, sparsity_weight at least 0.")
    nodes = NodeSet.heads_and_mlps(model)
    runner = Runner(model)
    families = dict(functional.meta.get("families", {}))
    numbers = {family: i for i, family in enumerate(dict.fromkeys(families.values()))}
    read: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for task, found in measurements.items():
        runner.require(pairs[task])
        if found.nodes != nodes:
            raise MeasurementError(f"The measurements of task {task!r} are of another model.")
        own = functional.checked(found, f"The measurements of task {task!r}")
        keys = functional.table.group != numbers.get(families.get(task, ""), -1)
        if not keys.any():
            raise AlignmentError(f"Task {task!r} has no other family to be read from.")
        read[task] = features(own), functional.guard * shares(own), keys.nonzero()[:, 0]
    free = {name: functional.learned[name].clone().requires_grad_(True) for name in reader.TRAINED}
    gate = {"a": torch.ones((), requires_grad=True), "b": torch.zeros((), requires_grad=True)}  # of the masks alone
    now = {**functional.learned, **free}
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam([*free.values(), *gate.values()], lr=lr)
    tasks, losses = list(read), []
    shared: Any = {"intervention": "circuit", "positions": "answer", "cache": cache, "share_prefix": True}
    store = ExampleStore(runner, nodes, {task: pairs[task] for task in tasks}, **shared)
    with runner.session(passes=3 * steps):
        store.fill(batch_size)
        for step in range(steps):
            task = tasks[step % len(tasks)]
            phi, guard, keys = read[task]
            own_rows = (store.task == tasks.index(task)).nonzero()[:, 0]
            rows = own_rows[torch.randperm(len(own_rows), generator=generator)[:batch_size]]
            with torch.enable_grad():
                values = reader.read(functional.table.where(keys), None, phi, now, 0)[0] + guard
                mask = torch.sigmoid(gate["a"] * values + gate["b"])
                loss = sparsity_weight * mask.mean() + _divergence(store, rows, mask) / len(rows)
            if not bool(loss.isfinite()):
                raise TrainingError(f"The loss is {loss.item()} at step {step}, on task {task!r}.")
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
    n = min(len(tasks), steps)
    refined = {
        "steps": steps,
        "lr": lr,
        "sparsity_weight": sparsity_weight,
        "seed": seed,
        "model": runner.name,
        "loss": [sum(losses[:n]) / n, sum(losses[-n:]) / n],
    }
    learned = {**functional.learned, **{name: value.detach() for name, value in free.items()}}
    return replace(functional, learned=learned, meta={**functional.meta, "refined": refined})


def _divergence(store: ExampleStore, rows: Int[Tensor, " example"], mask: Float[Tensor, " node"]) -> Float[Tensor, ""]:
    """KL(P_clean ‖ P_masked) at the answer, summed over some examples."""
    total = mask.new_zeros(())
    for members in store.groups(rows):
        batch = store.batch(rows[members])
        logits = store.masked(batch, mask.to(store.runner.device).expand(len(members), -1))
        total = total + distance("kl", batch.log_p_goal, logits, batch.pairs).sum().to(mask.device)
    return total
