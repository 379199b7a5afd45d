"""Each object in its own time: what is tracked together is what each object is alone, until it leaves."""

import numpy as np
import pytest
import torch

from helpers.interaction import run_rows_one_by_one
from samoe_hf import SamoeModel, VideoSession, small_base
from samoe_hf.data import SyntheticVideos
from samoe_hf.errors import InputError
from samoe_hf.inference import VideoPrompt
from samoe_hf.model import tracking
from samoe_hf.model.processing_samoe import build_processor

NUM_FRAMES, NUM_OBJECTS = 12, 3


def session_of(model, frames, prompts, **options):
    processor = build_processor(model.config)
    session = VideoSession(frames, processor, dtype=model.dtype, **options)
    for prompt in prompts:
        prompt.add_to(session, processor)
    return session


def tracked(model, frames, prompts, selection="recent"):
    """Frames, in the order in which they come -> masks of the objects."""
    session = session_of(model, frames, prompts, memory_selection=selection)
    outputs = list(model.propagate_from_prompts_iterator(session))
    outputs = [output for output in outputs if output.object_ids == session.obj_ids]
    return {output.frame_idx: output.pred_masks[:, 0] for output in outputs}


@pytest.fixture(scope="module")
def small():
    """The small model, its queries for memories a tenth as large.

    What is empty would get no weight at all otherwise, and a memory too many or too few would not show. In float64,
    since some CPUs add up a batch in another order than a row.
    """
    model = SamoeModel.from_pretrained(small_base(), image_size=64, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.memory_attention.layers:
            for parameter in layer.cross_attn_image.q_proj.parameters():
                parameter *= 0.1
    return model


@pytest.fixture(scope="module")
def frames():
    return list(SyntheticVideos(1, NUM_FRAMES, (64, 64), domain="scenes", seed=3)[0].frames)


def square(y, x):
    mask = np.zeros((64, 64), bool)
    mask[y : y + 20, x : x + 16] = True
    return mask


MIXES = [
    (0, "recent"),
    (3, "distractor"),
    *(pytest.param(x, marks=pytest.mark.slow) for x in ((1, "recent"), (2, "score"))),
]


@pytest.fixture(scope="module", params=MIXES, ids=str)
def mix(request):
    """What the prompts are drawn from, and which memories are read."""
    return request.param


@pytest.fixture(scope="module")
def selection(mix):
    return mix[1]


@pytest.fixture(scope="module")
def late(frames, mix):
    """A video, and two prompts for each object, on frames drawn at random; every second object leaves later."""
    rng = np.random.default_rng(mix[0])
    prompts = []
    for object_id in range(1, NUM_OBJECTS + 1):
        mask = square(*rng.integers(4, 40, 2))
        first, second, end = sorted(rng.choice(NUM_FRAMES, 3, replace=False).tolist())
        prompts += [VideoPrompt(object_id, first, mask=mask), VideoPrompt(object_id, second, mask=np.roll(mask, 3, 1))]
        if object_id % 2:
            prompts.append(VideoPrompt(object_id, end, end=True))
    return frames, prompts


@pytest.fixture(scope="module")
def alone(small, late, selection):
    """What each object is in a session of its own."""
    frames, prompts = late
    ids = range(1, NUM_OBJECTS + 1)
    return [tracked(small, frames, [one for one in prompts if one.object_id == i], selection) for i in ids]


def test_objects_that_come_late_are_tracked_as_alone(small, late, alone, selection):
    together = tracked(small, *late, selection)
    last = max(min(prompt.frame_idx for prompt in late[1] if prompt.object_id == i) for i in range(1, NUM_OBJECTS + 1))
    assert list(together) == [*range(last, NUM_FRAMES), *range(last - 1, -1, -1)]
    for row, own in enumerate(alone):
        one, other = (torch.stack([masks[t][i] for t in range(NUM_FRAMES)]) for masks, i in ((together, row), (own, 0)))
        assert (one - other).abs().mean() < 1e-4
        assert ((one > 0) & (other > 0)).sum() >= 0.999 * ((one > 0) | (other > 0)).sum() > 0


def are_same(one, other):
    return torch.allclose(one, other, rtol=0, atol=1e-9)


def test_masks_are_the_same_where_rows_run_one_by_one(small, late, alone, selection, monkeypatch):
    run_rows_one_by_one(monkeypatch)
    together = tracked(small, *late, selection)
    for row, own in enumerate(alone):
        assert all(are_same(together[t][row], own[t][0]) for t in range(NUM_FRAMES))


@pytest.mark.parametrize("selection", ["recent", "distractor"])
def test_objects_of_all_first_prompts_share_a_batch(small, frames, selection, monkeypatch):
    starts, sizes = (0, 3, 3, 11), []
    prompts = [VideoPrompt(i, start, mask=square(9 * i, 30)) for i, start in enumerate(starts, 1)]
    step = tracking.frame_step

    def counted(*args, **kwargs):
        sizes.append(kwargs["num_objects"])
        return step(*args, **kwargs)

    monkeypatch.setattr(tracking, "frame_step", counted)
    tracked(small, frames, prompts, selection)
    # Of 10 frames that are tracked with three objects. Some read much more than others just after these begin.
    assert sizes.count(3) >= 6


@pytest.mark.parametrize("mix", MIXES[:1], indirect=True, scope="module")
def test_sam2s_order_tracks_a_late_object_from_its_future(small, late, alone, selection):
    """What this is for: with all objects from one frame on, an object is found otherwise than alone."""
    outputs = small.propagate_in_video_iterator(session_of(small, *late, memory_selection=selection), 0)
    together = {output.frame_idx: output.pred_masks[:, 0] for output in outputs}
    pairs = [(together[t][row], own[t][0]) for row, own in enumerate(alone) for t in range(NUM_FRAMES)]
    assert max((one - other).abs().mean() for one, other in pairs) > 1e-2


def test_an_object_joins_a_direction_at_its_first_prompt(small, frames):
    prompts = [VideoPrompt(1, 0, mask=square(9, 30)), VideoPrompt(2, 5, mask=square(25, 8))]

    def run(prompts, *direction):
        return list(small.propagate_from_prompts_iterator(session_of(small, frames, prompts), *direction))

    for direction, order in (((8, True), range(8, -1, -1)), ((2,), range(2, NUM_FRAMES))):
        together, own = run(prompts, *direction), run(prompts[1:], *direction)
        assert [output.frame_idx for output in together] == list(order)
        for one, other in zip(together, own, strict=True):
            assert (one.pred_masks[1] - other.pred_masks[0]).abs().mean() < 1e-4
    assert all((one.pred_masks[1] == -1024).all() for one in together[:3])  # nothing is told of it before


def test_an_object_is_as_it_was_until_it_leaves_and_then_nothing(small, late, alone, selection):
    frames, prompts = late
    given = [one for one in prompts if one.object_id == 1]
    first, _, end = (one.frame_idx for one in given)
    without = tracked(small, frames, given[:2], selection)
    assert all(torch.equal(alone[0][t], without[t]) for t in range(first, end))
    assert all((alone[0][t] == -1024).all() for t in range(end, NUM_FRAMES))


@pytest.mark.parametrize("direction", [(), (6,)], ids=["whole", "onward"])
@pytest.mark.parametrize("selection", ["recent", "score", "distractor"])
def test_what_was_tracked_before_a_first_prompt_is_not_read_onward(small, frames, selection, direction):
    prompts = [VideoPrompt(1, 5, mask=square(9, 30)), VideoPrompt(2, 3, mask=square(25, 8))]
    session = session_of(small, frames, prompts, memory_selection=selection)
    first = [output.pred_masks for output in small.propagate_from_prompts_iterator(session)]
    again = [output.pred_masks for output in small.propagate_from_prompts_iterator(session, *direction)]
    pairs = zip(first, again, strict=True) if not direction else zip(first[3:], again, strict=False)
    assert all(are_same(one, other) for one, other in pairs)


def test_an_end_drops_what_was_tracked_and_can_be_moved_and_taken_back(small, frames):
    prompts = [VideoPrompt(1, 1, mask=square(9, 30)), VideoPrompt(2, 2, mask=square(25, 8))]
    session = session_of(small, frames[:7], prompts)

    def run(tracked):
        return [(output.object_score_logits[0] == -1024).item() for output in tracked]

    before = [output.pred_masks for output in small.propagate_in_video_iterator(session, 0)]
    for end in (5, 3):
        small.end_object(session, end, 1)
        row = session.output_dict_per_obj[0]
        assert max(row["non_cond_frame_outputs"]) == max(row["state"].bank.tracked) == end - 1
        gone = [t >= end for t in range(7)]
        assert run(small.propagate_in_video_iterator(session, 0)) == gone
        assert run(small(session, frame_idx=t) for t in range(7)) == gone
    small.end_object(session, None, 1)
    again = [output.pred_masks for output in small.propagate_in_video_iterator(session, 0)]
    assert all(are_same(one, other) for one, other in zip(before, again, strict=True))


@pytest.mark.parametrize(
    "object_id, frame_idx, message",
    [
        (1, 2, r"end of object 1 must be a frame of the video after its prompts \(on the frames \[4, 9\]\), got 2"),
        (1, 4, "got 4"),
        (1, 7, "got 7"),
        (1, NUM_FRAMES, "got 12"),
        (3, 5, r"`obj_id` must be one of \[1\], got 3"),
    ],
)
def test_an_end_that_cannot_be_is_refused(small, frames, object_id, frame_idx, message):
    mask = square(9, 30)
    session = session_of(small, frames, [VideoPrompt(1, 4, mask=mask), VideoPrompt(1, 9, mask=mask)])
    with pytest.raises(InputError, match=message):
        small.end_object(session, frame_idx, object_id)
    small.end_object(session, 10, 1)
    with pytest.raises(InputError, match=r"gone from frame 10 on; .* prompt of object 1 on frame 11 is not used"):
        VideoPrompt(1, 11, mask=mask).add_to(session, build_processor(small.config))
    VideoPrompt(1, 8, mask=mask).add_to(session, build_processor(small.config))


def test_a_session_without_objects_is_refused(small, frames):
    with pytest.raises(InputError, match="No objects"):
        next(small.propagate_from_prompts_iterator(session_of(small, frames, [])))


@pytest.mark.parametrize("change", ["removed", "added", "replaced"])
def test_objects_that_come_or_go_while_they_are_tracked_are_refused(small, frames, change):
    session = session_of(small, frames, [VideoPrompt(1, mask=square(9, 30))])
    steps = small.propagate_from_prompts_iterator(session)
    next(steps)
    if change != "added":
        small.remove_object(session, 1)
    if change != "removed":
        VideoPrompt(2 if change == "added" else 1, 5, mask=square(9, 30)).add_to(session, build_processor(small.config))
    with pytest.raises(InputError, match="Objects of the session were added or removed while they were tracked"):
        next(steps)
