"""Two models, or two domains of one, on the same clicks: tracked one after the other, and shown side by side."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from samoe_hf.errors import InputError
from samoe_hf.inference import track_video

from .models import LoadedModel, taking_turns
from .pictures import draw_frame
from .session import NOTHING_PROMPTED, MaskStore, Tracked, TrackingSession


class Side(NamedTuple):
    """One of the two: a model, and whose experts it runs ("auto", None or a domain); `label` is for people."""

    label: str
    loaded: LoadedModel
    domain: str | None


class Comparison:
    """Two sides on a session's prompts as they are now; InputError if there are none.

    What is done to the session later changes nothing here. With `first_prompts_only` corrections are left out, so that
    one sees what each side does by itself. Masks go into a new folder within `folder`.
    """

    def __init__(
        self, session: TrackingSession, sides: tuple[Side, Side], folder: Path, first_prompts_only: bool = False
    ):
        if not session.prompts:
            raise InputError(NOTHING_PROMPTED)
        self.sides, self.objects = sides, sorted({object_id for object_id, _ in session.prompts})
        self.prompts, self.memory_selection = list(session.prompts.values()), session.memory_selection
        if first_prompts_only:  # of each object, what was given on the earliest of its frames, and its end
            latest_first = sorted(self.prompts, key=lambda prompt: prompt.frame_idx, reverse=True)
            self.prompts = list({(prompt.object_id, prompt.end): prompt for prompt in latest_first}.values())
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.masks = [MaskStore(self.folder / f"side_{i}", session.video.frames.size) for i in range(len(sides))]
        self._session, self._frames = session, session.video.frames_again()
        self._stop = threading.Event()

    @property
    def frames(self) -> list[int]:
        """Frames that both sides have tracked, in order."""
        return sorted(set.intersection(*(store.frames for store in self.masks)))

    def run(self) -> Iterator[Tracked]:
        """Tracks the video with each side. Ends early after [`stop`]."""
        total, done = len(self.sides) * len(self._frames), 0
        for side, store in zip(self.sides, self.masks, strict=True):
            model, processor = side.loaded.model, side.loaded.processor
            options = {"domain": side.domain, "memory_selection": self.memory_selection}
            for frame in taking_turns(track_video(model, processor, self._frames, self.prompts, **options)):
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
        """A frame with each side's masks, next to each other with a gap: (H, W, 3) uint8."""
        picture, prompts = self._session.frame(frame), [one for one in self.prompts if one.frame_idx == frame]
        left, right = (draw_frame(picture, store.read(frame, self.objects), prompts) for store in self.masks)
        return np.hstack([left, np.full((len(left), 8, 3), 255, dtype=np.uint8), right])

    def table(self) -> list[list[str]]:
        """Rows by object: IoU of the two sides, and of each side with the session's masks, as means over frames.

        Frames that show the object on neither of the two do not count.
        """
        first, second = self.masks
        mine, rows = self._session.masks, []
        for object_id in self.objects:
            pairs = ((first, second), (first, mine), (second, mine))
            rows.append([f"object {object_id}", *(self._mean_iou(*pair, object_id) for pair in pairs)])
        return rows

    def headers(self) -> list[str]:
        """What the columns of [`table`] hold."""
        first, second = (side.label for side in self.sides)
        return ["mean IoU", f"{first} and {second}", f"{first} and your masks", f"{second} and your masks"]

    def _mean_iou(self, first: MaskStore, second: MaskStore, object_id: int) -> str:
        values, ends = [], {one.object_id: one.frame_idx for one in self.prompts if one.end}
        # What was tracked before an end was given is still in the session's store behind it.
        frames = (frame for frame in self.frames if frame < ends.get(object_id, len(self._frames)))
        for frame in first.frames & second.frames & {*frames}:
            a, b = (store.read(frame, [object_id]) > 0 for store in (first, second))
            if (a | b).any():
                values.append(np.count_nonzero(a & b) / np.count_nonzero(a | b))
        return f"{np.mean(values):.2f}" if values else "–"
