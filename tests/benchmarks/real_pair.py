"""Functional transfer between two real models: by default SmolLM2-135M to Qwen2.5-Coder-0.5B.

    make bench-real-pair                          # makes both checkpoint folders first; hours on a CPU
    python tests/benchmarks/real_pair.py --source NAME --target NAME    # checkpoint folders or hub names
    python tests/benchmarks/real_pair.py --tasks ioi addition calendar --settings gold functional --minutes 30
    python tests/benchmarks/real_pair.py --settings "nap on the target, by size"    # any setting by |score|

A task is used if both models solve it. Prompts' tokens are part of what a file is called by, so that scores,
measurements, trained W and curves in ``build/real-pair`` are used again as long as they are of the same prompts (and
curves of the same circuits), and a second call makes what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from functional import Pair, Side, leaderboard, markdown

import dfa_lens as dfa
from dfa_lens.data import tokenization
from dfa_lens.data.content import fingerprint
from dfa_lens.data.curve import area
from dfa_lens.tasks import offline

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / ".cache" / "smollm2-135m-instruct"
TARGET = ROOT / ".cache" / "qwen2.5-coder-0.5b-instruct"

#: What is asked, each as the smaller of the two default models knows it best.
CANDIDATES: dict[str, dict[str, Any]] = {
    "ioi": {"templates": (0, 1, 2, 4, 6)},
    "addition": {"templates": (0,), "shots": 1, "max_number": 10},
    "subtraction": {"templates": (0,), "shots": 2, "max_number": 10},
    "mcqa": {"n_choices": 2},
    "arc-easy": {"n_choices": 2},
    "pronouns": {"templates": (0, 3)},
    "docstring": {},
    "capitals": {"templates": (1,)},
    "languages": {"templates": (1,)},
    "calendar": {},
    "counting": {"templates": (0, 1)},
    "antonyms": {"templates": (0, 2)},
    "agreement": {"templates": (0, 1, 3)},
    "induction": {"templates": (1,)},
    "colored-objects": {},
    "greater-than": {"counterfactual": "names"},
}
#: The order in which settings are run: those that say most first.
SETTINGS = (
    "gold",
    "functional, by size",
    "own scores, by size",
    "functional, sizes learned",
    "functional, own scores, sizes learned",
    "functional",
    "functional, own scores",
    "nap on the target",
    "group-share alone",
    "W",
    "uniform-s",
    "source-blind",
    "scrambled",
    "wrong task",
    "functional, own scores alone",
    "functional, no guard",
    "functional, own scores, no guard",
)
METHODS = (
    "functional",
    "functional, own scores",
    "functional, by size",
    "own scores, by size",
    "functional, sizes learned",
    "functional, own scores, sizes learned",
)
#: Other ways to teach, to guard and to rank, that were tried: ``--settings tried`` runs them all.
TRIED = (
    "gold, by size",
    "group-share alone, by size",
    "places teach",
    "the best fifth teach",
    "masks teach",
    "own scores, no guard",
    "own scores, half the guard",
    "own scores, twice the guard",
)
BATCH = 16
BY_SIZE = ", by size"


def draw(task: str, tokenizer: Any, *, split: str, n: int, seed: int, **options: Any) -> dfa.PromptPairs:
    """Pairs of an offline task; where the tokenizer cuts " 7" into " " and "7", the prompt ends in the space."""
    space = tokenization.tokens(tokenizer, [" "], special=False)[0]
    found: list[dfa.tasks.Example] = []
    for each in islice(offline.distinct(task, split=split, seed=seed, **options), 50 * n):
        answers = tokenization.tokens(tokenizer, [each.answer, each.wrong], special=False)
        example = each
        if all(len(ids) == len(space) + 1 and ids[: len(space)] == space for ids in answers):
            example = each._replace(
                clean=f"{each.clean} ", corrupt=f"{each.corrupt} ", answer=each.answer[1:], wrong=each.wrong[1:]
            )
        columns = ([getattr(example, name)] for name in ("clean", "corrupt", "answer", "wrong"))
        if tokenization.screen(tokenizer, *columns).misfits == [None]:
            found.append(example)
        if len(found) == n:
            break
    if len(found) < n:
        raise dfa.TaskError(f"Only {len(found)} of {n} pairs of {task!r}, split {split!r}, fit the tokenizer.")
    offered = all(each.choices and each.corrupt_choices for each in found)
    return dfa.PromptPairs.from_strings(
        tokenizer,
        **{name: [getattr(each, name) for each in found] for name in ("clean", "corrupt", "answer", "wrong")},
        choices=[each.choices or () for each in found] if offered else None,
        corrupt_choices=[each.corrupt_choices or () for each in found] if offered else None,
    )


class RealSide(Side):
    """One model, with the prompts that it is given."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        super().__init__(name, given.seed, given.build)
        self.given = given
        self.pairs = cache(self._pairs)  # type: ignore[method-assign]

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if self.name in dfa.zoo.names():
            return self.model.tokenizer
        return AutoTokenizer.from_pretrained(self.name)

    def _pairs(self, task: str, split: str = "train") -> dfa.PromptPairs:
        options = dict(CANDIDATES[task])
        if self.given.shots is not None and "shots" in options:
            options["shots"] = self.given.shots
        n = self.given.pairs if split == "train" else self.given.test
        return draw(task, self.tokenizer, split=split, n=n, seed=self.seed, **options)

    def _path(self, task: str, what: str, ending: str) -> Path:
        return self.folder / f"{task}.{what}.{fingerprint(self.pairs(task))[:8]}.{ending}"

    def _kept(self, kind: type, task: str, what: str, make: Callable[[], Any]) -> Any:
        path = self._path(task, what, "safetensors")
        if not path.exists():
            start = time.perf_counter()
            made = make()
            print(f"{path.name} of {self.folder.name}: {time.perf_counter() - start:.0f} s", flush=True)
            made.save(path)
        return kind.load(path)  # type: ignore[attr-defined]

    def mask(self, task: str) -> dfa.NodeScores:
        """A free mask for the task, trained for a few steps."""

        def make() -> dfa.NodeScores:
            options = {"steps": self.given.steps, "batch_size": self.given.batch, "seed": self.seed}
            return dfa.controls.target_only(self.model, {task: self.pairs(task)}, **options)

        return self._kept(dfa.NodeScores, task, f"mask-{self.given.steps}-{self.given.batch}", make)

    def solved(self, task: str) -> float:
        """The part of the training pairs that the model gets right in both directions; 0 if it has no such pairs."""
        try:
            path = self._path(task, "check", "json")
        except dfa.DfaError as error:
            print(f"{task} for {self.folder.name}: {error}", flush=True)
            return 0.0
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dfa.check(self.model, self.pairs(task)).summary()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))["right in both directions"]


