"""Checkpoints of SAM 2, SAM2-MoE and SAM 3 <-> this package's configuration and tensors; files are read as data."""

import logging
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Sam2VideoModel, Sam3TrackerVideoConfig

from samoe_hf.errors import InputError
from samoe_hf.model.base import SAM2, SAM3, check_base, settings_of_base
from samoe_hf.model.base_model import build_on_meta
from samoe_hf.model.configuration_samoe import MEMORY_ATTENTION_PROJECTIONS, SamoeConfig
from samoe_hf.model.expert_layer import matching_linear_names
from samoe_hf.model.weights_check import check_repeats, find_mismatches

from .config import (
    ATTENTIONS,
    DEFAULT_CONFIG,
    META_TRUNKS,
    TRUNK,
    build_config,
    complete_settings,
    get_setting,
    meta_settings,
    projections_of,
    read_settings,
    settings_of,
    write_yaml,
)
from .edgetam import edgetam_config, edgetam_tensors, is_edgetam, state_dict_from_edgetam, state_dict_to_edgetam
from .names import (
    EXPERT_TENSOR,
    find_our_name,
    is_expert_name,
    state_dict_from_original,
    state_dict_from_sam3,
    state_dict_into_sam3,
    state_dict_to_original,
    without_base_layer,
)

logger = logging.getLogger(__name__)

# Where a file may have the tensors, the first that it has; then, where trainers keep averages of the weights (EMA).
_FORMS = ("model", "model_state_dict", "moe_state_dict", "state_dict", "module")
_AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")
# What DataParallel, `torch.compile`, Lightning and averages put before names.
_WRAPPERS = re.compile(r"^((module|model|_orig_mod|ema|model_ema|ema_model)\.)+|(?<=\.)_orig_mod\.")
_AVERAGED = re.compile(r"((module|model)\.)?(ema|model_ema|ema_model)\.")
# Of Meta's `sam3.pt`. transformers' own conversion takes an epsilon of 1e-6.
_SAM3_VIT = {"model_type": "sam3_vit_model", "layer_norm_eps": 1e-5}
SAM3_CONFIG = Sam3TrackerVideoConfig(vision_config={"model_type": "sam3_vision_model", "backbone_config": _SAM3_VIT})
# What is in files of other models than SAM 2: a pattern of a tensor's name -> what the file is, and what to load
# instead; None if it is read. The first that matches applies.
_OTHERS = {
    r"tracker\.model\.|.*interactive_obj_ptr_proj\.": "SAM 3.1, whose multiplex tracker is none that is known here; "
    "expected SAM 2, SAM 2.1 or SAM 3",
    r"tracker\.": None,
    r"(detector\.)?backbone\.vision_backbone\.|detector\.": "SAM 3's detector alone, without its tracker",
    r"image_encoder\.neck\.convs\.\d+\.conv_1x1\.": "EfficientTAM, whose encoder is none that is known here",
    r"image_encoder\.(blocks|patch_embed)\.": "an image model, SAM, which has no memory for videos",
}


class _Unread:
    """Stands for NumPy's numbers, such as a best score, beside the tensors: nothing that a file asks for is made."""

    def __init__(self, *_: Any): ...

    __setstate__ = __init__


_NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def load_original(
    checkpoint: str | os.PathLike,
    experts: str | os.PathLike | None = None,
    original_config: str | os.PathLike | None = None,
) -> tuple[SamoeConfig, dict[str, Tensor]]:
    """Reads a checkpoint of SAM 2, SAM2-MoE or EdgeTAM, or the tracker out of SAM 3's.

    Args:
        checkpoint: `{"model": tensors}` or bare tensors: one of Meta's eight, or such a one with experts; or Meta's
            `edgetam.pt`, or `sam3.pt`, of detector and tracker.
        experts: a file with experts only: `{"model_state_dict": …}`, `{"moe_state_dict": …}` or bare tensors. They take
            the place of those of `checkpoint`.
        original_config: the model's YAML. Needed for sizes other than Meta's; without it, only the number, rank and
            modules of the experts are known, and their other settings are the defaults.

    Returns:
        The configuration, and all tensors under this package's names, without experts if the files have none. Types
        narrower than float32 are widened to it, as in the original, so that no value is rounded.

    Raises:
        FileNotFoundError: if a file does not exist.
        InputError: if a file is damaged, of an unknown form or size, or has tensors that do not fit.
    """
    tensors, source = _read_tensors(checkpoint), str(checkpoint)
    if all(map(is_expert_name, tensors)):
        raise InputError(f"{checkpoint} holds experts only; give it as `experts`, beside a base checkpoint.")
    other = "SAM 3" if is_sam3(tensors) else "EdgeTAM" if is_edgetam(tensors) else None
    if other and not experts is original_config is None:
        raise InputError(f"{checkpoint} is {other}; `experts` and `original_config` go with SAM 2's checkpoints.")
    if other == "SAM 3":
        config, tensors = _sam3_tracker(tensors, source)
        return config, _widened(tensors, copy=True)
    if other:
        config = edgetam_config("obj_ptr_tpos_proj.weight" in tensors, "no_obj_embed_spatial" in tensors)
        own = state_dict_from_edgetam(tensors)
        _check_fit(own, edgetam_tensors(config), source)
        return config, _widened(own)
    if experts is not None:
        expert_tensors = _read_tensors(experts)
        if others := [name for name in expert_tensors if not is_expert_name(name)]:
            raise InputError(f"{experts} should hold experts only, but has {_listed(others)}.")
        tensors |= expert_tensors
        source += f" with {experts}"
    if original_config is None:
        settings = meta_settings(tensors, source)
    else:
        settings = read_settings(original_config)
        source += f" and {original_config}"
    check_repeats(source, build_config(settings), len(tensors))
    has_experts = any(map(is_expert_name, tensors))
    if has_experts:
        settings |= _expert_settings(tensors, settings, source)
    config = build_config(settings)
    _check_tensors(tensors, config, has_experts, source)
    return config, _widened(state_dict_from_original(tensors))


def _widened(tensors: Mapping[str, Tensor], copy: bool = False) -> dict[str, Tensor]:
    """The tensors as float32, or as float64 where they are that. With `copy` none shares memory with others."""
    types = {n: torch.float64 if t.dtype == torch.float64 else torch.float32 for n, t in tensors.items()}
    return {n: t.to(types[n], copy=copy) for n, t in tensors.items()}


def _read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint in any of the original's forms."""
    with torch.serialization.safe_globals([(_Unread, name) for name in _NUMPY]):
        _, tensors, names = _open(path)
    return {name: tensors[stored].detach() for name, stored in names.items()}


def _open(path: str | os.PathLike) -> tuple[Any, dict[str, Tensor], dict[str, str]]:
    """The content of a checkpoint, the dict of tensors in it, and their names without wrappers -> in that dict."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint of SAM 2, SAM2-MoE or SAM 3.")
    if Path(path).stat().st_size == 0:
        raise InputError(f"{path} is empty; expected a checkpoint of SAM 2, SAM2-MoE or SAM 3.")
    _check_is_video_model(path)
    try:
        content = _load(path, "cpu")
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is damaged, or holds more than tensors and plain data; it is not loaded.") from error
    except Exception as error:  # a damaged archive raises one of many, by where the damage is
        raise InputError(f"{path} is truncated, damaged or no file of torch.save or safetensors: {error}") from error
    is_dict = isinstance(content, dict)
    forms = _forms(content)
    tensors = content[forms[0]] if forms else content
    if not isinstance(tensors, dict) or not tensors or not all(map(_is_plain, tensors.keys(), tensors.values())):
        found = f"a dict with the keys {list(content)[:5]}" if is_dict else type(content).__name__
        known = ", ".join(f"{{{form!r}: …}}" for form in _FORMS)
        raise InputError(f"{path} holds {found}; expected tensors by name, bare or as {known}.")
    if left := [form for form in forms[1:] if form in _AVERAGES]:
        logger.warning(f"{path}: the weights are those of {forms[0]!r}; their average, {left[0]!r}, is not read.")
    return content, tensors, _names_without_wrappers(tensors, path)


def _load(path: str | os.PathLike, device: str) -> Any:
    """What a file of `torch.save` holds, or, as others pass such checkpoints on, one of safetensors."""
    if Path(path).suffix == ".safetensors":
        return load_file(path)  # mapped, so that what is not asked for is not read
    return torch.load(path, map_location=device, weights_only=True)


def _forms(content: Any) -> list[str]:
    """Where a checkpoint's content has dicts of tensors; the first is read."""
    return [form for form in (*_FORMS, *_AVERAGES) if isinstance(content, dict) and isinstance(content.get(form), dict)]


