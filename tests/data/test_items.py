"""Datasets of one's own, whose items are mappings with frames and masks."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from helpers.clips import numbered_video, square
from samoe_hf.data import ClipCollator, ClipDataset, ClipStream, SampleError, video_from_item, videos_from_items
from samoe_hf.data.frames import say_once

SIZE = (16, 20)
FRAMES = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
IDS = np.random.default_rng(1).choice(np.uint8([0, 2, 5]), (4, *SIZE))
MASKS = np.stack([IDS == 2, IDS == 5], axis=1)
CHANNELS_FIRST = np.moveaxis(FRAMES, 3, 1)
RAMP = np.zeros((4, *SIZE), np.uint8) + np.linspace(0, 255, 20).astype(np.uint8)


class MyDataset(Dataset):
    """The shape that SAM2-MoE's guide taught: no `__iter__`, and no IndexError at the end."""

    def __init__(self, count=3, **other):
        self.count, self.other = count, other

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        frames = torch.from_numpy(np.roll(CHANNELS_FIRST, index, axis=0)) / 255
        return {"frames": frames, "masks": torch.from_numpy(np.roll(MASKS, index, axis=0)).float(), **self.other}


class MyStream(IterableDataset):
    """Shares itself out among workers, as torch asks for."""

    def __iter__(self):
        items, worker = MyDataset(5), get_worker_info()
        for index in range(0, 5) if worker is None else range(worker.id, 5, worker.num_workers):
            yield items[index] | {"video_id": str(index)}


class MyIterable:
    """Knows nothing of workers, and can be gone through again."""

    def __iter__(self):
        return (MyDataset(5)[i] for i in range(5))


def assert_exact(video, frames=FRAMES, masks=MASKS, object_ids=(2, 5)):
    assert np.array_equal(np.stack(list(video.frames)), frames)
    assert video.object_ids == list(object_ids) and video.annotated_frames == list(range(len(masks)))
    for t, expected in enumerate(masks):
        assert np.array_equal(video.masks(t), expected)


# --- Exactness


@pytest.mark.parametrize(
    "frames",
    [
        FRAMES, CHANNELS_FIRST, FRAMES.astype(np.int64), FRAMES / 255, (FRAMES / 255).astype(np.float16),
        torch.from_numpy(FRAMES), torch.from_numpy(CHANNELS_FIRST) / 255, list(FRAMES),
        [torch.from_numpy(f) for f in CHANNELS_FIRST], [Image.fromarray(f) for f in FRAMES], FRAMES.tolist(),
    ],
    ids=lambda frames: type(frames).__name__,
)  # fmt: skip
def test_frames_of_each_form_are_kept_exactly(frames):
    assert_exact(video_from_item({"frames": frames, "masks": IDS}))


@pytest.mark.parametrize(
    "masks, ids",
    [
        *((x, (2, 5)) for x in (IDS, IDS[:, None], torch.from_numpy(IDS).float(), IDS.tolist(), list(IDS))),
        ([torch.from_numpy(i) for i in IDS], (2, 5)), ([Image.fromarray(i) for i in IDS], (2, 5)),
        *((x, (1, 2)) for x in (MASKS, MASKS * np.uint8(255), torch.from_numpy(MASKS).float(), list(MASKS))),
    ],
    ids=lambda masks: type(masks).__name__,
)  # fmt: skip
def test_masks_of_each_form_are_kept_exactly(masks, ids):
    assert_exact(video_from_item({"frames": FRAMES, "masks": masks}), object_ids=ids)
    assert_exact(video_from_item({"frames": FRAMES, "masks": masks, "object_ids": torch.tensor([2, 5])}))
    some = video_from_item({"frames": FRAMES, "masks": [masks[0], None, masks[2], None]})
    assert some.annotated_frames == [0, 2] and np.array_equal(some.masks(2), MASKS[2])


@pytest.mark.parametrize("size", [(3, 20), (20, 3), (1, 3)])
def test_the_masks_tell_channels_from_columns(size):
    frames = np.random.default_rng(2).integers(0, 256, (4, *size, 3), dtype=np.uint8)
    ids = np.ones((4, *size), np.uint8)
    for given in (frames, np.moveaxis(frames, 3, 1)):
        assert_exact(video_from_item({"frames": given, "masks": ids}), frames, ids[:, None] > 0, [1])


# --- Broken items


