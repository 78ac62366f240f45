"""The tables of the DFA paper (arXiv 2604.24302) from the table of a study, the published numbers beside ours.

The paper has 22 tables of three forms:

- ``leaderboard`` (tables 1 and 4 to 10): a pair of models; random W, gold and the three regimes of each attribution
  method, by task and on average.
- ``controls`` (tables 2 and 11 to 16): a pair; four controls, zero-shot, and the best of the three regimes, by task.
- ``scaling`` (tables 3 and 17 to 22): a task; baseline, best, gold and recovery of all pairs.

Pairs and methods that the paper has no table for, the other directions above all, get one of the first two forms.

A study has a row per setting and seed, and this is where they become the paper's: seeds are averaged, "best" is the
best regime of a task after that, an average is over the tasks that a row has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, Literal

from dfa_lens.errors import DfaError, unknown
from dfa_lens.experiments import published as sources
from dfa_lens.experiments.table import GOLD

#: The paper's models: its name for each → its name on the Hugging Face hub.
MODELS = {
    "llama3-1b": "meta-llama/Llama-3.2-1B",
    "llama3-3b": "meta-llama/Llama-3.2-3B",
    "llama3-8b": "meta-llama/Llama-3.1-8B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
}
_FAMILIES = {"llama3": "Llama-3", "qwen2.5": "Qwen-2.5"}

#: Every ordered pair within a family, both directions: name → the paper's names of source and target.
PAIRS: dict[str, tuple[str, str]] = {
    sources.pair_of(source, target): (source, target)
    for family in _FAMILIES
    for source, target in permutations([name for name in MODELS if name.startswith(family)], 2)
}
#: The six that the paper's tables of controls and scaling have, in their order.
SMALL_TO_LARGE = (
    "llama3-1b-to-3b",
    "llama3-1b-to-8b",
    "llama3-3b-to-8b",
    "qwen2.5-0.5b-to-1.5b",
    "qwen2.5-0.5b-to-3b",
    "qwen2.5-1.5b-to-3b",
)
#: Attribution methods as the paper writes them.
METHODS = {"nap-ig-inputs": "NAP-IG-Inputs", "nap": "NAP", "nap-ig-activations": "NAP-IG-Activations"}
#: Tasks as the paper writes them.
TASKS = {task: label for label, task in sources.TASK_OF.items()}
REGIMES = ("in-distribution", "near-distribution", "zero-shot")
BEST = "best"
AVERAGE = "average"

_LABELS = {
    GOLD: "Gold",
    "in-distribution": "DFA (In-Distribution)",
    "near-distribution": "DFA (Near-Distribution)",
    "zero-shot": "DFA (Zero-Shot)",
    BEST: "DFA (Best)",
    "random-w": "Random W",
    "scrambled-s": "Scrambled s",
    "permuted-w": "Permuted W",
    "depth-mean": "Depth mean",
}
_CONTROLS = ("random-w", "scrambled-s", "permuted-w", "depth-mean", "zero-shot", BEST)

Form = Literal["leaderboard", "controls", "scaling"]


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper, or one of its form.

    Attributes
    ----------
    number:
        In the paper; None where the paper has no such table.
    form:
        See the module.
    of:
        The pair of models, or of a scaling table the task.
    methods:
        Attribution methods, in the order of the paper.
    """

    number: int | None
    form: Form
    of: str
    methods: tuple[str, ...] = tuple(METHODS)

    @property
    def name(self) -> str:
        """What its files are called: its number, or form and pair."""
        return f"{self.form}-{self.of}" if self.number is None else str(self.number)

    @property
    def caption(self) -> str:
        """What it shows, in a sentence."""
        what = {
            "leaderboard": f"Circuit recovery (CPR), {pair_label(self.of)}",
            "controls": f"Controls (CPR), {pair_label(self.of)}",
            "scaling": f"Recovery by model size (CPR), {TASKS.get(self.of, self.of)}",
        }[self.form]
        where = "Not in the paper" if self.number is None else f"Paper's table {self.number}"
        return f"{what}. {where}."


