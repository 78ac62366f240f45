"""The figures in a real browser: they open offline, without errors, and hover and slider do what they say."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers import made_curve, made_inspection

import dfa_lens as dfa

pytestmark = pytest.mark.browser
A, B = dfa.NodeSet.for_sizes(6, 8), dfa.NodeSet.for_sizes(10, 10)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def requested(browser):
    """Addresses outside the file that the page asked for."""
    urls = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(message["params"]["request"]["url"])
    return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]


def open_page(browser, path):
    browser.get(path.as_uri())
    browser.execute_async_script(
        "const done = arguments[0];"
        "const drawn = () => document.getElementById('scheme') ? document.documentElement.dataset.drawn"
        " : document.querySelector('.plotly-graph-div .main-svg');"
        "const wait = () => drawn() ? setTimeout(done, 300) : setTimeout(wait, 50); wait();"
    )
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not problems
    assert not requested(browser)


@pytest.fixture(scope="module")
def heatmap(tmp_path_factory):
    s = dfa.controls.random_scores(A)
    alignment = dfa.controls.random_w(A, B)
    t = alignment.transfer(s)
    path = tmp_path_factory.mktemp("figures") / "heatmap.html"
    dfa.plots.aligned_heatmap(s, t, alignment=alignment, title="title").write_html(path)
    return path, s, t


def test_heatmap_hover(browser, heatmap):
    path, _, t = heatmap
    open_page(browser, path)
    where = browser.execute_script(
        """
        const graph = document.querySelector('.plotly-graph-div');
        const trace = graph.data.find(trace => trace.name === 'target heads');
        const x = graph._fullLayout[trace.xaxis.replace('x', 'xaxis')];
        const y = graph._fullLayout[trace.yaxis.replace('y', 'yaxis')];
        const box = graph.getBoundingClientRect();
        return [box.left + x._offset + x.d2p(3), box.top + y._offset + y.d2p(7)];
        """
    )
    from selenium.webdriver.common.action_chains import ActionBuilder

    pointer = ActionBuilder(browser)
    for nudge in (-2, 0):
        pointer.pointer_action.move_to_location(round(where[0]) + nudge, round(where[1]))
    pointer.perform()
    shown = browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => done([...document.querySelectorAll('.hoverlayer text')]"
        ".map(e => e.textContent).join(' ')), 400);"
    )
    assert "a7.h3" in shown
    assert f"score {t['a7.h3']:+.4g}".replace("-", "−")[:9] in shown.replace("-", "−")
    assert "mask" in shown
    assert "most from:" in shown


def test_heatmap_slider(browser, heatmap):
    path, _, t = heatmap
    open_page(browser, path)
    script = """
    const graph = document.querySelector('.plotly-graph-div');
    const slider = graph.layout.sliders[0];
    const index = slider.steps.findIndex(step => step.label.startsWith('20 of'));
    const step = slider.steps[index];
    const done = arguments[0];
    Plotly.restyle(graph, step.args[0], step.args[1]).then(() => {
      const dimmed = graph.data.filter(trace => trace.name.startsWith('target') && trace.name.endsWith('outside'));
      done(dimmed.flatMap(trace => [...trace.z].flatMap(row => [...row])).filter(value => value === 1).length);
    });
    """
    assert browser.execute_async_script(script) == len(t) - 20


def test_report(browser, tmp_path):
    from dfa_lens.experiments import demo
    from dfa_lens.plots import report

    budget = demo.Budget(train=8, test=4, steps=2, curve_points=4, batch_size=8)
    results = demo.run(families=["llama3"], only=["addition"], budget=budget)
    open_page(browser, report(results, tmp_path))
    graphs = "return [...document.querySelectorAll('.plotly-graph-div')].map(g => g.data.length)"
    # recovery (six settings); curves (floor, line and band for each of seven settings); source, target, gold and their
    # difference (two panels each, and what dims them); the circuit (in it, outside, what colours mean, what is chosen,
    # its attention). What is not asked for is not drawn.
    assert browser.execute_script(graphs) == [6, 15, 16, 6]
    for width in (400, 800, 1280):
        browser.set_window_size(width, 900)
        overflow = browser.execute_async_script(
            "const done = arguments[0];"
            "setTimeout(() => done(document.documentElement.scrollWidth - window.innerWidth), 500);"
        )
        assert overflow <= 20, f"the page is wider than the window at {width} pixels"


def click(browser, name, row, column):
    """A real click on a cell; what is outlined afterwards, and the last line of text."""
    from selenium.webdriver.common.action_chains import ActionBuilder

    where = browser.execute_script(
        f"""
        const graph = document.querySelector('.plotly-graph-div');
        const trace = graph.data.find(trace => trace.name === '{name}');
        const x = graph._fullLayout[trace.xaxis.replace('x', 'xaxis')];
        const y = graph._fullLayout[trace.yaxis.replace('y', 'yaxis')];
        const box = graph.getBoundingClientRect();
        return [box.left + x._offset + x.d2p({column}), box.top + y._offset + y.d2p({row})];
        """
    )
    pointer = ActionBuilder(browser)
    pointer.pointer_action.move_to_location(round(where[0]) - 2, round(where[1]))
    pointer.pointer_action.move_to_location(round(where[0]), round(where[1]))
    pointer.pointer_action.pause(0.3)
    pointer.pointer_action.click()
    pointer.perform()
    return browser.execute_async_script(
        "const done = arguments[0]; setTimeout(() => { const layout = document.querySelector('.plotly-graph-div').layout;"
        "done([(layout.shapes || []).map(s => [s.xref, s.x0, s.y0]), layout.annotations.map(a => a.text)]); }, 400);"
    )


def test_a_click_outlines_what_a_node_is_fed_by(browser, heatmap):
    path, s, _ = heatmap
    open_page(browser, path)
    alignment = dfa.controls.random_w(A, B)
    products = alignment.contributions(s)
    shapes, notes = click(browser, "target heads", 7, 3)
    j = B.position("a7.h3")
    fed = [A.names[i] for i in products[:, j].abs().argsort(descending=True)[:5].tolist()]
    assert len(shapes) == 12  # six outlines, each on a white line
    assert shapes[0][1:] == [2.5, 6.5]
    assert notes[-1].startswith(f"<b>a7.h3</b> is fed by {fed[0]} ")
    assert all(name in notes[-1] for name in fed)
    # on the source: where a node's importance goes; a second click on it clears
    shapes, notes = click(browser, "source heads", 2, 6)
    goes = B.names[int(products[A.position("a2.h6")].abs().argmax())]
    assert len(shapes) == 12  # six outlines, each on a white line
    assert f"<b>a2.h6</b> goes to {goes} " in notes[-1]
    assert sum("is fed by" in note or "goes to" in note for note in notes) == 1
    shapes, notes = click(browser, "source heads", 2, 6)
    assert shapes == []
    assert not any("goes to" in note for note in notes)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_dropdown_changes_the_task(browser, tmp_path):
    alignment = dfa.controls.random_w(A, B)
    source = {name: dfa.controls.random_scores(A, seed=i) for i, name in enumerate(("one", "</script>two"))}
    target = {name: alignment.transfer(s) for name, s in source.items()}
    dfa.plots.aligned_heatmap(source, target, alignment=alignment).write_html(tmp_path / "tasks.html")
    open_page(browser, tmp_path / "tasks.html")
    shown = browser.execute_async_script(
        """
        const done = arguments[0];
        const graph = document.querySelector('.plotly-graph-div');
        const button = graph.layout.updatemenus[0].buttons[1];
        Plotly.update(graph, button.args[0], button.args[1], button.args[2]).then(() => {
          graph.emit('plotly_buttonclicked', {active: 1});
          const trace = graph.data.find(trace => trace.name === 'target heads');
          done([trace.customdata[4][5], trace.text[4][5], graph.layout.sliders[0].steps.length]);
        });
        """
    )
    assert shown[0] == pytest.approx(target["</script>two"]["a4.h5"], rel=1e-3)
    assert "a4.h5" in shown[1]
    _, notes = click(browser, "target heads", 4, 5)
    products = alignment.contributions(source["</script>two"])[:, B.position("a4.h5")]
    assert f"is fed by {A.names[int(products.abs().argmax())]} " in notes[-1]


def test_other_figures_open(browser, tmp_path):
    import pandas as pd

    history = [{"step": i, "loss": 1.0, "divergence": 1 / (i + 1), "mask_mean": 0.4} for i in range(9)]
    alignment = dfa.Alignment.of(dfa.controls.random_w(A, B).W, A, B, history=history)
    t = alignment.transfer(dfa.controls.random_scores(A))
    table = pd.DataFrame(
        {
            "task": ["x", "y"] * 4,
            "setting": ["a", "a", "b", "b"] * 2,
            "recovery": [0.1 * i for i in range(8)],
            "cpr": [0.1 * i for i in range(8)],
            "examples": [4] * 4 + [8] * 4,
            "train": ["x", "y"] * 4,
            "test": ["x", "x", "y", "y"] * 2,
        }
    )
    plots = dfa.plots
    for name, figure in {
        "explorer": plots.alignment_explorer(alignment),
        "history": plots.training_history(alignment),
        "scatter": plots.score_scatter(t, dfa.controls.random_scores(B)),
        "matrix": plots.transfer_matrix(table),
        "bars": plots.recovery_bars(table),
        "sizes": plots.size_sensitivity(table),
        "gold": plots.aligned_heatmap(
            dfa.controls.random_scores(A), t, alignment=alignment, gold=dfa.controls.random_scores(B)
        ),
    }.items():
        figure.write_html(tmp_path / f"{name}.html")
        open_page(browser, tmp_path / f"{name}.html")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with names that would be markup."""
    from dataclasses import replace

    from dfa_lens.experiments import demo

    budget = demo.Budget(train=8, test=6, steps=3, curve_points=4, batch_size=8)
    results = demo.run(families=["qwen2.5"], only=["mcqa"], budget=budget)
    results.tasks[0] = replace(results.tasks[0], task="<script>document.title = 'broken'</script>", family="a & b")
    folder = tmp_path_factory.mktemp("report")
    return dfa.plots.report(results, folder)


