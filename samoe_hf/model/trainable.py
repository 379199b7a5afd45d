"""Which parameters of a model are trained: sets of them by name."""

import re
from collections.abc import Callable

from .adapters import is_adapter_parameter, plain_name
from .base_model import SamoePreTrainedModel
from .domain_choice import check_domain
from .domain_experts import PREFIX as DOMAIN_PREFIX
from .errors import InputError
from .expert_layer import is_expert_parameter
from .quantization import check_can_be_trained

_MEMORY = re.compile(
    r"(memory_attention|memory_encoder|spatial_perceiver|object_pointer_proj|mask_downsample)\..*"
    r"|temporal_positional_encoding_projection_layer\..*"
    r"|memory_temporal_positional_encoding|occlusion_spatial_embedding_parameter"
    r"|no_memory_embedding|no_memory_positional_encoding|no_object_pointer"
)
# Adapters within a part of the model are a set of their own.
TRAINABLE_SETS = {
    "experts": is_expert_parameter,
    "adapters": is_adapter_parameter,
    "memory": lambda name: _MEMORY.fullmatch(name) and not is_adapter_parameter(name),
    "decoder": lambda name: name.startswith("mask_decoder.") and not is_adapter_parameter(name),
    "all": lambda name: True,
}


def set_trainable(model: SamoePreTrainedModel, *sets: str) -> None:
    """Makes exactly the parameters of the named sets trainable; see [`~modeling_samoe.SamoeModel.set_trainable`]."""
    names = {name for chosen in sets for name in parameter_names(model, chosen)}
    check_can_be_trained(model, names)
    _train(model, names.__contains__)


def train_experts(model: SamoePreTrainedModel) -> None:
    """Makes experts and routers alone trainable; a model may have none, such as one whose last domain was removed."""
    _train(model, lambda name: is_expert_parameter(plain_name(name)))


def _train(model: SamoePreTrainedModel, is_trained: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))
    # Routers that were frozen may have experts that sleep.
    model.may_have_sleeping_experts = True


def parameter_names(model: SamoePreTrainedModel, chosen: str) -> list[str]:
    """Names of the parameters of a set, of which there must be some."""
    pattern = chosen
    if chosen.startswith("domain:"):
        check_domain(model, chosen.removeprefix("domain:"))
        pattern = rf".*\.{DOMAIN_PREFIX}{chosen.removeprefix('domain:')}\..*"
    try:
        matches = TRAINABLE_SETS[chosen] if chosen in TRAINABLE_SETS else re.compile(pattern).fullmatch
    except re.error as error:
        raise InputError(f"`sets` has {chosen!r}, which is no regular expression: {error}.") from error
    names = [name for name, _ in model.named_parameters() if matches(plain_name(name))]
    if not names and (chosen in TRAINABLE_SETS or pattern != chosen):
        raise InputError(f"The model has no parameters of {chosen!r}, which are to be trained.")
    if not names:
        known = ", ".join(map(repr, TRAINABLE_SETS))
        raise InputError(f"`sets` must be among {known} or expressions that match parameters, got {chosen!r}.")
    return names
