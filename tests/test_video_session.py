"""Sessions for videos of any length: the same masks as a session that keeps all, in memory that does not grow."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.edgetam import slow_over_bases
from samoe_hf.video_session import VideoSession

POINT = {"input_points": [[[[40, 60]]]], "input_labels": [[[1]]]}
BOX = {"input_boxes": [[[20, 20, 90, 70]]]}


@pytest.fixture
def short(nano, monkeypatch):
    """The model, which reads memories of the last eight frames."""
    monkeypatch.setattr(nano.model.config, "max_object_pointers_in_encoder", 8)
    return nano.model


class Frames:
    """Frames that are made when they are read, and counts of how often."""

    def __init__(self, count: int):
        self.count, self.reads = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        self.reads.append(index)
        return np.random.default_rng(index % self.count).integers(0, 255, (90, 160, 3), dtype=np.uint8)


def track(model, session, start_frame_idx=None, reverse=False):
    outputs = model.propagate_in_video_iterator(session, start_frame_idx, reverse=reverse)
    return {output.frame_idx: output.pred_masks for output in outputs}


def held_bytes(session) -> int:
    """Bytes of all distinct storages that the session refers to."""
    storages = {}

    def collect(value):
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            list(map(collect, value.values()))
        elif isinstance(value, list | tuple):
            list(map(collect, value))
        elif hasattr(value, "__dict__"):
            collect(vars(value))

    collect(session)
    return sum(storages.values())


@slow_over_bases
def test_it_gives_what_a_session_gives_that_keeps_all(short, processor):
    """Prompts on two frames, a correction later, forward and then backward, farther than is kept."""
    frames = Frames(20)
    results = []
    for session in (
        processor.init_video_session(video=np.stack([frames[t] for t in range(20)])),
        VideoSession(frames, processor, keep_frames=8),
    ):
        processor.add_inputs_to_inference_session(session, 9, 1, **POINT)
        processor.add_inputs_to_inference_session(session, 11, 2, **BOX)
        forward = track(short, session, 9)
        processor.add_inputs_to_inference_session(session, 18, 1, **BOX)
        short(session, frame_idx=18)
        forward |= track(short, session, 18)
        results.append((forward, track(short, session, 9, reverse=True)))
    for kept_all, forgetful in zip(*results, strict=True):
        assert kept_all.keys() == forgetful.keys() and len(kept_all) >= 10
        for frame_idx, masks in kept_all.items():
            torch.testing.assert_close(forgetful[frame_idx], masks, rtol=0, atol=0)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_copy_goes_on_by_itself(nano, processor, is_streamed):
    frames = Frames(8)
    session, again = (VideoSession() if is_streamed else VideoSession(frames, processor) for _ in range(2))
    for one in (session, again):
        for t in range(8 * is_streamed):
            one.add_new_frame(processor(images=frames[t], return_tensors="pt").pixel_values[0])
        one.video_height, one.video_width = 90, 160
        processor.add_inputs_to_inference_session(one, 0, 1, **POINT)
        list(nano.model.propagate_in_video_iterator(one, 0, max_frame_num_to_track=2))
    before, copied = held_bytes(session), copy.deepcopy(session)
    assert held_bytes([session, copied]) == before
    given, shared = (one.output_dict_per_obj[0]["cond_frame_outputs"] for one in (session, copied))
    assert shared is not given and shared[0] is given[0]  # else copies of long videos take seconds
    track(nano.model, copied, 3)
    processor.add_inputs_to_inference_session(copied, 3, 2, **BOX)
    assert len(track(nano.model, copied, 3)[3]) == 2 and session.obj_ids == [1]
    if is_streamed:
        assert copied.add_new_frame(torch.zeros(3, 1, 1)) == session.num_frames == 8
    found, expected = track(nano.model, session, 3), track(nano.model, again, 3)
    assert all(torch.equal(found[t], expected[t]) for t in range(3, 8))
    with pytest.raises(TypeError, match=r"cannot be pickled; `copy\.deepcopy` copies it"):
        pickle.dumps(session)


def test_frames_are_prepared_as_those_of_a_whole_video(processor):
    frames = Frames(4)
    whole = processor.init_video_session(video=np.stack([frames[t] for t in range(4)]))
    session = VideoSession(frames, processor)
    assert session.num_frames == 4 and 3 in session.processed_frames and 4 not in session.processed_frames
    assert (session.video_height, session.video_width) == (90, 160)
    for t in range(4):
        torch.testing.assert_close(session.get_frame(t), whole.get_frame(t), rtol=0, atol=0)


@slow_over_bases
def test_memory_does_not_grow_with_the_video(short, processor):
    frames = Frames(33)  # the prompted one, and eight times the four that are encoded at once
    session = VideoSession(frames, processor, keep_frames=8)
    for obj_id in (1, 2):
        processor.add_inputs_to_inference_session(session, 0, obj_id, **POINT)
    held = [held_bytes(session) for _ in short.propagate_in_video_iterator(session)]
    assert held[5] > held[0]
    assert max(held[20:]) == held[20] == held[-1]
    assert sorted(frames.reads[1:]) == list(range(33))  # the first read is for the size


def test_masks_that_wait_for_a_late_object_are_not_held(short, processor):
    def held(count):
        session = VideoSession(Frames(count), processor, keep_frames=8)
        for obj_id, frame_idx in enumerate((0, count - 1)):
            processor.add_inputs_to_inference_session(session, frame_idx, obj_id, **POINT)
        for output in short.propagate_from_prompts_iterator(session):
            if output.frame_idx == count - 1:
                return sum(one.nbytes for one in gc.get_objects() if type(one) is torch.Tensor)

    held(12)  # what is computed once
    longer, shorter = held(36), held(20)
    assert longer - shorter < 10 * 4 * 32 * 32  # bytes of 10 masks


@slow_over_bases
def test_streams_may_be_endless(short, processor):
    session = VideoSession(keep_frames=8)
    plain = processor.init_video_session()
    held = []
    for t in range(28):
        inputs = processor(images=Frames(200)[t], return_tensors="pt")
        if t == 0:
            for one in (session, plain):
                processor.add_inputs_to_inference_session(one, 0, 1, original_size=(90, 160), **BOX)
        masks = [short(one, frame=inputs.pixel_values[0]).pred_masks for one in (session, plain)]
        torch.testing.assert_close(*masks, rtol=0, atol=0)
        held.append(held_bytes(session))
    assert held[-1] == held[-8] < held_bytes(plain) / 2
    (again,) = short.propagate_in_video_iterator(session, 27)
    torch.testing.assert_close(again.pred_masks, masks[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def encoded(nano):
    """How many frames the encoder was given, call by call."""
    calls = []
    handle = nano.model.vision_encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    yield calls
    handle.remove()


@slow_over_bases
def test_small_frames_are_encoded_a_few_at_a_time_while_a_video_is_propagated(nano, processor, encoded, monkeypatch):
    def session(size=1, count=12, prompted=11):
        session = VideoSession(Frames(count), processor, max_vision_features_cache_size=size)
        processor.add_inputs_to_inference_session(session, prompted, 1, **BOX)
        encoded.clear()
        return session

    one, expected = session(), {}
    for frame_idx in reversed(range(12)):
        expected[frame_idx] = nano.model(one, frame_idx=frame_idx, reverse=True).pred_masks
    assert encoded == [1] * 12
    for size, batches in ((1, [1, 4, 4, 1, 1, 1]), (5, [1, 5, 5, 1])):
        propagated = session(size)
        tracked = track(nano.model, propagated, 11, reverse=True)
        assert encoded == batches and tracked.keys() == expected.keys()
        assert propagated.cache.max_vision_features_cache_size == size
        for frame_idx, masks in tracked.items():
            assert (masks - expected[frame_idx]).abs().mean() < 1e-4
    # A large cache is not filled at once; large frames are encoded one by one on a CPU.
    one = session(30, 40, 0)
    for frame_idx in (0, 1):
        nano.model(one, frame_idx=frame_idx)
    assert encoded == [16]
    monkeypatch.setattr("samoe_hf.model.tracking.SMALL_IMAGE_SIZE", 64)
    track(nano.model, session(count=5, prompted=0))
    assert encoded == [1] * 5


def test_frames_of_all_forms_are_the_same(processor):
    """Points are in pixels of the frame, so its height and width must be told from its channels."""
    video = np.random.default_rng(0).integers(0, 255, (2, 60, 40, 3), dtype=np.uint8)
    low, gray = video[:, :3], video[..., 0]  # of three rows, as there are channels
    for frames, form in (
        (video, torch.tensor(video)),
        (video, torch.tensor(video).permute(0, 3, 1, 2)),
        (video, [*video.transpose(0, 3, 1, 2)]),
        (video, [Image.fromarray(frame) for frame in video]),
        (low, [Image.fromarray(frame) for frame in low]),
        (np.stack([gray] * 3, axis=-1), gray),
    ):
        session = VideoSession(form, processor)
        assert (session.video_height, session.video_width) == frames.shape[1:3]
        expected = processor.video_processor(videos=frames[1:], input_data_format="channels_last", return_tensors="pt")
        assert torch.equal(session.get_frame(1), expected.pixel_values_videos[0, 0])


def test_pillows_images_are_shown_as_a_viewer_does(processor):
    """Upright, and on white where they are transparent."""
    turned, clear = Image.fromarray(np.full((40, 60, 3), 9, np.uint8)), Image.new("RGBA", (60, 40))
    turned.getexif()[0x0112] = 6
    assert VideoSession([turned], processor).video_height == 60
    white = VideoSession([np.full((40, 60, 3), 255, np.uint8)], processor).get_frame(0)
    assert torch.equal(VideoSession([clear], processor).get_frame(0), white)


def test_bad_arguments_are_named(nano, processor):
    frame = np.zeros((40, 60, 3), np.uint8)
    for frames, message in (
        ([], "`frames` is empty"),
        ([frame / 255], r"of uint8, got float64 \(40, 60, 3\) on frame 0"),
        ([np.zeros((40, 60, 4), np.uint8)], r"got uint8 \(40, 60, 4\)"),
        ("video.mp4", "got <U1"),
        ([Image.fromarray(np.zeros((40, 60), np.uint16))], "got uint16"),
    ):
        with pytest.raises(ValueError, match=f"`frames`.*{message.removeprefix('`frames`')}"):
            VideoSession(frames, processor)
    with pytest.raises(ValueError, match=r"`frames` must be of one size, got \(40, 60\) and on frame 1 \(60, 40\)"):
        VideoSession([frame, frame.swapaxes(0, 1)], processor).get_frame(1)
    with pytest.raises(ValueError, match="`frames` and `processor`"):
        VideoSession(Frames(2))
    session = VideoSession(Frames(2), processor, keep_frames=3)
    processor.add_inputs_to_inference_session(session, 0, 1, **BOX)
    with pytest.raises(ValueError, match="`keep_frames` must be at least the model's reach of 16, got 3"):
        nano.model(session, frame_idx=0)
