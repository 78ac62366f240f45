"""Fixtures that the tests share."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
from helpers import BACKENDS, random_model, random_pairs, state_of

import dfa_lens as dfa

#: What these test is the same under every TransformerLens: files, values, figures, tasks, and models without it.
ONCE = set(
    """
    alignment arguments cluster content docs edge_alignment edge_plots files functional_study grouping leaderboard mib
    more_tasks nodes objectives package paper plain plots prompts own_tasks properties recipe rehearsal scores selection
    similarity study study_config table tasks zoo
    """.split()
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a network or a real model run only when ``-m`` names their marker; see also ``ONCE``."""
    asked = config.getoption("-m")
    for item in items:
        if item.path.stem.removeprefix("test_") in ONCE:
            item.add_marker(pytest.mark.once)
        for marker in ("network", "real"):
            if marker in item.keywords and marker not in asked:
                item.add_marker(pytest.mark.skip(reason=f"only with -m {marker}"))


@pytest.fixture(scope="session", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(request.param)


@pytest.fixture(scope="session")
def any_model() -> Any:
    """One backend is enough where the model is only a means."""
    return random_model()


@pytest.fixture(scope="session")
def pairs() -> Any:
    return random_pairs()


@pytest.fixture(scope="session")
def ragged() -> Any:
    return random_pairs(ragged=True, seed=1)


@pytest.fixture(scope="session")
def zoo_source() -> Any:
    return dfa.zoo.load("llama3-tiny-source")


@pytest.fixture(scope="session")
def zoo_target() -> Any:
    return dfa.zoo.load("llama3-tiny-target")


@pytest.fixture
def unchanged():
    """A context manager that fails when a model is not left as it was."""

    @contextmanager
    def check(model: Any):
        before = state_of(model)
        try:
            yield
        finally:
            assert state_of(model) == before

    return check
