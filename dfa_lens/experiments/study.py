"""Regimes × controls × methods × seeds, on one or more pairs of models, in one tidy table.

A :class:`Setting` says how W is trained (regime), what stands in for the source's scores or for W (control) and with
which options. :func:`run` runs many of them over tasks, pairs and seeds, in several processes, and goes on where it
was stopped: every row is on disk as soon as it is known.

    table = dfa.study.run(["llama3"], {"zero-shot": Setting("zero-shot")}, seeds=(0, 1), out="study")
    dfa.statistics.compare(table, "zero-shot", ["gold"])
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from dfa_lens import tasks, zoo
from dfa_lens.attribution.attribute import METHODS, IntegrationWarning, attribute
from dfa_lens.data.alignment import Alignment
from dfa_lens.data.content import ByContent, fingerprint, plain
from dfa_lens.data.curve import FaithfulnessCurve
from dfa_lens.data.files import read_bytes, read_json, write_atomically
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores
from dfa_lens.errors import DfaError, FileError, short, unknown
from dfa_lens.evaluation import diagnostics
from dfa_lens.evaluation.faithfulness import faithfulness_curve
from dfa_lens.experiments.table import GOLD, Control, row
from dfa_lens.models.backend import HookedModel
from dfa_lens.transfer import controls, similarity
from dfa_lens.transfer.forms import Kernel
from dfa_lens.transfer.trainer import RELEASED, Job, fit_many

Regime = Literal["in-distribution", "near-distribution", "zero-shot", "one-task"]
"""What W is trained on, for a test task.

