"""Modules without work that nobody reads give what transformers' own give."""

import pytest
import torch
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMaskDecoder

from peers import base_of
from samoe_hf.model.base_modules import MaskDecoder


@pytest.fixture(scope="module")
def base(nano) -> Sam2VideoModel:
    return base_of(nano.model)


def test_tensors_and_their_names_stay(nano, base):
    assert set(base.state_dict()) <= set(nano.model.state_dict())


def test_the_encoder_gives_the_same_features(nano, base):
    frames = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = (model.get_image_features(frames, return_dict=True) for model in (nano.model, base))
    for a, b in zip(ours.fpn_hidden_states, theirs.fpn_hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.fpn_position_encoding[-1][:, :1], theirs.fpn_position_encoding[-1][:, :1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("num_objects", [1, 3])
def test_the_decoder_gives_the_same_masks(nano, num_objects, multimask, training):
    decoder = nano.model.mask_decoder
    assert type(decoder) is MaskDecoder
    generator = torch.Generator().manual_seed(1)
    hidden, (height, width) = decoder.hidden_size, nano.model.backbone_feature_sizes[-1]
    coarse, dense, positions = (
        torch.randn(rows, hidden, height, width, generator=generator) for rows in (num_objects, 1, 1)
    )
    fine = torch.randn(1, hidden // 8, 4 * height, 4 * width, generator=generator)
    middle = torch.randn(1, hidden // 4, 2 * height, 2 * width, generator=generator)
    sparse = torch.randn(num_objects, 1, 2, hidden, generator=generator)
    inputs = {
        "image_positional_embeddings": positions,
        "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense,
        "multimask_output": multimask,
        "high_resolution_features": [fine, middle],
    }
    decoder.train(training)
    try:
        with torch.inference_mode():
            ours = decoder(image_embeddings=coarse, **inputs)
            theirs = Sam2VideoMaskDecoder.forward(decoder, image_embeddings=coarse, **inputs)
            one_row = decoder(image_embeddings=coarse[:1], **inputs)
            expected = decoder(image_embeddings=coarse[:1].expand(num_objects, -1, -1, -1), **inputs)
    finally:
        decoder.eval()
    for a, b in [*zip(ours, theirs, strict=True), *zip(one_row, expected, strict=True)]:
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_constants_are_computed_once_for_each_type(nano, monkeypatch):
    model, calls = nano.model, []
    for owner, name in (
        (model.memory_encoder.position_encoding, "encoding"),
        (model.memory_attention.rotary_emb, "embedding"),
    ):
        owner._known.clear()
        module = getattr(owner, name)
        compute = module.forward
        monkeypatch.setattr(
            module, "forward", lambda *a, compute=compute, name=name: (calls.append(name), compute(*a))[1]
        )
    for dtype in (torch.float32, torch.float32, torch.float64):
        encoded = model.memory_encoder.position_encoding((3, 64, 8, 8), "cpu", dtype)
        assert encoded.shape == (3, 64, 8, 8) and encoded.dtype == dtype
    rotary, positions = model.memory_attention.rotary_emb, model.memory_attention.position_ids
    with torch.inference_mode():
        one, many = rotary.rotations(positions), rotary.rotations(positions, pooling=(1, 1, 1), num_pointer_tokens=4)
    assert rotary.rotations(positions, pooling=(1, 1, 1), num_pointer_tokens=4) is many and not many.is_inference()
    assert rotary.rotations(positions) is one
    more = rotary.rotations(positions, pooling=(1, 1, 1), num_pointer_tokens=6)
    torch.testing.assert_close(many, torch.cat([one, one, one, torch.tensor([1.0, 0.0]).expand(4, *one.shape[1:])]))
    torch.testing.assert_close(more[:-2], many)
    assert calls == ["encoding", "encoding", "embedding", "embedding", "embedding"]
