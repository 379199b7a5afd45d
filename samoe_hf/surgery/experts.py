"""Surgery on a model's experts: add, remove, merge, renew and freeze them.

Each function changes all layers with experts alike, and checks everything before it changes anything. Stacked tensors
become new parameters, so optimizers must be made afterwards; freezing alone keeps them. New experts are asleep: no
token chooses them until the first training step calls [`~expert_sleep.wake_experts`].
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from samoe_hf.errors import InputError
from samoe_hf.model.configuration_samoe import EXPERT_SETTINGS, integer
from samoe_hf.model.expert_layer import (
    EXPERT_TENSORS,
    META,
    BaseLinear,
    ExpertLinear,
    ExpertMixture,
    add_experts,
    expert_modules,
    matching_linear_names,
    replace_module,
)
from samoe_hf.model.expert_sleep import (
    ASLEEP,
    FrozenRows,
    frozen_experts,
    frozen_rows,
    stacked_owner,
    stacked_parameter,
)
from samoe_hf.model.modeling_samoe import SamoeModel

LEAVES = [tensor.rpartition(".")[2] for tensor in EXPERT_TENSORS]
# By layer: (experts,) tensors that tell how much each expert is used, such as its mean gate weight.
Usage = Mapping[str, Tensor]


def prune_experts(
    model: SamoeModel,
    *,
    keep: Sequence[int] | None = None,
    drop: Sequence[int] | None = None,
    usage: Usage | None = None,
    num_experts: int | None = None,
) -> None:
    """Removes experts with their router rows. The others keep their order.

    The output stays the same for tokens whose top k experts all stay. Other tokens go to the best experts that do.

    Args:
        keep: the experts that stay, in every layer; or instead `drop`, those that are removed.
        usage: instead, name of each layer with experts -> (experts,). Each layer keeps its `num_experts` most used.
    """
    check_has_no_domains(model)
    if sum(given is not None for given in (keep, drop, usage)) != 1:
        raise InputError("Exactly one of `keep`, `drop` and `usage` must be given.")
    if (usage is None) != (num_experts is None):
        raise InputError("`num_experts`, the number of experts that stay, must be given with `usage`, and only then.")
    total, staying = model.config.num_experts, []
    if usage is not None:
        _check_usage(model, usage)
    else:
        dropped = [] if drop is None else check_experts(drop, total, "drop")
        others = [expert for expert in range(total) if expert not in dropped]
        staying = sorted(others if keep is None else check_experts(keep, total, "keep"))
    count = len(staying) if num_experts is None else num_experts
    _check_num_left(model, count)
    for name, module in expert_modules(model):
        kept = staying if usage is None else sorted(usage[name].topk(count).indices.tolist())
        rows = torch.tensor(kept, device=module.lora_A.device)
        frozen = [kept.index(expert) for expert in frozen_experts(module) if expert in kept]
        replace_tensors(module, {tensor: stacked_tensor(module, tensor)[rows] for tensor in EXPERT_TENSORS}, frozen)
    model.config.num_experts = count


@torch.no_grad()
def merge_experts(model: SamoeModel, experts: Sequence[int], *, usage: Usage | None = None) -> int:
    """Merges experts into one, which takes the place of the first of them by index. The others are removed.

    The merged expert is, layer by layer, the mean of their products B A, weighted by `usage`: exact as far as the
    rank holds it, else the nearest matrix of that rank (truncated SVD). Its router row is the same mean of theirs.
    The output is preserved if the experts are equal in each layer and each token goes either to one expert
    (`num_experts_per_tok` 1) or to all of them. In the second case a token goes to all that are left, and
    `num_experts_per_tok` shrinks with the number of experts.

    Args:
        experts: two or more, none of them frozen.
        usage: name of each layer with experts -> (experts,), all of at least 0; equal weights if not given.

    Returns:
        The index of the merged expert.
    """
    check_has_no_domains(model)
    experts = sorted(check_experts(experts, model.config.num_experts))
    if len(experts) < 2:
        raise InputError(f"`experts` must be at least two experts to merge, got {experts}.")
    if usage is not None:
        _check_usage(model, usage)
    _check_not_frozen(model, experts, "experts")
    num_experts = model.config.num_experts - len(experts) + 1
    goes_to_all = model.config.num_experts_per_tok == model.config.num_experts
    if not goes_to_all:
        _check_num_left(model, num_experts)
    kept = [expert for expert in range(model.config.num_experts) if expert not in experts[1:]]
    for name, module in expert_modules(model):
        shares = torch.ones(len(experts)) if usage is None else usage[name][experts].double()
        shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
        values = _merged_tensors(module, experts, shares, goes_to_all)
        frozen = [kept.index(expert) for expert in frozen_experts(module)]
        replace_tensors(module, {tensor: value[kept] for tensor, value in values.items()}, frozen)
        module.num_experts_per_tok = min(module.num_experts_per_tok, num_experts)
    model.config.num_experts = num_experts
    model.config.num_experts_per_tok = min(model.config.num_experts_per_tok, num_experts)
    return experts[0]


@torch.no_grad()
def reset_expert(model: SamoeModel, expert: int) -> None:
    """Makes an expert that is not frozen a new one: A and its router row are drawn anew, B is zero, so it has no
    effect."""
    check_has_no_domains(model)
    check_experts([expert], model.config.num_experts, "expert")
    _check_not_frozen(model, [expert], "expert")
    for _, module in expert_modules(model):
        values = {tensor: stacked_tensor(module, tensor).detach().clone() for tensor in EXPERT_TENSORS}
        nn.init.kaiming_uniform_(values["lora_A"][expert], a=math.sqrt(5))
        values["lora_B"][expert] = 0
        bound = module.in_features**-0.5  # as nn.Linear draws
        values["router.weight"][expert].uniform_(-bound, bound)
        values["router.bias"][expert].uniform_(-bound, bound)
        for tensor, value in values.items():
            stacked_parameter(module, tensor).copy_(value)


def replace_experts(model: SamoeModel, **settings: Any) -> None:
    """Takes all experts away and gives the model new ones, without effect, by other settings.

    `settings` are any of the configuration's `expert_modules`, `exclude_modules`, `num_experts`, `num_experts_per_tok`,
    `lora_rank`, `lora_alpha` and `lora_dropout`; the others stay, but `expert_modules` alone excludes none.
    """
    check_has_no_domains(model)
    settings = complete_settings(settings)
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    config.check_experts()
    layers = config.expert_modules, config.exclude_modules
    matching_linear_names(model, *layers)
    remove_experts(model)
    model.expert_module_names = add_experts(model, *layers, **config.expert_settings())
    for name, value in settings.items():
        setattr(model.config, name, value)
    model.train(model.training)
    model.set_trainable("experts")


def complete_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, where `expert_modules` alone excludes none. Refuses a name that is no setting of experts."""
    if unknown := sorted(settings.keys() - EXPERT_SETTINGS):
        raise InputError(f"`settings` must be among {', '.join(EXPERT_SETTINGS)}, got {unknown[0]!r}.")
    return {**({"exclude_modules": None} if "expert_modules" in settings else {}), **settings}


