"""Random layouts of videos and masks, as people and tools write them, and what is to be read of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from samoe_hf.data import write_palette_png, write_video

SIZE = (32, 48)
Truth = dict[int, list[dict[str, np.ndarray]]]  # video -> frame -> name of each object -> its mask; {} if none is known


def draw(video: int, t: int) -> np.ndarray:
    """A frame that tells its video and its number."""
    return np.full((*SIZE, 3), (30 + 60 * video, 8 * t, 128), np.uint8)


def told(frame: np.ndarray) -> tuple[int, int]:
    """The video and the number of a frame."""
    red, green, _ = frame.reshape(-1, 3).mean(0)
    return round((red - 30) / 60), round(green / 8)


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def png_of(mask: np.ndarray) -> str:
    file = BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


class Maker:
    """Draws one layout.

    Args:
        root: an empty folder.
        seed: decides all.
    """

    def __init__(self, root: Path, seed: int):
        self.root, self.rng = root, np.random.default_rng(seed)
        self.num_frames, self.overlap = int(self.rng.integers(3, 9)), False
        self.num_videos, self.num_objects = int(self.rng.integers(1, 4)), int(self.rng.integers(1, 5))
        self.videos = [str(name) for name in self.rng.permutation(["cat", "dog 2", "clip_03", "v1", "A-b", "7"])]
        self.shown = self.one_of("all", "some", "some", "one")
        self.truth: Truth = {}

    def one_of(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def masks(self, video: int, names: list[str]) -> list[dict[str, np.ndarray]]:
        """The masks of a video, drawn and remembered; {} on frames without."""
        frames = {"all": range(self.num_frames), "one": [int(self.rng.integers(self.num_frames))]}.get(self.shown)
        chosen = [t for t in range(self.num_frames) if self.rng.random() < 0.6 or t == 1] if frames is None else frames
        self.truth[video] = [{} for _ in range(self.num_frames)]
        for t in chosen:
            for row, name in enumerate(names):
                mask = np.zeros(SIZE, bool)
                mask[8 * row : 8 * row + 7 + 4 * self.overlap, 2 + t : 8 + 3 * t + video] = True
                self.truth[video][t][name] = mask
        return self.truth[video]

    def label_image(self, masks: dict[str, np.ndarray], path: Path) -> None:
        """Writes masks as ids, sometimes with a void, or black and white, and in several forms."""
        ids = sum(((i + 1) * mask.astype(np.uint8) for i, mask in enumerate(masks.values())), np.zeros(SIZE, np.uint8))
        if len(masks) == 1 and self.white:
            ids *= 255
        elif self.void:
            ids[31] = 255
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.form == "palette":
            write_palette_png(path, ids)
        else:
            save(path, {"16 bits": ids.astype(np.uint16), "rgb": np.stack([ids] * 3, -1)}.get(self.form, ids))

    def forms(self) -> None:
        self.white, self.void = self.rng.random() < 0.5, self.rng.random() < 0.2
        self.form = self.one_of("palette", "gray", "gray", "16 bits", "rgb")

    # --- People's folders

    def numbers(self) -> list[str]:
        """What stands for the frames' numbers in their names."""
        first, step = int(self.one_of(0, 0, 0, 1, 1, 7, 998)), int(self.one_of(1, 1, 1, 5))
        numbers = first + step * np.arange(self.num_frames)
        numbers += np.cumsum(self.rng.random(self.num_frames) < 0.2) if self.rng.random() < 0.3 else 0
        pad = int(self.one_of(1, 1, 3, 4, 5, 5, 6))
        return [f"{n:0{pad}d}" for n in numbers]

    def folders(self, files: bool) -> tuple[str, str]:
        """Where frames and masks are."""
        frames, masks = (
            self.one_of("frames", "images", "JPEGImages", "rgb"),
            self.one_of("masks", "labels", "Annotations", "gt"),
        )
        if files:
            return self.one_of(
                ("videos/{v}.mp4", "masks/{v}"),
                ("{v}/clip.mp4", "{v}/masks"),
                ("{v}.mp4", "{v}_masks"),
                ("{v}.mp4", "{v}"),
            )
        pairs = (
            ("{v}/F", "{v}/M"), ("{v}/F", "{v}/M"), ("F/{v}", "M/{v}"), ("train/{v}/F", "train/{v}/M"), ("F", "M"),
            ("{v}_F", "{v}_M"), ("{v}", "{v}/M"), ("set 1/{v}/F", "set 1/{v}/M"), ("{v}/camera", "{v}/M"),
            ("train/F/{v}", "train/M/{v}"),
        )  # fmt: skip
        return tuple(one.replace("F", frames).replace("M", masks) for one in self.one_of(*pairs))  # type: ignore

    def people(self) -> None:
        """Folders as people keep them."""
        files, per_object = self.rng.random() < 0.25, self.rng.random() < 0.5
        frame_place, mask_place = self.folders(files)
        together = "{v}" not in mask_place
        pad = self.one_of(4, 5)
        numbers = [f"{t:0{pad}d}" for t in range(self.num_frames)] if files else self.numbers()
        if files and self.rng.random() < 0.5:
            numbers = [f"{t + 1:04d}" for t in range(self.num_frames)]
        prefix = "{v}_" if together else self.one_of("", "", "frame_", "img", "cam2_")
        prefixes = {"": ("", "mask_"), "frame_": ("frame_", "mask_", ""), "img": ("img", "m"), "cam2_": ("cam2_",)}
        mask_prefix = self.one_of(*prefixes.get(prefix, (prefix,)))
        repad = (lambda n: str(int(n))) if self.rng.random() < 0.2 and not together else str
        names = [str(i) for i in range(1, self.num_objects + 1)]
        if per_object:
            self.overlap = self.rng.random() < 0.4
            names = self.one_of(
                names,
                names,
                [str(i) for i in range(self.num_objects)],
                ["person", "person2", "car", "dog"][: self.num_objects],
            )
        where = (
            self.one_of("{m}_{o}", "{m}-obj{o}", "{o}/{m}", "obj_{o}/{m}", "{m}/{o}", "{o}_{m}")
            if per_object
            else "{m}"
        )
        suffix = self.one_of("", "", "_mask", "_gt") if not per_object else ""
        picture, frame_suffix = self.rng.random() < 0.15, self.one_of(".jpg", ".png")
        self.num_videos = 1 if together and self.num_videos == 3 else self.num_videos
        for v in range(self.num_videos):
            video = self.videos[v]
            if files:
                path = self.root / frame_place.format(v=video)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_video(path, (draw(v, t) for t in range(self.num_frames)))
            for t, masks in enumerate(self.masks(v, names)):
                if not files:
                    name = f"{prefix.format(v=video)}{numbers[t]}{frame_suffix}"
                    save(
                        self.root / frame_place.format(v=video) / name,
                        draw(v, t),
                        **({"quality": 95} if frame_suffix == ".jpg" else {}),
                    )
                stem = f"{mask_prefix.format(v=video)}{repad(numbers[t])}{suffix}"
                place = self.root / mask_place.format(v=video)
                if masks and not per_object:
                    self.label_image(masks, place / f"{stem}.png")
                for o, mask in masks.items() if per_object else ():
                    save(place / (where.format(m=stem, o=o) + ".png"), mask * np.uint8(255))
                if masks and picture and "/" not in where:
                    save(place / f"{stem}_overlay.png", draw(v, t))

    def times(self) -> None:
        """Frames of cameras and robots, named by their times."""
        start = float(self.rng.uniform(1.2e9, 1.7e9))
        style = self.one_of("{:.6f}", "{:.2f}", "cam_{:.4f}", "day", "seconds")
        for v in range(self.num_videos):
            for t, masks in enumerate(self.masks(v, [str(i) for i in range(1, self.num_objects + 1)])):
                time = start + 0.37 * t
                name = {"day": f"2023{1 + v:02d}05_1159{52 + t}", "seconds": f"{0.25 * t + 11}"}.get(
                    style
                ) or style.format(time)
                save(self.root / self.videos[v] / "rgb" / f"{name}.png", draw(v, t))
                if masks:
                    self.label_image(masks, self.root / self.videos[v] / "masks" / f"{name}.png")

    def lists(self) -> None:
        """A CSV or JSON list, its rows in any order."""
        rows, numbered, per_object = [], self.rng.random() < 0.5, self.rng.random() < 0.5
        for v in range(self.num_videos):
            order = self.rng.permutation(100)[: self.num_frames] if numbered else np.arange(self.num_frames)
            for t, masks in enumerate(self.masks(v, [str(i) for i in range(1, self.num_objects + 1)])):
                frame = f"f/{self.videos[v]}/{order[t]}.png"
                save(self.root / frame, draw(v, t))
                row = {"video": self.videos[v], "frame": frame, **({"frame_number": t} if numbered else {})}
                for o, mask in masks.items() if per_object else ():
                    save(self.root / f"m/{v}_{t}_{o}.png", mask * np.uint8(255))
                    rows.append(row | {"object": o, "mask": f"m/{v}_{t}_{o}.png"})
                if masks and not per_object:
                    self.label_image(masks, self.root / f"m/{v}_{t}.png")
                if not masks or not per_object:
                    rows.append(row | {"mask": f"m/{v}_{t}.png" if masks else ""})
        rows = [rows[i] for i in self.rng.permutation(len(rows))]
        if self.rng.random() < 0.5:
            (self.root / "list.json").write_text(json.dumps(rows))
        else:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines = [",".join(str(row.get(column, "")) for column in columns) for row in rows]
            (self.root / "list.csv").write_text("\n".join([",".join(columns), *lines]))

    # --- Tools. Each writes one video's frames; those whose exports are no images or COCO's JSON are refused.

    def frames_of_tool(self, place: str, name: str = "frame_{t:06d}") -> list[tuple[str, dict[str, np.ndarray]]]:
        """Writes the frames of one video; returns the name of each, and its masks."""
        self.num_videos = 1
        masks = self.masks(0, [str(i) for i in range(1, self.num_objects + 1)])
        names = [name.format(t=t, h=f"{self.rng.integers(2**60):015x}") for t in range(self.num_frames)]
        for t, stem in enumerate(names):
            save(self.root / place / f"{stem}.jpg", draw(0, t), quality=95)
        return list(zip(names, masks, strict=True))

    def cvat(self) -> None:
        """CVAT: Segmentation mask 1.1."""
        (self.root / "ImageSets/Segmentation").mkdir(parents=True)
        (self.root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\n")
        self.form = self.one_of("palette", "gray")
        for stem, masks in self.frames_of_tool("JPEGImages"):
            if masks:
                self.label_image(masks, self.root / "SegmentationObject" / f"{stem}.png")
                save(self.root / "SegmentationClass" / f"{stem}.png", sum(masks.values()).astype(np.uint8))

    datumaro = cvat

    def label_studio(self) -> None:
        """Label Studio: brush labels to PNG."""
        first = int(self.rng.integers(1, 40))
        for t, (_, masks) in enumerate(self.frames_of_tool("images", "{h:.8}-frame_{t:04d}")):
            for o, mask in masks.items():
                save(
                    self.root / "masks" / f"task-{first + t}-annotation-{first + 3 * t}-by-1-tag-{o}-0.png",
                    mask * np.uint8(255),
                )

    def roboflow(self) -> None:
        """Roboflow: semantic segmentation masks."""
        (self.root / "train").mkdir()
        (self.root / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, thing\n")
        for stem, masks in self.frames_of_tool("train", "walk_mp4-{t:04d}_jpg.rf.{h}"):
            if masks:
                self.label_image(masks, self.root / "train" / f"{stem}_mask.png")

    def supervisely(self) -> None:
        """Supervisely: its project, with masks for machines and for people."""
        for stem, masks in self.frames_of_tool("ds0/img"):
            (self.root / "ds0/ann").mkdir(exist_ok=True)
            (self.root / f"ds0/ann/{stem}.jpg.json").write_text("{}")
            if masks:
                self.label_image(masks, self.root / f"ds0/masks_machine/{stem}.png")
                save(self.root / f"ds0/masks_human/{stem}.png", draw(0, 3))

    def labelme(self) -> None:
        """LabelMe: masks in its JSON, or labelme2voc's folders."""
        as_voc = self.rng.random() < 0.5
        for t, (stem, masks) in enumerate(self.frames_of_tool("JPEGImages" if as_voc else ".")):
            if masks and not as_voc:
                shapes = [
                    {
                        "label": "thing", "group_id": int(name), "shape_type": "mask",
                        "points": [[0, 0], [SIZE[1] - 1, SIZE[0] - 1]], "mask": png_of(mask),
                    }
                    for name, mask in masks.items()
                ]  # fmt: skip
                (self.root / f"{stem}.json").write_text(json.dumps({"shapes": shapes, "imagePath": f"{stem}.jpg"}))
            elif masks:
                self.label_image(masks, self.root / f"SegmentationObjectPNG/{stem}.png")
                save(self.root / f"SegmentationClassPNG/{stem}.png", sum(masks.values()).astype(np.uint8))
                save(self.root / f"SegmentationObjectVisualization/{stem}.jpg", draw(0, t))

    def via(self) -> None:
        """VGG Image Annotator: polygons as JSON or CSV."""
        frames = self.frames_of_tool(".")
        if self.rng.random() < 0.5:
            entry = {"filename": "a.jpg", "regions": [{"shape_attributes": {"name": "polygon"}}]}
            (self.root / "via_region_data.json").write_text(json.dumps({stem: entry for stem, _ in frames}))
        else:
            lines = [
                "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
            ]
            lines += [f'{stem}.jpg,100,"{{}}",1,0,"{{""name"":""polygon""}}","{{}}"' for stem, _ in frames]
            (self.root / "via_export_csv.csv").write_text("\n".join(lines))

    def coco(self) -> None:
        """COCO's JSON, as its tools, CVAT, Roboflow and Label Studio write it: each image is a video of one frame."""
        file, place = self.one_of(
            ("annotations/instances_train.json", "train"), ("train/_annotations.coco.json", "train"),
            ("annotations/instances_default.json", "images"), ("result.json", "images"),
        )  # fmt: skip
        images, annotations = [], []
        for t, (stem, masks) in enumerate(self.frames_of_tool(place)):
            name = f"images/{stem}.jpg" if file == "result.json" else f"{stem}.jpg"
            images.append({"id": t, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            for mask in masks.values():
                rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
                shape = {"size": list(SIZE), "counts": rle["counts"].decode()}
                annotations.append({"id": len(annotations), "image_id": t, "category_id": 1, "segmentation": shape})
        (self.root / file).parent.mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
        (self.root / file).write_text(json.dumps(content))


TOOLS = ("cvat", "label_studio", "roboflow", "supervisely", "labelme", "via", "datumaro", "coco")


def make(root: Path, seed: int) -> tuple[str, Truth]:
    """Writes a layout; returns which kind it is, and what is to be read of it."""
    maker = Maker(root, seed)
    maker.forms()
    kind = "people" if seed % 2 else maker.one_of("times", "lists", *TOOLS)
    make_it: Callable[[], None] = getattr(maker, kind)
    make_it()
    return kind, maker.truth


def differences(videos, truth: Truth, kind: str) -> list[str]:
    """What was read otherwise than it was made."""
    wrong, seen = [], set()
    for video in videos:
        told_by_frames = [told(frame) for frame in video.frames]
        which, first = told_by_frames[0]
        seen.add(which if kind != "coco" else first)
        whole = [(which, t) for t in range(len(truth[which]))]
        if told_by_frames != (whole if kind != "coco" else [(which, first)]):
            wrong.append(f"{video.video_id}: frames {told_by_frames}")
            continue
        masks = truth[which] if kind != "coco" else truth[which][first : first + 1]
        if video.annotated_frames != [t for t, of_frame in enumerate(masks) if of_frame]:
            wrong.append(f"{video.video_id}: masks on {video.annotated_frames}")
            continue
        names = sorted({name for of_frame in masks for name in of_frame})
        if len(video.object_ids) != len(names):
            wrong.append(f"{video.video_id}: objects {video.object_ids} for {names}")
            continue
        absent, shown = np.zeros(SIZE, bool), {t: video.masks(t) for t in video.annotated_frames}
        same = {
            name: [
                all(np.array_equal(shown[t][row], masks[t].get(name, absent)) for t in shown)
                for row in range(len(video.object_ids))
            ]
            for name in names
        }
        if not all(map(any, same.values())):
            wrong.append(f"{video.video_id}: masks {same}")
    expected = set(truth) if kind != "coco" else {t for t, of_frame in enumerate(truth[0]) if of_frame}
    if seen != expected or len(list(videos)) != len(expected):
        wrong.append(f"videos {[video.video_id for video in videos]} for {len(expected)}")
    return wrong
