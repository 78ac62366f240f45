"""Edge attribution: against independent numbers, against node scores, and against edges set by hand."""

import json

import pytest
import torch
from families import family_model
from helpers import BACKENDS, plain_passes, random_model, random_pairs, unchecked
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_reference import FOLDER, KINDS, NAMES, setting
from test_reference import pytestmark as hooked_only

import dfa_lens as dfa
from dfa_lens.data.nodes import INPUT_POINT
from dfa_lens.errors import DfaError, EdgeError, ModelError
from dfa_lens.models import memory, stream

#: name of the reference scores → how attribute_edges gives them
SCORES = {
    "eap": {"method": "eap"},
    "eap_ig_inputs.k_1_to_S": {"method": "eap-ig-inputs"},
    "eap_ig_inputs.k_0_to_S-1": {"method": "eap-ig-inputs", "step_points": "from-corrupt"},
    "eap_ig_activations.own_path": {"method": "eap-ig-activations"},
    "exact": {"method": "exact"},
}
#: edge method → the node method of the same passes
NODE_METHODS = {"eap": "nap", "eap-ig-inputs": "nap-ig-inputs", "eap-ig-activations": "nap-ig-activations"}


def matrix(nested):
    return torch.tensor([[torch.nan if score is None else score for score in row] for row in nested])


def close(found, expected, off=1e-5):
    """Relative to the largest score; NaN at the same edges."""
    assert torch.equal(found.isnan(), expected.isnan())
    most = float(expected.nan_to_num().abs().max())
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num().to(found), atol=off * most, rtol=0)


@hooked_only
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readers", ["grouped", "per-head"])
@pytest.mark.parametrize(("key", "options"), SCORES.items())
def test_reference(name, kind, readers, key, options):
    reference = json.loads((FOLDER / f"edges_{name}.json").read_text())
    model, pairs, *_ = setting(name, kind)
    size = 64 if key == "exact" else 4  # many edges in one pass; or batches of several and of fewer examples
    scores = dfa.attribute_edges(model, pairs, readers=readers, steps=5, batch_size=size, **options)
    assert list(scores.writers) == reference["writers"]
    assert list(scores.readers) == reference["readers" if readers == "per-head" else "readers_grouped"]
    close(scores.values, matrix(reference[kind]["scores" if readers == "per-head" else "scores_grouped"][key]))


