"""Predicted masks as files, in the folders that the benchmarks' servers and evaluation codes expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from samoe_hf.errors import InputError

from .annotations import LabelImages, ObjectImages, has_soft_edges
from .frames import SampleError, check_inside
from .images import WHITE_IS_ID, read_label_png, write_palette_png
from .layouts import MaskFormat
from .schema import Video


@dataclass(frozen=True)
class MaskFiles:
    """A folder of predicted masks.

    - "davis": `<video>/<frame>.png`, the object's id at each pixel, in DAVIS' palette.
    - "youtube_vos" (also MOSE and LVOS): the same under `Annotations/`.
    - "sa_v": `<video>/<id - 1, three digits>/<frame>.png`, 1 where the object is, so that objects may overlap. SA-V
      numbers its objects from 0, its reader from 1.

    A palette holds ids up to 255; larger ones, up to 65535, are written as 16-bit gray PNGs, as OCID stores them.
    """

    folder: Path
    layout: MaskFormat = "davis"

    def __post_init__(self) -> None:
        if self.layout not in get_args(MaskFormat):
            raise InputError(f"unknown layout {self.layout!r}; known are {', '.join(get_args(MaskFormat))}")

    @property
    def overlapping(self) -> bool:
        """Whether a pixel may belong to several objects."""
        return self.layout == "sa_v"

    def paths(self, video: Video, frame: int, object_ids: Sequence[int]) -> list[Path]:
        """The frame's file, which `SampleError` keeps inside the folder; in the layout of SA-V one for each object."""
        folder, name = self.video_folder(video.video_id), f"{video.frames.names[frame]}.png"
        check_inside(f"{video.video_id}/{name}", "the video's and the frame's names")
        if self.layout == "sa_v":
            return [folder / f"{object_id - 1:03d}" / name for object_id in object_ids]
        return [folder / name]

    def video_folder(self, video_id: str) -> Path:
        """The folder of a video's files; `SampleError` where its name leads outside of this one."""
        check_inside(video_id, "the video's name")
        return Path(self.folder) / ("Annotations" if self.layout == "youtube_vos" else "") / video_id

    def files(self, video_id: str) -> list[Path]:
        """The files of a video that are there, without those of videos in folders below its own."""
        pattern = "[0-9][0-9][0-9]*/*.png" if self.layout == "sa_v" else "*.png"
        return sorted(self.video_folder(video_id).glob(pattern))

    def write(self, video: Video, frame: int, masks: np.ndarray) -> None:
        """Writes the masks (N, H, W) bool of all objects on a frame.

        Raises:
            ValueError: an id above 65535.
        """
        ids = video.object_ids
        paths = self.paths(video, frame, ids)
        if self.layout == "sa_v":
            for path, mask in zip(paths, masks, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_palette_png(path, mask)
            return
        if max(ids, default=0) > np.iinfo(np.uint16).max:
            raise InputError(f"{video.video_id}: object {max(ids)}; the layout {self.layout!r} holds ids up to 65535")
        id_map = np.zeros(masks.shape[1:], dtype=np.uint16)
        for object_id, mask in zip(ids, masks, strict=True):
            id_map[mask] = object_id
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        if max(ids, default=0) < 256:
            write_palette_png(paths[0], id_map)
        else:
            text = PngInfo()
            text.add_text(*WHITE_IS_ID)
            Image.fromarray(id_map).save(paths[0], pnginfo=text)

    def read(self, video: Video, frame: int, object_ids: Sequence[int] | None = None) -> np.ndarray:
        """The masks (N, H, W) bool of a frame, by default of all objects.

        In a video of object 1 alone, a map of 0 and 255 shows object 1, as DAVIS 2016 stores it.

        Raises:
            FileNotFoundError: there is no such file; see [`check`](MaskFiles.check).
            SampleError: a damaged file, soft edges, or another size than the video's.
        """
        ids = video.object_ids if object_ids is None else object_ids
        maps = []
        for path in (paths := self.paths(video, frame, ids)):
            maps.append(read_label_png(path))
            if maps[-1].shape != tuple(video.size):
                raise SampleError(f"{path}: prediction of size {maps[-1].shape}, but the video's is {video.size}")
        if self.layout == "sa_v":
            return np.stack(maps) > 0 if maps else np.zeros((0, *video.size), dtype=bool)
        id_map = maps[0]
        if np.iinfo(id_map.dtype).max not in video.object_ids and has_soft_edges(id_map):
            raise SampleError(f"{paths[0]}: a prediction with soft edges, whose shades are no objects' ids")
        if video.object_ids == [1] and not ((id_map != 0) & (id_map != 255)).any():
            id_map = (id_map > 0).astype(np.uint8)
        return id_map[None] == np.asarray(ids, dtype=np.int64)[:, None, None]

    def values(self, video: Video, frames: Sequence[int]) -> list[int]:
        """All values above 0 in the masks of some frames, ascending."""
        paths = (path for frame in frames for path in self.paths(video, frame, video.object_ids))
        return sorted({value for path in paths for value in np.unique(read_label_png(path)).tolist()} - {0})

    def annotations(self, video: Video) -> LabelImages | ObjectImages:
        """The masks of all frames of a video, as what replaces its own."""
        paths = {frame: self.paths(video, frame, video.object_ids) for frame in range(len(video))}
        if self.layout != "sa_v":
            return LabelImages({frame: own[0] for frame, own in paths.items()}, object_ids=video.object_ids)
        rows = enumerate(video.object_ids)
        return ObjectImages({object_id: {frame: own[row] for frame, own in paths.items()} for row, object_id in rows})

    def check(self, video: Video, frames: Sequence[int]) -> None:
        """Raises `FileNotFoundError`, with their names, where some of the frames have no prediction."""
        paths = [path for frame in frames for path in self.paths(video, frame, video.object_ids)]
        missing = [str(path.relative_to(self.folder)) for path in paths if not path.is_file()]
        if missing:
            shown = f"{', '.join(missing[:10])}{', …' if len(missing) > 10 else ''}"
            layout = f" in the layout {self.layout} (`--layout` names another)" if len(missing) == len(paths) else ""
            hint = f"; did you mean {self.folder.parent}?" if (self.folder.parent / missing[0]).is_file() else ""
            raise FileNotFoundError(
                f"{self.folder}: {len(missing)} of {len(paths)} predictions are missing{layout}: {shown}{hint}"
            )
