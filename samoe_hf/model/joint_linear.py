"""Linear layers of one input, with experts or without, as few products: how a video is propagated and a clip trained.

In a propagated video a layer with one expert is one product, with the expert in its weight. The layers' own weights
stay as they are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoFeedForward

from .domain_experts import DomainExperts, DomainLinear, active_domain
from .expert_kernel import JoinedExperts
from .expert_layer import BaseLinear, ExpertLinear, ExpertMixture, joined_experts, run_mixtures
from .expert_router import Router, is_hooked
from .kept import keep, keeps, once_for_clip

# Whose own code is known here. Parametrized modules, and what PEFT wraps around layers, are of other classes.
OWN_KINDS = (nn.Linear, BaseLinear, ExpertLinear, DomainLinear, DomainExperts, Router, Sam2VideoFeedForward)


class JointLayers(NamedTuple):
    """What n layers with as many inputs, outputs and experts put out together.

    `weight` (n x out, in), `bias` (n x out,). `mixtures`: their experts, which are `joined`; none where each has one
    expert, which is in the weight, and no gradients are computed.
    """

    weight: Tensor
    bias: Tensor | None
    mixtures: Sequence[ExpertMixture] = ()
    joined: JoinedExperts | None = None

    def is_watched(self) -> bool:
        """Whether anybody watches the routers."""
        return any(mixture.router_logits.is_watched() for mixture in self.mixtures)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """(..., in) -> (..., n x out)."""
        shape = hidden_states.shape[:-1]
        tokens = hidden_states.flatten(0, -2).to(self.weight.dtype)
        outputs = F.linear(tokens, self.weight, self.bias)
        if self.joined is not None:
            outputs = run_mixtures(self.mixtures, outputs, tokens, self.joined, shape)
        return outputs.unflatten(0, shape)


def run_jointly(layers: Sequence[Any], hidden_states: Tensor) -> Sequence[Tensor]:
    """What each of some linear layers puts out for one input (..., in_features).

    They run one by one unless their weights can be kept, see [`keeps`], they are alike, and nobody watches them.
    """
    joint = joint_layers(layers, hidden_states)
    if joint is None:
        return [layer(hidden_states) for layer in layers]
    return joint(hidden_states).unflatten(-1, (len(layers), -1)).unbind(-2)


def joint_layers(layers: Sequence[Any], like: Tensor) -> JointLayers | None:
    """Layers as they are now as one for inputs like this; the same object while nothing changes. None: run one by
    one."""
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return once_for_clip(lambda: (*layers, active_domain(), dtype), lambda: _joint_layers(layers, dtype))


def _joint_layers(layers: Sequence[Any], dtype: torch.dtype) -> JointLayers | None:
    experts = [_experts_of(layer) for layer in layers]
    sources = [x for layer, mixture in zip(layers, experts, strict=True) for x in _tensors(layer, mixture)]
    if not keeps(sources) or not _can_be_joined(layers, experts):
        return None
    of = dtype, experts[0] and (experts[0].scaling, _runs_router(experts[0]))
    return keep((*layers, *experts), sources, lambda: _join(layers, experts, dtype), of)


def runs_own_code(module: nn.Module) -> bool:
    """Whether nothing but a module's own code runs in it: it is not watched or changed."""
    is_watched = is_hooked(module) or _has_any_global_hook()
    return type(module) in OWN_KINDS and "forward" not in vars(module) and not is_watched


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer does nothing but its own full product at the moment; one with experts of other domains does."""
    is_full = not (isinstance(layer, BaseLinear) and layer.quantized is not None)
    return runs_own_code(layer) and is_full and _experts_of(layer) is None


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
            if not all(map(runs_own_code, (mixture, mixture.router))):
                return False
            own += (mixture.num_experts, mixture.num_experts_per_tok, mixture.drops() and mixture.dropout.p)
            own += (mixture.lora_rank, mixture.scaling) if _runs_router(mixture) else ()
        sizes.add(own)
    return len(sizes) == 1


def _runs_router(mixture: ExpertMixture) -> bool:
    """Whether the router is run: else the one expert becomes part of its layer's weight."""
    return mixture.num_experts > 1 or torch.is_grad_enabled() or mixture.router_logits.is_watched()


def _tensors(layer: nn.Linear, mixture: ExpertMixture | None) -> list[Tensor]:
    """All that a layer's output depends on beside its input."""
    own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    if mixture is not None:
        own += [mixture.lora_A, mixture.lora_B, mixture.router.weight, mixture.router.bias]
    return own


def _join(layers: Sequence[nn.Linear], experts: Sequence[ExpertMixture | None], dtype: torch.dtype) -> JointLayers:
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases).to(dtype) if biases else None
    mixtures = [mixture for mixture in experts if mixture is not None]
    if mixtures and _runs_router(mixtures[0]):
        return JointLayers(torch.cat(weights).to(dtype), bias, mixtures, joined_experts(mixtures).to(dtype))
    if mixtures:
        weights = [mixture.merge_into(weight) for mixture, weight in zip(mixtures, weights, strict=True)]
    return JointLayers(torch.cat(weights).to(dtype), bias)
