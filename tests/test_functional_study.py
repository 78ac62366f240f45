"""Functional alignment in studies: what is learned from what, and that each control takes away what it says."""

import pytest
import torch

import dfa_lens as dfa
from dfa_lens.errors import AlignmentError, DfaError
from dfa_lens.experiments.experiment import Budget, Experiment, ModelPair
from dfa_lens.experiments.functional import FUNCTIONAL, Functional, OneMeasurement, OnTarget
from dfa_lens.experiments.setting import Setting
from dfa_lens.experiments.units import Plan, Study
from dfa_lens.tasks.own import FileTask, family_of, sources

TASKS = ("ioi", "mcqa", "addition")
BUDGET = Budget(train=4, test=3, steps=2, curve_points=3, batch_size=8)


@pytest.fixture(scope="module")
def experiment():
    return Experiment("llama3", seed=1, budget=BUDGET, tasks={task: task for task in TASKS})


def test_families():
    assert dfa.tasks.FAMILIES["addition"] == dfa.tasks.FAMILIES["subtraction"] != dfa.tasks.FAMILIES["ioi"]
    assert set(dfa.tasks.FAMILIES) == set(dfa.tasks.names("all"))
    made = sources({"sums": "addition", "mine": lambda tokenizer, **options: None})
    assert [family_of(name, source) for name, source in made.items()] == ["arithmetic", "mine"]
    row = (("Paris is in", "Rome is in", " France", " Italy", ""),)
    assert family_of("capitals", FileTask(row, family="facts")) == "facts"
    assert FileTask(row, family="facts") == FileTask(row)  # rows of a study stay what they were


def test_what_is_left_out():
    setting, experiment = Setting("leave-family-out"), Experiment("llama3", budget=BUDGET)
    assert experiment.trained_on(setting, "ioi") == [("mcqa", "addition", "subtraction", "arc-easy", "arc-challenge")]
    assert experiment.trained_on(setting, "addition") == [("ioi", "mcqa", "arc-easy", "arc-challenge")]
    assert experiment.trained_on(setting, "arc-easy") == [("ioi", "addition", "subtraction")]
    alone = Experiment("llama3", budget=BUDGET, tasks={"a": "addition", "b": "subtraction"})
    assert alone.trained_on(setting, "a") == []


def test_a_functional_circuit_is_what_the_steps_give(experiment):
    trained = ("ioi", "mcqa")
    found, forwards = Functional().circuit(experiment, "addition", trained)
    scores = {task: dfa.attribute(experiment.source, experiment.on_source[task], batch_size=8) for task in trained}
    source = {task: dfa.measure(experiment.source, experiment.on_source[task]) for task in trained}
    target = dfa.measure(experiment.target, experiment.train["addition"])
    functional = dfa.fit_functional(scores, source, seed=1)
    torch.testing.assert_close(found.values, functional.transfer(target).values, rtol=1e-3, atol=1e-3)
    assert forwards == 4 * 2 + 4 * (2 + 2 * 10)


def test_each_control_takes_something_away(experiment):
    """What is read or learned differs exactly where the control says so."""
    trained = ("ioi", "mcqa")

    def values(**how):
        return Functional(**how).circuit(experiment, "addition", trained)[0].values

    plain = values()
    assert torch.equal(plain, values())
    for how in ({"scramble": True}, {"wrong": True}, {"teacher": "target"}, {"own": True}, {"without": ("change",)}):
        assert not torch.equal(plain, values(**how)), how
    assert Functional()._another(experiment, "addition") == "ioi"
    gold = {task: experiment.gold_of(task) for task in trained}
    blind = dfa.fit_functional(gold, {task: experiment.measured(task, "target") for task in trained}, seed=1)
    assert torch.equal(values(teacher="target"), blind.transfer(experiment.measured("addition", "target")).values)
    alone = Functional(own=True).circuit(experiment, "addition", ())[0]
    own = dfa.fit_functional(
        {"addition": experiment.scores["addition"]}, {"addition": experiment.measured("addition", "source")}, seed=1
    )
    assert torch.equal(alone.values, own.transfer(experiment.measured("addition", "target")).values)


def test_single_measurements_and_the_target_itself(experiment):
    found, _ = OneMeasurement("direct-effect").circuit(experiment, "ioi", ())
    assert torch.equal(found.values, experiment.measured("ioi", "target")["direct-effect"])
    found, forwards = OnTarget("nap").circuit(experiment, "ioi", ())
    expected = dfa.attribute(experiment.target, experiment.train["ioi"], method="nap", batch_size=8)
    assert found == expected and forwards == 4 * 3


def test_a_study(tmp_path):
    """Rows for all of them, the same when read again, and none is trained."""
    names = ("functional", "functional, source-blind", "group share alone", "nap on the target")
    chosen = {name: FUNCTIONAL[name] for name in names}
    tasks = {task: task for task in TASKS}
    run = {"seeds": (0,), "test_tasks": ["ioi"], "budget": BUDGET, "tasks": tasks, "out": tmp_path}
    table = dfa.study.run(["llama3"], chosen, **run)
    assert table["setting"].tolist() == ["gold", *chosen]
    rows = table.set_index("setting")
    assert rows.loc["functional", "trained_on"] == "mcqa addition"
    assert rows.loc["functional", "forwards"] == 4 * 2 + 4 * 22
    assert rows.loc["functional, source-blind", "control"] == "source-blind"
    assert dfa.study.run(["llama3"], chosen, **run)["cpr"].tolist() == table["cpr"].tolist()
    # all that they ask for was planned: nothing is made in passing that another worker may be making
    found = Study((ModelPair.of("llama3"),), chosen, sources(tasks), BUDGET, "cpu", torch.float32)
    planned = {unit.key for unit in Plan.of(found, (0,), ["ioi"]).units if unit.kind != "row"}
    assert {path.stem for path in (tmp_path / "units").glob("*.safetensors")} == planned


def test_scrambled_within_kinds_and_depths():
    nodes = dfa.NodeSet.for_sizes(6, 4)
    scores = dfa.NodeScores(torch.arange(30.0), nodes)
    found = dfa.controls.scrambled_within(scores, seed=3)
    assert found != scores
    for i, node in enumerate(nodes):
        origin = nodes[int(found.values[i])]
        assert origin.kind == node.kind and origin.layer // 2 == node.layer // 2
    assert sorted(found.values.tolist()) == scores.values.tolist()


def test_bad_input(experiment):
    with pytest.raises(AlignmentError, match="Task 'ioi' has no others to learn from"):
        Functional().circuit(experiment, "ioi", ())
    with pytest.raises(DfaError, match="Functional trains no W"):
        experiment.recipe(FUNCTIONAL["functional"], ("ioi",))
