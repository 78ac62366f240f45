"""One model made ready: its hook points, one forward pass under hooks, and no more of it than is needed.

What need not be computed, and what is done instead (the short cuts):

- ``answer``: logits at positions that nobody reads: the last norm and the unembedding run at the answer alone;
- ``unembedding``: for a logit difference, its two columns; and without the copy that a HookedTransformer makes of it;
- ``prefix``: the tokens that a clean and a corrupt prompt share at their beginning: there all activations are equal,
  whatever is patched, so keys and values are computed once and kept (:class:`Prefix`);
- ``start``: the blocks below the first one in which anything is patched: the pass begins with the residual stream that
  is already known there (:class:`Start`).

Each is taken only where a trial on this model, dtype and setting gave the activations and logits of the plain pass, and
never while somebody else's hooks are on the model: they are to see whole prompts and all blocks. A trial that fails is
a :class:`ShortCutWarning`, once per model, and the pass is made the plain way.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfa_lens.data.nodes import NodeSet
from dfa_lens.data.pairs import PromptPairs
from dfa_lens.errors import HookError, ModelError, PromptError
from dfa_lens.models import private, trials
from dfa_lens.models.backend import AddedPoint, HookFunction, backend_of, neutral, usable
from dfa_lens.models.backend.families import how_to_add
from dfa_lens.models.kept import Kept, OwnHook, TurnedWeights, each_of, remembered_of
from dfa_lens.models.offload import checkpointed, offloaded
from dfa_lens.models.passes import Layout, Prefix, Start, attention_mask
from dfa_lens.models.trials import ShortCut, Verdict

logger = logging.getLogger(__name__)

#: Shorter common beginnings are not worth a pass of their own.
LEAST_SHARED = 4
#: With fewer passes than this, laying the weights out anew costs more than it saves (docs/performance.md).
WORTH_LAYING_OUT = 4
# Points that exist on every model but fire only when a config flag is set.
_FLAGS = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
}

# Points whose activation has the positions of the running tokens on axis 1, however many came before them.
_BY_TOKEN = {
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "hook_mlp_in",
    "hook_attn_in",
    "hook_q",
    "hook_k",
    "hook_v",
    "hook_z",
    "hook_result",
    "hook_pre",
    "hook_pre_linear",
    "hook_post",
    "hook_experts",
}


class ProcessedWeightsWarning(UserWarning):
    """The model's weights were transformed when it was loaded."""


class ShortCutWarning(UserWarning):
    """A short cut changes this model's numbers, so passes are made the plain way: slower, and right."""


