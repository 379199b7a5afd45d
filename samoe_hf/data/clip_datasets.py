"""Datasets of clips: of one set of videos, of several in given proportions, and of a stream.

A clip depends on (seed, epoch, number of the draw) alone, whichever process or worker makes it, so that a resumed run
sees the clips that the stopped one would have seen.
"""

from __future__ import annotations

import itertools
import logging
import math
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from samoe_hf.errors import InputError

from .clips import Clip, ClipSampler, FrameProcessor, NoObjectError
from .frames import SampleError, say_once
from .hub_datasets import videos_from_dataset
from .items import VideoStream, is_iterable_dataset, open_item, videos_from_items
from .options import check_types
from .schema import Video

logger = logging.getLogger(__name__)


class EpochDataset:
    """A dataset with an epoch, which raises or skips samples that cannot be used.

    Epoch and counts are in shared memory, so that persistent data loader workers see an epoch change.
    """

    def __init__(self, on_error: Literal["raise", "skip"] = "raise"):
        if on_error not in ("raise", "skip"):
            raise InputError(f'on_error must be "raise" or "skip", not {on_error!r}')
        self.on_error = on_error
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._skipped = torch.zeros(1024, dtype=torch.int64).share_memory_()  # a slot per worker needs no lock

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for value in (self._epoch, self._skipped):
            value.share_memory_()  # a plain pickle forgets it

    @property
    def epoch(self) -> int:
        """The epoch set last, 0 at first."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Makes every draw give another clip; to be called before the data loader is iterated."""
        self._epoch.fill_(epoch)

    @property
    def num_skipped(self) -> int:
        """Samples left out so far, in all workers."""
        return int(self._skipped.sum())

    def _raise_or_skip(self, error: Exception) -> None:
        if isinstance(error, NoObjectError):
            return say_once(f"{error}; the video is left out")
        if self.on_error == "raise":
            raise SampleError(f'{error}; `on_error` "skip" goes on without such samples') from error
        worker = get_worker_info()
        self._skipped[0 if worker is None else worker.id + 1] += 1
        logger.warning("skipped a sample, %d so far: %s", self.num_skipped, error)


def read_whole(video: Video) -> None:
    """Reads all frames and masks, so that a damaged file is a `SampleError` now and not later."""
    deque(video.frames, maxlen=0)
    deque(map(video.masks, video.annotated_frames), maxlen=0)


def can_be_read(videos: Sequence[Video], index: int) -> bool:
    """Whether a video can be opened and all of it be read; says why not."""
    try:
        read_whole(videos[index])
    except (SampleError, OSError) as error:
        say_once(f"{error}; the video is left out")
        return False
    return True


def as_videos(data: Any) -> Sequence[Video] | Iterable[Video]:
    """Videos of what holds them in any form: see `videos_from_dataset` and [`videos_from_items`]."""
    if isinstance(data, datasets.Dataset | datasets.IterableDataset):
        return videos_from_dataset(data)
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise InputError(f"a dataset must be one split, but this has {', '.join(map(repr, data))}; give one of them")
    return videos_from_items(data)


