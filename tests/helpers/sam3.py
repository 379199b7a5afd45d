"""SAM 3's tracker at a size that runs within seconds, and transformers' model with the same weights."""

import json
from pathlib import Path

import torch
from transformers import Sam3TrackerVideoConfig, Sam3TrackerVideoModel, Sam3VideoConfig, Sam3VideoModel

from helpers.interaction import draw_weights
from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.model.processing_samoe import build_processor

# Settings with which ours tracks as transformers' does.
AS_TRANSFORMERS = {"previous_mask_with_clicks": False, "memory_selection": "recent"}


def sam3_config(
    num_layers: int = 2, image_size: int = 112, window_size: int = 4, patch_size: int = 14, **settings
) -> Sam3TrackerVideoConfig:
    """A narrow tracker. Of several layers of the encoder, each eighth sees the whole image, as published, or the last.

    Frames of 1008 pixels, 32 layers and windows of 24 are as published.
    """
    side = image_size // patch_size
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": {
            "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": num_layers, "num_attention_heads": 2, "image_size": image_size,
            "window_size": window_size, "global_attn_indexes": [*range(7, num_layers, 8)] or [num_layers - 1],
            "pretrain_image_size": patch_size * window_size, "patch_size": patch_size,
        },
        "fpn_hidden_size": 128,
        "backbone_feature_sizes": [[ratio * side] * 2 for ratio in (4, 2, 1)],
    }  # fmt: skip
    return Sam3TrackerVideoConfig(
        image_size=image_size, vision_config=vision,
        prompt_encoder_config={"hidden_size": 128, "image_size": image_size, "patch_size": patch_size},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 64, "iou_head_hidden_dim": 64},
        memory_attention_hidden_size=128, memory_attention_feed_forward_hidden_size=64,
        memory_encoder_hidden_size=128, mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128,
        **{"memory_attention_num_layers": 2, "memory_fuser_intermediate_dim": 64, **settings},
    )  # fmt: skip


def sam3_models(
    config: Sam3TrackerVideoConfig, with_experts: bool = False, **settings
) -> tuple[SamoeModel, Sam3TrackerVideoModel]:
    """Ours, whose experts have no effect unless asked for, and transformers' with the base's weights."""
    ours = SamoeModel(SamoeConfig.from_dict({**config.to_dict(), **AS_TRANSFORMERS, **settings})).eval()
    draw_weights(ours, with_experts)
    theirs = Sam3TrackerVideoModel(config).eval()
    tensors = ours.state_dict()
    theirs.load_state_dict({name: tensors[name] for name in theirs.state_dict()})
    return ours, theirs


def save_combined(folder: Path) -> None:
    """Writes SAM 3 as transformers saves it, detector and tracker, with a processor that names the combined one's."""
    torch.manual_seed(0)
    tracker = sam3_config()
    small = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 32, "num_layers": 1}
    text = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    detector = {
        "vision_config": tracker.vision_config.to_dict(),
        "text_config": {"model_type": "clip_text_model", "num_attention_heads": 2, "projection_dim": 16, **text},
        "geometry_encoder_config": small,
        "detr_encoder_config": small,
        "detr_decoder_config": {**small, "num_queries": 5},
        "mask_decoder_config": {"hidden_size": 128, "num_attention_heads": 2},
    }
    Sam3VideoModel(Sam3VideoConfig(detector_config=detector, tracker_config=tracker.to_dict())).save_pretrained(folder)
    build_processor(SamoeConfig.from_dict(tracker.to_dict())).save_pretrained(folder)
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": "Sam3VideoProcessor"}))
