"""SAM 3's tracker as a base (arXiv:2511.16719), alone or beside the detector whose image encoder it shares."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import (
    PreTrainedConfig,
    Sam2VideoModel,
    Sam3ImageProcessor,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoProcessor,
    Sam3VideoConfig,
    Sam3ViTConfig,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling
from transformers.models.sam3.modeling_sam3 import Sam3VisionNeck

from .base_interface import NUM_LEVELS, Base, VideoConfig
from .base_modules import rebuild

# How names of the tracker's tensors begin in the combined checkpoint, after `tracker_model.`. The detector has the
# image encoder that both share; what else begins with `detector_model.` is its own.
TRACKER_PREFIX, DETECTOR_PREFIX = "tracker_model.", "detector_model."
PREFIXES = {
    "tracker_neck.": "vision_encoder.neck.",
    "detector_model.vision_encoder.backbone.": "vision_encoder.backbone.",
}


class Sam3Neck(Sam3VisionNeck):
    """SAM 3's feature pyramid, with the levels alone that its tracker reads, and the coarsest one's positions."""

    def forward(self, hidden_states: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        levels = tuple(layer(hidden_states) for layer in self.fpn_layers[:NUM_LEVELS])
        coarse = levels[-1]
        return levels, (self.position_encoding(coarse.shape, coarse.device, coarse.dtype),)


class Sam3(Base):
    """What is particular to SAM 3's tracker."""

    def has(self, config: VideoConfig) -> bool:
        return isinstance(getattr(config.vision_config, "backbone_config", None), Sam3ViTConfig)

    def stride(self, config: VideoConfig) -> int:
        return config.vision_config.backbone_config.patch_size

    def complete(self, config: VideoConfig) -> None:
        # SAM 3's encoder has one level more, for its detector.
        config.vision_config.num_feature_levels = NUM_LEVELS

    def encoder_sizes(self, config: VideoConfig, sizes: list[list[int]]) -> dict[str, tuple[Any, Any]]:
        vision = config.vision_config
        given = [list(size) for size in vision.backbone_feature_sizes]
        return {
            "vision_config.backbone_feature_sizes": (given, sizes),
            "vision_config.backbone_config.image_size": (vision.backbone_config.image_size, config.image_size),
            "vision_config.scale_factors": (list(vision.scale_factors)[:NUM_LEVELS], [4.0, 2.0, 1.0]),
        }

    def use_own_modules(self, model: Sam2VideoModel) -> None:
        neck = model.vision_encoder.get_submodule("neck")
        if type(neck) is Sam3VisionNeck:
            model.vision_encoder.add_module("neck", rebuild(neck, Sam3Neck, neck.config))

    def settings(self, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        is_combined = config_dict["model_type"] == Sam3VideoConfig.model_type
        tracker = (config_dict.get("tracker_config") or {}) if is_combined else config_dict
        return self.complete_settings(tracker)

    def own_config(self, settings: dict[str, Any]) -> PreTrainedConfig:
        settings["vision_config"].pop("num_feature_levels", None)
        return super().own_config(settings)

    def own_name(self, name: str) -> str | None:
        while name.startswith(TRACKER_PREFIX):  # transformers also writes it twice, or before the other prefixes
            name = name.removeprefix(TRACKER_PREFIX)
        for prefix, replacement in PREFIXES.items():
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        return None if name.startswith(DETECTOR_PREFIX) else name


SAM3 = Sam3(
    title="SAM 3's tracker",
    tag="sam3",
    paper="https://arxiv.org/abs/2511.16719",
    config_class=Sam3TrackerVideoConfig,
    model_types=(Sam3TrackerVideoConfig.model_type, Sam3VideoConfig.model_type),
    processor_class=Sam3TrackerVideoProcessor,
    image_processor_class=Sam3ImageProcessor,
    resample=PILImageResampling.BILINEAR,
    image_mean=tuple(IMAGENET_STANDARD_MEAN),
    image_std=tuple(IMAGENET_STANDARD_STD),
    no_split_modules=("Sam3ViTLayer", "Sam2VideoTwoWayAttentionBlock"),
    # With the combined checkpoint the processor of the video model was saved, whose parts are the tracker's.
    loads_own_processor=True,
    memory_selection="score",
)
