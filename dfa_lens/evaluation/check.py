"""What a model does on prompt pairs: whether it solves the task, before anybody looks for the circuit that does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dfa_lens.data.arguments import expect
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import PromptError
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner


@dataclass(frozen=True, eq=False, repr=False)
class TaskCheck:
    """What a model does on prompt pairs, pair by pair.

    "Right" on the clean prompt is the answer, on the corrupt prompt the wrong answer. There are three ways to ask
    whether a prediction is right, each stricter than the one before:

    - the right one of the two answers has the larger logit (``above``). It flatters where the other answer is no
      option at all: with symbol counterfactuals its letter never occurs in the clean prompt, and a model that picks
      the right option one time in five can still have the right letter above it nine times in ten;
    - it has the largest logit among the choices (``best``);
    - it is the prediction, the top of the whole vocabulary (``top``).

    Attributes
    ----------
    pairs:
        What was asked.
    difference, corrupt_difference:
        [pair] logit(answer) - logit(wrong) on the clean and on the corrupt prompt.
    above, corrupt_above, best, corrupt_best, top, corrupt_top:
        [pair] is it right, in these three ways.
    prediction, corrupt_prediction:
        [pair] the tokens predicted.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> dfa.check(model, pairs).right_in_both.all().item()
    True
    """

    pairs: PromptPairs
    difference: Float[Tensor, " pair"]
    corrupt_difference: Float[Tensor, " pair"]
    best: Bool[Tensor, " pair"]
    corrupt_best: Bool[Tensor, " pair"]
    prediction: Int[Tensor, " pair"]
    corrupt_prediction: Int[Tensor, " pair"]

    @property
    def above(self) -> Bool[Tensor, " pair"]:
        """The answer above the wrong answer, on the clean prompt."""
        return self.difference > 0

    @property
    def corrupt_above(self) -> Bool[Tensor, " pair"]:
        """The wrong answer above the answer, on the corrupt prompt."""
        return self.corrupt_difference < 0

    @property
    def top(self) -> Bool[Tensor, " pair"]:
        """The answer is the prediction on the clean prompt."""
        return self.prediction == self.pairs.answer

    @property
    def corrupt_top(self) -> Bool[Tensor, " pair"]:
        """The wrong answer is the prediction on the corrupt prompt."""
        return self.corrupt_prediction == self.pairs.wrong

    @cached_property
    def right_in_both(self) -> Bool[Tensor, " pair"]:
        """Best of the choices on the clean and on the corrupt prompt: the model solves the pair."""
        return self.best & self.corrupt_best & self.above & self.corrupt_above

    @property
    def solved(self) -> PromptPairs:
        """The pairs that the model solves in both directions.

        Raises
        ------
        PromptError
            If there are none.
        """
        return self._chosen(self.right_in_both, "none")

    @property
    def unsolved(self) -> PromptPairs:
        """The other pairs.

        Raises
        ------
        PromptError
            If there are none.
        """
        return self._chosen(~self.right_in_both, "all")

    def _chosen(self, rows: Bool[Tensor, " pair"], otherwise: str) -> PromptPairs:
        if not rows.any():
            raise PromptError(f"The model solves {otherwise} of the {len(self.pairs)} pairs.")
        return self.pairs[rows]

    def summary(self) -> dict[str, float]:
        """The parts that are right, and the mean logit differences."""
        return {
            "answer above wrong": float(self.above.float().mean()),
            "answer above wrong, corrupt": float(self.corrupt_above.float().mean()),
            "best of the choices": float(self.best.float().mean()),
            "best of the choices, corrupt": float(self.corrupt_best.float().mean()),
            "top prediction": float(self.top.float().mean()),
            "top prediction, corrupt": float(self.corrupt_top.float().mean()),
            "right in both directions": float(self.right_in_both.float().mean()),
            "logit difference": float(self.difference.mean()),
            "logit difference, corrupt": float(self.corrupt_difference.mean()),
        }

    def worst(self, n: int = 5) -> PromptPairs:
        """The pairs with the smallest logit difference in the right direction, worst first."""
        margin = torch.minimum(self.difference, -self.corrupt_difference)
        return self.pairs[margin.argsort(stable=True)[:n]]

    def to_frame(self) -> Any:
        """A pandas table, a row per pair; texts where the pairs have a tokenizer."""
        import pandas as pd

        table: dict[str, Any] = {}
        tokenizer = self.pairs.tokenizer
        if tokenizer is not None:
            table["clean"] = [
                tokenizer.decode(row[:n].tolist(), skip_special_tokens=True)
                for row, n in zip(self.pairs.clean, self.pairs.lengths, strict=True)
            ]
            for name in ("answer", "wrong"):
                table[name] = [tokenizer.decode([int(token)]) for token in getattr(self.pairs, name)]
            for name in ("prediction", "corrupt_prediction"):
                table[name] = [tokenizer.decode([int(token)]) for token in getattr(self, name)]
        table["difference"] = self.difference.numpy()
        table["corrupt_difference"] = self.corrupt_difference.numpy()
        for name in ("above", "corrupt_above", "best", "corrupt_best", "top", "corrupt_top", "right_in_both"):
            table[name] = getattr(self, name).numpy()
        return pd.DataFrame(table)

    def _repr_html_(self) -> str:
        """The summary as a table, for notebooks."""
        import pandas as pd

        return pd.Series(self.summary(), name=f"{len(self.pairs)} pairs").round(3).to_frame().to_html()

    def __repr__(self) -> str:
        found = self.summary()
        return (
            f"TaskCheck({len(self.pairs)} pairs: right in both directions {found['right in both directions']:.1%}, "
            f"mean logit difference {found['logit difference']:.2f} clean, "
            f"{found['logit difference, corrupt']:.2f} corrupt)"
        ).replace("%", " %")


@backend.runs("model")
def check(model: HookedModel, pairs: PromptPairs, *, batch_size: int = 16, progress: bool = False) -> TaskCheck:
    """Whether a model solves a task, before anybody looks for the circuit that does.

    Parameters
    ----------
    model:
        A HookedTransformer or TransformerBridge; left as it was.
    pairs:
        Prompts of the task; with their choices, where it asks to choose.
    batch_size, progress:
        Examples a pass, and whether a progress bar is shown.

    Raises
    ------
    ModelError, PromptError
        If the model can't be run, or not on these pairs.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> dfa.check(model, dfa.tasks.load("mcqa", model.tokenizer, n=16)).summary()["right in both directions"]
    1.0
    """
    expect(2, "pairs", pairs, PromptPairs)
    runner = Runner(model)
    runner.require(pairs)
    n = len(pairs)
    difference, corrupt_difference = torch.zeros(2, n, dtype=torch.float32)
    best, corrupt_best = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    prediction, corrupt_prediction = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    with (
        runner.session(passes=2 * len(pairs) // batch_size),
        torch.no_grad(),
        tqdm(total=n, desc="check", unit="pair", disable=not progress) as bar,
    ):
        for rows, batch in runner.batches(pairs, batch_size):
            run = PairedRun(runner, batch)
            clean, corrupt = run.run().float().cpu(), run.run(corrupt=True).float().cpu()
            two = torch.stack([batch.answer, batch.wrong], 1)
            for logits, choices, right, into in (
                (clean, batch.choices, batch.answer, (difference, best, prediction)),
                (corrupt, batch.corrupt_choices, batch.wrong, (corrupt_difference, corrupt_best, corrupt_prediction)),
            ):
                values = logits.gather(1, two)
                into[0][rows] = values[:, 0] - values[:, 1]
                among = two if choices is None else choices
                offered = logits.gather(1, among.clamp_min(0)).masked_fill(among < 0, -torch.inf)
                into[1][rows] = among.gather(1, offered.argmax(1, keepdim=True))[:, 0] == right
                into[2][rows] = logits.argmax(1)
            bar.update(len(batch))
    return TaskCheck(pairs, difference, corrupt_difference, best, corrupt_best, prediction, corrupt_prediction)
