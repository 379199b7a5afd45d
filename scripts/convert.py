"""Converts checkpoints of SAM 2 and SAM2-MoE to folders of this package, and back.

Example:
    python scripts/convert.py sam2.1_hiera_base_plus.pt --experts checkpoint_best.pt --config sam2.1_hiera_moe.yaml \
        --output samoe-base-plus
    python scripts/convert.py samoe-base-plus --to original --output original
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi

from samoe_hf import SamoeModel
from samoe_hf.hub.model_card import write_model_card
from samoe_hf.model.files import new_folder
from samoe_hf.model.processor import build_processor
from samoe_hf.original.checkpoint import save_original


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="an original .pt file; or a folder or Hub id of SAMoE or SAM 2 video")
    parser.add_argument("--experts", type=Path, help="with a .pt file: the file of its experts")
    parser.add_argument("--config", type=Path, help="with a .pt file: its YAML, needed for sizes other than Meta's")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must be new or empty")
    parser.add_argument("--to", choices=("transformers", "original"), default="transformers", help="what to write")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the folder to this repository of the Hub")
    return parser.parse_args(arguments)


def convert(arguments: argparse.Namespace) -> None:
    """Writes the output folder whole or not at all.

    Raises:
        OSError, ValueError: if a file is missing or unfit, the output not empty, or the upload refused.
    """
    may_be_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", arguments.checkpoint) is not None
    if not Path(arguments.checkpoint).exists() and (arguments.checkpoint.endswith(".pt") or not may_be_hub_id):
        raise FileNotFoundError(f"{arguments.checkpoint}: no such file or folder.")
    with new_folder(arguments.output) as folder:
        model = SamoeModel.from_pretrained(
            arguments.checkpoint, experts=arguments.experts, original_config=arguments.config
        )
        if arguments.to == "original":
            save_original(model.config, model.state_dict(), folder)
        else:
            model.save_pretrained(folder, processor=build_processor(model.config))
    print(f"Wrote {arguments.output}: {', '.join(sorted(path.name for path in arguments.output.iterdir()))}")
    if arguments.push_to_hub:
        api = HfApi()
        url = api.create_repo(arguments.push_to_hub, exist_ok=True)
        if arguments.to == "transformers" and not api.file_exists(url.repo_id, "README.md"):
            write_model_card(model, arguments.output, url.repo_id)
        api.upload_folder(repo_id=url.repo_id, folder_path=arguments.output)
        print(f"Uploaded to {url}")


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        convert(parsed)
    except (OSError, ValueError) as error:
        print(f"convert.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
