"""Folders and Hub repositories: written whole or not at all, checked before they are loaded, and pushed.

A repository may hold a whole model, or only what was trained: a few megabytes, and the name of the base model that the
rest comes from. Then `config.json` is a whole [`SamoeConfig`] with `base_model` = {"name_or_path", "revision",
"subfolder", "original_config", "fingerprint"}, and `model.safetensors` holds experts, routers and whatever else was
trained. The fingerprint is that of the base's tensors, so that no other base takes its place unnoticed.

Nobody vouches for what a repository says. Only safetensors are read, and its configuration is compared with their
headers before memory is allocated; it can name another repository as its base, but no file of the reader's machine.
"""

import copy
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import extract_commit_hash

from .adapters import base_name
from .configuration_samoe import SamoeConfig
from .experts import EXPERT_TENSORS, is_expert_parameter, matching_linear_names
from .files import hash_tensors
from .sam2_modules import build_on_meta

if TYPE_CHECKING:
    from .modeling_samoe import SamoeModel

# Arguments of `from_pretrained` that say where and how files are fetched.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# Fields of the configuration that say how often something is built.
_COUNTS = re.compile(r"blocks_per_stage|\w*num_(hidden_)?layers|num_multimask_outputs|\w*depth")
# No model has so many times more values than its files, since only experts may be new.
_MOST_NEW_VALUES = 10


def fingerprint(state_dict: Mapping[str, Tensor], saved: set[str], dtype: torch.dtype) -> str:
    """Hash of the base's tensors, as `dtype`: all but the experts' and those in `saved`."""
    names = sorted(name for name in state_dict if name not in saved and not is_expert_parameter(name))
    return hash_tensors(((name, state_dict[name]) for name in names), dtype)


