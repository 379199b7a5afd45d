"""A model with a mask decoder in which points find their place, to be trained on clicks.

    python scripts/small_base/click_start.py outputs/base_looks --output outputs/click_start

It has learned masks, and its decoder gives nearly the same whatever is clicked. Here tokens begin by
attending to where they are: queries and keys of the attention from tokens to the image select the same components of
the positional encoding, so that their product is largest where both are of one place.

Whether it takes this start was not measured. A run from the model as it is was stopped after about 1400 steps.
The one from here was no better after 2000, and had learned what a click means after 3250.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from samoe_hf.model.modeling_samoe import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.whole_files import new_folder

# Of what was learned for masks, this much stays; the components of the encoding are multiplied by the gain.
KEPT, GAIN = 0.1, 2.0


@torch.no_grad()
def let_points_find_their_place(model: SamoeModel) -> None:
    """Changes the attention from tokens to the image in place, in all layers of the mask decoder.

    Each head gets sine and cosine of a few frequencies; all heads together have those of low ones first.
    """
    frequencies = model.prompt_encoder.shared_embedding.positional_embedding  # (2, F)
    order, count = frequencies.norm(dim=0).argsort(), frequencies.shape[1]
    heads = model.config.mask_decoder_config.num_attention_heads
    names = [name for name, _ in model.named_parameters() if "attn_token_to_image" in name]
    for name in names:
        parameter = model.get_parameter(name)
        if name.endswith("bias") and ("q_proj" in name or "k_proj" in name):
            parameter.zero_()
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(KEPT)
            pairs = parameter.shape[0] // heads // 2
            for head in range(heads):
                for pair in range(pairs):
                    row, frequency = 2 * (head * pairs + pair), order[(pair * heads + head) % count]
                    parameter[row, frequency] += GAIN
                    parameter[row + 1, frequency + count] += GAIN


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the folder, which must be new or empty, whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model that `base_looks.yaml` has trained")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; it must be new or empty")
    parsed = parser.parse_args(arguments)
    with new_folder(parsed.output) as folder:
        model = SamoeModel.from_pretrained(parsed.model)
        let_points_find_their_place(model)
        model.save_pretrained(folder, processor=build_processor(model.config))


if __name__ == "__main__":
    main()
