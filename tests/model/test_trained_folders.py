"""Folders with only what was trained: their base, their weights, and that they are written whole or not at all."""

import errno
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

from helpers.reference import ROOT, assert_same_tensors, assert_tensors, change_config
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.errors import InputError
from samoe_hf.model import loading, weights_trained
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.weights_io import unchanged_model, updated_folder
from samoe_hf.surgery.domains import rename_domain
from samoe_hf.whole_files import whole_file


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_experts_has_a_processor(experts_folder, nano):
    assert AutoProcessor.from_pretrained(experts_folder).video_processor.size["height"] == 128
    settings = json.loads((experts_folder / "processor_config.json").read_text())
    settings["video_processor"]["do_rescale"] = False
    (experts_folder / "processor_config.json").write_text(json.dumps(settings))
    nano.model.save_pretrained(experts_folder, experts_only=True)
    assert not AutoProcessor.from_pretrained(experts_folder).video_processor.do_rescale, "the user's own stays"


def test_tensors_trained_earlier_are_kept(model_folder, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    model.set_trainable("experts", "decoder")
    with torch.no_grad():
        model.mask_decoder.iou_token.weight += 1
    model.save_pretrained(tmp_path / "one", experts_only=True)
    loaded = SamoeModel.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two", experts_only=True)
    again = SamoeModel.from_pretrained(tmp_path / "two")
    assert torch.equal(again.mask_decoder.iou_token.weight, model.mask_decoder.iou_token.weight)


def test_a_base_that_was_changed_is_saved_where_it_was(model_folder, tmp_path, monkeypatch):
    """By what was trained and then frozen, and by a LoRA that was merged; the base is loaded again once at most."""
    model = SamoeModel.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "experts", experts_only=True)
    model.set_trainable("decoder")
    with torch.no_grad():
        model.mask_decoder.iou_token.weight += 1
    model.set_trainable("experts")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = adapted.merge_and_unload()
    model.save_pretrained(tmp_path / "merged", experts_only=True)
    monkeypatch.setattr(weights_trained, "_load_base", None)
    model.save_pretrained(tmp_path / "again", experts_only=True)
    monkeypatch.undo()
    assert len(load_file(tmp_path / "merged" / "model.safetensors")) < len(model.state_dict()) / 2
    for name in ("merged", "again"):
        assert_same_tensors(SamoeModel.from_pretrained(tmp_path / name), model)


def test_another_base_is_refused_with_both_names(experts_folder, model_folder, tmp_path):
    other = shutil.copytree(model_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["memory_attention.layer_norm.bias"][0] += 1e-6
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    change_config(experts_folder, base_model__name_or_path=str(other))
    with pytest.raises(ValueError, match=r"experts builds on \S*other, but .*fingerprint"):
        SamoeModel.from_pretrained(experts_folder)
    model = SamoeModel.from_pretrained(model_folder)
    with pytest.raises(ValueError, match=r"other is not the base .*nano"):
        model.save_pretrained(tmp_path / "new", experts_only=True, base_model=str(other))
    assert not (tmp_path / "new").exists()


def test_a_base_of_another_size_or_none_is_refused_with_both_names(experts_folder, tmp_path):
    config = SamoeConfig(**{**read_yaml(ROOT / "configs" / "model_nano.yaml"), "memory_attention_num_layers": 3})
    SamoeModel(config).save_pretrained(tmp_path / "deeper")
    for base in ("deeper", "nowhere.pt"):
        change_config(experts_folder, base_model__name_or_path=str(tmp_path / base))
        with pytest.raises(ValueError, match=rf"experts builds on \S*{base}") as error:
            SamoeModel.from_pretrained(experts_folder)
    assert "If it was moved, write its new place into `base_model`" in str(error.value)


@pytest.mark.parametrize(
    "saved, dtype", [(torch.bfloat16, torch.float32), pytest.param(torch.float32, "float16", marks=pytest.mark.slow)]
)
def test_the_fingerprint_does_not_depend_on_the_type_it_is_loaded_in(model_folder, tmp_path, saved, dtype):
    model = SamoeModel.from_pretrained(model_folder, dtype=saved)
    model.save_pretrained(tmp_path / "experts", experts_only=True)
    model.save_pretrained(tmp_path / "whole")
    assert SamoeModel.from_pretrained(tmp_path / "experts").dtype == saved
    loaded, expected = (SamoeModel.from_pretrained(tmp_path / name, dtype=dtype) for name in ("experts", "whole"))
    assert_same_tensors(loaded, expected)
    assert {name: x.dtype for name, x in loaded.named_buffers()} == {n: x.dtype for n, x in expected.named_buffers()}
    assert_same_tensors(AutoModel.from_pretrained(tmp_path / "experts", dtype=dtype), expected)
    config = AutoConfig.from_pretrained(tmp_path / "experts", dtype=dtype)
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path / "experts", config=config), expected)


