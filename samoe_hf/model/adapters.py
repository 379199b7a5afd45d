"""Ordinary LoRA adapters of PEFT beside the experts: named, saved and loaded with the model.

Saved, each adapter is a PEFT folder of its name within the model's folder; the model's own tensors keep the names that
they have without adapters, and the configuration's `adapters` says which there are and which of them are active.
Folders of adapters that it does not name are left alone, and not read.

PEFT is needed where there are adapters, not for models without them.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    cached_file,
    is_peft_available,
    requires_backends,
)

from .sam2_modules import build_on_meta

if is_peft_available():
    from peft import (
        LoraConfig,
        PeftConfig,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        set_peft_model_state_dict,
    )
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

if TYPE_CHECKING:
    from .modeling_samoe import SamoeModel

# What PEFT puts before the names of the base model's modules.
PREFIX = "base_model.model."
# Initializations that leave the base model's weights as they are.
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
# What lies within layers with experts and is no layer of the base model.
WITHIN_EXPERTS = ("router", "router_logits", "dropout")
# Names of folders that Trainer does not upload are no names of adapters.
_NAME = re.compile(r"(?!_|checkpoint-)[\w-]+")


class AdapterMixin:
    """The methods of a SamoeModel that concern adapters, in place of those of transformers' `PeftAdapterMixin`."""

    def add_adapter(self, adapter_config: "PeftConfig", adapter_name: str | None = None) -> None:
        """Adds a LoRA of PEFT, trainable and active; experts and whatever else is trainable stay so.

        Raises:
            ValueError: if it is no LoRA or changes the base's tensors, there is one of that name, or no layer matches.
        """
        requires_backends(self, "peft")
        check_adapter(adapter_config, adapter_name or "default")
        _keep_out_of_routers(self, adapter_config)
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            super().add_adapter(adapter_config, adapter_name)
        finally:
            self._hf_peft_config_loaded = bool(adapter_names(self))
            for parameter in trainable:
                parameter.requires_grad_(True)
        self.train(self.training)

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike,
        adapter_name: str | None = None,
        is_trainable: bool = False,
        **hub,
    ) -> None:
        """Loads a LoRA of PEFT, and makes it active; `hub` says how it is fetched.

        Raises:
            ValueError: if it does not fit the model.
        """
        name = adapter_name or "default"
        load_adapter(self, peft_model_id, name, hub)
        for key, parameter in self.named_parameters():
            if f".{name}." in key and is_adapter_parameter(key):
                parameter.requires_grad_(is_trainable)


def is_adapter_parameter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter; experts' names end in `lora_A` and `lora_B`."""
    return re.search(r"\.(lora_\w+|modules_to_save)\.", name) is not None


def base_name(name: str) -> str:
    """The name that a tensor has without adapters, which PEFT wraps around its module."""
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", name)


def without_adapters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model itself, under the names that they have without adapters."""
    return {base_name(name): tensor for name, tensor in state_dict.items() if not is_adapter_parameter(name)}


def to_wrapped_names(model: "SamoeModel", state_dict: dict[str, Tensor], *_) -> None:
    """A `load_state_dict` pre-hook, so that tensors under their names without adapters find their place."""
    for name in [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]:
        if (plain := base_name(name)) != name and plain in state_dict:
            state_dict[name] = state_dict.pop(plain)


def adapter_names(model: "SamoeModel") -> list[str]:
    """Names of the model's adapters."""
    return list(getattr(model, "peft_config", {}))


def active_adapters(model: "SamoeModel") -> dict[str, bool] | None:
    """Name of each adapter -> whether it is used; None if there is none."""
    names = adapter_names(model)
    active = model.active_adapters() if names else []
    return {name: name in active for name in names} or None


def adapter_state(module: nn.Module) -> str:
    """What adapters within a module do beside their tensors: which are in use, and their scales."""
    if not is_peft_available():
        return ""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)}
    return str([(n, m.active_adapters, m.disable_adapters, getattr(m, "scaling", None)) for n, m in layers.items()])


def check_adapter(config: "PeftConfig", name: str) -> None:
    """Raises a `ValueError` for an adapter that cannot be saved with the model."""
    check_adapter_name(name)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"`adapter_config` must be a LoraConfig, got {type(config).__name__}.")
    odd = [setting for setting in ("layer_replication", "megatron_config") if getattr(config, setting, None)]
    odd += [] if config.bias == "none" else ["bias"]
    odd += [] if config.init_lora_weights in PLAIN_INITIALIZATIONS else ["init_lora_weights"]
    if odd:
        settings = ", ".join(f"{setting}={getattr(config, setting)!r}" for setting in odd)
        raise ValueError(f"`adapter_config` must leave the base model's tensors as they are, got {settings}.")