def save_trained(
    model: "SamoeModel",
    directory: str | os.PathLike,
    state_dict: dict[str, Tensor] | None = None,
    base_model: str | None = None,
) -> None:
    """Writes the experts, their routers and whatever else was trained, and the configuration.

    Args:
        state_dict: the model's tensors, if they are not to be asked for again.
        base_model: Hub id (or folder) of the same base as the one that the model was loaded from.

    Raises:
        ValueError: if the model has no base that the rest can be loaded from, since it started from random weights; or
            if `base_model` is another one.
    """
    if model.base_model_source is None and base_model is None:
        raise ValueError(
            "`experts_only` needs a base model to refer to, but this model did not come from one; save it as a whole."
        )
    trainable = {base_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = trainable | model.differs_from_base
    state_dict = model.state_dict() if state_dict is None else state_dict
    kept = {
        name: tensor.detach().contiguous()
        for name, tensor in state_dict.items()
        if name in saved or is_expert_parameter(name)
    }
    digest = fingerprint(state_dict, saved, model.dtype)
    source = model.base_model_source
    if base_model is not None:
        config = copy.deepcopy(model.config)
        config.adapters = None
        base = type(model).from_pretrained(base_model, config=config, ignore_mismatched_sizes=True)
        source = base.base_model_source
        if fingerprint(base.state_dict(), saved, model.dtype) != digest:
            loaded = (model.base_model_source or {}).get("name_or_path")
            raise ValueError(f"`base_model` {base_model} is not the base that the model was loaded from ({loaded}).")
    config = SamoeConfig.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.base_model = {**source, "fingerprint": digest}
    if model._auto_class is not None:
        custom_object_save(model, directory, config=config)
    save_file(kept, Path(directory) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(directory)


def load_trained(
    cls: type["SamoeModel"],
    source: str | os.PathLike,
    config: SamoeConfig,
    hub: dict[str, Any],
    arguments: dict[str, Any],
    more_experts: bool,
) -> "SamoeModel":
    """Loads the base model that `config` names, and over it what was trained.

    Args:
        source: folder or Hub id of what was trained.
        hub: how to fetch it, see `HUB_ARGUMENTS`.
        arguments: further arguments of `from_pretrained`.
        more_experts: whether layers without experts in `source` may get new ones.

    Raises:
        ValueError: if the base or what was trained does not fit; names both.
    """
    base, base_hub = _check_base(source, config.base_model, hub)
    base_source = base["name_or_path"]
    names = f"{source} builds on {base_source}"
    tensors = _read_trained(source, config, hub, names)
    config = copy.deepcopy(config)
    config.base_model = config.adapters = None
    # First in the type that it was saved in, which the fingerprint is of.
    dtype = arguments.pop("dtype", arguments.pop("torch_dtype", None))
    arguments.pop("adapter_kwargs", None)  # AutoModel's, with the revision of `source`
    try:
        is_checkpoint = Path(base_source).suffix in (".pt", ".pth") or Path(base_source).is_file()
        if not is_checkpoint and SamoeConfig.from_pretrained(base_source, **base_hub).base_model is not None:
            raise ValueError("it holds only what was trained itself")
        model = cls.from_pretrained(
            base_source,
            config=config,
            original_config=base.get("original_config"),
            ignore_mismatched_sizes=True,  # its experts give place to those that were trained
            **base_hub,
            **arguments,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{names}, which cannot be loaded for it: {error}") from error
    expected = model.state_dict()
    wrong = [name for name, tensor in tensors.items() if name not in expected or expected[name].shape != tensor.shape]
    lacking = [name for name in expected if is_expert_parameter(name) and name not in tensors and not more_experts]
    if wrong or lacking:
        raise ValueError(f"{names}, which it does not fit: {(wrong + lacking)[0]!r} differs or is missing.")
    if fingerprint(expected, set(tensors), model.dtype) != base.get("fingerprint"):
        raise ValueError(f"{names}, but the tensors there are not those that it was trained on (other fingerprint).")
    model.load_state_dict(tensors, strict=False)
    model.differs_from_base = {name for name in tensors if not is_expert_parameter(name)}
    if dtype not in (None, "auto"):
        _cast(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model


def _cast(model: "SamoeModel", dtype: torch.dtype) -> None:
    """As `from_pretrained(dtype=…)`: what is computed at construction, such as frequencies, keeps its precision."""
    stored = set(model.state_dict())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _check_base(
    source: str | os.PathLike, base: Mapping[str, Any], hub: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """What a configuration says of its base, and how to fetch that.

    Raises:
        ValueError: for anything but a Hub id with a commit; in a local folder, an absolute path will do as well.
    """
    name, is_folder = base.get("name_or_path"), os.path.isdir(source)
    if is_folder and isinstance(name, str) and os.path.isabs(name):
        is_fit = True
    else:
        try:
            validate_repo_id(name)
            is_fit = not name.endswith((".pt", ".pth")) and base.get("original_config") is None
        except HFValidationError:
            is_fit = False
        is_fit = is_fit and re.fullmatch(r"[0-9a-f]{40}", base.get("revision") or "0" * 40) is not None
    subfolder = base.get("subfolder") or ""
    if not is_fit or PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts:
        expected = "a Hub id with a commit or an absolute path" if is_folder else "a Hub id with a commit"
        stated = {key: value for key, value in base.items() if value is not None and key != "fingerprint"}
        raise ValueError(f"{source} names {stated} as its base model; expected {expected}.")
    base_hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    if base.get("revision"):
        base_hub["revision"] = base["revision"]
    if subfolder:
        base_hub["subfolder"] = subfolder
    return base, base_hub


def _read_trained(source: str | os.PathLike, config: SamoeConfig, hub: dict[str, Any], names: str) -> dict[str, Tensor]:
    """The tensors of a folder with only what was trained, of the experts' number and rank in its configuration."""
    path = cached_file(source, SAFE_WEIGHTS_NAME, **hub)
    for name, shape in _read_header(path).items():
        if name.endswith(".lora_A") and shape[:2] != (config.num_experts, config.lora_rank):
            raise ValueError(
                f"{names}, but contradicts itself: {name!r} is of shape {shape}, and the configuration says "
                f"{config.num_experts} experts of rank {config.lora_rank}."
            )
    return load_file(path)


def resolve_commit(source: str | os.PathLike, hub: Mapping[str, Any]) -> str | None:
    """The commit of a Hub repository that `revision` stands for; None for a folder.

    Raises:
        OSError: if there is no such folder or repository, it has no configuration, or it cannot be reached.
    """
    path = cached_file(source, CONFIG_NAME, **hub)
    if path is None:
        raise OSError(f"{source} has no {CONFIG_NAME}; expected a model of SAMoE or SAM 2 video.")
    return None if os.path.isdir(source) else extract_commit_hash(path, None)


def check_weights(
    source: str | os.PathLike, config: SamoeConfig, hub: dict[str, Any], variant: str | None, any_experts: bool
) -> None:
    """Compares the headers of the weights with what `config` describes; no memory is allocated for tensors.

    Layers may lack their experts, if the new ones are not out of all proportion; with `any_experts`, those that are
    there may be of another number or rank, or in other layers.

    Raises:
        OSError: if there are no safetensors.
        ValueError: if a file is damaged or lies elsewhere, or if shapes or sizes do not agree.
    """
    optional = {**hub, "_raise_exceptions_for_missing_entries": False}
    if cached_file(source, ADAPTER_CONFIG_NAME, **optional) is not None:
        # From there transformers would take the name of another model, and load that one's weights.
        raise ValueError(
            f"{source} holds a model and a PEFT adapter at once; load the adapter from a place of its own."
        )
    found = {name: shape for path in _weight_files(source, hub, variant) for name, shape in _read_header(path).items()}
    stored = sum(map(math.prod, found.values()))
    for name, value in _named_integers(config.to_dict()):
        if _COUNTS.fullmatch(name) and value > len(found):
            raise ValueError(f"{source}: `{name}` is {value}, but the weights hold {len(found)} tensors in all.")
    model = build_on_meta(config, with_experts=False)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in matching_linear_names(model, config.expert_modules):
        linear = model.get_submodule(name)
        rows = (config.num_experts, config.lora_rank)
        shapes = (
            (*rows, linear.in_features),
            (config.num_experts, linear.out_features, config.lora_rank),
            (config.num_experts, linear.in_features),
            (config.num_experts,),
        )
        expected |= {f"{name}.{tensor}": shape for tensor, shape in zip(EXPERT_TENSORS, shapes, strict=True)}
    problems = {
        "missing": [name for name in expected if name not in found and not is_expert_parameter(name)],
        "unexpected": [name for name in found if name not in expected],
        "of another shape than the configuration says": [
            name for name, shape in expected.items() if found.get(name, shape) != shape
        ],
    }
    if any_experts:
        problems = {what: [name for name in names if not is_expert_parameter(name)] for what, names in problems.items()}
    if reasons := [
        f"{len(names)} tensors are {what}, such as {min(names)!r}" for what, names in problems.items() if names
    ]:
        hint = ""
        if all(is_expert_parameter(name) for names in problems.values() for name in names):
            hint = " `ignore_mismatched_sizes=True` gives the model new experts in their place."
        raise ValueError(f"{source} does not fit the model: {'; '.join(reasons)}.{hint}")
    values = sum(map(math.prod, expected.values())) + sum(buffer.numel() for buffer in model.buffers())
    if values - stored > _MOST_NEW_VALUES * stored:
        raise ValueError(
            f"{source}: its configuration describes {values:,d} values, but the weights hold {stored:,d}; check "
            f"`num_experts` ({config.num_experts}), `lora_rank` ({config.lora_rank}) and the sizes of images."
        )


def _weight_files(source: str | os.PathLike, hub: dict[str, Any], variant: str | None) -> list[str]:
    stem, ending = os.path.splitext(SAFE_WEIGHTS_NAME)
    name = f"{stem}.{variant}{ending}" if variant else SAFE_WEIGHTS_NAME
    optional = {**hub, "_raise_exceptions_for_missing_entries": False}
    if (path := cached_file(source, name, **optional)) is not None:
        return [path]
    index_name = SAFE_WEIGHTS_INDEX_NAME.replace(".json", f".{variant}.json") if variant else SAFE_WEIGHTS_INDEX_NAME
    index = cached_file(source, index_name, **optional)
    if index is None:
        raise OSError(f"{source} has no {name}; other formats than safetensors are not read.")
    shards = set(json.loads(Path(index).read_text())["weight_map"].values())
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ValueError(f"{source}: {index_name} names {shard!r}, which is no safetensors file of its folder.")
    return [cached_file(source, shard, **hub) for shard in sorted(shards)]


def _read_header(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or no safetensors file: {error}") from error


def _named_integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named_integers(part, str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _named_integers(part, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