def to_plain_linear(module: nn.Linear) -> nn.Linear:
    """A layer with experts as a linear layer without them, whose parameters are shared."""
    is_quantized = isinstance(module, BaseLinear) and module.quantized is not None
    plain = (BaseLinear if is_quantized else nn.Linear)(module.in_features, module.out_features, device=META)
    if isinstance(plain, BaseLinear):
        plain.take_over(module)
    else:
        plain.weight, plain.bias = module.weight, module.bias
    return plain


def remove_experts(model: SamoeModel) -> None:
    """Takes all experts that belong to no domain away."""
    for name, module in list(expert_modules(model)):
        assert isinstance(module, ExpertLinear)
        replace_module(model, name, to_plain_linear(module))


def grow_experts(model: SamoeModel, num_new: int) -> list[int]:
    """Adds new experts without effect behind the others, asleep until the first training step: their indices."""
    check_has_no_domains(model)
    if not integer(1).holds(num_new):
        raise InputError(f"`num_new` must be {integer(1).allowed}, got {num_new!r}.")
    return append_experts(model, {name: new_experts(module, num_new) for name, module in expert_modules(model)})


def freeze_experts(model: SamoeModel, experts: Sequence[int]) -> None:
    """Keeps exactly these experts and their router rows as they are now while the others are trained.

    Their rows are a parametrization (`torch.nn.utils.parametrize`) that nothing but loading changes: they get no
    gradient, and neither weight decay nor momentum of any optimizer reaches them. They stay frozen in copies and
    through surgery. Saved files do not tell. An empty list lets all be trained.
    """
    check_has_no_domains(model)
    experts = check_experts(experts, model.config.num_experts)
    for _, module in expert_modules(model):
        _freeze_rows(module, experts)
    model.may_have_sleeping_experts = True


