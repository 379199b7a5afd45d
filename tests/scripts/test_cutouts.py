"""Natural videos of cut-outs."""

import numpy as np
import pytest

from cutouts import CutOuts
from helpers.cutouts import write_pictures


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> CutOuts:
    return CutOuts(write_pictures(tmp_path_factory.mktemp("pictures") / "p.npz"), 20, 3, side=64, seed=4)


def test_a_video_depends_on_its_number_alone(videos):
    first, again, other = videos[3], videos[3], videos[4]
    assert np.array_equal(first.frames[1], again.frames[1]) and np.array_equal(first.masks(1), again.masks(1))
    assert not np.array_equal(first.frames[1], other.frames[1])


def test_objects_are_seen_move_and_do_not_overlap(videos):
    moved = 0
    for video in videos:
        masks = np.stack([video.masks(t) for t in range(3)])
        assert video.frames[0].shape == (64, 64, 3) and masks[0].any() and masks.sum(axis=1).max() <= 1
        moved += not np.array_equal(masks[0], masks[2])
    assert moved > 15
