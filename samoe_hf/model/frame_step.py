"""One frame: image features, memories and prompts in; masks, object pointers and a new memory out.

Training over a clip and tracking in a session both run [`frame_step`], batched over objects. It follows
`sam2/modeling/sam2_base.py`, over the modules of [`~transformers.Sam2VideoModel`].
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.sam2_video.modeling_sam2_video import NO_OBJ_SCORE

from .base_interface import NUM_LEVELS
from .base_model import SamoePreTrainedModel
from .base_modules import ImageFeatures
from .batch_rows import batch_rows, use_rows
from .graphs import Graphs, uncompiled, varying
from .memory_bank import FrameMemory, MemoryBank
from .memory_evidence import judge
from .memory_selection import MemoryLimits, MemorySelection
from .memory_tokens import MemoryTokens, fill_up, full_length, memory_tokens
from .prompt_recipe import Corrections
from .prompts import Prompt

# For outputs with names, whatever the configuration says.
AS_OBJECT: dict[str, Any] = {"return_dict": True}
# A mask prompt becomes logits of -10 and +10, for the mask and for the object score (arXiv:2408.00714, `sam2`).
MASK_PROMPT_SCALE, MASK_PROMPT_BIAS = 20.0, -10.0


@dataclass
class FrameOutput:
    """Result of a frame for a batch of objects; the M candidates are 3, or 1 where no ambiguity is expected.

    `candidates` (objects, M, S / 4, S / 4): mask logits; a given mask (objects, 1, S, S) is the only one.
    `iou_scores` (objects, M): their estimated IoU.
    `masks` (objects, 1, S / 4, S / 4): the candidate with the best score. `best_iou` (objects,): that score.
    `object_score_logits` (objects, 1): positive where the object is seen. `memory`: what later frames read.
    `before_clicks`: what was predicted before each correction click.
    """

    candidates: Tensor
    iou_scores: Tensor
    masks: Tensor
    best_iou: Tensor
    object_score_logits: Tensor
    memory: FrameMemory
    before_clicks: list["FrameOutput"] = field(default_factory=list)


def encode_frames(model: SamoePreTrainedModel, pixel_values: Tensor, batch_size: int | None = None) -> ImageFeatures:
    """Encodes frames (rows, 3, S, S), once for all their objects, `batch_size` at a time or all at once."""
    # What is compiled meets frames one by one, however many are wanted.
    size = batch_size or (len(pixel_values) if model.graphs is None else 1)
    parts, rows = [], batch_rows().rows
    for start in range(0, len(pixel_values), size):
        frames = pixel_values[start : start + size]
        with use_rows(rows[start : start + size]):
            outputs: Any = model.outlive_graphs(model.get_image_features(frames, **AS_OBJECT))
        maps = zip(outputs.fpn_hidden_states[:NUM_LEVELS], model.backbone_feature_sizes, strict=False)
        # From (tokens, rows, channels), as transformers keeps features, to (rows, channels, height, width).
        parts.append([x.permute(1, 2, 0).unflatten(2, tuple(size)) for x, size in maps])
    levels = [torch.cat(x) for x in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]
    return with_positions(model, *levels)


def with_positions(model: SamoePreTrainedModel, fine: Tensor, middle: Tensor, coarse: Tensor) -> ImageFeatures:
    """Adds the encodings of positions, which are the same for all images, to three levels of features."""
    position = model.vision_encoder.neck.position_encoding((1, *coarse.shape[1:]), coarse.device, coarse.dtype)
    return ImageFeatures(
        fine, middle, coarse, position.flatten(2).permute(2, 0, 1), model.get_image_wide_positional_embeddings()
    )


def memory_limits(model: SamoePreTrainedModel, num_frames: int | None) -> MemoryLimits:
    """How much a model's frames read, in a video of so many frames, or of an unknown number."""
    return MemoryLimits(
        num_maskmem=model.num_maskmem,
        max_object_pointers=model.config.max_object_pointers_in_encoder,
        max_cond_frames=model.config.max_cond_frame_num,
        num_frames=num_frames,
        past_pointers_only=not model.training,
    )