class RealPair(Pair):
    """Source and target, and every circuit between them on the tasks that both solve."""

    source: RealSide
    target: RealSide

    def __init__(self, source: RealSide, target: RealSide, given: argparse.Namespace) -> None:
        super().__init__(source, target)
        self.given = given
        self.folder = given.build / f"{source.folder.name}-to-{target.folder.name}"
        self.tasks = ()  # until they are chosen
        own = partial(self.functional, own=True)

        def from_scores(how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[str], dfa.NodeScores]:
            return lambda task: changed(source.scores(task), how)

        self.settings |= {
            "own scores, by size": self.by_size("functional, own scores"),
            "places teach": lambda task: self.taught(task, from_scores(places)),
            "the best fifth teach": lambda task: self.taught(task, from_scores(best_fifth)),
            "masks teach": lambda task: self.taught(task, source.mask),
            "own scores, no guard": partial(own, guard=0.0),
            "own scores, half the guard": partial(own, guard=0.5),
            "own scores, twice the guard": partial(own, guard=2.0),
        }

    def circuit(self, task: str, setting: str) -> dfa.NodeScores:
        """The scores of a setting; of any of them "…, by size" ranks by |score|."""
        if setting not in self.settings and setting.endswith(BY_SIZE):
            return self.by_size(setting.removesuffix(BY_SIZE))(task)
        return self.settings[setting](task)

    def taught(self, task: str, teacher: Callable[[str], dfa.NodeScores]) -> dfa.NodeScores:
        """A functional alignment, with the task's own, that learns something else than the source's scores."""
        teaching = (*self.others(task), task)
        scores = {name: teacher(name) for name in teaching}
        measured = {name: self.source.measured(name) for name in teaching}
        own = scores.pop(task), measured.pop(task)
        fitted = dfa.fit_functional(scores, measured, families=dfa.tasks.FAMILIES, seed=self.given.seed)
        return fitted.transfer(self.target.measured(task), *own)

    def choose(self) -> pd.DataFrame:
        """Find the tasks that both solve; the target is asked only where the source does."""
        rows = []
        for task in self.given.tasks or [name for name in CANDIDATES if name in dfa.tasks.FAMILIES]:
            found = {"task": task, "family": dfa.tasks.FAMILIES[task], "source": self.source.solved(task)}
            if found["source"] >= self.given.least:
                found["target"] = self.target.solved(task)
                if found["target"] >= self.given.least:
                    self.tasks = (*self.tasks, task)
            rows.append(found)
        return pd.DataFrame(rows)

    def strangers(self, task: str) -> list[str]:
        """What W for a task is trained on: the tasks whose families are in other folds than the task's."""
        families = list(dict.fromkeys(dfa.tasks.FAMILIES[name] for name in self.tasks))
        folds = self.given.folds or len(families)
        fold = {family: i % folds for i, family in enumerate(families)}
        own = fold[dfa.tasks.FAMILIES[task]]
        return [name for name in self.tasks if fold[dfa.tasks.FAMILIES[name]] != own]

    def trained(self, task: str, *, uniform: bool = False) -> dfa.NodeScores:
        """The published form of W, trained on the target for a few steps; that with uniform scores beside it."""
        others = self.strangers(task)
        recipe = dfa.Recipe(steps=self.given.steps, batch_size=self.given.batch, seed=self.given.seed)
        pairs = {name: self.target.pairs(name) for name in others}
        taught = {name: self.source.scores(name) for name in others}
        flat = dfa.controls.uniform(taught[others[0]].nodes)
        key = fingerprint([recipe, [[name, taught[name].values, pairs[name]] for name in others]])[:12]
        paths = {name: self.folder / f"{name}.{key}.safetensors" for name in ("W", "uniform-s")}
        if not all(path.exists() for path in paths.values()):
            start = time.perf_counter()
            jobs = {"W": (taught, recipe), "uniform-s": (dict.fromkeys(others, flat), recipe)}
            for name, alignment in dfa.fit_many(self.target.model, jobs, pairs).items():
                alignment.save(paths[name])
            print(f"W and uniform-s for {task}: {time.perf_counter() - start:.0f} s", flush=True)
        found = dfa.Alignment.load(paths["uniform-s" if uniform else "W"])
        return found.transfer(flat if uniform else self.source.scores(task))

    def curve(self, task: str, setting: str) -> dict[str, np.ndarray]:
        """The curve of a setting's circuit, from the disk if it is there."""
        circuit = self.circuit(task, setting)
        n, steps = len(circuit), self.given.sizes - 1
        sizes = sorted({round(n * (i / steps) ** 1.5) for i in range(steps + 1)})  # denser where circuits are small
        pairs = self.target.pairs(task, "test")
        path = self.curves(task, setting, fingerprint([circuit.values, pairs, sizes])[:12])
        if not path.exists():
            start = time.perf_counter()
            # signed: what ranks by size is a setting of its own
            options = {"ranking": "signed", "sizes": sizes, "batch_size": BATCH}
            found = dfa.faithfulness_curve(self.target.model, pairs, circuit, **options)
            names = ("fractions", "sizes", "per_example", "clean_values", "corrupt_values", "kl_per_example")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **{name: getattr(found, name) for name in names})
            print(f"{setting}, {task}: {time.perf_counter() - start:.0f} s, CPR {found.cpr:.3f}, ", end="")
            print(f"CMD {found.cmd:.3f}, KL {found.mean_kl:.2f}", flush=True)
        return read(path)

    def curves(self, task: str, setting: str, key: str) -> Path:
        """Where a curve is."""
        return self.folder / f"{setting.replace(',', '').replace(' ', '-')}.{task}.{key}.npz"

    def known(self, task: str, setting: str) -> dict[str, np.ndarray] | None:
        """The newest curve of a setting on the disk, whatever its circuit was; None if there is none."""
        pattern = self.curves(task, setting, "*").name
        found = sorted(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        return read(found[-1]) if found else None


def read(path: Path) -> dict[str, np.ndarray]:
    """A curve from the disk."""
    with np.load(path) as file:
        return dict(file)


def changed(scores: dfa.NodeScores, how: Callable[[torch.Tensor], torch.Tensor]) -> dfa.NodeScores:
    """The same nodes with other values."""
    return dfa.NodeScores(how(scores.values), scores.nodes, scores.meta)


def places(values: torch.Tensor) -> torch.Tensor:
    """The place of each in the ranking, from −½ to ½."""
    return values.argsort().argsort() / (len(values) - 1) - 0.5


def best_fifth(values: torch.Tensor) -> torch.Tensor:
    """1 for the best fifth: what trees say of it is how probable it is that a node is among them."""
    return (values >= values.quantile(0.8)).float()


def judged(curve: dict[str, np.ndarray]) -> dict[str, Any]:
    """CPR, CMD and KL of the mean over prompts, and of every prompt its CMD and KL.

    A prompt's CMD is the area under |its metric less its clean metric|, in units of the task's mean m(M) − m(∅): the
    ratio of one prompt's own differences would be ruled by prompts on which the model hardly prefers either answer.
    """
    kept, values = curve["fractions"], curve["per_example"]
    clean, corrupt = curve["clean_values"], curve["corrupt_values"]
    scale = clean.mean() - corrupt.mean()
    f = (values.mean(1) - corrupt.mean()) / scale
    kl = curve["kl_per_example"]
    return {
        "cpr": area(kept, f),
        "cmd": area(kept, np.abs(1 - f)),
        "kl": area(kept, kl.mean(1)),
        "prompts": {"cmd": area(kept, np.abs(values - clean) / scale), "kl": area(kept, kl)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=str(SOURCE), help="a checkpoint folder or hub name")
    parser.add_argument("--target", default=str(TARGET))
    parser.add_argument("--tasks", nargs="+", default=None, choices=CANDIDATES, help="default: all that both solve")
    parser.add_argument("--judge", nargs="+", default=None, help="run the circuits of these tasks only; all teach")
    parser.add_argument("--settings", nargs="+", default=None, help="default: all, those that say most first")
    parser.add_argument("--shots", type=int, default=None, help="worked examples, where the task takes them")
    parser.add_argument("--least", type=float, default=0.75, help="what part a model must solve (default: .75)")
    parser.add_argument("--pairs", type=int, default=16, help="training pairs a task")
    parser.add_argument("--test", type=int, default=12, help="test pairs a task")
    parser.add_argument("--sizes", type=int, default=12, help="circuit sizes of a curve")
    parser.add_argument("--steps", type=int, default=40, help="of training W")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step of training W")
    parser.add_argument("--folds", type=int, default=0, help="train W on the families of other folds; 0: one each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--tables-only", action="store_true", help="from the newest curves on the disk; run nothing")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "real-pair")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    given = parser.parse_args()
    os.nice(10)
    warnings.simplefilter("ignore", dfa.IntegrationWarning)  # gold with 5 steps is what it is
    end = time.monotonic() + 60 * given.minutes
    pair = RealPair(RealSide(given.source, given), RealSide(given.target, given), given)
    solved = pair.choose()
    rows, prompts, missing = [], [], []
    for setting in TRIED if given.settings == ["tried"] else given.settings or SETTINGS:
        for task in [each for each in pair.tasks if each in (given.judge or pair.tasks)]:
            late = given.tables_only or time.monotonic() > end
            curve = pair.known(task, setting) if late else pair.curve(task, setting)
            if curve is None:
                missing.append(f"{setting} on {task}")
                continue
            found = judged(curve)
            of_prompts = found.pop("prompts")
            about = {"setting": setting, "task": task, "family": dfa.tasks.FAMILIES[task], "seed": given.seed}
            rows.append({**about, **found})
            prompts += [
                {**about, "prompt": i, "cmd": cmd, "kl": kl}
                for i, (cmd, kl) in enumerate(zip(of_prompts["cmd"], of_prompts["kl"], strict=True))
            ]
    table = pd.DataFrame(rows)
    text = tables(given, solved, table, pd.DataFrame(prompts), missing)
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    table.round(5).to_csv(given.out / "real-pair.csv", index=False)
    (given.out / "real-pair.md").write_text(text, encoding="utf-8")


def tables(
    given: argparse.Namespace, solved: pd.DataFrame, table: pd.DataFrame, prompts: pd.DataFrame, missing: list[str]
) -> str:
    """What both solve, means over tasks, all tasks, and paired tests over tasks and over prompts."""
    parts = [
        f"# {Path(given.source).name} to {Path(given.target).name}: all tables\n\n"
        f"`python tests/benchmarks/real_pair.py`, dfa_lens {dfa.__version__}, seed {given.seed}; {given.pairs} training "
        f"and {given.test} test pairs a task, {given.sizes} circuit sizes. No relative of the task teaches. "
        f"W: {given.steps} steps of {given.batch} pairs, families in {given.folds or 'as many'} folds.\n",
        "## Which tasks both solve\n\nRight in both directions, part of the training pairs.\n",
        markdown(solved),
        "\n## Means over tasks\n",
        markdown(leaderboard(table)),
    ]
    for value in ("cpr", "cmd", "kl"):
        wide = table.pivot_table(index="setting", columns="task", values=value, sort=False)
        parts += [f"\n## {value.upper()} by task\n", markdown(wide.reset_index())]
    for setting in METHODS:
        against = [name for name in table["setting"].unique() if name != setting and name not in METHODS]
        if setting not in set(table["setting"]) or not against:
            continue
        for what, data, by in (("tasks", table, ["task"]), ("prompts", prompts, ["task", "prompt"])):
            for value in ("cmd", "kl"):
                found = dfa.statistics.compare(data, setting, against, value=value, by=by)
                title = f"\n## {setting}: paired tests over {what}, {value.upper()}\n"
                parts += [title, markdown(found.drop(columns="setting"))]
    if missing:
        parts.append("\n## Not run\n\n" + "; ".join(missing))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
