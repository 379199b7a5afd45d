"""A dataset and prompts -> masks of all its videos. Processes share the videos, and a stopped run can be continued."""

import csv
import json
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_type_hints

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from samoe_hf.data.annotations import Shapes, read_object_mask
from samoe_hf.data.fingerprints import fingerprint, frames_fingerprint
from samoe_hf.data.frames import ArrayFrames, check_inside, on_disk, one_form
from samoe_hf.data.images import image_paths
from samoe_hf.data.layouts import MaskFormat
from samoe_hf.data.options import check_options
from samoe_hf.data.own_videos import read_folders
from samoe_hf.data.predictions import MaskFiles
from samoe_hf.data.schema import Video, VideoList, named_entries, to_datasets
from samoe_hf.data.video_io import read_video
from samoe_hf.errors import InputError, input_errors
from samoe_hf.evaluation.run_folder import RunFolder
from samoe_hf.evaluation.simulated_user import prompt_from_mask
from samoe_hf.inference import TrackedFrame, VideoPrompt, check_prompts, evaluation_mode, masks_of, tracking_steps
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor
from samoe_hf.model.weights_io import sync
from samoe_hf.one_writer import is_first_process
from samoe_hf.together import Together, Work, choose_videos_at_once, through
from samoe_hf.tracks import ObjectScores, TrackRow, read_tracks, write_tracks
from samoe_hf.where_to_look import Look, where_to_look
from samoe_hf.whole_files import whole_file, write_text

FirstFramePrompt = Literal["mask", "box"]
# Where masks of a video are written until all of them are there.
UNFINISHED = ".unfinished"
LOOKS = "where_to_look.csv"


class PromptedVideo(NamedTuple):
    """A video by its domain and id, what opens it, and what then gives the prompts of its objects.

    `domain` is "" where the video cannot be opened. `about` gives what the prompts and the frames are made from, for
    `fingerprint`.
    """

    domain: str
    video_id: str
    open: Callable[[], Video]
    prompts: Callable[[Video], list[VideoPrompt]]
    about: Callable[[], Any]

    @property
    def key(self) -> str:
        """Unique among the videos of a run."""
        return f"{self.domain}/{self.video_id}".lstrip("/")

    @property
    def fingerprint(self) -> str:
        """A short hash of the prompts, their masks, and the video's frames, which are read for it."""
        with input_errors(self.video_id):
            return fingerprint(self.about())

    def read(self) -> tuple[Video, list[VideoPrompt]]:
        """The video and its prompts; an `InputError` names it where they do not fit, or one of both cannot be read."""
        with input_errors(self.video_id):
            video = self.open()
            prompts = self.prompts(video)
        try:
            check_prompts(prompts, len(video), video.size)
        except InputError as error:
            raise InputError(f"{self.video_id}: {error}") from error
        return video, prompts


@dataclass(frozen=True)
class FilePrompt:
    """An entry of a file of prompts: a [`~samoe_hf.inference.VideoPrompt`] of a video, whose mask is still a file."""

    video: str
    object: int = 1
    frame: int = 0
    points: list[tuple[float, float]] = field(default_factory=list)
    labels: list[Literal[0, 1]] | None = None
    box: tuple[float, float, float, float] | None = None
    mask: str | None = None
    end: bool = False

    def read(self, folder: Path) -> VideoPrompt:
        """The prompt, with its mask; `folder` is that of the file of prompts."""
        advice = "a prompt's mask is of its object alone"
        mask = None if self.mask is None else read_object_mask(on_disk(folder / self.mask), self.object, advice)
        labels = [1] * len(self.points) if self.labels is None else self.labels
        return VideoPrompt(self.object, self.frame, self.points, labels, self.box, mask, self.end)


# --- What to track


