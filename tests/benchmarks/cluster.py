"""Studies on an executor: workers that are killed, what a unit costs beside its work, and collecting many.

    python tests/benchmarks/cluster.py [--seeds 15] [--kills 3] [--rows 10000]

A study of random models of two layers is run here, and by submitit's local executor with two workers, one of which is
killed (SIGKILL) again and again. The tables are compared bit for bit, and the log of every worker is searched for units
that were done twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])  # jobs import it, too

from attack import studies

from dfa_lens.experiments import progress
from dfa_lens.experiments.folder import Folder
from dfa_lens.experiments.study import Budget, ModelPair, Setting, run
from dfa_lens.experiments.units import Row, collect

SETTINGS = {
    "random-w": Setting(control="random-w"),
    "depth-mean": Setting(control="depth-mean"),
    "permuted": Setting(control="permuted-w"),
}


def study(out: Path, seeds: int, **options: Any) -> Any:
    budget = Budget(train=2, test=2, steps=2, curve_points=2, batch_size=2)
    pair = [ModelPair("tiny", studies.source, studies.target)]
    tasks = {"a": studies.pairs, "b": studies.other_pairs}
    return run(pair, SETTINGS, seeds=range(seeds), tasks=tasks, budget=budget, out=out, **options)


def kill_workers(out: Path, times: int, killed: list[str], over: threading.Event) -> None:
    """Kill one of the workers while it is at something, so many times."""
    rng, folder = random.Random(0), Folder(out)
    while len(killed) < times and not over.wait(0.5 + rng.random()):
        claims = folder.claims()
        for key, worker in claims.items():
            place = out / "workers" / f"{worker}.json"
            if worker and place.exists() and not over.is_set():
                os.kill(json.loads(place.read_text())["pid"], signal.SIGKILL)
                killed.append(key)
                break
        over.wait(4)


def killed_study(base: Path, seeds: int, kills: int) -> dict[str, Any]:
    import submitit

    started = time.perf_counter()
    quiet = study(base / "quiet", seeds)
    alone = time.perf_counter() - started
    records = [Folder(base / "quiet").record(key) for key in Folder(base / "quiet").finished()]
    own = sum(record["took"] for record in records)

    executor = submitit.AutoExecutor(base / "logs", cluster="local")
    executor.update_parameters(timeout_min=60)
    killed: list[str] = []
    told: Counter[str] = Counter()
    over = threading.Event()
    killer = threading.Thread(target=kill_workers, args=(base / "jobs", kills, killed, over))
    killer.start()
    started = time.perf_counter()
    table = study(
        base / "jobs", seeds, executor=executor, workers=2, retries=0, on_unit=lambda unit: told.update([unit["unit"]])
    )
    wall = time.perf_counter() - started
    over.set()
    killer.join()
    same = table.drop(columns="seconds").equals(quiet.drop(columns="seconds"))
    return {
        "units": len(records),
        "rows": len(quiet),
        "killed": len(killed),
        "same table": same,
        "units lost": len(records) - len(told),
        "units told twice": sum(number > 1 for number in told.values()),
        "jobs": len(list((base / "logs").glob("*_submitted.pkl"))),
        "seconds here": round(alone, 1),
        "seconds of units": round(own, 1),
        "overhead a unit, here": round((alone - own) / len(records), 4),
        "seconds, two jobs": round(wall, 1),
    }


def collecting(base: Path, number: int) -> dict[str, Any]:
    folder = Folder(base)
    labels = {"family": "x", "task": "a", "setting": "gold"}
    rows = [Row({**labels, "seed": i}, f"{i:032x}", f"{i:032x}", "") for i in range(number)]
    names = ("cpr", "cpr_low", "cpr_high", "cmd", "kl", "floor", "forwards", "effective_rank", "depth", "stability")
    for i, row in enumerate(rows):
        columns = {name: i / 7 + j for j, name in enumerate(names)}
        folder.finish(row.key, {"unit": "x", "worker": "w", "took": 1.0, "columns": columns, "seconds": 1.0})
    started, cpu = time.perf_counter(), time.process_time()
    assert len(collect(rows, folder)) == number
    return {"rows": number, "seconds": time.perf_counter() - started, "CPU seconds": time.process_time() - cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        if given.rows:
            print("collecting:", collecting(Path(base) / "many", given.rows), flush=True)
        if given.seeds:
            print("killed:", killed_study(Path(base), given.seeds, given.kills), flush=True)
            print(progress.status(Path(base) / "jobs"))


if __name__ == "__main__":
    main()
