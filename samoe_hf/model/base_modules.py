"""Modules of transformers' SAM 2 and 3 without work whose result nobody reads; the numbers that are read are the same.

- SAM 2's image encoder's attention also multiplies queries with keys position by position, and drops the result.
- Necks encode the positions of all levels, of which only the coarsest are read. SAM 3's makes one level more.
- The mask decoder copies an image's features for each of its prompts, even if there is but one.
- Few channels of large maps are normalized by a kernel for many.
- Encodings and angles of positions are computed anew for each frame and memory, though they are always the same.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers import Sam2VideoModel
from transformers.models.sam2.modeling_sam2 import (
    ALL_ATTENTION_FUNCTIONS,
    Sam2MultiScaleAttention,
    Sam2VisionNeck,
    do_pool,
    eager_attention_forward,
)
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoLayerNorm, Sam2VideoMaskDecoder
from transformers.models.sam3.modeling_sam3 import Sam3VisionNeck

from .base import NUM_LEVELS
from .configuration_samoe import SamoeConfig
from .domain_experts import add_configured_experts
from .domain_gate import add_domain_gate
from .errors import InputError

# So few channels are normalized one by one.
FEW_CHANNELS = 4
# Modes of `torch.compile` that record CUDA graphs.
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class LeanMultiScaleAttention(Sam2MultiScaleAttention):
    """Attention within windows, (windows, height, width, channels), with pooled queries where a stage begins."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        batch_size, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch_size, height * width, 3, self.num_attention_heads, -1)
        query, key, value = qkv.unbind(2)
        if self.query_stride:
            query = do_pool(query.reshape(batch_size, height, width, -1), self.query_stride)
            height, width = query.shape[1:3]
            query = query.reshape(batch_size, height * width, self.num_attention_heads, -1)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended, _ = attend(
            self, query, key, value, attention_mask=None, is_causal=False, scaling=self.scale, **kwargs
        )
        return self.proj(attended.reshape(batch_size, height, width, -1))


