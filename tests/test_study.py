import json
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch

import dfa_lens as dfa
from dfa_lens.errors import DfaError, FileError
from dfa_lens.experiments import experiment as module
from dfa_lens.experiments import study
from dfa_lens.experiments.functional import FUNCTIONAL
from dfa_lens.experiments.study import Budget, Experiment, Setting
from dfa_lens.experiments.table import Control
from dfa_lens.transfer.forms import Kernel
from dfa_lens.transfer.objectives import Objective
from dfa_lens.transfer.recipe import Recipe

TINY = Budget(train=6, test=4, steps=2, curve_points=3, batch_size=8)
SOME = {
    "zero-shot": Setting("zero-shot"),
    "near-distribution": Setting("near-distribution"),
    "uniform-s": Setting("zero-shot", "uniform-s"),
    "permuted-w": Setting("zero-shot", "permuted-w"),
    "random-w": Setting("zero-shot", "random-w"),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    found = study.run(["llama3"], SOME, seeds=[1], test_tasks=["addition", "ioi"], budget=TINY, out=folder)
    return folder, found


def test_a_row_for_everything(table):
    _, found = table
    counted = found.groupby("setting")["task"].apply(list)
    assert counted["gold"] == ["addition", "ioi"]
    assert counted["near-distribution"] == ["addition"]  # ioi has no sibling
    assert found.set_index(["setting", "task"]).loc[("near-distribution", "addition"), "trained_on"] == "subtraction"
    zero = found.set_index(["setting", "task"]).loc[("zero-shot", "ioi")]
    assert "ioi" not in zero["trained_on"].split() and len(zero["trained_on"].split()) == 5
    gold = found[found["setting"] == "gold"].set_index("task")["cpr"]
    np.testing.assert_allclose(found["recovery"], found["cpr"] / found["task"].map(gold))
    assert found["forwards"].gt(0).sum() == 2 + 2 + 1 + 2  # gold, zero-shot, near, uniform-s


def test_rows_are_what_the_steps_give_by_hand(table):
    _, found = table
    source, target = dfa.zoo.load("llama3-tiny-source"), dfa.zoo.load("llama3-tiny-target")
    tasks = [t for t in dfa.tasks.names() if t != "addition"]
    with pytest.warns(dfa.IntegrationWarning):
        scores = {
            t: dfa.attribute(source, dfa.tasks.load(t, source.tokenizer, n=6, seed=1), batch_size=8)
            for t in dfa.tasks.names()
        }
    pairs = {t: dfa.tasks.load(t, target.tokenizer, n=6, seed=1) for t in tasks}
    alignment = dfa.fit(target, {t: scores[t] for t in tasks}, pairs, steps=2, seed=1)
    test = dfa.tasks.load("addition", target.tokenizer, split="test", n=4, seed=1)
    curve = dfa.faithfulness_curve(target, test, alignment.transfer(scores["addition"]), sizes=[0, 37, 73, 110])
    row = found.set_index(["setting", "task"]).loc[("zero-shot", "addition")]
    assert row["cpr"] == pytest.approx(curve.cpr, abs=1e-5)
    assert row["effective_rank"] == pytest.approx(dfa.diagnostics.effective_rank(alignment), abs=1e-2)


def test_a_study_goes_on_where_it_stopped(table, monkeypatch):
    folder, found = table
    rows = [path for path in (folder / "units").glob("*.json") if not path.with_suffix(".safetensors").exists()]
    assert len(rows) == len(found)
    for path in rows[:6]:
        path.unlink()
    (folder / "units" / ".dfa-lens-half").write_bytes(b"{")  # interrupted in the middle of a unit
    runs = []
    run = module.faithfulness_curve
    monkeypatch.setattr(module, "faithfulness_curve", lambda *args, **kw: runs.append(1) or run(*args, **kw))
    again = study.run(["llama3"], SOME, seeds=[1], test_tasks=["addition", "ioi"], budget=TINY, out=folder)
    assert len(runs) == 6
    np.testing.assert_allclose(again["cpr"], found["cpr"])
    assert dict(again.dtypes) == dict(found.dtypes)  # what was read and what is new are of one kind
    runs.clear()
    study.run(["llama3"], SOME, seeds=[1], test_tasks=["addition", "ioi"], budget=TINY, out=folder)
    assert not runs
    whole = rows[0].read_text()
    rows[0].write_text('"broken\n1,2')
    with pytest.raises(FileError, match="is not a unit of a study"):
        study.run(["llama3"], SOME, seeds=[1], test_tasks=["addition", "ioi"], budget=TINY, out=folder)
    rows[0].write_text(whole)


def test_a_folder_keeps_what_its_rows_were_made_with(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "drive", lambda *args, **options: [])
    study.run(["llama3"], {"a": Setting()}, seeds=[0], budget=TINY, out=tmp_path)
    study.run(["llama3"], {"b": Setting("in-distribution")}, seeds=[0], budget=TINY, out=tmp_path)  # another name
    assert set(json.loads((tmp_path / "study.json").read_text())["settings"]) == {"a", "b"}
    with pytest.raises(DfaError, match="made with another setting 'a'"):
        study.run(["llama3"], {"a": Setting(recipe=Recipe(lr=0.2))}, seeds=[0], budget=TINY, out=tmp_path)
    with pytest.raises(DfaError, match="made with another budget and task 'ioi' and task 'mcqa'"):
        study.run(["llama3"], {"a": Setting()}, seeds=[0], collection="mib", out=tmp_path)
    (tmp_path / "study.json").write_text("[")
    with pytest.raises(FileError, match="is not the description of a study"):
        study.run(["llama3"], {"a": Setting()}, seeds=[0], budget=TINY, out=tmp_path)


class Undescribed(Objective):
    """No dataclass: nothing says what two of them differ in."""

    name = "undescribed"
    masks = None


def kernel_of(value):
    """A form of W whose numbers differ where a text of them does not."""
    alike = torch.zeros(54, 110)
    alike[:, 55] = value
    return Kernel({"alike": alike}, free=False)


def test_what_was_trained_is_known_by_its_content():
    """Two forms of W whose texts are alike give two alignments, and two that hold the same are trained once."""
    assert repr(kernel_of(1.0)) == repr(kernel_of(2.0))
    experiment = Experiment("llama3", 0, Budget(train=4, test=4, steps=1, curve_points=2))
    recipes = [
        *(Recipe(form=kernel_of(value)) for value in (1.0, 0.0, 1.0)),
        lambda experiment, trained: Recipe(form=kernel_of(1.0)),
        lambda experiment, trained: Recipe(form=kernel_of(3.0)),
    ]
    settings = {str(i): Setting("in-distribution", recipe=recipe) for i, recipe in enumerate(recipes)}
    runs = []
    fit_many = module.fit_many
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit_many", lambda *args, **kw: runs.append(len(args[1])) or fit_many(*args, **kw))
        found = [outcome.alignment for outcome in experiment.run(settings, ["ioi"]) if outcome.setting]
    assert runs == [3]  # together; of the third and the fourth it is known what they give
    assert found[0] != found[1] and not found[1].W.any()
    assert found[0] is found[2] and found[0] is found[3] and found[4] != found[0]
    with pytest.raises(DfaError, match="Nothing tells two objects"):
        list(experiment.run({"x": Setting(recipe=Recipe(objective=Undescribed()))}, ["ioi"]))


def test_a_folder_knows_settings_and_models_by_their_content(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "drive", lambda *args, **options: [])

    def run(value=1.0, target="llama3-tiny-target"):
        setting, pair = (
            Setting(recipe=Recipe(form=kernel_of(value))),
            study.ModelPair("own", "llama3-tiny-source", target),
        )
        study.run([pair], {"a": setting}, seeds=[0], budget=TINY, out=tmp_path)

    run()
    run()
    with pytest.raises(DfaError, match="made with another setting 'a'"):
        run(value=2.0)
    with pytest.raises(DfaError, match="made with another pair 'own'"):
        run(target="llama3-tiny-source")
    with pytest.raises(DfaError, match="Two pairs of models are called 'own'"):
        study.run([study.ModelPair("own", x, x) for x in ("llama3-tiny-source", "llama3-tiny-target")], out=tmp_path)
    written = json.loads((tmp_path / "study.json").read_text())["settings"]["a"]
    assert written["recipe"]["form_options"]["free"] is False


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"\xff\xfe",
        b"[]",
        b'"budget"',
        b'{"budget": 1}',
        b'{"settings": [], "budget": {}}',
        b"",
        b"\0" * 9,
        b"NaN",
    ],
)
def test_broken_descriptions_of_a_study(tmp_path, content):
    (tmp_path / "study.json").write_bytes(content)
    with pytest.raises(FileError, match=r"study\.json (is not|does not) .*descri") as caught:
        study.run(["llama3"], {"a": Setting()}, seeds=[0], budget=TINY, out=tmp_path)
    assert len(str(caught.value)) < 300


