"""The processor that prepares videos for a model."""

import operator
from typing import Any

import numpy as np
import transformers
from torch import Tensor
from transformers import Sam2VideoVideoProcessor

from .base import InferenceSession, base_of, mask_size
from .configuration_samoe import SamoeConfig
from .errors import InputError
from .prompts import fit_mask, read_mask

# The processors of the bases.
VideoProcessor = transformers.Sam2VideoProcessor | transformers.Sam3TrackerVideoProcessor


class CheckedPrompts:
    """What a processor of transformers takes without a word, is checked: ids become numbers, and masks 0 and 1."""

    target_size: int

    def add_inputs_to_inference_session(
        self,
        inference_session: InferenceSession,
        frame_idx: int,
        obj_ids: Any,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
        original_size: tuple[int, int] | None = None,
        clear_old_inputs: bool = True,
    ) -> InferenceSession:
        """Adds prompts to a session, as in [`~transformers.Sam2VideoProcessor`].

        Args:
            obj_ids: one or several, also as arrays or tensors of integers.
            input_masks: a mask (H, W) of the video's size, or one for each object, a list or (objects, H, W); see
                [`~prompts.read_mask`]. Those that are too small for the model's pixels keep one, see
                [`~prompts.fit_mask`].

        Raises:
            InputError: for ids that are no integers or not different, or masks of other values or another shape.
        """
        ids = _integers("obj_ids", obj_ids)
        if len(set(ids)) < len(ids):
            raise InputError(f"`obj_ids` must be different, got {ids}; give all of an object's points in one prompt.")
        if input_masks is not None:
            is_list = isinstance(input_masks, list | tuple)
            if not is_list and (np.ndim(input_masks) != 3 or len(input_masks) != len(ids)):
                input_masks = [input_masks]
            size = (inference_session.video_height, inference_session.video_width)
            masks = [_checked_mask(mask, size).to(inference_session.inference_device) for mask in input_masks]
            input_masks = [fit_mask(mask[(None,) * (4 - mask.dim())], self.target_size) for mask in masks]
        inputs = (input_points, input_labels, input_boxes, input_masks, original_size, clear_old_inputs)
        parent: Any = super()
        return parent.add_inputs_to_inference_session(
            inference_session, _integers("frame_idx", frame_idx)[0], ids, *inputs
        )


# Of their names, since they are saved as transformers' own, which load what they have saved.
class Sam2VideoProcessor(CheckedPrompts, transformers.Sam2VideoProcessor):
    """A [`~transformers.Sam2VideoProcessor`] that checks prompts."""


class Sam3TrackerVideoProcessor(CheckedPrompts, transformers.Sam3TrackerVideoProcessor):
    """A [`~transformers.Sam3TrackerVideoProcessor`] that checks prompts."""


OWN_CLASSES: dict[type, Any] = {own.__mro__[2]: own for own in (Sam2VideoProcessor, Sam3TrackerVideoProcessor)}


def _integers(name: str, values: Any) -> list[int]:
    """One or several integers of any kind as a list."""
    try:
        flat = np.asarray(values.cpu() if isinstance(values, Tensor) else values).reshape(-1).tolist()
        return [operator.index(value) for value in flat]
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` must be integers, got {values!r}.") from error


def _checked_mask(mask: Any, video_size: tuple[int | None, int | None]) -> Tensor:
    """A mask as a bool tensor; it must be of the video's proportions, or square as the model's input is."""
    mask = read_mask(mask)
    height, width = mask.shape[-2:] if 2 <= mask.dim() <= 4 else (0, 0)
    rows, columns = video_size[0] or height, video_size[1] or width  # a stream's size is not known yet
    is_fit = height == width or abs(height * columns - width * rows) <= max(rows, columns)
    if not height * width or not is_fit:
        raise InputError(
            f"`input_masks` must be of the video's size {video_size}, height and width, got {tuple(mask.shape)}."
        )
    return mask


def build_processor(config: SamoeConfig) -> VideoProcessor:
    """The processor that prepares videos as the base's original does: they are resized to a square and normalized."""
    base = base_of(config)
    settings: dict[str, Any] = {
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": base.resample,
        "image_mean": list(base.image_mean),
        "image_std": list(base.image_std),
    }
    masks: dict[str, Any] = {"mask_size": {"height": mask_size(config), "width": mask_size(config)}}
    image_processor = base.image_processor_class(**settings, **masks)
    return OWN_CLASSES[base.processor_class](image_processor, Sam2VideoVideoProcessor(**settings))
