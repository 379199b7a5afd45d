"""Random sessions: whatever is done, an object among others gets the masks that it gets alone."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from transformers import Sam2VideoInferenceSession

from helpers.interaction import FRAME_IDX, NUM_FRAMES, SETTINGS, Interaction, Sessions, draw_weights, tiny_config
from peers import base_of
from samoe_hf import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.video_session import VideoSession

FRAMES = np.random.default_rng(0).integers(0, 255, (NUM_FRAMES, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny():
    """A model in float64 with experts."""
    decoder = {"num_hidden_layers": 1, "mlp_dim": 32}
    model = SamoeModel(
        tiny_config(num_experts=3, lora_rank=2, mask_decoder_config=decoder, memory_fuser_intermediate_dim=32)
    ).eval()
    draw_weights(model, with_experts=True)
    return model.double()


class AgainstOneByOne(Interaction):
    tolerance = 1e-12

    def make_trackers(self):
        start_plain, start_video_session = self.starts
        start = start_video_session if type(self).sequences % 2 else start_plain
        together = Sessions(self.model, self.processor, start)
        return [together, Sessions(self.model, self.processor, start_plain, separate=True)]

    @precondition(lambda self: self.objects and all(tracker.can_step() for tracker in self.trackers))
    @rule(frame_idx=FRAME_IDX, reverse=st.booleans())
    def step(self, frame_idx, reverse):
        self.compare([tracker.step(frame_idx, reverse) for tracker in self.trackers])


@pytest.mark.parametrize("sequences", [16, pytest.param(300, marks=pytest.mark.slow)])
def test_random_sessions_of_several_objects_are_those_of_each_alone(tiny, sequences):
    processor = build_processor(tiny.config)

    def start_plain():
        session = Sam2VideoInferenceSession(pixel_values, 32, 32, dtype=torch.float64)
        session.cache = cache
        return session

    def start_video_session():
        session = VideoSession(FRAMES, processor, keep_frames=16, dtype=torch.float64)
        session.cache = cache
        return session

    cache = Sam2VideoInferenceSession(max_vision_features_cache_size=NUM_FRAMES).cache
    whole = VideoSession(FRAMES, processor, dtype=torch.float64)
    pixel_values = torch.stack([whole.get_frame(t) for t in range(NUM_FRAMES)])
    machine = AgainstOneByOne
    machine.model, machine.processor = tiny, processor
    machine.starts = (start_plain, start_video_session)
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=sequences))
    print({"sequences": machine.sequences, "steps": machine.steps, "worst": machine.worst})
    assert machine.sequences >= sequences and machine.steps > 2 * sequences


# --- Edges


@pytest.fixture(scope="module")
def processor(tiny):
    return build_processor(tiny.config)


POINT = {"input_points": [[[[10, 12]]]], "input_labels": [[[1]]]}
CLICK = {"input_points": [[[[20, 25]]]], "input_labels": [[[0]]], "clear_old_inputs": False}
BOX = {"input_boxes": [[[4, 4, 20, 24]]]}


def start(kind, processor, dtype=torch.float64):
    if kind == "plain":
        return processor.init_video_session(video=FRAMES, dtype=dtype)
    return VideoSession(FRAMES, processor, keep_frames=16, dtype=dtype)


KINDS = pytest.mark.parametrize("kind", ["plain", "video"])


@pytest.mark.parametrize(
    ("kind", "dtype", "session_dtype"),
    [("plain", torch.bfloat16, torch.float32), ("video", torch.float16, torch.float16)],
)
def test_corrections_work_in_every_type(tiny, processor, kind, dtype, session_dtype):
    model = copy.deepcopy(tiny).to(dtype)
    session = start(kind, processor, session_dtype)
    processor.add_inputs_to_inference_session(session, 0, 1, **POINT)
    outputs = [model(session, frame_idx=0)]
    processor.add_inputs_to_inference_session(session, 0, 1, **CLICK)
    outputs += [model(session, frame_idx=0), *model.propagate_in_video_iterator(session)]
    processor.add_inputs_to_inference_session(session, 3, 1, **POINT)
    processor.add_inputs_to_inference_session(session, 4, 1, input_masks=np.ones((32, 32), dtype=bool))
    outputs += [model(session, frame_idx=3), *model.propagate_in_video_iterator(session, 4)]
    assert all(output.pred_masks.isfinite().all() for output in outputs)


NAN, INF = float("nan"), float("inf")
BAD_PROMPTS = {
    "frame 6": (6, POINT, r"`frame_idx` must be a frame of the session \(5 frames\), got 6"),
    "frame -1": (-1, BOX, r"`frame_idx`.*got -1"),
    "frame 2.5": (2.5, BOX, r"`frame_idx`.*got 2.5"),
    "nan": (0, {"input_points": [[[[NAN, 3]]]], "input_labels": [[[1]]]}, r"`input_points`.*32 x 32.*\(nan, 3\)"),
    "infinity": (0, {"input_boxes": [[[0, 0, INF, 9]]]}, r"`input_boxes`.*\(inf, 9\)"),
    "right of it": (0, {"input_points": [[[[3, 3], [900, 3]]]], "input_labels": [[[1, 0]]]}, r"\(900, 3\)"),
    "box right of it": (0, {"input_boxes": [[[40, 3, 50, 9]]]}, r"`input_boxes`.*\(40, 3\)"),
    "unknown label": (0, {"input_points": [[[[3, 3]]]], "input_labels": [[[7]]]}, r"`input_labels`.*got 7"),
    "padding alone": (0, {"input_points": [[[[3, 3]]]], "input_labels": [[[-10]]]}, "at least one"),
    "mask of nan": (0, {"input_masks": torch.full((32, 32), NAN)}, "`input_masks` must be .*got NaN"),
    "two channels": (0, {"input_masks": torch.ones(2, 32, 32)}, r"`input_masks`.*\(1, 2, 32, 32\)"),
}


@KINDS
@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts_are_refused_and_leave_nothing_behind(tiny, processor, kind, case):
    frame_idx, inputs, message = BAD_PROMPTS[case]
    session = start(kind, processor)
    processor.add_inputs_to_inference_session(session, 0, 1, **POINT)
    expected = tiny(session, frame_idx=0).pred_masks
    with pytest.raises(ValueError, match=message):
        processor.add_inputs_to_inference_session(session, frame_idx, 5, **inputs)
        assert kind == "plain"  # a VideoSession sees it first
        tiny(session, frame_idx=0)
    assert session.obj_ids == [1]
    torch.testing.assert_close(tiny(session, frame_idx=0).pred_masks, expected, rtol=0, atol=0)
    assert len(list(tiny.propagate_in_video_iterator(session))) == NUM_FRAMES


@KINDS
@pytest.mark.parametrize("earlier", [POINT, {"input_masks": np.eye(32, dtype=bool)}], ids=["point", "mask"])
@pytest.mark.parametrize("case", ["nan", "box right of it", "mask of nan"])
def test_a_bad_prompt_leaves_the_earlier_one_of_its_frame(tiny, processor, kind, earlier, case):
    _, inputs, message = BAD_PROMPTS[case]
    session = start(kind, processor)
    processor.add_inputs_to_inference_session(session, 0, 1, **earlier)
    expected = tiny(session, frame_idx=0).pred_masks
    with pytest.raises(ValueError, match=message):
        processor.add_inputs_to_inference_session(session, 0, 1, **inputs)
        assert kind == "plain"
        tiny(session, frame_idx=0)
    torch.testing.assert_close(tiny(session, frame_idx=0).pred_masks, expected, rtol=0, atol=0)
    assert len(list(tiny.propagate_in_video_iterator(session))) == NUM_FRAMES


@KINDS
def test_sessions_are_used_again(tiny, processor, kind):
    """After a reset, and after the last object was removed."""
    session, results = start(kind, processor), []
    for end in (
        lambda: session.reset_tracking_data(),
        lambda: session.reset_inference_session(),
        lambda: tiny.remove_object(session, 1),
        lambda: None,
    ):
        processor.add_inputs_to_inference_session(session, 2, 1, **BOX)
        tiny(session, frame_idx=2)
        results.append(torch.stack([o.pred_masks for o in tiny.propagate_in_video_iterator(session, 0)]))
        end()
        if len(results) < 4:
            with pytest.raises(ValueError, match="No objects"):
                tiny(session, frame_idx=2)
            with pytest.raises(ValueError, match="No objects"):
                next(tiny.propagate_in_video_iterator(session))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@KINDS
def test_a_session_is_tracked_by_one_model(tiny, processor, kind):
    other = copy.deepcopy(tiny)
    draw_weights(other, with_experts=True, seed=1)

    def add(session):
        processor.add_inputs_to_inference_session(session, 0, 1, **BOX)
        return session

    session = add(start(kind, processor))
    tiny(session, frame_idx=0)
    with pytest.raises(ValueError, match=r"Object 1 .* another model.*reset_tracking_data"):
        other(session, frame_idx=1)
    session.reset_tracking_data()  # image features stay in the cache
    found, wanted = (other(add(one), frame_idx=0).pred_masks for one in (session, start(kind, processor)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    plain = add(start("plain", processor))
    base_of(tiny)(plain, frame_idx=0)
    with pytest.raises(ValueError, match="another model"):
        tiny(plain, frame_idx=0)


@KINDS
def test_frames_of_another_size_than_the_models_are_refused(tiny, kind):
    larger = build_processor(tiny_config(64))
    session = start(kind, larger)
    larger.add_inputs_to_inference_session(session, 0, 1, **BOX)
    with pytest.raises(ValueError, match=r"frames are of \(64, 64\) pixels, but the model takes \(32, 32\)"):
        tiny(session, frame_idx=0)


@KINDS
def test_a_cached_frame_is_encoded_anew_for_weights_of_another_type(tiny, processor, kind):
    def mask(model, session):
        processor.add_inputs_to_inference_session(session, 0, 1, **BOX)
        return model(session, frame_idx=0).pred_masks

    model, session = copy.deepcopy(tiny).float(), start(kind, processor)
    mask(model, session)
    session.reset_tracking_data()
    expected = mask(tiny, start(kind, processor))
    torch.testing.assert_close(mask(model.double(), session), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "same"),
    [
        ([POINT, CLICK], {"input_points": [[[[10, 12], [20, 25]]]], "input_labels": [[[1, 0]]]}),
        ([POINT, BOX], BOX),
        ([BOX, POINT], POINT),
        ([POINT, {"input_masks": np.ones((32, 32), dtype=bool)}, BOX], BOX),
    ],
)
def test_two_prompts_for_one_object_and_frame(tiny, processor, prompts, same):
    """Without a call between, points add up or the last prompt counts, as documented."""
    masks = []
    for given in (prompts, [same]):
        session = start("video", processor)
        for prompt in given:
            processor.add_inputs_to_inference_session(session, 0, 1, **prompt)
        masks.append(tiny(session, frame_idx=0).pred_masks)
    torch.testing.assert_close(*masks, rtol=0, atol=0)


def test_objects_of_one_call_with_differently_many_points_are_those_of_calls_of_their_own(tiny, processor):
    points, labels, sessions = (
        [[[10, 12], [20, 25]], [[4, 4]]],
        [[1, 0], [1]],
        [start("video", processor) for _ in "ab"],
    )
    processor.add_inputs_to_inference_session(sessions[0], 0, [1, 2], input_points=[points], input_labels=[labels])
    for row in (0, 1):
        given = {"input_points": [[points[row]]], "input_labels": [[labels[row]]]}
        processor.add_inputs_to_inference_session(sessions[1], 0, row + 1, **given)
    torch.testing.assert_close(*(tiny(session, 0).pred_masks for session in sessions), rtol=0, atol=1e-12)
