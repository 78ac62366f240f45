"""A model as it was found, and the way back there, whatever ends the work in between.

An interrupt (Ctrl-C) can arrive between any two steps of Python, in set-up and tear-down, too. So what was is noted
before anything is changed. The way back is one list of steps: each can be repeated, none needs memory, and none is left
out because another failed. And it is gone twice: an interrupt may cut one of the two short.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dfa_lens.models import private

WeightOrder = tuple[torch.nn.Parameter, tuple[int, ...]]


@dataclass
class State:
    """What is remembered of a model from one operation to the next; one lock for all of them."""

    lock: Any = field(default_factory=threading.RLock)
    points: dict[str, Any] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)
    verdicts: dict[Any, Any] = field(default_factory=dict)
    plain: dict[int, Any] = field(default_factory=dict)  #: what trials are compared with; of the running operation
    told: set[str] = field(default_factory=set)
    setting: Any = None  #: of the running operation: what trials depend on, None outside of one
    foreign: str | None = None  #: of the running operation: where somebody else's hooks are
    checkpointing: bool = False  #: of the running operation: whether passes with gradients run their blocks twice
    turned: TurnedWeights | None = None  #: of the running operation: its weights laid out anew
    outermost: Kept | None = None  #: of the running operation: what the model was before the first of it


_states: WeakKeyDictionary[Any, State] = WeakKeyDictionary()
# an interrupt at the end of a `with` can leave a lock locked: this one does not shut out its own thread then
_states_lock = threading.RLock()


def remembered_of(model: Any) -> State:
    """The one state of a model; of names put on a model for the length of an operation, that of the model."""
    own = vars(model).get("original_model", model)
    known = _states.get(own)
    if known is None:
        with _states_lock:
            known = _states.setdefault(own, State())
    return known


class OwnHook:
    """A function on a hook point that is known for ours wherever it is found.

    Attributes
    ----------
    fired:
        How often it was called.
    edits:
        Whether it returned something the last time: it does more than look.
    thread:
        Whose it is: an operation takes away what its own thread has left, and nothing of another.
    """

    def __init__(self, function: Callable[[Tensor], Tensor | None]) -> None:
        self.function, self.fired, self.edits, self.thread = function, 0, False, threading.get_ident()

    def __call__(self, activation: Tensor, hook: Any = None) -> Tensor:
        """The activation, or what stands in for it; ``hook`` is TransformerLens's hook point."""
        self.fired += 1
        out = self.function(activation)
        self.edits = out is not None
        # Always hand a tensor on: a bridge drops a tensor that was captured but not returned from the graph.
        return activation if out is None else out