def check_has_no_domains(model: SamoeModel) -> None:
    """Refuses a model whose experts belong to domains."""
    if model.config.domains is not None:
        raise InputError(
            "The experts of this model belong to domains, which are added and removed as a whole (`add_domain`, "
            "`remove_domain`) and trained apart."
        )


def check_experts(experts: Sequence[int], count: int, name: str = "experts") -> list[int]:
    """The indices as a list; refuses what is no index of so many experts, or occurs twice."""
    for expert in experts:
        if not (integer(0).holds(expert) and expert < count):
            raise InputError(f"`{name}` must be integers from 0 to {count - 1}, got {expert!r}.")
    if len(set(experts)) < len(experts):
        raise InputError(f"`{name}` must be different experts, got {list(experts)}.")
    return list(experts)


@torch.no_grad()
def new_experts(module: ExpertMixture, num_new: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A (new, rank, in), drawn as a LoRA's, and B (new, out, rank), zero; by default of the others' rank."""
    rank = rank or module.lora_rank
    A = module.lora_A.new_empty(num_new, rank, module.in_features)
    for expert in A:
        nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
    return A, module.lora_B.new_zeros(num_new, module.out_features, rank)


@torch.no_grad()
def append_experts(model: SamoeModel, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> list[int]:
    """Adds given experts, asleep: name of each layer -> A (new, rank, in) and B (new, out, rank); returns indices."""
    before = model.config.num_experts
    after = before
    for name, module in expert_modules(model):
        A, B = tensors[name]
        after = before + len(A)
        new = {
            "lora_A": A,
            "lora_B": B,
            "router.weight": module.router.weight.new_zeros(len(A), module.in_features),
            "router.bias": module.router.bias.new_full((len(A),), ASLEEP),
        }
        values = {tensor: torch.cat([stacked_tensor(module, tensor), new[tensor]]) for tensor in EXPERT_TENSORS}
        replace_tensors(module, values, frozen_experts(module))
    model.config.num_experts = after
    model.may_have_sleeping_experts = True
    return list(range(before, after))


def replace_tensors(module: ExpertMixture, values: Mapping[str, Tensor], frozen: Sequence[int]) -> None:
    """Sets a layer's stacked tensors, with another number of experts, as new parameters, and freezes some experts."""
    _freeze_rows(module, [])
    for tensor, value in values.items():
        requires_grad = stacked_parameter(module, tensor).requires_grad
        owner, leaf = stacked_owner(module, tensor)
        setattr(owner, leaf, nn.Parameter(value.detach().clone(), requires_grad=requires_grad))
    module.num_experts = len(module.lora_A)
    _freeze_rows(module, frozen)


def stacked_tensor(module: ExpertMixture, tensor: str) -> Tensor:
    """A stacked tensor with its frozen rows."""
    owner, leaf = stacked_owner(module, tensor)
    return getattr(owner, leaf)


def _freeze_rows(module: ExpertMixture, experts: Sequence[int]) -> None:
    for tensor in EXPERT_TENSORS:
        owner, leaf = stacked_owner(module, tensor)
        if frozen_rows(owner, leaf) is not None:
            requires_grad = stacked_parameter(module, tensor).requires_grad
            # The very same parameter, so that optimizers go on, with the values that it stood for.
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=True)
            getattr(owner, leaf).requires_grad_(requires_grad)
        if experts:
            parametrize.register_parametrization(owner, leaf, FrozenRows(sorted(experts), getattr(owner, leaf)))
            if not vars(owner).get("has_plain_names"):  # in files
                vars(owner)["has_plain_names"] = True
                owner.register_state_dict_post_hook(_to_plain_names)
                owner.register_load_state_dict_pre_hook(_from_plain_names)


