"""Training clips: sampling of frames and objects, preparation for the model, and collation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from samoe_hf.errors import InputError

from .frames import SampleError, say_once
from .options import check_types
from .schema import Video

ClipTransform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[tv_tensors.Image, tv_tensors.Mask]]
Clip = dict[str, Any]


class NoObjectError(SampleError):
    """A video without an object that a clip could start from."""


class FrameProcessor(Protocol):
    """What of a processor prepares frames."""

    video_processor: Any


@dataclass(frozen=True)
class ClipSampler:
    """Draws a clip from a video, as SAM 2's training does.

    Frames are consecutive annotated frames (with a stride counted in annotated frames); objects are drawn from those
    visible on the clip's first frame and may vanish later. Of a video that is too short, frames are repeated by
    reflection at its ends (0 1 2 1 0 1 …), so one frame gives a clip that stands still.

    Args:
        processor: resizes and normalizes the frames, as it does for tracking. Masks are resized to the same size.
        stride: step between a clip's frames, in annotated frames.
        max_objects: at most so many objects per clip.
        reverse_probability: of playing the clip backwards.
        transforms: joint augmentation before resizing, see `samoe_hf.data.transforms`: a callable on frames
            (T, 3, H, W) uint8 and masks (N, T, H, W) uint8 that draws from torch's global generator.
    """

    processor: FrameProcessor = field(repr=False)
    num_frames: int = 8
    stride: int = 1
    max_objects: int = 3
    reverse_probability: float = 0.5
    transforms: ClipTransform | None = None

    def __post_init__(self) -> None:
        check_types(ClipSampler, vars(self), "clips")
        if min(self.num_frames, self.stride, self.max_objects) < 1:
            raise InputError("num_frames, stride and max_objects must be at least 1")
        if not 0 <= self.reverse_probability <= 1:
            raise InputError(f"reverse_probability must be within 0..1, not {self.reverse_probability}")
        if self.num_frames == 1:
            warn_one_frame("clips with num_frames=1")

    def __call__(self, video: Video, seed: Sequence[int]) -> Clip:
        """Draws a clip; `seed`, non-negative integers, decides everything random.

        Returns:
            `pixel_values` (T, 3, S, S) float32 as the processor makes them, `labels` (N, T, S, S) bool with
            1 <= N <= max_objects and every object visible on the first frame, `domain`, `video_id`, and
            `frame_indices`, the T indices within the video.

        Raises:
            NoObjectError: the video has no object that could be tracked from any first frame.
        """
        rng = np.random.default_rng(list(seed))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))  # torch.manual_seed would reseed CUDA too
            for positions in self._candidates(len(video.annotated_frames), rng):
                frames = [video.annotated_frames[i] for i in positions]
                visible = rng.permutation(video.visible(frames[0]))
                clip = self._load(video, frames, visible[: self.max_objects].tolist()) if len(visible) else None
                if clip is not None:
                    return clip
        raise NoObjectError(f"{video.video_id}: no object on any annotated frame that a clip could start from")

    def _candidates(self, length: int, rng: np.random.Generator) -> Iterator[list[int]]:
        """Clips as positions among `length` annotated frames, from every start at random; those that fit come first."""
        steps = np.arange(self.num_frames) * self.stride
        fitting = max(length - int(steps[-1]), 0)
        for start in (*rng.permutation(fitting), *rng.permutation(np.arange(fitting, length))):
            clip = _reflect(start + steps, length)
            yield (clip[::-1] if rng.random() < self.reverse_probability else clip).tolist()

    def _load(self, video: Video, frames: list[int], objects: list[int]) -> Clip | None:
        """The clip, or None where resizing or an augmentation has lost all objects on the first frame."""
        needed = sorted(set(frames))  # ascending, so that a video file is decoded once through
        images = {i: video.frames[i] for i in needed}
        masks = {i: video.masks(i, objects) for i in needed}
        pixels = tv_tensors.Image(torch.from_numpy(np.stack([images[i] for i in frames])).permute(0, 3, 1, 2))
        labels = tv_tensors.Mask(torch.from_numpy(np.stack([masks[i] for i in frames], axis=1).astype(np.uint8)))
        if self.transforms is not None:
            pixels, labels = self.transforms(pixels, labels)
        prepared = self.processor.video_processor(videos=pixels.as_subclass(torch.Tensor), return_tensors="pt")
        pixel_values = prepared["pixel_values_videos"][0].contiguous()
        nearest = {"size": list(pixel_values.shape[-2:]), "interpolation": InterpolationMode.NEAREST}
        labels = tvf.resize(tv_tensors.Mask(labels), **nearest).as_subclass(torch.Tensor) > 0
        labels = labels[labels[:, 0].any(dim=(-2, -1))]
        if len(labels) == 0:
            return None
        return {
            "pixel_values": pixel_values,
            "labels": labels,
            "domain": video.domain,
            "video_id": video.video_id,
            "frame_indices": frames,
        }


def _reflect(positions: np.ndarray, length: int) -> np.ndarray:
    """Folds positions beyond the end back into 0 … length - 1, without repeating the end."""
    period = max(2 * (length - 1), 1)
    folded = positions % period
    return np.minimum(folded, period - folded) if length > 1 else np.zeros_like(positions)


def warn_one_frame(what: str) -> None:
    """Warns that single frames do not train the memory attention."""
    say_once(
        f"{what}: one frame never attends to a memory, so experts in the memory attention get no gradient from it; "
        "give the configuration's `expert_modules` other modules as well, or train on longer clips"
    )


@dataclass(frozen=True)
class ClipCollator:
    """Collates clips of equal length and size, padding their objects.

    Args:
        keep_domain: also return `domain`, a list of B names; `transformers.Trainer` would give it to the model.

    Returns:
        `pixel_values` (B, T, 3, S, S) float32, `labels` (B, N, T, S, S) int8 with N the most objects of a clip: 1
        where an object is, 0 elsewhere, -100 for padding, as Trainer counts and pads labels; and `object_mask` (B, N)
        bool, False for padding.
    """

    keep_domain: bool = False

    def __call__(self, clips: Sequence[Clip]) -> dict[str, Any]:
        if not all(isinstance(clip, Mapping) and "pixel_values" in clip for clip in clips):
            raise InputError("clips must have `pixel_values`; ClipDataset(videos, processor) makes clips of videos")
        shapes = {tuple(clip["pixel_values"].shape) for clip in clips}
        if len(shapes) > 1:
            raise InputError(f"clips of a batch must have one number of frames and one size, not {sorted(shapes)}")
        counts = torch.tensor([len(clip["labels"]) for clip in clips])
        batch: dict[str, Any] = {
            "pixel_values": torch.stack([clip["pixel_values"] for clip in clips]),
            "labels": pad_sequence([clip["labels"].to(torch.int8) for clip in clips], True, padding_value=-100),
            "object_mask": torch.arange(int(counts.max())) < counts[:, None],
        }
        if self.keep_domain:
            batch["domain"] = [clip["domain"] for clip in clips]
        return batch
