"""What a session keeps of each object, and how prompts change it. It follows `sam2`'s `SAM2VideoPredictor`.

A prompt is segmented at once, but other frames read what came of it only after the next tracking step (`sam2`'s
`propagate_in_video_preflight`): until then the output is pending. The first prompt on a frame that was not tracked yet
makes a conditioning frame; a prompt on a tracked frame corrects that frame, which stays an ordinary one.
"""

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Sam2VideoModel

from .base import InferenceSession
from .errors import InputError
from .memory_bank import FrameMemory, MemoryBank
from .prompts import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE

POINT_LABELS = (POSITIVE, NEGATIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)
# The label of points that transformers' processor adds where objects of one call have different numbers of points.
PADDING = -10
# Points may lie this far outside of the frame, in parts of its size; of a box, a part must lie inside.
OUTSIDE_LIMIT = 0.1
LARGEST = torch.finfo(torch.float32).max


class FrameRecord(NamedTuple):
    """What a frame gave for one object.

    `output`: "pred_masks" (1, 1, S / 4, S / 4), "object_score_logits" (1, 1) and "object_pointer" (1, hidden).
    `memory`: what later frames read. `reverse`: the direction in which it was tracked.
    """

    output: dict[str, Tensor]
    memory: FrameMemory
    is_conditioning: bool = False
    reverse: bool = False


@dataclass
class ObjectState:
    """What a session keeps of one object beside transformers' outputs.

    `model`: a reference to the model that made it. `bank`: memories that other frames read.
    `segmented_prompts`: frame -> the prompt on it that was segmented last. `pending`: frame -> record of its prompt,
    until the next tracking step. `shown`: frame -> record of a frame that was tracked only to be shown beside another
    object's prompt; it counts as tracked if tracking goes on by single calls, and is dropped by a propagation.
    """

    model: "weakref.ref[Sam2VideoModel]"
    bank: MemoryBank = field(default_factory=MemoryBank)
    segmented_prompts: dict[int, Any] = field(default_factory=dict)
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
    def prompted_frames(self) -> list[int]:
        """Frames with a prompt, in order."""
        return sorted({*self.session.point_inputs_per_obj[self.row], *self.session.mask_inputs_per_obj[self.row]})

    def join(self, model: Sam2VideoModel) -> None:
        """Prepares the object for tracking with a model.

        Raises:
            ValueError: if another model has segmented it in this session.
        """
        if "state" not in self.outputs and not any(self.outputs.values()):
            self.outputs["state"] = ObjectState(weakref.ref(model))
        if "state" not in self.outputs or self.state.model() is not model:
            raise InputError(
                f"Object {self.object_id} was tracked in this session with another model; "
                "call `reset_tracking_data()` on the session before this one tracks in it."
            )

    def prompt(self, frame_idx: int) -> Any:
        """The prompt on a frame: a mask (1, 1, S, S), points with labels in a dict, or None."""
        mask = self.session.mask_inputs_per_obj[self.row].get(frame_idx)
        return self.session.point_inputs_per_obj[self.row].get(frame_idx) if mask is None else mask

    def new_prompt(self, frame_idx: int) -> Any:
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
        self.state.segmented_prompts[frame_idx] = self.prompt(frame_idx)

    def store_tracked(self, frame_idx: int, record: FrameRecord) -> None:
        """Keeps what tracking gave on a frame without a conditioning output."""
        self.outputs["non_cond_frame_outputs"][frame_idx] = record.output
        self.state.bank.write(frame_idx, record.memory, conditioning=False)
        self.mark_as_tracked(frame_idx, record.reverse)

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
        self.state.pending.pop(frame_idx, None)
        output = self.outputs["cond_frame_outputs"].pop(frame_idx, None)
        if output is not None:
            self.outputs["non_cond_frame_outputs"][frame_idx] = output
            self.state.bank.write(frame_idx, self.state.bank.conditioning.pop(frame_idx), conditioning=False)
            self.session.frames_tracked_per_obj[self.row].pop(frame_idx, None)


