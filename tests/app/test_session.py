"""A session: prompts, tracking, corrections and what takes them back, beside the same through the package's Python."""

import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from helpers.app import maps_of, run_all, state_of, track_by_hand
from helpers.edgetam import slow_over_bases
from samoe_hf import VideoSession
from samoe_hf.app.project import open_project, save_project
from samoe_hf.app.timeline import draw_timeline, frame_at
from samoe_hf.app.uploads import Limits
from samoe_hf.inference import VideoPrompt, track_video


@slow_over_bases
def test_clicks_tracking_and_corrections_are_those_of_the_python_api(session):
    first, second = session.add_object(), session.add_object()
    session.click(first, 2, 30, 30)
    session.click(first, 2, 40, 20, positive=False)
    shown = session.draw_box(second, 2, (50, 10, 80, 40))
    assert (shown == session.id_map(2)).all()
    steps = list(session.propagate("whole"))
    assert len(steps) == 8 and (steps[-1].id_map == session.id_map(0)).all()
    session.click(first, 5, 60, 50)
    run_all(session.propagate("forward", 5))
    given = [
        VideoPrompt(1, 2, [(30, 30)], [1]),
        VideoPrompt(1, 2, [(30, 30), (40, 20)], [1, 0]),
        VideoPrompt(2, 2, box=(50, 10, 80, 40)),
        (2, False),
        (2, True),
        VideoPrompt(1, 5, [(60, 50)], [1]),
        (5, False),
    ]
    expected = track_by_hand(session.loaded, session.video.frames, given)
    assert expected.any() and (maps_of(session) == expected).all()


@pytest.mark.parametrize("direction,frames", [("forward", range(3, 8)), ("backward", range(3, -1, -1))])
def test_a_direction_is_tracked_from_the_shown_frame(session, direction, frames):
    session.click(session.add_object(), 1, 30, 30)
    session.add_object()  # is not prompted, and left out
    steps = [(step.frame, step.done, step.total) for step in session.propagate(direction, 3)]
    assert steps == [(frame, done, len(frames)) for done, frame in enumerate(frames, 1)]


@slow_over_bases
@pytest.mark.parametrize("tracked_before", [False, True])
def test_undo_leads_back_to_the_bit_even_for_what_is_tracked_later(make_session, tracked_before):
    session, other = make_session(), make_session()
    for one in (session, other):
        one.click(one.add_object(), 0, 30, 30)
        if tracked_before:
            run_all(one.propagate())
    before, could_undo = state_of(session), session.can_undo
    session.click(1, 0, 60, 50, positive=False)
    session.click(session.add_object(), 0, 70, 20)
    session.draw_box(2, 4, (60, 10, 90, 40))
    session.remove_object(1)
    assert before != state_of(session)
    for _ in range(4):
        session.undo()
    assert before == state_of(session) and session.can_undo == could_undo == (not tracked_before)
    for one in (session, other):
        run_all(one.propagate("forward", 2))
    assert state_of(session) == state_of(other)
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()


@slow_over_bases
def test_scores_are_the_models_of_objects_that_have_begun(session):
    session.click(session.add_object(), 2, 30, 30)
    session.click(session.add_object(), 5, 70, 30)
    assert [(row.frame, row.object) for row in session.all_rows()] == [(2, 1), (5, 1), (5, 2)]
    session.undo()
    run_all(session.propagate())
    session.click(2, 5, 70, 30)
    tracking = VideoSession(session.video.frames, session.loaded.processor)
    session.prompts[1, 2].add_to(tracking, session.loaded.processor)
    expected = {}
    for output in session.loaded.model.propagate_from_prompts_iterator(tracking):
        expected[output.frame_idx] = (output.object_score_logits.sigmoid().item(), output.iou_scores.item())
    rows, maps = session.all_rows(), maps_of(session)
    assert [(row.frame, row.object) for row in rows] == [*((t, 1) for t in range(6)), (5, 2), (6, 1), (7, 1)]
    for row in rows:
        assert row.area == (maps[row.frame] == row.object).sum() and row.time == round(row.frame / 6, 3)
        assert row.prompted == ((row.object, row.frame) in session.prompts)
        assert row.object == 2 or np.allclose((row.score, row.iou), expected[row.frame], atol=1e-4)
    session.end_object(1, 5)
    assert [(row.frame, row.object) for row in session.all_rows()] == [*((t, 1) for t in range(5)), (5, 2)]


