"""The forward pass over clips: prompts on conditioning frames, all objects of all videos in one batch, and the loss."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Sam2VideoModel
from transformers.utils import ModelOutput

from .experts import load_balancing_loss, recomputable, record_router_logits
from .frame_step import Corrections, FrameOutput, ImageFeatures, Prompt, frame_step, image_features
from .losses import LossParts, mean_num_objects
from .memory_bank import MemoryBank, MemorySelection
from .prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PromptRecipe, sample_prompt


@dataclass
class SamoeClipOutput(ModelOutput):
    """Output of [`SamoeModel`] for clips of T frames of B videos with up to N objects each.

    Args:
        loss: scalar, with labels: the weighted sum of `loss_dict`, the router's part times `router_aux_loss_coef`.
        loss_dict: with labels: `focal`, `dice`, `iou`, `object_score`, each summed over frames and clicks and divided
            by the number of objects, and `router` (0 while `router_aux_loss_coef` is 0), all without weights.
        pred_masks: (B, N, T, S / 4, S / 4), logits.
        iou_scores: (B, N, T), estimated IoU of `pred_masks`.
        object_score_logits: (B, N, T), positive where the object is seen.
        router_logits: on request: name of each layer with experts -> (tokens, experts).
        vision_hidden_states, vision_attentions: on request: those of the vision encoder, for all B * T frames.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    object_score_logits: Tensor | None = None
    router_logits: dict[str, Tensor] | None = None
    vision_hidden_states: tuple[Tensor, ...] | None = None
    vision_attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class ClipPrompts:
    """What is given on which frames of a clip, for all B * N objects in one batch.

    `initial`: initial conditioning frame -> prompt. `corrected`: frame -> clicks drawn from its errors.
    """

    initial: Mapping[int, Prompt]
    corrected: Mapping[int, Corrections] = field(default_factory=dict)

    @classmethod
    def simulate(cls, recipe: PromptRecipe, labels: Tensor) -> "ClipPrompts":
        """Draws prompts from the true masks (B, N, T, S, S)."""
        plan = recipe.draw(labels.shape[2])
        masks = {t: labels[:, :, t].flatten(0, 1) for t in {*plan.kinds, *plan.corrected}}
        return cls(
            {t: sample_prompt(masks[t], kind) for t, kind in plan.kinds.items()},
            {t: recipe.corrections(masks[t]) for t in plan.corrected},
        )


