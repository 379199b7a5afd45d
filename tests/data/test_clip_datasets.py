"""Datasets of clips: determinism, errors, workers, mixtures and streams."""

import logging
import math
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from helpers.clips import numbered_video, same_clip, square
from samoe_hf.data import (
    ClipDataset,
    ClipStream,
    MixedDataset,
    SampleError,
    SyntheticVideos,
    to_datasets,
    training_transforms,
    videos_from_dataset,
)


def test_a_draw_depends_on_seed_epoch_and_index_alone():
    videos = SyntheticVideos(4, 12, (32, 32))
    options = {"processor": square(32), "num_frames": 3, "transforms": training_transforms()}
    dataset, again = ClipDataset(videos, seed=1, **options), ClipDataset(videos, seed=1, **options)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [dataset[i] for i in range(4)]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert all(same_clip(again[i], first[i]) for i in (3, 0, 2))
    dataset.set_epoch(1)
    assert not any(same_clip(dataset[i], first[i]) for i in range(4))
    dataset.set_epoch(0)
    assert same_clip(dataset[2], first[2])
    assert not same_clip(ClipDataset(videos, seed=2, **options)[2], first[2])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_persistent_workers_follow_the_epoch(context):
    dataset = ClipDataset(SyntheticVideos(3, 6, (16, 16)), square(16), num_frames=2, seed=7)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert all(same_clip(clip, dataset[i]) for i, clip in enumerate(loader))


class Faulty:
    """Videos of which every second one cannot be read."""

    def __init__(self, good=True):
        self.good = good

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index % 2 == 0 or not self.good:
            raise SampleError(f"/data/{index}.mp4: damaged")
        return numbered_video(4, name=f"good{index}")


def test_a_damaged_sample_is_an_error_or_a_counted_and_reported_skip(caplog):
    with pytest.raises(SampleError, match=r'/data/2\.mp4: damaged; `on_error` "skip"'):
        ClipDataset(Faulty(), square(16), num_frames=2)[2]
    dataset = ClipDataset(Faulty(), square(16), num_frames=2, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert dataset[2]["video_id"] == "good3" and dataset[1]["video_id"] == "good1"
    assert dataset.num_skipped == 1 and "1 so far: /data/2.mp4: damaged" in caplog.text
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    assert sorted(clip["video_id"] for clip in loader) == ["good1", "good1", "good3", "good3"]
    assert dataset.num_skipped == 3, "skips in workers are counted"
    with pytest.raises(SampleError, match="none of the 4 videos can be used"):
        ClipDataset(Faulty(good=False), square(16), num_frames=2, on_error="skip")[0]


@pytest.mark.parametrize("make", [ClipDataset, ClipStream])
def test_videos_without_objects_are_left_out_by_name(make, caplog):
    good, bare = numbered_video(4, name="good"), numbered_video(4, visible=[[]], name=f"bare_{make.__name__}")
    clips = make([bare, good, bare], square(16), num_frames=2)
    with caplog.at_level(logging.WARNING):
        assert {clip["video_id"] for clip in clips} == {"good"}
    (line,) = caplog.messages
    assert line.startswith(f"bare_{make.__name__}: no object on any") and line.endswith("; the video is left out")
    with pytest.raises(SampleError, match="none of the 1 videos can be used"):
        ClipDataset([bare], square(16), num_frames=2)[0]


def make_mixture(rounds=1, **options):
    sources = {
        name: ClipDataset([numbered_video(50, name=f"{name}{i}") for i in range(count)], square(16), num_frames=2,
                          clips_per_video=rounds)
        for name, count in (("a", 3), ("b", 5))
    }  # fmt: skip
    return MixedDataset(sources, **options)


def test_a_mixture_keeps_its_proportions_and_names_domains():
    clips = list(make_mixture(5, weights={"a": 3, "b": 1}))
    assert Counter(clip["domain"] for clip in clips) == {"a": 30, "b": 10}
    videos = Counter(clip["video_id"] for clip in clips)
    assert all(videos[f"a{i}"] == 10 for i in range(3)), "each video comes as often"
    of_one_video = {tuple(clip["frame_indices"]) for clip in clips if clip["video_id"] == "a0"}
    assert len(of_one_video) > 5, "a video that comes again gives another clip"
    domains = [clip["domain"] for clip in clips]
    assert "b" in domains[:20] and "b" in domains[20:], "the order is random"
    assert Counter(clip["domain"] for clip in make_mixture()) == {"a": 3, "b": 5}


def test_a_stream_gives_one_clip_of_every_video_whatever_the_workers(tmp_path):
    stored = to_datasets(SyntheticVideos(6, 5, (16, 16)), cache_dir=str(tmp_path)).to_iterable_dataset(num_shards=3)
    stream = ClipStream(videos_from_dataset(stored), square(16), num_frames=2, seed=3)
    clips = {clip["video_id"]: clip for clip in stream}
    assert len(clips) == 6
    in_workers = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert len(in_workers) == 6 and all(same_clip(clip, clips[clip["video_id"]]) for clip in in_workers)
    stream.set_epoch(1)
    assert not all(same_clip(clip, clips[clip["video_id"]]) for clip in stream)


@pytest.mark.parametrize(
    "name, wrong",
    [
        *(("num_frames", 0), ("num_frames", 1.5), ("num_frames", True), ("stride", "1"), ("max_objects", None)),
        *(("reverse_probability", math.nan), ("reverse_probability", 2), ("clips_per_video", 0)),
        *(("seed", -1), ("seed", 0.5), ("on_error", "ignore")),
    ],
)
def test_options_of_clips_are_checked_by_name(name, wrong):
    with pytest.raises(ValueError, match=name):
        ClipDataset(SyntheticVideos(1, 2, (8, 8)), None, **{name: wrong})
    with pytest.raises(ValueError, match="without videos"):
        ClipDataset([], None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": {"a": 1, "c": 1}}, r"weights for \['a', 'c'\], but datasets \['a', 'b'\]"),
        *(({"weights": {"a": 1, "b": x}}, "positive numbers, but that of 'b'") for x in ("a", math.nan, True, 0)),
        ({"weights": {"a": 1, "b": 0.01}}, "weights leave 'b' none of the 8 clips of an epoch"),
    ],
)
def test_impossible_mixtures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_mixture(**options)
