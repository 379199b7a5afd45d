"""Ordinary adapters of PEFT beside the experts: both are trained, saved and loaded."""

import copy
import inspect
import json
import logging
import shutil

import pytest
import torch
from peft import HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from helpers.edgetam import over_bases
from helpers.reference import assert_same_tensors, track_reference
from peers import base_of
from samoe_hf import SamoeModel
from samoe_hf.data import ClipDataset, SyntheticVideos
from samoe_hf.model.adapters import is_adapter_parameter, save_adapters
from samoe_hf.model.expert_layer import expert_modules, is_expert_parameter
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.model.prompt_recipe import PromptRecipe
from samoe_hf.training.arguments import SamoeTrainingArguments
from samoe_hf.training.trainer import SamoeTrainer

VISION = r"vision_encoder\..*\.qkv"


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


def test_both_get_gradients_and_the_base_does_not(model, clip):
    experts = trainable(model)
    add(model, target_modules=["qkv", "mask_decoder.iou_prediction_head.proj_in"])
    assert experts < trainable(model)
    assert all(is_expert_parameter(name) or is_adapter_parameter(name) for name in trainable(model))
    model.train()(*clip).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if ".lora_A." in n and "qkv" in n)


def test_sets_of_parameters_with_adapters(model):
    before = {s: set(model.parameter_names(s)) for s in ("experts", "memory", r"vision_encoder\..*qkv\.weight")}
    add(model)
    for chosen, names in before.items():
        assert len(model.parameter_names(chosen)) == len(names)
    model.set_trainable("adapters")
    assert trainable(model) and all(is_adapter_parameter(name) for name in trainable(model))
    model.set_trainable("experts")
    assert trainable(model) == before["experts"]


@pytest.mark.parametrize("experts_only", [pytest.param(False, marks=pytest.mark.slow), True])
def test_both_are_saved_and_loaded(nano, model_folder, tmp_path, experts_only):
    model = add(SamoeModel.from_pretrained(model_folder), "first")
    add(model, "second", ["mask_decoder.iou_prediction_head.proj_in", "q_proj"])
    model.set_adapter(["first"])
    expected = track(model.eval(), nano)
    for _ in range(2):  # also over what is there
        model.save_pretrained(tmp_path / "saved", experts_only=experts_only)
    loaded = SamoeModel.from_pretrained(tmp_path / "saved")
    assert_same_tensors(loaded, model)
    torch.testing.assert_close(track(loaded, nano), expected, atol=0, rtol=0)
    assert loaded.active_adapters() == ["first"] and set(loaded.peft_config) == {"first", "second"}
    assert trainable(loaded) == {name for name, _ in loaded.named_parameters() if is_expert_parameter(name)}
    assert not any(is_adapter_parameter(name) for name in load_file(tmp_path / "saved" / "model.safetensors"))
    # Once more, from what was loaded; without adapters in use; and without adapters.
    loaded.save_pretrained(tmp_path / "again", experts_only=experts_only)
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path / "again"), model)
    loaded.disable_adapters()
    loaded.save_pretrained(tmp_path / "again", experts_only=experts_only)
    for disabled in (loaded, SamoeModel.from_pretrained(tmp_path / "again")):
        torch.testing.assert_close(track(disabled, nano), track(nano.model, nano), atol=1e-5, rtol=0)
    for name in ("first", "second"):
        loaded.delete_adapter(name)
    loaded.save_pretrained(tmp_path / "again", experts_only=experts_only)
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path / "again"), nano.model)


