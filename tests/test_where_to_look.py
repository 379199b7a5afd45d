"""Frames that are worth a look: those on which something goes wrong, and nothing else."""

import numpy as np
import pytest

from samoe_hf.tracks import TrackRow
from samoe_hf.where_to_look import doubts, where_to_look


def calm(num_frames=60, object_id=1, prompted=(0,)):
    """An object that is surely there, and stands still."""
    return [
        TrackRow(t, t / 10, object_id, 0.99, 0.95, 0.95, 100, 0, 0, 9, 9, 4.5, 4.5, t in prompted)
        for t in range(num_frames)
    ]


def changed(rows, frames, **values):
    return [row._replace(**values) if row.frame in frames else row for row in rows]


GONE = {"area": 0, "x0": None, "y0": None, "x1": None, "y1": None, "cx": None, "cy": None}


def test_nothing_stands_out_in_a_calm_video():
    assert where_to_look(calm()) == []
    assert where_to_look([]) == []
    assert len(where_to_look(calm(), 3, least=0)) == 3


@pytest.mark.parametrize(
    "frames, values, first, reason",
    [
        (range(31, 60), {"score": 0.31, **GONE}, 31, "object 1 may be lost: it is still seen on frame 30, score 0.31"),
        (range(31, 60), {"score": 0.7, **GONE}, 31, "object 1 may be lost: it has no mask, score 0.70"),
        (range(31, 60), {"area": 400}, 31, "object 1 jumps: its area is 4.00 times that on frame 30"),
        (range(31, 60), {"area": 25}, 31, "object 1 jumps: its area is 0.25 times that on frame 30"),
        (range(31, 60), {"cx": 54.5}, 31, "object 1 jumps: it is 5.0 times its size away from frame 30"),
        (range(31, 60), {"iou": 0.2}, 31, "object 1 has an uncertain mask: expected IoU 0.20"),
        (range(31, 60), {"stability": 0.2}, 31, "object 1 has an uncertain outline: stability 0.20"),
        (range(31, 60), {"score": 0.3}, 31, "object 1 may not be there: score 0.30"),
        (range(31), {"score": 0.01, **GONE}, 31, "object 1 comes back: it is not seen on frame 30, score 0.99"),
    ],
)
def test_what_goes_wrong_is_told(frames, values, first, reason):
    look = where_to_look(changed(calm(), frames, **values))[0]
    assert (look.frame, look.time, look.object, look.reason) == (first, 3.1, 1, reason)
    assert 0.5 <= look.doubt <= 1


def test_a_frame_before_the_first_prompt_was_tracked_from_the_one_after():
    rows = changed(calm(prompted=[40]), range(20), area=400)
    assert where_to_look(rows)[0].reason == "object 1 jumps: its area is 4.00 times that on frame 20"
    assert where_to_look(rows)[0].frame == 19


def test_what_was_given_is_not_doubted():
    rows = changed(calm(prompted=[0, 31]), [31], score=0.1)
    assert where_to_look(rows) == []
    assert {look.frame for look in doubts(rows)} == set(range(60)) - {0, 31}
    gone = changed(calm(prompted=[0, 31]), range(31, 60), score=0.0, **GONE)  # as the user has said
    assert where_to_look(gone) == []


def test_frames_near_each_other_count_once_and_several_objects_together():
    rows = changed(calm(), [*range(10, 13), *range(40, 43)], stability=0.3)
    rows += changed(calm(object_id=2), range(40, 43), stability=0.2)
    looks = where_to_look(rows)
    assert [(look.frame, look.object) for look in looks] == [(40, 2), (10, 1)]
    assert looks[0].settles > looks[1].settles
    assert [look.frame for look in where_to_look(rows, 1)] == [40]


def test_where_trouble_begins_comes_before_its_worst_frame():
    rows = calm()
    for t, stability in zip(range(20, 30), np.linspace(0.4, 0.1, 10), strict=True):
        rows = changed(rows, [t], stability=stability)
    assert where_to_look(rows)[0].frame == 20


def test_gaps_are_no_jumps():
    rows = [row for row in changed(calm(), range(31, 60), area=400) if row.frame % 2]
    assert where_to_look(rows) == []