class TurnedWeights:
    """Weights in memory as the passes read them, and back.

    A HookedTransformer copies its whole weights on every pass, and a pass with gradients keeps that copy until it has
    gone backward. A matrix that lies in memory the other way round, with the same values at the same indices, needs no
    copy. For the way back there is room from the start, one spare matrix of each size: a matrix is copied there, and
    what it leaves is the spare of the next. So nothing has to be allocated when memory is short.
    """

    def __init__(self) -> None:
        self.parameters: list[torch.nn.Parameter] = []
        self.spare: dict[Any, list[Tensor]] = {}

    def turn(self, weights: Iterable[WeightOrder]) -> None:
        """Lay out those of which nobody holds a view."""
        for parameter, order in weights:
            if not private.nobody_else_holds(parameter):
                continue
            if self._size(parameter) not in self.spare:
                room = torch.empty(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
                self.spare[self._size(parameter)] = [room]
            back = [order.index(axis) for axis in range(len(order))]
            self.parameters.append(parameter)
            parameter.data = parameter.data.permute(order).contiguous().permute(back)

    def restore(self) -> None:
        """Lay them out as before."""
        each_of(partial(self._straighten, parameter) for parameter in self.parameters)

    def _straighten(self, parameter: torch.nn.Parameter) -> None:
        now = parameter.data
        if now.is_contiguous():
            return
        rooms = self.spare[self._size(parameter)]
        room = rooms[-1] if rooms else torch.empty(now.numel(), dtype=now.dtype, device=now.device)
        rooms.clear()  # first: nothing else may be written there
        straight = room.view(now.shape)
        straight.copy_(now)
        parameter.data = straight  # of one piece: the values are in the old place, or in the new one
        if private.users_of(now) <= 2:
            rooms.append(now.as_strided((now.numel(),), (1,)))

    @staticmethod
    def _size(parameter: Tensor) -> Any:
        return parameter.numel(), parameter.dtype, parameter.device


class Kept:
    """Some models as they are now; :meth:`restore` puts them back, as often as it is called.

    Made with the locks of the models held. What is put back: which weights have a gradient, training modes, forwards,
    how weights lie in memory and whether they may be packed; what is taken away: hooks of ours that this thread has put
    on since.

    One that is made inside of another says what the model was in the middle of an operation. An interrupt can leave it
    to the end of a generator that nobody waits for, long after the operation: then it does nothing.
    """

    def __init__(self, *models: Any) -> None:
        self.over = False
        self._states = [remembered_of(model) for model in models]
        # one that is over can still be there, if an interrupt came in between
        found = (state.outermost for state in self._states)
        self._around = [around for around in found if around is not None and not around.over]
        devices = {parameter.device.type for model in models for parameter in model.parameters()} - {"meta"}
        self._steps: list[Callable[[], object]] = []
        for model in models:
            state = remembered_of(model)
            self._steps.append(partial(_restore_layout, state, state.turned))
            # by number, because accelerate makes new parameters of those that it loads from elsewhere
            trainable = [parameter.requires_grad for parameter in model.parameters()]
            self._steps.append(partial(_restore_gradients, model, trainable))
            for module in model.modules():
                hooks = set(map(id, _own_hooks(module)))
                self._steps.append(
                    partial(_restore_module, module, module.training, vars(module).get("forward"), hooks)
                )
            self._steps += [partial(private.put_packing, module, True) for module in private.packing(model)]
            for config in private.attention_configs(model):
                self._steps.append(partial(private.put_attention, config, config._attn_implementation_internal))
            self._steps.append(partial(_restore_state, state, state.setting, state.foreign, state.checkpointing))
        for device in devices | {"cpu"}:
            self._steps.append(partial(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device)))
        self._steps.append(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
        for state in self._states:
            if state.outermost is None or state.outermost.over:
                state.outermost = self

    def restore(self, *, last: bool = False) -> None:
        """Put the models back; the first error is raised when all that can be done is done.

        ``last``: the operation is over with that.
        """
        if last:
            self.over = True
            for state in self._states:
                if state.outermost is self:
                    state.outermost = None
        if not any(around.over for around in self._around):
            each_of(self._steps)


def each_of(steps: Iterable[Callable[[], object]]) -> None:
    """Take every step, whatever another raises; then raise the first error."""
    errors = []
    for step in steps:
        try:
            step()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def locks(models: Sequence[Any]) -> tuple[Any, Any]:
    """The locks of one or two models, in the order in which every thread takes them; of one model, its lock twice."""
    ordered = sorted((remembered_of(model).lock for model in models), key=id)
    return ordered[0], ordered[-1]


def _own_hooks(module: Any) -> list[OwnHook]:
    return [hook for hook in private.hooked(module) if isinstance(hook, OwnHook)]


def _restore_module(module: Any, training: bool, forward: Any, hooks: set[int]) -> None:
    for hook in _own_hooks(module):
        if id(hook) not in hooks and hook.thread == threading.get_ident():
            private.remove_hook(module, hook)
    if module._forward_pre_hooks:
        private.remove_cache_hooks(module)
    private.put_forward(module, forward)
    if module.training != training:
        module.training = training


def _restore_gradients(model: Any, trainable: Sequence[bool]) -> None:
    for parameter, before in zip(model.parameters(), trainable, strict=True):
        if parameter.requires_grad != before:
            parameter.requires_grad_(before)


def _restore_layout(state: State, before: TurnedWeights | None) -> None:
    if state.turned is not before and state.turned is not None:
        state.turned.restore()
    state.turned = before


def _restore_state(state: State, setting: Any, foreign: str | None, checkpointing: bool) -> None:
    state.setting, state.foreign, state.checkpointing = setting, foreign, checkpointing
    if setting is None:
        state.plain.clear()
