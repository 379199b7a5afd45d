"""The forward pass over clips: prompts on conditioning frames, all objects of all videos in one batch, and the loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Sam2VideoModel
from transformers.utils import ModelOutput

from .clip_routing import all_router_logits, router_logits_by_clip
from .domain_choice import AUTO, encoder_has_experts, resolve_clip_domains
from .domain_experts import keep_domain, use_domain
from .errors import InputError
from .expert_layer import load_balancing_loss, recomputable, record_router_logits
from .frame_step import Corrections, FrameOutput, ImageFeatures, Prompt, frame_step, image_features
from .losses import PADDING_LABEL, LossParts, mean_num_objects, num_labelled_objects
from .memory_bank import MemoryBank, MemorySelection
from .prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, PromptRecipe, sample_prompt


@dataclass
class SamoeClipOutput(ModelOutput):
    """Output of [`SamoeModel`] for clips of T frames of B videos with up to N objects each.

    Args:
        loss: scalar, with labels: the weighted sum of `loss_dict`, the router's part times `router_aux_loss_coef`.
        loss_dict: with labels: `focal`, `dice`, `iou`, `object_score`, each summed over frames and clicks and divided
            by the number of objects, and `router` (0 while `router_aux_loss_coef` is 0), the load-balancing loss of
            each clip averaged over objects; all without weights.
        pred_masks: (B, N, T, S / 4, S / 4), logits.
        iou_scores: (B, N, T), estimated IoU of `pred_masks`.
        object_score_logits: (B, N, T), positive where the object is seen.
        router_logits: on request: name of each layer with experts -> (tokens, experts).
        domains: of a model with domains: whose experts each video got, None for the base's.
        vision_hidden_states, vision_attentions: on request: those of the vision encoder, for all B * T frames.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    object_score_logits: Tensor | None = None
    router_logits: dict[str, Tensor] | None = None
    domains: list[str | None] | None = None
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

    def rows(self, indices: Tensor) -> "ClipPrompts":
        """Those of some of the objects."""
        return ClipPrompts(
            {t: prompt.rows(indices) for t, prompt in self.initial.items()},
            {t: clicks._replace(masks=clicks.masks[indices]) for t, clicks in self.corrected.items()},
        )


class TrackedClips(NamedTuple):
    """What was segmented of clips: masks (B, N, T, S / 4, S / 4), and their estimated IoU and object scores (B, N, T).

    `parts`: with true masks, the loss of each frame and click.
    """

    pred_masks: Tensor
    iou_scores: Tensor
    object_score_logits: Tensor
    parts: list[LossParts]


