import json
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import made_curve, unchecked

import dfa_lens as dfa
from dfa_lens.errors import FaithfulnessError, ScoreError
from dfa_lens.plots import style

ROOT = Path(__file__).parents[1]
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
        assert (value == 0) == (node.name in kept)


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


# --- tasks, gold, links --------------------------------------------------------------------------------------------


@pytest.fixture
def several():
    alignment = dfa.controls.random_w(A, B)
    source = {name: dfa.controls.random_scores(A, seed=i) for i, name in enumerate(("one", "<script>two"))}
    return source, {name: alignment.transfer(s) for name, s in source.items()}, alignment


def test_a_dropdown_of_tasks_changes_everything(several):
    source, target, alignment = several
    figure = dfa.plots.aligned_heatmap(source, target, alignment=alignment)
    menu = figure.layout.updatemenus[0]
    assert [button.label for button in menu.buttons] == ["one", "&lt;script&gt;two"]
    second = menu.buttons[1].args
    alone = dfa.plots.aligned_heatmap(source["<script>two"], target["<script>two"], alignment=alignment)
    assert {alone.data[index].name for index in second[2]} >= {"source heads", "source MLP", "target heads"}
    for at, index in enumerate(second[2]):
        trace = alone.data[index]
        shown = np.array([[np.nan if v is None else v for v in row] for row in second[0]["z"][at]])
        np.testing.assert_allclose(shown, np.asarray(trace.z, dtype=float), rtol=1e-4)
        if not trace.name.endswith("outside"):
            assert [list(row) for row in trace.text] == second[0]["text"][at]
    kept = alone.layout.sliders[0].steps[3].args[0]["z"]
    assert second[1]["sliders"][0]["steps"][3]["args"][0]["z"] == kept


def test_gold_and_the_difference(drawn):
    s, alignment, t = drawn
    gold = dfa.controls.random_scores(B, seed=9)
    figure = dfa.plots.aligned_heatmap(s, t, alignment=alignment, gold=gold)
    traces = {trace.name: trace for trace in figure.data}
    difference = traces["difference heads"].z[2, 3]
    above = [sum(each > scores["a2.h3"] for each in scores.values.tolist()) for scores in (t, gold)]
    assert difference == pytest.approx((above[1] - above[0]) / (len(B) - 1), abs=1e-6)
    assert traces["gold heads"].customdata[2, 3] == pytest.approx(gold["a2.h3"])
    table = figure.to_frame()
    assert set(table["model"]) == {"source", "target", "gold"}
    assert len(table) == len(A) + 2 * len(B)


def test_links_are_the_strongest_products(drawn):
    from dfa_lens.plots.links import Links

    s, alignment, _ = drawn
    links = Links.of(alignment, s, 3)
    products = alignment.contributions(s)
    for j in (0, 7, 23):
        best = products[:, j].abs().argsort(descending=True)[:3].tolist()
        assert [i for i, _ in links.feeds[j]] == best
        assert [p for _, p in links.feeds[j]] == pytest.approx([float(products[i, j]) for i in best])
    for i in (0, 5):
        assert links.goes[i][0][0] == int(products[i].abs().argmax())


