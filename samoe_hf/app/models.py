"""The models that a page can choose from."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

import torch

from samoe_hf import small_base
from samoe_hf.continual.manage_domains import find_example
from samoe_hf.inference import load_tracker
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.model.domain_gate import DomainGate
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import VideoProcessor

# What is called on the page: the gate's choice, and the base model without any domain's experts.
GATE, BASE = "the gate decides", "the base model"
# Is held by whoever runs a model, for a frame at a time and not for a video: all models of a process share its device.
DEVICE_LOCK = threading.Lock()
Step = TypeVar("Step")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to track: its name on the page, unique in the app, and what it was loaded from.

    `original` are the keys of a run that go with an original checkpoint. Once it is used nothing changes it, since
    several people may track with it; `is_changed` of a copy that is not as its source is. `origins` has domains that
    come from elsewhere: name -> source, and name there.
    """

    name: str
    source: str
    model: SamoeModel
    processor: VideoProcessor
    original: Mapping[str, str] = field(default_factory=dict)
    is_changed: bool = False
    origins: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def is_small(self) -> bool:
        """Whether it is the small model that comes with the package."""
        return self.source == small_base()

    @property
    def domains(self) -> list[str]:
        """Names of its domains; none of a model whose experts belong to no domains."""
        return list(self.model.config.domain_names)

    @property
    def domain_choices(self) -> dict[str, str | None]:
        """What a page offers -> the `domain` of a session; nothing without domains."""
        return {GATE: AUTO, BASE: None} | {name: name for name in self.domains} if self.domains else {}

    def copied(self) -> "LoadedModel":
        """A copy whose domains can be changed. Both share all tensors but the gate's, into which it writes."""
        written = {id(x) for part in self.model.modules() if isinstance(part, DomainGate) for x in part.buffers()}
        shared = {id(x): x for x in chain(self.model.parameters(), self.model.buffers()) if id(x) not in written}
        return replace(self, model=copy.deepcopy(self.model, shared), is_changed=True, origins=dict(self.origins))

    def origin(self, domain: str) -> tuple[str, str]:
        """Where a domain was loaded from, and its name there."""
        return self.origins.get(domain, (self.source, domain))

    def example(self, domain: str) -> str | None:
        """The picture of a domain, if its owner gave one."""
        return find_example(*self.origin(domain))


def load_model(source: str, device: torch.device | str, name: str | None = None, **options) -> LoadedModel:
    """Loads a model as [`~samoe_hf.inference.load_tracker`] does; its name is the last part of `source` by default."""
    given = {"experts": options.get("experts"), "config": options.get("original_config")}
    original = {key: str(value) for key, value in given.items() if value is not None}
    return LoadedModel(name or Path(source).name, source, *load_tracker(source, device, **options), original)


def small_model(device: torch.device | str, **options) -> LoadedModel:
    """The small model that comes with the package, ready to track; `options` as in [`load_model`]."""
    return load_model(small_base(), device, "small model", **options)


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """The name, with a number behind it if it is taken."""
    return next(one for one in chain([name], (f"{name}-{n}" for n in count(2))) if not is_taken(one))


def taking_turns(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps of a model, between two of which others may use the device."""
    while True:
        with DEVICE_LOCK:
            step = next(steps, None)
        if step is None:
            return
        yield step
