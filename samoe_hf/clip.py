"""The forward pass over clips: prompts on conditioning frames, all objects of all videos in one batch, and the loss."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .experts import load_balancing_loss, record_router_logits
from .frame_step import FrameOutput, ImageFeatures, Prompt, frame_step, image_features
from .losses import SegmentationLoss, mean_num_objects
from .memory_bank import MemoryBank
from .prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT

if TYPE_CHECKING:
    from .modeling_samoe import SamoeModel


@dataclass
class SamoeClipOutput(ModelOutput):
    """Output of [`SamoeModel`] for clips of T frames of B videos with up to N objects each.

    Args:
        loss: scalar, with labels: the weighted sum of `loss_dict`, the router's part times `router_aux_loss_coef`.
        loss_dict: with labels: `focal`, `dice`, `iou`, `object_score`, each summed over frames and divided by the
            number of objects, and `router` (0 while `router_aux_loss_coef` is 0), all without weights.
        pred_masks: (B, N, T, S / 4, S / 4), logits.
        iou_scores: (B, N, T), estimated IoU of `pred_masks`.
        object_score_logits: (B, N, T), positive where the object is seen.
        router_logits: on request: name of each layer with experts -> (tokens, experts).
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    object_score_logits: Tensor | None = None
    router_logits: dict[str, Tensor] | None = None


def clip_forward(
    model: "SamoeModel",
    pixel_values: Tensor,
    prompts: Mapping[int, Prompt],
    num_objects: int,
    labels: Tensor | None = None,
    object_mask: Tensor | None = None,
    output_router_logits: bool = False,
) -> SamoeClipOutput:
    """Tracks up to `num_objects` objects through each clip, and with labels computes the loss.

    Args:
        pixel_values: (B, T, 3, S, S).
        prompts: conditioning frame -> prompt of all B * N objects on it.
        labels: (B, N, T, S, S) bool.
        object_mask: (B, N) bool, False for padded objects.
    """
    num_videos, num_frames = pixel_values.shape[:2]
    needs_router = output_router_logits or (labels is not None and model.config.router_aux_loss_coef > 0)
    with record_router_logits(model) if needs_router else nullcontext({}) as calls:
        outputs = dict(_segment_clip(model, pixel_values, prompts, num_objects))
    router_logits = {name: torch.cat([x.flatten(0, -2) for x in of]) for name, of in calls.items() if of}

    loss = loss_dict = None
    if labels is not None:
        if object_mask is None:
            object_mask = torch.ones(labels.shape[:2], dtype=torch.bool, device=labels.device)
        loss, loss_dict = _clip_loss(model, outputs, labels, object_mask, router_logits)

    def stack(tensors: Iterator[Tensor]) -> Tensor:
        return torch.stack(list(tensors), dim=1).unflatten(0, (num_videos, num_objects))

    in_time = [outputs[t] for t in range(num_frames)]
    return SamoeClipOutput(
        loss=loss,
        loss_dict=loss_dict,
        pred_masks=stack(output.masks[:, 0] for output in in_time),
        iou_scores=stack(output.best_iou for output in in_time),
        object_score_logits=stack(output.object_score_logits[:, 0] for output in in_time),
        router_logits=router_logits if output_router_logits else None,
    )


def prompt_from_inputs(
    input_points: Tensor | None,
    input_labels: Tensor | None,
    input_boxes: Tensor | None,
    input_masks: Tensor | None,
) -> tuple[Prompt, int]:
    """The prompt that a user gives of all objects on the first frame, and the number of objects of each video.

    Args:
        input_points: (B, N, P, 2) as (x, y) in pixels of the model's input, with `input_labels` (B, N, P).
        input_boxes: (B, N, 4) as (x0, y0, x1, y1).
        input_masks: (B, N, S, S), instead of the others.
    """
    if input_masks is not None:
        if input_points is not None or input_boxes is not None:
            raise ValueError("`input_masks` cannot be given together with `input_points` or `input_boxes`.")
        return Prompt(mask=(input_masks > 0).flatten(0, 1).unsqueeze(1)), input_masks.shape[1]
    if input_points is None and input_boxes is None:
        raise ValueError("Without `labels` one of `input_points`, `input_boxes` or `input_masks` must be given.")
    if (input_points is None) != (input_labels is None):
        raise ValueError("`input_points` and `input_labels` must be given together.")
    points, labels = [], []
    if input_boxes is not None:
        corners = input_boxes.unflatten(-1, (2, 2))
        points.append(corners)
        kinds = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], device=corners.device)
        labels.append(kinds.expand(corners.shape[:-1]))
    if input_points is not None:
        points.append(input_points)
        labels.append(input_labels)
    points, labels = torch.cat(points, dim=2).float(), torch.cat(labels, dim=2).to(torch.int32)
    return Prompt(points=points.flatten(0, 1), labels=labels.flatten(0, 1)), points.shape[1]


def _segment_clip(
    model: "SamoeModel", pixel_values: Tensor, prompts: Mapping[int, Prompt], num_objects: int
) -> Iterator[tuple[int, FrameOutput]]:
    """Segments frame by frame: conditioning frames first, then the others in time order."""
    num_videos, num_frames = pixel_values.shape[:2]
    features = image_features(model, pixel_values.flatten(0, 1))
    by_frame = [x.unflatten(0, (num_videos, num_frames)) for x in features[:3]]
    order = [*sorted(prompts), *(t for t in range(num_frames) if t not in prompts)]
    bank = MemoryBank()
    for frame_idx in order:
        image = ImageFeatures(*(x[:, frame_idx] for x in by_frame), features.position)
        prompt = prompts.get(frame_idx)
        selection = None
        if prompt is None:
            selection = bank.select(
                frame_idx,
                num_maskmem=model.num_maskmem,
                max_object_pointers=model.config.max_object_pointers_in_encoder,
                max_cond_frames=model.config.max_cond_frame_num,
                num_frames=num_frames,
                past_pointers_only=not model.training,
            )
        output = frame_step(
            model,
            image.for_objects(num_objects),
            prompt,
            [bank],
            selection,
            num_objects=num_videos * num_objects,
            encode_memory=frame_idx != order[-1],
        )
        bank.write(frame_idx, output.memory, conditioning=prompt is not None)
        yield frame_idx, output


def _clip_loss(
    model: "SamoeModel",
    outputs: Mapping[int, FrameOutput],
    labels: Tensor,
    object_mask: Tensor,
    router_logits: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss and its parts, summed over frames and divided by the number of objects."""
    segmentation_loss = SegmentationLoss()
    frames = [
        segmentation_loss(
            output.candidates,
            output.iou_scores,
            output.object_score_logits,
            labels[:, :, frame_idx].flatten(0, 1),
            object_mask.flatten(),
        )
        for frame_idx, output in outputs.items()
    ]
    count = mean_num_objects(object_mask, over_processes=model.training)
    parts = {name: sum(frame[name] for frame in frames) / count for name in frames[0]}
    loss = segmentation_loss.total(parts)
    coefficient = model.config.router_aux_loss_coef
    if coefficient > 0:
        parts["router"] = load_balancing_loss(router_logits, model.config.num_experts_per_tok)
        loss = loss + coefficient * parts["router"]
    else:
        parts["router"] = torch.zeros_like(loss)
    return loss, {name: part.detach() for name, part in parts.items()}
