"""Checkpoints of SAM 2 and SAM2-MoE <-> this package's configuration, tensors and processor.

The original's files are read as data: `.pt` files with `torch.load(weights_only=True)`, the Hydra YAML with a safe
loader; nothing that they name is imported or called. Names, defaults and file forms are those of Meta's `sam2` 1.1.0
and of SAM2-MoE, its fork with LoRA experts in the memory attention.
"""

import copy
import logging
import math
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from transformers import Sam2ImageProcessor, Sam2VideoModel, Sam2VideoProcessor, Sam2VideoVideoProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .configuration_samoe import MEMORY_ATTENTION_PROJECTIONS, SamoeConfig
from .experts import add_experts, matching_linear_names

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------- names of tensors


def _mlp(original: str, ours: str, depth: int) -> dict[str, str]:
    """Names of the layers of a feed-forward network, which Sam2VideoModel counts without the first and the last."""
    middle = {f"{original}.layers.{i}": f"{ours}.layers.{i - 1}" for i in range(1, depth - 1)}
    return {f"{original}.layers.0": f"{ours}.proj_in", **middle, f"{original}.layers.{depth - 1}": f"{ours}.proj_out"}


# Beginnings of names, original -> ours; `*` stands for (a part of) one component. The longest that matches applies.
_RENAMES = {
    "image_encoder.trunk": "vision_encoder.backbone",
    "image_encoder.trunk.patch_embed.proj": "vision_encoder.backbone.patch_embed.projection",
    "image_encoder.trunk.blocks.*.norm*": "vision_encoder.backbone.blocks.*.layer_norm*",
    **_mlp("image_encoder.trunk.blocks.*.mlp", "vision_encoder.backbone.blocks.*.mlp", depth=2),
    "image_encoder.neck.convs.*.conv": "vision_encoder.neck.convs.*",
    "sam_prompt_encoder": "prompt_encoder",
    "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "shared_image_embedding.positional_embedding",
    "sam_prompt_encoder.mask_downscaling.0": "prompt_encoder.mask_embed.conv1",
    "sam_prompt_encoder.mask_downscaling.1": "prompt_encoder.mask_embed.layer_norm1",
    "sam_prompt_encoder.mask_downscaling.3": "prompt_encoder.mask_embed.conv2",
    "sam_prompt_encoder.mask_downscaling.4": "prompt_encoder.mask_embed.layer_norm2",
    "sam_prompt_encoder.mask_downscaling.6": "prompt_encoder.mask_embed.conv3",
    "sam_mask_decoder": "mask_decoder",
    "sam_mask_decoder.transformer.layers.*.norm*": "mask_decoder.transformer.layers.*.layer_norm*",
    "sam_mask_decoder.transformer.layers.*.*.out_proj": "mask_decoder.transformer.layers.*.*.o_proj",
    **_mlp("sam_mask_decoder.transformer.layers.*.mlp", "mask_decoder.transformer.layers.*.mlp", depth=2),
    "sam_mask_decoder.transformer.*.out_proj": "mask_decoder.transformer.*.o_proj",
    "sam_mask_decoder.transformer.norm_final_attn": "mask_decoder.transformer.layer_norm_final_attn",
    "sam_mask_decoder.output_upscaling.0": "mask_decoder.upscale_conv1",
    "sam_mask_decoder.output_upscaling.1": "mask_decoder.upscale_layer_norm",
    "sam_mask_decoder.output_upscaling.3": "mask_decoder.upscale_conv2",
    **_mlp("sam_mask_decoder.output_hypernetworks_mlps.*", "mask_decoder.output_hypernetworks_mlps.*", depth=3),
    **_mlp("sam_mask_decoder.*_head", "mask_decoder.*_head", depth=3),
    "memory_attention": "memory_attention",
    "memory_attention.norm": "memory_attention.layer_norm",
    "memory_attention.layers.*.norm*": "memory_attention.layers.*.layer_norm*",
    "memory_attention.layers.*.*.out_proj": "memory_attention.layers.*.*.o_proj",
    # The original counts convolutions, norms and activations.
    **{
        f"memory_encoder.mask_downsampler.encoder.{3 * i}": f"memory_encoder.mask_downsampler.layers.{i}.conv"
        for i in range(4)
    },
    **{
        f"memory_encoder.mask_downsampler.encoder.{3 * i + 1}": f"memory_encoder.mask_downsampler.layers.{i}.layer_norm"
        for i in range(4)
    },
    "memory_encoder.mask_downsampler.encoder.12": "memory_encoder.mask_downsampler.final_conv",
    "memory_encoder.pix_feat_proj": "memory_encoder.feature_projection",
    "memory_encoder.fuser.layers.*.dwconv": "memory_encoder.memory_fuser.layers.*.depthwise_conv",
    "memory_encoder.fuser.layers.*.norm": "memory_encoder.memory_fuser.layers.*.layer_norm",
    "memory_encoder.fuser.layers.*.pwconv*": "memory_encoder.memory_fuser.layers.*.pointwise_conv*",
    "memory_encoder.fuser.layers.*.gamma": "memory_encoder.memory_fuser.layers.*.scale",
    "memory_encoder.out_proj": "memory_encoder.projection",
    "maskmem_tpos_enc": "memory_temporal_positional_encoding",
    "no_mem_embed": "no_memory_embedding",
    "no_mem_pos_enc": "no_memory_positional_encoding",
    "no_obj_ptr": "no_object_pointer",
    "no_obj_embed_spatial": "occlusion_spatial_embedding_parameter",
    "mask_downsample": "mask_downsample",
    **_mlp("obj_ptr_proj", "object_pointer_proj", depth=3),
    "obj_ptr_tpos_proj": "temporal_positional_encoding_projection_layer",
}
EXPERT_TENSOR = re.compile(r"(?P<module>.+)\.experts\.(?P<index>\d+)\.lora_(?P<matrix>down|up)\.weight")
_GATE = re.compile(r"(?P<module>.+)\.gate\.gate\.(?P<leaf>weight|bias)")
_POINT_EMBEDDING = re.compile(r"sam_prompt_encoder\.point_embeddings\.(?P<index>\d+)\.weight")
_MATRICES = {"down": "lora_A", "up": "lora_B"}
# Sam2VideoModel has one tensor for the four point embeddings, and two for the one positional embedding of prompts.
_POINT_EMBEDDINGS = "prompt_encoder.point_embed.weight"
_POSITIONAL_EMBEDDING = "shared_image_embedding.positional_embedding"
_POSITIONAL_EMBEDDING_COPY = "prompt_encoder.shared_embedding.positional_embedding"


