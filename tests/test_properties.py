"""Properties that hold for any node set, mask, batch size and place of a fault, against a hook made by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from helpers import BACKENDS, random_model, random_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfa_lens as dfa
from dfa_lens.experiments import study, table, work

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
    """Units whose numbers are made up, and which can be interrupted before or after any of them."""

    left = 10**9

    def __call__(self, unit: Any, plan: Any, experiment: Any) -> dict[str, Any]:
        Played.left -= 1
        if Played.left <= 0:
            raise KeyboardInterrupt
        columns = dict.fromkeys(("cpr", "cmd", "kl", "floor"), int(unit.key[:6], 16) / 7)
        return {"seconds": 0.0, **({"columns": columns} if unit.kind == "row" else {})}


def played(folder: Any) -> Any:
    some = {"a": study.Setting(), "b, c": study.Setting(control="random-w")}
    return study.run(["llama3"], some, seeds=[0, 1], tasks={"ioi": "ioi", "x": "mcqa"}, budget=study.QUICK, out=folder)


@quick
@given(data=st.data())
def test_a_study_stopped_anywhere_is_the_one_that_was_not(tmp_path_factory, data):
    """At any unit, any number of times, with any finished units, claims and halves of files lost or left over."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(work, "do", Played())
        Played.left = 10**9
        expected = played(tmp_path_factory.mktemp("whole"))
        folder = tmp_path_factory.mktemp("stopped")
        for _ in range(data.draw(st.integers(1, 3))):
            Played.left = data.draw(st.integers(1, 20))
            try:
                played(folder)
            except KeyboardInterrupt:
                for part in ("units", "claims"):
                    (folder / part).mkdir(exist_ok=True)
                for path in data.draw(st.lists(st.sampled_from(sorted(folder.glob("units/*.json")) or [folder / "x"]))):
                    path.unlink(missing_ok=True)
                for key in data.draw(
                    st.lists(st.sampled_from([path.stem for path in folder.glob("units/*.json")] or ["x"]))
                ):
                    (folder / "claims" / key).write_text("a worker that was killed")
                (folder / "units" / ".dfa-lens-half").write_bytes(b"{")
        Played.left = 10**9
        pd.testing.assert_frame_equal(played(folder), expected)
        assert len(table.read(folder / "table.csv")) == 12