class Runner:
    """Runs one model. Made anew for every operation; what is known of the model outlives it.

    Parameters
    ----------
    model:
        A HookedTransformer, TransformerBridge or Hugging Face causal language model.

    Raises
    ------
    ModelError
        If it is anything else, or can't be run (:func:`~dfa_lens.models.backend.usable`).
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = usable(model)
        self.backend = backend_of(self.model)
        self.state = remembered_of(self.model)
        if not self.backend.has_points:  # names of modules, which may have been exchanged since the last operation
            self.state.points = {}

    # --- what the model is -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return self.backend.device

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def d_vocab(self) -> int:
        """Number of logits."""
        return int(self.model.cfg.d_vocab)

    @property
    def n_ctx(self) -> int | None:
        """The longest prompt, or None where any length will do."""
        return getattr(self.model.cfg, "n_ctx", None)

    @property
    def name(self) -> str:
        """What the model is called, for provenance."""
        return str(getattr(self.model.cfg, "model_name", ""))

    def require(self, pairs: PromptPairs) -> None:
        """A :class:`~dfa_lens.errors.PromptError` unless the model can run these prompts."""
        pairs.require(d_vocab=self.d_vocab, n_ctx=self.n_ctx)
        if bool((pairs.longest < pairs.clean.shape[1]).any() | (pairs.lengths != pairs.corrupt_lengths).any()):
            with self.session():
                causal = self.allows_padding(pairs.clean.shape[1])
            if not causal and bool((pairs.lengths != pairs.corrupt_lengths).any()):
                raise PromptError(
                    "On this model every token attends to later ones, padding among them, so clean and corrupt prompts "
                    "must have equally many tokens: use different_lengths='drop'."
                )

    def batches(self, pairs: PromptPairs, batch_size: int) -> Iterator[tuple[Int[Tensor, " batch"], PromptPairs]]:
        """:meth:`PromptPairs.batches`; of equal length each, where padding would be attended to."""
        for rows, batch in pairs.batches(batch_size):
            for own in self.together(batch.longest):
                yield rows[own], batch[own]

    def together(self, lengths: Int[Tensor, " prompt"]) -> list[Int[Tensor, " group"]]:
        """Which prompts may share a pass: all, or those of each length where padding would be attended to."""
        if bool((lengths == lengths[0]).all()) or self.allows_padding(int(lengths.max())):
            return [torch.arange(len(lengths))]
        return [(lengths == length).nonzero()[:, 0] for length in lengths.unique(sorted=True).flip(0)]

    # --- hook points -------------------------------------------------------------------------------------------

    def points(self, names: Iterable[str]) -> dict[str, Any]:
        """The hook points called ``names``, checked.

        Raises
        ------
        HookError
            If a point does not exist; a config flag that is off keeps it from firing; it fires several times a pass;
            or editing it would not do what its name says.
        """
        names = list(names)
        known = self.state.points
        # hook_dict is rebuilt on every access by a bridge; a model's points change only when somebody adds one
        if not known or any(name not in known for name in names):
            known = self.state.points = dict(self.model.hook_dict)
        for name in names:
            if name not in known:
                raise HookError(
                    f"The model has no hook point {name!r}; see model.hook_dict for the {len(known)} that it has."
                )
            flag = _FLAGS.get(name.rsplit(".", 1)[-1])
            if flag is not None and not getattr(self.model.cfg, flag, False):
                raise HookError(
                    f"Hook point {name!r} fires only when model.cfg.{flag} is set, and it is not. Set it with "
                    f"model.set_{flag}(True); for attention heads use 'attn.hook_z', which needs no flag."
                )
            refusal = self.backend.refusal(name)
            if refusal is not None:
                raise HookError(refusal)
        return {name: known[name] for name in names}

    def has_point(self, name: str) -> bool:
        """Whether there is a hook point of that name."""
        if not self.state.points:
            self.points([])
        return name in self.state.points

    def check_points(self, names: Sequence[str]) -> None:
        """As :meth:`points`, and no two names may be one hook point: it would be edited twice.

        Raises
        ------
        HookError
            Also if two of ``names`` are aliases of each other, as on a TransformerBridge "blocks.0.hook_attn_out" and
            "blocks.0.attn.hook_out".
        """
        seen: dict[int, str] = {}
        for name, point in self.points(names).items():
            if id(point) in seen:
                raise HookError(
                    f"{seen[id(point)]!r} and {name!r} are two names of one hook point on this model: a node set can "
                    "have one of them."
                )
            seen[id(point)] = name
            if getattr(point, "read_only", False):
                raise HookError(
                    f"{name!r} can only be looked at on this model: what is made of it is made inside one module. Load "
                    "the model with backend='bridge' to edit it."
                )
        self._warn_if_processed()

    def _warn_if_processed(self) -> None:
        if "processed" in self.state.told:
            return
        self.state.told.add("processed")
        found = self.backend.processing()
        if found:
            warnings.warn(
                f"This model's weights were processed when it was loaded ({', '.join(found)}). Logit differences, "
                "scores, masks and curves are those of the original weights: what processing adds to an activation it "
                "adds to the clean and the corrupt run alike. Not the same are single logits, activations after a "
                "norm, hook_v and hook_z by themselves (on Qwen), and any ablation of your own to zero or to a mean. "
                "To be safe, load unprocessed weights: dfa.load_model, a bridge without enable_compatibility_mode(), "
                "or HookedTransformer.from_pretrained_no_processing.",
                ProcessedWeightsWarning,
                stacklevel=4,
            )

    def add_point(self, module: str, name: str, at: Literal["output", "input"]) -> str:
        """See :func:`dfa_lens.hooks.add_hook_point`."""
        try:
            place: Any = self.model.get_submodule(module)
        except AttributeError:
            raise HookError(f"The model has no module {module!r}; model.named_modules() lists those it has.") from None
        if not name.startswith("hook_"):
            raise HookError(f"The name of a hook point must start with 'hook_', not {name!r}.")
        full = f"{module}.{name}"
        if hasattr(place, name) or full in self.model.hook_dict:
            raise HookError(f"Module {module!r} already has {name!r}.")
        entry = self.backend.new_point(place, module, name, at)
        done = False
        try:
            try:
                entry.put()
                self.state.points = {}
                self.state.added[full] = entry
                done = True
            finally:
                if not done:
                    self._take_away(full, entry)
        finally:  # an interrupt may have cut the first round short
            if not done:
                self._take_away(full, entry)
        return full

    def remove_point(self, name: str) -> None:
        """See :func:`dfa_lens.hooks.remove_hook_point`."""
        if name not in self.state.added:
            raise HookError(f"{name!r} is not a hook point that was added to this model.")
        entry = self.state.added[name]
        try:
            self._take_away(name, entry)
        finally:  # an interrupt may have cut the first round short; half a point is of no use to anybody
            self._take_away(name, entry)

    def _take_away(self, name: str, entry: AddedPoint) -> None:
        each_of((*entry.away, self.state.points.clear, partial(self.state.added.pop, name, None)))

    @contextmanager
    def attach(self, hooks: Sequence[tuple[str, HookFunction]]) -> Iterator[list[OwnHook]]:
        """Put functions on hook points for the length of the context; in the order given where a point occurs twice.

        Yields what was put on, which counts how often it was called. A function that was never called by the end of a
        context that ended well is a :class:`~dfa_lens.errors.HookError`: a node that was silently not gated looks like
        a result.
        """
        taken = self.points([name for name, _ in hooks])
        own = [OwnHook(function) for _, function in hooks]
        places = [(taken[name], hook) for (name, _), hook in zip(hooks, own, strict=True)]
        away = [partial(private.remove_hook, self.backend.module_of(point), hook) for point, hook in places]
        gradients = torch.is_grad_enabled()
        try:
            try:
                with self.backend.showing(list(taken)):
                    for point, hook in places:
                        point.add_hook(hook)
                    yield own
            except BaseException as error:  # an interrupt can have cut off torch's own way back, inside of the model
                if not isinstance(error, GeneratorExit):  # long after, when nobody waits for this generator
                    torch.set_grad_enabled(gradients)
                raise
            finally:
                each_of(away)
        finally:  # an interrupt may have cut the first round short
            each_of(away)
        missing = [name for (name, _), hook in zip(hooks, own, strict=True) if hook.fired == 0]
        if missing:
            raise HookError(
                f"Hook point {missing[0]!r} did not fire ({len(missing)} of {len(hooks)}): was the model run?"
            )

    # --- made ready --------------------------------------------------------------------------------------------

    @contextmanager
    def session(self, *, passes: int = 1, checkpointing: bool | None = None) -> Iterator[None]:
        """What every operation runs in: alone on this model, with frozen weights and torch's modes as by default.

        Parameters
        ----------
        passes:
            About how many passes will be made: with :data:`WORTH_LAYING_OUT` and more, the weights are laid out as
            the passes read them.
        checkpointing:
            Whether passes with gradients keep what goes into each block only, and run blocks once more on the way
            backward; prompts are then run from their beginning. None: as in the session around this one, or else where
            weights are offloaded.
        """
        state = self.state
        with state.lock, neutral(self.device):
            before = Kept(self.model)
            try:
                try:
                    if checkpointing is not None:
                        state.checkpointing = checkpointing
                    elif state.setting is None:
                        state.checkpointing = offloaded(self.model)
                    state.setting, state.foreign = self._setting(), self._foreign_hooks()
                    for parameter in self.model.parameters():
                        parameter.requires_grad_(False)
                    for module in [module for module in self.model.modules() if module.training]:
                        module.training = False
                    if passes >= WORTH_LAYING_OUT:
                        state.turned = TurnedWeights()
                        state.turned.turn(self.backend.copied_weights())
                    self._try_guess()
                    yield
                finally:
                    before.restore()
            finally:  # an interrupt may have cut the first round short
                before.restore(last=True)

    def _try_guess(self) -> None:
        """A model whose parts were found by their looks must behave as if they were the parts."""
        guess = self.backend.guess
        if guess is None or self.state.foreign is not None:
            return
        verdict = trials.remembered(self, "structure", 1)
        if not verdict.holds:
            raise ModelError(
                f"No family of models is known for this {guess}, and its structure is not what it looks like: "
                f"{verdict.detail}. {how_to_add(self.backend.config.model_type)}"
            )

    def _foreign_hooks(self) -> str | None:
        """Where somebody else has hooks on the model now, or None."""
        self.points([])
        for name, point in self.state.points.items():
            if point.fwd_hooks or point.bwd_hooks:
                return f"hook point {name!r}"
        return private.foreign_hook(self.model)

    def _setting(self) -> Any:
        """All that a trial's result can depend on, beside the values of the weights."""
        settings = [
            (key, value)
            for each in (self.model.cfg, self.backend.config)
            for key, value in sorted(getattr(each, "__dict__", {}).items())
            if isinstance(value, (bool, int, float, str, torch.dtype, type(None)))
        ]
        weights = {(parameter.dtype, parameter.device) for parameter in self.model.parameters()}
        return hash((tuple(settings), frozenset(weights), tuple(id(module) for module in self.model.modules())))

    # --- short cuts --------------------------------------------------------------------------------------------

    def allows(self, short_cut: ShortCut, width: int) -> bool:
        """Whether a short cut may be taken on prompts of ``width`` tokens.

        Not while somebody else has hooks on the model, and not if a trial does not give the numbers of a plain pass.
        """
        return self._verdict(short_cut, width).holds

    def allows_padding(self, width: int) -> bool:
        """Whether tokens attend to earlier ones only, so that padding on the right changes nothing."""
        with self._inside():
            if self.state.foreign is not None:  # somebody else's hooks are not to see a trial: believe what it says
                return getattr(self.model.cfg, "attention_dir", "causal") == "causal"
            return trials.remembered(self, "causal", width).holds

    def _verdict(self, short_cut: ShortCut, width: int) -> Verdict:
        with self._inside():
            state = self.state
            if state.foreign is not None:
                logger.info("no short cuts: there are hooks at %s", state.foreign)
                return Verdict(False, f"hooks at {state.foreign}")
            try:
                verdict = trials.remembered(self, short_cut, width)
            except RuntimeError as error:
                if not private.out_of_memory(error):
                    raise
                # not remembered: there may be room another time
                logger.warning("the trial of the short cut %r does not fit into memory: not taken now", short_cut)
                return Verdict(False, "out of memory")
            if not verdict.holds and verdict.unexpected and short_cut not in state.told:
                state.told.add(short_cut)
                warnings.warn(
                    f"The short cut {short_cut!r} is not taken on this model ({verdict.detail}): its passes are made "
                    "the plain way, which is slower and changes no number.",
                    ShortCutWarning,
                    stacklevel=4,
                )
            return verdict

    def _inside(self) -> AbstractContextManager[None]:
        """The running session, or one for the length of the context."""
        return nullcontext() if self.state.setting is not None else self.session()

    def restarts(self, nodes: NodeSet) -> list[int]:
        """The blocks with nodes that a pass may begin at; none of the first, where a whole pass begins."""
        return sorted({node.layer for node in nodes if 0 < node.layer < self.n_layers})

    def shared_length(self, batch: PromptPairs, nodes: NodeSet | None = None) -> int:
        """How many tokens at the beginning of a batch need to be run only once; 0 where that can't be or does not pay.

        It can't be with nodes that are not indexed by token (attention patterns, nodes that are positions, hook points
        of one's own), nor where the short cut ``prefix`` is not taken.
        """
        length, width = int(batch.shared.min()), batch.clean.shape[1]
        if length < max(LEAST_SHARED, width // 8) or self.state.checkpointing:  # a cache would grow a second time
            return 0
        sites = nodes.sites if nodes is not None else ()
        by_token = all(not site.by_position and site.point.rsplit(".", 1)[-1] in _BY_TOKEN for site in sites)
        return length if by_token and self.allows("prefix", width) else 0

    # --- passes ------------------------------------------------------------------------------------------------

    def prefix_of(self, tokens: Int[Tensor, "batch pos"], hooks: Sequence[tuple[str, HookFunction]] = ()) -> Prefix:
        """Run the first tokens of some prompts, under hooks, and keep their keys and values."""
        tokens = tokens.to(self.device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.attach(hooks))
            self._shorten_unembedding(stack, torch.zeros(len(tokens), 1, dtype=torch.long))
            last = self.backend.mlp(-1)
            if not hooks and last is not None:  # after the last keys and values nothing is read any more
                stack.enter_context(private.replaced_forward(last, _skip))
            kept = self.backend.run_and_keep(tokens, torch.ones_like(tokens))
        return Prefix(tokens.shape[1], kept)

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        lengths: Int[Tensor, " batch"],
        hooks: Sequence[tuple[str, HookFunction]] = (),
        *,
        positions: Literal["answer", "all"] = "answer",
        columns: Int[Tensor, "batch column"] | None = None,
        prefix: Prefix | None = None,
        start: Start | None = None,
    ) -> Float[Tensor, "..."]:
        """One forward pass under hooks, with the short cuts that this model allows.

        Parameters
        ----------
        tokens, lengths:
            Right-padded prompts and how many of their tokens are real.
        hooks:
            (hook point, function) pairs.
        positions:
            "answer": logits [batch, vocab] at the last real token, and the unembedding runs there only. "all": logits
            [batch, pos, vocab]; what stands at padding positions means nothing.
        columns:
            Token ids: the logits of these alone, [batch, column].
        prefix:
            The keys and values at the prompts' first tokens: hooks and logits then see the other positions only.
        start:
            Begin at this block with this residual stream; hooks of blocks below can't fire.

        Raises
        ------
        HookError
            If a hook point does not exist, or does not fire exactly once.
        """
        width = tokens.shape[1]
        drop_at = None
        if positions == "answer":
            verdict = self._verdict("answer", width)
            drop_at = verdict.detail if verdict.holds else None
        watched = any(name.startswith("unembed.") for name, _ in hooks)
        short = not watched and self.backend.unembedding is not None and self.allows("unembedding", width)
        return self.run_as_told(
            tokens,
            lengths,
            hooks,
            positions=positions,
            columns=columns,
            prefix=prefix,
            start=start,
            drop_at=drop_at,
            short_unembedding=short,
        )

    def run_as_told(
        self,
        tokens: Int[Tensor, "batch pos"],
        lengths: Int[Tensor, " batch"],
        hooks: Sequence[tuple[str, HookFunction]] = (),
        *,
        positions: Literal["answer", "all"] = "all",
        columns: Int[Tensor, "batch column"] | None = None,
        prefix: Prefix | None = None,
        start: Start | None = None,
        drop_at: str | None = None,
        short_unembedding: bool = False,
    ) -> Float[Tensor, "..."]:
        """:meth:`run` with the short cuts that are named, tried or not.

        Parameters
        ----------
        drop_at:
            The hook point behind which only the answer's position is computed; None: all are, and the answer's logits
            are picked from them.
        short_unembedding:
            Unembed with the weights themselves, in the columns that are wanted.
        """
        device = self.device
        skipped = prefix.length if prefix is not None else 0
        tokens = tokens[:, skipped:].to(device)
        lengths = lengths.to(device) - skipped
        mask = attention_mask(lengths, tokens.shape[1])
        hooks = list(hooks)
        if start is not None:
            # first, so that hooks of the caller at the same point see the stream
            hooks.insert(0, (f"blocks.{start.layer}.hook_resid_pre", lambda now: start.residual.to(now.device)))
        if drop_at is not None:
            hooks.append((drop_at, lambda now: _at(now, lengths - 1)))
        with ExitStack() as stack:
            if start is not None:
                for block in self.backend.blocks[: start.layer]:
                    stack.enter_context(private.replaced_forward(block, _skip))
            if short_unembedding:
                self._shorten_unembedding(stack, columns)
            own = stack.enter_context(self.attach(hooks))
            more: Mapping[str, Any] = {}
            if self.state.checkpointing and prefix is None and torch.is_grad_enabled():
                more, first = self.backend.without_cache, 0 if start is None else start.layer
                self._checkpoint_blocks(stack, dict(zip(own, hooks, strict=True)), first)
            if prefix is None:
                logits = self.model(tokens, attention_mask=mask, **more)
            else:
                logits = self.backend.run_after(prefix.kept, tokens, mask)
        often = [(name, hook.fired) for (name, _), hook in zip(hooks, own, strict=True) if hook.fired > 1]
        if often:
            raise HookError(f"Hook point {often[0][0]!r} fired {often[0][1]} times in one pass: it can't be a node.")
        if not isinstance(logits, Tensor):
            raise HookError(f"The model returned a {type(logits).__name__} instead of logits.")
        if positions == "answer" and drop_at is None:
            logits = _at(logits, lengths - 1)
        if columns is not None and not short_unembedding:
            logits = logits.gather(2, columns.to(logits.device)[:, None].expand(-1, logits.shape[1], -1))
        return logits[:, 0] if positions == "answer" else logits

    def _checkpoint_blocks(
        self, stack: ExitStack, hooks: Mapping[OwnHook, tuple[str, HookFunction]], first: int
    ) -> None:
        """Let every block run once more on the way backward, under the hooks that are inside of it."""
        for layer, block in list(enumerate(self.backend.blocks))[first:]:
            own = {hook: each for hook, each in hooks.items() if each[0].startswith(f"blocks.{layer}.")}
            forward = checkpointed(block.forward, partial(self._again, own))
            stack.enter_context(private.replaced_forward(block, forward))

    @contextmanager
    def _again(self, hooks: Mapping[OwnHook, tuple[str, HookFunction]]) -> Iterator[None]:
        """Functions on hook points while a block runs again: those that changed something, for others have seen it."""
        editing = [each for hook, each in hooks.items() if hook.edits]
        taken = self.points([name for name, _ in editing])
        places = [(taken[name], OwnHook(function)) for name, function in editing]
        try:
            for point, hook in places:
                point.add_hook(hook)
            yield
        finally:
            each_of([partial(private.remove_hook, self.backend.module_of(point), hook) for point, hook in places])

    def _shorten_unembedding(self, stack: ExitStack, columns: Int[Tensor, "batch column"] | None) -> None:
        """Unembed without the copy of the weights that a HookedTransformer makes, or in some columns only."""
        if self.backend.unembedding is None:
            return
        module, weight, bias = self.backend.unembedding

        def short(residual: Float[Tensor, "batch pos d_model"]) -> Tensor:
            if columns is None:
                return torch.nn.functional.linear(residual, weight.T, bias)
            own = columns.to(weight.device)
            logits = torch.einsum("bpd,dbc->bpc", residual, weight[:, own])
            return logits if bias is None else logits + bias[own][:, None]

        stack.enter_context(private.replaced_forward(module, short))

    def layout(self, names: Sequence[str], *, positions: Literal["answer", "all"] = "answer") -> dict[str, Layout]:
        """The layout of the activations at hook points, from two runs on a few tokens; in the order in which they fire.

        Raises
        ------
        HookError
            If a point does not fire, or gives no finite floating-point tensor with a batch axis.
        """
        seen: list[dict[str, tuple[int, ...]]] = []
        for width in (2, 3):
            found: dict[str, tuple[int, ...]] = {}

            def look(name: str, found: dict[str, tuple[int, ...]] = found) -> HookFunction:
                def function(activation: Tensor) -> None:
                    _check_activation(name, activation)
                    found[name] = tuple(activation.shape)

                return function

            tokens, lengths = torch.zeros(2, width, dtype=torch.long), torch.full((2,), width)
            with self.session(), torch.no_grad():
                self.run(tokens, lengths, [(name, look(name)) for name in names], positions=positions)
            seen.append(found)
        return {
            name: Layout(shape, tuple(i for i, n in enumerate(shape) if seen[1][name][i] != n))
            for name, shape in seen[0].items()
        }

    def depths(self, names: Sequence[str]) -> dict[str, int]:
        """The block that each hook point belongs to by the order in which points fire, in that order.

        -1 before the first block, the number of blocks after the last.
        """
        edges = [f"blocks.{layer}.hook_resid_post" for layer in range(self.n_layers)]
        first = "blocks.0.hook_resid_pre"
        order: list[str] = []
        # marks first: at one point, a name that is also a mark comes right after it
        taps = [(name, lambda now, name=name: order.append(name)) for name in (first, *edges)]
        taps += [(name, lambda now, name=f"*{name}": order.append(name)) for name in names]
        tokens, lengths = torch.zeros(1, 2, dtype=torch.long), torch.full((1,), 2)
        with self.session(), torch.no_grad():
            self.run_as_told(tokens, lengths, taps)
        found, layer = {}, -1
        for name in order:
            if name == first:
                layer = 0
            elif not name.startswith("*"):
                layer += 1
            else:
                own = name[1:]
                parts = own.split(".")
                named = int(parts[1]) if len(parts) > 1 and parts[0] == "blocks" and parts[1].isdigit() else layer
                found[own] = named
        return found


def _check_activation(name: str, activation: Any) -> None:
    if not isinstance(activation, Tensor) or not activation.is_floating_point():
        kind = activation.dtype if isinstance(activation, Tensor) else type(activation).__name__
        raise HookError(f"Hook point {name!r} gives {kind}, not an activation that can be gated.")
    if activation.ndim < 2 or activation.shape[0] != 2:
        raise HookError(f"Hook point {name!r} has shape {list(activation.shape)}: axis 0 is not the batch.")
    if not bool(activation.isfinite().all()):
        raise HookError(
            f"Hook point {name!r} holds infinite values (masked attention scores?), which can't be mixed with others: "
            "use 'attn.hook_pattern'."
        )


def _skip(residual: Tensor, *_: Any, **__: Any) -> Tensor:
    return residual


def _at(values: Float[Tensor, "batch pos width"], position: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 width"]:
    """One position of each example."""
    index = einops.repeat(position.to(values.device), "batch -> batch 1 width", width=values.shape[-1])
    return values.gather(1, index)
