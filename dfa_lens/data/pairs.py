"""Prompt pairs: a clean and a corrupt prompt of the same length, an answer and a wrong answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from dfa_lens.data import selection, tokenization
from dfa_lens.data.content import ByContent
from dfa_lens.data.spans import Spans
from dfa_lens.errors import PromptError, PromptIndexError, short, unknown

LengthPolicy = Literal["drop", "error", "pad-left-aligned"]
"""What to do with a pair whose prompts have different numbers of tokens.

- ``drop``: leave it out, and count it in ``.dropped``. The default: every position then has its counterpart.
- ``error``: raise at the first.
- ``pad-left-aligned``: keep it. Both prompts start at position 0, the shorter one is padded on the right, and each is
  read at its own last token. Patching goes by position: token i of the clean run meets token i of the corrupt run,
  whatever they are, so everything after an insertion meets the wrong counterpart; and where the corrupt prompt has
  ended, its activations are those of padding that has read it. Scores and curves of such pairs are rough: use it to
  see whether dropping biases a result, not to get one.
"""

Unusable = Literal["error", "drop"]
"""What to do with a pair that can't be used for another reason (several tokens where one is needed, an unknown word,
equal answers, equal prompts): raise, naming it, or leave it out and count it in ``.dropped``."""

COLUMNS = ("clean", "corrupt", "answer", "wrong")
_AXES = {
    "clean": "pair, pos",
    "corrupt": "pair, pos",
    "answer": "pair",
    "wrong": "pair",
    "lengths": "pair",
    "corrupt_lengths": "pair",
    "choices": "pair, choice",
    "corrupt_choices": "pair, choice",
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs(ByContent):
    """Clean and corrupt prompts, token by token the same length, with a right and a wrong answer.

    ``len`` counts pairs, iteration gives them one by one, and ``pairs[index]`` some of them: an integer, a slice,
    several integers, or a boolean for every pair, as lists, arrays, tensors or pandas columns (see
    :data:`~dfa_lens.data.selection.Index`). Two are equal (``==``) if tokens, lengths, answers and choices are.

    Parameters
    ----------
    clean, corrupt:
        Token ids [pair, pos], right padded. All tensors are copied, as int64.
    answer, wrong:
        Token ids [pair]: the answer to the clean prompt, and the one that it is compared with (the answer to the
        corrupt prompt, in most tasks).
    lengths:
        How many tokens of each prompt are real [pair]; default: all.
    corrupt_lengths:
        As ``lengths``, of the corrupt prompts, where they differ (see :data:`LengthPolicy`); default: ``lengths``.
    choices, corrupt_choices:
        Token ids [pair, choice] among which the clean and the corrupt prompt ask to choose, -1 where a pair has
        fewer; only :func:`dfa_lens.check` uses them. Default: the answer and the wrong answer.

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
    #: made the tokens; only used to show them
    tokenizer: Any = field(default=None, compare=False)
    #: reason → number of pairs left out when these were made
    dropped: Mapping[str, int] = field(default_factory=dict, compare=False)
    corrupt_lengths: Int[Tensor, " pair"] = None  # type: ignore[assignment]
    choices: Int[Tensor, "pair choice"] | None = None
    corrupt_choices: Int[Tensor, "pair corrupt_choice"] | None = None
    #: which span every token is in, see :class:`~dfa_lens.data.spans.Schema`
    spans: Spans | None = None

    def __post_init__(self) -> None:
        for name in COLUMNS:
            self._own(name)
        if self.lengths is None:
            n, width = self.clean.shape
            object.__setattr__(self, "lengths", torch.full((n,), width, dtype=torch.long))
        self._own("lengths")
        if self.corrupt_lengths is None:
            object.__setattr__(self, "corrupt_lengths", self.lengths)
        self._own("corrupt_lengths")
        for name in ("choices", "corrupt_choices"):
            if getattr(self, name) is not None:
                self._own(name)
        object.__setattr__(self, "dropped", dict(self.dropped))
        self._check()

    def _own(self, name: str) -> None:
        """Put a copy in the place of a tensor, so that nobody else can change it."""
        tensor, axes = getattr(self, name), _AXES[name]
        if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PromptError(f"{name} must be a tensor of token ids (integers), not {kind}.")
        if tensor.ndim != len(axes.split(", ")):
            raise PromptError(f"{name} has shape {list(tensor.shape)}: [{axes}] is needed.")
        object.__setattr__(self, name, tensor.to(torch.long, copy=True))

    def _check(self) -> None:
        tensors = {name: getattr(self, name) for name in (*COLUMNS, "lengths", "corrupt_lengths")}
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
        different = ((self.clean != self.corrupt) & real).any(1) | (self.lengths != self.corrupt_lengths)
        shortest, longest = torch.minimum(self.lengths, self.corrupt_lengths), self.longest
        for bad, what in (
            ((shortest < 1) | (longest > width), f"has a length outside 1 to {width}"),
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
        for name, right in (("choices", self.answer), ("corrupt_choices", self.wrong)):
            chosen = getattr(self, name)
            if chosen is None:
                continue
            if len(chosen) != n:
                raise PromptError(f"{name} has shape {list(chosen.shape)}: [pair, choice], for {n} pairs, is needed.")
            if name == "choices" and not (chosen == right[:, None]).any(1).all():
                first = int((~(chosen == right[:, None]).any(1)).nonzero()[0])
                raise PromptError(f"The answer of pair {first} is not among its choices.")
        if self.spans is not None and self.spans.labels.shape != self.clean.shape:
            raise PromptError(
                f"The spans are of tokens {list(self.spans.labels.shape)}, and the prompts have "
                f"{list(self.clean.shape)}: [pair, pos] of both must be equal."
            )

    def _content(self) -> tuple[Any, ...]:
        # without spans, pairs go by the same fingerprint as before there were any
        return super()._content()[: None if self.spans is not None else -1]

    @property
    def longest(self) -> Int[Tensor, " pair"]:
        """The longer of each pair's two lengths."""
        return torch.maximum(self.lengths, self.corrupt_lengths)

    @cached_property
    def shared(self) -> Int[Tensor, " pair"]:
        """How many tokens at the beginning each pair's prompts have in common; always fewer than either has."""
        same = (self.clean == self.corrupt).long().cumprod(1).sum(1)
        return torch.minimum(same, torch.minimum(self.lengths, self.corrupt_lengths) - 1)

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
        choices: Sequence[Sequence[str]] | None = None,
        corrupt_choices: Sequence[Sequence[str]] | None = None,
        different_lengths: LengthPolicy = "drop",
        unusable: Unusable = "error",
        first_token: bool = False,
    ) -> PromptPairs:
        """Prompt pairs from four lists of strings.

        Prompts get the special tokens that the tokenizer adds by itself (a begin-of-text token with Llama-3, none
        with Qwen-2.5); no chat template is applied. Answers get none and must be one token each: write the leading
        space where the model would produce it.

        Parameters
        ----------
        tokenizer:
            A Hugging Face tokenizer.
        choices, corrupt_choices:
            What the clean and the corrupt prompt ask to choose among, for :func:`dfa_lens.check`.
        different_lengths:
            What to do with pairs whose prompts have different numbers of tokens, see :data:`LengthPolicy`.
        misfits:
            What to do with pairs that can't be used for another reason, see :data:`Unusable`.
        first_token:
            Take the first token of an answer of several.

        Raises
        ------
        PromptError
            If the lists have different lengths, a pair can't be used and is not to be dropped, or no pair is left:
            the message says how many were dropped for which reason.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> tokenizer = dfa.zoo.load("llama3-tiny-source").tokenizer
        >>> dfa.PromptPairs.from_strings(
        ...     tokenizer, clean=["3 + 4 ="], corrupt=["3 + 5 ="], answer=[" 7"], wrong=[" 8"])
        PromptPairs(1 pair, 5 tokens)
        """
        given = {"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": wrong}
        texts = {name: tokenization.texts(name, column) for name, column in given.items()}
        options = {
            name: None if column is None else tokenization.texts(name, column)
            for name, column in (("choices", choices), ("corrupt_choices", corrupt_choices))
        }
        sizes = {name: len(values) for name, values in texts.items()}
        sizes |= {name: len(values) for name, values in options.items() if values is not None}
        if len(set(sizes.values())) != 1:
            raise PromptError(f"The lists must be equally long, but there are {sizes}.")
        if sizes["clean"] == 0:
            raise PromptError("There are no prompt pairs.")
        for name, value, valid in (
            ("policy for different lengths", different_lengths, get_args(LengthPolicy)),
            ("policy for unusable pairs", unusable, get_args(Unusable)),
        ):
            if value not in valid:
                raise unknown(name, value, valid, PromptError)
        screened = tokenization.screen(tokenizer, **texts, first_token=first_token)
        kept: list[int] = []
        dropped: dict[str, int] = {}
        for i, misfit in enumerate(screened.misfits):
            policy = different_lengths if misfit and misfit.reason == tokenization.DIFFERENT_LENGTHS else unusable
            if misfit is None or policy == "pad-left-aligned":
                kept.append(i)
            elif policy == "error":
                raise PromptError(f"Pair {i}: {misfit.message}")
            else:
                dropped[misfit.reason] = dropped.get(misfit.reason, 0) + 1
        if not kept:
            listing = ", ".join(f"{reason}: {n}" for reason, n in dropped.items())
            raise PromptError(f"None of {sizes['clean']} pairs can be used with this tokenizer ({listing}).")

        def rows(name: str) -> list[list[int]]:
            return [screened.ids[name][i] for i in kept]

        def firsts(name: str) -> Tensor | None:
            column = options[name]
            return None if column is None else _first_tokens(tokenizer, name, {i: column[i] for i in kept})

        return cls.from_tokens(
            rows("clean"),
            rows("corrupt"),
            [row[0] for row in rows("answer")],
            [row[0] for row in rows("wrong")],
            pad=getattr(tokenizer, "pad_token_id", None) or 0,
            choices=firsts("choices"),
            corrupt_choices=firsts("corrupt_choices"),
            different_lengths=different_lengths,
            tokenizer=tokenizer,
            dropped=dropped,
        )

    @classmethod
    def from_tokens(
        cls,
        clean: Sequence[Sequence[int]] | Tensor,
        corrupt: Sequence[Sequence[int]] | Tensor,
        answer: Sequence[int] | Tensor,
        wrong: Sequence[int] | Tensor,
        *,
        pad: int | None = None,
        different_lengths: LengthPolicy = "error",
        **options: Any,
    ) -> PromptPairs:
        """Prompt pairs from token ids: lists of different lengths, or padded tensors.

        Parameters
        ----------
        clean, corrupt:
            A list of token ids per prompt, special tokens included; or [pair, pos] with padding on the right.
        answer, wrong:
            A token id per pair.
        pad:
            The id of the padding: how far a padded tensor is real, and what lists are filled up with (default 0).
            Padding on the left is refused: positions would not be those of the prompts.
        different_lengths:
            As in :meth:`from_strings`; the default here is "error".
        options:
            Further arguments of :class:`PromptPairs`.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> dfa.PromptPairs.from_tokens([[5, 6, 7], [5, 6]], [[5, 8, 7], [9, 6]], answer=[1, 2], wrong=[3, 4])
        PromptPairs(2 pairs, 2 to 3 tokens)
        """
        if pad is not None and (selection.integer(pad) is None or pad < 0):
            raise PromptError(f"pad must be a token id, not {short(repr(pad))}.")
        prompts = {"clean": _unpadded("clean", clean, pad), "corrupt": _unpadded("corrupt", corrupt, pad)}
        answers = _ids("answer", answer), _ids("wrong", wrong)
        sizes = {name: len(rows) for name, rows in prompts.items()}
        sizes |= {"answer": len(answers[0]), "wrong": len(answers[1])}
        if len(set(sizes.values())) != 1:
            raise PromptError(f"The lists must be equally long, but there are {sizes}.")
        different = [i for i in range(sizes["clean"]) if len(prompts["clean"][i]) != len(prompts["corrupt"][i])]
        if different and different_lengths == "error":
            i = different[0]
            raise PromptError(
                f"Pair {i}: clean has {len(prompts['clean'][i])} tokens, corrupt {len(prompts['corrupt'][i])} "
                f"({len(different)} such pairs)."
            )
        if different and different_lengths == "drop":
            kept = [i for i in range(sizes["clean"]) if i not in set(different)]
            prompts = {name: [rows[i] for i in kept] for name, rows in prompts.items()}
            answers = [answers[0][i] for i in kept], [answers[1][i] for i in kept]
            already = options.get("dropped", {})
            options["dropped"] = {**already, "different lengths": len(different)}
        if not prompts["clean"]:
            raise PromptError("There are no prompt pairs" + (" of equal lengths." if different else "."))
        lengths = {name: torch.tensor([len(row) for row in rows]) for name, rows in prompts.items()}
        width = int(max(lengths["clean"].max(), lengths["corrupt"].max()))
        if width == 0:
            raise PromptError("The prompts are empty.")
        padded = {name: torch.full((len(rows), width), pad or 0, dtype=torch.long) for name, rows in prompts.items()}
        for name, rows in prompts.items():
            for i, row in enumerate(rows):
                padded[name][i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return cls(
            clean=padded["clean"],
            corrupt=padded["corrupt"],
            answer=torch.tensor(answers[0]),
            wrong=torch.tensor(answers[1]),
            lengths=lengths["clean"],
            corrupt_lengths=lengths["corrupt"],
            **options,
        )

    @classmethod
    def from_dataset(cls, dataset: Any, tokenizer: Any, **options: Any) -> PromptPairs:
        """Prompt pairs from a ``datasets.Dataset``, or a mapping of columns.

        It has the text columns clean, corrupt, answer and wrong, and may have the lists choices and corrupt_choices;
        ``options`` go to :meth:`from_strings`.

        Raises
        ------
        PromptError
            If it has no such columns; and as :meth:`from_strings`.
        """
        columns = getattr(dataset, "column_names", None)
        if columns is None and not (isinstance(dataset, Mapping) or hasattr(dataset, "columns")):
            kind = type(dataset).__name__
            raise PromptError(f"A datasets.Dataset, a table or a mapping of columns is needed, not {kind}.")
        columns = list(dataset) if columns is None else columns
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise PromptError(
                f"The data set has no column {missing[0]!r}; it has {short(', '.join(map(repr, columns)))}."
            )
        for name in ("choices", "corrupt_choices"):
            if name in columns and all(offered is not None for offered in dataset[name]):
                options.setdefault(name, list(dataset[name]))
        return cls.from_strings(tokenizer, *(list(dataset[name]) for name in COLUMNS), **options)

    @classmethod
    def concat(cls, parts: Sequence[PromptPairs]) -> PromptPairs:
        """All pairs of ``parts`` one after the other, padded to the longest; what was dropped is added up.

        Raises
        ------
        PromptError
            If there are none, or they have different tokenizers.
        """
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
            corrupt_lengths=torch.cat([part.corrupt_lengths for part in parts]),
            spans=_all_spans(parts, width),
            choices=_stacked([part.choices for part in parts]),
            corrupt_choices=_stacked([part.corrupt_choices for part in parts]),
            dropped=dict(sum((Counter(part.dropped) for part in parts), Counter())),
            tokenizer=_common_tokenizer(parts),
        )

    # --- reading them ----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.answer)

    def __iter__(self) -> Iterator[PromptPairs]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: selection.Index) -> PromptPairs:
        """Some of the pairs, with padding that none of them needs cut off."""
        single = selection.integer(index)
        if single is not None:
            rows = [selection.row(single, len(self), "prompt pairs", PromptIndexError)]
        else:
            rows = selection.rows(index, len(self), "prompt pairs", PromptError)
        if not rows:
            raise PromptError("The selection has no prompt pairs.")
        index = torch.tensor(rows)
        width = int(self.longest[index].max())
        return replace(
            self,
            clean=self.clean[index][:, :width],
            corrupt=self.corrupt[index][:, :width],
            answer=self.answer[index],
            wrong=self.wrong[index],
            lengths=self.lengths[index],
            corrupt_lengths=self.corrupt_lengths[index],
            spans=None if self.spans is None else self.spans.take(index, width),
            choices=None if self.choices is None else self.choices[index],
            corrupt_choices=None if self.corrupt_choices is None else self.corrupt_choices[index],
        )

    def spelled_out(self, answers: Sequence[str | Sequence[int]]) -> tuple[PromptPairs, Int[Tensor, " row"]]:
        """A pair for every token of answers of several tokens, behind those before it (teacher forcing).

        log P of a whole answer is the sum of log P of its tokens, each after the prompt and the tokens before. So with
        the metric "log-probability" a curve's faithfulness (a ratio of sums) on these pairs is that of whole answers;
        scores and means are, too, but for one factor, the number of tokens over that of answers. Intervals resample
        tokens, not answers, and are too narrow.

        Parameters
        ----------
        answers:
            For every pair, token ids or, where there is a tokenizer, a text; the same is put behind the corrupt prompt.

        Returns
        -------
        PromptPairs, Int[Tensor, "row"]
            The pairs, one answer after the other, and which of these pairs each is of. Their wrong answers only fill
            the place: any token that differs.

        Raises
        ------
        PromptError
            If there are more or fewer answers than pairs, or one has no tokens.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> model = dfa.zoo.load("llama3-tiny-source")
        >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=2)
        >>> spelled, of = pairs.spelled_out([" the drink", " a book today"])
        >>> len(spelled), of.tolist()
        (5, [0, 0, 1, 1, 1])
        >>> dfa.attribute(model, spelled, metric="log-probability", method="nap").values.shape
        torch.Size([54])
        """
        if len(answers) != len(self):
            raise PromptError(f"{len(self)} pairs need {len(self)} answers, not {len(answers)}.")
        clean, corrupt, answer, wrong, of = [], [], [], [], []
        for i, given in enumerate(answers):
            if isinstance(given, str):
                tokenization.check_tokenizer(self.tokenizer, [given])
                tokens = tokenization.tokens(self.tokenizer, [given], special=False)[0]
            else:
                tokens = _ids(f"the answer of pair {i}", given)
            if not tokens:
                raise PromptError(f"The answer of pair {i} has no tokens.")
            first = self.clean[i, : self.lengths[i]].tolist()
            second = self.corrupt[i, : self.corrupt_lengths[i]].tolist()
            other = (int(self.wrong[i]), int(self.answer[i]))
            for j, token in enumerate(tokens):
                clean.append(first + tokens[:j])
                corrupt.append(second + tokens[:j])
                answer.append(token)
                wrong.append(next(each for each in other if each != token))
                of.append(i)
        made = self.from_tokens(
            clean, corrupt, answer, wrong, different_lengths="pad-left-aligned", tokenizer=self.tokenizer
        )
        if self.spans is not None:  # what is behind the prompt is in none
            made = replace(made, spans=self.spans.take(torch.tensor(of), made.clean.shape[1]))
        return made, torch.tensor(of)

    def with_random_answers(self, seed: int = 0) -> PromptPairs:
        """The same prompts with answers that have nothing to do with them: a control, as MIB's ``control=True``.

        Answer and wrong answer of each pair are drawn from those of the other pairs, neither of them one of its own.
        What scores well here does so whatever is asked.

        Raises
        ------
        PromptError
            If there are fewer than four different answers to draw from.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> model = dfa.zoo.load("llama3-tiny-source")
        >>> pairs = dfa.tasks.load("addition", model.tokenizer, n=16)
        >>> control = pairs.with_random_answers(seed=0)
        >>> bool((control.answer == pairs.answer).any())
        False
        """
        pool = torch.cat([self.answer, self.wrong]).unique()
        if len(pool) < 4:
            raise PromptError(
                f"Random answers are drawn from those of the pairs: at least four different ones are needed, not "
                f"{len(pool)}."
            )
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for i in range(len(self)):
            others = pool[(pool != self.answer[i]) & (pool != self.wrong[i])]
            drawn.append(others[torch.randperm(len(others), generator=generator)[:2]])
        answer, wrong = torch.stack(drawn, 1)
        return replace(self, answer=answer, wrong=wrong, choices=None, corrupt_choices=None)

    def shuffle(self, seed: int = 0) -> PromptPairs:
        """The pairs in random order. The global random state is neither read nor changed."""
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]

    def show(self, n: int = 5) -> None:
        """Print the first ``n`` pairs, clean above corrupt, with the tokens in which they differ marked."""
        print("\n\n".join(self.lines(i) for i in range(min(n, len(self)))))  # noqa: T201 - that is what it is for

    def lines(self, index: int) -> str:
        """One pair as aligned lines of text: clean tokens, corrupt tokens, marks, answers."""

        def words(ids: Tensor) -> list[str]:
            if self.tokenizer is None:
                return [str(int(i)) for i in ids]
            return [self.tokenizer.decode([int(i)]).replace("\n", "\\n") for i in ids]

        clean = words(self.clean[index, : self.lengths[index]])
        corrupt = words(self.corrupt[index, : self.corrupt_lengths[index]])
        rows: list[list[str]] = [["clean  "], ["corrupt"], ["       "]]
        for a, b in zip_longest(clean, corrupt, fillvalue=""):
            width = max(len(a), len(b))
            marks = ("^" * width if a != b else "").ljust(width)
            for row, cell in zip(rows, (a.ljust(width), b.ljust(width), marks), strict=True):
                row.append(cell)
        (answer,), (wrong,) = words(self.answer[index : index + 1]), words(self.wrong[index : index + 1])
        lines = ["|".join(row) for row in rows[:2]] + [" ".join(rows[2])]
        return "\n".join([*(line.rstrip() for line in lines), f"answer {answer!r}, wrong {wrong!r}"])

    def batches(self, batch_size: int) -> Iterator[tuple[Int[Tensor, " batch"], PromptPairs]]:
        """Batches of similar length, longest first, each with the positions of its pairs in the whole.

        Longest first, so that what does not fit into memory fails at once; of equal length, those that share the
        fewest tokens first, so that a batch's prompts share about as many.
        """
        if batch_size < 1:
            raise PromptError(f"batch_size must be at least 1, not {batch_size}.")
        by_shared = torch.argsort(self.shared, stable=True)
        order = by_shared[torch.argsort(self.longest[by_shared], descending=True, stable=True)]
        for index in order.split(batch_size):
            yield index, self[index]

    def require(self, *, d_vocab: int, n_ctx: int | None = None) -> None:
        """Every id must be below ``d_vocab`` and no prompt longer than ``n_ctx``; a :class:`PromptError` otherwise."""
        if n_ctx is not None and self.clean.shape[1] > n_ctx:
            raise PromptError(
                f"There are prompts of up to {self.clean.shape[1]} tokens, but the model takes {n_ctx}: load it with a "
                "larger n_ctx."
            )
        offered = [name for name in ("choices", "corrupt_choices") if getattr(self, name) is not None]
        for name in (*COLUMNS, *offered):
            tensor: Tensor = getattr(self, name)
            highest = int(tensor.max())
            if highest >= d_vocab:
                row = int((tensor.reshape(len(self), -1) >= d_vocab).any(1).nonzero()[0])
                raise PromptError(
                    f"{name} of pair {row} has token id {highest}, but the model's vocabulary has {d_vocab} tokens: "
                    "were these pairs made with another model's tokenizer?"
                )

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        tokens = f"{high} tokens" if low == high else f"{low} to {high} tokens"
        return f"PromptPairs({len(self)} pair{'s' * (len(self) != 1)}, {tokens})"