- ``in-distribution``: the task itself.
- ``near-distribution``: its sibling (:data:`SIBLINGS`); tasks without one are left out.
- ``zero-shot``: all other tasks.
- ``one-task``: every other task by itself, a row for each (the column ``trained_on``).
"""
_OTHER_SCORES = ("uniform-s", "random-s", "target-only")  # trained like the method, on other scores
_UNTRAINED = ("random-w", "depth-mean", "regression")

SIBLINGS = {
    "addition": "subtraction",
    "subtraction": "addition",
    "arc-easy": "arc-challenge",
    "arc-challenge": "arc-easy",
}


@dataclass(frozen=True, eq=False)
class Setting(ByContent):
    """One line of a comparison.

    Attributes
    ----------
    regime, control:
        See :data:`Regime` and :data:`~dfa_lens.experiments.table.Control`.
    options:
        For :func:`dfa_lens.fit`: fields of :class:`~dfa_lens.transfer.trainer.Job`, ``intervention``, ``positions``,
        ``gate_heads``, ``loss``. ``form`` may also be a function of the :class:`Experiment` and the training tasks.
        They must have a :func:`~dfa_lens.data.content.fingerprint`: what was trained, or is in a folder, goes by it.
    method:
        The options' name in tables.
    """

    regime: Regime = "zero-shot"
    control: Control = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "default"

    def __post_init__(self) -> None:
        if self.regime not in get_args(Regime):
            raise unknown("regime", self.regime, get_args(Regime), DfaError)
        if self.control not in get_args(Control):
            raise unknown("control", self.control, get_args(Control), DfaError)


@dataclass(frozen=True)
class Budget:
    """How much is run for every task."""

    train: int = 64  #: training pairs a task, also those of attribution
    test: int = 32  #: test pairs a task
    steps: int | None = None  #: training steps of each alignment; None: the setting's own, or fit's default
    curve_points: int = 32  #: circuit sizes of each curve
    batch_size: int = 32  #: of attribution and curves


FULL = Budget()
QUICK = Budget(train=8, test=8, steps=10, curve_points=6)


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
    source: str | Callable[[], HookedModel]
    target: str | Callable[[], HookedModel]

    @classmethod
    def of(cls, family: str | ModelPair) -> ModelPair:
        """The shipped pair of a family; an instance is returned unchanged."""
        if isinstance(family, ModelPair):
            return family
        known = zoo.pairs()
        if family not in known:
            raise unknown("family", family, known, DfaError)
        return cls(family, *known[family])


def attention_kernel(experiment: Experiment, trained: tuple[str, ...]) -> Kernel:
    """Like nodes by kind, depth and how heads attend to random repeated tokens."""
    return Kernel(experiment.attention_similarities)


def behaviour_kernel(experiment: Experiment, trained: tuple[str, ...]) -> Kernel:
    """As :func:`attention_kernel`, and by what nodes do at the answers of the *training* tasks (CKA)."""
    alike = similarity.cka_similarity(
        experiment.source,
        PromptPairs.concat([experiment.on_source[task] for task in trained]),
        experiment.target,
        PromptPairs.concat([experiment.train[task] for task in trained]),
    )
    depth = similarity.kind_and_depth(experiment.source_nodes, experiment.target_nodes)
    return Kernel({**experiment.attention_similarities, "behaviour": alike, "behaviour and depth": alike * depth})


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


class Experiment:
    """One pair of models with one seed: scores, prompts and trained alignments, each made once and when needed.

    Parameters
    ----------
    pair:
        See :class:`ModelPair`; a family's name will do.
    seed:
        Of prompts, training and controls.
    budget:
        How much to run.
    method, steps:
        Of attribution, on the source and for gold.
    device:
        For shipped models.
    collection:
        Of :func:`dfa_lens.tasks.load`.
    """

    def __init__(
        self,
        pair: str | ModelPair,
        seed: int = 0,
        budget: Budget = FULL,
        *,
        method: str = "nap-ig-inputs",
        steps: int = 5,
        device: str = "cpu",
        collection: str = "offline",
    ) -> None:
        self.pair, self.seed, self.budget = ModelPair.of(pair), seed, budget
        self.method, self.steps, self.device, self.collection = method, steps, device, collection
        self.tasks = tuple(tasks.names())
        self._trained: dict[Any, tuple[Alignment, float]] = {}
        self._gold: dict[str, NodeScores] = {}
        self._tests: dict[str, PromptPairs] = {}

    def _model(self, which: str | Callable[[], HookedModel]) -> HookedModel:
        return zoo.load(which, device=self.device) if isinstance(which, str) else which()

    @cached_property
    def source(self) -> HookedModel:
        """The source model."""
        return self._model(self.pair.source)

    @cached_property
    def target(self) -> HookedModel:
        """The target model."""
        return self._model(self.pair.target)

    @cached_property
    def source_nodes(self) -> NodeSet:
        """Its heads and MLP blocks."""
        return NodeSet.heads_and_mlps(self.source)

    @cached_property
    def target_nodes(self) -> NodeSet:
        """Its heads and MLP blocks."""
        return NodeSet.heads_and_mlps(self.target)

    def _load(self, task: str, model: HookedModel, split: Literal["train", "test"], n: int) -> PromptPairs:
        return tasks.load(
            task,
            model.tokenizer,  # type: ignore[attr-defined]
            split=split,
            n=n,
            seed=self.seed,
            collection=self.collection,  # type: ignore[arg-type]
        )

    @cached_property
    def train(self) -> dict[str, PromptPairs]:
        """Task → training pairs for the target."""
        return {task: self._load(task, self.target, "train", self.budget.train) for task in self.tasks}

    @cached_property
    def on_source(self) -> dict[str, PromptPairs]:
        """Task → training pairs for the source: the same examples."""
        return {task: self._load(task, self.source, "train", self.budget.train) for task in self.tasks}

    def test(self, task: str) -> PromptPairs:
        """Test pairs for the target."""
        if task not in self._tests:
            self._tests[task] = self._load(task, self.target, "test", self.budget.test)
        return self._tests[task]

    def _attribute(self, model: HookedModel, pairs: PromptPairs) -> NodeScores:
        return attribute(model, pairs, method=self.method, steps=self.steps, batch_size=self.budget.batch_size)

    @cached_property
    def scores(self) -> dict[str, NodeScores]:
        """Task → scores on the source."""
        return {task: self._attribute(self.source, pairs) for task, pairs in self.on_source.items()}

    def gold_of(self, task: str) -> NodeScores:
        """Attribution run directly on the target."""
        if task not in self._gold:
            self._gold[task] = self._attribute(self.target, self.train[task])
        return self._gold[task]

    @cached_property
    def attention_similarities(self) -> dict[str, Any]:
        """Similarity by kind and depth, and by how heads attend, anywhere and at near depth."""
        ours = similarity.attention_features(self.source, self.source_nodes)
        theirs = similarity.attention_features(self.target, self.target_nodes)
        alike = similarity.attention_similarity(ours, theirs)
        depth = similarity.kind_and_depth(self.source_nodes, self.target_nodes)
        return {"kind and depth": depth, "attention": alike, "attention and depth": alike * depth}

    # --- settings ------------------------------------------------------------------------------------------------

    def trained_on(self, setting: Setting, task: str) -> list[tuple[str, ...]]:
        """The training tasks of a setting for a test task: one tuple, several for ``one-task``, none if left out."""
        others = tuple(other for other in self.tasks if other != task)
        if setting.regime == "in-distribution":
            return [(task,)]
        if setting.regime == "near-distribution":
            return [(SIBLINGS[task],)] if SIBLINGS.get(task) in self.tasks else []
        return [others] if setting.regime == "zero-shot" else [(other,) for other in others]

    def stand_in(self, setting: Setting, task: str) -> NodeScores:
        """What is put in for the source's scores of a task, in training and transfer."""
        if setting.control == "uniform-s":
            return controls.uniform(self.source_nodes)
        if setting.control == "random-s":
            return controls.random_scores(self.source_nodes, seed=1000 * self.seed + self.tasks.index(task))
        if setting.control == "target-only":
            return controls.constant()
        return self.scores[task]

    def _key(self, setting: Setting, trained: tuple[str, ...]) -> Any:
        """What a trained alignment depends on, within one experiment; options by what they hold."""
        kind = setting.control if setting.control in _OTHER_SCORES else ""
        return kind, fingerprint(setting.options), trained

    def fit(self, setting: Setting, sets: Sequence[tuple[str, ...]]) -> None:
        """Train what is not trained yet: one alignment for every tuple of training tasks, together."""
        jobs: dict[str, Job] = {}
        shared = {
            name: setting.options[name]
            for name in ("intervention", "positions", "gate_heads", "loss")
            if name in setting.options
        }
        missing = [trained for trained in dict.fromkeys(sets) if self._key(setting, trained) not in self._trained]
        for trained in missing:
            own = {name: value for name, value in setting.options.items() if name not in shared}
            if callable(own.get("form")):
                own["form"] = own["form"](self, trained)
            job = Job(scores={task: self.stand_in(setting, task) for task in trained}, seed=self.seed, **own)
            jobs[" ".join(trained)] = job if self.budget.steps is None else replace(job, steps=self.budget.steps)
        started = time.perf_counter()
        found = fit_many(self.target, jobs, self.train, **shared)
        seconds = (time.perf_counter() - started) / max(len(jobs), 1)
        for trained in missing:
            self._trained[self._key(setting, trained)] = (found[" ".join(trained)], seconds)

    def _circuit(self, setting: Setting, task: str, trained: tuple[str, ...]) -> tuple[Alignment, NodeScores, float]:
        """Alignment, transferred scores and seconds of training."""
        nodes, seconds = (self.source_nodes, self.target_nodes), 0.0
        s = self.stand_in(setting, task)
        if setting.control == "random-w":
            alignment = controls.random_w(*nodes, seed=self.seed)
        elif setting.control == "depth-mean":
            alignment = controls.depth_mean(*nodes)
        elif setting.control == "regression":
            gold = {other: self.gold_of(other) for other in trained}
            alignment = controls.regression({other: self.scores[other] for other in trained}, gold, **setting.options)
        else:
            alignment, seconds = self._trained[self._key(setting, trained)]
            if setting.control == "permuted-w":
                alignment = controls.permuted_w(alignment, seed=self.seed)
            if setting.control == "scrambled-s":
                s = controls.scrambled(s, seed=self.seed)
        return alignment, alignment.transfer(s), seconds

    def curve(self, task: str, circuit: NodeScores) -> FaithfulnessCurve:
        """The circuit's faithfulness on the task's test pairs."""
        n, points = len(circuit), self.budget.curve_points
        sizes = sorted({round(i * n / points) for i in range(points + 1)})
        return faithfulness_curve(
            self.target,
            self.test(task),
            circuit,
            sizes=sizes,
            batch_size=self.budget.batch_size,
            sizes_per_pass=1 if self.device == "cpu" else 16,
        )

    def run(
        self,
        settings: Mapping[str, Setting],
        test_tasks: Sequence[str] | None = None,
        *,
        skip: Callable[[str, str, tuple[str, ...]], bool] = lambda name, task, trained: False,
    ) -> Iterator[Outcome]:
        """Gold, then one setting after the other.

        Parameters
        ----------
        settings:
            By the name that tables give them.
        test_tasks:
            Default: all.
        skip:
            Of a setting's name, a test task and the training tasks: whether it is known already.
        """
        chosen = list(test_tasks or self.tasks)
        n = self.budget.train
        attribution = n * sum(METHODS.find(self.method).passes(self.target_nodes, self.steps))
        for task in chosen:
            if skip(GOLD, task, ()):
                continue
            started = time.perf_counter()
            scores = self.gold_of(task)
            seconds = time.perf_counter() - started
            yield Outcome(task, GOLD, None, (), None, scores, self.curve(task, scores), seconds, attribution)
        for name, setting in settings.items():
            wanted = [
                (task, trained)
                for task in chosen
                for trained in self.trained_on(setting, task)
                if not skip(name, task, trained)
            ]
            if wanted and setting.control not in _UNTRAINED:
                self.fit(setting, [trained for _, trained in wanted])
            for task, trained in wanted:
                alignment, circuit, seconds = self._circuit(setting, task, trained)
                curve = self.curve(task, circuit)
                forwards = 0
                if alignment.history:
                    step = min(alignment.meta["batch_size"], n * len(trained))
                    forwards = 2 * step * len(alignment.history) + 2 * n * len(trained)
                if setting.control == "regression":
                    forwards = attribution * len(trained)
                yield Outcome(task, name, setting, trained, alignment, circuit, curve, seconds, forwards)