def test_every_figure_carries_its_numbers(drawn, several, tmp_path):
    s, alignment, t = drawn
    trained = dfa.Alignment.of(
        alignment.W,
        A,
        B,
        history=[{"step": i, "loss": 1.0, "divergence": 1.0 / (i + 1), "mask_mean": 0.4} for i in range(5)],
    )
    table = pd.DataFrame(
        {
            "task": ["x", "x", "y"] * 2,
            "setting": ["gold"] * 3 + ["zero-shot"] * 3,
            "recovery": [1.0, 1.0, 1.0, 0.5, 0.7, 0.9],
            "examples": [4, 8, 8, 4, 8, 8],
            "cpr": [0.8, 0.8, 0.7, 0.4, 0.5, 0.6],
            "train": ["x", "x", "y", "x", "y", "y"],
            "test": ["x", "y", "y", "x", "x", "y"],
        }
    )
    plots = dfa.plots
    made = {
        "explorer": plots.alignment_explorer(alignment),
        "matrix": plots.transfer_matrix(table),
        "bars": plots.recovery_bars(table),
        "history": plots.training_history({"<b>": trained}),
        "sizes": plots.size_sensitivity(table),
        "scatter": plots.score_scatter(t, dfa.controls.random_scores(B, seed=4)),
        "heatmap": plots.scores_heatmap(s),
    }
    for name, figure in made.items():
        assert isinstance(figure, plots.Picture), name
        assert len(figure.to_frame()) > 0, name
        figure.write_html(tmp_path / f"{name}.html", include_plotlyjs=False)
    assert made["explorer"].to_frame().loc["a1.h2", "m3"] == pytest.approx(
        float(alignment.W[A.position("a1.h2"), B.position("m3")])
    )
    cells = made["matrix"].to_frame().set_index(["train", "test"])
    assert cells.loc[("x", "x"), "mean"] == pytest.approx((0.8 + 0.4) / 2)
    bars = made["bars"].to_frame().set_index(["setting", "task"])
    assert list(bars.index.get_level_values(0).unique()) == ["zero-shot"]
    assert bars.loc[("zero-shot", "x"), "mean"] == pytest.approx((0.4 + 0.5) / (0.8 + 0.8))
    assert "&lt;b&gt;" in made["history"].data[0].name
    agreement = dfa.statistics.correlation(t, dfa.controls.random_scores(B, seed=4))
    assert f"r {agreement.pearson:.2f}" in made["scatter"].layout.annotations[0].text


def test_explorer_orders(drawn):
    _, alignment, _ = drawn
    figure = dfa.plots.alignment_explorer(alignment)
    by_layer, by_kind = figure.layout.updatemenus[0].buttons
    assert list(figure.data[0].x) == list(B.names) == list(by_layer.args[0]["x"][0])
    assert by_kind.args[0]["x"][0][-4:] == ["m0", "m1", "m2", "m3"]
    W = alignment.W.numpy()
    shown = np.array(by_kind.args[0]["z"][0])
    rows, columns = by_kind.args[0]["y"][0], by_kind.args[0]["x"][0]
    for r in (0, 4, 7):
        for c in (0, 11, 23):
            assert shown[r, c] == pytest.approx(float(W[A.position(rows[r]), B.position(columns[c])]), rel=1e-3)
    depth = figure.data[3]
    first = [n.layer == 0 for n in A], [n.layer == 2 for n in B]
    assert depth.z[0][2] == pytest.approx(np.abs(W)[np.ix_(*first)].mean())


def test_paper_style_has_no_controls(drawn, several):
    s, alignment, _ = drawn
    figure = dfa.plots.aligned_heatmap(*several[:2], alignment=alignment, style="paper", size=3)
    assert not figure.layout.sliders and not figure.layout.updatemenus
    assert figure.layout.width == round(6.8 * 96)
    assert "serif" in figure.layout.font.family
    assert dfa.plots.scores_heatmap(s, style="paper-narrow").layout.width == round(3.3 * 96)
    assert dfa.plots.scores_heatmap(s, style="paper-narrow", width=500).layout.width == 500


