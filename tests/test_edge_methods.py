"""Edges by other rules, at random places, under ablations, by learned masks: against models and hooks by hand, node
scores of the same method, and circuits of nodes."""

import math

import numpy as np
import pytest
import torch
from families import hugging_face
from helpers import BACKENDS, random_model, random_pairs
from test_ablations import NODES, by_hand, hand_metric
from test_edge_attribution import close, effect_by_hand
from test_gradient_rules import Written, shared, softened

import dfa_lens as dfa
from dfa_lens.attribution.edge_methods import LearnedEdges
from dfa_lens.attribution.learned import Learned, Matryoshka, UniformGradientSampling
from dfa_lens.errors import DfaError
from dfa_lens.models.edge_gates import run_gated
from dfa_lens.models.paired_run import PairedRun
from dfa_lens.models.runner import Runner
from dfa_lens.models.stream import Stream

RULES = ("relp", "attnlrp", "gim")


class WrittenEdges(Written):
    """A Llama or Qwen-2 in which every reader has a stream of its own to read, and so a gradient of its own."""

    def read(self, stream, name, norm):
        self.readers[name] = stream * 1
        return self.norm(norm, self.readers[name])

    def heads(self, projection, letter, layer, stream, norm):
        d = self.config.hidden_size // self.config.num_attention_heads
        weight, bias = self.weight(projection)
        found = []
        for head, own in enumerate(weight.split(d)):
            x = self.read(stream, f"a{layer}.{'h' if letter == 'q' else 'kv'}{head}<{letter}>", norm)
            found.append(torch.nn.functional.linear(x, own, None if bias is None else bias[head * d : head * d + d]))
        return torch.stack(found, 1)

    def run(self, tokens):
        self.readers, nodes = {}, {}
        config, d = self.config, self.config.hidden_size // self.config.num_attention_heads
        x = nodes["input"] = self.model.model.embed_tokens.weight.double()[tokens].requires_grad_(True)
        mask = torch.full((tokens.shape[1],) * 2, -math.inf).triu(1).double()
        for i, layer in enumerate(self.model.model.layers):
            attention, norm = layer.self_attn, layer.input_layernorm
            q, k, v = (self.heads(getattr(attention, f"{letter}_proj"), letter, i, x, norm) for letter in "qkv")
            group = config.num_attention_heads // config.num_key_value_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            q, k = self.rotated(q), self.rotated(k).transpose(2, 3)
            if self.method == "relp":
                z = (q @ k / d**0.5 + mask).softmax(-1).detach() @ v
            else:
                scores = shared(q, k, torch.matmul) / d**0.5 + mask
                pattern = softened(scores, 2.0) if self.method == "gim" else scores.softmax(-1)
                z = shared(pattern, v, torch.matmul)
            for head in range(z.shape[1]):
                out = attention.o_proj.weight.double()[:, head * d : head * d + d]
                nodes[f"a{i}.h{head}"] = torch.nn.functional.linear(z[:, head], out)
                x = x + nodes[f"a{i}.h{head}"]
            nodes[f"m{i}"] = self.mlp(layer.mlp, self.read(x, f"m{i}", layer.post_attention_layernorm))
            x = x + nodes[f"m{i}"]
        return self.linear(self.model.lm_head, self.read(x, "logits", self.model.model.norm)), nodes

    def edge_scores(self, pairs, edges):
        logits, clean = self.run(pairs.clean)
        readers = self.readers
        _, corrupt = self.run(pairs.corrupt)
        rows = torch.arange(len(pairs))
        last = logits[rows, pairs.lengths - 1]
        metric = (last[rows, pairs.answer] - last[rows, pairs.wrong]).mean()
        found = torch.autograd.grad(metric, list(readers.values()), allow_unused=True)
        gradients = dict(zip(readers, found, strict=True))
        return [
            float(((clean[writer] - corrupt[writer]).detach() * gradients[reader]).sum())
            if gradients[reader] is not None
            else 0.0
            for writer, reader in edges
        ]


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("method", RULES)
def test_rules_are_those_of_a_model_written_anew(family, method, unchanged):
    direct, pairs = random_model("transformers", family=family), random_pairs(ragged=True, seed=3)
    models = [random_model("bridge", family=family)] if method == "gim" else [direct, random_model(family=family)]
    for model in models:
        with unchanged(model):
            found = dfa.attribute_edges(model, pairs, method=method, batch_size=4)
        written = WrittenEdges(direct.original_model, method).edge_scores(pairs, found.edges)
        expected = torch.tensor(written)
        torch.testing.assert_close(found.flat, expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-3)
    assert (expected[torch.tensor(["<q>" in reader for _, reader in found.edges])] == 0).all() == (method == "relp")


