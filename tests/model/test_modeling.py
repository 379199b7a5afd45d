"""SamoeModel: construction, loading, what is trainable, and the forward pass over clips."""

import copy

import pytest
import torch
from transformers import Sam2VideoConfig, Sam2VideoInferenceSession, Sam2VideoModel

from helpers.reference import ROOT, assert_same_tensors
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.expert_layer import ExpertLinear, expert_modules, is_expert_parameter
from samoe_hf.model.expert_router import load_balancing_loss
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


@pytest.fixture(scope="module")
def small_clip(clip):
    """Two frames and three objects, without padding."""
    return clip[0][1:, :2], clip[1][1:, :, :2]


def test_base_plus_has_the_originals_numbers_of_parameters():
    with torch.device("meta"):
        model = SamoeModel(SamoeConfig(**read_yaml(CONFIGS / "model_base_plus.yaml")))
    assert (model.num_parameters(only_trainable=True), model.num_parameters()) == (660_800, 81_510_978)
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
        ("mask_decoder.transformer.*proj", 28),
        ("vision_encoder.*.attn.qkv", 5),
        (["memory_attention.layers.0.self_attn.q_proj", "qkv"], 6),
    ],
)
def test_experts_go_where_they_are_wanted(nano, patterns, count):
    with torch.device("meta"):
        model = SamoeModel(SamoeConfig(**{**nano.model.config.to_dict(), "expert_modules": patterns}))
    assert len(model.expert_module_names) == count
    assert all(isinstance(model.get_submodule(name), ExpertLinear) for name in model.expert_module_names)


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


