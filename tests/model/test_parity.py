"""The original's own numbers: tracking, memory attention, a training step. See `fixtures/` and ../shared/reference."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from helpers.reference import (
    FIXTURES,
    HEIGHT,
    WIDTH,
    add_reference_prompts,
    load_reference,
    run_memory_attention,
    track_reference,
)
from samoe_hf.model.expert_layer import ExpertLinear
from samoe_hf.model.losses import SegmentationLoss, mask_iou
from samoe_hf.model.processing_samoe import build_processor


def dice_loss(logits, targets):
    """Soft dice loss, smoothed by 1: logits and targets (..., H, W) -> (...)."""
    probability, targets = logits.sigmoid().flatten(-2), targets.flatten(-2)
    intersection = (probability * targets).sum(dim=-1)
    return 1 - (2 * intersection + 1) / (probability.sum(dim=-1) + targets.sum(dim=-1) + 1)


@pytest.mark.parametrize("name, with_experts", [("nano", True), ("nano", False), ("mini", True)])
def test_tracking_equals_the_original(name, with_experts):
    reference = load_reference(name, with_experts)
    expected = reference.load("tracking")
    logits, frames, session = track_reference(reference.model, reference.folder, expected["pixel_values"])
    kind = "with_experts" if with_experts else "without_experts"
    for row, obj_id in enumerate((1, 2, 3)):
        difference = (logits[row] - expected[f"{kind}.obj{obj_id}.low_res_logits"]).abs()
        assert difference.flatten(1).mean(dim=1).max() < 1e-4
        if name == "nano":
            assert difference.max() < 1e-4
        outputs = session.output_dict_per_obj[row]
        outputs = outputs["cond_frame_outputs"] | outputs["non_cond_frame_outputs"]
        pointers = torch.cat([outputs[t]["object_pointer"] for t in sorted(outputs)])
        assert (pointers - expected[f"{kind}.obj{obj_id}.object_pointer"]).abs().mean() < 1e-4
        scores = torch.stack([frame.object_score_logits[row, 0] for frame in frames])
        torch.testing.assert_close(scores, expected[f"{kind}.obj{obj_id}.object_score_logits"], atol=1e-3, rtol=1e-4)
    if name == "mini":
        processor = build_processor(reference.model.config)
        masks = processor.post_process_masks([frames[5].pred_masks], [[HEIGHT, WIDTH]], binarize=False)[0]
        assert (masks[:, 0] - expected["with_experts.video_res_logits.frame5"]).abs().mean() < 1e-4


def test_experts_matter_in_the_reference(nano):
    """The test above could not tell experts from none if they did not."""
    expected = nano.load("tracking")
    with_experts, without = (expected[f"{kind}.obj1.low_res_logits"] for kind in ("with_experts", "without_experts"))
    assert (with_experts - without).abs().mean() > 0.01


def test_from_frames_through_the_processor(nano, tmp_path):
    """From JPEG files through the saved processor, as users start; its resize differs from PIL's by rounding."""
    build_processor(nano.model.config).save_pretrained(tmp_path)
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tmp_path)
    files = sorted((nano.folder / "frames").glob("*.jpg"))
    video = np.stack([np.array(Image.open(file).convert("RGB")) for file in files])
    session = processor.init_video_session(video=video)
    for obj_id in (1, 2, 3):
        add_reference_prompts(processor, session, nano.folder, obj_id)
    frames = list(nano.model.propagate_in_video_iterator(session))
    logits = torch.stack([frame.pred_masks[:, 0] for frame in frames], dim=1)
    expected = nano.load("tracking")
    expected = torch.stack([expected[f"with_experts.obj{i}.low_res_logits"] for i in (1, 2, 3)])
    assert (logits - expected).abs().mean() <= 5e-3
    assert ((logits > 0) != (expected > 0)).float().mean() <= 3e-3


def test_memory_attention_equals_the_original(reference):
    expected, attention = reference.load("memory_attention"), reference.model.memory_attention
    inputs = [expected[name] for name in ("curr", "memory", "curr_pos", "memory_pos")]
    with torch.no_grad():
        out = run_memory_attention(attention, *inputs, num_pointer_tokens=8)
    torch.testing.assert_close(out.transpose(0, 1), expected["out"], atol=5e-5, rtol=0)


