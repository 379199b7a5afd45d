"""Experts <-> LoRAs of PEFT: one expert is a LoRA on the layers that have experts, without a router.

A PEFT adapter is a folder or Hub repository with `adapter_config.json` and `adapter_model.safetensors`; only these are
read, and pickled weights are refused.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, requires_backends

from samoe_hf.errors import InputError
from samoe_hf.model.adapters import (
    PREFIX,
    is_lora,
    name_layers,
    odd_settings,
    read_adapter_config,
    read_adapter_tensors,
)
from samoe_hf.model.domain_experts import domain_modules
from samoe_hf.model.expert_layer import ExpertMixture, expert_modules
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.surgery.domains import add_domain, find_domain, remove_domain
from samoe_hf.surgery.experts import append_experts, check_experts, check_has_no_domains, new_experts
from samoe_hf.whole_files import new_folder

if TYPE_CHECKING:
    from peft import LoraConfig

# Settings of LoraConfig that add something an expert has no place for, or change what its matrices mean.
UNSUPPORTED = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora",
)  # fmt: skip


class Lora(NamedTuple):
    """A LoRA of PEFT: name of each layer -> A (rank, in), B (out, rank), and the scale of their product B A."""

    source: str
    layers: dict[str, tuple[Tensor, Tensor, float]]


def export_expert(model: SamoeModel, expert: int, directory: str | os.PathLike, domain: str | None = None) -> None:
    """Writes one expert as a LoRA that `PeftModel.from_pretrained(base, directory)` loads onto a SAM 2 video model.

    It does what this model does if each token goes to that expert alone. The router stays behind. The directory is new
    or empty. Of a model with domains, `domain` is the one that the expert belongs to.
    """
    requires_backends(model, "peft")
    from peft import LoraConfig

    if domain is None:
        check_has_no_domains(model)
        settings, modules = model.config.to_dict(), expert_modules(model)
    else:
        settings, modules = find_domain(model, domain), domain_modules(model, domain)
    check_experts([expert], settings["num_experts"], "expert")
    tensors, names = {}, []
    for name, module in modules:
        # Where an adapter of PEFT lies around a layer, the layer is its `base_layer`.
        names.append(name.removesuffix(".base_layer"))
        for leaf in ("lora_A", "lora_B"):
            tensor = getattr(module, leaf)[expert].detach()
            tensors[f"{PREFIX}{names[-1]}.{leaf}.weight"] = tensor.cpu().clone()
    alpha, source = settings["lora_alpha"], model.origin.source or {}
    config = LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=settings["lora_dropout"],
        target_modules=names,
        rank_pattern=settings.get("rank_pattern") or {},
        base_model_name_or_path=source.get("name_or_path"),
        revision=source.get("revision"),
        inference_mode=True,
    )
    with new_folder(directory) as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def add_lora_domain(model: SamoeModel, name: str, source: str | os.PathLike, **hub) -> None:
    """Adds a LoRA of PEFT as a domain of one expert, whose output is the LoRA's; see [`add_expert`]."""
    lora = read_lora(source, **hub)
    rank = max(len(A) for A, _, _ in lora.layers.values())
    linear = {layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)}
    if others := sorted(set(lora.layers) - linear):
        raise InputError(f"{source} is a LoRA on a layer {others[0]!r}, which the model does not have.")
    # The scale of the first; where all have the same, their B stay as they are.
    alpha = next(iter(lora.layers.values()))[2] * rank
    add_domain(
        model,
        name,
        num_experts=1,
        num_experts_per_tok=1,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        expert_modules=sorted(lora.layers),
    )
    try:
        tensors = {layer: _as_expert(layer, module, lora) for layer, module in domain_modules(model, name)}
    except ValueError:
        remove_domain(model, name)
        raise
    for layer, module in domain_modules(model, name):
        module.lora_A.data, module.lora_B.data = tensors[layer]


def add_expert(model: SamoeModel, source: str | os.PathLike, **hub) -> int:
    """Adds a LoRA of PEFT as a new expert, behind the others, and returns its index.

    A lower rank is filled up with B zero. Its scale goes into B where it is not the model's `lora_alpha / lora_rank`.
    Layers that the LoRA leaves out get an expert without effect. The expert is asleep: no token goes to it until a
    training step or `wake_experts` gives it a router row.

    Args:
        source: folder or Hub id of the LoRA.
        hub: where and how it is fetched: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only`, ...

    Raises:
        InputError: if it is no plain LoRA, of a higher rank than the model's experts, or on layers without experts.
        OSError: if there is no such adapter.
    """
    check_has_no_domains(model)
    return append_experts(model, expert_tensors(model, read_lora(source, **hub)))[0]


