"""Surgery on a model's experts: add, remove, merge, renew and freeze them.

Each function changes all layers with experts alike and checks everything before it changes anything. Stacked tensors
become new parameters, so optimizers must be made after it. New experts are asleep: their router row has the weight 0
and the bias [`ASLEEP`], so that no token chooses them, until [`wake_experts`] lets them compete, which the first
training step does.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .experts import EXPERT_TENSORS, ExpertLinear, add_experts, expert_modules, matching_linear_names

if TYPE_CHECKING:
    from .modeling_samoe import SamoeModel

# A router's bias of this leaves an expert a gate of exactly 0 beside any other, and float16 can hold it.
ASLEEP = -1e4

EXPERT_LAYER_SETTINGS = (
    "expert_modules",
    "num_experts",
    "num_experts_per_tok",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
)

# By layer: (experts,) tensors that tell how much each expert is used, such as its mean gate weight.
Usage = Mapping[str, Tensor]


def check_experts(model: "SamoeModel", experts: Sequence[int], name: str = "experts") -> list[int]:
    """The indices as a list.

    Raises:
        ValueError: if one is no expert of the model, or occurs twice.
    """
    count = model.config.num_experts
    for expert in experts:
        if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < count:
            raise ValueError(f"`{name}` must be integers from 0 to {count - 1}, got {expert!r}.")
    if len(set(experts)) < len(experts):
        raise ValueError(f"`{name}` must be different experts, got {list(experts)}.")
    return list(experts)


def prune_experts(
    model: "SamoeModel",
    keep: Sequence[int] | None = None,
    *,
    usage: Usage | None = None,
    num_experts: int | None = None,
) -> None:
    """Removes experts with their router rows; the kept ones keep their order.

    The output stays the same for tokens whose top k experts are all kept; others go to their best kept experts.

    Args:
        keep: the experts that stay, in every layer.
        usage: instead of `keep`: name of each layer with experts -> (experts,); each layer keeps its most used.
        num_experts: with `usage`: how many stay.

    Raises:
        ValueError: for indices or names that are not the model's, or if fewer than `num_experts_per_tok` would stay.
    """
    if (keep is None) == (usage is None):
        raise ValueError("Exactly one of `keep` and `usage` must be given.")
    if (usage is None) != (num_experts is None):
        raise ValueError("`num_experts`, the number of experts that stay, must be given with `usage`, and only then.")
    if usage is not None:
        _check_usage(model, usage)
        if isinstance(num_experts, bool) or not isinstance(num_experts, int):
            raise ValueError(f"`num_experts` must be an integer, got {num_experts!r}.")
        _check_remaining(model, num_experts)
        kept = {name: sorted(usage[name].topk(num_experts).indices.tolist()) for name, _ in expert_modules(model)}
    else:
        _check_remaining(model, len(check_experts(model, keep, "keep")))
        kept = {name: sorted(keep) for name, _ in expert_modules(model)}
    for name, module in expert_modules(model):
        frozen = [kept[name].index(expert) for expert in frozen_experts(module) if expert in kept[name]]
        _replace(module, {tensor: _of(module, tensor)[kept[name]] for tensor in EXPERT_TENSORS})
        _freeze_rows(module, frozen)
    model.config.num_experts = num_experts or len(keep)


@torch.no_grad()
def merge_experts(model: "SamoeModel", experts: Sequence[int], *, usage: Usage | None = None) -> int:
    """Merges experts into one, which takes the place of the first of them by index; the others are removed.

    The merged expert is, layer by layer, the mean of their products B A, weighted by `usage`: exact as far as the rank
    holds it, and else the nearest matrix of that rank (truncated SVD). Its router row is the same mean of theirs. The
    output is preserved if the experts are equal in each layer and either each token goes to one expert
    (`num_experts_per_tok` 1) or to all of them; then a token goes to all that are left, and `num_experts_per_tok`
    shrinks with the number of experts.

    Args:
        experts: two or more.
        usage: name of each layer with experts -> (experts,), all of at least 0; equal weights if not given.

    Returns:
        The index of the merged expert.

    Raises:
        ValueError: for indices or names that are not the model's, for frozen experts, or if fewer experts than
            `num_experts_per_tok` would be left.
    """
    experts = sorted(check_experts(model, experts))
    if len(experts) < 2:
        raise ValueError(f"`experts` must be at least two experts to merge, got {experts}.")
    if usage is not None:
        _check_usage(model, usage)
    for _, module in expert_modules(model):
        if held := sorted(set(experts) & set(frozen_experts(module))):
            raise ValueError(f"`experts` {held} are frozen; `freeze_experts([])` lets them change.")
    num_experts = model.config.num_experts - len(experts) + 1
    goes_to_all = model.config.num_experts_per_tok == model.config.num_experts
    if not goes_to_all:
        _check_remaining(model, num_experts)
    kept = [expert for expert in range(model.config.num_experts) if expert not in experts[1:]]
    for name, module in expert_modules(model):
        shares = torch.ones(len(experts)) if usage is None else usage[name][experts].double()
        shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
        values = {tensor: _of(module, tensor).clone() for tensor in EXPERT_TENSORS}
        target = experts[0]
        A, B = _mean_product(module.lora_A[experts], module.lora_B[experts], shares)
        values["lora_A"][target], values["lora_B"][target] = A, B
        for tensor in ("router.weight", "router.bias"):
            rows = values[tensor][experts].double()
            values[tensor][target] = torch.tensordot(shares.to(rows), rows, dims=1)
        if goes_to_all:
            # Gates of equal rows add up: log sum exp (l_i) = sum p_i l_i + entropy(p) where p is their softmax.
            values["router.bias"][target] += torch.special.entr(shares).sum()
        frozen = [kept.index(expert) for expert in frozen_experts(module)]
        _replace(module, {tensor: value[kept] for tensor, value in values.items()})
        _freeze_rows(module, frozen)
    model.config.num_experts = num_experts
    if goes_to_all:
        _set_num_experts_per_tok(model, num_experts)
    return experts[0]


@torch.no_grad()
def reset_expert(model: "SamoeModel", expert: int) -> None:
    """Makes an expert a new one: A and its router row drawn anew, B zero. Tokens that choose it get the base's output.

    Raises:
        ValueError: if the model has no such expert, or it is frozen.
    """
    check_experts(model, [expert], "expert")
    if any(expert in frozen_experts(module) for _, module in expert_modules(model)):
        raise ValueError(f"`expert` {expert} is frozen; `freeze_experts([])` lets it change.")
    for _, module in expert_modules(model):
        nn.init.kaiming_uniform_(module.lora_A[expert], a=math.sqrt(5))
        module.lora_B[expert] = 0
        bound = module.in_features**-0.5  # as nn.Linear draws
        module.router.weight[expert].uniform_(-bound, bound)
        module.router.bias[expert].uniform_(-bound, bound)


def replace_experts(model: "SamoeModel", **settings) -> None:
    """Takes all experts away and gives the model new ones, without effect, by other settings.

    Args:
        settings: any of the configuration's `expert_modules`, `num_experts`, `num_experts_per_tok`, `lora_rank`,
            `lora_alpha` and `lora_dropout`; the others stay as they are.

    Raises:
        ValueError: for a value out of range, or modules that the model does not have.
    """
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        if name not in EXPERT_LAYER_SETTINGS:
            raise ValueError(f"`settings` must be among {', '.join(EXPERT_LAYER_SETTINGS)}, got {name!r}.")
        setattr(config, name, value)
    config.check_experts()
    matching_linear_names(model, config.expert_modules)
    for name, module in list(expert_modules(model)):
        parent_name, _, child_name = name.rpartition(".")
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear.weight, linear.bias = module.weight, module.bias
        setattr(model.get_submodule(parent_name), child_name, linear)
    layer_settings = {name: getattr(config, name) for name in EXPERT_LAYER_SETTINGS if name != "expert_modules"}
    model.expert_names = add_experts(model, config.expert_modules, **layer_settings)
    for name in settings:
        setattr(model.config, name, settings[name])
    model.train(model.training)
    model.set_trainable("experts")


def grow_experts(model: "SamoeModel", num_new: int) -> list[int]:
    """Adds new experts without effect behind the others, asleep until the first training step.

    Returns:
        Their indices.
    """
    if isinstance(num_new, bool) or not isinstance(num_new, int) or num_new < 1:
        raise ValueError(f"`num_new` must be an integer of at least 1, got {num_new!r}.")
    return append_experts(model, {name: new_expert_tensors(module, num_new) for name, module in expert_modules(model)})


@torch.no_grad()
def new_expert_tensors(module: ExpertLinear, num_new: int) -> tuple[Tensor, Tensor]:
    """A (new, rank, in), drawn as a LoRA's, and B (new, out, rank), zero."""
    A = module.lora_A.new_empty(num_new, *module.lora_A.shape[1:])
    for expert in A:
        nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
    return A, module.lora_B.new_zeros(num_new, *module.lora_B.shape[1:])