def test_broken_tables(tmp_path):
    path = tmp_path / "table.csv"
    for content in (b"", b"\xff\xfe\n", b'"a\n', b"a,b\n1,2\n", b"\0\0\n"):
        path.write_bytes(content)
        with pytest.raises(FileError, match="is not a table of a study") as caught:
            study.read(path)
        assert len(str(caught.value)) < 300
    with pytest.raises(FileError, match="is a folder"):
        study.read(tmp_path)
    with pytest.raises(FileError, match="There is no file"):
        study.read(tmp_path / "none.csv")


def test_every_setting_of_the_benchmark_runs():
    experiment = Experiment("qwen2.5", 0, Budget(train=4, test=3, steps=1, curve_points=2, batch_size=8))
    with pytest.warns(dfa.IntegrationWarning):
        found = list(experiment.run(study.SETTINGS, ["subtraction"]))
    names = [outcome.name for outcome in found]
    assert set(names) == {"gold", *study.SETTINGS}
    assert names.count("one-task") == 5
    assert all(np.isfinite(outcome.curve.cpr) for outcome in found)
    controls = {outcome.setting.control for outcome in found if outcome.setting}
    of_measurements = {setting.control for setting in FUNCTIONAL.values()}
    assert controls | of_measurements == set(get_args(Control))


