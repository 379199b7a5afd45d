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
        for module in model.vision_encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.2, 0.5)
    return model


def edgetam_peer(model: SamoeModel, kind: type = EdgeTamVideoModel) -> EdgeTamVideoModel:
    """transformers' model with the weights of the base of `model`."""
    peer, tensors = kind(config_of_base(model.config)).eval(), model.state_dict()
    peer.load_state_dict({name: tensors[name] for name in peer.state_dict()})
    return peer.to(model.dtype)