def _check_is_video_model(path: str | os.PathLike) -> None:
    """Refuses what holds another model, by its name, before values are read."""
    try:
        content = _load(path, "meta")
    except Exception:  # what is wrong is said where the values are read
        return
    tensors = content[_forms(content)[0]] if _forms(content) else content
    names = [_WRAPPERS.sub("", str(name)) for name in tensors] if isinstance(tensors, dict) else []
    found = next((what for pattern, what in _OTHERS.items() if any(re.match(pattern, name) for name in names)), None)
    if found is not None:
        raise InputError(f"{path} is {found}.")
    if any(name.startswith("image_encoder.trunk.") for name in names) and "maskmem_tpos_enc" not in names:
        raise InputError(f"{path} is an image model of SAM 2, without the memory that videos need.")


def _names_without_wrappers(tensors: Mapping[str, Tensor], path: str | os.PathLike) -> dict[str, str]:
    """Names without wrappers -> names in the file; of weights and their average, those of the weights."""
    # Of `torch.optim.swa_utils.AveragedModel`, beside its average.
    names = [name for name in tensors if not re.fullmatch(r"(module\.)?n_averaged", name)]
    averaged = [name for name in names if _AVERAGED.match(name)]
    if 0 < len(averaged) < len(names):
        logger.warning(f"{path}: {len(averaged)} tensors are an average of the weights, and are not read.")
        names = [name for name in names if not _AVERAGED.match(name)]
    result = {_WRAPPERS.sub("", name): name for name in names}
    if len(result) < len(names):
        raise InputError(f"{path} holds tensors twice, with and without {_WRAPPERS.pattern!r} before their names.")
    return result


