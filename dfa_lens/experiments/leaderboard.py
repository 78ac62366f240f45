"""The leaderboard: every way to score nodes, on every shipped model and task, by quality and by cost.

Beside the models that were trained there are those of :mod:`dfa_lens.zoo.planted`, whose circuits are known:
``planted-lookup-source``, ``planted-lookup-target`` and so on. They are made with the seed of the run.

One unit of work is a model and a task; its rows are written as they are made, one file each, and what is there is not
run again. Circuits are judged on prompts that no method has seen.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from dfa_lens import tasks, zoo
from dfa_lens.attribution.attribute import METHODS, IntegrationWarning, attribute
from dfa_lens.attribution.learned import Matryoshka
from dfa_lens.attribution.method import Method
from dfa_lens.data import statistics
from dfa_lens.data.files import write_atomically
from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.scores import NodeScores, Ranking
from dfa_lens.errors import DfaError, unknown
from dfa_lens.evaluation.faithfulness import faithfulness_curve
from dfa_lens.experiments.executors import each
from dfa_lens.models.memory import Footprint
from dfa_lens.models.runner import Runner
from dfa_lens.transfer.controls import random_scores
from dfa_lens.zoo import planted

Truth = Callable[[str, str], Mapping[str, bool] | None]
"""(model, task) → node → whether it is in the circuit that is known to be there; None where none is. At module level,
so that other processes find it."""


@dataclass(frozen=True)
class Contender:
    """What takes part: a method and its options.

    Attributes
    ----------
    method:
        As for :func:`~dfa_lens.attribution.attribute.attribute`; None for random scores.
    options:
        Its other options.
    """

    method: str | Method | None
    options: Mapping[str, Any] = field(default_factory=dict)


CONTENDERS: Mapping[str, Contender] = {
    "exact": Contender("exact"),
    "nap": Contender("nap"),
    "nap-ig-inputs, 5 steps": Contender("nap-ig-inputs", {"steps": 5}),
    "nap-ig-inputs, 10 steps": Contender("nap-ig-inputs", {"steps": 10}),
    "nap-ig-inputs, 20 steps": Contender("nap-ig-inputs", {"steps": 20}),
    "nap-ig-inputs, auto": Contender("nap-ig-inputs", {"steps": "auto"}),
    "nap-ig-activations, 5 steps": Contender("nap-ig-activations", {"steps": 5}),
    "expected-gradients, 5 draws": Contender("expected-gradients", {"steps": 5}),
    "expected-gradients, 20 draws": Contender("expected-gradients", {"steps": 20}),
    "relp": Contender("relp"),
    "attnlrp": Contender("attnlrp"),
    "gim": Contender("gim"),
    "atp-star": Contender("atp-star"),
    "matryoshka": Contender("matryoshka"),
    "matryoshka, learning rate 0.1": Contender(Matryoshka(lr=0.1)),
    "matryoshka, closeness": Contender(Matryoshka(objective="closeness")),
    "node-pruning": Contender("node-pruning"),
    "ugs": Contender("ugs"),
    "random": Contender(None),
}
"""Who takes part, by name; ``exact`` first, which the others are compared with."""

Side = Literal["source", "target"]
PLANTED: Mapping[str, tuple[str, Side]] = {
    f"planted-{pair}-{side}": (pair, side) for pair in planted.names() for side in get_args(Side)
}
"""Models with a planted circuit: name → (pair, side) of :mod:`dfa_lens.zoo.planted`."""


@dataclass(frozen=True)
class Cell:
    """One unit of work: a model and a task, and how they are run."""

    model: str
    task: str
    contenders: tuple[str, ...]
    examples: int
    test: int
    seed: int
    out: str
    device: str
    backend: str
    dtype: torch.dtype = torch.float32
    batch_size: int = 16
    truth: Truth | None = None


def run(
    models: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    contenders: Sequence[str] | None = None,
    *,
    out: str | Path,
    examples: int = 64,
    test: int = 32,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    truth: Truth | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Score, judge and time every contender on every model and task.

    Parameters
    ----------
    models, tasks:
        Shipped models and those of :data:`PLANTED`, and tasks that are run on those of them that solve them; default:
        all.
    contenders:
        Names of :data:`CONTENDERS`; default: all.
    out:
        A folder for the rows; what is there already is not run again.
    examples, test:
        Pairs that the methods see, and other pairs that the curves are made on.
    seed:
        Of the prompts, and of methods that draw random numbers.
    workers:
        Processes, each of which has one model and task at a time.
    device, backend, dtype:
        As in :func:`dfa_lens.load_model`. Rows of another dtype than float32 are kept beside those of float32.
    batch_size:
        Examples a pass, of attribution and curves. Of the results it changes ``seconds`` and ``megabytes``, others by
        rounding only.
    truth:
        The circuits that are known to be in other models, for the AUROC; of :data:`PLANTED`, those that were planted.

    Returns
    -------
    pandas.DataFrame
        A row for each model, task and contender:

        - ``cpr``, ``cmd``: areas of the curve ranked by sign, as is ``kl``; ``cpr_absolute``,
          ``cmd_absolute``: ranked by size.
        - ``pearson``, ``spearman``, ``sign``: agreement with ``exact`` over all nodes; ``pearson_mlp``: over MLPs.
        - ``auroc``: of the scores for membership in the known circuit, where there is one.
        - ``forward``, ``backward``: passes for each example, whole ones, an upper limit; ``seconds``; ``megabytes``:
          the estimated peak beyond the weights.
        - ``steps``: integration steps that were taken. ``refused``: why a method can't be had on this model.

    Raises
    ------
    DfaError
        If a name is unknown.

    Examples
    --------
    >>> import tempfile
    >>> from dfa_lens.experiments import leaderboard
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = leaderboard.run(["llama3-tiny-source"], ["ioi"], ["exact", "nap"], out=folder, examples=4, test=4)
    >>> table[["contender", "backward"]].values.tolist()
    [['exact', 0.0], ['nap', 1.0]]
    """
    chosen = tuple(CONTENDERS if contenders is None else contenders)
    for name in chosen:
        if name not in CONTENDERS:
            raise unknown("contender", name, CONTENDERS)
    if tasks is not None:
        known = dict.fromkeys(task for _, task in _pairs_of(models, None))
        for name in tasks:
            if name not in known:
                raise unknown("task of these models", name, known)
    own = Cell("", "", chosen, examples, test, seed, str(out), device, backend, dtype, batch_size, truth)
    cells = [replace(own, model=model, task=task) for model, task in _pairs_of(models, tasks)]
    for cell in tqdm(each(_run_cell, cells, workers), total=len(cells), unit="task", disable=not progress):
        del cell
    found = [_row_file(cell, name) for cell in cells for name in chosen]
    return pd.DataFrame([json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()])


