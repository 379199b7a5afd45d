"""SAM2-MoE for Hugging Face: SAM 2's video memory with a mixture of LoRA experts."""

from transformers import AutoConfig, AutoModel, AutoProcessor, Sam2VideoProcessor

from .model.configuration_samoe import SamoeConfig
from .model.modeling_samoe import SamoeModel

__version__ = "0.1.0"

AutoConfig.register(SamoeConfig.model_type, SamoeConfig, exist_ok=True)
AutoModel.register(SamoeConfig, SamoeModel, exist_ok=True)
AutoProcessor.register(SamoeConfig, Sam2VideoProcessor, exist_ok=True)

__all__ = ["SamoeConfig", "SamoeModel", "__version__"]