def _to_plain_names(owner: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: dict) -> None:
    for leaf in LEAVES:
        parameter = state_dict.pop(f"{prefix}parametrizations.{leaf}.original", None)
        if parameter is not None and (frozen := frozen_rows(owner, leaf)) is not None:
            state_dict[prefix + leaf] = frozen(parameter)


def _from_plain_names(owner: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    for leaf in LEAVES:
        if (frozen := frozen_rows(owner, leaf)) is not None and prefix + leaf in state_dict:
            value = state_dict.pop(prefix + leaf)
            state_dict[f"{prefix}parametrizations.{leaf}.original"] = value
            if value.dim() and len(value) > int(frozen.rows.max()):
                frozen.values.copy_(value[frozen.rows.to(value.device)])


def _check_num_left(model: SamoeModel, num_experts: int) -> None:
    least, most = model.config.num_experts_per_tok, model.config.num_experts
    if not (integer(least).holds(num_experts) and num_experts <= most):
        raise InputError(
            f"{num_experts!r} experts cannot stay: from `num_experts_per_tok` ({least}) to all ({most}) can."
        )


def _check_not_frozen(model: SamoeModel, experts: Sequence[int], name: str) -> None:
    for _, module in expert_modules(model):
        if frozen := sorted(set(experts) & set(frozen_experts(module))):
            raise InputError(f"`{name}` {frozen} are frozen; `freeze_experts([])` lets them change.")


def _check_usage(model: SamoeModel, usage: Usage) -> None:
    for name, _ in expert_modules(model):
        shape = tuple(getattr(usage.get(name), "shape", ()))
        if shape != (model.config.num_experts,):
            got = f"shape {shape}" if name in usage else "nothing"
            raise InputError(f"`usage` must have {model.config.num_experts} values for {name!r}, got {got}.")


def _merged_tensors(
    module: ExpertMixture, experts: Sequence[int], shares: Tensor, goes_to_all: bool
) -> dict[str, Tensor]:
    """A layer's stacked tensors with the mean of some experts in the place of the first of them."""
    values = {tensor: stacked_tensor(module, tensor).detach().clone() for tensor in EXPERT_TENSORS}
    target = experts[0]
    A, B = _mean_product(module.lora_A[experts], module.lora_B[experts], shares)
    values["lora_A"][target], values["lora_B"][target] = A, B
    for tensor in ("router.weight", "router.bias"):
        rows = values[tensor][experts].double()
        values[tensor][target] = torch.tensordot(shares.to(rows), rows, dims=1)
    if goes_to_all:
        # Gates of equal rows add up: log sum exp (l_i) = sum p_i l_i + entropy(p) where p is their softmax.
        values["router.bias"][target] += torch.special.entr(shares).sum()
    return values


def _mean_product(A: Tensor, B: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The best A (rank, in) and B (out, rank) for the mean of B_i A_i, from A (n, rank, in) and B (n, out, rank)."""
    rank = A.shape[1]
    left = (B.double() * shares.to(B.device)[:, None, None]).transpose(0, 1).flatten(1)  # (out, n * rank)
    right = A.double().flatten(0, 1)  # (n * rank, in)
    U, S, Vh = svd_of_product(left, right)
    count = int((S[:rank] > S[0] * 1e-12).sum())
    # Where the product needs no more rank, B is zero and A any, so that it can be learned.
    new_A, new_B = A[0].clone(), torch.zeros_like(B[0])
    roots = S[:count].sqrt()
    new_A[:count] = (roots[:, None] * Vh[:count]).to(A)
    new_B[:, :count] = (U[:, :count] * roots).to(B)
    return new_A, new_B


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of B A, without forming it: (..., out, k), (..., k) and (..., k, in)."""
    left, B_rest = torch.linalg.qr(B.double())
    right, A_rest = torch.linalg.qr(A.double().mT)
    U, values, Vh = torch.linalg.svd(B_rest @ A_rest.mT, full_matrices=False)
    return left @ U, values, Vh @ right.mT
