"""Tracking in a session: which objects run together on a frame, with which prompts and memories.

The session is transformers' own [`~transformers.Sam2VideoInferenceSession`]; what it keeps of each object beside its
outputs is described in `session.py`. Prompts may be added one by one, in any order.
"""

import operator
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from statistics import median
from tempfile import SpooledTemporaryFile
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.models.sam2_video.modeling_sam2_video import NO_OBJ_SCORE, Sam2VideoSegmentationOutput
from transformers.utils import logging as transformers_logging

from .base import InferenceSession
from .base_model import SamoePreTrainedModel
from .base_modules import ImageFeatures
from .batch_rows import BatchRow, use_rows
from .domain_choice import (
    DomainDecision,
    decide_domains,
    encoder_has_experts,
    is_decision_due,
    session_domain,
    store_decision,
)
from .domain_experts import DomainUse, use_domain
from .errors import InputError
from .frame_step import FrameOutput, encode_frames, frame_step, memory_limits
from .kept import keep_between
from .memory_bank import MemoryBank
from .memory_selection import MemorySelection, select_memories
from .prompts import Prompt, join_prompts, num_points
from .session import FrameRecord, SessionObject, check_prompt, session_objects

# As loud as transformers is told to be.
logger = transformers_logging.get_logger(f"transformers.{__name__}")

T = TypeVar("T")

# So many frames are encoded at once, if one does not fill the device: on a CPU, if images are this small. Sessions that
# cache more have more encoded at once, but not all that some of them have room for.
FRAMES_AHEAD, SMALL_IMAGE_SIZE, MAX_FRAMES_AHEAD = 4, 256, 16


# Of masks that wait for further objects; more are in a temporary file.
HELD_BYTES = 2**26
# Where objects of a batch read unequally many memories, these leave some out. Others cannot, and run them apart.
MASKED_ATTENTION = ("eager", "sdpa")


@dataclass
class SamoeTrackingOutput(Sam2VideoSegmentationOutput):
    """Output of [`SamoeModel`] for a frame of a session: that of Sam2VideoModel, how good masks are, and whose experts
    were run.

    Args:
        iou_scores: (objects, 1), the IoU that the model expects of each mask; 1 for a mask that was given.
        domain: of a model with domains: whose experts the video got; None for the base's output.
        domain_confidence: from 0 to 1, how sure the gate is; None where the user has decided.
        domain_rivals: where the gate took one of several domains that look alike, how likely each is, the taken first.
        domain_unknown: "nearest" or "mix" where the gate knows no such video, and it gets the domain's experts
            nevertheless, see [`SamoeConfig`].
    """

    iou_scores: Tensor | None = None
    domain: str | None = None
    domain_confidence: float | None = None
    domain_rivals: dict[str, float] | None = None
    domain_unknown: str | None = None


class FrameCall(NamedTuple):
    """A frame that is to be segmented, and how.

    `streaming`: whether it is the newest frame of a stream, of unknown length. `run_mem_encoder`: whether other frames
    will read it.
    """

    frame_idx: int
    reverse: bool = False
    streaming: bool = False
    run_mem_encoder: bool = True


class FrameTask(NamedTuple):
    """What objects must have in common to be segmented on a frame in one batch.

    `prompted`: whether a new prompt is segmented. `for_show`: whether the object is only shown beside another's prompt.
    `reads_memory`: whether anything was seen of the object before, on which the frame depends.
    """

    prompted: bool
    for_show: bool
    is_conditioning: bool
    reverse: bool
    has_mask: bool
    num_points: int
    has_previous_mask: bool
    reads_memory: bool
    memory_selection: str


@dataclass(eq=False)
class TrackingStep:
    """Objects of one session that are to be segmented on a frame, by [`run_steps`] with those of other sessions.

    `seconds`: the session's share of the time that this took, set by [`run_timed`].
    """

    tasks: Sequence[tuple[SessionObject, FrameTask]]
    call: FrameCall
    seconds: float = 0.0

    @property
    def session(self) -> InferenceSession:
        """That of its objects; a step without tasks has none."""
        return self.tasks[0][0].session


