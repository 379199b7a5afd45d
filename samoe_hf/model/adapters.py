"""Ordinary LoRA adapters of PEFT beside the experts: named, saved and loaded with the model.

Saved, each adapter is a PEFT folder of its name within the model's folder; the model's own tensors keep the names that
they have without adapters, and the configuration's `adapters` says which there are and which of them are active.
Folders of adapters that it does not name are left alone. PEFT is needed only where there are adapters.
"""

import copy
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    cached_file,
    check_peft_version,
    requires_backends,
)

from .base_model import SamoePreTrainedModel, build_on_meta
from .domain_experts import DomainLinear
from .errors import InputError
from .expert_layer import ExpertLinear
from .weights_files import fetch_file

if TYPE_CHECKING:
    try:  # noqa: SIM105  # what remote code imports elsewhere, transformers asks for
        from peft import LoraConfig, PeftConfig
    except ImportError:
        pass

# What PEFT puts before the names of the base model's modules.
PREFIX = "base_model.model."
# Initializations that leave the base model's weights as they are.
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
# Tuners of PEFT that add to the output of the layer that they lie around, so that its experts are kept, also when they
# are merged. Others compute it from the base layer's weight alone, or scale it.
ADDITIVE_TUNERS = (
    "adalora", "beft", "delora", "fourierft", "gralora", "hira", "lily", "loha", "lokr", "lora", "miss", "osf",
    "peanut", "psoft", "pvera", "randlora", "tinylora", "unilora", "vblora", "vera", "waveft",
)  # fmt: skip
# What lies within layers with experts and is no layer of the base model.
PARTS_OF_EXPERT_LAYERS = ("router", "router_logits", "dropout", r"domain_[\w-]+")
LAYER_NAME = re.compile(r"\^?[\w.-]+")
# Names of folders that Trainer does not upload are no names of adapters.
ADAPTER_NAME = re.compile(r"(?!_|checkpoint-|domains$)[\w-]+")


# PEFT before takes experts for adapters of its own.
LEAST_PEFT = "0.21.0"


def _peft(module: str = "peft") -> ModuleType:
    """PEFT, which is slow to import; an `InputError` if it is too old. Whatever remote code imports by a statement,
    transformers asks for at once."""
    requires_backends(_peft, "peft")
    for least in (LEAST_PEFT, MIN_PEFT_VERSION):
        try:
            check_peft_version(least)
        except ValueError as error:
            has = f"transformers {transformers_version} and peft {version('peft')} are"
            raise InputError(f"Adapters need peft {least} or later, but {has} installed.") from error
    return import_module(module)


def is_adapter_parameter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter; experts' names end in `lora_A` and `lora_B`."""
    return re.search(r"\.(lora_\w+|modules_to_save)\.", name) is not None


def base_name(name: str) -> str:
    """The name that a tensor has without adapters, which PEFT wraps around its module."""
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", name)


def plain_name(name: str) -> str:
    """The name that a parameter has in files: without adapters, and where rows of it are frozen, without that."""
    return re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", base_name(name))


def without_adapters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model itself, under the names that they have without adapters."""
    return {base_name(name): tensor for name, tensor in state_dict.items() if not is_adapter_parameter(name)}


def to_wrapped_names(model: nn.Module, state_dict: dict[str, Tensor], *_) -> None:
    """A `load_state_dict` pre-hook, so that tensors under their names without adapters find their modules."""
    for name, _ in itertools.chain(model.named_parameters(), model.named_buffers()):
        name = name.replace(".parametrizations.", ".").removesuffix(".original")
        if (plain := base_name(name)) != name and plain in state_dict:
            state_dict[name] = state_dict.pop(plain)


def adapter_names(model: SamoePreTrainedModel) -> list[str]:
    """Names of the model's adapters."""
    return list(getattr(model, "peft_config", {}))


def active_adapters(model: SamoePreTrainedModel) -> dict[str, bool] | None:
    """Name of each adapter -> whether it is used; None if there is none."""
    names = adapter_names(model)
    layers = tuner_layers(model) if names else ()
    active = next(([] if layer.disable_adapters else layer.active_adapters for _, layer in layers), [])
    return {name: name in active for name in names} or None


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of PEFT's adapters in a model. PEFT is not imported where nobody has done so, since it is slow."""
    if "peft" in sys.modules:
        tuner_layer = _peft("peft.tuners.tuners_utils").BaseTunerLayer
        yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, tuner_layer))


