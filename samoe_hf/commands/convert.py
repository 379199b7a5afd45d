r"""Convert checkpoints of SAM 2, SAM2-MoE and SAM 3 to folders of this package, and models to what others load.

    samoe convert sam2.1_hiera_base_plus.pt --experts checkpoint_best.pt --config sam2.1_hiera_moe.yaml \
        --output samoe-base-plus
    samoe convert samoe-base-plus --to original --output original
    samoe convert mine --domain ultrasound --to sam2 --output ultrasound

`--to` says what is written:
    samoe         a SamoeModel's folder; with `--domain`, of that domain alone
    original      SAM2-MoE's checkpoints, with experts
    transformers  a folder of Sam2VideoModel, Sam3TrackerVideoModel or EdgeTamVideoModel, with the experts merged
    sam2          Meta's checkpoint and YAML, with the experts merged
    sam3          a copy of SAM 3 (`--into`: Meta's sam3.pt, or a folder of transformers' form), whose tracker is the
                  model with its experts merged
    edgetam       Meta's edgetam.pt, with the experts merged

Experts can be merged where each layer has one, as with `samoe adapt … --num_experts 1 --num_experts_per_tok 1`.
With `--push-to-hub` the model is uploaded as well, from a folder that an earlier call has written if it is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from samoe_hf.errors import InputError, input_errors

from .options import add_model_option, add_output_option, add_size_option, command_parser, load_model

if TYPE_CHECKING:
    from samoe_hf.model.modeling_samoe import SamoeModel
    from samoe_hf.model.processing_samoe import VideoProcessor

TARGETS = ("samoe", "original", "transformers", "sam2", "sam3", "edgetam")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("convert", __doc__)
    group = add_model_option(parser)
    group.add_argument("--domain", metavar="NAME", help="whose experts are written; base: none")
    add_size_option(group)
    output = add_output_option(parser, "folder to write; new or empty")
    output.add_argument("--to", choices=TARGETS, default=TARGETS[0], help="what to write")
    output.add_argument("--into", type=Path, metavar="PATH", help="with --to sam3: SAM 3, Meta's file or a folder")
    output.add_argument("--push-to-hub", metavar="ID", help="upload the model to this repository of the Hub")
    parsed = parser.parse_args(arguments)
    if parsed.push_to_hub and parsed.to != "samoe":
        parser.error(f"--push-to-hub uploads a SamoeModel; it does not go with --to {parsed.to}")
    if parsed.domain and parsed.to == "original":
        parser.error("--domain does not go with --to original, which has one mixture of experts for all videos")
    if (parsed.into is None) == (parsed.to == "sam3"):
        parser.error("--into, the file or folder of SAM 3 that the tracker is put into, goes with --to sam3")
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


def load(parsed: argparse.Namespace) -> tuple[SamoeModel, VideoProcessor]:
    """The model, of the chosen domain alone if it is to stay a SamoeModel, and its processor."""
    import torch

    from samoe_hf.surgery.domains import find_domain, remove_domain
    from samoe_hf.surgery.merge import BASE_ALONE

    model, processor = load_model(parsed, torch.device("cpu"))
    if parsed.to == "samoe" and parsed.domain:
        if parsed.domain != BASE_ALONE:
            find_domain(model, parsed.domain)
        for name in [name for name in model.config.domain_names if name != parsed.domain]:
            remove_domain(model, name)
    return model, processor


def write(parsed: argparse.Namespace, model: SamoeModel, processor: VideoProcessor, folder: Path) -> None:
    """Writes what is asked for to a new folder."""
    from samoe_hf.model.base import EDGETAM, SAM2, SAM3, check_base
    from samoe_hf.original.checkpoint import save_edgetam, save_original, save_sam2, save_sam3
    from samoe_hf.surgery.merge import merge_into_base, save_into_sam3

    bases = {"original": SAM2, "sam2": SAM2, "sam3": SAM3, "edgetam": EDGETAM}
    if parsed.to in bases:  # before what merging asks for
        check_base(model.config, bases[parsed.to])
    encoder_changed, selection = False, "recent"
    if parsed.to == "samoe":
        model.save_pretrained(folder, processor=processor)
    elif parsed.to == "original":
        save_original(model.config, model.state_dict(), folder)
    elif parsed.to == "transformers":
        merge_into_base(model, parsed.domain).save_pretrained(folder)
        processor.save_pretrained(folder)
    elif parsed.to in ("sam2", "edgetam"):
        save = save_sam2 if parsed.to == "sam2" else save_edgetam
        save(model.config, merge_into_base(model, parsed.domain).state_dict(), folder)
    elif parsed.into.is_file():
        tensors, selection = merge_into_base(model, parsed.domain).state_dict(), "score"
        encoder_changed = save_sam3(model.config, tensors, parsed.into, folder)
    else:
        encoder_changed = save_into_sam3(model, parsed.domain, parsed.into, folder)
    if encoder_changed:
        print("The image encoder was trained too, and SAM 3's detector shares it: what it finds changes.")
    if parsed.to not in ("samoe", "original") and model.memory_selection != selection:
        print(f"This model chooses memories by {model.memory_selection!r}; what was written, by {selection!r}.")


def run(parsed: argparse.Namespace) -> None:
    """Writes the output folder whole or not at all, and uploads the model if asked to."""
    import torch

    from samoe_hf.one_writer import OneWriter
    from samoe_hf.whole_files import new_folder

    torch.manual_seed(0)  # experts that the checkpoint lacks are the same at every conversion
    if parsed.push_to_hub and parsed.output.is_dir() and any(parsed.output.iterdir()):
        model, processor = load(parsed)
        if not holds_model(parsed.output, model):
            raise InputError(f"{parsed.output} holds something else than this model; give another output.")
    else:
        with OneWriter(parsed.output, inside=False), input_errors(), new_folder(parsed.output) as folder:
            model, processor = load(parsed)
            write(parsed, model, processor, folder)
        print(f"Written: {', '.join(sorted(path.name for path in parsed.output.iterdir()))} in {parsed.output}")
    if parsed.push_to_hub:
        with input_errors():
            commit = model.push_to_hub(parsed.push_to_hub, processor=processor)
        print(f"Uploaded to {commit.repo_url}")
