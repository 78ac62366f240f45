"""Spans: names for stretches of tokens, which align prompts of different lengths.

Position 7 of one prompt is the subject's name, of another a comma. A :class:`Schema` says for every prompt which of its
tokens are the "subject", which the "answer" position; a node may then be a head *at* the subject, whatever its position
there (position-aware circuits, Haklay et al., arXiv 2502.04577).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dfa_lens.data import selection
from dfa_lens.data.content import ByContent
from dfa_lens.errors import PromptError, short

Place = Any
"""Where a span is.

- ``(start, stop)``: tokens of every prompt, counted from its first, or, negative, from its end; ``stop`` is not in it,
  and None is the end: ``(-1, None)`` is the answer's position, ``(0, 1)`` a begin-of-text token.
- a list with such a pair for every prompt, or None where a prompt has no such span;
- a list with a text for every prompt: the tokens in which it first occurs. Needs pairs that know their tokenizer.
"""


@dataclass(frozen=True, eq=False)
class Spans(ByContent):
    """Which span every token of some prompts is in.

    Attributes
    ----------
    names:
        The spans.
    labels:
        [pair, pos] the number of the span that a token is in, -1 where it is in none (padding always).
    """

    names: tuple[str, ...]
    labels: Int[Tensor, "pair pos"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) < len(self.names) or not all(map(_good, self.names)):
            raise PromptError(f"Spans have different names, each a text without '@', not {short(repr(self.names))}.")
        object.__setattr__(self, "labels", self.labels.to(torch.long, copy=True))
        if bool((self.labels < -1).any() | (self.labels >= len(self.names)).any()):
            raise PromptError(f"The labels of tokens are -1, or the number of one of the {len(self.names)} spans.")

    def take(self, rows: Tensor, width: int) -> Spans:
        """Those of some prompts, cut to ``width`` tokens or filled up to it."""
        labels = self.labels[rows][:, :width]
        return Spans(self.names, torch.nn.functional.pad(labels, (0, width - labels.shape[1]), value=-1))

    def number(self, name: str) -> int:
        """The number of a span.

        Raises
        ------
        PromptError
            If the prompts have no such span.
        """
        if name not in self.names:
            raise PromptError(f"The prompts have no span {name!r}; they have {', '.join(map(repr, self.names))}.")
        return self.names.index(name)


def _good(name: object) -> bool:
    return isinstance(name, str) and bool(name) and name.isprintable() and "@" not in name


@dataclass(frozen=True, eq=False)
class Schema(ByContent):
    """Names of spans, and where each of them is.

    Parameters
    ----------
    places:
        Span → where it is, see :data:`Place`. A token is in the first of the spans that have it.
    rest:
        A name for all tokens that are in no span; default: they belong to none, and to no node.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> schema = dfa.Schema({"answer": (-1, None), "begin": (0, 2)}, rest="between")
    >>> aligned = schema.apply(pairs)
    >>> nodes = dfa.NodeSet.heads_and_mlps(model).at_spans(schema.names)
    >>> nodes.names[:4]
    ('a0.h0@answer', 'a0.h0@begin', 'a0.h0@between', 'a0.h1@answer')
    >>> dfa.attribute(model, aligned, nodes=nodes, method="nap").values.shape
    torch.Size([162])
    """

    places: Mapping[str, Place]
    rest: str | None = None

    @classmethod
    def by_token(cls, pairs: Any) -> Schema:
        """Every token a span of its own, counted from the first: "2 John" where all prompts have that token there,
        "2" where they differ.

        Raises
        ------
        PromptError
            If the clean prompts have different lengths: position 7 would be something else in each.

        Examples
        --------
        >>> import dfa_lens as dfa
        >>> model = dfa.zoo.load("llama3-tiny-source")
        >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=4)[:1]
        >>> schema = dfa.Schema.by_token(pairs)
        >>> schema.names[1:4]
        ('1 When', '2 Dora', '3 and')
        >>> nodes = dfa.NodeSet.heads_and_mlps(model).at_spans(schema.names)
        >>> len(dfa.attribute(model, schema.apply(pairs), nodes=nodes, method="nap")) == 54 * len(schema.names)
        True
        """
        lengths = pairs.lengths.unique().tolist()
        if len(lengths) > 1:
            raise PromptError(
                f"Spans by token need prompts of one length, and these have {lengths[0]} to {lengths[-1]} tokens: take "
                "one prompt, pairs[:1], or name spans by what they are."
            )
        places: dict[str, Place] = {}
        for i in range(lengths[0]):
            tokens = pairs.clean[:, i].unique().tolist()
            text = "" if len(tokens) > 1 or pairs.tokenizer is None else pairs.tokenizer.decode(tokens).strip()
            text = "".join(c if c.isprintable() and c != "@" else "\N{MIDDLE DOT}" for c in text)
            places[f"{i} {text}".rstrip()] = (i, i + 1)
        return cls(places)

    @property
    def names(self) -> tuple[str, ...]:
        """The spans, in the order in which they were given, and the rest."""
        return (*self.places, *((self.rest,) if self.rest is not None else ()))

    def apply(self, pairs: Any) -> Any:
        """The pairs with their tokens in spans: ``pairs.spans``. They are those of the clean prompts.

        Raises
        ------
        PromptError
            If a place is none, is for another number of prompts, or a text is not found: which, and in which pair.
        """
        from dataclasses import replace

        return replace(pairs, spans=self.spans(pairs))

    def spans(self, pairs: Any) -> Spans:
        """Which span every token is in, see :meth:`apply`."""
        n, width = pairs.clean.shape
        labels = torch.full((n, width), -1, dtype=torch.long)
        for number, (name, place) in enumerate(self.places.items()):
            for i, (start, stop) in enumerate(_ranges(name, place, pairs)):
                own = labels[i, start:stop]
                own[own < 0] = number
        if self.rest is not None:
            labels[labels < 0] = len(self.places)
        labels[torch.arange(width) >= pairs.lengths[:, None]] = -1
        return Spans(self.names, labels)


def _ranges(name: str, place: Place, pairs: Any) -> Iterable[tuple[int, int]]:
    """First token and the one behind the last, of every prompt; equal where there is no such span."""
    lengths = pairs.lengths.tolist()
    each = [place] * len(lengths) if _is_range(place) else place
    if isinstance(each, (str, bytes)) or not isinstance(each, Sequence) or len(each) != len(lengths):
        raise PromptError(
            f"Span {name!r} needs a pair (start, stop), or one for each of the {len(lengths)} prompts, or a text for "
            f"each, not {short(repr(place))}."
        )
    for i, (own, length) in enumerate(zip(each, lengths, strict=True)):
        if own is None:
            yield 0, 0
        elif isinstance(own, str):
            yield _found(name, own, i, pairs)
        elif _is_range(own):
            start, stop, _ = slice(*own).indices(length)
            yield start, max(start, stop)
        else:
            raise PromptError(f"Span {name!r} of pair {i} is {short(repr(own))}: (start, stop), a text, or None.")


def _is_range(place: object) -> bool:
    return (
        isinstance(place, tuple)
        and len(place) == 2
        and selection.integer(place[0]) is not None
        and (place[1] is None or selection.integer(place[1]) is not None)
    )


def _found(name: str, text: str, i: int, pairs: Any) -> tuple[int, int]:
    """The tokens of clean prompt ``i`` in which a text first occurs."""
    if pairs.tokenizer is None:
        raise PromptError(f"Span {name!r} is given by texts, and these prompt pairs know no tokenizer: give tokens.")
    pieces = [pairs.tokenizer.decode([token]) for token in pairs.clean[i, : pairs.lengths[i]].tolist()]
    start = "".join(pieces).find(text)
    if start < 0 or not text:
        raise PromptError(f"Span {name!r}: the clean prompt of pair {i} has no {text!r} in it.")
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    first = int((ends <= start).sum())
    last = int((ends < start + len(text)).sum())
    return first, last + 1