# What is done for a session: each step is to be run before the iterator goes on; beside them, what comes of them.
Steps = Iterator[TrackingStep | T]


def run_alone(model: SamoePreTrainedModel, steps: Steps[T]) -> Iterator[T]:
    """What comes of a session's steps, each of which is run by itself; see also [`~kept.keep_between`]."""

    def run() -> Iterator[T]:
        for step in steps:
            if isinstance(step, TrackingStep):
                run_timed(model, [step])
            else:
                yield step

    return keep_between(run())


def run_timed(model: SamoePreTrainedModel, steps: Sequence[TrackingStep]) -> None:
    """[`run_steps`], and how long it took for each of the sessions."""
    start = time.perf_counter()
    model(steps=steps)  # through `forward`, by whose hooks shards of weights are gathered
    if len(steps) > 1 and model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    for step in steps:
        step.seconds = (time.perf_counter() - start) / len(steps)


def track_frame(
    model: SamoePreTrainedModel,
    sessions: Sequence[InferenceSession],
    frame_idx: int,
    *,
    reverse: bool = False,
    streaming: bool = False,
    run_mem_encoder: bool = True,
) -> list[Sam2VideoSegmentationOutput]:
    """Segments new prompts on any frame; then tracks the objects of the sessions on one frame.

    Objects with a new prompt on the frame are not tracked there as well. The other objects of their session are tracked
    only to be shown, unless the frame is the newest of a stream (see [`~session.ObjectState`]).

    Returns:
        an output for each session. An object without any prompt has a mask of -1024, `sam2`'s logit of no object.

    Raises:
        ValueError: if there is no object, no such frame, a prompt that cannot be used, an object to be tracked that was
            never prompted, or one that another model has tracked; or if sessions differ in device or type.
    """
    call = FrameCall(operator.index(frame_idx), reverse, streaming, run_mem_encoder)
    if len({(str(session.inference_device), session.dtype) for session in sessions}) > 1:
        raise InputError("`sessions` must be of one `inference_device` and one `dtype` to be tracked together.")
    for session in sessions:
        _check_session(model, session, call.frame_idx)
        for step in new_prompt_steps(model, session, except_frame=call.frame_idx, streaming=streaming):
            run_steps(model, [step])
    objects = [session_objects(session) for session in sessions]
    run_steps(model, [TrackingStep(_object_tasks(model, own, call), call) for own in objects])
    return [_frame_result(model, session, own, call.frame_idx) for session, own in zip(sessions, objects, strict=True)]


def frame_steps(
    model: SamoePreTrainedModel, session: InferenceSession, frame_idx: int
) -> Steps[Sam2VideoSegmentationOutput]:
    """The steps of a session that [`track_frame`] takes, and their output."""
    call = FrameCall(operator.index(frame_idx))
    _check_session(model, session, call.frame_idx)
    yield from new_prompt_steps(model, session, except_frame=call.frame_idx)
    objects = session_objects(session)
    yield TrackingStep(_object_tasks(model, objects, call), call)
    yield _frame_result(model, session, objects, call.frame_idx)


def _check_session(model: SamoePreTrainedModel, session: InferenceSession, frame_idx: int | None) -> None:
    if session.get_obj_num() == 0:
        raise InputError("No objects are provided for tracking; please add inputs first.")
    frames = session.processed_frames or ()
    if frame_idx is not None and frame_idx not in frames:
        raise InputError(f"`frame_idx` must be a frame of the session ({len(frames)} frames), got {frame_idx}.")
    reach = max(model.num_maskmem, model.config.max_object_pointers_in_encoder)
    if (kept := getattr(session, "keep_frames", reach)) < reach:  # of a VideoSession
        raise InputError(f"`keep_frames` must be at least the model's reach of {reach}, got {kept}.")


