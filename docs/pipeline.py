"""Draw docs/pipeline.svg, the way of a graph through sloth:  python docs/pipeline.py"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sloth", "font.family": "sans-serif"})
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

OTHERS, OURS, REPORT = "#e8e8e8", "#cfe8d5", "#fdeec4"
WIDTH, HEIGHT = 2.3, 1.0
# name: (left, bottom, colour, first line, second line)
BOXES = {
    "call": (0.0, 4.0, OTHERS, "model call", "forward and loss"),
    "dynamo": (3.0, 4.0, OTHERS, "Dynamo graph", "FX, with bodies"),
    "rewrite": (9.0, 4.0, OURS, "rewrite", "the original graph"),
    "inductor": (12.0, 4.0, OTHERS, "Inductor", "or another backend"),
    "shadow": (0.0, 1.9, OURS, "shadow", "ATen in normal form"),
    "match": (3.0, 1.9, OURS, "match", "two looks"),
    "legality": (6.0, 1.9, OURS, "legality", "or a refusal"),
    "choice": (9.0, 1.9, OURS, "choice", "largest, no overlap"),
}
# from, to: along a row
ARROWS = [("call", "dynamo"), ("dynamo", "rewrite"), ("rewrite", "inductor")]
ARROWS += [("shadow", "match"), ("match", "legality"), ("legality", "choice")]


def main() -> None:
    figure, axes = pyplot.subplots(figsize=(11, 4.4), layout="constrained")
    axes.set(xlim=(-0.2, 14.5), ylim=(-0.2, 5.2))
    axes.axis("off")
    for left, bottom, colour, title, below in BOXES.values():
        box(axes, left, bottom, WIDTH, colour, title, below)
    box(axes, 3.0, 0.0, 8.3, REPORT, "report", "matched / expected, source lines, the first difference of each miss, seconds")
    for start, end in ARROWS:
        (x, y, *_), (to, *_) = BOXES[start], BOXES[end]
        arrow(axes, (x + WIDTH, y + HEIGHT / 2), (to, y + HEIGHT / 2))
    axes.text(7.15, 4.62, "edited only where matches were accepted", ha="center", fontsize=8)
    axes.text(7.15, 4.2, "on any error: as it was", ha="center", fontsize=8)
    arrow(axes, (3.5, 4.0), (1.7, 2.9))
    axes.text(2.75, 3.2, "read only", fontsize=8)
    arrow(axes, (10.15, 2.9), (10.15, 4.0))
    for x in (4.15, 7.15, 10.15):
        arrow(axes, (x, 1.9), (x, 1.0), dashed=True)
    out = Path(__file__).with_suffix(".svg")
    figure.savefig(out, facecolor="white", metadata={"Date": None})
    out.write_text("\n".join(line.rstrip() for line in out.read_text().splitlines()) + "\n")


def box(axes, left: float, bottom: float, width: float, colour: str, title: str, below: str) -> None:
    """A rounded box with a title and a smaller line."""
    shape = FancyBboxPatch(
        (left, bottom), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="black", lw=1.0
    )
    axes.add_patch(shape)
    axes.text(left + width / 2, bottom + 0.62, title, ha="center", va="center", fontsize=11, weight="bold")
    axes.text(left + width / 2, bottom + 0.28, below, ha="center", va="center", fontsize=8)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "lw": 1.2, "linestyle": "--" if dashed else "-", "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


if __name__ == "__main__":
    main()