def test_a_model_can_get_experts_in_more_layers(nano, model_folder, small_clip):
    more = [*nano.model.expert_module_names, "iou_prediction_head.proj_in", "vision_encoder.backbone.blocks.0.attn.qkv"]
    model = SamoeModel.from_pretrained(model_folder, expert_modules=more)
    assert len(model.expert_module_names) == len(more)
    with torch.no_grad():
        expected, found = (one(*small_clip).pred_masks for one in (nano.model, model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    new = model.vision_encoder.backbone.blocks[0].attn.qkv
    assert new.lora_B.abs().max() == 0 and 0 < new.lora_A.abs().max() <= new.in_features**-0.5
    assert 0 < new.router.weight.abs().max() <= new.in_features**-0.5
    model.train()(*small_clip).loss.backward()
    assert new.lora_B.grad.abs().max() > 0 and new.weight.grad is None


@pytest.mark.parametrize("prompts", ["box", "mixed"])
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
    first = model(pixel_values[:1], labels[:1, :2])
    second = model(pixel_values[1:], labels[1:])
    marked = labels.to(torch.int8).masked_fill(~object_mask[..., None, None, None], -100)
    for padded in (model(pixel_values, labels, object_mask), model(pixel_values, marked)):
        torch.testing.assert_close(padded.loss, (2 * first.loss + 3 * second.loss) / 5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded.pred_masks[0, :2], first.pred_masks[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(padded.pred_masks[1], second.pred_masks[0], atol=1e-4, rtol=0)


def test_a_clip_in_evaluation_equals_a_session(nano, clip):
    """One frame step for both: same masks for the same mask prompts."""
    pixel_values, labels, _ = clip
    output = nano.model(pixel_values[1:], labels[1:])
    processor = build_processor(nano.model.config)
    session = Sam2VideoInferenceSession(video=pixel_values[1], video_height=128, video_width=128, dtype=torch.float32)
    processor.add_inputs_to_inference_session(session, 0, [1, 2, 3], input_masks=list(labels[1, :, 0]))
    tracked = [frame.pred_masks[:, 0] for frame in nano.model.propagate_in_video_iterator(session)]
    torch.testing.assert_close(output.pred_masks[0], torch.stack(tracked, dim=1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_given_prompts_track_with_and_without_labels(nano, clip):
    pixel_values, labels, _ = clip
    points = {"input_points": torch.full((2, 3, 2, 2), 50.0), "input_labels": torch.ones(2, 3, 2, dtype=torch.long)}
    boxes = {"input_boxes": torch.tensor([20.0, 20, 90, 70]).expand(2, 3, 4)}
    by_mask = nano.model(pixel_values, input_masks=labels[..., 0, :, :].float())
    assert by_mask.loss is None and by_mask.loss_dict is None
    by_point, by_box, by_both = (nano.model(pixel_values, **x).pred_masks for x in (points, boxes, points | boxes))
    assert by_point.shape == by_both.shape == (2, 3, 4, 32, 32)
    assert not torch.allclose(by_point, by_box) and not torch.allclose(by_both, by_box)
    for output, expected in (
        (nano.model(pixel_values, labels), by_mask.pred_masks),
        (nano.model(pixel_values, labels, **boxes), by_box),
    ):
        torch.testing.assert_close(output.pred_masks, expected)
        assert output.loss > 0
    with pytest.raises(ValueError, match=r"`prompts` must be one of .*'mixed'.* got 'scribble'"):
        nano.model(*clip, prompts="scribble")


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


def test_clips_give_tuples_on_request_and_unknown_options_are_refused(nano, small_clip):
    with torch.no_grad():
        output, as_tuple = (nano.model(*small_clip, return_dict=as_dict) for as_dict in (True, False))
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.loss)
    with pytest.raises(TypeError, match="`forward` has no argument 'return_dct'"):
        nano.model(*small_clip, return_dct=True)


def test_an_encoder_that_runs_in_pieces_gives_the_same(nano, small_clip, monkeypatch):
    with torch.no_grad():
        whole = nano.model(*small_clip).pred_masks
        monkeypatch.setattr(nano.model.clip_settings, "encoder_batch_size", 1)
        torch.testing.assert_close(nano.model(*small_clip).pred_masks, whole, atol=1e-4, rtol=0)


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


def test_linear_layers_are_drawn_as_in_pytorch_by_the_seed(nano):
    def draw(seed):
        torch.manual_seed(seed)
        return SamoeModel(nano.model.config)

    model, again, other = draw(0), draw(0), draw(1)
    assert_same_tensors(again, model)
    assert not torch.equal(other.no_memory_embedding, model.no_memory_embedding)
    linear = [m for m in model.modules() if type(m) in (torch.nn.Linear, ExpertLinear) and m.in_features >= 64]
    assert len(linear) > 10
    for module in linear:
        assert module.weight.abs().max() <= module.in_features**-0.5
        assert module.weight.std() == pytest.approx((3 * module.in_features) ** -0.5, rel=0.1)
    assert model.no_memory_embedding.std() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize(
    "device_map", [{"": "disk"}, {"memory_attention": "disk", "": "cpu"}, {"vision_encoder": "cpu", "": 0}], ids=str
)
def test_a_device_map_that_offloads_is_refused(model_folder, device_map):
    with pytest.raises(ValueError, match=r"`device_map` .* leaves a part of the model on the disk"):
        SamoeModel.from_pretrained(model_folder, device_map=device_map)
    assert SamoeModel.from_pretrained(model_folder, device_map={"": "cpu"}).device.type == "cpu"


def test_a_model_that_was_loaded_in_inference_mode_is_like_any_other(nano, model_folder):
    with torch.inference_mode():
        model, _ = SamoeModel.from_pretrained(model_folder, output_loading_info=True)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_inference()]
    assert_same_tensors(model, nano.model)


@pytest.mark.parametrize("name, value", [("num_experts_per_tok", 1), ("lora_alpha", 99.0), ("num_experts", 3)])
def test_a_configuration_that_its_experts_do_not_follow_is_not_saved(model, tmp_path, name, value):
    """Loaded again, the model would be another one."""
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=r"`num_experts_per_tok`.*`replace_experts`"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


class WithHead(SamoeModel):
    """A model with a layer of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(4, 2)


def test_what_a_class_of_ones_own_adds_is_saved_and_loaded(model_folder, tmp_path):
    model = WithHead.from_pretrained(model_folder, output_loading_info=True)[0]
    for experts_only in (False, True):
        model.save_pretrained(tmp_path / str(experts_only), experts_only=experts_only)
        assert_same_tensors(WithHead.from_pretrained(tmp_path / str(experts_only)), model)
    with pytest.raises(ValueError, match="unexpected, such as 'head"):
        SamoeModel.from_pretrained(tmp_path / "False")
    model.head = torch.nn.Linear(4, 3)
    model.save_pretrained(tmp_path / "another")
    with pytest.raises(ValueError, match="of another shape, such as 'head"):
        WithHead.from_pretrained(tmp_path / "another")
