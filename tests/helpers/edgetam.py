"""EdgeTAM at a size that runs within seconds, and transformers' model with the same weights."""

import pytest
import torch
from torch import nn
from transformers import EdgeTamVideoModel
from transformers.utils import is_timm_available

from helpers.interaction import draw_weights
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.data.registry import read_yaml
from samoe_hf.model.base import config_of_base

needs_timm = pytest.mark.skipif(not is_timm_available(), reason="EdgeTAM's encoder needs timm")
SAM2 = pytest.param(None, id="sam2")  # None is the fixture as other tests have it, which is not made again
over_bases = pytest.mark.parametrize("nano", [SAM2, pytest.param("edgetam", marks=needs_timm)], indirect=True)
"""Runs a test whose fixtures are made of `nano` with SAM 2's small model and with EdgeTAM's."""
slow_over_bases = pytest.mark.parametrize(
    "nano", [SAM2, pytest.param("edgetam", marks=[needs_timm, pytest.mark.slow])], indirect=True
)
"""With EdgeTAM's among the slow tests, where faster ones would find what differs between bases."""


def edgetam_model(seed: int = 0, with_experts: bool = False, **settings) -> SamoeModel:
    """The nano model, with weights and statistics with which all parts show in the masks."""
    torch.manual_seed(seed)
    parts = dict.fromkeys(
        ("enable_temporal_pos_encoding_for_object_pointers", "enable_occlusion_spatial_embedding"), True
    )  # which the published one has not
    settings = {"previous_mask_with_clicks": False, **parts, **settings}
    model = SamoeModel(SamoeConfig(**{**read_yaml("model_edgetam_nano"), **settings})).eval()
    with torch.no_grad():
        draw_weights(model, with_experts)
        # With statistics of frames, features are about 1: if they were large, masks would be lost in memories.
        norms = [x for x in model.vision_encoder.modules() if isinstance(x, nn.BatchNorm2d)]
        hooks = [x.register_forward_pre_hook(_draw_statistics) for x in norms]
        model.vision_encoder(torch.randn(2, 3, *[model.config.image_size] * 2))
        for hook in hooks:
            hook.remove()
    return model


def _draw_statistics(norm: nn.BatchNorm2d, args: tuple) -> None:
    """Near those of what the norm is given."""
    variance, mean = torch.var_mean(args[0], (0, 2, 3))
    norm.running_mean.copy_(mean + 0.1 * torch.randn_like(mean))
    norm.running_var.copy_((variance + 0.01) * torch.rand_like(variance).add(0.5))


def edgetam_peer(model: SamoeModel, kind: type = EdgeTamVideoModel) -> EdgeTamVideoModel:
    """transformers' model with the weights of the base of `model`."""
    peer, tensors = kind(config_of_base(model.config)).eval(), model.state_dict()
    peer.load_state_dict({name: tensors[name] for name in peer.state_dict()})
    return peer.to(model.dtype)