@slow_over_bases
def test_an_object_has_no_mask_before_its_first_prompt_unless_tracking_back_found_it(session):
    late, early = session.add_object(), session.add_object()

    def seen(frame: int) -> dict[int, tuple]:
        assert set(np.unique(session.id_map(frame))) <= {0, *(row.object for row in session.rows(frame))}
        return {row.object: row[3:6] for row in session.rows(frame)}

    session.click(late, 5, 30, 30)
    session.click(early, 2, 70, 40)
    assert set(seen(2)) == {early}
    session.use(session.loaded)
    assert set(seen(2)) == {early} and set(seen(5)) == {late, early}
    run_all(session.propagate("forward", 0))
    assert [set(seen(t)) for t in (1, 2, 5)] == [set(), {early}, {late, early}]
    run_all(session.propagate())
    prompts = [session.prompts[early, 2], session.prompts[late, 5]]
    for one in track_video(session.loaded.model, session.loaded.processor, session.video.frames, prompts):
        assert (session.id_map(one.frame_idx) == one.id_map()).all()
    before, place = seen(2), session.id_map(2) == late
    session.click(early, 2, 71, 41)
    assert place.any() and seen(2)[late] == before[late] and not (session.id_map(2) == late)[~place].any()
    session.click(late, 2, 30, 30)
    assert seen(2)[late] != before[late] and session.firsts == {late: 2, early: 2}


def test_where_to_look_is_marked_until_it_was_corrected(session):
    session.click(session.add_object(), 0, 30, 30)
    assert not session.was_tracked
    shape = np.zeros((64, 96), np.uint8)
    shape[20:40, 20:40] = 1
    for t in range(8):
        session.masks.write(t, shape, {1: [1, 0.2 if t == 4 else 0.95, 1]})
    (look,) = session.looks
    assert session.was_tracked and look.frame == 4 == session.doubt[1:].argmax() + 1 and "IoU 0.20" in look.reason
    columns = np.linspace(0, 1279, 8)
    assert [frame_at(session, x) for x in columns] == list(range(8)) and frame_at(session, columns[4] - 12) == 4

    def is_marked() -> bool:
        return (draw_timeline(session, 7)[10, round(columns[4])] == (200, 30, 30)).all()

    assert is_marked()
    session.click(1, 4, 60, 50)
    assert not session.looks and not is_marked()
    session.undo()
    assert session.looks and is_marked()
    session.end_object(1, 3)
    assert not session.looks and not is_marked() and not session.doubt[3:].any()
    session.undo()
    session.remove_object(1)
    assert not session.looks and not session.doubt.any()
    session.undo()
    run_all(session.propagate())
    assert (draw_timeline(session, 3) != draw_timeline(session, 4)).any()


def test_only_what_a_project_may_hold_is_taken(session):
    """Or a project that was saved could not be opened again, nor could another object be ended."""
    object_id = session.add_object()
    before = state_of(session)
    _, width = session.masks.size
    for x, positive, message in ((30, False, "must have a positive point"), (width, True, "lies outside")):
        with pytest.raises(ValueError, match=message):
            session.click(object_id, 2, x, 30, positive=positive)
        assert state_of(session) == before and not session.can_undo


def test_an_object_leaves_or_stays_after_all(session):
    for x in (30, 70):
        session.click(session.add_object(), 2, x, 30)
    run_all(session.propagate())
    before = maps_of(session)
    session.end_object(1, 4)
    session.end_object(1, 5)  # it is moved
    assert session.ends == {1: 5} and session.prompted_frames == [2]
    assert (maps_of(session) == np.where((before == 1) & (np.arange(8) >= 5)[:, None, None], 0, before)).all()
    with pytest.raises(ValueError, match=r"gone from frame 5 on; take its end back first\. The prompt of object 1 on"):
        session.click(1, 6, 30, 30)
    session.click(2, 6, 70, 30)
    run_all(session.propagate())
    gone = maps_of(session)
    assert (gone[:5] == 1).any() and not (gone[5:] == 1).any()
    session.end_object(1, 5)
    assert session.ends == {}
    run_all(session.propagate())
    assert (maps_of(session)[5:] == 1).any()


def test_an_end_is_undone_and_one_that_cannot_be_changes_nothing(session):
    session.click(session.add_object(), 2, 30, 30)
    session.add_object()
    run_all(session.propagate())
    before = state_of(session)
    for object_id, frame, message in (
        (1, 2, r"must be after all .* \[2\]\), got frame 2"),
        (2, 5, "Object 2 must have a positive point, a box or a mask"),
    ):
        with pytest.raises(ValueError, match=message):
            session.end_object(object_id, frame)
        assert state_of(session) == before and not session.can_undo
    session.end_object(1, 5)
    session.undo()
    assert state_of(session) == before
    session.end_object(1, 3)
    session.use(session.loaded)
    assert session.masks.frames == {2} and session.ends == {1: 3}
    run_all(session.propagate())
    assert not maps_of(session)[3:].any()


