"""Tracking in a session: which objects run together on a frame, with which prompts and memories.

The session is transformers' own [`~transformers.Sam2VideoInferenceSession`]. Beside its outputs per object it keeps
that object's [`MemoryBank`] (under "memory_bank"), and with each output the prompt that it came from (under "prompt"):
a prompt is new as long as no output came from it. So prompts may be added one by one, in any order.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2VideoInferenceSession, Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoSegmentationOutput

from .frame_step import PREVIOUS_MASK_LIMIT, FrameOutput, ImageFeatures, Prompt, frame_step, image_features
from .memory_bank import MemoryBank, MemorySelection
from .session import VideoSession

# So many frames are encoded at once, if one does not fill the device: on a CPU, if images are this small. Sessions that
# cache more have more encoded at once, but not all that some of them have room for.
FRAMES_AHEAD, SMALL_IMAGE_SIZE, MAX_FRAMES_AHEAD = 4, 256, 16

# A session and the row of one of its objects.
Row = tuple[Sam2VideoInferenceSession, int]


class TrackedRow(NamedTuple):
    """What a row of a tensor belongs to: an object on a frame, or, in the image encoder (None), a frame."""

    frame_idx: int
    object_id: int | None


_tracked_rows: ContextVar[Sequence[TrackedRow]] = ContextVar("tracked_rows", default=())


def tracked_rows() -> Sequence[TrackedRow]:
    """What the rows of a batch belong to that is being computed; for hooks of modules. Empty where nothing is tracked.

    Tensors that do not depend on the objects have one row for all of them.
    """
    return _tracked_rows.get()


@contextmanager
def _tracking_rows(rows: Iterable[tuple[int, int | None]]) -> Iterator[None]:
    token = _tracked_rows.set([TrackedRow(*row) for row in rows])
    try:
        yield
    finally:
        _tracked_rows.reset(token)


class FrameTask(NamedTuple):
    """What objects must have in common to run on a frame in one batch."""

    is_initial: bool
    reverse: bool
    has_mask: bool
    num_points: int
    has_previous_mask: bool
    selection: MemorySelection | None


def track_frame(
    model: Sam2VideoModel,
    sessions: Sequence[Sam2VideoInferenceSession],
    frame_idx: int,
    *,
    reverse: bool = False,
    streaming: bool = False,
    run_mem_encoder: bool = True,
) -> list[Sam2VideoSegmentationOutput]:
    """Segments all objects of the sessions on one frame, after any new prompts on other frames.

    Returns:
        an output for each session.

    Raises:
        ValueError: if there is no object, no such frame, or an object that was never prompted; or if sessions differ
            in device or type.
    """
    for session in sessions:
        _check_session(model, session, frame_idx)
        run_new_prompts(model, session, except_frame=frame_idx, streaming=streaming)
    if len({(str(session.inference_device), session.dtype) for session in sessions}) > 1:
        raise ValueError("`sessions` must be of one `inference_device` and one `dtype` to be tracked together.")
    rows = [(session, row) for session in sessions for row in range(session.get_obj_num())]
    _segment_objects(model, rows, frame_idx, reverse, streaming, run_mem_encoder)
    return [_frame_result(session, frame_idx) for session in sessions]


def _check_session(model: Sam2VideoModel, session: Sam2VideoInferenceSession, frame_idx: int) -> None:
    if session.get_obj_num() == 0:
        raise ValueError("No objects are provided for tracking; please add inputs first.")
    if session.processed_frames is None or frame_idx not in session.processed_frames:
        raise ValueError(
            f"`frame_idx` must be a frame of the session ({session.num_frames or 0} frames), got {frame_idx}."
        )
    reach = max(model.num_maskmem, model.config.max_object_pointers_in_encoder)
    if isinstance(session, VideoSession) and session.keep_frames < reach:
        raise ValueError(f"`keep_frames` must be at least the model's reach of {reach}, got {session.keep_frames}.")


def _frame_result(session: Sam2VideoInferenceSession, frame_idx: int) -> Sam2VideoSegmentationOutput:
    """What came of all objects of a session on a frame."""
    outputs = [_output(session, row, frame_idx) for row in range(session.get_obj_num())]
    if isinstance(session, VideoSession):
        session.forget(frame_idx)
    device = session.inference_device
    return Sam2VideoSegmentationOutput(
        object_ids=session.obj_ids.copy(),
        pred_masks=torch.cat([output["pred_masks"].to(device) for output in outputs]),
        object_score_logits=torch.cat([output["object_score_logits"] for output in outputs]),
        frame_idx=frame_idx,
    )


def run_new_prompts(
    model: Sam2VideoModel,
    session: Sam2VideoInferenceSession,
    except_frame: int | None = None,
    streaming: bool = False,
) -> None:
    """Segments the objects that have new prompts on frames other than `except_frame`, on those frames, in order."""
    rows_by_frame = defaultdict(list)
    for row in range(session.get_obj_num()):
        for frame_idx in {*session.point_inputs_per_obj[row], *session.mask_inputs_per_obj[row]}:
            is_there = frame_idx in (session.processed_frames or ()) and frame_idx != except_frame
            if is_there and _new_prompt(session, row, frame_idx) is not None:
                rows_by_frame[frame_idx].append(row)
    for frame_idx in sorted(rows_by_frame):
        rows = [(session, row) for row in rows_by_frame[frame_idx]]
        _segment_objects(model, rows, frame_idx, False, streaming, True)


def remove_object(session: Sam2VideoInferenceSession, obj_id: int, strict: bool = False) -> None:
    """Removes an object with all its prompts, outputs and memories; the others keep theirs.

    Args:
        strict: whether an unknown `obj_id` is a `ValueError`.
    """
    if obj_id not in session._obj_id_to_idx:
        if strict:
            raise ValueError(f"`obj_id` must be one of {session.obj_ids}, got {obj_id}.")
        return
    kept = [row for other, row in session._obj_id_to_idx.items() if other != obj_id]
    session.obj_ids = [session.obj_idx_to_id(row) for row in kept]
    session._obj_id_to_idx = OrderedDict((other, row) for row, other in enumerate(session.obj_ids))
    session._obj_idx_to_id = OrderedDict(enumerate(session.obj_ids))
    for name in ("point_inputs_per_obj", "mask_inputs_per_obj", "output_dict_per_obj", "frames_tracked_per_obj"):
        table = getattr(session, name)
        setattr(session, name, {new: table[old] for new, old in enumerate(kept)})
    session.obj_with_new_inputs = [other for other in session.obj_with_new_inputs if other != obj_id]


def _segment_objects(
    model: Sam2VideoModel, rows: Sequence[Row], frame_idx: int, reverse: bool, streaming: bool, run_mem_encoder: bool
) -> None:
    """Segments the given objects on a frame, those with equal tasks in one batch, and stores the outputs."""
    batches = defaultdict(list)
    for session, row in rows:
        task = _frame_task(model, session, row, frame_idx, reverse, None if streaming else session.num_frames)
        if task is not None:
            batches[task].append((session, row))
    _encode_frames(model, _unique_sessions(row for batch in batches.values() for row in batch), frame_idx, reverse)
    for task, batch in batches.items():
        with _tracking_rows((frame_idx, session.obj_idx_to_id(row)) for session, row in batch):
            output = frame_step(
                model,
                _image_features(model, batch, frame_idx),
                _batch_prompt(model, batch, frame_idx, task),
                [_memory_bank(*row) for row in batch],
                task.selection,
                num_objects=len(batch),
                encode_memory=run_mem_encoder,
                fill_hole_area=model.config.fill_hole_area,
            )
        memory, device = output.memory, batch[0][0].inference_state_device
        if memory.features is not None:
            memory.features = memory.features.to(device)
        output.masks = output.masks.to(device)
        for index, (session, row) in enumerate(batch):
            _store_output(session, row, frame_idx, task, output, index)


def _frame_task(
    model: Sam2VideoModel,
    session: Sam2VideoInferenceSession,
    row: int,
    frame_idx: int,
    reverse: bool,
    num_frames: int | None,
) -> FrameTask | None:
    """What is to be done for an object on a frame; None where its output is there and stays."""
    prompt, output = _new_prompt(session, row, frame_idx), _output(session, row, frame_idx)
    bank = _memory_bank(session, row)
    if prompt is None and output is not None and (frame_idx in bank.conditioning or output["prompt"] is not None):
        return None
    tracked = session.frames_tracked_per_obj[row].get(frame_idx)
    is_initial = prompt is not None and tracked is None
    if prompt is not None and tracked is not None:
        reverse = tracked["reverse"]
    has_mask = isinstance(prompt, Tensor)
    selection = None
    if not (is_initial or has_mask):
        if not bank.conditioning:
            raise ValueError(f"Object {session.obj_idx_to_id(row)} was never prompted; please add inputs for it first.")
        selection = bank.select(
            frame_idx,
            num_maskmem=model.num_maskmem,
            max_object_pointers=model.config.max_object_pointers_in_encoder,
            max_cond_frames=model.config.max_cond_frame_num,
            num_frames=num_frames,
            reverse=reverse,
            past_pointers_only=not model.training,
        )
    num_points = prompt["point_labels"].shape[-1] if isinstance(prompt, dict) else 0
    refines = num_points > 0 and output is not None and model.config.previous_mask_with_clicks
    return FrameTask(is_initial, reverse, has_mask, num_points, refines, selection)


def _batch_prompt(model: Sam2VideoModel, rows: Sequence[Row], frame_idx: int, task: FrameTask) -> Prompt | None:
    """The prompts of a batch of objects on a frame."""
    if task.has_mask:
        masks = torch.cat([session.mask_inputs_per_obj[row][frame_idx] for session, row in rows])
        if masks.shape[-2:] != (model.image_size, model.image_size):
            size = (model.image_size, model.image_size)
            masks = (F.interpolate(masks.float(), size, mode="bilinear", antialias=True) >= 0.5).to(masks.dtype)
        return Prompt(mask=masks)
    if not task.num_points:
        return None
    inputs = [session.point_inputs_per_obj[row][frame_idx] for session, row in rows]
    points = torch.cat([given["point_coords"][:, 0] for given in inputs])
    previous_mask = None
    if task.has_previous_mask:
        outputs = [_output(*row, frame_idx)["pred_masks"].to(points.device) for row in rows]
        previous_mask = torch.cat(outputs).clamp(-PREVIOUS_MASK_LIMIT, PREVIOUS_MASK_LIMIT).to(rows[0][0].dtype)
    return Prompt(
        points=points,
        labels=torch.cat([given["point_labels"][:, 0] for given in inputs]),
        previous_mask=previous_mask,
    )


def _store_output(
    session: Sam2VideoInferenceSession, row: int, frame_idx: int, task: FrameTask, output: FrameOutput, index: int
) -> None:
    """Stores one object's part of a batch's output in the session and in the object's memory bank."""
    outputs = session.output_dict_per_obj[row]
    memory = output.memory.row(index)
    kept = {
        "pred_masks": output.masks[index : index + 1],
        "object_pointer": memory.pointers,
        "object_score_logits": output.object_score_logits[index : index + 1],
        "prompt": _user_prompt(session, row, frame_idx),
    }
    if task.is_initial:
        outputs["non_cond_frame_outputs"].pop(frame_idx, None)
        outputs["cond_frame_outputs"][frame_idx] = kept
    else:
        outputs["non_cond_frame_outputs"][frame_idx] = kept
        session.frames_tracked_per_obj[row][frame_idx] = {"reverse": task.reverse}
    _memory_bank(session, row).write(frame_idx, memory, task.is_initial)
    session.obj_with_new_inputs = [i for i in session.obj_with_new_inputs if i != session.obj_idx_to_id(row)]


