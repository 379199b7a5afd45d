import numpy as np
import pytest

from samoe_hf.data import SYNTHETIC_DOMAINS, SYNTHETIC_KINDS, SampleError, SyntheticVideos, load_videos


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


def is_away(masks):
    """Whether each object has frames without it between frames with it (N,)."""
    seen = masks.any(axis=(2, 3))
    before, after = np.logical_or.accumulate(seen), np.logical_or.accumulate(seen[::-1])[::-1]
    return (before & after & ~seen).any(axis=0)


def lookalike_share(video):
    """Pixels outside all masks of the first frame in colours of the first object, over its pixels."""
    colours = np.ravel_multi_index(np.moveaxis(video.frames[0] // 32, -1, 0), (8, 8, 8))
    masks = video.masks(0)
    return np.isin(colours[~masks.any(axis=0)], colours[masks[0]]).sum() / masks[0].sum()


@pytest.mark.parametrize("num_frames, size", [(3, (64, 64)), (24, (48, 80)), (60, (40, 40))])
@pytest.mark.parametrize("kind", SYNTHETIC_KINDS)
def test_videos_show_their_kind(kind, num_frames, size):
    videos = list(SyntheticVideos(6, num_frames, size, domain="scenes", kinds=(kind,), seed=3))
    for video in videos:
        masks, changes = all_masks(video), np.abs(np.diff(np.stack(video.frames[:]).astype(int), axis=0))
        seen = masks.any(axis=(2, 3))
        assert kind in video.video_id and len(video) == num_frames and video.size == size
        assert masks.sum(axis=1).max() == 1 and seen.any(axis=0).all()
        assert seen[0].all() == (kind != "late")
        if kind == "late" and len(video.object_ids) > 1:
            assert seen[0].tolist() == [True] + [False] * (len(video.object_ids) - 1)
        if kind in ("return", "occlusion"):
            assert is_away(masks).all()
        if kind == "cut":
            cuts = np.sort(changes.mean(axis=(1, 2, 3)))
            assert cuts[-2] > 20, "all is different twice"
            assert seen.mean() > 0.8
    again = SyntheticVideos(2, num_frames, size, domain="scenes", kinds=[kind], seed=3)[1]
    assert np.array_equal(again.frames[:], videos[1].frames[:])
    assert np.array_equal(all_masks(again), all_masks(videos[1]))


def test_doubles_look_like_objects_and_are_none():
    doubles = [lookalike_share(video) for video in SyntheticVideos(20, 1, (96, 96), kinds=["double"])]
    others = [lookalike_share(video) for video in SyntheticVideos(20, 1, (96, 96))]
    assert min(doubles) > 0.4 and np.median(others) < 0.2


def test_kinds_take_turns_and_come_from_options():
    videos = load_videos("synthetic", num_videos=5, num_frames=4, image_size=[32, 32], kinds=["late", "cut"])
    assert [video.video_id.split("_")[1] for video in videos] == ["late", "cut", "late", "cut", "late"]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown synthetic domain 'shape'; there are shapes"):
        SyntheticVideos(1, 1, domain="shape")
    with pytest.raises(ValueError, match="num_frames"):
        SyntheticVideos(1, 0)
    with pytest.raises(ValueError, match="unknown kind 'lat' of synthetic videos; there are late, return"):
        SyntheticVideos(1, 9, kinds=["lat"])
    with pytest.raises(ValueError, match="`kinds` must be a list of str, not 'late'"):
        SyntheticVideos(1, 9, kinds="late")
    with pytest.raises(ValueError, match="'return' videos need num_frames of at least 3, not 2"):
        SyntheticVideos(1, 2, kinds=["return"])
    with pytest.raises(SampleError, match=r"no shapes_occlusion video in 100 tries with 3 frames of \(1, 1\)"):
        SyntheticVideos(1, 3, (1, 1), kinds=["occlusion"])[0]
    with pytest.raises(IndexError):
        SyntheticVideos(2, 1)[2]
