"""The command line, as a user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dfa_lens as dfa
from dfa_lens.cli import app


def invoke(arguments):
    return CliRunner().invoke(app, arguments.split(), catch_exceptions=False)


def refused(arguments):
    found = CliRunner().invoke(app, arguments.split()).exception
    assert isinstance(found, dfa.DfaError), found
    assert "\n" not in str(found)
    return str(found)


def run_cli(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "dfa_lens.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_chain(tmp_path, monkeypatch):
    """attribute → fit → transfer → evaluate → report, as the --help examples have it."""
    monkeypatch.chdir(tmp_path)
    for arguments in (
        "attribute --model llama3-tiny-source --task ioi --out ioi-source.safetensors -n 8",
        "fit --target llama3-tiny-target --scores ioi=ioi-source.safetensors --out w.safetensors --steps 3 -n 8",
        "transfer --alignment w.safetensors --scores ioi-source.safetensors --out ioi-target.safetensors",
        "evaluate --model llama3-tiny-target --scores ioi-target.safetensors --task ioi -n 4 --out curve.csv",
        "report --source ioi-source.safetensors --target ioi-target.safetensors --alignment w.safetensors --out ioi.html",
    ):
        assert invoke(arguments).stdout
    assert (tmp_path / "ioi.html").stat().st_size > 1_000_000
    assert (tmp_path / "curve.csv").read_text().startswith("fraction,size,faithfulness,kl")


def test_a_report_of_own_results(tmp_path, monkeypatch):
    """Tasks, gold and curves from files; what does not belong together is refused in one line."""
    monkeypatch.chdir(tmp_path)
    nodes, more = dfa.NodeSet.for_sizes(2, 3), dfa.NodeSet.for_sizes(4, 5)
    w = dfa.controls.random_w(nodes, more)
    w.save("w.safetensors")
    for seed, task in enumerate(("one", "two")):
        scores = dfa.controls.random_scores(nodes, seed=seed)
        scores.save(f"{task}-s.safetensors")
        w.transfer(scores).save(f"{task}-t.safetensors")
        dfa.controls.random_scores(more, seed=seed).save(f"{task}-g.safetensors")
    (tmp_path / "curve.csv").write_text("fraction,size,faithfulness,kl\n0,0,0,1\n.5,12,.95,.1\n1,24,1,0\n")
    both = "--source one=one-s.safetensors --target one=one-t.safetensors"
    both += " --source two=two-s.safetensors --target two=two-t.safetensors --alignment w.safetensors"
    curves = "--gold two=two-g.safetensors --curve two=curve.csv --gold-curve two=curve.csv"
    said = invoke(f"report {both} {curves} -o all.html")
    assert "warning" not in said.stderr
    invoke(f"report {both} -o bare.html")  # no curves, no table
    assert "<h1>Circuit transfer from source to target</h1>" in Path("bare.html").read_text(encoding="utf-8")
    page = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert page.count("<section") == 2
    assert "transfer: CPR 0.725 (100% of gold&#39;s); smallest circuit with f ≥ 0.9: 12 of 24 nodes" in page
    assert "nan" not in page.split('id="plotly"')[0].lower().replace("finance", "")
    for arguments, message in (
        (f"{both} --gold three=two-g.safetensors", "--gold is of the task 'three', of which there are no"),
        ("--source one=one-s.safetensors --target two=two-t.safetensors", "the same tasks of both"),
        (f"{both} --curve one=w.safetensors", "is no table of a curve"),
        (f"{both} --study x", "either --study, or files of scores"),
        ("--source a.safetensors --source b.safetensors --target c", "are given as TASK=FILE"),
        (f"--study {tmp_path}", "is not the folder of a study"),
    ):
        assert message in refused(f"report {arguments} -o x.html")
    from dfa_lens.experiments.table import frame, row

    rows = [row(family="f", seed=0, task="one", setting=name, cpr=cpr) for name, cpr in (("gold", 0.8), ("mine", 0.6))]
    (tmp_path / "study").mkdir()
    frame(rows).to_csv("study/table.csv", index=False)
    invoke("report --study study -o study.html")
    assert "mine: CPR 0.600, 75% of gold&#39;s 0.800." in (tmp_path / "study.html").read_text(encoding="utf-8")


def test_inspect(tmp_path, monkeypatch):
    """What dfa.inspect says: as text, as JSON, and as a graph of the circuit; a report with clicks."""
    monkeypatch.chdir(tmp_path)
    model = dfa.zoo.load("llama3-tiny-source")
    pairs = dfa.tasks.load("ioi", model.tokenizer, split="test", n=3)
    expected = dfa.inspect(model, pairs, example=1, top=2)
    some = "inspect --model llama3-tiny-source --task ioi -n 3 --example 1 --top 2"
    told = json.loads(invoke(f"{some} --nodes a3.* --nodes m0 --json").stdout)
    assert {row["node"] for row in told["nodes"]} == {*(f"a3.h{i}" for i in range(8)), "m0"}
    direct = dict(zip(expected.nodes.names, expected.direct.tolist(), strict=True))
    for row in told["nodes"]:
        assert row["direct"] == pytest.approx(direct[row["node"]])
    best = expected.promoted[expected.nodes.names.index("a3.h2")]
    shown = next(row for row in told["nodes"] if row["node"] == "a3.h2")
    assert [each["text"] for each in shown["promoted"]] == [each.text for each in best]
    scores = dfa.controls.random_scores(expected.nodes)
    scores.save("s.safetensors")
    said = invoke(f"{some} --scores s.safetensors --size 3 -o c.html").stdout
    assert said.startswith("".join(expected.tokens)) and "c.html written." in said
    for name in expected.nodes.names:
        assert (f"{name} " in said) == (name in scores.top(3))
    assert "Plotly.newPlot" in Path("c.html").read_text(encoding="utf-8")
    files = "report --source ioi=s.safetensors --target ioi=s.safetensors -o r.html"
    kept = []
    monkeypatch.setattr("dfa_lens.plots.report", lambda results, *_, **__: kept.append(results))
    invoke(f"{files} --model llama3-tiny-source")
    assert kept[0].tasks[0].inspection == dfa.inspect(model, pairs[:1])
    spans = dfa.Schema.by_token(pairs[:1])
    nodes = expected.nodes.at_spans(spans.names)
    assert kept[0].tasks[0].by_token == dfa.attribute(model, spans.apply(pairs[:1]), nodes=nodes, method="nap")
    invoke(files)
    assert kept[1].tasks[0].inspection is None
    invoke(f"{some} --nodes m0 -o seen.safetensors")
    assert dfa.Inspection.load("seen.safetensors") == expected  # of all nodes, whichever are printed
    invoke(f"{files} --inspection ioi=seen.safetensors")
    assert kept[2].tasks[0].inspection == expected
    assert kept[2].tasks[0].by_token is None
    dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 3)).save("other.safetensors")
    for arguments, message in (
        (f"{some} --scores s.safetensors --nodes m0", "either --nodes or --scores"),
        (f"{some} --size 3", "give --scores"),
        (f"{some} --example 5", "There is no example 5"),
        (f"{some} -o x.png", "can't be written as .png"),
        (f"{some} --nodes blocks.0.hook_mlp_out", "heads and MLP blocks here"),
        (files.replace("ioi=", "oio=") + " --model llama3-tiny-source", "'oio'"),
        (files.replace("s.saf", "other.saf") + " --model llama3-tiny-source", "other nodes than those of --model"),
        (
            files.replace("s.saf", "other.saf") + " --inspection ioi=seen.safetensors",
            "of another model than the target",
        ),
        (
            f"{files} --inspection ioi=s.safetensors",
            "not a file of 'dfa_lens inspection': it is one of 'dfa_lens scores'",
        ),
        (f"{files} --inspection mcqa=seen.safetensors", "--inspection is of the task 'mcqa'"),
        ("report --edges a=b -o r.html --model x", "give --source and --target"),
        ("report --edges a=b -o r.html --inspection x", "give --source and --target"),
    ):
        assert message in refused(arguments)


def test_measure_and_carry(tmp_path, monkeypatch):
    """What the library gives; a name that is no way or task is said before models are loaded."""
    monkeypatch.chdir(tmp_path)
    said = invoke("measure --model llama3-tiny-source --task ioi -n 4 --out m.safetensors").stdout
    assert f"{2 * 4 + 4 * (2 + 12)} passes" in said
    source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("llama3-tiny-target")
    ours = {task: dfa.tasks.load(task, source.tokenizer, n=4) for task in ("addition", "mcqa", "ioi")}
    theirs = {"ioi": dfa.tasks.load("ioi", target.tokenizer, n=4)}
    assert dfa.Measurements.load("m.safetensors") == dfa.measure(source, ours["ioi"])
    command = "carry --source llama3-tiny-source --target llama3-tiny-target --task ioi -n 4 --out c.safetensors"
    assert invoke(f"{command} --teach addition --teach mcqa").stdout
    assert dfa.NodeScores.load("c.safetensors") == dfa.carry(source, target, "ioi", ours, theirs)
    monkeypatch.setattr("dfa_lens.models.loading.load_model", None)
    assert "Unknown task 'adition'" in refused(f"{command} --teach adition")
    assert "way to carry 'w'" in refused(f"{command} --by w")


def test_the_seed_is_that_of_the_method_too(tmp_path, monkeypatch):
    """The same prompts (of a file with one row) and another seed: other draws, and only of methods that draw."""
    monkeypatch.chdir(tmp_path)
    model = dfa.zoo.load("llama3-tiny-source")
    sums = "clean,corrupt,answer,wrong\n" + "1 + 2 =,1 + 3 =, 3, 4\n"
    Path("sums.csv").write_text(sums)
    from dfa_lens.tasks.own import FileTask

    pairs = FileTask.read("sums.csv")(model.tokenizer, split=None, n=1, seed=0)
    for seed in (0, 3):
        for method in ("expected-gradients", "nap"):
            given = f"--model llama3-tiny-source --pairs sums.csv -n 1 --seed {seed} --method {method}"
            assert invoke(f"attribute {given} --integration-steps 1 -o {method}-{seed}").stdout
    drawn = [dfa.NodeScores.load(f"expected-gradients-{seed}") for seed in (0, 3)]
    for seed, found in zip((0, 3), drawn, strict=True):
        assert found == dfa.attribute(model, pairs, method="expected-gradients", steps=1, seed=seed)
    assert not torch.equal(drawn[0].values, drawn[1].values)
    assert torch.equal(dfa.NodeScores.load("nap-0").values, dfa.NodeScores.load("nap-3").values)


def test_the_command_line_of_edges(tmp_path, monkeypatch):
    """attribute --edges → evaluate → report, with files of ours and of MIB."""
    monkeypatch.chdir(tmp_path)
    for arguments in (
        "attribute --edges --model llama3-tiny-source --task ioi --out edges.safetensors -n 4 --integration-steps 2",
        "attribute --edges --method eap --readers per-head --model llama3-tiny-source --task ioi --out g.pt -n 4",
        "evaluate --model llama3-tiny-source --scores edges.safetensors --task ioi -n 2 --selection greedy --out c.csv",
        "evaluate --model llama3-tiny-source --scores g.pt --task ioi -n 2 --protocol mib --ranking absolute",
        "report --edges ioi=edges.safetensors --edges per-head=g.pt --out edges.html",
        "fit --target llama3-tiny-target --scores ioi=edges.safetensors --steps 1 -n 4 --out w.safetensors",
        "transfer --alignment w.safetensors --scores edges.safetensors --out carried.safetensors",
    ):
        assert CliRunner().invoke(app, arguments.split(), catch_exceptions=False).output
    saved = dfa.EdgeScores.load(tmp_path / "edges.safetensors")
    assert saved.meta["steps"] == 2
    assert saved.edges.grouped
    assert not dfa.EdgeScores.from_mib(tmp_path / "g.pt").edges.grouped
    assert "live" in (tmp_path / "c.csv").read_text().splitlines()[0]
    alignment = dfa.EdgeAlignment.load(tmp_path / "w.safetensors")
    assert dfa.EdgeScores.load(tmp_path / "carried.safetensors") == alignment.transfer(saved)
    page = (tmp_path / "edges.html").read_text()
    assert "<h2>edges: ioi</h2>" in page
    assert "<h2>edges: per-head</h2>" in page


def test_the_command_line_says_what_edges_need(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = "--model llama3-tiny-source --task ioi"
    for arguments, message in (
        (f"attribute {model} --out x --readers per-head", "options of edges: add --edges"),
        (f"attribute --edges {model} --out x.json", "hold per-head readers"),
        (f"attribute --edges {model} --out x --method nap", "Unknown edge method 'nap'"),
        ("report --out x", "Give --source and --target, or --edges"),
        ("report --out x --edges a=b --source c", "the same tasks of both"),
        (f"evaluate {model} --scores missing.safetensors", "missing.safetensors"),
        (f"evaluate {model} --scores missing.pt", "missing.pt"),
    ):
        found = CliRunner().invoke(app, arguments.split()).exception
        assert isinstance(found, dfa.DfaError)
        assert message in str(found)
    assert not list(tmp_path.iterdir())


def test_command_line_errors_are_one_line(tmp_path):
    code, _, err = run_cli("attribute", "--model", "llama3-tiny-source", "--task", "oio", "--out", "x", cwd=tmp_path)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("dfa-lens: Unknown task 'oio'")
    assert "Traceback" not in err


def test_every_command_shows_an_example():
    for command in (
        "demo",
        "attribute",
        "measure",
        "carry",
        "fit",
        "transfer",
        "evaluate",
        "inspect",
        "report",
        "study",
        "doctor",
    ):
        assert f"Example: dfa-lens {command} " in " ".join(invoke(f"{command} --help").output.split())


def test_doctor(tmp_path, zoo_source):
    code, out, err = run_cli("doctor", "--model", "llama3-tiny-source", cwd=tmp_path)
    assert code == 0, err
    for text in (
        dfa.__version__,
        torch.__version__,
        "threads for torch",
        "llama3-tiny-target",
        "shared beginnings  run once",
        "edges              2,500 (per head: 3,628): eap in 3 passes, eap-ig-inputs in 1 + 2 x steps",
    ):
        assert text in out
    assert "NOT INSTALLED" not in out


def test_doctor_on_a_model_without_a_tokenizer(zoo_source, monkeypatch):
    from dfa_lens import doctor as diagnosis
    from dfa_lens.models.runner import Runner

    monkeypatch.setattr(zoo_source, "tokenizer", None)
    monkeypatch.setattr(Runner, "allows", lambda *args: False)
    report = "\n".join(diagnosis.lines(zoo_source))
    assert "NONE: tasks need one" in report
    assert "shared beginnings  can't be used" in report


def test_doctor_on_a_model_without_edges(zoo_source, monkeypatch):
    from dfa_lens import doctor as diagnosis
    from dfa_lens.errors import ModelError

    def refuse(*args):
        raise ModelError("its attention and MLP run in parallel")

    monkeypatch.setattr(diagnosis, "Stream", refuse)
    assert "  edges              can't be scored: its attention and MLP run in parallel" in diagnosis.lines(zoo_source)


def test_shell_completion():
    """What a shell asks when the user has typed `dfa-lens att` and presses tab."""
    command = Path(sys.executable).with_name("dfa-lens")
    asked = {"_DFA_LENS_COMPLETE": "complete_bash", "COMP_WORDS": "dfa-lens att", "COMP_CWORD": "1"}
    done = subprocess.run([command], env=os.environ | asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["attribute"]


SIZES = {"source": (6, 8), "target": (10, 10)}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Scores on the source, transferred ones, and the alignment between them."""
    monkeypatch.chdir(tmp_path)
    nodes = {name: dfa.NodeSet.for_sizes(*sizes) for name, sizes in SIZES.items()}
    alignment = dfa.controls.random_w(nodes["source"], nodes["target"])
    scores = dfa.controls.random_scores(nodes["source"])
    alignment.save("w.safetensors")
    scores.save("s.safetensors")
    alignment.transfer(scores).save("t.safetensors")
    scores.to_mib("mib.json")
    (tmp_path / "mib").write_bytes((tmp_path / "mib.json").read_bytes())
    return scores, alignment


