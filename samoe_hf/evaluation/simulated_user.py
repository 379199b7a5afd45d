"""A simulated user: what is given of a video's objects, on which frames, and the masks that a model makes of it."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, check_masks, masks_of
from samoe_hf.model.domain_choice import AUTO, DomainDecision, session_domain
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.model.prompt_recipe import bounding_boxes
from samoe_hf.model.prompts import NEGATIVE, POSITIVE
from samoe_hf.model.tracking import Steps, TrackingStep, run_alone
from samoe_hf.together import through
from samoe_hf.tracks import ObjectScores, TrackRow, track_rows
from samoe_hf.video_session import KEPT_FRAMES, VideoSession
from samoe_hf.where_to_look import where_to_look

T = TypeVar("T")
Asking = Generator[TrackingStep, None, T]  # steps that are to be run, and then what came of them
FIRST_SEED = 42  # the original evaluation's
PAUSE_IOU = 0.75  # the user corrects an object whose IoU is below this (arXiv:2408.00714, section 6.1)

_SYNTAX = re.compile(r"(mask|box|point|clicks)(?::([1-9]\d*))?(?:@([1-9]\d*)(?::(offline|look|even))?)?", re.ASCII)


@dataclass(frozen=True)
class PromptStrategy:
    """How an evaluation prompts: what it gives of each object, first on the first annotated frame that shows it.

    Written as text (see [`parse`](PromptStrategy.parse)):
    - "mask": its mask. "box": the bounding box of its mask.
    - "point" or "point:N": N positive points drawn evenly from its mask; the only prompt that depends on a seed.
    - "clicks:N": N clicks, one after the other, each on the centre of the largest error so far.
    - "clicks:N@M": online, in one pass: another N clicks where the IoU falls below 0.75, on up to M frames in all.
    - "clicks:N@M:offline": in M passes: each but the first begins with N clicks on the frame of the lowest IoU.
    - "clicks:N@M:look", "mask@M:look", "box@M:look": in two passes: the second begins with the same of each object
      whose IoU is below 0.75 on the M - 1 frames of the first that are most worth a look, see
      [`~samoe_hf.where_to_look`].
    - "clicks:N@M:even", "mask@M:even", "box@M:even": the same on frames at even distances.

    The first three interactive ones follow SAM 2's evaluation (arXiv:2408.00714, section 6.1 and appendix F.1), for
    each object on its own; `count` N is 3 and `num_frames` M up to 8 there.
    """

    kind: str
    count: int = 1
    num_frames: int = 1
    corrections: str = "online"

    @classmethod
    def parse(cls, text: str | PromptStrategy) -> PromptStrategy:
        """Reads a strategy's text; an `InputError` says what there is."""
        if isinstance(text, PromptStrategy):
            return text
        match = _SYNTAX.fullmatch(text)
        kind, count, frames, corrections = match.groups() if match else [""] * 4
        is_known = {"": False, "point": not frames, "clicks": bool(count)}
        if not is_known.get(kind, not count and (not frames or corrections in ("look", "even"))):
            raise InputError(
                "`prompt` must be mask, box, point, point:N, clicks:N, clicks:N@M or clicks:N@M:offline, or one of "
                f"mask@M, box@M and clicks:N@M with :look or :even, N and M from 1 on, got {text!r}."
            )
        num_frames = int(frames or 1)
        return cls(kind, int(count or 1), num_frames, corrections if corrections and num_frames > 1 else "online")

    def __str__(self) -> str:
        count = "" if self.kind in ("mask", "box") else f":{self.count}"
        frames = f"@{self.num_frames}" if self.num_frames > 1 else ""
        return f"{self.kind}{count}{frames}{'' if self.is_online else f':{self.corrections}'}"

    @property
    def is_online(self) -> bool:
        """Whether nothing is given on a frame once the video has gone on."""
        return self.corrections == "online"

    @property
    def is_random(self) -> bool:
        """Whether another seed gives other prompts."""
        return self.kind == "point"