def frame_step(
    model: SamoePreTrainedModel,
    image: ImageFeatures,
    prompt: Prompt | None,
    banks: Sequence[MemoryBank],
    selections: Sequence[MemorySelection],
    *,
    num_objects: int,
    corrections: Corrections | None = None,
    encode_memory: bool = True,
    fill_hole_area: int = 0,
    memory_selection: str = "recent",
) -> FrameOutput:
    """Segments a batch of objects on one frame.

    In training (`model.training`) memories are made of sigmoid(mask) and keep their type; otherwise masks of prompted
    frames are binarized first and memories are rounded to the base's type of memories, as `sam2` does.

    Args:
        image: features of the frame, a row for each object, or for each video, of whose objects there are as many.
        prompt: what is given on this frame.
        banks: memories of each object.
        selections: what each object reads of them; nothing at all on initially prompted frames.
        corrections: clicks that are drawn from the errors of the prediction (in training).
        encode_memory: whether later frames will read this one.
        fill_hole_area: holes up to this many pixels are filled in the masks that are put out.
        memory_selection: how later frames choose among memories, and so what they will ask of this one.
    """
    has_mask = prompt is not None and prompt.mask is not None
    reads = selections and model.num_maskmem > 0 and not has_mask
    tokens = memory_tokens(model, banks, selections, image.coarse) if reads else None
    if tokens is not None and prompt is None and model.graphs is not None:
        output = _run_graph(
            model, model.graphs, image.for_objects(num_objects // len(image.coarse)), tokens, fill_hole_area
        )
    else:
        # Frames with prompts are few, and of many kinds. Training compiles the modules, not the frame.
        with nullcontext() if model.graphs is None else uncompiled():
            rest = num_objects, fill_hole_area, encode_memory, corrections
            output = _segment_and_remember(model, image, prompt, tokens, *rest)
    if encode_memory and memory_selection != "recent":
        output.memory.evidence = judge(
            output.masks,
            output.candidates,
            output.iou_scores,
            output.object_score_logits,
            find_doubles=memory_selection == "distractor",
        )
    return output


def _segment_and_remember(
    model: SamoePreTrainedModel,
    image: ImageFeatures,
    prompt: Prompt | None,
    tokens: MemoryTokens | None,
    num_objects: int,
    fill_hole_area: int,
    encode_memory: bool = True,
    corrections: Corrections | None = None,
) -> FrameOutput:
    """As [`frame_step`], with the memories that are read, but for the evidence."""
    of_videos, image = image, image.for_objects(num_objects // len(image.coarse))
    is_initial = tokens is None
    is_prompted, high_res_masks = prompt is not None and not model.training, None
    if prompt is not None and prompt.mask is not None:
        output, high_res_masks = take_mask(model, image, prompt.mask)
    else:
        if tokens is not None:
            coarse = _condition_on_memory(model, of_videos, tokens)
        elif model.num_maskmem == 0:
            coarse = image.coarse
        else:
            coarse = image.coarse + model.no_memory_embedding.view(1, -1, 1, 1)
        multimask = _use_multimask(model, prompt, is_initial)
        output = _segment(model, image, coarse, prompt, multimask, num_objects)
        if corrections is not None:
            output = _correct(model, image, coarse, prompt, corrections, output, is_initial)
    predicted = output.masks
    if fill_hole_area:
        output.masks = fill_holes(predicted, fill_hole_area)
    if encode_memory and model.num_maskmem > 0:
        if is_prompted or high_res_masks is None:
            # `sam2` encodes what the user sees of a prompted frame, and the raw prediction of any other.
            high_res_masks = resize(output.masks if is_prompted else predicted, model.config.image_size)
        scores = output.object_score_logits
        output.memory.features = memory_map(model, image.coarse, high_res_masks, scores, is_prompted)
    return output


def _run_graph(
    model: SamoePreTrainedModel, graphs: Graphs, image: ImageFeatures, tokens: MemoryTokens, fill_hole_area: int
) -> FrameOutput:
    """A frame without prompts in one graph, which is compiled once for one object, and once for several.

    Where graphs are recorded, objects are filled up to 1, 2, 4, 8 ..., and memories to as many as there can be.
    """
    num_objects, length = tokens.memory.shape[:2]
    levels = image[:3]
    if graphs.are_recorded:
        added = (1 << (num_objects - 1).bit_length()) - num_objects
        tokens = fill_up(tokens, added, full_length(model, length) - length)
        levels = levels if len(image.coarse) == 1 else [F.pad(x, (0, 0) * 3 + (0, added)) for x in levels]
    memory, position, rotation, is_read = tokens
    if is_read is None and memory.device.type == "cpu":  # where a mask costs nothing
        is_read = memory.new_ones(memory.shape[:2], dtype=torch.bool)
    fine, middle, coarse = (varying(x, 0) for x in levels)
    tokens = MemoryTokens(
        varying(memory, 0, 1),
        varying(position.expand_as(memory), 0, 1),
        varying(rotation, 0),
        None if is_read is None else varying(is_read, 0, 1),
    )
    image = image._replace(fine=fine, middle=middle, coarse=coarse, together=None)
    outputs = graphs.run(_track, model, image, tokens, fill_hole_area)
    candidates, ious, masks, best_iou, scores, pointers, features = graphs.outlive([x[:num_objects] for x in outputs])
    return FrameOutput(candidates, ious, masks, best_iou, scores, FrameMemory(pointers, features))


def _track(
    model: SamoePreTrainedModel, image: ImageFeatures, tokens: MemoryTokens, fill_hole_area: int
) -> list[Tensor]:
    """The tensors of [`_segment_and_remember`]'s output, for a frame without prompts."""
    output = _segment_and_remember(model, image, None, tokens, tokens.memory.shape[0], fill_hole_area)
    assert output.memory.features is not None
    rest = output.candidates, output.iou_scores, output.masks, output.best_iou, output.object_score_logits
    return [*rest, output.memory.pointers, output.memory.features]


def _use_multimask(model: SamoePreTrainedModel, prompt: Prompt | None, is_initial: bool) -> bool:
    """Whether three candidates are wanted: where the object is not yet told by several points."""
    config = model.config
    num_points = 0 if prompt is None or prompt.labels is None else prompt.labels.shape[1]
    return (
        config.multimask_output_in_sam
        and (is_initial or config.multimask_output_for_tracking)
        and config.multimask_min_pt_num <= num_points <= config.multimask_max_pt_num
    )


def _condition_on_memory(model: SamoePreTrainedModel, image: ImageFeatures, tokens: MemoryTokens) -> Tensor:
    """Features of the frame, conditioned on the memories: (objects, hidden, S / 16, S / 16)."""
    arguments = image.coarse.flatten(2).mT, image.position.transpose(0, 1), *tokens
    conditioned = model.memory_attention(*arguments, together=image.together)
    return model.outlive_graphs(conditioned).mT.unflatten(2, image.coarse.shape[-2:])


def _segment(
    model: SamoePreTrainedModel,
    image: ImageFeatures,
    coarse: Tensor,
    prompt: Prompt | None,
    multimask: bool,
    num_objects: int,
) -> FrameOutput:
    """Runs SAM's prompt encoder and mask decoder."""
    sparse, dense = embed_prompt(model, prompt, num_objects)
    decoded = model.mask_decoder(
        image_embeddings=coarse,
        image_positional_embeddings=image.decoder_position,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        high_resolution_features=[image.fine, image.middle],
    )
    return take_best(model, model.outlive_graphs(decoded))


def take_best(model: SamoePreTrainedModel, decoded: tuple[Tensor, Tensor, Tensor, Tensor]) -> FrameOutput:
    """Takes the best of the mask decoder's masks, and its token as object pointer."""
    masks, iou_scores, tokens, object_score_logits = (x.squeeze(1) for x in decoded)
    masks = _at_least_float32(masks)
    visible = object_score_logits > 0
    candidates = torch.where(visible[..., None, None], masks, NO_OBJ_SCORE)
    chosen, best_iou, token = candidates, iou_scores[:, 0], tokens[:, 0]
    if tokens.shape[1] > 1:
        rows, best = torch.arange(masks.shape[0], device=masks.device), iou_scores.argmax(dim=-1)
        chosen, best_iou, token = candidates[rows, best].unsqueeze(1), iou_scores[rows, best], tokens[rows, best]
    pointers = model.object_pointer_proj(token)
    return FrameOutput(
        candidates=candidates,
        iou_scores=iou_scores,
        masks=chosen,
        best_iou=best_iou,
        object_score_logits=object_score_logits,
        memory=FrameMemory(_hide_pointers(model, pointers, visible)),
    )


def embed_prompt(model: SamoePreTrainedModel, prompt: Prompt | None, num_objects: int) -> tuple[Tensor, Tensor]:
    """Tokens (objects, 1, points, hidden) and maps (objects or 1, hidden, S / 16, S / 16) that stand for a prompt."""
    encoder = model.prompt_encoder
    points = None if prompt is None or prompt.points is None else prompt.points.unsqueeze(1)
    labels = None if prompt is None or prompt.labels is None else prompt.labels.unsqueeze(1)
    previous_mask = None if prompt is None else prompt.previous_mask
    if previous_mask is not None:
        previous_mask = previous_mask.to(encoder.no_mask_embed.weight.dtype)  # logits are in float32 at least
    sparse, dense = encoder(input_points=points, input_labels=labels, input_boxes=None, input_masks=previous_mask)
    if points is None:
        # `sam2` gives a padding point instead, and pads it with another.
        sparse = encoder.not_a_point_embed.weight.expand(num_objects, 1, 2, -1)
    return sparse, dense


def _correct(
    model: SamoePreTrainedModel,
    image: ImageFeatures,
    coarse: Tensor,
    prompt: Prompt | None,
    corrections: Corrections,
    output: FrameOutput,
    is_initial: bool,
) -> FrameOutput:
    """Adds clicks one by one, each refining the mask before it."""
    before = []
    for _ in range(corrections.num_clicks):
        before.append(output)
        predictions = resize(output.masks.detach(), model.config.image_size)[:, 0] > 0
        points, labels = corrections.draw(predictions)
        if prompt is not None and prompt.points is not None and prompt.labels is not None:
            points = torch.cat([prompt.points, points], dim=1)
            labels = torch.cat([prompt.labels, labels], dim=1)
        prompt = Prompt(points=points, labels=labels, previous_mask=output.masks)
        multimask = _use_multimask(model, prompt, is_initial)
        output = _segment(model, image, coarse, prompt, multimask, len(points))
    output.before_clicks = before
    return output


def _hide_pointers(model: SamoePreTrainedModel, pointers: Tensor, visible: Tensor) -> Tensor:
    """Pointers (objects, hidden), replaced by the learned one where `visible` (objects, 1) is false."""
    return torch.where(visible, pointers, model.no_object_pointer)


def take_mask(model: SamoePreTrainedModel, image: ImageFeatures, mask: Tensor) -> tuple[FrameOutput, Tensor]:
    """Takes a given mask (objects, 1, S, S) as the output; the decoder only makes the object pointer from it."""
    num_objects = mask.shape[0]
    mask = mask.to(image.coarse.dtype)
    # The pointer is made from a mask of the size of memories' masks, since it is made 4 times smaller.
    prompt = Prompt(previous_mask=model.mask_downsample(to_memory_size(model, mask)))
    output = _segment(model, image, image.coarse, prompt, multimask=False, num_objects=num_objects)
    visible = mask.flatten(1).any(dim=1, keepdim=True)
    high_res_masks = _at_least_float32(mask) * MASK_PROMPT_SCALE + MASK_PROMPT_BIAS
    low_res_size = model.prompt_encoder.mask_input_size
    low_res_masks = F.interpolate(high_res_masks, low_res_size, mode="bilinear", antialias=True)
    # A mask that is too small for that size keeps the pixel of which it covers most.
    largest = low_res_masks.amax((-2, -1), keepdim=True)
    is_kept = visible[..., None, None] & (largest <= 0) & (low_res_masks == largest)
    low_res_masks = torch.where(is_kept, MASK_PROMPT_SCALE + MASK_PROMPT_BIAS, low_res_masks)
    return FrameOutput(
        candidates=high_res_masks,
        iou_scores=torch.ones_like(output.iou_scores),
        masks=low_res_masks,
        best_iou=torch.ones_like(output.best_iou),
        object_score_logits=visible.to(low_res_masks.dtype) * MASK_PROMPT_SCALE + MASK_PROMPT_BIAS,
        memory=FrameMemory(_hide_pointers(model, output.memory.pointers, visible)),
    ), high_res_masks


def memory_map(
    model: SamoePreTrainedModel, coarse: Tensor, masks: Tensor, object_score_logits: Tensor, binarize: bool
) -> Tensor:
    """Encodes a frame and its masks (objects, 1, S, S), as logits, into a memory (objects, tokens, channels)."""
    masks = to_memory_size(model, masks)
    masks = (masks > 0).to(masks.dtype) if binarize else masks.sigmoid()
    masks = masks * model.config.sigmoid_scale_for_mem_enc + model.config.sigmoid_bias_for_mem_enc
    features, _ = model.outlive_graphs(model.memory_encoder(coarse, masks.to(coarse.dtype)))
    if model.occlusion_spatial_embedding_parameter is not None:
        hidden = (object_score_logits <= 0).to(features.dtype)[..., None, None]
        features = features + hidden * model.occlusion_spatial_embedding_parameter[..., None, None]
    features = model.base.memory_tokens(model, features)
    return features if model.training else features.to(dtype=model.base.memory_dtype)


def to_memory_size(model: SamoePreTrainedModel, masks: Tensor) -> Tensor:
    """Masks or logits (objects, 1, H, W) at the size that memories are made from: the input's of SAM 2, not of SAM 3.

    transformers resizes logits, which is what is done here. The original of SAM 3 resizes probabilities.
    """
    size = tuple(4 * side for side in model.prompt_encoder.mask_input_size)
    if masks.shape[-2:] == size:
        return masks
    # CPUs have no such kernel in 16 bits.
    resized = F.interpolate(_at_least_float32(masks), size, mode="bilinear", align_corners=False, antialias=True)
    return resized.to(masks.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resize(masks: Tensor, size: int) -> Tensor:
    return F.interpolate(masks, size=(size, size), mode="bilinear", align_corners=False)


def fill_holes(masks: Tensor, max_area: int) -> Tensor:
    """Raises background regions (8-connected, logits <= 0) of up to `max_area` pixels of (rows, 1, H, W) to 0.1, as
    `sam2`."""
    background = masks <= 0
    height, width = masks.shape[-2:]
    index = torch.arange(1, height * width + 1, device=masks.device, dtype=torch.float32).view(1, 1, height, width)
    labels = index * background
    # The largest index spreads over a region; one of `max_area` pixels is covered after that many steps.
    for _ in range(max_area):
        labels = F.max_pool2d(labels, 3, stride=1, padding=1) * background
    settled = F.max_pool2d(labels, 3, stride=1, padding=1) * background == labels
    flat = labels.long().flatten(1)
    area = torch.zeros_like(index.expand_as(masks).flatten(1).long())
    area = F.pad(area, (1, 0)).scatter_add(1, flat, torch.ones_like(flat))
    unsettled = torch.zeros_like(area).scatter_add(1, flat, (~settled).flatten(1).long())
    small = (area.gather(1, flat) <= max_area) & (unsettled.gather(1, flat) == 0)
    return torch.where(background & small.view_as(background), 0.1, masks)
