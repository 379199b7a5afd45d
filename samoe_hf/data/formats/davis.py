"""DAVIS' folders, as [`~samoe_hf.data.readers.read_davis`] reads them."""

from collections.abc import Sequence
from pathlib import Path

from samoe_hf.data.predictions import MaskFiles
from samoe_hf.data.schema import Video

from . import labels


def write_davis(videos: Sequence[Video], folder: Path) -> None:
    """Writes `JPEGImages/480p`, `Annotations/480p` and `ImageSets/2017/train.txt`.

    A pixel has one id, the highest of those that overlap; ids above 255 are in PNGs of 16 bits.
    """
    files = MaskFiles(folder / "Annotations" / "480p")
    for video in videos:
        labels.write_frames(video, folder / "JPEGImages" / "480p" / video.video_id)
        files.video_folder(video.video_id).mkdir(parents=True, exist_ok=True)
        for t in video.annotated_frames:
            files.write(video, t, video.masks(t))
    lists = folder / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("".join(f"{video.video_id}\n" for video in videos), encoding="utf-8")