def check_adapters_can_be_saved(model: SamoePreTrainedModel) -> None:
    """Refuses adapters of other kinds than LoRA, or with settings that change others' tensors."""
    for name in adapter_names(model):
        config: Any = model.peft_config[name]
        suitable_adapter(model, config, name)


def is_lora(config: "PeftConfig") -> "TypeGuard[LoraConfig]":
    """Whether an adapter is a LoRA."""
    return isinstance(config, _peft().LoraConfig)


def suitable_adapter(model: SamoePreTrainedModel, config: "PeftConfig", name: str) -> "LoraConfig":
    """A copy of an adapter's configuration that leaves out what lies within layers with experts; refuses others than
    LoRAs."""
    check_adapter_name(name)
    if not is_lora(config):
        raise InputError(f"`adapter_config` must be a LoraConfig, got {type(config).__name__}.")
    if odd := odd_settings(config, ("layer_replication", "megatron_config")):
        raise InputError(f"`adapter_config` must leave the base model's tensors as they are, got {odd}.")
    config = copy.deepcopy(config)
    targets = config.target_modules
    if config.exclude_modules is None and isinstance(targets, str):
        layers = ((name, model.get_submodule(name)) for name in model.expert_module_names)
        inner = (f"{name}.{part}" for name, layer in layers for part, _ in layer.named_modules() if part)
        if targets == "all-linear" or any(re.fullmatch(targets, name) for name in inner):
            config.exclude_modules = rf".*\.({'|'.join(PARTS_OF_EXPERT_LAYERS)})"
    return config


def odd_settings(config: "LoraConfig", unsupported: Sequence[str]) -> str:
    """The settings of a LoRA that change the base model's tensors, and those among `unsupported` that are set."""
    odd = [setting for setting in unsupported if getattr(config, setting, None)]
    odd += [] if config.bias == "none" else ["bias"]
    odd += [] if config.init_lora_weights in PLAIN_INITIALIZATIONS else ["init_lora_weights"]
    return ", ".join(f"{setting}={getattr(config, setting)!r}" for setting in odd)


def check_adapter_name(name: str) -> None:
    """Raises a `ValueError` for a name that cannot be a folder's beside the model's files."""
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise InputError(
            "`adapter_name` must be of letters, digits, _ and -, as a folder's name, not `domains`, and begin neither "
            f"with _ nor with checkpoint-, got {name!r}."
        )


@contextmanager
def adapters_aside(model: SamoePreTrainedModel) -> Iterator[None]:
    """While the context is open, transformers' `save_pretrained` writes the model, and not its adapters alone."""
    has_adapters, model._hf_peft_config_loaded = model._hf_peft_config_loaded, False
    try:
        yield
    finally:
        model._hf_peft_config_loaded = has_adapters


def save_adapters(model: SamoePreTrainedModel, directory: str | os.PathLike) -> None:
    """Writes each adapter of a model to a folder of its name in `directory`, as PEFT does."""
    check_adapters_can_be_saved(model)
    for name in adapter_names(model):
        folder = Path(directory, name)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.copy(model.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(folder)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(model, name).items()}
        save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapters(
    model: SamoePreTrainedModel, source: str | os.PathLike, active: Mapping[str, bool] | None, hub: Mapping[str, Any]
) -> None:
    """Loads the adapters that lie beside a model in a folder or Hub id, frozen; `active`: name of each -> whether it is
    used."""
    if not active:
        return
    for name in active:
        check_adapter_name(name)  # before it becomes part of a path
    for name in active:
        subfolder = "/".join(filter(None, [hub.get("subfolder"), name]))
        load_adapter(model, source, name, {**hub, "subfolder": subfolder})
    model.set_adapter([name for name in active if active[name]])
    for name in active:
        train_adapter(model, name, False)


def train_adapter(model: SamoePreTrainedModel, name: str, is_trainable: bool) -> None:
    """Whether an adapter is trained; others stay as they are."""
    own = re.compile(rf".*\.(lora_\w+|modules_to_save)\.{re.escape(name)}(\..*)?")
    for key, parameter in model.named_parameters():
        if own.fullmatch(key):
            parameter.requires_grad_(is_trainable)


def load_adapter(model: SamoePreTrainedModel, source: str | os.PathLike, name: str, hub: Mapping[str, Any]) -> None:
    """Loads one adapter of a PEFT folder or Hub repository; see [`put_adapter`]."""
    config = read_adapter_config(source, hub)
    where = "/".join(filter(None, [str(source), hub.get("subfolder")]))
    put_adapter(model, where, name, config, read_adapter_tensors(source, hub))


