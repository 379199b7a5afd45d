"""Tests of the metrics: DAVIS' own figures, straightforward loops over frames and objects, and edge cases."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from helpers.reference import ROOT
from samoe_hf.evaluation import geometry, metrics

SHARED = ROOT.parent / "shared"
DAVIS = SHARED / "data" / "davis" / "Annotations" / "480p"
DAVIS_FIGURES = SHARED / "reference" / "metrics"
NAMES = ("j", "f", "dice", "boundary_iou")


# --- Straightforward scores of one pair of masks, on whole frames


def boundary(mask):
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def band(mask):
    width = max(1, round(0.02 * math.hypot(*mask.shape)))
    return mask & ~ndimage.binary_erosion(mask, np.ones((2 * width + 1, 2 * width + 1)))


def simple_scores(prediction, target):
    """J, F, Dice and boundary IoU of one pair of masks."""
    both, union, total = (prediction & target).sum(), (prediction | target).sum(), prediction.sum() + target.sum()
    bands = band(prediction), band(target)
    band_union = (bands[0] | bands[1]).sum()
    radius, edges = math.ceil(0.008 * math.hypot(*target.shape)), (boundary(prediction), boundary(target))
    if edges[0].any() and edges[1].any():
        near = [ndimage.distance_transform_edt(~one) <= radius for one in edges]
        precision, recall = near[1][edges[0]].mean(), near[0][edges[1]].mean()
        f = 2 * precision * recall / max(precision + recall, 1e-12)
    else:
        f = float(edges[0].any() == edges[1].any())
    shares = (both, union), (2 * both, total), ((bands[0] & bands[1]).sum(), band_union)
    j, dice, boundary_iou = (part / whole if whole else 1.0 for part, whole in shares)
    return j, f, dice, boundary_iou


def assert_scores_of_pairs(scores, prediction, target):
    """Compares with the scores of masks (T, N, H, W), one pair at a time."""
    pairs = zip(prediction.reshape(-1, *target.shape[2:]), target.reshape(-1, *target.shape[2:]), strict=True)
    expected = np.array([simple_scores(*pair) for pair in pairs]).T.reshape(4, *target.shape[:2])
    for name, values in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose(getattr(scores, name), values, rtol=0, atol=1e-12, err_msg=name)


# --- Videos to score


def ellipses(num_frames, num_objects, height, width, seed=0):
    """Id maps of ellipses that drift, overlap, leave the frame and come back, each frame disturbed a little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centre, speed = rng.uniform(0, 1, (num_objects, 2)), rng.uniform(-0.02, 0.02, (num_objects, 2))
    radius = rng.uniform(0.06, 0.2, (num_objects, 2))
    video = np.zeros((num_frames, height, width), dtype=np.uint8)
    for frame, n in itertools.product(range(num_frames), range(num_objects)):
        cy, cx = (centre[n] + speed[n] * frame + rng.normal(0, 0.01, 2)) * (height, width)
        ry, rx = radius[n] * (height, width)
        video[frame][((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = n + 1
    return video


def squares(*positions, size=6, shape=(24, 32), object_id=1):
    """Id maps with one square per frame, its upper left corner at the position (y, x), or none."""
    video = np.zeros((len(positions), *shape), dtype=np.uint8)
    for frame, position in zip(video, positions, strict=True):
        if position is not None:
            frame[position[0] : position[0] + size, position[1] : position[1] + size] = object_id
    return video


HERE, FAR = (4, 4), (14, 20)


# --- DAVIS' own figures


@pytest.mark.skipif(not DAVIS_FIGURES.is_dir() or not DAVIS.is_dir(), reason="needs ../shared: DAVIS and its figures")
@pytest.mark.parametrize("sequence", ["blackswan", "bmx-trees"])
def test_davis_own_figures(sequence):
    figures = json.loads((DAVIS_FIGURES / "davis_jf.json").read_text())[sequence]
    paths = sorted((DAVIS / sequence).glob("*.png"))
    prediction, target = (
        np.stack([np.array(Image.open(folder / path.name)) for path in paths])
        for folder in (DAVIS_FIGURES / "predictions" / sequence, DAVIS / sequence)
    )
    scores = metrics.score_video(prediction, target)
    assert scores.object_ids == (255,)
    np.testing.assert_allclose(scores.j[:, 0], figures["J"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(scores.f[:, 0], figures["F"], rtol=0, atol=1e-6)
    summary = metrics.summarize({sequence: scores}, "davis")
    assert summary["J_mean"] == pytest.approx(figures["J_mean"], abs=1e-6)
    assert summary["F_mean"] == pytest.approx(figures["F_mean"], abs=1e-6)
    assert summary["J&F_mean"] == pytest.approx((figures["J_mean"] + figures["F_mean"]) / 2, abs=1e-6)


# --- MOSEv2's own figures


def hard_video(size, seed):
    """Prediction and target: objects that come late, go, come again once or twice, and are found at times."""
    target, other = (ellipses(20, 4, *size, seed=one) for one in (seed, seed + 1))
    prediction = np.roll(target, (1, 1), (1, 2))
    prediction[::3], prediction[8:11] = other[::3], 0
    for object_id, away in ((1, [0, 1, 2, 9, 10, 11, 12]), (2, [6, 7, *range(13, 20)]), (3, [1, 5])):
        target[away] = np.where(target[away] == object_id, 0, target[away])
    return prediction, target


# Of score.py and metricsv2.py of MOSE-api at commit 241977a, with OpenCV 5.0.0 and scikit-image 0.26.0: of each object
# J, Ḟ, J&Ḟ, J&Ḟ_d and J&Ḟ_r; the last object never goes.
NAN = math.nan
MOSE_FIGURES = {
    ((150, 210), 5): [
        [0.404464, 0.3819479, 0.393206, 0.5004446, 0.4035167],
        [0.2425624, 0.2430984, 0.2428304, 0.0004989, 0.175778],
        [0.3915022, 0.3223954, 0.3569488, 0.0005139, 0.4560692],
        [0.5024115, 0.4612712, 0.4818414, NAN, NAN],
    ],
    ((60, 80), 3): [
        [0.4047303, 0.2074259, 0.3060781, 0.5037471, 0.2907582],
        [0.3950967, 0.2480392, 0.3215679, 0.4179287, 0.1114273],
        [0.3100592, 0.0779352, 0.1939972, 0.0027933, 0.2434739],
        [0.4303017, 0.1555556, 0.2929286, NAN, NAN],
    ],
}


@pytest.mark.parametrize("size, seed", MOSE_FIGURES)
def test_mosev2_own_figures(size, seed):
    scores = metrics.score_video(*hard_video(size, seed), object_ids=range(1, 5))
    rows = metrics.score_objects({"video": scores}, "davis")
    names = ("J_mose", "F_mose", "J&F_mose", "J&F_disappear", "J&F_reappear")
    found = [[row[name] for name in names] for row in rows]
    np.testing.assert_allclose(found, MOSE_FIGURES[size, seed], rtol=0, atol=1e-6)


# --- Against the loops


@pytest.mark.parametrize("shape", [(60, 80), (9, 150), (3, 3)])
def test_id_maps_agree_with_loop(shape):
    prediction, target = (ellipses(6, 4, *shape, seed=seed) for seed in (0, 1))
    prediction[2:] = target[2:]
    prediction[2:, 1::7] = 0  # thin cuts: many boundaries that differ a little
    scores = metrics.score_video(prediction, target, object_ids=(1, 2, 3, 4))
    masks = (video[:, None] == np.reshape(scores.object_ids, (1, -1, 1, 1)) for video in (prediction, target))
    assert_scores_of_pairs(scores, *masks)


def test_overlapping_masks_agree_with_loop():
    rng = np.random.default_rng(0)
    # Noise, coarse blobs that touch the border, and full frames.
    noise = rng.random((2, 3, 2, 40, 50)) > 0.9
    blobs = np.kron(rng.random((2, 3, 2, 4, 5)) > 0.4, np.ones((10, 10))).astype(bool)
    prediction, target = np.concatenate([noise, blobs, np.ones((2, 3, 1, 40, 50), dtype=bool)], axis=2)
    scores = metrics.score_video(torch.from_numpy(prediction), torch.from_numpy(target))
    assert scores.object_ids == (1, 2, 3, 4, 5)
    assert_scores_of_pairs(scores, prediction, target)


# --- Edge cases of one video


def test_masks_on_one_side_score_0_and_on_neither_1():
    scores = metrics.score_video(squares(None, HERE, None), squares(None, None, HERE))
    for name in (*NAMES, "jf"):
        assert getattr(scores, name).ravel().tolist() == [1, 0, 0], name
    none = metrics.score_video(squares(None, None, None), squares(None, None, None))
    assert none.object_ids == () and none.j.shape == (3, 0)
    summary = metrics.summarize({"empty": none})
    assert summary["num_objects"] == 0
    assert all(math.isnan(summary[name]) for name in ("J_mean", "F_mean", "dice"))


@pytest.mark.parametrize("protocol", ["davis", "sav"])
def test_videos_of_two_frames_do_not_count(protocol):
    short = metrics.score_video(squares(HERE, HERE), squares(HERE, HERE))
    long = metrics.score_video(squares(HERE, HERE, HERE), squares(FAR, FAR, FAR))
    summary = metrics.summarize({"short": short, "long": long}, protocol)
    assert summary["num_videos"] == 1 and summary["J_mean"] == 0
    assert math.isnan(metrics.score_objects({"short": short}, protocol)[0]["J_decay"])
    assert metrics.summarize({"short": short}, "all")["J&F_mean"] == 1


def test_ids_that_skip():
    target, prediction = squares(HERE, HERE, object_id=3), squares(HERE, FAR, object_id=3)
    target[:, 20:, :4] = 200
    prediction[:, 20:, :4] = 200
    prediction[:, 0, :] = 77  # an id that the target never shows
    scores = metrics.score_video(prediction, target)
    assert scores.object_ids == (3, 200)
    assert scores.j.tolist() == [[1, 1], [0, 1]] and scores.f.tolist() == [[1, 1], [0, 1]]
    assert metrics.score_video(prediction, target, object_ids=(77, 3)).j.tolist() == [[0, 1], [0, 0]]
    many = (prediction.astype(np.int32) * 300, target.astype(np.int32) * 300)
    assert metrics.score_video(*many).object_ids == (900, 60000)
    negative = np.where(target == 3, 3, -1)  # background, as 0 is
    assert metrics.score_video(negative, negative).object_ids == (3,)


@pytest.mark.parametrize(
    ("prediction", "arguments", "message"),
    [
        (squares(HERE).astype(float), {}, "prediction is neither integer"),
        (squares(HERE, HERE), {}, r"\(2, 24, 32\) and \(1, 24, 32\)"),
        (squares(HERE), {"object_ids": (1, 1)}, "distinct"),
        (squares(HERE), {"object_ids": (0, 1)}, "above 0"),
        (squares(HERE), {"object_scores": np.zeros((2, 1))}, r"\(1, 1\), not \(2, 1\)"),
    ],
)
def test_wrong_arguments_are_refused(prediction, arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics.score_video(prediction, squares(HERE), **arguments)
    for spacing, tolerance in (((1, 1), 1), ((1, 0, 1), 1), ((1, 1, 1), -1), ((1, 1, math.nan), 1)):
        with pytest.raises(ValueError, match="three positive spacings"):
            metrics.surface_dice(squares(HERE), squares(HERE), spacing, tolerance)


# --- Sets of videos


def video_scores(j, in_target=None, in_prediction=None, object_ids=(1,), object_scores=None):
    """Scores with the given J (T, N), which F equals, for masks of 100 pixels where they are not empty."""
    j = np.array(j, dtype=float).reshape(-1, len(object_ids))
    in_target, in_prediction = (
        np.ones(j.shape, dtype=int) if mask is None else np.array(mask).reshape(j.shape)
        for mask in (in_target, in_prediction)
    )
    # Equal areas and an intersection of 2J / (1 + J) of them have the IoU J.
    intersection = 100 * 2 * j / (1 + j) * in_target * in_prediction
    return metrics.VideoScores(object_ids, intersection, 100 * in_prediction, 100 * in_target, j, j, j, object_scores)


def test_mean_recall_and_decay():
    values = [0.0, 0.9, 0.8, 0.7, 0.6, 0.55, 0.4, 0.3, 0.1, 0.0]
    (row,) = metrics.score_objects({"video": video_scores(values)}, "davis")
    # Of the eight frames in between, the bins' limits are frames 1, 3, 5, 6 and 8.
    expected = {"mean": 4.35 / 8, "recall": 5 / 8, "decay": (0.9 + 0.8 + 0.7) / 3 - (0.4 + 0.3 + 0.1) / 3}
    for name, score in itertools.product(expected, ("J", "F", "J&F")):
        assert row[f"{score}_{name}"] == pytest.approx(expected[name]), (score, name)
    assert row["num_frames"] == 8
    # More frames than eight bits count: the last bin begins with the frame before the drop.
    (row,) = metrics.score_objects({"video": video_scores([1.0] * 302 + [0.0] * 100)}, "all")
    assert row["J_decay"] == pytest.approx(1 - 1 / 101)


PROTOCOL_FRAMES = {"davis": [1, 2, 3, 4], "sav": [2, 3, 4], "youtube_vos": [4, 5], "all": [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize("protocol", PROTOCOL_FRAMES)
def test_protocols(protocol):
    """The first object is predicted from frame 2 and annotated from frame 3 on; the second appears nowhere."""
    in_target, in_prediction = [0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 0, 1]
    empty = [0] * 6
    scores = video_scores(
        np.ones((6, 2)), np.stack([in_target, empty], 1), np.stack([in_prediction, empty], 1), object_ids=(4, 9)
    )
    counted = metrics.counted_frames(scores, protocol)
    assert np.flatnonzero(counted[:, 0]).tolist() == PROTOCOL_FRAMES[protocol]
    assert counted[:, 1].any() == (protocol in ("davis", "all"))
    with pytest.raises(ValueError, match="'mose'; known are davis, sav, youtube_vos, all"):
        metrics.counted_frames(scores, "mose")


def test_a_summary_is_of_the_frames_that_count():
    prediction, target = squares(FAR, HERE, HERE, FAR), squares(HERE, HERE, (4, 6), HERE)
    summary = metrics.summarize({"video": metrics.score_video(prediction, target)}, "davis")
    assert summary["num_frames"] == 2 and summary["dice"] == pytest.approx((1 + 48 / 72) / 2)


# --- Volumes


def simple_surface_dice(prediction, target, spacing, tolerance):
    """Surface Dice from all distances between corners of voxels that belong to the surface."""
    points, areas = [], []
    for mask in (prediction, target):
        padded = np.pad(mask, 1).astype(float)
        cells = np.lib.stride_tricks.sliding_window_view(padded, (2, 2, 2))
        corner = np.argwhere((cells.mean((3, 4, 5)) % 1) != 0)
        cells = cells[tuple(corner.T)]
        sides = [np.diff(cells, axis=axis).sum((1, 2, 3)) / 4 for axis in (1, 2, 3)]
        faces = spacing[1] * spacing[2], spacing[0] * spacing[2], spacing[0] * spacing[1]
        points.append(corner * spacing)
        areas.append(np.sqrt(sum((side * face) ** 2 for side, face in zip(sides, faces, strict=True))))
    distance = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    close = [areas[0][distance.min(1) <= tolerance], areas[1][distance.min(0) <= tolerance]]
    return sum(area.sum() for area in close) / sum(area.sum() for area in areas)


@pytest.mark.parametrize("tolerance", [0.0, 0.75, 5.0])
def test_surface_dice_agrees_with_all_distances(tolerance):
    rng = np.random.default_rng(0)
    target = np.kron(rng.random((4, 3, 4)) > 0.6, np.ones((2, 4, 3))).astype(bool)
    prediction = target ^ (rng.random(target.shape) > 0.97)
    spacing = (2.5, 0.7, 0.9)
    expected = simple_surface_dice(prediction, target, np.array(spacing), tolerance)
    masks = prediction[:, None], target[:, None]
    assert metrics.surface_dice(*masks, spacing, tolerance) == pytest.approx([expected])
    ids = prediction * np.uint8(6), target * np.uint8(6)
    assert metrics.surface_dice(*ids, spacing, tolerance) == pytest.approx([expected])


def test_surface_dice_counts_spacing_and_area():
    target = np.zeros((6, 30, 30), dtype=np.uint8)
    target[1:4, 5:25, 5:25] = 1
    taller, wider = target.copy(), target.copy()
    taller[4, 5:25, 5:25] = 1
    wider[1:4, 25, 5:25] = 1
    spacing = (5.0, 0.5, 0.5)
    assert metrics.surface_dice(target, target, spacing, 0) == 1
    assert metrics.surface_dice(wider, target, spacing, 0.5) == 1  # one voxel of half a millimetre off
    assert metrics.surface_dice(taller, target, spacing, 4.9) < 0.9  # one voxel of five millimetres off
    assert metrics.surface_dice(taller, target, spacing, 5.0) == 1
    areas = geometry.surface_points(target.astype(bool), spacing)[1].sum()
    assert areas == pytest.approx(2 * 10 * 10 + 4 * 10 * 15, rel=0.05)


def test_occlusion_accuracy():
    present = [1, 1, 0, 0, 1]
    logits = torch.tensor([[3.0], [-1.0], [-2.0], [0.5], [0.1]], dtype=torch.bfloat16)
    target = squares(*[HERE if there else None for there in present])
    scores = metrics.score_video(target, target, object_scores=logits)
    assert scores.occlusion_correct.ravel().tolist() == [1, 0, 1, 0, 1]
    assert metrics.summarize({"video": scores}, "davis")["occlusion_accuracy"] == pytest.approx(1 / 3)
    assert math.isnan(metrics.summarize({"video": metrics.score_video(target, target)})["occlusion_accuracy"])
