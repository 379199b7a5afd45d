r"""Convert checkpoints of SAM 2 and SAM2-MoE to folders of this package, and back.

    samoe convert sam2.1_hiera_base_plus.pt --experts checkpoint_best.pt --config sam2.1_hiera_moe.yaml \
        --output samoe-base-plus
    samoe convert samoe-base-plus --to original --output original

With `--push-to-hub` the model is uploaded as well, from a folder that an earlier call has written if it is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samoe_hf.errors import InputError, input_errors

from .options import add_model_option, add_output_option, command_parser, load_model

if TYPE_CHECKING:
    from samoe_hf.model.modeling_samoe import SamoeModel


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("convert", __doc__)
    add_model_option(parser)
    output = add_output_option(parser, "folder to write; new or empty")
    output.add_argument("--to", choices=("transformers", "original"), default="transformers", help="what to write")
    output.add_argument("--push-to-hub", metavar="ID", help="upload the model to this repository of the Hub")
    parsed = parser.parse_args(arguments)
    if parsed.push_to_hub and parsed.to == "original":
        parser.error("--push-to-hub uploads a model for transformers; it does not go with --to original")
    return parsed


def holds_model(folder: Path, model: SamoeModel) -> bool:
    """Whether a folder holds a model of the same tensors."""
    from samoe_hf.model.modeling_samoe import SamoeModel
    from samoe_hf.model.weights_io import hash_tensors

    try:
        saved = SamoeModel.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return hash_tensors(sorted(saved.state_dict().items())) == hash_tensors(sorted(model.state_dict().items()))


def run(parsed: argparse.Namespace) -> None:
    """Writes the output folder whole or not at all, and uploads the model if asked to."""
    import torch

    from samoe_hf.model.processing_samoe import build_processor
    from samoe_hf.model.weights_io import new_folder
    from samoe_hf.one_writer import OneWriter
    from samoe_hf.original.checkpoint import save_original

    torch.manual_seed(0)  # experts that the checkpoint lacks are the same at every conversion
    if parsed.push_to_hub and parsed.output.is_dir() and any(parsed.output.iterdir()):
        model, _ = load_model(parsed, torch.device("cpu"))
        if not holds_model(parsed.output, model):
            raise InputError(f"{parsed.output} holds something else than this model; give another output.")
    else:
        with OneWriter(parsed.output, inside=False), input_errors(), new_folder(parsed.output) as folder:
            model, _ = load_model(parsed, torch.device("cpu"))
            if parsed.to == "original":
                save_original(model.config, model.state_dict(), folder)
            else:
                model.save_pretrained(folder, processor=build_processor(model.config))
        print(f"Written: {', '.join(sorted(path.name for path in parsed.output.iterdir()))} in {parsed.output}")
    if parsed.push_to_hub:
        with input_errors():
            commit = model.push_to_hub(parsed.push_to_hub, processor=build_processor(model.config))
        print(f"Uploaded to {commit.repo_url}")
