"""A mixture of LoRA experts on a linear layer.

The method is SAM2-MoE's: `y = W x + b + sum_e g_e(x) * (alpha / r) * B_e A_e x`, where the gates `g` are the softmax
over the router's top k logits and zero elsewhere. Nothing here knows of SAM 2.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError
from .expert_kernel import JoinedExperts, add_mixtures
from .expert_router import Router, RouterLogits, top_k_gates

# What a layer with experts has beside the base layer's tensors.
EXPERT_TENSORS = ("lora_A", "lora_B", "router.weight", "router.bias")
# The module that tells which domain's experts a video gets, where experts belong to domains.
DOMAIN_GATE = "domain_gate"
# Where a layer is built whose parameters another one gives it.
META = torch.device("meta")


class ExpertMixture(nn.Module):
    """LoRA experts beside a linear layer, and the router that mixes them per token.

    The experts' tensors are stacked: `lora_A` (experts, rank, in_features), `lora_B` (experts, out_features, rank),
    `router.weight` (experts, in_features), `router.bias` (experts,). New experts have no effect, because `lora_B`
    starts at zero.
    """

    in_features: int
    out_features: int

    def create_experts(
        self,
        *,
        num_experts: int,
        num_experts_per_tok: int,
        lora_rank: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the tensors.

        Args:
            num_experts_per_tok: experts kept for each token, at most `num_experts`.
            lora_alpha: the experts are scaled by `lora_alpha / lora_rank`.
            lora_dropout: dropout probability on the router's input and between A and B, in training.
        """
        factory = {"device": device, "dtype": dtype}
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.lora_rank = lora_rank
        self.scaling = lora_alpha / lora_rank
        self.lora_A = nn.Parameter(torch.empty(num_experts, lora_rank, self.in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(num_experts, self.out_features, lora_rank, **factory))
        self.router = Router(self.in_features, num_experts, **factory)
        self.router_logits = RouterLogits()
        self.dropout = nn.Dropout(lora_dropout)
        if self.lora_A.device.type != "meta":
            self.reset_experts()

    @torch.no_grad()
    def reset_experts(self) -> None:
        """Draws new experts (A Kaiming-uniform with a = sqrt(5), B zero) and a new router (as `nn.Linear` does)."""
        for expert in self.lora_A:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.router.reset_parameters()

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> Tensor:
        """The weight of a plain layer that does what `weight` (out_features, in_features) does beside the one expert.

        It is computed in float32 or wider, and rounded once to the type of `weight`.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        (A,), (B,) = self.lora_A.to(dtype), self.lora_B.to(dtype)
        return torch.addmm(weight.to(dtype), B, A, alpha=self.scaling).to(weight.dtype)

    def gates(self, router_logits: Tensor) -> Tensor:
        """Weights of all experts, zero but for the top k: (..., experts) -> (..., experts)."""
        return top_k_gates(router_logits, self.num_experts_per_tok)

    def mix(self, hidden_states: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """The linear layer's output with the experts': (..., in_features) -> (..., out_features)."""
        tokens, shape = hidden_states.flatten(0, -2), hidden_states.shape[:-1]
        output = linear(tokens)
        joined = joined_experts([self]).to(output.dtype)
        return run_mixtures([self], output, tokens.to(output.dtype), joined, shape).unflatten(0, shape)

    def drops(self) -> bool:
        """Whether there is dropout now."""
        return self.training and self.dropout.p > 0

    def describe_experts(self) -> str:
        """Settings of the experts, for `extra_repr`."""
        return (
            f"num_experts={self.num_experts}, num_experts_per_tok={self.num_experts_per_tok}, "
            f"lora_rank={self.lora_rank}, scaling={self.scaling}"
        )


def joined_experts(mixtures: Sequence[ExpertMixture]) -> JoinedExperts:
    """The experts of alike mixtures of one input."""
    down = torch.cat([m.router.weight for m in mixtures] + [m.lora_A.flatten(0, 1) for m in mixtures])
    router_bias = torch.cat([m.router.bias for m in mixtures]).unsqueeze(1)
    up = torch.stack([m.lora_B.mT.flatten(0, 1) for m in mixtures])
    return JoinedExperts(down, router_bias, up, mixtures[0].num_experts_per_tok, mixtures[0].scaling)


def run_mixtures(
    mixtures: Sequence[ExpertMixture], outputs: Tensor, tokens: Tensor, joined: JoinedExperts, shape: torch.Size
) -> Tensor:
    """Outputs (tokens, n x out_features) of n linear layers with what their alike mixtures add, changed in place.

    Args:
        tokens: (tokens, in_features), the input of all.
        joined: of the mixtures, see [`joined_experts`].
        shape: of the input without its channels, which hooks of `router_logits` see.
    """

    def show(logits: Tensor) -> Tensor:
        """Passes the logits (n, experts, tokens) through `router_logits`, whose hooks see (..., experts)."""
        shown = [m.router_logits(own.mT.unflatten(0, shape)) for m, own in zip(mixtures, logits, strict=True)]
        return torch.stack([own.flatten(0, -2).mT for own in shown])

    dropout = mixtures[0].dropout if mixtures[0].drops() else None
    is_watched = any(mixture.router_logits.is_watched() for mixture in mixtures)
    return add_mixtures(outputs, tokens, joined, dropout, show if is_watched else None)


class BaseLinear(nn.Linear):
    """A linear layer in another's place, with that one's `weight` and `bias`.

    Where a library has quantized the layer, the library's own layer computes the product. It is no submodule, so that
    tensors keep their names, and shares them.
    """

    quantized: "tuple[QuantizedProduct] | None" = None

    def take_over(self, linear: nn.Linear) -> None:
        """Shares the parameters of a layer, and takes over how it computes its product."""
        self.weight, self.bias = linear.weight, linear.bias
        self.quantized = linear.quantized if isinstance(linear, BaseLinear) else None

    def product(self, hidden_states: Tensor) -> Tensor:
        """The plain layer's output: (..., in_features) -> (..., out_features)."""
        if self.quantized is not None:
            return self.quantized[0](hidden_states, self.training)
        return F.linear(hidden_states, self.weight, self.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.product(hidden_states)


class QuantizedProduct:
    """Calls a library's quantized layer by rows: else bitsandbytes' 8 bits scale the wrong ones on a CPU."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    def __call__(self, hidden_states: Tensor, training: bool) -> Tensor:
        self.layer.training = training
        return self.layer(hidden_states.flatten(0, -2)).unflatten(0, hidden_states.shape[:-1])


class ExpertLinear(BaseLinear, ExpertMixture):
    """A linear layer with LoRA experts beside it; for `settings` see [`ExpertMixture.create_experts`]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.create_experts(**settings, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> "ExpertLinear":
        """Wraps `linear`, whose parameters are shared; `settings` are those of the experts."""
        module = cls(linear.in_features, linear.out_features, device=META, **settings)
        module.take_over(linear)
        module.create_experts(**settings, device=linear.weight.device, dtype=floating_type(linear))
        return module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.mix(hidden_states, self.product)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe_experts()}"


def matching_linear_names(
    model: nn.Module, patterns: str | Sequence[str], excluded: str | Sequence[str] | None = None
) -> list[str]:
    """Names of the linear layers of `model` that patterns select.

    Args:
        patterns: names, ends of names, or patterns for either, see [`SamoeConfig`]; each selects a layer.
        excluded: the same, of layers that are left out.

    Raises:
        InputError: if a pattern selects no linear layer, or none is left.
    """
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    selected = {name for pattern in _listed(patterns) for name in _matches(pattern, names, "expert_modules")}
    for pattern in _listed(excluded or ()):
        selected.difference_update(_matches(pattern, modules, "exclude_modules"))
    if not selected:
        raise InputError(f"`exclude_modules` leaves none of the layers of `expert_modules`, got {excluded!r}.")
    return [name for name in names if name in selected]


def _listed(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def _matches(pattern: str, names: Iterable[str], argument: str) -> list[str]:
    """The names that match a pattern, or whose ends do."""
    found = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
    if not found:
        examples = ", ".join(map(repr, [*names][-3:]))
        raise InputError(
            f"`{argument}` matches no layer with {pattern!r}. It holds names, ends of names, or patterns with *, ? and "
            f"[ ]; names are like {examples}."
        )
    return found


def add_experts(
    model: nn.Module,
    expert_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    **settings,
) -> list[str]:
    """Replaces the linear layers that patterns select by [`ExpertLinear`] and returns their names; for `settings` see
    there."""
    names = matching_linear_names(model, expert_modules, exclude_modules)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_module(model, name, ExpertLinear.from_linear(linear, **settings))
    return names


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in another's place, in its mode."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def floating_type(linear: nn.Linear) -> torch.dtype:
    """The type that a layer computes in, which may not be the one that its weights are stored in."""
    stored = [tensor.dtype for tensor in (linear.weight, linear.bias) if tensor is not None]
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.get_default_dtype())


def expert_modules(model: nn.Module) -> Iterator[tuple[str, ExpertMixture]]:
    """The mixtures of experts in `model`, with their names: a layer with experts, or a domain's experts of a layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ExpertMixture))


def has_effect(model: nn.Module) -> bool:
    """Whether any expert changes what its layer puts out."""
    return any(not module.lora_B.is_meta and bool(module.lora_B.any()) for _, module in expert_modules(model))


def expert_values(in_features: int, out_features: int, settings: Mapping[str, Any]) -> int:
    """How many values experts of these settings have beside a linear layer of these sizes, with their router."""
    of_each = settings["lora_rank"] * (in_features + out_features) + in_features + 1
    return settings["num_experts"] * of_each


def is_expert_parameter(name: str) -> bool:
    """Whether a tensor of this name, as in a state dict, is no base model's but of experts, a router or the gate."""
    return name.startswith(f"{DOMAIN_GATE}.") or name.endswith(tuple(f".{tensor}" for tensor in EXPERT_TENSORS))
