"""AtP*, expected gradients and nested integration steps, against plain passes with hooks of their own."""

import pytest
import torch
from helpers import float64_model, random_pairs
from test_attribution import metric_of, record

import dfa_lens as dfa
from dfa_lens.attribution.learned import NodePruning, UniformGradientSampling, hard_concrete
from dfa_lens.errors import DfaError
from dfa_lens.models.runner import Runner


def difference(logits, pairs):
    """[example] the metric, from logits at all positions."""
    rows = torch.arange(len(pairs))
    last = logits[rows, pairs.lengths - 1]
    return last[rows, pairs.answer] - last[rows, pairs.wrong]


def test_grad_drop_is_the_gradient_of_a_model_that_lacks_a_block(double):
    """For every block, by finite differences: the block's output is put back to its clean value behind each change."""
    pairs = random_pairs(3, seed=2)
    nodes = dfa.NodeSet.heads_and_mlps(double)["m*"]
    clean, corrupt = record(double, pairs.clean, pairs, nodes), record(double, pairs.corrupt, pairs, nodes)
    outs = {}
    with torch.no_grad():
        names = [f"blocks.{layer}.{name}" for layer in range(3) for name in ("hook_attn_out", "hook_mlp_out")]
        taps = [(name, lambda now, name=name: outs.__setitem__(name, now.clone())) for name in names]
        Runner(double).run(pairs.clean, pairs.lengths, taps)

    def moved(node, layer, step):
        """The metric with a node moved along Δ, and what a block adds held where it was."""
        point = node.point
        target = clean[point] + step * (clean[point] - corrupt[point])

        def move(now, hook):
            return target

        held = [(f"blocks.{layer}.{n}", lambda now, hook: outs[hook.name]) for n in ("hook_attn_out", "hook_mlp_out")]
        with torch.no_grad():
            return difference(double.run_with_hooks(pairs.clean, fwd_hooks=[(point, move), *held]), pairs)

    found = dfa.attribute(double, pairs, nodes=nodes, method="atp-star", batch_size=2)
    h = 1e-5
    for node, value in zip(nodes, found.values, strict=True):
        terms = [
            ((moved(node, layer, h) - moved(node, layer, -h)) / (2 * h)).abs()
            for layer in range(3)
            if layer != node.layer
        ]
        assert float(value) == pytest.approx(float(sum(terms).mean() / 2), rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def double():
    return float64_model(seed=4)


@pytest.mark.parametrize("letter", ["q", "k"])
def test_queries_and_keys_are_patched_through_the_softmax(double, letter):
    """In the last block no other block follows: an estimate is the change of z, by a forward pass, times a gradient."""
    pairs = random_pairs(3, seed=2)
    point, z = f"blocks.2.attn.hook_{letter}", "blocks.2.attn.hook_z"
    nodes = dfa.NodeSet.from_points(double, {point: 2})
    found = dfa.attribute(double, pairs, nodes=nodes, method="atp-star")
    corrupt = record(double, pairs.corrupt, pairs, nodes)[point]
    seen = {}

    def keep(now, hook):
        seen["z"] = now
        return now

    with torch.enable_grad():
        double.blocks[2].attn.W_O.requires_grad_(True)  # so that there is a graph
        embed = double.hook_embed
        leaf = []

        def start(now, hook):
            leaf.append(now.detach().requires_grad_(True))
            return leaf[0]

        values = difference(double.run_with_hooks(pairs.clean, fwd_hooks=[(embed.name, start), (z, keep)]), pairs)
        (gradient,) = torch.autograd.grad(values.sum(), [seen["z"]])
        double.blocks[2].attn.W_O.requires_grad_(False)
    before = seen["z"].detach()
    group = before.shape[2] // len(nodes)
    for head in range(len(nodes)):

        def patch(now, hook, head=head):
            out = now.clone()
            out[:, :, head] = corrupt[:, :, head]
            return out

        with torch.no_grad():
            double.run_with_hooks(pairs.clean, fwd_hooks=[(point, patch), (z, keep)])
        effect = ((before - seen["z"]) * gradient).sum((1, 3))
        mine = slice(head * group, (head + 1) * group)
        others = [i for i in range(before.shape[2]) if not mine.start <= i < mine.stop]
        assert effect[:, others].abs().max() < 1e-9
        # dropping block 0 or 1 changes no gradient at block 2; dropping block 2 leaves none
        assert float(found.values[head]) == pytest.approx(float(effect.sum(1).abs().mean()), rel=1e-4, abs=1e-7)


def test_expected_gradients_are_the_gradients_at_the_drawn_places(any_model, ragged):
    nodes = dfa.NodeSet.heads_and_mlps(any_model, with_input=True)
    found = dfa.attribute(any_model, ragged, nodes=nodes, method="expected-gradients", steps=2, seed=5)
    runner = Runner(any_model)
    embed = {}
    for name, tokens in (("clean", ragged.clean), ("corrupt", ragged.corrupt)):
        with torch.no_grad():
            runner.run(tokens, ragged.lengths, [("hook_embed", lambda now, n=name: embed.__setitem__(n, now.clone()))])
    total = 0.0
    for draw in range(2):
        places = torch.rand(len(ragged), generator=torch.Generator().manual_seed(5 * 1_000_003 + draw))[:, None, None]
        leaf = (embed["corrupt"] + places * (embed["clean"] - embed["corrupt"])).requires_grad_(True)
        with torch.enable_grad():
            value = metric_of(
                runner.run(ragged.clean, ragged.lengths, [("hook_embed", lambda now, at=leaf: at)]), ragged
            )
            (gradient,) = torch.autograd.grad(value, [leaf])
        total += float(((embed["clean"] - embed["corrupt"]) * gradient).sum()) / 2
    assert found["input"] == pytest.approx(total, rel=1e-4)
    assert found.meta["seed"] == 5
    one = dfa.attribute(any_model, ragged, nodes=nodes, method="expected-gradients", steps=2, seed=5, batch_size=1)
    torch.testing.assert_close(one.values, found.values, atol=1e-4, rtol=1e-4)


def test_expected_gradients_tend_to_the_path_integral(any_model, pairs):
    fine = dfa.attribute(any_model, pairs, steps=200).values
    few, many = (dfa.attribute(any_model, pairs, method="expected-gradients", steps=steps).values for steps in (2, 100))
    assert (many - fine).abs().max() < 0.5 * (few - fine).abs().max()


@pytest.mark.parametrize("method", ["nap-ig-inputs", "nap-ig-activations", "expected-gradients"])
def test_auto_takes_the_steps_that_it_has_not_taken(any_model, ragged, method, monkeypatch):
    """The same scores and completeness as with that many steps at once, for that many gradients."""
    scores = dfa.attribute(any_model, ragged, method=method, steps="auto", tolerance=0.3)
    plain = dfa.attribute(any_model, ragged, method=method, steps=scores.meta["steps"])
    torch.testing.assert_close(scores.values, plain.values, atol=1e-5 * float(plain.values.abs().max()), rtol=1e-4)
    for key, value in plain.meta["completeness"].items():
        assert scores.meta["completeness"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    if method == "nap-ig-inputs":
        rows = []
        run = Runner.run_as_told
        monkeypatch.setattr(
            Runner,
            "run_as_told",
            lambda self, tokens, *args, **more: (
                torch.is_grad_enabled() and rows.append(len(tokens)),
                run(self, tokens, *args, **more),
            )[1],
        )
        dfa.attribute(any_model, ragged, method=method, steps="auto", tolerance=0.3)
        assert sum(rows) == len(ragged) * scores.meta["steps"]


def test_hard_concrete_has_the_distribution_of_the_paper():
    """P(g = 0) = sigmoid(β·log(0.1/1.1) - α), and as much for 1 on the other side."""
    alpha = torch.tensor([-1.0, 0.0, 2.0])
    drawn = torch.linspace(1e-5, 1 - 1e-5, 100_001)[:, None].expand(-1, 3)
    gates = hard_concrete(alpha, drawn, 2 / 3)
    shut = torch.sigmoid(2 / 3 * torch.tensor(0.1 / 1.1).log() - alpha)
    torch.testing.assert_close((gates == 0).float().mean(0), shut, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        (gates == 1).float().mean(0), torch.sigmoid(alpha - 2 / 3 * torch.tensor(11.0).log()), atol=1e-3, rtol=0
    )


def test_sampled_gates_are_open_with_their_probability():
    """The mean gate is θ, and θ·(1 - θ) of the gates are between the ends."""
    logits = torch.tensor([-2.0, 0.0, 1.5]).requires_grad_(True)
    gates = UniformGradientSampling().gates(logits, 200_000, torch.Generator().manual_seed(0))
    kept = torch.sigmoid(logits)
    torch.testing.assert_close(gates.mean(0), kept, atol=5e-3, rtol=0)
    between = ((gates > 0) & (gates < 1)).float().mean(0)
    torch.testing.assert_close(between, kept * (1 - kept), atol=5e-3, rtol=0)
    (slope,) = torch.autograd.grad(gates.mean(0).sum(), [logits])  # so the gradient of the mean is that of θ
    torch.testing.assert_close(slope, (kept * (1 - kept)).detach(), atol=1e-2, rtol=0)


@pytest.mark.parametrize("method", [NodePruning(iterations=40), UniformGradientSampling(iterations=40)])
def test_learned_masks_find_a_planted_circuit(method):
    from test_attribution import planted

    scores = dfa.attribute(planted(), random_pairs(12, seed=5), method=method)
    assert set(scores.top(2)) == {"a0.h2", "a2.h1"}


def test_atp_star_refuses_positions(any_model, pairs):
    nodes = dfa.NodeSet.from_points(any_model, {"blocks.1.attn.hook_q": 1}, n_positions=10)
    with pytest.raises(DfaError, match="takes queries and keys by head"):
        dfa.attribute(any_model, pairs, nodes=nodes, method="atp-star")
