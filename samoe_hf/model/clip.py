"""The forward pass over clips: prompts on conditioning frames, all objects of all videos in one batch, and the loss."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .base_model import SamoePreTrainedModel
from .base_modules import ImageFeatures
from .batch_rows import BatchRow, use_rows
from .domain_choice import encoder_has_experts, resolve_clip_domains
from .domain_experts import keep_domain, use_domain
from .errors import InputError
from .expert_layer import expert_modules
from .expert_router import RouterCall, load_balancing_loss, recomputable, record_router_logits
from .frame_step import FrameOutput, encode_frames, frame_step, memory_limits
from .kept import keep_for_clip
from .losses import PADDING_LABEL, LossParts, mean_num_objects, num_labelled_objects
from .memory_bank import MemoryBank
from .memory_selection import remember, select_memories
from .prompt_recipe import Corrections, PromptRecipe, resolve_recipe
from .prompts import Prompt, check_tensor, prompt_from_inputs


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
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    object_score_logits: Tensor | None = None
    router_logits: dict[str, Tensor] | None = None
    domains: list[str | None] | None = None


@dataclass(frozen=True)
class ClipPrompts:
    """What is given on which frames of a clip, for all B * N objects in one batch.

    Attributes:
        initial: initial conditioning frame -> prompt.
        corrected: frame -> clicks drawn from its errors.
    """

    initial: Mapping[int, Prompt]
    corrected: Mapping[int, Corrections] = field(default_factory=dict)

    @classmethod
    def simulate(cls, recipe: PromptRecipe, labels: Tensor) -> "ClipPrompts":
        """Draws prompts from the true masks (B, N, T, S, S)."""
        plan = recipe.draw(labels.shape[2], labels.flatten(3).any(dim=3).flatten(0, 1))
        masks = {t: labels[:, :, t].flatten(0, 1) for t in {*plan.kinds, *plan.corrected}}
        return cls(
            {t: recipe.prompt(masks[t], kind) for t, kind in plan.kinds.items()},
            {t: recipe.corrections(masks[t]) for t in plan.corrected},
        )

    def rows(self, indices: Tensor) -> "ClipPrompts":
        """The prompts of some of the objects."""
        return ClipPrompts(
            {t: prompt.rows(indices) for t, prompt in self.initial.items()},
            {t: clicks._replace(masks=clicks.masks[indices]) for t, clicks in self.corrected.items()},
        )


@dataclass(frozen=True)
class Clips:
    """A batch of clips: T frames of B videos with N objects each, what is given of these, and the truth.

    Attributes:
        pixel_values: (B, T, 3, S, S).
        prompts: for all B * N objects.
        labels: (B, N, T, S, S) bool, the true masks.
        object_mask: with labels, (B, N) bool, False for padded objects.
        numbers: which clips of the whole batch these are.
    """

    pixel_values: Tensor
    prompts: ClipPrompts
    num_objects: int
    labels: Tensor | None = None
    object_mask: Tensor | None = None
    numbers: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.pixel_values)

    def select(self, clips: Sequence[int]) -> "Clips":
        """Some of the clips."""
        rows = torch.tensor(clips, device=self.pixel_values.device)
        objects = (rows[:, None] * self.num_objects + torch.arange(self.num_objects, device=rows.device)).flatten()
        return replace(
            self,
            pixel_values=self.pixel_values[rows],
            prompts=self.prompts.rows(objects),
            labels=None if self.labels is None else self.labels[rows],
            object_mask=None if self.object_mask is None else self.object_mask[rows],
            numbers=[self.numbers[clip] for clip in clips],
        )

    def frame_rows(self) -> Iterator[BatchRow]:
        """What the rows of all frames (B * T, ...) are."""
        return (BatchRow(clip, t) for clip in self.numbers for t in range(self.pixel_values.shape[1]))

    def object_rows(self, frame_idx: int) -> Iterator[BatchRow]:
        """What the rows of all objects (B * N, ...) on a frame are."""
        return (BatchRow(clip, frame_idx, n) for clip in self.numbers for n in range(self.num_objects))


class TrackedClips(NamedTuple):
    """What was segmented of clips: logits `pred_masks` (B, N, T, S / 4, S / 4), `iou_scores` and `object_score_logits`
    (B, N, T), and with true masks the loss of each frame and click."""

    pred_masks: Tensor
    iou_scores: Tensor
    object_score_logits: Tensor
    parts: list[LossParts]


def check_clip(pixel_values: Any, labels: Tensor | None, object_mask: Tensor | None, image_size: int) -> None:
    """Raises an `InputError` where tensors of a clip are of a wrong type, or their shapes do not agree."""
    size = (image_size, image_size)
    check_tensor("pixel_values", pixel_values, (..., ..., 3, *size))
    if not pixel_values.is_floating_point():
        raise InputError(f"`pixel_values` must be normalized frames, floating-point numbers, got {pixel_values.dtype}.")
    if labels is not None:
        videos, frames = pixel_values.shape[:2]
        check_tensor("labels", labels, (videos, ..., frames, *size))
        if labels.is_floating_point():
            raise InputError(f"`labels` must be bool or integers, got {labels.dtype}.")
        if object_mask is not None:
            check_tensor("object_mask", object_mask, labels.shape[:2])


def read_clips(
    pixel_values: Any,
    labels: Tensor | None,
    object_mask: Tensor | None,
    prompts: str | PromptRecipe,
    inputs: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    image_size: int,
) -> Clips:
    """Checks what is given of clips, and puts it together.

    Args:
        labels: (B, N, T, S, S), bool, or integers with -100 for padded objects.
        object_mask: (B, N) bool, False for further padded objects.
        prompts: how prompts are drawn from the labels, where no inputs are given.
        inputs: points, their labels, boxes and masks, see [`~prompts.prompt_from_inputs`].
    """
    check_clip(pixel_values, labels, object_mask, image_size)
    if labels is not None:
        real = torch.ones_like(labels[:, :, 0, 0, 0], dtype=torch.bool)
        if labels.dtype != torch.bool:
            real, labels = (labels != PADDING_LABEL).flatten(2).any(dim=2), labels > 0
        object_mask = real if object_mask is None else real & object_mask
    if labels is not None and all(value is None for value in inputs):
        num_objects = labels.shape[1]
        given = ClipPrompts.simulate(resolve_recipe(prompts), labels)
    else:
        prompt, num_objects = prompt_from_inputs(*inputs, len(pixel_values), image_size)
        if labels is not None and num_objects != labels.shape[1]:
            raise InputError(f"`labels` are of {labels.shape[1]} objects, but the prompts of {num_objects}.")
        given = ClipPrompts({0: prompt})
    return Clips(pixel_values, given, num_objects, labels, object_mask, range(len(pixel_values)))


def clip_forward(
    model: SamoePreTrainedModel,
    clips: Clips,
    domain: str | Sequence[str | None] | None,
    output_router_logits: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> SamoeClipOutput:
    """Tracks all objects through each clip, and with labels computes the loss; see
    [`~modeling_samoe.SamoeModel.forward`]."""
    has_router_loss = clips.labels is not None and model.config.router_aux_loss_coef > 0
    calls: dict[str, list[RouterCall]] = {}
    with record_router_logits(model) if output_router_logits or has_router_loss else nullcontext(calls) as calls:
        tracked, domains = _segment_by_domain(model, clips, domain)

    loss = loss_dict = None
    if clips.labels is not None and clips.object_mask is not None:
        if num_items_in_batch is None:
            count = mean_num_objects(clips.object_mask, over_processes=model.training)
        else:
            count = num_labelled_objects(num_items_in_batch, clips.labels)
        loss, loss_dict = _clip_loss(model, tracked.parts, clips.object_mask, calls, count)
    return SamoeClipOutput(
        loss=loss,
        loss_dict=loss_dict,
        pred_masks=tracked.pred_masks,
        iou_scores=tracked.iou_scores,
        object_score_logits=tracked.object_score_logits,
        router_logits=all_router_logits(calls) if output_router_logits else None,
        domains=None if model.config.domains is None else domains,
    )


def _segment_by_domain(
    model: SamoePreTrainedModel, clips: Clips, domain: str | Sequence[str | None] | None
) -> tuple[TrackedClips, list[str | None]]:
    """Segments the clips of each domain in one batch, so that each gives what it gives alone; also gives the
    domains."""
    features = None if encoder_has_experts(model) else _encode(model, clips)
    first = min(clips.prompts.initial)
    first_features = None if features is None else features.select((slice(None), first))
    decisions = resolve_clip_domains(model, domain, clips.pixel_values[:, first], first_features)
    domains, uses = [one.domain for one in decisions], [one.use for one in decisions]
    tracked, order = [], []
    for use in dict.fromkeys(uses):
        of_domain = [clip for clip, other in enumerate(uses) if other == use]
        is_all = len(of_domain) == len(clips)
        own = clips if is_all else clips.select(of_domain)
        with use_domain(use, model), keep_for_clip():
            if features is None:
                own_features = _encode(model, own)
            else:
                own_features = features if is_all else features.select(torch.tensor(of_domain))
            tracked.append(_segment_clips(model, own, own_features))
        order += of_domain
    if len(tracked) == 1:
        return tracked[0], domains
    places = torch.tensor(order).argsort()
    joined = TrackedClips(
        torch.cat([one.pred_masks for one in tracked])[places],
        torch.cat([one.iou_scores for one in tracked])[places],
        torch.cat([one.object_score_logits for one in tracked])[places],
        [part for one in tracked for part in one.parts],
    )
    return joined, domains


def _encode(model: SamoePreTrainedModel, clips: Clips) -> ImageFeatures:
    """Features of clips, whose maps are (B, T, ...)."""
    settings, frames = model.clip_settings, clips.pixel_values.flatten(0, 1)
    encode = encode_frames if settings.feature_cache is None else settings.feature_cache.encode_frames
    with use_rows(clips.frame_rows()):
        features = encode(model, frames, settings.encoder_batch_size)
    fine, middle, coarse = (x.unflatten(0, clips.pixel_values.shape[:2]) for x in features[:3])
    return features._replace(fine=fine, middle=middle, coarse=coarse)


def _segment_clips(model: SamoePreTrainedModel, clips: Clips, features: ImageFeatures) -> TrackedClips:
    """Segments conditioning frames first, then the others in time order; with labels, also gives each one's loss."""
    num_videos, num_frames = features.coarse.shape[:2]
    initial = clips.prompts.initial
    order = [*sorted(initial), *(t for t in range(num_frames) if t not in initial)]
    num_objects, parts = num_videos * clips.num_objects, []
    banks = [MemoryBank() for _ in range(num_objects)]
    limits = memory_limits(model, num_frames)
    outputs: dict[int, FrameOutput] = {}
    all_frames = features.coarse.flatten(0, 1).flatten(2).mT
    for frame_idx in order:
        prompt, corrections = initial.get(frame_idx), clips.prompts.corrected.get(frame_idx)
        kind, selections = model.memory_selection, []
        if prompt is None:
            selections = [select_memories(kind, bank, frame_idx, limits) for bank in banks]
        step = partial(
            frame_step,
            model,
            prompt=prompt,
            banks=banks,
            selections=selections,
            num_objects=num_objects,
            corrections=corrections,
            encode_memory=frame_idx != order[-1],
            memory_selection=kind,
        )
        loss = None
        if clips.labels is not None and clips.object_mask is not None:
            targets = clips.labels[:, :, frame_idx].flatten(0, 1)
            loss = partial(model.clip_settings.loss, targets=targets, object_mask=clips.object_mask.flatten())
        segment = partial(_segment_frame, step, loss)
        # The image's tensors are arguments because checkpointing keeps the random state of its arguments' devices.
        with use_rows(clips.object_rows(frame_idx)):
            image = features.select((slice(None), frame_idx))
            if not model.gradient_checkpointing:
                image = image._replace(together=(slice(frame_idx, None, num_frames), all_frames))
            output, frame_parts = _run_frame(model, frame_idx, segment, *image)
        is_conditioning = prompt is not None or corrections is not None
        for row, bank in enumerate(banks):
            remember(bank, frame_idx, output.memory.row(row), is_conditioning)
        outputs[frame_idx] = output
        parts += frame_parts

    def stack(tensors: Iterator[Tensor]) -> Tensor:
        return torch.stack(list(tensors), dim=1).unflatten(0, (num_videos, clips.num_objects))

    in_time = [outputs[t] for t in range(num_frames)]
    return TrackedClips(
        stack(output.masks[:, 0] for output in in_time),
        stack(output.best_iou for output in in_time),
        stack(output.object_score_logits[:, 0] for output in in_time),
        parts,
    )


