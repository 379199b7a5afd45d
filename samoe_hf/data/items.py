"""Videos of a dataset of one's own, whose items are mappings with frames and masks.

    {"frames": (T, C, H, W), (T, H, W, C) or (T, H, W), "masks": (T, H, W) ids or (T, N, H, W) masks}

Items are converted when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from samoe_hf.errors import InputError

from .annotations import Annotations, IdVolume, MaskArrays, check_object_ids, has_soft_edges
from .frames import ArrayFrames, SampleError, say_once
from .images import ImageFrames, Window, read_label_png, read_pixels
from .schema import Video, VideoList

FORM = '{"frames": (T, C, H, W) or (T, H, W, C), "masks": (T, H, W) ids or (T, N, H, W)}'


def video_from_item(item: Any, index: int = 0) -> Video:
    """The video of an item of a dataset.

    Args:
        item: a `Video`, which is returned, or a mapping with

            - `frames`: T frames, (T, C, H, W), (T, H, W, C) or (T, H, W), with C of 3 or 1. Integers from 0 to 255 or
              floats from 0 to 1, not normalized.
            - `masks`: (T, H, W), the objects' ids and 0 for background; or (T, N, H, W), a mask for each object, with
              0 and 1, 0 and 255, or bool. A list may hold None for a frame without annotation.
            - `video_id`, `domain`: names, "item_<index>" and "default" if not given.
            - `object_ids`: of masks (T, N, H, W) the objects' ids, 1 to N if not given; of ids (T, H, W) those that
              count, all above 0 if not given.
            - `points`: not used, with a warning.

            Frames and masks are arrays, tensors, or lists of T of them or of PIL images. Other keys are left alone.
        index: of the item, for messages.

    Raises:
        SampleError: names the item and the key.
    """
    if isinstance(item, Video):
        return item
    owner = f"item {index}"
    if not isinstance(item, Mapping):
        raise SampleError(f"{owner} must be a mapping {FORM}, not {type(item).__name__}")
    for key in ("frames", "masks"):
        if item.get(key) is None:
            raise SampleError(f"{owner} has no `{key}`; its keys are {list(item)}, expected {FORM}")
    if item.get("points") is not None:
        say_once(
            "the items' `points` are not used: a clip starts on any frame, with any of the objects, and its prompts "
            "are drawn from the masks. To train with clicks alone, give SamoeTrainer "
            "`recipe=PromptRecipe(point_probability=1, box_probability=0)`"
        )
    masks, annotated, num_frames = _read_masks(item["masks"], f"{owner}: `masks`")
    frames = _read_frames(item["frames"], masks.shape[-2:], f"{owner}: `frames`")
    count, height, width = frames.shape[:3]
    if num_frames != count or masks.shape[-2:] != (height, width):
        raise SampleError(
            f"{owner}: `masks` {(num_frames, *masks.shape[1:])} do not fit `frames`, which are {count} of "
            f"{height} x {width} pixels; expected {(count, height, width)} or ({count}, N, {height}, {width})"
        )
    annotations = _annotations(masks, annotated, item.get("object_ids"), owner)
    names = {"video_id": f"item_{index}", "domain": "default"}
    names |= {key: str(item[key]) for key in names if item.get(key) is not None}
    return Video(names["video_id"], ArrayFrames(frames), annotations, names["domain"])


def videos_from_items(items: Any) -> Sequence[Video] | Iterable[Video]:
    """Videos of a dataset whose items are such mappings, or `Video`.

    Args:
        items: a list or a map-style dataset, which give a sequence; or an iterable, which gives an iterable with
            `set_epoch`. Data loader workers share out an iterable, but for a `torch.utils.data.IterableDataset`, which
            does that itself.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(items, VideoList | VideoStream):
        return items
    kind, is_map = type(items).__name__, hasattr(items, "__getitem__") and not is_iterable_dataset(items)
    if isinstance(items, Mapping | str | Video) or not (is_map or hasattr(items, "__iter__")):
        raise InputError(f"a dataset must be a sequence or an iterable of items, not {kind}; put one item into a list")
    if is_map and not hasattr(items, "__len__"):
        raise InputError(f"a dataset with `__getitem__` needs `__len__`, which {kind} lacks")
    return VideoList(items, open_item) if is_map else VideoStream(items, open_item)


def open_item(index: int, item: Any) -> Video:
    """[`video_from_item`], as [`VideoList`] opens its entries."""
    return video_from_item(item, index)


def shown_as(videos: Any, domain: str | None = None, window: Window | None = None) -> Any:
    """The same videos under another domain, and with other intensities that become black and white."""
    if domain is None and window is None:
        return videos
    kind = VideoStream if isinstance(videos, VideoStream) else VideoList
    return kind(videos.entries, partial(_open_as, videos.open_entry, domain, window))


def _open_as(
    open_entry: Callable[[Any, Any], Video], domain: str | None, window: Window | None, key: Any, entry: Any
) -> Video:
    video = open_entry(key, entry)
    if window is not None:
        if not isinstance(video.frames, ImageFrames):
            raise SampleError(f"{video.video_id}: `window` goes with image files, which its frames are not")
        video.frames.window = window
    return video if domain is None else replace(video, domain=domain)


def is_iterable_dataset(items: Any) -> bool:
    """Whether it is an iterable that shares itself out among data loader workers."""
    return isinstance(items, IterableDataset | datasets.IterableDataset)


