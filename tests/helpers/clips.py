"""Videos whose frames tell their number, and processors of any size."""

import numpy as np
import torch
from transformers import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor
from transformers.image_utils import PILImageResampling

from samoe_hf.data import ClipDataset, Video
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.frames import ArrayFrames


def square(side, **settings):
    """A processor that resizes frames to (side, side), bicubically as the original does."""
    settings = {"size": {"height": side, "width": side}, "resample": PILImageResampling.BICUBIC, **settings}
    return Sam2VideoProcessor(Sam2ImageProcessor(), Sam2VideoVideoProcessor(**settings))


def numbered_video(num_frames, visible=None, annotated=None, size=(16, 20), name="v"):
    """Frame t is of gray value t. Object k + 1 covers column 3 k; `visible[k]` lists the frames on which it is seen."""
    visible = [range(num_frames)] if visible is None else visible
    frames = np.zeros((num_frames, *size), np.uint8) + np.arange(num_frames, dtype=np.uint8)[:, None, None]
    masks = np.zeros((num_frames, len(visible), *size), bool)
    for k, seen in enumerate(visible):
        masks[list(seen), k, :, 3 * k] = True
    annotated = range(num_frames) if annotated is None else annotated
    annotations = MaskArrays(masks[list(annotated)], range(1, len(visible) + 1), annotated)
    return Video(name, ArrayFrames(frames), annotations, domain="numbers")


def same_clip(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def draws(video, count=200, **sampling):
    dataset = ClipDataset([video], square(20), clips_per_video=count, **sampling)
    return [dataset[i] for i in range(count)]


def bright_object_video(num_frames=4):
    masks = np.zeros((num_frames, 1, 80, 120), bool)
    for t in range(num_frames):
        masks[t, 0, 20 + 3 * t : 50 + 3 * t, 30:75] = True
    return Video.from_arrays("v", np.where(masks[:, 0], 250, 20).astype(np.uint8), masks)
