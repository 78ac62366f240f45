"""estimate against what really happens: calls counted, memory measured by torch's profiler."""

import pytest
import torch
from helpers import random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.errors import DfaError
from dfa_lens.models.runner import Runner

STEPS, SIZES = 4, [0, 3, 9, 20]
METHODS = {"nap": 1, "nap-ig-inputs": 3, "nap-ig-activations": 2, "exact": 1}


@pytest.fixture(scope="module", params=["llama", "qwen"])
def setting(request):
    from helpers import BACKENDS

    backend = BACKENDS[0] if request.param == "llama" else BACKENDS[-1]
    model = random_model(
        backend,
        family=request.param,
        vocab_size=1000,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    pairs = random_pairs(12, 32, vocabulary=1000)
    pairs.corrupt[:, 0] = pairs.clean[:, 0] % 999 + 1  # nothing in common at the beginning: whole passes
    return model, pairs


def run_all(model, pairs, method, steps, batch_size):
    source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
    flat = dfa.controls.uniform(dfa.NodeSet.heads_and_mlps(model))
    return {
        "attribute": lambda: dfa.attribute(model, pairs, method=method, steps=steps, batch_size=batch_size),
        "fit": lambda: dfa.fit(model, {"a": source}, {"a": pairs}, steps=STEPS, batch_size=batch_size),
        "faithfulness_curve": lambda: dfa.faithfulness_curve(model, pairs, flat, sizes=SIZES, batch_size=batch_size),
    }


def peak_bytes(function):
    """Most memory in use at one time, beyond what was there before, from every allocation that torch reports."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events):
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("method", METHODS)
def test_passes(setting, method):
    """Examples that went forward are counted at the embedding, those that went backward at its gradient."""
    model, pairs = setting
    steps = METHODS[method]
    assert Runner(model).allows("start", 12)  # tried once per model, on a few tokens
    needs = dfa.estimate(model, pairs, batch_size=8, method=method, steps=steps, fit_steps=STEPS, sizes=len(SIZES))
    for operation, work in run_all(model, pairs, method, steps, 8).items():
        forward = []
        handle = model.register_forward_pre_hook(lambda m, args, forward=forward: forward.append(len(args[0])))
        try:
            work()
        finally:
            handle.remove()
        looked = 0 if operation == "attribute" else 4 if operation == "fit" else 0  # two runs on two prompts
        assert sum(forward) - looked == needs[operation].forward


@pytest.mark.parametrize(("method", "batch_size"), [("nap-ig-inputs", 4), ("nap-ig-inputs", 12), ("exact", 6)])
def test_memory_within_a_fifth(setting, method, batch_size):
    model, pairs = setting
    needs = dfa.estimate(model, pairs, batch_size=batch_size, method=method, steps=2, fit_steps=STEPS, sizes=len(SIZES))
    for operation, work in run_all(model, pairs, method, 2, batch_size).items():
        work()  # what is allocated once and for all
        with Runner(model).session(passes=9):  # the profiler does not see that the weights' former memory is given back
            measured = peak_bytes(work)
        assert needs[operation].peak_bytes == pytest.approx(measured, rel=0.2), operation
    assert needs.parameter_bytes == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("together", [2, 3])
def test_memory_of_sizes_that_share_a_pass(setting, together):
    model, pairs = setting
    need = dfa.estimate(model, pairs, batch_size=4, sizes=len(SIZES), sizes_per_pass=together)["faithfulness_curve"]
    flat = dfa.controls.uniform(dfa.NodeSet.heads_and_mlps(model))

    def work():
        dfa.faithfulness_curve(model, pairs, flat, sizes=SIZES, batch_size=4, sizes_per_pass=together)

    work()
    with Runner(model).session(passes=9):
        assert need.peak_bytes == pytest.approx(peak_bytes(work), rel=0.2)


@pytest.mark.parametrize(("method", "steps"), [("eap", 1), ("eap-ig-inputs", 3)])
def test_edges(setting, method, steps, unchanged):
    """Examples that pass are counted, memory is measured; an estimate runs nothing that changes the model."""
    model, pairs = setting
    edges = dfa.EdgeSet.of_model(model)
    with unchanged(model):
        found = dfa.estimate(model, pairs, edges=edges, batch_size=6, method=method, steps=steps, sizes=3)
    scores = dfa.attribute_edges(model, pairs[:2], method="eap")
    work = {
        "attribute_edges": lambda: dfa.attribute_edges(model, pairs, method=method, steps=steps, batch_size=6),
        "faithfulness_curve": lambda: dfa.faithfulness_curve(model, pairs, scores, sizes=[0, 9, 30], batch_size=6),
    }
    for operation, run in work.items():
        run()
        forward = []
        handle = model.register_forward_pre_hook(lambda m, args, forward=forward: forward.append(args[0].numel()))
        try:
            run()
        finally:
            handle.remove()
        checks = 2 * 32  # edges are tried on a few tokens first
        assert abs(sum(forward) - 32 * found[operation].forward) <= checks, operation
        with Runner(model).session(passes=9):
            measured = peak_bytes(run)
        assert 0.5 < found[operation].peak_bytes / measured < 2, (operation, found[operation].peak_bytes / measured)


def test_an_estimate_is_about_nodes_or_edges(setting):
    model, pairs = setting
    edges = dfa.EdgeSet.of_model(model)
    assert list(dfa.estimate(model, pairs, edges=edges).to_frame()["operation"]) == [
        "attribute_edges",
        "faithfulness_curve",
    ]
    with pytest.raises(DfaError, match="about nodes or about edges"):
        dfa.estimate(model, pairs, edges.nodes, edges=edges)
    with pytest.raises(DfaError, match="Unknown edge method 'nap'"):
        dfa.estimate(model, pairs, edges=edges, method="nap")


def test_it_reads(setting, unchanged):
    model, pairs = setting
    with unchanged(model):
        found = dfa.estimate(model, pairs)
    assert repr(found).startswith(f"Estimate({found.parameters:,} parameters")
    assert list(found.to_frame()["operation"]) == ["attribute", "fit", "faithfulness_curve"]
    on_cpu = dfa.estimate(model, pairs, cache="cpu")["fit"].cache_bytes
    recomputed = dfa.estimate(model, pairs, cache="recompute")["fit"]
    assert recomputed.cache_bytes < on_cpu < found["fit"].cache_bytes
    assert recomputed.forward > found["fit"].forward
    with pytest.raises(DfaError, match="No operation 'train'; there are attribute, fit"):
        found["train"]
    with pytest.raises(DfaError, match="batch_size must be at least 1"):
        dfa.estimate(model, pairs, batch_size=0)
    with pytest.raises(DfaError, match="sizes_per_pass must be at least 1, not 0"):
        dfa.estimate(model, pairs, sizes_per_pass=0)


def test_other_nodes(setting):
    """Neurons: one hook point a layer, d_mlp wide."""
    model, pairs = setting
    neurons = dfa.NodeSet.from_points(model, {"blocks.{layer}.mlp.hook_post": 2})
    need = dfa.estimate(model, pairs, neurons, method="exact", batch_size=8)["attribute"]
    assert need.forward == len(pairs) * (2 + 4 * 256)
    streams = 8 * 32 * 3 * 96 * 4  # the residual stream before blocks 1, 2 and 3
    assert need.cache_bytes == 8 * 32 * 4 * 256 * 4 + streams
    assert torch.is_grad_enabled()
