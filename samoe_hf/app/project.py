"""A session as one file, which can be opened again: the video, its objects, prompts and masks.

A zip of `project.json`, the video's own files and `masks/<frame>.png`. One that comes from a page is hostile until all
of it was checked.
"""

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from samoe_hf.data.frames import SampleError, named_errors
from samoe_hf.data.image_files import open_image
from samoe_hf.inference import VideoPrompt, check_prompts
from samoe_hf.tracks import TrackRow
from samoe_hf.whole_files import whole_file

from .models import LoadedModel
from .session import MAX_ID, ROWS, TrackingSession
from .uploads import Archive, Limits, open_archive, open_files, safe_name

FORMAT, VERSION = "samoe project", 1
PROJECT, MASKS = "project.json", "masks"
FRAME_BYTES, PROMPT_BYTES = 100, 1000  # of the JSON, for each frame and each click


def save_project(session: TrackingSession, folder: Path) -> Path:
    """Writes the project of a session, which is to be exclusive meanwhile, into a folder; returns its file."""
    video = session.video
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": video.name,
        "files": [path.name for path in video.files],
        "objects": session.objects,
        "last_id": session.last_id,
        "prompts": [asdict(prompt) for _, prompt in sorted(session.prompts.items())],
        "masks": sorted(session.masks.frames),
    }
    target = folder / f"{video.name}_project.zip"
    with whole_file(target) as path, zipfile.ZipFile(path, "w") as archive:
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
    """Opens a project in an empty folder; InputError if it is damaged, no project, or breaks a limit."""
    with open_archive(path, limits) as archive:
        content = archive.read(PROJECT, FRAME_BYTES * limits.frames + PROMPT_BYTES * limits.prompts)
        try:
            parsed = json.loads(content)
            if (parsed["format"], parsed["version"]) != (FORMAT, VERSION):
                raise ValueError(f"`format` must be {FORMAT!r} and `version` {VERSION}")
            name, files = safe_name(str(parsed["name"])[:200]), [str(one) for one in parsed["files"]]
            objects, last_id = [int(one) for one in parsed["objects"]], int(parsed["last_id"])
            prompts = [_prompt(entry) for entry in parsed["prompts"]]
            masks = {int(frame) for frame in parsed["masks"]}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise SampleError(f"{PROJECT} is none of this app ({type(error).__name__}: {error})") from error
        known = set(objects)
        if len(known) < len(objects) or last_id > MAX_ID or not all(0 < one <= last_id for one in objects):
            raise SampleError(f"The objects of the project must be different, and from 1 to {min(last_id, MAX_ID)}.")
        if not known.issuperset(prompt.object_id for prompt in prompts):
            raise SampleError("The project prompts objects that it does not have.")
        if len(set(files)) < len(files):
            raise SampleError("The project names a file of its video twice.")
        if len(objects) > limits.objects or len(files) > limits.frames:
            raise SampleError(f"The project has more than {limits.objects} objects, or {limits.frames} frames.")
        if sum(len(one.points) + (one.box is not None) for one in prompts) > limits.prompts:
            raise SampleError(f"The project has more than {limits.prompts} clicks and boxes.")
        video = open_files(name, files, lambda one, target: archive.unpack(f"video/{one}", target), folder, limits)
        if prompts:
            check_prompts(prompts, len(video.frames), video.frames.size)
        session = TrackingSession(folder, video, loaded, limits)
        session.restore(objects, prompts, last_id)
        for frame in masks:
            if not 0 <= frame < session.num_frames:
                raise SampleError(f"The project has a mask of frame {frame}, which its video does not have.")
            name = f"{MASKS}/{frame:05d}.png"
            id_map, text = _read_mask(archive, name, video.frames.size)
            with named_errors(name, "has wrong scores", (ValueError, TypeError, OverflowError, RecursionError)):
                rows = {row.object: row for row in (TrackRow(*entry) for entry in json.loads(text))}
                ids = sorted(known.intersection(rows))
                scores = {one: [float(value) for value in rows[one][3:6]] for one in ids}
                if not all(0 <= value <= 1 for three in scores.values() for value in three):
                    raise ValueError("a score is not from 0 to 1")
            session.masks.write(frame, id_map, scores)
    return session


def _prompt(entry: Any) -> VideoPrompt:
    points, labels = [(float(x), float(y)) for x, y in entry["points"]], [int(one) for one in entry["labels"]]
    prompt = VideoPrompt(int(entry["object_id"]), int(entry["frame_idx"]), points, labels)
    if entry["box"] is not None:
        x0, y0, x1, y1 = (float(value) for value in entry["box"])
        prompt.box = (x0, y0, x1, y1)
    prompt.end = bool(entry.get("end"))
    return prompt


def _read_mask(archive: Archive, name: str, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """A map of ids, and the text that has its rows; what it says is still to be checked."""
    content = archive.read(name, 2 * size[0] * size[1] + 10_000)  # a PNG of noise is hardly larger than its pixels
    with open_image(content, name) as image:
        if image.format != "PNG" or image.mode not in ("P", "L") or (image.height, image.width) != size:
            raise SampleError(f"{name} of the project is no map of ids of the video's size.")
        return np.asarray(image).astype(np.uint8), image.info.get(ROWS, "[]")