def test_peft_loads_a_saved_adapter(nano, model, tmp_path):
    def features(model):
        return model.get_image_features(nano.load("tracking")["pixel_values"][:1], return_dict=True).fpn_hidden_states

    add(model, "mine").eval().save_pretrained(tmp_path)
    expected = features(model)
    adapted = PeftModel.from_pretrained(base_of(nano.model), tmp_path / "mine")
    for one, other in zip(features(adapted.base_model.model), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    model.delete_adapter("mine")
    model.load_adapter(tmp_path / "mine")
    torch.testing.assert_close(features(model)[0], expected[0], atol=0, rtol=0)


def test_a_run_trains_both_and_resumes_to_the_bit(model_folder, tmp_path):
    def start():
        model = add(SamoeModel.from_pretrained(model_folder), lora_dropout=0.0)
        arguments = SamoeTrainingArguments(
            tmp_path, learning_rate=1e-2, report_to="none", per_device_train_batch_size=1, disable_tqdm=True,
            use_cpu=True, save_steps=1, save_strategy="steps", max_steps=2,
        )  # fmt: skip
        processor = build_processor(model.config)
        clips = ClipDataset(SyntheticVideos(2, 3, (64, 64)), processor, num_frames=3)
        return SamoeTrainer(model, arguments, processing_class=processor, train_dataset=clips)

    trainer = start()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    changed = {name for name, x in trainer.model.state_dict().items() if not torch.equal(before[name], x)}
    assert {is_adapter_parameter(name) for name in changed} == {True, False}
    assert all(is_adapter_parameter(name) or is_expert_parameter(name) for name in changed)
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path / "checkpoint-2"), trainer.model)
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_tensors(resumed.model, trainer.model)


@over_bases
def test_checkpointing_gives_the_same_gradients_and_none_to_a_frozen_encoder(nano, model, two_clips):
    add(model, target_modules=["q_proj"]).train()
    encoded, parts = [], {name.split(".")[0] for name in trainable(model) if is_adapter_parameter(name)}
    model.vision_encoder.register_forward_hook(lambda _, __, output: encoded.append(output.fpn_hidden_states[0]))

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(*two_clips).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected)
    assert {name.split(".")[0] for name in expected} == parts >= {"memory_attention", "mask_decoder"}
    assert ("spatial_perceiver" in parts) == (nano.name == "edgetam")
    assert len(encoded) == 2 and not any(features.requires_grad for features in encoded)


