"""How scores are read off measurements: two ways to learn it from nodes whose scores are known.

- ``trees`` (:class:`Trees`): extremely randomised trees.
- ``attention`` (:class:`Attention`): ŝ_i = Σ_j K(φ_i, φ_j)·s_j + f(φ_i), an attention from target nodes to the nodes
  that teach. Its numbers are few and differentiable; a fixed K over one task's source nodes, and f = 0, is the
  published W.

Register one of your own in ``READERS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from dfa_lens.data.edges import EdgeSet
from dfa_lens.data.measurements import Measurements
from dfa_lens.data.registry import Registry
from dfa_lens.errors import AlignmentError, MeasurementError


@dataclass(frozen=True)
class Table:
    """What is learned from: a row for every node of every teaching task.

    Attributes
    ----------
    features:
        φ of every node, see :func:`features`.
    scores:
        Its score; of each task, the root of their mean square is 1.
    share:
        Its part of what its group does exactly, on the same scale; 0 where groups were not measured.
    group:
        The number of the family of tasks that a row is of.
    """

    features: Float[Tensor, "row feature"]
    scores: Float[Tensor, " row"]
    share: Float[Tensor, " row"]
    group: Int[Tensor, " row"]

    def __post_init__(self) -> None:
        n = len(self.scores)
        numbers = {"features": self.features, "scores": self.scores, "share": self.share}
        for name, values in numbers.items():
            if not values.is_floating_point() or len(values) != n or values.ndim != 1 + (name == "features"):
                raise AlignmentError(f"{name} of a table of {n} rows are {values.dtype}{list(values.shape)}.")
            if not bool(values.isfinite().all()):
                raise AlignmentError(f"{name} of a table are not all finite.")
        if self.group.shape != (n,) or self.group.dtype != torch.int64 or bool((self.group < 0).any()):
            raise AlignmentError(f"The families of a table are numbers from 0, not {self.group.dtype} as given.")

    def __len__(self) -> int:
        return len(self.scores)

    def where(self, rows: Tensor) -> Table:
        """Some of the rows."""
        return Table(self.features[rows], self.scores[rows], self.share[rows], self.group[rows])

    def plus(self, other: Table) -> Table:
        """These rows, and then those."""
        return Table(
            torch.cat([self.features, other.features]),
            torch.cat([self.scores, other.scores]),
            torch.cat([self.share, other.share]),
            torch.cat([self.group, other.group]),
        )


def features(measurements: Measurements) -> Float[Tensor, "node feature"]:
    """φ: the measurements, their ranks within the model (0 to 1, ties share theirs), relative depth, and kind.

    Ranks make models of different sizes and scales alike; relative depth is 0 in the first and 1 in the last layer;
    kind is 1 for an MLP block.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> from dfa_lens.transfer.readers import features
    >>> nodes = dfa.NodeSet.for_sizes(2, 1)
    >>> features(dfa.Measurements(torch.tensor([[5.0], [1.0], [1.0], [9.0]]), nodes, ["change"])).tolist()[0]
    [5.0, 0.75, 0.0, 0.0]
    """
    nodes, values = measurements.nodes, measurements.values
    ranks = torch.from_numpy(rankdata(values.numpy(), axis=0) / len(nodes)).to(values)
    last = max(nodes.n_layers - 1, 1)
    depth = values.new_tensor([max(node.layer, 0) / last for node in nodes])
    kind = values.new_tensor([float(node.kind == "mlp") for node in nodes])
    return torch.cat([values, ranks, depth[:, None], kind[:, None]], 1)


def edge_features(measurements: Measurements, edges: EdgeSet) -> Float[Tensor, "edge feature"]:
    """φ of edges, composed of what was measured of their two ends.

    For every edge: φ of the writer (:func:`features`), φ of the node that the reader belongs to, and whether it reads
    queries, keys or values. The input and the logits are not measured: theirs is 0. That of a key-value head is the
    mean over its heads. Scores of edges can be learned from it as those of nodes are (docs/extend.md).

    Raises
    ------
    MeasurementError
        If the edges are not between the measured nodes.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> from dfa_lens.transfer.readers import edge_features
    >>> nodes, edges = dfa.NodeSet.for_sizes(2, 1), dfa.EdgeSet(2, 1)
    >>> measured = dfa.Measurements(torch.rand(4, 1), nodes, ["change"])
    >>> edge_features(measured, edges).shape == (len(edges), 2 * 4 + 3)
    True
    """
    if measurements.nodes != edges.nodes[1:]:
        raise MeasurementError(f"The measurements of {len(measurements)} nodes are not those of the ends of {edges!r}.")
    phi, position = features(measurements), measurements.nodes.position
    writers = torch.cat([phi.new_zeros(1, phi.shape[1]), phi])
    readers, kinds = phi.new_zeros(edges.shape[1], phi.shape[1]), phi.new_zeros(edges.shape[1], 3)
    for site in edges.sites:
        if site.kind == "mlp":
            readers[site.columns] = phi[position(f"m{site.layer}")]
        elif site.kind != "logits":
            own = phi[[position(f"a{site.layer}.h{i}") for i in range(edges.n_heads)]]
            readers[site.columns] = own.unflatten(0, (len(site), -1)).mean(1)  # the heads that share a reader
            kinds[site.columns, "qkv".index(site.kind)] = 1
    rows, columns = edges.positions.T
    return torch.cat([writers[rows], readers[columns], kinds[columns]], 1)


class Reader(ABC):
    """A way to read scores off measurements; derive from it, as a frozen dataclass, and register it."""

    name: ClassVar[str]

    def start(self, table: Table) -> dict[str, Tensor]:
        """The numbers before training: what is learned, and what a file holds, has these names and shapes."""
        return {}

    def train(self, table: Table, seed: int) -> dict[str, Tensor]:
        """Numbers that are learned once, and kept when a task's own scores join the table."""
        return {}

    @abstractmethod
    def read(
        self,
        table: Table,
        own: Table | None,
        target: Float[Tensor, "node feature"],
        learned: Mapping[str, Tensor],
        seed: int,
    ) -> Float[Tensor, "member node"]:
        """What each of several members (trees, say) says of the target's nodes; the mean is the score.

        ``own``: the task's own nodes on the source, with their scores, where they are known.
        """


