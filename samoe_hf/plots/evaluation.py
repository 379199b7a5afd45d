"""The pictures of a report: plots of its figures, and an object's predicted against its true mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from samoe_hf.data.schema import Video
from samoe_hf.data.video_io import write_video

from .masks import captioned, fill_hatched, hatching, plain_text

# Those of Okabe and Ito, which everyone can tell apart.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
FOUND, MISSED, ADDED = (0, 114, 178), (240, 228, 66), (213, 94, 0)
# Name, colour, and direction of the hatching in which what is wrong is drawn.
LEGEND = (("found", FOUND, None), ("missed", MISSED, 0), ("too much", ADDED, 1))
MIN_WIDTH, MAX_WIDTH, MAX_HEIGHT = 640, 960, 1920
MAX_NUMBERS = 4  # of models whose bars have numbers
STRIP_FRAMES, STRIP_WIDTH, STRIP_HEIGHT = 6, 320, 640


@plain_text
def plot_over_time(models: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws J by the number of frames since each object's first, and how many objects are left, of `results.json`'s
    models."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    alone, first = len(models) == 1, models[0]["over_time"]
    for number, model in enumerate(models):
        curve, color, style = model["over_time"], LINES[number % len(LINES)], STYLES[number % len(STYLES)]
        frames, marker = curve["frames"], "o" if len(curve["frames"]) < 3 else None
        axes.plot(frames, curve["mean"], style, color=color, label=model["label"], marker=marker)
        if alone:  # bands of several would hide each other
            quartiles = curve["lower_quartile"], curve["upper_quartile"]
            axes.fill_between(frames, *quartiles, color=color, alpha=0.15, linewidth=0)
    below.step(first["frames"], first["objects"], color="#555555", where="mid")
    axes.set(ylim=(-0.02, 1.02), ylabel="J (IoU)")
    band = ", band from the lower to the upper quartile" if alone else ""
    axes.set_title(f"J over time: mean over objects{band}", fontsize=10)
    below.set(xlabel="frames after the first that shows the object", ylabel="objects")
    below.set_ylim(0, 1.2 * max(first["objects"], default=1))
    for one in (axes, below):
        one.grid(alpha=0.3)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    if not alone:
        _add_legend(figure, axes.lines)
    figure.savefig(path, dpi=130)


@plain_text
def plot_by_size(models: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws mean J by the object's size, and how many masks each bin holds; `models` have `label` and `by_size`."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        heights = [np.nan if size["J_mean"] is None else size["J_mean"] for size in model["by_size"]]
        positions = np.arange(len(heights)) + (number - (len(models) - 1) / 2) * width
        color, hatch = LINES[number % len(LINES)], ("", "//", "..", "xx")[number // len(LINES) % 4]
        bars = axes.bar(positions, heights, width * 0.92, color=color, hatch=hatch, label=model["label"])
        texts = ["" if np.isnan(height) or len(models) > MAX_NUMBERS else f"{height:.2f}" for height in heights]
        axes.bar_label(bars, texts, fontsize=7 if len(models) > 1 else 8, padding=1)
    sizes = models[0]["by_size"]
    ranges = [f"{100 * size['from']:g}–{100 * size['to']:g} %\nn = {size['masks']}" for size in sizes]
    axes.set_xticks(range(len(sizes)), ranges, fontsize=8)
    axes.set(
        xlim=(-0.6, len(sizes) - 0.4),
        ylim=(0, 1.08),
        ylabel="mean J (IoU)",
        xlabel="true mask, share of the image; n: masks (objects × frames)",
    )
    axes.set_title("J by the size of the object", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if len(models) > 1:
        _add_legend(figure, axes.containers)
    figure.savefig(path, dpi=130)


def _add_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Names what is drawn below the plot, where it hides nothing; labels may begin with an underscore."""
    columns = max(1, 110 // (8 + max(len(handle.get_label()) for handle in handles)))
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(handles) // columns))
    figure.legend(handles=handles, fontsize=8, ncols=columns, loc="outside lower center")


def compare_masks(frame: np.ndarray, prediction: np.ndarray, target: np.ndarray | None, width: int) -> Image.Image:
    """Draws over a gray frame what of an object was found, missed and added, and the true outline in white on black.

    What was found is tinted; what was missed and what is too much are hatched in two directions. Without a target, all
    of the prediction counts as found. The frame is (H, W, 3) uint8, masks are (H, W) bool, the width is in pixels.
    """
    size = (width, max(1, round(width * frame.shape[0] / frame.shape[1])))
    gray = Image.fromarray(frame).convert("L").convert("RGB").resize(size, Image.Resampling.BICUBIC)
    picture = np.array(gray)
    prediction = _resize(prediction, size)
    truth = prediction if target is None else _resize(target, size)
    parts = (prediction & truth, truth & ~prediction, prediction & ~truth)
    for mask, (_, color, direction) in zip(parts, LEGEND, strict=True):
        _fill(picture, mask, color, direction)
    if target is not None:
        white = np.asarray(binary_dilation(truth), dtype=bool)
        picture[np.asarray(binary_dilation(white)) & ~white] = 0  # so that the line is seen on bright ground too
        picture[white & ~truth] = 255
    return Image.fromarray(picture)


def _fill(picture: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], direction: int | None) -> None:
    """Tints a mask in place, or hatches it."""
    if direction is None:
        picture[mask] = (0.4 * picture[mask] + 0.6 * np.array(color)).round()
    else:
        fill_hatched(picture, mask, hatching(*mask.shape, 1, direction), color)


