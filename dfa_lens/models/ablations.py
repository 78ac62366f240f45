"""Ablations: what stands in the place of a node that is left out.

Wherever a node is left out (a circuit's complement, a single node in ``exact``, the far end of a gradient's path, the
closed part of a soft mask), something else is put where its activation was. By default that is the node's activation in
the corrupt run. The others need no corrupt prompt: they are constants, the same for every example.

========================= =========================================================================================
name                      what stands there
========================= =========================================================================================
``corrupt`` (default)     the activation in the corrupt run of the same pair, token by token
``zero``                  zero
``mean``                  the mean over the tokens of a data set
``mean-positional``       the mean over a data set at each position, counted from the answer backwards
``optimal``               a constant per node, trained so that leaving nodes out costs as little as possible
========================= =========================================================================================

What all of them have in common is :class:`Reference`, which a :class:`~dfa_lens.models.paired_run.PairedRun` hands out
in the place of the corrupt run's activations; the run without information, m(∅), is then the one in which the embedding
and every node are at their reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from dfa_lens.data.content import ByContent
from dfa_lens.data.nodes import INPUT_POINT, NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.registry import Registry
from dfa_lens.errors import DfaError, HookError, PromptError, short, unknown
from dfa_lens.models import backend
from dfa_lens.models.backend import HookedModel, HookFunction
from dfa_lens.models.passes import Layout, attention_mask
from dfa_lens.models.runner import Runner

__all__ = [
    "ABLATIONS",
    "Ablation",
    "Constants",
    "Corrupt",
    "Mean",
    "Optimal",
    "Reference",
    "Zero",
    "activations",
    "constants",
    "resolve",
]

Prompts = Literal["clean", "corrupt"]
"""Which prompts of the pairs a mean is taken over."""

Circuits = Literal["any", "one"]
"""Which nodes are left out while constants are trained.

