"""Plain weights: what is merged tracks as the model does, in transformers' own model and in `sam2`'s predictor."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Sam2VideoInferenceSession, Sam2VideoModel, Sam3TrackerVideoModel, Sam3VideoModel

from helpers.domains import add_learned_domain, with_two_domains
from helpers.interaction import draw_weights, tiny_config
from helpers.reference import assert_tensors
from helpers.sam3 import sam3_config, sam3_models, save_combined
from samoe_hf import SamoeConfig, SamoeModel, small_base
from samoe_hf.cli import main
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.experts import freeze_experts
from samoe_hf.surgery.merge import merge_into_base

NUM_FRAMES = 6
ONE = {"num_experts": 1, "num_experts_per_tok": 1, "lora_rank": 4}


def with_lora(model: SamoeModel | None = None) -> SamoeModel:
    """A model with a domain `lora` that has one expert in each layer with some, of encoder, memory and decoder."""
    model = SamoeModel(tiny_config(image_size=64)).eval() if model is None else model
    draw_weights(model, with_experts=False)
    add_learned_domain(model, "lora", 1, **ONE, expert_modules=["qkv", "q_proj", "v_proj"])
    add_learned_domain(model, "mixture", 2, num_experts=3, num_experts_per_tok=2)
    return model


def video(model: SamoeModel) -> torch.Tensor:
    side = model.config.image_size
    return torch.randn(NUM_FRAMES, 3, side, side, generator=torch.Generator().manual_seed(0))


def prompts(model: SamoeModel, mask: bool = False) -> list[dict]:
    """Of two objects: points, and a box; or a mask of one."""
    side = model.config.image_size
    if mask:
        inside = torch.zeros(side, side, dtype=torch.bool)
        inside[side // 4 : side // 2, side // 3 : side * 3 // 4] = True
        return [{"mask": inside}]
    points = {"points": [[0.4 * side, 0.5 * side], [0.8 * side, 0.2 * side]], "labels": [1, 0]}
    return [points, {"box": [0.2 * side, 0.3 * side, 0.7 * side, 0.8 * side]}]


@torch.no_grad()
def track(model, config, frames: torch.Tensor, given: list[dict], domain: str | None = None) -> torch.Tensor:
    """Logits (frames, objects, S / 4, S / 4) of ours, or of transformers' own model."""
    processor, side = build_processor(config), frames.shape[-1]
    session = Sam2VideoInferenceSession(frames, side, side, dtype=frames.dtype)
    session.domain = domain
    for obj_id, prompt in enumerate(given, start=1):
        if "box" in prompt:
            inputs = {"input_boxes": [[prompt["box"]]]}
        elif "mask" in prompt:
            inputs = {"input_masks": prompt["mask"].numpy()}
        else:
            inputs = {"input_points": [[prompt["points"]]], "input_labels": [[prompt["labels"]]]}
        processor.add_inputs_to_inference_session(session, 0, obj_id, **inputs)
        model(session, frame_idx=0)
    return torch.stack([out.pred_masks[:, 0].clone() for out in model.propagate_in_video_iterator(session, 0)])


@torch.inference_mode()
def track_in_sam2(predictor, frames: torch.Tensor, given: list[dict]) -> torch.Tensor:
    """The same of `sam2`'s predictor."""
    side = frames.shape[-1]
    state = {
        "images": frames, "num_frames": len(frames), "offload_video_to_cpu": False, "offload_state_to_cpu": False,
        "video_height": side, "video_width": side, "device": frames.device, "storage_device": frames.device,
        "cached_features": {}, "constants": {}, "obj_id_to_idx": {}, "obj_idx_to_id": {}, "obj_ids": [],
    }  # fmt: skip
    for name in ("point_inputs", "mask_inputs", "output_dict", "temp_output_dict", "frames_tracked"):
        state[f"{name}_per_obj"] = {}
    for obj_id, prompt in enumerate(given, start=1):
        add = predictor.add_new_mask if "mask" in prompt else predictor.add_new_points_or_box
        add(state, 0, obj_id, **prompt)
    for _ in predictor.propagate_in_video(state):
        pass
    outputs = [x["cond_frame_outputs"] | x["non_cond_frame_outputs"] for x in state["output_dict_per_obj"].values()]
    return torch.stack([torch.cat([x[t]["pred_masks"][:, 0] for x in outputs]) for t in range(len(frames))])


