"""What all bases share: a frame's features, and modules in place of transformers' where these compute too much.

- The mask decoder copies an image's features for each of its prompts, even if there is but one.
- Encodings of positions are computed anew for each frame and memory, though they are always the same.

What a base's own encoder leaves out is in its file. The numbers that are read are the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMaskDecoder

from .domain_experts import active_domain
from .joint_linear import is_plain, runs_own_code
from .kept import keep, keeps, once_for_clip

M = TypeVar("M", bound=nn.Module)


class ImageFeatures(NamedTuple):
    """Features of one frame for each row: a video, or an object of it.

    Attributes:
        fine: (rows, hidden / 8, S / 4, S / 4), for the mask decoder.
        middle: (rows, hidden / 4, S / 8, S / 8), for the mask decoder.
        coarse: (rows, hidden, S / 16, S / 16), for the memory and the mask decoder.
        position: (tokens, 1, hidden), position encoding of `coarse` for the memory attention.
        decoder_position: (1, hidden, S / 16, S / 16), the same for the mask decoder.
        together: which of the frames that were encoded together these are, and `coarse` of all of them as
            (frames, tokens, hidden), where that is known.
    """

    fine: Tensor
    middle: Tensor
    coarse: Tensor
    position: Tensor
    decoder_position: Tensor
    together: tuple[slice, Tensor] | None = None

    def select(self, index: Any) -> "ImageFeatures":
        """The rows of an index."""
        return self._replace(fine=self.fine[index], middle=self.middle[index], coarse=self.coarse[index])

    def for_objects(self, objects_per_video: int) -> "ImageFeatures":
        """Repeats each row for a video's objects. A single row stays one, which broadcasts over all objects."""
        if self.coarse.shape[0] == 1 or objects_per_video == 1:
            return self
        fine, middle, coarse = (x.repeat_interleave(objects_per_video, dim=0) for x in self[:3])
        return self._replace(fine=fine, middle=middle, coarse=coarse)


def rebuild(module: nn.Module, kind: type[M], *args: object) -> M:
    """A module of another class, whose tensors have the same names, with the parameters and buffers of `module`.

    `args` are of its constructor, which runs without memory and draws nothing.
    """
    with torch.device("meta"):
        built = kind(*args)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    built.load_state_dict(tensors, assign=True)
    return built.train(module.training)


