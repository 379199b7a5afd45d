"""Clips: gradient checkpointing, labels of padded objects, and the loss of micro-batches."""

import numpy as np
import pytest
import torch
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from samoe_hf import SamoeModel
from samoe_hf.model.clip import router_logits_by_clip
from samoe_hf.model.expert_layer import expert_modules
from samoe_hf.model.expert_router import record_router_logits
from samoe_hf.model.prompt_recipe import PromptRecipe


@pytest.fixture
def model(model_folder) -> SamoeModel:
    return SamoeModel.from_pretrained(model_folder).train()


def make_batch(
    num_videos: int = 1, num_objects: int = 2, num_frames: int = 3, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(num_videos, num_objects, num_frames, 128, 128, dtype=torch.bool)
    for video in range(num_videos):
        for index in range(num_objects):
            y, x, side = torch.randint(8, 60, (3,), generator=generator).tolist()
            labels[video, index, :, y : y + side, x : x + side] = True
    return {"pixel_values": torch.randn(num_videos, num_frames, 3, 128, 128, generator=generator), "labels": labels}


def gradients(model: SamoeModel, batch: dict, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(**batch, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys() and a
    for name, gradient in a.items():
        assert (b[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, name


CLICKS = PromptRecipe(point_probability=1, max_initial_frames=1, max_corrected_frames=2, num_correction_clicks=2)


@pytest.mark.parametrize(("prompt", "num_maskmem"), [("input_masks", 7), ("input_boxes", 0)])
def test_videos_in_one_batch_give_what_each_gives_alone(model, num_maskmem, prompt):
    model.eval()
    model.num_maskmem = num_maskmem  # with 0, nothing is read of other frames
    batch = make_batch(num_videos=2, num_objects=3)
    corners = torch.tensor([[10.0, 20, 60, 70], [40, 30, 90, 80], [70, 70, 110, 120]])
    prompts = {"input_masks": batch["labels"][:, :, 0], "input_boxes": torch.stack([corners, corners.flip(0)])}
    inputs = {"pixel_values": batch["pixel_values"], prompt: prompts[prompt]}
    with torch.no_grad():
        together = model(**inputs).pred_masks
        alone = [model(**{name: x[i : i + 1] for name, x in inputs.items()}).pred_masks for i in range(2)]
    assert (together - torch.cat(alone)).abs().mean() < 1e-3
    assert (together - torch.cat(alone[::-1])).abs().mean() > 0.1


@pytest.mark.parametrize(("options", "lora_dropout"), [({}, 0.1), ({"every_n_layers": 2}, 0.0)])
def test_checkpointing_draws_the_same_dropout_and_clicks(model, options, lora_dropout):
    """Also where the routers are watched for their loss, and are not any more in the backward pass."""
    model.set_trainable("memory", "decoder")
    model.config.router_aux_loss_coef = 0.1
    for _, mixture in expert_modules(model):
        mixture.dropout.p = lora_dropout
    batch = make_batch()
    expected = gradients(model, batch, prompts=CLICKS)
    model.gradient_checkpointing_enable(**options)
    assert_equal_gradients(expected, gradients(model, batch, prompts=CLICKS), 1e-5)
    model.gradient_checkpointing_disable()
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert len(layers) > 3 and not any(layer.gradient_checkpointing for layer in layers)
    with pytest.raises(ValueError, match="`use_reentrant` must be False"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_what_is_checkpointed_gets_tensors_whose_devices_keep_their_random_state(model, monkeypatch):
    """`torch.utils.checkpoint` keeps the random state of those devices alone that its arguments are on."""
    calls = []

    def record(function, *args, **kwargs):
        calls.append([x for x in _pytree.tree_leaves(args) if isinstance(x, torch.Tensor)])
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", record)
    model.set_trainable("all")
    model.gradient_checkpointing_enable()
    gradients(model, make_batch(), prompts=CLICKS)
    # 3 frames, and the blocks of the image encoder.
    assert len(calls) >= 3 + 5 and all(calls)


def test_the_loss_is_averaged_over_the_number_of_items_that_is_given(model):
    model.eval()
    batch = make_batch(num_objects=2)
    expected = model(**batch)
    items = torch.tensor(3 * batch["labels"].numel())
    shared = model(**batch, num_items_in_batch=items)
    torch.testing.assert_close(3 * shared.loss, expected.loss)
    for name, part in expected.loss_dict.items():
        torch.testing.assert_close(3 * shared.loss_dict[name], part)


def test_router_logits_of_a_clip_are_those_of_its_real_objects(model_folder):
    """Which other clips share the batch, and how many objects are padded, makes no difference to the router loss."""
    modules = ["q_proj", "o_proj", "qkv", "mask_decoder.iou_prediction_head.proj_in"]
    model = SamoeModel.from_pretrained(model_folder, expert_modules=modules, ignore_mismatched_sizes=True).eval()
    model.config.router_aux_loss_coef = 0.5
    batch = make_batch(num_videos=3, num_objects=3)
    object_mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    with record_router_logits(model) as calls:
        together = model(**batch, object_mask=object_mask)
    found = router_logits_by_clip(calls, object_mask)
    parts = []
    for clip, count in ((0, 1), (1, 3)):
        with record_router_logits(model) as calls:
            alone = model(batch["pixel_values"][clip : clip + 1], batch["labels"][clip : clip + 1, :count])
        parts.append(count * alone.loss_dict["router"])
        (expected,) = router_logits_by_clip(calls, torch.ones(1, count, dtype=torch.bool))
        assert expected.keys() == found[clip].keys() and len(expected) > 8
        for name, logits in expected.items():
            # One row may stand for all objects of a single video.
            torch.testing.assert_close(found[clip][name].mean(dim=0), logits.mean(dim=0), rtol=1e-3, atol=1e-4)
    assert found[2] == {}
    torch.testing.assert_close(together.loss_dict["router"], sum(parts) / 4, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": np.zeros((1, 2, 3, 128, 128), np.float32)}, "`pixel_values` must be a torch.Tensor.*ndarray"),
        ({"pixel_values": torch.zeros(1, 2, 3, 128, 128, dtype=torch.uint8)}, "normalized frames.*got torch.uint8"),
        (
            {"input_boxes": np.zeros((1, 1, 4))},
            r"`input_boxes` must be a torch.Tensor of shape \(1, \*, 4\), got ndarray",
        ),
        ({"input_boxes": torch.tensor([[10.0, 10, 60, 60]])}, "`input_boxes` must be of shape"),
        ({"input_boxes": torch.tensor([[[10.0, 10, 10, 60]]])}, "must have an area"),
        ({"input_points": torch.ones(1, 1, 2, 2), "input_labels": torch.ones(1, 1, 1)}, "each of the 2 points.*got 1"),
        (
            {"input_points": torch.ones(1, 1, 2, 3), "input_labels": torch.ones(1, 1, 2)},
            "`input_points` must be of shape",
        ),
        ({"input_points": torch.ones(1, 1, 1, 2), "input_labels": torch.full((1, 1, 1), 5)}, "got 5"),
        ({"input_masks": torch.full((1, 1, 128, 128), 0.9)}, "`input_masks` must be bool, or of 0 and 1"),
        ({"input_masks": torch.full((1, 1, 128, 128), torch.nan)}, "got NaN or infinity"),
        (
            {"input_boxes": torch.tensor([[[1.0, 1, 6, 6]] * 2]), "labels": torch.zeros(1, 1, 2, 128, 128).bool()},
            "`labels` are of 1 objects, but the prompts of 2",
        ),
    ],
)
def test_a_clip_that_cannot_be_read_gets_a_sentence(nano, changes, message):
    with pytest.raises(ValueError, match=message):
        nano.model(**{"pixel_values": torch.zeros(1, 2, 3, 128, 128), **changes})


def test_the_corners_of_a_box_come_in_any_order(nano):
    pixel_values = nano.load("train_step")["pixel_values"][None, :1]
    boxes = torch.tensor([[[10.0, 20, 60, 90]], [[60.0, 90, 10, 20]], [[60.0, 20, 10, 90]]])
    with torch.no_grad():
        masks = [nano.model(pixel_values, input_boxes=box[None]).pred_masks for box in boxes]
    assert all(torch.equal(one, masks[0]) for one in masks)
