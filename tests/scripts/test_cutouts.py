"""Natural videos of cut-outs."""

import numpy as np
import pytest

from cutouts import CutOuts
from helpers.cutouts import write_pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "p.npz")


@pytest.fixture(scope="module")
def videos(pictures) -> CutOuts:
    return CutOuts(pictures, 20, 3, side=64, seed=4)


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


def test_parts_of_an_object_have_other_colours_and_its_outline_stays(pictures):
    whole, parted = CutOuts(pictures), CutOuts(pictures, parts=1.0)
    changed = []
    for seed in range(30):
        one, other = (videos._object(np.random.default_rng(seed)) for videos in (whole, parted))
        assert (one[3] == other[3]).all()
        changed.append(float((one[:3] != other[:3]).any(dim=0).float().mean()))
    assert 0.3 < np.mean(changed) < 0.9


def test_slow_videos_move_less(pictures):
    def change(slow):
        """The mean over objects of how much of the mask changes from the first frame to the third."""
        both = [
            (video.masks(0)[i], video.masks(2)[i])
            for video in CutOuts(pictures, 30, 3, side=64, seed=4, slow=slow)
            for i in range(len(video.object_ids))
        ]
        return np.mean([(a ^ b).sum() / max(1, (a | b).sum()) for a, b in both])

    assert change(1.0) < 0.75 * change(0.0)