- ``any``: of each example a random part, of every size alike. For curves and circuits.
- ``one``: one node of each example. For ``exact``.
"""


class RunOptions(NamedTuple):
    """How the passes of an operation are made: examples a pass, and where its logits are read."""

    batch_size: int
    positions: Literal["answer", "all"] = "answer"


@dataclass(frozen=True, eq=False)
class Ablation(ByContent, ABC):
    """What stands in the place of nodes that are left out; derive from it for one of your own.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> list(dfa.ablations.ABLATIONS)
    ['corrupt', 'zero', 'mean', 'mean-positional', 'optimal']
    """

    name: ClassVar[str]  #: what it is called, in metadata

    @abstractmethod
    def constants(
        self, runner: Runner, nodes: NodeSet, pairs: PromptPairs, layouts: Mapping[str, Layout], run: RunOptions
    ) -> Constants:
        """The numbers for every hook point of ``layouts``, those of ``nodes`` and the embedding.

        Parameters
        ----------
        runner:
            The model, inside a :meth:`~dfa_lens.models.runner.Runner.session`.
        pairs:
            Those that the operation runs on.
        layouts:
            Hook point → the layout of its activation.
        run:
            How passes are made.
        """

    def reference(
        self,
        runner: Runner,
        nodes: NodeSet,
        pairs: PromptPairs,
        *,
        batch_size: int = 16,
        positions: Literal["answer", "all"] = "answer",
    ) -> Reference | None:
        """This ablation made ready for an operation; None where the corrupt run is what stands there."""
        names = list(dict.fromkeys((INPUT_POINT, *nodes.points)))
        layouts = runner.layout(names, positions=positions)
        found = self.constants(runner, nodes, pairs, layouts, RunOptions(batch_size, positions))
        return Reference(found, layouts, _places(runner, names), runner.backend.dtype)


@dataclass(frozen=True, eq=False)
class Corrupt(Ablation):
    """The activation in the corrupt run of the same pair: interchange with a counterfactual prompt. The default."""

    name: ClassVar[str] = "corrupt"

    def reference(self, *args: Any, **options: Any) -> None:  # noqa: D102
        return None

    def constants(self, *args: Any) -> Constants:  # noqa: D102
        raise DfaError("The corrupt activation is another one for every example: there are no constants.")


@dataclass(frozen=True, eq=False)
class Zero(Ablation):
    """Zero, as if the node wrote nothing. The model never sees that, so what breaks may have other reasons.

    Norms ignore how long a vector is, so the path of ``nap-ig-inputs`` from a zero embedding to the clean one passes
    hardly anything but the clean run: its scores and their completeness mean little there. ``exact`` is what it says.
    """

    name: ClassVar[str] = "zero"

    def constants(  # noqa: D102
        self, runner: Runner, nodes: NodeSet, pairs: PromptPairs, layouts: Mapping[str, Layout], run: RunOptions
    ) -> Constants:
        return Constants({point: torch.zeros((), dtype=torch.float32) for point in layouts})


@dataclass(frozen=True, eq=False)
class Mean(Ablation):
    """The mean over a data set: what the node does there on the whole, whatever the prompt.

    Sums are made in float64 over real tokens, never over padding.

    Parameters
    ----------
    pairs:
        The data set; default: the pairs that the operation runs on.
    positional:
        A mean of its own for each position, counted from the answer backwards, so that the answer's position meets
        those of other prompts, whatever their lengths; of prompts of one template and length, that is the mean at each
        token. False is one mean over all tokens, in which the answer's position weighs as much as any other.
    prompts:
        "clean" or "corrupt": which prompts of the pairs.

    Raises
    ------
    PromptError
        In use with ``positional``, if a prompt is longer than all those that the means are of.
    HookError
        In use, of hook points whose axis 1 is not the position (attention patterns).

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> ablation = dfa.ablations.Mean(dfa.tasks.load("ioi", model.tokenizer, n=32, seed=1), positional=True)
    >>> dfa.attribute(model, pairs, method="nap", ablation=ablation).meta["ablation"]["name"]
    'mean-positional'
    """

    pairs: PromptPairs | None = None
    positional: bool = False
    prompts: Prompts = "clean"

    def __post_init__(self) -> None:
        if self.prompts not in get_args(Prompts):
            raise unknown("prompts", self.prompts, get_args(Prompts))
        if self.pairs is not None and not isinstance(self.pairs, PromptPairs):
            raise DfaError(f"A mean is taken over PromptPairs, not {short(repr(self.pairs))}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """What it is called, in metadata."""
        return "mean-positional" if self.positional else "mean"

    def constants(  # noqa: D102
        self, runner: Runner, nodes: NodeSet, pairs: PromptPairs, layouts: Mapping[str, Layout], run: RunOptions
    ) -> Constants:
        own = pairs if self.pairs is None else self.pairs
        if self.pairs is not None:
            runner.require(own)
        means, _ = _moments(runner, own, layouts, self.prompts, run, positional=self.positional)
        return Constants(means, self.positional)


@dataclass(frozen=True, eq=False)
class Optimal(Ablation):
    """A constant per node, trained so that leaving nodes out costs as little as possible (Li & Janson, 2024).

    Optimal ablation (arXiv 2409.09951) sets a node to the constant a* that minimises the expected loss: what still
    breaks is then the information that the node carried, and not that the model was given something it never sees. The
    loss is KL(P_clean ‖ P) at the answer; every node has one constant, the same at all positions, and all of them are
    trained at once, from the means on, by Adam in units of each hook point's spread. The embedding stays at its mean.
    Costs 3 forward-equivalents a step.

    Parameters
    ----------
    pairs:
        What they are trained on; default: the pairs that the operation runs on. Give others than those to be judged.
    circuits:
        Which nodes are left out in training, see :data:`Circuits`.
    steps, lr, batch_size, seed:
        Of the training. The global random state is neither read nor changed.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> train = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> trained = dfa.ablations.constants(model, train, dfa.ablations.Optimal(steps=2))
    >>> trained.values["blocks.0.attn.hook_z"].shape  # one for each head, used again and again
    torch.Size([8, 16])
    """

    name: ClassVar[str] = "optimal"
    pairs: PromptPairs | None = None
    circuits: Circuits = "any"
    steps: int = 100
    lr: float = 0.05
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.circuits not in get_args(Circuits):
            raise unknown("circuits", self.circuits, get_args(Circuits))
        for each, least in (("steps", 0), ("batch_size", 1)):
            if getattr(self, each) < least:
                raise DfaError(f"{each} must be at least {least}, not {getattr(self, each)!r}.")
        if not self.lr > 0:
            raise DfaError(f"lr must be positive, not {self.lr!r}.")

    def constants(  # noqa: D102
        self, runner: Runner, nodes: NodeSet, pairs: PromptPairs, layouts: Mapping[str, Layout], run: RunOptions
    ) -> Constants:
        from dfa_lens.models.optimal import train

        own = pairs if self.pairs is None else self.pairs
        if self.pairs is not None:
            runner.require(own)
        means, spreads = _moments(runner, own, layouts, "clean", run)
        found = train(runner, nodes, own, layouts, means, spreads, self)
        return Constants({**means, **found})


@dataclass(frozen=True, eq=False)
class Constants(Ablation):
    """Given numbers: those of another ablation, kept, or your own.

    Parameters
    ----------
    values:
        Hook point → what stands there for every example: of the shape of its activation without batch and position,
        [head, d_head] for ``hook_z``; the embedding's (``hook_embed``) among them. A tensor without axes is that number
        everywhere.
    positional:
        The values have a first axis more, the position, counted from the answer backwards: [offset, …].

    Raises
    ------
    HookError
        In use, if a hook point has no value, or one of another shape.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> means = dfa.ablations.constants(model, pairs, "mean")
    >>> means.values["hook_embed"].shape
    torch.Size([128])
    """

    name: ClassVar[str] = "constants"
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    positional: bool = False

    def constants(  # noqa: D102
        self, runner: Runner, nodes: NodeSet, pairs: PromptPairs, layouts: Mapping[str, Layout], run: RunOptions
    ) -> Constants:
        for point, layout in layouts.items():
            value = self.values.get(point)
            if value is None:
                raise HookError(f"The ablation has no constant for hook point {point!r}.")
            width = layout.shape[1 + len(layout.position_axes) :]
            found = tuple(value.shape[1:]) if self.positional and layout.position_axes else tuple(value.shape)
            if value.ndim and found != width:
                raise HookError(
                    f"The constant at {point!r} has shape {list(value.shape)}, and {list(width)} is needed"
                    + (" behind the position." if self.positional else ".")
                )
        return self


@dataclass(frozen=True)
class Reference:
    """What stands in the place of nodes that are left out, ready to be put there on any batch.

    Attributes
    ----------
    constants:
        The numbers.
    layouts:
        Hook point → the layout of its activation.
    places:
        Hook point → the device that it is computed on.
    dtype:
        The model's.
    """

    constants: Constants
    layouts: Mapping[str, Layout]
    places: Mapping[str, torch.device]
    dtype: torch.dtype

    def activations(self, points: Iterable[str], pairs: PromptPairs) -> dict[str, Tensor]:
        """Hook point → [batch, pos, …], for the clean prompts of a batch; views wherever the examples are alike."""
        return {point: self._at(point, pairs) for point in points}

    def _at(self, point: str, pairs: PromptPairs) -> Tensor:
        layout = self.layouts[point]
        value = self.constants.values[point].to(device=self.places[point], dtype=self.dtype)
        return expanded(value, layout, pairs, positional=self.constants.positional)


def expanded(value: Tensor, layout: Layout, pairs: PromptPairs, *, positional: bool = False) -> Tensor:
    """A constant as an activation of a batch: [batch, pos, …]."""
    n, width = pairs.clean.shape
    axes = layout.position_axes
    shape = [n, *(width if axis in axes else size for axis, size in enumerate(layout.shape) if axis)]
    if not value.ndim:
        return value.expand(shape)
    if not positional or not axes:
        return value[(None,) * (1 + len(axes))].expand(shape)
    longest = int(pairs.lengths.max())
    if longest > len(value):
        raise PromptError(
            f"There are prompts of {longest} tokens, and the means by position are of prompts of up to {len(value)}: "
            "take them over longer prompts, or take positional=False."
        )
    # padding stands behind the answer: it gets the answer's, and nobody reads it
    offset = (pairs.lengths[:, None] - 1 - torch.arange(width)).clamp_min(0)
    return value[offset.to(value.device)]


# --- making them ---------------------------------------------------------------------------------------------------


def _moments(
    runner: Runner,
    pairs: PromptPairs,
    layouts: Mapping[str, Layout],
    prompts: Prompts,
    run: RunOptions,
    *,
    positional: bool = False,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The mean at every hook point, [*width] or [offset, *width], and how far a number is from it on the whole (RMS).

    The spread is over all tokens, with ``positional``, too.
    """
    for point, layout in layouts.items():
        if layout.position_axes not in ((1,), ()):
            raise HookError(
                f"Axis 1 of hook point {point!r} is not the position in the prompt, so there is no mean over tokens "
                "there: use the ablation 'corrupt' or 'zero'."
            )
    lengths = pairs.lengths if prompts == "clean" else pairs.corrupt_lengths
    tokens = pairs.clean if prompts == "clean" else pairs.corrupt
    longest = int(lengths.max())
    sums: dict[str, Tensor] = {}
    squares = dict.fromkeys(layouts, 0.0)
    counts = torch.zeros(longest, dtype=torch.float64)

    def add(point: str, offsets: Int[Tensor, "batch pos"], now: Tensor) -> None:
        axes = layouts[point].position_axes
        rows = now.detach().double()
        if axes:
            real = offsets.to(now.device) >= 0
            rows, place = rows[real], offsets.to(now.device)[real]
        else:  # positions other than the answer's have been dropped
            place = torch.zeros(len(now), dtype=torch.long, device=now.device)
        if point not in sums:
            sums[point] = rows.new_zeros(longest if axes else 1, *rows.shape[1:])
        sums[point].index_add_(0, place, rows)
        squares[point] += float(rows.square().sum())

    with torch.no_grad():
        for index, _ in pairs.batches(run.batch_size):
            own = lengths[index]
            width = int(own.max())
            for together in runner.together(own):
                rows, real = index[together], own[together]
                offsets = torch.where(
                    attention_mask(real, width).bool(), real[:, None] - 1 - torch.arange(width), torch.tensor(-1)
                )
                counts += torch.bincount(offsets[offsets >= 0], minlength=longest)
                taps: list[tuple[str, HookFunction]] = [(point, partial(add, point, offsets)) for point in layouts]
                runner.run(tokens[rows][:, :width], real, taps, positions=run.positions)
    means: dict[str, Tensor] = {}
    spreads: dict[str, float] = {}
    for point, total in sums.items():
        counted = counts if layouts[point].position_axes else counts[:1]
        n = float(counted.sum())
        whole = total.sum(0) / n
        variance = squares[point] / n / max(whole.numel(), 1) - float(whole.square().mean())
        spreads[point] = max(variance, 0.0) ** 0.5
        if positional and layouts[point].position_axes:
            shape = (-1, *[1] * (total.ndim - 1))
            means[point] = (total / counted.to(total.device).reshape(shape)).float()
        else:
            means[point] = whole.float()
    return means, spreads