def _run_frame(model: SamoePreTrainedModel, frame_idx: int, segment: Callable, *image: Any) -> Any:
    """Calls a function on an image's tensors; where frames are checkpointed, it is computed again in the backward
    pass."""
    is_due = frame_idx % model.clip_settings.checkpoint_every_n_frames == 0
    if model.gradient_checkpointing and model.training and torch.is_grad_enabled() and is_due:
        # It keeps what it computes for itself, in both passes.
        return model._gradient_checkpointing_func(recomputable(keep_for_clip()(segment)), *image)
    return segment(*image)


def _segment_frame(
    step: Callable[..., FrameOutput], loss: Callable[..., LossParts] | None, *image: Any
) -> tuple[FrameOutput, list[LossParts]]:
    """The frame step and, with true masks, the loss of each of its predictions, on the tensors of [`ImageFeatures`].

    Both in one function, so that gradient checkpointing also spares what the loss needs.
    """
    output = step(image=ImageFeatures(*image))
    if loss is None:
        return output, []
    predicted = [*output.before_clicks, output]
    parts = [loss(one.candidates, one.iou_scores, one.object_score_logits) for one in predicted]
    output.before_clicks = []
    return output, parts


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


def checkpoint_frames(model: SamoePreTrainedModel, every_n_frames: int) -> None:
    """Sets that each n-th frame is checkpointed as a whole.

    Layers within a frame step are not checkpointed again, although their `gradient_checkpointing` says so: they get no
    tensors as positional arguments, so that on a GPU their dropout would be drawn anew.
    """
    model.clip_settings.checkpoint_every_n_frames = every_n_frames
    for part in (model.mask_decoder, model.memory_encoder):
        for module in part.modules():
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "_gradient_checkpointing_func", operator.call)  # noqa: B010


