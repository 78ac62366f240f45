"""Ablations: what stands in the place of nodes that are left out, against hooks written by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import BACKENDS, random_model, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.data.content import fingerprint
from dfa_lens.errors import AlignmentError, DfaError, FaithfulnessError, HookError, PromptError
from dfa_lens.models.runner import Runner
from dfa_lens.transfer.edge_forms import FreeMask

NODES = dfa.NodeSet.for_sizes(3, 4)
NAMES = ("zero", "mean", "mean-positional")


@pytest.fixture(scope="module")
def model():
    return random_model()


def recorded(model, tokens):
    """Hook point → activation of one prompt without padding, [pos, ...]; by the model's own hooks."""
    seen = {}
    names = {*NODES.points, "hook_embed"}
    with torch.no_grad():
        model.run_with_hooks(
            tokens[None],
            fwd_hooks=[(n, lambda a, hook, n=n: seen.__setitem__(n, a[0].detach().clone())) for n in names],
        )
    return seen


def by_hand(model, pairs, ablation):
    """Prompt by prompt, token by token: hook point → function(offset from the answer) → what stands there."""
    seen = [recorded(model, pairs.clean[i, : pairs.lengths[i]]) for i in range(len(pairs))]
    found = {}
    for point in seen[0]:
        if ablation == "zero":
            found[point] = lambda offset, like=seen[0][point][0]: torch.zeros_like(like)
        elif ablation == "mean":
            mean = torch.cat([each[point] for each in seen]).double().mean(0).float()
            found[point] = lambda offset, mean=mean: mean
        else:
            longest = max(len(each[point]) for each in seen)
            means = [
                torch.stack([each[point][-1 - k] for each in seen if len(each[point]) > k]).double().mean(0).float()
                for k in range(longest)
            ]
            found[point] = lambda offset, means=means: means[offset]
    return found


def hand_run(model, pairs, i, instead, out):
    """The logits at the answer of one clean prompt, with the nodes ``out`` (and the embedding, if named) replaced."""
    tokens = pairs.clean[i, : pairs.lengths[i]]
    n = len(tokens)

    def replace(point, axis_nodes):
        def function(activation, hook):
            new = activation.clone()
            for position in range(n):
                value = instead[point](n - 1 - position)
                for node in axis_nodes:
                    if node.axis is None:
                        new[0, position] = value
                    else:
                        new[0, position, node.index] = value[node.index]
            return new

        return function

    hooks = []
    for site in NODES.sites:
        own = [NODES[p] for p in site.positions if NODES[p].name in out]
        if own:
            hooks.append((site.point, replace(site.point, own)))
    if "input" in out:
        hooks.append(("hook_embed", replace("hook_embed", [dfa.Node("input", "hook_embed", "input", -1)])))
    with torch.no_grad():
        return model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0, -1]


def hand_metric(model, pairs, instead, out):
    values = []
    for i in range(len(pairs)):
        logits = hand_run(model, pairs, i, instead, out)
        values.append(float(logits[pairs.answer[i]] - logits[pairs.wrong[i]]))
    return np.array(values)


@pytest.mark.parametrize("ablation", NAMES)
def test_exact_and_curves_are_those_of_hooks_by_hand(model, ablation, unchanged):
    """Prompts of different lengths, in batches with padding, against each prompt by itself without any."""
    pairs = random_pairs(3, 7, ragged=True, seed=3)
    instead = by_hand(model, pairs, ablation)
    whole = hand_metric(model, pairs, instead, ())
    nothing = hand_metric(model, pairs, instead, {*NODES.names, "input"})
    with unchanged(model):
        scores = dfa.attribute(model, pairs, method="exact", ablation=ablation, batch_size=2)
        curve = dfa.faithfulness_curve(model, pairs, scores, ablation=ablation, batch_size=2, sizes=[0, 6, 15])
    for name in ("a0.h1", "m1"):
        effect = float((whole - hand_metric(model, pairs, instead, {name})).mean())
        assert float(scores.values[NODES.position(name)]) == pytest.approx(effect, abs=1e-5)
    np.testing.assert_allclose(curve.clean_values, whole, atol=1e-5)
    np.testing.assert_allclose(curve.corrupt_values, nothing, atol=1e-5)
    order = [NODES.names[i] for i in scores.order("signed")]
    for i, k in enumerate(curve.sizes[:2]):
        expected = hand_metric(model, pairs, instead, set(order[k:]))
        np.testing.assert_allclose(curve.per_example[i], expected, atol=1e-5)
    noising = dfa.faithfulness_curve(model, pairs, scores, ablation=ablation, direction="noising", sizes=[0, 4, 15])
    np.testing.assert_allclose(noising.per_example[1], hand_metric(model, pairs, instead, set(order[:4])), atol=1e-5)
    np.testing.assert_allclose(noising.faithfulness[[0]], 1.0)
    assert noising.empty_faithfulness == 1.0
    assert noising.floor > curve.floor