@dataclass(frozen=True)
class Trees(Reader):
    """Extremely randomised trees (Geurts, Ernst and Wehenkel 2006) over all rows: scikit-learn's.

    Nothing of them is saved: the same rows and seed grow the same trees again, so that no file holds code. A release of
    scikit-learn that draws its splits in another way grows others, whose mean differs a little.

    Attributes
    ----------
    trees:
        How many.
    leaf:
        The fewest nodes that a leaf is the mean of.
    """

    name: ClassVar[str] = "trees"
    trees: int = 200
    leaf: int = 2

    def __post_init__(self) -> None:
        _positive(trees=self.trees, leaf=self.leaf)

    def read(  # noqa: D102
        self,
        table: Table,
        own: Table | None,
        target: Float[Tensor, "node feature"],
        learned: Mapping[str, Tensor],
        seed: int,
    ) -> Float[Tensor, "member node"]:
        from sklearn.ensemble import ExtraTreesRegressor

        whole = table if own is None else table.plus(own)
        forest = ExtraTreesRegressor(self.trees, min_samples_leaf=self.leaf, random_state=seed)
        forest.fit(whole.features.double().numpy(), whole.scores.double().numpy())
        new = target.float().numpy()  # what each tree splits by, as scikit-learn has it
        return torch.from_numpy(np.stack([tree.predict(new) for tree in forest.estimators_]))


