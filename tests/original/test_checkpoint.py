"""The original's files: what is read from them, what is written, and what is refused."""

import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Sam2VideoConfig, Sam2VideoModel, Sam2VideoProcessor

from helpers.reference import CHECKPOINT, CONFIG, EXPERTS, reference_folder
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.model.configuration_samoe import MEMORY_ATTENTION_PROJECTIONS
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.original.checkpoint import load_original, save_original
from samoe_hf.original.config import build_config, read_settings
from samoe_hf.original.names import state_dict_from_original, state_dict_to_original

Q_PROJ = "memory_attention.layers.0.self_attn.q_proj"


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def config_from_yaml(path: Path) -> SamoeConfig:
    return build_config(read_settings(path))


def assert_equal(tensors: dict, expected: dict) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return read(CHECKPOINT)["model"]


@pytest.fixture(scope="module")
def experts() -> dict[str, torch.Tensor]:
    return read(EXPERTS)["model_state_dict"]


@pytest.fixture(scope="module")
def full(base, experts) -> dict[str, torch.Tensor]:
    """The tensors of the full MoE checkpoint, under its names."""
    wrapped = {name.split(".experts.")[0] for name in experts if ".experts." in name}
    named = {}
    for name, tensor in base.items():
        module, _, leaf = name.rpartition(".")
        named[f"{module}.base_layer.{leaf}" if module in wrapped else name] = tensor
    return named | experts


@pytest.fixture
def save(tmp_path):
    """Saves an object as a checkpoint of the given name and returns the path."""

    def save_as(content, name="checkpoint.pt") -> Path:
        (save_file if name.endswith(".safetensors") else torch.save)(content, tmp_path / name)
        return tmp_path / name

    return save_as


def nano_yaml(path: Path, **fields) -> Path:
    """Writes nano's YAML with fields, named by their path below `model`, set, or deleted where they are None."""
    document = yaml.safe_load(CONFIG.read_text())
    for field, value in fields.items():
        *parents, name = field.split(".")
        section = document["model"]
        for parent in parents:
            section = section.setdefault(parent, {})
        section.pop(name, None)
        if value is not None:
            section[name] = value
    path.write_text(yaml.safe_dump(document))
    return path


def meta_checkpoint(family: str = "sam2.1") -> dict[str, torch.Tensor]:
    """All tensors of Meta's tiny model under the original's names, zeros that take no memory."""
    config = Sam2VideoConfig()
    if family == "sam2":
        config.enable_occlusion_spatial_embedding = False
        config.enable_temporal_pos_encoding_for_object_pointers = False
    with torch.device("meta"):
        tensors = state_dict_to_original(Sam2VideoModel(config).state_dict())
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in tensors.items()}


def expert_tensors(module: str, in_features: int, out_features: int, num_experts: int, rank: int) -> dict:
    tensors = {f"{module}.gate.gate.weight": torch.rand(num_experts, in_features)}
    tensors[f"{module}.gate.gate.bias"] = torch.rand(num_experts)
    for index in range(num_experts):
        tensors[f"{module}.experts.{index}.lora_down.weight"] = torch.rand(rank, in_features)
        tensors[f"{module}.experts.{index}.lora_up.weight"] = torch.rand(out_features, rank)
    return tensors


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_experts_and_base_have_the_files_values(name):
    folder = reference_folder(name)
    files = [folder / f"sam2.1_hiera_{name}.pt", folder / f"samoe_{name}_adapters.pt"]
    config, tensors = load_original(*files, original_config=folder / f"sam2.1_hiera_{name}_moe.yaml")
    base, experts = read(files[0])["model"], read(files[1])["model_state_dict"]
    assert (config.num_experts, config.num_experts_per_tok) == ({"nano": 4, "mini": 6}[name], 2)
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (4, 2.0, 0.1)
    assert config.expert_modules == MEMORY_ATTENTION_PROJECTIONS
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    original = "memory_attention.layers.1.cross_attn_image.out_proj"
    ours = "memory_attention.layers.1.cross_attn_image.o_proj"
    assert torch.equal(tensors[f"{ours}.weight"], base[f"{original}.weight"].float())
    assert torch.equal(tensors[f"{ours}.router.weight"], experts[f"{original}.gate.gate.weight"].float())
    for index in range(config.num_experts):
        for ours_matrix, matrix in (("lora_A", "down"), ("lora_B", "up")):
            expected = experts[f"{original}.experts.{index}.lora_{matrix}.weight"].float()
            assert torch.equal(tensors[f"{ours}.{ours_matrix}"][index], expected)
    SamoeModel(config).load_state_dict(tensors)


