"""SamoeConfig: its defaults, its checks, and what it takes from a SAM 2 configuration."""

import pytest
from transformers import AutoConfig, Sam2VideoConfig

from samoe_hf import SamoeConfig


def test_defaults_are_the_originals():
    config = SamoeConfig()
    assert config.model_type == "samoe"
    assert (config.num_experts, config.num_experts_per_tok, config.lora_rank) == (10, 2, 4)
    assert (config.lora_alpha, config.lora_dropout, config.router_aux_loss_coef) == (1.0, 0.1, 0.0)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_experts", 0),
        ("num_experts", 2.5),
        ("num_experts", "4"),
        ("num_experts", True),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 11),
        ("lora_rank", 0),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("router_aux_loss_coef", -1),
        ("output_router_logits", "yes"),
        ("expert_modules", []),
        ("expert_modules", ""),
        ("expert_modules", [3]),
        ("fill_hole_area", -1),
    ],
)
def test_bad_values_are_refused_by_name(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{field}`"):
        SamoeConfig(**{field: value})
    SamoeConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{field}`"):
        SamoeConfig.from_pretrained(tmp_path, **{field: value})


def test_round_trip_and_auto_config(tmp_path):
    config = SamoeConfig(num_experts=3, lora_alpha=2, expert_modules=["q_proj"], image_size=512)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SamoeConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert type(loaded.mask_decoder_config) is type(config.mask_decoder_config)


def test_a_sam2_configuration_is_taken_without_warnings(tmp_path, caplog):
    Sam2VideoConfig(num_maskmem=5).save_pretrained(tmp_path)
    config = SamoeConfig.from_pretrained(tmp_path, num_experts=4)
    assert (config.model_type, config.num_maskmem, config.num_experts) == ("samoe", 5, 4)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_another_kind_of_model_is_refused(tmp_path):
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert'"):
        SamoeConfig.from_pretrained(tmp_path)
