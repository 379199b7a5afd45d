"""The processor that prepares videos for a model."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor, Sam3TrackerVideoProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from .base import base_of, mask_size
from .base_model import SamoePreTrainedModel
from .configuration_samoe import SamoeConfig
from .errors import InputError

# The processors of the bases.
VideoProcessor = Sam2VideoProcessor | Sam3TrackerVideoProcessor
# Any of them means that a processor was saved.
PROCESSOR_FILES = (PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)


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
    processor = base.processor_class(image_processor, Sam2VideoVideoProcessor(**settings))
    assert isinstance(processor, VideoProcessor)
    return processor


def load_processor(source: str | os.PathLike, model: SamoePreTrainedModel) -> VideoProcessor:
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
    assert isinstance(processor, VideoProcessor)
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