def _pairs_of(models: Sequence[str] | None, wanted: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    for model in (*zoo.names("all"), *PLANTED) if models is None else models:
        solved = planted.tasks(PLANTED[model][0]) if model in PLANTED else zoo.solves(model)
        for task in solved if wanted is None else wanted:
            if task in solved:
                yield model, task


def _row_file(cell: Cell, contender: str) -> Path:
    name = contender.replace(", ", "-").replace(" ", "-")
    return Path(cell.out) / "rows" / f"{_called(cell)}--{name}.json"


def _called(cell: Cell) -> str:
    """A cell as files are called by it."""
    dtype = "" if cell.dtype == torch.float32 else f"--{str(cell.dtype).removeprefix('torch.')}"
    return f"{cell.model}--{cell.task.replace('/', '-')}--seed-{cell.seed}{dtype}"


@dataclass(frozen=True)
class Setting:
    """What a cell is run on: a model, what the methods see, what circuits are judged on, and the known circuit."""

    model: Any
    train: PromptPairs
    test: PromptPairs
    circuit: Mapping[str, bool] | None


def _setting(cell: Cell) -> Setting:
    given: dict[str, Any] = {"device": cell.device, "backend": cell.backend, "dtype": cell.dtype}
    if cell.model in PLANTED:
        name, side = PLANTED[cell.model]
        pair = planted.load(name, seed=cell.seed, **given)
        own = pair.source if side == "source" else pair.target
        train = pair.pairs(cell.task, split="train", n=cell.examples, seed=cell.seed)
        test = pair.pairs(cell.task, split="test", n=cell.test, seed=cell.seed)
        return Setting(own.model, train, test, dict.fromkeys(own.circuit(cell.task), True))
    model = zoo.load(cell.model, **given)
    train = tasks.load(cell.task, model.tokenizer, split="train", n=cell.examples, seed=cell.seed)
    test = tasks.load(cell.task, model.tokenizer, split="test", n=cell.test, seed=cell.seed)
    return Setting(model, train, test, None if cell.truth is None else cell.truth(cell.model, cell.task))


def _run_cell(cell: Cell) -> str:
    """Everything on one model and task, and a file for each row."""
    missing = [name for name in cell.contenders if not _row_file(cell, name).exists()]
    if not missing:
        return cell.task
    on = _setting(cell)
    exact = _exact(cell, on)
    for name in missing:
        row = {"model": cell.model, "task": cell.task, "seed": cell.seed, "contender": name}
        row |= _measured(cell, CONTENDERS[name], on, exact)
        _row_file(cell, name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_row_file(cell, name), json.dumps(row).encode())
    return cell.task


def _exact(cell: Cell, on: Setting) -> NodeScores:
    path = Path(cell.out) / "exact" / f"{_called(cell)}.safetensors"
    if path.exists():
        return NodeScores.load(path)
    scores = attribute(on.model, on.train, method="exact", batch_size=cell.batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    scores.save(path)
    return scores


def _measured(cell: Cell, contender: Contender, on: Setting, exact: NodeScores) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IntegrationWarning)
            scores = _scores(cell, contender, on)
    except DfaError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - started
    rankings: tuple[Ranking, ...] = ("signed", "absolute")
    curves = {
        ranking: faithfulness_curve(on.model, on.test, scores, ranking=ranking, batch_size=cell.batch_size)
        for ranking in rankings
    }
    agreement = statistics.correlation(scores, exact)
    mlps = [i for i, node in enumerate(scores.nodes) if node.kind == "mlp"]
    return {
        "cpr": curves["signed"].cpr,
        "cmd": curves["signed"].cmd,
        "kl": curves["signed"].mean_kl,
        "cpr_absolute": curves["absolute"].cpr,
        "cmd_absolute": curves["absolute"].cmd,
        "pearson": agreement.pearson,
        "spearman": agreement.spearman,
        "sign": agreement.sign_agreement,
        "pearson_mlp": float(np.corrcoef(scores.values[mlps].numpy(), exact.values[mlps].numpy())[0, 1]),
        "auroc": _auroc(on.circuit, scores),
        "seconds": seconds,
        "steps": scores.meta.get("steps"),
        **_cost(contender, on, scores, cell.batch_size),
    }


def _scores(cell: Cell, contender: Contender, on: Setting) -> NodeScores:
    if contender.method is None:
        return random_scores(NodeSet.heads_and_mlps(on.model), seed=cell.seed)
    how = {"seed": cell.seed, "batch_size": cell.batch_size, **contender.options}
    return attribute(on.model, on.train, method=contender.method, **how)


def _auroc(known: Mapping[str, bool] | None, scores: NodeScores) -> float | None:
    if known is None:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([known.get(name, False) for name in scores.nodes.names], scores.values.numpy()))


