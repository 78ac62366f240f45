"""Shapes are checked while testing, and only then; no test reaches the network."""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), "dfa-lens-tests"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of tiny models wait for each other longer than they compute

import pytest
import shapes

shapes.check("dfa_lens")  # before any of it is imported


@pytest.fixture(autouse=True)
def registries_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers, the documentation's code among them, is gone with it: the next may run in this process."""
    from dfa_lens.data.registry import Registry

    plain, added = Registry.register, []

    def register(self: Any, name: str, thing: Any) -> None:
        plain(self, name, thing)
        added.append((self, name))

    monkeypatch.setattr(Registry, "register", register)
    yield
    for registry, name in added:
        del registry._entries[name]
