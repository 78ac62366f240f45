"""How fluid figures are in a headless Chromium: a large heatmap, Llama-3.2-1B to Llama-3.1-8B sizes (528 and 1056 nodes),
and reports.

    dfa-lens demo --quick --out report
    python tests/benchmarks/browser.py report/index.html [--repeats 5]

Of every page: its size, and what it takes from the request to the first cell of a heatmap that is painted, in a fresh
browser (most of it is plotly.js, compiled and run for the first time) and when it is loaded again. Seconds of CPU are
those of the renderer's main thread, which one waits for, and in brackets of all its threads (start of the process, garbage
collection and painting beside it); seconds on the clock depend on what else the machine does. Of the heatmap also the
median and the longest of 20 slider steps, each until the browser has painted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException

import dfa_lens as dfa

#: In every page: when the first cell is painted, an alert, behind which nothing is computed until it is answered.
STOP = """
const look = () => {
  if (document.querySelector('.plotly-graph-div .heatmaplayer image')) {
    requestAnimationFrame(() => setTimeout(() => alert(performance.now())));
  } else { requestAnimationFrame(look); }
};
if (location.protocol === 'file:') { look(); }
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
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def chromium() -> Iterator[Any]:
    """A fresh browser."""
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or ""
    options.unhandled_prompt_behavior = "ignore"
    driver = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=driver) as browser:
        browser.service_pid = driver.process.pid
        browser.execute_cdp_cmd("Page.enable", {})
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": STOP})
        yield browser


def spent(stat: Path) -> float:
    """CPU seconds so far of a process or thread."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def renderers(root: int) -> dict[int, tuple[float, float]]:
    """CPU seconds so far of every renderer below a process: of its main thread, of all its threads."""
    parents, found = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if "--type=renderer" in (entry / "cmdline").read_text():
                    found[int(entry.name)] = spent(entry / "task" / entry.name / "stat"), spent(entry / "stat")
            except OSError:  # it has ended
                continue

    def below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return {pid: each for pid, each in found.items() if below(pid)}


def first_cell(browser: Any, page: Path) -> tuple[float, float, float]:
    """Seconds of CPU (main thread, all threads), and on the clock, until the first cell of a heatmap is painted."""
    time.sleep(2)  # the browser's own start is over
    before = renderers(browser.service_pid)
    browser.execute_cdp_cmd("Page.navigate", {"url": page.resolve().as_uri()})
    while True:
        try:
            alert = browser.switch_to.alert
            break
        except NoAlertPresentException:
            time.sleep(0.02)
    after = renderers(browser.service_pid)
    clock = float(alert.text) / 1000
    alert.accept()
    browser.execute_async_script("setTimeout(arguments[0], 3000)")  # whatever else it draws
    main, every = (sum(new[i] - before.get(pid, (0, 0))[i] for pid, new in after.items()) for i in (0, 1))
    return main, every, clock


def main() -> None:
    reader = argparse.ArgumentParser()
    reader.add_argument("page", nargs="*", type=Path, help="reports")
    reader.add_argument("--repeats", type=int, default=3, help="fresh browsers")
    given = reader.parse_args()
    source, target = dfa.NodeSet.for_sizes(16, 32), dfa.NodeSet.for_sizes(32, 32)
    alignment = dfa.controls.random_w(source, target)
    scores = dfa.controls.random_scores(source)
    figure = dfa.plots.aligned_heatmap(scores, alignment.transfer(scores), alignment=alignment)
    with tempfile.TemporaryDirectory() as folder:
        heatmap = Path(folder) / "heatmap.html"
        figure.write_html(heatmap)
        steps = []
        for page in (heatmap, *given.page):
            first, again = [], []
            for _ in range(given.repeats):
                with chromium() as browser:
                    first.append(first_cell(browser, page))
                    again.append(first_cell(browser, page))
                    if page == heatmap:
                        steps += browser.execute_async_script(STEPS)
            name = f"heatmap of {len(source)} and {len(target)} nodes" if page == heatmap else page
            print(f"{name}: {page.stat().st_size / 1e6:.2f} MB; until the first cell")
            for what, times in (("in a fresh browser", first), ("loaded again", again)):
                main, every, clock = zip(*times, strict=True)
                print(
                    f"  {what}: {statistics.median(main):.2f} s of CPU, {min(main):.2f} to {max(main):.2f} "
                    f"({statistics.median(every):.2f}); {statistics.median(clock):.2f} s on the clock"
                )
    print(f"slider step of the heatmap: median {statistics.median(steps):.0f} ms, longest {max(steps):.0f} ms")


if __name__ == "__main__":
    main()
