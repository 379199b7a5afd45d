"""The processor that prepares videos for a model."""

import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoProcessor, Sam2VideoVideoProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file
from transformers.utils import logging as transformers_logging

from .base import InferenceSession, base_of, mask_size
from .base_model import SamoePreTrainedModel
from .configuration_samoe import SamoeConfig
from .errors import InputError
from .prompts import read_mask
from .weights_files import fetch_file

# As loud as transformers is told to be.
logger = transformers_logging.get_logger(f"transformers.{__name__}")

# The processors of the bases.
VideoProcessor = transformers.Sam2VideoProcessor | transformers.Sam3TrackerVideoProcessor
# Any of them means that a processor was saved.
PROCESSOR_FILES = (PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
# How far apart black and white lie at least in normalized frames, and the largest value there.
LEAST_CONTRAST, LARGEST_VALUE = 0.5, 50


class CheckedPrompts:
    """What a processor of transformers takes without a word, is checked: ids become numbers, and masks bool."""

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
            input_masks: a mask (H, W) of the video's size, or one for each object; see [`~prompts.read_mask`].

        Raises:
            InputError: for ids that are no integers, or masks of other values or another shape.
        """
        ids = _integers("obj_ids", obj_ids)
        if input_masks is not None:
            input_masks = list(input_masks) if isinstance(input_masks, list | tuple) else [input_masks]
            size = (inference_session.video_height, inference_session.video_width)
            input_masks = [_checked_mask(mask, size) for mask in input_masks]
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
    height, width = mask.shape[-2:] if mask.dim() >= 2 else (0, 0)
    rows, columns = video_size[0] or height, video_size[1] or width  # a stream's size is not known yet
    is_fit = height == width or abs(height * columns - width * rows) <= max(rows, columns)
    if not height * width or not is_fit:
        raise InputError(
            f"`input_masks` must be of the video's size {video_size}, height and width, got {tuple(mask.shape)}."
        )
    return mask


def build_processor(config: SamoeConfig) -> VideoProcessor:
    """The processor that prepares videos as the base's original does.

    Returns:
        for SAM 2 a [`~transformers.Sam2VideoProcessor`]: bicubic resize to a square, ImageNet's mean and std.
        For SAM 3 a [`~transformers.Sam3TrackerVideoProcessor`]: bilinear resize to a square, mean and std of 0.5.
    """
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


def load_processor(source: str | os.PathLike, model: SamoePreTrainedModel) -> VideoProcessor:
    """The processor saved with a model; `build_processor`'s for an original checkpoint, or where none was saved.

    Of a model that was loaded for another `image_size`, it prepares frames of that size.

    Args:
        source: the file, folder or Hub id that `model` was loaded from.

    Raises:
        ValueError: if the saved processor is of another kind, or prepares frames of another size than the model takes.
    """
    if Path(source).is_file() or not any(
        cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES
    ):
        if not Path(source).exists():
            try:
                fetch_file(source, PROCESSOR_NAME, {})
            except OSError as error:
                logger.warning(f"{error} Frames are prepared as its base's are, as if it had none.")
        return build_processor(model.config)
    base = base_of(model.config)
    expected = base.processor_class
    loader: Any = expected if base.loads_own_processor else AutoProcessor
    try:
        processor = loader.from_pretrained(source, trust_remote_code=False)
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{source}: its processor cannot be read: {error}") from error
    if not isinstance(processor, expected):
        raise InputError(f"{source}: its processor is a {type(processor).__name__}, expected a {expected.__name__}.")
    assert isinstance(processor, VideoProcessor)
    parts = (processor.image_processor, processor.video_processor)
    sizes = [dict(part.size) for part in parts]
    # That of coordinates.
    sizes.append({"height": processor.target_size, "width": processor.target_size})
    side = model.config.image_size
    saved_side = model.origin.image_size or side
    for size in sizes:
        height, width = size.get("height"), size.get("width")
        if (height, width) != (saved_side, saved_side):
            raise InputError(
                f"{source}: its processor makes frames of {height} x {width} pixels, but the model takes "
                f"{saved_side} x {saved_side}."
            )
    for part in parts:
        part.size = type(part.size)(height=side, width=side)
    processor.image_processor.mask_size = {"height": mask_size(model.config), "width": mask_size(model.config)}
    _check_prepared_frames(source, processor, side)
    return OWN_CLASSES[expected](*parts, side, processor.point_pad_value)


def _check_prepared_frames(source: Any, processor: VideoProcessor, side: int) -> None:
    """Prepares a black and a white frame, and refuses a processor that makes of them what no model can use."""
    frames = np.stack([np.zeros((24, 32, 3), np.uint8), np.full((24, 32, 3), 255, np.uint8)])
    try:
        videos = processor.video_processor(videos=frames, return_tensors="pt").pixel_values_videos[0]
        images = processor.image_processor(images=[*frames], return_tensors="pt").pixel_values
        prepared = [torch.as_tensor(videos), torch.as_tensor(images)]
    except Exception as error:  # whatever its settings lead to
        raise InputError(f"{source}: its processor cannot prepare a frame: {error}") from error
    for black, white in prepared:
        is_fit = black.shape == white.shape == (3, side, side) and black.isfinite().all() and white.isfinite().all()
        contrast = (white - black).flatten(1) if is_fit else torch.zeros(1, 1)
        largest = max(black.abs().max(), white.abs().max())
        if not (is_fit and contrast.min() >= LEAST_CONTRAST and largest <= LARGEST_VALUE):
            raise InputError(
                f"{source}: its processor makes of a black and a white frame values from {black.min():g} to "
                f"{white.max():g} of shape {tuple(black.shape)}; expected normalized frames of {(3, side, side)}. "
                "Its `do_resize`, `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean` and `image_std` say how."
            )
