"""Masks in the forms in which datasets store them."""

import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from helpers.layouts import SIZE, label_map, make_frames, make_sa_v, save_image
from samoe_hf.data import SampleError, Video, load_videos, video_from_row
from samoe_hf.data.annotations import MaskArrays, ObjectImages
from samoe_hf.data.frames import ArrayFrames


def make_masks(num_frames=3, num_objects=2, size=(8, 10)):
    masks = np.zeros((num_frames, num_objects, *size), bool)
    masks[0, :, 2:5, 2:5] = True
    masks[1, 0, 3:6, 3:6] = True
    return masks


def test_a_video_tells_visible_objects_and_masks_of_chosen_ones():
    masks = make_masks()
    video = Video.from_arrays("v", np.zeros((3, 8, 10), np.uint8), masks, [7, 300])
    assert (len(video), video.size, video.object_ids) == (3, (8, 10), [7, 300])
    assert [video.visible(t) for t in range(3)] == [[7, 300], [7], []]
    assert np.array_equal(video.masks(0), masks[0])
    assert np.array_equal(video.masks(1, [300, 7]), masks[1, ::-1])
    assert video.masks(0, []).shape == (0, 8, 10)


def test_unannotated_frames_are_not_absent_objects():
    annotations = MaskArrays(make_masks(2), [1, 2], frames=[0, 4])
    video = Video("v", ArrayFrames(np.zeros((5, 8, 10), np.uint8)), annotations)
    assert video.annotated_frames == [0, 4]
    with pytest.raises(SampleError, match="v: frame 2 is not annotated"):
        video.masks(2)
    with pytest.raises(SampleError, match="annotations up to frame 4, but 3 frames"):
        Video("v", ArrayFrames(np.zeros((3, 8, 10), np.uint8)), annotations)


def test_objects_with_images_of_their_own_may_overlap_and_be_missing(tmp_path):
    for name, size in (("a", (8, 10)), ("b", (8, 10)), ("small", (4, 5))):
        Image.fromarray(np.full(size, 255, np.uint8)).save(tmp_path / f"{name}.png")
    annotations = ObjectImages({1: {0: tmp_path / "a.png", 4: tmp_path / "a.png"}, 2: {0: tmp_path / "b.png"}})
    assert annotations.frames == [0, 4] and annotations.visible(4) == [1]
    assert annotations.masks(0, [1, 2]).all()
    assert annotations.masks(4, [2, 1]).any(axis=(1, 2)).tolist() == [False, True]
    assert annotations.masks(4, [2]).shape == (1, 8, 10)
    with pytest.raises(SampleError, match="object 2 differs in size"):
        ObjectImages({1: {0: tmp_path / "a.png"}, 2: {0: tmp_path / "small.png"}}).masks(0, [1, 2])


def draw_mask(soft):
    scale = 4 if soft else 1
    image = Image.new("L", (SIZE[1] * scale, SIZE[0] * scale))
    ImageDraw.Draw(image).ellipse([c * scale for c in (5, 4, 25, 20)], fill=255)
    return np.asarray(image.resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR) if soft else image)


def test_soft_edges_are_no_objects(tmp_path):
    options = make_frames(tmp_path)
    save_image(tmp_path / "Annotations" / "a" / "00000.png", draw_mask(soft=True))
    with pytest.raises(SampleError, match=r"a/00000\.png: a mask with soft edges.*`binary: true`"):
        load_videos(**options)[0].visible(0)
    assert load_videos(**options, binary=True)[0].visible(0) == [1]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("options, object_ids", [({}, [1]), ({"binary": False}, None), ({"ignore_ids": [7]}, [1])])
def test_black_and_white_masks_are_one_object_without_a_word(tmp_path, caplog, recwarn, dtype, options, object_ids):
    made, white = make_frames(tmp_path), np.iinfo(dtype).max
    for name in ("00000", "00002"):
        save_image(tmp_path / "Annotations" / "a" / f"{name}.png", (draw_mask(soft=False) > 0) * dtype(white))
    video = load_videos(**made, **options)[0]
    assert video.object_ids == (object_ids or [white]) and np.array_equal(video.masks(0)[0], draw_mask(soft=False) > 0)
    assert not caplog.messages and not recwarn.list