@pytest.mark.parametrize(
    "item, message",
    [
        ((FRAMES, IDS), r"item 4 must be a mapping .*, not tuple"),
        ({"video": FRAMES, "masks": IDS}, r"item 4 has no `frames`; its keys are \['video', 'masks'\]"),
        ({"frames": FRAMES, "masks": None}, r"item 4 has no `masks`"),
        ({"frames": FRAMES / 255 - 0.5, "masks": IDS}, r"item 4: `frames` are float64 from -0\.5 to 0\.5.*normal"),
        ({"frames": np.full(FRAMES.shape, np.nan), "masks": IDS}, r"item 4: `frames` are float64 from nan"),
        ({"frames": FRAMES.astype(np.int16) * 2, "masks": IDS}, r"item 4: `frames` are int16 from 0 to 510"),
        ({"frames": FRAMES > 9, "masks": IDS}, r"item 4: `frames` are bool"),
        ({"frames": np.zeros((4, *SIZE, 4), np.uint8), "masks": IDS}, r"item 4: `frames` must be .*C of 3 or 1"),
        ({"frames": np.zeros((4, 3, 3, 3), np.uint8), "masks": np.ones((4, 3, 3), int)}, r"`frames` .* do not tell"),
        ({"frames": FRAMES[:0], "masks": IDS}, r"item 4: `frames` must be .*, not \(0, 16, 20, 3\)"),
        ({"frames": [*FRAMES[:3], FRAMES[3, :8]], "masks": IDS}, r"item 4: `frames`\[3\] is of shape \(8, 20, 3\)"),
        ({"frames": [*FRAMES[:3], None], "masks": IDS}, r"item 4: `frames`\[3\] must hold numbers, not NoneType"),
        ({"frames": "video.mp4", "masks": IDS}, r"item 4: `frames` must hold numbers, not str"),
        ({"frames": FRAMES, "masks": IDS[:3]}, r"item 4: `masks` \(3, 16, 20\) do not fit `frames`.*expected \(4, 16"),
        ({"frames": FRAMES, "masks": IDS[:, 1:]}, r"item 4: `masks` \(4, 15, 20\) do not fit"),
        ({"frames": FRAMES, "masks": IDS[0]}, r"item 4: `masks` must be \(T, H, W\).*, not \(16, 20\)"),
        ({"frames": FRAMES, "masks": 3}, r"item 4: `masks` must be \(T, H, W\).*, not \(\)"),
        ({"frames": FRAMES, "masks": [None] * 4}, r"item 4: `masks` must be \(T, H, W\)"),
        ({"frames": FRAMES, "masks": IDS / 255}, r"item 4: `masks` must be whole numbers, not 0\.0.*give masks > 0.5"),
        ({"frames": FRAMES, "masks": IDS.astype(int) - 1}, r"item 4: `masks` must be 0 for background .*, not -1"),
        ({"frames": FRAMES, "masks": MASKS * np.uint8(7)}, r"item 4: `masks` .*must hold 0 and 1.*\[0, 7\]"),
        ({"frames": FRAMES, "masks": MASKS, "object_ids": [1]}, r"item 4: 1 `object_ids` for `masks` of 2 objects"),
        ({"frames": FRAMES, "masks": MASKS, "object_ids": [0, 1]}, r"item 4: `object_ids`: .*above 0"),
        ({"frames": FRAMES, "masks": RAMP}, "item 4: `masks` of frame 0 have soft edges"),
    ],
)  # fmt: skip
def test_a_broken_item_is_named_with_its_key(item, message):
    with pytest.raises(SampleError, match=message):
        video_from_item(item, 4)


# --- Datasets


@pytest.mark.parametrize("data", [MyStream(), MyIterable(), MyDataset(5), [MyDataset()[i % 3] for i in range(5)]])
def test_workers_share_out_a_stream(data):
    stream = ClipStream(data, square(16), num_frames=2)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    names = sorted(clip["video_id"] for clip in stream)
    assert len(names) == 5 and sorted(clip["video_id"] for clip in loader) == names


def test_a_stream_goes_on_after_a_broken_item(caplog):
    items = [MyDataset()[0], {"frames": FRAMES}, MyDataset()[1]]
    with pytest.raises(SampleError, match="item 1 has no `masks`"):
        list(ClipStream(items, square(16), num_frames=2))
    stream = ClipStream(items, square(16), num_frames=2, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert [clip["video_id"] for clip in stream] == ["item_0", "item_2"]
    assert stream.num_skipped == 1 and "item 1 has no `masks`" in caplog.text


def test_optional_keys_are_names_and_ids_that_count(caplog):
    say_once.cache_clear()
    item = {"frames": FRAMES[..., :1], "masks": IDS}
    video = video_from_item(item | {"object_ids": [5]}, 7)
    assert_exact(video, np.repeat(FRAMES[..., :1], 3, axis=-1), MASKS[:, 1:], [5])
    assert (video.video_id, video.domain) == ("item_7", "default")
    named = video_from_item(item | {"video_id": 12, "domain": "lab", "fps": 3})
    assert (named.video_id, named.domain) == ("12", "lab") and not caplog.text
    video_from_item(item | {"points": [1]})
    assert "`points` are not used" in caplog.text and "PromptRecipe" in caplog.text


@pytest.mark.parametrize("data", [{"frames": FRAMES, "masks": IDS}, "davis", 3, numbered_video(2)])
def test_what_is_no_dataset_is_refused(data):
    with pytest.raises(ValueError, match="must be a sequence or an iterable of items"):
        videos_from_items(data)


def test_what_has_no_length_or_no_clips_is_refused():
    class Endless(Dataset):
        def __getitem__(self, index):
            return MyDataset()[index]

    with pytest.raises(ValueError, match="needs `__len__`, which Endless lacks"):
        ClipDataset(Endless(), square(16))
    with pytest.raises(ValueError, match="give it to ClipStream"):
        ClipDataset(MyIterable(), square(16))
    with pytest.raises(ValueError, match=r"ClipDataset\(videos, processor\)"):
        ClipCollator()([MyDataset()[0]])
