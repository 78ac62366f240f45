"""How many examples go through a model at a time: a number, or what fits into memory; and what passes hold in it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfa_lens.data.metrics import divergence
from dfa_lens.data.nodes import INPUT_POINT, NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.spans import Spans
from dfa_lens.errors import DfaError, ModelError
from dfa_lens.models import hooks, private
from dfa_lens.models.offload import offloaded
from dfa_lens.models.passes import Start, stream_hooks
from dfa_lens.models.runner import WORTH_LAYING_OUT, Runner

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]
"""Examples a pass, or "auto": what fits into free memory; halved, with a line in the log, when it did not."""

#: "auto" takes no more than this: larger batches are not faster.
MOST = {"cpu": 64, "cuda": 512}
#: ... and leaves a part of the free memory for what can't be foreseen (fragments, work space of the libraries).
USABLE = 0.7

#: Where Linux says which control groups a process is in, and what they are allowed.
CGROUPS_OF_PROCESS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: Their files with the limit and with what is used of it, and the entry of memory.stat with the file cache in that.
CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

Result = TypeVar("Result")


def run(
    work: Callable[[int], Result],
    batch_size: BatchSize,
    runner: Runner,
    pairs: PromptPairs,
    nodes: NodeSet,
    need: Callable[[Footprint, int], Need],
) -> Result:
    """``work`` with that batch size; for "auto", with half as much after an out-of-memory error, down to 1.

    Parameters
    ----------
    need:
        What the work needs with so many examples a pass.
    """
    if batch_size != "auto":
        if isinstance(batch_size, str) or batch_size < 1:
            raise DfaError(f"batch_size must be a number of at least 1, or 'auto', not {batch_size!r}.")
        return work(batch_size)
    size = fitting(runner, pairs, nodes, need)
    while True:
        try:
            return work(size)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not private.out_of_memory(error) or size == 1:
                raise
            logger.warning("%d examples a pass do not fit into memory: %d now", size, size // 2)
            size //= 2
        if torch.cuda.is_available():  # outside the except: the error's traceback holds tensors
            torch.cuda.empty_cache()


def fitting(runner: Runner, pairs: PromptPairs, nodes: NodeSet, need: Callable[[Footprint, int], Need]) -> int:
    """The largest power of two whose estimated memory is free: at least 1, at most the number of pairs."""
    footprint = Footprint(runner, nodes, int(pairs.longest.max()))
    one, two = (need(footprint, n).peak_bytes for n in (1, 2))
    device = runner.device
    per_example = max(two - one, 1)
    room = int((USABLE * free_bytes(device) - (one - per_example)) / per_example)
    most = max(1, min(room, len(pairs), MOST.get(device.type, MOST["cuda"])))
    size = 1 << (most.bit_length() - 1)
    logger.info("%d examples a pass (%.0f MiB each)", size, per_example / 2**20)
    return size


@dataclass(frozen=True)
class Need:
    """What one operation needs.

    Attributes
    ----------
    operation:
        "attribute", "fit" or "faithfulness_curve".
    forward, backward:
        Examples that pass forward and backward through the model. Gradients reach activations only, so a backward
        pass costs about as much as a forward pass. A pass that begins at a later block, or after tokens that clean
        and corrupt prompts share, is counted as a whole one: these are upper limits.
    cache_bytes:
        Recorded activations and logits that are kept at one time.
    gradient_bytes:
        What autograd keeps of one batch until its backward pass.
    working_bytes:
        What comes and goes within a pass.
    """

    operation: str
    forward: int
    backward: int
    cache_bytes: int
    gradient_bytes: int
    working_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Most memory beyond the weights at any time."""
        return self.cache_bytes + self.gradient_bytes + self.working_bytes

    @property
    def forward_equivalents(self) -> int:
        """Forward passes of one example, a backward pass counted as one."""
        return self.forward + self.backward


