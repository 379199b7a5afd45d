"""Pictures of what experts do: how much each is used, which go together, and where in the image each is chosen.

The `usage` of several layers is given as layer -> domain -> mean gate weight of each expert (experts,).
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from .masks import captioned, near_edges, overlay_masks, plain_text, resized

# Paul Tol's "muted" colours, which people with any kind of colour vision tell apart.
DISTINCT_COLORS = (
    "#332288", "#DDCC77", "#44AA99", "#CC6677", "#88CCEE", "#117733", "#AA4499", "#999933", "#882255", "#DDDDDD"
)  # fmt: skip
PANEL_HEIGHT = 264  # of a frame in a strip, in pixels


Usage = Mapping[str, Mapping[str, np.ndarray]]


def tables_by_domain(usage: Usage) -> dict[str, np.ndarray]:
    """Domain -> mean gates (layers, experts), NaN where a layer did not run or has fewer experts."""
    num_experts = max(len(gates) for layer in usage.values() for gates in layer.values())
    tables = {domain: np.full((len(usage), num_experts), np.nan) for layer in usage.values() for domain in layer}
    for row, layer in enumerate(usage.values()):
        for domain, gates in layer.items():
            tables[domain][row, : len(gates)] = gates
    return tables


@plain_text
def plot_bars(panels: Usage, ylabel: str, title: str) -> Figure:
    """Draws a panel of bars for each layer, four in a row."""
    series = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    figure, grid = _panels(len(panels), width=3.2, height=1.6, sharey=True)
    top = max(values.max() for panel in panels.values() for values in panel.values())
    width = 0.8 / len(series)
    for axes, (name, panel) in zip(grid, panels.items(), strict=True):
        for number, domain in enumerate(series):
            if domain in panel:
                values = panel[domain]
                at = np.arange(len(values)) + width * (number - (len(series) - 1) / 2)
                axes.bar(at, values, width, color=_color(number), hatch=_hatch(number))
                axes.axhline(1 / len(values), color="black", linewidth=0.8, linestyle="--")
        axes.set_title(_wrapped(name), fontsize=9)
        axes.set_xticks(range(max(map(len, panel.values()))))
        axes.tick_params(labelsize=7)
        axes.set_ylim(0, 1.05 * top)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    even = Line2D([], [], color="black", linewidth=0.8, linestyle="--", label="even use")
    handles = [*(Patch(facecolor=_color(n), hatch=_hatch(n), label=name) for n, name in enumerate(series)), even]
    figure.suptitle(title, fontsize=12)
    figure.legend(handles=handles, loc="outside right upper", fontsize=9)
    return figure


@plain_text
def plot_heat_maps(
    tables: Mapping[str, np.ndarray],
    rows: Sequence[str],
    label: str,
    title: str,
    diverging: bool = False,
    bars: tuple[str, np.ndarray, float] | None = None,
) -> Figure:
    """Draws tables (rows, experts) beside each other, on one scale of colours; NaN is white, or grey if `diverging`.

    `bars` is another value for each row, drawn at the right: its name, values (rows,), and the largest possible value.
    """
    experts = next(iter(tables.values())).shape[1]
    count = len(tables) + (bars is not None)
    width = 1.5 + max(map(len, rows)) * 0.07 + max(0.26 * experts, 1.2) * len(tables) + (1.6 if bars else 0)
    width = max(width, 0.085 * max(map(len, title.split("\n"))) + 0.5)
    # Room for all names, and for the label along the scale.
    height = 1.6 + max(0.22 * len(rows), 0.08 * len(label))
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    scale = _scale(np.stack(list(tables.values())), diverging)
    for axes, (name, values) in zip(grid, tables.items(), strict=False):
        axes.imshow(values, aspect="auto", **scale)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(experts))
        axes.tick_params(labelsize=8)
        axes.set_xlabel("expert", fontsize=9)
    grid[0].set_yticks(range(len(rows)), rows)
    if bars:
        name, values, limit = bars
        grid[-1].barh(range(len(rows)), values, color=DISTINCT_COLORS[0])
        grid[-1].set_xlim(0, limit)
        grid[-1].set_title(name, fontsize=9)
        grid[-1].tick_params(labelsize=8)
        grid[-1].grid(axis="x", linewidth=0.4)
    figure.colorbar(grid[0].images[0], ax=list(grid), label=label)
    figure.suptitle(title, fontsize=11)
    return figure


@plain_text
def plot_matrices(matrices: Mapping[str, np.ndarray], label: str, title: str, diverging: bool = False) -> Figure:
    """Draws a matrix (experts, experts) for each layer, four in a row, on one scale of colours.

    NaN is white, or grey if `diverging`, which is for values from -1 to 1.
    """
    figure, grid = _panels(len(matrices), width=2.3, height=2.2)
    values = np.concatenate([matrix.ravel() for matrix in matrices.values()])
    scale = _scale(np.array([-1.0, 1.0]) if diverging else values, diverging)
    for axes, (name, matrix) in zip(grid, matrices.items(), strict=True):
        axes.imshow(matrix, **scale)
        axes.set_title(_wrapped(name), fontsize=9)
        axes.set_xticks(range(len(matrix)))
        axes.set_yticks(range(len(matrix)))
        axes.tick_params(labelsize=7)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.suptitle(title, fontsize=12)
    figure.colorbar(grid[0].images[0], ax=list(grid), label=label, shrink=min(1.0, 6 / figure.get_figheight()))
    return figure


def plot_routing(
    frames: Sequence[np.ndarray], masks: np.ndarray, maps: np.ndarray, num_experts: int, path: str | Path, title: str
) -> None:
    """Draws up to six frames: a mask above, and below it which expert each position of the image chose.

    Args:
        frames: (H, W, 3) uint8.
        masks: (T, H, W) bool.
        maps: (T, h, w), experts, or -1 throughout a frame that has none; only frames with a map are drawn. With more
            experts than colours, those chosen most in this video get them, and the rest is grey.
    """
    mapped = np.flatnonzero((maps >= 0).any(axis=(1, 2)))
    drawn = mapped[np.unique(np.linspace(0, len(mapped) - 1, 6).round().astype(int))].tolist()
    shown = _shown_experts(maps, num_experts)
    columns = [np.vstack(_pictures(frames[t], masks[t], maps[t], shown, PANEL_HEIGHT)) for t in drawn]
    picture = np.hstack([np.pad(column, ((0, 0), (0, 6), (0, 0)), constant_values=255) for column in columns])
    title = f"{title}; frames {', '.join(map(str, drawn))}"
    Image.fromarray(captioned(picture, [title], _expert_legend(maps, shown))).save(path)


def routing_video(
    frames: Sequence[np.ndarray], masks: np.ndarray, maps: np.ndarray, num_experts: int, title: str, height: int = 480
) -> Iterator[np.ndarray]:
    """Frames (H', W', 3) uint8 of a video: the mask at the left, the chosen experts at the right, a legend above.

    Arguments are those of [`plot_routing`]; frames without a map are grey at the right.
    """
    shown = _shown_experts(maps, num_experts)
    legend = _expert_legend(maps, shown)
    for frame, mask, experts in zip(frames, masks, maps, strict=True):
        yield captioned(np.hstack(_pictures(frame, mask, experts, shown, height)), [title], legend)


def _pictures(
    frame: np.ndarray, mask: np.ndarray, experts: np.ndarray, shown: Sequence[int], height: int
) -> tuple[np.ndarray, np.ndarray]:
    """A frame with its mask, and with the experts, at a height in pixels, or lower if it is wider than two of these."""
    frame, mask = resized(frame, mask, max(1, min(height, 2 * height * frame.shape[0] // frame.shape[1])))
    return overlay_masks(frame, mask.astype(np.uint8), show_ids=False), _overlay_experts(frame, mask, experts, shown)


def _shown_experts(maps: np.ndarray, num_experts: int) -> list[int]:
    """The experts that have colours of their own: all, or the ones chosen most where there are too many."""
    if num_experts <= len(DISTINCT_COLORS):
        return list(range(num_experts))
    counts = np.bincount(maps[maps >= 0], minlength=num_experts)
    return sorted(np.argsort(-counts, kind="stable")[: len(DISTINCT_COLORS) - 1].tolist())


def _overlay_experts(frame: np.ndarray, mask: np.ndarray, experts: np.ndarray, shown: Sequence[int]) -> np.ndarray:
    """Lays the experts' colours over the frame in grey, with the outline of the mask in white on black."""
    grey = np.repeat(np.asarray(Image.fromarray(frame).convert("L"))[..., None], 3, axis=-1)
    height, width = frame.shape[:2]
    # Nearest, so that each position of the map is seen as what it is.
    experts = np.asarray(Image.fromarray(experts.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST))
    colors = np.tile(_rgb(len(shown)), (max(experts.max(), *shown) + 1, 1))
    colors[shown] = [_rgb(number) for number in range(len(shown))]
    blend = (0.3 * grey + 0.7 * colors[np.maximum(experts, 0)]).astype(np.uint8)
    image = np.where(experts[..., None] >= 0, blend, grey)
    line = max(1, min(height, width) // 240)
    for thickness, color in ((2 * line, 0), (line, 255)):
        image[near_edges(mask, thickness)] = color
    return image


def _expert_legend(maps: np.ndarray, shown: Sequence[int]) -> dict[str, np.ndarray]:
    """Name and share of each chosen expert -> a picture of its colour."""
    chosen = maps[maps >= 0]
    shares = {f"expert {expert}": (chosen == expert).mean() for expert in shown}
    shares["other experts"] = (~np.isin(chosen, shown)).mean()
    colored = {f"{name} ({share:.1%})": (share, _rgb(number)) for number, (name, share) in enumerate(shares.items())}
    return {name: np.full((1, 1, 3), color) for name, (share, color) in colored.items() if share > 0}


def _panels(count: int, width: float, height: float, sharey: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure of that many panels, four in a row, each of a size in inches."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.5) + 0.8, height * rows + 1.3), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _wrapped(name: str) -> str:
    """A module's name in lines short enough for the title of a panel."""
    return textwrap.fill(name.replace(".", ". "), 28).replace(". ", ".")


def _scale(values: np.ndarray, diverging: bool) -> dict[str, Any]:
    """Colours for values, with one for NaN that is not among theirs."""
    largest = max(float(np.abs(values[~np.isnan(values)]).max(initial=0.0)), 1e-6)
    name, bad = ("PuOr", "0.75") if diverging else ("cividis", "white")
    return {"cmap": colormaps[name].with_extremes(bad=bad), "vmin": -largest if diverging else 0.0, "vmax": largest}


def _color(number: int) -> str:
    return DISTINCT_COLORS[number % len(DISTINCT_COLORS)]


def _hatch(number: int) -> str | None:
    """Tells series of one colour apart."""
    return (None, "//", "..", "xx")[number // len(DISTINCT_COLORS) % 4]


def _rgb(number: int) -> np.ndarray:
    return np.rint(np.multiply(to_rgb(_color(number)), 255)).astype(np.uint8)
