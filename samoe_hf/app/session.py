"""One person's video: its objects, prompts and masks, and the tracking of it. Knows no page."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from transformers import ProcessorMixin

from samoe_hf.data.video_io import FrameSequence, read_video
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt
from samoe_hf.model.domain_choice import AUTO, check_domain
from samoe_hf.model.session import VideoSession

from .limits import Limits
from .masks import MaskStore
from .models import LoadedModel
from .snapshots import restore_snapshot, take_snapshot
from .videos import OpenedVideo

Direction = Literal["whole", "forward", "backward"]
MAX_UNDO = 50


class BusyError(InputError):
    """The session is doing something else that must end first."""


class Tracked(NamedTuple):
    """A frame that was just tracked, and how far the work is."""

    frame: int
    done: int
    total: int


@dataclass
class Undo:
    """What brings a session back to where it was before a prompt."""

    what: str
    objects: list[int]
    prompts: dict[tuple[int, int], VideoPrompt]
    frame: int
    mask: bytes | None
    snapshot: Mapping[str, Any]
    whose: tuple[str | None, float | None] = field(default=(None, None))


class TrackingSession:
    """A video with objects that are prompted, tracked and corrected.

    One thing runs at a time; what is asked for meanwhile is a `BusyError`.

    Args:
        folder: of this session alone; masks are written there.
        device_lock: is held while the model runs, for a frame at a time.
        domain: as in [`~samoe_hf.model.session.VideoSession`].
    """

    def __init__(
        self,
        folder: Path,
        video: OpenedVideo,
        model: LoadedModel,
        device_lock: threading.Lock,
        limits: Limits,
        domain: str | None = AUTO,
    ):
        self.folder, self.video, self.model, self.limits = folder, video, model, limits
        self.objects: list[int] = []
        self.prompts: dict[tuple[int, int], VideoPrompt] = {}
        self.masks = MaskStore(folder / "masks", video.frames.size)
        self.domain = domain
        # Whose experts the video got last, and how sure the gate was of that.
        self.tracked_domain: str | None = None
        self.confidence: float | None = None
        self.last_id = 0
        self._device = device_lock
        self._busy, self._stop = threading.Lock(), threading.Event()
        self._undo: list[Undo] = []
        # The page scrubs while the model reads on: each has a decoder of its own.
        self._shown = reopened(video)
        self._shown_lock = threading.Lock()
        self._session = self._new_session(model, domain)

    def _new_session(self, model: LoadedModel, domain: str | None) -> VideoSession:
        check_domain(model.model, domain)
        session = VideoSession(
            self.video.frames,
            model.processor,
            domain=domain,
            corrections_condition=True,  # what was corrected stays as it was corrected
            inference_device=model.model.device,
            dtype=model.model.dtype,
        )
        for prompt in self.prompts.values():
            model.processor.add_inputs_to_inference_session(
                session, prompt.frame_idx, prompt.object_id, **prompt.inputs()
            )
        return session

    # --- What is shown

    @property
    def num_frames(self) -> int:
        """Of the video."""
        return len(self.video.frames)

    @property
    def is_busy(self) -> bool:
        """Whether something runs that must end, or be stopped, before the next."""
        return self._busy.locked()

    def frame(self, index: int) -> np.ndarray:
        """A frame of the video, (H, W, 3) uint8."""
        self._check_frame(index)
        with self._shown_lock:
            return self._shown[index]

    def id_map(self, frame: int) -> np.ndarray:
        """The objects' ids on a frame, (H, W) uint8, 0 for background; all 0 where nothing was tracked."""
        self._check_frame(frame)
        return self.masks.read(frame, self.objects)

    def prompts_on(self, frame: int) -> list[VideoPrompt]:
        """What was given on a frame, by object."""
        return [prompt for (_, t), prompt in sorted(self.prompts.items()) if t == frame]

    @property
    def prompted_frames(self) -> list[int]:
        """Frames with a prompt, in order."""
        return sorted({frame for _, frame in self.prompts})

    @property
    def can_undo(self) -> bool:
        """Whether there is a prompt that [`undo`] takes back."""
        return bool(self._undo)

    # --- Objects and prompts

    def add_object(self) -> int:
        """A new object's id: 1, 2, …, never one that was used before.

        Raises:
            ValueError: there are as many as the limits allow.
        """
        with self.exclusive():
            if len(self.objects) >= self.limits.objects or self.last_id >= 255:
                raise InputError(f"{len(self.objects)} objects are the most that this app tracks in a video.")
            self.last_id += 1
            self.objects.append(self.last_id)
            return self.last_id

    def remove_object(self, object_id: int) -> None:
        """Removes an object with its prompts and masks; ValueError if there is no such object."""
        self._check_object(object_id)
        with self.exclusive():
            frame = next((t for i, t in sorted(self.prompts) if i == object_id), 0)
            self._remember(f"removing object {object_id}", frame)
            self.model.model.remove_object(self._session, object_id)
            self.objects.remove(object_id)
            self.prompts = {key: prompt for key, prompt in self.prompts.items() if key[0] != object_id}

    def click(self, object_id: int, frame: int, x: float, y: float, positive: bool = True) -> None:
        """Adds a point on a frame and segments it. All points and the box of an object on a frame count together.

        Args:
            x, y: in pixels of the video.
            positive: whether the object is there, and not something else.

        Raises:
            ValueError: an unknown object or frame, or a point outside of the frame; then nothing has changed.
        """
        prompt = self._prompt(object_id, frame)
        prompt.points, prompt.labels = [*prompt.points, (float(x), float(y))], [*prompt.labels, int(positive)]
        self._segment(prompt, f"a click on object {object_id}")

    def draw_box(self, object_id: int, frame: int, box: tuple[float, float, float, float]) -> None:
        """Sets an object's box on a frame, (x0, y0, x1, y1) in pixels of the video, and segments it; as [`click`]."""
        prompt = self._prompt(object_id, frame)
        prompt.box = tuple(float(value) for value in box)
        self._segment(prompt, f"a box around object {object_id}")

    def undo(self) -> str:
        """Takes back the last click, box or removal since the video was tracked; says what it was.

        Raises:
            ValueError: there is none.
        """
        with self.exclusive():
            if not self._undo:
                raise InputError("There is nothing to undo since the video was tracked last.")
            last = self._undo.pop()
            self._restore(last)
            return last.what

    def _prompt(self, object_id: int, frame: int) -> VideoPrompt:
        """A copy of what was given of an object on a frame."""
        self._check_object(object_id)
        self._check_frame(frame)
        found = self.prompts.get((object_id, frame))
        return copy.copy(found) if found else VideoPrompt(object_id, frame)

    def _segment(self, prompt: VideoPrompt, what: str) -> None:
        prompt.check(self.num_frames, self.video.frames.size)
        given = sum(len(one.points) + (one.box is not None) for one in self.prompts.values())
        if given >= self.limits.prompts:
            raise InputError(f"{self.limits.prompts} clicks and boxes are the most for a video.")
        with self.exclusive():
            self._remember(what, prompt.frame_idx)
            try:
                self.model.processor.add_inputs_to_inference_session(
                    self._session, prompt.frame_idx, prompt.object_id, **prompt.inputs()
                )
                with self._device:
                    output = self.model.model(inference_session=self._session, frame_idx=prompt.frame_idx)
                self._store(output)
            except BaseException:
                self._restore(self._undo.pop())
                raise
            self.prompts[prompt.object_id, prompt.frame_idx] = prompt

    def _remember(self, what: str, frame: int) -> None:
        state = list(self.objects), dict(self.prompts), frame, self.masks.bytes_of(frame), take_snapshot(self._session)
        self._undo.append(Undo(what, *state, (self.tracked_domain, self.confidence)))
        del self._undo[:-MAX_UNDO]

    def _restore(self, undo: Undo) -> None:
        restore_snapshot(self._session, undo.snapshot)
        self.objects, self.prompts = undo.objects, undo.prompts
        self.masks.restore(undo.frame, undo.mask)
        self.tracked_domain, self.confidence = undo.whose

    # --- Tracking

    def propagate(self, direction: Direction = "whole", start: int = 0) -> Iterator[Tracked]:
        """Tracks all prompted objects, frame by frame, until the end or [`stop`]; the masks are stored meanwhile.

        Args:
            direction: "whole" from the first prompted frame onward and then back to the start, as
                [`~samoe_hf.inference.track_video`] does; "forward" and "backward" from `start`.

        Raises:
            ValueError: nothing was prompted, or an unknown direction or frame.
        """
        if direction not in get_args(Direction):
            raise InputError(f"`direction` must be one of {', '.join(get_args(Direction))}, got {direction!r}.")
        self._check_frame(start)
        if not self.prompts:
            raise InputError("Nothing is prompted yet: click on an object, or draw a box around it.")
        first = self.prompted_frames[0]
        passes = [(start, direction == "backward")]
        if direction == "whole":
            passes = [(first, False), (first, True)] if first > 0 else [(first, False)]
        total = sum(begin + 1 if reverse else self.num_frames - begin for begin, reverse in passes)
        done = 0
        with self.exclusive():
            self._stop.clear()
            self._undo.clear()
            for begin, reverse in passes:
                for frame in self._track(self._session, self.model, begin, reverse, self._store):
                    done += 1
                    yield Tracked(frame, done, total)
                    if self._stop.is_set():
                        return

    def _track(
        self,
        session: VideoSession,
        model: LoadedModel,
        start: int,
        reverse: bool,
        store: Callable[[Any], None],
    ) -> Iterator[int]:
        outputs = model.model.propagate_in_video_iterator(session, start_frame_idx=start, reverse=reverse)
        while True:
            with self._device:
                output = next(outputs, None)
            if output is None:
                return
            store(output)
            yield output.frame_idx

    def stop(self) -> None:
        """Ends tracking after the frame that is being tracked."""
        self._stop.set()

    def _store(self, output: Any) -> None:
        self.masks.write(output.frame_idx, output_id_map(self.model.processor, output, self.video.frames.size))
        self.tracked_domain, self.confidence = output.domain, output.domain_confidence

    # --- Another domain or model

    def use(self, model: LoadedModel | None = None, domain: str | None = AUTO) -> None:
        """Starts anew with the same prompts: prompted frames are segmented at once, other masks are dropped.

        Args:
            model: by default the one that is used already.
            domain: whose experts it runs, see [`~samoe_hf.model.session.VideoSession`].

        Raises:
            ValueError: a domain that the model does not have; then nothing has changed.
        """
        model = model or self.model
        with self.exclusive():
            session = self._new_session(model, domain)
            outputs = []
            for frame in self.prompted_frames:
                with self._device:
                    outputs.append(model.model(inference_session=session, frame_idx=frame))
            self._session, self.model, self.domain = session, model, domain
            self._undo.clear()
            self.masks.clear()
            self.tracked_domain = self.confidence = None
            for output in outputs:
                self._store(output)

    def restore_project(self, objects: list[int], prompts: list[VideoPrompt], last_id: int) -> None:
        """Takes over objects and prompts of a project, of a session without any; masks are written to `masks`."""
        self.objects, self.last_id = list(objects), last_id
        self.prompts = {(prompt.object_id, prompt.frame_idx): prompt for prompt in prompts}
        self._session = self._new_session(self.model, self.domain)

    # --- Guards

    @contextmanager
    def exclusive(self) -> Iterator[VideoSession]:
        """Runs alone in this session, whose state it gets; a `BusyError` where something else runs."""
        if not self._busy.acquire(blocking=False):
            raise BusyError("This video is being worked on. Wait for it, or press Stop.")
        try:
            yield self._session
        finally:
            self._busy.release()

    def device(self) -> threading.Lock:
        """The lock of the device."""
        return self._device

    def _check_frame(self, frame: int) -> None:
        if isinstance(frame, bool) or not isinstance(frame, int) or not 0 <= frame < self.num_frames:
            raise InputError(f"`frame` must be from 0 to {self.num_frames - 1}, got {frame!r}.")

    def _check_object(self, object_id: int) -> None:
        if isinstance(object_id, bool) or object_id not in self.objects:
            known = ", ".join(map(str, self.objects)) or "none yet: add one first"
            raise InputError(f"`object` must be one of the video's objects ({known}), got {object_id!r}.")


def output_id_map(processor: ProcessorMixin, output: Any, size: tuple[int, int]) -> np.ndarray:
    """The map of ids (H, W) uint8 of a frame's output: each pixel is the object's of the largest positive logit.

    One object is at the video's size at a time, so that many objects in a large video do not fill the memory.
    """
    best = np.zeros(size, dtype=np.float32)
    ids = np.zeros(size, dtype=np.uint8)
    for row, object_id in enumerate(output.object_ids):
        logits = processor.post_process_masks([output.pred_masks[row : row + 1]], [size], binarize=False)[0][0, 0]
        logits = logits.float().cpu().numpy()
        wins = logits > best
        best[wins], ids[wins] = logits[wins], object_id
    return ids


def reopened(video: OpenedVideo) -> FrameSequence:
    """The frames of a video with a decoder of their own, for another thread."""
    path = getattr(video.frames, "path", None)
    return video.frames if path is None else read_video(path)
