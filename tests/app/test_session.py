"""A session: prompts, tracking, corrections and what takes them back, beside the same through the package's Python."""

import threading

import numpy as np
import pytest

from helpers.app import run_all, state_of
from samoe_hf import VideoSession
from samoe_hf.app.limits import Limits
from samoe_hf.app.session import BusyError
from samoe_hf.inference import TrackedFrame, VideoPrompt, track_video


def same(first, second) -> bool:
    return first.objects == second.objects and first.prompts == second.prompts and (first.maps == second.maps).all()


def by_hand(session, steps):
    """The same steps through processor and model: (object, frame, points, labels, box), or a range to propagate."""
    model, processor = session.model.model, session.model.processor
    size, maps = session.video.frames.size, {}
    tracking = VideoSession(session.video.frames, processor, corrections_condition=True)

    def keep(output):
        logits = processor.post_process_masks([output.pred_masks], [size], binarize=False)[0][:, 0]
        maps[output.frame_idx] = TrackedFrame(output.frame_idx, output.object_ids, logits).id_map()

    for step in steps:
        if isinstance(step, VideoPrompt):
            processor.add_inputs_to_inference_session(tracking, step.frame_idx, step.object_id, **step.inputs())
            keep(model(inference_session=tracking, frame_idx=step.frame_idx))
        else:
            start, reverse = step
            for output in model.propagate_in_video_iterator(tracking, start_frame_idx=start, reverse=reverse):
                keep(output)
    return np.stack([maps[t] for t in sorted(maps)])


def test_clicks_tracking_and_corrections_are_those_of_the_python_api(session):
    first, second = session.add_object(), session.add_object()
    session.click(first, 2, 30, 30)
    session.click(first, 2, 40, 20, positive=False)
    session.draw_box(second, 2, (50, 10, 80, 40))
    assert run_all(session.propagate("whole")) == 8 - 2 + 3
    session.click(first, 5, 60, 50)
    run_all(session.propagate("forward", 5))
    expected = by_hand(
        session,
        [
            VideoPrompt(1, 2, [(30, 30)], [1]),
            VideoPrompt(1, 2, [(30, 30), (40, 20)], [1, 0]),
            VideoPrompt(2, 2, box=(50, 10, 80, 40)),
            (2, False),
            (2, True),
            VideoPrompt(1, 5, [(60, 50)], [1]),
            (5, False),
        ],
    )
    assert expected.any() and (state_of(session).maps == expected).all()


def test_the_whole_video_is_tracked_as_track_video_does(session):
    session.click(session.add_object(), 3, 30, 30)
    run_all(session.propagate())
    frames = track_video(
        session.model.model, session.model.processor, session.video.frames, [*session.prompts.values()]
    )
    maps = {frame.frame_idx: frame.id_map() for frame in frames}
    assert (state_of(session).maps == np.stack([maps[t] for t in range(8)])).all()


@pytest.mark.parametrize("direction,frames", [("forward", range(3, 8)), ("backward", range(3, -1, -1))])
def test_a_direction_is_tracked_from_the_shown_frame(session, direction, frames):
    session.click(session.add_object(), 1, 30, 30)
    steps = list(session.propagate(direction, 3))
    assert [step.frame for step in steps] == list(frames)
    assert [(step.done, step.total) for step in steps] == [(i + 1, len(frames)) for i in range(len(frames))]


def test_undo_leads_back_to_the_bit_even_for_what_is_tracked_later(session, make_session):
    other = make_session()
    for one in (session, other):
        one.click(one.add_object(), 0, 30, 30)
    before = state_of(session)
    session.click(1, 0, 60, 50, positive=False)
    session.click(session.add_object(), 0, 70, 20)
    session.draw_box(2, 4, (60, 10, 90, 40))
    session.remove_object(1)
    assert not same(before, state_of(session))
    assert [session.undo() for _ in range(3)] == ["removing object 1", "a box around object 2", "a click on object 2"]
    assert session.undo() == "a click on object 1"
    assert same(before, state_of(session))
    for one in (session, other):
        run_all(one.propagate())
    assert (state_of(session).maps == state_of(other).maps).all()


def test_after_tracking_there_is_nothing_to_undo(session):
    with pytest.raises(ValueError, match="nothing to undo"):
        session.undo()
    session.click(session.add_object(), 0, 30, 30)
    assert session.can_undo
    run_all(session.propagate())
    assert not session.can_undo


@pytest.mark.parametrize("x,y", [(-1, 5), (96, 5), (5, 64), (float("nan"), 5), (float("inf"), 5), (1e300, 1e300)])
def test_a_point_outside_changes_nothing(session, x, y):
    session.click(session.add_object(), 0, 30, 30)
    before = state_of(session)
    with pytest.raises(ValueError, match="lies outside of the video of 96 x 64 pixels"):
        session.click(1, 0, x, y)
    assert same(before, state_of(session)) and not session.is_busy


