"""Memory attention: what is computed in another order is the same."""

import copy

import pytest
import torch

from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.expert_layer import expert_modules


@pytest.fixture
def model_with_effect():
    torch.manual_seed(0)
    model = SamoeModel(SamoeConfig(**read_yaml("model_nano")))
    for _, module in expert_modules(model):
        torch.nn.init.normal_(module.lora_B, std=0.1)
    return model


def rotations(model, num_maps):
    attention = model.memory_attention
    return attention.rotary_emb.of_memories(lambda _: attention.position_ids, (1,) * num_maps, 0, model.device)


def pooled_by_hand(x, side):
    """(tokens, channels) of an 8 x 8 map -> means over squares."""
    rows = x.unflatten(0, (8, 8)).unfold(0, side, side).unfold(1, side, side)
    return rows.mean(dim=(-2, -1)).flatten(0, 1)


@torch.inference_mode()
def test_memories_of_tracked_frames_are_pooled_and_those_of_prompted_frames_are_not(model_with_effect):
    torch.manual_seed(2)
    model, calls = model_with_effect.eval(), {}
    frames = torch.randn(5, 3, 128, 128)

    def track(recent, older):
        model.config.recent_memory_pooling, model.config.older_memory_pooling = recent, older
        calls[recent, older] = []
        watch = model.memory_attention.register_forward_pre_hook(lambda _, args: calls[recent, older].append(args[2:]))
        prompt = torch.zeros(1, 2, 128, 128)
        prompt[:, 0, 20:60, 20:60] = prompt[:, 1, 70:100, 30:90] = 1
        masks = model(frames[None], input_masks=prompt).pred_masks
        watch.remove()
        return masks

    whole = track(1, 1)
    assert (track(2, 4) - whole).abs().max() > 1e-4
    # Frame 2 is the first that reads more than one map: the first frame's, whole, and the one before.
    for recent, older in ((1, 1), (2, 4)):
        assert len(calls[recent, older]) == 4
    (memory, position, rotation, _), expected = calls[2, 4][1], calls[1, 1][1]
    assert memory.shape[1] == 64 + 16 + 2 * 2
    for found, all_tokens in zip((memory[0], position[0]), (expected[0][0], expected[1][0]), strict=True):
        torch.testing.assert_close(found[:64], all_tokens[:64])
        torch.testing.assert_close(found[64:80], pooled_by_hand(all_tokens[64:128], 2), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(found[80:], all_tokens[128:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rotation[:64], expected[2][:64])
    assert torch.equal(rotation[80:], expected[2][128:])
    # Squares of 2: the first token lies between the first four, by half a token each way.
    angle = torch.atan2(*reversed(expected[2][:64].unbind(-1)))
    found = torch.atan2(*reversed(rotation[64:80].unbind(-1)))
    torch.testing.assert_close(found[0], (angle[1] + angle[8]) / 2, atol=1e-5, rtol=1e-5)
    # Frame 4: the first frame's map, two of 2 x 2, and the last one of 4 x 4.
    assert calls[2, 4][3][0].shape[1] == 64 + 4 + 4 + 16 + 4 * 2
    with pytest.raises(ValueError, match=r"`older_memory_pooling` must divide .*, got 3"):
        track(1, 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("older_memory_pooling", 3, r"must divide the sides of a memory's map, \[8, 8\]"),
        ("recent_memory_pooling", 0, "must be an integer of at least 1, got 0"),
    ],
)
def test_what_does_not_divide_a_map_is_refused(name, value, message):
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        SamoeConfig(**read_yaml("model_nano"), **{name: value})


@pytest.mark.parametrize(
    ("dropped", "num_videos"), [(None, 1), (None, 2), ("self_attn.q_proj", 1), ("cross_attn_image.q_proj", 2)]
)
def test_in_training_objects_share_what_is_the_same_without_dropout(model_with_effect, dropped, num_videos):
    model, rows = model_with_effect.train(), {}
    for module in model.memory_attention.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    first = model.memory_attention.layers[0]
    if dropped:
        first.get_submodule(dropped).dropout.p = 0.5
    for name in ("self_attn.q_proj", "cross_attn_image.q_proj", "cross_attn_image.o_proj"):
        hook = lambda _, inputs, __, name=name: rows.update({name: len(inputs[0])})  # noqa: E731
        first.get_submodule(name).register_forward_hook(hook)
    image = torch.randn(num_videos, 64, model.hidden_dim)
    memory = torch.randn(3 * num_videos, 64, model.mem_dim, requires_grad=True)
    shared = (image[:1], memory[:1].detach(), rotations(model, 1))

    def attend(image, memory):
        return model.memory_attention(image, shared[0], memory, *shared[1:])

    attended = attend(image, memory)
    expected = 3 * num_videos if dropped else num_videos
    assert list(rows.values()) == [expected, expected, 3 * num_videos]
    assert attended.shape == (3 * num_videos, 64, model.hidden_dim)
    if not dropped:
        alone = [attend(image[i // 3 : i // 3 + 1], memory[i : i + 1]) for i in range(3 * num_videos)]
        torch.testing.assert_close(attended, torch.cat(alone), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_what_an_object_does_not_read_changes_nothing(model_with_effect):
    attention, calls = model_with_effect.eval().memory_attention, []
    watch = attention.register_forward_pre_hook(lambda _, args: calls.append(args))
    prompt = torch.zeros(1, 1, 128, 128)
    prompt[..., 20:60, 20:60] = 1
    model_with_effect(torch.randn(1, 3, 3, 128, 128), input_masks=prompt)
    watch.remove()
    image, position, memory, places, rotation, _ = calls[-1]
    is_read = torch.ones(memory.shape[:2], dtype=torch.bool)
    is_read[:, -40:] = False
    shorter = (memory[:, :-40], places[:, :-40], rotation[:-40])
    masked, without = (attention(image, position, memory, places, rotation, x) for x in (is_read, None))
    torch.testing.assert_close(masked, attention(image, position, *shorter), atol=1e-5, rtol=1e-4)
    assert (masked - without).abs().mean() > 1e-4


@torch.no_grad()
def test_a_program_of_it_takes_any_number_of_objects(model_with_effect):
    torch.manual_seed(0)
    attention, rotation = model_with_effect.eval().memory_attention, rotations(model_with_effect, 1)
    image, position = torch.randn(1, 64, 128), torch.randn(1, 64, 128)

    def inputs(count):
        return image, position, torch.randn(count, 64, 64), torch.randn(1, 64, 64), rotation

    objects = {0: torch.export.Dim.DYNAMIC}
    varying = (None, None, objects, None, None)
    program = torch.export.export(attention, inputs(2), dynamic_shapes=varying).module()
    for count in (1, 3):
        given = inputs(count)
        torch.testing.assert_close(program(*given), attention(*given), atol=1e-5, rtol=1e-4)


def test_rotations_are_the_same_whenever_a_model_is_cast(model_with_effect):
    rotary, places = model_with_effect.memory_attention.rotary_emb, model_with_effect.memory_attention.position_ids
    before = copy.deepcopy(rotary).of_map(places)
    model_with_effect.bfloat16()
    assert model_with_effect.dtype == torch.bfloat16 and torch.equal(rotary.of_map(places), before)


def test_neither_other_threads_nor_the_default_type_of_numbers_change_rotations(model_with_effect):
    rotary, places = model_with_effect.memory_attention.rotary_emb, model_with_effect.memory_attention.position_ids

    def of_memories(*pooling):
        return rotary.of_memories(lambda _: places, pooling, 4, model_with_effect.device)

    class Side(int):
        """Between the look at what is kept and the answer, another thread has its turn with another video."""

        __hash__ = int.__hash__

        def __eq__(self, other):
            of_memories(1, 1, 1)
            return int(self) == other

    expected = of_memories(1)
    assert torch.equal(of_memories(Side(1)), expected)
    try:
        torch.set_default_dtype(torch.float64)
        assert of_memories(1, 1).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
