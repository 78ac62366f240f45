"""What commands read: models, prompt pairs, and files of scores of whatever kind."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from dfa_lens.cli import threads
from dfa_lens.cli.options import dtype_of
from dfa_lens.data.files import read_bytes
from dfa_lens.errors import DfaError, FileError, ModelError, TaskError, short, unknown

#: Of MIB's files: nodes or edges, as JSON or torch's.
MIB_SUFFIXES = (".json", ".pt")


def model(name: str, backend: str = "auto", device: str = "cpu", dtype: str = "float32") -> Any:
    """A model, loaded."""
    from dfa_lens.models.loading import load_model

    loaded = load_model(name, backend=backend, device=device, dtype=dtype_of(dtype))  # type: ignore[arg-type]
    threads.for_model(loaded)
    return loaded


def require_models(*names: str) -> None:
    """That there are such models, asked before the first of them is loaded."""
    from dfa_lens.models import checkpoint

    for name in names:
        checkpoint.locate(name)


def model_pairs(
    families: list[str] | None, own: list[str] | None, device: str, dtype: str, backend: str = "auto"
) -> list[Any] | None:
    """Pairs of models: shipped families by name, and those of the user's; None: all that are shipped."""
    from dfa_lens import zoo
    from dfa_lens.experiments.experiment import ModelPair
    from dfa_lens.models.loading import Backend, load_model

    if not own:
        threads.for_shipped()
    if backend not in get_args(Backend):
        raise unknown("backend", backend, get_args(Backend), ModelError)
    made: list[Any] = list(families or ())
    how: dict[str, Any] = {"device": device, "dtype": dtype_of(dtype)}
    if backend != "auto":
        how["backend"] = backend
        known = zoo.pairs("all")
        shipped = [ModelPair.of(name).name for name in families or ([] if own else zoo.pairs())]
        made = [
            ModelPair(name, *(functools.partial(load_model, model, **how) for model in known[name])) for name in shipped
        ]
    for value in own or ():
        name, separator, models = value.partition("=")
        both = models.split(",")
        if not separator or not name or len(both) != 2 or not all(both):
            raise DfaError(f"--models are given as NAME=SOURCE,TARGET, not {short(value)!r}.")
        require_models(*both)
        load = [functools.partial(load_model, each, **how) for each in both]
        made.append(ModelPair(name, *load))
    return made or None


def nodes(model: Any, given: Sequence[str] | None) -> Any:
    """The nodes that names, patterns and hook points mean on a model; None: the usual ones."""
    from dfa_lens.data.nodes import NodeSet

    if not given:
        return None
    points: dict[str, int | None] = {}
    kept = []
    for each in given:
        point, _, axis = each.partition("=")
        if "hook_" not in point:
            kept += [node for node in NodeSet.heads_and_mlps(model)[each] if node not in kept]
        elif axis and not axis.isdecimal():
            raise DfaError(f"--nodes cuts a hook point along an axis, {point}=2 say, not {short(each)!r}.")
        else:
            points[point] = int(axis) if axis else None
    if points:
        kept += NodeSet.from_points(model, points)
    return NodeSet(kept)


def metric(name: str, model: Any) -> Any:
    """A metric by its name, "greater-than" with the model's own tokens of 00 to 99."""
    from dfa_lens.data import metrics

    if name == metrics.GreaterThan.name:
        return metrics.GreaterThan.of(model.tokenizer)
    if name not in metrics.METRICS:
        raise unknown("metric", name, (*metrics.METRICS, metrics.GreaterThan.name))
    return name


def pairs(
    model: Any,
    task: str | None,
    file: Path | None,
    *,
    split: str,
    examples: int,
    seed: int,
    collection: str,
    control: bool = False,
) -> Any:
    """The prompt pairs of one of our tasks or of a file, whose rows all count unless they name their splits.

    With ``control``, of random answers.
    """
    found = _pairs(model, task, file, split, examples, seed, collection)
    return found.with_random_answers(seed) if control else found


