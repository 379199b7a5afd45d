"""The parts of a frame's work as modules of tensors alone, over a model's own: what is exported.

What a frame reads, and when, is not in them: `run.py` shows it. A part computes in its model's type, and takes and
gives float32.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from samoe_hf.model.base_model import SamoePreTrainedModel
from samoe_hf.model.base_modules import ImageFeatures
from samoe_hf.model.frame_step import (
    FrameOutput,
    embed_prompt,
    encode_frames,
    memory_map,
    resize,
    take_best,
    take_mask,
    to_memory_size,
    with_positions,
)
from samoe_hf.model.memory_tokens import pointer_positions
from samoe_hf.model.prompts import Prompt

# A logit whose sigmoid is 1, and in 16 bits is finite.
CERTAIN = 1e4


class Part(nn.Module):
    """A part of a model."""

    def __init__(self, model: SamoePreTrainedModel):
        super().__init__()
        self.model = model

    def features(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> ImageFeatures:
        """Features of a frame, with what encodes their positions."""
        return with_positions(self.model, *(x.to(self.model.dtype) for x in (fine, middle, coarse)))


class ImageEncoder(Part):
    """A frame's features, which all objects share."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        fine, middle, coarse = encode_frames(self.model, image.to(self.model.dtype))[:3]
        without_memory = coarse + self.model.no_memory_embedding.view(1, -1, 1, 1)
        return tuple(x.float() for x in (fine, middle, coarse, without_memory))


class MemoryAttention(Part):
    """The coarse features as each object sees them by its memories."""

    def forward(
        self, coarse: Tensor, maps: Tensor, map_times: Tensor, pointers: Tensor, pointer_times: Tensor
    ) -> Tensor:
        model, attention, size = self.model, self.model.memory_attention, coarse.shape[-2:]
        image = coarse.to(model.dtype)
        image_position = model.vision_encoder.neck.position_encoding(image.shape, image.device, image.dtype)
        place = model.base.memory_positions(model, 1, image)
        time = model.memory_temporal_positional_encoding.flatten(1)[map_times]
        tokens_per_pointer = model.hidden_dim // model.mem_dim
        position = [
            (place.unsqueeze(1) + time.unsqueeze(2)).flatten(1, 2),
            pointer_positions(model, pointer_times, tokens_per_pointer * pointers.shape[1], image).expand(
                maps.shape[0], -1, -1
            ),
        ]
        memory = [maps.flatten(1, 2), pointers.unflatten(2, (tokens_per_pointer, -1)).flatten(1, 2)]
        rotation = attention.rotary_emb.of_memories(partial(model.base.memory_places, model), (1,), 0, image.device)
        not_turned = rotation.new_tensor([1.0, 0.0]).expand(memory[1].shape[1], rotation.shape[1], 2)
        rotation = rotation.expand(maps.shape[1], -1, -1, -1).flatten(0, 1)
        conditioned = attention(
            image.flatten(2).mT,
            image_position.flatten(2).mT,
            torch.cat(memory, dim=1).to(image.dtype),
            torch.cat(position, dim=1),
            torch.cat([rotation, not_turned]),
        )
        return conditioned.mT.unflatten(2, size).float()


class MaskDecoder(Part):
    """Masks of objects from points, a box's corners, the mask before, or nothing but what they were."""

    def forward(
        self,
        fine: Tensor,
        middle: Tensor,
        coarse: Tensor,
        points: Tensor,
        labels: Tensor,
        previous_masks: Tensor,
        has_previous_masks: Tensor,
        multimask: Tensor,
    ) -> tuple[Tensor, ...]:
        image = self.features(fine, middle, coarse)
        prompt = Prompt(points=points, labels=labels, previous_mask=previous_masks)
        sparse, dense = embed_prompt(self.model, prompt, points.shape[0])
        _, no_mask = embed_prompt(self.model, Prompt(points=points, labels=labels), points.shape[0])
        dense = torch.where(has_previous_masks, dense, no_mask)
        decoder, levels = self.model.mask_decoder, [image.fine, image.middle]
        decoded = decoder.candidates(image.coarse, image.decoder_position, sparse, dense, levels)
        one, best_of_three = (
            _segmented(take_best(self.model, decoder.choose(*decoded, multimask_output=kind))) for kind in (False, True)
        )
        return tuple(torch.where(multimask, *pair) for pair in zip(best_of_three, one, strict=True))


class MaskPrompt(Part):
    """What the mask decoder would give for an object whose mask is given."""

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return _segmented(take_mask(self.model, self.features(fine, middle, coarse), mask)[0])


