"""The YAML of SAM 2 and SAM2-MoE <-> SamoeConfig, and the hyper-parameters of Meta's models.

The Hydra YAML is read as data; nothing that it names is imported or called. Fields and defaults are those of Meta's
`sam2` 1.1.0 and of SAM2-MoE, its fork with LoRA experts in the memory attention.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from samoe_hf.model.configuration_samoe import MEMORY_ATTENTION_PROJECTIONS, SamoeConfig

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
_CHANNELS = "vision_config.backbone_channel_list"
_TRUNK = "vision_config.backbone_config."
_POINTER_TIME = "enable_temporal_pos_encoding_for_object_pointers"
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
        embed_dim=_Setting(f"{_TRUNK}hidden_size", 96),
        num_heads=_Setting(f"{_TRUNK}num_attention_heads", 1),
        drop_path_rate=_Only(0.0, 0.0),
        q_pool=_Setting(f"{_TRUNK}num_query_pool_stages", 3),
        q_stride=_Setting(f"{_TRUNK}query_stride", [2, 2]),
        stages=_Setting(f"{_TRUNK}blocks_per_stage", [2, 3, 16, 3]),
        dim_mul=_Only(2.0, 2.0),
        head_mul=_Only(2.0, 2.0),
        window_pos_embed_bkg_spatial_size=_Setting(f"{_TRUNK}window_positional_embedding_background_size", [14, 14]),
        window_spec=_Setting(f"{_TRUNK}window_size_per_stage", [8, 4, 14, 7]),
        global_att_blocks=_Setting(f"{_TRUNK}global_attention_blocks", [12, 16, 20]),
        weights_path=_Only(None, None),
        return_interm_layers=_Only(True, True),
    ),
    neck=_section(
        "backbones.image_encoder.FpnNeck",
        position_encoding=_sine_encoding(_Setting(_WIDTH)),
        d_model=_Setting(_WIDTH),
        backbone_channel_list=_Setting(_CHANNELS),
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
    "add_tpos_enc_to_obj_ptrs": _Setting(_POINTER_TIME, True),
    "proj_tpos_enc_in_obj_ptrs": _Setting(_POINTER_TIME, False),
    "use_signed_tpos_enc_to_obj_ptrs": _Setting(_POINTER_TIME, False),
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
# Trunks of Meta's models by their channels and blocks: name, heads, stages, global attention, background size, windows.
META_TRUNKS = {
    (96, 12): ("tiny", 1, [1, 2, 7, 2], [5, 7, 9], [7, 7], [8, 4, 14, 7]),
    (96, 16): ("small", 1, [1, 2, 11, 2], [7, 10, 13], [7, 7], [8, 4, 14, 7]),
    (112, 24): ("base_plus", 2, [2, 3, 16, 3], [12, 16, 20], [14, 14], [8, 4, 14, 7]),
    (144, 48): ("large", 2, [2, 6, 36, 4], [23, 33, 43], [7, 7], [8, 4, 16, 8]),
}


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
    channels = [settings[f"{_TRUNK}hidden_size"] * 2**stage for stage in range(4)]
    heads = settings[f"{_TRUNK}num_attention_heads"]
    rope_sizes = settings["memory_attention_rope_feat_sizes"]
    _check_settings(settings, channels)
    if math.prod(rope_sizes) != (image_size // 16) ** 2:
        # The original does the same when the frames do not have as many tokens as its configuration announces.
        rope_sizes = [image_size // 16, image_size // 16]
    return settings | {
        f"{_TRUNK}model_type": DEFAULT_CONFIG.vision_config.backbone_config.model_type,
        f"{_TRUNK}image_size": [image_size, image_size],
        f"{_TRUNK}embed_dim_per_stage": channels,
        f"{_TRUNK}num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        _CHANNELS: channels[::-1],
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


def _check_settings(settings: Mapping[str, Any], channels: list[int]) -> None:
    """Raises a `ValueError` for settings that do not go together. `channels`: those of the trunk's stages."""
    width, image_size, heads = settings[_WIDTH], settings["image_size"], settings[f"{_TRUNK}num_attention_heads"]
    stages, windows = settings[f"{_TRUNK}blocks_per_stage"], settings[f"{_TRUNK}window_size_per_stage"]
    attention_heads = settings["memory_attention_num_attention_heads"]
    downsample_rate = settings["memory_attention_downsample_rate"]
    activation = settings["memory_attention_feed_forward_hidden_act"]
    listed_channels = settings[_CHANNELS]
    problem = None
    if image_size <= 0 or image_size % 32:
        problem = f"`image_size` must be a positive multiple of 32, got {image_size}."
    elif width <= 64 or width % 64:
        problem = f"`d_model` must be a multiple of 64 above 64, got {width}."
    elif not len(stages) == len(windows) == 4:
        problem = f"`stages` and `window_spec` must have four entries each, got {stages} and {windows}."
    elif listed_channels != channels[::-1]:
        problem = f"`backbone_channel_list` is {listed_channels}, but the trunk's channels are {channels[::-1]}."
    elif heads < 1 or channels[0] % heads:
        problem = f"The trunk's `num_heads` must divide its `embed_dim` of {channels[0]}, got {heads}."
    elif min(attention_heads, downsample_rate) < 1 or width % (attention_heads * downsample_rate):
        problem = (
            f"The attentions' `num_heads` ({attention_heads}) times `downsample_rate` ({downsample_rate}) must divide "
            f"`d_model` ({width})."
        )
    elif activation not in ("relu", "gelu"):
        problem = f"`activation` is {activation!r}; only 'relu' and 'gelu' are supported."
    if problem:
        raise ValueError(problem)


def build_config(settings: Mapping[str, Any]) -> SamoeConfig:
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, name = path.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return SamoeConfig(**nested)


def meta_settings(channels: int, blocks: int, is_2_1: bool) -> dict[str, Any]:
    """Settings of one of Meta's eight models, known by the channels and blocks of its trunk and its family."""
    _, heads, stages, global_blocks, background, windows = META_TRUNKS[channels, blocks]
    # In all else SamoeConfig's defaults are Meta's.
    return complete_settings(
        settings_of(DEFAULT_CONFIG, with_experts=False)
        | {
            f"{_TRUNK}hidden_size": channels,
            f"{_TRUNK}num_attention_heads": heads,
            f"{_TRUNK}blocks_per_stage": stages,
            f"{_TRUNK}global_attention_blocks": global_blocks,
            f"{_TRUNK}window_positional_embedding_background_size": background,
            f"{_TRUNK}window_size_per_stage": windows,
            _CHANNELS: [channels * factor for factor in (8, 4, 2, 1)],
            "enable_occlusion_spatial_embedding": is_2_1,
            _POINTER_TIME: is_2_1,
        }
    )


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
