"""A session for videos of any length, whose frames are read when they are needed, or streamed."""

import copy
import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Sam2VideoInferenceSession

from samoe_hf.data.images import read_pixels
from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import UNKNOWN
from samoe_hf.model.domain_choice import AUTO, SessionDecision
from samoe_hf.model.memory_selection import MEMORY_SELECTIONS, forget
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.model.prompts import SessionPrompt
from samoe_hf.model.session import SessionObject, check_prompt, session_objects

KEPT_FRAMES = 32
CHOICES = {"memory_selection": MEMORY_SELECTIONS, "unknown": UNKNOWN}


class VideoSession(Sam2VideoInferenceSession):
    """A [`~transformers.Sam2VideoInferenceSession`] for videos of any length; it is used in the same way.

    Outputs and memories are kept of prompted frames, and of frames within `keep_frames` of a prompted frame or of the
    last one that was tracked. So tracking onward, or backward from a prompted frame, gives what a session that keeps
    all gives, and so does a correction up to `keep_frames` less the model's reach (16 for SAM 2) back. Farther back, a
    corrected frame reads less, and a prompt on a forgotten frame is taken as the object's first there.

    `copy.deepcopy` makes a session that goes on by itself from the same state, as to try another prompt. Both share the
    model, and the frames and tensors that are there.

    Args:
        frames: (H, W, 3), (3, H, W) or (H, W) uint8 arrays or tensors of one size, or PIL images of 8 bits, which are
            shown upright and on white, each read when it is needed; None where frames are streamed.
        processor: prepares the frames.
        keep_frames: at least the model's reach.
        corrections_condition: whether prompts on tracked frames make conditioning frames of them, as SAM 2 is trained
            and as `sam2` does with `add_all_frames_to_correct_as_cond`. By default they do not, and a corrected frame
            is tracked anew when the video is propagated again.
        domain: whose experts a model with domains runs: a domain's name, None for the base model, or "auto" for what
            the gate decides on the frame that is segmented first. It can be set anew at any time.
        unknown: what the video gets if the gate finds that it is of no known domain: "base", "nearest" or "mix", see
            [`SamoeConfig`], or None for what the model's configuration says. It can be set anew at any time,
            and so can `memory_selection`.
        domain_interval: for videos whose look changes on the way: the gate decides anew after so many frames.
        memory_selection: which memories a frame reads: "recent", "score" or "distractor" (see `memory_selection.py`),
            or None for the model's own. Those of frames that may be read however long ago they were are kept longer.
        inference_device: of the model.
        inference_state_device: where memories, outputs and features are kept, by default where they are computed. On
            "cpu" they take no memory of a GPU, but each frame moves those that it reads there and back.
        kwargs: as in the base class: `max_vision_features_cache_size`, so many frames (16 at most) are encoded at once,
            ahead of tracking.
    """

    def __init__(
        self,
        frames: Sequence[Any] | None = None,
        processor: VideoProcessor | None = None,
        *,
        keep_frames: int = KEPT_FRAMES,
        corrections_condition: bool = False,
        domain: str | None = AUTO,
        unknown: str | None = None,
        domain_interval: int | None = None,
        memory_selection: str | None = None,
        inference_device: torch.device | str = "cpu",
        inference_state_device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ):
        if (frames is None) != (processor is None):
            raise InputError("`frames` and `processor` must be given together, or neither where frames are streamed.")
        if domain_interval is not None and domain_interval < 1:
            raise InputError(f"`domain_interval` must be at least 1 frame or None, got {domain_interval}.")
        if frames is not None:
            if not len(frames):
                raise InputError("`frames` is empty.")
            kwargs["video_height"], kwargs["video_width"] = read_frame(frames, 0).shape[:2]
        kept_on = inference_device if inference_state_device is None else inference_state_device
        super().__init__(inference_device=inference_device, inference_state_device=kept_on, dtype=dtype, **kwargs)
        if frames is not None and processor is not None:
            size = kwargs["video_height"], kwargs["video_width"]
            self.processed_frames = PreparedFrames(frames, size, processor, self.inference_device, dtype)
        self.keep_frames, self.corrections_condition = keep_frames, corrections_condition
        self.domain, self.unknown, self.domain_interval = domain, unknown, domain_interval
        self.memory_selection = memory_selection
        self.domain_decision: SessionDecision | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; an `InputError` if `memory_selection` or `unknown` is none that there is."""
        if (known := CHOICES.get(name)) and value not in (None, *known):
            raise InputError(f"`{name}` must be one of {', '.join(map(repr, known))} or None, got {value!r}.")
        super().__setattr__(name, value)

    def add_new_frame(self, pixel_values: Tensor, frame_idx: int | None = None) -> int:
        """Adds a frame of a stream, by default behind the last one, and returns its index."""
        if frame_idx is None:
            frame_idx = max(self.processed_frames or [-1]) + 1
        return super().add_new_frame(pixel_values, frame_idx)

    def obj_id_to_idx(self, obj_id: int) -> int:
        """The row of an object, which is made if need be; its id may be an integer of NumPy or a tensor."""
        return super().obj_id_to_idx(operator.index(obj_id))

    def add_point_inputs(self, obj_idx: int, frame_idx: int, inputs: dict[str, Tensor]) -> None:
        """Adds points or a box of an object. Those that cannot be used are refused, see [`check_prompt`]."""
        earlier = SessionObject(self, obj_idx).prompt(frame_idx)
        self.remove_mask_inputs(obj_idx, frame_idx)
        super().add_point_inputs(obj_idx, frame_idx, inputs)
        self._check_prompt(obj_idx, frame_idx, earlier)

    def add_mask_inputs(self, obj_idx: int, frame_idx: int, inputs: Tensor) -> None:
        """Adds a mask of an object. One that cannot be used is refused, see [`check_prompt`]."""
        earlier = SessionObject(self, obj_idx).prompt(frame_idx)
        super().add_mask_inputs(obj_idx, frame_idx, inputs)
        self._check_prompt(obj_idx, frame_idx, earlier)

    def _check_prompt(self, obj_idx: int, frame_idx: int, earlier: SessionPrompt | None) -> None:
        if isinstance(self.processed_frames, PreparedFrames):
            image_size = self.processed_frames.processor.target_size
            check_prompt(SessionObject(self, obj_idx), frame_idx, image_size, upcoming=False, earlier=earlier)

    @property
    def num_frames(self) -> int | None:
        """Frames of the video; of a stream those so far, also where the first ones are forgotten."""
        frames = self.processed_frames
        return max(frames, default=-1) + 1 if isinstance(frames, dict) else super().num_frames

    @property
    def has_all_frames(self) -> bool:
        """Whether all frames are known. Then prompts are checked as they are added, and those of a stream later."""
        return isinstance(self.processed_frames, PreparedFrames)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VideoSession":
        memo[id(self)] = copied = type(self)()
        for table in (table for one in session_objects(self) for table in one.tables):
            memo.update((id(given), given) for given in table.values())
        with _SharedTensors():
            vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("A VideoSession belongs to its model and cannot be pickled; `copy.deepcopy` copies it.")

    def forget(self, frame_idx: int) -> None:
        """Drops what tracking does not reach again from frame `frame_idx`."""
        for row, outputs in self.output_dict_per_obj.items():
            state, kept = outputs["state"], outputs["non_cond_frame_outputs"]
            bank, model = state.bank, state.model()
            anchors = [frame_idx, *bank.conditioning]
            far = {t for t in kept if all(abs(t - anchor) > self.keep_frames for anchor in anchors)}
            for t in far.difference(SessionObject(self, row).prompted_frames):
                del kept[t]
                self.frames_tracked_per_obj[row].pop(t, None)
            forget(bank, self.memory_selection or model.memory_selection, frame_idx, kept, self.keep_frames)
        if isinstance(self.processed_frames, dict):
            for t in [t for t in self.processed_frames if abs(t - frame_idx) > self.keep_frames]:
                del self.processed_frames[t]


class _SharedTensors(TorchFunctionMode):
    """Deep copies keep the tensors themselves: nobody writes into them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


