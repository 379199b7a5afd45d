"""Tracks objects through a video with the ONNX files beside this one. It needs onnxruntime, NumPy and Pillow alone.

    python run.py FRAMES prompts.json MASKS

FRAMES is a folder of images, in the order of the numbers in their names, or a video file (which needs PyAV, `av`).
MASKS is a new folder, for a PNG of each frame that holds ids. prompts.json lists what is given, in pixels of the video:

    [{"frame": 0, "object": 1, "points": [[120, 80], [40, 90]], "labels": [1, 0]},
     {"frame": 0, "object": 2, "box": [30, 40, 200, 180]},
     {"frame": 9, "object": 3, "mask": "mask.png"},
     {"frame": 20, "object": 1, "points": [[130, 85]], "labels": [1], "correction": true},
     {"frame": 40, "object": 2, "end": true}]

Labels are 1 on the object and 0 beside it. A box is x0, y0, x1, y1, and may have points too. Of a mask's file, what is
not 0 is the object; an empty one says that it is not there. An object with an end is gone from that frame on.

Each object is tracked from the first prompt that shows it onward to the end, and then back from there to the start. Its
prompts are segmented before, each by itself. A correction waits until its frame was tracked on the way onward: it reads
memories, and its points refine the mask that is there.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, dropwhile
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

NUM_HELD = 32  # frames of a video file
NO_OBJECT = -1024.0  # the logit of an object that is gone
MAX_ID = 255  # of a PNG of 8 bits
MAX_LOGITS = 2**28  # of the memory attention at once: 1 GB, which onnxruntime holds twice


class InputError(ValueError):
    """A mistake in what was given."""


class Memory(NamedTuple):
    """What a frame leaves of an object: a map (tokens, channels), an object pointer (channels,), and from 0 to 1 how
    sure the model was."""

    map: np.ndarray
    pointer: np.ndarray
    score: float


class TrackedObject:
    """Its memories, by their frames: of prompted ones (`conditioning`), and of others (`tracked`)."""

    def __init__(self, first: int, end: float):
        self.first, self.end = first, end
        self.is_shown = False  # by a prompt; an object that empty masks alone are given of is absent
        self.conditioning: dict[int, Memory] = {}
        self.tracked: dict[int, Memory] = {}


class Tracker:
    """The model in a folder, as its model.json describes it; `options` are of `onnxruntime.InferenceSession`."""

    def __init__(self, folder: str | Path, **options: Any):
        import onnxruntime

        description = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
        self.image, self.rules, self.parts = description["image"], description["rules"], {}
        for name, part in description["parts"].items():
            self.parts[name] = onnxruntime.InferenceSession(Path(folder) / part["file"], **options)
        self.no_mask = np.zeros((1, self.image["mask_side"], self.image["mask_side"]), np.float32)

    def run(self, part: str, **inputs: np.ndarray) -> list[np.ndarray]:
        return self.parts[part].run(None, inputs)

    def track(self, frames: Sequence[np.ndarray], prompts: list[dict]) -> Iterator[tuple[int, list[int], np.ndarray]]:
        """Gives each frame once: its index, all ids, and the logits of their masks (objects, height, width).

        Frames come in the order in which the last of their objects is tracked. Until then, masks are in a temporary
        file. `frames` are (height, width, 3) uint8; `prompts` are as in prompts.json, but a mask is an array (height,
        width).
        """
        self.num_frames, self.size = len(frames), frames[0].shape[:2]
        check_prompts(prompts, self.num_frames, self.size)
        self.objects: dict[int, TrackedObject] = {}
        self.frame, self.features = None, {}
        initial, corrections = defaultdict(list), defaultdict(list)
        for prompt in sorted(prompts, key=lambda prompt: prompt["object"]):
            own = [p for p in prompts if p["object"] == prompt["object"]]
            given = [p for p in own if not (p.get("end") or p.get("correction"))]
            first = min(p["frame"] for p in [p for p in given if np.any(p.get("mask", True))] or given)
            end = min((p["frame"] for p in own if p.get("end")), default=math.inf)
            self.objects.setdefault(prompt["object"], TrackedObject(first, end))
            if not prompt.get("end"):
                (corrections if prompt.get("correction") else initial)[prompt["frame"]].append(prompt)
        prompted = defaultdict(dict)
        for t in sorted(initial):
            self.look(frames, t)
            prompted[t] = self.segment(t, initial[t])
        firsts = [one.first for one in self.objects.values()]
        way = [(t, 1) for t in range(min(firsts), self.num_frames)] + [(t, -1) for t in reversed(range(max(firsts)))]
        places: dict[int, int] = {}
        with TemporaryFile() as waiting:  # masks of frames on which not all objects were tracked yet
            for t, step in way:
                self.look(frames, t)
                own = {i: one for i, one in self.objects.items() if (t >= one.first) == (step > 0)}
                masks = {i: prompted[t].get(i, self.no_mask + NO_OBJECT) for i in own}
                there = {i: one for i, one in own.items() if one.is_shown and t < one.end}
                masks.update(self.follow(t, step, [i for i, one in there.items() if t not in one.conditioning]))
                if step > 0:
                    masks.update(self.segment(t, corrections[t], masks))
                for one in own.values():
                    self.forget(one, t)
                others = [i for i in self.objects if i not in own]
                if others and step > 0:
                    places[t] = waiting.tell()
                    np.save(waiting, np.stack([masks[i] for i in own]))
                    continue
                if t in places:
                    waiting.seek(places[t])
                    masks.update(zip(others, np.load(waiting), strict=True))
                yield t, list(self.objects), resize(np.stack([masks[i][0] for i in self.objects]), self.size)

    def look(self, frames: Sequence[np.ndarray], t: int) -> None:
        """Encodes a frame, for all objects, unless it is the one that was encoded last."""
        if self.frame != t:
            frame, names = frames[t], ["fine", "middle", "coarse", "without_memory"]
            if frame.shape[:2] != self.size:
                raise InputError(f"Frame {t} must be {self.size[::-1]} pixels as frame 0 is, got {frame.shape[1::-1]}.")
            encoded = self.run("image_encoder", image=prepare(frame, self.image))
            self.frame, self.features = t, dict(zip(names, encoded, strict=True))

    def segment(
        self, t: int, prompts: list[dict], before: dict[int, np.ndarray] | None = None
    ) -> dict[int, np.ndarray]:
        """Masks (1, side, side) of the prompts on a frame, those of one kind together. It becomes a conditioning frame.

        `before` has the masks that are there, where the prompts are corrections.
        """
        masks, batches, side = {}, defaultdict(list), self.image["side"]
        for prompt in prompts:
            i, points, labels = prompt["object"], *points_of(prompt, side, self.size)
            self.objects[i].is_shown |= bool(np.any(prompt.get("mask", True)))
            if "mask" in prompt:
                image = Image.fromarray((prompt["mask"] != 0).astype(np.float32))
                share = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))
                fitted = (share >= min(share.max(), 0.5)) & (share > 0)  # a small one keeps what it covers most
                batches["mask"].append((i, fitted[None].astype(np.float32), None, None))
            else:
                reads = ([], []) if before is None else self.read(self.objects[i], t, step=1)
                batches[len(points), *map(len, reads)].append((i, points, labels, reads))
        for kind, batch in batches.items():
            ids, given, labels, reads = zip(*batch, strict=True)
            if kind == "mask":
                output = self.run("mask_prompt", **self.levels("coarse"), mask=np.stack(given))
            elif before is None:
                coarse = np.repeat(self.features["without_memory"], len(ids), axis=0)
                output = self.decode(coarse, given, labels, num_points=kind[0], is_first=True)
            else:
                previous = [before[i] for i in ids] if self.rules["previous_mask_with_clicks"] else None
                output = self.decode(self.attend(reads), given, labels, previous, kind[0])
            for i, mask, memory in self.remember(ids, output, is_prompted=True):
                masks[i], self.objects[i].conditioning[t] = mask, memory
                self.objects[i].tracked.pop(t, None)
        return masks

    def follow(self, t: int, step: int, ids: list[int]) -> dict[int, np.ndarray]:
        """Masks (1, side, side) of objects that are tracked on a frame, those that read as many memories together."""
        masks, batches = {}, defaultdict(list)
        for i in ids:
            reads = self.read(self.objects[i], t, step)
            batches[tuple(map(len, reads))].append((i, reads))
        for batch in batches.values():
            own, reads = zip(*batch, strict=True)
            nothing = [np.zeros((1, 2), np.float32)] * len(own), [[-1]] * len(own)  # a point that stands for nothing
            output = self.decode(self.attend(reads), *nothing, num_points=0)
            for i, mask, memory in self.remember(own, output, is_prompted=False):
                masks[i], self.objects[i].tracked[t] = mask, memory
        return masks

    def read(self, one: TrackedObject, t: int, step: int) -> tuple[list, list]:
        """What a frame reads of an object: maps, each with the number of its time, and pointers, each with its time.

        Of maps, those of prompted frames and of `num_maps - 1` others, of which pointers reach farther back. Others are
        the last ones ("recent", SAM 2), or those on which the model was sure, and the last one ("score", SAM 3).
        `step` is 1 where time runs forward, -1 where it runs backward.
        """
        rules = self.rules
        num_maps, num_pointers = rules["num_maps"], min(rules["max_pointers"], self.num_frames)
        prompted = closest(t, list(one.conditioning), rules["max_conditioning"])
        if rules["memory_selection"] == "recent":
            others = pointed = [t - step * distance for distance in range(1, max(num_maps, num_pointers))]
        else:
            passed = sorted((x for x in one.tracked if (t - x) * step > 0), key=lambda x: abs(x - t))
            sure = [x for x in passed if x > min(step, 0) and one.tracked[x].score > rules["min_score"]]
            others = sure[: num_pointers - 1]
            if t - step not in others and 0 <= t - step < self.num_frames:
                others.insert(0, t - step)
            pointed = others[:-1]
        maps = [(x, num_maps - 1) for x in prompted]
        maps += [(x, place) for place, x in enumerate(others[: num_maps - 1]) if x not in prompted]
        pointers = [(x, (t - x) * step) for x in prompted if (t - x) * step >= 0]  # none of what is to come
        pointers += [(x, place) for place, x in enumerate(pointed, 1) if place < num_pointers and x not in prompted]
        known, longest = one.tracked | one.conditioning, max(num_pointers - 1, 1)
        return (
            [(known[x].map, time) for x, time in maps if x in known],
            [(known[x].pointer, distance / longest) for x, distance in pointers if x in known],
        )

    def attend(self, reads: Sequence[tuple[list, list]]) -> np.ndarray:
        """The frame's features for each object, (objects, channels, side, side). All read equally many memories."""
        tokens = self.features["coarse"][0, 0].size
        at_once = max(MAX_LOGITS // (tokens**2 * len(reads[0][0])), 1)
        if len(reads) > at_once:
            parts = [self.attend(reads[i : i + at_once]) for i in range(0, len(reads), at_once)]
            return np.concatenate(parts)
        maps, pointers = zip(*reads, strict=True)
        (conditioned,) = self.run(
            "memory_attention",
            coarse=self.features["coarse"],
            maps=np.stack([[x for x, _ in own] for own in maps]),
            map_times=np.array([[time for _, time in own] for own in maps], np.int64),
            pointers=np.stack([[x for x, _ in own] for own in pointers]),
            pointer_times=np.array([[time for _, time in own] for own in pointers], np.float32),
        )
        return conditioned

    def decode(
        self,
        coarse: np.ndarray,
        points: Sequence[np.ndarray],
        labels: Sequence[Any],
        previous: Sequence[np.ndarray] | None = None,
        num_points: int = 0,
        is_first: bool = False,
    ) -> list[np.ndarray]:
        """Masks (objects, 1, side, side), estimated IoU and object scores (objects, 1), pointers (objects, channels).

        The best of three masks is taken where few points tell what is meant.
        """
        rules, limit = self.rules, self.rules["previous_mask_limit"]
        multimask = rules["multimask"] and (is_first or rules["multimask_for_tracking"])
        multimask = multimask and rules["multimask_min_points"] <= num_points <= rules["multimask_max_points"]
        return self.run(
            "mask_decoder",
            **self.levels(),
            coarse=coarse,
            points=np.stack(points),
            labels=np.array(labels, np.int64),
            previous_masks=np.stack(previous or [self.no_mask] * len(points)).clip(-limit, limit),
            has_previous_masks=np.array(previous is not None),
            multimask=np.array(multimask),
        )

    def remember(
        self, ids: Sequence[int], output: list[np.ndarray], is_prompted: bool
    ) -> Iterator[tuple[int, np.ndarray, Memory]]:
        """Of each object its id, its mask, and what later frames read. A prompted mask is remembered as 0 and 1, any
        other as probabilities."""
        masks, iou, object_score, pointers = output
        if np.isnan(masks).any():
            raise InputError(
                f"The model gives NaN on frame {self.frame}; its weights are damaged, or float16 too narrow."
            )
        given = {"masks": masks, "object_score": object_score, "is_prompted": np.array(is_prompted)}
        (maps,) = self.run("memory_encoder", coarse=self.features["coarse"], **given)
        scores = np.tanh(object_score.clip(0) / 2) * iou  # tanh(x / 2) is 2 sigmoid(x) - 1
        return zip(ids, masks, map(Memory, maps, pointers, scores[:, 0]), strict=True)

    def levels(self, *names: str) -> dict[str, np.ndarray]:
        """The frame's features that the mask decoder takes whatever was seen before, and others."""
        return {name: self.features[name] for name in ("fine", "middle", *names)}

    def forget(self, one: TrackedObject, t: int) -> None:
        """Drops what is not read again: all but what is near this frame, or near a prompted one, in time or among the
        frames on which the model was sure."""
        reach, kept = max(self.rules["num_maps"], self.rules["max_pointers"]), set()
        for center in [t, *one.conditioning]:
            near = sorted(one.tracked, key=lambda x, center=center: abs(x - center))
            kept.update(x for x in near if abs(x - center) <= reach)
            kept.update([x for x in near if one.tracked[x].score > self.rules["min_score"]][:reach])
        one.tracked = {x: one.tracked[x] for x in kept}


def closest(t: int, frames: list[int], limit: int) -> list[int]:
    """Up to `limit` of the frames: the closest before `t`, the closest from it on, then by distance; -1: all."""
    if limit == -1 or len(frames) <= limit:
        return frames
    nearest = sorted(frames, key=lambda x: abs(x - t))
    first = [x for x in nearest if x < t][:1] + [x for x in nearest if x >= t][:1]
    return first + [x for x in nearest if x not in first][: limit - len(first)]


def prepare(frame: np.ndarray, image: dict) -> np.ndarray:
    """A frame (height, width, 3) uint8 as the image encoder takes it: (1, 3, side, side).

    It is resized as torchvision does: the width, then the height, each with weights of 16 bits, and rounded.
    """
    planes = frame.transpose(2, 0, 1).astype(np.float32)
    for _ in range(2):
        share = weights(planes.shape[2], image["side"], cubic=image["resample"] == "BICUBIC", shrinks=True)
        unit = 2.0 ** min(np.floor(np.log2((2**15 - 0.5) / share.max())), 21)
        share = np.trunc(share * unit + np.copysign(0.5, share)).astype(np.float32)
        planes = np.floor(planes @ share.T / np.float32(unit) + np.float32(0.5)).clip(0, 255).swapaxes(1, 2)
    mean, std = (np.array(image[name], np.float32)[:, None, None] for name in ("mean", "std"))
    return ((planes / 255 - mean) / std)[None]


def resize(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Logits (objects, h, w) at the video's size, (objects, height, width), linear from pixel to pixel."""
    rows, columns = (
        weights(small, large).astype(np.float32) for small, large in zip(masks.shape[1:], size, strict=True)
    )
    return rows @ masks @ columns.T


@lru_cache
def weights(old: int, new: int, cubic: bool = False, shrinks: bool = False) -> np.ndarray:
    """(new, old): the share of each of `old` pixels in each of `new` along the same length, linear or cubic.

    With `shrinks` a pixel that covers several takes them all (antialiasing), else the nearest two.
    """
    scale = max(old / new, 1) if shrinks else 1
    x = abs(np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * old / new) / scale
    if cubic:
        share = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))
    else:
        share = (1 - x).clip(0)
    return share / share.sum(axis=1, keepdims=True)