def expert_tensors(model: SamoeModel, lora: Lora) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA as an expert: name of each layer with experts -> A (1, rank, in), B (1, out, rank)."""
    modules = dict(expert_modules(model))
    known = {name.removesuffix(".base_layer") for name in modules}
    if others := sorted(set(lora.layers) - known):
        raise InputError(
            f"{lora.source} is a LoRA on {len(others)} layers without experts, such as {others[0]!r}; load the model "
            "with `expert_modules` that include them."
        )
    return {name: _as_expert(name.removesuffix(".base_layer"), module, lora) for name, module in modules.items()}


def _as_expert(name: str, module: ExpertMixture, lora: Lora) -> tuple[Tensor, Tensor]:
    """A (1, rank, in) and B (1, out, rank) of the expert that a LoRA is in one layer."""
    new_A, new_B = new_experts(module, 1)
    if name not in lora.layers:
        return new_A, new_B
    A, B, scale = lora.layers[name]
    if (A.shape[1], B.shape[0]) != (module.in_features, module.out_features):
        raise InputError(
            f"{lora.source} is for another model: its LoRA on {name!r} goes from {A.shape[1]} to {B.shape[0]} "
            f"features, the layer from {module.in_features} to {module.out_features}."
        )
    rank = len(A)
    if rank > module.lora_rank:
        raise InputError(
            f"{lora.source} has rank {rank} on {name!r}, and the model's experts have {module.lora_rank}, which "
            f"cannot hold it; make the model with `lora_rank` of at least {rank}."
        )
    new_A[0, :rank] = A.to(new_A)
    # The very same tensor where the scales agree.
    new_B[0, :, :rank] = (B if scale == module.scaling else B.double() * (scale / module.scaling)).to(new_B)
    if not (new_A.isfinite().all() and new_B.isfinite().all()):
        raise InputError(f"{lora.source} has infinite values or NaN on {name!r}, which would reach all tokens.")
    return new_A, new_B


def read_lora(source: str | os.PathLike, **hub) -> Lora:
    """Reads a LoRA of PEFT."""
    requires_backends(read_lora, "peft")
    config = _read_config(source, hub)
    tensors = read_adapter_tensors(source, hub)
    name_layers(source, config, tensors)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.*)\.(lora_[AB])\.weight", key.removeprefix(PREFIX))
        if found is None or tensor.dim() != 2:
            raise InputError(
                f"{source} has {key!r} {tuple(tensor.shape)}, which is no matrix of a LoRA on a linear layer."
            )
        pairs.setdefault(found[1], {})[found[2]] = tensor
    layers = {}
    for name, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise InputError(f"{source} has only one matrix of the LoRA on {name!r}, {next(iter(pair))}.")
        rank, scale = _rank_and_scale(source, config, name)
        if not len(pair["lora_A"]) == pair["lora_B"].shape[1] == rank:
            raise InputError(
                f"{source} says rank {rank} of {name!r}, but has A {tuple(pair['lora_A'].shape)} and "
                f"B {tuple(pair['lora_B'].shape)}."
            )
        layers[name] = (pair["lora_A"], pair["lora_B"], scale)
    if not layers:
        raise InputError(f"{source} has no tensors.")
    return Lora(str(source), layers)


def _read_config(source: str | os.PathLike, hub: Mapping[str, Any]) -> "LoraConfig":
    config = read_adapter_config(source, hub)
    if not is_lora(config):
        raise InputError(f"{source} is an adapter of type {config.peft_type}; an expert can only be a LoRA.")
    if odd := odd_settings(config, UNSUPPORTED):
        raise InputError(f"{source} is more than a plain LoRA, so it cannot be an expert: {odd}.")
    return config


def _rank_and_scale(source: str | os.PathLike, config: "LoraConfig", name: str) -> tuple[int, float]:
    """Rank and scale of the LoRA on a layer, as PEFT finds them."""
    from peft.utils.other import get_pattern_key

    try:
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
    except (ValueError, TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise InputError(f"{source} says no rank and scale of {name!r}: {error}") from error
