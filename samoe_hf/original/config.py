"""The YAML of SAM 2 and SAM2-MoE <-> SamoeConfig, and the hyper-parameters of Meta's models.

The Hydra YAML is read as data, within bounds; nothing that it names is imported or called.
"""

import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor
from yaml.composer import ComposerError

from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import MEMORY_ATTENTION_PROJECTIONS, SamoeConfig
from samoe_hf.model.weights_io import write_text

# The architecture as the YAML describes it: sections, fields and defaults of Meta's `sam2` 1.1.0, and of SAM2-MoE, its
# fork with LoRA experts in the memory attention.
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

# Meta's largest file has 4 kB in 7 levels.
MAX_BYTES, MAX_DEPTH = 100_000, 32
# The memory attention's two attentions: name here -> section of the YAML.
ATTENTIONS = {"self_attn": "self_attention", "cross_attn_image": "cross_attention"}
DEFAULT_CONFIG = SamoeConfig()
# Least and largest value of numbers, and of each entry of lists, by the setting's name; the first pattern that fits.
_RANGES = (
    (r"image_size", 32, 4096),
    (r".*(num_query_pool_stages|top_down_levels)", 0, 3),
    (r".*(padding|global_attention_blocks|_pt_num|fill_hole_area)", 0, 65_536),
    (r"max_cond_frame_num", -1, 65_536),
    (r".*rope_theta", 1, 1e9),
    (r".*(sigmoid|stability|init_value|lora_alpha|dropout).*", -1e9, 1e9),
    (r".*", 1, 65_536),
)
_ONLY_IN_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
_BLOCK = re.compile(r"image_encoder\.trunk\.blocks\.\d+\.norm1\.weight")
# Trunks of Meta's models by their channels and blocks: name, heads, stages, global attention, background size, windows.
META_TRUNKS = {
    (96, 12): ("tiny", 1, [1, 2, 7, 2], [5, 7, 9], [7, 7], [8, 4, 14, 7]),
    (96, 16): ("small", 1, [1, 2, 11, 2], [7, 10, 13], [7, 7], [8, 4, 14, 7]),
    (112, 24): ("base_plus", 2, [2, 3, 16, 3], [12, 16, 20], [14, 14], [8, 4, 14, 7]),
    (144, 48): ("large", 2, [2, 6, 36, 4], [23, 33, 43], [7, 7], [8, 4, 16, 8]),
}


class _Loader(yaml.SafeLoader):
    """Reads plain data without aliases, which let a small file describe a huge value."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases are not supported", self.peek_event().start_mark)
        if self.depth == MAX_DEPTH:
            raise ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, and no anchors for values that occur twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _read_document(path: str | os.PathLike) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the original's YAML.")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES:,d} bytes; expected the original's YAML.")
    try:
        document = _Loader(content.decode()).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for numbers, dates and characters that are none
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, dict) or "model" not in document:
        raise InputError(f"{path} has no `model`; expected the original's YAML, with the architecture under `model`.")
    return document


def get_setting(config: SamoeConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return list(value) if isinstance(value, list | tuple) else value


def _setting_paths(section: Section) -> Iterator[str]:
    """Places in SamoeConfig of the fields that a section and those below it have whatever their classes."""
    for field in section.fields.values():
        if isinstance(field, Section):
            yield from _setting_paths(field)
        elif isinstance(field, Setting):
            yield field.path


def settings_of(config: SamoeConfig, with_experts: bool) -> dict[str, Any]:
    """What the original's YAML can say of `config`: place in SamoeConfig -> value."""
    paths = [*_setting_paths(ORIGINAL)]
    if with_experts:
        paths += [*(field.path for field in EXPERT_FIELDS.values()), "expert_modules"]
    return {path: get_setting(config, path) for path in paths}


def _typed(path: str, value: Any, place: str) -> Any:
    """The YAML's `value` as the type of the setting `path` in SamoeConfig, within its range."""
    example = get_setting(DEFAULT_CONFIG, path)
    if isinstance(example, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)  # PyYAML reads numbers such as 1e-6 as text
    if type(value) is not type(example) or (isinstance(value, list) and any(type(item) is not int for item in value)):
        expected = "a list of integers" if isinstance(example, list) else f"of type {type(example).__name__}"
        raise InputError(f"`{place}` must be {expected}, got {reprlib.repr(value)}.")
    low, high = next((low, high) for pattern, low, high in _RANGES if re.fullmatch(pattern, path))
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, bool | str) and not low <= number <= high:  # true for NaN
            raise InputError(f"`{place}` must be from {low} to {high}, got {reprlib.repr(value)}.")
    return value


