"""Shorter passes against whole ones: the same numbers, with hooks, gradients and gates, on every backend."""

from functools import partial

import pytest
import torch
from helpers import BACKENDS, plain_passes, random_model, random_pairs

import dfa_lens as dfa
from dfa_lens.attribution.attribute import METHODS
from dfa_lens.errors import DfaError, HookError
from dfa_lens.models import hooks, memory
from dfa_lens.models.passes import Start, attention_mask, stream_hooks
from dfa_lens.models.runner import Runner, ShortCutWarning
from dfa_lens.transfer import grouping, store

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def alike(n=6, width=12, shared=7, *, ragged=False):
    """Pairs whose prompts have their first ``shared`` tokens in common."""
    pairs = random_pairs(n, width, seed=3)
    corrupt = pairs.corrupt.clone()
    corrupt[:, :shared] = pairs.clean[:, :shared]
    corrupt[:, shared] = pairs.clean[:, shared] % 100 + 1
    lengths = torch.arange(n) % 3 + width - 2 if ragged else pairs.lengths
    return dfa.PromptPairs(pairs.clean, corrupt, pairs.answer, pairs.wrong, lengths)


@pytest.fixture(scope="module", params=[(b, f) for b in BACKENDS for f in ("llama", "qwen")], ids="-".join)
def each(request):
    return random_model(request.param[0], family=request.param[1])


def test_these_models_take_every_short_cut(each, unchanged):
    with unchanged(each):
        assert Runner(each).allows("prefix", 12)
        assert Runner(each).allows("start", 12)


def test_shared_tokens():
    tokens = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [1, 2, 3, 0]])
    corrupt = torch.tensor([[1, 2, 3, 9], [1, 2, 3, 4], [1, 2, 3, 0]])
    corrupt[2, 1] = 8
    pairs = dfa.PromptPairs(tokens, corrupt, torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2]), torch.tensor([4, 4, 3]))
    assert pairs.shared.tolist() == [3, 1, 1]
    # where only the lengths differ, the last token of the shorter one is still run
    pairs = dfa.PromptPairs(
        tokens[:1],
        tokens[:1],
        torch.tensor([1]),
        torch.tensor([2]),
        torch.tensor([4]),
        corrupt_lengths=torch.tensor([3]),
    )
    assert pairs.shared.tolist() == [2]


@pytest.mark.parametrize("ragged", [False, True])
def test_a_prefix_changes_nothing(each, ragged, unchanged):
    """Logits, activations and gradients after the common beginning are those of the whole prompt."""
    pairs = alike(ragged=ragged)
    nodes = dfa.NodeSet.heads_and_mlps(each)
    with unchanged(each), Runner(each).session(passes=9):
        prefix = Runner(each).prefix_of(pairs.clean[:, :7])
        corrupt, short_corrupt = {}, {}
        with torch.no_grad():
            for into, given in ((corrupt, None), (short_corrupt, prefix)):
                Runner(each).run(pairs.corrupt, pairs.lengths, hooks.record_hooks(nodes, into), prefix=given)
        for point in corrupt:
            torch.testing.assert_close(short_corrupt[point], corrupt[point][:, 7:], **TOLERANCE)
        found = []
        for other, given in ((corrupt, None), (short_corrupt, prefix)):
            mask = torch.linspace(0, 1, len(nodes)).requires_grad_(True)
            gates = hooks.gate_hooks(nodes, mask, corrupt=other)
            logits = Runner(each).run(pairs.clean, pairs.lengths, gates, prefix=given)
            found.append((logits.detach(), *torch.autograd.grad(logits[:, 5].sum(), [mask])))
        torch.testing.assert_close(found[1], found[0], **TOLERANCE)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_starting_at_a_block(each, layer, unchanged):
    pairs = alike()
    gated = dfa.NodeSet.heads_and_mlps(each).where(lambda node: node.layer >= layer)
    zero = torch.zeros(len(gated))
    with unchanged(each), torch.no_grad(), Runner(each).session():
        streams, corrupt = {}, {}
        Runner(each).run(pairs.clean, pairs.lengths, stream_hooks(streams, [layer]))
        Runner(each).run(pairs.corrupt, pairs.lengths, hooks.record_hooks(gated, corrupt))
        gates = hooks.gate_hooks(gated, zero, corrupt=corrupt)
        whole = Runner(each).run(pairs.clean, pairs.lengths, gates)
        short = Runner(each).run(pairs.clean, pairs.lengths, gates, start=Start(layer, streams[layer]))
        torch.testing.assert_close(short, whole, **TOLERANCE)
        tap = [("blocks.0.hook_mlp_out", lambda now: None)]
        with pytest.raises(HookError, match="did not fire"):
            Runner(each).run(pairs.clean, pairs.lengths, tap, start=Start(2, streams[layer]))


