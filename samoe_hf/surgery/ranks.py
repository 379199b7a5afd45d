"""The ranks of a domain's experts, layer by layer: raised without effect, or cut to the directions that do most."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from samoe_hf.errors import InputError
from samoe_hf.model.domain_experts import DomainExperts, domain_modules
from samoe_hf.model.modeling_samoe import SamoeModel

from .domains import check_no_adapters, find_domain, remove_domain_layers
from .experts import new_experts, svd_of_product


@torch.no_grad()
def sort_directions(model: SamoeModel, name: str) -> dict[str, Tensor]:
    """Turns the directions of a domain's experts into the singular ones of each scaled product B A, the largest first.

    The products stay what they are, but for rounding. Returns the squared singular values (rank,) by the name of a
    layer, summed over its experts.
    """
    find_domain(model, name)
    energies = {}
    for layer, experts in domain_modules(model, name):
        U, values, Vh = svd_of_product(experts.lora_B, experts.lora_A)
        roots, rank = values.sqrt(), experts.lora_rank
        experts.lora_A.zero_()[:, : values.shape[1]] = (roots[..., None] * Vh).to(experts.lora_A)
        experts.lora_B.zero_()[..., : values.shape[1]] = (U * roots[:, None]).to(experts.lora_B)
        squares = (experts.scaling * values).square().sum(dim=0)
        energies[layer] = nn.functional.pad(squares, (0, rank - len(squares))).cpu()
    return energies


@torch.no_grad()
def set_ranks(model: SamoeModel, name: str, ranks: int | Mapping[str, int]) -> None:
    """Gives a domain's experts other ranks. The first directions stay, and new ones have no effect yet.

    The scale `lora_alpha / lora_rank` of the layers of the highest rank falls with the square root of that rank, as in
    rsLoRA (arXiv:2312.03732): where it stays, experts of raised ranks learn too fast, and may lose what they knew. B
    makes up for it. Optimizers must be made afterwards.

    Args:
        ranks: of all layers, or by the name of each; 0 takes the domain's experts of that layer away.
    """
    check_no_adapters(model)
    domain, layers = find_domain(model, name), dict(domain_modules(model, name))
    wanted = dict.fromkeys(layers, ranks) if isinstance(ranks, int) else dict(ranks)
    if wanted.keys() != layers.keys() or min(wanted.values()) < 0 or not any(wanted.values()):
        raise InputError(f"`ranks` must be a rank of each of the {len(layers)} layers of {name!r}, got {ranks!r}.")
    most = max(wanted.values())
    alpha = domain["lora_alpha"] * math.sqrt(most / domain["lora_rank"])
    for layer, rank in wanted.items():
        if rank:
            _resize(layers[layer], rank, alpha / rank)
    domain.pop("rank_pattern", None)
    domain.update(lora_rank=most, lora_alpha=alpha)
    if pattern := {layer: rank for layer, rank in wanted.items() if rank not in (0, most)}:
        domain["rank_pattern"] = pattern
    remove_domain_layers(model, name, [layer for layer, rank in wanted.items() if not rank])


def _resize(experts: DomainExperts, rank: int, scaling: float) -> None:
    A, B = new_experts(experts, experts.num_experts, rank)
    kept = min(rank, experts.lora_rank)
    A[:, :kept] = experts.lora_A[:, :kept]
    B[..., :kept] = experts.lora_B[..., :kept] * (experts.scaling / scaling)
    for leaf, value in {"lora_A": A, "lora_B": B}.items():
        setattr(experts, leaf, nn.Parameter(value, requires_grad=getattr(experts, leaf).requires_grad))
    experts.lora_rank, experts.scaling = rank, scaling