def _pairs(
    model: Any, task: str | None, file: Path | None, split: str, examples: int, seed: int, collection: str
) -> Any:
    from dfa_lens import tasks
    from dfa_lens.tasks.own import FileTask

    if (task is None) == (file is None):
        raise TaskError("Give either --task or --pairs.")
    if task is not None:
        return tasks.load(task, model.tokenizer, split=split, n=examples, seed=seed, collection=collection)  # type: ignore[arg-type]
    own = FileTask.read(file)  # type: ignore[arg-type]
    return own(model.tokenizer, split=split if own.has_splits else None, n=examples, seed=seed)


def named(values: list[str], what: str) -> dict[str, Path]:
    """Task → file, of options that are given as TASK=FILE."""
    found: dict[str, Path] = {}
    for value in values:
        task, separator, path = value.partition("=")
        if not separator or not task:
            raise TaskError(f"{what} are given as TASK=FILE, not {value!r}.")
        if task in found:
            raise TaskError(f"{what} of task {task!r} are given twice.")
        found[task] = Path(path)
    return found


def by_task(values: list[str], what: str) -> dict[str, Path]:
    """Task → file, of options that may also be given as a FILE alone, which is then that of the task ""."""
    alone = [value for value in values if "=" not in value]
    if len(alone) > 1:
        raise TaskError(f"{what} of several tasks are given as TASK=FILE, not {alone[0]!r} and {alone[1]!r}.")
    return ({"": Path(alone[0])} if alone else {}) | named([value for value in values if "=" in value], what)


def curve(path: Path) -> Any:
    """A faithfulness curve from the table that ``evaluate --out`` writes: f at each size, without its examples."""
    import io

    import numpy as np
    import pandas as pd

    from dfa_lens.data.curve import MIB_FRACTIONS, FaithfulnessCurve

    try:
        table = pd.read_csv(io.BytesIO(read_bytes(path)))
        fractions, sizes, f, kl = (
            table[name].to_numpy(dtype=float) for name in ("fraction", "size", "faithfulness", "kl")
        )
        n = round(sizes[-1] / fractions[-1])
        if not (np.diff(sizes) >= 0).all() or not np.isfinite([fractions, sizes, f, kl]).all():
            raise ValueError("sizes must rise, and all numbers be finite")
        return FaithfulnessCurve(
            fractions,
            sizes.astype(int),
            f[:, None],
            np.ones(1),
            np.zeros(1),
            kl,
            "mib" if len(fractions) == len(MIB_FRACTIONS) and np.allclose(fractions, MIB_FRACTIONS) else "nodes",
            "signed",
            n,
            unit="edges" if "live_size" in table else "nodes",
        )
    except (ValueError, KeyError, IndexError, ZeroDivisionError, UnicodeDecodeError, DfaError) as error:
        raise FileError(f"{path} is no table of a curve, as evaluate --out writes it: {short(error)}.") from error


def own_tasks(pairs: list[str] | None) -> dict[str, Any]:
    """Task → the file that it is read from."""
    from dfa_lens.tasks.own import FileTask

    return {task: FileTask.read(path) for task, path in named(pairs or [], "Pairs").items()}


def all_tasks(
    pairs: list[str] | None, named: Sequence[str] | None, families: Sequence[str] | None
) -> dict[str, Any] | None:
    """Our tasks and those of files; None: the paper's six. Where a further one is named, or models of those: those."""
    from dfa_lens import tasks, zoo

    own = own_tasks(pairs)
    models = [name for family in families or () for name in zoo.pairs("more").get(family, ())]
    solved = [task for task in tasks.names("more") if all(task in zoo.solves(name) for name in models)]
    if models or set(named or ()) & set(tasks.names("more")):
        return {name: name for name in solved} | own
    return {name: name for name in tasks.names()} | own if own else None


