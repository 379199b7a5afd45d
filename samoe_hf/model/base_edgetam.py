"""EdgeTAM as a base (arXiv:2501.07256): SAM 2 with a RepViT encoder of `timm`, and memories of few tokens.

A perceiver makes latents of the memory encoder's map, which are kept in its stead: some look at the whole map and have
no place, the others look at a window each, and are where that is.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EdgeTamVideoConfig,
    EdgeTamVisionConfig,
    Sam2ImageProcessor,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VideoProcessor,
)
from transformers import initialization as init
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.models.edgetam_video.modeling_edgetam_video import (
    EdgeTamVideoMemoryAttention,
    EdgeTamVideoMemoryAttentionLayer,
    EdgeTamVideoModel,
    EdgeTamVideoPerceiverResampler,
)
from transformers.utils import is_timm_available

from .base_interface import Base, VideoConfig
from .base_modules import CachedPositionEncoding, rebuild
from .base_sam2 import VisionNeck
from .errors import InputError

# What EdgeTAM's configuration has and SAM 2's has not, and what SAM 2's calls otherwise.
OWN_FIELDS = EdgeTamVideoConfig.__dataclass_fields__.keys() - Sam2VideoConfig.__dataclass_fields__.keys()
SAM2_FIELDS = {f"memory_attention_feed_forward_hidden_{x}": f"memory_attention_mlp_hidden_{x}" for x in ("size", "act")}
# timm opens files and repositories that names and arguments tell it to: these tell of sizes alone.
ARCHITECTURE = re.compile(r"(timm/)?repvit_\w+(\.\w+)?", re.ASCII)
ENCODER_SETTINGS = ("in_chans", "features_only", "out_indices", "embed_dim", "depth", "mlp_ratio", "kernel_size")


class MemoryAttentionLayer(EdgeTamVideoMemoryAttentionLayer):
    """A layer whose feed-forward network has its tensors' names from EdgeTAM, and the parts' names from SAM 2."""

    linear1 = property(lambda self: self.mlp.up_proj)
    linear2 = property(lambda self: self.mlp.down_proj)
    activation = property(lambda self: self.mlp.act_fn)
    dropout = property(lambda self: self.mlp.dropout)


class FixedBatchNorm(nn.BatchNorm2d):
    """A batch norm with the statistics that it was loaded with, also in training: frames of a clip are hardly a sample,
    and what a frame's features are must not depend on the frames beside it."""

    def train(self, mode: bool = True) -> "FixedBatchNorm":
        return super().train(False)

    def reset_running_stats(self) -> None:
        # As transformers initializes: not what was loaded.
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None and variance is not None and count is not None
        init.zeros_(mean), init.ones_(variance), init.zeros_(count)


class Perceiver(EdgeTamVideoPerceiverResampler):
    """The perceiver for a batch of objects; transformers' takes one."""

    def forward(self, features: Tensor, position: Tensor) -> Tensor:
        """Makes tokens (objects, tokens, channels) of maps and encodings of places, (objects, channels, H, W) each."""
        objects, side = features.shape[0], math.isqrt(self.num_latents_2d)
        whole, position = features.flatten(2).mT, position.flatten(2).mT
        windows = features.unflatten(3, (side, -1)).unflatten(2, (side, -1)).permute(0, 2, 4, 3, 5, 1)
        windows = windows.flatten(3, 4).flatten(0, 2)
        of_map, of_windows = self.latents_1d.expand(objects, -1, -1), self.latents_2d.repeat(objects, 1).unsqueeze(1)
        for layer in self.layers:
            of_map, of_windows = layer(of_map, whole, position), layer(of_windows, windows)
        return self.layer_norm(torch.cat([of_map, of_windows.unflatten(0, (objects, -1)).squeeze(2)], dim=1))


class QuantizedEdgeTam(EdgeTamVideoModel):
    """EdgeTAM with an answer to what torchao is asked of every model: which layer embeds its inputs."""

    def get_input_embeddings(self) -> nn.Module:
        return self.shared_image_embedding


