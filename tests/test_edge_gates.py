"""Masks of edges: against explicit sums over single edges, finite differences, and the runs at both ends."""

from contextlib import contextmanager

import pytest
import torch
from helpers import BACKENDS, float64_model, random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.models import edge_patches
from dfa_lens.models import stream as stream_module
from dfa_lens.models.edge_gates import run_gated
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner
from dfa_lens.models.stream import Stream

READERS = ["grouped", "per-head"]


def gated(model, pairs, edges, gates, *, positions="answer", share_prefix=True):
    """Logits under the gates; clean and corrupt logits."""
    with running(model, pairs, edges, gates, positions=positions, share_prefix=share_prefix) as logits:
        return logits


@contextmanager
def running(model, pairs, edges, gates, *, positions="answer", share_prefix=True):
    """The same, inside the session that a backward pass needs."""
    runner = Runner(model)
    with runner.session():
        run = PairedRun(runner, pairs, edges.nodes, share_prefix=share_prefix, positions=positions)
        clean = run.record("clean", nodes=False)[1]
        corrupt, corrupt_logits = run.record("corrupt")
        yield run_gated(Stream(runner, edges), run, gates, corrupt), clean, corrupt_logits


def random_gates(edges, n, *, seed=0, dtype=torch.float32):
    return torch.rand(n, *edges.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_single_edges(model, pairs, edges, gates):
    """The same with every writer's part by itself and a loop over writers and readers, by hooks of TransformerLens."""
    cfg = model.cfg
    points = [name for name in model.hook_dict if name.endswith(("hook_embed", "attn.hook_z", "hook_mlp_out"))]
    _, cache = model.run_with_cache(pairs.corrupt, names_filter=lambda name: name in points)
    now = {}

    def parts(activations, n):
        found = [activations["hook_embed"]]
        for layer in range(cfg.n_layers):
            for head in range(cfg.n_heads):
                if len(found) < n:
                    z = activations[f"blocks.{layer}.attn.hook_z"][:, :, head]
                    found.append(z @ model.blocks[layer].attn.W_O[head])
            if len(found) < n:
                found.append(activations[f"blocks.{layer}.hook_mlp_out"])
        return found

    def read(site, i, stream):
        for u, (a, b) in enumerate(zip(parts(now, site.n_before), parts(cache, site.n_before), strict=True)):
            stream = stream + (1 - gates[:, u, site.first + i])[:, None, None] * (b - a)
        return stream

    hooks, streams, added = [], {}, {}
    for name in points:
        hooks.append((name, lambda value, hook: now.__setitem__(hook.name, value)))
    for site in edges.sites:
        block = f"blocks.{site.layer}"
        if site.kind == "logits":
            hooks.append((f"{block}.hook_resid_post", lambda value, hook, site=site: read(site, 0, value)))
        elif site.kind == "mlp":

            def forth(value, hook, site=site):
                added[site.layer] = read(site, 0, value) - value
                return value + added[site.layer]

            hooks.append((f"{block}.hook_resid_mid", forth))
            hooks.append((f"{block}.hook_resid_post", lambda value, hook, site=site: value - added[site.layer]))
        else:
            if site.kind == "q":
                hooks.append(
                    (f"{block}.hook_resid_pre", lambda value, hook, site=site: streams.__setitem__(site.layer, value))
                )

            def project(value, hook, site=site):
                attention = model.blocks[site.layer].attn
                grouped = site.kind != "q" and hasattr(attention, "_W_K")
                weights = getattr(attention, f"{'_' if grouped else ''}W_{site.kind.upper()}")
                bias = getattr(attention, f"{'_' if grouped else ''}b_{site.kind.upper()}")
                norm = model.blocks[site.layer].ln1
                each = [norm(read(site, i, streams[site.layer])) @ weights[i] + bias[i] for i in range(len(site))]
                return torch.stack(each, 2)

            hooks.append((f"{block}.attn.hook_{site.kind}", project))
    # the change of a last block's MLP goes out of the stream before the logits read it
    hooks.sort(key=lambda pair: pair[0].endswith("resid_post") and pair[1].__code__.co_names == ())
    return model.run_with_hooks(pairs.clean, fwd_hooks=hooks)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="the hand-made hooks are those of a HookedTransformer")