def from_first_frames(*parts: Sequence[Video], kind: FirstFramePrompt = "mask") -> list[PromptedVideo]:
    """Videos whose objects are prompted on the first frame that shows each, by its mask or the box around it.

    Videos without objects are left out, which is said. Those that cannot be read fail when they are labelled. None that
    is in RAM, as a volume, is kept. Two of one domain and id are an `InputError`.
    """
    prompted, empty = [], []
    for name, open_video in named_entries(*parts):
        domain = ""
        with suppress(InputError, FileNotFoundError):  # what opens them raises it again
            video = open_video()
            domain, name = video.domain, video.video_id
            if not isinstance(video.frames, ArrayFrames) and getattr(video.frames, "paths", True):
                open_video = partial(replace, video)  # of files, some of whose masks are known now
            if video.first_visible is None:
                empty.append(video.video_id)
                continue
        about = partial(_about_first, kind, open_video)
        prompted.append(PromptedVideo(domain, name, open_video, partial(_first_prompts, kind), about))
    if empty and is_first_process():
        print(f"{len(empty)} videos show no object and are left out, such as {empty[0]}.")
    _check_keys(prompted)
    return prompted


def _check_keys(videos: Sequence[PromptedVideo]) -> None:
    keys = Counter(video.key for video in videos)
    if (most := keys.most_common(1)) and most[0][1] > 1:
        raise InputError(f"Two videos are called {most[0][0]}.")


def _about_first(kind: FirstFramePrompt, open_video: Callable[[], Video]) -> Any:
    video = open_video()
    return _first_prompts(kind, video), frames_fingerprint(video.frames)


def _first_prompts(kind: FirstFramePrompt, video: Video) -> list[VideoPrompt]:
    prompts: dict[int, VideoPrompt] = {}
    for frame in video.annotated_frames:
        new = [object_id for object_id in video.visible(frame) if object_id not in prompts]
        for object_id, mask in zip(new, video.masks(frame, new) if new else [], strict=True):
            prompts[object_id] = prompt_from_mask(kind, object_id, frame, mask)
        if len(prompts) == len(video.object_ids):
            break
    return list(prompts.values())


def video_paths(root: str | Path) -> dict[str, Path]:
    """Video files, images of several pages, and folders with images, of a folder and all below it.

    Returns:
        Path within it without suffix -> path.

    Raises:
        InputError: if there is no such folder, it holds no video, or two of the same name.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder of videos")
    found: dict[str, Path] = {}
    for folder in read_folders(root):
        paths = [("/".join((*folder.parts, path.stem)), path) for path in (*folder.videos, *folder.stacks)]
        if len(folder.images) > len(folder.stacks) and folder.parts:
            paths.append(("/".join(folder.parts), root.joinpath(*folder.parts)))
        for name, path in paths:
            name = one_form(name)
            if name in found:
                raise InputError(f"{found[name]} and {path} are videos of the same name.")
            found[name] = path
    if not found:
        raise InputError(f"{root} holds neither video files nor folders of images.")
    return found


def from_prompt_file(path: str | Path, root: str | Path) -> list[PromptedVideo]:
    """The videos of a folder that a file has prompts for, see [`video_paths`] and [`read_prompts`].

    Raises:
        InputError: if the file names a video that is not there.
    """
    prompts, videos = read_prompts(path), video_paths(root)
    if missing := sorted(prompts.keys() - videos.keys()):
        known = ", ".join([*list(videos)[:5], "…"][: len(videos)])
        raise InputError(f"{path}: `video` {missing[0]!r} is not in {root}, which has {known}.")
    domain, folder = Path(root).resolve().name or "videos", Path(path).parent
    return [
        PromptedVideo(
            domain,
            name,
            partial(_open, domain, name, videos[name], {prompt.object for prompt in own}),
            lambda _, own=own: [prompt.read(folder) for prompt in own],
            partial(_about_files, own, folder, videos[name]),
        )
        for name, own in prompts.items()
    ]


def _about_files(prompts: Sequence[FilePrompt], folder: Path, video: Path) -> Any:
    masks = [on_disk(folder / prompt.mask) for prompt in prompts if prompt.mask is not None]
    frames = [video] if video.is_file() else image_paths(video)
    return prompts, masks, [frame.name for frame in frames], frames


def _open(domain: str, video_id: str, path: Path, object_ids: set[int]) -> Video:
    return Video(video_id, read_video(path), Shapes({}, object_ids), domain)


def read_prompts(path: str | Path) -> dict[str, list[FilePrompt]]:
    """Video id -> prompts of a JSON file, which holds a list, or of one with an object on each line (`.jsonl`).

    An entry has `video`, `object` (1 if not given), `frame` (0), and `points` with `labels` (1 each), a `box`, a `mask`
    (an image below the folder of the file, of the object alone: 0 and another value), or a true `end`: it is gone from
    there on.

    Raises:
        InputError: for anything else; names the file and the number of the entry.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        text = data.decode(json.detect_encoding(data))  # with a mark of it too, as Windows writes one
        lines = [line for line in text.splitlines() if line.strip()]
        entries = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path} must hold a list of prompts, each in braces, with at least one.")
    prompts: dict[str, list[FilePrompt]] = {}
    seen = set()
    for number, entry in enumerate(entries, start=1):
        owner = f"{path}: prompts, such as number {number},"
        try:
            check_options(FilePrompt, entry, owner)
        except OverflowError as error:  # of integers that no float can hold
            raise InputError(f"{owner} must have numbers that are positions: {error}") from error
        prompt = FilePrompt(**entry)
        if prompt.object < 1 or prompt.frame < 0:
            raise InputError(f"{owner} must have an `object` from 1 and a `frame` from 0 on.")
        if prompt.mask is not None:
            check_inside(prompt.mask, owner)
        video = one_form(prompt.video)
        if (video, prompt.object, prompt.frame) in seen:
            raise InputError(f"{owner} must be one for an object of {prompt.video!r} on a frame.")
        seen.add((video, prompt.object, prompt.frame))
        prompts.setdefault(video, []).append(prompt)
    return prompts


