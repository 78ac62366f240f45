"""The attack in its quick form: a few hundred of its tries. ``make attack`` makes them all."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from attack import files, interrupts, names
from helpers import BACKENDS

import dfa_lens as dfa
from dfa_lens.data.files import FileError, checked_name, file_name, held, write_atomically
from dfa_lens.errors import DfaError


@pytest.mark.parametrize("name", files.FORMATS)
def test_damaged_files_are_refused_or_as_they_were(name):
    found = files.run(100, name)
    assert not found["failed"], found


def test_names_lead_nowhere_else():
    found = names.run(60)
    assert not found["failed"] and found["taken"] and found["refused"], found


@pytest.mark.parametrize("kind", ["times", "lines"])
@pytest.mark.parametrize("backend", interrupts.EVERY_BACKEND)
def test_interrupted_models_are_as_they_were(backend, kind):
    found = interrupts.run(
        24, kind, backends=(backend,), only=("nap", "eap", "curve", "fit", "contexts", "hook points")
    )
    assert not found["failed"], found
    if kind == "lines":  # an operation may be over before its time is up
        assert found["interrupted"] > 0.8 * found["tries"]


def test_the_attack_notices_a_change():
    """A defect put in on purpose is found."""
    target = interrupts.Target(BACKENDS[0], ())
    target.operations["careless"] = lambda: target.model.requires_grad_(False)
    target.strike("careless", lambda work: work(), lambda: "here")
    assert target.changed == {f"{BACKENDS[0]}, careless: requires_grad (here)": 1}


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a\nb", "\0", "x" * 201, "=1+1", "-x", " a", "\x1b[2J", "\ud800", 7, None])
def test_names_that_can_t_stand_in_a_table(name):
    with pytest.raises(DfaError, match="The name of a setting must") as caught:
        checked_name(name, "setting")
    assert len(str(caught.value)) < 250 and str(caught.value).isprintable()


def test_names_become_files():
    odd = ["a/b", "../../x", "/etc/passwd", "a\\b", "CON", "x" * 200, "a.", "é", "a b"]
    assert [file_name(name) for name in ("llama3", "qwen2.5", "a-b_c")] == ["llama3", "qwen2.5", "a-b_c"]
    found = {file_name(name) for name in odd}
    assert len(found) == len(odd) and all("/" not in each and "\\" not in each and len(each) < 60 for each in found)


# --- files ---------------------------------------------------------------------------------------------------------


def test_links_and_modes_of_files_stay(tmp_path):
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "file", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_atomically(link, b"new")
    assert link.is_symlink() and real.read_bytes() == b"new" and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert [path.name for path in real.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("path", ["", ".", "a\0b", "x" * 5000, "file/below"])
def test_what_can_t_be_written_is_one_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="Can't write") as caught:
        write_atomically(path, b"")
    assert len(str(caught.value)) < 600
    with pytest.raises(FileError, match="Can't write"):
        dfa.plots.scores_heatmap(dfa.controls.random_scores(dfa.NodeSet.for_sizes(1, 1))).write_html(path)


def test_a_full_disk_is_one_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(handle, mode):
        os.close(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(FileError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_held_by_one_process_at_a_time(tmp_path):
    """And let go when that process is killed."""
    code = f"import sys, time; sys.path.insert(0, {os.path.dirname(os.path.dirname(dfa.__file__))!r})\n"
    code += f"from pathlib import Path; from dfa_lens.data.files import held\nwith held(Path({str(tmp_path)!r}) / 'lock', 'no'):\n"
    code += "    print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(FileError, match="somebody has it"), held(tmp_path / "lock", "somebody has it"):
        pass
    process.kill()
    process.communicate()
    with held(tmp_path / "lock", "somebody has it", wait=5):
        pass


def test_a_byte_order_mark_is_no_damage(tmp_path):
    path = tmp_path / "mib.json"
    made = dfa.controls.uniform(dfa.NodeSet.for_sizes(1, 2, with_input=True))
    made.to_mib(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert dfa.NodeScores.from_mib(path) == made


@pytest.mark.parametrize("sizes", [(10**7, 2), (2, 10**7), (10**300, 1)])
def test_sizes_are_compared_with_the_file_first(tmp_path, sizes):
    path = tmp_path / "graph.json"
    files._edges().to_mib(path)
    content = json.loads(path.read_text())
    content["cfg"] |= {"n_layers": sizes[0], "n_heads": sizes[1]}
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match="edges"):
        dfa.EdgeScores.from_mib(path)


@pytest.mark.parametrize(
    "W", [torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.complex64), [[1.0]], None]
)
def test_a_released_file_has_a_matrix_of_numbers(tmp_path, W):
    torch.save({"W": W, "small_nodes": ["m0"], "large_nodes": ["m0"]}, tmp_path / "w.pt")
    with pytest.raises(FileError, match="its W is"):
        dfa.Alignment.from_released(tmp_path / "w.pt")


@pytest.mark.parametrize("key", ["edges_scores", "edges_in_graph"])
def test_a_graph_has_numbers_and_booleans(tmp_path, key):
    files._edges().to_mib(tmp_path / "g.pt")
    content = torch.load(tmp_path / "g.pt", weights_only=True)
    torch.save(content | {key: content[key].to(torch.int32)}, tmp_path / "g.pt")
    with pytest.raises(FileError, match="not numbers and booleans"):
        dfa.EdgeScores.from_mib(tmp_path / "g.pt")


def test_a_description_that_was_damaged_is_refused(tmp_path):
    from dfa_lens.experiments import study

    path = tmp_path / "study.json"
    files._description(path)
    assert study._description(path)["budget"]["train"] == study.QUICK.train
    path.write_text(path.read_text().replace('"train": 8', '"train": 9'))
    with pytest.raises(FileError, match="was damaged after it was written"):
        study._description(path)


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["attribute", "--model", "llama3-tiny-source", "--task", "ioi", "--out"],
        ["transfer", "--alignment", "none", "--scores", "none", "--out"],
        ["evaluate", "--model", "llama3-tiny-source", "--scores", "none", "--task", "ioi", "--out"],
        ["report", "--source", "none", "--target", "none", "--out"],
    ],
)
def test_outputs_are_checked_before_the_work(command, tmp_path, monkeypatch, capsys):
    from dfa_lens import cli

    monkeypatch.setattr(sys, "argv", ["dfa-lens", *command, str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "it is a folder" in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize("command", ["demo", "study"])
def test_folders_are_checked_before_the_work(command, tmp_path, monkeypatch, capsys):
    from dfa_lens import cli

    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["dfa-lens", command, "--quick", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "it is a file" in capsys.readouterr().err


def test_a_terminal_gets_no_control_characters(tmp_path, monkeypatch, capsys):
    from dfa_lens import cli

    odd = tmp_path / "a\x1b[2Jb"
    monkeypatch.setattr(
        sys, "argv", ["dfa-lens", "report", "--source", str(odd), "--target", "x", "--out", str(tmp_path / "y")]
    )
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\\x1b[2J" in shown
    with pytest.raises(DfaError, match="one line"):
        dfa.NodeSet([dfa.data.nodes.Node("a\x1b[2J", "p", "head", 0)])
