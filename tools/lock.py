"""Lock files: name==version of everything in an environment, packages that others need included.

Run by the Python of the environment in question; the Makefile does::

    python tools/lock.py check tl3   # fails unless the environment is what requirements/tl3.txt lists
    python tools/lock.py write tl3   # makes that file of what is installed
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
TESTED = ROOT / "dfa_lens" / "tested.json"  # what `dfa-lens doctor` compares with; in the wheel
OWN = "dfa-lens"
HEADER = "# Made by `make lock` with Python {python} on {system}. The ranges are in pyproject.toml and the Makefile.\n"

Versions = dict[str, str]


def installed(found: list[Distribution]) -> Versions:
    """Every package but this one, with its public version: 2.13.0 for torch's build 2.13.0+cpu."""
    names = {canonicalize_name(each.metadata["Name"]): Version(each.version).public for each in found}
    return {name: names[name] for name in sorted(names) if name != OWN}


def read(lock: Path) -> Versions:
    """The packages that a lock file lists."""
    lines = (line.partition("#")[0].strip() for line in lock.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def conditional(found: list[Distribution]) -> set[str]:
    """Packages that are here because of what this system is or which Python it has, and all that these need.

    No file lists them for every system: torch's CUDA libraries, each of them pinned by torch itself, are some.
    """
    needs = {canonicalize_name(each.metadata["Name"]): list(_requirements(each)) for each in found}
    todo = [name for each in needs.values() for name, marked in each if marked]
    known: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in known:
            known.add(name)
            todo += [other for other, _ in needs.get(name, [])]
    return known


def _requirements(package: Distribution) -> Iterator[tuple[str, bool]]:
    """What a package needs here, and whether it says that only some systems or Pythons do."""
    for requirement in map(Requirement, package.requires or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name), marker is not None


def problems(lock: Versions, found: list[Distribution]) -> list[str]:
    """How an environment differs from a lock file, a line for each package."""
    here, excused = installed(found), conditional(found)
    return [
        *(f"{name} {here[name]} is not in it" for name in here if name not in lock and name not in excused),
        *(f"{name} {lock[name]} is missing" for name in lock if name not in here),
        *(f"{name} is {here[name]}, not {lock[name]}" for name in lock if here.get(name, lock[name]) != lock[name]),
    ]


def tested() -> dict[str, list[str]]:
    """The versions of this package's own dependencies in all lock files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locks = [read(lock) for lock in sorted(REQUIREMENTS.glob("tl*.txt"))]
    versions = {}
    for name in sorted(canonicalize_name(Requirement(line).name) for line in project["dependencies"]):
        versions[name] = sorted({lock[name] for lock in locks if name in lock}, key=Version)
    return versions


def write(lock: Path, found: list[Distribution]) -> None:
    """Make a lock file, and what doctor knows of all of them."""
    header = HEADER.format(python="{}.{}".format(*sys.version_info), system=sys.platform)
    lock.write_text(header + "".join(f"{name}=={version}\n" for name, version in installed(found).items()))
    lines = (f"  {json.dumps(name)}: {json.dumps(versions)}" for name, versions in tested().items())
    TESTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["check", "write"])
    parser.add_argument("leg", help="the file's name in requirements/: tl3 or tl4")
    arguments = parser.parse_args()
    lock, found = REQUIREMENTS / f"{arguments.leg}.txt", list(distributions())
    if arguments.action == "write":
        write(lock, found)
        return
    if wrong := problems(read(lock), found):
        headline = f"The environment is not what {lock.relative_to(ROOT)} lists; `make lock` makes that file again:"
        sys.exit("\n  ".join([headline, *wrong]))


if __name__ == "__main__":
    main()