def test_labels_are_only_text(browser, page):
    open_page(browser, page)
    assert browser.title == "dfa_lens: circuit transfer"
    heading = browser.execute_script("return document.querySelector('section h2').textContent")
    assert heading == "a & b: <script>document.title = 'broken'</script>"
    links = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].map(a => document.querySelector(a.getAttribute('href')) !== null)"
    )
    assert all(links)


def test_light_and_dark(browser, page):
    from selenium.webdriver.common.by import By

    open_page(browser, page)
    colors = (
        "const graph = document.querySelector('.plotly-graph-div');"
        "return [getComputedStyle(document.body).backgroundColor, graph.layout.paper_bgcolor, graph.layout.font.color]"
    )
    assert browser.execute_script(colors) == ["rgb(255, 255, 255)", "white", "#222222"]
    browser.find_element(By.ID, "scheme").click()
    browser.execute_async_script("setTimeout(arguments[0], 600)")
    assert browser.execute_script(colors) == ["rgb(22, 24, 28)", "#16181c", "#e6e6e6"]
    browser.find_element(By.ID, "scheme").click()
    browser.execute_async_script("setTimeout(arguments[0], 600)")
    assert browser.execute_script(colors) == ["rgb(255, 255, 255)", "#ffffff", "#222222"]
    # a reader whose system is dark gets a dark page at once
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    open_page(browser, page)
    assert browser.execute_script(colors)[0] == "rgb(22, 24, 28)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_closed_part_opens(browser, page):
    from selenium.webdriver.common.by import By

    open_page(browser, page)
    summary = browser.find_element(By.CSS_SELECTOR, "details > summary")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", summary)
    summary.click()
    browser.execute_async_script("setTimeout(arguments[0], 600)")
    widths = browser.execute_script(
        "return [...document.querySelectorAll('details .main-svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert min(widths) > 500
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A report of made-up results: no model, the same on every machine."""
    import torch

    from dfa_lens.data.curve import FaithfulnessCurve
    from dfa_lens.experiments.table import Results, TaskResult

    def curve(level, seed):
        rng = np.random.default_rng(seed)
        fractions = np.linspace(0, 1, 11)
        f = np.minimum(1, level * fractions * 2)[:, None] + 0.05 * rng.standard_normal((11, 12))
        f[-1] = 1
        ones, zeros = np.ones(12), np.zeros(12)
        return FaithfulnessCurve(
            fractions, (fractions * 110).astype(int), f, ones, zeros, 1 - fractions, "nodes", "signed", 110
        )

    def scores(nodes, seed):
        return dfa.NodeScores(torch.sin(torch.arange(len(nodes)) * (1.3 + seed)) ** 3, nodes, {"method": "made up"})

    history = [{"step": i, "loss": 1.0, "divergence": 1 / (i + 1), "mask_mean": 0.4} for i in range(9)]
    W = torch.sin(torch.arange(len(A) * len(B), dtype=torch.float32)).reshape(len(A), len(B))
    alignment = dfa.Alignment.of(W, A, B, history=history)
    tasks = [
        TaskResult(
            "made up",
            task,
            scores(A, seed),
            scores(B, seed),
            {"zero-shot": alignment},
            {"zero-shot": alignment.transfer(scores(A, seed))},
            {"gold": curve(1.5, 1), "zero-shot": curve(1.0 + seed, 2), "random W": curve(0.2, 3)},
        )
        for seed, task in enumerate(("one", "two"))
    ]
    return dfa.plots.report(Results(tasks, {"command": "none"}), tmp_path_factory.mktemp("made-up"))


def hash_of(browser):
    return browser.execute_script("return Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")


SEEN = """
const section = document.querySelector('section:not([hidden])');
const graph = section.querySelector('figure[data-setting]:not([hidden]) .plotly-graph-div');
const slider = graph.layout.sliders[0];
const dimmed = graph.calcdata.map(each => each[0])
  .filter(({trace}) => trace.name.startsWith('target') && trace.name.endsWith('outside'));
return [section.querySelector('h2').textContent, slider.steps[slider.active].label.split(' ')[0],
  dimmed.flatMap(t => [...t.z].flatMap(row => [...row])).filter(value => value === 1).length];
"""


def test_the_address_says_what_is_shown(browser, made_up):
    """A task and a circuit can be passed on, and what is chosen in the page stands in its address."""
    from types import SimpleNamespace

    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    open_page(browser, SimpleNamespace(as_uri=lambda: made_up.as_uri() + "#task=two&size=20"))
    assert browser.execute_script(SEEN) == ["made up: two", "20", len(B) - 20]
    Select(browser.find_element(By.ID, "task")).select_by_visible_text("one")
    browser.execute_async_script("setTimeout(arguments[0], 1500)")
    heading, size, dimmed = browser.execute_script(SEEN)
    assert heading == "made up: one"
    assert int(size) == len(B) - dimmed  # preset to the smallest that is faithful
    assert hash_of(browser) == {"family": "made up", "task": "one"}
    browser.execute_script(
        "const graph = document.querySelector('section:not([hidden]) figure[data-setting] .plotly-graph-div');"
        "graph.emit('plotly_sliderchange', {step: graph.layout.sliders[0].steps[3]});"
    )
    assert hash_of(browser) == {"family": "made up", "task": "one", "size": "6"}
    browser.get("about:blank")


def test_plotly_learns_the_kinds_of_traces_that_are_drawn(browser, made_up):
    """Not all of them at once, which takes long; and those of other figures when they come."""
    open_page(browser, made_up)
    left, kinds = browser.execute_script(
        "return [Plotly.later.length, [...document.querySelectorAll('.plotly-graph-div')]"
        ".flatMap(graph => graph._fullData.map(trace => trace.type))]"
    )
    assert set(kinds) == {"bar", "heatmap", "scatter"}
    assert left > 40  # if not, plotly.js is written in another way, and report.py has to be told
    drawn = browser.execute_async_script(
        """
        const done = arguments[0];
        const place = document.createElement('figure');
        document.body.append(place);
        const sankey = {type: 'sankey', node: {label: ['a', 'b']}, link: {source: [0], target: [1], value: [1]}};
        const layout = {margin: {l: 0, r: 0, t: 0, b: 0}};
        draw(place, {data: [sankey], layout, reacts: []}).then(() => done(place.querySelectorAll('.sankey-node').length));
        """
    )
    assert drawn == 2
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("width", [400, 1280])
def test_a_heatmap_of_a_report_is_drawn_once(browser, made_up, width):
    """In its place and in the reader's colours at once: a large figure takes long to draw again."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    look(browser, made_up, width)
    browser.execute_script(
        """
        window.calls = [];
        for (const name of ['newPlot', 'react', 'relayout', 'restyle', 'update']) {
          const original = Plotly[name];
          Plotly[name] = (graph, ...given) => {
            if (graph.closest('figure[data-setting]')) { calls.push(name); }
            return original(graph, ...given);
          };
        }
        location.hash = 'family=made up&task=two';
        """
    )
    browser.execute_async_script(
        "const done = arguments[0];"
        "const wait = () => calls.length ? setTimeout(done, 1000) : setTimeout(wait, 50); wait();"
    )
    calls = browser.execute_script("return calls")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert calls == ["newPlot"]


def test_tables_sort_and_filter_and_hide_no_column(browser, made_up):
    from selenium.webdriver.common.by import By

    for width in (400, 800, 1400):
        look(browser, made_up, width)
        browser.execute_async_script(
            "document.querySelector('section:not([hidden]) details.nodes').open = true; setTimeout(arguments[0], 300)"
        )
        hidden = browser.execute_script(
            "return [...document.querySelectorAll('body > .table, section:not([hidden]) details[open] .table')]"
            ".flatMap(each => [...each.querySelectorAll('td, th')]).filter(e => e.offsetWidth"
            " && (e.getBoundingClientRect().right > window.innerWidth || e.scrollWidth > e.clientWidth + 1)).length"
        )
        assert hidden == 0
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    column = "return [...document.querySelectorAll('body > .table tbody tr')].filter(r => !r.hidden)"
    column += ".map(r => Number(r.cells[3].dataset.value))"
    button = browser.find_elements(By.CSS_SELECTOR, "body > .table th button")[3]
    button.click()
    assert browser.execute_script(column) == sorted(browser.execute_script(column))
    button.click()
    values = browser.execute_script(column)
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 3
    browser.find_element(By.CSS_SELECTOR, "body > .table input").send_keys("two")
    assert len(browser.execute_script(column)) == 1


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_no_words_of_a_report_overlap_or_are_cut_off(browser, made_up, width):
    look(browser, made_up, width)
    browser.execute_async_script("setTimeout(arguments[0], 600)")
    n, over, cut, fits = browser.execute_script(OVERLAPS)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert n > 60
    assert (over, cut, fits) == ([], [], True)


def test_words_and_buttons_in_the_dark(browser, made_up):
    """Every word of a figure has a contrast of at least 4.5 to what is behind it, WCAG's limit for text."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    open_page(browser, made_up)
    pairs = browser.execute_script(
        """
        const page = getComputedStyle(document.body).backgroundColor;
        const words = '.xtick text, .ytick text, .legendtext, .slider-label, .annotation-text, .cbaxis text, '
          + '[class^="g-"] text, .updatemenu-button text, .updatemenu-header text';
        const seen = e => e.textContent.trim() && getComputedStyle(e).fillOpacity !== '0';
        return [...document.querySelectorAll(words)].filter(seen).map(e => {
          const box = e.closest('.updatemenu-button, .updatemenu-header');
          return [e.textContent, getComputedStyle(e).fill, box ? getComputedStyle(box.querySelector('rect')).fill : page];
        });
        """
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def luminance(color):
        parts = np.array([int(part) / 255 for part in re.findall(r"\d+", color)[:3]])
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    assert len(pairs) > 60
    for word, ink, behind in pairs:
        dark, light = sorted((luminance(ink), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) > 4.5, f"{word}: {ink} on {behind}"


def test_a_report_of_twelve_tasks_stays_small(made_up):
    whole = made_up.stat().st_size
    plotly = len(re.search(r'id="plotly">([^<]+)<', made_up.read_text(encoding="utf-8")).group(1))
    assert plotly + (whole - plotly) / 2 * 12 < 5e6


def made_up_edges(*sizes):
    """Edge scores in which few are large, and some of those lie on a path."""
    import torch

    edges = dfa.EdgeSet(*sizes)
    values = torch.sin(torch.arange(edges.existing.numel()) * 1.7).reshape(edges.shape) ** 15
    values[0, : edges.n_heads] += 1
    values[edges.position("input->m1")] = values[edges.position("m1->logits")] = 1.5
    return dfa.EdgeScores(values, edges, {"method": "made up"})


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    scores = made_up_edges(4, 6, 3)
    path = tmp_path_factory.mktemp("edges") / "graph.html"
    figure = dfa.plots.circuit_graph(scores, size=60, most=120, title="title")
    figure.write_html(path)
    return path, scores, figure


def at(browser, name):
    """Where a node or reader of a graph stands, in pixels of the window."""
    return browser.execute_script(
        f"""
        const graph = document.querySelector('.plotly-graph-div');
        const trace = graph.data.find(trace => trace.visible && (trace.customdata || []).includes('{name}'));
        const i = trace.customdata.indexOf('{name}');
        const {{xaxis: x, yaxis: y}} = graph._fullLayout;
        const box = graph.getBoundingClientRect();
        return [box.left + x._offset + x.d2p(trace.x[i]), box.top + y._offset + y.d2p(trace.y[i])];
        """
    )


def press(browser, where, click=True):
    from selenium.webdriver.common.action_chains import ActionBuilder

    pointer = ActionBuilder(browser)
    pointer.pointer_action.move_to_location(round(where[0]) - 2, round(where[1]))
    pointer.pointer_action.move_to_location(round(where[0]), round(where[1]))
    pointer.pointer_action.pause(0.3)
    if click:
        pointer.pointer_action.click()
    pointer.perform()
    browser.execute_async_script("setTimeout(arguments[0], 500)")


SHOWN = """
const graph = document.querySelector('.plotly-graph-div');
const bright = graph.data.filter(t => (t.name || '').includes('->') && t.visible && (t.opacity ?? 1) > .5);
return [bright.map(t => t.name), (graph.layout.annotations || []).map(a => a.text)];
"""


def test_a_click_on_a_graph_follows_a_node(browser, graph):
    path, _, figure = graph
    open_page(browser, path)
    before, _ = browser.execute_script(SHOWN)
    assert set(before) == {t.name for t in figure.data if "->" in (t.name or "") and t.visible}
    press(browser, at(browser, "m1"))
    bright, notes = browser.execute_script(SHOWN)
    assert set(bright) == {name for name in before if name.startswith("m1->") or name.endswith("->m1")}
    pytest.importorskip("anywidget")
    from test_edge_plots import clicked

    widget = figure.widget()
    clicked(widget, "m1")
    assert notes == [widget.layout.annotations[0].text]
    press(browser, at(browser, "m1"))
    assert browser.execute_script(SHOWN) == [before, []]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_slider_of_a_graph(browser, graph):
    path, _, figure = graph
    open_page(browser, path)
    press(browser, at(browser, "m1"))
    slider = figure.layout.sliders[0]
    for number in (0, len(slider.steps) - 1):
        visible, _, traces = slider.steps[number].args
        browser.execute_async_script(
            f"""
            const done = arguments[0];
            const graph = document.querySelector('.plotly-graph-div');
            const step = graph.layout.sliders[0].steps[{number}];
            Plotly.update(graph, ...step.args).then(() => {{
              graph.emit('plotly_sliderchange', {{}});
              setTimeout(done, 400);
            }});
            """
        )
        on = {figure.data[i].name for i, shown in zip(traces, visible["visible"], strict=True) if shown}
        bright, _ = browser.execute_script(SHOWN)
        assert set(bright) == {name for name in on if "m1" in name.split("->")}


def test_hovering_an_edge_says_its_score(browser, graph):
    path, scores, figure = graph
    open_page(browser, path)
    best = next(t for t in figure.data if t.name == max(scores.top(1, ranking="absolute")))
    middle = len(best.x) // 2
    where = browser.execute_script(
        f"""
        const graph = document.querySelector('.plotly-graph-div');
        const {{xaxis: x, yaxis: y}} = graph._fullLayout;
        const box = graph.getBoundingClientRect();
        return [box.left + x._offset + x.d2p({best.x[middle]}), box.top + y._offset + y.d2p({best.y[middle]})];
        """
    )
    press(browser, where, click=False)
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.hoverlayer text')].map(e => e.textContent).join(' ')"
    )
    assert best.name in shown
    assert f"score {scores[best.name]:+.4g}"[:9] in shown.replace("−", "-")


#: How many words figures have; pairs of words, menus and bars that lie over each other; words that are cut off at the
#: edge of their figure; and whether the page is no wider than the window.
OVERLAPS = """
const words = '.scatterlayer text, .xtick text, .ytick text, .legendtext, .slider-label, .annotation-text, .cbaxis text, '
  + '[class^="g-"] text, .updatemenu-button, .updatemenu-header, .modebar-group';
const [over, cut] = [[], []];
let [n, bottom] = [0, -1e9];
for (const graph of document.querySelectorAll('.plotly-graph-div')) {
  const room = graph.getBoundingClientRect();
  if (room.top < bottom - 1) { over.push(['figure', 'figure', room.width, bottom - room.top]); }
  bottom = graph.querySelector('.main-svg').getBoundingClientRect().bottom;
  const boxes = [...graph.querySelectorAll(words)]
    .filter(e => e.matches('.modebar-group') || e.textContent.trim())
    .map(e => [e.textContent.trim() || 'bar', e.getBoundingClientRect()])
    .filter(([, p]) => p.width > 1);
  n += boxes.length;
  boxes.forEach(([a, p], i) => {
    if (p.left < room.left - 2 || p.right > room.right + 2 || p.top < room.top - 2 || p.bottom > room.bottom + 2) {
      cut.push(a);
    }
    boxes.slice(i + 1).forEach(([b, q]) => {
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 2 && high > 3) { over.push([a, b, Math.round(wide), Math.round(high)]); }
    });
  });
}
return [n, over, cut, document.documentElement.scrollWidth <= window.innerWidth];
"""


def look(browser, path, width):
    """Open a page in a window of some width, its figures drawn and fitted."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    open_page(browser, path)
    browser.execute_async_script("setTimeout(arguments[0], 600)")