@torch.no_grad()
def append_experts(model: "SamoeModel", tensors: Mapping[str, tuple[Tensor, Tensor]]) -> list[int]:
    """As [`grow_experts`], of given tensors: name of each layer -> A (new, rank, in) and B (new, out, rank)."""
    before = model.config.num_experts
    for name, module in expert_modules(model):
        A, B = tensors[name]
        new = {
            "lora_A": A,
            "lora_B": B,
            "router.weight": module.router.weight.new_zeros(len(A), module.in_features),
            "router.bias": module.router.bias.new_full((len(A),), ASLEEP),
        }
        frozen = frozen_experts(module)
        _replace(module, {tensor: torch.cat([_of(module, tensor), new[tensor]]) for tensor in EXPERT_TENSORS})
        _freeze_rows(module, frozen)
    model.config.num_experts = before + len(A)
    return list(range(before, before + len(A)))


@torch.no_grad()
def wake_experts(model: "SamoeModel") -> None:
    """Gives experts that are asleep, where routers are trainable, a router row that competes with the others'.

    Each row is a random mixture of the others, so that its logits are spread as theirs are, plus a new row of
    `nn.Linear`. The draw is the same in all processes of a training run. Frozen experts sleep on.

    Raises:
        ValueError: if the weights are sharded (FSDP), so that there are no whole rows; wake them before.
    """
    for _, module in expert_modules(model):
        weight, bias = module.router.weight, module.router.bias
        asleep = bias <= ASLEEP / 2
        if not weight.requires_grad or not asleep.any():
            continue
        if isinstance(weight, DTensor):
            raise ValueError("New experts sleep, and the weights are sharded; call `model.wake_experts()` before that.")
        others = torch.cat([weight[~asleep], bias[~asleep, None]], dim=1).double().cpu()
        for expert in asleep.nonzero()[:, 0].tolist():
            if expert not in frozen_experts(module):
                generator = torch.Generator().manual_seed(expert)
                row = 2 * torch.rand(module.in_features + 1, generator=generator, dtype=torch.float64) - 1
                row *= module.in_features**-0.5
                mixture = torch.randn(len(others), generator=generator, dtype=torch.float64)
                mean = others.mean(dim=0)
                row += mean + mixture @ (others - mean) / math.sqrt(len(others))
                weight[expert], bias[expert] = row[:-1].to(weight), row[-1].to(bias)


