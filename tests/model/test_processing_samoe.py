"""The processor that comes with a model, or is built for it."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import Sam2Processor, Sam2VideoProcessor

from samoe_hf import SamoeModel
from samoe_hf.model.processing_samoe import PROCESSOR_FILES, build_processor, load_processor
from samoe_hf.model.session import VideoSession


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
        {"do_resize": False},
        {"do_rescale": False},
        {"image_std": [0, 0, 0]},
        {"image_mean": [float("nan")] * 3},
        {"image_mean": [0.5, 0.5]},
        {"resample": 99},
        {"rescale_factor": 1e30},
        {"rescale_factor": 0},
    ],
    ids=str,
)
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


@pytest.mark.parametrize("make", [torch.as_tensor, np.asarray], ids=["torch", "numpy"])
@pytest.mark.parametrize("kind", ["plain", "video"])
def test_masks_are_bool_or_of_two_values_and_others_are_refused(nano, make, kind):
    processor = build_processor(nano.model.config)
    frames = np.zeros((2, 96, 128, 3), np.uint8)
    start = {
        "plain": lambda: processor.init_video_session(video=frames),
        "video": lambda: VideoSession(frames, processor),
    }
    mask = np.zeros((96, 128), bool)
    mask[20:50, 30:90] = True

    def area(values):
        session = start[kind]()
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=make(values))
        return int((nano.model(session, 0).pred_masks > 0).sum())

    expected = area(mask)
    for values in (mask.astype(np.uint8), 255 * mask.astype(np.uint8), mask.astype(np.float32)):
        assert area(values) == expected > 0
    for values in (np.where(mask, 8.0, -8.0), np.where(mask, 0.9, 0.1), np.full(mask.shape, np.nan), mask.T, mask * 2):
        with pytest.raises(ValueError, match="input_masks"):
            area(values)


@pytest.mark.parametrize("ids", [torch.tensor([3, 5]), np.array([3, 5]), [np.int64(3), torch.tensor(5)]], ids=str)
def test_ids_of_objects_become_numbers(nano, ids):
    processor = build_processor(nano.model.config)
    session = VideoSession(np.zeros((1, 96, 128, 3), np.uint8), processor)
    for _ in range(2):  # again they are the same objects
        boxes = [[[90, 70, 10, 20], [40, 70, 90, 10]]]
        processor.add_inputs_to_inference_session(session, torch.tensor(0), ids, input_boxes=boxes)
    assert session.obj_ids == [3, 5] and all(type(one) is int for one in session.obj_ids)
    points = session.point_inputs_per_obj[0][0]["point_coords"][0, 0]
    assert (points[0] < points[1]).all()
    nano.model.remove_object(session, torch.tensor(3), strict=True)
    assert session.obj_ids == [5]
    with pytest.raises(ValueError, match="`obj_ids` must be integers"):
        processor.add_inputs_to_inference_session(session, 0, 2.5, input_boxes=[[[1, 2, 30, 40]]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_boxes": [[[10, 10, 10, 40]]]}, "must have an area, got an empty box"),
        (
            {"input_points": [[[[10, 10], [20, 20]]]], "input_labels": [[[1]]]},
            "label for each of the 2|inconsistent dimensions",
        ),
        ({"input_points": [[[[10, 10]]]], "input_labels": [[[5]]]}, "must be 1 .* or 0 .*got 5"),
    ],
)
def test_prompts_that_cannot_be_meant_get_a_sentence(nano, inputs, message):
    processor = build_processor(nano.model.config)
    session = VideoSession(np.zeros((1, 96, 128, 3), np.uint8), processor)
    with pytest.raises(ValueError, match=message):
        processor.add_inputs_to_inference_session(session, 0, 1, **inputs)
    assert not session.obj_ids