def test_projections_and_routing_equal_the_original(reference):
    expected = reference.load("memory_attention")
    attention = reference.model.memory_attention.layers[1].cross_attn_image
    with torch.no_grad():
        for name in ("q", "k", "v"):
            projection, x = getattr(attention, f"{name}_proj"), expected[f"layer1.cross_attn.{name}"]
            gates = projection.gates(projection.router(x))
            usage = expected[f"layer1.cross_attn.expert_usage.{name}_proj"]
            torch.testing.assert_close(gates.flatten(0, 1).mean(dim=0), usage, atol=1e-6, rtol=0)
            if name != "v":
                out = expected[f"layer1.cross_attn.{name}_proj.out"]
                torch.testing.assert_close(projection(x), out, atol=1e-5, rtol=0)
            if name == "q":
                weights = expected["layer1.cross_attn.q_proj.expert_weights"]
                torch.testing.assert_close(gates, weights, atol=1e-6, rtol=0)


def train_step(reference, dtype):
    """One training step without dropout: the output, and the model with its gradients."""
    expected = reference.load("train_step")
    model = copy.deepcopy(reference.model).train().to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_p"):
            module.dropout_p = 0.0
    labels = expected["masks"].bool().transpose(0, 1).unsqueeze(0)
    output = model(expected["pixel_values"].unsqueeze(0).to(dtype), labels, prompts="mask")
    output.loss.backward()
    return expected, output, model


PARTS = {"focal": "loss_mask", "dice": "loss_dice", "iou": "loss_iou", "object_score": "loss_class"}


def assert_same_losses(expected, output):
    for ours, theirs in PARTS.items():
        torch.testing.assert_close(output.loss_dict[ours].float(), expected[f"loss.{theirs}"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.loss.detach().float(), expected["loss.core_loss"][0], rtol=1e-5, atol=0)


def test_training_losses_equal_the_original(reference):
    assert_same_losses(*train_step(reference, torch.float32)[:2])


def test_gradients_equal_the_original(reference):
    """In float64: in float32, rounding in another order flips one token's choice of experts."""
    expected, output, model = train_step(reference, torch.float64)
    assert_same_losses(expected, output)
    compared = 0
    for name, module in model.named_modules():
        if not isinstance(module, ExpertLinear):
            continue
        original = f"grad.{name.replace('o_proj', 'out_proj')}"
        pairs = [
            (module.router.weight.grad, expected[f"{original}.gate.gate.weight"]),
            (module.router.bias.grad, expected[f"{original}.gate.gate.bias"]),
        ]
        for e in range(module.num_experts):
            pairs.append((module.lora_A.grad[e], expected[f"{original}.experts.{e}.lora_down.weight"]))
            pairs.append((module.lora_B.grad[e], expected[f"{original}.experts.{e}.lora_up.weight"]))
        for ours, theirs in pairs:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
            compared += 1
    assert compared == sum(key.startswith("grad.") for key in expected)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_loss_on_random_predictions_equals_the_original():
    expected = load_file(FIXTURES / "losses.safetensors")
    loss = SegmentationLoss()
    frames = [
        loss(
            expected["pred_multimask_logits"][t],
            expected["pred_ious"][t],
            expected["object_score_logits"][t],
            expected["target_masks"][t],
        )
        for t in range(2)
    ]
    parts = {name: (frames[0][name] + frames[1][name]) / 3 for name in frames[0]}
    for ours, theirs in PARTS.items():
        torch.testing.assert_close(parts[ours], expected[f"loss.{theirs}"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.total(parts), expected["loss.core_loss"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("candidates", [1, 3])
def test_the_loss_and_its_gradient_are_those_of_all_candidates(candidates):
    """What is kept for the gradient is of the best candidate alone; written the long way, it is of all."""
    generator = torch.Generator().manual_seed(candidates)
    masks = torch.randn(4, candidates, 16, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(4, candidates, generator=generator, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(4, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(4, 64, 64, generator=generator) > 0.6
    targets[1] = False
    loss = SegmentationLoss(focal_weight=3.0, dice_weight=0.5)
    parts = loss(masks, scores, seen, targets, torch.tensor([True, True, False, True]))

    resized = F.interpolate(masks, (64, 64), mode="bilinear", align_corners=False)
    true = targets.double().unsqueeze(1).expand_as(resized)
    focal, dice = sigmoid_focal_loss(resized, true).flatten(-2).mean(dim=-1), dice_loss(resized, true)
    best = (3.0 * focal + 0.5 * dice).argmin(dim=1, keepdim=True)
    counts = torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = {
        "focal": (focal.gather(1, best)[:, 0] * counts).sum(),
        "dice": (dice.gather(1, best)[:, 0] * counts).sum(),
        "iou": ((scores - mask_iou(resized, true)).abs().mean(dim=1) * counts).sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)
    ours, theirs = (torch.autograd.grad(sum(p[n] for n in expected), [masks, scores]) for p in (parts, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
