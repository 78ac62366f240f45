"""Whatever the caller has around a call, or hands in as a model: the right numbers, or one error before any work."""

from __future__ import annotations

import contextlib
import threading
import warnings
from typing import Any

import pytest
import torch
from helpers import BACKENDS, random_model, random_pairs, state_of, unchecked
from test_short_cuts import operations, prompts

import dfa_lens as dfa
from dfa_lens.errors import DfaError, ModelError
from dfa_lens.models.runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore:.*of the metric's change unexplained")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.fixture(scope="module", params=BACKENDS)
def model(request):
    return random_model(request.param)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_torch_s_modes_change_nothing(model, name, unchanged):
    pairs = prompts(7)
    expected = {key: work() for key, work in operations(model, pairs).items()}
    with unchanged(model), SURROUNDINGS[name]():
        inside = prompts(7)  # made in there, too
        found = {key: work() for key, work in operations(model, inside).items()}
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("form", ["full", "kernel", "full+bias", "block", "depth-band"])
def test_every_form_of_w_is_float32_there(model, name, form):
    pairs = {task: random_pairs(4, 8, seed=seed) for seed, task in enumerate("ab")}

    def train() -> Any:
        source = dfa.NodeSet.for_sizes(3, 2)
        scores = {task: dfa.controls.random_scores(source, seed=seed) for seed, task in enumerate(pairs)}
        return dfa.fit(model, scores, pairs, steps=2, batch_size=4, form=form)

    expected = train()
    with SURROUNDINGS[name]():
        found = train()
        fixed = dfa.controls.depth_mean(found.source, found.target)
    assert found.W.dtype == torch.float32
    torch.testing.assert_close(found.W, expected.W, rtol=1e-6, atol=1e-7)
    assert torch.equal(fixed.W, dfa.controls.depth_mean(found.source, found.target).W)


