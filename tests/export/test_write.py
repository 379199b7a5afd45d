"""What is written, and what is refused before anything is."""

import copy
import json

import numpy as np
import pytest
import torch

from helpers.domains import add_learned_domain, clip_masks, new_model, with_two_domains
from samoe_hf.cli import main
from samoe_hf.errors import InputError
from samoe_hf.export.parts import SIGNATURES
from samoe_hf.export.write import check, image_settings, with_plain_layers
from samoe_hf.model.expert_layer import ExpertMixture
from samoe_hf.model.processing_samoe import build_processor


@pytest.mark.parametrize(
    "setting, value",
    [
        ("fill_hole_area", 8),
        ("recent_memory_pooling", 2),
        ("older_memory_pooling", 2),
        ("memory_selection", "distractor"),
    ],
)
def test_settings_that_the_tracker_does_not_follow_are_refused_by_name(model, setting, value):
    setattr(model.config, setting, value)
    with pytest.raises(InputError, match=f"`{setting}` must be .*got '?{value}"):
        check(model, None)


def test_of_a_model_with_domains_one_is_chosen_by_name():
    model = with_two_domains()
    with pytest.raises(InputError, match="one of 'a', 'b', 'base'"):
        check(model, None)
    with pytest.raises(InputError, match="'c'"):
        check(model, "c")
    for domain in ("a", "b", "base"):
        check(model, domain)


def test_no_experts_are_exported_with_the_base(model):
    plain = with_plain_layers(model, "base")
    assert not any(isinstance(module, ExpertMixture) for module in plain.modules())


def test_types_that_onnxruntime_does_not_compute_in_are_refused(model):
    with pytest.raises(InputError, match=r"float32 or float16 .*bfloat16"):
        check(model.bfloat16(), None)


def test_a_processor_that_does_more_than_resize_is_refused(nano):
    processor = build_processor(nano.model.config)
    image_settings(nano.model, processor)
    processor.video_processor.do_center_crop, processor.video_processor.crop_size = True, {"height": 64, "width": 64}
    with pytest.raises(InputError, match="must prepare frames by a resize to 128 x 128 pixels"):
        image_settings(nano.model, processor)


def test_single_experts_are_merged_and_the_model_stays_as_it_is(two_clips):
    model = new_model()
    add_learned_domain(model, "one", 1, num_experts=1, num_experts_per_tok=1, lora_rank=2)
    plain = with_plain_layers(copy.deepcopy(model), "one")
    assert not any(isinstance(module, ExpertMixture) for module in plain.memory_attention.modules())
    torch.testing.assert_close(
        clip_masks(plain, two_clips, None), clip_masks(model, two_clips, "one"), atol=1e-4, rtol=0
    )


def test_the_command_shows_how_far_it_is(model_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("samoe_hf.export.write.write_part", lambda model, signature, path: path.touch())
    main(["export", str(model_folder), "--format", "torch", "--output", str(tmp_path / "out")])
    assert "5/5" in capfd.readouterr().err


@pytest.mark.slow
def test_the_description_is_that_of_the_files(exported):
    onnx = pytest.importorskip("onnx")
    description = json.loads((exported.folder / "model.json").read_text())
    assert {path.name for path in exported.folder.iterdir()} == {
        "model.json", "run.py", *(part["file"] for part in description["parts"].values())
    }  # fmt: skip
    assert description["parts"].keys() == SIGNATURES.keys()
    for part in description["parts"].values():
        graph = onnx.load(exported.folder / part["file"]).graph
        for values, described in ((graph.input, part["inputs"]), (graph.output, part["outputs"])):
            found = {}
            for value in values:
                tensor = value.type.tensor_type
                shape = [one.dim_param or one.dim_value for one in tensor.shape.dim]
                found[value.name] = {
                    "type": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
                    "shape": shape,
                }
            assert found == described


@pytest.mark.slow
def test_parts_take_any_numbers_of_objects_points_and_memories(exported):
    draw = np.random.default_rng(0)
    coarse, width = draw.normal(size=(1, 128, 8, 8)).astype(np.float32), 64
    for objects, maps, pointers in ((1, 1, 1), (3, 9, 20)):
        (conditioned,) = exported.tracker.run(
            "memory_attention",
            coarse=coarse,
            maps=draw.normal(size=(objects, maps, 64, width)).astype(np.float32),
            map_times=draw.integers(0, 7, (objects, maps)),
            pointers=draw.normal(size=(objects, pointers, 128)).astype(np.float32),
            pointer_times=draw.random((objects, pointers), np.float32),
        )
        assert conditioned.shape == (objects, 128, 8, 8) and np.isfinite(conditioned).all()
