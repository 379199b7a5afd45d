"""Pictures of masks: over a frame, and frames side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.ndimage import binary_dilation
from torchvision.utils import draw_segmentation_masks

from samoe_hf.data.video_io import voc_palette

# Names of domains, videos and models are drawn as they are: `$` is no mathematics.
plain_text = rc_context({"text.parse_math": False})


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
    # Id 256 would be black again.
    colors = [tuple(int(c) for c in voc_palette()[(i - 1) % 255 + 1]) for i in ids]
    masks = torch.from_numpy(np.stack([id_map == i for i in ids]))
    image = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
    return draw_segmentation_masks(image, masks, alpha=alpha, colors=colors).permute(1, 2, 0).numpy()


def outline(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels at most `thickness` from the edge of a mask (H, W), on either side: bool (H, W)."""
    square = np.ones((3, 3), dtype=bool)
    grown, outside = (binary_dilation(side, square, iterations=thickness) for side in (mask, ~mask))
    return grown & outside


@plain_text
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
