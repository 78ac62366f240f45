"""The paper's tables and figures: by hand, and from the files of somebody else."""

import tomllib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_cli import invoke, refused

import dfa_lens as dfa
from dfa_lens.errors import DfaError, FaithfulnessError, FileError
from dfa_lens.experiments import paper, paper_configs, published
from dfa_lens.experiments.config import Config
from dfa_lens.experiments.table import frame, row
from dfa_lens.transfer.recipe import RELEASED

PAIR = "llama3-1b-to-3b"
TASKS = dfa.tasks.names()
REGIMES = {"in-distribution": 0.3, "near-distribution": 0.4, "zero-shot": 0.2}


def rows(seed=0, pair=PAIR, shift=0.0, method="default"):
    """A study's rows; every CPR tells where it stands."""
    found = []
    for i, task in enumerate(TASKS):
        common = {"family": pair, "seed": seed, "task": task}
        at = shift + i / 100
        found.append(row(**common, setting="gold", method="gold", cpr=0.5 + at))
        for regime, cpr in REGIMES.items():
            if regime != "near-distribution" or task not in ("ioi", "mcqa"):
                found.append(row(**common, setting=regime, regime=regime, method=method, trained_on=task, cpr=cpr + at))
        for control in ("random-w", "scrambled-s", "permuted-w", "depth-mean", "uniform-s"):
            found.append(row(**common, setting=control, regime="zero-shot", control=control, method=method, cpr=0.1))
        others = [each for each in TASKS if each != task]
        found += [
            row(**common, setting="one", regime="one-task", method=method, trained_on=other, cpr=0.7)
            for other in others
        ]
    return frame(found)


def numbers(*tables):
    return paper.ours(pd.concat(tables, ignore_index=True))


def test_a_leaderboard_by_hand():
    made = paper.table(1, numbers(rows(), rows(seed=1, shift=0.1)))
    ours = made.xs("ours", axis=1, level=1)
    assert list(ours.columns) == ["IOI", "MCQA", "Arith +", "Arith -", "ARC-E", "ARC-C", "Avg."]
    assert [label for _, label in ours.index] == [
        "Random W",
        "Gold",
        "DFA (In-Distribution)",
        "DFA (Near-Distribution)",
        "DFA (Zero-Shot)",
    ]
    np.testing.assert_allclose(ours.loc[("NAP-IG-Inputs", "Gold"), "Arith -"], 0.5 + 0.05 + 0.03)  # over seeds
    near = ours.loc[("NAP-IG-Inputs", "DFA (Near-Distribution)")]
    assert near[["IOI", "MCQA"]].isna().all()
    np.testing.assert_allclose(near["Avg."], 0.4 + 0.05 + (2 + 3 + 4 + 5) / 400)  # over the four that there are
    theirs = made.xs("published", axis=1, level=1)
    assert theirs.loc[("NAP-IG-Inputs", "Gold"), "Avg."] == 0.38
    assert theirs.notna().to_numpy().sum() == 2  # the two averages; nothing is worked out of others


def test_controls_and_scaling_by_hand():
    own = numbers(rows())
    made = paper.table(2, own).xs("ours", axis=1, level=1)
    assert made.loc[("NAP-IG-Inputs", "DFA (Best)")].tolist() == pytest.approx([0.3, 0.31, 0.42, 0.43, 0.44, 0.45])
    assert made.loc[("NAP-IG-Inputs", "Scrambled s")].tolist() == [0.1] * 6
    scaling = paper.table(20, own).xs("ours", axis=1, level=1)  # ARC-E
    assert scaling.loc[("NAP-IG-Inputs", "Llama-3 (1B → 3B)")].tolist() == pytest.approx([0.1, 0.44, 0.54, 0.44 / 0.54])
    assert scaling.notna().any(axis=1).sum() == 1


def test_the_tables_are_those_of_the_paper():
    assert sorted(paper.TABLES) == list(range(1, 23))
    assert [paper.TABLES[n].of for n in (10, 12, 16)] == ["llama3-3b-to-1b", "llama3-1b-to-8b", "qwen2.5-1.5b-to-3b"]
    assert len(paper.PAIRS) == 12
    # eleven's published half is complete but for the controls
    eleven = paper.table(11, paper.Numbers()).xs("published", axis=1, level=1)
    assert eleven.notna().to_numpy().sum() == 24


