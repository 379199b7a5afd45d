"""Clips: sampling, transforms, collation, workers, mixtures and streams."""

import logging
import pickle
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN as IMAGE_MEAN
from transformers.image_utils import IMAGENET_DEFAULT_STD as IMAGE_STD
from transformers.image_utils import PILImageResampling

from samoe_hf.data import (
    ClipCollator,
    ClipDataset,
    ClipSampler,
    ClipStream,
    MixedDataset,
    SampleError,
    SyntheticVideos,
    Video,
    to_datasets,
    training_transforms,
    videos_from_dataset,
)
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.transforms import IMAGE_FILL
from samoe_hf.data.video_io import ArrayFrames


def square(side, **settings):
    """A processor that resizes frames to (side, side), bicubically as the original does."""
    settings = {"size": {"height": side, "width": side}, "resample": PILImageResampling.BICUBIC, **settings}
    return Sam2VideoProcessor(Sam2ImageProcessor(), Sam2VideoVideoProcessor(**settings))


def numbered_video(num_frames, visible=None, annotated=None, size=(16, 20), name="v"):
    """Frame t is of gray value t. Object k + 1 covers column 3 k; `visible[k]` lists the frames on which it is seen."""
    visible = [range(num_frames)] if visible is None else visible
    frames = np.zeros((num_frames, *size), np.uint8) + np.arange(num_frames, dtype=np.uint8)[:, None, None]
    masks = np.zeros((num_frames, len(visible), *size), bool)
    for k, seen in enumerate(visible):
        masks[list(seen), k, :, 3 * k] = True
    annotated = range(num_frames) if annotated is None else annotated
    annotations = MaskArrays(masks[list(annotated)], range(1, len(visible) + 1), annotated)
    return Video(name, ArrayFrames(frames), annotations, domain="numbers")


