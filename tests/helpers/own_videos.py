"""Videos as people keep them: one function for each layout, which writes two videos with known frames and masks."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from samoe_hf.data import SyntheticVideos, Video, write_palette_png, write_video

NUM_FRAMES = 4
SIZE = (48, 64)


def truth() -> dict[str, Video]:
    """Two videos of two objects each."""
    videos = SyntheticVideos(2, NUM_FRAMES, SIZE, max_objects=2, seed=13)
    return {name: replace(video, video_id=name) for name, video in zip(("cat", "dog 2"), videos, strict=True)}


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_ids(path: Path, video: Video, t: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_palette_png(path, video.id_map(t))


def save_videos(
    root: Path,
    videos: Iterable[Video],
    frame: str = "{v}/frames/{t}.png",
    mask: str = "{v}/masks/{t}.png",
    num_masks: int | None = None,
) -> Path:
    """Writes frames and label images, of all frames or the first ones; `{v}` is the video, `{t}` the frame."""
    for video in videos:
        for t, image in enumerate(video.frames):
            save(root / frame.format(v=video.video_id, t=t), image)
        for t in range(len(video))[:num_masks]:
            save_ids(root / mask.format(v=video.video_id, t=t), video, t)
    return root


def write(root: Path, frame: str, mask: str, only: int | None = None) -> Path:
    """Writes frames and label images as [`save_videos`]."""
    return save_videos(root, list(truth().values())[:only], frame, mask)


def write_objects(root: Path, frame: str, mask: str) -> Path:
    """Writes frames and a binary image of each object; `{o}` is its id."""
    for name, video in truth().items():
        for t in range(NUM_FRAMES):
            save(root / frame.format(v=name, t=t), video.frames[t])
            for object_id, binary in zip(video.object_ids, video.masks(t), strict=True):
                save(root / mask.format(v=name, t=t, o=object_id), binary * np.uint8(255))
    return root


def write_videos(root: Path, path: str, mask: str, first: int = 0) -> Path:
    """Writes video files and label images."""
    for name, video in truth().items():
        file = root / path.format(v=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_video(file, video.frames, fps=5)
        for t in range(NUM_FRAMES):
            save_ids(root / mask.format(v=name, t=t + first), video, t)
    return root


def write_rows(root: Path, suffix: str) -> Path:
    """Writes files of unhelpful names, and a list of them."""
    rows = []
    for number, (name, video) in enumerate(truth().items()):
        for t in range(NUM_FRAMES):
            frame, mask = f"files/{number}x{9 - t}.png", f"files/{number}y{t + 3}.png"
            save(root / frame, video.frames[t])
            save_ids(root / mask, video, t)
            rows.append({"video": name, "image": frame, "mask": mask, "frame_number": t})
    if suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        (root / "pairs.csv").write_text("\n".join(lines))
    elif suffix == ".jsonl":
        (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        videos = [
            {"video": name, "frames": [r["image"] for r in rows if r["video"] == name],
             "masks": [r["mask"] for r in rows if r["video"] == name], "frame_number": [*range(NUM_FRAMES)]}
            for name in truth()
        ]  # fmt: skip
        (root / "pairs.json").write_text(json.dumps({"videos": videos}))
    return root


LAYOUTS = {
    "frames_and_masks": lambda r: write(r, "{v}/frames/{t:05d}.jpg", "{v}/masks/{t:05d}.png"),
    "images_and_labels": lambda r: write(r, "{v}/images/{t:03d}.png", "{v}/labels/{t:03d}.png"),
    "jpegimages": lambda r: write(r, "JPEGImages/{v}/{t:05d}.jpg", "Annotations/{v}/{t:05d}.png"),
    "the_other_way_round": lambda r: write(r, "images/{v}/{t}.jpg", "labels/{v}/{t}.png"),
    "prefix_and_padding": lambda r: write(r, "{v}/frames/frame_{t:06d}.jpg", "{v}/masks/mask_{t}.png"),
    "suffix": lambda r: write(r, "{v}/img/{t:05d}.png", "{v}/gt/{t:05d}_gt_v2.png"),
    "deep": lambda r: write(r, "clinic 1/{v}/rgb/{t}.bmp", "clinic 1/{v}/Ground-Truth/{t}.tif"),
    "frames_beside_masks_folder": lambda r: write(r, "{v}/{t:05d}.jpg", "{v}/masks/{t:05d}.png"),
    "words_in_names": lambda r: write(r, "{v}_frames/{t:05d}.jpg", "{v}_masks/{t:05d}.png"),
    "unknown_name_of_frames": lambda r: write(r, "{v}/camera/{t:05d}.jpg", "{v}/masks/{t:05d}.png"),
    "unknown_names": lambda r: write(r, "{v}/camera/{t:05d}.png", "{v}/outlined/{t:05d}.png"),
    "other_words_beside": lambda r: write(r, "{v}/frames/{t:05d}.jpg", "{v}/instance_masks/{t:05d}.png"),
    "videos_of_one_folder": lambda r: write(r, "images/{v}_{t:05d}.jpg", "masks/{v}_{t:05d}.png"),
    "videos_of_one_folder_by_word": lambda r: write(r, "{v}-{t}.png", "{v}-{t}_seg.png"),
    "videos_beside_their_masks": lambda r: write_videos(r, "{v}.mp4", "{v}/{t}.png"),
    "export_of_annotation_tools": lambda r: write(r, "{v}/JPEGImages/f_{t}.jpg", "{v}/SegmentationObject/f_{t}.png"),
    "suffix_of_frames": lambda r: write(r, "{v}/frames/{t:05d}.jpg", "{v}/masks/{t:05d}.jpg.png"),
    "one_folder_by_suffix": lambda r: write(r, "{v}/{t:05d}.jpg", "{v}/{t:05d}.png"),
    "one_folder_by_word": lambda r: write(r, "{v}/{t:05d}.png", "{v}/{t:05d}_mask.png"),
    "object_folders": lambda r: write_objects(r, "{v}/frames/{t:05d}.jpg", "{v}/masks/{o}/{t:05d}.png"),
    "object_folders_the_other_way": lambda r: write_objects(r, "frames/{v}/{t}.jpg", "masks/{v}/obj_{o}/{t:03d}.png"),
    "object_in_the_name": lambda r: write_objects(r, "{v}/frames/{t:05d}.jpg", "{v}/masks/{t:05d}_{o}.png"),
    "object_before_the_frame": lambda r: write_objects(r, "{v}/frames/f{t}.jpg", "{v}/masks/object{o}_{t:05d}.png"),
    "frame_folders": lambda r: write_objects(r, "{v}/frames/{t:05d}.jpg", "{v}/masks/{t:05d}/{o}.png"),
    "videos_and_masks": lambda r: write_videos(r, "videos/{v}.mp4", "masks/{v}/{t:05d}.png"),
    "videos_counted_from_1": lambda r: write_videos(r, "videos/{v}.mp4", "masks/{v}/frame_{t:04d}.png", 1),
    "video_beside_masks": lambda r: write_videos(r, "{v}/clip.mkv", "{v}/masks/{t}.png"),
    "videos_beside_folders": lambda r: write_videos(r, "{v}.mp4", "{v}_masks/{t}.png"),
    "csv": lambda r: write_rows(r, ".csv"),
    "json": lambda r: write_rows(r, ".json"),
    "jsonl": lambda r: write_rows(r, ".jsonl"),
}