@pytest.mark.browser
def test_static_pictures(drawn, tmp_path):
    import shutil

    if shutil.which("chromium") is None:
        pytest.skip("no Chromium on this machine")
    s, alignment, t = drawn
    figure = dfa.plots.aligned_heatmap(s, t, alignment=alignment, style="paper", height=300)
    figure.write_image(tmp_path / "figure.pdf")
    figure.write_image(tmp_path / "figure.png", scale=2)
    assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    png = (tmp_path / "figure.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 2 * round(6.8 * 96)


# What people with the two common kinds of colour blindness see (Machado, Oliveira and Fernandes 2009, severity 1).
_BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def _seen(color, matrix):
    """CIELAB of a "#rrggbb" colour seen through a simulation of colour blindness."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.maximum(xyz / np.array([0.9505, 1.0, 1.089]), 1e-9))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", _BLIND)
def test_colours_can_be_told_apart_by_the_colour_blind(kind):
    matrix = _BLIND[kind]
    ends = [_seen(dict(style.DIVERGING)[at], matrix) for at in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for i, one in enumerate(ends):
        for other in ends[i + 1 :]:
            assert np.linalg.norm(one - other) > 20
    lines = [_seen(color, matrix) for color in style.LINES[:5]]
    for i, one in enumerate(lines):
        for other in lines[i + 1 :]:
            assert np.linalg.norm(one - other) > 10
    lightness = [_seen(color, matrix)[0] for _, color in style.SEQUENTIAL]
    assert lightness == sorted(lightness, reverse=True)


def test_bad_tables(drawn, several):
    from dfa_lens.errors import AlignmentError, DfaError

    s, alignment, t = drawn
    plots = dfa.plots
    table = pd.DataFrame({"train": ["x"], "test": ["y"], "cpr": [np.nan], "setting": ["gold"], "task": ["x"]})
    for call, error, message in (
        (lambda: plots.transfer_matrix(table[:0]), DfaError, "The table is empty"),
        (lambda: plots.transfer_matrix(table, value="cmd"), DfaError, "no column 'cmd'; it has 'train', 'test'"),
        (lambda: plots.transfer_matrix(table), DfaError, "has no finite number"),
        (lambda: plots.transfer_matrix([1]), DfaError, "A pandas table is needed, not list"),
        (lambda: plots.recovery_bars(table, value="cpr"), DfaError, "Nothing is left to draw without 'gold'"),
        (lambda: plots.size_sensitivity(table, x="cpr"), DfaError, "has only one size"),
        (lambda: plots.training_history(alignment), DfaError, "has no history: it was not trained"),
        (lambda: plots.training_history({}), DfaError, "no alignments"),
        (lambda: plots.score_scatter(s, t), ScoreError, "belong to"),
        (lambda: plots.alignment_explorer(dfa.Alignment.of(0 * alignment.W, A, B)), AlignmentError, "zero everywhere"),
        (lambda: plots.aligned_heatmap(several[0], t), ScoreError, "on both models alike"),
        (lambda: plots.aligned_heatmap(several[0], {"one": t}), ScoreError, "'<script>two' has source scores but no"),
        (lambda: plots.aligned_heatmap(s, t, gold=s), ScoreError, "The gold scores belong to"),
        (lambda: unchecked(style.on_paper)("papr"), DfaError, "Unknown style 'papr'.*Did you mean 'paper'"),
        (lambda: plots.Picture().to_frame(), DfaError, "carries no table"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_widget_reacts_to_clicks(drawn):
    pytest.importorskip("anywidget")
    from plotly.callbacks import Points

    s, alignment, t = drawn
    widget = dfa.plots.aligned_heatmap(s, t, alignment=alignment, contributors=3).widget()
    index = next(i for i, trace in enumerate(widget.data) if trace.name == "target heads")
    trace = widget.data[index]
    points = Points(point_inds=[(3, 4)], trace_name=trace.name, trace_index=index)
    for callback in trace._click_callbacks:
        callback(trace, points, None)
    assert len(widget.layout.shapes) == 2 * (1 + 3)  # each on a white line, which keeps it visible on its own colour
    assert widget.layout.shapes[0].x0 == 3.5 and widget.layout.shapes[0].y0 == 2.5
    products = alignment.contributions(s)[:, B.position("a3.h4")]
    best = A.names[int(products.abs().argmax())]
    assert f"<b>a3.h4</b> is fed by {best}" in widget.layout.annotations[-1].text


def test_html_and_widget_answer_a_click_alike(drawn):
    """The script holds what the widget draws: nothing is worked out twice."""
    pytest.importorskip("anywidget")
    from plotly.callbacks import Points

    s, alignment, t = drawn
    figure = dfa.plots.aligned_heatmap(s, t, alignment=alignment, contributors=3)
    data = figure.reactions[-1].data
    assert len(data["answers"][0]) == len(data["rectangles"]) == len(A) + len(B)
    widget = figure.widget()
    for index, trace in enumerate(widget.data):
        for row, column in np.argwhere(np.isfinite(np.asarray(trace.z, dtype=float))):
            text, outlines = data["answers"][0].get(f"{index},{row},{column}", (None, []))
            assert (text is None) == trace.name.endswith("outside")
            for callback in trace._click_callbacks:
                callback(trace, Points(point_inds=[(row, column)], trace_name=trace.name, trace_index=index), None)
                assert widget.layout.annotations[-1].text == text
                assert [shape.to_plotly_json() for shape in widget.layout.shapes] == [
                    data["rectangles"][cell] | {"line": {"color": color, "width": width}}
                    for cell, color, width in outlines
                ]


def test_a_widget_follows_the_dropdown(drawn):
    """A task chosen in the menu changes traces and layout; the next click shows that task's links."""
    pytest.importorskip("anywidget")
    from plotly.callbacks import Points

    s, alignment, t = drawn
    other = dfa.controls.random_scores(A, seed=9)
    sources, targets = {"one": s, "two": other}, {"one": t, "two": alignment.transfer(other)}
    widget = dfa.plots.aligned_heatmap(sources, targets, alignment=dict.fromkeys(sources, alignment)).widget()
    index = next(i for i, trace in enumerate(widget.data) if trace.name == "target heads")
    change, layout, traces = widget.layout.updatemenus[0].buttons[1].args
    widget.plotly_update(restyle_data=change, relayout_data=layout, trace_indexes=traces)  # as the browser reports it
    points = Points(point_inds=[(3, 4)], trace_name="target heads", trace_index=index)
    for callback in widget.data[index]._click_callbacks:
        callback(widget.data[index], points, None)
    products = alignment.contributions(other)[:, B.position("a3.h4")]
    assert f"is fed by {A.names[int(products.abs().argmax())]}" in widget.layout.annotations[-1].text


# --- the report ----------------------------------------------------------------------------------------------------


def made_up_results(n_tasks, settings=("gold", "zero-shot")):
    from dfa_lens.data.curve import FaithfulnessCurve
    from dfa_lens.experiments.table import Results, TaskResult

    fractions, ones = np.linspace(0, 1, 3), np.ones(4)
    f = np.tile([[0.0], [0.5], [1.0]], 4)
    curve = FaithfulnessCurve(fractions, np.array([0, 12, 24]), f, ones, 0 * ones, fractions, "nodes", "signed", 24)
    scores = dfa.controls.random_scores(B)
    return Results(
        [
            TaskResult("family", f"task {i}", scores, scores, {}, {}, dict.fromkeys(settings, curve))
            for i in range(n_tasks)
        ]
    )


@pytest.fixture
def differences(monkeypatch):
    """Let the comparisons of curves give these differences and p-values, in turn; what they were asked is kept."""
    from dfa_lens.data.curve import Difference
    from dfa_lens.data.statistics import Interval

    def give(*found):
        asked = []

        def compare(first, second, *, resamples):
            asked.append(resamples)
            value, p = found[(len(asked) - 1) % len(found)]
            return Difference(value, Interval(value, value), p)

        monkeypatch.setattr(import_module("dfa_lens.plots.summary"), "cpr_difference", compare)
        return asked

    return give


def marked(page):
    """The marks of the page's table, row by row."""
    return re.findall(r"<sup>([▲†]*)</sup> <span", page.read_text(encoding="utf-8"))


def test_marks_are_corrected_by_holm(differences, tmp_path):
    """.01, .02, .03, .04 are all below .05 by their false discovery rate; Holm's correction leaves the first."""
    differences((-0.1, 0.01), (-0.1, 0.02), (-0.1, 0.03), (-0.1, 0.04))
    assert marked(dfa.plots.report(made_up_results(4), tmp_path)) == ["", "†", *[""] * 6]


def test_above_every_control_means_every(differences, tmp_path):
    settings = ("gold", "uniform-s", "random-w")
    differences((0.1, 0.001), (0.1, 0.001), (0.0, 1.0), (0.0, 1.0))  # gold against both controls, and they against it
    assert marked(dfa.plots.report(made_up_results(1, settings), tmp_path)) == ["▲", "", ""]
    differences((0.1, 0.001), (-0.1, 0.001), (0.0, 1.0), (0.0, 1.0))
    assert marked(dfa.plots.report(made_up_results(1, settings), tmp_path)) == ["", "", ""]


def test_many_cells_get_as_many_resamples_as_the_correction_needs(differences, tmp_path):
    asked = differences((0.0, 1.0))
    dfa.plots.report(made_up_results(40, ("gold", *"abcd")), tmp_path)
    assert len(asked) == 160
    assert min(asked) * 0.05 > 160  # the smallest p that resampling can give is one part of the resamples


def test_the_report_cites_the_paper_as_the_citation_file_does(tmp_path):
    import yaml

    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    page = dfa.plots.report(made_up_results(1), tmp_path).read_text()
    fields = dict(re.findall(r"(\w+) = \{(.*)\}", page[page.index("@article{") :]))
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert fields["author"] == " and ".join(authors)
    assert fields["title"] == paper["title"]
    assert fields["year"] == str(paper["year"])
    assert fields["journal"].endswith(paper["identifiers"][0]["value"])


def figures_of(page):
    """The figures that a page holds, by part of the page and name."""
    from dfa_lens.plots.views import unpacked

    packed = re.findall(
        r'<script type="text/plain" data-of="([^"]+)">([^<]+)</script>', page.read_text(encoding="utf-8")
    )
    return {name: json.loads(unpacked(text)) for name, text in packed}


def test_plotly_defines_kinds_of_traces_when_they_are_needed():
    """All of the list are there, for later; what is written in another way stays as it is."""
    from plotly.offline import get_plotlyjs

    from dfa_lens.plots.report import _by_need

    kinds = ",".join(f"k{i}$()" for i in range(25))
    expected = ",".join(f"()=>k{i}$()" for i in range(25))
    assert _by_need(f"a;$P.register([{kinds}]);b=$P") == f"a;$P.later=[{expected}];b=$P"
    for other in ("P.register([a(),b()])", f"P.register({kinds})", "P.register([x, y])"):
        assert _by_need(other) == other
    text = get_plotlyjs()
    changed = _by_need(text)
    assert ".later=[()=>" in changed  # of the plotly that is installed


def test_the_report_shows_the_smallest_faithful_circuit(tmp_path):
    """Transferred, gold and their difference in one figure, preset to it; what is said of it is what the curve says."""
    from dataclasses import replace

    results = made_up_results(1)
    curve = replace(
        results.tasks[0].curves["gold"], sizes=np.array([0, 22, 24]), per_example=np.tile([[0], [0.95], [1]], 4)
    )
    alignment = dfa.controls.random_w(A, B)
    source = dfa.controls.random_scores(A)
    circuit = alignment.transfer(source)
    results.tasks[0] = replace(
        results.tasks[0], source=source, circuits={"zero-shot": circuit}, curves={"gold": curve, "zero-shot": curve}
    )
    page = dfa.plots.report(results, tmp_path)
    figures = figures_of(page)
    assert set(figures) == {"summary", "view-family-family-task-task-0"}
    shown = figures["view-family-family-task-task-0"]
    assert set(shown) == {"0", "zero-shot", "circuit", "beside gold"}
    layout = shown["zero-shot"]["layout"]
    assert [note["text"] for note in layout["annotations"]][1:] == [
        "<b>target</b>",
        "<b>gold</b>",
        "<b>difference of ranks</b>",
    ]
    assert layout["sliders"][0]["steps"][layout["sliders"][0]["active"]]["label"] == "22 of 24, f = 0.95"
    dimmed = [
        trace
        for trace in shown["zero-shot"]["data"]
        if trace["name"].startswith("target") and "outside" in trace["name"]
    ]
    assert dimmed
    assert "smallest circuit with f ≥ 0.9: 22 of 24 nodes [22, 22]" in page.read_text(encoding="utf-8")
    assert "keeps 92% of the nodes (gold&#39;s 92%)" in page.read_text(encoding="utf-8")
    assert shown["circuit"]["layout"]["title"]["text"] == "zero-shot: the 22 best nodes"
    # a circuit of all nodes is no picture: then a fifth of them, and the title says why
    whole = replace(curve, per_example=np.tile([[0], [0.85], [1]], 4))
    results.tasks[0] = replace(results.tasks[0], curves={"gold": curve, "zero-shot": whole})
    (shown,) = (each for name, each in figures_of(dfa.plots.report(results, tmp_path)).items() if name != "summary")
    assert shown["circuit"]["layout"]["title"]["text"] == "zero-shot: the 5 best nodes (f ≥ 0.9 takes all 24)"
    assert [len(trace["x"]) for trace in shown["circuit"]["data"] if trace["name"] == "circuit"] == [5]


def test_the_overlap_of_circuits_is_counted_by_hand():
    circuits = {"a": dfa.Circuit(B.names[:6], B), "<b": dfa.Circuit(B.names[1:7], B), "c": dfa.Circuit(B.names[-6:], B)}
    figure = dfa.plots.circuit_overlap(circuits)
    z = np.asarray(figure.data[0].z)
    np.testing.assert_allclose(z, [[1, 5 / 7, 0], [5 / 7, 1, 0], [0, 0, 1]])
    assert list(figure.data[0].x) == ["a", "&lt;b", "c"]
    assert "5 nodes of 6 and 6<br>Jaccard 0.714" in figure.data[0].customdata[0][1]
    # of 24 nodes, six by six: the hypergeometric chance of five or more in common
    from scipy.stats import hypergeom

    p = hypergeom(24, 6, 6).sf(4)
    assert figure.to_frame()["p"].min() == pytest.approx(p)
    texts = {(note.x, note.y): note.text for note in figure.layout.annotations}
    assert texts["a", "&lt;b"] == ".71*" and texts["a", "c"] == ".00"
    with pytest.raises(dfa.DfaError):
        dfa.plots.circuit_overlap({"a": circuits["a"]})


def test_a_report_of_a_study(tmp_path):
    """The table alone: findings, bars, cells."""
    from dfa_lens.experiments.table import frame, row

    rows = [
        row(family="f", seed=seed, task=task, setting=setting, control="random-w" * (setting == "random-w"), cpr=cpr)
        for seed in (0, 1)
        for task in ("one", "two")
        for setting, cpr in (("gold", 0.8), ("zero-shot", 0.6), ("random-w", 0.2))
    ]
    page = dfa.plots.report(frame(rows), tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "zero-shot: CPR 0.600, 75% of gold&#39;s 0.800." in text
    assert "The best control, random-w, has a CPR of 0.200." in text
    assert "All means are over 2 tasks, 1 family, 2 seeds." in text
    assert set(figures_of(page)) == {"summary"}
    assert "<section" not in text


def test_transferred_scores_are_shown_as_their_mask(any_model, pairs):
    """By hand: sigmoid of score over the last temperature. Of a map that was not trained under a mask, the scores."""
    source = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
    alignment = dfa.fit(any_model, source, pairs, steps=2, temperature=(1.0, 0.5))
    target = alignment.transfer(source)
    expected = 1 / (1 + np.exp(-target["a1.h2"] / 0.5))
    assert expected == pytest.approx(float(alignment.mask(source)[target.nodes.position("a1.h2")]), abs=1e-6)
    both = dfa.plots.aligned_heatmap(source, target, alignment=alignment)
    for figure, name in ((both, "target heads"), (dfa.plots.scores_heatmap(target), "mask heads")):
        trace = next(trace for trace in figure.data if trace.name == name)
        assert trace.z[1, 2] == pytest.approx(expected, abs=1e-5)
        assert trace.customdata[1, 2] == pytest.approx(target["a1.h2"])
        assert "mask 0." in trace.text[1][2]
        assert "mask" in figure.layout.coloraxis.colorbar.title.text
    assert [note.text for note in both.layout.annotations][:2] == ["<b>source</b>", "<b>target: mask</b>"]
    fixed = dfa.controls.depth_mean(source.nodes, target.nodes).transfer(source)
    plain = dfa.plots.aligned_heatmap(source, fixed)
    trace = next(trace for trace in plain.data if trace.name == "target heads")
    assert trace.z[1, 2] == pytest.approx(fixed["a1.h2"] / style.robust_limit(fixed.values.numpy()), abs=1e-5)
    assert "mask" not in plain.layout.coloraxis.colorbar.title.text
    again = alignment @ dfa.controls.depth_mean(source.nodes, source.nodes)
    chained = dfa.plots.scores_heatmap(again.transfer(source))
    assert "mask" in chained.layout.coloraxis.colorbar.title.text


def test_a_setting_has_one_colour_everywhere():
    settings = ["gold", "in-distribution", "zero-shot", "mine"]
    rows = [(task, setting, 0.5, 0.5) for task in ("a", "b") for setting in settings]
    table = pd.DataFrame(rows, columns=["task", "setting", "recovery", "cpr"])
    bars = {bar.name: bar.marker.color for bar in dfa.plots.recovery_bars(table).data if bar.type == "bar"}
    drawn = dfa.plots.curves({name: made_curve(np.eye(3), np.ones(3), np.zeros(3), [0, 1, 2], 2) for name in settings})
    lines = {line.name.split(" (")[0]: line.line.color for line in drawn.data if line.mode == "lines+markers"}
    assert {name: lines[name] for name in bars} == bars
    assert len(set(lines.values())) == 4
    assert all(line.mode == "lines" for line in drawn.data if line.fill)
    assert list(style.line_colors("abc").values()) == list(style.LINES[:3])