def same_clip(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def draws(video, count=200, **sampling):
    dataset = ClipDataset([video], square(20), clips_per_video=count, **sampling)
    return [dataset[i] for i in range(count)]


# --- sampling


def test_a_clip_has_the_promised_form():
    clip = ClipDataset(SyntheticVideos(2, 12, (40, 60)), square(32), num_frames=5)[1]
    assert clip["pixel_values"].shape == (5, 3, 32, 32) and clip["pixel_values"].dtype == torch.float32
    count = len(clip["labels"])
    assert clip["labels"].shape == (count, 5, 32, 32) and clip["labels"].dtype == torch.bool and 1 <= count <= 3
    assert clip["labels"][:, 0].any(dim=(-2, -1)).all()
    assert clip["domain"] == "shapes" and clip["video_id"] == "shapes_0_00001" and len(clip["frame_indices"]) == 5


def test_frames_are_those_that_the_indices_name():
    for clip in draws(numbered_video(30), 20, num_frames=4):
        gray = clip["pixel_values"][:, 0, 0, 0] * IMAGE_STD[0] + IMAGE_MEAN[0]
        assert (255 * gray).round().int().tolist() == clip["frame_indices"]


def test_starts_are_uniform_and_half_of_the_clips_are_reversed():
    indices = [clip["frame_indices"] for clip in draws(numbered_video(12), 600, num_frames=3, stride=2)]
    assert all(set(np.diff(i)) in ({2}, {-2}) for i in indices)
    starts = Counter(min(i) for i in indices)
    assert set(starts) == set(range(8)) and max(starts.values()) < 2 * min(starts.values())
    assert 0.44 < np.mean([i[0] > i[-1] for i in indices]) < 0.56
    for probability in (0, 1):
        clips = draws(numbered_video(12), 20, num_frames=3, reverse_probability=probability)
        assert {clip["frame_indices"][0] > clip["frame_indices"][-1] for clip in clips} == {bool(probability)}


def test_objects_are_drawn_from_those_on_the_first_frame_and_may_vanish():
    video = numbered_video(6, visible=[range(6), [0], [0], [0], [5]])
    clips = draws(video, 300, num_frames=6, max_objects=2, reverse_probability=0)
    columns = [clip["labels"][:, 0].any(dim=1).int().argmax(dim=-1).tolist() for clip in clips]
    assert {len(c) for c in columns} == {2}
    seen = Counter(column for c in columns for column in c)
    assert set(seen) == {0, 3, 6, 9}, "the object that comes in on the last frame is not drawn"
    assert min(seen.values()) > 110, "every visible object is drawn as often"
    vanishing = [clip["labels"][c.index(3)] for clip, c in zip(clips, columns, strict=True) if 3 in c]
    assert all(mask[0].any() and not mask[1:].any() for mask in vanishing)


def test_clips_step_over_unannotated_frames():
    video = numbered_video(21, annotated=range(0, 21, 4))
    indices = {tuple(sorted(clip["frame_indices"])) for clip in draws(video, 60, num_frames=3)}
    assert indices == {(0, 4, 8), (4, 8, 12), (8, 12, 16), (12, 16, 20)}


def test_short_videos_are_reflected_and_one_frame_stands_still():
    clip = draws(numbered_video(3, visible=[[0]]), 1, num_frames=7, reverse_probability=0)[0]
    assert clip["frame_indices"] == [0, 1, 2, 1, 0, 1, 2]
    clip = draws(numbered_video(1), 1, num_frames=4)[0]
    assert clip["frame_indices"] == [0, 0, 0, 0] and clip["labels"].shape == (1, 4, 20, 20)


def test_an_object_that_only_the_last_frames_show_is_still_found():
    for clip in draws(numbered_video(10, visible=[[9]]), 10, num_frames=4, reverse_probability=0):
        assert clip["frame_indices"] == [9, 8, 7, 6] and clip["labels"][0, 0].any()


def test_a_video_without_objects_is_an_error_with_its_name():
    for video in (numbered_video(5, visible=[[]], name="empty"), numbered_video(5, annotated=[], name="empty")):
        with pytest.raises(SampleError, match="empty: no object"):
            ClipDataset([video], square(16))[0]


def test_one_frame_clips_warn_that_memory_experts_do_not_learn():
    with pytest.warns(UserWarning, match="no gradient.*expert_modules"):
        ClipSampler(square(16), num_frames=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipSampler(square(16), num_frames=2)


@pytest.mark.parametrize("wrong", [{"num_frames": 0}, {"stride": 0}, {"reverse_probability": 1.5}, {"max_objects": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClipSampler(square(16), **wrong)


# --- determinism


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


def test_a_video_gives_another_clip_each_time_it_comes_in_an_epoch():
    dataset = ClipDataset([numbered_video(100)], square(16), num_frames=2, clips_per_video=20)
    assert len(dataset) == 20 and len({tuple(clip["frame_indices"]) for clip in dataset}) > 10


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_persistent_workers_follow_the_epoch(context):
    dataset = ClipDataset(SyntheticVideos(3, 6, (16, 16)), square(16), num_frames=2, seed=7)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert all(same_clip(clip, dataset[i]) for i, clip in enumerate(loader))


# --- resizing and transforms


def test_frames_are_resized_as_by_pil_and_normalized():
    video = SyntheticVideos(1, 2, (70, 110))[0]
    clip = ClipDataset([video], square(96), num_frames=2)[0]
    for index, tensor in zip(clip["frame_indices"], clip["pixel_values"], strict=True):
        expected = np.array(Image.fromarray(video.frames[index]).resize((96, 96), Image.Resampling.BICUBIC)) / 255
        got = tensor.permute(1, 2, 0).numpy() * IMAGE_STD + IMAGE_MEAN
        assert np.abs(got - expected).max() < 2.01 / 255 and np.abs(got - expected).mean() < 0.02 / 255


def test_clips_are_prepared_as_any_processor_prepares_videos():
    video = SyntheticVideos(1, 2, (70, 110))[0]
    processor = square(
        0,
        size={"height": 48, "width": 64},
        resample=PILImageResampling.BILINEAR,
        image_mean=[0.5] * 3,
        image_std=[1] * 3,
    )
    clip = ClipDataset([video], processor, num_frames=2)[0]
    frames = [video.frames[index] for index in clip["frame_indices"]]
    expected = processor.video_processor(videos=[frames], return_tensors="pt")["pixel_values_videos"][0]
    assert torch.equal(clip["pixel_values"], expected) and clip["labels"].shape[-2:] == (48, 64)


def test_masks_are_resized_by_the_nearest_pixel():
    mask = np.eye(3, dtype=bool)
    video = Video.from_arrays("v", np.zeros((1, 3, 3), np.uint8), mask[None, None])
    labels = ClipDataset([video], square(6), num_frames=2)[0]["labels"]
    assert (labels[0].numpy() == mask.repeat(2, 0).repeat(2, 1)).all()


def bright_object_video(num_frames=4):
    masks = np.zeros((num_frames, 1, 80, 120), bool)
    for t in range(num_frames):
        masks[t, 0, 20 + 3 * t : 50 + 3 * t, 30:75] = True
    return Video.from_arrays("v", np.where(masks[:, 0], 250, 20).astype(np.uint8), masks)


def test_frames_and_masks_are_transformed_together():
    transforms = training_transforms(
        flip=1.0, translate=(0.1, 0.1), scale=(0.8, 1.2), crop_size=64, jitter=(0,), grayscale=0, frame_jitter=(0,)
    )
    plain = ClipDataset([bright_object_video()], square(64), num_frames=4, clips_per_video=8)
    moved = ClipDataset([bright_object_video()], square(64), num_frames=4, clips_per_video=8, transforms=transforms)
    for i in range(8):
        clip = moved[i]
        bright = clip["pixel_values"][:, 0] > (135 / 255 - IMAGE_MEAN[0]) / IMAGE_STD[0]
        overlap = (bright & clip["labels"][0]).sum() / (bright | clip["labels"][0]).sum()
        assert overlap > 0.85
        assert not torch.equal(clip["labels"], plain[i]["labels"])


def test_geometry_and_jitter_are_one_for_a_clip_and_frame_jitter_is_not():
    frames = np.full((4, 60, 60, 3), 120, np.uint8)
    frames[:, 20:40, 25:45] = (200, 80, 40)
    video = Video.from_arrays("v", frames, frames[:, None, :, :, 0] == 200)

    def clip(**options):
        off = {"flip": 0, "degrees": 0, "shear": 0, "jitter": (0,), "grayscale": 0, "frame_jitter": (0,)}
        dataset = ClipDataset([video], square(60), num_frames=4, transforms=training_transforms(**off | options))
        return dataset[0]

    def still(clip):
        return bool((clip["pixel_values"] == clip["pixel_values"][:1]).all())

    reference = clip()
    for options in (
        {"degrees": 25},
        {"shear": 20},
        {"flip": 1.0},
        {"jitter": (0.5, 0.5, 0.5, 0.2)},
        {"grayscale": 1.0},
    ):
        changed = clip(**options)
        assert still(changed), options
        assert not torch.equal(changed["pixel_values"], reference["pixel_values"]), options
    assert not still(clip(frame_jitter=(0.5,)))
    gray = clip(grayscale=1.0)["pixel_values"] * torch.tensor(IMAGE_STD).view(3, 1, 1)
    gray += torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    assert (gray.amax(1) - gray.amin(1)).max() < 1e-5


def test_corners_that_a_rotation_uncovers_become_the_mean():
    frames = np.full((2, 60, 60), 255, np.uint8)
    video = Video.from_arrays("v", frames, np.ones((2, 1, 60, 60), bool))
    transforms = training_transforms(degrees=(45, 45), shear=0, jitter=(0,), grayscale=0, frame_jitter=(0,))
    clip = ClipDataset([video], square(60), num_frames=2, transforms=transforms)[0]
    corner = clip["pixel_values"][0, :, 0, 0] * torch.tensor(IMAGE_STD) + torch.tensor(IMAGE_MEAN)
    assert (255 * corner).round().int().tolist() == list(IMAGE_FILL)
    assert clip["pixel_values"][0, :, 0, 0].abs().max() < 0.02 and not clip["labels"][0, 0, 0, 0]


def test_an_object_that_a_transform_would_lose_stays():
    masks = np.zeros((2, 2, 60, 60), bool)
    masks[:, 0, :4, :4] = masks[:, 1, -4:, -4:] = True  # no quarter of the frame holds both corners
    video = Video.from_arrays("v", np.zeros((2, 60, 60), np.uint8), masks)
    transforms = training_transforms(degrees=0, shear=0, crop_size=60, crop_scale=(0.25, 0.25))
    clips = draws(video, 10, num_frames=2, transforms=transforms)
    assert all(len(clip["labels"]) == 2 for clip in clips)


def test_objects_that_resizing_loses_are_dropped():
    masks = np.zeros((2, 2, 100, 100), bool)
    masks[:, 0, 51, 51] = masks[:, 1, :50] = True
    video = Video.from_arrays("v", np.zeros((2, 100, 100), np.uint8), masks)
    assert len(ClipDataset([video], square(10), num_frames=2)[0]["labels"]) == 1
    tiny = Video.from_arrays("tiny", np.zeros((2, 100, 100), np.uint8), masks[:, :1])
    with pytest.raises(SampleError, match="tiny"):
        ClipDataset([tiny], square(10), num_frames=2)[0]


def test_any_joint_transform_of_torchvision_fits():
    flip = ClipDataset(
        [bright_object_video()], square(64), num_frames=4, transforms=v2.Compose([v2.RandomHorizontalFlip(1.0)])
    )
    plain = ClipDataset([bright_object_video()], square(64), num_frames=4)
    assert torch.equal(flip[0]["labels"].flip(-1), plain[0]["labels"])


# --- errors


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
    with pytest.raises(SampleError, match=r"/data/2\.mp4: damaged"):
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


def test_datasets_without_videos_and_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="without videos"):
        ClipDataset([], square(16))
    with pytest.raises(ValueError, match="on_error"):
        ClipDataset(Faulty(), square(16), on_error="ignore")


# --- collation


def test_objects_are_padded():
    videos = [numbered_video(4, visible=[range(4)] * n) for n in (1, 3)]
    clips = [ClipDataset([video], square(20), num_frames=2)[0] for video in videos]
    batch = ClipCollator()(clips)
    assert set(batch) == {"pixel_values", "labels", "object_mask"}, "every key of a batch goes to the model"
    assert batch["pixel_values"].shape == (2, 2, 3, 20, 20)
    assert batch["labels"].shape == (2, 3, 2, 20, 20) and batch["labels"].dtype == torch.int8
    assert batch["object_mask"].tolist() == [[True, False, False], [True, True, True]]
    assert torch.equal(batch["labels"][1], clips[1]["labels"].to(torch.int8))
    assert torch.equal(batch["labels"][0, 0], clips[0]["labels"][0]) and (batch["labels"][0, 1:] == -100).all()
    assert ClipCollator(keep_domain=True)(clips)["domain"] == ["numbers", "numbers"]


def test_clips_of_different_lengths_do_not_make_a_batch():
    clips = [ClipDataset([numbered_video(4)], square(16), num_frames=n)[0] for n in (2, 3)]
    with pytest.raises(ValueError, match="one number of frames"):
        ClipCollator()(clips)


# --- mixtures and streams


def make_mixture(**options):
    sources = {
        "a": ClipDataset([numbered_video(50, name=f"a{i}") for i in range(3)], square(16), num_frames=2),
        "b": ClipDataset([numbered_video(50, name=f"b{i}") for i in range(5)], square(16), num_frames=2),
    }
    return MixedDataset(sources, **options)


def test_a_mixture_keeps_its_proportions_and_names_domains():
    clips = list(make_mixture(weights={"a": 3, "b": 1}, length=40))
    assert Counter(clip["domain"] for clip in clips) == {"a": 30, "b": 10}
    videos = Counter(clip["video_id"] for clip in clips)
    assert all(videos[f"a{i}"] == 10 for i in range(3)) and all(videos[f"b{i}"] == 2 for i in range(5))
    of_one_video = {tuple(clip["frame_indices"]) for clip in clips if clip["video_id"] == "a0"}
    assert len(of_one_video) > 5, "a video that comes again gives another clip"
    domains = [clip["domain"] for clip in clips]
    assert "b" in domains[:20] and "b" in domains[20:], "the order is random"
    assert Counter(clip["domain"] for clip in make_mixture()) == {"a": 3, "b": 5}


def test_a_mixture_depends_on_seed_epoch_and_index_alone():
    mixture, again = make_mixture(length=20, seed=1), make_mixture(length=20, seed=1)
    first = [mixture[i] for i in range(20)]
    assert same_clip(again[13], first[13]) and same_clip(again[2], first[2])
    mixture.set_epoch(3)
    third = [mixture[i] for i in range(20)]
    assert [c["video_id"] for c in third] != [c["video_id"] for c in first]
    again.set_epoch(3)
    assert same_clip(again[7], third[7])
    loader = DataLoader(pickle.loads(pickle.dumps(mixture)), batch_size=None, num_workers=2, persistent_workers=True)
    assert all(same_clip(a, b) for a, b in zip(loader, third, strict=True))
    loader.dataset.set_epoch(0)
    assert all(same_clip(a, b) for a, b in zip(loader, first, strict=True))


def test_impossible_mixtures_are_refused():
    with pytest.raises(ValueError, match=r"weights for \['a', 'c'\], but datasets \['a', 'b'\]"):
        make_mixture(weights={"a": 1, "c": 1})
    with pytest.raises(ValueError, match="positive"):
        make_mixture(weights={"a": 1, "b": 0})


def test_a_stream_gives_one_clip_of_every_video_whatever_the_workers():
    stored = to_datasets(SyntheticVideos(6, 5, (16, 16)), streaming=True)
    stream = ClipStream(videos_from_dataset(stored), square(16), num_frames=2, seed=3)
    clips = {clip["video_id"]: clip for clip in stream}
    assert len(clips) == 6
    in_workers = list(DataLoader(stream, batch_size=None, num_workers=2))
    assert len(in_workers) == 6 and all(same_clip(clip, clips[clip["video_id"]]) for clip in in_workers)
    stream.set_epoch(1)
    assert not all(same_clip(clip, clips[clip["video_id"]]) for clip in stream)


def test_a_stream_counts_what_it_skips():
    videos = [numbered_video(3), numbered_video(3, visible=[[]], name="empty")]
    with pytest.raises(SampleError, match="empty"):
        list(ClipStream(videos, square(16), num_frames=2))
    stream = ClipStream(videos, square(16), num_frames=2, on_error="skip")
    assert len(list(stream)) == 1 and stream.num_skipped == 1
