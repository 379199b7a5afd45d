"""The processor that comes with a model, or is built for it."""

import json
import shutil

import pytest
from transformers import Sam2Processor, Sam2VideoProcessor

from samoe_hf import SamoeModel
from samoe_hf.model.processing_samoe import PROCESSOR_FILES, build_processor, load_processor


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
