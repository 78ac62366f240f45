"""Names and paths of every kind, for what is saved and for a study's models: nothing outside the folder, no raw error."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import dfa_lens as dfa
from dfa_lens.data.files import checked_name, file_name, write_atomically
from dfa_lens.errors import DfaError
from dfa_lens.experiments import progress, study, table
from dfa_lens.experiments.folder import Folder
from dfa_lens.experiments.units import Plan

PIECES = (
    "..", "/", "\\", "a", "b.csv", "~", "$HOME", "\0", "\n", "\r", "\x1b[2J", "CON", "nul.txt", ".", " ", "=1+1", "@x", "-rf", "é", "名",
    "x" * 300, "\ud800", ":", "*", "?", "<b>", '"', "'", ",", "%2e%2e", "/etc/passwd", "C:", "",
)  # fmt: skip


def _everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run(tries: int, seed: int = 0) -> dict[str, Any]:
    """``tries`` names, each for a pair of models, a task, and as a path to save to."""
    rng = random.Random(f"{seed} names")
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    base = Path(tempfile.mkdtemp(prefix="attack-"))
    inside, started, before = base / "deep" / "er" / "study", time.perf_counter(), Path.cwd()
    inside.mkdir(parents=True)
    files: dict[str, str] = {}
    scores = dfa.controls.random_scores(dfa.NodeSet.for_sizes(1, 1))
    os.chdir(inside)
    try:
        for _ in range(tries):
            name = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 4)))
            for what in ("pair", "task", "path", "any"):
                try:
                    if what == "pair":
                        models = study.ModelPair(name, "llama3-tiny-source", "llama3-tiny-target")
                        made = study.Study(
                            (models,), {}, study.sources({"a": "ioi"}), study.QUICK, "cpu", torch.float32
                        )
                        plan = Plan.of(made, [0], ["a"])
                        progress.note(plan, Folder(inside))
                        for unit in plan.units:
                            Folder(inside).finish(unit.key, {"columns": {"cpr": 0.5}, "seconds": 0.0})
                        progress.write_table(Folder(inside))
                        if set(table.read(inside / "table.csv")["family"]) != {name}:
                            counts["names that share a file"] += 1
                    elif what == "task":
                        checked_name(name, "task")
                    elif what == "any":
                        file = file_name(name)
                        if files.setdefault(file.casefold(), name).casefold() != name.casefold():
                            counts["names that share a file"] += 1
                        if os.path.basename(file) != file or len(file) > 100:
                            counts["files outside"] += 1
                    elif "/" not in name:  # a path is its caller's own; what is no path at all is an error of ours
                        scores.save(inside / name)
                    else:
                        write_atomically(Path("relative" + name.replace("..", "")).name, b"")
                    counts["taken"] += 1
                except DfaError:
                    counts["refused"] += 1
                except Exception as error:
                    counts["raw errors"] += 1
                    examples.setdefault(type(error).__name__, f"{what} {name[:40]!r}: {error!s:.100}")
                finally:
                    for path in (inside / "plan.json", inside / "table.csv"):
                        path.unlink(missing_ok=True)
        outside = {path for path in _everything(base) if not path.startswith("deep/er/study")} - {"deep", "deep/er"}
        counts["files outside"] += len(outside)
    finally:
        os.chdir(before)
        shutil.rmtree(base, ignore_errors=True)
    bad = ("raw errors", "files outside", "names that share a file")
    return {
        "names": tries,
        "taken": counts["taken"],
        "refused": counts["refused"],
        **{key: counts[key] for key in bad},
        "seconds": round(time.perf_counter() - started),
        **({"examples": examples} if examples else {}),
        "failed": sum(counts[key] for key in bad),
    }
