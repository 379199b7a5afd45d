"""Prompts and masks of a whole video, and the processor that comes with a model."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import Sam2Processor, Sam2VideoProcessor

from samoe_hf import SamoeModel, small_base
from samoe_hf.data import SyntheticVideos
from samoe_hf.inference import PROCESSOR_FILES, TrackedFrame, VideoPrompt, check_prompts, load_processor, track_video
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.tracks import ObjectScores

SIZE = (96, 128)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "`prompts` is empty"),
        ([VideoPrompt(1)], "Neither points nor a box nor a mask is given of object 1 on frame 0"),
        ([VideoPrompt(1, 5, box=(1, 2, 3, 4))], "frame 5, but the video has the frames 0 to 4"),
        ([VideoPrompt(1, points=[(1, 2)], labels=[])], "Each point of object 1 on frame 0 needs a label"),
        ([VideoPrompt(1, points=[(1, 2)], labels=[3])], "Each point of object 1 on frame 0 needs a label, 0 or 1"),
        ([VideoPrompt(1, points=[(1, 96)], labels=[1])], r"point \(1, 96\) of object 1 on frame 0 lies outside"),
        ([VideoPrompt(1, points=[(float("nan"), 2)], labels=[1])], r"point \(nan, 2\)"),
        ([VideoPrompt(1, box=(1, 2, float("nan"), 4))], "nan, 4.* must be"),
        ([VideoPrompt(1, box=(7, 2, 7, 4))], "finite and with an area"),
        ([VideoPrompt(1, box=(7, 2, 9))], r"The box \(7, 2, 9\) .* must be \(x0, y0, x1, y1\)"),
        ([VideoPrompt(1, box=(128, 2, 140, 4))], "lies outside of the video"),
        ([VideoPrompt(1, mask=np.ones((128, 96), bool))], r"size \(128, 96\), but the video has \(96, 128\)"),
        ([VideoPrompt(1, box=(1, 2, 3, 4), mask=np.ones(SIZE, bool))], "A mask and points or a box are given"),
        ([VideoPrompt(2, box=(1, 2, 3, 4)), VideoPrompt(2, points=[(1, 2)], labels=[1])], "Object 2 has two prompts"),
        (
            [VideoPrompt(1, points=[(1, 2)], labels=[0]), VideoPrompt(1, 3, points=[(1, 2)], labels=[0])],
            "positive point",
        ),
        ([VideoPrompt(1, 2, box=(1, 2, 3, 4), end=True)], "prompt is given of object 1 on frame 2, where it is said"),
        ([VideoPrompt(3, 1, end=True)], "Object 3 must have a positive point, a box or a mask"),
        ([VideoPrompt(3, 2, box=(1, 2, 3, 4)), VideoPrompt(3, 1, end=True)], r"the frames \[2\]\), got frame 1"),
        ([VideoPrompt(3, box=(1, 2, 3, 4)), VideoPrompt(3, 2, end=True), VideoPrompt(3, 4, end=True)], "got frame 2"),
        ([VideoPrompt(3, box=(1, 2, 3, 4)), VideoPrompt(3, 5, end=True)], "frame 5, but the video has the frames 0 to"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(prompts, 5, SIZE)


def test_prompts_at_the_edges_are_fine():
    check_prompts(
        [
            VideoPrompt(1, 4, points=[(0, 0), (127.9, 95.9)], labels=[1, 0], box=(-3, -3, 131, 96)),
            VideoPrompt(2, 4, box=(8, 7, 6, 5)),
            VideoPrompt(1, 3, mask=np.zeros(SIZE, bool)),
        ],
        5,
        SIZE,
    )


@pytest.mark.parametrize("side", [1, 8])
def test_a_given_mask_of_few_pixels_is_not_lost(nano, side):
    """Of the model's pixels it covers less than half of one, of those of its masks less than half of several."""
    frames, mask = np.zeros((2, 480, 640, 3), np.uint8), np.zeros((480, 640), bool)
    mask[200 : 200 + side, 300 : 300 + side] = True
    first, _ = track_video(nano.model, build_processor(nano.model.config), frames, [VideoPrompt(1, mask=mask)])
    assert first.scores.score[0] > 0.99
    found = np.argwhere(first.logits[0].numpy() > 0)
    assert len(found) and abs(found.mean(0) - (200, 300)).max() < 20


def test_an_object_that_nothing_shows_is_absent(nano):
    """Only empty masks are given of it; others, and itself once it is shown, are tracked as ever."""
    frames, processor = SyntheticVideos(1, 4, SIZE, seed=3)[0].frames, build_processor(nano.model.config)
    box, nothing = VideoPrompt(1, 1, box=(10, 10, 60, 60)), np.zeros(SIZE, bool)
    alone = {one.frame_idx: one for one in track_video(nano.model, processor, frames, [box])}
    both = [box, VideoPrompt(2, 1, mask=nothing), VideoPrompt(2, 2, mask=nothing)]
    for one in track_video(nano.model, processor, frames, both):
        assert torch.allclose(one.logits[0], alone[one.frame_idx].logits[0], atol=1e-3)
        assert (one.logits[1] < 0).all() and one.scores.score[1] < 1e-3
    shown = [VideoPrompt(2, 0, mask=nothing), VideoPrompt(2, 2, box=(10, 10, 60, 60))]
    tracked = list(track_video(nano.model, processor, frames, shown))
    assert [one.frame_idx for one in tracked] == [2, 3, 1, 0], "onward and back from where it is shown"
    assert [bool((one.logits > 0).any()) for one in tracked] == [True, True, True, False]