def test_tensors_of_another_type_than_the_model_are_saved_as_they_are(model_folder, tmp_path):
    """As libraries gather them that train in a type of their own."""
    model = SamoeModel.from_pretrained(model_folder)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, experts_only=True, state_dict=tensors)
    loaded = SamoeModel.from_pretrained(tmp_path)
    assert_tensors(loaded, tensors)


def test_what_was_trained_over_a_base_with_parts_of_another_type_is_loaded(model_folder, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    model.vision_encoder.half()
    model.save_pretrained(tmp_path / "trained", experts_only=True)
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path / "trained"), SamoeModel.from_pretrained(model_folder))
    token = model.mask_decoder.iou_token.weight
    token.data += 1
    model.save_pretrained(tmp_path / "changed", experts_only=True)
    assert torch.equal(SamoeModel.from_pretrained(tmp_path / "changed").mask_decoder.iou_token.weight, token)


def test_a_model_of_the_configuration_of_what_was_trained_is_saved_as_a_whole(experts_folder, tmp_path):
    model = SamoeModel(SamoeConfig.from_pretrained(experts_folder))
    model.save_pretrained(tmp_path)
    assert_same_tensors(SamoeModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.int8, "fp16", {"vision_encoder": "float16"}])
def test_a_type_that_weights_cannot_have_is_refused(experts_folder, dtype):
    with pytest.raises(ValueError, match="`dtype` must be a floating-point type"):
        SamoeModel.from_pretrained(experts_folder, dtype=dtype)


def test_settings_can_be_given_and_layers_added(experts_folder, nano):
    more = [*nano.model.expert_module_names, "mask_decoder.iou_prediction_head.proj_in"]
    model = SamoeModel.from_pretrained(experts_folder, fill_hole_area=8, expert_modules=more)
    assert model.config.fill_hole_area == 8 and len(model.expert_module_names) == 17
    tensors = load_file(experts_folder / "model.safetensors")
    assert_tensors(model, tensors)
    with pytest.raises(ValueError, match="`num_experts_per_tok`"):
        SamoeModel.from_pretrained(experts_folder, num_experts_per_tok=99)


@pytest.mark.parametrize("settings", [{"lora_rank": 2}, {"num_experts": 6, "expert_modules": ["q_proj"]}])
def test_experts_give_place_to_others_only_if_asked(model_folder, nano, settings):
    with pytest.raises(ValueError, match=r"`ignore_mismatched_sizes=True` gives the model new experts"):
        SamoeModel.from_pretrained(model_folder, **settings)
    model = SamoeModel.from_pretrained(model_folder, ignore_mismatched_sizes=True, **settings)
    module = model.get_submodule(model.expert_module_names[0])
    assert module.num_experts == settings.get("num_experts", 4) and not module.lora_B.any()
    assert module.lora_A.abs().max() > 0
    plain = {name: t for name, t in nano.model.state_dict().items() if not is_expert_parameter(name)}
    assert_tensors(model, plain)


def test_a_folder_of_experts_says_how_to_get_others(experts_folder):
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(
            ValueError, match=r"of another shape.* `replace_experts` gives a loaded model other experts"
        ):
            SamoeModel.from_pretrained(experts_folder, num_experts=7, **options)


