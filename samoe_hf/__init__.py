"""SAM2-MoE for Hugging Face: SAM 2's video memory with a mixture of LoRA experts."""

from importlib import import_module
from pathlib import Path
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
__all__ = [
    "SamoeConfig",
    "SamoeModel",
    "SamoeTrainer",
    "VideoSession",
    "__version__",
    "adapt",
    "load_videos",
    "small_base",
]

AutoConfig.register(SamoeConfig.model_type, SamoeConfig, exist_ok=True)
AutoModel.register(SamoeConfig, SamoeModel, exist_ok=True)
AutoProcessor.register(SamoeConfig, Sam2VideoProcessor, exist_ok=True)


def small_base() -> str:
    """The folder of the small model that comes with the package, for `from_pretrained`.

    It has 1.8 million parameters, takes frames of 128 x 128, and tracks objects of synthetic videos; its card is in the
    folder. It is there to try things out within minutes on a CPU.
    """
    return str(Path(__file__).parent / "base")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
