"""Experts that belong to domains: a layer has a mixture of experts for each, and runs that of the active domain alone.

Experts of a model that was loaded stay in their files until they are needed. Tracking reads those of its video's
domain, and lets them go again; whatever trains, changes, enumerates, copies or saves a layer's tensors first reads them
all.

Nothing here knows of SAM 2, nor of how the domain of a video is found; see `domain_gate.py` for that.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from threading import RLock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .errors import InputError
from .expert_layer import (
    EXPERT_TENSORS,
    META,
    BaseLinear,
    ExpertMixture,
    add_experts,
    expert_values,
    floating_type,
    matching_linear_names,
    replace_module,
)
from .weights_store import LateFile

T = TypeVar("T")

# Before the domain's name, since modules have attributes such as `train` and `type`.
PREFIX = "domain_"
# Experts that were read to track are let go when those of so many other domains were read after them.
MOST_LENT = 16


class DomainUse(NamedTuple):
    """A domain whose experts are run, and how much of what they add is added: 1 is as they were trained."""

    domain: str
    strength: float = 1.0


class _Active(NamedTuple):
    """What is run, and the domain's experts by layer, None where a layer has none; compiled graphs take these as
    inputs, so that they are the same for all domains of equal settings."""

    use: DomainUse
    experts: "dict[nn.Module, DomainExperts | None]"


_active: ContextVar[_Active | None] = ContextVar("active_domain", default=None)
_reading = RLock()


def active_domain() -> DomainUse | None:
    """Whose experts are run at the moment, in this thread."""
    active = _active.get()
    return None if active is None else active.use


@contextmanager
def use_domain(domain: str | DomainUse | None, model: Any = None) -> Iterator[None]:
    """While the context is open, in this thread, layers run the experts of a domain; with None, no domain's.

    Args:
        domain: its name; or with the strength of its experts, of a model that is not trained.
        model: a SamoeModel, whose experts of the domain are read at once; by default each layer does when it runs.

    Raises:
        InputError: if the model's experts of the domain were never loaded.
    """
    active = None
    if domain is not None:
        layers = () if model is None else map(model.get_submodule, model.expert_module_names)
        # What PEFT puts around a layer is another.
        own = (layer for layer in layers if isinstance(layer, DomainLinear))
        use = DomainUse(domain) if isinstance(domain, str) else domain
        if model is not None and use.domain in model.built_domains:
            _check_loaded(model, use.domain)
        active = _Active(use, {layer: layer.experts_of(use.domain) for layer in own})
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)


def keep_domain(function: Callable) -> Callable:
    """`function` for a later call, such as gradient checkpointing's: it runs the experts that are active now."""
    active = _active.get()

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        token = _active.set(active)
        try:
            return function(*args, **kwargs)
        finally:
            _active.reset(token)

    return run


