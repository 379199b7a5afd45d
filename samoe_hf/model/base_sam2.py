"""SAM 2 as a base (arXiv:2408.00714): its configuration, its processor, and its image encoder."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2HieraDetConfig, Sam2ImageProcessor, Sam2VideoConfig, Sam2VideoModel, Sam2VideoProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.sam2.modeling_sam2 import (
    ALL_ATTENTION_FUNCTIONS,
    Sam2MultiScaleAttention,
    Sam2VisionNeck,
    eager_attention_forward,
)

from .base_interface import Base, VideoConfig
from .base_modules import rebuild


class MultiScaleAttention(Sam2MultiScaleAttention):
    """Attention within windows, (windows, height, width, channels), with pooled queries where a stage begins."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        batch_size, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch_size, height * width, 3, self.num_attention_heads, -1)
        query, key, value = qkv.unbind(2)
        if self.query_stride:
            query = query.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
            query = F.max_pool2d(query, self.query_stride).permute(0, 2, 3, 1)
            height, width = query.shape[1:3]
            query = query.reshape(batch_size, height * width, self.num_attention_heads, -1)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        implementation = self.config._attn_implementation or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended, _ = attend(
            self, query, key, value, attention_mask=None, is_causal=False, scaling=self.scale, **kwargs
        )
        return self.proj(attended.reshape(batch_size, height, width, -1))


class VisionNeck(Sam2VisionNeck):
    """SAM 2's feature pyramid, which encodes the positions of the coarsest level that the encoder hands on alone."""

    def forward(self, hidden_states: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        top = len(self.convs) - 1
        levels: list[Tensor] = []
        for index in range(top, -1, -1):
            conv = self.convs[top - index]
            lateral = conv(hidden_states[index].permute(0, 3, 1, 2).to(next(conv.parameters()).dtype))
            if levels and index in (self.fpn_top_down_levels or ()):
                above = F.interpolate(levels[-1].float(), scale_factor=2.0, mode="nearest")
                lateral = lateral + above.to(lateral.dtype)
            levels.append(lateral)
        coarse = levels[-self.config.num_feature_levels]
        return tuple(levels), (self.position_encoding(coarse.shape, coarse.device, coarse.dtype),)


class Sam2(Base):
    """What is particular to SAM 2."""

    def has(self, config: VideoConfig) -> bool:
        return True  # whatever encoder a Sam2VideoConfig may have that no other base recognizes

    def stride(self, config: VideoConfig) -> int:
        return 16

    def size_multiple(self, config: VideoConfig) -> int:
        return 32

    def encoder_sizes(self, config: VideoConfig, sizes: list[list[int]]) -> dict[str, tuple[Any, Any]]:
        vision = config.vision_config
        fields: dict[str, tuple[Any, Any]] = {
            "vision_config.fpn_padding": (vision.fpn_padding, vision.fpn_kernel_size // 2),
            "vision_config.fpn_stride": (vision.fpn_stride, 1),
        }
        if isinstance(vision.backbone_config, Sam2HieraDetConfig):
            given = [list(size) for size in vision.backbone_feature_sizes]
            fields["vision_config.backbone_feature_sizes"] = (given, sizes)
        return fields

    def use_own_modules(self, model: Sam2VideoModel) -> None:
        for module in list(model.vision_encoder.modules()):
            for name, child in list(module.named_children()):
                if type(child) is Sam2MultiScaleAttention:
                    arguments = (child.config, child.dim, child.dim_out, child.num_attention_heads, child.query_stride)
                    setattr(module, name, rebuild(child, MultiScaleAttention, *arguments))
                elif type(child) is Sam2VisionNeck:
                    setattr(module, name, rebuild(child, VisionNeck, child.config))


SAM2 = Sam2(
    title="SAM 2",
    tag="sam2",
    paper="https://arxiv.org/abs/2408.00714",
    config_class=Sam2VideoConfig,
    model_types=(Sam2VideoConfig.model_type,),
    processor_class=Sam2VideoProcessor,
    image_processor_class=Sam2ImageProcessor,
    resample=PILImageResampling.BICUBIC,
    image_mean=tuple(IMAGENET_DEFAULT_MEAN),
    image_std=tuple(IMAGENET_DEFAULT_STD),
    no_split_modules=("Sam2MultiScaleBlock", "Sam2VideoTwoWayAttentionBlock"),
)