def test_columns(each):
    pairs = alike(ragged=True)
    columns = torch.stack([pairs.answer, pairs.wrong], 1)
    with torch.no_grad():
        whole = Runner(each).run(pairs.clean, pairs.lengths)
        plain = each(pairs.clean, attention_mask=attention_mask(pairs.lengths, 12))
        torch.testing.assert_close(whole, plain[torch.arange(6), pairs.lengths - 1], **TOLERANCE)
        two = Runner(each).run(pairs.clean, pairs.lengths, columns=columns)
        torch.testing.assert_close(two, whole.gather(1, columns), **TOLERANCE)
        seen = []
        each.hook_dict["unembed.hook_in"].add_hook(lambda x, hook: seen.append(x.shape))  # somebody looks: still run
        try:
            two = Runner(each).run(pairs.clean, pairs.lengths, columns=columns)
        finally:
            each.reset_hooks()
        assert len(seen) == 1
        torch.testing.assert_close(two, whole.gather(1, columns), **TOLERANCE)


def test_results_do_not_depend_on_the_short_cuts(each, unchanged, monkeypatch):
    pairs = alike(ragged=True)
    nodes = dfa.NodeSet.heads_and_mlps(each)
    source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2), seed=1)
    ranking = dfa.NodeSet.heads_and_mlps(each)
    ranking = dfa.NodeScores(torch.randn(len(nodes), generator=torch.Generator().manual_seed(0)), nodes)

    def results(share):
        values = [
            dfa.attribute(each, pairs, method=method, steps=2, batch_size=size, share_prefix=share).values
            for method, size in (
                ("nap", 6),
                ("nap-ig-inputs", 2),
                ("nap-ig-activations", 6),
                ("nap-ig-activations", 2),
                ("exact", 4),
            )
        ]
        for intervention in ("circuit", "restore", "interpolate"):
            options = {"steps": 3, "batch_size": 4, "intervention": intervention, "share_prefix": share}
            values.append(dfa.fit(each, {"a": source}, {"a": pairs}, **options).W)
        curve = dfa.faithfulness_curve(each, pairs, ranking, batch_size=4, share_prefix=share)
        return [*values, torch.tensor(curve.per_example), torch.tensor(curve.kl)]

    with unchanged(each):
        short = results(True)
    plain_passes(monkeypatch)
    for a, b in zip(short, results(False), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("points", [{"blocks.{layer}.hook_resid_pre": None}, {"blocks.{layer}.attn.hook_v": 2}])
def test_curves_of_other_nodes(each, points, monkeypatch):
    """Nodes at the very hook point that a pass begins at are gated once."""
    pairs = alike()
    nodes = dfa.NodeSet.from_points(each, points)
    ranking = dfa.NodeScores(torch.randn(len(nodes), generator=torch.Generator().manual_seed(3)), nodes)
    short = dfa.faithfulness_curve(each, pairs, ranking, sizes=range(len(nodes) + 1))
    plain_passes(monkeypatch)
    whole = dfa.faithfulness_curve(each, pairs, ranking, sizes=range(len(nodes) + 1), share_prefix=False)
    torch.testing.assert_close(torch.tensor(short.per_example), torch.tensor(whole.per_example), rtol=1e-3, atol=1e-4)


def test_groups_of_a_training_batch(any_model, monkeypatch):
    """Examples of different lengths and beginnings are run in groups; the training is the same."""
    tasks = {"short": alike(8, 8, 5), "long": alike(8, 20, 14), "other": alike(8, 20, 0)}
    source = dfa.NodeSet.for_sizes(2, 2)
    scores = {task: dfa.controls.random_scores(source, seed=i) for i, task in enumerate(tasks)}
    sizes = []
    masked, cheapest = store.ExampleStore.masked, grouping.cheapest

    def look(self, batch, gates):
        sizes.append(len(batch.pairs))
        return masked(self, batch, gates)

    monkeypatch.setattr(store.ExampleStore, "masked", look)
    found = {}
    for cost, loss in ((0, "kl"), (10**6, "kl"), (0, "logit-difference"), (10**6, "logit-difference")):
        monkeypatch.setattr(grouping, "cheapest", partial(cheapest, pass_in_tokens=cost))
        sizes.clear()
        found[cost, loss] = dfa.fit(any_model, scores, tasks, steps=4, batch_size=12, loss=loss)
        assert sum(sizes) == 48
        assert (len(sizes) == 4) == (cost > 0)
    for loss in ("kl", "logit-difference"):
        torch.testing.assert_close(found[0, loss].W, found[10**6, loss].W, rtol=2e-3, atol=2e-4)
        a, b = ([step["loss"] for step in found[cost, loss].history] for cost in (0, 10**6))
        assert a == pytest.approx(b, rel=1e-4)


def test_nodes_that_are_not_indexed_by_token_run_whole_prompts(any_model):
    pairs = alike()
    heads = dfa.NodeSet.heads_and_mlps(any_model)
    patterns = dfa.NodeSet.from_points(any_model, {"blocks.{layer}.attn.hook_pattern": 1})
    positions = dfa.NodeSet.from_points(any_model, {"blocks.{layer}.hook_resid_pre": 1}, n_positions=12)
    assert Runner(any_model).shared_length(pairs, heads) == 7
    assert Runner(any_model).shared_length(pairs, patterns) == Runner(any_model).shared_length(pairs, positions) == 0
    assert Runner(any_model).shared_length(alike(shared=3), heads) == 0  # does not pay


def test_hooks_of_somebody_else_see_whole_prompts_and_all_blocks(each):
    """A hook of the user's that edits one position means the same as before."""
    pairs = alike()
    nodes = dfa.NodeSet.heads_and_mlps(each)

    def third(now, hook):
        return torch.cat([now[:, :2], 0 * now[:, 2:3], now[:, 3:]], 1)

    each.hook_dict["blocks.0.hook_mlp_out"].add_hook(third)
    try:
        assert not Runner(each).allows("start", 12)
        assert Runner(each).shared_length(pairs, nodes) == 0
        scores = dfa.attribute(each, pairs, nodes=nodes.where(layer=2), method="exact")
        with torch.no_grad():
            clean = Runner(each).run(pairs.clean, pairs.lengths)
        values = clean.gather(1, pairs.answer[:, None]) - clean.gather(1, pairs.wrong[:, None])
    finally:
        each.reset_hooks()
    assert scores.meta["metric_clean"] == pytest.approx(float(values.mean()), abs=1e-4)
    assert Runner(each).allows("start", 12)


def test_a_model_that_fails_the_trial_runs_whole_prompts(monkeypatch):
    model = random_model()
    monkeypatch.setattr(Runner, "prefix_of", lambda *args: (_ for _ in ()).throw(NotImplementedError("no cache")))
    with pytest.warns(ShortCutWarning, match=r"'prefix' is not taken on this model \(no cache\)"):
        assert Runner(model).shared_length(alike()) == 0
    assert Runner(model).shared_length(alike()) == 0  # told once


def test_an_interrupt_inside_leaves_the_model_as_it_was(each, unchanged):
    pairs = alike()
    streams = {1: torch.zeros(6, 12, 32)}

    def stop(now):
        raise KeyboardInterrupt

    with unchanged(each), pytest.raises(KeyboardInterrupt), Runner(each).session(passes=9):
        Runner(each).run(pairs.clean, pairs.lengths, [("blocks.2.hook_mlp_out", stop)], start=Start(1, streams[1]))


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer only")
def test_weights_are_turned_round_only_where_nobody_holds_a_view():
    model = random_model("hooked")
    for parameter in model.parameters():  # as other loaders leave them; load_model turns them round from the start
        parameter.data = parameter.data.contiguous()
    view = model.blocks[1].mlp.W_in.data
    with Runner(model).session(passes=9):
        assert not model.blocks[0].mlp.W_in.is_contiguous()
        assert model.blocks[0].mlp.W_in.T.is_contiguous()
        assert model.blocks[1].mlp.W_in.data_ptr() == view.data_ptr()
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_auto_batch_size(any_model, monkeypatch, caplog):
    pairs = alike(n=12)
    expected = dfa.attribute(any_model, pairs, method="nap")
    sizes = []
    whole = Runner.run

    def small_memory(self, tokens, *args, **options):
        sizes.append(len(tokens))
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("no")
        return whole(self, tokens, *args, **options)

    monkeypatch.setattr(memory, "fitting", lambda *args, **options: 8)
    monkeypatch.setattr(Runner, "run", small_memory)
    found = dfa.attribute(any_model, pairs, method="nap", batch_size="auto")
    torch.testing.assert_close(found.values, expected.values, **TOLERANCE)
    assert sizes[:2] == [8, 4]
    assert max(sizes[2:]) == 2
    assert "8 examples a pass do not fit into memory: 4 now" in caplog.text
    monkeypatch.setattr(Runner, "run", lambda *args, **options: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        dfa.attribute(any_model, pairs, method="nap", batch_size="auto")
    with pytest.raises(DfaError, match="batch_size"):
        dfa.attribute(any_model, pairs, batch_size=0)


def test_the_batch_size_that_fits(any_model, monkeypatch):
    pairs, nodes = alike(n=40), dfa.NodeSet.heads_and_mlps(any_model)
    one, two = (dfa.estimate(any_model, pairs, batch_size=n)["attribute"].peak_bytes for n in (1, 2))

    def need(footprint, n):
        return METHODS["nap-ig-inputs"].need(footprint, nodes, steps=5, examples=len(pairs), batch=n)

    for room, expected in ((1, 1), (5, 4), (1000, 32)):
        free = (one + (room - 1) * (two - one)) / memory.USABLE + 1000
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: int(free))
        assert memory.fitting(Runner(any_model), pairs, nodes, need) == expected
    monkeypatch.undo()
    assert memory.free_bytes(torch.device("cpu")) > 0
    curve = dfa.faithfulness_curve(any_model, pairs, dfa.controls.uniform(nodes), sizes=[0, 5, 15], batch_size="auto")
    assert curve.per_example.shape == (3, 40)
