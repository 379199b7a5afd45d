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
from samoe_hf.model.configuration_samoe import EXPERT_SETTINGS, MEMORY_ATTENTION_PROJECTIONS, SamoeConfig
from samoe_hf.whole_files import write_text

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


WIDTH = "vision_config.fpn_hidden_size"  # one width from the neck on
CHANNELS = "vision_config.backbone_channel_list"
TRUNK = "vision_config.backbone_config."
POINTER_TIME = "enable_temporal_pos_encoding_for_object_pointers"
BASE = "sam2.modeling.sam2_base.SAM2Base"
PREDICTOR = "sam2.sam2_video_predictor.SAM2VideoPredictor"
# Fields of the mask decoder, here and in the YAML.
DYNAMIC_MULTIMASK = [f"dynamic_multimask_{name}" for name in ("via_stability", "stability_delta", "stability_thresh")]
MOE_ATTENTION = "sam2.modeling.moe_attention.MoERoPEAttention"


def _read_fields(described: dict[str, Any]) -> dict[str, Any]:
    """Fields as `architecture.yaml` describes them."""
    fields = {}
    for name, field in described.items():
        if field == "ignored":
            fields[name] = IGNORED
        elif "at" in field or "only" in field:
            kind, value = (Setting, field["at"]) if "at" in field else (Only, field["only"])
            fields[name] = kind(value, field.get("default", REQUIRED))
        else:
            targets = {target: _read_fields(own) for target, own in field.get("_targets_", {}).items()}
            fields[name] = Section(targets, _read_fields({n: f for n, f in field.items() if n != "_targets_"}))
    return fields


ORIGINAL: Section = _read_fields(
    yaml.safe_load(Path(__file__).with_name("architecture.yaml").read_text(encoding="utf-8"))
)["model"]
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


_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


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
    paths = [*_setting_paths(ORIGINAL), *(EXPERT_SETTINGS if with_experts else ())]
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
    shown = reprlib.repr(blocks)
    parts = settings["memory_attention_num_attention_heads"] * settings["memory_attention_downsample_rate"]
    activation = settings["memory_attention_feed_forward_hidden_act"]
    names = (f"{TRUNK}query_stride", f"{TRUNK}window_positional_embedding_background_size")
    pairs = {name: settings[name] for name in ("memory_attention_rope_feat_sizes", *names)}
    checks = [
        (width > 64 and width % 64 == 0, f"`d_model` must be a multiple of 64 above 64, got {width}."),
        (len(stages) == len(windows) == 4, f"`stages` and `window_spec` must have 4 entries, got {stages}, {windows}."),
        (listed == channels[::-1], f"`backbone_channel_list` is {listed}, but the trunk has {channels[::-1]}."),
        (channels[0] % heads == 0, f"The `num_heads` must divide the trunk's `embed_dim` {channels[0]}, got {heads}."),
        (width % parts == 0, f"`num_heads` times `downsample_rate`, {parts}, must divide `d_model`, {width}."),
        (activation in ("relu", "gelu"), f"`activation` is {activation!r}; only 'relu' and 'gelu' are supported."),
        (max(blocks, default=0) < sum(stages), f"`global_att_blocks` must be below {sum(stages)}, got {shown}."),
        (settings["max_cond_frame_num"] not in (0, 1), "`max_cond_frames_in_attn` must be -1, for all, or at least 2."),
        *((len(two) == 2, f"`{name}` must have two entries, got {reprlib.repr(two)}.") for name, two in pairs.items()),
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
    # What the original's builders add is said here too, for those who build without it.
    document["model"]["binarize_mask_from_pts_for_mem_enc"] = True
    decoder = config.mask_decoder_config
    document["model"]["sam_mask_decoder_extra_args"] = {name: getattr(decoder, name) for name in DYNAMIC_MULTIMASK}
    write_text(path, f"# @package _global_\n\n{yaml.dump(document, Dumper=_Dumper, sort_keys=False)}")