def test_a_base_of_another_size_gives_no_place_to_new_experts(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "folder")
    change_config(folder, mask_decoder_config__mlp_dim=64)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        SamoeModel.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert "new experts" not in str(error.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_new_files_may_read_weights(model_folder, tmp_path, umask, mode):
    model = SamoeModel.from_pretrained(model_folder)
    rename_domain(model, None, "driving")
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "model", experts_only=True)
        with whole_file(tmp_path / "copy.safetensors") as path:
            save_file({}, path)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= {"config.json", "model.safetensors", "driving.safetensors"}
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_older_weights_do_not_stay_beside_new_ones(model_folder, tmp_path):
    model = SamoeModel.from_pretrained(model_folder)
    model.save_pretrained(tmp_path, max_shard_size="4MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, experts_only=True)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"model.safetensors", "config.json", "processor_config.json", "notes.txt"}
    model.save_pretrained(tmp_path)
    assert SamoeModel.from_pretrained(tmp_path).origin.source["name_or_path"] == str(tmp_path)


@pytest.mark.parametrize(("experts_only", "failing"), [(False, SamoeConfig), (True, LoraConfig)])
def test_a_save_that_fails_changes_nothing(model_folder, tmp_path, monkeypatch, experts_only, failing):
    model = SamoeModel.from_pretrained(model_folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv"]), "mine")
    model.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    before = contents(tmp_path / "old")
    assert tmp_path / "old" / "mine" / "adapter_model.safetensors" in before

    def write_some(config, directory, **_):
        (Path(directory) / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(failing, "save_pretrained", write_some)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / name, experts_only=experts_only)
    assert contents(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_saved_while_it_is_loaded_is_refused(model_folder, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    model, read = SamoeModel.from_pretrained(model_folder), loading.check_values
    monkeypatch.setattr(loading, "check_values", lambda *given: (model.save_pretrained(tmp_path), read(*given)))
    with pytest.raises(ValueError, match="was saved anew while it was loaded; load it again"):
        SamoeModel.from_pretrained(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="no folder can be locked there")
def test_saves_into_one_folder_at_once_all_succeed_and_are_read_as_wholes(tmp_path):
    def save(number):
        with updated_folder(tmp_path) as folder:
            for name in ("config.json", "model.safetensors"):
                (folder / name).write_text(str(number))
        with suppress(InputError), unchanged_model(tmp_path):
            first, second = ((tmp_path / name).read_text() for name in ("config.json", "model.safetensors"))
            return first == second
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(save, range(64)))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_what_was_trained_does_not_take_its_bases_place(model_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    model = SamoeModel.from_pretrained(folder)
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for place in (folder, tmp_path / "link", "model", f"{folder}/../model", f"{folder}{os.sep}"):
        with pytest.raises(ValueError, match="holds the base model"):
            model.save_pretrained(place, experts_only=True)
    assert contents(folder) == before
    model.save_pretrained(folder)  # what was loaded from there may be saved as a whole
    inner = shutil.copytree(folder, tmp_path / "outer" / "inner")
    model = SamoeModel.from_pretrained(inner.parent, subfolder="inner")
    with pytest.raises(ValueError, match="holds the base model"):
        model.save_pretrained(inner, experts_only=True)


def test_unknown_arguments_of_saving_are_refused(nano, tmp_path):
    with pytest.raises(TypeError, match="`save_pretrained` has no argument 'expert_only'"):
        nano.model.save_pretrained(tmp_path / "out", expert_only=True)
    with pytest.raises(TypeError):
        nano.model.save_pretrained(tmp_path / "out", True)
    nano.model.save_pretrained(tmp_path / "as_with_accelerate", save_function=torch.save, is_main_process=True)
    with pytest.raises(ValueError, match="`variant` does not go with `experts_only`, got 'fp16'"):
        nano.model.save_pretrained(tmp_path / "out", experts_only=True, variant="fp16")
    assert not (tmp_path / "out").exists()


def test_threads_that_load_at_once_leave_the_initializers_of_others(model_folder):
    """transformers takes PyTorch's away while it builds a model; what others build then has no values."""
    before, interval = dict(vars(torch.nn.init)), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            models = [*threads.map(lambda _: SamoeModel.from_pretrained(model_folder), range(12))]
        assert {name for name, value in vars(torch.nn.init).items() if value is not before[name]} == set()
        for model in models[1:]:
            assert_same_tensors(models[0], model)
    finally:
        sys.setswitchinterval(interval)
        vars(torch.nn.init).update(before)
