"""Studies as graphs of units, on whatever runs them: the table is the same, whoever did what, and however often."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from attack import studies

import dfa_lens as dfa
from dfa_lens.errors import DfaError, FileError, StudyError
from dfa_lens.experiments import progress, units, work
from dfa_lens.experiments.executors import Here
from dfa_lens.experiments.experiment import Budget, ModelPair
from dfa_lens.experiments.folder import Folder, read_checked, write_checked
from dfa_lens.experiments.functional import FUNCTIONAL
from dfa_lens.experiments.setting import Setting
from dfa_lens.experiments.study import SETTINGS, run
from dfa_lens.experiments.units import Plan, Study
from dfa_lens.tasks.own import sources

BUDGET = Budget(train=2, test=2, steps=2, curve_points=2, batch_size=2)
TASKS = {"a": studies.pairs, "b": studies.other_pairs}
SOME = {"random-w": Setting(control="random-w"), "permuted": Setting(control="permuted-w"), "zero-shot": Setting()}


@pytest.fixture(scope="module")
def models():
    """Two models that are made once for all tests here, and how often a study asked for them."""
    made, asked = {0: studies.source(), 1: studies.target()}, Counter()

    def load(seed):
        asked[seed] += 1
        return made[seed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "tiny", load)
        yield asked


@pytest.fixture
def done(monkeypatch):
    """Units that take no time: their numbers are made of their names. What has been done, in order."""
    order = []

    def played(unit, plan, experiment):
        order.append(unit)
        columns = dict.fromkeys(("cpr", "cmd", "kl", "floor"), int(unit.key[:6], 16) / 7)
        return {"seconds": 0.0, **({"columns": columns} if unit.kind == "row" else {})}

    monkeypatch.setattr(work, "do", played)
    return order


def study(out=None, *, settings=SOME, seeds=(0,), **options):
    pair = [ModelPair("tiny", studies.source, studies.target)]
    return run(pair, settings, **({"seeds": seeds, "tasks": TASKS, "budget": BUDGET, "out": out} | options))


def plan_of(settings=SOME, seeds=(0,), tasks=TASKS, test_tasks=("a", "b"), families=None, budget=BUDGET):
    pairs = families or (ModelPair("tiny", studies.source, studies.target),)
    return Plan.of(Study(pairs, settings, sources(tasks), budget, "cpu", torch.float32), seeds, test_tasks)


def same(ours, theirs):
    pd.testing.assert_frame_equal(ours.drop(columns="seconds"), theirs.drop(columns="seconds"), check_exact=True)


# --- the graph -----------------------------------------------------------------------------------------------------


def test_what_several_ask_for_is_one_unit():
    """Attribution of each model on each task, one fit that two settings share, a row for everything."""
    plan = plan_of()
    assert Counter(unit.kind for unit in plan.units) == {"attribution": 4, "fit": 2, "row": 8}
    assert len(plan.rows) == 2 * (1 + len(SOME))
    again = plan_of({**SOME, "another name": Setting()})  # of the same content
    assert again.keys == plan.keys and len(again.rows) == len(plan.rows) + 2
    # the target of one pair is the source of another
    chain = (ModelPair("up", studies.source, studies.target), ModelPair("down", studies.target, studies.source))
    both = plan_of({}, families=chain)
    assert Counter(unit.kind for unit in both.units) == {"attribution": 4, "row": 4}
    assert plan_of(FUNCTIONAL).units  # needs of every way are units


def test_a_unit_comes_after_those_that_it_needs():
    done: set[str] = set()
    for unit in plan_of({**SETTINGS, **FUNCTIONAL}, tasks=None, test_tasks=["ioi", "mcqa"]).units:
        assert done.issuperset(unit.needs), unit
        done.add(unit.key)


@pytest.mark.parametrize(
    "other",
    [
        {"seeds": (1,)},
        {"budget": Budget(train=3, test=2, steps=2, curve_points=2, batch_size=2)},
        {"families": (ModelPair("tiny", partial(studies.tiny, 8), partial(studies.tiny, 7)),)},
        {"tasks": {"a": partial(studies.pairs), "b": partial(studies.other_pairs)}},
    ],
)
def test_what_decides_a_number_decides_the_name(other):
    assert not plan_of().keys & plan_of(**other).keys


def test_a_recipe_decides_the_fit_and_not_the_attribution():
    one, other = plan_of({"x": Setting()}), plan_of({"x": Setting(recipe=dfa.Recipe(lr=0.2))})
    differ = {unit.kind for unit in other.units if unit.key not in one.keys}
    assert differ == {"fit", "row"}


# --- whoever does it -----------------------------------------------------------------------------------------------


def test_the_numbers_of_real_models_and_models_that_load_once_a_worker(models, tmp_path):
    """Two seeds in a folder, in pieces, are what they are without one."""
    settings = {"permuted": SOME["permuted"], "regression": Setting(control="regression")}
    before = models.copy()
    whole = study(settings=settings, seeds=(0, 1), test_tasks=["a"])
    assert models - before == {0: 1, 1: 1}
    study(tmp_path, settings=settings, seeds=(1,), test_tasks=["a"])
    for path in list((tmp_path / "units").glob("*.json"))[::3]:  # as if it had been interrupted
        path.unlink()
    same(study(tmp_path, settings=settings, seeds=(0, 1), test_tasks=["a"]), whole)
    # nothing is made in passing that another worker may be making: only what is planned was kept
    planned = plan_of(settings, seeds=(0, 1), test_tasks=["a"]).units
    kept = {path.stem for path in (tmp_path / "units").glob("*.safetensors")}
    assert kept == {unit.key for unit in planned if unit.kind != "row"}


def test_threads_share_the_work(done, tmp_path):
    """By the plain protocol, and no unit is done twice."""
    expected = study(seeds=(0, 1))
    done.clear()
    with ThreadPoolExecutor(3) as pool:
        same(study(tmp_path, seeds=(0, 1), executor=pool, workers=3), expected)
    assert Counter(done) == dict.fromkeys(plan_of(seeds=(0, 1)).units, 1)


def test_what_is_done_is_not_done_again(done, tmp_path):
    study(tmp_path, settings={"random-w": SOME["random-w"]})
    first = len(done)
    table = study(tmp_path)
    assert len(done) == len(set(done)) == len(plan_of().units) > first
    study(tmp_path)
    assert len(done) == len(plan_of().units)
    same(progress.collected(tmp_path), study(tmp_path))
    assert len(dfa.study.read(tmp_path / "table.csv")) == len(table)


class Strangers:
    """An executor whose first workers begin something and are never heard of again, as a cluster's may."""

    def __init__(self, lost):
        self.lost, self.submitted = lost, 0

    def submit(self, fn, /, *args, **kwargs):
        self.submitted += 1
        future = Future()
        if self.submitted <= self.lost:
            plan, folder, _, name = args
            folder.claim(work.State.of(plan, folder, 1).open(plan)[0].key, name)
            future.set_exception(RuntimeError("node failure"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_workers_that_are_lost_are_followed_by_others(done, tmp_path):
    executor = Strangers(3)
    same(study(tmp_path, executor=executor), study())
    assert executor.submitted == 4
    notes = Folder(tmp_path).failures()
    assert [note["kind"] for each in notes.values() for note in each] == ["death"] * 3  # of one unit, then done


def test_workers_that_all_end_at_once_are_an_error(done, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "DEATHS", 99)
    with pytest.raises(DfaError, match="8 workers in a row ended before they had done anything.*node failure"):
        study(tmp_path, executor=Strangers(99))


def test_a_unit_that_ends_its_workers_is_given_up(done, tmp_path):
    with pytest.raises(
        StudyError, match=r"^1 of 14 units .*attribution of a on the target.*ended from outside"
    ) as caught:
        study(tmp_path, executor=Strangers(work.DEATHS))
    table = caught.value.table
    assert set(table.loc[table["setting"] == "gold", "task"]) == {"b"}  # the rest is there, without a recovery
    assert table["recovery"].isna().equals(table["task"] == "a") and len(table) == 7
    assert len(study(tmp_path)) == 8  # tried again


def test_what_a_killed_worker_was_at_is_taken_up(done, tmp_path):
    """Of a run that is no more: at once where its process is known to be gone, else when it has been silent."""
    plan, folder = plan_of(), Folder(tmp_path)
    keys = [unit.key for unit in plan.units][:2]
    other, gone = tmp_path / "workers" / "other.json", tmp_path / "workers" / "gone.json"
    with folder.at_work("alive"):
        gone.write_text(f'{{"host": "{socket.gethostname()}", "pid": 2000000000}}')
        other.write_text('{"host": "elsewhere", "pid": 1}')
        assert folder.alive() == {"alive", "other"}
        os.utime(other, (time.time() - 999,) * 2)
        assert folder.alive() == {"alive"}
    for key, who in zip(keys, ("gone", "other"), strict=True):
        folder.claim(key, who)
    study(tmp_path)
    assert len(done) == len(plan.units) and not folder.claims()


def test_what_another_is_at_is_left_to_it(done, tmp_path):
    """A worker takes the rest, and ends; what was claimed by nobody that is known is taken after a while."""
    plan, folder = plan_of(), Folder(tmp_path)
    last = plan.units[-1]
    with folder.at_work("alive"):
        folder.claim(last.key, "alive")
        work.work(plan, folder, "run", "me")
    assert last not in done and len(done) == len(plan.units) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dfa_lens.experiments.drive.NAMELESS", 0.0)
        (tmp_path / "claims" / last.key).write_text("")
        assert len(study(tmp_path)) == 8


def test_a_stopped_run_ends_its_workers(done, tmp_path):
    plan, folder = plan_of(), Folder(tmp_path)
    folder.stop("run")
    assert work.work(plan, folder, "run", "me") == 0 and work.work(plan, folder, "other", "me") > 0


def test_an_interrupt_cancels_what_waits(done, tmp_path, monkeypatch):
    cancelled = []

    class Queue:
        def submit(self, fn, /, *args, **kwargs):
            future = Future()
            monkeypatch.setattr(future, "cancel", lambda: cancelled.append(args[3]))
            return future

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dfa_lens.experiments.drive.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, executor=Queue(), workers=2)
    assert len(cancelled) == 2 and not done


# --- what goes wrong -----------------------------------------------------------------------------------------------


def failing(monkeypatch, errors, kind="fit"):
    """Units of a kind raise these errors, one after the other."""
    tried, before, left = [], work.do, list(errors)

    def do(unit, plan, experiment):
        if unit.kind == kind:
            tried.append((unit.label, experiment.batch_size, experiment.cache))
            if left:
                raise left.pop(0)
        return before(unit, plan, experiment)

    monkeypatch.setattr(work, "do", do)
    return tried


def test_an_error_that_may_pass_is_tried_again(done, tmp_path, monkeypatch):
    tried = failing(monkeypatch, [ConnectionError("the hub is away")])
    same(study(tmp_path), study())
    ((note,),) = Folder(tmp_path).failures().values()
    assert note["error"] == "ConnectionError: the hub is away" and "Traceback" in note["traceback"]
    assert tried[0] == tried[1]


def test_a_unit_that_fails_is_reported_after_all_others(done, tmp_path, monkeypatch):
    failing(monkeypatch, [ConnectionError("away")] * 2 + [dfa.DfaError("bad input")])
    message = r"^2 of 14 units of the study failed: fit of .*: ConnectionError: away \(1 more\). The rest is in .*$"
    with pytest.raises(StudyError, match=message) as caught:
        study(tmp_path, retries=1)
    assert {note["error"] for note in caught.value.failures} == {"ConnectionError: away", "DfaError: bad input"}
    assert set(caught.value.table["setting"]) == {"gold", "random-w"}
    said = str(progress.status(tmp_path))
    assert "fit: 0 of 2 done" in said and "failed: fit of permuted on b, tiny, seed 0: ConnectionError: away" in said
    failing(monkeypatch, [ConnectionError("away")])
    with pytest.raises(StudyError, match="units of the study failed: [^:]*: ConnectionError: away.$"):
        study(retries=0)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_short_memory_is_tried_once_with_half_the_batch(done, monkeypatch, error):
    tried = failing(monkeypatch, [error])
    study()
    assert [each[1:] for each in tried] == [(2, "device"), (1, "recompute"), (2, "device")]
    failing(monkeypatch, [error, error])
    with pytest.raises(StudyError, match="OutOfMemoryError|can't allocate"):
        study()


ASKED = []


def broken():
    ASKED.append(1)
    raise OSError("no such repository\non the hub")


def test_a_model_that_can_t_be_loaded_is_one_line_and_asked_for_once():
    ASKED.clear()
    pair = [ModelPair("x", broken, broken)]
    with pytest.raises(StudyError, match="The model '.*broken' could not be loaded: OSError: no such repo") as caught:
        run(pair, SOME, seeds=(0,), tasks=TASKS, budget=BUDGET)
    assert len(ASKED) == 1 and "\n" not in str(caught.value)


def test_folders_of_others_are_refused(done, tmp_path):
    with pytest.raises(DfaError, match="Workers elsewhere need a folder"):
        study(executor=Here())
    study(tmp_path)
    known = (tmp_path / "study.json").read_text()
    write_checked(tmp_path / "study.json", {**read_checked(tmp_path / "study.json", ""), "units": 0})
    with pytest.raises(DfaError, match="has the study of another version of dfa_lens: take another folder"):
        study(tmp_path)
    (tmp_path / "study.json").write_text(known)
    record = next((tmp_path / "units").glob("*.json"))
    record.write_text(record.read_text().replace('"took": ', '"took": 1'))
    with pytest.raises(FileError, match="was damaged after it was written: remove it, and it is made again"):
        progress.status(tmp_path)
    with pytest.raises(FileError, match="There is no file .*plan.json"):
        progress.status(tmp_path / "none")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(FileError, match="was damaged"):
        progress.collected(tmp_path)


# --- what is told --------------------------------------------------------------------------------------------------


def test_units_and_steps_are_told(models, tmp_path):
    units_, steps = [], []
    settings = {"permuted": SOME["permuted"]}
    study(
        tmp_path, settings=settings, test_tasks=["a"], on_unit=units_.append, on_step=lambda *each: steps.append(each)
    )
    plan = plan_of(settings, test_tasks=["a"])
    assert [each["unit"] for each in units_] == [unit.label for unit in plan.units]
    assert [each["done"] for each in units_] == list(range(1, len(plan.units) + 1))
    assert units_[-1]["remaining"] == 0 and units_[0]["remaining"] > 0
    (fit,) = (unit for unit in plan.units if unit.kind == "fit")
    assert [label for label, _ in steps] == [fit.label] * 2
    history = dfa.Alignment.load(tmp_path / "units" / f"{fit.key}.safetensors").history
    assert [dict(record) for _, record in steps] == [dict(record) for record in history]


def test_the_state_of_a_folder(done, tmp_path):
    plan, folder = plan_of(), Folder(tmp_path)
    study(tmp_path)
    for unit in plan.units[-3:]:
        (tmp_path / "units" / f"{unit.key}.json").unlink()
    with folder.at_work("me"):
        folder.claim(plan.units[-1].key, "me")
        found = progress.status(tmp_path)
    assert found.done == {"attribution": 4, "fit": 2, "row": 5} and found.units["row"] == 8 and found.workers == 1
    assert found.at_work == (plan.units[-1].label,) and not found.failures and found.remaining > 0
    assert len(progress.collected(tmp_path)) == 5


def test_ten_thousand_rows_are_collected(tmp_path):
    """In small; tests/benchmarks/cluster.py measures it."""
    folder = Folder(tmp_path)
    rows = [
        units.Row({"family": "x", "seed": i, "task": "a", "setting": "gold"}, str(i), str(i), "") for i in range(50)
    ]
    for row in rows:
        folder.finish(row.key, {"columns": {"cpr": int(row.key) / 3}, "seconds": 1.234})
    found = units.collect(rows, folder)
    assert found["cpr"].tolist() == [i / 3 for i in range(50)] and (found["recovery"][1:] == 1).all()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # submitit's
def test_jobs_of_submitit(models, tmp_path, monkeypatch):
    """Two real jobs, one of which is killed while it is at something: the same table, and nothing twice."""
    import submitit

    tests = str(Path(__file__).parent)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([tests, str(Path(tests).parent), os.environ.get("PYTHONPATH", "")])
    )
    settings, told = {"permuted": SOME["permuted"]}, []
    expected = study(settings=settings, seeds=(0, 1), test_tasks=["a"])
    out = tmp_path / "out"

    def kill():
        while True:
            for key, worker in Folder(out).claims().items():
                with contextlib.suppress(OSError, ValueError):
                    os.kill(json.loads((out / "workers" / f"{worker}.json").read_text())["pid"], signal.SIGKILL)
                    return killed.append(key)
            time.sleep(0.01)

    killed: list[str] = []
    threading.Thread(target=kill, daemon=True).start()
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    executor.update_parameters(timeout_min=10)
    found = study(
        out, settings=settings, seeds=(0, 1), test_tasks=["a"], executor=executor, workers=2, on_unit=told.append
    )
    same(found, expected)
    # what the killed one left a new job did, or the other one, where it was quicker than that
    assert len(killed) == 1 and len(list((tmp_path / "logs").glob("*_submitted.pkl"))) in (2, 3)
    assert Counter(unit["unit"] for unit in told) == {
        unit.label: 1 for unit in plan_of(settings, seeds=(0, 1), test_tasks=["a"]).units
    }