def _cost(contender: Contender, on: Setting, scores: NodeScores, batch_size: int) -> dict[str, float]:
    if contender.method is None:
        return {"forward": 0.0, "backward": 0.0, "megabytes": 0.0}
    method = contender.method if isinstance(contender.method, Method) else METHODS[contender.method]
    train = on.train
    footprint = Footprint(Runner(on.model), scores.nodes, int(train.longest.max()))
    batch = min(batch_size, len(train))
    steps = int(scores.meta.get("steps", 1))
    need = method.need(footprint, scores.nodes, steps=steps, examples=len(train), batch=batch)
    n = len(train)
    return {"forward": need.forward / n, "backward": need.backward / n, "megabytes": need.peak_bytes / 2**20}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over models and tasks, the best CPR first; contenders that were refused somewhere are marked by ``n``.

    Examples
    --------
    >>> import pandas as pd
    >>> from dfa_lens.experiments import leaderboard
    >>> rows = [{"contender": "a", "task": "x", "cpr": 0.5}, {"contender": "b", "task": "x", "cpr": 0.7}]
    >>> leaderboard.summary(pd.DataFrame(rows)).index.tolist()
    ['b', 'a']
    """
    run_ones = table[table["cpr"].notna()]
    numbers = run_ones.drop(columns=["seed"], errors="ignore").select_dtypes("number").columns
    grouped = run_ones.groupby("contender", sort=False)
    found = grouped[list(numbers)].mean()
    found["n"] = grouped.size()
    return found.sort_values("cpr", ascending=False)
