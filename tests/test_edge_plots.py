"""Figures of edges: every edge is where it belongs, what is hidden is dead, clicks say what the scores say."""

import re

import numpy as np
import pytest
import torch
from helpers import unchecked

import dfa_lens as dfa
from dfa_lens.errors import EdgeError
from dfa_lens.plots import edge_graph


def scores_of(*sizes, seed=0, chosen=None):
    edges = dfa.EdgeSet(*sizes)
    values = torch.randn(edges.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return dfa.EdgeScores(values, edges if chosen is None else edges.choose(chosen))


@pytest.fixture(params=[(3, 4, 2), (3, 4), (2, 6, 2)], ids=["grouped", "per head", "three share"])
def scores(request):
    return scores_of(*request.param)


def lines(figure):
    """The edges of a figure, by name."""
    return {trace.name: trace for trace in figure.data if "->" in (trace.name or "")}


def visible(figure):
    return {name for name, trace in lines(figure).items() if trace.visible}


def live_names(scores, k, ranking="absolute", selection="top"):
    """The edges among the k best that lie on a path, by a search of one's own."""
    best = [edge.split("->") for edge in scores.top(k, ranking=ranking, selection=selection)]
    members = scores.edges.n_heads // scores.edges.n_kv_heads

    def nodes(reader):  # whose input it is
        found = re.fullmatch(r"a(\d+)\.(h|kv)(\d+)<.>", reader)
        if found is None:
            return {reader}
        layer, kind, index = found.groups()
        heads = range(int(index) * members, (int(index) + 1) * members) if kind == "kv" else [int(index)]
        return {f"a{layer}.h{head}" for head in heads}

    forward, backward = {"input"}, {"logits"}
    for _ in range(len(scores.writers)):
        forward |= {node for writer, reader in best if writer in forward for node in nodes(reader)}
        backward |= {writer for writer, reader in best if nodes(reader) & backward}
    return {f"{w}->{r}" for w, r in best if w in forward and nodes(r) & backward}


@pytest.mark.parametrize(("ranking", "selection"), [("absolute", "top"), ("signed", "top"), ("signed", "greedy")])
def test_what_is_drawn_lies_on_a_path(scores, ranking, selection):
    figure = dfa.plots.circuit_graph(scores, size=40, most=120, ranking=ranking, selection=selection)
    assert visible(figure) == live_names(scores, 40, ranking, selection)
    assert set(lines(figure)) == live_names(scores, 120, ranking, selection)
    slider = figure.layout.sliders[0]
    for step in slider.steps:
        k = int(step.label.split()[0])
        change, layout, traces = step.args
        shown = {
            figure.data[i].name
            for i, on in zip(traces, change["visible"], strict=True)
            if on and i < len(lines(figure))
        }
        assert shown == live_names(scores, k, ranking, selection)
        assert step.label == f"{k} of {len(scores)}, {len(shown)} on a path"
        assert slider.steps[layout["meta"]] is step
    assert slider.steps[slider.active].label.startswith("40 of")


def test_without_pruning_all_are_drawn(scores):
    figure = dfa.plots.circuit_graph(scores, size=30, most=60, prune=False)
    assert set(lines(figure)) == set(scores.top(60, ranking="absolute"))
    assert visible(figure) == set(scores.top(30, ranking="absolute"))
    assert "path" not in figure.layout.sliders[0].steps[0].label


def test_an_edge_begins_at_its_writer_and_ends_at_its_reader(scores):
    figure = dfa.plots.circuit_graph(scores, size=60, most=60)
    marks = {}
    for trace in figure.data:
        if trace.name in ("nodes", "readers"):
            for name, x, y in zip(trace.customdata, trace.x, trace.y, strict=True):
                assert name not in marks
                marks[name] = (x, y)
    places = list(marks.values())
    assert len(set(places)) == len(places)
    for name, line in lines(figure).items():
        writer, reader = name.split("->")
        assert line.x[0] == pytest.approx(marks[writer][0], abs=1e-3)
        assert line.x[-1] == pytest.approx(marks[reader][0], abs=1e-3)
        assert 0 < line.y[0] - marks[writer][1] < 0.5  # just above the one, just below the other
        assert 0 < marks[reader][1] - line.y[-1] < 0.5
        assert line.y[0] < line.y[-1]
        assert (np.diff(line.y) >= 0).all()
    assert marks["input"][1] == min(y for _, y in places)
    assert marks["logits"][1] == max(y for _, y in places)


def test_colour_and_width_are_the_score(scores):
    figure = dfa.plots.circuit_graph(scores, size=60, most=60)
    drawn = lines(figure)
    for name, line in drawn.items():
        red, blue = (int(line.line.color[i : i + 2], 16) for i in (1, 5))
        assert (red > blue) == (scores[name] > 0)
        assert f"score {scores[name]:+.4g}" in line.text
        assert ("hurts" in line.text) == (scores[name] < 0)
    widths = np.array([line.line.width for line in drawn.values()])
    sizes = np.array([abs(scores[name]) for name in drawn])
    assert (np.diff(widths[np.argsort(sizes)]) >= 0).all()
    inside = sizes < np.quantile(sizes, 0.97)
    slope = (widths[inside] - 1) / sizes[inside]
    assert slope == pytest.approx(slope.mean(), rel=0.03)  # in proportion
    assert list(drawn) == sorted(drawn, key=lambda name: abs(scores[name]))  # the strongest on top


def test_the_table_of_a_graph(scores):
    figure = dfa.plots.circuit_graph(scores, size=20, most=80)
    table = figure.to_frame()
    ranks = {name: rank for rank, name in enumerate(scores.top(80, ranking="absolute"), 1)}
    for row in table.itertuples():
        assert scores[row.edge] == pytest.approx(row.score)
        assert row.edge == f"{row.writer}->{row.reader}"
        assert row.rank == ranks[row.edge] <= row.size
        assert row.edge in live_names(scores, row.size)
    assert set(table[table["size"] <= 20]["edge"]) == visible(figure)


def clicked(widget, name, traces=("nodes", "readers")):
    from plotly.callbacks import Points

    for index, trace in enumerate(widget.data):
        if trace.name in traces and name in (trace.customdata if trace.customdata is not None else ()):
            at = list(trace.customdata).index(name)
            for callback in trace._click_callbacks:
                callback(trace, Points(point_inds=[at], trace_name=trace.name, trace_index=index), None)
            return
    raise AssertionError(f"{name} is not drawn")


def test_a_click_follows_a_node():
    pytest.importorskip("anywidget")
    scores = scores_of(3, 4, 2)
    figure = dfa.plots.circuit_graph(scores, size=60, most=100)
    widget = figure.widget()
    clicked(widget, "a1.h1")
    mine = {
        name
        for name in lines(figure)
        if name.startswith("a1.h1->") or name.split("->")[1] in ("a1.h1<q>", "a1.kv0<k>", "a1.kv0<v>")
    }
    assert mine
    bright = {trace.name for trace in widget.data if "->" in (trace.name or "") and trace.opacity > 0.5}
    assert bright == mine
    text = widget.layout.annotations[-1].text
    assert text.startswith("<b>a1.h1</b> reads ")
    shown = [name for name in mine & visible(figure) if name.startswith("a1.h1->")]
    best = max(shown, key=lambda name: abs(scores[name]))
    reader = best.split("->")[1].replace("<", "&lt;").replace(">", "&gt;")
    assert f"writes to {reader} {scores[best]:+.3g}" in text
    clicked(widget, "m0")
    assert len(widget.layout.annotations) == 1
    assert "<b>m0</b>" in widget.layout.annotations[0].text


def script_data(figure):
    return figure.reactions[-1].data


def test_the_script_holds_what_the_widget_says():
    figure = dfa.plots.circuit_graph(scores_of(3, 4, 2), size=60, most=100)
    data = script_data(figure)
    names = list(lines(figure))
    assert len(data["edges"]) == len(names)
    for name, traces in data["writes"].items():
        assert {names[i].split("->")[0] for i in traces} == {name}
    assert set(data["writes"]) | set(data["reads"]) >= {
        name for trace in figure.data if trace.name in ("nodes", "readers") for name in trace.customdata
    }
    assert data["reads"]["m1"] == [i for i in data["reads"]["m1"] if names[i].endswith("->m1")]


def test_only_the_best_of_a_large_model():
    """1 B: half a million edges; the figure holds what it shows."""
    scores = scores_of(16, 32, 8)
    assert len(scores) == 195_865
    figure = dfa.plots.circuit_graph(scores, prune=False)
    assert len(lines(figure)) == 200
    assert len(figure.to_html(include_plotlyjs=False)) < 500_000
    blocks = dfa.plots.edge_heatmap(scores, most=20_000)
    assert len(blocks.to_html(include_plotlyjs=False)) < 1_500_000


def test_on_paper_there_is_one_size():
    figure = dfa.plots.circuit_graph(scores_of(3, 4, 2), size=40, style="paper")
    assert not figure.layout.sliders
    assert figure.reactions == ()
    assert set(lines(figure)) == live_names(scores_of(3, 4, 2), 40)
    assert dfa.plots.edge_heatmap(scores_of(3, 4, 2), style="paper-narrow").layout.width == 317


def test_bad_sizes_of_a_graph():
    scores = scores_of(2, 2)
    for call, message in (
        (lambda: dfa.plots.circuit_graph(scores, most=0), "most must be at least 1, not 0"),
        (
            lambda: dfa.plots.circuit_graph(scores, size=30, most=20),
            "size must be between 1 and most, which is 20, not 30",
        ),
        (
            lambda: dfa.plots.circuit_graph(scores, size=99, slider=False),
            "between 1 and the number of edges, 46, not 99",
        ),
        (
            lambda: dfa.plots.circuit_graph(scores.where(writer="m0", reader="m1")),
            "None of the 1 best edges lies on a path",
        ),
        (
            lambda: unchecked(dfa.plots.edge_heatmap)(scores, measure="summ"),
            "Unknown measure 'summ'.*Did you mean 'sum'",
        ),
        (lambda: dfa.plots.edge_heatmap(scores, block=("a3", "m1")), "Unknown writers 'a3'.*'a1'"),
        (lambda: dfa.plots.edge_heatmap(scores, block=("m1", "m0")), "No edge of these scores goes from m1 to m0"),
    ):
        with pytest.raises(EdgeError, match=message):
            call()
    assert set(lines(dfa.plots.circuit_graph(scores.where(writer="m0", reader="m1"), prune=False))) == {"m0->m1"}


# --- circuits ------------------------------------------------------------------------------------------------------


def test_a_circuit_is_drawn_as_its_scores_are(scores):
    """With scores, the graph of a circuit of the k best edges is that of the scores at that size."""
    circuit = scores.circuit(40, ranking="absolute", with_input=True)
    figure = dfa.plots.circuit_graph(circuit, scores=scores)
    same = dfa.plots.circuit_graph(scores, size=40, most=40)
    assert visible(figure) == visible(same) == set(circuit.pruned().names)
    for name, line in lines(figure).items():
        assert (line.line, line.text, list(line.x)) == (
            lines(same)[name].line,
            lines(same)[name].text,
            list(lines(same)[name].x),
        )
    assert figure.layout.sliders[0].steps[-1].label.startswith("40 of 40, ")
    assert visible(dfa.plots.circuit_graph(circuit, scores=scores, size=20)) < visible(figure)


def test_a_circuit_without_scores(scores):
    circuit = scores.circuit(30, with_input=True)
    figure = dfa.plots.circuit_graph(circuit)
    assert set(lines(figure)) == visible(figure) == set(circuit.pruned().names)
    assert set(lines(dfa.plots.circuit_graph(circuit, prune=False))) == set(circuit.names)
    assert {line.line.color for line in lines(figure).values()} == {edge_graph.PLAIN}
    assert not figure.layout.sliders
    assert not {trace.name for trace in figure.data} & {"helps", "hurts"}  # it has no signs
    table = figure.to_frame()
    assert table["score"].isna().all()
    assert set(table["edge"]) == set(lines(figure))
    words = [word for edge in script_data(figure)["edges"] for word in edge[:2]]
    assert not any("nan" in word for word in words)
    assert all("nan" not in line.text for line in lines(figure).values())


def test_edges_outside_a_circuits_universe_make_paths():
    """Those of the input run beside a circuit that was chosen among the others; they are not drawn."""
    scores = scores_of(3, 4, 2)
    circuit = scores.circuit(25)
    assert all(not name.startswith("input") for name in circuit)
    for figure in (dfa.plots.circuit_graph(circuit), dfa.plots.circuit_graph(circuit, scores=scores)):
        assert visible(figure) == set(circuit.pruned().names)
        n = len(scores.edges) - len(scores.edges.without_input())
        assert f"{n} edges of the input run, too" in [trace.name for trace in figure.data]
    assert visible(figure)


def test_what_a_graph_of_a_circuit_refuses():
    scores = scores_of(2, 2)
    circuit = scores.circuit(20, with_input=True)
    other = scores_of(3, 2)
    part = scores.where(writer="a*")
    for kind, call, message in (
        (
            EdgeError,
            lambda: dfa.plots.circuit_graph(circuit, size=10),
            "without scores has no best edges: give scores=",
        ),
        (EdgeError, lambda: dfa.plots.circuit_graph(circuit, most=19), "has 20 edges, and the figure is to hold 19"),
        (EdgeError, lambda: dfa.plots.circuit_graph(scores, scores=scores), "has scores of its own"),
        (EdgeError, lambda: dfa.plots.circuit_graph(circuit, scores=part), "The circuit's edge .* has no score"),
        (dfa.errors.ScoreError, lambda: dfa.plots.circuit_graph(circuit, scores=other), "from another model"),
        (dfa.errors.CircuitError, lambda: dfa.plots.circuit_graph(circuit - circuit), "is empty"),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_figures_name_what_they_take():
    """An edge circuit where it makes no sense: one error, which says what draws it."""
    scores = scores_of(2, 2)
    circuit = scores.circuit(5)
    nodes = dfa.controls.random_scores(dfa.NodeSet.for_sizes(2, 2))
    plots = dfa.plots
    for figure, given, must, drawn in (
        (
            plots.scores_heatmap,
            (circuit,),
            "first argument (scores) must be NodeScores, got EdgeCircuit",
            "circuit_graph",
        ),
        (
            plots.token_heatmap,
            (circuit,),
            "first argument (scores) must be NodeScores, got EdgeCircuit",
            "circuit_graph",
        ),
        (
            plots.edge_heatmap,
            (circuit,),
            "first argument (scores) must be EdgeScores, got EdgeCircuit",
            "circuit_graph",
        ),
        (
            plots.aligned_heatmap,
            (nodes, circuit),
            "second argument (target) must be NodeScores, got EdgeCir",
            "node_graph",
        ),
        (
            plots.score_scatter,
            (nodes, scores),
            "second argument (second) must be NodeScores, got EdgeSc",
            "edge_heatmap",
        ),
        (
            plots.alignment_explorer,
            (circuit,),
            "first argument (alignment) must be Alignment, got EdgeCir",
            "node_graph",
        ),
        (
            plots.node_graph,
            (nodes,),
            "first argument (circuit) must be Circuit or EdgeCircuit, got Nod",
            "scores_heatmap",
        ),
        (
            plots.node_graph,
            (scores,),
            "first argument (circuit) must be Circuit or EdgeCircuit, got Edge",
            "circuit_graph",
        ),
        (
            plots.circuit_graph,
            (nodes,),
            "first argument (edges) must be EdgeScores or EdgeCircuit, got No",
            "scores_heat",
        ),
        (
            plots.curves,
            ({"one": circuit},),
            "must be name → FaithfulnessCurve, and that of 'one' is Edge",
            "circuit_graph",
        ),
        (
            plots.circuit_comparison,
            ({"a": circuit, "b": circuit},),
            "name → Circuit, and that of 'a' is E",
            ".to_nodes()",
        ),
        (
            plots.report,
            ({"a": circuit}, "a.html"),
            "name → EdgeScores, and that of 'a' is EdgeCircuit",
            "circuit_graph",
        ),
        (
            plots.report,
            (circuit, "a.html"),
            "must be Results or EdgeScores or Mapping or DataFrame, got E",
            "circuit_g",
        ),
        (plots.circuit_overlap, (circuit,), "must be name → Circuit or EdgeCircuit, got EdgeCircuit", "circuit_graph"),
    ):
        with pytest.raises(dfa.errors.ArgumentError, match=re.escape(must)) as caught:
            unchecked(figure)(*given)
        assert drawn in str(caught.value), figure.__name__


def test_the_overlap_of_circuits_of_edges():
    scores = scores_of(2, 2)
    figure = dfa.plots.circuit_overlap({"five": scores.circuit(5), "nine": scores.circuit(9)})
    assert "5 edges of 5 and 9" in figure.data[0].customdata[0][1]
    assert figure.to_frame()["jaccard"].tolist() == pytest.approx([5 / 9])


# --- blocks ----------------------------------------------------------------------------------------------------------


def by_pattern(scores, writers, readers):
    """The scores of a block, by the names of its ends."""
    rows = f"{writers}.*" if writers.startswith("a") else writers
    columns = readers.replace("<", ".*<") if readers.startswith("a") else readers
    return scores.where(writer=rows, reader=columns).flat.abs()


@pytest.mark.parametrize("measure", ["sum", "largest"])
def test_a_block_stands_for_its_edges(scores, measure):
    figure = dfa.plots.edge_heatmap(scores, measure=measure)
    above = figure.data[0]
    n = 0
    for writers, row in zip(above.y, above.z, strict=True):
        for text, value in zip(above.x, row, strict=True):
            readers = text.replace("&lt;", "<").replace("&gt;", ">")
            if np.isnan(value):
                with pytest.raises(EdgeError):
                    by_pattern(scores, writers, readers)
                continue
            sizes = by_pattern(scores, writers, readers)
            n += len(sizes)
            assert value == pytest.approx(float(sizes.sum() if measure == "sum" else sizes.max()), rel=1e-5)
    assert n == len(scores)
    table = figure.to_frame()
    assert table["edges"].sum() == len(scores)
    assert table[measure].is_monotonic_decreasing
    assert table["sum"].sum() == pytest.approx(float(scores.flat.abs().sum()), rel=1e-5)
    for row in table.itertuples():
        assert abs(scores[row.edge]) == pytest.approx(row.largest)


def test_a_click_shows_the_edges_of_a_block(scores):
    pytest.importorskip("anywidget")
    from plotly.callbacks import Points

    figure = dfa.plots.edge_heatmap(scores)
    widget = figure.widget()
    details = script_data(figure)["details"]
    above = figure.data[0]
    for row, column in np.argwhere(~np.isnan(above.z)):
        for callback in widget.data[0]._click_callbacks:
            callback(widget.data[0], Points(point_inds=[(row, column)], trace_name="blocks", trace_index=0), None)
        below = widget.data[1]
        assert {"z": [list(each) for each in below.z], "x": list(below.x), "y": list(below.y)} == details[
            f"{row},{column}"
        ]["trace"]
        assert widget.layout.annotations[1].text == f"edges from {above.y[row]} to {above.x[column]}"
        assert widget.layout.coloraxis2.cmax == pytest.approx(
            np.nanmax(np.abs(np.array(below.z, dtype=float))), rel=1e-3
        )
        for writer, values in zip(below.y, below.z, strict=True):
            for reader, value in zip(below.x, values, strict=True):
                name = f"{writer}->{reader}".replace("&lt;", "<").replace("&gt;", ">")
                assert value == pytest.approx(scores[name], rel=1e-3)


def test_a_figure_of_blocks_holds_no_more_edges_than_asked(scores):
    figure = dfa.plots.edge_heatmap(scores, most=40)
    held = script_data(figure)["details"].values()
    assert 0 < sum(np.size(each["trace"]["z"]) for each in held) <= 40
    pytest.importorskip("anywidget")
    from plotly.callbacks import Points

    widget = figure.widget()
    weakest = np.unravel_index(np.nanargmin(figure.data[0].z), figure.data[0].z.shape)
    for callback in widget.data[0]._click_callbacks:
        callback(widget.data[0], Points(point_inds=[weakest], trace_name="blocks", trace_index=0), None)
    assert "not in the figure" in widget.layout.annotations[1].text


def test_the_first_block_is_the_one_asked_for():
    scores = scores_of(3, 4, 2)
    figure = dfa.plots.edge_heatmap(scores, block=("a0", "a2<v>"))
    assert list(figure.data[1].y) == [f"a0.h{i}" for i in range(4)]
    assert figure.data[1].x[1] == "a2.kv1&lt;v&gt;"
    assert figure.data[1].z[2][1] == pytest.approx(scores["a0.h2->a2.kv1<v>"], rel=1e-3)


def test_edges_of_a_part_of_the_model():
    edges = dfa.EdgeSet(2, 2).where(writer="a0.*", reader="a1.*<v>")
    scores = dfa.EdgeScores(torch.ones(edges.shape), edges)
    figure = dfa.plots.edge_heatmap(scores)
    assert int(np.isfinite(figure.data[0].z).sum()) == 1
    assert figure.to_frame().loc[0, ["writers", "readers", "sum"]].tolist() == ["a0", "a1<v>", 4.0]


def test_names_and_words():
    assert edge_graph._reader_text("a3.kv1<k>") == "keys of key-value head 1, layer 3"
    assert edge_graph._reader_text("a3.h10<q>") == "queries of head 10, layer 3"
    assert edge_graph._node_text("a3.h10") == "head 10 of layer 3"
    assert edge_graph._node_text("m4") == "MLP of layer 4"


# --- the report ----------------------------------------------------------------------------------------------------


def test_a_report_of_edges(tmp_path):
    from test_plots import figures_of

    scores = scores_of(3, 4, 2)
    several = {"one": scores, "<b>two": scores_of(2, 6, 2)}
    path = dfa.plots.report(several, tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert "<h1>Circuits of edges</h1>" in page
    assert "CPR by task" not in page
    assert [len(figures) for figures in figures_of(path).values()] == [2, 2]
    assert "<b>two" not in page
    assert "&lt;b&gt;two" in page
    alone = dfa.plots.report(dfa.EdgeScores(scores.values, scores.edges, {"model": "a model"}), tmp_path / "a.html")
    assert "<h2>edges: a model</h2>" in alone.read_text(encoding="utf-8")


def test_a_report_of_results_and_edges(tmp_path):
    from test_plots import made_up_results

    page = dfa.plots.report(made_up_results(1), tmp_path / "page.html", edges={"one": scores_of(3, 4, 2)})
    text = page.read_text(encoding="utf-8")
    assert "CPR by task" in text
    assert '<option value="edges=one">one</option>' in text


def test_a_report_of_edges_without_a_path(tmp_path):
    """A sample of edges has scores, and rarely a path."""
    from test_plots import figures_of

    scores = scores_of(2, 2).where(writer="m0", reader="m1")
    (figures,) = figures_of(dfa.plots.report(scores, tmp_path / "page.html")).values()
    assert "m0->m1" in [trace.get("name") for trace in figures["0"]["data"]]


def test_a_report_of_nothing(tmp_path):
    with pytest.raises(dfa.DfaError, match="no results to report"):
        dfa.plots.report({}, tmp_path / "page.html")