def check_clip(pixel_values: Any, labels: Tensor | None, object_mask: Tensor | None, image_size: int) -> None:
    """Raises a `ValueError` where the shapes of a clip's tensors do not agree."""
    shape = tuple(getattr(pixel_values, "shape", ()))
    if len(shape) != 5 or shape[2:] != (3, image_size, image_size):
        got = f"shape {shape}" if shape else type(pixel_values).__name__
        raise ValueError(
            f"`pixel_values` must be an inference session or of shape (videos, frames, 3, {image_size}, {image_size}), "
            f"got {got}."
        )
    videos, frames = shape[:2]
    if labels is None:
        return
    expected = f"({videos}, objects, {frames}, {image_size}, {image_size})"
    if labels.dtype != torch.bool or labels.dim() != 5 or labels.shape[1] == 0:
        raise ValueError(
            f"`labels` must be bool of shape {expected}, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if (labels.shape[0], *labels.shape[2:]) != (videos, frames, image_size, image_size):
        raise ValueError(f"`labels` must be of shape {expected} as `pixel_values` is, got {tuple(labels.shape)}.")
    if object_mask is not None and object_mask.shape != labels.shape[:2]:
        raise ValueError(f"`object_mask` must be of shape {tuple(labels.shape[:2])}, got {tuple(object_mask.shape)}.")


def clip_forward(
    model: Sam2VideoModel,
    pixel_values: Tensor,
    prompts: ClipPrompts,
    num_objects: int,
    labels: Tensor | None = None,
    object_mask: Tensor | None = None,
    output_router_logits: bool = False,
) -> SamoeClipOutput:
    """Tracks up to `num_objects` objects through each clip, and with labels computes the loss.

    Args:
        pixel_values: (B, T, 3, S, S).
        prompts: for all B * N objects.
        labels: (B, N, T, S, S) bool.
        object_mask: (B, N) bool, False for padded objects.
    """
    num_videos, num_frames = pixel_values.shape[:2]
    if labels is not None and object_mask is None:
        object_mask = torch.ones(labels.shape[:2], dtype=torch.bool, device=labels.device)
    needs_router = output_router_logits or (labels is not None and model.config.router_aux_loss_coef > 0)
    with record_router_logits(model) if needs_router else nullcontext({}) as calls:
        outputs, parts = _segment_clip(model, pixel_values, prompts, num_objects, labels, object_mask)
    router_logits = {name: torch.cat([x.flatten(0, -2) for x in of]) for name, of in calls.items() if of}

    loss = loss_dict = None
    if labels is not None:
        loss, loss_dict = _clip_loss(model, parts, object_mask, router_logits)

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
    model: Sam2VideoModel,
    pixel_values: Tensor,
    prompts: ClipPrompts,
    num_objects: int,
    labels: Tensor | None,
    object_mask: Tensor | None,
) -> tuple[dict[int, FrameOutput], list[LossParts]]:
    """Segments conditioning frames first, then the others in time order; with labels, also gives each one's loss."""
    num_videos, num_frames = pixel_values.shape[:2]
    encode = image_features if model.feature_cache is None else model.feature_cache.image_features
    features = encode(model, pixel_values.flatten(0, 1), model.encoder_batch_size)
    by_frame = [x.unflatten(0, (num_videos, num_frames)) for x in features[:3]]
    order = [*sorted(prompts.initial), *(t for t in range(num_frames) if t not in prompts.initial)]
    bank, outputs, parts = MemoryBank(), {}, []
    for frame_idx in order:
        image = ImageFeatures(*(x[:, frame_idx] for x in by_frame), *features[3:])
        prompt, corrections = prompts.initial.get(frame_idx), prompts.corrected.get(frame_idx)
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
        run = partial(
            _segment_frame,
            model,
            image.for_objects(num_objects),
            prompt,
            bank,
            selection,
            corrections,
            num_videos * num_objects,
            frame_idx != order[-1],
            None if labels is None else labels[:, :, frame_idx].flatten(0, 1),
            object_mask,
        )
        checkpointed = model.gradient_checkpointing and model.training and torch.is_grad_enabled()
        output, frame_parts = model._gradient_checkpointing_func(recomputable(run)) if checkpointed else run()
        bank.write(frame_idx, output.memory, conditioning=prompt is not None or corrections is not None)
        outputs[frame_idx] = output
        parts += frame_parts
    return outputs, parts


def _segment_frame(
    model: Sam2VideoModel,
    image: ImageFeatures,
    prompt: Prompt | None,
    bank: MemoryBank,
    selection: MemorySelection | None,
    corrections: Corrections | None,
    num_objects: int,
    encode_memory: bool,
    targets: Tensor | None,
    object_mask: Tensor | None,
) -> tuple[FrameOutput, list[LossParts]]:
    """The frame step and, with true masks (objects, S, S), the loss of each of its predictions.

    Both in one function, so that gradient checkpointing also spares what the loss needs.
    """
    output = frame_step(
        model,
        image,
        prompt,
        [bank],
        selection,
        num_objects=num_objects,
        corrections=corrections,
        encode_memory=encode_memory,
    )
    if targets is None:
        return output, []
    parts = [
        model.segmentation_loss(
            step.candidates, step.iou_scores, step.object_score_logits, targets, object_mask.flatten()
        )
        for step in [*output.before_clicks, output]
    ]
    output.before_clicks = []
    return output, parts


def _clip_loss(
    model: Sam2VideoModel, steps: list[LossParts], object_mask: Tensor, router_logits: Mapping[str, Tensor]
) -> tuple[Tensor, LossParts]:
    """The total loss and its parts, summed over frames and clicks and divided by the number of objects."""
    count = mean_num_objects(object_mask, over_processes=model.training)
    parts = {name: sum(step[name] for step in steps) / count for name in steps[0]}
    loss = model.segmentation_loss.total(parts)
    coefficient = model.config.router_aux_loss_coef
    if coefficient > 0:
        parts["router"] = load_balancing_loss(router_logits, model.config.num_experts_per_tok)
        loss = loss + coefficient * parts["router"]
    else:
        parts["router"] = torch.zeros_like(loss)
    return loss, {name: part.detach() for name, part in parts.items()}
