r"""Convert checkpoints of SAM 2 and SAM2-MoE to folders of this package, and back.

    samoe convert sam2.1_hiera_base_plus.pt --experts checkpoint_best.pt --config sam2.1_hiera_moe.yaml \
        --output samoe-base-plus
    samoe convert samoe-base-plus --to original --output original

With `--push-to-hub` the model is uploaded as well, from a folder that an earlier call has written if it is there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samoe_hf.errors import InputError, input_errors

from .options import add_original_options, command_parser, load_model

if TYPE_CHECKING:
    from samoe_hf.model.modeling_samoe import SamoeModel


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
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


def load(parsed: argparse.Namespace) -> SamoeModel:
    import torch

    may_be_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", parsed.checkpoint) is not None
    if not Path(parsed.checkpoint).exists() and (parsed.checkpoint.endswith(".pt") or not may_be_hub_id):
        raise InputError(f"{parsed.checkpoint}: no such file or folder.")
    torch.manual_seed(0)  # experts that the checkpoint lacks are the same at every conversion
    return load_model(parsed.checkpoint, torch.device("cpu"), parsed.experts, parsed.config)[0]


def check_same(folder: Path, model: SamoeModel) -> None:
    """Raises an `InputError` unless a folder holds a model of the same tensors."""
    import torch

    from samoe_hf.model.weights_io import hash_tensors

    try:
        saved, _ = load_model(str(folder), torch.device("cpu"))
        same = hash_tensors(sorted(saved.state_dict().items())) == hash_tensors(sorted(model.state_dict().items()))
    except InputError:
        same = False
    if not same:
        raise InputError(f"{folder} is not empty, and holds something else than this model; give another output.")


def run(parsed: argparse.Namespace) -> None:
    """Writes the output folder whole or not at all, and uploads the model if asked to."""
    from samoe_hf.model.processing_samoe import build_processor
    from samoe_hf.model.weights_io import new_folder
    from samoe_hf.original.checkpoint import save_original

    if parsed.push_to_hub and parsed.output.is_dir() and any(parsed.output.iterdir()):
        model = load(parsed)
        check_same(parsed.output, model)
    else:
        with input_errors(), new_folder(parsed.output) as folder:
            model = load(parsed)
            if parsed.to == "original":
                save_original(model.config, model.state_dict(), folder)
            else:
                model.save_pretrained(folder, processor=build_processor(model.config))
        print(f"Written: {', '.join(sorted(path.name for path in parsed.output.iterdir()))} in {parsed.output}")
    if parsed.push_to_hub:
        with input_errors():
            commit = model.push_to_hub(parsed.push_to_hub, processor=build_processor(model.config))
        print(f"Uploaded to {commit.repo_url}")
