"""Which domains a model has experts for: add, remove, rename them, and put two people's side by side.

Each function checks everything before it changes anything, and leaves the tensors of other domains as they are. The
experts' parameters are new ones, so optimizers must be made afterwards.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from samoe_hf.errors import InputError
from samoe_hf.model.adapters import adapter_names
from samoe_hf.model.configuration_samoe import EXPERT_SETTINGS, SHARED_SETTINGS, check_domain_name, check_domains
from samoe_hf.model.domain_experts import PREFIX, DomainExperts, DomainLinear, add_domain_experts, domain_modules
from samoe_hf.model.domain_gate import DomainGate, build_domain_gate
from samoe_hf.model.expert_layer import (
    META,
    ExpertLinear,
    expert_modules,
    has_effect,
    matching_linear_names,
    replace_module,
)
from samoe_hf.model.expert_sleep import frozen_experts
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.weights_trained import base_fingerprint
from samoe_hf.surgery.experts import complete_settings, remove_experts, to_plain_linear
from samoe_hf.surgery.gate import append_rows, confirm_row, fit_row, remove_row, rename_row, video_spread


def add_domain(model: SamoeModel, name: str, *, like: str | None = None, **settings: Any) -> None:
    """Gives the model a new domain behind the others, with experts that have no effect yet.

    The gate does not know it until it has seen some of its videos, see [`fit_domain`]. Experts that belong to no
    domain are taken away if they have no effect.

    Args:
        like: a domain whose experts the new ones are copies of.
        settings: of its experts, any of `num_experts` (0 for a domain on which the base is good as it is),
            `num_experts_per_tok`, `lora_rank`, `lora_alpha`, `lora_dropout`, `expert_modules` and `exclude_modules`;
            the others are the configuration's, or those of `like`, but `expert_modules` alone excludes none.

    Raises:
        InputError: if the name is taken or cannot be one, a setting is out of range, modules do not exist, the
            model has adapters of PEFT, or experts of no domain that have an effect.
    """
    check_no_adapters(model)
    domain = _describe_domain(model, name, like, settings)
    if model.config.domains is None:
        if has_effect(model):
            raise InputError(
                "The model has experts that belong to no domain; `rename_domain(model, None, NAME)` makes a domain of "
                "them."
            )
        remove_experts(model)
        _begin_domains(model)
    add_domain_experts(model, [domain])
    _set_domains(model, [*_domains(model), domain])
    _append_unknown(model, name)
    if like is not None:
        _copy_experts(model, like, model, name)


def _describe_domain(model: SamoeModel, name: str, like: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The new domain for the configuration, checked."""
    _check_new_name(model, name, "name")
    settings = complete_settings(settings)
    if like is None:
        own = _own_settings(model)
    elif settings:
        raise InputError(f"`like` {like!r} says what the new domain's experts are; got `{min(settings)}` as well.")
    else:
        own = copy.deepcopy(find_domain(model, like))
    domain = {**own, **settings, "name": name}
    check_domains([domain])
    if domain["num_experts"]:
        matching_linear_names(model, domain["expert_modules"], domain["exclude_modules"])
    return domain


def remove_domain(model: SamoeModel, name: str) -> None:
    """Takes a domain's experts away, and what the gate knows of it."""
    row = _row(model, name)
    remove_domain_layers(model, name, [layer for layer, _ in domain_modules(model, name)])
    remove_row(*row)
    _set_domains(model, [domain for domain in _domains(model) if domain["name"] != name])


def remove_domain_layers(model: SamoeModel, name: str, layers: Sequence[str]) -> None:
    """Takes a domain's experts of some layers away."""
    for layer in layers:
        module = model.get_submodule(layer)
        assert isinstance(module, DomainLinear)
        delattr(module, PREFIX + name)
        if not any(child.startswith(PREFIX) for child, _ in module.named_children()):
            replace_module(model, layer, to_plain_linear(module))
    if layers:
        domain = find_domain(model, name)
        before = domain["exclude_modules"] or []
        domain["exclude_modules"] = [*([before] if isinstance(before, str) else before), *layers]
        _set_domains(model, _domains(model))


