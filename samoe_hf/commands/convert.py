r"""Convert checkpoints of SAM 2 and SAM2-MoE to folders of this package, and back.

    samoe convert sam2.1_hiera_base_plus.pt --experts checkpoint_best.pt --config sam2.1_hiera_moe.yaml \
        --output samoe-base-plus
    samoe convert samoe-base-plus --to original --output original

With `--push-to-hub` the model is uploaded as well, from a folder that an earlier call has written if it is there.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from samoe_hf import SamoeModel
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.model.weights_io import hash_tensors, new_folder
from samoe_hf.original.checkpoint import save_original

from .options import add_original_options, command_parser, original_options


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("convert", __doc__)
    model = parser.add_argument_group("model")
    model.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="an original .pt; or a folder or Hub id of SAMoE, SAM 2 video or SAM 3"
    )
    add_original_options(model)
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; new or empty")
    output.add_argument("--to", choices=("transformers", "original"), default="transformers", help="what to write")
    output.add_argument("--push-to-hub", metavar="ID", help="upload the model to this repository of the Hub")
    parsed = parser.parse_args(arguments)
    if parsed.push_to_hub and parsed.to == "original":
        parser.error("--push-to-hub uploads a model for transformers; it does not go with --to original")
    return parsed


def load(arguments: argparse.Namespace) -> SamoeModel:
    may_be_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", arguments.checkpoint) is not None
    if not Path(arguments.checkpoint).exists() and (arguments.checkpoint.endswith(".pt") or not may_be_hub_id):
        raise FileNotFoundError(f"{arguments.checkpoint}: no such file or folder.")
    torch.manual_seed(0)  # experts that the checkpoint lacks are the same at every conversion
    return SamoeModel.from_pretrained(arguments.checkpoint, **original_options(arguments))


def check_same(folder: Path, model: SamoeModel) -> None:
    """Raises a `FileExistsError` unless a folder holds a model of the same tensors."""
    try:
        saved = hash_tensors(sorted(SamoeModel.from_pretrained(folder).state_dict().items()))
    except (OSError, ValueError):
        saved = None
    if saved != hash_tensors(sorted(model.state_dict().items())):
        raise FileExistsError(f"{folder} is not empty, and holds something else than this model; give another output.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the output folder whole or not at all, and uploads the model if asked to."""
    parsed = parse_arguments(arguments)
    if parsed.push_to_hub and parsed.output.is_dir() and any(parsed.output.iterdir()):
        model = load(parsed)
        check_same(parsed.output, model)
    else:
        with new_folder(parsed.output) as folder:
            model = load(parsed)
            if parsed.to == "original":
                save_original(model.config, model.state_dict(), folder)
            else:
                model.save_pretrained(folder, processor=build_processor(model.config))
        print(f"Written: {', '.join(sorted(path.name for path in parsed.output.iterdir()))} in {parsed.output}")
    if parsed.push_to_hub:
        commit = model.push_to_hub(parsed.push_to_hub, processor=build_processor(model.config))
        print(f"Uploaded to {commit.repo_url}")
