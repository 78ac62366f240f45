"""What a user meets first: the import, the README, the quick start, the command line."""

import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest
import torch

import dfa_lens as dfa

ROOT = Path(__file__).parents[1]


def python(code):
    return subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True).stdout


def test_importing_imports_no_model_code():
    loaded = python("import sys, dfa_lens; print(*sorted(sys.modules))").split()
    for package in ("torch", "transformer_lens", "transformers", "plotly", "datasets", "pandas", "scipy"):
        assert package not in loaded


def test_public_names_exist():
    for name in dfa.__all__:
        assert getattr(dfa, name) is not None
    assert dir(dfa) == dfa.__all__
    with pytest.raises(AttributeError, match="No dfa_lens attribute nothing"):
        dfa.nothing  # noqa: B018


def test_any_public_name_can_be_the_first():
    """Each is found when nothing else of the package has been imported."""
    python(
        """
        import importlib, sys, dfa_lens
        for name in dfa_lens.__all__:
            for module in [module for module in sys.modules if module.split(".")[0] == "dfa_lens"]:
                del sys.modules[module]
            getattr(importlib.import_module("dfa_lens"), name)
        """
    )


def test_no_module_hides_a_public_name():
    """Importing a submodule binds its name in the package: it must not be that of a function or class."""
    for module in pkgutil.walk_packages(dfa.__path__, "dfa_lens."):
        if module.name != "dfa_lens.zoo.train":
            import_module(module.name)
    package = ROOT / "dfa_lens"
    listed = re.findall(r"^from \.([\w.]*) import (\w+)", (package / "__init__.pyi").read_text(), re.M)
    files = {name: package / home.replace(".", "/") / name for home, name in listed}
    modules = {name for name, path in files.items() if path.is_dir() or path.with_suffix(".py").exists()}
    assert {name for name in dfa.__all__ if isinstance(getattr(dfa, name), ModuleType)} == modules


def quick_start():
    return re.search(r"## Quick start\n.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)


def test_the_quick_start_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(quick_start(), "README.md", "exec"), scope)
    assert "plotly" in (tmp_path / "ioi.html").read_text()
    assert scope["curve"].cpr > 0.3
    assert scope["alignment"].W.shape == (54, 110)


