"""Run the notebooks in demos/ and keep their outputs, figures as static pictures.

    python tools/notebooks.py [demos/01_transfer_a_circuit.ipynb …]

Needs kaleido and a Chromium for the pictures. Prints how long each took.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

DEMOS = Path(__file__).resolve().parents[1] / "demos"

#: Run in the kernel before the notebook: a picture can't be slid or clicked, so it has no controls, which would only
#: lie over words; and figures that fill their window are drawn as wide as in a browser.
STILL = """
import plotly.io
from plotly.io.base_renderers import PngRenderer


class Still(PngRenderer):
    def to_mimebundle(self, fig_dict):
        layout = fig_dict["layout"]
        layout.pop("updatemenus", None)
        if layout.pop("sliders", None):
            layout.setdefault("margin", {})["b"] = 60
        layout.setdefault("width", 900)
        return super().to_mimebundle(fig_dict)


plotly.io.renderers["still"] = Still()
plotly.io.renderers.default = "still"
del Still, PngRenderer, plotly
"""

#: Of a warning: where on this machine it arose, what it says, and the line of code.
WHERE = re.compile(r"/[\w./-]*/(?:dfa_lens/[\w./]*|ipykernel_\d+/\d+\.py):\d+: (.*)\n  .*\n")


def run(path: Path) -> float:
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STILL))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    del notebook.cells[0]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "text" in output:
                output.text = WHERE.sub(r"\1\n", output.text)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)
    return time.perf_counter() - start


def main() -> None:
    for path in [Path(name) for name in sys.argv[1:]] or sorted(DEMOS.glob("*.ipynb")):
        print(f"{path.name}: {run(path):.0f} s", flush=True)


if __name__ == "__main__":
    main()
