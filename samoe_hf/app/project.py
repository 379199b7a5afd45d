"""A session as one file, which can be opened again: the video, its objects, prompts and masks.

A zip of `project.json`, the video's own files and `masks/<frame>.png`. One that comes from a page is hostile until all
of it was checked.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samoe_hf.data.video_io import SampleError, open_image
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt, check_prompts
from samoe_hf.model.weights_io import whole_file

from .models import LoadedModel
from .session import MAX_ID, TrackingSession
from .uploads import Archive, Limits, open_archive, open_files, safe_name

FORMAT, VERSION = "samoe project", 1
PROJECT, MASKS = "project.json", "masks"
MAX_JSON_BYTES = 4 * 2**20


def save_project(session: TrackingSession, folder: Path) -> Path:
    """Writes the project of a session into a folder; returns its file."""
    video = session.video
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": video.name,
        "files": [path.name for path in video.files],
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
    target = folder / f"{video.name}_project.zip"
    with session.exclusive(), whole_file(target) as path, zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PROJECT, json.dumps(document, indent=1))
        for file in video.files:
            archive.write(file, f"video/{file.name}")
        for frame in session.masks.frames:
            archive.write(session.masks.path(frame), f"{MASKS}/{frame:05d}.png")
    return target


def is_project(path: Path, limits: Limits) -> bool:
    """Whether a zip says that it is a project; SampleError if it is no zip that can be read."""
    with open_archive(path, limits) as archive:
        return PROJECT in archive.entries


def open_project(path: Path, folder: Path, loaded: LoadedModel, limits: Limits) -> TrackingSession:
    """Opens a project in an empty folder.

    Raises:
        SampleError: a damaged file, or one that is no project, or breaks a limit; says what is wrong. What was
            unpacked until then is left in the folder, under names of this app.
    """
    with open_archive(path, limits) as archive:
        known = _read_document(archive, limits)
        video = open_files(
            known.name, known.files, lambda name, target: archive.unpack(f"video/{name}", target), folder, limits
        )
        try:
            if known.prompts:
                check_prompts(known.prompts, len(video.frames), video.frames.size)
        except InputError as error:
            raise SampleError(f"The project's prompts do not fit its video: {error}") from error
        session = TrackingSession(folder, video, loaded, limits)
        session.restore(known.objects, known.prompts, known.last_id)
        for frame in known.masks:
            if not 0 <= frame < session.num_frames:
                raise SampleError(f"The project has a mask of frame {frame}, which its video does not have.")
            session.masks.write(frame, _read_mask(archive, f"{MASKS}/{frame:05d}.png", video.frames.size))
    return session


@dataclass
class Document:
    """What `project.json` says, once it was checked as far as it can be without the video."""

    name: str
    files: list[str]
    objects: list[int]
    last_id: int
    prompts: list[VideoPrompt]
    masks: list[int]


def _read_document(archive: Archive, limits: Limits) -> Document:
    content = archive.read(PROJECT, MAX_JSON_BYTES)
    try:
        parsed = json.loads(content)
        if (parsed["format"], parsed["version"]) != (FORMAT, VERSION):
            raise ValueError(f"`format` must be {FORMAT!r} and `version` {VERSION}")
        known = Document(
            name=safe_name(str(parsed["name"])[:200]),
            files=[str(name) for name in parsed["files"]],
            objects=[int(one) for one in parsed["objects"]],
            last_id=int(parsed["last_id"]),
            prompts=[_prompt(entry) for entry in parsed["prompts"]],
            masks=sorted({int(frame) for frame in parsed["masks"]}),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise SampleError(f"{PROJECT} is none of this app ({type(error).__name__}: {error})") from error
    objects, last_id = set(known.objects), known.last_id
    if len(objects) < len(known.objects) or last_id > MAX_ID or not all(0 < one <= last_id for one in objects):
        raise SampleError(f"The objects of the project must be different, and from 1 to {min(last_id, MAX_ID)}.")
    if not objects.issuperset(prompt.object_id for prompt in known.prompts):
        raise SampleError("The project prompts objects that it does not have.")
    if len(objects) > limits.objects or len(known.files) > limits.frames:
        raise SampleError(f"The project has more than {limits.objects} objects, or {limits.frames} frames.")
    if sum(len(one.points) + (one.box is not None) for one in known.prompts) > limits.prompts:
        raise SampleError(f"The project has more than {limits.prompts} clicks and boxes.")
    return known


def _prompt(entry: Any) -> VideoPrompt:
    points = [(float(x), float(y)) for x, y in entry["points"]]
    prompt = VideoPrompt(int(entry["object"]), int(entry["frame"]), points, [int(one) for one in entry["labels"]])
    if entry["box"] is not None:
        x0, y0, x1, y1 = (float(value) for value in entry["box"])
        prompt.box = (x0, y0, x1, y1)
    return prompt


def _read_mask(archive: Archive, name: str, size: tuple[int, int]) -> np.ndarray:
    content = archive.read(name, 2 * size[0] * size[1] + 10_000)  # a PNG of noise is hardly larger than its pixels
    with open_image(content, name) as image:
        if image.format != "PNG" or image.mode not in ("P", "L") or (image.height, image.width) != size:
            raise SampleError(f"{name} of the project is no map of ids of the video's size.")
        return np.asarray(image).astype(np.uint8)
