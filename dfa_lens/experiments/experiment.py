"""One experiment: a source and a target model with one seed, and every transfer between them that is asked for."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from dfa_lens import zoo
from dfa_lens.attribution.attribute import METHODS, IntegrationWarning, attribute
from dfa_lens.data.alignment import Alignment
from dfa_lens.data.content import fingerprint
from dfa_lens.data.curve import FaithfulnessCurve, Protocol
from dfa_lens.data.measurements import Measurements
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import DfaError, TaskError, unknown
from dfa_lens.evaluation import diagnostics
from dfa_lens.evaluation.faithfulness import faithfulness_curve
from dfa_lens.experiments.folder import Folder
from dfa_lens.experiments.setting import OTHER_SCORES, Circuits, Needed, Setting, Side, labels
from dfa_lens.experiments.table import GOLD
from dfa_lens.models.backend import HookedModel
from dfa_lens.tasks import SIBLINGS
from dfa_lens.tasks.own import TaskSource, family_of, sources
from dfa_lens.transfer import controls, similarity
from dfa_lens.transfer.measure import measure
from dfa_lens.transfer.recipe import Recipe
from dfa_lens.transfer.store import Cache
from dfa_lens.transfer.trainer import Job, OnStep, fit_many


@dataclass(frozen=True)
class Budget:
    """How much is run for every task."""

    train: int = 64  #: training pairs a task, also those of attribution
    test: int = 32  #: test pairs a task
    steps: int | None = None  #: training steps of each alignment; None: the recipe's own
    curve_points: int = 32  #: circuit sizes of each curve
    batch_size: int = 32  #: of attribution and curves


FULL = Budget()
QUICK = Budget(train=8, test=8, steps=10, curve_points=6)


@dataclass(frozen=True)
class Attribution:
    """How nodes are scored on the source, and on the target for gold: arguments of :func:`dfa_lens.attribute`."""

    method: str = "nap-ig-inputs"
    steps: int = 5
    mlp_gradient: Literal["output", "input"] = "output"
    accumulate: Literal["own", "all"] = "own"

    def __post_init__(self) -> None:
        METHODS.find(self.method)  # an unknown name is an error here, not after minutes


ATTRIBUTION = Attribution()


Loader = str | Callable[[], HookedModel]
"""The name of a shipped model, or a function that loads one."""
UnitKind = Literal["attribution", "measurements", "fit", "row"]
"""What a study is made of."""
UNITS = 1  #: what units are made like; another number for other numbers
_LOAD: dict[Needed, Callable[[Path], Any]] = {"attribution": NodeScores.load, "measurements": Measurements.load}


@dataclass(frozen=True)
class ModelPair:
    """A source and a target model.

    Attributes
    ----------
    name:
        In the column ``family``.
    source, target:
        Names of shipped models, or functions without arguments that load a model (at module level, so that other
        processes find them).
    """

    name: str
    source: Loader
    target: Loader

    @classmethod
    def of(cls, family: str | ModelPair) -> ModelPair:
        """The shipped pair of a family; an instance is returned unchanged."""
        if isinstance(family, ModelPair):
            return family
        known = zoo.pairs("all")
        if family not in known:
            raise unknown("family", family, known, DfaError)
        return cls(family, *known[family])


@dataclass(frozen=True)
class Outcome:
    """One circuit, judged."""

    task: str
    name: str  #: of the setting
    setting: Setting | None  #: None for gold
    trained_on: tuple[str, ...]
    alignment: Alignment | None
    circuit: NodeScores
    curve: FaithfulnessCurve
    seconds: float  #: of training, shared evenly among trainings that ran together
    forwards: int  #: passes of one example through the target to get the circuit; a backward pass counts as one

    @property
    def labels(self) -> dict[str, Any]:
        """The columns that say what it is of, and what it cost."""
        of = labels(self.name, self.setting, self.trained_on)
        return {**of, "forwards": self.forwards, "seconds": round(self.seconds, 2)}


class Experiment:
    """One pair of models with one seed: scores, prompts and trained alignments, each made once and when needed.

    Parameters
    ----------
    models:
        See :class:`ModelPair`; a family's name will do.
    seed:
        Of prompts, training and controls.
    budget:
        How much to run.
    tasks:
        Name → one of our tasks by its name, or a source of one's own, see :class:`~dfa_lens.tasks.own.TaskSource`;
        default: the paper's six. Zero-shot training uses all of them but the one that is tested.
    attribution:
        How nodes are scored, on the source and for gold.
    protocol:
        Of curves, see :data:`~dfa_lens.data.curve.Protocol`; that of MIB has sizes of its own.
    device, dtype:
        For shipped models.
    collection:
        Of our tasks, see :func:`dfa_lens.tasks.load`.
    folder:
        Where scores, measurements and alignments are kept, and found again; default: in memory alone.
    load:
        Loads a model; for those who keep some.
    on_step:
        Called after each step of a training, with the training tasks and the step's record.

    Attributes
    ----------
    batch_size:
        Of attribution, measurements and curves: the budget's. Changes memory and time, results by rounding only.
    cache:
        Where training keeps its runs, see :data:`~dfa_lens.transfer.store.Cache`.
    jobs_per_pass:
        How many trainings share a forward pass, see :func:`~dfa_lens.transfer.trainer.fit_many`; None: its default.
    seconds:
        What was made here → how long it took, models and prompts apart.

    Examples
    --------
    >>> from dfa_lens.experiments.experiment import Budget, Experiment
    >>> experiment = Experiment("llama3", budget=Budget(train=4, test=4), tasks={"names": "ioi", "sums": "addition"})
    >>> experiment.tasks, len(experiment.test("names"))
    (('names', 'sums'), 4)
    """

    def __init__(
        self,
        models: str | ModelPair,
        seed: int = 0,
        budget: Budget = FULL,
        *,
        tasks: Mapping[str, str | TaskSource] | None = None,
        attribution: Attribution = ATTRIBUTION,
        protocol: Protocol = "nodes",
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        collection: str = "offline",
        folder: Folder | None = None,
        load: Callable[[Loader], HookedModel] | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.models, self.seed, self.budget = ModelPair.of(models), seed, budget
        self.attribution, self.protocol, self.device, self.dtype = attribution, protocol, device, dtype
        self.sources = sources(tasks, collection)
        self.tasks = tuple(self.sources)
        self.families = {task: family_of(task, source) for task, source in self.sources.items()}
        self.folder, self._load, self.on_step = folder, load, on_step
        self.batch_size = budget.batch_size
        self.cache: Cache = "device"
        self.jobs_per_pass: int | None = None
        self.seconds: dict[str, float] = {}
        self._trained: dict[Any, tuple[Alignment, float]] = {}
        self._made: dict[tuple[str, str, str], Any] = {}
        self._tests: dict[str, PromptPairs] = {}

    def _model(self, which: Loader) -> HookedModel:
        if self._load is not None:
            return self._load(which)
        return zoo.load(which, device=self.device, dtype=self.dtype) if isinstance(which, str) else which()

    @cached_property
    def source(self) -> HookedModel:
        """The source model."""
        return self._model(self.models.source)

    @cached_property
    def target(self) -> HookedModel:
        """The target model."""
        return self._model(self.models.target)

    @cached_property
    def source_nodes(self) -> NodeSet:
        """Its heads and MLP blocks."""
        return NodeSet.heads_and_mlps(self.source)

    @cached_property
    def target_nodes(self) -> NodeSet:
        """Its heads and MLP blocks."""
        return NodeSet.heads_and_mlps(self.target)

    def _pairs(self, task: str, model: Any, split: str, n: int) -> PromptPairs:
        made = self.sources[task](model.tokenizer, split=split, n=n, seed=self.seed)
        if not isinstance(made, PromptPairs):
            raise TaskError(f"The source of task {task!r} made a {type(made).__name__}, not PromptPairs.")
        return made

    @cached_property
    def train(self) -> dict[str, PromptPairs]:
        """Task → training pairs for the target."""
        return {task: self._pairs(task, self.target, "train", self.budget.train) for task in self.tasks}

    @cached_property
    def on_source(self) -> dict[str, PromptPairs]:
        """Task → training pairs for the source: the same examples."""
        return {task: self._pairs(task, self.source, "train", self.budget.train) for task in self.tasks}

    def test(self, task: str) -> PromptPairs:
        """Test pairs for the target."""
        if task not in self._tests:
            self._tests[task] = self._pairs(task, self.target, "test", self.budget.test)
        return self._tests[task]

    # --- what is made once ---------------------------------------------------------------------------------------

    @cached_property
    def _content(self) -> tuple[str, dict[str, str]]:
        """Fingerprints of what all units have in common, and of each task."""
        common = (UNITS, self.seed, self.budget, str(self.dtype), self.attribution, self.protocol)
        return fingerprint(common), {task: fingerprint(source) for task, source in self.sources.items()}

    def key(self, kind: UnitKind, *what: Any) -> str:
        """The name of a unit by all that decides what comes out of it; equal for equal units on every machine.

        Parameters
        ----------
        kind, what:
            "attribution" or "measurements", the side and the task; "fit", the setting and the training tasks; "row",
            the setting (None: gold), the test task and the training tasks.
        """
        common, tasks = self._content
        if kind in ("attribution", "measurements"):
            side, task = what
            return fingerprint((kind, common, getattr(self.models, side), tasks[task]))
        setting, *names = what
        print_ = "" if setting is None else setting.fingerprint_of_fit if kind == "fit" else setting.fingerprint
        return fingerprint((kind, common, self.models.source, self.models.target, list(tasks.items()), print_, names))

    def _once(self, kind: Needed, side: Side, task: str, make: Callable[..., Any]) -> Any:
        """Out of memory or the folder, or else made and kept there."""
        what = (kind, side, task)
        if what in self._made:
            return self._made[what]
        key = "" if self.folder is None else self.key(kind, side, task)
        found = None if self.folder is None else self.folder.value(key, _LOAD[kind])
        if found is None:
            model, pairs = (self.source, self.on_source) if side == "source" else (self.target, self.train)
            started = time.perf_counter()
            found = make(model, pairs[task], batch_size=self.batch_size)
            self.seconds[key] = time.perf_counter() - started
            if self.folder is not None:
                self.folder.keep(key, found)
        self._made[what] = found
        return found

    def attributed(self, side: Side, task: str) -> NodeScores:
        """Attribution on a task's training pairs."""
        return self._once("attribution", side, task, partial(self._attribute, task))

    def _attribute(self, task: str, model: HookedModel, pairs: PromptPairs, *, batch_size: Any) -> NodeScores:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", IntegrationWarning)
            found = attribute(model, pairs, **asdict(self.attribution), batch_size=batch_size)
        for each in raised:  # of many tasks, it must say which
            warnings.warn(f"{task}: {each.message}", each.category, stacklevel=2)
        return found

    def scores_of(self, task: str) -> NodeScores:
        """Attribution on the source."""
        return self.attributed("source", task)

    def gold_of(self, task: str) -> NodeScores:
        """Attribution run directly on the target."""
        return self.attributed("target", task)

    @property
    def scores(self) -> dict[str, NodeScores]:
        """Task → scores on the source."""
        return {task: self.scores_of(task) for task in self.tasks}

    def measured(self, task: str, on: Side) -> Measurements:
        """What forward passes say about the nodes of the source or the target on the task's training pairs."""
        return self._once("measurements", on, task, measure)

    @cached_property
    def attention_similarities(self) -> dict[str, Any]:
        """Similarity by kind and depth, and by how heads attend, anywhere and at near depth."""
        ours = similarity.attention_features(self.source, self.source_nodes)
        theirs = similarity.attention_features(self.target, self.target_nodes)
        alike = similarity.attention_similarity(ours, theirs)
        depth = similarity.kind_and_depth(self.source_nodes, self.target_nodes)
        return {"kind and depth": depth, "attention": alike, "attention and depth": alike * depth}

    # --- one setting ---------------------------------------------------------------------------------------------

    def trained_on(self, setting: Setting, task: str) -> list[tuple[str, ...]]:
        """The training tasks of a setting for a test task: one tuple, several for ``one-task``, none if left out."""
        others = tuple(other for other in self.tasks if other != task)
        if setting.regime == "in-distribution":
            return [(task,)]
        if setting.regime == "near-distribution":
            return [(SIBLINGS[task],)] if SIBLINGS.get(task) in self.tasks else []
        if setting.regime == "leave-family-out":
            others = tuple(other for other in others if self.families[other] != self.families[task])
        if setting.regime == "one-task":
            return [(other,) for other in others]
        return [others] if others else []

    def recipe(self, setting: Setting, trained: tuple[str, ...]) -> Recipe:
        """How W is trained on these tasks: the setting's recipe, with our seed and the budget's steps."""
        if isinstance(setting.recipe, Circuits):
            raise DfaError(f"{type(setting.recipe).__name__} trains no W, so it has no recipe.")
        recipe = setting.recipe if isinstance(setting.recipe, Recipe) else setting.recipe(self, trained)
        if not isinstance(recipe, Recipe):
            raise DfaError(f"The setting's function made a {type(recipe).__name__}, not a Recipe.")
        steps = recipe.steps if self.budget.steps is None else self.budget.steps
        return replace(recipe, seed=self.seed, steps=steps)

    def stand_in(self, setting: Setting, task: str) -> NodeScores:
        """What is put in for the source's scores of a task, in training and transfer."""
        if setting.control == "uniform-s":
            return controls.uniform(self.source_nodes)
        if setting.control == "random-s":
            return controls.random_scores(self.source_nodes, seed=1000 * self.seed + self.tasks.index(task))
        if setting.control == "target-only":
            return controls.constant()
        return self.scores_of(task)

    def fit(self, wanted: Iterable[tuple[Setting, tuple[str, ...]]]) -> list[tuple[Alignment, float]]:
        """The alignment of each setting and its training tasks, and its seconds; what is missing is trained together.

        One is used again for a setting whose recipe asks for the same on the same scores.
        """
        asked = []
        missing: dict[Any, Job[NodeScores]] = {}
        for setting, trained in wanted:
            recipe = self.recipe(setting, trained)
            key = (setting.control if setting.control in OTHER_SCORES else "", recipe.key(), trained)
            name = "" if self.folder is None else self.key("fit", setting, trained)
            if key not in self._trained and self.folder is not None:
                known = self.folder.value(name, Alignment.load)
                if known is not None:
                    self._trained[key] = (known, 0.0)
            asked.append((key, name))
            if key not in self._trained and key not in missing:
                missing[key] = Job({task: self.stand_in(setting, task) for task in trained}, recipe)
        if missing:
            self._fit(missing)
        if self.folder is not None:
            for key, name in asked:
                self.seconds[name] = self._trained[key][1]
                self.folder.keep(name, self._trained[key][0])
        return [self._trained[key] for key, _ in asked]

    def _fit(self, missing: Mapping[Any, Job[NodeScores]]) -> None:
        """Train what is missing, by its key."""
        jobs = {str(number): job for number, job in enumerate(missing.values())}
        on_step, train = self.on_step, self.train
        tell = None if on_step is None else lambda number, record: on_step(" ".join(jobs[number].scores), record)
        started = time.perf_counter()
        found = fit_many(self.target, jobs, train, cache=self.cache, jobs_per_pass=self.jobs_per_pass, on_step=tell)
        seconds = (time.perf_counter() - started) / len(jobs)
        self._trained |= {key: (found[number], seconds) for key, number in zip(missing, jobs, strict=True)}

    def _untrained(self, setting: Setting, trained: tuple[str, ...]) -> Alignment:
        """The W of a control that needs no training."""
        if setting.control == "random-w":
            return controls.random_w(self.source_nodes, self.target_nodes, seed=self.seed)
        if setting.control == "depth-mean":
            return controls.depth_mean(self.source_nodes, self.target_nodes)
        gold = {other: self.gold_of(other) for other in trained}
        return controls.regression({other: self.scores_of(other) for other in trained}, gold, ridge=setting.ridge)

    def curve(self, task: str, circuit: NodeScores) -> FaithfulnessCurve:
        """The circuit's faithfulness on the task's test pairs."""
        n, points = len(circuit), self.budget.curve_points
        sizes = sorted({round(i * n / points) for i in range(points + 1)})
        return faithfulness_curve(
            self.target,
            self.test(task),
            circuit,
            protocol=self.protocol,
            sizes=sizes if self.protocol == "nodes" else None,
            batch_size=self.batch_size,
            sizes_per_pass=1 if self.device == "cpu" else 16,
        )

    # --- many settings -------------------------------------------------------------------------------------------

    def run(self, settings: Mapping[str, Setting], test_tasks: Sequence[str] | None = None) -> Iterator[Outcome]:
        """Gold, then all trainings together, then one setting after the other.

        Parameters
        ----------
        settings:
            By the name that tables give them.
        test_tasks:
            Default: all.
        """
        chosen = list(test_tasks or self.tasks)
        for task in chosen:
            if task not in self.tasks:
                raise unknown("task", task, self.tasks, TaskError)
        for task in chosen:
            yield self.outcome(GOLD, None, task)
        wanted = [
            (name, setting, task, trained)
            for name, setting in settings.items()
            for task in chosen
            for trained in self.trained_on(setting, task)
        ]
        self.fit((setting, trained) for _, setting, _, trained in wanted if setting.is_trained)
        for name, setting, task, trained in wanted:
            yield self.outcome(name, setting, task, trained)

    def outcome(self, name: str, setting: Setting | None, task: str, trained: tuple[str, ...] = ()) -> Outcome:
        """The circuit of a setting (None: gold) for a task, judged."""
        if setting is None:
            return self._gold_outcome(task)
        if isinstance(setting.recipe, Circuits):
            return self._without_w(setting.recipe, task, name, setting, trained)
        if setting.is_trained:
            return self._outcome(task, name, setting, trained, *self.fit([(setting, trained)])[0])
        return self._outcome(task, name, setting, trained, self._untrained(setting, trained), 0.0)

    def _gold_outcome(self, task: str) -> Outcome:
        started = time.perf_counter()
        scores = self.gold_of(task)
        seconds = time.perf_counter() - started
        return Outcome(task, GOLD, None, (), None, scores, self.curve(task, scores), seconds, self.gold_passes(task))

    def _without_w(self, way: Circuits, task: str, name: str, setting: Setting, trained: tuple[str, ...]) -> Outcome:
        started = time.perf_counter()
        scores, forwards = way.circuit(self, task, trained)
        seconds = time.perf_counter() - started
        return Outcome(task, name, setting, trained, None, scores, self.curve(task, scores), seconds, forwards)

    def _outcome(
        self,
        task: str,
        name: str,
        setting: Setting,
        trained: tuple[str, ...],
        alignment: Alignment,
        seconds: float,
    ) -> Outcome:
        """The circuit that an alignment transfers for a task, judged."""
        s = self.stand_in(setting, task)
        if setting.control == "permuted-w":
            alignment = controls.permuted_w(alignment, seed=self.seed)
        if setting.control == "scrambled-s":
            s = controls.scrambled(s, seed=self.seed)
        circuit = alignment.transfer(s)
        forwards = 0
        if alignment.history:
            n = sum(len(self.train[other]) for other in trained)
            step = min(alignment.meta["batch_size"], n)
            forwards = 2 * step * len(alignment.history) + 2 * n
        if setting.control == "regression":
            forwards = sum(self.gold_passes(other) for other in trained)
        curve = self.curve(task, circuit)
        return Outcome(task, name, setting, trained, alignment, circuit, curve, seconds, forwards)

    def gold_passes(self, task: str) -> int:
        """What gold costs, in passes of one example."""
        return self.passes_of(task, self.attribution.method, self.attribution.steps)

    def passes_of(self, task: str, method: str, steps: int) -> int:
        """What attribution on the target costs, in passes of one example."""
        return len(self.train[task]) * sum(METHODS.find(method).passes(self.target_nodes, steps))

    def diagnose(self, outcome: Outcome) -> dict[str, float]:
        """The columns of :mod:`dfa_lens.evaluation.diagnostics`, for what was trained on a source's scores.

        ``effective_rank`` of W; ``shared``, how much of this W's scores is common to all tasks; ``depth``, Spearman
        correlation with the source's scores carried over by depth alone; ``stability`` under noise of a tenth of the
        scores' spread.
        """
        alignment, setting = outcome.alignment, outcome.setting
        if alignment is None or setting is None or not alignment.history or setting.control not in ("", "random-s"):
            return {}
        s = {task: self.stand_in(setting, task) for task in self.tasks}
        found = {
            "effective_rank": diagnostics.effective_rank(alignment),
            "depth": diagnostics.depth_correlation(self.scores_of(outcome.task), outcome.circuit).spearman,
            "stability": diagnostics.stability(alignment, s[outcome.task]),
        }
        if len(s) > 1:
            found["shared"] = diagnostics.shared_part({task: alignment.transfer(each) for task, each in s.items()})
        return {name: round(value, 4) for name, value in found.items()}