class EdgeTam(Base):
    """What is particular to EdgeTAM."""

    def has(self, config: VideoConfig) -> bool:
        return isinstance(config.vision_config, EdgeTamVisionConfig)

    def stride(self, config: VideoConfig) -> int:
        return 16

    def size_multiple(self, config: VideoConfig) -> int:
        return math.lcm(32, 16 * _windows(config))

    def complete(self, config: VideoConfig) -> None:
        if not is_timm_available():
            raise ImportError("EdgeTAM's encoder is a model of timm: `pip install samoe_hf[edgetam]`.")
        values = {name: getattr(config, name) for name in OWN_FIELDS if hasattr(config, name)}
        checked = EdgeTamVideoConfig(**values)
        for name in OWN_FIELDS:
            setattr(config, name, getattr(checked, name))
        for theirs, own in SAM2_FIELDS.items():
            setattr(config, theirs, getattr(checked, own))
        for name in ("perceiver_resampler_num_latents", "perceiver_resampler_num_latents_2d"):
            if getattr(checked, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(checked, name)}.")
        backbone = config.vision_config.backbone_config
        architecture, settings = getattr(backbone, "architecture", None), getattr(backbone, "model_args", None) or {}
        if not ARCHITECTURE.fullmatch(str(architecture)):
            raise InputError(
                f"`vision_config.backbone_config.architecture` must be a RepViT of timm, got {architecture!r}."
            )
        if unknown := sorted(settings.keys() - {*ENCODER_SETTINGS}):
            raise InputError(
                f"`vision_config.backbone_config.model_args` has {unknown[0]!r}; "
                f"expected some of {', '.join(ENCODER_SETTINGS)}."
            )

    def encoder_sizes(self, config: VideoConfig, sizes: list[list[int]]) -> dict[str, tuple[Any, Any]]:
        vision, own = config.vision_config, vars(config)
        perceiver = {name: own[f"perceiver_resampler_{name}"] for name in ("hidden_size", "num_latents_2d")}
        heads, windows = own["perceiver_resampler_num_attention_heads"], _windows(config)
        head_dim, width = own["perceiver_resampler_attention_head_dim"], own["memory_encoder_output_channels"]
        return {
            "vision_config.fpn_padding": (vision.fpn_padding, vision.fpn_kernel_size // 2),
            "vision_config.fpn_stride": (vision.fpn_stride, 1),
            "vision_config.backbone_feature_sizes": ([list(size) for size in vision.backbone_feature_sizes], sizes),
            "memory_attention_rope_k_sizes": (list(own["memory_attention_rope_k_sizes"]), [windows, windows]),
            "perceiver_resampler_num_latents_2d": (perceiver["num_latents_2d"], windows**2),
            "perceiver_resampler_hidden_size": (perceiver["hidden_size"], width),
            "perceiver_resampler_attention_head_dim": (head_dim, width // heads),
        }

    def use_own_modules(self, model: Sam2VideoModel) -> None:
        config: Any = model.config
        layers = (MemoryAttentionLayer(config) for _ in range(config.memory_attention_num_layers))
        model.memory_attention.layers = nn.ModuleList(layers)
        perceiver = Perceiver(config)
        perceiver.add_module("positional_encoding", CachedPositionEncoding(perceiver.positional_encoding))
        model.add_module("spatial_perceiver", perceiver)
        encoder = model.vision_encoder
        encoder._input_embed_layer = "backbone"  # PEFT asks every model what embeds its inputs
        encoder.add_module("neck", rebuild(encoder.get_submodule("neck"), VisionNeck, config.vision_config))
        for module in list(encoder.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.BatchNorm2d:
                    setattr(module, name, rebuild(child, FixedBatchNorm, child.num_features, child.eps))

    def check_pooling(self, config: VideoConfig) -> None:
        for name in ("recent_memory_pooling", "older_memory_pooling"):
            if (side := getattr(config, name)) != 1:
                raise InputError(
                    f"`{name}` must be 1, got {side}: EdgeTAM's memories are latents already, and no maps to average."
                )

    def memory_tokens(self, model: Sam2VideoModel, features: Tensor) -> Tensor:
        position = model.memory_encoder.position_encoding(features.shape, features.device, features.dtype)
        return model.get_submodule("spatial_perceiver")(features, position)

    def pool_memory(self, model: Sam2VideoModel, tokens: Tensor, pooling: int) -> Tensor:
        return tokens

    def memory_positions(self, model: Sam2VideoModel, pooling: int, like: Tensor) -> Tensor:
        perceiver: Any = model.get_submodule("spatial_perceiver")
        side = _windows(model.config)
        size = torch.Size((1, model.mem_dim, side, side))
        of_windows = perceiver.positional_encoding(size, like.device, like.dtype).flatten(2).mT
        return torch.cat([like.new_zeros(1, perceiver.num_latents_1d, model.mem_dim), of_windows], dim=1)

    def memory_places(self, model: Sam2VideoModel, pooling: int) -> Tensor:
        config: Any = model.config
        of_windows = EdgeTamVideoMemoryAttention.precompute_positions(config, is_key=True)
        return torch.cat([of_windows.new_zeros(config.perceiver_resampler_num_latents, 2), of_windows])

    def settings(self, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        return self.complete_settings(config_dict)


def _windows(config: Any) -> int:
    """Windows a side of a map, each of which has a latent."""
    return math.isqrt(config.perceiver_resampler_num_latents_2d)


EDGETAM = EdgeTam(
    title="EdgeTAM",
    tag="edgetam",
    paper="https://arxiv.org/abs/2501.07256",
    config_class=EdgeTamVideoConfig,
    model_types=(EdgeTamVideoConfig.model_type,),
    processor_class=Sam2VideoProcessor,
    image_processor_class=Sam2ImageProcessor,
    resample=PILImageResampling.BICUBIC,
    image_mean=tuple(IMAGENET_DEFAULT_MEAN),
    image_std=tuple(IMAGENET_DEFAULT_STD),
    no_split_modules=("TimmWrapperModel", "Sam2VideoTwoWayAttentionBlock"),
    # transformers keeps memories as they are.
    memory_dtype=None,
    quantized_class=QuantizedEdgeTam,
)
