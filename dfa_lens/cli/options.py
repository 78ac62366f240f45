"""The options that commands share, and what is asked of them before the work begins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dfa_lens.cli.writing import STANDARD_OUTPUT
from dfa_lens.data.files import writable
from dfa_lens.errors import DfaError, ModelError, short, unknown

#: More examples than any task has, or a figure needs: a slip of the finger otherwise runs for hours.
MOST_EXAMPLES = 20_000


def out_file(path: Path | None) -> Path | None:
    """Asked before the work: that a file can't be written is not to be learned after it."""
    return path if path is None or path == STANDARD_OUTPUT else writable(path)


def out_folder(path: Path | None) -> Path | None:
    """The same of a folder."""
    return path if path is None else writable(path, folder=True)


def examples(parameter: typer.CallbackParam, number: int) -> int:
    """A number of prompt pairs."""
    if not 1 <= number <= MOST_EXAMPLES:
        raise DfaError(f"--{parameter.name} is between 1 and {MOST_EXAMPLES:,}, not {number:,}.")
    return number


def _workers(number: int) -> int:
    if number < 1:
        raise DfaError(f"--workers is the number of processes, at least 1, not {number}.")
    return number


def at_least_one(number: int | None) -> int | None:
    """A number of examples a pass, if one is given."""
    if number is not None and number < 1:
        raise DfaError(f"--batch-size is the number of examples a pass, at least 1, not {number}.")
    return number


def maybe_workers(number: int | None) -> int | None:
    """The number of processes, if one is given."""
    return None if number is None else _workers(number)


def dtype_of(name: str) -> Any:
    """The torch dtype of a name."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in known:
        raise unknown("dtype", name, known, ModelError)
    return known[name]


def bars(quiet: bool) -> bool:
    """Whether to show progress: to somebody who looks on, and has not said ``--quiet``."""
    return sys.stderr.isatty() and not quiet


def batch_size_of(given: str) -> Any:
    """A number, or "auto"."""
    if given != "auto" and not (given.isdecimal() and len(given) < 10):
        raise DfaError(f"--batch-size must be a number or auto, not {short(given)!r}.")
    return given if given == "auto" else int(given)


ModelOption = Annotated[str, typer.Option(help="A shipped model, a checkpoint folder, or a Hugging Face name.")]
TaskOption = Annotated[
    str | None,
    typer.Option(
        help="ioi, mcqa, addition, subtraction, arc-easy, arc-challenge, or a further offline task; or give --pairs."
    ),
]
PairsOption = Annotated[
    Path | None,
    typer.Option(help="Instead of a task: a .csv or .jsonl file with the columns clean, corrupt, answer and wrong."),
]
NamedPairsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="TASK=FILE, a task of your own, as .csv or .jsonl with the columns clean, corrupt, answer and wrong."
    ),
]
NodesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Nodes to score: a name or pattern (a3.*, m*), or a hook point with the axis that is cut into nodes "
        "(blocks.{layer}.attn.hook_v=2); may be given several times. Default: all heads and MLP blocks."
    ),
]
ModelPairOption = Annotated[
    list[str] | None,
    typer.Option("--models", help="NAME=SOURCE,TARGET, a pair of models of your own, as --model takes them."),
]
AblationOption = Annotated[
    str,
    typer.Option(
        help="What stands in the place of nodes that are left out: corrupt, zero, mean, mean-positional or optimal; "
        "the last three are taken from the prompt pairs at hand."
    ),
]
MetricOption = Annotated[
    str,
    typer.Option(
        help="logit-difference, normalised-logit-difference, probability-difference, log-probability-difference, "
        "log-probability, kl, js, top-1-accuracy, top-5-accuracy, or greater-than: the probability of the two-digit "
        "numbers above the wrong answer, less that of the others."
    ),
]
ControlOption = Annotated[
    bool,
    typer.Option(
        "--control", help="Random answers in the place of the task's, as MIB's control: what is left is chance."
    ),
]
CollectionOption = Annotated[str, typer.Option(help="Where the tasks come from: offline, or mib (Hugging Face hub).")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, …")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64: of the weights.")]
BatchOption = Annotated[str, typer.Option(help="Examples a pass, or auto: what fits into memory.")]
MaybeBatchOption = Annotated[
    int | None, typer.Option(help="Examples a pass, of attribution and curves.", callback=at_least_one)
]
SplitOption = Annotated[str, typer.Option(help="train, validation or test.")]
ExamplesOption = Annotated[int, typer.Option("--examples", "-n", help="Prompt pairs.", callback=examples)]
SeedOption = Annotated[int, typer.Option(help="Of prompts and training.")]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="File to write, or - for standard output.", callback=out_file)
]
MaybeOutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Write the curve as CSV; - is standard output.", callback=out_file)
]
FolderOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", callback=out_folder)]
MaybeFolderOption = Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.", callback=out_folder)]
WorkersOption = Annotated[int, typer.Option(help="Processes.", callback=_workers)]
BackendOption = Annotated[str, typer.Option(help="auto, hooked, bridge or transformers.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars (off a terminal there are none).")]
