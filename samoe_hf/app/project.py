"""A session as one file, which can be opened again: the video, its objects, prompts and masks.

A zip of `project.json`, the video's own files and `masks/<frame>.png`. One that comes from a page is hostile until all
of it was checked.
"""

import json
import math
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from samoe_hf.data.video_io import IMAGE_SUFFIXES, ImageFrames, SampleError, open_image
from samoe_hf.inference import VideoPrompt
from samoe_hf.model.weights_io import whole_file

from .archives import Archive, open_archive
from .limits import Limits
from .models import LoadedModel
from .session import TrackingSession
from .videos import VIDEO_SUFFIXES, OpenedVideo, hiding_paths, open_kept, safe_name

FORMAT, VERSION = "samoe project", 1
PROJECT, MASKS = "project.json", "masks"
MAX_JSON_BYTES = 4 * 2**20
MAX_ID = 255


def save_project(session: TrackingSession, folder: Path) -> Path:
    """Writes the project of a session into a folder; returns its file."""
    frames = session.video.frames
    files = frames.paths if isinstance(frames, ImageFrames) else [frames.path]  # type: ignore[attr-defined]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": session.video.name,
        "files": [path.name for path in files],
        "is_video": not isinstance(frames, ImageFrames),
        "model": session.model.name,
        "objects": session.objects,
        "last_id": session.last_id,
        "prompts": [
            {
                "object": prompt.object_id,
                "frame": prompt.frame_idx,
                "points": [list(point) for point in prompt.points],
                "labels": list(prompt.labels),
                "box": prompt.box and list(prompt.box),
            }
            for _, prompt in sorted(session.prompts.items())
        ],
        "masks": sorted(session.masks.frames),
    }
    target = folder / f"{session.video.name}_project.zip"
    with session.exclusive(), whole_file(target) as path, zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PROJECT, json.dumps(document, indent=1))
        for file in files:
            archive.write(file, f"video/{file.name}")
        for frame in document["masks"]:
            archive.write(session.masks.path(frame), f"{MASKS}/{frame:05d}.png")
    return target


def is_project(path: Path, limits: Limits) -> bool:
    """Whether a zip says that it is a project; SampleError if it is no zip that can be read."""
    with open_archive(path, limits) as archive:
        return PROJECT in archive.names


def open_project(
    path: Path, folder: Path, model: LoadedModel, device_lock: threading.Lock, limits: Limits
) -> TrackingSession:
    """Opens a project in an empty folder.

    Raises:
        SampleError: a damaged file, or one that is no project, or breaks a limit; says what is wrong. What was
            unpacked until then is left in the folder, under names of this app.
    """
    with hiding_paths(folder), open_archive(path, limits) as archive:
        document = _read_document(archive)
        objects, last_id = _objects(document, limits)
        prompts = [_prompt(entry, objects) for entry in _list(document, "prompts", limits.prompts)]
        video = _video(document, archive, folder, limits)
        for prompt in prompts:
            try:
                prompt.check(len(video.frames), video.frames.size)
            except ValueError as error:
                raise SampleError(f"The project's prompts do not fit its video: {error}") from error
        if len({(one.object_id, one.frame_idx) for one in prompts}) < len(prompts):
            raise SampleError("The project has two prompts for one object on one frame.")
        if sum(len(one.points) + (one.box is not None) for one in prompts) > limits.prompts:
            raise SampleError(f"The project has more than {limits.prompts} clicks and boxes.")
        session = TrackingSession(folder, video, model, device_lock, limits)
        session.restore_project(objects, prompts, last_id)
        for frame, id_map in _masks(document, archive, video, limits):
            session.masks.write(frame, id_map)
    return session


def _read_document(archive: Archive) -> dict[str, Any]:
    if PROJECT not in archive.names:
        raise SampleError(f"This zip is no project: it has no {PROJECT}.")
    try:
        document = json.loads(archive.read(PROJECT, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError(f"{PROJECT} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        raise SampleError(f"{PROJECT} is none of this app: `format` must be {FORMAT!r} and `version` {VERSION}.")
    return document


def _list(document: dict[str, Any], name: str, most: int) -> list[Any]:
    value = document.get(name)
    if not isinstance(value, list) or len(value) > most:
        raise SampleError(f"`{name}` of the project must be a list of at most {most}.")
    return value


def _integer(value: Any, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SampleError(f"`{name}` of the project must be an integer from {least} to {most}.")
    return value


def _objects(document: dict[str, Any], limits: Limits) -> tuple[list[int], int]:
    objects = [_integer(one, "objects", 1, MAX_ID) for one in _list(document, "objects", limits.objects)]
    if sorted(set(objects)) != sorted(objects):
        raise SampleError("`objects` of the project must be different.")
    return objects, _integer(document.get("last_id"), "last_id", max(objects, default=0), MAX_ID)


def _numbers(value: Any, name: str, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise SampleError(f"`{name}` of the project must hold {count} numbers.")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise SampleError(f"`{name}` of the project must hold finite numbers.")
    return tuple(float(number) for number in value)


def _prompt(entry: Any, objects: list[int]) -> VideoPrompt:
    if not isinstance(entry, dict):
        raise SampleError("`prompts` of the project must hold objects.")
    object_id = _integer(entry.get("object"), "object", 1, MAX_ID)
    if object_id not in objects:
        raise SampleError(f"The project prompts object {object_id}, which it does not have.")
    frame = _integer(entry.get("frame"), "frame", 0, 10**9)
    points = [_numbers(point, "points", 2) for point in _list(entry, "points", 10**4)]
    labels = [_integer(label, "labels", 0, 1) for label in _list(entry, "labels", 10**4)]
    box = None if entry.get("box") is None else _numbers(entry["box"], "box", 4)
    return VideoPrompt(object_id, frame, points, labels, box)  # type: ignore[arg-type]


def _video(document: dict[str, Any], archive: Archive, folder: Path, limits: Limits) -> OpenedVideo:
    """Unpacks the video's files under names of our own."""
    files = _list(document, "files", limits.frames)
    name, is_video = safe_name(str(document.get("name"))[:200]), document.get("is_video") is True
    suffixes = VIDEO_SUFFIXES if is_video else IMAGE_SUFFIXES
    if not files or (is_video and len(files) != 1):
        raise SampleError("`files` of the project must name one video, or its frames.")
    unpacked = []
    for number, file in enumerate(files):
        suffix = PurePosixPath(file).suffix.lower() if isinstance(file, str) else ""
        if suffix not in suffixes:
            raise SampleError(f"`files` of the project names {str(file)[:80]!r}, which is no video or image.")
        unpacked.append(folder / f"{number:05d}{suffix}")
        archive.unpack(f"video/{file}", unpacked[-1], limits.upload_bytes)
    return open_kept(name, unpacked[0] if is_video else folder, limits)


def _masks(
    document: dict[str, Any], archive: Archive, video: OpenedVideo, limits: Limits
) -> Iterator[tuple[int, np.ndarray]]:
    frames = [
        _integer(frame, "masks", 0, len(video.frames) - 1) for frame in _list(document, "masks", len(video.frames))
    ]
    most = 2 * video.frames.size[0] * video.frames.size[1] + 10_000  # a PNG of noise is hardly larger than its pixels
    for frame in frames:
        name = f"{MASKS}/{frame:05d}.png"
        content = archive.read(name, most)
        with open_image(content, name) as image:
            if (
                image.format != "PNG"
                or image.mode not in ("P", "L")
                or (image.height, image.width) != video.frames.size
            ):
                raise SampleError(f"{name} of the project is no map of ids of the video's size.")
            yield frame, np.asarray(image).astype(np.uint8)