@dataclass(frozen=True)
class Attention(Reader):
    """ŝ_i = Σ_j K(φ_i, φ_j)·s_j + f(φ_i), K a softmax over all nodes j that teach.

    K's logits are −Σ_f (w_f·(φ_if − φ_jf))², and β more for the task's own nodes; φ is standardised over the table, f
    is linear. So there are 2·features + 2 numbers, w, f and β, for all tasks and models. They are trained to give the
    scores of each family's tasks from the rows of the other families (and half of the time, with a task's own scores
    kept: from those of its other half of nodes).

    Attributes
    ----------
    steps, lr:
        Of Adam.
    weight_decay:
        Of f: the linear part is to say little where the attention says enough.
    """

    name: ClassVar[str] = "attention"
    steps: int = 150
    lr: float = 0.05
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        _positive(steps=self.steps)
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise AlignmentError("lr must be positive, and weight_decay at least 0.")

    def start(self, table: Table) -> dict[str, Tensor]:
        """All features alike, no linear part."""
        n = table.features.shape[1]
        return {
            "mean": table.features.mean(0),
            "spread": table.features.std(0).clamp_min(1e-6),
            "widths": torch.full((n,), n**-0.5, dtype=torch.float32),
            "linear": torch.zeros(n, dtype=torch.float32),
            "constant": torch.zeros((), dtype=torch.float32),
            "own": torch.ones((), dtype=torch.float32),
        }

    TRAINED: ClassVar[tuple[str, ...]] = ("widths", "linear", "constant", "own")

    def kernel(
        self, keys: Float[Tensor, "row feature"], target: Float[Tensor, "node feature"], learned: Mapping[str, Tensor]
    ) -> Float[Tensor, "node row"]:
        """The logits of K."""
        a, b = (((x - learned["mean"]) / learned["spread"]).clamp(-5, 5) * learned["widths"] for x in (target, keys))
        return -(a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T)

    def linear(self, target: Float[Tensor, "node feature"], learned: Mapping[str, Tensor]) -> Float[Tensor, " node"]:
        """f of the target's nodes."""
        standard = ((target - learned["mean"]) / learned["spread"]).clamp(-5, 5)
        return standard @ learned["linear"] + learned["constant"]

    def train(self, table: Table, seed: int) -> dict[str, Tensor]:  # noqa: D102
        learned = self.start(table)
        families = table.group.unique().tolist()
        if len(families) < 2:
            raise AlignmentError(
                "An attention between nodes is learned over families left out in turn: two are needed."
            )
        free = {name: learned[name].clone().requires_grad_(True) for name in self.TRAINED}
        now = learned | free
        generator = torch.Generator().manual_seed(seed)
        adam = torch.optim.Adam(free.values(), lr=self.lr)
        with torch.enable_grad():
            for step in range(self.steps):
                family = families[step % len(families)]
                tested = (table.group == family).nonzero()[:, 0]
                keys, bonus = (table.group != family).nonzero()[:, 0], None
                if step // len(families) % 2:  # with half of its own nodes known
                    order = tested[torch.randperm(len(tested), generator=generator)]
                    known, tested = order[: len(order) // 2], order[len(order) // 2 :]
                    keys = torch.cat([keys, known])
                    bonus = torch.cat([torch.zeros(len(keys) - len(known)), torch.ones(len(known))]) * now["own"]
                logits = self.kernel(table.features[keys], table.features[tested], now)
                found = (logits if bonus is None else logits + bonus).softmax(1) @ table.scores[keys]
                found = found + self.linear(table.features[tested], now)
                loss = (found - table.scores[tested]).square().mean() + self.weight_decay * now["linear"].square().sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
        return learned | {name: value.detach() for name, value in free.items()}

    def weights(
        self, table: Table, own: Table | None, target: Float[Tensor, "node feature"], learned: Mapping[str, Tensor]
    ) -> Float[Tensor, "node row"]:
        """K: how much each target node attends to each row, those of the task's own last."""
        whole = table if own is None else table.plus(own)
        logits = self.kernel(whole.features, target, learned)
        if own is not None:
            logits = logits + torch.cat([torch.zeros(len(table)), torch.ones(len(own))]) * learned["own"]
        return logits.softmax(1)

    def read(  # noqa: D102
        self,
        table: Table,
        own: Table | None,
        target: Float[Tensor, "node feature"],
        learned: Mapping[str, Tensor],
        seed: int,
    ) -> Float[Tensor, "member node"]:
        whole = table if own is None else table.plus(own)
        K = self.weights(table, own, target, learned)
        return (K @ whole.scores + self.linear(target, learned))[None]


READERS: Registry[type[Reader]] = Registry("reader", AlignmentError, {"trees": Trees, "attention": Attention})
"""The ways to read scores off measurements, by name."""


def made(reader: str | Reader, options: Mapping[str, object]) -> Reader:
    """A reader by name, with some of its fields set; an instance as it is."""
    if isinstance(reader, Reader):
        return replace(reader, **options) if options else reader  # type: ignore[type-var]
    kind = READERS.find(reader)
    known: set[str] = {each.name for each in fields(kind)} if is_dataclass(kind) else set()
    wrong = next((name for name in options if name not in known), None)
    if wrong is not None:
        raise AlignmentError(f"{reader!r} has no option {wrong!r}; it has {', '.join(sorted(known))}.")
    return kind(**options)


def _positive(**numbers: object) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
            raise AlignmentError(f"{name} must be an integer of at least 1, not {number!r}.")