def _places(runner: Runner, names: Iterable[str]) -> dict[str, torch.device]:
    """The device of every hook point's activation."""
    found: dict[str, torch.device] = {}

    def look(name: str, now: Tensor) -> None:
        found[name] = now.device

    taps: list[tuple[str, HookFunction]] = [(name, partial(look, name)) for name in names]
    with runner.session(), torch.no_grad():
        runner.run(torch.zeros(1, 2, dtype=torch.long), torch.full((1,), 2), taps)
    return found


ABLATIONS: Registry[Ablation] = Registry(
    "ablation",
    entries={
        "corrupt": Corrupt(),
        "zero": Zero(),
        "mean": Mean(),
        "mean-positional": Mean(positional=True),
        "optimal": Optimal(),
    },
)
"""The ablations by name; add one of your own by ``register``, or hand the object in."""


def resolve(ablation: str | Ablation) -> Ablation:
    """The ablation of that name, or the object itself.

    Raises
    ------
    DfaError
        If it is neither.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.ablations.resolve("mean-positional") == dfa.ablations.Mean(positional=True)
    True
    """
    if isinstance(ablation, Ablation):
        return ablation
    return ABLATIONS.find(ablation)


def described(ablation: Ablation) -> dict[str, Any]:
    """An ablation as metadata has it: nothing of the default, else its name and options.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.ablations.described(dfa.ablations.Corrupt())
    {}
    >>> dfa.ablations.described(dfa.ablations.Mean())
    {'ablation': {'name': 'mean', 'pairs': None, 'positional': False, 'prompts': 'clean'}}
    """
    from dfa_lens.data.content import plain

    if isinstance(ablation, Corrupt):
        return {}
    options = {key: value for key, value in plain(ablation).items() if key != "type"}
    return {"ablation": {"name": ablation.name, **options}}


