"""The architecture as the YAML of SAM 2 and SAM2-MoE describes it: its sections, fields and defaults.

They are those of Meta's `sam2` 1.1.0 and of SAM2-MoE, its fork with LoRA experts in the memory attention.
"""

from typing import Any, NamedTuple

REQUIRED = object()
IGNORED = object()  # a field without effect on the model's numbers


class Setting(NamedTuple):
    """A field of the YAML with a place in SamoeConfig. `default`: what the original takes where the field is absent."""

    path: str
    default: Any = REQUIRED


class Only(NamedTuple):
    """A field of the YAML of which SamoeModel supports one value."""

    supported: Any
    default: Any = REQUIRED


class Section(NamedTuple):
    """A mapping in the YAML: the classes that `_target_` may name, each with fields of its own, and common fields."""

    targets: dict[str, dict[str, Any]]
    fields: dict[str, Any]


DECODER = "mask_decoder_config."
WIDTH = "vision_config.fpn_hidden_size"  # one width from the neck on
NECK = "vision_config.fpn_"
CHANNELS = "vision_config.backbone_channel_list"
TRUNK = "vision_config.backbone_config."
POINTER_TIME = "enable_temporal_pos_encoding_for_object_pointers"
BASE = "sam2.modeling.sam2_base.SAM2Base"
PREDICTOR = "sam2.sam2_video_predictor.SAM2VideoPredictor"
ATTENTION = "sam2.modeling.sam.transformer.RoPEAttention"
MOE_ATTENTION = "sam2.modeling.moe_attention.MoERoPEAttention"


def _section(target: str, **fields: Any) -> Section:
    return Section({f"sam2.modeling.{target}": {}}, fields)


def _sine_encoding(num_pos_feats: Setting | Only) -> Section:
    return _section(
        "position_encoding.PositionEmbeddingSine",
        num_pos_feats=num_pos_feats,
        temperature=Only(10000, 10000),
        normalize=Only(True, True),
        scale=Only(None, None),
        warmup_cache=IGNORED,
        image_size=IGNORED,
        strides=IGNORED,
    )


EXPERT_FIELDS = {
    "num_experts": Setting("num_experts", 10),
    "lora_rank": Setting("lora_rank", 4),
    "top_k": Setting("num_experts_per_tok", 2),
    "lora_alpha": Setting("lora_alpha", 1.0),
    "lora_dropout": Setting("lora_dropout", 0.1),
}


def _attention(kv_in_dim: int | None, rope_k_repeat: bool) -> Section:
    fields = {
        "rope_theta": Setting("rope_parameters.rope_theta", 10000.0),
        "feat_sizes": Setting("memory_attention_rope_feat_sizes", [64, 64]),
        "rope_k_repeat": Only(rope_k_repeat, False),
        "embedding_dim": Setting(WIDTH),
        "num_heads": Setting("memory_attention_num_attention_heads"),
        "downsample_rate": Setting("memory_attention_downsample_rate", 1),
        "dropout": Setting("memory_attention_rope_dropout", 0.0),
        "kv_in_dim": Only(kv_in_dim, None),
    }
    return Section({ATTENTION: {}, MOE_ATTENTION: EXPERT_FIELDS}, fields)


