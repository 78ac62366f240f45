"""What is installed here, and what will work: ``dfa-lens doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, get_args

import torch

from dfa_lens import __version__, zoo
from dfa_lens.data.edges import EdgeSet, Readers
from dfa_lens.errors import ModelError
from dfa_lens.models import memory
from dfa_lens.models.loading import transformer_lens_major
from dfa_lens.models.runner import Runner
from dfa_lens.models.stream import Stream

OPTIONAL = {
    "kaleido": "figures as PNG or PDF (dfa-lens[export])",
    "anywidget": "clicks in notebooks (dfa-lens[notebook])",
    "submitit": "studies on a cluster (dfa-lens[cluster])",
    "accelerate": "models on several devices (device_map=)",
}


def lines(model: Any | None = None) -> Iterator[str]:
    """The report, line by line; with a model also what it can do (two trials on a few tokens)."""
    yield f"dfa_lens {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield from _packages()
    major = transformer_lens_major()
    yield (
        "  backend            HookedTransformer (and TransformerBridge)"
        if major < 4
        else '  backend            TransformerBridge; for HookedTransformer: pip install "transformer-lens<4"'
    )
    yield "devices"
    cpu = memory.free_bytes(torch.device("cpu")) / 2**30
    threads = torch.get_num_threads()
    yield f"  cpu                {os.cpu_count()} cores, {threads} threads for torch, {cpu:.1f} GiB free"
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free = memory.free_bytes(device) / 2**30
        yield f"  cuda:{index}             {torch.cuda.get_device_name(index)}, {free:.1f} GiB free"
    if not torch.cuda.is_available():
        yield "  cuda               none"
    yield "works"
    yield f"  shipped models     {', '.join(zoo.names('all'))}"
    for name, use in OPTIONAL.items():
        yield f"  {name:18s} {'yes' if importlib.util.find_spec(name) else 'no'}: {use}"
    browser = next((path for path in map(shutil.which, ("chromium", "google-chrome", "chrome")) if path), None)
    yield f"  browser            {'yes' if browser else 'no'}: kaleido draws with a Chromium"
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    yield f"  hub                {'offline (HF_HUB_OFFLINE)' if offline else 'when a model or data set is asked for'}"
    if model is not None:
        yield from _of(model)


def _packages() -> Iterator[str]:
    """What dfa_lens needs: the release that is here, and those that it was tested with (`make lock` notes them)."""
    yield f"{'packages':20s} {'here':15s} tested"
    for name, tested in json.loads(files("dfa_lens").joinpath("tested.json").read_text()).items():
        here = _version(name)
        release = here and here.partition("+")[0]  # +cpu, +cu130: builds of one release
        other = f"   {release} was not" if release and release not in tested else ""
        yield f"  {name:18s} {here or 'NOT INSTALLED':15s} {', '.join(tested)}{other}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _of(model: Any) -> Iterator[str]:
    runner = Runner(model)
    cfg = runner.model.cfg
    parameters = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters) / 2**20
    yield f"model {getattr(cfg, 'model_name', '')}"
    yield f"  class              {type(model).__name__}, {parameters[0].dtype}, on {runner.device}"
    yield f"  size               {cfg.n_layers} layers x {cfg.n_heads} heads, {size:.0f} MiB"
    yield f"  weights            {', '.join(runner.backend.processing()) or 'unprocessed'}"
    yield f"  shared beginnings  {_yes(runner.allows('prefix', 32))}"
    yield f"  starting at blocks {_yes(runner.allows('start', 32))}"
    yield f"  edges              {_edges(runner)}"
    tokenizer = getattr(model, "tokenizer", None)
    yield f"  tokenizer          {type(tokenizer).__name__ if tokenizer is not None else 'NONE: tasks need one'}"


def _edges(runner: Runner) -> str:
    """How many edges there are and what scoring them takes, or why they can't be scored."""
    grouped, per_head = (EdgeSet.of_model(runner.model, readers=readers) for readers in get_args(Readers))
    try:
        with runner.session(passes=1):
            Stream(runner, grouped)
    except ModelError as error:
        return f"can't be scored: {error}"
    return f"{len(grouped):,} (per head: {len(per_head):,}): eap in 3 passes, eap-ig-inputs in 1 + 2 x steps"


def _yes(works: bool) -> str:
    return "run once" if works else "can't be used: whole passes"