def _resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _swatches() -> dict[str, np.ndarray]:
    """Name -> what it looks like, of the legend of [`compare_masks`]."""
    swatches = {name: np.full((12, 12, 3), 128, dtype=np.uint8) for name, *_ in LEGEND}
    for name, color, direction in LEGEND:
        _fill(swatches[name], np.ones((12, 12), dtype=bool), color, direction)
    line = np.zeros((12, 12, 3), dtype=np.uint8)
    line[5:7] = 255
    return {**swatches, "true outline": line}


def draw_object(
    video: Video,
    object_id: int,
    read: Callable[[int], np.ndarray],
    frames: Sequence[int],
    j: Sequence[float],
    strip: Sequence[int],
    title: str,
    path: str | Path,
) -> None:
    """Writes an object's masks against the truth: an mp4 of all given frames, and a `.png` of a few.

    Args:
        read: frame -> predicted mask (H, W) bool.
        j: the object's IoU on each annotated frame of the video.
        strip: annotated frames, of which the `.png` shows up to six, evenly spread.
        path: of both files, without suffix.
    """
    path = Path(path)
    iou = dict(zip(video.annotated_frames, j, strict=True))

    def fitted(width: int, height: int) -> int:
        return max(1, min(width, height * video.size[1] // video.size[0]))

    def picture(frame: int, width: int) -> Image.Image:
        target = video.masks(frame, [object_id])[0] if frame in iou else None
        return compare_masks(video.frames[frame], read(frame), target, width)

    def caption(frame: int, digits: int) -> str:
        score = f"J {iou[frame]:.{digits}f}" if frame in iou else "not annotated"
        return f"frame {video.frames.names[frame]}: {score}{'' if read(frame).any() else ', predicted empty'}"

    def overlays() -> Iterator[np.ndarray]:
        for frame in frames:
            yield captioned(np.asarray(picture(frame, width)), [title, caption(frame, 3)], _swatches())

    path.parent.mkdir(parents=True, exist_ok=True)
    width = fitted(min(max(video.size[1], MIN_WIDTH), MAX_WIDTH), MAX_HEIGHT)
    fps = video.frames.fps or (24 if len(frames) > 48 else 6)
    write_video(path.with_name(f"{path.name}.mp4"), overlays(), fps=fps)

    shown = [strip[i] for i in np.linspace(0, len(strip) - 1, min(STRIP_FRAMES, len(strip))).round().astype(int)]
    pictures = [picture(frame, fitted(STRIP_WIDTH, STRIP_HEIGHT)) for frame in shown]
    _strip(pictures, [caption(frame, 2) for frame in shown], title).save(path.with_name(f"{path.name}.png"))


def _strip(pictures: Sequence[Image.Image], names: Sequence[str], title: str) -> Image.Image:
    """Pictures of one size in rows of three, each under its name, with title and legend."""
    columns, label = 3, 20
    width, height = STRIP_WIDTH, pictures[0].height
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (width + 6) - 6, rows * (height + label + 4)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(14)
    for number, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        x, y = number % columns * (width + 6), number // columns * (height + label + 4)
        draw.text((x + 4, y), name, "black", font)
        grid.paste(picture, (x, y + label))
    return Image.fromarray(captioned(np.asarray(grid), [title], _swatches()))
