"""What other libraries keep to themselves is still where :mod:`dfa_lens.models.private` looks for it, one test for each.

When a new release of one of them breaks something, the name of the test that fails says what has moved.
"""

import functools
import re
import warnings

import pytest
import torch
from helpers import BACKENDS, random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.errors import HookError
from dfa_lens.models import private
from dfa_lens.models.backend import backend_of


@pytest.fixture
def own(request):
    """A model that a test may change."""
    return random_model(request.param if hasattr(request, "param") else BACKENDS[0])


def test_torch_counts_the_users_of_a_storage():
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    assert private.nobody_else_holds(parameter)
    view = parameter.data[1:]
    assert not private.nobody_else_holds(parameter)
    del view
    assert private.nobody_else_holds(parameter)
    assert not private.nobody_else_holds(torch.nn.Parameter(torch.zeros(3, 4).T))  # laid out anew already


def test_torch_says_that_memory_is_short():
    assert private.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert private.out_of_memory(caught.value)
    assert not private.out_of_memory(RuntimeError("The size of tensor a (2) must match"))


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_torch_keeps_hooks_of_modules_where_they_were(own, register):
    assert private.foreign_hook(own) is None
    handle = getattr(own.blocks[1].mlp, f"register_{register}")(lambda *args: None)
    assert re.fullmatch(r"module 'blocks.1.*mlp'", private.foreign_hook(own))  # a bridge has it under two names
    handle.remove()
    assert private.foreign_hook(own) is None


def test_torch_keeps_hooks_of_all_modules_where_they_were(own):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert "global" in private.foreign_hook(own)
    finally:
        handle.remove()
    assert private.foreign_hook(own) is None


def test_a_partial_function_of_ours_is_foreign_too(own):
    handle = own.blocks[0].register_forward_hook(functools.partial(lambda extra, *args: None, 3))
    assert private.foreign_hook(own).startswith("module 'blocks.0")
    handle.remove()


def test_hooks_of_transformer_lens_itself_are_no_foreign_ones(own):
    """A bridge puts some on norms, once they have been run."""
    from transformer_lens.hook_points import HookPoint

    handle = own.blocks[0].register_forward_hook(HookPoint.forward)
    assert private.foreign_hook(own) is None
    handle.remove()


def test_a_replaced_forward_is_seen_and_put_back(own):
    block = own.blocks[0]
    mine = vars(block)["forward"] = lambda *args, **kwargs: args[0]
    assert private.foreign_hook(own) == "the replaced forward of module 'blocks.0'"
    with private.replaced_forward(block, len):
        assert vars(block)["forward"] is len
    assert vars(block)["forward"] is mine
    del vars(block)["forward"]
    with private.replaced_forward(block, len):
        pass
    assert "forward" not in vars(block)


def test_torch_says_that_a_module_was_compiled(own):
    assert not private.compiled(own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 deprecates what it imports itself
        own.blocks[0].compile()
    assert private.compiled(own)


def test_accelerate_says_where_offloaded_weights_are_used():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    module = torch.nn.Linear(2, 2)
    assert private.execution_device(module) is None
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert private.execution_device(module) == torch.device("cpu")
    assert private.foreign_hook(module) is None
    remove_hook_from_module(module)


@pytest.mark.parametrize("own", BACKENDS, indirect=True)
def test_four_bit_modules_are_kept_from_packing(own):
    """On a module with bitsandbytes' field; tests/test_weights.py has its own."""
    from dfa_lens.errors import ModelError

    module = torch.nn.Linear(2, 2)
    own.add_module("four_bits", module)
    assert private.packing(own) == [] and not private.packed(own)
    module.support_avx512bf16_for_cpu = True
    with private.unpacked(own):
        assert private.packing(own) == []
    assert private.packing(own) == [module]
    seen = []
    own.hook_dict["hook_embed"].register_forward_hook(lambda *_: seen.append(module.support_avx512bf16_for_cpu))
    dfa.attribute(own, random_pairs(2), method="nap")
    assert set(seen) == {False} and module.support_avx512bf16_for_cpu
    module.weight.quant_state = type("State", (), {"packing_format_for_cpu": True})()
    with pytest.raises(ModelError, match="were packed when bitsandbytes ran it"):
        dfa.attribute(own, random_pairs(2), method="nap")


def test_a_hook_is_found_on_a_hook_point_and_taken_off(own):
    point = own.hook_dict["blocks.0.hook_mlp_out"]
    point.add_hook(lambda now, hook: None)
    theirs = list(point.fwd_hooks)
    seen = []

    def mine(now, hook):
        seen.append(now.shape)

    for _ in range(2):
        point.add_hook(mine)
        assert mine in private.hooked(point)
        own(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 3, dtype=torch.long))
        point.fwd_hooks[:] = point.fwd_hooks[: 1 + len(seen) % 2]  # the second time as if add_hook had been cut short
        private.remove_hook(point, mine)
        private.remove_hook(point, mine)
        own(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 3, dtype=torch.long))
        assert point.fwd_hooks == theirs and len(point._forward_hooks) == 1
    assert len(seen) == 2


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_a_function_is_taken_off_a_module(with_kwargs):
    module = torch.nn.Linear(2, 2)
    seen = []

    def hook(*args):
        seen.append(args)

    module.register_forward_hook(hook, with_kwargs=with_kwargs)
    module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    for _ in range(2):
        private.remove_torch_hook(module, hook)
    module(torch.ones(2))
    assert not seen and not module._forward_hooks_with_kwargs and not module._forward_pre_hooks_with_kwargs


