"""Pictures: masks over frames, frames side by side, expert usage."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from .data.video_io import voc_palette


def overlay_masks(frame: np.ndarray, id_map: np.ndarray, alpha: float = 0.6) -> np.ndarray:
    """Lays objects over a frame in DAVIS' colours.

    Args:
        frame: (H, W, 3) uint8.
        id_map: (H, W), 0 for background.
        alpha: opacity of the colours.

    Returns:
        (H, W, 3) uint8.
    """
    ids = [int(i) for i in np.unique(id_map) if i]
    if not ids:
        return frame
    colors = [tuple(int(c) for c in voc_palette()[i % 256]) for i in ids]
    masks = torch.from_numpy(np.stack([id_map == i for i in ids]))
    image = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
    return draw_segmentation_masks(image, masks, alpha=alpha, colors=colors).permute(1, 2, 0).numpy()


def plot_frames(rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str], path: str | Path, title: str) -> None:
    """Draws frames (H, W, 3) uint8 in a grid.

    Args:
        rows: name of each row -> its frames.
        columns: name of each column.
        path: of the picture, such as a `.png`.
    """
    figure = Figure(figsize=(1.6 * len(columns) + 1, 1.6 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, (name, frames) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(name, fontsize=9)
        for axes, frame in zip(axes_row, frames, strict=True):
            axes.imshow(frame)
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)


def plot_expert_usage(usage: Mapping[str, Tensor], path: str | Path, title: str) -> None:
    """Draws a heat map of how much weight each expert gets in each layer.

    Args:
        usage: name of each layer with experts -> mean gate of each expert (experts,); each sums to 1.
        path: of the picture, such as a `.png`.
    """
    names = list(usage)
    values = torch.stack([usage[name] for name in names]).cpu().numpy()
    figure = Figure(figsize=(2.5 + 0.5 * values.shape[1] + max(map(len, names)) * 0.06, 1.4 + 0.24 * len(names)))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=max(values.max(), 2 / values.shape[1]), aspect="auto")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("expert")
    axes.set_title(f"{title}\n(even use: {1 / values.shape[1]:.2f})", fontsize=10)
    figure.colorbar(image, label="mean gate weight")
    figure.savefig(path, dpi=150, bbox_inches="tight")
