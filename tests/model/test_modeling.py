"""SamoeModel: construction, loading, what is trainable, and the forward pass over clips."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Sam2VideoConfig, Sam2VideoModel

from helpers.reference import ROOT, load_reference, track_reference
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.expert_layer import ExpertLinear, is_expert_parameter
from samoe_hf.model.expert_router import load_balancing_loss, record_router_logits
from samoe_hf.model.processing_samoe import build_processor

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def clip(nano):
    """Pixel values (2, 4, 3, 128, 128), labels (2, 3, 4, 128, 128) and a mask of objects, one of them padding."""
    frames = nano.load("train_step")
    labels = frames["masks"].bool().transpose(0, 1)
    labels = torch.stack([labels[[0, 1, 0]], labels[[1, 0, 1]]])
    object_mask = torch.tensor([[True, True, False], [True, True, True]])
    labels[0, 2] = False
    return frames["pixel_values"].repeat(2, 1, 1, 1, 1), labels, object_mask


@pytest.fixture
def model(nano):
    """A copy of the reference model, free to be changed."""
    return copy.deepcopy(nano.model)


@pytest.fixture
def folder(nano, tmp_path):
    nano.model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_base_plus_has_the_originals_numbers_of_parameters(capsys):
    with torch.device("meta"):
        model = SamoeModel(SamoeConfig(**read_yaml(CONFIGS / "model_base_plus.yaml")))
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert printed.startswith("trainable params: 660,800 || all params: 81,510,978 || trainable%: 0.8107")
    assert len(model.expert_module_names) == 32


def test_base_tensors_keep_their_names(nano):
    names = {name for name in nano.model.state_dict() if not is_expert_parameter(name)}
    with torch.device("meta"):
        base = Sam2VideoModel(Sam2VideoConfig(**nano.model.config.to_dict()))
    assert names == set(base.state_dict())


@pytest.mark.parametrize(
    "patterns, count",
    [
        (["q_proj"], 4 + 7 + 0),
        (r"mask_decoder\.transformer\..*proj", 28),
        (r"vision_encoder\..*\.attn\.qkv", 5),
        (["memory_attention.layers.0.self_attn.q_proj", "qkv"], 6),
    ],
)
def test_experts_go_where_they_are_wanted(nano, patterns, count):
    model = SamoeModel(SamoeConfig(**{**nano.model.config.to_dict(), "expert_modules": patterns}))
    assert len(model.expert_module_names) == count
    assert all(isinstance(model.get_submodule(name), ExpertLinear) for name in model.expert_module_names)


def test_experts_of_the_vision_encoder_learn_from_clips(nano, clip):
    config = SamoeConfig(**{**nano.model.config.to_dict(), "expert_modules": r"vision_encoder\..*\.attn\.proj"})
    model = SamoeModel(config).train()
    pixel_values, labels, object_mask = clip
    model(pixel_values, labels, object_mask).loss.backward()
    module = model.get_submodule(model.expert_module_names[0])
    assert module.lora_B.grad.abs().max() > 0 and module.weight.grad is None


def test_patterns_without_a_match_are_refused(nano):
    with pytest.raises(ValueError, match="`expert_modules` matches no linear layer with 'no_such_layer'"):
        SamoeModel(SamoeConfig(**{**nano.model.config.to_dict(), "expert_modules": ["no_such_layer"]}))


def test_settings_changed_after_construction_are_checked(nano):
    config = SamoeConfig(**nano.model.config.to_dict())
    config.num_experts_per_tok = 99
    with pytest.raises(ValueError, match="`num_experts_per_tok`"):
        SamoeModel(config)


def test_saved_and_loaded_it_tracks_the_same_to_the_bit(nano, folder):
    pixel_values = nano.load("tracking")["pixel_values"]
    expected, _, _ = track_reference(nano.model, nano.folder, pixel_values)
    for load in (SamoeModel.from_pretrained, AutoModel.from_pretrained):
        logits, _, _ = track_reference(load(folder), nano.folder, pixel_values)
        torch.testing.assert_close(logits, expected, atol=0, rtol=0)


def test_loaded_models_train_only_experts(folder):
    model = SamoeModel.from_pretrained(folder)
    assert not model.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if is_expert_parameter(n)
    }


def test_trainable_sets(model):
    def trainable():
        return {n for n, p in model.named_parameters() if p.requires_grad}

    experts = trainable()
    model.set_trainable("memory")
    assert {"memory_attention.layers.0.linear1.weight", "no_object_pointer"} <= trainable()
    assert not any(n.startswith(("vision_encoder", "mask_decoder", "prompt_encoder")) for n in trainable())
    model.set_trainable("decoder")
    assert trainable() and all(n.startswith("mask_decoder.") for n in trainable())
    model.set_trainable("experts", "decoder")
    assert experts < trainable() and "mask_decoder.iou_token.weight" in trainable()
    model.set_trainable("all")
    assert len(trainable()) == len(list(model.parameters()))
    model.set_trainable("experts")
    assert trainable() == experts
    with pytest.raises(ValueError, match="'encoder'"):
        model.set_trainable("encoder")


@pytest.mark.parametrize("change", ["missing", "unexpected", "missing.*lora_B"])
def test_folders_that_do_not_fit_are_refused(folder, tmp_path, change):
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    if change == "unexpected":
        tensors["memory_attention.extra"] = torch.zeros(1)
    else:
        removed = "layer_norm.weight" if change == "missing" else "lora_B"
        del tensors[next(name for name in tensors if name.endswith(removed))]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=change):
        SamoeModel.from_pretrained(broken)


def test_a_model_can_get_experts_in_more_layers(nano, folder):
    more = [
        *nano.model.expert_module_names,
        "mask_decoder.iou_prediction_head.proj_in",
        "vision_encoder.backbone.blocks.0.attn.qkv",
    ]
    model = SamoeModel.from_pretrained(folder, expert_modules=more)
    pixel_values = nano.load("tracking")["pixel_values"]
    expected, _, _ = track_reference(nano.model, nano.folder, pixel_values)
    logits, _, _ = track_reference(model, nano.folder, pixel_values)
    assert len(model.expert_module_names) == len(more)
    new = model.vision_encoder.backbone.blocks[0].attn.qkv
    assert new.lora_B.abs().max() == 0 and 0 < new.lora_A.abs().max() <= new.in_features**-0.5
    assert 0 < new.router.weight.abs().max() <= new.in_features**-0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        SamoeModel.from_pretrained("nowhere.pt")


def test_experts_need_an_original_checkpoint(folder, nano):
    with pytest.raises(ValueError, match="`experts` and `original_config`"):
        SamoeModel.from_pretrained(folder, experts=nano.experts)


def test_settings_can_be_given_when_experts_are_new():
    reference = load_reference("nano", with_experts=False)
    model = SamoeModel.from_pretrained(
        reference.checkpoint,
        original_config=reference.original_config,
        num_experts=3,
        num_experts_per_tok=1,
        lora_rank=2,
    )
    module = model.get_submodule(model.expert_module_names[0])
    assert module.lora_A.shape[:2] == (3, 2) and module.num_experts_per_tok == 1
    assert module.lora_B.abs().max() == 0 and module.lora_A.abs().max() > 0


@pytest.mark.parametrize("prompts", ["mask", "point", "box", "mixed"])
def test_a_clip_gives_losses_and_masks(model, clip, prompts):
    pixel_values, labels, object_mask = clip
    output = model.train()(pixel_values, labels, object_mask, prompts=prompts)
    assert output.pred_masks.shape == (2, 3, 4, 32, 32)
    assert output.iou_scores.shape == output.object_score_logits.shape == (2, 3, 4)
    assert set(output.loss_dict) == {"focal", "dice", "iou", "object_score", "router"}
    parts = output.loss_dict
    total = 20 * parts["focal"] + parts["dice"] + parts["iou"] + parts["object_score"]
    torch.testing.assert_close(output.loss.detach(), total)
    assert output.router_logits is None
    output.loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_padded_objects_do_not_count(model, clip):
    pixel_values, labels, object_mask = clip
    model.set_trainable("experts")
    padded = model(pixel_values, labels, object_mask)
    first = model(pixel_values[:1], labels[:1, :2])
    second = model(pixel_values[1:], labels[1:])
    torch.testing.assert_close(padded.loss, (2 * first.loss + 3 * second.loss) / 5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.pred_masks[0, :2], first.pred_masks[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(padded.pred_masks[1], second.pred_masks[0], atol=1e-4, rtol=0)


def test_image_features_are_computed_once_for_all_objects(model, clip, monkeypatch):
    calls = []
    encode = model.vision_encoder.forward
    monkeypatch.setattr(model.vision_encoder, "forward", lambda x, **k: calls.append(len(x)) or encode(x, **k))
    model(*clip)
    assert sum(calls) == 2 * 4


def test_a_clip_in_evaluation_equals_a_session(nano, clip):
    """One frame step for both: same masks for the same mask prompts."""
    pixel_values, labels, _ = clip
    output = nano.model(pixel_values[1:], labels[1:])
    processor = build_processor(nano.model.config)
    from transformers import Sam2VideoInferenceSession

    session = Sam2VideoInferenceSession(video=pixel_values[1], video_height=128, video_width=128, dtype=torch.float32)
    processor.add_inputs_to_inference_session(session, 0, [1, 2, 3], input_masks=list(labels[1, :, 0]))
    tracked = [frame.pred_masks[:, 0] for frame in nano.model.propagate_in_video_iterator(session)]
    torch.testing.assert_close(output.pred_masks[0], torch.stack(tracked, dim=1), atol=1e-4, rtol=0)


def test_given_prompts_track_without_labels(nano, clip):
    pixel_values, labels, _ = clip
    masks = labels[..., 0, :, :].float()
    by_mask = nano.model(pixel_values, input_masks=masks)
    torch.testing.assert_close(by_mask.pred_masks, nano.model(pixel_values, labels).pred_masks)
    assert by_mask.loss is None and by_mask.loss_dict is None
    points = torch.full((2, 3, 2, 2), 50.0)
    by_point = nano.model(pixel_values, input_points=points, input_labels=torch.ones(2, 3, 2, dtype=torch.long))
    boxes = torch.tensor([20.0, 20, 90, 70]).expand(2, 3, 4)
    by_box = nano.model(pixel_values, input_boxes=boxes)
    both = nano.model(
        pixel_values, input_points=points, input_labels=torch.ones(2, 3, 2, dtype=torch.long), input_boxes=boxes
    )
    assert by_point.pred_masks.shape == by_box.pred_masks.shape == both.pred_masks.shape == (2, 3, 4, 32, 32)
    assert not torch.allclose(by_point.pred_masks, by_box.pred_masks)
    assert not torch.allclose(both.pred_masks, by_box.pred_masks)


def test_given_prompts_may_come_with_labels(nano, clip):
    pixel_values, labels, _ = clip
    boxes = torch.tensor([20.0, 20, 90, 70]).expand(2, 3, 4)
    output = nano.model(pixel_values, labels, input_boxes=boxes)
    torch.testing.assert_close(output.pred_masks, nano.model(pixel_values, input_boxes=boxes).pred_masks)
    assert output.loss > 0


def test_router_loss_is_part_of_the_loss(model, clip):
    pixel_values, labels, _ = clip
    plain = model(pixel_values, labels)
    assert plain.loss_dict["router"] == 0
    model.config.router_aux_loss_coef = 0.5
    balanced = model(pixel_values, labels, output_router_logits=True)
    alone = [model(pixel_values[i : i + 1], labels[i : i + 1], output_router_logits=True) for i in range(2)]
    losses = [load_balancing_loss(output.router_logits, model.config.num_experts_per_tok) for output in alone]
    expected = torch.stack(losses).mean()
    assert balanced.loss_dict["router"] >= 2 * 0.9
    torch.testing.assert_close(balanced.loss_dict["router"], expected.detach())
    torch.testing.assert_close(balanced.loss, plain.loss + 0.5 * expected)
    assert list(balanced.router_logits) == model.expert_module_names
    assert {x.shape[-1] for x in balanced.router_logits.values()} == {model.config.num_experts}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, y, m: (p[0], y, m), "`pixel_values`"),
        (lambda p, y, m: (p[..., :64], y, m), "`pixel_values`"),
        (lambda p, y, m: (None, y, m), "`pixel_values`.*NoneType"),
        (lambda p, y, m: (p, y.float(), m), "`labels` must be bool"),
        (lambda p, y, m: (p, y[:, :, :3], m), "`labels`"),
        (lambda p, y, m: (p, y[:, :0], m), "`labels`"),
        (lambda p, y, m: (p, y, m[:1]), "`object_mask`"),
        (lambda p, y, m: (p, None, None), "`input_points`, `input_boxes` or `input_masks`"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(nano, clip, change, message):
    with pytest.raises(ValueError, match=message):
        nano.model(*change(*clip))


def test_unknown_prompts_are_refused(nano, clip):
    with pytest.raises(ValueError, match=r"`prompts` must be one of .*'mixed'.* got 'scribble'"):
        nano.model(*clip, prompts="scribble")


def test_learning_on_one_clip_lowers_the_loss(model, clip):
    pixel_values, labels, object_mask = clip
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(8):
        output = model(pixel_values, labels, object_mask)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


@pytest.mark.slow
def test_routers_are_recorded_in_a_compiled_model_that_recomputes(nano, clip):
    """The recomputation must run what ran before: uncompiled, as hooks need it."""
    gradients = []
    for compiled in (False, True):
        model = copy.deepcopy(nano.model).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            model.memory_attention.compile(backend="eager")
            model(*clip)
        torch.manual_seed(0)
        with record_router_logits(model) as calls:
            loss = model(*clip).loss
        assert set(calls) == set(model.expert_module_names) and all(calls.values())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