@pytest.mark.parametrize("heads", [{"num_key_value_heads": 2}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_single_edges_one_by_one(family, heads):
    """Logits and the gradient of a loss by the gates."""
    model, pairs = float64_model(family=family, **heads), random_pairs(3, 7)
    edges = dfa.EdgeSet.of_model(model)
    gates = random_gates(edges, 3, dtype=torch.float64).requires_grad_(True)
    other = gates.detach().clone().requires_grad_(True)
    weights = torch.randn(3, 101, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.enable_grad():
        with running(model, pairs, edges, gates) as (found, *_):
            (gradient,) = torch.autograd.grad((found * weights).sum(), gates)
        expected = by_single_edges(model, pairs, edges, other)[:, -1]
        (wanted,) = torch.autograd.grad((expected * weights).sum(), other)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(gradient, wanted, atol=1e-8, rtol=1e-8)
    assert not gradient[:, ~edges.existing].any()


@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("positions", ["answer", "all"])
def test_finite_differences(readers, positions, monkeypatch):
    monkeypatch.setattr(stream_module, "TILE_BYTES", {"cpu": 40_000, "cuda": 40_000})  # several tiles
    model, pairs = float64_model(num_hidden_layers=2), random_pairs(2, 6, ragged=True)
    edges = dfa.EdgeSet.of_model(model, readers=readers)
    gates = random_gates(edges, 2, dtype=torch.float64)

    def loss(logits):
        logits = logits.log_softmax(-1)
        if positions == "all":
            return sum(logits[i, : int(n), 5].sum() for i, n in enumerate(pairs.lengths))
        return logits[:, 5].sum()

    with torch.enable_grad():
        leaf = gates.clone().requires_grad_(True)
        with running(model, pairs, edges, leaf, positions=positions) as (logits, *_):
            (gradient,) = torch.autograd.grad(loss(logits), leaf)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        way = torch.randn(gates.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ends = [gated(model, pairs, edges, gates + h * way, positions=positions)[0] for h in (1e-5, -1e-5)]
            slope = (loss(ends[0]) - loss(ends[1])) / 2e-5
        assert float((gradient * way).sum()) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("positions", ["answer", "all"])
def test_ones_are_the_clean_run_and_zeros_the_corrupt_run(backend, readers, positions):
    model, pairs = random_model(backend, family="qwen"), random_pairs(3, 9, ragged=True)
    edges = dfa.EdgeSet.of_model(model, readers=readers)

    def real(logits):
        return (
            logits
            if positions == "answer"
            else torch.cat([a[: int(n)] for a, n in zip(logits, pairs.lengths, strict=True)])
        )

    for value, end in ((1.0, 1), (0.0, 2)):
        runs = gated(model, pairs, edges, torch.full(edges.shape, value), positions=positions)
        torch.testing.assert_close(real(runs[0]), real(runs[end]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("readers", READERS)
def test_backends_batches_and_short_cuts_agree(readers, monkeypatch):
    """Each example with its mask, alone and in a batch, with a common beginning run once or not."""
    pairs = random_pairs(3, 14, seed=4)
    pairs.corrupt[:, :9] = pairs.clean[:, :9]
    pairs.corrupt[:, 10] = pairs.clean[:, 10] % 99 + 1
    found = []
    for backend in BACKENDS:
        model = random_model(backend)
        edges = dfa.EdgeSet.of_model(model, readers=readers)
        gates = random_gates(edges, 3)
        found.append(gated(model, pairs, edges, gates)[0])
        alone = [gated(model, pairs[i], edges, gates[i], share_prefix=False)[0] for i in range(3)]
        torch.testing.assert_close(found[-1], torch.cat(alone), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found[0], found[-1], atol=2e-4, rtol=1e-4)


def test_a_grouped_reader_is_its_heads_together(any_model):
    pairs = random_pairs(2, 8)
    grouped, per_head = (dfa.EdgeSet.of_model(any_model, readers=readers) for readers in READERS)
    gates = random_gates(grouped, 2)
    spread = torch.zeros(2, *per_head.shape)
    for own, each in zip(grouped.sites, per_head.sites, strict=True):
        spread[:, :, each.columns] = gates[:, :, own.columns].repeat_interleave(len(each) // len(own), 2)
    first, second = gated(any_model, pairs, grouped, gates)[0], gated(any_model, pairs, per_head, spread)[0]
    torch.testing.assert_close(first, second, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_zeros_and_ones_is_the_circuit_of_the_curve(backend):
    model, pairs = random_model(backend), random_pairs(3, 8)
    edges = dfa.EdgeSet.of_model(model)
    values = torch.randn(edges.shape, generator=torch.Generator().manual_seed(3))
    scores = dfa.EdgeScores(values, edges)
    curve = dfa.faithfulness_curve(model, pairs, scores, protocol="mib", sizes=[0, 70, len(edges)])
    kept = torch.zeros(edges.shape)
    best = edges.positions[scores.order()[:70]]
    kept[best[:, 0], best[:, 1]] = 1
    logits = gated(model, pairs, edges, kept)[0]
    rows = torch.arange(3)
    expected = logits[rows, pairs.answer] - logits[rows, pairs.wrong]
    torch.testing.assert_close(torch.from_numpy(curve.per_example[1]).float(), expected, atol=1e-4, rtol=1e-4)


def test_the_graph_does_not_hold_what_every_writer_adds(monkeypatch):
    """What is kept for the backward pass, beside a plain pass's own, stays below one [example, pos, writer, d_model]."""
    model = random_model(num_hidden_layers=6, num_attention_heads=8, intermediate_size=16)
    pairs, edges = random_pairs(4, 20), dfa.EdgeSet.of_model(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def held(run):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
            return tensor

        leaf = random_gates(edges, 4).requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(leaf)
        return sum(size for place, (_, size) in storages.items() if place not in weights)

    def by_edges(leaf):
        gated(model, pairs, edges, leaf)

    def by_nodes(leaf):
        runner = Runner(model)
        with runner.session():
            run = PairedRun(runner, pairs, edges.nodes, share_prefix=False)
            run.gated(edges.nodes, leaf[:, :, 0], corrupt=run.record("corrupt")[0])

    every_writer = 4 * 20 * len(edges.nodes) * 32 * 4
    plain, bounded = held(by_nodes), held(by_edges)
    monkeypatch.setattr(edge_patches, "_made_again", lambda function, *args: function(*args))
    assert bounded - plain < every_writer < (held(by_edges) - plain) / 4
