"""Experts that belong to domains: a layer has a mixture of experts for each, and runs that of the active domain alone.

Nothing here knows of SAM 2, nor of how the domain of a video is found; see `domain_gate.py` for that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor, nn

from .errors import InputError
from .expert_layer import (
    META,
    BaseLinear,
    ExpertMixture,
    add_experts,
    floating_type,
    matching_linear_names,
    replace_module,
)

# Before the domain's name, since modules have attributes such as `train` and `type`.
PREFIX = "domain_"

_active_domain: ContextVar[str | None] = ContextVar("active_domain", default=None)


def active_domain() -> str | None:
    """The domain whose experts are run at the moment, in this thread."""
    return _active_domain.get()


@contextmanager
def use_domain(domain: str | None) -> Iterator[None]:
    """While the context is open, in this thread, layers run the experts of a domain; with None, no domain's."""
    token = _active_domain.set(domain)
    try:
        yield
    finally:
        _active_domain.reset(token)


def keep_domain(function: Callable) -> Callable:
    """`function` for a later call, such as gradient checkpointing's: it runs the experts that are active now."""
    domain = _active_domain.get()

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with use_domain(domain):
            return function(*args, **kwargs)

    return run


class DomainExperts(ExpertMixture):
    """The experts of one domain beside a linear layer from `in_features` to `out_features`."""

    def __init__(self, in_features: int, out_features: int, **settings):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.create_experts(**settings)

    def forward(self, hidden_states: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """What `linear` puts out, with the experts' part: (..., in_features) -> (..., out_features)."""
        return self.mix(hidden_states, linear)

    def extra_repr(self) -> str:
        return self.describe_experts()


class DomainLinear(BaseLinear):
    """A linear layer with experts of domains beside it. `weight` and `bias` are the base layer's.

    The experts of a domain are the submodule `domain_NAME`, a [`DomainExperts`]. Where no domain is active, or the
    active one has no experts here, the output is the base layer's to the bit.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "DomainLinear":
        """Wraps `linear`, whose parameters are shared."""
        module = cls(linear.in_features, linear.out_features, device=META)
        module.take_over(linear)
        return module

    def add_domain(self, domain: str, **settings) -> None:
        """Gives a domain new experts, without effect; see [`~experts.ExpertMixture.create_experts`]."""
        place = {"device": self.weight.device, "dtype": floating_type(self)}
        experts = DomainExperts(self.in_features, self.out_features, **settings, **place)
        self.add_module(PREFIX + domain, experts.train(self.training))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        experts = self.active_experts()
        return self.product(hidden_states) if experts is None else experts(hidden_states, self.product)

    def active_experts(self) -> DomainExperts | None:
        """Those of the active domain, if it has any here."""
        domain = _active_domain.get()
        return None if domain is None else getattr(self, PREFIX + domain, None)


def add_configured_experts(model: nn.Module, config: Any) -> list[str]:
    """Gives a model the experts, or the domains' experts, that a [`SamoeConfig`] describes.

    Returns:
        names of the layers that have experts.
    """
    if config.domains is None:
        return add_experts(model, config.expert_modules, config.exclude_modules, **config.expert_settings())
    layers: dict[str, list[str]] = {}
    for domain in config.domains:
        add_domain_experts(model, **domain, known_layers=layers)
    return [name for name, module in model.named_modules() if isinstance(module, DomainLinear)]


def add_domain_experts(
    model: nn.Module,
    name: str,
    num_experts: int,
    expert_modules: str | list[str],
    exclude_modules: str | list[str] | None = None,
    known_layers: dict[str, list[str]] | None = None,
    **settings,
) -> None:
    """Gives layers of a model experts of a domain; none for `num_experts` 0.

    Args:
        known_layers: what patterns select, for several domains: of many, each search would take longer than the last.
    """
    if num_experts == 0:
        return
    patterns, known_layers = repr((expert_modules, exclude_modules)), {} if known_layers is None else known_layers
    if patterns not in known_layers:
        known_layers[patterns] = matching_linear_names(model, expert_modules, exclude_modules)
    for layer in known_layers[patterns]:
        module = model.get_submodule(layer)
        assert isinstance(module, nn.Linear)
        if not isinstance(module, DomainLinear):
            module = DomainLinear.from_linear(module)
            replace_module(model, layer, module)
        module.add_domain(name, num_experts=num_experts, **settings)


def domain_modules(model: nn.Module, domain: str) -> Iterator[tuple[str, DomainExperts]]:
    """The experts of a domain, with the names of their layers."""
    for name, module in model.named_modules():
        experts = getattr(module, PREFIX + domain, None) if isinstance(module, DomainLinear) else None
        if experts is not None:
            yield name, experts


def module_domain(name: str) -> str | None:
    """The domain that a mixture of experts of this name, as `expert_modules` gives it, belongs to, if any."""
    leaf = name.rpartition(".")[2]
    return leaf.removeprefix(PREFIX) if leaf.startswith(PREFIX) else None


def module_layer(name: str) -> str:
    """The layer that a mixture of experts of this name belongs to, whatever its domain."""
    return name if module_domain(name) is None else name.rpartition(".")[0]


def check_has_no_domains(config: Any) -> None:
    """Refuses a configuration whose experts belong to domains."""
    if config.domains is not None:
        raise InputError(
            "The experts of this model belong to domains, which are added and removed as a whole (`add_domain`, "
            "`remove_domain`) and trained apart."
        )
