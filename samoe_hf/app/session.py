"""One person's video: its objects, prompts and masks, and the tracking of it. Knows no page.

Object ids, frames and positions are checked where a request comes in, see `page_parts`.
"""

import copy
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers.models.sam2_video.modeling_sam2_video import NO_OBJ_SCORE, Sam2VideoSegmentationOutput

from samoe_hf.data.images import read_label_png, write_palette_png
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, check_masks, check_prompts
from samoe_hf.model.domain_choice import AUTO, DomainDecision, session_domain
from samoe_hf.model.tracking import SamoeTrackingOutput
from samoe_hf.tracks import ObjectScores, TrackRow, track_rows
from samoe_hf.video_session import VideoSession
from samoe_hf.where_to_look import Look, doubts, where_to_look

from .models import DEVICE_LOCK, LoadedModel, taking_turns
from .uploads import Limits, OpenedVideo

Direction = Literal["whole", "forward", "backward"]
NOTHING_PROMPTED = "Nothing is prompted yet: click on an object, or draw a box around it."
MAX_UNDO, MAX_ID = 50, 255
ROWS = "rows"  # the key of a mask's text


class MaskStore:
    """Maps of ids (H, W) uint8, 0 for background, by frame: palette PNGs in a folder, so that they fill no RAM.

    A file has what is known of the frame's objects as its text: rows of `tracks.csv`, without time and prompts. `size`
    is the (height, width) of all maps, `frames` are those that have one.
    """

    def __init__(self, folder: Path, size: tuple[int, int]):
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        self.frames: set[int] = set()

    def path(self, frame: int) -> Path:
        """The file of a frame, there or not."""
        return self.folder / f"{frame:05d}.png"

    def write(self, frame: int, id_map: np.ndarray, known: Mapping[int, Sequence[float]] | None = None) -> None:
        """Stores a frame's map, and the score, IoU and stability of objects, in place of earlier ones, which stay if
        that fails."""
        text, known = PngInfo(), known or {}
        scores = ObjectScores(*np.array([*known.values()]).reshape(-1, 3).T)
        text.add_text(ROWS, json.dumps(track_rows(frame, [*known], scores, (id_map == i for i in known))))
        self._put(frame, lambda path: write_palette_png(path, id_map, text))

    def rows(self, frame: int) -> list[TrackRow]:
        """What is known of the objects on a frame."""
        if frame not in self.frames:
            return []
        with Image.open(self.path(frame)) as image:
            return [TrackRow(*row) for row in json.loads(image.info[ROWS])]

    def restore(self, frame: int, content: bytes | None) -> None:
        """Puts back the file of a frame's map as it was; None: there was none."""
        if content is None:
            self.path(frame).unlink(missing_ok=True)
            self.frames.discard(frame)
        elif content != self.content(frame):
            self._put(frame, lambda path: path.write_bytes(content))

    def content(self, frame: int) -> bytes | None:
        """The file of a frame's map, if it has one."""
        return self.path(frame).read_bytes() if frame in self.frames else None

    def _put(self, frame: int, write: Callable[[Path], object]) -> None:
        temporary = self.folder / "new.png"
        try:
            write(temporary)
            temporary.replace(self.path(frame))
        finally:
            temporary.unlink(missing_ok=True)
        self.frames.add(frame)

    def read(self, frame: int, object_ids: Collection[int]) -> np.ndarray:
        """A frame's map, of these objects only; all background where nothing was stored."""
        if frame not in self.frames:
            return np.zeros(self.size, dtype=np.uint8)
        kept = np.zeros(256, dtype=np.uint8)
        kept[list(object_ids)] = list(object_ids)
        return kept[read_label_png(self.path(frame))]


class Tracked(NamedTuple):
    """A frame that was just tracked, with its map of ids (H, W) uint8, and how far the work is."""

    frame: int
    id_map: np.ndarray
    done: int
    total: int


