"""Ordinary adapters of PEFT beside the experts: both are trained, saved and loaded."""

import copy
import inspect
import json

import pytest
import torch
from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    RoadConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Sam2VideoConfig, Sam2VideoModel

from helpers.reference import track_reference
from samoe_hf import SamoeModel
from samoe_hf.data import ClipDataset, SyntheticVideos
from samoe_hf.model.adapters import is_adapter_parameter, save_adapters
from samoe_hf.model.expert_layer import expert_modules, is_expert_parameter
from samoe_hf.model.processing_samoe import build_processor
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


@pytest.mark.parametrize(
    "setting, value",
    [
        ("lora_dropout", {}),
        ("lora_dropout", 2.0),
        ("lora_dropout", "x"),
        ("lora_alpha", "x"),
        ("lora_alpha", None),
        ("r", []),
        ("r", "x"),
        ("r", 0),
        ("r", 10**12),
        ("exclude_modules", 1.5),
        ("target_modules", 5),
        ("target_modules", "("),
        ("target_modules", "nowhere"),
        ("target_parameters", 1.5),
        ("rank_pattern", 5),
        ("rank_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("modules_to_save", 5),
        ("layers_to_transform", "x"),
        ("megatron_config", {"x": 5}),
        ("bias", "all"),
        ("use_dora", True),
        ("monteclora_config", "x"),
    ],
)
def test_wrong_settings_of_an_adapter_are_refused_with_its_folders_name(model, tmp_path, setting, value):
    if not hasattr(LoraConfig(), setting):
        pytest.skip(f"this PEFT has no {setting}")
    # Around layers with experts, what is no plain LoRA is refused before its settings are used.
    save_adapters(add(model, "mine", ["qkv" if setting == "monteclora_config" else "q_proj"]), tmp_path)
    model.delete_adapter("mine")
    path = tmp_path / "mine" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    with pytest.raises(ValueError, match=f"The adapter {path.parent} (has settings|does not fit)"):
        model.load_adapter(tmp_path, "mine", subfolder="mine")


# Adapters that PEFT puts around layers with experts by itself


def with_random_adapter(model, config):
    """A copy of `model` with an adapter that does something, through PEFT's own `get_peft_model`."""
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return adapted.eval()


ON_EXPERTS = {"target_modules": ["q_proj"]}
KEEPING = {
    "lora": LoraConfig(**ON_EXPERTS),
    "rslora": LoraConfig(**ON_EXPERTS, use_rslora=True),
    "loha": LoHaConfig(**ON_EXPERTS),
    "lokr": LoKrConfig(**ON_EXPERTS),
    "vera": VeraConfig(**ON_EXPERTS),
}
DROPPING = {
    "dora": LoraConfig(**ON_EXPERTS, use_dora=True),
    "hra": HRAConfig(**ON_EXPERTS),
    "shira": ShiraConfig(**ON_EXPERTS),
    "ia3": IA3Config(**ON_EXPERTS, feedforward_modules=[]),
    "boft": BOFTConfig(**ON_EXPERTS, boft_block_size=4),
    "oft": OFTConfig(**ON_EXPERTS, oft_block_size=4),
    "road": RoadConfig(**ON_EXPERTS),
}


@pytest.mark.parametrize("kind", KEEPING)
def test_adapters_that_add_keep_the_experts_and_can_be_merged(nano, kind):
    without = copy.deepcopy(nano.model)
    for _, module in expert_modules(without):
        torch.nn.init.zeros_(module.lora_B)
    adapted = with_random_adapter(nano.model, KEEPING[kind]).base_model.model
    plain = with_random_adapter(without, KEEPING[kind]).base_model.model
    name = next(name for name, _ in expert_modules(nano.model) if name.endswith("q_proj"))
    x = torch.randn(3, nano.model.get_submodule(name).in_features)
    experts = nano.model.get_submodule(name)(x) - without.get_submodule(name)(x)
    adapted_layer, plain_layer = adapted.get_submodule(name), plain.get_submodule(name)
    torch.testing.assert_close(adapted_layer(x) - plain_layer(x), experts, atol=1e-5, rtol=1e-4)
    before = adapted_layer(x)
    assert (before - nano.model.get_submodule(name)(x)).abs().max() > 1e-3
    adapted_layer.merge()
    torch.testing.assert_close(adapted_layer(x), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", DROPPING)
def test_adapters_that_would_drop_or_scale_experts_are_refused(nano, kind):
    with pytest.raises(ValueError, match=r"cannot be put around 'memory_attention.*', which has experts"):
        get_peft_model(copy.deepcopy(nano.model), DROPPING[kind])


@pytest.mark.parametrize("kind", DROPPING)
def test_they_can_be_put_around_other_layers(nano, kind):
    config = copy.deepcopy(DROPPING[kind])
    config.target_modules = {"mask_decoder.iou_prediction_head.proj_in"}
    adapted = get_peft_model(copy.deepcopy(nano.model), config).base_model.model
    assert hasattr(adapted.mask_decoder.iou_prediction_head.proj_in, "base_layer")


def test_a_second_adapter_is_looked_at_too(nano):
    adapted = get_peft_model(copy.deepcopy(nano.model), LoraConfig(**ON_EXPERTS))
    adapted.add_adapter("second", LoraConfig(**ON_EXPERTS, use_dora=True))
    pixel_values = nano.load("train_step")["pixel_values"][None, :1]
    with pytest.raises(ValueError, match="cannot be put around"):
        adapted.base_model.model(pixel_values, input_boxes=torch.tensor([[[10.0, 10, 60, 60]]]))


def test_all_linear_layers_get_a_lora_and_routers_none(nano):
    adapted = with_random_adapter(nano.model, LoraConfig(target_modules="all-linear"))
    adapters = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A.default." in name}
    linear = {name for name, module in nano.model.named_modules() if isinstance(module, nn.Linear)}
    assert {name.removeprefix("base_model.model.") for name in adapters} == linear
    assert any("memory_attention" in name for name in linear) and not any("router" in name for name in linear)


def test_a_deleted_adapter_leaves_nothing_behind_in_files(nano, tmp_path):
    model = copy.deepcopy(nano.model)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "qkv"]), "one")
    model.delete_adapter("one")
    model.save_pretrained(tmp_path)
    loaded = SamoeModel.from_pretrained(tmp_path).state_dict()
    expected = nano.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_loading_an_adapter_freezes_that_one_alone(nano, tmp_path):
    model = copy.deepcopy(nano.model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "layers")  # a name that is part of all the tensors' names
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "other")
    model.save_pretrained(tmp_path)
    model.set_trainable("adapters")
    model.load_adapter(tmp_path, "layers", subfolder="layers")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".other." in name for name in trainable)


