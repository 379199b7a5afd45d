"""Bases whose memories are maps, as SAM 2's: a token for each place of the coarsest features."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2VideoModel

from .base_interface import Base, VideoConfig
from .errors import InputError


class MapBase(Base):
    """A base whose memories are maps."""

    def check_pooling(self, config: VideoConfig) -> None:
        sides = [int(side) for side in config.memory_attention_rope_feat_sizes]
        for name in ("recent_memory_pooling", "older_memory_pooling"):
            if any(side % getattr(config, name) for side in sides):
                raise InputError(
                    f"`{name}` must divide the sides of a memory's map, {sides}, got {getattr(config, name)}."
                )

    def memory_tokens(self, model: Sam2VideoModel, features: Tensor) -> Tensor:
        return features.flatten(2).mT

    def pool_memory(self, model: Sam2VideoModel, tokens: Tensor, pooling: int) -> Tensor:
        return tokens if pooling == 1 else _pooled(tokens.mT.unflatten(-1, _size(model)), pooling)

    def memory_positions(self, model: Sam2VideoModel, pooling: int, like: Tensor) -> Tensor:
        size = torch.Size((1, model.mem_dim, *_size(model)))
        return _pooled(model.memory_encoder.position_encoding(size, like.device, like.dtype), pooling)

    def memory_places(self, model: Sam2VideoModel, pooling: int) -> Tensor:
        places = model.memory_attention.position_ids
        return places if pooling == 1 else _pooled(places.T.unflatten(-1, _size(model)).float(), pooling)


def _size(model: Sam2VideoModel) -> tuple[int, ...]:
    return tuple(model.backbone_feature_sizes[-1])


def _pooled(maps: Tensor, side: int) -> Tensor:
    """Averages maps (..., channels, H, W) over squares: (..., tokens, channels)."""
    return F.avg_pool2d(maps, side).flatten(-2).mT