def test_processes_give_the_same(tmp_path):
    """In a process of its own, since the pool starts fresh interpreters."""
    code = (
        "import json\nfrom dfa_lens import study\nfrom dfa_lens.experiments.study import Budget, Setting\n"
        "if __name__ == '__main__':\n"
        "    budget = Budget(train=4, test=3, steps=1, curve_points=2, batch_size=8)\n"
        "    made = [study.run(None, {'random-w': Setting(control='random-w')}, seeds=[0], test_tasks=['ioi'], budget=budget,"
        " workers=w) for w in (1, 2)]\n"
        "    print(json.dumps([table['cpr'].tolist() for table in made]))\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    out = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True, check=True).stdout
    one, two = json.loads(out.splitlines()[-1])
    np.testing.assert_allclose(one, two)
    assert len(one) == 4


def test_bad_input():
    with pytest.raises(DfaError, match="Unknown family 'lama'"):
        study.run(["lama"], SOME)
    with pytest.raises(DfaError, match="Unknown task 'add'"):
        study.run(["llama3"], SOME, test_tasks=["add"])
    with pytest.raises(DfaError, match="Unknown regime 'zeroshot'"):
        Setting.__post_init__(_raw("zeroshot", ""))
    with pytest.raises(DfaError, match="Unknown control 'random-W'"):
        Setting.__post_init__(_raw("zero-shot", "random-W"))


def _raw(regime, control):
    made = object.__new__(Setting)
    object.__setattr__(made, "regime", regime)
    object.__setattr__(made, "control", control)
    return made


def test_warnings_of_an_experiment_name_the_task(monkeypatch):
    """Of six tasks and two models, which one it was."""
    import warnings
    from types import SimpleNamespace

    from helpers import unchecked

    def attribute(model, pairs, *, batch_size):
        warnings.warn("much is unexplained", dfa.IntegrationWarning, stacklevel=2)
        return "scores"

    monkeypatch.setattr(module, "attribute", attribute)
    monkeypatch.setattr(module, "asdict", lambda _: {})
    asked = SimpleNamespace(attribution=None)
    plain = unchecked(Experiment._attribute)
    with pytest.warns(dfa.IntegrationWarning, match="^ioi: much is unexplained$"):
        assert plain(asked, "ioi", None, None, batch_size=2) == "scores"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dfa.IntegrationWarning)
        warnings.simplefilter("error", UserWarning, append=True)
        plain(asked, "ioi", None, None, batch_size=2)