def _compile(renames: Mapping[str, str]) -> list[tuple[re.Pattern, str]]:
    longest_first = sorted(renames.items(), key=lambda item: -len(item[0]))
    return [
        (re.compile(re.escape(old).replace(r"\*", r"([^.]+)") + r"(?=\.|$)"), new.replace("*", "{}"))
        for old, new in longest_first
    ]


_TO_OURS = _compile(_RENAMES)
_TO_ORIGINAL = _compile({ours: original for original, ours in _RENAMES.items()})


def _find(name: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.match(name):
            return template.format(*match.groups()) + name[match.end() :]
    return None


def _rename(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    if (renamed := _find(name, rules)) is None:
        raise ValueError(f"SAM 2 has no tensor or module of the name {name!r}.")
    return renamed


def find_our_name(original_name: str) -> str | None:
    """The name here of a module of the original, None if SAM 2 has nothing of this name."""
    return _find(original_name, _TO_OURS)


def is_expert_name(original_name: str) -> bool:
    return bool(EXPERT_TENSOR.fullmatch(original_name) or _GATE.fullmatch(original_name))


def without_base_layer(original_name: str) -> str:
    return original_name.replace(".base_layer.", ".")


def _from_original_name(name: str) -> tuple[str, int | None]:
    """The name here of the original's tensor `name`, and its place in it if this is only a part of that tensor."""
    if match := EXPERT_TENSOR.fullmatch(name):
        return f"{_rename(match['module'], _TO_OURS)}.{_MATRICES[match['matrix']]}", int(match["index"])
    if match := _GATE.fullmatch(name):
        return f"{_rename(match['module'], _TO_OURS)}.router.{match['leaf']}", None
    if match := _POINT_EMBEDDING.fullmatch(name):
        return _POINT_EMBEDDINGS, int(match["index"])
    return _rename(without_base_layer(name), _TO_OURS), None


def state_dict_from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the original's names -> the same under this package's names, experts stacked, values unchanged.

    Raises:
        ValueError: for a name that SAM 2 and SAM2-MoE do not have, or an expert missing from a stack.
    """
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for original_name, tensor in state_dict.items():
        name, index = _from_original_name(original_name)
        if index is None:
            result[name] = tensor
        else:
            parts.setdefault(name, {})[index] = tensor
    for name, numbered in parts.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(f"{name} needs the parts 0 to {max(numbered)}, but has only {sorted(numbered)}.")
        tensors = [numbered[index] for index in range(len(numbered))]
        result[name] = torch.cat(tensors) if name == _POINT_EMBEDDINGS else torch.stack(tensors)
    if _POSITIONAL_EMBEDDING in result:
        # A copy of its own: tensors that share memory cannot be saved as safetensors.
        result[_POSITIONAL_EMBEDDING_COPY] = result[_POSITIONAL_EMBEDDING].clone()
    return result


def state_dict_to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of [`state_dict_from_original`].

    The base tensors of a module with experts are named as in full MoE checkpoints (`….q_proj.base_layer.weight`).

    Raises:
        ValueError: for a name that SAM 2 and SAM2-MoE do not have, or if the model's two copies of the positional
            embedding, which is one tensor in the original, differ.
    """
    result: dict[str, Tensor] = {}
    with_experts = {name.removesuffix(".lora_A") for name in state_dict if name.endswith(".lora_A")}
    for name, tensor in state_dict.items():
        module, _, leaf = name.rpartition(".")
        if leaf in _MATRICES.values():
            matrix = "down" if leaf == _MATRICES["down"] else "up"
            prefix = f"{_rename(module, _TO_ORIGINAL)}.experts"
            result |= {f"{prefix}.{i}.lora_{matrix}.weight": part.clone() for i, part in enumerate(tensor)}
        elif module.endswith(".router"):
            result[f"{_rename(module.removesuffix('.router'), _TO_ORIGINAL)}.gate.gate.{leaf}"] = tensor
        elif name == _POINT_EMBEDDINGS:
            prefix = "sam_prompt_encoder.point_embeddings"
            result |= {f"{prefix}.{i}.weight": part.clone() for i, part in enumerate(tensor.split(1))}
        elif name == _POSITIONAL_EMBEDDING_COPY:
            _check_copy(tensor, state_dict.get(_POSITIONAL_EMBEDDING))
        else:
            original_name = _rename(name, _TO_ORIGINAL)
            if module in with_experts:
                original_name = f"{original_name.removesuffix(leaf)}base_layer.{leaf}"
            result[original_name] = tensor
    return result


def _check_copy(tensor: Tensor, original: Tensor | None) -> None:
    if original is None or not (tensor.is_meta or torch.equal(tensor, original)):
        raise ValueError(
            f"{_POSITIONAL_EMBEDDING} and {_POSITIONAL_EMBEDDING_COPY} differ; the original has one tensor for both."
        )


# --------------------------------------------------------------------------------------------- the original's YAML

_REQUIRED = object()
_IGNORED = object()  # a field without effect on the model's numbers


class _Setting(NamedTuple):
    """A field of the YAML with a place in SamoeConfig. `default`: what the original takes where the field is absent."""

    path: str
    default: Any = _REQUIRED


class _Only(NamedTuple):
    """A field of the YAML of which SamoeModel supports one value."""

    supported: Any
    default: Any = _REQUIRED


class _Section(NamedTuple):
    """A mapping in the YAML: the classes that `_target_` may name, each with fields of its own, and common fields."""

    targets: dict[str, dict[str, Any]]
    fields: dict[str, Any]


_DECODER = "mask_decoder_config."
_WIDTH = "vision_config.fpn_hidden_size"  # one width from the neck on
_NECK = "vision_config.fpn_"
TRUNK = "vision_config.backbone_config."
POINTER_TIME = "enable_temporal_pos_encoding_for_object_pointers"
_BASE = "sam2.modeling.sam2_base.SAM2Base"
_PREDICTOR = "sam2.sam2_video_predictor.SAM2VideoPredictor"
_ATTENTION = "sam2.modeling.sam.transformer.RoPEAttention"
_MOE_ATTENTION = "sam2.modeling.moe_attention.MoERoPEAttention"


def _section(target: str, **fields: Any) -> _Section:
    return _Section({f"sam2.modeling.{target}": {}}, fields)


def _sine_encoding(num_pos_feats: _Setting | _Only) -> _Section:
    return _section(
        "position_encoding.PositionEmbeddingSine",
        num_pos_feats=num_pos_feats,
        temperature=_Only(10000, 10000),
        normalize=_Only(True, True),
        scale=_Only(None, None),
        warmup_cache=_IGNORED,
        image_size=_IGNORED,
        strides=_IGNORED,
    )


_EXPERT_FIELDS = {
    "num_experts": _Setting("num_experts", 10),
    "lora_rank": _Setting("lora_rank", 4),
    "top_k": _Setting("num_experts_per_tok", 2),
    "lora_alpha": _Setting("lora_alpha", 1.0),
    "lora_dropout": _Setting("lora_dropout", 0.1),
}


def _attention(kv_in_dim: int | None, rope_k_repeat: bool) -> _Section:
    fields = {
        "rope_theta": _Setting("rope_parameters.rope_theta", 10000.0),
        "feat_sizes": _Setting("memory_attention_rope_feat_sizes", [64, 64]),
        "rope_k_repeat": _Only(rope_k_repeat, False),
        "embedding_dim": _Setting(_WIDTH),
        "num_heads": _Setting("memory_attention_num_attention_heads"),
        "downsample_rate": _Setting("memory_attention_downsample_rate", 1),
        "dropout": _Setting("memory_attention_rope_dropout", 0.0),
        "kv_in_dim": _Only(kv_in_dim, None),
    }
    return _Section({_ATTENTION: {}, _MOE_ATTENTION: _EXPERT_FIELDS}, fields)


_IMAGE_ENCODER = _section(
    "backbones.image_encoder.ImageEncoder",
    trunk=_section(
        "backbones.hieradet.Hiera",
        embed_dim=_Setting(f"{TRUNK}hidden_size", 96),
        num_heads=_Setting(f"{TRUNK}num_attention_heads", 1),
        drop_path_rate=_Only(0.0, 0.0),
        q_pool=_Setting(f"{TRUNK}num_query_pool_stages", 3),
        q_stride=_Setting(f"{TRUNK}query_stride", [2, 2]),
        stages=_Setting(f"{TRUNK}blocks_per_stage", [2, 3, 16, 3]),
        dim_mul=_Only(2.0, 2.0),
        head_mul=_Only(2.0, 2.0),
        window_pos_embed_bkg_spatial_size=_Setting(f"{TRUNK}window_positional_embedding_background_size", [14, 14]),
        window_spec=_Setting(f"{TRUNK}window_size_per_stage", [8, 4, 14, 7]),
        global_att_blocks=_Setting(f"{TRUNK}global_attention_blocks", [12, 16, 20]),
        weights_path=_Only(None, None),
        return_interm_layers=_Only(True, True),
    ),
    neck=_section(
        "backbones.image_encoder.FpnNeck",
        position_encoding=_sine_encoding(_Setting(_WIDTH)),
        d_model=_Setting(_WIDTH),
        backbone_channel_list=_Setting("vision_config.backbone_channel_list"),
        kernel_size=_Setting(f"{_NECK}kernel_size", 1),
        stride=_Setting(f"{_NECK}stride", 1),
        padding=_Setting(f"{_NECK}padding", 0),
        fpn_interp_model=_Only("nearest", "bilinear"),
        fuse_type=_Only("sum", "sum"),
        fpn_top_down_levels=_Setting(f"{_NECK}top_down_levels", [0, 1, 2, 3]),
    ),
    scalp=_Only(1, 0),
)
_MEMORY_ATTENTION = _section(
    "memory_attention.MemoryAttention",
    d_model=_Setting(_WIDTH),
    pos_enc_at_input=_Only(True),
    layer=_section(
        "memory_attention.MemoryAttentionLayer",
        activation=_Setting("memory_attention_feed_forward_hidden_act"),
        dim_feedforward=_Setting("memory_attention_feed_forward_hidden_size"),
        dropout=_Setting("memory_attention_dropout"),
        pos_enc_at_attn=_Only(False),
        self_attention=_attention(kv_in_dim=None, rope_k_repeat=False),
        d_model=_Setting(_WIDTH),
        pos_enc_at_cross_attn_keys=_Only(True),
        pos_enc_at_cross_attn_queries=_Only(False),
        cross_attention=_attention(kv_in_dim=64, rope_k_repeat=True),
    ),
    num_layers=_Setting("memory_attention_num_layers"),
    batch_first=_Only(True, True),
)
_MEMORY_ENCODER = _section(
    "memory_encoder.MemoryEncoder",
    out_dim=_Only(64),
    in_dim=_Setting(_WIDTH, 256),
    position_encoding=_sine_encoding(_Only(64)),
    mask_downsampler=_section(
        "memory_encoder.MaskDownSampler",
        embed_dim=_Setting(_WIDTH, 256),
        kernel_size=_Setting("mask_downsampler_kernel_size", 4),
        stride=_Only(2, 4),
        padding=_Setting("mask_downsampler_padding", 0),
        total_stride=_Only(16, 16),
    ),
    fuser=_section(
        "memory_encoder.Fuser",
        layer=_section(
            "memory_encoder.CXBlock",
            dim=_Setting(_WIDTH),
            kernel_size=_Setting("memory_fuser_kernel_size", 7),
            padding=_Setting("memory_fuser_padding", 3),
            drop_path=_Only(0.0, 0.0),
            layer_scale_init_value=_Setting("memory_fuser_layer_scale_init_value", 1e-6),
            use_dwconv=_Only(True, True),
        ),
        num_layers=_Setting("memory_fuser_num_layers"),
        dim=_IGNORED,
        input_projection=_Only(False, False),
    ),
)
_MODEL = {
    "image_encoder": _IMAGE_ENCODER,
    "memory_attention": _MEMORY_ATTENTION,
    "memory_encoder": _MEMORY_ENCODER,
    "num_maskmem": _Setting("num_maskmem", 7),
    "image_size": _Setting("image_size", 512),
    "backbone_stride": _Only(16, 16),
    "sigmoid_scale_for_mem_enc": _Setting("sigmoid_scale_for_mem_enc", 1.0),
    "sigmoid_bias_for_mem_enc": _Setting("sigmoid_bias_for_mem_enc", 0.0),
    # The defaults of this field and of the decoder's are those of build_sam2_video_predictor, not those of the classes.
    "binarize_mask_from_pts_for_mem_enc": _Only(True, True),
    "use_mask_input_as_output_without_sam": _Only(True, False),
    "max_cond_frames_in_attn": _Setting("max_cond_frame_num", -1),
    "directly_add_no_mem_embed": _Only(True, False),
    "use_high_res_features_in_sam": _Only(True, False),
    "multimask_output_in_sam": _Setting("multimask_output_in_sam", False),
    "multimask_min_pt_num": _Setting("multimask_min_pt_num", 1),
    "multimask_max_pt_num": _Setting("multimask_max_pt_num", 1),
    "multimask_output_for_tracking": _Setting("multimask_output_for_tracking", False),
    "use_multimask_token_for_obj_ptr": _Only(True, False),
    "iou_prediction_use_sigmoid": _Only(True, False),
    "memory_temporal_stride_for_eval": _Only(1, 1),
    "non_overlap_masks_for_mem_enc": _Only(False, False),
    "use_obj_ptrs_in_encoder": _Only(True, False),
    "max_obj_ptrs_in_encoder": _Setting("max_object_pointers_in_encoder", 16),
    "add_tpos_enc_to_obj_ptrs": _Setting(POINTER_TIME, True),
    "proj_tpos_enc_in_obj_ptrs": _Setting(POINTER_TIME, False),
    "use_signed_tpos_enc_to_obj_ptrs": _Setting(POINTER_TIME, False),
    "only_obj_ptrs_in_the_past_for_eval": _Only(True, False),
    "pred_obj_scores": _Only(True, False),
    "pred_obj_scores_mlp": _Only(True, False),
    "fixed_no_obj_ptr": _Only(True, False),
    "soft_no_obj_ptr": _Only(False, False),
    "use_mlp_for_obj_ptr_proj": _Only(True, False),
    "no_obj_embed_spatial": _Setting("enable_occlusion_spatial_embedding", False),
    "sam_mask_decoder_extra_args": _Section(
        {},
        {
            "dynamic_multimask_via_stability": _Setting(f"{_DECODER}dynamic_multimask_via_stability", True),
            "dynamic_multimask_stability_delta": _Setting(f"{_DECODER}dynamic_multimask_stability_delta", 0.05),
            "dynamic_multimask_stability_thresh": _Setting(f"{_DECODER}dynamic_multimask_stability_thresh", 0.98),
        },
    ),
    "compile_image_encoder": _IGNORED,
}
_PREDICTOR_FIELDS = {
    "fill_hole_area": _Setting("fill_hole_area", 0),
    "non_overlap_masks": _Only(False, False),
    "clear_non_cond_mem_around_input": _Only(False, False),
    "add_all_frames_to_correct_as_cond": _Only(False, False),
}
_ORIGINAL = _Section({_BASE: {}, _PREDICTOR: _PREDICTOR_FIELDS}, _MODEL)
# The memory attention's two attentions: name here -> section of the YAML.
ATTENTIONS = {"self_attn": "self_attention", "cross_attn_image": "cross_attention"}
DEFAULT_CONFIG = SamoeConfig()


def _get_setting(config: SamoeConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return list(value) if isinstance(value, list | tuple) else value


def _setting_paths(section: _Section) -> Iterator[str]:
    """Places in SamoeConfig of the fields that a section and those below it have whatever their classes."""
    for field in section.fields.values():
        if isinstance(field, _Section):
            yield from _setting_paths(field)
        elif isinstance(field, _Setting):
            yield field.path


def settings_of(config: SamoeConfig, with_experts: bool) -> dict[str, Any]:
    """What the original's YAML can say of `config`: place in SamoeConfig -> value."""
    paths = [*_setting_paths(_ORIGINAL)]
    if with_experts:
        paths += [*(field.path for field in _EXPERT_FIELDS.values()), "expert_modules"]
    return {path: _get_setting(config, path) for path in paths}


def _as_type_of(example: Any, value: Any, place: str) -> Any:
    """The YAML's `value` as the type of `example`."""
    kind = type(example)
    if kind is list and isinstance(value, list) and all(type(item) is int for item in value):
        return list(value)
    if kind is float and (number := _as_float(value)) is not None:
        return number
    if kind not in (list, float) and type(value) is kind:
        return value
    expected = "a list of integers" if kind is list else f"of type {kind.__name__}"
    raise ValueError(f"`{place}` must be {expected}, got {value!r}.")


def _as_float(value: Any) -> float | None:
    try:
        # PyYAML reads numbers such as 1e-6 as text.
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _read_section(values: Any, section: _Section, place: str, found: dict[str, tuple[Any, str]]) -> None:
    """Puts what a mapping of the YAML says into `found`: place in SamoeConfig -> value, and the field it is from."""
    if not isinstance(values, dict):
        raise ValueError(f"`{place}` must be a mapping of fields, got {values!r}.")
    fields = dict(section.fields)
    if section.targets:
        target = str(values.get("_target_"))
        if target not in section.targets:
            expected = " or ".join(section.targets)
            raise ValueError(f"`{place}._target_` is {target}; expected SAM 2's architecture with {expected}.")
        fields |= section.targets[target]
    if unknown := [str(name) for name in values if name not in fields and name != "_target_"]:
        raise ValueError(f"`{place}` has fields that SAM 2 does not have there: {', '.join(unknown)}.")
    for name, field in fields.items():
        if isinstance(field, _Section):
            absent = None if field.targets else {}
            _read_section(values.get(name) or absent, field, f"{place}.{name}", found)
        elif field is not _IGNORED:
            _read_field(values.get(name, field.default), field, f"{place}.{name}", found)


def _read_field(value: Any, field: _Setting | _Only, place: str, found: dict[str, tuple[Any, str]]) -> None:
    if value is _REQUIRED:
        raise ValueError(f"`{place}` is missing.")
    if isinstance(field, _Only):
        if value != field.supported:
            raise ValueError(f"`{place}` is {value!r}; only {field.supported!r} is supported.")
        return
    value = _as_type_of(_get_setting(DEFAULT_CONFIG, field.path), value, place)
    other, other_place = found.setdefault(field.path, (value, place))
    if value != other:
        raise ValueError(f"`{place}` is {value!r}, but `{other_place}` is {other!r}; only one value is supported.")


def complete_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Adds the settings that follow from others, after checking those that depend on others."""
    width, image_size = settings[_WIDTH], settings["image_size"]
    if image_size <= 0 or image_size % 32:
        raise ValueError(f"`image_size` must be a positive multiple of 32, got {image_size}.")
    if width <= 64 or width % 64:
        raise ValueError(f"`d_model` must be a multiple of 64 above 64, got {width}.")
    stages, windows = (settings[f"{TRUNK}{name}"] for name in ("blocks_per_stage", "window_size_per_stage"))
    if not len(stages) == len(windows) == 4:
        raise ValueError(f"`stages` and `window_spec` must have four entries each, got {stages} and {windows}.")
    channels = [settings[f"{TRUNK}hidden_size"] * 2**stage for stage in range(4)]
    listed = settings.get("vision_config.backbone_channel_list", channels[::-1])
    if listed != channels[::-1]:
        raise ValueError(f"`backbone_channel_list` is {listed}, but the trunk's channels are {channels[::-1]}.")
    activation = settings["memory_attention_feed_forward_hidden_act"]
    if activation not in ("relu", "gelu"):
        raise ValueError(f"`activation` is {activation!r}; only 'relu' and 'gelu' are supported.")
    rope_sizes = settings["memory_attention_rope_feat_sizes"]
    if math.prod(rope_sizes) != (image_size // 16) ** 2:
        # The original does the same when the frames do not have as many tokens as its configuration announces.
        rope_sizes = [image_size // 16, image_size // 16]
    heads = settings[f"{TRUNK}num_attention_heads"]
    return settings | {
        f"{TRUNK}model_type": DEFAULT_CONFIG.vision_config.backbone_config.model_type,
        f"{TRUNK}image_size": [image_size, image_size],
        f"{TRUNK}embed_dim_per_stage": channels,
        f"{TRUNK}num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        "vision_config.backbone_channel_list": channels[::-1],
        "vision_config.backbone_feature_sizes": [[image_size // stride] * 2 for stride in (4, 8, 16)],
        "prompt_encoder_config.image_size": image_size,
        "prompt_encoder_config.hidden_size": width,
        "mask_decoder_config.hidden_size": width,
        "memory_attention_hidden_size": width,
        "memory_attention_rope_feat_sizes": rope_sizes,
        "memory_encoder_hidden_size": width,
        "mask_downsampler_embed_dim": width,
        "memory_fuser_embed_dim": width,
        "memory_fuser_intermediate_dim": 4 * width,
        "rope_parameters.rope_type": DEFAULT_CONFIG.default_rope_type,
    }


def build_config(settings: Mapping[str, Any]) -> SamoeConfig:
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, name = path.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return SamoeConfig(**nested)


def projections_of(attentions: Iterable[str]) -> str:
    """`expert_modules` for all projections of the named attentions of the memory attention."""
    return MEMORY_ATTENTION_PROJECTIONS.replace("|".join(ATTENTIONS), "|".join(attentions))


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """All settings in the original's YAML: place in SamoeConfig -> value. Those of experts only if it has experts."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the original's YAML.")
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict) or "model" not in document:
        raise ValueError(f"{path} has no `model`; expected the original's YAML, with the architecture under `model`.")
    found: dict[str, tuple[Any, str]] = {}
    try:
        _read_section(document["model"], _ORIGINAL, "model", found)
        settings = complete_settings({setting: value for setting, (value, _) in found.items()})
        layer = document["model"]["memory_attention"]["layer"]
        attentions = [name for name, section in ATTENTIONS.items() if layer[section]["_target_"] == _MOE_ATTENTION]
        if attentions:
            settings["expert_modules"] = projections_of(attentions)
        build_config(settings)  # checks the values of the experts' settings
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def config_from_yaml(path: str | os.PathLike) -> SamoeConfig:
    """Configuration that the original's YAML describes; it is read as data, and what `_target_` names is never used.

    Dynamic multimask via stability and binarized masks of clicked frames, which the original switches on when it
    builds its video predictor, are on unless the YAML says otherwise.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not YAML, of another architecture, or has a setting that SamoeModel cannot express.
    """
    return build_config(read_settings(path))


class _YamlDumper(yaml.SafeDumper):
    """Lists on one line, and no anchors for values that occur twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_YamlDumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _write_section(section: _Section, config: SamoeConfig, targets: Mapping[str, str], name: str) -> dict[str, Any]:
    """The inverse of [`_read_section`], without fields at their defaults. `targets`: name of a section -> its class."""
    result: dict[str, Any] = {}
    own_fields: dict[str, Any] = {}
    if section.targets:
        result["_target_"] = targets.get(name, next(iter(section.targets)))
        own_fields = section.targets[result["_target_"]]
    for field_name, field in (section.fields | own_fields).items():
        if isinstance(field, _Section):
            value, default = _write_section(field, config, targets, field_name), {}
        elif isinstance(field, _Setting):
            value, default = _get_setting(config, field.path), field.default
        elif isinstance(field, _Only):
            value, default = field
        else:  # without effect
            continue
        if value != default or field_name in own_fields:
            result[field_name] = value
    return result


def write_yaml(config: SamoeConfig, attentions: Iterable[str], path: Path) -> None:
    """Writes the original's YAML, with experts in the named attentions."""
    targets = {ATTENTIONS[name]: _MOE_ATTENTION for name in attentions}
    targets["model"] = _PREDICTOR if config.fill_hole_area else _BASE
    document = {"model": _write_section(_ORIGINAL, config, targets, "model")}
    text = yaml.dump(document, Dumper=_YamlDumper, sort_keys=False)
    path.write_text(f"# @package _global_\n\n{text}", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- checkpoints

_FORMS = ("model", "model_state_dict", "moe_state_dict")
# Trunks of Meta's models by their channels and blocks: name, heads, stages, global attention, background size, windows.
_META_TRUNKS = {
    (96, 12): ("tiny", 1, [1, 2, 7, 2], [5, 7, 9], [7, 7], [8, 4, 14, 7]),
    (96, 16): ("small", 1, [1, 2, 11, 2], [7, 10, 13], [7, 7], [8, 4, 14, 7]),
    (112, 24): ("base_plus", 2, [2, 3, 16, 3], [12, 16, 20], [14, 14], [8, 4, 14, 7]),
    (144, 48): ("large", 2, [2, 6, 36, 4], [23, 33, 43], [7, 7], [8, 4, 16, 8]),
}
_ONLY_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")


def load_original(
    checkpoint: str | os.PathLike,
    experts: str | os.PathLike | None = None,
    original_config: str | os.PathLike | None = None,
) -> tuple[SamoeConfig, dict[str, Tensor]]:
    """Reads a checkpoint of SAM 2 or SAM2-MoE.

    Args:
        checkpoint: `{"model": tensors}` or bare tensors: one of Meta's eight, or such a one with experts.
        experts: a file with experts only: `{"model_state_dict": …}`, `{"moe_state_dict": …}` or bare tensors. They take
            the place of those of `checkpoint`.
        original_config: the model's YAML. Needed for sizes other than Meta's; without it, only the number, rank and
            modules of the experts are known, and their other settings are the defaults.

    Returns:
        The configuration, and all tensors under this package's names, without experts if the files have none. Types
        narrower than float32 are widened to it, as in the original, so that no value is rounded.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is damaged, of an unknown form or size, or has tensors that do not fit.
    """
    tensors = _read_tensors(checkpoint)
    if all(map(is_expert_name, tensors)):
        raise ValueError(f"{checkpoint} holds experts only; give it as `experts`, beside a base checkpoint.")
    source = str(checkpoint)
    if experts is not None:
        expert_tensors = _read_tensors(experts)
        if others := [name for name in expert_tensors if not is_expert_name(name)]:
            raise ValueError(f"{experts} should hold experts only, but has {_listed(others)}.")
        tensors |= expert_tensors
        source += f" with {experts}"
    if original_config is None:
        settings = _meta_settings(tensors, source)
    else:
        settings = read_settings(original_config)
        source += f" and {original_config}"
    has_experts = any(map(is_expert_name, tensors))
    if has_experts:
        settings |= _expert_settings(tensors, settings, source)
    config = build_config(settings)
    _check_tensors(tensors, config, has_experts, source)
    return config, {name: _widened(tensor) for name, tensor in state_dict_from_original(tensors).items()}


def _read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint in any of the original's forms."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint of SAM 2 or SAM2-MoE.")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path} is empty; expected a checkpoint of SAM 2 or SAM2-MoE.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain data; it is not loaded.") from error
    except Exception as error:  # which one a damaged archive raises depends on the place of the damage
        raise ValueError(f"{path} is truncated, damaged or no file of torch.save: {error}") from error
    tensors = content
    if isinstance(content, dict):
        tensors = next((content[form] for form in _FORMS if form in content), content)
    if not _is_state_dict(tensors):
        found = f"a dict with the keys {list(content)[:5]}" if isinstance(content, dict) else type(content).__name__
        forms = ", ".join(f"{{{form!r}: …}}" for form in _FORMS)
        raise ValueError(f"{path} holds {found}; expected tensors by name, bare or as {forms}.")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())
    )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def _meta_settings(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Settings of the one of Meta's eight models that `tensors` belong to."""
    patches = tensors.get("image_encoder.trunk.patch_embed.proj.weight")
    if patches is None or patches.dim() != 4:
        raise ValueError(f"{source} has no image encoder of SAM 2; expected a whole checkpoint of SAM 2 or SAM2-MoE.")
    block = re.compile(r"image_encoder\.trunk\.blocks\.\d+\.norm1\.weight")
    channels, blocks = patches.shape[0], sum(block.fullmatch(name) is not None for name in tensors)
    if (channels, blocks) not in _META_TRUNKS:
        sizes = ", ".join(f"{name} {width}/{depth}" for (width, depth), (name, *_) in _META_TRUNKS.items())
        raise ValueError(
            f"{source}: a trunk with {channels} channels and {blocks} blocks is none of Meta's ({sizes}); give the "
            "model's YAML as `original_config`."
        )
    _, heads, stages, global_blocks, background, windows = _META_TRUNKS[channels, blocks]
    # In all else SamoeConfig's defaults are Meta's.
    settings = settings_of(DEFAULT_CONFIG, with_experts=False)
    del settings["vision_config.backbone_channel_list"]
    is_2_1 = any(name in tensors for name in _ONLY_IN_2_1)
    return complete_settings(
        settings
        | {
            f"{TRUNK}hidden_size": channels,
            f"{TRUNK}num_attention_heads": heads,
            f"{TRUNK}blocks_per_stage": stages,
            f"{TRUNK}global_attention_blocks": global_blocks,
            f"{TRUNK}window_positional_embedding_background_size": background,
            f"{TRUNK}window_size_per_stage": windows,
            "enable_occlusion_spatial_embedding": is_2_1,
            POINTER_TIME: is_2_1,
        }
    )


def _expert_settings(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings that the experts among `tensors` show; where a YAML gave some, only the modules."""
    matches = [match for name in tensors if (match := EXPERT_TENSOR.fullmatch(name))]
    model = _build_on_meta(build_config(settings), with_experts=False)
    linear_names = set(matching_linear_names(model, r".*"))
    modules = sorted({find_our_name(match["module"]) for match in matches} & linear_names)
    from_yaml = "expert_modules" in settings
    announced = matching_linear_names(model, settings.get("expert_modules", MEMORY_ATTENTION_PROJECTIONS))
    result: dict[str, Any] = {}
    if modules and modules != sorted(announced):
        result["expert_modules"] = modules
        if from_yaml:
            logger.warning(f"{source}: {len(modules)} modules have experts, but the YAML has them in {len(announced)}.")
    if not from_yaml:
        ranks = [
            tensors[match[0]].shape[0] for match in matches if tensors[match[0]].dim() and match["matrix"] == "down"
        ]
        num_experts = 1 + max((int(match["index"]) for match in matches), default=0)
        top_k = min(DEFAULT_CONFIG.num_experts_per_tok, num_experts)
        result |= {"num_experts": num_experts, "num_experts_per_tok": top_k, "lora_rank": min(ranks, default=1)}
        logger.warning(
            f"{source}: tensors do not tell `lora_alpha` and `num_experts_per_tok`, which get the defaults "
            f"{DEFAULT_CONFIG.lora_alpha} and {top_k}. Give the YAML of the experts' training as `original_config`."
        )
    return result


def _build_on_meta(config: SamoeConfig, with_experts: bool) -> Sam2VideoModel:
    """The model without memory for its tensors."""
    try:
        with torch.device("meta"):
            model = Sam2VideoModel(copy.deepcopy(config))
            if with_experts:
                names = ("num_experts", "num_experts_per_tok", "lora_rank", "lora_alpha", "lora_dropout")
                add_experts(model, config.expert_modules, **{name: getattr(config, name) for name in names})
    except (RuntimeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"The configuration describes no model that can be built: {error}") from error
    return model


def _check_tensors(tensors: Mapping[str, Tensor], config: SamoeConfig, has_experts: bool, source: str) -> None:
    """Raises a `ValueError` unless these are exactly the original's tensors of a model of this configuration."""
    model = state_dict_to_original(_build_on_meta(config, has_experts).state_dict())
    expected = {without_base_layer(name): tuple(tensor.shape) for name, tensor in model.items()}
    found = {without_base_layer(name): tensor for name, tensor in tensors.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != shape
        ],
        "of no floating-point type": [name for name, tensor in found.items() if not tensor.is_floating_point()],
        "there with and without base_layer": [name for name in found if name in tensors and _is_wrapped(name, tensors)],
    }
    reasons = [f"{problem}: {_listed(names)}" for problem, names in problems.items() if names]
    if reasons:
        raise ValueError(f"The tensors of {source} do not fit the architecture; {'; '.join(reasons)}.")


def _is_wrapped(name: str, tensors: Mapping[str, Tensor]) -> bool:
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" in tensors


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def save_original(
    config: SamoeConfig, state_dict: Mapping[str, Tensor], directory: str | os.PathLike
) -> dict[str, Path]:
    """Writes files that the original loads.

    Args:
        config: the model's configuration.
        state_dict: its tensors, `model.state_dict()`.
        directory: where to write; made if need be.

    Returns:
        kind -> file: "full" (`{"model": …}` with experts), "base" (the same without them), "experts"
        (`{"model_state_dict": …, "config": …}`, as the original's trainers save them), "config" (the YAML).

    Raises:
        ValueError: if the original has no place for some of the experts, or the tensors do not fit the configuration.
    """
    attentions = _attentions_with_experts(config, state_dict)
    tensors = state_dict_to_original(state_dict)
    # Through the settings that the YAML can hold, so that nothing else makes the tensors fit.
    written_config = build_config(complete_settings(settings_of(config, with_experts=True)))
    _check_tensors(tensors, written_config, True, "the model")
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    directory, stem = Path(directory), _original_stem(config)
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "full": directory / f"{stem}_moe.pt",
        "base": directory / f"{stem}.pt",
        "experts": directory / f"{stem}_moe_experts.pt",
        "config": directory / f"{stem}_moe.yaml",
    }
    experts = {name: tensor for name, tensor in tensors.items() if is_expert_name(name)}
    base = {without_base_layer(name): tensor for name, tensor in tensors.items() if name not in experts}
    torch.save({"model": tensors}, files["full"])
    torch.save({"model": base}, files["base"])
    torch.save({"model_state_dict": experts, "config": {"model_config": files["config"].name}}, files["experts"])
    write_yaml(config, attentions, files["config"])
    return files


def _attentions_with_experts(config: SamoeConfig, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of the attentions whose every projection has experts; the original can have no others."""
    modules = {name.removesuffix(".lora_A") for name in state_dict if name.endswith(".lora_A")}
    model = _build_on_meta(config, with_experts=False)
    projections = {name: set(matching_linear_names(model, projections_of([name]))) for name in ATTENTIONS}
    attentions = [name for name in ATTENTIONS if projections[name] <= modules]
    if others := sorted(modules.difference(*(projections[name] for name in attentions))):
        raise ValueError(
            "SAM2-MoE has experts in all projections of all self or all cross attentions of the memory attention, but "
            f"the model has them also in {_listed(others)}."
        )
    return attentions


def _original_stem(config: SamoeConfig) -> str:
    """Meta's name for a checkpoint of this family and size."""
    family = "sam2.1" if config.enable_occlusion_spatial_embedding else "sam2"
    trunk = config.vision_config.backbone_config
    size, *_ = _META_TRUNKS.get((trunk.hidden_size, sum(trunk.blocks_per_stage)), ("custom",))
    return f"{family}_hiera_{size}"


def build_processor(config: SamoeConfig) -> Sam2VideoProcessor:
    """The processor that prepares videos as the original does: bicubic resize to a square, ImageNet's mean and std."""
    side, mask_side = config.image_size, config.image_size // 4
    settings = {
        "size": {"height": side, "width": side},
        "resample": PILImageResampling.BICUBIC,
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }
    image_processor = Sam2ImageProcessor(**settings, mask_size={"height": mask_side, "width": mask_side})
    return Sam2VideoProcessor(image_processor=image_processor, video_processor=Sam2VideoVideoProcessor(**settings))


@contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder that becomes `directory` once the block ends, and vanishes if it raises.

    Raises:
        FileExistsError: at once, if `directory` is a file or a folder that is not empty.
    """
    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder; give another output.")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
