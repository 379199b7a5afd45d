"""The base models that experts can be put into, and which of them a configuration or a checkpoint is of.

A further base is a file like `base_sam3.py` and an entry in `BASES`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import (
    EdgeTamVideoInferenceSession,
    PreTrainedConfig,
    Sam2VideoInferenceSession,
    Sam3TrackerVideoInferenceSession,
)

from .base_edgetam import EDGETAM
from .base_interface import FINEST_RATIO, TYPED_PARTS, Base, VideoConfig
from .base_sam2 import SAM2
from .base_sam3 import SAM3
from .errors import InputError

# The first one that recognizes a configuration is its base; SAM 2 takes what is left.
BASES = (SAM3, EDGETAM, SAM2)
# transformers' sessions, of any base.
InferenceSession = Sam2VideoInferenceSession | Sam3TrackerVideoInferenceSession | EdgeTamVideoInferenceSession
# Types of models whose configurations are read.
MODEL_TYPES = {model_type: base for base in BASES for model_type in base.model_types}


def base_of(config: VideoConfig) -> Base:
    """The base of a model of this configuration."""
    return next(base for base in BASES if base.has(config))


def check_base(config: VideoConfig, expected: Base) -> None:
    """Raises `InputError` where a model of this configuration has another base."""
    if (base := base_of(config)) is not expected:
        raise InputError(f"The model's base is {base.title}; expected {expected.title}.")


def mask_size(config: VideoConfig) -> int:
    """Height and width of predicted masks, which is that of the finest features."""
    return FINEST_RATIO * (config.image_size // base_of(config).stride(config))


def settings_of_base(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a base's own configuration, the content of its `config.json`, stands for."""
    return MODEL_TYPES[config_dict["model_type"]].settings(config_dict)


def config_of_base(config: VideoConfig) -> PreTrainedConfig:
    """The configuration of a model's base alone, as transformers knows it."""
    base = base_of(config)
    settings = {name: x for name, x in config.to_dict().items() if name in base.config_class.__dataclass_fields__}
    for name in TYPED_PARTS:
        settings[name].pop("model_type", None)
    return base.own_config({**settings, "image_size": config.image_size})


def needs_renaming(base: Base, names: Iterable[str]) -> bool:
    """Whether tensors of a checkpoint have other names than the model's, as in SAM 3's combined checkpoint."""
    return any(base.own_name(name) != name for name in names)