OPTIONS = [
    *({"method": method} for method in RULES),
    {"method": "expected-gradients", "steps": 2, "seed": 3},
    {"method": "eap", "ablation": "mean-positional"},
    {"method": "eap-ig-inputs", "steps": 2, "ablation": "mean"},
    {"method": "eap-ig-activations", "steps": 2, "ablation": "zero"},
    {"method": "eap-ig-inputs", "steps": 2, "direction": "denoising"},
]
OF_NODES = {"eap": "nap", "eap-ig-inputs": "nap-ig-inputs", "eap-ig-activations": "nap-ig-activations"}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize(("backend", "readers"), [(BACKENDS[0], "grouped"), ("bridge", "per-head")])
def test_row_sums_are_node_scores(options, backend, readers):
    model, pairs = random_model(backend), random_pairs(5, 8, ragged=True, seed=1)
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    named = {**options, "method": OF_NODES.get(options["method"], options["method"])}
    if named.get("ablation") == "zero":  # of a stream of zeros, the norm's gradient knows no bounds
        nodes = nodes[1:]
    expected = dfa.attribute(model, pairs, nodes=nodes, batch_size=2, **named)
    scores = dfa.attribute_edges(model, pairs, readers=readers, batch_size=3, **options)
    found = scores.to_nodes()
    close(found.values[-len(nodes) :], expected.values)
    for key in ("metric_clean", "metric_corrupt"):
        assert scores.meta[key] == pytest.approx(expected.meta[key], rel=1e-4)
    for key in ("seed", "ablation", "direction"):
        assert scores.meta.get(key) == expected.meta.get(key)
    if options["method"] == "eap-ig-inputs":
        assert scores.meta["completeness"] == pytest.approx(expected.meta["completeness"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("method", ["relp", "attnlrp"])  # gim needs attention scores, which a bridge shows
def test_the_sums_of_heads_are_node_scores_behind_norms_and_beside_mlps(family, method):
    """What reaches the stream of a head behind a norm depends on the rule for that norm."""
    model, pairs = hugging_face(family), random_pairs(3, 8, seed=1)
    expected = dfa.attribute(model, pairs, method=method)
    found = dfa.attribute_edges(model, pairs, method=method).to_nodes()
    heads = [name for name in expected.nodes.names if ".h" in name]
    close(torch.tensor([found[name] for name in heads]), torch.tensor([expected[name] for name in heads]))


def in_place_of(pairs, instead):
    """Hook point → [pair, pos, …], from what stands there at each distance from the answer."""
    width = pairs.clean.shape[1]
    return {
        point: torch.stack(
            [torch.stack([at(max(int(n) - 1 - i, 0)) for i in range(width)]) for n in pairs.lengths.tolist()]
        )
        for point, at in instead.items()
    }


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_exact_under_ablations_is_what_edges_set_by_hand_give(ablation):
    model, pairs = random_model(), random_pairs(3, 7, ragged=True, seed=3)
    instead = in_place_of(pairs, by_hand(model, pairs, ablation))
    whole = dfa.EdgeSet.of_model(model)
    patterns = ["*<q>", "*<k>", "*<v>", "m*", "logits"]
    chosen = torch.stack([whole.where(reader=p).sample(2, seed=i).chosen for i, p in enumerate(patterns)]).any(0)
    edges = whole.choose(chosen)
    scores = dfa.attribute_edges(model, pairs, method="exact", edges=edges, ablation=ablation, batch_size=2)
    expected = torch.tensor([effect_by_hand(model, pairs, *edge, instead) for edge in edges])
    torch.testing.assert_close(scores.flat, expected, atol=1e-5, rtol=1e-4)
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize("ablation", ["corrupt", "zero", "mean-positional"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_circuits_of_all_edges_of_some_writers_are_circuits_of_nodes(ablation, direction):
    """And those of nodes are those of hooks by hand (test_ablations)."""
    model, pairs = random_model(), random_pairs(4, 7, ragged=True, seed=4)
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    ranked = dfa.controls.random_scores(nodes, seed=2)
    edges = dfa.EdgeSet.of_model(model)
    values = ranked.values[:, None].expand(edges.shape).masked_fill(~edges.existing, torch.nan)
    order = ranked.order("signed").tolist()
    each = edges.existing.sum(1)
    ks = [0, 3, 9, len(nodes)]
    sizes = [int(each[order[:k]].sum()) for k in ks]
    how = {"protocol": "mib", "ablation": ablation, "direction": direction, "batch_size": 3}
    curve = dfa.faithfulness_curve(model, pairs, dfa.EdgeScores(values, edges), sizes=sizes, **how)
    expected = dfa.faithfulness_curve(model, pairs, ranked, sizes=ks, **how)
    np.testing.assert_allclose(curve.per_example, expected.per_example, atol=1e-5)
    np.testing.assert_allclose(curve.corrupt_values, expected.corrupt_values, atol=1e-5)
    assert (curve.ablation, curve.direction, curve.unit) == (ablation, direction, "edges")
    assert np.ptp(curve.per_example, axis=0).min() > 1e-3
    if direction == "denoising":
        circuit = dfa.EdgeScores(values, edges).circuit(sizes[1], with_input=True)
        alone = dfa.circuits.run(model, pairs, circuit, ablation=ablation, batch_size=3)
        np.testing.assert_allclose(alone.values, curve.per_example[1], atol=1e-5)


def test_an_edge_that_nothing_clean_reaches_counts_under_an_ablation():
    """What a block makes of constants is not its own constant: by hooks, all else at its own."""
    model, pairs = random_model(), random_pairs(3, 6, ragged=True, seed=5)
    edges = dfa.EdgeSet.of_model(model)
    only = edges.where(writer="m0", reader="logits")
    values = torch.where(only.chosen, 1.0, 0.0).masked_fill(~edges.existing, torch.nan)
    curve = dfa.faithfulness_curve(
        model, pairs, dfa.EdgeScores(values, edges), protocol="mib", sizes=[0, 1, len(edges)], ablation="mean"
    )
    instead = by_hand(model, pairs, "mean")
    for row, out in ((0, {*NODES.names, "input"}), (1, {*NODES.names, "input"} - {"m0"})):
        np.testing.assert_allclose(curve.per_example[row], hand_metric(model, pairs, instead, out), atol=1e-5)
    assert np.abs(curve.per_example[1] - curve.per_example[0]).min() > 1e-4


class Slope(Learned):
    """One gate for all examples, each a number's own."""

    name = "slope"

    def start(self, n):
        return torch.linspace(0.2, 0.8, n)

    def gates(self, numbers, examples, generator):
        return numbers.expand(examples, -1)


@pytest.mark.parametrize("objective", ["metric", "closeness"])
def test_the_first_step_is_down_the_slope_of_finite_differences(objective):
    model = random_model().to(torch.float64)
    pairs = random_pairs(3, 6, seed=6)
    edges = dfa.EdgeSet.of_model(model).sample(12, seed=1)
    learned = LearnedEdges(Slope(iterations=1, lr=1e-3, objective=objective))
    start = learned.learned.start(len(edges)).double()
    scores = dfa.attribute_edges(model, pairs, method=learned, edges=edges)
    runner = Runner(model)

    def loss(numbers):
        with runner.session(), torch.no_grad():
            run = PairedRun(runner, pairs, edges.nodes)
            clean, (corrupt, _) = run.record("clean", nodes=False)[1], run.record("corrupt")
            gates = edges.existing.double()
            gates[tuple(edges.positions.T)] = numbers
            logits = run_gated(Stream(runner, edges), run, gates, corrupt)
        rows = torch.arange(len(pairs))
        found, whole = (each[rows, pairs.answer] - each[rows, pairs.wrong] for each in (logits, clean))
        return float((-found if objective == "metric" else (found - whole).abs()).mean())

    moves = 1e-4 * torch.eye(len(edges), dtype=torch.float64)
    slope = torch.tensor([loss(start + move) - loss(start - move) for move in moves], dtype=torch.float64)
    assert (slope.abs() > 1e-9).all()
    moved = scores.flat.double() - start
    torch.testing.assert_close(moved, -1e-3 * slope.sign(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [Matryoshka, UniformGradientSampling])
def test_masks_of_edges_are_learned(kind):
    """What is maximised is larger than with edges in a random order."""
    model, pairs = random_model(), random_pairs(6, 5, seed=7)
    edges, method = dfa.EdgeSet.of_model(model), LearnedEdges(kind(iterations=20, lr=0.2))
    scores = dfa.attribute_edges(model, pairs, method=method, seed=1, batch_size=4)
    assert scores.meta["options"]["iterations"] == 20
    assert scores.meta["seed"] == 1

    def reached(ranked):
        curve = dfa.faithfulness_curve(model, pairs, ranked, sizes=[0, 60, 120])
        found = curve.per_example[1:]
        return found.mean() if kind is Matryoshka else -np.abs(found - curve.clean_values).mean()

    drawn = [torch.rand(edges.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert reached(scores) > max(reached(dfa.EdgeScores(each, edges)) for each in drawn)
    with pytest.raises(DfaError, match="at least two"):
        dfa.attribute_edges(model, pairs, method=method, edges=edges.sample(1))


def test_what_can_not_be(model, pairs):
    with pytest.raises(DfaError, match="goes with ablation='corrupt'"):
        dfa.attribute_edges(model, pairs, method="eap", direction="denoising", ablation="mean")
    for options in ({"direction": "both"}, {"ablation": "nothing"}):
        with pytest.raises(DfaError, match="Unknown"):
            dfa.attribute_edges(model, pairs, method="eap", **options)
