"""The processor that prepares videos for a model."""

import os
from pathlib import Path
from typing import Any, Protocol

from transformers import (
    AutoProcessor,
    Sam2VideoModel,
    Sam2VideoVideoProcessor,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from .base import base_of, mask_size
from .configuration_samoe import SamoeConfig
from .errors import InputError

# Any of them means that a processor was saved.
PROCESSOR_FILES = (PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)


class VideoProcessor(Protocol):
    """What the processors of SAM 2 and SAM 3 have in common."""

    image_processor: Any
    video_processor: Any
    target_size: int

    def init_video_session(self, *args: Any, **kwargs: Any) -> Any: ...

    def add_inputs_to_inference_session(self, *args: Any, **kwargs: Any) -> Any: ...

    def post_process_masks(self, *args: Any, **kwargs: Any) -> Any: ...

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any: ...


def build_processor(config: SamoeConfig) -> VideoProcessor:
    """The processor that prepares videos as the base's original does.

    Returns:
        for SAM 2 a [`~transformers.Sam2VideoProcessor`]: bicubic resize to a square, ImageNet's mean and std.
        For SAM 3 a [`~transformers.Sam3TrackerVideoProcessor`]: bilinear resize to a square, mean and std of 0.5.
    """
    base = base_of(config)
    settings = {
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": base.resample,
        "image_mean": list(base.image_mean),
        "image_std": list(base.image_std),
    }
    masks = {"height": mask_size(config), "width": mask_size(config)}
    image_processor = base.image_processor_class(**settings, mask_size=masks)
    return base.processor_class(image_processor=image_processor, video_processor=Sam2VideoVideoProcessor(**settings))


def load_processor(source: str | os.PathLike, model: Sam2VideoModel) -> VideoProcessor:
    """The processor saved with a model; `build_processor`'s for an original checkpoint, or where none was saved.

    Args:
        source: the file, folder or Hub id that `model` was loaded from.

    Raises:
        ValueError: if the saved processor is of another kind, or prepares frames of another size than the model takes.
    """
    if Path(source).is_file() or not any(
        cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES
    ):
        return build_processor(model.config)
    base = base_of(model.config)
    expected = base.processor_class
    processor = (expected if base.loads_own_processor else AutoProcessor).from_pretrained(source)
    if not isinstance(processor, expected):
        raise InputError(f"{source}: its processor is a {type(processor).__name__}, expected a {expected.__name__}.")
    sizes = [dict(part.size) for part in (processor.image_processor, processor.video_processor)]
    # That of coordinates.
    sizes.append({"height": processor.target_size, "width": processor.target_size})
    side = model.config.image_size
    for size in sizes:
        height, width = size.get("height"), size.get("width")
        if (height, width) != (side, side):
            raise InputError(
                f"{source}: its processor makes frames of {height} x {width} pixels, but the model takes "
                f"{side} x {side}."
            )
    return processor