# --- Tracking


class LabelRun(RunFolder):
    """A folder of masks, of `tracks/<domain>/<video>.csv`, and of `finished/<domain>/<video>.json` for each video whose
    masks are there.

    A finished video stays as it is. So videos may be added, and prompts of unfinished ones changed.
    """

    kind = "labels"
    parts = ("labels.json", LOOKS, "finished", "masks", "tracks")

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], layout: MaskFormat):
        super().__init__(folder, {**identity, "layout": layout})
        self.layout: MaskFormat = layout

    def start(self, overwrite: bool = False) -> None:
        """Starts or continues the run, see [`~samoe_hf.evaluation.run_folder.RunFolder.start`].

        What killed processes left of unfinished videos is removed.
        """
        with self.writer:
            super().start(overwrite)
            if (self.folder / UNFINISHED).exists():
                if any((self.folder / UNFINISHED).iterdir()):
                    print(f"{self.folder}: removed the masks of videos that a stopped process had not finished.")
                shutil.rmtree(self.folder / UNFINISHED)

    def finished_path(self, video: PromptedVideo) -> Path:
        """The file that says that a video's masks are there; `InputError` for an id that leads out of the folder."""
        return self.inside(self.folder / "finished", f"{video.key}.json")

    def is_finished(self, video: PromptedVideo) -> bool:
        """Whether a video's masks are there, all that were written.

        Raises:
            InputError: if they came of other prompts, or of other frames.
        """
        path = self.finished_path(video)
        if not path.is_file():
            return False
        try:
            entry = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            print(f"{video.key} is labelled anew: {path} is damaged.")
            return False
        try:
            made_from = video.fingerprint
        except InputError:  # `label` raises it again
            return False
        if entry.get("prompts") != made_from:
            raise InputError(
                f"{self.folder} has {video.key} from other prompts or frames. Choose another `--output`, or replace "
                "all labels with `--overwrite`."
            )
        found, tracks = len(self.masks(video.domain).files(video.video_id)), self.tracks_path(video)
        is_whole = found == entry.get("masks")
        if not (is_whole and tracks.is_file()):
            lacking = f"{tracks} is missing" if is_whole else f"{found} of {entry.get('masks')} masks are there"
            print(f"{video.key} is labelled anew: {lacking}.")
        return is_whole and tracks.is_file()

    def tracks_path(self, video: PromptedVideo) -> Path:
        """The file of what tracking said of a video's objects, see [`~samoe_hf.tracks.write_tracks`]."""
        return self.inside(self.folder / "tracks", f"{video.key}.csv")

    def masks(self, domain: str) -> MaskFiles:
        """The files of the masks of a domain's videos."""
        return MaskFiles(self.inside(self.folder / "masks", domain), self.layout)

    def label(self, together: Together, processor: VideoProcessor, prompted: PromptedVideo) -> Work[PromptedVideo]:
        """The steps in which a video is tracked; its masks are written, all or none, its tracks, and whose experts it
        got."""
        files, writer = MaskFiles(self.folder / UNFINISHED / uuid.uuid4().hex, self.layout), together.writer()
        made_from, last, table = prompted.fingerprint, None, []

        def take(tracked: TrackedFrame) -> None:
            nonlocal last
            last = tracked._replace(logits=tracked.logits.float().cpu())
            writer(_write_frame, files, video, prompts, last, table)

        video, prompts = prompted.read()
        try:
            steps = tracking_steps(together.model, processor, together.read_ahead(video.frames), prompts)
            seconds = yield from through(steps, take)
            entry = {"frames": len(video), "objects": len(video.object_ids), "prompts": made_from}
            entry |= {"seconds": round(seconds, 3)}
            if last is not None and together.model.config.domains is not None:
                entry |= {"experts_of": last.domain or "base", "confidence": last.domain_confidence}
                entry |= {"rivals": last.domain_rivals, "unknown": last.domain_unknown}
            return writer(self._finish, prompted, video, files, table, entry)
        except (InputError, FileNotFoundError) as error:
            raise InputError(f"{video.video_id}: {error}") from error
        finally:
            writer.always(shutil.rmtree, files.folder, True)

    def _finish(
        self, prompted: PromptedVideo, video: Video, files: MaskFiles, table: list[TrackRow], entry: dict[str, Any]
    ) -> PromptedVideo:
        """Moves a video's masks to where they belong, and then says that it is finished."""
        num_masks, target = len(files.files(video.video_id)), self.masks(video.domain)
        written, place = (one.video_folder(video.video_id) for one in (files, target))
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():  # another video's folder lies within, or masks that are not finished
            self.finished_path(prompted).unlink(missing_ok=True)
            for earlier in target.files(video.video_id):
                earlier.unlink()
            shutil.copytree(written, place, copy_function=shutil.move, dirs_exist_ok=True)
        else:
            shutil.move(written, place)
        sync(place, below=True)  # the masks may lie on another disk
        sync(place.parent)
        with whole_file(self.tracks_path(prompted)) as path:
            write_tracks(path, table)
        entry |= {"masks": num_masks, "tracks": _summaries(table)}
        write_text(self.finished_path(prompted), json.dumps(entry))
        return prompted