_IMAGE_ENCODER = _section(
    "backbones.image_encoder.ImageEncoder",
    trunk=_section(
        "backbones.hieradet.Hiera",
        embed_dim=Setting(f"{TRUNK}hidden_size", 96),
        num_heads=Setting(f"{TRUNK}num_attention_heads", 1),
        drop_path_rate=Only(0.0, 0.0),
        q_pool=Setting(f"{TRUNK}num_query_pool_stages", 3),
        q_stride=Setting(f"{TRUNK}query_stride", [2, 2]),
        stages=Setting(f"{TRUNK}blocks_per_stage", [2, 3, 16, 3]),
        dim_mul=Only(2.0, 2.0),
        head_mul=Only(2.0, 2.0),
        window_pos_embed_bkg_spatial_size=Setting(f"{TRUNK}window_positional_embedding_background_size", [14, 14]),
        window_spec=Setting(f"{TRUNK}window_size_per_stage", [8, 4, 14, 7]),
        global_att_blocks=Setting(f"{TRUNK}global_attention_blocks", [12, 16, 20]),
        weights_path=Only(None, None),
        return_interm_layers=Only(True, True),
    ),
    neck=_section(
        "backbones.image_encoder.FpnNeck",
        position_encoding=_sine_encoding(Setting(WIDTH)),
        d_model=Setting(WIDTH),
        backbone_channel_list=Setting(CHANNELS),
        kernel_size=Setting(f"{NECK}kernel_size", 1),
        stride=Setting(f"{NECK}stride", 1),
        padding=Setting(f"{NECK}padding", 0),
        fpn_interp_model=Only("nearest", "bilinear"),
        fuse_type=Only("sum", "sum"),
        fpn_top_down_levels=Setting(f"{NECK}top_down_levels", [0, 1, 2, 3]),
    ),
    scalp=Only(1, 0),
)
_MEMORY_ATTENTION = _section(
    "memory_attention.MemoryAttention",
    d_model=Setting(WIDTH),
    pos_enc_at_input=Only(True),
    layer=_section(
        "memory_attention.MemoryAttentionLayer",
        activation=Setting("memory_attention_feed_forward_hidden_act"),
        dim_feedforward=Setting("memory_attention_feed_forward_hidden_size"),
        dropout=Setting("memory_attention_dropout"),
        pos_enc_at_attn=Only(False),
        self_attention=_attention(kv_in_dim=None, rope_k_repeat=False),
        d_model=Setting(WIDTH),
        pos_enc_at_cross_attn_keys=Only(True),
        pos_enc_at_cross_attn_queries=Only(False),
        cross_attention=_attention(kv_in_dim=64, rope_k_repeat=True),
    ),
    num_layers=Setting("memory_attention_num_layers"),
    batch_first=Only(True, True),
)
_MEMORY_ENCODER = _section(
    "memory_encoder.MemoryEncoder",
    out_dim=Only(64),
    in_dim=Setting(WIDTH, 256),
    position_encoding=_sine_encoding(Only(64)),
    mask_downsampler=_section(
        "memory_encoder.MaskDownSampler",
        embed_dim=Setting(WIDTH, 256),
        kernel_size=Setting("mask_downsampler_kernel_size", 4),
        stride=Only(2, 4),
        padding=Setting("mask_downsampler_padding", 0),
        total_stride=Only(16, 16),
    ),
    fuser=_section(
        "memory_encoder.Fuser",
        layer=_section(
            "memory_encoder.CXBlock",
            dim=Setting(WIDTH),
            kernel_size=Setting("memory_fuser_kernel_size", 7),
            padding=Setting("memory_fuser_padding", 3),
            drop_path=Only(0.0, 0.0),
            layer_scale_init_value=Setting("memory_fuser_layer_scale_init_value", 1e-6),
            use_dwconv=Only(True, True),
        ),
        num_layers=Setting("memory_fuser_num_layers"),
        dim=IGNORED,
        input_projection=Only(False, False),
    ),
)
_MODEL = {
    "image_encoder": _IMAGE_ENCODER,
    "memory_attention": _MEMORY_ATTENTION,
    "memory_encoder": _MEMORY_ENCODER,
    "num_maskmem": Setting("num_maskmem", 7),
    "image_size": Setting("image_size", 512),
    "backbone_stride": Only(16, 16),
    "sigmoid_scale_for_mem_enc": Setting("sigmoid_scale_for_mem_enc", 1.0),
    "sigmoid_bias_for_mem_enc": Setting("sigmoid_bias_for_mem_enc", 0.0),
    # The defaults of this field and of the decoder's are those of build_sam2_video_predictor, not those of the classes.
    "binarize_mask_from_pts_for_mem_enc": Only(True, True),
    "use_mask_input_as_output_without_sam": Only(True, False),
    "max_cond_frames_in_attn": Setting("max_cond_frame_num", -1),
    "directly_add_no_mem_embed": Only(True, False),
    "use_high_res_features_in_sam": Only(True, False),
    "multimask_output_in_sam": Setting("multimask_output_in_sam", False),
    "multimask_min_pt_num": Setting("multimask_min_pt_num", 1),
    "multimask_max_pt_num": Setting("multimask_max_pt_num", 1),
    "multimask_output_for_tracking": Setting("multimask_output_for_tracking", False),
    "use_multimask_token_for_obj_ptr": Only(True, False),
    "iou_prediction_use_sigmoid": Only(True, False),
    "memory_temporal_stride_for_eval": Only(1, 1),
    "non_overlap_masks_for_mem_enc": Only(False, False),
    "use_obj_ptrs_in_encoder": Only(True, False),
    "max_obj_ptrs_in_encoder": Setting("max_object_pointers_in_encoder", 16),
    "add_tpos_enc_to_obj_ptrs": Setting(POINTER_TIME, True),
    "proj_tpos_enc_in_obj_ptrs": Setting(POINTER_TIME, False),
    "use_signed_tpos_enc_to_obj_ptrs": Setting(POINTER_TIME, False),
    "only_obj_ptrs_in_the_past_for_eval": Only(True, False),
    "pred_obj_scores": Only(True, False),
    "pred_obj_scores_mlp": Only(True, False),
    "fixed_no_obj_ptr": Only(True, False),
    "soft_no_obj_ptr": Only(False, False),
    "use_mlp_for_obj_ptr_proj": Only(True, False),
    "no_obj_embed_spatial": Setting("enable_occlusion_spatial_embedding", False),
    "sam_mask_decoder_extra_args": Section(
        {},
        {
            "dynamic_multimask_via_stability": Setting(f"{DECODER}dynamic_multimask_via_stability", True),
            "dynamic_multimask_stability_delta": Setting(f"{DECODER}dynamic_multimask_stability_delta", 0.05),
            "dynamic_multimask_stability_thresh": Setting(f"{DECODER}dynamic_multimask_stability_thresh", 0.98),
        },
    ),
    "compile_image_encoder": IGNORED,
}
_PREDICTOR_FIELDS = {
    "fill_hole_area": Setting("fill_hole_area", 0),
    "non_overlap_masks": Only(False, False),
    "clear_non_cond_mem_around_input": Only(False, False),
    "add_all_frames_to_correct_as_cond": Only(False, False),
}
ORIGINAL = Section({BASE: {}, PREDICTOR: _PREDICTOR_FIELDS}, _MODEL)