def test_what_fails_while_the_model_runs_changes_nothing(session, monkeypatch):
    session.click(session.add_object(), 0, 30, 30)
    before = state_of(session)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no memory"):
        patch.setattr(session, "_store", lambda output: (_ for _ in ()).throw(ValueError("no memory")))
        session.click(1, 0, 40, 40)
    assert same(before, state_of(session)) and not session.is_busy
    session.click(1, 0, 40, 40)
    assert session.prompts[1, 0].points == [(30, 30), (40, 40)]


@pytest.mark.parametrize("object_id", [0, 2, -1, True, "1", None, 10**30])
def test_unknown_objects_are_refused(session, object_id):
    session.add_object()
    with pytest.raises(ValueError, match="`object` must be one of"):
        session.click(object_id, 0, 30, 30)
    with pytest.raises(ValueError, match="`object` must be one of"):
        session.remove_object(object_id)


@pytest.mark.parametrize("frame", [-1, 8, 10**30, 1.0, "0", None, True])
def test_unknown_frames_are_refused(session, frame):
    session.add_object()
    for call in (lambda: session.click(1, frame, 30, 30), lambda: session.id_map(frame), lambda: session.frame(frame)):
        with pytest.raises(ValueError, match="`frame` must be from 0 to 7"):
            call()


def test_tracking_needs_prompts_and_a_known_direction(session):
    with pytest.raises(ValueError, match="Nothing is prompted yet"):
        next(session.propagate())
    session.click(session.add_object(), 0, 30, 30)
    with pytest.raises(ValueError, match="`direction` must be one of whole, forward, backward, got 'up'"):
        next(session.propagate("up"))


def test_objects_that_were_not_prompted_are_left_out(session):
    session.click(session.add_object(), 0, 30, 30)
    session.add_object()
    assert run_all(session.propagate()) == 8


def test_ids_are_never_used_again(session):
    assert [session.add_object(), session.add_object()] == [1, 2]
    session.remove_object(2)
    assert session.add_object() == 3


def test_limits_hold(make_session):
    session = make_session(limits=Limits(objects=2, prompts=3))
    session.add_object(), session.add_object()
    with pytest.raises(ValueError, match="2 objects are the most"):
        session.add_object()
    for x in (10, 20, 30):
        session.click(1, 0, x, 30)
    with pytest.raises(ValueError, match="3 clicks and boxes are the most"):
        session.click(1, 0, 40, 30)


def test_a_removed_object_leaves_no_mask_and_the_others_stay(session):
    session.click(session.add_object(), 0, 20, 30)
    session.click(session.add_object(), 0, 70, 30)
    run_all(session.propagate())
    before = state_of(session).maps
    session.remove_object(1)
    after = state_of(session).maps
    assert set(np.unique(after)) <= {0, 2} and ((after == 2) == (before == 2)).all()
    run_all(session.propagate())


def test_stop_ends_after_the_frame_and_tracking_goes_on_from_there(session):
    session.click(session.add_object(), 0, 30, 30)
    steps = session.propagate()
    assert next(steps).frame == 0 and next(steps).frame == 1
    session.stop()
    assert next(steps, None) is None and not session.is_busy
    assert session.masks.frames == {0, 1}
    assert run_all(session.propagate("forward", 1)) == 7


def test_while_it_tracks_nothing_else_is_done(session):
    session.click(session.add_object(), 0, 30, 30)
    steps = session.propagate()
    next(steps)
    for call in (session.add_object, session.undo, session.use, lambda: session.click(1, 0, 40, 40)):
        with pytest.raises(BusyError, match="press Stop"):
            call()
    steps.close()  # as a page that is gone leaves it
    session.click(1, 0, 40, 40)


def test_another_session_gets_the_device_between_two_frames(make_session, small_model, tmp_path):
    first, second = make_session(), make_session()
    second._device = first._device
    first.click(first.add_object(), 0, 30, 30)
    second.add_object()
    steps = first.propagate()
    next(steps)
    thread = threading.Thread(target=second.click, args=(1, 0, 30, 30))
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and second.prompts
    assert run_all(steps) == 7


def test_a_new_start_keeps_the_prompts_and_their_frames_only(session):
    session.click(session.add_object(), 2, 30, 30)
    run_all(session.propagate())
    session.use()
    assert session.masks.frames == {2} and list(session.prompts) == [(1, 2)]
    with pytest.raises(ValueError, match="`domain` must be"):
        session.use(domain="nowhere")
    assert session.masks.frames == {2} and run_all(session.propagate()) == 9
