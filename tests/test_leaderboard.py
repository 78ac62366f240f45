"""The leaderboard: its rows against the functions that they come from, what is kept, and what is refused."""

import json

import pytest
import torch
from typer.testing import CliRunner

import dfa_lens as dfa
from dfa_lens.cli import app
from dfa_lens.errors import DfaError
from dfa_lens.experiments import leaderboard

MODEL, SMALL = "llama3-tiny-source", {"examples": 4, "test": 4}


def truth(model, task):
    return {"a5.h6": True, "m0": True} if task == "ioi" else None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    names = ["exact", "nap", "gim", "random"]
    options = {**SMALL, "out": out, "backend": "transformers", "truth": truth}
    return out, leaderboard.run([MODEL], ["ioi"], names, **options)


def test_rows_are_what_the_functions_give(made):
    _, table = made
    model = dfa.load_model(MODEL, backend="transformers")
    train, test = (dfa.tasks.load("ioi", model.tokenizer, split=split, n=4) for split in ("train", "test"))
    row = table[table["contender"] == "nap"].iloc[0]
    scores, exact = (dfa.attribute(model, train, method=method) for method in ("nap", "exact"))
    assert row["cpr"] == pytest.approx(dfa.faithfulness_curve(model, test, scores).cpr, abs=1e-5)
    by_size = dfa.faithfulness_curve(model, test, scores, ranking="absolute")
    assert row["cmd_absolute"] == pytest.approx(by_size.cmd, abs=1e-5)
    assert row["spearman"] == pytest.approx(dfa.statistics.correlation(scores, exact).spearman, abs=1e-3)
    assert (row["forward"], row["backward"]) == (2, 1)
    wrong = sum(
        float(scores[outside] > scores[inside])
        for inside in ("a5.h6", "m0")
        for outside in scores.nodes.names
        if outside not in ("a5.h6", "m0")
    )
    assert row["auroc"] == pytest.approx(1 - wrong / (2 * (len(scores) - 2)))
    assert table[table["contender"] == "exact"].iloc[0]["pearson"] == pytest.approx(1)


def test_planted_circuits_are_known(tmp_path):
    table = leaderboard.run(["planted-lookup-source"], ["first/copy"], ["exact", "random"], out=tmp_path, **SMALL)
    assert table["model"].tolist() == 2 * ["planted-lookup-source"]
    side = dfa.zoo.planted.load("lookup").source
    scores = dfa.controls.random_scores(side.nodes, seed=0)
    inside = side.circuit("first/copy")
    outside = [name for name in side.nodes.names if name not in inside]
    ahead = sum(float(scores[name] > scores[other]) for name in inside for other in outside)
    found = table.set_index("contender")["auroc"]
    assert found["exact"] == 1.0
    assert found["random"] == pytest.approx(ahead / (len(inside) * len(outside)))
    every = list(leaderboard._pairs_of(None, None))
    assert {
        (f"planted-{pair}-target", task) for pair in ("gate", "two-hop") for task in dfa.zoo.planted.tasks(pair)
    } < {*every}


def test_what_can_not_be_had_says_why(made):
    row = made[1].set_index("contender").loc["gim"]
    assert "hook_attn_scores" in row["refused"]
    assert row[["cpr", "seconds"]].isna().all()
    means = leaderboard.summary(made[1])
    assert "gim" not in means.index
    assert means["n"].tolist() == [1, 1, 1]


def test_what_is_there_is_not_run_again(made, monkeypatch):
    out, table = made
    monkeypatch.setattr(leaderboard, "attribute", None)
    again = leaderboard.run([MODEL], ["ioi"], ["exact", "nap"], **SMALL, out=out)
    assert again["cpr"].tolist() == table["cpr"][:2].tolist()
    with pytest.raises(DfaError, match="Unknown contender 'nup'"):
        leaderboard.run([MODEL], ["ioi"], ["nup"], out=out)


def test_other_weights_are_other_rows(made):
    """A folder keeps both; the batch size is memory and time."""
    out, table = made
    given = {**SMALL, "out": out, "backend": "transformers", "dtype": torch.bfloat16}
    row = leaderboard.run([MODEL], ["ioi"], ["nap"], **given, batch_size=3).iloc[0]
    model = dfa.load_model(MODEL, backend="transformers", dtype=torch.bfloat16)
    train, test = (dfa.tasks.load("ioi", model.tokenizer, split=split, n=4) for split in ("train", "test"))
    scores = dfa.attribute(model, train, method="nap", batch_size=3)
    assert row["cpr"] == pytest.approx(dfa.faithfulness_curve(model, test, scores, batch_size=3).cpr, abs=1e-6)
    assert row["cpr"] != table.set_index("contender").loc["nap", "cpr"]


def test_the_command(tmp_path):
    given = ["--model", MODEL, "--task", "ioi", "--contender", "random", "--examples", "2", "--test", "2"]
    given += ["--dtype", "bfloat16", "--batch-size", "1"]
    found = CliRunner().invoke(app, ["bench", *given, "--out", str(tmp_path), "--json"])
    assert found.exit_code == 0, found.output
    shown = json.loads(found.stdout[found.stdout.index("{") :])
    assert shown["rows"][0]["contender"] == "random"
    assert (tmp_path / "leaderboard.csv").exists()
    assert len(list(tmp_path.glob("rows/*--bfloat16--random.json"))) == 1
