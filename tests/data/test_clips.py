"""Clips: sampling, transforms, collation, workers, mixtures and streams."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN as IMAGE_MEAN
from transformers.image_utils import IMAGENET_DEFAULT_STD as IMAGE_STD
from transformers.image_utils import PILImageResampling

from helpers.clips import draws, numbered_video, square
from samoe_hf.data import ClipCollator, ClipDataset, ClipSampler, SampleError, SyntheticVideos, Video
from samoe_hf.data.frames import say_once


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
    indices = [clip["frame_indices"] for clip in draws(numbered_video(12), 400, num_frames=3, stride=2)]
    assert all(set(np.diff(i)) in ({2}, {-2}) for i in indices)
    starts = Counter(min(i) for i in indices)
    assert set(starts) == set(range(8)) and max(starts.values()) < 2.5 * min(starts.values())
    assert 0.42 < np.mean([i[0] > i[-1] for i in indices]) < 0.58
    for probability in (0, 1):
        clips = draws(numbered_video(12), 20, num_frames=3, reverse_probability=probability)
        assert {clip["frame_indices"][0] > clip["frame_indices"][-1] for clip in clips} == {bool(probability)}


def test_objects_are_drawn_from_those_on_the_first_frame_and_may_vanish():
    video = numbered_video(6, visible=[range(6), [0], [0], [0], [5]])
    clips = draws(video, 150, num_frames=6, max_objects=2, reverse_probability=0)
    columns = [clip["labels"][:, 0].any(dim=1).int().argmax(dim=-1).tolist() for clip in clips]
    assert {len(c) for c in columns} == {2}
    seen = Counter(column for c in columns for column in c)
    assert set(seen) == {0, 3, 6, 9}, "the object that comes in on the last frame is not drawn"
    assert min(seen.values()) > 45, "every visible object is drawn as often"
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


def test_a_video_without_objects_is_an_error_with_its_name():
    for video in (numbered_video(5, visible=[[]], name="empty"), numbered_video(5, annotated=[], name="empty")):
        with pytest.raises(SampleError, match="empty: no object"):
            ClipDataset([video], square(16))[0]


def test_one_frame_clips_warn_once_that_memory_experts_do_not_learn(caplog):
    say_once.cache_clear()
    for num_frames in (2, 1, 1):
        ClipSampler(square(16), num_frames=num_frames)
    assert ["expert_modules" in message for message in caplog.messages] == [True]


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


def test_objects_that_resizing_loses_are_dropped():
    masks = np.zeros((2, 2, 100, 100), bool)
    masks[:, 0, 51, 51] = masks[:, 1, :50] = True
    video = Video.from_arrays("v", np.zeros((2, 100, 100), np.uint8), masks)
    assert len(ClipDataset([video], square(10), num_frames=2)[0]["labels"]) == 1
    tiny = Video.from_arrays("tiny", np.zeros((2, 100, 100), np.uint8), masks[:, :1])
    with pytest.raises(SampleError, match="tiny"):
        ClipDataset([tiny], square(10), num_frames=2)[0]


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
    longer = ClipDataset([videos[0]], square(20), num_frames=3)[0]
    with pytest.raises(ValueError, match="one number of frames"):
        ClipCollator()([*clips, longer])
