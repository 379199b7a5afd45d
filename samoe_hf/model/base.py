"""The models that experts are put into, and what differs between them: SAM 2's video model and SAM 3's tracker.

Memory attention, memory encoder, prompt encoder and mask decoder of both are the same, down to the names of their
tensors. So all of the package is written for [`~transformers.Sam2VideoModel`], whose vision encoder may be either's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    PreTrainedConfig,
    ProcessorMixin,
    Sam2ImageProcessor,
    Sam2VideoConfig,
    Sam2VideoInferenceSession,
    Sam2VideoProcessor,
    Sam3ImageProcessor,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoInferenceSession,
    Sam3TrackerVideoProcessor,
    Sam3VideoConfig,
    Sam3ViTConfig,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)

# What transformers' processors start, of either base.
InferenceSession = Sam2VideoInferenceSession | Sam3TrackerVideoInferenceSession
# Levels of features that are read, the finest of which has so many positions per side for one of the coarsest.
NUM_LEVELS, FINEST_RATIO = 3, 4
# What tensors of the tracker may begin with in SAM 3's combined checkpoint, after `tracker_model.`, and in the tracker.
# The detector has the image encoder that both share; what else begins with `detector_model.` is its own.
TRACKER_PREFIX, DETECTOR_PREFIX = "tracker_model.", "detector_model."
SAM3_PREFIXES = {
    "tracker_neck.": "vision_encoder.neck.",
    "detector_model.vision_encoder.backbone.": "vision_encoder.backbone.",
}


@dataclass(frozen=True)
class Base:
    """What is particular to a base.

    `title`: what people call it. `tag`: on the Hub. `paper`: where it is described.
    `config_class`: of a model in transformers.
    `stride`: pixels per position of the coarsest features; None if it is the patch size of the backbone.
    `size_multiple`: what image sizes are multiples of; None for `stride`.
    `processor_class`, `image_processor_class`, `resample`, `image_mean` and `image_std`: how frames are prepared.
    `no_split_modules`: what FSDP shards one by one, and what is never split over devices.
    """

    title: str
    tag: str
    paper: str
    config_class: type[PreTrainedConfig]
    stride: int | None
    size_multiple: int | None
    processor_class: type[ProcessorMixin]
    image_processor_class: type[BaseImageProcessor]
    resample: PILImageResampling
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    no_split_modules: tuple[str, ...]


SAM2 = Base(
    title="SAM 2",
    tag="sam2",
    paper="https://arxiv.org/abs/2408.00714",
    config_class=Sam2VideoConfig,
    stride=16,
    size_multiple=32,
    processor_class=Sam2VideoProcessor,
    image_processor_class=Sam2ImageProcessor,
    resample=PILImageResampling.BICUBIC,
    image_mean=tuple(IMAGENET_DEFAULT_MEAN),
    image_std=tuple(IMAGENET_DEFAULT_STD),
    no_split_modules=("Sam2MultiScaleBlock", "Sam2VideoTwoWayAttentionBlock"),
)
SAM3 = Base(
    title="SAM 3's tracker",
    tag="sam3",
    paper="https://arxiv.org/abs/2511.16719",
    config_class=Sam3TrackerVideoConfig,
    stride=None,
    size_multiple=None,
    processor_class=Sam3TrackerVideoProcessor,
    image_processor_class=Sam3ImageProcessor,
    resample=PILImageResampling.BILINEAR,
    image_mean=tuple(IMAGENET_STANDARD_MEAN),
    image_std=tuple(IMAGENET_STANDARD_STD),
    no_split_modules=("Sam3ViTLayer", "Sam2VideoTwoWayAttentionBlock"),
)
# Types of models whose configurations are read.
MODEL_TYPES = (Sam2VideoConfig.model_type, Sam3TrackerVideoConfig.model_type, Sam3VideoConfig.model_type)


def base_of(config: PreTrainedConfig) -> Base:
    """The base that a model of this configuration has, which its vision encoder tells."""
    is_sam3 = isinstance(getattr(config.vision_config, "backbone_config", None), Sam3ViTConfig)
    return SAM3 if is_sam3 else SAM2


def feature_stride(config: PreTrainedConfig) -> int:
    """Pixels of the input per position of the coarsest features."""
    return base_of(config).stride or config.vision_config.backbone_config.patch_size


def mask_size(config: PreTrainedConfig) -> int:
    """Height and width of predicted masks, which is that of the finest features."""
    return FINEST_RATIO * (config.image_size // feature_stride(config))


def settings_of_base(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a base's own configuration stands for, without its `model_type`.

    Args:
        config_dict: the content of a `config.json` of one of `MODEL_TYPES`.
    """
    model_type = config_dict["model_type"]
    if model_type == Sam2VideoConfig.model_type:
        return {name: value for name, value in config_dict.items() if name != "model_type"}
    # Files leave out what is as in their own class, which has other defaults.
    is_combined_config = model_type == Sam3VideoConfig.model_type
    tracker = (config_dict.get("tracker_config") or {}) if is_combined_config else config_dict
    settings = Sam3TrackerVideoConfig.from_dict(dict(tracker)).to_dict()
    for name in ("prompt_encoder_config", "mask_decoder_config"):
        settings[name].pop("model_type", None)
    settings.pop("model_type")
    return settings


def config_of_base(config: PreTrainedConfig) -> PreTrainedConfig:
    """What a model's base is described by in transformers: its configuration without what is not known there."""
    base = base_of(config)
    config_class = base.config_class
    settings = {name: x for name, x in config.to_dict().items() if name in config_class.__dataclass_fields__}
    for name in ("prompt_encoder_config", "mask_decoder_config"):
        settings[name].pop("model_type", None)
    if base is SAM3:
        settings["vision_config"].pop("num_feature_levels", None)  # which SamoeConfig adds
    return config_class(**{**settings, "image_size": config.image_size})


def tracker_name(name: str) -> str | None:
    """What a tensor of SAM 3's combined checkpoint is called in the tracker; None for one of the detector's own."""
    while name.startswith(TRACKER_PREFIX):  # transformers also writes it twice, or before the other prefixes
        name = name.removeprefix(TRACKER_PREFIX)
    for prefix, replacement in SAM3_PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return None if name.startswith(DETECTOR_PREFIX) else name


def is_combined(names: Iterable[str]) -> bool:
    """Whether tensors are named as those of SAM 3's combined checkpoint, or of a tracker that was saved like it."""
    return any(tracker_name(name) != name for name in names)
