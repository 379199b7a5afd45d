"""The cache of image features: same numbers, no work done twice, valid only for the same weights, sizes and frames."""

import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from helpers.edgetam import over_bases, slow_over_bases
from samoe_hf import SamoeModel
from samoe_hf.errors import InputError
from samoe_hf.model.domain_experts import domain_modules, use_domain
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.surgery.domains import add_domain, rename_domain
from samoe_hf.training.feature_cache import FeatureCache
from samoe_hf.training.trainer import build_trainer


@pytest.fixture(scope="module")
def model(model_folder) -> SamoeModel:
    return SamoeModel.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))


@contextmanager
def encoded_frames(model):
    """While it is open, the number of frames that the model's image encoder is given is added to a list."""
    counts = []
    with model.vision_encoder.register_forward_pre_hook(lambda _, arguments: counts.append(len(arguments[0]))):
        yield counts


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


@over_bases
def test_features_are_the_encoders_own_and_computed_once(model, frames, tmp_path):
    expected = encode_frames(model, frames)
    cache = FeatureCache(tmp_path / "cache")
    with encoded_frames(model) as encoded:
        first = cache.encode_frames(model, frames[:2])
        again = cache.encode_frames(model, frames, batch_size=1)
        assert sum(encoded) == 3
        swapped = FeatureCache(tmp_path / "cache").encode_frames(model, frames[[2, 0]])
        assert sum(encoded) == 3
    for name in ("fine", "middle", "coarse", "position", "decoder_position"):
        tensor = getattr(expected, name)
        rows = tensor if "position" in name else tensor[:2]
        torch.testing.assert_close(getattr(first, name), rows, rtol=0, atol=0)
        # Frames encoded one by one may differ in the last bits.
        torch.testing.assert_close(getattr(again, name), tensor, rtol=1e-5, atol=1e-5)
        rows = tensor if "position" in name else tensor[[2, 0]]
        torch.testing.assert_close(getattr(swapped, name), rows, rtol=1e-5, atol=1e-5)
    assert len(files(tmp_path)) == 3 and not list(tmp_path.rglob("*.partial"))
    assert FeatureCache("~/cache").folder == Path.home() / "cache"


def test_another_frame_or_precision_is_another_entry(model, frames, tmp_path):
    model = copy.deepcopy(model)
    cache = FeatureCache(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        half_dtype = encode_frames(model, frames[:1]).coarse.dtype
    with encoded_frames(model) as encoded:
        cache.encode_frames(model, frames[:1])
        cache.encode_frames(model, frames[:1] + 1e-6)
        assert sum(encoded) == 2
        with torch.autocast("cpu", torch.bfloat16):
            half = cache.encode_frames(model, frames[:1])
        assert sum(encoded) == 3 and half.coarse.dtype == half_dtype


@pytest.mark.parametrize("change", ["to bfloat16", "through data", "data is replaced"])
def test_features_are_those_of_the_weights_as_they_are_now(model, frames, tmp_path, change):
    """Whatever way they were changed: `.to` and writes through `.data` leave no trace in a tensor's version."""
    model = copy.deepcopy(model)
    cache = FeatureCache(tmp_path)
    cache.encode_frames(model, frames[:1])
    weight, frames = model.vision_encoder.neck.convs[0].weight, frames[:1]
    if change == "to bfloat16":
        model.to(torch.bfloat16)
        frames = frames.bfloat16()
    elif change == "through data":
        weight.data.mul_(0.5)
    else:
        weight.data = -weight.data
    found, expected = cache.encode_frames(model, frames), encode_frames(model, frames)
    torch.testing.assert_close(found.coarse, expected.coarse, rtol=0, atol=0)
    with encoded_frames(model) as encoded:
        cache.encode_frames(model, frames)
        assert sum(encoded) == 0


@slow_over_bases
def test_training_with_a_cache_gives_the_same_losses(run_config, tmp_path):
    results = []
    videos = "{kind: synthetic, num_videos: 2, num_frames: 3, image_size: [64, 64]}"
    options = ["--train_data", videos, "--lora_dropout", "0", "--save_strategy", "no", "--point_probability", "0"]
    for more in ([], ["--feature_cache", str(tmp_path / "cache")]):
        trainer = build_trainer([str(run_config), *options, *more])
        with encoded_frames(trainer.model) as encoded:
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, sum(encoded)))
    (plain, plain_count), (cached, cached_count) = results
    assert plain_count == 18 and cached_count == 6 == len(files(tmp_path / "cache"))
    assert len(plain) == 6 and cached == pytest.approx(plain, rel=1e-4)


def test_adapters_of_the_encoder_are_told_apart(nano, tmp_path):
    model = copy.deepcopy(nano.model)
    pixels = nano.load("tracking")["pixel_values"][:1]
    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=2, target_modules=["qkv"]), name)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    cache = FeatureCache(tmp_path)
    with pytest.raises(ValueError, match="needs a frozen image encoder"):
        cache.encode_frames(model, pixels)

    def check():
        model.requires_grad_(False)
        found, expected = cache.encode_frames(model, pixels), encode_frames(model, pixels)
        torch.testing.assert_close(found.coarse, expected.coarse, atol=0, rtol=0)

    for active in ("one", "two"):
        model.set_adapter(active)
        check()
    model.disable_adapters()
    check()
    model.enable_adapters()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("two", 3.0)
    check()
    assert len(list(tmp_path.glob("*/*/*.safetensors"))) == 4


def test_domains_with_experts_in_the_encoder_have_features_of_their_own(model, frames, tmp_path):
    model = copy.deepcopy(model)
    rename_domain(model, None, "first")
    add_domain(model, "second", expert_modules=["qkv"])
    for _, experts in domain_modules(model, "second"):
        torch.nn.init.normal_(experts.lora_B, std=0.1)
    model.requires_grad_(False).eval()
    cache = FeatureCache(tmp_path)
    features = {}
    for domain in ("first", "second", "first"):
        with use_domain(domain):
            features[domain] = cache.encode_frames(model, frames).coarse
            torch.testing.assert_close(features[domain], encode_frames(model, frames).coarse, rtol=1e-4, atol=1e-4)
    assert (features["first"] - features["second"]).abs().mean() > 1e-2
    for _, experts in domain_modules(model, "second"):
        experts.dropout.p = 0.1
    model.train()
    with use_domain("first"):
        cache.encode_frames(model, frames)  # those of the other domain are not run
    with use_domain("second"), pytest.raises(InputError, match="set `lora_dropout` to 0"):
        cache.encode_frames(model, frames)
