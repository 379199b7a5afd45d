"""The processor that prepares videos for a model."""

import os
from pathlib import Path

from transformers import (
    AutoProcessor,
    Sam2ImageProcessor,
    Sam2VideoModel,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from .configuration_samoe import SamoeConfig

# Any of them means that a processor was saved.
PROCESSOR_FILES = (PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)


def build_processor(config: SamoeConfig) -> Sam2VideoProcessor:
    """The processor that prepares videos as the original does: bicubic resize to a square, ImageNet's mean and std."""
    side, mask_side = config.image_size, config.image_size // 4
    settings = {
        "size": {"height": side, "width": side},
        "resample": PILImageResampling.BICUBIC,
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }
    image_processor = Sam2ImageProcessor(**settings, mask_size={"height": mask_side, "width": mask_side})
    return Sam2VideoProcessor(image_processor=image_processor, video_processor=Sam2VideoVideoProcessor(**settings))


def load_processor(source: str | os.PathLike, model: Sam2VideoModel) -> Sam2VideoProcessor:
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
    processor = AutoProcessor.from_pretrained(source)
    if not isinstance(processor, Sam2VideoProcessor):
        raise ValueError(f"{source}: its processor is a {type(processor).__name__}, expected a Sam2VideoProcessor.")
    sizes = [dict(part.size) for part in (processor.image_processor, processor.video_processor)]
    # That of coordinates.
    sizes.append({"height": processor.target_size, "width": processor.target_size})
    side = model.config.image_size
    for size in sizes:
        height, width = size.get("height"), size.get("width")
        if (height, width) != (side, side):
            raise ValueError(
                f"{source}: its processor makes frames of {height} x {width} pixels, but the model takes "
                f"{side} x {side}."
            )
    return processor
