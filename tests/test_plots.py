import numpy as np
import pytest
import torch

import dfa_lens as dfa
from dfa_lens.errors import FaithfulnessError, ScoreError
from dfa_lens.plots import style

A, B = dfa.NodeSet.for_sizes(2, 3), dfa.NodeSet.for_sizes(4, 5)


@pytest.fixture
def drawn():
    s = dfa.controls.random_scores(A)
    alignment = dfa.controls.random_w(A, B)
    return s, alignment, alignment.transfer(s)


def test_every_score_is_where_it_belongs(drawn):
    s, alignment, t = drawn
    figure = dfa.plots.aligned_heatmap(s, t, alignment=alignment)
    traces = {trace.name: trace for trace in figure.data}
    for model, scores in (("source", s), ("target", t)):
        heads, mlps = traces[f"{model} heads"], traces[f"{model} MLP"]
        for node in scores.nodes:
            cell = mlps.customdata[node.layer, 0] if node.kind == "mlp" else heads.customdata[node.layer, node.index]
            assert cell == pytest.approx(scores[node.name])
            text = mlps.text[node.layer, 0] if node.kind == "mlp" else heads.text[node.layer, node.index]
            assert f"<b>{node.name}</b>" in text
            assert f"rank {int(scores.ranks()[scores.nodes.position(node.name)])} of {len(scores)}" in text
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax


def test_hover_names_the_largest_contributor(drawn):
    s, alignment, t = drawn
    figure = dfa.plots.aligned_heatmap(s, t, alignment=alignment, contributors=2)
    text = next(trace for trace in figure.data if trace.name == "target heads").text[3, 4]
    products = alignment.contributions(s)[:, B.position("a3.h4")]
    best = A.names[int(products.abs().argmax())]
    assert text.split("most from:")[1].split(":")[0].endswith(best)
    assert f"mask {float(alignment.mask(s)[B.position('a3.h4')]):.3f}" in text


def test_slider_dims_what_is_outside(drawn):
    s, alignment, t = drawn
    figure = dfa.plots.aligned_heatmap(s, t, alignment=alignment, size=3)
    slider = figure.layout.sliders[0]
    step = slider.steps[slider.active]
    assert step.label == "3 of 24"
    kept = set(t.top(3))
    grids, indices = step.args[0]["z"], step.args[1]
    shown = {figure.data[i].name: grid for i, grid in zip(indices, grids, strict=True)}
    for node in B:
        grid = shown["target MLP outside" if node.kind == "mlp" else "target heads outside"]
        value = grid[node.layer][0 if node.kind == "mlp" else node.index]
        assert (value is None) == (node.name in kept)


def test_other_nodes_get_a_sensible_layout(any_model):
    nodes = dfa.NodeSet.from_points(any_model, {"blocks.{layer}.attn.hook_v": 2, "blocks.{layer}.hook_attn_out": None})
    figure = dfa.plots.scores_heatmap(dfa.controls.random_scores(nodes), size=2)
    shapes = {trace.name: np.shape(trace.z) for trace in figure.data if not trace.name.endswith("outside")}
    assert shapes == {"scores attn.hook_v": (3, 2), "scores hook_attn_out": (3, 1)}
    with_input = dfa.NodeSet.for_sizes(2, 3, with_input=True)
    dfa.plots.scores_heatmap(dfa.controls.random_scores(with_input))


def test_zero_is_white_and_limits_are_robust():
    assert dict(style.DIVERGING)[0.5] == "#f7f7f7"
    values = np.concatenate([np.linspace(-1, 1, 99), [1000.0]])
    assert style.robust_limit(values) < 2
    assert style.robust_limit(np.zeros(5)) == 1
    assert style.robust_limit(np.array([0.0] * 99 + [3.0])) == 3


def test_curves(any_model, pairs):
    nodes = dfa.NodeSet.heads_and_mlps(any_model)
    made = {
        name: dfa.faithfulness_curve(any_model, pairs, dfa.controls.random_scores(nodes, seed=i))
        for i, name in enumerate(("one", "<b>two"))
    }
    figure = dfa.plots.curves(made, title="x")
    names = [trace.name for trace in figure.data]
    assert f"one (CPR {made['one'].cpr:.3f})" in names
    assert any(name.startswith("&lt;b&gt;two (CPR") for name in names)
    line = next(trace for trace in figure.data if trace.name.startswith("one (CPR"))
    np.testing.assert_allclose(line.y, made["one"].faithfulness)
    assert any("floor" in name for name in names)
    mib = dfa.faithfulness_curve(any_model, pairs, dfa.controls.random_scores(nodes), protocol="mib")
    with pytest.raises(FaithfulnessError, match="different protocols"):
        dfa.plots.curves({"a": made["one"], "b": mib})
    with pytest.raises(FaithfulnessError, match="no curves"):
        dfa.plots.curves({})


def test_bad_input(drawn):
    s, alignment, t = drawn
    with pytest.raises(ScoreError, match="size must be between 0 and the number of nodes, 24, not 25"):
        dfa.plots.aligned_heatmap(s, t, size=25)
    with pytest.raises(ScoreError, match="source scores belong to 24 nodes"):
        dfa.plots.aligned_heatmap(t, t, alignment=alignment)
    with pytest.raises(ScoreError, match="target scores belong to 8 nodes"):
        dfa.plots.aligned_heatmap(s, s, alignment=alignment)


def test_figures_change_no_global_setting(drawn):
    import plotly.io as pio

    before = (pio.templates.default, pio.renderers.default)
    dfa.plots.aligned_heatmap(drawn[0], drawn[2])
    assert (pio.templates.default, pio.renderers.default) == before
    assert torch.is_grad_enabled()