def test_version_and_short_help():
    assert invoke("--version").output == f"dfa-lens {dfa.__version__}\n"
    for command in ("", "attribute ", "fit ", "transfer ", "evaluate ", "report ", "study ", "demo ", "doctor "):
        assert "Usage:" in invoke(f"{command}-h").output


def test_every_command_writes_with_o_and_prints_json():
    for command in ("demo", "study", "attribute", "measure", "carry", "fit", "transfer", "evaluate", "report"):
        assert (
            "-o, --out" in " ".join(invoke(f"{command} -h").output.split())
            or "--out    -o" in invoke(f"{command} -h").output
        )
    for command in (
        "demo",
        "study",
        "attribute",
        "measure",
        "carry",
        "fit",
        "transfer",
        "evaluate",
        "report",
        "doctor",
    ):
        assert "--json" in invoke(f"{command} -h").output
    assert "--integration-steps" in invoke("attribute -h").output
    assert " --steps" not in invoke("attribute -h").output


def test_json_and_csv_hold_what_the_library_says(files):
    scores, alignment = files
    found = json.loads(invoke("transfer --alignment w.safetensors --scores s.safetensors -o t.csv --json").stdout)
    expected = alignment.transfer(scores)
    assert {row["node"]: row["score"] for row in found["scores"]} == pytest.approx(
        dict(zip(expected.nodes.names, expected.values.tolist(), strict=True))
    )
    import pandas as pd

    back = dfa.NodeScores.from_frame(pd.read_csv("t.csv"))
    torch.testing.assert_close(back.values, expected.values)
    # tables and MIB's files are read as ours are
    for given in ("t.csv", "t.safetensors"):
        out = invoke(
            f"evaluate --model llama3-tiny-target --scores {given} --task ioi -n 2 --faithful 0.1 --json"
        ).stdout
        found = json.loads(out)
        assert found["curve"][-1]["faithfulness"] == 1
        assert found["examples"] == 2
        circuit = found["circuit"]
        assert circuit["faithfulness"] >= 0.1
        assert set(circuit["nodes"]) == set(expected.top(circuit["k"]))
    assert invoke("transfer --alignment w.safetensors --scores s.safetensors -o mib2.json").exit_code == 0
    assert json.loads(Path("mib2.json").read_text())["cfg"]["n_layers"] == 10