def kind(path: Path) -> str:
    """What a file of ours says that it holds, or nothing; what is wrong with it is said by the loading."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {}).get("format", ""))
    except (SafetensorError, OSError):
        return ""


def scores(path: Path) -> Any:
    """Scores of nodes or of edges, whichever a file holds: ours, MIB's, or a CSV table of nodes.

    Raises
    ------
    FileError
        If it is a file of another kind, which the message names.
    """
    import dfa_lens as dfa

    if path.suffix in MIB_SUFFIXES:
        return dfa.mib.scores(path)
    if path.suffix == ".csv":
        return _table(path)
    found = kind(path)
    if "scores" not in found and found:
        raise FileError(f"{path} is a file of {found.rsplit(' ', 1)[0]!r}, and scores are needed.")
    if not found and read_bytes(path)[:1] == b"{":
        raise FileError(f"{path} is no file of scores but JSON: if it is one of MIB's, let its name end in .json.")
    return dfa.EdgeScores.load(path) if "edge" in found else dfa.NodeScores.load(path)


def _table(path: Path) -> Any:
    import io

    import pandas as pd

    import dfa_lens as dfa

    try:
        table = pd.read_csv(io.BytesIO(read_bytes(path)))
    except (ValueError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not a CSV table: {short(error)}.") from error
    try:
        return dfa.NodeScores.from_frame(table, meta={"file": path.name})
    except DfaError as error:
        raise FileError(f"{path} is not a table of scores of nodes: {error}") from error


def run_configs(given: Sequence[Path], progress: bool = False) -> dict[str, Path]:
    """Attribution method → the folder of the study that a config describes, run or gone on with; of folders, of all."""
    from dfa_lens.data.files import write_atomically
    from dfa_lens.experiments import study
    from dfa_lens.experiments.config import Config

    paths = [path for each in given for path in (sorted(each.glob("*.toml")) if each.is_dir() else [each])]
    if given and not paths:
        raise FileError(f"There is no config in {given[0]}: dfa-lens paper --write-configs FOLDER writes them.")
    read = [dict(Config.read(path).run) for path in paths]  # all of them before the work
    methods = [run["attribution"].method for run in read]
    double = next((method for i, method in enumerate(methods) if method in methods[:i]), None)
    if double is not None:
        raise DfaError(f"Two of the configs score by {double!r}: make tables of one of them at a time.")
    found = {}
    for method, run in zip(methods, read, strict=True):
        table = study.run(**run, progress=progress)
        found[method] = run["out"]
        write_atomically(found[method] / "table.csv", table.to_csv(index=False).encode())
    return found


def studies(given: Sequence[str], known: Mapping[str, Path]) -> tuple[Any, Any]:
    """One table of all studies, each a folder with its ``table.csv`` or such a file; METHOD=PATH names its attribution.

    And one of their curves, which only folders have; None without any. ``known``: folders by attribution method.

    Raises
    ------
    DfaError
        If there are none, a method is unknown, or two of the studies are of the same one.
    """
    import pandas as pd

    from dfa_lens.experiments import progress, table
    from dfa_lens.experiments.paper import METHODS

    places = dict(known)
    if not given and not places:
        raise DfaError("Give a study that was run, --study, or one to run, --config.")
    for value in given:
        name, separator, path = value.partition("=")
        method, place = (name, Path(path)) if separator else ("nap-ig-inputs", Path(value))
        if method not in METHODS:
            raise unknown("attribution method", method, METHODS)
        if method in places:
            raise DfaError(f"Two studies are given for {method!r}: name the attribution of each, METHOD=PATH.")
        places[method] = place
    rows, curves = [], []
    for method, place in places.items():
        rows.append(table.read(place / "table.csv" if place.is_dir() else place).assign(attribution=method))
        if (place / "plan.json").is_file():
            curves.append(progress.curves(place).assign(attribution=method))
    return pd.concat(rows, ignore_index=True), pd.concat(curves, ignore_index=True) if curves else None