def test_all_forms_of_checkpoints_are_equal(save, base, experts, full):
    expected_config, expected = load_original(CHECKPOINT, EXPERTS, CONFIG)
    old = full | {name: tensor * 0 for name, tensor in experts.items()}
    pairs = [
        (save(base, "bare_base.pt"), save({"moe_state_dict": experts}, "guide.pt")),
        (CHECKPOINT, save(experts, "bare_experts.pt")),
        (CHECKPOINT, save({"best_val_iou": np.float64(0.5), "model_state_dict": experts}, "scored.pt")),
        (save({"model": full}, "full.pt"), None),
        (save(old, "old_experts.pt"), EXPERTS),
        (save(base, "base.safetensors"), save(experts, "experts.safetensors")),
    ]
    for checkpoint, expert_file in pairs:
        config, tensors = load_original(checkpoint, expert_file, CONFIG)
        assert config.to_dict() == expected_config.to_dict()
        assert_equal(tensors, expected)
    ours = state_dict_from_original(full)
    assert_equal(state_dict_to_original(ours), full)
    assert_equal(state_dict_from_original(state_dict_to_original(ours)), ours)
    # Types narrower than float32 are widened, and wider ones kept.
    for narrow in (torch.float16, torch.float8_e4m3fn):
        changed = base | {"no_mem_embed": base["no_mem_embed"].to(narrow), "no_obj_ptr": base["no_obj_ptr"].double()}
        _, tensors = load_original(save(changed), original_config=CONFIG)
        assert torch.equal(tensors["no_memory_embedding"], base["no_mem_embed"].to(narrow).float())
        assert tensors["no_object_pointer"].dtype == torch.float64


def test_what_wrappers_trainers_and_averages_leave_is_read(save, base, caplog):
    _, expected = load_original(CHECKPOINT, original_config=CONFIG)
    wrapped = {f"module._orig_mod.{name}".replace(".trunk.", ".trunk._orig_mod."): x for name, x in base.items()}
    zeros = {name: x * 0 for name, x in base.items()}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 5e-6, "params": [0]}]}
    trainer = {"model": base, "optimizer": optimizer, "epoch": 40, "steps": {"train": 9}, "best_meter_values": {}}
    contents = [
        wrapped,
        {"model": wrapped},
        trainer,
        {"state_dict": {f"model.{name}": x for name, x in base.items()}, "optimizer_states": [optimizer]},
        {"module.n_averaged": torch.tensor(3), **{f"module.{name}": x for name, x in base.items()}},
        {"model_ema": base},
    ]
    for content in contents:
        assert_equal(load_original(save(content), original_config=CONFIG)[1], expected)
    assert not caplog.records
    with_averages = {**base, **{f"ema_model.module.{name}": x for name, x in zeros.items()}}
    for content, message in (({"model": base, "ema": zeros}, "'ema', is not read"), (with_averages, "are not read")):
        assert_equal(load_original(save(content), original_config=CONFIG)[1], expected)
        assert message in caplog.text
        caplog.clear()
    with pytest.raises(ValueError, match=r"checkpoint.pt holds tensors twice"):
        load_original(save({**base, **{f"module.{name}": x for name, x in zeros.items()}}), original_config=CONFIG)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tracker.model.sam_mask_decoder.x", "detector.x"], "SAM 3.1, whose multiplex tracker"),
        (["detector.backbone.vision_backbone.trunk.x"], "SAM 3's detector alone"),
        (["image_encoder.neck.convs.0.conv_1x1.weight", "maskmem_tpos_enc"], "EfficientTAM, whose encoder"),
        (["image_encoder.blocks.0.norm1.weight", "mask_decoder.x"], "an image model, SAM,"),
        (["image_encoder.trunk.x", "sam_mask_decoder.x"], "an image model of SAM 2, without the memory"),
    ],
)
def test_other_models_are_refused_by_name_before_they_are_loaded(save, names, message):
    path = save({"model": {name: torch.zeros(1) for name in names}})
    without_values = path.with_name("checkpoint.pt.zip")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(without_values, "w") as cut:
        for file in whole.infolist():
            cut.writestr(file.filename, b"" if "/data/" in file.filename else whole.read(file))
    for file in (path, without_values.replace(path)):
        with pytest.raises(ValueError, match=rf"checkpoint\.pt is {message}"):
            load_original(file)


