"""CVAT's serverless functions: an interactor, which segments what is clicked, and a tracker, which follows shapes.

Nuclio calls `init_context` once, and then a handler for each request; see the README beside this file.
"""

import base64
import functools
import json
import math
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from samoe_hf import VideoSession
from samoe_hf.data.formats.cvat import draw_runs
from samoe_hf.data.images import read_pixels
from samoe_hf.data.shapes import cropped, draw, joined, polygons_of, runs_of
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, check_masks, load_tracker

MAX_TRACKS = 64  # objects whose memories are kept; the one that was not tracked for longest goes first
SHAPES = ("rectangle", "polygon", "mask")


def init_context(context: Any) -> None:
    """Loads the model that `SAMOE_MODEL` names, as `SamoeModel.from_pretrained` takes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context.user_data.tracker = Tracker(*load_tracker(os.environ["SAMOE_MODEL"], device))


def _answering(answer: Callable[["Tracker", dict], dict]) -> Callable[[Any, Any], Any]:
    """A handler; what a user can mend is answered with status 400 and a message, which goes to the log as well."""

    @functools.wraps(answer)
    def handler(context: Any, event: Any) -> Any:
        try:
            if not isinstance(event.body, dict):
                raise InputError("The body of a request must be a JSON object.")
            body, status = answer(context.user_data.tracker, event.body), 200
        except InputError as error:
            context.logger.error(str(error))
            body, status = {"message": str(error)}, 400
        return context.Response(body=json.dumps(body), headers={}, content_type="application/json", status_code=status)

    return handler


@_answering
def interact(tracker: "Tracker", body: dict) -> dict:
    """The mask of an object on an image: {"image", "pos_points", "neg_points", "obj_bbox"} -> {"mask"}.

    Points are [x, y] in pixels, the box is two of them, and the mask is rows of 0 and 255.
    """
    image = read_image(body)
    clicks = {label: numbers(body, name, 2) for label, name in ((1, "pos_points"), (0, "neg_points"))}
    points = [(*point, label) for label, own in clicks.items() for point in own]
    corners = numbers(body, "obj_bbox", 2)
    if len(corners) not in (0, 2):
        raise InputError(f"`obj_bbox` must be the two corners of a box, or nothing, got {corners}.")
    box = (*corners[0], *corners[1]) if corners else None
    prompt = VideoPrompt(1, 0, [(x, y) for x, y, _ in points], [label for *_, label in points], box)
    track = tracker.start([prompt], image)[0]
    return {"mask": (track.mask * np.uint8(255)).tolist()}


@_answering
def track(tracker: "Tracker", body: dict) -> dict:
    """Starts and continues tracks: {"image", "shapes", "states"} -> {"shapes", "states"}, an entry for each object.

    An object without a state starts with its shape, on this image. The others are tracked on it, as the frame after
    the one of their state. Each answer has a new state; an object that is not seen has the shape null.
    """
    image = read_image(body)
    shapes, states = (body.get(name) or [] for name in ("shapes", "states"))
    if not isinstance(shapes, list) or not isinstance(states, list):
        raise InputError("`shapes` and `states` must be lists.")
    count = max(len(shapes), len(states))
    shapes, states = (values + [None] * (count - len(values)) for values in (shapes, states))
    new = [i for i, state in enumerate(states) if state is None]
    prompts = [shape_prompt(shapes[i], image.shape[:2]) for i in new]
    if count > MAX_TRACKS:
        raise InputError(f"{MAX_TRACKS} objects are the most in a request, got {count}.")
    started = tracker.start(prompts, image)
    steps = tracker.proceed([state for state in states if state is not None], image)
    for i, one in zip(new, started, strict=True):
        one.kind = shapes[i]["type"]
    given, tracked = iter(started), iter(steps)
    rows = [next(given) if state is None else next(tracked) for state in states]
    answers = [shapes[i] if states[i] is None else one.shape() for i, one in enumerate(rows)]
    return {"shapes": answers, "states": [tracker.keep(one) for one in rows]}


# --- The tracks


@dataclass
class Track:
    """An object in a session of its own, which counts frames from the one where it started.

    Attributes:
        size: (height, width) of its frames.
        kind: of its shapes, one of `SHAPES`.
        mask: (H, W) bool, on the last frame.
        frame: the last frame.
    """

    session: VideoSession
    size: tuple[int, int]
    mask: np.ndarray
    kind: str = "rectangle"
    frame: int = -1

    def shape(self) -> Any:
        """The mask in CVAT's words; None where nothing is seen."""
        if not self.mask.any():
            return None
        patch, x0, y0 = cropped(self.mask)
        x1, y1 = x0 + patch.shape[1], y0 + patch.shape[0]
        if self.kind == "rectangle":
            points = [x0, y0, x1, y1]
        elif self.kind == "polygon":
            points = joined(polygons_of(self.mask))
        else:
            points = [*runs_of(patch), x0, y0, x1 - 1, y1 - 1]
        return {"type": self.kind, "points": points}


