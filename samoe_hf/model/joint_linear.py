"""Linear layers of one input, with experts or without, as few products: how a video is tracked while it is propagated.

A layer with one expert is one product, with the expert in its weight. The layers' own weights stay as they are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoFeedForward

from .domain_experts import DomainExperts, DomainLinear
from .expert_kernel import add_by_kernel, by_pytorch
from .expert_layer import BaseLinear, ExpertLinear, ExpertMixture
from .expert_router import Router, RouterLogits
from .kept import keep, keeps

# Whose own code is known here. Parametrized modules, and what PEFT wraps around layers, are of other classes.
OWN_KINDS = (
    *(nn.Linear, BaseLinear, ExpertLinear, DomainLinear, DomainExperts),
    *(Router, RouterLogits, Sam2VideoFeedForward),
)


class JointWeights(NamedTuple):
    """Weights of n layers, each with as many inputs, outputs and experts.

    `weight` (n x out, in), `bias` (n x out,). Where layers have several experts: `down` (n x experts x (1 + rank), in),
    all routers, then all A; `router_bias` (n x experts, 1); `up` (n, experts x rank, out), all B.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    router_bias: Tensor | None = None
    up: Tensor | None = None


def run_jointly(layers: Sequence[Any], hidden_states: Tensor) -> Sequence[Tensor]:
    """What each of some linear layers puts out for one input (..., in_features).

    They run one by one unless their weights can be kept, see [`keeps`], they are alike, and nobody watches them.
    """
    experts = [_experts_of(layer) for layer in layers]
    sources = [x for layer, mixture in zip(layers, experts, strict=True) for x in _tensors(layer, mixture)]
    first, count = experts[0], len(layers)
    if (count == 1 and first is None) or not keeps(sources) or not _can_be_joined(layers, experts):
        return [layer(hidden_states) for layer in layers]
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    of = dtype, first and first.scaling
    joint = keep((*layers, *experts), sources, lambda: _join(layers, experts, dtype), of)
    tokens = hidden_states.flatten(0, -2).to(dtype)
    outputs = F.linear(tokens, joint.weight, joint.bias).unflatten(1, (count, -1)).transpose(0, 1)
    if first is not None and joint.down is not None and joint.router_bias is not None and joint.up is not None:
        parts = outputs, tokens, joint.down, joint.router_bias, joint.up
        mixing = {"per_token": first.num_experts_per_tok, "scaling": first.scaling}
        if not add_by_kernel(*parts, **mixing):
            outputs = by_pytorch(*parts, **mixing)
    return outputs.unflatten(1, hidden_states.shape[:-1]).unbind()


def runs_own_code(module: nn.Module) -> bool:
    """Whether nothing but a module's own code for evaluation runs in it: it is not trained, watched or changed."""
    is_known = type(module) in OWN_KINDS and "forward" not in vars(module)
    return is_known and not (module.training or module._forward_hooks or module._forward_pre_hooks)


def _experts_of(layer: nn.Module) -> ExpertMixture | None:
    """The experts that a layer runs at the moment, if any."""
    if isinstance(layer, DomainLinear):
        return layer.active_experts()
    return layer if isinstance(layer, ExpertMixture) else None


def _can_be_joined(layers: Sequence[Any], experts: Sequence[ExpertMixture | None]) -> bool:
    """Whether layers' own code is all that runs, and they have equal sizes."""
    sizes = set()
    for layer, mixture in zip(layers, experts, strict=True):
        if not runs_own_code(layer) or (isinstance(layer, BaseLinear) and layer.quantized is not None):
            return False
        own: tuple = (layer.in_features, layer.out_features, layer.bias is None)
        if mixture is not None:
            if not all(map(runs_own_code, (mixture, mixture.router, mixture.router_logits))):
                return False
            own += (mixture.num_experts, mixture.num_experts_per_tok, mixture.lora_rank, mixture.scaling)
        sizes.add(own)
    return len(sizes) == 1


def _tensors(layer: nn.Linear, mixture: ExpertMixture | None) -> list[Tensor]:
    """All that a layer's output depends on beside its input."""
    own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    if mixture is not None:
        own += [mixture.lora_A, mixture.lora_B, mixture.router.weight, mixture.router.bias]
    return own


def _join(layers: Sequence[nn.Linear], experts: Sequence[ExpertMixture | None], dtype: torch.dtype) -> JointWeights:
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases).to(dtype) if biases else None
    mixtures = [mixture for mixture in experts if mixture is not None]
    if not mixtures or mixtures[0].num_experts == 1:
        if mixtures:
            weights = [mixture.merge_into(weight) for mixture, weight in zip(mixtures, weights, strict=True)]
        return JointWeights(torch.cat(weights).to(dtype), bias)
    down = torch.cat([m.router.weight for m in mixtures] + [m.lora_A.flatten(0, 1) for m in mixtures])
    router_bias = torch.cat([m.router.bias for m in mixtures]).unsqueeze(1)
    up = torch.stack([m.lora_B.mT.flatten(0, 1) for m in mixtures])
    return JointWeights(torch.cat(weights).to(dtype), bias, *(x.to(dtype) for x in (down, router_bias, up)))