def _unique_sessions(rows: Iterable[Row]) -> list[Sam2VideoInferenceSession]:
    return list({id(session): session for session, _ in rows}.values())


def _image_features(model: Sam2VideoModel, rows: Sequence[Row], frame_idx: int) -> ImageFeatures:
    """Features of a frame of each object's session; one row where all objects are of one session."""
    distinct = _unique_sessions(rows)
    by_session = [
        ImageFeatures(*session.cache.get_vision_features(frame_idx)["image_features"]) for session in distinct
    ]
    if len(distinct) == 1:
        return by_session[0]
    index = {id(session): place for place, session in enumerate(distinct)}
    places = torch.tensor([index[id(session)] for session, _ in rows], device=by_session[0].coarse.device)
    levels = (torch.cat(level)[places] for level in list(zip(*by_session, strict=True))[:3])
    return ImageFeatures(*levels, *by_session[0][3:])


def _encode_frames(
    model: Sam2VideoModel, sessions: Sequence[Sam2VideoInferenceSession], frame_idx: int, reverse: bool
) -> None:
    """Encodes the frame, for sessions that have not cached its features, and those ahead that their caches hold."""
    step = -1 if reverse else 1
    wanted = []
    for session in sessions:
        if session.cache.get_vision_features(frame_idx) is None:
            count = min(max(session.cache.max_vision_features_cache_size, 1), MAX_FRAMES_AHEAD)
            ahead = range(frame_idx, frame_idx + step * count, step)
            if ahead[-1] not in session.processed_frames:
                ahead = ahead[:1]  # so that a compiled encoder meets two sizes of batches only
            wanted += [(session, t) for t in ahead]
            session.cache.clear_all()
    if wanted:
        with _tracking_rows((t, None) for _, t in wanted):
            features = image_features(model, torch.stack([session.get_frame(t) for session, t in wanted]))
        for row, (session, t) in enumerate(wanted):
            one = [*(level[row : row + 1] for level in features[:3]), *features[3:]]
            session.cache.cache_vision_features(t, {"image_features": one})


