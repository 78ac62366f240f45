"""Hand a plan to workers, and see to it that all of it gets done: workers that end are followed by others."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from dfa_lens.errors import DfaError
from dfa_lens.experiments.executors import Executor, Here
from dfa_lens.experiments.folder import Folder
from dfa_lens.experiments.units import Plan
from dfa_lens.experiments.work import State, work
from dfa_lens.transfer.trainer import OnStep

OnUnit = Callable[[Mapping[str, Any]], None]
"""Of a unit that is done: unit (its label), kind, took (seconds), worker, done, units, remaining (seconds, or NaN)."""

#: Workers that may end in a row without a unit done, before the study is stopped.
BARREN = 8
#: Seconds between two looks, and after which a claim that names nobody is nobody's.
LOOK, NAMELESS = 0.1, 5.0


@dataclass
class Pace:
    """How long units take, by kind, and how long the rest will."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, took: float) -> None:
        """One more was done."""
        self.seconds.setdefault(kind, []).append(took)

    def remaining(self, left: Mapping[str, int], workers: int) -> float:
        """Seconds that so many units of each kind will take; NaN before anything is known.

        Examples
        --------
        >>> from dfa_lens.experiments.drive import Pace
        >>> pace = Pace()
        >>> pace.add("row", 2.0)
        >>> pace.remaining({"row": 6}, workers=3)
        4.0
        """
        known = [each for some in self.seconds.values() for each in some]
        if not known:
            return float("nan")
        mean = {kind: sum(some) / len(some) for kind, some in self.seconds.items()}
        overall = sum(known) / len(known)
        return sum(number * mean.get(kind, overall) for kind, number in left.items()) / max(workers, 1)


