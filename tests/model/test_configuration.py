"""SamoeConfig: its defaults, its checks, and what it takes from a SAM 2 configuration."""

import json

import pytest
from transformers import AutoConfig, Sam2VideoConfig

from helpers.reference import change_config
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.model.configuration_samoe import EXPERT_SETTINGS, MEMORY_ATTENTION_PROJECTIONS, OTHER_RULES

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_experts", 0), ("num_experts", 2.5), ("num_experts", "4"), ("num_experts", True),
        ("num_experts_per_tok", 11), ("lora_rank", 0), ("lora_alpha", 0), ("lora_alpha", NAN), ("lora_alpha", 1e308),
        ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("router_aux_loss_coef", INF), ("output_router_logits", "yes"),
        ("expert_modules", []), ("expert_modules", [3]), ("fill_hole_area", -1), ("memory_attention_dropout", NAN),
        ("base_model", "facebook/sam2"), ("base_model", {"name_or_path": 5}), ("adapters", ["one"]),
        ("adapters", {"one": "yes"}), ("dtype", True), ("image_size", 0), ("image_size", 127), ("domains", ["a"]),
        ("domains", [{"name": "a"}]), ("unknown", "far"), ("memory_selection", "far"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{field}`"):
        SamoeConfig(**{field: value})
    config = SamoeConfig()
    config.save_pretrained(tmp_path)
    if field in OTHER_RULES:  # what a model asks for while it runs
        with pytest.raises(ValueError, match=f"`{field}`"):
            setattr(config, field, value)
    with pytest.raises(ValueError, match=f"`{field}`"):
        SamoeConfig.from_pretrained(tmp_path, **{field: value})
    change_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=f"{tmp_path}: config.json has a wrong value. `{field}`"):
        SamoeConfig.from_pretrained(tmp_path)


def test_all_ways_of_loading_name_the_folder(tmp_path):
    SamoeConfig().save_pretrained(tmp_path)
    for load in (SamoeModel.from_pretrained, SamoeConfig.from_pretrained):  # unless the value is the caller's
        with pytest.raises(ValueError, match=r"^`lora_rank` must be"):
            load(tmp_path, lora_rank=0)
    change_config(tmp_path, lora_rank=1.5)
    for load in (SamoeModel.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"{tmp_path}: config.json has a wrong value. `lora_rank`"):
            load(tmp_path)


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


def test_names_of_sam2_moe_and_peft_are_answered_with_what_they_are_called_here():
    for old, name in (("top_k", "num_experts_per_tok"), ("alpha", "lora_alpha"), ("rank", "lora_rank")):
        for call in (SamoeConfig, lambda **settings: SamoeModel.from_pretrained("a", **settings)):
            with pytest.raises(ValueError, match=f"`{old}` is called `{name}` here"):
                call(**{old: 1})
    for arguments, message in (
        ({"ckpt_path": "a.pt"}, "`ckpt_path` is called `pretrained_model_name_or_path` here"),
        ({"pretrained_model_name_or_path": "a.pt", "config_file": "a.yaml"}, "`config_file` is called"),
        ({}, "`pretrained_model_name_or_path` must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            SamoeModel.from_pretrained(**arguments)


def test_a_configuration_with_keys_of_others_loads(tmp_path):
    SamoeConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_k": 50, "somebody": "else"}))
    config = SamoeConfig.from_pretrained(tmp_path)
    assert (config.somebody, config.num_experts_per_tok) == ("else", 2)
    with pytest.raises(ValueError, match="`top_k` is called"):
        SamoeConfig.from_pretrained(tmp_path, top_k=3)
    config.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("expression", "patterns", "excluded"),
    [
        (
            r"memory_attention\.layers\.\d+\.(self_attn|cross_attn_image)\.[qkvo]_proj",
            MEMORY_ATTENTION_PROJECTIONS,
            None,
        ),
        (r"(?!mask_decoder\.|prompt_encoder\.).*", ["*"], ["mask_decoder.*", "prompt_encoder.*"]),
        (r"memory_attention\.layers\.1\..*_proj", ["memory_attention.layers.1.*_proj"], None),
    ],
)
def test_expressions_of_older_folders_are_read_as_patterns(expression, patterns, excluded):
    domain = {"name": "a", **{n: x for n, x in SamoeConfig().to_dict().items() if n in EXPERT_SETTINGS}}
    domain = {**domain, "expert_modules": expression}
    del domain["exclude_modules"]
    config = SamoeConfig(expert_modules=expression, domains=[domain])
    for owner in (vars(config), config.domains[0]):
        assert owner["expert_modules"] == patterns and owner["exclude_modules"] == excluded