def test_adapters_are_loaded_with_the_signature_of_transformers(nano, tmp_path):
    names = inspect.signature(PreTrainedModel.load_adapter).parameters.keys() - {"load_config", "kwargs"}
    assert names <= inspect.signature(SamoeModel.load_adapter).parameters.keys()
    model = copy.deepcopy(nano.model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "one")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    config = LoraConfig.from_pretrained(tmp_path / "one")
    other = copy.deepcopy(nano.model)
    other.load_adapter(adapter_name="one", peft_config=config, adapter_state_dict=tensors)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="`hotswap` is False, but the model has an adapter of the name 'one'"):
        other.load_adapter(tmp_path, "one", hotswap=False, subfolder="one")
    with pytest.raises(ValueError, match="`hotswap` is True, but the model has no adapter of the name 'two'"):
        other.load_adapter(tmp_path, "two", hotswap=True, subfolder="one")
    with pytest.raises(ValueError, match="Either `peft_model_id`, or"):
        other.load_adapter(adapter_name="two")


def test_adapters_with_values_that_are_no_numbers_are_refused(nano, tmp_path):
    model = copy.deepcopy(nano.model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "one")
    model.save_pretrained(tmp_path)
    path = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinite values"):
        copy.deepcopy(nano.model).load_adapter(tmp_path, "one", subfolder="one")
