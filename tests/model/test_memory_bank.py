"""Which memories a frame reads: SAM 2's choice."""

import torch

from samoe_hf.model.memory_bank import FrameMemory, MemoryBank, closest_frames, read_features, read_pointers

LIMITS = {"num_maskmem": 7, "max_object_pointers": 16}


def memory(value: float = 0.0, features: bool = True) -> FrameMemory:
    return FrameMemory(torch.full((1, 4), value), torch.full((1, 2, 3), value) if features else None)


def bank(conditioning=(), tracked=()) -> MemoryBank:
    bank = MemoryBank()
    for t in conditioning:
        bank.write(t, memory(t), conditioning=True)
    for t in tracked:
        bank.write(t, memory(t), conditioning=False)
    return bank


def test_all_conditioning_frames_and_the_last_six_others():
    selection = bank([0], range(1, 20)).select(20, **LIMITS)
    assert selection.spatial == ((0, 6), (14, 5), (15, 4), (16, 3), (17, 2), (18, 1), (19, 0))
    assert selection.pointers == ((0, 20), *((20 - d, d) for d in range(1, 16)))
    assert selection.max_distance == 15


def test_a_short_video_limits_pointers_and_their_scale():
    selection = bank([0], range(1, 5)).select(5, num_frames=6, **LIMITS)
    assert selection.pointers == ((0, 5), (4, 1), (3, 2), (2, 3), (1, 4)) and selection.max_distance == 5


def test_backward_in_time_mirrors_forward():
    forward = bank([0], range(1, 9)).select(9, **LIMITS)
    backward = bank([9], range(1, 9)).select(0, reverse=True, **LIMITS)
    assert [(9 - t, i) for t, i in backward.spatial] == list(forward.spatial)
    assert [(9 - t, d) for t, d in backward.pointers] == list(forward.pointers)


def test_pointers_of_conditioning_frames_ahead_only_if_wanted():
    both = bank([0, 8])
    assert both.select(4, **LIMITS).pointers == ((0, 4),)
    assert both.select(4, past_pointers_only=False, **LIMITS).pointers == ((0, 4), (8, -4))
    assert [t for t, _ in both.select(4, **LIMITS).spatial] == [0, 8]


def test_limited_conditioning_frames_are_the_closest_and_the_rest_may_be_recent():
    assert closest_frames(10, [0, 3, 8, 12, 20], 3) == [8, 12, 3]
    assert closest_frames(10, [0, 3], -1) == [0, 3]
    selection = bank([0, 7, 8, 9]).select(10, max_cond_frames=2, **LIMITS)
    assert selection.spatial == ((9, 6), (8, 6), (7, 2))
    assert selection.pointers == ((9, 1), (8, 2), (7, 3), (0, 10))


def test_a_prompted_frame_takes_the_place_of_a_tracked_one():
    some = bank([0], [1])
    some.write(1, memory(5), conditioning=True)
    assert 1 not in some.tracked and some[1].pointers[0, 0] == 5


def test_banks_are_read_as_one_batch():
    banks = [bank([0], [1]), bank([0], [1])]
    banks[1].write(1, memory(7), conditioning=False)
    device = torch.device("cpu")
    assert read_features(banks, 1, device)[:, 0, 0].tolist() == [1, 7]
    assert read_pointers(banks, 1, device)[:, 0].tolist() == [1, 7]
    assert banks[0].select(2, **LIMITS) == banks[1].select(2, **LIMITS)
