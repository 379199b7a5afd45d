"""How a SamoeModel is loaded and saved: what is behind `from_pretrained`, `save_pretrained` and `push_to_hub`."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import PROCESSOR_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters import active_adapters, adapters_aside, load_adapters, save_adapters, without_adapters
from .base import base_of, needs_renaming
from .base_model import SamoePreTrainedModel
from .configuration_samoe import SamoeConfig, check_old_names
from .errors import InputError
from .expert_layer import EXPERT_TENSORS, is_expert_parameter
from .processing_samoe import VideoProcessor, build_processor
from .quantization import check_not_quantized, quantize_base, without_load_report
from .trainable import set_trainable
from .weights_files import own_headers, read_headers, read_own_tensors
from .weights_io import updated_folder
from .weights_trained import (
    HUB_ARGUMENTS,
    check_finite,
    check_not_its_base,
    check_weights,
    is_original_checkpoint,
    load_trained,
    resolve_commit,
    save_trained,
)

# As loud as transformers is told to be.
logger = transformers_logging.get_logger(f"transformers.{__name__}")

_NEW_EXPERTS = "%d expert tensors are not in %s: they are new, and have no effect until they are trained."
# What SAM2-MoE's builder calls arguments of `from_pretrained`.
OLD_ARGUMENTS = {"ckpt_path": "pretrained_model_name_or_path", "config_file": "original_config"}
# What `output_loading_info` tells of.
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load_model(
    cls: type[SamoePreTrainedModel],
    load_weights: Callable[..., Any],
    source: str | os.PathLike | None,
    config: PreTrainedConfig | str | os.PathLike | None,
    experts: str | os.PathLike | None,
    original_config: str | os.PathLike | None,
    ignore_mismatched_sizes: bool,
    quantization_config: QuantizationConfigMixin | dict[str, Any] | None,
    kwargs: dict[str, Any],
) -> tuple[SamoePreTrainedModel, dict[str, Any]]:
    """Loads a model; see [`~modeling_samoe.SamoeModel.from_pretrained`] for its arguments.

    Args:
        load_weights: transformers' own `from_pretrained` of `cls`.

    Returns:
        the model, and what was missing and the like.
    """
    _check_given(source, config, (experts, original_config), quantization_config, kwargs)
    settings = {n: kwargs.pop(n) for n in [*kwargs] if n in SamoeConfig.__dataclass_fields__ and n != "dtype"}
    more_experts = ignore_mismatched_sizes or "expert_modules" in settings
    device_map = None if quantization_config is None else kwargs.pop("device_map", None)
    is_original = is_original_checkpoint(source)
    hub: dict[str, Any] = {}
    if source is not None and is_original:
        stored_config, kwargs["state_dict"] = _read_original(source, experts, original_config)
        config = stored_config if config is None else copy.deepcopy(config)
    elif source is not None:
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if (commit := resolve_commit(source, hub)) is not None:
            hub["revision"] = kwargs["revision"] = commit
    own_config = _read_config(source if config is None else copy.deepcopy(config), hub)
    for name, value in settings.items():
        setattr(own_config, name, value)
    own_config.check_experts()
    check_not_quantized(source, own_config)
    if own_config.base_model is not None and source is not None and not is_original:
        others = {name: value for name, value in kwargs.items() if name not in hub}
        model, new = load_trained(cls, source, own_config, hub, others, more_experts)
        info = {name: set() for name in LOADING_INFO} | {"missing_keys": new}
    else:
        new_layers = _check_stored(source, own_config, hub, kwargs, more_experts, ignore_mismatched_sizes)
        model, info = _load_checked(load_weights, source, new_layers, {"config": own_config, **kwargs})
        new = {f"{layer}.{tensor}" for layer in new_layers for tensor in EXPERT_TENSORS}
        if source is not None:
            model.origin.source = _describe_source(source, kwargs, original_config)
    if quantization_config is not None:
        quantize_base(model, quantization_config, device_map)
    if source is not None and not is_original:
        load_adapters(model, source, own_config.adapters, hub)
    return model, info


def warn_of_new_experts(source: str | os.PathLike | None, info: Mapping[str, Any]) -> None:
    """Logs one line if experts are not in what was loaded."""
    if new := [name for name in info["missing_keys"] if is_expert_parameter(name)]:
        logger.warning(_NEW_EXPERTS, len(new), source or "the given tensors")


def _load_checked(
    load_weights: Callable[..., Any],
    source: str | os.PathLike | None,
    new_layers: Sequence[str],
    kwargs: dict[str, Any],
) -> tuple[SamoePreTrainedModel, dict[str, Any]]:
    """Loads weights that [`check_weights`] has found to fit, and gives some layers new experts."""
    with without_load_report():
        # What does not fit are experts that give place to new ones.
        # Tensors of an original checkpoint and of SAM 3's combined one are `state_dict`.
        folder = None if "state_dict" in kwargs else source
        model, info = load_weights(folder, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
    _align_memory(model)
    for name in new_layers:
        # Within the vision encoder, transformers leaves them uninitialized.
        model.get_submodule(name).reset_experts()
    check_finite(source, model)
    set_trainable(model, "experts")
    return model, info


def save_model(
    model: SamoePreTrainedModel,
    save_weights: Callable[..., Any],
    directory: str | os.PathLike,
    experts_only: bool,
    state_dict: dict[str, Tensor] | None,
    processor: VideoProcessor | None,
    base_model: str | None,
    kwargs: dict[str, Any],
) -> None:
    """Writes a model to a folder; see [`~modeling_samoe.SamoeModel.save_pretrained`].

    Args:
        save_weights: transformers' own `save_pretrained` of the model.
    """
    if experts_only:
        check_not_its_base(model, directory)
    model.config.adapters = active_adapters(model)
    state_dict = without_adapters(model.state_dict() if state_dict is None else state_dict)
    is_main_process = kwargs.get("is_main_process", True)
    if not is_main_process and experts_only:
        return
    with updated_folder(directory) as folder:
        if experts_only:
            save_trained(model, folder, state_dict, base_model)
            if processor is None and not Path(directory, PROCESSOR_NAME).exists():
                processor = build_processor(model.config)
        else:
            with adapters_aside(model):
                save_weights(folder, state_dict=state_dict, **kwargs)
        if is_main_process:
            save_adapters(model, folder)
        if processor is not None:
            processor.save_pretrained(folder)


def saves_experts_only(model: SamoePreTrainedModel, experts_only: bool | None) -> bool:
    """Whether only what was trained is saved: as the user says, or by default where the base is quantized."""
    is_quantized = bool(model.origin.quantized)
    if experts_only is False and is_quantized:
        raise InputError("`experts_only` must be True where the base is quantized: what was trained is saved alone.")
    return is_quantized if experts_only is None else experts_only


def _read_config(config: PreTrainedConfig | str | os.PathLike, hub: dict[str, Any]) -> SamoeConfig:
    """The configuration of a folder or Hub id, or one that was read already."""
    if isinstance(config, SamoeConfig):
        return config
    if isinstance(config, PreTrainedConfig):
        # A base's own, or the same class of a folder's own code, which transformers loads once more.
        return SamoeConfig.from_dict(config.to_dict())
    return SamoeConfig.from_pretrained(config, **hub)


def _check_stored(
    source: str | os.PathLike | None,
    config: SamoeConfig,
    hub: dict[str, Any],
    arguments: dict[str, Any],
    more_experts: bool,
    any_experts: bool,
) -> list[str]:
    """Compares the tensors that are to be loaded with a configuration, see [`check_weights`].

    Those that have other names than the model's, such as SAM 3's tracker among its detector, are then read, as
    `state_dict` of the `arguments`.
    """
    variant, found = arguments.get("variant"), arguments.get("state_dict")
    if found is None:
        found = read_headers(source, hub, variant)
    base = base_of(config)
    has_other_names = needs_renaming(base, found)
    own = own_headers(base, source, found) if has_other_names else found
    new_layers = check_weights(source, own, config, more_experts, any_experts)
    if has_other_names:
        arguments["state_dict"] = read_own_tensors(base, source, hub, variant)
    return new_layers


def _check_given(
    source: Any, config: Any, of_original: tuple, quantization_config: Any, others: Mapping[str, Any]
) -> None:
    """Raises a `ValueError` for an argument of `from_pretrained` with its name elsewhere, or if nothing is given."""
    for name in OLD_ARGUMENTS.keys() & others:
        raise InputError(f"`{name}` is called `{OLD_ARGUMENTS[name]}` here.")
    check_old_names(others)
    if source is None and config is None:
        raise InputError("`pretrained_model_name_or_path` must be given: a folder, a Hub id or an original `.pt`.")
    if source is None and quantization_config is not None:
        raise InputError("`quantization_config` needs `pretrained_model_name_or_path`, where the full base is.")
    if of_original != (None, None) and not is_original_checkpoint(source):
        raise InputError(
            f"`experts` and `original_config` go with an original checkpoint, but {str(source)!r} is not a file."
        )


def _read_original(
    source: str | os.PathLike, experts: str | os.PathLike | None, original_config: str | os.PathLike | None
) -> tuple[SamoeConfig, dict[str, Tensor]]:
    try:
        from samoe_hf.original.checkpoint import load_original
    except ImportError as error:
        raise ImportError(f"{source} is an original checkpoint, which only the package samoe_hf reads.") from error
    return load_original(source, experts, original_config)


def _describe_source(
    source: str | os.PathLike, arguments: dict[str, Any], original_config: str | os.PathLike | None
) -> dict[str, str | None]:
    """What to load a model from again: a Hub id with its commit, local files by their absolute paths."""
    return {
        "name_or_path": os.path.abspath(source) if os.path.exists(source) else str(source),
        "revision": arguments.get("revision"),
        "subfolder": arguments.get("subfolder") or None,
        "original_config": None if original_config is None else os.path.abspath(original_config),
    }


def _align_memory(model: nn.Module) -> None:
    """Moves weights on the CPU that were mapped from a file at odd addresses, where kernels add up in another order.

    So a model that was saved and loaded gives the same output to the bit.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
