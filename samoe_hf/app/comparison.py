"""Two models, or two domains of one, on the same clicks: tracked one after the other, and shown side by side."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, track_video

from .masks import MaskStore
from .models import LoadedModel
from .pictures import draw_frame, side_by_side
from .session import NOTHING_PROMPTED, Tracked, TrackingSession, taking_turns


class Side(NamedTuple):
    """One of the two: a model, and whose experts it runs ("auto", None or a domain); `label` is for people."""

    label: str
    loaded: LoadedModel
    domain: str | None


class Comparison:
    """Two sides on a session's prompts as they are now. What is done to the session later changes nothing here.

    Args:
        folder: for the masks, an empty one.
        first_prompts_only: whether corrections are left out, so that one sees what each side does by itself.

    Raises:
        InputError: nothing is prompted.
    """

    def __init__(
        self, session: TrackingSession, sides: tuple[Side, Side], folder: Path, first_prompts_only: bool = False
    ):
        if not session.prompts:
            raise InputError(NOTHING_PROMPTED)
        self.sides, self.objects = sides, sorted({object_id for object_id, _ in session.prompts})
        prompts = list(session.prompts.values())
        self.prompts = first_prompts(prompts) if first_prompts_only else prompts
        self.masks = [MaskStore(folder / f"side_{i}", session.video.frames.size) for i in range(len(sides))]
        self._session, self._frames = session, session.video.frames_again()
        self._stop = threading.Event()

    @property
    def frames(self) -> list[int]:
        """Frames that both sides have tracked, in order."""
        return sorted(set.intersection(*(store.frames for store in self.masks)))

    def run(self) -> Iterator[Tracked]:
        """Tracks the video with each side; masks that are there are replaced. Ends early after [`stop`]."""
        self._stop.clear()
        total, done = len(self.sides) * len(self._frames), 0
        for side, store in zip(self.sides, self.masks, strict=True):
            model, processor = side.loaded.model, side.loaded.processor
            tracked = track_video(model, processor, self._frames, self.prompts, domain=side.domain)
            for frame in taking_turns(tracked, self._session.device_lock):
                id_map = frame.id_map()
                store.write(frame.frame_idx, id_map)
                done += 1
                yield Tracked(frame.frame_idx, id_map, done, total)
                if self._stop.is_set():
                    return

    def stop(self) -> None:
        """Ends [`run`] after the frame that is being tracked."""
        self._stop.set()

    def picture(self, frame: int) -> np.ndarray:
        """A frame with each side's masks, next to each other: (H, W, 3) uint8."""
        picture, prompts = self._session.frame(frame), [one for one in self.prompts if one.frame_idx == frame]
        return side_by_side([draw_frame(picture, store.read(frame, self.objects), prompts) for store in self.masks])

    def table(self) -> list[list[str]]:
        """Rows by object: IoU of the two sides, and of each side with the session's masks, as means over frames.

        Frames that show the object on neither of the two do not count.
        """
        pairs = ((0, 1), (0, None), (1, None))
        return [
            [f"object {object_id}", *(_mean_iou(self._maps(*pair), object_id) for pair in pairs)]
            for object_id in self.objects
        ]

    def headers(self) -> list[str]:
        """What the columns of [`table`] hold."""
        first, second = (side.label for side in self.sides)
        return ["mean IoU", f"{first} and {second}", f"{first} and your masks", f"{second} and your masks"]

    def _maps(self, first: int, second: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """On each frame, the maps of a side and of another, or of the session, where that has one."""
        for frame in self.frames:
            if second is not None:
                yield self.masks[first].read(frame, self.objects), self.masks[second].read(frame, self.objects)
            elif frame in self._session.masks.frames:
                yield self.masks[first].read(frame, self.objects), self._session.id_map(frame)


def first_prompts(prompts: Sequence[VideoPrompt]) -> list[VideoPrompt]:
    """What was given of each object on the earliest of its frames."""
    latest_first = sorted(prompts, key=lambda prompt: prompt.frame_idx, reverse=True)
    return list({prompt.object_id: prompt for prompt in latest_first}.values())


def _mean_iou(maps: Iterable[tuple[np.ndarray, np.ndarray]], object_id: int) -> str:
    values = []
    for first, second in maps:
        a, b = first == object_id, second == object_id
        union = np.count_nonzero(a | b)
        if union:
            values.append(np.count_nonzero(a & b) / union)
    return f"{np.mean(values):.2f}" if values else "–"
