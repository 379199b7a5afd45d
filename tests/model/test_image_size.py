"""Models that take frames of another size than their weights were trained on."""

import numpy as np
import pytest
import torch
from transformers import EdgeTamVideoModel, Sam2VideoModel, Sam3TrackerVideoModel

from helpers.edgetam import edgetam_model, needs_timm
from helpers.interaction import tiny_config
from helpers.sam3 import sam3_config
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.inference import load_processor, load_tracker
from samoe_hf.model.base import config_of_base
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import add_domain, keep_former_experts

BOX = [[[20.0, 10.0, 90.0, 80.0]]]


@pytest.fixture(scope="module", params=["sam2", "sam3", pytest.param("edgetam", marks=[needs_timm, pytest.mark.slow])])
def saved(request, tmp_path_factory):
    """A folder of a base's model, another size for it, and transformers' own class."""
    torch.manual_seed(0)
    base, size, own_class = {
        "sam2": lambda: (tiny_config(), 96, Sam2VideoModel),
        "sam3": lambda: (sam3_config(), 168, Sam3TrackerVideoModel),
        "edgetam": lambda: (config_of_base(edgetam_model().config), 192, EdgeTamVideoModel),
    }[request.param]()
    config = SamoeConfig.from_dict({**base.to_dict(), "memory_selection": "recent", "memory_attention_num_layers": 1})
    folder = tmp_path_factory.mktemp(request.param)
    model = SamoeModel(config).eval()
    model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(5.0)  # or masks would be empty
    model.save_pretrained(folder)
    load_processor(folder, model).save_pretrained(folder)
    return folder, size, own_class


def masks(model, processor) -> torch.Tensor:
    frames = np.random.default_rng(0).integers(0, 256, (3, 100, 120, 3), dtype=np.uint8)
    session = processor.init_video_session(video=frames, dtype=torch.float32)
    processor.add_inputs_to_inference_session(session, 0, 1, input_boxes=BOX)
    model(session, frame_idx=0)
    with torch.no_grad():
        return torch.stack([output.pred_masks for output in model.propagate_in_video_iterator(session, 0)])


def test_the_masks_are_those_of_transformers_own_model_of_that_size(saved):
    folder, size, own_class = saved
    ours, processor = load_tracker(folder, "cpu", image_size=size)
    theirs = own_class(config_of_base(ours.config)).eval()
    tensors = ours.state_dict()
    theirs.load_state_dict({name: tensors[name] for name in theirs.state_dict()})
    found, expected = masks(ours, processor), masks(theirs, processor)
    assert found.shape[-1] == 4 * size // (14 if own_class is Sam3TrackerVideoModel else 16)
    assert (found - expected).abs().mean() < 1e-5 and expected.std() > 1e-3


def test_a_model_of_another_size_is_saved_and_loaded_as_it_is(saved, tmp_path):
    folder, size, _ = saved
    model, processor = load_tracker(folder, "cpu", image_size=size)
    model.save_pretrained(tmp_path / "whole", processor=processor)
    model.save_pretrained(tmp_path / "trained", experts_only=True, processor=processor)
    expected = masks(model, processor)
    for name in ("whole", "trained"):
        again, own_processor = load_tracker(tmp_path / name, "cpu")
        assert again.config.image_size == own_processor.target_size == size
        assert torch.equal(masks(again, own_processor), expected)
        built = build_processor(again.config)
        for prepared in (processor, own_processor):
            assert prepared.image_processor.to_dict() == built.image_processor.to_dict()
            assert prepared.video_processor.to_dict() == built.video_processor.to_dict()
    back, processor = load_tracker(tmp_path / "whole", "cpu", image_size=SamoeConfig.from_pretrained(folder).image_size)
    assert torch.equal(masks(back, processor), masks(*load_tracker(folder, "cpu")))


@pytest.mark.parametrize("size", [100, 0, -32, True, 64.0, [64, 64], "64"])
def test_a_size_that_the_base_cannot_take_is_refused(model_folder, size):
    with pytest.raises(ValueError, match=r"`image_size` must be a multiple of 32, got"):
        SamoeModel.from_pretrained(model_folder, image_size=size)


def test_pooling_must_divide_the_new_sides_alone(model_folder):
    SamoeModel.from_pretrained(model_folder, image_size=96, older_memory_pooling=3)
    with pytest.raises(ValueError, match="`older_memory_pooling` must divide"):
        SamoeModel.from_pretrained(model_folder, image_size=96, older_memory_pooling=4)


def test_sizes_of_a_file_that_contradict_each_other_are_refused(model_folder):
    config = SamoeConfig.from_pretrained(model_folder)
    config.memory_attention_rope_feat_sizes = [4, 4]
    with pytest.raises(ValueError, match="`memory_attention_rope_feat_sizes` must be"):
        SamoeModel.from_pretrained(model_folder, config=config, image_size=64)


def test_a_gate_that_has_learned_another_size_is_told_of(model_folder, tmp_path, caplog):
    model = SamoeModel.from_pretrained(model_folder)
    keep_former_experts(model, "former")
    add_domain(model, "own")
    model.save_pretrained(tmp_path / "domains")
    with caplog.at_level("WARNING", logger="transformers"):
        SamoeModel.from_pretrained(tmp_path / "domains", image_size=96)
    assert "gate has learned domains on frames of 128 pixels" in caplog.text
