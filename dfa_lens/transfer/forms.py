"""What is trained: W itself, or fewer numbers that W is made of.

:func:`dfa_lens.fit` takes one of these as ``form``, by name with its defaults or as an instance:

- ``full`` (:class:`Full`): every entry of W is free (the paper).
- ``kernel`` (:class:`Kernel`): W = Σ_f θ_f K_f + R. The K_f say how alike a source and a target node are (by default
  kind and relative depth, from :mod:`dfa_lens.transfer.similarity` also how heads attend or what nodes do), R is free.
- ``full+bias`` (:class:`Standardised`): scores are centred and whitened over the training tasks; a bias carries what
  all tasks share, W what differs.
- ``low-rank`` (:class:`LowRank`): W = A·B with few columns in A.
- ``block`` (:class:`Block`): only nodes of the same kind are connected, heads to heads and MLPs to MLPs.
- ``depth-band`` (:class:`DepthBand`): only nodes at nearly equal relative depth are connected.

Whatever was trained, what comes out is a W and, for ``full+bias``, a bias: transfer knows nothing of all this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from dfa_lens.data.content import ByContent
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.registry import Registry
from dfa_lens.errors import AlignmentError
from dfa_lens.transfer import similarity


@dataclass(frozen=True, eq=False)
class Problem:
    """What a form is started from.

    Attributes
    ----------
    s:
        [task, source] the scaled source scores of the training tasks.
    source, target:
        The two node sets.
    generator:
        For random starts.
    initial_scale:
        Standard deviation of free entries at the start.
    """

    s: Float[Tensor, "task source"]
    source: NodeSet
    target: NodeSet
    generator: torch.Generator
    initial_scale: float = 0.01

    def noise(self, *shape: int) -> Tensor:
        """Normal numbers of the initial scale, on the scores' device."""
        return (self.initial_scale * torch.randn(*shape, generator=self.generator, dtype=torch.float32)).to(
            self.s.device
        )


class Parameters(nn.Module):
    """The numbers under training; calling it gives W and the bias (or None)."""

    def forward(self) -> tuple[Float[Tensor, "source target"], Float[Tensor, " target"] | None]:
        """W and the bias that the present numbers make."""
        raise NotImplementedError


class Form(ABC):
    """How W is made of trained numbers; derive from it for one of your own, best as a frozen dataclass.

    Its fields are then part of an alignment's provenance, and a study knows one from another.
    """

    name: ClassVar[str]

    @abstractmethod
    def start(self, problem: Problem) -> Parameters:
        """The numbers at the start of training."""

    def tasks_needed(self, problem: Problem) -> int:
        """With fewer training tasks than this, some of the numbers do nothing; fit then warns."""
        return 1


class _Masked(Parameters):
    def __init__(self, W: Tensor, allowed: Tensor | None = None) -> None:
        super().__init__()
        self.W = nn.Parameter(W)
        self.allowed = allowed

    def forward(self) -> tuple[Tensor, None]:
        return (self.W if self.allowed is None else self.W * self.allowed), None


@dataclass(frozen=True, eq=False)
class Full(ByContent, Form):
    """Every entry of W is free.

    Attributes
    ----------
    initial:
        W at the start; default: normal numbers of the initial scale, so that every mask starts near one half.
    """

    name: ClassVar[str] = "full"
    initial: Float[Tensor, "source target"] | None = field(default=None, repr=False)

    @override
    def start(self, problem: Problem) -> Parameters:
        shape = (len(problem.source), len(problem.target))
        if self.initial is None:
            return _Masked(problem.noise(*shape))
        if tuple(self.initial.shape) != shape:
            raise AlignmentError(f"initial has shape {list(self.initial.shape)}; {list(shape)} is needed.")
        return _Masked(self.initial.detach().clone().float().to(problem.s.device))


class _Kernel(Parameters):
    def __init__(self, kernels: Tensor, strength: float, rest: Tensor | None) -> None:
        super().__init__()
        self.kernels = kernels
        self.theta = nn.Parameter(torch.full((len(kernels),), strength, dtype=torch.float32, device=kernels.device))
        self.rest = None if rest is None else nn.Parameter(rest)

    def forward(self) -> tuple[Tensor, None]:
        W = torch.einsum("f,fst->st", self.theta, self.kernels)
        return (W if self.rest is None else W + self.rest), None


@dataclass(frozen=True, eq=False)
class Kernel(ByContent, Form):
    """W = Σ_f θ_f K_f + R: like nodes are connected from the start, and R learns what that misses.

    A new task's importance then reaches target nodes that resemble its source nodes, also those that no training task
    used. Each K_f is divided by the length of its columns, so that every target node gets equally much.

    Attributes
    ----------
    similarities:
        Name → [source, target] how alike two nodes are, see :mod:`dfa_lens.transfer.similarity`; default: equal kind
        and near relative depth.
    strength:
        Every θ_f at the start.
    free:
        Whether R is trained. Without it there are as many numbers as kernels.
    """

    name: ClassVar[str] = "kernel"
    similarities: Mapping[str, Float[Tensor, "source target"]] | None = field(default=None, repr=False)
    strength: float = 1.0
    free: bool = True

    @override
    def start(self, problem: Problem) -> Parameters:
        shape = (len(problem.source), len(problem.target))
        given = self.similarities
        if given is None:
            given = {"kind and depth": similarity.kind_and_depth(problem.source, problem.target)}
        if not given:
            raise AlignmentError("Kernel needs at least one similarity.")
        for name, alike in given.items():
            if tuple(alike.shape) != shape or not bool(torch.isfinite(alike).all()):
                raise AlignmentError(
                    f"The similarity {name!r} must be finite and of shape {list(shape)}, not {list(alike.shape)}."
                )
        kernels = torch.stack([alike.float() for alike in given.values()]).to(problem.s.device)
        kernels = kernels / kernels.norm(dim=1, keepdim=True).clamp_min(1e-9)
        return _Kernel(kernels, self.strength, problem.noise(*shape) if self.free else None)


