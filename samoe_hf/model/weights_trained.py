"""Folders and Hub repositories that hold only what was trained: a few megabytes, and the name of the base model.

Their `config.json` is a whole [`SamoeConfig`] with `base_model` = {"name_or_path", "revision", "subfolder",
"original_config", "fingerprint"}; `model.safetensors` holds experts, routers and whatever else was trained, and the
experts of domains have files of their own, see `domain_files.py`. The fingerprint is that of the base's tensors, so
that no other base takes its place unnoticed.

Nobody vouches for what a repository says: it can name another repository as its base, but no file of the reader's
machine.
"""

import copy
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from .adapters import plain_name
from .base_model import SamoePreTrainedModel
from .configuration_samoe import SamoeConfig
from .domain_experts import domain_tensors, store_domain_experts
from .domain_files import check_domain_sizes, open_domain_files
from .domain_gate import build_domain_gate
from .errors import InputError
from .expert_layer import DOMAIN_GATE, is_expert_parameter
from .weights_check import check_values, describe_mismatches, find_mismatches
from .weights_files import fetch_file
from .weights_io import hash_tensors
from .weights_store import StoredTensors

# What says where a model comes from: a Hub id or a path, and how it is fetched.
Source = Mapping[str, str | None]


def is_original_checkpoint(source: str | os.PathLike | None) -> bool:
    """Whether a model is a file of SAM 2 or SAM2-MoE, rather than a folder or Hub id."""
    return source is not None and (Path(source).is_file() or Path(source).suffix in (".pt", ".pth"))


