"""What a person takes away: masks as PNGs, COCO's encodings or for label tools, an overlay video, and scores.

Each export raises an InputError if nothing was tracked. The session is to be exclusive meanwhile.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from samoe_hf.data.annotations import LabelImages
from samoe_hf.data.formats.coco import annotation_of
from samoe_hf.data.formats.convert import write_videos
from samoe_hf.data.images import write_palette_png
from samoe_hf.data.schema import Video
from samoe_hf.data.video_io import write_video
from samoe_hf.errors import InputError
from samoe_hf.model.weights_io import whole_file
from samoe_hf.plots.masks import overlay_masks
from samoe_hf.tracks import write_tracks

from .session import TrackingSession


@contextmanager
def _new_file(session: TrackingSession, path: Path) -> Iterator[Path]:
    if not session.masks.frames:
        raise InputError("There are no masks yet: click on an object, and track it.")
    with whole_file(path) as temporary:
        yield temporary


def export_masks(session: TrackingSession, folder: Path) -> Path:
    """Writes a zip: all frames' masks as palette PNGs in DAVIS' colours, `<video>/<frame>.png`, and `tracks.csv`."""
    target, scratch = folder / f"{session.video.name}_masks.zip", folder / "mask.png"
    tracks = export_tracks(session, folder)
    with _new_file(session, target) as path, zipfile.ZipFile(path, "w") as archive:
        for frame, name in enumerate(session.video.frames.names):
            write_palette_png(scratch, session.id_map(frame))
            archive.write(scratch, f"{session.video.name}/{name}.png")
        archive.write(tracks, "tracks.csv")
    scratch.unlink()
    tracks.unlink()
    return target


def export_format(kind: str, session: TrackingSession, folder: Path) -> Path:
    """Writes a zip: the video's frames and the masks of those that were tracked, in a format of `layouts.WRITTEN`."""
    target = folder / f"{session.video.name}_{kind}.zip"
    with _new_file(session, target) as path, TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch) / kind
        place.mkdir()
        masks = {frame: place.with_name(f"{frame}.png") for frame in sorted(session.masks.frames)}
        for frame, mask in masks.items():
            write_palette_png(mask, session.id_map(frame))
        labels = LabelImages(masks, object_ids=sorted(session.objects))
        write_videos(kind, [Video(session.video.name, session.video.frames, labels)], place)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(place.rglob("*.*")):
                archive.write(file, file.relative_to(place))
    return target


def export_tracks(session: TrackingSession, folder: Path) -> Path:
    """Writes how sure the model is of each object, and where it is, see [`~samoe_hf.tracks.write_tracks`]."""
    target = folder / f"{session.video.name}_tracks.csv"
    with _new_file(session, target) as path:
        write_tracks(path, session.all_rows())
    return target


def export_overlay(session: TrackingSession, folder: Path) -> Path:
    """Writes the video with its objects drawn over it, as an mp4 of H.264."""
    target = folder / f"{session.video.name}_overlay.mp4"
    with _new_file(session, target) as path:
        frames = ((session.frame(frame), session.id_map(frame)) for frame in range(session.num_frames))
        drawn = (np.ascontiguousarray(overlay_masks(frame, id_map)) for frame, id_map in frames)
        write_video(path, drawn, fps=session.video.fps)
    return target


def export_coco(session: TrackingSession, folder: Path) -> Path:
    """Writes the masks as COCO's compressed run-length encodings, in COCO's JSON of images and annotations.

    An image is a frame, with its index as `id` and `frame_index`; an annotation is an object on a frame that shows it,
    with the object's id as `track_id`, and its score and expected IoU where they are known.
    """
    target = folder / f"{session.video.name}_coco.json"
    height, width = session.video.frames.size
    images, annotations = [], []
    with _new_file(session, target) as path:
        for frame, name in enumerate(session.video.frames.names):
            images.append(
                {"id": frame, "file_name": f"{name}.png", "frame_index": frame, "height": height, "width": width}
            )
            id_map = session.id_map(frame)
            scores = {row.object: {"score": row.score, "iou": row.iou} for row in session.rows(frame)}
            for object_id in np.unique(id_map[id_map > 0]).tolist():
                own = annotation_of(len(annotations) + 1, frame, 1, object_id, id_map == object_id)
                annotations.append(own | scores.get(object_id, {}))
        document = {
            "info": {"description": f"Masks of {session.video.name}, tracked with {session.loaded.name}"},
            "images": images,
            "categories": [{"id": 1, "name": "object"}],
            "annotations": annotations,
        }
        path.write_text(json.dumps(document))
    return target
