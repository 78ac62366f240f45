"""Whatever ends an operation, the model is as it was: also where memory is short, or going back is itself interrupted."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from attack import interrupts
from helpers import BACKENDS, random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.models import kept
from dfa_lens.models.runner import Runner

hooked_only = pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer only")


@pytest.fixture(params=BACKENDS)
def own(request):
    return interrupts.fresh(request.param)


def test_every_step_is_taken():
    taken = []

    def fails(error):
        taken.append(error)
        raise error

    steps = [
        partial(fails, KeyboardInterrupt()),
        partial(taken.append, 1),
        partial(fails, MemoryError()),
        partial(taken.append, 2),
    ]
    with pytest.raises(KeyboardInterrupt):
        kept.each_of(steps)
    assert [each for each in taken if isinstance(each, int)] == [1, 2]


def no_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


@hooked_only
@pytest.mark.parametrize("held", [False, True])
def test_weights_are_laid_out_back_without_any_memory(monkeypatch, held):
    """Also where somebody has taken a view meanwhile, whose numbers stay; that one matrix then needs room of its own."""
    model = interrupts.fresh("hooked")
    before = interrupts.state(model)
    with dfa.prepared(model):
        assert not model.blocks[0].attn.W_O.is_contiguous()
        view = model.blocks[0].attn.W_O.detach() if held else None
        numbers = None if view is None else view.clone()
        with monkeypatch.context() as patched:
            if not held:
                for name in ("contiguous", "clone", "to"):
                    patched.setattr(torch.Tensor, name, no_memory)
                for name in ("empty", "zeros", "empty_like", "tensor"):
                    patched.setattr(torch, name, no_memory)
            Runner(model).state.turned.restore()
    assert interrupts.state(model) == before
    if view is not None:
        assert torch.equal(view, numbers)


@hooked_only
def test_an_error_at_one_matrix_leaves_no_other(monkeypatch):
    model = interrupts.fresh("hooked")
    straight, failed = kept.TurnedWeights._straighten, []

    def once(self, parameter):
        if not failed:
            failed.append(parameter)
            no_memory()
        straight(self, parameter)

    monkeypatch.setattr(kept.TurnedWeights, "_straighten", once)
    before = interrupts.state(model)
    with pytest.raises(torch.OutOfMemoryError), dfa.prepared(model):
        pass
    assert interrupts.state(model) == before  # the second round did it


def test_a_hook_of_another_thread_stays(own):
    """An operation takes away what it has put on itself, and nothing that somebody records beside it."""
    nodes, pairs = dfa.NodeSet.heads_and_mlps(own), random_pairs(2, 8)
    entered, done = threading.Event(), threading.Event()
    seen = {}

    def beside():
        with dfa.hooks.record(own, nodes) as activations:
            entered.set()
            done.wait(60)
            own(pairs.clean)
        seen.update(activations)

    thread = threading.Thread(target=beside)
    with Runner(own).session():
        thread.start()
        entered.wait(60)
    done.set()
    thread.join(60)
    assert seen.keys() == set(nodes.points)


def test_a_user_s_own_hooks_inside_a_context_stay(own):
    nodes, pairs = dfa.NodeSet.heads_and_mlps(own), random_pairs(2, 8)
    calls = []
    with dfa.hooks.record(own, nodes):
        own.hook_dict[nodes.points[0]].add_hook(lambda now, hook: calls.append(1))
        own(pairs.clean)
    own(pairs.clean)
    assert len(calls) == 2


@pytest.mark.parametrize("at", ["output", "input"])
def test_a_hook_point_is_there_wholly_or_not_at_all(own, at, monkeypatch):
    before = interrupts.state(own)
    runner = Runner(own)

    kind = type(runner.backend)

    def interrupted(self, name, point, real=kind._register):
        real(self, name, point)
        if point is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(kind, "_register", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.add_point("blocks.1.mlp", "hook_mine", at)
    assert interrupts.state(own) == before
    name = dfa.hooks.add_hook_point(own, "blocks.1.mlp", "hook_mine", at=at)
    assert dfa.NodeSet.from_points(own, {name: None}).names == (name,)
    dfa.hooks.remove_hook_point(own, name)
    assert interrupts.state(own) == before


def test_a_model_s_lock_is_free_after_an_interrupt():
    model = random_model()
    with pytest.raises(KeyboardInterrupt), dfa.prepared(model):
        raise KeyboardInterrupt
    free = []
    thread = threading.Thread(target=lambda: free.append(Runner(model).state.lock.acquire(timeout=5)))
    thread.start()
    thread.join()
    assert free == [True]


def test_what_was_kept_in_the_middle_is_not_put_back_afterwards():
    """A generator that nobody waits for ends late: by then the model is another's."""
    model = random_model(num_hidden_layers=1)
    weight = next(model.parameters())
    weight.requires_grad_(True)
    outer = kept.Kept(model)
    weight.requires_grad_(False)
    inner = kept.Kept(model)
    weight.requires_grad_(True)
    inner.restore()
    assert not weight.requires_grad  # the operation is on
    outer.restore(last=True)
    assert weight.requires_grad
    inner.restore(last=True)
    assert weight.requires_grad


def test_an_operation_that_is_over_is_round_no_other():
    """Also where an interrupt came before it could be forgotten."""
    model = random_model(num_hidden_layers=1)
    weight = next(model.parameters())
    before = weight.requires_grad
    first = kept.Kept(model)
    first.over = True
    assert kept.remembered_of(model).outermost is first
    second = kept.Kept(model)
    weight.requires_grad_(not before)
    second.restore(last=True)
    assert weight.requires_grad == before
    assert kept.remembered_of(model).outermost is None