def test_what_ships_is_a_number_with_a_source():
    known = published.read()
    assert list(known.columns) == list(published.COLUMNS)
    assert known["value"].between(0, 7).all() and (known["source"] != "").all()
    assert not known.duplicated(["table", "pair", "method", "setting", "task", "metric"]).any()
    assert set(known.loc[known["checked"], "source"].str.slice(0, 16)) == {"arXiv 2604.24302"}
    dfas = known[known["checked"]]
    assert set(dfas["pair"]) <= set(paper.PAIRS) and set(dfas["task"]) <= {*TASKS, "average"}


def test_several_recipes_must_be_told_apart():
    both = pd.concat([rows(), rows(method="released", shift=0.2)], ignore_index=True)
    both = both.drop_duplicates(["family", "seed", "task", "setting", "method", "trained_on"])
    with pytest.raises(DfaError, match="several ways, 'default', 'released': say which"):
        paper.ours(both)
    found = [
        paper.ours(both, recipe=recipe).of("nap-ig-inputs", PAIR, "zero-shot", "ioi")
        for recipe in ("default", "released")
    ]
    assert found == pytest.approx([0.2, 0.4])
    with pytest.raises(DfaError, match="recipe"):
        paper.ours(both, recipe="mine")


def test_no_study():
    with pytest.raises(DfaError, match="no table of a study: it has no column 'family'"):
        paper.ours(pd.DataFrame({"cpr": [1.0]}))
    with pytest.raises(DfaError, match="Nothing in this study is in a table of the paper"):
        dfa.plots.paper(rows(pair="mine"), "unused")
    with pytest.raises(DfaError, match="table of the paper"):
        paper.table(23, paper.Numbers())


# --- the authors' files --------------------------------------------------------------------------------------------

HEAD = "IOI,MCQA,Arith +,Arith -,ARC-E,ARC-C"


@pytest.fixture
def checkout(tmp_path):
    """Files of the form of the authors', with other numbers."""
    files = {
        "table1_leaderboard_llama3-1b_to_llama3-3b": f"Method Category,Transfer Setting,{HEAD},Average\n"
        "Baseline,Random Alignment,0.21,0.22,,0.24,0.25,0.26,0.27\n"
        "NAP,DFA (Near-Distribution),,,0.31,0.32,0.33,0.34,0.35\n",
        "table3_summary_qwen2.5-0.5b_to_qwen2.5-3b": f"Method,Setting / Control,{HEAD}\n"
        "NAP-IG-Activations,2. Scrambled input $s$,.1,.2,,.4,.5,.6\nNAP-IG-Activations,DFA (Best),.2,.2,,.2,.2,.2\n",
        "table2_summary_arithmetic_addition": "Method,Target Model Pair,Baseline,DFA (Best),Gold,Recovery\n"
        "NAP,Llama-3 (1B $\\to$ 8B),0.25,0.403,0.2511,161.5\nNAP,Qwen-2.5 (1.5B $\\to$ 3B),,,,\n",
        "table4_heatmap_EAP-IG-inputs_llama3-1b_to_llama3-3b": "Training Source,"
        + ",".join(f"Test: {label}" for label in HEAD.split(","))
        + ",Average\nTrain: Arith +,.1,.2,.3,.4,.5,.6,.35\n",
    }
    (tmp_path / "tables").mkdir()
    for name, text in files.items():
        (tmp_path / "tables" / f"{name}.csv").write_text(text)
    return tmp_path


def test_the_authors_files(checkout):
    known = paper.published(published.from_release(checkout))
    assert known.of("nap-ig-inputs", PAIR, "random-w", "mcqa") == 0.22
    assert known.of("nap", PAIR, "near-distribution", "average") == 0.35
    assert np.isnan(known.of("nap", PAIR, "near-distribution", "ioi"))
    assert known.of("nap-ig-activations", "qwen2.5-0.5b-to-3b", "scrambled-s", "subtraction") == 0.4
    assert known.of("nap", "llama3-1b-to-8b", "best", "addition") == 0.403
    assert known.one_task["nap-ig-inputs", PAIR, "addition", "arc-challenge"] == 0.6
    made = paper.table(21, paper.Numbers(), known)
    assert made.loc[("NAP", "Llama-3 (1B → 8B)"), ("Recovery", "published")] == pytest.approx(0.403 / 0.2511)


def test_files_that_are_not_the_authors(checkout, tmp_path):
    with pytest.raises(FileError, match="none of the authors' tables"):
        published.from_release(tmp_path / "elsewhere")
    path = checkout / "tables" / "table1_leaderboard_llama3-1b_to_llama3-3b.csv"
    for text, reason in (
        ("a,b\n1,2\n", "Method Category"),
        (f"Method Category,Transfer Setting,{HEAD}\nNAP,Something,1,2,3,4,5,6\n", "'Something' is unknown"),
        ("Method Category,Transfer Setting,IOI\nNAP,Gold,1\n", "no column 'MCQA'"),
    ):
        path.write_text(text)
        with pytest.raises(FileError, match=f"not one of the authors' tables: .*{reason}"):
            published.from_release(checkout)