class Footprint:
    """What a model's passes hold in memory: it is run on a few prompts of one length and watched.

    Parameters
    ----------
    runner, nodes:
        What is run, and which nodes are recorded.
    width:
        The prompts' number of tokens.
    checkpointing:
        Whether passes with gradients run their blocks twice; None: where weights are offloaded.
    """

    def __init__(self, runner: Runner, nodes: NodeSet, width: int, *, checkpointing: bool | None = None) -> None:
        self.runner, self.nodes, self.width = runner, nodes, width
        self.checkpointing = offloaded(runner.model) if checkpointing is None else checkpointing

    @cached_property
    def site_bytes(self) -> int:
        """The nodes' activations, of one example."""
        return self._bytes_at(self.nodes.points)

    @cached_property
    def embed_bytes(self) -> int:
        """The embedding, or the residual stream at one block, of one example."""
        return self._bytes_at([INPUT_POINT])

    @property
    def stream_bytes(self) -> int:
        """The residual streams that later passes begin with, of one example."""
        return len(self.runner.restarts(self.nodes)) * self.embed_bytes

    @property
    def logit_bytes(self) -> int:
        """The answer's logits in float32, of one example."""
        return 4 * self.runner.d_vocab

    def _bytes_at(self, names: Sequence[str]) -> int:
        """The activations at hook points for one example."""
        layouts = self.runner.layout(names).values()
        return sum(each.values(self.width) for each in layouts) * self.runner.backend.dtype.itemsize

    def gradient_bytes(self, batch: int, *, gated: bool = False) -> int:
        """What autograd keeps of one batch: under a soft mask, or with a gradient from the embedding on.

        From one and from two examples: everything that is kept is constant or in proportion to the examples. With
        checkpointing: what is outside the blocks, what goes into each, and one block, the weights that are brought for
        it included.
        """
        one, two = (self._at_once(n, gated) for n in (1, 2))
        return one + (batch - 1) * (two - one)

    def _at_once(self, batch: int, gated: bool) -> int:
        if not self.checkpointing:
            return self._kept(batch, gated)
        outside = self._kept(batch, gated, checkpointing=True)
        block = self._kept(batch, gated, first=self.runner.n_layers - 1)
        return outside + self.runner.n_layers * batch * self.embed_bytes + max(0, block - outside)

    def working_bytes(self, batch: int) -> int:
        """Most memory in use at one time during a gated pass without gradients."""
        tokens, lengths, corrupt, _ = self._recorded(batch)
        half = torch.full((len(self.nodes),), 0.5, dtype=torch.float32)
        gates = hooks.gate_hooks(self.nodes, half, corrupt=corrupt, spans=_some_spans(self.nodes, tokens))
        with self.runner.session(passes=WORTH_LAYING_OUT), torch.no_grad(), LiveBytes() as live:
            self.runner.run(tokens, lengths, gates)
        return live.peak

    def _kept(self, batch: int, gated: bool, *, checkpointing: bool = False, first: int = 0) -> int:
        """What autograd keeps of a pass; or, of one that begins at a later block, of the blocks from there on."""
        model = self.runner.model
        nodes = self.nodes if not first else self.nodes.where(lambda node: node.layer >= first)
        tokens, lengths, corrupt, logits = self._recorded(batch)
        point, begin = INPUT_POINT, None
        if first:
            point = f"blocks.{first}.hook_resid_pre"
            begin = Start(first, self._stream(first, tokens, lengths))
        known: set[int] = set()
        kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            if _address(tensor) not in known:
                kept[_address(tensor)] = tensor
            return tensor

        def start(now: Tensor) -> Tensor:
            return now.detach().clone().requires_grad_(True)

        leaf = torch.full((len(nodes),), 0.5, dtype=torch.float32, requires_grad=True)
        taps: list[Any] = [(point, start)]
        if gated and len(nodes):
            taps = hooks.gate_hooks(nodes, leaf, corrupt=corrupt, spans=_some_spans(nodes, tokens))
        session = self.runner.session(passes=WORTH_LAYING_OUT, checkpointing=checkpointing)
        with session, torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            permanent = [*model.parameters(), *getattr(model, "buffers", list)(), *corrupt.values(), logits]
            known.update(_address(tensor) for tensor in permanent)
            out = self.runner.run(tokens, lengths, taps, start=begin)
            if gated:
                divergence(logits.float().log_softmax(-1), out.float().log_softmax(-1)).mean()
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def _stream(self, layer: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        found: dict[int, Tensor] = {}
        with self.runner.session(), torch.no_grad():
            self.runner.run(tokens, lengths, stream_hooks(found, [layer]))
        return found[layer]

    def _recorded(self, batch: int) -> tuple[Tensor, Tensor, hooks.Activations, Tensor]:
        tokens, lengths = torch.zeros(batch, self.width, dtype=torch.long), torch.full((batch,), self.width)
        corrupt: hooks.Activations = {}
        with self.runner.session(), torch.no_grad():
            logits = self.runner.run(tokens, lengths, hooks.record_hooks(self.nodes, corrupt))
        return tokens, lengths, corrupt, logits


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still there; ``peak`` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _address(leaf) not in given | self.seen:
                storage = leaf.untyped_storage()
                self.seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return out

    def _gone(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size


def _some_spans(nodes: NodeSet, tokens: Tensor) -> Spans | None:
    """All tokens in the first of the nodes' spans: where they are makes no difference to what is needed."""
    names = tuple(dict.fromkeys(span for site in nodes.sites for span in site.spans))
    return Spans(names, torch.zeros(tokens.shape, dtype=torch.long)) if names else None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def free_bytes(device: torch.device) -> int:
    """Memory that a device still has for us, in bytes.

    On a GPU with what torch holds unused. Elsewhere what the system can give without swapping (file cache that it
    would drop included), or less where a control group allows less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return max(0, min((psutil.virtual_memory().available, *_left_by_control_groups())))


def require_room(device: torch.device, least: int, what: str, remedy: str) -> None:
    """Refuse, before any work, what can't fit.

    Parameters
    ----------
    device:
        Where it would be.
    least:
        What it takes for certain, in bytes; it may take more.
    what, remedy:
        For the message: what takes it, and what to do.

    Raises
    ------
    ModelError
        If less is free.
    """
    free = free_bytes(device)
    if least > free:
        raise ModelError(
            f"{what} would take at least {_amount(least)}, and {_amount(free)} are free on {device}: {remedy}."
        )


def _amount(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def _left_by_control_groups() -> Iterator[int]:
    """Bytes that each control group of this process leaves it: its own (a container, a cluster's job) and those above.

    Nothing where there are none (macOS, Windows) or none has a limit.
    """
    try:
        lines = CGROUPS_OF_PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)  # "0::/job" in version 2, "4:memory:/job" in version 1
        if not controllers:
            root, files = CGROUPS, CGROUP_V2
        elif "memory" in controllers.split(","):
            root, files = CGROUPS / "memory", CGROUP_V1
        else:
            continue
        own = root / name.lstrip("/")
        for folder in (own, *own.parents):  # within a container the name may be the host's: then only the root is there
            yield from _left_by(folder, *files)


def _left_by(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """A control group's limit less its use; file cache is no use, for it is dropped when memory is short."""
    try:
        allowed, in_use = (folder / limit).read_text().strip(), int((folder / used).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return
    if allowed != "max":
        yield int(allowed) - in_use + sum(int(line.split()[1]) for line in lines if line.split()[0] == cache)