def _write_frame(
    files: MaskFiles, video: Video, prompts: Sequence[VideoPrompt], tracked: TrackedFrame, table: list[TrackRow]
) -> None:
    """Writes the masks of a frame, and adds its rows to a table."""
    rows = [tracked.object_ids.index(object_id) for object_id in video.object_ids]
    masks = masks_of(tracked.logits.numpy()[rows], files.overlapping)
    files.write(video, tracked.frame_idx, masks)
    ordered = (masks[video.object_ids.index(object_id)] for object_id in tracked.object_ids)
    table += tracked.rows(ordered, video.frames.time(tracked.frame_idx), prompts)


def _summaries(table: Sequence[TrackRow]) -> dict[str, dict[str, float]]:
    """Of each object, how many frames show it, and the means of its scores on these."""
    summaries, seen_rows = {}, {row.object: list[TrackRow]() for row in table}
    for row in table:
        if row.seen:
            seen_rows[row.object].append(row)
    for object_id, seen in sorted(seen_rows.items()):
        means = {name: round(fmean(getattr(row, name) for row in seen), 4) for name in ObjectScores._fields if seen}
        summaries[str(object_id)] = {"frames": len(seen), **means}
    return summaries


def label_videos(
    model: SamoeModel,
    processor: VideoProcessor,
    videos: Sequence[PromptedVideo],
    run: LabelRun,
    state: PartialState,
    show_progress_bar: bool = True,
    videos_at_once: int | None = 1,
) -> dict[str, Any] | None:
    """Tracks the videos that are not finished, those of this process' share, and waits for the other processes.

    Videos that cannot be read, or whose prompts do not fit them, are left out, and named at the end.

    Processes started by `accelerate launch` or `torchrun` share the videos; all must see the folder.

    Args:
        run: was started.
        videos_at_once: so many are tracked in one batch, see [`~samoe_hf.together.choose_videos_at_once`].

    Returns:
        what `labels.json` says; None in processes other than the main one.

    Raises:
        InputError: if two videos have the same domain and id, or one was labelled from other prompts; in the main
            process also, after `labels.json` was written, if videos were left out.
    """
    failed: dict[str, str] = {}

    def attempt(video: PromptedVideo) -> Work[PromptedVideo]:
        try:
            return (yield from run.label(together, processor, video))
        except InputError as error:
            failed[video.key] = str(error)
            tqdm.write(f"{error}\nThis video is left out.", file=sys.stderr)
            return together.writer()(lambda: video)

    _check_keys(videos)
    with run.writer:
        run.check_same()
        own = videos[state.process_index :: state.num_processes]
        left = [video for video in own if not run.is_finished(video)]
        start, together = time.perf_counter(), Together(model, choose_videos_at_once(model, videos_at_once))
        is_shown = show_progress_bar and bool(left)
        with (
            evaluation_mode(model),
            together,
            tqdm(total=len(left), desc="label", unit="video", disable=not is_shown) as progress,
        ):
            for video in together.run(map(attempt, left)):
                progress.set_postfix_str(video.video_id)
                progress.update()
        failed = {key: words for part in gather_object([failed]) for key, words in part.items()}
        num_new = sum(gather_object([len(left)])) - len(failed)  # when all are done
        if not state.is_main_process:
            return None
        shutil.rmtree(run.folder / UNFINISHED, ignore_errors=True)
        seconds = time.perf_counter() - start
        finished = [video for video in videos if video.key not in failed]
        entries = {video.key: json.loads(run.finished_path(video).read_text(encoding="utf-8")) for video in finished}
        summary = {
            "videos": entries,
            "failed": failed,
            "num_frames": sum(entry["frames"] for entry in entries.values()),
            "num_objects": sum(entry["objects"] for entry in entries.values()),
            "num_processes": state.num_processes,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
            "labelled_now": num_new,
            "videos_at_once": together.at_once,
            "seconds": round(seconds, 3),
            "videos_per_hour": num_new / seconds * 3600 if num_new else None,
            "worth_a_look": _write_looks(finished, run),
        }
        write_text(run.folder / "labels.json", json.dumps(summary, indent=2))
        if failed:
            raise InputError(
                f"{len(failed)} of {len(videos)} videos are not labelled; the same command tries them again: "
                + "; ".join(failed.values())
            )
        return summary