def test_standard_output(files):
    """The file goes to standard output whole, and nothing else does."""
    scores, alignment = files
    command = [sys.executable, "-m", "dfa_lens.cli", "transfer", "--alignment", "w.safetensors"]
    done = subprocess.run([*command, "--scores", "s.safetensors", "--out", "-"], capture_output=True, check=True)
    Path("piped.safetensors").write_bytes(done.stdout)
    assert dfa.NodeScores.load("piped.safetensors") == alignment.transfer(scores)
    assert b"- written." in done.stderr
    assert not Path("-").exists()
    assert "give one of them" in refused("transfer --alignment w.safetensors --scores s.safetensors -o - --json")


def test_links_stay_and_devices_are_refused(files, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "real.safetensors")
    assert invoke("transfer --alignment w.safetensors --scores s.safetensors -o link.safetensors").exit_code == 0
    assert link.is_symlink()
    assert dfa.NodeScores.load(tmp_path / "real.safetensors") == dfa.NodeScores.load("t.safetensors")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("pipe", "device"):
        message = refused(f"transfer --alignment w.safetensors --scores s.safetensors -o {name}")
        assert "it is a device or a pipe" in message
    assert (tmp_path / "device").is_symlink()
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("attribute --model llama3-tiny-sorce --task ioi -o x", "Did you mean 'llama3-tiny-source'?"),
        ("attribute --model llama3-tiny-source --task ioi -o x -n 1000000", "between 1 and 20,000, not 1,000,000"),
        ("attribute --model llama3-tiny-source --task ioi -o x -n 0", "between 1 and 20,000, not 0"),
        ("attribute --model llama3-tiny-source --task ioi -o x.xlsx", "Scores of nodes can't be written as .xlsx"),
        ("attribute --model llama3-tiny-source --task ioi -o x.npz", "can't be written as .npz"),
        ("attribute --edges --nodes m* --model llama3-tiny-source --task ioi -o x", "of edges all are scored"),
        (
            "fit --target llama3-tiny-target --scores ioi=s.safetensors -o w.csv",
            "An alignment can't be written as .csv",
        ),
        ("fit --target llama3-tiny-target --scores i=s --scores i=t -o w", "Scores of task 'i' are given twice"),
        ("evaluate --model llama3-tiny-target --scores t.safetensors --task ioi -o c.json", "A curve can't be written"),
        (
            "evaluate --model llama3-tiny-target --scores w.safetensors --task ioi",
            "a file of 'dfa_lens alignment', and",
        ),
        ("evaluate --model llama3-tiny-target --scores mib --task ioi", "let its name end in .json"),
        ("transfer --alignment s.safetensors --scores w.safetensors -o x", "are --alignment and --scores swapped?"),
        ("transfer --alignment mib.json --scores s.safetensors -o x", "mib.json is not a readable safetensors file"),
        ("report --source t.safetensors --target s.safetensors -o x.html", "they are swapped"),
        ("report --source t.safetensors --target s.safetensors --alignment w.safetensors -o x.html", "are swapped"),
        ("report --edges a=s.safetensors -o x.html", "The scores of 'a' are of nodes"),
        ("report --source s.safetensors --target t.safetensors -o x.csv", "A report can't be written as .csv"),
        ("study -o out --workers 0", "at least 1, not 0"),
        ("study status none", "There is no file none/plan.json"),
        ("study resume none", "none has no study that was begun with --config"),
        ("study", "needs a folder, --out, or a file that says all of it, --config"),
        ("study --config none.toml", "There is no file none.toml"),
        ("study -o out --config none.toml", "give no other options beside it"),
        ("study -o out --models mine=a", "NAME=SOURCE,TARGET, not 'mine=a'"),
        ("study -o out --models mine=llama3-tiny-sorce,llama3-tiny-target", "Did you mean 'llama3-tiny-source'?"),
        ("study --config none.toml --device cuda", "give no other options beside it"),
        (
            "carry --source llama3-tiny-source --target llama3-tiny-taget --task ioi -o x",
            "Did you mean 'llama3-tiny-ta",
        ),
        ("bench --model llama3-tiny-sorce -o out", "Did you mean 'llama3-tiny-source'?"),
        ("bench --model llama3-tiny-source --task oio -o out", "Unknown task of these models 'oio'"),
        ("bench -o out --examples 1000000", "--examples is between 1 and 20,000, not 1,000,000"),
        ("bench -o out --test 0", "--test is between 1 and 20,000, not 0"),
        ("bench -o out --batch-size 0", "--batch-size is the number of examples a pass, at least 1, not 0"),
        ("bench -o out --workers 0", "at least 1, not 0"),
        ("demo -o out --workers 0", "at least 1, not 0"),
    ],
)
def test_what_is_wrong_is_one_line(files, arguments, message):
    assert message in refused(arguments)
    assert not list(Path().glob("x*")) and not Path("out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(files):
    assert "the device 'cuda'" in refused("attribute --model llama3-tiny-source --task ioi -o x --device cuda")


def test_nodes_of_ones_choice(tmp_path, monkeypatch, zoo_source):
    from dfa_lens.cli import reading

    monkeypatch.chdir(tmp_path)
    some = "attribute --model llama3-tiny-source --task ioi -n 2 --method nap --nodes a3.* --nodes m0 -o s.csv"
    assert invoke(some).exit_code == 0
    rows = Path("s.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [f"a3.h{i}" for i in range(8)] + ["m0"]
    values = reading.nodes(zoo_source, ["blocks.{layer}.attn.hook_v=2", "blocks.{layer}.hook_attn_out"])
    assert values.points[:2] == ("blocks.0.attn.hook_v", "blocks.0.hook_attn_out")
    with pytest.raises(dfa.DfaError, match="along an axis"):
        reading.nodes(zoo_source, ["blocks.{layer}.attn.hook_v=x"])


def test_a_pair_of_models_of_ones_own():
    from dfa_lens.cli import reading

    shipped, own = reading.model_pairs(["llama3"], ["mine=llama3-tiny-source,llama3-tiny-source"], "cpu", "float32")
    assert shipped == "llama3" and own.name == "mine"
    assert own.source().cfg.n_layers == 6
    assert reading.model_pairs(None, None, "cpu", "float32") is None


def test_a_backend_for_shipped_models_and_ones_own():
    from dfa_lens.cli import reading
    from dfa_lens.models.backend import PlainModel

    both = reading.model_pairs(None, None, "cpu", "float32", "transformers")
    assert [each.name for each in both] == list(dfa.zoo.pairs())
    assert isinstance(both[0].source(), PlainModel)
    own = "mine=llama3-tiny-source,llama3-tiny-target"
    shipped, mine = reading.model_pairs(["qwen2.5"], [own], "cpu", "float32", "bridge")
    for pair in (shipped, mine):
        assert pair.source.keywords["backend"] == pair.target.keywords["backend"] == "bridge"
    assert len(reading.model_pairs(None, [own], "cpu", "float32", "bridge")) == 1
    for command in ("demo -o x", "study -o x --dry-run"):
        assert "Unknown backend 'hoked'" in refused(f"{command} --backend hoked")


def test_a_study_from_a_file(tmp_path, monkeypatch):
    """Forecast, run, seen, collected and gone on with."""
    monkeypatch.chdir(tmp_path)
    text = 'settings = ["random-w"]\nfamilies = ["llama3"]\nseeds = [0]\ntest_tasks = ["ioi"]\nout = "results"\n'
    Path("study.toml").write_text(text + "[budget]\ntrain = 2\ntest = 2\nsteps = 1\ncurve_points = 2\n")
    assert "4 units (2 attribution, 2 row)" in invoke("study --config study.toml --dry-run").stdout
    assert not Path("results").exists()
    assert "table.csv written" in invoke("study --config study.toml").stdout
    assert "row: 2 of 2 done" in invoke("study status results").stdout
    assert json.loads(invoke("study status results --json").stdout)["done"] == {"attribution": 2, "row": 2}
    next(Path("results/units").glob("*.json")).unlink()
    assert "table.csv written" in invoke("study resume results").stdout
    invoke("study collect results -o table.parquet")
    import pandas as pd

    table = dfa.study.read("results/table.csv")
    pd.testing.assert_frame_equal(pd.read_parquet("table.parquet"), table, check_dtype=False)
    assert invoke("study collect results").stdout == Path("results/table.csv").read_text()
    assert ".tsv" in refused("study collect results -o table.tsv")
    Path("study.toml").write_text(text.replace("results", "others"))
    assert "now says another folder" in refused("study resume results")
    Path("results/config.json").unlink()
    assert "was begun with --config: to go on, give the same command" in refused("study resume results")
    Path("study.toml").write_text(text + '[executor]\nkind = "slurm"\nmemory = 1\ntime = 5\n')
    monkeypatch.setenv("PATH", "")
    assert "There is no SLURM on this machine" in refused("study --config study.toml")
    Path("study.toml").write_text(text + "[executor]\nkind = 'local'\nmemory = 1\ntime = 5\noptions = { part = 3 }\n")
    assert "submitit refuses the executor's options" in refused("study --config study.toml")


def test_threads_go_by_the_size_of_the_work(monkeypatch):
    """One for small models; what the user has set stays, and so does a large model's, whatever is loaded after it."""
    import os
    from types import SimpleNamespace

    import torch

    from dfa_lens.cli import threads

    def model(n, device="cpu"):
        parameter = SimpleNamespace(numel=lambda: n, device=torch.device(device))
        return SimpleNamespace(parameters=lambda: iter([parameter]))

    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(threads, "LOADED", [])
    for name in threads.THREADS:
        monkeypatch.delenv(name, raising=False)
    threads.for_model(model(1000, "cuda"))
    assert chosen == []
    threads.for_model(model(1000))
    assert chosen == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.for_model(model(1000))
    threads.for_shipped()
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.for_model(model(10**9))
    threads.for_model(model(1000))
    assert chosen == [1]
    code = "import dfa_lens.cli, os; print(os.environ['OMP_WAIT_POLICY'])"
    for given in ({}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        clean = {name: value for name, value in os.environ.items() if name not in threads.WAITING} | given
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=True)
        assert done.stdout.strip() == given.get("OMP_WAIT_POLICY", "PASSIVE")


def test_bars_are_for_somebody_who_looks_on(monkeypatch):
    from types import SimpleNamespace

    from dfa_lens.cli import options

    for terminal in (True, False):
        monkeypatch.setattr(options, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: terminal)))
        assert options.bars(quiet=False) == terminal
        assert not options.bars(quiet=True)
    shown = "demo, study run, attribute, fit, evaluate, measure, carry, bench, paper, mib evaluate"
    for command in shown.split(", "):
        assert "--quiet" in invoke(f"{command} --help").output
