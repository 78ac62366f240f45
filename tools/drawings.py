"""Draw the pictures of docs/concepts.md as SVG into docs/images: ``make drawings``, which also draws the imports."""

from __future__ import annotations

import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#999999", "#0072B2", "#D55E00", "#009E73"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


class Drawing:
    """A few shapes and an SVG file."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height, self.parts = width, height, list[str]()

    def line(
        self, *points: tuple[float, float], color: str = INK, width: float = 1.5, dash: str = "", arrow: bool = False
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        extra = (f' stroke-dasharray="{dash}"' if dash else "") + (' marker-end="url(#arrow)"' if arrow else "")
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{extra}/>')

    def box(
        self, x: float, y: float, w: float, h: float, text: str = "", *, fill: str = "#f2f6fa", color: str = INK
    ) -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="{color}"/>')
        if text:
            self.text(x + w / 2, y + h / 2 + 4.5, text, anchor="middle")

    def area(self, points: list[tuple[float, float]], fill: str) -> None:
        self.parts.append(f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="{fill}"/>')

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", color: str = INK, size: int = 13) -> None:
        safe = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}" font-size="{size}">{safe}</text>'
        )

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'font-family="{FONT}"><defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555555"/></marker></defs>'
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        )
        return head + "\n".join(self.parts) + "</svg>\n"


def nodes() -> Drawing:
    d = Drawing(720, 230)
    d.text(20, 30, "residual stream")
    d.line((20, 120), (700, 120), color=BLUE, width=5)
    for layer, x in enumerate((110, 410)):
        d.text(x + 105, 218, f"layer {layer}", anchor="middle", color=GREY)
        for head in range(3):
            y = 44 + head * 22
            d.box(x, y, 74, 19, f"a{layer}.h{head}")
        d.line((x - 22, 118), (x - 22, 76), (x - 3, 76), color="#555555", arrow=True)
        d.line((x + 76, 76), (x + 98, 76), (x + 98, 116), color="#555555", arrow=True)
        d.box(x + 140, 150, 74, 30, f"m{layer}", fill="#fdf1e8")
        d.line((x + 118, 122), (x + 118, 165), (x + 137, 165), color="#555555", arrow=True)
        d.line((x + 216, 165), (x + 236, 165), (x + 236, 124), color="#555555", arrow=True)
    d.text(20, 145, "embedding", color=GREY)
    d.text(700, 145, "logits", anchor="end", color=GREY)
    return d


def patching() -> Drawing:
    d = Drawing(720, 250)
    for y, color, name, prompt, answer in (
        (40, BLUE, "clean", "Eva and Max …, Max gave a book to", "Eva → ?"),
        (160, ORANGE, "corrupt", "Eva and Max …, Eva gave a book to", "Max"),
    ):
        d.text(20, y - 12, f"{name}: {prompt}", color=color)
        d.line((20, y + 30), (600, y + 30), color=color, width=4)
        for i, x in enumerate((90, 230, 370, 510)):
            patched = i == 2
            d.box(x, y + 10, 70, 40, "a5.h3" if patched else "", fill="#fde3d3" if patched else "#f2f6fa", color=color)
        d.text(612, y + 35, answer)
    d.line((405, 168), (405, 94), color=ORANGE, width=2.5, arrow=True)
    d.text(420, 136, "this activation alone", color=ORANGE)
    return d


def attribution() -> Drawing:
    d = Drawing(720, 290)
    x0, x1, y0, y1 = 80, 640, 240, 40
    d.line((x0, y0 + 10), (x0, y1 - 10))
    d.line((x0, y0 + 10), (x1 + 30, y0 + 10))
    d.text(x0 - 10, y1 - 18, "metric")
    d.text(x0, y0 + 32, "corrupt", anchor="middle", color=ORANGE)
    d.text(x1, y0 + 32, "clean", anchor="middle", color=BLUE)

    def curve(t: float) -> float:
        return 1 / (1 + math.exp(-9 * (t - 0.4)))

    def at(t: float, value: float) -> tuple[float, float]:
        return x0 + t * (x1 - x0), y0 - value * (y0 - y1)

    d.line(*(at(i / 60, curve(i / 60)) for i in range(61)), width=2.5)
    slope = 9 * curve(1) * (1 - curve(1))
    d.line(at(0, curve(1) - slope), at(1, curve(1)), color=BLUE, dash="6 4", width=2)
    d.text(*at(0.02, curve(1) - slope + 0.05), "slope at the clean end (nap): hardly any effect", color=BLUE)
    d.line(at(0, curve(0)), at(1, curve(1)), color=GREEN, dash="6 4", width=2)
    d.text(*at(0.5, 0.36), "the average slope (integrated): the true change", color=GREEN)
    for k in range(1, 6):
        x, y = at(k / 5, curve(k / 5))
        d.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{GREEN}"/>')
    return d


def faithfulness() -> Drawing:
    d = Drawing(720, 290)
    x0, x1, y0, y1 = 80, 640, 240, 50

    def at(t: float, value: float) -> tuple[float, float]:
        return x0 + t * (x1 - x0), y0 - value * (y0 - y1)

    good = [(i / 60, 1 - math.exp(-7 * i / 60) * (1 - i / 60)) for i in range(61)]
    poor = [(i / 60, (i / 60) ** 3) for i in range(61)]
    d.area([at(0, 0), *(at(*point) for point in good), at(1, 0)], "#dcebf7")
    d.area([at(0, 1), *(at(*point) for point in good), at(1, 1)], "#fde3d3")
    d.line(at(0, 1), at(1, 1), color=GREY, dash="4 4")
    d.line(*(at(*point) for point in good), color=BLUE, width=2.5)
    d.line(*(at(*point) for point in poor), color=GREY, width=2)
    d.line((x0, y0), (x0, y1 - 20))
    d.line((x0, y0), (x1 + 20, y0))
    d.text(x0 - 14, y1 + 5, "1", anchor="end")
    d.text(x0 - 14, y0 + 5, "0", anchor="end")
    d.text(x0 + 10, y1 - 22, "faithfulness f")
    d.text(x1 + 10, y0 + 24, "kept fraction of the nodes", anchor="end")
    d.text(*at(0.35, 0.3), "CPR: area under the curve", color=BLUE)
    d.text(*at(0.012, 0.9), "CMD", color=ORANGE)
    d.text(*at(0.72, 0.2), "a random circuit", color=GREY)
    return d


def transfer() -> Drawing:
    d = Drawing(720, 240)
    heights = (0.2, 0.9, 0.1, 0.5, 0.3)
    for i, value in enumerate(heights):
        d.box(40 + i * 26, 130 - 80 * value, 20, 80 * value, fill="#9ecae1", color=BLUE)
    d.text(105, 160, "s: scores on the source", anchor="middle")
    d.text(105, 180, "(attribution)", anchor="middle", color=GREY)
    d.line((190, 90), (236, 90), color="#555555", arrow=True)
    for i in range(5):
        for j in range(8):
            strength = (i * 7 + j * 5) % 11 / 11
            shade = 255 - int(130 * strength)
            d.parts.append(
                f'<rect x="{245 + j * 18}" y="{45 + i * 18}" width="17" height="17" fill="rgb({shade},{shade},255)"/>'
            )
    d.text(317, 160, "W (learned)", anchor="middle")
    d.line((400, 90), (440, 90), color="#555555", arrow=True)
    for j in range(8):
        value = 0.15 + 0.8 * ((j * 5) % 8) / 8
        d.box(450 + j * 30, 50, 22, 80, fill="white", color=GREEN)
        d.box(450 + j * 30, 130 - 80 * value, 22, 80 * value, fill="#b7e0d2", color=GREEN)
    d.text(566, 160, "sigmoid(s·W): how far each target node is open", anchor="middle")
    d.text(566, 180, "the rest of it comes from the corrupt run", anchor="middle", color=GREY)
    d.text(360, 224, "trained so that the target answers as on the clean prompt, with few nodes open", anchor="middle")
    return d


def edges() -> Drawing:
    d = Drawing(720, 290)
    red, blue = "#b2182b", "#2166ac"
    d.text(20, 26, "edges into one group of heads")
    for x, name, fill in ((20, "input", "#fdf1e8"), (110, "a0.h1", "#f2f6fa"), (200, "m0", "#fdf1e8")):
        d.box(x, 236, 66, 28, name, fill=fill)
    ports = {"q": (53, 118), "k": (113, 150), "v": (173, 150), "q ": (233, 118)}
    for x, name in ((20, "a1.h0"), (200, "a1.h1")):
        d.box(x, 56, 66, 28, name)
    for start, port, color in (
        (53, "q", "#999999"),
        (53, "k", "#999999"),
        (143, "v", red),
        (233, "v", red),
        (233, "q ", blue),
    ):
        x, y = ports[port]
        d.line((start, 235), (x, y + 13), color=color, width=2.5 if color != "#999999" else 1.5)
    for name, (x, y) in ports.items():
        for head in {"q": (53,), "q ": (233,)}.get(name, (53, 233)):
            d.line((x, y - 11), (head, 86), color="#bbbbbb", width=1)
    for name, (x, y) in ports.items():
        d.parts.append(f'<circle cx="{x}" cy="{y}" r="11" fill="white" stroke="{GREY}"/>')
        d.text(x, y + 4.5, name.strip(), anchor="middle")
    d.text(286, 76, "heads", color=GREY)
    d.text(286, 122, "readers: q of each head,", color=GREY)
    d.text(286, 140, "k and v of a group", color=GREY)
    d.text(286, 255, "writers", color=GREY)
    d.text(480, 26, "what a node score hides")
    d.box(545, 236, 66, 28, "a1.h7")
    d.line((569, 235), (530, 74), color=red, width=4, arrow=True)
    d.line((587, 235), (640, 74), color=blue, width=4, arrow=True)
    d.box(490, 42, 66, 28, "logits", fill="#fdf1e8")
    d.box(610, 42, 66, 28, "MLPs", fill="#fdf1e8")
    d.text(538, 160, "+2.3", anchor="end", color=red)
    d.text(626, 160, "−2.3", color=blue)
    d.text(578, 284, "node score: 0", anchor="middle")
    return d


DRAWINGS = {
    "concept-nodes": nodes,
    "concept-patching": patching,
    "concept-attribution": attribution,
    "concept-faithfulness": faithfulness,
    "concept-transfer": transfer,
    "concept-edges": edges,
}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