def _numbered() -> dict[int, PaperTable]:
    first, *others = SMALL_TO_LARGE
    inputs, rest = ("nap-ig-inputs",), ("nap", "nap-ig-activations")
    scaling = ("ioi", "arc-challenge", "arc-easy", "addition", "subtraction")
    found = [
        PaperTable(1, "leaderboard", first, inputs),
        PaperTable(2, "controls", first, inputs),
        PaperTable(3, "scaling", "mcqa", inputs),
        PaperTable(4, "leaderboard", first, rest),
        *(PaperTable(5 + i, "leaderboard", pair) for i, pair in enumerate(others)),
        PaperTable(10, "leaderboard", "llama3-3b-to-1b", inputs),
        PaperTable(11, "controls", first, rest),
        *(PaperTable(12 + i, "controls", pair) for i, pair in enumerate(others)),
        PaperTable(17, "scaling", "mcqa", rest[::-1]),
        *(PaperTable(18 + i, "scaling", task, (*inputs, *rest[::-1])) for i, task in enumerate(scaling)),
    ]
    return {number: table for table in found if (number := table.number) is not None}


TABLES: dict[int, PaperTable] = _numbered()
"""The paper's tables by number."""


def pair_label(pair: str) -> str:
    """A pair as the paper writes it; one of your own by its name.

    Examples
    --------
    >>> from dfa_lens.experiments.paper import pair_label
    >>> pair_label("llama3-1b-to-8b"), pair_label("mine")
    ('Llama-3 (1B → 8B)', 'mine')
    """
    if pair not in PAIRS:
        return pair
    sizes = [name.rpartition("-")[2].upper() for name in PAIRS[pair]]
    return f"{_FAMILIES[PAIRS[pair][0].rpartition('-')[0]]} ({sizes[0]} → {sizes[1]})"


@dataclass(frozen=True)
class Numbers:
    """CPR by attribution method, pair, setting and task: ours, or the published ones.

    Attributes
    ----------
    cpr:
        (method, pair, setting, task) → CPR. The setting "best" and the task "average" are among the keys where they
        were published; of ours they are made here.
    one_task:
        (method, pair, training task, test task) → CPR, of the matrices in figure 4.
    derived:
        Whether averages and the best regime are worked out where they are not given. Of published numbers they are
        not: an average of rounded numbers is not the one that was printed.
    """

    cpr: Mapping[tuple[str, str, str, str], float] = field(default_factory=dict)
    one_task: Mapping[tuple[str, str, str, str], float] = field(default_factory=dict)
    derived: bool = True

    def of(self, method: str, pair: str, setting: str, task: str) -> float:
        """One number; NaN where it is not known."""
        known = self.cpr.get((method, pair, setting, task))
        if known is not None or not self.derived:
            return float("nan") if known is None else known
        if task == AVERAGE:
            values = [self.of(method, pair, setting, each) for each in TASKS]
            values = [value for value in values if not math.isnan(value)]
            return sum(values) / len(values) if values else float("nan")
        if setting == BEST:
            regimes = [(method, pair, regime, task) for regime in REGIMES]
            return max((self.cpr[each] for each in regimes if each in self.cpr), default=float("nan"))
        return float("nan")

    @property
    def pairs(self) -> list[str]:
        """The pairs that occur, the paper's first and in its order."""
        found = {pair for _, pair, _, _ in [*self.cpr, *self.one_task]}
        return [pair for pair in PAIRS if pair in found] + sorted(found - set(PAIRS))