def test_the_embedding_is_left_out_with_the_input_in_the_mib_protocol(model):
    pairs = random_pairs(3, 6, ragged=True, seed=5)
    instead = by_hand(model, pairs, "mean")
    values = torch.linspace(1, 2, 16)
    values[0] = 1.5  # the input stands in the middle
    scores = dfa.NodeScores(values, dfa.NodeSet.for_sizes(3, 4, with_input=True))
    curve = dfa.faithfulness_curve(model, pairs, scores, protocol="mib", ablation="mean", fractions=[0.2, 0.8])
    order = [scores.nodes.names[i] for i in scores.order("signed")]
    for i, k in enumerate(curve.sizes):
        np.testing.assert_allclose(curve.per_example[i], hand_metric(model, pairs, instead, set(order[k:])), atol=1e-5)
    assert ("input" in order[: curve.sizes[0]], "input" in order[: curve.sizes[1]]) == (False, True)


@pytest.mark.parametrize("ablation", NAMES)
def test_gradients_take_the_difference_from_the_reference(model, ablation):
    """nap: Δ·∂m/∂A at the clean run, by autograd on the plain model."""
    pairs = random_pairs(3, 6, ragged=True, seed=2)
    instead = by_hand(model, pairs, ablation)
    expected = torch.zeros(15, dtype=torch.float64)
    for i in range(len(pairs)):
        leaves = []

        def leaf(activation, hook, leaves=leaves):
            leaves.append(activation.detach().clone().requires_grad_(True))
            return leaves[-1] + 0 * activation

        tokens = pairs.clean[i, : pairs.lengths[i]]
        # every point by itself: a leaf cuts the graph below it
        for site in NODES.sites:
            logits = model.run_with_hooks(tokens[None], fwd_hooks=[(site.point, leaf)])[0, -1]
            value = leaves[-1]
            (gradient,) = torch.autograd.grad(logits[pairs.answer[i]] - logits[pairs.wrong[i]], [value])
            there = torch.stack([instead[site.point](len(tokens) - 1 - p) for p in range(len(tokens))])
            product = ((value.detach()[0] - there) * gradient[0]).double()
            own = product.sum() if site.axis is None else product.sum((0, 2))
            expected[list(site.positions)] += own.reshape(-1) / len(pairs)
    found = dfa.attribute(model, pairs, method="nap", ablation=ablation)
    torch.testing.assert_close(found.values, expected.float(), atol=1e-4, rtol=1e-4)
    assert found.meta["ablation"]["name"] == ablation


def test_paths_begin_at_the_reference(model):
    """What integrated gradients promise as a sum is that of the ablation, and is kept."""
    pairs = random_pairs(3, 6, seed=1)
    instead = by_hand(model, pairs, "mean")
    whole = hand_metric(model, pairs, instead, ()).mean()
    for method, steps in (("nap-ig-inputs", 30), ("nap-ig-activations", 10)):
        scores = dfa.attribute(model, pairs, method=method, steps=steps, ablation="mean")
        assert scores.meta["completeness"]["residual"] < 0.15, method
        if method == "nap-ig-inputs":
            expected = whole - hand_metric(model, pairs, instead, {"input"}).mean()
            assert scores.meta["completeness"]["expected"] == pytest.approx(expected, abs=1e-4)