def points_and_labels(prompt: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Points (1, P, 2) of one object as (x, y), and their labels (1, P), without padding."""
    points, labels = prompt["point_coords"][:, 0], prompt["point_labels"][:, 0]
    is_given = labels[0] != PADDING
    return points[:, is_given], labels[:, is_given]


def check_prompt(tracked_object: SessionObject, frame_idx: int, image_size: int, upcoming: bool) -> None:
    """Refuses a prompt that cannot be used, and removes it, with the object if nothing else is known of it.

    Args:
        image_size: points are in pixels of the model's input, a square of this size.
        upcoming: whether the frame may be one that is still to come.

    Raises:
        ValueError: if there is no such frame; for a mask of another shape than (1, 1, H, W); for no points, points that
            are not finite or lie far outside of the frame, or unknown labels.
    """
    problem = _frame_problem(tracked_object.session, frame_idx, upcoming)
    if problem is None:
        prompt = tracked_object.prompt(frame_idx)
        is_mask = isinstance(prompt, Tensor)
        problem = _mask_problem(prompt) if is_mask else _points_problem(tracked_object.session, prompt, image_size)
    if problem is None:
        return
    object_id = tracked_object.object_id
    tracked_object.clear(frame_idx)
    is_known = any(tracked_object.outputs[name] for name in ("cond_frame_outputs", "non_cond_frame_outputs"))
    if not tracked_object.prompted_frames and not is_known:
        remove_object(tracked_object.session, object_id)
    raise InputError(f"{problem} The prompt of object {object_id} on frame {frame_idx} is not used.")


def _frame_problem(session: InferenceSession, frame_idx: int, upcoming: bool) -> str | None:
    frames = () if session.processed_frames is None else session.processed_frames
    is_upcoming = upcoming and isinstance(frame_idx, Integral) and frame_idx > max(frames, default=-1)
    if frame_idx in frames or is_upcoming:
        return None
    return f"`frame_idx` must be a frame of the session ({len(frames)} frames), got {frame_idx}."


def _mask_problem(mask: Tensor) -> str | None:
    if mask.dim() != 4 or mask.shape[:2] != (1, 1):
        return f"`input_masks` must hold a mask (H, W) for each object, got shape {tuple(mask.shape)}."
    return None if mask.isfinite().all() else "`input_masks` must be finite, got NaN or infinity."


def _points_problem(session: InferenceSession, prompt: dict[str, Tensor], image_size: int) -> str | None:
    points, labels = (tensor[0] for tensor in points_and_labels(prompt))
    if len(labels) == 0:
        return "`input_points` must hold at least one point for each object, got none."
    unknown = [label for label in labels.tolist() if label not in POINT_LABELS]
    if unknown:
        return f"`input_labels` must be 1 (on the object) or 0 (on the background), got {unknown[0]}."
    width, height = session.video_width or image_size, session.video_height or image_size
    margin = image_size * OUTSIDE_LIMIT
    lowest, highest = torch.full_like(points, -margin), torch.full_like(points, image_size + margin)
    lowest[labels == BOX_TOP_LEFT], highest[labels == BOX_TOP_LEFT] = -LARGEST, image_size
    lowest[labels == BOX_BOTTOM_RIGHT], highest[labels == BOX_BOTTOM_RIGHT] = 0, LARGEST
    is_inside = (points >= lowest) & (points <= highest)  # false for NaN
    if is_inside.all():
        return None
    x, y = points[~is_inside.all(dim=-1)][0].tolist()
    x, y = x * width / image_size, y * height / image_size
    return f"`input_points` and `input_boxes` must lie in the frame of {width} x {height} pixels, got ({x:g}, {y:g})."


def session_objects(session: InferenceSession) -> list[SessionObject]:
    return [SessionObject(session, row) for row in range(session.get_obj_num())]


def clear_prompts(session: InferenceSession, frame_idx: int, obj_id: int) -> None:
    """Removes the prompts of an object on a frame.

    Raises:
        ValueError: if there is no such object.
    """
    if obj_id not in session._obj_id_to_idx:
        raise InputError(f"`obj_id` must be one of {session.obj_ids}, got {obj_id}.")
    SessionObject(session, session._obj_id_to_idx[obj_id]).clear(frame_idx)


def remove_object(session: InferenceSession, obj_id: int, strict: bool = False) -> None:
    """Removes an object with all its prompts, outputs and memories; the others keep theirs.

    Args:
        strict: whether an unknown `obj_id` is a `ValueError`.
    """
    if obj_id not in session._obj_id_to_idx:
        if strict:
            raise InputError(f"`obj_id` must be one of {session.obj_ids}, got {obj_id}.")
        return
    kept = [row for other, row in session._obj_id_to_idx.items() if other != obj_id]
    session.obj_ids = [session.obj_idx_to_id(row) for row in kept]
    session._obj_id_to_idx = OrderedDict((other, row) for row, other in enumerate(session.obj_ids))
    session._obj_idx_to_id = OrderedDict(enumerate(session.obj_ids))
    for name in ("point_inputs_per_obj", "mask_inputs_per_obj", "output_dict_per_obj", "frames_tracked_per_obj"):
        table = getattr(session, name)
        setattr(session, name, {new: table[old] for new, old in enumerate(kept)})
    session.obj_with_new_inputs = [other for other in session.obj_with_new_inputs if other != obj_id]
