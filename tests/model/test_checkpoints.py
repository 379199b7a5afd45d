"""Folders that would be destroyed, weights that are no numbers, configurations of wrong types; outputs and drawing."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.model.expert_layer import ExpertLinear, expert_modules
from samoe_hf.model.weights_io import new_folder, updated_folder, whole_file, write_text

Q_PROJ = "memory_attention.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(model_folder, tmp_path):
    """A model's folder, free to be changed."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def clip(nano):
    frames = nano.load("train_step")
    return frames["pixel_values"][None, :2], frames["masks"].bool().transpose(0, 1)[None, :, :2]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Saving into the base's own folder


def test_what_was_trained_does_not_take_its_bases_place(folder, tmp_path, monkeypatch):
    model = SamoeModel.from_pretrained(folder)
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for place in (folder, tmp_path / "link", "model", f"{folder}/../model", f"{folder}{os.sep}"):
        with pytest.raises(ValueError, match="holds the base model"):
            model.save_pretrained(place, experts_only=True)
    assert contents(folder) == before
    # What was loaded from there may be saved as a whole, and elsewhere.
    model.save_pretrained(tmp_path / "elsewhere", experts_only=True)
    again = SamoeModel.from_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="holds the base model"):
        again.save_pretrained(folder, experts_only=True)
    again.save_pretrained(tmp_path / "elsewhere", experts_only=True)
    model.save_pretrained(folder)
    SamoeModel.from_pretrained(folder)


def test_a_base_in_a_subfolder_is_kept_too(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "outer" / "inner")
    model = SamoeModel.from_pretrained(tmp_path / "outer", subfolder="inner")
    with pytest.raises(ValueError, match="holds the base model"):
        model.save_pretrained(tmp_path / "outer" / "inner", experts_only=True)


@pytest.mark.parametrize("arguments", [{"expert_only": True}, {"experts_onyl": True}, {"proccessor": None}])
def test_unknown_arguments_of_saving_are_refused(nano, tmp_path, arguments):
    with pytest.raises(TypeError, match=f"`save_pretrained` has no argument '{next(iter(arguments))}'"):
        nano.model.save_pretrained(tmp_path / "out", **arguments)
    with pytest.raises(TypeError):
        nano.model.save_pretrained(tmp_path / "out", True)
    assert not (tmp_path / "out").exists()


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["no_memory_embedding", f"{Q_PROJ}.lora_B", f"{Q_PROJ}.weight"])
def test_values_that_are_no_numbers_are_refused_by_name(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}' has NaN or infinite values") as error:
        SamoeModel.from_pretrained(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.uint8])
def test_tensors_of_no_floating_point_type_are_refused(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"of no floating-point type, such as '{Q_PROJ}.weight'"):
        SamoeModel.from_pretrained(folder)


