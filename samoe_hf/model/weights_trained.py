"""Folders and Hub repositories of models: what is written to them, and whether their weights fit a configuration.

A repository may hold a whole model, or only what was trained: a few megabytes, and the name of the base model that the
rest comes from. Then `config.json` is a whole [`SamoeConfig`] with `base_model` = {"name_or_path", "revision",
"subfolder", "original_config", "fingerprint"}, and `model.safetensors` holds experts, routers and whatever else was
trained. The fingerprint is that of the base's tensors, so that no other base takes its place unnoticed.

Nobody vouches for what a repository says. Only safetensors are read, and its configuration is compared with their
headers before memory is allocated; it can name another repository as its base, but no file of the reader's machine.
"""

import copy
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import extract_commit_hash

from .adapters import plain_name, without_adapters
from .base_model import SamoePreTrainedModel, build_on_meta
from .configuration_samoe import SamoeConfig
from .domain_experts import module_domain
from .errors import InputError
from .expert_layer import DOMAIN_GATE, EXPERT_TENSORS, expert_modules, is_expert_parameter
from .weights_files import read_header
from .weights_io import hash_tensors

# Arguments of `from_pretrained` that say where and how files are fetched.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

# Fields of the configuration that say how often something is built.
REPEAT_FIELDS = re.compile(r"blocks_per_stage|\w*num_(hidden_)?layers|num_multimask_outputs|\w*depth")
# New experts may at most have so many times the values that the files hold.
MAX_NEW_VALUES_RATIO = 10


# What fits


