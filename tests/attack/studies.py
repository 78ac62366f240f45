"""Parallel studies that are killed at random times, and resumed until they end: is the table the one of a quiet run?

Each study is run in a process of its own with two workers, on random models of two layers. It is killed by SIGKILL,
SIGTERM, SIGINT to the parent alone, or SIGINT to the group as a terminal sends it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

SETTINGS = ("random-w", "depth-mean", "permuted")
SEEDS = (0, 1)


def tiny(seed: int) -> Any:
    """A random model of two layers."""
    from helpers import random_model

    return random_model(
        seed=seed,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=16,
        intermediate_size=24,
    )


def source() -> Any:
    return tiny(0)


def target() -> Any:
    return tiny(1)


def pairs(tokenizer: Any, *, split: str, n: int, seed: int) -> Any:
    from helpers import random_pairs

    return random_pairs(n, 6, seed=seed)


def other_pairs(tokenizer: Any, *, split: str, n: int, seed: int) -> Any:
    from helpers import random_pairs

    return random_pairs(n, 6, seed=seed + 100)


def study(out: str, workers: int = 2, **options: Any) -> Any:
    """A small study with a setting that trains and two that do not."""
    from dfa_lens.experiments.study import Budget, ModelPair, Setting, run

    settings = {
        "random-w": Setting(control="random-w"),
        "depth-mean": Setting(control="depth-mean"),
        "permuted": Setting(control="permuted-w"),
    }
    budget = Budget(train=2, test=2, steps=2, curve_points=2, batch_size=2)
    tasks = {"a": pairs, "b": other_pairs}
    names = [ModelPair("tiny", source, target)]
    return run(names, settings, seeds=SEEDS, tasks=tasks, budget=budget, out=out, workers=workers, **options)


def _command(out: Path) -> list[str]:
    code = f"from attack import studies\nif __name__ == '__main__':\n    studies.study({str(out)!r})\n"
    script = out.parent / "run.py"
    script.write_text(code)
    return [sys.executable, "-W", "ignore", str(script)]


def _start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        _command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env=os.environ.copy()
    )


def _end(process: subprocess.Popen[bytes], how: str) -> list[psutil.Process]:
    """End a run, and hand back all the processes that it had."""
    with psutil.Process(process.pid).oneshot():
        family = psutil.Process(process.pid).children(recursive=True)
    if how == "SIGINT to the group":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, how.split(" ", maxsplit=1)[0]))
    return family


WAYS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGINT to the group")


def rows(folder: Path) -> Any:
    """What all files of a study hold, without what differs from run to run."""
    import pandas as pd

    from dfa_lens.experiments.study import read

    table = pd.concat([read(path) for path in sorted(folder.glob("*.csv"))])
    return table.drop(columns="seconds").sort_values(["seed", "setting", "task", "trained_on"]).reset_index(drop=True)


def run(kills: int, seed: int = 0, ways: tuple[str, ...] = WAYS) -> dict[str, Any]:
    """Kill studies ``kills`` times in all."""
    rng = random.Random(f"{seed} studies")
    base = Path(tempfile.mkdtemp(prefix="attack-"))
    started = time.perf_counter()
    found = {
        "kills": 0,
        "studies ended": 0,
        "other tables": 0,
        "runs that failed": 0,
        "workers after 5 s": 0,
        "files outside": 0,
    }
    try:
        quiet = base / "quiet" / "out"
        quiet.parent.mkdir()
        begun = time.perf_counter()
        subprocess.run(_command(quiet), check=True, stdout=subprocess.DEVNULL)
        length = time.perf_counter() - begun
        expected = rows(quiet)
        number = 0
        while found["kills"] < kills:
            number += 1
            place = base / str(number)
            out = place / "out"
            place.mkdir()
            ended = False
            while not ended:
                process = _start(out)
                if found["kills"] < kills:
                    # from the first moments on, mostly where rows are written
                    time.sleep(length * rng.uniform(0.05, 1.0))
                alone = found["kills"] >= kills
                if process.poll() is None and not alone:
                    family = _end(process, ways[found["kills"] % len(ways)])
                    found["kills"] += 1
                    process.communicate()
                    _, alive = psutil.wait_procs(family, timeout=5)
                    found["workers after 5 s"] += len(alive)
                    for each in alive:
                        each.kill()
                else:
                    _, error = process.communicate()
                    ended = True
                    if process.returncode != 0:
                        found["runs that failed"] += 1
                        print(error.decode()[-2000:], file=sys.stderr)
            found["studies ended"] += 1
            found["other tables"] += not rows(out).equals(expected)
            outside = {path.name for path in place.iterdir()} - {"out", "run.py"}
            found["files outside"] += len(outside)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    failed = sum(found[key] for key in ("other tables", "runs that failed", "workers after 5 s", "files outside"))
    return {**found, "seconds": round(time.perf_counter() - started), "failed": failed}
