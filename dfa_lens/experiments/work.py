"""What a worker does: take a unit that nobody is at, do it, and go on until none is left for it.

A worker is one call of :func:`work`, on any machine that sees the folder. It keeps two models and one experiment.
"""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from dfa_lens import zoo
from dfa_lens.attribution.attribute import IntegrationWarning
from dfa_lens.data.content import fingerprint
from dfa_lens.errors import DfaError, FileError, short
from dfa_lens.experiments.experiment import Experiment, Loader
from dfa_lens.experiments.folder import Folder
from dfa_lens.experiments.units import Plan, Unit, do
from dfa_lens.models.private import out_of_memory
from dfa_lens.transfer.trainer import OnStep

#: How often a unit may end its worker (killed, out of memory as the system sees it) before it is given up.
DEATHS = 4
#: Seconds between two looks at the folder of a worker that has nothing to do; the second: at the most.
PATIENCE = (0.05, 2.0)


@dataclass(frozen=True)
class State:
    """What a folder says of a plan at one moment."""

    finished: set[str]
    claims: dict[str, str]
    failures: dict[str, list[dict[str, Any]]]
    #: Units that will not be done in this run: given up, or after one that is.
    hopeless: set[str]

    @classmethod
    def of(cls, plan: Plan, folder: Folder, retries: int) -> State:
        """As it is now."""
        claims, finished = folder.claims(), folder.finished()  # in this order: what is finished is first released
        failures = folder.failures()
        hopeless = {key for key, notes in failures.items() if given_up(notes, retries)} - finished
        for unit in plan.units if hopeless else ():  # each after those that it needs
            if unit.key not in finished and not hopeless.isdisjoint(unit.needs):
                hopeless.add(unit.key)
        return cls(finished, claims, failures, hopeless)

    def open(self, plan: Plan) -> list[Unit]:
        """What is neither done nor hopeless, nor anybody at it."""
        out = self.finished | self.hopeless | self.claims.keys()
        return [unit for unit in plan.units if unit.key not in out]


def given_up(notes: list[dict[str, Any]], retries: int) -> bool:
    """Whether a unit with these failures is not tried again."""
    deaths = sum(note["kind"] == "death" for note in notes)
    return any(note["kind"] == "final" for note in notes) or len(notes) - deaths > retries or deaths >= DEATHS


def work(
    plan: Plan,
    folder: Folder,
    run: str,
    worker: str,
    *,
    retries: int = 1,
    device: int | None = None,
    on_step: OnStep | None = None,
    on_unit: Callable[[], None] = lambda: None,
) -> int:
    """Do units until none is left that nobody else is at.

    Parameters
    ----------
    run:
        Of whose workers this is one: they stop when it does.
    worker:
        A name of its own.
    retries:
        How often a unit is tried again that ended with an error which may be a passing one.
    device:
        The number among a machine's GPUs, for a process that has several to choose from.
    on_step:
        Called here after each step of a training, with the unit's label and the step's record.
    on_unit:
        Called here after each unit.

    Returns
    -------
    int
        How many it did.
    """
    if device is not None and torch.cuda.device_count() > 1:
        torch.cuda.set_device(device % torch.cuda.device_count())
    bench, done, wait = _Bench(plan, folder, on_step), 0, PATIENCE[0]
    with folder.at_work(worker):
        while not folder.stopped(run):
            state = State.of(plan, folder, retries)
            left = state.open(plan)
            if not left:
                break
            ready = [unit for unit in left if state.finished.issuperset(unit.needs)]
            unit = _chosen(ready, bench.place, state, plan)
            if unit is None or not folder.claim(unit.key, worker):
                time.sleep(wait)
                wait = min(2 * wait, PATIENCE[1])
                continue
            wait = PATIENCE[0]
            try:
                if not folder.is_finished(unit.key):  # between the look and the claim
                    bench.do(unit, worker)
                    done += 1
            finally:
                folder.release(unit.key)
            on_unit()
    return done


