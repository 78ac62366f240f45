"""Tasks of one's own: files, functions, and the command line and studies that take them."""

import json
import pickle

import pandas as pd
import pytest
from helpers import unchecked
from typer.testing import CliRunner

import dfa_lens as dfa
from dfa_lens.cli import app
from dfa_lens.errors import DfaError, FileError, PromptError, TaskError
from dfa_lens.experiments import study
from dfa_lens.experiments.study import Budget, Experiment, Setting
from dfa_lens.tasks.own import FileTask, sources

TINY = Budget(train=4, test=4, steps=1, curve_points=2, batch_size=4)


def records(n=12, splits=False):
    drawn = dfa.tasks.examples("addition", n=n, seed=5)
    made = [{"clean": e.clean, "corrupt": e.corrupt, "answer": e.answer, "wrong": e.wrong} for e in drawn]
    if splits:
        made = [record | {"split": "train" if i < n // 2 else "test"} for i, record in enumerate(made)]
    return made


def written(path, rows):
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.mark.parametrize("name", ["sums.csv", "sums.jsonl"])
def test_a_file_gives_the_pairs_of_its_texts(tmp_path, zoo_target, name):
    rows = records()
    task = FileTask.read(written(tmp_path / name, rows))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert task(zoo_target.tokenizer) == dfa.PromptPairs.from_strings(zoo_target.tokenizer, **columns)
    some = task(zoo_target.tokenizer, n=5, seed=3)
    assert len(some) == 5 and some == task(zoo_target.tokenizer, n=5, seed=3)
    assert some != task(zoo_target.tokenizer, n=5, seed=4)
    assert len(task(zoo_target.tokenizer, n=500)) == 12
    assert pickle.loads(pickle.dumps(task)) == task
    assert FileTask.read(written(tmp_path / name, rows[1:])).rows != task.rows  # it goes by what is in it


def test_both_kinds_of_file_hold_the_same(tmp_path):
    """A cell with a comma, a quote, a line break and letters beyond ASCII."""
    rows = [{"clean": 'a, "b"\n é', "corrupt": "c\td", "answer": " x", "wrong": " y", "split": "test"}]
    found = [FileTask.read(written(tmp_path / name, rows)).rows for name in ("a.csv", "a.jsonl")]
    assert found[0] == found[1] == ((rows[0]["clean"], "c\td", " x", " y", "test"),)


def test_splits(tmp_path, zoo_target):
    task = FileTask.read(written(tmp_path / "sums.csv", records(splits=True)))
    train, test = (task(zoo_target.tokenizer, split=split) for split in ("train", "test"))
    assert len(train) == len(test) == 6 and not set(map(tuple, train.clean.tolist())) & set(
        map(tuple, test.clean.tolist())
    )
    with pytest.raises(TaskError, match="has no rows of split 'validation'; it has 'test', 'train'"):
        task(zoo_target.tokenizer, split="validation")
    whole = FileTask.read(written(tmp_path / "whole.csv", records()))
    with pytest.raises(TaskError, match=r"whole\.csv has no column 'split'"):
        whole(zoo_target.tokenizer, split="train")
    with pytest.raises(TaskError, match="n must be at least 1"):
        whole(zoo_target.tokenizer, n=0)
    unknown = FileTask((("Zyx 1 1", "Zyx 1 2", " 2", " 3", ""),), "file.csv")
    with pytest.raises(PromptError, match=r"file\.csv: Pair 0: clean has a word"):
        unknown(zoo_target.tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.csv", None, FileError, "There is no file"),
        ("a.xlsx", b"", FileError, "must end in .csv"),
        ("a.csv", b"", TaskError, "has no rows"),
        ("a.csv", b"clean,corrupt,answer,wrong\n", TaskError, "has no rows"),
        ("a.csv", b"clean,corrupt,answer\na,b,c\n", TaskError, "line 2: there is no 'wrong'; it has 'clean'"),
        ("a.csv", b"clean,corrupt,answer,wrong\na,b,c\n", FileError, "line 2 has not as many cells as the header"),
        ("a.csv", b"clean,corrupt,answer,wrong\na,b,c,d,e\n", FileError, "line 2 has not as many cells"),
        ("a.csv", b'clean,corrupt,answer,wrong\n"a,b,c,d\n', FileError, "is not a table of prompts"),
        ("a.csv", b"clean,corrupt,answer,wrong\na,b,,d\n", TaskError, "line 2: answer must be a text, not ''"),
        ("a.csv", b"clean,corrupt\xff", FileError, "byte 13 is no UTF-8"),
        ("a.csv", b"\0\0\n\0\n", (FileError, TaskError), "a.csv"),
        ("a.jsonl", b"{", FileError, "line 1 is no JSON"),
        ("a.jsonl", b"[1]\n", FileError, "line 1 holds a list, not an object"),
        ("a.jsonl", b"[" * 100_000, FileError, "line 1 is no JSON"),
        ("a.jsonl", b'\n{"clean": "a", "corrupt": "b", "answer": 3, "wrong": " 4"}', TaskError, "line 2: answer must be"),
    ],
)  # fmt: skip
def test_bad_files_are_one_error(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        FileTask.read(tmp_path / name)
    assert len(str(caught.value)) < 400


def capitals(tokenizer, *, split, n, seed):
    """A task of one's own, as a function."""
    return dfa.tasks.load("subtraction", tokenizer, split=split, n=n, seed=seed + 7)


def test_sources_are_ours_by_name_and_ones_own(zoo_target):
    made = sources({"mine": capitals, "sums": "addition"})
    ours = dfa.tasks.load("addition", zoo_target.tokenizer, split="test", n=3, seed=2)
    assert made["sums"](zoo_target.tokenizer, split="test", n=3, seed=2) == ours
    assert made["mine"] is capitals and tuple(sources(None)) == dfa.tasks.names()
    with pytest.raises(TaskError, match="Unknown task 'add'"):
        sources({"mine": "add"})
    with pytest.raises(TaskError, match="Task 'mine' must be a name or a function"):
        unchecked(sources)({"mine": 3})
    with pytest.raises(TaskError, match="There are no tasks"):
        sources({})
    with pytest.raises(TaskError, match="The source of task 'mine' made a list"):
        Experiment("llama3", tasks={"mine": lambda *_, **__: []}).test("mine")


def test_a_study_of_own_tasks(tmp_path):
    """Zero-shot trains on the others, own and ours; what is tested is the file's test split."""
    rows = records(splits=True)
    tasks = {"file": FileTask.read(written(tmp_path / "sums.csv", rows)), "mine": capitals, "ioi": "ioi"}
    settings = {"zero-shot": Setting("zero-shot")}
    options = {"seeds": [0], "budget": TINY, "tasks": tasks, "out": tmp_path / "out"}
    found = study.run(["llama3"], settings, test_tasks=["file"], **options).set_index("setting")
    assert found.loc["zero-shot", "trained_on"] == "mine ioi" and found.loc["gold", "task"] == "file"
    target = dfa.zoo.load("llama3-tiny-target")
    experiment = Experiment("llama3", 0, TINY, tasks=tasks)
    gold = experiment.gold_of("file")
    test = tasks["file"](target.tokenizer, split="test", n=4, seed=0)
    curve = dfa.faithfulness_curve(target, test, gold, sizes=[0, 55, 110])
    assert found.loc["gold", "cpr"] == pytest.approx(curve.cpr, abs=1e-5)
    with pytest.raises(TaskError, match="Unknown task 'addition'"):
        study.run(["llama3"], settings, test_tasks=["addition"], **options)
    changed = FileTask.read(written(tmp_path / "sums.csv", rows[:-1]))
    with pytest.raises(DfaError, match="made with another task 'file'"):
        study.run(["llama3"], settings, **(options | {"tasks": tasks | {"file": changed}}))
    with pytest.raises(DfaError, match="made with another set of tasks"):
        study.run(["llama3"], settings, **(options | {"tasks": {"ioi": "ioi"}}))


def test_a_study_of_one_task():
    """In-distribution is all there is; what is shared between tasks is not known of one."""
    settings = {"in-distribution": Setting("in-distribution"), "zero-shot": Setting("zero-shot")}
    found = study.run(["llama3"], settings, seeds=[0], budget=TINY, tasks={"mine": capitals})
    assert found["setting"].tolist() == ["gold", "in-distribution"]
    assert found["shared"].isna().all() and found["effective_rank"].notna().sum() == 1


def test_the_command_line_takes_files_of_pairs(tmp_path, monkeypatch):
    """attribute → fit → transfer → evaluate on a task that only a file knows; the scores are those of the library."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "sums.csv", records())
    for arguments in (
        "attribute --model llama3-tiny-source --pairs sums.csv --out s.safetensors -n 6 --batch-size 3 --dtype float64",
        "fit --target llama3-tiny-target --scores sums=s.safetensors --pairs sums=sums.csv --out w.safetensors --steps 2 "
        "--batch-size 5",
        "transfer --alignment w.safetensors --scores s.safetensors --out t.safetensors",
        "evaluate --model llama3-tiny-target --scores t.safetensors --pairs sums.csv -n 4 --batch-size auto --device cpu",
    ):
        done = CliRunner().invoke(app, arguments.split(), catch_exceptions=False)
        assert done.exit_code == 0, done.output
    source = dfa.zoo.load("llama3-tiny-source")
    pairs = FileTask.read(tmp_path / "sums.csv")(source.tokenizer, n=6)
    expected = dfa.attribute(source, pairs).values
    found = dfa.NodeScores.load(tmp_path / "s.safetensors").values
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    meta = dfa.Alignment.load(tmp_path / "w.safetensors").meta
    assert meta.items() >= dfa.Recipe(steps=2, batch_size=5, sparsity_weight=10.0).to_meta().items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("attribute --model llama3-tiny-source --out s", "Give either --task or --pairs."),
        ("attribute --model llama3-tiny-source --task ioi --pairs a.csv --out s", "Give either --task or --pairs."),
        ("attribute --model llama3-tiny-source --pairs none.csv --out s", "There is no file none.csv."),
        ("attribute --model llama3-tiny-source --task ioi --out s --dtype half", "Unknown dtype 'half'"),
        ("attribute --model llama3-tiny-source --task ioi --out s --batch-size many", "--batch-size must be a number or"),
        ("fit --target llama3-tiny-target --scores ioi --out w", "Scores are given as TASK=FILE, not 'ioi'."),
        ("fit --target x --scores a=1 --scores a=2 --out w", "Scores of task 'a' are given twice."),
        ("study --out o --pairs a.csv", "Pairs are given as TASK=FILE, not 'a.csv'."),
        ("demo --pairs mine=none.csv", "There is no file none.csv."),
        ("demo --collection hub", "Unknown collection 'hub'"),
    ],
)  # fmt: skip
def test_command_line_errors(tmp_path, monkeypatch, arguments, message):
    """One of ours, which `main` makes a line of."""
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, arguments.split()).exception
    assert isinstance(found, DfaError) and str(found).startswith(message)
