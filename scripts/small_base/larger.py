"""The model for larger images: the same weights, on a finer grid of memories and masks.

python scripts/small_base/larger.py outputs/base_clicks 192 --output outputs/larger
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from samoe_hf import SamoeConfig, SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.model.weights_io import new_folder

STRIDE = 16


def larger(model: SamoeModel, size: int) -> SamoeModel:
    """A model for images of `size`, a multiple of 16, in pixels; no tensor has another shape."""
    settings, grid = model.config.to_dict(), size // STRIDE
    vision = settings["vision_config"]
    settings |= {"image_size": size, "memory_attention_rope_feat_sizes": [grid, grid]}
    settings["prompt_encoder_config"]["image_size"] = size
    vision["backbone_config"]["image_size"] = [size, size]
    vision["backbone_feature_sizes"] = [[times * grid] * 2 for times in (4, 2, 1)]
    result = SamoeModel(SamoeConfig(**settings))
    result.load_state_dict(model.state_dict())
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the folder, which must be new or empty, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("size", type=int, help="width and height of its images, a multiple of 16")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; it must be new or empty")
    parsed = parser.parse_args(arguments)
    with new_folder(parsed.output) as folder:
        model = larger(SamoeModel.from_pretrained(parsed.model), parsed.size)
        model.save_pretrained(folder, processor=build_processor(model.config))


if __name__ == "__main__":
    main()
