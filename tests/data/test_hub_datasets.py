"""Datasets of the `datasets` library with frames and masks as columns of images."""

import datasets
import numpy as np
import pytest
from PIL import Image

from helpers.clips import square
from samoe_hf.data import ClipDataset, SampleError, load_videos, videos_from_dataset, voc_palette
from samoe_hf.errors import InputError

SIZE = (16, 20)
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 4, *SIZE, 3), dtype=np.uint8)
IDS = np.random.default_rng(1).choice(np.uint16([0, 2, 300]), (2, 4, *SIZE))
IMAGES = datasets.List(datasets.Image())


def images(arrays):
    return [Image.fromarray(array) for array in arrays]


def palette_image(ids):
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    return image


def video_rows(frames="frames", masks="masks", /, **columns):
    """Two videos, a row each; `columns`: name -> values and their type."""
    values = {frames: [images(video) for video in FRAMES], masks: [images(video) for video in IDS]}
    features = {frames: IMAGES, masks: IMAGES} | {name: kind for name, (_, kind) in columns.items()}
    return datasets.Dataset.from_dict(
        values | {name: rows for name, (rows, _) in columns.items()}, features=datasets.Features(features)
    )


def frame_rows(masks="mask", /, **columns):
    """The frames of two videos, a row each, those of the first one backward."""
    frames, ids = (np.concatenate([array[0, ::-1], array[1]]) for array in (FRAMES, IDS))
    features = {"image": datasets.Image(), masks: datasets.Image()}
    features |= {name: kind for name, (_, kind) in columns.items()}
    rows = {"image": images(frames), masks: images(ids)} | {name: values for name, (values, _) in columns.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def assert_exact(videos, names, domain="dataset"):
    videos = list(videos)
    assert [video.video_id for video in videos] == list(names) and {video.domain for video in videos} == {domain}
    for video, frames, ids in zip(videos, FRAMES, IDS, strict=True):
        assert np.array_equal(np.stack(list(video.frames)), frames)
        assert video.object_ids == [2, 300] and video.annotated_frames == [0, 1, 2, 3]
        for t, expected in enumerate(ids):
            assert np.array_equal(video.masks(t), np.stack([expected == 2, expected == 300]))


TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")


@pytest.mark.parametrize("names", [("frames", "masks"), ("images", "annotations"), ("frames", "segmentation")])
def test_lists_of_images_are_known_by_their_columns_names(names):
    dataset = video_rows(*names)
    for one in (dataset, dataset.to_iterable_dataset()):
        assert_exact(videos_from_dataset(one), ["row_0", "row_1"])


def test_columns_can_be_named_from_load_videos(tmp_path):
    dataset = video_rows("rgb", "ids", clip=(["a", "b"], TEXT), frames=([1, 2], NUMBER), domain=(["x", "x"], TEXT))
    dataset.save_to_disk(tmp_path / "saved")
    options = {"frames_column": "rgb", "masks_column": "ids", "video_column": "clip"}
    for streaming in (False, True):
        videos = load_videos("dataset", tmp_path / "saved", streaming=streaming, **options)
        assert_exact(videos, "ab", "x")
        assert_exact(load_videos("dataset", tmp_path / "saved", domain="lab", **options), "ab", "lab")


def test_splits_that_were_saved_together_are_recognized(tmp_path):
    datasets.DatasetDict(train=video_rows(), test=video_rows()).save_to_disk(tmp_path / "saved")
    for split in ("train", "test"):
        assert_exact(load_videos(tmp_path / "saved", split=split), ["row_0", "row_1"])
    with pytest.raises(SampleError, match="saved: its split 'nope' cannot be loaded"):
        load_videos(tmp_path / "saved", split="nope")


def test_no_split_is_read_as_another(tmp_path):
    video_rows().save_to_disk(tmp_path / "alone")
    assert_exact(load_videos("dataset", tmp_path / "alone"), ["row_0", "row_1"])
    with pytest.raises(InputError, match="alone: a dataset saved alone, not known to be the split 'val'"):
        load_videos("dataset", tmp_path / "alone", split="val")
    dataset = datasets.Dataset.from_dict(video_rows().to_dict(), video_rows().features, split="val")
    dataset.save_to_disk(tmp_path / "val")
    assert_exact(load_videos("dataset", tmp_path / "val", split="val"), ["row_0", "row_1"])


@pytest.mark.parametrize(
    "order",
    [
        {"frame": ([3, 2, 1, 0, 0, 1, 2, 3], NUMBER)},
        {"frame_name": (["12", "10", "9", "2", "2", "9", "10", "12"], TEXT)},
        {"frame_index": ([0.5, 0.25, 0.125, 0.0, 0.0, 0.125, 0.25, 0.5], datasets.Value("float32"))},
    ],
    ids=lambda order: next(iter(order)),
)
def test_rows_that_are_frames_are_grouped_to_videos(order):
    videos = videos_from_dataset(frame_rows("label", video=(["b"] * 4 + ["a"] * 4, TEXT), **order))
    assert_exact(videos, "ba")
    assert videos.select(["a"])[0].video_id == "a"
    assert len(ClipDataset(videos, square(16), num_frames=2)[1]["labels"]) == 2
    numbers = datasets.ClassLabel(names=["first", "second"])
    videos = videos_from_dataset(frame_rows(which=([0] * 4 + [1] * 4, numbers)), video_column="which")
    assert videos.video_ids == ["first", "second"]
    assert np.array_equal(np.stack(list(videos[0].frames)), FRAMES[0, ::-1]), "without numbers, the rows' order"


def test_frames_without_masks_are_not_annotated_and_palettes_are_ids():
    masks = [palette_image(IDS[0, 0]), None, None, palette_image(IDS[0, 3])]
    dataset = datasets.Dataset.from_dict(
        {"frames": [images(FRAMES[0])], "masks": [masks]},
        features=datasets.Features({"frames": IMAGES, "masks": IMAGES}),
    )
    video = videos_from_dataset(dataset)[0]
    assert video.annotated_frames == [0, 3] and video.object_ids == [2, 300 % 256]


def test_columns_of_arrays_and_rows_of_a_transform_are_items():
    arrays = datasets.Dataset.from_dict({"frames": FRAMES.tolist(), "masks": IDS.astype(int).tolist()})
    made = video_rows().with_transform(lambda rows: {"frames": rows["frames"], "masks": rows["masks"]})
    stream = datasets.IterableDataset.from_generator(
        lambda: ({"frames": images(frames), "masks": images(ids)} for frames, ids in zip(FRAMES, IDS, strict=True))
    )
    assert stream.features is None
    for dataset in (arrays, made, stream):
        assert_exact(videos_from_dataset(dataset), ["item_0", "item_1"], "default")
        with pytest.raises(ValueError, match="`binary` goes with columns of images"):
            videos_from_dataset(dataset, binary=True)


# --- What cannot be used


@pytest.mark.parametrize(
    "dataset, options, message",
    [
        (lambda: datasets.Dataset.from_dict({"pictures": [1]}), {}, r"It has: pictures \(int64\)\. Expected: frames"),
        (lambda: video_rows("rgb", "masks"), {}, r"rgb \(a list of images\), masks \(a list of images\)"),
        (lambda: frame_rows(), {}, "a frame a row as image, mask .* and video_id"),
        (lambda: video_rows(), {"masks_column": "nothing"}, r"`masks_column`: .* no column 'nothing'\. It has: frames"),
        (lambda: frame_rows(video=([*"aaaabbbb"], TEXT)).to_iterable_dataset(), {}, "leave out `streaming`"),
        (lambda: frame_rows(video=([None, *"aaabbbb"], TEXT)), {}, "row 0 of the dataset has no 'video'"),
    ],
)
def test_columns_that_are_not_known_are_listed_with_what_was_expected(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        videos_from_dataset(dataset(), **options)


def broken(masks, frames=FRAMES[0]):
    return datasets.Dataset.from_dict(
        {"video": ["v"], "frames": [images(frames)], "masks": [masks]},
        features=datasets.Features({"video": TEXT, "frames": IMAGES, "masks": IMAGES}),
    )


def jpeg(tmp_path):
    Image.fromarray(IDS[0, 0].astype(np.uint8)).save(tmp_path / "mask.jpg")
    return {"bytes": (tmp_path / "mask.jpg").read_bytes(), "path": None}


@pytest.mark.parametrize(
    "masks, frames, message",
    [
        (lambda _: images(IDS[0, :3]), FRAMES[0], "v: 4 frames in 'frames' and 3 masks in 'masks'"),
        (lambda _: images(FRAMES[0]), FRAMES[0], "v, frame 0 of 'masks': an RGB image of [0-9]* colours"),
        (lambda _: images(IDS[0, :, 1:]), FRAMES[0], r"v: masks of size \(15, 20\) for frames of \(16, 20\)"),
        (lambda folder: [jpeg(folder)] * 4, FRAMES[0], "v, frame 0 of 'masks': JPEG image"),
        (
            lambda _: [{"bytes": b"no image", "path": None}] * 4,
            FRAMES[0],
            r"v, frame 0 of 'masks': not a readable image \(\w+\('cannot identify image file'\)\)$",
        ),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named_with_the_column(masks, frames, message, tmp_path):
    dataset = broken(masks(tmp_path), frames)
    for videos in (videos_from_dataset(dataset), videos_from_dataset(dataset.to_iterable_dataset())):
        with pytest.raises(SampleError, match=message):
            video = next(iter(videos))
            video.masks(0, [2])


def test_an_item_whose_image_datasets_cannot_decode_is_named():
    row = {"frames": [[{"bytes": b"no image", "path": None}]], "masks": [[[1]]]}
    dataset = datasets.Dataset.from_dict(
        row, features=datasets.Features({"frames": IMAGES, "masks": datasets.Array2D((1, 1), "int32")})
    )
    with pytest.raises(SampleError, match=r"^item 0 cannot be read: cannot identify image file$"):
        videos_from_dataset(dataset)[0]
