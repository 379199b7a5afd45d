"""Meta's `sam3.pt`: the tracker is read as Meta's code runs it, and put back with all else as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Sam2VideoInferenceSession

from helpers.domains import add_learned_domain
from helpers.interaction import tiny_config
from helpers.reference import FIXTURES, assert_tensors
from helpers.sam3 import sam3_config
from helpers.sam3_clip import HIDDEN, NUM_FRAMES, PROMPTS, SIZE, STRIDE, draw, draw_weight
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.cli import main
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.original import checkpoint
from samoe_hf.original.checkpoint import SAM3_CONFIG, load_original, save_sam3
from samoe_hf.original.names import state_dict_from_sam3
from samoe_hf.surgery.merge import merge_into_base

FILE = FIXTURES / "sam3_tracker.safetensors"
EXPECTED = load_file(FILE)
TRUNK = "detector.backbone.vision_backbone.trunk"
LAYERS, ATTENTIONS = "tracker.transformer.encoder.layers", (("self", ""), ("cross", "_image"))
ONE = {"num_experts": 1, "num_experts_per_tok": 1, "lora_rank": 4}


def shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of Meta's tensors: "combined", small, or "published"."""
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()[name])


def draw_tensor(name: str, shape: list[int]) -> torch.Tensor:
    if name.endswith("freqs_cis"):
        return torch.randn(shape, dtype=torch.complex64)
    drawn = torch.from_numpy(draw_weight(name, tuple(shape))).float()
    return drawn.bfloat16() if "language" in name else drawn


@pytest.fixture(scope="module")
def drawn() -> dict[str, torch.Tensor]:
    return {name: draw_tensor(name, shape) for name, shape in shapes("combined").items()}


@pytest.fixture
def small(drawn, monkeypatch) -> dict[str, torch.Tensor]:
    """A small combined checkpoint, whose architecture takes the published one's place."""
    config = sam3_config(4, SIZE, 2, STRIDE, memory_fuser_intermediate_dim=4 * HIDDEN)
    trunk = config.vision_config.backbone_config
    trunk.hidden_size, trunk.intermediate_size, trunk.global_attn_indexes = 64, 160, [1, 3]
    trunk.layer_norm_eps = SAM3_CONFIG.vision_config.backbone_config.layer_norm_eps
    monkeypatch.setattr(checkpoint, "SAM3_CONFIG", config)
    return dict(drawn)


@pytest.fixture
def save(tmp_path):
    def save_as(content, name: str = "sam3.pt") -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save_as


def test_a_video_is_tracked_as_by_meta(small, save):
    model = SamoeModel.from_pretrained(save({"model": small})).double().eval()
    assert model.memory_selection == "score" and model.config.image_size == SIZE
    frames = torch.from_numpy(draw("frames", (NUM_FRAMES, 3, SIZE, SIZE))).float().double()
    with torch.no_grad():
        features = encode_frames(model, frames[:1])
    for i, level in enumerate(features[:3]):
        assert (level[0] - EXPECTED[f"combined.level {i}"]).abs().max() < 1e-5
    session = Sam2VideoInferenceSession(frames, SIZE, SIZE, dtype=torch.float64)
    points = {"input_points": [[[PROMPTS["point"][0]["point"]]]], "input_labels": [[[1]]]}
    build_processor(model.config).add_inputs_to_inference_session(session, 0, 1, **points)
    masks = torch.stack([out.pred_masks[0, 0] for out in model.propagate_in_video_iterator(session, 0)])
    assert (masks - EXPECTED["combined.masks"]).abs().mean() < 1e-6 < EXPECTED["combined.masks"].abs().mean()


