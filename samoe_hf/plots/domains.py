"""How near domains are to each other for the gate, as a map and in numbers; how large one needs to be."""

from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageOps

from samoe_hf.data.images import read_pixels

from .evaluation import LINES
from .masks import DPI, plain_text

EXAMPLE_HEIGHT = 48  # at most, in points, and twice as wide; the table is some TABLE_POINTS high
TABLE_POINTS = 240
# Of more domains numbers cannot be read.
MAX_NUMBERS = 16


@plain_text
def draw_domains(names: Sequence[str], distances: np.ndarray, examples: Mapping[str, str | Path]) -> Figure:
    """Draws domains on a map, with example pictures of some, and the table of their distances.

    Args:
        distances: (domains, domains), how far the middle of one is from another as its threshold counts, which is 1.
            Those of a domain that is not known yet are infinite, and it is left out.
        examples: name of a domain -> an image file.
    """
    known = np.isfinite(distances.diagonal())
    names, distances = [*compress(names, known)], distances[known][:, known]
    more = 0.09 * max(0, max(map(len, names), default=0) - 20)  # inches, for names longer than most
    figure = Figure(figsize=(11 + 2 * more, 5 + more), layout="constrained")
    chart, table = figure.subplots(1, 2)
    places = _placed(np.log1p((distances + distances.T) / 2))
    for number, (name, (x, y)) in enumerate(zip(names, places, strict=True)):
        chart.plot(x, y, "o", color=LINES[number % len(LINES)])
        # Names of near domains stand at different sides.
        (right, side), up = ((5, "left"), (-5, "right"))[number // 2 % 2], (5, -12)[number % 2]
        chart.annotate(name, (x, y), xytext=(right, up), textcoords="offset points", fontsize=9, ha=side)
    chart.set_title("near domains look alike to the gate", fontsize=10)
    half = 1.3 * np.abs(places).max() or 1
    chart.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])
    table.imshow(np.log1p(distances), cmap="Blues_r")
    ticks = range(len(names))
    table.set_xticks(ticks, names, rotation=90, fontsize=8)
    table.set_yticks(ticks, names, fontsize=8)
    table.set_title(
        "how far the middle of a row's domain is from a column's;\nwithin 1 it would be taken for it", fontsize=10
    )
    height = min(EXAMPLE_HEIGHT, TABLE_POINTS / len(names))
    for row, name in enumerate(names):
        if name in examples:
            picture = Image.fromarray(read_pixels(examples[name]))
            picture = ImageOps.contain(picture, (2 * EXAMPLE_HEIGHT, EXAMPLE_HEIGHT))
            image, right = OffsetImage(np.asarray(picture), zoom=height / EXAMPLE_HEIGHT), 1.02 * len(names) - 0.5
            options = {"box_alignment": (0, 0.5), "frameon": False, "pad": 0.2, "annotation_clip": False}
            table.add_artist(AnnotationBbox(image, (right, row), **options))
    if len(names) <= MAX_NUMBERS:
        for row in ticks:
            for column in ticks:
                text = f"{distances[row, column]:.2g}" if distances[row, column] < 100 else ">99"
                color = "white" if distances[row, column] < 3 else "black"
                table.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    return figure


def _placed(distances: np.ndarray) -> np.ndarray:
    """Points in the plane (n, 2) that are about as far from each other as `distances` (n, n), by classical scaling."""
    count = len(distances)
    squares = np.where(np.eye(count), 0, distances) ** 2
    centering = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-centering @ squares @ centering / 2)
    best = vectors[:, ::-1][:, :2] * np.sqrt(values[::-1][:2].clip(min=0))
    return np.pad(best, ((0, 0), (0, 2 - best.shape[1])))


@plain_text
def plot_sizes(sizes: Sequence[int], scores: Sequence[float], chosen: int, title: str, path: str | Path) -> None:
    """Draws the scores, J&F from 0 to 1, of experts of several sizes in bytes, of which one is chosen."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.array(sizes) / 1e3, 100 * np.array(scores), "o-", color=LINES[0], label="tried")
    axes.plot(chosen / 1e3, 100 * scores[sizes.index(chosen)], "D", color=LINES[1], markersize=10, label="chosen")
    axes.set(title=title, xlabel="kB of the experts' tensors", ylabel="J&F of what was tracked", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")  # by default powers in TeX
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=DPI)
