"""Synthetic looks, as they are and changed, and what the gate reads of their videos."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.ndimage import uniform_filter
from torch import Tensor

from samoe_hf import SamoeModel
from samoe_hf.continual.fit_gate import frame_features
from samoe_hf.data import SYNTHETIC_DOMAINS, SyntheticVideos, Video
from samoe_hf.data.schema import evenly_chosen
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.domain_gate import num_pooled_features
from samoe_hf.model.processing_samoe import build_processor

Rng = np.random.Generator
SEED = 100


def _blurred(x: np.ndarray) -> np.ndarray:
    return uniform_filter(x, (0, 5, 5, 0))


def _coarse(x: np.ndarray, size: int) -> np.ndarray:
    return x.reshape(len(x), x.shape[1] // size, size, x.shape[2] // size, size, 3).mean((2, 4))


def _pixelated(x: np.ndarray) -> np.ndarray:
    size = 6 if x.shape[1] % 6 == 0 else 8
    return _coarse(x, size).repeat(size, 1).repeat(size, 2)


# What is done to frames (T, H, W, 3) of 0..1.
CHANGES: dict[str, Callable[[np.ndarray, Rng], np.ndarray]] = {
    "plain": lambda x, rng: x,
    "negative": lambda x, rng: 1 - x,
    "gray": lambda x, rng: x.mean(3, keepdims=True).repeat(3, 3),
    "dim": lambda x, rng: 0.4 * x,
    "pale": lambda x, rng: 0.4 * x + 0.6,
    "warm": lambda x, rng: x * (1, 0.75, 0.4),
    "cool": lambda x, rng: x * (0.4, 0.75, 1),
    "green": lambda x, rng: x * (0.5, 1, 0.5),
    "blurred": lambda x, rng: _blurred(x),
    "noisy": lambda x, rng: x + rng.normal(0, 0.12, x.shape),
    "salted": lambda x, rng: np.where(rng.random((*x.shape[:3], 1)) < 0.04, 1, x),
    "posterized": lambda x, rng: (3 * x).round() / 3,
    "pixels": lambda x, rng: _pixelated(x),
    "mosaic": lambda x, rng: np.tile(_coarse(x, 2), (1, 2, 2, 1)),
    "edges": lambda x, rng: x - _blurred(_blurred(x)) + 0.5,
}
# Looks that are gray are not changed by it.
VARIANTS = [
    (look, change)
    for look in SYNTHETIC_DOMAINS
    for change in CHANGES
    if (look, change) not in (("blobs", "gray"), ("echoes", "gray"))
]


def changed(video: Video, change: str, position: int) -> Video:
    """A video of a synthetic look, changed. Its masks are left out."""
    frames = np.stack([video.frames[t] for t in range(len(video))]) / 255
    frames = 255 * CHANGES[change](frames, np.random.default_rng(position)).clip(0, 1)
    no_masks = np.zeros((len(frames), 0, *video.size), dtype=bool)
    return Video.from_arrays(video.video_id, frames.round().astype(np.uint8), no_masks)


def read_look(
    model: SamoeModel,
    look: str,
    positions: Sequence[int],
    num_frames: int,
    num_read: int,
    change: str = "plain",
    seed: int = SEED,
) -> list[Tensor]:
    """What the gate reads of some videos of a look: (frames, features) of each, evenly chosen, with the first."""
    size, processor = model.config.image_size, build_processor(model.config)
    videos = SyntheticVideos(max(positions) + 1, num_frames, (size, size), domain=look, seed=seed)
    frames = evenly_chosen(range(num_frames), num_read)
    # Made before frames are encoded: a small tensor of each video, which stays, would split large blocks of memory.
    read = torch.empty(len(positions), len(frames), sum(num_pooled_features(model.config)))
    with evaluation_mode(model):
        for row, i in enumerate(positions):
            read[row] = frame_features(model, processor, changed(videos[i], change, i), frames)
    return [*read]
