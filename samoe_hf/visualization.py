"""Pictures: masks over frames, contact sheets, expert usage."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import draw_segmentation_masks, make_grid

from .data.video_io import voc_palette


def overlay_masks(frame: np.ndarray, id_map: np.ndarray, alpha: float = 0.5) -> np.ndarray:
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


def contact_sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Joins rows of equally many frames (H, W, 3) uint8 into one picture."""
    images = [torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1) for row in rows for frame in row]
    return make_grid(images, nrow=len(rows[0]), padding=2, pad_value=255).permute(1, 2, 0).numpy()


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