def test_points_and_boxes_may_be_arrays(nano):
    video = SyntheticVideos(1, 2, SIZE, seed=3)[0]
    processor = build_processor(nano.model.config)
    given = {"points": [(40, 30)], "labels": [1], "box": (10, 10, 60, 60)}
    arrays = {name: np.asarray(value) for name, value in given.items()}
    lists, arrays = (
        [frame.logits for frame in track_video(nano.model, processor, video.frames, [VideoPrompt(1, **options)])]
        for options in (given, arrays)
    )
    assert all(torch.equal(a, b) for a, b in zip(lists, arrays, strict=True))


def test_objects_come_and_leave_as_if_each_were_alone():
    model, rng = SamoeModel.from_pretrained(small_base(), image_size=64), np.random.default_rng(0)
    video, processor = SyntheticVideos(1, 10, SIZE, seed=3)[0], build_processor(model.config)
    prompts = []
    for object_id in (5, 1, 3):
        (start, end), (y, x) = sorted(rng.choice(10, 2, replace=False).tolist()), rng.integers(0, 50, 2).tolist()
        prompts += [VideoPrompt(object_id, end, end=True), VideoPrompt(object_id, start, box=(x, y, x + 40, y + 30))]

    def tracked(prompts):
        frames = {frame.frame_idx: frame for frame in track_video(model, processor, video.frames, prompts)}
        return torch.stack([frames[t].logits for t in range(10)], dim=1), frames[0].object_ids

    together, ids = tracked(prompts)
    assert ids == [5, 1, 3]
    for one, (leaves, prompt) in zip(together, zip(prompts[::2], prompts[1::2], strict=True), strict=True):
        (own,), _ = tracked([leaves, prompt])
        assert (one[leaves.frame_idx :] == -1024).all() and (one[: leaves.frame_idx] > -1024).all()
        assert (one - own).abs().mean() < 1e-4
        assert ((one > 0) & (own > 0)).sum() >= 0.999 * ((one > 0) | (own > 0)).sum()


def test_maps_of_ids_are_no_larger_than_they_need_to_be():
    logits, scores = torch.tensor([[[-1.0, 2.0, 3.0]], [[-2.0, 1.0, 4.0]]]), ObjectScores(*np.ones((3, 2)))
    for ids, kind in (([3, 7], np.uint8), ([3, 255], np.uint8), ([300, 7], np.uint16), ([7, 70_000], np.uint32)):
        id_map = TrackedFrame(0, ids, logits, scores).id_map()
        assert id_map.dtype == kind and id_map.tolist() == [[0, *ids]]
    with pytest.raises(ValueError, match=r"ids above 0, which is the background, got \[0, 1\]"):
        TrackedFrame(0, [0, 1], logits, scores).id_map()


def test_the_saved_processor_is_loaded_and_where_there_is_none_it_is_built(nano, model_folder, tmp_path):
    settings = json.loads((model_folder / "processor_config.json").read_text())
    settings["video_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert list(load_processor(folder, nano.model).video_processor.image_mean) == [0.1, 0.2, 0.3]
    for name in PROCESSOR_FILES:
        (folder / name).unlink(missing_ok=True)
    for source in (folder, nano.checkpoint):
        built = load_processor(source, nano.model)
        assert isinstance(built, Sam2VideoProcessor)
        assert built.video_processor.to_dict() == build_processor(nano.model.config).video_processor.to_dict()


@pytest.mark.parametrize("part", ["image_processor", "video_processor", "target_size"])
def test_a_processor_of_another_size_is_refused(nano, model_folder, tmp_path, part):
    """Frames of another size do not fit the model, and points would be put elsewhere without a word."""
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    settings = json.loads((folder / "processor_config.json").read_text())
    if part == "target_size":
        settings[part] = 256
    else:
        settings[part]["size"] = {"height": 256, "width": 256}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    model = SamoeModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"folder: its processor makes frames of 256 x 256 .* takes 128 x 128"):
        load_processor(folder, model)


def test_a_processor_of_something_else_is_refused(nano, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    image_processor = build_processor(nano.model.config).image_processor
    for name in PROCESSOR_FILES:
        (folder / name).unlink(missing_ok=True)
    Sam2Processor(image_processor).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"folder: its processor is a Sam2\w+, expected a Sam2VideoProcessor"):
        load_processor(folder, nano.model)


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False}, {"do_rescale": False}, {"image_std": [0, 0, 0]}, {"image_mean": [float("nan")] * 3},
        {"image_mean": [0.5, 0.5]}, {"resample": 99}, {"rescale_factor": 1e30}, {"rescale_factor": 0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("part", ["image_processor", "video_processor"])
def test_a_processor_that_cannot_work_is_refused(nano, model_folder, tmp_path, part, change):
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings[part].update(change)
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="folder: its processor"):
        load_processor(folder, nano.model)


@pytest.mark.parametrize("part", [None, "image_processor", "video_processor"])
def test_no_code_of_a_processors_folder_is_asked_for_or_run(nano, model_folder, tmp_path, monkeypatch, part):
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    settings = json.loads((folder / "processor_config.json").read_text())
    owner = settings if part is None else settings[part]
    kind = {None: "AutoProcessor", "image_processor": "AutoImageProcessor", "video_processor": "AutoVideoProcessor"}
    owner.update(auto_map={kind[part]: "evil.Evil"}, **{"processor_class" if part is None else f"{part}_type": "Evil"})
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises((ValueError, OSError)):
        load_processor(folder, nano.model)
    assert not (tmp_path / "run").exists()