def _chosen(ready: list[Unit], place: int | None, state: State, plan: Plan) -> Unit | None:
    """One of the models that are here; else where fewest are at work."""
    busy = Counter(unit.place for unit in plan.units if unit.key in state.claims) if state.claims else Counter[int]()
    return min(ready, key=lambda unit: (unit.place != place, busy[unit.place]), default=None)


@dataclass
class _Bench:
    """What a worker has at hand: the present experiment, and models for the next."""

    plan: Plan
    folder: Folder
    on_step: OnStep | None
    place: int | None = None
    experiment: Experiment | None = None
    models: dict[str, Any] = field(default_factory=dict)

    def do(self, unit: Unit, worker: str) -> None:
        """Do a unit, or say why it can't be done."""
        started = time.perf_counter()
        try:
            record = self._tried(unit)
        except Exception as error:
            lasting = isinstance(error, DfaError) and not isinstance(error, FileError)
            passing = not lasting and not out_of_memory(error)
            note = {
                "kind": "error" if passing else "final",
                "unit": unit.label,
                "error": _line(error, 500),
                "worker": worker,
                "traceback": traceback.format_exc(),
            }
            self.folder.fail(unit.key, note)
            self._clear()
        else:
            took = time.perf_counter() - started
            self.folder.finish(unit.key, {"unit": unit.label, "worker": worker, "took": took, **record})

    def _tried(self, unit: Unit) -> dict[str, Any]:
        """Once more with less memory if it runs out of it."""
        experiment = self._experiment(unit)
        try:
            return self._quietly(unit, experiment)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not out_of_memory(error):
                raise
        experiment.batch_size, before = max(1, experiment.batch_size // 2), experiment.batch_size
        experiment.cache = "recompute"  # a training's batch decides its W: it keeps no runs instead
        _free()  # outside the except: the error's traceback holds tensors
        try:
            return self._quietly(unit, experiment) | {"batch_size": experiment.batch_size}
        finally:
            experiment.batch_size, experiment.cache = before, "device"

    def _quietly(self, unit: Unit, experiment: Experiment) -> dict[str, Any]:
        experiment.on_step = None
        if self.on_step is not None:
            told = self.on_step
            experiment.on_step = lambda _, record: told(unit.label, record)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IntegrationWarning)  # gold is what it is; the tables show it
            return do(unit, self.plan, experiment)

    def _experiment(self, unit: Unit) -> Experiment:
        if self.experiment is None or self.place != unit.place:
            self.experiment = None
            self.place = unit.place
            self.experiment = self.plan.experiment(unit.place, folder=self.folder, load=self._load)
        return self.experiment

    def _load(self, which: Loader) -> Any:
        """A model, the last two of which are kept; one that can't be loaded is not tried again and again."""
        key = fingerprint(which)
        if key not in self.models:
            wanted = {fingerprint(each) for each in self._sides()}
            for other in [other for other in self.models if other not in wanted]:
                del self.models[other]
            _free()
            study = self.plan.study
            try:
                self.models[key] = (
                    zoo.load(which, device=study.device, dtype=study.dtype) if isinstance(which, str) else which()
                )
            except Exception as error:
                self.models[key] = DfaError(f"The model {_name(which)} could not be loaded: {_line(error, 300)}")
        if isinstance(self.models[key], DfaError):
            raise self.models[key]
        return self.models[key]

    def _sides(self) -> tuple[Loader, Loader]:
        assert self.place is not None
        models = self.plan.places[self.place][0]
        return models.source, models.target

    def _clear(self) -> None:
        """After an error nothing that it may have left half done is used again."""
        self.experiment = self.place = None
        with suppress(RuntimeError):
            _free()


def _name(which: Loader) -> str:
    args = (which,) if isinstance(which, str) else getattr(which, "args", ())
    return repr(short(args[0] if args else getattr(which, "__qualname__", which)))


def _line(error: BaseException, length: int) -> str:
    return f"{type(error).__name__}: {short(' '.join(str(error).split()), length)}"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
