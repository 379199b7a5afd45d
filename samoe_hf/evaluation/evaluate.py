"""How well a model segments videos: semi-supervised tracking, from the first frame each object is seen on."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from samoe_hf.data.predictions import MaskFiles
from samoe_hf.data.schema import Video
from samoe_hf.errors import InputError
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.together import Together, Work, choose_videos_at_once, through
from samoe_hf.tracks import TrackRow
from samoe_hf.where_to_look import doubts
from samoe_hf.whole_files import whole_file

from .metrics import VideoScores, score_video, surface_dice
from .simulated_user import FIRST_SEED, PredictedFrame, PromptStrategy, SimulatedUser

SURFACE_TOLERANCE = 2.0  # mm

MaskWriter = Callable[[Video, int, np.ndarray], None]  # takes a video, a frame's index and its masks (N, H, W)


def segment_video(
    model: SamoeModel,
    processor: VideoProcessor,
    video: Video,
    prompt: str | PromptStrategy = "mask",
    domain: str | None = AUTO,
) -> tuple[np.ndarray, np.ndarray]:
    """Tracks all objects of a video, each prompted on the first annotated frame that shows it.

    For `prompt` see [`PromptStrategy`], for `domain` [`~samoe_hf.video_session.VideoSession`].

    Returns:
        masks (T, N, H, W) bool, in the order of `video.object_ids`, empty before an object was prompted and possibly
        overlapping; and object score logits (T, N), -inf before.
    """
    user = SimulatedUser(model, processor, video, PromptStrategy.parse(prompt), domain=domain)
    masks, scores = zip(*((frame.masks, frame.scores) for frame in user.track(overlapping=True)), strict=True)
    return np.stack(masks), np.stack(scores)


def video_key(video: Video | VideoResult) -> str:
    """Domain and id, unique among the videos of an evaluation."""
    return f"{video.domain}/{video.video_id}"


@dataclass
class VideoResult:
    """Scores of one video's annotated frames, and how they came about.

    Attributes:
        frames: indices of the annotated frames in the video.
        image_area: pixels of a frame.
        seconds: of prompting and tracking, with the decoding of frames; of frames that were tracked together with those
            of other videos an equal share of the time. NaN for masks that were read from files.
        prompts: what was given, in order: object_id, frame_idx, points, labels and box of each, and whether a mask.
        made_from: the fingerprint of the frames and masks that it was computed from.
        experts_of: of a model with domains, the one whose experts the video got, or "base".
        confidence: from 0 to 1, how sure the gate was, if it has decided.
        rivals: domains that the video looks like, where there are several, and how likely each is.
        unknown: "nearest" or "mix" where it is of no known domain and got experts nevertheless, see [`SamoeConfig`].
    """

    video_id: str
    domain: str
    scores: VideoScores
    frames: list[int]
    num_frames: int
    image_area: int
    seconds: float = float("nan")
    prompts: list[dict[str, Any]] = field(default_factory=list)
    made_from: str = ""
    experts_of: str | None = None
    confidence: float | None = None
    rivals: dict[str, float] | None = None
    unknown: str | None = None

    @property
    def key(self) -> str:
        return video_key(self)

    def save(self, path: Path) -> None:
        """Writes an `.npz`, which is there as a whole or not at all."""
        arrays = {f.name: getattr(self.scores, f.name) for f in fields(VideoScores)}
        described = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scores"}
        present = {name: value for name, value in arrays.items() if value is not None}
        with whole_file(path) as temporary:
            np.savez_compressed(temporary, described=json.dumps(described), **present)

    @classmethod
    def load(cls, path: Path) -> VideoResult:
        """Reads what [`save`](VideoResult.save) wrote; an `InputError` names a damaged file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            described = json.loads(str(arrays.pop("described")))
            object_ids = tuple(arrays.pop("object_ids").tolist())
            return cls(**described, scores=VideoScores(object_ids, **arrays))
        except (ValueError, KeyError, TypeError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise InputError(f"{path} holds no result of this version ({error}); delete it.") from error


class VideoScorer:
    """Scores a video's predicted frames one by one, as they come; `write` gets the masks of all."""

    def __init__(self, video: Video, surface_tolerance: float = SURFACE_TOLERANCE, write: MaskWriter | None = None):
        self.video, self.surface_tolerance, self.write = video, surface_tolerance, write
        self._annotated = set(video.annotated_frames)
        self._parts: list[VideoScores] = []
        self._packed: list[list[bytes]] = []  # of a volume, both masks of each object on a frame, which are large
        self._rows: list[TrackRow] = []

    def add(self, frame: PredictedFrame) -> None:
        """Scores one frame; annotated ones come in order."""
        video, (frame_idx, masks, scores, rows) = self.video, frame
        self._rows += rows
        if self.write is not None:
            self.write(video, frame_idx, masks)
        if frame_idx in self._annotated:
            target, ids = video.masks(frame_idx), video.object_ids
            self._parts.append(score_video(masks[None], target[None], ids, None if scores is None else scores[None]))
            if video.spacing is not None:
                pairs = zip(masks, target, strict=True)
                self._packed.append([zlib.compress(np.packbits(pair).tobytes(), 1) for pair in pairs])

    def result(self) -> VideoResult:
        """The scores of all frames; how long it took and what was given is not known here."""
        video, ids, frames = self.video, self.video.object_ids, list(self.video.annotated_frames)
        scores = VideoScores.concatenate(self._parts)
        if video.spacing is not None:
            surface = np.array([self._surface_dice(column) for column in range(len(ids))], dtype=float)
            scores = replace(scores, surface_dice=surface)
        if self._rows:
            known = [{(row.frame, row.object): row.iou for row in self._rows}]
            known.append({(look.frame, look.object): look.doubt for look in doubts(self._rows)})
            tables = [np.array([[one.get((t, i), math.nan) for i in ids] for t in frames]) for one in known]
            scores = replace(scores, iou_scores=tables[0], doubts=tables[1])
        return VideoResult(video.video_id, video.domain, scores, frames, len(video), math.prod(video.size))

    def _surface_dice(self, column: int) -> float:
        """That of one object, whose masks alone are unpacked."""
        shape, spacing = (2, *self.video.size), self.video.spacing
        assert spacing is not None
        packed = (np.frombuffer(zlib.decompress(frame[column]), np.uint8) for frame in self._packed)
        pairs = [np.unpackbits(bits, count=math.prod(shape)).reshape(shape).view(bool) for bits in packed]
        prediction, target = np.stack(pairs, axis=1)[:, :, None]
        return surface_dice(prediction, target, spacing[::-1], self.surface_tolerance)[0]


def score_predictions(
    video: Video, predictions: Iterable[PredictedFrame], surface_tolerance: float = SURFACE_TOLERANCE
) -> VideoResult:
    """Scores all frames of a video, see [`VideoScorer`]."""
    scorer = VideoScorer(video, surface_tolerance)
    for frame in predictions:
        scorer.add(frame)
    return scorer.result()


def evaluate_video(
    model: SamoeModel,
    processor: VideoProcessor,
    video: Video,
    domain: str | None = AUTO,
    write: MaskWriter | None = None,
) -> VideoResult:
    """Tracks a video's objects from their masks and scores them on its annotated frames; see [`evaluate_videos`].

    `write` takes the masks of each frame, such as [`MaskFiles.write`], in another thread.
    """
    with Together(model) as together:
        return next(together.run([evaluation_steps(together, processor, video, write=write, domain=domain)]))


def evaluation_steps(
    together: Together,
    processor: VideoProcessor,
    video: Video,
    prompt: str | PromptStrategy = "mask",
    seed: int = FIRST_SEED,
    overlapping: bool = False,
    surface_tolerance: float = SURFACE_TOLERANCE,
    write: MaskWriter | None = None,
    domain: str | None = AUTO,
) -> Work[VideoResult]:
    """The steps in which a video is tracked, and then its scores.

    Args:
        seed: of prompts that are drawn.
        overlapping: whether a pixel may belong to several objects, and not only to that of the largest logit.
        surface_tolerance: in mm, for volumes.
        write: takes the masks of each frame, in another thread.
    """
    check_annotated(video)
    scorer, writer = VideoScorer(video, surface_tolerance, write), together.writer()
    watched = replace(video, frames=together.read_ahead(video.frames))
    user = SimulatedUser(together.model, processor, watched, PromptStrategy.parse(prompt), seed, domain)
    seconds = yield from through(user.steps(overlapping), partial(writer, scorer.add))
    about = {"prompts": [asdict(given) | {"mask": given.mask is not None} for given in user.given]}
    if (decision := user.decision) is not None:
        about |= {"experts_of": decision.domain or "base", "confidence": decision.confidence, "rivals": decision.rivals}
        about["unknown"] = decision.unknown
    return writer(lambda: replace(scorer.result(), seconds=seconds, **about))


def evaluate_masks(video: Video, files: MaskFiles, surface_tolerance: float = SURFACE_TOLERANCE) -> VideoResult:
    """Scores masks that were written before, by whatever method; see [`MaskFiles`] for what is wrong with them.

    Raises:
        InputError: if they show none of the video's objects, and other values: their ids are other ones.
    """
    check_annotated(video)
    files.check(video, video.annotated_frames)
    frames = (PredictedFrame(frame, files.read(video, frame), None) for frame in video.annotated_frames)
    result = score_predictions(video, frames, surface_tolerance)
    is_empty = video.object_ids and not result.scores.prediction_area.any()
    if is_empty and (values := files.values(video, video.annotated_frames)):
        raise InputError(
            f"{files.folder}: the masks of {video.video_id} have the values {', '.join(map(str, values[:8]))}, and its "
            f"objects the ids {', '.join(map(str, video.object_ids[:8]))}, of which none is among them."
        )
    return result


def check_annotated(video: Video) -> None:
    """Refuses a video without annotated frames."""
    if not video.annotated_frames:
        raise InputError(f"{video.video_id}: no frame is annotated, so there is nothing to score.")


def results_by_key(results: Iterable[VideoResult]) -> dict[str, VideoResult]:
    """Results by [`VideoResult.key`], in their order; no two may have the same."""
    by_key: dict[str, VideoResult] = {}
    for result in results:
        if result.key in by_key:
            raise InputError(f"Two videos are called {result.key}; give their datasets different domains.")
        by_key[result.key] = result
    return by_key


def evaluate_videos(
    model: SamoeModel,
    processor: VideoProcessor,
    videos: Iterable[Video],
    show_progress_bar: bool = True,
    prompt: str | PromptStrategy = "mask",
    domain: str | None = AUTO,
    videos_at_once: int | None = 1,
) -> dict[str, VideoResult]:
    """Tracks videos with a model, and scores their annotated frames: [`VideoResult.key`] -> result.

    Where objects overlap, a pixel belongs to that of the largest logit. For `prompt` and `domain` see
    [`segment_video`]. Each video needs an annotated frame, and a domain and id of its own. So many as `videos_at_once`
    are tracked in one batch, see [`~samoe_hf.together.choose_videos_at_once`].
    """
    total, keys = len(videos) if isinstance(videos, Sized) else None, []
    with evaluation_mode(model), Together(model, choose_videos_at_once(model, videos_at_once)) as together:

        def works() -> Iterator[Work[VideoResult]]:
            for video in videos:
                keys.append(video_key(video))
                yield evaluation_steps(together, processor, video, prompt, domain=domain)

        with tqdm(together.run(works()), total=total, desc="evaluate", disable=not show_progress_bar) as results:
            by_key = results_by_key(results)
    return {key: by_key[key] for key in keys}  # in the order of the videos, not of their ends
