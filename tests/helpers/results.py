"""Small videos, predictions and results for tests of evaluation."""

import numpy as np

from samoe_hf.data import Video
from samoe_hf.evaluation.evaluate import VideoResult
from samoe_hf.evaluation.metrics import VideoScores, summarize
from samoe_hf.evaluation.simulated_user import PredictedFrame


def random_video(seed=0, num_frames=5, **options):
    """Two objects under the ids 2 and 300, of which the second is away at first and once later."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num_frames, 2, 24, 32), dtype=bool)
    for t in range(num_frames):
        y, x = rng.integers(0, 10, 2)
        masks[t, 0, y : y + 8, x : x + 7] = True
        masks[t, 1, y : y + 5, x + 12 : x + 20] = True
    masks[[0, 3], 1] = False
    frames = rng.integers(0, 255, (num_frames, 24, 32, 3), dtype=np.uint8)
    return Video.from_arrays(f"video {seed}", frames, masks, [2, 300], **options)


def perturbed(video, seed=1):
    """Predictions of all frames: the truth, moved."""
    rng = np.random.default_rng(seed)
    shifts = rng.integers(-2, 3, (len(video), 2))
    return [
        PredictedFrame(t, np.roll(video.masks(t), shifts[t], (1, 2)), rng.normal(size=2).astype(np.float32))
        for t in range(len(video))
    ]


def assert_same_scores(a, b):
    assert a.object_ids == tuple(b.object_ids)
    for name in ("intersection", "prediction_area", "target_area", "f", "boundary_iou", "f_adaptive", "object_scores"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def make_result(j, video="v", domain="d", target=None, frames=None, seconds=2.0, object_ids=None, surface_dice=None):
    """A result with the given J (T, N) of objects of 100 pixels in images of 10 000; F is J squared."""
    j = np.asarray(j, dtype=float)
    target = np.full(j.shape, 100) if target is None else np.asarray(target)
    intersection = np.rint(j * target).astype(int)
    ids = tuple(object_ids or range(1, j.shape[1] + 1))
    scores = VideoScores(ids, intersection, intersection, target, j**2, j / 2, j**3, surface_dice=surface_dice)
    frames = list(range(len(j))) if frames is None else frames
    return VideoResult(video, domain, scores, frames, frames[-1] + 1, 10_000, seconds)


def mean_j(results):
    """Mean J over objects of what `evaluate_videos` gives."""
    return summarize({key: result.scores for key, result in results.items()}, "youtube_vos")["J_mean"]