@contextmanager
def encoding_ahead(model: Sam2VideoModel, session: Sam2VideoInferenceSession) -> Iterator[None]:
    """While the context is open, which is while the video is propagated, frames are encoded a few at a time.

    One frame does not fill a GPU, nor does a small one fill a CPU. A session that caches more frames has its way.
    """
    is_filled_by_one = torch.device(session.inference_device).type == "cpu" and model.image_size > SMALL_IMAGE_SIZE
    cache = session.cache
    before = cache.max_vision_features_cache_size
    if is_filled_by_one or before >= FRAMES_AHEAD:
        yield
        return
    cache.max_vision_features_cache_size = FRAMES_AHEAD
    try:
        yield
    finally:
        cache.max_vision_features_cache_size = before
        cache.clear_all()


def _user_prompt(session: Sam2VideoInferenceSession, row: int, frame_idx: int) -> Any:
    """What the user gave of an object on a frame: a mask (1, 1, S, S), points with labels in a dict, or None."""
    mask = session.mask_inputs_per_obj[row].get(frame_idx)
    points = session.point_inputs_per_obj[row].get(frame_idx)
    if mask is not None and points is not None:
        raise ValueError(f"Object {session.obj_idx_to_id(row)} has both points and a mask on frame {frame_idx}.")
    return points if mask is None else mask


def _new_prompt(session: Sam2VideoInferenceSession, row: int, frame_idx: int) -> Any:
    """What the user gave, if no output came from it yet."""
    given, output = _user_prompt(session, row, frame_idx), _output(session, row, frame_idx)
    return None if output is not None and output["prompt"] is given else given


def _output(session: Sam2VideoInferenceSession, row: int, frame_idx: int) -> dict[str, Any] | None:
    outputs = session.output_dict_per_obj[row]
    conditioning = outputs["cond_frame_outputs"].get(frame_idx)
    return conditioning if conditioning is not None else outputs["non_cond_frame_outputs"].get(frame_idx)


def _memory_bank(session: Sam2VideoInferenceSession, row: int) -> MemoryBank:
    return session.output_dict_per_obj[row].setdefault("memory_bank", MemoryBank())