def _write_looks(videos: Sequence[PromptedVideo], run: LabelRun) -> int:
    """Writes the frames that are worth a look, those of all videos in one order, and gives their number."""
    looks = [(video.key, look) for video in videos for look in where_to_look(read_tracks(run.tracks_path(video)))]
    looks.sort(key=lambda pair: -pair[1].settles)
    with whole_file(run.folder / LOOKS) as path, path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", *Look._fields), *((key, *look) for key, look in looks)])
    return len(looks)


def labelled_videos(run: LabelRun, videos: Sequence[PromptedVideo]) -> VideoList:
    """The finished videos with the masks that were written for all their frames, opened when they are asked for."""

    def open_labelled(_: str, prompted: PromptedVideo) -> Video:
        video = prompted.open()
        return replace(video, annotations=run.masks(video.domain).annotations(video))

    return VideoList({video.key: video for video in videos}, open_labelled)


def labelled_dataset(run: LabelRun, videos: Sequence[PromptedVideo]) -> datasets.Dataset:
    """The finished videos as [`~samoe_hf.data.schema.to_datasets`] makes them, with a column `tracks`.

    It holds the rows of a video's [`~samoe_hf.tracks.TrackRow`] table: scores and place of each object on each frame.
    """
    kinds = {int: "int64", int | None: "int64", bool: "bool"}
    columns = {name: datasets.Value(kinds.get(kind, "float64")) for name, kind in get_type_hints(TrackRow).items()}
    tracks = [[row._asdict() for row in read_tracks(run.tracks_path(video))] for video in videos]
    dataset = to_datasets(labelled_videos(run, videos))
    return dataset.add_column("tracks", tracks, feature=datasets.List(columns))  # pyright: ignore[reportArgumentType]