def test_what_fails_while_the_model_runs_changes_nothing(session, monkeypatch):
    session.click(session.add_object(), 0, 30, 30)
    before, model = state_of(session), session.loaded
    click = lambda: session.click(1, 0, 40, 40)  # noqa: E731
    for what, do in (("MaskStore.write", click), ("check_masks", click), ("check_masks", lambda: session.use(model))):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="it fails"):
            patch.setattr(f"samoe_hf.app.session.{what}", Mock(side_effect=ValueError("it fails")))
            do()
        assert before == state_of(session)
    session.click(1, 0, 40, 40)
    assert session.prompts[1, 0].points == [(30, 30), (40, 40)]


@pytest.fixture
def full_disk(monkeypatch):
    """From its call on, what is written is cut off."""

    def fill():
        def cut_off(path, *_):
            with open(path, "wb") as file:
                file.write(b"\x89PNG half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("samoe_hf.app.session.write_palette_png", cut_off)
        monkeypatch.setattr(Path, "write_bytes", cut_off)

    return fill


def test_a_full_disk_costs_nothing_that_was_there(session, full_disk, tmp_path, small_model, monkeypatch):
    session.click(session.add_object(), 0, 30, 30)
    run_all(session.propagate())
    session.click(1, 3, 60, 50)
    before = state_of(session)
    full_disk()
    for step in (
        lambda: run_all(session.propagate("forward", 3)),
        lambda: session.click(1, 4, 40, 40),
        lambda: session.use(session.loaded),
    ):
        with pytest.raises(OSError, match="No space left"):
            step()
        assert state_of(session) == before
    monkeypatch.undo()
    (tmp_path / "opened").mkdir()
    assert state_of(open_project(save_project(session, tmp_path), tmp_path / "opened", small_model, Limits())) == before


def test_undo_on_a_full_disk_changes_nothing(session, full_disk):
    for x in (30, 60):
        session.click(1 if session.objects else session.add_object(), 0, x, 50)
    before = state_of(session)
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        session.undo()
    assert state_of(session) == before and session.can_undo


def test_limits_hold_ids_are_never_used_again_and_a_removed_object_leaves_no_mask(make_session):
    session = make_session(limits=Limits(objects=2, prompts=3))
    with pytest.raises(ValueError, match="Nothing is prompted yet"):
        next(session.propagate())
    assert [session.add_object(), session.add_object()] == [1, 2]
    with pytest.raises(ValueError, match="2 objects are the most"):
        session.add_object()
    for object_id, x in ((1, 20), (1, 25), (2, 70)):
        session.click(object_id, 0, x, 30)
    with pytest.raises(ValueError, match="3 clicks and boxes are the most"):
        session.click(1, 0, 40, 30)
    run_all(session.propagate())
    before = maps_of(session)
    session.remove_object(1)
    after = maps_of(session)
    assert not (after == 1).any() and ((after == 2) == (before == 2)).all()
    assert session.add_object() == 3


def test_while_it_tracks_nothing_else_is_done_until_it_is_stopped_or_left(session):
    session.click(session.add_object(), 0, 30, 30)
    steps = session.propagate()
    assert next(steps).frame == 0 and next(steps).frame == 1
    again = (lambda: session.use(session.loaded), lambda: session.click(1, 0, 40, 40))
    for call in (session.add_object, session.undo, *again):
        with pytest.raises(ValueError, match="press Stop"):
            call()
    session.stop()
    assert next(steps, None) is None and session.masks.frames == {0, 1}
    steps = session.propagate("forward", 1)
    next(steps)
    steps.close()  # as a page that is gone leaves it
    session.click(1, 0, 40, 40)
    assert run_all(session.propagate("forward", 1)) == 7


def test_another_session_gets_the_device_between_two_frames(make_session):
    first, second = make_session(), make_session()
    first.click(first.add_object(), 0, 30, 30)
    second.add_object()
    steps = first.propagate()
    next(steps)
    thread = threading.Thread(target=second.click, args=(1, 0, 30, 30))
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and second.prompts
    assert run_all(steps) == 7


@pytest.mark.parametrize("selection,used", [("score", "score"), ("distractor", "distractor"), (None, "recent")])
def test_memories_are_chosen_as_a_new_start_says_or_else_as_the_model_does(session, selection, used):
    assert session.memory_selection == "recent"
    session.click(session.add_object(), 2, 30, 30)
    session.use(session.loaded, memory_selection=selection)
    with session.exclusive() as tracking:
        assert session.memory_selection == tracking.memory_selection == used
    assert run_all(session.propagate()) == 8
