"""The published study as configs: one TOML file for each attribution method, in the released modes and in ours.

A file has what :class:`~dfa_lens.experiments.config.Config` reads: pairs of models by their hub names, MIB's tasks, the
paper's regimes and controls, the protocol ``mib``. The released files score and train as the authors' code does, faults
included; ours leave every option at its default and add the controls that show whether the source matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from dfa_lens.data.files import writable, write_atomically
from dfa_lens.errors import DfaError, unknown
from dfa_lens.experiments.paper import METHODS, MODELS, PAIRS
from dfa_lens.transfer.recipe import RELEASED

Mode = Literal["released", "ours"]
"""``released``: scores, training and evaluation as in the authors' code. ``ours``: as this library does by default."""

_TRAINED = ("in-distribution", "near-distribution", "zero-shot", "one-task", "scrambled-s", "permuted-w")
_UNTRAINED = ("random-w", "depth-mean")
_FURTHER = ("uniform-s", "random-s", "target-only")
#: The fields of the released recipe that are not the defaults; and its batches, of four.
_RECIPE = ("intervention", "positions", "scaling", "sparsity_weight", "gate_heads")


def configs(
    mode: Mode,
    *,
    pairs: Sequence[str] = tuple(PAIRS),
    models: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
    budget: Mapping[str, int] | None = None,
) -> dict[str, str]:
    """TOML texts by attribution method.

    Parameters
    ----------
    mode:
        See :data:`Mode`.
    pairs:
        Of :data:`~dfa_lens.experiments.paper.PAIRS`; default: all twelve, both directions.
    models:
        The paper's names of models → what to load; default: their names on the hub.
    more:
        Keys of the top level that replace those here: ``device``, ``dtype``, ``collection``, ``seeds``, ….
    budget:
        Fields of :class:`~dfa_lens.experiments.experiment.Budget`. How many prompts the paper took is not in its
        sources; the default is 100 a task, to train on and to test on.

    Raises
    ------
    DfaError
        If the mode or a pair is unknown, or a model has no name here.

    Examples
    --------
    >>> from dfa_lens.experiments.paper_configs import configs
    >>> text = configs("released", pairs=["llama3-1b-to-3b"])["nap"]
    >>> print("\\n".join(line for line in text.splitlines() if "meta-llama" in line or "mlp_gradient" in line))
    mlp_gradient = "input"
    source = "meta-llama/Llama-3.2-1B"
    target = "meta-llama/Llama-3.2-3B"
    """
    if mode not in get_args(Mode):
        raise unknown("mode", mode, get_args(Mode), DfaError)
    for pair in pairs:
        if pair not in PAIRS:
            raise unknown("pair of the paper", pair, PAIRS, DfaError)
    hub = MODELS if models is None else models
    for name in dict.fromkeys(name for pair in pairs for name in PAIRS[pair]):
        if name not in hub:
            raise DfaError(f"models says nothing of {name!r}.")
    return {method: _text(mode, method, pairs, hub, more or {}, budget or {}) for method in METHODS}


def write(folder: str | Path, **options: Any) -> list[Path]:
    """Write the configs of both modes, ``released/nap.toml`` and so on; rows and tables will stand beside them.

    Parameters
    ----------
    options:
        As for :func:`configs`.

    Returns
    -------
    list of pathlib.Path
        The files.

    Examples
    --------
    >>> import tempfile
    >>> from dfa_lens.experiments.paper_configs import write
    >>> [path.parent.name + "/" + path.name for path in write(tempfile.mkdtemp())][:2]
    ['released/nap-ig-inputs.toml', 'released/nap.toml']
    """
    place = writable(folder, folder=True)
    found = []
    for mode in get_args(Mode):
        for method, text in configs(mode, **options).items():
            found.append(place / mode / f"{method}.toml")
            write_atomically(found[-1], text.encode())
    return found


def _text(
    mode: Mode,
    method: str,
    pairs: Sequence[str],
    models: Mapping[str, str],
    more: Mapping[str, Any],
    budget: Mapping[str, int],
) -> str:
    released = mode == "released"
    # random and fixed matrices are trained in no way; the names of the others are ours, their recipe the released one
    settings = [*_UNTRAINED] if released else [*_TRAINED, *_UNTRAINED, *_FURTHER]
    top = {"out": method, "settings": settings, "seeds": [0], "collection": "mib", "protocol": "mib"}
    top |= {"device": "cuda", "dtype": "bfloat16", **more}
    attribution: dict[str, Any] = {"method": method, "steps": 5}
    if released:
        attribution |= {"mlp_gradient": "input", "accumulate": "all"}
    lines = [f"# The study of arXiv 2604.24302, {method}, {mode} modes.", *_entries(top)]
    lines += ["", "[budget]", *_entries({"train": 100, "test": 100, "batch_size": 8, **budget})]
    lines += ["", "[attribution]", *_entries(attribution)]
    for pair in pairs:
        source, target = (models[name] for name in PAIRS[pair])
        lines += ["", f'[models."{pair}"]', *_entries({"source": source, "target": target, "backend": "transformers"})]
    for name in _TRAINED if released else ():
        recipe = {key: getattr(RELEASED, key) for key in _RECIPE} | {"batch_size": 4}
        lines += ["", f"[setting.{name}]", *_entries({"like": name, "method": "released"})]
        lines += [f"[setting.{name}.recipe]", *_entries(recipe)]
    return "\n".join(lines) + "\n"


def _entries(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in table.items()]


def _value(value: Any) -> str:
    """A text, number, truth value or list of them as TOML has it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