def new_prompt_steps(
    model: SamoePreTrainedModel, session: InferenceSession, except_frame: int | None = None, streaming: bool = False
) -> Iterator[TrackingStep]:
    """Follows the user: forgets prompts that were removed, and segments new ones on frames other than `except_frame`.

    Raises:
        ValueError: if a prompt cannot be used; it is removed.
    """
    if model.training:
        logger.warning_once("The model is in training mode, in which it tracks worse; call `model.eval()` before.")
    objects = session_objects(session)
    if not any("state" in one.outputs for one in objects):
        setattr(session, "domain_decision", None)  # noqa: B010  # it begins, maybe once more after a reset
    for tracked_object in objects:
        tracked_object.join(model)
        for frame_idx in list(tracked_object.state.segmented_prompts):
            if tracked_object.prompt(frame_idx) is None:
                tracked_object.clear(frame_idx)
    by_frame = defaultdict(list)
    for tracked_object in objects:
        for frame_idx in tracked_object.prompted_frames:
            if tracked_object.new_prompt(frame_idx) is None:
                continue
            if not getattr(session, "has_all_frames", False):
                earlier = tracked_object.state.segmented_prompts.get(frame_idx)
                check_prompt(tracked_object, frame_idx, model.config.image_size, streaming, earlier)
            if frame_idx in (session.processed_frames or ()) and frame_idx != except_frame:
                by_frame[frame_idx].append(tracked_object)
    for frame_idx, prompted in sorted(by_frame.items()):
        call = FrameCall(frame_idx, streaming=streaming)
        yield TrackingStep([(one, _prompt_task(model, one, call)) for one in prompted], call)


def start_propagation(
    model: SamoePreTrainedModel, session: InferenceSession, start_frame_idx: int | None
) -> Iterator[TrackingStep]:
    """Segments new prompts and commits all, as `sam2` does before it propagates.

    Raises:
        ValueError: as [`track_frame`].
    """
    _check_session(model, session, start_frame_idx)
    yield from new_prompt_steps(model, session)
    for tracked_object in session_objects(session):
        tracked_object.state.shown.clear()
        _commit(tracked_object)


def propagate_from_prompts(
    model: SamoePreTrainedModel,
    session: InferenceSession,
    start_frame_idx: int | None = None,
    reverse: bool = False,
    show_progress_bar: bool = False,
) -> Steps[Sam2VideoSegmentationOutput]:
    """See [`SamoeModel.propagate_from_prompts_iterator`]. Low-resolution masks of frames between first prompts wait
    until all objects have been tracked there, and many of them in a temporary file.

    Raises:
        ValueError: as [`track_frame`], or if objects are added or removed meanwhile.
    """
    end = len(session.processed_frames or ())
    for frame_idx in (0, end - 1, start_frame_idx or 0):  # a stream has forgotten some
        _check_session(model, session, frame_idx)
    yield from start_propagation(model, session, None)
    objects = session_objects(session)
    states = [one.state for one in objects]
    banks = {one.object_id: (one.state.bank.conditioning, one.state.showing) for one in objects}
    starts = {i: min(frames.keys() & showing or frames) for i, (frames, showing) in banks.items()}
    is_whole = start_frame_idx is None
    if is_whole or not reverse:
        for one in objects:  # what an earlier pass back has found there
            one.state.bank.forget_before(starts[one.object_id])
    if is_whole:
        passes = [(t, False) for t in range(min(starts.values()), end)]
        passes += [(t, True) for t in range(max(starts.values()) - 1, -1, -1)]
    else:
        passes = [(t, reverse) for t in (range(start_frame_idx, -1, -1) if reverse else range(start_frame_idx, end))]
    waiting: dict[int, tuple[int, dict[str, Any]]] = {}  # where masks begin in the file, and the rest of an output
    with SpooledTemporaryFile(HELD_BYTES) as file, encoding_ahead(model, session):
        for frame_idx, back in tqdm(passes, desc="propagate in video", disable=not show_progress_bar):
            if [one.outputs.get("state") for one in session_objects(session)] != states:
                raise InputError("Objects of the session were added or removed while they were tracked; begin again.")
            ahead = [starts[one.object_id] - frame_idx for one in objects]
            has_begun = [(distance >= (1 if is_whole else 0)) if back else distance <= 0 for distance in ahead]
            own = list(compress(objects, has_begun))
            call = FrameCall(frame_idx, back)
            yield TrackingStep(_object_tasks(model, own, call), call)
            output = _frame_result(model, session, own if is_whole else objects, frame_idx)
            if frame_idx in waiting:
                place, first = waiting.pop(frame_idx)
                file.seek(place)
                first["pred_masks"] = torch.from_numpy(np.load(file)).to(session.inference_device)
                output = _joined(session, first, output)
            elif is_whole and len(own) < len(objects):
                first = dict(output)
                waiting[frame_idx] = file.tell(), first
                np.save(file, first.pop("pred_masks").cpu().numpy())
            yield output