def chosen(study: Any, *, recipe: str | None = None, attribution: str = "nap-ig-inputs") -> Any:
    """The rows of a study that the paper shows, with a column ``key``: gold, the regime or the control (see ``ours``).

    ``study`` is the table of rows, or one of curves (:func:`dfa_lens.experiments.progress.curves`).

    Raises
    ------
    DfaError
        As :func:`ours` does.

    Examples
    --------
    >>> from dfa_lens.experiments import paper
    >>> from dfa_lens.experiments.table import frame, row
    >>> common = {"family": "llama3-1b-to-3b", "seed": 0, "task": "ioi", "regime": "zero-shot"}
    >>> study = frame([row(**common, setting="mine", cpr=0.4, method="default")])
    >>> paper.chosen(study)["key"].tolist()
    ['zero-shot']
    """
    needed = ("family", "seed", "task", "setting", "regime", "method", "control", "trained_on")
    missing = [name for name in needed if name not in getattr(study, "columns", ())]
    if missing:
        raise DfaError(f"This is no table of a study: it has no column {missing[0]!r}.")
    study = study if "attribution" in study else study.assign(attribution=attribution)
    gold = study[study["setting"] == GOLD]
    rest = study[study["setting"] != GOLD]
    trained = rest[~rest["control"].isin(["random-w", "depth-mean", "regression"])]
    ways = list(dict.fromkeys(trained["method"]))
    if recipe is None and len(ways) > 1:
        raise DfaError(f"W was trained in several ways, {', '.join(map(repr, ways))}: say which with recipe=.")
    if recipe is not None and recipe not in ways:
        raise unknown("recipe", recipe, ways, DfaError)
    own = rest[(rest["method"] == recipe) | rest["control"].isin(["random-w", "depth-mean"])] if recipe else rest
    regimes = own[(own["control"] == "") & own["regime"].isin([*REGIMES, "one-task"])]
    controls = own[(own["control"] != "") & (own["regime"] == "zero-shot")]
    import pandas as pd

    parts = gold.assign(key=GOLD), regimes.assign(key=regimes["regime"]), controls.assign(key=controls["control"])
    return pd.concat(parts, ignore_index=True)


def ours(study: Any, *, recipe: str | None = None, attribution: str = "nap-ig-inputs") -> Numbers:
    """The numbers of a study: means over its seeds.

    Parameters
    ----------
    study:
        The table of :func:`dfa_lens.study.run`, its pairs named as in :data:`PAIRS` where they are the paper's. With a
        column ``attribution`` it may be of several attribution methods; pandas' ``concat`` makes one table of several
        studies: ``pd.concat([a.assign(attribution="nap"), b.assign(attribution="nap-ig-inputs")])``.
    recipe:
        Which rows, by the column ``method``, where W was trained in several ways; default: the only one.
    attribution:
        The method of all rows where there is no such column.

    Raises
    ------
    DfaError
        If it is no table of a study, or W was trained in several ways and ``recipe`` does not say which.

    Examples
    --------
    >>> from dfa_lens.experiments import paper
    >>> from dfa_lens.experiments.table import frame, row
    >>> common = {"family": "llama3-1b-to-3b", "task": "ioi", "setting": "zero-shot", "regime": "zero-shot"}
    >>> study = frame([row(**common, seed=seed, cpr=cpr, method="default") for seed, cpr in ((0, 0.4), (1, 0.5))])
    >>> round(paper.ours(study).of("nap-ig-inputs", "llama3-1b-to-3b", "best", "ioi"), 2)
    0.45
    """
    own = chosen(study, recipe=recipe, attribution=attribution)
    if "cpr" not in own:
        raise DfaError("This is no table of a study: it has no column 'cpr'.")
    keys = ["attribution", "family"]
    shown = own[own["key"] != "one-task"].groupby([*keys, "key", "task"])["cpr"].mean()
    cpr = {tuple(at): float(value) for at, value in shown.items()}
    single = own[own["key"].isin(["one-task", "in-distribution"])]
    one_task = single.groupby([*keys, "trained_on", "task"])["cpr"].mean()
    return Numbers(cpr, {tuple(at): float(value) for at, value in one_task.items()})


def published(numbers: Any = None) -> Numbers:
    """The published numbers.

    Parameters
    ----------
    numbers:
        As :func:`dfa_lens.experiments.published.read` and :func:`~dfa_lens.experiments.published.from_release` give
        them; default: those of the package.

    Examples
    --------
    >>> from dfa_lens.experiments import paper
    >>> paper.published().of("nap", "llama3-1b-to-3b", "best", "mcqa")
    0.49
    """
    known = sources.read() if numbers is None else numbers
    cpr: dict[tuple[str, str, str, str], float] = {}
    one_task: dict[tuple[str, str, str, str], float] = {}
    for row in known[known["metric"] == "cpr"].itertuples():
        if row.trained_on:
            one_task[row.method, row.pair, row.trained_on, row.task] = row.value
        else:
            cpr[row.method, row.pair, row.setting, row.task] = row.value
    return Numbers(cpr, one_task, derived=False)


