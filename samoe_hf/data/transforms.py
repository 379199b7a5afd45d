"""Joint augmentation of a clip's frames and masks with `torchvision.transforms.v2`.

A transform takes frames, a `tv_tensors.Image` (T, 3, H, W) uint8, and masks, a `tv_tensors.Mask` (N, T, H, W) uint8,
and returns both. torchvision draws one set of parameters per call, so all frames of a clip are treated alike. (Frames
are no `tv_tensors.Video`, since torchvision hands those through `RandomGrayscale` unchanged.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from samoe_hf.errors import InputError

from .options import check_options

IMAGE_FILL = (124, 116, 104)  # ImageNet's mean, about black after normalization


class PerFrame(nn.Module):
    """Applies a transform of colours to each frame on its own, with its own parameters."""

    def __init__(self, transform: nn.Module):
        super().__init__()
        self.transform = transform

    def forward(self, frames: tv_tensors.Image, masks: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return tv_tensors.Image(torch.stack([self.transform(frame) for frame in frames])), masks


class KeepVisible(nn.Module):
    """Applies a geometric transform unless it loses an object's whole mask on the first frame."""

    def __init__(self, transform: nn.Module):
        super().__init__()
        self.transform = transform

    def forward(self, frames: tv_tensors.Image, masks: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        moved_frames, moved_masks = self.transform(frames, masks)
        return (moved_frames, moved_masks) if moved_masks[:, 0].flatten(1).any(dim=1).all() else (frames, masks)


def transforms_from_options(options: Mapping[str, Any]) -> v2.Compose:
    """`training_transforms` with the arguments that a run's `augmentation` holds."""
    if not isinstance(options, Mapping):
        raise InputError(f"`augmentation` must be arguments of `training_transforms`, not {options!r}")
    check_options(training_transforms, options, "the transforms of `augmentation`")
    try:
        return training_transforms(**options)
    except (ValueError, TypeError) as error:
        raise InputError(f"`augmentation` {dict(options)}: {error}") from error


def training_transforms(
    flip: float = 0.5,
    degrees: float | tuple[float, float] = 25.0,
    shear: float | Sequence[float] = 20.0,
    translate: float | tuple[float, float] | None = None,
    scale: float | tuple[float, float] | None = None,
    jitter: float | Sequence[float] = (0.1, 0.03, 0.03, 0.0),
    grayscale: float = 0.05,
    frame_jitter: float | Sequence[float] = (0.1, 0.05, 0.05, 0.0),
) -> v2.Compose:
    """The augmentation of SAM 2's fine-tuning; its defaults are those of Meta's MOSE configuration.

    Each part is left out where its numbers are 0 or None.

    Args:
        flip: probability of a horizontal flip.
        degrees: largest rotation either way, or the range of rotations.
        shear: largest shear along x in degrees either way, or the range (along x, or x and y).
        translate: largest shift as a share of width and height; one number for both.
        scale: range of the change in size; one number s is (1 - s, 1 + s).
        jitter: strengths of brightness, contrast, saturation and hue, the same for all frames; one number is that of
            brightness, as in `ColorJitter`.
        grayscale: probability of a gray clip.
        frame_jitter: the same as `jitter`, for each frame anew.
    """
    angles: Any = degrees  # torchvision's type leaves out numbers that are not whole
    shift = None if not translate else (translate, translate) if isinstance(translate, int | float) else translate
    sizes = None if not scale else (1 - scale, 1 + scale) if isinstance(scale, int | float) else scale
    clip_colors, frame_colors = ((x,) if isinstance(x, int | float) else tuple(x) for x in (jitter, frame_jitter))
    steps: list[nn.Module] = []
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if degrees or shear or shift or sizes:
        fill = {tv_tensors.Image: IMAGE_FILL, tv_tensors.Mask: 0}
        affine = v2.RandomAffine(angles, shift, sizes, shear or None, v2.InterpolationMode.BILINEAR, fill=fill)
        steps.append(KeepVisible(affine))
    if any(clip_colors):
        steps.append(v2.ColorJitter(*clip_colors))
    if grayscale:
        steps.append(v2.RandomGrayscale(grayscale))
    if any(frame_colors):
        steps.append(PerFrame(v2.ColorJitter(*frame_colors)))
    return v2.Compose(steps or [v2.Identity()])
