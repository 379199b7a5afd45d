"""Whether a checkpoint's weights fit a configuration. Nothing is allocated to find out.

Nobody vouches for what a repository says, so its configuration is compared with the headers of its files.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base_model import SamoePreTrainedModel, build_on_meta
from .configuration_samoe import SamoeConfig, named_integers
from .domain_experts import domain_tensors
from .domain_files import check_domain_sizes
from .domain_gate import FURTHER
from .errors import InputError
from .expert_layer import DOMAIN_GATE, EXPERT_TENSORS, expert_modules, is_expert_parameter
from .weights_store import LateFile

# Fields of the configuration that say how often something is built.
REPEAT_FIELDS = re.compile(r"blocks_per_stage|\w*num_(hidden_)?layers|num_multimask_outputs|\w*depth")
# Gates of older folders lack names, their rows are in the configuration's order, and what is known by further features.
MAY_LACK = re.compile(rf"{DOMAIN_GATE}\.(names|{FURTHER}\w+)")
# New experts may at most have so many times the values that the files hold.
MAX_NEW_VALUES_RATIO = 10


def find_mismatches(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Compares tensors by name, shape and type, not by value: what may be wrong -> names of the tensors it is wrong
    with."""
    common = [name for name in expected if name in found]
    return {
        "missing": [name for name in expected if name not in found and not MAY_LACK.fullmatch(name)],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [name for name in common if found[name].shape != expected[name].shape],
        "of no floating-point type": [
            name for name in common if expected[name].is_floating_point() and not found[name].is_floating_point()
        ],
    }


def describe_mismatches(problems: Mapping[str, list[str]]) -> str:
    """A clause for each problem, with an example."""
    return "; ".join(
        f"{len(names)} tensors are {problem}, such as {min(names)!r}" for problem, names in problems.items() if names
    )


def check_repeats(source: Any, config: SamoeConfig, num_tensors: int) -> None:
    """Refuses a configuration with more layers or blocks of a kind than tensors, before a model is built, which would
    take too long."""
    for name, value in named_integers(config.to_dict()):
        if REPEAT_FIELDS.fullmatch(name) and value > num_tensors:
            raise InputError(f"{source}: `{name}` is {value}, but the weights hold {num_tensors} tensors in all.")


def check_weights(
    source: Any,
    found: Mapping[str, Tensor],
    config: SamoeConfig,
    more_experts: bool,
    any_experts: bool,
    late: Mapping[str, LateFile] | None = None,
    cls: type[SamoePreTrainedModel] = SamoePreTrainedModel,
) -> list[str]:
    """Compares a checkpoint's tensors with what `config` describes; all else than the following is refused.

    Experts may be missing in all layers; with `more_experts`, in some. With `any_experts` they may also be of another
    number or rank than the configuration's, or lie in other layers.

    Args:
        source: what to call the checkpoint in messages.
        found: names -> tensors, such as [`StoredTensors`] has.
        late: files of the experts of domains, by domain, if these are not in `found`.
        cls: that of the model; a class of the user's may have further tensors, which may be there.

    Returns:
        The layers whose experts the checkpoint lacks, and which are to get new ones.
    """
    check_repeats(source, config, len(found))
    try:
        config.check_feature_sizes()
        model = build_on_meta(config.without_domain_experts())
        of_domains = {} if late is not None else domain_tensors(model, config.domains or ())
        check_domain_sizes(model, late or {}, config.domains or ())
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    expected = dict(itertools.chain(*(x.items() for x in (model.state_dict(), *of_domains.values()))))
    problems = find_mismatches(found, expected)
    if unexpected := set(problems["unexpected"]):
        own = build_on_meta(config.without_domain_experts(), True, cls).state_dict()
        problems = find_mismatches(found, {**expected, **{name: own[name] for name in unexpected & own.keys()}})
    layers = {name: {f"{name}.{tensor}" for tensor in EXPERT_TENSORS} for name, _ in expert_modules(model)}
    layers |= {name: {*tensors} for name, tensors in of_domains.items()}
    unfit = set().union(*problems.values()) if any_experts else set(problems["missing"])
    new = [name for name, tensors in layers.items() if (tensors & unfit if any_experts else tensors <= unfit)]
    tolerated = set()
    if more_experts or any_experts or len(new) == len(layers):
        gate = {name for name in expected if name.startswith(f"{DOMAIN_GATE}.")}
        tolerated = set().union(gate, *(layers[name] for name in new))
    if any_experts:
        tolerated |= {name for name in found if is_expert_parameter(name)}
    problems = {what: [name for name in names if name not in tolerated] for what, names in problems.items()}
    if any(problems.values()):
        hint = ""
        if all(is_expert_parameter(name) for names in problems.values() for name in names):
            hint = " `ignore_mismatched_sizes=True` gives the model new experts in their place."
        raise InputError(f"{source} does not fit the model: {describe_mismatches(problems)}.{hint}")
    # But for the gate, which is in float32.
    own = {n: x.dtype for n, x in found.items() if x.is_floating_point() and not n.startswith(f"{DOMAIN_GATE}.")}
    double = [name for name, dtype in own.items() if dtype == torch.float64]
    if 0 < len(double) < len(own):  # the whole model would become float64
        raise InputError(f"{source}: {double[0]!r} is of type float64, and others are not; expected one type.")
    stored = sum(tensor.numel() for tensor in found.values())
    values = sum(tensor.numel() for tensor in itertools.chain(expected.values(), model.buffers()))
    if values - stored > MAX_NEW_VALUES_RATIO * stored:
        raise InputError(
            f"{source}: its configuration describes {values:,d} values, but the weights hold {stored:,d}; check "
            f"`num_experts` ({config.num_experts}), `lora_rank` ({config.lora_rank}) and the sizes of images."
        )
    return new


def check_described(model: nn.Module, config: SamoeConfig) -> None:
    """Refuses a configuration that was changed after the model had its experts, which are not saved as it says."""
    said = (config.num_experts, config.num_experts_per_tok, config.lora_rank, config.lora_alpha / config.lora_rank)
    # Domains have settings of their own.
    for name, own in expert_modules(model) if config.domains is None else ():
        if (found := (own.num_experts, own.num_experts_per_tok, own.lora_rank, own.scaling)) != said:
            raise InputError(
                "`num_experts`, `num_experts_per_tok`, `lora_rank` and `lora_alpha / lora_rank` of the configuration "
                f"are {said}, but of the experts in {name!r} {found}. Give them others by `replace_experts`."
            )


def check_values(source: Any, model: nn.Module) -> None:
    """Refuses a model with NaN or infinite values, or with a gate that is wrong."""
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "meta" and not tensor.isfinite().all():
            raise InputError(f"{source}: the tensor {name!r} has NaN or infinite values.")
    gate = getattr(model, DOMAIN_GATE, None)
    if gate is not None and (problem := gate.problem()) is not None:
        raise InputError(f"{source}: rows of its {DOMAIN_GATE!r} {problem}.")