@backend.runs("model")
def constants(
    model: HookedModel,
    pairs: PromptPairs,
    ablation: str | Ablation = "mean",
    *,
    nodes: NodeSet | None = None,
    batch_size: int = 16,
) -> Constants:
    """The numbers of an ablation on a model, to be used again: means are then taken, and constants trained, only once.

    Parameters
    ----------
    model:
        Left as it was.
    pairs:
        What means are taken over, and optimal constants trained on, where the ablation has no pairs of its own.
    ablation:
        A name of :data:`ABLATIONS` but "corrupt", or an object.
    nodes:
        Which nodes; default: all attention heads and MLP blocks.

    Returns
    -------
    Constants
        An ablation.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> train = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> means = dfa.ablations.constants(model, train, "mean")
    >>> test = dfa.tasks.load("ioi", model.tokenizer, split="test", n=8)
    >>> scores = dfa.attribute(model, train, method="nap", ablation=means)
    >>> dfa.faithfulness_curve(model, test, scores, ablation=means, sizes=[0, 20, 54]).faithfulness.shape
    (3,)
    """
    runner, own, chosen = _checked(model, pairs, nodes)
    with runner.session(passes=1 + len(pairs) // batch_size):
        made = resolve(ablation).reference(runner, chosen, own, batch_size=batch_size)
        if made is None:
            raise DfaError("The corrupt activation is another one for every example: there are no constants.")
        found = made.constants
        return Constants({point: value.cpu() for point, value in found.values.items()}, found.positional)


@backend.runs("model")
def activations(
    model: HookedModel,
    pairs: PromptPairs,
    ablation: str | Ablation = "corrupt",
    *,
    nodes: NodeSet | None = None,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """What stands in the place of nodes that are left out, for :func:`dfa_lens.hooks.gate` and ``ablate``.

    Parameters
    ----------
    pairs:
        The batch on whose clean prompts the model will be run, with its padding.
    ablation:
        A name of :data:`ABLATIONS`, or an object.
    nodes:
        Which nodes; default: all attention heads and MLP blocks.

    Returns
    -------
    dict
        Hook point → activation [batch, pos, …]: ``corrupt`` of the hooks.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> model = dfa.zoo.load("llama3-tiny-source")
    >>> pairs = dfa.tasks.load("ioi", model.tokenizer, n=8)
    >>> nodes = dfa.NodeSet.heads_and_mlps(model)
    >>> means = dfa.ablations.activations(model, pairs, "mean")
    >>> with dfa.hooks.ablate(model, nodes, remove=["a5.h6", "m0"], corrupt=means):
    ...     logits = model(pairs.clean)
    >>> logits.shape[:2] == pairs.clean.shape
    True
    """
    from dfa_lens.models.hooks import record_hooks

    runner, own, chosen = _checked(model, pairs, nodes)
    with runner.session(passes=1 + len(pairs) // batch_size), torch.no_grad():
        made = resolve(ablation).reference(runner, chosen, own, batch_size=batch_size, positions="all")
        if made is not None:
            return made.activations(chosen.points, own)
        into: dict[str, Tensor] = {}
        runner.run(own.corrupt, own.corrupt_lengths, record_hooks(chosen, into), positions="all")
        return into


def _checked(model: HookedModel, pairs: PromptPairs, nodes: NodeSet | None) -> tuple[Runner, PromptPairs, NodeSet]:
    from dfa_lens.data.arguments import expect

    expect(2, "pairs", pairs, PromptPairs)
    runner = Runner(model)
    runner.require(pairs)
    chosen = nodes if nodes is not None else NodeSet.heads_and_mlps(model)
    runner.check_points(chosen.points)
    return runner, pairs, chosen