def rename_domain(model: SamoeModel, name: str | None, new_name: str) -> None:
    """Gives a domain another name; with None for `name`, the experts of a model without domains become a domain's."""
    _check_new_name(model, new_name, "new_name", name)
    if name is None:
        _make_domain(model, new_name)
        return
    rename_row(*_row(model, name), new_name)
    for layer, experts in list(domain_modules(model, name)):
        module = model.get_submodule(layer)
        delattr(module, PREFIX + name)
        module.add_module(PREFIX + new_name, experts)
    renamed = [{**one, "name": new_name} if one["name"] == name else one for one in _domains(model)]
    _set_domains(model, renamed)


def keep_former_experts(model: SamoeModel, name: str) -> None:
    """Makes a domain of experts that belong to none and have an effect, such as SAM2-MoE's, and prints that it did.

    The gate does not know the domain. Where it is chosen, the output is as before.
    """
    if model.config.domains is None and has_effect(model):
        rename_domain(model, None, name)
        if PartialState().is_main_process:
            print(f"The model's experts, which belonged to no domain, are now those of {name!r}.")


def _make_domain(model: SamoeModel, name: str) -> None:
    """Makes a domain of the experts of a model without domains."""
    if model.config.domains is not None:
        raise InputError("`name` must be a domain of the model, whose experts all belong to one, got None.")
    check_no_adapters(model)
    if any(frozen_experts(module) for _, module in expert_modules(model)):
        raise InputError("Some experts are frozen; `freeze_experts([])` lets them become a domain's.")
    for layer, module in list(expert_modules(model)):
        assert isinstance(module, ExpertLinear)
        # The experts by themselves, whose parameters are shared.
        experts = DomainExperts(module.in_features, module.out_features, **model.config.expert_settings(), device=META)
        experts.lora_A, experts.lora_B, experts.router = module.lora_A, module.lora_B, module.router
        with_domains = DomainLinear.from_linear(module)
        with_domains.add_module(PREFIX + name, experts)
        replace_module(model, layer, with_domains)
    _begin_domains(model)
    _set_domains(model, [{"name": name, **_own_settings(model)}])
    _append_unknown(model, name)


@torch.no_grad()
def merge_domains(model: SamoeModel, other: SamoeModel) -> list[str]:
    """Adds the domains of another model on the same base, with what its gate knows, and returns their names.

    Experts of the model that belong to no domain are taken away if they have no effect.

    Raises:
        InputError: if either has experts of no domain with an effect, a name is in both, or bases or settings differ.
    """
    has_none = model.config.domains is None
    if (has_none and has_effect(model)) or other.config.domains is None:
        which = "The other" if other.config.domains is None else "This"
        raise InputError(f"{which} model's experts belong to no domain; `rename_domain(None, NAME)` gives them one.")
    own_names = {name.lower(): name for name in model.config.domain_names}
    if both := sorted(name for name in other.config.domain_names if name.lower() in own_names):
        own = own_names[both[0].lower()]
        alike = "" if own == both[0] else f", and the other's {both[0]!r} differs by upper and lower case alone"
        raise InputError(f"Both models have a domain {own!r}{alike}; rename one of them.")
    check_no_adapters(model)
    check_no_adapters(other)
    if base_fingerprint(model, set()) != base_fingerprint(other, set()):
        raise InputError("The models have different bases, whose experts do not fit each other.")
    for name in SHARED_SETTINGS:
        own, others = getattr(model.config, name), getattr(other.config, name)
        if own != others:
            raise InputError(
                f"`{name}` is {own!r} in this model, but {others!r} in the other, whose domains would track otherwise "
                f"here. If they are to, save it so before: {saved_with(name, own)}."
            )
    if has_none:
        remove_experts(model)
        _begin_domains(model)
    for domain in _domains(other):
        add_domain_experts(model, [domain])
        _copy_experts(other, domain["name"], model, domain["name"])
    _set_domains(model, [*_domains(model), *copy.deepcopy(_domains(other))])
    append_rows(_gate(model), _gate(other))
    return other.config.domain_names


@torch.no_grad()
def copy_domain_experts(model: SamoeModel, source: str, target: str) -> bool:
    """Copies experts to a domain whose own have no effect yet, if they fit in, see [`fits_in`]; says whether."""
    if copied := fits_in(model, source, target):
        own = dict(domain_modules(model, target))
        for layer, experts in domain_modules(model, source):
            new, rank = own[layer], experts.lora_rank
            new.router.load_state_dict(experts.router.state_dict())
            new.lora_A[:, :rank] = experts.lora_A
            new.lora_B[..., :rank] = experts.lora_B * (experts.scaling / new.scaling)
    return copied