def base_fingerprint(
    model: SamoePreTrainedModel,
    saved: set[str],
    state_dict: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Hash of the tensors of a model's base: all but the experts' and those in `saved`.

    Args:
        state_dict: the model's own tensors; taken from it if not given. Of a base that is quantized, or in parts of
            several types, the full one is loaded.
        dtype: the type that they are hashed in; the model's if not given.

    Raises:
        InputError: if a base of several types is another one now than was loaded.
    """
    own = _base_tensors(model.state_dict() if state_dict is None else state_dict, saved)
    dtype, is_quantized = dtype or model.dtype, bool(model.origin.quantized)
    is_cast = len({tensor.dtype for tensor in own.values() if tensor.is_floating_point()}) > 1
    if model.origin.source is None or not (is_quantized or is_cast):
        return hash_tensors(own.items(), dtype)
    known, key = model.origin.fingerprints, (frozenset(own), dtype)
    if is_quantized and key in known:
        return known[key]
    base = _load_base(type(model), model.config, model.origin.source, {"dtype": dtype})
    full = _base_tensors(base.state_dict(), saved)
    if not is_quantized and (changed := _changed(own, full)):
        raise InputError(f"{min(changed)!r} is not as in the base model, of which parts are of another type.")
    return _remember(model, full, dtype)


def _add_changed(model: SamoePreTrainedModel, saved: set[str], state_dict: Mapping[str, Tensor], dtype: Any) -> None:
    """Adds to `saved` what has other values than in the base, as what was trained before, or a LoRA that was merged.

    Once for each choice of tensors, the base is loaded again. Of one that is not there any more, nobody knows.
    """
    own, origin = _base_tensors(state_dict, saved), model.origin
    if origin.source is None or origin.quantized:
        return
    if origin.fingerprints.get((frozenset(own), dtype)) == hash_tensors(own.items(), dtype):
        return
    try:
        base = _load_base(type(model), model.config, origin.source, {"dtype": dtype}).state_dict()
    except (OSError, ValueError):
        return
    origin.changed |= _changed(own, base)
    saved |= origin.changed
    _remember(model, _base_tensors(base, saved), dtype)


def _remember(model: SamoePreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """The hash of tensors of a model's base, as it was loaded; it is kept."""
    digest = model.origin.fingerprints[frozenset(tensors), dtype] = hash_tensors(tensors.items(), dtype)
    return digest


def _changed(own: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> set[str]:
    """Names of a model's tensors that have other values in a base, in the type that they have here."""
    return {name for name, x in own.items() if not torch.equal(x.cpu(), base[name].to(x.dtype))}


def _base_tensors(state_dict: Mapping[str, Tensor], saved: set[str]) -> dict[str, Tensor]:
    """The tensors of a base in order: all but the experts' and those in `saved`."""
    names = sorted(name for name in state_dict if name not in saved and not is_expert_parameter(name))
    return {name: state_dict[name] for name in names}


def _load_base(
    cls: type[SamoePreTrainedModel], config: SamoeConfig, source: Source, arguments: Mapping[str, Any]
) -> SamoePreTrainedModel:
    """Loads a base model with the configuration of what was trained on it, but without adapters and domains."""
    config = copy.deepcopy(config)
    config.base_model = config.adapters = None
    config.domains = config.domains and []
    where: dict[str, Any] = {name: value for name, value in source.items() if value is not None}
    options = {**where, **arguments, "ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded: Any = cls.from_pretrained(options.pop("name_or_path"), config=config, **options)
    return loaded[0]


def check_not_its_base(model: SamoePreTrainedModel, directory: str | os.PathLike) -> None:
    """Raises a `ValueError` if what was trained would take the place of the base model that it needs."""
    source = model.origin.source or {}
    name = source.get("name_or_path")
    if name is None or not os.path.isdir(name):
        return
    folders = {os.path.realpath(name), os.path.realpath(Path(name, source.get("subfolder") or ""))}
    if os.path.realpath(directory) in folders:
        raise InputError(
            f"{directory} holds the base model, which what was trained needs; save it to another folder, or the whole "
            "model with `experts_only=False`."
        )


def save_trained(
    model: SamoePreTrainedModel, directory: str | os.PathLike, state_dict: Mapping[str, Tensor], base_model: str | None
) -> None:
    """Writes experts, routers and what else was trained, with the name of the base model.

    `base_model` is a Hub id to refer to instead of where the base was loaded from; it is loaded and compared.
    """
    source = model.origin.source
    if source is None and base_model is None:
        raise InputError(
            "`experts_only` needs a base model to refer to, but this model did not come from one; save it as a whole."
        )
    trainable = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = trainable | model.origin.changed
    dtype = next((x.dtype for x in state_dict.values() if x.is_floating_point()), model.dtype)
    _add_changed(model, saved, state_dict, dtype)
    digest = base_fingerprint(model, saved, state_dict, dtype)
    if base_model is not None:
        base = _load_base(type(model), model.config, {"name_or_path": base_model}, {"dtype": dtype})
        if base_fingerprint(base, saved) != digest:
            loaded = (source or {}).get("name_or_path")
            raise InputError(f"`base_model` {base_model} is not the base that the model was loaded from ({loaded}).")
        source = base.origin.source
    assert source is not None
    config = SamoeConfig.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.base_model = {**source, "fingerprint": digest}
    if model._auto_class is not None:
        custom_object_save(model, directory, config=config)  # pyright: ignore[reportArgumentType]  # it takes both
    is_kept = {name: name in saved or is_expert_parameter(name) for name in state_dict}
    kept = {name: tensor.detach().contiguous() for name, tensor in state_dict.items() if is_kept[name]}
    save_file(kept, Path(directory) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(directory)


def load_trained(
    cls: type[SamoePreTrainedModel],
    source: str | os.PathLike,
    config: SamoeConfig,
    hub: Mapping[str, Any],
    arguments: Mapping[str, Any],
    more_experts: bool,
) -> tuple[SamoePreTrainedModel, set[str]]:
    """Loads the base model that `config` names, and over it what was trained, of a folder or Hub id.

    With `more_experts` layers without experts may get new ones. Returns the model, and names of tensors of new experts.
    """
    base = {key: value or None for key, value in (config.base_model or {}).items()}
    digest = base.pop("fingerprint", None)
    _check_base(source, base)
    name = base["name_or_path"]
    names = f"{source} builds on {name}"
    if os.path.isabs(name or "") and not os.path.exists(name or ""):
        raise InputError(
            f"{names}, which is not there. If it was moved, write its new place into `base_model`, `name_or_path`, of "
            f"{source}/{CONFIG_NAME}."
        )
    saved = SamoeConfig.from_pretrained(source, **hub).dtype  # that of `config` may be what is asked for
    dtype = _wanted_type(arguments.get("dtype", arguments.get("torch_dtype")), config.dtype, saved)
    assert name is not None
    stored = StoredTensors([_weights_on(name, source, hub)])
    files = open_domain_files(source, hub, config.domains or (), stored)
    found = stored.headers
    for file in files.values() if more_experts else ():
        found = {**found, **file.headers()}
    fetch = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    # First in the type that it was saved in, which the fingerprint is of. `adapter_kwargs` are AutoModel's, with the
    # revision of `source`.
    options = {key: x for key, x in arguments.items() if key not in ("dtype", "torch_dtype", "adapter_kwargs")}
    try:
        where = {key: base[key] for key in ("revision", "subfolder") if base.get(key)}
        if not is_original_checkpoint(name) and SamoeConfig.from_pretrained(name, **fetch, **where).base_model:
            raise InputError("it holds only what was trained itself")
        options["dtype"] = saved or "auto"
        model = _load_base(cls, config, base, {**fetch, **options})
        if (gate := build_domain_gate(config)) is not None:
            model.domain_gate = gate.to(model.device)
        of_domains = domain_tensors(model, config.domains or ()) if more_experts else {}
        check_domain_sizes(model, {} if more_experts else files, config.domains or ())
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{names}, which cannot be loaded for it: {error}") from error
    own = model.state_dict()
    kept = {name: header for tensors in of_domains.values() for name, header in tensors.items()}
    problems = find_mismatches(found, {**own, **kept})
    # The base has the rest.
    lacking = {name for name in problems["missing"] if is_expert_parameter(name)}
    problems["missing"] = [] if more_experts else sorted(lacking)
    if any(problems.values()):
        reshaped = problems["of another shape"]
        is_of_experts = bool(reshaped) and all(map(is_expert_parameter, reshaped))
        hint = " `replace_experts` gives a loaded model other experts." if is_of_experts else ""
        raise InputError(f"{names}, which it does not fit: {describe_mismatches(problems)}.{hint}")
    if _remember(model, _base_tensors(own, set(found)), model.dtype) != digest:
        raise InputError(f"{names}, but the tensors there are not those that it was trained on (other fingerprint).")
    new = [name for name, tensors in of_domains.items() if lacking & tensors.keys()]
    others = [name for name in found if name not in kept]
    _set_values(model, {name: stored.read(name) for name in others}, source)
    check_values(source, model)
    model.origin.changed = {name for name in others if not is_expert_parameter(name)}
    if dtype is not None:
        _cast(model, dtype)
    if config.domains:
        store_domain_experts(model, config.domains, files, new)
    return model, lacking.union(*(of_domains[name] for name in new))


def _weights_on(base: str, source: str | os.PathLike, hub: Mapping[str, Any]) -> str:
    if (path := fetch_file(source, SAFE_WEIGHTS_NAME, hub)) is None:
        raise OSError(f"{source} has no {SAFE_WEIGHTS_NAME}; expected what was trained on {base} there.")
    return path


def _set_values(model: SamoePreTrainedModel, tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # rows of the gate, of other domains
        raise InputError(f"{source} contradicts its {CONFIG_NAME}: {str(error).splitlines()[-1].strip()}") from error


def _wanted_type(given: Any, configured: Any, saved: Any) -> torch.dtype | None:
    """The type that is asked for, if it is not the saved one; InputError if weights cannot have it."""
    if given in (None, "auto"):
        given = None if configured == saved else configured
    wanted = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise InputError(f'`dtype` must be a floating-point type such as "bfloat16", "auto" or None, got {given!r}.')
    return wanted


def _cast(model: SamoePreTrainedModel, dtype: torch.dtype) -> None:
    """As `from_pretrained(dtype=…)`: the gate, and what is computed at construction, keep their precision."""
    stored = {name for name in model.state_dict() if not name.startswith(f"{DOMAIN_GATE}.")}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _check_base(source: str | os.PathLike, base: Source) -> None:
    """Raises a `ValueError` if a base is anything but a Hub id with a commit, or in a local folder an absolute path."""
    name, subfolder = base.get("name_or_path"), PurePosixPath(base.get("subfolder") or "")
    is_folder = os.path.isdir(source)
    if is_folder and name is not None and os.path.isabs(name):
        is_fit = True
    else:
        try:
            validate_repo_id(name)
            is_fit = name is not None and not is_original_checkpoint(name) and base.get("original_config") is None
        except HFValidationError:
            is_fit = False
        is_fit = is_fit and re.fullmatch(r"[0-9a-f]{40}", base.get("revision") or "0" * 40) is not None
    if not is_fit or subfolder.is_absolute() or ".." in subfolder.parts:
        expected = "a Hub id with a commit or an absolute path" if is_folder else "a Hub id with a commit"
        stated = {key: value for key, value in base.items() if value is not None}
        raise InputError(f"{source} names {stated} as its base model; expected {expected}.")
