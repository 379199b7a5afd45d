"""How a SamoeModel is loaded: what is behind `from_pretrained`."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .adapters import load_adapters
from .base import base_of, needs_renaming
from .base_model import SamoePreTrainedModel, building
from .configuration_samoe import SamoeConfig, check_old_names
from .domain_experts import store_domain_experts
from .domain_files import open_domain_files
from .errors import InputError
from .expert_layer import EXPERT_TENSORS, ExpertMixture, is_expert_parameter
from .quantization import quantize_base, without_load_report
from .trainable import train_experts
from .weights_check import check_values, check_weights
from .weights_files import HUB_ARGUMENTS, open_weights, own_names, resolve_commit
from .weights_io import unchanged_model
from .weights_trained import is_original_checkpoint, load_trained

# As loud as transformers is told to be.
logger = transformers_logging.get_logger(f"transformers.{__name__}")

# What SAM2-MoE's builder calls arguments of `from_pretrained`.
OLD_ARGUMENTS = {"ckpt_path": "pretrained_model_name_or_path", "config_file": "original_config"}

OFFLOADING = (
    "`device_map` {!r} leaves a part of the model on the disk, or in the CPU's memory beside a GPU; expected one that "
    "keeps all of it where it is run. `quantization_config` makes a model smaller."
)


@dataclass
class LoadRequest:
    """What [`~modeling_samoe.SamoeModel.from_pretrained`] is asked for.

    `load_weights` is transformers' own `from_pretrained` of the class; `arguments` are its, and settings.
    """

    load_weights: Callable[..., Any]
    source: str | os.PathLike | None
    config: PreTrainedConfig | str | os.PathLike | None
    experts: str | os.PathLike | None
    original_config: str | os.PathLike | None
    output_loading_info: bool
    ignore_mismatched_sizes: bool
    quantization_config: QuantizationConfigMixin | dict[str, Any] | None
    arguments: dict[str, Any]

    def check(self) -> None:
        """Raises a `ValueError` for an argument with its name elsewhere, or for some that do not go together."""
        for name in OLD_ARGUMENTS.keys() & self.arguments:
            raise InputError(f"`{name}` is called `{OLD_ARGUMENTS[name]}` here.")
        check_old_names(self.arguments)
        if self.source is None and (self.config is None or self.arguments.get("state_dict") is None):
            raise InputError("`pretrained_model_name_or_path` must be given: a folder, a Hub id or an original `.pt`.")
        if self.source is None and self.quantization_config is not None:
            raise InputError("`quantization_config` needs `pretrained_model_name_or_path`, where the full base is.")
        device_map = self.arguments.get("device_map")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise InputError(OFFLOADING.format(device_map))
        if not (self.experts is self.original_config is None or is_original_checkpoint(self.source)):
            raise InputError(
                "`experts` and `original_config` (`--experts` and `--config` of a command) go with an original "
                f"checkpoint, but {str(self.source)!r} is not a file."
            )


@torch.inference_mode(False)  # whose tensors could neither be kept nor trained
def load_model(cls: type[SamoePreTrainedModel], request: LoadRequest) -> tuple[SamoePreTrainedModel, dict[str, Any]]:
    """Loads a model; also gives what was missing and the like."""
    request.check()
    if request.source is None or not os.path.isdir(request.source):
        return _load(cls, request)
    with unchanged_model(os.path.join(request.source, request.arguments.get("subfolder") or "")):
        return _load(cls, request)


def _load(cls: type[SamoePreTrainedModel], request: LoadRequest) -> tuple[SamoePreTrainedModel, dict[str, Any]]:
    source, arguments = request.source, request.arguments
    settings = {n: arguments.pop(n) for n in [*arguments] if n in SamoeConfig.__dataclass_fields__ and n != "dtype"}
    if "expert_modules" in settings:
        settings.setdefault("exclude_modules", None)
    more_experts = request.ignore_mismatched_sizes or "expert_modules" in settings
    device_map = None if request.quantization_config is None else arguments.pop("device_map", None)
    folder = None if is_original_checkpoint(source) else source
    config = copy.deepcopy(request.config)
    if source is not None and folder is None:
        own_config, arguments["state_dict"] = _read_original(request)
        config = own_config if config is None else config
    hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments and folder is not None}
    commit = None if folder is None else resolve_commit(folder, hub)
    if commit is not None:
        hub["revision"] = arguments["revision"] = commit
    config = _read_config(config if config is not None else source, hub)
    saved_size, image_size = config.image_size, settings.pop("image_size", config.image_size)
    for name, value in settings.items():
        setattr(config, name, value)
    if image_size != saved_size:
        try:
            config.resize(image_size)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
    config.check_experts()
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{source} holds quantized weights. Load the full model, and give `quantization_config` to quantize it."
        )
    if folder is not None and config.base_model is not None:
        others = {name: value for name, value in arguments.items() if name not in hub}
        model, new = load_trained(cls, folder, config, hub, others, more_experts)
        info = {"missing_keys": new, "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": set()}
    else:
        model, info, new = _load_whole(cls, request, config, hub, more_experts)
    model.origin.commit, model.origin.image_size = commit, saved_size
    model.built_domains.clear()
    if config.domains and image_size != saved_size:
        message = "The gate has learned domains on frames of %d pixels; on %d it may take a video for another's."
        logger.warning(message, saved_size, image_size)
    if new and not request.output_loading_info:
        message = "%d expert tensors are not in %s: they are new, and have no effect until they are trained."
        logger.warning(message, len(new), source or "the given tensors")
    if request.quantization_config is not None:
        quantize_base(model, request.quantization_config, device_map)
    if folder is not None:
        load_adapters(model, folder, config.adapters, hub)
    return model, info


def _load_whole(
    cls: type[SamoePreTrainedModel], request: LoadRequest, config: SamoeConfig, hub: dict[str, Any], more_experts: bool
) -> tuple[SamoePreTrainedModel, dict[str, Any], set[str]]:
    """Loads a model from files that hold all of it but experts, or from the tensors of an original checkpoint."""
    source, arguments = request.source, request.arguments
    base, variant = base_of(config), arguments.get("variant")
    found, stored, renamed = arguments.get("state_dict"), None, {}
    lenient, files, late = more_experts or request.ignore_mismatched_sizes, {}, None
    if found is None:
        assert source is not None  # without a source there are tensors
        stored = open_weights(source, hub, variant)
        found = stored.headers
        if needs_renaming(base, found):  # such as SAM 3's tracker among its detector
            renamed = own_names(base, source, found)
            found = {own: stored.headers[name] for own, name in renamed.items()}
        files = open_domain_files(source, hub, config.domains or (), stored, variant)
        late = None if lenient else files
        for file in files.values() if lenient else ():
            found = {**found, **file.headers()}
    new_layers = check_weights(source, found, config, more_experts, request.ignore_mismatched_sizes, late, cls)
    if stored is not None and renamed:
        arguments["state_dict"] = {own: stored.read(name) for own, name in renamed.items()}
    if not all(tensor.numel() for tensor in found.values()):
        arguments["disable_mmap"] = True  # safetensors' reader for Windows and Apple's GPUs fails for empty tensors
    domains = None if stored is None or "state_dict" in arguments else config.domains
    with building, without_load_report():
        # What does not fit are experts that give place to new ones.
        model, info = request.load_weights(
            None if "state_dict" in arguments else source,
            config=config.without_domain_experts() if domains else config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **arguments,
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise InputError(OFFLOADING.format(arguments.get("device_map")))
    _align_memory(model)
    new = {f"{layer}.{tensor}" for layer in new_layers for tensor in EXPERT_TENSORS}
    for layer in map(model.get_submodule, () if domains else new_layers):
        # Within the vision encoder, transformers leaves them uninitialized.
        assert isinstance(layer, ExpertMixture)
        layer.reset_experts()
    if (gate := model.domain_gate) is not None:  # with another `dtype`, transformers makes its integers float32 too
        gate.names, gate.counts = gate.names.long(), gate.counts.long()
        if gate.means.device.type == "mps":  # by `device_map`
            gate.cpu()
    check_values(source, model)
    train_experts(model)
    if domains and stored is not None:
        store_domain_experts(model, domains, files, new_layers)
        info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not is_expert_parameter(name)}
        info["missing_keys"] = {*info["missing_keys"], *new}
    if source is not None:
        # What to load it from again: a Hub id with its commit, local files by their absolute paths.
        original_config = request.original_config
        model.origin.source = {
            "name_or_path": os.path.abspath(source) if os.path.exists(source) else str(source),
            "revision": arguments.get("revision"),
            "subfolder": arguments.get("subfolder") or None,
            "original_config": None if original_config is None else os.path.abspath(original_config),
        }
    return model, info, new


def _read_config(config: PreTrainedConfig | str | os.PathLike | None, hub: dict[str, Any]) -> SamoeConfig:
    """The configuration of a folder or Hub id, or one that was read already."""
    if isinstance(config, SamoeConfig):
        return config
    if isinstance(config, PreTrainedConfig):
        # A base's own, or the same class of a folder's own code, which transformers loads once more.
        return SamoeConfig.from_dict(config.to_dict())
    return SamoeConfig.from_pretrained(config, **hub)


def _read_original(request: LoadRequest) -> tuple[SamoeConfig, dict[str, Tensor]]:
    source = request.source
    assert source is not None
    try:
        from samoe_hf.original.checkpoint import load_original
    except ImportError as error:
        raise ImportError(f"{source} is an original checkpoint, which only the package samoe_hf reads.") from error
    return load_original(source, request.experts, request.original_config)


def _align_memory(model: nn.Module) -> None:
    """Moves weights on the CPU that were mapped from a file at odd addresses, where kernels add up in another order, so
    that a saved model gives the same output to the bit."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
