"""Videos are scored frame by frame as a whole, and stopped evaluations go on with what is left."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from helpers.edgetam import slow_over_bases
from helpers.results import assert_same_scores, perturbed, random_video
from samoe_hf.data import SyntheticVideos, Video, write_palette_png
from samoe_hf.data.annotations import MaskArrays
from samoe_hf.data.frames import ArrayFrames, SampleError
from samoe_hf.data.predictions import MaskFiles
from samoe_hf.evaluation.evaluate import (
    VideoResult,
    VideoScorer,
    evaluate_masks,
    evaluate_video,
    evaluate_videos,
    evaluation_steps,
    score_predictions,
    segment_video,
)
from samoe_hf.evaluation.metrics import score_video, surface_dice
from samoe_hf.evaluation.simulated_user import PredictedFrame
from samoe_hf.together import Together


@pytest.fixture(scope="module")
def video():
    return SyntheticVideos(1, 5, (96, 128), seed=3)[0]


def test_frames_are_scored_one_by_one_as_the_video_is_as_a_whole():
    video = random_video(spacing=(0.5, 0.75, 5.0))
    predictions, written = perturbed(video), []
    scorer = VideoScorer(video, 1.5, lambda v, t, masks: written.append((v, t, masks.sum())))
    for frame in predictions:
        scorer.add(frame)
    result = scorer.result()
    predicted = np.stack([frame.masks for frame in predictions])
    target = np.stack([video.masks(t) for t in range(len(video))])
    logits = np.stack([frame.scores for frame in predictions])
    assert_same_scores(result.scores, score_video(predicted, target, [2, 300], logits))
    np.testing.assert_allclose(result.scores.surface_dice, surface_dice(predicted, target, (5.0, 0.75, 0.5), 1.5))
    assert 0 < result.scores.surface_dice.min() < result.scores.surface_dice.max() < 1
    assert written == [(video, t, predicted[t].sum()) for t in range(5)]
    assert result.frames == [0, 1, 2, 3, 4] and result.image_area == 24 * 32 and result.num_frames == 5
    masks = target[[0, 2, 3]]
    sparse = Video("sparse", video.frames, MaskArrays(masks, [2, 300], frames=[0, 2, 3]))
    result = score_predictions(sparse, predictions)
    assert result.frames == [0, 2, 3] and result.scores.surface_dice is None
    np.testing.assert_array_equal(result.scores.j, score_video(predicted[[0, 2, 3]], masks).j)


def test_many_objects_of_a_volume_are_scored_one_after_another():
    masks = np.repeat(np.arange(4)[:, None] == np.arange(60) % 4, 96 * 96).reshape(4, 60, 96, 96)
    volume = Video.from_arrays("v", np.zeros((4, 96, 96), np.uint8), masks, spacing=(1.0, 1.0, 1.0))
    tracemalloc.start()
    result = score_predictions(volume, (PredictedFrame(t, masks[t], None) for t in range(4)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * masks.nbytes and (result.scores.surface_dice == 1).all()


@slow_over_bases
def test_a_model_is_scored_on_what_it_tracks(nano, processor, video):
    masks, scores = segment_video(nano.model, processor, video)
    assert masks.shape == (5, len(video.object_ids), 96, 128) and np.isfinite(scores).all()
    written = {}
    write = {"overlapping": True, "write": lambda v, t, m: written.update({t: m.copy()})}
    with Together(nano.model) as together:
        (result,) = together.run([evaluation_steps(together, processor, video, **write)])
    np.testing.assert_array_equal(np.stack([written[t] for t in range(5)]), masks)
    target = np.stack([video.masks(t) for t in range(5)])
    assert_same_scores(result.scores, score_video(masks, target, video.object_ids, scores))
    assert (
        np.isnan(result.scores.doubts).tolist()
        == [[True] * len(video.object_ids)] + [[False] * len(video.object_ids)] * 4
    )
    assert (result.scores.iou_scores[0] == 1).all() and np.isfinite(result.scores.iou_scores).all()
    assert result.seconds > 0 and [given["mask"] for given in result.prompts] == [True] * len(video.object_ids)
    alone = evaluate_video(nano.model, processor, video).scores
    assert (alone.prediction_area.sum(axis=1) == masks.any(axis=1).sum(axis=(1, 2))).all()

    results = evaluate_videos(nano.model, processor, [video], show_progress_bar=False)
    assert_same_scores(results[f"shapes/{video.video_id}"].scores, alone)


def test_videos_of_one_frame_or_without_objects_are_scored_and_others_refused(nano, processor):
    one = SyntheticVideos(1, 1, (96, 128), seed=3)[0]
    (result,) = evaluate_videos(nano.model, processor, [one], False, "clicks:2@3:offline").values()
    assert result.scores.j.shape == (1, len(one.object_ids))
    frames = ArrayFrames(np.zeros((2, 32, 32, 3), np.uint8))
    none = Video("empty", frames, MaskArrays(np.zeros((2, 0, 32, 32), bool), []), spacing=(1, 1, 2))
    for prompt in ("mask", "clicks:2@3:look", "box@3:even"):
        (result,) = evaluate_videos(nano.model, processor, [none], False, prompt).values()
        assert result.scores.j.shape == (2, 0) and result.scores.surface_dice.shape == (0,)
    bare = Video("bare", frames, MaskArrays(np.zeros((0, 1, 32, 32), bool), [1], frames=[]))
    nano.model.train()
    nano.model.vision_encoder.eval()
    try:
        with pytest.raises(ValueError, match="bare: no frame is annotated"):
            evaluate_videos(nano.model, processor, [bare], show_progress_bar=False)
        assert nano.model.training and not nano.model.vision_encoder.training
    finally:
        nano.model.eval()


def test_results_are_read_as_they_were_written(tmp_path):
    video = random_video(spacing=(0.5, 0.75, 5.0), domain="ct")
    given = {"object_id": 2, "frame_idx": 0, "points": [[3.0, 4.0]], "labels": [1], "box": None, "mask": False}
    result = replace(score_predictions(video, perturbed(video)), prompts=[given], seconds=math.nan)
    result.save(tmp_path / "a" / "b.npz")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.npz"]
    read = VideoResult.load(tmp_path / "a" / "b.npz")
    assert_same_scores(read.scores, result.scores)
    np.testing.assert_array_equal(read.scores.surface_dice, result.scores.surface_dice)
    assert read.key == "ct/video 0" and read.frames == result.frames and read.prompts == [given]
    assert math.isnan(read.seconds)


# --- Masks that were written before


@pytest.mark.parametrize("layout", ["davis", "youtube_vos", "sa_v"])
def test_written_masks_get_the_scores_of_the_masks(layout, tmp_path):
    video, files = random_video(), MaskFiles(tmp_path, layout)
    predictions = perturbed(video)
    for frame in predictions:
        files.write(video, frame.frame_idx, frame.masks)
    result = evaluate_masks(video, files)
    expected = score_predictions(video, predictions)
    np.testing.assert_array_equal(result.scores.j, expected.scores.j)
    np.testing.assert_array_equal(result.scores.f, expected.scores.f)
    assert result.scores.object_scores is None and math.isnan(result.seconds)
    assert np.isnan(result.scores.occlusion_correct).all()


def test_predictions_with_other_ids_are_not_taken_for_empty_ones(tmp_path):
    video, files = random_video(), MaskFiles(tmp_path)
    for t in range(len(video)):
        files.write(video, t, np.zeros_like(video.masks(t)))
    assert evaluate_masks(video, files).scores.j[:, 0].tolist() == [0] * len(video)
    (path,) = files.paths(video, 2, video.object_ids)
    write_palette_png(path, 7 * video.masks(2)[0])
    with pytest.raises(ValueError, match="video 0 have the values 7, and its objects the ids 2, 300, of which none"):
        evaluate_masks(video, files)
    soft = np.zeros(video.size, np.uint8)
    soft[4:9, 4:9] = np.minimum.outer([60, 120, 255, 120, 60], [60, 120, 255, 120, 60])
    Image.fromarray(soft).save(path)
    with pytest.raises(ValueError, match=r"00002\.png: a prediction with soft edges"):
        evaluate_masks(video, files)


def test_missing_predictions_and_those_of_another_size_are_refused(tmp_path):
    video, files = random_video(), MaskFiles(tmp_path)
    for t in (0, 2, 4):
        files.write(video, t, video.masks(t))
    with pytest.raises(FileNotFoundError, match=r"2 of 5 .* missing: video 0/00001\.png, video 0/00003\.png"):
        evaluate_masks(video, files)
    for t in (1, 3):
        write_palette_png(tmp_path / "video 0" / f"{t:05d}.png", np.zeros((24, 31), dtype=np.uint8))
    with pytest.raises(SampleError, match=r"00001.png: prediction of size \(24, 31\), but the video's is \(24, 32\)"):
        evaluate_masks(video, files)