def all_router_logits(calls: Mapping[str, Sequence[RouterCall]]) -> dict[str, Tensor]:
    """Router logits of all tokens: name of each layer that was run -> (tokens, experts)."""
    return {name: torch.cat([call.own_logits() for call in own]) for name, own in calls.items() if own}


def router_logits_by_clip(calls: Mapping[str, Sequence[RouterCall]], object_mask: Tensor) -> list[dict[str, Tensor]]:
    """Router logits of the tokens of each clip's real objects: name of each layer -> (tokens, experts).

    Args:
        calls: name of each layer -> its calls, see [`~expert_layer.record_router_logits`].
        object_mask: (B, N) bool.
    """
    real = object_mask.tolist()
    by_clip: list[dict[str, Tensor]] = [{} for _ in real]
    for name, own in calls.items():
        parts: list[list[Tensor]] = [[] for _ in real]
        for logits, (rows, shared, is_own) in own:
            if shared:
                for clip in {row.video for row in rows}:
                    parts[clip].append(logits.flatten(0, -2))
                continue
            of_clips: dict[int, list[int]] = {}
            for index, row in enumerate(rows):
                if row.object_id is None or real[row.video][row.object_id]:
                    of_clips.setdefault(row.video, []).append(index)
            # Rows of the image encoder may be cut into windows.
            by_row = logits.reshape(len(rows), -1, logits.shape[-1])
            for clip, indices in of_clips.items():
                chosen = by_row[indices]
                parts[clip].append(chosen.flatten(0, 1) if is_own is None else chosen[is_own[indices]])
        for clip, tokens in enumerate(parts):
            if tokens and any(real[clip]):
                by_clip[clip][name] = torch.cat(tokens)
    return by_clip


def _clip_loss(
    model: SamoePreTrainedModel,
    steps: list[LossParts],
    object_mask: Tensor,
    calls: Mapping[str, Sequence[RouterCall]],
    count: Tensor,
) -> tuple[Tensor, LossParts]:
    """The total loss and its parts, summed over frames and clicks and divided by `count` objects."""
    parts = {name: sum(step[name] for step in steps) / count for name in steps[0]}
    loss = model.clip_settings.loss.total(parts)
    parts["router"] = torch.zeros_like(loss)
    coefficient = model.config.router_aux_loss_coef
    if coefficient > 0:
        # Of each clip alone, so that it does not matter which clips share a batch.
        per_token = {name: module.num_experts_per_tok for name, module in expert_modules(model)}
        by_clip = router_logits_by_clip(calls, object_mask)
        for logits, num_objects in zip(by_clip, object_mask.sum(dim=1), strict=True):
            if logits:
                balance = load_balancing_loss(logits, per_token)
                parts["router"] = parts["router"] + balance * num_objects / count
        loss = loss + coefficient * parts["router"]
    return loss, {name: part.detach() for name, part in parts.items()}