def test_one_tensor_of_float64_does_not_make_the_model_float64(folder):
    tensors = load_file(folder / "model.safetensors")
    double = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(
        {**tensors, f"{Q_PROJ}.weight": double[f"{Q_PROJ}.weight"]}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"{Q_PROJ}.weight' is of type float64, and others are not"):
        SamoeModel.from_pretrained(folder)
    save_file(double, folder / "model.safetensors", {"format": "pt"})
    assert SamoeModel.from_pretrained(folder, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("content", ["{}", "[]", "5", '{"weight_map": 5}', '{"weight_map": ["a"]}', "{", "null"])
def test_an_index_without_a_map_is_refused(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no `weight_map`"):
        SamoeModel.from_pretrained(folder)


@pytest.mark.parametrize("metadata", [None, 5, "x", [], "absent"])
def test_an_index_without_metadata_is_refused(folder, metadata):
    SamoeModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="4MB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"] = metadata
    if metadata == "absent":
        del index["metadata"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{folder}: model\.safetensors\.index\.json .* `metadata`"):
        SamoeModel.from_pretrained(folder)


# Configurations


@pytest.mark.parametrize(
    "field, value",
    [
        ("base_model", 5),
        ("base_model", "facebook/sam2"),
        ("base_model", {"name_or_path": 5}),
        ("adapters", 5),
        ("adapters", ["one"]),
        ("adapters", {"one": "yes"}),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("lora_dropout", float("nan")),
        ("router_aux_loss_coef", float("inf")),
        ("num_experts", True),
        ("lora_rank", 1.5),
        ("output_router_logits", -1),
        ("lora_alpha", 1e308),
        ("memory_attention_dropout", float("nan")),
        ("dtype", True),
        ("image_size", 0),
        ("image_size", -128),
        ("image_size", 127),
    ],
)
def test_wrong_values_in_a_configuration_are_named(folder, field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        SamoeConfig(**{field: value})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    for load in (SamoeModel.from_pretrained, SamoeConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"{folder}: config.json has a wrong value. `{field}`"):
            load(folder)


def test_wrong_values_of_the_caller_are_named_without_the_folder(folder):
    for load in (SamoeModel.from_pretrained, SamoeConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"^`num_experts` must be"):
            load(folder, num_experts=0)


@pytest.mark.parametrize(
    "field, value",
    [
        ("memory_attention_rope_theta", "x"),
        ("memory_attention_rope_theta", None),
        ("memory_encoder_hidden_size", -1),
        ("expert_modules", "nowhere"),
        ("expert_modules", "("),
        ("base_model", {"name_or_path": None}),
        ("memory_attention_rope_feat_sizes", [8, 1]),
        ("mask_downsampler_padding", 0),
        ("memory_fuser_padding", 1),
        ("memory_fuser_padding", 10**6),
        ("memory_fuser_padding", -1),
        ("prompt_encoder_config.patch_size", 1),
        ("prompt_encoder_config.image_size", 1),
        ("prompt_encoder_config.dtype", 1e308),
        ("vision_config.fpn_padding", 1),
        ("vision_config.fpn_stride", 2),
        ("vision_config.dtype", "int8"),
    ],
)
def test_a_configuration_of_no_model_is_refused_with_the_folders_name(folder, field, value):
    config = json.loads((folder / "config.json").read_text())
    *parents, name = field.split(".")
    (config[parents[0]] if parents else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{folder}"):
        SamoeModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "field, value", [("image_size", "128"), ("image_size", 128.5), ("num_maskmem", "x"), ("vision_config", 5)]
)
def test_fields_of_a_wrong_type_are_refused_with_the_folders_name(folder, field, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=f"(?s){folder}.*{field}"):
        SamoeModel.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[]", "5", "null", '"text"', "{", ""])
def test_a_configuration_that_is_no_mapping_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=r"config\.json|JSON"):
        SamoeModel.from_pretrained(folder)


# Outputs, as other models of transformers give them


def test_clips_give_tuples_hidden_states_and_attentions_on_request(nano, clip):
    model = nano.model
    with torch.no_grad():
        output = model(*clip)
        as_tuple = model(*clip, return_dict=False)
        more = model(*clip, output_hidden_states=True, output_attentions=True)
    assert output.vision_hidden_states is None and output.vision_attentions is None
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.loss)
    assert len(more.vision_hidden_states) > 1 and all(len(x) == 2 for x in more.vision_hidden_states)
    torch.testing.assert_close(more.pred_masks, output.pred_masks)
    config = copy.deepcopy(model.config)
    try:
        model.config.output_hidden_states = True
        with torch.no_grad():
            assert len(model(*clip).vision_hidden_states) == len(more.vision_hidden_states)
    finally:
        model.config = config
    with pytest.raises(TypeError, match="`forward` has no argument 'output_hidden_sates'"):
        model(*clip, output_hidden_sates=True)


def test_hidden_states_of_an_encoder_that_runs_in_pieces_are_joined(nano, clip):
    model = copy.copy(nano.model)
    with torch.no_grad():
        whole = model(*clip, output_hidden_states=True).vision_hidden_states
        model.clip_settings.encoder_batch_size = 1
        pieces = model(*clip, output_hidden_states=True).vision_hidden_states
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_trainer_takes_labels_alone_for_labels(nano, clip, tmp_path):
    assert find_labels(SamoeModel) == ["labels"]
    arguments = TrainingArguments(tmp_path, report_to="none", disable_tqdm=True, use_cpu=True)
    items = [{"pixel_values": clip[0][0], "labels": clip[1][0]}]
    metrics = Trainer(copy.deepcopy(nano.model), arguments, eval_dataset=items).evaluate()
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(nano.model(*clip).loss.item(), rel=1e-4)


# Drawing


def test_initialization_reaches_everything_after_to_empty(nano):
    config = copy.deepcopy(nano.model.config)
    config.expert_modules = ["q_proj", "qkv"]
    with torch.device("meta"):
        model = SamoeModel(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for _, module in expert_modules(model):
        assert module.lora_A.std() > 0.01 and not module.lora_B.any() and module.router.weight.std() > 0.01
        assert module.weight.std() > 0.01
    same = model.prompt_encoder.shared_embedding.positional_embedding
    assert torch.equal(same, model.shared_image_embedding.positional_embedding)


def test_linear_layers_are_drawn_as_in_pytorch(nano):
    torch.manual_seed(0)
    model = SamoeModel(nano.model.config)
    linear = [m for m in model.modules() if type(m) in (torch.nn.Linear, ExpertLinear) and m.in_features >= 64]
    assert len(linear) > 10
    for module in linear:
        assert module.weight.abs().max() <= module.in_features**-0.5
        assert module.weight.std() == pytest.approx((3 * module.in_features) ** -0.5, rel=0.1)
    assert model.no_memory_embedding.std() == pytest.approx(0.02, rel=0.5)


def test_the_seed_decides_the_draw(nano):
    def draw(seed):
        torch.manual_seed(seed)
        return SamoeModel(nano.model.config).state_dict()

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


# Files


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    write_text(path, "first")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("open_folder", [new_folder, updated_folder])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path, open_folder):
    with pytest.raises(RuntimeError), open_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with open_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("whole")
    assert (tmp_path / "out" / "a").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_features_of_other_sizes_than_the_images_ask_for_are_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["image_size"] *= 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{folder}: `vision_config.backbone_feature_sizes` must be"):
        SamoeModel.from_pretrained(folder)