@pytest.mark.parametrize("dtype, white", [(np.uint8, 255), (np.uint16, 255), (np.uint16, 65535)])
def test_white_beside_ids_is_left_out_and_said_once(tmp_path, caplog, dtype, white):
    options, ids = make_frames(tmp_path), label_map((1, 2), (2, 12), dtype=dtype)
    ids[3:21, 11] = ids[3:21, 16] = ids[3, 11:17] = ids[20, 11:17] = white  # as PASCAL VOC draws around objects
    for name in ("00000", "00002"):
        save_image(tmp_path / "Annotations" / "a" / f"{name}.png", ids)
    for _ in range(2):
        assert load_videos(**options)[0].object_ids == [1, 2]
    assert [f"hold {white} beside ids: it is left out; `ignore_ids: []`" in m for m in caplog.messages] == [True]
    assert load_videos(**options, ignore_ids=[])[0].object_ids == [1, 2, white]
    assert load_videos(**options, ignore_ids=[1])[0].object_ids == [2, white]
    assert load_videos(**options, binary=True, ignore_ids=[white])[0].object_ids == [1]


def test_ids_of_16_bits_are_none_of_255(tmp_path):
    options, ids = make_frames(tmp_path), label_map((255, 2), (300, 12), dtype=np.uint16)
    save_image(tmp_path / "Annotations" / "a" / "00000.png", ids)
    save_image(tmp_path / "Annotations" / "a" / "00002.png", np.where(ids == 255, ids, 0))
    assert [load_videos(**options)[0].visible(t) for t in (0, 2)] == [[255, 300], [255]]


def test_a_label_image_is_no_mask_of_one_object(tmp_path):
    path = tmp_path / "a.png"
    save_image(path, label_map((1, 2), (2, 12)))
    with pytest.raises(SampleError, match=r"a\.png: read as the mask of one object, 3, but holds the values 1, 2"):
        ObjectImages({3: {0: path}}).visible(0)
    assert ObjectImages({3: {0: path}}, binary=True).masks(0, [3]).sum() == 2 * 16 * 4
    assert ObjectImages({3: {0: path}}, ignore_ids=[2]).masks(0, [3]).sum() == 16 * 4
    save_image(path, draw_mask(soft=True))
    assert ObjectImages({3: {0: path}}).visible(0) == [3]


def test_masks_of_any_form_keep_their_pixels():
    rng = np.random.default_rng(0)
    for _ in range(100):
        size = tuple(rng.integers(1, 40, 2))
        mask = rng.random(size) < rng.choice([0, 0.1, 0.5, 0.9, 1])
        encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        flat = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
        runs = np.diff(np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1])])).tolist()
        for counts in (encoded["counts"], encoded["counts"].decode(), runs):
            row = {"size": list(size), "object_ids": [1], "annotated_frames": [0], "masks": [[counts]], "spacing": []}
            frame = Image.fromarray(np.zeros(size, np.uint8))
            video = video_from_row(row | {"video_id": "v", "domain": "d", "frames": [frame], "frame_names": ["0"]})
            assert (video.masks(0)[0] == mask).all() and video.visible(0) == ([1] if mask.any() else [])


def test_ids_in_memory_are_different_and_above_0():
    for ids in ([0], [-1], [1.5], [True]):
        with pytest.raises(SampleError, match="integers above 0"):
            Video.from_arrays("v", np.zeros((1, 4, 4), np.uint8), np.ones((1, 1, 4, 4), bool), ids)
    with pytest.raises(SampleError, match="different"):
        Video.from_arrays("v", np.zeros((1, 4, 4), np.uint8), np.ones((1, 2, 4, 4), bool), [2, 2])


COUNTS = ["", "oooooooooo", "~~~~", "P`0", "é", "1" * 5000, [768, 1], [-1, 769], [2**63 - 1] * 2 + [770], [1.5], None]
HUGE = {"size": [10**6, 10**6], "counts": "PPYo1"}


@pytest.mark.parametrize(
    "change",
    [
        *({"video_height": height} for height in (25, -24, math.nan, None)),
        {"video_height": 10**6, "video_width": 10**6},
        *({"masklet": masklet} for masklet in (5, [[5]], [[HUGE]], [[HUGE | {"size": [24, 32]}]])),
        *({"masklet": [[{"size": [24, 32], "counts": counts}]]} for counts in COUNTS),
    ],
    ids=str,
)
def test_damaged_masklets_are_named(tmp_path, change):
    options = make_sa_v(tmp_path)
    path = tmp_path / "sav_000" / "sav_1_manual.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SampleError, match=r"sav_1_manual\.json"):
        video = load_videos(**options)[0]
        video.visible(0)