class LeanNeck(Sam2VisionNeck):
    """The feature pyramid; of the position encodings it gives the coarsest level's alone."""

    def forward(self, hidden_states: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        top = len(self.convs) - 1
        levels: list[Tensor] = []
        for index in range(top, -1, -1):
            conv = self.convs[top - index]
            lateral = conv(hidden_states[index].permute(0, 3, 1, 2).to(conv.weight.dtype))
            if levels and index in self.fpn_top_down_levels:
                above = F.interpolate(levels[-1].float(), scale_factor=2.0, mode="nearest")
                lateral = lateral + above.to(lateral.dtype)
            levels.append(lateral)
        coarse = levels[self._coarsest]
        return tuple(levels), (self.position_encoding(coarse.shape, coarse.device, coarse.dtype),)


class LeanSam3Neck(Sam3VisionNeck):
    """SAM 3's feature pyramid, with the levels alone that its tracker reads, and the coarsest one's positions."""

    def forward(self, hidden_states: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        levels = tuple(layer(hidden_states) for layer in self.fpn_layers[:NUM_LEVELS])
        coarse = levels[-1]
        return levels, (self.position_encoding(coarse.shape, coarse.device, coarse.dtype),)


class LeanMaskDecoder(Sam2VideoMaskDecoder):
    """The mask decoder (arXiv:2304.02643, appendix A) for one prompt per row, whose image features may broadcast."""

    def forward(
        self,
        image_embeddings: Tensor,
        image_positional_embeddings: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
        high_resolution_features: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decodes the masks of N objects; shapes are as in the base class, with one prompt in each row.

        Args:
            image_embeddings: (N or 1, hidden, H, W).
            image_positional_embeddings: (1, hidden, H, W).
            sparse_prompt_embeddings: (N, 1, tokens, hidden).
            dense_prompt_embeddings: (N or 1, hidden, H, W).
            high_resolution_features: (N or 1, hidden / 8, 4 H, 4 W) and (N or 1, hidden / 4, 2 H, 2 W).

        Returns:
            logits (N, 1, masks, 4 H, 4 W), estimated IoU (N, 1, masks), mask tokens (N, 1, masks, hidden) and object
            scores (N, 1, 1); 3 masks with `multimask_output`, or else 1.
        """
        num_objects, size = len(sparse_prompt_embeddings), image_embeddings.shape[-2:]
        own = torch.cat([self.obj_score_token.weight, self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(num_objects, 1, -1, -1), sparse_prompt_embeddings], dim=2).to(own.dtype)
        image = (image_embeddings + dense_prompt_embeddings).expand(num_objects, -1, -1, -1)
        tokens, image = self.transformer(
            point_embeddings=tokens,
            image_embeddings=image,
            image_positional_embeddings=image_positional_embeddings,
            attention_similarity=None,
        )
        fine, middle = high_resolution_features
        upscaled = self.upscale_conv1(image.squeeze(1).mT.unflatten(2, size)) + middle
        upscaled = self.activation(self.upscale_layer_norm(upscaled))
        upscaled = self.activation(self.upscale_conv2(upscaled) + fine)

        mask_tokens = tokens[:, :, 2 : 2 + self.num_mask_tokens]
        each = zip(self.output_hypernetworks_mlps, mask_tokens.unbind(2), strict=True)
        weights = torch.stack([network(token) for network, token in each], dim=2)
        masks = (weights @ upscaled.flatten(2).unsqueeze(1)).unflatten(-1, upscaled.shape[-2:])
        iou_scores = self.iou_prediction_head(tokens[:, :, 1])
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        if self.dynamic_multimask_via_stability and not (multimask_output or self.training):
            masks, iou_scores = self._dynamic_multimask_via_stability(masks, iou_scores)
        else:
            masks, iou_scores = masks[:, :, chosen], iou_scores[:, :, chosen]
        return masks, iou_scores, mask_tokens[:, :, chosen], self.pred_obj_score_head(tokens[:, :, 0])


class LeanLayerNorm(Sam2VideoLayerNorm):
    """Normalizes few channels that lie first, (rows, channels, height, width), on a CPU.

    There, kernels that normalize along a short last dimension are four times as slow as a few operations over all.
    """

    def forward(self, features: Tensor) -> Tensor:
        # PyTorch's normalizes narrower types in float32.
        is_wide = features.dtype in (torch.float32, torch.float64) and features.dtype == self.weight.dtype
        if features.device.type != "cpu" or not is_wide:
            return super().forward(features)
        centered = features - features.mean(dim=1, keepdim=True)
        scale = centered.square().mean(dim=1, keepdim=True).add_(self.eps).rsqrt()
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        return torch.addcmul(bias, centered * scale, weight)


class CachedPositionEncoding(nn.Module):
    """A sine position encoding that is computed once for each size and type."""

    def __init__(self, encoding: nn.Module):
        super().__init__()
        self.encoding = encoding
        self._known: dict[tuple, Tensor] = {}

    def forward(self, shape: torch.Size, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """(batch, channels, height, width), the same for the whole batch."""
        if torch.compiler.is_compiling():  # what a graph puts out may be overwritten when it runs again
            return self.encoding(shape, device, dtype)
        key = (*shape[1:], str(device), dtype)
        if key not in self._known:
            # Also what is first needed while tracking may later be part of a graph.
            with torch.inference_mode(False):
                encoded = self.encoding(torch.Size((1, *shape[1:])), device, dtype)
                # transformers may have computed it while its own model was tracking.
                self._known = {key: encoded.clone() if encoded.is_inference() else encoded}
        return self._known[key].expand(shape[0], -1, -1, -1)


class CachedRotaryEmbedding(nn.Module):
    """A rotary embedding of positions that never change."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding
        self._known: dict[str, tuple[tuple, Tensor]] = {}

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, as the embedding gives them: (1, positions, channels) each."""
        return self.embedding(x, position_ids)

    def rotations(
        self,
        position_ids: Tensor,
        size: Sequence[int] | None = None,
        pooling: tuple[int, ...] = (1,),
        num_pointer_tokens: int = 0,
    ) -> Tensor:
        """Cosine and sine for each pair of channels of some maps' tokens, and then of tokens that are not turned.

        They are kept until there are others of other maps, or on another device.

        Args:
            position_ids: (positions, 2), of one map.
            size: height and width of a map; needed where some are pooled.
            pooling: for each map the side of the squares whose tokens were averaged; these are at the squares' middle.

        Returns:
            (tokens, channels / 2, 2).
        """
        if torch.compiler.is_compiling():
            return self._compute(position_ids, size, pooling, num_pointer_tokens)
        # Of a frame's own map, and of memories: most frames read as many as the frame before.
        key = (position_ids.device, pooling, num_pointer_tokens)
        slot = "map" if key[1:] == ((1,), 0) else "memories"
        if slot not in self._known or self._known[slot][0] != key:
            with torch.inference_mode(False):
                self._known[slot] = key, self._compute(position_ids, size, pooling, num_pointer_tokens)
        return self._known[slot][1]

    def _compute(
        self, position_ids: Tensor, size: Sequence[int] | None, pooling: tuple[int, ...], num_pointer_tokens: int
    ) -> Tensor:
        by_side = {}
        for side in set(pooling):
            places = position_ids
            if side > 1:
                places = F.avg_pool2d(places.T.unflatten(1, tuple(size)).float(), side).flatten(1).T
            cos, sin = (x[0, :, ::2] for x in self.embedding(places, places))
            by_side[side] = torch.stack([cos, sin], dim=-1)
        maps = [by_side[side] for side in pooling]
        channels = self.embedding.inv_freq.shape[0] * 2
        not_turned = position_ids.new_tensor([1.0, 0.0], dtype=torch.float32).expand(num_pointer_tokens, channels, 2)
        return torch.cat([*maps, not_turned])


def make_lean(model: Sam2VideoModel) -> None:
    """Replaces the modules of a model in place; its tensors and their names stay."""
    for module in model.vision_encoder.modules():
        if type(module) is Sam2MultiScaleAttention:
            module.__class__ = LeanMultiScaleAttention
    if type(model.mask_decoder) is Sam2VideoMaskDecoder:
        model.mask_decoder.__class__ = LeanMaskDecoder
    neck = model.vision_encoder.neck
    if type(neck) is Sam2VisionNeck:
        neck.__class__ = LeanNeck
        # The encoder hands on the last levels, from fine to coarse; the first of these is the coarsest.
        neck._coarsest = -model.config.vision_config.num_feature_levels
    elif type(neck) is Sam3VisionNeck:
        neck.__class__ = LeanSam3Neck
    for layer in model.memory_encoder.mask_downsampler.layers:
        norm = layer.layer_norm
        if type(norm) is Sam2VideoLayerNorm and norm.normalized_shape[0] <= FEW_CHANNELS:
            norm.__class__ = LeanLayerNorm
    for owner in (neck, model.memory_encoder):
        owner.position_encoding = CachedPositionEncoding(owner.position_encoding)
    model.memory_attention.rotary_emb = CachedRotaryEmbedding(model.memory_attention.rotary_emb)


def build_on_meta(config: SamoeConfig, with_experts: bool) -> Sam2VideoModel:
    """The model without memory for its tensors."""
    try:
        with torch.device("meta"):
            model = Sam2VideoModel(copy.deepcopy(config))
            if with_experts:
                add_configured_experts(model, config)
                add_domain_gate(model)
    except (RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"The configuration describes no model that can be built: {error}") from error
    return model


def compile_parts(model: nn.Module, names: Sequence[str], **kwargs) -> None:
    """Compiles modules or functions of a model, in their places.

    Args:
        names: of attributes.
        kwargs: of [`torch.compile`]. Where they ask for CUDA graphs, what a part puts out is copied, since its graph's
            next run overwrites it.
    """
    graphs_by_option = (kwargs.get("options") or {}).get("triton.cudagraphs", False)
    has_graphs = kwargs.get("mode") in CUDA_GRAPH_MODES or graphs_by_option
    for name in names:
        part = getattr(model, name)
        if isinstance(part, nn.Module):
            part.compile(**kwargs)
            if has_graphs:
                part._compiled_call_impl = _with_copied_outputs(part._compiled_call_impl)
        else:
            compiled = torch.compile(part, **kwargs)
            setattr(model, name, _with_copied_outputs(compiled) if has_graphs else compiled)


def _with_copied_outputs(compiled: Callable) -> Callable:
    """What a compiled function returns, in memory of its own."""

    def run(*args, **kwargs):
        return tree_map_only(Tensor, torch.clone, compiled(*args, **kwargs))

    return run
