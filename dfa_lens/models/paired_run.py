"""One batch of prompt pairs on a model: its clean and its corrupt run, and the runs in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.data.nodes import INPUT_POINT, NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.data.spans import Spans
from dfa_lens.models import hooks
from dfa_lens.models.ablations import Reference
from dfa_lens.models.backend import HookFunction
from dfa_lens.models.hooks import Activations, Intervention
from dfa_lens.models.passes import Prefix, Start, stream_hooks, tile
from dfa_lens.models.runner import Runner


class PairedRun:
    """Runs a batch clean, corrupt, and under masks; what the two prompts share at their beginning is run once.

    Parameters
    ----------
    runner:
        The model, inside a :meth:`~dfa_lens.models.runner.Runner.session`.
    pairs:
        The batch.
    nodes:
        What will be recorded or gated: nodes that are not indexed by token keep whole prompts running.
    share_prefix:
        False runs whole prompts in any case.
    prefix:
        The keys and values of the common beginning, where they are known already.
    keep_before:
        Also keep what the nodes do at the common beginning, as :attr:`before`.
    columns:
        Token ids [pair, column]: the only logits that are wanted.
    positions:
        As in :meth:`~dfa_lens.models.runner.Runner.run`.
    reference:
        What stands in the place of nodes that are left out, where that is not the corrupt run: :meth:`record` then
        gives it for "corrupt", and nothing is shared, since it differs from the clean run at the beginning, too.

    Attributes
    ----------
    prefix:
        The common beginning, or None where whole prompts are run.
    before:
        Hook point → activation at the common beginning, the same in the clean and in the corrupt run.
    streams:
        Block → the residual stream [pair, pos, d_model] at its beginning in the last pass that kept it; passes may
        begin there.
    """

    def __init__(
        self,
        runner: Runner,
        pairs: PromptPairs,
        nodes: NodeSet | None = None,
        *,
        share_prefix: bool = True,
        prefix: Prefix | None = None,
        keep_before: bool = False,
        columns: Int[Tensor, "pair column"] | None = None,
        positions: Literal["answer", "all"] = "answer",
        reference: Reference | None = None,
    ) -> None:
        self.runner, self.pairs, self.nodes = runner, pairs, nodes
        self.columns, self.positions, self.reference = columns, positions, reference
        self.prefix, self.before = prefix, Activations()
        self.streams: dict[int, Tensor] = {}
        if prefix is None and share_prefix and reference is None:
            length = runner.shared_length(pairs, nodes)
            if length:
                taps = hooks.record_hooks(nodes, self.before) if keep_before and nodes is not None else []
                self.prefix = runner.prefix_of(pairs.clean[:, :length], taps)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def first(self) -> int:
        """How many tokens at the beginning are not run again."""
        return 0 if self.prefix is None else self.prefix.length

    def spans(self, times: int = 1) -> Spans | None:
        """Which span every token that is run is in, of the batch repeated so often; None where the pairs have none."""
        own = self.pairs.spans
        return None if own is None else Spans(own.names, tile(own.labels[:, self.first :], times))

    def run(
        self,
        taps: Sequence[tuple[str, HookFunction]] = (),
        *,
        corrupt: bool = False,
        times: int = 1,
        layer: int | None = None,
    ) -> Float[Tensor, "..."]:
        """The logits of one pass under hooks.

        Parameters
        ----------
        taps:
            (hook point, function) pairs.
        corrupt:
            Run the corrupt prompts.
        times:
            Run the batch repeated so often, one copy after the other.
        layer:
            Begin at this block, if the residual stream there is known.
        """
        pairs = self.pairs
        tokens, lengths = (pairs.corrupt, pairs.corrupt_lengths) if corrupt else (pairs.clean, pairs.lengths)
        start = None if layer is None or layer not in self.streams else Start(layer, tile(self.streams[layer], times))
        return self.runner.run(
            tokens.repeat(times, 1),
            lengths.repeat(times),
            taps,
            positions=self.positions,
            columns=None if self.columns is None else self.columns.repeat(times, 1),
            prefix=None if self.prefix is None else self.prefix.tile(times),
            start=start,
        )

    def record(
        self,
        which: Literal["clean", "corrupt"],
        *,
        nodes: bool = True,
        also: str | None = None,
        streams: Sequence[int] = (),
    ) -> tuple[Activations, Float[Tensor, "..."]]:
        """The nodes' activations in the clean or the corrupt run, and its logits; nothing has a gradient.

        With a :attr:`reference`, "corrupt" is what stands in the place of nodes that are left out, and the logits are
        those of the run in which the embedding and all nodes are there: in either case no clean information enters.

        Parameters
        ----------
        nodes:
            False records nothing but what the other arguments ask for.
        also:
            One more hook point to record.
        streams:
            Blocks whose residual stream is kept in :attr:`streams`.
        """
        if which == "corrupt" and self.reference is not None:
            return self._at_reference(self.reference, nodes=nodes, also=also)
        into: Activations = {}
        taps = hooks.record_hooks(self.nodes, into) if nodes and self.nodes is not None else []
        if also is not None and also not in {point for point, _ in taps}:
            taps.append((also, lambda now: into.__setitem__(also, now.detach().clone())))
        with torch.no_grad():
            logits = self.run([*stream_hooks(self.streams, streams), *taps], corrupt=which == "corrupt")
        return into, logits

    def _at_reference(
        self, reference: Reference, *, nodes: bool, also: str | None
    ) -> tuple[Activations, Float[Tensor, "..."]]:
        own = self.nodes if nodes else None
        points = own.points if own is not None else ()
        more = [point for point in (INPUT_POINT, also) if point is not None and point not in points]
        found = reference.activations((*points, *more), self.pairs)
        taps: list[tuple[str, HookFunction]] = []
        if INPUT_POINT not in points:
            taps.append((INPUT_POINT, lambda now: found[INPUT_POINT].to(now.device)))
        if own is not None:
            taps += hooks.gate_hooks(own, torch.zeros(len(own), dtype=torch.float32), corrupt=found, spans=self.spans())
        with torch.no_grad():
            logits = self.run(taps)
        return {point: found[point] for point in (*points, *([also] if also else []))}, logits

    def gated(
        self,
        nodes: NodeSet,
        masks: Float[Tensor, "*row node"],
        *,
        clean: Mapping[str, Tensor] | None = None,
        corrupt: Mapping[str, Tensor] | None = None,
        intervention: Intervention = "circuit",
        layer: int | None = None,
        streams: Sequence[int] = (),
    ) -> Float[Tensor, "..."]:
        """The logits of one pass under masks; with a gradient in the masks where they have one.

        Parameters
        ----------
        nodes, masks:
            What is gated, and how much of it stays: [node], one mask for all; [pair, node], one for each pair; or
            [times·pair, node], and the batch is run so many times over in one pass.
        clean, corrupt:
            What the nodes do in the other runs, as the intervention needs it.
        layer:
            Begin at this block, if the residual stream there is known: ``nodes`` are then in it or above.
        streams:
            Blocks whose residual stream is kept on the way.
        """
        times = max(1, len(masks) // len(self)) if masks.ndim == 2 else 1
        others = [
            None if each is None else {point: tile(each[point], times) for point in nodes.points if point in each}
            for each in (clean, corrupt)
        ]
        how: Any = {"clean": others[0], "corrupt": others[1], "intervention": intervention}
        gates = hooks.gate_hooks(nodes, masks, **how, spans=self.spans(times))
        # the streams first, as they are before a gate at the same hook point
        taps = [*stream_hooks(self.streams, streams), *gates]
        return self.run(taps, corrupt=intervention == "restore", times=times, layer=layer)
