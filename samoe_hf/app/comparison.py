"""Two models, or two domains of one, on the same clicks: tracked one after the other, and shown side by side."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, track_video

from .masks import MaskStore
from .models import LoadedModel
from .pictures import draw_frame, side_by_side
from .session import Tracked, TrackingSession, reopened

SHARE_NAME = "mean IoU"


class Side(NamedTuple):
    """One of the two: a model, and whose experts it runs ("auto", None or a domain); `label` is for people."""

    label: str
    model: LoadedModel
    domain: str | None


class Comparison:
    """Two sides on a session's prompts as they are now. What is done to the session later changes nothing here.

    Args:
        folder: for the masks, an empty one.
        first_prompts_only: whether corrections are left out, so that one sees what each side does by itself.

    Raises:
        ValueError: nothing is prompted, or a domain that the model does not have.
    """

    def __init__(self, session: TrackingSession, sides: Sequence[Side], folder: Path, first_prompts_only: bool = False):
        if not session.prompts:
            raise InputError("Nothing is prompted yet: click on an object, or draw a box around it.")
        self.sides, self.objects = tuple(sides), sorted({object_id for object_id, _ in session.prompts})
        self.prompts = list(session.prompts.values())
        if first_prompts_only:
            self.prompts = first_prompts(self.prompts)
        self.masks = [MaskStore(folder / f"side_{i}", session.video.frames.size) for i in range(len(self.sides))]
        self._session, self._device = session, session.device()
        self._frames = reopened(session.video)
        self._stop = threading.Event()

    @property
    def frames(self) -> list[int]:
        """Frames that all sides have tracked, in order."""
        return sorted(set.intersection(*(store.frames for store in self.masks)))

    def run(self) -> Iterator[Tracked]:
        """Tracks the video with each side; masks that are there are replaced. Ends early after [`stop`]."""
        self._stop.clear()
        total, done = len(self.sides) * len(self._frames), 0
        for side, store in zip(self.sides, self.masks, strict=True):
            model = side.model
            tracked = track_video(model.model, model.processor, self._frames, self.prompts, domain=side.domain)
            with closing(tracked):
                while True:
                    with self._device:
                        frame = next(tracked, None)
                    if frame is None:
                        break
                    store.write(frame.frame_idx, frame.id_map())
                    done += 1
                    yield Tracked(frame.frame_idx, done, total)
                    if self._stop.is_set():
                        return

    def stop(self) -> None:
        """Ends [`run`] after the frame that is being tracked."""
        self._stop.set()

    def picture(self, frame: int) -> np.ndarray:
        """A frame with each side's masks, next to each other: (H, W, 3) uint8."""
        picture, prompts = self._session.frame(frame), [one for one in self.prompts if one.frame_idx == frame]
        maps = (store.read(frame, self.objects) for store in self.masks)
        return side_by_side([draw_frame(picture, id_map, prompts) for id_map in maps])

    def table(self) -> list[list[str]]:
        """Rows by object: IoU of the two sides, and of each side with the session's masks, as means over frames.

        Frames that show the object on neither of the two do not count.
        """
        rows = []
        for object_id in self.objects:
            row = [f"object {object_id}"]
            for pair in (self._maps(0, 1), self._maps(0, None), self._maps(1, None)):
                row.append(_mean_iou(pair, object_id))
            rows.append(row)
        return rows

    def headers(self) -> list[str]:
        """Of [`table`]."""
        first, second = (side.label for side in self.sides)
        return [SHARE_NAME, f"{first} and {second}", f"{first} and your masks", f"{second} and your masks"]

    def _maps(self, first: int, second: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Maps of a side and of another, or of the session."""
        for frame in self.frames:
            if second is not None:
                yield self.masks[first].read(frame, self.objects), self.masks[second].read(frame, self.objects)
            elif frame in self._session.masks.frames:
                yield self.masks[first].read(frame, self.objects), self._session.id_map(frame)


def first_prompts(prompts: Sequence[VideoPrompt]) -> list[VideoPrompt]:
    """Of each object, what was given on the earliest frame."""
    first: dict[int, VideoPrompt] = {}
    for prompt in sorted(prompts, key=lambda prompt: prompt.frame_idx):
        first.setdefault(prompt.object_id, prompt)
    return list(first.values())


def _mean_iou(maps: Iterator[tuple[np.ndarray, np.ndarray]], object_id: int) -> str:
    values = []
    for first, second in maps:
        a, b = first == object_id, second == object_id
        union = np.count_nonzero(a | b)
        if union:
            values.append(np.count_nonzero(a & b) / union)
    return f"{np.mean(values):.2f}" if values else "–"
