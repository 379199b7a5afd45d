"""From a video and prompts to masks at the video's size, with any processor and session of transformers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Sam2VideoProcessor

from .model.modeling_samoe import SamoeModel
from .model.session import VideoSession


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While the context is open, the model is in evaluation mode. Each module's own mode is restored at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training != training:
                module.training = training


@dataclass
class VideoPrompt:
    """What is given of one object on one frame, in pixels of the video: points and a box, or a mask.

    `points` holds (x, y) and `labels` 1 (positive) or 0 (negative) for each; `box` is (x0, y0, x1, y1); `mask` is
    (H, W) bool.
    """

    object_id: int
    frame_idx: int = 0
    points: Sequence[tuple[float, float]] = ()
    labels: Sequence[int] = ()
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | None = None

    def inputs(self) -> dict:
        """The prompt as arguments of `Sam2VideoProcessor.add_inputs_to_inference_session`."""
        if self.mask is not None:
            return {"input_masks": self.mask}
        inputs = {}
        if self.points:
            inputs["input_points"] = [[[list(point) for point in self.points]]]
            inputs["input_labels"] = [[list(self.labels)]]
        if self.box is not None:
            inputs["input_boxes"] = [[list(self.box)]]
        return inputs


class TrackedFrame(NamedTuple):
    """Masks of one frame at the video's size: `logits` (objects, H, W), rows in the order of `object_ids`."""

    frame_idx: int
    object_ids: list[int]
    logits: Tensor

    def id_map(self) -> np.ndarray:
        """Each pixel's object, that of the largest positive logit, or 0: (H, W)."""
        best, row = self.logits.max(dim=0)
        ids = torch.tensor(self.object_ids, device=row.device)[row]
        return torch.where(best > 0, ids, 0).cpu().numpy()


def track_video(
    model: SamoeModel,
    processor: Sam2VideoProcessor,
    frames: Sequence[np.ndarray],
    prompts: Sequence[VideoPrompt],
    show_progress_bar: bool = False,
) -> Iterator[TrackedFrame]:
    """Tracks prompted objects through a whole video: onward from the first prompted frame, then back to the start.

    Args:
        frames: (H, W, 3) uint8 arrays of one size, each read when it is tracked.
        prompts: at least one; several for the same object on the same frame must be given as one.

    Raises:
        ValueError: for no prompts, or a prompt outside the video.
    """
    if not prompts:
        raise ValueError("`prompts` is empty; at least one point, box or mask is needed.")
    session = VideoSession(frames, processor, inference_device=model.device, dtype=model.dtype)
    size = (session.video_height, session.video_width)
    for prompt in prompts:
        if not 0 <= prompt.frame_idx < len(frames):
            raise ValueError(f"`frame_idx` must be from 0 to {len(frames) - 1}, got {prompt.frame_idx}.")
        if prompt.mask is not None and prompt.mask.shape != size:
            raise ValueError(f"`mask` must be of the video's size {size}, got {prompt.mask.shape}.")
        processor.add_inputs_to_inference_session(session, prompt.frame_idx, prompt.object_id, **prompt.inputs())
    first = min(prompt.frame_idx for prompt in prompts)
    for reverse in (False, True):
        for output in model.propagate_in_video_iterator(
            session, start_frame_idx=first, reverse=reverse, show_progress_bar=show_progress_bar
        ):
            if reverse and output.frame_idx == first:
                continue
            logits = processor.post_process_masks([output.pred_masks], [size], binarize=False)[0][:, 0]
            yield TrackedFrame(output.frame_idx, output.object_ids, logits)
