"""The models that a page can choose from, and the device that all of them share."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import ProcessorMixin

from samoe_hf.errors import InputError
from samoe_hf.model.domain_choice import AUTO
from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import load_processor

# What is called on the page: the gate's choice, and the base model without any domain's experts.
GATE, BASE = "the gate decides", "the base model"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to track.

    Attributes:
        name: on the page; unique in the app.
        source: what it was loaded from.
    """

    name: str
    source: str
    model: SamoeModel
    processor: ProcessorMixin

    @property
    def domains(self) -> list[str]:
        """Names of its domains; none of a model whose experts belong to no domains."""
        return list(self.model.config.domain_names)

    @property
    def domain_choices(self) -> dict[str, str | None]:
        """What a page offers -> the `domain` of a session."""
        if not self.domains:
            return {}
        return {GATE: AUTO, BASE: None} | {name: name for name in self.domains}


class Models:
    """The models of an app, by their names, and the lock of their device: one frame of one session runs at a time.

    A session holds the lock for a frame, and not for its video. So a click is answered while another video is tracked.
    """

    def __init__(self, loaded: Sequence[LoadedModel]):
        if not loaded:
            raise InputError("`loaded` must hold at least one model.")
        self._models = {one.name: one for one in loaded}
        if len(self._models) < len(loaded):
            raise InputError(f"Two models are called {loaded[0].name}.")
        self.device_lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of all models, the first of which a new page gets."""
        return list(self._models)

    @property
    def first(self) -> LoadedModel:
        """The model that a new page gets."""
        return next(iter(self._models.values()))

    def __getitem__(self, name: str) -> LoadedModel:
        if not isinstance(name, str) or name not in self._models:
            raise InputError(f"`model` must be one of {', '.join(self._models)}, got {name!r}.")
        return self._models[name]

    def add(self, loaded: LoadedModel) -> None:
        """Adds a model; of two with one name the later counts."""
        self._models[loaded.name] = loaded


def load_model(source: str | Path, device: torch.device | str, name: str | None = None, **options) -> LoadedModel:
    """Loads a model for the app.

    Args:
        source: what `SamoeModel.from_pretrained` takes, and `options` with it.
        name: on the page; the last part of `source` by default.
    """
    model = SamoeModel.from_pretrained(str(source), **options).eval().to(device)
    return LoadedModel(name or Path(source).name, str(source), model, load_processor(str(source), model))
