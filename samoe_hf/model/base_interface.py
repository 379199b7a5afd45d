"""What a base model fills in. A base is a video model that experts are put into: SAM 2's, or SAM 3's tracker.

Memory encoder, prompt encoder, mask decoder and the attention to memories are the same, down to the names of their
tensors. So the package is written for [`~transformers.Sam2VideoModel`]. A base has its vision encoder, and says what
tokens a memory is kept as.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin, Sam2VideoModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from .errors import InputError

# Levels of features that are read. The finest has this many positions per side for one of the coarsest.
NUM_LEVELS, FINEST_RATIO = 3, 4

# Parts of a configuration that are written with a `model_type` of their own.
TYPED_PARTS = ("prompt_encoder_config", "mask_decoder_config")


class VideoConfig(Protocol):
    """What a base reads of a model's configuration. Its parts are of other classes in other bases."""

    image_size: int
    vision_config: Any
    prompt_encoder_config: Any
    mask_decoder_config: Any
    memory_attention_rope_feat_sizes: Any
    recent_memory_pooling: int
    older_memory_pooling: int

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Base(ABC):
    """What is particular to a base.

    Attributes:
        title, tag: what people call it, and its tag on the Hub.
        paper: where it is described.
        config_class: the configuration of the model in transformers.
        model_types: `model_type` of the configurations in transformers that it can be read from.
        processor_class, image_processor_class, resample, image_mean, image_std: how frames are prepared.
        no_split_modules: what FSDP shards one by one, and what is never split over devices.
        memory_selection: which memories a frame reads, unless the configuration says otherwise.
        loads_own_processor: whether a saved processor is loaded as `processor_class`, whatever it was saved as.
        memory_dtype: the type that memories are rounded to while tracking; None for none.
        quantized_class: the model that transformers quantizes, if it is not that of the configuration.
    """

    title: str
    tag: str
    paper: str
    config_class: type[PreTrainedConfig]
    model_types: tuple[str, ...]
    processor_class: type[ProcessorMixin]
    image_processor_class: type[BaseImageProcessor]
    resample: PILImageResampling
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    no_split_modules: tuple[str, ...]
    loads_own_processor: bool = False
    memory_selection: str = "recent"
    memory_dtype: torch.dtype | None = torch.bfloat16
    quantized_class: type[PreTrainedModel] | None = None

    @abstractmethod
    def has(self, config: VideoConfig) -> bool:
        """Whether a model of this configuration has this base."""

    @abstractmethod
    def stride(self, config: VideoConfig) -> int:
        """Pixels of the input per position of the coarsest features."""

    def size_multiple(self, config: VideoConfig) -> int:
        """Image sizes are multiples of this."""
        return self.stride(config)

    def complete(self, config: VideoConfig) -> None:  # noqa: B027  # most bases have nothing to add
        """Adds to a configuration what `Sam2VideoModel` asks for, and this base's configuration does not have."""

    @abstractmethod
    def encoder_sizes(self, config: VideoConfig, sizes: list[list[int]]) -> dict[str, tuple[Any, Any]]:
        """Fields of the encoder's configuration that shapes of weights do not tell: name -> (value, expected).

        `sizes` are height and width of each level of features, from fine to coarse.
        """

    @abstractmethod
    def use_own_modules(self, model: Sam2VideoModel) -> None:
        """Puts the base's and this package's modules into a model that transformers has built."""

    # What a memory is kept as: here a map, with a token for each place of the coarsest features. Tokens may be averaged
    # over squares with `pooling` of them a side.

    def check_pooling(self, config: VideoConfig) -> None:
        """Raises an `InputError` where memories of this base cannot be pooled as the configuration says."""
        sides = [int(side) for side in config.memory_attention_rope_feat_sizes]
        for name in ("recent_memory_pooling", "older_memory_pooling"):
            if any(side % getattr(config, name) for side in sides):
                raise InputError(
                    f"`{name}` must divide the sides of a memory's map, {sides}, got {getattr(config, name)}."
                )

    def memory_tokens(self, model: Sam2VideoModel, features: Tensor) -> Tensor:
        """What is kept of the memory encoder's output (objects, channels, H, W): (objects, tokens, channels)."""
        return features.flatten(2).mT

    def pool_memory(self, model: Sam2VideoModel, tokens: Tensor, pooling: int) -> Tensor:
        """Averages the tokens of memories (objects, tokens, channels)."""
        return tokens if pooling == 1 else _pooled(tokens.mT.unflatten(-1, _size(model)), pooling)

    def memory_positions(self, model: Sam2VideoModel, pooling: int, like: Tensor) -> Tensor:
        """Encodes the places of a memory's tokens, (1, tokens, channels), in the type and on the device of `like`."""
        size = torch.Size((1, model.mem_dim, *_size(model)))
        return _pooled(model.memory_encoder.position_encoding(size, like.device, like.dtype), pooling)

    def memory_places(self, model: Sam2VideoModel, pooling: int) -> Tensor:
        """Column and row in the image by which a memory's tokens are rotated, (tokens, 2). At (0, 0) none is."""
        places = model.memory_attention.position_ids
        return places if pooling == 1 else _pooled(places.T.unflatten(-1, _size(model)).float(), pooling)

    def settings(self, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a configuration of one of `model_types` stands for, without its `model_type`."""
        return {name: value for name, value in config_dict.items() if name != "model_type"}

    def complete_settings(self, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The same, where `config_class` has other defaults than SAM 2's, which files leave out."""
        settings = self.config_class.from_dict(dict(config_dict)).to_dict()
        for name in TYPED_PARTS:
            settings[name].pop("model_type", None)
        settings.pop("model_type")
        return settings

    def own_config(self, settings: dict[str, Any]) -> PreTrainedConfig:
        """The configuration of the base alone, as transformers knows it, from a SamoeConfig's settings."""
        return self.config_class(**settings)

    def own_name(self, name: str) -> str | None:
        """What a tensor of this name in a checkpoint is called in the model; None for one that is not the model's."""
        return name


def _size(model: Sam2VideoModel) -> tuple[int, ...]:
    return tuple(model.backbone_feature_sizes[-1])


def _pooled(maps: Tensor, side: int) -> Tensor:
    """Averages maps (..., channels, H, W) over squares: (..., tokens, channels)."""
    return F.avg_pool2d(maps, side).flatten(-2).mT
