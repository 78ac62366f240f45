"""The figures in a real browser: they open offline, without errors, and hover and slider do what they say."""

import json
import shutil

import pytest

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
        "const done = arguments[0]; const wait = () => document.querySelector('.plotly-graph-div .main-svg') "
        "? setTimeout(done, 300) : setTimeout(wait, 50); wait();"
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
    from dfa_lens import demo
    from dfa_lens.plots import report

    size = demo.Size(train=8, test=4, steps=2, curve_points=4, batch_size=8)
    results = demo.run(families=["llama3"], only=["addition"], size=size)
    open_page(browser, report(results, tmp_path))
    graphs = "return [...document.querySelectorAll('.plotly-graph-div')].map(g => g.data.length)"
    # curves (floor, and line and band for each of four settings), two aligned heatmaps, gold
    assert browser.execute_script(graphs) == [9, 8, 8, 4]
    for width in (400, 800, 1280):
        browser.set_window_size(width, 900)
        overflow = browser.execute_async_script(
            "const done = arguments[0];"
            "setTimeout(() => done(document.documentElement.scrollWidth - window.innerWidth), 500);"
        )
        assert overflow <= 20, f"the page is wider than the window at {width} pixels"