@pytest.mark.parametrize("family", ["sam2", "sam2.1"])
def test_the_size_is_known_from_the_tensors(save, family):
    config, tensors = load_original(save({"model": meta_checkpoint(family)}))
    expected = Sam2VideoConfig()
    assert config.vision_config.to_dict() == expected.vision_config.to_dict()
    assert config.enable_occlusion_spatial_embedding == (family == "sam2.1")
    assert config.enable_temporal_pos_encoding_for_object_pointers == (family == "sam2.1")
    with torch.device("meta"):
        assert tensors.keys() == Sam2VideoModel(config).state_dict().keys()


@pytest.mark.parametrize(("num_experts", "k"), [(3, 2), (1, 1)])
def test_settings_of_experts_without_yaml(save, caplog, num_experts, k):
    experts = expert_tensors(Q_PROJ, 256, 256, num_experts, rank=5)
    config, _ = load_original(save(meta_checkpoint()), save(experts, "experts.pt"))
    settings = config.num_experts, config.num_experts_per_tok, config.lora_rank, config.lora_alpha
    assert settings == (num_experts, k, 5, 1.0)
    (record,) = caplog.records
    assert all(name in record.message for name in ("lora_alpha", "num_experts_per_tok", "original_config"))


def test_modules_of_experts_are_those_in_the_file(save, experts, caplog):
    some = {name: tensor for name, tensor in experts.items() if name.startswith("memory_attention.layers.0.self_attn.")}
    more = some | expert_tensors("sam_mask_decoder.transformer.layers.1.mlp.layers.0", 128, 2048, 4, 4)
    config, tensors = load_original(CHECKPOINT, save(more, "experts.pt"), CONFIG)
    expected = [f"memory_attention.layers.0.self_attn.{letter}_proj" for letter in "qkvo"]
    assert sorted(config.expert_modules) == sorted([*expected, "mask_decoder.transformer.layers.1.mlp.proj_in"])
    assert config.lora_alpha == 2.0
    assert "5 modules have experts, but the YAML has them in 16" in caplog.text
    model = SamoeModel(config)
    model.load_state_dict(tensors)
    back = state_dict_to_original(model.state_dict())
    assert more.keys() == {name for name in back if ".experts." in name or ".gate." in name}


def test_written_files_hold_what_was_read(nano, tmp_path, base, experts, full):
    files = save_original(nano.model.config, nano.model.state_dict(), tmp_path)
    assert {path.name for path in files.values()} == {path.name for path in tmp_path.iterdir()}
    for kind, tensors in (("base", base), ("full", full)):
        assert_equal(read(files[kind])["model"], {name: tensor.float() for name, tensor in tensors.items()})
    assert read(files["experts"]).keys() == {"model_state_dict", "config"}
    expected = load_original(CHECKPOINT, EXPERTS, CONFIG)
    for checkpoint, expert_file in ((files["full"], None), (files["base"], files["experts"])):
        config, tensors = load_original(checkpoint, expert_file, files["config"])
        assert config.to_dict() == expected[0].to_dict()
        assert_equal(tensors, expected[1])
    # The YAML names every setting of the experts.
    assert files["config"].read_text().startswith("# @package _global_")
    written, reference = (yaml.safe_load(path.read_text())["model"] for path in (files["config"], CONFIG))
    for attention in ("self_attention", "cross_attention"):
        section = written["memory_attention"]["layer"][attention]
        assert section == {name: reference["memory_attention"]["layer"][attention][name] for name in section}
        assert {"_target_", "num_experts", "lora_rank", "top_k", "lora_alpha", "lora_dropout"} < section.keys()


def test_experts_are_written_where_the_original_can_have_them(nano, save, experts, tmp_path):
    some = {name: tensor for name, tensor in experts.items() if name.split(".")[3] == "cross_attn_image"}
    config, tensors = load_original(CHECKPOINT, save(some), CONFIG)
    files = save_original(config, tensors, tmp_path / "written")
    written, back = load_original(files["full"], original_config=files["config"])
    assert written.num_experts == config.num_experts
    assert_equal(back, tensors)

    some = {name: tensor for name, tensor in experts.items() if not name.startswith("memory_attention.layers.1")}
    one_layer = load_original(CHECKPOINT, save(some), CONFIG)
    narrow = config_from_yaml(CONFIG)
    narrow.vision_config.backbone_config.mlp_ratio = 2.0
    with torch.device("meta"):
        other_base = narrow, SamoeModel(narrow).state_dict()
    copy = {"prompt_encoder.shared_embedding.positional_embedding": torch.zeros(2, 64)}
    for (config, tensors), message in (
        (one_layer, r"memory_attention\.layers\.0\.cross_attn_image\.k_proj"),
        (other_base, r"of another shape: image_encoder\.trunk\.blocks\.0\.mlp"),
        ((nano.model.config, nano.model.state_dict() | copy), r"shared_image_embedding.positional_embedding .* differ"),
    ):
        with pytest.raises(ValueError, match=message):
            save_original(config, tensors, tmp_path / "original")
    assert not (tmp_path / "original").exists()