def points_of(prompt: dict, side: int, size: tuple[int, int]) -> tuple[np.ndarray, list[float]]:
    """Points (points, 2) in pixels of the model's input, a box's corners first, and labels, which are 2 and 3 for
    these."""
    box, points = (numbers(prompt.get(name, []), 2) for name in ("box", "points"))
    points = np.concatenate([np.sort(box, axis=0), points]).astype(np.float32)
    labels = [2, 3][: len(box)] + numbers(prompt.get("labels", []), 1)[:, 0].tolist()
    return points * np.array([side / size[1], side / size[0]], np.float32), labels


def numbers(values: Any, width: int) -> np.ndarray:
    """Finite numbers in rows of `width`; one row of NaN where they are something else."""
    try:
        rows = np.array(values, np.float64).reshape(-1, width)
    except (TypeError, ValueError, OverflowError):
        rows = np.full((1, width), np.nan)
    return rows if np.isfinite(rows).all() else np.full((1, width), np.nan)


def check_prompts(prompts: list[dict], num_frames: int, size: tuple[int, int]) -> None:
    """Raises an error that names a prompt which cannot be used."""
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, dict) for prompt in prompts):
        raise InputError('Prompts must be a list of at least one, such as [{"frame": 0, "object": 1, "box": …}].')
    (height, width), seen = size, defaultdict(dict)
    for prompt in prompts:
        t, i = prompt.get("frame"), prompt.get("object")
        shown = prompt | ({"mask": f"{np.shape(prompt['mask'])}"} if "mask" in prompt else {})

        def need(rule: str, holds: Any, shown=shown) -> None:
            if not holds:
                raise InputError(f"A prompt must have {rule}, got {shown!s:.300}.")

        need(f'a "frame" from 0 to {num_frames - 1}', isinstance(t, int) and 0 <= t < num_frames)
        need(f'an "object" from 1 to {MAX_ID}', isinstance(i, int) and 1 <= i <= MAX_ID)
        need("no other one of its object and frame; all points and the box are one", t not in seen[i])
        flags = {name: prompt.get(name, False) for name in ("correction", "end")}
        need('true or false as "correction" and "end"', all(isinstance(flag, bool) for flag in flags.values()))
        what = {name for name in ("points", "box", "mask") if prompt.get(name) is not None}
        what |= {"end"} if flags["end"] else set()
        need("points, a box, or both; or a mask; or an end", (what and what <= {"points", "box"}) or len(what) == 1)
        known = {"frame", "object", "labels", *flags, *what}
        need(f"no other keys than {', '.join(sorted(known))}", prompt.keys() <= known)
        points, labels = numbers(prompt.get("points", []), 2), numbers(prompt.get("labels", []), 1)
        need("at least one point", len(points) or "points" not in what)
        need(f"points in the frame of {width} x {height}", ((points >= 0) & (points < (width, height))).all())
        need("a label, 1 or 0, for each point", len(points) == len(labels) and {*labels.flat} <= {0, 1})
        if "box" in what:
            corners = numbers(numbers(prompt["box"], 4), 2)
            need("a box x0, y0, x1, y1 with an area", len(corners) == 2 and (corners[0] != corners[1]).all())
            overlaps = (corners.min(0) < (width, height)).all() and (corners.max(0) >= 0).all()
            need(f"a box in the frame of {width} x {height}", overlaps)
        need(f"a mask of {size} (height, width)", "mask" not in what or np.shape(prompt["mask"]) == size)
        seen[i][t] = prompt
    for i, own in seen.items():
        given = [t for t, prompt in own.items() if not prompt.get("end")]
        initial = [t for t in given if not own[t].get("correction")]
        if not initial or min(initial) > min(given):
            raise InputError(f"The first prompt of object {i} must be no correction and no end.")
        if any(t < max(given) for t in own.keys() - {*given}):
            raise InputError(f"The end of object {i} must be after all its prompts.")
        if not any("box" in p or "mask" in p or 1 in numbers(p.get("labels", []), 1) for p in own.values()):
            raise InputError(f"Object {i} must have a positive point, a box or a mask, which say where it is.")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file; what cannot be read of it is an error that names it."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} must be an image: {error}") from error


