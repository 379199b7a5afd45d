"""SAM2-MoE for Hugging Face: SAM 2's video memory with a mixture of LoRA experts.

Importing the package imports neither PyTorch nor transformers: each name below is imported at its first use.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samoe_hf.auto import register

if TYPE_CHECKING:
    from samoe_hf.continual.adapt import adapt
    from samoe_hf.data import load_videos
    from samoe_hf.model.configuration_samoe import SamoeConfig
    from samoe_hf.model.modeling_samoe import SamoeModel
    from samoe_hf.training.trainer import SamoeTrainer
    from samoe_hf.video_session import VideoSession

__version__ = "0.1.0"
__all__ = [
    "SamoeConfig", "SamoeModel", "SamoeTrainer", "VideoSession", "__version__", "adapt", "load_videos", "small_base"
]  # fmt: skip
_MODULES = {
    "SamoeConfig": "model.configuration_samoe",
    "SamoeModel": "model.modeling_samoe",
    "SamoeTrainer": "training.trainer",
    "VideoSession": "video_session",
    "adapt": "continual.adapt",
    "load_videos": "data",
}


def small_base() -> str:
    """The folder of the small model that comes with the package, for `from_pretrained`.

    It has 2.3 million parameters, and is there to try things out within minutes on a CPU. Its card, in the folder, says
    what it has seen, and how well it tracks from masks and clicks.
    """
    return str(Path(__file__).parent / "base")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
