"""Files that were damaged, or made by somebody else: each is read as it was written, or one DfaError says what is wrong.

Two kinds of mutation: of bytes (flipped, replaced, put in, cut out, doubled, cut off), after which a file of ours must be
refused or hold what it held; and of content (a number, name or part replaced by a hostile one, without a checksum), after
which it must be refused, or read, within 2 seconds and 500 MB.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

import dfa_lens as dfa
from dfa_lens.data.inspection import TokenLogit
from dfa_lens.errors import DfaError
from dfa_lens.experiments import study, table
from dfa_lens.experiments.folder import read_checked, write_checked
from dfa_lens.tasks.own import FileTask

SECONDS, BYTES, LETTERS = 2.0, 500 * 10**6, 1000

HOSTILE: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 999, 10**4, 10**7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None,
    "", "0", "nan", "x" * 10**6, "../../escaped", "/etc/passwd", "\0", "\x1b[2J", "=1+1", "a99999.h9999", "a999999.h999999", "\ud800",
    "input", "m0", [], {}, [[]], [0] * 10**4, {"a": {"b": {}}},
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One kind of file: how it is written, read and compared, and its content as JSON-like parts."""

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    suffix: str = ""
    ours: bool = True  #: has a checksum, so that no damaged value may come through
    same: Callable[[Any, Any], bool] = lambda a, b: a == b
    content: Callable[[bytes, random.Random], bytes] | None = None


# --- mutations -----------------------------------------------------------------------------------------------------


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three places of a file damaged."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, width = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 8, 100))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(width) + data[at + width :]
        elif kind == 2:
            data = data[:at] + rng.randbytes(width) + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + width :]
        elif kind == 4:
            data = data[:at] + data[at : at + width] + data[at:]
        else:
            data = data[:at]
    return data