class TrackingSession:
    """A video with objects that are prompted, tracked and corrected.

    One thing runs at a time; what is asked for meanwhile is an `InputError`.

    Args:
        folder: of this session alone; masks are written there.

    Attributes:
        objects: ids, in the order in which they came.
        prompts: (object, frame) -> all that was given of it there, in the order in which it came.
        domain: whose experts it runs, see [`~samoe_hf.video_session.VideoSession`].
        memory_selection: which memories a frame reads, see [`~samoe_hf.video_session.VideoSession`].
    """

    def __init__(self, folder: Path, video: OpenedVideo, loaded: LoadedModel, limits: Limits):
        self.folder, self.video, self.loaded, self.limits = folder, video, loaded, limits
        self.domain: str | None = AUTO
        self.memory_selection = loaded.model.memory_selection
        self.objects: list[int] = []
        self.prompts: dict[tuple[int, int], VideoPrompt] = {}
        self.masks = MaskStore(folder / "masks", video.frames.size)
        self.last_id = 0
        self._busy, self._stop = threading.Lock(), threading.Event()
        # What the session was before each click, box, end or removal, and the frame whose mask that may have changed.
        self._undo: list[tuple[dict[str, Any], int, bytes | None]] = []
        # The page scrubs while the model reads on: each has a decoder of its own.
        self._shown, self._shown_lock = video.frames_again(), threading.Lock()
        self._where_to_look: tuple[list[Look], dict[int, np.ndarray]] | None = None
        self._tracking = self._new_tracking(loaded, AUTO, self.memory_selection)

    def _new_tracking(self, loaded: LoadedModel, domain: str | None, memory_selection: str) -> VideoSession:
        return VideoSession(
            self.video.frames,
            loaded.processor,
            domain=domain,
            memory_selection=memory_selection,
            corrections_condition=True,  # what was corrected stays as it was corrected
            inference_device=loaded.model.device,
            inference_state_device="cpu",  # what many people may undo would fill a GPU
            dtype=loaded.model.dtype,
        )

    # --- What is shown

    @property
    def num_frames(self) -> int:
        """How many frames the video has."""
        return len(self.video.frames)

    @property
    def decision(self) -> DomainDecision | None:
        """Whose experts the video gets; None where the gate has not decided yet."""
        return session_domain(self.loaded.model, self._tracking)

    @property
    def can_undo(self) -> bool:
        """Whether there is something that [`undo`] takes back."""
        return bool(self._undo)

    @property
    def prompted_frames(self) -> list[int]:
        """Frames with a click or a box, in order."""
        return sorted({frame for (_, frame), prompt in self.prompts.items() if not prompt.end})

    @property
    def firsts(self) -> dict[int, int]:
        """Object -> the first frame on which it is prompted."""
        return {object_id: frame for object_id, frame in sorted(self.prompts, reverse=True)}

    @property
    def ends(self) -> dict[int, int]:
        """Object -> the frame from which on it is gone."""
        return {object_id: frame for (object_id, frame), prompt in self.prompts.items() if prompt.end}

    def frame(self, index: int) -> np.ndarray:
        """A frame of the video, (H, W, 3) uint8."""
        with self._shown_lock:
            return self._shown[index]

    def id_map(self, frame: int) -> np.ndarray:
        """The objects' ids on a frame, (H, W) uint8, 0 for background; all 0 where nothing was tracked."""
        return self.masks.read(frame, self._there(frame))

    # --- Where to look

    @property
    def was_tracked(self) -> bool:
        """Whether frames have masks that nothing was prompted on."""
        return len(self.masks.frames) > len(self.prompted_frames)

    @property
    def _until(self) -> dict[int, int]:
        """Prompted object -> the frame from which on it is gone, or the number of frames."""
        return dict.fromkeys((object_id for object_id, _ in self.prompts), self.num_frames) | self.ends

    def _there(self, frame: int) -> set[int]:
        """Prompted objects that are not gone from a frame."""
        return {object_id for object_id, end in self._until.items() if frame < end}

    def rows(self, frame: int) -> list[TrackRow]:
        """What is known of the objects on a frame, but for those that are gone."""
        time, there = self.video.frames.time(frame), self._there(frame)
        return [
            row._replace(time=time and round(time, 3), prompted=(row.object, frame) in self.prompts)
            for row in self.masks.rows(frame)
            if row.object in there
        ]

    def all_rows(self) -> list[TrackRow]:
        """[`rows`] of all frames."""
        return [row for frame in range(self.num_frames) for row in self.rows(frame)]

    @property
    def looks(self) -> list[Look]:
        """Frames that are worth a look since the video was tracked last, the most telling first."""
        until, looks = self._until, self._found[0]
        fresh = (look for look in looks if (look.object, look.frame) not in self.prompts)
        return [look for look in fresh if look.frame < until.get(look.object, 0)]

    @property
    def doubt(self) -> np.ndarray:
        """The largest doubt of an object on each frame when the video was tracked last, (frames,) from 0 to 1."""
        doubt, until = np.zeros(self.num_frames, dtype=np.float32), self._until
        for object_id, curve in self._found[1].items():
            part = doubt[: until.get(object_id, 0)]
            np.maximum(part, curve[: len(part)], out=part)
        return doubt

    @property
    def _found(self) -> tuple[list[Look], dict[int, np.ndarray]]:
        """Frames that are worth a look, and object -> its doubt by frame; found once after the video was tracked."""
        if self._where_to_look is None:
            rows, curves = self.all_rows(), dict[int, np.ndarray]()
            for look in doubts(rows):
                curve = curves.setdefault(look.object, np.zeros(self.num_frames, dtype=np.float32))
                curve[look.frame] = look.doubt
            self._where_to_look = where_to_look(rows), curves
        return self._where_to_look

    # --- Objects and prompts

    def add_object(self) -> int:
        """A new object's id: 1, 2, …, never one that was used before; InputError for more than the limits allow."""
        with self.exclusive():
            if len(self.objects) >= self.limits.objects or self.last_id >= MAX_ID:
                raise InputError(f"{len(self.objects)} objects are the most that this app tracks in a video.")
            self.last_id += 1
            self.objects.append(self.last_id)
            return self.last_id

    def remove_object(self, object_id: int) -> None:
        """Removes an object with its prompts and masks."""
        with self._undoable(frame=0):
            self.loaded.model.remove_object(self._tracking, object_id)
            self.objects.remove(object_id)
            self.prompts = {key: prompt for key, prompt in self.prompts.items() if key[0] != object_id}

    def end_object(self, object_id: int, frame: int) -> None:
        """Says that an object leaves on a frame: from there on it has no mask and is not tracked.

        It takes the place of an earlier end. Said again of the same frame, it is taken back.
        """
        is_same, end = self.ends.get(object_id) == frame, VideoPrompt(object_id, frame, end=True)
        with self._undoable(frame):
            self.prompts = {key: one for key, one in self.prompts.items() if key[0] != object_id or not one.end}
            if not is_same:
                check_prompts([*self.prompts.values(), end], self.num_frames, self.masks.size)
                self.prompts[object_id, frame] = end
            self.loaded.model.end_object(self._tracking, None if is_same else frame, object_id)

    def click(self, object_id: int, frame: int, x: float, y: float, positive: bool = True) -> np.ndarray:
        """Adds a point on a frame and segments it; gives the frame's new map of ids, (H, W) uint8.

        All points and the box of an object on a frame count together. More prompts than the limits allow, and those
        that [`~samoe_hf.inference.check_prompts`] refuses, are an InputError. Positions are in pixels of the video.
        """
        return self._segment(object_id, frame, [(x, y)], [int(positive)])

    def draw_box(self, object_id: int, frame: int, box: tuple[float, float, float, float]) -> np.ndarray:
        """Sets an object's box on a frame, (x0, y0, x1, y1) in pixels of the video, and segments it; as [`click`]."""
        return self._segment(object_id, frame, box=box)

    def _segment(
        self,
        object_id: int,
        frame: int,
        points: Sequence[tuple[float, float]] = (),
        labels: Sequence[int] = (),
        box: tuple[float, float, float, float] | None = None,
    ) -> np.ndarray:
        given = sum(len(one.points) + (one.box is not None) for one in self.prompts.values())
        if given >= self.limits.prompts:
            raise InputError(f"{self.limits.prompts} clicks and boxes are the most for a video.")
        old = self.prompts.get((object_id, frame), VideoPrompt(object_id, frame))
        prompt = VideoPrompt(object_id, frame, [*old.points, *points], [*old.labels, *labels], box or old.box)
        others = [one for one in self.prompts.values() if one.object_id == object_id and not one.end and one != old]
        check_prompts([*others, prompt], self.num_frames, self.masks.size)
        with self._undoable(frame):
            prompt.add_to(self._tracking, self.loaded.processor)
            self.prompts[object_id, frame] = prompt
            with DEVICE_LOCK:
                output = self.loaded.model(inference_session=self._tracking, frame_idx=frame)
            # Objects whose first prompt comes later would be shown by their future.
            return self._store(output, {i for i, first in self.firsts.items() if first > frame})[1]

    # --- Undo

    def undo(self) -> None:
        """Takes back the last click, box, end or removal since the video was tracked; InputError if there is none."""
        with self.exclusive():
            if not self._undo:
                raise InputError("There is nothing to undo since the video was tracked last.")
            self._go_back()

    @contextmanager
    def _undoable(self, frame: int) -> Iterator[None]:
        """What is done alone within can be taken back, and is if it fails."""
        with self.exclusive():
            before = {"objects": [*self.objects], "prompts": {**self.prompts}, "_tracking": copied(self._tracking)}
            self._undo.append((before, frame, self.masks.content(frame)))
            try:
                yield
            except BaseException:
                self._go_back()
                raise
            del self._undo[:-MAX_UNDO]

    def _go_back(self) -> None:
        before, frame, mask = self._undo[-1]
        self.masks.restore(frame, mask)
        vars(self).update(before)
        self._undo.pop()

    # --- Tracking

    def propagate(self, direction: Direction = "whole", start: int = 0) -> Iterator[Tracked]:
        """Tracks what is prompted, frame by frame, until the end or [`stop`]; InputError if nothing is.

        "whole" is as [`~samoe_hf.inference.track_video`] does, each object onward from its first prompt and back to the
        start; "forward" and "backward" are from `start`.
        """
        if not self.prompts:
            raise InputError(NOTHING_PROMPTED)
        begin = None if direction == "whole" else start
        total = start + 1 if direction == "backward" else self.num_frames - start
        if direction == "whole":
            firsts = self.firsts.values()
            total = self.num_frames - min(firsts) + max(firsts)
        with self.exclusive():
            self._stop.clear()
            self._undo.clear()
            outputs = self.loaded.model.propagate_from_prompts_iterator(self._tracking, begin, direction == "backward")
            try:
                for done, output in enumerate(taking_turns(outputs), 1):
                    yield Tracked(*self._store(output), done, total)
                    if self._stop.is_set():
                        return
            finally:
                self._where_to_look = None

    def stop(self) -> None:
        """Ends tracking after the frame that is being tracked."""
        self._stop.set()

    def _store(
        self,
        output: Sam2VideoSegmentationOutput,
        kept: Collection[int] = (),
        masks: MaskStore | None = None,
        loaded: LoadedModel | None = None,
    ) -> tuple[int, np.ndarray]:
        """Stores a frame's map, of which each pixel is the object's of the largest positive logit; gives frame and map.

        Objects of `kept`, and those of which nothing new is known, stay as they are in the store, behind the others.
        One object is at the video's size at a time, so that many objects in a large video do not fill the RAM.

        Args:
            masks, loaded: the store, and the model that gave the output; by default the session's.
        """
        masks, loaded = masks or self.masks, loaded or self.loaded
        assert isinstance(output, SamoeTrackingOutput) and output.object_score_logits is not None
        assert output.object_ids and output.frame_idx is not None and output.pred_masks is not None
        check_masks(output, loaded.model.dtype)
        best, ids = np.zeros(masks.size, dtype=np.float32), np.zeros(masks.size, dtype=np.uint8)
        known, scores = {}, zip(output.object_score_logits, *ObjectScores.of(output), strict=True)
        for object_id, low, (logit, *sure) in zip(output.object_ids, output.pred_masks.split(1), scores, strict=True):
            if object_id in kept or logit <= NO_OBJ_SCORE:  # nothing is known of it here
                continue
            known[object_id] = sure
            logits = loaded.processor.post_process_masks([low], [masks.size], binarize=False)[0][0, 0]
            logits = logits.float().cpu().numpy()
            wins = logits > best
            best[wins], ids[wins] = logits[wins], object_id
        stay = self._there(output.frame_idx) - known.keys()
        if old := {row.object: row[3:6] for row in masks.rows(output.frame_idx) if row.object in stay}:
            ids = np.where(ids, ids, masks.read(output.frame_idx, old))
        masks.write(output.frame_idx, ids, known | old)
        return output.frame_idx, ids

    # --- Another domain or model, or a project

    def use(self, loaded: LoadedModel, domain: str | None = AUTO, memory_selection: str | None = None) -> None:
        """Starts anew with a model and the same prompts: prompted frames are segmented at once, other masks dropped."""
        memory_selection = memory_selection or loaded.model.memory_selection
        with self.exclusive():
            tracking = self._new_tracking(loaded, domain, memory_selection)
            by_frame = sorted(self.prompts.values(), key=lambda prompt: prompt.frame_idx)
            masks = MaskStore(Path(tempfile.mkdtemp(dir=self.folder)), self.masks.size)
            try:
                # Frame by frame, so that no object is shown, and then remembered, before its first prompt.
                for frame, prompts in groupby(by_frame, key=lambda prompt: prompt.frame_idx):
                    own = list(prompts)
                    for prompt in own:
                        prompt.add_to(tracking, loaded.processor)
                    if all(prompt.end for prompt in own):
                        continue
                    with DEVICE_LOCK:
                        output = loaded.model(inference_session=tracking, frame_idx=frame)
                    self._store(output, masks=masks, loaded=loaded)
            except BaseException:
                shutil.rmtree(masks.folder)
                raise
            shutil.rmtree(self.masks.folder)
            self._tracking, self.loaded, self.domain, self.masks = tracking, loaded, domain, masks
            self.memory_selection, self._where_to_look = memory_selection, None
            self._undo.clear()

    def restore(self, objects: list[int], prompts: list[VideoPrompt], last_id: int) -> None:
        """Takes over objects and prompts of a project, of a session without any; masks are written to `masks`."""
        self.objects, self.last_id = objects, last_id
        self.prompts = {(prompt.object_id, prompt.frame_idx): prompt for prompt in prompts}
        for prompt in prompts:
            prompt.add_to(self._tracking, self.loaded.processor)

    @contextmanager
    def exclusive(self) -> Iterator[VideoSession]:
        """Runs alone in this session, whose state it gets; an `InputError` where something else runs."""
        if not self._busy.acquire(blocking=False):
            raise InputError("This video is being worked on. Wait for it, or press Stop.")
        try:
            yield self._tracking
        finally:
            self._busy.release()


def copied(tracking: VideoSession) -> VideoSession:
    """A copy that shares the cached features, too: of many copies one is tracked at a time."""
    return copy.deepcopy(tracking, {id(tracking.cache): tracking.cache})