def find_mismatches(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Compares tensors by name, shape and type; their values are not looked at, so they may be on the meta device.

    Returns:
        what may be wrong -> names of the tensors it is wrong with.
    """
    common = [name for name in expected if name in found]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [n for n in common if found[n].shape != expected[n].shape],
        "of no floating-point type": [
            n for n in common if expected[n].is_floating_point() and not found[n].is_floating_point()
        ],
    }
    return problems


def describe_mismatches(problems: Mapping[str, list[str]]) -> str:
    """A clause for each problem, with an example."""
    return "; ".join(
        f"{len(names)} tensors are {problem}, such as {min(names)!r}" for problem, names in problems.items() if names
    )


def check_repeats(source: Any, config: SamoeConfig, num_tensors: int) -> None:
    """Raises a `ValueError` if `config` has more layers or blocks of a kind than there are tensors.

    To be called before a model is built, which would take too long.
    """
    for name, value in _named_integers(config.to_dict()):
        if REPEAT_FIELDS.fullmatch(name) and value > num_tensors:
            raise InputError(f"{source}: `{name}` is {value}, but the weights hold {num_tensors} tensors in all.")


def check_weights(
    source: Any, found: Mapping[str, Tensor], config: SamoeConfig, more_experts: bool, any_experts: bool
) -> list[str]:
    """Compares a checkpoint's tensors with what `config` describes. No memory is allocated.

    Experts may be missing in all layers; with `more_experts`, in some. With `any_experts` they may also be of another
    number or rank than the configuration's, or lie in other layers.

    Args:
        source: what to call the checkpoint in messages.
        found: names -> tensors, such as `read_headers` gives.

    Returns:
        The layers whose experts the checkpoint lacks, and which are to get new ones.

    Raises:
        ValueError: if anything else is missing, unexpected, or of another shape or type.
    """
    check_repeats(source, config, len(found))
    try:
        config.check_feature_sizes()
        model = build_on_meta(config)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    expected = model.state_dict()
    problems = find_mismatches(found, expected)
    layers = {name: {f"{name}.{tensor}" for tensor in EXPERT_TENSORS} for name, _ in expert_modules(model)}
    unfit = set().union(*problems.values()) if any_experts else set(problems["missing"])
    new = [name for name, tensors in layers.items() if (tensors & unfit if any_experts else tensors <= unfit)]
    tolerated = set()
    if more_experts or any_experts or len(new) == len(layers):
        gate = {name for name in expected if name.startswith(f"{DOMAIN_GATE}.")}
        tolerated = set().union(gate, *(layers[name] for name in new))
    if any_experts:
        tolerated |= {name for name in found if is_expert_parameter(name)}
    problems = {what: [name for name in names if name not in tolerated] for what, names in problems.items()}
    if any(problems.values()):
        hint = ""
        if all(is_expert_parameter(name) for names in problems.values() for name in names):
            hint = " `ignore_mismatched_sizes=True` gives the model new experts in their place."
        raise InputError(f"{source} does not fit the model: {describe_mismatches(problems)}.{hint}")
    _check_types(source, found)
    stored = sum(tensor.numel() for tensor in found.values())
    values = sum(tensor.numel() for tensor in itertools.chain(expected.values(), model.buffers()))
    if values - stored > MAX_NEW_VALUES_RATIO * stored:
        raise InputError(
            f"{source}: its configuration describes {values:,d} values, but the weights hold {stored:,d}; check "
            f"`num_experts` ({config.num_experts}), `lora_rank` ({config.lora_rank}) and the sizes of images."
        )
    return new


def _check_types(source: Any, found: Mapping[str, Tensor]) -> None:
    """Refuses single tensors of float64, of whose type the whole model would become."""
    double = [name for name, tensor in found.items() if tensor.dtype == torch.float64]
    if double and len(double) < len(found):
        raise InputError(f"{source}: {double[0]!r} is of type float64, and others are not; expected one type.")


def check_finite(source: Any, model: torch.nn.Module) -> None:
    """Raises a `ValueError` that names the first tensor with NaN or infinite values."""
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "meta" and not tensor.isfinite().all():
            raise InputError(f"{source}: the tensor {name!r} has NaN or infinite values.")


def _named_integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named_integers(part, str(key))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _named_integers(part, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


# What was trained, and its base


def fingerprint(state_dict: Mapping[str, Tensor], saved: set[str], dtype: torch.dtype) -> str:
    """Hash of the base's tensors, as `dtype`: all but the experts' and those in `saved`."""
    names = sorted(name for name in state_dict if name not in saved and not is_expert_parameter(name))
    return hash_tensors(((name, state_dict[name]) for name in names), dtype)


def base_fingerprint(
    model: SamoePreTrainedModel, saved: set[str], state_dict: Mapping[str, Tensor] | None = None
) -> str:
    """The [`fingerprint`] of a SamoeModel's base; of a quantized one, that of the full base, which is loaded for it.

    Args:
        state_dict: the model's own tensors; taken from it if not given.
    """
    if not model.origin.quantized:
        return fingerprint(model.state_dict() if state_dict is None else state_dict, saved, model.dtype)
    known, key = model.origin.fingerprints, frozenset(saved)
    if key not in known:
        base = _load_again(model, model.origin.source)
        known[key] = fingerprint(base.state_dict(), saved, model.dtype)
    return known[key]


def _load_again(model: SamoePreTrainedModel, source: str | Mapping[str, str | None]) -> SamoePreTrainedModel:
    """A base in full, with the configuration of a model that was trained on it.

    Args:
        source: a Hub id or folder, or where a model came from, as `model.origin.source`.
    """
    config = copy.deepcopy(model.config)
    config.adapters = config.base_model = None
    where = {"name_or_path": source} if isinstance(source, str) else dict(source)
    name = where.pop("name_or_path")
    base, _ = type(model).from_pretrained(
        name,
        config=config,
        dtype=model.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **{key: value for key, value in where.items() if value is not None},
    )
    return base


def check_not_its_base(model: SamoePreTrainedModel, directory: str | os.PathLike) -> None:
    """Raises a `ValueError` if what was trained would take the place of the base model that it needs."""
    name = (model.origin.source or {}).get("name_or_path")
    if name is None or not os.path.isdir(name):
        return
    folders = {os.path.realpath(name), os.path.realpath(Path(name, model.origin.source.get("subfolder") or ""))}
    if os.path.realpath(directory) in folders:
        raise InputError(
            f"{directory} holds the base model, which what was trained needs; save it to another folder, or the whole "
            "model with `experts_only=False`."
        )


def save_trained(
    model: SamoePreTrainedModel,
    directory: str | os.PathLike,
    state_dict: dict[str, Tensor] | None = None,
    base_model: str | None = None,
) -> None:
    """Writes experts, routers and what else was trained, with the name of the base model.

    Args:
        model: a SamoeModel that was loaded from a base.
        directory: where to write.
        state_dict: the model's own tensors; taken from it if not given.
        base_model: Hub id to refer to instead of where the base was loaded from. It is loaded and compared.

    Raises:
        ValueError: if there is no base model, or `base_model` is another one.
    """
    if model.origin.source is None and base_model is None:
        raise InputError(
            "`experts_only` needs a base model to refer to, but this model did not come from one; save it as a whole."
        )
    trainable = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = trainable | model.origin.changed
    state_dict = without_adapters(model.state_dict()) if state_dict is None else state_dict
    kept = {
        name: tensor.detach().contiguous()
        for name, tensor in state_dict.items()
        if name in saved or is_expert_parameter(name)
    }
    digest = base_fingerprint(model, saved, state_dict)
    source = model.origin.source
    if base_model is not None:
        base = _load_again(model, base_model)
        source = base.origin.source
        if fingerprint(base.state_dict(), saved, model.dtype) != digest:
            loaded = (model.origin.source or {}).get("name_or_path")
            raise InputError(f"`base_model` {base_model} is not the base that the model was loaded from ({loaded}).")
    config = SamoeConfig.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.base_model = {**source, "fingerprint": digest}
    if model._auto_class is not None:
        custom_object_save(model, directory, config=config)
    save_file(kept, Path(directory) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(directory)


def load_trained(
    cls: type[SamoePreTrainedModel],
    source: str | os.PathLike,
    config: SamoeConfig,
    hub: Mapping[str, Any],
    arguments: dict[str, Any],
    more_experts: bool,
) -> tuple[SamoePreTrainedModel, set[str]]:
    """Loads the base model that `config` names, and over it what was trained.

    Args:
        cls: SamoeModel.
        source: folder or Hub id of what was trained.
        hub: how to fetch it, see `HUB_ARGUMENTS`.
        arguments: further arguments of `from_pretrained`.
        more_experts: whether layers without experts in `source` may get new ones.

    Returns:
        The model, and names of tensors of experts that are new.

    Raises:
        ValueError: if the base or what was trained does not fit; names both.
    """
    base, base_hub = _check_base(source, config.base_model, hub)
    names = f"{source} builds on {base['name_or_path']}"
    path = cached_file(source, SAFE_WEIGHTS_NAME, **hub)
    found = read_header(path)
    _check_experts_size(names, found, config)
    config = copy.deepcopy(config)
    config.base_model = config.adapters = None
    # First in the type that it was saved in, which the fingerprint is of.
    dtype = arguments.pop("dtype", arguments.pop("torch_dtype", None))
    arguments.pop("adapter_kwargs", None)  # AutoModel's, with the revision of `source`
    model = _load_base(cls, names, base, base_hub, config, arguments)
    expected = model.state_dict()
    problems = find_mismatches(found, expected)
    # The base has the rest.
    lacking = {name for name in problems["missing"] if is_expert_parameter(name)}
    problems["missing"] = [] if more_experts else sorted(lacking)
    if any(problems.values()):
        raise InputError(f"{names}, which it does not fit: {describe_mismatches(problems)}.")
    if fingerprint(expected, set(found), model.dtype) != base.get("fingerprint"):
        raise InputError(f"{names}, but the tensors there are not those that it was trained on (other fingerprint).")
    model.load_state_dict(load_file(path), strict=False)
    check_finite(source, model)
    model.origin.changed = {name for name in found if not is_expert_parameter(name)}
    if dtype not in (None, "auto"):
        _cast(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model, lacking


def _load_base(
    cls: type[SamoePreTrainedModel],
    names: str,
    base: Mapping[str, Any],
    hub: Mapping[str, Any],
    config: SamoeConfig,
    arguments: Mapping[str, Any],
) -> SamoePreTrainedModel:
    """Loads a base model with the configuration of what was trained on it."""
    source = base["name_or_path"]
    try:
        is_original = is_original_checkpoint(source)
        if not is_original and SamoeConfig.from_pretrained(source, **hub).base_model is not None:
            raise InputError("it holds only what was trained itself")
        model, _ = cls.from_pretrained(
            source,
            config=config,
            original_config=base.get("original_config"),
            ignore_mismatched_sizes=True,  # its experts give place to those that were trained
            output_loading_info=True,
            **hub,
            **arguments,
        )
        return model
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{names}, which cannot be loaded for it: {error}") from error


def is_original_checkpoint(source: str | os.PathLike | None) -> bool:
    """Whether a model is a file of SAM 2 or SAM2-MoE, rather than a folder or Hub id."""
    return source is not None and (Path(source).is_file() or Path(source).suffix in (".pt", ".pth"))


def _cast(model: SamoePreTrainedModel, dtype: torch.dtype) -> None:
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
            is_fit = (
                isinstance(name, str) and not name.endswith((".pt", ".pth")) and base.get("original_config") is None
            )
        except HFValidationError:
            is_fit = False
        is_fit = is_fit and re.fullmatch(r"[0-9a-f]{40}", base.get("revision") or "0" * 40) is not None
    subfolder = base.get("subfolder") or ""
    if not is_fit or PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts:
        expected = "a Hub id with a commit or an absolute path" if is_folder else "a Hub id with a commit"
        stated = {key: value for key, value in base.items() if value is not None and key != "fingerprint"}
        raise InputError(f"{source} names {stated} as its base model; expected {expected}.")
    base_hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    if base.get("revision"):
        base_hub["revision"] = base["revision"]
    if subfolder:
        base_hub["subfolder"] = subfolder
    return base, base_hub


def _check_experts_size(names: str, found: Mapping[str, Tensor], config: SamoeConfig) -> None:
    """Raises a `ValueError` if experts in a file are of another number or rank than its configuration says."""
    sizes = {domain["name"]: (domain["num_experts"], domain["lora_rank"]) for domain in config.domains or ()}
    sizes[None] = (config.num_experts, config.lora_rank)
    for name, tensor in found.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "lora_A":
            continue
        expected = sizes.get(module_domain(layer), "no such domain")
        if tensor.shape[:2] != expected:
            raise InputError(
                f"{names}, but contradicts itself: {name!r} is of shape {tuple(tensor.shape)}, and the configuration "
                f"says {expected} for experts and rank."
            )


def resolve_commit(source: str | os.PathLike, hub: Mapping[str, Any]) -> str | None:
    """The commit of a Hub repository that `revision` stands for; None for a folder.

    Raises:
        OSError: if there is no such folder or repository, it has no configuration, or it cannot be reached.
    """
    path = cached_file(source, CONFIG_NAME, **hub)
    if path is None:
        raise OSError(f"{source} has no {CONFIG_NAME}; expected a model of SAMoE or SAM 2 video.")
    return None if os.path.isdir(source) else extract_commit_hash(path, None)