def click_on_error(target: np.ndarray, prediction: np.ndarray) -> tuple[tuple[float, float], int] | None:
    """The click of a user who sees a prediction: in the middle of what is missed or of what is too much.

    The point (x, y) farthest from the border of its error region, as in `sam2`'s `sample_one_point_from_error_center`,
    and label 1 on a missed region or 0 on the background; None where nothing is wrong. Masks are (H, W) bool.
    """
    # Distance to the nearest pixel outside of the region, or of the image.
    missed, added = (
        np.asarray(distance_transform_edt(np.pad(region, 1)))[1:-1, 1:-1]
        for region in (target & ~prediction, prediction & ~target)
    )
    if missed.max(initial=0) == added.max(initial=0) == 0:
        return None
    label, depth = (POSITIVE, missed) if missed.max() > added.max() else (NEGATIVE, added)
    y, x = divmod(int(depth.argmax()), depth.shape[1])
    return (float(x), float(y)), label


def sample_points(mask: np.ndarray, count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """`count` different pixels (x, y) of a mask (H, W) that has any, drawn evenly; all of them where it has fewer."""
    pixels = np.flatnonzero(mask)
    chosen = rng.choice(pixels, min(count, len(pixels)), replace=False)
    return [(float(i % mask.shape[1]), float(i // mask.shape[1])) for i in chosen]


class PredictedFrame(NamedTuple):
    """Masks of one frame (N, H, W) bool, and the logits that each object is visible (N,), in a video's order of ids.

    Of an object that has not been prompted yet the mask is empty and the logit -inf. Masks of files have no logits.
    `rows`: of the objects that have been prompted, where a model has tracked them.
    """

    frame_idx: int
    masks: np.ndarray
    scores: np.ndarray | None
    rows: Sequence[TrackRow] = ()


class _Reading(NamedTuple):
    """What a model gives on a frame: logits (N, H, W), logits of visibility (N,), and scores of the objects `known`."""

    frame_idx: int
    logits: np.ndarray
    scores: np.ndarray
    known: Sequence[int] = ()
    sure: ObjectScores = ObjectScores(*np.zeros((3, 0)))


def prompt_from_mask(kind: str, object_id: int, frame_idx: int, mask: np.ndarray) -> VideoPrompt:
    """The prompt of a "mask" (H, W) bool, or of the "box" around it; of another kind, without anything given yet."""
    prompt = VideoPrompt(object_id, frame_idx, mask=mask if kind == "mask" else None)
    if kind == "box":
        x0, y0, x1, y1 = bounding_boxes(torch.from_numpy(mask)[None])[0].tolist()
        prompt.box = (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))  # also of a line of pixels, which an empty box is not
    return prompt


class SimulatedUser:
    """A model, a video, and a user who prompts and corrects the model; `given` has all prompts so far, in order.

    Points that are drawn depend on the seed, the video's id and the object's id alone.
    """

    def __init__(
        self,
        model: SamoeModel,
        processor: VideoProcessor,
        video: Video,
        strategy: PromptStrategy,
        seed: int = FIRST_SEED,
        domain: str | None = AUTO,
    ):
        self.model, self.processor, self.video, self.strategy, self.seed = model, processor, video, strategy, seed
        self.given: list[VideoPrompt] = []
        self._session = VideoSession(
            video.frames,
            processor,
            # Offline, any frame may be corrected after a pass over all.
            keep_frames=max(KEPT_FRAMES, 0 if strategy.is_online else len(video)),
            # All prompted frames stay in memory (arXiv:2408.00714, section 4), as in training.
            corrections_condition=True,
            domain=domain,
            inference_device=model.device,
            # All frames of a long video may be more than a GPU holds.
            inference_state_device=None if strategy.is_online else "cpu",
            dtype=model.dtype,
        )
        self._object_ids = video.object_ids
        self._annotated = set(video.annotated_frames)
        self._frames: dict[int, list[int]] = {}  # object id -> frames on which it was prompted

    @property
    def decision(self) -> DomainDecision | None:
        """Whose experts the video got; None of a model without domains, and before anything was tracked."""
        return None if self.model.config.domains is None else session_domain(self.model, self._session)

    def track(self, overlapping: bool = False) -> Iterator[PredictedFrame]:
        """Prompts, tracks and corrects; yields each frame once, in order, when its masks are final."""
        return run_alone(self.model, self.steps(overlapping))

    def steps(self, overlapping: bool = False) -> Steps[PredictedFrame]:
        """What [`track`] does, in steps that can be run with those of other videos; see [`SamoeModel.frame_steps`]."""
        if self.strategy.corrections == "offline":
            for _ in range(self.strategy.num_frames - 1):
                yield from self._correct_worst_frames()
        elif not self.strategy.is_online:
            yield from self._correct_some_frames()
        for reading in self._pass():
            if isinstance(reading, TrackingStep):
                yield reading
                continue
            masks = masks_of(reading.logits, overlapping)
            yield PredictedFrame(reading.frame_idx, masks, reading.scores, self._rows(reading, masks))

    def _rows(self, reading: _Reading, masks: np.ndarray) -> list[TrackRow]:
        frame_idx = reading.frame_idx
        given = [object_id for object_id, frames in self._frames.items() if frame_idx in frames]
        known = (masks[self._object_ids.index(object_id)] for object_id in reading.known)
        return track_rows(frame_idx, reading.known, reading.sure, known, self.video.frames.time(frame_idx), given)

    def _pass(self) -> Steps[_Reading]:
        """What the model gives on each frame, after what the user gives on it."""
        if self.given:  # offline; nothing more is given before the end
            for output in self.model.steps_from_prompts(self._session, 0):
                if isinstance(output, TrackingStep):
                    yield output
                else:
                    assert output.frame_idx is not None
                    yield self._read(output.frame_idx, output)
            return
        for frame_idx in range(len(self.video)):
            yield (yield from self._track_frame(frame_idx))

    def _track_frame(self, frame_idx: int) -> Asking[_Reading]:
        strategy, annotated = self.strategy, frame_idx in self._annotated
        visible = self.video.visible(frame_idx) if annotated else []
        new = [object_id for object_id in visible if object_id not in self._frames]
        if new and strategy.kind != "clicks":
            self._prompt(frame_idx, new)
        reading = yield from self._ask(frame_idx)
        if annotated and strategy.kind == "clicks":
            ious = self._ious(frame_idx, reading.logits) if strategy.num_frames > 1 and strategy.is_online else {}
            wrong = [object_id for object_id, iou in ious.items() if iou < PAUSE_IOU]
            clicked = yield from self._click(frame_idx, {i: self._mask(reading.logits, i) for i in [*new, *wrong]})
            return clicked or reading
        return reading

    def _ask(self, frame_idx: int) -> Asking[_Reading]:
        """What the model gives on a frame."""
        output = None
        for output in self.model.frame_steps(self._session, frame_idx) if self.given else ():
            if isinstance(output, TrackingStep):
                yield output
        return self._read(frame_idx, output)

    def _prompt(self, frame_idx: int, object_ids: list[int]) -> None:
        for object_id, mask in zip(object_ids, self.video.masks(frame_idx, object_ids), strict=True):
            prompt = prompt_from_mask(self.strategy.kind, object_id, frame_idx, mask)
            if self.strategy.kind == "point":
                rng = np.random.default_rng([self.seed, crc32(self.video.video_id.encode()), object_id])
                prompt.points = sample_points(mask, self.strategy.count, rng)
                prompt.labels = [POSITIVE] * len(prompt.points)
            self._add_prompt(prompt)

    def _add_prompt(self, prompt: VideoPrompt, **options: Any) -> None:
        frames = self._frames.setdefault(prompt.object_id, [])
        if prompt.frame_idx not in frames:
            frames.append(prompt.frame_idx)
        prompt.add_to(self._session, self.processor, **options)
        self.given.append(prompt)

    def _read(self, frame_idx: int, output: Any) -> _Reading:
        """What an output says; logits and scores of objects that are prompted later are -inf."""
        logits = np.full((len(self._object_ids), *self.video.size), -np.inf, dtype=np.float32)
        scores = np.full(len(self._object_ids), -np.inf, dtype=np.float32)
        if output is None:
            return _Reading(frame_idx, logits, scores)
        check_masks(output, self.model.dtype, f"{self.video.video_id}: ")
        masks = self.processor.post_process_masks([output.pred_masks], [self.video.size], binarize=False)[0][:, 0]
        rows = [row for row, i in enumerate(output.object_ids) if self._frames[i][0] <= frame_idx]
        known = [output.object_ids[row] for row in rows]
        places = [self._object_ids.index(object_id) for object_id in known]
        logits[places] = masks[rows].float().cpu().numpy()
        scores[places] = output.object_score_logits[rows, 0].float().cpu().numpy()
        sure = ObjectScores(*(values[rows] for values in ObjectScores.of(output)))
        return _Reading(frame_idx, logits, scores, known, sure)

    def _mask(self, logits: np.ndarray, object_id: int) -> np.ndarray:
        return logits[self._object_ids.index(object_id)] > 0

    def _click(self, frame_idx: int, masks: dict[int, np.ndarray]) -> Asking[_Reading | None]:
        """Gives up to `count` clicks for each object, from its mask, and predicts again; None where all is right."""
        result, targets = None, self.video.masks(frame_idx, list(masks)) if masks else ()
        for _ in range(self.strategy.count):
            found = zip(masks, map(click_on_error, targets, masks.values()), strict=True)
            clicks = [(object_id, *click) for object_id, click in found if click is not None]
            if not clicks:
                break  # the model would track the frame anew
            for object_id, point, label in clicks:
                prompt = VideoPrompt(object_id, frame_idx, points=[point], labels=[label])
                self._add_prompt(prompt, clear_old_inputs=False)
            result = yield from self._ask(frame_idx)
            masks = {object_id: self._mask(result.logits, object_id) for object_id in masks}
        return result

    def _ious(self, frame_idx: int, logits: np.ndarray) -> dict[int, float]:
        """IoU of the objects that may be corrected on this frame: prompted on another, and on fewer than all."""
        free = [i for i, t in self._frames.items() if frame_idx not in t and len(t) < self.strategy.num_frames]
        ious = {}
        for object_id, target in zip(free, self.video.masks(frame_idx, free) if free else [], strict=True):
            prediction = self._mask(logits, object_id)
            union = (prediction | target).sum()
            ious[object_id] = float((prediction & target).sum() / union) if union else 1.0
        return ious

    def _correct_worst_frames(self) -> Asking[None]:
        """Tracks the whole video, and then clicks on the frame on which each object's IoU is lowest."""
        worst: dict[int, tuple[float, int, np.ndarray]] = {}

        def look(reading: _Reading) -> None:
            frame_idx = reading.frame_idx
            for object_id, iou in self._ious(frame_idx, reading.logits).items() if frame_idx in self._annotated else ():
                if iou < worst.get(object_id, (1.0,))[0]:
                    worst[object_id] = iou, frame_idx, self._mask(reading.logits, object_id)

        yield from through(self._pass(), look)
        for object_id, (_, frame_idx, mask) in worst.items():
            yield from self._click(frame_idx, {object_id: mask})

    def _correct_some_frames(self) -> Asking[None]:
        """Tracks the whole video, and then corrects what is wrong on frames that are worth a look, or on even ones."""
        rows, annotated = [], np.array(self.video.annotated_frames)
        yield from through(self._pass(), lambda reading: rows.extend(self._rows(reading, reading.logits > 0)))
        count = self.strategy.num_frames - 1
        if not rows:  # nothing was prompted
            return
        if self.strategy.corrections == "look":
            chosen = [look.frame for look in where_to_look(rows, count, least=0)]
        else:
            chosen = np.linspace(min(row.frame for row in rows), len(self.video) - 1, count + 2)[1:-1]
        for frame_idx in dict.fromkeys(int(annotated[np.abs(annotated - t).argmin()]) for t in chosen):
            tracked = self.model.steps_from_prompts(self._session, frame_idx)
            while isinstance(output := next(tracked), TrackingStep):
                yield output
            logits = self._read(frame_idx, output).logits
            wrong = [object_id for object_id, iou in self._ious(frame_idx, logits).items() if iou < PAUSE_IOU]
            if self.strategy.kind == "clicks":
                yield from self._click(frame_idx, {object_id: self._mask(logits, object_id) for object_id in wrong})
            else:
                seen = self.video.visible(frame_idx)  # there is no box around nothing
                self._prompt(frame_idx, [i for i in wrong if i in seen or self.strategy.kind == "mask"])