def well_conditioned(backend, family, **sizes):
    """A model in float64, of small weights; what a bridge runs has norms in float32 even so."""
    return random_model(backend, family=family, initializer_range=0.1, **sizes).to(torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("readers", ["grouped", "per-head"])
@pytest.mark.parametrize("method", NODE_METHODS)
def test_row_sums_are_node_scores(backend, readers, method):
    """Of the same method, on random models, batches and prompts."""
    models = {
        "llama": well_conditioned(backend, "llama", seed=1, num_hidden_layers=2),
        "qwen": well_conditioned(backend, "qwen", seed=2, num_key_value_heads=1, num_hidden_layers=2),
    }

    @settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(
        st.sampled_from(sorted(models)),
        st.integers(0, 99),
        st.booleans(),
        st.sampled_from([2, 16]),
        st.booleans(),
    )
    def check(family, seed, ragged, batch_size, share_prefix):
        model, pairs = models[family], random_pairs(n=3, width=9, seed=seed, ragged=ragged)
        options = {"steps": 2, "batch_size": batch_size, "share_prefix": share_prefix}
        nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
        expected = dfa.attribute(model, pairs, nodes=nodes, method=NODE_METHODS[method], **options)
        scores = dfa.attribute_edges(model, pairs, method=method, readers=readers, **options)
        assert scores.to_nodes().nodes == nodes
        close(scores.to_nodes().values, expected.values, off=1e-6)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_scores_are_the_sums_over_heads(backend):
    model, pairs = random_model(backend), random_pairs(ragged=True)
    for method in NODE_METHODS:
        per_head = dfa.attribute_edges(model, pairs, method=method, steps=2, readers="per-head")
        grouped = dfa.attribute_edges(model, pairs, method=method, steps=2)
        summed = per_head.to_grouped(2)
        assert summed.edges == grouped.edges
        close(summed.values, grouped.values, off=5e-6)


def shared_pairs():
    """Pairs whose prompts have most tokens in common at their beginning."""
    pairs = random_pairs(n=3, width=20, seed=5)
    pairs.corrupt[:, :14] = pairs.clean[:, :14]
    pairs.corrupt[:, 15] = pairs.clean[:, 15] % 99 + 1
    return pairs


@pytest.mark.parametrize("method", [*NODE_METHODS, "exact"])
@pytest.mark.parametrize(("backend", "readers"), [(BACKENDS[0], "grouped"), ("bridge", "per-head")])
def test_short_cuts_and_tiles_change_nothing(backend, method, readers, monkeypatch):
    model, pairs = random_model(backend), shared_pairs()
    edges = dfa.EdgeSet.of_model(model, readers=readers)
    edges = edges.sample(25) if method == "exact" else edges
    short = dfa.attribute_edges(model, pairs, method=method, edges=edges, steps=2)
    monkeypatch.setattr(stream, "TILE_BYTES", {"cpu": 10_000, "cuda": 10_000})  # a token or two at a time
    plain_passes(monkeypatch)
    plain = dfa.attribute_edges(model, pairs, method=method, edges=edges, steps=2, batch_size=1, share_prefix=False)
    close(short.values, plain.values)


def effect_by_hand(model, pairs, writer, reader, instead=None):
    """m(clean) - m(clean with one edge at its writer's corrupt activation), with hooks alone: no weight is read.

    ``instead``: hook point → what the writers are set to, where that is not what they do in the corrupt run.

    The reader's part is what it computes in a run in which all of the stream before it is changed, put into the clean run.
    """
    rows = torch.arange(len(pairs))

    def run(tokens, **edits):
        seen = {}

        def tap(name):
            def hook(now, hook):
                new = edits[name.replace(".", "_")](now) if name.replace(".", "_") in edits else now
                seen[name] = new.detach().clone()
                return new

            return name, hook

        names = [INPUT_POINT]
        for layer in range(3):
            own = ("hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "hook_attn_out")
            names += [f"blocks.{layer}.{name}" for name in (*own, "hook_mlp_out", "hook_resid_post")]
        mask = (torch.arange(tokens.shape[1]) < pairs.lengths[:, None]).long()
        with torch.no_grad(), model.hooks(fwd_hooks=[tap(name) for name in names]):
            logits = model(tokens, attention_mask=mask)[rows, pairs.lengths - 1]
        return seen, float((logits[rows, pairs.answer] - logits[rows, pairs.wrong]).mean())

    clean, metric = run(pairs.clean)
    corrupt = run(pairs.corrupt)[0] if instead is None else instead

    def writes():
        """Corrupt less clean, of what the writer adds to the stream."""
        if writer == "input":
            return corrupt[INPUT_POINT] - clean[INPUT_POINT]
        layer = writer[1]
        if writer[0] == "m":
            return corrupt[f"blocks.{layer}.hook_mlp_out"] - clean[f"blocks.{layer}.hook_mlp_out"]
        head = int(writer.split(".h")[1])

        def swap(now):
            now = now.clone()
            now[:, :, head] = corrupt[f"blocks.{layer}.attn.hook_z"][:, :, head]
            return now

        swapped, _ = run(pairs.clean, **{f"blocks_{layer}_attn_hook_z": swap})
        return swapped[f"blocks.{layer}.hook_attn_out"] - clean[f"blocks.{layer}.hook_attn_out"]

    change = writes()
    if reader == "logits":
        return metric - run(pairs.clean, blocks_2_hook_resid_post=lambda now: now + change)[1]
    layer = reader[1]
    if reader[0] == "m":
        moved, _ = run(pairs.clean, **{f"blocks_{layer}_hook_attn_out": lambda now: now + change})
        own = moved[f"blocks.{layer}.hook_mlp_out"]
        return metric - run(pairs.clean, **{f"blocks_{layer}_hook_mlp_out": lambda now: own})[1]
    letter, index = reader[-2], int(reader.split("<")[0].removeprefix(f"a{layer}.").lstrip("khv"))
    moved, _ = run(pairs.clean, **{f"blocks_{layer}_hook_resid_pre": lambda now: now + change})

    def one(now, name):
        now = now.clone()
        now[:, :, index if letter == "q" or ".kv" in reader else index // 2] = moved[name][
            :, :, index if letter == "q" or ".kv" in reader else index // 2
        ]
        return now

    name = f"blocks.{layer}.attn.hook_{letter}"
    changed = {name.replace(".", "_"): lambda now: one(now, name)}
    if letter == "q" or ".kv" in reader:
        return metric - run(pairs.clean, **changed)[1]
    alone, _ = run(pairs.clean, **changed)  # both heads of the group see it: only this one's z is wanted
    z = f"blocks.{layer}.attn.hook_z"

    def own_head(now):
        now = now.clone()
        now[:, :, index] = alone[z][:, :, index]
        return now

    return metric - run(pairs.clean, **{z.replace(".", "_"): own_head})[1]


@pytest.mark.parametrize(("backend", "family"), [(BACKENDS[0], "llama"), ("bridge", "qwen")])
@pytest.mark.parametrize("readers", ["grouped", "per-head"])
def test_exact_is_what_edges_set_by_hand_give(backend, readers, family):
    model, pairs = random_model(backend, family=family), random_pairs(n=3, width=7, ragged=True)
    whole = dfa.EdgeSet.of_model(model, readers=readers)
    # some of each kind of reader
    patterns = ["*<q>", "*<k>", "*<v>", "m*", "logits"]
    chosen = torch.stack([whole.where(reader=p).sample(4, seed=i).chosen for i, p in enumerate(patterns)]).any(0)
    edges = whole.choose(chosen)
    scores = dfa.attribute_edges(model, pairs, method="exact", edges=edges, batch_size=8)
    assert len(scores) == 20
    expected = torch.tensor([effect_by_hand(model, pairs, *edge) for edge in edges])
    torch.testing.assert_close(scores.flat, expected, atol=2e-5, rtol=1e-4)
    assert expected.abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", ["mistral", "gemma"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_families(family, backend):
    """Sliding windows, gated GELUs, scaled norms."""
    model, pairs = family_model(family, backend), random_pairs(n=3, width=9, ragged=True)
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    scores = dfa.attribute_edges(model, pairs, method="eap", readers="per-head")
    close(scores.to_nodes().values, dfa.attribute(model, pairs, method="nap", nodes=nodes).values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend):
    """Sums are in float32: bfloat16 costs the model's own rounding, no more, and the batches do not matter."""
    pairs = random_pairs(n=6)
    whole = dfa.attribute_edges(random_model(backend), pairs, method="eap-ig-inputs", steps=2)
    model = random_model(backend).to(torch.bfloat16)
    if backend == "hooked":
        model.cfg.dtype = torch.bfloat16
    half = [dfa.attribute_edges(model, pairs, steps=2, batch_size=size).flat for size in (1, 6)]
    for found in half:
        assert torch.corrcoef(torch.stack([found, whole.flat]))[0, 1] > 0.98
    assert (half[0] - half[1]).abs().max() < 0.05 * whole.flat.abs().max()


def test_the_model_is_left_as_it_was(model, pairs, unchanged):
    dfa.attribute_edges(model, pairs, method="eap")  # a bridge puts hooks of its own on itself when it first runs
    with unchanged(model):
        for method in SCORES.values():
            edges = dfa.EdgeSet.of_model(model, readers="per-head").sample(20)
            dfa.attribute_edges(model, pairs, edges=edges, **method)


def test_hooks_of_somebody_else_count(model, pairs):
    """A head that is switched off writes nothing, so its edges carry nothing."""

    def off(now, hook):
        now = now.clone()
        now[:, :, 1] = 0
        return now

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", off)]):
        scores = dfa.attribute_edges(model, pairs, method="eap")
    assert scores.where(writer="a1.h1").flat.abs().max() == 0
    assert scores.where(writer="a1.h0").flat.abs().max() > 0


def test_completeness_and_provenance(any_model, pairs):
    nodes = dfa.attribute(any_model, pairs, steps=4)
    scores = dfa.attribute_edges(any_model, pairs, steps=4, metric="logit-difference")
    assert scores.meta["completeness"] == pytest.approx(nodes.meta["completeness"], rel=1e-3)
    expected = {"method": "eap-ig-inputs", "steps": 4, "step_points": "to-clean", "examples": 6, "d_model": 32}
    assert scores.meta.items() >= expected.items()
    for key in ("metric_clean", "metric_corrupt"):
        assert scores.meta[key] == pytest.approx(nodes.meta[key], rel=1e-5)


def test_batch_size_auto(any_model, pairs):
    auto = dfa.attribute_edges(any_model, pairs, method="eap", batch_size="auto")
    close(auto.values, dfa.attribute_edges(any_model, pairs, method="eap").values)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "eapp"}, DfaError, "Unknown edge method 'eapp'.*Did you mean 'eap'"),
        ({"steps": 0}, DfaError, "steps must be a whole number of at least 1, not 0"),
        ({"steps": "auto"}, DfaError, "steps must be a whole number of at least 1, not 'auto'"),
        ({"readers": "heads"}, EdgeError, "Unknown readers 'heads': expected one of 'grouped', 'per-head'"),
        ({"step_points": "k"}, DfaError, "Unknown step_points 'k'"),
        ({"edges": dfa.EdgeSet(5, 4)}, EdgeError, r"of another model; this one has the EdgeSet\(190 edges of 3 layers"),
        ({"batch_size": 0}, DfaError, "batch_size must be a number of at least 1"),
        ({"metric": "loss"}, DfaError, "Unknown metric 'loss'"),
    ],
)
def test_bad_input(any_model, pairs, options, error, message):
    with pytest.raises(error, match=message):
        unchecked(dfa.attribute_edges)(any_model, pairs, **options)


def test_more_memory_than_there_is(any_model, pairs, monkeypatch):
    """Said before the work, with the amount: what the writers do, one float32 number after the other."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    least = 4 * int(pairs.longest.max()) * len(pairs) * any_model.cfg.d_model * (1 + 2 * any_model.cfg.n_layers)
    amount = f"at least {least / 2**20:.2f} MiB, and 0.00 MiB are free on cpu: take a smaller one"
    monkeypatch.setattr(type(any_model), "forward", None)
    with pytest.raises(ModelError, match=f"attribute_edges with batch_size=16 would take {amount}"):
        dfa.attribute_edges(any_model, pairs)
    edges = dfa.EdgeSet.of_model(any_model)
    scores = dfa.EdgeScores(torch.ones(edges.shape), edges)
    with pytest.raises(ModelError, match=f"faithfulness_curve of edges with batch_size=16 would take {amount}"):
        dfa.faithfulness_curve(any_model, pairs, scores)
