"""Lock files, whether an environment is what they say, and what doctor makes of them."""

import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

import dfa_lens as dfa
from dfa_lens import doctor as diagnosis

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import lock  # noqa: E402

LOCKS = sorted((ROOT / "requirements").glob("tl*.txt"))


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_lock_files_are_plain(path):
    """name==version, sorted; no addresses, hashes, markers, or builds of a release (torch's +cpu)."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line), line
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    for name in ("pip", "setuptools", "hatchling", "torch", "transformers", "sphinx", "gguf", "pytest"):
        assert name in lock.read(path)


def test_both_ways_to_hand_on_a_key_value_cache_are_tested():
    """See LOCK_tl3 in the Makefile. And both majors of TransformerLens."""
    found = [lock.read(path) for path in LOCKS]
    releases = [tuple(int(part) for part in each["transformers"].split(".")[:2]) for each in found]
    assert min(releases) < (5, 24) <= max(releases)
    assert {each["transformer-lens"].partition(".")[0] for each in found} == {"3", "4"}


def test_what_doctor_knows_is_what_the_lock_files_say():
    assert json.loads((ROOT / "dfa_lens" / "tested.json").read_text()) == lock.tested()


@pytest.fixture
def environment(tmp_path):
    """Makes packages with versions and requirements, as installers leave them."""

    def make(**packages):
        for name, (version, *requires) in packages.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            (folder / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {each}" for each in requires]) + "\n")
        return list(distributions(path=[str(tmp_path)]))

    return make


def test_an_environment_that_is_what_it_should_be(environment):
    """Names in any spelling; a build of the release that is listed; this package itself is not."""
    found = environment(torch=["2.13.0+cpu"], Typing_Extensions=["4.16.0"], dfa_lens=["0.1.0", "torch"])
    assert lock.problems({"torch": "2.13.0", "typing-extensions": "4.16.0"}, found) == []


def test_an_environment_that_is_not(environment):
    found = environment(torch=["2.14.0"], stray=["1.0", "torch"], dfa_lens=["0.1.0", "torch", "stray"])
    assert lock.problems({"torch": "2.13.0", "einops": "0.8.2"}, found) == [
        "stray 1.0 is not in it",
        "einops 0.8.2 is missing",
        "torch is 2.14.0, not 2.13.0",
    ]


def test_what_only_this_system_needs_may_be_there(environment):
    """CUDA with torch on Linux, say, and what that needs; nothing that an extra or another system would need."""
    found = environment(
        torch=[
            "2.13.0",
            f'cuda==13.0; sys_platform == "{sys.platform}"',
            'other==1.0; sys_platform == "somewhere"',
            'extra==1.0; extra == "some"',
        ],
        cuda=["13.0", "bindings"],
        bindings=["13.0"],
        other=["1.0"],
        extra=["1.0"],
    )
    assert lock.problems({"torch": "2.13.0"}, found) == ["extra 1.0 is not in it", "other 1.0 is not in it"]


def test_writing(environment, tmp_path, monkeypatch):
    """A file that its own environment passes; doctor's file has this package's dependencies of all lock files."""
    monkeypatch.setattr(lock, "TESTED", tmp_path / "tested.json")
    monkeypatch.setattr(lock, "REQUIREMENTS", tmp_path)
    (tmp_path / "tl-old.txt").write_text("torch==2.9.0\nfsspec==4.0\n")
    found = environment(torch=["2.13.0+cpu"], fsspec=["4.3.1"], dfa_lens=["0.1.0"])
    lock.write(tmp_path / "tl-new.txt", found)
    assert (tmp_path / "tl-new.txt").read_text().splitlines()[1:] == ["fsspec==4.3.1", "torch==2.13.0"]
    assert lock.problems(lock.read(tmp_path / "tl-new.txt"), found) == []
    tested = json.loads((tmp_path / "tested.json").read_text())
    assert tested["torch"] == ["2.9.0", "2.13.0"]
    assert "fsspec" not in tested


def test_doctor_marks_what_was_not_tested(monkeypatch):
    here = {"transformers": "5.99.0", "torch": lock.tested()["torch"][0] + "+cu130", "scipy": None}
    monkeypatch.setattr(diagnosis, "_version", lambda name: here.get(name, "0.0"))
    lines = {line.split()[0]: line for line in diagnosis.lines()}
    tested = ", ".join(lock.tested()["transformers"])
    assert re.fullmatch(rf"  transformers +5\.99\.0 +{tested}   5\.99\.0 was not", lines["transformers"])
    assert not lines["torch"].endswith("was not")
    assert "NOT INSTALLED" in lines["scipy"]
    assert not lines["scipy"].endswith("was not")


def test_the_wheel_has_what_the_package_reads(tmp_path):
    """Doctor's file and the shipped models; without the network, by the build back end that is installed."""
    command = "-m pip wheel --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation"
    subprocess.run([sys.executable, *command.split(), "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dfa_lens/tested.json" in names
    for model in dfa.zoo.names():
        assert any(name.startswith("dfa_lens/zoo/") and model in name and "safetensors" in name for name in names)