def test_means_of_another_data_set_are_counted_from_the_answer(model):
    """Prompts of one length meet the same tokens of prompts of another, seen from the end."""
    data, pairs = random_pairs(4, 9, seed=8), random_pairs(3, 6, seed=9)
    instead = by_hand(model, data, "mean-positional")
    own = dfa.ablations.activations(model, pairs, dfa.ablations.Mean(data, positional=True))
    for point in NODES.points:
        expected = torch.stack([instead[point](5 - p) for p in range(6)]).expand(3, *own[point].shape[1:])
        torch.testing.assert_close(own[point], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(PromptError, match="prompts of 9 tokens, and the means by position are of prompts of up to 6"):
        dfa.attribute(model, data, method="nap", ablation=dfa.ablations.Mean(pairs, positional=True))
    corrupt = dfa.ablations.activations(model, pairs, dfa.ablations.Mean(prompts="corrupt"))["blocks.1.hook_mlp_out"]
    seen = [recorded(model, tokens)["blocks.1.hook_mlp_out"] for tokens in pairs.corrupt]
    torch.testing.assert_close(corrupt[0, 0], torch.cat(seen).mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ablation", ["corrupt", "mean-positional"])
def test_hooks_circuits_and_masks_agree(model, ablation, unchanged):
    """A circuit run, the same circuit as a mask of hooks, and as a saturated mask of a training's store."""
    pairs = random_pairs(4, 7, ragged=True, seed=4)
    circuit = dfa.Circuit(["a0.h2", "m1", "a2.h0"], NODES)
    with unchanged(model):
        found = dfa.circuits.run(model, pairs, circuit, ablation=ablation)
        instead = dfa.ablations.activations(model, pairs, ablation)
    rows = torch.arange(len(pairs))
    with torch.no_grad(), dfa.hooks.ablate(model, NODES, keep=circuit.names, corrupt=instead):
        kept = Runner(model).run(pairs.clean, pairs.lengths, positions="all")[rows, pairs.lengths - 1]
    torch.testing.assert_close(found.logits, kept, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), dfa.hooks.ablate(model, NODES, remove=circuit.names, corrupt=instead):
        removed = Runner(model).run(pairs.clean, pairs.lengths, positions="all")[rows, pairs.lengths - 1]
    knocked = dfa.circuits.ablate(model, pairs, circuit, ablation=ablation)
    torch.testing.assert_close(knocked.logits, removed, atol=1e-5, rtol=1e-5)

    from dfa_lens.transfer.store import ExampleStore

    for cache in ("device", "recompute"):
        store = ExampleStore(
            Runner(model), NODES, {"task": pairs}, intervention="circuit", positions="answer",
            cache=cache, share_prefix=True, ablation=ablation,
        )  # fmt: skip
        with store.runner.session(), torch.no_grad():
            store.fill(2)
            masked = store.masked(store.batch(rows), circuit.kept.float().expand(len(rows), -1))
        torch.testing.assert_close(masked, kept, atol=1e-5, rtol=1e-5)


def test_a_fit_mixes_in_what_it_is_told(model):
    pairs = random_pairs(6, 8, seed=6)
    scores = dfa.NodeScores(torch.linspace(-1, 1, 15), NODES)
    made = {
        ablation: dfa.fit(model, scores, pairs, steps=2, ablation=ablation, seed=0)
        for ablation in ("corrupt", "mean", dfa.ablations.Mean())
    }
    assert "ablation" not in made["corrupt"].meta
    assert made["mean"].meta["ablation"]["name"] == "mean"
    assert not torch.equal(made["mean"].W, made["corrupt"].W)
    assert torch.equal(made["mean"].W, made[dfa.ablations.Mean()].W)
    plain, mean = dfa.Recipe(), dfa.Recipe(ablation="mean")
    assert (plain == dfa.Recipe(ablation="corrupt"), plain == mean) == (True, False)
    assert (plain.key() == mean.key(), mean.key() == dfa.Recipe(ablation=dfa.ablations.Mean()).key()) == (False, True)
    with pytest.raises(AlignmentError, match="runs the corrupt prompts"):
        dfa.Recipe(ablation="zero", intervention="restore")
    with pytest.raises(AlignmentError, match="goes with intervention='circuit'"):
        dfa.Recipe(direction="noising", intervention="interpolate")
    assert dfa.Recipe(direction="noising").key() != plain.key()


@pytest.mark.parametrize("loss", ["kl", "logit-difference"])
def test_noising_masks_are_trained_towards_the_corrupt_run(model, loss):
    """The first step's loss, by hooks: every node at (1 - g)·now + g·corrupt, compared with the corrupt run."""
    pairs = random_pairs(4, 6, seed=2)
    scores = dfa.NodeScores(torch.linspace(-1, 1, 15), NODES)
    start = torch.randn(15, 15, generator=torch.Generator().manual_seed(0))
    options = {"initial": start, "batch_size": 4, "direction": "noising", "loss": loss}
    found = dfa.fit(model, {"one": scores}, {"one": pairs}, steps=1, **options)
    gates = torch.sigmoid(scores.values / scores.values.norm() @ start)
    with torch.no_grad():
        corrupt, cache = model.run_with_cache(pairs.corrupt)

        def mix(point, now, hook):
            layer, heads = int(point.split(".")[1]), point.endswith("hook_z")
            own = gates[5 * layer : 5 * layer + 4, None] if heads else gates[5 * layer + 4]
            return (1 - own) * now + own * cache[point]

        masked = model.run_with_hooks(pairs.clean, fwd_hooks=[(point, partial(mix, point)) for point in NODES.points])
    masked, goal = masked[:, -1], corrupt[:, -1]
    if loss == "kl":
        p = goal.log_softmax(-1)
        expected = (p.exp() * (p - masked.log_softmax(-1))).sum(-1).mean()
    else:
        rows = torch.arange(4)
        m, to = (each[rows, pairs.answer] - each[rows, pairs.wrong] for each in (masked, goal))
        expected = ((m - to) ** 2).mean() / to.abs().mean() ** 2
    assert found.history[0]["divergence"] == pytest.approx(float(expected), rel=1e-4)
    assert found.meta["direction"] == "noising"
    longer = dfa.fit(model, {"one": scores}, {"one": pairs}, steps=20, sparsity_weight=0.0, **options)
    assert longer.history[-1]["divergence"] < 0.7 * found.history[0]["divergence"]


class Given(FreeMask):
    """A mask that begins at given numbers."""

    def __init__(self, values):
        object.__setattr__(self, "values", values.nan_to_num())

    def start(self, problem):
        made = super().start(problem)
        made.bias.data.copy_(self.values)
        return made


def test_masks_of_edges_have_ablations_and_directions(model):
    """All edges of a writer closed is the writer left out: the first loss is that of a mask of nodes."""
    pairs = random_pairs(4, 6, ragged=True, seed=2)
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    edges = dfa.EdgeSet.of_model(model).where(writer="[am]*")
    values = dfa.controls.random_scores(nodes, seed=1).values
    of_edges = dfa.EdgeScores(values[:, None].expand(edges.shape).masked_fill(~edges.chosen, torch.nan), edges)
    for options in ({"ablation": "mean-positional"}, {"ablation": "zero", "direction": "noising"}):
        how = {"steps": 1, "batch_size": 4, "scaling": "raw", **options}
        start = torch.eye(15)
        by_nodes = dfa.fit(model, {"one": dfa.NodeScores(values[1:], nodes[1:])}, {"one": pairs}, initial=start, **how)
        made = dfa.fit(model, {"one": of_edges}, {"one": pairs}, form=Given(of_edges.values), edges=edges, **how)
        assert made.history[0]["divergence"] == pytest.approx(by_nodes.history[0]["divergence"], rel=1e-4)


def test_denoising_repairs_one_node_of_the_corrupt_run(model):
    pairs = random_pairs(4, 8, seed=7)
    scores = dfa.attribute(model, pairs, method="exact", direction="denoising")
    rows = torch.arange(4)

    def metric(logits):
        return float((logits[rows, -1, pairs.answer] - logits[rows, -1, pairs.wrong]).mean())

    with torch.no_grad():
        corrupt = metric(model(pairs.corrupt))
        seen = {}
        names = ["blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"]
        keep = [(n, lambda a, hook, n=n: seen.__setitem__(n, a.detach().clone())) for n in names]
        clean = metric(model.run_with_hooks(pairs.clean, fwd_hooks=keep))

        def head(activation, hook):
            new = activation.clone()
            new[:, :, 2] = seen[names[0]][:, :, 2]
            return new

        repaired = metric(model.run_with_hooks(pairs.corrupt, fwd_hooks=[(names[0], head)]))
        mlp = metric(model.run_with_hooks(pairs.corrupt, fwd_hooks=[(names[1], lambda a, hook: seen[names[1]])]))
    assert float(scores.values[NODES.position("a1.h2")]) == pytest.approx(repaired - corrupt, abs=1e-5)
    assert float(scores.values[NODES.position("m1")]) == pytest.approx(mlp - corrupt, abs=1e-5)
    assert scores.meta["metric_clean"] == pytest.approx(clean, abs=1e-5)
    assert scores.meta["metric_corrupt"] == pytest.approx(corrupt, abs=1e-5)
    leaves = []

    def leaf(activation, hook):
        leaves.append(activation.detach().clone().requires_grad_(True))
        return leaves[0]

    logits = model.run_with_hooks(pairs.corrupt, fwd_hooks=[(names[1], leaf)])[rows, -1]
    (gradient,) = torch.autograd.grad((logits[rows, pairs.answer] - logits[rows, pairs.wrong]).mean(), leaves)
    slope = float(((seen[names[1]] - leaves[0].detach()) * gradient).sum())
    found = dfa.attribute(model, pairs, method="nap", direction="denoising")
    assert float(found.values[NODES.position("m1")]) == pytest.approx(slope, rel=1e-4, abs=1e-5)
    path = dfa.attribute(model, pairs, method="nap-ig-inputs", steps=2, direction="denoising")
    assert path.meta["completeness"]["expected"] == pytest.approx(clean - corrupt, abs=1e-4)
    for options, what in (({"ablation": "mean"}, "ablation='corrupt'"), ({"metric": "kl"}, "compares with the clean")):
        with pytest.raises(DfaError, match=what):
            dfa.attribute(model, pairs, direction="denoising", **options)


def test_optimal_constants_are_the_minimum_of_what_is_left(model, unchanged):
    """One node, one batch: scipy finds the same loss from the plain model with a hook of its own."""
    from scipy.optimize import minimize

    pairs = random_pairs(6, 5, seed=11)
    node = dfa.NodeSet([NODES[14]])  # the last MLP block: 32 numbers
    with unchanged(model):
        how = dfa.ablations.Optimal(circuits="one", steps=60, lr=0.15, batch_size=6)
        trained = dfa.ablations.constants(model, pairs, how, nodes=node)
    with torch.no_grad():
        log_p = model(pairs.clean)[:, -1].log_softmax(-1)

    def loss_of(constant):
        hook = [("blocks.2.hook_mlp_out", lambda a, hook: constant.expand_as(a))]
        found = model.run_with_hooks(pairs.clean, fwd_hooks=hook)[:, -1].log_softmax(-1)
        return (log_p.exp() * (log_p - found)).sum(-1).mean()

    def for_scipy(values):
        leaf = torch.tensor(values, dtype=torch.float32, requires_grad=True)
        loss = loss_of(leaf)
        (gradient,) = torch.autograd.grad(loss, [leaf])
        return loss.item(), gradient.double().numpy()

    mean = dfa.ablations.constants(model, pairs, "mean", nodes=node).values["blocks.2.hook_mlp_out"]
    best = minimize(for_scipy, mean.double().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 150}).fun
    with torch.no_grad():
        ours, of_mean = (float(loss_of(each)) for each in (trained.values["blocks.2.hook_mlp_out"], mean))
    assert best < 0.8 * of_mean  # there is something to gain
    assert ours == pytest.approx(best, rel=0.05)


def test_optimal_constants_cost_less_than_means_on_the_whole(model):
    """Over circuits of all sizes alike, which is what they are trained for; of a given circuit a mean may cost less."""
    pairs = random_pairs(8, 5, seed=12)
    first, again = (
        dfa.ablations.constants(model, pairs, dfa.ablations.Optimal(steps=2, batch_size=4)) for _ in range(2)
    )
    assert all(torch.equal(first.values[point], again.values[point]) for point in first.values)
    many = pairs[torch.arange(8).repeat(50)]
    generator = torch.Generator().manual_seed(5)
    masks = (torch.rand(400, 15, generator=generator) < torch.rand(400, 1, generator=generator)).float()
    how = {"optimal": dfa.ablations.Optimal(pairs, steps=40, lr=0.1, batch_size=8), "mean": dfa.ablations.Mean(pairs)}
    with torch.no_grad():
        log_p, kl = model(many.clean)[:, -1].log_softmax(-1), {}
        for name, ablation in how.items():
            with dfa.hooks.gate(model, NODES, masks, corrupt=dfa.ablations.activations(model, many, ablation)):
                found = model(many.clean)[:, -1].log_softmax(-1)
            kl[name] = float((log_p.exp() * (log_p - found)).sum(-1).mean())
    assert kl["optimal"] < 0.9 * kl["mean"], kl


def test_custom_points_and_other_layouts(model):
    """Points behind the answer's selection, values per head, and attention patterns, whose axis 1 is no position."""
    pairs = random_pairs(4, 8, ragged=True, seed=13)
    points = {"blocks.{layer}.attn.hook_v": 2}
    if "hooked" in BACKENDS:  # a bridge warns of edits there
        points["ln_final.hook_normalized"] = None
    nodes = dfa.NodeSet.from_points(model, points)
    seen = []
    for i in range(len(pairs)):
        with torch.no_grad():
            hook = [("blocks.1.attn.hook_v", lambda a, hook: seen.append(a[0].clone()))]
            model.run_with_hooks(pairs.clean[i : i + 1, : pairs.lengths[i]], fwd_hooks=hook)
    made = dfa.ablations.constants(model, pairs, "mean", nodes=nodes)
    torch.testing.assert_close(made.values["blocks.1.attn.hook_v"], torch.cat(seen).mean(0), atol=1e-5, rtol=1e-5)
    assert dfa.attribute(model, pairs, method="exact", nodes=nodes, ablation="mean").values.isfinite().all()
    patterns = dfa.NodeSet.from_points(model, {"blocks.1.attn.hook_pattern": 1})
    with pytest.raises(HookError, match="Axis 1 of hook point 'blocks.1.attn.hook_pattern' is not the position"):
        dfa.attribute(model, pairs, method="exact", nodes=patterns, ablation="mean")
    zeroed = dfa.attribute(model, pairs, method="exact", nodes=patterns, ablation="zero")
    assert zeroed.values.abs().max() > 1e-3


def test_what_can_not_be_had_is_said_at_once(model):
    pairs = random_pairs(3, 6)
    with pytest.raises(DfaError, match="There is no ablation 'mena'|mean"):
        unchecked(dfa.attribute)(model, pairs, ablation="mena")
    with pytest.raises(HookError, match="no constant for hook point"):
        dfa.attribute(model, pairs, ablation=dfa.ablations.Constants({"hook_embed": torch.zeros(32)}))
    made = dfa.ablations.constants(model, pairs, "mean").values
    with pytest.raises(HookError, match=r"has shape \[3\], and \[32\] is needed"):
        dfa.attribute(model, pairs, ablation=dfa.ablations.Constants({**made, "hook_embed": torch.zeros(3)}))
    for how in ({"steps": -1}, {"batch_size": 0}, {"lr": 0.0}):
        with pytest.raises(DfaError, match=next(iter(how))):
            dfa.ablations.Optimal(**how)
    with pytest.raises(DfaError, match="no constants"):
        dfa.ablations.constants(model, pairs, "corrupt")
    with pytest.raises(HookError, match="one of the two"), dfa.hooks.ablate(model, NODES, corrupt={}):
        pass
    edges = dfa.attribute_edges(model, pairs, method="eap")
    noising = dfa.faithfulness_curve(model, pairs, edges.to_nodes(), direction="noising", sizes=[0, 3])
    for use in (noising.smallest, noising.smallest_size, lambda: noising.at(10)):
        with pytest.raises(FaithfulnessError, match="direction='denoising'"):
            use()


def test_the_defaults_go_by_the_keys_they_had():
    """Studies that were made before there were ablations are found again."""
    assert dfa.Recipe().key() == "57a83bedc77e9201777b8b93acaad608"
    assert fingerprint(dfa.ablations.Mean()) != fingerprint(dfa.ablations.Mean(positional=True))


def test_the_command_line_gives_what_the_library_gives(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from dfa_lens.cli import app

    monkeypatch.chdir(tmp_path)

    def invoke(arguments):
        return CliRunner().invoke(app, arguments.split())

    name = "--model llama3-tiny-source --task ioi -n 4"
    done = invoke(f"attribute {name} --method nap --ablation mean --out s.safetensors")
    assert done.exit_code == 0, done.exception
    source = dfa.zoo.load("llama3-tiny-source")
    pairs = dfa.tasks.load("ioi", source.tokenizer, n=4)
    expected = dfa.attribute(source, pairs, method="nap", ablation="mean")
    assert torch.equal(dfa.NodeScores.load("s.safetensors").values, expected.values)
    done = invoke(f"evaluate {name} --split train --scores s.safetensors --ablation zero --direction noising --json")
    assert '"circuit": null' in done.stdout
    done = invoke(f"attribute {name} --edges --method eap --ablation mean --out e.safetensors")
    assert done.exit_code == 0, done.exception
    of_edges = dfa.attribute_edges(source, pairs, method="eap", ablation="mean")
    assert torch.equal(dfa.EdgeScores.load("e.safetensors").flat, of_edges.flat)