def _joined(
    session: InferenceSession, first: dict[str, Any], second: Sam2VideoSegmentationOutput
) -> Sam2VideoSegmentationOutput:
    """The outputs of two parts of a session's objects on a frame as one, in the session's order."""
    ids = [*first["object_ids"], *(second.object_ids or ())]
    order = [ids.index(object_id) for object_id in session.obj_ids]
    for name in ("pred_masks", "object_score_logits", "iou_scores"):
        second[name] = torch.cat([first[name], second[name]])[order]
    second.object_ids = session.obj_ids.copy()
    return second


def _commit(tracked_object: SessionObject) -> None:
    tracked_object.commit()
    if not tracked_object.state.bank.conditioning:
        raise InputError(f"Object {tracked_object.object_id} was never prompted; please add inputs for it first.")


def _object_tasks(
    model: SamoePreTrainedModel, objects: Sequence[SessionObject], call: FrameCall
) -> list[tuple[SessionObject, FrameTask]]:
    """What is to be done for objects of a session on a frame; nothing where an output stays, or one is gone."""
    prompted, others = [], []
    for one in (one for one in objects if call.frame_idx < one.end):
        (others if one.new_prompt(call.frame_idx) is None else prompted).append(one)
    tasks = [(one, _prompt_task(model, one, call)) for one in prompted]
    if prompted and not call.streaming:
        for one in others:
            is_known = one.state.showing and one.bank_after_commit().conditioning
            if is_known and one.output(call.frame_idx, with_shown=True) is None:
                tasks.append((one, _tracking_task(model, one, call, for_show=True)))
        return tasks
    for one in others:
        _commit(one)
        if call.frame_idx in one.state.bank.conditioning:
            one.mark_as_tracked(call.frame_idx, call.reverse)
        elif one.state.showing:
            if one.prompt(call.frame_idx) is not None:
                logger.warning_once(
                    "A corrected frame is tracked anew, without its correction, as in `sam2`. Propagate from the next "
                    "frame on to keep it, or set `corrections_condition = True` of the session before it is given."
                )
            tasks.append((one, _tracking_task(model, one, call)))
        else:
            one.drop_tracked(call.frame_idx)
    if objects and (forget := getattr(objects[0].session, "forget", None)) is not None:
        forget(call.frame_idx)
    return tasks


def _prompt_task(model: SamoePreTrainedModel, tracked_object: SessionObject, call: FrameCall) -> FrameTask:
    """The task of a new prompt: on a frame that was not tracked it stands alone, otherwise it corrects the frame."""
    prompt, bank = tracked_object.new_prompt(call.frame_idx), tracked_object.state.bank
    tracked = tracked_object.was_tracked(call.frame_idx)
    is_initial = tracked is None or not bank.conditioning
    reverse = tracked is not None and tracked["reverse"]
    assert prompt is not None
    has_mask = isinstance(prompt, Tensor)
    points = num_points(prompt)
    has_previous_mask = points > 0 and tracked_object.output(call.frame_idx) is not None
    return FrameTask(
        prompted=True,
        for_show=False,
        is_conditioning=is_initial or getattr(tracked_object.session, "corrections_condition", False),
        reverse=reverse,
        has_mask=has_mask,
        num_points=points,
        has_previous_mask=has_previous_mask and model.config.previous_mask_with_clicks,
        reads_memory=not is_initial and not has_mask,
        memory_selection=_memory_selection(model, tracked_object),
    )