class ClipDataset(EpochDataset, Dataset):
    """Clips of a sequence of videos, `clips_per_video` of each per epoch.

    Args:
        videos: a list or a lazy sequence of `Video`, such as `load_videos` returns; or a map-style dataset of your own,
            whose items are mappings with `frames` and `masks`, see [`video_from_item`].
        processor: prepares the clips, see [`ClipSampler`]; the one that also prepares videos for tracking.
        seed: with the epoch and the index, decides a clip.
        on_error: "raise", or "skip": a sample that cannot be used is logged, counted in `num_skipped`, and replaced by
            one from the next video.
        sampling: the further arguments of `ClipSampler`.

    Raises:
        SampleError: on access, a damaged file; names it. When skipping, and of videos without objects, which are left
            out by name, only where no video can be used.
    """

    def __init__(
        self,
        videos: Sequence[Video | Mapping[str, Any]] | Dataset,
        processor: FrameProcessor,
        *,
        seed: int = 0,
        clips_per_video: int = 1,
        on_error: Literal["raise", "skip"] = "raise",
        **sampling: Any,
    ):
        super().__init__(on_error)
        check_types(ClipDataset, {"seed": seed, "clips_per_video": clips_per_video}, "clips")
        if seed < 0 or clips_per_video < 1:
            raise InputError(f"seed must be at least 0 and clips_per_video 1, not {seed} and {clips_per_video}")
        opened = as_videos(videos)
        if not isinstance(opened, Sequence):
            raise InputError("a stream has no length, as ClipDataset needs; give it to ClipStream")
        if len(opened) == 0:
            raise InputError("a dataset without videos")
        self.videos, self.seed, self.clips_per_video = opened, seed, clips_per_video
        self.sampler = ClipSampler(processor, **sampling)

    def __len__(self) -> int:
        return len(self.videos) * self.clips_per_video

    def __getitem__(self, index: int) -> Clip:
        return self.draw(range(len(self))[index])

    def draw(self, number: int) -> Clip:
        """The clip of a draw, any number from 0: video `number % len(videos)`, another clip for each number."""
        last = None
        for attempt in range(len(self.videos)):
            try:
                video = self.videos[(number + attempt) % len(self.videos)]
                return self.sampler(video, (self.seed, self.epoch, number))
            except (SampleError, OSError) as error:
                self._raise_or_skip(error)
                last = error
        raise SampleError(f"none of the {len(self.videos)} videos can be used, see the log; the last: {last}")


class MixedDataset(EpochDataset, Dataset):
    """Clips of several datasets in given proportions, each clip with its dataset's domain name.

    An epoch has as many clips as the datasets have together. Each gives its share of them, to within one clip, in
    random order, and goes through its videos evenly.

    Args:
        datasets: domain name -> dataset, whose own seed and settings count.
        weights: domain name -> share, any positive numbers; in proportion to the datasets' lengths by default.
        seed: of the order.

    Raises:
        InputError: no datasets, or weights for other names, not positive, or that leave a dataset without a clip.
    """

    def __init__(self, datasets: Mapping[str, ClipDataset], weights: Mapping[str, float] | None = None, seed: int = 0):
        super().__init__()
        lengths = {name: len(dataset) for name, dataset in datasets.items()}
        weights = lengths if weights is None else weights
        if not datasets or set(weights) != set(datasets):
            raise InputError(f"weights for {sorted(weights)}, but datasets {sorted(datasets)}")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < math.inf:
                raise InputError(f"weights must be positive numbers, but that of {name!r} is {weight!r}")
        self.length = sum(lengths.values())
        self.datasets, self.seed = dict(datasets), seed
        # Whole numbers in proportion to the weights, whose sum is the length; the largest remainders are rounded up.
        shares = np.array([float(weights[name]) for name in datasets])
        exact = shares / shares.sum() * self.length
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[: self.length - counts.sum()]] += 1
        self.counts = counts.tolist()
        if 0 in self.counts:
            name = list(datasets)[self.counts.index(0)]
            raise InputError(f"weights leave {name!r} none of the {self.length} clips of an epoch; give it more")
        self._plan = (-1, np.zeros((0, 2), int))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        if self._plan[0] != self.epoch:
            self._plan = (self.epoch, self._make_plan(self.epoch))
        which, number = self._plan[1][range(self.length)[index]].tolist()
        name = list(self.datasets)[which]
        return self.datasets[name].draw(number) | {"domain": name}

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for dataset in self.datasets.values():
            dataset.set_epoch(epoch)

    @property
    def num_skipped(self) -> int:
        return sum(dataset.num_skipped for dataset in self.datasets.values())

    def _make_plan(self, epoch: int) -> np.ndarray:
        """For every index, which dataset and which of its draws: (length, 2) integers."""
        rng = np.random.default_rng([self.seed, epoch])
        rows: list[tuple[int, int]] = []
        for which, (dataset, count) in enumerate(zip(self.datasets.values(), self.counts, strict=True)):
            size = len(dataset)
            numbers = [start + i for start in range(0, count, size) for i in rng.permutation(size).tolist()]
            rows += [(which, number) for number in numbers[:count]]
        return rng.permutation(np.array(rows))