def put_adapter(
    model: SamoePreTrainedModel,
    source: Any,
    name: str,
    config: "PeftConfig | dict[str, Any]",
    tensors: Mapping[str, Tensor],
) -> None:
    """Puts an adapter into a model under a name, as a new one or in place of the one of that name.

    Tensors that are not those of its configuration on this model, or not finite, are an `InputError`.
    """
    settings = _peft().PeftConfig.from_peft_type(**config) if isinstance(config, dict) else copy.copy(config)
    name_layers(source, settings, tensors)
    is_new = name not in adapter_names(model)
    expected = _shapes_on(model, source, settings, name) if is_new else _shapes(_tensors(model, name))
    found = _shapes(tensors)
    if found != expected:
        odd = min(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise InputError(
            f"The adapter {source} does not fit the model: {odd!r} should be {expected.get(odd, 'absent')}, and is "
            f"{found.get(odd, 'absent')}."
        )
    if infinite := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"The adapter {source} has NaN or infinite values in {min(infinite)!r}.")
    if is_new:
        with _refusing_settings(source):
            model.add_adapter(settings, name)
    # Within the model, names have no prefix, which PEFT looks for those of `modules_to_save` without.
    own = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    _peft().set_peft_model_state_dict(model, own, adapter_name=name)


def name_layers(source: Any, config: "PeftConfig", tensors: Mapping[str, Tensor]) -> None:
    """Puts the names of an adapter's layers, which its tensors tell, in the place of expressions, which may never
    end."""
    if not is_lora(config):
        return  # it is refused
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, setting, None) or {}
        if odd := [key for key in patterns if not (isinstance(key, str) and LAYER_NAME.fullmatch(key))]:
            raise InputError(f"The adapter {source} has {setting!r} for {odd[0]!r}; expected names of layers.")
    settings: Any = config
    if isinstance(settings.target_modules, str) or settings.layers_to_transform is not None:
        owners = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key}
        settings.target_modules, settings.exclude_modules = owners, None
        settings.layers_to_transform = settings.layers_pattern = None


def check_adapters_on_experts(model: nn.Module) -> None:
    """Raises a `ValueError` if an adapter lies around a layer with experts and would drop or scale what they add."""
    for name, layer in tuner_layers(model):
        if isinstance(layer.get_base_layer(), ExpertLinear | DomainLinear):
            tuner = type(layer).__module__.split(".")[2]
            variants = [type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()]
            if tuner not in ADDITIVE_TUNERS or variants:
                kind = variants[0] if variants else tuner.upper()
                raise InputError(
                    f"{kind} cannot be put around {name!r}, which has experts: it would drop or scale what they add. "
                    "Use a plain LoRA, or leave such layers out of `target_modules`."
                )


def read_adapter_config(source: str | os.PathLike, hub: Mapping[str, Any]) -> "PeftConfig":
    """The configuration of a PEFT folder or Hub repository; `hub` says how it is fetched."""
    # For its errors, which tell a missing file from no connection.
    fetch_file(source, ADAPTER_CONFIG_NAME, hub, is_needed=True)
    try:
        return _peft().PeftConfig.from_pretrained(str(source), **hub)
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"The {ADAPTER_CONFIG_NAME} of {source} is none that this PEFT reads: {error}") from error


def read_adapter_tensors(source: str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a PEFT folder or Hub repository, of safetensors alone."""
    path = cached_file(source, ADAPTER_SAFE_WEIGHTS_NAME, **hub)
    assert path is not None  # else it raises
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


@contextmanager
def _refusing_settings(source: Any) -> Iterator[None]:
    """Turns what PEFT raises for settings of a wrong type into a `ValueError` that names the adapter."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, re.error) as error:
        raise InputError(f"The adapter {source} has settings that do not fit the model: {error}") from error


def _shapes_on(model: SamoePreTrainedModel, source: Any, config: "PeftConfig", name: str) -> dict[str, tuple[int, ...]]:
    """What tensors a new adapter would have on a model; no memory is allocated, whatever its configuration says."""
    probe = build_on_meta(model.config)
    with _refusing_settings(source):
        config = suitable_adapter(model, config, name)
        config.init_lora_weights = True
        with torch.device("meta"):
            _peft().inject_adapter_in_model(config, probe, name)
        check_adapters_on_experts(probe)
        return _shapes(_tensors(probe, name))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names in files."""
    tensors = _peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