def _tracking_task(
    model: SamoePreTrainedModel, tracked_object: SessionObject, call: FrameCall, for_show: bool = False
) -> FrameTask:
    kind = _memory_selection(model, tracked_object)
    return FrameTask(False, for_show, False, call.reverse, False, 0, False, True, kind)


def _memory_selection(model: SamoePreTrainedModel, tracked_object: SessionObject) -> str:
    return getattr(tracked_object.session, "memory_selection", None) or model.memory_selection


def run_steps(model: SamoePreTrainedModel, steps: Sequence[TrackingStep]) -> None:
    """Segments objects of several sessions, each on the frame of its step, and stores the outputs.

    Those of equal tasks and domains are one batch. No two steps may be of one session.
    """
    steps = [step for step in steps if step.tasks]
    batches = defaultdict(list)
    for number, step in enumerate(steps):
        use = _decide_domain(model, step.session, step.call).use
        for one, task in step.tasks:
            placed = PlacedObject(one, step.call, number)
            batches[use, task, step.call.run_mem_encoder].append(placed)
    _encode_frames(model, [(step.session, step.call) for step in steps])
    for (use, task, run_mem_encoder), objects in batches.items():
        for batch in _batches(model, objects, task):
            placed = batch.objects
            rows = (BatchRow(number, call.frame_idx, one.object_id) for one, call, number in placed)
            with use_rows(rows), use_domain(use, model):
                output = frame_step(
                    model,
                    _image_features(model, placed),
                    _batch_prompt(model, placed, task),
                    batch.banks,
                    batch.selections,
                    num_objects=len(placed),
                    encode_memory=run_mem_encoder,
                    fill_hole_area=model.config.fill_hole_area,
                    memory_selection=task.memory_selection,
                )
            memory, device = output.memory, placed[0].one.session.inference_state_device
            if memory.features is not None:
                memory.features = memory.features.to(device)
            output.masks = output.masks.to(device)
            for index, (one, call, _) in enumerate(placed):
                _store_output(one, call.frame_idx, task, output, index)


class PlacedObject(NamedTuple):
    """An object of a session, the frame that it is segmented on, and the number of its session among others."""

    one: SessionObject
    call: FrameCall
    number: int


class Batch(NamedTuple):
    """Objects that are segmented together, their memories, and which of these each of them reads."""

    objects: list[PlacedObject]
    banks: list[MemoryBank]
    selections: list[MemorySelection]


def _batches(model: SamoePreTrainedModel, objects: list[PlacedObject], task: FrameTask) -> Iterator[Batch]:
    """Objects of one task in one batch; but not with those that read more than twice as many memories as most."""
    banks = [one.bank_after_commit() if task.for_show else one.state.bank for one, _, _ in objects]
    if not task.reads_memory:
        yield Batch(objects, banks, [])
        return
    rows = []
    for placed, bank in zip(objects, banks, strict=True):
        call = placed.call
        limits = memory_limits(model, None if call.streaming else placed.one.session.num_frames)
        rows.append((placed, bank, select_memories(task.memory_selection, bank, call.frame_idx, limits, task.reverse)))
    usual = median(len(selection.spatial) for _, _, selection in rows)
    can_mask = model.config._attn_implementation in MASKED_ATTENTION
    parts = defaultdict(list)
    for row in rows:
        length = len(row[2].spatial), len(row[2].pointers)
        parts[length[0] > 2 * usual if can_mask else length].append(row)
    for part in parts.values():
        yield Batch(*map(list, zip(*part, strict=True)))


