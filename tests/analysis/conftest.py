"""Fixtures of the analysis' tests."""

import numpy as np
import pytest
import torch

from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data import SyntheticVideos, Video


@pytest.fixture(scope="package")
def entering() -> Video:
    """Three objects with ids that skip; the one in the middle enters on frame 2, the last on frame 1."""
    video = next(v for v in SyntheticVideos(40, 5, (96, 128), seed=1) if len(v.object_ids) == 3)
    masks = np.stack([video.masks(t) for t in range(5)])
    masks[:2, 1] = False
    masks[:1, 2] = False
    frames = np.stack(list(video.frames))
    return Video.from_arrays("entering", frames, masks, [2, 5, 9], domain="shapes")


@pytest.fixture(scope="package")
def everywhere(nano) -> SamoeModel:
    """Experts in the vision encoder, the memory encoder, the mask decoder and the pointers' projection."""
    torch.manual_seed(0)
    modules = ["vision_encoder.backbone.blocks.*.attn.qkv", "vision_encoder.backbone.blocks.*.mlp.proj_in"]
    modules += ["memory_encoder.*pointwise_conv1", "mask_decoder.transformer.layers.0.*q_proj"]
    modules += ["object_pointer_proj.proj_in"]
    config = SamoeConfig.from_dict({**nano.model.config.to_dict(), "expert_modules": modules})
    return SamoeModel(config).eval()
