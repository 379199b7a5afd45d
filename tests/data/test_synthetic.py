import numpy as np
import pytest

from samoe_hf.data import SYNTHETIC_DOMAINS, SyntheticVideos


def all_masks(video):
    return np.stack([video.masks(t) for t in range(len(video))])


@pytest.mark.parametrize("domain", SYNTHETIC_DOMAINS)
def test_videos_follow_the_schema_and_depend_on_seed_domain_and_index_alone(domain):
    videos = SyntheticVideos(16, 2, (32, 40), max_objects=4, domain=domain)
    assert {len(video.object_ids) for video in videos} == {1, 2, 3, 4}, "each count occurs"
    for video in videos:
        assert video.domain == domain and video.frames[0].shape == (32, 40, 3) and video.frames[0].dtype == np.uint8
        masks = all_masks(video)
        assert masks.dtype == bool and masks.shape == (2, len(video.object_ids), 32, 40)
        assert masks[0].any(axis=(1, 2)).all(), "every object is seen on the first frame"
        assert masks.sum(axis=1).max() == 1, "masks hold the visible parts only"
    assert len({video.video_id for video in videos}) == 16
    again = SyntheticVideos(9, 2, (32, 40), max_objects=4, domain=domain)[2]
    assert np.array_equal(videos[2].frames[:], again.frames[:])
    assert np.array_equal(all_masks(videos[2]), all_masks(again))
    other = SyntheticVideos(5, 2, (32, 40), max_objects=4, domain=domain, seed=4)[2]
    assert not any(np.array_equal(again.frames[0], video.frames[0]) for video in (other, videos[3]))


def test_objects_move_occlude_each_other_leave_and_return():
    areas = [all_masks(video).sum(axis=(2, 3)) for video in SyntheticVideos(20, 24, (48, 48), max_objects=3)]
    hidden = [object_areas == 0 for video_areas in areas for object_areas in video_areas.T]
    returned = sum(np.any(h[:-1] & ~h[1:]) for h in hidden)
    assert 0.05 < returned / len(hidden) < 0.5

    video = SyntheticVideos(1, 24, (64, 64), max_objects=1)[0]
    centers = [np.argwhere(mask[0]).mean(axis=0) for mask in all_masks(video) if mask.any()]
    assert np.linalg.norm(np.diff(centers, axis=0), axis=1).mean() > 0.3


@pytest.mark.parametrize(
    "domain, mean, area",
    [("shapes", 115.445, 1640.0), ("blobs", 88.773, 1360.2), ("echoes", 92.914, 1750.0), ("stripes", 117.845, 2105.6)],
)
def test_looks_that_others_measure_on_stay_as_they_are(domain, mean, area):
    """Results of a study and of tests depend on them."""
    videos = list(SyntheticVideos(20, 3, (64, 64), domain=domain, seed=1))
    assert np.mean([video.frames[t] for video in videos for t in range(3)]) == pytest.approx(mean, abs=2e-3)
    assert np.mean([all_masks(video).sum() for video in videos]) == pytest.approx(area, abs=0.5)


@pytest.mark.parametrize("domain", ["scenes", "night", "paper"])
def test_scenes_hold_bodies_of_many_sizes_some_of_which_are_no_objects(domain):
    videos = list(SyntheticVideos(60, 1, (64, 64), max_objects=1, domain=domain, seed=1))
    areas = np.array([all_masks(video).sum() for video in videos])
    assert np.quantile(areas, 0.9) > 4 * np.quantile(areas, 0.1)
    brightness = [np.mean(video.frames[0]) for video in videos]
    assert np.std(brightness) > (5 if domain == "paper" else 10)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown synthetic domain 'shape'; there are shapes"):
        SyntheticVideos(1, 1, domain="shape")
    with pytest.raises(ValueError, match="num_frames"):
        SyntheticVideos(1, 0)
    with pytest.raises(IndexError):
        SyntheticVideos(2, 1)[2]