class PreparedFrames(Mapping):
    """Frame index -> pixel values (3, S, S), prepared by the processor on each access; a deep copy is itself."""

    def __init__(
        self,
        frames: Sequence[Any],
        size: tuple[int, int],
        processor: VideoProcessor,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.frames, self.size = frames, size
        self.processor, self.device, self.dtype = processor, device, dtype

    def __deepcopy__(self, memo: object) -> "PreparedFrames":
        return self

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self):
        return iter(range(len(self.frames)))

    def __contains__(self, frame_idx: object) -> bool:
        return isinstance(frame_idx, Integral) and int(frame_idx) in range(len(self.frames))

    def __getitem__(self, frame_idx: int) -> Tensor:
        if frame_idx not in self:
            raise KeyError(frame_idx)
        frame = read_frame(self.frames, frame_idx)
        if frame.shape[:2] != self.size:
            raise InputError(
                f"`frames` must be of one size, got {self.size} and on frame {frame_idx} {frame.shape[:2]}."
            )
        video = {"videos": frame[None], "input_data_format": "channels_last"}  # else told by the height where it is 3
        prepared = self.processor.video_processor(**video, device=self.device, return_tensors="pt")
        return prepared.pixel_values_videos[0, 0].to(self.dtype)


def read_frame(frames: Sequence[Any], index: int) -> np.ndarray:
    """A frame (H, W, 3) uint8 of what [`VideoSession`] takes.

    Raises:
        InputError: if it is of another type or shape.
    """
    frame = frames[index]
    if isinstance(frame, Image.Image):
        frame = read_pixels(frame, f"`frames`, frame {index}")
    array = np.array(frame.cpu().numpy() if isinstance(frame, Tensor) else frame)
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=-1)
    elif array.ndim == 3 and array.shape[0] == 3 != array.shape[2]:
        array = np.moveaxis(array, 0, -1)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(
            f"`frames` must be (H, W, 3), (3, H, W) or (H, W) of uint8, got {array.dtype} {array.shape} on frame "
            f"{index}."
        )
    return array
