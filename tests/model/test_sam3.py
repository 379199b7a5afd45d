"""SAM 3's tracker as a base: the same numbers as transformers' model, from its files, and with experts all the rest."""

import copy
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Sam3TrackerVideoModel, Sam3TrackerVideoProcessor, Sam3VideoModel

from helpers.prompted import PROMPTS, OriginalsMasks, track
from helpers.reference import change_config
from helpers.sam3 import AS_TRANSFORMERS, sam3_config, sam3_models, save_combined
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.inference import load_processor
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.processing_samoe import build_processor


@pytest.fixture(scope="module")
def as_drawn():
    """Ours and transformers' model with weights as they are drawn for training."""
    torch.manual_seed(0)
    config = sam3_config()
    theirs = Sam3TrackerVideoModel(config).eval()
    ours = SamoeModel(SamoeConfig.from_dict({**config.to_dict(), **AS_TRANSFORMERS})).eval()
    ours.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(5.0)  # or masks would be empty
    theirs.load_state_dict({name: x for name, x in ours.state_dict().items() if not is_expert_parameter(name)})
    return ours, theirs, build_processor(ours.config)


@pytest.fixture(scope="module")
def lively():
    """The same with weights with which prompts, memories and pointers all show in the masks."""
    torch.manual_seed(0)
    ours, theirs = sam3_models(sam3_config())
    return ours.double(), theirs.double(), build_processor(ours.config)


@pytest.mark.parametrize(
    ("prompt", "start", "reverse"),
    [*((prompt, 0, False) for prompt in PROMPTS if prompt != "box"), ("objects", 4, True), ("box", 3, False)],
)
def test_masks_are_those_of_transformers(as_drawn, prompt, start, reverse):
    """Also those of a further click."""
    ours, theirs, processor = as_drawn
    click = [60, 40] if prompt == "point" else None
    masks, expected = (track(x, processor, PROMPTS[prompt], start, reverse, click) for x in (ours, theirs))
    # A mask becomes a memory by another way, as the original's (below).
    limit = 1e-4 if prompt == "mask" else 1e-6
    assert (masks - expected).abs().mean() < limit and 1e-3 * expected.std() > 1e-6
    assert click is None or (masks[1] - masks[0]).abs().mean() > 1e-4


@pytest.mark.parametrize("prompt", ["clicks", "objects"])
def test_masks_are_those_of_transformers_where_weights_matter(lively, prompt):
    """Both round memories to bfloat16, and a rounding of float32 before tips a value now and then, which shows."""
    ours, theirs, processor = lively
    masks, expected = (track(x, processor, PROMPTS[prompt], dtype=torch.float64) for x in (ours, theirs))
    assert (masks[:2] - expected[:2]).abs().max() < 1e-10  # the prompted frame, twice
    assert (masks[2] - expected[2]).abs().mean() < 1e-6 and (masks - expected).abs().mean() < 1e-5
    assert ((masks > 0) != (expected > 0)).float().mean() < 2e-3
    assert (expected[2:] - expected[1]).abs().mean() > 0.05


class WithOriginalsMasks(OriginalsMasks, Sam3TrackerVideoModel):
    """transformers' model, which takes masks as the original does."""


def test_mask_prompts_differ_from_transformers_as_the_original_does(lively):
    ours, theirs, processor = lively
    original = WithOriginalsMasks(theirs.config).eval().double()
    original.load_state_dict(theirs.state_dict())
    masks, expected, other = (
        track(x, processor, PROMPTS["mask"], dtype=torch.float64) for x in (ours, original, theirs)
    )
    assert (masks[2] - expected[2]).abs().mean() < 1e-6 and (masks - expected).abs().mean() < 1e-5
    assert (masks - other).abs().mean() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_are_taken_in_16_bits(as_drawn, dtype):
    ours, _, processor = as_drawn
    masks = track(copy.deepcopy(ours).to(dtype), processor, PROMPTS["mask"], dtype=dtype)
    expected = track(ours, processor, PROMPTS["mask"])
    assert ((masks > 0) == (expected > 0)).float().mean() > 0.99 and (expected[2:] > 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["objects", "box", "mask"])