def sam2_predictor(folder: Path):
    """What `sam2`'s own builder makes of the written files; it loads with `strict=True`."""
    pytest.importorskip("sam2", reason="needs the `bench` extra")
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from sam2.build_sam import build_sam2_video_predictor

    (checkpoint,), (config,) = folder.glob("*.pt"), folder.glob("*.yaml")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder.resolve()), version_base="1.2"):
        return build_sam2_video_predictor(config.name, str(checkpoint), device="cpu", apply_postprocessing=False)


def convert(model: SamoeModel, folder: Path, *options: object) -> Path:
    model.save_pretrained(folder / "model")
    main(["convert", str(folder / "model"), *map(str, options), "--output", str(folder / "out")])
    return folder / "out"


def check_in_transformers(model: SamoeModel, folder: Path, domain: str | None = "lora") -> float:
    out = convert(model, folder, *(["--domain", domain] if domain else []), "--to", "transformers")
    plain, info = Sam2VideoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert AutoProcessor.from_pretrained(out).image_processor.size["height"] == model.config.image_size
    model.config.previous_mask_with_clicks = False
    frames, given = video(model), prompts(model)
    expected = track(model, model.config, frames, given, domain)
    assert (expected - track(model, model.config, frames, given, None)).abs().mean() > 0.02 or domain is None
    return (track(plain.eval(), model.config, frames, given) - expected).abs().mean().item()


def check_in_sam2(model: SamoeModel, folder: Path, domain: str | None = "lora", mask: bool = False) -> float:
    pytest.importorskip("sam2", reason="needs the `bench` extra")
    out = convert(model, folder, *(["--domain", domain] if domain else []), "--to", "sam2")
    predictor, frames, given = sam2_predictor(out), video(model), prompts(model, mask)
    expected = track(model, model.config, frames, given, domain)
    return (track_in_sam2(predictor, frames, given) - expected).abs().mean().item()


def test_a_domain_of_one_expert_tracks_the_same_in_transformers(tmp_path):
    figure = check_in_transformers(with_lora(), tmp_path)
    print(figure)
    assert figure < 2e-5


@pytest.mark.slow
def test_the_shipped_base_with_a_domain_of_one_expert_tracks_the_same_in_transformers(tmp_path):
    model = SamoeModel.from_pretrained(small_base())
    add_learned_domain(model, "lora", 1, **ONE, expert_modules=["qkv", "q_proj", "v_proj"])
    figure = check_in_transformers(model, tmp_path)
    print(figure)
    assert figure < 5e-5


@pytest.mark.parametrize("mask", [False, True], ids=["points and box", "mask"])
def test_a_domain_of_one_expert_tracks_the_same_in_sam2(tmp_path, mask):
    figure = check_in_sam2(with_lora(), tmp_path, mask=mask)
    print(figure)
    assert figure < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [512, 1024])
@pytest.mark.parametrize("size", ["model_tiny", "model_base_plus"])
def test_sizes_of_meta_track_the_same_in_both(tmp_path, monkeypatch, size, image_size):
    config = SamoeConfig(**read_yaml(size))
    config.resize(image_size)
    model = with_lora(SamoeModel(config).eval())
    monkeypatch.setattr(sys.modules[__name__], "NUM_FRAMES", 3)
    (tmp_path / "sam2").mkdir()
    figures = check_in_sam2(model, tmp_path / "sam2"), check_in_transformers(model, tmp_path)
    print(figures)
    assert max(figures) < 1e-4  # measured: 3e-6; the domain changes masks by 0.09


def test_merged_weights_are_rounded_once():
    model = with_lora()
    half = copy.deepcopy(model).bfloat16()
    plain, names = merge_into_base(half, "lora"), [name for name, _ in domain_modules(half, "lora")]
    assert plain.dtype == torch.bfloat16 and names
    state = plain.state_dict()
    for name, experts in domain_modules(half, "lora"):
        exact = half.get_submodule(name).weight.double()
        exact = exact + experts.scaling * experts.lora_B[0].double() @ experts.lora_A[0].double()
        assert (state[f"{name}.weight"].double() - exact).abs().max() <= exact.abs().max() * 2**-8
        assert (state[f"{name}.weight"] == exact.bfloat16()).float().mean() > 0.999


