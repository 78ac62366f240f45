"""``python -m attack [files|interrupts|studies|names …] [--share 0.1] [--seed 0]``; make attack ARGS="interrupts"."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parts(share: float, seed: int) -> dict[str, dict[str, Callable[[], dict[str, Any]]]]:
    """Part → what is tried in it, with the numbers of tries of docs/reliability.md times ``share``."""
    from attack import files, interrupts, names, studies

    def n(full: int) -> int:
        return max(1, round(full * share))

    return {
        "files": {name: partial(files.run, n(10_000), name, seed) for name in files.FORMATS},
        "names": {"names and paths": partial(names.run, n(2_000), seed)},
        "interrupts": {
            "at random times": partial(interrupts.run, n(2_000), "times", seed),
            "at random lines": partial(interrupts.run, n(1_000), "lines", seed),
        },
        "studies": {"killed and resumed": partial(studies.run, n(100), seed)},
    }


def main() -> int:
    """Run the parts that are asked for, or all; 1 if anything did not hold."""
    reader = argparse.ArgumentParser(prog="make attack")
    reader.add_argument("part", nargs="*", help="files, names, interrupts or studies; default: all")
    reader.add_argument("--share", type=float, default=1.0, help="of the tries")
    reader.add_argument("--seed", type=int, default=0)
    given = reader.parse_args()
    every = parts(given.share, given.seed)
    if unknown := set(given.part) - every.keys():
        reader.error(f"there is no part {', '.join(sorted(unknown))}")
    failed = 0
    for part in given.part or every:
        for name, run in every[part].items():
            found = run()
            failed += found["failed"]
            print(json.dumps({"part": part, "what": name, **found}), flush=True)
    print(f"{failed} that did not hold")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