def _segmented(output: FrameOutput) -> tuple[Tensor, ...]:
    """Masks, their estimated IoU, object scores and object pointers."""
    scores = output.best_iou.unsqueeze(1), output.object_score_logits
    return tuple(x.float() for x in (output.masks, *scores, output.memory.pointers))


class MemoryEncoder(Part):
    """What later frames read of a frame."""

    def forward(self, coarse: Tensor, masks: Tensor, object_score: Tensor, is_prompted: Tensor) -> Tensor:
        masks = to_memory_size(self.model, resize(masks, self.model.config.image_size))
        masks = torch.where(is_prompted, torch.where(masks > 0, CERTAIN, -CERTAIN), masks)
        return memory_map(self.model, coarse.to(self.model.dtype), masks, object_score, binarize=False).float()


class Value(NamedTuple):
    """A tensor that goes into a part or comes out. `shape` holds numbers and names, of sizes or of [`COUNTS`]."""

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32

    def sizes(self, known: Mapping[str, int]) -> list[int | str]:
        """The shape, with numbers in place of names that are known."""
        return [known.get(size, size) if isinstance(size, str) else size for size in self.shape]

    def example(self, known: Mapping[str, int]) -> Tensor:
        """Zeros."""
        return torch.zeros([int(size) for size in self.sizes(known)], dtype=self.dtype)


class Signature(NamedTuple):
    """What a part takes and gives, by name."""

    part: type[Part]
    inputs: dict[str, Value]
    outputs: dict[str, Value]


# Dimensions that vary, with what an example has of them. Above 1, which would be taken for a number.
COUNTS = {"objects": 2, "points": 3, "maps": 4, "pointers": 5}
FEATURES = {
    "fine": Value((1, "fine_channels", "mask_side", "mask_side")),
    "middle": Value((1, "middle_channels", "middle_side", "middle_side")),
}
COARSE = Value((1, "channels", "side", "side"))
SEGMENTED = {
    "masks": Value(("objects", 1, "mask_side", "mask_side")),
    "iou": Value(("objects", 1)),
    "object_score": Value(("objects", 1)),
    "pointers": Value(("objects", "channels")),
}
FLAG = Value((), torch.bool)
SIGNATURES = {
    "image_encoder": Signature(
        ImageEncoder,
        {"image": Value((1, 3, "image_side", "image_side"))},
        {**FEATURES, "coarse": COARSE, "without_memory": COARSE},
    ),
    "memory_attention": Signature(
        MemoryAttention,
        {
            "coarse": COARSE,
            "maps": Value(("objects", "maps", "tokens", "map_channels")),
            "map_times": Value(("objects", "maps"), torch.int64),
            "pointers": Value(("objects", "pointers", "channels")),
            "pointer_times": Value(("objects", "pointers")),
        },
        {"conditioned": Value(("objects", "channels", "side", "side"))},
    ),
    "mask_decoder": Signature(
        MaskDecoder,
        {
            **FEATURES,
            "coarse": Value(("objects", "channels", "side", "side")),
            "points": Value(("objects", "points", 2)),
            "labels": Value(("objects", "points"), torch.int64),
            "previous_masks": Value(("objects", 1, "mask_side", "mask_side")),
            "has_previous_masks": FLAG,
            "multimask": FLAG,
        },
        SEGMENTED,
    ),
    "mask_prompt": Signature(
        MaskPrompt, {**FEATURES, "coarse": COARSE, "mask": Value(("objects", 1, "image_side", "image_side"))}, SEGMENTED
    ),
    "memory_encoder": Signature(
        MemoryEncoder,
        {"coarse": COARSE, "masks": SEGMENTED["masks"], "object_score": SEGMENTED["object_score"], "is_prompted": FLAG},
        {"maps": Value(("objects", "tokens", "map_channels"))},
    ),
}


def sizes(model: SamoePreTrainedModel) -> dict[str, int]:
    """What names of sizes in [`SIGNATURES`] stand for in a model."""
    (fine, _), (middle, _), (side, _) = model.backbone_feature_sizes
    channels = model.hidden_dim
    return {
        "image_side": model.config.image_size,
        "mask_side": fine,
        "middle_side": middle,
        "side": side,
        "tokens": len(model.base.memory_places(model, 1)),
        "channels": channels,
        "middle_channels": channels // 4,
        "fine_channels": channels // 8,
        "map_channels": model.mem_dim,
    }