def _decide_domain(model: SamoePreTrainedModel, session: InferenceSession, call: FrameCall) -> DomainDecision:
    """Whose experts a session gets on a frame; the gate decides on the first frame that is segmented, a prompted
    one."""
    known = session_domain(model, session)
    if known is not None and (known.confidence is None or not is_decision_due(session, call.frame_idx)):
        return known
    pixel_values, features = session.get_frame(call.frame_idx).to(model.dtype)[None], None
    if not encoder_has_experts(model):
        _encode_frames(model, [(session, call)])
        features = _cached_features(model, session, call.frame_idx)
    (decision,) = decide_domains(model, pixel_values, features)
    return store_decision(model, session, call.frame_idx, decision)


def _batch_prompt(model: SamoePreTrainedModel, placed: Sequence[PlacedObject], task: FrameTask) -> Prompt | None:
    """The prompts of a batch of objects, each on its frame."""
    if not task.prompted:
        return None
    outputs = [one.output(call.frame_idx) for one, call, _ in placed] if task.has_previous_mask else []
    previous = [output["pred_masks"] for output in outputs if output is not None] or None
    prompts = [prompt for one, call, _ in placed if (prompt := one.prompt(call.frame_idx)) is not None]
    return join_prompts(prompts, model.config.image_size, previous)


def _store_output(
    tracked_object: SessionObject, frame_idx: int, task: FrameTask, output: FrameOutput, index: int
) -> None:
    """Stores one object's part of a batch's output."""
    memory = output.memory.row(index)
    outputs = {
        "pred_masks": output.masks[index : index + 1],
        "object_pointer": memory.pointer,
        "object_score_logits": output.object_score_logits[index : index + 1],
        "iou_scores": output.best_iou[index : index + 1, None],
    }
    record = FrameRecord(outputs, memory, task.is_conditioning, task.reverse)
    if task.prompted:
        tracked_object.store_prompted(frame_idx, record)
    elif task.for_show:
        tracked_object.state.shown[frame_idx] = record
    else:
        tracked_object.store_tracked(frame_idx, record)


def _frame_result(
    model: SamoePreTrainedModel, session: InferenceSession, objects: Sequence[SessionObject], frame_idx: int
) -> Sam2VideoSegmentationOutput:
    """The latest outputs of objects of a session on a frame."""
    session.obj_with_new_inputs = []
    device = session.inference_device
    outputs = [one.output(frame_idx, with_shown=True) or _no_output(model, device) for one in objects]
    decision = session_domain(model, session) or DomainDecision(None)
    return SamoeTrackingOutput(
        object_ids=[one.object_id for one in objects],
        pred_masks=torch.cat([output["pred_masks"].to(device) for output in outputs]),
        object_score_logits=torch.cat([output["object_score_logits"] for output in outputs]),
        iou_scores=torch.cat([output["iou_scores"] for output in outputs]),
        frame_idx=frame_idx,
        domain=decision.domain,
        domain_confidence=decision.confidence,
        domain_rivals=decision.rivals,
        domain_unknown=decision.unknown,
    )


def _no_output(model: SamoePreTrainedModel, device: torch.device | str) -> dict[str, Tensor]:
    """The output of an object where it was not tracked."""
    kind: dict[str, Any] = {"dtype": model.dtype, "device": device}
    return {
        "pred_masks": torch.full((1, 1, *model.prompt_encoder.mask_input_size), NO_OBJ_SCORE, **kind),
        "object_score_logits": torch.full((1, 1), NO_OBJ_SCORE, **kind),
        "iou_scores": torch.zeros(1, 1, **kind),
    }


def _image_features(model: SamoePreTrainedModel, placed: Sequence[PlacedObject]) -> ImageFeatures:
    """Features of the frames of a batch's objects: a row for each session where all have as many objects, else for
    each."""
    counts = Counter(number for _, _, number in placed)
    if len({*counts.values()}) == 1:
        placed = placed[:: counts[placed[0].number]]  # those of a session follow each other
    cached = [_cached_features(model, one.session, call.frame_idx) for one, call, _ in placed]
    rows = [features for features in cached if features is not None]  # all were encoded before
    if len(rows) == 1:
        return rows[0]
    fine, middle, coarse = (torch.cat(level) for level in list(zip(*rows, strict=True))[:3])
    return rows[0]._replace(fine=fine, middle=middle, coarse=coarse, together=None)


