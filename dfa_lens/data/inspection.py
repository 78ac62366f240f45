"""What every node does on one prompt: where a head looks, what it adds to the answer, which tokens it speaks for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from dfa_lens.data import html
from dfa_lens.data.content import ByContent
from dfa_lens.data.files import load_tensors, made_from, parse_json, save_tensors
from dfa_lens.data.nodes import NodeSet
from dfa_lens.errors import MeasurementError, NodeError

_FORMAT = "dfa_lens inspection 1"
#: What its file has as JSON.
_TEXTS = ("nodes", "tokens", "answer", "wrong", "promoted", "suppressed")


class TokenLogit(NamedTuple):
    """A token and what a node adds to its logit."""

    text: str
    token: int
    logit: float


@dataclass(frozen=True, eq=False, repr=False)
class Inspection(ByContent):
    """What the nodes of a model do on one prompt, found by :func:`~dfa_lens.evaluation.inspection.inspect`.

    Attributes
    ----------
    nodes:
        Heads and MLP blocks.
    tokens:
        The clean prompt, token by token.
    answer, wrong:
        The tokens whose logits are compared.
    direct:
        [node] direct effect on logit(answer) − logit(wrong), in logits: what the node adds to the residual stream at
        the last token, through the final norm with its scale frozen, times the difference of the two columns of the
        unembedding ("direct logit attribution"). What it does by way of later nodes is not in it.
    promoted, suppressed:
        For each node the tokens to whose logits it adds most and least in the same way, best and worst first. Logits
        are relative to their mean over the vocabulary, which no probability depends on.
    patterns:
        [head, query, key] attention in the clean run, heads in the order of ``nodes``; None where it was not asked
        for.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> found = dfa.inspect(model, dfa.tasks.load("ioi", model.tokenizer, n=4))
    >>> found.pattern("a0.h0").sum(1).round(decimals=3).unique().tolist()
    [1.0]
    """

    nodes: NodeSet
    tokens: tuple[str, ...]
    answer: str
    wrong: str
    direct: Float[Tensor, " node"]
    promoted: tuple[tuple[TokenLogit, ...], ...]
    suppressed: tuple[tuple[TokenLogit, ...], ...]
    patterns: Float[Tensor, "head query key"] | None = None

    def __post_init__(self) -> None:
        n, heads, length = len(self.nodes), self.heads, len(self.tokens)
        if not len(self.direct) == len(self.promoted) == len(self.suppressed) == n:
            raise MeasurementError(f"There are {n} nodes, and what is said of them is for another number.")
        if self.patterns is not None and tuple(self.patterns.shape) != (len(heads), length, length):
            raise MeasurementError(
                f"Attention patterns of {len(heads)} heads on {length} tokens are [{len(heads)}, {length}, {length}], "
                f"not {list(self.patterns.shape)}."
            )

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the nodes that are heads."""
        return tuple(node.name for node in self.nodes if node.kind == "head")

    def pattern(self, head: str) -> Float[Tensor, "query key"]:
        """[query, key] where a head looks; each row adds up to 1.

        Raises
        ------
        NodeError
            If it is no head of the model, or there are no patterns.
        """
        if self.patterns is None:
            raise NodeError("These nodes were inspected without attention patterns (patterns=False).")
        if head not in self.heads:
            raise NodeError(f"{head!r} is no head here; the heads are {self.heads[0]} … {self.heads[-1]}.")
        return self.patterns[self.heads.index(head)]

    def to_frame(self) -> Any:
        """A pandas table, a row per node, the largest direct effect first: node, direct, promoted, suppressed (texts),
        looks_at (the token that a head attends to most from the last one, and how much of its attention goes there)."""
        import pandas as pd

        rows = []
        heads = {name: number for number, name in enumerate(self.heads)}
        for i, node in enumerate(self.nodes):
            looks = ""
            if self.patterns is not None and node.name in heads:
                last = self.patterns[heads[node.name], -1]
                looks = f"{self.tokens[int(last.argmax())]!r} {float(last.max()):.2f}"
            words = [", ".join(repr(each.text) for each in of[i]) for of in (self.promoted, self.suppressed)]
            rows.append((node.name, float(self.direct[i]), *words, looks))
        table = pd.DataFrame(rows, columns=["node", "direct", "promoted", "suppressed", "looks_at"])
        return table.sort_values("direct", key=abs, ascending=False, kind="stable", ignore_index=True)

    # --- files -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with all of it, and a checksum."""
        content = {
            "nodes": self.nodes.to_records(),
            **{name: getattr(self, name) for name in _TEXTS if name != "nodes"},
        }
        tensors = {"direct": self.direct} | ({} if self.patterns is None else {"patterns": self.patterns})
        save_tensors(path, tensors, {name: json.dumps(value) for name, value in content.items()}, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> Inspection:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not a file of an inspection.

        Examples
        --------
        >>> import tempfile, dfa_lens as dfa
        >>> model = dfa.zoo.load("llama3-tiny-source")
        >>> found = dfa.inspect(model, dfa.tasks.load("ioi", model.tokenizer, n=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found.save(f"{folder}/ioi.safetensors")
        ...     dfa.Inspection.load(f"{folder}/ioi.safetensors") == found
        True
        """
        tensors, metadata = load_tensors(path, _FORMAT, _TEXTS)

        def make() -> Inspection:
            content = {name: parse_json(metadata[name]) for name in _TEXTS}
            direct, patterns = tensors["direct"], tensors.get("patterns")
            for name, tensor in (("direct effects", direct), ("attention patterns", patterns)):
                if tensor is not None and not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                    raise MeasurementError(f"its {name} ({tensor.dtype}) are not all finite numbers")
            if direct.ndim != 1:
                raise MeasurementError(f"its direct effects are {list(direct.shape)}, not one for each node")
            texts = (*content["tokens"], content["answer"], content["wrong"])
            if not isinstance(content["tokens"], list) or not all(isinstance(text, str) for text in texts):
                raise MeasurementError("its tokens are not all texts")
            return cls(
                NodeSet.from_records(content["nodes"]),
                tuple(content["tokens"]),
                content["answer"],
                content["wrong"],
                direct,
                _token_logits(content["promoted"]),
                _token_logits(content["suppressed"]),
                patterns,
            )

        return made_from(path, "a file of an inspection", make)

    def __repr__(self) -> str:
        return (
            f"Inspection({len(self.nodes)} nodes on {len(self.tokens)} tokens, {self.answer!r} against {self.wrong!r})"
        )

    def _repr_html_(self) -> str:
        """The nodes with the largest direct effects, for notebooks."""
        return html.shown(repr(self), self.to_frame())


def _token_logits(rows: Sequence[Sequence[Sequence[Any]]]) -> tuple[tuple[TokenLogit, ...], ...]:
    """The tokens of every node, of what a file says."""
    found = tuple(tuple(TokenLogit(*each) for each in row) for row in rows)
    for each in (each for row in found for each in row):
        number = type(each.logit) in (int, float) and math.isfinite(each.logit)
        if not isinstance(each.text, str) or type(each.token) is not int or not number:
            raise MeasurementError("its tokens are not all a text, a number and what is added to a logit")
    return found
