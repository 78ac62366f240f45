"""Submissions to MIB's circuit track: a folder with a folder for every task and model, ``ioi_qwen2.5`` say.

In each lies one file of scores (``importances.pt`` or ``.json``), or a file for each of nine circuits, of at most .1,
.2, .5, 1, 2, 5, 10, 20 and 50 % of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfa_lens.data import mib_graphs
from dfa_lens.data.files import writable
from dfa_lens.errors import DfaError, FileError, unknown

#: What MIB calls the tasks → what they are called here.
TASKS = {
    "ioi": "ioi",
    "mcqa": "mcqa",
    "arithmetic-addition": "addition",
    "arithmetic-subtraction": "subtraction",
    "arc-easy": "arc-easy",
    "arc-challenge": "arc-challenge",
}
#: What MIB calls the models → layers, heads, and the tasks that it judges them on.
MODELS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "gpt2": (12, 12, ("ioi",)),
    "qwen2.5": (24, 14, ("ioi", "mcqa")),
    "gemma2": (26, 8, ("ioi", "mcqa", "arc-easy")),
    "llama3": (32, 32, tuple(TASKS.values())),
}
#: Circuits of a folder without scores, beside the whole model.
N_CIRCUITS = 9
SUFFIXES = (".pt", ".json")


@dataclass(frozen=True)
class Entry:
    """What a submission has for one task and model.

    Attributes
    ----------
    task:
        As it is called here.
    model:
        As MIB calls it, or another name.
    files:
        One file of scores, or several circuits, in the order of their names.
    """

    task: str
    model: str
    files: tuple[Path, ...]

    @property
    def level(self) -> mib_graphs.Level:
        """What the files score: nodes, edges or neurons.

        Raises
        ------
        FileError
            If they are not of one kind, or can't be read.
        """
        levels = {mib_graphs.level(path): path for path in self.files}
        if len(levels) > 1:
            raise FileError(f"{self.files[0].parent} has graphs of {' and of '.join(sorted(levels))}.")
        return next(iter(levels))


def entries(folder: str | Path) -> list[Entry]:
    """What a submission has, in the order of its folders' names; other folders and files are passed over.

    Raises
    ------
    FileError
        If there is no such folder, or nothing in it.

    Examples
    --------
    >>> import tempfile, dfa_lens as dfa
    >>> scores = dfa.controls.random_scores(dfa.NodeSet.for_sizes(24, 14, with_input=True))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = dfa.mib.export(folder, {("ioi", "qwen2.5"): scores})
    ...     [(entry.task, entry.model, entry.level) for entry in dfa.mib.entries(folder)]
    [('ioi', 'qwen2.5', 'nodes')]
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileError(f"There is no folder {root}.")
    found = []
    for inner in sorted(each for each in root.iterdir() if each.is_dir()):
        called = inner.name.replace("arithmetic_", "arithmetic-").replace("arc_", "arc-")
        task, _, model = called.partition("_")
        files = tuple(sorted(each for each in inner.iterdir() if each.suffix in SUFFIXES))
        if task in TASKS and model and files:
            found.append(Entry(TASKS[task], model, files))
    if not found:
        raise FileError(
            f"{root} has no folder of circuits: they are called like ioi_qwen2.5 and hold files that end in "
            f"{' or '.join(SUFFIXES)}."
        )
    return found