def _cached_features(model: SamoePreTrainedModel, session: InferenceSession, frame_idx: int) -> ImageFeatures | None:
    """Features of a frame that this model encoded, in its type and with the experts that the session gets now. As in
    transformers and `sam2`, they stay if its weights are changed, until `session.reset_inference_session()`."""
    cached = session.cache.get_vision_features(frame_idx)
    if cached is None or "encoder" not in cached:
        return None
    encoder, dtype, use = cached["encoder"]
    is_same = encoder() is model and dtype == model.dtype and use == _encoder_domain(model, session)
    return ImageFeatures(*cached["image_features"], together=cached["together"]) if is_same else None


def _encoder_domain(model: SamoePreTrainedModel, session: InferenceSession) -> DomainUse | None:
    """The domain that a session's image features depend on."""
    decision = session_domain(model, session) if encoder_has_experts(model) else None
    return None if decision is None else decision.use


def _encode_frames(model: SamoePreTrainedModel, calls: Sequence[tuple[InferenceSession, FrameCall]]) -> None:
    """Encodes the frames of sessions that have not cached their features, and those ahead that their caches hold."""
    wanted = []
    for number, (session, call) in enumerate(calls):
        step = -1 if call.reverse else 1
        if _cached_features(model, session, call.frame_idx) is None:
            count = min(max(session.cache.max_vision_features_cache_size, 1), MAX_FRAMES_AHEAD)
            ahead = range(call.frame_idx, call.frame_idx + step * count, step)
            if ahead[-1] not in (session.processed_frames or ()):
                ahead = ahead[:1]  # so that a compiled encoder meets two sizes of batches only
            wanted += [(session, t, number) for t in ahead]
            session.cache.clear_all()
    for use in dict.fromkeys(_encoder_domain(model, session) for session, _, _ in wanted):
        own = [one for one in wanted if _encoder_domain(model, one[0]) == use]
        frames = torch.stack([session.get_frame(t) for session, t, _ in own]).to(model.dtype)
        if frames.shape[-2:] != (size := (model.config.image_size,) * 2):
            raise InputError(
                f"The session's frames are of {tuple(frames.shape[-2:])} pixels, but the model takes {size}; prepare "
                "them with a processor of its size, as `build_processor(model.config)` gives one."
            )
        with use_rows(BatchRow(number, t) for _, t, number in own), use_domain(use, model):
            features = encode_frames(model, frames)
        encoder, coarse = (weakref.ref(model), model.dtype, use), features.coarse.flatten(2).mT
        for row, (session, t, _) in enumerate(own):
            # Strides as those of a frame that was encoded alone, by which layers choose how they compute.
            one = [*(level[row].unsqueeze(0) for level in features[:3]), *features[3:5]]
            together = slice(row, row + 1), coarse
            session.cache.cache_vision_features(t, {"image_features": one, "encoder": encoder, "together": together})


@contextmanager
def encoding_ahead(model: SamoePreTrainedModel, session: InferenceSession) -> Iterator[None]:
    """While the context is open, which is while the video is propagated, frames are encoded a few at a time.

    One frame does not fill a GPU, nor does a small one fill a CPU. A session that caches more frames has its way.
    """
    on_cpu = torch.device(session.inference_device).type == "cpu"
    cache = session.cache
    before = cache.max_vision_features_cache_size
    if (on_cpu and model.config.image_size > SMALL_IMAGE_SIZE) or before >= FRAMES_AHEAD:
        yield
        return
    cache.max_vision_features_cache_size = FRAMES_AHEAD
    try:
        yield
    finally:
        cache.max_vision_features_cache_size = before
        cache.clear_all()
