"""Names that SAM2-MoE and PEFT have for settings are answered with what they are called here."""

import json

import pytest

from samoe_hf import SamoeConfig, SamoeModel


@pytest.mark.parametrize(
    "old, name", [("top_k", "num_experts_per_tok"), ("alpha", "lora_alpha"), ("rank", "lora_rank")]
)
def test_settings_of_the_experts(old, name):
    for call in (SamoeConfig, lambda **settings: SamoeModel.from_pretrained("a", **settings)):
        with pytest.raises(ValueError, match=f"`{old}` is called `{name}` here"):
            call(**{old: 1})


def test_arguments_of_from_pretrained():
    with pytest.raises(ValueError, match="`ckpt_path` is called `pretrained_model_name_or_path` here"):
        SamoeModel.from_pretrained(ckpt_path="a.pt")
    with pytest.raises(ValueError, match="`config_file` is called `original_config` here"):
        SamoeModel.from_pretrained("a.pt", config_file="a.yaml")
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` must be given"):
        SamoeModel.from_pretrained()


def test_a_configuration_with_keys_of_others_loads(tmp_path):
    SamoeConfig().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_k": 50, "somebody": "else"}))
    config = SamoeConfig.from_pretrained(tmp_path)
    assert (config.somebody, config.num_experts_per_tok) == ("else", 2)
    with pytest.raises(ValueError, match="`top_k` is called"):
        SamoeConfig.from_pretrained(tmp_path, top_k=3)
    config.save_pretrained(tmp_path / "again")
