"""One call from prompts on two models to a circuit on the larger: attribution, measurements, learning and transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from dfa_lens.attribution.attribute import attribute
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import AlignmentError, short, unknown
from dfa_lens.models.backend import HookedModel
from dfa_lens.tasks import FAMILIES
from dfa_lens.transfer.functional import fit_functional
from dfa_lens.transfer.measure import measure
from dfa_lens.transfer.trainer import fit

By = Literal["functional", "W"]
"""What carries the scores.

- ``functional``: what forward passes measure at every node (:func:`dfa_lens.fit_functional`). Nothing is trained on the
  target. The default: it is the best where no relative of the task teaches (docs/method.md).
- ``W``: the paper's matrix, trained on the target on the other tasks (:func:`dfa_lens.fit`).
"""


def carry(
    source: HookedModel,
    target: HookedModel,
    task: str,
    source_pairs: Mapping[str, PromptPairs],
    target_pairs: Mapping[str, PromptPairs],
    *,
    by: By = "functional",
    method: str = "nap-ig-inputs",
    attribution_steps: int = 5,
    families: Mapping[str, str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> NodeScores:
    """Scores of a task on the target, from what is known of it and other tasks on the source.

    To keep what is learned for more than one task, call the parts: :func:`dfa_lens.attribute`,
    :func:`dfa_lens.measure`, :func:`dfa_lens.fit_functional` or :func:`dfa_lens.fit`.

    Parameters
    ----------
    source, target:
        The models; left as they were.
    task:
        What is carried.
    source_pairs:
        Task → prompts with the source's tokens. All teach. ``task`` may be among them, and is better so; ``by="W"``
        needs it.
    target_pairs:
        Task → prompts with the target's tokens: of ``task``, and for ``by="W"`` of the others, on which W is trained.
    by:
        See :data:`By`.
    method, attribution_steps:
        Of attribution on the source, as ``method`` and ``steps`` of :func:`dfa_lens.attribute`.
    families:
        Task → family, for what is learned over families; default: :data:`dfa_lens.tasks.FAMILIES`. A task that is not
        among them is a family by itself.
    batch_size:
        Of attribution and measurements, not of training.
    seed:
        Of what is learned.
    progress:
        Show a progress bar, a step for each attribution and measurement; training W has one of its own.
    options:
        As for :func:`dfa_lens.fit_functional`, or with ``by="W"`` for :func:`dfa_lens.fit`.

    Returns
    -------
    NodeScores
        Of the target's heads and MLP blocks.

    Raises
    ------
    AlignmentError
        If prompts that are needed are missing.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("llama3-tiny-target")
    >>> tasks = ("ioi", "addition", "mcqa")
    >>> ours = {task: dfa.tasks.load(task, source.tokenizer, n=4) for task in tasks}
    >>> theirs = {"ioi": dfa.tasks.load("ioi", target.tokenizer, n=4)}
    >>> dfa.carry(source, target, "ioi", ours, theirs).values.shape
    torch.Size([110])
    """
    if by not in get_args(By):
        raise unknown("way to carry", by, get_args(By), AlignmentError)
    others = [each for each in source_pairs if each != task]
    needed = {"target": (target_pairs, [task] if by == "functional" else others)}
    if by == "W":
        needed["source"] = (source_pairs, [task])
    for side, (pairs, names) in needed.items():
        missing = [each for each in names if each not in pairs]
        if missing:
            raise AlignmentError(f"by={by!r} needs prompts of task {short(missing[0])!r} on the {side}.")
    if not others:
        raise AlignmentError(f"There is no task but {short(task)!r} to learn from.")
    n_steps = len(source_pairs) if by == "W" else 2 * len(source_pairs) + 2
    with tqdm(total=n_steps, desc="carry", unit="step", disable=not progress) as bar:
        scores, measured = {}, {}
        for each, given in source_pairs.items():
            scores[each] = attribute(source, given, method=method, steps=attribution_steps, batch_size=batch_size)
            bar.update()
            if by == "functional":
                measured[each] = measure(source, given, batch_size=batch_size)
                bar.update()
        if by == "functional":
            functional = fit_functional(
                {each: scores[each] for each in others},
                {each: measured[each] for each in others},
                families=FAMILIES if families is None else families,
                seed=seed,
                **options,
            )
            bar.update()
            read = measure(target, target_pairs[task], batch_size=batch_size)
            bar.update()
            return functional.transfer(read, scores.get(task), measured.get(task))
    taught = {each: scores[each] for each in others}
    on_target = {each: target_pairs[each] for each in others}
    return fit(target, taught, on_target, seed=seed, progress=progress, **options).transfer(scores[task])