def check_adapter_name(name: str) -> None:
    """Raises a `ValueError` for a name that cannot be a folder's beside the model's files."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            "`adapter_name` must be of letters, digits, _ and -, as a folder's name, and begin neither with _ nor with "
            f"checkpoint-, got {name!r}."
        )


def _keep_out_of_routers(model: "SamoeModel", config: "LoraConfig") -> None:
    """Excludes what lies within layers with experts where an expression in `target_modules` matches it."""
    targets = config.target_modules
    if config.exclude_modules is None and isinstance(targets, str):
        inner = (f"{name}.{child}" for name in model.expert_names for child in WITHIN_EXPERTS)
        if targets == "all-linear" or any(re.fullmatch(targets, name) for name in inner):
            config.exclude_modules = rf".*\.({'|'.join(WITHIN_EXPERTS)})"


@contextmanager
def adapters_aside(model: "SamoeModel") -> Iterator[None]:
    """While the context is open, transformers' `save_pretrained` writes the model, and not its adapters alone."""
    has_adapters, model._hf_peft_config_loaded = model._hf_peft_config_loaded, False
    try:
        yield
    finally:
        model._hf_peft_config_loaded = has_adapters


def save_adapters(model: "SamoeModel", directory: str | os.PathLike) -> None:
    """Writes each adapter of a model to a folder of its name in `directory`, as PEFT does."""
    for name in adapter_names(model):
        folder = Path(directory, name)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.copy(model.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(folder)
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(model, name).items()}
        save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapters(
    model: "SamoeModel", source: str | os.PathLike, active: Mapping[str, bool] | None, hub: Mapping[str, Any]
) -> None:
    """Loads the adapters that lie beside a model.

    Args:
        source: folder or Hub id of the model.
        active: name of each adapter -> whether it is used.
        hub: how to fetch it.
    """
    if not active:
        return
    for name in active:
        check_adapter_name(name)  # before it becomes part of a path
    for name in active:
        subfolder = "/".join(filter(None, [hub.get("subfolder"), name]))
        load_adapter(model, source, name, {**hub, "subfolder": subfolder})
    model.set_adapter([name for name in active if active[name]])
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            parameter.requires_grad_(False)


def load_adapter(model: "SamoeModel", source: str | os.PathLike, name: str, hub: Mapping[str, Any]) -> None:
    """Loads one adapter of PEFT under a name, as a new one or in place of the one of that name.

    Raises:
        ValueError: if its tensors are not those of its configuration on this model.
        ImportError: if PEFT is not installed.
    """
    requires_backends(model, "peft")
    config = read_adapter_config(source, hub)
    tensors = read_adapter_tensors(source, hub)
    is_new = name not in adapter_names(model)
    expected = _shapes_on(model, config, name) if is_new else _shapes(_tensors(model, name))
    found = _shapes(tensors)
    if found != expected:
        odd = min(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise ValueError(
            f"The adapter {source} does not fit the model: {odd!r} should be {expected.get(odd, 'absent')}, and is "
            f"{found.get(odd, 'absent')}."
        )
    if is_new:
        model.add_adapter(config, name)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def read_adapter_config(source: str | os.PathLike, hub: Mapping[str, Any]) -> "PeftConfig":
    """The configuration of a PEFT folder or Hub repository; `hub` says how it is fetched."""
    # For its errors, which tell a missing file from no connection.
    cached_file(source, ADAPTER_CONFIG_NAME, **hub)
    try:
        return PeftConfig.from_pretrained(str(source), **hub)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"The {ADAPTER_CONFIG_NAME} of {source} is none that this PEFT reads: {error}") from error


def read_adapter_tensors(source: str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a PEFT folder or Hub repository, of safetensors alone."""
    path = cached_file(source, ADAPTER_SAFE_WEIGHTS_NAME, **hub)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _shapes_on(model: "SamoeModel", config: "PeftConfig", name: str) -> dict[str, tuple[int, ...]]:
    """What tensors a new adapter would have on a model; no memory is allocated, whatever its configuration says."""
    check_adapter(config, name)
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    _keep_out_of_routers(model, config)
    probe = build_on_meta(model.config, with_experts=True)
    with torch.device("meta"):
        inject_adapter_in_model(config, probe, name)
    return _shapes(_tensors(probe, name))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names in files."""
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