def test_compiled_models(model):
    """One from torch.compile is run as it was before; one compiled in place has no such way back."""
    pairs = prompts(7)
    expected = {name: work() for name, work in operations(model, pairs).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 deprecates what it imports itself
        compiled = torch.compile(model)
    for name, work in operations(compiled, pairs).items():
        torch.testing.assert_close(work(), expected[name])
    other = random_model(BACKENDS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        other.blocks[1].compile()
    with pytest.raises(ModelError, match="was compiled in place"):
        dfa.attribute(other, pairs)


class NoModel(torch.nn.Module):
    cfg = None
    hook_dict = None


def inference_weights() -> Any:
    model = random_model(BACKENDS[0])
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
    return model


UNUSABLE = {
    "None": (lambda: None, "A model is needed, not None"),
    "a name": (lambda: "gpt2", "A model is needed, not 'gpt2'"),
    "data parallel": (lambda: torch.nn.DataParallel(random_model()), "pass the model inside it, model.module"),
    "an encoder": (NoModel, "is no decoder-only language model"),
    "on meta": (lambda: random_model().to("meta"), "are on the meta device"),
    "weights of inference mode": (inference_weights, "made inside torch.inference_mode"),
    "a number": (lambda: 3, "A int can't be hooked"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_model_is_one_error_everywhere(kind, capsys):
    make, message = UNUSABLE[kind]
    model = make()
    pairs, nodes = prompts(7), dfa.NodeSet.for_sizes(1, 1)
    scores = dfa.controls.uniform(nodes)
    entries = (
        lambda: dfa.attribute(model, pairs),
        lambda: dfa.fit(model, {"a": scores}, {"a": pairs}),
        lambda: dfa.faithfulness_curve(model, pairs, scores),
        lambda: dfa.check(model, pairs),
        lambda: dfa.estimate(model, pairs),
        lambda: dfa.similarity.attention_features(model),
        lambda: dfa.NodeSet.from_points(model, {"hook_embed": None}),
        lambda: next(unchecked(dfa.hooks.record)(model, nodes)),
        lambda: unchecked(dfa.hooks.add_hook_point)(model, "blocks.0"),
    )
    for entry in entries:
        with pytest.raises(ModelError, match=message):
            entry()


# --- short cuts ----------------------------------------------------------------------------------------------------


def test_two_threads_take_turns(model, unchanged):
    """Each gets its own numbers, and the model is left as it was."""
    pairs = [random_pairs(4, 10, seed=seed) for seed in range(4)]
    expected = [dfa.attribute(model, each, steps=2).values for each in pairs]
    found: list[Any] = [None] * 4
    with unchanged(model):

        def work(i: int) -> None:
            found[i] = dfa.attribute(model, pairs[i], steps=2).values

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_trial_is_forgotten_when_memory_was_short(monkeypatch):
    from dfa_lens.models import trials

    model = random_model(BACKENDS[0])
    real = trials._TRIALS["prefix"]

    def no_room(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setitem(trials._TRIALS, "prefix", no_room)
    assert not Runner(model).allows("prefix", 12)
    monkeypatch.setitem(trials._TRIALS, "prefix", real)
    assert Runner(model).allows("prefix", 12)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer only")
def test_a_flag_changed_later_is_seen():
    """Keys and values have another shape then: what was tried before is stale."""
    model, pairs = random_model("hooked"), prompts(7)
    expected = dfa.attribute(model, pairs, method="exact").values
    model.set_ungroup_grouped_query_attention(True)
    try:
        with pytest.warns(dfa.ShortCutWarning, match="'prefix' is not taken on this model"):
            assert not Runner(model).allows("prefix", 12)
        torch.testing.assert_close(dfa.attribute(model, pairs, method="exact").values, expected, rtol=1e-4, atol=1e-4)
    finally:
        model.set_ungroup_grouped_query_attention(False)
    torch.testing.assert_close(dfa.attribute(model, pairs, method="exact").values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer only")
@pytest.mark.parametrize("how", ["forward", "class"])
def test_a_patched_unembedding_is_used(how):
    """Divided by 4, logits and scores are a quarter."""
    pairs = prompts(7)
    plain = dfa.attribute(random_model("hooked"), pairs, method="nap").values
    model = random_model("hooked")
    original = type(model.unembed).forward
    if how == "forward":
        model.unembed.forward = lambda residual: original(model.unembed, residual) / 4
        found = dfa.attribute(model, pairs, method="nap").values
    else:
        model.unembed.__class__ = type(
            "Quarter", (type(model.unembed),), {"forward": lambda self, residual: original(self, residual) / 4}
        )
        with pytest.warns(dfa.ShortCutWarning, match="'unembedding' is not taken on this model"):
            found = dfa.attribute(model, pairs, method="nap").values
    torch.testing.assert_close(found, plain / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="HookedTransformer only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bidirectional_attention(dtype):
    """Nothing is shared, and padding is never attended to: the scores are those of each pair by itself."""
    model = random_model("hooked").to(dtype)
    for block in model.blocks:
        block.attn.cfg.attention_dir = "bidirectional"
    pairs = prompts(7)
    assert not Runner(model).allows("prefix", 12)
    assert not Runner(model).allows_padding(12)
    for method in ("nap", "exact"):
        together = dfa.attribute(model, pairs, method=method).values
        alone = torch.stack([dfa.attribute(model, pairs[[i]], method=method).values for i in range(len(pairs))])
        scale = float(alone.abs().max())
        torch.testing.assert_close(
            together, alone.mean(0), rtol=0, atol=scale * (1e-4 if dtype == torch.float32 else 0.05)
        )
    source = {"a": dfa.controls.random_scores(dfa.NodeSet.for_sizes(1, 2))}
    alignment = dfa.fit(model, source, {"a": pairs}, steps=2, batch_size=4)
    assert alignment.W.isfinite().all()
    different = dfa.PromptPairs(
        pairs.clean, pairs.corrupt, pairs.answer, pairs.wrong, pairs.lengths, corrupt_lengths=pairs.lengths - 1
    )
    with pytest.raises(DfaError, match="every token attends to later ones"):
        dfa.attribute(model, different)


# a bridge says that its norm was edited and how it deals with that
@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
def test_nodes_behind_the_last_block(model):
    """They come last, in the order in which their points fire, and are gated on every pass."""
    pairs = prompts(7)
    points = {"ln_final.hook_normalized": None, "blocks.{layer}.hook_mlp_out": None, "hook_embed": None}
    nodes = dfa.NodeSet.from_points(model, points)
    assert [node.layer for node in nodes] == [-1, 0, 1, 2, 3]
    assert nodes.names[-1] == "ln_final.hook_normalized"
    ranking = dfa.NodeScores(torch.tensor([1.0, 5.0, 4.0, 3.0, 2.0]), nodes)
    curve = dfa.faithfulness_curve(model, pairs, ranking, sizes=[0, 1, 2, 3, 4, 5])
    # by hand, on whole prompts: keep the first k of the ranking
    order = [1, 2, 3, 4, 0]
    mask = attention = (torch.arange(12) < pairs.lengths[:, None]).long()
    last = pairs.lengths - 1
    rows = torch.arange(len(pairs))
    for k in range(1, 6):
        corrupt: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            with dfa.hooks.record(model, nodes) as corrupt:
                model(pairs.corrupt, attention_mask=mask)
            keep = [nodes.names[i] for i in order[:k]]
            with dfa.hooks.ablate(model, nodes, keep=keep, corrupt=corrupt):
                logits = model(pairs.clean, attention_mask=attention)[rows, last]
        values = logits[rows, pairs.answer] - logits[rows, pairs.wrong]
        torch.testing.assert_close(torch.tensor(curve.per_example[k]).float(), values, rtol=1e-3, atol=1e-3)


def test_the_state_of_a_model_is_compared_in_full(model):
    """The fixture that the tests above lean on sees a hook on a module, and a changed flag."""
    before = state_of(model)
    handle = model.blocks[0].register_forward_pre_hook(lambda *args: None)
    assert state_of(model) != before
    handle.remove()
    assert state_of(model) == before


@pytest.mark.parametrize("model", [None, "gpt2", 3])
def test_what_is_no_model_has_no_nodes(model):
    with pytest.raises(ModelError, match="does not say how many layers and heads it has"):
        dfa.NodeSet.heads_and_mlps(model)
