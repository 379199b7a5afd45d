"""Write a model as files that other programs run, without PyTorch.

    samoe export MODEL --output exported
    python exported/run.py frames prompts.json masks

The folder gets the parts of a frame's work, each in an ONNX file; model.json, which says what each takes and gives; and
run.py, a tracker that needs onnxruntime, NumPy and Pillow alone. With `--format torch` the parts are programs of
torch.export, for C++ with PyTorch, and there is no run.py.

Experts come along with their routers. Of a model with domains, `--domain` says whose.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from samoe_hf.errors import input_errors

from .options import add_memory_option, add_model_option, add_output_option, add_size_option, command_parser, load_model


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("export", __doc__)
    group = add_model_option(parser)
    add_memory_option(group)
    add_size_option(group)
    group.add_argument("--domain", metavar="NAME", help="whose experts are exported; base: none")
    output = add_output_option(parser, "folder to write; new or empty")
    output.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="of the parts (onnx)")
    help_text = "of the weights, and of what is computed (float32)"
    output.add_argument("--dtype", choices=("float32", "float16"), default="float32", help=help_text)
    return parser.parse_args(arguments)


def run(parsed: argparse.Namespace) -> None:
    import torch

    from samoe_hf.export.write import export_model
    from samoe_hf.one_writer import OneWriter

    with OneWriter(parsed.output, inside=False), input_errors():
        model, processor = load_model(parsed, torch.device("cpu"))
        export_model(model, processor, parsed.output, parsed.domain, parsed.format, show_progress_bar=True)
    sizes = {path.name: path.stat().st_size / 1e6 for path in sorted(parsed.output.iterdir())}
    written = ", ".join(f"{name} ({size:.1f} MB)" for name, size in sizes.items())
    print(f"Written to {parsed.output}: {written}")
