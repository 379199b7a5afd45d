"""Memories of one object, and those of several read together."""

import torch

from samoe_hf.model.memory_bank import FrameMemory, MemoryBank, ObjectMemory, read_memories

CPU = torch.device("cpu")


def memory(value: float = 0.0) -> ObjectMemory:
    return FrameMemory(torch.full((1, 4), value), torch.full((1, 2, 3), value)).row(0)


def bank(*values: float) -> MemoryBank:
    bank = MemoryBank()
    for t, value in enumerate(values):
        bank.write(t, memory(value), conditioning=t == 0)
    return bank


def test_a_prompted_frame_takes_the_place_of_a_tracked_one():
    some = bank(0, 1)
    some.write(1, memory(5), conditioning=True)
    assert 1 not in some.tracked and some[1].pointer[0, 0] == 5


def test_banks_are_read_as_one_batch():
    banks = [bank(0, 1), bank(0, 7)]
    assert read_memories(banks, [1, 1], "features", CPU)[:, 0, 0].tolist() == [1, 7]
    assert read_memories(banks, [1, 1], "pointers", CPU)[:, 0].tolist() == [1, 7]


def test_each_object_may_read_another_frame_or_none():
    banks = [bank(3, 1), bank(0, 7), bank(0, 5)]
    assert read_memories(banks, [0, 1, None], "features", CPU)[:, 0, 0].tolist() == [3, 7, 0]
    assert read_memories(banks, [None, 1, 1], "pointers", CPU)[:, 0].tolist() == [0, 7, 5]


def test_objects_of_one_batch_are_read_as_the_batch():
    batch = FrameMemory(torch.arange(12.0).view(3, 4))
    banks = [MemoryBank() for _ in range(3)]
    for row, own in enumerate(banks):
        own.write(0, batch.row(row), conditioning=True)
    assert read_memories(banks, [0, 0, 0], "pointers", CPU) is batch.pointers
    assert read_memories([banks[2], banks[0]], [0, 0], "pointers", CPU).tolist() == batch.pointers[[2, 0]].tolist()


def test_what_is_read_is_copied_to_apples_gpus_before_it_is_freed(monkeypatch):
    given = []
    monkeypatch.setattr(torch.Tensor, "to", lambda memory, device, **options: given.append(options))
    read_memories([bank(0, 1)], [1], "pointers", torch.device("mps"))
    assert given == [{"non_blocking": False}]