def is_sam3(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of SAM 3's detector and tracker, as Meta names them."""
    return any(name.startswith("tracker.") for name in names)


def _sam3_tracker(tensors: Mapping[str, Tensor], source: str) -> tuple[SamoeConfig, dict[str, Tensor]]:
    """The configuration and the tensors of SAM 3's tracker, by the names here.

    Tensors hold the rotary positions of windows and of whole frames, which tell the size of frames.
    """
    config = SamoeConfig(**settings_of_base(SAM3_CONFIG.to_dict()))
    trunk = config.vision_config.backbone_config
    rotary = [x for name, x in tensors.items() if name.endswith(".freqs_cis")]
    sides = {trunk.window_size, *(math.isqrt(len(x)) for x in rotary if x.dim() == 2)}
    if len(sides) > 2:
        raise InputError(f"{source}: expected windows of {trunk.window_size} patches, got {sorted(sides)}.")
    try:
        if rotary:
            config.resize(trunk.patch_size * max(sides))
        own = state_dict_from_sam3(tensors)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    _check_fit(own, _build(config, False, source).state_dict(), source)
    return config, own


def _is_plain(name: Any, tensor: Any) -> bool:
    """Whether this is a name and a tensor with a value of its own for each entry, not a meta or sparse tensor."""
    is_tensor = isinstance(name, str) and isinstance(tensor, Tensor)
    return is_tensor and tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized


def _expert_settings(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the experts' tensors tell beside the model's settings: `expert_modules`, if others than announced have some;
    and unless the settings are of a YAML with experts, their number, rank and choices for each token."""
    matches = [match for name in tensors if (match := EXPERT_TENSOR.fullmatch(name))]
    model = _build(build_config(settings), False, source)
    in_file, from_yaml = {find_our_name(match["module"]) for match in matches}, "expert_modules" in settings
    modules = sorted(name for name in matching_linear_names(model, "*") if name in in_file)
    announced = matching_linear_names(model, settings.get("expert_modules", MEMORY_ATTENTION_PROJECTIONS))
    result: dict[str, Any] = {"expert_modules": modules} if modules and modules != sorted(announced) else {}
    if from_yaml:
        if result:
            logger.warning(f"{source}: {len(modules)} modules have experts, but the YAML has them in {len(announced)}.")
        return result
    down = [tensors[match[0]] for match in matches if match["matrix"] == "down"]
    num_experts = 1 + max((int(match["index"]) for match in matches), default=0)
    top_k = min(DEFAULT_CONFIG.num_experts_per_tok, num_experts)
    rank = min((tensor.shape[0] for tensor in down if tensor.dim()), default=1)
    logger.warning(
        f"{source}: tensors do not tell `lora_alpha` and `num_experts_per_tok`, which get the defaults "
        f"{DEFAULT_CONFIG.lora_alpha} and {top_k}. Give the YAML of the experts' training (`original_config`, or "
        "`--config` on the command line)."
    )
    return result | {"num_experts": num_experts, "num_experts_per_tok": top_k, "lora_rank": rank}


def _build(config: SamoeConfig, with_experts: bool, source: str) -> Sam2VideoModel:
    try:
        return build_on_meta(config, with_experts)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def _check_tensors(tensors: Mapping[str, Tensor], config: SamoeConfig, has_experts: bool, source: str) -> None:
    """Refuses tensors that are not exactly the original's of a model of this configuration."""
    model = state_dict_to_original(_build(config, has_experts, source).state_dict())
    expected, found = ({without_base_layer(n): t for n, t in named.items()} for named in (model, tensors))
    counts = Counter(map(without_base_layer, tensors))
    twice = [name for name, count in counts.items() if count > 1]
    _check_fit(found, expected, source, {"there with and without base_layer": twice})


def _check_fit(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, more: Mapping[str, list[str]] = {}
) -> None:
    """Refuses tensors of other names, shapes or types than expected, and for `more` reasons."""
    problems = find_mismatches(found, expected) | dict(more)
    problems["of another shape"] = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in problems["of another shape"]
    ]
    reasons = [f"{problem}: {_listed(names)}" for problem, names in problems.items() if names]
    if reasons:
        raise InputError(f"The tensors of {source} do not fit the architecture; {'; '.join(reasons)}.")


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def save_original(
    config: SamoeConfig, state_dict: Mapping[str, Tensor], directory: str | os.PathLike
) -> dict[str, Path]:
    """Writes files that the original loads, of a model's configuration and `state_dict()`.

    Returns:
        kind -> file: "full" (`{"model": …}` with experts), "base" (the same without them), "experts"
        (`{"model_state_dict": …, "config": …}`, as the original's trainers save them), "config" (the YAML).

    Raises:
        InputError: if the base is not SAM 2, the original has no place for some of the experts, among them those of
            domains, or the tensors do not fit the configuration.
    """
    check_base(config, SAM2)
    if config.domains is not None:
        raise InputError(
            "SAM2-MoE has one mixture of experts for all videos, and no gate that chooses a domain's: a model with "
            f"domains ({', '.join(config.domain_names) or 'none at the moment'}) cannot be written for it."
        )
    tensors, stem = _original_tensors(config, state_dict, True)
    attentions = _attentions_with_experts(config, state_dict)
    names = {"full": "_moe.pt", "base": ".pt", "experts": "_moe_experts.pt", "config": "_moe.yaml"}
    files = {kind: Path(directory, stem + name) for kind, name in names.items()}
    Path(directory).mkdir(parents=True, exist_ok=True)
    experts = {name: tensor for name, tensor in tensors.items() if is_expert_name(name)}
    base = {without_base_layer(name): tensor for name, tensor in tensors.items() if name not in experts}
    _save({"model": tensors}, files["full"])
    _save({"model": base}, files["base"])
    _save({"model_state_dict": experts, "config": {"model_config": files["config"].name}}, files["experts"])
    write_yaml(config, attentions, files["config"])
    return files


def save_sam2(config: SamoeConfig, state_dict: Mapping[str, Tensor], directory: str | os.PathLike) -> dict[str, Path]:
    """Writes a checkpoint of `sam2` itself, with its YAML, of a model's configuration and its tensors without experts.

    Returns:
        kind -> file: "base" (`{"model": …}`) and "config".

    Raises:
        InputError: if the base is not SAM 2, or the tensors do not fit the configuration.
    """
    tensors, stem = _original_tensors(config, state_dict, False)
    files = {"base": Path(directory, f"{stem}.pt"), "config": Path(directory, f"{stem}.yaml")}
    Path(directory).mkdir(parents=True, exist_ok=True)
    _save({"model": tensors}, files["base"])
    write_yaml(config, [], files["config"])
    return files


def save_sam3(
    config: SamoeConfig, state_dict: Mapping[str, Tensor], combined: str | os.PathLike, directory: str | os.PathLike
) -> bool:
    """Writes a copy of Meta's combined checkpoint of SAM 3 whose tracker is a model's, of its tensors without experts.

    All else that the file holds stays as it is, to the bit, and so do the types of tensors and the file's name.
    `combined` is Meta's `sam3.pt`, or one that was trained further.

    Returns:
        whether the image encoder, which the detector shares, has other values than there.

    Raises:
        InputError: if the model's base is not SAM 3, or `combined` is no such file, or of another size.
    """
    check_base(config, SAM3)
    content, tensors, names = _open(combined)
    found = {name: tensors[stored].detach() for name, stored in names.items()}
    if not is_sam3(found):
        raise InputError(f"{combined} is no checkpoint of SAM 3; expected Meta's, of detector and tracker.")
    theirs, own = _sam3_tracker(found, str(combined))
    _check_fit(own, state_dict, str(combined))
    if theirs.image_size != config.image_size:
        message = "The model takes frames of %d pixels, and %s those of %d, which it may track less well."
        logger.warning(message, config.image_size, combined, theirs.image_size)
    new = state_dict_into_sam3(state_dict, found)
    encoder_changed = any(".trunk." in name and not torch.equal(x, found[name]) for name, x in new.items())
    tensors |= {names[name]: tensor for name, tensor in new.items()}
    Path(directory).mkdir(parents=True, exist_ok=True)
    _save(content, Path(directory, Path(combined).name))
    return encoder_changed


def save_edgetam(config: SamoeConfig, state_dict: Mapping[str, Tensor], directory: str | os.PathLike) -> None:
    """Writes Meta's `edgetam.pt` of a model's configuration and its tensors without experts; the YAML is Meta's own.

    Raises:
        InputError: if the base is not EdgeTAM, or of another size than the published one.
    """
    tensors = state_dict_to_edgetam(config, state_dict)
    parts = config.enable_temporal_pos_encoding_for_object_pointers, config.enable_occlusion_spatial_embedding
    published = edgetam_config(*parts)
    _check_fit(state_dict, edgetam_tensors(published), "the model")
    if config.image_size != published.image_size:
        message = "The model takes frames of %d pixels, and EdgeTAM by Meta's YAML those of %d."
        logger.warning(message, config.image_size, published.image_size)
    Path(directory).mkdir(parents=True, exist_ok=True)
    _save({"model": {name: x.detach().cpu() for name, x in tensors.items()}}, Path(directory, "edgetam.pt"))


def _original_tensors(
    config: SamoeConfig, state_dict: Mapping[str, Tensor], with_experts: bool
) -> tuple[dict[str, Tensor], str]:
    """A model's tensors under the original's names, and Meta's name for a checkpoint of this family and size."""
    check_base(config, SAM2)
    tensors = state_dict_to_original(state_dict)
    # Through the settings that the YAML can hold, so that nothing else makes the tensors fit.
    written_config = build_config(complete_settings(settings_of(config, with_experts)))
    _check_tensors(tensors, written_config, with_experts, "the model")
    trunk = get_setting(config, f"{TRUNK}hidden_size"), sum(get_setting(config, f"{TRUNK}blocks_per_stage"))
    size, *_ = META_TRUNKS.get(trunk, ("custom",))
    family = "sam2.1" if config.enable_occlusion_spatial_embedding else "sam2"
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}, f"{family}_hiera_{size}"


def _save(content: dict[str, Any], path: Path) -> None:
    try:
        if path.suffix == ".safetensors":  # as the file that it is made from
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, path, {"format": "pt"})
        else:
            torch.save(content, path)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written, the file is too large for the disk or its quota: {error}"
        ) from error


def _attentions_with_experts(config: SamoeConfig, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of the attentions whose every projection has experts; the original can have no others."""
    modules = {name.removesuffix(".lora_A") for name in state_dict if name.endswith(".lora_A")}
    model = build_on_meta(config, with_experts=False)
    projections = {name: set(matching_linear_names(model, projections_of([name]))) for name in ATTENTIONS}
    attentions = [name for name in ATTENTIONS if projections[name] <= modules]
    if others := sorted(modules.difference(*(projections[name] for name in attentions))):
        raise InputError(
            "SAM2-MoE has experts in all projections of all self or all cross attentions of the memory attention, but "
            f"the model has them also in {_listed(others)}."
        )
    return attentions