def fits_in(model: SamoeModel, source: str, target: str) -> bool:
    """Whether a domain's experts can be copied to another's: as many, in layers that the other has too, of no higher
    rank."""
    first, second = (find_domain(model, name) for name in (source, target))
    known, own = (dict(domain_modules(model, name)) for name in (source, target))
    is_new = not any(experts.lora_B.any() for experts in own.values())
    are_as_many = all(first[key] == second[key] for key in ("num_experts", "num_experts_per_tok"))
    if source == target or not (is_new and are_as_many and known.keys() <= own.keys()):
        return False
    return all(experts.lora_rank <= own[layer].lora_rank for layer, experts in known.items())


def fit_domain(model: SamoeModel, name: str, features: Tensor, videos: Tensor) -> None:
    """Lets the gate know a domain, in place of what it knew of it.

    Args:
        features: (frames, features), what [`~domain_gate.pooled_features`] gives for frames of the domain.
        videos: (frames,) integers, which video each frame is of.
    """
    spread = video_spread(model.config.image_size)
    fit_row(*_row(model, name), features, videos, spread)


def confirm_domain(model: SamoeModel, name: str, features: Tensor) -> None:
    """Lets the gate know one more video of a domain, without any training: (frames, features) as in [`fit_domain`]."""
    spread = video_spread(model.config.image_size)
    confirm_row(*_row(model, name), features, spread)


def _own_settings(model: SamoeModel) -> dict[str, Any]:
    return {setting: copy.deepcopy(getattr(model.config, setting)) for setting in EXPERT_SETTINGS}


def _begin_domains(model: SamoeModel) -> None:
    model.config.domains = []
    model.domain_gate = build_domain_gate(model.config)


def _set_domains(model: SamoeModel, domains: list[dict[str, Any]]) -> None:
    model.config.domains = domains
    layers = (name for name, module in model.named_modules() if isinstance(module, DomainLinear))
    model.expert_module_names = [name.removesuffix(".base_layer") for name in layers]  # of what an adapter is around


def _copy_experts(source: SamoeModel, source_domain: str, target: SamoeModel, target_domain: str) -> None:
    """Gives a domain's experts the values of those of a domain of the same or another model."""
    sources = dict(domain_modules(source, source_domain))
    for layer, experts in domain_modules(target, target_domain):
        experts.load_state_dict(sources[layer].state_dict())


def find_domain(model: SamoeModel, name: str) -> dict[str, Any]:
    """A domain of a model, as the configuration describes it."""
    return _domains(model)[_domain_index(model, name)]


def _domains(model: SamoeModel) -> list[dict[str, Any]]:
    return model.config.domains or []


def _append_unknown(model: SamoeModel, name: str) -> None:
    """Gives the gate a row for a domain that it does not know yet."""
    append_rows(_gate(model), DomainGate(_gate(model).sizes, [name]))


def _gate(model: SamoeModel) -> DomainGate:
    assert model.domain_gate is not None  # a model with domains has one
    return model.domain_gate


def _row(model: SamoeModel, name: str) -> tuple[DomainGate, int]:
    """A model's gate, and the row of a domain in it."""
    index = _domain_index(model, name)
    return _gate(model), index


def _domain_index(model: SamoeModel, name: str) -> int:
    names = model.config.domain_names
    if name not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise InputError(f"The model has no domain {name!r}; there are {known}.")
    return names.index(name)


def _check_new_name(model: SamoeModel, name: str, argument: str, old: str | None = None) -> None:
    check_domain_name(name)
    if re.fullmatch(r"(?i)con|prn|aux|nul|(com|lpt)\d", name):
        raise InputError(f"`{argument}` must not be {name!r}, since Windows has no file of that name.")
    for other in model.config.domain_names:
        # Each domain has a file of its name, and some file systems know no case.
        if other.lower() == name.lower() and (other == name or other != old):
            raise InputError(f"`{argument}` {name!r} is the name of a domain that the model has, {other!r}.")


def saved_with(name: str, value: Any) -> str:
    """How a model gets another value of one of [`SHARED_SETTINGS`], in Python."""
    return f"`SamoeModel.from_pretrained(MODEL, {name}={value!r}).save_pretrained(FOLDER)`"


def check_no_adapters(model: SamoeModel) -> None:
    """Refuses a model with adapters of PEFT."""
    if names := adapter_names(model):
        raise InputError(f"The model has adapters of PEFT, such as {names[0]!r}; delete them before.")