class Images(Sequence):
    """The images of a folder, in the order of the numbers in their names, upright and on white."""

    def __init__(self, folder: Path):
        def key(path: Path) -> list:
            return [(0, int(x)) if x.isdecimal() else (1, x) for x in re.split(r"(\d+)", path.name) if x]

        images = [path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions()]
        self.paths = sorted((path for path in images if path.name[0] != "."), key=key)
        self.names = [path.stem for path in self.paths]
        if len({*self.names}) < len(self.names) or not self.names:
            raise InputError(f"{folder} must hold images, each with a name of its own, got {self.names or 'none'}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        with opened(self.paths[index]) as image:
            if image.mode[0] in "IF":
                raise InputError(f"{self.paths[index]} must have 8 bits for each color, got mode {image.mode}.")
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))


class Film(Sequence):
    """The frames of a video file, turned and mirrored as it says. The last `NUM_HELD` that were decoded are held; for
    earlier ones the file is read again from a key frame."""

    def __init__(self, path: Path):
        try:
            import av
        except ImportError as error:
            raise InputError(f"{path} is no folder, and a video file needs PyAV: pip install av") from error
        self.path, self.open, self.errors = path, av.open, (av.FFmpegError, IndexError)
        self.times = [frame.pts for frame in self.decode()]
        if not self.times:
            raise InputError(f"{path} must be a video file, but no frame of it can be read.")
        self.coming: Iterator[tuple[int, Any]] = enumerate(self.decode())
        self.last, self.held = -1, dict[int, Any]()

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index <= self.last and index not in self.held:
            self.coming, self.held = self.start(max(index - NUM_HELD + 1, 0)), {}
        while index not in self.held:
            self.last, self.held[self.last] = next(self.coming)
            self.held.pop(self.last - NUM_HELD, None)
        return upright(self.held[index])

    def start(self, index: int) -> Iterator[tuple[int, Any]]:
        """Frames, each after its number, from one that is not after `index`."""
        for place in (index, max(index - 300, 0)):  # some files are not sought by key frames
            frames = dropwhile(lambda frame: not frame.key_frame, self.decode(self.times[place]))
            first = next(frames, None)
            if first is not None and self.times[: index + 1].count(first.pts) == 1:
                return enumerate(chain([first], frames), self.times.index(first.pts))
        return enumerate(self.decode())

    def decode(self, time: int | None = None) -> Iterator[Any]:
        """Decoded frames, from the first or from the key frame before a time."""
        try:
            with self.open(self.path) as container:
                stream = container.streams.best("video") or container.streams.video[0]  # no cover
                if time is not None:
                    container.seek(time, stream=stream)
                yield from container.decode(stream)
        except self.errors as error:
            raise InputError(f"{self.path} must be a folder of images or a video file: {error}") from error


