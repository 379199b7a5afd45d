"""New experts sleep until the first training step: no token chooses them, so that they change nothing.

The weight of their router row is 0 and its bias is [`ASLEEP`]. [`wake_experts`] lets them compete. Experts whose rows
are frozen, which [`~surgery.experts.freeze_experts`] does by a parametrization, stay as they are.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from .errors import InputError
from .expert_layer import ExpertMixture, expert_modules

# A router's bias of this leaves an expert a gate of exactly 0 beside any other, and float16 can hold it.
ASLEEP = -1e4


@torch.no_grad()
def wake_experts(model: nn.Module) -> None:
    """Gives experts that are asleep, where routers are trainable, a router row that competes with the others'.

    Each row is a random mixture of the others, so that its logits are spread as theirs are, plus a new row of
    `nn.Linear`. It depends on PyTorch's seed, and is the same in all processes of a training run. Frozen experts
    stay asleep. Sharded weights (FSDP), of which there are no whole rows, are an error: wake them before.
    """
    seed = None
    for layer, (_, module) in enumerate(expert_modules(model)):
        weight, bias = module.router.weight, module.router.bias
        asleep = bias <= ASLEEP / 2
        if not stacked_parameter(module, "router.weight").requires_grad or not asleep.any():
            continue
        if isinstance(weight, DTensor):
            raise InputError("New experts sleep, and the weights are sharded; call `model.wake_experts()` before that.")
        seed = _common_seed() if seed is None else seed
        others = torch.cat([weight[~asleep], bias[~asleep, None]], dim=1).cpu().double()  # no float64 on Apple's GPUs
        awake = sorted(set(asleep.nonzero()[:, 0].tolist()) - set(frozen_experts(module)))
        for expert in awake:
            generator = torch.Generator().manual_seed((seed + 1000003 * layer + expert) % 2**63)
            row = _competing_row(others, generator)
            stacked_parameter(module, "router.weight")[expert] = row[:-1].to(weight)
            stacked_parameter(module, "router.bias")[expert] = row[-1].to(bias)


class FrozenRows(nn.Module):
    """A parametrization of a stacked tensor: some rows have fixed values, whatever becomes of the parameter's."""

    rows: Tensor
    values: Tensor

    def __init__(self, rows: Sequence[int], stacked: Tensor):
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows, device=stacked.device), persistent=False)
        self.register_buffer("values", stacked.detach()[self.rows].clone(), persistent=False)

    def forward(self, stacked: Tensor) -> Tensor:
        return stacked.index_copy(0, self.rows, self.values)


def frozen_rows(owner: nn.Module, leaf: str) -> FrozenRows | None:
    """The frozen rows of a module's tensor, if any."""
    if not parametrize.is_parametrized(owner, leaf):
        return None
    frozen = owner.get_submodule(f"parametrizations.{leaf}.0")
    assert isinstance(frozen, FrozenRows)
    return frozen


def frozen_experts(module: ExpertMixture) -> list[int]:
    """Indices of a layer's frozen experts."""
    frozen = frozen_rows(module, "lora_A")
    return [] if frozen is None else frozen.rows.tolist()


def stacked_owner(module: ExpertMixture, tensor: str) -> tuple[nn.Module, str]:
    """The module that a stacked tensor belongs to, and its name there."""
    path, _, leaf = tensor.rpartition(".")
    return module.get_submodule(path), leaf


def stacked_parameter(module: ExpertMixture, tensor: str) -> nn.Parameter:
    """The parameter behind a stacked tensor."""
    owner, leaf = stacked_owner(module, tensor)
    return owner.get_parameter(leaf if frozen_rows(owner, leaf) is None else f"parametrizations.{leaf}.original")


def _common_seed() -> int:
    """PyTorch's seed, that of the first process where there are several."""
    seed = [torch.initial_seed()]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(seed, src=0)
    return seed[0]


def _competing_row(others: Tensor, generator: torch.Generator) -> Tensor:
    """A router row, weight and bias (in_features + 1,), whose logits are spread as those of `others` (rows, same)."""
    num_inputs = others.shape[1] - 1
    row = 2 * torch.rand(num_inputs + 1, generator=generator, dtype=torch.float64) - 1
    row *= num_inputs**-0.5
    mixture = torch.randn(len(others), generator=generator, dtype=torch.float64)
    mean = others.mean(dim=0)
    return row + mean + mixture @ (others - mean) / math.sqrt(len(others))
