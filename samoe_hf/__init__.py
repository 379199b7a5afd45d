"""SAM2-MoE for Hugging Face: SAM 2's video memory with a mixture of LoRA experts."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoProcessor, Sam2VideoProcessor

from .model.configuration_samoe import SamoeConfig
from .model.modeling_samoe import SamoeModel

__version__ = "0.1.0"
# Imported at their first use: name -> module.
_LAZY = {
    "SamoeTrainer": "training.trainer",
    "VideoSession": "model.session",
    "adapt": "continual.adapt",
    "load_videos": "data",
}
__all__ = ["SamoeConfig", "SamoeModel", "SamoeTrainer", "VideoSession", "__version__", "adapt", "load_videos"]

AutoConfig.register(SamoeConfig.model_type, SamoeConfig, exist_ok=True)
AutoModel.register(SamoeConfig, SamoeModel, exist_ok=True)
AutoProcessor.register(SamoeConfig, Sam2VideoProcessor, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
