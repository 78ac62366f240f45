"""Functional alignment: carries scores by what nodes do, not by where they stand.

Every node of a model is measured on a task by forward passes (:func:`dfa_lens.measure`). On the source, scores are
known too, so what measurements say about scores can be learned there, over tasks; on the target the measurements of a
new task are enough. It needs no W, no training and no gradient on the target, and one fitted alignment serves targets
of any size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dfa_lens.data.alignment import Alignment
from dfa_lens.data.arguments import same_tasks
from dfa_lens.data.content import ByContent, plain
from dfa_lens.data.files import load_tensors, made_from, parse_json, save_tensors
from dfa_lens.data.measurements import Measurements
from dfa_lens.data.scaling import scale
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.errors import AlignmentError, MeasurementError, short, unknown
from dfa_lens.transfer.readers import READERS, Attention, Reader, Table, features, made

_FORMAT = "dfa_lens functional alignment 1"
#: The measurement that guards against leaving out what everything passes through.
GUARD = "group-share"
Learned = Literal["scores", "sizes"]
"""What is learned of the source's scores: themselves, or how large they are."""
#: With fewer nodes than this nothing is learned that is not one node's accident.
LEAST_ROWS = 12


@dataclass(frozen=True, eq=False)
class FunctionalAlignment(ByContent):
    """Reads scores on a target off its measurements; what it learned from is a table of the source's nodes.

    Made by :func:`dfa_lens.fit_functional`. Two are equal (``==``) if their tables, readers, learned numbers and seeds
    are; meta does not count.

    Attributes
    ----------
    table:
        The nodes that teach, of all tasks.
    names:
        The measurements that it needs.
    reader:
        See :mod:`dfa_lens.transfer.readers`.
    learned:
        What the reader learned once.
    seed:
        Of the reader.
    guard:
        How much of a node's share in what its group does exactly is added to what the reader says, both of mean square
        1 over the nodes. One node that everything passes through, left out, costs a circuit more than many small
        mistakes, and what a reader averages over other tasks does not see it.
    meta:
        Tasks, families, where scores come from: JSON-like.
    ranking, learns:
        How what it carries ranks where nothing else is asked for, and what it learned: see
        :func:`dfa_lens.fit_functional`.

    Examples
    --------
    >>> import torch, dfa_lens as dfa
    >>> nodes = dfa.NodeSet.for_sizes(4, 3)
    >>> measured = dfa.Measurements(torch.rand(16, 1), nodes, ["change"])
    >>> scores = dfa.NodeScores(measured["change"], nodes)
    >>> functional = dfa.fit_functional({"a task": scores}, {"a task": measured}, trees=10)
    >>> larger = dfa.NodeSet.for_sizes(6, 4)
    >>> functional.transfer(dfa.Measurements(torch.rand(30, 1), larger, ["change"])).nodes == larger
    True
    """

    table: Table
    names: tuple[str, ...]
    reader: Reader
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    guard: float = 0.0
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    ranking: Ranking = "absolute"
    learns: Learned = "scores"

    def __post_init__(self) -> None:
        number = isinstance(self.guard, (int, float)) and not isinstance(self.guard, bool)
        if not number or not 0 <= self.guard < float("inf"):
            raise AlignmentError(f"guard must be a number of at least 0, not {short(repr(self.guard))}.")
        _require(self.ranking, self.learns)
        expected = self.reader.start(self.table)
        for name in expected.keys() | self.learned.keys():
            given = self.learned.get(name)
            if given is None or name not in expected or given.shape != expected[name].shape:
                raise AlignmentError(f"What {self.reader.name!r} learned has no, or another, {short(name)!r}.")
            if not given.is_floating_point() or not bool(given.isfinite().all()):
                raise AlignmentError(f"{name!r}, which {self.reader.name!r} learned, are not finite numbers.")
        if self.guard and GUARD not in self.names:
            raise MeasurementError(f"The guard needs {GUARD!r}: measure groups, or guard=0.")

    def _content(self) -> tuple[Any, ...]:
        own = self.table
        table = own.features, own.scores, own.share, own.group
        return *table, self.names, self.reader, dict(self.learned), self.seed, self.guard, self.ranking, self.learns

    # --- transfer ----------------------------------------------------------------------------------------------

    def transfer(
        self,
        target_measurements: Measurements,
        scores: NodeScores | None = None,
        measurements: Measurements | None = None,
    ) -> NodeScores:
        """Scores on the target, of a task that it was measured on.

        Parameters
        ----------
        target_measurements:
            Of the target on the task.
        scores, measurements:
            The task's own on the source, both or none: they then teach too. Better where they are known.

        Raises
        ------
        MeasurementError
            If measurements are missing or others.
        ScoreError
            If scores and measurements are not of the same nodes.
        """
        members = self.members(target_measurements, scores, measurements)
        meta = {
            "method": f"functional {self.reader.name}",
            "own source scores": scores is not None,
            "measured": dict(target_measurements.meta),
            **self.meta,
            "ranking": self.ranking,
            "learned": self.learns,
        }
        return NodeScores(members.mean(0), target_measurements.nodes, meta)

    def members(
        self,
        target_measurements: Measurements,
        scores: NodeScores | None = None,
        measurements: Measurements | None = None,
    ) -> Float[Tensor, "member node"]:
        """What each member (each tree) says; the arguments are those of :meth:`transfer`."""
        own = self._own(scores, measurements)
        target = self.checked(target_measurements, "The target's measurements")
        return self._read(self.table, own, self.learned, features(target), shares(target))

    def _read(
        self,
        table: Table,
        own: Table | None,
        learned: Mapping[str, Tensor],
        phi: Float[Tensor, "node feature"],
        share: Float[Tensor, " node"],
    ) -> Float[Tensor, "member node"]:
        return self.reader.read(table, own, phi, learned, self.seed).double() + self.guard * share.double()

    def alignment(self, target_measurements: Measurements, scores: NodeScores, measurements: Measurements) -> Alignment:
        """The W (and bias) that an ``attention`` computes for a task, as an ordinary alignment.

        ``.transfer(scores)`` gives what :meth:`transfer` does: W holds how much each target node attends to each source
        node of the task; the bias, what other tasks' nodes, the linear part and the guard say.

        Raises
        ------
        AlignmentError
            If the reader is another one (trees are no linear map), or it learned sizes (no more are they).
        """
        if not isinstance(self.reader, Attention):
            raise AlignmentError(f"Only an 'attention' is a linear map of the scores, not {self.reader.name!r}.")
        if self.learns == "sizes":
            raise AlignmentError("Sizes of scores are no linear map of them: fit with learns='scores'.")
        own = self._own(scores, measurements)
        assert own is not None
        target = self.checked(target_measurements, "The target's measurements")
        phi = features(target)
        K = self.reader.weights(self.table, own, phi, self.learned)
        n = len(self.table)
        bias = K[:, :n] @ self.table.scores + self.reader.linear(phi, self.learned) + self.guard * shares(target)
        W = K[:, n:].T * len(own) ** 0.5  # scores of unit length, where the table's have a mean square of 1
        meta = {"method": "functional", "ranking": self.ranking}
        return Alignment.of(W, scores.nodes, target_measurements.nodes, bias=bias, meta=meta)

    def _own(self, scores: NodeScores | None, measurements: Measurements | None) -> Table | None:
        if scores is None and measurements is None:
            return None
        if scores is None or measurements is None:
            missing = "scores" if scores is None else "measurements"
            raise AlignmentError(
                f"The task's own scores and measurements on the source go together: {missing} are missing."
            )
        measurements = self.checked(measurements, "The task's measurements on the source")
        return _rows(scores, measurements, int(self.table.group.max()) + 1, "the task", self.learns)

    def checked(self, measurements: Measurements, what: str) -> Measurements:
        """The columns that the alignment reads, as it reads them.

        Raises
        ------
        MeasurementError
            If some are missing; it names ``what``.
        """
        missing = [name for name in self.names if name not in measurements.names]
        if missing:
            raise MeasurementError(
                f"{what} lack {missing[0]!r} ({len(missing)} of {len(self.names)}): measure as when the alignment was "
                "fitted, with the same names and groups."
            )
        return _read_as(
            measurements.without(*(name for name in measurements.names if name not in self.names)), self.learns
        )

    # --- trust -------------------------------------------------------------------------------------------------

    def without(self, family: str) -> FunctionalAlignment:
        """What would have been learned without the tasks of a family; itself if none of its tasks taught.

        Raises
        ------
        AlignmentError
            If nothing is left to learn from.
        """
        families = list(dict.fromkeys(self.meta.get("families", {}).values()))
        if family not in families:
            return self
        rest = self.table.where(self.table.group != families.index(family))
        if len(rest) < LEAST_ROWS:
            raise AlignmentError(f"Without the family {short(family)!r} there is nothing to learn from.")
        _, group = rest.group.unique(return_inverse=True)
        rest = replace(rest, group=group)
        left = {task: of for task, of in self.meta["families"].items() if of != family}
        meta = {**self.meta, "tasks": list(left), "families": left}
        return replace(self, table=rest, learned=self.reader.train(rest, self.seed), meta=meta)

    def importance(self, *, repeats: int = 5, seed: int = 0) -> dict[str, float]:
        """How much each measurement matters: what shuffling it among nodes takes from the correlation with the scores.

        Rows are read as in :attr:`held_out`, without their family to learn from. A measurement and its ranks are
        shuffled together, within each family. Two measurements that say the same can each be shuffled without loss.

        Parameters
        ----------
        repeats:
            Shuffles of each measurement; the mean is given.
        seed:
            Of the shuffles.

        Returns
        -------
        dict
            Measurement → Pearson correlation lost, the most first.

        Raises
        ------
        AlignmentError
            If there is only one family.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise AlignmentError(f"repeats must be an integer of at least 1, not {short(repr(repeats))}.")
        generator = torch.Generator().manual_seed(seed)
        n, lost = len(self.names), dict.fromkeys(self.names, 0.0)
        for rows, predict in self._folds():
            phis, share = [rows.features], [rows.share]
            for i, name in enumerate(self.names):
                for _ in range(repeats):
                    order = torch.randperm(len(rows), generator=generator)
                    shuffled = rows.features.clone()
                    shuffled[:, [i, n + i]] = shuffled[order][:, [i, n + i]]
                    phis.append(shuffled)
                    share.append(rows.share[order] if name == GUARD else rows.share)
            said = predict(torch.cat(phis), torch.cat(share)).mean(0).reshape(len(phis), len(rows)).numpy()
            agreement = np.array([np.corrcoef(each, rows.scores.double().numpy())[0, 1] for each in said])
            parts = (agreement[0] - agreement[1:]).reshape(n, repeats).mean(1)
            for name, part in zip(self.names, parts.tolist(), strict=True):
                lost[name] += part * len(rows)
        found = {name: value / len(self.table) for name, value in lost.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def _folds(self) -> Iterator[tuple[Table, Callable[[Tensor, Tensor], Tensor]]]:
        """For every family, its rows, and what members that never saw it say of φ and shares."""
        families = self.table.group.unique().tolist()
        if len(families) < 2:
            raise AlignmentError("How far to trust is learned over families left out in turn: two are needed.")
        for family in families:
            rest = self.table.where(self.table.group != family)
            learned = self.reader.train(rest, self.seed) if len(families) > 2 else self.learned
            yield self.table.where(self.table.group == family), partial(self._read, rest, None, learned)

    @cached_property
    def _held_out(self) -> Float[Tensor, "member row"]:
        """What each member would have said of every row, had its family not been there to learn from."""
        said = [predict(rows.features, rows.share) for rows, predict in self._folds()]
        # the folds are in the order of the families' numbers
        order = torch.cat([(self.table.group == family).nonzero()[:, 0] for family in self.table.group.unique()])
        return torch.cat(said, 1)[:, order.argsort()]

    @property
    def held_out(self) -> Float[Tensor, " row"]:
        """The score that every row of the table would have been given without its family to learn from.

        Raises
        ------
        AlignmentError
            If there is only one family.
        """
        return self._held_out.mean(0)

    def trust(self, target_measurements: Measurements, *, confidence: float = 0.9) -> Trust:
        """How far a transfer can be trusted, before anything is run on the target's labels.

        Parameters
        ----------
        target_measurements:
            Of the target on the task.
        confidence:
            Of the intervals.

        Raises
        ------
        AlignmentError
            If there is only one family to learn from: nothing then says how far a new one is.
        """
        if not 0 < confidence < 1:
            raise AlignmentError(f"confidence must be between 0 and 1, not {confidence}.")
        known, truth = self._held_out, self.table.scores.double()
        target = self.checked(target_measurements, "The target's measurements")
        phi = features(target)
        members = self._read(self.table, None, self.learned, phi, shares(target))
        mean = members.mean(0)
        spread = float(members.std(0, correction=0).mean() / mean.std().clamp_min(1e-12)) if len(members) > 1 else 0.0
        # split conformal: what the held-out errors, in units of the members' disagreement, exceed seldom enough
        disagreement = known.std(0, correction=0)
        least = float(disagreement.mean()) or 1.0
        errors = (known.mean(0) - truth).abs() / (disagreement + least)
        width = float(torch.quantile(errors, min(1.0, confidence * (1 + 1 / len(errors)))))
        half = width * (members.std(0, correction=0) + least)
        bounds = torch.stack([mean - half, mean + half], 1).float()
        return Trust(spread, self._distance(phi), bounds, confidence)

    def _distance(self, phi: Float[Tensor, "node feature"]) -> float:
        """Mean distance to the nearest row, over what it is between one family's rows and the others'."""
        spread = self.table.features.std(0).clamp_min(1e-6)
        ours = self.table.features / spread

        def nearest(points: Tensor, rows: Tensor) -> Tensor:
            return torch.cdist(points, rows).amin(1).mean()

        families = self.table.group.unique().tolist()
        usual = torch.stack(
            [nearest(ours[self.table.group == f], ours[self.table.group != f]) for f in families]
        ).mean()
        return float(nearest(phi / spread, ours) / usual.clamp_min(1e-12))

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the table, the reader and what it learned; trees grow again from table and seed."""
        own = self.table
        tensors = {"features": own.features, "scores": own.scores, "share": own.share, "group": own.group}
        tensors |= {f"learned.{name}": value for name, value in self.learned.items()}
        description = {
            "names": list(self.names),
            "reader": {"name": self.reader.name, "options": asdict(self.reader)},  # type: ignore[call-overload]
            "seed": self.seed,
            "guard": self.guard,
            "ranking": self.ranking,
            "learns": self.learns,
            "meta": plain(dict(self.meta)),
        }
        save_tensors(path, tensors, {"functional": json.dumps(description)}, _FORMAT)

    @classmethod
    def load(cls, path: str | Path) -> FunctionalAlignment:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            If the file is missing, broken, or not a functional alignment.
        """
        tensors, metadata = load_tensors(path, _FORMAT, ("functional",))

        def make() -> FunctionalAlignment:
            description = parse_json(metadata["functional"])
            table = Table(tensors["features"], tensors["scores"], tensors["share"], tensors["group"])
            names, learned = tuple(description["names"]), {}
            if table.features.shape != (len(table), 2 * len(names) + 2) or len(table.group) != len(table):
                raise AlignmentError(f"its table is {list(table.features.shape)} for {len(names)} measurements")
            for name, value in tensors.items():
                if name.startswith("learned."):
                    learned[name.removeprefix("learned.")] = value
            reader = READERS.find(description["reader"]["name"])(**description["reader"]["options"])
            seed, guard = int(description["seed"]), float(description["guard"])
            how = description["ranking"], description.get("learns", "scores")  # files from before it was a choice
            return cls(table, names, reader, learned, seed, guard, description["meta"], *how)

        return made_from(path, "a functional alignment", make)

    def __repr__(self) -> str:
        tasks = len(self.meta.get("tasks", ()))
        return f"FunctionalAlignment({self.reader.name}, {len(self.table)} nodes of {tasks} tasks)"


@dataclass(frozen=True, eq=False)
class Trust(ByContent):
    """How far a functional transfer can be trusted.

    Attributes
    ----------
    spread:
        Mean standard deviation among trees, over the spread of the scores; 0 for a reader of one member.
    distance:
        How far the target's measurements are from those that taught, in units of how far one family is from the others
        on the source: above 1 is farther than anything that was ever held out.
    interval:
        [node, 2] bounds of each node's score, calibrated on families left out in turn on the source.
    confidence:
        Of the intervals.
    """

    spread: float
    distance: float
    interval: Float[Tensor, "node 2"]
    confidence: float


def shares(measurements: Measurements) -> Float[Tensor, " node"]:
    """Each node's share in its group's effect, of mean square 1."""
    if GUARD not in measurements.names:
        return torch.zeros(len(measurements), dtype=torch.float32)
    share = measurements[GUARD]
    return share / share.square().mean().sqrt().clamp_min(1e-12)


def _require(ranking: object, learns: object) -> None:
    for what, value, kind in (("ranking", ranking, Ranking), ("learns", learns, Learned)):
        if value not in get_args(kind):
            raise unknown(what, value, get_args(kind), AlignmentError)


def _read_as(measurements: Measurements, learns: Learned) -> Measurements:
    """Measurements as they are read: who learns sizes reads how large a share in a group's effect is, not which way it
    works."""
    if learns == "scores" or GUARD not in measurements.names:
        return measurements
    values = measurements.values.clone()
    at = measurements.names.index(GUARD)
    values[:, at] = values[:, at].abs()
    return Measurements(values, measurements.nodes, measurements.names, measurements.meta)


def _rows(scores: NodeScores, measurements: Measurements, group: int, what: str, learns: Learned) -> Table:
    scores.require(measurements.nodes, f"The scores of {what}")
    values = scale(scores.values if learns == "scores" else scores.values.abs(), "unit") * len(scores) ** 0.5
    read = _read_as(measurements, learns)
    return Table(features(read), values, shares(read), torch.full((len(scores),), group))


def fit_functional(
    scores: Mapping[str, NodeScores],
    measurements: Mapping[str, Measurements],
    *,
    seed: int = 0,
    reader: str | Reader = "trees",
    families: Mapping[str, str] | None = None,
    guard: float | None = None,
    ranking: Ranking = "absolute",
    learns: Learned = "scores",
    **options: Any,
) -> FunctionalAlignment:
    """Learn, on the source, what measurements say about scores.

    Parameters
    ----------
    scores:
        Task → scores on the source (:func:`dfa_lens.attribute`).
    measurements:
        Task → measurements of the source (:func:`dfa_lens.measure`), of the same tasks. All have the same columns;
        tasks of several source models may teach together, under different names.
    seed:
        Of the reader.
    reader:
        "trees" (default), "attention", or an instance; see :mod:`dfa_lens.transfer.readers`.
    families:
        Task → the name of its family: relatives are held out together when an attention is trained, and for trust.
        :data:`dfa_lens.tasks.FAMILIES` has those of the shipped tasks. Default: every task is a family by itself.
    guard:
        See :class:`FunctionalAlignment`. Default: 1 where groups were measured, else 0. On the shipped models it lifts
        CPR from .79 to .81 (docs/method.md).
    ranking:
        By what the carried scores rank nodes where nothing else is asked for: "absolute" (default), by size, so that
        what works against the answer is kept with what works for it, as the whole model has both; or "signed". Between
        models that overshoot, CMD is far lower by size; :func:`dfa_lens.choose_ranking` tries both on the source. The
        scores themselves keep their signs.
    learns:
        "scores" (default), or their "sizes", where the ranking is by size anyway: what trees of both signs say cancels
        out, what sizes say does not. It is the better choice between two real models (CMD .105 against .121,
        docs/real-pair.md) and makes no difference on the shipped ones, but what is carried then says no more which
        nodes work against the answer.
    options:
        Fields of the reader: ``trees=200``, ``leaf=2``.

    Returns
    -------
    FunctionalAlignment

    Raises
    ------
    AlignmentError
        If the tasks differ, or there is too little to learn from.
    MeasurementError
        If the tasks were not measured alike.
    ScoreError
        If scores and measurements are not of the same nodes, or all scores are zero.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("llama3-tiny-target")
    >>> pairs = {t: dfa.tasks.load(t, source.tokenizer, n=4) for t in ("addition", "mcqa")}
    >>> scores = {t: dfa.attribute(source, p, method="nap") for t, p in pairs.items()}
    >>> functional = dfa.fit_functional(scores, {t: dfa.measure(source, p) for t, p in pairs.items()}, trees=10)
    >>> new = dfa.measure(target, dfa.tasks.load("ioi", target.tokenizer, n=4))
    >>> functional.transfer(new).values.shape
    torch.Size([110])
    """
    same_tasks(scores, measurements, ("scores", "measurements"))
    _require(ranking, learns)
    tasks = list(scores)
    names = measurements[tasks[0]].names
    for task in tasks:
        if measurements[task].names != names:
            raise MeasurementError(
                f"Task {task!r} was measured by {short(', '.join(measurements[task].names))}, but {tasks[0]!r} by "
                f"{short(', '.join(names))}."
            )
    known = {task: (families or {}).get(task, task) for task in tasks}
    numbers = {family: i for i, family in enumerate(dict.fromkeys(known.values()))}
    table, *more = (
        _rows(scores[task], measurements[task], numbers[known[task]], f"task {task!r}", learns) for task in tasks
    )
    for rows in more:
        table = table.plus(rows)
    if len(table) < LEAST_ROWS:
        raise AlignmentError(f"{len(table)} nodes are too few to learn from: {LEAST_ROWS} are needed.")
    own = made(reader, options)
    meta = {
        "tasks": tasks,
        "families": known,
        "scores": {task: dict(scores[task].meta) for task in tasks},
        "measured": {task: dict(measurements[task].meta) for task in tasks},
    }
    if guard is None:
        guard = 1.0 if GUARD in names else 0.0
    return FunctionalAlignment(table, names, own, own.train(table, seed), seed, guard, meta, ranking, learns)