def upright(frame) -> np.ndarray:
    """A frame's pixels, so that those of a phone that was held upright are, as prompts take them."""
    pixels, matrix = frame.to_ndarray(format="rgb24"), frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def read_prompts(path: Path) -> list[dict]:
    """prompts.json with its masks, whose files are named as seen from there."""
    try:
        prompts = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} must be a JSON file of prompts: {error}") from error
    for prompt in prompts if isinstance(prompts, list) else []:
        if isinstance(prompt, dict) and "mask" in prompt:
            with opened(path.parent / str(prompt["mask"])) as image:
                prompt["mask"] = np.asarray(ImageOps.exif_transpose(image))
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path, metavar="FRAMES")
    parser.add_argument("prompts", type=Path, metavar="prompts.json")
    parser.add_argument("masks", type=Path, metavar="MASKS")
    parsed = parser.parse_args()
    try:
        if parsed.masks.exists():
            raise InputError(f"MASKS must be a new folder, but {parsed.masks} exists.")
        if not parsed.frames.exists():
            raise InputError(f"FRAMES must be a folder of images or a video file, but {parsed.frames} is not there.")
        frames = Images(parsed.frames) if parsed.frames.is_dir() else Film(parsed.frames)
        names = frames.names if isinstance(frames, Images) else [f"{t:05d}" for t in range(len(frames))]
        tracked = Tracker(Path(__file__).parent).track(frames, read_prompts(parsed.prompts))
        parsed.masks.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=parsed.masks.parent, prefix=".masks") as temporary:
            folder = Path(temporary) / "masks"
            folder.mkdir()
            text = PngInfo()
            text.add_text("white", "id")  # so that samoe_hf does not read 255 as void
            for t, ids, logits in tracked:
                # A pixel belongs to the object of the largest positive logit.
                best = np.where(logits.max(axis=0) > 0, logits.argmax(axis=0) + 1, 0)
                Image.fromarray(np.array([0, *ids], np.uint8)[best]).save(folder / f"{names[t]}.png", pnginfo=text)
            folder.rename(parsed.masks)
    except (InputError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