def test_the_published_tensors_are_those_of_the_published_architecture():
    """Each of Meta's own model of that size has a place in ours, and none is left over."""
    found = {}
    for name, shape in shapes("published").items():
        part = "detector" if name.startswith("backbone.") else "tracker"
        found[f"{part}.{name}"] = torch.empty(shape, device="meta")
    sides = {len(tensor) for name, tensor in found.items() if name.endswith("freqs_cis")}
    with torch.device("meta"):
        model = SamoeModel(SamoeConfig(**read_yaml("model_sam3")))
    expected = {n: x.shape for n, x in model.state_dict().items() if not is_expert_parameter(n)}
    assert {n: x.shape for n, x in state_dict_from_sam3(found).items()} == expected
    assert sides == {24**2, (model.config.image_size // 14) ** 2}
    ours = {**SAM3_CONFIG.to_dict(), "memory_selection": "score"}
    stated = SamoeConfig.from_dict(ours).to_dict()
    stated["vision_config"]["backbone_config"]["layer_norm_eps"] = 1e-6
    assert stated == model.config.to_dict()


def test_what_wrappers_and_trainers_leave_is_read(small, save, caplog):
    _, expected = load_original(save({"model": small}))
    half = {name: x.half() if "tracker.no_" in name else x for name, x in small.items()}
    averaged = {f"ema_model.module.{name}": x * 0 for name, x in small.items()}
    contents = [
        small,
        {"model": {f"module.{name}": x for name, x in half.items()}, "epoch": 3},
        {"state_dict": {f"model.{name}": x for name, x in small.items()} | averaged, "optimizer": {"state": {}}},
    ]
    for content in contents:
        _, tensors = load_original(save(content))
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32 and torch.allclose(tensor, expected[name], rtol=1e-3), name
    assert "average of the weights, and are not read" in caplog.text


def test_a_file_of_safetensors_stays_one(small, tmp_path):
    theirs = {name: x for name, x in small.items() if not x.is_complex()}
    save_file(theirs, tmp_path / "sam3.safetensors")
    config, tensors = load_original(tmp_path / "sam3.safetensors")
    changed = tensors | {"no_memory_embedding": tensors["no_memory_embedding"] + 1}
    save_sam3(config, changed, tmp_path / "sam3.safetensors", tmp_path / "out")
    written = load_file(tmp_path / "out" / "sam3.safetensors")
    assert written.keys() == theirs.keys()
    assert [n for n, x in written.items() if not torch.equal(x, theirs[n])] == ["tracker.no_mem_embed"]
    found = load_original(tmp_path / "out" / "sam3.safetensors")[1]
    assert found.keys() == changed.keys() and all(torch.equal(x, changed[name]) for name, x in found.items())


def test_the_size_of_frames_is_known_from_rotary_positions(small, save):
    whole = {name: torch.zeros(36, 16) for name in small if name.endswith(("1.attn.freqs_cis", "3.attn.freqs_cis"))}
    without = {name: x for name, x in small.items() if not name.endswith("freqs_cis")}
    sizes = [
        SamoeModel.from_pretrained(save(content), **given).config.image_size
        for content, given in (({**small, **whole}, {}), (without, {}), (without, {"image_size": 2 * SIZE}))
    ]
    assert sizes == [6 * STRIDE, SIZE, 2 * SIZE]
    with pytest.raises(ValueError, match=r"expected windows of 2 patches, got \[2, 3, 4\]"):
        load_original(save({**small, f"{TRUNK}.blocks.0.attn.freqs_cis": torch.zeros(9, 16)}))


def test_what_does_not_fit_is_named(small, save, tmp_path):
    model = load_original(save(small))
    for name, tensor, message in (
        ("tracker.no_mem_embed", None, "missing: no_memory_embedding"),
        ("tracker.extra.weight", torch.zeros(1), "no tensor or module of the name 'extra.weight'"),
        (f"{TRUNK}.blocks.0.attn.qkv.weight", torch.zeros(()), r"shape: vision_encoder.+q_proj.weight \(1,\) instead"),
        (f"{TRUNK}.pos_embed", torch.zeros(3), "another shape: vision_encoder.+position_embeddings"),
        (f"{TRUNK}.blocks.0.ls1.gamma", torch.zeros(64), "unexpected: vision_encoder.+ls1.gamma"),
        (TRUNK.replace("trunk", "sam2_convs.0.conv_1x1.bias"), None, "missing: .+fpn_layers.0.proj1.bias"),
        ("tracker.no_mem_embed", torch.zeros(1, 1, HIDDEN).int(), "of no floating-point type: no_memory"),
    ):
        path = save({n: x for n, x in {**small, name: tensor}.items() if x is not None})
        for use in (load_original, lambda path: save_sam3(*model, path, tmp_path / "out")):
            with pytest.raises(ValueError, match=message) as caught:
                use(path)
            assert "sam3.pt" in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_settings_of_sam2_are_refused(small, save):
    for name in ("experts", "original_config"):
        with pytest.raises(ValueError, match=r"sam3.pt is SAM 3; `experts` and `original_config` go with SAM 2's"):
            load_original(save(small), **{name: "other"})


def convert(model: SamoeModel, folder: Path, into: object) -> Path:
    model.save_pretrained(folder / "model")
    arguments = ["convert", folder / "model", "--domain", "lora", "--to", "sam3", "--into", into]
    main([*map(str, arguments), "--output", str(folder / "out")])
    return folder / "out" / "sam3.pt"


def test_the_tracker_is_put_into_a_copy_and_all_else_stays(small, save, tmp_path, capsys):
    small["tracker.no_obj_ptr"] = small["tracker.no_obj_ptr"].bfloat16()
    content = {
        "model": {f"module.{name}": x for name, x in small.items()},
        "ema": {name: x.clone() for name, x in small.items()},
        "optimizer": {"state": {0: torch.randn(3)}, "lr": 1e-4},
    }
    into = save(content)
    model = SamoeModel.from_pretrained(into).eval()
    add_learned_domain(model, "lora", 1, **ONE, expert_modules=["memory_attention.*.q_proj", "vision_encoder.*.v_proj"])
    model.mask_decoder.iou_token.weight.data += 1
    written = torch.load(convert(model, tmp_path, into), weights_only=True)
    assert "SAM 3's detector shares it" in capsys.readouterr().out
    assert written.keys() == content.keys() and written["optimizer"]["lr"] == 1e-4
    assert torch.equal(written["optimizer"]["state"][0], content["optimizer"]["state"][0])
    changed = {name for name, x in written["model"].items() if not torch.equal(x, content["model"][name])}
    layers = [f"module.{LAYERS}.{i}.{name}_attn{on}.q_proj.weight" for i in range(2) for name, on in ATTENTIONS]
    blocks = [f"module.{TRUNK}.blocks.{i}.attn.qkv.weight" for i in range(4)]
    assert changed == {*layers, *blocks, "module.tracker.sam_mask_decoder.iou_token.weight"}
    assert {n: x.dtype for n, x in written["model"].items()} == {n: x.dtype for n, x in content["model"].items()}
    assert all(torch.equal(x, content["ema"][name]) for name, x in written["ema"].items())
    read = SamoeModel.from_pretrained(tmp_path / "out" / "sam3.pt")
    assert_tensors(read, merge_into_base(model, "lora").state_dict())
    parts = zip(content["model"][blocks[0]].chunk(3), written["model"][blocks[0]].chunk(3), strict=True)
    assert [torch.equal(*pair) for pair in parts] == [True, True, False]


def test_models_and_files_that_do_not_go_together_are_refused(small, save, tmp_path, caplog):
    into = save(small)
    model = SamoeModel.from_pretrained(into, image_size=2 * SIZE).eval()
    add_learned_domain(model, "lora", 1, **ONE)
    on_sam2 = SamoeModel(tiny_config(image_size=64))
    add_learned_domain(on_sam2, "lora", 1, **ONE)
    for given, path, message in (
        (on_sam2, into, "base is SAM 2; expected SAM 3"),
        (model, tmp_path / "none.pt", "none.pt is neither Meta's sam3.pt nor a folder"),
        (model, save({n: x for n, x in small.items() if "tracker" not in n}, "alone.pt"), "SAM 3's detector alone"),
        (model, save({"a": torch.zeros(1)}, "other.pt"), "other.pt is no checkpoint of SAM 3"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert(given, tmp_path, path)
        assert not (tmp_path / "out").exists()
    convert(model, tmp_path, into)
    assert "frames of 128 pixels" in caplog.text and "those of 64" in caplog.text