def test_a_bridge_s_registry_can_be_written():
    from transformer_lens.hook_points import HookPoint

    bridge = random_model("bridge")
    private.enter_in_registry(bridge, "blocks.0.hook_mine", HookPoint())
    assert "blocks.0.hook_mine" in bridge.hook_dict
    private.enter_in_registry(bridge, "blocks.0.hook_mine", None)
    assert "blocks.0.hook_mine" not in bridge.hook_dict


def test_a_bridge_says_that_its_weights_were_processed():
    bridge = random_model("bridge")
    assert not private.weights_processed(bridge)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert private.weights_processed(bridge)


def test_a_bridge_takes_a_tokenizer_as_it_is():
    bridge, mine = random_model("bridge"), object()
    private.set_tokenizer(bridge, mine)
    assert bridge.tokenizer is mine


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer only")
def test_a_hooked_transformer_s_cache_has_entries():
    model = random_model("hooked")
    cache = private.hooked_cache(model.cfg, torch.device("cpu"), 2)
    assert len(cache.entries) == 3
    assert {"past_keys", "past_values"} <= set(vars(cache.entries[0]))
    assert hasattr(cache, "previous_attention_mask")


def test_a_bridge_s_cache_is_filled_under_whatever_name_it_has():
    """Until transformers 5.23 it is called past_key_values, from 5.24 on cache."""
    bridge = random_model("bridge")
    tokens = torch.ones(2, 4, dtype=torch.long)
    kept = backend_of(bridge).run_and_keep(tokens, torch.ones_like(tokens))
    assert len(kept.keys) == len(kept.values) == 3
    assert kept.keys[0].shape == (2, 2, 4, 8)
    again = private.cached_layers(private.key_value_cache(list(zip(kept.keys, kept.values, strict=True))))
    assert all(torch.equal(a, b) for (a, _), b in zip(again, kept.keys, strict=True))
    assert private.foreign_hook(bridge) is None  # the names are told by hooks that are gone


def test_a_cache_that_was_not_filled_is_found_out():
    pair = (torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
    private.check_cache([pair, pair], 2, 4, axis=2)
    for layers, length in (([], 4), ([pair], 4), ([pair, pair], 5)):
        with pytest.raises(HookError, match="key-value cache holds"):
            private.check_cache(layers, 2, length, axis=2)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer only")
def test_a_hooked_transformer_reads_its_weights_as_we_lay_them_out():
    """Laid out so, the copy that it makes on every pass is none: the same memory."""
    model = random_model("hooked")
    for parameter, order in backend_of(model).copied_weights():
        turned = parameter.data.permute(order).contiguous()
        assert turned.permute([order.index(axis) for axis in range(parameter.ndim)]).shape == parameter.shape
    names = [name for name, p in model.named_parameters() if any(p is q for q, _ in backend_of(model).copied_weights())]
    assert {name.split(".")[-1] for name in names} == {"W_Q", "_W_K", "_W_V", "W_O", "W_gate", "W_in", "W_out"}