def table(number: int | PaperTable, own: Numbers, theirs: Numbers | None = None) -> Any:
    """One of the paper's tables.

    Parameters
    ----------
    number:
        Of :data:`TABLES`; or a table of its form.
    own, theirs:
        Ours, and those that stand beside them; default: the published ones that ship with the package.

    Returns
    -------
    pandas.DataFrame
        Rows are indexed by method and setting (a scaling table's by method and pair); columns by what is shown and
        whose number it is, "ours" or "published". What is not known is NaN.

    Examples
    --------
    >>> from dfa_lens.experiments import paper
    >>> eleven = paper.table(11, paper.Numbers())
    >>> float(eleven.loc[("NAP", "DFA (Zero-Shot)"), ("MCQA", "published")])
    0.46
    """
    known = number if isinstance(number, PaperTable) else TABLES.get(number)
    if known is None:
        raise unknown("table of the paper", str(number), map(str, TABLES), DfaError)
    theirs = published() if theirs is None else theirs
    made = _scaling if known.form == "scaling" else _by_task
    return made(known, {"ours": own, "published": theirs})


def tables(own: Numbers, theirs: Numbers | None = None) -> list[tuple[PaperTable, Any]]:
    """The paper's tables of which there is at least one number of ours; then those of its form for what it left out.

    Examples
    --------
    >>> from dfa_lens.experiments import paper
    >>> keys = [("nap", pair, "gold", "ioi") for pair in ("llama3-1b-to-3b", "llama3-8b-to-1b")]
    >>> [known.name for known, _ in paper.tables(paper.Numbers(dict.fromkeys(keys, 0.25)))]
    ['4', '18', 'leaderboard-llama3-8b-to-1b']
    """
    theirs = published() if theirs is None else theirs
    made = [(known, table(known, own, theirs)) for known in [*TABLES.values(), *_further(own)]]
    return [(known, each) for known, each in made if each.xs("ours", axis=1, level=1).notna().any(axis=None)]


def _further(own: Numbers) -> list[PaperTable]:
    """Tables of pairs and methods that the paper has none of; the baseline alone makes no table."""
    found = []
    for pair in PAIRS:
        for form in ("leaderboard", "controls"):
            same = [each for each in TABLES.values() if (each.form, each.of) == (form, pair)]
            there = {method for each in same for method in each.methods}
            shown = {GOLD, *REGIMES} if form == "leaderboard" else {*_CONTROLS, *REGIMES} - {"near-distribution"}
            known = {method for method, other, setting, _ in own.cpr if other == pair and setting in shown}
            methods = tuple(method for method in METHODS if method in known - there)
            if methods:
                found.append(PaperTable(None, form, pair, methods))
    return found


def _by_task(known: PaperTable, whose: Mapping[str, Numbers]) -> Any:
    columns = [*TASKS, *([AVERAGE] if known.form == "leaderboard" else [])]
    rows: list[tuple[tuple[str, str], str, str]] = []
    if known.form == "leaderboard":
        # the paper's one baseline is that of nap-ig-inputs; a table without this method takes it all the same
        rows.append((("Baseline", _LABELS["random-w"]), "nap-ig-inputs", "random-w"))
    for method in known.methods:
        settings = (GOLD, *REGIMES) if known.form == "leaderboard" else _CONTROLS
        rows += [((METHODS[method], _LABELS[setting]), method, setting) for setting in settings]
    values = [
        [whose[side].of(method, known.of, setting, task) for task in columns for side in whose]
        for _, method, setting in rows
    ]
    shown = [*TASKS.values(), "Avg."][: len(columns)]
    return _frame(values, [index for index, _, _ in rows], ("Method", "Setting"), shown, list(whose))