def _read_section(values: Any, section: Section, place: str, found: dict[str, tuple[Any, str]]) -> None:
    """Puts what a mapping of the YAML says into `found`: place in SamoeConfig -> value, and the field it is from."""
    if not isinstance(values, dict):
        raise InputError(f"`{place}` must be a mapping of fields, got {reprlib.repr(values)}.")
    fields = dict(section.fields)
    if section.targets:
        target = str(values.get("_target_"))
        if target not in section.targets:
            expected = " or ".join(section.targets)
            raise InputError(f"`{place}._target_` is {target}; expected SAM 2's architecture with {expected}.")
        fields |= section.targets[target]
    if unknown := [str(name) for name in values if name not in fields and name != "_target_"]:
        raise InputError(f"`{place}` has fields that SAM 2 does not have there: {', '.join(unknown)}.")
    for name, field in fields.items():
        if isinstance(field, Section):
            absent = None if field.targets else {}
            _read_section(values.get(name) or absent, field, f"{place}.{name}", found)
        elif field is not IGNORED:
            _read_field(values.get(name, field.default), field, f"{place}.{name}", found)


def _read_field(value: Any, field: Setting | Only, place: str, found: dict[str, tuple[Any, str]]) -> None:
    if value is REQUIRED:
        raise InputError(f"`{place}` is missing.")
    if isinstance(field, Only):
        if value != field.supported:
            raise InputError(f"`{place}` is {reprlib.repr(value)}; only {field.supported!r} is supported.")
        return
    value = _typed(field.path, value, place)
    other, other_place = found.setdefault(field.path, (value, place))
    if value != other:
        raise InputError(f"`{place}` is {value!r}, but `{other_place}` is {other!r}; only one value is supported.")


def complete_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Adds the settings that follow from others, after checking those that depend on others."""
    width, image_size = settings[WIDTH], settings["image_size"]
    channels = [settings[f"{TRUNK}hidden_size"] * 2**stage for stage in range(4)]
    heads, rope_sizes = settings[f"{TRUNK}num_attention_heads"], settings["memory_attention_rope_feat_sizes"]
    _check_settings(settings, channels)
    if math.prod(rope_sizes) != (image_size // 16) ** 2:
        # The original does the same when the frames do not have as many tokens as its configuration announces.
        rope_sizes = [image_size // 16, image_size // 16]
    return settings | {
        f"{TRUNK}model_type": get_setting(DEFAULT_CONFIG, f"{TRUNK}model_type"),
        f"{TRUNK}image_size": [image_size, image_size],
        f"{TRUNK}embed_dim_per_stage": channels,
        f"{TRUNK}num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
        CHANNELS: channels[::-1],
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
    """Refuses settings that do not go together. `channels`: those of the trunk's stages."""
    width, heads = settings[WIDTH], settings[f"{TRUNK}num_attention_heads"]
    stages, windows = settings[f"{TRUNK}blocks_per_stage"], settings[f"{TRUNK}window_size_per_stage"]
    listed, blocks = settings[CHANNELS], settings[f"{TRUNK}global_attention_blocks"]
    parts = settings["memory_attention_num_attention_heads"] * settings["memory_attention_downsample_rate"]
    activation = settings["memory_attention_feed_forward_hidden_act"]
    pairs = ("query_stride", "window_positional_embedding_background_size")
    pairs = ("memory_attention_rope_feat_sizes", *(f"{TRUNK}{name}" for name in pairs))
    checks = [
        (width > 64 and width % 64 == 0, f"`d_model` must be a multiple of 64 above 64, got {width}."),
        (
            len(stages) == len(windows) == 4,
            f"`stages` and `window_spec` must have four entries each, got {stages} and {windows}.",
        ),
        (
            listed == channels[::-1],
            f"`backbone_channel_list` is {listed}, but the trunk's channels are {channels[::-1]}.",
        ),
        (
            channels[0] % heads == 0,
            f"The trunk's `num_heads` must divide its `embed_dim` of {channels[0]}, got {heads}.",
        ),
        (
            width % parts == 0,
            f"The attentions' `num_heads` times `downsample_rate`, {parts}, must divide `d_model`, {width}.",
        ),
        (activation in ("relu", "gelu"), f"`activation` is {activation!r}; only 'relu' and 'gelu' are supported."),
        (
            all(block < sum(stages) for block in blocks),
            f"`global_att_blocks` must be below {sum(stages)}, as many as blocks, got {reprlib.repr(blocks)}.",
        ),
        (settings["max_cond_frame_num"] not in (0, 1), "`max_cond_frames_in_attn` must be -1, for all, or at least 2."),
        *(
            (len(settings[name]) == 2, f"`{name}` must have two entries, got {reprlib.repr(settings[name])}.")
            for name in pairs
        ),
    ]
    for is_fit, message in checks:
        if not is_fit:
            raise InputError(message)