def test_what_is_no_adapter_is_refused_and_the_model_works_on(nano, model):
    names = trainable(model)
    for config, name, message in [
        (IA3Config(target_modules=["qkv"], feedforward_modules=[]), None, "must be a LoraConfig, got IA3Config"),
        (LoraConfig(target_modules=["qkv"]), "../up", "as a folder's name, .* got '../up'"),
        (LoraConfig(target_modules=["qkv"]), "domains", "not `domains`, .* got 'domains'"),
        (LoraConfig(target_modules=["nowhere"]), None, "not found"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_adapter(config, name)
    assert trainable(model) == names
    assert_same_tensors(model, nano.model)


@pytest.fixture(scope="module")
def saved_adapter(nano, tmp_path_factory):
    """An adapter around layers with experts; what is no plain LoRA is refused there before its settings are used."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapters(add(copy.deepcopy(nano.model), "mine", ["q_proj"]), folder)
    return folder / "mine"


@pytest.mark.parametrize(
    "setting, value",
    [
        ("lora_dropout", {}), ("lora_alpha", None), ("r", []), ("r", 3), ("r", 10**12), ("exclude_modules", 1.5),
        ("target_parameters", 1.5), ("modules_to_save", 5),
        ("rank_pattern", {"q_proj": "x"}), ("megatron_config", {"x": 5}), ("bias", "all"), ("use_dora", True),
    ],
)  # fmt: skip
def test_wrong_settings_of_an_adapter_are_refused_with_its_folders_name(model, saved_adapter, tmp_path, setting, value):
    if not hasattr(LoraConfig(), setting):
        pytest.skip(f"this PEFT has no {setting}")
    folder = shutil.copytree(saved_adapter, tmp_path / "mine")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    with pytest.raises(ValueError, match=f"The adapter {folder} (has settings|does not fit)"):
        model.load_adapter(tmp_path, "mine", subfolder="mine")


def test_values_of_an_adapter_that_are_no_numbers_are_refused(model, saved_adapter, tmp_path):
    folder = shutil.copytree(saved_adapter, tmp_path / "mine")
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinite values"):
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
    "lora": LoraConfig(**ON_EXPERTS), "rslora": LoraConfig(**ON_EXPERTS, use_rslora=True),
    "loha": LoHaConfig(**ON_EXPERTS), "lokr": LoKrConfig(**ON_EXPERTS), "vera": VeraConfig(**ON_EXPERTS),
}  # fmt: skip
DROPPING = {
    "dora": LoraConfig(**ON_EXPERTS, use_dora=True), "hra": HRAConfig(**ON_EXPERTS),
}  # fmt: skip


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
def test_adapters_that_would_drop_or_scale_experts_are_refused_there_alone(model, kind):
    config = copy.deepcopy(DROPPING[kind])
    config.target_modules = {"mask_decoder.iou_prediction_head.proj_in"}
    adapted = get_peft_model(model, config).base_model.model
    assert hasattr(adapted.mask_decoder.iou_prediction_head.proj_in, "base_layer")
    with pytest.raises(ValueError, match=r"cannot be put around 'memory_attention.*', which has experts"):
        get_peft_model(adapted, DROPPING[kind])


def test_a_second_adapter_is_looked_at_too(nano):
    adapted = get_peft_model(copy.deepcopy(nano.model), LoraConfig(**ON_EXPERTS))
    adapted.add_adapter("second", LoraConfig(**ON_EXPERTS, use_dora=True))
    pixel_values = nano.load("train_step")["pixel_values"][None, :1]
    with pytest.raises(ValueError, match="cannot be put around"):
        adapted.base_model.model(pixel_values, input_boxes=torch.tensor([[[10.0, 10, 60, 60]]]))


def test_loading_an_adapter_freezes_that_one_alone(model, tmp_path):
    for name in ("layers", "other"):  # the first is part of all the tensors' names
        add(model, name, ["q_proj"])
    save_adapters(model, tmp_path)
    model.set_trainable("adapters")
    model.load_adapter(tmp_path, "layers", subfolder="layers")
    assert trainable(model) and all(".other." in name for name in trainable(model))


def test_adapters_are_loaded_with_the_signature_of_transformers(nano, model, tmp_path):
    names = inspect.signature(PreTrainedModel.load_adapter).parameters.keys() - {"load_config", "kwargs"}
    assert names <= inspect.signature(SamoeModel.load_adapter).parameters.keys()
    save_adapters(add(model, "one", ["q_proj"]), tmp_path)
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    config = LoraConfig.from_pretrained(tmp_path / "one")
    other = copy.deepcopy(nano.model)
    other.load_adapter(adapter_name="one", peft_config=config, adapter_state_dict=tensors)
    assert_same_tensors(other, model)
    for arguments, message in (
        ({"hotswap": False, "adapter_name": "one"}, "`hotswap` is False, but the model has an adapter of the name"),
        ({"hotswap": True, "adapter_name": "two"}, "`hotswap` is True, but the model has no adapter of the name 'two'"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_adapter(tmp_path, subfolder="one", **arguments)
    with pytest.raises(ValueError, match="Either `peft_model_id`, or"):
        other.load_adapter(adapter_name="two")


@pytest.mark.parametrize("module", ["iou_prediction_head", "mask_decoder", "proj_in"])
def test_modules_that_are_saved_with_an_adapter_are_loaded_again(model, tmp_path, module):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[module]), "b")
    model.save_pretrained(tmp_path)
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path), model)


def test_parts_of_the_model_are_trained_without_the_adapters_within_them(model):
    add(model, "a", ["q_proj"])
    for chosen in ("memory", "decoder"):
        model.set_trainable(chosen)
        assert trainable(model) and not any(map(is_adapter_parameter, trainable(model)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": r"(\w+\w+)+!"}, None),
        ({"layers_to_transform": [0], "layers_pattern": r"(\w+\w+)+!"}, None),
        ({"rank_pattern": {r"(\w+\w+)+!": 2}}, "'rank_pattern' for .*expected names of layers"),
        ({"alpha_pattern": {r"(\w+\w+)+!": 2}}, "'alpha_pattern' for .*expected names of layers"),
    ],
)
def test_an_expression_of_an_adapters_folder_that_never_ends_is_not_run(nano, model, tmp_path, settings, message):
    save_adapters(add(model, "one", ["q_proj"]), tmp_path)
    path = tmp_path / "one" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    other = copy.deepcopy(nano.model)
    if message is None:
        other.load_adapter(tmp_path / "one", "one")
        assert_same_tensors(other, model)
    else:
        with pytest.raises(ValueError, match=message):
            other.load_adapter(tmp_path / "one", "one")


def test_experts_that_peft_leaves_out_are_told(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    has_effect = any(module.lora_B.any() for _, module in expert_modules(model))
    assert ("leaves them out" in caplog.text) == has_effect
    with torch.no_grad():
        next(expert_modules(model))[1].lora_B.fill_(1)
    get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    assert "`get_peft_model` has frozen the experts, and `PeftModel.save_pretrained` leaves them out" in caplog.text
    caplog.clear()
    add(model, "one", ["q_proj"])
    assert not caplog.text


def test_an_older_peft_is_told_with_its_version(model, monkeypatch):
    monkeypatch.setattr("samoe_hf.model.adapters.MIN_PEFT_VERSION", "99.0")
    with pytest.raises(ValueError, match=r"Adapters need peft 99.0 or later, but transformers \S+ and peft \S+ are"):
        add(model, "one", ["q_proj"])


class TestTraining:
    """A model within wrappers is trained, saved, resumed and evaluated as it is alone."""

    def trainer(self, wrapped, folder, **settings):
        arguments = {"per_device_train_batch_size": 1, "save_steps": 1, "report_to": "none", "use_cpu": True}
        arguments |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_J&F", "max_steps": 2}
        args = SamoeTrainingArguments(
            folder, **{**arguments, "save_strategy": "steps", "logging_steps": 1, "disable_tqdm": True, **settings}
        )
        processor = build_processor(getattr(wrapped, "config", None))
        clips = ClipDataset(SyntheticVideos(2, 3, (96, 96), seed=1), processor, num_frames=2, max_objects=1)
        recipe = PromptRecipe(point_probability=0, max_initial_frames=1, max_corrected_frames=0)
        videos = SyntheticVideos(1, 2, (96, 96), seed=2)
        return SamoeTrainer(wrapped, args, recipe, train_dataset=clips, eval_dataset=videos)

    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(
                lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)),
                marks=pytest.mark.slow,
            ),
            pytest.param(lambda m: torch.compile(m, backend="eager"), marks=pytest.mark.slow),
            lambda m: torch.compile(get_peft_model(m, LoraConfig(r=2, target_modules=["q_proj"])), backend="eager"),
        ],
        ids=["peft", "compiled", "compiled-peft"],
    )
    def test_wrapped(self, nano, tmp_path, wrap):
        def start(folder, **settings):
            torch.manual_seed(0)
            inner = copy.deepcopy(nano.model)
            return inner, self.trainer(wrap(inner), tmp_path / folder, **settings)

        inner, trainer = start("whole", load_best_model_at_end=True)
        trainer.train()
        trainer.save_model()
        assert_same_tensors(SamoeModel.from_pretrained(tmp_path / "whole"), inner)
        resumed, trainer = start("whole")
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        last = SamoeModel.from_pretrained(tmp_path / "whole" / "checkpoint-2")
        assert_same_tensors(last, resumed)
        assert not torch.equal(next(expert_modules(last))[1].lora_B, next(expert_modules(nano.model))[1].lora_B)

    def test_an_adapter_that_was_frozen_stays_so(self, nano, tmp_path):
        inner = add(add(copy.deepcopy(nano.model), "a", ["q_proj"]), "b", ["v_proj"])
        inner.set_adapter(["a", "b"])
        frozen = {n: p for n, p in inner.named_parameters() if ".a." in n}
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        before = {n: p.detach().clone() for n, p in inner.named_parameters()}
        self.trainer(inner, tmp_path, max_steps=1, trainable=["experts", "decoder"]).train()
        moved = {n for n, p in inner.named_parameters() if not torch.equal(before[n], p)}
        assert not moved & frozen.keys() and any(".b." in n for n in moved) and any(map(is_expert_parameter, moved))

    def test_an_adapter_of_another_kind_is_refused(self, nano, tmp_path):
        wrapped = get_peft_model(copy.deepcopy(nano.model), LoHaConfig(target_modules=["proj_in"]))
        with pytest.raises(ValueError, match="must be a LoraConfig, got LoHaConfig"):
            self.trainer(wrapped, tmp_path)
