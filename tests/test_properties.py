"""Properties that hold for any node set, mask, batch size and place of a fault, against a hook made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import BACKENDS, made_curve, random_model, random_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.experiments import study, table
from dfa_lens.experiments.experiment import Outcome

quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
}


@pytest.fixture(scope="module", params=BACKENDS)
def small(request: pytest.FixtureRequest) -> Any:
    return random_model(request.param, **SIZES)


def run(model: Any, tokens: Any, lengths: Any, hooks: list[Any]) -> Any:
    """The logits at the last real tokens, with functions put on hook points by TransformerLens itself."""
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    try:
        for point, function in hooks:
            model.hook_dict[point].add_hook(function)
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask)
    finally:
        model.reset_hooks()
    return logits[torch.arange(len(tokens)), lengths - 1]


def by_hand(model: Any, pairs: Any, names: Any, mask: Any) -> Any:
    """The clean logits with every named node mixed with its activation in the corrupt run, one loop a node."""
    seen: dict[str, Any] = {}
    points = sorted(
        {("blocks.%s.attn.hook_z" if name[0] == "a" else "blocks.%s.hook_mlp_out") % name[1] for name in names}
    )
    run(
        model,
        pairs.corrupt,
        pairs.lengths,
        [(p, lambda now, hook, p=p: seen.__setitem__(p, now.clone())) for p in points],
    )

    def mix(point: str) -> Any:
        def function(now: Any, hook: Any) -> Any:
            now = now.clone()
            for name, g in zip(names, mask, strict=True):
                if name[0] == "a" and point == f"blocks.{name[1]}.attn.hook_z":
                    head = int(name.split("h")[1])
                    now[:, :, head] = g * now[:, :, head] + (1 - g) * seen[point][:, :, head]
                elif point == f"blocks.{name[1]}.hook_mlp_out" and name[0] == "m":
                    now = g * now + (1 - g) * seen[point]
            return now

        return function

    return run(model, pairs.clean, pairs.lengths, [(point, mix(point)) for point in points])


def metric(logits: Any, pairs: Any) -> Any:
    rows = torch.arange(len(logits))
    return logits[rows, pairs.answer] - logits[rows, pairs.wrong]


@quick
@given(data=st.data())
def test_gates_are_a_hook_made_by_hand(small, data):
    every = dfa.NodeSet.heads_and_mlps(small)
    chosen = data.draw(st.lists(st.sampled_from(range(len(every))), min_size=1, unique=True))
    nodes = every[chosen]
    mask = torch.tensor(data.draw(st.lists(st.floats(-0.5, 1.5, width=32), min_size=len(nodes), max_size=len(nodes))))
    pairs = random_pairs(data.draw(st.integers(1, 5)), 8, seed=data.draw(st.integers(0, 99)), ragged=True)
    with dfa.hooks.record(small, nodes) as corrupt:
        run_inside(small, pairs.corrupt, pairs.lengths)
    with dfa.hooks.gate(small, nodes, mask, corrupt=corrupt):
        found = run_inside(small, pairs.clean, pairs.lengths)
    torch.testing.assert_close(found, by_hand(small, pairs, nodes.names, mask.tolist()), rtol=1e-3, atol=1e-3)


def run_inside(model: Any, tokens: Any, lengths: Any) -> Any:
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        return model(tokens, attention_mask=mask)[torch.arange(len(tokens)), lengths - 1]


@quick
@given(data=st.data())
def test_exact_scores_are_a_hook_made_by_hand(small, data):
    """For any nodes in any order, and any batch size."""
    every = dfa.NodeSet.heads_and_mlps(small)
    nodes = every[data.draw(st.lists(st.sampled_from(range(len(every))), min_size=1, unique=True))]
    pairs = random_pairs(data.draw(st.integers(1, 6)), 8, seed=data.draw(st.integers(0, 99)), ragged=True)
    found = dfa.attribute(small, pairs, method="exact", nodes=nodes, batch_size=data.draw(st.integers(1, 8)))
    whole = metric(run(small, pairs.clean, pairs.lengths, []), pairs)
    expected = [(whole - metric(by_hand(small, pairs, [name], [0.0]), pairs)).mean() for name in nodes.names]
    torch.testing.assert_close(found.values, torch.stack(expected), rtol=1e-3, atol=2e-3)


# --- studies -------------------------------------------------------------------------------------------------------


class Played:
    """An experiment whose outcomes are made up, and which can be interrupted before any of them."""

    left = 10**9

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def run(self, settings: Any, tasks: Any, *, skip: Any) -> Iterator[Outcome]:
        for name, setting in (("gold", None), *settings.items()):
            for task in tasks:
                trained = () if setting is None else ("other",)
                if skip(name, task, trained):
                    continue
                if Played.left <= 0:
                    raise KeyboardInterrupt
                Played.left -= 1
                value = (len(name) + 7 * len(task) + self.seed) / 3
                curve = made_curve(
                    [[0.0, 0], [value, 1], [2, 2]], clean=[2, 2], corrupt=[0, 0], sizes=[0, 1, 2], n_nodes=2
                )
                scores = dfa.controls.uniform(dfa.NodeSet.for_sizes(1, 1))
                yield Outcome(task, name, setting, trained, None, scores, curve, 0.0, 1)

    def diagnose(self, outcome: Outcome) -> dict[str, float]:
        return {}


def played(folder: Any) -> Any:
    some = {"a": study.Setting(), "b, c": study.Setting(control="random-w")}
    return study.run(["llama3"], some, seeds=[0, 1], tasks={"ioi": "ioi", "x": "mcqa"}, budget=study.QUICK, out=folder)


@quick
@given(data=st.data())
def test_a_study_stopped_anywhere_is_the_one_that_was_not(tmp_path_factory, data):
    """After any row, any number of times, with any part of the last write lost."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study._Plan, "experiment", lambda plan: Played(plan.seed))
        Played.left = 10**9
        whole = tmp_path_factory.mktemp("whole")
        expected = played(whole)
        folder = tmp_path_factory.mktemp("stopped")
        for _ in range(data.draw(st.integers(1, 4))):
            Played.left = data.draw(st.integers(0, 12))
            try:
                played(folder)
            except KeyboardInterrupt:
                path = data.draw(st.sampled_from(sorted(folder.glob("*.csv")) or [None]))
                if path is not None:
                    content = path.read_bytes()
                    path.write_bytes(content[: len(content) - data.draw(st.integers(0, min(len(content), 300)))])
        Played.left = 10**9
        pd.testing.assert_frame_equal(played(folder), expected)
        for path in whole.glob("*.csv"):
            assert (folder / path.name).read_bytes() == path.read_bytes()
            assert len(table.read(path)) == 6