def run_cli(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "dfa_lens.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_chain(tmp_path):
    """attribute → fit → transfer → evaluate → report, as the --help examples have it."""
    for arguments in (
        "attribute --model llama3-tiny-source --task ioi --out ioi-source.safetensors -n 8",
        "fit --target llama3-tiny-target --scores ioi=ioi-source.safetensors --out w.safetensors --steps 3 -n 8",
        "transfer --alignment w.safetensors --scores ioi-source.safetensors --out ioi-target.safetensors",
        "evaluate --model llama3-tiny-target --scores ioi-target.safetensors --task ioi -n 4 --out curve.csv",
        "report --source ioi-source.safetensors --target ioi-target.safetensors --alignment w.safetensors --out ioi.html",
    ):
        code, out, err = run_cli(*arguments.split(), cwd=tmp_path)
        assert code == 0, err
        assert out
    assert (tmp_path / "ioi.html").stat().st_size > 1_000_000
    assert (tmp_path / "curve.csv").read_text().startswith("fraction,size,faithfulness,kl")


def test_the_command_line_carries(tmp_path, monkeypatch):
    """measure and carry: what the library gives; a name that is no way or task is said before models are loaded."""
    from typer.testing import CliRunner

    from dfa_lens.cli import app
    from dfa_lens.errors import DfaError

    monkeypatch.chdir(tmp_path)
    asked = CliRunner()
    done = asked.invoke(app, "measure --model llama3-tiny-source --task ioi -n 4 --out m.safetensors".split())
    assert done.exit_code == 0 and f"{2 * 4 + 4 * (2 + 12)} passes" in done.output
    source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("llama3-tiny-target")
    ours = {task: dfa.tasks.load(task, source.tokenizer, n=4) for task in ("addition", "mcqa", "ioi")}
    theirs = {"ioi": dfa.tasks.load("ioi", target.tokenizer, n=4)}
    assert dfa.Measurements.load("m.safetensors") == dfa.measure(source, ours["ioi"])
    command = "carry --source llama3-tiny-source --target llama3-tiny-target --task ioi -n 4 --out c.safetensors"
    done = asked.invoke(app, [*command.split(), "--teach", "addition", "--teach", "mcqa"])
    assert done.exit_code == 0, done.output
    assert dfa.NodeScores.load("c.safetensors") == dfa.carry(source, target, "ioi", ours, theirs)
    monkeypatch.setattr("dfa_lens.models.loading.load_model", None)
    for wrong, message in ((["--teach", "adition"], "Unknown task 'adition'"), (["--by", "w"], "way to carry 'w'")):
        done = asked.invoke(app, [*command.split(), *wrong])
        assert isinstance(done.exception, DfaError) and message in str(done.exception)


def test_the_command_line_of_edges(tmp_path, monkeypatch):
    """attribute --edges → evaluate → report, with files of ours and of MIB."""
    from typer.testing import CliRunner

    from dfa_lens.cli import app

    monkeypatch.chdir(tmp_path)
    for arguments in (
        "attribute --edges --model llama3-tiny-source --task ioi --out edges.safetensors -n 4 --steps 2",
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
    assert ">ioi</h3>" in page
    assert ">per-head</h3>" in page


def test_the_command_line_says_what_edges_need(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from dfa_lens.cli import app

    monkeypatch.chdir(tmp_path)
    model = "--model llama3-tiny-source --task ioi"
    for arguments, message in (
        (f"attribute {model} --out x --readers per-head", "options of edges: add --edges"),
        (f"attribute --edges {model} --out x.json", "hold per-head readers"),
        (f"attribute --edges {model} --out x --method nap", "Unknown edge method 'nap'"),
        ("report --out x", "Give --source and --target, or --edges"),
        ("report --out x --edges a=b --source c", "either --edges, or"),
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


def test_every_command_shows_an_example(tmp_path):
    for command in (
        "demo",
        "attribute",
        "measure",
        "carry",
        "fit",
        "transfer",
        "evaluate",
        "report",
        "study",
        "doctor",
    ):
        code, out, _ = run_cli(command, "--help", cwd=tmp_path)
        assert code == 0
        assert f"Example: dfa-lens {command} " in " ".join(out.split())


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


def test_the_demo_and_its_report(tmp_path):
    from dfa_lens.errors import DfaError
    from dfa_lens.experiments import demo
    from dfa_lens.experiments.table import Results
    from dfa_lens.plots import report

    budget = demo.Budget(train=8, test=4, steps=2, curve_points=3, batch_size=8)
    results = demo.run(families=["llama3"], only=["addition"], budget=budget)
    again = demo.run(families=["llama3"], only=["addition"], budget=budget)
    table = results.table()
    transfers, controls = ["in-distribution", "zero-shot", "functional"], ["uniform-s", "depth-mean", "random-w"]
    assert table["setting"].tolist() == ["gold", *transfers, *controls]
    assert table["control"].tolist() == [""] * 4 + controls
    assert table["cpr"].tolist() == again.table()["cpr"].tolist()
    assert list(results.summary().columns) == [*table["setting"], "floor"]
    page = report(results, tmp_path / "out").read_text()
    assert page.count("<script src=") == 0  # nothing is fetched
    assert "llama3: addition" in page
    assert (tmp_path / "out" / "index.html").stat().st_size < 8_000_000
    with pytest.raises(DfaError, match="no results"):
        report(Results(), tmp_path)
    with pytest.raises(DfaError, match="Unknown family 'lama'"):
        demo.run(families=["lama"])
    with pytest.raises(DfaError, match="Unknown task 'add'"):
        demo.run(only=["add"])


def test_labels_in_the_report_are_escaped(tmp_path):
    from dataclasses import replace

    from dfa_lens.experiments import demo
    from dfa_lens.experiments.table import Results
    from dfa_lens.plots import report

    budget = demo.Budget(train=8, test=4, steps=2, curve_points=3, batch_size=8)
    result = demo.run(families=["llama3"], only=["addition"], budget=budget).tasks[0]
    bad = replace(result, task="<script>alert(1)</script>", curves={"gold": result.curves["gold"]}, alignments={})
    page = report(Results([bad]), tmp_path / "bad.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_project_speaks_of_itself_alone():
    pattern = re.compile(r"/(work|root|home)/[a-z.]")
    for path in ROOT.rglob("*"):
        if (
            path.suffix in (".py", ".md", ".toml", ".txt", ".yaml", ".ipynb", ".cff")
            and not any(part.startswith(".venv") for part in path.parts)
            and path != Path(__file__)
        ):
            assert not pattern.search(path.read_text()), path
