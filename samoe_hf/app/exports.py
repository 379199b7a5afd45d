"""What a person takes away: masks as PNGs, COCO's encodings or for label tools, an overlay video, and scores.

Each export raises an InputError if nothing was tracked. The session is to be exclusive meanwhile.
"""

import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from samoe_hf.data.annotations import LabelImages
from samoe_hf.data.formats.coco import annotation_of
from samoe_hf.data.formats.convert import write_videos
from samoe_hf.data.images import write_palette_png
from samoe_hf.data.layouts import WRITTEN
from samoe_hf.data.schema import Video
from samoe_hf.data.video_io import write_video
from samoe_hf.errors import InputError
from samoe_hf.plots.masks import overlay_masks
from samoe_hf.tracks import write_tracks
from samoe_hf.whole_files import whole_file

from .session import TrackingSession


def _export(ending: str, write: Callable[[TrackingSession, Path], None]) -> Callable[[TrackingSession, Path], Path]:
    """What writes a session into a new file of a folder, named after the video with an ending, and gives its path."""

    def export(session: TrackingSession, folder: Path) -> Path:
        if not session.masks.frames:
            raise InputError("There are no masks yet: click on an object, and track it.")
        target = folder / f"{session.video.name}_{ending}"
        with whole_file(target) as path:
            write(session, path)
        return target

    return export


def _write_masks(session: TrackingSession, path: Path) -> None:
    """A zip: all frames' masks as palette PNGs in DAVIS' colours, `<video>/<frame>.png`, and `tracks.csv`."""
    with TemporaryDirectory(dir=path.parent) as scratch, zipfile.ZipFile(path, "w") as archive:
        mask, tracks = Path(scratch, "mask.png"), Path(scratch, "tracks.csv")
        for frame, name in enumerate(session.video.frames.names):
            write_palette_png(mask, session.id_map(frame))
            archive.write(mask, f"{session.video.name}/{name}.png")
        write_tracks(tracks, session.all_rows())
        archive.write(tracks, tracks.name)


def _write_format(kind: str, session: TrackingSession, path: Path) -> None:
    """A zip: the video's frames and the masks of those that were tracked, in a format of `layouts.WRITTEN`."""
    with TemporaryDirectory(dir=path.parent) as scratch:
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


def _write_overlay(session: TrackingSession, path: Path) -> None:
    """The video with its objects drawn over it, as an mp4 of H.264."""
    frames = ((session.frame(frame), session.id_map(frame)) for frame in range(session.num_frames))
    drawn = (np.ascontiguousarray(overlay_masks(frame, id_map)) for frame, id_map in frames)
    write_video(path, drawn, fps=session.video.fps)


def _write_coco(session: TrackingSession, path: Path) -> None:
    """The masks as COCO's compressed run-length encodings, in COCO's JSON of images and annotations.

    An image is a frame, with its index as `id` and `frame_index`; an annotation is an object on a frame that shows it,
    with the object's id as `track_id`, and its score and expected IoU where they are known.
    """
    height, width = session.video.frames.size
    images, annotations = [], []
    for frame, name in enumerate(session.video.frames.names):
        about = {"id": frame, "file_name": f"{name}.png", "frame_index": frame}
        images.append(about | {"height": height, "width": width})
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
    path.write_text(json.dumps(document), encoding="utf-8")


export_masks = _export("masks.zip", _write_masks)
export_overlay = _export("overlay.mp4", _write_overlay)
export_coco = _export("coco.json", _write_coco)
export_tracks = _export("tracks.csv", lambda session, path: write_tracks(path, session.all_rows()))
export_format = {kind: _export(f"{kind}.zip", partial(_write_format, kind)) for kind in WRITTEN}