def build_config(settings: Mapping[str, Any]) -> SamoeConfig:
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, name = path.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return SamoeConfig(**nested)


def meta_settings(tensors: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Settings of the one of Meta's eight models that tensors of the original belong to."""
    patches = tensors.get("image_encoder.trunk.patch_embed.proj.weight")
    if patches is None or patches.dim() != 4:
        raise InputError(f"{source} has no image encoder of SAM 2; expected a whole checkpoint of SAM 2 or SAM2-MoE.")
    channels, blocks = patches.shape[0], sum(_BLOCK.fullmatch(name) is not None for name in tensors)
    if (channels, blocks) not in META_TRUNKS:
        sizes = ", ".join(f"{name} {width}/{depth}" for (width, depth), (name, *_) in META_TRUNKS.items())
        raise InputError(
            f"{source}: a trunk with {channels} channels and {blocks} blocks is none of Meta's ({sizes}); give the "
            "model's YAML as `original_config` (`--config` of a command)."
        )
    _, heads, stages, global_blocks, background, windows = META_TRUNKS[channels, blocks]
    is_2_1 = any(name in tensors for name in _ONLY_IN_2_1)
    # In all else SamoeConfig's defaults are Meta's.
    return complete_settings(
        settings_of(DEFAULT_CONFIG, with_experts=False)
        | {
            f"{TRUNK}hidden_size": channels,
            f"{TRUNK}num_attention_heads": heads,
            f"{TRUNK}blocks_per_stage": stages,
            f"{TRUNK}global_attention_blocks": global_blocks,
            f"{TRUNK}window_positional_embedding_background_size": background,
            f"{TRUNK}window_size_per_stage": windows,
            CHANNELS: [channels * factor for factor in (8, 4, 2, 1)],
            "enable_occlusion_spatial_embedding": is_2_1,
            POINTER_TIME: is_2_1,
        }
    )


def projections_of(attentions: Iterable[str]) -> list[str]:
    """`expert_modules` for all projections of the named attentions of the memory attention."""
    return [pattern for pattern in MEMORY_ATTENTION_PROJECTIONS if pattern.split(".")[-2] in attentions]


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """All settings in the original's YAML: place in SamoeConfig -> value. Those of experts only if it has experts.

    Dynamic multimask via stability and binarized masks of clicked frames, which the original switches on when it builds
    its video predictor, are on unless the YAML says otherwise.
    """
    document = _read_document(path)
    found: dict[str, tuple[Any, str]] = {}
    try:
        _read_section(document["model"], ORIGINAL, "model", found)
        settings = complete_settings({setting: value for setting, (value, _) in found.items()})
        layer = document["model"]["memory_attention"]["layer"]
        attentions = [name for name, section in ATTENTIONS.items() if layer[section]["_target_"] == MOE_ATTENTION]
        if attentions:
            settings["expert_modules"] = projections_of(attentions)
        build_config(settings)  # checks the values of the experts' settings
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return settings


def _write_section(section: Section, config: SamoeConfig, targets: Mapping[str, str], name: str) -> dict[str, Any]:
    """The inverse of [`_read_section`], without fields at their defaults. `targets`: name of a section -> its class."""
    result: dict[str, Any] = {}
    own_fields: dict[str, Any] = {}
    if section.targets:
        result["_target_"] = targets.get(name, next(iter(section.targets)))
        own_fields = section.targets[result["_target_"]]
    for field_name, field in (section.fields | own_fields).items():
        if field is IGNORED:
            continue
        if isinstance(field, Section):
            value, default = _write_section(field, config, targets, field_name), {}
        else:
            value = get_setting(config, field.path) if isinstance(field, Setting) else field.supported
            default = field.default
        if value != default or field_name in own_fields:
            result[field_name] = value
    return result


def write_yaml(config: SamoeConfig, attentions: Iterable[str], path: Path) -> None:
    """Writes the original's YAML of a model on SAM 2, with experts in the named attentions."""
    targets = {ATTENTIONS[name]: MOE_ATTENTION for name in attentions}
    targets["model"] = PREDICTOR if config.fill_hole_area else BASE
    document = {"model": _write_section(ORIGINAL, config, targets, "model")}
    write_text(path, f"# @package _global_\n\n{yaml.dump(document, Dumper=_Dumper, sort_keys=False)}")
