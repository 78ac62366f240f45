"""Shapes in signatures are checked while the tests run."""

from __future__ import annotations

import importlib
import sys
from textwrap import dedent

import pytest
import shapes
import torch
from jaxtyping import TypeCheckError

from dfa_lens.data.metrics import divergence

MODULE = """
    from __future__ import annotations
    from dataclasses import dataclass
    from jaxtyping import Float
    from torch import Tensor

    def product(a: Float[Tensor, "n"], b: Float[Tensor, "n"] | None = None) -> Tensor:
        return a if b is None else a * b

    def halved(a: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return a[::2]

    def nested(a):
        def inner(a: Float[Tensor, "n"]):
            return a
        return inner(a)

    def without(n: int):
        return n

    @dataclass(frozen=True)
    class Scores:
        values: Float[Tensor, "n"]

        def plus(self, more: Float[Tensor, "n"]):
            return self.values + more
"""


@pytest.fixture
def checked(tmp_path, monkeypatch):
    (tmp_path / "with_shapes.py").write_text(dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    shapes.check("with_shapes")
    yield importlib.import_module("with_shapes")
    del sys.modules["with_shapes"]


def test_what_fits_passes(checked):
    n = torch.ones(3)
    assert checked.product(n, n).shape == checked.product(n).shape == (3,)
    assert checked.Scores(n).plus(n).sum() == 6 and checked.nested(n) is n
    assert checked.without("no shape: not this tool's business") and not hasattr(checked.without, "__wrapped__")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda of: of.product(torch.ones(3), torch.ones(4)),
        lambda of: of.product(torch.ones(3, 1)),
        lambda of: of.product(torch.ones(3, dtype=torch.int64)),
        lambda of: of.halved(torch.ones(4)),
        lambda of: of.nested(torch.ones(1, 1)),
        lambda of: of.Scores(torch.ones(2, 2)),
        lambda of: of.Scores(torch.ones(2)).plus(torch.ones(2, 2)),
    ],
)
def test_what_does_not_fit_is_an_error(checked, wrong):
    with pytest.raises(TypeCheckError):
        wrong(checked)


def test_this_package_is_checked():
    with pytest.raises(TypeCheckError):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4))