def _scaling(known: PaperTable, whose: Mapping[str, Numbers]) -> Any:
    shown = {"Baseline": "random-w", "DFA (Best)": BEST, "Gold": GOLD}
    index, values = [], []
    for method in known.methods:
        for pair in SMALL_TO_LARGE:
            found = {
                side: [numbers.of(method, pair, setting, known.of) for setting in shown.values()]
                for side, numbers in whose.items()
            }
            for row in found.values():
                row.append(row[1] / row[2] if row[2] else float("nan"))
            index.append((METHODS[method], pair_label(pair)))
            values.append([found[side][i] for i in range(len(shown) + 1) for side in whose])
    return _frame(values, index, ("Method", "Pair"), [*shown, "Recovery"], list(whose))


def _frame(
    values: list[list[float]],
    index: Sequence[tuple[str, str]],
    names: tuple[str, str],
    shown: Sequence[str],
    sides: Sequence[str],
) -> Any:
    import pandas as pd

    return pd.DataFrame(
        values,
        index=pd.MultiIndex.from_tuples(index, names=names),
        columns=pd.MultiIndex.from_product([shown, sides]),
    )


# --- as files ------------------------------------------------------------------------------------------------------


def to_csv(made: Any) -> str:
    """A table as CSV: a header of one line, the published numbers in columns of their own.

    Examples
    --------
    >>> from dfa_lens.experiments import paper
    >>> paper.to_csv(paper.table(2, paper.Numbers())).splitlines()[0][:48]
    'Method,Setting,IOI,"IOI, published",MCQA,"MCQA, '
    """
    flat = made.copy()
    flat.columns = [name if side == "ours" else f"{name}, {side}" for name, side in made.columns]
    return str(flat.reset_index().to_csv(index=False, float_format="%.4f", lineterminator="\n"))


def to_tex(made: Any, known: int | PaperTable) -> str:
    r"""A table as LaTeX (packages booktabs and multirow); ours in bold where best and underlined where second best.

    Examples
    --------
    >>> from dfa_lens.experiments import paper
    >>> tex = paper.to_tex(paper.table(2, paper.Numbers()), 2)
    >>> r"\label{tab:2}" in tex and r"\multicolumn{2}{c}{IOI}" in tex
    True
    """
    text = _texts(made, r"\textbf{%s}", r"\underline{%s}", "--", r"\%")
    known = known if isinstance(known, PaperTable) else TABLES[known]
    arrow = {"→": r"$\to$"}
    text = text.rename(index=lambda label: "".join(arrow.get(sign, sign) for sign in label))
    caption = "".join(arrow.get(sign, sign) for sign in known.caption)
    layout = "ll" + "cc" * (len(made.columns) // 2)
    return str(
        text.to_latex(
            escape=False, multicolumn_format="c", column_format=layout, caption=caption, label=f"tab:{known.name}"
        )
    )


def to_html(made: Any) -> str:
    """A table as HTML; ours in bold where best and underlined where second best.

    Examples
    --------
    >>> from dfa_lens.experiments import paper
    >>> paper.to_html(paper.table(2, paper.Numbers())).startswith("<table")
    True
    """
    return str(_texts(made, "<b>%s</b>", "<u>%s</u>", "–", "%").to_html(escape=False, border=0, classes="paper"))


def _texts(made: Any, best: str, second: str, none: str, percent: str) -> Any:
    """The cells as they are printed, with two digits; marked among the rows of a method, as the paper does."""
    texts = made.astype(object)
    for column in made.columns:
        name, side = column
        ratio = name == "Recovery"
        texts[column] = [
            none if math.isnan(value) else f"{100 * value:.1f}{percent}" if ratio else f"{value:.2f}"
            for value in made[column]
        ]
        if side == "ours" and "Setting" in made.index.names:  # pairs of models are not to be ranked
            for _, own in made[column].groupby(level="Method", sort=False):
                ranks = own.round(2).rank(method="dense", ascending=False)
                for mark, rank in ((best, 1), (second, 2)):
                    chosen = own.index[(ranks == rank) & (ranks.max() > 1)]
                    texts.loc[chosen, [column]] = texts.loc[chosen, [column]].map(lambda text, mark=mark: mark % text)
    return texts
