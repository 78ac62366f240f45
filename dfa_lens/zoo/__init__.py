"""The small trained models that ship with the package."""

from __future__ import annotations

from typing import Any

import torch

from dfa_lens.errors import ModelError
from dfa_lens.models.loading import Backend, load_model
from dfa_lens.zoo.specs import SPECS, ZooModel, spec

__all__ = ["SPECS", "ZooModel", "load", "names", "pairs", "spec"]


def names() -> tuple[str, ...]:
    """The shipped models, in order: of each family the source, then the target.

    >>> import dfa_lens as dfa
    >>> dfa.zoo.names()
    ('llama3-tiny-source', 'llama3-tiny-target', 'qwen2.5-tiny-source', 'qwen2.5-tiny-target')
    """
    return tuple(SPECS)


def pairs() -> dict[str, tuple[str, str]]:
    """Family → (name of its source, name of its target).

    Examples
    --------
    >>> import dfa_lens as dfa
    >>> dfa.zoo.pairs()
    {'llama3': ('llama3-tiny-source', 'llama3-tiny-target'), 'qwen2.5': ('qwen2.5-tiny-source', 'qwen2.5-tiny-target')}
    """
    families = dict.fromkeys(known.family for known in SPECS.values())
    return {family: (f"{family}-tiny-source", f"{family}-tiny-target") for family in families}


def load(name: str, *, backend: Backend = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load a shipped model, with its tokenizer; no network is used.

    Parameters
    ----------
    name:
        One of :func:`names`.
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