def diagnose(experiment: Experiment, outcome: Outcome) -> dict[str, float]:
    """The columns of :mod:`dfa_lens.evaluation.diagnostics`, for what was trained on a source's scores.

    ``effective_rank`` of W; ``shared``, how much of this W's scores is common to all tasks; ``depth``, Spearman
    correlation with the source's scores carried over by depth alone; ``stability`` under noise of a tenth of the
    scores' spread.
    """
    alignment, setting = outcome.alignment, outcome.setting
    if alignment is None or setting is None or not alignment.history or setting.control not in ("", "random-s"):
        return {}
    s = {task: experiment.stand_in(setting, task) for task in experiment.tasks}
    found = {
        "effective_rank": diagnostics.effective_rank(alignment),
        "shared": diagnostics.shared_part({task: alignment.transfer(each) for task, each in s.items()}),
        "depth": diagnostics.depth_correlation(experiment.scores[outcome.task], outcome.circuit).spearman,
        "stability": diagnostics.stability(alignment, s[outcome.task]),
    }
    return {name: round(value, 4) for name, value in found.items()}


def labels(outcome: Outcome) -> dict[str, str]:
    """The columns that say what an outcome is of."""
    setting = outcome.setting
    return {
        "setting": outcome.name,
        "regime": setting.regime if setting else "",
        "method": setting.method if setting else GOLD,
        "control": setting.control if setting else "",
        "trained_on": " ".join(outcome.trained_on),
    }


