"""A session whose memory does not grow with the video: frames are decoded as they come, and forgotten in time."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Sam2VideoInferenceSession

from .domain_choice import AUTO, SessionDecision
from .errors import InputError
from .interaction import SessionObject, check_prompt
from .processing_samoe import VideoProcessor

KEPT_FRAMES = 32


class VideoSession(Sam2VideoInferenceSession):
    """A [`~transformers.Sam2VideoInferenceSession`] for videos of any length; it is used in the same way.

    Outputs and memories are kept of prompted frames, and of frames within `keep_frames` of a prompted frame or of the
    last one that was tracked. So tracking onward, or backward from a prompted frame, gives what a session that keeps
    all gives, and so does a correction up to `keep_frames` less the model's reach (16 for SAM 2) back. Farther back, a
    corrected frame reads less, and a prompt on a forgotten frame is taken as the object's first there.

    Args:
        frames: (H, W, 3) uint8 arrays of one size, each read when it is needed; None where frames are streamed.
        processor: prepares the frames.
        keep_frames: at least the model's reach.
        corrections_condition: whether prompts on tracked frames make conditioning frames of them, as SAM 2 is trained
            and as `sam2` does with `add_all_frames_to_correct_as_cond`. By default they do not, and a corrected frame
            is tracked anew when the video is propagated again.
        domain: whose experts a model with domains runs: a domain's name, None for the base model, or "auto" for what
            the gate decides on the frame that is segmented first. It can be set anew at any time.
        domain_interval: for videos whose look changes on the way: the gate decides anew after so many frames.
        kwargs: as in the base class: `inference_device`, `inference_state_device`, `dtype`, and
            `max_vision_features_cache_size`, so many frames (16 at most) are encoded at once, ahead of tracking.
    """

    def __init__(
        self,
        frames: Sequence[np.ndarray] | None = None,
        processor: VideoProcessor | None = None,
        *,
        keep_frames: int = KEPT_FRAMES,
        corrections_condition: bool = False,
        domain: str | None = AUTO,
        domain_interval: int | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ):
        if (frames is None) != (processor is None):
            raise InputError("`frames` and `processor` must be given together, or neither where frames are streamed.")
        if domain_interval is not None and domain_interval < 1:
            raise InputError(f"`domain_interval` must be at least 1 frame or None, got {domain_interval}.")
        if frames is not None:
            kwargs["video_height"], kwargs["video_width"] = frames[0].shape[:2]
        super().__init__(dtype=dtype, **kwargs)
        if frames is not None:
            self.processed_frames = PreparedFrames(frames, processor, self.inference_device, dtype)
        self.keep_frames, self.corrections_condition = keep_frames, corrections_condition
        self.domain, self.domain_interval = domain, domain_interval
        self.domain_decision: SessionDecision | None = None

    def add_new_frame(self, pixel_values: Tensor, frame_idx: int | None = None) -> int:
        """As in the base class, whose count of frames does not know of forgotten ones."""
        if frame_idx is None:
            frame_idx = max(self.processed_frames or [-1]) + 1
        return super().add_new_frame(pixel_values, frame_idx)

    def add_point_inputs(self, obj_idx: int, frame_idx: int, inputs: dict[str, Tensor]) -> None:
        """As in the base class.

        Raises:
            ValueError: see [`~interaction.check_prompt`].
        """
        super().add_point_inputs(obj_idx, frame_idx, inputs)
        self._check_prompt(obj_idx, frame_idx)

    def add_mask_inputs(self, obj_idx: int, frame_idx: int, inputs: Tensor) -> None:
        """As in the base class.

        Raises:
            ValueError: see [`~interaction.check_prompt`].
        """
        super().add_mask_inputs(obj_idx, frame_idx, inputs)
        self._check_prompt(obj_idx, frame_idx)

    def _check_prompt(self, obj_idx: int, frame_idx: int) -> None:
        if isinstance(self.processed_frames, PreparedFrames):  # streams are checked when they go on
            image_size = self.processed_frames.processor.target_size
            check_prompt(SessionObject(self, obj_idx), frame_idx, image_size, upcoming=False)

    def forget(self, frame_idx: int) -> None:
        """Drops what tracking does not reach again from frame `frame_idx`."""
        for row, outputs in self.output_dict_per_obj.items():
            bank, kept = outputs["state"].bank, outputs["non_cond_frame_outputs"]
            anchors = [frame_idx, *bank.conditioning]
            far = {t for t in kept if all(abs(t - anchor) > self.keep_frames for anchor in anchors)}
            for t in far.difference(SessionObject(self, row).prompted_frames):
                del kept[t]
                bank.tracked.pop(t, None)
                self.frames_tracked_per_obj[row].pop(t, None)
        if isinstance(self.processed_frames, dict):
            for t in [t for t in self.processed_frames if abs(t - frame_idx) > self.keep_frames]:
                del self.processed_frames[t]


class PreparedFrames(Mapping):
    """Frame index -> pixel values (3, S, S), prepared by the processor on each access."""

    def __init__(
        self,
        frames: Sequence[np.ndarray],
        processor: VideoProcessor,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.frames, self.processor, self.device, self.dtype = frames, processor, device, dtype

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self):
        return iter(range(len(self.frames)))

    def __contains__(self, frame_idx: object) -> bool:
        return isinstance(frame_idx, Integral) and 0 <= frame_idx < len(self.frames)

    def __getitem__(self, frame_idx: int) -> Tensor:
        if frame_idx not in self:
            raise KeyError(frame_idx)
        video = np.array(self.frames[frame_idx])[None]
        prepared = self.processor.video_processor(videos=video, device=self.device, return_tensors="pt")
        return prepared.pixel_values_videos[0, 0].to(self.dtype)