class MaskDecoder(Sam2VideoMaskDecoder):
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
        """Decodes the masks of N objects, see [`candidates`]: 3 of each with `multimask_output`, else 1."""
        decoded = self.candidates(
            image_embeddings,
            image_positional_embeddings,
            sparse_prompt_embeddings,
            dense_prompt_embeddings,
            high_resolution_features,
        )
        return self.choose(*decoded, multimask_output)

    def candidates(
        self,
        image_embeddings: Tensor,
        image_positional_embeddings: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        high_resolution_features: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All masks of N objects: the one that is wanted alone, and three for what is ambiguous.

        Args:
            image_embeddings: (N or 1, hidden, H, W).
            image_positional_embeddings: (1, hidden, H, W).
            sparse_prompt_embeddings: (N, 1, tokens, hidden).
            dense_prompt_embeddings: (N or 1, hidden, H, W).
            high_resolution_features: (N or 1, hidden / 8, 4 H, 4 W) and (N or 1, hidden / 4, 2 H, 2 W).

        Returns:
            logits (N, 1, masks, 4 H, 4 W), estimated IoU (N, 1, masks), mask tokens (N, 1, masks, hidden) and object
            scores (N, 1, 1).
        """
        num_objects, size = sparse_prompt_embeddings.shape[0], image_embeddings.shape[-2:]
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
        heads = (self.pred_obj_score_head, self.iou_prediction_head, *self.output_hypernetworks_mlps)
        object_scores, iou_scores, *weights = _run_side_by_side(heads, tokens[:, :, : len(heads)])
        weights = torch.stack(weights, dim=2)
        masks = (weights @ upscaled.flatten(2).unsqueeze(1)).unflatten(-1, upscaled.shape[-2:])
        return masks, iou_scores, mask_tokens, object_scores

    def choose(
        self, masks: Tensor, iou_scores: Tensor, mask_tokens: Tensor, object_scores: Tensor, multimask_output: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all masks the three, or the one; that is the best of the three where it is not stable, unless training."""
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        if self.dynamic_multimask_via_stability and not (multimask_output or self.training):
            masks, iou_scores = self._dynamic_multimask_via_stability(masks, iou_scores)
        else:
            masks, iou_scores = masks[:, :, chosen], iou_scores[:, :, chosen]
        return masks, iou_scores, mask_tokens[:, :, chosen], object_scores


def _run_side_by_side(heads: Sequence[Any], tokens: Tensor) -> list[Tensor]:
    """What perceptrons put out, each for its own token: (N, 1, tokens, hidden) -> (N, 1, outputs) each.

    Equal layers of those with equal hidden sizes are one product where their weights can be kept, see [`keeps`], and
    nobody watches them.
    """
    sizes = [tuple(layer.weight.shape for layer in (head.proj_in, *head.layers)) for head in heads]
    found: dict[int, Tensor] = {}
    for size in dict.fromkeys(sizes):
        alike = [index for index, other in enumerate(sizes) if other == size]
        own = tokens if len(alike) == len(heads) else torch.stack([tokens[:, :, index] for index in alike], dim=2)
        found |= zip(alike, _run_alike([heads[index] for index in alike], own), strict=True)
    return [found[index] for index in range(len(heads))]


def _run_alike(heads: Sequence[Any], tokens: Tensor) -> list[Tensor]:
    stacked = once_for_clip(lambda: (*heads, active_domain()), lambda: _stack_layers(heads))
    if stacked is None:
        return [head(token) for head, token in zip(heads, tokens.unbind(2), strict=True)]
    states = tokens[:, 0].transpose(0, 1)
    for index, (weight, bias) in enumerate(stacked):
        states = torch.baddbmm(bias, heads[0].activation(states) if index else states, weight)
    outputs = [x[..., : head.proj_out.out_features].unsqueeze(1) for x, head in zip(states, heads, strict=True)]
    return [x.sigmoid() if head.sigmoid_output else x for head, x in zip(heads, outputs, strict=True)]


def _stack_layers(heads: Sequence[Any]) -> list[tuple[Tensor, Tensor]] | None:
    """Weights and biases of each step of the perceptrons, or None where they are to run one by one."""
    layers = [(head.proj_in, *head.layers, head.proj_out) for head in heads]
    parts = [layer for own in layers for layer in own]
    sources = [x for layer in parts for x in (layer.weight, layer.bias)]
    are_plain = all(map(runs_own_code, heads)) and all(map(is_plain, parts))
    if len(heads) == 1 or not keeps(sources) or not are_plain:
        return None
    return keep(tuple(heads), sources, lambda: [_stack(step) for step in zip(*layers, strict=True)])


def _stack(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weights (layers, in, out) and biases (layers, 1, out), filled up with zeros to the widest output."""
    width = max(layer.out_features for layer in layers)
    weights = [F.pad(layer.weight.mT, (0, width - layer.out_features)) for layer in layers]
    return torch.stack(weights), torch.stack([F.pad(x.bias, (0, width - x.out_features))[None] for x in layers])


class KeepsTypes(nn.Module):
    """A module whose tensors move to devices as the model does, but keep their types in `model.to(torch.bfloat16)`."""

    def _apply(self, fn: Any, recurse: bool = True) -> "KeepsTypes":
        def move(x: Tensor) -> Tensor:
            return fn(x).to(x.dtype) if x.is_meta else x.to(fn(x.new_empty(0)).device)

        return super()._apply(move, recurse)


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
        if (encoded := self._known.get(key)) is None:
            # Also what is first needed while tracking may later be part of a graph.
            with torch.inference_mode(False):
                encoded = self.encoding(torch.Size((1, *shape[1:])), device, dtype)
                # transformers may have computed it while its own model was tracking.
                encoded = encoded.clone() if encoded.is_inference() else encoded
                self._known = {key: encoded}
        return encoded.expand(shape[0], -1, -1, -1)