# --- many cells --------------------------------------------------------------------------------------------------

_KEY = ["setting", "task", "trained_on"]
_WORDS = ("family", "task", "setting", "regime", "method", "control", "trained_on")


def run(
    families: Sequence[str | ModelPair] | None = None,
    settings: Mapping[str, Setting] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    test_tasks: Sequence[str] | None = None,
    budget: Budget = FULL,
    out: str | Path | None = None,
    workers: int = 1,
    device: str = "cpu",
    collection: str = "offline",
    progress: bool = False,
) -> Any:
    """Run every setting on every pair of models, task and seed.

    Parameters
    ----------
    families:
        Pairs of models, see :class:`ModelPair`; default: the shipped ones.
    settings:
        Default: :data:`SETTINGS`.
    seeds:
        Each gives other prompts, another start of training and other random controls.
    out:
        A folder for the rows: ``<pair>-<seed>.csv`` grows row by row, and a second call with the same folder runs only
        what is missing. ``study.json`` keeps what the rows were made with. Without a folder nothing is kept on disk.
    workers:
        Processes, a pair and seed in each; each takes its share of the processor's cores.
    device, collection:
        For shipped models; of the tasks.

    Returns
    -------
    pandas.DataFrame
        A row per pair ("family"), seed, test task and setting, with CPR, its interval over examples, CMD, mean KL,
        recovery (CPR over gold's), and what it cost (forwards, seconds).

    Raises
    ------
    DfaError
        If a pair, task or setting is unknown, or the folder holds rows of another budget, or of other settings or
        models by the same names.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> from dfa_lens.experiments.study import SETTINGS, Budget, run
    >>> budget = Budget(train=4, test=4, steps=2, curve_points=3)
    >>> table = run(["llama3"], {"zero-shot": SETTINGS["zero-shot"]}, seeds=(0,), test_tasks=["ioi"], budget=budget)
    >>> table["setting"].tolist()
    ['gold', 'zero-shot']
    """
    import pandas as pd

    settings = SETTINGS if settings is None else settings
    pairs = [ModelPair.of(family) for family in (families or zoo.pairs())]
    for task in test_tasks or ():
        tasks.describe(task)
    double = next((pair.name for i, pair in enumerate(pairs) if pair.name in [p.name for p in pairs[:i]]), None)
    if double is not None:
        raise DfaError(f"Two pairs of models are called {double!r}: their rows could not be told apart.")
    folder = None if out is None else Path(out)
    if folder is not None:
        _check_folder(folder, pairs, settings, budget, collection)
    plans = [
        _Plan(pair, seed, dict(settings), tuple(test_tasks or ()), budget, folder, device, collection)
        for seed in seeds
        for pair in pairs
    ]
    frames = []
    with tqdm(total=len(plans), desc="study", unit="experiment", disable=not progress) as bar:
        if workers <= 1:
            for plan in plans:
                frames.append(_run_plan(plan))
                bar.update()
        else:
            threads = max(1, (os.cpu_count() or 1) // workers)
            with ProcessPoolExecutor(
                workers, mp_context=multiprocessing.get_context("spawn"), initializer=_threads, initargs=(threads,)
            ) as pool:
                for done in as_completed([pool.submit(_run_plan, plan) for plan in plans]):
                    frames.append(done.result())
                    bar.update()
    return pd.concat(frames, ignore_index=True).sort_values(["family", "seed"], kind="stable", ignore_index=True)


def _check_folder(
    folder: Path, pairs: Sequence[ModelPair], settings: Mapping[str, Setting], budget: Budget, collection: str
) -> None:
    """Rows that are there already must have been made in the same way; then what is to come is noted, too."""
    path = folder / "study.json"
    ours: dict[str, Any] = {
        "budget": asdict(budget),
        "collection": collection,
        "pairs": {pair.name: fingerprint(pair) for pair in pairs},
        "settings": {name: _described(setting) for name, setting in settings.items()},
    }
    if path.exists():
        theirs = read_json(path, "the description of a study")
        if any(not isinstance(theirs.get(name), type(value)) for name, value in ours.items()):
            raise FileError(
                f"{path} does not describe a study: it lacks what rows were made with. Take another folder."
            )
        changed = [name for name in ("budget", "collection") if theirs[name] != ours[name]]
        for what, name in (("setting", "settings"), ("pair", "pairs")):
            known = theirs[name]
            changed += [f"{what} {key!r}" for key, value in ours[name].items() if known.get(key, value) != value]
            ours[name] = known | ours[name]
        if changed:
            raise DfaError(
                f"The rows in {folder} were made with another {' and '.join(changed)}: take another folder or name."
            )
    write_atomically(path, json.dumps(ours, indent=1).encode())


def _described(setting: Setting) -> dict[str, Any]:
    """A setting as JSON has it: to read, and the fingerprint that it goes by."""
    asked = {"regime": setting.regime, "control": setting.control, "options": setting.options}
    return {**plain(asked), "fingerprint": fingerprint(asked)}


@dataclass(frozen=True)
class _Plan:
    pair: ModelPair
    seed: int
    settings: dict[str, Setting]
    test_tasks: tuple[str, ...]
    budget: Budget
    folder: Path | None
    device: str
    collection: str

    @property
    def path(self) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.pair.name}-{self.seed}.csv"


