"""The parts of any model give together what the model gives, which here they do in PyTorch."""

import copy

import pytest

from helpers.domains import with_two_domains
from helpers.edgetam import edgetam_model, needs_timm
from helpers.export import EagerTracker, compare, drawn_video
from helpers.sam3 import sam3_config, sam3_models
from samoe_hf import SamoeModel, small_base
from samoe_hf.model.processing_samoe import build_processor


def difference_of(model: SamoeModel, domain: str | None = None):
    """On frames of the model's size, which nobody resizes: small random models make much of a pixel's last bit."""
    side, processor = model.config.image_size, build_processor(model.config)
    frames, masks = drawn_video(8, (side, side))
    prompts = [
        {"frame": 0, "object": 1, "box": [20, 20, 90, 80]},
        {"frame": 2, "object": 2, "points": [[60, 40]], "labels": [1]},
        {"frame": 4, "object": 1, "mask": next(iter(masks.values()))},
    ]
    return compare(model, processor, EagerTracker(model, processor, domain), frames, prompts, domain=domain)


@pytest.mark.parametrize(
    "base, selection", [("nano", "recent"), ("sam3", "score"), pytest.param("edgetam", "recent", marks=needs_timm)]
)
def test_memories_are_chosen_as_the_model_says(nano, base, selection):
    model = {
        "nano": lambda: copy.deepcopy(nano.model).eval(),
        "sam3": lambda: sam3_models(sam3_config(), with_experts=True)[0],
        "edgetam": lambda: edgetam_model(with_experts=True),
    }[base]()
    model.config.memory_selection = selection
    result = difference_of(model)
    assert result.mean < 1e-3 and result.iou > 0.999


def test_a_model_that_takes_frames_of_another_size():
    result = difference_of(SamoeModel.from_pretrained(small_base(), image_size=96).eval())
    assert result.mean < 1e-3 and result.iou > 0.999


@pytest.mark.parametrize("domain", ["b", None])
def test_the_experts_of_a_domain(domain):
    result = difference_of(with_two_domains(), domain)
    assert result.mean < 1e-4 and result.iou > 0.999
