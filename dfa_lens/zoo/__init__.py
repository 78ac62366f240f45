"""The small trained models that ship with the package.

Those of :mod:`~dfa_lens.zoo.planted` are not trained: their circuits were written, and are known.
"""

from __future__ import annotations

import json
from typing import Any, get_args

import torch

from dfa_lens.errors import ModelError, unknown
from dfa_lens.models.loading import Backend, load_model
from dfa_lens.tasks import Which
from dfa_lens.zoo import planted
from dfa_lens.zoo.specs import SPECS, ZooModel, spec

__all__ = ["SPECS", "ZooModel", "load", "names", "pairs", "planted", "solves", "spec"]


def names(which: Which = "paper") -> tuple[str, ...]:
    """The shipped models, in order: of each family the source, then the target.

    Parameters
    ----------
    which:
        Those that know the tasks of ``dfa.tasks.names(which)``: "paper", the default of the demo and of studies,
        "more", or "all" models.

    Raises
    ------
    ModelError
        If ``which`` is something else.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.zoo.names()
    ('llama3-tiny-source', 'llama3-tiny-target', 'qwen2.5-tiny-source', 'qwen2.5-tiny-target')
    >>> dfa.zoo.names("more")
    ('llama3-more-source', 'llama3-more-target', 'qwen2.5-more-source', 'qwen2.5-more-target')
    """
    if which not in get_args(Which):
        raise unknown("set of models", which, get_args(Which), ModelError)
    return tuple(name for name, known in SPECS.items() if which in ("all", known.tasks))


def pairs(which: Which = "paper") -> dict[str, tuple[str, str]]:
    """Pair → (name of its source, name of its target).

    Parameters
    ----------
    which:
        As for :func:`names`.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.zoo.pairs()
    {'llama3': ('llama3-tiny-source', 'llama3-tiny-target'), 'qwen2.5': ('qwen2.5-tiny-source', 'qwen2.5-tiny-target')}
    """
    sources = [name for name in names(which) if name.endswith("-source")]
    return {
        name.removesuffix("-source").removesuffix("-tiny"): (name, name.replace("-source", "-target"))
        for name in sources
    }


def solves(name: str, *, at_least: float = 0.95) -> tuple[str, ...]:
    """The tasks that a shipped model was found to solve after its training.

    Parameters
    ----------
    name:
        One of ``names("all")``, see :func:`names`.
    at_least:
        How often the right answer is the top prediction on held-out prompts, clean and corrupt; default: 95 %.

    Raises
    ------
    ModelError
        If there is no such model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.zoo.solves("llama3-tiny-source")
    ('ioi', 'mcqa', 'addition', 'subtraction', 'arc-easy', 'arc-challenge')
    """
    found = json.loads((spec(name).folder / "accuracy.json").read_text(encoding="utf-8"))
    return tuple(task for task, accuracy in found.items() if min(accuracy.values()) >= at_least)


def load(name: str, *, backend: Backend = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load a shipped model, with its tokenizer; no network is used.

    Parameters
    ----------
    name:
        One of ``names("all")``, see :func:`names`.
    backend, device, dtype:
        As in :func:`dfa_lens.load_model`.

    Raises
    ------
    ModelError
        If there is no such model.

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.zoo.load("llama3-tiny-source").cfg.n_layers
    6
    """
    folder = spec(name).folder
    if not (folder / "config.json").is_file():
        raise ModelError(f"The checkpoint of {name!r} is not in this installation (looked in {folder}).")
    return load_model(folder, backend=backend, device=device, dtype=dtype)