def _all_spans(parts: Sequence[PromptPairs], width: int) -> Spans | None:
    """The spans of all parts, where they have the same; none where none have."""
    given = [part.spans for part in parts if part.spans is not None]
    if not given:
        return None
    if len(given) < len(parts) or any(each.names != given[0].names for each in given):
        raise PromptError("Some of the pairs have other spans than the others: apply one schema to all.")
    return Spans(given[0].names, torch.cat([each.take(torch.arange(len(each.labels)), width).labels for each in given]))


def _first_tokens(tokenizer: Any, name: str, offered: Mapping[int, Any]) -> Int[Tensor, "pair choice"]:
    """The first token of every choice, -1 where a pair has fewer; ``offered`` by the pair's number."""
    rows = []
    for i, choices in offered.items():
        listed = tokenization.texts(f"{name} of pair {i}", choices)
        are_texts = all(isinstance(c, str) for c in listed)
        found = tokenization.tokens(tokenizer, listed, special=False) if are_texts else [[]]
        if listed and not all(found):
            raise PromptError(f"{name} of pair {i} must be texts of at least one token, not {short(repr(listed))}.")
        rows.append([row[0] for row in found] if listed else [])
    out = torch.full((len(rows), max(len(row) for row in rows)), -1, dtype=torch.long)
    for at, row in enumerate(rows):
        out[at, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out


def _ids(name: str, values: object) -> list[int]:
    """Token ids as integers; what is no integer is refused, also what Python would make one of."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise PromptError(f"{name} must be a list of token ids, not {short(repr(values))}.")
    found = []
    for i, value in enumerate(values):
        token = selection.integer(value)
        if token is None or not abs(token) < 2**63:
            raise PromptError(f"{name} has {short(repr(value))} at {i}, which is no token id (an integer).")
        found.append(token)
    return found


def _common_tokenizer(parts: Sequence[PromptPairs]) -> Any:
    """The tokenizer of all parts; a :class:`PromptError` if they have different ones."""
    known = [part.tokenizer for part in parts if part.tokenizer is not None]
    for tokenizer in known[1:]:
        # loaded twice, a tokenizer is two objects
        if tokenizer is not known[0] and _vocabulary(tokenizer) != _vocabulary(known[0]):
            raise PromptError("The pairs were made with different tokenizers: their token ids mean different words.")
    return known[0] if known else None


def _vocabulary(tokenizer: Any) -> Any:
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else id(tokenizer)


def _unpadded(name: str, rows: object, pad: int | None) -> list[list[int]]:
    if not isinstance(rows, Tensor):
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            raise PromptError(f"{name} must be a list of prompts, each a list of token ids, not {short(repr(rows))}.")
        return [_ids(f"{name} {i}", row) for i, row in enumerate(rows)]
    if rows.ndim != 2 or rows.dtype not in _INTEGERS:
        raise PromptError(f"{name} must be token ids [pair, pos], not {list(rows.shape)} of {rows.dtype}.")
    if pad is None:
        return rows.tolist()
    real = rows != pad
    if len(rows) and bool((~real[:, 0]).any()):
        first = int((~real[:, 0]).nonzero()[0])
        raise PromptError(
            f"{name} {first} starts with padding ({pad}): pad on the right, or positions are not those of the prompts "
            "and TransformerLens's gradients may not be finite."
        )
    lengths = torch.where(real, torch.arange(1, rows.shape[1] + 1), 0).amax(1)
    return [row[:length] for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Choices one after the other, filled up with -1; None unless all have some."""
    given = [part for part in parts if part is not None]
    if len(given) < len(parts):
        return None
    width = max(part.shape[1] for part in given)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in given])