def export(folder: str | Path, scores: Mapping[tuple[str, str], Any], *, suffix: str = ".pt") -> list[Path]:
    """Write a submission: ``folder``/task_model/importances.pt for every task and model.

    Parameters
    ----------
    folder:
        Where; it may have other tasks and models already.
    scores:
        (task, model) → scores or circuit of its nodes, or scores of its edges (with per-head readers). Tasks are
        called as here, models as MIB does: "gpt2", "qwen2.5", "gemma2", "llama3".
    suffix:
        ".pt" or ".json". Large graphs of edges are many times smaller as ``.pt``.

    Returns
    -------
    list of Path
        The files. :func:`check` says what MIB would say to them.

    Raises
    ------
    FileError
        If a task is unknown, or a file can't be written.
    ScoreError
        If the scores are not of all heads and MLP blocks of a model, or of all its edges.

    Examples
    --------
    >>> import tempfile, dfa_lens as dfa
    >>> scores = dfa.controls.random_scores(dfa.NodeSet.for_sizes(24, 14, with_input=True))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.relative_to(folder).as_posix() for path in dfa.mib.export(folder, {("addition", "llama3"): scores})]
    ['arithmetic-addition_llama3/importances.pt']
    """
    called = {ours: theirs for theirs, ours in TASKS.items()}
    if suffix not in SUFFIXES:
        raise unknown("suffix", suffix, SUFFIXES, FileError)
    for task, _ in scores:
        if task not in called:
            raise unknown("task of MIB", task, called, FileError)
    written = []
    for (task, model), given in scores.items():
        path = writable(Path(folder) / f"{called[task]}_{model}" / f"importances{suffix}")
        given.to_mib(path)
        for other in SUFFIXES:  # an older export's, which would make two circuits of one
            if other != suffix:
                path.with_suffix(other).unlink(missing_ok=True)
        written.append(path)
    return written


def check(folder: str | Path) -> list[str]:
    """What MIB's circuit track would not take, or would pass over, in a submission; nothing if all is well.

    Raises
    ------
    FileError
        If there is no such folder, or nothing in it.

    Examples
    --------
    >>> import tempfile, dfa_lens as dfa
    >>> scores = dfa.controls.random_scores(dfa.NodeSet.for_sizes(24, 14, with_input=True))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = dfa.mib.export(folder, {("ioi", "qwen2.5"): scores, ("mcqa", "qwen2.5"): scores})
    ...     dfa.mib.check(folder)
    ['It has circuits of one model, qwen2.5: MIB asks for two.']
    """
    found = entries(folder)
    problems = []
    for what, names in (("task", {each.task for each in found}), ("model", {each.model for each in found})):
        if len(names) < 2:
            problems.append(f"It has circuits of one {what}, {min(names)}: MIB asks for two.")
    for entry in found:
        where = entry.files[0].parent.name
        if len(entry.files) not in (1, N_CIRCUITS):
            problems.append(f"{where} has {len(entry.files)} files: one of scores or {N_CIRCUITS} circuits are needed.")
        if entry.model not in MODELS:
            problems.append(f"{where}: MIB has no model {entry.model!r}, but {', '.join(MODELS)}.")
        elif entry.task not in MODELS[entry.model][2]:
            problems.append(f"{where}: MIB does not judge {entry.model} on {entry.task}.")
        try:
            sizes = {sizes_of(path) for path in entry.files}
            levels = entry.level
        except DfaError as error:
            problems.append(f"{where}: {error}")
            continue
        if levels == "neurons":
            problems.append(f"{where}: it has scores of neurons, which are not looked at here.")
        if entry.model in MODELS and sizes != {MODELS[entry.model][:2]}:
            layers, heads = MODELS[entry.model][:2]
            given = ", ".join(f"{a} layers × {b} heads" for a, b in sorted(sizes))
            problems.append(f"{where}: {entry.model} has {layers} layers × {heads} heads, the files {given}.")
    return problems


def sizes_of(path: Path) -> tuple[int, int]:
    """Layers and heads of one of MIB's files, all of which is read.

    Raises
    ------
    FileError
        If something is wrong with it.
    """
    from dfa_lens.data import mib_nodes

    if mib_graphs.level(path) == "edges":
        graph = mib_graphs.read(path, mib_graphs.per_head)
        return graph.n_layers, graph.n_heads
    nodes = mib_nodes.read(path)
    return nodes.n_layers, nodes.n_heads
