"""The one table: what rows of a study, of the demo and of a report have in common."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from helpers import made_curve

import dfa_lens as dfa
from dfa_lens.errors import FileError
from dfa_lens.experiments import table
from dfa_lens.experiments.table import COLUMNS, NUMBERS, WORDS, Results, TaskResult

CURVE = made_curve([[0.0, 0], [1, 1], [2, 2]], clean=[2, 2], corrupt=[0, 0], sizes=[0, 1, 2], n_nodes=2)


def test_a_row_has_all_columns_in_order():
    made = table.row(task="ioi", cpr=0.5, seed=3)
    assert list(made) == list(COLUMNS) and made["task"] == "ioi" and made["seed"] == 3
    assert all(made[name] == "" for name in WORDS if name != "task")
    assert all(np.isnan(made[name]) for name in NUMBERS if name not in ("cpr", "seed"))
    with pytest.raises(KeyError, match="no column 'cprr'"):
        table.row(cprr=0.5)
    assert list(table.frame([]).columns) == list(COLUMNS)


def test_what_a_curve_says_is_in_columns():
    found = table.measured(CURVE, 2.0)
    assert found.keys() <= COLUMNS.keys()
    assert found["cpr"] == CURVE.cpr and found["recovery"] == CURVE.cpr / 2 and found["examples"] == 2
    assert np.isnan(table.measured(CURVE, 0.0)["recovery"])


def test_rows_survive_their_file(tmp_path):
    """Written and read again, word for word and number for number, also where words look like numbers."""
    path = tmp_path / "rows.csv"
    rows = [
        table.row(family="1.5", seed=0, task="NA", setting="a, b", cpr=0.1, forwards=7),
        table.row(family="llama3", seed=1, task="ioi", setting='"x"', trained_on="a b", cpr=1 / 3),
    ]
    expected = table.frame(rows)
    expected.to_csv(path, index=False)
    pd.testing.assert_frame_equal(table.read(path), expected, check_dtype=False)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(FileError, match=r"rows\.csv is not a table of a study: its columns are a, b"):
        table.read(path)


ROWS = [table.row(family="llama3", seed=0, task=task, setting="gold", cpr=0.5) for task in ("a", "b")]


def test_doubled_and_infinite_rows_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    table.frame([*ROWS, ROWS[0]]).to_csv(path, index=False)
    with pytest.raises(FileError, match="the row of setting 'gold', task 'a', seed 0 twice"):
        table.read(path)
    table.frame([table.row(**(ROWS[0] | {"cpr": np.inf}))]).to_csv(path, index=False)
    with pytest.raises(FileError, match="cpr is infinite"):
        table.read(path)
    table.frame(ROWS).assign(more=1).to_csv(path, index=False)
    with pytest.raises(FileError, match="a column 'more' too much"):
        table.read(path)


def test_rows_that_an_earlier_version_appended_are_read(tmp_path):
    """Each with a checksum of its own."""
    path = tmp_path / "rows.csv"
    line = table.frame(ROWS[:1]).to_csv(index=False, header=False, lineterminator="\n")[:-1]
    checksum = hashlib.blake2b(line.encode(), digest_size=6).hexdigest()
    path.write_text(",".join(COLUMNS) + f",checksum\n{line},{checksum}\n")
    pd.testing.assert_frame_equal(table.read(path), table.frame(ROWS[:1]), check_dtype=False)
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(FileError, match="line 2 was damaged after it was written"):
        table.read(path)


def test_the_demo_and_studies_have_one_schema():
    nodes = dfa.NodeSet.for_sizes(1, 1)
    scores = dfa.controls.uniform(nodes)
    curves = {"gold": CURVE, "zero-shot": CURVE}
    labels = {"zero-shot": {"regime": "zero-shot", "forwards": 12}}
    result = TaskResult("llama3", "ioi", scores, scores, {}, {"zero-shot": scores}, curves, 0, labels)
    found = Results([result]).table()
    assert list(found.columns) == list(COLUMNS)
    assert found["forwards"].tolist()[1] == 12 and found["regime"].tolist() == ["", "zero-shot"]


def test_means_and_summary():
    rows = [
        table.row(family=family, task=task, setting=setting, cpr=cpr, cmd=0.0, kl=0.0, floor=0.1)
        for family, task, setting, cpr in (
            ("a", "x", "gold", 1.0), ("a", "y", "gold", 0.5), ("a", "x", "s", 0.2), ("a", "y", "s", 0.4), ("b", "x", "gold", 2.0),
        )
    ]  # fmt: skip
    found = table.frame(rows)
    assert table.means(found)["cpr"]["mean"].to_dict() == pytest.approx({"gold": 3.5 / 3, "s": 0.3})
    wide = table.summary(found)
    assert list(wide.columns) == ["gold", "s", "floor"]
    assert list(wide.index) == [("a", "x"), ("a", "y"), ("a", "mean"), ("b", "x")]
    assert wide.loc[("a", "mean"), "s"] == pytest.approx(0.3)


def test_recovery_is_a_ratio_of_means():
    """By hand: one task where gold is weak, one where it is strong, two seeds each, a family apart."""
    rows = [
        ("llama3", 0, "a", "gold", 0.1), ("llama3", 0, "b", "gold", 0.9),
        ("llama3", 1, "a", "gold", 0.3), ("llama3", 1, "b", "gold", 0.7),
        ("llama3", 0, "a", "s", 0.2), ("llama3", 0, "b", "s", 0.6),
        ("llama3", 1, "a", "s", 0.3), ("llama3", 1, "b", "s", 0.7),
        ("qwen2.5", 0, "a", "gold", -0.1), ("qwen2.5", 0, "a", "s", 0.5),
    ]  # fmt: skip
    made = pd.DataFrame(rows, columns=["family", "seed", "task", "setting", "cpr"])
    found = table.recovery(made[made["family"] == "llama3"])
    assert found.loc["s", "recovery"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.7) / (0.1 + 0.9 + 0.3 + 0.7))
    assert found.loc["s", ["rows", "weak_gold"]].tolist() == [4, 2]
    by_task = table.recovery(made, ["setting", "family", "task"])["recovery"]
    assert by_task["s", "llama3", "a"] == pytest.approx(0.5 / 0.4)
    assert np.isnan(by_task["s", "qwen2.5", "a"])  # gold is below zero
    assert "gold" not in found.index
    assert table.over(made) == "2 tasks, 2 families, 2 seeds"
    # a mean of ratios would say otherwise
    assert found.loc["s", "recovery"] < np.mean([2, 0.6 / 0.9, 1, 1])


def test_bars_of_recovery():
    rows = [
        (family, seed, task, setting, cpr, cpr / gold)
        for family, golds in (("llama3", {"a": 0.4, "b": 0.8}), ("qwen2.5", {"a": 0.8, "b": 0.8}))
        for seed in (0, 1)
        for task, gold in golds.items()
        for setting, cpr in (("gold", gold), ("s", gold - 0.1 * seed))
    ]
    made = pd.DataFrame(rows, columns=["family", "seed", "task", "setting", "cpr", "recovery"])
    bar = dfa.plots.recovery_bars(made).data[0]
    assert list(bar.x) == ["llama3: a *", "llama3: b", "qwen2.5: a", "qwen2.5: b"]
    assert list(bar.y) == pytest.approx([0.7 / 0.8, 1.5 / 1.6, 1.5 / 1.6, 1.5 / 1.6])
    assert bar.error_y.array is not None
    one = dfa.plots.recovery_bars(made[(made["seed"] == 1) & (made["family"] == "qwen2.5")])
    assert list(one.data[0].x) == ["a", "b"]
    assert one.data[0].error_y.array is None
    assert len(one.data) == 1
