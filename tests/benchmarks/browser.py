"""How fluid figures are in a headless Chromium: a large heatmap, Llama-3.2-1B to Llama-3.1-8B sizes (528 and 1056 nodes),
and a report.

    python tests/benchmarks/browser.py [report/index.html]

Prints the size of the file, the time from loading to the first drawn cell (in a fresh browser most of it is the
compilation of plotly.js), and the median and the longest of 20 slider
steps, each until the browser has painted.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from selenium import webdriver

import dfa_lens as dfa

FIRST = """
const done = arguments[0];
const look = () => {
  const image = document.querySelector('.plotly-graph-div .heatmaplayer image');
  if (image) { requestAnimationFrame(() => done(performance.now())); } else { requestAnimationFrame(look); }
};
look();
"""
STEPS = """
const done = arguments[0];
const graph = document.querySelector('.plotly-graph-div');
const steps = graph.layout.sliders[0].steps;
(async () => {
  const times = [];
  for (let i = 0; i < 20; i++) {
    const step = steps[(i * 7) % steps.length];
    const start = performance.now();
    await Plotly.restyle(graph, step.args[0], step.args[1]);
    await new Promise(resolve => requestAnimationFrame(() => setTimeout(resolve, 0)));
    times.push(performance.now() - start);
  }
  done(times);
})();
"""


def main() -> None:
    source, target = dfa.NodeSet.for_sizes(16, 32), dfa.NodeSet.for_sizes(32, 32)
    alignment = dfa.controls.random_w(source, target)
    scores = dfa.controls.random_scores(source)
    figure = dfa.plots.aligned_heatmap(scores, alignment.transfer(scores), alignment=alignment)
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    driver = webdriver.ChromeService(shutil.which("chromedriver"))
    with tempfile.TemporaryDirectory() as folder, webdriver.Chrome(options=options, service=driver) as browser:
        path = Path(folder) / "heatmap.html"
        figure.write_html(path)
        browser.get(path.as_uri())
        first = browser.execute_async_script(FIRST)
        times = browser.execute_async_script(STEPS)
        browser.get(path.as_uri())  # the browser now knows plotly.js, most of the first time
        again = browser.execute_async_script(FIRST)
        print(f"{len(source)} → {len(target)} nodes, {path.stat().st_size / 1e6:.2f} MB")
        print(
            f"first cell drawn {first:.0f} ms after loading began in a fresh browser, {again:.0f} ms on loading again"
        )
        for page in sys.argv[1:]:
            browser.get("about:blank")
            browser.get(Path(page).resolve().as_uri())
            first = browser.execute_async_script(FIRST)
            browser.get(Path(page).resolve().as_uri())
            again = browser.execute_async_script(FIRST)
            print(f"{page}: {Path(page).stat().st_size / 1e6:.2f} MB, first cell {first:.0f} ms, again {again:.0f} ms")
        print(f"slider step: median {statistics.median(times):.0f} ms, longest {max(times):.0f} ms")


if __name__ == "__main__":
    main()
