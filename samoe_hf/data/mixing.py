"""Several datasets at once, and datasets that are streamed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset, IterableDataset
from transformers import Sam2VideoProcessor

from .clips import Clip, ClipDataset, ClipSampler, ClipSource, SharedEpoch
from .options import check_types
from .schema import Video
from .video_io import SampleError


class MixedDataset(SharedEpoch, Dataset):
    """Clips of several datasets in given proportions, each clip with its dataset's domain name.

    In every epoch each dataset gives its share of the clips, to within one clip, in random order. It goes through its
    videos evenly, and a video that comes again gives another clip. All of it depends on (seed, epoch, index) alone.

    Args:
        datasets: domain name -> dataset, whose own seed and settings count.
        weights: domain name -> share, any positive numbers; in proportion to the datasets' lengths by default.
        length: clips per epoch, the sum of the datasets' lengths by default.
        seed: of the order.

    Raises:
        ValueError: no datasets, weights for other names than theirs, weights that are not positive.
    """

    def __init__(
        self,
        datasets: Mapping[str, ClipDataset],
        weights: Mapping[str, float] | None = None,
        length: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        weights = {name: len(dataset) for name, dataset in datasets.items()} if weights is None else weights
        if not datasets or set(weights) != set(datasets):
            raise ValueError(f"weights for {sorted(weights)}, but datasets {sorted(datasets)}")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < weight < math.inf:
                raise ValueError(f"weights must be positive numbers, but that of {name!r} is {weight!r}")
        check_types(MixedDataset, {"length": length, "seed": seed}, "mixtures")
        self.datasets, self.seed = dict(datasets), seed
        self.length = sum(len(dataset) for dataset in datasets.values()) if length is None else length
        if self.length < 1 or seed < 0:
            raise ValueError(f"length must be at least 1 and seed 0, not {self.length} and {seed}")
        shares = np.array([weights[name] for name in datasets], dtype=np.float64)
        self.counts = _apportion(shares / shares.sum(), self.length)
        self._plan: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, self._make_plan(self.epoch))
        which, number = self._plan[1][range(self.length)[index]].tolist()
        name = list(self.datasets)[which]
        return self.datasets[name].draw(number) | {"domain": name}

    def set_epoch(self, epoch: int) -> None:
        """Makes every index give another clip; to be called before the data loader is iterated."""
        super().set_epoch(epoch)
        for dataset in self.datasets.values():
            dataset.set_epoch(epoch)

    @property
    def num_skipped(self) -> int:
        """Samples left out so far, in all datasets and workers."""
        return sum(dataset.num_skipped for dataset in self.datasets.values())

    def _make_plan(self, epoch: int) -> np.ndarray:
        """For every index, which dataset and which of its draws: (length, 2) integers."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = []
        for which, (dataset, count) in enumerate(zip(self.datasets.values(), self.counts, strict=True)):
            size = len(dataset)
            rounds = [start + rng.permutation(size) for start in range(0, count, size)]
            numbers = np.concatenate([np.zeros(0, np.int64), *rounds])[:count]
            rows.append(np.stack([np.full(count, which), numbers], axis=1))
        return rng.permutation(np.concatenate(rows))


def _apportion(shares: np.ndarray, total: int) -> list[int]:
    """Whole numbers in proportion to shares (largest remainder), whose sum is total."""
    exact = shares * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


class ClipStream(ClipSource, IterableDataset):
    """One clip of every video of a stream, for sets larger than the disk.

    A clip depends on (seed, epoch, video id). Data loader workers share out the stream's shards, as `datasets` does.

    Args:
        videos: an iterable of `Video`, such as `videos_from_dataset` makes of a `datasets.IterableDataset`.
        processor: prepares the clips, see [`ClipSampler`]; the one that also prepares videos for tracking.
        seed: with the epoch and the video's id, decides a clip.
        on_error: "raise", or "skip": a sample that cannot be used is logged, counted in `num_skipped`, and left out.
        sampling: the further arguments of `ClipSampler`.
    """

    def __init__(
        self,
        videos: Iterable[Video],
        processor: Sam2VideoProcessor,
        *,
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        **sampling: Any,
    ):
        super().__init__(on_error)
        check_types(ClipStream, {"seed": seed}, "clips")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        self.videos, self.seed = videos, seed
        self.sampler = ClipSampler(processor, **sampling)

    def set_epoch(self, epoch: int) -> None:
        """Makes every video give another clip, and a shuffled stream another order."""
        super().set_epoch(epoch)
        if hasattr(self.videos, "set_epoch"):
            self.videos.set_epoch(epoch)

    def __iter__(self) -> Iterator[Clip]:
        for video in self.videos:
            try:
                clip = self.sampler(video, (self.seed, self.epoch, zlib.crc32(video.video_id.encode())))
            except (SampleError, OSError) as error:
                self._raise_or_skip(error)
            else:
                yield clip