def meta_model(yaml_name: str) -> torch.nn.Module:
    pytest.importorskip("sam2", reason="needs the `bench` extra")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    return instantiate(OmegaConf.load(meta_yaml(yaml_name)).model)


def meta_yaml(name: str) -> Path:
    return Path(sys.modules["sam2"].__file__).parent / "configs" / name.split("_")[0] / f"{name}.yaml"


@pytest.mark.parametrize("family", ["sam2", "sam2.1"])
@pytest.mark.parametrize("size", ["t", *(pytest.param(larger, marks=pytest.mark.slow) for larger in ("s", "b+", "l"))])
def test_every_architecture_of_meta(tmp_path, family, size):
    name = f"{family}_hiera_{size}"
    original = meta_model(name).state_dict()
    torch.save({"model": original}, tmp_path / "checkpoint.pt")
    config, tensors = load_original(tmp_path / "checkpoint.pt")
    assert config.to_dict() == config_from_yaml(meta_yaml(name)).to_dict()
    Sam2VideoModel(config).load_state_dict(tensors)
    assert_equal(state_dict_to_original(tensors), original)


def test_sam2_builds_what_the_written_yaml_describes(nano, tmp_path):
    pytest.importorskip("sam2", reason="needs the `bench` extra")
    from hydra.utils import instantiate

    files = save_original(nano.model.config, nano.model.state_dict(), tmp_path)
    document = yaml.safe_load(files["config"].read_text())["model"]
    for attention in ("self_attention", "cross_attention"):
        section = document["memory_attention"]["layer"][attention]
        section["_target_"] = "sam2.modeling.sam.transformer.RoPEAttention"
        for name in ("num_experts", "lora_rank", "top_k", "lora_alpha", "lora_dropout"):
            del section[name]
    assert not any(instantiate(document).load_state_dict(read(files["base"])["model"], strict=False))


def without(tensors: dict, beginning: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beginning)}


def test_tensors_that_do_not_fit_are_named(save, base, experts):
    wide = {f"{Q_PROJ}.experts.0.lora_down.weight": torch.zeros(8, 128)}
    counted = base["no_mem_embed"].to(torch.int64)
    cases = [
        (without(base, "no_mem_embed"), experts, "missing: no_mem_embed"),
        (base | {"head.weight": torch.zeros(1)}, experts | wide, r"unexpected: head\.weight"),
        (base, experts | wide, rf"another shape: {Q_PROJ}\.experts\.0\.lora_down\.weight \(8, 128\) instead of \(4, "),
        (base | {"no_mem_embed": counted}, experts, "no floating-point type: no_mem_embed"),
        (base | {f"{Q_PROJ}.base_layer.weight": base[f"{Q_PROJ}.weight"]}, experts,
         rf"with and without base_layer: {Q_PROJ}\.weight"),
        (base, without(experts, f"{Q_PROJ}.experts.1."), rf"missing: {Q_PROJ}\.experts\.1\.lora_down\.weight"),
    ]  # fmt: skip
    for base_tensors, expert_tensors, message in cases:
        files = save({"model": base_tensors}), save(expert_tensors, "experts.pt")
        with pytest.raises(ValueError, match=message) as caught:
            load_original(*files, CONFIG)
        assert all(path.name in str(caught.value) for path in (*files, CONFIG))