def freeze_experts(model: "SamoeModel", experts: Sequence[int]) -> None:
    """Keeps exactly these experts and their router rows as they are while the others are trained.

    Their gradients are zero, and whatever an optimizer does to them (weight decay, momentum) is undone at the end of
    its step. They stay frozen in copies and through surgery; saved files do not tell. Optimizers that keep parameters
    of their own (DeepSpeed ZeRO, FSDP) are not reached.

    Args:
        experts: their indices; an empty list lets all be trained.

    Raises:
        ValueError: if the model has no such expert.
    """
    experts = check_experts(model, experts)
    for _, module in expert_modules(model):
        _freeze_rows(module, experts)


def frozen_experts(module: ExpertLinear) -> list[int]:
    """Indices of a layer's frozen experts."""
    return getattr(module, "_frozen_experts", [])


def _freeze_rows(module: ExpertLinear, experts: list[int]) -> None:
    module._frozen_experts = sorted(experts)
    for tensor in EXPERT_TENSORS:
        parameter = _of(module, tensor)
        if handle := getattr(parameter, "_frozen_gradient", None):
            handle.remove()
        parameter._frozen_rows = parameter._frozen_gradient = None
    if not any(hook is _mark_frozen for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_mark_frozen)
    _mark_frozen(module)


def _mark_frozen(module: ExpertLinear, *_) -> None:
    """Marks the frozen rows at the parameters; before each forward, since copies of a module have new parameters."""
    experts = frozen_experts(module)
    for tensor in EXPERT_TENSORS if experts else ():
        parameter = _of(module, tensor)
        parameter._frozen_rows = experts
        if parameter.requires_grad and getattr(parameter, "_frozen_gradient", None) is None:
            parameter._frozen_gradient = parameter.register_hook(_zero_rows(experts))