def drive(
    plan: Plan,
    folder: Folder,
    executor: Executor,
    *,
    workers: int = 1,
    retries: int = 1,
    on_unit: OnUnit | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Do all units of a plan that are not done yet.

    Returns
    -------
    list of dict
        The last failure of each unit that was given up.

    Raises
    ------
    DfaError
        If workers can't be started, or end again and again before they have done anything.
    """
    driver = _Driver(plan, folder, executor, workers, retries, on_unit, on_step)
    folder.forgive()
    driver.seen = folder.finished() & plan.keys
    shown = {"initial": len(driver.seen), "desc": "study", "unit": "unit", "disable": not progress}
    with tqdm(total=len(plan.units), **shown) as bar:
        try:
            while driver.look(bar):
                time.sleep(max(LOOK, 5 * driver.cost))
        except BaseException as error:
            driver.end(wait=0)
            if not isinstance(error, BrokenExecutor):
                raise
            raise DfaError(
                "A process of the study was killed (is memory short?). What it had finished is kept: run the study "
                "again."
            ) from error
    driver.end(wait=3)
    state = State.of(plan, folder, retries)
    failed = state.failures.keys() & state.hopeless
    return [state.failures[unit.key][-1] for unit in plan.units if unit.key in failed]


@dataclass
class _Driver:
    plan: Plan
    folder: Folder
    executor: Executor
    workers: int
    retries: int
    on_unit: OnUnit | None
    on_step: OnStep | None
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    futures: dict[str, Any] = field(default_factory=dict)  #: of workers that are not known to have ended
    begun: set[str] = field(default_factory=set)  #: names of those that were there once
    gone: list[Any] = field(default_factory=list)  #: of workers that have ended, whatever their executor says
    started: int = 0
    barren: int = 0
    seen: set[str] = field(default_factory=set)
    nameless: dict[str, float] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    cost: float = 0.0  #: seconds of a look

    def look(self, bar: Any) -> bool:
        """See what has been done, let go of what nobody is at, start workers; whether anything is left."""
        begun = time.perf_counter()
        self._bury()
        if self.barren > 2 * BARREN:
            raise DfaError(f"{self.barren} workers in a row ended before they had done anything; why is not known.")
        self._let_go()
        state = State.of(self.plan, self.folder, self.retries)
        self._tell(state.finished, bar)
        if self.plan.keys <= state.finished | state.hopeless:
            return False
        self.cost = time.perf_counter() - begun
        while len(self.futures) < self.workers and len(self.futures) < len(state.open(self.plan)):
            self._start(bar)
            if isinstance(self.executor, Here):  # it is over already
                break
        return True

    def _start(self, bar: Any) -> None:
        name = f"{self.run}-{self.started}"
        here = isinstance(self.executor, Here)
        told: dict[str, Any] = {"on_unit": lambda: self._tell(self.folder.finished(), bar)} if here else {}
        self.futures[name] = self.executor.submit(
            work,
            self.plan,
            self.folder,
            self.run,
            name,
            retries=self.retries,
            device=None if here or self.plan.study.device != "cuda" else self.started % self.workers,
            on_step=self.on_step,
            **told,
        )
        self.started += 1

    def _bury(self) -> None:
        """Workers that have ended: what was wrong, if they all do.

        One that had begun and is no more has ended, whatever its executor knows of it: submitit asks SLURM's accounting
        about jobs, which not every cluster has.
        """
        alive = self.folder.alive() if self.futures else set()
        self.begun |= alive & self.futures.keys()
        for name, future in list(self.futures.items()):
            if not future.done():
                if name in self.begun - alive:
                    self.barren += 1
                    self.gone.append(self.futures.pop(name))
                continue
            del self.futures[name]
            try:
                self.barren += not future.result()
            except BrokenExecutor:
                raise
            except Exception as error:
                self.barren += 1
                if self.barren >= BARREN:
                    raise DfaError(
                        f"{self.barren} workers in a row ended before they had done anything; the last one: "
                        f"{type(error).__name__}: {' '.join(str(error).split())[-500:]}"
                    ) from error

    def _let_go(self) -> None:
        """What a worker was at that is no more can be done by another."""
        claims = self.folder.claims()
        alive = self.folder.alive() if claims else set()
        self.nameless = {key: self.nameless.get(key, time.monotonic()) for key, who in claims.items() if not who}
        for key, worker in claims.items():
            ours = worker.startswith(f"{self.run}-")
            if worker:
                gone = worker not in alive or (ours and worker not in self.futures)
            else:
                gone = time.monotonic() - self.nameless[key] > NAMELESS
            if not gone:
                continue
            if ours and not self.folder.is_finished(key):
                label = self.plan.by_key[key].label
                error = "The worker was ended from outside (killed, out of time or out of memory?)."
                note = {"kind": "death", "unit": label, "error": error, "worker": worker, "traceback": ""}
                self.folder.fail(key, note)
            self.folder.release(key)

    def _tell(self, finished: set[str], bar: Any) -> None:
        done = finished & self.plan.keys
        new = done - self.seen
        if not new:
            return
        self.seen |= new
        self.barren = 0
        bar.update(len(new))
        left = Counter(str(unit.kind) for unit in self.plan.units if unit.key not in done)
        for unit in (self.plan.by_key[key] for key in sorted(new)):
            record = self.folder.record(unit.key)
            self.pace.add(unit.kind, record["took"])
            remaining = self.pace.remaining(left, max(len(self.futures), 1))
            bar.set_postfix_str(f"about {duration(remaining)} left; {unit.label}")
            if self.on_unit is not None:
                known = {"done": len(done), "units": len(self.plan.units), "remaining": remaining}
                self.on_unit({"kind": unit.kind, **{key: record[key] for key in ("unit", "took", "worker")}, **known})

    def end(self, wait: float) -> None:
        """Let all workers end, and cancel those that have not after so many seconds."""
        if not self.futures and not self.gone:
            return
        self.folder.stop(self.run)
        over = time.monotonic() + wait
        while time.monotonic() < over and not all(future.done() for future in self.futures.values()):
            time.sleep(0.05)
        for future in [*self.futures.values(), *self.gone]:
            if not future.done() and hasattr(future, "cancel"):
                with suppress(Exception):
                    future.cancel()


def duration(seconds: float) -> str:
    """A time as one says it.

    Examples
    --------
    >>> from dfa_lens.experiments.drive import duration
    >>> duration(42), duration(3600 * 30), duration(float("nan"))
    ('42 s', '30 h', 'an unknown time')
    """
    if math.isnan(seconds):
        return "an unknown time"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