# --- as files ------------------------------------------------------------------------------------------------------


def test_csv_tex_and_html():
    made = paper.table(2, numbers(rows()))
    back = pd.read_csv(pd.io.common.StringIO(paper.to_csv(made)))
    assert back["Setting"].tolist() == [setting for _, setting in made.index]
    assert back.loc[5, "ARC-C"] == 0.45 and back["ARC-C, published"].isna().all()
    tex = paper.to_tex(made, 2)
    lines = [line for line in tex.splitlines() if "DFA" in line]
    assert r"\textbf{0.30} & --" in lines[1] and r"\underline{0.20} & --" in lines[0]
    assert {line.count("&") for line in lines} == {13} and "→" not in tex and r"$\to$" in tex
    assert "<b>0.30</b>" in paper.to_html(made)
    recovery = paper.to_tex(paper.table(3, numbers(rows())), 3)
    assert r"60.8\%" in recovery and r"\textbf" not in recovery


def test_one_command(tmp_path, checkout):
    for name, table in (("study", rows()), ("other", rows(shift=0.2))):
        (tmp_path / name).mkdir()
        table.to_csv(tmp_path / name / "table.csv", index=False)
    said = invoke(
        f"paper --study {tmp_path / 'study'} --study nap={tmp_path / 'other' / 'table.csv'} "
        f"--published {checkout} --out {tmp_path / 'out'}"
    ).stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"index.html", "table-1.csv", "table-11.tex", "table-22.html", "figure-3.csv", "figure-4b.html"} <= names
    assert "table-5.csv" not in names and "11 tables as CSV, TeX and HTML, and 3 figures" in said
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<table ") == len(list((tmp_path / "out").glob("table-*.tex"))) == 11
    four = pd.read_csv(tmp_path / "out" / "table-4.csv")
    assert four.loc[four["Setting"] == "DFA (Zero-Shot)", "IOI"].iloc[0] == pytest.approx(0.4)
    assert four.loc[four["Setting"] == "DFA (Near-Distribution)", "Arith +, published"].iloc[0] == 0.31
    twice = " ".join(f"--study nap={tmp_path / name}" for name in ("study", "other"))
    assert "Two studies are given for 'nap'" in refused(f"paper {twice} --out {tmp_path / 'out'}")
    assert "attribution method" in refused(f"paper --study napp={tmp_path / 'study'} --out {tmp_path / 'out'}")


def test_recovery_and_matrices_by_hand():
    own = numbers(rows())
    shown = dfa.plots.paper_recovery(own, paper.published()).to_frame().iloc[0]
    ratios = [(0.2 + i / 100) / (0.5 + i / 100) for i in range(6)]
    assert (shown["recovery"], shown["std"]) == pytest.approx((np.mean(ratios), np.std(ratios, ddof=1)))
    assert (shown["published"], shown["published_is"]) == (pytest.approx(0.44 / 0.38), "ratio of averages")
    matrix = dfa.plots.paper_matrices(own)
    cells = matrix.to_frame().set_index(["trained_on", "task"])["cpr"]
    assert len(cells) == 36 and cells["ioi", "mcqa"] == 0.7 and cells["mcqa", "mcqa"] == pytest.approx(0.31)
    assert matrix.data[0].z[0][1] == 0.7  # rows are training tasks
    with pytest.raises(DfaError, match="one-task"):
        dfa.plots.paper_matrices(own, "nap")
    with pytest.raises(DfaError, match="both of gold and of 'zero-shot'"):
        dfa.plots.paper_recovery(paper.Numbers())
    with pytest.raises(FaithfulnessError, match="no curves"):
        dfa.plots.paper_curves({})


# --- the published study -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Random models of the paper's architectures and few heads, by its names, with the tokenizer of the offline tasks."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from dfa_lens.zoo.tokenizer import build

    root = tmp_path_factory.mktemp("models")
    tokenizer = build(begin_of_text=False)
    common = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "initializer_range": 0.3}
    common |= {"num_key_value_heads": 1, "max_position_embeddings": 128}
    names = ("llama3-1b", "llama3-3b", "qwen2.5-0.5b", "qwen2.5-1.5b")
    for i, name in enumerate(names):
        config, kind = (LlamaConfig, LlamaForCausalLM) if "llama" in name else (Qwen2Config, Qwen2ForCausalLM)
        torch.manual_seed(i)
        made = kind(config(**common, num_hidden_layers=1 + i % 3, num_attention_heads=2))
        made.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        settings = root / name / "tokenizer_config.json"  # as it is, whatever the model's family
        settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return {name: str(root / name) for name in names}


