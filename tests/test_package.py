"""What a user meets first: the import, the README, the quick start, the command line."""

import pkgutil
import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

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
    """Every line, with fewer prompts and steps than it asks for."""
    load = dfa.tasks.load
    monkeypatch.setattr(dfa.tasks, "load", lambda *names, n, **options: load(*names, n=n // 4, **options))
    monkeypatch.setattr(dfa, "fit", partial(dfa.fit, steps=50))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(quick_start(), "README.md", "exec"), scope)
    assert "plotly" in (tmp_path / "ioi.html").read_text()
    assert scope["curve"].cpr > 0.3
    assert scope["alignment"].W.shape == (54, 110)


def test_the_demo_and_its_report(tmp_path, monkeypatch):
    from dfa_lens.errors import DfaError
    from dfa_lens.experiments import demo
    from dfa_lens.experiments.table import Results
    from dfa_lens.plots import report

    moved = []

    class Bar(demo.tqdm):
        def update(self, n=1):
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr(demo, "tqdm", Bar)
    budget = demo.Budget(train=8, test=4, steps=2, curve_points=3, batch_size=8)
    results = demo.run(families=["llama3"], only=["addition"], budget=budget)
    # gold and six settings, each step of the three trainings, and what the estimate was off by: nothing
    assert len(moved) == 7 + 3 * 2 + 1 and sum(moved[:-1]) == demo._passes(budget, 1)
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


def families_work(models, *, tell):
    """What a family's work stands in for: in another process, the first takes longest."""
    import time
    import warnings

    from dfa_lens.experiments.demo import Step

    time.sleep(0.5 * (models.name == "llama3"))
    warnings.warn(f"{models.name} warns", UserWarning, stacklevel=2)
    for i in range(3):
        tell(Step(i, models.name))
    return [models.name]


def test_families_in_processes_of_their_own():
    """In their order, with what they tell and warn of."""
    from dfa_lens.experiments import demo
    from dfa_lens.experiments.experiment import ModelPair

    pairs = [ModelPair.of("llama3"), ModelPair.of("qwen2.5")]
    told = []
    with pytest.warns(UserWarning, match="warns") as raised:
        assert demo._each(families_work, pairs, 2, told.append) == [["llama3"], ["qwen2.5"]]
    assert sorted(str(each.message) for each in raised) == ["llama3 warns", "qwen2.5 warns"]
    assert sorted((step.what, step.passes) for step in told) == [
        (name, i) for name in ("llama3", "qwen2.5") for i in range(3)
    ]


def test_models_of_ones_own_train_by_themselves(monkeypatch):
    """They may be too large for the examples of so many trainings at once."""
    from dfa_lens.experiments import demo
    from dfa_lens.experiments.experiment import ModelPair

    made = []

    class StandIn:
        jobs_per_pass = None

        def __init__(self, *args, **options):
            made.append(self)

        def run(self, *args):
            return ()

    monkeypatch.setattr(demo, "Experiment", StandIn)
    demo.run(families=["llama3", ModelPair("own", lambda: None, lambda: None)], only=["addition"])
    assert [each.jobs_per_pass for each in made] == [demo.JOBS_PER_PASS, None]


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
