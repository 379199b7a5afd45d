"""What a session keeps of each object.

It follows `sam2`'s `SAM2VideoPredictor`. A prompt is segmented at once, but other frames read what came of it only
after the next tracking step (`sam2`'s `propagate_in_video_preflight`): until then the output is pending. The first
prompt on a frame that was not tracked yet makes a conditioning frame; a prompt on a tracked frame corrects that frame,
which stays an ordinary one.
"""

import math
import operator
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor

from .base import InferenceSession
from .base_model import SamoePreTrainedModel
from .errors import InputError
from .memory_bank import MemoryBank, ObjectMemory
from .memory_selection import remember
from .prompts import SessionPrompt, order_box, prompt_problem


class FrameRecord(NamedTuple):
    """What a frame gave for one object.

    `output`: "pred_masks" (1, 1, S / 4, S / 4), "object_score_logits" (1, 1), "iou_scores" (1, 1) and "object_pointer"
    (1, hidden).
    `memory`: what later frames read. `reverse`: the direction in which it was tracked.
    """

    output: dict[str, Tensor]
    memory: ObjectMemory
    is_conditioning: bool = False
    reverse: bool = False


@dataclass
class ObjectState:
    """What a session keeps of one object beside transformers' outputs.

    `model`: a reference to the model that made it. `bank`: memories that other frames read.
    `segmented_prompts`: frame -> the prompt on it that was segmented last. `showing`: those of them whose prompts are
    no empty masks; without any, the object is absent, and not tracked. `pending`: frame -> record of its prompt,
    until the next tracking step. `shown`: frame -> record of a frame that was tracked only to be shown beside another
    object's prompt; it counts as tracked if tracking goes on by single calls, and is dropped by a propagation.
    """

    model: "weakref.ref[SamoePreTrainedModel]"
    bank: MemoryBank = field(default_factory=MemoryBank)
    segmented_prompts: dict[int, Any] = field(default_factory=dict)
    showing: set[int] = field(default_factory=set)
    pending: dict[int, FrameRecord] = field(default_factory=dict)
    shown: dict[int, FrameRecord] = field(default_factory=dict)