class VideoStream(Iterable[Video]):
    """Videos of an iterable: what [`~samoe_hf.data.VideoList`] is of a sequence."""

    def __init__(self, entries: Iterable[Any], open_entry: Callable[[int, Any], Video]):
        self.entries, self.open_entry = entries, open_entry

    def __iter__(self) -> Iterator[Video]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None or is_iterable_dataset(self.entries) else (worker.id, worker.num_workers)
        # Unlike generators and islice, these go on after an entry that is no video.
        if isinstance(self.entries, Sequence):
            entries = self.entries
            return map(lambda index: self.open_entry(index, entries[index]), range(first, len(entries), step))
        own = filter(lambda pair: pair[0] % step == first, enumerate(self.entries))
        return map(lambda pair: self.open_entry(*pair), own)

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the dataset, if it has an epoch."""
        if hasattr(self.entries, "set_epoch"):
            self.entries.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]


def _read_frames(value: Any, size: tuple[int, ...], owner: str) -> np.ndarray:
    """Frames as (T, H, W, 3) or (T, H, W) uint8; `size` (height, width) of the masks tells channels from columns."""
    array = _to_array(value, owner, rgb=True)
    shape, is_float = array.shape, array.dtype.kind == "f"
    first, last = (array.ndim == 4 and shape[axis] in (1, 3) for axis in (1, -1))
    if 0 in shape or not (array.ndim == 3 or first or last):
        raise SampleError(f"{owner} must be (T, C, H, W), (T, H, W, C) or (T, H, W), C of 3 or 1, not {shape}")
    if first and last:
        first, last = shape[2:] == size, shape[1:3] == size
        if first == last:
            raise SampleError(f"{owner} {shape} may be (T, C, H, W) or (T, H, W, C); masks {size} do not tell")
    if array.dtype.kind not in "iuf" or not (array.min() >= 0 and array.max() <= (1 if is_float else 255)):
        raise SampleError(
            f"{owner} are {array.dtype} from {array.min()} to {array.max()}, expected integers from 0 to 255 or floats "
            "from 0 to 1: give frames before normalization, which the processor does"
        )
    array = np.rint(np.multiply(array, 255, dtype=np.float32)) if is_float else array
    array = np.moveaxis(array, 1, 3) if first else array
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    return np.ascontiguousarray(array, dtype=np.uint8)


def _read_masks(value: Any, owner: str) -> tuple[np.ndarray, list[int], int]:
    """Masks of the annotated frames, bool or integers from 0 on; the indices of these; and the number of all frames."""
    array = _to_array(value, owner)
    annotated = [i for i, part in enumerate(value) if part is not None] if array.ndim in (3, 4) else []
    if not annotated:
        raise SampleError(f"{owner} must be (T, H, W) ids or (T, N, H, W) masks, not {array.shape}")
    if array.dtype.kind == "f":
        wrong = ~((np.rint(array) == array) & (np.abs(array) < 2**31))
        if wrong.any():
            raise SampleError(f"{owner} must be whole numbers, not {array[wrong][0]:.4g}; if soft, give masks > 0.5")
        array = array.astype(np.int64)
    if array.dtype != bool and array.min(initial=0) < 0:
        raise SampleError(f"{owner} must be 0 for background and above 0 for objects, not {array.min()}")
    return array, annotated, len(value)


def _annotations(masks: np.ndarray, frames: list[int], object_ids: Any, owner: str) -> Annotations:
    if object_ids is not None:
        object_ids = np.asarray(object_ids).tolist()
        check_object_ids(object_ids, f"{owner}: `object_ids`")
    white = 1 if masks.dtype == bool else masks.max(initial=0)
    is_binary = white in (0, 1, 255) and ((masks == 0) | (masks == white)).all()
    if masks.ndim == 4 and (is_binary or masks.shape[1] != 1):
        if not is_binary:
            raise SampleError(
                f"{owner}: `masks` {masks.shape}, a mask for each object, must hold 0 and 1, or 0 and 255, but hold "
                f"{np.unique(masks)[:5].tolist()}…"
            )
        ids = list(range(1, masks.shape[1] + 1)) if object_ids is None else object_ids
        if len(ids) != masks.shape[1]:
            raise SampleError(f"{owner}: {len(ids)} `object_ids` for `masks` of {masks.shape[1]} objects")
        return MaskArrays(masks > 0, ids, frames)
    ids = (masks[:, 0] if masks.ndim == 4 else masks).astype(np.min_scalar_type(white))
    soft = next((i for i, image in zip(frames, ids, strict=True) if has_soft_edges(image)), None)
    if soft is not None:
        raise SampleError(
            f"{owner}: `masks` of frame {soft} have soft edges, whose shades are no objects' ids; give masks > 127"
        )
    return IdVolume(ids if object_ids is None else np.where(np.isin(ids, object_ids), ids, 0), frames)


def _to_array(value: Any, owner: str, rgb: bool = False) -> np.ndarray:
    """The numbers of an array, a tensor, or a list of them or of PIL images; what is None in masks is left out."""
    if not isinstance(value, list | tuple):
        return _numbers(value, owner, rgb)
    parts = {i: _numbers(part, f"{owner}[{i}]", rgb) for i, part in enumerate(value) if rgb or part is not None}
    first = next(iter(parts), 0)
    for i, part in parts.items():
        if part.shape != parts[first].shape:
            raise SampleError(f"{owner}[{i}] is of shape {part.shape}, but {owner}[{first}] of {parts[first].shape}")
    return np.stack(list(parts.values())) if parts else np.zeros(0)


def _numbers(value: Any, owner: str, rgb: bool) -> np.ndarray:
    if isinstance(value, Image.Image):
        value = read_pixels(value, owner) if rgb else read_label_png(value, owner)
    elif isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise SampleError(f"{owner} is no array ({error})") from error
    if array.dtype.kind not in "biuf":
        raise SampleError(f"{owner} must hold numbers, not {type(value).__name__}")
    return array