def test_files_that_are_no_checkpoints_are_named(tmp_path, save, base):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "truncated.pt").write_bytes(CHECKPOINT.read_bytes()[:100_000])
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("no checkpoint at all")
    cases = [
        (tmp_path / "empty.pt", "is empty"),
        (tmp_path / "truncated.pt", "truncated, damaged"),
        (tmp_path / "text.pt", "damaged, or holds more than tensors and plain data"),
        (tmp_path / "text.safetensors", "damaged or no file of torch.save or safetensors"),
        (save({"weights": base}, "form.pt"), r"holds a dict with the keys \['weights'\]; expected tensors by name"),
        (save({"model": {"a": 1}}, "numbers.pt"), "expected tensors by name"),
        (EXPERTS, "holds experts only"),
        (CHECKPOINT, r"16 channels and 5 blocks is none of Meta's .* give the model's YAML as `original_config`"),
        (save({"a": torch.zeros(1)}, "other.pt"), "no image encoder of SAM 2"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load_original(path)
        assert path.name in str(caught.value)
    with pytest.raises(ValueError, match=r"sam2.1_hiera_nano\.pt should hold experts only, but has maskmem_tpos_enc"):
        load_original(CHECKPOINT, CHECKPOINT, CONFIG)
    missing = tmp_path / "missing"
    for arguments in ((missing,), (tmp_path,), (CHECKPOINT, missing, CONFIG), (CHECKPOINT, None, missing)):
        with pytest.raises(FileNotFoundError, match="no such file; expected"):
            load_original(*arguments)
    for change, message in ((math.nan, "the tensor 'no_memory_embedding' has NaN"), (1, ".* is of type float64")):
        embedding = base["no_mem_embed"].double() if change == 1 else base["no_mem_embed"] * change
        path = save({"model": base | {"no_mem_embed": embedding}})
        with pytest.raises(ValueError, match=rf"{path.name}: ?{message}"):
            SamoeModel.from_pretrained(path, original_config=CONFIG)


ATTENTION = "memory_attention.layer.self_attention"
BAD_FIELDS = [
    ("soft_no_obj_ptr", True, "is True; only False is supported"),
    ("memory_encoder.mask_downsampler.embed_dim", 64, r"is 64, but `model.image_encoder.neck.+` is 128"),
    (f"{ATTENTION}.rope_theta", "ten", "must be of type float, got 'ten'"),
    ("image_size", 8192, "must be from 32 to 4096, got 8192"),
    ("image_encoder.trunk.stages", [1, "a"], "must be a list of integers"),
    ("_target_", "os.system", "_target_` is os.system; expected"),
    ("image_encoder.trunk", "hiera", "must be a mapping of fields, got 'hiera'"),
    ("image_encoder.trunk.patch_size", 16, "has fields that SAM 2 does not have there: patch_size"),
    (f"{ATTENTION}.num_experts", 3, "cross_attention.num_experts` is 4, but .+self_attention.+ is 3"),
    ("image_encoder.neck.backbone_channel_list", [1, 2, 3, 4], r"is \[1, 2, 3, 4\], but the trunk has"),
    ("image_encoder.trunk.stages", [1, 2, 3], "`stages` and `window_spec` must have 4 entries"),
    ("image_size", 100, "`image_size` must be a multiple of 32, got 100"),
    ("memory_attention.num_layers", None, r"`model\.memory_attention\.num_layers` is missing"),
    # It disagrees with the tensors.
    ("image_encoder.trunk.stages", [1, 1, 2, 2], r"missing: image_encoder\.trunk\.blocks\.5\."),
    ("memory_encoder.fuser.layer.kernel_size", 5, r"another shape: memory_encoder\.fuser\.layers\.0\.dw"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_fields_that_cannot_be_used_are_named(tmp_path, field, value, message):
    path = nano_yaml(tmp_path / "edited.yaml", **{field: value})
    with pytest.raises(ValueError, match=message) as caught:
        load_original(CHECKPOINT, original_config=path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_the_saved_processor_prepares_frames_as_the_original_does(tmp_path, name):
    folder = reference_folder(name)
    config = config_from_yaml(folder / f"sam2.1_hiera_{name}_moe.yaml")
    config.save_pretrained(tmp_path)
    build_processor(config).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, Sam2VideoProcessor)
    assert dict(processor.image_processor.mask_size) == {
        "height": config.image_size // 4,
        "width": config.image_size // 4,
    }
    frames = [Image.open(path) for path in sorted((folder / "frames").glob("*.jpg"))]
    expected = load_file(folder / "tracking.safetensors")["pixel_values"]
    processed = processor.init_video_session(video=frames).processed_frames
    video = torch.stack([processed[index] for index in range(len(frames))])
    images = processor(images=frames, return_tensors="pt")["pixel_values"]
    one_level = 1.01 / 255 / min(processor.video_processor.image_std)
    for pixel_values in (video, images):
        assert (pixel_values - expected).abs().max() < one_level
        assert (pixel_values - expected).abs().mean() < 2e-4