def wordy(nodes):
    """What nodes do, in as many words as there can be."""
    from dataclasses import replace

    from dfa_lens.data.inspection import TokenLogit

    words = (" Constantinople", "ization", "国際連合総会決議録音版", " WWWWWWWWWWWW", " responsibilities")
    named = (tuple(TokenLogit(word, i, -12.345) for i, word in enumerate(words)),) * len(nodes)
    return replace(
        made_inspection(nodes), answer=" Constantinople", wrong=" responsibilities", promoted=named, suppressed=named
    )


@pytest.fixture(scope="module")
def all_figures(tmp_path_factory):
    """One page with every figure, long titles and many labels."""
    import pandas as pd
    import torch

    history = [{"step": i, "loss": 1.0, "divergence": 1 / (i + 1), "mask_mean": 0.4} for i in range(9)]
    W = torch.sin(torch.arange(len(A) * len(B), dtype=torch.float32)).reshape(len(A), len(B))
    alignment = dfa.Alignment.of(W, A, B, history=history)
    source = {task: dfa.controls.random_scores(A, seed=i) for i, task in enumerate(("one", "two"))}
    target = {task: alignment.transfer(s) for task, s in source.items()}
    gold = dfa.controls.random_scores(B)
    tasks, settings = ["ioi", "mcqa", "addition", "subtraction", "arc-easy", "arc-challenge"], ["gold", "zero-shot"]
    rows = [
        (task, setting, 0.4, 0.4, 4 + len(task)) for task in tasks for setting in (*settings, "uniform-s", "random-w")
    ]
    table = pd.DataFrame(rows, columns=["task", "setting", "cpr", "recovery", "examples"])
    cells = pd.DataFrame([(a, b, 0.1 * len(a)) for a in tasks for b in tasks], columns=["train", "test", "cpr"])
    curve = {
        name: made_curve(np.eye(3), np.ones(3), np.zeros(3), [0, 60, 110], 110) for name in (*settings, "random-w")
    }
    title = "A title that says at some length what is seen in the figure below"
    plots = dfa.plots
    figures = [
        plots.aligned_heatmap(source["one"], target["one"], alignment=alignment, curve=curve["gold"], title=title),
        plots.aligned_heatmap(source, target, alignment=alignment, gold=dict.fromkeys(source, gold), title=title),
        plots.scores_heatmap(gold, title="gold"),
        plots.curves(
            curve, title=f"{title}, and goes on for so long that a narrow window needs four lines for it, or five"
        ),
        plots.alignment_explorer(alignment, title=title),
        plots.recovery_bars(table, title=title),
        plots.recovery_bars(pd.concat([table.assign(family=name) for name in ("llama3", "qwen2.5")]), title=title),
        plots.transfer_matrix(cells, title=title),
        plots.circuit_overlap({name: gold.circuit(9 + len(name), name=name) for name in tasks}, title=title),
        plots.training_history({"zero-shot": alignment, "uniform-s": alignment, "one-task": alignment}, title=title),
        plots.size_sensitivity(table, title=title),
        plots.score_scatter(gold, target["one"], title=title),
        plots.node_graph(gold.circuit(40), scores=gold, inspection=wordy(B), title=title),
        plots.node_graph(gold.circuit(40), edges=made_up_edges(10, 10, 5), title=title),
        plots.edge_heatmap(made_up_edges(4, 6, 3), title=title),
        plots.circuit_comparison({name: gold.circuit(9 + len(name)) for name in tasks[:2]}, title=title),
        plots.circuit_comparison({"source": source["one"].circuit(20), "target": gold.circuit(40)}, title=title),
        plots.token_heatmap(dfa.controls.random_scores(A.at_spans([f"{i} word{i}" for i in range(30)])), title=title),
    ]
    path = tmp_path_factory.mktemp("all") / "all.html"
    parts = [each.to_html(full_html=False, include_plotlyjs=i == 0) for i, each in enumerate(figures)]
    path.write_text(f"<!DOCTYPE html><html><body>{''.join(parts)}</body></html>", encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_no_words_of_a_figure_overlap_or_are_cut_off(browser, all_figures, width):
    look(browser, all_figures, width)
    browser.execute_async_script("setTimeout(arguments[0], 1000)")
    n, over, cut, fits = browser.execute_script(OVERLAPS)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert n > 200
    assert over == []
    assert cut == []
    assert fits


def test_words_beside_a_graph_fit(browser, tmp_path):
    """Also where no script fits them: in images and notebooks, as wide as plotly makes a figure by default, and on
    paper. In a page, where graph and pattern just stand side by side."""
    import plotly.graph_objects as go

    circuit = dfa.Circuit(B.names[:40], B)
    made = [
        dfa.plots.node_graph(circuit, inspection=wordy(B)),
        dfa.plots.node_graph(circuit, inspection=wordy(B), width=1000),
        dfa.plots.node_graph(circuit, inspection=wordy(B), style="paper"),
    ]
    parts = [
        go.Figure(each).to_html(full_html=False, include_plotlyjs=i == 0, default_width="700px")
        for i, each in enumerate(made)
    ]
    (tmp_path / "still.html").write_text(f"<!DOCTYPE html><html><body>{''.join(parts)}</body></html>", encoding="utf-8")
    made[0].write_html(tmp_path / "page.html")
    for name, width, least in (("still", 1400, 200), ("page", 920, 60)):
        look(browser, tmp_path / f"{name}.html", width)
        n, over, cut, _ = browser.execute_script(OVERLAPS)
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert n > least
        assert (over, cut) == ([], [])


def test_the_line_of_a_click_is_not_cut_off(browser, tmp_path):
    """In a narrow window it is several lines."""
    scores, alignment = dfa.controls.random_scores(A), dfa.controls.random_w(A, B)
    edges = made_up_edges(4, 6, 3)
    title = "A title that says at some length what is seen in the figure below"
    figures = {
        "heatmap": dfa.plots.aligned_heatmap(scores, alignment.transfer(scores), alignment=alignment, title=title),
        "scores": dfa.plots.circuit_graph(edges, size=200, most=300, title=title),
        "circuit": dfa.plots.circuit_graph(edges.circuit(150, ranking="absolute"), title=title),
    }
    for name, figure in figures.items():
        figure.write_html(tmp_path / f"{name}.html")
        look(browser, tmp_path / f"{name}.html", 400)
        browser.execute_async_script(
            """
            const graph = document.querySelector('.plotly-graph-div');
            const at = graph.data.findIndex(trace => trace.name === 'target heads');
            const point = at < 0 ? {customdata: 'm1'} : {curveNumber: at, pointIndex: [4, 5]};
            graph.emit('plotly_click', {points: [point]});
            setTimeout(arguments[0], 500);
            """
        )
        note = browser.execute_script(
            "const note = document.querySelector('.plotly-graph-div').layout.annotations"
            ".find(each => each.name === 'what was clicked'); return note && note.text"
        )
        assert "<br>" in note
        n, *found = browser.execute_script(OVERLAPS)
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert n > 20
        assert found == [[], [], True], name


@pytest.mark.parametrize("width", [400, 800, 1400])
@pytest.mark.parametrize("sizes", [(4, 6, 3), (4, 12)], ids=["six heads", "twelve heads"])
def test_labels_of_a_graph_do_not_overlap(browser, tmp_path, width, sizes):
    scores = made_up_edges(*sizes)
    dfa.plots.circuit_graph(scores, size=200, title="title").write_html(tmp_path / "graph.html")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    open_page(browser, tmp_path / "graph.html")
    browser.execute_async_script("setTimeout(arguments[0], 600)")
    overlaps = browser.execute_script(OVERLAPS)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert overlaps[0] > 10
    assert overlaps[1:] == [[], [], True]


def test_a_click_on_a_node_shows_what_it_does(browser, tmp_path):
    found = made_inspection(A)
    dfa.plots.node_graph(dfa.Circuit(["a0.h1", "m3"], A), inspection=found).write_html(tmp_path / "nodes.html")
    open_page(browser, tmp_path / "nodes.html")
    where = """
    const graph = document.querySelector('.plotly-graph-div');
    const {xaxis: x, yaxis: y} = graph._fullLayout;
    const box = graph.getBoundingClientRect();
    return [box.left + x._offset + x.d2p(arguments[0]), box.top + y._offset + y.d2p(arguments[1])];
    """
    shown = """
    const graph = document.querySelector('.plotly-graph-div');
    const z = graph.data.find(trace => trace.name === 'pattern').z.map(row => [...row]);
    return [graph.layout.annotations[0].text, z, graph.layout.xaxis2.visible];
    """
    n = len(found.tokens)
    for name, x, y in (("a4.h2", 2, 4), ("m3", 8.3, 3)):  # outside of the circuit, and in it
        press(browser, browser.execute_script(where, x, y))
        words, z, visible = browser.execute_script(shown)
        i = A.position(name)
        assert words.startswith(f"<b>{name}</b><br>direct effect on logit(␣Mary) −")
        assert f"{float(found.direct[i]):+.3f}" in words
        assert visible == (name == "a4.h2")
        for q in range(n):
            for k in range(n):
                expected = float(found.pattern(name)[q, k]) if k <= q and visible else None
                assert z[q][k] == (None if expected is None else pytest.approx(expected, abs=0.0101))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_click_on_a_block_shows_its_edges(browser, tmp_path):
    scores = made_up_edges(4, 6, 3)
    figure = dfa.plots.edge_heatmap(scores)
    figure.write_html(tmp_path / "blocks.html")
    open_page(browser, tmp_path / "blocks.html")
    row, column = figure.data[0].y.index("a1"), figure.data[0].x.index("a3&lt;v&gt;")
    where = browser.execute_script(
        f"""
        const graph = document.querySelector('.plotly-graph-div');
        const {{xaxis: x, yaxis: y}} = graph._fullLayout;
        const box = graph.getBoundingClientRect();
        return [box.left + x._offset + x.d2p({column}), box.top + y._offset + y.d2p({row})];
        """
    )
    press(browser, where)
    title, z = browser.execute_script(
        "const {layout, data} = document.querySelector('.plotly-graph-div');"
        "return [layout.annotations[1].text, data[1].z]"
    )
    assert title == "edges from a1 to a3&lt;v&gt;"
    assert z[2][1] == pytest.approx(scores["a1.h2->a3.kv1<v>"], rel=1e-3)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_edges_in_the_dark(browser, tmp_path):
    """Words outside nodes are as light as the page is dark, those on nodes stay dark."""
    page = dfa.plots.report(made_up_edges(4, 6, 3), tmp_path)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    open_page(browser, page)
    colors = browser.execute_script(
        """
        const texts = [...document.querySelectorAll('.scatterlayer text, .slider-label')];
        const of = word => getComputedStyle(texts.find(e => e.textContent.startsWith(word))).fill;
        return [of('logits'), of('edges:'), of('m1')];
        """
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colors == ["rgb(230, 230, 230)", "rgb(230, 230, 230)", "rgb(34, 34, 34)"]


@pytest.fixture(scope="module")
def edge_page(tmp_path_factory):
    return dfa.plots.report({"made up": made_up_edges(4, 6, 3)}, tmp_path_factory.mktemp("edge-page"))


@pytest.mark.parametrize("page_name", ["report", "edges"])
@pytest.mark.parametrize("width", [400, 800, 1280])
def test_the_report_looks_as_it_did(browser, made_up, edge_page, page_name, width):
    """Compared in rough: shrunk to 64 pixels of width, so that fonts do not matter and layout and colours do.

    ``UPDATE_SCREENSHOTS=FOLDER pytest tests/test_browser.py`` stores new ones, and in FOLDER (another one) the whole ones to look at.
    """
    import io
    import os
    from pathlib import Path

    image = pytest.importorskip("PIL.Image")
    browser.set_window_size(width, 900)
    open_page(browser, {"report": made_up, "edges": edge_page}[page_name])
    browser.execute_async_script(
        "const done = arguments[0];"
        "document.querySelectorAll('section:not([hidden]) details:not(.nodes)').forEach(part => { part.open = true; });"
        "const missing = () => [...document.querySelectorAll('section:not([hidden]) details figure')]"
        ".some(each => !each.querySelector('.main-svg'));"
        "const wait = () => missing() ? setTimeout(wait, 50) : setTimeout(done, 1200); wait();"
    )
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.execute_async_script("setTimeout(arguments[0], 1500)")
    shot = image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.set_window_size(1280, 900)
    small = shot.resize((64, round(64 * shot.height / shot.width)), image.Resampling.BOX)
    stored = Path(__file__).parent / "screenshots" / f"{page_name}-{width}.png"
    if os.environ.get("UPDATE_SCREENSHOTS"):
        stored.parent.mkdir(exist_ok=True)
        small.save(stored)
        shot.save(Path(os.environ["UPDATE_SCREENSHOTS"]) / f"{page_name}-{width}.png")
    before = image.open(stored).convert("RGB")
    assert abs(before.height - small.height) <= 0.05 * before.height, "the page has another height"
    gap = np.abs(np.asarray(before, dtype=float) - np.asarray(small.resize(before.size), dtype=float)).mean()
    assert gap < 8, f"the page looks different by {gap:.1f} of 255"