def _zero_rows(experts: list[int]) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[experts] = 0
        return gradient

    return hook


def _keep_frozen(optimizer: torch.optim.Optimizer, *_) -> None:
    for parameter, experts in _with_frozen_rows(optimizer):
        parameter._frozen_values = parameter.detach()[experts].clone()


@torch.no_grad()
def _restore_frozen(optimizer: torch.optim.Optimizer, *_) -> None:
    for parameter, experts in _with_frozen_rows(optimizer):
        if (values := parameter.__dict__.pop("_frozen_values", None)) is not None:
            parameter[experts] = values


def _with_frozen_rows(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, list[int]]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if experts := getattr(parameter, "_frozen_rows", None):
                yield parameter, experts


# For all optimizers, whoever makes them: torch runs these hooks in every subclass's `step`, also through Accelerate and
# gradient scalers. They look at the optimizer's parameters and leave those without frozen rows alone. Zero gradients
# would not do, since weight decay and momentum move parameters as well. Where this code is loaded twice, as a package
# and with a model's repository, both pairs run: values are kept twice and put back once.
register_optimizer_step_pre_hook(_keep_frozen)
register_optimizer_step_post_hook(_restore_frozen)


def _of(module: ExpertLinear, tensor: str) -> nn.Parameter:
    return module.get_parameter(tensor)


def _replace(module: ExpertLinear, values: Mapping[str, Tensor]) -> None:
    """Sets a layer's stacked tensors, with another number of experts, as new parameters."""
    for tensor, value in values.items():
        owner, _, leaf = tensor.rpartition(".")
        parameter = nn.Parameter(value.detach().clone(), requires_grad=_of(module, tensor).requires_grad)
        setattr(module.get_submodule(owner), leaf, parameter)
    module.num_experts = module.router.out_features = len(module.lora_A)


def _set_num_experts_per_tok(model: "SamoeModel", num_experts_per_tok: int) -> None:
    model.config.num_experts_per_tok = num_experts_per_tok
    for _, module in expert_modules(model):
        module.num_experts_per_tok = num_experts_per_tok


def _check_remaining(model: "SamoeModel", num_experts: int) -> None:
    least, most = model.config.num_experts_per_tok, model.config.num_experts
    if not least <= num_experts <= most:
        raise ValueError(
            f"{num_experts} experts cannot stay: from `num_experts_per_tok` ({least}) to all ({most}) can."
        )


def _check_usage(model: "SamoeModel", usage: Usage) -> None:
    for name, _ in expert_modules(model):
        shape = tuple(getattr(usage.get(name), "shape", ()))
        if shape != (model.config.num_experts,):
            got = f"shape {shape}" if name in usage else "nothing"
            raise ValueError(f"`usage` must have {model.config.num_experts} values for {name!r}, got {got}.")


def _mean_product(A: Tensor, B: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The best A (rank, in) and B (out, rank) for the mean of B_i A_i, from A (n, rank, in) and B (n, out, rank)."""
    rank = A.shape[1]
    left = (B.double() * shares.to(B.device)[:, None, None]).transpose(0, 1).flatten(1)  # (out, n * rank)
    right = A.double().flatten(0, 1)  # (n * rank, in)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    U, S, Vh = torch.linalg.svd(r_left @ r_right.T)
    count = int((S[:rank] > S[0] * 1e-12).sum())
    # Where the product needs no more rank, B is zero and A any, so that it can be learned.
    new_A, new_B = A[0].clone(), torch.zeros_like(B[0])
    roots = S[:count].sqrt()
    new_A[:count] = (roots[:, None] * (Vh[:count] @ q_right.T)).to(A)
    new_B[:, :count] = (q_left @ U[:, :count] * roots).to(B)
    return new_A, new_B
