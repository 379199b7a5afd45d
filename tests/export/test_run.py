"""The tracker of an exported folder gives what the model gives."""

import copy
import json
import subprocess
import sys
import tracemalloc

import av
import numpy as np
import pytest
from PIL import Image

from helpers.export import EagerTracker, compare, difference, drawn_video, tracked_with_corrections
from samoe_hf import data
from samoe_hf.export.run import Film, Images, TrackedObject, Tracker, check_prompts, main, prepare, read_prompts, resize
from samoe_hf.model.memory_bank import Evidence, FrameMemory, MemoryBank
from samoe_hf.model.memory_selection import MemoryLimits, select_memories

FRAMES, MASKS = drawn_video(6)
MASK = next(iter(MASKS.values()))
POINT = [int(np.argwhere(MASK)[len(np.argwhere(MASK)) // 2][k]) for k in (1, 0)]
BOX = [int(x) for x in (*np.argwhere(MASK).min(0)[::-1], *np.argwhere(MASK).max(0)[::-1] + 1)]
PROMPTS = {
    "point": [{"frame": 0, "object": 1, "points": [POINT], "labels": [1]}],
    "points": [{"frame": 0, "object": 1, "points": [POINT, [2, 2]], "labels": [1, 0]}],
    "box": [{"frame": 0, "object": 1, "box": BOX}],
    "box and point": [{"frame": 0, "object": 1, "box": BOX, "points": [POINT], "labels": [1]}],
    "mask": [{"frame": 0, "object": 1, "mask": MASK}],
    "empty mask": [{"frame": 0, "object": 2, "box": BOX}, {"frame": 0, "object": 3, "mask": np.zeros_like(MASK)}],
    "empty mask, then shown": [{"frame": 0, "object": 1, "mask": 0 * MASK}, {"frame": 2, "object": 1, "mask": MASK}],
    "mask of a pixel": [{"frame": 1, "object": 1, "mask": np.arange(MASK.size).reshape(MASK.shape) == 5000}],
    "late and leaving": [
        {"frame": 3, "object": 1, "mask": MASK},
        {"frame": 1, "object": 2, "box": BOX},
        {"frame": 4, "object": 2, "points": [POINT], "labels": [1]},
        {"frame": 5, "object": 1, "end": True},
    ],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_it_tracks_as_the_model_does(reference, prompts):
    result = compare(reference.model, reference.processor, reference.tracker, FRAMES, prompts)
    assert result.mean < 1e-3 and result.iou > 0.999


@pytest.mark.parametrize("correction", [{"points": [[10, 90]], "labels": [0]}, {"box": BOX}, {"mask": MASK}])
def test_a_correction_reads_memories_and_refines_the_mask(reference, correction):
    prompts = [
        {"frame": 0, "object": 1, "points": [POINT], "labels": [1]},
        {"frame": 0, "object": 2, "box": BOX},
        {"frame": 3, "object": 1, "correction": True, **correction},
    ]
    theirs = tracked_with_corrections(reference.model, reference.processor, FRAMES, prompts)
    result = difference(theirs, {t: logits for t, _, logits in reference.tracker.track(FRAMES, prompts)})
    assert result.mean < 1e-3 and result.iou > 0.999


def test_a_corrected_frame_is_one_frame_where_memories_are_chosen_by_score(parts, monkeypatch):
    """All frames are taken to have scored well."""
    monkeypatch.setattr("samoe_hf.model.memory_selection.MIN_SCORE", -1)
    model = copy.deepcopy(parts.model)
    model.config.memory_selection = "score"
    click = {"points": [[10, 90]], "labels": [0]}
    prompts = [{"frame": 0, "object": 1, "box": BOX}, {"frame": 3, "object": 1, "correction": True, **click}]
    theirs = tracked_with_corrections(model, parts.processor, FRAMES, prompts)
    tracker = EagerTracker(model, parts.processor)
    tracker.rules["min_score"] = -1
    assert difference(theirs, {t: logits for t, _, logits in tracker.track(FRAMES, prompts)}).mean < 1e-5


@pytest.mark.parametrize("kind", ["recent", "score"])
@pytest.mark.parametrize("step", [1, -1])
def test_a_frame_reads_the_memories_that_the_model_reads(kind, step):
    """For random banks."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        num_frames, limit = int(draw.integers(2, 60)), int(draw.choice([-1, 1, 3]))
        frames = draw.permutation(num_frames)
        num_prompted, t = int(draw.integers(1, 5)), int(draw.integers(num_frames))
        tracker, one, bank = tracker_of(kind, num_frames, limit), TrackedObject(0, np.inf), MemoryBank()
        for x in frames[: 5 * num_prompted].tolist():
            score, is_prompted = float(draw.choice([0.0, 0.5])), x in frames[:num_prompted]
            memory = FrameMemory(np.zeros((1, 1)), np.zeros((1, 1)), [Evidence(score, 1, 1)])
            bank.write(x, memory.row(0), bool(is_prompted))
            (one.conditioning if is_prompted else one.tracked)[x] = SimpleMemory(x, score)
        maps, pointers = tracker.read(one, t, step)
        limits = MemoryLimits(7, 16, limit, num_frames)
        expected = select_memories(kind, bank, t, limits, reverse=step < 0)
        assert sorted(maps) == sorted(expected.spatial)
        assert sorted(pointers) == sorted((x, distance / expected.max_distance) for x, distance in expected.pointers)


@pytest.mark.parametrize("kind", ["recent", "score"])
def test_what_is_not_read_again_is_forgotten(kind):
    """Neither on the way onward, nor back from the first prompted frame."""
    tracker, one, draw = tracker_of(kind, 400), TrackedObject(100, np.inf), np.random.default_rng(0)
    one.conditioning = {100: SimpleMemory(100, 1.0)}
    one.tracked = {x: SimpleMemory(x, float(draw.choice([0.0, 0.5]))) for x in range(101, 300)}
    before = [tracker.read(one, t, step) for t, step in ((300, 1), (99, -1))]
    tracker.forget(one, 299)
    assert [tracker.read(one, t, step) for t, step in ((300, 1), (99, -1))] == before
    assert len(one.tracked) < 80


def tracker_of(kind: str, num_frames: int, max_conditioning: int = -1) -> Tracker:
    """What chooses memories in a video of so many frames; it has no model."""
    tracker = Tracker.__new__(Tracker)
    tracker.rules = {"num_maps": 7, "max_pointers": 16, "max_conditioning": max_conditioning, "min_score": 0.01}
    tracker.rules["memory_selection"], tracker.num_frames = kind, num_frames
    return tracker


class SimpleMemory:
    """Stands for the memory of a frame by its number."""

    def __init__(self, frame: int, score: float):
        self.map, self.pointer, self.score = frame, frame, score


@pytest.mark.parametrize(
    "prompt, rule",
    [
        ({"frame": 9}, 'a "frame" from 0 to 5'),
        ({"frame": [0]}, 'a "frame" from 0 to 5'),
        ({"object": 0}, 'an "object" from 1 to 255'),
        ({"object": "1"}, 'an "object" from 1 to 255'),
        ({"points": "here", "labels": [1]}, "points in the frame"),
        ({"points": [[1, 10**400]], "labels": [1]}, "points in the frame"),
        ({"points": [], "labels": []}, "at least one point"),
        ({"points": [[1, 1]], "labels": []}, "a label"),
        ({"points": [[1, 1]], "labels": [2]}, "a label"),
        ({"points": [[128, 1]], "labels": [1]}, "points in the frame of 128 x 96"),
        ({"box": [3, 3, 3, 9]}, "with an area"),
        ({"box": [1, 2, 3]}, "with an area"),
        ({"box": {"x": 1}}, "with an area"),
        ({"box": [130, 0, 140, 9], "end": False}, "a box in the frame"),
        ({"end": False}, "points, a box"),
        ({"box": [0, 0, 9, 9], "correction": "no"}, "true or false"),
        ({"box": [130, 0, 140, 9]}, "a box in the frame"),
        ({"mask": np.ones((9, 7))}, r"a mask of \(96, 128\) .*'mask': '\(9, 7\)'"),
        ({"mask": np.ones((96, 128)), "box": [0, 0, 9, 9]}, "or a mask"),
        ({}, "points, a box"),
        ({"box": [0, 0, 9, 9], "boxes": [1]}, "no other keys .*'boxes'"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused_by_name(prompt, rule):
    with pytest.raises(ValueError, match=rule):
        check_prompts([{"frame": 0, "object": 1, **prompt}], 6, (96, 128))


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "a list of at least one"),
        ({"frame": 0}, "a list of at least one"),
        (["box"], "a list of at least one"),
        ([PROMPTS["box"][0] | {"correction": True}], "first prompt of object 1"),
        ([{"frame": 2, "object": 1, "end": True}], "first prompt of object 1"),
        ([PROMPTS["point"][0] | {"labels": [0]}], "Object 1 must have a positive point, a box or a mask"),
        ([PROMPTS["box"][0] | {"frame": 3}, {"frame": 2, "object": 1, "end": True}], "end of object 1"),
        (PROMPTS["box"] * 2, "no other one of its object"),
    ],
)
def test_prompts_that_do_not_go_together_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts, 6, (96, 128))


@pytest.mark.parametrize("resample", ["BICUBIC", "BILINEAR"])
@pytest.mark.parametrize("size", [(480, 854), (100, 60)])
def test_frames_and_masks_are_resized_as_the_processor_does(parts, size, resample):
    import torch

    frame = np.asarray(Image.fromarray(FRAMES[0]).resize(size[::-1]))
    settings = {"resample": Image.Resampling[resample], "return_tensors": "pt"}
    resize_frames = parts.processor.video_processor
    expected = resize_frames(videos=frame[None].copy(), **settings).pixel_values_videos[0, 0]
    prepared = prepare(frame, parts.tracker.image | {"resample": resample})[0]
    assert abs(prepared - expected.numpy()).max() < 1e-6
    logits = np.random.default_rng(0).normal(size=(2, 32, 32)).astype(np.float32)
    (large,) = parts.processor.post_process_masks([torch.from_numpy(logits)[:, None]], [size], binarize=False)
    np.testing.assert_allclose(resize(logits, size), large[:, 0], atol=1e-4)


def test_the_program_writes_a_map_of_ids_for_each_frame_of_a_folder(reference, tmp_path, monkeypatch):
    (tmp_path / "frames").mkdir()
    for t, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(tmp_path / "frames" / f"frame{2 * t}.png")  # 10 after 8
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    prompts = [{"frame": 0, "object": 7, "mask": "mask.png"}, {"frame": 5, "object": 9, "box": BOX}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    arguments = ["run.py", "frames", "prompts.json", "masks"]
    if hasattr(reference, "folder"):
        arguments[0] = reference.folder / "run.py"
        subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr("samoe_hf.export.run.Tracker", lambda _: reference.tracker)
        main()
    assert {path.name for path in tmp_path.iterdir()} == {"frames", "mask.png", "prompts.json", "masks"}
    masks = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "masks").iterdir()}
    assert masks.keys() == {f"frame{2 * t}" for t in range(6)}
    given = [prompts[0] | {"mask": MASK}, prompts[1]]
    for t, _, logits in reference.tracker.track(FRAMES, given):
        expected = np.where(logits.max(axis=0) > 0, np.array([7, 9])[logits.argmax(axis=0)], 0)
        assert (masks[f"frame{2 * t}"] == expected).all()


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK"])
def test_images_are_shown_as_the_package_shows_them(tmp_path, mode):
    image, exif = Image.fromarray(FRAMES[0]), Image.Exif()
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(MASK))
    exif[0x0112] = 6
    image.convert(mode).save(tmp_path / ("0.jpg" if mode == "CMYK" else "0.png"), exif=exif)
    np.testing.assert_array_equal(Images(tmp_path)[0], data.read_video(tmp_path)[0])
    Image.fromarray(MASK).save(tmp_path / "mask.png", exif=exif)
    (tmp_path / "prompts.json").write_text('[{"mask": "mask.png"}]')
    np.testing.assert_array_equal(read_prompts(tmp_path / "prompts.json")[0]["mask"], np.rot90(MASK, -1))


@pytest.mark.parametrize("turn", [None, (90, False), (180, False), (270, True)])
def test_frames_of_a_video_are_those_that_the_package_reads(tmp_path, turn):
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as target:
        cover, stream = target.add_stream("mjpeg"), target.add_stream("libx264", rate=25)
        cover.height, cover.width, cover.pix_fmt, cover.disposition = (
            16,
            16,
            "yuvj420p",
            av.stream.Disposition.attached_pic,
        )
        stream.height, stream.width, stream.pix_fmt = *FRAMES[0].shape[:2], "yuv420p"
        if turn is not None:
            stream.set_display_rotation(turn[0], hflip=turn[1])
        target.mux(cover.encode(av.VideoFrame(16, 16, "yuvj420p")))
        for frame in FRAMES:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        target.mux(stream.encode())
    for frame, expected in zip(Film(path), data.read_video(path), strict=True):
        assert frame.shape == expected.shape and np.abs(frame - expected.astype(int)).mean() < 5


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264", "avi"])
def test_few_frames_of_a_video_are_held_whatever_their_order(tmp_path, monkeypatch, suffix):
    path, shape, codec = tmp_path / f"long.{suffix}", (64, 64, 3), "mjpeg" if suffix == "avi" else "libx264"
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=25, options={"g": "12", "bf": "2"} if codec == "libx264" else {})
        stream.height, stream.width = shape[:2]
        stream.pix_fmt = "yuv420p" if codec == "libx264" else "yuvj420p"
        for t in range(50):
            frame = av.VideoFrame.from_ndarray(np.full(shape, 5 * t, np.uint8), format="rgb24")
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    monkeypatch.setattr("samoe_hf.export.run.NUM_HELD", 5)
    film, order = Film(path), [0, 20, 40, *range(3, 50), *reversed(range(40)), 49, 0, 30]
    assert len(film) == 50
    assert [round(float(film[t].mean()) / 5) for t in order] == order
    assert len(film.held) == 5


@pytest.mark.parametrize(
    "frames, files, message",
    [
        ("none", {}, "FRAMES must be a folder of images or a video file, but none is not there"),
        ("texts", {"texts/a.txt": "no image"}, "texts must hold images"),
        ("film.mp4", {"film.mp4": "no video"}, "film.mp4 must be a folder of images or a video file"),
        ("twice", {"twice/0.png": FRAMES[0], "twice/0.bmp": FRAMES[0]}, "a name of its own"),
        ("deep", {"deep/0.png": FRAMES[0].astype(np.uint16)[..., 0]}, "8 bits for each color"),
        ("frames", {"frames/0.png": "no image"}, "0.png must be an image"),
        ("frames", {"frames/5.png": FRAMES[5][:50]}, r"Frame 5 must be \(128, 96\) pixels"),
        ("frames", {"prompts.json": None}, "prompts.json must be a JSON file of prompts: .*No such file"),
        ("frames", {"prompts.json": "["}, "prompts.json must be a JSON file of prompts: Expecting value"),
        ("frames", {"prompts.json": "[" * 100_000}, "prompts.json must be a JSON file of prompts: .*recursion"),
        ("frames", {"prompts.json": "5"}, "a list of at least one"),
        ("frames", {"prompts.json": '[{"frame": 0, "object": 1, "mask": "no.png"}]'}, "no.png must be an image"),
        (
            "frames",
            {"prompts.json": '[{"frame": 6, "object": 1, "box": [0, 0, 9, 9]}]'},
            "from 0 to 5, got {'frame': 6",
        ),
        ("frames", {"masks/a.png": MASK}, "MASKS must be a new folder, but masks exists"),
    ],
)
def test_the_program_says_in_a_line_what_it_cannot_use_and_writes_nothing(
    parts, tmp_path, monkeypatch, frames, files, message
):
    given = {f"frames/{t}.png": frame for t, frame in enumerate(FRAMES)}
    for name, content in {**given, "prompts.json": json.dumps(PROMPTS["box"]), **files}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if content is not None:
            path.write_text(content) if isinstance(content, str) else Image.fromarray(content).save(path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", frames, "prompts.json", "masks"])
    monkeypatch.setattr("samoe_hf.export.run.Tracker", lambda _: parts.tracker)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{message}[^\n]*$"):
        main()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "prompt", [{"points": [POINT], "labels": 1}, {"box": [BOX[:2], BOX[2:]]}, {"box": [*BOX[2:], *BOX[:2]]}]
)
def test_numbers_may_be_nested_and_corners_swapped(parts, prompt):
    flat = PROMPTS["box" if "box" in prompt else "point"]
    logits = [next(parts.tracker.track(FRAMES, given))[2] for given in ([{**flat[0], **prompt}], flat)]
    np.testing.assert_array_equal(*logits)


def test_few_objects_at_once_are_tracked_as_all_are(parts, monkeypatch):
    prompts = [PROMPTS["box"][0] | {"object": i} for i in (1, 2, 3)] + [PROMPTS["mask"][0] | {"object": 4}]
    together = {t: logits for t, _, logits in parts.tracker.track(FRAMES, prompts)}
    monkeypatch.setattr("samoe_hf.export.run.MAX_LOGITS", 3 * 64 * 64)
    apart = {t: logits for t, _, logits in parts.tracker.track(FRAMES, prompts)}
    assert difference(together, apart).mean < 1e-3


def test_masks_that_wait_for_a_late_object_are_not_held(parts, monkeypatch):
    def masks(ids):
        return {i: np.ones_like(parts.tracker.no_mask) for i in ids}

    def held(count):
        tracked = parts.tracker.track(FRAMES[:1] * count, [box, box | {"frame": count - 1, "object": 2}])
        tracemalloc.start()
        try:
            next(tracked)
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    (box,) = PROMPTS["box"]
    monkeypatch.setattr(parts.tracker, "look", lambda *_: None)
    monkeypatch.setattr(parts.tracker, "segment", lambda t, prompts, *_: masks(one["object"] for one in prompts))
    monkeypatch.setattr(parts.tracker, "follow", lambda t, step, ids: masks(ids))
    longer, shorter = held(200), held(100)
    assert longer - shorter < 50 * 4 * 32 * 32  # bytes of 50 masks


def test_frames_of_different_sizes_are_refused(parts):
    with pytest.raises(ValueError, match=r"Frame 1 must be \(128, 96\) pixels"):
        list(parts.tracker.track([FRAMES[0], FRAMES[1][:50]], PROMPTS["box"]))
