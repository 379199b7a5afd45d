"""Joint augmentation of a clip's frames and masks with `torchvision.transforms.v2`.

A transform takes frames, a `tv_tensors.Image` (T, 3, H, W) uint8, and masks, a `tv_tensors.Mask` (N, T, H, W) uint8,
and returns both. torchvision draws one set of parameters per call, so all frames of a clip are treated alike. (Frames
are no `tv_tensors.Video`, since torchvision hands those through `RandomGrayscale` unchanged.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

IMAGE_FILL = (124, 116, 104)  # ImageNet's mean, about black after normalization


class PerFrame(nn.Module):
    """Applies a transform of colours to each frame on its own, with its own parameters."""

    def __init__(self, transform: nn.Module):
        super().__init__()
        self.transform = transform

    def forward(self, frames: tv_tensors.Image, masks: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return tv_tensors.Image(torch.stack([self.transform(frame) for frame in frames])), masks


class KeepVisible(nn.Module):
    """Applies a geometric transform unless it loses an object's whole mask on the first frame.

    Args:
        transform: on frames and masks.
        tries: how often other parameters are drawn before the clip is left as it is.
    """

    def __init__(self, transform: nn.Module, tries: int = 1):
        super().__init__()
        self.transform, self.tries = transform, tries

    def forward(self, frames: tv_tensors.Image, masks: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        for _ in range(self.tries):
            moved_frames, moved_masks = self.transform(frames, masks)
            if moved_masks[:, 0].flatten(1).any(dim=1).all():
                return moved_frames, moved_masks
        return frames, masks


def training_transforms(
    flip: float = 0.5,
    degrees: float = 25.0,
    shear: float = 20.0,
    translate: tuple[float, float] | None = None,
    scale: tuple[float, float] | None = None,
    crop_size: int | None = None,
    crop_scale: tuple[float, float] = (0.5, 1.0),
    jitter: Sequence[float] = (0.1, 0.03, 0.03, 0.0),
    grayscale: float = 0.05,
    frame_jitter: Sequence[float] = (0.1, 0.05, 0.05, 0.0),
) -> v2.Compose:
    """The augmentation of SAM 2's fine-tuning; its defaults are those of Meta's MOSE configuration.

    Each part is left out where its numbers are 0 or None.

    Args:
        flip: probability of a horizontal flip.
        degrees: largest rotation, either way.
        shear: largest shear along x in degrees, either way.
        translate: largest shift as a share of width and height.
        scale: range of the change in size.
        crop_size: side of a random crop that is resized to a square; none by default.
        crop_scale: range of that crop's area as a share of the frame's.
        jitter: strengths of brightness, contrast, saturation and hue, the same for all frames.
        grayscale: probability of a gray clip.
        frame_jitter: the same as `jitter`, for each frame anew.
    """
    steps: list[nn.Module] = []
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if degrees or shear or translate or scale:
        fill = {tv_tensors.Image: IMAGE_FILL, tv_tensors.Mask: 0}
        affine = v2.RandomAffine(degrees, translate, scale, shear or None, v2.InterpolationMode.BILINEAR, fill=fill)
        steps.append(KeepVisible(affine))
    if crop_size:
        crop = v2.RandomResizedCrop(crop_size, crop_scale, interpolation=v2.InterpolationMode.BICUBIC)
        steps.append(KeepVisible(crop, tries=10))
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    if grayscale:
        steps.append(v2.RandomGrayscale(grayscale))
    if any(frame_jitter):
        steps.append(PerFrame(v2.ColorJitter(*frame_jitter)))
    return v2.Compose(steps or [v2.Identity()])
