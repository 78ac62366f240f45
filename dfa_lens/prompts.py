"""Prompt pairs: a clean and a corrupt prompt of the same length, an answer and a wrong answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from dfa_lens.errors import PromptError, unknown

LengthPolicy = Literal["drop", "error"]
"""What to do with a pair whose prompts have different numbers of tokens: leave it out (and count it), or raise."""

COLUMNS = ("clean", "corrupt", "answer", "wrong")


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs:
    """Clean and corrupt prompts, token by token the same length, with a right and a wrong answer.

    Parameters
    ----------
    clean, corrupt:
        Token ids [pair, pos], right padded.
    answer, wrong:
        Token ids [pair]: the answer to the clean prompt, and the one that it is compared with (the answer to the
        corrupt prompt, in most tasks).
    lengths:
        How many tokens of each prompt are real [pair]; default: all.
    metric:
        What a run on these pairs is measured by: a name of :data:`dfa_lens.metrics.METRICS` or a function of
        (logits [pair, vocab], pairs) that returns [pair].

    Raises
    ------
    PromptError
        If shapes differ, there are no pairs, a length is out of range, an id is negative, an answer equals its
        wrong answer, or a clean prompt equals its corrupt one. The message names the first such pair.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> pairs = dfa.PromptPairs(
    ...     clean=torch.tensor([[5, 6, 7]]), corrupt=torch.tensor([[5, 8, 7]]),
    ...     answer=torch.tensor([1]), wrong=torch.tensor([2]))
    >>> pairs
    PromptPairs(1 pair, 3 tokens)
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    answer: Int[Tensor, " pair"]
    wrong: Int[Tensor, " pair"]
    lengths: Int[Tensor, " pair"] = None  # type: ignore[assignment]
    metric: str | Callable[..., Tensor] = "logit-difference"
    tokenizer: Any = None  #: made the tokens; only used to show them
    dropped: Mapping[str, int] = field(default_factory=dict)  #: reason → number of pairs left out when these were made

    def __post_init__(self) -> None:
        if self.lengths is None:
            n, width = self.clean.shape[0], self.clean.shape[-1]
            object.__setattr__(self, "lengths", torch.full((n,), width, dtype=torch.long))
        self._check()

    def _check(self) -> None:
        tensors = {name: getattr(self, name) for name in (*COLUMNS, "lengths")}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise PromptError(f"{name} must be a tensor of token ids (integers), not {kind}.")
            if tensor.ndim != (2 if name in ("clean", "corrupt") else 1):
                raise PromptError(f"{name} has shape {list(tensor.shape)}: prompts are [pair, pos], the rest [pair].")
        if self.clean.shape != self.corrupt.shape:
            raise PromptError(
                f"clean has shape {list(self.clean.shape)} but corrupt {list(self.corrupt.shape)}: a pair's prompts "
                "must have equally many tokens, so that every position has its counterpart."
            )
        n, width = self.clean.shape
        if n == 0 or width == 0:
            raise PromptError("There are no prompt pairs" + ("." if n == 0 else ": the prompts are empty."))
        for name, tensor in tensors.items():
            if len(tensor) != n:
                raise PromptError(f"{name} has {len(tensor)} entries for {n} prompt pairs.")
        real = torch.arange(width, device=self.clean.device) < self.lengths[:, None]
        different = ((self.clean != self.corrupt) & real).any(1)
        for bad, what in (
            ((self.lengths < 1) | (self.lengths > width), f"has a length outside 1 to {width}"),
            (
                ((self.clean < 0) | (self.corrupt < 0)).any(1) | (self.answer < 0) | (self.wrong < 0),
                "has a negative id",
            ),
            (self.answer == self.wrong, "has the same answer and wrong answer"),
            (~different, "has a clean prompt equal to its corrupt one"),
        ):
            if bad.any():
                first = int(bad.nonzero()[0])
                raise PromptError(f"Pair {first} {what} ({int(bad.sum())} of {n} pairs).")

    # --- making them -----------------------------------------------------------------------------------------

    @classmethod
    def from_strings(
        cls,
        tokenizer: Any,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answer: Sequence[str],
        wrong: Sequence[str],
        *,
        different_lengths: LengthPolicy = "drop",
        metric: str | Callable[..., Tensor] = "logit-difference",
    ) -> PromptPairs:
        """Prompt pairs from four lists of strings.

        Prompts get the special tokens that the tokenizer adds by itself (a begin-of-text token with Llama-3, none
        with Qwen-2.5); no chat template is applied. Answers get none and must be one token each: write the leading
        space where the model would produce it.

        Parameters
        ----------
        tokenizer:
            A Hugging Face tokenizer.
        different_lengths:
            "drop" (default) leaves out pairs whose prompts have different numbers of tokens and counts them in
            ``.dropped``; "error" raises at the first.

        Raises
        ------
        PromptError
            If the lists have different lengths, an answer is not one token, a word is unknown to the tokenizer, or
            no pair is left.
        """
        columns = {"clean": list(clean), "corrupt": list(corrupt), "answer": list(answer), "wrong": list(wrong)}
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) != 1:
            raise PromptError(f"The four lists must be equally long, but there are {sizes}.")
        if sizes["clean"] == 0:
            raise PromptError("There are no prompt pairs.")
        if different_lengths not in ("drop", "error"):
            raise unknown("policy for different lengths", different_lengths, ("drop", "error"), PromptError)
        ids = {
            name: [list(row) for row in tokenizer(values, add_special_tokens=name in ("clean", "corrupt"))["input_ids"]]
            for name, values in columns.items()
        }
        unknown_id = getattr(tokenizer, "unk_token_id", None)
        for name, rows in ids.items():
            for i, row in enumerate(rows):
                if unknown_id is not None and unknown_id in row:
                    raise PromptError(
                        f"{name} {i} has a word that the tokenizer does not know: {columns[name][i]!r}. The shipped "
                        "models know only the words of the offline tasks."
                    )
                if name in ("answer", "wrong") and len(row) != 1:
                    raise PromptError(f"{name} {i} is {columns[name][i]!r}, which is {len(row)} tokens; one is needed.")
        kept = [i for i in range(sizes["clean"]) if len(ids["clean"][i]) == len(ids["corrupt"][i])]
        n_dropped = sizes["clean"] - len(kept)
        if n_dropped and different_lengths == "error":
            i = next(i for i in range(sizes["clean"]) if i not in kept)
            raise PromptError(
                f"Pair {i}: clean has {len(ids['clean'][i])} tokens, corrupt {len(ids['corrupt'][i])} "
                f"({n_dropped} such pairs)."
            )
        if not kept:
            raise PromptError(f"None of {sizes['clean']} pairs has clean and corrupt prompts of equally many tokens.")
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        lengths = torch.tensor([len(ids["clean"][i]) for i in kept])

        def padded(rows: list[list[int]]) -> Tensor:
            out = torch.full((len(kept), int(lengths.max())), pad, dtype=torch.long)
            for at, i in enumerate(kept):
                out[at, : len(rows[i])] = torch.tensor(rows[i])
            return out

        return cls(
            clean=padded(ids["clean"]),
            corrupt=padded(ids["corrupt"]),
            answer=torch.tensor([ids["answer"][i][0] for i in kept]),
            wrong=torch.tensor([ids["wrong"][i][0] for i in kept]),
            lengths=lengths,
            metric=metric,
            tokenizer=tokenizer,
            dropped={"different lengths": n_dropped} if n_dropped else {},
        )

    @classmethod
    def from_dataset(cls, dataset: Any, tokenizer: Any, **options: Any) -> PromptPairs:
        """Prompt pairs from a ``datasets.Dataset``, or a mapping of columns.

        It has the text columns clean, corrupt, answer and wrong; ``options`` go to :meth:`from_strings`.
        """
        columns = getattr(dataset, "column_names", None) or list(dataset)
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise PromptError(f"The data set has no column {missing[0]!r}; it has {', '.join(map(repr, columns))}.")
        return cls.from_strings(tokenizer, *(list(dataset[name]) for name in COLUMNS), **options)

    @classmethod
    def concat(cls, parts: Sequence[PromptPairs]) -> PromptPairs:
        """All pairs of ``parts`` one after the other, padded to the longest."""
        if not parts:
            raise PromptError("There are no prompt pairs to put together.")
        width = max(part.clean.shape[1] for part in parts)

        def widen(tokens: Tensor) -> Tensor:
            return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]))

        return replace(
            parts[0],
            clean=torch.cat([widen(part.clean) for part in parts]),
            corrupt=torch.cat([widen(part.corrupt) for part in parts]),
            answer=torch.cat([part.answer for part in parts]),
            wrong=torch.cat([part.wrong for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            dropped={},
        )

    # --- reading them ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.answer)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> PromptPairs:
        """Some of the pairs, with padding that none of them needs cut off."""
        if isinstance(index, int):
            index = [range(len(self))[index]]
        if not isinstance(index, (slice, Tensor)):
            index = torch.as_tensor(index, dtype=torch.long)
        lengths = self.lengths[index]
        if len(lengths) == 0:
            raise PromptError("The selection has no prompt pairs.")
        width = int(lengths.max())
        return replace(
            self,
            clean=self.clean[index][:, :width],
            corrupt=self.corrupt[index][:, :width],
            answer=self.answer[index],
            wrong=self.wrong[index],
            lengths=lengths,
        )

    def batches(self, batch_size: int) -> Iterator[tuple[Int[Tensor, " batch"], PromptPairs]]:
        """Batches of similar length, longest first, each with the positions of its pairs in the whole.

        Longest first, so that what does not fit into memory fails at once.
        """
        if batch_size < 1:
            raise PromptError(f"batch_size must be at least 1, not {batch_size}.")
        order = torch.argsort(self.lengths, descending=True, stable=True)
        for index in order.split(batch_size):
            yield index, self[index]

    def require(self, *, d_vocab: int, n_ctx: int | None = None) -> None:
        """Every id must be below ``d_vocab`` and no prompt longer than ``n_ctx``; a :class:`PromptError` otherwise."""
        if n_ctx is not None and self.clean.shape[1] > n_ctx:
            raise PromptError(
                f"There are prompts of up to {self.clean.shape[1]} tokens, but the model takes {n_ctx}: load it with a "
                "larger n_ctx."
            )
        for name in COLUMNS:
            tensor: Tensor = getattr(self, name)
            highest = int(tensor.max())
            if highest >= d_vocab:
                row = int((tensor.reshape(len(self), -1) >= d_vocab).any(1).nonzero()[0])
                raise PromptError(
                    f"{name} of pair {row} has token id {highest}, but the model's vocabulary has {d_vocab} tokens: "
                    "were these pairs made with another model's tokenizer?"
                )

    def with_metric(self, metric: str | Callable[..., Tensor]) -> PromptPairs:
        """The same pairs, measured by another metric."""
        return replace(self, metric=metric)

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        tokens = f"{high} tokens" if low == high else f"{low} to {high} tokens"
        return f"PromptPairs({len(self)} pair{'s' * (len(self) != 1)}, {tokens})"