def test_masks_are_those_of_transformers_with_the_published_layers(prompt):
    """32 layers, frames of 1008 pixels, windows of 24, four layers of memory attention; narrower than published."""
    torch.manual_seed(0)
    config = sam3_config(32, 1008, 24, memory_attention_num_layers=4)
    ours, theirs = sam3_models(config)
    processor = build_processor(ours.config)
    assert ours.prompt_encoder.mask_input_size == (288, 288)
    # As transformers draws them: with livelier ones rounding of memories shows.
    theirs = Sam3TrackerVideoModel(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    masks, expected = (track(x, processor, PROMPTS[prompt]) for x in (ours, theirs))
    assert masks.shape[-1] == 288 and (masks - expected).abs().mean() < 1e-4


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam3")
    save_combined(folder)
    return folder


def same_tensors(model, expected):
    tensors = model.state_dict()
    return all(torch.equal(tensors[name], x) for name, x in expected.state_dict().items())


def test_the_tracker_of_a_combined_checkpoint_is_loaded_alone(combined, tmp_path):
    model, info = SamoeModel.from_pretrained(combined, output_loading_info=True)
    expected = Sam3TrackerVideoModel.from_pretrained(combined)
    assert same_tensors(model, expected)
    assert not info["unexpected_keys"] and all(map(is_expert_parameter, info["missing_keys"]))
    assert model.config.image_size == 112 and model.config.max_cond_frame_num == 4
    processor = load_processor(combined, model)
    assert isinstance(processor, Sam3TrackerVideoProcessor) and processor.target_size == 112
    # A tracker that is saved alone has the combined checkpoint's names or its own.
    built = Sam3TrackerVideoModel(sam3_config())
    for folder, saved in (("loaded", expected), ("built", built)):
        saved.save_pretrained(tmp_path / folder)
        assert same_tensors(SamoeModel.from_pretrained(tmp_path / folder), saved)
    Sam3VideoModel.from_pretrained(combined, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert SamoeModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_file_with_tensors_twice_is_refused(combined, tmp_path):
    (tmp_path / "config.json").write_text((combined / "config.json").read_text())
    tensors = load_file(combined / "model.safetensors")
    twice = {f"tracker_model.{name}": x.clone() for name, x in tensors.items() if "k_proj" in name}
    save_file(tensors | twice, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="are the same tensor of SAM 3's tracker"):
        SamoeModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", 100, "`image_size` must be a multiple of 14, got 100"),
        ("prompt_encoder_config.image_size", 126, "must be 112 in this configuration, got 126"),
        ("vision_config.backbone_config.image_size", 126, "must be 112 in this configuration, got 126"),
        ("vision_config.backbone_feature_sizes", [[28, 28], [14, 14], [7, 7]], "backbone_feature_sizes` must be"),
        ("memory_attention_rope_feat_sizes", [7, 7], "must be \\[8, 8\\] in this configuration"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(combined, field, value, message):
    config = SamoeConfig.from_pretrained(combined)
    *owners, name = field.split(".")
    owner = config
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, value)
    with pytest.raises(ValueError, match=message):
        SamoeModel.from_pretrained(combined, config=config)


SIDE = 14 * 2**16


@pytest.mark.parametrize(
    "changes",
    [
        {"tracker_config": "x"},
        {"tracker_config": {"image_size": 2**21}},
        {"tracker_config": {"num_maskmem": "7"}},
        {"tracker_config__vision_config__backbone_config__patch_size": [14, 14]},
        {"tracker_config__vision_config__backbone_config__patch_size": 15},
        {"tracker_config__vision_config__backbone_config__patch_size": 2**20},
        {
            "tracker_config__image_size": SIDE,
            "tracker_config__vision_config__backbone_config__image_size": SIDE,
            "tracker_config__vision_config__backbone_feature_sizes": [[r * SIDE // 14] * 2 for r in (4, 2, 1)],
            "tracker_config__prompt_encoder_config__image_size": SIDE,
            "tracker_config__memory_attention_rope_feat_sizes": [SIDE // 14] * 2,
        },
    ],
    ids=str,
)
def test_a_combined_configuration_that_lies_is_refused_by_name(combined, tmp_path, changes):
    """Sizes that nothing holds are refused before they are allocated."""
    folder = shutil.copytree(combined, tmp_path / "model")
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        SamoeModel.from_pretrained(folder)


def test_it_learns_after_transformers_model_has_tracked(as_drawn):
    """transformers keeps positions for all models of a process, in inference mode if one is tracking first."""
    _, theirs, processor = as_drawn
    track(theirs, processor, PROMPTS["point"])
    model = SamoeModel(SamoeConfig.from_dict(theirs.config.to_dict())).train()
    model.gradient_checkpointing_enable()
    masks = torch.zeros(1, 1, 2, 112, 112, dtype=torch.bool)
    masks[..., 20:60, 20:60] = True
    model(torch.randn(1, 2, 3, 112, 112), masks).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