def _threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)


def _read(path: Path | None) -> Any:
    """The rows so far; a last line that was cut short by an interruption is dropped."""
    import pandas as pd

    if path is None or not path.exists():
        return pd.DataFrame()
    data = read_bytes(path)
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomically(path, whole)
    return read(path)


def read(path: str | Path) -> Any:
    """A table of :func:`run` from a CSV file: empty cells are "" in columns of words and NaN in columns of numbers.

    Raises
    ------
    FileError
        If it is not such a table.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> import tempfile
    >>> from dfa_lens.experiments.study import SETTINGS, Budget, read, run
    >>> folder, budget = tempfile.mkdtemp(), Budget(train=4, test=4, steps=2, curve_points=3)
    >>> settings = {"random-w": SETTINGS["random-w"]}
    >>> table = run(["llama3"], settings, seeds=(0,), test_tasks=["ioi"], budget=budget)
    >>> table.to_csv(f"{folder}/table.csv", index=False)
    >>> len(read(f"{folder}/table.csv"))
    2
    """
    import pandas as pd

    data = read_bytes(path)
    try:
        table = pd.read_csv(io.BytesIO(data), keep_default_na=False, dtype=dict.fromkeys(_WORDS, str))
        if not {*_WORDS, "seed", "cpr"} <= set(table.columns):
            raise ValueError(f"its columns are {', '.join(map(str, table.columns[:4]))} …")
        numbers = [name for name in table.columns if name not in _WORDS]
        return table.assign(
            **{name: pd.to_numeric(table[name].mask(table[name].astype(str) == "")) for name in numbers}
        )
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = short(error).rstrip(".")
        raise FileError(f"{path} is not a table of a study: {reason}. Remove it to start again.") from error


