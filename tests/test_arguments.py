"""Arguments in the wrong order, and those that may be left out."""

import pandas as pd
import pytest
import torch
from helpers import BACKENDS, random_pairs, unchecked

import dfa_lens as dfa
from dfa_lens.errors import ArgumentError


def test_arguments_in_the_wrong_order_are_named(any_model, pairs):
    scores = dfa.attribute(any_model, pairs, method="nap")
    for call, place in (
        (lambda: dfa.attribute(any_model, scores), r"second argument \(pairs\) must be PromptPairs, got NodeScores"),
        (lambda: dfa.attribute_edges(any_model, scores), r"second argument \(pairs\) must be PromptPairs"),
        (lambda: dfa.check(any_model, scores), r"second argument \(pairs\) must be PromptPairs"),
        (lambda: dfa.faithfulness_curve(any_model, scores, pairs), r"second argument \(pairs\) must be PromptPairs"),
        (
            lambda: dfa.faithfulness_curve(any_model, pairs, pairs),
            r"third argument \(scores\) must be NodeScores or EdgeScores, got PromptPairs",
        ),
        (lambda: dfa.circuits.run(any_model, scores.circuit(2), pairs), r"second argument \(pairs\)"),
        (lambda: dfa.fit(any_model, pairs, scores), r"second argument \(scores\) must be Mapping, got PromptPairs"),
        (lambda: dfa.fit(any_model, {"a": scores}, pairs), r"third argument \(pairs\) must be Mapping"),
    ):
        with pytest.raises(ArgumentError, match=place):
            call()
    assert issubclass(ArgumentError, TypeError)


@pytest.fixture(autouse=True)
def no_run_time_checks(monkeypatch):
    """What a user gets: the tests' own checks of types would be first."""
    for name in ("attribute", "attribute_edges", "check", "faithfulness_curve", "fit"):
        monkeypatch.setattr(dfa, name, unchecked(getattr(dfa, name)), raising=False)
    monkeypatch.setattr(dfa.circuits, "run", unchecked(dfa.circuits.run))


def test_a_single_task_needs_no_mapping(any_model, pairs):
    scores = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
    one = dfa.fit(any_model, scores, pairs, steps=2, seed=3)
    assert one == dfa.fit(any_model, {"task": scores}, {"task": pairs}, steps=2, seed=3)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="made as a HookedTransformer")
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_models_of_attention_alone_have_nodes_that_exist():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 16, "d_head": 4, "n_heads": 4, "d_vocab": 101}
    more = {"positional_embedding_type": "rotary", "normalization_type": "RMS", "device": "cpu", "seed": 0}
    model = HookedTransformer(HookedTransformerConfig(**sizes, **more, attn_only=True)).eval()
    nodes = dfa.NodeSet.heads_and_mlps(model, with_input=True)
    assert nodes.names == ("input", *(f"a{layer}.h{head}" for layer in range(2) for head in range(4)))
    pairs = random_pairs(n=2, width=6)
    scores = dfa.attribute(model, pairs, method="exact")
    with torch.no_grad():
        _, corrupt = model.run_with_cache(pairs.corrupt)
        point = "blocks.1.attn.hook_z"

        def patch(z, hook):
            mixed = z.clone()
            mixed[:, :, 2] = corrupt[point][:, :, 2]
            return mixed

        metric = [
            (logits[:, -1].gather(1, pairs.answer[:, None]) - logits[:, -1].gather(1, pairs.wrong[:, None])).mean()
            for logits in (model(pairs.clean), model.run_with_hooks(pairs.clean, fwd_hooks=[(point, patch)]))
        ]
    assert scores["a1.h2"] == pytest.approx(float(metric[0] - metric[1]), abs=1e-5)
    assert dfa.faithfulness_curve(model, pairs, scores).faithfulness[-1] == 1


def test_the_transfer_matrix_takes_the_table_of_a_study():
    rows = [
        ("one-task", "llama3", trained, task, 0.1 * i)
        for i, (trained, task) in enumerate((("a", "b"), ("b", "a"), ("", "a")))
    ]
    table = pd.DataFrame(rows, columns=["setting", "family", "trained_on", "task", "cpr"])
    shown = dfa.plots.transfer_matrix(table).to_frame()
    assert shown[["trained_on", "task"]].values.tolist() == [["a", "b"], ["b", "a"]]
    for column, value, what in (("setting", "other", "2 settings"), ("family", "qwen2.5", "2 pairs of models")):
        several = pd.concat([table, table.assign(**{column: value})])
        with pytest.raises(dfa.DfaError, match=what):
            dfa.plots.transfer_matrix(several)


def test_axes_of_a_scatter_say_what_the_scores_are():
    nodes = dfa.NodeSet.for_sizes(2, 2)
    source = dfa.NodeScores(torch.arange(6.0), nodes, {"method": "nap", "model": "small"})
    carried = dfa.controls.random_w(nodes, nodes).transfer(source)
    figure = dfa.plots.score_scatter(source, carried)
    assert figure.layout.xaxis.title.text == "nap score on small"
    assert figure.layout.yaxis.title.text == "transferred score"
    plain = dfa.plots.score_scatter(dfa.NodeScores(source.values, nodes), carried, second_name="mine")
    assert (plain.layout.xaxis.title.text, plain.layout.yaxis.title.text) == ("first scores", "mine")
