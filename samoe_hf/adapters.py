"""Ordinary LoRA adapters of PEFT beside the experts: named, saved and loaded with the model.

Saved, each adapter is a PEFT folder of its name within the model's folder; the model's own tensors keep the names that
they have without adapters, and the configuration's `adapters` says which there are and which of them are active.
"""

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

if TYPE_CHECKING:
    from .modeling_samoe import SamoeModel

# What PEFT puts before the names of the base model's modules.
PREFIX = "base_model.model."


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


def check_adapter(model: "SamoeModel", config: PeftConfig, name: str) -> None:
    """Raises a `ValueError` for an adapter that cannot be saved with the model."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"`adapter_config` must be a LoraConfig, got {type(config).__name__}.")
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"`adapter_name` must be of letters, digits, _ and -, as a folder's name, got {name!r}.")


# What lies within layers with experts and is no layer of the base model.
WITHIN_EXPERTS = r".*\.(router|dropout)"


def reaches_within_experts(model: "SamoeModel", config: LoraConfig) -> bool:
    """Whether an adapter's `target_modules` match routers, or dropout, within layers with experts."""
    targets = config.target_modules
    if not isinstance(targets, str):
        return False
    inner = (f"{name}.{child}" for name in model.expert_names for child in ("router", "dropout"))
    return targets == "all-linear" or any(re.fullmatch(targets, name) for name in inner)


def save_adapters(model: "SamoeModel", directory: str | os.PathLike) -> None:
    """Writes each adapter of a model to a folder of its name in `directory`, as PEFT does."""
    for name in adapter_names(model):
        folder = Path(directory, name)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.copy(model.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(folder)
        save_file(_tensors(model, name), folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapters(
    model: "SamoeModel", source: str | os.PathLike, active: Mapping[str, bool], hub: Mapping[str, Any]
) -> None:
    """Loads the adapters that lie beside a model, in place of its own of the same names.

    Args:
        source: folder or Hub id of the model.
        active: name of each adapter -> whether it is used.
        hub: how to fetch it.
    """
    for name in active:
        subfolder = "/".join(filter(None, [hub.get("subfolder"), name]))
        load_adapter(model, source, name, {**hub, "subfolder": subfolder})
    if active:
        model.set_adapter([name for name in active if active[name]])
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(name):
                parameter.requires_grad_(False)


def load_adapter(model: "SamoeModel", source: str | os.PathLike, name: str, hub: Mapping[str, Any]) -> None:
    """Loads one adapter of PEFT under a name, as a new one or in place of the one of that name.

    Raises:
        ValueError: if its tensors are not those of its configuration on this model.
    """
    path = cached_file(source, SAFETENSORS_WEIGHTS_NAME, **hub)
    cached_file(source, "adapter_config.json", **hub)
    config = PeftConfig.from_pretrained(str(source), **hub)
    tensors = load_file(path)
    is_new = name not in adapter_names(model)
    if is_new:
        model.add_adapter(config, name)
    expected = {key: tuple(tensor.shape) for key, tensor in _tensors(model, name).items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != expected:
        if is_new:
            model.delete_adapter(name)
        odd = min(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise ValueError(
            f"The adapter {source} does not fit the model: {odd!r} should be {expected.get(odd, 'absent')}, and is "
            f"{found.get(odd, 'absent')}."
        )
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def _tensors(model: "SamoeModel", name: str) -> dict[str, Tensor]:
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {f"{PREFIX}{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