def check_clip(pixel_values: Any, labels: Tensor | None, object_mask: Tensor | None, image_size: int) -> None:
    """Raises a `ValueError` where the shapes of a clip's tensors do not agree."""
    shape = tuple(getattr(pixel_values, "shape", ()))
    if len(shape) != 5 or shape[2:] != (3, image_size, image_size):
        got = f"shape {shape}" if shape else type(pixel_values).__name__
        raise InputError(
            f"`pixel_values` must be an inference session or of shape (videos, frames, 3, {image_size}, {image_size}), "
            f"got {got}."
        )
    videos, frames = shape[:2]
    if labels is None:
        return
    expected = f"({videos}, objects, {frames}, {image_size}, {image_size})"
    if labels.dtype.is_floating_point or labels.dim() != 5 or labels.shape[1] == 0:
        raise InputError(
            f"`labels` must be bool or integers of shape {expected}, got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if (labels.shape[0], *labels.shape[2:]) != (videos, frames, image_size, image_size):
        raise InputError(f"`labels` must be of shape {expected} as `pixel_values` is, got {tuple(labels.shape)}.")
    if object_mask is not None and object_mask.shape != labels.shape[:2]:
        raise InputError(f"`object_mask` must be of shape {tuple(labels.shape[:2])}, got {tuple(object_mask.shape)}.")


def split_labels(labels: Tensor, object_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The true masks (B, N, T, S, S) bool and which objects are real (B, N) bool.

    Args:
        labels: (B, N, T, S, S), bool, or integers with -100 for padded objects.
        object_mask: (B, N) bool, False for further padded objects.
    """
    if labels.dtype == torch.bool:
        real = torch.ones(labels.shape[:2], dtype=torch.bool, device=labels.device)
    else:
        real = (labels != PADDING_LABEL).flatten(2).any(dim=2)
        labels = labels > 0
    return labels, real if object_mask is None else real & object_mask


def clip_forward(
    model: Sam2VideoModel,
    pixel_values: Tensor,
    prompts: ClipPrompts,
    num_objects: int,
    labels: Tensor | None = None,
    object_mask: Tensor | None = None,
    output_router_logits: bool = False,
    num_items_in_batch: Tensor | int | None = None,
    domain: str | Sequence[str | None] | None = AUTO,
) -> SamoeClipOutput:
    """Tracks up to `num_objects` objects through each clip, and with labels computes the loss.

    Args:
        pixel_values: (B, T, 3, S, S).
        prompts: for all B * N objects.
        labels: (B, N, T, S, S) bool.
        object_mask: (B, N) bool, False for padded objects.
        num_items_in_batch: elements of labels of all real objects that the loss is averaged over, as Trainer counts
            them over micro-batches and processes; by default the objects of this batch, averaged over processes.
        domain: whose experts are run, of all clips or of each; see [`~modeling_samoe.SamoeModel.forward`].
    """
    needs_router = output_router_logits or (labels is not None and model.config.router_aux_loss_coef > 0)
    with record_router_logits(model) if needs_router else nullcontext({}) as calls:
        clips, domains = _segment_by_domain(model, pixel_values, prompts, num_objects, labels, object_mask, domain)

    loss = loss_dict = None
    if labels is not None:
        if num_items_in_batch is None:
            count = mean_num_objects(object_mask, over_processes=model.training)
        else:
            count = num_labelled_objects(num_items_in_batch, labels)
        loss, loss_dict = _clip_loss(model, clips.parts, object_mask, calls, domains, count)
    return SamoeClipOutput(
        loss=loss,
        loss_dict=loss_dict,
        pred_masks=clips.pred_masks,
        iou_scores=clips.iou_scores,
        object_score_logits=clips.object_score_logits,
        router_logits=all_router_logits(calls) if output_router_logits else None,
        domains=None if model.config.domains is None else domains,
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
            raise InputError("`input_masks` cannot be given together with `input_points` or `input_boxes`.")
        return Prompt(mask=(input_masks > 0).flatten(0, 1).unsqueeze(1)), input_masks.shape[1]
    if input_points is None and input_boxes is None:
        raise InputError("Without `labels` one of `input_points`, `input_boxes` or `input_masks` must be given.")
    if (input_points is None) != (input_labels is None):
        raise InputError("`input_points` and `input_labels` must be given together.")
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


def _segment_by_domain(
    model: Sam2VideoModel,
    pixel_values: Tensor,
    prompts: ClipPrompts,
    num_objects: int,
    labels: Tensor | None,
    object_mask: Tensor | None,
    domain: str | Sequence[str | None] | None,
) -> tuple[TrackedClips, list[str | None]]:
    """Segments the clips of each domain in one batch; also gives the domains.

    So each call of a layer is of one domain, and its numbers are those that the clips give without the others.
    """
    features = None if encoder_has_experts(model) else _encode(model, pixel_values)
    first = min(prompts.initial)
    first_features = None if features is None else features.select((slice(None), first))
    domains = resolve_clip_domains(model, domain, pixel_values[:, first], first_features)
    if len(set(domains)) == 1:
        with use_domain(domains[0]):
            features = _encode(model, pixel_values) if features is None else features
            return _segment_clips(model, features, prompts, num_objects, labels, object_mask), domains
    tracked, order = [], []
    for name in dict.fromkeys(domains):
        rows = torch.tensor([i for i, other in enumerate(domains) if other == name], device=pixel_values.device)
        objects = (rows[:, None] * num_objects + torch.arange(num_objects, device=rows.device)).flatten()
        with use_domain(name):
            own = _encode(model, pixel_values[rows]) if features is None else features.select(rows)
            own_labels, own_mask = (None if x is None else x[rows] for x in (labels, object_mask))
            tracked.append(_segment_clips(model, own, prompts.rows(objects), num_objects, own_labels, own_mask))
        order.append(rows)
    places = torch.cat(order).argsort()
    tensors = (torch.cat(parts)[places] for parts in list(zip(*tracked, strict=True))[:3])
    return TrackedClips(*tensors, [part for one in tracked for part in one.parts]), domains


def _encode(model: Sam2VideoModel, pixel_values: Tensor) -> ImageFeatures:
    """Features of clips (B, T, 3, S, S), whose maps are (B, T, ...)."""
    encode = image_features if model.feature_cache is None else model.feature_cache.image_features
    features = encode(model, pixel_values.flatten(0, 1), model.encoder_batch_size)
    return ImageFeatures(*(x.unflatten(0, pixel_values.shape[:2]) for x in features[:3]), *features[3:])


def _segment_clips(
    model: Sam2VideoModel,
    features: ImageFeatures,
    prompts: ClipPrompts,
    num_objects: int,
    labels: Tensor | None,
    object_mask: Tensor | None,
) -> TrackedClips:
    """Segments conditioning frames first, then the others in time order; with labels, also gives each one's loss."""
    num_videos, num_frames = features.coarse.shape[:2]
    order = [*sorted(prompts.initial), *(t for t in range(num_frames) if t not in prompts.initial)]
    bank, outputs, parts = MemoryBank(), {}, []
    checkpoint = _frame_checkpointing(model)
    for frame_idx in order:
        image = features.select((slice(None), frame_idx))
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
        segment = partial(
            _segment_frame,
            model=model,
            prompt=prompt,
            bank=bank,
            selection=selection,
            corrections=corrections,
            num_objects=num_videos * num_objects,
            encode_memory=frame_idx != order[-1],
            targets=None if labels is None else labels[:, :, frame_idx].flatten(0, 1),
            object_mask=object_mask,
        )
        # The image's tensors are arguments because checkpointing keeps the random state of its arguments' devices.
        output, frame_parts = checkpoint(frame_idx)(segment, *image)
        bank.write(frame_idx, output.memory, conditioning=prompt is not None or corrections is not None)
        outputs[frame_idx] = output
        parts += frame_parts

    def stack(tensors: Iterator[Tensor]) -> Tensor:
        return torch.stack(list(tensors), dim=1).unflatten(0, (num_videos, num_objects))

    in_time = [outputs[t] for t in range(num_frames)]
    return TrackedClips(
        stack(output.masks[:, 0] for output in in_time),
        stack(output.best_iou for output in in_time),
        stack(output.object_score_logits[:, 0] for output in in_time),
        parts,
    )


def non_reentrant(checkpoint: Callable) -> Callable:
    """The function for gradient checkpointing with `use_reentrant=False`, which recomputes with the same experts.

    Raises:
        ValueError: if it was made with `use_reentrant=True`.
    """
    keywords = getattr(checkpoint, "keywords", {})
    if keywords.get("use_reentrant"):
        raise InputError(
            "`use_reentrant` must be False for gradient checkpointing: with True, gradients flow through a tuple of "
            "tensors only, and a frame's output is more than that."
        )

    def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(keep_domain(function), *args, use_reentrant=False, **kwargs)

    return run


def checkpoint_frames(model: Sam2VideoModel, every_n_frames: int) -> None:
    """Sets that each n-th frame is checkpointed as a whole.

    Layers within a frame step are not checkpointed again, although their `gradient_checkpointing` says so as that of
    all layers does: they get no tensors as positional arguments, so that on a GPU their dropout would be drawn anew.
    """
    model.checkpoint_every_n_frames = every_n_frames
    for part in (model.mask_decoder, model.memory_encoder):
        for module in part.modules():
            if hasattr(module, "gradient_checkpointing"):
                module._gradient_checkpointing_func = _call


def _call(function: Callable, *args: Any) -> Any:
    return function(*args)


def _frame_checkpointing(model: Sam2VideoModel) -> Callable[[int], Callable]:
    """Frame index -> what runs a function on arguments: gradient checkpointing, or a plain call."""
    checkpointed = model.gradient_checkpointing and model.training and torch.is_grad_enabled()

    def recompute(function: Callable, *tensors: Tensor) -> Any:
        return model._gradient_checkpointing_func(recomputable(function), *tensors)

    every = model.checkpoint_every_n_frames
    return lambda frame_idx: recompute if checkpointed and frame_idx % every == 0 else _call


def _segment_frame(
    *image: Tensor,
    model: Sam2VideoModel,
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

    Both in one function, so that gradient checkpointing also spares what the loss needs. `image` are the tensors of
    [`ImageFeatures`].
    """
    output = frame_step(
        model,
        ImageFeatures(*image),
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
    model: Sam2VideoModel,
    steps: list[LossParts],
    object_mask: Tensor,
    calls: Mapping[str, Sequence[Tensor]],
    domains: Sequence[str | None],
    count: Tensor,
) -> tuple[Tensor, LossParts]:
    """The total loss and its parts, summed over frames and clicks and divided by `count` objects.

    Args:
        calls: name of each layer -> router logits of its calls.
        domains: of each clip.
    """
    parts = {name: sum(step[name] for step in steps) / count for name in steps[0]}
    loss = model.segmentation_loss.total(parts)
    parts["router"] = torch.zeros_like(loss)
    coefficient = model.config.router_aux_loss_coef
    if coefficient > 0:
        # Of each clip alone, so that it does not matter which clips share a batch.
        per_token = {name: model.get_submodule(name).num_experts_per_tok for name in calls}
        by_clip = router_logits_by_clip(calls, object_mask, domains)
        for logits, num_objects in zip(by_clip, object_mask.sum(dim=1), strict=True):
            if logits:
                balance = load_balancing_loss(logits, per_token)
                parts["router"] = parts["router"] + balance * num_objects / count
        loss = loss + coefficient * parts["router"]
    return loss, {name: part.detach() for name, part in parts.items()}