def test_what_else_was_trained_comes_along_and_the_model_stays():
    model = with_lora()
    model.mask_decoder.iou_token.weight.data += 1
    before = copy.deepcopy(model.state_dict())
    plain = merge_into_base(model, "lora").state_dict()
    assert torch.equal(plain["mask_decoder.iou_token.weight"], before["mask_decoder.iou_token.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plain["no_memory_embedding"].zero_()
    assert model.no_memory_embedding.any()


def test_models_without_domains_are_merged_and_experts_without_effect_are_none(nano):
    torch.manual_seed(0)
    config = SamoeConfig(**{**read_yaml("model_nano"), **ONE})
    model = SamoeModel(config).eval()
    freeze_experts(model, [0])
    base = {n: x for n, x in model.state_dict().items() if not is_expert_parameter(n)}
    assert all(torch.equal(x, base[n]) for n, x in merge_into_base(model).state_dict().items())
    mixture = copy.deepcopy(nano.model)
    assert merge_into_base(mixture, "base").state_dict().keys() == base.keys()
    with pytest.raises(
        ValueError, match=r"chooses among 4 experts .* no plain weight .*--num_experts 1.*`samoe export`"
    ):
        merge_into_base(mixture)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (None, "must say whose experts are taken, one of 'lora', 'mixture', 'base'"),
        ("none", "no domain 'none'"),
        ("mixture", "chooses among 3 experts"),
    ],
)
def test_what_has_no_plain_weights_is_refused(domain, message):
    with pytest.raises(ValueError, match=message):
        merge_into_base(with_lora(), domain)


def sam3_with_lora() -> SamoeModel:
    model, _ = sam3_models(sam3_config())
    add_learned_domain(model, "lora", 1, **ONE)
    return model


def test_sam3s_tracker_is_put_into_the_combined_folder(tmp_path):
    model = sam3_with_lora()
    save_combined(tmp_path / "sam3")
    out = convert(model, tmp_path, "--domain", "lora", "--to", "sam3", "--into", tmp_path / "sam3")
    combined, info = Sam3VideoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    before = Sam3VideoModel.from_pretrained(tmp_path / "sam3").state_dict()
    plain, tracker = merge_into_base(model, "lora"), combined.tracker_model.state_dict()
    assert_tensors(plain, {name: x for name, x in tracker.items() if not name.startswith("vision_encoder.")})
    for name, tensor in combined.state_dict().items():
        if name.startswith("detector_model.") and ".vision_encoder.backbone." not in name:
            assert torch.equal(tensor, before[name]), name
    assert_tensors(SamoeModel.from_pretrained(out), plain.state_dict())


def test_sam3s_tracker_alone_is_a_folder_of_transformers(tmp_path):
    model = sam3_with_lora()
    out = convert(model, tmp_path, "--domain", "lora", "--to", "transformers")
    plain, info = Sam3TrackerVideoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    frames, given = video(model), prompts(model)
    tracked, expected, base = (
        track(m, model.config, frames, given, d) for m, d in ((plain.eval(), None), (model, "lora"), (model, None))
    )
    assert (tracked - expected).abs().mean() < 1e-5 and (expected - base).abs().mean() > 1e-3


@pytest.mark.parametrize("target", ["original", "sam2", "edgetam"])
def test_another_base_is_what_is_said_first(tmp_path, target):
    """And not that domains do not fit, or that one must be named."""
    with pytest.raises(SystemExit, match=r"base is SAM 3's tracker; expected (SAM 2|EdgeTAM)"):
        convert(sam3_with_lora(), tmp_path, "--to", target)


def test_what_sam3_cannot_take_is_refused(tmp_path):
    save_combined(tmp_path / "sam3")
    path = tmp_path / "sam3" / "model.safetensors"
    with pytest.raises(SystemExit, match="base is SAM 2; expected SAM 3"):
        convert(with_lora(), tmp_path, "--to", "sam3", "--into", tmp_path / "sam3")
    tensors = {name: tensor for name, tensor in load_file(path).items() if "no_memory_embedding" not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    folder = tmp_path / "sam3"
    for into, message in ((folder, "missing, such as 'no_memory_embedding'"), (path, "is no checkpoint of SAM 3")):
        with pytest.raises(SystemExit, match=message):
            convert(sam3_with_lora(), tmp_path, "--domain", "lora", "--to", "sam3", "--into", into)
    assert not (tmp_path / "out").exists()


def test_one_domain_of_a_samoe_model(tmp_path):
    out = convert(with_two_domains(), tmp_path, "--domain", "b")
    assert SamoeModel.from_pretrained(out).config.domain_names == ["b"]