def test_configs_say_the_published_study():
    """Read as any config is; hub names are not looked up before a study runs."""
    for mode in ("released", "ours"):
        for method, text in paper_configs.configs(mode).items():
            said = tomllib.loads(text)
            assert list(said["models"]) == list(paper.PAIRS) and said["protocol"] == said["collection"] == "mib"
            assert said["attribution"]["method"] == method
            assert set(said["models"]["llama3-8b-to-1b"].values()) == {
                "meta-llama/Llama-3.1-8B",
                "meta-llama/Llama-3.2-1B",
                "transformers",
            }
    with pytest.raises(DfaError, match="pair of the paper"):
        paper_configs.configs("ours", pairs=["llama3-1b-to-70b"])
    with pytest.raises(DfaError, match="models says nothing of 'llama3-1b'"):
        paper_configs.configs("ours", models={})


def test_released_configs_train_as_released(tmp_path):
    (path, *_) = [each for each in paper_configs.write(tmp_path) if "released" in str(each)]
    run = Config.read(path).run
    trained = run["settings"]["zero-shot"]
    assert (trained.regime, trained.control, trained.method) == ("zero-shot", "", "released")
    assert trained.recipe == replace(RELEASED, batch_size=4)
    assert run["settings"]["scrambled-s"].control == "scrambled-s"
    assert (run["attribution"].mlp_gradient, run["attribution"].accumulate) == ("input", "all")
    ours = Config.read(tmp_path / "ours" / "nap.toml").run
    assert ours["settings"]["zero-shot"].recipe == dfa.Recipe()
    assert set(run["settings"]) | {"uniform-s", "random-s", "target-only"} == set(ours["settings"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mode", "method", "pair"),
    [("released", "nap-ig-activations", "llama3-3b-to-1b"), ("ours", "nap", "qwen2.5-0.5b-to-1.5b")],
)
def test_the_study_runs_with_tiny_models(mode, method, pair, tiny, tmp_path):
    """The same configs with models of the same architectures and the offline tasks, by one command."""
    more = {"collection": "offline", "device": "cpu", "dtype": "float32", "test_tasks": ["addition"]}
    budget = {"train": 2, "test": 2, "steps": 1, "batch_size": 4}
    paper_configs.write(tmp_path, pairs=[pair], models=tiny, more=more, budget=budget)
    config = tmp_path / mode / f"{method}.toml"
    config.write_text(config.read_text().replace("steps = 5", "steps = 1"))
    assert "tables as CSV" in invoke(f"paper --config {config} --out {tmp_path / 'out'}").stdout
    table = pd.read_csv(tmp_path / mode / method / "table.csv", keep_default_na=False)
    regimes = {
        "gold",
        "in-distribution",
        "zero-shot",
        "one-task",
        "random-w",
        "scrambled-s",
        "permuted-w",
        "depth-mean",
    }
    assert regimes | {"near-distribution"} <= set(table["setting"])
    # the paper's table 10, of the other direction, has nap-ig-inputs alone
    name = {"llama3-3b-to-1b": "leaderboard-llama3-3b-to-1b", "qwen2.5-0.5b-to-1.5b": "7"}[pair]
    made = pd.read_csv(tmp_path / "out" / f"table-{name}.csv").set_index(["Method", "Setting"])
    cell = made.loc[(paper.METHODS[method], "DFA (Zero-Shot)"), "Arith +"]
    row = table[table["setting"] == "zero-shot"]
    assert cell == pytest.approx(float(row["cpr"].iloc[0]), abs=1e-4)
    drawn = pd.read_csv(tmp_path / "out" / "figure-2a.csv")
    line = drawn[drawn["setting"] == "zero-shot"]
    assert np.trapezoid(line["faithfulness"], line["fraction"]) == pytest.approx(float(row["cpr"].iloc[0]), abs=1e-4)
    assert pd.read_csv(tmp_path / "out" / "figure-5a1.csv")["panel"].unique().tolist() == ["Arith +"]
    # gone on with: nothing is run again
    before = (tmp_path / mode / method / "table.csv").read_bytes()
    invoke(f"paper --config {tmp_path / mode / (method + '.toml')} --out {tmp_path / 'out'}")
    assert (tmp_path / mode / method / "table.csv").read_bytes() == before
