"""What is trained for edges: the two matrices A and B of Ŝ = Aᵀ·S·B, or fewer numbers that they are made of.

:func:`dfa_lens.fit` of edge scores takes one of these as ``form``, by name with its defaults or as an instance:

- ``full`` (:class:`Bilinear`): A and B, readers of a kind among themselves; they start from likeness of nodes.
- ``free`` (:class:`FreeMask`): a number for every edge, whatever the scores: the ceiling, for one model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.content import ByContent
from dfa_lens.data.edge_alignment import EdgeMap, ReaderMap
from dfa_lens.data.edges import EdgeSet
from dfa_lens.data.registry import Registry
from dfa_lens.errors import AlignmentError
from dfa_lens.transfer import similarity


@dataclass(frozen=True, eq=False)
class EdgeProblem:
    """What a form is started from.

    Attributes
    ----------
    S:
        [task, writer, reader] the scaled source scores of the training tasks, 0 where there is no edge.
    source, target:
        The edges of the two models.
    generator:
        For random starts.
    initial_scale:
        Standard deviation of free entries at the start.
    """

    S: Float[Tensor, "task writer reader"]
    source: EdgeSet
    target: EdgeSet
    generator: torch.Generator
    initial_scale: float = 0.01

    def noise(self, *shape: int) -> Tensor:
        """Normal numbers of the initial scale, on the scores' device."""
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float32)
        return (self.initial_scale * drawn).to(self.S.device)


class EdgeParameters(nn.Module):
    """The numbers under training; calling it gives A, B and the bias (or None)."""

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and the bias that the present numbers make."""
        raise NotImplementedError


class EdgeForm(ABC):
    """How A and B are made of trained numbers; derive from it for one of your own, best as a frozen dataclass."""

    name: ClassVar[str]

    @abstractmethod
    def start(self, problem: EdgeProblem) -> EdgeParameters:
        """The numbers at the start of training."""


class _Bilinear(EdgeParameters):
    def __init__(self, A: Tensor, B: Tensor, rest_A: Tensor, rest_B: Tensor, readers: ReaderMap, bias: Tensor | None):
        super().__init__()
        self.start_A, self.start_B, self.readers = A, B, readers
        self.A, self.B = nn.Parameter(rest_A), nn.Parameter(rest_B)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.B.shape == self.start_B.shape:
            B = self.start_B + self.B * self.readers.same_kind
        else:  # a map between nodes, which queries, keys and values share
            B = self.start_B + self.readers(self.B, self.B[0, 0])
        return self.start_A + self.A, B, self.bias


@dataclass(frozen=True, eq=False)
class Bilinear(ByContent, EdgeForm):
    """A and B of Ŝ = Aᵀ·S·B, near a start in which like nodes are connected.

    Attributes
    ----------
    start_from:
        [source, target] how alike two heads or MLP blocks are, see :mod:`dfa_lens.transfer.similarity`, or an
        alignment of nodes; default: equal kind and near relative depth. Of a matrix, the columns are divided by their
        lengths.
    strength:
        What the start is multiplied with, in A and in B.
    shared:
        True: B is made of one number for every pair of nodes, which queries, keys and values share. False: queries,
        keys and values have their own.
    bias:
        Whether a matrix C, the same for all tasks, is trained beside.
    """

    name: ClassVar[str] = "full"
    start_from: Alignment | Float[Tensor, "source target"] | None = field(default=None, repr=False)
    strength: float = 1.0
    shared: bool = True
    bias: bool = False

    @override
    def start(self, problem: EdgeProblem) -> EdgeParameters:
        source, target, device = problem.source, problem.target, problem.S.device
        begun = self._begun(source, target)
        strength = self.strength
        readers = ReaderMap(source, target).to(device)
        rest_A = problem.noise(len(source.nodes), len(target.nodes))
        rest_B = problem.noise(*((len(source.nodes), len(target.nodes)) if self.shared else begun.B.shape))
        bias = problem.noise(*target.shape) if self.bias else None
        return _Bilinear(strength * begun.A.to(device), strength * begun.B.to(device), rest_A, rest_B, readers, bias)

    def _begun(self, source: EdgeSet, target: EdgeSet) -> EdgeMap:
        given = self.start_from
        nodes = (source.nodes[1:], target.nodes[1:])
        if isinstance(given, Alignment):
            return EdgeMap.from_nodes(given.W, given.source, given.target, source, target)
        if given is None:
            given = similarity.kind_and_depth(*nodes)
        if tuple(given.shape) != (len(nodes[0]), len(nodes[1])):
            raise AlignmentError(
                f"start_from has shape {list(given.shape)}; {[len(each) for each in nodes]} is needed: heads and MLP "
                "blocks of the source and of the target."
            )
        given = given.float() / given.float().norm(dim=0, keepdim=True).clamp_min(1e-9)
        return EdgeMap.from_nodes(given, *nodes, source, target)


class _Free(EdgeParameters):
    def __init__(self, problem: EdgeProblem) -> None:
        super().__init__()
        (writers, readers), (new_writers, new_readers) = problem.source.shape, problem.target.shape
        self.nothing = (problem.S.new_zeros(writers, new_writers), problem.S.new_zeros(readers, new_readers))
        self.bias = nn.Parameter(problem.noise(new_writers, new_readers))

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return (*self.nothing, self.bias)


@dataclass(frozen=True)
class FreeMask(EdgeForm):
    """Ŝ = C: a number for every edge of the target, the same whatever the scores are."""

    name: ClassVar[str] = "free"

    @override
    def start(self, problem: EdgeProblem) -> EdgeParameters:
        return _Free(problem)


EDGE_FORMS: Registry[type[EdgeForm]] = Registry(
    "edge form", AlignmentError, {kind.name: kind for kind in (Bilinear, FreeMask)}
)
"""The forms of edge alignments by name; add one of your own by ``register``, or pass an instance."""


def resolve(form: object) -> EdgeForm:
    """The form of that name with its defaults; an instance is returned unchanged."""
    if isinstance(form, EdgeForm):
        return form
    if isinstance(form, str) or form is None:
        return EDGE_FORMS.find(form)()
    name = getattr(form, "name", type(form).__name__)
    raise AlignmentError(f"The form {name!r} is one of W: with edge scores take one of dfa_lens.transfer.edge_forms.")
