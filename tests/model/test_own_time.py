"""Each object in its own time: what is tracked together is what each object is alone."""

import numpy as np
import pytest
import torch

from samoe_hf import SamoeModel, VideoSession, small_base
from samoe_hf.data import SyntheticVideos
from samoe_hf.errors import InputError
from samoe_hf.model import tracking
from samoe_hf.model.processing_samoe import build_processor

NUM_FRAMES = 20


def tracked(model, frames, prompts, **options):
    """Frames, in the order in which they come -> masks of the objects with prompts (object, frame, mask)."""
    processor = build_processor(model.config)
    session = VideoSession(frames, processor, **options)
    for object_id, frame_idx, mask in prompts:
        processor.add_inputs_to_inference_session(session, frame_idx, object_id, input_masks=mask)
    outputs = list(model.propagate_from_prompts_iterator(session))
    ids = [object_id for object_id, _, _ in prompts]
    outputs = [output for output in outputs if output.object_ids == list(dict.fromkeys(ids))]
    return {output.frame_idx: output.pred_masks[:, 0] for output in outputs}


@pytest.fixture(scope="module")
def small():
    return SamoeModel.from_pretrained(small_base())


@pytest.fixture(scope="module")
def late():
    """A video, and its objects' first prompts and another one for each, on frames drawn at random."""
    rng = np.random.default_rng(0)
    video = SyntheticVideos(1, NUM_FRAMES, (64, 64), domain="scenes", seed=3)[0]
    starts = [0, 6, 6, 18]
    prompts = []
    for object_id, start in enumerate(starts, 1):
        mask = np.zeros((64, 64), bool)
        y, x = rng.integers(4, 40, 2)
        mask[y : y + 20, x : x + 16] = True
        prompts += [(object_id, start, mask), (object_id, min(start + 9, 19), np.roll(mask, 3, 1))]
    return list(video.frames), prompts


@pytest.fixture(scope="module", params=["recent", "score", "distractor"])
def selection(request):
    return request.param


@pytest.fixture(scope="module")
def alone(small, late, selection):
    """What each object is in a session of its own."""
    frames, prompts = late
    ids = sorted({object_id for object_id, _, _ in prompts})
    return [tracked(small, frames, [p for p in prompts if p[0] == i], memory_selection=selection) for i in ids]


def test_objects_that_are_prompted_late_are_tracked_as_alone(small, late, alone, selection):
    frames, prompts = late
    together = tracked(small, frames, prompts, memory_selection=selection)
    assert list(together) == [18, 19, *range(17, -1, -1)]
    for row, own in enumerate(alone):
        for t in range(NUM_FRAMES):
            assert (together[t][row] - own[t][0]).abs().mean() < 1e-4
            same = (together[t][row] > 0) == (own[t][0] > 0)
            assert same.float().mean() > 0.999


def test_to_the_bit_where_rows_run_one_by_one(small, late, alone, selection, monkeypatch):
    segment = tracking._segment_objects

    def one_by_one(model, tasks, call):
        for task in tasks:
            segment(model, [task], call)

    monkeypatch.setattr(tracking, "_segment_objects", one_by_one)
    together = tracked(small, *late, memory_selection=selection)
    for row, own in enumerate(alone):
        assert all(torch.equal(together[t][row], own[t][0]) for t in range(NUM_FRAMES))


def test_objects_of_all_first_prompts_share_a_batch(small, late, selection, monkeypatch):
    sizes = []
    step = tracking.frame_step

    def counted(*args, **kwargs):
        sizes.append(kwargs["num_objects"])
        return step(*args, **kwargs)

    monkeypatch.setattr(tracking, "frame_step", counted)
    tracked(small, *late, memory_selection=selection)
    # Of 17 frames that are tracked with three objects; some read much more than others just after these begin.
    assert max(sizes) == 3 and sizes.count(3) >= 12


def test_sam2s_order_tracks_a_late_object_from_its_future(small, late, alone):
    """What this is for: with all objects from one frame on, an object is found otherwise than alone."""
    frames, prompts = late
    processor = build_processor(small.config)
    session = VideoSession(frames, processor)
    for object_id, frame_idx, mask in prompts:
        processor.add_inputs_to_inference_session(session, frame_idx, object_id, input_masks=mask)
    outputs = {o.frame_idx: o.pred_masks[:, 0] for o in small.propagate_in_video_iterator(session, 0)}
    own = alone[1]
    assert max((outputs[t][1] - own[t][0]).abs().mean() for t in range(7, 15)) > 1e-2


def test_an_object_joins_a_direction_at_its_first_prompt(small, late):
    frames, prompts = late
    processor = build_processor(small.config)

    def run(prompts, *direction):
        session = VideoSession(frames, processor)
        for object_id, frame_idx, mask in prompts:
            processor.add_inputs_to_inference_session(session, frame_idx, object_id, input_masks=mask)
        return list(small.propagate_from_prompts_iterator(session, *direction))

    for direction, order in (((2,), range(2, 20)), ((10, True), range(10, -1, -1))):
        together, own = run(prompts, *direction), run(prompts[2:4], *direction)
        assert [output.frame_idx for output in together] == list(order)
        for one, other in zip(together, own, strict=True):
            assert (one.pred_masks[1] - other.pred_masks[0]).abs().mean() < 1e-4
    assert (run(prompts, 2)[0].pred_masks[1] == -1024).all()  # nothing is told of it before its first prompt


def test_a_session_without_objects_or_without_its_first_frames_is_refused(small, late):
    processor = build_processor(small.config)
    with pytest.raises(InputError, match="No objects"):
        next(small.propagate_from_prompts_iterator(VideoSession(late[0], processor)))
