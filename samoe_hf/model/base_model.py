"""The modules of a SamoeModel and how its parameters are drawn: a base model's modules, with experts in its layers."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import Sam2VideoModel
from transformers import initialization as init
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMemoryAttention, Sam2VideoMemoryFuserCXBlock

from .base import base_of
from .base_interface import Base
from .base_modules import CachedPositionEncoding, ImageFeatures, MaskDecoder, rebuild
from .configuration_samoe import SamoeConfig
from .domain_experts import add_configured_experts
from .domain_gate import DomainGate, build_domain_gate
from .errors import InputError
from .expert_layer import DOMAIN_GATE, ExpertMixture
from .graphs import Graphs
from .kept import keep
from .losses import SegmentationLoss
from .memory_attention import MemoryAttention

# Parameters that are tokens or encodings of positions, of the model itself and of its backbone.
TOKEN_PARAMETERS = re.compile(
    r"no_\w+|memory_temporal_positional_encoding|occlusion_spatial_embedding_parameter|pos_embed\w*|position_embeddings"
)
# transformers takes PyTorch's initializers away, for all threads, while it builds a model to load; two threads at once
# would leave them away for good.
building = RLock()

T = TypeVar("T")


class FeatureCache(Protocol):
    """Where the features of a frozen encoder are kept."""

    def encode_frames(
        self, model: "SamoePreTrainedModel", pixel_values: Tensor, batch_size: int | None
    ) -> ImageFeatures:
        """Features of frames (rows, 3, S, S): those that are kept, and those that are encoded now."""
        ...


@dataclass
class ClipSettings:
    """How clips are computed in training. A trainer sets it as a whole.

    Attributes:
        loss: what is computed of each prediction.
        feature_cache: where a frozen encoder's features are kept.
        encoder_batch_size: frames that are encoded at once; None for all.
        checkpoint_every_n_frames: with gradient checkpointing, each n-th frame is computed again in the backward pass.
    """

    loss: SegmentationLoss = field(default_factory=SegmentationLoss)
    feature_cache: FeatureCache | None = None
    encoder_batch_size: int | None = None
    checkpoint_every_n_frames: int = 1


@dataclass
class Origin:
    """Where a model's weights come from.

    Attributes:
        source: what the base model can be loaded from again: "name_or_path", "revision", "subfolder" and
            "original_config"; None for a model that was made here.
        changed: names of tensors beside the experts' that are not the base model's, whether or not they are trainable.
        quantized: names of layers whose weights are quantized.
        commit: of the Hub repository that the model was loaded from; that of its base is in `source`.
        image_size: that of the configuration there; the model may take another.
        fingerprints: of tensors of the full base model, by their names and the type.
    """

    source: dict[str, str | None] | None = None
    changed: set[str] = field(default_factory=set)
    quantized: frozenset[str] = frozenset()
    commit: str | None = None
    image_size: int | None = None
    fingerprints: dict[tuple[frozenset[str], torch.dtype], str] = field(default_factory=dict)


class SamoePreTrainedModel(Sam2VideoModel):
    """A [`~transformers.Sam2VideoModel`] with this package's modules, over any base, and with experts in its layers."""

    config_class = SamoeConfig
    config: SamoeConfig
    mask_decoder: MaskDecoder
    memory_attention: MemoryAttention  # pyright: ignore[reportIncompatibleVariableOverride]
    domain_gate: DomainGate | None
    # Statistics of features, whatever the type of the features is.
    _keep_in_fp32_modules_strict = [DOMAIN_GATE]  # noqa: RUF012

    def __init__(self, config: SamoeConfig):
        config.check_experts()
        super().__init__(config)
        self.base.use_own_modules(self)
        self.mask_decoder = rebuild(self.mask_decoder, MaskDecoder, config.mask_decoder_config)
        self.memory_attention = MemoryAttention(self._modules["memory_attention"])
        for owner in (self.vision_encoder.get_submodule("neck"), self.memory_encoder):
            owner.add_module("position_encoding", CachedPositionEncoding(owner.get_submodule("position_encoding")))
        # What FSDP shards one by one, and what is never split over devices.
        self._no_split_modules = set(self.base.no_split_modules)
        self.expert_module_names = add_configured_experts(self, config)
        self.domain_gate = build_domain_gate(config)
        # SAM 2's image model has patterns for tensors of the video model, which here are expected or an error.
        self._keys_to_ignore_on_load_unexpected = set()
        self.origin = Origin()
        self.may_have_sleeping_experts = True
        # Those whose experts are new, unless somebody loads them.
        self.built_domains = set(config.domain_names)
        self.clip_settings = ClipSettings()
        self.gradient_checkpointing = False
        self._graphs: Graphs | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws a module's parameters as `sam2` does. From transformers' narrower draw the model hardly learns."""
        super()._init_weights(module)  # for buffers
        if isinstance(module, MemoryAttention):
            init.copy_(module.position_ids, Sam2VideoMemoryAttention.precompute_positions(self.config))
        if module is self:
            # A model of its own, whose modules transformers gives to its own `_init_weights`.
            for part in self.vision_encoder.modules():
                self._draw(part)
        self._draw(module)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(reset := getattr(module, "reset_parameters", None), Callable):
            reset()
        if isinstance(module, ExpertMixture) and not getattr(module.lora_A, "_is_hf_initialized", False):
            module.reset_experts()
        if isinstance(module, Sam2VideoMemoryFuserCXBlock):
            init.constant_(module.scale, self.config.memory_fuser_layer_scale_init_value)
        for name, parameter in module.named_parameters(recurse=False):
            if TOKEN_PARAMETERS.fullmatch(name):
                init.trunc_normal_(parameter, std=0.02)
        if module is self:
            # Points and image positions are encoded with one matrix.
            image, points = self.shared_image_embedding, self.prompt_encoder.shared_embedding
            init.copy_(points.positional_embedding, image.positional_embedding)

    def compile_for_tracking(self, **kwargs: Any) -> None:
        """Compiles a frame's work as two graphs: the image encoder, and from memory attention to memory encoder.

        The first frames are slow. Nothing is compiled again as memory fills or the number of objects changes, except
        between one object and several. Frames with prompts run uncompiled. In training each module is compiled by
        itself.

        `kwargs` are of [`torch.compile`], such as `mode="reduce-overhead"`. In modes with CUDA graphs, objects are
        filled up to 1, 2, 4, 8 ..., and memories to as many as there can be: one graph is recorded for each such number
        of objects. What it puts out is copied, since its next run overwrites it.

        Raises:
            InputError: if nothing can be compiled on the model's device, as without a compiler.
        """
        try:
            torch.compile(torch.neg, **kwargs)(torch.zeros(1, device=self.device))
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"`torch.compile` cannot compile for {self.device} here: {reason}") from error
        self._graphs = Graphs(kwargs)
        self.vision_encoder.compile(**kwargs)
        for part in (self.mask_decoder, self.memory_encoder, self.memory_attention):
            part.compile(dynamic=True, **kwargs)

    @property
    def graphs(self) -> Graphs | None:
        """What compiles a tracked frame, after [`compile_for_tracking`]; training runs compiled modules instead."""
        is_tracking = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        return self._graphs if is_tracking else None

    def get_image_wide_positional_embeddings(self) -> Tensor:
        """Encodings of positions for the mask decoder, (1, hidden, S / 16, S / 16)."""
        sources = [self.shared_image_embedding.positional_embedding]
        return keep("image positions", sources, super().get_image_wide_positional_embeddings)

    @property
    def base(self) -> Base:
        """What is particular to the model's base."""
        return base_of(self.config)

    @property
    def memory_selection(self) -> str:
        """Which memories a frame reads, see [`SamoeConfig`]."""
        return self.config.memory_selection or self.base.memory_selection

    def outlive_graphs(self, output: T) -> T:
        """What a compiled part puts out, copied where the next run of its CUDA graph would overwrite it."""
        return output if self._graphs is None or torch.compiler.is_compiling() else self._graphs.outlive(output)


def build_on_meta(
    config: SamoeConfig, with_experts: bool = True, cls: type[SamoePreTrainedModel] = SamoePreTrainedModel
) -> Sam2VideoModel:
    """A model, or the base model alone, without memory for its tensors; an `InputError` if none can be built."""
    kind = cls if with_experts else Sam2VideoModel
    try:
        with building, torch.device("meta"), init.no_init_weights():
            return kind(copy.deepcopy(config))
    except (RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"The configuration describes no model that can be built: {error}") from error
