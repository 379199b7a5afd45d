"""Ordinary adapters of PEFT beside the experts: both are trained, saved and loaded."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Sam2VideoConfig, Sam2VideoModel

from helpers.reference import track_reference
from samoe_hf import SamoeModel
from samoe_hf.data import ClipDataset, SyntheticVideos
from samoe_hf.model.adapters import is_adapter_parameter
from samoe_hf.model.experts import is_expert_parameter
from samoe_hf.model.processor import build_processor
from samoe_hf.training.arguments import SamoeTrainingArguments
from samoe_hf.training.trainer import SamoeTrainer

VISION = r"vision_encoder\..*\.qkv"


@pytest.fixture
def model(nano):
    return copy.deepcopy(nano.model)


def add(model, name=None, target_modules=VISION, **settings):
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=target_modules, **settings), name)
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            nn.init.normal_(parameter, std=0.1)
    return model


def track(model, nano):
    return track_reference(model, nano.folder, nano.load("tracking")["pixel_values"][:3])[0]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_trainer(model, folder, **settings):
    arguments = SamoeTrainingArguments(
        output_dir=folder, learning_rate=1e-2, report_to="none", per_device_train_batch_size=1, disable_tqdm=True,
        use_cpu=True, **{"max_steps": 2, "save_strategy": "no", **settings},
    )  # fmt: skip
    processor = build_processor(model.config)
    clips = ClipDataset(SyntheticVideos(4, 4, (64, 64)), processor, num_frames=4)
    return SamoeTrainer(model, arguments, processing_class=processor, train_dataset=clips)


def test_both_get_gradients_and_the_base_does_not(model, clip):
    experts = trainable(model)
    add(model, target_modules=["qkv", "mask_decoder.iou_prediction_head.proj_in"])
    assert experts < trainable(model)
    assert all(is_expert_parameter(name) or is_adapter_parameter(name) for name in trainable(model))
    model.train()(*clip).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if ".lora_A." in n and "qkv" in n)


def test_sets_of_parameters_with_adapters(nano, model):
    before = {s: set(model.parameter_names(s)) for s in ("experts", "memory", r"vision_encoder\..*qkv\.weight")}
    add(model)
    for chosen, names in before.items():
        assert len(model.parameter_names(chosen)) == len(names)
    model.set_trainable("adapters")
    assert trainable(model) and all(is_adapter_parameter(name) for name in trainable(model))
    model.set_trainable("experts")
    assert trainable(model) == before["experts"]


@pytest.mark.parametrize("experts_only", [False, True])
def test_both_are_saved_and_loaded(nano, tmp_path, experts_only):
    nano.model.save_pretrained(tmp_path / "base")
    model = SamoeModel.from_pretrained(tmp_path / "base")
    add(model, "first")
    add(model, "second", ["mask_decoder.iou_prediction_head.proj_in", "q_proj"])
    model.set_adapter(["first"])
    expected = track(model.eval(), nano)
    for _ in range(2):  # also over what is there
        model.save_pretrained(tmp_path / "saved", experts_only=experts_only)
    loaded = SamoeModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(track(loaded, nano), expected, atol=0, rtol=0)
    assert loaded.active_adapters() == ["first"] and set(loaded.peft_config) == {"first", "second"}
    assert trainable(loaded) == {name for name, _ in loaded.named_parameters() if is_expert_parameter(name)}
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(is_adapter_parameter(name) for name in load_file(tmp_path / "saved" / "model.safetensors"))
    # Once more, from what was loaded; and without adapters.
    loaded.save_pretrained(tmp_path / "again", experts_only=experts_only)
    torch.testing.assert_close(track(SamoeModel.from_pretrained(tmp_path / "again"), nano), expected, atol=0, rtol=0)
    loaded.disable_adapters()
    torch.testing.assert_close(track(loaded, nano), track(nano.model, nano), atol=1e-5, rtol=0)


def test_peft_loads_a_saved_adapter(nano, model, tmp_path):
    add(model, "mine")
    model.save_pretrained(tmp_path / "saved")
    base = Sam2VideoModel(Sam2VideoConfig(**nano.model.config.to_dict())).eval()
    base.load_state_dict(nano.model.state_dict(), strict=False)
    adapted = PeftModel.from_pretrained(base, tmp_path / "saved" / "mine")
    pixels = nano.load("tracking")["pixel_values"][:1]
    expected = model.eval().get_image_features(pixels, return_dict=True).fpn_hidden_states
    found = adapted.base_model.model.get_image_features(pixels, return_dict=True).fpn_hidden_states
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    model.delete_adapter("mine")
    model.load_adapter(tmp_path / "saved" / "mine")
    again = model.get_image_features(pixels, return_dict=True).fpn_hidden_states
    torch.testing.assert_close(again[0], expected[0], atol=0, rtol=0)


def test_a_run_trains_both_and_resumes_to_the_bit(nano, tmp_path):
    nano.model.save_pretrained(tmp_path / "base")

    def start(**settings):
        model = add(SamoeModel.from_pretrained(tmp_path / "base"), lora_dropout=0.0)
        return make_trainer(model, tmp_path / "out", save_steps=2, save_strategy="steps", max_steps=4, **settings)

    trainer = start()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {is_adapter_parameter(name) for name in changed} == {True, False}
    assert all(is_adapter_parameter(name) or is_expert_parameter(name) for name in changed)
    saved = SamoeModel.from_pretrained(tmp_path / "out" / "checkpoint-4").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in after.items())
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in resumed.model.state_dict().items())


def test_frozen_adapters_stay_frozen_in_a_run(model, tmp_path):
    add(model)
    model.set_trainable("experts")
    before = copy.deepcopy(model.state_dict())
    make_trainer(model, tmp_path).train()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if is_adapter_parameter(name))


@pytest.mark.parametrize("targets", ["all-linear", r".*(attn|attn_image)\..*"])
def test_all_linear_layers_but_routers(model, clip, targets):
    add(model, target_modules=targets)
    names = [name for name in model.state_dict() if ".lora_A." in name]
    assert len(names) > 30 and not any("router" in name for name in names)
    model.gradient_checkpointing_enable()
    model.train()(*clip).loss.backward()


def test_what_is_no_adapter_is_refused_and_the_model_works_on(nano, model, tmp_path):
    from peft import IA3Config

    names = trainable(model)
    for config, name, message in [
        (IA3Config(target_modules=["qkv"], feedforward_modules=[]), None, "must be a LoraConfig, got IA3Config"),
        (LoraConfig(target_modules=["qkv"]), "../up", "as a folder's name, .* got '../up'"),
        (LoraConfig(target_modules=["nowhere"]), None, "not found"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_adapter(config, name)
    assert trainable(model) == names
    model.save_pretrained(tmp_path / "saved")
    assert set(SamoeModel.from_pretrained(tmp_path / "saved").state_dict()) == set(nano.model.state_dict())


def test_an_adapter_of_another_shape_is_refused(model, tmp_path):
    add(model, "mine").save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "mine" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    with pytest.raises(ValueError, match=r"The adapter .* does not fit the model: .* should be"):
        SamoeModel.from_pretrained(tmp_path / "saved")
