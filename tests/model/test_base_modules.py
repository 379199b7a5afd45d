"""Modules without work that nobody reads give what transformers' own give."""

import pytest
import torch
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMaskDecoder

from samoe_hf.model.base_modules import MaskDecoder


@pytest.mark.parametrize(
    ("num_objects", "multimask", "training"), [(1, False, False), (3, True, False), (3, False, True)]
)
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
        "image_positional_embeddings": positions, "sparse_prompt_embeddings": sparse,
        "dense_prompt_embeddings": dense, "multimask_output": multimask, "high_resolution_features": [fine, middle],
    }  # fmt: skip
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
