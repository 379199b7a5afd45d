"""Experts to PEFT LoRAs and back, and LoRAs that cannot be experts."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.reference import assert_same_tensors, attend
from peers import base_of
from samoe_hf.analysis.routing import route_all_to
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.expert_sleep import ASLEEP
from samoe_hf.surgery.loras import add_expert, export_expert, read_lora

ATTENTION = r"memory_attention\.layers\.\d+\.self_attn\.[qkvo]_proj"


@pytest.fixture(scope="module")
def base(nano):
    """The reference without experts, as transformers' own model."""
    return base_of(nano.model)


@pytest.fixture
def lora(base, tmp_path):
    """Makes a LoRA with PEFT, with random B, and returns its folder."""

    def make(name: str = "lora", **settings):
        torch.manual_seed(0)
        settings = {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION, **settings}
        made = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
        for key, parameter in made.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
        made.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def test_peft_loads_an_exported_expert_onto_transformers_model(nano, base, tmp_path):
    export_expert(nano.model, 2, tmp_path / "out")
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    with route_all_to(nano.model, 2):
        expected = attend(nano.model)
        torch.testing.assert_close(attend(adapted.base_model.model), expected, atol=1e-6, rtol=1e-6)
    assert (attend(base) - expected).abs().max() > 1e-4
    assert (attend(nano.model) - expected).abs().max() > 1e-4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(nano.model.expert_module_names)
    assert config["base_model_name_or_path"] == nano.model.origin.source["name_or_path"]


def test_an_expert_comes_back_bit_for_bit(model, tmp_path):
    export_expert(model, 2, tmp_path / "out")
    index = add_expert(model, tmp_path / "out")
    assert index == model.config.num_experts - 1 == 4
    for _, module in expert_modules(model):
        assert torch.equal(module.lora_A[index], module.lora_A[2])
        assert torch.equal(module.lora_B[index], module.lora_B[2])
    export_expert(model, index, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_peft_lora_becomes_an_expert_that_does_what_it_did(model, base, lora):
    folder = lora(
        r=3, lora_alpha=5, use_rslora=True, rank_pattern={"0.self_attn.q_proj": 2}, alpha_pattern={"k_proj": 1}
    )
    expected = attend(PeftModel.from_pretrained(copy.deepcopy(base), folder).base_model.model)
    index = add_expert(model, folder)
    with route_all_to(model, index):
        torch.testing.assert_close(attend(model), expected, atol=1e-6, rtol=1e-6)
    assert (attend(base) - expected).abs().max() > 1e-3
    module = model.memory_attention.layers[0].self_attn.q_proj
    assert module.lora_B[index, :, 2:].abs().max() == 0 < module.lora_A[index, 2:].abs().min()
    untouched = model.memory_attention.layers[0].cross_attn_image.q_proj
    assert untouched.lora_B[index].abs().max() == 0 < untouched.lora_A[index].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_new_expert_sleeps_and_leaves_the_output_as_it_is(nano, model, lora, dtype):
    model.to(dtype)
    index = add_expert(model, lora())
    for _, module in expert_modules(model):
        assert {getattr(module, name).dtype for name in ("lora_A", "lora_B")} == {dtype}
        gates = module.gates(module.router(100 * torch.randn(50, module.in_features, dtype=dtype)))
        assert gates[:, index].abs().max() == 0 and gates.isfinite().all()
        assert module.router.bias[-1] == ASLEEP and module.router.weight[-1].abs().max() == 0
    if dtype == torch.float32:
        torch.testing.assert_close(attend(model), attend(nano.model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 5}, "has rank 5 .* experts have 4, which cannot hold it"),
        ({"use_dora": True}, "more than a plain LoRA.*use_dora=True"),
        ({"modules_to_save": ["iou_prediction_head"]}, "more than a plain LoRA.*modules_to_save"),
        ({"target_modules": ["qkv"]}, "5 layers without experts, such as 'vision_encoder"),
    ],
)
def test_loras_that_are_no_expert_are_refused(nano, model, lora, settings, message):
    folder = lora(**settings)
    with pytest.raises(ValueError, match=message):
        add_expert(model, folder)
    assert model.config.num_experts == 4
    assert_same_tensors(model, nano.model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda key, tensor: None if "lora_B" in key else tensor, "only one matrix of the LoRA on .*lora_A"),
        (lambda key, tensor: tensor * float("nan"), "infinite values or NaN"),
        (lambda key, tensor: tensor[:2] if "lora_A" in key else tensor, "says rank 4 of .* but has A"),
        (lambda key, tensor: tensor[None], "no matrix of a LoRA on a linear layer"),
        (lambda key, tensor: None, "has no tensors"),
        (
            lambda key, tensor: tensor[:, :32] if "lora_A" in key else tensor,
            "for another model: .* goes from 32 to 128 features, the layer from 128",
        ),
    ],
)
def test_damaged_loras_are_refused(model, lora, change, message):
    folder = lora()
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        add_expert(model, folder)


@pytest.mark.parametrize(
    "setting, value", [("r", "x"), ("lora_alpha", None), ("rank_pattern", {"(": 4}), ("alpha_pattern", [4])]
)
def test_wrong_settings_of_a_lora_are_refused_with_its_folders_name(lora, setting, value):
    path = lora() / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    with pytest.raises(ValueError, match=f"{path.parent}"):
        read_lora(path.parent)


def test_only_safetensors_and_loras_are_read(model, lora):
    folder = lora()
    with pytest.raises(OSError, match=r"^'no/such/lora' is neither a folder or file here, nor an id of the Hub"):
        add_expert(model, "no/such/lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        add_expert(model, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        add_expert(model, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="an expert can only be a LoRA"):
        add_expert(model, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "NO_SUCH"}')
    with pytest.raises(ValueError, match="is none that this PEFT reads"):
        add_expert(model, folder)


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    changed = {key: change(key, tensor) for key, tensor in load_file(path).items()}
    save_file({key: tensor.contiguous() for key, tensor in changed.items() if tensor is not None}, path)