class DomainExperts(ExpertMixture):
    """The experts of one domain beside a linear layer from `in_features` to `out_features`."""

    def __init__(self, in_features: int, out_features: int, **settings):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.create_experts(**settings)

    @property
    def scaling(self) -> float:
        """What the experts' products are multiplied by: `lora_alpha / lora_rank`, and the strength that is active."""
        active = _active.get()
        return self._scaling if active is None else self._scaling * active.use.strength

    @scaling.setter
    def scaling(self, value: float) -> None:
        self._scaling = value

    def forward(self, hidden_states: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        """What `linear` puts out, with the experts' part: (..., in_features) -> (..., out_features)."""
        return self.mix(hidden_states, linear)

    def extra_repr(self) -> str:
        return self.describe_experts()


class StoredExperts(NamedTuple):
    """Experts of a domain in a layer that were not read yet: their file, what their names begin with there, and their
    settings."""

    file: LateFile
    prefix: str
    settings: dict[str, Any]


def _of_all(method: Callable[..., T]) -> Callable[..., T]:
    """A method of a [`DomainLinear`], which reads the experts of all domains first."""

    @wraps(method)
    def read_first(layer: "DomainLinear", *args: Any, **kwargs: Any) -> T:
        layer.read_stored()
        return method(layer, *args, **kwargs)

    return read_first


class DomainLinear(BaseLinear):
    """A linear layer with experts of domains beside it. `weight` and `bias` are the base layer's.

    The experts of a domain are the submodule `domain_NAME`, a [`DomainExperts`]. Where no domain is active, or the
    active one has no experts here, the output is the base layer's to the bit.

    `stored`: by domain, experts that are in a file. They become submodules as soon as gradients are computed, or
    anybody asks for the layer's modules, parameters or state. `lent`: by domain, those of them that were read to track.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stored: dict[str, StoredExperts] = {}
        self.lent: dict[str, DomainExperts] = {}

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
        active = _active.get()
        if active is None:
            return None
        return active.experts[self] if self in active.experts else self.experts_of(active.use.domain)

    def experts_of(self, domain: str) -> DomainExperts | None:
        """Those of a domain, if it has any here.

        Raises:
            InputError: if they had to be read, and the file was written to, has other tensors, or values that are not
                finite.
        """
        if domain in self.stored:
            if not (self.training or torch.is_grad_enabled()):
                return self.lent.get(domain) or self._lend(domain)
            self.read_stored()
        return getattr(self, PREFIX + domain, None)

    def _lend(self, domain: str) -> DomainExperts:
        with _reading:
            if domain not in self.stored:  # another thread has just read all
                return getattr(self, PREFIX + domain)
            if (experts := self.lent.get(domain)) is None:
                while len(self.lent) >= MOST_LENT:
                    del self.lent[next(iter(self.lent))]
                experts = self.lent[domain] = self._read(self.stored[domain])
            return experts

    def _read(self, stored: StoredExperts) -> DomainExperts:
        with torch.inference_mode(False):  # whose tensors could neither be kept nor trained
            experts = DomainExperts(self.in_features, self.out_features, **stored.settings, device=META)
            tensors = {name: stored.file.read(stored.prefix + name) for name in EXPERT_TENSORS}
            for name, expected in experts.state_dict().items():
                if (shape := tensors[name].shape) != expected.shape:
                    odd = f"{stored.file.path} has {stored.prefix + name!r} of shape {tuple(shape)}"
                    raise InputError(f"{odd}; expected {tuple(expected.shape)}.")
            place = self.weight.device, floating_type(self)
            experts.load_state_dict({name: tensor.to(*place) for name, tensor in tensors.items()}, assign=True)
        return experts.train(self.training)

    def read_stored(self) -> None:
        """Makes submodules of all experts that are in a file."""
        with _reading:
            while self.stored:
                domain, stored = next(iter(self.stored.items()))
                setattr(self, PREFIX + domain, self.lent.get(domain) or self._read(stored))
                del self.stored[domain]
            self.lent.clear()

    # What reaches the layer's tensors from outside; `train` needs no tensors of those in a file, and `_apply` only
    # for another type.

    def __getattr__(self, name: str) -> Any:
        """As in the base class, of all domains; submodules and parameters are found by their names by it too."""
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) in self.__dict__.get("stored", ()):
            self.read_stored()
        return super().__getattr__(name)

    # Of all domains; parameters and buffers are found by `named_modules` too.
    __repr__, __getstate__ = _of_all(BaseLinear.__repr__), _of_all(BaseLinear.__getstate__)
    named_modules, apply = _of_all(BaseLinear.named_modules), _of_all(BaseLinear.apply)
    state_dict: Any = _of_all(BaseLinear.state_dict)
    _load_from_state_dict = _of_all(BaseLinear._load_from_state_dict)

    def _apply(self, *args: Any, **kwargs: Any) -> "DomainLinear":
        dtype = floating_type(self)
        with _reading:
            self.lent.clear()
        super()._apply(*args, **kwargs)
        if floating_type(self) != dtype:
            self.read_stored()  # or the next type would be given more digits than this one leaves
        return self

    def train(self, mode: bool = True) -> "DomainLinear":
        """As in the base class."""
        with _reading:
            self.lent.clear()
        return super().train(mode)


def add_configured_experts(model: nn.Module, config: Any) -> list[str]:
    """Gives a model the experts, or the domains' experts, that a [`SamoeConfig`] describes.

    Returns:
        names of the layers that have experts.
    """
    if config.domains is None:
        return add_experts(model, config.expert_modules, config.exclude_modules, **config.expert_settings())
    add_domain_experts(model, config.domains)
    return [name for name, module in model.named_modules() if isinstance(module, DomainLinear)]


def add_domain_experts(model: nn.Module, domains: Sequence[Mapping[str, Any]]) -> None:
    """Gives layers of a model new experts of domains, as a configuration describes them."""
    for domain, layer, settings in _mixtures(model, domains):
        _domain_layer(model, layer).add_domain(domain, **settings)


def store_domain_experts(
    model: Any, domains: Sequence[dict[str, Any]], files: Mapping[str, LateFile], new: Collection[str] = ()
) -> None:
    """Gives a SamoeModel that was built without them the experts of its domains, which stay in files until needed.

    Args:
        files: by domain, with the tensors of [`domain_tensors`].
        new: names of mixtures that are not there, and begin without effect.
    """
    mixtures = _mixtures(model, domains)
    layers = {layer: _domain_layer(model, layer) for layer in {layer for _, layer, _ in mixtures}}
    model.config.domains = list(domains)
    model.expert_module_names = [name for name, _ in model.named_modules() if name in layers]
    for domain, layer, settings in mixtures:
        if (name := f"{layer}.{PREFIX}{domain}") in new:
            layers[layer].add_domain(domain, **settings)
        else:
            layers[layer].stored[domain] = StoredExperts(files[domain], f"{name}.", settings)


def domain_tensors(model: nn.Module, domains: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """The experts that a model without them is to have of domains: name of the mixture -> names and tensors, on the
    meta device."""
    known: dict[tuple, dict[str, Tensor]] = {}
    found = {}
    mixtures = _mixtures(model, domains)
    linear: Any = {layer: model.get_submodule(layer) for layer in {layer for _, layer, _ in mixtures}}
    for domain, layer, settings in mixtures:
        sizes = linear[layer].in_features, linear[layer].out_features
        kind = (*sizes, *settings.values())
        if kind not in known:
            known[kind] = DomainExperts(*sizes, **settings, device=META).state_dict()
        name = f"{layer}.{PREFIX}{domain}"
        found[name] = {f"{name}.{tensor}": value for tensor, value in known[kind].items()}
    return found


def count_domain_values(model: nn.Module, domains: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many values the experts are to have that a model without them is to have of each domain, if of any."""
    counts: Counter[str] = Counter()
    linear: dict[str, Any] = {}
    for domain, layer, settings in _mixtures(model, domains):
        linear[layer] = linear.get(layer) or model.get_submodule(layer)
        counts[domain] += expert_values(linear[layer].in_features, linear[layer].out_features, settings)
    return dict(counts)


def _mixtures(model: nn.Module, domains: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Each mixture of experts of domains: the domain, the name of its layer, and its settings."""
    known: dict[str, list[str]] = {}
    found = []
    for domain in domains:
        settings = dict(domain)
        name, patterns = settings.pop("name"), (settings.pop("expert_modules"), settings.pop("exclude_modules", None))
        ranks, rank = settings.pop("rank_pattern", {}), settings["lora_rank"]
        if settings["num_experts"] == 0:
            continue
        if repr(patterns) not in known:
            known[repr(patterns)] = matching_linear_names(model, *patterns)
        layers = known[repr(patterns)]
        found += [(name, layer, {**settings, "lora_rank": ranks.get(layer, rank)}) for layer in layers]
    return found


def _domain_layer(model: nn.Module, name: str) -> DomainLinear:
    """A layer, which becomes one with experts of domains if it is not yet."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    if not isinstance(module, DomainLinear):
        module = DomainLinear.from_linear(module)
        replace_module(model, name, module)
    return module


def domain_modules(model: nn.Module, domain: str) -> Iterator[tuple[str, DomainExperts]]:
    """The experts of a domain, with the names of their layers."""
    for name, module in model.named_modules():
        experts = getattr(module, PREFIX + domain, None) if isinstance(module, DomainLinear) else None
        if experts is not None:
            yield name, experts


def _check_loaded(model: Any, domain: str) -> None:
    """Refuses experts that still are as the configuration built them, where the gate has learned their domain: it is
    among a folder's own tensors, which accelerate reads alone, and would give the base's masks in silence.
    """
    tensors, gate = [experts.lora_B for _, experts in domain_modules(model, domain)], model.domain_gate
    are_new = tensors and all(tensor.is_meta or not bool(tensor.any()) for tensor in tensors)
    if are_new and gate.counts[gate.domains.index(domain)] > 0:
        raise InputError(
            f"The experts of the domain {domain!r} were not loaded: the model was built from a configuration, and they "
            "lie in a file of their own. `SamoeModel.from_pretrained` reads it."
        )
    model.built_domains.remove(domain)


def module_domain(name: str) -> str | None:
    """The domain that a mixture of experts of this name, as `expert_modules` gives it, belongs to, if any."""
    leaf = name.rpartition(".")[2]
    return leaf.removeprefix(PREFIX) if leaf.startswith(PREFIX) else None


def module_layer(name: str) -> str:
    """The layer that a mixture of experts of this name belongs to, whatever its domain."""
    return name if module_domain(name) is None else name.rpartition(".")[0]