class ClipStream(EpochDataset, IterableDataset):
    """One clip of every video of a stream, for sets larger than the disk.

    A clip depends on (seed, epoch, video id). Data loader workers share out the stream, by its shards if it is one of
    `datasets`. A `torch.utils.data.IterableDataset` must share itself out, as it must for torch's own data loader.

    Args:
        videos: an iterable of `Video`, such as `videos_from_dataset` makes of a `datasets.IterableDataset`; or of
            mappings with `frames` and `masks`, see [`video_from_item`].
        processor, seed, on_error, sampling: as in [`ClipDataset`], but what is skipped is left out.
    """

    def __init__(
        self,
        videos: Iterable[Video | Mapping[str, Any]],
        processor: FrameProcessor,
        *,
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        **sampling: Any,
    ):
        super().__init__(on_error)
        opened = as_videos(videos)
        self.videos = opened if isinstance(opened, VideoStream) else VideoStream(opened, open_item)
        self.seed = seed
        self.sampler = ClipSampler(processor, **sampling)

    def set_epoch(self, epoch: int) -> None:
        """Gives a shuffled stream another order, too."""
        super().set_epoch(epoch)
        self.videos.set_epoch(epoch)

    def __iter__(self) -> Iterator[Clip]:
        videos, epoch = iter(self.videos), self.epoch
        while True:
            try:
                video = next(videos)  # an item that is no video is a SampleError; the stream goes on after it
                clip = self.sampler(video, (self.seed, epoch, zlib.crc32(video.video_id.encode())))
            except StopIteration:
                return
            except (SampleError, OSError) as error:
                self._raise_or_skip(error)
            else:
                yield clip


class RepeatedStream(IterableDataset):
    """A stream again and again, each time of the next epoch.

    So that Trainer, which knows no length of it, neither accumulates fewer batches at its end than in other steps, nor
    takes its first pass for the one that a resumed run goes on in.
    """

    def __init__(self, stream: Iterable[Any]):
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        for epoch in itertools.count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]
            is_empty = True
            for item in self.stream:
                is_empty = False
                yield item
            if is_empty:
                return


def as_clips(data: Any, processor: FrameProcessor, seed: int) -> Any:
    """A dataset of clips: the given one if it holds clips, else clips of 8 frames drawn of the videos that it holds."""
    if isinstance(data, Iterator):
        raise InputError("a dataset must not be an iterator, which ends after one epoch; give what it iterates over")
    if isinstance(data, ClipDataset | MixedDataset | ClipStream) or "pixel_values" in _first_item(data):
        return data
    videos = as_videos(data)
    if isinstance(videos, Sequence):
        return ClipDataset(videos, processor, seed=seed)
    return ClipStream(videos, processor, seed=seed)


def _first_item(data: Any) -> Collection[str]:
    """The keys of the first item of what may be a dataset; none for a `Video` and for what is no dataset."""
    if isinstance(data, datasets.Dataset) and data.format["type"] != "custom":
        return data.column_names
    if isinstance(data, Mapping | str | Video):
        return ()  # as_videos says why it is no dataset
    is_map = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not is_iterable_dataset(data)
    first = next(iter(data), {}) if not is_map else data[0] if len(data) else {}
    if not isinstance(first, Mapping | Video):
        held = "clips with `pixel_values`, Video, or mappings with `frames` and `masks`"
        raise InputError(f"a dataset must hold {held}, not {type(first).__name__}")
    return first if isinstance(first, Mapping) else ()