class _Standardised(Parameters):
    def __init__(self, project: Tensor, mean: Tensor, A: Tensor) -> None:
        super().__init__()
        self.project, self.mean = project, mean
        self.A = nn.Parameter(A)
        self.bias = nn.Parameter(torch.zeros(A.shape[1], dtype=torch.float32, device=A.device))

    def forward(self) -> tuple[Tensor, Tensor]:
        W = self.project @ self.A
        return W, self.bias - self.mean @ W


@dataclass(frozen=True)
class Standardised(Form):
    """ŝ = b + z·A with z the source scores, centred and whitened over the training tasks.

    The scores of different tasks on one model are nearly parallel; what tells tasks apart is in small components.
    Centring leaves what all tasks share to the bias b, whitening gives the small components as much weight as the
    large ones. In the end W = P·A and the bias is b − mean·W, with P the whitening.

    Attributes
    ----------
    ridge:
        Added to every variance, in units of the mean variance: large values centre without whitening. Without any,
        noise in the smallest component counts as much as the largest.
    """

    name: ClassVar[str] = "full+bias"
    ridge: float = 0.3

    @override
    def start(self, problem: Problem) -> Parameters:
        if not self.ridge >= 0:
            raise AlignmentError(f"ridge must be 0 or more, not {self.ridge}.")
        s = problem.s.double()
        mean = s.mean(0)
        _, lengths, axes = torch.linalg.svd(s - mean, full_matrices=False)
        kept = lengths > 1e-6 * lengths.max().clamp_min(1e-12)
        variance = lengths[kept] ** 2
        project = axes[kept].T / (variance + self.ridge * variance.mean()).sqrt()
        return _Standardised(project.float(), mean.float(), problem.noise(project.shape[1], len(problem.target)))

    @override
    def tasks_needed(self, problem: Problem) -> int:
        return 2


class _Product(Parameters):
    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self) -> tuple[Tensor, None]:
        return self.A @ self.B, None


@dataclass(frozen=True)
class LowRank(Form):
    """W = A·B, with A [source, rank] and B [rank, target]: as many directions of scores as the rank matter.

    A and B start with the square root of the initial scale, so that their product starts at about that scale.
    """

    name: ClassVar[str] = "low-rank"
    rank: int = 4

    @override
    def start(self, problem: Problem) -> Parameters:
        if self.rank < 1:
            raise AlignmentError(f"rank must be at least 1, not {self.rank}.")
        grow = problem.initial_scale**-0.5 if problem.initial_scale > 0 else 0.0
        return _Product(
            grow * problem.noise(len(problem.source), self.rank), grow * problem.noise(self.rank, len(problem.target))
        )

    @override
    def tasks_needed(self, problem: Problem) -> int:
        return self.rank


def _connected(allowed: Tensor, what: str) -> Tensor:
    if not allowed.any():
        raise AlignmentError(f"No source node is connected to any target node by {what}.")
    return allowed


@dataclass(frozen=True)
class Block(Form):
    """Only nodes of the same kind are connected: heads to heads, MLP blocks to MLP blocks."""

    name: ClassVar[str] = "block"

    @override
    def start(self, problem: Problem) -> Parameters:
        allowed = _connected(similarity.same_kind(problem.source, problem.target), "kind").to(problem.s.device)
        return _Masked(problem.noise(*allowed.shape), allowed)


@dataclass(frozen=True)
class DepthBand(Form):
    """Only nodes whose relative depths (0 the first layer, 1 the last) differ by at most ``width`` are connected."""

    name: ClassVar[str] = "depth-band"
    width: float = 0.25

    @override
    def start(self, problem: Problem) -> Parameters:
        if not self.width > 0:
            raise AlignmentError(f"width must be positive, not {self.width}.")
        gap = similarity.depth_gap(problem.source, problem.target).abs()
        allowed = _connected((gap <= self.width).float(), f"a depth band of {self.width}").to(problem.s.device)
        return _Masked(problem.noise(*allowed.shape), allowed)


FORMS: Registry[type[Form]] = Registry(
    "form", AlignmentError, {kind.name: kind for kind in (Full, Kernel, Standardised, LowRank, Block, DepthBand)}
)
"""The forms by name; add one of your own by ``register``, or pass an instance."""


def resolve(form: object) -> Form:
    """The form of that name with its defaults; an instance is returned unchanged."""
    return form if isinstance(form, Form) else FORMS.find(form)()