def of_value(value: Any, rng: random.Random) -> Any:
    """One part of a JSON-like value replaced, left out, doubled or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {name: each for name, each in value.items() if name != key}
        if kind == 1:
            return {(str(rng.choice(HOSTILE)) if name == key else name): each for name, each in value.items()}
        return value | {key: of_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at, kind = rng.randrange(len(value)), rng.randrange(8)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value, value[at]]
        return [*value[:at], of_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(HOSTILE)


def of_json(data: bytes, rng: random.Random) -> bytes:
    """The content of a JSON file, without a checksum."""
    value = json.loads(data)
    value.pop("checksum", None)
    text = json.dumps(of_value(value, rng))
    if rng.random() < 0.1:
        text = text.replace('"', '"cfg": 1, "', 1) if rng.random() < 0.5 else "\ufeff" + text
    return text.encode("utf-8", "surrogatepass")


def of_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Another shape or dtype, or a value that is no number."""
    kind = rng.randrange(6)
    if kind == 0:
        return tensor.to(rng.choice((torch.int32, torch.bool, torch.complex64, torch.float16, torch.float64)))
    if kind == 1:
        return tensor.flatten()[: rng.randrange(tensor.numel() + 1)].clone()
    if kind == 2:
        return tensor.reshape(-1, 1)
    tensor = tensor.clone()
    if tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38))
    return tensor


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A tensor or a part of the metadata, without a checksum."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with safe_open(file.name, framework="pt") as opened:
            metadata = dict(opened.metadata())
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    metadata.pop("checksum")
    if rng.random() < 0.4:
        name = rng.choice(list(tensors))
        tensors[name] = of_tensor(tensors[name], rng)
    else:
        name = rng.choice([name for name in metadata if name != "format"])
        try:
            metadata[name] = json.dumps(of_value(json.loads(metadata[name]), rng))
        except json.JSONDecodeError:  # a name, as it is
            metadata[name] = str(of_value(metadata[name], rng)).encode("utf-8", "replace").decode()
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def of_pt(data: bytes, rng: random.Random) -> bytes:
    """A part of a dictionary that torch saved."""
    value = torch.load(io.BytesIO(data), weights_only=True)
    key = rng.choice(list(value))
    value[key] = of_tensor(value[key], rng) if isinstance(value[key], torch.Tensor) else of_value(value[key], rng)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def of_rows(data: bytes, rng: random.Random) -> bytes:
    """A cell of a table, or a row."""
    lines = [line.split(",") for line in data.decode().splitlines()]
    at = rng.randrange(len(lines))
    lines[at][rng.randrange(len(lines[at]))] = str(rng.choice(HOSTILE))
    if rng.random() < 0.1:
        lines.append(rng.choice(lines))
    return "".join(",".join(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")


# --- formats -------------------------------------------------------------------------------------------------------

A, B = dfa.NodeSet.for_sizes(2, 2), dfa.NodeSet.for_sizes(2, 3)
INPUT = dfa.NodeSet.for_sizes(1, 2, with_input=True)


def _alignment() -> dfa.Alignment:
    return dfa.controls.random_w(B, A) @ dfa.Alignment.of(
        torch.arange(48.0).reshape(6, 8), A, B, bias=torch.ones(8), history=[{"step": 0}]
    )


def _edges(kv_heads: int = 2) -> dfa.EdgeScores:
    edges = dfa.EdgeSet(1, 2, kv_heads)
    values = torch.full(edges.shape, torch.nan)
    values[edges.chosen] = torch.arange(float(len(edges)))
    return dfa.EdgeScores(values, edges)


def _some_edges(path: Path) -> None:
    whole = _edges(1)
    chosen = whole.edges["a0.*", "*"]
    dfa.EdgeScores(whole.values.where(chosen.chosen, torch.nan), chosen).save(path)


def _edge_alignment() -> dfa.EdgeAlignment:
    whole = dfa.EdgeSet(1, 2, 1)
    return dfa.controls.random_w(whole, dfa.EdgeSet(1, 3)) @ dfa.controls.random_w(dfa.EdgeSet(2, 2), whole)


def _measurements() -> dfa.Measurements:
    values = torch.rand(len(B), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return dfa.Measurements(values, B, ["change", "group-share"])


def _functional(reader: str) -> dfa.FunctionalAlignment:
    measured = dict.fromkeys(("a", "b"), _measurements())
    scores = {task: dfa.controls.random_scores(B, seed=i) for i, task in enumerate(measured)}
    options = {"trees": {"trees": 2}, "attention": {"steps": 2}}[reader]
    return dfa.fit_functional(scores, measured, reader=reader, **options)


def _circuit() -> dfa.Circuit:
    return dfa.controls.random_scores(B).circuit(2)


def _edge_circuit() -> dfa.EdgeCircuit:
    return _edges(1).circuit(3)


def _inspection() -> dfa.Inspection:
    named = ((TokenLogit(" a", 3, 0.5), TokenLogit("b\n", 1, -0.25)),) * len(A)
    patterns = torch.eye(2).expand(4, 2, 2)
    return dfa.Inspection(A, ("<bos>", " a"), " a", " b", torch.arange(6.0), named, named, patterns)


def _released(path: Path) -> None:
    nodes = ["a0.h0", "a0.h1", "m0", "input"]
    torch.save({"W": torch.ones(4, 2), "small_nodes": nodes, "large_nodes": ["m0", "m1"], "meta": {"lr": 0.1}}, path)


def _description(path: Path) -> None:
    made = study.Study(
        (study.ModelPair.of("llama3"),), {"a": study.Setting(), "b": study.Setting(control="random-w")},
        study.sources({"ioi": "ioi"}), study.QUICK, "cpu", torch.float32,
    )  # fmt: skip
    study._check_folder(path.parent / "study", made)
    shutil.copy(path.parent / "study" / "study.json", path)


def _unit(path: Path) -> None:
    columns = {**table.row(cpr=0.1, forwards=7), "seed": 1}
    write_checked(path, {"unit": "gold on ioi", "worker": "me", "took": 1.5, "columns": columns, "seconds": 1.25})


def _read_unit(path: Path) -> Any:
    return read_checked(path, "a unit of a study")


def _table(path: Path) -> None:
    tasks = enumerate(("ioi", "mcqa", "addition"))
    rows = [table.row(family="x", seed=0, task=task, setting="gold", cpr=0.1 + i, forwards=7) for i, task in tasks]
    table.frame(rows).to_csv(path, index=False)


def _prompts(path: Path) -> None:
    rows = [
        {"clean": f"{i} is", "corrupt": f"{i + 1} is", "answer": " a", "wrong": " b", "split": "train"}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(of_value(json.loads(lines[at]), rng)).encode()
    return b"\n".join(lines)


FORMATS: dict[str, Format] = {
    "scores": Format(lambda p: dfa.controls.random_scores(A).save(p), dfa.NodeScores.load, content=of_safetensors),
    "edges": Format(lambda p: _edges().save(p), dfa.EdgeScores.load, content=of_safetensors),
    "chosen edges": Format(_some_edges, dfa.EdgeScores.load, content=of_safetensors),
    "alignments": Format(lambda p: _alignment().save(p), dfa.Alignment.load, content=of_safetensors),
    "edge alignments": Format(lambda p: _edge_alignment().save(p), dfa.EdgeAlignment.load, content=of_safetensors),
    "measurements": Format(lambda p: _measurements().save(p), dfa.Measurements.load, content=of_safetensors),
    "functional": Format(
        lambda p: _functional("trees").save(p), dfa.FunctionalAlignment.load, content=of_safetensors
    ),
    "functional, attention": Format(
        lambda p: _functional("attention").save(p), dfa.FunctionalAlignment.load, content=of_safetensors
    ),
    "circuits": Format(lambda p: _circuit().save(p), dfa.Circuit.load, content=of_safetensors),
    "inspections": Format(lambda p: _inspection().save(p), dfa.Inspection.load, content=of_safetensors),
    "edge circuits": Format(
        lambda p: _edge_circuit().save(p), dfa.EdgeCircuit.load, content=of_safetensors
    ),
    "edge circuits, JSON": Format(
        lambda p: _edge_circuit().to_json(p), dfa.EdgeCircuit.from_json, ".json", ours=False, content=of_json
    ),
    "circuits, JSON": Format(
        lambda p: _circuit().to_json(p), dfa.Circuit.from_json, ".json", ours=False, content=of_json
    ),
    "MIB": Format(
        lambda p: dfa.controls.uniform(INPUT).to_mib(p), dfa.NodeScores.from_mib, ours=False, content=of_json
    ),
    "MIB, pt": Format(
        lambda p: dfa.controls.uniform(INPUT).to_mib(p), dfa.NodeScores.from_mib, ".pt", ours=False, content=of_pt
    ),
    "MIB edges": Format(lambda p: _edges().to_mib(p), dfa.EdgeScores.from_mib, ".json", ours=False, content=of_json),
    "MIB edges, pt": Format(lambda p: _edges().to_mib(p), dfa.EdgeScores.from_mib, ".pt", ours=False, content=of_pt),
    "released": Format(_released, dfa.Alignment.from_released, ".pt", ours=False, content=of_pt),
    "study.json": Format(_description, study._description, content=of_json),
    "units": Format(_unit, _read_unit, ".json", same=lambda a, b: repr(a) == repr(b), content=of_json),
    "tables": Format(_table, table.read, ".csv", ours=False, content=of_rows),
    "prompts": Format(_prompts, FileTask.read, ".jsonl", ours=False, content=_lines),
}  # fmt: skip


class _TooLongError(BaseException):
    pass


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """At most so much time for a file, and so much more memory than there is in use now."""

    def ring(*_: object) -> None:
        raise _TooLongError

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    handler, limits = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)


def run(tries: int, name: str, seed: int = 0) -> dict[str, Any]:
    """``tries`` mutations of one format, two of three of bytes."""
    kind, rng = FORMATS[name], random.Random(f"{seed} {name}")
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    path = folder / f"file{kind.suffix}"
    started = time.perf_counter()
    slowest = 0.0
    try:
        kind.write(path)
        whole, expected = path.read_bytes(), kind.read(path)
        with _limits():
            for i in range(tries):
                by_bytes = i % 3 < 2 or kind.content is None
                path.write_bytes(of_bytes(whole, rng) if by_bytes else kind.content(whole, rng))
                begun = time.process_time()
                what = ""
                try:
                    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)  # of a busy machine; what counts is below
                    found = kind.read(path)
                    what = "read"
                    if by_bytes and kind.ours and not kind.same(found, expected):
                        what = "damaged values accepted"
                except DfaError as error:
                    what = "refused" if len(str(error)) < LETTERS else "messages too long"
                except _TooLongError:
                    what = "hangs"
                except MemoryError:
                    what = "above 500 MB"
                except Exception as error:
                    what = "above 500 MB" if "allocate memory" in str(error) else "raw errors"
                    examples.setdefault(type(error).__name__, f"{str(error)[:200]}")
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                spent = time.process_time() - begun
                slowest = max(slowest, spent)
                if spent > SECONDS and what != "hangs":
                    counts["hangs"] += 1
                counts[what] += 1
        left = {each.name for each in folder.iterdir()} - {path.name, "study"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bad = ("raw errors", "hangs", "above 500 MB", "damaged values accepted", "messages too long")
    return {
        "mutations": tries,
        "refused": counts["refused"],
        "read": counts["read"],
        **{key: counts[key] for key in bad},
        "files left": len(left),
        "slowest, ms of CPU": round(1000 * slowest),
        "seconds": round(time.perf_counter() - started),
        **({"examples": examples} if examples else {}),
        "failed": sum(counts[key] for key in bad) + len(left),
    }