class Tracker:
    """A model, and the tracks that it keeps between requests, by their states."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.tracks: OrderedDict[str, Track] = OrderedDict()

    def start(self, prompts: Sequence[VideoPrompt], image: np.ndarray) -> list[Track]:
        """A new track for each prompt, which is on this image (H, W, 3)."""
        height, width = size = image.shape[:2]
        for prompt in prompts:
            prompt.check(1, size)
        tracks = []
        for prompt in prompts:
            session = VideoSession(
                video_height=height, video_width=width, inference_device=self.model.device, dtype=self.model.dtype
            )
            prompt.add_to(session, self.processor)
            tracks.append(Track(session, size, np.zeros(size, dtype=bool)))
        self._step(tracks, image)
        return tracks

    def proceed(self, states: Sequence[Any], image: np.ndarray) -> list[Track]:
        """The tracks of some states, each tracked on this image (H, W, 3) as the frame that follows."""
        tracks = [self._find(state, image.shape[:2]) for state in states]
        if len(set(map(id, tracks))) < len(tracks):
            raise InputError("`states` holds two states of one object.")
        self._step(tracks, image)
        for state in states:
            del self.tracks[state]
        return tracks

    def keep(self, track: Track) -> str:
        """A new state, from which a track can go on."""
        state = secrets.token_hex(16)
        self.tracks[state] = track
        while len(self.tracks) > MAX_TRACKS:
            self.tracks.popitem(last=False)
        return state

    def _find(self, state: Any, size: tuple[int, int]) -> Track:
        track = self.tracks.get(state) if isinstance(state, str) else None
        if track is None:
            raise InputError(
                "A state is not known here (any more); start the object anew on the frame before. An object goes on "
                f"from its last state alone, and the last {MAX_TRACKS} objects are kept until this function is started "
                "again."
            )
        if track.size != size:
            raise InputError(f"An object was tracked on frames of {track.size} pixels (height, width), got {size}.")
        return track

    @torch.inference_mode()
    def _step(self, tracks: Sequence[Track], image: np.ndarray) -> None:
        """Tracks objects on their next frame, for which the image is encoded once."""
        if not tracks:
            return
        pixel_values = self.processor(images=image, return_tensors="pt").pixel_values[0]
        features = None
        for one in tracks:
            one.frame += 1
            if features is not None:
                one.session.cache.cache_vision_features(one.frame, features)
            output = self.model(one.session, frame_idx=one.frame, frame=pixel_values)
            features = one.session.cache.get_vision_features(one.frame)
            check_masks(output, self.model.dtype)
            one.mask = self.processor.post_process_masks([output.pred_masks], [one.size])[0][0, 0].cpu().numpy()
        for one in tracks:  # the frame and its features would take more room than all memories
            one.session.processed_frames.clear()
            one.session.cache.clear_all()


# --- What requests hold


def read_image(body: dict) -> np.ndarray:
    """The image of a request, (H, W, 3) uint8."""
    try:
        encoded = base64.b64decode(body["image"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"`image` must be an image file in base64 ({error!r}).") from error
    image = np.array(read_pixels(encoded, "`image`"))  # its own memory, as PyTorch wants it
    if image.dtype != np.uint8:
        raise InputError("`image` has more than 8 bits per channel; CVAT sends such frames as JPEG or PNG of 8 bits.")
    return image


def numbers(body: dict, name: str, length: int) -> list[list[float]]:
    """A list of lists of so many finite numbers; nothing is an empty list."""
    values = body.get(name) or []
    if not isinstance(values, list) or not all(is_numbers(value) and len(value) == length for value in values):
        raise InputError(f"`{name}` must be a list of {length} numbers each, got {values!r:.80}.")
    return values


def is_numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def shape_prompt(shape: Any, size: tuple[int, int]) -> VideoPrompt:
    """The prompt that a shape of CVAT is, {"type", "points"}: a rectangle is a box, a polygon and a mask are masks."""
    kind, points = (shape.get("type"), shape.get("points")) if isinstance(shape, dict) else (None, None)
    if kind not in SHAPES or not is_numbers(points):
        raise InputError(f"A shape must be one of {', '.join(SHAPES)} with a list of numbers, got {shape!r:.80}.")
    if kind == "rectangle" and len(points) == 4:
        return VideoPrompt(1, box=tuple(points))
    if kind == "polygon" and len(points) >= 6 and len(points) % 2 == 0:
        return VideoPrompt(1, mask=_checked(draw(points, size), kind))
    if kind == "mask" and len(points) > 4:
        return VideoPrompt(1, mask=_checked(draw_mask(points, size), kind))
    raise InputError(f"A {kind} cannot have {len(points)} numbers.")


def draw_mask(points: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool of CVAT's: runs of background and object in turn, and the box that they fill by rows."""
    *runs, x0, y0, x1, y1 = (int(value) for value in points)
    is_inside = 0 <= x0 <= x1 < size[1] and 0 <= y0 <= y1 < size[0]
    if not is_inside or min(runs) < 0 or sum(runs) != (y1 - y0 + 1) * (x1 - x0 + 1) or len(runs) > sum(runs) + 1:
        raise InputError(
            f"A mask does not fit its box {[x0, y0, x1, y1]}, or the image of {size} pixels (height, width)."
        )
    return draw_runs(runs, x0, y0, x1 + 1 - x0, y1 + 1 - y0, size)


def _checked(mask: np.ndarray, kind: str) -> np.ndarray:
    if not mask.any():
        raise InputError(f"A {kind} covers no pixel of the image.")
    return mask