class SessionObject(NamedTuple):
    """An object of a session, by the row that it has there."""

    session: InferenceSession
    row: int

    @property
    def object_id(self) -> int:
        return self.session.obj_idx_to_id(self.row)

    @property
    def outputs(self) -> dict[str, Any]:
        return self.session.output_dict_per_obj[self.row]

    @property
    def state(self) -> ObjectState:
        return self.outputs["state"]

    @property
    def tables(self) -> list[dict[int, Any]]:
        """What frames gave, by frame; nobody writes into the values."""
        tables = [self.outputs["cond_frame_outputs"], self.outputs["non_cond_frame_outputs"]]
        if "state" in self.outputs:
            tables += [self.state.pending, self.state.shown, *vars(self.state.bank).values()]
        return tables

    @property
    def prompted_frames(self) -> list[int]:
        """Frames with a prompt, in order."""
        return sorted({*self.session.point_inputs_per_obj[self.row], *self.session.mask_inputs_per_obj[self.row]})

    @property
    def end(self) -> float:
        """The frame from which on the object is gone, as the user says."""
        return self.outputs.get("end", math.inf)

    @property
    def has_outputs(self) -> bool:
        """Whether it was segmented on any frame."""
        return any(self.outputs[name] for name in ("cond_frame_outputs", "non_cond_frame_outputs"))

    def join(self, model: SamoePreTrainedModel) -> None:
        """Prepares the object for tracking with a model; an `InputError` if another one has segmented it in this
        session."""
        if "state" not in self.outputs and not self.has_outputs:
            self.outputs["state"] = ObjectState(weakref.ref(model))
        if "state" not in self.outputs or self.state.model() is not model:
            raise InputError(
                f"Object {self.object_id} was tracked in this session with another model; "
                "call `reset_tracking_data()` on the session before this one tracks in it."
            )

    def prompt(self, frame_idx: int) -> SessionPrompt | None:
        """The prompt on a frame: a mask (1, 1, S, S), points with labels in a dict, or None."""
        mask = self.session.mask_inputs_per_obj[self.row].get(frame_idx)
        return self.session.point_inputs_per_obj[self.row].get(frame_idx) if mask is None else mask

    def put_back(self, frame_idx: int, prompt: SessionPrompt) -> None:
        """Makes an earlier prompt the one on a frame, as it is."""
        points, masks = self.session.point_inputs_per_obj[self.row], self.session.mask_inputs_per_obj[self.row]
        own, other = (masks, points) if isinstance(prompt, Tensor) else (points, masks)
        other.pop(frame_idx, None)
        own[frame_idx] = prompt

    def new_prompt(self, frame_idx: int) -> SessionPrompt | None:
        """The prompt on a frame, if it was not segmented yet."""
        prompt = self.prompt(frame_idx)
        return None if prompt is self.state.segmented_prompts.get(frame_idx) else prompt

    def output(self, frame_idx: int, with_shown: bool = False) -> dict[str, Tensor] | None:
        """The latest output on a frame; `with_shown` also of a frame that was tracked only to be shown."""
        records = self.state.pending | (self.state.shown if with_shown else {})
        if frame_idx in records:
            return records[frame_idx].output
        output = self.outputs["cond_frame_outputs"].get(frame_idx)
        return self.outputs["non_cond_frame_outputs"].get(frame_idx) if output is None else output

    def was_tracked(self, frame_idx: int) -> dict[str, bool] | None:
        """How a frame was tracked, {"reverse": bool}; None if it was not."""
        return self.session.frames_tracked_per_obj[self.row].get(frame_idx)

    def mark_as_tracked(self, frame_idx: int, reverse: bool) -> None:
        self.session.frames_tracked_per_obj[self.row][frame_idx] = {"reverse": reverse}

    def store_prompted(self, frame_idx: int, record: FrameRecord) -> None:
        """Keeps what a prompt gave, for the next tracking step."""
        self.state.pending[frame_idx] = record
        self.state.shown.pop(frame_idx, None)
        prompt = self.state.segmented_prompts[frame_idx] = self.prompt(frame_idx)
        if not record.is_conditioning and frame_idx in self.state.bank.conditioning:
            return  # it will be left out
        if isinstance(prompt, Tensor) and not prompt.any():
            self.state.showing.discard(frame_idx)
        else:
            self.state.showing.add(frame_idx)

    def store_tracked(self, frame_idx: int, record: FrameRecord) -> None:
        """Keeps what tracking gave on a frame without a conditioning output."""
        self.outputs["non_cond_frame_outputs"][frame_idx] = record.output
        remember(self.state.bank, frame_idx, record.memory, conditioning=False, reverse=record.reverse)
        self.mark_as_tracked(frame_idx, record.reverse)

    def drop_tracked(self, frame_idx: int) -> None:
        """Drops what tracking gave on a frame without a conditioning output."""
        bank, tracked = self.state.bank, self.session.frames_tracked_per_obj[self.row]
        for table in (self.outputs["non_cond_frame_outputs"], bank.tracked, bank.anchors, tracked):
            table.pop(frame_idx, None)

    def commit(self) -> None:
        """Makes pending outputs memories for other frames, and frames that were only shown tracked ones."""
        bank, shown = self.state.bank, self.state.shown
        for frame_idx, record in self._in_order_of_commit():
            if record.is_conditioning:
                self.outputs["cond_frame_outputs"][frame_idx] = record.output
                self.outputs["non_cond_frame_outputs"].pop(frame_idx, None)
                bank.write(frame_idx, record.memory, conditioning=True)
            else:
                self.outputs["non_cond_frame_outputs"][frame_idx] = record.output
                bank.write(frame_idx, record.memory, conditioning=False)
        for frame_idx, record in shown.items():
            self.mark_as_tracked(frame_idx, record.reverse)
        self.state.pending.clear()
        shown.clear()

    def bank_after_commit(self) -> MemoryBank:
        """The memories that other frames would read after [`commit`]."""
        bank = self.state.bank.copy()
        for frame_idx, record in self._in_order_of_commit():
            bank.write(frame_idx, record.memory, record.is_conditioning)
        return bank

    def _in_order_of_commit(self) -> list[tuple[int, FrameRecord]]:
        """Records, those of ordinary frames first. As in `sam2`, corrections of conditioning frames are left out."""
        records = [*self.state.shown.items(), *self.state.pending.items()]
        ordinary = [(t, record) for t, record in records if not record.is_conditioning]
        ordinary = [(t, record) for t, record in ordinary if t not in self.state.bank.conditioning]
        return ordinary + [(t, record) for t, record in records if record.is_conditioning]

    def clear(self, frame_idx: int) -> None:
        """Removes the prompt on a frame; what it gave stays as that of an ordinary frame (`sam2` does the same)."""
        self.session.remove_point_inputs(self.row, frame_idx)
        self.session.remove_mask_inputs(self.row, frame_idx)
        if "state" not in self.outputs:
            return
        self.state.segmented_prompts.pop(frame_idx, None)
        self.state.showing.discard(frame_idx)
        self.state.pending.pop(frame_idx, None)
        output = self.outputs["cond_frame_outputs"].pop(frame_idx, None)
        if output is not None:
            self.outputs["non_cond_frame_outputs"][frame_idx] = output
            self.state.bank.write(frame_idx, self.state.bank.conditioning.pop(frame_idx), conditioning=False)
            self.session.frames_tracked_per_obj[self.row].pop(frame_idx, None)


