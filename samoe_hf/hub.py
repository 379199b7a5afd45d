"""Folders that hold only what was trained, a few megabytes, and name the base model that the rest comes from.

`config.json` is a whole [`SamoeConfig`], with `base_model` = {"name_or_path", "revision", "original_config"}; and
`model.safetensors` holds experts, routers and whatever else was trained.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .adapters import base_name, without_adapters
from .configuration_samoe import SamoeConfig
from .experts import is_expert_parameter

if TYPE_CHECKING:
    from .modeling_samoe import SamoeModel

# Arguments of `from_pretrained` that say where and how files are fetched.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

# What the configuration says of the experts and of tracking; the architecture is the base's.
EXPERT_SETTINGS = (
    "num_experts",
    "num_experts_per_tok",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "expert_modules",
    "router_aux_loss_coef",
    "output_router_logits",
    "previous_mask_with_clicks",
    "fill_hole_area",
)


def save_trained(
    model: "SamoeModel", directory: str | os.PathLike, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes the experts, their routers and all other trainable parameters of a model, and its configuration.

    Raises:
        ValueError: if the model has no base that the rest can be loaded from, since it started from random weights.
    """
    if model.base_model_source is None:
        raise ValueError(
            "`experts_only` needs a base model to refer to, but this model did not come from one; save it as a whole."
        )
    trainable = {base_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    state_dict = model.state_dict() if state_dict is None else state_dict
    kept = {
        name: tensor.detach().contiguous()
        for name, tensor in state_dict.items()
        if name in trainable or is_expert_parameter(name)
    }
    config = SamoeConfig.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.base_model = model.base_model_source
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(kept, directory / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(directory)


def load_trained(
    cls: type["SamoeModel"], source: str | os.PathLike, config: SamoeConfig, arguments: dict[str, Any]
) -> "SamoeModel":
    """Loads the base model that `config` names, and over it what was trained.

    Args:
        source: folder or Hub id of what was trained.
        arguments: further arguments of `from_pretrained`.

    Raises:
        ValueError: if the base or what was trained does not fit; names both.
    """
    hub = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
    tensors = load_file(cached_file(source, SAFE_WEIGHTS_NAME, **hub))
    base = config.base_model
    if base.get("revision"):
        hub["revision"] = base["revision"]
    else:
        hub.pop("revision", None)
    settings = {name: getattr(config, name) for name in EXPERT_SETTINGS}
    if base.get("original_config"):
        arguments["original_config"] = base["original_config"]
    try:
        model = cls.from_pretrained(base["name_or_path"], **settings, **hub, **arguments)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"{source} builds on {base['name_or_path']}, which cannot be loaded for it: {error}"
        ) from error
    expected = without_adapters(model.state_dict())
    wrong = [name for name, tensor in tensors.items() if name not in expected or expected[name].shape != tensor.shape]
    lacking = [name for name in expected if is_expert_parameter(name) and name not in tensors]
    if wrong or lacking:
        raise ValueError(
            f"{source} builds on {base['name_or_path']}, which it does not fit: {(wrong + lacking)[0]!r} differs or is "
            "missing."
        )
    model.load_state_dict(tensors, strict=False)
    return model