def _run_plan(plan: _Plan) -> Any:
    import pandas as pd

    known = _read(plan.path)
    done = set() if known.empty else set(map(tuple, known[_KEY].to_numpy().tolist()))
    experiment = Experiment(plan.pair, plan.seed, plan.budget, device=plan.device, collection=plan.collection)
    gold = {} if known.empty else dict(known.loc[known["setting"] == GOLD, ["task", "cpr"]].to_numpy().tolist())
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IntegrationWarning)  # gold is what it is; the tables show it
        for outcome in experiment.run(
            plan.settings,
            plan.test_tasks or None,
            skip=lambda name, task, trained: (name, task, " ".join(trained)) in done,
        ):
            if outcome.name == GOLD:
                gold[outcome.task] = outcome.curve.cpr
            record = {
                "family": plan.pair.name,
                "seed": plan.seed,
                "task": outcome.task,
                **labels(outcome),
                **row(outcome.curve, gold[outcome.task]),
                "forwards": outcome.forwards,
                "seconds": round(outcome.seconds, 2),
                **{name: float("nan") for name in ("effective_rank", "shared", "depth", "stability")},
                **diagnose(experiment, outcome),
            }
            rows.append(record)
            if plan.path is not None:
                new = not plan.path.is_file()
                pd.DataFrame([record]).to_csv(plan.path, mode="a", header=new, index=False)
    frame = pd.concat([known, pd.DataFrame(rows)], ignore_index=True) if rows else known
    wanted = {GOLD, *plan.settings}
    frame = frame[frame["setting"].isin(wanted)]
    return frame if not plan.test_tasks else frame[frame["task"].isin(plan.test_tasks)]


SETTINGS: dict[str, Setting] = {
    "in-distribution": Setting("in-distribution"),
    "near-distribution": Setting("near-distribution"),
    "zero-shot": Setting("zero-shot"),
    "one-task": Setting("one-task"),
    # controls of the zero-shot default
    "uniform-s": Setting("zero-shot", "uniform-s"),
    "random-s": Setting("zero-shot", "random-s"),
    "scrambled-s": Setting("zero-shot", "scrambled-s"),
    "permuted-w": Setting("zero-shot", "permuted-w"),
    "random-w": Setting("zero-shot", "random-w"),
    "depth-mean": Setting("zero-shot", "depth-mean"),
    "regression": Setting("zero-shot", "regression", {"ridge": 0.1}, "ridge 0.1"),
    "target-only": Setting("in-distribution", "target-only"),
    "in-distribution, uniform-s": Setting("in-distribution", "uniform-s"),
    # other objectives and alignments
    "in-distribution, matryoshka": Setting("in-distribution", "", {"objective": "matryoshka"}, "matryoshka"),
    "in-distribution, released": Setting("in-distribution", "", RELEASED, "released"),
    "zero-shot, released": Setting("zero-shot", "", RELEASED, "released"),
    "zero-shot, matryoshka": Setting("zero-shot", "", {"objective": "matryoshka"}, "matryoshka"),
    "zero-shot, kernel": Setting("zero-shot", "", {"form": "kernel"}, "kernel: depth"),
    "zero-shot, attention kernel": Setting("zero-shot", "", {"form": attention_kernel}, "kernel: attention"),
    "zero-shot, behaviour kernel": Setting("zero-shot", "", {"form": behaviour_kernel}, "kernel: behaviour"),
    "zero-shot, full+bias": Setting("zero-shot", "", {"form": "full+bias"}, "full+bias"),
    "zero-shot, low-rank": Setting("zero-shot", "", {"form": "low-rank"}, "low-rank"),
    "zero-shot, block": Setting("zero-shot", "", {"form": "block"}, "block"),
    "zero-shot, depth-band": Setting("zero-shot", "", {"form": "depth-band"}, "depth-band"),
}
"""The settings of the method benchmark: four regimes, all controls, and the named objectives and alignments."""
