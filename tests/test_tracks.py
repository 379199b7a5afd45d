"""The table of what tracking says of each object, and its file."""

import numpy as np
import pytest
import torch

from samoe_hf.data import SyntheticVideos
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.model.prompt_recipe import bounding_boxes
from samoe_hf.model.tracking import SamoeTrackingOutput
from samoe_hf.tracks import ObjectScores, TrackRow, read_tracks, track_rows, write_tracks

SCORES = ObjectScores(np.array([0.9, 0.25]), np.array([0.8, 0.1]), np.array([1.0, 0.5]))


def test_scores_are_from_0_to_1():
    masks = torch.full((3, 1, 2, 4), -9.0)
    masks[0], masks[1, 0, 0] = 2.0, torch.tensor([2.0, 0.5, -0.5, -2.0])
    output = SamoeTrackingOutput(
        object_ids=[1, 2, 3],
        pred_masks=masks,
        object_score_logits=torch.tensor([[0.0], [2.0], [-1024.0]]),
        iou_scores=torch.tensor([[1.1], [0.5], [-0.1]]),
    )
    scores = ObjectScores.of(output)
    assert scores.score == pytest.approx([0.5, 0.8808, 0], abs=1e-4)
    assert scores.iou.tolist() == [1, 0.5, 0]
    assert scores.stability == pytest.approx([1, 1 / 3, 1]), "an empty mask is a stable one"


def test_rows_say_where_an_object_is():
    masks = np.zeros((2, 6, 9), dtype=bool)
    masks[0, 2, 3:6] = masks[0, 3, 3] = True
    first, second = track_rows(4, [7, 9], SCORES, masks, 1 / 3, [9])
    assert first == TrackRow(4, 0.333, 7, 0.9, 0.8, 1.0, 4, 3, 2, 5, 3, 3.75, 2.25, False)
    assert (first.x0, first.y0, first.x1, first.y1) == tuple(bounding_boxes(torch.from_numpy(masks[:1]))[0].tolist())
    assert second == TrackRow(4, 0.333, 9, 0.25, 0.1, 0.5, 0, *[None] * 6, True)
    assert first.seen and not second.seen


def test_a_file_gives_back_the_rows_in_the_order_of_frames(tmp_path):
    masks = np.zeros((2, 6, 9), dtype=bool)
    masks[0, 1:3] = True
    later, earlier = (track_rows(t, [2, 1], SCORES, masks, time, [1]) for t, time in ((11, 0.5), (2, None)))
    write_tracks(tmp_path / "tracks.csv", later + earlier)
    assert read_tracks(tmp_path / "tracks.csv") == earlier[::-1] + later[::-1]
    text = (tmp_path / "tracks.csv").read_text()
    (tmp_path / "tracks.csv").write_text(text, encoding="utf-8-sig")  # as Excel does
    assert read_tracks(tmp_path / "tracks.csv") == earlier[::-1] + later[::-1]
    lines = text.splitlines()
    assert lines[0] == "frame,time,object,score,iou,stability,area,x0,y0,x1,y1,cx,cy,prompted"
    assert lines[1] == "2,,1,0.25,0.1,0.5,0,,,,,,,1" and len(lines) == 5


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must be a tracks.csv with the columns frame,time"),
        ("frame,object\n1,2\n", "must be a tracks.csv with the columns frame,time"),
        ("{}\n1,,1,0.5,0.5,0.5,0,,,,,,,0\n,,1,0.5,0.5,0.5,0,,,,,,,0\n", "line 3: not a line of a tracks.csv"),
        ("{}\n1,,1,high,0.5,0.5,0,,,,,,,0\n", "line 2: not a line of a tracks.csv"),
        ("{}\n1,,1,0.5\n", "line 2: not a line of a tracks.csv"),
    ],
)
def test_another_file_is_refused(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text.format(",".join(TrackRow._fields)))
    with pytest.raises(ValueError, match=rf"a\.csv.*{message}"):
        read_tracks(tmp_path / "a.csv")


def test_tracking_gives_scores_of_each_object(nano):
    video = SyntheticVideos(1, 3, (96, 128), max_objects=1, seed=3)[0]
    prompts = [VideoPrompt(5, 1, mask=video.masks(1)[0]), VideoPrompt(2, 0, box=(10, 10, 60, 60))]
    for frame in track_video(nano.model, build_processor(nano.model.config), video.frames, prompts):
        assert all(one.shape == (2,) and one.dtype == np.float32 for one in frame.scores)
        rows = frame.rows((mask > 0 for mask in frame.logits.numpy()), video.frames.time(frame.frame_idx), prompts)
        assert [(row.object, row.prompted) for row in rows] == [(5, frame.frame_idx == 1), (2, frame.frame_idx == 0)]
        if frame.frame_idx == 1:
            assert rows[0].iou == rows[0].score == 1, "a mask that was given"
