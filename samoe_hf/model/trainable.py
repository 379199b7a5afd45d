"""Which parameters of a model are trained: sets of them by name."""

import re

from .adapters import is_adapter_parameter, plain_name
from .base_model import SamoePreTrainedModel
from .domain_choice import check_domain
from .domain_experts import PREFIX as DOMAIN_PREFIX
from .errors import InputError
from .expert_layer import is_expert_parameter
from .quantization import check_can_be_trained

TRAINABLE_SETS = {
    "experts": is_expert_parameter,
    "adapters": is_adapter_parameter,
    "memory": re.compile(
        r"(memory_attention|memory_encoder|object_pointer_proj|mask_downsample)\..*"
        r"|temporal_positional_encoding_projection_layer\..*"
        r"|memory_temporal_positional_encoding|occlusion_spatial_embedding_parameter"
        r"|no_memory_embedding|no_memory_positional_encoding|no_object_pointer"
    ).fullmatch,
    "decoder": re.compile(r"mask_decoder\..*").fullmatch,
    "all": lambda name: True,
}


def set_trainable(model: SamoePreTrainedModel, *sets: str) -> None:
    """Makes exactly the parameters of the named sets trainable; see [`~modeling_samoe.SamoeModel.set_trainable`]."""
    names = {name for chosen in sets for name in parameter_names(model, chosen)}
    check_can_be_trained(model, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    # Routers that were frozen may have experts that sleep.
    model.may_have_sleeping_experts = True


def parameter_names(model: SamoePreTrainedModel, chosen: str) -> list[str]:
    """Names of the parameters of a set.

    Raises:
        InputError: if there is no such set, or no parameter in it.
    """
    if chosen.startswith("domain:"):
        check_domain(model, chosen.removeprefix("domain:"))
        chosen = rf".*\.{DOMAIN_PREFIX}{chosen.removeprefix('domain:')}\..*"
    try:
        matches = TRAINABLE_SETS[chosen] if chosen in TRAINABLE_SETS else re.compile(chosen).fullmatch
    except re.error as error:
        raise InputError(f"`sets` has {chosen!r}, which is no regular expression: {error}.") from error
    names = [name for name, _ in model.named_parameters() if matches(plain_name(name))]
    if not names:
        known = ", ".join(map(repr, TRAINABLE_SETS))
        raise InputError(f"`sets` must be among {known} or expressions that match parameters, got {chosen!r}.")
    return names
