"""Augmentation of frames and masks."""

import math

import numpy as np
import pytest
import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN as IMAGE_MEAN
from transformers.image_utils import IMAGENET_DEFAULT_STD as IMAGE_STD

from helpers.clips import bright_object_video, draws, square
from samoe_hf.data import ClipDataset, Video, training_transforms
from samoe_hf.data.transforms import IMAGE_FILL, transforms_from_options


def test_frames_and_masks_are_transformed_together():
    transforms = training_transforms(
        flip=1.0, translate=(0.1, 0.1), scale=(0.8, 1.2), jitter=(0,), grayscale=0, frame_jitter=(0,)
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
    ways = {"degrees": 25, "shear": 20, "flip": 1.0, "jitter": (0.5, 0.5, 0.5, 0.2), "grayscale": 1.0}
    for options in ({name: value} for name, value in ways.items()):
        changed = clip(**options)
        assert still(changed), options
        assert not torch.equal(changed["pixel_values"], reference["pixel_values"]), options
    assert not still(clip(frame_jitter=(0.5,)))
    gray = clip(grayscale=1.0)["pixel_values"] * torch.tensor(IMAGE_STD).view(3, 1, 1)
    gray += torch.tensor(IMAGE_MEAN).view(3, 1, 1)
    assert (gray.amax(1) - gray.amin(1)).max() < 1e-5


def test_corners_that_a_rotation_uncovers_become_the_mean():
    video = Video.from_arrays("v", np.full((2, 60, 60), 255, np.uint8), np.ones((2, 1, 60, 60), bool))
    transforms = training_transforms(degrees=(45, 45), shear=0, jitter=0, grayscale=0, frame_jitter=0)
    clip = ClipDataset([video], square(60), num_frames=2, transforms=transforms)[0]
    corner = clip["pixel_values"][0, :, 0, 0] * torch.tensor(IMAGE_STD) + torch.tensor(IMAGE_MEAN)
    assert (255 * corner).round().int().tolist() == list(IMAGE_FILL) and not clip["labels"][0, 0, 0, 0]


def test_an_object_that_a_transform_would_lose_stays():
    masks = np.zeros((2, 2, 60, 60), bool)
    masks[:, 0, :4, :4] = masks[:, 1, 28:32, 28:32] = True  # a turn takes the corner out of the frame
    video = Video.from_arrays("v", np.zeros((2, 60, 60), np.uint8), masks)
    transforms = training_transforms(degrees=(45, 45), shear=0)
    clips = draws(video, 10, num_frames=2, transforms=transforms)
    assert all(len(clip["labels"]) == 2 for clip in clips)


@pytest.mark.parametrize(
    "short, long",
    [
        ({"jitter": (0,), "frame_jitter": (0, 0)}, {"translate": 0, "scale": 0}),
        ({"jitter": 0.2, "frame_jitter": 0.2}, {"jitter": (0.2, 0, 0, 0), "frame_jitter": [0.2]}),
        ({"translate": 0.1, "scale": 0.25}, {"translate": (0.1, 0.1), "scale": (0.75, 1.25)}),
    ],
)
def test_one_number_stands_for_several_in_the_augmentation(short, long):
    off = {"flip": 0, "degrees": 0, "shear": 0, "jitter": 0, "grayscale": 0, "frame_jitter": 0}
    assert str(training_transforms(**off | short)) == str(training_transforms(**off | long))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"flp": 0.5}, "no option 'flp'; did you mean 'flip'"),
        ([0.5], "`augmentation` must be"),
        *(({"flip": x}, "flip") for x in (2, math.nan, "yes", None)),
        *(({"jitter": x}, "jitter") for x in (-1, "a", [0.1, 0.1, 0.1, 0.9], [0] * 4 + [1])),
        *(({"translate": 2}, "translat"), ({"scale": 2}, "scale"), ({"scale": [1]}, "scale")),
    ],
    ids=str,
)
def test_wrong_augmentation_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        transforms_from_options(options)