def check_prompt(
    tracked_object: SessionObject, frame_idx: int, image_size: int, upcoming: bool, earlier: SessionPrompt | None
) -> None:
    """Puts the corners of a box in order. Refuses a prompt that cannot be used (see [`~prompts.prompt_problem`]), and
    puts the `earlier` one of the frame back; without one it removes the prompt, with the object if nothing else is
    known of it. The frame may be `upcoming`, one that is still to come.
    """
    session = tracked_object.session
    frames = () if session.processed_frames is None else session.processed_frames
    is_upcoming = upcoming and isinstance(frame_idx, Integral) and frame_idx > max(frames, default=-1)
    if frame_idx in frames or is_upcoming:
        video_size = (session.video_height or image_size, session.video_width or image_size)
        prompt = tracked_object.prompt(frame_idx)
        if isinstance(prompt, dict):
            order_box(prompt)
        problem = prompt_problem(prompt, image_size, video_size)
        if frame_idx >= tracked_object.end:
            problem = f"The object is gone from frame {tracked_object.end} on; take its end back first."
    else:
        problem = f"`frame_idx` must be a frame of the session ({len(frames)} frames), got {frame_idx}."
    if problem is None:
        return
    object_id = tracked_object.object_id
    if earlier is not None:
        tracked_object.put_back(frame_idx, earlier)
        raise InputError(f"{problem} Object {object_id} keeps its earlier prompt on frame {frame_idx}.")
    tracked_object.clear(frame_idx)
    if not tracked_object.prompted_frames and not tracked_object.has_outputs:
        remove_object(session, object_id)
    raise InputError(f"{problem} The prompt of object {object_id} on frame {frame_idx} is not used.")


def session_objects(session: InferenceSession) -> list[SessionObject]:
    return [SessionObject(session, row) for row in range(session.get_obj_num())]


def clear_prompts(session: InferenceSession, frame_idx: int, obj_id: int) -> None:
    """See [`SamoeModel.clear_prompts`]."""
    _object_of(session, obj_id).clear(frame_idx)


def end_object(session: InferenceSession, frame_idx: int | None, obj_id: int) -> None:
    """See [`SamoeModel.end_object`]. What tracking gave of the object from that frame on is dropped."""
    one = _object_of(session, obj_id)
    if frame_idx is None:
        one.outputs.pop("end", None)
        return
    frame_idx, prompted = operator.index(frame_idx), one.prompted_frames
    frames = session.processed_frames
    is_beyond = getattr(session, "has_all_frames", False) and frame_idx not in (frames or ())
    if not prompted or frame_idx <= prompted[-1] or is_beyond:
        raise InputError(
            f"The end of object {obj_id} must be a frame of the video after its prompts (on the frames {prompted}), "
            f"got {frame_idx}."
        )
    one.outputs["end"] = frame_idx
    for table in [*one.tables, session.frames_tracked_per_obj[one.row]]:
        for t in [t for t in table if t >= frame_idx]:
            del table[t]


def _object_of(session: InferenceSession, obj_id: int) -> SessionObject:
    obj_id = operator.index(obj_id)
    if obj_id not in session._obj_id_to_idx:
        raise InputError(f"`obj_id` must be one of {session.obj_ids}, got {obj_id}.")
    return SessionObject(session, session._obj_id_to_idx[obj_id])


def remove_object(session: InferenceSession, obj_id: int, strict: bool = False) -> None:
    """See [`SamoeModel.remove_object`]."""
    obj_id = operator.index(obj_id)
    if obj_id not in session._obj_id_to_idx and not strict:
        return
    removed = _object_of(session, obj_id).row
    kept = [row for row in session._obj_idx_to_id if row != removed]
    session.obj_ids = [session.obj_idx_to_id(row) for row in kept]
    session._obj_id_to_idx = OrderedDict((other, row) for row, other in enumerate(session.obj_ids))
    session._obj_idx_to_id = OrderedDict(enumerate(session.obj_ids))
    for name in ("point_inputs_per_obj", "mask_inputs_per_obj", "output_dict_per_obj", "frames_tracked_per_obj"):
        table = getattr(session, name)
        setattr(session, name, {new: table[old] for new, old in enumerate(kept)})
    session.obj_with_new_inputs = [other for other in session.obj_with_new_inputs if other != obj_id]
